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
    """What Process uses of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], stdin: int, **_: Any) -> None:
        self._status: int | None = None
        self._process = os.fork()
        if not self._process:
            _be_confined(arguments[-1], stdin)

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
    with patch.object(confined, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=None)):
        yield


def _be_confined(module: str, socket: int) -> None:
    status = 1
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError):  # libFuzzer has handlers; here a crash is a crash
                signal.signal(number, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_WRONLY)
        for source, place in ((socket, 0), (silence, 1), (silence, 2)):
            os.dup2(source, place)
        sys.argv = ["-m", module]
        confined.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        os._exit(status)
