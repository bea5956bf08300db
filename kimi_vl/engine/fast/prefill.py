"""A prompt's tokens through the decoder, a chunk at a time, into the latent cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.kernels.prompt import gate, mix, rotate
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from kimi_vl.engine.fast.kernels.routing import choose_experts
from kimi_vl.engine.fast.weights import Attention, Mlp, Weights

CHUNK = 8192  # tokens: enough to fill a GPU, 0.8 GB of activations at full size


def prefill(weights: Weights, cache: Tensor, rotary: Tensor, x: Tensor, start: int) -> Tensor:
    """Runs one chunk through all layers and writes its rows of the cache.

    Args:
        weights: of the model.
        cache: [layers, context, latent + rope], filled up to `start`.
        rotary: [context, rope] float32, cosines then sines.
        x: [tokens, width], the chunk's embeddings; changed.
        start: the position of the chunk's first token.
    Returns:
        The last token's hidden state [width] float32, before the last norm.
    """
    end = start + len(x)
    for layer_cache, (attention, mlp) in zip(cache, weights.layers, strict=True):
        x = _attend(x, attention, layer_cache[:end], rotary[start:end])
        _transform(x, mlp)
    return x[-1].float()


def _attend(x: Tensor, attention: Attention, rows: Tensor, rotary: Tensor) -> Tensor:
    """x [tokens, width] plus attention to `rows` [context, latent + rope], the last of which are written."""
    hidden = F.rms_norm(x, attention.gain.shape, attention.gain, attention.eps)
    q = F.linear(hidden, attention.q)
    rotate(q, F.linear(hidden, attention.kv_a), attention, rotary, rows[-len(x) :])
    kv = F.linear(rows[:, : attention.latent], attention.kv_b)
    attended = q.new_empty(len(x), attention.heads * attention.value)
    attend_prompt(q, kv, rows, attention, attended)
    return torch.addmm(x, attended, attention.out.T)


def _transform(x: Tensor, mlp: Mlp) -> None:
    """Adds the experts' outputs to x [tokens, width]."""
    hidden = F.rms_norm(x, mlp.gain.shape, mlp.gain, mlp.eps)
    shared = hidden.new_empty(len(x), mlp.shared_gate.shape[0])
    gate(F.linear(hidden, mlp.shared_gate), F.linear(hidden, mlp.shared_up), shared)
    shared = F.linear(shared, mlp.shared_down)
    if not mlp.chosen:
        x += shared
        return
    experts, weights = choose_experts(hidden, mlp)
    by_expert, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(len(mlp.router), device=x.device), right=True, out_int32=True)
    both = F.grouped_mm(hidden[order // mlp.chosen], mlp.gate_up.mT, offs=ends)
    inner = both.new_empty(len(both), both.shape[1] // 2)
    gate(both[:, : inner.shape[1]], both[:, inner.shape[1] :], inner)
    outputs = F.grouped_mm(inner, mlp.down.mT, offs=ends)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    mix(x, shared, outputs, places.view(-1, mlp.chosen), weights)
