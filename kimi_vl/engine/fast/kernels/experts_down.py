# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The chosen experts' down projections from words, all at once.

A row of each behind one another makes a long row, which is split over all threads of a program. None of its words has
to wait for the kernel before.
"""

import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import TILES, launch_options, release_next, run_kernel, wait_for_previous
from kimi_vl.engine.fast.kernels.quantise import WORDS
from kimi_vl.engine.fast.kernels.routing import Scratch
from kimi_vl.engine.fast.kernels.weight import (
    enlarge,
    load_vector,
    piece_sizes,
    sum_stretches,
    take_stretches,
    take_units,
)
from kimi_vl.engine.fast.weights import Mlp


@triton.jit
def _load_chosen(
    down,
    scales,
    experts,
    weights,
    first,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    CHOSEN: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr = WORDS,
):
    """Words of long rows, each the chosen experts' rows behind one another, with scales [stretches, rows].

    Also the experts' weights [stretches]. Beyond the end words are the last row's, with a weight of zero.
    """
    stretches = take_stretches(FIRST, COUNT, WARPS)
    slots = tl.minimum(stretches // UNITS, CHOSEN - 1)
    # `route` has ended: `expand` let this kernel start only after its own wait for it.
    ids = tl.load(experts + slots, cache_modifier=".cg").to(tl.int64)
    factors = tl.load(weights + slots, mask=stretches < CHOSEN * UNITS, other=0.0, cache_modifier=".cg")
    rows = tl.arange(0, ROWS)  # added last, so that a thread's addresses differ by constants
    units = take_units(FIRST, COUNT, PLANES, WARPS) % UNITS
    tops = ids * WIDTH + first
    tile = tl.load(down + (tops * UNITS)[:, None, None] + units[:, None] + (rows * UNITS)[None, :, None])
    if PLANES == 4:
        places = tops[:, None] + rows[None, :]
    else:
        groups: tl.constexpr = UNITS // WORDS
        places = (tops * groups + stretches % UNITS // WORDS)[:, None] + (rows * groups)[None, :]
    return tile, tl.load(scales + places), factors


@triton.jit
def _load_activations(
    activations,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    INNER: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    CHOSEN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The vector that such words are multiplied with."""
    slots = tl.minimum(take_stretches(FIRST, COUNT, WARPS) // UNITS, CHOSEN - 1)
    units = take_units(FIRST, COUNT, PLANES, WARPS) % UNITS
    return load_vector(activations + slots[:, None] * INNER, units, INNER, PLANES, False)


@triton.jit
def _multiply_chosen(words, vector):
    """[stretches, rows] float32, to be added up."""
    tile, scales, factors = words
    return sum_stretches(tile, vector) * enlarge(scales) * factors[:, None]


@triton.jit
def _contract_words_kernel(
    x,
    experts,
    weights,
    down,
    scales,
    activations,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    first = tl.program_id(0) * ROWS
    a = _load_chosen(down, scales, experts, weights, first, ROWS, 0, A, WIDTH, UNITS, PLANES, CHOSEN, WARPS)
    b = _load_chosen(down, scales, experts, weights, first, ROWS, A, B, WIDTH, UNITS, PLANES, CHOSEN, WARPS)
    wait_for_previous(PDL)
    vector_a = _load_activations(activations, 0, A, INNER, UNITS, PLANES, CHOSEN, WARPS)
    vector_b = _load_activations(activations, A, B, INNER, UNITS, PLANES, CHOSEN, WARPS)
    rows = first + tl.arange(0, ROWS)
    before = tl.load(x + rows)
    products_a, products_b = _multiply_chosen(a, vector_a), _multiply_chosen(b, vector_b)
    tl.store(x + rows, before + tl.sum(products_a, 0) + tl.sum(products_b, 0))


def launch_contract_words(x: Tensor, mlp: Mlp, work: Scratch) -> None:
    """`contract` of experts.py, of 8 or 4 bits."""
    _, width, inner = mlp.down.shape
    tile = TILES["down", mlp.down.bits]
    rows = tile.rows(width, inner)
    run_kernel(
        _contract_words_kernel,
        (width // rows,),
        x,
        work.experts,
        work.weights,
        mlp.down.values,
        mlp.down.scales,
        work.activations,
        WIDTH=width,
        INNER=inner,
        UNITS=mlp.down.units,
        PLANES=mlp.down.planes,
        **piece_sizes(mlp.chosen * mlp.down.units, mlp.down.bits),
        CHOSEN=mlp.chosen,
        ROWS=rows,
        WARPS=tile.warps,
        **launch_options(x, tile.warps),
    )
