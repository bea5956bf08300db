"""A checkpoint in several files, for the tests."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from kimi_vl.model.small_files import INDEX, SINGLE


def split(folder: Path, number: Callable[[str], int]) -> Path:
    """Puts each tensor of a folder's only file into the one that its name gets a number of, and writes the index."""
    tensors = load_file(folder / SINGLE)
    index = {name: f"model-{number(name)}.safetensors" for name in tensors}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / SINGLE).unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return folder
