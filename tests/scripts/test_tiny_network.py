"""The training network is the original's: the reference outputs, and its own checkpoint in the shipped network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.batches import pack_tokens
from tiny.checkpoint import load_official, official_tensors
from tiny.network import PackedPictures, Rows, Sizes, TinyKimiVL, interpolation_row

GOLDEN_SIZES = Sizes(
    vocabulary=512,
    vision_layers=2,
    vision_mlp=160,
    position_table=32,
    width=128,
    layers=3,
    dense_mlp=192,
    expert_mlp=48,
    shared_experts=2,
)
MEDIA_ID = 505


@pytest.fixture(scope="module")
def model(golden: Path) -> TinyKimiVL:
    model = TinyKimiVL(GOLDEN_SIZES).eval()
    load_official(model, golden / "model")
    return model


def packed(pixel_values: np.ndarray, grids: np.ndarray) -> PackedPictures:
    """The reference's normalised patches as packed pictures; they are no whole levels, so they stay float."""
    places, merge, down, across = [], [], [], []
    start = 0
    for rows, columns in grids.tolist():
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        places.append(place)
        down.append(place[:, 0] + interpolation_row(rows))
        across.append(place[:, 1] + interpolation_row(columns))
        order = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
        merge.append(order + start)
        start += rows * columns
    (table_rows, row), (table_columns, column) = (
        torch.unique(torch.cat(x), return_inverse=True) for x in (down, across)
    )
    counts = [0, *np.cumsum(grids.prod(1)).tolist()]
    return PackedPictures(
        patches=(torch.from_numpy(pixel_values).float().flatten(1) + 1) * 127.5,
        places=torch.cat(places),
        merge=torch.cat(merge),
        table_rows=table_rows,
        table_columns=table_columns,
        table_index=row * len(table_columns) + column,
        rows=Rows(torch.tensor(counts, dtype=torch.int32), max(grids.prod(1))),
    )


@pytest.mark.parametrize("name", ["text", "one_image", "three_images"])
@torch.inference_mode()
def test_outputs_are_the_originals(model: TinyKimiVL, golden: Path, name: str) -> None:
    case = np.load(golden / f"forward_{name}.npz")
    features = None
    if name != "text":
        features = model.see(packed(case["pixel_values"], case["image_grid_hws"]))[0]
        torch.testing.assert_close(features, torch.from_numpy(case["image_features"]), atol=5e-5, rtol=0)
    hidden = model.read(pack_tokens([case["input_ids"][0].tolist()], MEDIA_ID), features)
    torch.testing.assert_close(model.lm_head(hidden), torch.from_numpy(case["logits"])[0], atol=1e-4, rtol=0)


def test_tensors_go_back_to_the_official_names_bit_for_bit(model: TinyKimiVL, golden: Path) -> None:
    original: dict[str, torch.Tensor] = {}
    for file in (golden / "model").glob("*.safetensors"):
        original |= load_file(file)
    written = official_tensors(model)
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name].float(), tensor.float()), name
