"""What a client may be told, and that the server is well."""

import os
import re
import socket
from typing import Any

from tests.contract.conftest import ROOT, Server

REFUSED = "Prediction failed: Generator iteration error: InvalidRequest: "
SHAPES = re.compile(r"\S.*[;:] .*\.|\S.* and must (be|have) from .* to .*\.")  # what is wrong; what to do
LEAKS = re.compile(
    r"Traceback|\w+Error\b|\bErrno\b|0x[0-9a-f]{6,}|<\w+[. ]|site-packages|\.py\b|/(tmp|proc|etc|root|home)/"
)
SECRETS = [str(ROOT), os.path.expanduser("~"), socket.gethostname(), os.environ["PATH"]]


def refusal(result: dict[str, Any]) -> str:
    """The sentence with which a prediction was refused; it tells nothing of the inside."""
    assert result["status"] == "failed", result
    assert not result["logs"]
    assert result["error"].startswith(REFUSED), result["error"]
    sentence = result["error"].removeprefix(REFUSED)
    assert SHAPES.fullmatch(sentence), sentence
    assert len(sentence) < 400
    assert not LEAKS.search(sentence), sentence
    assert not any(secret in sentence for secret in SECRETS)
    return sentence


def must_answer(server: Server) -> None:
    """The next request is right."""
    result = server.predict(prompt="What is 12 + 7?", temperature=0.0)
    assert result["output"] == [{"thinking": "12 + 7: 12 + 7 = 19.", "answer": "19"}], result
