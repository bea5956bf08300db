"""When text and news of it go out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event, Thread
from time import monotonic

from kimi_vl.output.thinking import Delta


def joined(deltas: Iterable[Delta]) -> Delta:
    """All deltas as one."""
    parts = list(deltas)
    return Delta("".join(part.thinking for part in parts), "".join(part.answer for part in parts))


def in_chunks(deltas: Iterable[Delta], seconds: float) -> Iterator[Delta]:
    """The deltas joined into chunks at least so many seconds apart; the first goes out at once."""
    waiting: list[Delta] = []
    due = monotonic()
    for delta in deltas:
        waiting.append(delta)
        if monotonic() >= due:
            yield joined(waiting)
            waiting.clear()
            due = monotonic() + seconds
    if waiting:
        yield joined(waiting)


@contextmanager
def every(seconds: float, report: Callable[[], None]) -> Iterator[None]:
    """Calls report again and again for as long as the block takes, on a thread of its own.

    The thread runs in the caller's context, which is how Cog knows whose lines it prints.
    """
    over = Event()

    def run() -> None:
        while not over.wait(seconds):
            report()

    try:
        Thread(target=copy_context().run, args=(run,), daemon=True, name="report").start()
        yield
    finally:
        over.set()
