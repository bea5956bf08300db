"""What the engine takes of a GPU's memory: how long a context fits, and with how many bits a longer one would."""

import torch

from kimi_vl.engine.fast.scheme import SCHEMES, find_scheme
from kimi_vl.engine.fast.weights import Weights
from kimi_vl.errors import Misconfigured
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

SHORTEST = 4096  # tokens of context with which it is worth to start
USUAL = 32_768  # tokens of context for which weights are made smaller
WORKING_BYTES = 3_500_000_000  # left beside weights and cache for a prompt's activations and captured graphs


def context_that_fits(weights: Weights, longest: int) -> int:
    """Tokens whose cache and rotary table fit in the memory that is free, at most the model's longest context.

    Raises:
        Misconfigured: not even a short conversation fits.
    """
    device = weights.embeddings.device
    if device.type != "cuda":
        return longest
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    token_bytes = weights.token_bytes
    context = min(longest, (free - WORKING_BYTES) // token_bytes)
    if context < min(longest, SHORTEST):
        needed = WORKING_BYTES + SHORTEST * token_bytes
        raise Misconfigured(
            f"beside the weights the GPU has {free / 1e9:.1f} GB free, and answering takes {needed / 1e9:.1f} GB; "
            "free some, or use a larger GPU"
        )
    return context


def weights_that_fit(model: KimiVLForConditionalGeneration, quantization: str) -> Weights:
    """The weights of a model on a GPU, in the bits that KIMI_VL_QUANTIZATION says.

    Raises:
        Misconfigured: there is no such quantization.
    """
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_allocated(model.device)
    return Weights.of(model).quantised(find_scheme(quantization, bytes_needed(model.config), free))


def bytes_needed(config: KimiVLConfig) -> dict[str, int]:
    """Bytes of GPU memory that a model and its engine take for a context of USUAL tokens, with each of SCHEMES."""
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(config).to(torch.bfloat16)
    weights = Weights.of(model)
    context = min(USUAL, config.text_config.max_position_embeddings)
    encoder = [*model.model.vision_tower.parameters(), *model.model.mm_projector.parameters()]
    beside = sum(parameter.nbytes for parameter in encoder) + WORKING_BYTES + weights.token_bytes * context
    return {name: weights.quantised(scheme).nbytes + beside for name, scheme in SCHEMES.items()}
