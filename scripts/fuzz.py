"""Feeds what reads untrusted bytes with ever new ones, guided by what of the code they reach (atheris).

It begins with tests/fuzz/corpus. An input that breaks a target's promise, crashes the process or does not end goes to a
file DIR/TARGET-crash-… (-timeout-…, -oom-…, -signal-…), and DIR/TARGET.log tells why; --file feeds it again. Mended, it
belongs into the corpus. The promises are in scripts/fuzzing/targets.py. Ends with status 1 if anything was found.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from time import monotonic, strftime

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["PIL", "pillow_heif", "kimi_vl"]):
    from fuzzing.targets import TARGETS
    from PIL import Image

    Image.init()  # imports its decoders

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
ROUND = 600  # seconds of a target before it is the next one's turn
LIMITS = ("-timeout=60", "-rss_limit_mb=3000")  # of one input, for what the targets cannot notice themselves
PLAIN = 0.2  # of the inputs of targets that have a form are changed without regard to it


def fuzz(name: str, arguments: Sequence[str], fed: Path) -> None:
    """Feeds one target, each input after it was written to a file.

    Ends this process, with a status other than 0, or by a signal, if something was found.
    """
    target = TARGETS[name]

    def feed(data: bytes) -> None:
        fed.write_bytes(data)
        target(data)

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        random = Random(seed)
        if not target.mutate or random.random() < PLAIN:
            return bytes(atheris.Mutate(data, longest))
        return target.mutate(data, random)[:longest]

    options = [*LIMITS, f"-max_len={target.longest}", *arguments]
    atheris.Setup([sys.argv[0], *options], feed, custom_mutator=mutated if target.mutate else None)
    atheris.Fuzz()


def fuzz_into_log(name: str, out: Path, arguments: Sequence[str], fed: Path) -> None:
    """The same, with new inputs that reach more code and with findings in a folder."""
    corpus = out / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # All of the corpus is kept: what it reaches within the libraries is not seen.
    arguments = ["-keep_seed=1", f"-artifact_prefix={out}/{name}-", *arguments, str(corpus), str(CORPUS / name)]
    fuzz(name, arguments, fed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all in turn)")
    parser.add_argument("--hours", type=float, default=1.0, help="of all targets together (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="instead: some inputs of each, every time the same ones")
    parser.add_argument("--file", type=Path, help="instead: only this input, with its error on the terminal")
    parser.add_argument("--out", type=Path, default=ROOT / ".fuzz", metavar="DIR", help="(default: .fuzz)")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    if options.file and len(options.targets) != 1:
        parser.error("--file needs one TARGET")
    if options.file and not options.file.is_file():  # which libFuzzer would pass over
        parser.error(f"there is no file {options.file}")
    if options.file:
        fuzz(names[0], [str(options.file)], Path(os.devnull))
    out = options.out.resolve()
    ends = monotonic() + options.hours * 3600
    found = False
    for name in names if options.short else cycle(names):
        seconds = min(ROUND, options.hours * 3600 / len(names), ends - monotonic())
        if seconds < 1:
            break
        limit = ["-seed=1", f"-runs={TARGETS[name].short}"] if options.short else [f"-max_total_time={seconds:.0f}"]
        fed = out / f"{name}-fed"
        process = os.fork()  # for each round, since what is found ends it
        if not process:
            fuzz_into_log(name, out, limit, fed)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):  # libFuzzer had no chance to write it, as when the stack has overflowed
            fed.rename(out / f"{name}-signal-{os.WTERMSIG(status)}-{strftime('%H%M%S')}")
        found |= status != 0
        print(strftime("%H:%M:%S"), name, "found something" if status else "found nothing", flush=True)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
