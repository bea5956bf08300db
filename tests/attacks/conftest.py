"""One server, attacked by every test here."""

from collections.abc import Iterator

import pytest

from tests.attacks.server import Target
from tests.contract.conftest import Server


@pytest.fixture(scope="package")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    server = Server("tiny", tmp_path_factory.mktemp("attacked") / "log")
    try:
        server.wait()
        target = Target(server)
        target.must_be_right()
        yield target
    finally:
        server.stop()
