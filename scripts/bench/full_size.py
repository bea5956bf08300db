"""Kimi-VL-A3B at full size with random weights: the real shapes and bytes, without the real answers."""

import json
import shutil
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.inspection import Shape, expected_shapes
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.small_files import INDEX
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.prompt.tokenizer import CONTROL_TOKENS

VOCABULARY = 163840
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 800000.0,
    "max_position_embeddings": 131072,
}
VISION = {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27, "intermediate_size": 4304}
SHARD_BYTES = 5_000_000_000  # as in the official checkpoints


@torch.no_grad()
def random_model(device: torch.device, dtype: torch.dtype, media_id: int) -> KimiVLForConditionalGeneration:
    """A model of the real sizes on a device, whose pictures stand where the prompt has the media id.

    Every matrix has its own random numbers, scaled by its width, so that activations keep their size through the
    layers and the router spreads tokens over all experts, as in a trained model.
    """
    config = KimiVLConfig(text_config=TEXT, vision_config=VISION, media_placeholder_token_id=media_id)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = KimiVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0, scale, generator=generator)
    return model.eval()


def save_random(folder: Path, device: torch.device) -> None:
    """Writes a folder in the official layout whose numbers are drawn on a device: to be loaded, not to be asked."""
    name = KimiVLForConditionalGeneration.__name__
    config = KimiVLConfig(text_config=TEXT, vision_config=VISION, architectures=[name]).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    _save_processor(folder)
    index: dict[str, str] = {}
    for number, shapes in enumerate(_shards(expected_shapes(config))):
        file = f"model-{number}.safetensors"
        tensors = {n: torch.randn(s, dtype=torch.bfloat16, device=device).cpu() for n, s in shapes.items()}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


@contextmanager
def checkpoint(folder: Path | None, device: torch.device) -> Iterator[Path]:
    """A folder, or where there is none one that `save_random` fills, and which goes with the end."""
    if folder:
        yield folder
        return
    with TemporaryDirectory() as made:
        save_random(Path(made), device)
        yield Path(made)


def full_size_processor() -> KimiVLProcessor:
    """With as many tokens as the model has."""
    with TemporaryDirectory() as folder:
        _save_processor(Path(folder))
        return KimiVLProcessor.from_pretrained(folder)


def _save_processor(folder: Path) -> None:
    """Writes what it is made from; all but Chinese text becomes its single bytes."""
    shutil.copy(WEIGHTS / "tiny" / "preprocessor_config.json", folder)
    ranks = range(VOCABULARY - CONTROL_TOKENS)
    lines = (f"{b64encode(_token(rank)).decode()} {rank}\n" for rank in ranks)
    (folder / "tiktoken.model").write_text("".join(lines))


def _token(rank: int) -> bytes:
    """A byte, or two Chinese characters, so that most tokens may stand in a JSON string."""
    return bytes([rank]) if rank < 256 else "".join(chr(0x4E00 + part) for part in divmod(rank, 512)).encode()


def _shards(shapes: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """The shapes of each file's tensors."""
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in shapes.items():
        if size + 2 * prod(shape) > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * prod(shape)
    yield shard
