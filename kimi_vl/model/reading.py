"""Reads the tensors of a checkpoint as fast as the machine can: several threads, each straight into pinned memory.

A thread's next read goes on while a GPU copies the last one. Reads are in the files' order and large, which is what a
disk is fast at; the files are not mapped, since a page fault for every 4 KB costs more than the read.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from kimi_vl.model.inspection import StoredTensor, refusal

THREADS = 16
BUFFERS = 2  # of each thread: one is filled while the other is copied
PIECE_BYTES = 2**23  # read at once: every expert's matrices are whole
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Place = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class _Piece:
    """Some whole rows of a tensor."""

    tensor: StoredTensor
    first: int  # row
    rows: int

    @property
    def row_bytes(self) -> int:
        return self.tensor.nbytes // self.tensor.shape[0]

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def read(self, file: int, memory: Tensor) -> Tensor:
        """Reads the rows from a file descriptor into the beginning of a buffer [bytes], as [rows, ...] of their type.

        Raises:
            Misconfigured: the file ends before them, or cannot be read.
        """
        path, offset = self.tensor.path, self.tensor.offset + self.first * self.row_bytes
        rest = memory.numpy().data[: self.nbytes]
        while rest:
            try:
                count = os.preadv(file, [rest], offset)
            except OSError as error:
                raise refusal(path, f"cannot be read ({error.strerror})") from error
            if not count:
                raise refusal(path, "has become shorter while it was read; copy or fetch it again")
            rest, offset = rest[count:], offset + count
        values = memory[: self.nbytes].view(DTYPES[self.tensor.kind])
        return values.view(self.rows, *self.tensor.shape[1:])


class _Buffer:
    """Memory for one piece at a time; the next one waits until a GPU has copied the last."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._copied = torch.cuda.Event(blocking=True) if on_gpu else None

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()

    def mark(self) -> None:
        """Called when its copying has been started on the current stream."""
        if self._copied:
            self._copied.record()


def read_tensors(
    tensors: Sequence[StoredTensor], places: Mapping[str, Place], device: torch.device, threads: int = THREADS
) -> None:
    """Reads tensors and hands them on, in pieces of whole rows.

    Args:
        tensors: as inspect_folder gives them; they are read in this order.
        places: by the tensor's name, what is called as place(first, piece), on one of several threads: piece is
            [rows, ...] in the CPU's memory, of the file's type, and holds the tensor's rows from number `first` on.
            The place copies it to where it belongs. It may do that asynchronously, on the current CUDA stream.
        device: where the pieces go; for a GPU they are in pinned memory.
        threads: that read.
    Raises:
        Misconfigured: a file cannot be read, or has become shorter since it was inspected.
        Exception: whatever a place raised.
    """
    pieces = list(_pieces(tensors))
    size = max(piece.nbytes for piece in pieces)
    work = iter(pieces)  # whose next one goes to whichever thread asks first
    with ExitStack() as opened, ThreadPoolExecutor(threads, "reading") as pool:
        files = {path: opened.enter_context(_open(path)).fileno() for path in {tensor.path for tensor in tensors}}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the threads' streams do not wait for what prepared the destinations
        try:
            for reader in as_completed([pool.submit(_read, work, size, files, places, device) for _ in range(threads)]):
                reader.result()
        finally:
            pieces.clear()  # after an error this ends the other threads


def _pieces(tensors: Sequence[StoredTensor]) -> Iterator[_Piece]:
    """As many whole rows as fit into PIECE_BYTES, at least one."""
    for tensor in tensors:
        count = tensor.shape[0]
        step = max(1, PIECE_BYTES * count // tensor.nbytes)
        for first in range(0, count, step):
            yield _Piece(tensor, first, min(step, count - first))


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})") from error


def _read(
    work: Iterator[_Piece], size: int, files: Mapping[Path, int], places: Mapping[str, Place], device: torch.device
) -> None:
    """One thread's part: reads pieces of at most so many bytes until none is left, and waits for their copies."""
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream):
        buffers = [_Buffer(size, on_gpu) for _ in range(BUFFERS)]
        for piece, buffer in zip(work, cycle(buffers), strict=False):
            buffer.wait()
            places[piece.tensor.name](piece.first, piece.read(files[piece.tensor.path], buffer.memory))
            buffer.mark()
    if stream:
        stream.synchronize()
