# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Causal attention of a piece of a prompt to itself and to all before it, without a mask or a score in memory.

Flash attention (Dao, arXiv 2307.08691) for heads whose key has two parts: 128 dimensions of its own, and 64 rotated
ones that all heads share and that are read straight from the latent cache. Where a piece has too few tokens to occupy
the GPU, the context is split into parts that are attended to at the same time.
"""

from functools import lru_cache
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.join import join
from kimi_vl.engine.fast.kernels.operation import LOG2_E, Operation, is_hopper, multiprocessors, run_kernel
from kimi_vl.engine.fast.weights import Attention

ROWS = 128  # queries in one program
KEYS = 64  # keys that it reads at once
STAGES = {True: 3, False: 2}  # of them on their way, by is_hopper: 172 KB of shared memory, or 90 KB
MOST_PARTS = 8  # of a context
STARTING = 256  # keys that a program could attend to in the time in which it starts and ends
ENOUGH = 1.125  # times as long as the quickest: fewer parts take less memory
LOWEST = -1e30  # finite, so that rows that see no key of a part weigh nothing instead of being no number


@triton.jit
def _attend_to(
    q_nope,
    q_rope,
    maximum,
    total,
    weighted,
    k,
    v,
    rope_keys,
    k_stride,
    v_stride,
    first,
    last,
    positions,
    scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROW: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    nope, rope, value = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        own = k + keys.to(tl.int64)[:, None] * k_stride + nope[None, :]
        values = v + keys.to(tl.int64)[:, None] * v_stride + value[None, :]
        shared = rope_keys + keys.to(tl.int64)[:, None] * ROW + rope[None, :]
        if MASKED:
            inside = (keys < last)[:, None]
            k_nope = tl.load(own, mask=inside, other=0.0)
            k_rope = tl.load(shared, mask=inside, other=0.0)
            mixed = tl.load(values, mask=inside, other=0.0)
        else:
            k_nope, k_rope, mixed = tl.load(own), tl.load(shared), tl.load(values)
        scores = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q_nope, tl.trans(k_nope)))
        if MASKED:
            scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(mixed.dtype), mixed, weighted * shrink[:, None])
        maximum = larger
    return maximum, total, weighted


@triton.jit(do_not_specialize=["TOKENS"])  # or a prompt of another length would wait for a compilation
def _attend_parts_kernel(
    q,
    k,
    v,
    rope_keys,
    parts,
    sums,
    span,
    TOKENS,
    stride,
    k_stride,
    v_stride,
    k_head_stride,
    v_head_stride,
    scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LOWEST: tl.constexpr,
    LN_2: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head, part = tl.program_id(1), tl.program_id(2)
    past, length = tl.load(span), tl.load(span + 1)
    if block * ROWS >= length:
        return
    tokens = block * ROWS + tl.arange(0, ROWS)
    nope, rope, value = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    inside = (tokens < length)[:, None]
    queries = q + tokens.to(tl.int64)[:, None] * stride + head * (NOPE + ROPE)
    q_nope = tl.load(queries + nope[None, :], mask=inside, other=0.0)
    q_rope = tl.load(queries + NOPE + rope[None, :], mask=inside, other=0.0)
    k += head * k_head_stride
    v += head * v_head_stride

    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, VALUE], tl.float32)
    positions = past + tokens
    end = past + tl.minimum((block + 1) * ROWS, length)
    share = tl.cdiv(tl.cdiv(end, KEYS), tl.num_programs(2)) * KEYS
    first, last = part * share, tl.minimum((part + 1) * share, end)
    seen_by_all = tl.minimum((past + block * ROWS) // KEYS * KEYS, last)
    seen_by_some = tl.maximum(first, seen_by_all)
    maximum, total, weighted = _attend_to(
        q_nope, q_rope, maximum, total, weighted, k, v, rope_keys, k_stride, v_stride, first, seen_by_all,
        positions, scale, NOPE, ROPE, VALUE, ROW, KEYS, False,
    )  # fmt: skip
    maximum, total, weighted = _attend_to(
        q_nope, q_rope, maximum, total, weighted, k, v, rope_keys, k_stride, v_stride, seen_by_some, last,
        positions, scale, NOPE, ROPE, VALUE, ROW, KEYS, True,
    )  # fmt: skip
    divisor = tl.where(total > 0, total, 1)
    mean = (weighted / divisor[:, None]).to(parts.dtype.element_ty)
    place = part.to(tl.int64) * TOKENS + tokens
    tl.store(parts + (place[:, None] * HEADS + head) * VALUE + value[None, :], mean, mask=inside)
    logarithms = tl.where(total > 0, maximum * LN_2 + tl.log(divisor), float("-inf"))
    tl.store(sums + (part * HEADS + head) * TOKENS + tokens, logarithms, mask=tokens < length)


def _launch_attend_parts(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, attention: Attention, span: Tensor, parts: Tensor, sums: Tensor
) -> None:
    run_kernel(
        _attend_parts_kernel,
        (triton.cdiv(len(q), ROWS), attention.heads, len(parts)),
        q,
        k,
        v,
        cache[:, attention.latent :],
        parts,
        sums,
        span,
        len(q),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k.stride(1),
        v.stride(1),
        attention.scale * LOG2_E,
        HEADS=attention.heads,
        NOPE=attention.nope,
        ROPE=attention.rope,
        VALUE=attention.value,
        ROW=cache.shape[1],
        ROWS=ROWS,
        KEYS=KEYS,
        LOWEST=LOWEST,
        LN_2=log(2),
        num_warps=8,
        num_stages=STAGES[is_hopper(q.device)],
    )


def attend_parts_reference(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, attention: Attention, span: Tensor, parts: Tensor, sums: Tensor
) -> None:
    """Attention of a piece's tokens to each part of the context up to themselves, to be joined by `join`.

    Every ROWS tokens have parts of their own, since they see as much of the context as the last of them does.

    Args:
        q: [tokens, heads * (nope + rope)], rotated; rows may be further apart than they are long.
        k: [context, heads, nope or more], kv_b_proj of the cached latents, at least to the end of the piece.
        v: [context, heads, value], the other part of the same.
        cache: [context, latent + rope], the layer's, for its rotated keys.
        attention: the layer's weights.
        span: of the piece, see kernels/prompt.py.
        parts: [parts, tokens, heads, value], written: the mean of a part's values, or 0 where a token sees none of it.
        sums: [parts, heads, tokens] float32, written: the logarithm of a part's sum of exp(score).
    """
    past, length = span.tolist()
    heads, q, cache = attention.heads, q[:length], cache[: past + length]
    k_nope, v = k[: len(cache), :, : attention.nope].float(), v[: len(cache)].float()
    k_rope = cache[:, None, attention.latent :].float().expand(-1, heads, -1)
    keys = torch.cat([k_nope, k_rope], 2)
    for start in range(0, length, ROWS):
        block = slice(start, min(start + ROWS, length))
        end = past + block.stop
        seen = torch.arange(end, device=q.device) <= torch.arange(past + start, end, device=q.device)[:, None]
        scores = torch.einsum("qhd,khd->hqk", q[block].float().unflatten(1, (heads, -1)), keys[:end]) * attention.scale
        scores = scores.where(seen, float("-inf"))
        share = triton.cdiv(triton.cdiv(end, KEYS), len(parts)) * KEYS
        for part in range(len(parts)):
            seen_keys = slice(part * share, (part + 1) * share)
            weights = scores[..., seen_keys].softmax(-1).nan_to_num(0)
            parts[part, block] = torch.einsum("hqk,khd->qhd", weights, v[:end][seen_keys])
            sums[part, :, block] = scores[..., seen_keys].logsumexp(-1)


attend_parts = Operation(_launch_attend_parts, attend_parts_reference)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, attention: Attention, span: Tensor) -> Tensor:
    """Attention of a piece's tokens to all of the context up to themselves: [tokens, heads * value].

    For the arguments see attend_parts_reference.
    """
    count = best_count(triton.cdiv(len(q), ROWS) * attention.heads, len(k) - len(q) // 2, multiprocessors(q.device))
    parts, sums = empty_parts(q, count, attention)
    attend_parts(q, k, v, cache, attention, span, parts, sums)
    if count > 1:
        join(parts[0], sums[0], parts[1:], sums[1:])
    return parts[0].flatten(1)


def empty_parts(q: Tensor, count: int, attention: Attention) -> tuple[Tensor, Tensor]:
    """Room for parts [count, tokens, heads, value], and the logarithms of their sums [count, heads, tokens] float32."""
    parts = q.new_empty(count, len(q), attention.heads, attention.value)
    return parts, torch.empty(count, attention.heads, len(q), device=q.device)


@lru_cache(maxsize=1)  # all layers ask the same
def best_count(programs: int, keys: int, at_a_time: int) -> int:
    """Into how many parts to split so many keys, where so many programs run at the same time."""

    def duration(count: int) -> int:
        in_turn = triton.cdiv(programs * count, at_a_time)
        return in_turn * (triton.cdiv(keys, count * KEYS) * KEYS + STARTING)

    durations = [duration(count) for count in range(1, MOST_PARTS + 1)]
    enough = min(durations) * ENOUGH
    return next(count for count, taken in enumerate(durations, 1) if taken <= enough)
