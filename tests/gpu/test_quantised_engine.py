"""On a CUDA GPU: what fewer bits cost, at full size in the logits and with the tiny model in its answers."""

from contextlib import closing

import pytest
import torch

from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import WEIGHTS
from tests.gpu.errors import fast_error, random_ids
from tests.tiny_questions import answered, asked, divergence, is_right, log_probabilities

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LOST = {"int8": 0.03, "int4": 0.5}  # of the logits, relative; of 4 bits only what would be nonsense
POINTS = {"int8": 0.5, "int4": 3.0}  # of accuracy, in percent
DECODED = 3


@pytest.mark.parametrize("name", LOST)
def test_logits_at_full_size(
    name: str, full_size: KimiVLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, ids = Network.of(full_size), random_ids(1000)
    small = exact.quantised(SCHEMES[name])
    with closing(FastEngine(small)) as engine:
        prefilled = fast_error(engine, ids, 0, monkeypatch, exact.weights)
        decoded = fast_error(engine, ids, DECODED, monkeypatch, exact.weights)
    print(f"{name}, {small.nbytes / 1e9:.2f} GB: prefill {prefilled:.4f}, last {DECODED} decoded {decoded:.4f}")
    assert prefilled < LOST[name]
    assert decoded < LOST[name]


def test_the_tiny_model_still_answers() -> None:
    network, questions = load_network(WEIGHTS / "tiny", CUDA, torch.bfloat16, "none", print), asked(500)
    with closing(FastEngine(network)) as engine:
        given = [answered(engine, inputs) for _, inputs in questions]
        wanted = [
            log_probabilities(engine, inputs, tokens) for (_, inputs), tokens in zip(questions, given, strict=True)
        ]
    rights = [is_right(tokens, answer) for tokens, (answer, _) in zip(given, questions, strict=True)]
    for name, points in POINTS.items():
        with closing(FastEngine(network.quantised(SCHEMES[name]))) as quantised:
            right, divergences = 0, []
            for tokens, exact, (answer, inputs) in zip(given, wanted, questions, strict=True):
                right += is_right(answered(quantised, inputs), answer)
                divergences.append(divergence(exact, log_probabilities(quantised, inputs, tokens)))
        mean = float(torch.cat(divergences).mean())
        print(f"{name}: {right} of {len(questions)} right, {sum(rights)} with all bits; divergence {mean:.1e}")
        assert sum(rights) - right <= points / 100 * len(questions)
