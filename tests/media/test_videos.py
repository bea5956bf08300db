"""Untrusted videos: which frames are taken, what they look like, and what is refused."""

import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.sources import Fetching
from kimi_vl.media.video_frames import Stream, open_film, pick_frames
from kimi_vl.media.videos import Video
from tests.media.films import SIZE, coloured, film, number_of, sound_only

KINDS = {
    "film.mp4": {},
    "film.mov": {"codec": "mpeg4"},
    "film.mkv": {},
    "film.webm": {"codec": "libvpx-vp9"},
    "film.gif": {"codec": "gif", "pixels": "rgb8"},
}
NOTHING = Fetching(seconds=0, private=False)
Seen = tuple[list[str], list[Image.Image]]


def seen(path: Path, frames: int = 16, fps: float = 0, seconds: int = 20, max_pixels: int = 1_000_000) -> Seen:
    """The frames in their own size, and how they are introduced."""
    video = Video(path, frames, fps, 20_000_000, max_pixels, seconds, NOTHING)
    try:
        video.open()
        sizes = [(int(width), int(height)) for width, height in video.sizes]
        video.send_sizes(sizes)
        return video.introductions, [video.picture(position) for position in range(len(sizes))]
    finally:
        video.close()


def numbers(path: Path, **options: Any) -> list[int]:
    return [number_of(picture) for picture in seen(path, **options)[1]]


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_taken_evenly_from_the_first_to_the_last(name: str, tmp_path: Path) -> None:
    path = film(tmp_path / name, [coloured(index) for index in range(61)], **KINDS[name])  # type: ignore[arg-type]
    assert numbers(path, frames=5) == [0, 15, 30, 45, 60]
    assert numbers(path, frames=1) == [30]
    assert numbers(path, frames=256) == list(range(61))
    assert numbers(path, fps=5) == list(range(0, 61, 5))
    assert seen(path, fps=1)[0] == ["0:00:", "0:01:", "0:02:"]


def test_an_animated_webp_that_is_partly_transparent(tmp_path: Path) -> None:
    frames = [coloured(index).convert("RGBA") for index in range(5)]
    frames[4].paste((0, 0, 0, 0), (120, 0, 160, 120))
    path = tmp_path / "film.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 900, 100, 100, 100], lossless=True)
    introductions, pictures = seen(path, frames=2)
    assert introductions == ["0:00:", "0:01:"]
    assert number_of(pictures[0]) == 0
    assert pictures[1].getpixel((140, 60)) == (255, 255, 255)
    assert numbers(path, fps=2) == [0, 1, 2]


def test_what_no_frame_of_an_animated_webp_covers_is_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (160, 120)) for _ in range(2)]
    for index, frame in enumerate(frames):
        frame.paste(coloured(index), (0, -60))
    path = tmp_path / "film.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(path).mode == "RGB", "the file has transparency nowhere"
    for picture in seen(path)[1]:
        assert picture.getpixel((10, 30)) != (255, 255, 255)
        assert picture.getpixel((10, 90)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_one_that_stands_still_is_one_frame(kind: str, tmp_path: Path) -> None:
    coloured(27).save(tmp_path / f"still.{kind}")
    assert number_of(seen(tmp_path / f"still.{kind}")[1][0]) == 27


def test_a_variable_frame_rate_goes_by_the_time_stamps(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 1000, 1500, 4000]
    path = film(tmp_path / "film.mp4", [coloured(index) for index in range(7)], times)
    assert numbers(path, frames=5) == [0, 4, 5, 6], "at 0, 1, 2, 3 and 4 seconds, the frame of 2 and 3 only once"
    assert seen(path, frames=5)[0] == ["0:00:", "0:01:", "0:01:", "0:04:"]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a phone held upright
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    ],
)
def test_a_turned_video_is_seen_upright(matrix: Sequence[int], turn: Image.Transpose | None, tmp_path: Path) -> None:
    stored = coloured(27)
    stored.paste((255, 255, 255), (0, 90, 160, 120))
    expected = stored if turn is None else stored.transpose(turn)
    (picture,) = seen(film(tmp_path / "film.mp4", [stored], matrix=matrix))[1]
    assert picture.size == expected.size
    for place in ((10, 10), (10, expected.height - 10), (expected.width - 10, 10)):
        wanted, got = expected.getpixel(place), picture.getpixel(place)
        assert isinstance(wanted, tuple)
        assert isinstance(got, tuple)
        assert max(abs(a - b) for a, b in zip(wanted, got, strict=True)) < 20


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", [coloured(1)], pixel_aspect=Fraction(4, 3))
    assert seen(path)[1][0].size == (213, 120)


def test_an_hour_is_introduced_as_one(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", [coloured(0), coloured(1), coloured(2)], [0, 61_000, 3_725_000])
    assert seen(path)[0] == ["0:00:", "1:01:", "1:02:05:"]


def test_nothing_is_decoded_behind_the_last_frame_that_is_needed_nor_before_a_key_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mp4", [coloured(index) for index in range(200)], codec="mpeg4")
    decoded: list[int] = []
    shown = Stream._decoded

    def counted(stream: Stream) -> Any:
        for at, frame in shown(stream):
            decoded.append(at)
            yield at, frame

    with path.open("rb") as file:
        opened = open_film(file, 1_000_000)
        monkeypatch.setattr(Stream, "_decoded", counted)
        (picture,) = opened.frames([100])
    assert number_of(picture) == 100
    assert len(decoded) <= 15, "a key frame comes every 12 frames"


@given(
    st.lists(st.floats(0.001, 50), min_size=1, max_size=60),
    st.integers(1, 256),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.3, 30.0]),
)
def test_picked_frames_are_those_shown_at_evenly_spaced_instants(gaps: list[float], count: int, fps: float) -> None:
    times = [sum(gaps[:index]) for index in range(len(gaps))]
    last = times[-1]
    if fps:
        instants = [index / fps for index in range(int(last * fps + 1e-6) + 1)]
    else:
        instants = [last / 2] if count == 1 else [last * index / (count - 1) for index in range(count)]
    expected = sorted({bisect_right(times, instant + 1e-6) - 1 for instant in instants})
    assert pick_frames(times, count, fps, 256) == expected


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25, 2)])
def test_a_frame_of_each_second_is_introduced_by_that_second(rate: Fraction, tmp_path: Path) -> None:
    times = [round(1000 * index / rate) for index in range(60)]
    path = film(tmp_path / "film.mp4", [coloured(index) for index in range(60)], times)
    seconds = range(int(times[-1] / 1000) + 1)
    assert seen(path, fps=1)[0] == [f"0:0{second}:" for second in seconds]


