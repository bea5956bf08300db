"""On a CUDA GPU: the network, the reference engine and its memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench.full_size import VISION
from PIL import Image, ImageDraw

from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration, grid_thw
from kimi_vl.request import Request
from kimi_vl.service import Service
from kimi_vl.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.fixture
def full_size_pictures_only() -> Iterator[KimiVLForConditionalGeneration]:
    """The full-size MoonViT and projector with random bf16 weights, and a decoder of one small layer."""
    decoder = {"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 512, "n_routed_experts": 8}
    config = KimiVLConfig(
        text_config={**decoder, "hidden_size": 2048, "num_attention_heads": 16, "n_group": 1, "topk_group": 1},
        vision_config=VISION,
        media_placeholder_token_id=505,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = KimiVLForConditionalGeneration(config).to(torch.bfloat16).eval()
    yield model
    del model
    torch.cuda.empty_cache()


@torch.inference_mode()
def test_eight_large_pictures_stay_under_3_gb(full_size_pictures_only: KimiVLForConditionalGeneration) -> None:
    model = full_size_pictures_only
    side = 1792 // 14
    pixels = torch.randn(8 * side * side, 3, 14, 14, device="cuda", dtype=torch.bfloat16)
    grids = grid_thw(torch.tensor([[side, side]] * 8, device="cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    features = model.get_image_features(pixels, grids).pooler_output
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak above weights and pixels: {peak / 1e9:.2f} GB")
    assert peak < 3e9
    assert [tuple(f.shape) for f in features] == [(side * side // 4, 2048)] * 8
    assert all(f.isfinite().all() for f in features)


def test_the_tiny_model_answers_in_bfloat16(tmp_path: Path) -> None:
    image = Image.new("RGB", (140, 100), "white")
    ImageDraw.Draw(image).text((30, 25), "42", fill="black", font_size=44)
    image.save(tmp_path / "number.png")
    service = Service.load(Settings(model="tiny"))
    request = Request("What number is in the picture?", images=[tmp_path / "number.png"])
    assert "".join(delta.answer for delta in service.answer(request)) == "42"
    service.close()
