"""The thinking is held within its budget, with the tiny model in both engines."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kimi_vl.engine.base import Engine, ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.variants import VARIANTS, WEIGHTS, Variant
from kimi_vl.output.budget import ENOUGH, ThinkingBudget
from kimi_vl.output.pacing import joined
from kimi_vl.output.thinking import CLOSING, OPENING, Delta
from kimi_vl.prompt.chat import answer_prefix
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Answer, Service
from kimi_vl.settings import Settings

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
encode = processor.tokenizer.encode_text
pool = ThreadPoolExecutor(1)
OPEN, SENTENCE, CLOSE = encode(OPENING), encode(ENOUGH), encode(CLOSING)


@pytest.fixture(scope="module")
def fast() -> Iterator[FastEngine]:
    network = load_network(WEIGHTS / "tiny", torch.device("cpu"), torch.float32, "none", lambda line: None)
    engine = FastEngine(network, answer_prefix(processor.tokenizer))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[ReferenceEngine]:
    engine = ReferenceEngine(load_model(WEIGHTS / "tiny", torch.device("cpu"), torch.float32))
    yield engine
    engine.close()


def random_prompt(chance: random.Random) -> str:
    sums = f"What is {chance.randrange(100)} + {chance.randrange(100)}?"
    return chance.choice([sums, "".join(chance.choices("abc de 12?+\n◁/▷é", k=chance.randrange(1, 20)))])


def test_the_budget_holds_over_200_random_prompts(fast: FastEngine, reference: ReferenceEngine) -> None:
    """A thinking is what it is without a budget, up to the limit and a whole character; then only what closes it."""
    chance, closed = random.Random(5), 0
    for number in range(200):
        inputs, budget = processor.prepare((), random_prompt(chance), pool), chance.randrange(1, 15)
        params = SamplingParams(
            len(OPEN) + budget + len(CLOSE),
            processor.tokenizer.stop_ids,
            temperature=chance.choice([0.0, 1.0, 3.0]),
            seed=number,
        )
        free = list(fast.generate(inputs, params))
        bounded = within(budget, fast, inputs, params)
        if params.temperature == 0 and number % 4 == 0:
            assert bounded == within(budget, reference, inputs, params)
        kept = len(OPEN) + budget
        if free[: len(OPEN)] != OPEN:  # at a high temperature it may answer at once
            assert bounded[: len(free)] == free
            continue
        assert bounded[: min(kept, len(free))] == free[:kept]
        until_closed = next((n for n in range(len(bounded) + 1) if CLOSING in text(bounded[:n])), None)
        if text(bounded[:until_closed]).endswith(ENOUGH + CLOSING):
            closed += 1
            own = bounded[: until_closed - len(SENTENCE) - len(CLOSE)]
            assert bounded[len(own) : until_closed] == [*SENTENCE, *CLOSE]
            assert own == free[: len(own)]
            assert len(own) >= kept
            assert all(text(own[:count]).endswith("�") for count in range(kept, len(own)))
        elif until_closed is None:
            assert len(bounded) < kept, "it ended by itself"
        else:
            assert until_closed - len(CLOSE) <= kept
    assert 50 < closed < 190


def text(tokens: list[int]) -> str:
    return b"".join(map(processor.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")


def within(budget: int, engine: Engine, inputs: ModelInputs, params: SamplingParams) -> list[int]:
    longer = replace(params, max_new_tokens=params.max_new_tokens + len(SENTENCE) + 2)
    return list(engine.generate(inputs, longer, ThinkingBudget(budget, processor.tokenizer)))


def ask(engine: Engine, request: Request, variant: Variant = VARIANTS["tiny"]) -> tuple[Delta, Answer]:
    answer = Service(Settings(), variant, processor, engine).answer(request)
    return joined(answer), answer


SUM = Request("What is 12 + 7?")


def test_a_thinking_that_is_cut_is_followed_by_an_answer(fast: FastEngine, reference: ReferenceEngine) -> None:
    for engine in (fast, reference):
        text, answer = ask(engine, replace(SUM, thinking_budget=6))
        assert text.thinking.endswith(ENOUGH)
        assert text.answer
        usage = answer.usage
        assert usage.thinking_tokens == len(OPEN) + 6 + len(SENTENCE) + len(CLOSE)
        assert usage.answer_tokens > 0
        assert usage.finish_reason == "stop"


@pytest.mark.parametrize("budget", [-1, 100])
def test_a_thinking_within_its_budget_is_left_alone(reference: ReferenceEngine, budget: int) -> None:
    text, _ = ask(reference, replace(SUM, thinking_budget=budget))
    assert text == ask(reference, SUM)[0]
    assert text.answer == "19"


def test_the_longest_output_bounds_what_closes_the_thinking(reference: ReferenceEngine) -> None:
    longest = len(OPEN) + 6 + 3
    text, answer = ask(reference, replace(SUM, thinking_budget=6, max_new_tokens=longest))
    assert (answer.usage.thinking_tokens, answer.usage.answer_tokens) == (longest, 0)
    assert answer.usage.finish_reason == "length"
    assert text.answer == ""


def test_without_thinking_everything_is_answer(fast: FastEngine, reference: ReferenceEngine) -> None:
    for engine in (fast, reference):
        text, answer = ask(engine, replace(SUM, thinking_budget=0, max_new_tokens=30))
        assert text.thinking == ""
        assert text.answer
        assert answer.usage.thinking_tokens == 0
        assert answer.usage.input_tokens == ask(engine, SUM)[1].usage.input_tokens + len(
            encode(f"{OPENING}\n\n{CLOSING}")
        )


@pytest.mark.parametrize("budget", [0, 1])
def test_a_model_that_does_not_think_has_no_budget(reference: ReferenceEngine, budget: int) -> None:
    instruct = Variant(0.0, thinks=False)
    request = replace(SUM, max_new_tokens=20)
    assert ask(reference, replace(request, thinking_budget=budget), instruct)[0] == ask(reference, request, instruct)[0]
