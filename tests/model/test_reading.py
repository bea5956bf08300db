"""Every row of every tensor comes once, as it is in the file, whatever the pieces and the threads."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kimi_vl.errors import Misconfigured
from kimi_vl.model import reading
from kimi_vl.model.inspection import StoredTensor, inspect_folder
from kimi_vl.model.reading import SPAN_BYTES, Place, read_tensors
from kimi_vl.model.small_files import SINGLE
from kimi_vl.model.variants import WEIGHTS
from tests.model.shards import split

TINY = WEIGHTS / "tiny"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def same_place(tensors: Sequence[StoredTensor], place: Place) -> dict[str, Place]:
    return {tensor.name: place for tensor in tensors}


def gather(tensors: Mapping[str, Tensor], limit: int = SPAN_BYTES) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Copies to be, and their places. A row that comes twice, or a piece above the limit, is an error.

    Every other place copies by itself.
    """
    got = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}

    def into(destination: Tensor, by_itself: bool) -> Place:
        def place(first: int, piece: Tensor) -> Tensor | None:
            rows = destination[first : first + len(piece)]
            assert rows.isnan().all()
            assert piece.dtype == rows.dtype and piece.shape == rows.shape
            assert piece.nbytes <= limit or len(piece) == 1
            if not by_itself:
                return rows
            rows.copy_(piece)
            return None

        return place

    return got, {name: into(tensor, bool(number % 2)) for number, (name, tensor) in enumerate(got.items())}


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert got[name].equal(tensor), name


@pytest.mark.parametrize(("limit", "threads"), [(SPAN_BYTES, 1), (SPAN_BYTES, 16), (30_000, 1), (30_000, 5), (1, 3)])
def test_every_row_comes_once(limit: int, threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_file(folder / SINGLE)
    tensors = inspect_folder(split(folder, lambda name: len(name) % 3))
    monkeypatch.setattr(reading, "SPAN_BYTES", limit)
    got, places = gather(expected, limit)
    read_tensors(tensors, places, CPU, threads)
    assert_equal(got, expected)


def test_one_thread_reads_in_the_order_of_the_files(folder: Path) -> None:
    tensors = inspect_folder(split(folder, lambda name: len(name) % 3))
    names: list[str] = []

    def noting(name: str) -> Place:
        return lambda first, piece: names.append(name)

    read_tensors(tensors, {tensor.name: noting(tensor.name) for tensor in tensors}, CPU, threads=1)
    assert names == [t.name for t in sorted(tensors, key=lambda tensor: (tensor.path, tensor.offset))]


def test_types_keep_their_bits_where_no_tensor_is_aligned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"a": torch.randn(3, dtype=torch.float16), "b": torch.randn(4, 2, 3), "c": torch.randn(5).bfloat16()}
    tensors, data = [], b"odd"
    for (name, tensor), kind in zip(expected.items(), ("F16", "F32", "BF16"), strict=True):
        tensors.append(StoredTensor(name, folder / SINGLE, kind, tuple(tensor.shape), len(data)))
        data += tensor.view(torch.uint8).numpy().tobytes()
    (folder / SINGLE).write_bytes(data)
    monkeypatch.setattr(reading, "SPAN_BYTES", 50)
    got, places = gather(expected, 50)
    read_tensors(tensors, places, CPU)
    assert_equal(got, expected)


def cut_short(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (cut_short, "has become shorter while it was read; copy or fetch it again"),
        (lambda folder: (folder / SINGLE).unlink(), "cannot be read (No such file or directory)"),
    ],
)
@pytest.mark.parametrize("threads", [1, 16])
def test_a_file_that_changed_after_the_inspection(
    change: Callable[[Path], None], why: str, threads: int, folder: Path
) -> None:
    tensors = inspect_folder(folder)
    change(folder)
    with pytest.raises(Misconfigured) as error:
        read_tensors(tensors, same_place(tensors, lambda first, piece: None), CPU, threads)
    assert str(error.value) == f"the model folder {folder} cannot be used: {SINGLE} {why}"


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    tensors = inspect_folder(folder)
    with pytest.raises(Misconfigured, match=rf"{SINGLE} cannot be read \(Input/output error\)"):
        read_tensors(tensors, same_place(tensors, lambda first, piece: None), CPU)


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:100_001]], offset))
    expected = load_file(folder / SINGLE)
    got, places = gather(expected)
    read_tensors(inspect_folder(folder), places, CPU)
    assert_equal(got, expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_a_place_ends_all_threads(threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SPAN_BYTES", 1)
    tensors = inspect_folder(folder)
    handed: list[int] = []

    def fail_at_the_tenth(first: int, piece: Tensor) -> None:
        handed.append(len(piece))
        if len(handed) == 10:
            raise MemoryError("the tenth")
        if len(handed) > 10:
            time.sleep(0.001)  # to read all rows would take far longer than to hear of the error

    with pytest.raises(MemoryError, match="the tenth"):
        read_tensors(tensors, same_place(tensors, fail_at_the_tenth), CPU, threads)
    assert 10 <= len(handed) < sum(tensor.shape[0] for tensor in tensors) / 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]
