"""Pictures made to take a server down: each ends in the right answer or one sentence, in time and within memory."""

import struct
import zlib

import numpy as np
from PIL import Image

from tests.attacks.pictures import (
    MANY,
    animated_gif,
    animated_png,
    animated_webp,
    chunk,
    claiming,
    many_scans,
    png,
    segments,
    swollen,
    tiff_of,
    with_chunks,
)
from tests.attacks.server import ANY, HUGE, RIGHT, Target, encoded, number, uri

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
NUMBER = encoded(number())
UNKNOWN = "is not a picture of a known type"
DAMAGED = "is damaged or"
TOO_MUCH = (
    "takes more than 1.8 seconds for a page, or for 16 megapixels of a picture, the limit; send something simpler."
)


def test_sizes_that_are_only_claimed(target: Target) -> None:
    bmp, gif, webp = (encoded(number(), kind) for kind in ("BMP", "GIF", "WEBP"))
    jpeg = encoded(number(), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    avif, heif = encoded(number(), "AVIF"), encoded(number(), "HEIF")
    for name, file, wanted in (
        ("PNG", png(100_000, 100_000, zlib.compress(bytes(1000))), HUGE),
        ("PNG of one colour", png(60_000, 60_000, swollen(430), bits=1), HUGE),
        ("PNG of 2^31", png(2**31 - 1, 2**31 - 1, b""), HUGE),
        ("PNG of no width", png(0, 5, b""), ANY),
        ("JPEG", jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :], HUGE),
        ("GIF", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], HUGE),
        ("BMP", bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:], HUGE),
        ("BMP upside down", bmp[:18] + struct.pack("<ii", 2**31 - 1, -(2**31)) + bmp[26:], ANY),
        ("BMP of nothing", bmp[:18] + struct.pack("<ii", 8000, 8000) + bmp[26:], DAMAGED),
        ("TIFF", tiff_of(2**32 - 1, 2**32 - 1), ANY),
        ("TIFF of nothing", tiff_of(8000, 8000), DAMAGED),
        ("WebP", animated_webp(1 << 14, 1 << 14, 1), ANY),
        ("WebP of 2^24", animated_webp(1 << 24, 1 << 24, 1), ANY),
        ("WebP, odd", webp[:26] + b"\xff\x3f\xff\x3f" + webp[30:], ANY),
        ("AVIF", claiming(avif, 2**31 - 1, 2**31 - 1), ANY),
        ("AVIF of 8000", claiming(avif, 8000, 8000), ANY),
        ("HEIC", claiming(heif, 2**31 - 1, 2**31 - 1), ANY),
        ("HEIC of 8000", claiming(heif, 8000, 8000), ANY),
        ("JPEG 2000", encoded(number(), "JPEG2000"), UNKNOWN),
    ):
        target.strike(name, wanted, images=[uri(file)])
    target.must_be_right()


def test_pictures_as_large_as_may_be(target: Target) -> None:
    """One colour compresses to nothing, and is decoded to hundreds of megabytes."""
    clear = Image.new("RGBA", (8000, 8000), (0, 0, 0, 100))
    photo = clear.convert("RGB")
    files = {
        "PNG": encoded(clear, compress_level=1),
        "JPEG": encoded(photo, "JPEG", quality=20),
        "JPEG, progressive": encoded(photo, "JPEG", quality=20, progressive=True, subsampling=0),
        "TIFF": encoded(photo, "TIFF", compression="packbits"),
        "WebP": encoded(clear, "WEBP", lossless=True, method=0, exact=True),
        "one bit": png(8000, 8000, swollen(8), bits=1),
        "16 bits": png(8000, 8000, swollen(123), bits=16),
    }
    for name, file in files.items():
        target.strike(name, images=[uri(file)])
    refusal = target.strike("eight", images=[uri(files["PNG"])] * 8).refusal
    assert refusal == "The pictures have 512 megapixels together and the limit is 100; send smaller ones, or fewer."
    eight = [uri(encoded(Image.new("RGBA", (3500, 3500)), compress_level=1))] * 8
    target.strike("eight of 12 megapixels", images=eight)
    target.must_be_right()


def test_animations_and_pages_without_end(target: Target) -> None:
    gif = encoded(number(), "GIF")
    pages = b"".join(tiff_of(140, 84)[8:-4] + struct.pack("<I", 0) for _ in range(1))
    chained = b"II*\x00\x08\x00\x00\x00" + b"".join(
        pages[:-4] + struct.pack("<I", 8 + (index + 1) * len(pages)) for index in range(MANY)
    )
    for name, file, wanted in (
        ("APNG", animated_png(NUMBER), ANY),
        ("GIF", animated_gif(gif), RIGHT),
        ("WebP", animated_webp(140, 84), ANY),
        ("WebP, large", animated_webp(5000, 5000), ANY),
        ("TIFF of many pages", chained + bytes(140 * 84), ANY),
        ("TIFF in a ring", tiff_of(140, 84, 8) + bytes(140 * 84), ANY),
    ):
        target.strike(name, wanted, images=[uri(file)])
    target.must_be_right()


