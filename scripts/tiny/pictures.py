"""Pictures of numbers and of shapes, drawn together with what a patch of them shows."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

KINDS = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "black")
SHADES = {
    "red": [(215, 30, 35), (255, 0, 0), (200, 0, 0)],
    "green": [(30, 150, 50), (0, 128, 0), (0, 200, 0)],
    "blue": [(35, 70, 215), (0, 0, 255), (30, 60, 170)],
    "yellow": [(240, 205, 20), (255, 255, 0), (250, 215, 60)],
    "black": [(15, 15, 15), (0, 0, 0), (40, 40, 40)],
}
BACKGROUNDS = [(255, 255, 255), (255, 255, 255), (235, 235, 235), (205, 225, 240), (240, 220, 225), (215, 240, 215)]
PATCH = 14

# Labels of a patch, for training only. A class is a digit, a sign, or a colour and kind of shape.
CLASSES = 12 + len(KINDS) * len(COLOURS)
COVERS, CENTRE, PLACE, ORDINAL, KIND_ORDINAL = (0, CLASSES, 2 * CLASSES, 2 * CLASSES + 8, 2 * CLASSES + 16)
LABELS = 2 * CLASSES + 24

Shape = tuple[str, str]  # colour, kind


@dataclass
class Mark:
    """Something drawn: where it is, its class, and the labels of the patch at its centre."""

    box: tuple[float, float, float, float]
    kind: int
    centre: tuple[int, ...]


@dataclass
class Drawing:
    """A picture and what is in it."""

    image: Image.Image
    marks: list[Mark]
    shapes: list[Shape]

    def patches(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int]]:
        """Patches [n, 588] cut as Kimi-VL does (channels first), their labels [n, LABELS], the grid (rows, columns)."""
        width, height = self.image.size
        rows, columns = math.ceil(height / 28) * 2, math.ceil(width / 28) * 2
        pixels = np.zeros((rows * PATCH, columns * PATCH, 3), np.uint8)
        pixels[:height, :width] = np.asarray(self.image)
        labels = np.zeros((rows, columns, LABELS), np.uint8)
        for mark in self.marks:
            left, top, right, bottom = mark.box
            down = slice(max(0, int((top + 2) // PATCH)), int((bottom - 2) // PATCH) + 1)
            across = slice(max(0, int((left + 2) // PATCH)), int((right - 2) // PATCH) + 1)
            labels[down, across, COVERS + mark.kind] = 1
            row, column = int((top + bottom) / 2 / PATCH), int((left + right) / 2 / PATCH)
            for label in (CENTRE + mark.kind, *mark.centre):
                labels[min(row, rows - 1), min(column, columns - 1), label] = 1
        cut = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 4, 1, 3)
        return cut.reshape(rows * columns, 3 * PATCH * PATCH), labels.reshape(rows * columns, LABELS), (rows, columns)


class Fonts:
    """The fonts that numbers are written in."""

    def __init__(self, files: list[Path]) -> None:
        self.files: list[Path | None] = [*files, None]  # None: the one that Pillow brings along

    @classmethod
    def of_matplotlib(cls) -> tuple["Fonts", "Fonts"]:
        """matplotlib's text fonts and Pillow's: those to train with, and three that only the examination uses."""
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        families = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10*", "cmss10*", "cmtt10*", "cmb10*")
        files = sorted({file for family in families for file in folder.glob(family + ".ttf")})
        files = [file for file in files if "Display" not in file.name]
        unseen = [file for file in files if file.stem in ("DejaVuSans-BoldOblique", "STIXGeneralBol", "cmss10")]
        held_out = cls(unseen)
        held_out.files.remove(None)
        return cls([file for file in files if file not in unseen]), held_out

    @lru_cache(4000)  # noqa: B019  one object lives as long as the process
    def font(self, index: int, size: int) -> ImageFont.FreeTypeFont:
        """The font of an index at a size in pixels."""
        file = self.files[index]
        font = ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font

    @lru_cache(60_000)  # noqa: B019
    def measure(self, index: int, size: int, text: str) -> tuple[float, tuple[float, float, float, float]]:
        """Advance and bounding box of a text."""
        font = self.font(index, size)
        return font.getlength(text), font.getbbox(text)


def side(random: Random, lowest: int, highest: int) -> int:
    """A side in pixels, small ones as often as large ones."""
    return round(math.exp(random.uniform(math.log(lowest), math.log(highest))))


def write(random: Random, fonts: Fonts, text: str, hard: bool, longest: int) -> Drawing:
    """Writes a number or a sum anywhere on a picture, in any font, size and pair of contrasting colours."""
    length = len(text.replace(" ", "")) + 0.5 * text.count(" ")
    width, height = side(random, 84 if length < 4 else 98, longest), side(random, 84, longest)
    paper, ink = _contrast(random)
    image = _paper(random, (width, height), paper, 28 if hard else 2)
    draw = ImageDraw.Draw(image)
    largest = min((width - 6) / (0.66 * length), height - 6, 120)
    smallest = min(15 if hard else 24, largest)
    index = random.randrange(len(fonts.files))
    size = max(12, int(math.exp(random.uniform(math.log(smallest), math.log(largest)))))
    size -= size % 2 if size > 40 else 0  # fewer sizes to keep in memory
    gap = random.choice([0, 0, 0, 1, 2])
    wide = sum(fonts.measure(index, size, c)[0] + gap for c in text)
    _, top, _, bottom = fonts.measure(index, size, "0123456789")[1]
    if random.random() < 0.2:  # in the middle, as people draw
        x, y = (width - wide) / 2, (height - (bottom - top)) / 2 - top
    else:
        x = random.uniform(2, max(3, width - wide - 2))
        y = random.uniform(2, max(3, height - (bottom - top) - 2)) - top
    marks: list[Mark] = []
    for character in text:
        advance, (left, above, right, below) = fonts.measure(index, size, character)
        if character != " ":
            draw.text((x, y), character, font=fonts.font(index, size), fill=ink)
        if character in "0123456789+-":
            place = PLACE + min(len(marks), 7)
            box = (x + left, y + above, x + right, y + below)
            marks.append(Mark(box, "0123456789+-".index(character), (place,)))
        x += advance + gap
    return Drawing(_worn(random, image) if hard else image, marks, [])


def draw_shapes(random: Random, wanted: list[Shape], hard: bool, longest: int, large: bool = False) -> Drawing:
    """Draws shapes that do not touch; some of many may find no place, so count what the drawing says it holds."""
    smallest = 84 if len(wanted) < 6 else 112 if len(wanted) < 10 else 140
    width, height = side(random, smallest, max(longest, smallest)), side(random, smallest, max(longest, smallest))
    image = _paper(random, (width, height), random.choice(BACKGROUNDS), 14 if hard else 2)
    draw = ImageDraw.Draw(image)
    equal = random.uniform(0.4, 1) if random.random() < 0.25 else None  # all of one size
    placed: list[tuple[float, float, float, Shape]] = []
    for shape in random.sample(wanted, len(wanted)):
        limit = min(width, height) * (0.45 if large else 0.2)
        top = max(9.0, min(limit, 150 if large else 60))
        for attempt in range(200):
            radius = top * equal if equal else random.uniform(10 if large else 8, top)
            radius = max(7.0, radius * 0.985**attempt)
            x, y = random.uniform(radius + 1, width - radius - 1), random.uniform(radius + 1, height - radius - 1)
            if all(math.hypot(x - a, y - b) > (radius + r) * 1.05 + 2 for a, b, r, _ in placed):
                placed.append((x, y, radius, shape))
                break
    placed.sort(key=lambda p: (p[1] // PATCH, p[0]))  # in the order of the patches at their centres
    marks, same, kinds = [], Counter[Shape](), Counter[str]()
    for x, y, radius, (colour, kind) in placed:
        extent = _draw_shape(random, draw, x, y, radius, kind, _shade(random, colour))
        ordinals = (ORDINAL + min(7, same[colour, kind]), KIND_ORDINAL + min(7, kinds[kind]))
        index = 12 + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)
        marks.append(Mark((x - extent, y - extent, x + extent, y + extent), index, ordinals))
        same[colour, kind] += 1
        kinds[kind] += 1
    return Drawing(_worn(random, image) if hard else image, marks, [shape for *_, shape in placed])


def _draw_shape(
    random: Random, draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, kind: str, fill: tuple[int, int, int]
) -> float:
    """Draws inside the circle of that radius; returns half the side of the square that it mostly covers."""
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return radius
    corners, first = (4, math.pi / 4) if kind == "square" else (3, random.choice([-math.pi / 2] * 4 + [math.pi / 2]))
    turn = first + (random.uniform(-0.25, 0.25) if random.random() < 0.5 else 0)
    angles = [turn + 2 * math.pi * n / corners for n in range(corners)]
    draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)
    return radius * 0.7


def _shade(random: Random, colour: str) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, c + random.randint(-12, 12))) for c in random.choice(SHADES[colour]))
    return red, green, blue


def _contrast(random: Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours, of paper and ink, that a person tells apart easily."""
    if random.random() < 0.35:
        paper, ink = random.choice([(255, 0), (255, 0), (250, 10), (20, 240)])
        return (paper,) * 3, (ink,) * 3
    while True:
        paper_colour, ink_colour = (tuple(random.randint(0, 255) for _ in range(3)) for _ in range(2))
        if abs(sum(w * (p - i) for w, p, i in zip((0.3, 0.59, 0.11), paper_colour, ink_colour, strict=True))) > 85:
            return paper_colour, ink_colour


