"""Which weights become smaller, how much smaller, and when nobody says so."""

from dataclasses import replace

import pytest
import torch
from bench.full_size import TEXT, VISION

from kimi_vl.engine.fast.memory import scheme_that_fits
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.scheme import SCHEMES, find_scheme
from kimi_vl.errors import Misconfigured
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

with torch.device("meta"):
    model = KimiVLForConditionalGeneration(KimiVLConfig(text_config=TEXT, vision_config=VISION)).to(torch.bfloat16)
FULL_SIZE = Network.of(model)
NEEDED = {"none": 30, "int8": 20, "int4": 10}


@pytest.mark.parametrize(("free", "chosen"), [(40, "none"), (30, "none"), (29, "int8"), (19, "int4"), (5, "int4")])
def test_auto_takes_the_most_bits_that_fit(free: int, chosen: str) -> None:
    assert find_scheme("auto", NEEDED, free) == SCHEMES[chosen]
    assert find_scheme("int8", NEEDED, free) == SCHEMES["int8"]


def test_refuses_a_scheme_that_there_is_not() -> None:
    with pytest.raises(Misconfigured, match="KIMI_VL_QUANTIZATION must be auto, none, int8, int4, not 'fp8'"):
        find_scheme("fp8", NEEDED, 100)


@pytest.mark.parametrize(
    ("gigabytes", "chosen"), [(80, "none"), (48, "none"), (32, "int8"), (24, "int8"), (16, "int4")]
)
def test_auto_at_full_size(gigabytes: int, chosen: str) -> None:
    assert scheme_that_fits("auto", FULL_SIZE, gigabytes * 10**9).name == chosen


def test_the_weights_of_the_full_size_take_few_bytes() -> None:
    taken = {name: FULL_SIZE.quantised(scheme).nbytes for name, scheme in SCHEMES.items()}
    assert taken["none"] == pytest.approx(32_815_312_096, rel=1e-3)
    assert taken["int8"] < 18e9
    assert taken["int4"] < 11e9


def test_only_large_matrices_lose_bits() -> None:
    weights = FULL_SIZE.weights
    small = weights.quantised(SCHEMES["int4"])
    (attention, first), (_, other) = small.layers[:2]
    assert {matrix.bits for matrix in (attention.projections, attention.out, small.head)} == {8}
    assert (first.shared_gate_up.bits, first.shared_down.bits) == (8, 8)
    assert {matrix.bits for matrix in (other.gate_up, other.down, other.shared_gate_up, other.shared_down)} == {4}
    assert small.embeddings is weights.embeddings
    assert attention.kv_b is weights.layers[0][0].kv_b
    assert other.router is weights.layers[1][1].router
    back = replace(small, layers=weights.layers, head=weights.head)
    assert back == weights
