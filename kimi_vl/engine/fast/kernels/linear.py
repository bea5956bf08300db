# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Matrix times vector, for decoding one token: each weight is read once, at the speed of the memory."""

import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import (
    TILES,
    Operation,
    dot_rows,
    launch_options,
    load_normalised,
    load_rows,
    release_next,
    rms_norm,
    wait_for_previous,
)


@triton.jit
def _norm_linear_kernel(
    x,
    gain,
    first,
    second,
    out,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    lanes = tl.arange(0, ROWS)
    gains = tl.load(gain + columns, mask=columns < COLUMNS, other=0.0)
    programs: tl.constexpr = (FIRST + ROWS - 1) // ROWS
    if program < programs:
        rows = program * ROWS + lanes
        tile = load_rows(first, rows, FIRST, columns, COLUMNS)
        wait_for_previous(PDL)
        hidden = load_normalised(x, gains, columns, COLUMNS, EPS)
        tl.store(out + rows, dot_rows(tile, hidden), mask=rows < FIRST)
    else:
        rows = (program - programs) * ROWS + lanes
        tile = load_rows(second, rows, SECOND, columns, COLUMNS)
        wait_for_previous(PDL)
        hidden = load_normalised(x, gains, columns, COLUMNS, EPS)
        tl.store(out + FIRST + rows, dot_rows(tile, hidden), mask=rows < SECOND)


def _launch_norm_linear(
    x: Tensor, gain: Tensor, first: Tensor, second: Tensor | None, out: Tensor, eps: float, tile: str
) -> None:
    columns = x.shape[0]
    rows = TILES[tile].rows(columns)
    sizes = first.shape[0], 0 if second is None else second.shape[0]
    grid = (sum(triton.cdiv(size, rows) for size in sizes),)
    _norm_linear_kernel[grid](
        x,
        gain,
        first,
        first if second is None else second,
        out,
        FIRST=sizes[0],
        SECOND=sizes[1],
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ROWS=rows,
        EPS=eps,
        **launch_options(x, TILES[tile].warps),
    )


def norm_linear_reference(
    x: Tensor, gain: Tensor, first: Tensor, second: Tensor | None, out: Tensor, eps: float, tile: str
) -> None:
    """out = [first; second] @ RMSNorm(x), for one or two weights that read the same vector.

    Args:
        x: [columns] float32.
        gain: [columns], the norm's weight.
        first, second: [rows, columns] weights of the gain's type.
        out: [all rows] float32.
        eps: the norm's epsilon.
        tile: which of TILES the kernel uses.
    """
    hidden = rms_norm(x, gain, eps).float()
    out[: first.shape[0]] = first.float() @ hidden
    if second is not None:
        out[first.shape[0] :] = second.float() @ hidden


norm_linear = Operation(_launch_norm_linear, norm_linear_reference)


@triton.jit
def _linear_add_kernel(
    x,
    weight,
    a,
    HEIGHT,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = load_rows(weight, rows, HEIGHT, columns, COLUMNS)
    wait_for_previous(PDL)
    vector = tl.load(a + columns, mask=columns < COLUMNS, other=0.0)
    before = tl.load(x + rows, mask=rows < HEIGHT)
    tl.store(x + rows, before + dot_rows(tile, vector), mask=rows < HEIGHT)


def _launch_linear_add(x: Tensor, weight: Tensor, a: Tensor) -> None:
    height, columns = weight.shape
    tile = TILES["output"]
    rows = tile.rows(columns)
    _linear_add_kernel[(triton.cdiv(height, rows),)](
        x,
        weight,
        a,
        height,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ROWS=rows,
        **launch_options(x, tile.warps),
    )


def linear_add_reference(x: Tensor, weight: Tensor, a: Tensor) -> None:
    """x += weight @ a, with x [rows] float32, weight [rows, columns] and a [columns] of the weight's type."""
    x += weight.float() @ a.float()


linear_add = Operation(_launch_linear_add, linear_add_reference)
