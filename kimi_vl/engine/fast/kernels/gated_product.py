# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A long prompt's products with gates and ups of 16 bits on Hopper: what it multiplies is never in memory in between.

A tile has both products of some tokens and columns, [tokens, 2 * columns], so that one load brings the rows of both
from the matrix, and one instruction of the tensor cores multiplies them. Experts' tokens are read where they are, not
copied expert after expert before.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kimi_vl.engine.fast.kernels.operation import Operation, is_hopper, run_kernel
from kimi_vl.engine.fast.kernels.product import multiply, rows_of_tile
from kimi_vl.engine.fast.kernels.prompt import gate
from kimi_vl.engine.fast.kernels.routing import silu
from kimi_vl.engine.fast.matrix import Matrix

TOKENS = 128  # in a tile
COLUMNS = 128  # of the output in a tile
DEPTH = 64  # of both factors at once
ABREAST = 11  # tiles that run together and share their tokens; their rows of the matrix stay in the L2 cache meanwhile
STAGES = {True: 4, False: 1}  # of these on their way, by is_hopper: 192 KB of shared memory
WORTH_FUSING = 1024  # tokens; fewer are too few tiles for the GPU, and a prompt graph with more has all compiled ahead


@triton.jit(do_not_specialize=["ROWS_OF_ALL"])  # or a prompt of another length would wait for a compilation
def _gated_product_kernel(
    x,
    weight,
    sources,
    ends,
    out,
    ROWS_OF_ALL,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABREAST: tl.constexpr,
):
    wide: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    # ABREAST columns of tiles from the first token to the last, then the next ones
    stripe = tl.num_programs(0) // wide * ABREAST
    left = tl.program_id(0) // stripe * ABREAST
    abreast = tl.minimum(wide - left, ABREAST)
    place = tl.program_id(0) % stripe
    tile, column = place // abreast, (left + place % abreast) * COLUMNS
    first, last, expert = tile * TOKENS, ROWS_OF_ALL, 0
    if ends is not None:
        first, last, expert = rows_of_tile(tile, ends, EXPERTS, EXPERTS_BLOCK, TOKENS)
    if first >= last:
        return
    rows, columns = first + tl.arange(0, TOKENS), column + tl.arange(0, COLUMNS)
    if sources is not None:
        tokens = tl.load(sources + rows, mask=rows < last, other=0)
    both = tl.zeros([TOKENS, 2 * COLUMNS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        matrix = weight.load([2 * expert, column, start]).reshape(2 * COLUMNS, DEPTH)
        if sources is None:
            part = x.load([first, start])
        else:
            numbers = start + tl.arange(0, DEPTH)[None, :]
            part = tl.load(x + tokens[:, None] * WIDTH + numbers, mask=numbers < WIDTH, other=0.0)
        both = tl.dot(part, matrix.T, both)
    gates, ups = both.reshape(TOKENS, 2, COLUMNS).permute(0, 2, 1).split()
    places = out + rows.to(tl.int64)[:, None] * INNER + columns[None, :]
    mask = (rows < last)[:, None] & (columns < INNER)[None, :]
    tl.store(places, (silu(gates) * ups).to(out.dtype.element_ty), mask=mask)


def _launch_gated_product(x: Tensor, weight: Tensor, sources: Tensor | None, ends: Tensor | None, out: Tensor) -> None:
    (rows, inner), width, experts = out.shape, x.shape[1], 1 if ends is None else len(ends)
    tiles = triton.cdiv(rows, TOKENS) + experts - 1  # each expert but one may begin one more
    run_kernel(
        _gated_product_kernel,
        (tiles * triton.cdiv(inner, COLUMNS),),
        TensorDescriptor.from_tensor(x, [TOKENS, DEPTH]) if sources is None else x,
        TensorDescriptor.from_tensor(weight.view(2 * experts, inner, width), [2, COLUMNS, DEPTH]),
        sources,
        ends,
        out,
        rows,
        INNER=inner,
        WIDTH=width,
        EXPERTS=experts,
        EXPERTS_BLOCK=triton.next_power_of_2(experts),
        TOKENS=TOKENS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        ABREAST=ABREAST,
        num_warps=8,
        num_stages=STAGES[is_hopper(x.device)],
    )


def gated_product_reference(
    x: Tensor, weight: Tensor, sources: Tensor | None, ends: Tensor | None, out: Tensor
) -> None:
    """out = silu(x @ gates.T) * (x @ ups.T), or for rows that lie expert after expert, each with its own matrix.

    Args:
        x: [tokens, width], contiguous, rows of a multiple of 16 bytes.
        weight: [2 * inner, width], or with ends [experts, 2 * inner, width], the gates before the ups; contiguous.
        sources: [rows] int32, the token in each row; None if the rows are the tokens.
        ends: [experts] int32, where each expert's rows end; those after the last are of no account. None as sources is.
        out: [rows, inner], written.
    """
    x = x if sources is None else x.index_select(0, sources)
    start, stack = 0, weight.view(-1, 2 * out.shape[1], x.shape[1])
    for matrix, end in zip(stack, [len(x)] if ends is None else ends.tolist(), strict=True):
        gates, ups = (x[start:end].float() @ matrix.float().T).chunk(2, 1)
        out[start:end] = F.silu(gates) * ups
        start = end


gated_product = Operation(_launch_gated_product, gated_product_reference)


def is_fused(matrix: Matrix, device: torch.device) -> bool:
    """Whether multiply_gated, for many tokens, never has gates and ups in memory."""
    return matrix.bits == 16 and is_hopper(device)


def multiply_gated(x: Tensor, matrix: Matrix, sources: Tensor | None = None, ends: Tensor | None = None) -> Tensor:
    """silu(gate) * up [rows, inner], of x times a matrix of any bits whose gate rows are before its up rows."""
    rows = len(x if sources is None else sources)
    # half a tile for each expert is where the tensor cores begin to have more to do than the memory
    worth_fusing = max(WORTH_FUSING, 0 if ends is None else TOKENS // 2 * len(ends))
    if rows >= worth_fusing and is_fused(matrix, x.device):
        out = x.new_empty(rows, matrix.shape[-2] // 2)
        gated_product(x, matrix.values, sources, ends, out)
        return out
    both = multiply(x if sources is None else x.index_select(0, sources), matrix, ends)
    out = both.new_empty(rows, both.shape[1] // 2)  # not earlier: what expands few bits takes most memory
    gate(both, out)
    return out
