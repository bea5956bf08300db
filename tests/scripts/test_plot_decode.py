"""The plot for the README is drawn from what the benchmark kept."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from plot_decode import lines, main


def kept(engine: str) -> dict[str, Any]:
    def figure(context: int, median: float) -> dict[str, Any]:
        return {"name": "a figure", "context": context, "median": median, "floor": 0.001}

    other = [figure(1000, 0.05), figure(16000, 0.0625)] if engine == "fast" else []
    own = [figure(0, 8.0), figure(1000, 0.002), figure(16000, 0.0025)]
    return {"engine": engine, "machine": "a machine", "figures": own, "transformers": other}


def test_lines_are_tokens_per_second_by_context() -> None:
    assert {line.label: line.points for line in lines(kept("fast"))} == {
        "memory bandwidth": [(1000, 1000.0), (16000, 1000.0)],
        "this engine": [(1000, 500.0), (16000, 400.0)],
        "transformers": [(1000, 20.0), (16000, 16.0)],
    }
    assert [line.label for line in lines(kept("reference"))] == ["memory bandwidth", "transformers"]


def test_writes_a_picture_on_white(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, output = tmp_path / "figures.json", tmp_path / "decode.png"
    figures.write_text(json.dumps(kept("fast")))
    monkeypatch.setattr(sys, "argv", ["plot_decode.py", str(figures), "-o", str(output)])
    main()
    with Image.open(output) as picture:
        assert picture.size == (1200, 600)
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
