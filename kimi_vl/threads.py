"""Threads that work for requests which a cancellation may interrupt at any bytecode.

Cog cancels by an exception that comes up in a request's thread. Inside a lock that Python code takes, such as those of
threading.Event, Future and ThreadPoolExecutor, it can leave the lock taken for ever. A SimpleQueue has none of these.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, Generic, ParamSpec, TypeVar

from kimi_vl.errors import DeadlinePassed

POLL_SECONDS = 0.1  # how long a thread may wait without running Python, so that a cancellation reaches it

T = TypeVar("T")
P = ParamSpec("P")


class Threads(Executor):
    """A pool whose threads run from the start; a cancellation inside `submit` harms none of them."""

    def __init__(self, count: int, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._open = True
        self._threads = [Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """What is submitted will be done."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has a thread call a function. The future is for threads that no cancellation reaches; others make a Task.

        Raises:
            RuntimeError: the pool was shut down.
        """
        if not self._open:
            raise RuntimeError("these threads have ended")
        future: Future[T] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = function(*args, **kwargs)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        self._work.put(work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads when all work is done, or with cancel_futures when what has begun is done."""
        self._open = False
        if cancel_futures:
            with suppress(Empty):
                while True:
                    self._work.get_nowait()
        for _ in self._threads:
            self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while work := self._work.get():
            work()
            del work  # and all that it holds, while nothing comes


class Task(Generic[T]):
    """A call on a pool, to be waited for by a thread that may be cancelled meanwhile."""

    def __init__(self, pool: Executor, function: Callable[..., T], *arguments: Any) -> None:
        self._call = function, arguments
        self._ended: SimpleQueue[Future[T]] = SimpleQueue()
        self._wanted = True
        pool.submit(self._run)

    def result(self, deadline: float = math.inf) -> T:
        """What the call returned; can be had once.

        Args:
            deadline: when to wait no longer, on the clock of monotonic().
        Raises:
            BaseException: what it raised.
            DeadlinePassed: it has not ended by then.
        """
        while (left := deadline - monotonic()) > 0:
            with suppress(Empty):
                return self._ended.get(timeout=min(POLL_SECONDS, left)).result()
        raise DeadlinePassed

    def abandon(self) -> None:
        """Nobody wants the result: a call that has not begun never will."""
        self._wanted = False

    def _run(self) -> None:
        if not self._wanted:
            return
        outcome: Future[T] = Future()
        function, arguments = self._call
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:
            outcome.set_exception(error)
        self._ended.put(outcome)
        del outcome  # else an error, whose traceback has this frame, would keep itself and all that waited for it
