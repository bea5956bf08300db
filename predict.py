"""Cog's front door."""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from threading import Thread, Timer
from typing import Optional  # the only way to leave a file out that Cog's schema knows

import coglet
from cog import BaseModel, BasePredictor, Input, Path, streaming

from kimi_vl.errors import InvalidRequest
from kimi_vl.output.pacing import Reporter, in_chunks, joined
from kimi_vl.request import Request, named_file, named_files
from kimi_vl.service import Answer, Service
from kimi_vl.settings import Settings

CHUNK_SECONDS = 0.03  # a reader sees it live, and the server has few events to send
LAST_SECONDS = 1  # of a worker and of a server that end: the failed prediction is answered by then


# Left to itself, Cog fetches files before predict() has a say: any number, of any size, from any address.
Path.validate = staticmethod(lambda value: value)


class Delta(BaseModel):
    """A piece of the output; without streaming the only one."""

    thinking: str
    answer: str


def _log(text: str) -> None:
    """Prints to the server's log alone: Cog sends a client everything that the prediction's own thread prints."""
    thread = Thread(target=print, args=(text,), kwargs={"file": sys.stderr, "flush": True})
    thread.start()
    thread.join()


def _bind_server() -> subprocess.Popen[bytes] | None:
    """Has Cog's server end when this worker of it does, even by SIGKILL: alone it would stay and answer 409 for ever.

    Returns:
        What must be kept until then: the process that waits for it, at the other end of a pipe.
    """
    if not coglet.server.active:
        return None
    command = ["sh", "-c", f'read -r _; sleep {LAST_SECONDS}; kill "$0"', str(os.getppid())]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing)


