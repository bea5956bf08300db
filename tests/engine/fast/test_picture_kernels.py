"""Each kernel of a picture against its reference, over sizes that fill no tile."""

import pytest
import torch

from kimi_vl.engine.fast.kernels.picture import add_norm, look_up, rotate_patches
from kimi_vl.engine.fast.kernels.picture_attention import KEYS, QUERIES, attend_picture, empty_heads
from tests.engine.fast.kernels import DEVICE, DTYPES, HALF, TOLERANCE, check, gains, normal, poison


@DTYPES
@pytest.mark.parametrize(("side", "padded_size"), [(14, 592), (14, 588), (2, 12)])
def test_look_up(side: int, padded_size: int, dtype: torch.dtype) -> None:
    levels = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, device=DEVICE)
    out = poison(5, padded_size, dtype=dtype)
    check(look_up, [out], levels, normal(3, 256), out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("size", [72, 64, 8])
def test_rotate_patches(size: int, dtype: torch.dtype) -> None:
    qkv, angles = normal(5, 3, 2, size, dtype=dtype), normal(5, size // 2)
    for count in (5, 3):
        qkv[count:] = angles[count:] = float("nan")
        heads = [part.fill_(float("nan")) for part in empty_heads(qkv)]
        arguments = qkv, angles.cos(), angles.sin(), length_of(count), *heads
        check(rotate_patches, heads, *arguments, tolerance=TOLERANCE[dtype])
        assert torch.cat(heads, -1)[2, :, :count, :size].transpose(0, 1).equal(qkv[:count, 2])


def length_of(count: int) -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


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
    for spare in (0, QUERIES + 1):
        check_attention(normal(patches + spare, 3, heads, size, dtype=dtype), patches, TOLERANCE[dtype])


def check_attention(qkv: torch.Tensor, patches: int, tolerance: float) -> None:
    """With NaN in the rows beyond the picture, if there are any."""
    rows, _, heads, size = qkv.shape
    angles, length = normal(rows, size // 2), length_of(patches)
    qkv[patches:] = angles[patches:] = float("nan")
    ready = empty_heads(qkv)
    rotate_patches.reference(qkv, angles.cos(), angles.sin(), length, *ready)
    out = torch.zeros(rows, heads * size, dtype=qkv.dtype, device=DEVICE)
    check(attend_picture, [out], *ready, length, out, tolerance=tolerance)


def test_scores_that_no_sum_of_exponentials_holds() -> None:
    qkv = normal(QUERIES + 3, 3, 1, 72, dtype=HALF, scale=20)
    check_attention(qkv, len(qkv), 2 * TOLERANCE[qkv.dtype])


@pytest.mark.parametrize("growth", [2, 60, 1000])
def test_scores_far_larger_than_those_of_the_first_tile(growth: float) -> None:
    qkv = normal(2 * KEYS + 3, 3, 1, 72, dtype=HALF)
    qkv[:, 0] = qkv[:, 0].abs() / 10
    qkv[KEYS:, 1] = qkv[KEYS:, 1].abs() * growth
    check_attention(qkv, len(qkv), 2 * TOLERANCE[qkv.dtype])
