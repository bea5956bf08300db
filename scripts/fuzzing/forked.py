"""The process of kimi_vl/media/confined.py as a fork: many more files a second than with a new interpreter."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from kimi_vl.media import confined, pdf_pages, video_frames

MODULES = (pdf_pages, video_frames)  # imported before the fork


class Forked:
    """What ConfinedReader uses of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], **_: Any) -> None:
        to_child, from_child = os.pipe(), os.pipe()
        self._status: int | None = None
        self._process = os.fork()
        if not self._process:
            _be_confined(arguments[-1], to_child, from_child)
        os.close(to_child[0])
        os.close(from_child[1])
        self.stdin, self.stdout = os.fdopen(to_child[1], "wb"), os.fdopen(from_child[0], "rb")

    def kill(self) -> None:
        if self._status is None:
            os.kill(self._process, signal.SIGKILL)

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        return self._status


@contextmanager
def forking() -> Iterator[None]:
    """A confined reader that starts in here is a fork."""
    with patch.object(confined, "subprocess", SimpleNamespace(Popen=Forked, PIPE=None, DEVNULL=None)):
        yield


def _be_confined(module: str, to_child: tuple[int, int], from_child: tuple[int, int]) -> None:
    status = 1
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError):  # libFuzzer has handlers; here a crash is a crash
                signal.signal(number, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_WRONLY)
        for source, place in ((to_child[0], 0), (from_child[1], 1), (silence, 2)):
            os.dup2(source, place)
        for end in (*to_child, *from_child):
            os.close(end)
        sys.argv, sys.stdin = ["-m", module], os.fdopen(0)
        confined.MEMORY += _address_space()  # what the fuzzing has loaded does not count
        confined.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        os._exit(status)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
