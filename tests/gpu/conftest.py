import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def freed() -> None:
    """What the models of the file before took is free: they have cycles, and its last test held them to the end."""
    gc.collect()
    torch.cuda.empty_cache()
