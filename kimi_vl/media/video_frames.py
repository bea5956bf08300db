"""Video → some of its frames, in a process of its own (see confined.py)."""

import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import accumulate, chain, pairwise
from typing import Any, BinaryIO

import av
from av.stream import Disposition
from PIL import Image

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import Channel, Message
from kimi_vl.media.webp import leave_blank_transparent

TYPES_TO_SEND = "an MP4, MOV, WebM, MKV, GIF or WebP file"
EPSILON = 1e-6  # seconds that make no difference
WIDEST_PIXEL = 16  # times as wide as high; what claims more is a mistake
STILL = 100  # milliseconds of a frame that says none, as browsers take it
THREADS = 4  # of a decoder; each holds a frame
THREADED_PIXELS = 4_000_000  # of a frame; with more, as in 4K, there is one thread
WEBP_FRAMES = 10_000  # its decoder looks for each from the first on
WEBP_PIXELS = 1_000_000_000  # of all frames: to get to the last, each is drawn whole
TURNS = {  # by the first four numbers of a display matrix: how a stored point goes right and down
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
Damaged = InvalidRequest("The video is damaged or incomplete; send it again.")


def work(channel: Channel, request: Message) -> None:
    """Answers the size of the frames and the times of the picked ones, then sends them in the size that is wanted."""
    try:
        film = open_film(channel.files[0], request["max_pixels"])
        picked = pick_frames(film.times, request["frames"], request["fps"], request["max_frames"])
        width, height = film.size
        times = [film.times[index] - film.times[0] for index in picked]
        channel.send({"width": width, "height": height, "times": times})
        size = tuple(channel.receive()["sizes"][0])
        for picture in film.frames(picked):
            channel.send({}, _scaled(picture, size).tobytes())
    except (InvalidRequest, BrokenPipeError, MemoryError):
        raise
    except Exception:  # decoders raise whatever they meet
        raise Damaged from None


def pick_frames(times: Sequence[float], count: int, fps: float, most: int) -> list[int]:
    """Which frames to take.

    Args:
        times: when each frame begins, in seconds, ascending.
        count: how many, evenly from the first to the last; of one, the middle.
        fps: unless 0, instead of that so many for each second, from the first on.
        most: how many there may be.
    Returns:
        Indices, ascending: of each instant that which is shown then. Instants in the same frame take it once.
    Raises:
        InvalidRequest: fps takes too many.
    """
    first, lasts = times[0], times[-1] - times[0]
    if not fps:
        share = [0.5] if count == 1 else [index / (count - 1) for index in range(count)]
        return sorted({bisect_right(times, first + lasts * part + EPSILON) - 1 for part in share})
    instants = [math.ceil((time - first - EPSILON) * fps) for time in times]  # the first one in each frame
    picked = [index for index, (own, following) in enumerate(pairwise(instants)) if own < following]
    if instants[-1] <= (lasts + EPSILON) * fps:
        picked.append(len(times) - 1)
    if len(picked) > most:
        raise InvalidRequest(
            f"The video lasts {lasts:,.0f} seconds and video_fps {fps:g} takes {len(picked):,} frames of it, and the "
            f"limit is {most}; lower it, or use video_frames."
        )
    return picked


class Film(ABC):
    """Frames with their times."""

    size: tuple[int, int]  # as shown: width, height
    times: list[float]  # when each frame begins, in seconds, ascending

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Some frames as they are shown, in mode RGB; indices ascend, and nothing after the last is decoded."""


def open_film(file: BinaryIO, max_pixels: int) -> Film:
    """Reads what kind of video a file is, and which frames it has.

    Raises:
        InvalidRequest: the file is no video of a known type, or its frames are too large.
    """
    head = file.read(12)
    file.seek(0)
    if not head:
        raise InvalidRequest(f"The video is empty; send {TYPES_TO_SEND}.")
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return WebP(file, max_pixels)
    # Only these demuxers ever see a client's bytes; FFmpeg has some that open other files.
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return Stream(file, "matroska", max_pixels)
    if head[:4] == b"GIF8":
        return Stream(file, "gif", max_pixels)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return Stream(file, "mov", max_pixels)
    raise InvalidRequest(f"The video is of no known type; send {TYPES_TO_SEND}.")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidRequest(
            f"The video has frames of {width * height / 1e6:.0f} megapixels and the limit is {max_pixels / 1e6:g}; "
            "send a smaller one."
        )


class Stream(Film):
    """The video stream of a file that FFmpeg reads."""

    def __init__(self, file: BinaryIO, form: str, max_pixels: int) -> None:
        self._file, self._form, self._max_pixels = file, form, max_pixels
        self._seekable = True
        self._rewind()
        codec = self._stream.codec_context
        _check_pixels(codec.width, codec.height, max_pixels)
        packets = [
            (time, packet.is_keyframe)
            for packet in self._container.demux(self._stream)
            if packet.size and not packet.is_discard and (time := _time(packet)) is not None
        ]
        self._pts = sorted({time for time, _ in packets})
        self._keys = sorted({time for time, key in packets if key})
        if not self._pts:
            raise InvalidRequest("The video has no frames; send another.")
        base = float(self._stream.time_base or 1)
        self.times = [time * base for time in self._pts]
        self._rewind()
        first = next(self._decoded(), None)
        if not first:
            raise Damaged
        self.size = self._shown(first[1]).size

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        self._rewind()
        decoded = self._decoded()
        before, following = None, next(decoded, None)
        for time in (self._pts[index] for index in indices):
            key = self._keys[max(0, bisect_right(self._keys, time) - 1)] if self._keys else time
            if self._seekable and following and key > following[0]:
                decoded = self._decoded_from(key)
                before, following = None, next(decoded, None)
            while following and following[0] < time:
                before, following = following, next(decoded, None)
            shown = following if following and (following[0] == time or not before) else before
            if not shown:
                raise Damaged
            yield self._shown(shown[1])

    def _rewind(self) -> None:
        self._file.seek(0)
        self._container = av.open(self._file, "r", format=self._form)
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise InvalidRequest("The video has no pictures, only sound or nothing; send another.")
        self._stream = streams[0]
        self._stream.codec_context.thread_type = "AUTO"
        codec = self._stream.codec_context
        codec.thread_count = THREADS if codec.width * codec.height <= THREADED_PIXELS else 1

    def _decoded_from(self, key: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames from a key frame on; from the beginning, once and for all, where the file's index is wrong."""
        with suppress(av.FFmpegError):
            self._container.seek(key, stream=self._stream)
            decoded = self._decoded()
            first = next(decoded, None)
            if first and first[0] <= key:
                return chain([first], decoded)
        self._seekable = False
        self._rewind()
        return self._decoded()

    def _decoded(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames from here on with their times; what is damaged is left out."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()  # of the last one, which is empty: what is still waiting
            except av.FFmpegError:
                continue
            for frame in frames:
                _check_pixels(frame.width, frame.height, self._max_pixels)
                if (time := _time(frame)) is not None:
                    yield time, frame

    def _shown(self, frame: av.VideoFrame) -> Image.Image:
        """In RGB, over white, with square pixels, and turned as its display matrix says."""
        mode, form = ("RGBA", "rgba") if any(part.is_alpha for part in frame.format.components) else ("RGB", "rgb24")
        plane = frame.reformat(format=form, threads=1).planes[0]  # each frame would keep its threads, and their stacks
        pixels: Any = memoryview(plane)
        picture = Image.frombuffer(mode, (frame.width, frame.height), pixels, "raw", mode, plane.line_size, 1)
        if mode == "RGBA":
            picture = _over_white(picture)
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        if aspect != 1 and 1 / WIDEST_PIXEL < aspect < WIDEST_PIXEL:
            picture = picture.resize((max(1, round(picture.width * aspect)), picture.height))
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return picture
        a, b, _, c, d, *_ = memoryview(matrix).cast("B").cast("i")
        turn = TURNS.get((_sign(a), _sign(b), _sign(c), _sign(d)))
        return picture if turn is None else picture.transpose(turn)


class WebP(Film):
    """An animated WebP, or one that stands still: FFmpeg cannot read those that move."""

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        canvas, durations = _webp_frames(file)
        _check_pixels(*canvas, max_pixels)
        if len(durations) > WEBP_FRAMES or len(durations) * canvas[0] * canvas[1] > WEBP_PIXELS:
            raise InvalidRequest("The video is a WebP with too many frames for its size; send it as an MP4.")
        file.seek(0)
        self._picture = Image.open(file, formats=("WEBP",))
        leave_blank_transparent(self._picture)
        self.size = self._picture.size
        _check_pixels(*self.size, max_pixels)
        starts = accumulate((duration or STILL for duration in durations), initial=0)
        self.times = [
            start / 1000 for start, _ in zip(starts, range(getattr(self._picture, "n_frames", 1)), strict=False)
        ]

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            self._picture.seek(index)
            yield _over_white(self._picture)


def _webp_frames(file: BinaryIO) -> tuple[tuple[int, int], list[int]]:
    """(width, height) of an animated WebP and the milliseconds of its frames, of at most one more than may be.

    Of one that stands still, (0, 0) and none.
    """
    canvas, durations = (0, 0), list[int]()
    file.seek(12)
    while len(durations) <= WEBP_FRAMES and len(head := file.read(8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        content = file.read(min(length, 16))
        if name == b"VP8X":
            canvas = int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
        elif name == b"ANMF":
            durations.append(int.from_bytes(content[12:15], "little"))
        file.seek(length + length % 2 - len(content), os.SEEK_CUR)
    return canvas, durations


def _over_white(picture: Image.Image) -> Image.Image:
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")


def _scaled(picture: Image.Image, size: tuple[int, ...]) -> Image.Image:
    width, height = size
    return picture if picture.size == size else picture.resize((width, height), Image.Resampling.BICUBIC)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _time(of: av.Packet | av.VideoFrame) -> int | None:
    return of.dts if of.pts is None else of.pts
