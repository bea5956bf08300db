"""A real sticky error, in a process of its own: it cannot be undone."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

LOSE_THE_GPU = """
import contextlib, os, torch
from kimi_vl.engine.base import Engine, ModelInputs, SamplingParams, gpu_is_lost

class Failing(Engine):
    def _decode(self, inputs, generation):
        if generation.emit(int(inputs.input_ids[0, 0])):
            ones[torch.tensor([5], device="cuda")].item()

ones = torch.ones(1, device="cuda")
with contextlib.suppress(torch.OutOfMemoryError):
    torch.empty(2**50, dtype=torch.uint8, device="cuda")
print(gpu_is_lost())
engine, prompt = Failing(100), ModelInputs(torch.tensor([[7]]))
print(engine.healthy, list(engine.generate(prompt, SamplingParams(1, frozenset()))) == [7])
with contextlib.suppress(RuntimeError):
    list(engine.generate(prompt, SamplingParams(2, frozenset())))
print(gpu_is_lost(), engine.healthy, flush=True)
os._exit(0)
"""


def test_out_of_memory_passes_and_a_failed_assertion_stays_and_makes_the_engine_unhealthy() -> None:
    output = subprocess.run([sys.executable, "-c", LOSE_THE_GPU], capture_output=True, text=True)
    assert output.stdout.split() == ["False", "True", "True", "True", "False"], output.stderr
