"""Threads that outlive any cancellation of those who hand them work."""

from collections.abc import Iterator
from threading import Event

import pytest

from kimi_vl.threads import Task, Threads
from tests.faults.everywhere import cancel_at_bytecodes


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(2, "test") as threads:
        yield threads


def answers(threads: Threads) -> None:
    """Every thread of the pool still works."""
    other = Event()
    waiting = threads.submit(other.wait, 10)
    threads.submit(other.set).result(10)
    assert waiting.result(10)


def test_a_call_returns_its_result_or_its_error(threads: Threads) -> None:
    assert threads.submit(divmod, 7, 2).result(10) == (3, 1)
    assert Task(threads, divmod, 7, 2).result() == (3, 1)
    for failing in (threads.submit(divmod, 1, 0), Task(threads, divmod, 1, 0)):
        with pytest.raises(ZeroDivisionError):
            failing.result()
    answers(threads)


def test_a_cancellation_at_any_bytecode_leaves_the_threads_working(threads: Threads) -> None:
    moments = cancel_at_bytecodes(lambda: Task(threads, divmod, 7, 2).result(), most=1000)
    assert moments > 50, "every one of them"
    answers(threads)


def test_nothing_that_was_abandoned_before_it_began_is_done(threads: Threads) -> None:
    release, done = Event(), list[int]()
    busy = [threads.submit(release.wait, 10) for _ in range(2)]
    task = Task(threads, done.append, 1)
    task.abandon()
    release.set()
    assert all(each.result(10) for each in busy)
    answers(threads)
    assert not done


@pytest.mark.parametrize("cancel", [False, True])
def test_after_shutdown_nothing_can_be_submitted(cancel: bool) -> None:
    threads, release = Threads(1, "test"), Event()
    threads.submit(release.wait, 10)
    late = threads.submit(divmod, 7, 2)
    assert threads.alive
    threads.shutdown(wait=False, cancel_futures=cancel)
    release.set()
    threads.shutdown()
    assert not threads.alive
    assert late.done() != cancel
    with pytest.raises(RuntimeError):
        threads.submit(divmod, 7, 2)
