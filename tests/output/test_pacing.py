import time
from collections.abc import Iterator

from kimi_vl.output.pacing import every, in_chunks, joined
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
    reports: list[float] = []
    with every(0.01, lambda: reports.append(time.monotonic())):
        while len(reports) < 3:
            time.sleep(0.001)
    ended = time.monotonic()
    time.sleep(0.05)
    assert all(report <= ended + 0.01 for report in reports)
