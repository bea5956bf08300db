"""What an engine is: model inputs in, token ids out, one request at a time on one thread."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kimi_vl.errors import InvalidRequest
from kimi_vl.threads import POLL_SECONDS, Threads


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. A GPU fetches it when it gets there, and nobody waits for that."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def gpu_is_lost() -> bool:
    """Every call to the GPU fails from now on, until another process makes it: what CUDA calls a sticky error."""
    if not torch.cuda.is_initialized():
        return False
    for _ in range(2):  # an error that has passed is told once, a sticky one always
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        return False
    return True


@dataclass(frozen=True)
class Patches:
    """A picture cut up. Its levels become the network's input on the network's device: fewer bytes go there.

    Where there is a GPU, the levels lie in pinned memory, from which it can fetch them by itself.
    """

    levels: Tensor  # [rows * columns, 3, 14, 14] uint8, in raster order
    table: Tensor  # [3, 256] float32, the network's input for each level of each channel
    digest: bytes  # SHA-256 of the levels and the grid

    def pixels(self) -> Tensor:
        """The network's input [rows * columns, 3, 14, 14] float32."""
        return self.table[torch.arange(3)[:, None, None], self.levels.long()]


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt. Its patches may still be in the making, on another thread."""

    grid: tuple[int, int]  # rows and columns of patches
    patches: Future[Patches]

    @property
    def tokens(self) -> int:
        """Of the prompt, one for each 2x2 block of patches."""
        return math.prod(self.grid) // 4


@dataclass(frozen=True)
class ModelInputs:
    """One prompt, as the processor makes it."""

    input_ids: Tensor  # [1, length] int64, one media id for each 2x2 block of patches
    pictures: Sequence[Picture] = ()  # in the order of their places in the prompt

    def tensors(self) -> dict[str, Tensor]:
        """What the network's forward takes of the pictures beside the ids, when all patches are there.

        Returns:
            pixel_values [patches, 3, 14, 14] float32 and image_grid_hws [pictures, 2] int64; empty without pictures.
        """
        if not self.pictures:
            return {}
        return {
            "pixel_values": torch.cat([picture.patches.result().pixels() for picture in self.pictures]),
            "image_grid_hws": torch.tensor([picture.grid for picture in self.pictures]),
        }


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # these three as in vLLM, but of generated tokens only, those forced among them
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Below this temperature float32 probabilities are all on the likeliest token."""
        return self.temperature < 1e-4

    @property
    def penalises(self) -> bool:
        """What was generated changes what comes next, beyond what the model makes of it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        """The draw is from less than all tokens."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


FinishReason = Literal["stop", "length", "timeout", "stopped"]  # stopped: by whoever reads the tokens
Forcing = Callable[[int], Sequence[int]]  # told each token that the model chose: the ids that must follow it


def nothing_forced(token: int) -> Sequence[int]:
    """The model chooses every token."""
    return ()


class Constraint(Protocol):
    """What an output may be, token by token; used by one thread at a time."""

    def accept(self, token: int) -> None:
        """Takes the next token of the output."""

    def mask(self) -> Tensor:
        """[vocabulary / 32, rounded up] int32 on the host: a bit, the lowest first, for each token that may follow."""


