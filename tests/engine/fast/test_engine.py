"""The fast engine with the tiny model on the CPU, where the kernels' references run: the reference engine's tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kimi_vl.engine.base import ModelInputs
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from tests.engine.fast.asking import NO_STOP, REQUESTS, ask, processor, tokens


@pytest.mark.parametrize("name", REQUESTS)
def test_greedy_tokens_are_the_reference_engines(name: str, engine: FastEngine, reference: ReferenceEngine) -> None:
    params = replace(NO_STOP, max_new_tokens=60)
    assert tokens(engine, REQUESTS[name], params) == tokens(reference, REQUESTS[name], params)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [8192, 50, 7])
def test_logits_after_a_prompt_in_chunks(
    chunk: int, engine: FastEngine, model: KimiVLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"engine.CHUNK": chunk, "prefill.CHUNK": chunk, "engine.OPENING": 2 * chunk}.items():
        monkeypatch.setattr(f"kimi_vl.engine.fast.{name}", size)
    inputs = REQUESTS["pictures"]
    full = model(inputs.input_ids, **inputs.tensors()).logits[0, -1]
    engine._read(inputs)
    torch.testing.assert_close(engine.decoder.logits, full.float(), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_each_step_is_what_the_whole_prompt_gives(engine: FastEngine, model: KimiVLForConditionalGeneration) -> None:
    ids = REQUESTS["text"].input_ids
    engine._read(ModelInputs(ids[:, :-8]))
    for place in range(ids.shape[1] - 8, ids.shape[1]):
        engine.decoder._buffers.x.copy_(engine.weights.embeddings[ids[0, place]])
        engine.decoder.position.fill_(place)
        engine.decoder.forward()
        expected = model(ids[:, : place + 1]).logits[0, -1]
        torch.testing.assert_close(engine.decoder.logits, expected.float(), rtol=1e-3, atol=1e-3)


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 1.2}


@pytest.mark.parametrize("change", [{}, {**PENALTIES, "min_p": 1e-3}], ids=["plain", "penalised"])
def test_the_same_seed_gives_the_same_tokens_whatever_ran_before(engine: FastEngine, change: dict[str, Any]) -> None:
    params = replace(NO_STOP, temperature=30.0, seed=2**40 + 3, **change)
    first = tokens(engine, REQUESTS["picture"], params)
    tokens(engine, REQUESTS["text"], replace(params, seed=5))
    assert tokens(engine, REQUESTS["picture"], params) == first
    assert tokens(engine, REQUESTS["picture"], replace(params, seed=4)) != first


@pytest.mark.parametrize(
    "change",
    [{"repetition_penalty": 3.0}, {"presence_penalty": 20.0}, {"frequency_penalty": 2.0}, {"frequency_penalty": -2.0}],
    ids=str,
)
def test_greedy_tokens_with_penalties_are_the_reference_engines(
    engine: FastEngine, reference: ReferenceEngine, change: dict[str, float]
) -> None:
    params = replace(NO_STOP, max_new_tokens=60, **change)
    penalised = tokens(engine, REQUESTS["picture"], params)
    assert penalised == tokens(reference, REQUESTS["picture"], params)
    assert penalised != tokens(engine, REQUESTS["picture"], replace(NO_STOP, max_new_tokens=60))


def test_penalties_leave_the_prompt_out(engine: FastEngine) -> None:
    """The first token is the likeliest, though it stands in the prompt and anything else would be likelier."""
    said = ask("◁think▷" * 3)
    params = replace(NO_STOP, max_new_tokens=1, repetition_penalty=100.0, presence_penalty=2.0)
    assert tokens(engine, said, params) == tokens(engine, said, replace(NO_STOP, max_new_tokens=1))


@pytest.mark.parametrize("change", [{}, PENALTIES, {"temperature": 3.0, "min_p": 1e-4, "seed": 3}], ids=str)
@pytest.mark.parametrize("place", [1, 2, 7])
def test_what_is_forced_is_read_as_if_it_had_been_chosen(
    engine: FastEngine, reference: ReferenceEngine, change: dict[str, Any], place: int
) -> None:
    forced, chosen = processor.tokenizer.encode_text("So it is 3."), list[int]()

    def after_some(token: int) -> list[int]:
        chosen.append(token)
        return forced if len(chosen) == place else []

    params, inputs = replace(NO_STOP, max_new_tokens=30, **change), REQUESTS["picture"]
    output = list(engine.generate(inputs, params, after_some))
    assert len(output) == 30
    assert output[place : place + len(forced)] == forced
    assert chosen == (output[:place] + output[place + len(forced) :])[:-1], "nothing follows the last"
    if params.greedy:
        chosen.clear()
        assert output == list(reference.generate(inputs, params, after_some))
    if params.penalises:
        assert engine.decoder.counts.equal(torch.bincount(torch.tensor(output), minlength=len(engine.decoder.counts)))
    else:  # what was generated counts like a prompt
        read = place + len(forced)
        longer = replace(inputs, input_ids=torch.cat([inputs.input_ids, torch.tensor([output[:read]])], 1))
        assert output[read:] == tokens(engine, longer, replace(params, max_new_tokens=30 - read))


@pytest.mark.parametrize("left", [0, 1, 4])
def test_what_is_forced_ends_at_the_limit(engine: FastEngine, reference: ReferenceEngine, left: int) -> None:
    forced = processor.tokenizer.encode_text("So it is 3.")
    for each in (engine, reference):
        generation = each.generate(REQUESTS["text"], replace(NO_STOP, max_new_tokens=1 + left), lambda _: forced)
        assert list(generation)[1:] == forced[:left]
        assert generation.finish_reason == "length"
        assert tokens(each, REQUESTS["text"]) == tokens(reference, REQUESTS["text"])


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_one_candidate_is_greedy(engine: FastEngine, change: dict[str, Any]) -> None:
    drawn = tokens(engine, REQUESTS["text"], replace(NO_STOP, temperature=2.0, seed=1, **change))
    assert drawn == tokens(engine, REQUESTS["text"])


@torch.inference_mode()
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.9},
        {"min_p": 0.2},
        {"min_p": 0.2, "top_p": 0.8},  # another order would keep other tokens
        {"min_p": 0.05, "top_k": 3},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 0.6, "presence_penalty": -1.0},
        {**PENALTIES, "min_p": 0.2, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(engine: FastEngine, change: dict[str, Any]) -> None:
    """2,000 draws from five tokens; a share's standard error is at most 1.2 %."""
    logits = torch.full_like(engine.decoder.logits, -30.0)
    logits[[3, 5, 100, 200, 750]] = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    params = replace(NO_STOP, temperature=0.8, **change)
    output = [3, 3, 200, 750]
    counts = torch.bincount(torch.tensor(output), minlength=len(logits))
    warped = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([output]), logits[None])
    warped = warped - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    warped /= params.temperature
    if params.min_p:
        warped = MinPLogitsWarper(params.min_p)(None, warped)
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(None, warped)
    if params.top_p < 1:
        warped = TopPLogitsWarper(params.top_p)(None, warped)
    expected = warped.softmax(-1)[0]
    drawn = torch.zeros_like(expected)
    for seed in range(2000):
        engine.decoder.logits.copy_(logits)
        engine.decoder.begin(10, replace(params, seed=seed), output)
        drawn[engine.decoder.token(len(output))] += 1 / 2000
    assert drawn[expected == 0].sum() == 0
    assert (drawn - expected).abs().max() < 0.05
