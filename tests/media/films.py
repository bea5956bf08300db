"""Videos made in the tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, ImageDraw

MILLISECOND = Fraction(1, 1000)
SIZE = (160, 120)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def numbered(text: str) -> Image.Image:
    """A frame that shows a number."""
    picture = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(picture).text((20, 25), text, fill="black", font_size=60)
    return picture


def coloured(index: int) -> Image.Image:
    """A frame whose number can be read off its colours, whatever a codec does to them; see `number_of`."""
    picture = Image.new("RGB", SIZE)
    for place in range(4):
        picture.paste(COLOURS[index // 4**place % 4], (place * 40, 0, place * 40 + 40, SIZE[1]))
    return picture


def number_of(picture: Image.Image) -> int:
    """Which of the coloured frames this is."""
    number = 0
    for place in range(4):
        seen = picture.resize(SIZE).getpixel((place * 40 + 20, 60))
        assert isinstance(seen, tuple)
        distances = [sum((a - b) ** 2 for a, b in zip(seen, colour, strict=True)) for colour in COLOURS]
        assert min(distances) < 10_000
        number += distances.index(min(distances)) * 4**place
    return number


def film(
    path: Path,
    frames: Sequence[Image.Image],
    times: Sequence[int] = (),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    matrix: Sequence[int] | None = None,
    pixel_aspect: Fraction | None = None,
    sound: bool = False,
) -> Path:
    """A video file; its type goes by its name.

    Args:
        times: when each frame begins, in milliseconds; else every 40.
        matrix: a, b, c and d of its display matrix.
        sound: whether a sound track comes before the pictures.
    """
    with av.open(str(path), "w") as container:
        if sound:
            container.add_stream("aac", rate=48000)
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.gop_size = pixels, 12
        stream.time_base = stream.codec_context.time_base = MILLISECOND
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if matrix:
            a, b, c, d = (number * 65536 for number in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for picture, time in zip(frames, times or range(0, 40 * len(frames), 40), strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound_only(path: Path) -> Path:
    """A file without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate, frame.pts = 48000, 0
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
