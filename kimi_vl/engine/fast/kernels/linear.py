# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Matrix times vector, for decoding one token: each weight is read once, at the speed of the memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import (
    TILES,
    Operation,
    launch_options,
    release_next,
    rms_norm,
    run_kernel,
    wait_for_previous,
)
from kimi_vl.engine.fast.kernels.weight import dot, load_rows, load_scales, load_vector, normalise, take_units
from kimi_vl.engine.fast.matrix import Matrix


@triton.jit
def _norm_linear_kernel(
    x,
    gain,
    weight,
    scales,
    out,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    masked: tl.constexpr = BLOCK != UNITS
    units = take_units(0, BLOCK, PLANES, WARPS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gains = load_vector(gain, units, COLUMNS, PLANES, masked)
    tile = load_rows(weight, rows, units, UNITS, PLANES, masked)
    scale = load_scales(scales, rows, 0, BLOCK, UNITS, PLANES)
    wait_for_previous(PDL)
    hidden, factor = normalise(load_vector(x, units, COLUMNS, PLANES, masked), gains, COLUMNS, EPS)
    tl.store(out + rows, dot(tile, scale, hidden, factor))


def _launch_norm_linear(x: Tensor, gain: Tensor, weight: Matrix, out: Tensor, eps: float, name: str) -> None:
    height, columns = weight.shape
    tile = TILES[name, weight.bits]
    rows = tile.rows(height, columns)
    run_kernel(
        _norm_linear_kernel,
        (height // rows,),
        x,
        gain,
        weight.values,
        weight.scales,
        out,
        COLUMNS=columns,
        UNITS=weight.units,
        PLANES=weight.planes,
        BLOCK=triton.next_power_of_2(weight.units),
        ROWS=rows,
        EPS=eps,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )


def norm_linear_reference(x: Tensor, gain: Tensor, weight: Matrix, out: Tensor, eps: float, name: str) -> None:
    """out = weight @ RMSNorm(x).

    Args:
        x: [columns] float32.
        gain: [columns], the norm's weight.
        weight: [rows, columns], of 16 or 8 bits.
        out: [rows] float32.
        eps: the norm's epsilon.
        name: of the weight in TILES.
    """
    torch.mv(weight.float(), rms_norm(x, gain, eps).float(), out=out)


norm_linear = Operation(_launch_norm_linear, norm_linear_reference)


@triton.jit
def _linear_add_kernel(
    x,
    weight,
    scales,
    a,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    masked: tl.constexpr = BLOCK != UNITS
    units = take_units(0, BLOCK, PLANES, WARPS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = load_rows(weight, rows, units, UNITS, PLANES, masked)
    scale = load_scales(scales, rows, 0, BLOCK, UNITS, PLANES)
    wait_for_previous(PDL)
    vector = load_vector(a, units, COLUMNS, PLANES, masked)
    tl.store(x + rows, tl.load(x + rows) + dot(tile, scale, vector))


def _launch_linear_add(x: Tensor, weight: Matrix, a: Tensor) -> None:
    height, columns = weight.shape
    tile = TILES["output", weight.bits]
    rows = tile.rows(height, columns)
    run_kernel(
        _linear_add_kernel,
        (height // rows,),
        x,
        weight.values,
        weight.scales,
        a,
        COLUMNS=columns,
        UNITS=weight.units,
        PLANES=weight.planes,
        BLOCK=triton.next_power_of_2(weight.units),
        ROWS=rows,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )


def linear_add_reference(x: Tensor, weight: Matrix, a: Tensor) -> None:
    """x += weight @ a, with x [rows] float32, weight [rows, columns] of 16 or 8 bits and a [columns]."""
    x += weight.float() @ a.float()


linear_add = Operation(_launch_linear_add, linear_add_reference)
