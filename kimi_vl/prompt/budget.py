"""How many tokens each picture may have, so that all pages and frames fit into the context."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from kimi_vl.errors import DeadlinePassed, InvalidRequest
from kimi_vl.prompt.image_processor import ImageProcessor

FLOOR = 64  # tokens of a picture, below which nothing can be read in it
ANSWER = 2048  # tokens kept free, if so many are asked for


@dataclass(frozen=True)
class Sized:
    """A page or frame that is not drawn yet."""

    kind: str  # page or frame
    width: float
    height: float
    enlarge: bool  # it has no resolution of its own, and fills what it gets

    def size(self, processor: ImageProcessor, most: int) -> tuple[int, int]:
        """(width, height) in pixels with at most so many tokens."""
        return processor.size_within(self.width, self.height, most, self.enlarge)


@dataclass(frozen=True)
class Budget:
    """A context and what of it is not for pictures."""

    processor: ImageProcessor
    context_length: int
    max_new_tokens: int
    text_tokens: Callable[[int], int]  # of the prompt without its pictures, with the first so many pages and frames
    deadline: float = math.inf  # of the request, on the clock of monotonic()

    def share(self, drawn: Sequence[Sized], images: int, most: int) -> int:
        """Most tokens of each picture with which all of them fit, the same for all; small ones take less.

        Args:
            drawn: the pages and frames, in the order of the prompt.
            images: how many pictures there are beside them, of unknown size.
            most: what the caller allows; 0 for the model's own limit.
        Raises:
            InvalidRequest: so little would be left for each that nothing could be read; the message says how many
                pages and frames would fit.
            DeadlinePassed: it took longer.
        """
        limit = self.processor.in_token_limit // math.prod(self.processor.merge_kernel_size)
        limit = min(most or limit, limit)
        floor = min(FLOOR, limit)
        text = self.text_tokens(len(drawn))
        choices = range(floor, limit + 1)
        fitting = bisect_left(choices, True, key=lambda share: self._lacks_room(text, drawn, images, share))
        if fitting:
            return choices[fitting - 1]
        kinds = " and ".join(f"{kind}s" for kind in sorted({each.kind for each in drawn}, reverse=True))

        def too_many(count: int) -> bool:
            return self._lacks_room(self.text_tokens(count), drawn[:count], images, floor)

        if too_many(1):
            raise InvalidRequest(
                f"Beside the rest of the prompt there is no room for {kinds}; shorten the text or send fewer pictures."
            )
        count = bisect_left(range(1, len(drawn) + 1), True, key=too_many)
        raise InvalidRequest(
            f"The request has {len(drawn):,} {kinds}, and even with {floor} tokens each only {count:,} fit beside the "
            "rest; ask for fewer."
        )

    def _lacks_room(self, text: int, drawn: Sequence[Sized], images: int, share: int) -> bool:
        if monotonic() >= self.deadline:  # a thousand pages of different sizes take seconds
            raise DeadlinePassed
        tokens = text + images * share + min(self.max_new_tokens, ANSWER)
        for each, count in Counter(drawn).items():
            tokens += count * self.processor.tokens(self.processor.grid(*each.size(self.processor, share)))
        return tokens > self.context_length
