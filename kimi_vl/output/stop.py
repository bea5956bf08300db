"""Ends a text before the first of some strings, while it streams in."""

from collections.abc import Sequence

from kimi_vl.output.thinking import overlap


class StopMatcher:
    """Passes a text on, fed in chunks cut anywhere, up to the first place where a stop string begins.

    What might still become a stop string is held back until that is decided, so nothing of one ever goes out. Where
    several are complete with the same character, the one that begins first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """
        Args:
            stops: the strings, none of them empty.
        """
        self.matched = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes the next chunk and returns what can go out; nothing any more once a stop string has come."""
        if self.matched:
            return ""
        self._held += text
        ends = {stop: found + len(stop) for stop in self._stops if (found := self._held.find(stop)) >= 0}
        if ends:
            self.matched = True
            earliest = min(ends.values())  # what a stream of single characters would have met first
            return self._release(min(earliest - len(stop) for stop, end in ends.items() if end == earliest))
        return self._release(len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0))

    def close(self) -> str:
        """The text has ended: returns what was held back and became no stop string."""
        return "" if self.matched else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
