"""Figures of text: decoding and prefill, each end to end through the engine, and how its experts are used."""

from time import perf_counter

import torch

from bench.figure import Figure
from bench.floors import prompt_operations, token_bytes
from bench.subject import Subject
from kimi_vl.engine.base import Constraint, Engine, ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.output.json_constraint import JsonConstraints
from kimi_vl.prompt.chat import answer_prefix

SKIPPED = 8  # tokens, until the pace is steady
TURN = 64  # tokens of a short question


def decode(subject: Subject, context: int, schema: str = "") -> Figure:
    """Seconds between two tokens after so many others, as whoever reads them sees it; by a JSON Schema if there is one.

    Raises:
        SystemExit: it is faster than its floor, so something is not measured as it should be.
    """
    model, tokens, constraints = subject.model, subject.tokens, JsonConstraints(subject.processor.tokenizer)

    def run(number: int) -> float:
        constraint = constraints.by_schema(schema, thinks=False) if schema else None
        times = arrivals(subject.engine, text_inputs(model, context, number), sampling(model, tokens), constraint)
        return (times[-1] - times[SKIPPED]) / (len(times) - 1 - SKIPPED)

    floor = token_bytes(subject.weights, context + tokens // 2) / subject.ceilings.bandwidth
    figure = subject.measure(f"decode, a token at context {context:,}", run, floor, context)
    fastest = min(figure.values)
    if fastest < floor:
        raise SystemExit(
            f"{figure.name} took {1000 * fastest:.3g} ms, less than its floor of {1000 * floor:.3g} ms: a mistake"
        )
    return figure


def prefill(subject: Subject, length: int) -> Figure:
    """Seconds from a prompt of tokens to the first one drawn."""
    model = subject.model

    def run(number: int) -> float:
        return arrivals(subject.engine, text_inputs(model, length, 1000 + number), sampling(model, 1))[0]

    floor = prompt_operations(model, length) / subject.ceilings.rate
    return subject.measure(f"prefill, {length:,} tokens", run, floor)


def next_turn(subject: Subject, length: int) -> Figure:
    """Seconds from one more turn of TURN tokens to the first token drawn, where the prompt before it was just read.

    Raises:
        SystemExit: the fast engine computed again what it had just seen.
    """
    model, opening = subject.model, torch.tensor([answer_prefix(subject.processor.tokenizer)])

    def run(number: int) -> float:
        before = torch.cat([text_inputs(model, length, 3000 + number).input_ids, opening], 1)
        arrivals(subject.engine, ModelInputs(before), sampling(model, 1))
        turn = text_inputs(model, TURN, 4000 + number).input_ids
        times = arrivals(subject.engine, ModelInputs(torch.cat([before, turn, opening], 1)), sampling(model, 1))
        if subject.fast and subject.fast.cached_tokens < length:
            raise SystemExit(f"one more turn reused {subject.fast.cached_tokens} of {length} tokens: a mistake")
        return times[0]

    return subject.measure(f"one more turn after {length:,} tokens", run)


@torch.inference_mode()
def distinct_experts(engine: FastEngine, model: KimiVLForConditionalGeneration, tokens: int) -> list[int]:
    """How many experts of each layer that has a router were chosen at least once while tokens were decoded."""
    list(engine.generate(text_inputs(model, 64, 2000), sampling(model, 1)))
    steps = []
    for _ in range(tokens):
        engine.decoder.step()
        steps.append(engine.decoder.experts.clone())
    by_layer = torch.stack(steps, 1).cpu()  # [layers, tokens, chosen]
    pairs = zip(by_layer, engine.weights.layers, strict=True)
    return [len(experts[:, : mlp.chosen].unique()) for experts, (_, mlp) in pairs if mlp.chosen]


def text_inputs(model: KimiVLForConditionalGeneration, length: int, seed: int) -> ModelInputs:
    """A prompt of random ordinary tokens, never the same twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.text_config.vocab_size - 256, (1, length), generator=generator)
    return ModelInputs(ids.masked_fill_(ids == model.config.media_placeholder_token_id, 0))


def sampling(model: KimiVLForConditionalGeneration, new_tokens: int) -> SamplingParams:
    """Draws of a request that no token ends."""
    return SamplingParams(new_tokens, frozenset((model.config.text_config.vocab_size,)), temperature=1.0, seed=1)


def arrivals(
    engine: Engine, inputs: ModelInputs, params: SamplingParams, constraint: Constraint | None = None
) -> list[float]:
    """When each token came, in seconds from the request."""
    started = perf_counter()
    return [perf_counter() - started for _ in engine.generate(inputs, params, constraint=constraint)]
