"""With its weights there, the server connects to nothing in its whole life, but for URLs in requests."""

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

NO_CONNECT = [sys.executable, Path(__file__).with_name("no_connect.py")]
GREEDY = {"temperature": 0.0}


@pytest.fixture
def unconnected(tmp_path: Path) -> Iterator[Server]:
    """One that dies when it connects to anything."""
    server = Server("tiny", tmp_path / "log", through=NO_CONNECT)
    server.wait()
    yield server
    server.stop()


def test_a_connection_is_noticed() -> None:
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 1))"
    for command, status in ((["-c", "pass"], 0), (["-c", code], -signal.SIGSYS)):
        assert subprocess.run([*NO_CONNECT, sys.executable, *command]).returncode == status


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
