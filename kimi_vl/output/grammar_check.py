"""Whether a grammar takes little to compile, tried in a process of its own: the compiler cannot be interrupted."""

import os
import resource
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from signal import SIGABRT, SIGBUS, SIGILL, SIGSEGV, SIGXCPU
from threading import Thread, stack_size

from llguidance import LLMatcher, LLTokenizer

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3  # of CPU time; a hundred large objects take less than one
MEMORY = 1 << 30  # bytes of address space
STACK = 1 << 20  # bytes; the service's own threads have more
ITS_OWN = (SIGXCPU, SIGABRT, SIGSEGV, SIGBUS, SIGILL)  # time used up, no more memory, crashes; SIGKILL is another's


@lru_cache(maxsize=64)
def is_affordable(grammar: str) -> bool:
    """Whether a grammar is compiled, or found to be none, within the limits, and without a crash.

    Raises:
        RuntimeError: the process failed, or was killed, for another reason; this is not kept.
        TimeoutExpired: neither is this, that the machine has too much other work.
    """
    process = subprocess.run(
        [sys.executable, "-sP", "-m", __name__],
        input=grammar.encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},
        timeout=10 * SECONDS,
    )
    if process.returncode and -process.returncode not in ITS_OWN:
        raise RuntimeError(f"{__name__} ended with status {process.returncode}")
    return process.returncode == 0


def main() -> None:
    """Such a process; one that reaches a limit is ended by a signal."""
    grammar = sys.stdin.buffer.read().decode()
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))  # the hard limit's signal would be SIGKILL
    stack_size(STACK)
    # A matcher, not validate_grammar: some schemas are valid at once and then take minutes to match with.
    thread = Thread(target=LLMatcher, args=(LLTokenizer("byte"), grammar))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