def test_what_comes_with_a_picture(target: Target) -> None:
    """Colour profiles, texts, EXIF and whatever else there is around the pixels."""
    jpeg = encoded(number(), "JPEG", quality=95)
    bomb = swollen(1024)
    ring = (
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x69\x87\x04\x00\x01\x00\x00\x00\x08\x00\x00\x00\x08\x00\x00\x00"
    )
    greedy = [(tag, 1, 15_000_000, 8) for tag in range(30_000, 30_200)]
    mpf = b"MPF\x00II*\x00\x08\x00\x00\x00\x01\x00\x01\xb0\x04\x00\x01\x00\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00"
    for name, file, wanted in (
        ("iCCP", with_chunks(NUMBER, chunk(b"iCCP", b"x\x00\x00" + bomb)), ANY),
        ("zTXt", with_chunks(NUMBER, chunk(b"zTXt", b"x\x00\x00" + bomb)), ANY),
        ("iTXt", with_chunks(NUMBER, chunk(b"iTXt", b"x\x00\x01\x00\x00\x00" + bomb)), ANY),
        ("many zTXt", with_chunks(NUMBER, *[chunk(b"zTXt", b"x\x00\x00" + swollen(1))] * 2000), ANY),
        ("eXIf", with_chunks(NUMBER, chunk(b"eXIf", b"II*\x00\x08\x00\x00\x00" + bytes(14_000_000))), RIGHT),
        ("EXIF in a ring", encoded(number(), exif=ring), RIGHT),
        ("empty chunks", with_chunks(NUMBER, chunk(b"abCd", b"") * 1_200_000), ANY),
        ("EXIF in JPEG", segments(jpeg, b"\xff\xe1\xff\xffExif\x00\x00" + bytes(65_527), 220), RIGHT),
        ("ICC in JPEG", segments(jpeg, b"\xff\xe2\xff\xffICC_PROFILE\x00\x01\xff" + bytes(65_519), 220), ANY),
        ("empty segments", segments(jpeg, b"\xff\xe1\x00\x02", 3_500_000), ANY),
        ("pictures in JPEG", segments(jpeg, b"\xff\xe2" + struct.pack(">H", 2 + len(mpf)) + mpf, 1), ANY),
        ("tags of TIFF", tiff_of(140, 84, 0, *greedy, data=bytes(15_000_000)), ANY),
        ("thousands of scans", many_scans(4000, 4000), TOO_MUCH),
    ):
        target.strike(name, wanted, images=[uri(file)])
    target.must_be_right()


def test_files_that_are_something_else(target: Target) -> None:
    pdf = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run showpage\n%%EOF"
    for name, file, wanted in (
        ("ICO", encoded(number(), "ICO"), UNKNOWN),
        ("TGA", encoded(number(), "TGA"), UNKNOWN),
        ("PSD", b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(100), UNKNOWN),
        ("EPS", eps, UNKNOWN),
        ("PDF", pdf, UNKNOWN),
        ("SVG", svg, UNKNOWN),
        ("PPM", encoded(number(), "PPM"), UNKNOWN),
        ("ICNS", b"icns" + struct.pack(">I", 40) + bytes(32), UNKNOWN),
        ("PDF before PNG", pdf + NUMBER, UNKNOWN),
        ("EPS before PNG", eps + NUMBER, UNKNOWN),
        ("PNG before PDF, SVG and EPS", NUMBER + pdf + svg + eps, RIGHT),
        ("PNG within PNG", with_chunks(NUMBER, chunk(b"abCd", NUMBER)), RIGHT),
        ("JPEG within JPEG", encoded(number(), "JPEG", quality=95, comment=encoded(number("7"), "JPEG")), RIGHT),
        ("BMP of a PNG", encoded(number(), "BMP")[:54] + NUMBER, ANY),
        ("nothing", b"", "is empty"),
        ("one byte", b"\x89", UNKNOWN),
        ("zeros", bytes(1_000_000), UNKNOWN),
        ("noise", np.random.default_rng(1).bytes(1_000_000), UNKNOWN),
    ):
        target.strike(name, wanted, images=[uri(file)])
    for kind in ("application/pdf", "image/gif", "text/html", "image/svg+xml"):
        target.strike(kind, RIGHT, images=[uri(NUMBER, kind)])
    target.must_be_right()


def test_pictures_that_are_hardly_any(target: Target) -> None:
    for size in ((1, 1), (1, 65_535), (65_535, 1), (3, 700), (30_000, 500)):
        for kind in ("PNG",) if max(size) > 65_500 else ("PNG", "JPEG"):  # no library writes that JPEG
            outcome = target.strike(f"{size} {kind}", images=[uri(encoded(Image.new("RGB", size, "red"), kind))])
            (picture,) = outcome.pictures
            assert (picture["width"] > picture["height"]) == (size[0] > size[1] and size != (1, 1))
    target.must_be_right()


def test_truncated_files(target: Target) -> None:
    """Each format somewhere else; tests/media truncates each at every hundredth of the file."""
    for place, kind in enumerate(FORMATS):
        file = encoded(number(), kind)
        for percent in range(3 + 4 * place, 100, 33):
            refusal = target.strike(f"{percent} % of {kind}", images=[uri(file[: len(file) * percent // 100])]).refusal
            assert refusal, f"{percent} % of {kind} was answered"
    target.must_be_right()


def test_bombs_in_messages_and_among_good_pictures(target: Target) -> None:
    bomb = uri(with_chunks(NUMBER, chunk(b"IDAT", b"") * 1_200_000))
    picture = {"type": "image_url", "image_url": {"url": bomb}}
    target.strike("message", messages=[{"role": "user", "content": [picture]}])
    huge = uri(png(60_000, 60_000, b""))
    target.strike("third", "third picture", images=[uri(NUMBER), uri(NUMBER), huge, uri(NUMBER)])
    target.must_be_right()
