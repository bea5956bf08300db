from collections.abc import Iterator

import pytest
import torch

from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import answer_prefix
from tests.engine.fast.asking import processor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> KimiVLForConditionalGeneration:
    return load_model(WEIGHTS / "tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def network() -> Network:
    return load_network(WEIGHTS / "tiny", torch.device("cpu"), torch.float32, "none", lambda line: None)


@pytest.fixture
def engine(network: Network) -> Iterator[FastEngine]:
    engine = FastEngine(network, answer_prefix(processor.tokenizer))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model: KimiVLForConditionalGeneration) -> Iterator[ReferenceEngine]:
    engine = ReferenceEngine(model)
    yield engine
    engine.close()
