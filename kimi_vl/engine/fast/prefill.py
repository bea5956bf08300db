"""A prompt's tokens through the decoder, a chunk or its opening at a time, into the latent cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.chunk_attention import CHUNK, OPENING, attend_chunk
from kimi_vl.engine.fast.kernels.gated_product import is_fused, multiply_gated
from kimi_vl.engine.fast.kernels.operation import is_hopper
from kimi_vl.engine.fast.kernels.product import add_product, multiply
from kimi_vl.engine.fast.kernels.prompt import mix, rotate
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from kimi_vl.engine.fast.kernels.prompt_routing import TOKENS, arrange, choose
from kimi_vl.engine.fast.weights import Attention, Mlp, Weights


def prefill(weights: Weights, cache: Tensor, rotary: Tensor, x: Tensor, span: Tensor, context: int) -> Tensor:
    """Runs one chunk, or the opening, through the layers and writes its rows of the cache.

    In the last layer it stops there: whoever needs what follows the chunk needs that layer for one token only.

    Args:
        weights: of the model.
        cache: [layers, context, latent + rope], filled up to the chunk.
        rotary: [context, rope] float32, cosines then sines.
        x: [tokens, width], the chunk's embeddings, and anything in rows beyond its length; changed.
        span: [2] int32, the position of the chunk's first token, and its length.
        context: at least the sum of the two; keys and values are made for so many rows of the cache.
    Returns:
        The last token's hidden state [width] float32, before the last layer.
    """
    *layers, (last, _) = weights.layers
    for layer_cache, (attention, mlp) in zip(cache[:-1], layers, strict=True):
        _attend(x, attention, layer_cache, rotary, span, context)
        # what experts' products need takes most memory, and twice as much where they are not fused
        for part in x.split(OPENING if is_fused(mlp.shared_gate_up, x.device) else CHUNK):
            _transform(part, mlp, span)
    hidden = F.rms_norm(x, last.gain.shape, last.gain, last.eps)
    rotate(multiply(hidden, last.projections[-last.row :]), last, rotary, cache[-1], span)
    return x.index_select(0, span[1:] - 1)[0].float()


def _attend(x: Tensor, attention: Attention, cache: Tensor, rotary: Tensor, span: Tensor, context: int) -> None:
    """Adds to x [tokens, width] attention to the layer's cache, whose rows of the chunk are written."""
    projected = multiply(F.rms_norm(x, attention.gain.shape, attention.gain, attention.eps), attention.projections)
    rotate(projected, attention, rotary, cache, span)
    q, rows = projected[:, : -attention.row], cache[:context]
    if is_hopper(x.device) and len(x) % CHUNK == 0 and context % CHUNK == 0:
        attended = attend_chunk(q, rows, attention)
    else:
        attended = x.new_empty(len(x), attention.heads * attention.value)
        kv = F.linear(rows[:, : attention.latent], attention.kv_b)
        attend_prompt(q, kv, rows, attention, span, attended)
    add_product(x, attended, attention.out)


def _transform(x: Tensor, mlp: Mlp, span: Tensor) -> None:
    """Adds the experts' outputs to x [tokens, width]: a chunk, or a part of one that has no rows beyond its length."""
    hidden = F.rms_norm(x, mlp.gain.shape, mlp.gain, mlp.eps)
    shared = multiply(multiply_gated(hidden, mlp.shared_gate_up), mlp.shared_down)
    if not mlp.chosen:
        x += shared
        return
    length = len(x)
    # zeros, for compile_ahead's sake; and rows without a token are read, so that their sources must be some token's
    places, experts, sources = (torch.zeros(length, mlp.chosen, dtype=torch.int32, device=x.device) for _ in range(3))
    shares = torch.empty(length, mlp.chosen, device=x.device)
    counts = torch.empty(-(-length // TOKENS), len(mlp.router), dtype=torch.int32, device=x.device)
    choose(hidden, mlp, experts, shares, counts, span)
    ends = torch.zeros_like(counts[0])
    arrange(experts, counts, sources.view(-1), places, ends, span)
    inner = multiply_gated(hidden, mlp.gate_up, sources.view(-1), ends)
    mix(x, shared, multiply(inner, mlp.down, ends), places, shares, span)
