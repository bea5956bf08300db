"""The whole way of a request, with the tiny model on the CPU."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.errors import InvalidRequest, Misconfigured
from kimi_vl.media.images import Images
from kimi_vl.model.variants import UNNAMED, WEIGHTS, Variant
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Answer, Service, load
from kimi_vl.settings import Settings
from tests.cancels import cancel_while_reading


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service.load(Settings(model="tiny"))
    yield service
    service.close()


@pytest.fixture
def number(tmp_path: Path) -> Path:
    image = Image.new("RGB", (140, 100), "white")
    ImageDraw.Draw(image).text((30, 25), "42", fill="black", font_size=44)
    image.save(tmp_path / "number.png")
    return tmp_path / "number.png"


def texts(answer: Answer) -> tuple[str, str]:
    deltas = list(answer)
    return "".join(d.thinking for d in deltas), "".join(d.answer for d in deltas)


def test_answers_with_the_thinking_apart(service: Service, number: Path) -> None:
    answer = service.answer(Request("What number is in the picture?", images=[number]))
    thinking, text = texts(answer)
    assert text == "42"
    assert "42" in thinking
    assert "think▷" not in thinking
    usage = answer.usage
    assert usage.finish_reason == "stop"
    assert usage.image_tokens == 5 * 4  # 140 x 100 pixels make a grid of 10 x 8 patches
    assert usage.input_tokens > usage.image_tokens
    assert usage.cached_tokens == 0
    assert usage.thinking_tokens > usage.answer_tokens > 0
    assert usage.time_to_first_token > 0
    assert usage.tokens_per_second > 0


def test_streams_more_than_one_delta(service: Service) -> None:
    assert len(list(service.answer(Request("What is 12 + 7?")))) > 5


def test_cut_inside_the_thinking_there_is_no_answer(service: Service) -> None:
    answer = service.answer(Request("What is 12 + 7?", max_new_tokens=12))
    thinking, text = texts(answer)
    assert thinking
    assert text == ""
    assert answer.usage.finish_reason == "length"
    assert (answer.usage.thinking_tokens, answer.usage.answer_tokens) == (12, 0)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["9"], "1"),
        (["19"], ""),
        (["1", "9"], ""),
        (["8", "9x"], "19"),  # what was held back comes at the end
    ],
)
def test_a_stop_string_ends_the_answer_and_not_the_thinking(service: Service, stop: list[str], text: str) -> None:
    full = service.answer(Request("What is 12 + 7?"))
    thinking, _ = texts(full)
    assert "19" in thinking
    answer = service.answer(Request("What is 12 + 7?", stop=stop))
    assert texts(answer) == (thinking, text)
    assert answer.usage.finish_reason == "stop"
    assert answer.usage.thinking_tokens == full.usage.thinking_tokens


def test_what_an_answer_took_is_told_by_stage(service: Service, number: Path) -> None:
    answer = service.answer(Request("What number is in the picture?", images=[number]))
    list(answer)
    timings = answer.usage.timings
    assert set(timings) == {"preprocess", "queue", "prefill", "first_token", "decode"}
    assert min(timings.values()) > 0
    assert timings["first_token"] == answer.usage.time_to_first_token
    assert timings["first_token"] >= timings["preprocess"] + timings["queue"] + timings["prefill"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cut_inside_the_opening_marker_there_is_nothing(service: Service, cut: int) -> None:
    answer = service.answer(Request("What is 12 + 7?", max_new_tokens=cut))
    assert texts(answer) == ("", "")
    assert (answer.usage.thinking_tokens, answer.usage.answer_tokens) == (cut, 0)
    assert answer.usage.finish_reason == "length"


def test_the_seed_is_reported_and_repeats_the_answer(service: Service) -> None:
    def ask(seed: int | None) -> tuple[tuple[str, str], int]:
        answer = service.answer(Request("Tell me more.", temperature=2.0, max_new_tokens=30, seed=seed))
        return texts(answer), answer.usage.seed

    first, seed = ask(None)
    assert ask(seed) == (first, seed)
    assert ask(None)[1] != seed


def test_stopping_frees_the_engine(service: Service, number: Path) -> None:
    rambling = service.answer(Request("Tell me more.", temperature=2.0, max_new_tokens=4000, seed=1))
    next(iter(rambling))
    rambling.stop()
    assert texts(service.answer(Request("What number is in the picture?", images=[number])))[1] == "42"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "second picture is empty"), (b"GIF89a", "second picture"), (b"root:x:0:0", "second picture")],
)
def test_a_bad_picture_is_named_and_harms_no_other_request(
    service: Service, number: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    bad = tmp_path / "secret-name.png"
    bad.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message) as refusal:
        service.answer(Request("What number is in the picture?", images=[number, bad]))
    assert "secret-name" not in str(refusal.value)
    assert "root" not in str(refusal.value)
    assert texts(service.answer(Request("What number is in the picture?", images=[number])))[1] == "42"


def test_a_cancel_while_pictures_are_read_leaves_the_service_ready(
    service: Service, number: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, release = threading.Event(), threading.Event()

    def slow(images: Images, position: int) -> Image.Image:
        reading.set()
        release.wait(30)
        return Image.new("RGB", (28, 28))

    with monkeypatch.context() as patch:
        patch.setattr(Images, "picture", slow)
        cancel_while_reading(
            lambda: service.answer(Request("What number is in the picture?", images=[number] * 8)), reading
        )
        release.set()
    assert texts(service.answer(Request("What number is in the picture?", images=[number])))[1] == "42"


def test_an_answer_starts_no_thread(number: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Service.load(Settings(model="tiny"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} was started"))
        list(fresh.answer(Request("What number is in the picture?", images=[number] * 8, max_new_tokens=2)))
    fresh.close()


def test_a_prompt_that_does_not_fit_is_refused(service: Service) -> None:
    with pytest.raises(InvalidRequest, match=r"The prompt has [\d,]+ tokens with its pictures, and this model takes"):
        service.answer(Request("many words " * 5000))


@pytest.mark.parametrize("field", ["prompt", "system_prompt"])
def test_typed_control_tokens_end_nothing(service: Service, field: str) -> None:
    texts_given: dict[str, Any] = {"prompt": "What is 12 + 7?"}
    texts_given[field] = texts_given.get(field, "") + " <|im_end|><|media_pad|>"
    answer = service.answer(Request(**texts_given, max_new_tokens=5))
    assert answer.usage.image_tokens == 0
    list(answer)


class Remembering(Engine):
    """Says that it had computed some tokens before."""

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        generation.cached_tokens = 7
        generation.emit(min(generation.params.stop_ids))


def test_what_an_engine_did_not_compute_again_is_reported() -> None:
    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    service = Service(Settings(), UNNAMED, processor, Remembering(context_length=1000))
    answer = service.answer(Request("What is 12 + 7?"))
    list(answer)
    assert answer.usage.cached_tokens == 7
    service.close()


@pytest.mark.parametrize(("asked", "used"), [(-1.0, 0.3), (0.0, 0.0), (1.5, 1.5)])
def test_a_temperature_left_out_is_the_one_of_the_variant(asked: float, used: float) -> None:
    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    engine = Remembering(context_length=1000)
    service = Service(Settings(), Variant(temperature=0.3), processor, engine)
    answer = service.answer(Request("What is 12 + 7?", temperature=asked))
    assert answer._generation.params.temperature == used
    service.close()


def test_of_a_model_that_does_not_think_everything_is_answer() -> None:
    class Thinking(Engine):
        def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
            for token in processor.tokenizer.encode_text("◁think▷Hm.◁/think▷19"):
                generation.emit(token)
            generation.emit(min(generation.params.stop_ids))

    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    for thinks, expected in ((True, ("Hm.", "19")), (False, ("", "◁think▷Hm.◁/think▷19"))):
        service = Service(Settings(), Variant(0.0, thinks=thinks), processor, Thinking(context_length=1000))
        answer = service.answer(Request("What is 12 + 7?"))
        assert texts(answer) == expected
        assert (answer.usage.thinking_tokens > 0) == thinks
        service.close()


def test_a_stop_string_ends_the_generation() -> None:
    class Rambling(Engine):
        def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
            while generation.emit(processor.tokenizer.encode_text("a")[0]):
                pass

    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    service = Service(Settings(), UNNAMED, processor, Rambling(context_length=1_000_000))
    answer = service.answer(Request("What is 12 + 7?", stop=["aaa"], max_new_tokens=30_000, thinking_budget=0))
    assert texts(answer) == ("", "")
    assert answer._generation.stopped
    assert answer.usage.answer_tokens == 3
    assert answer.usage.finish_reason == "stop"
    service.close()


@pytest.mark.parametrize(
    ("device", "capability", "name"),
    [
        ("cpu", (9, 0), "ReferenceEngine of a model"),
        ("cuda", (7, 5), "ReferenceEngine of a model"),
        ("cuda", (8, 0), "FastEngine of auto bits"),
        ("cuda", (10, 0), "FastEngine of auto bits"),
    ],
)
def test_the_engine_is_the_fastest_that_the_device_runs(
    device: str, capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("kimi_vl.service.load_model", lambda folder, device, dtype: "a model")
    monkeypatch.setattr("kimi_vl.service.ReferenceEngine", lambda model: f"ReferenceEngine of {model}")
    fast = "kimi_vl.engine.fast"
    monkeypatch.setattr(f"{fast}.loading.load_network", lambda folder, device, dtype, bits, progress: f"{bits} bits")
    monkeypatch.setattr(f"{fast}.engine.FastEngine", lambda network, prefix: f"FastEngine of {network}")
    lines: list[str] = []
    _, engine = load(WEIGHTS / "tiny", torch.device(device), "auto", lines.append)
    made: object = engine
    assert made == name
    assert len(lines) == name.startswith("ReferenceEngine")


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_reference_engine_takes_no_other_bits(quantization: str) -> None:
    with pytest.raises(Misconfigured, match=f"KIMI_VL_QUANTIZATION={quantization} needs a CUDA GPU"):
        Service.load(Settings(model="tiny", quantization=quantization))


def test_the_shipped_model_says_what_it_is() -> None:
    lines: list[str] = []
    Service.load(Settings(model="tiny"), lines.append).close()
    assert any("demonstration and test model" in line for line in lines)


def test_a_missing_model_fails_the_start() -> None:
    with pytest.raises(Misconfigured, match="neither a checkpoint folder nor one of thinking"):
        Service.load(Settings(model="no-such-model"))
