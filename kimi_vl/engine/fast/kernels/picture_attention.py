# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Full attention inside one picture, without a score in memory: flash attention (Dao, arXiv 2307.08691).

Tiles have powers of two for sides and MoonViT's heads have 72 dimensions: a head is read as its first 64 and the rest,
which is padded to 16. Padded to 128 at once, the products would be 60 % larger.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation

QUERIES = 128  # patches whose queries are in one program
KEYS = 64  # patches whose keys it reads at once
WARPS = 4
STAGES = 3  # of keys and values on their way from memory
LOG2_E = 1.4426950408889634


@triton.jit
def _load_head(
    head,
    patches,
    PATCHES,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A head of some patches: its first MAIN dimensions, and the others with zeros up to REST."""
    main, rest = tl.arange(0, MAIN)[None, :], MAIN + tl.arange(0, REST)[None, :]
    rows = head + patches.to(tl.int64)[:, None] * ROW
    if MASKED:
        inside = (patches < PATCHES)[:, None]
        first = tl.load(rows + main, mask=inside, other=0.0)
        second = tl.load(rows + rest, mask=inside & (rest < SIZE), other=0.0)
    else:
        first = tl.load(rows + main)
        second = tl.load(rows + rest, mask=rest < SIZE, other=0.0)
    return first, second


@triton.jit
def _attend_to(
    q_main,
    q_rest,
    maximum,
    total,
    main,
    rest,
    keys,
    values,
    first,
    last,
    scale,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes in the patches from first up to last, KEYS at a time; MASKED where the last of them may be fewer."""
    for start in range(first, last, KEYS):
        patches = start + tl.arange(0, KEYS)
        k_main, k_rest = _load_head(keys, patches, last, ROW, SIZE, MAIN, REST, MASKED)
        v_main, v_rest = _load_head(values, patches, last, ROW, SIZE, MAIN, REST, MASKED)
        scores = tl.dot(q_rest, tl.trans(k_rest), tl.dot(q_main, tl.trans(k_main)))
        if MASKED:
            scores = tl.where(patches[None, :] < last, scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(v_main.dtype)
        main = tl.dot(weights, v_main, main * shrink[:, None])
        rest = tl.dot(weights, v_rest, rest * shrink[:, None])
        maximum = larger
    return maximum, total, main, rest


@triton.jit(do_not_specialize=["PATCHES"])  # one compilation for pictures of every size
def _attend_picture_kernel(
    qkv,
    out,
    PATCHES,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * SIZE
    row: tl.constexpr = 3 * width
    patches = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    queries = qkv + head * SIZE
    q_main, q_rest = _load_head(queries, patches, PATCHES, row, SIZE, MAIN, REST, True)

    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    rest = tl.zeros([QUERIES, REST], tl.float32)
    whole = PATCHES // KEYS * KEYS
    maximum, total, main, rest = _attend_to(
        q_main, q_rest, maximum, total, main, rest, queries + width, queries + 2 * width, 0, whole, scale,
        row, SIZE, MAIN, REST, KEYS, False,
    )  # fmt: skip
    maximum, total, main, rest = _attend_to(
        q_main, q_rest, maximum, total, main, rest, queries + width, queries + 2 * width, whole, PATCHES, scale,
        row, SIZE, MAIN, REST, KEYS, True,
    )  # fmt: skip

    kind = out.dtype.element_ty
    inside = (patches < PATCHES)[:, None]
    rows = out + patches.to(tl.int64)[:, None] * width + head * SIZE
    columns = MAIN + tl.arange(0, REST)[None, :]
    tl.store(rows + tl.arange(0, MAIN)[None, :], (main / total[:, None]).to(kind), mask=inside)
    tl.store(rows + columns, (rest / total[:, None]).to(kind), mask=inside & (columns < SIZE))


def _launch_attend_picture(qkv: Tensor, out: Tensor) -> None:
    patches, _, heads, size = qkv.shape
    main = triton.next_power_of_2(size) // 2
    _attend_picture_kernel[(triton.cdiv(patches, QUERIES), heads)](
        qkv,
        out,
        patches,
        size**-0.5 * LOG2_E,
        HEADS=heads,
        SIZE=size,
        MAIN=main,
        REST=max(triton.next_power_of_2(size - main), 16),
        QUERIES=QUERIES,
        KEYS=KEYS,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def attend_picture_reference(qkv: Tensor, out: Tensor) -> None:
    """Attention of every patch to every patch of the same picture.

    Args:
        qkv: [patches, 3, heads, size], queries and keys rotated; size is a multiple of 8, and 24 or more.
        out: [patches, heads * size], written.
    """
    queries, keys, values = qkv.permute(1, 2, 0, 3)[:, None]
    out.copy_(F.scaled_dot_product_attention(queries, keys, values)[0].transpose(0, 1).flatten(1))


attend_picture = Operation(_launch_attend_picture, attend_picture_reference)
