"""Each kernel of a decoding step against its reference, over sizes that fill no tile."""

from typing import Any

import pytest
import torch

from kimi_vl.engine.base import SamplingParams
from kimi_vl.engine.fast.kernels.experts import contract, expand
from kimi_vl.engine.fast.kernels.latent_attention import TOKENS, attend, merge, project_up
from kimi_vl.engine.fast.kernels.latent_query import absorb
from kimi_vl.engine.fast.kernels.linear import linear_add, norm_linear
from kimi_vl.engine.fast.kernels.operation import TILES, Operation, Tile
from kimi_vl.engine.fast.kernels.routing import Scratch, route
from kimi_vl.engine.fast.kernels.sampling import BLOCK, Draw, finish, penalise, pick, restrict
from tests.engine.fast.kernels import (
    DEVICE,
    DTYPES,
    HALF,
    TOLERANCE,
    attention_weights,
    check,
    gains,
    matrix,
    mlp_weights,
    normal,
    poison,
)


@DTYPES
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("columns", "rows"), [(64, 64), (200, 37), (72, 5), (2048, 13)])
def test_norm_linear(columns: int, rows: int, bits: int, dtype: torch.dtype) -> None:
    out, weight = poison(rows), matrix(rows, columns, bits=bits, dtype=dtype)
    arguments = (normal(columns, scale=3), gains(columns, dtype), weight, out)
    check(norm_linear, [out], *arguments, 1e-5, "projections", tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (50, 200), (7, 2048)])
