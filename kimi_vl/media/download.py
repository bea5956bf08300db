"""URLs → files, from public addresses only."""

import os
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from errno import EINPROGRESS
from http.client import HTTPConnection, HTTPException, IncompleteRead
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from string import punctuation
from typing import Any, BinaryIO, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from kimi_vl.errors import InvalidRequest
from kimi_vl.threads import POLL_SECONDS

MAX_REDIRECTS = 3
CHUNK = 2**16  # bytes
REDIRECTED = (301, 302, 303, 307, 308)
GLOBAL_UNICAST = IPv6Network("2000::/3")
HEADERS = {"Accept": "*/*", "User-Agent": "kimi-vl"}

Address = IPv4Address | IPv6Address
T = TypeVar("T")


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
    seconds_left: Callable[[], float],
    is_public: Callable[[Address], bool] = is_public,
    context: ssl.SSLContext | None = None,
) -> None:
    """Fetches a file. Nothing in the environment has a say: no proxy, no password.

    Args:
        url: whatever a client sent. One that begins with https: is not redirected to http.
        name: what it is to the person who sent it, as a message begins: "The first picture".
        file: is written to.
        max_bytes: no more than one byte beyond these is read.
        seconds_left: in which all of it must be here; asked every POLL_SECONDS, and raises TimeoutError when there are
            none. Only the resolver of names keeps its own time.
        is_public: whether an address may be connected to; asked about the address itself, of every redirect too.
        context: whose certificates are trusted; the system's by default.
    Raises:
        InvalidRequest: it is no http(s) URL, leads to an address that is not public, or does not answer with a file.
        TimeoutError: no time is left.
        RuntimeError: the file cannot be written, as on a full disk.
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
            seconds_left()  # else the resolver would be asked in vain
            addresses = _resolve(parts)
            if not addresses or not all(is_public(ip_address(address[0])) for _, address in addresses):
                raise InvalidRequest(f"{name} has a URL whose host has no public address; send it as a data: URI.")
            connection = _Connection(parts, addresses, context, seconds_left)
            try:
                connection.request("GET", _target(parts), headers=HEADERS)
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status == 200:
                    left = max_bytes + 1
                    while left and (chunk := response.read(min(left, CHUNK))):
                        left -= _keep(file, chunk)
                    if left and response.length:  # bytes that were promised, whose absence read() does not mind
                        raise IncompleteRead(b"", response.length)
                    return
            finally:
                connection.close()
            if response.status not in REDIRECTED or not location:
                raise InvalidRequest(
                    f"{name} could not be fetched: its server answered with status {response.status}; check the URL."
                )
            # The bytes as they came, UTF-8 mostly, which http.client takes for Latin-1.
            url = urljoin(url, quote(location, safe=punctuation, encoding="latin-1"))
    except (InvalidRequest, TimeoutError):
        raise
    except (OSError, HTTPException, ValueError):  # of connections and TLS, of HTTP, of URLs
        raise InvalidRequest(f"{name} could not be fetched; check the URL, or send it as a data: URI.") from None
    raise InvalidRequest(f"{name} is redirected more than {MAX_REDIRECTS} times; send the URL that it ends at.")


def _keep(file: BinaryIO, chunk: bytes) -> int:
    try:
        return file.write(chunk)
    except OSError as error:  # ours, which else would look like one of the connection
        raise RuntimeError("what was fetched cannot be kept") from error


class _PlainSocket(socket.socket):
    """Gives a server the time that is left, however slowly its bytes trickle in."""

    seconds_left: Callable[[], float]

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return _in_steps(self, self.seconds_left, super().recv_into, buffer, nbytes, flags)


class _TlsSocket(ssl.SSLSocket):
    """The same over TLS."""

    seconds_left: Callable[[], float]

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        return _in_steps(self, self.seconds_left, super().recv_into, buffer, nbytes, flags)


class _Connection(HTTPConnection):
    """Connects to addresses that were checked, by the URL's name for TLS and HTTP."""

    def __init__(
        self,
        parts: SplitResult,
        addresses: list[tuple[int, Any]],
        context: ssl.SSLContext,
        seconds_left: Callable[[], float],
    ) -> None:
        self.default_port = _port(parts)  # which HTTP's Host header leaves out
        # With a port, for without one the last group of an IPv6 address would be taken for it.
        super().__init__(_ascii_host(parts), parts.port or self.default_port)
        self._addresses = addresses
        self._tls = context if parts.scheme == "https" else None
        self._seconds_left = seconds_left

    def connect(self) -> None:
        """To the first address that answers."""
        for family, address in self._addresses:
            sock: Any = _PlainSocket(family, socket.SOCK_STREAM)
            try:
                _connect(sock, address, self._seconds_left)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
                    _in_steps(sock, self._seconds_left, sock.do_handshake)
                sock.settimeout(self._seconds_left())  # to send what the kernel takes at once
            except OSError as error:
                sock.close()
                failure = error
                continue
            sock.seconds_left = self._seconds_left
            self.sock = sock
            return
        raise failure


def _connect(sock: socket.socket, address: Any, seconds_left: Callable[[], float]) -> None:
    """Connects, and gives up as soon as no time is left."""
    sock.setblocking(False)
    error = sock.connect_ex(address)
    if error == EINPROGRESS:
        done = select.poll()
        done.register(sock, select.POLLOUT)
        while not done.poll(1000 * min(POLL_SECONDS, seconds_left())):
            pass
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def _in_steps(sock: socket.socket, seconds_left: Callable[[], float], call: Callable[..., T], *arguments: Any) -> T:
    """What a call that waits for a socket returns; it is tried again until no time is left."""
    while True:
        sock.settimeout(min(POLL_SECONDS, seconds_left()))
        with suppress(TimeoutError):
            return call(*arguments)


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
