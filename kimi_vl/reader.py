"""Request → model inputs: opens what holds pictures, and has all of them read in sizes with which they fit."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from PIL import Image

from kimi_vl.engine.base import ModelInputs, Picture
from kimi_vl.media.confined import Spare
from kimi_vl.media.documents import Documents
from kimi_vl.media.images import MODULE, Images
from kimi_vl.media.sources import Fetching
from kimi_vl.media.videos import Video
from kimi_vl.prompt.budget import Budget, Sized
from kimi_vl.prompt.chat import ChatPrompt, encode, render, with_no_thinking
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request, fetching_by, image_limits
from kimi_vl.settings import Settings
from kimi_vl.threads import Task, Threads

PICTURE_THREADS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """A request as the model takes it."""

    inputs: ModelInputs
    image_tokens: int
    pictures: list[dict[str, str | int]]  # kind (image, page, frame), width and height with their padding, tokens


class Reader:
    """Reads requests on threads of its own, for those who may be cancelled meanwhile."""

    def __init__(self, settings: Settings, processor: KimiVLProcessor, context_length: int) -> None:
        self._settings = settings
        self._processor = processor
        self._context_length = context_length
        self._pool = Threads(min(PICTURE_THREADS, os.cpu_count() or 1), "pictures")
        self._spare = Spare(MODULE)  # it reads the pictures of the next request
        self._pool.submit(self._spare.prepare)

    def read(self, request: Request, closes_thinking: bool, deadline: float) -> Reading:
        """Reads a request that was checked.

        Args:
            request: its files are still unknown.
            closes_thinking: whether the prompt ends with a thinking that is over.
            deadline: when to give up, on the clock of monotonic().
        Raises:
            InvalidRequest: a file or a picture cannot be used, or there is no room for them.
            DeadlinePassed: it took longer.
        """
        fetching = fetching_by(self._settings, deadline)
        images, attachments = list[Images](), request.attachments(self._settings, fetching)
        try:
            images = self._images(request, fetching, deadline)
            inputs = self._inputs(request, images, attachments, closes_thinking, deadline)
        finally:
            fetching.abandoned = True  # what still comes would keep the threads from the next request
            for each in (*images, *attachments):
                each.close()
            self._pool.submit(self._spare.prepare)
        kinds = [each.kind for each in (*images, *attachments) for _ in each.sizes]
        return Reading(
            inputs,
            image_tokens=int((inputs.input_ids == self._processor.media_id).sum()),
            pictures=[self._seen(kind, picture) for kind, picture in zip(kinds, inputs.pictures, strict=True)],
        )

    def close(self) -> None:
        """Ends the threads; what has not begun is left."""
        self._pool.shutdown(cancel_futures=True)
        self._spare.close()

    def _images(self, request: Request, fetching: Fetching, deadline: float) -> list[Images]:
        """What reads the request's own pictures, if it has any; their files are fetched at once."""
        files = self._at_once(request.picture_files(self._settings, fetching), deadline)
        return [Images(files, *image_limits(self._settings), self._spare.take)] if files else []

    def _inputs(
        self,
        request: Request,
        images: Sequence[Images],
        attachments: Sequence[Documents | Video],
        closes_thinking: bool,
        deadline: float,
    ) -> ModelInputs:
        self._at_once([each.open for each in (*images, *attachments)], deadline)
        introductions = [line for each in attachments for line in each.introductions]
        stored = [size for each in images for size in each.sizes]

        def prompt(introduced: int) -> ChatPrompt:
            rendered = render(request.conversation(introductions[:introduced]).turns)
            return with_no_thinking(rendered) if closes_thinking else rendered

        most, processor = request.max_image_tokens, self._processor.image_processor
        pictures: list[Callable[[], Image.Image]] = []
        if attachments:
            tokenizer = self._processor.tokenizer
            budget = Budget(
                processor,
                self._context_length,
                request.max_new_tokens,
                lambda introduced: len(encode(prompt(introduced), tokenizer, [0] * (len(stored) + introduced))),
                deadline,
            )
            drawn = [[Sized(each.kind, *size, each.enlarges) for size in each.sizes] for each in attachments]
            most = budget.share([each for part in drawn for each in part], len(stored), most)
            for attachment, part in zip(attachments, drawn, strict=True):
                attachment.send_sizes([each.size(processor, most) for each in part])
                pictures += [partial(attachment.picture, position) for position in range(len(part))]
        for reader in images:
            reader.send_sizes([processor.size(*size, most) for size in stored])
            pictures = [*(partial(reader.picture, position) for position in range(len(stored))), *pictures]
        return self._processor.prepare(pictures, prompt(len(introductions)), self._pool, deadline)

    def _at_once(self, calls: Sequence[Callable[[], T]], deadline: float) -> list[T]:
        """What each of them returns, all called on the pool."""
        tasks: list[Task[T]] = []
        try:
            for call in calls:
                tasks.append(Task(self._pool, call))
            return [task.result(deadline) for task in tasks]
        finally:
            for task in tasks:
                task.abandon()

    def _seen(self, kind: str, picture: Picture) -> dict[str, str | int]:
        (rows, columns), images = picture.grid, self._processor.image_processor
        side = images.patch_size
        return {"kind": kind, "width": columns * side, "height": rows * side, "tokens": images.tokens(picture.grid)}