class Predictor(BasePredictor):
    """Kimi-VL, loaded once, one prediction at a time."""

    def setup(self) -> None:
        """Loads the model that KIMI_VL_MODEL names."""
        settings = Settings.from_environment()
        self.reporter = Reporter(seconds=1)
        settings = replace(settings, model=settings.model or "thinking")
        self.service = Service.load(settings, progress=print, fetch_absent=bool(settings.weights_dir))
        self.bond = _bind_server()

    def healthcheck(self) -> bool:
        """Whether requests can succeed. When none ever will, this also ends the server, for a supervisor to restart."""
        healthy = self.service.healthy
        if not healthy:
            _log("The GPU or the thread that runs it is lost: this server ends, so that a new one can be started")
            if coglet.server.active:
                Timer(LAST_SECONDS, os._exit, [1]).start()  # and the server with it: see _bind_server
        return healthy

    @streaming
    def predict(
        self,
        prompt: str = Input(
            description="Your question or instruction. With messages, their last turn; it may then be empty, but not "
            "with documents or a video.",
            default="",
        ),
        images: list[Path] = Input(
            description="Up to eight pictures, in the order in which the prompt speaks of them: PNG, JPEG, WebP, GIF, "
            "BMP, TIFF, AVIF or HEIC.",
            default=[],
            accept="image/*",
        ),
        messages: list[dict] = Input(
            description="A conversation in OpenAI's chat format, before the prompt: JSON objects with a role (system, "
            'user or assistant) and a content: a text, or a list of {"type": "text", "text": …} and {"type": '
            '"image_url", "image_url": {"url": …}}, where the URL is a data: URI, or image:1 for the first of images.',
            default=[],
        ),
        documents: list[Path] = Input(
            description="PDFs. The model sees their pages as pictures, after your images, and is told the page and the "
            "file of each.",
            default=[],
            accept="application/pdf",
        ),
        pages: str = Input(
            description="Which pages of each document, such as 1-5,8 or 12- for the twelfth and all that follow. Empty "
            "takes all.",
            default="",
            max_length=1000,
        ),
        video: Optional[Path] = Input(  # noqa: UP045
            description="An MP4, MOV, WebM, MKV, GIF or animated WebP. The model sees some of its frames as pictures, "
            "after your images and documents, and knows the time of each; it hears nothing.",
            default=None,
            accept="video/*,image/gif,image/webp",
        ),
        video_frames: int = Input(
            description="How many frames of the video, spread evenly from the first to the last.",
            default=16,
            ge=1,
            le=256,
        ),
        video_fps: float = Input(
            description="Instead of a fixed number, take this many frames for each second of the video; 0 leaves it to "
            "video_frames.",
            default=0,
            ge=0,
            le=100,
        ),
        max_image_tokens: int = Input(
            description="Most tokens of each picture, page and frame, from 64 up: fewer are faster, more show more "
            "detail. 0 is the model's own limit. When many pages or frames would not fit, each gets fewer.",
            default=0,
            ge=0,
            le=16384,
        ),
        system_prompt: str = Input(
            description="What the model is told to be, before your prompt. Not together with a system message.",
            default="You are a helpful assistant",
        ),
        temperature: float = Input(
            description="How random the text is: 0 always takes the likeliest word, 2 is the most random, -1 is what "
            "the model's authors recommend.",
            default=-1,
            ge=-1,
            le=2,
        ),
        top_p: float = Input(
            description="Draw only from the likeliest words that together have this probability.",
            default=1.0,
            ge=0,
            le=1,
        ),
        max_new_tokens: int = Input(
            description="The longest output in tokens, thinking included. A token is about three quarters of a word.",
            default=2048,
            ge=1,
            le=32768,
        ),
        seed: int = Input(
            description="The same seed gives the same answer to the same request. -1 picks one; the metrics tell it.",
            default=-1,
            ge=-1,
        ),
        top_k: int = Input(
            description="Draw only from so many of the likeliest words. 0 draws from all.", default=0, ge=0, le=163840
        ),
        min_p: float = Input(
            description="Draw only from words at least this probable, as a share of the likeliest word's probability.",
            default=0.0,
            ge=0,
            le=1,
        ),
        repetition_penalty: float = Input(
            description="Above 1 makes words that the model has already written less likely, below 1 likelier; 1 does "
            "nothing.",
            default=1.0,
            ge=0.01,
            le=100,
        ),
        presence_penalty: float = Input(
            description="Above 0 makes words that the model has already written less likely, below 0 likelier, however "
            "often they came.",
            default=0.0,
            ge=-2,
            le=2,
        ),
        frequency_penalty: float = Input(
            description="Above 0 makes words that the model has already written less likely, below 0 likelier, the "
            "more so the more often they came.",
            default=0.0,
            ge=-2,
            le=2,
        ),
        thinking_budget: int = Input(
            description="The most tokens that the model may think for before it must answer: -1 for as many as it "
            "likes, 0 for no thinking. A model that does not think ignores it.",
            default=-1,
            ge=-1,
            le=32768,
        ),
        stop: list[str] = Input(
            description="Up to eight texts, of 100 characters at most. The answer ends before the first that comes up "
            "in it; the thinking does not.",
            default=[],
        ),
        json_schema: str = Input(
            description="A JSON Schema, as text. The answer is then JSON that follows it, for a program to read; "
            "thinking may still go before it.",
            default="",
        ),
        timeout_s: float = Input(
            description="Seconds after which you get what was made so far, perhaps nothing, and the finish_reason "
            "timeout. 0 is as long as the server allows.",
            default=0,
            ge=0,
            le=86400,
        ),
        stream: bool = Input(
            description="Send the text piece by piece as it is made, instead of all of it at the end.", default=False
        ),
    ) -> Iterator[Delta]:
        """Answers one prompt, thinking and answer apart."""
        answer: Answer | None = None

        def report() -> None:
            print(answer.progress() if answer else "Reading the request")

        try:
            with self.reporter.during(report):
                request = Request(
                    prompt=prompt,
                    images=named_files(images),
                    messages=messages,
                    documents=named_files(documents, "document"),
                    pages=pages,
                    video=None if video is None else named_file(video, "video"),
                    video_frames=int(video_frames),
                    video_fps=float(video_fps),
                    max_image_tokens=int(max_image_tokens),
                    system_prompt=system_prompt,
                    # Numbers come as JSON has them: 1 as an int, 1.0 as a float, whatever is declared.
                    temperature=float(temperature),
                    top_p=float(top_p),
                    max_new_tokens=int(max_new_tokens),
                    seed=None if seed == -1 else int(seed),
                    top_k=int(top_k),
                    min_p=float(min_p),
                    repetition_penalty=float(repetition_penalty),
                    presence_penalty=float(presence_penalty),
                    frequency_penalty=float(frequency_penalty),
                    thinking_budget=int(thinking_budget),
                    stop=stop,
                    json_schema=json_schema,
                    timeout_s=float(timeout_s),
                )
                with self.service.answer(request) as answer:
                    for delta in in_chunks(answer, CHUNK_SECONDS) if stream else [joined(answer)]:
                        yield Delta(thinking=delta.thinking, answer=delta.answer)
            for name, value in asdict(answer.usage).items():
                self.record_metric(name, value)
        except InvalidRequest:
            raise
        except Exception:  # ours: the log tells what happened, the client that it was not at fault
            _log(traceback.format_exc())
            self.healthcheck()  # nobody else may ask
            raise RuntimeError("The server failed to answer; your request is not at fault, send it again.") from None
