"""Measures what passes between the start of a process and the first token of an answer, for a checkpoint folder.

Every run is a process of its own, with the folder in the page cache and all Python modules compiled, as pip leaves
them. The fast engine starts twice in a round, with no kernel compiled and then with all of them in Triton's cache;
transformers' generate() starts once beside it. Without a folder one is made for the time, with random weights of the
full size: 33 GB, where TMPDIR says.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import time

import torch
from bench.full_size import checkpoint
from bench.subject import machine

from kimi_vl import service
from kimi_vl.engine.base import ModelInputs, SamplingParams
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model

STEPS = ("imported", "loaded", "ready", "first token")
STARTS = {  # one after another, with one folder for Triton's cache, which is empty at first
    "fast engine, nothing compiled": "fast",
    "fast engine, kernels in Triton's cache": "fast",
    "transformers": "reference",
}
PROMPT = ModelInputs(torch.arange(64)[None])


def once(engine_name: str, folder: Path, quantization: str, started: float) -> dict[str, float]:
    """Seconds from a moment to the end of each step, in this process."""
    passed = {"imported": time() - started}
    device = machine()

    def note(line: str) -> None:
        if line.startswith("Loaded"):
            passed["loaded"] = time() - started

    if engine_name == "fast":
        engine = service.load(folder, device, quantization, note)[1]
    else:
        engine = ReferenceEngine(load_model(folder, device, torch.bfloat16))
        passed["loaded"] = time() - started
    passed["ready"] = time() - started
    next(iter(engine.generate(PROMPT, SamplingParams(1, frozenset((0,))))))
    passed["first token"] = time() - started
    engine.close()  # or the process could end while its thread still runs, and would be aborted
    return passed


def start(engine: str, folder: Path, quantization: str, cache: str) -> dict[str, float]:
    """The same in a process of its own, with a folder for Triton's cache."""
    command = [sys.executable, __file__, str(folder), "--quantization", quantization, "--once", engine]
    command += ["--started", str(time())]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": ""}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    passed: dict[str, float] = json.loads(output.splitlines()[-1])
    return passed


def measure(folder: Path, quantization: str, repeats: int) -> None:
    """Prints a row for each start: medians, and the spread of what matters most."""
    print(f"| | {' | '.join(STEPS)} | ready, from - to |\n|{'---|' * (len(STEPS) + 2)}")
    with TemporaryDirectory() as cache:
        start("fast", folder, quantization, cache)  # which leaves all Python modules compiled, and read once
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    for _ in range(repeats):
        with TemporaryDirectory() as cache:
            for name, engine in STARTS.items():
                runs[name].append(start(engine, folder, quantization, cache))
    for name, found in runs.items():
        middle = " | ".join(f"{median(run[step] for run in found):.1f} s" for step in STEPS)
        ready = sorted(run["ready"] for run in found)
        print(f"| {name} | {middle} | {ready[0]:.1f} - {ready[-1]:.1f} s |", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint folder (default: random weights)")
    parser.add_argument("--quantization", default="none", help="of the fast engine (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every start (default: %(default)s)")
    parser.add_argument("--once", choices=sorted(set(STARTS.values())), help="one start, in this process; prints JSON")
    parser.add_argument("--started", type=float, help="when this process was started, in seconds since 1970")
    given = parser.parse_args()
    if not (given.once or torch.cuda.is_available()):
        parser.error("this is measured on a CUDA GPU")
    if given.once:
        print(json.dumps(once(given.once, given.folder, given.quantization, given.started)))
    else:
        with checkpoint(given.folder, machine()) as folder:
            measure(folder, given.quantization, given.repeats)


if __name__ == "__main__":
    main()
