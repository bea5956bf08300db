"""The reference engine: transformers' generate(), on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from kimi_vl.engine.base import Engine, Generation, ModelInputs, SamplingParams
from kimi_vl.model.modeling import KimiVLForConditionalGeneration


class ReferenceEngine(Engine):
    """Slow and right: every other engine is held to its answers."""

    def __init__(self, model: KimiVLForConditionalGeneration) -> None:
        super().__init__(model.config.text_config.max_position_embeddings)
        self.model = model
        model.generation_config = GenerationConfig()  # a checkpoint's own defaults must not mix with a request's

    @torch.inference_mode()
    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        torch.manual_seed(generation.params.seed)
        listener = _Listener(generation.emit)
        device = self.model.device
        input_ids = inputs.input_ids.to(device)
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_generation_config(generation.params),
            streamer=listener,
            stopping_criteria=[listener],
            **{name: tensor.to(device) for name, tensor in inputs.tensors().items()},
        )


class _Listener(BaseStreamer, StoppingCriteria):
    """Hands each token on as generate() makes it, and stops generate() when no more is wanted."""

    def __init__(self, emit: Callable[[int], bool]) -> None:
        self.emit = emit
        self.wanted = True
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # generate() puts the prompt first
            self.prompt_seen = True
        elif self.wanted:
            self.wanted = self.emit(int(value))

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), not self.wanted, device=input_ids.device)


def _generation_config(params: SamplingParams) -> GenerationConfig:
    if params.greedy:
        choice: dict[str, Any] = {"do_sample": False}
    else:
        choice = {
            "do_sample": True,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
        }
    return GenerationConfig(max_new_tokens=params.max_new_tokens, pad_token_id=min(params.stop_ids), **choice)
