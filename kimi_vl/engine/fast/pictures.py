"""Pictures → features: MoonViT and its projector in few launches, and the features of the last pictures kept."""

import math
from collections import OrderedDict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.base import Patches, Picture, to_device
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.picture_blocks import Blocks, Inputs

KEPT_BYTES = 135_000_000  # of features: 8 pictures of 1792x1792, 32 of 1024x768


class Pictures:
    """Encodes pictures; those seen lately are not encoded again."""

    def __init__(self, network: Network) -> None:
        self._tower = network.tower
        self._projector = network.projector
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.blocks = Blocks(network)
        self._table = self._tower.patch_embed.pos_emb.position_embeddings.data.float()  # [side, side, width]
        self._frequencies = tuple(self._tower.rotary_emb.inv_freq.tolist())

    def features(self, picture: Picture) -> Tensor:
        """[rows * columns / 4, width] of a picture, whose patches are waited for."""
        patches = picture.patches.result()
        if patches.digest not in self._kept:
            self._kept[patches.digest] = self.encode(patches, picture.grid)
        self._kept.move_to_end(patches.digest)
        features = self._kept[patches.digest]
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return features

    def encode(self, patches: Patches, grid: tuple[int, int]) -> Tensor:
        """MoonViT and projector over one picture, alone: what comes with it changes no bit of its features.

        Args:
            patches: of rows * columns.
            grid: rows and columns of patches.
        Returns:
            Features [rows * columns / 4, width].
        """

        def fill(inputs: Inputs) -> None:
            resample(self._table, grid, inputs.positions)
            rotation = _rotation(*grid, self._frequencies, self._table.device)
            torch._foreach_copy_([inputs.cosines, inputs.sines], rotation)
            inputs.table.copy_(to_device(patches.table, self._table.device))
            inputs.levels.copy_(patches.levels, non_blocking=True)

        hidden = self.blocks(math.prod(grid), fill)
        return self._projector(_merge(hidden, *grid))[:, 0]


def resample(table: Tensor, grid: tuple[int, int], out: Tensor) -> None:
    """The learned positions [side, side, width] float32, bicubic as F.interpolate, into out [rows * columns, width].

    One small matrix for each axis; with TF32, if anyone turns that on, it is still finer than bfloat16.
    """
    by_row, by_column = (_resampling(size, side, table.device) for size, side in zip(grid, table.shape, strict=False))
    rows = (by_row @ table.flatten(1)).unflatten(1, table.shape[1:])
    torch.matmul(by_column, rows, out=out.unflatten(0, grid))


@lru_cache(maxsize=64)
def _resampling(size: int, side: int, device: torch.device) -> Tensor:
    """[size, side] float32: how much of each of an axis's learned positions goes into each of a grid's."""
    columns = F.interpolate(torch.eye(side)[None, :, :, None], size=(size, 1), mode="bicubic")
    return to_device(columns[0, :, :, 0].T.contiguous(), device)


@lru_cache(maxsize=16)  # of 1.2 MB for 1024x768, 4.7 MB for the largest
def _rotation(rows: int, columns: int, frequencies: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [rows * columns, size / 2] float32; pairs turn by column and by row in turn."""
    places = torch.arange(max(rows, columns), dtype=torch.float32)
    angles = to_device(torch.outer(places, torch.tensor(frequencies)), device)
    by_column = angles[None, :columns].expand(rows, -1, -1)
    by_row = angles[:rows, None].expand(-1, columns, -1)
    both = torch.stack([by_column, by_row], -1).view(rows * columns, -1)
    return both.cos(), both.sin()


def _merge(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, width] → [rows * columns / 4, 4, width]: each 2x2 block of patches side by side."""
    blocks = x.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2)
    return blocks.reshape(rows * columns // 4, 4, -1)
