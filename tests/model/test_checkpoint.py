import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import kimi_vl  # noqa: F401  registers the Auto classes
from kimi_vl.errors import Misconfigured
from kimi_vl.model import variants
from kimi_vl.model.inspection import missing_files
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
    assert variants.find_model("tiny", str(tmp_path)) == (TINY, variants.VARIANTS["tiny"])
    assert variants.find_model(str(TINY))[1].notice, "the shipped model says what it is, however it is named"
    shutil.copytree(TINY, tmp_path / "mine")
    assert variants.find_model(str(tmp_path / "mine")) == (tmp_path / "mine", variants.UNNAMED)
    shutil.copytree(TINY, tmp_path / "instruct")
    for name in ("instruct", str(tmp_path / "instruct")):
        folder, variant = variants.find_model(name, str(tmp_path))
        assert (folder, variant) == (tmp_path / "instruct", variants.VARIANTS["instruct"])
        assert not variant.thinks


def test_a_model_of_the_hub_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder, variant = variants.locate("hf://moonshotai/Kimi-VL-A3B-Instruct@v1.0", str(tmp_path))
    assert folder == tmp_path / "moonshotai--Kimi-VL-A3B-Instruct@v1.0"
    assert (variant.temperature, variant.thinks, variant.revision) == (0.2, False, "v1.0")
    folder, variant = variants.locate("hf://someone/kimi", str(tmp_path))
    assert folder == tmp_path / "someone--kimi@main"
    assert (variant.temperature, variant.thinks, variant.repository) == (0.6, True, "someone/kimi")


@pytest.mark.parametrize(
    ("generation_config", "temperature"),
    [
        ('{"do_sample": true, "temperature": 0.3}', 0.3),
        ('{"do_sample": true, "temperature": 2}', 2.0),
        ('{"do_sample": false, "temperature": 0.3}', 0.6),
        ('{"do_sample": true}', 0.6),
        ('{"do_sample": true, "temperature": 7}', 0.6),
        ('{"do_sample": true, "temperature": NaN}', 0.6),
        ('{"do_sample": true, "temperature": null}', 0.6),
        ("[]", 0.6),
        ("{", 0.6),
        (f'{{"do_sample": true, "temperature": {10**400}}}', 0.6),
    ],
)
def test_a_folder_recommends_its_own_temperature(tmp_path: Path, generation_config: str, temperature: float) -> None:
    folder = shutil.copytree(TINY, tmp_path / "mine")
    (folder / "generation_config.json").write_text(generation_config)
    assert variants.find_model(str(folder))[1] == replace(variants.UNNAMED, temperature=temperature)


def test_an_interrupted_copy_is_no_model(tmp_path: Path) -> None:
    weights = str(tmp_path)
    folder = shutil.copytree(TINY, tmp_path / "thinking")
    assert variants.best_model(weights) == "thinking"
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    shards = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert missing_files(folder) == ["model-2-of-2.safetensors"]
    assert variants.best_model(weights) == "tiny"
    with pytest.raises(Misconfigured, match=r"/thinking is not complete; .*download_weights.py thinking"):
        variants.find_model("thinking", weights)
    with pytest.raises(Misconfigured, match=r"no complete checkpoint folder: model-2-of-2.safetensors is missing"):
        variants.find_model(str(shutil.copytree(folder, tmp_path / "mine")))
    (folder / "model-2-of-2.safetensors").touch()
    assert variants.best_model(weights) == "thinking"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("instruct", r"/instruct is not there; fetch the model with: python scripts/download_weights.py instruct"),
        ("hf://a/b@c", r"/a--b@c is not there; fetch the model with: python scripts/download_weights.py hf://a/b@c"),
        ("hf://a/../b", "names no model on the hub"),
        ("nowhere", "neither a checkpoint folder nor one of"),
    ],
)
def test_a_missing_model_is_named_with_the_way_to_get_it(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=hint):
        variants.find_model(name, str(tmp_path))
