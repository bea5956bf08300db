"""The fast engine with fewer bits, with the tiny model on the CPU: it still reads, and is nearly as sure."""

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from kimi_vl.engine.base import ModelInputs
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES
from tests.tiny_questions import answered, asked, divergence, is_right, log_probabilities

QUESTIONS = 8  # one of each family
WRONG = {"int8": 0, "int4": 1}  # answers that may be wrong where they are right with all bits
DIVERGENCE = {"int8": 1e-6, "int4": 1e-4}  # a token's, at the mean


@pytest.fixture(scope="module")
def engine(network: Network) -> Iterator[FastEngine]:
    with closing(FastEngine(network)) as engine:
        yield engine


@pytest.fixture(scope="module")
def given(engine: FastEngine) -> list[tuple[ModelInputs, list[int], bool]]:
    """Questions, with what the model answers with all bits, and whether that is right."""
    answers = [(answer, inputs, answered(engine, inputs)) for answer, inputs in asked(QUESTIONS)]
    return [(inputs, tokens, is_right(tokens, answer)) for answer, inputs, tokens in answers]


@pytest.mark.parametrize("name", WRONG)
def test_answers_as_with_all_bits(
    name: str,
    network: Network,
    engine: FastEngine,
    given: list[tuple[ModelInputs, list[int], bool]],
) -> None:
    wrong, divergences = 0, []
    with closing(FastEngine(network.quantised(SCHEMES[name]))) as quantised:
        for (answer, _), (inputs, tokens, right) in zip(asked(QUESTIONS), given, strict=True):
            wrong += right and not is_right(answered(quantised, inputs), answer)
            pair = [log_probabilities(each, inputs, tokens) for each in (engine, quantised)]
            divergences.append(divergence(*pair))
    mean = float(torch.cat(divergences).mean())
    print(f"{name}: {wrong} of {QUESTIONS} wrong, a token's divergence {mean:.1e}")
    assert sum(right for _, _, right in given) >= 0.8 * QUESTIONS
    assert wrong <= WRONG[name]
    assert 0 < mean < DIVERGENCE[name]
