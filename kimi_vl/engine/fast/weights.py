"""The network's weights as the kernels take them, under short names."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.scheme import Scheme
from kimi_vl.model.modeling import KimiVLForConditionalGeneration


@dataclass(frozen=True)
class Attention:
    """One layer's latent attention. A head has 128 + 64 query and key dimensions (nope, rope) and 128 of the value."""

    gain: Tensor  # [width], input_layernorm
    projections: Matrix  # [heads * (nope + rope) + latent + rope, width], q_proj's rows before kv_a_proj's
    kv_gain: Tensor  # [latent], kv_a_layernorm
    kv_b: Tensor  # [heads * (nope + value), latent]
    out: Matrix  # [width, heads * value]
    heads: int
    eps: float  # of input_layernorm
    kv_eps: float  # of kv_a_layernorm

    @property
    def latent(self) -> int:
        return self.kv_b.shape[1]

    @property
    def value(self) -> int:
        return self.out.columns // self.heads

    @property
    def nope(self) -> int:
        return self.kv_b.shape[0] // self.heads - self.value

    @property
    def rope(self) -> int:
        return (self.projections.shape[0] - self.heads * self.nope - self.latent) // (self.heads + 1)

    @property
    def row(self) -> int:
        """Values of a token's row in the latent cache."""
        return self.latent + self.rope

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5

    def quantised(self, scheme: Scheme) -> "Attention":
        bits = scheme.others
        return replace(self, projections=self.projections.quantised(bits), out=self.out.quantised(bits))


@dataclass(frozen=True)
class Mlp:
    """One layer's mixture of experts. A dense layer is shared experts alone, and empty where the others would be."""

    gain: Tensor  # [width], post_attention_layernorm
    router: Tensor  # [experts, width]
    bias: Tensor  # [experts] float32, added to the scores for the choice alone
    gate_up: Matrix  # [experts, 2 * inner, width], each expert's gate rows before its up rows
    down: Matrix  # [experts, width, inner]
    shared_gate_up: Matrix  # [2 * shared, width], the gate rows before the up rows
    shared_down: Matrix  # [width, shared]
    chosen: int  # experts of one token
    factor: float  # the sum of their weights
    eps: float

    def quantised(self, scheme: Scheme) -> "Mlp":
        if not self.chosen:
            down, gate_up = self.shared_down.quantised(scheme.others), self.shared_gate_up.quantised(scheme.others)
            return replace(self, shared_gate_up=gate_up, shared_down=down)
        return replace(
            self,
            gate_up=self.gate_up.quantised(scheme.experts),
            down=self.down.quantised(scheme.experts),
            shared_gate_up=self.shared_gate_up.quantised(scheme.experts),
            shared_down=self.shared_down.quantised(scheme.experts),
        )


@dataclass(frozen=True)
class Weights:
    """The decoder."""

    embeddings: Tensor  # [vocabulary, width]
    layers: list[tuple[Attention, Mlp]]
    gain: Tensor  # [width], the last norm
    head: Matrix  # [vocabulary, width]
    eps: float
    rope_theta: float

    @classmethod
    def of(cls, model: KimiVLForConditionalGeneration) -> "Weights":
        """Views into a loaded model, in which weights that read the same vector come to lie side by side.

        Raises:
            ValueError: the router is not of the one kind that Kimi-VL uses.
        """
        config = model.config.text_config
        decoder: Any = model.model.language_model
        if config.n_group != 1 or not config.norm_topk_prob or config.q_lora_rank is not None:
            raise ValueError("the fast engine takes one group of experts, normalised weights and a full q_proj")
        return cls(
            embeddings=decoder.embed_tokens.weight,
            layers=[(_attention(layer, config.num_attention_heads), _mlp(layer)) for layer in decoder.layers],
            gain=decoder.norm.weight,
            head=Matrix.of(model.lm_head.weight),
            eps=decoder.norm.variance_epsilon,
            rope_theta=config.rope_parameters["rope_theta"],
        )

    def quantised(self, scheme: Scheme) -> "Weights":
        """These with the bits of a scheme; what has them already is shared."""
        layers = [(attention.quantised(scheme), mlp.quantised(scheme)) for attention, mlp in self.layers]
        return replace(self, layers=layers, head=self.head.quantised(scheme.others))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in parts(self))

    @property
    def row(self) -> int:
        """Values of one token in one layer's cache."""
        return self.layers[0][0].row

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the cache of all layers, and in the rotary table."""
        return len(self.layers) * self.row * self.embeddings.element_size() + 4 * self.layers[0][0].rope

    def rotary(self, context: int) -> Tensor:
        """[context, rope] float32: each position's cosines, then its sines."""
        rope = self.layers[0][0].rope
        exponents = torch.arange(0, rope, 2, dtype=torch.float32, device=self.embeddings.device) / rope
        positions = torch.arange(context, dtype=torch.float32, device=self.embeddings.device)
        angles = positions[:, None] * (1.0 / self.rope_theta**exponents)
        return torch.cat([angles.cos(), angles.sin()], 1)


def _attention(layer: Any, heads: int) -> Attention:
    attention, norm = layer.self_attn, layer.input_layernorm
    return Attention(
        gain=norm.weight,
        projections=Matrix.of(stack(attention.q_proj.weight, attention.kv_a_proj_with_mqa.weight)),
        kv_gain=attention.kv_a_layernorm.weight,
        kv_b=attention.kv_b_proj.weight,
        out=Matrix.of(attention.o_proj.weight),
        heads=heads,
        eps=norm.variance_epsilon,
        kv_eps=attention.kv_a_layernorm.variance_epsilon,
    )


def _mlp(layer: Any) -> Mlp:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    gain, eps = norm.weight, norm.variance_epsilon
    if not hasattr(mlp, "experts"):
        gate_up = stack(mlp.gate_proj.weight, mlp.up_proj.weight)
        return dense(gain, Matrix.of(gate_up), Matrix.of(mlp.down_proj.weight), eps)
    shared = mlp.shared_experts
    return Mlp(
        gain=gain,
        router=mlp.gate.weight,
        bias=mlp.gate.e_score_correction_bias.float(),
        gate_up=Matrix.of(mlp.experts.gate_up_proj),
        down=Matrix.of(mlp.experts.down_proj),
        shared_gate_up=Matrix.of(stack(shared.gate_proj.weight, shared.up_proj.weight)),
        shared_down=Matrix.of(shared.down_proj.weight),
        chosen=mlp.gate.top_k,
        factor=mlp.gate.routed_scaling_factor,
        eps=eps,
    )


def dense(gain: Tensor, gate_up: Matrix, down: Matrix, eps: float) -> Mlp:
    """A layer without a router: gate_up [2 * shared, width], down [width, shared]."""
    width = len(gain)
    return Mlp(
        gain=gain,
        router=gain.new_empty(0, width),
        bias=gain.new_empty(0, dtype=torch.float32),
        gate_up=Matrix.of(gain.new_empty(0, 2, width)),
        down=Matrix.of(gain.new_empty(0, width, 1)),
        shared_gate_up=gate_up,
        shared_down=down,
        chosen=0,
        factor=0.0,
        eps=eps,
    )


def stack(*parameters: Tensor) -> Tensor:
    """The parameters below one another in one tensor, of which they become views."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = view
    return whole


def parts(value: Any) -> Iterator[Tensor | Matrix]:
    """The tensors and matrices of weights, or of some layers."""
    if isinstance(value, Tensor | Matrix):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from parts(getattr(value, field.name))
