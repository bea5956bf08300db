"""Draws tokens per second against context length, from what scripts/benchmark.py kept."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e4e7eb"


@dataclass(frozen=True)
class Line:
    """Tokens per second at each context."""

    label: str
    colour: str
    style: str
    points: list[tuple[int, float]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, metavar="FILE.json", help="what scripts/benchmark.py --json kept")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    return parser.parse_args()


def lines(kept: dict[str, Any]) -> list[Line]:
    """What is drawn, from the top of the picture down."""
    own, other = ([f for f in kept[name] if f["context"]] for name in ("figures", "transformers"))
    label = "this engine" if kept["engine"] == "fast" else "transformers"
    found = [
        Line("memory bandwidth", MUTED, "--", [(f["context"], 1 / f["floor"]) for f in own]),
        Line(label, "#0969da", "-", [(f["context"], 1 / f["median"]) for f in own]),
        Line("transformers", "#bc4c00", "-", [(f["context"], 1 / f["median"]) for f in other]),
    ]
    return [line for line in found if line.points]


def draw(kept: dict[str, Any], output: Path) -> None:
    """Writes the picture: white, so that it reads on dark pages too, and every line named where it is."""
    figure, axes = plt.subplots(figsize=(8.0, 4.0), layout="constrained", facecolor="white")
    for line in lines(kept):
        contexts, rates = zip(*line.points, strict=True)
        axes.plot(contexts, rates, line.style, color=line.colour, linewidth=2, marker="o", markersize=4)
        beside = {"textcoords": "offset points", "color": line.colour}
        axes.annotate(line.label, line.points[-1], (12, 0), va="center", weight="bold", **beside)
        for point in line.points:
            axes.annotate(f"{point[1]:,.0f}", point, (0, 7), ha="center", **beside)
    axes.set_xscale("log", base=2)
    ticks = sorted({context for line in lines(kept) for context, _ in line.points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0, 1.12 * axes.dataLim.ymax)
    axes.margins(x=0.05)
    axes.set_xlabel("tokens of context", color=INK)
    axes.set_title(
        f"Tokens per second, one request at a time, {kept['machine']}", color=INK, loc="left", fontsize=11, pad=12
    )
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main() -> None:
    """Reads and draws."""
    given = arguments()
    draw(json.loads(given.figures.read_text()), given.output)


if __name__ == "__main__":
    main()
