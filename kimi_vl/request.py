"""What can be asked, and every limit on it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.documents import Documents, parse_pages
from kimi_vl.media.files import memory_file
from kimi_vl.media.images import Images, ordinal
from kimi_vl.media.sources import Fetching, Source, is_url, open_source
from kimi_vl.media.videos import MAX_FRAMES, Video
from kimi_vl.prompt.budget import FLOOR
from kimi_vl.prompt.chat import DEFAULT_SYSTEM_PROMPT
from kimi_vl.prompt.messages import MAX_URL_CHARACTERS, Conversation, read_conversation, shortened
from kimi_vl.settings import Settings

MAX_CHARACTERS = 1_000_000  # of all texts; far more than any context takes, and encoded within a second
MAX_NEW_TOKENS = 32_768
MAX_SEED = 2**63 - 1
MAX_TOP_K = 163_840  # the vocabulary
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 100
MAX_IMAGE_TOKENS = 16_384
MAX_FPS = 100
MAX_TIMEOUT = 86_400  # seconds


@dataclass(frozen=True)
class Request:
    """A question about pictures, and how to answer it."""

    prompt: str
    images: Sequence[Source] = ()
    messages: Sequence[object] = ()  # the conversation before the prompt; see read_conversation
    documents: Sequence[Source] = ()
    pages: str = ""  # of each document, as parse_pages takes them; "": all
    video: Source | None = None
    video_frames: int = 16
    video_fps: float = 0.0  # 0: video_frames counts
    max_image_tokens: int = 0  # of each picture, page and frame; 0: the model's own limit
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    temperature: float = -1.0  # -1: what the model's authors recommend
    top_p: float = 1.0
    max_new_tokens: int = 2048
    seed: int | None = None  # None: a new one, reported with the answer
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    thinking_budget: int = -1  # tokens; -1: no limit, 0: no thinking
    stop: Sequence[str] = ()
    json_schema: str = ""  # of the answer; empty: it is any text
    timeout_s: float = 0.0  # since it came; 0: as long as the service allows

    def check(self, settings: Settings) -> None:
        """Everything that can be known before a file is opened.

        Raises:
            InvalidRequest: something is missing or outside its limits.
        """
        for name, text in (("prompt", self.prompt), ("system prompt", self.system_prompt)):
            if len(text) > MAX_CHARACTERS:
                raise InvalidRequest(
                    f"The {name} has {len(text):,} characters and the limit is {MAX_CHARACTERS:,}; shorten it."
                )
        if (self.documents or self.video) and not self.prompt.strip():
            raise InvalidRequest(
                "Documents and a video belong to the prompt, which is empty; write a question or an instruction."
            )
        conversation = self.conversation()
        characters, pictures = conversation.characters, conversation.pictures
        if characters > MAX_CHARACTERS:
            raise InvalidRequest(
                f"The texts have {characters:,} characters together and the limit is {MAX_CHARACTERS:,}; shorten them."
            )
        if len(pictures) > settings.max_images:
            raise InvalidRequest(
                f"The request has {len(pictures)} pictures and the limit is {settings.max_images}; send fewer."
            )
        if not settings.allow_urls and any(is_url(picture) and picture not in self.images for picture in pictures):
            raise InvalidRequest(
                "A message has a picture's URL and this server fetches none; send a data: URI, or image:N for the N-th "
                "of images."
            )
        most = settings.max_documents
        if len(self.documents) > most:
            raise InvalidRequest(
                f"The request has {len(self.documents)} documents and the limit is {most}; send fewer."
            )
        parse_pages(self.pages)
        if self.pages.strip() and not self.documents:
            raise InvalidRequest("pages picks pages of documents and there are none; send a document or leave it out.")
        _check_range("video_frames", self.video_frames, 1, MAX_FRAMES)
        _check_range("video_fps", self.video_fps, 0, MAX_FPS)
        _check_range("max_image_tokens", self.max_image_tokens, FLOOR, MAX_IMAGE_TOKENS, default=0)
        _check_range("temperature", self.temperature, 0, 2, default=-1)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("top_k", self.top_k, 0, MAX_TOP_K)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("thinking_budget", self.thinking_budget, -1, MAX_NEW_TOKENS)
        _check_range("timeout_s", self.timeout_s, 0, MAX_TIMEOUT)
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(
                f"The request has {len(self.stop)} stop strings and the limit is {MAX_STOPS}; send fewer."
            )
        for position, text in enumerate(self.stop):
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequest(
                    f"The {ordinal(position)} stop string has {len(text):,} characters and must have from 1 to "
                    f"{MAX_STOP_CHARACTERS}."
                )

    def picture_files(self, settings: Settings, fetching: Fetching) -> list[Callable[[], BinaryIO]]:
        """What opens the file of each picture, and raises InvalidRequest when it is not there or too large."""
        return [
            partial(_open, source, position, settings.max_image_bytes, fetching)
            for position, source in enumerate(self.conversation().pictures)
        ]

    def pictures(self, settings: Settings) -> Images:
        """The pictures, their files opened one after the other, and as they are, nothing read yet. It must be closed.

        Raises:
            InvalidRequest: a file cannot be opened or is too large.
        """
        files = [open_picture() for open_picture in self.picture_files(settings, fetching_by(settings))]
        return Images(files, *image_limits(settings))

    def check_pictures(self, settings: Settings) -> None:
        """Reads all pictures, as small as can be.

        Raises:
            InvalidRequest: as for `pictures`, or one cannot be used.
        """
        with closing(self.pictures(settings)) as pictures:
            for _ in pictures.read(1):
                pass

    def conversation(self, introductions: Sequence[str] = ()) -> Conversation:
        """The turns, the prompt's at their end, and the pictures in them.

        Args:
            introductions: what stands before each page and frame in the prompt's turn.
        Raises:
            InvalidRequest: they are not a conversation.
        """
        return read_conversation(self.messages, self.prompt, self.images, self.system_prompt, introductions)

    def attachments(self, settings: Settings, fetching: Fetching) -> list[Documents | Video]:
        """What holds pages and frames, in the order of the prompt; nothing is opened yet. Each must be closed."""
        seconds = settings.max_media_seconds
        attachments: list[Documents | Video] = []
        if self.documents:
            attachments.append(Documents(self.documents, self.pages, settings.max_document_bytes, seconds, fetching))
        if self.video:
            limits = settings.max_video_bytes, settings.max_image_pixels, seconds
            attachments.append(Video(self.video, self.video_frames, self.video_fps, *limits, fetching))
        return attachments


def fetching_by(settings: Settings, deadline: float = math.inf) -> Fetching:
    """How the files of one request are fetched, all of them in the seconds that begin now.

    Args:
        deadline: of the request, on the clock of monotonic().
    """
    return Fetching(settings.max_media_seconds, settings.allow_private_urls, deadline)


def image_limits(settings: Settings) -> tuple[int, int, int]:
    """What Images takes as such."""
    return settings.max_image_pixels, settings.max_request_pixels, settings.max_media_seconds


def named_files(files: Iterable[object], kind: str = "picture") -> list[Source]:
    """What a client named as the files of a request; see named_file."""
    return [named_file(file, f"{ordinal(position)} {kind}") for position, file in enumerate(files)]


def named_file(file: object, name: str) -> Source:
    """A URL or data: URI that a client named; nothing else is ever opened.

    Args:
        file: as it came.
        name: what it is, for messages: "first picture".
    Raises:
        InvalidRequest: it is something else, such as a path, or too long a URL.
    """
    if not isinstance(file, str) or not (is_url(file) or file[:5].lower() == "data:"):
        raise InvalidRequest(f"The {name} is not one that could be fetched; send an http(s) URL or a data: URI.")
    if is_url(file) and len(file) > MAX_URL_CHARACTERS:
        raise InvalidRequest(
            f"The {name} has a URL of {len(file):,} characters and the limit is {MAX_URL_CHARACTERS:,}; send it as a "
            "data: URI."
        )
    return file


def _open(source: Source, position: int, max_bytes: int, fetching: Fetching) -> BinaryIO:
    return open_source(source, f"The {ordinal(position)} picture", "picture", max_bytes, fetching, memory_file)


def _check_range(name: str, value: float, lowest: float, highest: float, default: float | None = None) -> None:
    if not lowest <= value <= highest and value != default:  # also refuses NaN
        or_default = "" if default is None else f", or {default}"
        raise InvalidRequest(f"{name} is {shortened(value)} and must be from {lowest} to {highest}{or_default}.")
