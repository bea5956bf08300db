"""RGB pictures → patches, with the original's arithmetic (image_processing_kimi_vl.py)."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

CONFIG_FILE = "preprocessor_config.json"
UInt8Array = npt.NDArray[np.uint8]
PATCHES_PER_SIDE = 512  # MoonViT takes fewer than this many patches on a side
BISECTIONS = 60  # until a scale is exact


@dataclass(frozen=True)
class ImageProcessor:
    """Scales, pads and cuts pictures as a checkpoint's preprocessor_config.json says."""

    in_token_limit: int = 4096  # patches of a picture, before padding
    patch_size: int = 14
    merge_kernel_size: tuple[int, int] = (2, 2)
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """Reads preprocessor_config.json of a checkpoint folder."""
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
        values: dict[str, Any] = {}
        for key in cls.__dataclass_fields__.keys() & config.keys():
            values[key] = tuple(config[key]) if isinstance(config[key], list) else config[key]
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json into a folder."""
        (Path(folder) / CONFIG_FILE).write_text(json.dumps({**asdict(self), "pad_input": True}, indent=2) + "\n")

    def __call__(self, pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor] | None:
        """Cuts pictures into normalised patches, one picture at a time.

        Args:
            pictures: any sizes; other modes than RGB are converted by Pillow.
        Returns:
            pixel_values [patches, 3, 14, 14] float32, all pictures' patches in raster order, and
            image_grid_hws [pictures, 2] int64, (rows, columns) of each picture's grid; None without pictures.
        """
        cut = [self.patchify(picture) for picture in pictures]
        if not cut:
            return None
        return torch.cat([patches for patches, _ in cut]), torch.tensor([grid for _, grid in cut])

    def patchify(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """One picture's patches [rows * columns, 3, 14, 14] float32 and its grid (rows, columns)."""
        scaled = self.scale(picture)
        return self.normalise(self.cut(scaled)), self.grid(*scaled.size)

    def scale(self, picture: Image.Image) -> Image.Image:
        """A picture in RGB, in the size that is cut."""
        size = self.scaled_size(*picture.size)
        if picture.mode != "RGB":  # it would be copied
            picture = picture.convert("RGB")
        return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)

    def size(self, width: int, height: int, most: int = 0) -> tuple[int, int]:
        """(width, height) before padding of a picture of this size, with at most so many tokens unless that is 0."""
        size = self.scaled_size(width, height)
        if most and self.tokens(self.grid(*size)) > most:
            return self.size_within(width, height, most)
        return size

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches of a scaled picture, the padding included."""
        p, (merge_rows, merge_columns) = self.patch_size, self.merge_kernel_size
        rows = math.ceil(height / (p * merge_rows)) * merge_rows
        return rows, math.ceil(width / (p * merge_columns)) * merge_columns

    def cut(self, scaled: Image.Image) -> UInt8Array:
        """A scaled picture's patches [rows * columns, 3, 14, 14], in raster order, black where there is no picture."""
        p, (rows, columns) = self.patch_size, self.grid(*scaled.size)
        padded = np.zeros((rows * p, columns * p, 3), np.uint8)
        padded[: scaled.height, : scaled.width] = np.asarray(scaled)
        patches = padded.reshape(rows, p, columns, p, 3).transpose(0, 2, 4, 1, 3)
        return patches.reshape(rows * columns, 3, p, p)

    def normalise(self, patches: UInt8Array) -> Tensor:
        """Patches [patches, 3, ...] as the network takes them, float32."""
        pixels = patches.astype(np.float32)
        pixels /= 255
        pixels -= np.array(self.image_mean, np.float32)[:, None, None]
        pixels /= np.array(self.image_std, np.float32)[:, None, None]
        return torch.from_numpy(pixels)

    def table(self) -> Tensor:
        """What `normalise` makes of each level of each channel: [3, 256] float32."""
        return self.normalise(np.tile(np.arange(256, dtype=np.uint8), (1, 3, 1, 1)))[0, :, 0]

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before padding: at most in_token_limit patches, on sides that MoonViT takes."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches > self.in_token_limit:
            scale = math.sqrt(self.in_token_limit / patches)
            width, height = int(width * scale), int(height * scale)
        # The original raises for a long thin picture; here its long side is squeezed to fit, padding included.
        longest_row, longest_column = self._longest_sides
        return min(width, longest_row), min(height, longest_column)

    def size_within(self, width: float, height: float, most: int, enlarge: bool = False) -> tuple[int, int]:
        """The largest (width, height) of about this aspect with at most so many tokens, padding included.

        Args:
            width, height: of the picture, in any unit if it may be enlarged.
            most: tokens, at least 1.
            enlarge: whether it may become larger than it is.
        """
        longest_row, longest_column = self._longest_sides

        def scaled(scale: float) -> tuple[int, int]:
            return min(max(1, int(width * scale)), longest_row), min(max(1, int(height * scale)), longest_column)

        fits, too_large = 0.0, max(longest_row / width, longest_column / height) if enlarge else 1.0
        if self.tokens(self.grid(*scaled(too_large))) <= most:
            return scaled(too_large)
        for _ in range(BISECTIONS):
            middle = (fits + too_large) / 2
            if self.tokens(self.grid(*scaled(middle))) <= most:
                fits = middle
            else:
                too_large = middle
        return scaled(fits)

    @property
    def _longest_sides(self) -> tuple[int, int]:
        """Most pixels of (width, height)."""
        merge_rows, merge_columns = self.merge_kernel_size
        return (PATCHES_PER_SIDE - merge_columns) * self.patch_size, (PATCHES_PER_SIDE - merge_rows) * self.patch_size

    def tokens(self, grid: Sequence[int]) -> int:
        """Number of media tokens that stand for a picture in the prompt."""
        return grid[0] * grid[1] // math.prod(self.merge_kernel_size)
