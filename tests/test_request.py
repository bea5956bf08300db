from base64 import b64encode
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from kimi_vl.errors import InvalidRequest
from kimi_vl.prompt.messages import MAX_URL_CHARACTERS
from kimi_vl.request import MAX_CHARACTERS, MAX_SEED, Request, named_files
from kimi_vl.settings import Settings

GOOD = Request(prompt="What is this?")
SAYS_A = {"role": "assistant", "content": "a" * (MAX_CHARACTERS // 2)}


def shows(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


SHOWS_FIRST = shows("image:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n\t\u3000"}, "prompt is empty; write"),
        ({"prompt": "a" * (MAX_CHARACTERS + 1)}, "prompt has 1,000,001 characters and the limit is 1,000,000"),
        ({"system_prompt": "a" * (MAX_CHARACTERS + 1)}, "system prompt has 1,000,001 characters"),
        ({"images": [Path("p.png")] * 9}, "has 9 pictures and the limit is 8; send fewer"),
        ({"messages": [SAYS_A, SAYS_A]}, "texts have 1,000,040 characters together and the limit is 1,000,000"),
        ({"messages": [SHOWS_FIRST] * 9, "images": [Path("p.png")]}, "has 9 pictures and the limit is 8; send fewer"),
        ({"messages": [SHOWS_FIRST], "images": [Path("p.png")] * 9}, "has 9 pictures and the limit is 8; send fewer"),
        ({"messages": [shows("https://host/p.png")]}, "picture's URL and this server fetches none; send a data: URI"),
        ({"messages": ["hi"]}, "Message 1 is not an object"),
        ({"documents": [Path("d.pdf")] * 9}, "has 9 documents and the limit is 8; send fewer"),
        ({"documents": [Path("d.pdf")], "pages": "5-1"}, 'pages must be like "1-5,8"'),
        ({"pages": "1"}, "pages picks pages of documents and there are none; send a document"),
        ({"video_frames": 0}, "video_frames is 0 and must be from 1 to 256"),
        ({"video_frames": 257}, "video_frames is 257"),
        ({"video_fps": -1}, "video_fps is -1 and must be from 0 to 100"),
        ({"video_fps": float("nan")}, "video_fps is nan"),
        ({"max_image_tokens": 63}, r"max_image_tokens is 63 and must be from 64 to 16384, or 0\."),
        ({"max_image_tokens": 16385}, "max_image_tokens is 16385"),
        ({"temperature": 2.1}, r"temperature is 2.1 and must be from 0 to 2, or -1\."),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 1.1}, "top_p is 1.1 and must be from 0 to 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0 and must be from 1 to 32768"),
        ({"max_new_tokens": 32769}, "max_new_tokens is 32769"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": MAX_SEED + 1}, "seed is"),
        ({"top_k": -1}, "top_k is -1 and must be from 0 to 163840"),
        ({"top_k": 163841}, "top_k is 163841"),
        ({"min_p": 1.01}, "min_p is 1.01 and must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0 and must be from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": -2.1}, "presence_penalty is -2.1 and must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"thinking_budget": -2}, "thinking_budget is -2 and must be from -1 to 32768"),
        ({"thinking_budget": 32769}, "thinking_budget is 32769"),
        ({"stop": ["a"] * 9}, "has 9 stop strings and the limit is 8; send fewer"),
        ({"stop": ["a", ""]}, "second stop string has 0 characters and must have from 1 to 100"),
        ({"stop": ["a" * 101]}, "first stop string has 101 characters"),
    ],
)
def test_limits(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        replace(GOOD, **change).check(Settings())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"images": [Path("p.png")] * 8},
        {"temperature": 0.0, "top_p": 0.0, "max_new_tokens": 32768, "seed": MAX_SEED},
        {"temperature": 2.0, "seed": 0, "system_prompt": ""},
        {"top_k": 163840, "min_p": 1.0, "repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"thinking_budget": 0, "stop": ["a" * 100] * 8},
        {"messages": [SAYS_A, SHOWS_FIRST], "images": [Path("p.png")]},
        {"messages": [SHOWS_FIRST] * 8, "images": [Path("p.png")], "prompt": ""},
        {"documents": [Path("d.pdf")] * 8, "pages": "2-", "video": Path("v.mp4"), "video_frames": 256},
        {"video": Path("v.mp4"), "video_fps": 100.0, "max_image_tokens": 64},
    ],
)
def test_what_is_within_the_limits_passes(change: dict[str, Any]) -> None:
    replace(GOOD, **change).check(Settings())


