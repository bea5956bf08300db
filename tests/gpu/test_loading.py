"""On a CUDA GPU: what several threads copy there at the same time is what transformers' loader puts there."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.model import reading
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.reading import SPAN_BYTES, Place, read_tensors
from kimi_vl.model.small_files import SINGLE
from kimi_vl.model.variants import WEIGHTS
from tests.engine.fast.networks import assert_same

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TINY = WEIGHTS / "tiny"


@pytest.mark.parametrize("span_bytes", [SPAN_BYTES, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_network_is_transformers(span_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Network.of(load_model(TINY, CUDA, dtype))
    monkeypatch.setattr(reading, "SPAN_BYTES", span_bytes)
    assert_same(load_network(TINY, CUDA, dtype, "none", lambda line: None), expected)


@pytest.mark.parametrize("threads", [1, 16])
def test_memory_is_used_again_only_when_it_has_been_copied(threads: int) -> None:
    expected = load_file(TINY / SINGLE)
    got = {name: torch.full_like(tensor, torch.nan, device=CUDA) for name, tensor in expected.items()}

    def slowly_into(destination: Tensor) -> Place:
        def place(first: int, piece: Tensor) -> Tensor:
            assert piece.is_pinned()
            torch.cuda._sleep(5_000_000)  # cycles: the copy is made milliseconds after this has returned
            return destination[first : first + len(piece)]

        return place

    read_tensors(inspect_folder(TINY), {name: slowly_into(tensor) for name, tensor in got.items()}, CUDA, threads)
    for name, tensor in expected.items():
        assert got[name].cpu().equal(tensor), name
