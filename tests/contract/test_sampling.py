"""How tokens are chosen and where the text ends, through the real Cog server."""

import json
from typing import Any

import pytest

from kimi_vl.output.budget import ENOUGH

SUM: dict[str, Any] = {"prompt": "What is 12 + 7?", "temperature": 0.0}


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_k": 1.0}, {"min_p": 1}])
def test_one_candidate_is_the_likeliest(server: Any, change: dict[str, Any]) -> None:
    drawn = server.predict(**SUM | {"temperature": 2} | change)
    assert drawn["output"] == server.predict(**SUM)["output"]


@pytest.mark.parametrize("change", [{"repetition_penalty": 5}, {"frequency_penalty": 2, "presence_penalty": 2.0}])
def test_penalties_change_an_answer_and_not_the_next(server: Any, change: dict[str, Any]) -> None:
    request: dict[str, Any] = {"prompt": "Tell me more.", "temperature": 2, "seed": 1, "max_new_tokens": 60}
    plain = server.predict(**request)["output"]
    penalised = server.predict(**request, **change)
    assert penalised["status"] == "succeeded"
    assert penalised["output"] != plain
    assert server.predict(**request)["output"] == plain


@pytest.mark.parametrize("stream", [False, True])
def test_a_thinking_budget(server: Any, stream: bool) -> None:
    events = list(server.events(**SUM, thinking_budget=5, stream=stream))
    chunks = [data["chunk"] for kind, data in events if kind == "output"]
    assert "".join(chunk["thinking"] for chunk in chunks).endswith(ENOUGH)
    assert "".join(chunk["answer"] for chunk in chunks)
    metrics = events[-1][1]["metrics"]
    assert metrics["finish_reason"] == "stop"
    assert metrics["thinking_tokens"] > 5
    assert server.predict(**SUM)["output"][0]["answer"] == "19"


def test_no_thinking(server: Any) -> None:
    result = server.predict(**SUM, thinking_budget=0, max_new_tokens=30)
    (output,) = result["output"]
    assert output["thinking"] == ""
    assert output["answer"]
    assert result["metrics"]["thinking_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_alone(server: Any, stream: bool) -> None:
    (plain,) = server.predict(**SUM)["output"]
    events = list(server.events(**SUM, stop=["zzz", "9"], stream=stream))
    chunks = [data["chunk"] for kind, data in events if kind == "output"]
    assert "".join(chunk["thinking"] for chunk in chunks) == plain["thinking"]
    assert "9" in plain["thinking"]
    assert "".join(chunk["answer"] for chunk in chunks) == "1"
    assert events[-1][1]["metrics"]["finish_reason"] == "stop"


def test_a_stop_string_ends_a_text_without_end(endless: Any) -> None:
    result = endless.predict(**SUM, stop=["19"], max_new_tokens=8000)
    assert result["output"][0]["answer"] == ""
    assert result["metrics"]["finish_reason"] == "stop"


def test_the_metrics_tell_how_long_each_stage_took(server: Any) -> None:
    metrics = server.predict(**SUM)["metrics"]
    assert set(metrics["timings"]) == {"preprocess", "queue", "prefill", "first_token", "decode"}
    assert 0 < sum(metrics["timings"].values()) < 2 * metrics["predict_time"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": ["a"] * 9}, "The request has 9 stop strings and the limit is 8; send fewer."),
        ({"stop": [""]}, "The first stop string has 0 characters and must have from 1 to 100."),
        ({"stop": ["a", "b" * 101]}, "The second stop string has 101 characters and must have from 1 to 100."),
    ],
)
def test_bad_stop_strings_fail_with_one_sentence(server: Any, change: dict[str, Any], message: str) -> None:
    assert server.refusal(**SUM | change) == message
    assert server.predict(**SUM)["output"][0]["answer"] == "19"


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"thinking_budget": -2},
        {"thinking_budget": "many"},
        {"stop": "9"},
        {"stop": [9]},
    ],
)
def test_what_the_schema_rules_out_is_refused_before_it_runs(server: Any, change: dict[str, Any]) -> None:
    detail, *_ = server.predict(**SUM | change)["detail"]
    assert detail["loc"][2].partition("/")[0] == next(iter(change))


def test_an_answer_by_a_schema_is_json(server: Any) -> None:
    schema = {"type": "array", "items": {"enum": ["red", 19]}, "minItems": 2, "maxItems": 2}
    (output,) = server.predict(**SUM, json_schema=json.dumps(schema))["output"]
    assert output["thinking"]
    assert set(json.loads(output["answer"])) <= {"red", 19}
    message = 'json_schema cannot be enforced: Unimplemented keys: ["not"]; leave that out or change it.'
    assert server.refusal(**SUM, json_schema='{"not": {}}') == message
    assert server.predict(**SUM)["output"][0]["answer"] == "19"
