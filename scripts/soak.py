"""Has a service run thousands of mixed requests, and compares what it holds and takes at their beginning and end.

With tiny weights through a real Cog server; with random weights of the full size in this process, on a GPU. Fails when
anything has grown beyond its limit.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from soaking.errands import errands
from soaking.subjects import CogServer, InProcess, Subject
from soaking.usage import Held, held

from kimi_vl.model.variants import find_model
from kimi_vl.service import Service
from kimi_vl.settings import Settings

WINDOW = 300  # requests at the beginning and at the end that are compared
GROWTH, SLOWER = 1.02, 1.10  # what may become of what is held, and of what is taken


@dataclass
class Window:
    """Some requests one after another."""

    held: list[Held] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of each errand

    def latency(self) -> float:
        """Seconds of all errands once: the sum of each one's median."""
        return sum(median(each) for each in self.seconds.values())


def soak(subject: Subject, folder: Path, temporary: Path, last: Callable[[int], bool], window: int) -> list[Window]:
    """Runs errands.

    Args:
        subject: who runs them.
        folder: for their files.
        temporary: where the subject puts files.
        last: told how many have been run, whether these are all.
        window: how many are looked at together.
    Returns:
        All windows that are full.
    """
    windows, done = [Window()], 0
    for errand in errands(folder, max_new_tokens=200):
        started = time.monotonic()
        subject.run(errand)
        windows[-1].seconds[errand.name].append(time.monotonic() - started)
        done += 1
        windows[-1].held.append(held([subject.process], temporary))
        if last(done):
            break
        if done % window == 0:
            windows.append(Window())
    return windows if done % window == 0 else windows[:-1]


@dataclass(frozen=True)
class Row:
    """One thing of the first window and of the last."""

    name: str
    first: float
    last: float
    limit: float  # of the last, in firsts

    @property
    def is_kept(self) -> bool:
        """It has not grown beyond the limit."""
        return self.last <= self.first * self.limit


def compare(first: Window, last: Window) -> list[Row]:
    """All that is measured, by its median."""

    def grown(name: str, attribute: str, unit: float = 1) -> Row:
        before, after = (median(getattr(each, attribute) for each in window.held) / unit for window in (first, last))
        return Row(name, before, after, GROWTH)

    return [
        grown("memory, MB", "memory", 1e6),
        grown("GPU memory, MB", "gpu_memory", 1e6),
        grown("file descriptors", "descriptors"),
        grown("threads", "threads"),
        grown("temporary files", "temporary_files"),
        Row("seconds for each of the errands", first.latency(), last.latency(), SLOWER),
    ]


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = ["| | first | last | change | limit |", "|---|---|---|---|---|"]
    for row in rows:
        change = f"{100 * (row.last / row.first - 1):+.1f} %" if row.first else "none" if row.is_kept else "new"
        verdict = "" if row.is_kept else " exceeded"
        lines.append(
            f"| {row.name} | {row.first:,.2f} | {row.last:,.2f} | {change} | +{100 * (row.limit - 1):.0f} %{verdict} |"
        )
    return "\n".join(lines)


def in_process(weights: str) -> InProcess:
    """A service with these weights, on the fastest engine that runs here."""
    from bench.subject import load, machine, make_engine

    device = machine()
    model, processor = load(weights, device)
    engine = make_engine("fast" if device.type == "cuda" else "reference", model, processor)
    return InProcess(Service(Settings(), find_model("tiny")[1], processor, engine), knows=weights == "tiny")


def main() -> int:
    """Soaks; the exit status says whether all limits were kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="for so long, instead of so many")
    parser.add_argument("--weights", choices=("tiny", "random"), default="tiny", help="(default: %(default)s)")
    parser.add_argument("--in-process", action="store_true", help="without Cog, as random weights always are")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.requests < 2 * WINDOW:
        parser.error(f"--requests must be at least {2 * WINDOW}, of which the first and the last {WINDOW} are compared")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the server ends, too
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        files, place = Path(folder), Path(temporary)
        subject: Subject
        if arguments.in_process or arguments.weights == "random":
            tempfile.tempdir = temporary
            subject = in_process(arguments.weights)
        else:
            subject = CogServer(arguments.weights, place, files / "log")
        started = time.monotonic()

        def is_last(done: int) -> bool:
            if done % 100 == 0:
                print(f"{done} requests in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            if arguments.minutes is not None:
                return time.monotonic() - started > 60 * arguments.minutes
            return done == arguments.requests

        try:
            windows = soak(subject, files, place, is_last, WINDOW)
        finally:
            subject.close()
    if len(windows) < 2:
        parser.error(f"there were fewer than {2 * WINDOW} requests, too few to compare")
    rows = compare(windows[0], windows[-1])
    print(table(rows))
    return 0 if all(row.is_kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
