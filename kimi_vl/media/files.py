"""Opening what a client sent, whatever that is."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from kimi_vl.errors import InvalidRequest


def open_file(path: Path, name: str, kind: str, max_bytes: int) -> BinaryIO:
    """Opens a regular file for reading.

    Args:
        path: of the file; it is never told.
        name: what it is to the person who sent it, as a message begins: "The first picture".
        kind: what should be sent: "picture".
        max_bytes: largest size.
    Raises:
        InvalidRequest: nothing can be read there, or something other than a file, or too large a one.
    """
    try:
        # Not blocking, so that a pipe with nobody at its other end cannot hold the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):
        raise InvalidRequest(f"{name} cannot be read; check that the file exists.") from None
    about = os.fstat(descriptor)
    refusal = ""
    if not stat.S_ISREG(about.st_mode):
        refusal = f"{name} is not a regular file; send a {kind} file."
    elif about.st_size > max_bytes:
        refusal = too_large(name, max_bytes)
    if refusal:
        os.close(descriptor)
        raise InvalidRequest(refusal)
    return open(descriptor, "rb")


def memory_file() -> BinaryIO:
    """An empty file without a place on a disk."""
    return os.fdopen(os.memfd_create("kimi_vl"), "w+b")


def too_large(name: str, max_bytes: int) -> str:
    """What is wrong with a larger file."""
    return f"{name} is larger than {max_bytes / 1e6:g} MB, the limit; send a smaller file."
