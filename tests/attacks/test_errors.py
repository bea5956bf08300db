"""Every invalid value of every input ends in one sentence, which tells nothing of the inside of the server."""

import pytest
from cog_schema import ROOT, schema

from tests.attacks.sentences import LEAKS, SECRETS, must_answer, refusal
from tests.contract.conftest import Server

INPUTS = schema((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]
FITTING = {"json_schema": '{"type": "null"}', "pages": ""}
ODD = [
    *(None, True, 0, -1, -2, 1.5, 10**9, 10**30, -1e308, 1e308, 1e-320),
    *("", " ", "a", "\0", "\x1b[2J", "{0}{self.__class__}%s%n$(id)", "../../etc/passwd", "'; --", "NaN", "1", "\u202e"),
    *([], [None], [0], [""], ["a" * 101], [[]], [{}], {}, {"a": 1}, {"__class__": "x"}),
    *([{"role": "user"}], [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"type": "\x1b[2J"}]}]),
    *("data:", "data:,x", "data:;base64,!", "http://", "http://[", "http://a b/", "https://nowhere.invalid/x"),
]


@pytest.mark.parametrize("name", INPUTS)
def test_odd_values(server: Server, name: str) -> None:
    for value in ODD:
        result = server.predict(**{"prompt": "x", "max_new_tokens": 1, name: value})
        if "detail" in result:  # Cog compares with the schema, and says so in its own words
            (detail, *_) = result["detail"]
            assert detail["loc"][2].partition("/")[0] == name
            assert not any(secret in detail["msg"] for secret in SECRETS)
        elif result["status"] != "succeeded":
            refusal(result)
    must_answer(server)


BODIES = {
    b"": 400,
    b"null": 422,
    b"[]": 422,
    b'{"input": []}': 422,
    b'{"input": {"prompt": NaN}}': 400,
    b'{"input": {"temperature": 1e999}}': 400,
    b'{"input": {"prompt": "\\ud800"}}': 400,
    b'{"input": {"prompt": "\xff\xfe"}}': 400,
    b'{"input": {"prompt": "x"}, "input": {}}': 422,
    b'{"input": {"prompt": "x"}, "webhook": "file:///etc/passwd", "webhook_events_filter": ["\x00"]}': 400,
    b"[" * 100_000: 422,
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:60]))
def test_odd_bodies(server: Server, body: bytes) -> None:
    response = server.client.post("/predictions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == BODIES[body], response.text
    assert not LEAKS.search(response.text.replace("/predictions", ""))
    must_answer(server)


@pytest.mark.parametrize(
    "path", ["/", "/etc/passwd", "/..%2f..%2fetc/passwd", "/predictions/..%2f", "/docs", "/trainings"]
)
def test_odd_paths(server: Server, path: str) -> None:
    response = server.client.get(path)
    assert "root:" not in response.text
    assert not any(secret in response.text for secret in SECRETS)
