"""Whatever is read holds its promise (scripts/fuzzing/targets.py), for the corpus and for some inputs made from it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = [sys.executable, ROOT / "scripts" / "fuzz.py"]


def test_no_input_breaks_a_promise(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    process = subprocess.run([*FUZZ, "--short", "--out", tmp_path], capture_output=True, text=True)
    logs = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert process.returncode == 0, process.stdout + logs
    assert process.stdout.count("found nothing") == len(list(tmp_path.glob("*.log"))) == 7


def test_an_absent_file_is_no_input_that_holds_its_promise(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    process = subprocess.run([*FUZZ, "schema", "--file", tmp_path / "absent"], capture_output=True, text=True)
    assert process.returncode == 2
    assert f"there is no file {tmp_path / 'absent'}" in process.stderr
