"""What makes two prompts the same up to some place, and where a prompt may be taken up again."""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from kimi_vl.engine.base import ModelInputs, Picture

# Tokens up to the last picture, from which on they are kept for another question: the question is then a piece of its
# own, which reads nearly all weights once more (12 ms on an H100).
WORTH_A_CUT = 4096


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and the pictures in it, which may still be in the making."""

    ids: Tensor  # [length] int64, on the CPU
    pictures: list[tuple[int, Picture]]  # where each one's first media id stands
    ends: list[int]  # where it may be cut, ascending: where an answer begins, and after a last picture that ends late

    @classmethod
    def of(cls, inputs: ModelInputs, media_id: int, answer_prefix: tuple[int, ...]) -> "Prompt":
        """
        Args:
            inputs: one prompt.
            media_id: the id that stands for a 2x2 block of patches.
            answer_prefix: the ids that open each answer.
        """
        ids = inputs.input_ids[0].cpu()
        places = (ids == media_id).nonzero()[:, 0].tolist()
        pictures, before = [], 0
        for picture in inputs.pictures:
            pictures.append((places[before], picture))
            before += picture.tokens
        ends = set(_answers(ids, answer_prefix))
        if places and places[-1] >= WORTH_A_CUT:
            ends.add(places[-1] + 1)
        return cls(ids, pictures, sorted(ends))

    def seen(self) -> "Seen":
        """What is kept of it, when all pictures are made."""
        digests = [(place, picture.patches.result().digest) for place, picture in self.pictures]
        return Seen(self.ids, digests, self.ends)


@dataclass(frozen=True)
class Seen:
    """A prompt that was read, with what its pictures showed instead of themselves."""

    ids: Tensor
    pictures: list[tuple[int, bytes]]  # where each one's first media id stands, and its digest
    ends: list[int]

    def shared_with(self, prompt: Prompt) -> int:
        """How many tokens both begin with. Waits for pictures only while all before is the same."""
        length = min(len(self.ids), len(prompt.ids))
        differing = (self.ids[:length] != prompt.ids[:length]).nonzero()
        shared = int(differing[0]) if len(differing) else length
        for mine, others in zip_longest(self.pictures, prompt.pictures):
            place = min(placed[0] for placed in (mine, others) if placed)
            if place >= shared:
                break
            if not mine or not others or mine != (others[0], others[1].patches.result().digest):
                return place
        return shared


def _answers(ids: Tensor, answer_prefix: tuple[int, ...]) -> list[int]:
    size = len(answer_prefix)
    if not size or len(ids) < size:
        return []
    found = (ids.unfold(0, size, 1) == torch.tensor(answer_prefix)).all(1)
    return (found.nonzero()[:, 0] + size).tolist()
