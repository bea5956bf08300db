# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The small steps between MoonViT's matrix products: levels to inputs, the rotation, and the sums with their norms."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import LayerNorm

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel


@triton.jit
def _look_up_kernel(
    levels, table, out, SIZE: tl.constexpr, CHANNEL: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    patch, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < SIZE
    level = tl.load(levels + patch * SIZE + column, mask=inside, other=0).to(tl.int32)
    value = tl.load(table + column // CHANNEL * 256 + level, mask=inside, other=0.0)
    tl.store(out + patch * PADDED + column, value.to(out.dtype.element_ty), mask=column < PADDED)


def _launch_look_up(levels: Tensor, table: Tensor, out: Tensor) -> None:
    patches, channels, *sides = levels.shape
    channel, padded = math.prod(sides), out.shape[1]
    block = triton.next_power_of_2(padded)
    run_kernel(
        _look_up_kernel,
        (patches,),
        levels,
        table,
        out,
        SIZE=channels * channel,
        CHANNEL=channel,
        PADDED=padded,
        BLOCK=block,
    )


def look_up_reference(levels: Tensor, table: Tensor, out: Tensor) -> None:
    """The network's inputs for the levels of patches.

    Args:
        levels: [patches, 3, 14, 14] uint8.
        table: [3, 256] float32, the input for each level of each channel.
        out: [patches, at least 3 * 14 * 14], written; what there is beyond the inputs is 0.
    """
    size = levels[0].numel()
    out[:, :size] = table[torch.arange(3, device=table.device)[:, None, None], levels.long()].flatten(1)
    out[:, size:] = 0


look_up = Operation(_launch_look_up, look_up_reference)


@triton.jit
def _rotate_patches_kernel(
    qkv, cosines, sines, out, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    patch, head = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = pair < HALF
    cosine = tl.load(cosines + patch * HALF + pair, mask=inside)
    sine = tl.load(sines + patch * HALF + pair, mask=inside)
    spare = 2 * HALF + pair
    kind = out.dtype.element_ty
    for part in tl.static_range(3):
        source = qkv + ((patch * 3 + part) * HEADS + head) * (2 * HALF) + pair
        target = out + ((patch * 3 + part) * HEADS + head) * PADDED
        a, b = tl.load(source, mask=inside).to(tl.float32), tl.load(source + HALF, mask=inside).to(tl.float32)
        if part < 2:  # queries and keys
            tl.store(target + pair, (a * cosine - b * sine).to(kind), mask=inside)
            tl.store(target + HALF + pair, (b * cosine + a * sine).to(kind), mask=inside)
            padding = tl.zeros([HEADS, BLOCK], tl.float32)
        else:
            tl.store(target + pair, a.to(kind), mask=inside)
            tl.store(target + HALF + pair, b.to(kind), mask=inside)
            padding = tl.broadcast_to((pair == 0).to(tl.float32), [HEADS, BLOCK])
        tl.store(target + spare, padding.to(kind), mask=spare < PADDED)


def _launch_rotate_patches(qkv: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> None:
    patches, _, heads, size = qkv.shape
    block = triton.next_power_of_2(max(size // 2, out.shape[3] - size))
    run_kernel(
        _rotate_patches_kernel,
        (patches,),
        qkv,
        cosines,
        sines,
        out,
        HEADS=heads,
        HALF=size // 2,
        BLOCK=block,
        PADDED=out.shape[3],
    )


def rotate_patches_reference(qkv: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> None:
    """Rotates each query and key by its patch's angles, in float32, and pads all heads for `attend_picture`.

    Args:
        qkv: [patches, 3, heads, size]; the number of heads is a power of two.
        cosines, sines: [patches, size / 2] float32; dimension i turns with dimension i + size / 2.
        out: [patches, 3, heads, padded], written; the spare dimensions are 0, but the first of a value's is 1.
    """
    size = qkv.shape[3]
    a, b = qkv[:, :2].float().chunk(2, -1)
    cosine, sine = cosines[:, None, None], sines[:, None, None]
    out[:, :2, :, :size] = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    out[:, 2, :, :size] = qkv[:, 2]
    out[..., size:] = 0
    out[:, 2, :, size] = 1


rotate_patches = Operation(_launch_rotate_patches, rotate_patches_reference)


@triton.jit
def _add_norm_kernel(x, delta, gain, bias, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH + columns
    total = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(delta + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row, total.to(x.dtype.element_ty), mask=inside)
    centred = tl.where(inside, total - tl.sum(total) / WIDTH, 0.0)
    normalised = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPS)
    gains = tl.load(gain + columns, mask=inside).to(tl.float32)
    biases = tl.load(bias + columns, mask=inside).to(tl.float32)
    tl.store(out + row, (normalised * gains + biases).to(out.dtype.element_ty), mask=inside)


def _launch_add_norm(x: Tensor, delta: Tensor, norm: LayerNorm, out: Tensor) -> None:
    patches, width = x.shape
    block = triton.next_power_of_2(width)
    run_kernel(
        _add_norm_kernel, (patches,), x, delta, norm.weight, norm.bias, out, WIDTH=width, BLOCK=block, EPS=norm.eps
    )


def add_norm_reference(x: Tensor, delta: Tensor, norm: LayerNorm, out: Tensor) -> None:
    """Adds delta to x and writes the LayerNorm of the sum, in float32 and each rounded once.

    Args:
        x: [patches, width], the residual stream, changed.
        delta: [patches, width], of any type.
        norm: over the width, with gain and bias.
        out: [patches, width], written.
    """
    total = x.float() + delta.float()
    x.copy_(total)
    out.copy_(F.layer_norm(total, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps))


add_norm = Operation(_launch_add_norm, add_norm_reference)
