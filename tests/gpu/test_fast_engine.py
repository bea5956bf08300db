"""On a CUDA GPU: the fast engine at full size against float32, and against the reference engine with the tiny model."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from bench.full_size import random_model
from tiny.pictures import Fonts
from tiny.questions import FAMILIES, make
from torch import Tensor

from kimi_vl.engine.base import ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.prefill import choose_experts
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import answer_prefix, question, render
from kimi_vl.prompt.processor import KimiVLProcessor
from tests.gpu.float32 import chosen_experts, last_logits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CONTEXTS = [1, 63, 64, 65, 1000, 32768]
DECODED = 3


@pytest.fixture(scope="module")
def full_size() -> Iterator[KimiVLForConditionalGeneration]:
    yield random_model(CUDA, torch.bfloat16, media_id=163605)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def full_engine(full_size: KimiVLForConditionalGeneration) -> Iterator[FastEngine]:
    engine = FastEngine(full_size)
    yield engine
    engine.close()


def random_ids(length: int) -> Tensor:
    return torch.randint(0, 160_000, (1, length), generator=torch.Generator().manual_seed(length))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def transformers_error(model: KimiVLForConditionalGeneration, engine: FastEngine, ids: Tensor) -> float:
    """Of transformers' bf16, against float32 with the experts that it chose."""
    layers = [mlp for _, mlp in engine.weights.layers]
    chosen: dict[int, Tensor] = {}

    def note(index: int) -> Any:
        return lambda module, args, output: chosen.__setitem__(
            index, chosen_experts(args[0].view(-1, args[0].shape[-1]), layers[index])
        )

    handles = [
        layer.mlp.gate.register_forward_hook(note(index))
        for index, layer in enumerate(model.model.language_model.layers)
        if layers[index].chosen
    ]
    with torch.inference_mode():
        logits = model(ids.to(engine.cache.device), logits_to_keep=1).logits[0, -1]
    for handle in handles:
        handle.remove()
    return relative_error(
        logits, last_logits(engine.weights, ids[0].to(logits.device), [chosen[i] for i in sorted(chosen)])
    )


