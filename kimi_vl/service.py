"""Request → answer: the only place that wires the rooms together."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import torch

from kimi_vl.engine.base import Engine, Generation, SamplingParams, nothing_forced
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.errors import DeadlinePassed, Misconfigured
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.fetch import fetch
from kimi_vl.model.variants import Variant, fetchable, find_model
from kimi_vl.output.budget import ThinkingBudget
from kimi_vl.output.detokenizer import Detokenizer
from kimi_vl.output.json_constraint import JsonConstraint, JsonConstraints
from kimi_vl.output.stop import StopMatcher
from kimi_vl.output.thinking import Delta, ThinkingSplitter
from kimi_vl.prompt.chat import answer_prefix
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.prompt.tokenizer import TikTokenTokenizer
from kimi_vl.reader import Reader
from kimi_vl.request import Request
from kimi_vl.settings import Settings
from kimi_vl.threads import Task, Threads

FAST_CAPABILITY = (8, 0)  # of the first GPUs that have bfloat16


@dataclass(kw_only=True)
class Usage:
    """What an answer took. Times are seconds since the request came in."""

    input_tokens: int = 0  # these three are of what was read before a deadline
    image_tokens: int = 0
    pictures: list[dict[str, str | int]] = field(default_factory=list)  # see Reading
    cached_tokens: int = 0  # of the input, not computed again
    seed: int
    thinking_tokens: int = 0
    answer_tokens: int = 0
    finish_reason: str = "stopped"  # stop, length, timeout, or stopped by the caller
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0  # after the first token
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage


class Answer:
    """The text of one request as it comes, iterable once; `usage` is complete when it has ended."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: TikTokenTokenizer,
        usage: Usage,
        started: float,
        thinks: bool,
        stops: Sequence[str],
    ) -> None:
        self.usage = usage
        self._thinks = thinks
        self._stops = stops
        self._generation = generation
        self._tokenizer = tokenizer
        self._started = started

    def stop(self) -> None:
        """Ends the answer within one token."""
        self._generation.stop()

    def progress(self) -> str:
        """A line on how far it is."""
        seconds = monotonic() - self._started
        return f"{seconds:.0f} s: {self.usage.thinking_tokens} tokens of thinking, {self.usage.answer_tokens} of answer"

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __iter__(self) -> Iterator[Delta]:
        detokenizer, splitter = Detokenizer(self._tokenizer), ThinkingSplitter(self._thinks)
        matcher = StopMatcher(self._stops)
        for count, token in enumerate(self._generation, start=1):
            thinking_before = splitter.in_thinking
            delta = splitter.feed(detokenizer.feed(token))
            if thinking_before or splitter.in_thinking:
                self.usage.thinking_tokens = count  # the markers belong to the thinking
            self.usage.answer_tokens = count - self.usage.thinking_tokens
            self._clock(count)
            if delta := replace(delta, answer=matcher.feed(delta.answer)):
                yield delta
            if matcher.matched:
                self.stop()
                break
        self.usage.finish_reason = "stop" if matcher.matched else self._generation.finish_reason
        self.usage.cached_tokens = self._generation.cached_tokens
        self.usage.timings |= self._generation.timings
        if splitter.undecided and self.usage.finish_reason in ("length", "timeout"):  # cut inside the opening marker
            self.usage.thinking_tokens, self.usage.answer_tokens = self.usage.answer_tokens, 0
            return
        rest = splitter.close()
        if rest := replace(rest, answer=matcher.feed(rest.answer) + matcher.close()):
            yield rest

    def _clock(self, count: int) -> None:
        elapsed = monotonic() - self._started
        if count == 1:
            self.usage.time_to_first_token = self.usage.timings["first_token"] = elapsed
        else:
            self.usage.timings["decode"] = decoding = elapsed - self.usage.time_to_first_token
            self.usage.tokens_per_second = (count - 1) / decoding


