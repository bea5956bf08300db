"""Requests that end while their files are still on their way: nothing of them keeps the next one waiting."""

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest

from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.errors import InvalidRequest
from kimi_vl.model.variants import UNNAMED, WEIGHTS
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Service
from kimi_vl.settings import Settings
from tests.cancels import cancel_while_reading
from tests.media.films import numbered
from tests.media.test_images import encoded

MEDIA_SECONDS = 20  # for which a download that nobody ends would go on
processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")


class Silent(Engine):
    """Answers nothing."""

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        inputs.tensors()
        generation.emit(min(generation.params.stop_ids))


class Host:
    """Sends pictures at /picture; anything else begins to come and never ends."""

    def __init__(self) -> None:
        self.begun = Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer(self, visitor: socket.socket) -> None:
        with visitor, suppress(OSError):
            whole = visitor.recv(10_000).startswith(b"GET /picture")
            visitor.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + encoded(numbered("81"))[: None if whole else 50])
            if not whole:
                self.begun.set()
                visitor.recv(1)  # until it hangs up


@pytest.fixture
def service() -> Iterator[Service]:
    settings = Settings(max_media_seconds=MEDIA_SECONDS, allow_private_urls=True)
    service = Service(settings, UNNAMED, processor, Silent(context_length=4000))
    yield service
    service.close()


def cancelled(service: Service, request: Request, host: Host) -> None:
    cancel_while_reading(lambda: service.answer(request), host.begun)


def late(service: Service, request: Request, host: Host) -> None:
    answer = service.answer(replace(request, timeout_s=0.5))
    joined(answer)
    assert answer.usage.finish_reason == "timeout"


def refused(service: Service, request: Request, host: Host) -> None:
    bad = "http://127.0.0.1:1/" if request.images else "data:;base64,AAAA"  # refused while the others come
    with pytest.raises(InvalidRequest, match="The first picture"):
        service.answer(replace(request, images=[bad, *request.images]))


def nameless() -> int:
    """How many files without a name this process has open, as those are that were fetched."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(name.endswith("(deleted)") for name in names)


@pytest.mark.parametrize("field", ["images", "documents", "video"])
@pytest.mark.parametrize("end", [cancelled, late, refused])
def test_downloads_end_with_their_request(
    service: Service, end: Callable[[Service, Request, Host], None], field: str, tmp_path: Path
) -> None:
    numbered("81").save(tmp_path / "81.png")
    host, before = Host(), nameless()
    endless = f"{host.url}/endless"
    files = {"images": [f"{host.url}/picture", *[endless] * 6], "documents": [endless] * 3, "video": endless}
    gc.disable()  # an error that kept files would keep them until it runs
    try:
        end(service, replace(Request("What?"), **{field: files[field]}), host)
        started = time.monotonic()
        joined(service.answer(Request("What?", images=[tmp_path / "81.png"])))
        while nameless() > before and time.monotonic() - started < MEDIA_SECONDS / 2:
            time.sleep(0.01)
        assert time.monotonic() - started < MEDIA_SECONDS / 2
    finally:
        gc.enable()
