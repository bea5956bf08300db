"""One server, attacked by every test here."""

from collections.abc import Iterator

import pytest

from tests.contract.conftest import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server("tiny", tmp_path_factory.mktemp("attacked") / "log")
    server.wait()
    yield server
    server.stop()
