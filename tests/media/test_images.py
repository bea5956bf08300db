"""Untrusted picture files: what they look like, and what is refused."""

import os
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock, call

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.files import memory_file, open_file
from kimi_vl.media.image_files import FORMATS_TO_SEND, LARGE, TOGETHER, batches, decode, open_picture, work
from kimi_vl.media.images import Images, ordinal

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"]
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Four quarters of different colours, so that any turn shows."""
    picture = Image.new("RGB", (width, height), (250, 250, 250))
    picture.paste((200, 30, 30), (0, 0, width // 2, height // 2))
    picture.paste((30, 150, 40), (width // 2, 0, width, height // 2))
    picture.paste((30, 60, 200), (0, height // 2, width // 2, height))
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> BinaryIO:
    file = memory_file()
    file.write(data)
    file.seek(0)
    return file


def decoded(data: bytes, max_pixels: int = 64_000_000) -> Image.Image:
    name = "The first picture"
    picture = open_picture(opened(data), name, max_pixels)
    return decode(picture, name, picture.size)[0]


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean over all channels, of 255."""
    assert one.mode == other.mode == "RGB"
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_told_by_its_content(kind: str) -> None:
    options = {"quality": 95} if kind in ("JPEG", "AVIF", "HEIF") else LOSSLESS.get(kind, {})
    assert difference(decoded(encoded(scene(), kind, **options)), scene()) < 2


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "picture.gif"
    file.write_bytes(encoded(scene(), "PNG"))
    with closing(Images([file.open("rb")], 10_000, 12_288, 10)) as images:
        assert difference(next(images.read(10_000)), scene()) == 0


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_seen(kind: str) -> None:
    data = encoded(scene(), kind, save_all=True, append_images=[Image.new("RGB", scene().size)])
    assert difference(decoded(data), scene()) < 3


def test_what_the_first_frame_of_an_animated_webp_leaves_free_is_white() -> None:
    frames = [Image.new("RGBA", (96, 64)) for _ in range(2)]
    for index, frame in enumerate(frames):
        frame.paste((200, 30, 30 * index), (0, 0, 96, 32))
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(BytesIO(data)).mode == "RGB", "the file has transparency nowhere"
    seen = decoded(data)
    assert [seen.getpixel((10, y)) for y in (10, 50)] == [(200, 30, 0), (255, 255, 255)]


