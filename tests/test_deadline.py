"""A request's time: what was made so far is returned, whatever the service is in the middle of."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
from PIL import Image

from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import ConfinedReader
from kimi_vl.model.variants import UNNAMED, WEIGHTS
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.budget import Sized
from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Answer, Service
from kimi_vl.settings import Settings
from tests.media.pdfs import numbers

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
TEXT = processor.tokenizer.encode_text("◁think▷one two three four five")


class Scripted(Engine):
    """Emits a text, then waits until it is released, and ends as a model does."""

    def __init__(self) -> None:
        super().__init__(context_length=100_000)
        self.release = Event()
        self.tokens = TEXT

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        inputs.tensors()
        if all(map(generation.emit, self.tokens)) and self.release.wait(10):
            generation.emit(min(generation.params.stop_ids))


@pytest.fixture
def make() -> Iterator[Callable[..., Service]]:
    services = []

    def make(**settings: int) -> Service:
        services.append(Service(Settings(**settings), UNNAMED, processor, Scripted()))
        return services[-1]

    yield make
    for service in services:
        service._engine.release.set()
        service.close()


def ended(answer: Answer, within: float = 1.5) -> str:
    """Reads it to its end, which comes in time, and returns its thinking."""
    started = time.monotonic()
    whole = joined(answer)
    assert time.monotonic() - started < within
    assert whole.answer == ""
    assert answer.usage.finish_reason == "timeout"
    return whole.thinking


def is_right(service: Service) -> None:
    """The next request has all the time that it needs."""
    service._engine.release.set()
    service._engine.tokens = processor.tokenizer.encode_text("◁think▷Hm.◁/think▷19")
    answer = service.answer(Request("What is 12 + 7?"))
    assert joined(answer).answer == "19"
    assert answer.usage.finish_reason == "stop"


@pytest.mark.parametrize(("timeout_s", "max_seconds"), [(0.3, 0), (0, 1), (0.3, 100), (100, 1)])
def test_what_was_made_by_then_is_returned(make: Callable[..., Service], timeout_s: float, max_seconds: int) -> None:
    service = make(max_seconds=max_seconds)
    answer = service.answer(Request("What is 12 + 7?", timeout_s=timeout_s))
    assert ended(answer) == "one two three four five"
    assert answer.usage.thinking_tokens == len(TEXT)
    assert answer.usage.input_tokens > 0
    is_right(service)


def test_within_its_time_an_answer_ends_as_ever(make: Callable[..., Service]) -> None:
    service = make(max_seconds=100)
    is_right(service)
    answer = service.answer(Request("What is 12 + 7?", timeout_s=100, max_new_tokens=2))
    list(answer)
    assert answer.usage.finish_reason == "length"


def test_the_engine_stops_by_itself_though_nobody_reads(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ramble(inputs: ModelInputs, generation: Generation) -> None:
        while generation.emit(TEXT[0]):
            time.sleep(0.001)

    service = make()
    with monkeypatch.context() as patch:
        patch.setattr(service._engine, "_decode", ramble)
        answer = iter(service.answer(Request("What is 12 + 7?", timeout_s=0.2, max_new_tokens=30_000)))
        next(answer)
        service._engine._thread.submit(int).result(5)  # whose turn comes when it has ended
    is_right(service)


def test_the_wait_for_others_counts(make: Callable[..., Service]) -> None:
    service = make()
    other = iter(service.answer(Request("What is 12 + 7?")))
    next(other)
    waiting = service.answer(Request("What is 12 + 7?", timeout_s=0.3))
    assert ended(waiting) == ""
    assert waiting.usage.input_tokens > 0
    is_right(service)


@pytest.mark.parametrize("stage", ["open", "cut"])
def test_reading_pictures_counts(
    make: Callable[..., Service], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "p.png")
    service, release = make(), Event()
    where = {
        "open": "kimi_vl.media.images.Images.open",
        "cut": "kimi_vl.prompt.image_processor.ImageProcessor.cut",
    }[stage]

    def endless(*_: object) -> Image.Image:
        release.wait(10)
        raise InvalidRequest("nobody hears this")

    with monkeypatch.context() as patch:
        patch.setattr(where, endless)
        started = time.monotonic()
        # in that time a process must have started, and the pictures been opened
        answer = service.answer(Request("What?", images=[tmp_path / "p.png"] * 8, timeout_s=2))
        assert ended(answer, within=3) == ""
        assert time.monotonic() - started < 3.5
        release.set()
    assert (answer.usage.input_tokens > 0) == (stage == "cut")
    is_right(service)


@pytest.mark.parametrize("step", ["ask", "picture"])
def test_reading_documents_counts_and_ends_their_process(
    make: Callable[..., Service], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.pdf").write_bytes(numbers(["17"]))
    service, readers, release = make(), list[ConfinedReader](), Event()

    def endless(reader: ConfinedReader, *_: object) -> None:
        readers.append(reader)
        release.wait(10)
        raise InvalidRequest("nobody hears this")

    with monkeypatch.context() as patch:
        patch.setattr(ConfinedReader, step, endless)
        answer = service.answer(Request("What?", documents=[tmp_path / "d.pdf"], timeout_s=2))
        assert ended(answer) == ""
        release.set()
    assert answer.usage.pictures == []
    assert readers[0]._process is not None
    assert not readers[0]._process.alive
    is_right(service)


def test_checking_a_schema_counts(make: Callable[..., Service]) -> None:
    service, endless = make(), '{"multipleOf": 2147483648}'
    started = time.monotonic()
    for _ in range(2):  # the second one's is never checked
        answer = service.answer(Request("What is 12 + 7?", json_schema=endless, timeout_s=0.3))
        assert ended(answer) == ""
        assert answer.usage.input_tokens == 0
    assert time.monotonic() - started < 1.5
    is_right(service)
    with pytest.raises(InvalidRequest, match="takes more than 3 seconds"):
        service.answer(Request("What is 12 + 7?", json_schema=endless, timeout_s=30))


def test_dividing_the_context_among_pages_counts(
    make: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request's own thread does it, so nobody else can end it."""
    (tmp_path / "d.pdf").write_bytes(numbers(["17"]))
    service, tried, size = make(), list[int](), Sized.size

    def slow(page: Sized, processor: ImageProcessor, most: int) -> tuple[int, int]:
        tried.append(most)
        time.sleep(0.3)
        return size(page, processor, most)

    with monkeypatch.context() as patch:
        patch.setattr(Sized, "size", slow)
        answer = service.answer(Request("What?", documents=[tmp_path / "d.pdf"], timeout_s=1.5))
        assert ended(answer) == ""
    assert len(tried) <= 6, "though ten are needed"
    is_right(service)


@pytest.mark.parametrize("seconds", [-1, 86_401, math.nan, math.inf])
def test_a_time_outside_its_bounds_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout_s is .+ and must be from 0 to 86400\."):
        Request("What is 12 + 7?", timeout_s=seconds).check(Settings())
