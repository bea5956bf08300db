# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What all kernels share: where they run, how they are launched, how much of a matrix each program reads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from math import gcd
from typing import Any, Generic, ParamSpec, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

P = ParamSpec("P")
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Operation(Generic[P]):
    """A kernel for the GPU and its reference: both write the same results into the tensors that they are given.

    The first argument is a tensor; where it is decides which of the two runs.
    """

    launch: Callable[P, None]
    reference: Callable[P, None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        if (calls := getattr(_noting, "calls", None)) is not None:
            calls.setdefault((self, _shape(args)), partial(self.launch, *args, **kwargs))
            return
        run = self.launch if cast(Tensor, args[0]).is_cuda else self.reference
        run(*args, **kwargs)


_noting = threading.local()  # `calls` is where a thread's calls go instead, while it looks for kernels to compile
_compiling = threading.local()  # `only` is true on threads that must not launch


def run_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel, or on a thread of compile_ahead compiles it and no more."""
    if getattr(_compiling, "only", False):
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


def without_launches(*works: Callable[[], object]) -> dict[Any, Callable[[], None]]:
    """Does some works but for the kernels that they launch on this thread, and returns those, by what compiles once."""
    calls: dict[Any, Callable[[], None]] = {}
    _noting.calls = calls
    try:
        for work in works:
            work()
    finally:
        del _noting.calls
    return calls


def compile_ahead(*works: Callable[[], object]) -> None:
    """Compiles the kernels that some works launch, several at a time, and loads them.

    Each is launched once, in any order and without those before it, so its inputs must be initialised, and what the
    works' results hold means nothing. Only one launch of each operation is made at the same time as others: Triton 3.6
    compiles a launcher for each list of argument types, and mistakes it for another one if a second thread loads what
    was loaded before, since all launchers are Python modules of one name.
    """
    calls = without_launches(*works)
    triton.runtime.driver.active.get_current_device()  # whose initialisation is not made for several threads
    one_of_each = {operation: call for (operation, _), call in calls.items()}
    with ThreadPoolExecutor(initializer=compile_only) as pool:
        list(pool.map(_call, calls.values()))
    with ThreadPoolExecutor(initializer=_enter_gpu) as pool:
        list(pool.map(_call, one_of_each.values()))
    for (operation, _), call in calls.items():
        if call is not one_of_each[operation]:
            _call(call)


def compile_only() -> None:
    """From here on the calling thread's launches compile their kernels and do no more."""
    _compiling.only = True


def _enter_gpu() -> None:
    """A thread gets the GPU's context with its first launch, and tensor descriptors are made before Triton's own."""
    torch.zeros(1, device="cuda")


def _call(work: Callable[[], None]) -> None:
    with torch.inference_mode():  # a thread has its own
        work()


def _shape(value: Any) -> Any:
    """What is equal for arguments that one compiled kernel serves."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple):
        return tuple(map(_shape, value))
    if is_dataclass(value):
        return tuple(_shape(getattr(value, field.name)) for field in fields(value))
    return value if isinstance(value, str | int | float) else type(value)


@dataclass(frozen=True)
class Tile:
    """How much of a weight matrix one program reads at once, and with how many warps."""

    elements: int
    warps: int

    def rows(self, height: int, columns: int) -> int:
        """Rows of a matrix [height, columns] in a tile: at least one, and a divisor of the height."""
        return gcd(height, max(1, self.elements // triton.next_power_of_2(columns)))


# By the matrix and its bits: the fastest of those that scripts/tune_decode.py tried on an H100.
TILES = {
    ("projections", 16): Tile(8192, 4),
    ("output", 16): Tile(16384, 4),
    ("shared_gate_up", 16): Tile(8192, 4),
    ("shared_down", 16): Tile(16384, 8),
    ("gate_up", 16): Tile(8192, 4),
    ("down", 16): Tile(4096, 1),
    ("head", 16): Tile(16384, 4),
    ("projections", 8): Tile(8192, 4),
    ("output", 8): Tile(16384, 8),
    ("shared_gate_up", 8): Tile(32768, 4),
    ("shared_down", 8): Tile(16384, 4),
    ("gate_up", 8): Tile(16384, 4),
    ("down", 8): Tile(8192, 8),
    ("head", 8): Tile(16384, 4),
    ("shared_gate_up", 4): Tile(32768, 8),
    ("shared_down", 4): Tile(16384, 8),
    ("gate_up", 4): Tile(32768, 2),
    ("down", 4): Tile(16384, 8),
}


def launch_options(tensor: Tensor, warps: int) -> dict[str, Any]:
    """With programmatic dependent launch a kernel starts, and reads its weights, while the one before it ends."""
    if tensor.is_cuda and _capability(tensor.device) >= (9, 0):
        return {"num_warps": warps, "PDL": True, "launch_pdl": True}
    return {"num_warps": warps, "PDL": False}


def is_hopper(device: torch.device) -> bool:
    """A GPU with 227 KB of shared memory, whose libraries' grouped products and attention were measured."""
    return device.type == "cuda" and _capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; without one as many as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def release_next(PDL: tl.constexpr):
    """Lets the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until all kernels before have written their results. Before that only weights may be relied on, and what kernels
    wrote that had ended before the previous one released this one; and nothing may be written."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(pointer, size):
    """From compute capability 9.0 on, asks for some bytes to come into the L2 cache; both numbers are multiples of 16.

    For a little of what is needed soon: with much of it, or late in a program, steps took longer on an H100.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, rounded once to the gain's type: x * rsqrt(mean(x²) + eps) * gain."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()).to(gain.dtype)
