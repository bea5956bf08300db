"""Attention of a long prompt, as rectangles that cuDNN computes faster than a kernel of ours.

cuDNN takes 40 ms to plan for each shape that it has not seen, so only those of `planned` are ever asked of it.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.join import join
from kimi_vl.engine.fast.kernels.prompt_attention import attend_parts, attend_prompt, empty_parts
from kimi_vl.engine.fast.weights import Attention

CHUNK = 16384  # tokens
OPENING = 2 * CHUNK  # tokens that a long prompt begins with at once: what precedes its second half is not made again
QUERIES = 1024  # at once of tokens that are no whole chunk, to all whole chunks before them


def planned(longest: int) -> Iterator[tuple[int, int]]:
    """Pairs of tokens and context, with which attend_by_rectangles asks cuDNN for every shape that it ever asks for.

    Args:
        longest: of the contexts, in tokens.
    """
    squares = [(CHUNK, CHUNK), (OPENING, OPENING)]
    others = [(tokens, past + tokens) for past in range(CHUNK, longest, CHUNK) for tokens in (CHUNK, QUERIES)]
    yield from ((tokens, context) for tokens, context in squares + others if context <= longest)


class KeysAndValues:
    """A layer's keys and values, made once for all those pieces of a prompt in the layer that ask for them.

    Which rows of the cache are expanded at once depends on where a piece ends alone, so that every piece reads the
    same bits whatever was computed before it.
    """

    def __init__(self, rows: Tensor, attention: Attention) -> None:
        """
        Args:
            rows: [context, latent + rope], of the latent cache; those of a piece need not be there before its turn.
            attention: the layer's weights.
        """
        self._rows, self._attention = rows, attention
        self._whole = 0  # tokens, of whole chunks

    @cached_property
    def _made(self) -> Tensor:
        """[context, heads, value + nope + rope]"""
        attention = self._attention
        size = attention.value + attention.nope + attention.rope
        return self._rows.new_empty(len(self._rows), attention.heads, size)

    @cached_property
    def _weight(self) -> Tensor:
        """[heads, latent, value + nope], of kv_b_proj."""
        attention = self._attention
        by_head = attention.kv_b.view(attention.heads, -1, attention.latent)
        return torch.cat(by_head.split([attention.nope, attention.value], 1)[::-1], 1).mT

    def until(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys [end, heads, nope + rope] and values [end, heads, value], in memory side by side."""
        value, latent, rope = self._attention.value, self._attention.latent, self._attention.rope
        for first in range(self._whole, end, CHUNK):
            block = slice(first, min(first + CHUNK, end))
            rows, made = self._rows[block], self._made[block]
            latents = rows[None, :, :latent].expand(self._attention.heads, -1, -1)
            torch.bmm(latents, self._weight, out=made[..., :-rope].transpose(0, 1))
            eight = torch.complex128  # 8 numbers of 16 bits, as latent and rope have whole: a copy goes by elements
            made.view(eight)[..., -rope // 8 :] = rows.view(eight)[:, None, latent // 8 :]
        self._whole = end // CHUNK * CHUNK
        return self._made[:end, :, value:], self._made[:end, :, :value]


def goes_by_rectangles(tokens: int, context: int) -> bool:
    """Whether attend_by_rectangles is for the last tokens of a context, and faster than attend_prompt."""
    past = context - tokens
    return tokens >= QUERIES and (past >= CHUNK or (not past and tokens % CHUNK == 0))


def attend_by_rectangles(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, attention: Attention, span: Tensor) -> Tensor:
    """Attention of the last tokens of a context to all of it up to themselves: [tokens, heads * value].

    Args:
        q: [tokens, heads * (nope + rope)], rotated.
        k, v: of KeysAndValues.
        rows: [context, latent + rope], of the latent cache.
        attention: the layer's weights.
        span: of the tokens, see kernels/prompt.py.
    """
    past, few = len(k) - len(q), len(q) % QUERIES
    many, whole = len(q) - few, past // CHUNK * CHUNK
    if len(q) % CHUNK == 0 and past == whole:
        mixed, sums = _attend(q, k[whole:], v[whole:], attention, causal=True)
        at_once = CHUNK
    else:
        parts, logarithms = empty_parts(q[:many], 1, attention)
        inner = _moved(span, -whole, few)
        attend_parts(q[:many], k[whole:], v[whole:], rows[whole:], attention, inner, parts, logarithms)
        mixed, sums = parts[0], logarithms[0]
        at_once = QUERIES
    for first in range(0, many if whole else 0, at_once):
        block = slice(first, first + at_once)
        before, before_sums = _attend(q[block], k[:whole], v[:whole], attention, causal=False)
        join(mixed[block], sums[:, block], before[None], before_sums[None])
    if not few:
        return mixed.flatten(1)
    # a rectangle that is not full would take as long as a full one
    return torch.cat([mixed.flatten(1), attend_prompt(q[many:], k, v, rows, attention, _moved(span, many, many))])


def _moved(span: Tensor, by: int, fewer: int) -> Tensor:
    """A span that begins later or, in a shorter context, earlier, and has fewer tokens."""
    moved = span.clone()
    moved[0] += by
    moved[1] -= fewer
    return moved


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention, causal: bool) -> tuple[Tensor, Tensor]:
    """[tokens, heads, value], and the logarithms of the sums of exp(score) [heads, tokens] float32."""
    # scaled_dot_product_attention itself does not give the logarithms away
    mixed, logarithms, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(t.transpose(0, 1)[None] for t in (q.unflatten(1, (attention.heads, -1)), k, v)),
        attn_bias=None,
        compute_log_sumexp=True,
        is_causal=causal,
        scale=attention.scale,
    )
    return mixed[0].transpose(0, 1).contiguous(), logarithms[0, ..., 0].contiguous()  # as they lie in memory
