"""Messages and pictures → the tensors that the model takes."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from kimi_vl.engine.base import ModelInputs, Patches, Picture
from kimi_vl.prompt.chat import MEDIA_PAD, ChatPrompt, Message, encode, question, render
from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.tokenizer import VOCABULARY_FILE, TikTokenTokenizer
from kimi_vl.threads import Task


class KimiVLProcessor:
    """Builds prompts with their pictures; what AutoProcessor returns for a Kimi-VL folder."""

    def __init__(self, image_processor: ImageProcessor, tokenizer: TikTokenTokenizer) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._table = image_processor.table()
        self.media_id = tokenizer.control[MEDIA_PAD.name]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "KimiVLProcessor":
        """Reads a checkpoint folder's preprocessor_config.json and tiktoken.model; keywords do nothing."""
        return cls(ImageProcessor.from_pretrained(folder), TikTokenTokenizer(str(Path(folder) / VOCABULARY_FILE)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that from_pretrained reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __call__(
        self,
        images: Image.Image | Iterable[Image.Image] | None = None,
        text: str | ChatPrompt = "",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one prompt.

        Args:
            images: the pictures, in the order of their places in the prompt.
            text: what apply_chat_template returned. Any other string is a user's question about the pictures, and
                the names of control tokens in it are plain text.
        Returns:
            input_ids and attention_mask [1, length] int64; with pictures also pixel_values [patches, 3, 14, 14]
            float32 and image_grid_hws [pictures, 2] int64.
        Raises:
            ValueError: the number of pictures is not the number of their places in the prompt.
        """
        features, grids = {}, []
        if patches := self.image_processor([images] if isinstance(images, Image.Image) else images or ()):
            features["pixel_values"], features["image_grid_hws"] = patches
            grids = patches[1].tolist()
        input_ids = self._encode(text, grids)
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **features})

    def prepare(
        self,
        pictures: Sequence[Image.Image | Callable[[], Image.Image]],
        text: str | ChatPrompt,
        pool: Executor,
        deadline: float = math.inf,
    ) -> ModelInputs:
        """The same inputs for an engine, which need not wait for the patches: those are still made when this returns.

        Args:
            pictures: each of them, or what reads it in the size that is cut, called on the pool.
            text: as for a call.
            pool: its threads read or scale the pictures, and then make their patches.
            deadline: when to give up, on the clock of monotonic().
        Raises:
            DeadlinePassed: reading the pictures took longer.
            Exception: the first that reading a picture raised, in the order of the pictures.
            ValueError: the number of pictures is not the number of their places in the prompt.
        """
        scaling: deque[Task[Image.Image]] = deque()
        prepared: list[Picture] = []
        try:
            for picture in pictures:
                scaling.append(Task(pool, self._scale, picture))
            while scaling:
                scaled = scaling[0].result(deadline)
                scaling.popleft()
                patches = pool.submit(self._patches, scaled)
                prepared.append(Picture(self.image_processor.grid(*scaled.size), patches))
        finally:
            for unread in scaling:
                unread.abandon()
        return ModelInputs(self._encode(text, [picture.grid for picture in prepared]), prepared)

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> ChatPrompt | BatchFeature:
        """Renders a conversation; with tokenize, encodes it too, with the pictures that its image parts hold."""
        prompt = render(conversation, add_generation_prompt)
        if not tokenize:
            return prompt
        parts = [
            part for message in conversation if not isinstance(message["content"], str) for part in message["content"]
        ]
        return self([part["image"] for part in parts if part["type"] == "image"], prompt)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, **kwargs)

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """Texts of several rows of token ids."""
        return self.tokenizer.batch_decode(ids, **kwargs)

    def _encode(self, text: str | ChatPrompt, grids: Sequence[Sequence[int]]) -> torch.Tensor:
        """input_ids [1, length] int64 of a prompt, or of a question about pictures."""
        prompt = text if isinstance(text, ChatPrompt) else render([question(text, len(grids))])
        return torch.tensor([encode(prompt, self.tokenizer, [self.image_processor.tokens(grid) for grid in grids])])

    def _scale(self, picture: Image.Image | Callable[[], Image.Image]) -> Image.Image:
        return self.image_processor.scale(picture) if isinstance(picture, Image.Image) else picture()

    def _patches(self, scaled: Image.Image) -> Patches:
        cut = self.image_processor.cut(scaled)
        digest = hashlib.sha256(repr(self.image_processor.grid(*scaled.size)).encode())
        digest.update(cut.data)
        levels = torch.from_numpy(cut)
        return Patches(levels.pin_memory() if torch.cuda.is_available() else levels, self._table, digest.digest())
