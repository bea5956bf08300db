"""Cancellations at chosen bytecodes, as Cog's could come up at any of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tests.cancels import Cancelled


@contextmanager
def counted(cancel_at: int = sys.maxsize) -> Iterator[list[int]]:
    """Counts the bytecodes that this thread runs in a block, and cancels it once at one of them."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            count[0] += 1
            if count[0] == cancel_at:
                raise Cancelled
        return trace

    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(None)


def cancel_at_bytecodes(work: Callable[[], object], most: int) -> int:
    """Runs some work again and again, cancelled at another bytecode each time, evenly over all; returns how often."""
    with counted() as count:
        work()
    moments = range(1, count[0] + 1, -(-count[0] // most))
    for moment in moments:
        try:
            with counted(moment):
                work()
        except Cancelled:
            pass
    return len(moments)
