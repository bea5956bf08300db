"""Downloads, from a hub on this machine that fails as the real one does."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from download_weights import main
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save

from kimi_vl.errors import Misconfigured
from kimi_vl.model import fetch as fetching
from kimi_vl.model.fetch import fetch
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.model.variants import VARIANTS, WEIGHTS, best_model, find_model, locate
from tests.model.hub import Fault, Hub

ROOT = Path(__file__).resolve().parents[2]
TINY = WEIGHTS / "tiny"
NAME, REPOSITORY = "hf://someone/kimi", "someone/kimi"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NOT_WANTED = {
    "modeling_kimi_vl.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickled",
    "unrelated.safetensors": b"unrelated",
    "unrelated.json": b"{}",
    "README.md": b"# Kimi",
}
FORKED = multiprocessing.get_context("fork")  # a new interpreter would import for five seconds


class Cut(NamedTuple):
    """A checkpoint in two shards."""

    files: dict[str, bytes]
    needed: set[str]


@pytest.fixture(scope="module")
def cut() -> Cut:
    files = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix != ".safetensors"}
    tensors = load_file(TINY / "model.safetensors")
    names = sorted(tensors)
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, half in halves.items():
        files[file] = save({name: tensors[name] for name in half}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return Cut({**NOT_WANTED, **files}, set(files))


@pytest.fixture
def hub(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    hub.revisions[REPOSITORY, "main"] = cut.files
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.01))
    yield hub
    hub.close()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return str(tmp_path / "weights")


def refusal(weights: str, name: str = NAME) -> str:
    """The sentence with which a fetch fails, having left nothing that loads."""
    with pytest.raises(Misconfigured) as error:
        fetch(name, weights)
    with pytest.raises(Misconfigured, match=r"download_weights\.py"):
        find_model(name, weights)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_fetches_the_needed_files_and_only_those(hub: Hub, cut: Cut, weights: str) -> None:
    folder = fetch(NAME, weights)
    assert folder == Path(weights) / "someone--kimi@main"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: cut.files[name] for name in cut.needed}
    assert sorted(hub.asked()) == sorted(["info", *cut.needed])
    assert find_model(NAME, weights)[0] == folder
    inspect_folder(folder)


def test_a_checkpoint_in_one_file(hub: Hub, weights: str) -> None:
    hub.revisions[REPOSITORY, "main"] = {path.name: path.read_bytes() for path in TINY.iterdir()} | NOT_WANTED
    inspect_folder(fetch(NAME, weights))
    assert sorted(hub.asked()) == sorted(["info", *(path.name for path in TINY.iterdir())])


def test_a_named_model_comes_at_its_revision_and_is_then_the_best(hub: Hub, cut: Cut, weights: str) -> None:
    variant = VARIANTS["instruct"]
    hub.revisions = {(variant.repository, variant.revision): cut.files}
    assert fetch("instruct", weights) == Path(weights) / "instruct"
    assert find_model("instruct", weights) == (Path(weights) / "instruct", variant)
    assert best_model(weights) == "instruct"


def test_the_revision_is_honoured(hub: Hub, cut: Cut, weights: str) -> None:
    generation = b'{"do_sample": true, "temperature": 0.7}'
    hub.revisions[REPOSITORY, "v2.1"] = {**cut.files, "generation_config.json": generation}
    folder = fetch(f"{NAME}@v2.1", weights)
    assert folder.name == "someone--kimi@v2.1"
    assert (folder / "generation_config.json").read_bytes() == generation
    assert find_model(f"{NAME}@v2.1", weights)[1].temperature == 0.7
    assert refusal(weights, f"{NAME}@v3").startswith("someone/kimi at revision v3 is not on the hub (404); check")


@pytest.mark.parametrize("fault", [Fault(stop_after=1_500_000), Fault(stop_after=1_500_000, promised=False)])
def test_a_broken_connection_is_resumed(hub: Hub, cut: Cut, weights: str, fault: Fault) -> None:
    hub.faults[FIRST] = repeat(fault)  # more often than it is tried without any progress
    inspect_folder(fetch(NAME, weights))
    starts = [int(asked[6:-1]) for name, asked in hub.requests if name == FIRST]
    assert len(starts) > 4
    assert starts == sorted(set(starts)), "each try goes on where the one before it stopped"


def test_a_server_that_knows_no_ranges(hub: Hub, weights: str) -> None:
    hub.faults[FIRST] = iter([Fault(stop_after=1_500_000), Fault(whole=True)])
    inspect_folder(fetch(NAME, weights))


def test_a_connection_that_always_breaks_is_given_up_and_gone_on_with_later(hub: Hub, weights: str) -> None:
    hub.faults[FIRST] = iter([Fault(stop_after=2_000_000), *[Fault(stop_after=0)] * 2])
    assert f"go on where it stopped with: python scripts/download_weights.py {NAME}" in refusal(weights)
    hub.requests.clear()
    inspect_folder(fetch(NAME, weights))
    (start,) = [int(asked[6:-1]) for name, asked in hub.requests if name == FIRST]
    assert start > 0
    assert SECOND not in hub.asked()


def test_silence_is_a_broken_connection(hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    hub.faults[FIRST] = repeat(Fault(pause=1))
    assert "cannot be fetched from http://127.0.0.1" in refusal(weights)


@pytest.mark.parametrize("data", [b"x" * 5136, b"short", b"x" * 6000], ids=["hash", "short", "long"])
def test_a_file_that_comes_wrong_twice_is_refused(hub: Hub, weights: str, data: bytes) -> None:
    hub.faults["tiktoken.model"] = repeat(Fault(instead=data))
    message = refusal(weights)
    if data == b"short":  # the rest may still come
        assert "the connection ended early" in message
    else:
        assert message.startswith("tiktoken.model of someone/kimi at revision main came 2 times with another size or")
    hub.faults.clear()
    inspect_folder(fetch(NAME, weights))


@pytest.mark.parametrize("name", [FIRST, "generation_config.json"])
def test_a_file_that_comes_wrong_once_is_fetched_again(hub: Hub, cut: Cut, weights: str, name: str) -> None:
    wrong = bytes(len(cut.files[name]))
    hub.faults[name] = iter([Fault(instead=wrong)])
    inspect_folder(fetch(NAME, weights))
    assert hub.asked().count(name) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not exist or is not open to everyone (401); check its name, or log in: hf auth login"),
        (403, "is not open to you (403); ask for access at http://127.0.0.1"),
        (404, "is not on the hub (404); check owner, name and revision at http://127.0.0.1"),
        (503, "(status 503); later, go on where it stopped with: python scripts/download_weights.py"),
    ],
)
@pytest.mark.parametrize("where", ["info", FIRST])
def test_a_refusal_by_the_hub_is_one_sentence(hub: Hub, weights: str, where: str, status: int, message: str) -> None:
    hub.faults[where] = repeat(Fault(status=status))
    assert message in refusal(weights)
    assert hub.asked().count(where) == (3 if status == 503 else 1)


@pytest.mark.parametrize("where", ["info", "config.json", SECOND])
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: Hub, weights: str, where: str) -> None:
    hub.faults[where] = iter([Fault(status=503), Fault(status=429)])
    lines: list[str] = []
    inspect_folder(fetch(NAME, weights, lines.append))
    again = [f"the hub answered with status {status}; trying again in 0.01 s" for status in (503, 429)]
    assert [line for line in lines if not line.startswith("Fetching")] == again
    assert len(lines) == 3


def test_what_is_no_hub_is_said_to_be_none(hub: Hub, weights: str) -> None:
    hub.faults["info"] = repeat(Fault(instead=b"<html>log in to the hotel</html>"))
    assert "does not answer as the hub does" in refusal(weights)


def test_a_token_that_is_none_is_named(hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "schlüssel")
    assert refusal(weights) == "HF_TOKEN holds more than ASCII, so it is no token; set the hub's, or unset it"


def test_a_killed_process_leaves_nothing_that_loads_and_the_next_one_goes_on(hub: Hub, weights: str) -> None:
    hub.faults[FIRST] = iter([Fault(pause=0.05)])
    hub.faults[SECOND] = iter([Fault(pause=0.05)])
    process = FORKED.Process(target=fetch, args=(NAME, weights))
    process.start()
    until = time.monotonic() + 30
    while min(hub.sent[FIRST], hub.sent[SECOND]) < 3_000_000 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    folder = locate(NAME, weights)[0]
    assert not folder.exists()
    with pytest.raises(Misconfigured, match=r"is not there; fetch the model with: .*download_weights.py hf://someone"):
        find_model(NAME, weights)
    assert best_model(weights) == "tiny"
    hub.requests.clear()
    inspect_folder(fetch(NAME, weights))
    assert sorted(name for name, asked in hub.requests if asked) == [FIRST, SECOND]
    assert "bytes=0-" not in [asked for _, asked in hub.requests]
    assert [path.name for path in Path(weights).iterdir() if path.is_dir()] == [folder.name]


def test_of_two_processes_one_fetches_and_the_other_waits(hub: Hub, cut: Cut, weights: str) -> None:
    hub.faults[FIRST] = iter([Fault(pause=0.02)])
    process = FORKED.Process(target=fetch, args=(NAME, weights))
    process.start()
    while "info" not in hub.asked():
        time.sleep(0.01)
    lines: list[str] = []
    inspect_folder(fetch(NAME, weights, lines.append))
    process.join()
    assert process.exitcode == 0
    assert lines == ["Another process is fetching someone--kimi@main; waiting for it"]
    assert sorted(hub.asked()) == sorted(["info", *cut.needed])


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_that_is_there_needs_no_network(
    hub: Hub, weights: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(TINY, Path(weights) / "instruct")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert fetch("instruct", weights) == folder
    assert hub.requests == []


def test_offline_one_that_is_not_there_ends_in_one_sentence(
    hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(weights, "thinking")
    assert "HF_HUB_OFFLINE" in message
    assert message.endswith("run: python scripts/download_weights.py thinking")
    assert hub.requests == []


def test_without_a_network_it_ends_in_one_sentence(hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "cannot be fetched from http://127.0.0.1:9: " in refusal(weights)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "socksio"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:9", "ftp"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem", "No such file"),
    ],
)
def test_a_proxy_or_certificates_that_cannot_be_used(
    hub: Hub, weights: str, variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    close_session()
    message = refusal(weights)
    assert message.startswith("no connection can be made ready: ")
    assert reason in message
    assert "ALL_PROXY) or certificates (SSL_CERT_FILE)" in message


def test_space_is_looked_at_before_the_weights_come(hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    message = refusal(weights)
    assert message.startswith("someone/kimi at revision main needs 0.0 GB more and ")
    assert message.endswith("has 0.0 GB free; free some, or set KIMI_VL_WEIGHTS_DIR to a folder on a larger disk")
    assert FIRST not in hub.asked()


def test_a_disk_that_fills_up_is_one_sentence(hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **kw: Full(path, "ab") if args == ("ab",) else plain(path, *args, **kw)
    )
    message = refusal(weights)
    assert message.startswith(f"the disk of {weights} is full; free some space and go on where it stopped with: ")


def test_what_was_there_is_never_replaced(hub: Hub, weights: str) -> None:
    folder = Path(weights) / "someone--kimi@main"
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    assert refusal(weights) == f"{folder} is there and not complete; move it away, then run this again"
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_link_that_leads_nowhere_is_told_before_anything_comes(hub: Hub, weights: str, tmp_path: Path) -> None:
    folder = Path(weights) / "someone--kimi@main"
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "not" / "mounted")
    assert refusal(weights) == f"{folder} is there and not complete; move it away, then run this again"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiktoken.model": None}, "is no Kimi-VL checkpoint in safetensors: it has no tiktoken.model"),
        ({SECOND: None}, f"it has no {SECOND}; weights in a .bin are never loaded"),
        ({"model.safetensors.index.json": None}, "it has no model.safetensors; weights in a .bin are never loaded"),
        ({"config.json": b'{"model_type": "llama"}'}, "config.json says model_type 'llama'"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../a.safetensors"}}'}, "beside it"),
    ],
)
def test_what_is_not_kimi_vl_is_refused_before_its_weights_come(
    hub: Hub, cut: Cut, weights: str, change: dict[str, bytes | None], message: str
) -> None:
    changed: dict[str, bytes | None] = {**cut.files, **change}
    hub.revisions[REPOSITORY, "main"] = {name: data for name, data in changed.items() if data is not None}
    assert message in refusal(weights)
    assert FIRST not in hub.asked()


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://kimi",
        "hf://a/b/c",
        "hf://../kimi",
        "hf://a/..",
        "hf://a/b@../c",
        "hf://a/b@refs/pr/1",
        "hf://a--b/c",
        "hf://a/b@",
        "hf://a/b\n",
        "hf://a/.b",
        "hf://a/b.git",
        "hf://a/" + "b" * 96,
        "hf://a/b@" + "c" * 97,
    ],
)
def test_a_name_that_can_be_none_on_the_hub_is_refused(name: str, weights: str) -> None:
    with pytest.raises(Misconfigured, match=r"names no model on the hub; write hf://owner/name"):
        fetch(name, weights)
    assert not Path(weights).exists()


def test_tiny_and_folders_are_not_fetched(tmp_path: Path) -> None:
    for name in ("tiny", str(tmp_path), "nowhere"):
        with pytest.raises(
            Misconfigured, match="is nothing to fetch; name thinking, thinking-2506, instruct, or hf://"
        ):
            fetch(name)


def test_the_command_ends_with_status_0_or_2(
    hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KIMI_VL_WEIGHTS_DIR", weights)
    assert main([NAME]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{weights}/someone--kimi@main is complete; answer with it: python -m kimi_vl --model")
    assert output.err == f"Fetching someone/kimi at revision main, 0.0 GB, into {weights}\n"
    assert main(["hf://someone/else"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: someone/else at revision main is not on the hub (404)")
    assert output.err.count("\n") == 1


def test_the_command_does_not_call_a_damaged_folder_complete(
    hub: Hub, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KIMI_VL_WEIGHTS_DIR", weights)
    os.truncate(fetch(NAME, weights) / FIRST, 1_000_000)
    assert main([NAME]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"{FIRST} is truncated" in output.err
    assert output.err.endswith("a folder that is there is left alone: move it away to fetch it anew\n")


@pytest.mark.parametrize(
    ("variables", "status", "line"),
    [({}, 0, ""), ({"HF_HUB_OFFLINE": "1"}, 2, "error: ")],
)
def test_the_command_as_a_user_runs_it(
    hub: Hub, weights: str, variables: dict[str, str], status: int, line: str
) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "KIMI_VL_WEIGHTS_DIR": weights, **variables}
    command = [sys.executable, ROOT / "scripts" / "download_weights.py", NAME]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == status, result.stderr
    assert result.stderr.startswith(line)
    assert "Traceback" not in result.stderr
