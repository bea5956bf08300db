"""Figures of pictures: MoonViT with its projector, and the time from decoded pictures to the first token."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from bench.ceilings import seconds
from bench.figure import Figure
from bench.floors import picture_operations, prompt_operations
from bench.measures import arrivals, sampling
from bench.subject import Subject
from kimi_vl.engine.base import ModelInputs
from kimi_vl.model.modeling import grid_thw
from kimi_vl.prompt.chat import Message, question, render
from kimi_vl.prompt.processor import KimiVLProcessor

PATCHES = 16_384  # of a picture at most: Thinking-2506's in_token_limit, which leaves 1792x1792 whole
QUESTION = "What is in the picture?"
NEXT_TURN = ({"role": "assistant", "content": "A house."}, {"role": "user", "content": "Which colour has it?"})


@dataclass(frozen=True)
class Album:
    """Some pictures of one size, all noise, so that none is like another."""

    count: int
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> "Album":
        """Reads COUNTxWIDTHxHEIGHT.

        Raises:
            ArgumentTypeError: it is something else.
        """
        try:
            count, width, height = map(int, text.split("x"))
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not COUNTxWIDTHxHEIGHT") from None
        return cls(count, width, height)

    def __str__(self) -> str:
        return f"{self.count}x{self.width}x{self.height}"

    @property
    def name(self) -> str:
        """For readers."""
        return f"{self.count} picture{'s' * (self.count > 1)} of {self.width}x{self.height}"

    def draw(self, seed: int) -> list[Image.Image]:
        """The pictures that belong to a seed."""
        random = np.random.default_rng([seed, self.count, self.width, self.height])
        shape = self.height, self.width, 3
        return [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for _ in range(self.count)]


def encode(subject: Subject, album: Album) -> Figure:
    """Seconds from patches that are made to features, of pictures that were not seen before.

    The engine's patches are in the host's memory, as its requests bring them; transformers finds them on the device.
    """
    large = replace(subject.processor.image_processor, in_token_limit=PATCHES)
    processor, prompt = KimiVLProcessor(large, subject.processor.tokenizer), render([question(QUESTION, album.count)])
    runs = [processor.prepare(album.draw(n), prompt, subject.pool) for n in range(subject.repeats + 1)]

    @torch.inference_mode()
    def run(number: int) -> float:
        wait([picture.patches for picture in runs[number].pictures])
        return seconds(_encoding(subject, runs[number]), subject.model.device)

    floor = picture_operations(subject.model, [picture.grid for picture in runs[0].pictures]) / subject.ceilings.rate
    return subject.measure(f"MoonViT and projector, {album.name}", run, floor)


def first_token(subject: Subject, album: Album) -> list[Figure]:
    """Seconds from decoded pictures and a short question to the first token; and of the same with one more turn.

    Raises:
        SystemExit: the fast engine computed again what it had just seen.
    """
    turns = [question(QUESTION, album.count)]

    def first(number: int) -> float:
        return ask(subject, album.draw(1000 + number), turns)

    def second(number: int) -> float:
        pictures = album.draw(2000 + number)
        ask(subject, pictures, turns)
        again = ask(subject, pictures, [*turns, *NEXT_TURN])
        if subject.fast and not subject.fast.cached_tokens:
            raise SystemExit("one more turn reused none of the tokens before it: a mistake")
        return again

    inputs = subject.processor.prepare(album.draw(1000), render(turns), subject.pool)
    operations = picture_operations(subject.model, [picture.grid for picture in inputs.pictures])
    operations += prompt_operations(subject.model, inputs.input_ids.shape[1])
    name = f"first token, {album.name} and a question"
    return [
        subject.measure(name, first, operations / subject.ceilings.rate),
        subject.measure(f"{name}, one more turn", second),
    ]


def ask(subject: Subject, pictures: Sequence[Image.Image], turns: Sequence[Message]) -> float:
    """Seconds to the first token of an answer."""
    started = perf_counter()
    inputs = subject.processor.prepare(pictures, render(turns), subject.pool)
    arrivals(subject.engine, inputs, sampling(subject.model, 1))
    return perf_counter() - started


def _encoding(subject: Subject, inputs: ModelInputs) -> Callable[[], object]:
    """What makes the features of a prompt's pictures, with the engine or with transformers' modules."""
    if subject.fast:
        features = subject.fast.pictures.features
        return lambda: [features(picture) for picture in inputs.pictures]
    pixels, grids = (tensor.to(subject.model.device) for tensor in inputs.tensors().values())
    return partial(subject.model.model.get_image_features, pixels, grid_thw(grids))
