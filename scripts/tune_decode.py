"""Finds the fastest tile of each matrix in a decoding step, on the GPU at hand, with full-size random weights.

Each candidate is timed as what it is for: the whole step, replayed from its graph at a context of 1024. The best of
each stays while the next is tried. What it prints goes into TILES in kimi_vl/engine/fast/kernels/operation.py. Kernels
of all candidates are compiled first, by several processes.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from os import cpu_count
from statistics import median

import torch
from bench.full_size import TEXT, random_model

from kimi_vl.engine.base import SamplingParams
from kimi_vl.engine.fast.decode import Decoder
from kimi_vl.engine.fast.kernels.operation import TILES, Tile, compile_only
from kimi_vl.engine.fast.kernels.sampling import Stages
from kimi_vl.engine.fast.scheme import SCHEMES, Scheme
from kimi_vl.engine.fast.weights import Weights

CONTEXT = 1024
ELEMENTS, WARPS = (1024, 2048, 4096, 8192, 16384, 32768, 65536), (1, 2, 4, 8)
MOST = 256  # numbers of a thread, of 4 bits twice that; with more it would take long to compile, and be slow
PROCESSES = 12  # that compile; each takes 4 GB of the GPU's memory
EXPERTS = ("shared_gate_up", "shared_down", "gate_up", "down")


def step_milliseconds(weights: Weights, cache: torch.Tensor, rotary: torch.Tensor, steps: int = 40) -> float:
    """The median time of a step with TILES as they are."""
    decoder = Decoder(weights, cache, rotary)
    decoder.begin(CONTEXT, SamplingParams(steps, frozenset(), temperature=1.0))
    decoder.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.run(Stages())
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks[8:]))


def weights_and_tables(scheme: Scheme) -> tuple[Weights, torch.Tensor, torch.Tensor]:
    """Random weights of so many layers as TEXT says, a latent cache and the rotary table."""
    weights = Weights.of(random_model(torch.device("cuda"), torch.bfloat16, media_id=163605)).quantised(scheme)
    cache = torch.randn(len(weights.layers), 2 * CONTEXT, weights.row, device="cuda", dtype=torch.bfloat16)
    return weights, cache, weights.rotary(2 * CONTEXT)


@torch.inference_mode()
def compile_step(key: tuple[str, int], tile: Tile, scheme: Scheme) -> None:
    """Compiles the kernels of a step with a tile, for Triton's cache; in a process of its own."""
    if not compiled_for:
        TEXT["num_hidden_layers"] = 2  # one of each kind
        compiled_for.append(Decoder(*weights_and_tables(scheme)))
        compile_only()
    kept, TILES[key] = TILES[key], tile
    compiled_for[0].example()
    TILES[key] = kept


compiled_for: list[Decoder] = []  # the one of such a process


def candidates(bits: int) -> Iterator[Tile]:
    """The tiles that are tried for a matrix of so many bits."""
    most = 2 * MOST if bits == 4 else MOST
    for elements in ELEMENTS:
        yield from (Tile(elements, warps) for warps in WARPS if elements <= 32 * warps * most)


def bits(name: str, scheme: Scheme) -> int:
    """Of most matrices with a name."""
    return scheme.experts if name in EXPERTS else scheme.others


@torch.inference_mode()
def main() -> None:
    """Tries every candidate of every matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for name, _ in TILES))
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, help="which matrices (default: all)")
    add("--quantization", choices=SCHEMES, default="none", help="bits of the weights (default: %(default)s)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this is measured on a CUDA GPU")
    scheme = SCHEMES[given.quantization]
    keys = [(name, bits(name, scheme)) for name in given.only]
    with ProcessPoolExecutor(min(cpu_count() or 1, PROCESSES), get_context("spawn")) as pool:
        tried = [(key, tile, scheme) for key in keys for tile in candidates(key[1])]
        list(pool.map(compile_step, *zip(*tried, strict=True)))
    model_parts = weights_and_tables(scheme)
    print(f"as it is: {step_milliseconds(*model_parts):.3f} ms", flush=True)
    for key in keys:
        times = {}
        for tile in candidates(key[1]):
            TILES[key] = tile
            times[tile] = step_milliseconds(*model_parts)
        TILES[key] = min(times, key=lambda tile: times[tile])
        print(
            f"{key}: {TILES[key]},  # {times[TILES[key]]:.3f} ms a step, others to {max(times.values()):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
