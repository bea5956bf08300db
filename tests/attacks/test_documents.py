"""PDFs made to take a server down: each ends in the right answer or one sentence, in time and within memory."""

import zlib
from io import BytesIO

import pypdfium2 as pdfium

from tests.attacks.pictures import swollen
from tests.attacks.server import ANY, RIGHT, Target, Within, uri
from tests.media.pdfs import PAGE, many_pages, numbers, one_page, stream, written

NUMBER = numbers([RIGHT])
NO_PDF = "The first document is no PDF, or is damaged"
CATALOGUE = "<</Type/Catalog/Pages 2 0 R>>"
SHAPE = "/Type/XObject/Subtype/Form/BBox[0 0 200 100]"


def pdf(file: bytes) -> list[str]:
    """The request's documents."""
    return [uri(file, "application/pdf")]


def packed(content: bytes, entries: str, filters: int = 1) -> bytes:
    """A stream that so many Flate filters have to unpack."""
    names = "/FlateDecode" * filters
    return (
        b"<</Length %d/Filter[%b]%b>>stream\n" % (len(content), names.encode(), entries.encode())
        + content
        + b"\nendstream"
    )


def drawing(*objects: str | bytes, resources: str = "", contents: str = "/A Do") -> bytes:
    """A page that draws what the fifth object, called A, is."""
    resources = resources or "/XObject<</A 5 0 R>>"
    return one_page(f"/Contents 4 0 R/Resources<<{resources}>>", stream(contents), *objects)


def bitmap(content: bytes, width: int, height: int, filters: int = 1) -> bytes:
    about = f"/Type/XObject/Subtype/Image/Width {width}/Height {height}/BitsPerComponent 8/ColorSpace/DeviceRGB"
    return drawing(packed(content, about, filters), contents="200 0 0 100 0 0 cm /A Do")


def test_streams_that_swell(target: Target) -> None:
    nested = swollen(1024)
    for _ in range(4):
        nested = zlib.compress(nested)
    for name, file, wanted in (
        ("five filters", one_page("/Contents 4 0 R", packed(nested, "", 5)), ANY),
        ("a gigabyte of text", one_page("/Contents 4 0 R", packed(swollen(1024), "")), ANY),
        ("a hundred streams", one_page(f"/Contents[{'4 0 R ' * 100}]", packed(swollen(64), "")), ANY),
        ("a thousand filters", one_page("/Contents 4 0 R", packed(zlib.compress(b""), "", 1000)), ANY),
        ("a picture of gigabytes", bitmap(swollen(1024), 200_000, 200_000), ANY),
        ("a picture of a gigabyte", bitmap(swollen(1024), 18_000, 18_000), ANY),
        ("a picture of 200 megabytes", bitmap(swollen(192), 8000, 8000), ANY),
        ("a font", drawing(font(swollen(1024)), contents="BT /F 40 Tf (42) Tj ET", resources="/Font<</F 5 0 R>>"), ANY),
    ):
        target.strike(name, wanted, documents=pdf(file))
    target.must_be_right()


def font(content: bytes) -> bytes:
    """A font whose file is in the same object: no reader needs more to begin to unpack it."""
    about = (
        "/Type/Font/Subtype/TrueType/BaseFont/A/FirstChar 0/LastChar 0/Widths[500]/FontDescriptor 5 0 R/FontFile2 5 0 R"
    )
    return packed(content, about)


def test_trees_without_end(target: Target) -> None:
    deep = [f"<</Type/Pages/Count 1/Kids[{number} 0 R]>>" for number in range(3, 20_003)]
    wide = f"<</Type/Pages/Count 100000/Kids[{'3 0 R ' * 100_000}]>>"
    for name, file, wanted in (
        ("a ring", written(CATALOGUE, "<</Type/Pages/Count 9/Kids[2 0 R]>>"), ANY),
        ("two rings", written(CATALOGUE, *["<</Type/Pages/Count 9/Kids[2 0 R 3 0 R]>>"] * 2), ANY),
        ("2^31 pages", written(CATALOGUE, "<</Type/Pages/Count 2147483647/Kids[3 0 R]>>", PAGE.format("")), ANY),
        ("less than none", written(CATALOGUE, "<</Type/Pages/Count -5/Kids[3 0 R]>>", PAGE.format("")), ANY),
        ("20,000 levels", written(CATALOGUE, *deep, PAGE.format("")), ANY),
        ("one page 100,000 times", written(CATALOGUE, wide, PAGE.format("")), "has 100,000 pages and the limit is"),
        ("10,000 pages", many_pages(10_000), "has 10,000 pages and the limit is 1,000"),
        ("its own parent", one_page("/Parent 3 0 R"), ANY),
        (
            "inherits in a ring",
            written(CATALOGUE, "<</Type/Pages/Count 1/Kids[3 0 R]/Parent 2 0 R>>", "<</Type/Page/Parent 2 0 R>>"),
            ANY,
        ),
    ):
        target.strike(name, wanted, documents=pdf(file))
    assert not target.strike("a thousandth", documents=pdf(many_pages(10_000)), pages="9999").refusal
    target.must_be_right()