def test_linear_add(rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    x = normal(rows)
    arguments = (x, matrix(rows, columns, bits=bits, dtype=dtype), normal(columns, dtype=dtype))
    check(linear_add, [x], *arguments, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_absorb(heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    projected = normal(weights.projections.shape[0])
    cache = normal(9, weights.row, dtype=dtype)
    query = poison(heads, weights.row, dtype=dtype)
    position = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    arguments = (projected, weights, normal(9, weights.rope), position, cache, query)
    check(absorb, [cache, query], *arguments, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("length", [1, TOKENS, TOKENS + 1, 9 * TOKENS + 5])
def test_attend_and_merge(length: int, heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    cache = normal(10 * TOKENS, weights.latent + weights.rope, dtype=dtype)
    cache[length:] = float("nan")  # what no token has written may hold anything
    query = normal(heads, weights.latent + weights.rope, dtype=dtype)
    position = torch.tensor([length - 1], dtype=torch.int32, device=DEVICE)
    parts, sums = poison(6, heads, weights.latent, dtype=dtype), poison(6, heads)  # `merge` reads 4 of them, and 2
    latents = poison(heads, weights.latent, dtype=dtype)

    def both(merge_of: Any, attend_of: Any) -> None:
        attend_of(query, cache, position, parts, sums, weights)
        merge_of(parts, sums, position, latents)

    operation = Operation(
        lambda *_: both(merge.launch, attend.launch), lambda *_: both(merge.reference, attend.reference)
    )
    check(operation, [latents], tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_project_up(heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    out = poison(heads * weights.value, dtype=dtype)
    arguments = (normal(heads, weights.latent, dtype=dtype), weights, out)
    check(project_up, [out], *arguments, tolerance=TOLERANCE[dtype])


def test_the_splits_joined_are_plain_attention() -> None:
    weights = attention_weights(3, torch.float32)
    length, position = 5 * TOKENS + 3, torch.tensor([5 * TOKENS + 2], dtype=torch.int32, device=DEVICE)
    cache, query = normal(length, weights.latent + weights.rope), normal(3, weights.latent + weights.rope)
    parts, sums, latents = poison(4, 3, weights.latent), poison(4, 3), poison(3, weights.latent)
    out = poison(3 * weights.value)
    attend.reference(query, cache, position, parts, sums, weights)
    merge.reference(parts, sums, position, latents)
    project_up.reference(latents, weights, out)
    mixed = torch.softmax(query @ cache.T * weights.scale, 1) @ cache[:, : weights.latent]
    values = weights.kv_b.view(3, -1, weights.latent)[:, weights.nope :]
    torch.testing.assert_close(out, torch.einsum("hl,hvl->hv", mixed, values).flatten(), rtol=1e-4, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("width", "inner", "experts", "chosen", "shared"),
    [(64, 32, 8, 2, 32), (72, 44, 7, 3, 100), (36, 10, 64, 6, 30), (16, 704, 3, 2, 352), (40, 20, 0, 0, 90)],
)
def test_mixture_of_experts(
    width: int, inner: int, experts: int, chosen: int, shared: int, bits: int, dtype: torch.dtype
) -> None:
    mlp = mlp_weights(width, inner, experts, chosen, shared, dtype, bits)
    work = Scratch.of(mlp, torch.full((chosen,), -1, dtype=torch.int32, device=DEVICE))
    x, tolerance = normal(width), TOLERANCE[dtype]
    outputs = [work.experts, work.weights, work.hidden] if chosen else []
    check(route, [*outputs, work.shared, work.arrived], x, mlp, work, tolerance=tolerance)
    check(expand, [x, work.activations] if chosen else [x], x, mlp, work, tolerance=tolerance)
    if chosen:
        check(contract, [x], x, mlp, work, tolerance=tolerance)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", [Tile(4096, 8), Tile(4096, 1), Tile(65536, 4)], ids=str)
def test_words_in_tiles_of_any_size(tile: Tile, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shared_gate_up", "shared_down", "gate_up", "down"):
        monkeypatch.setitem(TILES, (name, bits), tile)
    mlp, x = mlp_weights(40, 352, 3, 2, 360, HALF, bits), normal(40)
    work = Scratch.of(mlp, torch.full((2,), -1, dtype=torch.int32, device=DEVICE))
    for operation, written in ((route, work.shared), (expand, work.activations), (contract, x)):
        check(operation, [written], x, mlp, work, tolerance=TOLERANCE[HALF])


def test_experts_of_equal_score_are_taken_by_id() -> None:
    mlp = mlp_weights(16, 8, 8, 3, 8, torch.float32)
    mlp.router.zero_()
    mlp.bias.zero_()
    work = Scratch.of(mlp, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    route.launch(normal(16), mlp, work)
    assert work.experts.tolist() == [0, 1, 2]
    torch.testing.assert_close(work.weights, torch.full((3,), 2.446 / 3, device=DEVICE))


@pytest.mark.parametrize("temperature", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("vocabulary", [3, BLOCK, 2 * BLOCK + 57])
def test_picking_a_token(vocabulary: int, temperature: float) -> None:
    logits, draw = normal(vocabulary, scale=4), Draw.empty(DEVICE)
    draw.set(SamplingParams(1, frozenset(), temperature=temperature, seed=2**33 + 7), vocabulary)
    blocks = -(-vocabulary // BLOCK)
    best, ids = poison(blocks), torch.full((blocks,), -1, dtype=torch.int32, device=DEVICE)
    position = torch.tensor([100_000], dtype=torch.int32, device=DEVICE)
    check(pick, [best, ids], logits, draw, position, best, ids, tolerance=1e-5)


@pytest.mark.parametrize("vocabulary", [3, BLOCK, 2 * BLOCK + 57])
def test_penalising_what_was_generated(vocabulary: int) -> None:
    logits, draw = normal(vocabulary, scale=4), Draw.empty(DEVICE)
    before = logits.clone()
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}
    draw.set(SamplingParams(1, frozenset(), **penalties), vocabulary)
    counts = torch.randint(0, 4, (vocabulary,), dtype=torch.int32, device=DEVICE)
    counts[0] = 0
    check(penalise, [logits], logits, counts, draw, tolerance=1e-6)
    assert (logits == before).equal(counts == 0)


@pytest.mark.parametrize("vocabulary", [3, 32, BLOCK, 2 * BLOCK + 57])
def test_restricting(vocabulary: int) -> None:
    logits, mask = normal(vocabulary), torch.randint(-(2**31), 2**31, (-(-vocabulary // 32),), device=DEVICE).int()
    expected = [value if int(mask[i // 32]) >> i % 32 & 1 else float("-inf") for i, value in enumerate(logits.tolist())]
    for run in (restrict.reference, restrict.launch):
        restricted = logits.clone()
        run(restricted, mask)
        assert restricted.tolist() == expected


@pytest.mark.parametrize("counting", [False, True])
def test_finishing_a_step(counting: bool) -> None:
    best = normal(70)
    ids = torch.randperm(70, device=DEVICE).int()
    embeddings = normal(70, 40, dtype=torch.bfloat16)
    x, tokens = poison(40), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    position = torch.tensor([13], dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(70, dtype=torch.int32, device=DEVICE) if counting else None
    written = [x, tokens, position, *([counts] if counting else [])]
    check(finish, written, x, best, ids, embeddings, position, tokens, counts, tolerance=1e-6)
    assert tokens.tolist() == [0, 0, 0, 0, 0, ids[best.argmax()], 0, 0]
    assert position.item() == 14
    if counts is not None:
        assert counts.nonzero().tolist() == [[ids[best.argmax()]]]
        assert counts.sum() == 1
