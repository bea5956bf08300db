"""How long the fast engine takes to be ready, in processes of its own: with nothing compiled yet, and the next time.

The clock runs from weights in the device's memory to an engine that takes requests, and then for the first request
of all, a picture and a short question: what the engine compiles only when it is needed shows there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from bench.ceilings import Ceilings, synchronize
from bench.figure import Figure
from bench.pictures import QUESTION, Album, ask
from bench.subject import Subject, forget_peak, load, machine, make_engine, peak_above
from kimi_vl.prompt.chat import question

STATES = ("nothing compiled", "kernels in Triton's cache")
SCRIPTS = Path(__file__).resolve().parents[1]


def ready(weights: str, quantization: str, album: Album, repeats: int) -> list[Figure]:
    """Both times, in both states, each in new processes. To be called while the GPU's memory is free."""
    runs: dict[str, list[tuple[float, int]]] = {}
    for _ in range(repeats):
        with TemporaryDirectory() as cache:
            for state in STATES:
                for name, seconds_and_peak in _in_a_new_process(weights, quantization, album, Path(cache)).items():
                    runs.setdefault(f"{name}, {state}", []).append(seconds_and_peak)
    figures = []
    for name, found in runs.items():
        seconds, peaks = zip(*found, strict=True)
        figures.append(Figure(name, list(seconds), peak=max(peaks)).announce("FastEngine"))
    return figures


def _in_a_new_process(weights: str, quantization: str, album: Album, cache: Path) -> dict[str, tuple[float, int]]:
    """What main prints, with Triton's cache in a folder."""
    paths = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "bench.ready", weights, quantization, str(album)]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Prints, for a --weights, a --quantization and an album, seconds and peak memory of each of the two as JSON."""
    weights, quantization, album = sys.argv[1], sys.argv[2], Album.parse(sys.argv[3])
    device = machine()
    model, processor = load(weights, device)
    found = {}
    forget_peak()
    synchronize(device)
    started = perf_counter()
    engine = make_engine("fast", model, processor, quantization)
    synchronize(device)
    found["ready"] = perf_counter() - started, peak_above(model, engine)
    subject = Subject(model, processor, engine, Ceilings({}, {}), tokens=1, repeats=1)
    forget_peak()
    seconds = ask(subject, album.draw(0), [question(QUESTION, album.count)])
    found["first token of the first request"] = seconds, peak_above(model, engine)
    engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
