# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Attention to parts of a context, each on its own, made attention to all of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel


@triton.jit(do_not_specialize=["PARTS", "TOKENS", "stride"])
def _join_kernel(
    mixed,
    mixed_sums,
    parts,
    sums,
    PARTS,
    TOKENS,
    stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads, values = tl.arange(0, HEADS_BLOCK), tl.arange(0, VALUE)
    inside = heads < HEADS
    first = tl.load(mixed_sums + heads * stride + token, mask=inside, other=0.0)
    largest = first
    for part in range(PARTS):
        largest = tl.maximum(largest, tl.load(sums + (part * HEADS + heads) * TOKENS + token, mask=inside, other=0.0))
    total = tl.exp(first - largest)
    places = (token * HEADS + heads)[:, None] * VALUE + values[None, :]
    weighted = total[:, None] * tl.load(mixed + places, mask=inside[:, None], other=0.0).to(tl.float32)
    for part in range(PARTS):
        share = tl.exp(tl.load(sums + (part * HEADS + heads) * TOKENS + token, mask=inside, other=0.0) - largest)
        rows = parts + part * TOKENS.to(tl.int64) * HEADS * VALUE + places
        weighted += share[:, None] * tl.load(rows, mask=inside[:, None], other=0.0).to(tl.float32)
        total += share
    tl.store(mixed + places, (weighted / total[:, None]).to(mixed.dtype.element_ty), mask=inside[:, None])


def _launch_join(mixed: Tensor, mixed_sums: Tensor, parts: Tensor, sums: Tensor) -> None:
    count, tokens, heads, value = parts.shape
    run_kernel(
        _join_kernel,
        (tokens,),
        mixed,
        mixed_sums,
        parts,
        sums,
        count,
        tokens,
        mixed_sums.stride(0),
        HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        VALUE=value,
    )


def join_reference(mixed: Tensor, mixed_sums: Tensor, parts: Tensor, sums: Tensor) -> None:
    """Weighs attention to each part of the context by its share of the sum of exp(score).

    Args:
        mixed: [tokens, heads, value], contiguous, attention to one part; becomes attention to all of them.
        mixed_sums: [heads, tokens] float32, the logarithm of that part's sum of exp(score); heads may be further apart.
        parts: [parts, tokens, heads, value], contiguous, attention to each of the others.
        sums: [parts, heads, tokens] float32, contiguous, their logarithms.
    """
    shares = torch.softmax(torch.cat([mixed_sums[None], sums]), 0).transpose(1, 2)[..., None]
    mixed.copy_((torch.cat([mixed[None], parts]).float() * shares).sum(0))


join = Operation(_launch_join, join_reference)
