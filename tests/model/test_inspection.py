"""Folders that cannot be used, each refused with one sentence."""

import errno
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.full_size import TEXT, VISION
from safetensors.torch import load_file, save_file

from kimi_vl.errors import Misconfigured
from kimi_vl.model import checkpoint
from kimi_vl.model.inspection import expected_shapes, inspect_folder
from kimi_vl.model.small_files import INDEX, LARGEST_JSON
from kimi_vl.model.variants import WEIGHTS, find_model
from tests.model.shards import split

TINY = WEIGHTS / "tiny"
NORM = "language_model.model.norm.weight"
BIAS = "language_model.model.layers.1.mlp.gate.e_score_correction_bias"
FULL_SIZE: dict[str, dict[str, Any]] = {
    "text_config": TEXT,
    "vision_config": {
        **VISION,
        "patch_size": 14,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.fixture
def shards(folder: Path) -> Path:
    """The same in two files and an index."""
    return split(folder, lambda name: 2 if name == NORM else 1)


def refusal(folder: Path) -> str:
    with pytest.raises(Misconfigured) as error:
        inspect_folder(folder)
    message = str(error.value)
    assert message.startswith(f"the model folder {folder} cannot be used: ")
    assert "\n" not in message
    return message.removeprefix(f"the model folder {folder} cannot be used: ")


def test_the_shipped_model_passes_in_one_file_and_in_shards(shards: Path) -> None:
    inspect_folder(TINY)
    inspect_folder(shards)


def test_a_folder_of_the_official_layout_passes(golden: Path) -> None:
    inspect_folder(golden / "model")


def test_the_full_size_has_the_official_tensors() -> None:
    started = time.monotonic()
    shapes = expected_shapes(FULL_SIZE)
    assert time.monotonic() - started < 1
    assert len(shapes) == 5652
    assert sum(math.prod(shape) for shape in shapes.values()) == 16_407_656_048


def test_the_full_size_is_inspected_within_three_seconds(tmp_path: Path) -> None:
    config = {"model_type": "kimi_vl", "media_placeholder_token_id": 163605, **FULL_SIZE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "preprocessor_config.json", tmp_path)
    shapes = list(expected_shapes(config).items())
    index = {}
    for shard in range(7):
        header, end = {}, 0
        for name, shape in shapes[shard::7]:
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            index[name] = f"model-{shard}.safetensors"
        data = json.dumps(header).encode()
        path = tmp_path / f"model-{shard}.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        os.truncate(path, 8 + len(data) + end)  # a hole, which takes no space
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    started = time.monotonic()
    inspect_folder(tmp_path)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tiktoken.model", "model.safetensors"])
def test_a_file_that_may_not_be_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.open

    def locked(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file) == str(folder / name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", locked)
    assert refusal(folder) == f"{name} cannot be read (Permission denied)"


def test_a_folder_that_may_not_be_looked_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path, **kwargs: Any) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", locked)
    with pytest.raises(Misconfigured, match=r"json cannot be read \(Permission denied\)"):
        find_model(str(folder))


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(Misconfigured, match=r"cannot be read \(File name too long\)"):
        find_model("a" * 300)


def test_no_network_is_built_from_a_folder_that_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "KimiVLForConditionalGeneration", None)
    os.truncate(folder / "model.safetensors", 1_000_000)
    with pytest.raises(Misconfigured, match=r"model\.safetensors is truncated"):
        checkpoint.load_model(folder, torch.device("cpu"), torch.float32)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data) and None


def recode(name: str, encoding: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text(), encoding) and None


