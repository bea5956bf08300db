"""Checkpoint folder → network: each tensor goes from its file straight to its place in what the kernels read."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from kimi_vl.engine.fast.kernels.operation import compile_ahead
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.memory import scheme_that_fits
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.weights import Attention, Mlp, Weights, parts
from kimi_vl.model.checkpoint import checked_config
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.reading import Place, read_tensors


def load_network(
    folder: Path, device: torch.device, dtype: torch.dtype, quantization: str, progress: Callable[[str], None]
) -> Network:
    """Loads a checkpoint folder's safetensors onto a device.

    Args:
        folder: in the official layout.
        device: the network's.
        dtype: of all weights that stay as they are, but for the routers' biases, which are float32.
        quantization: what KIMI_VL_QUANTIZATION says.
        progress: told, in a line, how much was loaded how fast.
    Raises:
        Misconfigured: the folder cannot be used, a file not be read, or there is no such quantization.
        ValueError: its router is not of the one kind that Kimi-VL uses.
    """
    started = perf_counter()
    tensors = inspect_folder(folder)
    network = _allocate(checked_config(folder), device, dtype, quantization)
    if device.type == "cuda":
        compile_ahead(lambda: _quantise_a_row(network.weights))
    read_tensors(tensors, dict(_places(network)), device)
    seconds, gigabytes = perf_counter() - started, sum(tensor.nbytes for tensor in tensors) / 1e9
    progress(
        f"Loaded {gigabytes:.1f} GB in {seconds:.1f} s ({gigabytes / seconds:.1f} GB/s), "
        f"{network.nbytes / 1e9:.1f} GB on the GPU"
    )
    return network


def _allocate(config: KimiVLConfig, device: torch.device, dtype: torch.dtype, quantization: str) -> Network:
    """A network in whose weights nothing stands yet."""
    with no_init_weights(), torch.device("meta"):
        model = KimiVLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    scheme = scheme_that_fits(quantization, Network.of(model), free)
    if device.type == "cuda":
        # pins the reader's buffers a tenth of a second sooner on an H100's host
        settings = "pinned_use_cuda_host_register:True,pinned_num_register_threads:4"
        if scheme.experts < 16:
            # else 0.7 GB would lie unused between tensors, much for a small GPU; on a large one it costs 0.4 s
            settings += ",expandable_segments:True"
        torch._C._accelerator_setAllocatorSettings(settings)
    tower = model.model.vision_tower.to_empty(device=device)
    model.model.mm_projector.to_empty(device=device)
    positions = tower.patch_embed.pos_emb
    positions.time_position_embeddings.copy_(positions.compute_pos_embed())  # no checkpoint holds this table,
    tower._init_weights(tower.rotary_emb)  # nor these
    network = Network.of(model).quantised(scheme)
    return replace(network, weights=_on(network.weights, device))


def _on(part: Any, device: torch.device) -> Any:
    """Weights or what they consist of, with memory on a device for each tensor, which had none."""
    if isinstance(part, Tensor):
        return torch.empty_like(part, device=device)
    if isinstance(part, list | tuple):
        return type(part)(_on(item, device) for item in part)
    if isinstance(part, Weights | Attention | Mlp | Matrix):
        return replace(part, **{field.name: _on(getattr(part, field.name), device) for field in fields(part)})
    return part


def _quantise_a_row(weights: Weights) -> None:
    """Calls every kernel that quantises: so many threads as read would each compile it."""
    for matrix in parts(weights):
        if isinstance(matrix, Matrix) and matrix.bits < 16:
            one = matrix if len(matrix.shape) == 2 else matrix[0]
            one.store(0, weights.embeddings.new_zeros(1, matrix.columns))


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
    queries = attention.projections.shape[0] - attention.row
    yield "self_attn.kv_a_proj_with_mqa.weight", _rows(attention.projections, queries)
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
        for expert in range(len(mlp.router)):
            yield from _feed_forward_places(f"mlp.experts.{expert}", mlp.gate_up[expert], mlp.down[expert])
    yield from _feed_forward_places(shared, mlp.shared_gate_up, mlp.shared_down)


def _feed_forward_places(name: str, gate_up: Matrix, down: Matrix) -> Iterator[tuple[str, Place]]:
    yield f"{name}.gate_proj.weight", _rows(gate_up)
    yield f"{name}.up_proj.weight", _rows(gate_up, gate_up.shape[0] // 2)
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


def _rows(matrix: Matrix | Tensor, start: int = 0) -> Place:
    """In a matrix, or a vector, from a row on."""

    def place(first: int, piece: Tensor) -> Tensor | None:
        rows = slice(start + first, start + first + len(piece))
        if isinstance(matrix, Tensor):
            return matrix[rows]
        if matrix.bits == 16:
            return matrix.values[rows]
        matrix.store(rows.start, piece)
        return None

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
