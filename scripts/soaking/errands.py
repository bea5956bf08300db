"""What a service goes through: good, bad, cancelled and streamed requests, with all kinds of files."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from kimi_vl.model.variants import WEIGHTS
from kimi_vl.request import Request

EXAMPLES = WEIGHTS.parent / "examples"
SCHEMA = '{"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}}}'


@dataclass(frozen=True)
class Errand:
    """A request, what becomes of it, and what the tiny model must answer."""

    name: str
    request: Request
    end: Literal["whole", "streamed", "refused", "cancelled", "left"] = "whole"
    answer: str | None = None  # None: any


def errands(folder: Path, max_new_tokens: int) -> Iterator[Errand]:
    """The same twenty again and again; their files are made in a folder."""
    number, shapes = EXAMPLES / "number.png", EXAMPLES / "shapes.png"
    document, video, broken = folder / "d.pdf", folder / "v.gif", folder / "broken.png"
    first, *others = [_numbered(text, (612, 792)) for text in ("17", "358")]
    first.save(document, "PDF", save_all=True, append_images=others)
    first, *others = [_numbered(text, (160, 120)) for text in ("17", "4", "39")]
    first.save(video, save_all=True, append_images=others, duration=100)
    broken.write_bytes(shapes.read_bytes()[:300])

    def ask(prompt: str, **given: object) -> Request:
        return Request(prompt, **{"temperature": 0.0, "max_new_tokens": max_new_tokens, **given})  # type: ignore[arg-type]

    total, long = "What is 12 + 7?", ask("Tell me more.", temperature=2.0, seed=1)
    seen = "What number is in the picture?"
    turns = [{"role": "user", "content": total}, {"role": "assistant", "content": "19"}]
    each = [
        Errand("sum", ask(total), answer="19"),
        Errand("picture", ask(seen, images=[number]), answer="42"),
        Errand("shapes, streamed", ask("How many red circles are there?", images=[shapes]), "streamed", "3"),
        Errand("no prompt", ask(""), "refused"),
        Errand("sum, streamed", ask(total), "streamed", "19"),
        Errand("cancelled", long, "cancelled"),
        Errand("document", ask(seen, documents=[document], pages="2", max_image_tokens=64), answer="358"),
        Errand("broken picture", ask(seen, images=[number, broken]), "refused"),
        Errand("picture, cancelled", ask(seen, images=[number]), "cancelled"),
        Errand("conversation", ask(seen, messages=turns, images=[number]), answer="42"),
        Errand("client gone", long, "left"),
        Errand("video", ask("What number is in picture 3?", video=video, video_frames=3), answer="39"),
        Errand("broken document", ask(seen, documents=[broken]), "refused"),
        Errand("schema", ask(total, json_schema=SCHEMA)),
        Errand("thinking budget", ask(total, thinking_budget=4)),
        Errand("document, cancelled", ask(seen, documents=[document], max_image_tokens=64), "cancelled"),
        Errand("bad schema", ask(total, json_schema="{"), "refused"),
        Errand("deadline", ask("Tell me more.", temperature=2.0, seed=1, timeout_s=0.2)),
        Errand("broken video", ask(seen, video=broken), "refused"),
        Errand("stop", ask(total, stop=["9"]), answer="1"),
    ]
    return cycle(each)


def _numbered(text: str, size: tuple[int, int]) -> Image.Image:
    """A picture of a number, large."""
    width, height = size
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((width // 7, height // 5), text, fill="black", font_size=width // 3)
    return picture
