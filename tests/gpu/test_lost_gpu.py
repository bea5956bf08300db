"""A real sticky error, in a process of its own: it cannot be undone."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

LOSE_THE_GPU = """
import contextlib, os, torch
from kimi_vl.engine.base import gpu_is_lost

ones = torch.ones(1, device="cuda")
with contextlib.suppress(torch.OutOfMemoryError):
    torch.empty(2**50, dtype=torch.uint8, device="cuda")
print(gpu_is_lost())
with contextlib.suppress(RuntimeError):
    ones[torch.tensor([5], device="cuda")].item()
print(gpu_is_lost(), flush=True)
os._exit(0)
"""


def test_out_of_memory_passes_and_a_failed_assertion_stays() -> None:
    output = subprocess.run([sys.executable, "-c", LOSE_THE_GPU], capture_output=True, text=True)
    assert output.stdout.split() == ["False", "True"], output.stderr
