# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The small steps between MoonViT's matrix products: levels to inputs, the rotation, and the sums with their norms."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import LayerNorm

from kimi_vl.engine.fast.kernels.operation import LOG2_E, Operation, run_kernel


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
def _load_halves(source, inside, HALF: tl.constexpr):
    """Both halves of heads, in float32."""
    a, b = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_padded(main, rest, a, b, pair, first, second, HALF: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Both halves of heads into their two parts, and the first and second spare dimension; the others are 0."""
    kind = main.dtype.element_ty
    inside, right, spare = pair < HALF, HALF + pair, tl.arange(0, REST)[None, :] - (2 * HALF - MAIN)
    tl.store(main + pair, a.to(kind), mask=inside)
    tl.store(main + right, b.to(kind), mask=right < MAIN)
    tl.store(rest + right - MAIN, b.to(kind), mask=inside & (right >= MAIN))
    padding = tl.where(spare == 0, first, tl.where(spare == 1, second, 0.0))
    padding = tl.broadcast_to(padding, [a.shape[0], REST])
    tl.store(rest + tl.arange(0, REST)[None, :], padding.to(kind), mask=spare >= 0)


@triton.jit
def _rotate_patches_kernel(
    qkv,
    cosines,
    sines,
    length,
    main,
    rest,
    scale,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    patch, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    within = patch < tl.load(length)
    inside = (pair < HALF) & within
    part: tl.constexpr = HEADS * 2 * HALF
    source = qkv + patch * 3 * part + head * (2 * HALF) + pair
    # All loads before any store: else each part would wait for memory by itself.
    cosine = tl.load(cosines + patch * HALF + pair, mask=inside, other=0.0)
    sine = tl.load(sines + patch * HALF + pair, mask=inside, other=0.0)
    q_a, q_b = _load_halves(source, inside, HALF)
    k_a, k_b = _load_halves(source + part, inside, HALF)
    v_a, v_b = _load_halves(source + 2 * part, inside, HALF)

    row = head.to(tl.int64) * rows + patch
    turned = (q_a * cosine - q_b * sine) * scale, (q_b * cosine + q_a * sine) * scale
    _store_padded(main + row * MAIN, rest + row * REST, turned[0], turned[1], pair, 1.0, 0.0, HALF, MAIN, REST)
    row += HEADS * rows
    turned = k_a * cosine - k_b * sine, k_b * cosine + k_a * sine
    hidden = tl.where(within, 0.0, float("-inf"))
    _store_padded(main + row * MAIN, rest + row * REST, turned[0], turned[1], pair, hidden, 1.0, HALF, MAIN, REST)
    row += HEADS * rows
    _store_padded(main + row * MAIN, rest + row * REST, v_a, v_b, pair, 1.0, 0.0, HALF, MAIN, REST)


def _launch_rotate_patches(
    qkv: Tensor, cosines: Tensor, sines: Tensor, length: Tensor, main: Tensor, rest: Tensor
) -> None:
    _, _, heads, size = qkv.shape
    run_kernel(
        _rotate_patches_kernel,
        (main.shape[2],),
        qkv,
        cosines,
        sines,
        length,
        main,
        rest,
        size**-0.5 * LOG2_E,
        HEADS=heads,
        HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2),
        MAIN=main.shape[3],
        REST=rest.shape[3],
        num_warps=8,
    )


def rotate_patches_reference(
    qkv: Tensor, cosines: Tensor, sines: Tensor, length: Tensor, main: Tensor, rest: Tensor
) -> None:
    """Rotates each query and key by its patch's angles, in float32, and lays all heads out for `attend_picture`.

    Args:
        qkv: [patches, 3, heads, size]; the number of heads is a power of two.
        cosines, sines: [patches, size / 2] float32; dimension i turns with dimension i + size / 2.
        length: [1] int32, the patches of the picture, the first ones; the others are of no account.
        main, rest: [3, heads, rows, part], written: a head's dimensions and its spare ones. Queries are scaled, so that
            their products with keys are the logarithms to base 2 of weights. The first spare dimension is 1, but of
            a key 0, or -inf beyond the picture; the second is 1 of a key. All else is 0.
    """
    count, size = int(length), qkv.shape[3]
    a, b = qkv[:count, :2].float().chunk(2, -1)
    cosine, sine = cosines[:count, None, None], sines[:count, None, None]
    rotated = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    rotated[:, 0] *= size**-0.5 * LOG2_E
    heads = main.new_zeros(*main.shape[:3], main.shape[3] + rest.shape[3])
    heads[:2, :, :count, :size] = rotated.permute(1, 2, 0, 3)
    heads[2, :, :count, :size] = qkv[:count, 2].transpose(0, 1)
    heads[::2, :, :, size] = 1
    heads[1, :, count:, size] = float("-inf")
    heads[1, :, :, size + 1] = 1
    main[:], rest[:] = heads.split([main.shape[3], rest.shape[3]], -1)


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
        _add_norm_kernel,
        (patches,),
        x,
        delta,
        norm.weight,
        norm.bias,
        out,
        WIDTH=width,
        BLOCK=block,
        EPS=norm.eps,
        num_warps=2,
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
