"""Short prompts: launching their work one by one would take longer than the work, so it is captured in CUDA graphs.

A graph has a fixed number of rows and of cached tokens to attend to; a piece takes the smallest that it fits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_vl.engine.fast.prefill import Piece, prefill, span_on
from kimi_vl.engine.fast.weights import Weights

LENGTHS = (64, 256, 512, 1152)  # the last for a picture of 4,096 patches with a question
CONTEXTS = (1152, 4096, 16384)


@dataclass(frozen=True)
class _Captured:
    length: int
    context: int
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [width] float32, what prefill returned


class PromptGraphs:
    """Runs pieces that are short enough; before `capture`, none is."""

    def __init__(self, weights: Weights, cache: Tensor, rotary: Tensor) -> None:
        self._model = weights, cache, rotary
        self._x = cache.new_zeros(LENGTHS[-1], weights.head.shape[1])
        self._span = torch.tensor([0, 1], dtype=torch.int32, device=cache.device)
        self._captured: list[_Captured] = []

    def example(self) -> Tensor:
        """What launches all kernels of a prompt, those for few tokens, with a context in parts, and those for many."""
        self._prefill(LENGTHS[-1], LENGTHS[-1])
        return self._prefill(LENGTHS[0], CONTEXTS[-1])

    def capture(self) -> None:
        """Captures each length with each context that it fits."""
        pool = torch.cuda.graph_pool_handle()
        longest = self._model[1].shape[1]
        self.example()  # some libraries set themselves up
        for length in LENGTHS:
            for context in (c for c in CONTEXTS if length <= c <= longest):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    hidden = self._prefill(length, context)
                self._captured.append(_Captured(length, context, graph, hidden))

    def fits(self, length: int, end: int) -> bool:
        """Whether `run` takes so many tokens that end there."""
        return self._smallest(length, end) is not None

    def run(self, x: Tensor, start: int) -> Tensor | None:
        """What prefill does and returns for one piece x [tokens, width] at a position; None if it fits no graph."""
        captured = self._smallest(len(x), start + len(x))
        if captured is None:
            return None
        self._x[: len(x)] = x
        self._span.copy_(span_on(x.device, start, len(x)))
        captured.graph.replay()
        return captured.hidden

    def _smallest(self, length: int, end: int) -> _Captured | None:
        return next((c for c in self._captured if length <= c.length and end <= c.context), None)

    def _prefill(self, length: int, context: int) -> Tensor:
        piece = Piece(slice(0, length), self._span, context)
        return prefill(*self._model, self._x[:length], [piece])[0]
