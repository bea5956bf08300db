"""When text and news of it go out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from threading import Thread
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


class Reporter:
    """Calls reports again and again, on a thread of its own, for as long as a block takes.

    Make it before the first prediction: until a new thread runs, CPython counts it under its parent's id, so that a
    cancellation of a prediction that is just starting a thread can end up in there and be lost.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._blocks: SimpleQueue[tuple[Context, Callable[[], None], SimpleQueue[None]]] = SimpleQueue()
        Thread(target=self._run, daemon=True, name="reporter").start()

    @contextmanager
    def during(self, report: Callable[[], None]) -> Iterator[None]:
        """Reports in the caller's context, which is how Cog knows whose lines are printed."""
        over: SimpleQueue[None] = SimpleQueue()  # and no Event: see kimi_vl/threads.py
        try:
            self._blocks.put((copy_context(), report, over))
            yield
        finally:
            over.put(None)

    def _run(self) -> None:
        while True:
            context, report, over = self._blocks.get()
            while not _is_over(over, self._seconds):
                context.run(report)


def _is_over(over: "SimpleQueue[None]", seconds: float) -> bool:
    try:
        over.get(timeout=seconds)
    except Empty:
        return False
    return True
