"""A disk, a temp folder, a worker: what Cog's server answers while they fail, and after."""

import os
import resource
import shutil
import signal
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.conftest import Server
from tests.contract.test_predictions import CIRCLES
from tests.media.pdfs import numbers

SUM: dict[str, Any] = {"prompt": "What is 12 + 7?", "temperature": 0}
DOCUMENT = "data:application/pdf;base64," + b64encode(numbers(["17"])).decode()
COUNTING = '{"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 4000}'
LONG: dict[str, Any] = {**SUM, "thinking_budget": 0, "json_schema": COUNTING, "max_new_tokens": 8000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that this module may end."""
    with Server("tiny", tmp_path_factory.mktemp("server") / "log", TMPDIR=str(folder)) as server:
        yield server


def worker(server: Server) -> int:
    """Its worker's process id."""
    lists = Path(f"/proc/{server.process.pid}/task").glob("*/children")  # of each thread
    (pid,) = (int(child) for children in lists for child in children.read_text().split())
    return pid


def is_right(server: Server) -> None:
    assert server.predict(**CIRCLES)["output"][0]["answer"] == "3"
    assert server.predict(**SUM)["output"][0]["answer"] == "19"


def test_a_full_disk_fails_what_needs_it_alone(server: Server) -> None:
    is_right(server)
    processes = server.process.pid, worker(server)
    for process in processes:  # the log cannot be written either
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        assert server.predict(**CIRCLES)["status"] == "failed"
        assert server.predict(**SUM)["output"][0]["answer"] == "19"
        assert server.predict(**SUM | {"prompt": ""})["status"] == "failed"
    finally:
        for process in processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    is_right(server)


def test_without_a_temp_folder_only_documents_and_videos_fail(server: Server, folder: Path) -> None:
    assert server.predict(**SUM, documents=[DOCUMENT])["status"] == "succeeded"
    is_right(server)
    shutil.rmtree(folder)
    try:
        result = server.predict(**SUM, documents=[DOCUMENT])
        assert result["status"] == "failed"
        assert result["error"].endswith("The server failed to answer; your request is not at fault, send it again.")
        assert str(folder) not in str(result), "nothing of the inside is shown"
        assert result["logs"] == ""
        assert "Traceback" in server.log.read_text()
        is_right(server)
    finally:
        folder.mkdir()
    is_right(server)


def test_no_file_of_a_request_stays(server: Server, folder: Path) -> None:
    is_right(server)
    server.until_free()
    assert not list(folder.iterdir())


def test_a_killed_worker_ends_the_server_for_a_supervisor_to_start_it_anew(server: Server) -> None:
    results: list[dict[str, Any]] = []
    running = threading.Thread(target=lambda: results.append(server.predict(**LONG)))
    running.start()
    while server.client.get("/health-check").json()["status"] != "BUSY":
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(worker(server), signal.SIGKILL)
    running.join(10)
    assert results[0]["status"] == "failed"
    assert results[0]["error"] == "Worker crashed"
    with suppress(httpx.TransportError):  # it may have ended already
        assert server.client.get("/health-check").json()["status"] == "UNHEALTHY"
    assert server.process.wait(timeout=10) == 0
    assert time.monotonic() - killed < 5
