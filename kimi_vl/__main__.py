"""The command line: one question about pictures, answered in the terminal.

What takes seconds to import is imported when the arguments are known to be right.
"""

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kimi_vl.errors import InvalidRequest, Misconfigured
from kimi_vl.model.variants import best_model
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.chat import DEFAULT_SYSTEM_PROMPT
from kimi_vl.request import Request
from kimi_vl.settings import Settings

if TYPE_CHECKING:
    from kimi_vl.service import Answer

ARGUMENTS: dict[str, dict[str, Any]] = {
    "prompt": {"metavar": "PROMPT", "help": "the question or instruction"},
    "images": {
        "metavar": "IMAGE",
        "nargs": "*",
        "default": [],
        "type": Path,
        "help": "picture files, in the order in which the prompt speaks of them",
    },
    "--document": {
        "metavar": "FILE",
        "dest": "documents",
        "action": "append",
        "default": [],
        "type": Path,
        "help": "a PDF, whose pages are seen after the pictures; may be given more than once",
    },
    "--pages": {
        "default": "",
        "help": "which pages of each document: 1-5,8, or 12- to the end (default: all)",
    },
    "--video": {
        "metavar": "FILE",
        "type": Path,
        "help": "an MP4, MOV, WebM, MKV, GIF or animated WebP, of which some frames are seen after pictures and pages",
    },
    "--video-frames": {
        "type": int,
        "default": 16,
        "help": "how many frames, evenly from the first to the last (default: %(default)s)",
    },
    "--video-fps": {
        "type": float,
        "default": 0.0,
        "help": "instead, so many frames for each second of the video (default: --video-frames counts)",
    },
    "--max-image-tokens": {
        "type": int,
        "default": 0,
        "help": "most tokens of each picture, page and frame, from 64 up (default: the model's own limit)",
    },
    "--model": {
        "help": "thinking, thinking-2506, instruct, tiny, a checkpoint folder, or hf://owner/name[@revision] (default: "
        "KIMI_VL_MODEL, else the first of these whose weights are there)",
    },
    "--system-prompt": {
        "default": DEFAULT_SYSTEM_PROMPT,
        "help": "what the model is told to be (default: %(default)s)",
    },
    "--temperature": {
        "type": float,
        "help": "0 always takes the likeliest token, 2 is the most random (default: what its authors recommend)",
    },
    "--top-p": {
        "type": float,
        "default": 1.0,
        "help": "draw from the likeliest tokens that together have this probability (default: %(default)s)",
    },
    "--max-new-tokens": {
        "type": int,
        "default": 2048,
        "help": "longest output, thinking included (default: %(default)s)",
    },
    "--seed": {"type": int, "help": "the same seed gives the same answer (default: a new one each time)"},
    "--json": {"action": "store_true", "help": "print one JSON object and nothing else"},
}
DIM, PLAIN = "\033[2m", "\033[0m"
REQUEST = (
    "prompt",
    "images",
    "documents",
    "pages",
    "video",
    "video_frames",
    "video_fps",
    "max_image_tokens",
    "system_prompt",
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
)
BAD_INPUT, INTERRUPTED, READER_GONE = 2, 130, 141  # exit statuses


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}; --help tells how\n")


def parser() -> Parser:
    """The arguments, each explained to someone who has never seen them."""
    arguments = Parser(prog="python -m kimi_vl", description="Ask Kimi-VL a question about pictures.")
    for names, options in ARGUMENTS.items():
        arguments.add_argument(names, **options)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Answers one prompt; returns the exit status."""
    arguments = parser().parse_intermixed_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a terminal cannot show
    try:
        _answer(arguments)
    except (InvalidRequest, Misconfigured) as error:
        _say(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say(f"{PLAIN if sys.stdout.isatty() else ''}\nstopped")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answer has gone; Python would say so again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return 0


def _answer(arguments: argparse.Namespace) -> None:
    settings = Settings.from_environment()
    settings = replace(settings, model=arguments.model or settings.model or best_model(settings.weights_dir))
    request = Request(**{name: getattr(arguments, name) for name in REQUEST})
    request.check(settings)
    for read in request.pictures(settings):  # what is wrong with them is said before the wait for the weights
        read()
    for attachment in request.attachments(settings):
        with closing(attachment):
            attachment.open()
    _say(f"Starting {settings.model}")
    from kimi_vl.registration import register
    from kimi_vl.service import Service

    register()
    service = Service.load(settings, progress=_say)
    try:
        with service.answer(request) as answer:
            (_print_json if arguments.json else _print_text)(answer, settings.model)
    finally:
        service.close()


def _print_text(answer: "Answer", model: str) -> None:
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    thinking = False
    for delta in answer:
        if delta.thinking:
            thinking = True
            print(f"{dim}{delta.thinking}{plain}", end="", flush=True)
        if delta.answer:
            print("\n\n" * thinking + delta.answer, end="", flush=True)
            thinking = False
    print(flush=True)
    usage = answer.usage
    cut = "" if usage.finish_reason == "stop" else ", cut by --max-new-tokens"
    _say(
        f"{usage.input_tokens} tokens in, {usage.thinking_tokens} of thinking and {usage.answer_tokens} of answer out"
        f"{cut}; {usage.time_to_first_token:.2f} s to the first, then {usage.tokens_per_second:.1f} a second; {model}"
    )


def _print_json(answer: "Answer", model: str) -> None:
    texts = asdict(joined(answer))
    usage = asdict(answer.usage)
    result = {
        **texts,
        "finish_reason": usage.pop("finish_reason"),
        "seed": usage.pop("seed"),
        "model": model,
        "usage": usage,
    }
    print(json.dumps(result, ensure_ascii=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
