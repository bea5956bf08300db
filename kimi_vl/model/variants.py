"""The models that have a name, and where their folders are."""

import json
from dataclasses import dataclass
from pathlib import Path

from kimi_vl.errors import Misconfigured

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@dataclass(frozen=True)
class Variant:
    """A published checkpoint, or the one that ships with this project."""

    temperature: float  # what its authors recommend
    repository: str = ""  # on the Hugging Face hub; empty for the one that ships
    revision: str = ""
    notice: str = ""  # what whoever reads its answers has to know


VARIANTS = {
    "thinking": Variant(0.6, "moonshotai/Kimi-VL-A3B-Thinking", "16681d8ac24e505088698e4e34ea494dd6e24400"),
    "thinking-2506": Variant(0.8, "moonshotai/Kimi-VL-A3B-Thinking-2506", "f124f44fb6ab5778cfac5117e3902ef03e860ad4"),
    "instruct": Variant(0.2, "moonshotai/Kimi-VL-A3B-Instruct", "7a3c132a7b0f1f1677f5a72f258bd3afded7d357"),
    "tiny": Variant(
        0.0, notice="tiny is a demonstration and test model: it reads numbers, simple shapes and sums only"
    ),
}
UNNAMED = Variant(0.6)


def find_model(name: str) -> tuple[Path, Variant]:
    """The folder and variant of a model, given by name or as a folder.

    Raises:
        Misconfigured: there is no whole checkpoint; the message says how to get it.
    """
    folder = WEIGHTS / name if name in VARIANTS else Path(name)
    missing = missing_files(folder)
    if not missing:
        known = (variant for own, variant in VARIANTS.items() if folder.resolve() == (WEIGHTS / own).resolve())
        return folder, next(known, UNNAMED)
    if name in VARIANTS:
        state = "not complete" if folder.is_dir() else "not there"
        raise Misconfigured(
            f"weights/{name} is {state}; fetch the model with: python scripts/download_weights.py {name}"
        )
    if folder.is_dir():
        raise Misconfigured(f"{name!r} is no complete checkpoint folder: {missing[0]} is missing")
    raise Misconfigured(f"{name!r} is neither a checkpoint folder nor one of {', '.join(VARIANTS)}")


def missing_files(folder: Path) -> list[str]:
    """The names of files that a checkpoint folder lacks, as after a download that was interrupted."""
    needed = ["config.json", "preprocessor_config.json", "tiktoken.model", "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        needed[3:] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [name for name in needed if not (folder / name).is_file()]


def best_model() -> str:
    """The first of the named models whose weights are here; the one that ships is the last."""
    return next((name for name in VARIANTS if not missing_files(WEIGHTS / name)), "tiny")
