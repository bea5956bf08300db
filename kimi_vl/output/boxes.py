"""Boxes and points in an answer: Kimi-VL gives places in a picture as fractions of its width and height."""

import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

_FRACTION = r"(0?\.\d+|[01](?:\.0*)?)"
_SEPARATOR = r"\s*,\s*"
_PAIR = rf"{_FRACTION}{_SEPARATOR}{_FRACTION}"
BOX = re.compile(rf"[\[(]\s*{_PAIR}{_SEPARATOR}{_PAIR}\s*[\])]")
POINT = re.compile(rf"[\[(]\s*{_PAIR}\s*[\])]|\bx\s*=\s*{_FRACTION}{_SEPARATOR}y\s*=\s*{_FRACTION}(?!\.?\d)")
COLOUR = (230, 0, 60)


@dataclass(frozen=True)
class Shape:
    """A box, or a point, where both corners are the same."""

    left: float  # all four from 0 to 1
    top: float
    right: float
    bottom: float

    @property
    def is_point(self) -> bool:
        return (self.left, self.top) == (self.right, self.bottom)


def find_shapes(text: str) -> list[Shape]:
    """What a text holds of [left, top, right, bottom], [x, y] and x=…, y=…, in brackets or parentheses, boxes first."""
    shapes = []
    for found in BOX.finditer(text):
        left, top, right, bottom = map(float, found.groups())
        shapes.append(Shape(min(left, right), min(top, bottom), max(left, right), max(top, bottom)))
    for found in POINT.finditer(text):
        x, y = (float(number) for number in found.groups() if number)
        shapes.append(Shape(x, y, x, y))
    return shapes


def draw_shapes(picture: Image.Image, shapes: list[Shape]) -> Image.Image:
    """A copy of a picture in RGB with the shapes on it: boxes as frames, points as rings."""
    drawn = picture.convert("RGB")  # a copy, also of a picture in RGB
    pen, line = ImageDraw.Draw(drawn), max(2, max(drawn.size) // 200)
    for shape in shapes:
        left, right = (round(x * (drawn.width - 1)) for x in (shape.left, shape.right))
        top, bottom = (round(y * (drawn.height - 1)) for y in (shape.top, shape.bottom))
        if shape.is_point:
            pen.circle((left, top), 4 * line, outline=COLOUR, width=line)
        else:
            pen.rectangle((left, top, right, bottom), outline=COLOUR, width=line)
    return drawn
