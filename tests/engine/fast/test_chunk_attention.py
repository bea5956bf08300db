"""Attention by rectangles, small ones and with cuDNN stood in for, against attention in one piece."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_vl.engine.fast import chunk_attention
from kimi_vl.engine.fast.chunk_attention import KeysAndValues, attend_by_rectangles, goes_by_rectangles, planned
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from kimi_vl.engine.fast.weights import Attention
from tests.engine.fast.kernels import HALF, TOLERANCE, attention_weights, normal, plain_attention, poison

CHUNK, QUERIES = 16, 4
asked: set[tuple[int, int, bool]] = set()  # shapes that cuDNN would have planned for: queries, keys, is_causal


def note_and_attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, ...]:
    asked.add((q.shape[2], k.shape[2], given["is_causal"]))
    return plain_attention(q, k, v, **given)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"CHUNK": CHUNK, "OPENING": 2 * CHUNK, "QUERIES": QUERIES}.items():
        monkeypatch.setattr(chunk_attention, name, size)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", note_and_attend)
    asked.clear()


def attend(past: int, tokens: int, weights: Attention) -> tuple[Tensor, Tensor]:
    """By rectangles, and in one piece."""
    context = past + tokens
    q = normal(tokens, 3 * (weights.nope + weights.rope) + 8, dtype=HALF)[:, :-8]
    rows = normal(context, weights.row, dtype=HALF)
    span = torch.tensor([past, tokens], dtype=torch.int32, device=q.device)
    kv = (rows[:, : weights.latent] @ weights.kv_b.T).view(context, 3, -1)
    expected = attend_prompt(q, *kv.split([weights.nope, weights.value], 2), rows, weights, span)
    return attend_by_rectangles(q, *KeysAndValues(rows, weights).until(context), rows, weights, span), expected


@pytest.mark.parametrize(
    ("past", "tokens"),
    [(0, 16), (0, 32), (16, 16), (48, 16), (96, 16), (16, 4), (16, 5), (19, 4), (47, 15), (50, 9), (33, 32)],
)
def test_rectangles_are_attention_in_one_piece(past: int, tokens: int) -> None:
    assert goes_by_rectangles(tokens, past + tokens)
    attended, expected = attend(past, tokens, attention_weights(3, HALF))
    assert (attended - expected).float().norm() < 2 * TOLERANCE[HALF] * expected.float().norm()


@pytest.mark.parametrize(("past", "tokens"), [(0, 15), (0, 17), (15, 16), (16, 3), (100, 1)])
def test_short_pieces_and_those_without_a_whole_chunk_before_them_go_another_way(past: int, tokens: int) -> None:
    assert not goes_by_rectangles(tokens, past + tokens)


def test_every_shape_is_planned() -> None:
    weights = attention_weights(3, HALF)
    for tokens, context in planned(70):
        attend(context - tokens, tokens, weights)
    at_the_start = set(asked)
    for context in range(QUERIES, 71):
        for tokens in {QUERIES, QUERIES + 1, CHUNK, 2 * CHUNK} & set(range(context + 1)):
            if goes_by_rectangles(tokens, context):
                attend(context - tokens, tokens, weights)
    assert asked == at_the_start


def test_how_rows_are_expanded_depends_on_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = attention_weights(3, HALF)
    rows = normal(50, weights.row, dtype=HALF)
    blocks: list[int] = []  # the rows of each product
    bmm = torch.bmm

    def note_and_multiply(latents: Tensor, weight: Tensor, **given: Tensor) -> Tensor:
        blocks.append(latents.shape[1])
        return bmm(latents, weight, **given)

    monkeypatch.setattr(torch, "bmm", note_and_multiply)
    kept = KeysAndValues(rows, weights)
    kept.until(21)
    kept.until(40)
    KeysAndValues(rows, weights).until(40)
    assert blocks == [16, 5, 16, 8, 16, 16, 8]


def test_keys_and_values_are_of_rows_that_come_piece_by_piece() -> None:
    weights = attention_weights(3, HALF)
    rows = normal(50, weights.row, dtype=HALF)
    growing = poison(50, weights.row, dtype=HALF)
    kept = KeysAndValues(growing, weights)
    for end in (16, 21, 40, 50):
        growing[:end] = rows[:end]
        k, v = kept.until(end)
        expected = (rows[:end, : weights.latent] @ weights.kv_b.T).view(end, 3, -1)
        k_nope, expected_v = expected.split([weights.nope, weights.value], 2)
        torch.testing.assert_close(k[..., : weights.nope], k_nope)
        torch.testing.assert_close(v, expected_v)
        k_rope = rows[:end, None, weights.latent :].expand(-1, 3, -1)
        assert k[..., weights.nope :].equal(k_rope)