def allowed(mask: Tensor, vocabulary: int) -> Tensor:
    """[vocabulary] bool: the bits of a constraint's mask."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (mask[:, None] >> bits & 1).flatten()[:vocabulary].bool()


class Stopwatch:
    """How long the stages of some work on a device take. A GPU notes the moments by itself, and nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stages: list[str] = []
        self._moments: list[Any] = []  # the first stage's beginning, then each stage's end

    def start(self) -> None:
        """Begins the first stage."""
        self._stages, self._moments = [], [self._now()]

    def ended(self, stage: str) -> None:
        """A stage has ended, and the next one begins."""
        self._stages.append(stage)
        self._moments.append(self._now())

    def seconds(self) -> dict[str, float]:
        """Of each stage, all its times together. On a GPU, ask when it has passed them all."""
        lasted = dict.fromkeys(self._stages, 0.0)
        for stage, (a, b) in zip(self._stages, pairwise(self._moments), strict=True):
            lasted[stage] += a.elapsed_time(b) / 1000 if self._on_gpu else b - a
        return lasted

    def _now(self) -> Any:
        if not self._on_gpu:
            return monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Generation:
    """The token ids of one request, iterable once as they come, without the stop token that ends them.

    The work begins with the first look at it and ends with the last: whoever is interrupted anywhere, also before the
    first token, leaves nothing running.
    """

    def __init__(
        self,
        params: SamplingParams,
        start: Callable[["Generation"], object],
        forced_after: Forcing = nothing_forced,
        constraint: Constraint | None = None,
        deadline: float = math.inf,
    ) -> None:
        self.params = params
        self.constraint = constraint  # told by the engine of every token that it emitted
        self.forced_after = forced_after  # called by the engine once for each token that it chose itself and emitted
        self._start = start
        self.finish_reason: FinishReason = "stopped"  # until the last token was read
        self.cached_tokens = 0  # of the prompt, not computed again; set by the engine before the first token
        self.timings: dict[str, float] = {}  # seconds of stages up to the first token, set by the engine before it
        self._asked = 0.0
        self._emitted = 0
        self._deadline = deadline
        self._stop_requested = False
        self._reason: FinishReason | None = None  # why the engine ended it, if nobody else did
        self._tokens: SimpleQueue[int | FinishReason | BaseException] = SimpleQueue()

    def stop(self) -> None:
        """Ends the generation within one token, or while its prompt is read within a few layers.

        May be called from any thread, and more than once.
        """
        self._stop_requested = True

    @property
    def stopped(self) -> bool:
        """Nobody waits for tokens any more."""
        return self._stop_requested or monotonic() >= self._deadline

    def begin(self) -> None:
        """Called by the engine's thread when the requests before this one have ended."""
        self.timings["queue"] = monotonic() - self._asked

    def emit(self, token: int) -> bool:
        """Called by the engine with each new token; False says that it was the last one."""
        if self.stopped:
            return False
        self._emitted += 1
        if token in self.params.stop_ids:
            self._reason = "stop"
            return False
        self._tokens.put(token)
        if self._emitted == self.params.max_new_tokens:
            self._reason = "length"
            return False
        return True

    def end(self, error: BaseException | None = None) -> None:
        """Called by the engine's thread when nothing follows; an error is raised where the tokens are read."""
        interrupted: FinishReason = "stopped" if self._stop_requested or not self.stopped else "timeout"
        self._tokens.put(error or self._reason or interrupted)

    def __iter__(self) -> Iterator[int]:
        try:
            self._asked = monotonic()
            self._start(self)
            item: int | FinishReason | BaseException | None = None
            while not isinstance(item, str):
                left = self._deadline - monotonic()
                try:
                    item = self._tokens.get(timeout=max(0, min(POLL_SECONDS, left)))
                except Empty:
                    if left > 0:
                        continue
                    item = "timeout"  # whatever the engine is in the middle of
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, int):
                    yield item
            self.finish_reason = item
        finally:
            self.stop()


class Engine(ABC):
    """Runs one request after another on a thread of its own, which alone touches the device."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._thread = Threads(1, "engine")
        self._gpu_lost = False

    @property
    def healthy(self) -> bool:
        """Requests can succeed. Once this is false none ever will in this process."""
        return self._thread.alive and not self._gpu_lost

    def generate(
        self,
        inputs: ModelInputs,
        params: SamplingParams,
        forced_after: Forcing = nothing_forced,
        constraint: Constraint | None = None,
        deadline: float = math.inf,
    ) -> Generation:
        """What will be generated for a prompt. max_new_tokens is cut to what the context length leaves.

        Args:
            inputs: the prompt.
            params: how tokens are chosen.
            forced_after: called on the engine's thread; what it forces counts as generated.
            constraint: used on that thread; the model chooses among the tokens that it allows.
            deadline: when to end with what there is, on the clock of monotonic().
        Raises:
            InvalidRequest: the prompt leaves no room for an answer.
        """
        length = inputs.input_ids.shape[1]
        room = self.context_length - length
        if room < 1:
            raise InvalidRequest(
                f"The prompt has {length:,} tokens with its pictures, and this model takes at most "
                f"{self.context_length - 1:,}; shorten the text or send fewer pictures."
            )
        params = replace(params, max_new_tokens=min(params.max_new_tokens, room))

        def start(generation: Generation) -> None:
            self._thread.submit(self._run, inputs, generation)

        return Generation(params, start, forced_after, constraint, deadline)

    def close(self) -> None:
        """Waits for the request in progress and ends the thread."""
        self._thread.shutdown()

    def _run(self, inputs: ModelInputs, generation: Generation) -> None:
        try:
            generation.begin()
            if not generation.stopped:  # it may have waited for another to end
                self._decode(inputs, generation)
        except BaseException as error:
            self._gpu_lost = gpu_is_lost()  # whoever reads the error can ask at once
            generation.end(error)
        else:
            generation.end()

    @abstractmethod
    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        """Generates on the engine's thread: hands each new token id to generation.emit until that returns False."""
