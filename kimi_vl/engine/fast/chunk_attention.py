"""Attention of a whole chunk of a long prompt, as squares that cuDNN computes faster than a kernel of ours.

cuDNN takes 50 ms to plan for each shape that it has not seen, so only three shapes are ever asked of it.
"""

import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.join import join
from kimi_vl.engine.fast.weights import Attention

CHUNK = 16384  # tokens
SEGMENT = 2 * CHUNK  # keys at once, as long as so many are left


def attend_chunk(q: Tensor, rows: Tensor, attention: Attention, out: Tensor) -> None:
    """Attention of the last CHUNK tokens of a context of whole chunks to all of it up to themselves.

    Args:
        q: [CHUNK, heads * (nope + rope)], rotated.
        rows: [context, latent + rope], of the latent cache.
        attention: the layer's weights.
        out: [CHUNK, heads * value], written.
    """
    past = len(rows) - CHUNK
    spans = [(start, min(start + SEGMENT, past)) for start in range(0, past, SEGMENT)]
    results = [_attend(q, rows[start:end], attention, False) for start, end in spans]
    results.append(_attend(q, rows[past:], attention, True))
    parts, sums = zip(*results, strict=True)
    join(torch.stack(parts), torch.stack(sums), out)


def _attend(q: Tensor, rows: Tensor, attention: Attention, causal: bool) -> tuple[Tensor, Tensor]:
    """[tokens, heads, value], and [heads, tokens] float32: the logarithm of the sum of exp(score)."""
    heads, nope = attention.heads, attention.nope
    k, v = q.new_empty(len(rows), heads, nope + attention.rope), q.new_empty(len(rows), heads, attention.value)
    latents = rows[None, :, : attention.latent].expand(heads, -1, -1)
    by_head = attention.kv_b.view(heads, -1, attention.latent).mT
    torch.bmm(latents, by_head[..., :nope], out=k[..., :nope].transpose(0, 1))
    torch.bmm(latents, by_head[..., nope:], out=v.transpose(0, 1))
    k[..., nope:] = rows[:, None, attention.latent :]
    # scaled_dot_product_attention itself does not give these sums away
    mixed, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(t.transpose(0, 1)[None] for t in (q.unflatten(1, (heads, -1)), k, v)),
        None,
        True,
        0.0,
        causal,
        False,
        scale=attention.scale,
    )
    return mixed[0].transpose(0, 1), sums[0, ..., 0]
