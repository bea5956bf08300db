"""The training network's weights as an official Kimi-VL folder, and back."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.tokenizer import TikTokenTokenizer
from tiny.network import LATENT, NOPE, ROTARY, VALUE, Sizes, TinyKimiVL

CONTEXT = 8192
RENAMED = [  # training name → official name
    (r"^patch\.", "vision_tower.patch_embed.proj."),
    (r"^positions$", "vision_tower.patch_embed.pos_emb.weight"),
    (r"^blocks\.", "vision_tower.encoder.blocks."),
    (r"^final_layernorm\.", "vision_tower.encoder.final_layernorm."),
    (r"^(pre_norm|linear_1|linear_2)\.", r"multi_modal_projector.\1."),
    (r"^(embed_tokens|norm|layers)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"\.mlp\.balance$", ".mlp.gate.e_score_correction_bias"),
]
EXPERTS = r"\.mlp\.(gate|up|down)_proj$"  # stacked, where a dense MLP has .weight


def official_tensors(model: TinyKimiVL) -> dict[str, Tensor]:
    """bfloat16 tensors under the official names; the router's bias in float32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("labels."):
            continue
        official = _official_name(name)
        if projection := re.search(EXPERTS, official):
            stem = official[: projection.start()]
            for expert, weight in enumerate(tensor):
                tensors[f"{stem}.mlp.experts.{expert}.{projection[1]}_proj.weight"] = weight
        else:
            tensors[official] = tensor.view(-1, 3, 14, 14) if name == "patch.weight" else tensor
    return {
        name: tensor.detach().cpu().to(torch.float32 if "correction" in name else torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }


def load_official(model: TinyKimiVL, folder: Path) -> None:
    """Fills the network with a checkpoint folder's tensors."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    state: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        official = _official_name(name)
        if name.startswith("labels."):
            state[name] = own
        elif projection := re.search(EXPERTS, official):
            stem = official[: projection.start()]
            experts = [f"{stem}.mlp.experts.{expert}.{projection[1]}_proj.weight" for expert in range(len(own))]
            state[name] = torch.stack([tensors[expert] for expert in experts])
        else:
            state[name] = tensors[official].view(own.shape)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def save_official(model: TinyKimiVL, tokenizer: TikTokenTokenizer, folder: Path) -> None:
    """Writes model.safetensors and the official folder's other files."""
    save_file(official_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    ImageProcessor().save_pretrained(folder)
    for name, content in {
        "config.json": config(model.sizes, tokenizer),
        "generation_config.json": {"do_sample": False, "eos_token_id": sorted(tokenizer.stop_ids)},
        "tokenizer_config.json": {"tokenizer_class": "TikTokenTokenizer", "model_max_length": CONTEXT},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def config(sizes: Sizes, tokenizer: TikTokenTokenizer) -> dict[str, Any]:
    """config.json in Moonshot's layout."""
    control = tokenizer.control
    text = {
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": CONTEXT,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.dense_mlp,
        "moe_intermediate_size": sizes.expert_mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "n_shared_experts": sizes.shared_experts,
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.chosen_experts,
        "routed_scaling_factor": sizes.expert_scale,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": LATENT,
        "q_lora_rank": None,
        "qk_rope_head_dim": ROTARY,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": VALUE,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": control["[BOS]"],
        "eos_token_id": control["[EOS]"],
        "pad_token_id": control["[PAD]"],
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "moonvit",
        "patch_size": 14,
        "hidden_size": sizes.vision_width,
        "num_attention_heads": sizes.vision_heads,
        "num_hidden_layers": sizes.vision_layers,
        "intermediate_size": sizes.vision_mlp,
        "init_pos_emb_height": sizes.position_table,
        "init_pos_emb_width": sizes.position_table,
        "merge_kernel_size": [2, 2],
    }
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "text_config": text,
        "vision_config": vision,
        "media_placeholder_token_id": control["<|media_pad|>"],
        "vocab_size": sizes.vocabulary,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _official_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
