"""Attention of whole chunks, in small squares and with cuDNN stood in for, against attention in one piece."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_vl.engine.fast import chunk_attention
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from tests.engine.fast.kernels import HALF, TOLERANCE, attention_weights, normal, poison

CHUNK = 16


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, **_: Any) -> tuple[Tensor, ...]:
    """What cuDNN's operation gives: the mixed values, and the logarithms of the sums of exp(score)."""
    scores = q.float() @ k.float().mT * scale
    if is_causal:
        scores = scores.where(torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(v.dtype), scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize(
    ("past", "tokens"),
    [(0, CHUNK), (0, 2 * CHUNK), (CHUNK, CHUNK), (2 * CHUNK, CHUNK), (3 * CHUNK, CHUNK), (6 * CHUNK, CHUNK)],
)
def test_chunks_in_squares_are_attention_in_one_piece(past: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"CHUNK": CHUNK, "SEGMENT": 2 * CHUNK, "QUERIES": CHUNK // 2}.items():
        monkeypatch.setattr(chunk_attention, name, size)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", plain_attention)
    weights, context = attention_weights(3, HALF), past + tokens
    q = normal(tokens, 3 * (weights.nope + weights.rope) + 8, dtype=HALF)[:, :-8]
    rows = normal(context, weights.row, dtype=HALF)
    expected = poison(tokens, 3 * weights.value, dtype=HALF)
    span = torch.tensor([past, tokens], dtype=torch.int32, device=q.device)
    attend_prompt(q, rows[:, : weights.latent] @ weights.kv_b.T, rows, weights, span, expected)
    attended = chunk_attention.attend_chunk(q, rows, weights)
    assert (attended - expected).float().norm() < 2 * TOLERANCE[HALF] * expected.float().norm()
