"""The examination: fresh questions, answered freely at temperature 0 with the weights as they were saved."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from PIL import Image, ImageDraw, ImageFont

from kimi_vl.output.thinking import ThinkingSplitter
from kimi_vl.prompt.tokenizer import TikTokenTokenizer
from tiny.batches import pack_pictures, pack_tokens, prompt_ids, to_device
from tiny.network import TinyKimiVL
from tiny.pictures import COLOURS, KINDS, Drawing, Fonts, Shape
from tiny.questions import FAMILIES, WORDINGS, Example, make

UNSEEN = 10**9  # training's seeds are far below
LONGEST = 170  # tokens of an output
AT_ONCE = 100  # questions


@dataclass
class Result:
    """How many outputs of a family were right."""

    outcomes: list[tuple[bool, bool, bool]] = field(
        default_factory=list
    )  # answer right, thinking agrees, derivation exact
    mistakes: list[tuple[str, str, str]] = field(default_factory=list)  # question, wanted, got

    def note(self, example: Example, thinking: str, answer: str) -> None:
        """Takes one output in."""
        self.outcomes.append((answer == example.answer, agrees(thinking, answer), thinking == example.thinking))
        if answer != example.answer:
            self.mistakes.append((example.question, f"{example.thinking} {example.answer}", f"{thinking} {answer}"))

    def row(self, name: str) -> str:
        """A row of a Markdown table."""
        shares = (f"{100 * sum(column) / len(column):.1f} %" for column in zip(*self.outcomes, strict=True))
        return f"| {name} | {len(self.outcomes)} | {' | '.join(shares)} |"


def agrees(thinking: str, answer: str) -> bool:
    """Whether a derivation ends in an answer, and not merely in its last digit."""
    return re.search(rf"(?<![\d-]){re.escape(answer)}\.?$", thinking, re.IGNORECASE) is not None


def examine(
    model: TinyKimiVL, tokenizer: TikTokenTokenizer, fonts: Fonts, unseen: Fonts, each: int, longest: int = LONGEST
) -> dict[str, Result]:
    """Results by family, then those of other pictures: unseen fonts, and simple drawings made in another way."""
    papers: dict[str, list[Example]] = {}
    for place, family in enumerate(FAMILIES):
        random = Random(UNSEEN + place)
        papers[family] = [make(random, fonts, family) for _ in range(each)]
    random = Random(UNSEEN + 100)
    papers["number, unseen fonts"] = [make(random, unseen, "number") for _ in range(each)]
    for family in ("number", "count", "shape"):
        papers[f"{family}, plain drawings"] = [PLAIN[family](random) for _ in range(each // 2)]
    results = {}
    for name, examples in papers.items():
        results[name] = Result()
        for start in range(0, len(examples), AT_ONCE):
            part = examples[start : start + AT_ONCE]
            for example, text in zip(part, answer(model, tokenizer, part, longest), strict=True):
                splitter = ThinkingSplitter()
                delta, rest = splitter.feed(text), splitter.close()
                results[name].note(example, delta.thinking + rest.thinking, delta.answer + rest.answer)
    results.update(_by_answer(papers["count"], results["count"]))
    return results


@torch.inference_mode()
def answer(model: TinyKimiVL, tokenizer: TikTokenTokenizer, examples: list[Example], longest: int) -> list[str]:
    """The model's outputs, all examples in one packed row, without a cache."""
    model.eval()
    device = model.embed_tokens.weight.device
    pictures, _, grids = pack_pictures([drawing for example in examples for drawing in example.drawings])
    end, media = tokenizer.control["<|im_end|>"], tokenizer.control["<|media_pad|>"]
    remaining = iter(grids)
    sequences = [prompt_ids(e, [next(remaining) for _ in e.drawings], tokenizer) for e in examples]
    lengths = [len(sequence) for sequence in sequences]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features = model.see(to_device(pictures, device))[0] if pictures else None
        pieces = None if features is None else features.split([sequence.count(media) for sequence in sequences])
        unfinished = list(range(len(examples)))
        for _ in range(longest):
            tokens = to_device(pack_tokens([sequences[i] for i in unfinished], media), device)
            hidden = model.read(tokens, None if pieces is None else torch.cat([pieces[i] for i in unfinished]))
            following = model.lm_head(hidden[tokens.rows.starts[1:].long() - 1]).argmax(-1).tolist()
            for i, token in zip(unfinished, following, strict=True):
                sequences[i].append(token)
            unfinished = [i for i in unfinished if sequences[i][-1] != end]
            if not unfinished:
                break
    outputs = (sequence[length:] for sequence, length in zip(sequences, lengths, strict=True))
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]


