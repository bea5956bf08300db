"""What a terminal shows, and a conversation typed at a pseudo-terminal."""

import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kimi_vl.model.variants import WEIGHTS
from kimi_vl.output.thinking import Delta
from kimi_vl.request import Request
from kimi_vl.service import Usage
from kimi_vl.settings import Settings
from kimi_vl.terminal import Chat, Screen, say, visible

EXAMPLES = WEIGHTS.parent / "examples"
SECONDS = 60


@given(st.text() | st.text(st.characters(max_codepoint=0xA0)))
def test_no_control_character_is_left_and_nothing_else_is_changed(text: str) -> None:
    shown = visible(text)
    assert all(ord(c) >= 0xA0 or 0x20 <= ord(c) < 0x7F or c in "\n\t" for c in shown)
    if all(c.isprintable() or c in "\n\t" for c in text):
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[2J", r"\x1b[2J"), ("\x9b31m", r"\x9b31m"), ("a\r\n\tb\x7f", "a\\x0d\n\tb\\x7f"), ("\0", r"\x00")],
)
def test_control_characters_are_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_neither_thinking_nor_answer_nor_messages_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.show(Delta("\x1b]0;thinking\x07", ""))
    screen.show(Delta("", "\x1b[2Janswer\x9b"))
    say("\x1b[2Jmessage")
    output = capsys.readouterr()
    assert output.out == r"\x1b]0;thinking\x07" + "\n\n" + r"\x1b[2Janswer\x9b"
    assert output.err == r"\x1b[2Jmessage" + "\n"


@pytest.mark.parametrize(
    ("terminal", "variables", "dims"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
    ],
)
def test_thinking_is_dimmed_where_that_is_wanted(
    terminal: bool,
    variables: dict[str, str],
    dims: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    Screen().show(Delta("so", ""))
    assert capsys.readouterr().out == ("\x1b[2mso\x1b[0m" if dims else "so")


@pytest.mark.parametrize(
    ("reason", "said"), [("stop", "out;"), ("length", "cut by --max-new-tokens;"), ("timeout", "cut by the time")]
)
def test_what_cut_an_answer_is_told(reason: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Screen().end(Usage(seed=0, finish_reason=reason), "tiny")
    assert said in capsys.readouterr().err


class Scripted:
    """Stands for a service and for its answers: says what it is told to, and keeps what it was asked."""

    settings = Settings(model="scripted")
    usage = Usage(input_tokens=1, image_tokens=0, pictures=[], seed=0)

    def __init__(self, *answers: list[Delta | type[BaseException]]) -> None:
        self.answers = list(answers)
        self.asked: list[Request] = []

    def answer(self, request: Request) -> "Scripted":
        request.check(self.settings)
        self.asked.append(request)
        return self

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Delta]:
        for item in self.answers.pop(0):
            if isinstance(item, Delta):
                yield item
            else:
                raise item


def test_what_got_no_answer_is_no_part_of_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = EXAMPLES / "number.png"
    no_text = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "")
    lines = iter([f"/image {picture}", "one", no_text, "two", "", "three", EOFError()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    thinking, yes = Delta("Hm.", ""), Delta("", "yes")
    service: Any = Scripted([thinking, KeyboardInterrupt], [thinking, yes, KeyboardInterrupt], [thinking, yes])
    Chat(service, Request("?", seed=5)).run()
    parts = [{"type": "image_url", "image_url": {"url": "image:1"}}, {"type": "text", "text": "two"}]
    two = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    asked = [(request.prompt, request.images, request.messages, request.seed) for request in service.asked]
    assert asked == [("one", [picture], [], 5), ("two", [picture], [], 5), ("three", [picture], two, 5)]
    output = capsys.readouterr()
    assert output.out.endswith("Hm.\n\nyes\n\n")
    assert "error: What was typed is not text in this terminal's encoding" in output.err


class Terminal:
    """The command, at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "kimi_vl", "--model", "tiny", "--temperature", "0", *arguments]
        self.process, self._terminal = pty.fork()
        if not self.process:
            termios.tcsetwinsize(0, (40, 400))  # so that no line is wrapped
            os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "NO_COLOR": ""})
        self._seen = ""

    def until(self, text: str, again: str = "") -> str:
        """What is shown up to a text, without what was returned before; keys are typed each second until it is."""
        deadline = time.monotonic() + SECONDS
        while text not in self._seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self._seen!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                self._seen += os.read(self._terminal, 65536).decode("utf-8", "replace")
            elif again:
                self.type(again)
        before, found, self._seen = self._seen.partition(text)
        return before + found

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def ask(self, line: str) -> str:
        """What is shown after a line, up to the next prompt."""
        self.type(line + "\n")
        self.until(f"{line}\r\n")
        return self.until("> ")

    def status(self) -> int:
        """Waits for its end."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self._terminal)


@pytest.fixture
def chat() -> Iterator[Callable[..., Terminal]]:
    """Starts a conversation and waits for its first prompt."""
    started = []

    def start(*arguments: str) -> Terminal:
        terminal = Terminal(*arguments)
        started.append(terminal)
        assert "/image FILE" in terminal.until("> ")
        return terminal

    yield start
    for terminal in started:
        terminal.close()


def test_a_conversation_with_pictures(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat()
    first = terminal.ask("What is 12 + 7?")
    assert "\x1b[2m1\x1b[0m" in first, "the thinking is dimmed"
    assert "\r\n\r\n19\r\n" in first
    assert "picture 1," in terminal.ask(f"/image {EXAMPLES / 'number.png'}")
    assert "\r\n\r\n42\r\n" in terminal.ask("What number is in the picture?")
    spaced = tmp_path / "larger number.png"
    spaced.symlink_to(EXAMPLES / "larger.png")
    assert "picture 2," in terminal.ask(f"/image {spaced}")
    assert "\r\n\r\n8105\r\n" in terminal.ask("What number is in picture 2?")
    assert "\r\n\r\n42\r\n" in terminal.ask("What number is in picture 1?"), "it still knows the first one"
    terminal.type("\x1b[A\n")  # the last line again
    assert "What number is in picture 1?" in terminal.until("\r\n")
    assert "\r\n\r\n42\r\n" in terminal.until("\n> ")
    terminal.ask("/reset")
    assert terminal.ask("What is 12 + 7?").count("25 tokens in") == first.count("25 tokens in") == 1, "all is forgotten"
    terminal.type("/quit\n")
    assert terminal.status() == 0


def test_what_is_wrong_is_said_and_the_conversation_goes_on(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat()
    Image.new("RGB", (28, 28)).save(tmp_path / "small.png")
    assert "error: The first picture cannot be read" in terminal.ask("/image /no/such.png")
    assert "error: There is no such command; /image FILE" in terminal.ask("/imagine a cat")
    assert "error: /image needs the name of a file." in terminal.ask("/image")
    for number in range(1, 9):
        assert f"picture {number}," in terminal.ask(f"/image {tmp_path / 'small.png'}")
    assert "error: A conversation has at most 8 pictures; /reset" in terminal.ask(f"/image {tmp_path / 'small.png'}")
    terminal.ask("/reset")
    assert "\r\n\r\n19\r\n" in terminal.ask("What is 12 + 7?")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Callable[..., Terminal]) -> None:
    terminal = chat("--temperature", "2", "--seed", "1", "--max-new-tokens", "2000")
    terminal.type("Tell me more.\n")
    terminal.until("\r\n")
    terminal.until("\x1b[0m")  # it thinks
    terminal.type("\x03")
    terminal.until("\n> ")
    terminal.type("never mind")
    terminal.until("never mind")
    terminal.type("\x03")
    terminal.until("\n> ", again="\x03")  # CPython's input() may miss one that comes just before it waits
    assert terminal.ask("What is 12 + 7?"), "it answers again"
    terminal.type("/quit\n")
    assert terminal.status() == 0


def test_options_are_checked_before_the_model_is_loaded() -> None:
    terminal = Terminal("--temperature", "3")
    shown = terminal.until("must be from 0 to 2, or -1.")
    assert "Starting" not in shown
    assert terminal.status() == 2
    terminal.close()
