# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Causal attention of a chunk of a prompt to itself and to all before it, without a mask or a score in memory.

Flash attention (Dao, arXiv 2307.08691) for heads whose key has two parts: 128 dimensions of its own, and 64 rotated
ones that all heads share and that are read straight from the latent cache.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import LOG2_E, Operation, is_hopper, run_kernel
from kimi_vl.engine.fast.weights import Attention

ROWS = 128  # queries in one program
KEYS = 64  # keys that it reads at once
STAGES = {True: 3, False: 2}  # of them on their way, by is_hopper: 172 KB of shared memory, or 90 KB


@triton.jit
def _attend_to(
    q_nope,
    q_rope,
    maximum,
    total,
    weighted,
    kv,
    rope_keys,
    first,
    last,
    positions,
    scale,
    HEADS: tl.constexpr,
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
        rows = kv + keys.to(tl.int64)[:, None] * (HEADS * (NOPE + VALUE))
        shared = rope_keys + keys.to(tl.int64)[:, None] * ROW + rope[None, :]
        if MASKED:
            inside = (keys < last)[:, None]
            k_nope = tl.load(rows + nope[None, :], mask=inside, other=0.0)
            k_rope = tl.load(shared, mask=inside, other=0.0)
            v = tl.load(rows + NOPE + value[None, :], mask=inside, other=0.0)
        else:
            k_nope, k_rope = tl.load(rows + nope[None, :]), tl.load(shared)
            v = tl.load(rows + NOPE + value[None, :])
        scores = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q_nope, tl.trans(k_nope)))
        if MASKED:
            scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * shrink[:, None])
        maximum = larger
    return maximum, total, weighted


@triton.jit
def _attend_prompt_kernel(
    q,
    kv,
    rope_keys,
    out,
    span,
    stride,
    scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    past, length = tl.load(span), tl.load(span + 1)
    if block * ROWS >= length:
        return
    tokens = block * ROWS + tl.arange(0, ROWS)
    nope, rope, value = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    inside = (tokens < length)[:, None]
    queries = q + tokens.to(tl.int64)[:, None] * stride + head * (NOPE + ROPE)
    q_nope = tl.load(queries + nope[None, :], mask=inside, other=0.0)
    q_rope = tl.load(queries + NOPE + rope[None, :], mask=inside, other=0.0)
    head_kv = kv + head * (NOPE + VALUE)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, VALUE], tl.float32)
    positions = past + tokens
    seen_by_all = (past + block * ROWS) // KEYS * KEYS
    end = past + tl.minimum((block + 1) * ROWS, length)
    maximum, total, weighted = _attend_to(
        q_nope, q_rope, maximum, total, weighted, head_kv, rope_keys, 0, seen_by_all, positions, scale,
        HEADS, NOPE, ROPE, VALUE, ROW, KEYS, False,
    )  # fmt: skip
    maximum, total, weighted = _attend_to(
        q_nope, q_rope, maximum, total, weighted, head_kv, rope_keys, seen_by_all, end, positions, scale,
        HEADS, NOPE, ROPE, VALUE, ROW, KEYS, True,
    )  # fmt: skip
    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (tokens.to(tl.int64)[:, None] * HEADS + head) * VALUE + value[None, :], result, mask=inside)


def _launch_attend_prompt(
    q: Tensor, kv: Tensor, cache: Tensor, attention: Attention, span: Tensor, out: Tensor
) -> None:
    run_kernel(
        _attend_prompt_kernel,
        (triton.cdiv(len(q), ROWS), attention.heads),
        q,
        kv,
        cache[:, attention.latent :],
        out,
        span,
        q.stride(0),
        attention.scale * LOG2_E,
        HEADS=attention.heads,
        NOPE=attention.nope,
        ROPE=attention.rope,
        VALUE=attention.value,
        ROW=cache.shape[1],
        ROWS=ROWS,
        KEYS=KEYS,
        num_warps=8,
        num_stages=STAGES[is_hopper(q.device)],
    )


def attend_prompt_reference(
    q: Tensor, kv: Tensor, cache: Tensor, attention: Attention, span: Tensor, out: Tensor
) -> None:
    """Attention of a chunk's tokens to all of the context up to themselves.

    Args:
        q: [tokens, heads * (nope + rope)], rotated; rows may be further apart than they are long.
        kv: [context, heads * (nope + value)], kv_b_proj of the cached latents, at least to the end of the chunk.
        cache: [context, latent + rope], the layer's, for its rotated keys.
        attention: the layer's weights.
        span: of the chunk, see kernels/prompt.py.
        out: [tokens, heads * value], written.
    """
    past, length = span.tolist()
    heads, q, kv, cache = attention.heads, q[:length], kv[: past + length], cache[: past + length]
    k_nope, v = kv.view(len(kv), heads, -1).split([attention.nope, attention.value], 2)
    k_rope = cache[:, None, attention.latent :].expand(-1, heads, -1)
    k = torch.cat([k_nope, k_rope], 2)
    allowed = torch.ones(length, len(kv), dtype=torch.bool, device=q.device).tril(past)
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q.unflatten(1, (heads, -1)), k, v))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, scale=attention.scale)
    out[:length] = mixed[0].transpose(0, 1).flatten(1)


attend_prompt = Operation(_launch_attend_prompt, attend_prompt_reference)
