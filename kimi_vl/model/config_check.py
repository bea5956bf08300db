"""Whether config.json and preprocessor_config.json are a Kimi-VL's, with sizes that a network can have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_vl.model.small_files import CONFIG, is_number, is_whole, read_json, refusal

# The smallest and the largest value of what shapes follow from.
TEXT_SIZES = {
    "vocab_size": (1, 2**20),
    "max_position_embeddings": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "moe_intermediate_size": (1, 2**16),
    "num_hidden_layers": (1, 256),
    "first_k_dense_replace": (0, 256),
    "num_attention_heads": (1, 1024),
    "n_routed_experts": (1, 1024),
    "num_experts_per_tok": (1, 1024),
    "n_shared_experts": (1, 64),
    "kv_lora_rank": (1, 2**16),
    "qk_nope_head_dim": (1, 4096),
    "qk_rope_head_dim": (1, 4096),
    "v_head_dim": (1, 4096),
}
VISION_SIZES = {
    "patch_size": (1, 256),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "init_pos_emb_height": (1, 4096),
    "init_pos_emb_width": (1, 4096),
}
TEXT_NUMBERS = {"rope_theta": (1, 1e9), "rms_norm_eps": (0, 1), "routed_scaling_factor": (0, 1000)}
PICTURE_DEFAULTS = {"patch_size": 14, "merge_kernel_size": [2, 2]}  # what ImageProcessor takes absent ones for
PICTURE_SIZES = {"in_token_limit": (4, 2**20), "patch_size": (1, 256)}

# Of all that DeepSeek-V3 can be, what Kimi-VL is.
TEXT_FIXED = {
    "q_lora_rank": None,
    "rope_scaling": None,
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        Misconfigured: it is not there, not Kimi-VL's, or holds numbers that no network can have.
    """
    path = folder / CONFIG
    config = read_json(path)
    architectures = config.get("architectures", ["KimiVLForConditionalGeneration"])
    if config.get("model_type") != "kimi_vl" or architectures != ["KimiVLForConditionalGeneration"]:
        raise refusal(
            path,
            f"says model_type {config.get('model_type')!r} and architectures {architectures!r}, which is not Kimi-VL; "
            "name a Kimi-VL checkpoint",
        )
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise refusal(path, "has no text_config or no vision_config")
    _check_sizes(path, "text_config.", text, TEXT_SIZES)
    _check_sizes(path, "vision_config.", vision, VISION_SIZES)
    _check_sizes(path, "", config, {"media_placeholder_token_id": (0, text["vocab_size"] - 1)})
    merge = vision.get("merge_kernel_size")
    if not isinstance(merge, list) or len(merge) != 2 or not all(is_whole(n) and 1 <= n <= 16 for n in merge):
        raise refusal(path, f"has vision_config.merge_kernel_size {merge!r}, which must be two whole numbers up to 16")
    for key, (lowest, highest) in TEXT_NUMBERS.items():
        value = text.get(key)
        if value is None or not is_number(value) or not lowest <= value <= highest:
            raise refusal(
                path, f"has text_config.{key} {value!r}, which must be a number from {lowest} to {highest:,.0f}"
            )
    fixed = {**TEXT_FIXED, "num_key_value_heads": text["num_attention_heads"]}
    for key, value in fixed.items():
        if text.get(key, value) != value:
            raise refusal(path, f"has text_config.{key} {text[key]!r}, and Kimi-VL's is {value!r}")
    if text["num_experts_per_tok"] > text["n_routed_experts"]:
        raise refusal(path, "has a text_config.num_experts_per_tok above its n_routed_experts")
    if vision["hidden_size"] % vision["num_attention_heads"]:
        raise refusal(path, "has a vision_config.hidden_size that its num_attention_heads do not divide")
    if vision["hidden_size"] // vision["num_attention_heads"] % 4:  # pairs for the row and pairs for the column
        raise refusal(path, "has a vision_config.hidden_size that is no multiple of 4 for each of its heads")
    if text["qk_rope_head_dim"] % 2:
        raise refusal(path, f"has text_config.qk_rope_head_dim {text['qk_rope_head_dim']}, which must be even")
    return config


def check_preprocessor(path: Path, vision: Mapping[str, Any]) -> None:
    """Whether preprocessor_config.json goes with the vision_config of a config.json.

    Raises:
        Misconfigured: it does not, or holds numbers that no picture can be prepared with.
    """
    values = read_json(path)
    _check_sizes(path, "", values, {key: PICTURE_SIZES[key] for key in PICTURE_SIZES & values.keys()})
    for key, default in PICTURE_DEFAULTS.items():
        if str(values.get(key, default)) != str(vision[key]):  # 2.0 equals 2, and is no size
            raise refusal(path, f"has {key} {values.get(key)!r}, and {CONFIG} has {vision[key]!r}")
    for key in ("image_mean", "image_std"):
        levels = values.get(key, [0.5] * 3)
        if not isinstance(levels, list) or len(levels) != 3 or not all(is_number(n) and 0 < n <= 1 for n in levels):
            raise refusal(path, f"has {key} {levels!r}, which must be three numbers above 0 and up to 1")


def _check_sizes(path: Path, prefix: str, values: Mapping[str, Any], limits: Mapping[str, tuple[int, int]]) -> None:
    for key, (lowest, highest) in limits.items():
        value = values.get(key)
        if value is None or not is_whole(value) or not lowest <= value <= highest:
            raise refusal(
                path, f"has {prefix}{key} {value!r}, which must be a whole number from {lowest:,} to {highest:,}"
            )
