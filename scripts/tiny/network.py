"""Kimi-VL's network for training: many samples in one row, without padding, under the official tensor names.

The formulas are those of transformers' deepseek_v3 and kimi_k25; a test holds it to the original's outputs.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny.pictures import LABELS


@dataclass(frozen=True)
class Sizes:
    """Those of a Kimi-VL that can differ from checkpoint to checkpoint."""

    vocabulary: int
    vision_width: int = 144
    vision_heads: int = 2
    vision_layers: int = 8
    vision_mlp: int = 576
    position_table: int = 32
    width: int = 192
    layers: int = 4
    heads: int = 2
    dense_mlp: int = 640
    experts: int = 8
    chosen_experts: int = 2
    expert_mlp: int = 96
    shared_experts: int = 1
    expert_scale: float = 2.446
    rope_theta: float = 800000.0


LATENT, ROTARY, NOPE, VALUE = 512, 64, 128, 128  # the real model's MLA


@dataclass
class Rows:
    """Where the samples (or pictures) of a packed row begin and end."""

    starts: Tensor  # [samples + 1] int32
    longest: int


@dataclass
class PackedPictures:
    """The patches of many pictures in one row of n."""

    patches: Tensor  # [n, 588] uint8, channels first
    places: Tensor  # [n, 2] int64, row and column of each patch in its picture
    merge: Tensor  # [n] int64, the patches in the order of their 2x2 blocks
    table_rows: Tensor  # [r] int64, the rows of the interpolation weights that occur down the pictures
    table_columns: Tensor  # [c] int64, and across
    table_index: Tensor  # [n] int64, of each patch in the [r * c] interpolated positions
    rows: Rows


@dataclass
class PackedTokens:
    """The tokens of many samples in one row of n."""

    ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64, from 0 in each sample
    media: Tensor  # [m] int64, where the pictures' features go
    rows: Rows


def interpolation_row(side: int) -> int:
    """Where the weights of a grid's side (even, up to 64) begin in the interpolation weights."""
    return side // 2 * (side // 2 - 1)


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, causal: bool) -> Tensor:
    """Attention inside each sample of a packed row. query, key [n, heads, d]; value [n, heads, d or less]."""
    scale, width = query.shape[-1] ** -0.5, value.shape[-1]
    if query.is_cuda:
        padded = F.pad(value, (0, query.shape[-1] - width))
        query, key, padded = (x.to(torch.bfloat16) for x in (query, key, padded))
        limits = (rows.starts, rows.starts, rows.longest, rows.longest)
        # the public torch.nn.attention.varlen changed its arguments between torch 2.11 and 2.14
        attended = torch.ops.aten._flash_attention_forward(query, key, padded, *limits, 0.0, causal, False, scale=scale)
        return attended[0][..., :width]
    bounds = rows.starts.tolist()
    samples = (tuple(x[a:b].transpose(0, 1) for x in (query, key, value)) for a, b in pairwise(bounds))
    pieces = [F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1) for q, k, v in samples]
    return torch.cat(pieces)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns adjacent pairs. x [n, heads, d]; cosine and sine [n, d / 2] float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(x.dtype)


class VisionBlock(nn.Module):
    """A MoonViT block."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.heads = sizes.vision_heads
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wqkv, self.wo = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"fc0": nn.Linear(width, sizes.vision_mlp), "fc1": nn.Linear(sizes.vision_mlp, width)})

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, rows: Rows) -> Tensor:
        """x [patches, width]."""
        query, key, value = self.wqkv(self.norm0(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        attended = attend(rotate(query, cosine, sine), rotate(key, cosine, sine), value, rows, causal=False)
        x = x + self.wo(attended.flatten(1))
        return x + self.mlp["fc1"](F.gelu(self.mlp["fc0"](self.norm1(x)), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head latent attention, expanded, as for training."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q_proj = nn.Linear(sizes.width, sizes.heads * (NOPE + ROTARY), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(sizes.width, LATENT + ROTARY, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(LATENT, 1e-6)
        self.kv_b_proj = nn.Linear(LATENT, sizes.heads * (NOPE + VALUE), bias=False)
        self.o_proj = nn.Linear(sizes.heads * VALUE, sizes.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, rows: Rows) -> Tensor:
        """x [tokens, width]."""
        query = self.q_proj(x).unflatten(-1, (self.heads, NOPE + ROTARY))
        latent, key_rotary = self.kv_a_proj_with_mqa(x).split([LATENT, ROTARY], -1)
        key, value = (
            self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).split([NOPE, VALUE], -1)
        )
        key_rotary = rotate(key_rotary[:, None], cosine, sine).expand(-1, self.heads, -1)
        query = torch.cat([query[..., :NOPE], rotate(query[..., NOPE:], cosine, sine)], -1)
        return self.o_proj(attend(query, torch.cat([key, key_rotary], -1), value, rows, causal=True).flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, width]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """All experts as one wide MLP, what was not chosen times 0: the same function, and quick at this size."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.balance: Tensor
        experts, inner, width = sizes.experts, sizes.expert_mlp, sizes.width
        self.gate = nn.Linear(width, experts, bias=False)
        self.register_buffer("balance", torch.zeros(experts))
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.shared_experts = MLP(width, inner * sizes.shared_experts)
        self.load = torch.zeros(experts)  # share of the tokens that went to each expert in the last step

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, width]."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.weight.float()))
            chosen = (scores + self.balance).topk(self.sizes.chosen_experts, -1).indices
            weights = scores.gather(-1, chosen)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.sizes.expert_scale
            weights = torch.zeros_like(scores).scatter(-1, chosen, weights)
        self.load = (weights.detach() > 0).float().mean(0)
        inner = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        inner = inner.unflatten(-1, (self.sizes.experts, -1)) * weights[..., None].to(inner.dtype)
        return F.linear(inner.flatten(-2), self.down_proj.transpose(0, 1).flatten(1)) + self.shared_experts(x)

    @torch.no_grad()
    def rebalance(self) -> None:
        """DeepSeek-V3's bias rule (arXiv 2412.19437, 2.1.2): less for the busy experts, more for the idle ones."""
        even = self.sizes.chosen_experts / self.sizes.experts
        self.balance += 0.001 * torch.sign(even - self.load)


