"""The measurement goes all the way with a small checkpoint; what it measures here says nothing."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import measure_loading
import pytest
import torch
from bench import full_size

from kimi_vl.engine.fast.loading import load_network
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.variants import WEIGHTS

TINY = WEIGHTS / "tiny"
SMALL = {"num_hidden_layers": 2, "n_routed_experts": 8, "hidden_size": 64, "intermediate_size": 32}


@pytest.mark.parametrize("name", measure_loading.LOADERS)
def test_every_loader_runs_once(name: str) -> None:
    found = measure_loading.once(name, TINY)
    assert found["seconds"] > 0
    assert found["resident"] >= 0
    assert found.keys() == {"seconds", "resident", "pinned"}


def test_prints_the_median_and_the_most_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.2, 0.4, 0.3] * 2 * len(measure_loading.LOADERS))

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[2:] == [str(TINY), "--once", command[-1]]
        took = next(seconds)
        found = {"seconds": took, "resident": 1e10 * took, "pinned": 5e8}
        return SimpleNamespace(stdout=f"a warning\n{json.dumps(found)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    measure_loading.measure(TINY, repeats=3)
    rest = ": 0.30 s (0.20 - 0.40), 0.0 GB/s, 4.00 GB resident, 0.50 GB pinned"
    lines = [f"  {name}{rest}" for name in measure_loading.LOADERS]
    expected = ["0.0 GB from the page cache:", *lines, "0.0 GB from the disk:", *lines]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_random_checkpoint_is_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "TEXT", full_size.TEXT | SMALL)
    monkeypatch.setattr(full_size, "VISION", full_size.VISION | {"num_hidden_layers": 1, "hidden_size": 64})
    monkeypatch.setattr(full_size, "SHARD_BYTES", 25_000_000)
    full_size.save_random(tmp_path, torch.device("cpu"))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert len({tensor.path for tensor in inspect_folder(tmp_path)}) == len(shards)
    network = load_network(tmp_path, torch.device("cpu"), torch.bfloat16, "none", lambda line: None)
    assert network.weights.head.float().std() == pytest.approx(1, rel=0.05)
