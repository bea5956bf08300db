# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""How decoding kernels read a Matrix of 16, 8 or 4 bits, and multiply it with a vector.

They read tiles of its `values`, in units: numbers of 16 bits, or words that hold several (see quantise.py). A vector is
then a tuple of as many planes as a unit has numbers (PLANES: 1, 4 or 8), each with one for every unit.

Units of a row are [numbers], or [stretches, words of one]: a stretch is what a thread loads at once. Its words lie in
one group of columns, and are summed before they meet their scale. A tile of numbers is [rows, numbers], but one of
words [stretches, rows, words of one]: of three axes Triton spreads the first over the threads.
"""

import triton
import triton.language as tl

from kimi_vl.engine.fast.kernels.quantise import WORDS

SMALL = 2.0**-49  # products with words are computed times this, and come to their size with the scales


def piece_sizes(units: int, bits: int) -> dict[str, int]:
    """Powers of two that together cover a row, A + B ≥ units, of which A lies inside it; of words in whole groups.

    Tiles of these sizes leave fewer threads idle than one tile of the next power of two.
    """
    least = 1 if bits == 16 else WORDS
    a = max(least, triton.next_power_of_2(units) // 2)
    return {"A": a, "B": max(least, triton.next_power_of_2(units - a))}


@triton.constexpr_function
def stretch(words, warps):
    """Words of a stretch, at most 4, which are 16 bytes, so that every thread gets one."""
    return max(1, min(4, words // (32 * warps)))


@triton.jit
def take_units(FIRST: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr, WARPS: tl.constexpr):
    """So many units of a row."""
    if PLANES == 1:
        return FIRST + tl.arange(0, COUNT)
    else:
        together: tl.constexpr = stretch(COUNT, WARPS)
        return take_stretches(FIRST, COUNT, WARPS)[:, None] + tl.arange(0, together)[None, :]


@triton.jit
def take_stretches(FIRST: tl.constexpr, COUNT: tl.constexpr, WARPS: tl.constexpr):
    """The first word of each stretch of such units."""
    together: tl.constexpr = stretch(COUNT, WARPS)
    return FIRST + tl.arange(0, COUNT // together) * together


@triton.jit
def load_rows(matrix, rows, units, UNITS: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr):
    """A tile of a row-major matrix; MASKED where units reach beyond UNITS, zero there."""
    if PLANES == 1:
        offsets = rows.to(tl.int64)[:, None] * UNITS + units[None]
    else:
        offsets = rows.to(tl.int64)[None, :, None] * UNITS + units[:, None]
    if MASKED:
        inside = (units < UNITS)[None] if PLANES == 1 else (units < UNITS)[:, None]
        return tl.load(matrix + offsets, mask=inside, other=0.0)
    return tl.load(matrix + offsets)


@triton.jit
def load_scales(
    scales,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr = WORDS,
):
    """The scales of such a tile as they are: 1 of 16 bits, [rows] of 8, [groups, rows] of 4."""
    if PLANES == 1:
        return 1.0
    elif PLANES == 4:
        return tl.load(scales + rows)
    else:
        groups = FIRST // WORDS + tl.arange(0, COUNT // WORDS)
        pointers = scales + rows.to(tl.int64)[None, :] * (UNITS // WORDS) + groups[:, None]
        if FIRST + COUNT > UNITS:
            inside = (groups < UNITS // WORDS)[:, None]
            return tl.load(pointers, mask=inside, other=0.0)
        return tl.load(pointers)


@triton.jit
def enlarge(scales, SMALL: tl.constexpr = SMALL):
    """Scales over SMALL, float32. Only once all is under way: whatever is computed with one load delays the next."""
    return scales.to(tl.float32) * (1 / SMALL)


@triton.jit
def _load_plane(
    vector,
    units,
    PLANE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr = WORDS,
):
    """What part PLANE of each word is multiplied with."""
    group: tl.constexpr = PLANES * WORDS
    columns = units // WORDS * group + PLANE * WORDS + units % WORDS
    if MASKED or COLUMNS % group != 0:
        return tl.load(vector + columns, mask=columns < COLUMNS, other=0.0)
    else:
        return tl.load(vector + columns)


@triton.jit
def load_vector(vector, units, COLUMNS: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr):
    """A vector [COLUMNS] for tiles of these units; MASKED where they reach beyond it, zero there."""
    if PLANES == 8:
        return (
            _load_plane(vector, units, 0, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 1, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 2, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 3, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 4, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 5, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 6, COLUMNS, 8, MASKED),
            _load_plane(vector, units, 7, COLUMNS, 8, MASKED),
        )
    elif PLANES == 4:
        return (
            _load_plane(vector, units, 0, COLUMNS, 4, MASKED),
            _load_plane(vector, units, 1, COLUMNS, 4, MASKED),
            _load_plane(vector, units, 2, COLUMNS, 4, MASKED),
            _load_plane(vector, units, 3, COLUMNS, 4, MASKED),
        )
    elif MASKED:
        return (tl.load(vector + units, mask=units < COLUMNS, other=0.0),)
    else:
        return (tl.load(vector + units),)


@triton.jit
def normalise(vector, gain, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of a vector in float32, rounded to the gain's type as the network's activations are; and its factor.

    For words the factor, which all threads make together, is left to `dot`: the product need not wait for it.
    """
    squares = vector[0] * vector[0]
    for plane in tl.static_range(1, len(vector)):
        squares += vector[plane] * vector[plane]
    factor = tl.rsqrt(tl.sum(squares) / COLUMNS + EPS)
    if len(vector) == 1:
        return ((vector[0] * factor * gain[0].to(tl.float32)).to(gain[0].dtype),), factor
    elif len(vector) == 4:
        return (vector[0] * gain[0], vector[1] * gain[1], vector[2] * gain[2], vector[3] * gain[3]), factor
    else:
        return (
            vector[0] * gain[0],
            vector[1] * gain[1],
            vector[2] * gain[2],
            vector[3] * gain[3],
            vector[4] * gain[4],
            vector[5] * gain[5],
            vector[6] * gain[6],
            vector[7] * gain[7],
        ), factor


