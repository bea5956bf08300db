"""The real Cog server as a target: what it says, how long it takes and how much memory."""

import re
import socket
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pillow_heif
from PIL import Image, ImageDraw

from tests.contract.conftest import Server

SECONDS = 10  # promised are 2, on a machine that does nothing else
MEGABYTES = 650  # above idle; promised are 600, but the next reader may be starting
PAGE_BYTES = 4096
INSIDE = re.compile(r"Traceback|Error|0x[0-9a-f]{6}|(^|[\s'\"(])(/|[A-Za-z]:\\)\w")  # what a sentence must not tell
CONFINED = b"kimi_vl.media.confined"
QUESTION = "What number is in the picture?"
RIGHT = "42"
ANY = ""  # any refusal, or an answer
HUGE = "megapixels and the limit is 64; send a smaller one."

pillow_heif.register_heif_opener()


def uri(data: bytes, kind: str = "image/png") -> str:
    """A data: URI."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def number(text: str = RIGHT) -> Image.Image:
    """A picture whose number the tiny model reads."""
    picture = Image.new("RGB", (140, 84), "white")
    ImageDraw.Draw(picture).text((14, 14), text, fill="black", font_size=48)
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file."""
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    refusal: str  # "" when it was answered
    pictures: list[dict[str, Any]]  # as the metrics have them


class Target:
    """A server that must survive, and answer the next one right."""

    def __init__(self, server: Server) -> None:
        self.server = server
        children = _children()
        (self._worker,) = children[server.process.pid]

    def strike(self, name: str, wanted: str = ANY, **request: Any) -> Outcome:
        """Sends one request, and asserts that it ends in time, within the memory, in an answer or one sentence.

        Args:
            name: what is printed of it.
            wanted: RIGHT, a part of the refusal, or ANY.
            request: what is not as usual in it.
        """
        request = {"prompt": QUESTION, "temperature": 0, "max_new_tokens": 60, "max_image_tokens": 64, **request}
        self.server.until_free()
        with self._memory() as megabytes:
            started = time.monotonic()
            result = self.server.predict(**request)
            seconds = time.monotonic() - started
        print(f"{name}: {seconds:.1f} s, {megabytes[0]:.0f} MB, {result.get('error') or result.get('output')}")
        assert result["status"] in ("succeeded", "failed"), f"{name}: {result}"
        assert seconds < SECONDS, f"{name} took {seconds:.1f} s"
        assert megabytes[0] < MEGABYTES, f"{name} took {megabytes[0]:.0f} MB"
        if result["status"] == "succeeded":
            answer = result["output"][0]["answer"]
            assert wanted in (ANY, answer), f"{name}: {answer}"
            return Outcome("", result["metrics"]["pictures"])
        kind, _, refusal = result["error"].partition("InvalidRequest: ")
        assert kind == "Prediction failed: Generator iteration error: ", f"{name}: {result['error']}"
        assert re.fullmatch(r"[A-Z][^\n]{20,300}\.", refusal), f"{name}: {refusal}"
        assert not INSIDE.search(refusal), f"{name}: {refusal}"
        assert not result["logs"], f"{name}: {result['logs']}"
        assert wanted != RIGHT and wanted in refusal, f"{name}: {refusal}"
        return Outcome(refusal, [])

    def must_be_right(self) -> None:
        """The simple request."""
        self.strike("simple", RIGHT, images=[uri(encoded(number()))])

    @contextmanager
    def _memory(self) -> Iterator[list[float]]:
        """The most that the worker and its children take above what they take now, in megabytes."""
        idle, most, over = self._resident(), [0.0], Event()

        def watch() -> None:
            while not over.wait(0.01):
                most[0] = max(most[0], (self._resident() - idle) / 1e6)

        watching = Thread(target=watch)
        watching.start()
        try:
            yield most
        finally:
            over.set()
            watching.join()

    def _resident(self) -> int:
        """Bytes of the worker and all below it."""
        children, waiting, total = _children(), [self._worker], 0
        while waiting:
            process = waiting.pop()
            waiting += children.get(process, [])
            try:
                if process != self._worker and CONFINED not in Path(f"/proc/{process}/cmdline").read_bytes():
                    continue  # it is just being started, and has the worker's memory until then
                total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
            except (OSError, IndexError):  # it has ended
                continue
        return total


def _children() -> dict[int, list[int]]:
    """Processes by their parents."""
    found: dict[int, list[int]] = {}
    for about in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(about.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        found.setdefault(parent, []).append(int(about.parent.name))
    return found


class Within:
    """A port of this machine, and who came to it."""

    def __init__(self) -> None:
        self.visits = 0
        self._listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port = self._listener.getsockname()[1]
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            visitor, _ = self._listener.accept()
            self.visits += 1
            visitor.close()
