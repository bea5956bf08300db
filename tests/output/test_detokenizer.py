from pathlib import Path

import pytest

from kimi_vl.output.detokenizer import Detokenizer
from kimi_vl.prompt.tokenizer import TikTokenTokenizer

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> TikTokenTokenizer:
    return TikTokenTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("text", ["◁think▷3◁/think▷", "naïve 😀👩‍👩‍👧‍👦 月之暗面", "abc"])
def test_streams_whole_characters_that_join_to_the_text(tokenizer: TikTokenTokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokenizer.encode_text(text)]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_half_a_character_waits_for_the_rest(tokenizer: TikTokenTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    first, *rest = tokenizer.encode_text("😀")
    assert rest, "the tiny vocabulary spells this character with several tokens"
    assert detokenizer.feed(first) == ""
    assert detokenizer.within_character
    assert "".join(detokenizer.feed(token) for token in rest) == "😀"
    assert not detokenizer.within_character


def test_control_tokens_have_no_text(tokenizer: TikTokenTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = [*tokenizer.encode_text("a"), tokenizer.control["<|media_pad|>"], *tokenizer.encode_text("b")]
    assert "".join(detokenizer.feed(token) for token in ids) == "ab"


def test_bytes_that_are_no_text_become_the_replacement_character(tokenizer: TikTokenTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    half, letter = tokenizer.encode_text("😀")[0], tokenizer.encode_text("a")[0]
    assert detokenizer.feed(half) + detokenizer.feed(letter) == "�a"
