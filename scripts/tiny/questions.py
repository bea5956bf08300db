"""Questions about pictures and sums, each with a true derivation and its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tiny.pictures import COLOURS, KINDS, Drawing, Fonts, Shape, draw_shapes, write

WORDINGS = {
    "number": [
        "What number is in the picture?",
        "Which number do you see?",
        "Read the number.",
        "What is the number shown here?",
        "Tell me the number in this image.",
    ],
    "count": [
        "How many {0}s are there?",
        "Count the {0}s.",
        "How many {0}s do you see?",
        "What is the number of {0}s in the picture?",
        "Tell me how many {0}s this image has.",
    ],
    "sum in picture": [
        "What is the result?",
        "Solve this.",
        "What does this come to?",
        "Calculate the result.",
        "What is the answer to the sum in the picture?",
    ],
    "sum in text": ["What is {0}?", "Calculate {0}.", "How much is {0}?", "{0} = ?", "Please work out {0}."],
    "shape": [
        "What is in the picture?",
        "What do you see?",
        "Describe the picture.",
        "Which shape is this?",
        "Name the shape and its colour.",
    ],
    "largest": [
        "Which picture shows the largest number?",
        "Which picture has the biggest number?",
        "In which picture is the number largest?",
        "Find the picture with the highest number.",
        "Where is the largest number?",
    ],
    "most": [
        "Which picture has the most {0}s?",
        "In which picture are the most {0}s?",
        "Find the picture with the most {0}s.",
        "Where are the most {0}s?",
        "Which picture shows the largest count of {0}s?",
    ],
    "number of picture": [
        "What number is in picture {0}?",
        "Read the number in picture {0}.",
        "Which number does picture {0} show?",
        "Tell me the number in picture {0}.",
        "Picture {0}: what number is it?",
    ],
}
SHARES = {  # of the training; counting takes longest to learn
    "number": 0.18,
    "count": 0.32,
    "sum in picture": 0.12,
    "sum in text": 0.08,
    "shape": 0.05,
    "largest": 0.09,
    "most": 0.10,
    "number of picture": 0.06,
}


@dataclass
class Example:
    """A question, its pictures, and the output that is wanted."""

    family: str
    question: str
    drawings: list[Drawing]
    thinking: str
    answer: str


def make(random: Random, fonts: Fonts, family: str, hard: bool = True) -> Example:
    """An example of a family; one that is not hard has small plain pictures and small numbers."""
    argument, drawings, thinking, answer = FAMILIES[family](random, fonts, hard)
    question = random.choice(WORDINGS[family]).format(argument)
    chance = random.random()
    if chance > 0.9:
        question = question.lower() if chance > 0.95 else question.rstrip("?.")
    return Example(family, question, drawings, thinking, answer)


Made = tuple[str, list[Drawing], str, str]  # what the wording names, pictures, thinking, answer


def _number(random: Random, fonts: Fonts, hard: bool) -> Made:
    value = str(_value(random, hard))
    return "", [write(random, fonts, value, hard, _longest(random, hard))], f"The number is {value}.", value


def _count(random: Random, fonts: Fonts, hard: bool) -> Made:
    """The groups of a scene are alike in size, whichever of them is asked about, so no shortcut tells the answer."""
    most = 6 if hard else 3
    asked, count = _shape(random), random.randint(0, most)
    groups = {_neighbour(random, asked): random.randint(1, most) for _ in range(random.choice([0, 1, 1, 2, 2, 3]))}
    groups.pop(asked, None)
    others = [shape for shape, size in groups.items() for _ in range(size)]
    others = others[: 9 if hard else 4]
    drawing = draw_shapes(random, [asked] * count + others, hard, _longest(random, hard))
    count, name = drawing.shapes.count(asked), " ".join(asked)
    counted = " ".join(str(n + 1) for n in range(count)) or "none"
    return name, [drawing], f"{name}s: {counted}. Total {count}.", str(count)


def _sum_in_picture(random: Random, fonts: Fonts, hard: bool) -> Made:
    first, sign, second = _operands(random)
    form = random.choice(["{} {} {}", "{} {} {}", "{}{}{}", "{} {} {} =", "{}{}{}=", "{} {} {} = ?"])
    thinking, value = derive(first, sign, second)
    drawing = write(random, fonts, form.format(first, sign, second), hard, max(_longest(random, hard), 168))
    return "", [drawing], f"{first} {sign} {second}: {thinking}.", str(value)


def _sum_in_text(random: Random, fonts: Fonts, hard: bool) -> Made:
    first, sign, second = _operands(random)
    thinking, value = derive(first, sign, second)
    asked = f"{first} {sign} {second}" if random.random() < 0.8 else f"{first}{sign}{second}"
    return asked, [], f"{first} {sign} {second}: {thinking}.", str(value)


def _one_shape(random: Random, fonts: Fonts, hard: bool) -> Made:
    drawing = draw_shapes(random, [_shape(random)], hard, _longest(random, hard), large=random.random() < 0.8)
    name = " ".join(drawing.shapes[0])
    return "", [drawing], f"There is one shape, a {name}.", name


def _largest(random: Random, fonts: Fonts, hard: bool) -> Made:
    drawings, values = _numbers(random, fonts, hard)
    return "", drawings, *_compare(values, "Largest")


def _most(random: Random, fonts: Fonts, hard: bool) -> Made:
    kind = "circle" if random.random() < 0.5 else random.choice(KINDS)
    longest = _longest_of_several(random, hard)
    others = [other for other in KINDS if other != kind]
    while True:
        drawings = []
        for _ in range(_pictures(random, hard)):
            wanted = [(random.choice(COLOURS), kind) for _ in range(random.randint(0, 6 if hard else 3))]
            distractor = (random.choice(COLOURS), random.choice(others))
            wanted += [distractor] * random.choice([0, 0, 1, 2, 3, 4, 5] if hard else [0, 1])
            drawings.append(draw_shapes(random, wanted, hard, longest))
        counts = [sum(shape[1] == kind for shape in drawing.shapes) for drawing in drawings]
        if counts.count(max(counts)) == 1:
            return kind, drawings, *_compare(counts, "Most")


def _number_of_picture(random: Random, fonts: Fonts, hard: bool) -> Made:
    drawings, values = _numbers(random, fonts, hard)
    place = random.randrange(len(values))
    return str(place + 1), drawings, f"Picture {place + 1} shows {values[place]}.", str(values[place])


FAMILIES: dict[str, Callable[[Random, Fonts, bool], Made]] = {
    "number": _number,
    "count": _count,
    "sum in picture": _sum_in_picture,
    "sum in text": _sum_in_text,
    "shape": _one_shape,
    "largest": _largest,
    "most": _most,
    "number of picture": _number_of_picture,
}


def derive(first: int, sign: str, second: int) -> tuple[str, int]:
    """first + second or first - second in small steps, tens before ones, and its value."""
    if sign == "-" and first < second:
        positive, value = derive(second, "-", first)
        return f"{first} - {second} = -({second} - {first}); {positive}; so {-value}", -value
    steps: list[str] = []
    total = first
    for part in [part for part in (second // 10 * 10, second % 10) if part] or [0]:
        following = total + part if sign == "+" else total - part
        steps.append(f"{total} {sign} {part} = {following}")
        total = following
    return "; ".join(steps), total


def _compare(values: list[int], word: str) -> tuple[str, str]:
    """Goes through the pictures with the best so far, so that each step looks at two values only."""
    best = 0
    steps = [f"Picture 1: {values[0]}."]
    for place, value in enumerate(values[1:], start=1):
        sign = ">" if value > values[best] else "=" if value == values[best] else "<"
        steps.append(f"Picture {place + 1}: {value} {sign} {values[best]}.")
        best = place if value > values[best] else best
    return f"{' '.join(steps)} {word}: {values[best]} in picture {best + 1}.", f"Picture {best + 1}"


def _numbers(random: Random, fonts: Fonts, hard: bool) -> tuple[list[Drawing], list[int]]:
    digits, count = random.randint(1, 4 if hard else 2), _pictures(random, hard)
    longest = _longest_of_several(random, hard)
    values: list[int] = []
    while len(values) < count:
        value = random.randint(0, 10**digits - 1) if random.random() < 0.6 else _value(random, hard)
        if value not in values:
            values.append(value)
    return [write(random, fonts, str(value), hard, longest) for value in values], values


def _value(random: Random, hard: bool) -> int:
    lowest = 0 if random.random() < 0.3 else 1
    return random.randint(lowest, 10 ** random.randint(1, 4 if hard else 2) - 1)


def _operands(random: Random) -> tuple[int, str, int]:
    first, second = (random.randint(0, 99) if random.random() < 0.8 else random.randint(0, 9) for _ in range(2))
    sign = random.choice("+-")
    if sign == "-" and first < second and random.random() < 0.7:
        first, second = second, first
    return first, sign, second


def _shape(random: Random) -> Shape:
    return random.choice(COLOURS), random.choice(KINDS)


def _neighbour(random: Random, shape: Shape) -> Shape:
    """Another shape, often with the same colour or the same kind."""
    chance = random.random()
    if chance < 0.35:
        return shape[0], random.choice([kind for kind in KINDS if kind != shape[1]])
    if chance < 0.7:
        return random.choice([colour for colour in COLOURS if colour != shape[0]]), shape[1]
    return _shape(random)


def _pictures(random: Random, hard: bool) -> int:
    return random.randint(2, 8 if hard else 3)


def _longest(random: Random, hard: bool) -> int:
    """The longest side that a picture may have, in pixels."""
    return 140 if not hard else 448 if random.random() < 0.4 else 224


def _longest_of_several(random: Random, hard: bool) -> int:
    return 280 if hard and random.random() < 0.2 else 140
