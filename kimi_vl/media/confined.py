"""A process of its own for files that could do harm: bounded in time and memory, and its crash is only its own.

The two ends speak in lines of JSON over a socket, and pictures come back as raw RGB: nothing is ever unpickled.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from PIL import Image

from kimi_vl.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 512 << 20  # bytes, beside what Python and the libraries take
STEP_SECONDS = 1.8  # of one core, for a page or a picture; most take less than a tenth
STEP_PIXELS = 16_000_000  # of a picture; a larger one has time in proportion
DEFEATED = 3  # exit status of a process that met what it cannot read
Size = tuple[int, int]  # width, height
Message = dict[str, Any]


class Process:
    """One that waits for its first message."""

    def __init__(self, module: str) -> None:
        """
        Args:
            module: has `work(channel, request)`, which the process calls with the first message.
        """
        self.module = module
        self._socket, theirs = socket.socketpair()
        self._output = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-sP", "-m", __name__, module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries tell there what they think of a file
                cwd="/",
                env={
                    "PYTHONPATH": str(ROOT),
                    "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                    "MALLOC_ARENA_MAX": "1",  # more of them would count as memory
                    "OPENBLAS_NUM_THREADS": "1",  # as would its threads
                },
            )

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process.poll() is None

    def hand(self, files: Sequence[BinaryIO]) -> None:
        """Gives it open files, once, before any message."""
        with suppress(BrokenPipeError):  # why it ended is told when it is read from
            for file in files:
                socket.send_fds(self._socket, [b"+"], [file.fileno()])
            self._socket.sendall(b".")

    def send(self, message: Message) -> None:
        """Sends a message."""
        with suppress(BrokenPipeError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None when it has ended."""
        with suppress(ConnectionResetError):  # it ended before it had read everything
            line = self._output.readline()
            if line.endswith(b"\n"):
                message: Message = json.loads(line)
                return message
        return None

    def receive_bytes(self, length: int) -> bytes:
        """The next bytes; fewer when it has ended."""
        with suppress(ConnectionResetError):
            return self._output.read(length)
        return b""

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait()

    def end(self) -> None:
        """Ends it, from any thread; whoever reads gets to the end of what it sent."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Frees what is left of one that has ended; nobody may read any more."""
        self._output.close()
        self._socket.close()


