"""Messages and pictures → the tensors that the model takes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from kimi_vl.prompt.chat import MEDIA_PAD, ChatPrompt, Message, encode, question, render
from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.tokenizer import TikTokenTokenizer


class KimiVLProcessor:
    """Builds prompts with their pictures; what AutoProcessor returns for a Kimi-VL folder."""

    def __init__(self, image_processor: ImageProcessor, tokenizer: TikTokenTokenizer) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.media_id = tokenizer.control[MEDIA_PAD.name]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "KimiVLProcessor":
        """Reads a checkpoint folder's preprocessor_config.json and tiktoken.model; keywords do nothing."""
        return cls(ImageProcessor.from_pretrained(folder), TikTokenTokenizer.from_pretrained(folder))

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
        features = {}
        tokens_per_picture: list[int] = []
        if patches := self.image_processor([images] if isinstance(images, Image.Image) else images or ()):
            features["pixel_values"], features["image_grid_hws"] = patches
            tokens_per_picture = [self.image_processor.tokens(grid) for grid in features["image_grid_hws"].tolist()]
        prompt = text if isinstance(text, ChatPrompt) else render([question(text, len(tokens_per_picture))])
        input_ids = torch.tensor([encode(prompt, self.tokenizer, tokens_per_picture)])
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **features})

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
