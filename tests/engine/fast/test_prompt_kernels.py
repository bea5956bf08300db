"""Each kernel of a prompt and of a picture against its reference, over sizes that fill no tile."""

import pytest
import torch

from kimi_vl.engine.fast.kernels.picture import rotate_patches
from kimi_vl.engine.fast.kernels.prompt import gate, mix, rotate
from kimi_vl.engine.fast.kernels.prompt_attention import KEYS, ROWS, attend_prompt
from tests.engine.fast.kernels import DEVICE, DTYPES, TOLERANCE, attention_weights, check, normal, poison


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_rotate(heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    q, fresh = normal(5, len(weights.q), dtype=dtype), normal(5, len(weights.kv_a), dtype=dtype)
    rows = poison(5, len(weights.kv_a), dtype=dtype)
    check(rotate, [q, rows], q, fresh, weights, normal(5, weights.rope), rows, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 700), (2, 2100)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    out = poison(rows, width, dtype=dtype)
    apart = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype)
    check(gate, [out], *apart, out, tolerance=TOLERANCE[dtype])
    both = normal(rows, 2 * width, dtype=dtype)
    check(gate, [out], both[:, :width], both[:, width:], out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "chosen"), [(1, 8, 1), (7, 200, 6)])
def test_mix(tokens: int, width: int, chosen: int, dtype: torch.dtype) -> None:
    x, shared = normal(tokens, width, dtype=dtype), normal(tokens, width, dtype=dtype)
    places = torch.randperm(tokens * chosen, device=DEVICE).view(tokens, chosen)
    outputs = normal(tokens * chosen, width, dtype=dtype)
    check(mix, [x], x, shared, outputs, places, normal(tokens, chosen), tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("past", "tokens"), [(0, 1), (0, ROWS), (0, ROWS + 1), (1, 5), (KEYS, 1), (KEYS - 1, ROWS + 3), (3 * KEYS + 5, 70)]
)
def test_attend_prompt(past: int, tokens: int, heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    q, kv = normal(tokens, len(weights.q), dtype=dtype), normal(past + tokens, len(weights.kv_b), dtype=dtype)
    cache = normal(past + tokens + 9, len(weights.kv_a), dtype=dtype)
    cache[past + tokens :] = float("nan")  # what no token has written may hold anything
    out = poison(tokens, heads * weights.value, dtype=dtype)
    rows = cache[: past + tokens]
    check(attend_prompt, [out], q, kv, rows, weights, out, tolerance=max(TOLERANCE[dtype], 1e-5))


@DTYPES
@pytest.mark.parametrize("size", [72, 8])
def test_rotate_patches(size: int, dtype: torch.dtype) -> None:
    qkv = normal(5, 3, 2, size, dtype=dtype)
    values = qkv[:, 2].clone()
    angles = normal(5, size // 2)
    check(rotate_patches, [qkv], qkv, angles.cos(), angles.sin(), tolerance=TOLERANCE[dtype])
    assert qkv[:, 2].equal(values)