def table(results: dict[str, Result]) -> str:
    """The results as a Markdown table."""
    head = "| questions | asked | answer right | thinking agrees with the answer | derivation exact |\n"
    return head + "|---|---|---|---|---|\n" + "\n".join(result.row(name) for name, result in results.items()) + "\n"


def _by_answer(examples: list[Example], result: Result) -> dict[str, Result]:
    """The counting questions by their true answer, where a shortcut would show."""
    by_answer: defaultdict[str, Result] = defaultdict(Result)
    for example, outcome in zip(examples, result.outcomes, strict=True):
        by_answer[f"count, where it is {example.answer}"].outcomes.append(outcome)
    return dict(sorted(by_answer.items()))


def _plain_number(random: Random) -> Example:
    value = str(random.randint(0, 10 ** random.randint(1, 4) - 1))
    size = random.randint(120, 300), random.randint(84, 200)
    image = Image.new("RGB", size, "white")
    font = ImageFont.load_default(random.randint(20, 44))
    ImageDraw.Draw(image).text(
        (size[0] / 2, size[1] / 2), value, fill=random.choice(["black", "navy", "darkred"]), font=font, anchor="mm"
    )
    drawing = Drawing(image, [], [])
    return Example("number", random.choice(WORDINGS["number"]), [drawing], f"The number is {value}.", value)


def _plain_grid(random: Random, shapes: Sequence[Shape | None], cell: int) -> Drawing:
    """Shapes of one size in the cells of a grid, in the colours that Pillow knows by name."""
    columns = max(2, round(len(shapes) ** 0.5))
    rows = -(-len(shapes) // columns)
    image = Image.new("RGB", (max(84, columns * cell), max(84, rows * cell)), "white")
    draw = ImageDraw.Draw(image)
    for place, shape in enumerate(shapes):
        if shape is None:
            continue
        left, top, pad = place % columns * cell, place // columns * cell, cell // 6
        box = (left + pad, top + pad, left + cell - pad, top + cell - pad)
        match shape[1]:
            case "circle":
                draw.ellipse(box, fill=shape[0])
            case "square":
                draw.rectangle(box, fill=shape[0])
            case "triangle":
                draw.polygon([((box[0] + box[2]) / 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=shape[0])
    return Drawing(image, [], [shape for shape in shapes if shape])


def _plain_count(random: Random) -> Example:
    asked, count = (random.choice(COLOURS), random.choice(KINDS)), random.randint(0, 6)
    others = [(random.choice(COLOURS), random.choice(KINDS)) for _ in range(random.randint(0, 6))]
    shapes: list[Shape | None] = [*[asked] * count, *(shape for shape in others if shape != asked)]
    shapes += [None] * random.randint(0 if shapes else 2, 4)
    random.shuffle(shapes)
    name = " ".join(asked)
    counted = " ".join(str(n + 1) for n in range(count)) or "none"
    question = random.choice(WORDINGS["count"]).format(name)
    drawing = _plain_grid(random, shapes, random.randint(40, 70))
    return Example("count", question, [drawing], f"{name}s: {counted}. Total {count}.", str(count))


def _plain_shape(random: Random) -> Example:
    shape = random.choice(COLOURS), random.choice(KINDS)
    drawing = _plain_grid(random, [shape], random.randint(90, 200))
    name = " ".join(shape)
    return Example("shape", random.choice(WORDINGS["shape"]), [drawing], f"There is one shape, a {name}.", name)


PLAIN = {"number": _plain_number, "count": _plain_count, "shape": _plain_shape}
