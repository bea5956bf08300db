# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A prompt's products with matrices of 8 or 4 bits, which become numbers of the prompt's type on their way.

A tile of the output is computed transposed, [rows of the matrix, tokens]: then what was dequantised goes from registers
to Hopper's tensor cores. Matrices of 16 bits are left to the libraries, as are, expanded for the time, those that many
tokens share.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, is_hopper, run_kernel
from kimi_vl.engine.fast.kernels.quantise import WORDS
from kimi_vl.engine.fast.matrix import Matrix

ROWS = 128  # of the matrix, in a tile
FEW, MANY = 32, 128  # tokens in a tile; few while an expert has at most twice as many
UNITS = 16  # words of a row at once
STAGES = {True: 3, False: 2}  # of these on their way, by is_hopper
WORTH_EXPANDING = 256  # tokens for a matrix, from which on the libraries with 16 bits are faster, expanding included


@triton.jit
def _multiply(
    product,
    x,
    values,
    scales,
    tokens,
    rows,
    inside,
    known,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """product [rows, tokens] plus a matrix's rows times x, plane after plane; of 8 bits before the scales."""
    planes: tl.constexpr = 32 // BITS
    groups_of_row: tl.constexpr = (COLUMNS + planes * WORDS - 1) // (planes * WORDS)
    for start in range(0, groups_of_row * WORDS, UNITS):
        units = start + tl.arange(0, UNITS)
        groups = units // WORDS
        mask = known[:, None] & (groups < groups_of_row)[None, :]
        words = tl.load(values + rows[:, None] * (groups_of_row * WORDS) + units[None, :], mask=mask, other=0)
        scale = 1.0
        if BITS == 4:
            scale = tl.load(scales + rows[:, None] * groups_of_row + groups[None, :], mask=mask, other=0).to(tl.float32)
        for plane in tl.static_range(planes):
            columns = (groups * planes + plane) * WORDS + units % WORDS
            part = tl.load(
                x + tokens[None, :] * COLUMNS + columns[:, None],
                mask=inside[None, :] & (columns < COLUMNS)[:, None],
                other=0.0,
            )
            numbers = ((words >> (BITS * plane)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
            product = tl.dot((numbers.to(tl.float32) * scale).to(part.dtype), part, product)
    return product


@triton.jit
def rows_of_tile(tile, ends, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """Where the rows of a tile begin, where those of its expert end, and which expert that is; none in spare tiles."""
    experts = tl.arange(0, EXPERTS_BLOCK)
    mask = experts < EXPERTS
    lasts = tl.load(ends + experts, mask=mask, other=0)
    firsts = tl.load(ends + experts - 1, mask=mask & (experts > 0), other=0)
    tiles = tl.where(mask, (lasts - firsts + TOKENS - 1) // TOKENS, 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    first = tl.sum(tl.where(mine, firsts + (tile - before) * TOKENS, 0))
    return first, tl.sum(tl.where(mine, lasts, 0)), tl.sum(tl.where(mine, experts, 0))


@triton.jit(do_not_specialize=["TOKENS_OF_ALL"])  # or a prompt of another length would wait for a compilation
def _product_kernel(
    x,
    values,
    scales,
    ends,
    out,
    TOKENS_OF_ALL,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    tile = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = rows < HEIGHT
    matrix_rows = rows.to(tl.int64)
    first, last = tile * TOKENS, TOKENS_OF_ALL
    if ends is not None:
        first, last, expert = rows_of_tile(tile, ends, EXPERTS, EXPERTS_BLOCK, TOKENS)
        matrix_rows += expert.to(tl.int64) * HEIGHT
    if first >= last:
        return
    tokens = first + tl.arange(0, TOKENS)
    inside = tokens < last
    places = tokens.to(tl.int64)
    product = tl.zeros([ROWS, TOKENS], tl.float32)
    product = _multiply(product, x, values, scales, places, matrix_rows, inside, known, COLUMNS, UNITS, BITS, WORDS)
    if BITS == 8:
        product *= tl.load(scales + matrix_rows, mask=known, other=0.0)[:, None]
    mask = inside[None, :] & known[:, None]
    tl.store(out + places[None, :] * HEIGHT + rows[:, None], product.to(out.dtype.element_ty), mask=mask)


def _launch_product(x: Tensor, matrix: Matrix, ends: Tensor | None, out: Tensor) -> None:
    count, experts = len(x), 1 if ends is None else len(ends)
    tokens = FEW if count <= 2 * FEW * experts else MANY
    tiles = triton.cdiv(count, tokens) + experts - 1  # each expert but one may begin one more
    run_kernel(
        _product_kernel,
        (triton.cdiv(out.shape[1], ROWS), tiles),
        x,
        matrix.values,
        matrix.scales,
        ends,
        out,
        count,
        HEIGHT=out.shape[1],
        COLUMNS=matrix.columns,
        EXPERTS=experts,
        EXPERTS_BLOCK=triton.next_power_of_2(experts),
        ROWS=ROWS,
        TOKENS=tokens,
        UNITS=UNITS,
        BITS=matrix.bits,
        WORDS=WORDS,
        num_warps=8 if tokens == MANY else 4,
        num_stages=STAGES[is_hopper(x.device)],
    )


def product_reference(x: Tensor, matrix: Matrix, ends: Tensor | None, out: Tensor) -> None:
    """out = x @ matrix.T, or for tokens that lie expert after expert, each with its own matrix.

    Args:
        x: [tokens, columns], contiguous.
        matrix: [rows, columns], or with ends [experts, rows, columns], of 8 or 4 bits.
        ends: [experts] int32, where each expert's tokens end; those after the last are of no account.
        out: [tokens, rows], written.
    """
    if ends is None:
        out.copy_(x.float() @ matrix.float().T)
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end].float() @ matrix[expert].float().T
        start = end


product = Operation(_launch_product, product_reference)


def multiply(x: Tensor, matrix: Matrix, ends: Tensor | None = None) -> Tensor:
    """[tokens, rows]: x @ matrix.T, for a matrix of any bits; for ends see product_reference."""
    if matrix.bits == 16:
        weight = matrix.values
    elif len(x) >= WORTH_EXPANDING * (1 if ends is None else len(ends)):
        weight = matrix.dequantised(x.dtype)
    else:
        out = x.new_empty(len(x), matrix.shape[-2])
        product(x, matrix, ends, out)
        return out
    return F.linear(x, weight) if ends is None else F.grouped_mm(x, weight.mT, offs=ends)


def add_product(onto: Tensor, x: Tensor, matrix: Matrix) -> None:
    """onto [tokens, rows] += x @ matrix.T"""
    if matrix.bits == 16:
        onto.addmm_(x, matrix.values.T)
    else:
        onto += multiply(x, matrix)
