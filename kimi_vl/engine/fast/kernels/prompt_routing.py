# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A prompt's tokens to their experts: `choose` picks them, `arrange` sorts the tokens by expert.

For `span` see kernels/prompt.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel
from kimi_vl.engine.fast.weights import Mlp

TOKENS = 32  # of one program
COLUMNS = 128  # of a token that are read at once


@triton.jit
def _choose_kernel(
    hidden,
    router,
    bias,
    experts,
    weights,
    counts,
    span,
    WIDTH,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    FACTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    length = tl.load(span + 1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ids = tl.arange(0, BLOCK)
    logits = tl.zeros([TOKENS, BLOCK], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < WIDTH)[None, :]
        rows = tokens.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        part = tl.load(hidden + rows, mask=(tokens < length)[:, None] & inside, other=0.0)
        routing = tl.load(
            router + ids[:, None] * WIDTH + columns[None, :], mask=(ids < EXPERTS)[:, None] & inside, other=0.0
        )
        logits = tl.dot(part, tl.trans(routing), logits)
    score = tl.sigmoid(logits)
    known = ids < EXPERTS
    left = tl.where(known[None, :], score + tl.load(bias + ids, mask=known, other=0.0)[None, :], float("-inf"))
    rank = tl.full([TOKENS, BLOCK], CHOSEN, tl.int32)
    for slot in tl.static_range(CHOSEN):
        largest = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == largest, ids[None, :], BLOCK), 1)[:, None]
        taken = ids[None, :] == first
        rank = tl.where(taken, slot, rank)
        left = tl.where(taken, float("-inf"), left)
    chosen = (rank < CHOSEN) & (tokens < length)[:, None]
    total = tl.sum(tl.where(chosen, score, 0.0), 1) + 1e-20
    places = tokens[:, None] * CHOSEN + rank
    tl.store(experts + places, tl.broadcast_to(ids[None, :], [TOKENS, BLOCK]), mask=chosen)
    tl.store(weights + places, score / total[:, None] * FACTOR, mask=chosen)
    tl.store(counts + tl.program_id(0) * EXPERTS + ids, tl.sum(chosen.to(tl.int32), 0), mask=known)


def _launch_choose(hidden: Tensor, mlp: Mlp, experts: Tensor, weights: Tensor, counts: Tensor, span: Tensor) -> None:
    run_kernel(
        _choose_kernel,
        (len(counts),),
        hidden,
        mlp.router,
        mlp.bias,
        experts,
        weights,
        counts,
        span,
        hidden.shape[1],
        EXPERTS=len(mlp.router),
        BLOCK=max(16, triton.next_power_of_2(len(mlp.router))),
        CHOSEN=mlp.chosen,
        FACTOR=mlp.factor,
        TOKENS=TOKENS,
        COLUMNS=COLUMNS,
    )


def choose_reference(hidden: Tensor, mlp: Mlp, experts: Tensor, weights: Tensor, counts: Tensor, span: Tensor) -> None:
    """Each token's experts: the largest of score + bias; their weights are their scores scaled to sum to the factor.

    (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16.)

    Args:
        hidden: [tokens, width], normalised.
        mlp: the layer's weights.
        experts: [tokens, chosen] int32, written.
        weights: [tokens, chosen] float32, written.
        counts: [blocks of TOKENS tokens, experts] int32, written: how many of a block's tokens chose each expert.
        span: of the piece.
    """
    length = int(span[1])
    scores = F.linear(hidden[:length].float(), mlp.router.float()).sigmoid()
    chosen = (scores + mlp.bias).topk(mlp.chosen).indices
    picked = scores.gather(1, chosen)
    experts[:length] = chosen
    weights[:length] = picked / (picked.sum(1, keepdim=True) + 1e-20) * mlp.factor
    counts.zero_()
    for count, block in zip(counts, chosen.split(TOKENS), strict=False):
        count.copy_(block.flatten().bincount(minlength=len(mlp.router)))


choose = Operation(_launch_choose, choose_reference)


@triton.jit(do_not_specialize=["BLOCKS"])
def _arrange_kernel(
    experts,
    counts,
    sources,
    places,
    ends,
    span,
    BLOCKS,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    length = tl.load(span + 1)
    tokens = program * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < length
    ids = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCKS, TOKENS):
        blocks = start + tl.arange(0, TOKENS)
        mask = (blocks < BLOCKS)[:, None] & (ids < EXPERTS)[None, :]
        part = tl.load(counts + blocks[:, None] * EXPERTS + ids[None, :], mask=mask, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((blocks < program)[:, None], part, 0), 0)
    last = tl.cumsum(total, 0)
    if program == 0:
        tl.store(ends + ids, last, mask=ids < EXPERTS)
    taken = tl.zeros([TOKENS, BLOCK], tl.int32)
    for slot in tl.static_range(CHOSEN):
        expert = tl.load(experts + tokens * CHOSEN + slot, mask=inside, other=BLOCK)
        taken += (ids[None, :] == expert[:, None]).to(tl.int32)
    all_places = (last - total + before)[None, :] + tl.cumsum(taken, 0) - taken
    for slot in tl.static_range(CHOSEN):
        expert = tl.load(experts + tokens * CHOSEN + slot, mask=inside, other=BLOCK)
        place = tl.sum(tl.where(ids[None, :] == expert[:, None], all_places, 0), 1)
        tl.store(places + tokens * CHOSEN + slot, place, mask=inside)
        tl.store(sources + place, tokens, mask=inside)


def _launch_arrange(
    experts: Tensor, counts: Tensor, sources: Tensor, places: Tensor, ends: Tensor, span: Tensor
) -> None:
    blocks, count = counts.shape
    run_kernel(
        _arrange_kernel,
        (blocks,),
        experts,
        counts,
        sources,
        places,
        ends,
        span,
        blocks,
        EXPERTS=count,
        BLOCK=triton.next_power_of_2(count),
        CHOSEN=experts.shape[1],
        TOKENS=TOKENS,
    )


def arrange_reference(
    experts: Tensor, counts: Tensor, sources: Tensor, places: Tensor, ends: Tensor, span: Tensor
) -> None:
    """A row for each token and each of its experts, sorted by expert and then by token, as grouped products take them.

    Args:
        experts, counts: of `choose`.
        sources: [tokens * chosen] int32, written: the token of each row.
        places: [tokens, chosen] int32, written: the row for each of a token's experts.
        ends: [experts] int32, written: where each expert's rows end.
        span: of the piece.
    """
    length, chosen = int(span[1]), experts.shape[1]
    order = experts[:length].flatten().sort(stable=True).indices
    sources[: length * chosen] = order // chosen
    places.view(-1)[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    ends.copy_(counts.sum(0).cumsum(0))


arrange = Operation(_launch_arrange, arrange_reference)
