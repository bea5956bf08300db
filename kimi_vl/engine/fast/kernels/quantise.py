# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Weights → 8 or 4 bits, and back, in one pass that reads each of them once.

8 bits: a row's largest magnitude becomes 127. 4 bits: 64 columns share a scale. Both lie in words of 32 bits, eight
words for a group of columns, 32 or 64, of which a row's last may have fewer. Part p of a group's word w is column
8 p + w, and holds the number plus half its range. Threads that read a word each then multiply all their parts p with
one contiguous stretch of a vector, plane p of it, and each word's sum by a scale once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel

WORDS = 8  # of a group
GROUPS = 32  # in one program of `quantise_groups` and of `dequantise`
# Of 4 bits a group's largest number becomes -8 when it is divided by the scale, which leaves 7 for the other sign. A
# little more or less is often better for all the others: it is tried what comes of -9, -8.75 and so on.
FIRST, STEP, TRIED = -9.0, 0.25, 9


@triton.jit
def _round(x):
    return tl.floor(x + 0.5)


@triton.jit
def _pack(numbers, BITS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """[GROUPS, columns] whole float32 → [GROUPS, WORDS] int32."""
    planes: tl.constexpr = 32 // BITS
    parts = (numbers + (1 << (BITS - 1))).to(tl.int32).reshape(GROUPS, planes, WORDS)
    return tl.sum(parts << (BITS * tl.arange(0, planes))[None, :, None], 1)


@triton.jit(do_not_specialize_on_alignment=["values", "scales"])  # so that it is compiled once, whatever the row
def _quantise_rows_kernel(
    piece, values, scales, COLUMNS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    numbers = tl.load(piece + row * COLUMNS + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(numbers))
    rounded = _round(numbers * (127 / tl.where(largest > 0, largest, 1.0)))
    groups_of_row: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    words = (row * groups_of_row + groups)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(values + words, _pack(rounded, 8, GROUPS, WORDS), mask=(groups < groups_of_row)[:, None])
    tl.store(scales + row, largest / 127)


def _launch_quantise_rows(piece: Tensor, values: Tensor, scales: Tensor) -> None:
    rows, columns = piece.shape
    run_kernel(
        _quantise_rows_kernel,
        (rows,),
        piece,
        values,
        scales,
        COLUMNS=columns,
        GROUP=group_size(8),
        GROUPS=triton.next_power_of_2(values.shape[1] // WORDS),
        WORDS=WORDS,
        num_warps=4,
    )


def quantise_rows_reference(piece: Tensor, values: Tensor, scales: Tensor) -> None:
    """To 8 bits, each row by its own scale.

    Args:
        piece: [rows, columns] of a floating type, contiguous.
        values: [rows, groups * WORDS] int32, written.
        scales: [rows] float32, written.
    """
    numbers = piece.float()
    largest = numbers.abs().amax(1, keepdim=True)
    values.copy_(pack(_round_half_up(numbers * (127 / largest.where(largest > 0, 1.0))), 8))
    scales.copy_(largest[:, 0] / 127)


quantise_rows = Operation(_launch_quantise_rows, quantise_rows_reference)


@triton.jit(do_not_specialize=["COUNT"], do_not_specialize_on_alignment=["values", "scales"])
def _quantise_groups_kernel(
    piece,
    values,
    scales,
    COUNT,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    TRIED: tl.constexpr,
):
    groups_of_row: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    columns = (groups % groups_of_row * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    places = (groups // groups_of_row)[:, None] * COLUMNS + columns
    numbers = tl.load(piece + places, mask=(groups < COUNT)[:, None] & (columns < COLUMNS), other=0.0).to(tl.float32)
    high, low = tl.max(numbers, 1), tl.min(numbers, 1)
    largest = tl.where(high > -low, high, low)
    divisor = tl.where(largest != 0, largest, 1.0)
    best = tl.full([GROUPS], -1.0, tl.float32)
    scale = tl.zeros([GROUPS], tl.float32)
    for number in tl.static_range(TRIED):
        quotient = (FIRST + STEP * number) / divisor
        rounded = tl.minimum(tl.maximum(_round(numbers * quotient[:, None]), -8.0), 7.0)
        product, square = tl.sum(rounded * numbers, 1), tl.sum(rounded * rounded, 1)
        fitted = product / tl.maximum(square, 1.0)
        scale = tl.where(product * fitted > best, fitted, scale)
        best = tl.maximum(best, product * fitted)
    kept = scale.to(scales.dtype.element_ty)
    tl.store(scales + groups, kept, mask=groups < COUNT)
    quotient = 1 / tl.where(kept != 0, kept.to(tl.float32), 1.0)
    rounded = tl.minimum(tl.maximum(_round(numbers * quotient[:, None]), -8.0), 7.0)
    words = groups[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(values + words, _pack(rounded, 4, GROUPS, WORDS), mask=(groups < COUNT)[:, None])


def _launch_quantise_groups(piece: Tensor, values: Tensor, scales: Tensor) -> None:
    count = scales.numel()
    run_kernel(
        _quantise_groups_kernel,
        (triton.cdiv(count, GROUPS),),
        piece,
        values,
        scales,
        count,
        COLUMNS=piece.shape[1],
        GROUP=group_size(4),
        WORDS=WORDS,
        GROUPS=GROUPS,
        FIRST=FIRST,
        STEP=STEP,
        TRIED=TRIED,
        num_warps=4,
    )


def quantise_groups_reference(piece: Tensor, values: Tensor, scales: Tensor) -> None:
    """To 4 bits, each group by the scale, of those tried, that leaves the smallest sum of squared errors.

    For integers q of numbers x the best scale is q·x / q·q, and leaves x·x - (q·x)² / q·q.

    Args:
        piece: [rows, columns] of a floating type, contiguous.
        values: [rows, groups * WORDS] int32, written.
        scales: [rows, groups] bfloat16, written.
    """
    numbers = _in_groups(piece.float(), group_size(4))
    high, low = numbers.amax(2), numbers.amin(2)
    largest = torch.where(high > -low, high, low)
    best, scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    for number in range(TRIED):
        rounded = _rounded(numbers, (FIRST + STEP * number) / largest.where(largest != 0, 1.0))
        product, square = (rounded * numbers).sum(2), rounded.square().sum(2)
        fitted = product / square.clamp(min=1)
        scale = torch.where(product * fitted > best, fitted, scale)
        best = torch.maximum(best, product * fitted)
    scales.copy_(scale)
    kept = scales.float()
    rounded = _rounded(numbers, 1 / kept.where(kept != 0, 1.0))
    values.copy_(pack(rounded.flatten(1), 4))


def _rounded(numbers: Tensor, quotients: Tensor) -> Tensor:
    return _round_half_up(numbers * quotients[..., None]).clamp(-8, 7)


def _round_half_up(numbers: Tensor) -> Tensor:
    return (numbers + 0.5).floor()


quantise_groups = Operation(_launch_quantise_groups, quantise_groups_reference)


@triton.jit(do_not_specialize=["COUNT"])
def _dequantise_kernel(
    values,
    scales,
    out,
    COUNT,
    COLUMNS,  # not known to the compiler, so that one kernel serves all matrices
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    planes: tl.constexpr = 32 // BITS
    groups_of_row = (COLUMNS + planes * WORDS - 1) // (planes * WORDS)
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    word, plane = tl.arange(0, WORDS)[None, None, :], tl.arange(0, planes)[None, :, None]
    inside = groups < COUNT
    words = tl.load(values + groups[:, None, None] * WORDS + word, mask=inside[:, None, None], other=0)
    numbers = ((words >> (BITS * plane)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    rows = groups // groups_of_row
    scale = tl.load(scales + (groups if BITS == 4 else rows), mask=inside, other=0.0).to(tl.float32)
    columns = (groups % groups_of_row)[:, None, None] * (planes * WORDS) + plane * WORDS + word
    places = rows[:, None, None] * COLUMNS + columns
    result = (numbers.to(tl.float32) * scale[:, None, None]).to(out.dtype.element_ty)
    tl.store(out + places, result, mask=inside[:, None, None] & (columns < COLUMNS))


def _launch_dequantise(values: Tensor, scales: Tensor, bits: int, out: Tensor) -> None:
    count = values.numel() // WORDS
    run_kernel(
        _dequantise_kernel,
        (triton.cdiv(count, GROUPS),),
        values,
        scales,
        out,
        count,
        out.shape[-1],
        BITS=bits,
        WORDS=WORDS,
        GROUPS=GROUPS,
        num_warps=4,
    )


def dequantise_reference(values: Tensor, scales: Tensor, bits: int, out: Tensor) -> None:
    """Numbers times their scales.

    Args:
        values: [..., rows, groups * WORDS] int32.
        scales: of 8 bits [..., rows] float32, of 4 bits [..., rows, groups] bfloat16.
        bits: of a number.
        out: [..., rows, columns] of a floating type, written.
    """
    of_groups = scales[..., None, None] if bits == 8 else scales[..., None].float()
    out.copy_((unpack(values, bits) * of_groups).flatten(-2)[..., : out.shape[-1]])


dequantise = Operation(_launch_dequantise, dequantise_reference)


def group_size(bits: int) -> int:
    """Columns of a group, in WORDS words."""
    return WORDS * 32 // bits


def pack(numbers: Tensor, bits: int) -> Tensor:
    """[rows, columns] whole → [rows, groups * WORDS] int32."""
    planes = _in_groups(numbers.int() + 2 ** (bits - 1), group_size(bits)).unflatten(-1, (-1, WORDS))
    return (planes << _shifts(bits, numbers.device)).sum(-2, dtype=torch.int32).flatten(1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """[..., groups * WORDS] int32 → [..., groups, columns of a group] int32."""
    planes = words.unflatten(-1, (-1, 1, WORDS)) >> _shifts(bits, words.device)
    return ((planes & (2**bits - 1)) - 2 ** (bits - 1)).flatten(-2)


def _in_groups(x: Tensor, size: int) -> Tensor:
    """[rows, columns] → [rows, groups, size], the last group filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]
