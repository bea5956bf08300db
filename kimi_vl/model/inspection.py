"""Whether a checkpoint folder can be used: all that its small files and the headers of its weights tell.

Nothing here builds a network or reads a tensor, so that a folder is refused within seconds, before any memory is taken.
"""

import math
import os
from binascii import a2b_base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_vl.errors import Misconfigured
from kimi_vl.model.config_check import check_preprocessor, read_config
from kimi_vl.model.small_files import (
    CONFIG,
    INDEX,
    LARGEST_JSON,
    PREPROCESSOR,
    SINGLE,
    VOCABULARY,
    is_file,
    is_whole,
    parse_json,
    read_bytes,
    read_json,
    refusal,
    unreadable,
)

MOST_DIMENSIONS, LARGEST_SIZE = 8, 2**63  # of a tensor; beyond these the product could take hours
BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # of an element of each type that weights may have

# The ids that follow the vocabulary's, and the place of <|media_pad|> among them.
CONTROL_TOKENS, MEDIA_PAD = 256, 21

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    name: str
    path: Path
    kind: str  # of BYTES
    shape: Shape
    offset: int  # of its first byte, from the beginning of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.kind]

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]


def missing_files(folder: Path) -> list[str]:
    """The names of files that a checkpoint folder lacks, as after a copy that was interrupted.

    Raises:
        Misconfigured: that cannot be told, as without the right to look into the folder.
    """
    needed = [CONFIG, PREPROCESSOR, VOCABULARY]
    if is_file(folder / INDEX):
        try:
            needed += sorted(set(read_index(folder).values()))
        except Misconfigured:
            needed.append(INDEX)  # there, and damaged: inspect_folder says how
    else:
        needed.append(SINGLE)
    return [name for name in needed if not is_file(folder / name)]


