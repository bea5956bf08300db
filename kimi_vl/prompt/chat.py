"""Messages → prompt. The only place that puts control tokens into a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kimi_vl.output.thinking import CLOSING, OPENING

if TYPE_CHECKING:
    from kimi_vl.prompt.tokenizer import TikTokenTokenizer

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant"
ROLES = ("system", "user", "assistant")
NO_THINKING = f"{OPENING}\n\n{CLOSING}"  # what a model that thinks takes as thinking that is over

Message = Mapping[
    str, Any
]  # {"role": a role, "content": text, or parts {"type": "text", "text"} and {"type": "image"}}


@dataclass(frozen=True)
class Control:
    """A control token, by name."""

    name: str


MEDIA_PAD = Control("<|media_pad|>")
Piece = str | Control


class ChatPrompt(str):
    """A rendered prompt. It reads as text and remembers which of it is control tokens, so that none can be forged."""

    pieces: tuple[Piece, ...]

    def __new__(cls, pieces: Sequence[Piece]) -> "ChatPrompt":
        prompt = super().__new__(cls, "".join(p.name if isinstance(p, Control) else p for p in pieces))
        prompt.pieces = tuple(pieces)
        return prompt

    @property
    def pictures(self) -> int:
        """Number of pictures that the prompt has places for."""
        return self.pieces.count(MEDIA_PAD)


def question(text: str, pictures: int, introductions: Sequence[str] = ()) -> Message:
    """A user's message: the pictures first, as Moonshot's model cards have it, then the text.

    Args:
        text: the question.
        pictures: how many there are that nothing introduces.
        introductions: a text before each further picture, such as a page's number.
    """
    image, introduced = {"type": "image"}, [{"type": "text", "text": line} for line in introductions]
    further = [part for line in introduced for part in (line, image)]
    return {"role": "user", "content": [*[image] * pictures, *further, {"type": "text", "text": text}]}


def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> ChatPrompt:
    """Renders a conversation in Kimi-VL's chat format, with one <|media_pad|> for each picture.

    Assistant turns lose their thinking. A conversation that does not begin with a system message gets the default one.

    Raises:
        ValueError: a role or a content part that the format does not have.
    """
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, *messages]
    pieces = [piece for message in messages for piece in _turn(message)]
    if add_generation_prompt:
        pieces += _opening("assistant")
    return ChatPrompt(pieces)


def encode(prompt: ChatPrompt, tokenizer: "TikTokenTokenizer", tokens_per_picture: Sequence[int]) -> list[int]:
    """Token ids of a prompt, each picture's <|media_pad|> repeated once for each of its 2x2 blocks of patches.

    Raises:
        ValueError: the number of pictures is not the number of their places in the prompt.
    """
    if prompt.pictures != len(tokens_per_picture):
        raise ValueError(f"the prompt has places for {prompt.pictures} pictures, {len(tokens_per_picture)} were given")
    repeats = iter(tokens_per_picture)
    ids: list[int] = []
    for is_text, run in groupby(prompt.pieces, key=lambda piece: isinstance(piece, str)):
        if is_text:  # neighbouring texts are one text: a token may span them
            ids += tokenizer.encode_text("".join(str(piece) for piece in run))
            continue
        for piece in run:
            assert isinstance(piece, Control)
            ids += [tokenizer.control[piece.name]] * (next(repeats) if piece == MEDIA_PAD else 1)
    return ids


def with_no_thinking(prompt: ChatPrompt) -> ChatPrompt:
    """A prompt after which a model that thinks answers at once."""
    return ChatPrompt([*prompt.pieces, NO_THINKING])


def answer_prefix(tokenizer: "TikTokenTokenizer") -> tuple[int, ...]:
    """The token ids that open each of the model's turns."""
    return tuple(encode(ChatPrompt(_opening("assistant")), tokenizer, []))


def _turn(message: Message) -> Iterator[Piece]:
    role, content = message["role"], message["content"]
    yield from _opening(role)
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match part.get("type"):
            case "text":
                yield without_thinking(part["text"]) if role == "assistant" else part["text"]
            case "image":
                yield from (Control("<|media_start|>"), "image", Control("<|media_content|>"))
                yield from (MEDIA_PAD, Control("<|media_end|>"))
            case other:
                raise ValueError(f"a content part has type {other!r}; only text and image are known")
    yield Control("<|im_end|>")


def _opening(role: str) -> list[Piece]:
    if role not in ROLES:
        raise ValueError(f"a message has role {role!r}; only {', '.join(ROLES)} are known")
    return [Control(f"<|im_{role}|>"), role, Control("<|im_middle|>")]


def without_thinking(text: str) -> str:
    """What an assistant answered: the text after the last closing marker; none if the thinking never ended."""
    if CLOSING not in text and text.lstrip().startswith(OPENING):
        return ""
    return text.rpartition(CLOSING)[2]
