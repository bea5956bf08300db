"""With its weights there, the worker opens no connection in its whole life, but for URLs in requests."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import Server
from tests.media.films import film, numbered
from tests.media.pdfs import numbers
from tests.six_turns import NUMBER, uri, user

GUARDED = {"PYTHONPATH": str(Path(__file__).with_name("guard"))}
GREEDY = {"temperature": 0.0}


@pytest.fixture
def unconnected(tmp_path: Path) -> Iterator[Server]:
    """One whose worker dies when it opens a connection to anything."""
    with Server("tiny", tmp_path / "log", **GUARDED) as server:
        yield server


def test_a_connection_is_noticed() -> None:
    for code, status in (("socketpair()", 0), ("socket()", -signal.SIGSYS), ("socket(AF_INET6)", -signal.SIGSYS)):
        command = [sys.executable, "-c", f"from socket import *; {code}  # _run_worker()"]
        assert subprocess.run(command, env={**os.environ, **GUARDED}).returncode == status


def test_from_its_start_to_its_end(unconnected: Server, tmp_path: Path) -> None:
    pdf = tmp_path / "a.pdf"
    pdf.write_bytes(numbers(["358"]))
    video = film(tmp_path / "v.mp4", [numbered(str(index)) for index in range(4)])
    question = "What number is in the picture?"
    for request, answer in (
        ({"prompt": "What is 12 + 7?"}, "19"),
        ({"prompt": question, "images": [uri(NUMBER)]}, "42"),
        ({"messages": [user(question, uri(NUMBER))]}, "42"),
        ({"prompt": question, "documents": [uri(pdf)], "max_image_tokens": 64}, "358"),
        ({"prompt": "What is 12 + 7?", "json_schema": '{"enum": [19, 20]}'}, "19"),
    ):
        assert unconnected.predict(**request, **GREEDY)["output"][0]["answer"] == answer
    assert unconnected.predict(prompt=question, video=uri(video), **GREEDY)["status"] == "succeeded"
    assert list(unconnected.events(prompt="What is 12 + 7?", stream=True))[-1][0] == "completed"
    for images in (["http://127.0.0.1/"], ["https://[::1]/"], ["/etc/passwd"], ["data:,"]):
        assert unconnected.predict(prompt=question, images=images)["status"] == "failed"
    unconnected.until_free()
    unconnected.process.send_signal(signal.SIGTERM)
    assert unconnected.process.wait(timeout=30) == 0
