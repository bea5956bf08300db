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
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kimi_vl.model.inspection import StoredTensor
from kimi_vl.model.small_files import refusal, unreadable

THREADS = 12
BUFFERS = 2  # of each thread: one is filled while the other is copied
SPAN_BYTES = 2**24  # read at once: for smaller ones the threads wait longer for one another's Python than for memory
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Place = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class _Piece:
    """Some whole rows of a tensor."""

    tensor: StoredTensor
    first: int  # row
    rows: int

    @property
    def start(self) -> int:
        return self.tensor.offset + self.first * self.tensor.row_bytes

    @property
    def end(self) -> int:
        return self.start + self.rows * self.tensor.row_bytes

    def in_memory(self, memory: memoryview, at: int) -> Tensor:
        """The rows [rows, ...] of their type, whose bytes lie in a buffer from a place on."""
        shape = self.rows, *self.tensor.shape[1:]
        return torch.frombuffer(memory, dtype=DTYPES[self.tensor.kind], count=prod(shape), offset=at).view(shape)


@dataclass(frozen=True)
class _Span:
    """Pieces that lie one after another in a file."""

    pieces: list[_Piece]

    @property
    def path(self) -> Path:
        return self.pieces[0].tensor.path

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def nbytes(self) -> int:
        return self.pieces[-1].end - self.start

    def takes(self, piece: _Piece) -> bool:
        """Whether a later piece can be read with these: in the same file, near enough, and aligned in memory."""
        near = piece.tensor.path == self.path and self.start <= piece.start and piece.end - self.start <= SPAN_BYTES
        return near and (piece.start - self.start) % DTYPES[piece.tensor.kind].itemsize == 0

    def read(self, file: int, memory: Tensor) -> Iterator[tuple[_Piece, Tensor]]:
        """Reads all from a file descriptor into a buffer [bytes]; gives each piece with its rows there.

        Raises:
            Misconfigured: the file ends before them, or cannot be read.
        """
        buffer = memory.numpy().data
        rest, offset = buffer[: self.nbytes], self.start
        while rest:
            try:
                count = os.preadv(file, [rest], offset)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not count:
                raise refusal(self.path, "has become shorter while it was read; copy or fetch it again")
            rest, offset = rest[count:], offset + count
        for piece in self.pieces:
            yield piece, piece.in_memory(buffer, piece.start - self.start)


class _Buffer:
    """Memory for one span at a time; the next one waits until a GPU has copied the last."""

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
            The place says where it is to be copied to; or it copies by itself what it makes of it, perhaps
            asynchronously on the current CUDA stream, and says None.
        device: where the pieces go; for a GPU they are in pinned memory.
        threads: that read.
    Raises:
        Misconfigured: a file cannot be read, or has become shorter since it was inspected.
        Exception: whatever a place raised.
    """
    spans = _spans(tensors)
    size = max(span.nbytes for span in spans)
    work = iter(spans)  # whose next one goes to whichever thread asks first
    with ExitStack() as opened, ThreadPoolExecutor(threads, "reading") as pool:
        files = {path: opened.enter_context(_open(path)).fileno() for path in {tensor.path for tensor in tensors}}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the threads' streams do not wait for what prepared the destinations
        try:
            for reader in as_completed([pool.submit(_read, work, size, files, places, device) for _ in range(threads)]):
                reader.result()
        finally:
            spans.clear()  # after an error this ends the other threads


def _spans(tensors: Sequence[StoredTensor]) -> list[_Span]:
    """All tensors, in pieces of as many whole rows as fit into SPAN_BYTES, at least one."""
    spans: list[_Span] = []
    for tensor in tensors:
        count = tensor.shape[0]
        step = max(1, SPAN_BYTES // tensor.row_bytes)
        for first in range(0, count, step):
            piece = _Piece(tensor, first, min(step, count - first))
            if spans and spans[-1].takes(piece):
                spans[-1].pieces.append(piece)
            else:
                spans.append(_Span([piece]))
    return spans


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from error


def _read(
    work: Iterator[_Span], size: int, files: Mapping[Path, int], places: Mapping[str, Place], device: torch.device
) -> None:
    """One thread's part: reads spans of at most so many bytes until none is left, and waits for their copies."""
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream):
        buffers = [_Buffer(size, on_gpu) for _ in range(BUFFERS)]
        for span, buffer in zip(work, cycle(buffers), strict=False):
            buffer.wait()
            targets, sources = list[Tensor](), list[Tensor]()
            for piece, rows in span.read(files[span.path], buffer.memory):
                if (target := places[piece.tensor.name](piece.first, rows)) is not None:
                    targets.append(target)
                    sources.append(rows)
            if targets:  # by one call: with each the thread gives Python's lock away, and has to wait for it
                torch._foreach_copy_(targets, sources, non_blocking=True)
            buffer.mark()
    if stream:
        stream.synchronize()
