"""A failure or a cancellation in each stage of a request, in the middle of others; they and the next one are right."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image

from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.model.variants import UNNAMED, WEIGHTS
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Service
from kimi_vl.settings import Settings
from tests.cancels import cancel_while_reading
from tests.faults.everywhere import cancel_at_bytecodes
from tests.media.films import numbered
from tests.media.pdfs import numbers

SCHEMA = '{"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}'
REMOTE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/p.png"}}]}]


class Ours(Exception):
    """What no code of ours expects."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service.load(Settings(model="tiny", allow_urls=True))
    yield service
    service.close()


@pytest.fixture
def everything(tmp_path: Path) -> Request:
    """A request that goes through all stages."""
    numbered("81").save(tmp_path / "81.png")
    (tmp_path / "d.pdf").write_bytes(numbers(["17", "4"]))
    return Request(
        "What number is in picture 2?",
        images=[tmp_path / "81.png"],
        documents=[tmp_path / "d.pdf"],
        max_image_tokens=64,
        thinking_budget=5,
        stop=["no such text"],
        json_schema=SCHEMA,
        max_new_tokens=40,
    )


def is_right(service: Service, request: Request) -> None:
    """The next request gets its answer."""
    assert joined(service.answer(Request("What number is in the picture?", images=request.images))).answer == "81"


STAGES = {
    "a picture's file": "kimi_vl.request._open",
    "the pictures' process": "kimi_vl.media.images.Images.start",
    "a document's process": "kimi_vl.media.documents.Documents.start",
    "the tokens that each picture may have": "kimi_vl.prompt.budget.Budget.share",
    "a page's pixels": "kimi_vl.media.confined.ConfinedReader.picture",
    "patches": "kimi_vl.prompt.image_processor.ImageProcessor.cut",
    "the prompt's tokens": "kimi_vl.prompt.processor.encode",
    "the grammar": "kimi_vl.output.json_constraint.JsonConstraints.by_schema",
    "vision": "transformers.models.kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel.forward",
    "prefill": "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Model.forward",
    "a token's constraint": "kimi_vl.output.json_constraint.JsonConstraint.mask",
    "a token that was chosen": "kimi_vl.output.json_constraint.JsonConstraint.accept",
    "what is forced": "kimi_vl.output.budget.ThinkingBudget.__call__",
    "text": "kimi_vl.service.Detokenizer.feed",
    "thinking and answer": "kimi_vl.service.ThinkingSplitter.feed",
    "the end of the text": "kimi_vl.service.StopMatcher.close",
}
SHARED = ("prefill", "text", "thinking and answer")  # by all that are answered meanwhile


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_in_any_stage_harms_no_other(
    service: Service, everything: Request, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise Ours

    before = service.answer(Request("What is 12 + 7?"))
    stream = iter(before)
    said = next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], fail)
        with pytest.raises(Ours):
            joined(service.answer(everything))
    if stage not in SHARED:
        rest = joined(stream)
        assert (said.thinking + rest.thinking).endswith("19.")
        assert rest.answer == "19"
    assert before.usage.input_tokens
    is_right(service, everything)


COMING = {"download": "kimi_vl.media.sources.download", "decode": "kimi_vl.media.images.Images.picture"}


@pytest.mark.parametrize("stage", COMING)
def test_a_cancel_while_pictures_come_in(
    service: Service, everything: Request, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, release = Event(), Event()

    def slow(*_: object) -> Any:
        reading.set()
        release.wait(30)
        return Image.new("RGB", (28, 28))

    with monkeypatch.context() as patch:
        patch.setattr(COMING[stage], slow)
        request = Request("What?", messages=REMOTE) if stage == "download" else everything
        cancel_while_reading(lambda: service.answer(request), reading)
        release.set()
    is_right(service, everything)


def test_a_cancel_while_a_schema_is_checked(
    service: Service, everything: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, release = Event(), Event()

    def slow(*_: object) -> bool:
        checking.set()
        return release.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr("kimi_vl.output.json_constraint.is_affordable", slow)
        cancel_while_reading(lambda: service.answer(everything), checking)
        release.set()
    is_right(service, everything)


@pytest.mark.parametrize("tokens", [0, 1, 12], ids=["prefill", "first token", "mid-thinking"])
def test_a_cancel_while_the_model_works(
    service: Service, everything: Request, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, ended = Event(), Event()

    def work(inputs: ModelInputs, generation: Generation) -> None:
        inputs.tensors()
        for _ in range(tokens):
            generation.emit(7)
        reached.set()
        while not generation.stopped:
            time.sleep(0.01)
        ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(service._engine, "_decode", work)
        cancel_while_reading(lambda: joined(service.answer(everything)), reached)
        assert ended.wait(5), "the engine is free"
    is_right(service, everything)


class Brief(Engine):
    """Answers at once."""

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        inputs.tensors()
        for token in (*TOKENS, min(generation.params.stop_ids)):
            generation.emit(token)


processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
TOKENS = processor.tokenizer.encode_text("◁think▷Hm.◁/think▷19")


@pytest.fixture
def brief() -> Iterator[Service]:
    service = Service(Settings(), UNNAMED, processor, Brief(context_length=4000))
    yield service
    service.close()


def test_a_cancel_at_any_bytecode_leaves_the_service_ready(brief: Service, tmp_path: Path) -> None:
    numbered("81").save(tmp_path / "81.png")
    request = Request("What is 12 + 7?", images=[tmp_path / "81.png"], max_image_tokens=64, max_new_tokens=100)

    def ask() -> str:
        with brief.answer(request) as answer:
            return joined(answer).answer

    assert cancel_at_bytecodes(ask, most=300) > 200
    assert [ask() for _ in range(5)] == ["19"] * 5
