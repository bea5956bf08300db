"""Finds the fastest tile of each matrix in a decoding step, on the GPU at hand, with full-size random weights.

Each candidate is timed as what it is for: the whole step, replayed from its graph at a context of 1024. The best of
each stays while the next is tried. What it prints goes into TILES in kimi_vl/engine/fast/kernels/operation.py.
"""

import argparse
from itertools import pairwise
from statistics import median

import torch
from bench.full_size import random_model

from kimi_vl.engine.base import SamplingParams
from kimi_vl.engine.fast.decode import Decoder
from kimi_vl.engine.fast.kernels.operation import TILES, Tile
from kimi_vl.engine.fast.weights import Weights

CONTEXT = 1024
ELEMENTS, WARPS = (1024, 2048, 4096, 8192, 16384), (2, 4, 8)


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


@torch.inference_mode()
def main() -> None:
    """Tries every candidate of every matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=list(TILES), default=list(TILES), help=f"which of {', '.join(TILES)} (default: all)"
    )
    names = parser.parse_args().names
    weights = Weights.of(random_model(torch.device("cuda"), torch.bfloat16, media_id=163605))
    cache = torch.randn(len(weights.layers), 2 * CONTEXT, weights.row, device="cuda", dtype=torch.bfloat16)
    rotary = weights.rotary(2 * CONTEXT)
    print(f"as it is: {step_milliseconds(weights, cache, rotary):.3f} ms", flush=True)
    for name in names:
        times = {}
        for tile in (Tile(elements, warps) for elements in ELEMENTS for warps in WARPS):
            TILES[name] = tile
            times[tile] = step_milliseconds(weights, cache, rotary)
        TILES[name] = min(times, key=lambda tile: times[tile])
        print(f'"{name}": {TILES[name]},  # {times[TILES[name]]:.3f} ms a step, others to {max(times.values()):.3f}')


if __name__ == "__main__":
    main()
