import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_vl.errors import InvalidRequest
from kimi_vl.request import MAX_CHARACTERS, MAX_SEED, Request, fetched_files
from kimi_vl.settings import Settings

GOOD = Request(prompt="What is this?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n\t\u3000"}, "prompt is empty; write"),
        ({"prompt": "a" * (MAX_CHARACTERS + 1)}, "prompt has 1,000,001 characters and the limit is 1,000,000"),
        ({"system_prompt": "a" * (MAX_CHARACTERS + 1)}, "system prompt has 1,000,001 characters"),
        ({"images": [Path("p.png")] * 9}, "has 9 pictures and the limit is 8; send fewer"),
        ({"temperature": 2.1}, "temperature is 2.1 and must be from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 1.1}, "top_p is 1.1 and must be from 0 to 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0 and must be from 1 to 32768"),
        ({"max_new_tokens": 32769}, "max_new_tokens is 32769"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": MAX_SEED + 1}, "seed is"),
        ({"top_k": -1}, "top_k is -1 and must be from 0 to 163840"),
        ({"top_k": 163841}, "top_k is 163841"),
        ({"min_p": 1.01}, "min_p is 1.01 and must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0 and must be from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": -2.1}, "presence_penalty is -2.1 and must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"thinking_budget": -2}, "thinking_budget is -2 and must be from -1 to 32768"),
        ({"thinking_budget": 32769}, "thinking_budget is 32769"),
        ({"stop": ["a"] * 9}, "has 9 stop strings and the limit is 8; send fewer"),
        ({"stop": ["a", ""]}, "second stop string has 0 characters and must have from 1 to 100"),
        ({"stop": ["a" * 101]}, "first stop string has 101 characters"),
    ],
)
def test_limits(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        replace(GOOD, **change).check(Settings())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"images": [Path("p.png")] * 8},
        {"temperature": 0.0, "top_p": 0.0, "max_new_tokens": 32768, "seed": MAX_SEED},
        {"temperature": 2.0, "seed": 0, "system_prompt": ""},
        {"top_k": 163840, "min_p": 1.0, "repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"thinking_budget": 0, "stop": ["a" * 100] * 8},
    ],
)
def test_what_is_within_the_limits_passes(change: dict[str, Any]) -> None:
    replace(GOOD, **change).check(Settings())


def test_the_number_of_pictures_is_a_setting() -> None:
    with pytest.raises(InvalidRequest, match="limit is 1"):
        replace(GOOD, images=[Path("a"), Path("b")]).check(Settings(max_images=1))


def test_files_that_the_server_fetched_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = tmp_path / "fetched.png"
    file.write_bytes(b"x")
    assert fetched_files([file]) == [file]


@pytest.mark.parametrize(
    "named",
    ["/etc/passwd", "file:///etc/passwd", "ftp://host/p.png", Path("/etc/passwd"), Path("/nowhere.png"), None, 3, ""],
)
def test_nothing_that_a_client_merely_named_is_opened(named: object) -> None:
    with pytest.raises(InvalidRequest, match="first picture is not one that could be fetched") as refusal:
        fetched_files([named])
    assert "passwd" not in str(refusal.value)


def test_links_out_of_the_temporary_folder_and_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link.png", "folder", "pipe"):
        with pytest.raises(InvalidRequest, match="second picture"):
            good = tmp_path / "good.png"
            good.touch()
            fetched_files([good, tmp_path / name])
