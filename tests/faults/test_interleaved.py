"""No request is answered from another's pictures, or from what was kept of them: 300 at once, with cancels."""

from pathlib import Path

import torch

from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.model.variants import WEIGHTS, find_model
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.chat import answer_prefix
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.service import Service
from kimi_vl.settings import Settings
from tests.faults.interleaved import NUMBERS, interleave, pictures, requests

ENOUGH = 11  # tokens, in which the thinking begins to name the number


def test_300_requests_with_cancels_each_get_their_own_answer(tmp_path: Path) -> None:
    network = load_network(WEIGHTS / "tiny", torch.device("cpu"), torch.float32, "none", lambda line: None)
    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    engine = FastEngine(network, answer_prefix(processor.tokenizer))  # the one that keeps features and prompts
    service = Service(Settings(), find_model("tiny", "")[1], processor, engine)
    asked = requests(pictures(tmp_path), ENOUGH)
    alone = {joined(service.answer(request)).thinking for request in asked[: len(NUMBERS)]}
    assert len(alone) == len(NUMBERS), "the right answers differ"
    answered, cancelled = interleave(service, asked, 300)
    assert answered > 150
    assert cancelled > 50
    service.close()
