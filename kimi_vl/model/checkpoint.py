"""Checkpoint folders in the official Kimi-VL layout: tensor names, and how it is loaded."""

from pathlib import Path

import torch
from transformers import GenerationConfig, logging
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PermuteForRope,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from kimi_vl.model.config_check import TEXT_FIXED, TEXT_NUMBERS, TEXT_SIZES, VISION_SIZES, read_config
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

BLOCK, LAYER = r"^vision_tower\.encoder\.blocks\.(\d+)\.", r"^model\.vision_tower\.layers\.\1\."
RENAMED = {
    r"^language_model\.model\.": r"^model\.language_model\.",
    r"^language_model\.lm_head\.": r"^lm_head\.",
    r"^multi_modal_projector\.pre_norm\.": r"^model\.mm_projector\.pre_norm\.",
    r"^multi_modal_projector\.linear_1\.": r"^model\.mm_projector\.in_proj\.",
    r"^multi_modal_projector\.linear_2\.": r"^model\.mm_projector\.out_proj\.",
    r"^vision_tower\.patch_embed\.proj\.": r"^model\.vision_tower\.patch_embed\.proj\.",
    r"^vision_tower\.patch_embed\.pos_emb\.weight": r"^model\.vision_tower\.patch_embed\.pos_emb\.position_embeddings",
    r"^vision_tower\.encoder\.final_layernorm\.": r"^model\.vision_tower\.final_layernorm\.",
    BLOCK + r"norm0\.": LAYER + r"norm1\.",
    BLOCK + r"norm1\.": LAYER + r"norm2\.",
    BLOCK + r"mlp\.fc0\.": LAYER + r"mlp\.fc1\.",
    BLOCK + r"mlp\.fc1\.": LAYER + r"mlp\.fc2\.",
    BLOCK + r"wqkv\.": LAYER + r"wqkv\.",
    BLOCK + r"wo\.": LAYER + r"attn\.proj\.",
}


def register_tensor_names() -> None:
    """Teaches transformers the official tensor names, for loading and (reversed) for saving."""
    rules: list[WeightTransform] = [WeightRenaming(official, ours) for official, ours in RENAMED.items()]
    # q and k rows move from adjacent rotary pairs to the halves that kimi_k25 rotates.
    permute = PermuteForRope(subconfig_key="vision_config", permute_layer_names=["q_proj", "k_proj"])
    split = [rf"(?<!self_)attn.{name}_proj" for name in "qkv"]  # the decoder has self_attn.q_proj
    rules.append(WeightConverter("wqkv", split, operations=[Chunk(dim=0), permute]))
    gate_up = [rf"mlp\.experts.*.{name}_proj.weight" for name in ("gate", "up")]
    stack = [MergeModulelist(dim=0), Concatenate(dim=1)]
    rules.append(WeightConverter(gate_up, "mlp.experts.gate_up_proj", operations=stack))
    down = "mlp.experts.*.down_proj.weight"
    rules.append(WeightConverter(down, "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]))
    register_checkpoint_conversion_mapping(KimiVLConfig.model_type, rules, overwrite=True)


def checked_config(folder: Path) -> KimiVLConfig:
    """The configuration of a checkpoint folder, from what is checked in its config.json: nothing else there has a say.

    Raises:
        Misconfigured: something in it cannot be used.
    """
    config = read_config(folder)
    text, vision = config["text_config"], config["vision_config"]
    return KimiVLConfig(
        text_config={
            **{key: text[key] for key in TEXT_SIZES},
            **{key: float(text[key]) for key in TEXT_NUMBERS},
            **TEXT_FIXED,
            "num_key_value_heads": text["num_attention_heads"],
        },
        vision_config={key: vision[key] for key in (*VISION_SIZES, "merge_kernel_size")},
        media_placeholder_token_id=config["media_placeholder_token_id"],
    )


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> KimiVLForConditionalGeneration:
    """Loads a checkpoint folder's safetensors straight onto a device, ready to generate.

    Raises:
        Misconfigured: the folder cannot be used; no memory has been taken.
    """
    inspect_folder(folder)
    logging.disable_progress_bar()
    model = KimiVLForConditionalGeneration.from_pretrained(
        folder,
        config=checked_config(folder),
        generation_config=GenerationConfig(),
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=attention_implementation(device),
    )
    return model.eval()


def attention_implementation(device: torch.device) -> str:
    """flash_attention_2 where flash-attn imports and the GPU supports it (compute capability 8.0), else sdpa."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "sdpa"
    return "flash_attention_2"