@triton.jit
def dot_rows(tile, vector):
    """[rows, columns] times [columns], accumulated in float32."""
    return tl.sum(tile.to(tl.float32) * vector.to(tl.float32)[None, :], 1)


@triton.jit
def _multiply_plane(tile, part, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """A tile, float32: what is in part PLANE of each word, times a plane of the vector, times SMALL."""
    # 24 low bits of a float32 without the others stand for themselves times 2**-149: they need no conversion.
    bits: tl.constexpr = 32 // PLANES
    high: tl.constexpr = bits * (PLANE + 1) > 24
    first: tl.constexpr = bits * PLANE - 8 if high else bits * PLANE
    parts = (tile >> 8 if high else tile) & (((1 << bits) - 1) << first)
    return parts.to(tl.float32, bitcast=True) * (part.to(tl.float32) * 2.0 ** (100 - first))[:, None]


@triton.jit
def sum_stretches(tile, vector, SMALL: tl.constexpr = SMALL):
    """[stretches, rows] float32: a tile of words times a vector, and times SMALL."""
    both = vector[0].to(tl.float32)
    for plane in tl.static_range(1, len(vector)):
        both += vector[plane].to(tl.float32)
    half: tl.constexpr = 1 << (32 // len(vector) - 1)
    total = _multiply_plane(tile, vector[0], 0, len(vector)) - (both * (half * SMALL))[:, None]
    for plane in tl.static_range(1, len(vector)):
        total += _multiply_plane(tile, vector[plane], plane, len(vector))
    return tl.sum(total, 2)


@triton.jit
def multiply(tile, scales, vector):
    """Float32 of [rows, numbers], or of [stretches or groups, rows], which `add_up` makes the tile times the vector."""
    if len(vector) == 1:
        return tile.to(tl.float32) * vector[0].to(tl.float32)[None]
    elif len(vector) == 4:
        return sum_stretches(tile, vector) * enlarge(scales)[None, :]
    else:
        sums = sum_stretches(tile, vector)
        groups: tl.constexpr = scales.shape[0]
        return tl.sum(sums.reshape(groups, sums.shape[0] // groups, sums.shape[1]), 1) * enlarge(scales)


@triton.jit
def add_up(products, PLANES: tl.constexpr):
    """[rows] float32"""
    return tl.sum(products, 1 if PLANES == 1 else 0)


@triton.jit
def dot(tile, scales, vector, factor=1.0):
    """[rows] float32: a tile of whole rows times a vector, and for words times the factor that `normalise` left."""
    if len(vector) == 1:
        return add_up(multiply(tile, scales, vector), 1)
    elif len(vector) == 4:
        return tl.sum(sum_stretches(tile, vector), 0) * enlarge(scales) * factor
    else:
        return add_up(multiply(tile, scales, vector), 8) * factor
