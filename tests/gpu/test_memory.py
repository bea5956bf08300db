"""On a CUDA GPU: the full-size model works on GPUs of 24 and of 16 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("scheme", "gibibytes"), [("int8", 22.5), ("int4", 14.5)])
def test_eight_pictures_and_all_of_the_context_fit(scheme: str, gibibytes: float) -> None:
    size = int(gibibytes * 2**30)
    free, total = torch.cuda.mem_get_info()  # after what this process holds itself
    command = [sys.executable, "-m", "tests.gpu.capped", scheme, str(size), str(total - free)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]),
    }
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    print(f"{scheme}: {found}")
    assert found["context"] >= 32_768
    assert found["used"] <= size
