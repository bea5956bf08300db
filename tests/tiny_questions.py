"""Questions that the tiny model can answer, how it answers them, and how sure it is of each token."""

from concurrent.futures import ThreadPoolExecutor
from random import Random

import torch
from tiny.pictures import Fonts
from tiny.questions import FAMILIES, make
from torch import Tensor

from kimi_vl.engine.base import Engine, ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import question, render
from kimi_vl.prompt.processor import KimiVLProcessor

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
pool = ThreadPoolExecutor(2)
GREEDY = SamplingParams(200, processor.tokenizer.stop_ids, temperature=0.0)


def asked(count: int) -> list[tuple[str, ModelInputs]]:
    """Answers and questions with their pictures, of all families in turn."""
    random, fonts = Random(123_456), Fonts.of_matplotlib()[0]
    result = []
    for number in range(count):
        example = make(random, fonts, list(FAMILIES)[number % len(FAMILIES)])
        pictures = [drawing.image for drawing in example.drawings]
        prompt = render([question(example.question, len(pictures))])
        result.append((example.answer, processor.prepare(pictures, prompt, pool)))
    return result


def answered(engine: Engine, inputs: ModelInputs) -> list[int]:
    """The likeliest tokens."""
    return list(engine.generate(inputs, GREEDY))


def is_right(tokens: list[int], answer: str) -> bool:
    """Whether the tokens end in the answer, after their thinking."""
    return processor.decode(tokens).endswith(f"◁/think▷{answer}")


@torch.inference_mode()
def log_probabilities(engine: FastEngine, inputs: ModelInputs, tokens: list[int]) -> Tensor:
    """[tokens, vocabulary] float64: of each token, after those before it."""
    engine._read(inputs)
    rows = [engine.decoder.logits.double().log_softmax(0)]
    for place, token in enumerate(tokens[:-1], start=inputs.input_ids.shape[1]):
        engine.decoder._buffers.x.copy_(engine.weights.embeddings[token])
        engine.decoder.position.fill_(place)
        engine.decoder.forward()
        rows.append(engine.decoder.logits.double().log_softmax(0))
    engine._seen = None  # the cache holds more than the prompt
    return torch.stack(rows)


def divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """[tokens]: Kullback-Leibler's, of log probabilities [tokens, vocabulary], in nats."""
    return (wanted.exp() * (wanted - got)).sum(1)
