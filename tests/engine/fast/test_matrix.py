"""Matrices of 16, 8 and 4 bits: what is kept of the weights, in how many bytes, and the kernels that make them."""

import pytest
import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.quantise import dequantise, group_size, pack, quantise_groups, quantise_rows, unpack
from kimi_vl.engine.fast.matrix import Matrix
from tests.engine.fast.kernels import DEVICE, DTYPES, TOLERANCE, check, normal, poison

ERRORS = {16: 0.0, 8: 0.01, 4: 0.11}  # relative, of normal numbers
QUANTISE = {8: quantise_rows, 4: quantise_groups}


def error(matrix: Matrix, weight: Tensor) -> float:
    return float((matrix.float() - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize("shape", [(7, 64), (5, 200), (3, 4, 96), (2, 3, 5, 40)])
def test_little_is_lost(shape: tuple[int, ...], bits: int) -> None:
    weight = normal(*shape)
    matrix = Matrix.of(weight).quantised(bits)
    assert matrix.shape == matrix.float().shape == shape
    assert matrix.bits == bits
    assert error(matrix, weight) <= ERRORS[bits]
    assert matrix[1].float().equal(matrix.float()[1])


@DTYPES
@pytest.mark.parametrize("bits", QUANTISE)
@pytest.mark.parametrize("shape", [(7, 64), (5, 200), (2, 3, 96), (300, 40)])
def test_dequantise(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    matrix, out = Matrix.of(normal(*shape)).quantised(bits), poison(*shape, dtype=dtype)
    check(dequantise, [out], matrix.values, matrix.scales, bits, out, tolerance=TOLERANCE[dtype])


def test_the_bytes_shrink() -> None:
    weight = normal(8, 256, 1408, dtype=torch.bfloat16)
    eight, four = (Matrix.of(weight).quantised(bits) for bits in (8, 4))
    assert Matrix.of(weight).quantised(16).values.data_ptr() == weight.data_ptr()
    assert eight.nbytes == weight.nbytes / 2 + 4 * 8 * 256
    assert four.nbytes == weight.nbytes * (4 + 16 / 64) / 16


@pytest.mark.parametrize("bits", QUANTISE)
def test_rows_stored_in_pieces_are_the_whole(bits: int) -> None:
    weight = normal(3, 10, 96)
    matrix = Matrix.empty((3, 10, 96), bits, DEVICE, torch.float32)
    for entry in (2, 0, 1):
        for first, last in ((4, 10), (0, 1), (1, 4)):
            matrix[entry].store(first, weight[entry, first:last])
    assert matrix.float().equal(Matrix.of(weight).quantised(bits).float())


@pytest.mark.parametrize("bits", QUANTISE)
def test_zeros_stay_and_outliers_are_kept(bits: int) -> None:
    weight = normal(4, 128)
    weight[1] = 0
    weight[2, 5] = -100
    stored = Matrix.of(weight).quantised(bits).float()
    assert stored[1].eq(0).all()
    assert stored[2, 5].item() == pytest.approx(-100, rel=0.01)


def test_each_number_of_eight_bits_is_the_nearest() -> None:
    weight = normal(9, 300)
    matrix = Matrix.of(weight).quantised(8)
    assert matrix.scales is not None
    assert ((matrix.float() - weight).abs() <= matrix.scales[:, None] * 0.5001).all()


def test_the_scale_of_four_bits_is_better_than_the_largest_alone() -> None:
    weight = normal(64, 512)
    groups = weight.view(64, -1, group_size(4))
    scale = groups.abs().amax(2, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).view_as(weight)
    assert error(Matrix.of(weight).quantised(4), weight) < 0.9 * error(Matrix.of(plain), weight)


@pytest.mark.parametrize(("bits", "planes"), [(8, 4), (4, 8)])
def test_packing_keeps_every_number(bits: int, planes: int) -> None:
    half = 2 ** (bits - 1)
    numbers = torch.randint(-half, half, (5, 2 * planes * 8), dtype=torch.int32)
    assert unpack(pack(numbers, bits), bits).flatten(1).equal(numbers)
    places = torch.full((1, planes * 8), -half)
    places[0, [0, 9]] += torch.tensor([1, 3])  # of the first plane's first word, and the second's second
    assert pack(places, bits).tolist() == [[1, 3 << bits, 0, 0, 0, 0, 0, 0]]


@DTYPES
@pytest.mark.parametrize("bits", QUANTISE)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 40), (70, 200), (33, 1408)])
def test_the_kernels_make_what_their_references_make(rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    """But for numbers halfway between two, scales that are equally good, and the interpreter's cut of bfloat16."""
    weight = normal(rows, columns, dtype=dtype)
    weight[0, :9] = 0
    made = [Matrix.empty((rows, columns), bits, DEVICE, dtype) for _ in range(2)]
    for matrix, run in zip(made, (QUANTISE[bits].launch, QUANTISE[bits].reference), strict=True):
        run(weight, matrix.values, matrix.scales)
    kernels, references = (matrix.float() for matrix in made)
    assert torch.isclose(kernels, references, rtol=0.01).float().mean() > 0.98
    assert error(made[0], weight) == pytest.approx(error(made[1], weight), rel=0.01)
