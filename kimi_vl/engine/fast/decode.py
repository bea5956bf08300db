"""One token in, the next one out: the whole step of the decoder, captured once and replayed for every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from kimi_vl.engine.base import SamplingParams, to_device
from kimi_vl.engine.fast.kernels.experts import contract, expand
from kimi_vl.engine.fast.kernels.latent_attention import SPLITS, attend, merge, project_up
from kimi_vl.engine.fast.kernels.latent_query import absorb
from kimi_vl.engine.fast.kernels.linear import linear_add, norm_linear
from kimi_vl.engine.fast.kernels.routing import Scratch, route
from kimi_vl.engine.fast.kernels.sampling import BLOCK, Draw, Stages, finish, penalise, pick, restrict, truncate
from kimi_vl.engine.fast.weights import Weights

AHEAD = 2  # steps under way while the host reads; what is thrown away when a text ends
RING = 64  # places for tokens on their way to the host; more than AHEAD


@dataclass(frozen=True)
class _Buffers:
    """What the kernels of a step hand on to one another."""

    x: Tensor  # [width] float32, the residual stream
    projected: Tensor  # [q rows + kv_a rows] float32
    query: Tensor  # [heads, latent + rope]
    parts: Tensor  # [splits, heads, latent]
    sums: Tensor  # [splits, heads] float32
    latents: Tensor  # [heads, latent]
    attended: Tensor  # [heads * value]
    best: Tensor  # [blocks of the vocabulary] float32
    best_ids: Tensor  # [blocks of the vocabulary] int32


class Decoder:
    """Generates tokens one after another. Its state on the GPU: the cache, the next token's embedding, its position."""

    def __init__(self, weights: Weights, cache: Tensor, rotary: Tensor) -> None:
        """
        Args:
            weights: of the model.
            cache: [layers, context, latent + rope], the latent cache.
            rotary: [context, rope] float32.
        """
        self.weights = weights
        self.cache = cache
        self.rotary = rotary
        self.logits = torch.zeros(weights.head.shape[0], dtype=torch.float32, device=cache.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self.draw = Draw.empty(cache.device)
        self.counts = torch.zeros(len(self.logits), dtype=torch.int32, device=cache.device)  # kept where penalised
        words = triton.cdiv(len(self.logits), 32)
        self._mask = torch.zeros(words, dtype=torch.int32, device=cache.device)  # of a constraint
        self._sent_mask = torch.zeros(words, dtype=torch.int32, pin_memory=cache.is_cuda)
        self.tokens = torch.zeros(RING, dtype=torch.int32, pin_memory=cache.is_cuda)
        chosen = weights.layers[-1][1].chosen
        aligned = triton.cdiv(chosen, 4) * 4  # every row then starts where one compiled kernel expects it
        self.experts = torch.zeros(len(weights.layers), aligned, dtype=torch.int32, device=cache.device)[:, :chosen]
        self._buffers = _allocate(weights)
        self._scratch = [
            Scratch.of(mlp, experts[: mlp.chosen])
            for (_, mlp), experts in zip(weights.layers, self.experts, strict=True)
        ]
        self._events = [torch.cuda.Event(blocking=True) for _ in range(RING if cache.is_cuda else 0)]
        self._graphs: dict[Stages, torch.cuda.CUDAGraph] = {}  # of a step
        self._choices: dict[Stages, torch.cuda.CUDAGraph] = {}  # of its end, under a constraint
        self._forward: torch.cuda.CUDAGraph | None = None  # of its beginning
        self._stages = Stages()  # these three are the present request's
        self._first = 0  # its prompt's length
        self._made = 0  # tokens of prompt and output, as far as steps have been started

    def capture(self) -> None:
        """Captures the step in CUDA graphs, whole and in its two parts, for each choice of stages."""
        for stages in (Stages(*flags) for flags in product((False, True), repeat=2)):
            self._graphs[stages] = self._captured(partial(self.run, stages))
            self._choices[stages] = self._captured(partial(self._choose, stages, restricted=True))
        self._forward = self._captured(self.forward)

    def example(self) -> None:
        """What launches all kernels of a step."""
        self.run(Stages())
        self.run(Stages(penalised=True))
        restrict(self.logits, self._mask)

    def begin(
        self, length: int, params: SamplingParams, output: Sequence[int] = (), mask: Tensor | None = None
    ) -> None:
        """Draws the next token of a request from `logits`, which its prompt of `length` tokens and its output made.

        With a mask this is the first call of `choose`, otherwise `step` makes what follows.
        """
        self.draw.set(params, len(self.logits))
        self.position.fill_(length + len(output) - 1)
        self._stages = Stages.of(params)
        if self._stages.penalised:
            self.counts.zero_()
            if output:
                ids = to_device(torch.tensor(output), self.counts.device)
                self.counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self._first = length
        self._made = length + len(output)
        if mask is not None:
            self.choose(mask)
        else:
            self._choose(self._stages)
            self._mark_token()

    def choose(self, mask: Tensor) -> None:
        """Starts to make one more token, of those that a Constraint's mask allows, and the logits that follow it.

        The token before it must have been read.
        """
        self._sent_mask.copy_(mask)
        self._mask.copy_(self._sent_mask, non_blocking=True)
        if self._forward:
            self._choices[self._stages].replay()
        else:
            self._choose(self._stages, restricted=True)
        self._mark_token()
        if self._forward:
            self._forward.replay()
        else:
            self.forward()

    def step(self) -> None:
        """Starts to make one more token."""
        if self._graphs:
            self._graphs[self._stages].replay()
        else:
            self.run(self._stages)
        self._mark_token()

    def token(self, index: int) -> int:
        """The token number `index` of the request, counted from 0; waits until it is there."""
        slot = (self._first + index - 1) % RING
        if self._events:
            self._events[slot].synchronize()
        return int(self.tokens[slot])

    def run(self, stages: Stages) -> None:
        """The step itself, kernel by kernel."""
        self.forward()
        self._choose(stages)

    def forward(self) -> None:
        """The token at `position`, whose embedding is there, through all layers into its cache rows and `logits`."""
        for layer in range(len(self.weights.layers)):
            self._through(layer)
        self.predict()

    def last_layer(self, x: Tensor, position: int) -> None:
        """Takes the token at a position through the last layer, from its hidden state x [width] float32 before it."""
        self._buffers.x.copy_(x)
        self.position.fill_(position)
        self._through(len(self.weights.layers) - 1)

    def predict(self) -> None:
        """The logits that follow the token which the last layer has seen last."""
        weights = self.weights
        norm_linear(self._buffers.x, weights.gain, weights.head, self.logits, weights.eps, "head")

    def _through(self, layer: int) -> None:
        b, cache, work, (attention, mlp) = (
            self._buffers,
            self.cache[layer],
            self._scratch[layer],
            self.weights.layers[layer],
        )
        norm_linear(b.x, attention.gain, attention.projections, b.projected, attention.eps, "projections")
        absorb(b.projected, attention, self.rotary, self.position, cache, b.query)
        attend(b.query, cache, self.position, b.parts, b.sums, attention)
        merge(b.parts, b.sums, self.position, b.latents)
        project_up(b.latents, attention, b.attended)
        linear_add(b.x, attention.out, b.attended)
        route(b.x, mlp, work)
        expand(b.x, mlp, work)
        if mlp.chosen:
            contract(b.x, mlp, work)

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.position.zero_()
        work()  # some libraries set themselves up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    def _choose(self, stages: Stages, restricted: bool = False) -> None:
        b = self._buffers
        if restricted:
            restrict(self.logits, self._mask)
        counts = self.counts if stages.penalised else None
        if counts is not None:
            penalise(self.logits, counts, self.draw)
        if stages.truncated:
            truncate(self.logits, self.draw)
        pick(self.logits, self.draw, self.position, b.best, b.best_ids)
        finish(b.x, b.best, b.best_ids, self.weights.embeddings, self.position, self.tokens, counts)

    def _mark_token(self) -> None:
        if self._events:
            self._events[(self._made - 1) % RING].record()
        self._made += 1


def _allocate(weights: Weights) -> _Buffers:
    attention = weights.layers[0][0]
    blocks = triton.cdiv(weights.head.shape[0], BLOCK)
    device, dtype = weights.embeddings.device, weights.embeddings.dtype

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    return _Buffers(
        x=floats(weights.head.shape[1]),
        projected=floats(attention.projections.shape[0]),
        query=torch.zeros(attention.heads, attention.row, dtype=dtype, device=device),
        parts=torch.zeros(SPLITS, attention.heads, attention.latent, dtype=dtype, device=device),
        sums=floats(SPLITS, attention.heads),
        latents=torch.zeros(attention.heads, attention.latent, dtype=dtype, device=device),
        attended=torch.zeros(attention.out.shape[1], dtype=dtype, device=device),
        best=floats(blocks),
        best_ids=torch.zeros(blocks, dtype=torch.int32, device=device),
    )
