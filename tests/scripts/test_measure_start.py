"""The measurement's parts with the tiny model; what it measures here says nothing."""

import json
import subprocess
from time import time
from types import SimpleNamespace

import measure_start
import pytest

from kimi_vl.model.variants import WEIGHTS

TINY = WEIGHTS / "tiny"


def test_a_start_passes_through_all_steps_in_order() -> None:
    passed = measure_start.once("reference", TINY, "none", time() - 100)
    assert tuple(passed) == measure_start.STEPS
    assert sorted(passed.values()) == list(passed.values())
    assert passed["imported"] >= 100, "counted from when the process was started"


def test_each_start_but_the_first_of_a_round_finds_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches: list[str] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        assert not env["PYTHONDONTWRITEBYTECODE"]
        caches.append(env["TRITON_CACHE_DIR"])
        ready = 10.0 * len(caches)
        found = {"imported": 1.0, "loaded": 2.0, "ready": ready, "first token": ready + 1}
        return SimpleNamespace(stdout=f"a warning\n{json.dumps(found)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    measure_start.measure(TINY, "none", repeats=2)
    not_counted, *rounds = caches[:1], caches[1:4], caches[4:]
    assert all(len(set(caches)) == 1 for caches in rounds)
    assert len({not_counted[0], rounds[0][0], rounds[1][0]}) == 3
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| fast engine, nothing compiled | 1.0 s | 2.0 s | 35.0 s | 36.0 s | 20.0 - 50.0 s |"
    assert len(rows) == 2 + len(measure_start.STARTS)
