"""What makes two prompts the same up to some place, and where a prompt may be taken up again."""

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from kimi_vl.engine.base import ModelInputs

# Tokens up to the last picture, from which on they are kept for another question: the question is then a piece of its
# own, which reads nearly all weights once more (12 ms on an H100).
WORTH_A_CUT = 4096


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and the pictures in it."""

    ids: Tensor  # [length] int64, on the CPU
    pictures: list[tuple[int, bytes]]  # where each one's first media id stands, and its digest
    ends: list[int]  # where it may be cut, ascending: where an answer begins, and after many tokens with pictures

    @classmethod
    def of(cls, inputs: ModelInputs, media_id: int, answer_prefix: tuple[int, ...]) -> "Prompt":
        """Waits for the patches of all pictures.

        Args:
            inputs: one prompt.
            media_id: the id that stands for a 2x2 block of patches.
            answer_prefix: the ids that open each answer.
        """
        ids = inputs.input_ids[0].cpu()
        places = (ids == media_id).nonzero()[:, 0].tolist()
        pictures, seen = [], 0
        for picture in inputs.pictures:
            pictures.append((places[seen], picture.patches.result().digest))
            seen += math.prod(picture.grid) // 4
        ends = set(_answers(ids, answer_prefix))
        if places and places[-1] >= WORTH_A_CUT:
            ends.add(places[-1] + 1)
        return cls(ids, pictures, sorted(ends))

    def shared_with(self, other: "Prompt") -> int:
        """How many tokens both begin with, pictures compared by what they show."""
        length = min(len(self.ids), len(other.ids))
        differing = (self.ids[:length] != other.ids[:length]).nonzero()
        shared = int(differing[0]) if len(differing) else length
        for mine, others in zip_longest(self.pictures, other.pictures):
            if mine != others:
                return min(shared, *(picture[0] for picture in (mine, others) if picture))
        return shared


def _answers(ids: Tensor, answer_prefix: tuple[int, ...]) -> list[int]:
    size = len(answer_prefix)
    if not size or len(ids) < size:
        return []
    found = (ids.unfold(0, size, 1) == torch.tensor(answer_prefix)).all(1)
    return (found.nonzero()[:, 0] + size).tolist()
