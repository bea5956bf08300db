# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Full attention inside one picture, without a score in memory: flash attention (Dao, arXiv 2307.08691).

Tiles have powers of two for sides and MoonViT's heads have 72 dimensions: a head is padded to 80, read as 64 and 16.
The first spare dimension of each value is 1, so that the product with the values sums the weights, too.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import LOG2_E, Operation, run_kernel

QUERIES = 128  # patches whose queries are in one program
KEYS = 64  # patches whose keys it reads at once
WARPS = 8
REGISTERS = 128  # of a thread: then a multiprocessor has room for two programs
STAGES = 3  # of keys and values on their way from memory


def padded(size: int) -> tuple[int, int]:
    """The two parts of a padded head of so many dimensions; the second has at least one to spare."""
    main = triton.next_power_of_2(size + 1) // 2
    return main, max(triton.next_power_of_2(size - main + 1), 16)


@triton.jit
def _load_head(head, patches, PATCHES, ROW: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr):
    """Both parts of a head of some patches."""
    rows = head + patches.to(tl.int64)[:, None] * ROW
    main, rest = rows + tl.arange(0, MAIN)[None, :], rows + MAIN + tl.arange(0, REST)[None, :]
    if MASKED:
        inside = (patches < PATCHES)[:, None]
        return tl.load(main, mask=inside, other=0.0), tl.load(rest, mask=inside, other=0.0)
    return tl.load(main), tl.load(rest)


@triton.jit
def _attend_to(
    q_main,
    q_rest,
    maximum,
    main,
    rest,
    keys,
    values,
    first,
    last,
    scale,
    ROW: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes in the patches from first up to last, KEYS at a time; MASKED where the last of them may be fewer."""
    for start in range(first, last, KEYS):
        patches = start + tl.arange(0, KEYS)
        k_main, k_rest = _load_head(keys, patches, last, ROW, MAIN, REST, MASKED)
        v_main, v_rest = _load_head(values, patches, last, ROW, MAIN, REST, MASKED)
        scores = tl.dot(q_rest, tl.trans(k_rest), tl.dot(q_main, tl.trans(k_main)))
        if MASKED:
            scores = tl.where(patches[None, :] < last, scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None]).to(v_main.dtype)
        shrink = tl.exp2(maximum - larger)[:, None]
        main = tl.dot(weights, v_main, main * shrink)
        rest = tl.dot(weights, v_rest, rest * shrink)
        maximum = larger
    return maximum, main, rest


@triton.jit
def _attend_picture_kernel(
    qkv,
    out,
    length,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    count = tl.load(length)
    if tl.program_id(0) * QUERIES >= count:
        return
    row: tl.constexpr = 3 * HEADS * (MAIN + REST)
    patches = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    queries = qkv + head * (MAIN + REST)
    keys, values = queries + row // 3, queries + row // 3 * 2
    q_main, q_rest = _load_head(queries, patches, count, row, MAIN, REST, True)

    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    rest = tl.zeros([QUERIES, REST], tl.float32)
    whole = count // KEYS * KEYS
    maximum, main, rest = _attend_to(
        q_main, q_rest, maximum, main, rest, keys, values, 0, whole, scale, row, MAIN, REST, KEYS, False
    )
    maximum, main, rest = _attend_to(
        q_main, q_rest, maximum, main, rest, keys, values, whole, count, scale, row, MAIN, REST, KEYS, True
    )
    columns = MAIN + tl.arange(0, REST)[None, :]
    total = tl.sum(tl.where(columns == SIZE, rest, 0.0), 1)[:, None]
    kind = out.dtype.element_ty
    inside = (patches < count)[:, None]
    rows = out + patches.to(tl.int64)[:, None] * (HEADS * SIZE) + head * SIZE
    tl.store(rows + tl.arange(0, MAIN)[None, :], (main / total).to(kind), mask=inside)
    tl.store(rows + columns, (rest / total).to(kind), mask=inside & (columns < SIZE))


def _launch_attend_picture(qkv: Tensor, length: Tensor, out: Tensor) -> None:
    patches, _, heads, _ = qkv.shape
    size = out.shape[1] // heads
    main, rest = padded(size)
    run_kernel(
        _attend_picture_kernel,
        (triton.cdiv(patches, QUERIES), heads),
        qkv,
        out,
        length,
        size**-0.5 * LOG2_E,
        HEADS=heads,
        SIZE=size,
        MAIN=main,
        REST=rest,
        QUERIES=QUERIES,
        KEYS=KEYS,
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )


def attend_picture_reference(qkv: Tensor, length: Tensor, out: Tensor) -> None:
    """Attention of every patch to every patch of the same picture.

    Args:
        qkv: [patches, 3, heads, padded], as `rotate_patches` writes it.
        length: [1] int32, the patches of the picture, at most as many as rows; the rest of them are of no account.
        out: [patches, heads * size], written.
    """
    count, heads = int(length), qkv.shape[2]
    queries, keys, values = qkv[:count, ..., : out.shape[1] // heads].permute(1, 2, 0, 3)[:, None]
    out[:count] = F.scaled_dot_product_attention(queries, keys, values)[0].transpose(0, 1).flatten(1)


attend_picture = Operation(_launch_attend_picture, attend_picture_reference)
