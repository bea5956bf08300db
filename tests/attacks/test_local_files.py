"""Whatever a client names, no file of the server is read, and no request goes to where only the server can go."""

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.sentences import must_answer, refusal
from tests.attacks.server import Within
from tests.contract.conftest import Server
from tests.six_turns import NUMBER, user

SECRET = "the server's own secret"
FIELDS = ("images", "documents", "video", "messages")


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that fetches the pictures of messages, too."""
    with Server("tiny", tmp_path_factory.mktemp("fetching") / "log", KIMI_VL_ALLOW_URLS="1") as server:
        yield server


def request(field: str, uri: str) -> dict[str, Any]:
    if field == "messages":
        return {"messages": [user("What is this?", uri)]}
    return {"prompt": "What is this?", field: uri if field == "video" else [uri]}


HOSTS = [
    *("127.0.0.1", "localhost", "LOCALHOST.", "127.1", "2130706433", "017700000001", "0x7f000001", "0x7f.0.0.1", "0"),
    *("0.0.0.0", "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1.", "%31%32%37.0.0.1"),
    *(
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ),
    *(
        "[::1%25lo]",
        "user:pass@127.0.0.1",
        "127.0.0.1#@example.com",
        "example.com@127.0.0.1",
        "127.0.0.1\\@example.com",
    ),
    *("169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "10.0.0.1", "192.168.0.1", "100.100.100.200"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_no_form_of_an_address_within_is_visited(fetching: Server, within: Within, field: str) -> None:
    for host in HOSTS:
        for scheme in ("https",) if field == "messages" else ("http", "https"):
            port = "" if host[-1].isalpha() and "@" in host else f":{within.port}"
            sentence = refusal(fetching.predict(**request(field, f"{scheme}://{host}{port}/p.png")))
            assert "no public address" in sentence or "could not be fetched" in sentence or "plain http" in sentence
    assert within.visits == 0
    must_answer(fetching)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "no.invalid"])
def test_a_host_without_a_public_address_is_said_to_have_none(fetching: Server, within: Within, host: str) -> None:
    sentence = refusal(fetching.predict(**request("messages", f"https://{host}:{within.port}/p.png")))
    assert sentence == "The first picture has a URL whose host has no public address; send it as a data: URI."
    assert within.visits == 0


@pytest.mark.parametrize("field", FIELDS)
def test_no_file_of_the_server_is_read(server: Server, within: Within, tmp_path: Path, field: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    for path in ("/etc/passwd", "/proc/self/environ", str(secret), str(NUMBER), "/dev/zero", "/dev/stdin", ".", "~"):
        for form in (
            "{}",
            "file://{}",
            "file:{}",
            "FILE://localhost{}",
            "file://127.0.0.1{}",
            " {}",
            "\0{}",
            "local:{}",
        ):
            sentence = refusal(server.predict(**request(field, form.format(path))))
            assert SECRET not in sentence and path[1:] not in sentence.split()
    for uri in (
        *(f"{scheme}://127.0.0.1:{within.port}/" for scheme in ("ftp", "gopher", "dict", "ws", "s3", "hf", "jar:http")),
        *(f" http://127.0.0.1:{within.port}/", f"//127.0.0.1:{within.port}/", f"http:127.0.0.1:{within.port}"),
        *(
            f"url:http://127.0.0.1:{within.port}/",
            f"<URL:http://127.0.0.1:{within.port}>",
            f"\thttp://[::1]:{within.port}",
        ),
    ):
        refusal(server.predict(**request(field, uri)))
    assert within.visits == 0
    must_answer(server)


def test_what_a_file_says_is_not_followed(server: Server, within: Within) -> None:
    """Playlists, SVG, PDF links and schemas that name a file or a URL."""
    url, data = f"http://127.0.0.1:{within.port}/", "data:;base64,"
    for text in (
        f"#EXTM3U\n#EXTINF:1,\n{url}\n",
        f"ffconcat version 1.0\nfile {url}\n",
        f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}'/><image href='file:///etc/passwd'/></svg>",
        f"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM '{url}'>]><svg>&b;</svg>",
        f"%!PS\n({url}) (r) file\n",
    ):
        file = data + b64encode(text.encode()).decode()
        for field in FIELDS:
            refusal(server.predict(**request(field, file)))
    for reference in (url, "file:///etc/passwd", f"{url}#/a"):
        for keyword in ("$ref", "$schema", "$id", "$dynamicRef"):
            result = server.predict(prompt="x", json_schema=json.dumps({keyword: reference}), max_new_tokens=1)
            assert result["status"] == "succeeded" or "json_schema cannot be enforced" in result["error"]
    assert within.visits == 0
    must_answer(server)
