"""What the engine takes of a GPU's memory: how long a context fits, and with how many bits a longer one would."""

import torch

from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES, Scheme, find_scheme
from kimi_vl.engine.fast.weights import Weights
from kimi_vl.errors import Misconfigured

SHORTEST = 4096  # tokens of context with which it is worth to start
USUAL = 32_768  # tokens of context for which weights are made smaller
WORKING_BYTES = 3_350_000_000  # left beside weights and cache for a prompt's activations, captured graphs and features


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


def scheme_that_fits(quantization: str, network: Network, free: int) -> Scheme:
    """The scheme that KIMI_VL_QUANTIZATION says; "auto" is the first that leaves room for a context of USUAL tokens.

    Args:
        quantization: one of SCHEMES, or "auto".
        network: of 16 bits, on any device: of its tensors only the sizes count.
        free: bytes of GPU memory that there are for it and its engine.
    Raises:
        Misconfigured: there is no such quantization.
    """
    longest = min(USUAL, network.config.text_config.max_position_embeddings)
    beside = WORKING_BYTES + network.weights.token_bytes * longest
    needed = {name: network.quantised(scheme).nbytes + beside for name, scheme in SCHEMES.items()}
    return find_scheme(quantization, needed, free)
