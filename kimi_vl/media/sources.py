"""Where the files of a request are, and how they are got."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic
from typing import BinaryIO

from kimi_vl.errors import DeadlinePassed, InvalidRequest
from kimi_vl.media.data_uri import read_data_uri
from kimi_vl.media.download import download, is_public
from kimi_vl.media.files import open_file, too_large

Source = Path | str  # a file of this machine, which no client can name; else a data: URI with base64, or a URL


@dataclass
class Fetching:
    """What holds for the files of a request that are fetched from URLs."""

    seconds: int  # for all of them, from now on
    private: bool  # addresses are allowed, too
    deadline: float = math.inf  # of the request, by the monotonic clock
    started: float = field(default_factory=monotonic)
    abandoned: bool = False  # nobody wants them any more; any thread may say so

    @property
    def over(self) -> bool:
        """The request is, and nobody hears what becomes of its files."""
        return self.abandoned or monotonic() >= self.deadline

    def seconds_left(self) -> float:
        """In which the files must be here.

        Raises:
            TimeoutError: there are none, or the request is over.
        """
        left = self.started + self.seconds - monotonic()
        if left <= 0 or self.over:
            raise TimeoutError
        return left


def is_url(source: Source) -> bool:
    """Whether it must be fetched from another machine."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch(uri: str, name: str, file: BinaryIO, max_bytes: int, fetching: Fetching) -> None:
    """Writes what a data: URI or a URL stands for; of a larger file than allowed the beginning, with some bytes more.

    Args:
        uri: whatever a client sent.
        name: what it is to the person who sent it, as a message begins: "The first picture".
        file: is written to.
        max_bytes: largest size.
        fetching: how.
    Raises:
        InvalidRequest: it cannot be had.
        DeadlinePassed: the request was over before.
    """
    if not is_url(uri):
        file.write(read_data_uri(uri, name, max_bytes))
        return
    allowed = (lambda address: True) if fetching.private else is_public
    try:
        download(uri, name, file, max_bytes, fetching.seconds_left, allowed)
    except TimeoutError:
        if fetching.over:
            raise DeadlinePassed from None
        raise InvalidRequest(
            f"{name} was not there within {fetching.seconds} seconds, the limit for what is fetched; send it as a "
            "data: URI."
        ) from None


def open_source(
    source: Source,
    name: str,
    kind: str,
    max_bytes: int,
    fetching: Fetching,
    new_file: Callable[[], BinaryIO] = TemporaryFile,
) -> BinaryIO:
    """Opens a file for reading, once it is here; what was fetched is gone when it is closed.

    Args:
        source: where it is.
        name: what it is to the person who sent it, as a message begins: "The first document".
        kind: what should be sent: "PDF".
        max_bytes: largest size.
        fetching: how, from elsewhere.
        new_file: makes the file for what is not one of this machine.
    Raises:
        InvalidRequest: it cannot be had, or is too large.
        DeadlinePassed: the request was over before it was here.
    """
    if isinstance(source, Path):
        return open_file(source, name, kind, max_bytes)
    file = new_file()
    try:
        fetch(source, name, file, max_bytes, fetching)
        if file.tell() > max_bytes:
            raise InvalidRequest(too_large(name, max_bytes))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
