"""Attention of a whole chunk of a long prompt, as squares that cuDNN computes faster than a kernel of ours.

cuDNN takes 50 ms to plan for each shape that it has not seen, so only four shapes are ever asked of it.
"""

import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.join import empty_parts, join
from kimi_vl.engine.fast.weights import Attention

CHUNK = 16384  # tokens
OPENING = 2 * CHUNK  # tokens that a long prompt begins with at once: what precedes its second half is not made again
SEGMENT = 2 * CHUNK  # keys at once, as long as so many are left
QUERIES = CHUNK // 2  # at once: a little faster than all of them
# Tokens and contexts of attend_chunk that between them ask for all four.
PLANNED = ((CHUNK, CHUNK), (OPENING, OPENING), (CHUNK, 2 * CHUNK), (CHUNK, 3 * CHUNK))


def attend_chunk(q: Tensor, rows: Tensor, attention: Attention) -> Tensor:
    """Attention of the last tokens of a context to all of it up to themselves: [tokens, heads * value].

    Args:
        q: [tokens, heads * (nope + rope)], rotated: of CHUNK tokens, or of OPENING ones that nothing precedes.
        rows: [context, latent + rope], of the latent cache, of whole chunks.
        attention: the layer's weights.
    """
    past, heads = len(rows) - len(q), attention.heads
    spans = [(start, min(start + SEGMENT, past)) for start in range(0, past, SEGMENT)]
    if not spans:
        return _attend(q, *_keys_and_values(rows, attention), attention, causal=True)[0].flatten(1)
    out = q.new_empty(len(q), heads * attention.value)
    parts, sums = empty_parts(out, len(spans) + 1, heads)
    for (start, end), part, sums_of_part in zip(spans, parts[:-1], sums[:-1], strict=True):
        k, v = _keys_and_values(rows[start:end], attention)
        for first in range(0, len(q), QUERIES):
            block = slice(first, first + QUERIES)
            part[block], sums_of_part[:, block] = _attend(q[block], k, v, attention, causal=False)
        del k, v  # before the next ones are made
    parts[-1], sums[-1] = _attend(q, *_keys_and_values(rows[past:], attention), attention, causal=True)
    join(parts, sums, out)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention, causal: bool) -> tuple[Tensor, Tensor]:
    """[tokens, heads, value], and the logarithms of the sums of exp(score) [heads, tokens] float32."""
    # scaled_dot_product_attention itself does not give the logarithms away
    mixed, logarithms, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(t.transpose(0, 1)[None] for t in (q.unflatten(1, (attention.heads, -1)), k, v)),
        attn_bias=None,
        compute_log_sumexp=True,
        is_causal=causal,
        scale=attention.scale,
    )
    return mixed[0].transpose(0, 1), logarithms[0, ..., 0]


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
