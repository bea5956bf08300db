"""Whatever the model writes: valid UTF-8 for every client, and no command for a terminal."""

import json
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_vl.__main__ import _print_json, _print_text
from kimi_vl.engine.base import Engine, Generation, ModelInputs
from kimi_vl.model.variants import UNNAMED, WEIGHTS
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.request import Request
from kimi_vl.service import Answer, Service
from kimi_vl.settings import Settings
from tests.attacks.sentences import must_answer
from tests.contract.conftest import Server

PROCESSOR = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
TOKENIZER = PROCESSOR.tokenizer
BYTES = {TOKENIZER.token_bytes(token): token for token in range(TOKENIZER.vocab_size)}
HOSTILE = [
    b"\xed\xa0\x80\xed\xb0\x80",  # surrogates
    b"\xff\xfe\xc0\xaf\xf8\x88\x80\x80\x80",  # no UTF-8 at all
    b"\xf0\x9f\x98",  # a character that never ends
    b"\0\x08\x0d\x7f",
    b"\x1b[2J\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1bPq\x1b\\",
    "\x9b31m\x9d\x90\u0085".encode(),
]


class Parrot(Engine):
    """Says what it is told to, byte by byte."""

    says = b""
    tokens: tuple[int, ...] = ()

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        for token in (*self.tokens, *(BYTES[bytes([byte])] for byte in self.says)):
            if not generation.emit(token):
                return
        generation.emit(min(generation.params.stop_ids))


@pytest.fixture(scope="module")
def parrot() -> Parrot:
    return Parrot(context_length=100_000)


@pytest.fixture(scope="module")
def service(parrot: Parrot) -> Iterator[Service]:
    service = Service(Settings(), UNNAMED, PROCESSOR, parrot)
    yield service
    service.close()


def says(service: Service, text: bytes, thinks: bool) -> Answer:
    engine = service._engine
    assert isinstance(engine, Parrot)
    engine.tokens, engine.says = (), "◁think▷".encode() * thinks + text
    return service.answer(Request("x", max_new_tokens=30_000))


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_is_sent_no_command(
    service: Service, text: bytes, thinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for show in (_print_text, _print_json):
        screen = BytesIO()
        monkeypatch.setattr("sys.stdout", TextIOWrapper(screen, "utf-8", write_through=True))
        monkeypatch.setattr("sys.stderr", TextIOWrapper(screen, "utf-8", write_through=True))
        show(says(service, text, thinks), "a model")
        shown = screen.getvalue().decode()  # it is UTF-8
        assert all(
            character in "\n\t" or (character >= " " and not "\x7f" <= character <= "\x9f") for character in shown
        )


@given(tokens=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40), stop=st.text(max_size=3))
def test_every_piece_of_every_output_is_utf_8(tokens: list[int], stop: str) -> None:
    engine = Parrot(context_length=100_000)
    service = Service(Settings(), UNNAMED, PROCESSOR, engine)
    engine.tokens = tuple(tokens)
    for delta in service.answer(Request("x", stop=[stop] if stop else [], max_new_tokens=30_000)):
        json.loads(json.dumps([delta.thinking, delta.answer], ensure_ascii=False).encode())
    service.close()


def test_what_clients_get_is_utf_8_and_json(server: Server) -> None:
    """At this temperature the tiny model writes any token."""
    for seed in range(5):
        request = {"prompt": "x", "temperature": 2, "seed": seed, "max_new_tokens": 200}
        (plain,) = server.predict(**request)["output"]
        streamed = [data["chunk"] for kind, data in server.events(**request, stream=True) if kind == "output"]
        for name in ("thinking", "answer"):
            assert plain[name].encode().decode() == "".join(chunk[name] for chunk in streamed)
    must_answer(server)


@pytest.mark.parametrize(
    "text", ["\0", "\x1b[2J\x9b", "\u202e\u2066", "\ufffe\uffff", "\U0010ffff", "\r\n\x0b\x0c\u2028"]
)
def test_odd_characters_of_a_client_are_answered(server: Server, text: str) -> None:
    result = server.predict(prompt=text + "x", system_prompt=text, stop=[text], max_new_tokens=3)
    assert result["status"] == "succeeded"
