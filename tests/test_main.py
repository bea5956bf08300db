"""The command line, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from kimi_vl.__main__ import main
from tests.media.films import film, numbered
from tests.media.pdfs import numbers


@pytest.fixture
def number(tmp_path: Path) -> str:
    image = Image.new("RGB", (140, 100), "white")
    ImageDraw.Draw(image).text((30, 25), "42", fill="black", font_size=44)
    image.save(tmp_path / "number.png")
    return str(tmp_path / "number.png")


QUESTION = "What number is in the picture?"


def test_answers_on_stdout_and_tells_about_it_on_stderr(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QUESTION, number, "--model", "tiny"]) == 0
    output = capsys.readouterr()
    thinking, answer = output.out.strip().split("\n\n")
    assert answer == "42"
    assert "42" in thinking
    assert "tiny" in output.err
    assert "demonstration and test model" in output.err
    assert "tokens in" in output.err


def test_json_is_one_object_and_nothing_else(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QUESTION, number, "--model", "tiny", "--json", "--seed", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == "42"
    assert result["thinking"]
    assert result["finish_reason"] == "stop"
    assert result["seed"] == 5
    assert result["usage"]["input_tokens"] > result["usage"]["image_tokens"] == 20
    assert result["usage"]["cached_tokens"] == 0


def test_a_document_and_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.pdf").write_bytes(numbers(["17", "4", "358"]))
    video = film(tmp_path / "v.mp4", [numbered(str(index)) for index in range(40)])
    tiny = ["--model", "tiny", "--max-image-tokens", "64", "--json"]
    document = ["--document", str(tmp_path / "d.pdf")]
    assert main(["What number is in the picture?", *document, "--pages", "3", *tiny]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "358"
    assert main(["What number is in picture 2?", "--video", str(video), "--video-fps", "1", *tiny]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == "25"
    assert result["usage"]["pictures"] == [{"kind": "frame", "width": 168, "height": 140, "tokens": 30}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--document", "/no/such.pdf"], "error: The first document cannot be read"),
        (["hi", "--document", __file__, "--document", "/no/such.pdf"], "error: The second document cannot be read"),
        (["hi", "--document", __file__], "error: The first document is no PDF"),
        (["hi", "--pages", "1"], "error: pages picks pages of documents and there are none"),
        (["hi", "--video", __file__], "error: The video is of no known type"),
        (["hi", "--video-frames", "0"], "error: video_frames is 0"),
        ([" "], "error: The prompt is empty"),
        (["hi", "--temperature", "3"], "error: temperature is 3.0"),
        (["hi", "--model", "no-such"], "error: 'no-such' is neither a checkpoint folder nor one of"),
        (["hi", "/no/such/picture.png"], "error: The first picture"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "tiny", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith(message)
    assert output.err.count("error:") == 1


def test_options_may_stand_anywhere(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QUESTION, "--model", "tiny", number]) == 0
    assert capsys.readouterr().out.endswith("42\n")


@pytest.mark.parametrize("arguments", [[], ["hi", "--bogus"], ["hi", "--temperature", "warm"]])
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "IMAGE" not in line


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimi_vl", *arguments, "--model", "tiny"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_terminal_that_cannot_show_a_character_gets_it_escaped() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run("\u25c1 \u4f60\u597d", "--max-new-tokens", "40", "--temperature", "2", "--seed", "3", env=environment)
    assert result.returncode == 0, result.stderr


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kimi_vl", "What is 12 + 7?", "--model", "tiny"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert result.returncode == 141
    assert "Traceback" not in result.stderr


def test_ctrl_c_while_it_starts_stops_cleanly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_vl", "hi", "--model", "tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "Starting tiny\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_ctrl_c_stops_cleanly() -> None:
    command = [sys.executable, "-m", "kimi_vl", "Tell me more.", "--model", "tiny", "--temperature", "2"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "8000", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    process.stdout.read(5)  # it is answering
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().endswith("stopped")
