"""Untrusted PDFs → pages as RGB pictures, as a viewer shows them."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import ConfinedReader, Process
from kimi_vl.media.images import ordinal
from kimi_vl.media.sources import Fetching, Source, open_source

MAX_PAGES = 1000  # in a request; more do not fit in any context
MAX_PICKS = 1000  # characters
PART = re.compile(r"\s*([0-9]{1,9})\s*(?:(-)\s*([0-9]{1,9})?\s*)?")
LAST = 2**32  # beyond every document's last page


class Documents(ConfinedReader):
    """The picked pages of some PDFs."""

    kind: ClassVar = "page"
    enlarges: ClassVar = True  # a page has no resolution of its own

    def __init__(
        self,
        sources: Sequence[Source],
        pages: str,
        max_bytes: int,
        seconds: int,
        fetching: Fetching,
    ) -> None:
        subject = "the document" if len(sources) == 1 else "the documents"
        super().__init__(lambda: Process("kimi_vl.media.pdf_pages"), subject, seconds)
        self._sources, self._picks, self._max_bytes = sources, parse_pages(pages), max_bytes
        self._fetching = fetching
        self.introductions: list[str] = []
        self.sizes: list[tuple[float, float]] = []

    def open(self) -> None:
        """Finds out which pages there are: `introductions` and `sizes`, in points. Nothing is rendered.

        Raises:
            InvalidRequest: a file cannot be had, is too large, no PDF, damaged or protected, or has none of the picked
                pages.
        """
        names = [_name(place) for place in range(len(self._sources))]
        with ExitStack() as files:
            opened = [
                files.enter_context(open_source(source, name, "PDF", self._max_bytes, self._fetching))
                for source, name in zip(self._sources, names, strict=True)
            ]
            counts = self.start(opened, {"names": names})["counts"]
        picked = pick_pages(self._picks, counts)
        self.sizes = [(width, height) for width, height in self.ask({"picked": picked})["sizes"]]
        self.introductions = [
            f"Page {page} of FILE {place}:" for place, pages in enumerate(picked, start=1) for page in pages
        ]


def parse_pages(text: str) -> list[range]:
    """Page numbers, from 1, as "1-5,8,12-" picks them: ranges that ascend and do not touch. Nothing picks all.

    Raises:
        InvalidRequest: it is not such a text.
    """
    if not text.strip():
        return [range(1, LAST)]
    if len(text) > MAX_PICKS:
        raise InvalidRequest(f"pages has {len(text):,} characters and the limit is {MAX_PICKS:,}; pick longer ranges.")
    picks: list[range] = []
    for part in text.split(","):
        match = PART.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[3] or LAST - 1) if match and match[2] else first
        if not 1 <= first <= last:
            raise InvalidRequest('pages must be like "1-5,8" or "12-": numbers from 1, and ranges that go up.')
        picks.append(range(first, last + 1))
    picks.sort(key=lambda pick: pick.start)
    joined = picks[:1]
    for pick in picks[1:]:
        if pick.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, pick.stop))
        else:
            joined.append(pick)
    return joined


def pick_pages(picks: Sequence[range], counts: Sequence[int]) -> list[list[int]]:
    """The picked pages of each document, ascending and each once.

    Args:
        picks: what parse_pages returned; a range may end behind a document's end.
        counts: how many pages each document has.
    Raises:
        InvalidRequest: a pick begins behind the end of all, a document has none of them, or there are too many.
    """
    if picks[-1].start > max(counts):
        raise InvalidRequest(f"pages picks page {picks[-1].start:,} and the last is {max(counts):,}; pick others.")
    clipped = [[range(pick.start, min(pick.stop, count + 1)) for pick in picks] for count in counts]
    for place, count in enumerate(counts):
        if not any(clipped[place]):
            raise InvalidRequest(f"{_name(place)} ends at page {count:,}, before all that pages picks; leave it out.")
    total = sum(len(pick) for document in clipped for pick in document)
    if total > MAX_PAGES:
        raise InvalidRequest(f"The request has {total:,} pages and the limit is {MAX_PAGES:,}; pick some with pages.")
    return [[page for pick in document for page in pick] for document in clipped]


def _name(place: int) -> str:
    return f"The {ordinal(place)} document"