class Spare:
    """A process that is ready before it is needed, because one takes a sixth of a second to start."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: Process | None = None
        self._lock = Lock()

    def prepare(self) -> None:
        """Starts it, unless there is one."""
        with self._lock:
            if not self._process:
                self._process = Process(self._module)

    def take(self) -> Process:
        """The process that is ready, or a new one."""
        with self._lock:
            process, self._process = self._process, None
        if process and process.alive:
            return process
        return Process(self._module)

    def close(self) -> None:
        """Ends the process that is ready."""
        with self._lock:
            if self._process:
                self._process.end()
                self._process.close()


class ConfinedReader:
    """The service's end. Its methods block: call them on a thread that nobody needs to interrupt, except `close`."""

    def __init__(self, started: Callable[[], Process], subject: str, seconds: int) -> None:
        """
        Args:
            started: the process that reads.
            subject: what is read, for messages: "the documents".
            seconds: that the process may take, beside its waits for the service.
        """
        self._started, self._subject, self._seconds = started, subject, seconds
        self._process: Process | None = None
        self._closed = False
        self._reading = Lock()
        self._sizes: Sequence[Size] = ()
        self._received = 0  # pictures
        self._waiting: dict[int, Image.Image] = {}  # received before they were asked for
        self._error: Exception | None = None

    def start(self, files: Sequence[BinaryIO], request: Message) -> Message:
        """Starts the process, which gets the open files as `files`; returns its first answer.

        Raises:
            InvalidRequest: the process refused the files, or did not survive them.
        """
        self._process = self._started()
        if self._closed:  # meanwhile
            self._process.end()
        self._process.hand(files)
        return self.ask({"seconds": self._seconds, **request})

    def ask(self, request: Message) -> Message:
        """Sends one message and returns the answer to it.

        Raises:
            InvalidRequest: as for start.
        """
        assert self._process
        self._process.send(request)
        return self._receive()

    def send_sizes(self, sizes: Sequence[Size]) -> None:
        """Tells the process the sizes, in pixels, of the pictures that it shall send from now on.

        One that turns out to lie on its side comes with its width and height exchanged.
        """
        assert self._process
        self._sizes = sizes
        self._process.send({"sizes": sizes})

    def picture(self, position: int) -> Image.Image:
        """The picture of a position in the sizes sent; each can be had once, in any order.

        Raises:
            InvalidRequest: as for start.
        """
        with self._reading:
            while position not in self._waiting:
                if self._error:
                    raise self._error
                try:
                    self._waiting[self._received] = self._receive_picture(self._sizes[self._received])
                except Exception as error:  # the others wait for it, too
                    self._error = error
                    raise
                self._received += 1
            return self._waiting.pop(position)

    def close(self) -> None:
        """Ends the process, from any thread."""
        self._closed = True
        if self._process:
            self._process.end()
            with self._reading:  # whoever still reads gets to the end
                self._process.close()

    def _receive(self) -> Message:
        assert self._process
        message = self._process.receive()
        if message is None:
            raise self._death()
        if "refusal" in message:
            raise InvalidRequest(message["refusal"])
        return message

    def _receive_picture(self, size: Size) -> Image.Image:
        assert self._process
        if self._receive().get("turned"):
            size = size[::-1]
        length = size[0] * size[1] * 3
        pixels = self._process.receive_bytes(length)
        if len(pixels) < length:
            raise self._death()
        return Image.frombytes("RGB", size, pixels)

    def _death(self) -> Exception:
        """What the end of the process means."""
        assert self._process
        status = self._process.wait()
        if status == -signal.SIGALRM:
            return InvalidRequest(
                f"Reading {self._subject} took longer than {self._seconds} seconds, the limit; "
                "send less of it, or something simpler."
            )
        if status == -signal.SIGPROF:
            return InvalidRequest(
                f"Reading {self._subject} takes more than {STEP_SECONDS} seconds for a page, or for "
                f"{STEP_PIXELS / 1e6:g} megapixels of a picture, the limit; send something simpler."
            )
        if status < 0 or status == DEFEATED:
            return InvalidRequest(
                f"Reading {self._subject} failed: a file is damaged, or needs more than {MEMORY >> 20} MB of memory; "
                "send another."
            )
        return RuntimeError(f"{self._process.module} ended with status {status}")


class Channel:
    """The process's end."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=0)
        self._lines = self._socket.makefile()
        self.files: list[BinaryIO] = []

    def receive_files(self) -> None:
        """Takes the open files that come before the first message, as `files`."""
        while True:
            mark, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            if mark != b"+":
                return
            self.files += [os.fdopen(descriptor, "rb") for descriptor in descriptors]

    def receive(self) -> Message:
        """The next message; without one, the service is gone, and the process ends."""
        with self._waiting():
            line = self._lines.readline()
        if not line:
            sys.exit()
        message: Message = json.loads(line)
        return message

    def send(self, message: Message, pixels: bytes = b"") -> None:
        """Sends a message, and the pixels of a picture after it."""
        with self._waiting():
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            self._socket.sendall(pixels)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Meanwhile the alarm stands still: how long other files take to come is no fault of these."""
        seconds, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        yield
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def begin_step(self, pictures: Sequence[Size] = ()) -> None:
        """From here on the process may compute as long as for a page, or for pictures of these sizes, or it ends."""
        steps = sum(max(1, width * height / STEP_PIXELS) for width, height in pictures)
        signal.setitimer(signal.ITIMER_PROF, STEP_SECONDS * (steps or 1))


def main() -> None:
    """Such a process: binds itself, and hands the first message to the module that its argument names."""
    work: Callable[[Channel, Message], None] = import_module(sys.argv[1]).work
    channel = Channel()
    channel.receive_files()
    request = channel.receive()
    signal.alarm(max(1, request["seconds"]))  # the default is to end at once, also in the middle of a library
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    try:
        work(channel, request)
    except InvalidRequest as refusal:
        channel.send({"refusal": str(refusal)})
    except Exception:  # libraries raise whatever they meet
        sys.exit(DEFEATED)


if __name__ == "__main__":
    main()
