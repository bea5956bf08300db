"""What reads untrusted bytes, and what must hold whatever they are: an exception of a target is a finding."""

import json
import resource
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

from torch import Tensor

from fuzzing.forked import forking
from fuzzing.mutation import mutate_json, mutate_text
from kimi_vl.errors import InvalidRequest
from kimi_vl.media.documents import Documents
from kimi_vl.media.files import memory_file
from kimi_vl.media.image_files import decode, open_picture
from kimi_vl.media.sources import Fetching
from kimi_vl.media.videos import Video
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.output.detokenizer import Detokenizer
from kimi_vl.output.json_constraint import JsonConstraint, JsonConstraints
from kimi_vl.output.stop import StopMatcher
from kimi_vl.output.thinking import CLOSING, OPENING, ThinkingSplitter
from kimi_vl.prompt.budget import Budget, Sized
from kimi_vl.prompt.chat import MEDIA_PAD, encode, render
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.settings import Settings

PIXELS = 1_000_000  # of a picture or frame; the limit's own height would only make the fuzzing slow
MEGABYTES = 100  # that one input may add to the process: many times what so many pixels take
SECONDS = 5  # of a processor
CHARACTERS = 20_000  # of a text that is repeated
LONGEST_REFUSAL = 500
READ_SECONDS = 5
FETCHING = Fetching(READ_SECONDS, private=False)  # nothing: files are data: URIs
NAME = "The first picture"
DRAWN_PICTURES = 4
DRAWN_TOKENS = 60
BLOCK = 9  # tokens of a picture, in prompts

processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
tokenizer = processor.tokenizer
constraints = JsonConstraints(tokenizer)
FIRST_CONTROL = min(tokenizer.control.values())


@dataclass(frozen=True)
class Target:
    """One reader of untrusted bytes."""

    check: Callable[[bytes], None]
    longest: int  # bytes of an input
    short: int  # inputs of a short run
    mutate: Callable[[bytes, Random], bytes] | None = None  # None: as libFuzzer changes bytes

    def __call__(self, data: bytes) -> None:
        """Feeds it.

        Raises:
            Exception: something does not hold.
        """
        memory, started = _peak(), process_time()
        try:
            self.check(data)
        except InvalidRequest as refusal:
            _check_refusal(str(refusal))
        took = (_peak() - memory) >> 20
        assert took < MEGABYTES, f"it took {took} MB of memory"
        assert process_time() - started < SECONDS, f"it took {process_time() - started:.0f} s of a processor"


def pictures(data: bytes) -> None:
    """A picture within the limits, or a refusal."""
    with memory_file() as file:
        file.write(data)
        file.seek(0)
        picture = open_picture(file, NAME, PIXELS)
        seen, _ = decode(picture, NAME, picture.size)
    assert seen.mode == "RGB"
    assert 0 < seen.width * seen.height <= PIXELS
    assert len(seen.tobytes()) == seen.width * seen.height * 3


def documents(data: bytes) -> None:
    """Pages in the size that is asked for, or a refusal; the process that reads them may die of it."""
    _draw(Documents([_uri(data)], "", len(data), READ_SECONDS, FETCHING))


def videos(data: bytes) -> None:
    """Frames in the size that is asked for, or a refusal; the process that reads them may die of it."""
    _draw(Video(_uri(data), 6, len(data) % 3 / 2, len(data), PIXELS, READ_SECONDS, FETCHING))


def messages(data: bytes) -> None:
    """A prompt with as many places as pictures, and control tokens only where the format has them; or a refusal."""
    sent = _json(data)
    if not isinstance(sent, dict) or not all(isinstance(sent.get(key, ""), str) for key in ("prompt", "system")):
        return
    images = sent.get("images")
    count = images % 10 if isinstance(images, int) else 0
    request = Request(
        sent.get("prompt", ""),
        [Path(f"/nowhere/{number}") for number in range(count)],
        sent.get("messages", []),
        system_prompt=sent.get("system", ""),
    )
    settings = Settings()
    request.check(settings)
    conversation, readers = request.conversation(), request.picture_files(settings, FETCHING)
    prompt = render(conversation.turns)
    assert prompt.pictures == len(readers) <= settings.max_images
    ids = encode(prompt, tokenizer, [BLOCK] * len(readers))
    placed = 3 * len(conversation.turns) + 2 + len(readers) * (3 + BLOCK)
    assert sum(token >= FIRST_CONTROL for token in ids) == placed
    assert ids.count(tokenizer.control[MEDIA_PAD.name]) == BLOCK * len(readers)
    for read in readers:
        try:
            read().close()
        except InvalidRequest as refusal:
            _check_refusal(str(refusal))


