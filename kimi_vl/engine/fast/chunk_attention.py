"""Attention of a whole chunk of a long prompt, as squares that cuDNN computes faster than a kernel of ours.

cuDNN takes 50 ms to plan for each shape that it has not seen, so only three shapes are ever asked of it.
"""

import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.join import empty_parts, join
from kimi_vl.engine.fast.weights import Attention

CHUNK = 16384  # tokens
SEGMENT = 2 * CHUNK  # keys at once, as long as so many are left
QUERIES = CHUNK // 2  # at once: a little faster than all of them


def attend_chunk(q: Tensor, rows: Tensor, attention: Attention, out: Tensor) -> None:
    """Attention of the last CHUNK tokens of a context of whole chunks to all of it up to themselves.

    Args:
        q: [CHUNK, heads * (nope + rope)], rotated.
        rows: [context, latent + rope], of the latent cache.
        attention: the layer's weights.
        out: [CHUNK, heads * value], written.
    """
    past = len(rows) - CHUNK
    spans = [(start, min(start + SEGMENT, past)) for start in range(0, past, SEGMENT)] + [(past, len(rows))]
    parts, sums = empty_parts(out, len(spans), attention.heads)
    for (start, end), part, sums_of_part in zip(spans, parts, sums, strict=True):
        k, v = _keys_and_values(rows[start:end], attention)
        causal = start == past
        size = CHUNK if causal else QUERIES
        for first in range(0, CHUNK, size):
            block = slice(first, first + size)
            # scaled_dot_product_attention itself does not give the logarithms of the sums of exp(score) away
            mixed, logarithms, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(_heads_first(t) for t in (q[block].unflatten(1, (attention.heads, -1)), k, v)),
                attn_bias=None,
                compute_log_sumexp=True,
                is_causal=causal,
                scale=attention.scale,
            )
            part[block] = mixed[0].transpose(0, 1)
            sums_of_part[:, block] = logarithms[0, ..., 0]
    if len(spans) > 1:
        join(parts, sums, out)


def _keys_and_values(rows: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """[tokens, heads, nope + rope] and [tokens, heads, value], made without copies."""
    heads, nope = attention.heads, attention.nope
    k, v = rows.new_empty(len(rows), heads, nope + attention.rope), rows.new_empty(len(rows), heads, attention.value)
    latents = rows[None, :, : attention.latent].expand(heads, -1, -1)
    by_head = attention.kv_b.view(heads, -1, attention.latent).mT
    torch.bmm(latents, by_head[..., :nope], out=k[..., :nope].transpose(0, 1))
    torch.bmm(latents, by_head[..., nope:], out=v.transpose(0, 1))
    eight = torch.complex128  # as large as 8 numbers of 16 bits: a copy goes element by element
    k.view(eight)[..., nope // 8 :] = rows.view(eight)[:, None, attention.latent // 8 :]
    return k, v


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, size] → [1, heads, tokens, size]."""
    return x.transpose(0, 1)[None]
