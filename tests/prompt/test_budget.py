"""The room for pictures, shared evenly."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kimi_vl.errors import InvalidRequest
from kimi_vl.prompt.budget import FLOOR, Budget, Sized
from kimi_vl.prompt.image_processor import ImageProcessor

images = ImageProcessor()
LIMIT = 1024  # tokens of the model
LONGEST = 510 * 14  # pixels of a side that MoonViT takes


def page(width: float = 612, height: float = 792) -> Sized:
    return Sized("page", width, height, enlarge=True)


def frame(width: int = 1920, height: int = 1080) -> Sized:
    return Sized("frame", width, height, enlarge=False)


def budget(context: int, max_new_tokens: int = 2048, each: int = 10) -> Budget:
    return Budget(images, context, max_new_tokens, lambda count: 100 + each * count)


def tokens(drawn: list[Sized], share: int) -> int:
    return sum(images.tokens(images.grid(*one.size(images, share))) for one in drawn)


def test_with_room_enough_each_gets_the_models_limit() -> None:
    assert budget(131_072).share([page()] * 20, 8, 0) == LIMIT
    assert budget(131_072).share([page()] * 20, 8, 300) == 300
    assert budget(131_072).share([page()] * 20, 8, 16_384) == LIMIT


@given(st.integers(1, 60), st.integers(0, 8), st.integers(4000, 40_000), st.integers(1, 4000))
def test_the_share_is_the_largest_that_fits_and_small_ones_leave_theirs_to_the_others(
    count: int, others: int, context: int, max_new_tokens: int
) -> None:
    drawn = [page(), frame(), frame(140, 100), page(100, 1000)] * count
    text = 100 + 10 * len(drawn) + min(max_new_tokens, 2048)

    def needed(share: int) -> int:
        return text + others * share + tokens(drawn, share)

    try:
        share = budget(context, max_new_tokens).share(drawn, others, 0)
    except InvalidRequest:
        assert needed(FLOOR) > context
    else:
        assert FLOOR <= share <= LIMIT
        assert needed(share) <= context
        assert share == LIMIT or needed(share + 1) > context


def test_the_number_that_would_fit_fits_and_one_more_does_not() -> None:
    with pytest.raises(InvalidRequest, match="has 500 pages, and even with 64 tokens each only 82 fit") as refusal:
        budget(8192).share([page()] * 500, 0, 0)
    assert str(refusal.value).endswith("beside the rest; ask for fewer.")
    assert budget(8192).share([page()] * 82, 0, 0) >= FLOOR
    with pytest.raises(InvalidRequest):
        budget(8192).share([page()] * 83, 0, 0)


def test_without_room_for_one_the_text_is_too_long() -> None:
    with pytest.raises(InvalidRequest, match="no room for pages and frames; shorten the text or send fewer pictures"):
        budget(2100).share([page(), frame()], 0, 0)


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9), st.integers(1, 1024))
def test_a_page_fills_what_it_gets_and_the_processor_leaves_it_so(width: float, height: float, most: int) -> None:
    size = page(width, height).size(images, most)
    used = images.tokens(images.grid(*size))
    assert used <= most
    assert images.scaled_size(*size) == size
    if 1 / 3 < width / height < 3 and most >= FLOOR:
        assert used >= 0.8 * most  # 80 allow a square of 64
        assert abs(size[0] / size[1] / (width / height) - 1) < 0.1


@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(1, 1024))
@example(1, LONGEST + 1, 256)
def test_a_frame_is_never_enlarged(width: int, height: int, most: int) -> None:
    size = frame(width, height).size(images, most)
    assert size[0] <= width
    assert size[1] <= height
    assert images.tokens(images.grid(*size)) <= most
    if images.tokens(images.grid(width, height)) <= most:
        assert size == (min(width, LONGEST), min(height, LONGEST))
