"""A prompt's tokens through the decoder, layer by layer, into the latent cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.base import to_device
from kimi_vl.engine.fast.chunk_attention import CHUNK, OPENING, KeysAndValues, attend_by_rectangles, goes_by_rectangles
from kimi_vl.engine.fast.kernels.gated_product import is_fused, multiply_gated
from kimi_vl.engine.fast.kernels.operation import is_hopper
from kimi_vl.engine.fast.kernels.product import add_product, multiply
from kimi_vl.engine.fast.kernels.prompt import mix, rotate
from kimi_vl.engine.fast.kernels.prompt_attention import attend_prompt
from kimi_vl.engine.fast.kernels.prompt_routing import TOKENS, arrange, choose
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.weights import Attention, Mlp, Weights


@dataclass(frozen=True)
class Piece:
    """Some tokens of a prompt that are attended to at once: up to CHUNK of them, or whole chunks."""

    rows: slice  # where they stand among those of all pieces, and anything beyond their number
    span: Tensor  # [2] int32, the position of the first one, and how many there are
    context: int  # at least the sum of the two; keys and values are made for so many rows of the cache


def prefill(
    weights: Weights,
    cache: Tensor,
    rotary: Tensor,
    x: Tensor,
    pieces: Sequence[Piece],
    stopped: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Runs pieces of a prompt together through the layers, and writes their rows of the cache.

    In the last layer it stops there: whoever needs what follows a piece needs that layer for one token only.

    Args:
        weights: of the model.
        cache: [layers, context, latent + rope], filled up to the first piece.
        rotary: [context, rope] float32, cosines then sines.
        x: [tokens, width], the embeddings of all pieces, and anything in rows beyond their number; changed.
        pieces: one after another.
        stopped: asked before each layer; once it says so, nothing more is done.
    Returns:
        For each piece its last token's hidden state [width] float32, before the last layer; none if it was stopped.
    """
    *layers, (last, experts) = weights.layers
    # what experts' products need takes most memory, and twice as much where they are not fused
    shares = _shares(pieces, OPENING if is_fused(experts.gate_up, x.device) else CHUNK)
    for layer_cache, (attention, mlp) in zip(cache[:-1], layers, strict=True):
        if stopped():
            return []
        kept = KeysAndValues(layer_cache[: pieces[-1].context], attention)
        for piece in pieces:
            _attend(x[piece.rows], piece, attention, layer_cache, rotary, kept)
        del kept  # its memory is for the experts
        for rows, span in shares:
            _transform(x[rows], mlp, span)
    for piece in pieces:
        _project(x[piece.rows], last, last.projections[-last.row :], rotary, cache[-1], piece.span)
    return [x[piece.rows].index_select(0, piece.span[1:] - 1)[0].float() for piece in pieces]


def _shares(pieces: Sequence[Piece], most: int) -> list[tuple[slice, Tensor]]:
    """Rows that go through the experts at once, and their span, of which only the length counts there.

    They are those of a piece, or of up to `most` tokens in whole chunks: the products of a whole chunk come out the
    same to the bit with another one beside it.
    """
    shares: list[tuple[slice, Tensor]] = []
    first = 0  # of the whole chunks that are taken together
    for piece in pieces:
        for start in range(piece.rows.start, piece.rows.stop, CHUNK):
            stop = min(start + CHUNK, piece.rows.stop)
            if stop - start < CHUNK:
                shares.append((slice(start, stop), piece.span))
                first = stop
                continue
            if first < start and stop - first <= most:
                shares.pop()
            else:
                first = start
            shares.append((slice(first, stop), span_on(piece.span.device, first, stop - first)))
    return shares


def span_on(device: torch.device, first: int, tokens: int) -> Tensor:
    """What tells kernels where some tokens are, see kernels/prompt.py."""
    return to_device(torch.tensor([first, tokens], dtype=torch.int32), device)


def _attend(x: Tensor, piece: Piece, attention: Attention, cache: Tensor, rotary: Tensor, kept: KeysAndValues) -> None:
    """Adds to x [tokens, width], the piece's, attention to the layer's cache, whose rows of the piece are written."""
    projected = _project(x, attention, attention.projections, rotary, cache, piece.span)
    q, rows = projected[:, : -attention.row], cache[: piece.context]
    if is_hopper(x.device) and goes_by_rectangles(len(q), piece.context):
        attended = attend_by_rectangles(q, *kept.until(piece.context), rows, attention, piece.span)
    else:
        kv = F.linear(rows[:, : attention.latent], attention.kv_b).unflatten(1, (attention.heads, -1))
        k, v = kv.split([attention.nope, attention.value], 2)
        attended = attend_prompt(q, k, v, rows, attention, piece.span)
    add_product(x, attended, attention.out)


def _project(
    x: Tensor, attention: Attention, projections: Matrix, rotary: Tensor, cache: Tensor, span: Tensor
) -> Tensor:
    """What `rotate` makes of the projections of x [tokens, width]; writes the tokens' rows of the cache."""
    hidden = F.rms_norm(x, attention.gain.shape, attention.gain, attention.eps)
    projected = multiply(hidden, projections)
    rotate(projected, attention, rotary, cache, span)
    return projected


def _transform(x: Tensor, mlp: Mlp, span: Tensor) -> None:
    """Adds the experts' outputs to x [tokens, width]: a piece, or some tokens of several."""
    hidden = F.rms_norm(x, mlp.gain.shape, mlp.gain, mlp.eps)
    shared = multiply(multiply_gated(hidden, mlp.shared_gate_up), mlp.shared_down)
    if not mlp.chosen:
        x += shared
        return
    length = len(x)
    # zeros, for compile_ahead's sake; and rows without a token are read, so that their sources must be some token's
    places, experts, sources = (torch.zeros(length, mlp.chosen, dtype=torch.int32, device=x.device) for _ in range(3))
    shares = torch.empty(length, mlp.chosen, device=x.device)
    counts = torch.empty(-(-length // TOKENS), len(mlp.router), dtype=torch.int32, device=x.device)
    choose(hidden, mlp, experts, shares, counts, span)
    ends = torch.zeros_like(counts[0])
    arrange(experts, counts, sources.view(-1), places, ends, span)
    inner = multiply_gated(hidden, mlp.gate_up, sources.view(-1), ends)
    mix(x, shared, multiply(inner, mlp.down, ends), places, shares, span)
