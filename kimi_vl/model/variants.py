"""The models that have a name, and where their folders are."""

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
        Misconfigured: there is no checkpoint; the message says how to get it.
    """
    folder = WEIGHTS / name if name in VARIANTS else Path(name)
    if (folder / "config.json").is_file():
        shipped = folder.resolve() == (WEIGHTS / "tiny").resolve()
        return folder, VARIANTS["tiny" if shipped else name] if shipped or name in VARIANTS else UNNAMED
    if name in VARIANTS:
        raise Misconfigured(
            f"The model {name!r} is not in weights/{name}; fetch it with: python scripts/download_weights.py {name}"
        )
    raise Misconfigured(f"{name!r} is neither a checkpoint folder nor one of {', '.join(VARIANTS)}")


def best_model() -> str:
    """The first of the named models whose weights are here; the one that ships is the last."""
    return next((name for name in VARIANTS if (WEIGHTS / name / "config.json").is_file()), "tiny")
