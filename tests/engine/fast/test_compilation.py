"""What the interpreter cannot show: that a GPU's compiler takes every kernel, and that it fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_vl.engine.fast import kernels

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("capability", "kilobytes"), [("89", 99), ("90", 227)], ids=["desktop GPUs have the least", "H100"]
)
def test_every_kernel_compiles_and_finds_its_shared_memory(capability: str, kilobytes: int) -> None:
    command = [sys.executable, "-m", "tests.engine.fast.cross_compile", capability]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    shared = json.loads(output)
    launched = {line.split("[(")[0].strip() for line in _launches()}
    assert shared.keys() == launched
    assert max(shared.values()) <= kilobytes * 1024


def _launches() -> list[str]:
    """The lines of the kernels' code that launch one."""
    files = Path(kernels.__file__).parent.glob("*.py")
    return [line for file in files for line in file.read_text().splitlines() if "_kernel[(" in line]
