"""The budget of the thinking, over texts that a model might write, in any tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_vl.model.variants import WEIGHTS
from kimi_vl.output.budget import ENOUGH, PATIENCE, ThinkingBudget
from kimi_vl.output.thinking import CLOSING, OPENING
from kimi_vl.prompt.tokenizer import TikTokenTokenizer

tokenizer = TikTokenTokenizer.from_pretrained(WEIGHTS / "tiny")
MARKER = tokenizer.encode_text(CLOSING)


def forced(budget: int, tokens: list[int]) -> tuple[int, str]:
    """How many tokens came before some were forced, and the text of these; all and none if none were."""
    watch = ThinkingBudget(budget, tokenizer)
    for count, token in enumerate(tokens, start=1):
        if following := list(watch(token)):
            return count, text(following)
    return len(tokens), ""


def text(tokens: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")


def whole_after(tokens: list[int], least: int) -> int:
    """After how many tokens, at least so many, no character is half there, unless it is that of a closing marker."""
    return next(n for n in range(least, len(tokens) + 1) if tokens[n - 1] == MARKER[0] or "�" not in text(tokens[:n]))


@given(st.text("a 1◁/think▷😀\n", max_size=40), st.integers(1, 50), st.booleans(), st.sampled_from(["", "\n ", "◁"]))
def test_thinking_ends_at_the_limit_or_before(words: str, budget: int, by_bytes: bool, before: str) -> None:
    words = words.replace(CLOSING, "")
    opening = tokenizer.encode_text(before + OPENING)
    body = (
        [token for char in words for token in tokenizer.encode_text(char)] if by_bytes else tokenizer.encode_text(words)
    )
    count, following = forced(budget, [*opening, *body, *MARKER, *tokenizer.encode_text("The answer.")])
    if before == "◁":  # then it is no thinking
        assert following == ""
    elif len(body) >= budget:
        assert count == len(opening) + whole_after(body, budget)
        assert following.endswith("think▷")
    elif len(body) + len(MARKER) > budget:
        begun = budget - len(body)
        assert count == len(opening) + budget
        assert following == text(MARKER[begun:])
    else:
        assert following == ""


@pytest.mark.parametrize("begun", range(len(MARKER)))
def test_in_a_closing_marker_the_rest_of_it_is_forced(begun: int) -> None:
    tokens = [*tokenizer.encode_text(OPENING), *tokenizer.encode_text("Hm.\n"), *MARKER]
    thought = len(tokenizer.encode_text("Hm.\n"))
    watch = ThinkingBudget(thought + begun, tokenizer)
    following = next(list(ids) for token in tokens if (ids := watch(token)))
    expected = MARKER[begun:] if begun else [*tokenizer.encode_text(ENOUGH), *MARKER]
    assert following == expected


@pytest.mark.parametrize("character", ["é", "月", "😀"])
def test_a_character_is_not_cut(character: str) -> None:
    body = tokenizer.encode_text(character)
    assert len(body) > 1, "the tiny vocabulary spells this character with several tokens"
    tokens = [*tokenizer.encode_text(OPENING), *body]
    for budget in range(1, len(body) + 1):
        assert forced(budget, [*tokens, *body]) == (len(tokens), ENOUGH + CLOSING)


def test_a_character_that_never_ends_is_waited_for_in_vain_for_a_while_only() -> None:
    opening, half = tokenizer.encode_text(OPENING), tokenizer.encode_text("😀")[0]
    tokens = [*opening, half, *[tokenizer.control["[PAD]"]] * 2 * PATIENCE]
    assert forced(1, tokens) == (len(opening) + 1 + PATIENCE, ENOUGH + CLOSING)


def test_a_thinking_is_closed_once() -> None:
    watch = ThinkingBudget(1, tokenizer)
    tokens = tokenizer.encode_text(OPENING + "one two three")
    assert [bool(watch(token)) for token in tokens].count(True) == 1


def test_a_second_thinking_is_answer() -> None:
    _, following = forced(9, tokenizer.encode_text(f"{OPENING}a{CLOSING}{OPENING}one two three four"))
    assert following == ""
