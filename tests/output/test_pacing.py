import time
from collections.abc import Iterator
from contextvars import ContextVar

from kimi_vl.output.pacing import Reporter, in_chunks, joined
from kimi_vl.output.thinking import Delta

DELTAS = [Delta("a"), Delta("b"), Delta("c", "d"), Delta("", "e")]


def test_joining_loses_nothing() -> None:
    assert joined(DELTAS) == Delta("abc", "de")
    assert joined([]) == Delta("", "")


def test_the_first_chunk_goes_out_at_once_and_the_rest_waits_for_its_time() -> None:
    assert list(in_chunks(DELTAS, seconds=3600)) == [Delta("a"), Delta("bc", "de")]
    assert list(in_chunks([], seconds=0)) == []


def test_slow_deltas_are_not_held_back() -> None:
    def slow() -> Iterator[Delta]:
        for delta in DELTAS:
            time.sleep(0.01)
            yield delta

    assert list(in_chunks(slow(), seconds=0.001)) == DELTAS


def test_reports_come_until_the_block_ends() -> None:
    reporter = Reporter(seconds=0.01)
    for _ in range(2):
        reports: list[float] = []
        with reporter.during(lambda reports=reports: reports.append(time.monotonic())):  # type: ignore[misc]
            while len(reports) < 3:
                time.sleep(0.001)
        ended = time.monotonic()
        time.sleep(0.05)
        assert all(report <= ended + 0.01 for report in reports)


def test_reports_run_in_the_callers_context() -> None:
    whose: ContextVar[str] = ContextVar("whose", default="nobody's")
    reporter, seen = Reporter(seconds=0.001), set()
    for name in ("first", "second"):
        whose.set(name)
        with reporter.during(lambda: seen.add(whose.get())):
            while name not in seen:
                time.sleep(0.001)
    assert seen == {"first", "second"}
