"""Starting, cancelling, losing the client, and shutting down."""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.contract.conftest import TINY, Server
from tests.model.hub import Hub

LONG = {"prompt": "What is 12 + 7?", "temperature": 0.0, "max_new_tokens": 4000}
SHORT = {"prompt": "What is 12 + 7?", "temperature": 0.0, "max_new_tokens": 30}


def test_a_cancelled_prediction_frees_the_server_within_a_second(endless: Any) -> None:
    endless.start("to-be-cancelled", **LONG)
    time.sleep(1)
    assert endless.client.post("/predictions/to-be-cancelled/cancel").status_code == 200
    assert endless.until_free() < 1
    started = time.monotonic()
    assert endless.predict(**SHORT)["status"] == "succeeded"
    assert time.monotonic() - started < 3, "the cancelled one still runs on the engine"


def test_a_cancel_at_any_moment_leaves_nothing_running(endless: Any) -> None:
    for milliseconds in [0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30] * 2:
        name = f"cancelled-{time.monotonic_ns()}"
        endless.start(name, **LONG)
        time.sleep(milliseconds / 1000)
        started = time.monotonic()
        while endless.client.post(f"/predictions/{name}/cancel").status_code == 200:
            time.sleep(0.05)  # Cog loses a cancel that comes before the prediction's thread runs
        assert endless.predict(**SHORT | {"max_new_tokens": 3})["status"] == "succeeded"
        assert time.monotonic() - started < 2, f"after a cancel at {milliseconds} ms the engine was not free"


def test_a_client_that_leaves_frees_the_server_within_a_second(endless: Any) -> None:
    for kind, _ in endless.events(**LONG, stream=True):
        if kind == "output":
            break
    assert endless.until_free() < 1
    started = time.monotonic()
    assert endless.predict(**SHORT)["status"] == "succeeded"
    assert time.monotonic() - started < 3, "the abandoned one still runs on the engine"


def test_sigterm_under_load_lets_the_running_prediction_finish(endless_model: Path, tmp_path: Path) -> None:
    refused, results = set[object](), list[dict[str, Any]]()

    def insist() -> None:
        with suppress(httpx.TransportError):  # nobody listens any more
            while True:
                refused.add(httpx.post(f"{server.client.base_url}/predictions", json={"input": SHORT}).status_code)

    with Server(str(endless_model), tmp_path / "log") as server:
        running = threading.Thread(target=lambda: results.append(server.predict(**LONG | {"max_new_tokens": 300})))
        running.start()
        time.sleep(0.5)
        others = [threading.Thread(target=insist) for _ in range(4)]
        for other in others:
            other.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        for thread in (running, *others):
            thread.join(30)
        assert refused == {409}
        assert results[0]["status"] == "succeeded"
        assert results[0]["metrics"]["finish_reason"] == "length"
        assert server.process.wait(timeout=20) == 0


def test_a_first_start_fetches_the_weights_into_the_folder_that_is_given(tmp_path: Path) -> None:
    hub = Hub()
    hub.revisions["someone/tiny", "main"] = {path.name: path.read_bytes() for path in TINY.iterdir()}
    weights = {"KIMI_VL_WEIGHTS_DIR": str(tmp_path / "models")}
    for network in ({"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}):  # the second time nothing is asked of it
        with Server("hf://someone/tiny", tmp_path / "log", **weights, **network) as server:
            assert server.health["status"] == "READY"
            assert server.predict(prompt="What is 12 + 7?", temperature=0)["output"][0]["answer"] == "19"
    hub.close()


def test_without_weights_setup_fails_and_says_how_to_get_them(tmp_path: Path) -> None:
    with Server("thinking-2506", tmp_path / "log") as server:  # nobody has these in a test
        assert server.health["status"] == "SETUP_FAILED"
        assert "python scripts/download_weights.py thinking-2506" in server.health["setup"]["logs"]


def test_a_folder_that_cannot_be_used_is_refused_with_one_sentence(endless_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(endless_model, tmp_path / "truncated")
    os.truncate(folder / "model.safetensors", 1_000_000)
    sentence = f"the model folder {folder} cannot be used: model.safetensors is truncated"
    with Server(str(folder), tmp_path / "log") as server:
        assert server.health["status"] == "SETUP_FAILED"
        assert sentence in server.health["setup"]["logs"]
