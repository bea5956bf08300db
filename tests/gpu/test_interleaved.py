"""The fast engine's caches on a GPU, where whole answers take little time; see tests/faults/test_interleaved.py."""

from pathlib import Path

import pytest
import torch

from kimi_vl.output.pacing import joined
from kimi_vl.service import Service
from kimi_vl.settings import Settings
from tests.faults.interleaved import interleave, pictures, requests

pytestmark = pytest.mark.gpu


def test_300_requests_with_cancels_each_get_their_own_answer(tmp_path: Path) -> None:
    service = Service.load(Settings(model="tiny"))
    asked = requests(pictures(tmp_path), max_new_tokens=100)
    assert len({joined(service.answer(request)).answer for request in asked}) >= 8, "the right answers differ"
    before = torch.cuda.memory_allocated()
    answered, cancelled = interleave(service, asked, 300)
    assert answered > 100
    assert cancelled > 20
    service.close()  # until then the last one that was cancelled may still be at work
    assert torch.cuda.memory_allocated() == before
