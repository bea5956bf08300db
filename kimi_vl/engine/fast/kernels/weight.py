# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""How decoding kernels read a Matrix of 16, 8 or 4 bits, and multiply it with a vector.

They read tiles of its `values`, in units: numbers of 16 bits, or words that hold several (see quantise.py). A vector is
then a tuple of as many planes as a unit has numbers (PLANES: 1, 4 or 8), each with one for every unit.
"""

import triton
import triton.language as tl

from kimi_vl.engine.fast.kernels.quantise import WORDS


@triton.jit
def load_rows(matrix, rows, units, UNITS: tl.constexpr, MASKED: tl.constexpr):
    """A tile of a row-major matrix; MASKED where units reach beyond UNITS, zero there."""
    pointers = matrix + rows.to(tl.int64)[:, None] * UNITS + units[None, :]
    if MASKED:
        return tl.load(pointers, mask=(units < UNITS)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_scales(
    scales, rows, units, PLANES: tl.constexpr, UNITS: tl.constexpr, MASKED: tl.constexpr, WORDS: tl.constexpr = WORDS
):
    """The scales of such a tile: 1 of 16 bits, [rows] of 8, [rows, units] of 4."""
    if PLANES == 1:
        return 1.0
    elif PLANES == 4:
        return tl.load(scales + rows)
    else:
        return load_rows(scales, rows, units // WORDS, UNITS // WORDS, MASKED).to(tl.float32)


@triton.jit
def _load_plane(
    vector,
    units,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
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
def load_vector(vector, units, PLANES: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """A vector [COLUMNS] for tiles of these units; MASKED where they reach beyond it, zero there."""
    if PLANES == 8:
        return (
            _load_plane(vector, units, 0, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 1, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 2, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 3, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 4, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 5, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 6, 8, COLUMNS, MASKED),
            _load_plane(vector, units, 7, 8, COLUMNS, MASKED),
        )
    elif PLANES == 4:
        return (
            _load_plane(vector, units, 0, 4, COLUMNS, MASKED),
            _load_plane(vector, units, 1, 4, COLUMNS, MASKED),
            _load_plane(vector, units, 2, 4, COLUMNS, MASKED),
            _load_plane(vector, units, 3, 4, COLUMNS, MASKED),
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
    """[rows, words] float32: the numbers in part PLANE of each word times a plane of the vector."""
    # Masked instead of shifted, as the last bits of a float32 from 2**23 on: cheaper than a conversion, and exact. The
    # compiler must not know that the grid has one dimension: with two constants it takes one more instruction.
    bits: tl.constexpr = 32 // PLANES
    half: tl.constexpr = PLANES // 2  # of a word
    unit: tl.constexpr = 1 << (bits * (PLANE % half))
    parts = (tile >> (16 * (PLANE // half))) & (((1 << bits) - 1) * unit)
    floats = (parts | tl.num_programs(1) * 0x4B000000).to(tl.float32, bitcast=True)
    numbers = floats * (1.0 / unit) - (8388608.0 / unit + (1 << (bits - 1)))
    return numbers * part.to(tl.float32)[None, :]


@triton.jit
def _multiply(tile, vector):
    """[rows, units] float32: the sum of each unit's numbers times those of the planes."""
    if len(vector) == 1:
        return tile.to(tl.float32) * vector[0].to(tl.float32)[None, :]
    else:
        total = _multiply_plane(tile, vector[0], 0, len(vector))
        for plane in tl.static_range(1, len(vector)):
            total += _multiply_plane(tile, vector[plane], plane, len(vector))
        return total


@triton.jit
def multiply(tile, scales, vector):
    """[rows, units] float32, of which the sum over units is the tile times the vector."""
    if len(vector) == 4:
        return _multiply(tile, vector) * scales[:, None]
    else:
        return _multiply(tile, vector) * scales


@triton.jit
def dot(tile, scales, vector):
    """[rows] float32: a tile of whole rows times a vector."""
    if len(vector) == 8:
        return tl.sum(_multiply(tile, vector) * scales, 1)
    else:
        return tl.sum(_multiply(tile, vector), 1) * scales
