"""Folders made to do harm: nothing in them is run, followed or waited for. For damaged ones see tests/model."""

import json
import os
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_vl.errors import Misconfigured
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.inspection import inspect_folder, read_index
from kimi_vl.model.small_files import CONFIG, INDEX, PREPROCESSOR, SINGLE
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.image_processor import ImageProcessor
from kimi_vl.prompt.processor import KimiVLProcessor

TINY = WEIGHTS / "tiny"
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
PICKLE = b"cos\nmkdir\n(S'sprung'\ntR."  # makes a folder when it is unpickled
watched: list[str] | None = None  # an audit hook stays for ever: this is what it watches for


def _watch(event: str, _: Any) -> None:
    if watched is not None and (event in FORBIDDEN or event.startswith("pickle")):
        watched.append(event)


sys.addaudithook(_watch)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What happened meanwhile of that which must not."""
    global watched
    watched = []
    yield watched
    watched = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(Misconfigured) as error:
        inspect_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(folder: Path, file: str, **values: Any) -> None:
    """Sets keys of a JSON file, of its text_config as text__KEY."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    for key, value in values.items():
        part, _, rest = key.rpartition("__")
        (content[f"{part}_config"] if part else content)[rest] = value
    (folder / file).write_text(json.dumps(content))


def test_nothing_of_a_folder_is_run(folder: Path, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles, code, templates and names of other repositories, wherever transformers would look for some."""
    monkeypatch.chdir(folder.parent)
    code = "import os; os.mkdir('sprung')"
    for name in ("modeling_kimi_vl.py", "configuration_kimi_vl.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pkl", "training_args.bin", "tiktoken.pickle"):
        (folder / name).write_bytes(PICKLE)
    auto_map = {f"Auto{kind}": "modeling_kimi_vl.KimiVL" for kind in ("Config", "Model", "Tokenizer", "Processor")}
    hub = "someone/harmful"
    changed(
        folder,
        CONFIG,
        auto_map=auto_map,
        transformers_weights="../../weights.safetensors",
        quantization_config={"quant_method": "gptq", "dataset": hub},
        _name_or_path=hub,
        _attn_implementation=hub,
        experts_implementation=hub,
        dtype="hub",
        text__attn_implementation=hub,
    )
    changed(folder, "generation_config.json", **{"custom_generate": hub, "trust_remote_code": True})
    changed(
        folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="os.system", chat_template="{{ 1 / 0 }}"
    )
    changed(folder, PREPROCESSOR, auto_map=auto_map, processor_class=hub)
    changed(folder, "adapter_config.json", base_model_name_or_path=hub, peft_type="LORA")
    changed(folder, "special_tokens_map.json", eos_token="<|im_user|>")
    changed(folder, "added_tokens.json", **{"<|im_end|>": 5})
    model, processor = load_model(folder, torch.device("cpu"), torch.float32), KimiVLProcessor.from_pretrained(folder)
    assert not events
    assert not Path("sprung").exists()
    assert type(model).__module__ == "kimi_vl.model.modeling"
    assert processor.tokenizer.control == KimiVLProcessor.from_pretrained(TINY).tokenizer.control
    expected = load_model(TINY, torch.device("cpu"), torch.float32)
    assert model.config.text_config.to_dict() == expected.config.text_config.to_dict()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text__q_lora_rank": 512}, "has text_config.q_lora_rank 512, and Kimi-VL's is None"),
        ({"text__attention_bias": True}, "has text_config.attention_bias True, and Kimi-VL's is False"),
        ({"text__hidden_act": "os.system"}, "has text_config.hidden_act 'os.system', and Kimi-VL's is 'silu'"),
        ({"text__n_group": 0}, "has text_config.n_group 0, and Kimi-VL's is 1"),
        (
            {"text__rope_scaling": {"type": "yarn"}},
            "has text_config.rope_scaling {'type': 'yarn'}, and Kimi-VL's is None",
        ),
        ({"text__num_key_value_heads": 0}, "has text_config.num_key_value_heads 0, and Kimi-VL's is 2"),
        ({"text__num_experts_per_tok": 1000}, "has a text_config.num_experts_per_tok above its n_routed_experts"),
        ({"text__rope_theta": -5}, "has text_config.rope_theta -5, which must be a number from 1 to 1,000,000,000"),
        ({"text__rms_norm_eps": "0"}, "has text_config.rms_norm_eps '0', which must be a number from 0 to 1"),
    ],
)
def test_a_network_that_is_not_kimi_vls_is_refused(folder: Path, change: dict[str, Any], why: str) -> None:
    changed(folder, CONFIG, **change)
    assert why in refusal(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image_std": [0, 0, 0]}, "has image_std [0, 0, 0], which must be three numbers above 0"),
        ({"image_mean": ["a"]}, "has image_mean ['a'], which must be three numbers"),
        ({"patch_size": 13}, f"has patch_size 13, and {CONFIG} has 14"),
        ({"merge_kernel_size": [2.0, 2.0]}, f"has merge_kernel_size [2.0, 2.0], and {CONFIG} has [2, 2]"),
        ({"merge_kernel_size": [0, 1]}, f"has merge_kernel_size [0, 1], and {CONFIG} has [2, 2]"),
    ],
)
def test_pictures_that_the_network_does_not_take_are_refused(folder: Path, change: dict[str, Any], why: str) -> None:
    changed(folder, PREPROCESSOR, **change)
    assert why in refusal(folder)


def test_absent_sizes_of_pictures_are_those_that_they_are_read_with(folder: Path) -> None:
    (folder / PREPROCESSOR).write_text("{}")
    inspect_folder(folder)
    assert ImageProcessor.from_pretrained(folder) == ImageProcessor(patch_size=14, merge_kernel_size=(2, 2))
    changed(folder, CONFIG, vision__merge_kernel_size=[3, 3])
    assert f"has merge_kernel_size None, and {CONFIG} has [3, 3]" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR, SINGLE, "tiktoken.model", "subfolder", "notes.txt"])
def test_no_link_leads_out_of_the_folder(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    for target in (Path("/etc/passwd"), Path("/"), Path("/dev/zero"), tmp_path / "nothing", Path("..")):
        (folder / name).symlink_to(target)
        assert f"{name} is a link that leaves the folder" in refusal(folder)
        (folder / name).unlink()


def test_lists_in_lists_take_neither_memory_nor_an_end_of_the_stack(folder: Path) -> None:
    for depth in (900, 1100):  # Python 3.12 parses what it cannot walk
        (folder / CONFIG).write_text(f'{{"{"k" * 1000}":' * depth + "1" + "}" * depth)
        tracemalloc.start()
        assert CONFIG in refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        tracemalloc.stop()


def test_what_a_folder_holds_commands_no_terminal_and_floods_no_log(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    name = rb"\u001b[2J\nerror: no disk".ljust(len("language_model.model.norm.weight"))
    (folder / SINGLE).write_bytes(whole.replace(b"language_model.model.norm.weight", name))
    assert r"holds \x1b[2J\nerror: no disk" in refusal(folder)
    (folder / SINGLE).write_bytes(whole)
    changed(folder, CONFIG, text__hidden_act="x" * 10**6)
    assert len(refusal(folder)) < 2000
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "\x1b[2J.safetensors"}}))
    with pytest.raises(Misconfigured, match=r"names '.x1b.2J.safetensors', which is no safetensors file beside it"):
        read_index(folder)


def header(length: int, content: bytes = b"") -> Callable[[Path], None]:
    """A safetensors file that says that its header is so long."""

    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + content)
        os.truncate(path, 8 << 30)  # with nothing on the disk

    return write


def shaped(size: bytes, dimensions: int) -> bytes:
    """A header of 4 MB with one tensor."""
    shape = b",".join([size] * dimensions)
    return (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,1]}}' % shape).ljust(4 * 10**6)


@pytest.mark.parametrize(
    "write",
    [
        header(2**63),
        header(2**64 - 1),
        header(4 << 30),
        header(99_000_000, b"{" * 1000),
        header(10**6, b"[" * 10**6),
        header(4 * 10**6, shaped(b"9" * 4000, 800)),
        header(4 * 10**6, shaped(b"2", 10**6)),
        header(120, b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,1]}}'.ljust(120)),
    ],
)
def test_headers_of_any_length_are_refused_at_once(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder / SINGLE)
    started = time.monotonic()
    assert SINGLE in refusal(folder)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR, INDEX, SINGLE, "tiktoken.model"])
def test_what_is_no_regular_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert name in refusal(folder)
