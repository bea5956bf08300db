# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Decoding attention over the latent cache: `attend` splits the cache over the GPU, `merge` joins the splits.

kv_b_proj's value half is applied afterwards by `project_up`, once, to the weighted mean of the latents. All sizes of a
head are powers of two; for the query see latent_query.py.
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
from kimi_vl.engine.fast.kernels.weight import dot_rows, piece_sizes
from kimi_vl.engine.fast.weights import Attention

SPLITS = 132  # parts of the cache that are attended to at the same time: one for each multiprocessor of an H100
TOKENS = 32  # cached tokens in a tile
AHEAD = slice(16, 64)  # of a split's tokens, asked for before their query is there: the fastest tried on an H100
STAGES = {True: 4, False: 2}  # tiles on their way, by is_hopper: 130 KB of shared memory, or 56 KB
WARPS = 4
MERGE_COLUMNS, MERGE_WARPS = 16, 1  # latent columns in one program of `merge`: small ones leave room for what follows
VALUE_ROWS, VALUE_WARPS = 16, 8  # value rows in one program of `project_up`


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
    o_proj,
    scale,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SKIPPED: tl.constexpr,
    AHEAD: tl.constexpr,
    SHARE: tl.constexpr,
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
        begin, end = first + SKIPPED, tl.minimum(first + AHEAD, last)
        if first >= last:  # idle while the others attend
            share_bytes: tl.constexpr = SHARE * o_proj.dtype.element_ty.primitive_bitwidth // 8
            prefetch(o_proj + split * SHARE, share_bytes)
        elif begin < end:
            row_bytes: tl.constexpr = width * cache.dtype.element_ty.primitive_bitwidth // 8
            prefetch(cache + begin.to(tl.int64) * width, (end - begin) * row_bytes)
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


def _launch_attend(
    query: Tensor, cache: Tensor, position: Tensor, parts: Tensor, sums: Tensor, attention: Attention
) -> None:
    splits, heads, latent = parts.shape
    o_proj = attention.out.values
    run_kernel(
        _attend_kernel,
        (splits,),
        query,
        cache,
        position,
        parts,
        sums,
        o_proj,
        attention.scale * LOG2_E,
        HEADS=heads,
        HEADS_BLOCK=max(16, triton.next_power_of_2(heads)),
        LATENT=latent,
        ROPE=query.shape[1] - latent,
        TOKENS=TOKENS,
        SPLITS=splits,
        SKIPPED=AHEAD.start,
        AHEAD=AHEAD.stop,
        SHARE=o_proj.numel() // splits // 8 * 8,  # of 16 or 32 bits, so that bytes are a multiple of 16
        num_stages=STAGES[is_hopper(query.device)],
        **launch_options(query, WARPS),
    )


def attend_reference(
    query: Tensor, cache: Tensor, position: Tensor, parts: Tensor, sums: Tensor, attention: Attention
) -> None:
    """Attention of the query to each split of the cache, to be joined by `merge`. Unused splits are left as they are.

    Args:
        query: [heads, latent + rope].
        cache: [context, latent + rope]; rows 0 to position, both included, are attended to.
        position: [1] int32.
        parts: [splits, heads, latent] of the cache's type, written: the weighted mean of a split's latents.
        sums: [splits, heads] float32, written: the base-2 logarithm of a split's sum of exp(score).
        attention: the layer's weights.
    """
    length = int(position) + 1
    splits, _, latent = parts.shape
    for split, first in enumerate(range(0, length, _share(length, splits))):
        rows = cache[first : min(first + _share(length, splits), length)].float()
        scores = query.float() @ rows.T * attention.scale
        parts[split] = scores.softmax(1) @ rows[:, :latent]
        sums[split] = scores.logsumexp(1) * LOG2_E


def _share(length: int, splits: int) -> int:
    return triton.cdiv(triton.cdiv(length, TOKENS), splits) * TOKENS


attend = Operation(_launch_attend, attend_reference)


