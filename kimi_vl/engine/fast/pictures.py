"""Pictures → features: MoonViT and its projector in few launches, and the features of the last pictures kept."""

import hashlib
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.fast.kernels.picture import rotate_patches
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

GROUP = 16_384  # patches encoded together: enough to fill a GPU, and the peak memory stays bounded
KEPT_BYTES = 256_000_000  # of features: 60 pictures of 1024x768


class Pictures:
    """Encodes pictures; those seen lately are not encoded again."""

    def __init__(self, model: KimiVLForConditionalGeneration) -> None:
        self._tower: Any = model.model.vision_tower
        self._projector: Any = model.model.mm_projector
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._qkv = [_join_qkv(layer.attn) for layer in self._tower.layers]

    def features(self, pictures: dict[bytes, tuple[Tensor, list[int]]]) -> dict[bytes, Tensor]:
        """The features [rows * columns / 4, width] of each picture.

        Args:
            pictures: by digest, the patches [rows * columns, 3, 14, 14] in raster order and (rows, columns).
        """
        found = {digest: self._kept[digest] for digest in pictures if digest in self._kept}
        group: list[bytes] = []
        missing = [digest for digest in pictures if digest not in found]
        for digest in missing:
            if group and sum(len(pictures[d][0]) for d in [*group, digest]) > GROUP:
                found |= self._encode(group, pictures)
                group = []
            group.append(digest)
        if group:
            found |= self._encode(group, pictures)
        for digest, features in found.items():
            self._kept[digest] = features
            self._kept.move_to_end(digest)
        while sum(features.nbytes for features in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _encode(self, group: list[bytes], pictures: dict[bytes, tuple[Tensor, list[int]]]) -> dict[bytes, Tensor]:
        patches, grids = zip(*(pictures[digest] for digest in group), strict=True)
        features = self.encode(torch.cat(patches), list(grids))
        sizes = [rows * columns // 4 for rows, columns in grids]
        return {digest: part.clone() for digest, part in zip(group, features.split(sizes), strict=True)}

    def encode(self, patches: Tensor, grids: list[list[int]]) -> Tensor:
        """MoonViT and projector over whole pictures.

        Args:
            patches: [patches, 3, 14, 14], the patches of all pictures in order.
            grids: (rows, columns) of each picture.
        Returns:
            Features [patches / 4, width].
        """
        embed, rotary = self._tower.patch_embed, self._tower.rotary_emb
        weight = embed.proj.weight
        patches = patches.to(weight.device, weight.dtype, non_blocking=True).flatten(1)
        x = F.linear(patches, weight.flatten(1), embed.proj.bias) + self._positions(grids)
        places = torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids])
        cosines, sines = (t[:, : t.shape[1] // 2].contiguous() for t in rotary(x, places.to(x.device)))
        sizes = [rows * columns for rows, columns in grids]
        for layer, (qkv_weight, qkv_bias) in zip(self._tower.layers, self._qkv, strict=True):
            qkv = F.linear(layer.norm1(x), qkv_weight, qkv_bias).view(len(x), 3, layer.attn.num_heads, -1)
            rotate_patches(qkv, cosines, sines)
            x = x + layer.attn.proj(_attend_within(qkv, sizes))
            x = x + layer.mlp(layer.norm2(x))
        x = self._tower.final_layernorm(x)
        merged = torch.cat([_merge(part, *grid) for part, grid in zip(x.split(sizes), grids, strict=True)])
        return self._projector(merged)[:, 0]

    def _positions(self, grids: list[list[int]]) -> Tensor:
        """The learned position table [side, side, width], resampled to each grid: [patches, width]."""
        table = self._tower.patch_embed.pos_emb.position_embeddings
        channels_first = table.permute(2, 0, 1)[None].float()
        resampled = [F.interpolate(channels_first, size=tuple(grid), mode="bicubic") for grid in grids]
        return torch.cat([one[0].flatten(1).T for one in resampled]).to(table.dtype)


def digest(patches: Tensor, grid: list[int]) -> bytes:
    """What a picture is known by: a hash of its patches and its shape."""
    content = patches.contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(content.data).digest() + repr(grid).encode()


def _join_qkv(attention: Any) -> tuple[Tensor, Tensor]:
    """One weight and bias for the three projections; the module's own become views into them."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = tuple(torch.cat([getattr(part, name).data for part in parts]) for name in ("weight", "bias"))
    for name, whole in zip(("weight", "bias"), joined, strict=True):
        for part, view in zip(parts, whole.chunk(3), strict=True):
            getattr(part, name).data = view
    return joined[0], joined[1]


def _attend_within(qkv: Tensor, sizes: list[int]) -> Tensor:
    """Full attention inside each picture: qkv [patches, 3, heads, size] → [patches, heads * size]."""
    parts = (part.transpose(0, 2)[None] for part in qkv.split(sizes))  # [1, heads, 3, patches, size]
    mixed = [F.scaled_dot_product_attention(*part.unbind(2)) for part in parts]
    return torch.cat([one[0].transpose(0, 1).flatten(1) for one in mixed])


def _merge(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, width] → [rows * columns / 4, 4, width]: each 2x2 block of patches side by side."""
    blocks = x.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2)
    return blocks.reshape(rows * columns // 4, 4, -1)
