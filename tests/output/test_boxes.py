import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kimi_vl.output.boxes import COLOUR, Shape, draw_shapes, find_shapes


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("The cat is at [0.1, 0.25, 0.5, 0.75].", [Shape(0.1, 0.25, 0.5, 0.75)]),
        ("(0.5,0.75 , 0.1,0.25)", [Shape(0.1, 0.25, 0.5, 0.75)]),
        ("[0, 0, 1, 1.0] and [.2,.3,.4,.5]", [Shape(0, 0, 1, 1), Shape(0.2, 0.3, 0.4, 0.5)]),
        ("pyautogui.click(x=0.31, y=0.9)", [Shape(0.31, 0.9, 0.31, 0.9)]),
        ("It is at x=.5, y=1. The lines meet at x=1, y=12, or x = 0, y = 1.25", [Shape(0.5, 1, 0.5, 1)]),
        ("[0.31, 0.9] (0.5, 0.5)", [Shape(0.31, 0.9, 0.31, 0.9), Shape(0.5, 0.5, 0.5, 0.5)]),
        ('{"box": [0.1, 0.2, 0.3, 0.4], "point": [0.5, 0.6]}', [Shape(0.1, 0.2, 0.3, 0.4), Shape(0.5, 0.6, 0.5, 0.6)]),
        ("[100, 200, 300, 400], [0.1, 0.2, 0.3], [2, 3] and 0.5, 0.5", []),
    ],
)
def test_finds_what_an_answer_holds(text: str, shapes: list[Shape]) -> None:
    assert find_shapes(text) == shapes


@given(st.text(alphabet="[]()0123456789., xy=\n", max_size=60))
def test_whatever_is_found_lies_in_the_picture(text: str) -> None:
    for shape in find_shapes(text):
        assert 0 <= shape.left <= shape.right <= 1
        assert 0 <= shape.top <= shape.bottom <= 1


def test_a_box_is_drawn_where_it_is() -> None:
    picture = Image.new("L", (101, 201), 255)
    drawn = draw_shapes(picture, [Shape(0.2, 0.1, 0.8, 0.5)])
    assert drawn.getpixel((20, 60)) == drawn.getpixel((50, 20)) == COLOUR
    assert drawn.getpixel((50, 60)) == drawn.getpixel((10, 60)) == (255, 255, 255)
    assert picture.getpixel((20, 60)) == 255, "the picture itself stays"


def test_a_point_is_a_ring_around_its_place() -> None:
    drawn = draw_shapes(Image.new("RGB", (101, 101)), [Shape(0.5, 0.5, 0.5, 0.5)])
    assert drawn.getpixel((50, 50)) == (0, 0, 0)
    assert COLOUR in [drawn.getpixel((x, 50)) for x in range(50, 60)]
