"""The reference engine: transformers' generate(), on any device."""

from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from kimi_vl.engine.base import Constraint, Engine, Generation, ModelInputs, SamplingParams, allowed
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
        params = generation.params
        listener = _Listener(generation)
        device = self.model.device
        input_ids = inputs.input_ids.to(device)
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_generation_config(params),
            logits_processor=_processors(generation, input_ids.shape[1], listener),
            streamer=listener,
            stopping_criteria=[listener],
            **{name: tensor.to(device) for name, tensor in inputs.tensors().items()},
        )


class _Listener(BaseStreamer, StoppingCriteria):
    """Hands each token on as generate() makes it, and stops generate() when no more is wanted."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.wanted = True
        self.started = monotonic()
        self.prompt_seen = False
        self.forced: list[int] = []  # what comes next

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # generate() puts the prompt first
            self.prompt_seen = True
        elif self.wanted:
            token = int(value)
            self.generation.timings.setdefault("prefill", monotonic() - self.started)  # the pictures' part included
            self.wanted = self.generation.emit(token)
            if self.wanted and self.generation.constraint:
                self.generation.constraint.accept(token)
            if self.forced:
                self.forced.pop(0)
            elif self.wanted:
                self.forced = list(self.generation.forced_after(token))

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), not self.wanted, device=input_ids.device)


class _Force(LogitsProcessor):
    """Leaves only the token that must come next, where one must."""

    def __init__(self, listener: _Listener) -> None:
        self.listener = listener

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.listener.forced:
            return scores
        only = torch.full_like(scores, float("-inf"))
        only[:, self.listener.forced[0]] = 0
        return only


class _Restrict(LogitsProcessor):
    """Leaves the tokens that a constraint allows."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(~allowed(self.constraint.mask(), scores.shape[-1]).to(scores.device), float("-inf"))


class _Penalise(LogitsProcessor):
    """The penalties of vLLM, over generated tokens only."""

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self.params = params
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[-1])
        repetition = self.params.repetition_penalty
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(counts > 0, repeated, scores) - self.params.frequency_penalty * counts
        return scores - self.params.presence_penalty * (counts > 0)


def _generation_config(params: SamplingParams) -> GenerationConfig:
    # all that changes logits is in the processors
    choice: dict[str, Any] = {} if params.greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        do_sample=not params.greedy,
        max_new_tokens=params.max_new_tokens,
        pad_token_id=min(params.stop_ids),
        **choice,
    )


def _processors(generation: Generation, prompt_length: int, listener: _Listener) -> LogitsProcessorList:
    """In vLLM's order: what is allowed, penalties, temperature, min_p, top_k, top_p; and last, what is forced."""
    params = generation.params
    processors: list[LogitsProcessor] = []
    if generation.constraint:
        processors.append(_Restrict(generation.constraint))
    if params.penalises:
        processors.append(_Penalise(params, prompt_length))
    if not params.greedy:
        processors.append(TemperatureLogitsWarper(params.temperature))
        if params.min_p > 0:
            processors.append(MinPLogitsWarper(params.min_p))
        if params.top_k > 0:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
    return LogitsProcessorList([*processors, _Force(listener)])
