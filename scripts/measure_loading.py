"""Measures how fast a checkpoint folder gets into the GPU's memory, from the page cache and from the disk.

Every run is a process of its own, timed from a CUDA context that is there to weights that can be used. Beside the fast
engine's loader stand what transformers and safetensors take for the same files, and what reading them alone takes.
Without a folder one is made for the time, with random weights of the full size: 33 GB, where TMPDIR says.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter

import torch
from bench.full_size import checkpoint
from bench.subject import machine
from safetensors.torch import load_file

from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.model.checkpoint import load_model

LOADERS: dict[str, Callable[[Path, torch.device], object]] = {
    "load_network": lambda folder, device: fast(folder, device, "none"),
    "load_network, int8": lambda folder, device: fast(folder, device, "int8"),
    "load_network, int4": lambda folder, device: fast(folder, device, "int4"),
    "transformers": lambda folder, device: load_model(folder, device, torch.bfloat16),
    "safetensors": lambda folder, device: [load_file(path, str(device)) for path in files(folder)],
    "only reading": lambda folder, device: read(files(folder)),
}


def fast(folder: Path, device: torch.device, quantization: str) -> Network:
    """The fast engine's loader."""
    return load_network(folder, device, torch.bfloat16, quantization, lambda line: None)


def files(folder: Path) -> list[Path]:
    """The weights."""
    return sorted(folder.glob("*.safetensors"))


def read(paths: list[Path], piece: int = 2**23, threads: int = 16) -> None:
    """Reads all bytes of files, in order and several pieces at a time, and throws them away."""

    def read_piece(path: Path, offset: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(bytearray(min(piece, path.stat().st_size - offset)))

    pieces = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, piece)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_piece, *zip(*pieces, strict=True)))


def once(name: str, folder: Path) -> dict[str, float]:
    """Seconds of a loader in this process, by how many bytes the process's peak grew, and the most that were pinned."""
    device = machine()
    torch.zeros(1, device=device)
    before, started = peak(), perf_counter()
    LOADERS[name](folder, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"] if device.type == "cuda" else 0
    return {"seconds": perf_counter() - started, "resident": peak() - before, "pinned": pinned}


def peak() -> int:
    """Most bytes of this process that were in memory at once, those of mapped files included."""
    return 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def forget(paths: list[Path]) -> None:
    """Drops files from the page cache, where the system lets one."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, repeats: int) -> None:
    """Prints a line for each loader, first from the page cache."""
    paths = files(folder)
    gigabytes = sum(path.stat().st_size for path in paths) / 1e9
    read(paths)
    for cold in (False, True):
        print(f"{gigabytes:.1f} GB from {'the disk' if cold else 'the page cache'}:", flush=True)
        for name in LOADERS:
            runs = []
            for _ in range(repeats):
                if cold:
                    forget(paths)
                command = [sys.executable, __file__, str(folder), "--once", name]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
            seconds = sorted(run["seconds"] for run in runs)
            spread, rate = f"{seconds[0]:.2f} - {seconds[-1]:.2f}", gigabytes / median(seconds)
            resident, pinned = (max(run[key] for run in runs) / 1e9 for key in ("resident", "pinned"))
            memory = f"{resident:.2f} GB resident, {pinned:.2f} GB pinned"
            print(f"  {name}: {median(seconds):.2f} s ({spread}), {rate:.1f} GB/s, {memory}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint folder (default: random weights)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: %(default)s)")
    parser.add_argument("--once", choices=list(LOADERS), help="one run in this process; prints JSON")
    given = parser.parse_args()
    if not (given.once or torch.cuda.is_available()):
        parser.error("this is measured on a CUDA GPU")
    if given.once:
        print(json.dumps(once(given.once, given.folder)))
    else:
        with checkpoint(given.folder, machine()) as folder:
            measure(folder, given.repeats)


if __name__ == "__main__":
    main()