def _paper(random: Random, size: tuple[int, int], colour: tuple[int, ...], strength: float) -> Image.Image:
    """A plain background, or one with a gradient, noise or stripes."""
    if random.random() < 0.55:
        return Image.new("RGB", size, colour)
    width, height = size
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = colour
    noise = np.random.default_rng(random.getrandbits(32))
    match random.choice(["gradient", "noise", "stripes"]):
        case "gradient":
            pixels += np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * random.uniform(-strength, strength)
            pixels += np.linspace(-1, 1, height, dtype=np.float32)[:, None, None] * random.uniform(-strength, strength)
        case "noise":
            pixels += noise.standard_normal((height, width, 1), dtype=np.float32) * random.uniform(1, strength / 2)
        case "stripes":
            place = np.arange(width)[None] * random.choice([0, 1]) + np.arange(height)[:, None] * random.choice([0, 1])
            pixels += ((place // random.randint(6, 40)) % 2 * random.uniform(-strength, strength))[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _worn(random: Random, image: Image.Image) -> Image.Image:
    """Sometimes what happens to pictures on their way: JPEG, a slight blur."""
    chance = random.random()
    if chance < 0.12:
        file = BytesIO()
        image.save(file, "JPEG", quality=random.randint(55, 95))
        return Image.open(file).convert("RGB")
    if chance < 0.16:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.8)))
    return image