class DecoderLayer(nn.Module):
    """A DeepSeek-V3 layer; the first is dense."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(sizes.width, 1e-5) for _ in range(2))
        self.self_attn = Attention(sizes)
        self.mlp = MoE(sizes) if index else MLP(sizes.width, sizes.dense_mlp)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, rows: Rows) -> Tensor:
        """x [tokens, width]."""
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyKimiVL(nn.Module):
    """The whole network, and a head that says what each patch shows, which only the training uses."""

    interpolation: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, merged = sizes.vision_width, 4 * sizes.vision_width
        self.patch = nn.Linear(588, width)
        self.positions = nn.Parameter(torch.randn(sizes.position_table, sizes.position_table, width) * 0.1)
        self.blocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.vision_layers))
        self.final_layernorm, self.pre_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear_1, self.linear_2 = nn.Linear(merged, merged), nn.Linear(merged, sizes.width)
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(DecoderLayer(sizes, index) for index in range(sizes.layers))
        self.norm, self.lm_head = nn.RMSNorm(sizes.width, 1e-5), nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.labels = nn.Linear(width, LABELS)
        self.register_buffer("interpolation", _interpolation(sizes.position_table), persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        into_residual = ("wo.", "fc1", "o_proj", "down_proj", "lm_head")
        for name, parameter in self.named_parameters():
            if name == "embed_tokens.weight":
                nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1 and name != "positions":
                gain = 0.3 if any(part in name for part in into_residual) else 1.0
                nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.constant_(self.labels.bias, -4)  # nearly all labels are 0

    def see(self, pictures: PackedPictures) -> tuple[Tensor, Tensor]:
        """Encodes pictures: features [n / 4, width of the decoder], and the tower's output [n, width of the tower]."""
        pixels = pictures.patches.to(self.patch.weight.dtype) / 127.5 - 1
        down, across = self.interpolation[pictures.table_rows], self.interpolation[pictures.table_columns]
        table = torch.einsum("yi,ijd,xj->yxd", down, self.positions, across).flatten(0, 1)
        x = self.patch(pixels) + table[pictures.table_index]
        frequencies = 10000.0 ** (-4 * torch.arange(18, device=x.device) / 72)
        row, column = pictures.places[:, :1], pictures.places[:, 1:]
        angles = torch.stack([column * frequencies, row * frequencies], -1).flatten(1)
        cosine, sine = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cosine, sine, pictures.rows)
        x = self.final_layernorm(x)
        merged = self.pre_norm(x)[pictures.merge].view(-1, 4 * self.sizes.vision_width)
        return self.linear_2(F.gelu(self.linear_1(merged))), x

    def read(self, tokens: PackedTokens, features: Tensor | None) -> Tensor:
        """Decodes samples with their pictures' features [m, width] in place: [n, width], normalised for lm_head."""
        x = self.embed_tokens(tokens.ids)
        if features is not None:
            x = x.index_copy(0, tokens.media, features.to(x.dtype))
        frequencies = self.sizes.rope_theta ** (-2 * torch.arange(ROTARY // 2, device=x.device) / ROTARY)
        angles = tokens.positions[:, None] * frequencies
        cosine, sine = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cosine, sine, tokens.rows)
        return self.norm(x)


def _interpolation(size: int) -> Tensor:
    """[1056, size]: how interpolate(mode="bicubic") makes sides of 2, 4 … 64 from `size` values."""
    identity = torch.eye(size)[None, :, :, None]
    sides = (F.interpolate(identity, size=(side, 1), mode="bicubic")[0, :, :, 0].T for side in range(2, 66, 2))
    return torch.cat(list(sides))
