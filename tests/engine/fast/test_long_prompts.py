"""Prompts of many small chunks by rectangles, cuDNN stood in for: as without them, and the same wherever taken up."""

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from kimi_vl.engine.base import ModelInputs
from kimi_vl.engine.fast.engine import FastEngine, _piece_ends
from kimi_vl.engine.fast.loading import load_network
from kimi_vl.model.variants import WEIGHTS
from tests.engine.fast.kernels import plain_attention

CPU = torch.device("cpu")
CHUNK, QUERIES = 16, 4
ANSWER = (7, 9)  # the ids that begin an answer


@pytest.fixture(scope="module")
def engine() -> Iterator[FastEngine]:
    network = load_network(WEIGHTS / "tiny", CPU, torch.bfloat16, "none", lambda line: None)
    with closing(FastEngine(network, ANSWER)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine", "prefill", "chunk_attention"):
        monkeypatch.setattr(f"kimi_vl.engine.fast.{module}.CHUNK", CHUNK)
        monkeypatch.setattr(f"kimi_vl.engine.fast.{module}.OPENING", 2 * CHUNK)
    monkeypatch.setattr("kimi_vl.engine.fast.chunk_attention.QUERIES", QUERIES)
    monkeypatch.setattr("kimi_vl.engine.fast.prefill.is_hopper", lambda device: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", plain_attention)


def prompt(length: int, answers: list[int]) -> torch.Tensor:
    ids = torch.randint(10, 400, (1, length), generator=torch.Generator().manual_seed(length))
    for place in answers:
        ids[0, place : place + len(ANSWER)] = torch.tensor(ANSWER)
    return ids


def read(engine: FastEngine, ids: torch.Tensor, kept: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits after a prompt and its rows of the cache, of which so many are there before."""
    engine.cache[:, kept:] = float("nan")
    engine._read(ModelInputs(ids))
    assert engine.cached_tokens == kept
    return engine.decoder.logits.clone(), engine.cache[:, : ids.shape[1]].clone()


@torch.inference_mode()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("length", "answers"), [(85, []), (128, [50]), (131, [20, 70, 75, 110]), (60, [13, 30])])
def test_a_long_prompt_is_the_same_wherever_it_is_taken_up(
    length: int, answers: list[int], fused: bool, engine: FastEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine", "prefill"):
        monkeypatch.setattr(f"kimi_vl.engine.fast.{module}.is_fused", lambda matrix, device: fused)
    ids = prompt(length, answers)
    engine._seen = None
    logits, rows = read(engine, ids)
    assert engine._seen
    for stop in _piece_ends(engine._seen)[:-1]:
        engine._seen = None
        read(engine, torch.cat([ids[:, :stop], prompt(9, [])], 1))
        others, other_rows = read(engine, ids, stop)
        assert others.equal(logits)
        assert other_rows.equal(rows)
    monkeypatch.setattr("kimi_vl.engine.fast.prefill.is_hopper", lambda device: False)
    engine._seen = None
    plain, _ = read(engine, ids)
    assert (logits - plain).norm() < 0.05 * plain.norm()
