"""Changes that keep an input's form, so that it gets past its parser."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

TEXTS = (
    *("◁think▷", "◁/think▷", "◁", "▷", "<|im_end|>", "<|media_pad|>", "[EOS]", "<|im_user|>user<|im_middle|>"),
    *("\ud800", "\x00", "\x1b[2J", "\u202e", "\r\n", " ", "a" * 300, "月", "🇫🇷", "e\u0301", "/etc/passwd", "{", '"'),
    *("image:1", "image:9", "data:image/png;base64,", "https://a.example/", "file:///etc/passwd", "text", "user"),
    *("image_url", "system", "assistant", "content", "url", "#/$defs/a", "#", "^(a|b)+$", "(a+)+$", "object", "string"),
)
KEYS = (
    *("role", "content", "type", "text", "image_url", "url", "detail", "messages", "prompt", "images", "system"),
    *("type", "properties", "items", "prefixItems", "required", "additionalProperties", "patternProperties", "enum"),
    *("const", "anyOf", "oneOf", "allOf", "not", "$ref", "$defs", "a", "minimum", "maximum", "exclusiveMinimum"),
    *("multipleOf", "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "minProperties", "if"),
    *("maxProperties", "uniqueItems", "x-guidance", "$schema", "$id", "title", "default", "nullable"),
)
NUMBERS = (0, 1, -1, 2, 0.5, 1e308, -1e308, 5e-324, 10**6, 2**31, 2**63, 10**40, -(2**63))


def mutate_json(data: bytes, random: Random) -> bytes:
    """Changes one value, key or place in a JSON text; what is none is returned as it is."""
    try:
        root = [json.loads(data)]
        places = list(_places(root))
        holder, key = random.choice(places)
        value = holder[key]
        match random.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, other_key = random.choice(places)
                holder[key] = json.loads(json.dumps(other[other_key]))
            case 2 if isinstance(value, dict):
                value[random.choice(KEYS)] = _value(random)
            case 2 | 3 if isinstance(value, list):
                value.insert(random.randrange(len(value) + 1), random.choice([_value(random), *value]))
            case 3 if isinstance(value, str):
                holder[key] = _changed(value, random)
            case _:
                holder[key] = _value(random)
        return json.dumps(root[0]).encode() if root else data
    except (ValueError, RecursionError):
        return data


def mutate_text(data: bytes, random: Random) -> bytes:
    """Puts a text that means something into another, in the place of none or some of its bytes."""
    return _changed(data.decode("utf-8", "surrogateescape"), random).encode("utf-8", "surrogatepass")


def _changed(text: str, random: Random) -> str:
    start = random.randrange(len(text) + 1)
    return text[:start] + random.choice(TEXTS) + text[start + random.choice((0, 0, 1, 5, 50)) :]


def _value(random: Random) -> Any:
    made: list[Any] = [None, True, False, [], {}]
    return random.choice([*made, random.choice(NUMBERS), random.choice(TEXTS), {random.choice(KEYS): {}}])


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """(list or object, index or key) of each value within."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])
