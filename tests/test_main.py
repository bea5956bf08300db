"""The command line, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from kimi_vl.__main__ import _print_json, main
from kimi_vl.output.boxes import COLOUR
from kimi_vl.output.budget import ENOUGH
from kimi_vl.output.thinking import Delta
from kimi_vl.service import Usage
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


def test_json_is_alone_on_stdout_also_without_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    assert main(["What is 12 + 7?", "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "19"


def test_a_time_limit_ends_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QUESTION, "--model", "tiny", "--json", "--timeout-s", "1e-6"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["thinking"], result["answer"], result["finish_reason"]) == ("", "", "timeout")


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
        (["hi", "--top-k", "-1"], "error: top_k is -1"),
        (["hi", "--timeout-s", "-1"], "error: timeout_s is -1.0 and must be from 0 to 86400."),
        (["hi", "--stop", "a", "--stop", ""], "error: The second stop string has 0 characters"),
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


def test_options_choose_tokens_and_end_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--temperature",
        "2",
        "--top-k",
        "1",
        "--min-p",
        "0.5",
        "--thinking-budget",
        "4",
        "--stop",
        "x",
        "--stop",
        "1",
    ]
    penalties = ["--repetition-penalty", "1.1", "--presence-penalty", "-0.1", "--frequency-penalty", "0.1"]
    assert main(["What is 12 + 7?", "--model", "tiny", "--json", *options, *penalties]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["thinking"].endswith(ENOUGH)
    assert result["finish_reason"] == "stop"
    assert "1" not in result["answer"]
    assert result["usage"]["timings"].keys() >= {"preprocess", "queue", "prefill", "first_token", "decode"}


def test_options_may_stand_anywhere(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QUESTION, "--model", "tiny", number]) == 0
    assert capsys.readouterr().out.endswith("42\n")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["hi", "--bogus\x1b[2J"], ["hi", "--temperature", "warm"]])
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "IMAGE" not in line
    assert line.isprintable()


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


def test_an_answer_by_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["red", "blue"]}')
    question = ["Red or blue?", "--model", "tiny", "--json", "--json-schema"]
    assert main([*question, str(tmp_path / "schema.json")]) == 0
    assert json.loads(json.loads(capsys.readouterr().out)["answer"]) in ("red", "blue")
    with pytest.raises(SystemExit):
        main([*question, str(tmp_path / "missing.json")])
    assert "argument --json-schema: the file cannot be read" in capsys.readouterr().err
    for content, what in ((b"\xff", "not text"), (b"", "empty")):
        (tmp_path / "schema.json").write_bytes(content)
        with pytest.raises(SystemExit):
            main([*question, str(tmp_path / "schema.json")])
        assert f"argument --json-schema: the file is {what}" in capsys.readouterr().err


def shown(text: str) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": "image:1"}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


def test_messages_come_from_a_file_or_stdin(number: str, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([shown(QUESTION), {"role": "assistant", "content": "42"}]))
    result = run("What number is in picture 1?", number, "--messages", str(file), "--json")
    assert json.loads(result.stdout)["answer"] == "42", result.stderr
    result = run("", number, "--messages", "-", "--json", input=json.dumps([shown(QUESTION)]))
    assert json.loads(result.stdout)["answer"] == "42", result.stderr


def test_messages_need_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "What is 12 + 7?"}]))
    assert main(["--model", "tiny", "--messages", str(file)]) == 0
    assert capsys.readouterr().out.endswith("\n\n19\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read"),
        (b"", "the file is not JSON"),
        (b"\xff{", "the file is not JSON"),
        (b"[" * 100_000, "the file is not JSON"),
        (b"{}", "the file holds no list of messages"),
        (b"[]", "the file holds no list of messages"),
        (b" " * 2000, "the file has more than 1,000 bytes, the limit"),
    ],
)
def test_a_messages_file_that_is_none_is_said_in_one_line(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "messages.json"
    if content is not None:
        file.write_bytes(content)
    if "limit" in message:
        monkeypatch.setattr("kimi_vl.__main__.MAX_FILE_BYTES", 1000)
    with pytest.raises(SystemExit) as stop:
        main(["hi", "--messages", str(file)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument --messages: {message}")


def test_bad_messages_end_with_status_2_and_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "messages.json"
    file.write_text('[{"role": "\\u001b[2J", "content": ""}]')
    assert main(["--model", "tiny", "--messages", str(file)]) == 2
    assert capsys.readouterr().err.startswith(r"error: Message 1 has the role '\x1b[2J'; only")


@pytest.mark.parametrize(
    ("given", "closed", "message"),
    [
        ([], "stdin", "a PROMPT is missing"),
        (["--messages", "-"], "stdin", "argument --messages: stdin is closed"),
        (["hi"], "stdout", "stdout is closed, and the answer would go there"),
        ([__file__], "", f"{__file__} is a file; the PROMPT goes before it"),
    ],
)
def test_what_cannot_begin_is_said_in_one_line(
    given: list[str], closed: str, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if closed:
        monkeypatch.setattr(sys, closed, None)
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_full_disk_is_said_in_one_line() -> None:
    command = [sys.executable, "-m", "kimi_vl", "hi", "--model", "tiny"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: the answer cannot be written: there is no space left"


class Said:
    """Stands for an answer that would command a terminal."""

    text = "\x1b[2J\x9b31m\x7f end"
    usage = Usage(input_tokens=1, image_tokens=0, pictures=[], seed=0)

    def __iter__(self) -> Iterator[Delta]:
        yield Delta(self.text, self.text)


def test_json_commands_no_terminal_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    answer: Any = Said()
    _print_json(answer, "tiny")
    output = capsys.readouterr().out
    assert output.removesuffix("\n").isprintable()
    assert json.loads(output)["answer"] == json.loads(output)["thinking"] == Said.text


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_boxes_of_the_answer_are_drawn(
    how: list[str], number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, target = tmp_path / "schema.json", tmp_path / "out.png"
    schema.write_text('{"const": [0.25, 0.25, 0.75, 0.75]}')
    question = [QUESTION, number, "--model", "tiny", *how]
    assert main([*question, "--json-schema", str(schema), "--show-boxes", str(target)]) == 0
    assert "Drew 1 boxes and points" in capsys.readouterr().err
    with Image.open(target) as drawn, Image.open(number) as picture:
        assert drawn.size == picture.size
        assert drawn.getpixel((drawn.width // 4, drawn.height // 2)) == COLOUR
    target.unlink()
    assert main([*question, "--show-boxes", str(target)]) == 0
    assert "no boxes or points" in capsys.readouterr().err
    assert not target.exists()
    for nowhere in (tmp_path / "none" / "out.png", tmp_path / "out.txt"):
        with pytest.raises(SystemExit):
            main([*question, "--show-boxes", str(nowhere)])
        (line,) = capsys.readouterr().err.splitlines()
        assert "name a .png, .jpg or .webp file in a folder that exists" in line
    (tmp_path / "folder.png").mkdir()
    boxes = [*question, "--json-schema", str(schema), "--show-boxes"]
    assert main([*boxes, str(tmp_path / "folder.png")]) == 2
    assert "folder.png cannot be written; name a file that can be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["What is 12 + 7?", "--show-boxes", str(target)])
    assert "--show-boxes: there is no picture to draw on" in capsys.readouterr().err
