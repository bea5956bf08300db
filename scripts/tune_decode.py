"""Finds the fastest tile of each matrix in a decoding step, on the GPU at hand, with full-size random weights.

Each candidate is timed as what it is for: the whole step, replayed from its graph at a context of 1024. The best of
each stays while the next is tried. What it prints goes into TILES in kimi_vl/engine/fast/kernels/operation.py.
"""

import argparse
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

import torch
from bench.full_size import random_model

from kimi_vl.engine.base import SamplingParams
from kimi_vl.engine.fast.decode import Decoder
from kimi_vl.engine.fast.kernels.operation import TILES, Tile
from kimi_vl.engine.fast.scheme import SCHEMES, Scheme
from kimi_vl.engine.fast.weights import Weights

CONTEXT = 1024
ELEMENTS, WARPS = (1024, 2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8)
MOST = 256  # numbers of a thread; with more it would take long to compile, and be slow
EXPERTS = ("shared_gate_up", "shared_down", "gate_up", "down")


def step_milliseconds(weights: Weights, cache: torch.Tensor, rotary: torch.Tensor, steps: int = 40) -> float:
    """The median time of a step with TILES as they are."""
    decoder = Decoder(weights, cache, rotary)
    decoder.capture()
    decoder.begin(CONTEXT, SamplingParams(steps, frozenset(), temperature=1.0))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        decoder.step()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks[8:]))


def candidates() -> Iterator[Tile]:
    """The tiles that are tried."""
    for elements in ELEMENTS:
        yield from (Tile(elements, warps) for warps in WARPS if elements <= 32 * warps * MOST)


def bits(name: str, scheme: Scheme) -> int:
    """Of most matrices with a name."""
    return scheme.experts if name in EXPERTS else scheme.others


@torch.inference_mode()
def main() -> None:
    """Tries every candidate of every matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for name, _ in TILES))
    add = parser.add_argument
    add("names", nargs="*", choices=names, default=names, help=f"which of {', '.join(names)} (default: all)")
    add("--quantization", choices=SCHEMES, default="none", help="bits of the weights (default: %(default)s)")
    given = parser.parse_args()
    scheme = SCHEMES[given.quantization]
    model = random_model(torch.device("cuda"), torch.bfloat16, media_id=163605)
    weights = Weights.of(model).quantised(scheme)
    cache = torch.randn(len(weights.layers), 2 * CONTEXT, weights.row, device="cuda", dtype=torch.bfloat16)
    rotary = weights.rotary(2 * CONTEXT)
    print(f"as it is: {step_milliseconds(weights, cache, rotary):.3f} ms", flush=True)
    for name in given.names:
        key, times = (name, bits(name, scheme)), {}
        for tile in candidates():
            TILES[key] = tile
            times[tile] = step_milliseconds(weights, cache, rotary)
        TILES[key] = min(times, key=lambda tile: times[tile])
        print(f"{key}: {TILES[key]},  # {times[TILES[key]]:.3f} ms a step, others to {max(times.values()):.3f}")


if __name__ == "__main__":
    main()
