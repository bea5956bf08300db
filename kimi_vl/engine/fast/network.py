"""What the fast engine runs: the decoder, MoonViT and its projector, weights of the same input side by side."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kimi_vl.engine.fast.scheme import Scheme
from kimi_vl.engine.fast.weights import Weights, stack
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration


@dataclass(frozen=True)
class Network:
    """The model's parts, each weight once."""

    config: KimiVLConfig
    weights: Weights
    tower: Any  # transformers' MoonViT
    qkv: list[tuple[Tensor, Tensor]]  # of each of its blocks: weight [3 * width, width] and bias, which it has views of
    projector: Any  # transformers', from its output to the decoder's input

    @classmethod
    def of(cls, model: KimiVLForConditionalGeneration) -> "Network":
        """A loaded model's parts, which share its memory.

        Raises:
            ValueError: its router is not of the one kind that Kimi-VL uses.
        """
        tower: Any = model.model.vision_tower
        qkv = [_join_qkv(layer.attn) for layer in tower.layers]
        return cls(model.config, Weights.of(model), tower, qkv, model.model.mm_projector)

    @torch.no_grad()
    def quantised(self, scheme: Scheme) -> "Network":
        """This one with the decoder's weights in the bits of a scheme."""
        return replace(self, weights=self.weights.quantised(scheme))

    @property
    def nbytes(self) -> int:
        encoder = (*self.tower.parameters(), *self.projector.parameters())
        return self.weights.nbytes + sum(parameter.nbytes for parameter in encoder)


def _join_qkv(attention: Any) -> tuple[Tensor, Tensor]:
    """One weight and bias for the three projections; the module's own become views into them."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    return stack(*(part.weight for part in parts)), stack(*(part.bias for part in parts))
