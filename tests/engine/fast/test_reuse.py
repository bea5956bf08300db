"""What a prompt takes over from the one before, in which pieces it is read, and what is left where that ends early."""

import time
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from PIL import Image

from kimi_vl.engine.base import ModelInputs, Patches
from kimi_vl.engine.fast.chunk_attention import KeysAndValues
from kimi_vl.engine.fast.engine import FastEngine, _paced
from kimi_vl.engine.fast.prefill import prefill
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.prompt.chat import question, render
from tests.engine.fast.asking import NO_STOP, REQUESTS, ask, number, pool, processor, tokens


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
