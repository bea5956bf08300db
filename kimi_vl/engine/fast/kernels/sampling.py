# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Logits → the next token, on the GPU: the host only reads the result.

A draw from softmax(logits / temperature) is the argmax of logits / temperature + Gumbel noise. The noise of a token id
depends on the seed and the position alone, so a request with the same seed gives the same tokens whatever ran before.

The order is vLLM's (its Sampler): repetition, frequency and presence penalties, temperature, min_p, top_k, top_p.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vl.engine.base import SamplingParams, allowed, to_device
from kimi_vl.engine.fast.kernels.operation import Operation, launch_options, release_next, run_kernel, wait_for_previous

BLOCK = 1024  # logits in one program
WHOLE = 2.0**40  # parts of a probability of 1


@dataclass(frozen=True)
class Draw:
    """One request's SamplingParams where the kernels read them, so that a captured graph serves every request."""

    temperature: Tensor  # [1] float32, 0 when greedy
    seed: Tensor  # [1] int64
    top_p: Tensor  # [1] float32
    top_k: Tensor  # [1] int64
    min_p: Tensor  # [1] float32
    penalties: Tensor  # [3] float32: repetition, frequency, presence

    @classmethod
    def empty(cls, device: torch.device) -> "Draw":
        """Greedy, until `set`."""
        return cls(
            torch.zeros(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.ones(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(1, device=device),
            torch.tensor([1.0, 0.0, 0.0], device=device),
        )

    def set(self, params: SamplingParams, vocabulary: int) -> None:
        """Takes the values of a request."""
        self.temperature.fill_(0.0 if params.greedy else params.temperature)
        self.seed.fill_(params.seed)
        self.top_p.fill_(params.top_p)
        self.top_k.fill_(params.top_k or vocabulary)
        self.min_p.fill_(params.min_p)
        penalties = torch.tensor([params.repetition_penalty, params.frequency_penalty, params.presence_penalty])
        self.penalties.copy_(to_device(penalties, self.penalties.device))


@dataclass(frozen=True)
class Stages:
    """What happens to a request's logits before a token is picked; what a request does not ask for costs it nothing."""

    penalised: bool = False
    truncated: bool = False

    @classmethod
    def of(cls, params: SamplingParams) -> "Stages":
        """Those that a request needs."""
        return cls(params.penalises, params.truncates)


@triton.jit
def _restrict_kernel(logits, mask, VOCABULARY, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = ids < VOCABULARY
    wait_for_previous(PDL)
    word = tl.load(mask + ids // 32, mask=known, other=0)
    tl.store(logits + ids, float("-inf"), mask=known & (word >> (ids % 32) & 1 == 0))


def _launch_restrict(logits: Tensor, mask: Tensor) -> None:
    vocabulary = logits.shape[0]
    run_kernel(
        _restrict_kernel,
        (triton.cdiv(vocabulary, BLOCK),),
        logits,
        mask,
        vocabulary,
        BLOCK=BLOCK,
        **launch_options(logits, 4),
    )


def restrict_reference(logits: Tensor, mask: Tensor) -> None:
    """Sets the logits of tokens that are not allowed to -inf.

    Args:
        logits: [vocabulary] float32, changed.
        mask: [vocabulary / 32, rounded up] int32, of a Constraint.
    """
    logits.masked_fill_(~allowed(mask, len(logits)), float("-inf"))


restrict = Operation(_launch_restrict, restrict_reference)


@triton.jit
def _penalise_kernel(logits, counts, penalties, VOCABULARY, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    count = tl.load(counts + ids, mask=ids < VOCABULARY, other=0)
    values = tl.load(logits + ids, mask=count > 0, other=0.0)
    repetition = tl.load(penalties)
    values = tl.where(values > 0, values / repetition, values * repetition)
    values -= tl.load(penalties + 1) * count + tl.load(penalties + 2)
    tl.store(logits + ids, values, mask=count > 0)


def _launch_penalise(logits: Tensor, counts: Tensor, draw: Draw) -> None:
    vocabulary = logits.shape[0]
    run_kernel(
        _penalise_kernel,
        (triton.cdiv(vocabulary, BLOCK),),
        logits,
        counts,
        draw.penalties,
        vocabulary,
        BLOCK=BLOCK,
        **launch_options(logits, 4),
    )


def penalise_reference(logits: Tensor, counts: Tensor, draw: Draw) -> None:
    """Lowers the logits of tokens that have been generated, or raises them where a penalty says so.

    Args:
        logits: [vocabulary] float32, changed.
        counts: [vocabulary] int32, how often each has been generated.
        draw: whose penalties count: repetition divides positive logits and multiplies others, frequency is subtracted
            once for each time, presence once.
    """
    repetition, frequency, presence = draw.penalties
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition) - frequency * counts - presence
    logits.copy_(torch.where(counts > 0, penalised, logits))


penalise = Operation(_launch_penalise, penalise_reference)


def truncate(logits: Tensor, draw: Draw) -> None:
    """Sets the logits outside min_p and top_k, and then outside top_p of what they leave, to -inf.

    The likeliest always stays.

    Args:
        logits: [vocabulary] float32, changed.
        draw: whose temperature, min_p, top_k and top_p count.
    """
    ordered = logits.sort(descending=True).values
    ranks = torch.arange(len(logits), device=logits.device)
    scaled = ordered / draw.temperature
    allowed = (ranks < draw.top_k) & ((scaled - scaled[0]).exp() >= draw.min_p)
    probabilities = torch.softmax(torch.where(allowed, scaled, float("-inf")), 0)
    parts = (probabilities.double() * WHOLE).long()  # their sums are the same in any order in which a GPU adds them
    kept = (parts.cumsum(0) - parts < draw.top_p.double() * WHOLE) & allowed | (ranks == 0)
    smallest = torch.where(kept, ordered, float("inf")).amin()
    logits.masked_fill_(logits < smallest, float("-inf"))


@triton.jit
def _pick_kernel(
    logits,
    temperature_pointer,
    seed_pointer,
    position_pointer,
    best,
    best_ids,
    VOCABULARY,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    program = tl.program_id(0)
    ids = program * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    values = tl.load(logits + ids, mask=ids < VOCABULARY, other=float("-inf"))
    temperature = tl.load(temperature_pointer)
    if temperature > 0:
        counter = ids.to(tl.uint32)
        position = counter * 0 + tl.load(position_pointer).to(tl.uint32)
        bits, _, _, _ = tl.philox(tl.load(seed_pointer), counter, position, counter * 0, counter * 0)
        uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608)  # 23 bits, never 0 or 1
        values = values / temperature - tl.log(-tl.log(uniform))
    value, place = tl.max(values, 0, return_indices=True)
    tl.store(best + program, value)
    tl.store(best_ids + program, program * BLOCK + place)


def _launch_pick(logits: Tensor, draw: Draw, position: Tensor, best: Tensor, best_ids: Tensor) -> None:
    run_kernel(
        _pick_kernel,
        (best.shape[0],),
        logits,
        draw.temperature,
        draw.seed,
        position,
        best,
        best_ids,
        logits.shape[0],
        BLOCK=BLOCK,
        **launch_options(logits, 4),
    )


def pick_reference(logits: Tensor, draw: Draw, position: Tensor, best: Tensor, best_ids: Tensor) -> None:
    """The best token of each block of BLOCK logits, after temperature and noise.

    Args:
        logits: [vocabulary] float32.
        draw: temperature (0 takes the largest logit) and seed.
        position: [1] int32, of the token that made these logits.
        best, best_ids: [blocks] float32 and int32, written.
    """
    values = logits
    if draw.temperature > 0:
        ids = torch.arange(len(logits), device=logits.device)
        bits = philox(int(draw.seed), ids, int(position))
        uniform = ((bits >> 9).float() + 0.5) / 2**23
        values = logits / draw.temperature - torch.log(-torch.log(uniform))
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK), value=float("-inf")).view(-1, BLOCK)
    places = padded.argmax(1)
    best.copy_(padded.gather(1, places[:, None])[:, 0])
    best_ids.copy_(places + torch.arange(len(padded), device=logits.device) * BLOCK)


def philox(seed: int, counter: Tensor, position: int) -> Tensor:
    """The first 32 bits of Philox-4x32-10 for the counters (counter, position, 0, 0), as int64.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.long(), torch.full_like(counter, position), counter * 0, counter * 0
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32 & low) ^ c1 ^ k0, second & low, (first >> 32 & low) ^ c3 ^ k1, first & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0


pick = Operation(_launch_pick, pick_reference)


@triton.jit
def _finish_kernel(
    x,
    best,
    best_ids,
    embeddings,
    position_pointer,
    tokens,
    counts,
    CANDIDATES,
    CANDIDATES_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    RING: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    wait_for_previous(PDL)
    candidates = tl.arange(0, CANDIDATES_BLOCK)
    values = tl.load(best + candidates, mask=candidates < CANDIDATES, other=float("-inf"))
    _, place = tl.max(values, 0, return_indices=True)
    token = tl.load(best_ids + place)
    position = tl.load(position_pointer)
    columns = tl.arange(0, WIDTH_BLOCK)
    embedding = tl.load(embeddings + token.to(tl.int64) * WIDTH + columns, mask=columns < WIDTH)
    tl.store(x + columns, embedding.to(tl.float32), mask=columns < WIDTH)
    tl.store(tokens + position % RING, token)
    if counts is not None:
        count = tl.load(counts + token)
    tl.debug_barrier()
    tl.store(position_pointer, position + 1)
    if counts is not None:
        tl.store(counts + token, count + 1)


def _launch_finish(
    x: Tensor,
    best: Tensor,
    best_ids: Tensor,
    embeddings: Tensor,
    position: Tensor,
    tokens: Tensor,
    counts: Tensor | None,
) -> None:
    width = x.shape[0]
    run_kernel(
        _finish_kernel,
        (1,),
        x,
        best,
        best_ids,
        embeddings,
        position,
        tokens,
        counts,
        best.shape[0],
        CANDIDATES_BLOCK=triton.next_power_of_2(best.shape[0]),
        WIDTH=width,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        RING=tokens.shape[0],
        **launch_options(x, 4),
    )


def finish_reference(
    x: Tensor,
    best: Tensor,
    best_ids: Tensor,
    embeddings: Tensor,
    position: Tensor,
    tokens: Tensor,
    counts: Tensor | None,
) -> None:
    """Takes the best of the blocks' tokens as the next one and makes everything ready for its step.

    Args:
        x: [width] float32, written: the token's embedding.
        best, best_ids: of `pick`.
        embeddings: [vocabulary, width].
        position: [1] int32; the token's place in the ring, then increased by one.
        tokens: [ring] int32, written at position modulo ring. On a GPU pinned memory of the host.
        counts: [vocabulary] int32, of generated tokens, the next one's increased by one; None where nobody reads them.
    """
    token = best_ids[best.argmax()]
    x.copy_(embeddings[token.long()])
    tokens[int(position) % len(tokens)] = token
    position += 1
    if counts is not None:
        counts[token.long()] += 1


finish = Operation(_launch_finish, finish_reference)