def thinking(data: bytes) -> None:
    """The parts are the text, wherever it is cut; a stop string ends it before its first place."""
    text, random = data.decode("utf-8", "replace"), Random(len(data))
    whole, cut = _split([text]), _split(_cut(text, random))
    assert whole == cut, "the parts depend on the cuts"
    opened = text.lstrip().startswith(OPENING)
    rest = text.lstrip().removeprefix(OPENING)
    expected = (rest.partition(CLOSING)[0], rest.partition(CLOSING)[2]) if opened else ("", text)
    assert whole == expected
    place = random.randrange(len(text) + 1)
    if stop := text[place : place + random.randrange(1, 9)]:
        matcher = StopMatcher([stop])
        assert "".join([*map(matcher.feed, _cut(text, random)), matcher.close()]) == text.partition(stop)[0]


def tokens(data: bytes) -> None:
    """Text comes back as it was, and has no control tokens. The first byte tells how often it is repeated."""
    text = data[1:].decode("utf-8", "surrogateescape")  # what is no UTF-8 becomes halves of characters
    text = (text * (1 << data[0] % 12 if data else 1))[:CHARACTERS]
    ids = tokenizer.encode_text(text)
    assert all(token < FIRST_CONTROL for token in ids)
    characters = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves are U+FFFD
    assert tokenizer.decode(ids) == characters
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.feed, ids)) == characters


def schema(data: bytes) -> None:
    """A constraint that always allows a token and ends in JSON, or a refusal."""
    text, random = data.decode("utf-8", "replace"), Random(len(data))
    constraint = constraints.by_schema(text, thinks=False)
    drawn = b""
    for _ in range(DRAWN_TOKENS):
        choices = _allowed(constraint)
        assert choices, f"nothing may follow {drawn!r}"
        token = random.choice(choices)
        if token in tokenizer.stop_ids:
            json.loads(drawn)
            return
        drawn += tokenizer.token_bytes(token)
        constraint.accept(token)


TARGETS = {
    "pictures": Target(pictures, longest=20_000, short=3000),
    "documents": Target(documents, longest=20_000, short=40),
    "videos": Target(videos, longest=50_000, short=50),
    "messages": Target(messages, longest=20_000, short=4000, mutate=mutate_json),
    "thinking": Target(thinking, longest=2_000, short=4000, mutate=mutate_text),
    "tokens": Target(tokens, longest=2_000, short=100, mutate=mutate_text),
    "schema": Target(schema, longest=5_000, short=60, mutate=mutate_json),
}


def _uri(data: bytes) -> str:
    return "data:;base64," + b64encode(data).decode()


def _draw(attachment: Documents | Video) -> None:
    """Goes the service's way from a file to its pictures, the first few of them."""
    try:
        with forking():
            attachment.open()
        drawn = [Sized(attachment.kind, *size, attachment.enlarges) for size in attachment.sizes]
        assert len(drawn) == len(attachment.introductions)
        budget = Budget(processor.image_processor, 8192, 2048, lambda count: 20 * count)
        share = budget.share(drawn, 0, 256)
        sizes = [each.size(processor.image_processor, share) for each in drawn[:DRAWN_PICTURES]]
        attachment.send_sizes(sizes)
        for position, size in enumerate(sizes):
            assert attachment.picture(position).size == size
    finally:
        attachment.close()


def _split(chunks: list[str]) -> tuple[str, str]:
    splitter = ThinkingSplitter()
    deltas = [*map(splitter.feed, chunks), splitter.close()]
    return "".join(delta.thinking for delta in deltas), "".join(delta.answer for delta in deltas)


def _cut(text: str, random: Random) -> list[str]:
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(random.randrange(20)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _allowed(constraint: JsonConstraint) -> list[int]:
    mask: Tensor = constraint.mask()
    return [32 * place + bit for place, word in enumerate(mask.tolist()) for bit in range(32) if word >> bit & 1]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _check_refusal(text: str) -> None:
    """One short sentence, which can be shown anywhere and tells nothing of this machine."""
    assert len(text) < LONGEST_REFUSAL and text.isprintable() and text.endswith("."), repr(text)
    assert not any(part in text for part in ("/nowhere", "/tmp", "/home", "Traceback", ".py", "0x7f")), text


def _peak() -> int:
    """Most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


constraints.by_schema("{}", thinks=False)  # what is made once is no input's fault