def inspect_folder(folder: Path) -> list[StoredTensor]:
    """Checks everything that can be known of a checkpoint folder without reading its weights.

    Returns:
        All tensors of the network, each once, in the order in which they lie in the files.
    Raises:
        Misconfigured: it cannot be used; the message names the file and says why.
    """
    inside = os.path.realpath(folder)  # which takes a link to itself, unlike Path.resolve
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not Path(os.path.realpath(path)).is_relative_to(inside):
            raise refusal(path, "is a link that leaves the folder; put the file itself there")
        if not path.is_file() and not path.is_dir():  # a pipe would be waited for
            raise refusal(path, "is neither a file nor a folder; take it away")
    config = read_config(folder)
    check_preprocessor(folder / PREPROCESSOR, config["vision_config"])
    if (folder / VOCABULARY).is_file():
        _check_vocabulary(folder / VOCABULARY, config)
    expected = expected_shapes(config)
    index = read_index(folder) if (folder / INDEX).is_file() else {}
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder, set(index.values()) or {SINGLE}):
        tensors = _tensors(path)
        for name, tensor in tensors.items():
            if name not in expected:
                raise refusal(path, f"holds {name}, which no Kimi-VL of this configuration has")
            if tensor.shape != expected[name]:
                raise refusal(
                    path, f"holds {name} as {list(tensor.shape)}, and {CONFIG} asks for {list(expected[name])}"
                )
        here = path.name
        placed = {name for name, file in index.items() if file == here} if index else tensors.keys()
        if wrong := sorted(placed ^ tensors.keys()):
            raise refusal(path, f"and {INDEX} do not agree on {wrong[0]}; copy or fetch both again")
        found |= tensors
    if lacking := [name for name in expected if name not in found]:
        others = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
        weights = INDEX if index else SINGLE
        raise refusal(folder / weights, f"lacks the tensor {lacking[0]}{others}; copy or fetch the folder again")
    return list(found.values())


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, from model.safetensors.index.json.

    Raises:
        Misconfigured: it is no index, or names anything but safetensors files beside it.
    """
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refusal(folder / INDEX, "has no weight_map; copy or fetch it again")
    for file in weight_map.values():
        if not (isinstance(file, str) and file.isprintable() and file.endswith(".safetensors")) or "/" in file:
            raise refusal(folder / INDEX, f"names {file!r}, which is no safetensors file beside it")
    if SINGLE in (files := set(weight_map.values())) and len(files) > 1:  # of which transformers would load it alone
        raise refusal(folder / INDEX, f"names {SINGLE} beside other files; rename it, in the index and in the folder")
    if not isinstance(index.get("metadata"), dict):  # without which transformers loads nothing
        raise refusal(folder / INDEX, "has no metadata; copy or fetch it again")
    return weight_map


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The official name and shape of every tensor that a Kimi-VL with this config.json has."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, Shape] = {
        "language_model.model.embed_tokens.weight": (vocabulary, hidden),
        "language_model.lm_head.weight": (vocabulary, hidden),
        "language_model.model.norm.weight": (hidden,),
    }
    for layer in range(text["num_hidden_layers"]):
        for name, shape in _decoder_layer(text, dense=layer < text["first_k_dense_replace"]):
            shapes[f"language_model.model.layers.{layer}.{name}"] = shape
    width, patch = vision["hidden_size"], vision["patch_size"]
    table = (vision["init_pos_emb_height"], vision["init_pos_emb_width"], width)
    shapes["vision_tower.patch_embed.pos_emb.weight"] = table
    merged = width * math.prod(vision["merge_kernel_size"])
    biased: dict[str, Shape] = {
        "vision_tower.patch_embed.proj": (width, 3, patch, patch),
        "vision_tower.encoder.final_layernorm": (width,),
        "multi_modal_projector.pre_norm": (width,),
        "multi_modal_projector.linear_1": (merged, merged),
        "multi_modal_projector.linear_2": (hidden, merged),
    }
    for layer in range(vision["num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{layer}."
        biased |= {block + "norm0": (width,), block + "norm1": (width,)}
        biased |= {block + "wqkv": (3 * width, width), block + "wo": (width, width)}
        biased[block + "mlp.fc0"] = (vision["intermediate_size"], width)
        biased[block + "mlp.fc1"] = (width, vision["intermediate_size"])
    for name, shape in biased.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _decoder_layer(text: Mapping[str, Any], dense: bool) -> Iterator[tuple[str, Shape]]:
    hidden, heads, latent = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]
    nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    experts = text["n_routed_experts"]
    if dense:
        feed_forwards = {"mlp": text["intermediate_size"]}
    else:
        yield "mlp.gate.weight", (experts, hidden)
        yield "mlp.gate.e_score_correction_bias", (experts,)
        feed_forwards = {f"mlp.experts.{expert}": text["moe_intermediate_size"] for expert in range(experts)}
        feed_forwards["mlp.shared_experts"] = text["n_shared_experts"] * text["moe_intermediate_size"]
    for name, width in feed_forwards.items():
        yield f"{name}.gate_proj.weight", (width, hidden)
        yield f"{name}.up_proj.weight", (width, hidden)
        yield f"{name}.down_proj.weight", (hidden, width)


def _weight_files(folder: Path, named: set[str]) -> list[Path]:
    """The safetensors files, which have to be those that are named and no others."""
    here = {path.name for path in folder.glob("*.safetensors")}
    if lacking := sorted(named - here):
        why = "is missing; copy or fetch it again"
        if not here and any(folder.glob("*.bin")):
            why = "is missing, and a .bin is never loaded, since it can run code; save the weights as safetensors"
        raise refusal(folder / lacking[0], why)
    if extra := sorted(here - named):
        raise refusal(folder / extra[0], "belongs to no part of this checkpoint; move it away")
    return [folder / file for file in sorted(named)]


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose header and size are sound, by name, in the order of their bytes."""
    try:
        with path.open("rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_JSON, size - 8):
                raise refusal(path, "is no safetensors file or truncated; copy or fetch it again")
            header = parse_json(path, file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    header.pop("__metadata__", None)
    tensors: list[StoredTensor] = []
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise refusal(path, f"has a damaged header at {name}; copy or fetch it again") from None
        if kind not in BYTES:
            raise refusal(path, f"holds {name} as {kind}, and only {', '.join(BYTES)} are loaded")
        if len(shape) > MOST_DIMENSIONS or not all(
            is_whole(n) and 0 <= n <= LARGEST_SIZE for n in (*shape, begin, end)
        ):
            raise refusal(path, f"has a damaged header at {name}; copy or fetch it again")
        tensors.append(StoredTensor(name, path, kind, shape, 8 + length + begin))
        if end - begin != tensors[-1].nbytes:
            raise refusal(path, f"has a damaged header at {name}; copy or fetch it again")
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.offset != position:
            raise refusal(path, "has a header whose tensors overlap or leave gaps; copy or fetch it again")
        position += tensor.nbytes
    if position != size:
        is_short = "truncated" if position > size else "too long"
        raise refusal(path, f"is {is_short}: {size:,} bytes instead of {position:,}; copy or fetch it again")
    return {tensor.name: tensor for tensor in tensors}


def _check_vocabulary(path: Path, config: Mapping[str, Any]) -> None:
    """Whether each line is the base64 of a token and its rank, in order, and the weights are for just these tokens."""
    data = read_bytes(path)
    ranks: dict[bytes, int] = {}
    try:
        for line in filter(None, data.splitlines()):
            token, rank = line.split()
            ranks[a2b_base64(token, strict_mode=True)] = int(rank)
    except ValueError:
        raise refusal(path, f"is damaged after {len(ranks):,} tokens; copy or fetch it again") from None
    if list(ranks.values()) != list(range(len(ranks))):
        raise refusal(path, "must give each token its own rank from 0 on; copy or fetch it again")
    size, media = config["text_config"]["vocab_size"], config["media_placeholder_token_id"]
    if (len(ranks) + CONTROL_TOKENS, len(ranks) + MEDIA_PAD) != (size, media):
        raise refusal(
            path,
            f"has {len(ranks):,} tokens, which does not go with {CONFIG}: its vocab_size {size:,} must be "
            f"{CONTROL_TOKENS} more, and its media_placeholder_token_id {media:,} must be {MEDIA_PAD} more; "
            "copy or fetch both again",
        )
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:  # any text may hold it
        raise refusal(path, f"lacks the token of the single byte {lacking[0]:#04x}; copy or fetch it again")
