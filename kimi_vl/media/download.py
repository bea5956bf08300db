"""URLs → files, from public addresses only."""

import socket
import ssl
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from string import punctuation
from time import monotonic
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from kimi_vl.errors import InvalidRequest

MAX_REDIRECTS = 3
CHUNK = 2**16  # bytes
REDIRECTED = (301, 302, 303, 307, 308)
GLOBAL_UNICAST = IPv6Network("2000::/3")
HEADERS = {"Accept": "*/*", "User-Agent": "kimi-vl"}

Address = IPv4Address | IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is one host's on the internet, and does not stand for another address."""
    if isinstance(address, IPv6Address):
        return address in GLOBAL_UNICAST and address.is_global and address.sixtofour is None
    return address.is_global and not address.is_multicast


def download(
    url: str,
    name: str,
    file: BinaryIO,
    max_bytes: int,
    deadline: float,
    is_public: Callable[[Address], bool] = is_public,
    context: ssl.SSLContext | None = None,
) -> None:
    """Fetches a file. Nothing in the environment has a say: no proxy, no password.

    Args:
        url: whatever a client sent. One that begins with https: is not redirected to http.
        name: what it is to the person who sent it, as a message begins: "The first picture".
        file: is written to.
        max_bytes: no more than one byte beyond these is read.
        deadline: when all of it must be here, by the monotonic clock; only the resolver of names keeps its own time.
        is_public: whether an address may be connected to; asked about the address itself, of every redirect too.
        context: whose certificates are trusted; the system's by default.
    Raises:
        InvalidRequest: it is no http(s) URL, leads to an address that is not public, or does not answer with a file.
        TimeoutError: the deadline has passed.
    """
    context = context or ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    schemes = ("http", "https") if url[:5].lower() == "http:" else ("https",)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            parts = urlsplit(url)
            if parts.scheme not in schemes or not parts.hostname or "@" in parts.netloc:
                kind = " or ".join(schemes)
                raise InvalidRequest(f"{name} leads to a URL that is not a plain {kind} URL; send one, or a data: URI.")
            addresses = _resolve(parts)
            if not addresses or not all(is_public(ip_address(address[0])) for _, address in addresses):
                raise InvalidRequest(f"{name} has a URL whose host has no public address; send it as a data: URI.")
            connection = _Connection(parts, addresses, context, deadline)
            try:
                connection.request("GET", _target(parts), headers=HEADERS)
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status == 200:
                    left = max_bytes + 1
                    while left and (chunk := response.read(min(left, CHUNK))):
                        left -= file.write(chunk)
                    return
            finally:
                connection.close()
            if response.status not in REDIRECTED or not location:
                raise InvalidRequest(
                    f"{name} could not be fetched: its server answered with status {response.status}; check the URL."
                )
            url = urljoin(url, location)
    except (InvalidRequest, TimeoutError):
        raise
    except (OSError, HTTPException, ValueError):  # of connections and TLS, of HTTP, of URLs
        raise InvalidRequest(f"{name} could not be fetched; check the URL, or send it as a data: URI.") from None
    raise InvalidRequest(f"{name} is redirected more than {MAX_REDIRECTS} times; send the URL that it ends at.")


class _PlainSocket(socket.socket):
    """Gives a server until the deadline, however slowly its bytes trickle in."""

    deadline: float

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _TlsSocket(ssl.SSLSocket):
    """The same over TLS."""

    deadline: float

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _Connection(HTTPConnection):
    """Connects to addresses that were checked, by the URL's name for TLS and HTTP."""

    def __init__(
        self, parts: SplitResult, addresses: list[tuple[int, Any]], context: ssl.SSLContext, deadline: float
    ) -> None:
        self.default_port = _port(parts)  # which HTTP's Host header leaves out
        super().__init__(_ascii_host(parts), parts.port)
        self._addresses = addresses
        self._tls = context if parts.scheme == "https" else None
        self._deadline = deadline

    def connect(self) -> None:
        """To the first address that answers."""
        for family, address in self._addresses:
            sock: Any = _PlainSocket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(_left(self._deadline))
                sock.connect(address)
                sock.settimeout(_left(self._deadline))
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            except OSError as error:
                sock.close()
                failure = error
                continue
            sock.deadline = self._deadline
            self.sock = sock
            return
        raise failure


def _left(deadline: float) -> float:
    """Seconds until then."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _resolve(parts: SplitResult) -> list[tuple[int, Any]]:
    """Families and addresses, as sockets take them, of a URL's host; none if there is no such host."""
    try:
        found = socket.getaddrinfo(_ascii_host(parts), parts.port or _port(parts), type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    return [(family, address) for family, _, _, _, address in found]


def _port(parts: SplitResult) -> int:
    """The one that a URL need not name."""
    return 443 if parts.scheme == "https" else 80


def _ascii_host(parts: SplitResult) -> str:
    return (parts.hostname or "").encode("idna").decode()


def _target(parts: SplitResult) -> str:
    """What HTTP asks for: path and query, in ASCII."""
    return quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=punctuation)
