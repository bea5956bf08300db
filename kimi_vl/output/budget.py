"""Keeps the thinking within a budget."""

from collections.abc import Sequence

from kimi_vl.output.detokenizer import Detokenizer
from kimi_vl.output.thinking import CLOSING, ThinkingSplitter
from kimi_vl.prompt.tokenizer import TikTokenTokenizer

ENOUGH = "\n\nI have thought enough and answer now.\n"
PATIENCE = 16  # tokens; Burmese text has had 4 in a row, each of which ended inside a character


class ThinkingBudget:
    """Told each token that the model chose, says which must follow: those that close a thinking at its limit.

    What counts are the tokens that the model itself chose between its two markers. The markers and what is forced, a
    sentence and the closing marker, come on top. Where the limit falls into a closing marker, the rest of it is forced;
    into another character, the model goes on until none is left half, for at most PATIENCE tokens.
    """

    def __init__(self, tokens: int, tokenizer: TikTokenTokenizer) -> None:
        """
        Args:
            tokens: the limit, at least 1.
            tokenizer: of the model.
        """
        self._left = tokens
        self._forced = False
        self._detokenizer = Detokenizer(tokenizer)
        self._splitter = ThinkingSplitter()
        self._sentence = tokenizer.encode_text(ENOUGH)
        self._closing = tokenizer.encode_text(CLOSING)  # apart: as the model writes it, not joined with what precedes
        self._last: list[int] = []  # tokens of the thinking, as many as a closing marker has, less one

    def __call__(self, token: int) -> Sequence[int]:
        """The tokens that must follow this one; none in nearly all cases."""
        if self._forced:
            return ()
        opened = self._splitter.in_thinking
        self._splitter.feed(self._detokenizer.feed(token))
        if not opened or not self._splitter.in_thinking:
            return ()
        self._left -= 1
        self._last = [*self._last, token][1 - len(self._closing) :]
        if self._left > 0:
            return ()
        begun = next((n for n in range(len(self._last), 0, -1) if self._last[-n:] == self._closing[:n]), 0)
        if not begun and self._detokenizer.within_character and self._left > -PATIENCE:
            return ()
        self._forced = True
        return self._closing[begun:] if begun else [*self._sentence, *self._closing]
