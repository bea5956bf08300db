"""Whatever is drawn from the tokens that a constraint allows is JSON by its schema."""

import json
from random import Random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimi_vl.errors import InvalidRequest
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.output.json_constraint import MAX_SCHEMA_CHARACTERS, JsonConstraint, JsonConstraints
from kimi_vl.output.thinking import CLOSING, OPENING
from kimi_vl.prompt.processor import KimiVLProcessor

tokenizer = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny").tokenizer
constraints = JsonConstraints(tokenizer)
FEW = 40  # tokens, after which whatever can end a value is taken
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", "green", 3, None]},
    "const": {"const": {"a": [1, "two"]}},
    "large": {"enum": [2**53, -(2**53)]},
    "bounds": {"type": "integer", "minimum": -(2**62), "maximum": 2**63 - 1},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "integer": {"type": "integer", "minimum": -20, "maximum": 1500},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "nested": {
        "type": "object",
        "properties": {
            "boxes": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"label": {"enum": ["cat", "dog"]}, "at": {"$ref": "#/$defs/point"}},
                    "required": ["label", "at"],
                    "additionalProperties": False,
                },
                "maxItems": 3,
            }
        },
        "required": ["boxes"],
        "additionalProperties": False,
        "$defs": {"point": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 2}},
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "string", "enum": ["x"]}, {"type": "integer", "minimum": 7}]},
}


def allowed(mask: Tensor) -> list[int]:
    words = [word & 0xFFFFFFFF for word in mask.tolist()]
    return [32 * place + bit for place, word in enumerate(words) for bit in range(32) if word >> bit & 1]


def draw(constraint: JsonConstraint, random: Random) -> str:
    """Draws tokens until one ends the output, and returns their text."""
    text = b""
    for count in range(1000):
        choices = allowed(constraint.mask())
        assert choices
        ending = [
            token for token in choices if token in tokenizer.stop_ids or tokenizer.token_bytes(token)[:1] in b'"]},'
        ]
        token = random.choice(ending if count > FEW and ending else choices)
        if token in tokenizer.stop_ids:
            return text.decode()
        text += tokenizer.token_bytes(token)
        constraint.accept(token)
    raise AssertionError(f"it does not end: {text!r}")


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 2**32))
def test_all_that_can_be_drawn_is_valid(name: str, seed: int) -> None:
    text = draw(constraints.by_schema(json.dumps(SCHEMAS[name]), thinks=False), Random(seed))
    jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("thought", ["", "One, two {3}.", 'It says "◁/ think▷" and [1.'])
def test_thinking_goes_before_the_answer(thought: str) -> None:
    constraint = constraints.by_schema(json.dumps(SCHEMAS["object"]), thinks=True)
    for token in tokenizer.encode_text(f"{OPENING}{thought}{CLOSING}"):
        choices = allowed(constraint.mask())
        assert token in choices
        assert not tokenizer.stop_ids & set(choices), "thinking alone is no answer"
        constraint.accept(token)
    jsonschema.validate(json.loads(draw(constraint, Random(1))), SCHEMAS["object"])


def test_a_model_that_thinks_need_not() -> None:
    constraint = constraints.by_schema(json.dumps(SCHEMAS["array"]), thinks=True)
    for token in tokenizer.encode_text("[1, 2]"):
        assert token in allowed(constraint.mask())
        constraint.accept(token)
    assert allowed(constraint.mask()) == [tokenizer.control["<|im_end|>"]]


def test_two_outputs_do_not_know_of_each_other() -> None:
    first, second = (constraints.by_schema(json.dumps(SCHEMAS["enum"]), thinks=False) for _ in range(2))
    before = allowed(second.mask())
    first.accept(before[0])
    assert allowed(second.mask()) == before


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ('{"not": {"type": "null"}}', r'cannot be enforced: .*"not"'),
        ('{"type": "array", "uniqueItems": true}', r'cannot be enforced: .*"uniqueItems"'),
        ('{"type": "string", "pattern": "(?=a)b"}', "cannot be enforced"),
        ('{"type": "string", "format": "shoe size"}', "cannot be enforced: Unknown format: shoe size"),
        ('{"$ref": "http://localhost/schema"}', "cannot be enforced"),
        ('{"type": "cat"}', "cannot be enforced"),
        ('{"oneOf": [{}, {}]}', "cannot be enforced: oneOf constraints are not supported; leave that out or change it"),
        (r'{"type": "\u001b[2J"}', r"cannot be enforced: Invalid type: \\x1b\[2J; leave"),
        ('{"const": -9223372036854775808}', "takes more than 3 seconds or 1 GB of memory"),  # llguidance crashes
        ('{"enum": [3, 1234567890123456789]}', "has a const or enum with a number beyond 9,007,199,254,740,992"),
        ('{"items": {"const": {"id": -9007199254740993}}}', "has a const or enum with a number beyond"),
        ('{"multipleOf": 2147483648}', "takes more than 3 seconds or 1 GB of memory"),  # valid at once, made for ever
        ("{", "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ('"string"', "is not an object"),
        (" " * (MAX_SCHEMA_CHARACTERS + 1), "has 100,001 characters and the limit is 100,000"),
    ],
    ids=lambda text: text[:20],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"json_schema {why}") as error:
        constraints.by_schema(schema, thinks=False)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
