# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Full attention inside one picture, without a score in memory: flash attention (Dao, arXiv 2307.08691).

Tiles have powers of two for sides and MoonViT's heads have 72 dimensions: a head is padded to 80, in parts of 64 and
16. With the spare dimensions, as `rotate_patches` fills them, the products do all that there is to do beside 2 to the
power of each score: the first hides keys beyond the picture and sums the weights, the second lowers a query's scores.

They are lowered by the largest score of the first tile, and no larger one is looked for later: weights have the range
of float32. Where that is too little, all keys are asked for the largest, and everything is done again.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation, run_kernel

QUERIES = 128  # patches whose queries are in one program
KEYS = 64  # patches whose keys it reads at once
WARPS = 4  # a multiprocessor has room for two programs
STAGES = 3  # of keys and values on their way from memory
LIMIT = 2.0**96  # of the sum of a query's weights: float32 holds 2**32 times as much, which is for the values


def padded(size: int) -> tuple[int, int]:
    """The two parts of a padded head of so many dimensions; the second has at least two to spare."""
    main = triton.next_power_of_2(size + 1) // 2
    return main, max(triton.next_power_of_2(size - main + 2), 16)


def empty_heads(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Room for both parts of the heads of [patches, 3, heads, size]: [3, heads, rows of whole tiles, part]."""
    patches, _, heads, size = qkv.shape
    rows = triton.cdiv(patches, QUERIES) * QUERIES
    main, rest = padded(size)
    return qkv.new_empty(3, heads, rows, main), qkv.new_empty(3, heads, rows, rest)


@triton.jit
def _load(part, first, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """One part of a head, of COUNT patches from the first on."""
    return tl.load(part + ((first + tl.arange(0, COUNT))[:, None] * SIZE + tl.arange(0, SIZE)[None, :]))


@triton.jit
def _scores(q_main, q_rest, k_main, k_rest, first, KEYS: tl.constexpr):
    scores = tl.dot(q_main, tl.trans(_load(k_main, first, KEYS, q_main.shape[1])))
    return tl.dot(q_rest, tl.trans(_load(k_rest, first, KEYS, q_rest.shape[1])), scores)


@triton.jit
def _lower(q_main, q_rest, k_main, k_rest, count, SPARE: tl.constexpr, KEYS: tl.constexpr):
    """The second part of queries, so that the largest of their scores with the first keys is 0, or nearly."""
    largest = tl.full([q_rest.shape[0]], float("-inf"), tl.float32)
    for first in range(0, count, KEYS):
        largest = tl.maximum(largest, tl.max(_scores(q_main, q_rest, k_main, k_rest, first, KEYS), 1))
    lowering = tl.arange(0, q_rest.shape[1])[None, :] == SPARE + 1
    return tl.where(lowering, -largest[:, None], q_rest).to(q_rest.dtype)


@triton.jit
def _attend(q_main, q_rest, k_main, k_rest, v_main, v_rest, count, SPARE: tl.constexpr, KEYS: tl.constexpr):
    """The weighted sums of both parts of the values, and of the weights."""
    main, rest = tl.zeros(q_main.shape, tl.float32), tl.zeros(q_rest.shape, tl.float32)
    for first in range(0, count, KEYS):
        weights = tl.exp2(_scores(q_main, q_rest, k_main, k_rest, first, KEYS)).to(q_main.dtype)
        main = tl.dot(weights, _load(v_main, first, KEYS, q_main.shape[1]), main)
        rest = tl.dot(weights, _load(v_rest, first, KEYS, q_rest.shape[1]), rest)
    ones = tl.arange(0, q_rest.shape[1])[None, :] == SPARE
    return main, rest, tl.sum(tl.where(ones, rest, 0.0), 1)[:, None]


@triton.jit
def _attend_picture_kernel(
    main,
    rest,
    out,
    length,
    rows,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    head, start = tl.program_id(1), tl.program_id(0) * QUERIES
    count = tl.load(length)
    if start >= count:
        return
    queries = head.to(tl.int64) * rows
    keys, values = queries + HEADS * rows, queries + 2 * HEADS * rows
    k_main, k_rest = main + keys * MAIN, rest + keys * REST
    v_main, v_rest = main + values * MAIN, rest + values * REST

    spare: tl.constexpr = SIZE - MAIN
    q_main = _load(main + queries * MAIN, start, QUERIES, MAIN)
    q_rest = _load(rest + queries * REST, start, QUERIES, REST)
    q_rest = _lower(q_main, q_rest, k_main, k_rest, 1, spare, KEYS)
    x_main, x_rest, total = _attend(q_main, q_rest, k_main, k_rest, v_main, v_rest, count, spare, KEYS)
    if tl.max(total) > LIMIT:
        q_rest = _load(rest + queries * REST, start, QUERIES, REST)  # again, so that it is kept in no register
        q_rest = _lower(q_main, q_rest, k_main, k_rest, count, spare, KEYS)
        x_main, x_rest, total = _attend(q_main, q_rest, k_main, k_rest, v_main, v_rest, count, spare, KEYS)

    patches, columns = start + tl.arange(0, QUERIES)[:, None], MAIN + tl.arange(0, REST)[None, :]
    kind = out.dtype.element_ty
    inside = patches < count
    target = out + patches.to(tl.int64) * (HEADS * SIZE) + head * SIZE
    tl.store(target + tl.arange(0, MAIN)[None, :], (x_main / total).to(kind), mask=inside)
    tl.store(target + columns, (x_rest / total).to(kind), mask=inside & (columns < SIZE))


def _launch_attend_picture(main: Tensor, rest: Tensor, length: Tensor, out: Tensor) -> None:
    _, heads, rows, _ = main.shape
    run_kernel(
        _attend_picture_kernel,
        (triton.cdiv(len(out), QUERIES), heads),
        main,
        rest,
        out,
        length,
        rows,
        HEADS=heads,
        SIZE=out.shape[1] // heads,
        MAIN=main.shape[3],
        REST=rest.shape[3],
        QUERIES=QUERIES,
        KEYS=KEYS,
        LIMIT=LIMIT,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def attend_picture_reference(main: Tensor, rest: Tensor, length: Tensor, out: Tensor) -> None:
    """Attention of every patch to every patch of the same picture.

    Args:
        main, rest: [3, heads, rows, part], as `rotate_patches` writes them.
        length: [1] int32, the patches of the picture.
        out: [at least so many patches, heads * size], written; what is in the others is of no account.
    """
    count, size = int(length), out.shape[1] // main.shape[1]
    queries, keys, values = torch.cat([main, rest], -1)[:, None, :, :count, :size]
    attended = F.scaled_dot_product_attention(queries, keys, values, scale=math.log(2))
    out[:count] = attended[0].transpose(0, 1).flatten(1)


attend_picture = Operation(_launch_attend_picture, attend_picture_reference)
