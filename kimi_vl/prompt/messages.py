"""A conversation in OpenAI's chat format → turns and their pictures, every shape of it checked."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.sources import Source
from kimi_vl.prompt.chat import DEFAULT_SYSTEM_PROMPT, ROLES, Message, question

MAX_MESSAGES = 1_000
MAX_PARTS = 10_000  # of all messages together
MAX_URL_CHARACTERS = 8_000
IMAGE_NUMBER = re.compile(r"image:([1-9][0-9]{0,5})", re.ASCII)
DETAILS = (None, "auto", "low", "high")  # the same to this model: it sees every picture as large as it can


@dataclass(frozen=True)
class Conversation:
    """What is asked, as `render` takes it."""

    turns: list[Message]  # the system's first, a user's last
    pictures: list[Source]  # what their image parts stand for, in order

    @property
    def characters(self) -> int:
        """Length of all texts together."""
        contents = [turn["content"] for turn in self.turns]
        return sum(
            len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
            for content in contents
        )


def read_conversation(
    messages: Sequence[object],
    prompt: str,
    images: Sequence[Source],
    system_prompt: str,
    introductions: Sequence[str] = (),
) -> Conversation:
    """Checks a conversation, and puts the prompt at its end.

    Args:
        messages: {"role", "content"}, as OpenAI's clients send them. Content is text or, a user's, parts: {"type":
            "text", "text"} and {"type": "image_url", "image_url": {"url"}} with a data: URI, image:N or an https URL.
        prompt: the last user turn; may be empty if the messages end with one.
        images: the pictures that image:N names, from 1. Those that no message names come before the prompt's text.
        system_prompt: the system's turn, unless the first message is one.
        introductions: texts before further pictures of the prompt's turn, which are not among its sources.
    Raises:
        InvalidRequest: something has another shape, is not known, or does not fit together.
    """
    if not isinstance(messages, list | tuple):
        raise InvalidRequest("messages is not a list; send a list of objects with role and content.")
    if not messages and not prompt.strip():
        raise InvalidRequest("The prompt is empty; write a question or an instruction.")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"There are {len(messages):,} messages and the limit is {MAX_MESSAGES:,}; leave out the oldest."
        )
    reader = _Reader(images)
    turns = [reader.turn(message, number) for number, message in enumerate(messages, start=1)]
    unnamed = [number for number in range(1, len(images) + 1) if number not in reader.named]
    if prompt.strip():
        turns.append(question(prompt, len(unnamed), introductions))
        reader.pictures += [images[number - 1] for number in unnamed]
    elif unnamed:
        raise InvalidRequest(
            f"No message names image:{unnamed[0]} and there is no prompt that it could belong to; name it in a message "
            "or leave it out."
        )
    else:
        _check_end(turns[-1])
    if turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system_prompt})
    elif system_prompt != DEFAULT_SYSTEM_PROMPT:
        raise InvalidRequest("There are a system_prompt and a system message; send one of them.")
    return Conversation(turns, reader.pictures)


@dataclass
class _Reader:
    """Goes through the messages and gathers their pictures."""

    images: Sequence[Source]
    pictures: list[Source] = field(default_factory=list)
    named: set[int] = field(default_factory=set)  # of the images, from 1
    parts: int = 0

    def turn(self, message: object, number: int) -> Message:
        """One message, as `render` takes it; messages are numbered from 1."""
        name = f"Message {number}"
        fields = _fields(message, name, ("role", "content"))
        role, content = fields["role"], fields["content"]
        if role not in ROLES:
            raise InvalidRequest(f"{name} has the role {shortened(role)}; only {', '.join(ROLES)} are known.")
        if role == "system" and number > 1:
            raise InvalidRequest(f"{name} is a system message; only the first message may be one.")
        if isinstance(content, str):
            return {"role": role, "content": content}
        if not isinstance(content, list):
            raise InvalidRequest(f"The content of message {number} is neither a text nor a list of parts; send either.")
        self.parts += len(content)
        if self.parts > MAX_PARTS:
            raise InvalidRequest(f"The messages have more than {MAX_PARTS:,} parts, the limit; join their texts.")
        parts = [self._part(part, role, f"Part {place} of message {number}") for place, part in enumerate(content, 1)]
        if role == "user":
            return {"role": role, "content": parts}
        return {"role": role, "content": "".join(part["text"] for part in parts)}  # thinking may span them

    def _part(self, part: object, role: str, name: str) -> Mapping[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text = _fields(part, name, ("type", "text"))["text"]
            if not isinstance(text, str):
                raise InvalidRequest(f"The text of {_lower(name)} is not a string; send a string.")
            return {"type": "text", "text": text}
        if kind == "image_url" and role == "user":
            self.pictures.append(self._source(_fields(part, name, ("type", "image_url"))["image_url"], name))
            return {"type": "image"}
        if kind == "image_url":
            raise InvalidRequest(f"{name} is a picture in a message of the {role}; only a user's may have some.")
        raise InvalidRequest(f"{name} has the type {shortened(kind)}; only text and image_url are known.")

    def _source(self, image_url: object, name: str) -> Source:
        fields = _fields(image_url, f"The image_url of {_lower(name)}", ("url",), ("detail",))
        url = fields["url"]
        if fields.get("detail") not in DETAILS:
            raise InvalidRequest(f"{name} has the detail {shortened(fields['detail'])}; send auto, low or high.")
        if not isinstance(url, str):
            raise InvalidRequest(f"The url of {_lower(name)} is not a string; send a data: URI or image:N.")
        if match := IMAGE_NUMBER.fullmatch(url):
            number = int(match[1])
            if number > len(self.images):
                raise InvalidRequest(
                    f"{name} names image:{number} and images has {len(self.images)}; add it there or name another."
                )
            self.named.add(number)
            return self.images[number - 1]
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return url
        if scheme == "https://" and len(url) > MAX_URL_CHARACTERS:
            raise InvalidRequest(
                f"The URL in {_lower(name)} has {len(url):,} characters and the limit is {MAX_URL_CHARACTERS:,}; "
                "send the picture as a data: URI."
            )
        if scheme == "https://":
            return url
        raise InvalidRequest(
            f"The url of {_lower(name)} is no data: URI, image:N (the N-th of images, from 1) or, if this server "
            "fetches them, https URL; send one."
        )


def _fields(value: object, name: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """An object that has what is needed and nothing else that says something."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} is not an object; send an object with {' and '.join(needed)}.")
    for key in needed:
        if key not in value:
            raise InvalidRequest(f"{name} has no {key}; send an object with {' and '.join(needed)}.")
    for key, said in value.items():
        if key not in needed + optional and said is not None and said != []:  # OpenAI's clients send empty ones along
            raise InvalidRequest(f"{name} has {shortened(key)}, which means nothing here; leave it out.")
    return value


def _check_end(turn: Message) -> None:
    if turn["role"] != "user":
        raise InvalidRequest("The last message is not a user's; end with what the model is to answer, or add a prompt.")
    content = turn["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise InvalidRequest("The last message is empty; write a question or an instruction.")


def shortened(value: object) -> str:
    """What a client sent, for an error: its first 60 characters, none of which commands a terminal."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lower(name: str) -> str:
    """Within a sentence."""
    return name[0].lower() + name[1:]
