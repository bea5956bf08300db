"""A network that comes straight from the files is the one that transformers' loader makes, bit for bit."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_vl.engine.fast import loading
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES
from kimi_vl.errors import Misconfigured
from kimi_vl.model import reading
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.reading import SPAN_BYTES
from kimi_vl.model.small_files import SINGLE
from kimi_vl.model.variants import WEIGHTS
from tests.engine.fast.networks import assert_same
from tests.model.shards import split

CPU, TINY = torch.device("cpu"), WEIGHTS / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def as_it_is(folder: Path) -> None:
    pass


def in_shards(folder: Path) -> None:
    split(folder, lambda name: len(name) % 3)


def in_other_types(folder: Path) -> None:
    """With bits that bfloat16 does not have."""
    tensors = load_file(folder / SINGLE)
    for number, (name, tensor) in enumerate(tensors.items()):
        wider = torch.float32 if number % 2 else torch.float16
        tensors[name] = (tensor.float() * (1 + torch.rand(tensor.shape) / 100)).to(wider)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("change", "span_bytes"),
    [(as_it_is, SPAN_BYTES), (as_it_is, 5000), (in_shards, SPAN_BYTES), (in_other_types, 20_000)],
)
def test_the_network_is_transformers(
    change: Callable[[Path], None],
    span_bytes: int,
    dtype: torch.dtype,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(folder)
    expected = Network.of(load_model(folder, CPU, dtype))
    monkeypatch.setattr(reading, "SPAN_BYTES", span_bytes)

    def poisoned(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full_like(tensor, torch.nan, **options)

    monkeypatch.setattr(torch, "empty_like", poisoned)  # what nothing is written to shows
    assert_same(load_network(folder, CPU, dtype, "none", lambda line: None), expected)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("span_bytes", [SPAN_BYTES, 5000])
def test_weights_are_quantised_as_they_come(name: str, span_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_network(TINY, CPU, torch.float32, "none", lambda line: None).quantised(SCHEMES[name])
    monkeypatch.setattr(reading, "SPAN_BYTES", span_bytes)
    network = load_network(TINY, CPU, torch.float32, name, lambda line: None)
    assert_same(network, expected)
    assert network.nbytes == expected.nbytes


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(Misconfigured, match="KIMI_VL_QUANTIZATION must be auto, none, int8, int4, not 'fp8'"):
        load_network(TINY, CPU, torch.float32, "fp8", lambda line: None)


def test_each_weight_is_there_once() -> None:
    network = load_network(TINY, CPU, torch.float32, "none", lambda line: None)
    for (weight, bias), layer in zip(network.qkv, network.tower.layers, strict=True):
        parts = [layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj]
        for whole, views in ((weight, [p.weight for p in parts]), (bias, [p.bias for p in parts])):
            addresses = [view.data_ptr() for view in views]
            assert addresses == [part.data_ptr() for part in whole.chunk(3)]


def test_says_in_a_line_how_fast_it_was() -> None:
    lines: list[str] = []
    load_network(TINY, CPU, torch.float32, "none", lines.append)
    assert len(lines) == 1
    assert re.fullmatch(r"Loaded 0\.0 GB in \d+\.\d s \(\d+\.\d GB/s\), 0\.0 GB on the GPU", lines[0])


def test_a_folder_is_refused_before_a_network_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "KimiVLForConditionalGeneration", None)
    os.truncate(folder / SINGLE, 1_000_000)
    with pytest.raises(Misconfigured, match=r"model\.safetensors is truncated"):
        load_network(folder, CPU, torch.float32, "none", lambda line: None)
