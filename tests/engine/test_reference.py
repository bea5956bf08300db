"""The reference engine, with the tiny model on the CPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from kimi_vl.engine.base import ModelInputs, SamplingParams
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.errors import InvalidRequest
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import grid_thw
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.processor import KimiVLProcessor

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
pool = ThreadPoolExecutor(2)
NO_STOP = SamplingParams(max_new_tokens=24, stop_ids=frozenset((processor.tokenizer.vocab_size,)), temperature=1.0)


@pytest.fixture(scope="module")
def engine() -> Any:
    engine = ReferenceEngine(load_model(WEIGHTS / "tiny", torch.device("cpu"), torch.float32))
    yield engine
    engine.close()


def picture(text: str, size: tuple[int, int] = (112, 84)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((20, 20), text, fill="black", font_size=36)
    return image


def inputs(*pictures: Image.Image, prompt: str = "What number is in the picture?") -> ModelInputs:
    return processor.prepare(pictures, prompt, pool)


def test_cached_decoding_is_full_prefill(engine: ReferenceEngine) -> None:
    given = inputs(picture("42"))
    tokens = list(engine.generate(given, replace(NO_STOP, temperature=0.0)))
    assert len(tokens) == NO_STOP.max_new_tokens
    with torch.inference_mode():
        whole = torch.cat([given.input_ids, torch.tensor([tokens])], dim=1)
        logits = engine.model(whole, **given.tensors(), use_cache=False).logits
    assert logits[0, given.input_ids.shape[1] - 1 : -1].argmax(-1).tolist() == tokens


def test_several_pictures_are_each_seen_as_if_alone(engine: ReferenceEngine) -> None:
    pictures = [picture("1"), picture("23", (200, 140)), picture("456", (84, 160))]
    together = processor.image_processor(pictures)
    assert together is not None
    with torch.inference_mode():
        features = engine.model.get_image_features(together[0], grid_thw(together[1])).pooler_output
        for image, seen in zip(pictures, features, strict=True):
            patches, grids = processor.image_processor([image]) or pytest.fail("no patches")
            alone = engine.model.get_image_features(patches, grid_thw(grids)).pooler_output[0]
            torch.testing.assert_close(seen, alone, atol=2e-5, rtol=0)


def test_the_same_seed_gives_the_same_tokens(engine: ReferenceEngine) -> None:
    given = inputs(prompt="Say something else.")
    runs = [list(engine.generate(given, replace(NO_STOP, temperature=2.0, seed=seed))) for seed in (7, 8, 7)]
    assert runs[0] == runs[2] != runs[1]


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(engine: ReferenceEngine) -> None:
    given = inputs(picture("7"))
    runs = [list(engine.generate(given, replace(NO_STOP, temperature=0.0, seed=seed))) for seed in (1, 2)]
    assert runs[0] == runs[1]


def test_top_p_of_zero_leaves_only_the_likeliest_token(engine: ReferenceEngine) -> None:
    given = inputs(picture("7"))
    narrow = list(engine.generate(given, replace(NO_STOP, temperature=2.0, top_p=0.0)))
    assert narrow == list(engine.generate(given, replace(NO_STOP, temperature=0.0)))


def test_stops_at_a_stop_token_and_leaves_it_out(engine: ReferenceEngine) -> None:
    params = replace(NO_STOP, temperature=0.0, max_new_tokens=100, stop_ids=processor.tokenizer.stop_ids)
    generation = engine.generate(inputs(picture("42")), params)
    tokens = list(generation)
    assert generation.finish_reason == "stop"
    assert 0 < len(tokens) < 100
    assert not params.stop_ids & set(tokens)


def test_stops_at_the_limit(engine: ReferenceEngine) -> None:
    generation = engine.generate(inputs(prompt="hi"), replace(NO_STOP, max_new_tokens=3))
    assert len(list(generation)) == 3
    assert generation.finish_reason == "length"


def test_a_stop_request_takes_effect_within_one_token(engine: ReferenceEngine) -> None:
    generation = engine.generate(inputs(prompt="hi"), replace(NO_STOP, max_new_tokens=4000))
    stream = iter(generation)
    next(stream)
    generation.stop()
    already_made = sum(1 for _ in stream)
    assert already_made < 100, "only what was made before the request"
    assert generation.finish_reason == "stopped"
    assert list(engine.generate(inputs(prompt="hi"), replace(NO_STOP, max_new_tokens=2)))


def test_nothing_runs_that_nobody_looks_at(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(engine, "_decode", lambda *_: started.append(1))
    unseen = engine.generate(inputs(prompt="hi"), NO_STOP)
    stopped = engine.generate(inputs(prompt="hi"), NO_STOP)
    stopped.stop()
    assert list(stopped) == []
    assert not started
    assert list(unseen) == []
    assert started


def test_a_reader_that_is_interrupted_leaves_nothing_running(engine: ReferenceEngine) -> None:
    generation = engine.generate(inputs(prompt="hi"), replace(NO_STOP, max_new_tokens=4000))
    stream = iter(generation)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert generation.stopped


def test_the_limit_is_cut_to_the_context(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(prompt="hi")
    monkeypatch.setattr(engine, "context_length", given.input_ids.shape[1] + 5)
    generation = engine.generate(given, NO_STOP)
    assert len(list(generation)) == 5
    assert generation.finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_refused_with_its_length(
    engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(prompt="hi")
    length = given.input_ids.shape[1]
    monkeypatch.setattr(engine, "context_length", length)
    with pytest.raises(InvalidRequest, match=f"has {length} tokens.* at most {length - 1}"):
        engine.generate(given, NO_STOP)


def test_an_error_in_the_engine_reaches_the_reader_and_harms_no_other(
    engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(engine.generate(inputs(prompt="hi"), NO_STOP))
    assert len(list(engine.generate(inputs(prompt="hi"), NO_STOP))) == NO_STOP.max_new_tokens


def test_requests_from_several_threads_take_turns(engine: ReferenceEngine) -> None:
    given = inputs(picture("5"))
    params = replace(NO_STOP, temperature=1.5, seed=3)
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(list(engine.generate(given, params)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
