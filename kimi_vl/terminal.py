"""What a terminal shows, and a conversation that is typed there."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_vl.errors import InvalidRequest
from kimi_vl.output.thinking import Delta
from kimi_vl.request import Request

if TYPE_CHECKING:
    from kimi_vl.service import Service, Usage

DIM, PLAIN = "\033[2m", "\033[0m"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL, C1
CUTS = {"length": ", cut by --max-new-tokens", "timeout": ", cut by the time that it may take"}  # by finish_reason
COMMANDS = "/image FILE adds a picture to the next question, /reset forgets the conversation, /quit ends"


def visible(text: str) -> str:
    """The text with its control characters as escapes, so that it commands no terminal."""
    return CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


def say(line: str) -> None:
    """A line on stderr."""
    print(visible(line), file=sys.stderr, flush=True)


class Screen:
    """Prints an answer as it comes, its thinking dimmed and apart."""

    def __init__(self) -> None:
        dims = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        self._dim, self.plain = (DIM, PLAIN) if dims else ("", "")
        self._thinking = False

    def show(self, delta: Delta) -> None:
        """Prints what is new."""
        if delta.thinking:
            self._thinking = True
            print(f"{self._dim}{visible(delta.thinking)}{self.plain}", end="", flush=True)
        if delta.answer:
            print("\n\n" * self._thinking + visible(delta.answer), end="", flush=True)
            self._thinking = False

    def end(self, usage: "Usage", model: str) -> None:
        """Ends the text, and tells what it took on stderr."""
        print(flush=True)
        cut = CUTS.get(usage.finish_reason, "")
        say(
            f"{usage.input_tokens} tokens in, {usage.thinking_tokens} of thinking and {usage.answer_tokens} of answer "
            f"out{cut}; {usage.time_to_first_token:.2f} s to the first, then {usage.tokens_per_second:.1f} a second; "
            f"{model}"
        )


class Chat:
    """A conversation, question by question.

    A question that got no answer, since it was stopped or refused, is not part of it; its pictures go with the next.
    """

    def __init__(self, service: "Service", options: Request) -> None:
        self._service = service
        self._options = options
        self._reset()

    def run(self) -> None:
        """Reads and answers until /quit or the end of the input; Ctrl-C stops an answer, or the line being typed."""
        import readline  # noqa: F401  from now on, input() has a history and can be edited

        say(COMMANDS)
        while True:
            try:
                line = input("> ").strip()
                if line == "/quit":
                    return
                self._take(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print(Screen().plain)
            except UnicodeDecodeError:
                say("error: What was typed is not text in this terminal's encoding; type it again.")
            except InvalidRequest as error:
                say(f"error: {error}")

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image":
            self._add_picture(Path(os.path.expanduser(argument.strip())))
        elif command == "/reset":
            self._reset()
        elif command.startswith("/"):
            raise InvalidRequest(f"There is no such command; {COMMANDS}.")
        elif line:
            self._ask(line)

    def _reset(self) -> None:
        self._turns: list[dict[str, Any]] = []  # as Request.messages
        self._pictures: list[Path] = []  # of the turns
        self._waiting: list[Path] = []  # for the next question

    def _add_picture(self, file: Path) -> None:
        if file == Path():
            raise InvalidRequest("/image needs the name of a file.")
        pictures, settings = [*self._pictures, *self._waiting, file], self._service.settings
        if len(pictures) > settings.max_images:
            raise InvalidRequest(f"A conversation has at most {settings.max_images} pictures; /reset begins a new one.")
        replace(self._options, prompt="?", images=pictures).check_pictures(settings)
        self._waiting.append(file)
        say(f"It is picture {len(pictures)}, and goes with the next question.")

    def _ask(self, question: str) -> None:
        pictures = [*self._pictures, *self._waiting]
        screen, said = Screen(), ""
        try:
            request = replace(self._options, prompt=question, images=pictures, messages=self._turns)
            with self._service.answer(request) as answer:
                for delta in answer:
                    screen.show(delta)
                    said += delta.answer
            screen.end(answer.usage, self._service.settings.model)
        finally:  # also when it was stopped: what has been read counts as said
            if said:
                numbers = range(len(self._pictures) + 1, len(pictures) + 1)
                self._turns = [*self._turns, _user(question, numbers), {"role": "assistant", "content": said}]
                self._pictures, self._waiting = pictures, []


def _user(text: str, numbers: Sequence[int]) -> dict[str, Any]:
    """A turn with the same tokens as the prompt had: its pictures, by their numbers, before the text."""
    pictures = [{"type": "image_url", "image_url": {"url": f"image:{number}"}} for number in numbers]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
