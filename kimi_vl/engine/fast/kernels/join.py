# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Attention to parts of a context, each on its own, made attention to all of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel


@triton.jit(do_not_specialize=["PARTS", "TOKENS"])
def _join_kernel(parts, sums, out, PARTS, TOKENS, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, VALUE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    heads, values = tl.arange(0, HEADS_BLOCK), tl.arange(0, VALUE)
    inside = heads < HEADS
    largest = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
    for part in range(PARTS):
        largest = tl.maximum(largest, tl.load(sums + (part * HEADS + heads) * TOKENS + token, mask=inside, other=0.0))
    total = tl.zeros([HEADS_BLOCK], tl.float32)
    weighted = tl.zeros([HEADS_BLOCK, VALUE], tl.float32)
    places = (token * HEADS + heads)[:, None] * VALUE + values[None, :]
    for part in range(PARTS):
        share = tl.exp(tl.load(sums + (part * HEADS + heads) * TOKENS + token, mask=inside, other=0.0) - largest)
        rows = parts + part * TOKENS.to(tl.int64) * HEADS * VALUE + places
        weighted += share[:, None] * tl.load(rows, mask=inside[:, None], other=0.0).to(tl.float32)
        total += share
    tl.store(out + places, (weighted / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


def _launch_join(parts: Tensor, sums: Tensor, out: Tensor) -> None:
    count, tokens, heads, value = parts.shape
    block = triton.next_power_of_2(heads)
    run_kernel(_join_kernel, (tokens,), parts, sums, out, count, tokens, HEADS=heads, HEADS_BLOCK=block, VALUE=value)


def join_reference(parts: Tensor, sums: Tensor, out: Tensor) -> None:
    """Weighs each part by its share of the sum of exp(score).

    Args:
        parts: [parts, tokens, heads, value], attention to each part of the context.
        sums: [parts, heads, tokens] float32, the logarithm of each part's sum of exp(score).
        out: [tokens, heads * value], written.
    """
    shares = torch.softmax(sums, 0).transpose(1, 2)[..., None]
    out.copy_((parts.float() * shares).sum(0).flatten(1))


join = Operation(_launch_join, join_reference)


def empty_parts(like: Tensor, count: int, tokens: int, heads: int, value: int) -> tuple[Tensor, Tensor]:
    """Room for what `joined` takes, of a tensor's type and on its device."""
    parts = like.new_empty(count, tokens, heads, value)
    return parts, torch.empty(count, heads, tokens, device=like.device)


def joined(parts: Tensor, sums: Tensor) -> Tensor:
    """[tokens, heads * value], in place of the first part; for the arguments see join_reference."""
    out = parts[0].flatten(1)
    if len(parts) > 1:
        join(parts, sums, out)  # which reads all parts of a token before it writes
    return out
