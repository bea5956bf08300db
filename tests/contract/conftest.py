"""The real Cog server, in processes of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from image_src import image_files, lay_out
from safetensors.torch import load_file, save_file

from kimi_vl.prompt.tokenizer import TikTokenTokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights" / "tiny"
START_SECONDS = 60
Event = tuple[str, dict[str, Any]]


class Server:
    """Cog's server on a free port: through scripts/serve, or in a folder laid out as the image's.

    Attributes:
        health: what the health check said once it had started, well or not.
    """

    def __init__(self, model: str, log: Path, image: Path | None = None, **settings: str) -> None:
        """
        Args:
            model: for --model.
            log: file of what it prints.
            image: folder laid out as the image's; else scripts/serve starts it.
            settings: environment variables.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        if image:
            command: list[str | Path] = ["python", "-m", "cog.server.http", "--host", "127.0.0.1"]
            in_image = {"PORT": str(port), "KIMI_VL_MODEL": model, "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
            settings = in_image | settings
        else:
            command = [ROOT / "scripts" / "serve", "--port", str(port)] + (["--model", model] if model else [])
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=image,
                stdout=output,
                stderr=output,
                env={**os.environ, "PATH": path, **settings},
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def __enter__(self) -> Self:
        try:
            self.health = self._started()
        except BaseException:
            self.__exit__()  # which nobody calls when this fails
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it and its worker."""
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _started(self) -> dict[str, Any]:
        """Waits until it has started, well or not."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                health = self.client.get("/health-check").json()
                if health["status"] != "STARTING":
                    return health
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def predict(self, **request: Any) -> dict[str, Any]:
        """One prediction, waited for."""
        return self._when_free(lambda: self.client.post("/predictions", json={"input": request})).json()

    def refusal(self, **request: Any) -> str:
        """The one sentence with which a prediction fails."""
        result = self.predict(**request)
        assert result["status"] == "failed", result
        assert not result["logs"], "a failed prediction shows nothing of the inside"
        return result["error"].removeprefix("Prediction failed: Generator iteration error: InvalidRequest: ")

    def start(self, name: str, **request: Any) -> None:
        """Starts a prediction and does not wait for it."""
        headers = {"Prefer": "respond-async"}
        url = f"/predictions/{name}"
        response = self._when_free(lambda: self.client.put(url, json={"input": request}, headers=headers))
        assert response.status_code == 202, response.text

    def events(self, **request: Any) -> Iterator[Event]:
        """The events of one streamed prediction, as they come."""
        headers = {"Accept": "text/event-stream"}
        self.until_free()
        with self.client.stream("POST", "/predictions", json={"input": request}, headers=headers) as response:
            assert response.status_code == 200, response.read()
            kind = ""
            for line in response.iter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    kind = value
                elif field == "data":
                    yield kind, json.loads(value)

    def until_free(self) -> float:
        """Waits until the next prediction can start; returns how many seconds that took."""
        started = time.monotonic()
        while self.client.get("/health-check").json()["status"] != "READY":
            assert time.monotonic() - started < 30
            time.sleep(0.01)
        return time.monotonic() - started

    def _when_free(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """A slot is free only a little after its response was sent, and until then the answer is 409."""
        until = time.monotonic() + 30
        while (response := send()).status_code == 409 and time.monotonic() < until:
            time.sleep(0.02)
        return response


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that serves the tiny model."""
    with Server("tiny", tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's /src, with the tiny model as its only weights."""
    folder = tmp_path_factory.mktemp("image") / "src"
    files = [file for file in image_files(ROOT) if file.parts[0] != "weights" or file.parts[1] == "tiny"]
    lay_out(ROOT, files, folder)
    return folder


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with stop tokens that are never the likeliest: its answers end at max_new_tokens alone."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    stop_ids = TikTokenTokenizer.from_pretrained(TINY).stop_ids
    tensors["language_model.lm_head.weight"][sorted(stop_ids)] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def endless(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answers go on until max_new_tokens."""
    with Server(str(endless_model), tmp_path_factory.mktemp("server") / "log") as server:
        yield server
