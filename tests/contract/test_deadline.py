"""timeout_s and KIMI_VL_MAX_SECONDS through the real Cog server."""

from typing import Any

import pytest

LONG: dict[str, Any] = {"prompt": "What is 12 + 7?", "temperature": 0, "max_new_tokens": 8000}  # to the endless model


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_made_by_then_is_returned(endless: Any, stream: bool) -> None:
    events = list(endless.events(**LONG, timeout_s=1, stream=stream))
    chunks = [data["chunk"] for kind, data in events if kind == "output"]
    assert "".join(chunk["thinking"] for chunk in chunks)
    kind, result = events[-1]
    assert kind == "completed"
    assert result["metrics"]["finish_reason"] == "timeout"
    assert 1 < result["metrics"]["predict_time"] < 3
    assert endless.predict(**LONG | {"max_new_tokens": 3})["metrics"]["finish_reason"] == "length"


def test_a_time_too_short_for_anything_returns_nothing(server: Any) -> None:
    result = server.predict(**LONG, timeout_s=1e-6)
    assert result["status"] == "succeeded"
    assert result["output"] == [{"thinking": "", "answer": ""}]
    assert result["metrics"]["finish_reason"] == "timeout"
    assert server.predict(**LONG, timeout_s=60)["output"][0]["answer"] == "19"


@pytest.mark.parametrize("seconds", [-1, 86_401, "long"])
def test_what_the_schema_rules_out_is_refused_before_it_runs(server: Any, seconds: object) -> None:
    (detail,) = server.predict(**LONG, timeout_s=seconds)["detail"]
    assert detail["loc"] == ["body", "input", "timeout_s"]
