"""Each kernel of a prompt against its reference, over sizes that fill no tile."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from kimi_vl.engine.fast.kernels import gated_product as gated
from kimi_vl.engine.fast.kernels.gated_product import WORTH_FUSING, gated_product, multiply_gated
from kimi_vl.engine.fast.kernels.join import join
from kimi_vl.engine.fast.kernels.product import FEW, MANY, WORTH_EXPANDING, add_product, multiply, product
from kimi_vl.engine.fast.kernels.prompt import gate, mix, rotate
from kimi_vl.engine.fast.kernels.prompt_attention import KEYS, ROWS, attend_parts, attend_prompt, best_count
from kimi_vl.engine.fast.kernels.prompt_routing import TOKENS, arrange, choose
from tests.engine.fast.kernels import (
    DEVICE,
    DTYPES,
    HALF,
    TOLERANCE,
    attention_weights,
    check,
    matrix,
    mlp_weights,
    normal,
    poison,
)


def span(start: int, length: int) -> torch.Tensor:
    return torch.tensor([start, length], dtype=torch.int32, device=DEVICE)


def integers(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32, device=DEVICE)


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_rotate(heads: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    projected, cache = normal(7, weights.projections.shape[0], dtype=dtype), poison(20, weights.row, dtype=dtype)
    rotary = normal(20, weights.rope)
    check(rotate, [projected], projected, weights, rotary, cache, span(9, 5), tolerance=TOLERANCE[dtype])
    assert cache[:9].isnan().all()
    assert cache[14:].isnan().all()
    cache.zero_()
    check(rotate, [cache], projected, weights, rotary, cache, span(9, 5), tolerance=TOLERANCE[dtype])
    with_queries = cache.clone()
    keys = projected[:, -weights.row :].contiguous()
    check(rotate, [cache], keys, weights, rotary, cache, span(9, 5), tolerance=TOLERANCE[dtype])
    torch.testing.assert_close(cache, with_queries)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 700), (2, 2100)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    out = poison(rows, width, dtype=dtype)
    check(gate, [out], normal(rows, 2 * width, dtype=dtype), out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "chosen"), [(1, 8, 1), (7, 200, 6)])
def test_mix(tokens: int, width: int, chosen: int, dtype: torch.dtype) -> None:
    padded = tokens + 2
    x, shared = normal(padded, width, dtype=dtype), normal(padded, width, dtype=dtype)
    places = integers(padded, chosen)
    places[:tokens] = torch.randperm(tokens * chosen, dtype=torch.int32, device=DEVICE).view(tokens, chosen)
    outputs = normal(tokens * chosen, width, dtype=dtype)
    arguments = x, shared, outputs, places, normal(padded, chosen), span(3, tokens)
    check(mix, [x], *arguments, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("past", "tokens"), [(0, 1), (0, ROWS), (0, ROWS + 1), (1, 5), (KEYS, 1), (KEYS - 1, ROWS + 3), (3 * KEYS + 5, 70)]
)
@pytest.mark.parametrize(("padding", "count"), [(0, 1), (ROWS, 1), (ROWS, 3)])
def test_attend_parts(past: int, tokens: int, heads: int, padding: int, count: int, dtype: torch.dtype) -> None:
    weights = attention_weights(heads, dtype)
    context = past + tokens
    q = normal(tokens + padding, heads * 48 + 16, dtype=dtype)[:, :-16]
    k = normal(context + padding, heads, weights.nope + 16, dtype=dtype)
    v = normal(context + padding, heads, 24 + weights.value, dtype=dtype)[..., 24:]
    cache = normal(context + 9, weights.row, dtype=dtype)
    cache[context:] = k[context:] = v[context:] = float("nan")  # what no token has written may hold anything
    parts = torch.zeros(count, tokens + padding, heads, weights.value, dtype=dtype, device=DEVICE)
    sums = torch.zeros(count, heads, tokens + padding, device=DEVICE)
    arguments = q, k, v, cache, weights, span(past, tokens), parts, sums
    check(attend_parts, [parts, sums], *arguments, tolerance=max(TOLERANCE[dtype], 1e-5))


@DTYPES
@pytest.mark.parametrize(("past", "tokens"), [(0, 70), (1, 1024), (2053, ROWS + 3)])
def test_attend_prompt_is_plain_attention(past: int, tokens: int, dtype: torch.dtype) -> None:
    weights = attention_weights(3, dtype)
    context = past + tokens
    q, kv = normal(tokens, 3 * 48, dtype=dtype), normal(context, len(weights.kv_b), dtype=dtype)
    k_nope, v = kv.view(context, 3, -1).split([weights.nope, weights.value], 2)
    cache = normal(context, weights.row, dtype=dtype)
    out = attend_prompt(q, k_nope, v, cache, weights, span(past, tokens))

    k = torch.cat([k_nope.float(), cache[:, None, weights.latent :].float().expand(-1, 3, -1)], 2)
    seen = torch.ones(tokens, context, dtype=torch.bool, device=DEVICE).tril(past)
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q.float().view(tokens, 3, -1), k, v.float()))
    plain = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=weights.scale)
    expected = plain[0].transpose(0, 1).flatten(1)
    assert (out.float() - expected).norm() < max(TOLERANCE[dtype], 1e-5) * expected.norm()


@pytest.mark.parametrize(
    ("programs", "keys", "count"),
    [(16, 100_000, 8), (16, 64, 1), (64, 100_000, 2), (144, 15_808, 3), (256, 1024, 1), (2048, 100_000, 1)],
)
def test_a_context_is_split_where_programs_are_few(programs: int, keys: int, count: int) -> None:
    assert best_count(programs, keys, at_a_time=132) == count


@DTYPES
@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize(("length", "width", "experts", "chosen"), [(1, 40, 3, 1), (32, 128, 8, 2), (77, 200, 64, 6)])
def test_choosing_experts_and_arranging_tokens(
    length: int, width: int, experts: int, chosen: int, padding: int, dtype: torch.dtype
) -> None:
    mlp = mlp_weights(width, 16, experts, chosen, 8, dtype)
    hidden = normal(length + padding, width, dtype=dtype)
    hidden[length:] = float("nan")
    blocks = -(-len(hidden) // TOKENS)
    where = span(5, length)
    ids, weights = integers(len(hidden), chosen), torch.zeros(len(hidden), chosen, device=DEVICE)
    counts = integers(blocks, experts)
    check(choose, [ids, weights, counts], hidden, mlp, ids, weights, counts, where, tolerance=1e-5)
    sources, places, ends = integers(len(hidden) * chosen), integers(len(hidden), chosen), integers(experts)
    check(arrange, [sources, places, ends], ids, counts, sources, places, ends, where, tolerance=1e-9)
    for expert in range(experts):
        rows = (places[:length] < ends[expert]) & (places[:length] >= (ends[expert - 1] if expert else 0))
        assert rows.equal(ids[:length] == expert)


@DTYPES
@pytest.mark.parametrize(("parts", "heads"), [(1, 1), (5, 3)])
def test_join(parts: int, heads: int, dtype: torch.dtype) -> None:
    mixed, sums = normal(9, heads, 32, dtype=dtype)[1:8], normal(heads, 9, scale=20)[:, 1:8]
    check(
        join,
        [mixed],
        mixed,
        sums,
        normal(parts, 7, heads, 32, dtype=dtype),
        normal(parts, heads, 7, scale=20),
        tolerance=TOLERANCE[dtype],
    )


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 5, 64), (7, 150, 200), (2 * FEW + 1, 40, 96), (150, 7, 72)]
)
def test_product(tokens: int, rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    out, x = poison(tokens, rows, dtype=dtype), normal(tokens, columns, dtype=dtype)
    weight = matrix(rows, columns, bits=bits, dtype=dtype)
    check(product, [out], x, weight, None, out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "counts", [[3], [0, 5, 0, FEW, 1], [FEW + 1, 0, 2 * FEW], [0, 3 * MANY + 1, 2]], ids=lambda counts: str(counts)
)
def test_product_of_each_experts_tokens(counts: list[int], bits: int, dtype: torch.dtype) -> None:
    padded, rows, columns = sum(counts) + 9, 140, 72
    x = normal(padded, columns, dtype=dtype)
    x[sum(counts) :] = float("nan")
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=DEVICE)
    out = torch.full((padded, rows), 7, dtype=dtype, device=DEVICE)
    weight = matrix(len(counts), rows, columns, bits=bits, dtype=dtype)
    check(product, [out], x, weight, ends, out, tolerance=TOLERANCE[dtype])
    assert out[sum(counts) :].eq(7).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [WORTH_EXPANDING - 1, WORTH_EXPANDING + 5])
def test_multiply_whatever_computes_it(tokens: int, bits: int) -> None:
    dtype = HALF if DEVICE.type == "cuda" else torch.float32
    one, x = matrix(150, 96, bits=bits, dtype=dtype), normal(tokens, 96, dtype=dtype)
    expected = x.float() @ one.float().T
    assert_near(multiply(x, one), expected, TOLERANCE[dtype])
    onto = normal(tokens, 150, dtype=dtype)
    before = onto.float().clone()
    add_product(onto, x, one)
    assert_near(onto, before + expected, TOLERANCE[dtype])
    several, first = matrix(2, 64, 96, bits=bits, dtype=dtype), tokens // 3
    ends = torch.tensor([first, tokens], dtype=torch.int32, device=DEVICE)
    expected = torch.cat([x[:first].float() @ several[0].float().T, x[first:].float() @ several[1].float().T])
    assert_near(multiply(x, several, ends), expected, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("abreast", [gated.ABREAST, 2])
@pytest.mark.parametrize(("tokens", "inner", "width"), [(1, 5, 64), (gated.TOKENS + 1, 2 * gated.COLUMNS + 3, 72)])
def test_gated_product(
    tokens: int, inner: int, width: int, abreast: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "ABREAST", abreast)
    out, x = poison(tokens, inner, dtype=dtype), normal(tokens, width, dtype=dtype)
    weight = normal(2 * inner, width, dtype=dtype, scale=0.2)
    check(gated_product, [out], x, weight, None, None, out, tolerance=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(
    "counts",
    [[3], [0, 0], [0, 5, 0, gated.TOKENS, 1], [gated.TOKENS + 1, 0, 2 * gated.TOKENS], [1] * 25],
    ids=str,
)
@pytest.mark.parametrize("abreast", [gated.ABREAST, 1])
def test_gated_product_of_each_experts_tokens(
    abreast: int, counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "ABREAST", abreast)
    padded, inner, width = sum(counts) + 9, gated.COLUMNS + 8, 72
    x, sources = normal(50, width, dtype=dtype), torch.randint(49, [padded], dtype=torch.int32).to(DEVICE)
    x[49], sources[sum(counts) :] = float("nan"), 49
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=DEVICE)
    out = torch.full((padded, inner), 7, dtype=dtype, device=DEVICE)
    weight = normal(len(counts), 2 * inner, width, dtype=dtype, scale=0.2)
    check(gated_product, [out], x, weight, sources, ends, out, tolerance=TOLERANCE[dtype])
    assert out[sum(counts) :].eq(7).all()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tokens", [WORTH_FUSING - 1, WORTH_FUSING])
def test_multiply_gated_whatever_computes_it(tokens: int, bits: int) -> None:
    dtype = HALF if DEVICE.type == "cuda" else torch.float32
    x, several = normal(tokens, 96, dtype=dtype), matrix(2, 80, 96, bits=bits, dtype=dtype, scale=0.2)
    ends = torch.tensor([tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
    order = torch.randperm(tokens).to(DEVICE, torch.int32)
    for weight, sources, offsets in ((several[0], None, None), (several, order, ends)):
        expected = normal(tokens, 40)
        gated_product.reference(x, weight.float(), sources, offsets, expected)
        assert_near(multiply_gated(x, weight, sources, offsets), expected, TOLERANCE[dtype])


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (got.float() - expected).norm() / expected.norm() < tolerance
