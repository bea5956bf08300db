"""Answers by a schema, end to end in both engines with the tiny model: whatever it would say, it is valid JSON."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import pytest
import torch

from kimi_vl.engine.base import Engine, ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.errors import InvalidRequest
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.output.budget import ThinkingBudget
from kimi_vl.output.json_constraint import JsonConstraint, JsonConstraints
from kimi_vl.output.thinking import ThinkingSplitter
from kimi_vl.prompt.chat import answer_prefix, question, render
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Service
from kimi_vl.settings import Settings

TINY, CPU = WEIGHTS / "tiny", torch.device("cpu")
processor = KimiVLProcessor.from_pretrained(TINY)
constraints = JsonConstraints(processor.tokenizer)
pool = ThreadPoolExecutor(1)
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}
GREEDY = SamplingParams(150, processor.tokenizer.stop_ids, temperature=0.0)


def ask(text: str) -> ModelInputs:
    return processor.prepare([], render([question(text, 0)]), pool)


def by_schema() -> JsonConstraint:
    return constraints.by_schema(json.dumps(SCHEMA), thinks=True)


def parts(tokens: list[int]) -> tuple[str, str]:
    """Thinking and answer."""
    splitter = ThinkingSplitter()
    deltas = [splitter.feed(processor.decode(tokens)), splitter.close()]
    return "".join(delta.thinking for delta in deltas), "".join(delta.answer for delta in deltas)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    network = load_network(TINY, CPU, torch.float32, "none", lambda line: None)
    made = [
        FastEngine(network, answer_prefix(processor.tokenizer)),
        ReferenceEngine(load_model(TINY, CPU, torch.float32)),
    ]
    yield made
    for engine in made:
        engine.close()


def test_both_engines_answer_the_same_by_the_schema(engines: list[Engine]) -> None:
    inputs = ask("What is 12 + 7?")
    fast, reference = (list(engine.generate(inputs, GREEDY, constraint=by_schema())) for engine in engines)
    assert fast == reference
    thinking, answer = parts(fast)
    assert thinking, "it thinks as without a schema"
    jsonschema.validate(json.loads(answer), SCHEMA)


@pytest.mark.parametrize("change", [{}, {"top_p": 0.9}, {"top_k": 5, "frequency_penalty": 0.3}], ids=str)
def test_every_draw_is_valid(change: dict[str, float], engines: list[Engine]) -> None:
    for seed in range(7):
        params = replace(GREEDY, temperature=1.5, seed=seed, max_new_tokens=500, **change)
        outputs = []
        for _ in range(2):
            generation = engines[0].generate(ask("Which is it?"), params, constraint=by_schema())
            outputs.append(list(generation))
            assert generation.finish_reason == "stop"
        assert outputs[0] == outputs[1], "the same seed gives the same tokens"
        jsonschema.validate(json.loads(parts(outputs[0])[1]), SCHEMA)


def test_a_thinking_that_is_closed_by_its_budget_goes_before_it(engines: list[Engine]) -> None:
    for engine in engines:
        budget = ThinkingBudget(5, processor.tokenizer)
        thinking, answer = parts(list(engine.generate(ask("What is 12 + 7?"), GREEDY, budget, by_schema())))
        assert "enough" in thinking
        jsonschema.validate(json.loads(answer), SCHEMA)


@pytest.mark.parametrize("seed", [27, 29])
def test_a_budget_that_ends_inside_a_character_leaves_the_schema_as_it_is(seed: int, engines: list[Engine]) -> None:
    params = replace(GREEDY, temperature=2.0, repetition_penalty=3.0, seed=seed)
    for engine in engines:
        budget = ThinkingBudget(12, processor.tokenizer)
        thinking, answer = parts(list(engine.generate(ask("What is 5 - 5?"), params, budget, by_schema())))
        assert "�" not in thinking
        jsonschema.validate(json.loads(answer), SCHEMA)


def test_the_next_request_is_free_again(engines: list[Engine]) -> None:
    inputs = ask("What is 12 + 7?")
    for engine in engines:
        before = list(engine.generate(inputs, GREEDY))
        list(engine.generate(inputs, GREEDY, constraint=by_schema()))
        assert list(engine.generate(inputs, GREEDY)) == before


@pytest.mark.parametrize("thinking_budget", [-1, 0])
def test_the_service_takes_a_schema(thinking_budget: int) -> None:
    service = Service.load(Settings(model="tiny"))
    request = Request("What is 12 + 7?", json_schema=json.dumps(SCHEMA), thinking_budget=thinking_budget, temperature=0)
    with service.answer(request) as answer:
        text = "".join(delta.answer for delta in answer)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert (answer.usage.thinking_tokens > 0) == (thinking_budget != 0)
    with pytest.raises(InvalidRequest, match="json_schema is not JSON"):
        service.answer(replace(request, json_schema="{"))
    service.close()
