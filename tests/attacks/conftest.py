"""One server, attacked by every test here."""

from collections.abc import Iterator

import pytest

from tests.attacks.server import Target, Within
from tests.contract.conftest import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("tiny", tmp_path_factory.mktemp("attacked") / "log") as server:
        yield server


@pytest.fixture(scope="package")
def target(server: Server) -> Target:
    target = Target(server)
    target.must_be_right()
    return target


@pytest.fixture(scope="package")
def within() -> Within:
    return Within()
