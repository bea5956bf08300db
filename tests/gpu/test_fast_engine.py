"""On a CUDA GPU: the fast engine at full size against float32, and against the reference engine with the tiny model."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.base import ModelInputs, Patches, Picture, SamplingParams
from kimi_vl.engine.fast.chunk_attention import CHUNK, OPENING, KeysAndValues, attend_by_rectangles
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.kernels.operation import is_hopper
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from kimi_vl.engine.fast.kernels.sampling import Stages
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.prefill import Piece, prefill
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import answer_prefix
from tests.gpu.errors import fast_error, random_ids, relative_error
from tests.gpu.float32 import chosen_experts, last_logits
from tests.tiny_questions import GREEDY, asked, is_right, processor

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CONTEXTS = [1, 63, 64, 65, 1000, 32768]
DECODED = 3


@pytest.fixture(scope="module")
def full_engine(full_size: KimiVLForConditionalGeneration) -> Iterator[FastEngine]:
    engine = FastEngine(Network.of(full_size))
    yield engine
    engine.close()


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
@pytest.mark.parametrize(
    "choice",
    [
        {"temperature": 0.0},
        {"top_p": 0.9, "top_k": 40},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"min_p": 0.05, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "truncated", "greedy and penalised", "truncated and penalised"],
)
def test_a_graphs_replay_is_the_step_bit_by_bit(full_engine: FastEngine, choice: dict[str, Any]) -> None:
    decoder = full_engine.decoder
    full_engine._seen = None
    full_engine._read(ModelInputs(random_ids(500)))
    params = SamplingParams(10, frozenset(), **choice)
    results = []
    for step in (lambda: decoder.run(Stages.of(params)), decoder.step):
        decoder.begin(500, params)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        kept = decoder.logits, decoder.tokens, decoder.counts, full_engine.cache[:, 500:505]
        results.append([tensor.clone() for tensor in kept])
        full_engine._read(ModelInputs(random_ids(500)))
    for eager, replayed in zip(*results, strict=True):
        assert eager.equal(replayed)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("past", "tokens"),
    [(0, CHUNK), (0, OPENING), (CHUNK, CHUNK), (3 * CHUNK, CHUNK), (OPENING, 5000), (OPENING + 1000, 5000)],
)
def test_attention_by_rectangles_is_that_of_any_prompt(full_engine: FastEngine, past: int, tokens: int) -> None:
    if not is_hopper(CUDA):
        pytest.skip("rectangles are attended to on Hopper only")
    weights = full_engine.weights.layers[0][0]
    q = torch.randn(tokens, weights.heads * (weights.nope + weights.rope), dtype=torch.bfloat16, device=CUDA)
    rows = torch.randn(past + tokens, weights.row, dtype=torch.bfloat16, device=CUDA)
    span = torch.tensor([past, tokens], dtype=torch.int32, device=CUDA)
    kv = F.linear(rows[:, : weights.latent], weights.kv_b).unflatten(1, (weights.heads, -1))
    expected = attend_prompt(q, *kv.split([weights.nope, weights.value], 2), rows, weights, span)
    k, v = KeysAndValues(rows, weights).until(past + tokens)
    assert relative_error(attend_by_rectangles(q, k, v, rows, weights, span), expected.float()) < 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("shared", [OPENING, OPENING + CHUNK, OPENING + 2 * CHUNK])
def test_a_long_prompt_is_the_same_to_the_bit_wherever_it_is_taken_up(full_engine: FastEngine, shared: int) -> None:
    engine, ids = full_engine, random_ids(OPENING + 2 * CHUNK + 5000)
    results = []
    for seen in (0, shared):
        engine._seen = None
        if seen:
            engine._read(ModelInputs(torch.cat([ids[:, :seen], random_ids(100)], 1)))
        engine.cache[:, seen:] = float("nan")
        engine._read(ModelInputs(ids))
        assert engine.cached_tokens == seen
        results.append((engine.decoder.logits.clone(), engine.cache[:, : ids.shape[1]].clone()))
    (logits, rows), (others, other_rows) = results
    assert logits.equal(others)
    assert rows.equal(other_rows)


@torch.inference_mode()
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 64), (0, 1070), (700, 65), (3000, 1152), (16_000, 30)])
def test_a_prompt_from_a_graph_is_the_same_launched_kernel_by_kernel(
    full_engine: FastEngine, start: int, length: int
) -> None:
    engine, rows = full_engine, slice(start, start + length)
    if not is_hopper(CUDA):
        pytest.skip("prompts are captured on Hopper only")
    captured = next(c for c in engine._graphs._captured if length <= c.length and start + length <= c.context)
    engine._seen = None
    if start:
        engine._read(ModelInputs(random_ids(start)))
    x = engine.weights.embeddings[random_ids(length)[0].to(CUDA)]
    results = []
    for padding in (0.0, 1.0):  # what stands beyond the chunk is of no account
        engine.cache[:, rows] = float("nan")
        engine._graphs._x.fill_(padding)
        hidden = engine._graphs.run(x, start)
        assert hidden is not None
        results.append((hidden.clone(), engine.cache[:, rows].clone()))
    engine.cache[:, rows] = float("nan")
    padded = torch.zeros(captured.length, x.shape[1], dtype=x.dtype, device=CUDA)
    padded[:length] = x
    span = torch.tensor([start, length], dtype=torch.int32, device=CUDA)
    piece = Piece(slice(0, captured.length), span, captured.context)
    (hidden,) = prefill(engine.weights, engine.cache, engine.rotary, padded, [piece])
    for other, row in results:
        assert other.equal(hidden)
        assert row.equal(engine.cache[:, rows])


@pytest.fixture(scope="module")
def tiny() -> KimiVLForConditionalGeneration:
    return load_model(WEIGHTS / "tiny", CUDA, torch.bfloat16)


@torch.inference_mode()
def agreement(model: KimiVLForConditionalGeneration, inputs: ModelInputs, tokens: list[int]) -> float | None:
    """None if the reference engine gives these tokens, too; else its lead over them where they first part, in logits.

    Each token is the likeliest after those before it: one forward over all of them says as much as their generation.
    """
    ids = torch.cat([inputs.input_ids, torch.tensor([tokens], dtype=torch.int64)], 1).to(CUDA)
    features = {name: tensor.to(CUDA) for name, tensor in inputs.tensors().items()}
    logits = model(ids, **features).logits[0, inputs.input_ids.shape[1] - 1 :].float()
    ended = len(tokens) < GREEDY.max_new_tokens
    for place, row in enumerate(logits if ended else logits[:-1]):
        likeliest = int(row.argmax())
        if place == len(tokens) and likeliest not in GREEDY.stop_ids:
            return float(row.max() - row[list(GREEDY.stop_ids)].max())
        if place < len(tokens) and likeliest != tokens[place]:
            return float(row.max() - row[tokens[place]])
    return None


def test_the_tiny_model_gives_the_reference_engines_tokens(tiny: KimiVLForConditionalGeneration) -> None:
    fast, reference = FastEngine(Network.of(tiny), answer_prefix(processor.tokenizer)), ReferenceEngine(tiny)
    leads, right = [], [0, 0]
    questions = asked(500)
    for answer, inputs in questions:
        tokens = list(fast.generate(inputs, GREEDY))
        lead = agreement(tiny, inputs, tokens)
        theirs = tokens if lead is None else list(reference.generate(inputs, GREEDY))
        for place, output in enumerate((tokens, theirs)):
            right[place] += is_right(output, answer)
        if lead is not None:
            leads.append(lead)
    print(f"{len(questions) - len(leads)} of {len(questions)} equal, leads where not {leads}; right: {right}")
    assert len(leads) <= 0.01 * len(questions)
    assert all(lead < 0.5 for lead in leads), "not a near-tie"
    assert abs(right[0] - right[1]) <= 0.01 * len(questions)
    fast.close()
    reference.close()


def test_a_cached_prefix_changes_no_token(tiny: KimiVLForConditionalGeneration) -> None:
    network, prefix = Network.of(tiny), answer_prefix(processor.tokenizer)
    warm, fresh = FastEngine(network, prefix), FastEngine(network, prefix)
    (_, inputs), *_ = asked(1)
    more = torch.tensor([processor.tokenizer.encode_text("What is 12 + 7? And what is 40 - 2?")])
    longer = replace(inputs, input_ids=torch.cat([inputs.input_ids, more], 1))
    sampling = replace(GREEDY, temperature=1.5, seed=3, max_new_tokens=100)
    list(warm.generate(inputs, sampling))
    again = list(warm.generate(longer, sampling))
    assert warm.cached_tokens == inputs.input_ids.shape[1]
    assert again == list(fresh.generate(longer, sampling))
    warm.close()
    fresh.close()


@pytest.mark.parametrize("change", [{}, {"frequency_penalty": 0.5, "min_p": 1e-3}], ids=["plain", "penalised"])
def test_what_is_forced_comes_in_its_place_and_the_rest_repeats(
    tiny: KimiVLForConditionalGeneration, change: dict[str, Any]
) -> None:
    engine = FastEngine(Network.of(tiny), answer_prefix(processor.tokenizer))
    (_, inputs), (_, other), *_ = asked(2)
    forced = processor.tokenizer.encode_text("So it is 3.")
    params = SamplingParams(40, frozenset((processor.tokenizer.vocab_size,)), temperature=2.0, seed=3, **change)
    runs = []
    for _ in range(2):
        chosen: list[int] = []

        def after_seven(token: int, chosen: list[int] = chosen) -> list[int]:
            chosen.append(token)
            return forced if len(chosen) == 7 else []

        runs.append(list(engine.generate(inputs, params, after_seven)))
        if params.penalises:
            counts = torch.bincount(torch.tensor(runs[-1]), minlength=len(engine.decoder.counts))
            assert engine.decoder.counts.tolist() == counts.tolist()
        list(engine.generate(other, GREEDY))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 40
    assert runs[0][7 : 7 + len(forced)] == forced
    engine.close()


def picture(seed: int, side: int = 64) -> Picture:
    """One of side x side patches of noise."""
    levels = torch.randint(0, 256, (side**2, 3, 14, 14), generator=torch.Generator().manual_seed(seed))
    patches: Future[Patches] = Future()
    pinned = levels.to(torch.uint8).pin_memory()
    patches.set_result(Patches(pinned, torch.linspace(-1, 1, 256).expand(3, 256).contiguous(), bytes([seed])))
    return Picture((side, side), patches)


def seen(seed: int) -> ModelInputs:
    """A prompt with a picture of its own, and always the same text."""
    return ModelInputs(
        torch.cat([random_ids(20), torch.full((1, 64**2 // 4), 163605), random_ids(30)], 1), [picture(seed)]
    )


def filled() -> list[Tensor]:
    """All that the GPU has left."""
    fillers = []
    for size in (2**30, 2**26, 2**21):  # until not even the smallest is left
        with suppress(torch.OutOfMemoryError):
            while True:
                fillers.append(torch.empty(size, dtype=torch.uint8, device=CUDA))
    return fillers


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
def test_out_of_memory_in_any_stage_leaves_the_engine_ready(full_engine: FastEngine, stage: str) -> None:
    params, fillers, chosen = SamplingParams(20, frozenset(), temperature=0.0), list[Tensor](), list[int]()
    inputs = {"vision": seen(1), "prefill": ModelInputs(random_ids(8000)), "decode": seen(0)}[stage]
    expected = list(full_engine.generate(seen(0), params))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def fill_then_force(token: int) -> list[int]:
        chosen.append(token)
        if len(chosen) == 5:
            fillers.extend(filled())
        return random_ids(3000)[0].tolist() if len(chosen) == 10 else []  # until then the GPU needs no more memory

    if stage == "decode":
        generation = full_engine.generate(inputs, replace(params, max_new_tokens=4000), fill_then_force)
    else:
        fillers.extend(filled())
        generation = full_engine.generate(inputs, params)
    with pytest.raises(torch.OutOfMemoryError):
        list(generation)
    assert chosen == (expected[:10] if stage == "decode" else [])
    fillers.clear()
    assert torch.cuda.memory_allocated() == before
    assert full_engine.healthy
    assert list(full_engine.generate(seen(0), params)) == expected
    torch.cuda.empty_cache()