def test_the_number_of_pictures_is_a_setting() -> None:
    with pytest.raises(InvalidRequest, match="limit is 1"):
        replace(GOOD, images=[Path("a"), Path("b")]).check(Settings(max_images=1))


def test_urls_pass_where_they_are_allowed() -> None:
    replace(GOOD, messages=[shows("https://host/p.png")]).check(Settings(allow_urls=True))


def test_pictures_come_from_where_the_messages_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(red: int) -> bytes:
        file = BytesIO()
        Image.new("RGB", (28, 28), (red, 0, 0)).save(file, "PNG")
        return file.getvalue()

    asked = []

    def downloaded(url: str, name: str, file: BinaryIO, max_bytes: int, *_: object) -> None:
        asked.append((url, name, max_bytes))
        file.write(picture(3))

    monkeypatch.setattr("kimi_vl.media.sources.download", downloaded)
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    for red, file in enumerate(files, start=1):
        file.write_bytes(picture(red))
    urls = ["image:2", "https://host/p.png", "data:;base64," + b64encode(picture(4)).decode(), "image:2"]
    request = replace(GOOD, messages=[shows(url) for url in urls], images=files)
    with closing(request.pictures(Settings(allow_urls=True, max_image_bytes=1000))) as pictures:
        reds = [picture.getpixel((0, 0)) for picture in pictures.read(1000)]
    assert reds == [(red, 0, 0) for red in (2, 3, 4, 2, 1)]
    assert asked == [("https://host/p.png", "The second picture", 1000)]


def test_a_picture_in_a_data_uri_is_held_to_the_limits() -> None:
    uri = "data:image/png;base64," + b64encode(bytes(2000)).decode()
    with pytest.raises(InvalidRequest, match=r"The first picture is larger than 0.001 MB, the limit"):
        replace(GOOD, messages=[shows(uri)]).pictures(Settings(max_image_bytes=1000))


@pytest.mark.parametrize("named", ["http://host/p.png", "HTTPS://host/p.png", "data:image/png;base64,", "Data:,"])
def test_urls_are_what_a_client_may_name(named: str) -> None:
    assert named_files([named]) == [named]


@pytest.mark.parametrize(
    "named",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://host/p.png",
        " http://host/p.png",
        "http:host",
        "httpx://host/",
        b"data:,",
        Path("/etc/passwd"),
        Path("http://host/"),
        None,
        3,
        "",
    ],
)
def test_nothing_that_a_client_merely_named_is_opened(named: object) -> None:
    with pytest.raises(InvalidRequest, match="first picture is not one that could be fetched") as refusal:
        named_files([named])
    assert "passwd" not in str(refusal.value)
    with pytest.raises(InvalidRequest, match="first document is not one that could be fetched"):
        named_files([named], "document")


def test_a_url_has_a_limit() -> None:
    url = "http://host/" + "a" * MAX_URL_CHARACTERS
    with pytest.raises(
        InvalidRequest, match=r"The second document has a URL of 8,012 characters and the limit is 8,000"
    ):
        named_files(["http://host/", url], "document")
    assert named_files(["data:" + url]), "a data: URI is a file"


def test_the_urls_of_files_need_no_permission_and_those_of_messages_do() -> None:
    url = "https://host/p.png"
    replace(GOOD, images=[url]).check(Settings())
    with pytest.raises(InvalidRequest, match="this server fetches none"):
        replace(GOOD, images=[url], messages=[shows(url + "x")]).check(Settings())
