"""What a run of the benchmark found, as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bench.ceilings import Ceilings
from bench.figure import Figure

COLUMNS = ("", "median ms", "from - to", "floor ms", "floor / median", "peak GB", "transformers ms")


@dataclass(frozen=True)
class Report:
    """Everything, to be kept."""

    command: str
    machine: str
    versions: dict[str, str]
    weights: str
    engine: str
    quantization: str  # of the weights that it reads
    ceilings: Ceilings
    distinct_experts: list[int]  # of each layer that has a router, while tokens were decoded
    experts: int  # of such a layer
    decoded: int  # those tokens
    figures: list[Figure]  # of the engine
    transformers: list[Figure]  # of generate() and the network's modules
    otherwise: dict[str, Figure]  # a decoded token with weights of other bits, and by a JSON Schema

    def json(self) -> str:
        """The fields, and of each figure what follows from it."""
        kept = asdict(self)
        for name in ("figures", "transformers"):
            kept[name] = [{**asdict(figure), "median": figure.median} for figure in getattr(self, name)]
        kept["otherwise"] = {name: {**asdict(fig), "median": fig.median} for name, fig in self.otherwise.items()}
        return json.dumps(kept, indent=1) + "\n"

    def markdown(self) -> str:
        """The table and what has no place in it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.weights} weights, quantization {self.quantization}, {self.engine} engine, "
            f"{self.machine}, {versions}.",
            f"Read bandwidth {self.ceilings.bandwidth / 1e12:.2f} TB/s, matrix products "
            f"{self.ceilings.rate / 1e12:.0f} TFLOP/s. The peak is of GPU memory above weights and cache.",
            table(self.figures, self.transformers),
            slowdown(self.figures),
            table(self._renamed(), []) if self.otherwise else "",
            speedup(self.quantization, self.figures, self.otherwise),
        ]
        if self.distinct_experts:
            fewest, most = min(self.distinct_experts), max(self.distinct_experts)
            lines.append(
                f"Distinct experts a layer in {self.decoded:,} decoded tokens: {fewest} to {most} of {self.experts}."
            )
        return "\n\n".join(line for line in lines if line)

    def _renamed(self) -> list[Figure]:
        return [replace(figure, name=f"{figure.name}, {name}") for name, figure in self.otherwise.items()]


def table(figures: Sequence[Figure], beside: Sequence[Figure]) -> str:
    """A row for each figure, and in the last column the one of the same name beside it."""
    others = {figure.name: figure for figure in beside}
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(figure, others.get(figure.name)) for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def slowdown(figures: Sequence[Figure]) -> str:
    """How much longer a token takes at each context than at the first."""
    decoded = [figure for figure in figures if figure.context]
    if len(decoded) < 2:
        return ""
    first, *rest = decoded
    shares = [f"{figure.median / first.median - 1:.1%} at {figure.context:,}" for figure in rest]
    return f"A token takes longer than at context {first.context:,} by {', '.join(shares)}."


def speedup(quantization: str, figures: Sequence[Figure], otherwise: Mapping[str, Figure]) -> str:
    """How many times as fast a token comes otherwise, at the same context."""
    times = {figure.context: figure.median for figure in figures if figure.context}
    shares = [
        f"with {name} {times[other.context] / other.median:.2f} times"
        for name, other in otherwise.items()
        if other.context in times
    ]
    return f"A token comes, against {quantization}, {', '.join(shares)} as fast." if shares else ""


def _cells(figure: Figure, other: Figure | None) -> list[str]:
    low, high = milliseconds(min(figure.values)), milliseconds(max(figure.values))
    return [
        figure.name,
        _time(figure.median, figure),
        f"{low} - {high}",
        _time(figure.floor, figure) if figure.floor else "",
        f"{figure.floor / figure.median:.0%}" if figure.floor else "",
        f"{figure.peak / 1e9:.2f}" if figure.peak else "",
        _time(other.median, other) if other else "",
    ]


def _time(seconds: float, figure: Figure) -> str:
    """Milliseconds, and of a decoded token how many there are in a second."""
    return milliseconds(seconds) + (f" ({1 / seconds:,.0f} tok/s)" if figure.context else "")


def milliseconds(seconds: float) -> str:
    """With two decimals where they say something."""
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"
