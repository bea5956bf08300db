"""Documents and videos through the real Cog server, with the tiny model."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.media.films import film, numbered
from tests.media.pdfs import many_pages, numbers


def uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


PDF = uri(numbers(["17", "4", "358", "62"]), "application/pdf")
PAGE_3: dict[str, Any] = {
    "prompt": "What number is in the picture?",
    "documents": [PDF],
    "pages": "3",
    "max_image_tokens": 64,
    "temperature": 0,
}


def test_the_number_on_page_3(server: Any) -> None:
    result = server.predict(**PAGE_3)
    assert result["output"][0]["answer"] == "358"
    assert result["metrics"]["pictures"] == [{"kind": "page", "width": 196, "height": 252, "tokens": 63}]


def test_the_number_in_the_last_frame(server: Any, tmp_path: Path) -> None:
    video = film(tmp_path / "v.webm", [numbered(str(index)) for index in range(40)], codec="libvpx-vp9").read_bytes()
    request = {"video": uri(video, "video/webm"), "temperature": 0.0}
    result = server.predict(prompt="What number is in picture 4?", video_frames=4.0, **request)
    assert result["output"][0]["answer"] == "39"
    result = server.predict(prompt="What number is in picture 2?", video_fps=1, **request)
    assert result["output"][0]["answer"] == "25"
    assert [picture["kind"] for picture in result["metrics"]["pictures"]] == ["frame"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": ["/etc/passwd"]}, "The first document is not one that could be fetched; send an http(s) URL"),
        ({"documents": [PDF, "file:///etc/passwd"]}, "document is not one that could be fetched"),
        ({"documents": [uri(b"root:x:0:0", "application/pdf")]}, "The first document is no PDF, or is damaged"),
        ({"documents": [uri(b"", "application/pdf")]}, "The first document is no PDF, or is damaged"),
        ({"documents": [PDF] * 9}, "The request has 9 documents and the limit is 8; send fewer."),
        ({"documents": [uri(many_pages(2000), "application/pdf")], "pages": ""}, "has 2,000 pages and the limit is"),
        ({"pages": "3-1"}, 'pages must be like "1-5,8"'),
        ({"pages": "9"}, "pages picks page 9 and the last is 4; pick others."),
        ({"video": "/etc/passwd"}, "The video is not one that could be fetched; send an http(s) URL"),
        ({"video": uri(b"#EXTM3U\n/etc/passwd", "video/mp4")}, "The video is of no known type; send an MP4"),
        ({"max_image_tokens": 5}, "max_image_tokens is 5 and must be from 64 to 16384, or 0."),
    ],
)
def test_bad_input_fails_with_one_sentence_and_the_next_request_is_right(
    server: Any, change: dict[str, Any], message: str
) -> None:
    refusal = server.refusal(**PAGE_3 | change)
    assert message in refusal
    assert refusal.count("\n") == 0
    assert "passwd" not in refusal
    assert "root" not in refusal
    assert server.predict(**PAGE_3)["output"][0]["answer"] == "358"


@pytest.mark.parametrize("change", [{"video_frames": 0}, {"video_fps": 101}, {"pages": "1" * 1001}])
def test_what_the_schema_rules_out_is_refused_before_it_runs(server: Any, change: dict[str, Any]) -> None:
    (detail,) = server.predict(**PAGE_3 | change)["detail"]
    assert detail["loc"] == ["body", "input", next(iter(change))]