@triton.jit
def _load_splits(parts, sums, head, splits, used, columns, HEADS: tl.constexpr, LATENT: tl.constexpr):
    """One head's latents of some splits [splits, columns], and their logarithms [splits]; of unused ones 0 and -inf."""
    places = splits * HEADS + head
    inside = splits < used
    part = tl.load(parts + places[:, None] * LATENT + columns[None, :], mask=inside[:, None], other=0.0)
    return part, tl.load(sums + places, mask=inside, other=float("-inf"))


@triton.jit
def _merge_kernel(
    parts,
    sums,
    position_pointer,
    latents,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    head = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    position = tl.load(position_pointer)  # `attend`, which released nothing, has ended: only its results may be late
    used = position // _tokens_per_split(position, TOKENS, SPLITS) + 1
    wait_for_previous(PDL)
    part_a, logarithms_a = _load_splits(parts, sums, head, tl.arange(0, A), used, columns, HEADS, LATENT)
    part_b, logarithms_b = _load_splits(parts, sums, head, A + tl.arange(0, B), used, columns, HEADS, LATENT)
    largest = tl.maximum(tl.max(logarithms_a), tl.max(logarithms_b))
    shares_a, shares_b = tl.exp2(logarithms_a - largest), tl.exp2(logarithms_b - largest)
    mixed = tl.sum(part_a.to(tl.float32) * shares_a[:, None], 0) + tl.sum(part_b.to(tl.float32) * shares_b[:, None], 0)
    mean = mixed / (tl.sum(shares_a) + tl.sum(shares_b))
    tl.store(latents + head * LATENT + columns, mean.to(latents.dtype.element_ty))


def _launch_merge(parts: Tensor, sums: Tensor, position: Tensor, latents: Tensor) -> None:
    splits, heads, latent = parts.shape
    run_kernel(
        _merge_kernel,
        (heads, latent // MERGE_COLUMNS),
        parts,
        sums,
        position,
        latents,
        HEADS=heads,
        LATENT=latent,
        TOKENS=TOKENS,
        SPLITS=splits,
        **piece_sizes(splits, 16),
        COLUMNS=MERGE_COLUMNS,
        **launch_options(parts, MERGE_WARPS),
    )


def merge_reference(parts: Tensor, sums: Tensor, position: Tensor, latents: Tensor) -> None:
    """Joins what `attend` wrote.

    Args:
        parts, sums: of `attend`.
        position: [1] int32.
        latents: [heads, latent] of the weights' type, written: the weighted mean of all cached latents.
    """
    length = int(position) + 1
    used = triton.cdiv(length, _share(length, len(parts)))
    shares = torch.softmax(sums[:used] / LOG2_E, 0)
    latents.copy_((parts[:used].float() * shares[..., None]).sum(0))


merge = Operation(_launch_merge, merge_reference)


@triton.jit
def _project_up_kernel(
    latents,
    kv_b,
    out,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    head = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, LATENT)
    values = tl.load(kv_b + (head * (NOPE + VALUE) + NOPE + rows)[:, None] * LATENT + columns[None, :])
    wait_for_previous(PDL)
    latent = tl.load(latents + head * LATENT + columns)
    tl.store(out + head * VALUE + rows, dot_rows(values, latent).to(out.dtype.element_ty))


def _launch_project_up(latents: Tensor, attention: Attention, out: Tensor) -> None:
    run_kernel(
        _project_up_kernel,
        (attention.heads, attention.value // VALUE_ROWS),
        latents,
        attention.kv_b,
        out,
        NOPE=attention.nope,
        VALUE=attention.value,
        LATENT=attention.latent,
        ROWS=VALUE_ROWS,
        **launch_options(latents, VALUE_WARPS),
    )


def project_up_reference(latents: Tensor, attention: Attention, out: Tensor) -> None:
    """Applies kv_b_proj's value half.

    Args:
        latents: [heads, latent], of `merge`.
        attention: the layer's weights.
        out: [heads * value] of the weights' type, written: what o_proj takes.
    """
    values = attention.kv_b.view(attention.heads, -1, attention.latent)[:, attention.nope :].float()
    out.copy_(torch.einsum("hl,hvl->hv", latents.float(), values).flatten())


project_up = Operation(_launch_project_up, project_up_reference)
