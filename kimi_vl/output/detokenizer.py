"""Token ids → text as it streams, never half a character."""

from codecs import getincrementaldecoder

from kimi_vl.prompt.tokenizer import TikTokenTokenizer


class Detokenizer:
    """Turns token ids into text one at a time; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: TikTokenTokenizer) -> None:
        self._tokenizer = tokenizer
        # A byte sequence that is no UTF-8 becomes U+FFFD, as in every decoder; special tokens have no text.
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")

    @property
    def within_character(self) -> bool:
        """What came last is half a character, or may be."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token: int) -> str:
        """The text that this token completes. At the end, half a character that is still waiting is dropped."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))
