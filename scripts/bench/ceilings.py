# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What the machine can do at best, measured in the same run as everything else.

Both ceilings are upper bounds that some program really reached: the best of several ways to do the same work, and of
each way the fastest round. A figure's floor, and so its ratio, is then never flattering.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import triton
import triton.language as tl
from torch import Tensor

READ_BYTES = {"cuda": 2**32, "cpu": 2**28}  # far more than any cache holds
GEMM_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (1024,)}  # enough to fill the device
CALLS = {"cuda": 10, "cpu": 2}  # in a row, so that starting and waiting cost next to nothing
ROUNDS = 5
BLOCKS = (4096, 8192, 16384)  # numbers that one program of the kernel below reads
COLUMNS = 8192


@dataclass(frozen=True)
class Ceilings:
    """What the ways to measure them gave."""

    reads: dict[str, float]  # bytes a second
    products: dict[str, float]  # floating-point operations a second

    @property
    def bandwidth(self) -> float:
        """Bytes a second that can be read from the device's memory."""
        return max(self.reads.values())

    @property
    def rate(self) -> float:
        """Floating-point operations a second in matrix products."""
        return max(self.products.values())


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both, for a model of some type on a device."""
    return Ceilings(_read_bandwidths(device, dtype), _product_rates(device, dtype))


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call, when there are so many in a row, from an idle device to an idle device."""
    synchronize(device)
    started = perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (perf_counter() - started) / calls


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call in the fastest round, after a call to warm up."""
    work()
    return min(seconds(work, device, CALLS[device.type]) for _ in range(ROUNDS))


def _read_bandwidths(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second over random numbers, by the way they are read; of a copy, what is written counts as well."""
    count = READ_BYTES[device.type] // 4
    floats, target = torch.randn(count, device=device), torch.empty(count, device=device)
    matrix = torch.randn(count // COLUMNS, COLUMNS, device=device, dtype=dtype)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "sum": (floats.nbytes, floats.sum),
        "dot product": (floats.nbytes, partial(torch.dot, *floats.chunk(2))),
        "matrix times vector": (matrix.nbytes, partial(torch.mv, matrix, matrix[0].clone())),
        "copy": (2 * floats.nbytes, partial(target.copy_, floats)),
    }
    for block in BLOCKS if device.type == "cuda" else ():
        ways[f"kernel, {4 * block // 1024} kB a program"] = floats.nbytes, partial(block_sums, floats, block)
    return {name: size / _fastest(work, device) for name, (size, work) in ways.items()}


def _product_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Floating-point operations a second in square products of random matrices, by their side."""
    rates = {}
    for side in GEMM_SIDES[device.type]:
        a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
        rates[f"{side} x {side}"] = 2 * side**3 / _fastest(partial(torch.mm, a, b, out=c), device)
    return rates


@triton.jit
def _block_sums_kernel(data, sums, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tl.store(sums + program, tl.sum(tl.load(data + program * BLOCK + tl.arange(0, BLOCK)), 0))


def block_sums(data: Tensor, block: int) -> Tensor:
    """The sum of each block of data [a multiple of block] float32: as little as can be done with what is read."""
    sums = data.new_empty(len(data) // block)
    _block_sums_kernel[(len(sums),)](data, sums, BLOCK=block, num_warps=8)
    return sums
