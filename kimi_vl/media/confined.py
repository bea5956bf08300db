"""A process of its own for files that could do harm: bounded in time and memory, and its crash is only its own.

The two ends speak in lines of JSON over pipes, and pictures go back as raw RGB: nothing that comes back is unpickled.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from PIL import Image

from kimi_vl.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2 << 30  # bytes of address space; Python and the libraries take 0.3 GB of it
DEFEATED = 3  # exit status of a process that met what it cannot read
Size = tuple[int, int]  # width, height
Message = dict[str, Any]


class ConfinedReader:
    """The service's end. Its methods block: call them on a thread that nobody needs to interrupt, except `close`."""

    def __init__(self, module: str, subject: str, seconds: int) -> None:
        """
        Args:
            module: has `work(channel, request)`, which the process calls with the first message.
            subject: what is read, for messages: "the documents".
            seconds: from its start to its end.
        """
        self._module, self._subject, self._seconds = module, subject, seconds
        self._process: subprocess.Popen[bytes] | None = None
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
        descriptors = [file.fileno() for file in files]
        self._process = subprocess.Popen(
            [sys.executable, "-sP", "-m", __name__, self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries tell there what they think of a file
            pass_fds=descriptors,
            cwd="/",
            env={"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},
        )
        if self._closed:  # meanwhile
            self._process.kill()
        return self.ask({"seconds": self._seconds, "files": descriptors, **request})

    def ask(self, request: Message) -> Message:
        """Sends one message and returns the answer to it.

        Raises:
            InvalidRequest: as for start.
        """
        self._send(request)
        return self._receive()

    def send_sizes(self, sizes: Sequence[Size]) -> None:
        """Tells the process the sizes of the pictures that it shall send from now on, in pixels."""
        self._sizes = sizes
        self._send({"sizes": sizes})

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
            self._process.kill()
            self._process.wait()
            with suppress(OSError):
                self._pipe("stdin").close()
            with self._reading:  # whoever still reads gets to the end of the file now
                self._pipe("stdout").close()

    def _pipe(self, name: str) -> BinaryIO:
        pipe: BinaryIO = getattr(self._process, name)
        return pipe

    def _send(self, message: Message) -> None:
        with suppress(BrokenPipeError):  # why it ended is told when it is read from
            self._pipe("stdin").write(json.dumps(message).encode() + b"\n")
            self._pipe("stdin").flush()

    def _receive(self) -> Message:
        line = self._pipe("stdout").readline()
        if not line.endswith(b"\n"):
            raise self._death()
        message: Message = json.loads(line)
        if "refusal" in message:
            raise InvalidRequest(message["refusal"])
        return message

    def _receive_picture(self, size: Size) -> Image.Image:
        self._receive()
        length = size[0] * size[1] * 3
        pixels = self._pipe("stdout").read(length)
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
        if status < 0 or status == DEFEATED:
            return InvalidRequest(
                f"Reading {self._subject} failed: a file is damaged, or needs more than {MEMORY >> 30} GB of memory; "
                "send another."
            )
        return RuntimeError(f"{self._module} ended with status {status}")


class Channel:
    """The process's end."""

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # whatever a library prints is no message

    def receive(self) -> Message:
        """The next message; without one, the service is gone, and the process ends."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        message: Message = json.loads(line)
        return message

    def send(self, message: Message, pixels: bytes = b"") -> None:
        """Sends a message, and the pixels of a picture after it."""
        self._output.write(json.dumps(message).encode() + b"\n")
        self._output.write(pixels)
        self._output.flush()


def main() -> None:
    """Such a process: binds itself, and hands the first message to the module that its argument names."""
    work: Callable[[Channel, Message], None] = import_module(sys.argv[1]).work
    channel = Channel()
    request = channel.receive()
    signal.alarm(max(1, request["seconds"]))  # the default is to end at once, also in the middle of a library
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    try:
        work(channel, request)
    except InvalidRequest as refusal:
        channel.send({"refusal": str(refusal)})
    except Exception:  # libraries raise whatever they meet
        sys.exit(DEFEATED)


if __name__ == "__main__":
    main()