def test_more_frames_than_may_be_taken_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"lasts 999 seconds and video_fps 1 takes 1,000 frames of it, and the"):
        pick_frames(list(range(1000)), 16, 1, 256)
    assert len(pick_frames([0, 10**9], 16, 100, 256)) == 2


def without_index(path: Path) -> bytes:
    content = path.read_bytes()
    return content.replace(b"stss", b"free").replace(b"\x1c\x53\xbb\x6b", b"\xec\x53\xbb\x6b")


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv"])
def test_a_broken_index_gives_the_right_frames(name: str, tmp_path: Path) -> None:
    path = film(tmp_path / name, [coloured(index) for index in range(61)])
    path.write_bytes(without_index(path))
    assert numbers(path, frames=5) == [0, 15, 30, 45, 60]


def large(path: Path) -> bytes:
    return film(path.with_name("large.mp4"), [Image.new("RGB", (2000, 1000))]).read_bytes()


def shouting(path: Path) -> bytes:
    return sound_only(path.with_name("sound.mp4")).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: b"", "The video is empty; send an MP4, MOV, WebM, MKV, GIF or WebP file."),
        (lambda path: b"#EXTM3U\n/etc/passwd\n", "The video is of no known type; send an MP4"),
        (lambda path: b"ffconcat version 1.0\nfile /etc/passwd", "The video is of no known type"),
        (lambda path: bytes(20_000_001), "The video is larger than 20 MB, the limit; send a smaller file."),
        (lambda path: path.read_bytes()[:200], "The video is damaged or incomplete; send it again."),
        (lambda path: path.read_bytes()[:40] + bytes(5000), "The video is damaged or incomplete; send it again."),
        (lambda path: b"GIF89a", "The video is damaged or incomplete; send it again."),
        (lambda path: b"RIFF\x10\x00\x00\x00WEBPVP8X", "The video is damaged or incomplete; send it again."),
        (lambda path: b"\x1a\x45\xdf\xa3" + bytes(100), "The video is damaged or incomplete; send it again."),
        (large, "The video has frames of 2 megapixels and the limit is 1; send a smaller one."),
        (shouting, "The video has no pictures, only sound or nothing; send another."),
    ],
)
def test_refusals(content: Callable[[Path], bytes], message: str, tmp_path: Path) -> None:
    good = film(tmp_path / "film.mp4", [coloured(index) for index in range(5)])
    bad = tmp_path / "secret-name.mp4"
    bad.write_bytes(content(good))
    with pytest.raises(InvalidRequest) as refusal:
        seen(bad)
    assert message in str(refusal.value)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_image(coloured(0))))
        container.mux(stream.encode())
    with pytest.raises(InvalidRequest, match="The video has no pictures, only sound or nothing"):
        seen(tmp_path / "song.mp4")


def test_absurd_time_stamps_end_in_frames_or_a_sentence(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", [coloured(index) for index in range(6)], [0, 40, 80, 120, 160, 100_000_000])
    introductions, pictures = seen(path)
    assert [number_of(picture) for picture in pictures][0 :: len(pictures) - 1] == [0, 5]
    assert introductions[-1] == "27:46:40:"
    content = path.read_bytes()
    place = content.index(b"stts") + 16
    for delta in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        path.write_bytes(content[:place] + struct.pack(">I", delta) + content[place + 4 :])
        try:
            seen(path)
        except InvalidRequest as refusal:
            assert str(refusal).startswith("The video")


def test_sixteen_thousand_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")]
    path = film(tmp_path / "film.mp4", [frames[index == 15_999] for index in range(16_000)], codec="mpeg4")
    started = time.monotonic()
    introductions, pictures = seen(path, frames=3)
    assert time.monotonic() - started < 10
    assert introductions == ["0:00:", "5:20:", "10:40:"]
    assert [sum(picture.getpixel((8, 8))) > 300 for picture in pictures] == [True, True, False]  # type: ignore[arg-type]


def test_damage_anywhere_ends_in_frames_or_a_sentence(tmp_path: Path) -> None:
    good = {
        name: film(tmp_path / name, [coloured(index) for index in range(13)], **options).read_bytes()  # type: ignore[arg-type]
        for name, options in KINDS.items()
    }
    bad = tmp_path / "bad"

    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from(sorted(KINDS)), st.data())
    def damage(name: str, data: st.DataObject) -> None:
        content = bytearray(good[name])
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        bad.write_bytes(content)
        try:
            introductions, pictures = seen(bad, frames=3)
            assert len(introductions) == len(pictures) > 0
        except InvalidRequest as refusal:
            assert str(refusal).startswith(("The video ", "Reading the video "))

    damage()
