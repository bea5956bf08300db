"""What is kept of a grammar's trial: what the grammar did, and nothing that was done to it."""

import subprocess
from collections.abc import Iterator
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from kimi_vl.output import grammar_check
from kimi_vl.output.grammar_check import is_affordable

GOOD = 'start: "a"\n'
ENDLESS = 'start: %json {"multipleOf": 2147483648}\n'
CRASHES = 'start: %json {"const": -9223372036854775808}\n'


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    is_affordable.cache_clear()
    yield
    is_affordable.cache_clear()


@pytest.mark.parametrize(
    ("grammar", "affordable"), [(GOOD, True), ("no grammar", True), (ENDLESS, False), (CRASHES, False)]
)
def test_a_verdict_on_a_grammar_is_kept(grammar: str, affordable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_affordable(grammar) == affordable
    monkeypatch.delattr(grammar_check.subprocess, "run")
    assert is_affordable(grammar) == affordable


@pytest.mark.parametrize("status", [-SIGKILL, -SIGTERM, 1])
def test_what_befalls_the_process_is_no_verdict(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], status))
        with pytest.raises(RuntimeError, match=f"status {status}"):
            is_affordable(GOOD)
    assert is_affordable(GOOD)


def test_a_busy_machine_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired([], 30)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", late)
        with pytest.raises(subprocess.TimeoutExpired):
            is_affordable(GOOD)
    assert is_affordable(GOOD)
