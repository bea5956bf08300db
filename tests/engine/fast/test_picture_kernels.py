"""Each kernel of a picture against its reference, over sizes that fill no tile."""

import pytest
import torch

from kimi_vl.engine.fast.kernels.picture import add_norm, rotate_patches
from kimi_vl.engine.fast.kernels.picture_attention import KEYS, QUERIES, attend_picture
from tests.engine.fast.kernels import DEVICE, DTYPES, HALF, TOLERANCE, check, gains, normal, poison


@DTYPES
@pytest.mark.parametrize("size", [72, 8])
def test_rotate_patches(size: int, dtype: torch.dtype) -> None:
    qkv = normal(5, 3, 2, size, dtype=dtype)
    values = qkv[:, 2].clone()
    angles = normal(5, size // 2)
    check(rotate_patches, [qkv], qkv, angles.cos(), angles.sin(), tolerance=TOLERANCE[dtype])
    assert qkv[:, 2].equal(values)


@DTYPES
@pytest.mark.parametrize("precise", [False, True], ids=["as the network", "float32"])
@pytest.mark.parametrize(("patches", "width"), [(1, 2), (5, 144), (3, 1152)])
def test_add_norm(patches: int, width: int, precise: bool, dtype: torch.dtype) -> None:
    norm = torch.nn.LayerNorm(width, device=DEVICE, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(gains(width, dtype))
    norm.bias.copy_(normal(width, dtype=dtype))
    x, out = normal(patches, width, dtype=dtype, scale=3), poison(patches, width, dtype=dtype)
    delta = normal(patches, width, dtype=torch.float32 if precise else dtype) + 5  # far from a mean of zero
    check(add_norm, [x, out], x, delta, norm, out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(
    ("patches", "heads", "size"),
    [
        (1, 1, 72),
        (4, 3, 72),
        (KEYS, 1, 72),
        (KEYS + 1, 2, 72),
        (QUERIES, 1, 72),
        (QUERIES + 3, 2, 72),
        (2 * QUERIES + KEYS + 5, 1, 72),
        (KEYS + 9, 2, 24),
        (KEYS + 9, 2, 64),
        (KEYS + 9, 2, 80),
    ],
)
def test_attend_picture(patches: int, heads: int, size: int, dtype: torch.dtype) -> None:
    qkv, out = normal(patches, 3, heads, size, dtype=dtype), poison(patches, heads * size, dtype=dtype)
    check(attend_picture, [out], qkv, out, tolerance=TOLERANCE[dtype])


def test_scores_that_no_sum_of_exponentials_holds() -> None:
    qkv = normal(QUERIES + 3, 3, 1, 72, dtype=HALF, scale=20)
    out = poison(len(qkv), 72, dtype=qkv.dtype)
    check(attend_picture, [out], qkv, out, tolerance=2 * TOLERANCE[qkv.dtype])
