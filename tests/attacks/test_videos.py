"""Videos made to take a server down: each ends in the right answer or one sentence, in time and within memory."""

import struct
from pathlib import Path
from typing import Any

from PIL import Image

from tests.attacks.pictures import MANY, animated_gif, animated_webp
from tests.attacks.server import ANY, HUGE, RIGHT, Target, Within, encoded, uri
from tests.media.films import film, numbered, sound_only

UNKNOWN = "The video is of no known type"


def two_frames(file: bytes) -> dict[str, Any]:
    """The request's video, of which two frames are shown."""
    return {"video": uri(file, "video/mp4"), "video_frames": 2}


def mp4(folder: Path, count: int = 1, **options: Any) -> bytes:
    return film(folder / "film.mp4", [numbered("42")] * count, **options).read_bytes()


def changed(file: bytes, box: bytes, offset: int, new: bytes) -> bytes:
    """An MP4 with other bytes somewhere behind a box's name."""
    place = file.index(box) + 4 + offset
    return file[:place] + new + file[place + len(new) :]


def test_absurd_sizes(target: Target, tmp_path: Path) -> None:
    good = mp4(tmp_path)
    large = struct.pack(">HH", 65_535, 65_535)
    gif = encoded(numbered("42"), "GIF")
    mkv = film(tmp_path / "film.mkv", [numbered("42")]).read_bytes()
    width = mkv.index(b"\xb0\x81\xa0")
    for name, file, wanted in (
        ("MP4", changed(good, b"avc1", 24, large), ANY),
        ("of the track", changed(good, b"tkhd", 76, b"\xff" * 8), ANY),
        ("MKV", mkv[:width] + b"\xb0\x84\x7f\xff\xff\xff" + mkv[width + 3 :], ANY),
        ("GIF", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], ANY),
        ("WebP", animated_webp(1 << 14, 1 << 14, 2), HUGE),
        ("WebP, as large as may be", animated_webp(8000, 8000, 2), ANY),
        ("large", film(tmp_path / "large.mp4", [Image.new("RGB", (7680, 4320))] * 4).read_bytes(), ANY),
    ):
        target.strike(name, wanted, **two_frames(file))
    target.must_be_right()


def test_absurd_times(target: Target, tmp_path: Path) -> None:
    good = mp4(tmp_path, 6)
    for name, file in (
        ("no time", changed(good, b"stts", 12, bytes(4))),
        ("long frames", changed(good, b"stts", 12, b"\x7f\xff\xff\xff")),
        ("backwards", changed(good, b"stts", 12, b"\xff\xff\xff\xff")),
        ("2^32 frames", changed(good, b"stts", 8, b"\xff\xff\xff\xff")),
        ("no scale", changed(good, b"mdhd", 12, bytes(4))),
        ("no duration", changed(good, b"mdhd", 16, bytes(4))),
        ("endless", changed(good, b"mvhd", 12, b"\x00\x00\x00\x01\xff\xff\xff\xff")),
        ("two frames, years apart", mp4(tmp_path, 2, times=[0, 2**41])),
        ("before the beginning", mp4(tmp_path, 2, times=[-(2**40), 0])),
    ):
        target.strike(name, **two_frames(file), video_fps=100)
    target.must_be_right()


def test_frames_without_end(target: Target, tmp_path: Path) -> None:
    many = film(tmp_path / "many.mp4", [numbered("42").resize((16, 16))] * 16_000, codec="mpeg4").read_bytes()
    no_keys = many.replace(b"stss", b"free")
    for name, file, wanted in (
        ("16,000", many, ANY),
        ("16,000 without an index", no_keys, ANY),
        ("WebP", animated_webp(16, 16), "is a WebP with too many frames for its size; send it as an MP4."),
        ("WebP, large", animated_webp(2000, 2000, 300), "is a WebP with too many frames"),
        ("WebP that may be", animated_webp(16, 16, 9_999), ANY),
        ("GIF", animated_gif(encoded(numbered("42"), "GIF")), ANY),
    ):
        target.strike(name, wanted, **two_frames(file))
    target.strike("all", "and the limit is 256", video=uri(many, "video/mp4"), video_fps=100)
    target.must_be_right()


