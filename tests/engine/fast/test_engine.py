"""The fast engine with the tiny model on the CPU, where the kernels' references run: the reference engine's tokens."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kimi_vl.engine.base import ModelInputs, Patches, SamplingParams
from kimi_vl.engine.fast.chunk_attention import KeysAndValues
from kimi_vl.engine.fast.engine import FastEngine, _paced
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.prefill import prefill
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import answer_prefix, question, render
from kimi_vl.prompt.processor import KimiVLProcessor

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
pool = ThreadPoolExecutor(2)
NO_STOP = SamplingParams(max_new_tokens=20, stop_ids=frozenset((processor.tokenizer.vocab_size,)), temperature=0.0)


@pytest.fixture(scope="module")
def model() -> KimiVLForConditionalGeneration:
    return load_model(WEIGHTS / "tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def network() -> Network:
    return load_network(WEIGHTS / "tiny", torch.device("cpu"), torch.float32, "none", lambda line: None)


@pytest.fixture
def engine(network: Network) -> Iterator[FastEngine]:
    engine = FastEngine(network, answer_prefix(processor.tokenizer))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model: KimiVLForConditionalGeneration) -> Iterator[ReferenceEngine]:
    engine = ReferenceEngine(model)
    yield engine
    engine.close()


def tokens(engine: FastEngine | ReferenceEngine, inputs: ModelInputs, params: SamplingParams = NO_STOP) -> list[int]:
    return list(engine.generate(inputs, params))


def ask(text: str, *pictures: Image.Image) -> ModelInputs:
    return processor.prepare(pictures, render([question(text, len(pictures))]), pool)


def number(value: int, width: int = 140, height: int = 100) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((20, 25), str(value), fill="black", font_size=40)
    return picture


REQUESTS = {
    "text": ask("What is 12 + 7?"),
    "picture": ask("What number is in the picture?", number(42)),
    "pictures": ask("Which picture shows the largest number?", number(42), number(8105, 200, 90), number(7, 90, 200)),
}


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


def conversation(pictures: list[Image.Image], *turns: str) -> ModelInputs:
    messages: list[dict[str, Any]] = [dict(question(turns[0], len(pictures)))]
    for place, turn in enumerate(turns[1:]):
        messages.append({"role": "user" if place % 2 else "assistant", "content": turn})
    return processor.prepare(pictures, render(messages), pool)


FIRST = conversation([number(42)], "What number is in the picture?")
SECOND = conversation([number(42)], "What number is in the picture?", "42", "What is 12 + 7?")


def test_a_conversation_goes_on_where_it_was(engine: FastEngine, reference: ReferenceEngine) -> None:
    tokens(engine, FIRST)
    assert engine.cached_tokens == 0
    continued = engine.generate(SECOND, NO_STOP)
    assert list(continued) == tokens(reference, SECOND)
    assert continued.cached_tokens == engine.cached_tokens == FIRST.input_ids.shape[1]
    tokens(engine, SECOND)  # nothing new to compute but the last chunk
    assert engine.cached_tokens == FIRST.input_ids.shape[1]


def test_a_prompt_opens_with_two_chunks_at_once_and_may_go_on(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.engine.CHUNK", 8)
    monkeypatch.setattr("kimi_vl.engine.fast.engine.OPENING", 16)
    groups: list[list[int]] = []

    def note_and_prefill(*given: Any) -> list[torch.Tensor]:
        groups.append([piece.rows.stop - piece.rows.start for piece in given[4]])
        return prefill(*given)

    monkeypatch.setattr("kimi_vl.engine.fast.engine.prefill", note_and_prefill)
    assert tokens(engine, FIRST) == tokens(reference, FIRST)
    length = FIRST.input_ids.shape[1]
    assert list(chain(*groups)) == [16, *[8] * (length // 8 - 2), length % 8]
    assert [sum(group) for group in groups] == [16] * (length // 16) + [length % 16]
    assert tokens(engine, SECOND) == tokens(reference, SECOND)
    assert engine.cached_tokens == length


@pytest.mark.parametrize(("fused", "last"), [(False, [[50, 58, 66], [66, 74]]), (True, [[50, 58, 66, 74]])])
def test_pieces_that_have_a_graph_go_alone_and_the_others_together(
    fused: bool, last: list[list[int]], engine: FastEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.engine.OPENING", 16)
    monkeypatch.setattr("kimi_vl.engine.fast.engine.is_fused", lambda matrix, device: fused)
    monkeypatch.setattr(engine._graphs, "fits", lambda length, end: length <= 3)
    groups = list(engine._together(5, [21, 24, 32, 34, 42, 48, 50, 58, 66, 74]))
    assert groups == [[5, 21], [21, 24], [24, 32], [32, 34], [34, 42, 48], [48, 50], *last]


def test_a_long_prompts_host_stays_two_layers_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, **_: bool) -> None:
            self.number = len([step for step in done if step.startswith("began")])

        def record(self) -> None:
            done.append(f"began {self.number}")

        def synchronize(self) -> None:
            done.append(f"reached {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    asked = _paced(torch.device("cuda"), iter([False, False, False, True]).__next__)
    assert [asked() for _ in range(4)] == [False, False, False, True]
    assert done == ["began 0", "began 1", "began 2", "reached 0", "began 3", "reached 1"]


@pytest.mark.parametrize(
    "other",
    [
        conversation([number(43)], "What number is in the picture?", "42", "What is 12 + 7?"),
        conversation([number(42)], "What number is this picture?", "42", "What is 12 + 7?"),
    ],
    ids=["other picture", "other words"],
)
def test_what_differs_is_not_reused(engine: FastEngine, reference: ReferenceEngine, other: ModelInputs) -> None:
    tokens(engine, FIRST)
    assert tokens(engine, other) == tokens(reference, other)
    assert engine.cached_tokens == 0


def note_encoded(engine: FastEngine, patch: pytest.MonkeyPatch) -> list[bytes]:
    """From here on, the digests of the pictures that the engine encodes."""
    encoded, encode = [], engine.pictures.encode

    def note_and_encode(patches: Patches, grid: tuple[int, int]) -> torch.Tensor:
        encoded.append(patches.digest)
        return encode(patches, grid)

    patch.setattr(engine.pictures, "encode", note_and_encode)
    return encoded


def test_a_picture_is_encoded_while_the_next_one_is_made(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = REQUESTS["pictures"].pictures
    made = [picture.patches.result() for picture in others]
    late = [replace(picture, patches=Future()) for picture in others]
    encode = engine.pictures.encode

    def encode_and_make(patches: Patches, grid: tuple[int, int]) -> torch.Tensor:
        if made:
            late[-len(made)].patches.set_result(made.pop(0))
        return encode(patches, grid)

    monkeypatch.setattr(engine.pictures, "encode", encode_and_make)
    output = tokens(engine, replace(REQUESTS["pictures"], pictures=[first, *late]))
    assert output == tokens(reference, REQUESTS["pictures"])


def test_pictures_before_where_a_prompt_is_taken_up_are_not_encoded(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.pictures.KEPT_BYTES", 0)
    encoded = note_encoded(engine, monkeypatch)
    tokens(engine, FIRST)
    assert len(encoded) == 1
    assert tokens(engine, SECOND) == tokens(reference, SECOND)
    assert len(encoded) == 1


def test_a_stop_among_pictures_costs_nothing_that_was_there(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens(engine, FIRST)
    tokens(engine, SECOND)
    with monkeypatch.context() as patch:
        encoded = note_encoded(engine, patch)
        generation = engine.generate(REQUESTS["pictures"], NO_STOP)
        patch.setattr("kimi_vl.engine.fast.pictures.resample", lambda *_: generation.stop())
        assert list(generation) == []
        assert generation.cached_tokens == 0
        assert len(encoded) == 1
    assert tokens(engine, SECOND) == tokens(reference, SECOND)
    assert engine.cached_tokens == FIRST.input_ids.shape[1]


def test_another_question_about_much_that_was_seen(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.prompt.WORTH_A_CUT", 10)
    tokens(engine, REQUESTS["pictures"])
    other = ask("What number is in picture 2?", number(42), number(8105, 200, 90), number(7, 90, 200))
    assert tokens(engine, other) == tokens(reference, other)
    last_media = int((other.input_ids[0] == processor.media_id).nonzero()[-1])
    assert engine.cached_tokens == last_media + 1


def test_whole_chunks_are_kept_for_any_prompt_with_the_same_pieces(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.engine.CHUNK", 8)
    first, other = ask("What is 12 + 7?", number(42)), ask("What is 12 + 8?", number(42))
    tokens(engine, first)
    assert tokens(engine, other) == tokens(reference, other)
    shared = int((first.input_ids != other.input_ids).nonzero()[0, 1])
    assert engine.cached_tokens == shared // 8 * 8
    monkeypatch.setattr("kimi_vl.engine.fast.prompt.WORTH_A_CUT", 10)  # cuts this one where the last one was not
    assert tokens(engine, first) == tokens(reference, first)
    cut = int((first.input_ids[0] == processor.media_id).nonzero()[-1]) + 1
    assert engine.cached_tokens == cut // 8 * 8 < shared // 8 * 8


def test_nothing_is_kept_for_a_prompt_that_begins_in_other_pieces(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.engine.CHUNK", 20)
    monkeypatch.setattr("kimi_vl.engine.fast.engine.OPENING", 40)
    tokens(engine, FIRST)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_vl.engine.fast.prompt.WORTH_A_CUT", 10)  # within what was the opening before
        assert tokens(engine, FIRST) == tokens(reference, FIRST)
        assert engine.cached_tokens == 0
    assert tokens(engine, FIRST) == tokens(reference, FIRST)
    assert engine.cached_tokens == 0


@pytest.mark.parametrize("reason", ["stopped", "timeout"])
@pytest.mark.parametrize(
    ("before", "stopped"),
    [(REQUESTS["text"], FIRST), (FIRST, REQUESTS["text"])],
    ids=["goes on", "was written over"],  # what SECOND begins with
)
def test_a_stop_or_a_deadline_ends_a_prompt_after_a_layer(
    engine: FastEngine,
    reference: ReferenceEngine,
    monkeypatch: pytest.MonkeyPatch,
    before: ModelInputs,
    stopped: ModelInputs,
    reason: str,
) -> None:
    layers = 0
    tokens(engine, before)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_vl.engine.fast.engine.CHUNK", 8)
        generation = engine.generate(stopped, NO_STOP)

        def stop_in_the_second(*given: Any) -> KeysAndValues:
            nonlocal layers
            layers += 1
            if layers == 2 and reason == "stopped":
                generation.stop()
            elif layers == 2:
                generation._deadline = time.monotonic()
            return KeysAndValues(*given)

        patch.setattr("kimi_vl.engine.fast.prefill.KeysAndValues", stop_in_the_second)  # of which each layer has one
        assert list(generation) == []
        assert generation.finish_reason == reason
    assert layers == 2 < len(engine.weights.layers) - 1
    assert tokens(engine, SECOND) == tokens(reference, SECOND)
    assert engine.cached_tokens == 0


def test_a_failure_leaves_the_engine_ready(
    engine: FastEngine, reference: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(engine, FIRST)
        patch.setattr("kimi_vl.engine.fast.engine.prefill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(engine, SECOND)
    assert tokens(engine, SECOND) == tokens(reference, SECOND)


def test_a_stop_takes_effect_and_the_next_request_is_right(engine: FastEngine, reference: ReferenceEngine) -> None:
    generation = engine.generate(REQUESTS["text"], replace(NO_STOP, max_new_tokens=5000))
    next(iter(generation))
    generation.stop()
    assert tokens(engine, REQUESTS["picture"]) == tokens(reference, REQUESTS["picture"])


def test_a_picture_whose_patches_fail_costs_nothing_that_was_there(
    engine: FastEngine, reference: ReferenceEngine
) -> None:
    tokens(engine, FIRST)
    broken: Future[Patches] = Future()
    broken.set_exception(MemoryError())
    with pytest.raises(MemoryError):
        tokens(engine, replace(FIRST, pictures=[replace(FIRST.pictures[0], patches=broken)]))
    assert tokens(engine, SECOND) == tokens(reference, SECOND)
    assert engine.cached_tokens == FIRST.input_ids.shape[1]
