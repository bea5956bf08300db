# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The small steps between the matrix products of a prompt, each one pass over its tensors instead of several.

Where a piece stands is read on the GPU from `span` [2] int32: the position of its first token, and how many tokens it
has. Its tensors may have more rows, so that one captured graph serves pieces of many lengths; what these hold is of no
account, and what is written there means nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.fast.kernels.latent_query import rotate_pairs
from kimi_vl.engine.fast.kernels.operation import Operation, rms_norm, run_kernel
from kimi_vl.engine.fast.kernels.routing import silu
from kimi_vl.engine.fast.weights import Attention

BLOCK = 1024  # elements in one program of `gate`


@triton.jit
def _rotate_kernel(
    projected,
    gain,
    rotary,
    cache,
    span,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(span + 1):
        return
    position = tl.load(span) + token
    kind = cache.dtype.element_ty
    half: tl.constexpr = ROPE // 2
    pairs = tl.arange(0, half)
    cosine = tl.load(rotary + position * ROPE + pairs)
    sine = tl.load(rotary + position * ROPE + half + pairs)

    columns = tl.arange(0, LATENT)
    queries: tl.constexpr = HEADS * (NOPE + ROPE)
    first = projected + token * (queries + LATENT + ROPE)
    source = first + queries
    row = cache + position * (LATENT + ROPE)
    latent = tl.load(source + columns).to(tl.float32)
    latent = latent * tl.rsqrt(tl.sum(latent * latent) / LATENT + EPS) * tl.load(gain + columns).to(tl.float32)
    tl.store(row + columns, latent.to(kind))
    even = tl.load(source + LATENT + 2 * pairs).to(tl.float32)
    odd = tl.load(source + LATENT + 2 * pairs + 1).to(tl.float32)
    tl.store(row + LATENT + pairs, (even * cosine - odd * sine).to(kind))
    tl.store(row + LATENT + half + pairs, (odd * cosine + even * sine).to(kind))

    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    inside = heads < HEADS
    part = first + heads * (NOPE + ROPE) + NOPE
    evens = tl.load(part + 2 * pairs[None, :], mask=inside).to(tl.float32)
    odds = tl.load(part + 2 * pairs[None, :] + 1, mask=inside).to(tl.float32)
    tl.debug_barrier()  # all are read before the first is written over
    tl.store(part + pairs[None, :], (evens * cosine[None, :] - odds * sine[None, :]).to(kind), mask=inside)
    tl.store(part + half + pairs[None, :], (odds * cosine[None, :] + evens * sine[None, :]).to(kind), mask=inside)


def _launch_rotate(projected: Tensor, attention: Attention, rotary: Tensor, cache: Tensor, span: Tensor) -> None:
    heads = (projected.shape[1] - attention.row) // (attention.nope + attention.rope)
    run_kernel(
        _rotate_kernel,
        (len(projected),),
        projected,
        attention.kv_gain,
        rotary,
        cache,
        span,
        HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(max(heads, 1)),
        NOPE=attention.nope,
        ROPE=attention.rope,
        LATENT=attention.latent,
        EPS=attention.kv_eps,
    )


def rotate_reference(projected: Tensor, attention: Attention, rotary: Tensor, cache: Tensor, span: Tensor) -> None:
    """Rotates the queries of a piece in place and writes its rows of the cache.

    Args:
        projected: [tokens, heads * (nope + rope) + latent + rope], q_proj and kv_a_proj of the tokens; the rotary
            dimensions of the queries, adjacent pairs, become halves. There may be no queries: [tokens, latent + rope].
        attention: the layer's weights.
        rotary: [context, rope] float32, cosines then sines of each position.
        cache: [context, latent + rope], the layer's; rows of the piece are written.
        span: of the piece.
    """
    start, length = span.tolist()
    projected, angles = projected[:length], rotary[start : start + length]
    sizes = [projected.shape[1] - attention.row, attention.latent, attention.rope]
    q, latent, key = projected.split(sizes, 1)
    turned = q.unflatten(1, (-1, attention.nope + attention.rope))[..., attention.nope :]
    turned.copy_(rotate_pairs(turned, angles[:, None]))
    rows = cache[start : start + length]
    rows[:, : attention.latent] = rms_norm(latent, attention.kv_gain, attention.kv_eps)
    rows[:, attention.latent :] = rotate_pairs(key, angles)


rotate = Operation(_launch_rotate, rotate_reference)


@triton.jit
def _gate_kernel(both, out, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gates = tl.load(both + row * (2 * WIDTH) + columns, mask=inside).to(tl.float32)
    ups = tl.load(both + row * (2 * WIDTH) + WIDTH + columns, mask=inside).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (silu(gates) * ups).to(out.dtype.element_ty), mask=inside)


def _launch_gate(both: Tensor, out: Tensor) -> None:
    rows, width = out.shape
    run_kernel(_gate_kernel, (rows, triton.cdiv(width, BLOCK)), both, out, width, BLOCK=BLOCK)


def gate_reference(both: Tensor, out: Tensor) -> None:
    """out [rows, width] = silu(gate) * up, where both [rows, 2 * width] is the gates beside the ups."""
    gates, ups = both.float().chunk(2, 1)
    out.copy_(torch.nn.functional.silu(gates) * ups)


gate = Operation(_launch_gate, gate_reference)


@triton.jit
def _mix_kernel(
    x, shared, outputs, places, weights, span, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(span + 1):
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.load(x + token * WIDTH + columns, mask=inside).to(tl.float32)
    total += tl.load(shared + token * WIDTH + columns, mask=inside).to(tl.float32)
    for slot in tl.static_range(CHOSEN):
        place = tl.load(places + token * CHOSEN + slot).to(tl.int64)
        weight = tl.load(weights + token * CHOSEN + slot)
        total += weight * tl.load(outputs + place * WIDTH + columns, mask=inside).to(tl.float32)
    tl.store(x + token * WIDTH + columns, total.to(x.dtype.element_ty), mask=inside)


def _launch_mix(x: Tensor, shared: Tensor, outputs: Tensor, places: Tensor, weights: Tensor, span: Tensor) -> None:
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    run_kernel(
        _mix_kernel,
        (tokens,),
        x,
        shared,
        outputs,
        places,
        weights,
        span,
        WIDTH=width,
        BLOCK=block,
        CHOSEN=places.shape[1],
    )


def mix_reference(x: Tensor, shared: Tensor, outputs: Tensor, places: Tensor, weights: Tensor, span: Tensor) -> None:
    """Adds what the experts made of each token to the residual stream, in float32 and rounded once.

    Args:
        x: [tokens, width], changed.
        shared: [tokens, width], of the shared experts.
        outputs: [tokens * chosen, width], of the chosen experts, in any order.
        places: [tokens, chosen] int32, the row of outputs of each of a token's experts.
        weights: [tokens, chosen] float32.
        span: of the piece.
    """
    length = int(span[1])
    x, shared, places, weights = x[:length], shared[:length], places[:length], weights[:length]
    chosen = (outputs[places].float() * weights[..., None]).sum(1)
    x.copy_(x.float() + shared.float() + chosen)


mix = Operation(_launch_mix, mix_reference)
