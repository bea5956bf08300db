"""The models that have a name, and where a model's folder is."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_vl.errors import Misconfigured
from kimi_vl.model.inspection import missing_files
from kimi_vl.model.small_files import LARGEST_JSON

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"  # neither "--" nor "..": the folders' names depend on that
ON_THE_HUB = re.compile(
    rf"hf://(?P<repository>(?=[^@]{{,96}}(?:@|$))(?![^@]*\.git(?:@|$)){PART}/{PART})(?:@(?P<revision>(?=.{{,96}}$){PART}))?"
)


@dataclass(frozen=True)
class Variant:
    """A published checkpoint, or the one that ships with this project."""

    temperature: float  # what its authors recommend
    repository: str = ""  # on the Hugging Face hub; empty for what is not fetched
    revision: str = ""
    thinks: bool = True
    notice: str = ""  # what whoever reads its answers has to know


VARIANTS = {
    "thinking": Variant(0.6, "moonshotai/Kimi-VL-A3B-Thinking", "16681d8ac24e505088698e4e34ea494dd6e24400"),
    "thinking-2506": Variant(0.8, "moonshotai/Kimi-VL-A3B-Thinking-2506", "f124f44fb6ab5778cfac5117e3902ef03e860ad4"),
    "instruct": Variant(
        0.2, "moonshotai/Kimi-VL-A3B-Instruct", "7a3c132a7b0f1f1677f5a72f258bd3afded7d357", thinks=False
    ),
    "tiny": Variant(
        0.0, notice="tiny is a demonstration and test model: it reads numbers, simple shapes and sums only"
    ),
}
UNNAMED = Variant(0.6)


def locate(name: str, weights_dir: str = "") -> tuple[Path, Variant]:
    """The folder and variant of a model, given as in --model, whether or not the folder is there.

    Args:
        name: a name, hf://owner/name[@revision], or a folder.
        weights_dir: where downloads land; the project's weights/ if empty.
    Raises:
        Misconfigured: what begins with hf:// and goes on as nothing that can be on the hub.
    """
    weights = Path(weights_dir or WEIGHTS)
    if name in VARIANTS:
        return (weights if VARIANTS[name].repository else WEIGHTS) / name, VARIANTS[name]
    if not name.startswith("hf://"):
        folder = Path(name)
        real = os.path.realpath  # which takes a link to itself, unlike Path.resolve
        named = (own for own in VARIANTS if real(folder) == real(locate(own, weights_dir)[0]))
        own = next(named, None)
        return folder, VARIANTS[own] if own else replace(UNNAMED, temperature=_recommended_temperature(folder))
    parts = ON_THE_HUB.fullmatch(name)
    if not parts:
        raise Misconfigured(
            f"{name!r} names no model on the hub; write hf://owner/name or hf://owner/name@revision, each side of the "
            "@ at most 96 letters, digits, underscores, and single hyphens and dots"
        )
    repository, revision = parts["repository"], parts["revision"] or "main"
    folder = weights / f"{repository.replace('/', '--')}@{revision}"
    unknown = replace(UNNAMED, temperature=_recommended_temperature(folder))
    variant = next((known for known in VARIANTS.values() if known.repository == repository), unknown)
    return folder, replace(variant, repository=repository, revision=revision)


def fetchable(name: str) -> bool:
    """Whether a model that is named so is on the hub; a folder is not, wherever it lies."""
    return name.startswith("hf://") or (name in VARIANTS and bool(VARIANTS[name].repository))


def find_model(name: str, weights_dir: str = "") -> tuple[Path, Variant]:
    """The folder and variant of a model whose files are all there; takes what locate takes.

    Raises:
        Misconfigured: there is no such folder, or a file is missing; the message says how to get it.
    """
    folder, variant = locate(name, weights_dir)
    missing = missing_files(folder)
    if not missing:
        return folder, variant
    if fetchable(name):
        state = "not complete" if folder.is_dir() else "not there"
        raise Misconfigured(f"{folder} is {state}; fetch the model with: python scripts/download_weights.py {name}")
    if folder.is_dir():
        raise Misconfigured(f"{name!r} is no complete checkpoint folder: {missing[0]} is missing; copy it there")
    raise Misconfigured(
        f"{name!r} is neither a checkpoint folder nor one of {', '.join(VARIANTS)}, nor hf://owner/name"
    )


def best_model(weights_dir: str = "") -> str:
    """The first of the named models whose weights are here; the one that ships is the last."""
    return next((name for name in VARIANTS if not missing_files(locate(name, weights_dir)[0])), "tiny")


def _recommended_temperature(folder: Path) -> float:
    """What the folder's generation_config.json samples with, if it does and the number is sane."""
    file = folder / "generation_config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() and file.stat().st_size <= LARGEST_JSON else {}
        temperature = float(config["temperature"]) if config["do_sample"] is True else UNNAMED.temperature
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return UNNAMED.temperature
    return temperature if 0 <= temperature <= 2 else UNNAMED.temperature
