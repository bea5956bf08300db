# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The chosen experts of one token, read in place among all experts, and the shared experts' last projection.

`expand` runs the chosen experts' gate and up beside the shared down projection, whose input is ready; `contract` ends
with the chosen experts' down projections.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import (
    TILES,
    Operation,
    dot_rows,
    launch_options,
    load_rows,
    release_next,
    wait_for_previous,
)
from kimi_vl.engine.fast.kernels.routing import Scratch, silu
from kimi_vl.engine.fast.weights import Mlp


@triton.jit
def _add_shared(
    x, shared_down, shared, rows, WIDTH, SHARED: tl.constexpr, SHARED_BLOCK: tl.constexpr, PDL: tl.constexpr
):
    columns = tl.arange(0, SHARED_BLOCK)
    tile = load_rows(shared_down, rows, WIDTH, columns, SHARED)
    wait_for_previous(PDL)
    release_next(PDL)  # not earlier: the next kernel reads the chosen experts before it waits
    vector = tl.load(shared + columns, mask=columns < SHARED, other=0.0)
    before = tl.load(x + rows, mask=rows < WIDTH)
    tl.store(x + rows, before + dot_rows(tile, vector), mask=rows < WIDTH)


@triton.jit
def _activate(
    hidden,
    experts,
    gate_up,
    activations,
    slot,
    rows,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, WIDTH_BLOCK)
    wait_for_previous(PDL)
    release_next(PDL)
    expert = gate_up + tl.load(experts + slot).to(tl.int64) * (2 * INNER * WIDTH)
    gate = load_rows(expert, rows, INNER, columns, WIDTH)
    up = load_rows(expert + INNER * WIDTH, rows, INNER, columns, WIDTH)
    vector = tl.load(hidden + columns, mask=columns < WIDTH, other=0.0)
    activation = silu(dot_rows(gate, vector)) * dot_rows(up, vector)
    tl.store(activations + slot * INNER + rows, activation.to(activations.dtype.element_ty), mask=rows < INNER)


@triton.jit
def _expand_kernel(
    x,
    hidden,
    experts,
    gate_up,
    shared_down,
    shared,
    activations,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    down_programs: tl.constexpr = (WIDTH + DOWN_ROWS - 1) // DOWN_ROWS
    if program < down_programs:
        rows = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
        _add_shared(x, shared_down, shared, rows, WIDTH, SHARED, SHARED_BLOCK, PDL)
    else:
        blocks: tl.constexpr = (INNER + ROWS - 1) // ROWS
        slot = (program - down_programs) // blocks
        lanes = (program - down_programs) % blocks * ROWS + tl.arange(0, ROWS)
        _activate(hidden, experts, gate_up, activations, slot, lanes, WIDTH, WIDTH_BLOCK, INNER, PDL)


def _launch_expand(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    width, shared = mlp.shared_down.shape
    inner = mlp.down.shape[2]
    tile, down_tile = TILES["gate_up"], TILES["shared_down"]
    rows, down_rows = tile.rows(2 * width), down_tile.rows(shared)
    _expand_kernel[(triton.cdiv(width, down_rows) + mlp.chosen * triton.cdiv(inner, rows),)](
        x,
        work.hidden,
        work.experts,
        mlp.gate_up,
        mlp.shared_down,
        work.shared,
        work.activations,
        WIDTH=width,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        INNER=inner,
        SHARED=shared,
        SHARED_BLOCK=triton.next_power_of_2(shared),
        DOWN_ROWS=down_rows,
        ROWS=rows,
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
    WIDTH,
    INNER: tl.constexpr,
    INNER_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, CHOSEN_BLOCK)
    columns = tl.arange(0, INNER_BLOCK)
    known = slots < CHOSEN
    # `route` has ended: `expand` let this kernel start only after its own wait for it.
    ids = tl.load(experts + slots, mask=known, other=0, cache_modifier=".cg").to(tl.int64)
    places = (ids[:, None] * WIDTH + rows[None, :]) * INNER
    inside = known[:, None] & (rows < WIDTH)[None, :]
    mask = inside[:, :, None] & (columns < INNER)[None, None, :]
    tile = tl.load(down + places[:, :, None] + columns[None, None, :], mask=mask, other=0.0)
    wait_for_previous(PDL)
    weight = tl.load(weights + slots, mask=known, other=0.0)
    vectors = tl.load(
        activations + slots[:, None] * INNER + columns[None, :],
        mask=known[:, None] & (columns < INNER)[None, :],
        other=0.0,
    )
    products = tile.to(tl.float32) * (vectors.to(tl.float32) * weight[:, None])[:, None, :]
    added = tl.sum(tl.sum(products, 0), 1)
    before = tl.load(x + rows, mask=rows < WIDTH)
    tl.store(x + rows, before + added, mask=rows < WIDTH)


def _launch_contract(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    _, width, inner = mlp.down.shape
    tile = TILES["down"]
    rows = tile.rows(inner)
    _contract_kernel[(triton.cdiv(width, rows),)](
        x,
        work.experts,
        work.weights,
        mlp.down,
        work.activations,
        width,
        INNER=inner,
        INNER_BLOCK=triton.next_power_of_2(inner),
        CHOSEN=mlp.chosen,
        CHOSEN_BLOCK=triton.next_power_of_2(mlp.chosen),
        ROWS=rows,
        **launch_options(x, tile.warps),
    )


def contract_reference(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    """Adds the chosen experts' weighted outputs to x [width] float32, from work's activations, experts and weights."""
    down = mlp.down[work.experts.long()].float()
    x += torch.einsum("c,cwi,ci->w", work.weights, down, work.activations.float())


contract = Operation(_launch_contract, contract_reference)
