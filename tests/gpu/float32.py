"""The decoder once more, in plain float32, layer by layer, with experts that are given: what both engines are held to.

The formulas are those of DeepSeek-V2 (arXiv 2405.04434, section 2.1) and V3 (arXiv 2412.19437, equations 12 to 16),
not absorbed, and without a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.weights import Attention, Mlp, Weights

QUERIES = 2048  # whose scores are in memory at the same time: 4 GB for 32,768 keys


@torch.inference_mode()
def last_logits(weights: Weights, ids: Tensor, experts: list[Tensor]) -> Tensor:
    """Logits [vocabulary] after the last of ids [length]; experts: [length, chosen] of each layer that has a router."""
    x = weights.embeddings[ids].float()
    angles = weights.rotary(len(ids))
    remaining = iter(experts)
    for attention, mlp in weights.layers:
        x = x + _attend(_norm(x, attention.gain, attention.eps), attention, angles)
        x = x + _transform(_norm(x, mlp.gain, mlp.eps), mlp, next(remaining) if mlp.chosen else None)
    return _norm(x[-1], weights.gain, weights.eps) @ weights.head.float().T


def chosen_experts(hidden: Tensor, mlp: Mlp) -> Tensor:
    """The experts [tokens, chosen] that the router's rule gives for hidden [tokens, width]."""
    scores = (hidden.float() @ mlp.router.float().T).sigmoid()
    return (scores + mlp.bias).topk(mlp.chosen, sorted=False).indices


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Adjacent pairs of x [tokens, heads, rope]."""
    cosine, sine = angles[:, None].chunk(2, -1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


def _attend(hidden: Tensor, attention: Attention, angles: Tensor) -> Tensor:
    sizes = [attention.heads * (attention.nope + attention.rope), attention.latent, attention.rope]
    q, latent, k_rope = (hidden @ attention.projections.float().T).split(sizes, -1)
    q = q.unflatten(-1, (attention.heads, -1))
    kv = _norm(latent, attention.kv_gain, attention.kv_eps) @ attention.kv_b.float().T
    k, v = kv.unflatten(-1, (attention.heads, -1)).split([attention.nope, attention.value], -1)
    k_rope = _rotate(k_rope[:, None], angles).expand(-1, attention.heads, -1)
    q = torch.cat([q[..., : attention.nope], _rotate(q[..., attention.nope :], angles)], -1)
    mixed = _causal(q, torch.cat([k, k_rope], -1), v, attention.scale)
    return mixed.flatten(1) @ attention.out.float().T


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of each token to those up to itself, [tokens, heads, size]; some queries at a time, for the memory."""
    parts = []
    for start in range(0, len(q), QUERIES):
        end = min(start + QUERIES, len(q))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[:end]) * scale
        later = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill_(later, float("-inf")).softmax(-1), v[:end]))
    return torch.cat(parts)


def _transform(hidden: Tensor, mlp: Mlp, experts: Tensor | None) -> Tensor:
    gate, up = (hidden @ mlp.shared_gate_up.float().T).chunk(2, 1)
    out = (F.silu(gate) * up) @ mlp.shared_down.float().T
    if experts is None:
        return out
    scores = (hidden @ mlp.router.float().T).sigmoid().gather(1, experts)
    shares = scores / (scores.sum(1, keepdim=True) + 1e-20) * mlp.factor
    for expert in range(len(mlp.router)):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        gate, up = (hidden[tokens] @ mlp.gate_up[expert].float().T).chunk(2, 1)
        out.index_add_(0, tokens, (F.silu(gate) * up) @ mlp.down[expert].float().T * shares[tokens, slots, None])
    return out
