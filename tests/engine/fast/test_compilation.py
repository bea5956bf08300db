"""What the interpreter cannot show: that a GPU's compiler takes every kernel, and that it fits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_vl.engine.fast import kernels

ROOT = Path(__file__).resolve().parents[3]
SOURCES = list(Path(kernels.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    ("capability", "kilobytes"), [("89", 99), ("90", 227)], ids=["desktop GPUs have the least", "H100"]
)
def test_every_kernel_compiles_and_finds_its_shared_memory(capability: str, kilobytes: int) -> None:
    command = [sys.executable, "-m", "tests.engine.fast.cross_compile", capability]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(output)
    launched = {name for file in SOURCES for name in re.findall(r"run_kernel\(\s*(_\w+_kernel)", file.read_text())}
    assert found.keys() == launched
    assert max(kernel["shared"] for kernel in found.values()) <= kilobytes * 1024
    types = [{tuple(types) for types in kernel["types"]} for kernel in found.values()]
    assert sum(map(len, types)) == len(set().union(*types)), "compile_ahead counts on launchers of their own"
