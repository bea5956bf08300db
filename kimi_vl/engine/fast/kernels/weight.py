# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""How decoding kernels read a Matrix of 16, 8 or 4 bits, and multiply it with a vector.

They read tiles of its `values`, in units: numbers of 16 bits, or words that hold several (see quantise.py). A vector is
then a tuple of as many planes as a unit has numbers (PLANES: 1, 4 or 8), each with one for every unit.
"""

import triton
import triton.language as tl

from kimi_vl.engine.fast.kernels.quantise import WORDS

SMALL = 2.0**-49  # products with words are computed times this, and come to their size with the scales


@triton.jit
def load_rows(
    matrix, rows, units, UNITS: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr, WARPS: tl.constexpr
):
    """A tile of a row-major matrix; MASKED where units reach beyond UNITS, zero there."""
    offsets = rows.to(tl.int64)[:, None] * UNITS + units[None, :]
    if PLANES > 1:
        together: tl.constexpr = max(1, min(4, units.shape[0] // (32 * WARPS)))  # see _load_plane
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, together)), (1, together))
    if MASKED:
        return tl.load(matrix + offsets, mask=(units < UNITS)[None, :], other=0.0)
    return tl.load(matrix + offsets)


@triton.jit
def load_scales(
    scales,
    rows,
    units,
    UNITS: tl.constexpr,
    PLANES: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr = WORDS,
    SMALL: tl.constexpr = SMALL,
):
    """The scales of such a tile: 1 of 16 bits, [rows] of 8, [rows, units] of 4; both over SMALL."""
    if PLANES == 1:
        return 1.0
    elif PLANES == 4:
        return tl.load(scales + rows) * (1 / SMALL)
    else:
        pointers = scales + rows.to(tl.int64)[:, None] * (UNITS // WORDS) + (units // WORDS)[None, :]
        if MASKED:
            return tl.load(pointers, mask=(units < UNITS)[None, :], other=0.0).to(tl.float32) * (1 / SMALL)
        return tl.load(pointers).to(tl.float32) * (1 / SMALL)


@triton.jit
def _load_plane(
    vector,
    units,
    PLANE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    MASKED: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr = WORDS,
):
    """What part PLANE of each word is multiplied with."""
    group: tl.constexpr = PLANES * WORDS
    columns = units // WORDS * group + PLANE * WORDS + units % WORDS
    # Each thread is to load as many at once as it loads words. It would take more of these smaller numbers, and then
    # they had to move between threads before they could be multiplied.
    together: tl.constexpr = max(1, min(4, units.shape[0] // (32 * WARPS)))
    columns = tl.max_contiguous(tl.multiple_of(columns, together), together)
    if MASKED or COLUMNS % group != 0:
        return tl.load(vector + columns, mask=columns < COLUMNS, other=0.0)
    else:
        return tl.load(vector + columns)


@triton.jit
def load_vector(vector, units, COLUMNS: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr, WARPS: tl.constexpr):
    """A vector [COLUMNS] for tiles of these units; MASKED where they reach beyond it, zero there."""
    if PLANES == 8:
        return (
            _load_plane(vector, units, 0, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 1, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 2, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 3, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 4, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 5, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 6, COLUMNS, 8, MASKED, WARPS),
            _load_plane(vector, units, 7, COLUMNS, 8, MASKED, WARPS),
        )
    elif PLANES == 4:
        return (
            _load_plane(vector, units, 0, COLUMNS, 4, MASKED, WARPS),
            _load_plane(vector, units, 1, COLUMNS, 4, MASKED, WARPS),
            _load_plane(vector, units, 2, COLUMNS, 4, MASKED, WARPS),
            _load_plane(vector, units, 3, COLUMNS, 4, MASKED, WARPS),
        )
    elif MASKED:
        return (tl.load(vector + units, mask=units < COLUMNS, other=0.0),)
    else:
        return (tl.load(vector + units),)


@triton.jit
def normalise(vector, gain, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of a vector in float32, rounded to the gain's type as the network's activations are."""
    squares = vector[0] * vector[0]
    for plane in tl.static_range(1, len(vector)):
        squares += vector[plane] * vector[plane]
    factor = tl.rsqrt(tl.sum(squares) / COLUMNS + EPS)
    if len(vector) == 1:
        return (_normalise(vector[0], gain[0], factor),)
    elif len(vector) == 4:
        return (
            _normalise(vector[0], gain[0], factor),
            _normalise(vector[1], gain[1], factor),
            _normalise(vector[2], gain[2], factor),
            _normalise(vector[3], gain[3], factor),
        )
    else:
        return (
            _normalise(vector[0], gain[0], factor),
            _normalise(vector[1], gain[1], factor),
            _normalise(vector[2], gain[2], factor),
            _normalise(vector[3], gain[3], factor),
            _normalise(vector[4], gain[4], factor),
            _normalise(vector[5], gain[5], factor),
            _normalise(vector[6], gain[6], factor),
            _normalise(vector[7], gain[7], factor),
        )


@triton.jit
def _normalise(part, gain, factor):
    return (part * factor * gain.to(tl.float32)).to(gain.dtype)


@triton.jit
def dot_rows(tile, vector):
    """[rows, columns] times [columns], accumulated in float32."""
    return tl.sum(tile.to(tl.float32) * vector.to(tl.float32)[None, :], 1)


@triton.jit
def _multiply_plane(tile, part, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """[rows, words] float32: what is in part PLANE of each word, times a plane of the vector, times SMALL."""
    # 24 low bits of a float32 without the others stand for themselves times 2**-149: they need no conversion.
    bits: tl.constexpr = 32 // PLANES
    high: tl.constexpr = bits * (PLANE + 1) > 24
    first: tl.constexpr = bits * PLANE - 8 if high else bits * PLANE
    parts = (tile >> 8 if high else tile) & (((1 << bits) - 1) << first)
    return parts.to(tl.float32, bitcast=True) * (part.to(tl.float32) * 2.0 ** (100 - first))[None, :]


@triton.jit
def _multiply(tile, vector, SMALL: tl.constexpr):
    """[rows, units] float32: the sum of each unit's numbers times those of the planes; of words times SMALL."""
    if len(vector) == 1:
        return tile.to(tl.float32) * vector[0].to(tl.float32)[None, :]
    else:
        both = vector[0].to(tl.float32)
        for plane in tl.static_range(1, len(vector)):
            both += vector[plane].to(tl.float32)
        half: tl.constexpr = 1 << (32 // len(vector) - 1)
        total = _multiply_plane(tile, vector[0], 0, len(vector)) - (both * (half * SMALL))[None, :]
        for plane in tl.static_range(1, len(vector)):
            total += _multiply_plane(tile, vector[plane], plane, len(vector))
        return total


@triton.jit
def multiply(tile, scales, vector, SMALL: tl.constexpr = SMALL):
    """[rows, units] float32, of which the sum over units is the tile times the vector."""
    if len(vector) == 4:
        return _multiply(tile, vector, SMALL) * scales[:, None]
    else:
        return _multiply(tile, vector, SMALL) * scales


@triton.jit
def dot(tile, scales, vector, SMALL: tl.constexpr = SMALL):
    """[rows] float32: a tile of whole rows times a vector."""
    if len(vector) == 8:
        return tl.sum(_multiply(tile, vector, SMALL) * scales, 1)
    else:
        return tl.sum(_multiply(tile, vector, SMALL), 1) * scales
