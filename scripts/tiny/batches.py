"""Examples → packed batches, made by worker processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kimi_vl.prompt.chat import encode, question, render
from kimi_vl.prompt.tokenizer import TikTokenTokenizer
from tiny.network import PackedPictures, PackedTokens, Rows, interpolation_row
from tiny.pictures import LABELS, Drawing, Fonts
from tiny.questions import SHARES, Example, make
from tiny.vocabulary import output_text

T = TypeVar("T")


@dataclass
class Batch:
    """Packed examples, and what is to be learnt from them."""

    tokens: PackedTokens
    pictures: PackedPictures | None
    labels: Tensor  # [patches, LABELS] uint8
    selected: Tensor  # [t] int64, the tokens whose successor is learnt
    targets: Tensor  # [t] int64, those successors
    owner: Tensor  # [t] int64, the example that each belongs to
    families: list[str]

    def pin_memory(self) -> "Batch":
        """Called by the loader, so that copies to the GPU do not wait."""
        return each_tensor(self, Tensor.pin_memory)


def each_tensor(packed: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with all its tensors, however deep, changed."""
    changed: dict[str, Any] = {}
    for field in fields(packed):  # type: ignore[arg-type]
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif is_dataclass(value):
            changed[field.name] = each_tensor(value, change)
    return replace(packed, **changed)  # type: ignore[type-var]


def to_device(packed: T, device: torch.device) -> T:
    """A dataclass with all its tensors on a device."""
    return each_tensor(packed, lambda tensor: tensor.to(device, non_blocking=True))


def prompt_ids(
    example: Example, grids: list[tuple[int, int]], tokenizer: TikTokenTokenizer, text_first: bool = False
) -> list[int]:
    """The chat prompt of an example."""
    message = dict(question(example.question, len(grids)))
    if text_first:
        message["content"] = message["content"][::-1]
    return encode(render([message]), tokenizer, [rows * columns // 4 for rows, columns in grids])


def pack_pictures(drawings: list[Drawing]) -> tuple[PackedPictures | None, Tensor, list[tuple[int, int]]]:
    """Packed patches, their labels [n, LABELS] uint8, and the grids (rows, columns)."""
    if not drawings:
        return None, torch.zeros(0, LABELS, dtype=torch.uint8), []
    patches, labels, grids = zip(*(drawing.patches() for drawing in drawings), strict=True)
    starts = np.cumsum([0, *(rows * columns for rows, columns in grids)])
    places = [np.stack(np.divmod(np.arange(rows * columns), columns), 1) for rows, columns in grids]
    offsets = [[interpolation_row(side) for side in grid] for grid in grids]
    used = np.concatenate([place + offset for place, offset in zip(places, offsets, strict=True)])
    (table_rows, down), (table_columns, across) = (np.unique(used[:, axis], return_inverse=True) for axis in (0, 1))
    blocks = [
        start + np.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).ravel()
        for start, (rows, columns) in zip(starts, grids, strict=False)
    ]
    packed = PackedPictures(
        patches=torch.from_numpy(np.concatenate(patches)),
        places=torch.from_numpy(np.concatenate(places)),
        merge=torch.from_numpy(np.concatenate(blocks)),
        table_rows=torch.from_numpy(table_rows),
        table_columns=torch.from_numpy(table_columns),
        table_index=torch.from_numpy(down * len(table_columns) + across),
        rows=Rows(torch.tensor(starts, dtype=torch.int32), int(np.diff(starts).max())),
    )
    return packed, torch.from_numpy(np.concatenate(labels)), list(grids)


def pack_tokens(sequences: list[list[int]], media_id: int) -> PackedTokens:
    """Sequences of ids, one after another."""
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    return PackedTokens(
        ids=ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        media=(ids == media_id).nonzero()[:, 0],
        rows=Rows(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), max(lengths)),
    )


def pack(examples: list[Example], tokenizer: TikTokenTokenizer, random: Random) -> Batch:
    """A batch to learn from: of each example its output, given its prompt."""
    pictures, labels, grids = pack_pictures([drawing for example in examples for drawing in example.drawings])
    end, remaining = tokenizer.control["<|im_end|>"], iter(grids)
    sequences: list[list[int]] = []
    selected: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    start = 0
    for index, example in enumerate(examples):
        own = [next(remaining) for _ in example.drawings]
        prompt = prompt_ids(example, own, tokenizer, text_first=random.random() < 0.1)
        output = [*tokenizer.encode_text(output_text(example.thinking, example.answer)), end]
        sequences.append(prompt + output[:-1])
        selected += range(start + len(prompt) - 1, start + len(sequences[-1]))
        targets += output
        owner += [index] * len(output)
        start += len(sequences[-1])
    return Batch(
        tokens=pack_tokens(sequences, tokenizer.control["<|media_pad|>"]),
        pictures=pictures,
        labels=labels,
        selected=torch.tensor(selected),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        families=[example.family for example in examples],
    )


class Examples(IterableDataset[Batch]):
    """An endless stream of batches of about so many patches; `difficulty` is the share of hard examples."""

    def __init__(
        self, vocabulary: Path, fonts: Fonts, difficulty: "Synchronized[float]", patches: int, seed: int
    ) -> None:
        self.vocabulary, self.files, self.difficulty = vocabulary, fonts.files, difficulty
        self.patches, self.seed = patches, seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        random = Random(self.seed * 1000 + (worker.id if worker else 0))
        tokenizer = TikTokenTokenizer(str(self.vocabulary))
        fonts = Fonts([])
        fonts.files = self.files
        while True:
            examples: list[Example] = []
            patches = 0
            while patches < self.patches and len(examples) < self.patches // 140:
                family = random.choices(list(SHARES), list(SHARES.values()))[0]
                examples.append(make(random, fonts, family, hard=random.random() < self.difficulty.value))
                patches += sum(_patches(drawing) for drawing in examples[-1].drawings)
            yield pack(examples, tokenizer, random)


def _patches(drawing: Drawing) -> int:
    """Patches that a drawing takes, about."""
    return drawing.image.size[0] * drawing.image.size[1] // 196


def loader(examples: Examples, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches as the workers make them, or made in this process with no workers."""
    options: dict[str, Any] = {"prefetch_factor": 3, "multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(examples, batch_size=None, num_workers=workers, pin_memory=pin, **options))
