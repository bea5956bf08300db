"""The tiny model's training: that it goes all the way, and that what it teaches is true."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from tiny.network import Sizes, TinyKimiVL
from tiny.optimiser import optimisers
from tiny.pictures import Fonts
from tiny.questions import FAMILIES, WORDINGS, Example, derive, make
from tiny.training import Schedule, load_state, save_state

from kimi_vl.request import Request
from kimi_vl.service import Service
from kimi_vl.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FONTS = Fonts([])  # only the one that Pillow brings along; which font makes no difference here


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Example]]:
    random = Random(1)
    return {family: [make(random, FONTS, family) for _ in range(150)] for family in FAMILIES}


def test_smoke_makes_a_checkpoint_that_serves(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/make_tiny_checkpoint.py", "--out", tmp_path, "--smoke"]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    assert "| sum in picture | 2 |" in (tmp_path / "evaluation.md").read_text()
    service = Service.load(Settings(model=str(tmp_path)))
    list(service.answer(Request("What is 12 + 7?", max_new_tokens=5)))
    service.close()
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(ROOT / "weights/tiny/model.safetensors").keys()


def test_nothing_is_made_where_there_is_nothing_to_examine(tmp_path: Path) -> None:
    out = tmp_path / "absent"
    command = [sys.executable, "scripts/make_tiny_checkpoint.py", "--out", out, "--evaluate"]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=180)
    assert run.returncode == 2
    assert run.stderr.endswith(f"error: --evaluate finds no checkpoint in {out}\n")
    assert not out.exists()


def test_a_resumed_piece_takes_up_weights_momenta_and_progress(tmp_path: Path) -> None:
    def fresh(seed: int) -> tuple[TinyKimiVL, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        model = TinyKimiVL(Sizes(vocabulary=300, vision_layers=1, layers=2))
        return model, optimisers(model, on_cpu=False)

    def step(model: TinyKimiVL, chosen: list[torch.optim.Optimizer]) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.01 * len(name)) + parameter.detach()
        for optimiser in chosen:
            optimiser.step()

    model, chosen = fresh(1)
    step(model, chosen)
    save_state(tmp_path, model, chosen, Schedule(100, progress=0.4))
    other, other_chosen = fresh(2)
    schedule = Schedule(100)
    load_state(tmp_path, other, other_chosen, schedule)
    assert schedule.progress == 0.4
    for network, own in ((model, chosen), (other, other_chosen)):
        step(network, own)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, msg=name)


def test_the_schedule_rises_and_falls_to_nearly_nothing() -> None:
    rates = [Schedule(1, progress / 100).learning_rate for progress in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[10] == rates[44] == 1
    assert rates[-1] <= 0.01
    assert rates[45:] == sorted(rates[45:], reverse=True)


def test_every_question_has_five_wordings() -> None:
    assert all(len(set(wordings)) >= 5 for wordings in WORDINGS.values())


@pytest.mark.parametrize("family", ["sum in picture", "sum in text"])
def test_the_arithmetic_of_every_step_is_right(examples: dict[str, list[Example]], family: str) -> None:
    for example in examples[family]:
        first, sign, second = re.match(r"(\d+) ([+-]) (\d+): ", example.thinking).groups()  # type: ignore[union-attr]
        assert int(example.answer) == int(first) + int(sign + second)
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", example.thinking)
        assert steps
        for a, operator, b, result in steps:
            assert int(a) + int(operator + b) == int(result)
        assert example.thinking.rstrip(".").endswith(example.answer)
        if family == "sum in text":
            assert re.sub(r"\s", "", f"{first}{sign}{second}") in re.sub(r"\s", "", example.question)


@pytest.mark.parametrize(
    ("first", "sign", "second"), [(0, "+", 0), (99, "+", 99), (0, "-", 99), (5, "-", 5), (30, "-", 30)]
)
def test_sums_at_the_edges(first: int, sign: str, second: int) -> None:
    steps, value = derive(first, sign, second)
    assert value == first + int(f"{sign}{second}")
    assert steps.endswith(str(value))


def test_counts_are_those_of_what_was_drawn(examples: dict[str, list[Example]]) -> None:
    for example in examples["count"]:
        name = example.thinking.split("s: ")[0]
        (drawing,) = example.drawings
        assert sum(" ".join(shape) == name for shape in drawing.shapes) == int(example.answer)
        assert len(drawing.marks) == len(drawing.shapes)
        assert name in example.question.lower()
    answers = Counter(example.answer for example in examples["count"])
    assert set(answers) == set("0123456")
    assert max(answers.values()) < 3 * min(answers.values()), "no answer may be a good guess"


def test_the_largest_of_a_scene_is_no_clue_to_the_count(examples: dict[str, list[Example]]) -> None:
    largest = [max(Counter(e.drawings[0].shapes).values(), default=0) == int(e.answer) for e in examples["count"]]
    assert sum(largest) < 0.7 * len(largest)


@pytest.mark.parametrize("family", ["largest", "most"])
def test_comparisons_name_the_picture_that_wins(examples: dict[str, list[Example]], family: str) -> None:
    for example in examples[family]:
        values = [int(value) for value in re.findall(r"Picture \d: (\d+)", example.thinking)]
        assert 2 <= len(values) == len(example.drawings) <= 8
        assert values.count(max(values)) == 1
        assert example.answer == f"Picture {values.index(max(values)) + 1}"
        for place, sign, best in re.findall(r"Picture (\d): \d+ ([<=>]) (\d+)", example.thinking):
            before, now = max(values[: int(place) - 1]), values[int(place) - 1]
            assert int(best) == before
            assert sign == (">" if now > before else "=" if now == before else "<")
        if family == "most":
            kind = re.search(r"circle|square|triangle", example.question.lower())[0]  # type: ignore[index]
            assert values == [sum(shape[1] == kind for shape in drawing.shapes) for drawing in example.drawings]


def test_pictures_are_within_84_and_448_pixels(examples: dict[str, list[Example]]) -> None:
    sides = [side for family in examples.values() for e in family for d in e.drawings for side in d.image.size]
    assert 84 <= min(sides) < 95
    assert 400 < max(sides) <= 448


def test_the_shipped_model_has_the_sizes_that_are_asked_of_it() -> None:
    folder = ROOT / "weights" / "tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16_000_000
    assert len((folder / "tiktoken.model").read_text().splitlines()) <= 2048
