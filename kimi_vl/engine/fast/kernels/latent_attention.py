# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Decoding attention over the latent cache: `attend` splits the cache over the GPU, `merge` joins the splits.

kv_b_proj's value half is applied in `merge`, once, to the weighted sum of the latents. All sizes of a head are powers
of two; for the query see latent_query.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import (
    LOG2_E,
    Operation,
    is_hopper,
    launch_options,
    prefetch,
    release_next,
    run_kernel,
    wait_for_previous,
)
from kimi_vl.engine.fast.kernels.weight import dot_rows
from kimi_vl.engine.fast.weights import Attention

SPLITS = 128  # parts of the cache that are attended to at the same time: about one for each multiprocessor
TOKENS = 64  # cached tokens in a tile
AHEAD = slice(16, 64)  # of a split's tokens, asked for before their query is there: the fastest tried on an H100
STAGES = {True: 3, False: 2}  # tiles on their way, by is_hopper: 168 KB of shared memory, or 94 KB
MERGE_ROWS = 16  # value rows in one program of `merge`
MERGE_SPLITS = 32  # splits that `merge` reads at once
WARPS = 4


@triton.jit
def _tokens_per_split(position, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """How many of the position + 1 cached tokens each split has: whole tiles, spread evenly."""
    tiles = position // TOKENS + 1
    return (tiles + SPLITS - 1) // SPLITS * TOKENS


@triton.jit
def _tokens_of_split(position, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """Where a split begins and ends; without tokens its end is not after its beginning."""
    share = _tokens_per_split(position, TOKENS, SPLITS)
    return split * share, tl.minimum((split + 1) * share, position + 1)


@triton.jit
def _attend_kernel(
    query,
    cache,
    position_pointer,
    parts,
    sums,
    scale,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SKIPPED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    # The next kernel is not released: its programs would crowd out some of these, which need a multiprocessor each.
    split = tl.program_id(0)
    heads = tl.arange(0, HEADS_BLOCK)
    columns = tl.arange(0, LATENT)
    rope_columns = LATENT + tl.arange(0, ROPE)
    width: tl.constexpr = LATENT + ROPE
    known = heads < HEADS
    if PDL:
        # a guess, since the kernels before may be at work; read in another way, it is not taken for what is read below
        guess = tl.load(position_pointer, cache_modifier=".cg")
        first, last = _tokens_of_split(guess, split, TOKENS, SPLITS)
        first, last = first + SKIPPED, tl.minimum(first + AHEAD, last)
        if first < last:
            row_bytes: tl.constexpr = width * cache.dtype.element_ty.primitive_bitwidth // 8
            prefetch(cache + first.to(tl.int64) * width, (last - first) * row_bytes)
    wait_for_previous(PDL)
    first, last = _tokens_of_split(tl.load(position_pointer), split, TOKENS, SPLITS)
    if first < last:
        q_latent = tl.load(query + heads[:, None] * width + columns[None, :], mask=known[:, None], other=0.0)
        q_rope = tl.load(query + heads[:, None] * width + rope_columns[None, :], mask=known[:, None], other=0.0)
        maximum = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([HEADS_BLOCK], tl.float32)
        weighted = tl.zeros([HEADS_BLOCK, LATENT], tl.float32)
        for start in range(first, last, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            rows = cache + tokens.to(tl.int64)[:, None] * width
            inside = (tokens < last)[:, None]
            latent = tl.load(rows + columns[None, :], mask=inside, other=0.0)
            rope = tl.load(rows + rope_columns[None, :], mask=inside, other=0.0)
            scores = tl.dot(q_latent, tl.trans(latent)) + tl.dot(q_rope, tl.trans(rope))
            scores = tl.where((tokens < last)[None, :], scores * scale, float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, 1))
            shrink = tl.exp2(maximum - larger)
            weights = tl.exp2(scores - larger[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weighted = weighted * shrink[:, None] + tl.dot(weights.to(latent.dtype), latent)
            maximum = larger
        place = split * HEADS + heads
        part = (weighted / total[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + place[:, None] * LATENT + columns[None, :], part, mask=known[:, None])
        tl.store(sums + place, maximum + tl.log2(total), mask=known)


def _launch_attend(query: Tensor, cache: Tensor, position: Tensor, parts: Tensor, sums: Tensor, scale: float) -> None:
    splits, heads, latent = parts.shape
    run_kernel(
        _attend_kernel,
        (splits,),
        query,
        cache,
        position,
        parts,
        sums,
        scale * LOG2_E,
        HEADS=heads,
        HEADS_BLOCK=max(16, triton.next_power_of_2(heads)),
        LATENT=latent,
        ROPE=query.shape[1] - latent,
        TOKENS=TOKENS,
        SPLITS=splits,
        SKIPPED=AHEAD.start,
        AHEAD=AHEAD.stop,
        num_stages=STAGES[is_hopper(query.device)],
        **launch_options(query, WARPS),
    )


def attend_reference(query: Tensor, cache: Tensor, position: Tensor, parts: Tensor, sums: Tensor, scale: float) -> None:
    """Attention of the query to each split of the cache, to be joined by `merge`. Unused splits are left as they are.

    Args:
        query: [heads, latent + rope].
        cache: [context, latent + rope]; rows 0 to position, both included, are attended to.
        position: [1] int32.
        parts: [splits, heads, latent] of the cache's type, written: the weighted mean of a split's latents.
        sums: [splits, heads] float32, written: the base-2 logarithm of a split's sum of exp(score).
        scale: of the scores.
    """
    length = int(position) + 1
    splits, _, latent = parts.shape
    for split, first in enumerate(range(0, length, _share(length, splits))):
        rows = cache[first : min(first + _share(length, splits), length)].float()
        scores = query.float() @ rows.T * scale
        parts[split] = scores.softmax(1) @ rows[:, :latent]
        sums[split] = scores.logsumexp(1) * LOG2_E


def _share(length: int, splits: int) -> int:
    return triton.cdiv(triton.cdiv(length, TOKENS), splits) * TOKENS


attend = Operation(_launch_attend, attend_reference)


@triton.jit
def _load_parts(parts, head, group, used, columns, HEADS: tl.constexpr, LATENT: tl.constexpr):
    """One head's latents of some splits [splits, LATENT] in float32, zero for those that are not used."""
    places = (group * HEADS + head)[:, None] * LATENT + columns[None, :]
    return tl.load(parts + places, mask=(group < used)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _merge_kernel(
    parts,
    sums,
    kv_b,
    position_pointer,
    out,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    head = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, LATENT)
    values = tl.load(kv_b + (head * (NOPE + VALUE) + NOPE + rows)[:, None] * LATENT + columns[None, :])
    position = tl.load(position_pointer)  # `attend`, which released nothing, has ended: only its results may be late
    used = position // _tokens_per_split(position, TOKENS, SPLITS) + 1
    splits = tl.arange(0, SPLITS_BLOCK)
    group = tl.arange(0, GROUP)
    wait_for_previous(PDL)
    # what most contexts need is all asked for at once
    every = tl.load(sums + splits * HEADS + head, mask=splits < used, other=float("-inf"))
    own = tl.load(sums + group * HEADS + head, mask=group < used, other=float("-inf"))
    part = _load_parts(parts, head, group, used, columns, HEADS, LATENT)
    largest = tl.max(every)
    total = tl.sum(tl.exp2(every - largest))
    mixed = part * tl.exp2(own - largest)[:, None]
    for start in range(GROUP, used, GROUP):
        group = start + tl.arange(0, GROUP)
        own = tl.load(sums + group * HEADS + head, mask=group < used, other=float("-inf"))
        part = _load_parts(parts, head, group, used, columns, HEADS, LATENT)
        mixed += part * tl.exp2(own - largest)[:, None]
    latent = (tl.sum(mixed, 0) / total).to(values.dtype)  # summed over the warps only here
    tl.store(out + head * VALUE + rows, dot_rows(values, latent).to(out.dtype.element_ty))


def _launch_merge(parts: Tensor, sums: Tensor, attention: Attention, position: Tensor, out: Tensor) -> None:
    splits, heads, latent = parts.shape
    run_kernel(
        _merge_kernel,
        (heads, attention.value // MERGE_ROWS),
        parts,
        sums,
        attention.kv_b,
        position,
        out,
        HEADS=heads,
        NOPE=attention.nope,
        VALUE=attention.value,
        LATENT=latent,
        TOKENS=TOKENS,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        GROUP=MERGE_SPLITS,
        ROWS=MERGE_ROWS,
        **launch_options(parts, WARPS),
    )


def merge_reference(parts: Tensor, sums: Tensor, attention: Attention, position: Tensor, out: Tensor) -> None:
    """Joins what `attend` wrote and applies kv_b_proj's value half.

    Args:
        parts, sums: of `attend`.
        attention: the layer's weights.
        position: [1] int32.
        out: [heads * value] of the weights' type, written: what o_proj takes.
    """
    splits, heads, latent = parts.shape
    length = int(position) + 1
    used = triton.cdiv(length, _share(length, splits))
    shares = torch.softmax(sums[:used] / LOG2_E, 0)
    mixed = (parts[:used].float() * shares[..., None]).sum(0)
    values = attention.kv_b.view(heads, -1, latent)[:, attention.nope :].float()
    out.copy_(torch.einsum("hl,hvl->hv", mixed.to(out.dtype).float(), values).flatten())


merge = Operation(_launch_merge, merge_reference)
