"""Each figure, measured end to end through an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from kimi_vl.engine.base import Engine, ModelInputs, SamplingParams
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.prompt.chat import question, render
from kimi_vl.prompt.processor import KimiVLProcessor

SKIPPED = 8  # tokens, until the pace is steady


@dataclass(frozen=True)
class Figure:
    """Something that was measured several times."""

    name: str
    values: list[float]  # seconds
    floor: float  # seconds that the machine's ceilings allow; 0 where none is known

    @property
    def median(self) -> float:
        """In seconds."""
        return median(self.values)


def text_inputs(model: KimiVLForConditionalGeneration, length: int, seed: int) -> ModelInputs:
    """A prompt of random ordinary tokens, never the same twice."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = model.config.text_config.vocab_size - 256
    return ModelInputs(torch.randint(0, ordinary, (1, length), generator=generator))


def params(model: KimiVLForConditionalGeneration, new_tokens: int) -> SamplingParams:
    """Draws of a request that no token ends."""
    return SamplingParams(new_tokens, frozenset((model.config.text_config.vocab_size,)), temperature=1.0, seed=1)


def arrivals(engine: Engine, inputs: ModelInputs, sampling: SamplingParams) -> list[float]:
    """When each token came, in seconds from the request."""
    started = perf_counter()
    return [perf_counter() - started for _ in engine.generate(inputs, sampling)]


def decode(
    engine: Engine, model: KimiVLForConditionalGeneration, context: int, tokens: int, repeats: int, bandwidth: float
) -> Figure:
    """Seconds for one token after so many others."""
    values = []
    for repeat in range(repeats):
        times = arrivals(engine, text_inputs(model, context, repeat), params(model, tokens))
        values.append((times[-1] - times[SKIPPED]) / (len(times) - 1 - SKIPPED))
    floor = bytes_of_a_token(model, context + tokens // 2) / bandwidth
    figure = Figure(f"decode, a token at context {context:,}", values, floor)
    if figure.median < floor:
        raise SystemExit(f"{figure.name} took {figure.median:.2e} s, less than its floor of {floor:.2e} s: a mistake")
    return figure


def prefill(engine: Engine, model: KimiVLForConditionalGeneration, length: int, repeats: int, rate: float) -> Figure:
    """Seconds from a prompt of tokens to the first one drawn."""
    runs = [arrivals(engine, text_inputs(model, length, 1000 + n), params(model, 1)) for n in range(repeats + 1)]
    return Figure(f"prefill, {length:,} tokens", [run[0] for run in runs[1:]], prefill_operations(model, length) / rate)


def first_token(
    engine: Engine,
    model: KimiVLForConditionalGeneration,
    processor: KimiVLProcessor,
    sizes: Sequence[tuple[int, int]],
    repeats: int,
) -> list[Figure]:
    """Seconds from decoded pictures and a short question to the first token; and again with one more turn."""
    first: list[float] = []
    second: list[float] = []
    for repeat in range(repeats + 1):
        pictures = [random_picture(size, repeat * 100 + n) for n, size in enumerate(sizes)]
        turns: list[Any] = [question("What is in the picture?", len(pictures))]
        for values in (first, second):
            started = perf_counter()
            features = processor(pictures, render(turns))
            inputs = ModelInputs(features["input_ids"], features["pixel_values"], features["image_grid_hws"])
            arrivals(engine, inputs, params(model, 1))
            values.append(perf_counter() - started)
            turns += [{"role": "assistant", "content": "A house."}, {"role": "user", "content": "Which colour has it?"}]
    what = f"{len(sizes)} of {sizes[0][0]}x{sizes[0][1]}"
    return [
        Figure(f"to the first token, {what}", first[1:], 0.0),
        Figure(f"to the first token, {what}, the next turn", second[1:], 0.0),
    ]


def random_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise that no other picture shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def bytes_of_a_token(model: KimiVLForConditionalGeneration, context: int) -> int:
    """Bytes that must be read to decode one token: its share of the weights, and the latent cache."""
    text = model.config.text_config
    read = model.lm_head.weight.nbytes
    for name, parameter in model.model.language_model.named_parameters():
        share = text.num_experts_per_tok / text.n_routed_experts if ".experts." in name else 1
        read += 0 if "embed_tokens" in name else int(parameter.nbytes * share)
    row = (text.kv_lora_rank + text.qk_rope_head_dim) * model.lm_head.weight.element_size()
    return read + text.num_hidden_layers * row * context


def prefill_operations(model: KimiVLForConditionalGeneration, length: int) -> float:
    """Floating-point operations of a prompt: two for each weight that a token uses, and causal attention."""
    text = model.config.text_config
    weights = bytes_of_a_token(model, 0) - model.lm_head.weight.nbytes
    weights //= model.lm_head.weight.element_size()
    head = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim
    attention = text.num_hidden_layers * text.num_attention_heads * head * length * length
    return 2.0 * weights * length + attention
