# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""MoonViT's rotation of queries and keys, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation


@triton.jit
def _rotate_patches_kernel(qkv, cosines, sines, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    patch, head = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = pair < HALF
    cosine = tl.load(cosines + patch * HALF + pair, mask=inside)
    sine = tl.load(sines + patch * HALF + pair, mask=inside)
    for part in tl.static_range(2):  # the queries, then the keys
        first = qkv + ((patch * 3 + part) * HEADS + head) * (2 * HALF) + pair
        a, b = tl.load(first, mask=inside).to(tl.float32), tl.load(first + HALF, mask=inside).to(tl.float32)
        tl.store(first, (a * cosine - b * sine).to(qkv.dtype.element_ty), mask=inside)
        tl.store(first + HALF, (b * cosine + a * sine).to(qkv.dtype.element_ty), mask=inside)


def _launch_rotate_patches(qkv: Tensor, cosines: Tensor, sines: Tensor) -> None:
    patches, _, heads, size = qkv.shape
    _rotate_patches_kernel[(patches,)](
        qkv, cosines, sines, HEADS=heads, HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2)
    )


def rotate_patches_reference(qkv: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Rotates each query and key of qkv [patches, 3, heads, size] by its patch's angles, in float32.

    Dimension i turns with dimension i + size / 2; cosines and sines are [patches, size / 2] float32. The number of
    heads is a power of two.
    """
    a, b = qkv[:, :2].float().chunk(2, -1)
    cosine, sine = cosines[:, None, None], sines[:, None, None]
    qkv[:, :2] = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


rotate_patches = Operation(_launch_rotate_patches, rotate_patches_reference)
