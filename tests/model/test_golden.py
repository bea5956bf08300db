"""The network against Moonshot's original code on a small random checkpoint, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import kimi_vl  # noqa: F401  registers the Auto classes
from kimi_vl.model.modeling import KimiVLForConditionalGeneration, grid_thw

PROMPTS = ("text", "one_image", "three_images")


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(golden / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=PROMPTS)
def case(golden: Path, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    arrays = np.load(golden / f"forward_{request.param}.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def inputs(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    picture = {}
    if "pixel_values" in case and len(case["pixel_values"]):
        picture = {"pixel_values": case["pixel_values"].float(), "image_grid_hws": case["image_grid_hws"]}
    return {"input_ids": case["input_ids"], **picture}


@torch.inference_mode()
def test_logits(model: KimiVLForConditionalGeneration, case: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(model(**inputs(case)).logits, case["logits"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_image_features(model: KimiVLForConditionalGeneration, case: dict[str, torch.Tensor]) -> None:
    given = inputs(case)
    if "pixel_values" not in given:
        assert "image_features" not in case or not len(case["image_features"])
        return
    features = model.get_image_features(given["pixel_values"], grid_thw(given["image_grid_hws"])).pooler_output
    torch.testing.assert_close(torch.cat(features), case["image_features"], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_greedy_tokens(model: KimiVLForConditionalGeneration, case: dict[str, torch.Tensor]) -> None:
    prompt = case["input_ids"]
    output = model.generate(
        **inputs(case), attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert output[0, prompt.shape[1] :].tolist() == case["greedy_tokens"].tolist()
