"""What makes two prompts the same up to some place, and where a prompt may be taken up again."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_vl.engine.base import ModelInputs


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and the pictures in it."""

    ids: Tensor  # [length] int64, on the CPU
    pictures: list[tuple[int, bytes]]  # where each one's first media id stands, and its digest
    ends: list[int]  # where a turn of the user's ends and an answer begins, ascending

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
        return cls(ids, pictures, _ends(ids, answer_prefix))

    def shared_with(self, other: "Prompt") -> int:
        """How many tokens both begin with, pictures compared by what they show."""
        length = min(len(self.ids), len(other.ids))
        differing = (self.ids[:length] != other.ids[:length]).nonzero()
        shared = int(differing[0]) if len(differing) else length
        for mine, others in zip(self.pictures, other.pictures, strict=False):
            if mine != others:
                return min(shared, mine[0], others[0])
        return shared


def _ends(ids: Tensor, answer_prefix: tuple[int, ...]) -> list[int]:
    size = len(answer_prefix)
    if not size or len(ids) < size:
        return []
    found = (ids.unfold(0, size, 1) == torch.tensor(answer_prefix)).all(1)
    return (found.nonzero()[:, 0] + size).tolist()
