"""Stop strings, against a plain search in the text so far."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from kimi_vl.output.stop import StopMatcher

LETTERS = st.text("ab◁\n", max_size=12)
STOPS = st.lists(st.text("ab◁\n", min_size=1, max_size=4), max_size=8)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the first stop string that is complete, read character by character."""
    for end in range(len(text) + 1):
        starts = [found for stop in stops if (found := text[:end].find(stop)) >= 0]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(LETTERS, STOPS, st.lists(st.integers(0, 12), max_size=6))
@example("abab", ["bab", "ab"], [1, 2])
@example("aab", ["ab"], [2])
def test_any_cutting_ends_where_a_plain_search_does(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    wanted, matched = expected(text, stops)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = ""
    for start, end in pairwise(places):
        out += matcher.feed(text[start:end])
        assert wanted.startswith(out), "nothing of a stop string goes out"
        undecided = max((n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])), default=0)
        assert matcher.matched or len(out) >= end - undecided, "no more is held back than could become one"
    out += matcher.close()
    assert (out, matcher.matched) == (wanted, matched)
    assert matcher.close() == ""
    if matched:
        assert matcher.feed("more") == ""
