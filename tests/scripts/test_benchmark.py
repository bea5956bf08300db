"""The benchmark goes all the way with the tiny model; what it measures here says nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_measures_both_engines_and_keeps_the_figures(tmp_path: Path) -> None:
    sizes = ["--contexts", "40", "--prompts", "60", "--tokens", "12", "--repeats", "1"]
    command = [sys.executable, "scripts/benchmark.py", "--weights", "tiny", *sizes, "--json", tmp_path / "figures.json"]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    assert "| decode, a token at context 40 |" in run.stdout
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["ceilings"]["read bandwidth, TB/s"] > 0
    names = [figure["name"] for figure in kept["fast"]]
    assert names == [figure["name"] for figure in kept["generate()"]]
    for figure in kept["fast"]:
        assert min(figure["values"]) > figure["floor"], figure["name"]
