"""Request → model inputs: opens what is attached, and has all pictures read in sizes with which they fit."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kimi_vl.engine.base import ModelInputs, Picture
from kimi_vl.media.documents import Documents
from kimi_vl.media.videos import Video
from kimi_vl.prompt.budget import Budget, Sized
from kimi_vl.prompt.chat import ChatPrompt, encode, render, with_no_thinking
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.settings import Settings
from kimi_vl.threads import Task, Threads

PICTURE_THREADS = 4  # each holds at most one whole picture


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
        attachments = request.attachments(self._settings)
        try:
            inputs = self._inputs(request, attachments, closes_thinking, deadline)
        finally:
            for attachment in attachments:
                attachment.close()
        kinds = ["image"] * (len(inputs.pictures) - sum(len(each.sizes) for each in attachments))
        kinds += [each.kind for each in attachments for _ in each.sizes]
        return Reading(
            inputs,
            image_tokens=int((inputs.input_ids == self._processor.media_id).sum()),
            pictures=[self._seen(kind, picture) for kind, picture in zip(kinds, inputs.pictures, strict=True)],
        )

    def close(self) -> None:
        """Ends the threads; what has not begun is left."""
        self._pool.shutdown(cancel_futures=True)

    def _inputs(
        self, request: Request, attachments: Sequence[Documents | Video], closes_thinking: bool, deadline: float
    ) -> ModelInputs:
        for opening in [Task(self._pool, attachment.open) for attachment in attachments]:
            opening.result(deadline)
        introductions = [line for each in attachments for line in each.introductions]
        pictures = request.pictures(self._settings)

        def prompt(introduced: int) -> ChatPrompt:
            rendered = render(request.conversation(introductions[:introduced]).turns)
            return with_no_thinking(rendered) if closes_thinking else rendered

        most = request.max_image_tokens
        if attachments:
            images, tokenizer = self._processor.image_processor, self._processor.tokenizer
            budget = Budget(
                images,
                self._context_length,
                request.max_new_tokens,
                lambda introduced: len(encode(prompt(introduced), tokenizer, [0] * (len(pictures) + introduced))),
            )
            drawn = [[Sized(each.kind, *size, each.enlarges) for size in each.sizes] for each in attachments]
            most = budget.share([each for part in drawn for each in part], len(pictures), most)
            for attachment, part in zip(attachments, drawn, strict=True):
                attachment.send_sizes([each.size(images, most) for each in part])
                pictures += [partial(attachment.picture, position) for position in range(len(part))]
        return self._processor.prepare(pictures, prompt(len(introductions)), self._pool, most, deadline)

    def _seen(self, kind: str, picture: Picture) -> dict[str, str | int]:
        (rows, columns), images = picture.grid, self._processor.image_processor
        side = images.patch_size
        return {"kind": kind, "width": columns * side, "height": rows * side, "tokens": images.tokens(picture.grid)}
