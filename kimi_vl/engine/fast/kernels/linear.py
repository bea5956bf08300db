# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Matrix times vector, for decoding one token: each weight is read once, at the speed of the memory."""

import torch
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
    weight,
    out,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gains = tl.load(gain + columns, mask=columns < COLUMNS, other=0.0)
    tile = load_rows(weight, rows, columns, COLUMNS, BLOCK != COLUMNS)
    wait_for_previous(PDL)
    hidden = load_normalised(x, gains, columns, COLUMNS, EPS)
    tl.store(out + rows, dot_rows(tile, hidden))


def _launch_norm_linear(x: Tensor, gain: Tensor, weight: Tensor, out: Tensor, eps: float, tile: str) -> None:
    height, columns = weight.shape
    rows = TILES[tile].rows(height, columns)
    _norm_linear_kernel[(height // rows,)](
        x,
        gain,
        weight,
        out,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ROWS=rows,
        EPS=eps,
        **launch_options(x, TILES[tile].warps),
    )


def norm_linear_reference(x: Tensor, gain: Tensor, weight: Tensor, out: Tensor, eps: float, tile: str) -> None:
    """out = weight @ RMSNorm(x).

    Args:
        x: [columns] float32.
        gain: [columns], the norm's weight.
        weight: [rows, columns] of the gain's type.
        out: [rows] float32.
        eps: the norm's epsilon.
        tile: which of TILES the kernel uses.
    """
    torch.mv(weight.float(), rms_norm(x, gain, eps).float(), out=out)


norm_linear = Operation(_launch_norm_linear, norm_linear_reference)


@triton.jit
def _linear_add_kernel(
    x,
    weight,
    a,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = load_rows(weight, rows, columns, COLUMNS, BLOCK != COLUMNS)
    wait_for_previous(PDL)
    vector = tl.load(a + columns, mask=columns < COLUMNS, other=0.0)
    tl.store(x + rows, tl.load(x + rows) + dot_rows(tile, vector))


def _launch_linear_add(x: Tensor, weight: Tensor, a: Tensor) -> None:
    height, columns = weight.shape
    tile = TILES["output"]
    rows = tile.rows(height, columns)
    _linear_add_kernel[(height // rows,)](
        x,
        weight,
        a,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ROWS=rows,
        **launch_options(x, tile.warps),
    )


def linear_add_reference(x: Tensor, weight: Tensor, a: Tensor) -> None:
    """x += weight @ a, with x [rows] float32, weight [rows, columns] and a [columns] of the weight's type."""
    x += weight.float() @ a.float()


linear_add = Operation(_launch_linear_add, linear_add_reference)
