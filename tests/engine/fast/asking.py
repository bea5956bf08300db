"""What is asked of an engine with the tiny model, and the tokens that it answers with."""

from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw

from kimi_vl.engine.base import ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import question, render
from kimi_vl.prompt.processor import KimiVLProcessor

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
pool = ThreadPoolExecutor(2)
NO_STOP = SamplingParams(max_new_tokens=20, stop_ids=frozenset((processor.tokenizer.vocab_size,)), temperature=0.0)


def tokens(engine: FastEngine | ReferenceEngine, inputs: ModelInputs, params: SamplingParams = NO_STOP) -> list[int]:
    return list(engine.generate(inputs, params))


def ask(text: str, *pictures: Image.Image) -> ModelInputs:
    return processor.prepare(pictures, render([question(text, len(pictures))]), pool)


def number(value: int, width: int = 140, height: int = 100) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((20, 25), str(value), fill="black", font_size=40)
    return picture


REQUESTS = {
    "text": ask("What is 12 + 7?"),
    "picture": ask("What number is in the picture?", number(42)),
    "pictures": ask("Which picture shows the largest number?", number(42), number(8105, 200, 90), number(7, 90, 200)),
}