def fast_error(engine: FastEngine, ids: Tensor, decoded: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the fast engine, the last `decoded` tokens step by step, against float32 with the experts that it chose."""
    chosen: list[list[Tensor]] = [[] for _, mlp in engine.weights.layers if mlp.chosen]
    calls = iter(range(10**9))

    def note(hidden: Tensor, mlp: Any) -> Any:
        experts, weights = choose_experts(hidden, mlp)
        chosen[next(calls) % len(chosen)].append(experts)
        return experts, weights

    with torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr("kimi_vl.engine.fast.prefill.choose_experts", note)
        length = ids.shape[1]
        if length > decoded:
            engine._seen = None
            engine._read(ModelInputs(ids[:, : length - decoded]))
        for place in range(max(0, length - decoded), length):
            engine.decoder.embed(int(ids[0, place]))
            engine.decoder.position.fill_(place)
            engine.decoder.forward()
            steps = [e for e, (_, mlp) in zip(engine.decoder.experts, engine.weights.layers, strict=True) if mlp.chosen]
            for layer, step in zip(chosen, steps, strict=True):
                layer.append(step[None].long().clone())
        experts = [torch.cat(layer) for layer in chosen]
        wanted = last_logits(engine.weights, ids[0].to(engine.cache.device), experts)
    return relative_error(engine.decoder.logits, wanted)


@pytest.mark.parametrize("context", CONTEXTS)
def test_logits_are_as_near_to_float32_as_transformers(
    full_size: KimiVLForConditionalGeneration, full_engine: FastEngine, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(context)
    theirs = transformers_error(full_size, full_engine, ids)
    prefilled = fast_error(full_engine, ids, 0, monkeypatch)
    decoded = fast_error(full_engine, ids, DECODED, monkeypatch)
    print(
        f"context {context}: transformers {theirs:.4f}, prefill {prefilled:.4f}, last {DECODED} decoded {decoded:.4f}"
    )
    assert prefilled < 1.5 * theirs
    assert decoded < 1.5 * theirs


@torch.inference_mode()
def test_a_graphs_replay_is_the_step_bit_by_bit(full_engine: FastEngine) -> None:
    decoder = full_engine.decoder
    full_engine._seen = None
    full_engine._read(ModelInputs(random_ids(500)))
    results = []
    for step in (lambda: decoder.run(False), decoder.step):
        decoder.begin(500, SamplingParams(10, frozenset(), temperature=0.0))
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        results.append((decoder.logits.clone(), decoder.tokens.clone(), full_engine.cache[:, 500:505].clone()))
        full_engine._read(ModelInputs(random_ids(500)))
    for eager, replayed in zip(*results, strict=True):
        assert eager.equal(replayed)


@pytest.fixture(scope="module")
def tiny() -> KimiVLForConditionalGeneration:
    return load_model(WEIGHTS / "tiny", CUDA, torch.bfloat16)


processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
GREEDY = SamplingParams(200, processor.tokenizer.stop_ids, temperature=0.0)


def asked(count: int) -> list[tuple[str, ModelInputs]]:
    """Answers and questions with their pictures, of all families in turn."""
    random, fonts = Random(123_456), Fonts.of_matplotlib()[0]
    result = []
    for number in range(count):
        example = make(random, fonts, list(FAMILIES)[number % len(FAMILIES)])
        pictures = [drawing.image for drawing in example.drawings]
        features = processor(pictures, render([question(example.question, len(pictures))]))
        inputs = ModelInputs(features["input_ids"], features.get("pixel_values"), features.get("image_grid_hws"))
        result.append((example.answer, inputs))
    return result


@torch.inference_mode()
def margin(model: KimiVLForConditionalGeneration, inputs: ModelInputs, tokens: list[int], place: int) -> float:
    """How far the likeliest token is from the next one at a place of an output, of transformers' float32 on the CPU."""
    exact = load_model(WEIGHTS / "tiny", torch.device("cpu"), torch.float32)
    ids = torch.cat([inputs.input_ids, torch.tensor([tokens[:place]], dtype=torch.int64)], 1)
    best = exact(ids, inputs.pixel_values, inputs.image_grid_hws).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def test_the_tiny_model_gives_the_reference_engines_tokens(tiny: KimiVLForConditionalGeneration) -> None:
    fast, reference = FastEngine(tiny, answer_prefix(processor.tokenizer)), ReferenceEngine(tiny)
    equal, right = 0, [0, 0]
    questions = asked(500)
    for answer, inputs in questions:
        outputs = [list(engine.generate(inputs, GREEDY)) for engine in (fast, reference)]
        for place, output in enumerate(outputs):
            right[place] += processor.decode(output).endswith(f"◁/think▷{answer}")
        equal += outputs[0] == outputs[1]
        if outputs[0] != outputs[1]:
            pairs = zip(*outputs, strict=False)
            place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, outputs)))
            assert margin(tiny, inputs, outputs[1], place) < 0.5, "not a near-tie"
    print(f"{equal} of {len(questions)} equal; right: fast {right[0]}, reference {right[1]}")
    assert equal >= 0.99 * len(questions)
    assert abs(right[0] - right[1]) <= 0.01 * len(questions)
    fast.close()
    reference.close()


def test_a_cached_prefix_changes_no_token(tiny: KimiVLForConditionalGeneration) -> None:
    prefix = answer_prefix(processor.tokenizer)
    warm, fresh = FastEngine(tiny, prefix), FastEngine(tiny, prefix)
    (_, inputs), *_ = asked(1)
    features = {"pixel_values": inputs.pixel_values, "image_grid_hws": inputs.image_grid_hws}
    more = torch.tensor([processor.tokenizer.encode_text("What is 12 + 7? And what is 40 - 2?")])
    longer = torch.cat([inputs.input_ids, more], 1)
    sampling = replace(GREEDY, temperature=1.5, seed=3, max_new_tokens=100)
    list(warm.generate(inputs, sampling))
    again = list(warm.generate(ModelInputs(longer, **features), sampling))
    assert warm.cached_tokens == inputs.input_ids.shape[1]
    assert again == list(fresh.generate(ModelInputs(longer, **features), sampling))
    warm.close()
    fresh.close()


def test_out_of_memory_leaves_the_engine_ready(tiny: KimiVLForConditionalGeneration) -> None:
    engine = FastEngine(tiny, answer_prefix(processor.tokenizer))
    (_, inputs), *_ = asked(1)
    expected = list(engine.generate(inputs, GREEDY))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - 50_000_000, dtype=torch.uint8, device=CUDA)
    many = ModelInputs(inputs.input_ids[:, :1].expand(1, 8000))
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.generate(many, GREEDY))
    del filler
    assert list(engine.generate(inputs, GREEDY)) == expected
    engine.close()