def test_pages_that_are_hard_to_draw(target: Target) -> None:
    form = SHAPE + "/Resources<</XObject<</A {} 0 R>>>>"
    laughs = [stream("/A Do " * 10, form.format(number + 1)) for number in range(5, 14)]
    tiles = stream(
        "0 0 1 1 re f",
        "/Type/Pattern/PatternType 1/PaintType 2/TilingType 1/BBox[0 0 1 1]/XStep 0.0001/YStep 0.0001/Resources<<>>",
    )
    painted = "/Cs cs 1 0 0 /P scn 0 0 200 100 re f"
    program = stream("{ " + "dup mul " * 100_000 + "}", "/FunctionType 4/Domain[0 1]/Range[0 1 0 1 0 1]")
    shading = "<</ShadingType 1/ColorSpace/DeviceRGB/Domain[0 1 0 1]/Function 6 0 R>>"
    glyph = (
        "<</Type/Font/Subtype/Type3/FontBBox[0 0 9 9]/FontMatrix[1 0 0 1 0 0]/CharProcs<</a 6 0 R>>/FirstChar 97"
        "/LastChar 97/Widths[9]/Encoding<</Differences[97/a]>>/Resources<</Font<</F 5 0 R>>>>>>"
    )
    for name, file, wanted in (
        ("laughs", drawing(*laughs, stream("0 0 200 100 re f " * 10, SHAPE)), "Reading the document "),
        ("draws itself", drawing(stream("/A Do", form.format(5))), ANY),
        (
            "tiles",
            drawing(tiles, resources="/Pattern<</P 5 0 R>>/ColorSpace<</Cs[/Pattern/DeviceRGB]>>", contents=painted),
            ANY,
        ),
        (
            "shading",
            drawing(shading, program, resources="/Shading<</S 5 0 R>>", contents="200 0 0 100 0 0 cm /S sh"),
            ANY,
        ),
        (
            "a glyph of itself",
            drawing(
                glyph,
                stream("BT /F 9 Tf (aaaaaaaaaa) Tj ET"),
                resources="/Font<</F 5 0 R>>",
                contents="BT /F 9 Tf (aa) Tj ET",
            ),
            ANY,
        ),
        (
            "a million lines",
            one_page("/Contents 4 0 R", packed(zlib.compress(b"0 0 m 200 100 l S\n" * 1_000_000), "")),
            ANY,
        ),
        ("a million states", one_page("/Contents 4 0 R", packed(zlib.compress(b"q " * 5_000_000), "")), ANY),
        ("dashes", one_page("/Contents 4 0 R", stream("[0.00001] 0 d 0 0 m 200 100 l S")), ANY),
        ("nested lists", one_page("/Contents 4 0 R/Annots" + "[" * 500_000), ANY),
        ("nested operands", one_page("/Contents 4 0 R", stream("[" * 1_000_000)), ANY),
    ):
        target.strike(name, wanted, documents=pdf(file))
    for box in ("0 0 2000000000 10", "0 0 1e30 1e30", "0 0 0 0", "9 9 -9 -9", "nan nan nan nan", "0 0 0.0001 5000"):
        target.strike(f"MediaBox {box}", documents=pdf(one_page(f"/MediaBox[{box}]")))
    target.strike("UserUnit", documents=pdf(one_page("/UserUnit 1e9/Rotate 12345")))
    target.must_be_right()


