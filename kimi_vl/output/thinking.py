"""Keeps the thinking apart from the answer while the text streams in."""

from dataclasses import dataclass

OPENING, CLOSING = "◁think▷", "◁/think▷"


@dataclass(frozen=True)
class Delta:
    """What is new since the last one."""

    thinking: str = ""
    answer: str = ""

    def __bool__(self) -> bool:
        return bool(self.thinking or self.answer)


class ThinkingSplitter:
    """Splits a model's output, fed in chunks cut anywhere, into thinking and answer.

    Thinking is what stands between an opening marker at the very start (whitespace before it is dropped) and the first
    closing marker; everything else is answer, verbatim. Joining the deltas gives the same two strings for any cutting
    of the same text, and no text is held back that could not still become a marker. Of a model that does not think,
    everything is answer.
    """

    def __init__(self, thinks: bool = True) -> None:
        self._held = ""
        self._section = self._start if thinks else self._answer

    @property
    def undecided(self) -> bool:
        """Nothing has come but, at most, a beginning of the opening marker."""
        return self._section == self._start

    @property
    def in_thinking(self) -> bool:
        """The opening marker has come, the closing one has not."""
        return self._section == self._thinking

    def feed(self, text: str) -> Delta:
        """Takes the next chunk and returns what it settles."""
        self._held += text
        return self._section()

    def close(self) -> Delta:
        """The output has ended: what was held back belongs to the section it stands in."""
        rest, self._held = self._held, ""
        return Delta(thinking=rest) if self.in_thinking else Delta(answer=rest)

    def _start(self) -> Delta:
        text = self._held.lstrip()
        if text.startswith(OPENING):
            self._held = text.removeprefix(OPENING)
            self._section = self._thinking
        elif OPENING.startswith(text):  # also when it is empty: the marker may still come
            return Delta()
        else:
            self._section = self._answer
        return self._section()

    def _thinking(self) -> Delta:
        thinking, closing, rest = self._held.partition(CLOSING)
        if closing:
            self._held = rest
            self._section = self._answer
            return Delta(thinking, self._answer().answer)
        settled = len(thinking) - overlap(thinking, CLOSING)
        self._held = thinking[settled:]
        return Delta(thinking=thinking[:settled])

    def _answer(self) -> Delta:
        answer, self._held = self._held, ""
        return Delta(answer=answer)


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of the text that is a beginning of the marker, and not all of it."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
