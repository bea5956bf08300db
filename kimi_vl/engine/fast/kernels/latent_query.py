# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What a new token needs before attention: its query, with kv_b_proj absorbed, and its row of the latent cache.

A cached token is one row: its normalised latent (512 values) and its rotated key (64), shared by all heads. kv_b_proj's
key half is applied to the query instead of to every cached token; then a score is the dot product of the query with
a row. (DeepSeek-V2, arXiv 2405.04434, section 2.1.) All sizes of a head are powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import (
    Operation,
    launch_options,
    release_next,
    rms_norm,
    run_kernel,
    wait_for_previous,
)
from kimi_vl.engine.fast.weights import Attention

COLUMNS, WARPS = 32, 2  # latent columns in one program


@triton.jit
def _absorb_key(
    projected,
    kv_b,
    query,
    head,
    columns,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of one head's query times kv_b_proj's key half."""
    rows = tl.arange(0, NOPE)
    keys = tl.load(kv_b + (head * (NOPE + VALUE) + rows)[:, None] * LATENT + columns[None, :])
    wait_for_previous(PDL)
    q = tl.load(projected + head * (NOPE + ROPE) + rows).to(keys.dtype).to(tl.float32)
    absorbed = tl.sum(keys.to(tl.float32) * q[:, None], 0)
    tl.store(query + head * (LATENT + ROPE) + columns, absorbed.to(query.dtype.element_ty))


@triton.jit
def _store_rotated(target, even, odd, cosine, sine, inside, HALF: tl.constexpr):
    kind = target.dtype.element_ty
    tl.store(target, (even * cosine - odd * sine).to(kind), mask=inside)
    tl.store(target + HALF, (odd * cosine + even * sine).to(kind), mask=inside)


@triton.jit
def _store_row(fresh, gains, cosine, sine, row, LATENT: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr):
    """The token's row of the cache: its normalised latent and its rotated key."""
    columns = tl.arange(0, LATENT)
    latent = tl.load(fresh + columns)
    latent = latent * tl.rsqrt(tl.sum(latent * latent) / LATENT + EPS) * gains.to(tl.float32)
    tl.store(row + columns, latent.to(row.dtype.element_ty))
    pairs = tl.arange(0, ROPE // 2)
    even, odd = tl.load(fresh + LATENT + 2 * pairs), tl.load(fresh + LATENT + 2 * pairs + 1)
    _store_rotated(row + LATENT + pairs, even, odd, cosine, sine, pairs >= 0, ROPE // 2)


@triton.jit
def _absorb_kernel(
    projected,
    kv_b,
    gain,
    rotary,
    position_pointer,
    cache,
    query,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    program = tl.program_id(0)
    chunks: tl.constexpr = LATENT // COLUMNS
    if program < HEADS * chunks:
        columns = (program % chunks) * COLUMNS + tl.arange(0, COLUMNS)
        _absorb_key(projected, kv_b, query, program // chunks, columns, NOPE, ROPE, VALUE, LATENT, PDL)
    else:
        gains = tl.load(gain + tl.arange(0, LATENT))
        wait_for_previous(PDL)
        position = tl.load(position_pointer)
        pairs = tl.arange(0, ROPE // 2)
        cosine = tl.load(rotary + position * ROPE + pairs)
        sine = tl.load(rotary + position * ROPE + ROPE // 2 + pairs)
        row = cache + position.to(tl.int64) * (LATENT + ROPE)
        _store_row(projected + HEADS * (NOPE + ROPE), gains, cosine, sine, row, LATENT, ROPE, EPS)
        heads = tl.arange(0, HEADS_BLOCK)[:, None]
        inside = heads < HEADS
        source = projected + heads * (NOPE + ROPE) + NOPE + 2 * pairs[None, :]
        even, odd = tl.load(source, mask=inside), tl.load(source + 1, mask=inside)
        target = query + heads * (LATENT + ROPE) + LATENT + pairs[None, :]
        _store_rotated(target, even, odd, cosine[None, :], sine[None, :], inside, ROPE // 2)


def _launch_absorb(
    projected: Tensor, attention: Attention, rotary: Tensor, position: Tensor, cache: Tensor, query: Tensor
) -> None:
    heads, latent = attention.heads, attention.latent
    run_kernel(
        _absorb_kernel,
        (heads * (latent // COLUMNS) + 1,),
        projected,
        attention.kv_b,
        attention.kv_gain,
        rotary,
        position,
        cache,
        query,
        HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        NOPE=attention.nope,
        ROPE=attention.rope,
        VALUE=attention.value,
        LATENT=latent,
        COLUMNS=COLUMNS,
        EPS=attention.kv_eps,
        **launch_options(projected, WARPS),
    )


def absorb_reference(
    projected: Tensor, attention: Attention, rotary: Tensor, position: Tensor, cache: Tensor, query: Tensor
) -> None:
    """Makes the absorbed, rotated query of the token at `position` and writes that token's row of the cache.

    Args:
        projected: [heads * (nope + rope) + latent + rope] float32, q_proj and kv_a_proj of the token; rotary
            dimensions are adjacent pairs.
        attention: the layer's weights.
        rotary: [context, rope] float32, the cosines of a position's rope / 2 angles, then their sines.
        position: [1] int32, where the token stands.
        cache: [context, latent + rope]; the row of the token is written.
        query: [heads, latent + rope], written; rotated dimensions are halves, as in the cache.
    """
    heads, nope, latent, rope = attention.heads, attention.nope, attention.latent, attention.rope
    q = projected[: -latent - rope].view(heads, -1)
    keys = attention.kv_b.view(heads, -1, latent)[:, :nope].float()
    angles = rotary[int(position)]
    query[:, :latent] = torch.einsum("hn,hnl->hl", q[:, :nope].to(attention.kv_b.dtype).float(), keys)
    query[:, latent:] = rotate_pairs(q[:, nope:], angles)
    row = cache[int(position)]
    row[:latent] = rms_norm(projected[-latent - rope : -rope], attention.kv_gain, attention.kv_eps)
    row[latent:] = rotate_pairs(projected[-rope:], angles)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates adjacent pairs of x [..., n] by angles [..., n] (cosines, then sines) into halves, in float32."""
    cosine, sine = angles.chunk(2, -1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cosine - odd * sine, odd * cosine + even * sine], -1)


absorb = Operation(_launch_absorb, absorb_reference)
