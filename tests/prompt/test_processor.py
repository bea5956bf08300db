"""Pictures prepared on other threads: the inputs of a plain call, sooner."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.processor import KimiVLProcessor

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
SIZES = [(28, 28), (1500, 1100), (3, 700), (200, 90), (140, 100)]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def digest(picture: Image.Image, pool: ThreadPoolExecutor) -> bytes:
    return processor.prepare([picture], "", pool).pictures[0].patches.result().digest


def test_they_are_those_of_a_plain_call(pool: ThreadPoolExecutor) -> None:
    pictures = [noise(*size) for size in SIZES]
    pictures.append(noise(60, 60).convert("L"))
    inputs, plain = processor.prepare(pictures, "What?", pool), processor(pictures, "What?")
    assert inputs.input_ids.equal(plain["input_ids"])
    for name, tensor in inputs.tensors().items():
        assert tensor.equal(plain[name])
        assert tensor.dtype == plain[name].dtype


def test_without_pictures_there_are_only_ids(pool: ThreadPoolExecutor) -> None:
    inputs = processor.prepare([], "What?", pool)
    assert inputs.input_ids.equal(processor(text="What?")["input_ids"])
    assert inputs.tensors() == {}


@pytest.mark.parametrize("size", [*SIZES, (1024, 768)])
def test_patches_have_the_originals_values(size: tuple[int, int]) -> None:
    means = ImageProcessor(image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28))
    picture = noise(*size)
    patches, (rows, columns) = means.patchify(picture)
    scaled = np.asarray(picture.resize(means.scaled_size(*size), Image.Resampling.BICUBIC))
    padded = np.zeros((rows * 14, columns * 14, 3), np.uint8)
    padded[: scaled.shape[0], : scaled.shape[1]] = scaled
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (means.image_mean, means.image_std))
    pixels = (torch.from_numpy(padded).permute(2, 0, 1).float() / 255 - mean) / std
    assert patches.equal(pixels.view(3, rows, 14, columns, 14).permute(1, 3, 0, 2, 4).reshape(-1, 3, 14, 14))


def test_a_digest_tells_pictures_and_grids_apart(pool: ThreadPoolExecutor) -> None:
    assert digest(noise(56, 28), pool) == digest(noise(56, 28), pool)
    assert digest(noise(56, 28), pool) != digest(noise(56, 28, seed=1), pool)
    white = [Image.new("RGB", size, "white") for size in ((56, 28), (28, 56))]  # patches of the same bytes
    assert digest(white[0], pool) != digest(white[1], pool)


def test_the_patches_are_not_waited_for(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, cut = Event(), ImageProcessor.cut
    monkeypatch.setattr(ImageProcessor, "cut", lambda *given: (wanted.wait(10), cut(*given))[1])
    inputs = processor.prepare([noise(28, 28)], "What?", pool)
    assert not inputs.pictures[0].patches.done()
    wanted.set()
    assert inputs.pictures[0].patches.result(10).levels.shape == (4, 3, 14, 14)


def test_the_order_is_the_callers_whichever_is_read_first(pool: ThreadPoolExecutor) -> None:
    second_read = Event()

    def first() -> Image.Image:
        second_read.wait(10)
        return noise(28, 28)

    def second() -> Image.Image:
        second_read.set()
        return noise(56, 28)

    assert [picture.grid for picture in processor.prepare([first, second], "", pool).pictures] == [(2, 2), (2, 4)]


def test_the_first_error_in_order_is_raised(pool: ThreadPoolExecutor) -> None:
    second_read = Event()

    def first() -> Image.Image:
        second_read.wait(10)
        raise ValueError("first")

    def second() -> Image.Image:
        second_read.set()
        raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        processor.prepare([first, second], "", pool)


def test_after_an_error_the_rest_is_not_read() -> None:
    read: list[int] = []
    error_raised = Event()

    def damaged() -> Image.Image:
        raise ValueError("damaged")

    def slow() -> Image.Image:
        error_raised.wait(10)
        return noise(28, 28)

    def last() -> Image.Image:
        read.append(3)
        return noise(28, 28)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="damaged"):
            processor.prepare([damaged, slow, last], "", pool)
        error_raised.set()
        assert len(processor.prepare([noise(28, 28)], "", pool).pictures) == 1
    assert not read


def test_a_picture_takes_at_most_the_tokens_that_it_may() -> None:
    images = processor.image_processor
    sizes = [images.size(1500, 1100, 64), images.size(3, 700, 64), images.size(140, 100, 64)]
    assert [images.tokens(images.grid(*size)) for size in sizes] == [63, 25, 20], "the last two are smaller"
    assert images.size(1500, 1100) == images.scaled_size(1500, 1100)
