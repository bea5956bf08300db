"""What prompts share, and where they are cut."""

from concurrent.futures import Future

import pytest
import torch

from kimi_vl.engine.base import ModelInputs, Patches, Picture
from kimi_vl.engine.fast import prompt as module
from kimi_vl.engine.fast.prompt import Prompt

MEDIA, ANSWER = 9, (7, 8)  # ids


def prompt(ids: str, *pictures: tuple[int, bytes]) -> Prompt:
    return Prompt(torch.tensor([int(digit) for digit in ids]), list(pictures), [])


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
    assert one.shared_with(other) == other.shared_with(one) == shared


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
    pictures = []
    if count := ids.count("9"):
        patches: Future[Patches] = Future()
        patches.set_result(Patches(torch.empty(0), torch.empty(0), b"a"))
        pictures.append(Picture((2, 2 * count), patches))
    made = Prompt.of(ModelInputs(torch.tensor([[int(digit) for digit in ids]]), pictures), MEDIA, ANSWER)
    assert made.ends == ends
    assert made.pictures == [(1, b"a")][: len(pictures)]
