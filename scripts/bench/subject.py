"""What is measured: an engine over a model, with random weights of the full size or with a checkpoint's."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bench.ceilings import Ceilings
from bench.figure import Figure
from bench.full_size import full_size_processor, random_model
from kimi_vl.engine.base import Engine
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES
from kimi_vl.engine.fast.weights import Weights, parts
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import find_model
from kimi_vl.prompt.chat import answer_prefix
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.reader import PICTURE_THREADS
from kimi_vl.threads import Threads

ENGINES = ("fast", "reference")


@dataclass(frozen=True)
class Subject:
    """An engine, and how often each of its figures is taken."""

    model: KimiVLForConditionalGeneration
    processor: KimiVLProcessor
    engine: Engine
    ceilings: Ceilings
    tokens: int  # decoded in each run
    repeats: int
    pool: Executor = field(default_factory=lambda: Threads(PICTURE_THREADS, "pictures"))  # as the service has it

    @property
    def fast(self) -> FastEngine | None:
        """The engine, if it is the fast one."""
        return self.engine if isinstance(self.engine, FastEngine) else None

    @cached_property
    def weights(self) -> Weights:
        """What the engine reads."""
        return self.fast.weights if self.fast else Weights.of(self.model)

    def measure(self, name: str, run: Callable[[int], float], floor: float = 0.0, context: int = 0) -> Figure:
        """A figure of runs that are numbered from 0 and return their seconds; the first one warms up."""
        forget_peak()
        values = [run(number) for number in range(self.repeats + 1)][1:]
        figure = Figure(name, values, floor, peak_above(self.model, self.engine), context)
        return figure.announce(type(self.engine).__name__)


def forget_peak() -> None:
    """From here on, the peak of GPU memory is a new one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_above(model: KimiVLForConditionalGeneration, engine: Engine) -> int:
    """Most bytes of GPU memory that were allocated at once, without weights and latent cache."""
    if not torch.cuda.is_available():
        return 0
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if isinstance(engine, FastEngine):
        kept += engine.cache.nbytes
        kept += sum(part.nbytes for part in parts(engine.weights) if isinstance(part, Matrix) and part.bits < 16)
    return torch.cuda.max_memory_allocated() - kept


def machine() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(weights: str, device: torch.device) -> tuple[KimiVLForConditionalGeneration, KimiVLProcessor]:
    """The model that --weights names, and a processor whose ids it knows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if weights == "random":
        processor = full_size_processor()
        return random_model(device, dtype, processor.media_id), processor
    folder = find_model(weights)[0]
    return load_model(folder, device, dtype), KimiVLProcessor.from_pretrained(folder)


def make_engine(
    name: str, model: KimiVLForConditionalGeneration, processor: KimiVLProcessor, quantization: str = "none"
) -> Engine:
    """One of ENGINES; the fast one with the bits of one of SCHEMES."""
    if name == "reference":
        return ReferenceEngine(model)
    network = Network.of(model).quantised(SCHEMES[quantization])
    return FastEngine(network, answer_prefix(processor.tokenizer))
