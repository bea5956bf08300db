"""Documents and videos all the way to the answer, with the tiny model on the CPU."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import ConfinedReader
from kimi_vl.model.variants import UNNAMED, WEIGHTS
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Answer, Service
from kimi_vl.settings import Settings
from tests.cancels import cancel_while_reading
from tests.media.films import film, numbered
from tests.media.pdfs import many_pages, numbers


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service.load(Settings(model="tiny", max_media_seconds=5))
    yield service
    service.close()


@pytest.fixture
def pdf(tmp_path: Path) -> Path:
    (tmp_path / "numbers.pdf").write_bytes(numbers(["17", "4", "358", "62"]))
    return tmp_path / "numbers.pdf"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return film(tmp_path / "numbers.mp4", [numbered(str(index)) for index in range(40)])


def text(answer: Answer) -> str:
    return "".join(delta.answer for delta in answer)


def used(answer: Answer, *names: str) -> list[tuple[str | int, ...]]:
    return [tuple(picture[name] for name in names) for picture in answer.usage.pictures]


@pytest.mark.parametrize(
    ("question", "pages"), [("What number is in picture 3?", ""), ("What number is in the picture?", "3")]
)
def test_the_number_on_page_3(service: Service, pdf: Path, question: str, pages: str) -> None:
    request = Request(question, documents=[pdf], pages=pages, max_image_tokens=64)
    answer = service.answer(request)
    assert text(answer) == "358"
    assert used(answer, "kind", "width", "height", "tokens") == [("page", 196, 252, 63)] * (1 if pages else 4)


def test_the_number_in_the_last_frame(service: Service, video: Path) -> None:
    answer = service.answer(Request("What number is in picture 4?", video=video, video_frames=4))
    assert text(answer) == "39"
    assert used(answer, "kind", "width", "height", "tokens") == [("frame", 168, 140, 30)] * 4


def test_images_come_first_then_documents_then_the_video(
    service: Service, pdf: Path, video: Path, tmp_path: Path
) -> None:
    numbered("81").save(tmp_path / "81.png")
    given: dict[str, Any] = {"images": [tmp_path / "81.png"], "documents": [pdf], "pages": "1,2", "video": video}
    for place, number in ((1, "81"), (2, "17"), (5, "39")):
        question = f"What number is in picture {place}?"
        answer = service.answer(Request(question, **given, video_frames=2, max_image_tokens=64))
        assert text(answer) == number
        assert used(answer, "kind") == [("image",), ("page",), ("page",), ("frame",), ("frame",)]


class Silent(Engine):
    """Keeps what it is asked and answers nothing."""

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        generation.emit(min(generation.params.stop_ids))


@pytest.fixture
def silent() -> Iterator[Callable[[int], Service]]:
    """Makes services with contexts of their own."""
    services = []

    def make(context: int) -> Service:
        processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
        services.append(Service(Settings(), UNNAMED, processor, Silent(context)))
        return services[-1]

    yield make
    for service in services:
        service.close()


def test_the_pages_share_the_engines_context_evenly(silent: Callable[[int], Service], tmp_path: Path) -> None:
    (tmp_path / "d.pdf").write_bytes(many_pages(30))
    request = Request("What?", documents=[tmp_path / "d.pdf"], max_new_tokens=500)
    for context, least, most in ((131_072, 960, 1024), (8192, 200, 256), (4096, 64, 128)):
        answer = silent(context).answer(request)
        (tokens,) = {picture["tokens"] for picture in answer.usage.pictures}
        assert least <= int(tokens) <= most
        assert answer.usage.input_tokens + 500 <= context
        assert answer.usage.input_tokens - answer.usage.image_tokens < 30 * 30
    with pytest.raises(InvalidRequest, match=r"has 30 pages, and even with 64 tokens each only \d+ fit"):
        silent(2048).answer(request)


def test_all_files_of_a_request_have_the_same_time_to_come(
    silent: Callable[[int], Service], pdf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered("81").save(tmp_path / "81.png")
    fetchings = []

    def downloaded(url: str, name: str, file: BinaryIO, max_bytes: int, left: Any, *_: object) -> None:
        fetchings.append(left.__self__)
        file.write((tmp_path / url.removeprefix("https://host/")).read_bytes())

    monkeypatch.setattr("kimi_vl.media.sources.download", downloaded)
    request = Request("What?", images=["https://host/81.png"] * 2, documents=[f"https://host/{pdf.name}"])
    silent(8192).answer(request)
    assert len(fetchings) == 3
    assert all(fetching is fetchings[0] for fetching in fetchings)


BAD_PDF, BAD_VIDEO = "The first document is no PDF, or is damaged; send it again.", "The video is of no known type"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("documents", b"nonsense", BAD_PDF),
        ("documents", b"", BAD_PDF),
        ("documents", None, "The first document cannot be read; check that the file exists."),
        ("documents", many_pages(2000), "The request has 2,000 pages and the limit is 1,000; pick some with pages."),
        ("documents", many_pages(200), "The request has 200 pages, and even with 64 tokens each only"),
        ("video", b"nonsense", BAD_VIDEO),
        ("video", None, "The video cannot be read; check that the file exists."),
    ],
)
def test_a_bad_file_harms_no_other_request(
    service: Service, pdf: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    bad = tmp_path / "secret-name"
    if content is not None:
        bad.write_bytes(content)
    given: dict[str, Any] = {name: bad if name == "video" else [bad]}
    with pytest.raises(InvalidRequest) as refusal:
        service.answer(Request("What number is in the picture?", **given))
    assert str(refusal.value).startswith(message)
    assert "secret-name" not in str(refusal.value)
    right = Request("What number is in the picture?", documents=[pdf], pages="3", max_image_tokens=64)
    assert text(service.answer(right)) == "358"


@pytest.mark.parametrize("step", ["ask", "picture"])
def test_a_cancel_while_a_document_is_read_ends_its_process(
    service: Service, pdf: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    readers: list[ConfinedReader] = []
    reading, release = threading.Event(), threading.Event()

    def endless(reader: ConfinedReader, *_: object) -> Image.Image:
        readers.append(reader)
        reading.set()
        release.wait(30)
        return Image.new("RGB", (28, 28))

    with monkeypatch.context() as patch:
        patch.setattr(ConfinedReader, step, endless)
        cancel_while_reading(
            lambda: service.answer(Request("What number is in the picture?", documents=[pdf])), reading
        )
        release.set()
    assert readers[0]._process is not None
    assert not readers[0]._process.alive
    right = Request("What number is in the picture?", documents=[pdf], pages="3", max_image_tokens=64)
    assert text(service.answer(right)) == "358"


def test_reading_starts_no_thread(service: Service, pdf: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} was started"))
        request = Request("What?", documents=[pdf], video=video, max_image_tokens=64, max_new_tokens=2)
        list(service.answer(request))
