"""The command line: a question about pictures answered in the terminal, or a conversation.

What takes seconds to import is imported when the arguments are known to be right.
"""

import argparse
import errno
import json
import os
import re
import sys
from contextlib import closing
from dataclasses import asdict, replace
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from kimi_vl.errors import InvalidRequest, Misconfigured
from kimi_vl.imports import uncollected
from kimi_vl.model.variants import best_model
from kimi_vl.output.boxes import draw_shapes, find_shapes
from kimi_vl.output.pacing import joined
from kimi_vl.prompt.chat import DEFAULT_SYSTEM_PROMPT
from kimi_vl.request import Request, fetching_by
from kimi_vl.settings import Settings
from kimi_vl.terminal import Chat, Screen, say, visible

if TYPE_CHECKING:
    from kimi_vl.service import Answer

BOXES_PIXELS = 16_000_000  # of the picture that the boxes are drawn onto
MAX_FILE_BYTES = 100 * 2**20  # of messages and schemas, as Cog's server takes


def file_bytes(name: str) -> bytes:
    """What is in a file, or comes from stdin for -.

    Raises:
        ArgumentTypeError: it cannot be read, or is too large.
    """
    if name == "-" and not sys.stdin:
        raise argparse.ArgumentTypeError("stdin is closed")
    try:
        with open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        raise argparse.ArgumentTypeError("the file cannot be read; check that it exists") from None
    if len(data) > MAX_FILE_BYTES:
        raise argparse.ArgumentTypeError(f"the file has more than {MAX_FILE_BYTES:,} bytes, the limit")
    return data


def schema_file(name: str) -> str:
    """The text of a file; none without a name, which is argparse's way to ask for the default.

    Raises:
        ArgumentTypeError: it cannot be read, is too large, empty, or no text.
    """
    try:
        text = file_bytes(name).decode() if name else ""
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError("the file is not text; write a JSON Schema") from None
    if name and not text:  # a request would take it for none
        raise argparse.ArgumentTypeError("the file is empty; write a JSON Schema")
    return text


def messages_file(name: str) -> list[object]:
    """The messages in a JSON file, or in stdin for -.

    Raises:
        ArgumentTypeError: it cannot be read, is too large, or holds no list of messages.
    """
    try:
        messages = json.loads(file_bytes(name))
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError("the file is not JSON; write a list of messages") from None
    if not isinstance(messages, list) or not messages:
        raise argparse.ArgumentTypeError("the file holds no list of messages; write one")
    return messages


ARGUMENTS: dict[str, dict[str, Any]] = {
    "prompt": {
        "metavar": "PROMPT",
        "nargs": "?",
        "help": "the question or instruction; without one, and without --messages, a conversation begins",
    },
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
        "default": -1.0,
        "help": "0 always takes the likeliest token, 2 is the most random (default: -1, what its authors recommend)",
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
    "--top-k": {
        "type": int,
        "default": 0,
        "help": "draw from so many of the likeliest tokens; 0 draws from all (default: %(default)s)",
    },
    "--min-p": {
        "type": float,
        "default": 0.0,
        "help": "draw from tokens at least this probable, as a share of the likeliest one's (default: %(default)s)",
    },
    "--repetition-penalty": {
        "type": float,
        "default": 1.0,
        "help": "above 1 makes tokens that were generated less likely, below 1 likelier (default: %(default)s)",
    },
    "--presence-penalty": {
        "type": float,
        "default": 0.0,
        "help": "from -2 to 2; above 0 makes tokens that were generated less likely (default: %(default)s)",
    },
    "--frequency-penalty": {
        "type": float,
        "default": 0.0,
        "help": "the same, the more so the more often they were generated (default: %(default)s)",
    },
    "--thinking-budget": {
        "type": int,
        "default": -1,
        "help": "most tokens of thinking before the answer; 0: no thinking, -1: no limit (default: %(default)s)",
    },
    "--stop": {
        "metavar": "TEXT",
        "action": "append",
        "default": [],
        "help": "end the answer before this text; may be given up to eight times",
    },
    "--json-schema": {
        "metavar": "FILE",
        "type": schema_file,
        "default": "",
        "help": "a JSON Schema that the answer must follow",
    },
    "--timeout-s": {
        "metavar": "SECONDS",
        "type": float,
        "default": 0.0,
        "help": "end with what was made so far, counted from when the model is ready (default: no limit)",
    },
    "--messages": {
        "metavar": "FILE",
        "type": messages_file,
        "default": (),
        "help": "a conversation before the prompt, in OpenAI's chat format: a JSON list of messages, - for stdin; "
        "image:1 is the first IMAGE, and PROMPT may be ''",
    },
    "--show-boxes": {
        "metavar": "FILE",
        "type": Path,
        "help": "draw the boxes and points that the answer holds onto the first picture, into this file",
    },
    "--json": {"action": "store_true", "help": "print one JSON object and nothing else"},
}
C1 = re.compile(r"[\x7f-\x9f]")  # JSON need not escape these, and a terminal may obey them
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
ENDS = ("max_new_tokens", "thinking_budget", "stop", "json_schema", "timeout_s")
MEDIA = ("images", "documents", "pages", "video", "video_frames", "video_fps", "max_image_tokens")
REQUEST = ("prompt", "messages", "system_prompt", *MEDIA, *SAMPLING, "seed", *ENDS)
NO_SPACE, BAD_INPUT, INTERRUPTED, READER_GONE = 1, 2, 130, 141  # exit statuses


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, visible(f"error: {message}; --help tells how\n"))


