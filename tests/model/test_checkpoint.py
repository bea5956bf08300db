import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import kimi_vl  # noqa: F401  registers the Auto classes
from kimi_vl.errors import Misconfigured
from kimi_vl.model import variants
from kimi_vl.model.modeling import _groups

TINY = variants.WEIGHTS / "tiny"
OFFICIAL_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
        "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration",
    },
    "preprocessor_config.json": {
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
        "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
}


@pytest.fixture
def official_folder(tmp_path: Path) -> Path:
    """A checkpoint folder as Moonshot ships it: with auto_map and the code that it names, here a trap."""
    folder = tmp_path / "official"
    shutil.copytree(TINY, folder)
    for file, auto_map in OFFICIAL_AUTO_MAPS.items():
        config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        if file == "tokenizer_config.json":
            config |= {"tokenizer_class": "TikTokenTokenizer", "model_max_length": 131072, "eos_token": "[EOS]"}
        (folder / file).write_text(json.dumps({**config, "auto_map": auto_map}))
    for module in ("configuration_kimi_vl", "modeling_kimi_vl", "processing_kimi_vl", "tokenization_moonshot"):
        (folder / f"{module}.py").write_text("raise SystemExit('the checkpoint ran its own code')")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_auto_classes_load_an_official_folder_without_its_code(official_folder: Path) -> None:
    for auto in (AutoConfig, AutoTokenizer, AutoProcessor, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(official_folder)
        assert type(loaded).__module__.startswith("kimi_vl.")


def test_saving_writes_the_official_layout(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    before, after = tensors(TINY), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.to(after[name].dtype), after[name]), name
    shipped, saved = (json.loads((folder / "config.json").read_text()) for folder in (TINY, tmp_path))
    for part in ("text_config", "vision_config"):
        expected = {key: value for key, value in shipped[part].items() if key != "torch_dtype"}
        assert expected.items() <= saved[part].items()
    assert saved["media_placeholder_token_id"] == shipped["media_placeholder_token_id"]
    assert "model_type" not in saved["text_config"]


def test_a_saved_checkpoint_loads_again_bit_for_bit(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_the_router_bias_stays_in_float32() -> None:
    state = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16).state_dict()
    dtypes = {tensor.dtype for name, tensor in state.items() if name.endswith("e_score_correction_bias")}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [([], []), ([5, 5, 5], [[0, 1], [2]]), ([12, 1, 12], [[0], [1], [2]]), ([10, 10], [[0], [1]])],
)
def test_pictures_are_grouped_up_to_the_limit(sizes: list[int], groups: list[list[int]]) -> None:
    assert _groups(sizes, limit=10) == groups


def test_models_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    assert variants.find_model("tiny") == (TINY, variants.VARIANTS["tiny"])
    assert variants.find_model(str(TINY))[1].notice, "the shipped model says what it is, however it is named"
    shutil.copytree(TINY, tmp_path / "mine")
    assert variants.find_model(str(tmp_path / "mine")) == (tmp_path / "mine", variants.UNNAMED)


def test_an_interrupted_download_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "WEIGHTS", tmp_path)
    folder = tmp_path / "thinking"
    shutil.copytree(TINY, folder)
    assert variants.best_model() == "thinking"
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    shards = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert variants.missing_files(folder) == ["model-2-of-2.safetensors"]
    assert variants.best_model() == "tiny"
    with pytest.raises(Misconfigured, match=r"weights/thinking is not complete; .*download_weights.py thinking"):
        variants.find_model("thinking")
    with pytest.raises(Misconfigured, match=r"no complete checkpoint folder: model-2-of-2.safetensors is missing"):
        variants.find_model(str(shutil.copytree(folder, tmp_path / "mine")))
    (folder / "model-2-of-2.safetensors").touch()
    assert variants.best_model() == "thinking"


@pytest.mark.parametrize(
    ("name", "hint"), [("instruct", "download_weights.py instruct"), ("nowhere", "checkpoint folder")]
)
def test_a_missing_model_is_named_with_the_way_to_get_it(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "WEIGHTS", tmp_path)
    with pytest.raises(Misconfigured, match=hint):
        variants.find_model(name)