def setting(**values: Any) -> Callable[[Path], None]:
    """Changes config.json; part__key is a key of part_config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            part, _, key = name.rpartition("__")
            (config[f"{part}_config"] if part else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut_vocabulary(folder: Path) -> None:
    """Whole lines are lacking at its end."""
    lines = (folder / "tiktoken.model").read_text().splitlines(keepends=True)
    (folder / "tiktoken.model").write_text("".join(lines[:-20]))


def replace_byte(folder: Path) -> None:
    """A longer token has the rank of the letter q."""
    data = (folder / "tiktoken.model").read_bytes()
    (folder / "tiktoken.model").write_bytes(re.sub(rb"(?m)^cQ== ", b"cXFxcXFx ", data))


def resave(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of model.safetensors."""

    def save(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return save


def reheader(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the header of model.safetensors and not its size."""

    def save(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        new = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + data[end:])

    return save


def resize(change: int) -> Callable[[Path], None]:
    path = "model.safetensors"
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size + change)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlink("config.json"), "config.json is missing"),
        (write("config.json", "{"), "config.json is damaged: it holds no JSON object"),
        (write("config.json", "[1]"), "config.json is damaged: it holds no JSON object"),
        (write("config.json", "[" * 100_000), "config.json is damaged: it holds no JSON object"),
        (write("config.json", b"\xff\xfe"), "config.json is damaged: it holds no JSON object"),
        (recode("config.json", "utf-16"), "config.json is damaged: it holds no JSON object in UTF-8"),
        (recode("preprocessor_config.json", "utf-8-sig"), "preprocessor_config.json is damaged: it holds no JSON obj"),
        (write("config.json", bytes(LARGEST_JSON + 1)), "config.json is larger than 100,000,000 bytes"),
        (setting(model_type="llava"), "config.json says model_type 'llava' and architectures"),
        (setting(architectures=["DeepseekV3ForCausalLM"]), "which is not Kimi-VL; name a Kimi-VL checkpoint"),
        (setting(text_config=None), "config.json has no text_config or no vision_config"),
        (setting(text__rope_theta=math.nan), "config.json holds NaN, which is no number that can be used"),
        (setting(text__rms_norm_eps=math.inf), "config.json holds Infinity, which is no number"),
        (write("config.json", '{"a": [1, {"b": -1e999}]}'), "config.json has a.1.b -inf, and no number in it may"),
        (setting(ignore_index=10**30), "config.json has ignore_index 1000000000000000000000000000000, and no number"),
        (
            setting(text__num_hidden_layers=10**6),
            "config.json has text_config.num_hidden_layers 1000000, which must be a whole number from 1 to 256",
        ),
        (
            setting(text__rope_theta=None),
            "has text_config.rope_theta None, which must be a number from 1 to 1,000,000,000",
        ),
        (setting(text__hidden_size=0), "text_config.hidden_size 0, which must be a whole number from 1 to 65,536"),
        (setting(text__hidden_size="192"), "text_config.hidden_size '192', which must be a whole number"),
        (setting(vision__patch_size=True), "vision_config.patch_size True, which must be a whole number"),
        (setting(vision__hidden_size=None), "vision_config.hidden_size None, which must be a whole number"),
        (setting(vision__num_attention_heads=5), "a vision_config.hidden_size that its num_attention_heads do not"),
        (setting(vision__num_attention_heads=8), "a vision_config.hidden_size that is no multiple of 4 for each of"),
        (setting(text__qk_rope_head_dim=15), "has text_config.qk_rope_head_dim 15, which must be even"),
        (setting(vision__merge_kernel_size=[2, 0]), "vision_config.merge_kernel_size [2, 0], which must be two"),
        (
            setting(media_placeholder_token_id=762),
            "media_placeholder_token_id 762, which must be a whole number from 0",
        ),
        (unlink("preprocessor_config.json"), "preprocessor_config.json is missing"),
        (write("preprocessor_config.json", '{"in_token_limit": NaN}'), "preprocessor_config.json holds NaN"),
        (write("preprocessor_config.json", '{"in_token_limit": 0}'), "in_token_limit 0, which must be a whole number"),
        (
            write("tiktoken.model", ""),
            "tiktoken.model has 0 tokens, which does not go with config.json: its vocab_size",
        ),
        (
            cut_vocabulary,
            "tiktoken.model has 486 tokens, which does not go with config.json: its vocab_size 762 must be",
        ),
        (setting(media_placeholder_token_id=526), "its media_placeholder_token_id 526 must be 21 more; copy or fetch"),
        (replace_byte, "tiktoken.model lacks the token of the single byte 0x71; copy or fetch it again"),
        (write("tiktoken.model", "YQ== 0\nYg== 2\n"), "tiktoken.model must give each token its own rank from 0 on"),
        (write("tiktoken.model", "YQ== 0\nYQ== 1\n"), "tiktoken.model must give each token its own rank from 0 on"),
        (write("tiktoken.model", "YQ== 0\n<html>\n"), "tiktoken.model is damaged after 1 tokens"),
        (write("tiktoken.model", "YQ== 0\nY@== 1\n"), "tiktoken.model is damaged after 1 tokens"),
        (unlink("model.safetensors"), "model.safetensors is missing; copy or fetch it again"),
        (only_bin, "model.safetensors is missing, and a .bin is never loaded, since it can run code; save the weights"),
        (write("other.safetensors", ""), "other.safetensors belongs to no part of this checkpoint; move it away"),
        (write("model.safetensors", ""), "model.safetensors is no safetensors file or truncated"),
        (write("model.safetensors", b"\xff" * 100), "model.safetensors is no safetensors file or truncated"),
        (write("model.safetensors", b"\x08" + bytes(7) + b"not json"), "model.safetensors is damaged"),
        (resize(-1), "model.safetensors is truncated: 13,680,791 bytes instead of 13,680,792"),
        (resize(1), "model.safetensors is too long: 13,680,793 bytes instead of 13,680,792"),
        (resave(lambda t: t.pop(NORM)), f"model.safetensors lacks the tensor {NORM}; copy or fetch the folder again"),
        (resave(lambda t: [t.pop(NORM), t.pop(BIAS)]), f"lacks the tensor {NORM} and 1 others"),
        (resave(lambda t: t.update(more=torch.ones(1))), "holds more, which no Kimi-VL of this configuration has"),
        (
            resave(lambda t: t.update({NORM: t[NORM][:100].clone()})),
            f"model.safetensors holds {NORM} as [100], and config.json asks for [192]",
        ),
        (setting(text__n_routed_experts=9), "and config.json asks for [9"),
        (
            setting(text__num_hidden_layers=5),
            "lacks the tensor language_model.model.layers.4.input_layernorm.weight and",
        ),
        (resave(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"holds {NORM} as I8, and only BF16, F16, F32"),
        (reheader(lambda h: h[NORM].pop("shape")), f"has a damaged header at {NORM}"),
        (reheader(lambda h: h.update({NORM: None})), f"has a damaged header at {NORM}"),
        (reheader(lambda h: h[NORM].update(shape=[-192])), f"has a damaged header at {NORM}"),
        (reheader(lambda h: h[NORM].update(shape=[10**30])), f"has a damaged header at {NORM}"),
        (reheader(lambda h: h[NORM].update(dtype=[])), f"holds {NORM} as [], and only BF16, F16, F32 are loaded"),
        (
            reheader(lambda h: h[NORM].update(data_offsets=[n + 2 for n in h[NORM]["data_offsets"]])),
            "has a header whose tensors overlap or leave gaps",
        ),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlink("model-2.safetensors"), "model-2.safetensors is missing; copy or fetch it again"),
        (write("model-3.safetensors", ""), "model-3.safetensors belongs to no part of this checkpoint"),
        (write("model.safetensors", ""), "model.safetensors belongs to no part of this checkpoint"),
        (write(INDEX, "{"), f"{INDEX} is damaged"),
        (write(INDEX, "{}"), f"{INDEX} has no weight_map"),
        (write(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}'), f"{INDEX} has no metadata"),
        (write(INDEX, '{"weight_map": {"a": "model-1.safetensors"}, "metadata": 5}'), f"{INDEX} has no metadata"),
        (
            write(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'),
            "names '../a.safetensors', which is no safetensors",
        ),
        (write(INDEX, '{"weight_map": {"a": "a.bin"}}'), "names 'a.bin', which is no safetensors file beside it"),
        (write(INDEX, '{"weight_map": {"a": 1}}'), "names 1, which is no safetensors file beside it"),
    ],
)
def test_shards_that_are_not_the_ones_of_the_index(shards: Path, change: Callable[[Path], None], message: str) -> None:
    change(shards)
    assert message in refusal(shards)


def test_an_index_that_places_a_tensor_elsewhere(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][BIAS] = "model-2.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    assert f"model-1.safetensors and {INDEX} do not agree on {BIAS}" in refusal(shards)


def test_an_index_with_the_name_of_a_whole_checkpoint_for_a_part(shards: Path) -> None:
    (shards / "model-1.safetensors").rename(shards / "model.safetensors")
    (shards / INDEX).write_text((shards / INDEX).read_text().replace("model-1.safetensors", "model.safetensors"))
    assert f"{INDEX} names model.safetensors beside other files; rename it, in the index and" in refusal(shards)


def test_a_link_may_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    inspect_folder(tmp_path / "link")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a link that leaves the folder; put the file itself there" in refusal(folder)


def test_a_link_to_itself(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").symlink_to("notes.txt")
    assert refusal(folder) == "notes.txt is neither a file nor a folder; take it away"
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(Misconfigured, match="is neither a checkpoint folder nor one of thinking"):
        find_model(str(tmp_path / "link"))
