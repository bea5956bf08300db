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


def _pieces(columns: int) -> dict[str, int]:
    """Powers of two that together cover a row, A + B + C ≥ columns, and all but C lie inside it.

    Tiles of these sizes leave fewer threads idle than one tile of the next power of two.
    """
    a = triton.next_power_of_2(columns) // 2
    b = triton.next_power_of_2(columns - a) // 2
    return {"A": a, "B": b, "C": triton.next_power_of_2(columns - a - b)}


@triton.jit
def _load_pieces(matrix, rows, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Whole rows of a matrix, in the pieces of `_pieces`."""
    a = load_rows(matrix, rows, tl.arange(0, A), COLUMNS, False)
    b = load_rows(matrix, rows, A + tl.arange(0, B), COLUMNS, False)
    c = load_rows(matrix, rows, A + B + tl.arange(0, C), COLUMNS, A + B + C > COLUMNS)
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)


@triton.jit
def _load_vector(vector, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """A vector in the same pieces, each as one row."""
    last = A + B + tl.arange(0, C)
    a, b = tl.load(vector + tl.arange(0, A)), tl.load(vector + A + tl.arange(0, B))
    c = tl.load(vector + last, mask=last < COLUMNS, other=0.0)
    return a.to(tl.float32)[None, :], b.to(tl.float32)[None, :], c.to(tl.float32)[None, :]


@triton.jit
def _add_shared(
    x,
    shared_down,
    shared,
    rows,
    SHARED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    a, b, c = _load_pieces(shared_down, rows, SHARED, A, B, C)
    wait_for_previous(PDL)
    release_next(PDL)  # not earlier: the next kernel reads the chosen experts before it waits
    vector_a, vector_b, vector_c = _load_vector(shared, SHARED, A, B, C)
    added = tl.sum(a * vector_a, 1) + tl.sum(b * vector_b, 1) + tl.sum(c * vector_c, 1)
    tl.store(x + rows, tl.load(x + rows) + added)


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
    gate = load_rows(expert, rows, columns, WIDTH, WIDTH_BLOCK != WIDTH)
    up = load_rows(expert + INNER * WIDTH, rows, columns, WIDTH, WIDTH_BLOCK != WIDTH)
    vector = tl.load(hidden + columns, mask=columns < WIDTH, other=0.0)
    activation = silu(dot_rows(gate, vector)) * dot_rows(up, vector)
    tl.store(activations + slot * INNER + rows, activation.to(activations.dtype.element_ty))


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
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    down_programs: tl.constexpr = WIDTH // DOWN_ROWS
    if program < down_programs:
        rows = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
        _add_shared(x, shared_down, shared, rows, SHARED, A, B, C, PDL)
    else:
        blocks: tl.constexpr = INNER // ROWS
        slot = (program - down_programs) // blocks
        lanes = (program - down_programs) % blocks * ROWS + tl.arange(0, ROWS)
        _activate(hidden, experts, gate_up, activations, slot, lanes, WIDTH, WIDTH_BLOCK, INNER, PDL)


def _launch_expand(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    width, shared = mlp.shared_down.shape
    inner = mlp.down.shape[2]
    tile, down_tile = TILES["gate_up"], TILES["shared_down"]
    rows, down_rows = tile.rows(inner, 2 * width), down_tile.rows(width, shared)
    _expand_kernel[(width // down_rows + mlp.chosen * (inner // rows),)](
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
        **_pieces(shared),
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
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
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
    sum_c = tl.zeros([ROWS, C], tl.float32)
    for slot in tl.static_range(CHOSEN):
        expert = tl.sum(tl.where(slots == slot, ids, 0))
        a, b, c = _load_pieces(down + expert * (WIDTH * INNER), rows, INNER, A, B, C)
        if slot == 0:
            wait_for_previous(PDL)
        weight = tl.load(weights + slot)
        vector_a, vector_b, vector_c = _load_vector(activations + slot * INNER, INNER, A, B, C)
        sum_a += a * (vector_a * weight)
        sum_b += b * (vector_b * weight)
        sum_c += c * (vector_c * weight)
    added = tl.sum(sum_a, 1) + tl.sum(sum_b, 1) + tl.sum(sum_c, 1)
    tl.store(x + rows, tl.load(x + rows) + added)


def _launch_contract(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    _, width, inner = mlp.down.shape
    tile = TILES["down"]
    rows = tile.rows(width, inner)
    _contract_kernel[(width // rows,)](
        x,
        work.experts,
        work.weights,
        mlp.down,
        work.activations,
        WIDTH=width,
        INNER=inner,
        **_pieces(inner),
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
