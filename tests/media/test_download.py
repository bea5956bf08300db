"""Downloads from servers on this machine, with a certificate made here."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_address
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest
import trustme

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.download import Address, download, is_public
from kimi_vl.media.sources import Fetching

AUTHORITY = trustme.CA()
PICTURE = b"a picture"
ADDRESS = "2606:4700:4700::1111"


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []  # paths and headers

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        page, _, argument = self.path[1:].partition("/")
        with suppress(OSError):
            getattr(self, page, self.picture)(argument)

    def picture(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PICTURE)

    def chunked(self, _: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"2\r\na \r\n7\r\npicture\r\n0\r\n\r\n")

    def short(self, length: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(PICTURE)

    def short_chunked(self, _: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"2\r\na \r\n")

    def endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(10_000))

    def drip(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        self._drip()

    def drip_headers(self, _: str) -> None:
        self._drip()

    def _drip(self) -> None:
        while True:
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def status(self, code: str) -> None:
        self.send_response(int(code))
        self.end_headers()

    def to(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.end_headers()

    def to_letters(self, name: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"/picture/{unquote(name)} 1".encode().decode("latin-1"))  # sent as UTF-8
        self.end_headers()

    def rounds(self, count: str) -> None:
        self.to(f"/rounds/{int(count) - 1}" if int(count) else "/picture")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1", ADDRESS, "pictures.example", "xn--bcher-kva.example").configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def plain_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(autouse=True)
def asked() -> list[tuple[str, dict[str, str]]]:
    Handler.asked.clear()
    return Handler.asked


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses of the hosts that a test knows."""
    known: dict[str, list[str]] = {}
    resolve = socket.getaddrinfo

    def resolved(host: str, port: int, **options: Any) -> list[Any]:
        if host not in known:
            raise socket.gaierror
        return [entry for address in known[host] for entry in resolve(address, port, **options)]

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    return known


def fetch(
    url: str, max_bytes: int = 1000, public: Callable[[Address], bool] = lambda address: True, seconds: float = 10
) -> bytes:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    file = BytesIO()
    download(url, "The first picture", file, max_bytes, Fetching(seconds, private=True).seconds_left, public, context)
    return file.getvalue()


@pytest.mark.parametrize("path", ["/picture", "", "/chunked", f"/short/{len(PICTURE)}", "/rounds/2", "/rounds/0#there"])
def test_gives_the_file(port: int, path: str) -> None:
    assert fetch(f"https://127.0.0.1:{port}{path}") == PICTURE


def test_http_is_enough_for_a_url_that_begins_with_it(port: int, plain_port: int, asked: list[Any]) -> None:
    assert fetch(f"http://127.0.0.1:{plain_port}/chunked") == PICTURE
    assert fetch(f"HTTP://127.0.0.1:{plain_port}/to/https://127.0.0.1:{port}/picture") == PICTURE
    assert asked[0][1]["Host"] == f"127.0.0.1:{plain_port}"