def parser() -> Parser:
    """The arguments, each explained to someone who has never seen them."""
    arguments = Parser(prog="python -m kimi_vl", description="Ask Kimi-VL a question about pictures.")
    for names, options in ARGUMENTS.items():
        arguments.add_argument(names, **options)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Answers one prompt, or holds a conversation; returns the exit status."""
    sys.stderr = sys.stderr or StringIO()  # where it is closed, print would take stdout, and the answer goes there
    arguments = parser().parse_intermixed_args(argv)
    if not sys.stdout:
        parser().error("stdout is closed, and the answer would go there")
    chats = arguments.prompt is None and not arguments.messages
    if chats and (arguments.json or not sys.stdin or not sys.stdin.isatty()):
        parser().error("a PROMPT is missing")
    if arguments.prompt and os.path.isfile(arguments.prompt):  # which takes any text, unlike Path
        parser().error(
            f"{arguments.prompt} is a file; the PROMPT goes before it, and /image adds one in a conversation"
        )
    if arguments.show_boxes:
        if chats or not arguments.images:
            parser().error("argument --show-boxes: there is no picture to draw on; give a PROMPT and an IMAGE")
        kind = Image.registered_extensions().get(arguments.show_boxes.suffix.lower())
        if kind not in Image.SAVE or not arguments.show_boxes.parent.is_dir():
            parser().error("argument --show-boxes: name a .png, .jpg or .webp file in a folder that exists")
    arguments.prompt = "?" if chats else arguments.prompt or ""  # to check the options before the first question
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a terminal cannot show
    try:
        _answer(arguments, chats)
    except (InvalidRequest, Misconfigured) as error:
        say(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        print(Screen().plain, file=sys.stderr)
        say("stopped")
        return INTERRUPTED
    except OSError as error:  # whoever read the answer has gone, or the disk is full
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again when it flushes
        if error.errno == errno.EPIPE:
            return READER_GONE
        say("error: the answer cannot be written: there is no space left")
        return NO_SPACE
    return 0


def _answer(arguments: argparse.Namespace, chats: bool) -> None:
    settings = Settings.from_environment()
    settings = replace(settings, model=arguments.model or settings.model or best_model(settings.weights_dir))
    request = Request(**{name: getattr(arguments, name) for name in REQUEST})
    request.check(settings)
    if not settings.allow_urls:  # else a picture might be downloaded twice
        request.check_pictures(settings)  # what is wrong with them is said before the wait for the weights
    for attachment in request.attachments(settings, fetching_by(settings)):
        with closing(attachment):
            attachment.open()
    say(f"Starting {settings.model}")
    with uncollected():
        from kimi_vl.registration import register
        from kimi_vl.service import Service

        register()
    service = Service.load(settings, progress=say)
    try:
        if chats:
            Chat(service, request).run()
            return
        with service.answer(request) as answer:
            text = (_print_json if arguments.json else _print_text)(answer, settings.model)
        if arguments.show_boxes:
            with closing(request.pictures(settings)) as pictures:
                _show_boxes(text, next(pictures.read(BOXES_PIXELS)), arguments.show_boxes)
    finally:
        service.close()


def _print_text(answer: "Answer", model: str) -> str:
    """Returns the answer without its thinking, as _print_json does."""
    screen, text = Screen(), ""
    for delta in answer:
        screen.show(delta)
        text += delta.answer
    screen.end(answer.usage, model)
    return text


def _print_json(answer: "Answer", model: str) -> str:
    whole = joined(answer)
    usage = asdict(answer.usage)
    result = {
        **asdict(whole),
        "finish_reason": usage.pop("finish_reason"),
        "seed": usage.pop("seed"),
        "model": model,
        "usage": usage,
    }
    print(C1.sub(lambda control: f"\\u{ord(control[0]):04x}", json.dumps(result, ensure_ascii=False)))
    return whole.answer


def _show_boxes(text: str, picture: Image.Image, file: Path) -> None:
    shapes = find_shapes(text)
    if not shapes:
        say("The answer holds no boxes or points; nothing is drawn")
        return
    try:
        draw_shapes(picture, shapes).save(file)
    except (OSError, ValueError):
        raise InvalidRequest(f"{file} cannot be written; name a file that can be.") from None
    say(f"Drew {len(shapes)} boxes and points of the answer in {file}")


if __name__ == "__main__":
    sys.exit(main())
