"""Kimi-VL's config.json, read into transformers' Kimi_K25Config and written back in the official layout."""

from typing import Any

from transformers import DeepseekV3Config
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config, Kimi_K25VisionConfig

NO_TOKEN = -1  # an id that no prompt holds: Kimi-VL has no video placeholder


class KimiVLConfig(Kimi_K25Config):
    """A Kimi-VL checkpoint's configuration.

    Takes the official keys (vision_config of type moonvit, text_config of DeepSeek-V3 without a model_type,
    media_placeholder_token_id) and holds them as transformers' kimi_k25 and deepseek_v3 modules expect them.
    """

    model_type = "kimi_vl"

    def __init__(
        self,
        text_config: dict[str, Any] | DeepseekV3Config | None = None,
        vision_config: dict[str, Any] | Kimi_K25VisionConfig | None = None,
        media_placeholder_token_id: int = 163605,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        for derived in ("tie_word_embeddings", "projection_hidden_size", "image_token_id", "video_token_id"):
            kwargs.pop(derived, None)  # follow from the rest
        self.media_placeholder_token_id = media_placeholder_token_id
        self.ignore_index = ignore_index
        vision = _vision_config(vision_config or {})
        super().__init__(
            text_config=_text_config(text_config or {}),
            vision_config=vision,
            projection_hidden_size=vision.hidden_size,
            image_token_id=media_placeholder_token_id,
            video_token_id=NO_TOKEN,
            tie_word_embeddings=False,
            **kwargs,
        )

    def to_dict(self) -> dict[str, Any]:
        """The official config.json: the keys that Moonshot's checkpoints use, and none of kimi_k25's."""
        config = super().to_dict()
        for key in (
            "projection_hidden_size",
            "projection_layer_norm_eps",
            "image_token_id",
            "video_token_id",
        ):
            config.pop(key, None)
        config["vision_config"] = _official_vision(config["vision_config"])
        config["text_config"] = _official_text(config["text_config"])
        return config


def _text_config(config: dict[str, Any] | DeepseekV3Config) -> DeepseekV3Config:
    if isinstance(config, DeepseekV3Config):
        return config
    # num_nextn_predict_layers: Kimi-VL ships no multi-token-prediction layers, deepseek_v3 assumes one.
    official = {
        "rope_theta": 800000.0,
        "q_lora_rank": None,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }
    return DeepseekV3Config(**{**official, **config, "tie_word_embeddings": False})


def _vision_config(config: dict[str, Any] | Kimi_K25VisionConfig) -> Kimi_K25VisionConfig:
    if isinstance(config, Kimi_K25VisionConfig):
        return config
    names = {"init_pos_emb_height": "pos_emb_height", "init_pos_emb_width": "pos_emb_width"}
    return Kimi_K25VisionConfig(**{names.get(k, k): v for k, v in config.items() if k != "model_type"})


def _official_text(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.pop("rope_parameters")
    unused = ("model_type", "rope_interleave", "num_mtp_layers", "head_dim", "qk_head_dim")
    kept = {key: value for key, value in config.items() if key not in unused}
    return {**kept, "rope_theta": rope["rope_theta"], "rope_scaling": None}


def _official_vision(config: dict[str, Any]) -> dict[str, Any]:
    names = {"pos_emb_height": "init_pos_emb_height", "pos_emb_width": "init_pos_emb_width"}
    unused = ("pos_emb_time", "rope_parameters", "hidden_act")
    kept = {names.get(key, key): value for key, value in config.items() if key not in unused}
    return {**kept, "model_type": "moonvit"}
