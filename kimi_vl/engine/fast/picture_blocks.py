"""MoonViT's transformer blocks over one picture: eight launches a block, captured in CUDA graphs for most pictures.

Launching them one by one takes longer than the work on a picture of a megapixel. A graph has a fixed number of patches;
a picture takes the smallest that it fits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.kernels.picture import add_norm, rotate_patches
from kimi_vl.engine.fast.kernels.picture_attention import attend_picture, padded
from kimi_vl.engine.fast.weights import stack

# The steps are small where pictures are that were scaled down to an in_token_limit of 4096 and padded to 2x2 blocks.
SIZES = (256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 3840, 3968, 4032, 4096, 4160, 4224, 4352)


@dataclass(frozen=True)
class _Inputs:
    """What the blocks take of some patches."""

    x: Tensor  # [patches, width], embedded
    positions: Tensor  # [patches, width] float32, added to them
    cosines: Tensor  # [patches, size / 2] float32
    sines: Tensor  # [patches, size / 2] float32
    length: Tensor  # [1] int32, how many of them there are; the rest is of no account

    def first(self, count: int) -> "_Inputs":
        return _Inputs(self.x[:count], self.positions[:count], self.cosines[:count], self.sines[:count], self.length)


class Blocks:
    """The tower's blocks and the norm after the last."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._joined = [_join_qkv(layer.attn) for layer in tower.layers]
        self._graphs: list[tuple[torch.cuda.CUDAGraph, _Inputs, Tensor]] = []
        weight = self._joined[0][0]
        width, half = weight.shape[1], weight.shape[0] // 3 // tower.layers[0].attn.num_heads // 2
        self._inputs = _Inputs(
            weight.new_zeros(SIZES[-1], width),
            torch.zeros(SIZES[-1], width, device=weight.device),
            torch.zeros(SIZES[-1], half, device=weight.device),
            torch.zeros(SIZES[-1], half, device=weight.device),
            torch.ones(1, dtype=torch.int32, device=weight.device),
        )

    def example(self) -> Tensor:
        """What launches all kernels."""
        return self._run(self._inputs.first(SIZES[0]))

    def capture(self) -> None:
        """Captures each of SIZES."""
        pool = torch.cuda.graph_pool_handle()
        self.example()  # some libraries set themselves up
        for size in SIZES:
            part, graph = self._inputs.first(size), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self._run(part)
            self._graphs.append((graph, part, hidden))

    def __call__(self, x: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """
        Args:
            x: [patches, width], embedded patches; changed.
            positions: [patches, width] float32, added to them.
            cosines, sines: [patches, size / 2] float32, of their angles.
        Returns:
            [patches, width], to be used before the next call.
        """
        count = len(x)
        for graph, inputs, hidden in self._graphs:
            if count <= len(inputs.x):
                part = inputs.first(count)
                torch._foreach_copy_([part.x, part.positions, part.cosines, part.sines], [x, positions, cosines, sines])
                part.length.fill_(count)
                graph.replay()
                return hidden[:count]
        length = torch.full((1,), count, dtype=torch.int32, device=x.device)
        return self._run(_Inputs(x, positions, cosines, sines, length))

    def _run(self, inputs: _Inputs) -> Tensor:
        x, delta = inputs.x, inputs.positions
        hidden, attended = torch.empty_like(x), torch.empty_like(x)
        for layer, joined in zip(self._tower.layers, self._joined, strict=True):
            add_norm(x, delta, layer.norm1, hidden)
            qkv = F.linear(hidden, *joined).view(len(x), 3, layer.attn.num_heads, -1)
            rotated = qkv.new_empty(*qkv.shape[:3], sum(padded(qkv.shape[3])))
            rotate_patches(qkv, inputs.cosines, inputs.sines, rotated)
            attend_picture(rotated, inputs.length, attended)
            add_norm(x, layer.attn.proj(attended), layer.norm2, hidden)
            delta = layer.mlp.fc2(_expand(layer.mlp, hidden))
        add_norm(x, delta, self._tower.final_layernorm, hidden)
        return hidden


def _join_qkv(attention: Any) -> tuple[Tensor, Tensor]:
    """One weight and bias for the three projections; the module's own become views into them."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    return stack(*(part.weight for part in parts)), stack(*(part.bias for part in parts))


def _expand(mlp: Any, x: Tensor) -> Tensor:
    """The inner activations [patches, inner] of an MLP: GELU, by the tanh formula, of its first product."""
    if x.is_cuda:  # the product's epilogue, which follows the tanh formula there; on the CPU it would be the exact one
        return torch._addmm_activation(mlp.fc1.bias, x, mlp.fc1.weight.T, use_gelu=True)
    return mlp.act(mlp.fc1(x))