def test_broken_indexes(target: Target, tmp_path: Path) -> None:
    good = mp4(tmp_path, 30)
    mkv = film(tmp_path / "film.mkv", [numbered("42")] * 30).read_bytes()
    for name, file in (
        ("no key frames", good.replace(b"stss", b"free")),
        ("key frames that are not there", changed(good, b"stss", 8, b"\xff\xff\xff\xff")),
        ("2^32 key frames", changed(good, b"stss", 4, b"\xff\xff\xff\xff")),
        ("2^32 sizes", changed(good, b"stsz", 8, b"\xff\xff\xff\xff")),
        ("sizes of 2^32", changed(good, b"stsz", 12, b"\xff\xff\xff\xff")),
        ("2^32 chunks", changed(good, b"stsc", 4, b"\xff\xff\xff\xff")),
        ("samples of 2^32", changed(good, b"stsc", 12, b"\xff\xff\xff\xff")),
        ("offsets beyond the end", changed(good, b"stco", 8, b"\xff\xff\xff\xff")),
        ("2^32 offsets", changed(good, b"stco", 4, b"\xff\xff\xff\xff")),
        ("2^32 edits", changed(good, b"elst", 4, b"\xff\xff\xff\xff")),
        ("a box of 2^64", changed(good, b"moov", -8, b"\x00\x00\x00\x01")),
        ("boxes within boxes", good[:32] + b"".join(struct.pack(">I", 8 * n) + b"moov" for n in range(MANY, 0, -1))),
        ("no seeking", mkv.replace(b"\x1c\x53\xbb\x6b", b"\xec\x53\xbb\x6b")),
        ("an MKV without end", mkv[:40] + b"\x01\xff\xff\xff\xff\xff\xff\xff" + mkv[48:]),
    ):
        target.strike(name, **two_frames(file))
    for percent in range(0, 100, 20):
        target.strike(f"{percent} %", **two_frames(good[: len(good) * percent // 100]))
    target.must_be_right()


def test_rotations_that_are_none(target: Target, tmp_path: Path) -> None:
    good = mp4(tmp_path, matrix=(0, 1, -1, 0))
    for name, matrix in (
        ("nothing", bytes(36)),
        ("everything", b"\x7f\xff\xff\xff" * 9),
        ("slanted", bytes(range(36))),
    ):
        target.strike(name, **two_frames(changed(good, b"tkhd", 40, matrix)))
    target.strike("none", RIGHT, **two_frames(mp4(tmp_path)))
    target.must_be_right()


def test_what_is_no_video(target: Target, within: Within, tmp_path: Path) -> None:
    """Sound, lists of other files, and programs: no file is read, and no request leaves."""
    sound = sound_only(tmp_path / "sound.mp4").read_bytes()
    target.strike("sound", "has no pictures, only sound or nothing", **two_frames(sound))
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(mp4(tmp_path))
    url = f"http://127.0.0.1:{within.port}/film.mp4"
    for place in (url, str(secret)):
        for name, text in (
            ("HLS", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{place}\n#EXT-X-ENDLIST"),
            ("concat", f"ffconcat version 1.0\nfile '{place}'\n"),
            ("DASH", f'<?xml version="1.0"?><MPD><Period><BaseURL>{place}</BaseURL></Period></MPD>'),
            (
                "SDP",
                f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{place}\n",
            ),
            ("ASX", f'<asx><entry><ref href="{place}"/></entry></asx>'),
            ("a list of pictures", f"{place}/%d.png"),
        ):
            target.strike(name, UNKNOWN, **two_frames(text.encode()))
    target.strike("a track elsewhere", **two_frames(elsewhere(mp4(tmp_path), url)))
    target.strike("a track in a file", **two_frames(elsewhere(mp4(tmp_path), str(secret))))
    assert within.visits == 0
    for name, file in (("nothing", b""), ("zeros", bytes(100_000)), ("a program", b"\x7fELF" + bytes(1000))):
        target.strike(name, "The video is ", video=uri(file, "video/mp4"))
    target.must_be_right()


def elsewhere(file: bytes, place: str) -> bytes:
    """An MP4 that says that its data is in another file; its boxes become no longer."""
    reference = file.index(b"url \x00\x00\x00\x01")
    return file[:reference] + b"url \x00\x00\x00\x00" + file[reference + 8 :] + place.encode()
