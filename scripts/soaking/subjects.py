"""Who runs the errands: a real Cog server, or a service in this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import httpx

from kimi_vl.errors import InvalidRequest
from kimi_vl.output.pacing import joined
from kimi_vl.request import Request
from kimi_vl.service import Service
from soaking.errands import Errand

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # for its start, and for each errand
CANCEL_AFTER = 0.05  # seconds


class Subject(Protocol):
    """Runs errands and asserts how they end."""

    process: int

    def run(self, errand: Errand) -> None:
        """Runs one, and returns when the next can begin."""

    def close(self) -> None:
        """Ends it."""


class CogServer:
    """scripts/serve with a model, on a free port."""

    def __init__(self, model: str, temporary: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("w") as output:
            self._server = subprocess.Popen(
                [ROOT / "scripts" / "serve", "--model", model, "--port", str(port)],
                stdout=output,
                stderr=output,
                env={**os.environ, "PATH": path, "TMPDIR": str(temporary)},
                start_new_session=True,
            )
        self.process = self._server.pid
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()  # which nobody calls when this fails
            raise

    def run(self, errand: Errand) -> None:
        """Through HTTP."""
        body = {"input": _inputs(errand.request)}
        if errand.end == "cancelled":
            self._cancel(body)
        elif errand.end in ("streamed", "left"):
            self._stream(errand, body)
        else:
            result = self._when_free(lambda: self._client.post("/predictions", json=body)).json()
            assert result["status"] == ("failed" if errand.end == "refused" else "succeeded"), result
            if errand.end == "refused":
                assert "InvalidRequest" in result["error"], result
            elif errand.answer is not None:
                assert result["output"][0]["answer"] == errand.answer, (errand.name, result)
        self._wait_until_ready()

    def close(self) -> None:
        """Ends it and its worker."""
        self._client.close()
        os.killpg(self.process, signal.SIGKILL)
        self._server.wait()

    def _cancel(self, body: dict[str, Any]) -> None:
        url = f"/predictions/soak-{time.monotonic_ns()}"
        started = self._when_free(lambda: self._client.put(url, json=body, headers={"Prefer": "respond-async"}))
        assert started.status_code == 202, started.text
        time.sleep(CANCEL_AFTER)
        while self._client.post(f"{url}/cancel").status_code == 200:  # until there is no such prediction any more
            time.sleep(0.02)

    def _stream(self, errand: Errand, body: dict[str, Any]) -> None:
        headers, body = {"Accept": "text/event-stream"}, {"input": body["input"] | {"stream": True}}
        said = ""
        with self._client.stream("POST", "/predictions", json=body, headers=headers) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if '"chunk"' in line:
                    said += json.loads(line.removeprefix("data: "))["chunk"]["answer"]
                    if errand.end == "left":
                        return
        assert errand.answer in (None, said), (errand.name, said)

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            try:
                if self._client.get("/health-check").json()["status"] == "READY":
                    return
            except httpx.TransportError:
                assert self._server.poll() is None, "the server has ended"
            time.sleep(0.01)
        raise AssertionError("the server is not ready")

    def _when_free(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """A slot is free only a little after its response was sent, and until then the answer is 409."""
        while (response := send()).status_code == 409:
            time.sleep(0.02)
        return response


class InProcess:
    """A service, without Cog."""

    def __init__(self, service: Service, knows: bool) -> None:
        """
        Args:
            service: with any model.
            knows: whether its model is the tiny one, whose answers must be right.
        """
        self.process = os.getpid()
        self._service = service
        self._knows = knows

    def run(self, errand: Errand) -> None:
        """Through Service."""
        try:
            with self._service.answer(errand.request) as answer:
                if errand.end in ("cancelled", "left"):
                    list(islice(answer, 3))
                    return
                said = joined(answer).answer
        except InvalidRequest:
            assert errand.end == "refused", errand.name
        else:
            assert errand.end != "refused", errand.name
            assert not self._knows or errand.answer in (None, said), (errand.name, said)

    def close(self) -> None:
        """Ends its threads."""
        self._service.close()


def _inputs(request: Request) -> dict[str, Any]:
    """What is not as it is by default, as JSON."""
    given = {field.name: getattr(request, field.name) for field in fields(Request)}
    defaults = {field.name: field.default for field in fields(Request)}
    return {name: _json(value) for name, value in given.items() if value != defaults[name]}


def _json(value: object) -> object:
    if isinstance(value, list):
        return [_json(each) for each in value]
    if isinstance(value, Path):
        return f"data:application/octet-stream;base64,{b64encode(value.read_bytes()).decode()}"
    return value
