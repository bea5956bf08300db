import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_vl.output.thinking import CLOSING, OPENING, ThinkingSplitter

CASES = {
    "both markers": ("◁think▷ab◁/think▷cd", "ab", "cd"),
    "white space before the opening marker is dropped": (" \n◁think▷a◁/think▷b", "a", "b"),
    "white space elsewhere is kept": ("◁think▷\na \n◁/think▷\n b ", "\na \n", "\n b "),
    "no markers": ("just an answer", "", "just an answer"),
    "text before the opening marker": ("x◁think▷a◁/think▷b", "", "x◁think▷a◁/think▷b"),
    "never closed": ("◁think▷a b", "a b", ""),
    "closed without an opening": ("a◁/think▷b", "", "a◁/think▷b"),
    "begins with the closing marker": ("◁/think▷b", "", "◁/think▷b"),
    "a marker mentioned in the answer": ("◁think▷a◁/think▷say ◁/think▷", "a", "say ◁/think▷"),
    "a second block": ("◁think▷a◁/think▷b◁think▷c◁/think▷d", "a", "b◁think▷c◁/think▷d"),
    "the opening marker again inside": ("◁think▷a◁think▷b◁/think▷c", "a◁think▷b", "c"),
    "ends inside the closing marker": ("◁think▷a◁/thi", "a◁/thi", ""),
    "ends inside the opening marker": (" ◁thi", "", " ◁thi"),
    "a marker begun twice": ("◁think▷◁/thin◁/think▷b", "◁/thin", "b"),
    "empty thinking": ("◁think▷◁/think▷b", "", "b"),
    "only white space": (" \n", "", " \n"),
    "nothing": ("", "", ""),
}


def split(chunks: list[str]) -> tuple[str, str]:
    splitter = ThinkingSplitter()
    deltas = [*(splitter.feed(chunk) for chunk in chunks), splitter.close()]
    return "".join(d.thinking for d in deltas), "".join(d.answer for d in deltas)


@pytest.mark.parametrize(("text", "thinking", "answer"), CASES.values(), ids=CASES)
def test_splits(text: str, thinking: str, answer: str) -> None:
    assert split([text]) == (thinking, answer)
    assert split(list(text)) == (thinking, answer)


fragments = st.lists(
    st.sampled_from([OPENING, CLOSING, "◁", "◁thi", "nk▷", "/", "◁/thin", " ", "\n", "a", "é"]), max_size=12
)


@given(fragments.map("".join), st.data())
def test_any_chunking_gives_the_same_two_strings_and_loses_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    thinking, answer = split(chunks)
    assert (thinking, answer) == split([text])
    opened = text.lstrip().startswith(OPENING)
    closed = opened and CLOSING in text.lstrip().removeprefix(OPENING)
    assert text.lstrip() == OPENING + thinking + CLOSING * closed + answer if opened else text == answer


@given(fragments.map("".join))
def test_holds_back_only_what_could_still_become_a_marker(text: str) -> None:
    splitter = ThinkingSplitter()
    shown = ""
    for character in text:
        delta = splitter.feed(character)
        shown += delta.thinking + delta.answer
    held = splitter.close()
    held_text = held.thinking + held.answer
    expected = CLOSING if held.thinking else OPENING
    assert expected.startswith(held_text.lstrip() if not shown else held_text)
    assert held_text != expected