CAMERA_TURNS = {  # how a camera that notes this orientation has stored the scene (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    turn = CAMERA_TURNS.get(orientation)
    stored = scene() if turn is None else scene().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else LOSSLESS[kind]
    assert difference(decoded(encoded(stored, kind, exif=exif, **options)), scene()) < 2


def test_heic_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the encoder stores it as HEIF's own rotation, as phones do
    turned = scene().transpose(Image.Transpose.ROTATE_90)
    assert difference(decoded(encoded(turned, "HEIF", exif=exif.tobytes(), quality=95)), scene()) < 2


def test_broken_exif_counts_as_upright() -> None:
    assert difference(decoded(encoded(scene(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")), scene()) == 0


HALF = [(255, 0, 0, 0), (255, 0, 0, 128), (255, 0, 0, 255)]  # of red over white
OVER_WHITE = [(255, 255, 255), (255, 127, 127), (255, 0, 0)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(kind: str) -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata(HALF)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert list(decoded(encoded(picture, kind, **options)).get_flattened_data()) == OVER_WHITE


def palette_picture() -> Image.Image:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    picture.putdata([0, 1, 2])
    return picture


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(palette_picture(), transparency=1), [(255, 0, 0), (255, 255, 255), (0, 255, 0)]),
        (encoded(palette_picture(), transparency=b"\x00\xff\x80"), [(255, 255, 255), (0, 0, 255), (127, 255, 127)]),
        (encoded(palette_picture(), "GIF", transparency=2), [(255, 0, 0), (0, 0, 255), (255, 255, 255)]),
    ],
)
def test_palettes_with_transparency(data: bytes, expected: list[tuple[int, int, int]]) -> None:
    assert list(decoded(data).get_flattened_data()) == expected


@pytest.mark.parametrize(("mode", "key", "seen"), [("RGB", (9, 9, 9), 255), ("L", 9, 255), ("1", 0, 255)])
def test_a_transparent_colour_is_white(mode: str, key: Any, seen: int) -> None:
    data = encoded(Image.new(mode, (1, 1), key), transparency=key)
    assert decoded(data).getpixel((0, 0)) == (seen,) * 3
    assert decoded(encoded(Image.new(mode, (1, 1), key))).getpixel((0, 0)) != (seen,) * 3


@pytest.mark.parametrize(
    ("bits", "kind", "row", "key", "expected"),
    [
        (1, 0, b"\x40", [1], [0, 255]),
        (2, 0, b"\x18", [1], [0, 255, 170, 0]),
        (4, 0, b"\x05\xa0", [5], [0, 255, 170, 0]),
        (8, 0, b"\x05\xaa", [5], [255, 170]),
        (16, 0, b"\x12\x34\xaa\xaa", [0x1234], [255, 170]),
        (16, 2, b"\x12\x34" * 3 + b"\x34\x12" * 3, [0x1234] * 3, [255, 0x34]),
    ],
)
def test_a_transparent_colour_has_the_depth_of_the_file(
    bits: int, kind: int, row: bytes, key: list[int], expected: list[int]
) -> None:
    header = struct.pack(">IIBBBBB", len(expected), 1, bits, kind, 0, 0, 0)
    seen = decoded(_png(header, b"\x00" + row, struct.pack(f">{len(key)}H", *key)))
    assert list(seen.get_flattened_data()) == [(level,) * 3 for level in expected]


def grey(values: Any, dtype: Any) -> Image.Image:
    return Image.fromarray(np.atleast_2d(np.array(values, dtype)))


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
    [
        (grey([0, 32896, 65535], np.uint16), "PNG", [0, 128, 255]),
        (grey([0, 32896, 65535], np.uint16), "TIFF", [0, 128, 255]),
        (grey([0, 32896, 65535], np.int32), "TIFF", [0, 128, 255]),
        (grey([0.0, 0.5, 1.0], np.float32), "TIFF", [0, 128, 255]),
        (grey([0.0, np.nan, 2.0], np.float32), "TIFF", [0, 0, 255]),
        (grey([0, 128, 255], np.uint8), "TIFF", [0, 128, 255]),
        (grey([False, True], np.bool_), "PNG", [0, 255]),
        (grey([False, True], np.bool_), "TIFF", [0, 255]),
    ],
)
def test_depths(picture: Image.Image, kind: str, expected: list[int]) -> None:
    seen = decoded(encoded(picture, kind))
    assert [pixel[0] for pixel in seen.get_flattened_data()] == expected
    assert all(len(set(pixel)) == 1 for pixel in seen.get_flattened_data())


@pytest.mark.parametrize(
    ("bits", "photometric", "row", "expected"),
    [
        (16, 0, b"\x00\x00\x7f\x7f\xff\xff", [255, 128, 0]),
        (12, 1, b"\x00\x08\x00\xff\xf0", [0, 128, 255]),
    ],
)
def test_other_depths_of_tiff(bits: int, photometric: int, row: bytes, expected: list[int]) -> None:
    width, entries = len(expected), 8
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 14 + 12 * entries, 277: 1, 279: len(row)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    seen = decoded(b"II*\x00" + struct.pack("<IH", 8, entries) + directory + bytes(4) + row)
    assert [pixel[0] for pixel in seen.get_flattened_data()] == expected


def test_grey_with_alpha() -> None:
    picture = Image.new("LA", (3, 1))
    picture.putdata([(0, 0), (0, 128), (100, 255)])
    assert [pixel[0] for pixel in decoded(encoded(picture)).get_flattened_data()] == [255, 127, 100]


def test_deep_colour_is_scaled_not_cut() -> None:
    """A PNG of 16 bits a channel, which Pillow can read and not write."""
    row = b"\x00" + struct.pack(">6H", 0, 32896, 65535, 257, 0, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    assert list(decoded(_png(header, row)).get_flattened_data()) == [(0, 128, 255), (1, 0, 0)]


def _png(header: bytes, rows: bytes, transparent: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    key = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printing_colours(kind: str) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    options = {"quality": 95} if kind == "JPEG" else {}
    red, green, blue = decoded(encoded(cmyk, kind, **options)).getpixel((8, 8))  # type: ignore[misc]
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("size", [(96, 64), (LARGE // 4000 + 2, 4000)])
def test_colours_of_lab(size: tuple[int, int]) -> None:
    seen = decoded(encoded(scene(*size).convert("LAB"), "TIFF"))
    assert difference(seen, scene(*seen.size)) < 2


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")  # its red is blue


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colour_profiles_are_honoured(kind: str) -> None:
    options = {"quality": 100} if kind == "JPEG" else LOSSLESS[kind]
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert difference(decoded(encoded(red, kind, icc_profile=SRGB, **options)), red) < 2
    blue = Image.new("RGB", (16, 16), (0, 0, 255))
    assert difference(decoded(encoded(red, kind, icc_profile=SWAPPED, **options)), blue) < 2


def test_a_profile_leaves_transparency_alone() -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata(HALF)
    seen = list(decoded(encoded(picture, icc_profile=SWAPPED)).get_flattened_data())
    assert seen == [(255, 255, 255), (127, 127, 255), (0, 0, 255)]


@pytest.mark.parametrize("profile", [b"", b"nonsense", SRGB[:200], SRGB[:128] + b"\xff" * 400])
def test_broken_profiles_are_ignored(profile: bytes) -> None:
    assert difference(decoded(encoded(scene(), icc_profile=profile)), scene()) == 0


def test_a_profile_of_other_colours_is_ignored() -> None:
    assert decoded(encoded(Image.new("L", (4, 4), 77), icc_profile=SRGB)).getpixel((0, 0)) == (77,) * 3


def header_only(width: int, height: int) -> bytes:
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", f"The first picture is empty; send a {FORMATS_TO_SEND} file."),
        (b"root:x:0:0", f"The first picture is not a picture of a known type; send a {FORMATS_TO_SEND} file."),
        (b"%PDF-1.4 " * 100, f"The first picture is not a picture of a known type; send a {FORMATS_TO_SEND} file."),
        (b"<svg/>" * 100, f"The first picture is not a picture of a known type; send a {FORMATS_TO_SEND} file."),
        (header_only(8001, 8000), "The first picture has 64 megapixels and the limit is 64; send a smaller one."),
        (
            header_only(60_000, 60_000),
            "The first picture has more than 128 megapixels and the limit is 64; send a smaller one.",
        ),
        (header_only(100, 100), "The first picture is damaged or incomplete; send it again."),
        (
            encoded(scene(), "PPM"),
            f"The first picture is not a picture of a known type; send a {FORMATS_TO_SEND} file.",
        ),
    ],
)
def test_refusals(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decoded(data)
    assert str(refusal.value) == message
    assert refusal.value.__cause__ is None


def test_the_picture_is_named() -> None:
    assert [ordinal(position) for position in (0, 1, 7, 10)] == ["first", "second", "eighth", "11th"]
    files = [opened(data) for data in (encoded(scene()), b"nonsense")]
    with (
        closing(Images(files, 10_000, 12_288, 10)) as images,
        pytest.raises(InvalidRequest, match=r"^The second picture"),
    ):
        images.open()
    assert all(file.closed for file in files)


def test_the_limits_are_settings() -> None:
    data = encoded(scene())
    assert decoded(data, 96 * 64).size == (96, 64)
    with pytest.raises(InvalidRequest, match="megapixels and the limit is"):
        decoded(data, 96 * 64 - 1)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: None])
def test_only_regular_files_are_read(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "secret-name.png")
    with pytest.raises(InvalidRequest, match=r"^The third picture (is not a regular file|cannot be read)") as refusal:
        open_file(tmp_path / "secret-name.png", "The third picture", "picture", 1000)
    assert "secret-name" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("I;16", "PNG"), ("F", "TIFF")],
)
def test_of_a_large_picture_a_smaller_one_is_seen(mode: str, kind: str) -> None:
    size = (LARGE // 2000 + 1, 2001)
    shades = scene().convert("L").resize(size, Image.Resampling.NEAREST)
    picture = grey(np.asarray(shades), np.uint16).point(lambda value: value * 257) if mode == "I;16" else shades
    picture = grey(np.asarray(shades) / 255, np.float32) if mode == "F" else picture.convert(mode)
    seen = decoded(encoded(picture, kind))
    assert seen.size == ((size[0] + 1) // 2, 1001)
    assert difference(seen, decoded(encoded(scene().convert("L"))).resize(seen.size, Image.Resampling.NEAREST)) < 2


def test_a_large_picture_is_turned_and_laid_over_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGBA", (LARGE // 2000 + 2, 2002), (255, 0, 0, 128))
    picture.paste((255, 0, 0, 0), (0, 0, picture.width, 1000))
    seen = decoded(encoded(picture, exif=exif))
    assert seen.size == (1001, picture.width // 2)
    assert [seen.getpixel((x, 5)) for x in (5, 995)] == [(255, 127, 127), (255, 255, 255)]


def test_pictures_come_upright_in_the_sizes_that_they_are_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = scene().transpose(Image.Transpose.ROTATE_90)
    files = [opened(encoded(turned, exif=exif)), opened(encoded(scene()))]
    with closing(Images(files, 10_000, 12_288, 10)) as images:
        images.open()
        assert images.sizes == [(64, 96), (96, 64)], "as they are stored"
        images.send_sizes([(32, 48), (48, 32)])
        for position in (1, 0):
            assert difference(images.picture(position), scene(48, 32)) < 5


def test_each_picture_has_the_time_that_its_size_takes() -> None:
    sizes = [(4500, 4000), (96, 64), (64, 96), (4000, 4500)]
    files = [opened(encoded(scene(*size), "JPEG")) for size in sizes]
    channel = Mock(files=files)
    channel.receive.return_value = {"sizes": [(28, 28)] * 4}
    work(channel, {"names": [""] * 4, "max_pixels": 20_000_000})
    assert channel.begin_step.call_args_list == [call(), call(sizes[:3]), call(sizes[3:])]


def test_all_pictures_together_have_a_limit() -> None:
    files = [opened(header_only(8000, 8000)) for _ in range(2)]
    with closing(Images(files, 64_000_000, 100_000_000, 10)) as images, pytest.raises(InvalidRequest) as refusal:
        images.open()
    assert str(refusal.value) == (
        "The pictures have 128 megapixels together and the limit is 100; send smaller ones, or fewer."
    )


@given(st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 8000)), min_size=1, max_size=12))
def test_pictures_decoded_together_have_few_pixels_unless_it_is_one(sizes: list[tuple[int, int]]) -> None:
    made = list(batches(sizes))
    assert [position for batch in made for position in batch] == list(range(len(sizes)))
    for batch in made:
        assert batch
        assert len(batch) == 1 or sum(sizes[place][0] * sizes[place][1] for place in batch) <= TOGETHER


NOISE = Image.effect_noise((70, 50), 80).convert("RGB")
FILES = {kind: encoded(NOISE, kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    """At every hundredth; at the very end some only lack what a viewer can do without."""
    for percent in range(1, 98):
        with pytest.raises(InvalidRequest, match=r"first picture is (damaged|not a picture)"):
            decoded(FILES[kind][: len(FILES[kind]) * percent // 100])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damage_anywhere_ends_in_a_picture_or_a_refusal(kind: str, data: st.DataObject) -> None:
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 400) if data.draw(st.booleans()) else len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        assert decoded(bytes(content), 100_000).mode == "RGB"
    except InvalidRequest as refusal:
        assert str(refusal).startswith("The first picture ")
