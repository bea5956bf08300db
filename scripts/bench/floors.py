"""What must at least be read or computed, by the model's own sizes."""

from collections.abc import Sequence
from math import prod

from kimi_vl.engine.fast.weights import Weights
from kimi_vl.model.modeling import KimiVLForConditionalGeneration


def token_bytes(weights: Weights, context: int) -> float:
    """Bytes that must be read to decode one token: its share of the weights, and the latent cache."""
    experts = sum(mlp.gate_up.nbytes + mlp.down.nbytes for _, mlp in weights.layers)
    chosen = sum(
        (mlp.gate_up.nbytes + mlp.down.nbytes) * mlp.chosen / len(mlp.router) for _, mlp in weights.layers if mlp.chosen
    )
    row = weights.row * weights.embeddings.element_size()
    return weights.nbytes - weights.embeddings.nbytes - experts + chosen + len(weights.layers) * row * context


def prompt_operations(model: KimiVLForConditionalGeneration, length: int) -> float:
    """Floating-point operations of a prompt: two for each weight that a token uses, and causal attention.

    Of the last layer only the rows of the cache count, since nothing else in it depends on all tokens.
    """
    text = model.config.text_config
    head = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim
    attention = (text.num_hidden_layers - 1) * text.num_attention_heads * head * length * length
    return 2.0 * _weights_of_a_token(model) * length + attention


def picture_operations(model: KimiVLForConditionalGeneration, grids: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations of MoonViT and projector over pictures of rows x columns patches.

    Two for each weight that a patch, or in the projector a block of merged ones, goes through, and attention within
    each picture.
    """
    vision = model.config.vision_config
    tower = sum(
        parameter.numel()
        for name, parameter in model.model.vision_tower.named_parameters()
        if parameter.dim() > 1 and "position_embeddings" not in name
    )
    projector = sum(parameter.numel() for parameter in model.model.mm_projector.parameters() if parameter.dim() > 1)
    weights = tower + projector / prod(vision.merge_kernel_size)
    width = vision.num_hidden_layers * vision.hidden_size
    return sum(2.0 * weights * patches + 4.0 * width * patches**2 for patches in map(prod, grids))


def _weights_of_a_token(model: KimiVLForConditionalGeneration) -> int:
    """Numbers that each token of a prompt uses: of the routed experts, those that are chosen for it."""
    text = model.config.text_config
    *layers, last = model.model.language_model.layers
    used = last.self_attn.kv_a_proj_with_mqa.weight.numel()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            chosen = text.num_experts_per_tok / text.n_routed_experts if ".experts." in name else 1
            used += int(parameter.numel() * chosen)
    return used
