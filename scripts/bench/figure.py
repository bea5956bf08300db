"""A figure: something that was measured several times, what it could be at best, and the memory that it took."""

import sys
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """Times are seconds."""

    name: str
    values: list[float]
    floor: float = 0.0  # what the machine's ceilings allow; 0 where none is known
    peak: int = 0  # bytes of GPU memory above weights and cache
    context: int = 0  # tokens before a decoded one; 0 for everything else

    @property
    def median(self) -> float:
        """The value that stands for all."""
        return median(self.values)

    def announce(self, engine: str) -> "Figure":
        """Tells who waits for the table how far it is."""
        print(f"{engine}: {self.name}: {1000 * self.median:,.2f} ms", file=sys.stderr, flush=True)
        return self
