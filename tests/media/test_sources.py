"""How the files of a request are got, wherever they are."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer

import pytest

from kimi_vl.errors import DeadlinePassed, InvalidRequest
from kimi_vl.media.sources import Fetching, Source, open_source

OWN = Fetching(seconds=1, private=False)


def read(source: Source, max_bytes: int = 5, fetching: Fetching = OWN) -> bytes:
    with open_source(source, "The first document", "PDF", max_bytes, fetching) as file:
        assert file.fileno() > 0, "another process can read it"
        return file.read()


def test_a_file_of_this_machine_and_one_in_a_data_uri(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    assert read(tmp_path / "a") == b"hello"
    assert read("data:;base64,aGVsbG8=") == b"hello"


@pytest.mark.parametrize("uri", ["data:;base64,aGVsbG8h", "data:;base64," + "aGVs" * 1000])
def test_a_larger_one_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="The first document is larger than 5e-06 MB, the limit; send a smaller"):
        read(uri)


@contextmanager
def silent_host(scheme: str = "http", connects: bool = True) -> Iterator[str]:
    """A URL at which nobody says anything, or to which there is no connection either."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(0 if connects else 3):  # more than it keeps waiting
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_private_address_needs_permission() -> None:
    with (
        silent_host() as url,
        pytest.raises(InvalidRequest, match="The first document has a URL whose host has no pub"),
    ):
        read(url, fetching=Fetching(seconds=1, private=False))


def test_all_files_have_the_same_deadline() -> None:
    late = Fetching(seconds=60, private=True, started=-1e9)
    with silent_host() as url, pytest.raises(InvalidRequest, match="document was not there within 60 seconds, the lim"):
        read(url, fetching=late)


@pytest.mark.parametrize(("scheme", "connects"), [("http", True), ("https", True), ("http", False)])
def test_what_nobody_wants_any_more_is_given_up_at_once(scheme: str, connects: bool) -> None:
    fetching = Fetching(seconds=20, private=True)
    abandoning = Timer(0.3, lambda: setattr(fetching, "abandoned", True))
    abandoning.start()
    started = time.monotonic()
    with silent_host(scheme, connects) as url, pytest.raises(DeadlinePassed):
        read(url, fetching=fetching)
    abandoning.join()
    assert time.monotonic() - started < 5


def test_no_file_comes_after_the_deadline_of_its_request() -> None:
    fetching = Fetching(seconds=20, private=True, deadline=time.monotonic() + 0.3)
    with silent_host() as url, pytest.raises(DeadlinePassed):
        read(url, fetching=fetching)
    assert time.monotonic() - fetching.started < 5
