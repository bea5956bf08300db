"""What the machine can do at best, measured in the same run as everything else."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

READ_BYTES = {"cuda": 4_000_000_000, "cpu": 400_000_000}  # far more than any cache holds
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}  # enough to fill the device


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The median time of some work, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = perf_counter()
        work()
        synchronize(device)
        times.append(perf_counter() - started)
    return median(times[1:])


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over random numbers reads."""
    size = READ_BYTES[device.type]
    data = torch.randn(size // 4, device=device)
    return size / seconds(lambda: data.sum(), device)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    side = GEMM_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device)