def test_asks_for_the_name_and_tells_nothing_else(
    port: int, names: dict[str, list[str]], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    names["pictures.example"] = ["127.0.0.1"]
    assert fetch(f"https://Pictures.example:{port}/é a\n/%20?q=ü#x") == PICTURE
    ((path, headers),) = asked
    assert path == "/%C3%A9%20a/%20?q=%C3%BC"
    assert headers.pop("Host") == f"pictures.example:{port}"
    assert headers == {"Accept": "*/*", "User-Agent": "kimi-vl", "Accept-Encoding": "identity"}


def test_a_redirect_may_have_letters_of_any_script(port: int, asked: list[Any]) -> None:
    assert fetch(f"https://127.0.0.1:{port}/to_letters/é日") == PICTURE
    assert asked[1][0] == "/picture/%C3%A9%E6%97%A5%201"


def test_names_of_other_scripts(port: int, names: dict[str, list[str]]) -> None:
    names["xn--bcher-kva.example"] = ["127.0.0.1"]
    assert fetch(f"https://bücher.example:{port}/") == PICTURE


def test_an_address_of_ipv6_needs_no_port(
    port: int, names: dict[str, list[str]], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.media.download._port", lambda parts: port)
    names[ADDRESS] = ["127.0.0.1"]
    assert fetch(f"https://[{ADDRESS}]/") == PICTURE
    assert asked[0][1]["Host"] == f"[{ADDRESS}]"


def test_the_next_address_is_tried_when_one_does_not_answer(port: int, names: dict[str, list[str]]) -> None:
    names["pictures.example"] = ["127.0.0.2", "127.0.0.1"]
    assert fetch(f"https://pictures.example:{port}/") == PICTURE


def test_a_file_too_large_is_read_no_further(port: int) -> None:
    assert len(fetch(f"https://127.0.0.1:{port}/endless", max_bytes=50_000)) == 50_001


def test_a_full_disk_is_no_fault_of_the_url(plain_port: int) -> None:
    left = Fetching(10, private=True).seconds_left
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(RuntimeError, match="cannot be kept"):
        download(f"http://127.0.0.1:{plain_port}/", "The video", full, 1000, left, lambda address: True)


@pytest.mark.parametrize("page", ["drip", "drip_headers"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_trickles_has_no_more_time_than_another(
    port: int, plain_port: int, scheme: str, page: str
) -> None:
    with pytest.raises(TimeoutError):
        fetch(f"{scheme}://127.0.0.1:{port if scheme == 'https' else plain_port}/{page}", 10_000, seconds=0.5)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_says_nothing_has_no_more_time_either(scheme: str) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # it never begins with TLS
    with silent, pytest.raises(TimeoutError):
        fetch(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.5)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/rounds/3", "is redirected more than 3 times"),
        ("/to/http://127.0.0.1/", "leads to a URL that is not a plain https URL"),
        ("/to/file:///etc/passwd", "leads to a URL that is not a plain https URL"),
        ("/to/https://me:secret@127.0.0.1/", "leads to a URL that is not a plain https URL"),
        ("/to/https://[", "could not be fetched"),
        ("/short/10", "could not be fetched"),
        ("/short/1000000", "could not be fetched"),
        ("/short_chunked", "could not be fetched"),
        ("/status/404", "its server answered with status 404"),
        ("/status/204", "its server answered with status 204"),
        ("/status/302", "its server answered with status 302"),
    ],
)
def test_answers_that_are_no_file(port: int, path: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match="The first picture") as refusal:
        fetch(f"https://127.0.0.1:{port}{path}")
    assert sentence in str(refusal.value)
    assert "127.0.0.1" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a/",
        "http://",
        "http://127.0.0.1:1/",
        "https://",
        "https://[::1",
        "https://a:99999/",
        "https://" + "a" * 64,
        "https://a b/",
        "https://127.0.0.1:1/",
    ],
)
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(InvalidRequest, match="The first picture"):
        fetch(url)


def test_the_certificate_must_be_the_hosts(port: int, names: dict[str, list[str]]) -> None:
    names["other.example"] = ["127.0.0.1"]
    with pytest.raises(InvalidRequest, match="could not be fetched"):
        fetch(f"https://other.example:{port}/")


def test_the_certificate_must_be_of_an_authority_that_is_trusted(port: int) -> None:
    with pytest.raises(InvalidRequest, match="could not be fetched"):  # the system does not know the one of this file
        download(
            f"https://127.0.0.1:{port}/",
            "The first picture",
            BytesIO(),
            1000,
            Fetching(10, private=True).seconds_left,
            lambda address: True,
        )


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f.1", "127.1", "0", "①②⑦.⓪.⓪.①", "localhost", "10.0.0.1", "169.254.169.254"),
        *("[::]", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[fe80::1]", "[fd00:ec2::254]"),
    ],
)
def test_no_form_of_an_address_within_is_connected_to(port: int, scheme: str, host: str, asked: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="whose host has no public address"):
        fetch(f"{scheme}://{host}:{port}/", public=is_public)
    assert not asked


def test_the_address_of_a_redirect_is_checked_too(port: int, names: dict[str, list[str]], asked: list[Any]) -> None:
    names["pictures.example"], names["inside.example"] = ["127.0.0.1"], ["127.0.0.2"]
    with pytest.raises(InvalidRequest, match="whose host has no public address"):
        fetch(
            f"https://pictures.example:{port}/to/https://inside.example:{port}/",
            public=lambda address: address == ip_address("127.0.0.1"),
        )
    assert len(asked) == 1


def test_one_address_within_is_enough_to_refuse_a_name(names: dict[str, list[str]]) -> None:
    names["mixed.example"] = ["93.184.215.14", "10.0.0.1"]
    with pytest.raises(InvalidRequest, match="whose host has no public address"):
        fetch("https://mixed.example/", public=is_public)


def test_a_name_is_resolved_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second answer of its server could be another address than the one that was checked."""
    resolve, count = socket.getaddrinfo, 0

    def resolved(host: str, *rest: Any, **options: Any) -> list[Any]:
        nonlocal count
        count += 1
        return resolve("127.0.0.1", *rest, **options)

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    assert fetch(f"https://pictures.example:{port}/") == PICTURE
    assert count == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("2001:db8::1", False),
        ("fe80::1%1", False),
        ("fec0::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public
