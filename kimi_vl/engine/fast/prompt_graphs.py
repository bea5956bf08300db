"""Short prompts: launching their work one by one would take longer than the work, so it is captured in CUDA graphs.

A graph has a fixed number of rows and of cached tokens to attend to; a chunk takes the smallest that it fits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_vl.engine.base import to_device
from kimi_vl.engine.fast.prefill import prefill
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
    """Runs chunks that are short enough; before `capture`, none is."""

    def __init__(self, weights: Weights, cache: Tensor, rotary: Tensor) -> None:
        self._model = weights, cache, rotary
        self._x = cache.new_zeros(LENGTHS[-1], weights.head.shape[1])
        self._span = torch.tensor([0, 1], dtype=torch.int32, device=cache.device)
        self._captured: list[_Captured] = []

    def example(self) -> Tensor:
        """What launches all kernels of a prompt, those for few tokens, with a context in parts, and those for many."""
        prefill(*self._model, self._x, self._span, LENGTHS[-1])
        return prefill(*self._model, self._x[: LENGTHS[0]], self._span, CONTEXTS[-1])

    def capture(self) -> None:
        """Captures each length with each context that it fits."""
        pool = torch.cuda.graph_pool_handle()
        longest = self._model[1].shape[1]
        self.example()  # some libraries set themselves up
        for length in LENGTHS:
            for context in (c for c in CONTEXTS if length <= c <= longest):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    hidden = prefill(*self._model, self._x[:length], self._span, context)
                self._captured.append(_Captured(length, context, graph, hidden))

    def run(self, x: Tensor, start: int) -> Tensor | None:
        """What prefill does and returns for a chunk x [tokens, width] at a position; None if it fits no graph."""
        end = start + len(x)
        fitting = (c for c in self._captured if len(x) <= c.length and end <= c.context)
        captured = next(fitting, None)
        if captured is None:
            return None
        self._x[: len(x)] = x
        self._span.copy_(to_device(torch.tensor([start, len(x)], dtype=torch.int32), x.device))
        captured.graph.replay()
        return captured.hidden
