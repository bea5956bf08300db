"""Checkpoint folder → network: each tensor goes from its file straight to its place in what the kernels read."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.weights import Attention, Mlp, Weights
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.reading import Place, read_tensors

Part = TypeVar("Part", Attention, Mlp, Weights)


def load_network(folder: Path, device: torch.device, dtype: torch.dtype, progress: Callable[[str], None]) -> Network:
    """Loads a checkpoint folder's safetensors onto a device.

    Args:
        folder: in the official layout.
        device: the network's.
        dtype: of all weights but the routers' biases, which are float32.
        progress: told, in a line, how much was loaded how fast.
    Raises:
        Misconfigured: the folder cannot be used, or a file not be read.
        ValueError: its router is not of the one kind that Kimi-VL uses.
    """
    started = perf_counter()
    tensors = inspect_folder(folder)
    network = _allocate(KimiVLConfig.from_pretrained(folder), device, dtype)
    read_tensors(tensors, dict(_places(network)), device)
    seconds, gigabytes = perf_counter() - started, sum(tensor.nbytes for tensor in tensors) / 1e9
    progress(f"Loaded {gigabytes:.1f} GB in {seconds:.1f} s ({gigabytes / seconds:.1f} GB/s)")
    return network


def _allocate(config: KimiVLConfig, device: torch.device, dtype: torch.dtype) -> Network:
    """A network in whose weights nothing stands yet."""
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    tower = model.model.vision_tower.to_empty(device=device)
    model.model.mm_projector.to_empty(device=device)
    positions = tower.patch_embed.pos_emb
    positions.time_position_embeddings.copy_(positions.compute_pos_embed())  # no checkpoint holds this table,
    tower._init_weights(tower.rotary_emb)  # nor these
    network = Network.of(model)
    weights = _on(network.weights, device)
    layers = [(_on(attention, device), _on(mlp, device)) for attention, mlp in weights.layers]
    return replace(network, weights=replace(weights, layers=layers))


def _on(part: Part, device: torch.device) -> Part:
    """The part with memory on a device for each of its tensors, which had none."""
    values: dict[str, Any] = {field.name: getattr(part, field.name) for field in fields(part)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = torch.empty_like(value, device=device)
    return replace(part, **values)


def _places(network: Network) -> Iterator[tuple[str, Place]]:
    """The official name of every tensor, and where it goes."""
    weights = network.weights
    yield "language_model.model.embed_tokens.weight", _rows(weights.embeddings)
    yield "language_model.model.norm.weight", _rows(weights.gain)
    yield "language_model.lm_head.weight", _rows(weights.head)
    for number, (attention, mlp) in enumerate(weights.layers):
        for name, place in (*_attention_places(attention), *_mlp_places(mlp)):
            yield f"language_model.model.layers.{number}.{name}", place
    for name, module in _picture_modules(network.tower, network.projector):
        yield f"{name}.weight", _rows(module.weight.data)
        yield f"{name}.bias", _rows(module.bias.data)
    table = network.tower.patch_embed.pos_emb.position_embeddings
    yield "vision_tower.patch_embed.pos_emb.weight", _rows(table.data)
    heads = network.config.vision_config.num_attention_heads
    for number, (weight, bias) in enumerate(network.qkv):
        block = f"vision_tower.encoder.blocks.{number}"
        yield f"{block}.wqkv.weight", _rotary_halves(weight, heads)
        yield f"{block}.wqkv.bias", _rotary_halves(bias, heads)


def _attention_places(attention: Attention) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", _rows(attention.gain)
    yield "self_attn.q_proj.weight", _rows(attention.projections)
    yield "self_attn.kv_a_proj_with_mqa.weight", _rows(attention.projections, -attention.row)
    yield "self_attn.kv_a_layernorm.weight", _rows(attention.kv_gain)
    yield "self_attn.kv_b_proj.weight", _rows(attention.kv_b)
    yield "self_attn.o_proj.weight", _rows(attention.out)


def _mlp_places(mlp: Mlp) -> Iterator[tuple[str, Place]]:
    yield "post_attention_layernorm.weight", _rows(mlp.gain)
    shared = "mlp"
    if mlp.chosen:
        yield "mlp.gate.weight", _rows(mlp.router)
        yield "mlp.gate.e_score_correction_bias", _rows(mlp.bias)
        shared = "mlp.shared_experts"
        for expert, (gate_up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
            yield from _feed_forward_places(f"mlp.experts.{expert}", gate_up, down)
    yield from _feed_forward_places(shared, mlp.shared_gate_up, mlp.shared_down)


def _feed_forward_places(name: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Place]]:
    yield f"{name}.gate_proj.weight", _rows(gate_up)
    yield f"{name}.up_proj.weight", _rows(gate_up, len(gate_up) // 2)
    yield f"{name}.down_proj.weight", _rows(down)


def _picture_modules(tower: Any, projector: Any) -> Iterator[tuple[str, Any]]:
    """Those with a weight and a bias that are the official ones."""
    yield "vision_tower.patch_embed.proj", tower.patch_embed.proj
    for number, layer in enumerate(tower.layers):
        block = f"vision_tower.encoder.blocks.{number}"
        yield f"{block}.norm0", layer.norm1
        yield f"{block}.wo", layer.attn.proj
        yield f"{block}.norm1", layer.norm2
        yield f"{block}.mlp.fc0", layer.mlp.fc1
        yield f"{block}.mlp.fc1", layer.mlp.fc2
    yield "vision_tower.encoder.final_layernorm", tower.final_layernorm
    yield "multi_modal_projector.pre_norm", projector.pre_norm
    yield "multi_modal_projector.linear_1", projector.in_proj
    yield "multi_modal_projector.linear_2", projector.out_proj


def _rows(matrix: Tensor, start: int = 0) -> Place:
    """In a matrix, or a vector, from a row on."""
    destination = matrix[start:]

    def place(first: int, piece: Tensor) -> None:
        destination[first : first + len(piece)].copy_(piece, non_blocking=True)

    return place


def _rotary_halves(qkv: Tensor, heads: int) -> Place:
    """In [q, k and v rows of all heads, ...], where the rows of q and k that turn as a pair are half a head apart.

    The official ones are adjacent.
    """
    rows = torch.arange(len(qkv), device=qkv.device).view(3, heads, 2, -1)
    order = torch.cat([rows[:2].mT.flatten(), rows[2].flatten()])

    def place(first: int, piece: Tensor) -> None:
        qkv[order[first : first + len(piece)]] = piece.to(qkv.device, qkv.dtype, non_blocking=True)

    return place
