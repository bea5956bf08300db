"""Requests that would take much: refused, or prepared within bounds of time and memory, before the model runs."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimi_vl.output.json_constraint import MAX_SCHEMA_CHARACTERS
from kimi_vl.request import MAX_CHARACTERS
from tests.attacks.sentences import must_answer, refusal
from tests.contract.conftest import Server

SECONDS = 30  # a tenth of it where the machine has nothing else to do
MEGABYTES = 600
LONGEST = MAX_CHARACTERS - 100  # beside the system prompt
WORD = "".join(chr(ord("a") + n * n % 26) for n in range(24_999))

TEXTS = {
    **{
        repr(unit): (unit * LONGEST)[:LONGEST]
        for unit in ("a", " \n", "\u0301", "ＡＢ", "a'", "1", "!\n", "中a", "\u3000")
    },
    "words of 25,000 characters": f"{WORD} " * (LONGEST // 25_000),
    "every character": "".join(map(chr, range(0xE000, 0xE000 + LONGEST))),
    "control tokens": ("<|im_end|>" * LONGEST)[:LONGEST],
}


def workers(server: Server) -> list[Path]:
    """Folders of /proc of all the server's processes."""
    group = server.process.pid
    return [folder for folder in Path("/proc").glob("[0-9]*") if _group(folder) == group]


def _group(folder: Path) -> int:
    try:
        return os.getpgid(int(folder.name))
    except ProcessLookupError:
        return 0


def megabytes(server: Server) -> int:
    """What they have in memory."""
    pages = sum(int((folder / "statm").read_text().split()[1]) for folder in workers(server))
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def bounded(server: Server, send: Callable[[], dict[str, Any]], most: int = MEGABYTES) -> dict[str, Any]:
    """The result of a request that took neither long nor much."""
    before, started = megabytes(server), time.monotonic()
    result = send()
    assert time.monotonic() - started < SECONDS
    assert megabytes(server) - before < most
    return result


@pytest.mark.parametrize("kind", TEXTS)
def test_long_texts_are_counted_and_refused(server: Server, kind: str) -> None:
    sentence = refusal(bounded(server, lambda: server.predict(prompt="x" + TEXTS[kind])))
    assert " tokens with its pictures, and this model takes at most 8,191; shorten the text" in sentence


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"prompt": "a" * 10_000_000}, "The prompt has 10,000,000 characters and the limit is 1,000,000; shorten it."),
        ({"prompt": "a", "system_prompt": "a" * 10_000_000}, "The system prompt has 10,000,000 characters"),
        ({"messages": [{"role": "user", "content": "a"}] * 100_000}, "There are 100,000 messages and the limit is"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}]},
            "The messages have more than 10,000 parts, the limit; join their texts.",
        ),
        ({"messages": [{"role": "user", "content": {"a": "b" * 10**7}}]}, "is neither a text nor a list of parts"),
        ({"messages": [{"role": "x" * 10**7, "content": ""}]}, "Message 1 has the role 'xxxxxxxx"),
        ({"messages": [{str(n): n for n in range(10**5)}]}, "Message 1 has no role; send an object"),
        ({"prompt": "a", "images": ["data:,"] * 100_000}, "The request has 100000 pictures and the limit is 8"),
        ({"prompt": "a", "images": ["https://127.0.0.1/"] * 100_000}, "The request has 100000 pictures and the limit"),
        ({"prompt": "a", "documents": ["data:,"] * 100_000}, "The request has 100000 documents and the limit is 8"),
        ({"prompt": "a", "images": ["https://" + "a" * 10**7]}, "has a URL of 10,000,008 characters and the limit is"),
        (
            {"prompt": "a", "stop": ["a"] * 100_000},
            "The request has 100000 stop strings and the limit is 8; send fewer.",
        ),
        ({"prompt": "a", "stop": ["a" * 10**7]}, "The first stop string has 10,000,000 characters and must have"),
        ({"prompt": "a", "json_schema": "[" * 10**7}, "json_schema has 10,000,000 characters and the limit is"),
        ({"prompt": "a", "seed": 1e300}, "seed is 10000000000000000"),
        ({"prompt": "a", "documents": ["data:;base64,"], "pages": "1-999999999,1000000000"}, "pages must be like"),
    ],
)
def test_what_is_too_much_is_refused_with_its_limit(server: Server, request_: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(bounded(server, lambda: server.predict(**request_)))


def deep(opening: str, middle: str, closing: str, depth: int) -> str:
    return opening * depth + middle + closing * depth


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_json_is_refused_by_the_server_or_by_us(server: Server, depth: int) -> None:
    content = deep("[", "", "]", depth)
    body = f'{{"input": {{"prompt": "x", "messages": [{{"role": "user", "content": {content}}}]}}}}'
    response = server.client.post("/predictions", content=body, headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        assert "Part 1 of message 1" in refusal(response.json())
    else:
        assert response.status_code in (400, 422)


DEFINITIONS = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {"type": "null"}}
BOMBS: dict[str, Any] = {
    "patterns compared in pairs": {"patternProperties": {f"^a{{{n}}}b": {} for n in range(1000)}},
    "patterns at once": {"type": "string", "allOf": [{"pattern": f"a{n}"} for n in range(100)]},
    "repeats of repeats": {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
    "many states": {"type": "string", "pattern": "(.*a.{50}){3}"},
    "backtracking": {"type": "string", "pattern": "(a+)+$"},
    "long": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "minItems": 10**9},
    "itself": {"$ref": "#"},
    "twice each": {"$defs": DEFINITIONS, "$ref": "#/$defs/d0"},
    "wide": {"anyOf": [{"properties": {f"p{n}{m}": {} for m in range(20)}} for n in range(100)]},
    "many properties": {"properties": {f"p{n}": {"type": "integer"} for n in range(2500)}},
    "deep": deep('{"items":', "{}", "}", 10_000),
    "deep arrays": "[" * MAX_SCHEMA_CHARACTERS,
    "small multiple": {"multipleOf": 1e-300},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_schema_bombs(server: Server, kind: str) -> None:
    schema = BOMBS[kind] if isinstance(BOMBS[kind], str) else json.dumps(BOMBS[kind])
    request = {"prompt": "x", "json_schema": schema, "max_new_tokens": 20, "thinking_budget": 0}
    result = bounded(server, lambda: server.predict(**request))
    if result["status"] != "succeeded":
        assert "json_schema" in refusal(result)


def test_a_million_messages(server: Server) -> None:
    """Cog's parser takes 3 GB for them, and no more for the next ones; ours counts them first of all."""
    messages = [{"role": "user", "content": "a"}] * 1_000_000
    sentence = refusal(bounded(server, lambda: server.predict(messages=messages), most=5_000))
    assert sentence == "There are 1,000,000 messages and the limit is 1,000; leave out the oldest."


def test_the_next_request_is_right(server: Server) -> None:
    must_answer(server)
