# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The choice of experts for one token, made while the shared experts, which do not wait for it, run."""

from dataclasses import dataclass

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
from kimi_vl.engine.fast.kernels.prompt_routing import choose
from kimi_vl.engine.fast.kernels.weight import dot, load_rows, load_scales, load_vector, normalise, take_units
from kimi_vl.engine.fast.weights import Mlp


@dataclass(frozen=True)
class Scratch:
    """What a layer's mixture of experts writes for one token."""

    hidden: Tensor  # [width] of the weights' type, the normalised input
    scores: Tensor  # [2, all experts] float32, without and with the bias
    arrived: Tensor  # [1] int32, zero between kernels
    experts: Tensor  # [chosen] int32, ids
    weights: Tensor  # [chosen] float32
    shared: Tensor  # [shared] of the weights' type, silu(gate) * up
    activations: Tensor  # [chosen, inner] of the weights' type, silu(gate) * up

    @classmethod
    def of(cls, mlp: Mlp, experts: Tensor) -> "Scratch":
        """Allocates for a layer; experts [chosen] int32 is where the ids go."""
        like = mlp.gain
        return cls(
            hidden=torch.empty_like(like),
            scores=mlp.bias.new_empty(2, len(mlp.bias)),
            arrived=torch.zeros(1, dtype=torch.int32, device=like.device),
            experts=experts,
            weights=like.new_empty(mlp.chosen, dtype=torch.float32),
            shared=like.new_empty(mlp.shared_down.columns),
            activations=like.new_empty(mlp.chosen, mlp.down.columns),
        )


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _choose(
    scores,
    experts,
    weights,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """An expert's rank is how many come before it, with a larger biased score, or an equal one and a lower id."""
    ids = tl.arange(0, BLOCK)
    known = ids < EXPERTS
    score = tl.load(scores + ids, mask=known, other=0.0, cache_modifier=".cg")
    biased = tl.load(scores + (EXPERTS + ids), mask=known, other=float("-inf"), cache_modifier=".cg")
    mine, others = biased[None, :], biased[:, None]  # so that each thread counts for itself
    before = (others > mine) | ((others == mine) & (ids[:, None] < ids[None, :]))
    rank = tl.sum(before.to(tl.int32), 0)
    chosen = rank < CHOSEN
    total = tl.sum(tl.where(chosen, score, 0.0)) + 1e-20
    tl.store(experts + rank, ids, mask=chosen)
    tl.store(weights + rank, score / total * FACTOR, mask=chosen)


@triton.jit
def _activate_shared(
    x,
    gain,
    gate_up,
    scales,
    shared,
    rows,
    SHARED,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    masked: tl.constexpr = BLOCK != UNITS
    units = take_units(0, BLOCK, PLANES, WARPS)
    gains = load_vector(gain, units, COLUMNS, PLANES, masked)
    gate = load_rows(gate_up, rows, units, UNITS, PLANES, masked)
    up = load_rows(gate_up, SHARED + rows, units, UNITS, PLANES, masked)
    gate_scales = load_scales(scales, rows, 0, BLOCK, UNITS, PLANES)
    up_scales = load_scales(scales, SHARED + rows, 0, BLOCK, UNITS, PLANES)
    wait_for_previous(PDL)
    vector, factor = normalise(load_vector(x, units, COLUMNS, PLANES, masked), gains, COLUMNS, EPS)
    activation = silu(dot(gate, gate_scales, vector, factor)) * dot(up, up_scales, vector, factor)
    tl.store(shared + rows, activation.to(shared.dtype.element_ty))


@triton.jit
def _route_kernel(
    x,
    gain,
    router,
    bias,
    shared_gate_up,
    scales,
    hidden,
    scores,
    arrived,
    experts,
    weights,
    shared,
    SHARED,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    UNITS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
    EPS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    program = tl.program_id(0)
    if program < EXPERTS:
        columns = tl.arange(0, BLOCK)
        inside = columns < COLUMNS
        gains = load_vector(gain, columns, COLUMNS, 1, BLOCK != COLUMNS)
        own_bias = tl.load(bias + program)  # not when all wait for it: that long after the last token it is in no cache
        row = tl.load(router + program * COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
        wait_for_previous(PDL)
        normalised = normalise(load_vector(x, columns, COLUMNS, 1, BLOCK != COLUMNS), gains, COLUMNS, EPS)[0][0]
        if program == 0:
            tl.store(hidden + columns, normalised, mask=inside)
        score = tl.sigmoid(tl.sum(row * normalised.to(tl.float32)))
        tl.store(scores + program, score)
        tl.store(scores + EXPERTS + program, score + own_bias)
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1) == EXPERTS - 1:  # the last to arrive sees every score
            _choose(scores, experts, weights, EXPERTS, EXPERTS_BLOCK, CHOSEN, FACTOR)
            tl.store(arrived, 0)
    else:
        rows = (program - EXPERTS) * ROWS + tl.arange(0, ROWS)
        _activate_shared(
            x, gain, shared_gate_up, scales, shared, rows, SHARED, COLUMNS, UNITS, PLANES, UNITS_BLOCK, EPS, WARPS, PDL
        )


def _launch_route(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    count, columns = mlp.router.shape
    shared = mlp.shared_down.columns
    tile = TILES["shared_gate_up", mlp.shared_gate_up.bits]
    rows = tile.rows(shared, 2 * columns)
    run_kernel(
        _route_kernel,
        (count + shared // rows,),
        x,
        mlp.gain,
        mlp.router,
        mlp.bias,
        mlp.shared_gate_up.values,
        mlp.shared_gate_up.scales,
        work.hidden,
        work.scores,
        work.arrived,
        work.experts,
        work.weights,
        work.shared,
        shared,
        EXPERTS=count,
        EXPERTS_BLOCK=triton.next_power_of_2(max(count, 1)),
        CHOSEN=mlp.chosen,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        UNITS=mlp.shared_gate_up.units,
        PLANES=mlp.shared_gate_up.planes,
        UNITS_BLOCK=triton.next_power_of_2(mlp.shared_gate_up.units),
        ROWS=rows,
        FACTOR=mlp.factor,
        EPS=mlp.eps,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )


def route_reference(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    """Chooses the experts of a token, and runs the shared experts' gate and up projections.

    Args:
        x: [width] float32, the residual stream.
        mlp: the layer's weights.
        work: hidden, experts, weights (where the layer has experts) and shared are written.
    """
    normalised = rms_norm(x, mlp.gain, mlp.eps)
    vector = normalised.float()
    gate, up = (mlp.shared_gate_up.float() @ vector).chunk(2)
    work.shared.copy_(gate * gate.sigmoid() * up)
    if mlp.chosen:
        work.hidden.copy_(normalised)
        counts = torch.empty_like(mlp.bias, dtype=torch.int32)
        one = torch.tensor([0, 1])
        choose.reference(normalised[None], mlp, work.experts[None], work.weights[None], counts[None], one)


route = Operation(_launch_route, route_reference)
