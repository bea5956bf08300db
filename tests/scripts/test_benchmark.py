"""The benchmark goes all the way with the tiny model; what it measures here says nothing."""

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from bench.ceilings import Ceilings, block_sums
from bench.figure import Figure
from bench.floors import picture_operations, prompt_operations, token_bytes
from bench.full_size import TEXT, VISION
from bench.measures import decode
from bench.pictures import Album
from bench.report import slowdown, table
from bench.subject import Subject, load, machine, make_engine

from kimi_vl.engine.fast.scheme import SCHEMES
from kimi_vl.engine.fast.weights import Weights
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"--contexts": "40 60", "--prompts": "50", "--pictures": "1x56x56 2x70x40", "--asked": "1x60x40"}
RUNS = {"--tokens": "100", "--repeats": "1", "--quantization": "none int4"}
BOTH = [
    "decode, a token at context 40",
    "decode, a token at context 60",
    "prefill, 50 tokens",
    "one more turn after 50 tokens",
    "MoonViT and projector, 1 picture of 56x56",
    "MoonViT and projector, 2 pictures of 70x40",
    "first token, 1 picture of 60x40 and a question",
    "first token, 1 picture of 60x40 and a question, one more turn",
]


def test_measures_both_engines_and_keeps_the_figures(tmp_path: Path) -> None:
    options = [word for name, values in (SIZES | RUNS).items() for word in (name, *values.split())]
    command = [sys.executable, "scripts/benchmark.py", "--weights=tiny", *options, f"--json={tmp_path}/figures.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    kept = json.loads((tmp_path / "figures.json").read_text())
    names = [figure["name"] for figure in kept["figures"]]
    assert [name.split(",")[0] for name in names[:4]] == ["ready", "first token of the first request"] * 2
    assert names[4:] == [figure["name"] for figure in kept["transformers"]] == BOTH
    for name in names:
        assert f"\n| {name} | " in run.stdout
    for figure in kept["figures"]:
        assert min(figure["values"]) > figure["floor"], figure["name"]
    assert kept["engine"] == "fast" and kept["versions"]["torch"] == torch.__version__
    assert "--tokens 100" in kept["command"]
    assert all(6 <= distinct <= kept["experts"] for distinct in kept["distinct_experts"])
    assert {name: figure["name"] for name, figure in kept["otherwise"].items()} == {
        "int4": BOTH[0],
        "a JSON schema": BOTH[0],
    }
    assert re.search("A token comes, against none, with int4 .* times, with a JSON schema .* times as fast", run.stdout)
    assert "Distinct experts a layer in 100 decoded tokens: " in run.stdout


def test_refuses_a_token_faster_than_its_floor() -> None:
    model, processor = load("tiny", torch.device("cpu"))
    engine = make_engine("fast", model, processor)
    subject = Subject(model, processor, engine, Ceilings({"a mistake": 1.0}, {}), tokens=12, repeats=1)
    with pytest.raises(SystemExit, match=r"decode, a token at context 20 took .* ms, less than its floor of"):
        decode(subject, 20)
    engine.close()


def test_floors_of_the_full_size_are_known() -> None:
    """At 3.13 TB/s and 778 TFLOP/s, which one H100 reached."""
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(KimiVLConfig(text_config=TEXT, vision_config=VISION)).to(torch.bfloat16)
    weights, row = Weights.of(model), 27 * (512 + 64) * 2
    assert token_bytes(weights, 1024) - token_bytes(weights, 0) == 1024 * row
    for name, seconds in (("none", 1.65e-3), ("int8", 0.86e-3), ("int4", 0.584e-3)):
        small = weights.quantised(SCHEMES[name])
        assert token_bytes(small, 1024) / 3.13e12 == pytest.approx(seconds, rel=0.01)
    assert prompt_operations(model, 120_000) / 778e12 == pytest.approx(3.13, rel=0.01)
    assert picture_operations(model, [(128, 128)] * 8) / 778e12 == pytest.approx(0.484, rel=0.01)


def test_reads_every_number() -> None:
    data = torch.randn(3 * 4096, device=machine())
    torch.testing.assert_close(block_sums(data, 4096), data.view(3, -1).sum(1), rtol=1e-3, atol=1e-3)


def test_a_table_has_medians_spread_floor_ratio_memory_and_what_stands_beside() -> None:
    own = [
        Figure("token", [0.0022, 0.002, 0.0021], 0.00168, 500_000_000, context=1024),
        Figure("token later", [0.00231], 0.0018, context=16384),
        Figure("ready", [8.5]),
    ]
    rows = table(own, [Figure("token", [0.05], 0.00168, context=1024)]).splitlines()[2:]
    assert rows == [
        "| token | 2.10 (476 tok/s) | 2.00 - 2.20 | 1.68 (595 tok/s) | 80% | 0.50 | 50.00 (20 tok/s) |",
        "| token later | 2.31 (433 tok/s) | 2.31 - 2.31 | 1.80 (556 tok/s) | 78% |  |  |",
        "| ready | 8,500 | 8,500 - 8,500 |  |  |  |  |",
    ]
    assert slowdown(own) == "A token takes longer than at context 1,024 by 10.0% at 16,384."


def test_pictures_differ_by_seed_and_come_again() -> None:
    album = Album.parse("2x30x20")
    first, again, other = (album.draw(seed) for seed in (1, 1, 2))
    assert str(album) == "2x30x20" and first[0].size == (30, 20)
    assert first == again and first[0] != first[1] and first != other
    with pytest.raises(ArgumentTypeError, match="'2x30' is not COUNTxWIDTHxHEIGHT"):
        Album.parse("2x30")