class Service:
    """A loaded model that answers requests, one at a time."""

    def __init__(self, settings: Settings, variant: Variant, processor: KimiVLProcessor, engine: Engine) -> None:
        self.settings = settings
        self.variant = variant
        self._engine = engine
        self._tokenizer = processor.tokenizer
        self._constraints = JsonConstraints(processor.tokenizer)
        self._schemas = Threads(1, "schemas")
        self._reader = Reader(settings, processor, engine.context_length)

    @classmethod
    def load(
        cls, settings: Settings, progress: Callable[[str], None] = lambda line: None, fetch_absent: bool = False
    ) -> "Service":
        """Loads the model that the settings name.

        Args:
            settings: of the service.
            progress: told, in lines, what happens.
            fetch_absent: whether a model on the hub that is not here may be downloaded.
        Raises:
            Misconfigured: its folder is not there, or cannot be fetched, or not be used.
        """
        if fetch_absent and fetchable(settings.model):
            fetch(settings.model, settings.weights_dir, progress)
        folder, variant = find_model(settings.model, settings.weights_dir)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        progress(f"Loading {settings.model} on {_device_name(device)}")
        if variant.notice:
            progress(variant.notice)
        return cls(settings, variant, *load(folder, device, settings.quantization, progress))

    def answer(self, request: Request) -> Answer:
        """Checks a request, reads its pictures and starts to answer it.

        Raises:
            InvalidRequest: the request cannot be served; nothing has been generated.
        """
        started = monotonic()
        request.check(self.settings)
        seconds = [limit for limit in (request.timeout_s, self.settings.max_seconds) if limit]
        deadline = started + min(seconds, default=math.inf)
        thinks = self.variant.thinks and request.thinking_budget != 0
        params = SamplingParams(
            max_new_tokens=request.max_new_tokens,
            stop_ids=self._tokenizer.stop_ids,
            temperature=self.variant.temperature if request.temperature == -1 else request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        )
        usage = Usage(seed=params.seed)
        bounded = thinks and request.thinking_budget > 0
        forced_after = ThinkingBudget(request.thinking_budget, self._tokenizer) if bounded else nothing_forced
        try:
            constraint = self._constraint(request.json_schema, thinks, deadline) if request.json_schema else None
            reading = self._reader.read(request, self.variant.thinks and not thinks, deadline)
        except DeadlinePassed:
            generation = Generation(params, lambda _: None, deadline=deadline)  # which has passed: it ends at once
        else:
            usage.input_tokens = reading.inputs.input_ids.shape[1]
            usage.image_tokens, usage.pictures = reading.image_tokens, reading.pictures
            generation = self._engine.generate(reading.inputs, params, forced_after, constraint, deadline)
        usage.timings["preprocess"] = monotonic() - started
        return Answer(generation, self._tokenizer, usage, started, thinks, request.stop)

    @property
    def healthy(self) -> bool:
        """Requests can succeed. Once this is false none ever will in this process."""
        return self._engine.healthy

    def close(self) -> None:
        """Waits for the request in progress and ends all threads."""
        self._engine.close()
        self._reader.close()
        self._schemas.shutdown(cancel_futures=True)

    def _constraint(self, schema: str, thinks: bool, deadline: float) -> JsonConstraint:
        """What holds an answer to a schema, made while this thread can be interrupted.

        Raises:
            InvalidRequest: it cannot be enforced.
            DeadlinePassed: that is not known by then.
        """
        making = Task(self._schemas, self._constraints.by_schema, schema, thinks)
        try:
            return making.result(deadline)
        finally:
            making.abandon()


def load(
    folder: Path, device: torch.device, quantization: str, progress: Callable[[str], None]
) -> tuple[KimiVLProcessor, Engine]:
    """The processor of a checkpoint folder, and the fastest engine that runs on a device.

    Raises:
        Misconfigured: the folder cannot be used, the quantization has no such name or needs another device, or not even
            a short context fits in the device's memory.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FAST_CAPABILITY:
        from kimi_vl.engine.fast.engine import FastEngine  # its kernels take long to import
        from kimi_vl.engine.fast.loading import load_network

        network = load_network(folder, device, torch.bfloat16, quantization, progress)
        processor = KimiVLProcessor.from_pretrained(folder)
        return processor, FastEngine(network, answer_prefix(processor.tokenizer))
    if quantization not in ("auto", "none"):
        raise Misconfigured(
            f"KIMI_VL_QUANTIZATION={quantization} needs a CUDA GPU of compute capability 8.0 or newer; unset it"
        )
    progress(
        "The fast engine needs a CUDA GPU of compute capability 8.0 or newer; "
        f"answering with the reference engine on {_device_name(device)}"
    )
    model = load_model(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return KimiVLProcessor.from_pretrained(folder), ReferenceEngine(model)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
