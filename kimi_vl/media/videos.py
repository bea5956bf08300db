"""Untrusted videos → frames as RGB pictures, as a player shows them."""

from typing import ClassVar

from kimi_vl.media.confined import ConfinedReader, Process
from kimi_vl.media.sources import Fetching, Source, open_source

MAX_FRAMES = 256  # of a request
EARLY = 0.1  # seconds; at 29.97 frames a second the frame that is seen at 0:01 has begun at 0:00.967


class Video(ConfinedReader):
    """Some frames of a video."""

    kind: ClassVar = "frame"
    enlarges: ClassVar = False

    def __init__(
        self,
        source: Source,
        frames: int,
        fps: float,
        max_bytes: int,
        max_pixels: int,
        seconds: int,
        fetching: Fetching,
    ) -> None:
        super().__init__(lambda: Process("kimi_vl.media.video_frames"), "the video", seconds)
        self._source, self._max_bytes, self._fetching = source, max_bytes, fetching
        self._request = {"frames": frames, "fps": fps, "max_frames": MAX_FRAMES, "max_pixels": max_pixels}
        self.introductions: list[str] = []
        self.sizes: list[tuple[float, float]] = []

    def open(self) -> None:
        """Finds out which frames there are: `introductions`, and `sizes` in pixels. Only one frame is decoded.

        Raises:
            InvalidRequest: the file cannot be had, is too large, no video, damaged or without pictures, or has too many
                frames.
        """
        with open_source(self._source, "The video", "video", self._max_bytes, self._fetching) as file:
            answer = self.start([file], self._request)
        self.sizes = [(answer["width"], answer["height"])] * len(answer["times"])
        self.introductions = [f"{_clock(seconds)}:" for seconds in answer["times"]]


def _clock(seconds: float) -> str:
    """M:SS, or H:MM:SS from an hour on, of a frame that begins then."""
    minutes, rest = divmod(int(seconds + EARLY), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
