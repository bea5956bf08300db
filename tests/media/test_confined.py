"""The process that reads hostile files: what it may do, and what its end means."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import ConfinedReader, Process, Spare


@pytest.fixture
def reader() -> Iterator[ConfinedReader]:
    reader = ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 4)
    yield reader
    reader.close()
    assert reader._process is None or not reader._process.alive


LATE = "Reading the thing took longer than 4 seconds, the limit; send less of it, or something simpler."
DEFEATED = "Reading the thing failed: a file is damaged, or needs more than 512 MB of memory; send another."
TOO_MUCH = (
    "Reading the thing takes more than 1.8 seconds for a page, or for 16 megapixels of a picture, the limit; "
    "send something simpler."
)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sleep", LATE),
        ("spin", LATE),
        ("crash", DEFEATED),
        ("eat", DEFEATED),
        ("raise", DEFEATED),
        ("write", DEFEATED),
        ("refuse", "It is too blue."),
    ],
)
def test_whatever_it_does_ends_in_a_sentence_in_time(reader: ConfinedReader, what: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest) as refusal:
        reader.start([], {"do": what})
    assert str(refusal.value) == message
    assert time.monotonic() - started < 8


def test_a_step_that_computes_for_too_long_ends_in_a_sentence() -> None:
    reader = ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 60)  # its steps have time of their own
    with pytest.raises(InvalidRequest) as refusal:
        reader.start([], {"do": "spin in a step"})
    reader.close()
    assert str(refusal.value) == TOO_MUCH


def test_a_large_picture_has_time_in_proportion() -> None:
    with closing(ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 60)) as reader:
        reader.start([], {"do": "compute", "picture": (6000, 4000), "for": 2.2})
    with (
        closing(ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 60)) as reader,
        pytest.raises(InvalidRequest, match=re.escape(TOO_MUCH)),
    ):
        reader.start([], {"do": "compute", "picture": (4000, 4000), "for": 2.2})


def test_only_what_it_does_takes_its_time_not_what_it_waits_for() -> None:
    with closing(ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 1)) as reader:
        reader.start([], {"do": "draw"})
        time.sleep(1.5)
        reader.send_sizes([(1000, 1000)] * 3)  # far more than lies on the way to whoever reads it
        time.sleep(1.5)
        assert [reader.picture(place).size for place in range(3)] == [(1000, 1000)] * 3


def test_after_a_wait_its_time_goes_on(reader: ConfinedReader) -> None:
    reader.start([], {"do": "sleep when asked"})
    with pytest.raises(InvalidRequest) as refusal:
        reader.ask({})
    assert str(refusal.value) == LATE


def test_it_sees_the_file_and_nothing_of_the_service(
    reader: ConfinedReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open("rb") as file:
        answer = reader.start([file], {"do": "look around"})
    assert answer["text"] == "content"
    assert not {"SECRET", "HOME", "PATH"} & set(answer["environment"])


def test_a_module_that_cannot_run_is_our_fault() -> None:
    reader = ConfinedReader(lambda: Process("tests.media.absent"), "the thing", 2)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        reader.start([], {})
    reader.close()


def test_threads_get_the_pictures_that_they_ask_for(reader: ConfinedReader) -> None:
    reader.start([], {"do": "draw"})
    sizes = [(10 + place, 5) for place in range(40)]
    reader.send_sizes(sizes)
    order = list(range(40))
    for start in range(0, 40, 4):  # as a pool does, about in order
        Random(start).shuffle(order[start : start + 4])
    with ThreadPoolExecutor(4) as pool:
        for place, picture in zip(order, pool.map(reader.picture, order), strict=True):
            assert picture.size == sizes[place]
            assert picture.getpixel((0, 0)) == (place,) * 3


def test_what_stops_one_picture_is_said_of_all_after_it(reader: ConfinedReader) -> None:
    reader.start([], {"do": "draw", "break": 2})
    reader.send_sizes([(4, 4)] * 5)
    assert reader.picture(1).size == (4, 4)
    for place in (4, 2):
        with pytest.raises(InvalidRequest, match="The third one is broken"):
            reader.picture(place)


def test_closing_interrupts_whoever_reads() -> None:
    reader = ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 60)
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(InvalidRequest):
            reader.start([], {"do": "sleep"})
        ended.set()

    threading.Thread(target=read).start()
    while reader._process is None:
        time.sleep(0.01)
    reader.close()
    assert ended.wait(5)


def test_once_closed_it_does_not_start() -> None:
    reader = ConfinedReader(lambda: Process("tests.media.hostile"), "the thing", 60)
    reader.close()
    with pytest.raises(InvalidRequest):
        reader.start([], {"do": "sleep"})


def test_a_spare_process_is_used_once_and_replaced_when_it_is_dead() -> None:
    spare = Spare("tests.media.hostile")
    spare.prepare()
    ready = spare._process
    spare.prepare()
    assert spare._process is ready
    assert spare.take() is ready
    other = spare.take()
    assert other is not ready
    spare.prepare()
    dead = spare._process
    assert dead
    dead.end()
    last = spare.take()
    assert last.alive
    spare.prepare()
    unused = spare._process
    spare.close()
    assert unused
    assert not unused.alive
    for process in (ready, other, last):
        assert process
        process.end()
