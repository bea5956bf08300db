import gc

import pytest
import torch
from bench.full_size import random_model

from kimi_vl.model.modeling import KimiVLForConditionalGeneration


@pytest.fixture(autouse=True, scope="module")
def freed() -> None:
    """What the models of the file before took is free: they have cycles, and its last test held them to the end."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def full_size() -> KimiVLForConditionalGeneration:
    """With random weights."""
    return random_model(torch.device("cuda"), torch.bfloat16, media_id=163605)
