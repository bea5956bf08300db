"""What processes hold: memory, file descriptors, threads, temporary files."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

TOKIO = "tokio-rt-worker"
LOOKS = 10


@dataclass(frozen=True)
class Held:
    """At one moment, by some processes together."""

    memory: int  # bytes that are theirs, and their part of what they share; not of files, which others may map, too
    descriptors: int
    threads: int  # without the pool of Cog's Tokio, of which a thread more or fewer waits after each cancelled request
    temporary_files: int
    gpu_memory: int = 0  # bytes that torch has reserved in this process


def held(processes: list[int], temporary: Path) -> Held:
    """By these processes and by all that they started, as far as they still run."""
    for _ in range(LOOKS):
        with suppress(FileNotFoundError, ProcessLookupError):  # one of them, or a thread, ended just now
            return _held(_with_children(processes), temporary)
    raise RuntimeError("/proc does not tell what the processes hold; run this on a plain Linux")


def _held(everyone: list[int], temporary: Path) -> Held:
    return Held(
        memory=sum(map(_memory, everyone)),
        descriptors=sum(len(list(Path(f"/proc/{process}/fd").iterdir())) for process in everyone),
        threads=sum(name != TOKIO for process in everyone for name in _threads(process)),
        temporary_files=sum(1 for _ in temporary.rglob("*")),
        gpu_memory=torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0,
    )


def _with_children(processes: list[int]) -> list[int]:
    children = [
        int(child)
        for process in processes
        for of_thread in Path(f"/proc/{process}/task").glob("*/children")
        for child in of_thread.read_text().split()
    ]
    return processes + (_with_children(children) if children else [])


def _threads(process: int) -> list[str]:
    return [file.read_text().strip() for file in Path(f"/proc/{process}/task").glob("*/comm")]


def _memory(process: int) -> int:
    _, *lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kilobytes = {name: int(number) for name, number, _ in map(str.split, lines)}
    return 1024 * (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"])
