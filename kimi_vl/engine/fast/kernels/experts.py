# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The chosen experts of one token, read in place among all experts, and the shared experts' last projection.

`expand` runs the chosen experts' gate and up beside the shared down projection, whose input is ready; `contract` ends
with the chosen experts' down projections.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.experts_down import launch_contract_words
from kimi_vl.engine.fast.kernels.operation import (
    TILES,
    Operation,
    launch_options,
    release_next,
    run_kernel,
    wait_for_previous,
)
from kimi_vl.engine.fast.kernels.routing import Scratch, silu
from kimi_vl.engine.fast.kernels.weight import (
    add_up,
    dot,
    load_rows,
    load_scales,
    load_vector,
    multiply,
    piece_sizes,
    take_units,
)
from kimi_vl.engine.fast.weights import Mlp


@triton.jit
def _load_pieces(
    matrix,
    scales,
    rows,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Whole rows of a matrix, in the pieces of `piece_sizes`, and their scales."""
    units_a, units_b = take_units(0, A, PLANES, WARPS), take_units(A, B, PLANES, WARPS)
    a = load_rows(matrix, rows, units_a, UNITS, PLANES, False)
    b = load_rows(matrix, rows, units_b, UNITS, PLANES, A + B > UNITS)
    scale_a = load_scales(scales, rows, 0, A, UNITS, PLANES)
    scale_b = load_scales(scales, rows, A, B, UNITS, PLANES)
    return a, b, scale_a, scale_b


@triton.jit
def _multiply_pieces(
    pieces,
    vector,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The pieces times a vector in memory, each to be added up."""
    a, b, scale_a, scale_b = pieces
    vector_a = load_vector(vector, take_units(0, A, PLANES, WARPS), COLUMNS, PLANES, False)
    vector_b = load_vector(vector, take_units(A, B, PLANES, WARPS), COLUMNS, PLANES, A + B > UNITS)
    return multiply(a, scale_a, vector_a), multiply(b, scale_b, vector_b)


@triton.jit
def _add_shared(
    x,
    shared_down,
    scales,
    shared,
    rows,
    SHARED: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    pieces = _load_pieces(shared_down, scales, rows, UNITS, PLANES, A, B, WARPS)
    wait_for_previous(PDL)
    release_next(PDL)  # not earlier: the next kernel reads the chosen experts before it waits
    a, b = _multiply_pieces(pieces, shared, SHARED, UNITS, PLANES, A, B, WARPS)
    tl.store(x + rows, tl.load(x + rows) + add_up(a, PLANES) + add_up(b, PLANES))


@triton.jit
def _activate(
    hidden,
    experts,
    gate_up,
    scales,
    activations,
    slot,
    rows,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    masked: tl.constexpr = BLOCK != UNITS
    units = take_units(0, BLOCK, PLANES, WARPS)
    wait_for_previous(PDL)
    release_next(PDL)
    gate_rows = tl.load(experts + slot).to(tl.int64) * (2 * INNER) + rows
    gate = load_rows(gate_up, gate_rows, units, UNITS, PLANES, masked)
    up = load_rows(gate_up, gate_rows + INNER, units, UNITS, PLANES, masked)
    gate_scales = load_scales(scales, gate_rows, 0, BLOCK, UNITS, PLANES)
    up_scales = load_scales(scales, gate_rows + INNER, 0, BLOCK, UNITS, PLANES)
    vector = load_vector(hidden, units, WIDTH, PLANES, masked)
    activation = silu(dot(gate, gate_scales, vector)) * dot(up, up_scales, vector)
    tl.store(activations + slot * INNER + rows, activation.to(activations.dtype.element_ty))


@triton.jit
def _expand_kernel(
    x,
    hidden,
    experts,
    gate_up,
    gate_up_scales,
    shared_down,
    shared_down_scales,
    shared,
    activations,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_UNITS: tl.constexpr,
    SHARED_PLANES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    down_programs: tl.constexpr = WIDTH // DOWN_ROWS
    if program < down_programs:
        rows = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
        _add_shared(
            x, shared_down, shared_down_scales, shared, rows, SHARED, SHARED_UNITS, SHARED_PLANES, A, B, WARPS, PDL
        )
    else:
        blocks: tl.constexpr = INNER // ROWS
        slot = (program - down_programs) // blocks
        lanes = (program - down_programs) % blocks * ROWS + tl.arange(0, ROWS)
        _activate(
            hidden,
            experts,
            gate_up,
            gate_up_scales,
            activations,
            slot,
            lanes,
            WIDTH,
            UNITS,
            PLANES,
            BLOCK,
            INNER,
            WARPS,
            PDL,
        )


def _launch_expand(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    width, shared = mlp.shared_down.shape
    inner = mlp.down.columns
    tile, down_tile = TILES["gate_up", mlp.gate_up.bits], TILES["shared_down", mlp.shared_down.bits]
    rows, down_rows = tile.rows(inner, 2 * width), down_tile.rows(width, shared)
    run_kernel(
        _expand_kernel,
        (width // down_rows + mlp.chosen * (inner // rows),),
        x,
        work.hidden,
        work.experts,
        mlp.gate_up.values,
        mlp.gate_up.scales,
        mlp.shared_down.values,
        mlp.shared_down.scales,
        work.shared,
        work.activations,
        WIDTH=width,
        UNITS=mlp.gate_up.units,
        PLANES=mlp.gate_up.planes,
        BLOCK=triton.next_power_of_2(mlp.gate_up.units),
        INNER=inner,
        SHARED=shared,
        SHARED_UNITS=mlp.shared_down.units,
        SHARED_PLANES=mlp.shared_down.planes,
        **piece_sizes(mlp.shared_down.units, mlp.shared_down.bits),
        DOWN_ROWS=down_rows,
        ROWS=rows,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )


def expand_reference(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    """Adds the shared experts' output to x [width] float32, and runs the chosen experts' gate and up projections.

    Reads work's hidden, experts and shared, as `route` wrote them; writes its activations.
    """
    x += mlp.shared_down.float() @ work.shared.float()
    gate, up = (mlp.gate_up[work.experts.long()].float() @ work.hidden.float()).chunk(2, 1)
    work.activations.copy_(gate * gate.sigmoid() * up)


expand = Operation(_launch_expand, expand_reference)


@triton.jit
def _contract_kernel(
    x,
    experts,
    weights,
    down,
    activations,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, CHOSEN_BLOCK)
    # `route` has ended: `expand` let this kernel start only after its own wait for it. All ids at once, and past the
    # L1 cache, which may hold those of the token before.
    ids = tl.load(experts + slots, mask=slots < CHOSEN, other=0, cache_modifier=".cg").to(tl.int64)
    sum_a = tl.zeros([ROWS, A], tl.float32)
    sum_b = tl.zeros([ROWS, B], tl.float32)
    for slot in tl.static_range(CHOSEN):
        expert = tl.sum(tl.where(slots == slot, ids, 0))
        pieces = _load_pieces(down, None, expert * WIDTH + rows, INNER, 1, A, B, WARPS)
        if slot == 0:
            wait_for_previous(PDL)
        weight = tl.load(weights + slot)
        a, b = _multiply_pieces(pieces, activations + slot * INNER, INNER, INNER, 1, A, B, WARPS)
        sum_a += a * weight
        sum_b += b * weight
    added = tl.sum(sum_a, 1) + tl.sum(sum_b, 1)
    tl.store(x + rows, tl.load(x + rows) + added)


def _launch_contract(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    if mlp.down.bits != 16:
        launch_contract_words(x, mlp, work)
        return
    _, width, inner = mlp.down.shape
    tile = TILES["down", 16]
    rows = tile.rows(width, inner)
    run_kernel(
        _contract_kernel,
        (width // rows,),
        x,
        work.experts,
        work.weights,
        mlp.down.values,
        work.activations,
        WIDTH=width,
        INNER=inner,
        **piece_sizes(inner, 16),
        CHOSEN=mlp.chosen,
        CHOSEN_BLOCK=triton.next_power_of_2(mlp.chosen),
        ROWS=rows,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )


def contract_reference(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    """Adds the chosen experts' weighted outputs to x [width] float32, from work's activations, experts and weights."""
    down = mlp.down[work.experts.long()].float()
    x += torch.einsum("c,cwi,ci->w", work.weights, down, work.activations.float())


contract = Operation(_launch_contract, contract_reference)
