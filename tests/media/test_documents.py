"""Untrusted PDFs: what their pages look like, and what is refused."""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.documents import MAX_PAGES, Documents, parse_pages, pick_pages
from kimi_vl.media.sources import Fetching
from tests.media.pdfs import PAGE, many_pages, numbers, one_page, stream, written

Read = Callable[..., list[Image.Image]]
NOTHING = Fetching(seconds=0, private=False)
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads the pages of PDFs, each with the size in pixels that it has in points."""

    def read(*files: bytes, pages: str = "", seconds: int = 20) -> list[Image.Image]:
        paths = [tmp_path / f"secret-{place}.pdf" for place in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_bytes(content)
        documents = Documents(paths, pages, 20_000_000, seconds, NOTHING)
        try:
            documents.open()
            sizes = [(min(1000, round(width)), min(1000, round(height))) for width, height in documents.sizes]
            documents.send_sizes(sizes)
            pictures = [documents.picture(position) for position in range(len(sizes))]
            assert [picture.size for picture in pictures] == sizes
            assert len(documents.introductions) == len(pictures)
            return pictures
        finally:
            documents.close()

    return read


def painted(colour: str, x: int = 0, y: int = 0, width: int = 200, height: int = 100) -> str:
    return stream(f"{colour} rg {x} {y} {width} {height} re f")


def test_pages_come_in_order_with_their_sizes_and_introductions(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pdf", tmp_path / "b.pdf"]
    paths[0].write_bytes(many_pages(3))
    paths[1].write_bytes(one_page("/Rotate 90"))
    documents = Documents(paths, "1,3-", 20_000_000, 20, NOTHING)
    documents.open()
    documents.close()
    assert documents.introductions == ["Page 1 of FILE 1:", "Page 3 of FILE 1:", "Page 1 of FILE 2:"]
    assert documents.sizes == [(200, 100), (200, 100), (100, 200)]


def test_a_page_is_drawn_on_white(read: Read) -> None:
    (page,) = read(one_page("/Contents 4 0 R", painted("1 0 0", 0, 0, 100, 50)))
    assert page.getpixel((10, 90)) == RED, "the origin is at the bottom left"
    assert page.getpixel((10, 10)) == page.getpixel((190, 90)) == WHITE


def test_annotations_and_filled_in_forms_are_drawn(read: Read) -> None:
    look = stream("0 0 1 rg 0 0 50 50 re f", "/Type/XObject/Subtype/Form/BBox[0 0 50 50]")
    stamp = "<</Type/Annot/Subtype/Stamp/Rect[0 0 50 50]/F 4/AP<</N 5 0 R>>>>"
    field = "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(b)/Rect[100 0 150 50]/F 4/AP<</N 5 0 R>>>>"
    form = "/AcroForm<</Fields[6 0 R]>>"
    (page,) = read(one_page("/Annots[4 0 R 6 0 R]", stamp, look, field, catalogue=form))
    assert page.getpixel((25, 75)) == BLUE
    assert page.getpixel((125, 75)) != WHITE


def test_pictures_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(numbers(["1", "2", "3"]))
    documents = Documents([tmp_path / "a.pdf"], "", 20_000_000, 20, NOTHING)
    documents.open()
    documents.send_sizes([(61, 79)] * 3)
    backwards = [documents.picture(position).tobytes() for position in (2, 0, 1)]
    documents.close()
    assert len(set(backwards)) == 3


LOOP = "<</S/JavaScript/JS(while\\(true\\){} app.launchURL\\('http://127.0.0.1/'\\))>>"
SHAPE = "/Type/XObject/Subtype/Form/BBox[0 0 200 100]"
LOCKED = f"/Encrypt<</Filter/Standard/V 1/R 2/Length 40/P -4/O<{'41' * 32}>/U<{'42' * 32}>>>/ID[<41><41>]"
SEALED = "/Encrypt<</Filter/Adobe.PubSec/SubFilter/adbe.pkcs7.s4/V 1/Recipients[<41>]>>/ID[<41><41>]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The first document is no PDF, or is damaged; send it again."),
        (b"\x89PNG\r\n\x1a\n" * 100, "The first document is no PDF"),
        (b"%PDF-1.7\n" + os.urandom(5000), "The first document is no PDF"),
        (numbers(["1"])[:2000], "The first document is no PDF"),
        (one_page(trailer=LOCKED), "The first document is protected with a password; send it unprotected."),
        (one_page(trailer=SEALED), "The first document is protected with certificates or digital rights; send it unpr"),
        (written("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Count 0/Kids[]>>"), "The first document"),
        (bytes(20_000_001), "The first document is larger than 20 MB, the limit; send a smaller file."),
        (many_pages(10_000), f"has 10,000 pages and the limit is {MAX_PAGES:,}; pick some with pages."),
    ],
)
def test_refusals(read: Read, content: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(content)
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_one_of_ten_thousand_pages_can_be_had(read: Read) -> None:
    assert len(read(many_pages(10_000), pages="9999-")) == 2


def test_the_document_is_named(read: Read) -> None:
    with pytest.raises(InvalidRequest, match="The second document is no PDF"):
        read(one_page(), b"nonsense")


@pytest.mark.parametrize(
    "content",
    [
        written("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Count 99999999/Kids[3 0 R]>>", PAGE.format("")),
        one_page("/MediaBox[0 0 2000000000 10]"),
        one_page("/MediaBox[0 0 1e30 1e30]"),
        one_page("/MediaBox[0 0 0 0]"),
        one_page("/MediaBox[9 9 -9 -9]"),
        one_page("/UserUnit 1e9"),
        one_page("/Contents 4 0 R/Resources<</XObject<</A 4 0 R>>>>", stream("/A Do", SHAPE)),
        one_page("/Contents 99 0 R/Annots[98 0 R 3 0 R]"),
        one_page("/Parent 3 0 R"),
        written(
            "<</Type/Catalog/Pages 2 0 R>>",
            *[f"<</Type/Pages/Count 1/Kids[{number} 0 R]>>" for number in range(3, 20_003)],
            PAGE.format(""),
        ),
        one_page(
            "/Contents 4 0 R/Resources<</XObject<</A 5 0 R>>>>",
            stream("200 0 0 100 0 0 cm /A Do"),
            stream(
                "x", "/Type/XObject/Subtype/Image/Width 200000/Height 200000/BitsPerComponent 8/ColorSpace/DeviceRGB"
            ),
        ),
    ],
)
def test_strange_pages_are_drawn_or_refused_in_time(read: Read, content: bytes) -> None:
    started = time.monotonic()
    try:
        assert len(read(content)) == 1
    except InvalidRequest as refusal:
        assert str(refusal).count("\n") == 0
    assert time.monotonic() - started < 20


def test_scripts_and_links_do_nothing(read: Read) -> None:
    actions = f"/AA<</O {LOOP}>>/Contents 4 0 R"
    (page,) = read(one_page(actions, painted("1 0 0"), catalogue=f"/OpenAction {LOOP}"))
    assert page.getpixel((10, 10)) == RED


def laughs() -> bytes:
    """Ten forms that each draw the next ten times."""
    level = f"{SHAPE}/Resources<</XObject<</A {{}} 0 R>>>>"
    forms = [stream("/A Do " * 10, level.format(number + 1)) for number in range(5, 14)]
    last = stream("0 0 200 100 re f " * 10, SHAPE)
    return one_page("/Contents 4 0 R/Resources<</XObject<</A 5 0 R>>>>", stream("/A Do " * 10), *forms, last)


def swelling() -> bytes:
    """A page that says nothing in a gigabyte."""
    packer = zlib.compressobj(1)
    block = b" " * (1 << 20)
    packed = b"".join([*(packer.compress(block) for _ in range(1024)), packer.flush()])
    packed = zlib.compress(packed, 9)
    head = b"<</Length %d/Filter[/FlateDecode/FlateDecode]>>stream\n" % len(packed)
    return one_page("/Contents 4 0 R", head + packed + b"\nendstream")


@pytest.mark.parametrize("make", [laughs, swelling])
def test_bombs_end_within_the_seconds(read: Read, make: Callable[[], bytes]) -> None:
    content = make()
    started = time.monotonic()
    try:
        read(content, seconds=2)
    except InvalidRequest as refusal:
        assert str(refusal).startswith("Reading the document ")
    assert time.monotonic() - started < 6


PICKS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=8)


@given(PICKS, st.lists(st.integers(1, 80), min_size=1, max_size=4), st.sampled_from(["", " "]))
def test_picked_pages_are_those_named_ascending_and_each_once(
    picks: list[tuple[int, int]], counts: list[int], space: str
) -> None:
    text = f"{space},{space}".join(f"{first}{space}-{first + more}" if more else f"{first}" for first, more in picks)
    named = {page for first, more in picks for page in range(first, first + more + 1)}
    expected = [[page for page in range(1, count + 1) if page in named] for count in counts]
    try:
        assert pick_pages(parse_pages(text), counts) == expected
    except InvalidRequest:
        assert [] in expected or max(first for first, _ in picks) > max(counts)


@given(st.text(alphabet="0123456789-, \u0663x", max_size=12))
def test_any_text_is_pages_or_is_refused(text: str) -> None:
    try:
        picks = parse_pages(text)
    except InvalidRequest as refusal:
        assert str(refusal).startswith("pages must be like")
    else:
        assert all(1 <= pick.start < pick.stop for pick in picks)
        assert all(one.stop < other.start for one, other in pairwise(picks))


@pytest.mark.parametrize(
    "text", ["0", "3-2", "-3", "1,,2", "1 2", "1-2 3", "1-2-3", "one", "1;2", "1.5", "\u0663", "9999999999"]
)
def test_wrong_picks(text: str) -> None:
    with pytest.raises(InvalidRequest, match='pages must be like "1-5,8"'):
        parse_pages(text)


@pytest.mark.parametrize(
    ("text", "counts", "message"),
    [
        ("9", [3, 8], "pages picks page 9 and the last is 8; pick others"),
        ("4-", [3, 8], "The first document ends at page 3, before all that pages picks; leave it out"),
        ("", [600, 2**31], "has 2,147,484,248 pages and the limit is 1,000; pick some with pages"),
        ("1-501", [600, 600], "has 1,002 pages and the limit is 1,000"),
    ],
)
def test_picks_that_do_not_fit_the_documents(text: str, counts: Sequence[int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pick_pages(parse_pages(text), counts)


def test_nothing_picks_every_page() -> None:
    assert pick_pages(parse_pages(" "), [2, 1]) == [[1, 2], [1]]
    with pytest.raises(InvalidRequest, match="pages has 1,001 characters"):
        parse_pages("1" * 1001)
