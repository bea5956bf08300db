"""How the files of a request are got, wherever they are."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_vl.errors import InvalidRequest
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
def silent_host() -> Iterator[str]:
    """A URL at which nobody says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_private_address_needs_permission() -> None:
    with (
        silent_host() as url,
        pytest.raises(InvalidRequest, match="The first document has a URL whose host has no pub"),
    ):
        read(url)


def test_all_files_have_the_same_deadline() -> None:
    late = Fetching(seconds=60, private=True, started=-1e9)
    with silent_host() as url, pytest.raises(InvalidRequest, match="document was not there within 60 seconds, the lim"):
        read(url, fetching=late)
