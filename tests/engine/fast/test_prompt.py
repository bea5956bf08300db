"""What prompts share, and where they are cut."""

from concurrent.futures import Future

import pytest
import torch

from kimi_vl.engine.base import ModelInputs, Patches, Picture
from kimi_vl.engine.fast import prompt as module
from kimi_vl.engine.fast.prompt import Prompt

MEDIA, ANSWER = 9, (7, 8)  # ids


def picture(digest: bytes, grid: tuple[int, int] = (2, 4)) -> Picture:
    patches: Future[Patches] = Future()
    patches.set_result(Patches(torch.empty(0), torch.empty(0), digest))
    return Picture(grid, patches)


def prompt(ids: str, *pictures: tuple[int, bytes]) -> Prompt:
    placed = [(place, picture(digest)) for place, digest in pictures]
    return Prompt(torch.tensor([int(digit) for digit in ids]), placed, [])


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (prompt("123"), prompt("123"), 3),
        (prompt("123"), prompt("1234"), 3),
        (prompt("123"), prompt("124"), 2),
        (prompt("123"), prompt("4"), 0),
        (prompt("19923", (1, b"a")), prompt("19924", (1, b"a")), 4),
        (prompt("19923", (1, b"a")), prompt("19923", (1, b"b")), 1),
        (prompt("1993993", (1, b"a"), (4, b"b")), prompt("1993993", (1, b"a"), (4, b"c")), 4),
        (prompt("1993993", (1, b"a"), (4, b"b")), prompt("1993993", (1, b"a")), 4),
        (prompt("1993", (1, b"a")), prompt("1993"), 1),
        (prompt("99993", (0, b"a"), (2, b"b")), prompt("99993", (0, b"c")), 0),
        (prompt("12993", (2, b"a")), prompt("1", (2, b"a")), 1),
    ],
)
def test_what_two_prompts_begin_with(one: Prompt, other: Prompt, shared: int) -> None:
    assert one.seen().shared_with(other) == other.seen().shared_with(one) == shared


def test_pictures_after_a_difference_are_not_waited_for() -> None:
    late = Picture((2, 4), Future())
    seen = prompt("1993993", (1, b"a"), (4, b"b")).seen()
    ids = torch.tensor([1, 9, 9, 3, 9, 9, 3])
    assert seen.shared_with(Prompt(ids, [(1, picture(b"c")), (4, late)], [])) == 1
    ids[3] = 4
    assert seen.shared_with(Prompt(ids, [(1, picture(b"a")), (4, late)], [])) == 3


@pytest.mark.parametrize(
    ("ids", "worth", "ends"),
    [
        ("1234", 100, []),
        ("1278", 100, [4]),
        ("12783127878", 100, [4, 9, 11]),
        ("19999278", 100, [8]),
        ("19999278", 4, [5, 8]),
        ("19999278", 5, [8]),
        ("1278", 0, [4]),
    ],
)
def test_where_a_prompt_is_cut(ids: str, worth: int, ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH_A_CUT", worth)
    count = ids.count("9")
    pictures = [picture(b"a", (2, 2 * count))] if count else []
    made = Prompt.of(ModelInputs(torch.tensor([[int(digit) for digit in ids]]), pictures), MEDIA, ANSWER)
    assert made.ends == ends
    assert made.pictures == [(1, picture) for picture in pictures]
    assert made.seen().pictures == [(1, b"a")][: len(pictures)]
