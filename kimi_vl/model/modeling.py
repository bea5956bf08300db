"""Kimi-VL's network: transformers' own DeepSeek-V3 decoder and MoonViT, under Kimi-VL's names."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25ForConditionalGeneration,
    Kimi_K25Model,
    Kimi_K25ModelOutputWithPast,
    Kimi_K25PreTrainedModel,
)

from kimi_vl.model.configuration import KimiVLConfig

PATCHES_PER_GROUP = 16_384  # pictures encoded together: enough to fill a GPU, 0.7 GB of activations at full size


class KimiVLModel(Kimi_K25Model):
    """MoonViT, projector and decoder without the language-model head."""

    config_class = KimiVLConfig

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> Kimi_K25ModelOutputWithPast:
        """Kimi_K25Model.forward, but a media id without a picture (one the model made) keeps its own embedding."""
        if pixel_values is None and kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.get_input_embeddings()(input_ids)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures a group at a time, so that the peak memory does not grow with their number.

        Args:
            pixel_values: [patches, 3, 14, 14], the patches of all pictures in order.
            image_grid_thw: [pictures, 3] int64, (1, rows, columns) of each picture's patch grid.
        Returns:
            pooler_output: for each picture its features [rows * columns / 4, hidden size].
        """
        pixel_values = pixel_values.to(self.dtype)
        features: list[Tensor] = []
        counts = image_grid_thw.prod(-1)
        starts = torch.cumsum(counts, 0) - counts
        for group in _groups(counts.tolist(), PATCHES_PER_GROUP):
            first, last = group[0], group[-1]
            patches = pixel_values[starts[first] : starts[last] + counts[last]]
            features.extend(super().get_image_features(patches, image_grid_thw[group], **kwargs).pooler_output)
        return BaseModelOutputWithPooling(pooler_output=tuple(features))


def _groups(sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive indices whose sizes add up to at most the limit; a size above it stands alone."""
    groups: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += size
    return groups


class KimiVLForConditionalGeneration(Kimi_K25ForConditionalGeneration):
    """Kimi-VL with its language-model head; `generate()` works as for any transformers model.

    Inputs are those of Moonshot's code: pixel_values [patches, 3, 14, 14] and image_grid_hws [pictures, 2] int64.
    """

    config_class = KimiVLConfig

    def __init__(self, config: KimiVLConfig) -> None:
        Kimi_K25PreTrainedModel.__init__(self, config)
        self.model = KimiVLModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hws: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Kimi_K25ForConditionalGeneration.forward with the patch grids as Moonshot's code takes them.

        Args:
            input_ids: [1, length] int64, one media id for each 2x2 block of patches.
            pixel_values: [patches, 3, 14, 14], the patches of all pictures in order.
            image_grid_hws: [pictures, 2] int64, (rows, columns) of each picture's patch grid.
        """
        if image_grid_hws is not None:
            kwargs["image_grid_thw"] = grid_thw(image_grid_hws)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)


def grid_thw(grid_hws: Tensor) -> Tensor:
    """[pictures, 2] (rows, columns) → [pictures, 3] (1, rows, columns): a picture is a clip of one frame."""
    return torch.cat([torch.ones_like(grid_hws[:, :1]), grid_hws], dim=1)
