"""Untrusted picture files → RGB pictures, as a viewer shows them."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, ClassVar

from PIL import Image

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import ConfinedReader, Process

MODULE = "kimi_vl.media.image_files"  # of the process that reads them
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def ordinal(position: int) -> str:
    """Which picture, in words: 0 is the first."""
    return ORDINALS[position] if position < len(ORDINALS) else f"{position + 1}th"


class Images(ConfinedReader):
    """Some picture files, each one picture."""

    kind: ClassVar = "image"

    def __init__(
        self,
        files: Sequence[BinaryIO],
        max_pixels: int,
        max_request_pixels: int,
        seconds: int,
        started: Callable[[], Process] = lambda: Process(MODULE),
    ) -> None:
        """
        Args:
            files: open for reading; they are closed by `open`.
            max_pixels: of a picture.
            max_request_pixels: of all of them together.
            seconds: to read all of them in.
            started: has a process of MODULE that waits.
        """
        super().__init__(started, "the picture" if len(files) == 1 else "the pictures", seconds)
        self._files, self._max_pixels, self._max_request_pixels = files, max_pixels, max_request_pixels
        self.sizes: list[tuple[int, int]] = []

    def open(self) -> None:
        """Finds out the `sizes`, in pixels as stored; no pixel is decoded.

        Raises:
            InvalidRequest: a file is empty, no picture or damaged, or it or all of them have too many pixels.
        """
        names = [f"The {ordinal(position)} picture" for position in range(len(self._files))]
        try:
            answer = self.start(self._files, {"names": names, "max_pixels": self._max_pixels})
        finally:
            for file in self._files:
                file.close()
        self.sizes = [(width, height) for width, height in answer["sizes"]]
        pixels = sum(width * height for width, height in self.sizes)
        if pixels > self._max_request_pixels:
            raise InvalidRequest(
                f"The pictures have {pixels / 1e6:.0f} megapixels together and the limit is "
                f"{self._max_request_pixels / 1e6:g}; send smaller ones, or fewer."
            )

    def read(self, most: int) -> Iterator[Image.Image]:
        """Opens and reads each of them, scaled down to at most so many pixels.

        Raises:
            InvalidRequest: as for open, or one is damaged, or takes too much memory or time.
        """
        self.open()
        scales = [min(1, math.sqrt(most / (width * height))) for width, height in self.sizes]
        self.send_sizes(
            [
                (max(1, int(width * scale)), max(1, int(height * scale)))
                for scale, (width, height) in zip(scales, self.sizes, strict=True)
            ]
        )
        for position in range(len(self.sizes)):
            yield self.picture(position)
