"""On a CUDA GPU: what several threads copy there at the same time is what transformers' loader puts there."""

import pytest
import torch

from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.model import reading
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.reading import PIECE_BYTES
from kimi_vl.model.variants import WEIGHTS
from tests.engine.fast.networks import assert_same

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 4096])  # each buffer is filled a few times, and a hundred times
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_network_is_transformers(piece_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Network.of(load_model(WEIGHTS / "tiny", CUDA, dtype))
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    for _ in range(5):
        assert_same(load_network(WEIGHTS / "tiny", CUDA, dtype, lambda line: None), expected)
