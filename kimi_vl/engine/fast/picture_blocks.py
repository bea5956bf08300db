"""MoonViT over one picture, from its levels on: eight launches a block, captured in CUDA graphs for most pictures.

Launching them one by one takes longer than the work on a picture of a megapixel. A graph has a fixed number of patches;
a picture takes the smallest that it fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.kernels.picture import add_norm, look_up, rotate_patches
from kimi_vl.engine.fast.kernels.picture_attention import attend_picture, empty_heads
from kimi_vl.engine.fast.network import Network

# The steps are small where pictures are that were scaled down to an in_token_limit of 4096 and padded to 2x2 blocks.
SIZES = (256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 3840, 3968, 4032, 4096, 4160, 4224, 4352)


@dataclass(frozen=True)
class Inputs:
    """What the blocks take of some patches, to be filled in."""

    levels: Tensor  # [patches, 3, 14, 14] uint8
    table: Tensor  # [3, 256] float32, the network's input for each level
    positions: Tensor  # [patches, width] float32, added to the embedded patches
    cosines: Tensor  # [patches, size / 2] float32, of their angles
    sines: Tensor  # [patches, size / 2] float32
    length: Tensor  # [1] int32, how many of them there are; the rest is of no account

    def first(self, count: int) -> "Inputs":
        """Views of the first patches."""
        each = (tensor[:count] for tensor in (self.levels, self.positions, self.cosines, self.sines))
        levels, positions, cosines, sines = each
        return Inputs(levels, self.table, positions, cosines, sines, self.length)


class Blocks:
    """The tower from the patches' embedding to the norm after the last block."""

    def __init__(self, network: Network) -> None:
        self._tower = tower = network.tower
        self._qkv = network.qkv
        self._embedding = _padded(tower.patch_embed.proj.weight.flatten(1))
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = []
        self._inputs = self._empty(SIZES[-1])

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

    def __call__(self, count: int, fill: Callable[[Inputs], None]) -> Tensor:
        """
        Args:
            count: of the patches.
            fill: called with the tensors of as many patches, to fill them; their length is known.
        Returns:
            [patches, width], to be used before the next call.
        """
        for graph, inputs, hidden in self._graphs:
            if count <= len(inputs.levels):
                fill(inputs.first(count))
                inputs.length.fill_(count)
                graph.replay()
                return hidden[:count]
        inputs = self._empty(count)
        fill(inputs)
        inputs.length.fill_(count)
        return self._run(inputs)

    def _empty(self, count: int) -> Inputs:
        weight = self._qkv[0][0]
        width, half = weight.shape[1], weight.shape[0] // 3 // self._tower.layers[0].attn.num_heads // 2
        zeros = partial(torch.zeros, device=weight.device)
        return Inputs(
            levels=zeros(count, 3, *self._tower.patch_embed.proj.kernel_size, dtype=torch.uint8),
            table=zeros(3, 256),
            positions=zeros(count, width),
            cosines=zeros(count, half),
            sines=zeros(count, half),
            length=zeros(1, dtype=torch.int32),
        )

    def _run(self, inputs: Inputs) -> Tensor:
        patches = self._embedding.new_empty(len(inputs.levels), self._embedding.shape[1])
        look_up(inputs.levels, inputs.table, patches)
        x, delta = F.linear(patches, self._embedding, self._tower.patch_embed.proj.bias), inputs.positions
        hidden, attended = torch.empty_like(x), torch.empty_like(x)
        for layer, joined in zip(self._tower.layers, self._qkv, strict=True):
            add_norm(x, delta, layer.norm1, hidden)
            qkv = F.linear(hidden, *joined).view(len(x), 3, layer.attn.num_heads, -1)
            heads = empty_heads(qkv)
            rotate_patches(qkv, inputs.cosines, inputs.sines, inputs.length, *heads)
            attend_picture(*heads, inputs.length, attended)
            add_norm(x, layer.attn.proj(attended), layer.norm2, hidden)
            delta = layer.mlp.fc2(_expand(layer.mlp, hidden))
        add_norm(x, delta, self._tower.final_layernorm, hidden)
        return hidden


def _padded(weight: Tensor) -> Tensor:
    """A matrix with rows of whole 16 bytes, as Hopper's products want them: of 592 values instead of 588."""
    return F.pad(weight, (0, -weight.shape[1] % (16 // weight.element_size())))


def _expand(mlp: Any, x: Tensor) -> Tensor:
    """The inner activations [patches, inner] of an MLP: GELU, by the tanh formula, of its first product."""
    if x.is_cuda:  # the product's epilogue, which follows the tanh formula there; on the CPU it would be the exact one
        return torch._addmm_activation(mlp.fc1.bias, x, mlp.fc1.weight.T, use_gelu=True)
    return mlp.act(mlp.fc1(x))
