"""What scripts/serve says before there is a server; tests/contract is served by it."""

import socket
import subprocess
from pathlib import Path

import pytest

SERVE = Path(__file__).resolve().parents[2] / "scripts" / "serve"


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("127.0.0.1", "error: cannot listen on 127.0.0.1, port {}: Address already in use; name another"),
        ("192.0.2.1", "error: cannot listen on 192.0.2.1, port {}: Cannot assign requested address; name another"),
        ("localhost", "error: --host must be an IP address"),
        ("[::1]x", "error: --host must be an IP address"),
    ],
)
def test_where_it_cannot_listen_it_says_why(host: str, error: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [SERVE, "--model", "tiny", "--host", host, "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith(error.format(port))
    assert result.stderr.count("\n") == 1
