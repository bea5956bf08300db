"""A conversation that the tiny model can have, in OpenAI's chat format."""

from base64 import b64encode
from pathlib import Path
from typing import Any

from kimi_vl.model.variants import WEIGHTS

EXAMPLES = WEIGHTS.parent / "examples"
NUMBER, LARGER, SHAPES = (EXAMPLES / name for name in ("number.png", "larger.png", "shapes.png"))
TURNS: list[tuple[list[Path], str, str]] = [  # pictures, question, answer
    ([], "What is 12 + 7?", "19"),
    ([NUMBER], "What number is in the picture?", "42"),
    ([], "What number is in picture 1?", "42"),
    ([LARGER], "What number is in picture 2?", "8105"),
    ([], "What number is in picture 1?", "42"),
    ([SHAPES], "What number is in picture 2?", "8105"),
]


def uri(file: Path) -> str:
    """A picture file as a data: URI."""
    return "data:image/png;base64," + b64encode(file.read_bytes()).decode()


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user's turn: pictures, then the text."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    """The model's turn."""
    return {"role": "assistant", "content": text}


def numbers(before: int, count: int) -> list[str]:
    """URLs that name the images after so many."""
    return [f"image:{before + n}" for n in range(1, count + 1)]