def test_tables_that_lead_nowhere(target: Target) -> None:
    good = one_page()
    start = good.rindex(b"startxref\n") + 10
    ring = good[:start].replace(b"/Root 1 0 R", b"/Root 1 0 R/Prev %d" % int(good[start:].split()[0])) + good[start:]
    rows = packed(swollen(512), "/Type/XRef/Size 99999999/W[4 4 4]/Root 1 0 R")
    table = b"%PDF-1.7\n1 0 obj\n" + rows + b"\nendobj\nstartxref\n9\n%%EOF"
    inner = packed(zlib.compress(b"1 0 "), "/Type/ObjStm/N 99999999/First 4/Extends 4 0 R")
    for name, file, wanted in (
        ("a ring", ring, ANY),
        ("itself", good[:start] + b"%d\n%%%%EOF" % start, ANY),
        ("beyond the end", good[:start] + b"99999999999999999999\n%%EOF", ANY),
        ("99,999,999 objects", good.replace(b"xref\n0 4", b"xref\n0 99999999"), ANY),
        ("a table that swells", table, ANY),
        ("objects within themselves", one_page("/Contents 4 0 R", inner), ANY),
        ("length of itself", one_page("/Contents 4 0 R", "<</Length 4 0 R>>stream\nq\nendstream"), ANY),
        ("endless objects", b"%PDF-1.7\n" + b"1 0 obj\n" * 1_000_000, NO_PDF),
        ("no end", NUMBER[: len(NUMBER) // 2], ANY),
        ("nothing", b"", NO_PDF),
        ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(1000), NO_PDF),
        ("XML", b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', NO_PDF),
    ):
        target.strike(name, wanted, documents=pdf(file))
    for percent in range(0, 100, 20):
        target.strike(f"{percent} %", documents=pdf(NUMBER[: len(NUMBER) * percent // 100]))
    target.must_be_right()


def test_what_documents_carry_is_left_alone(target: Target, within: Within) -> None:
    """Scripts, files, links and forms that act: nothing is run, fetched or read."""
    url = f"http://127.0.0.1:{within.port}/"
    script = f"<</S/JavaScript/JS(while\\(true\\){{}} app.launchURL\\('{url}'\\);)>>"
    actions = (
        script,
        f"<</S/URI/URI({url})>>",
        f"<</S/SubmitForm/F<</FS/URL/F({url})>>>>",
        "<</S/Launch/F(/bin/sh)>>",
        "<</S/GoToR/F(/etc/passwd)/D[0/Fit]>>",
        f"<</S/ImportData/F({url})>>",
    )
    for action in actions:
        target.strike(action[:20], RIGHT, documents=pdf(carrying(f"/OpenAction {action}/AA<</WC {action}>>")))
    outside = f"<</Length 0/F<</FS/URL/F({url})>>>>stream\n\nendstream"
    local = "<</Length 0/F(/etc/passwd)>>stream\n\nendstream"
    for name, content in (("stream at a URL", outside), ("stream in a file", local)):
        assert not target.strike(name, documents=pdf(one_page("/Contents 4 0 R", content))).refusal
    assert within.visits == 0
    document = pdfium.PdfDocument(NUMBER)
    document.new_attachment("../../etc/evil.sh").set_data(b"#!/bin/sh\n" * 100_000)
    file = BytesIO()
    document.save(file)
    target.strike("embedded file", RIGHT, documents=pdf(file.getvalue()))
    form = f"/AcroForm<</XFA(<xdp><script>{'x' * 1000}</script></xdp>)/Fields[]>>"
    target.strike("XFA", RIGHT, documents=pdf(carrying(form)))
    target.must_be_right()


def carrying(catalogue: str) -> bytes:
    """The PDF of the number with more in its catalogue."""
    place = NUMBER.index(b"/Catalog") + len(b"/Catalog")
    return NUMBER[:place] + b"\n" + catalogue.encode() + NUMBER[place:]  # its table is wrong now, and is made anew


def test_what_is_locked_is_refused(target: Target) -> None:
    for version in ("/V 1/R 2/Length 40", "/V 4/R 4/Length 128/CF<</A<</CFM/AESV2>>>>/StmF/A", "/V 5/R 6/Length 99999"):
        lock = f"/Encrypt<</Filter/Standard{version}/P -4/O<{'41' * 32}>/U<{'42' * 32}>>>/ID[<41><41>]"
        target.strike(version, "The first document is ", documents=pdf(one_page(trailer=lock)))
    target.must_be_right()
