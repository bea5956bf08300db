"""Request → answer: the only place that wires the rooms together."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Barrier
from time import monotonic
from typing import TypeVar

import torch
from PIL import Image

from kimi_vl.engine.base import Engine, Generation, ModelInputs, Picture, SamplingParams, nothing_forced
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.errors import Misconfigured
from kimi_vl.media.confined import Spare
from kimi_vl.media.documents import Documents
from kimi_vl.media.images import MODULE, Images
from kimi_vl.media.videos import Video
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.fetch import fetch
from kimi_vl.model.variants import Variant, fetchable, find_model
from kimi_vl.output.budget import ThinkingBudget
from kimi_vl.output.detokenizer import Detokenizer
from kimi_vl.output.json_constraint import JsonConstraints
from kimi_vl.output.stop import StopMatcher
from kimi_vl.output.thinking import Delta, ThinkingSplitter
from kimi_vl.prompt.budget import Budget, Sized
from kimi_vl.prompt.chat import ChatPrompt, answer_prefix, encode, render, with_no_thinking
from kimi_vl.prompt.processor import KimiVLProcessor, wait_for
from kimi_vl.prompt.tokenizer import TikTokenTokenizer
from kimi_vl.request import Request, image_limits
from kimi_vl.settings import Settings

FAST_CAPABILITY = (8, 0)  # of the first GPUs that have bfloat16
PICTURE_THREADS = 4
T = TypeVar("T")


@dataclass(kw_only=True)
class Usage:
    """What an answer took. Times are seconds since the request came in."""

    input_tokens: int
    image_tokens: int
    pictures: list[dict[str, str | int]]  # kind (image, page, frame), width and height with their padding, tokens
    cached_tokens: int = 0  # of the input, not computed again
    seed: int
    thinking_tokens: int = 0
    answer_tokens: int = 0
    finish_reason: str = "stopped"  # stop, length, or stopped by the caller
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
        if splitter.undecided and self.usage.finish_reason == "length":  # cut inside the opening marker
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
        self._processor = processor
        self._engine = engine
        self._constraints = JsonConstraints(processor.tokenizer)
        self._pool = _started_pool()
        self._spare = Spare(MODULE)  # it reads the pictures of the next request
        self._pool.submit(self._spare.prepare)

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
        thinks = self.variant.thinks and request.thinking_budget != 0
        constraint = self._constraints.by_schema(request.json_schema, thinks) if request.json_schema else None
        images, attachments = self._images(request), request.attachments(self.settings)
        try:
            inputs = self._inputs(request, images, attachments)
        finally:
            for reader in (*images, *attachments):
                reader.close()
            self._pool.submit(self._spare.prepare)
        kinds = ["image"] * (len(inputs.pictures) - sum(len(each.sizes) for each in attachments))
        kinds += [each.kind for each in attachments for _ in each.sizes]
        params = SamplingParams(
            max_new_tokens=request.max_new_tokens,
            stop_ids=self._processor.tokenizer.stop_ids,
            temperature=self.variant.temperature if request.temperature is None else request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        )
        usage = Usage(
            input_tokens=inputs.input_ids.shape[1],
            image_tokens=int((inputs.input_ids == self._processor.media_id).sum()),
            pictures=[self._used(kind, picture) for kind, picture in zip(kinds, inputs.pictures, strict=True)],
            seed=params.seed,
            timings={"preprocess": monotonic() - started},
        )
        tokenizer = self._processor.tokenizer
        bounded = thinks and request.thinking_budget > 0
        forced_after = ThinkingBudget(request.thinking_budget, tokenizer) if bounded else nothing_forced
        generation = self._engine.generate(inputs, params, forced_after, constraint)
        return Answer(generation, tokenizer, usage, started, thinks, request.stop)

    def _images(self, request: Request) -> list[Images]:
        """What reads the request's own pictures, if it has any; their files are fetched at once."""
        files = self._at_once(request.picture_files(self.settings))
        return [Images(files, *image_limits(self.settings), self._spare.take)] if files else []

    def _at_once(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What each of them returns, all called on the pool."""
        calling = [self._pool.submit(call) for call in calls]
        results = []
        for called in calling:
            wait_for(called)
            results.append(called.result())
        return results

    def _inputs(
        self, request: Request, images: Sequence[Images], attachments: Sequence[Documents | Video]
    ) -> ModelInputs:
        """Opens all that holds pictures, finds out how large they can be, and has them read in that size."""
        self._at_once([reader.open for reader in (*images, *attachments)])
        introductions = [line for each in attachments for line in each.introductions]
        stored = [size for reader in images for size in reader.sizes]

        def prompt(introduced: int) -> ChatPrompt:
            rendered = render(request.conversation(introductions[:introduced]).turns)
            closes = self.variant.thinks and request.thinking_budget == 0
            return with_no_thinking(rendered) if closes else rendered

        most, processor = request.max_image_tokens, self._processor.image_processor
        pictures: list[Callable[[], Image.Image]] = []
        if attachments:
            tokenizer = self._processor.tokenizer
            budget = Budget(
                processor,
                self._engine.context_length,
                request.max_new_tokens,
                lambda introduced: len(encode(prompt(introduced), tokenizer, [0] * (len(stored) + introduced))),
            )
            drawn = [[Sized(each.kind, *size, each.enlarges) for size in each.sizes] for each in attachments]
            most = budget.share([each for part in drawn for each in part], len(stored), most)
            for attachment, part in zip(attachments, drawn, strict=True):
                attachment.send_sizes([each.size(processor, most) for each in part])
                pictures += [partial(attachment.picture, position) for position in range(len(part))]
        for reader in images:
            reader.send_sizes([processor.size(*size, most) for size in stored])
            pictures = [*(partial(reader.picture, position) for position in range(len(stored))), *pictures]
        return self._processor.prepare(pictures, prompt(len(introductions)), self._pool)

    def _used(self, kind: str, picture: Picture) -> dict[str, str | int]:
        (rows, columns), images = picture.grid, self._processor.image_processor
        side = images.patch_size
        return {"kind": kind, "width": columns * side, "height": rows * side, "tokens": images.tokens(picture.grid)}

    @property
    def healthy(self) -> bool:
        """Requests can succeed. Once this is false none ever will in this process."""
        return self._engine.healthy

    def close(self) -> None:
        """Waits for the request in progress and ends all threads."""
        self._engine.close()
        self._pool.shutdown(cancel_futures=True)
        self._spare.close()


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


def _started_pool() -> ThreadPoolExecutor:
    """Threads that prepare pictures, all of them running already: see Reporter in output/pacing.py."""
    workers = min(PICTURE_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    everyone = Barrier(workers)
    wait([pool.submit(everyone.wait) for _ in range(workers)])
    return pool
