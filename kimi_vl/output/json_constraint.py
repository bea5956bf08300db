"""Answers that are JSON by a schema: which tokens may come next, decided by a grammar (llguidance)."""

import json
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from llguidance.tiktoken import lltokenizer_from_encoding
from torch import Tensor

from kimi_vl.errors import InvalidRequest, printable
from kimi_vl.output.grammar_check import MEMORY, SECONDS, is_affordable
from kimi_vl.output.thinking import CLOSING, OPENING
from kimi_vl.prompt.tokenizer import TikTokenTokenizer

MAX_SCHEMA_CHARACTERS = 100_000
MAX_EXACT = 2**53  # llguidance rounds larger ones to a float64
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes it
_CLOSING_IN_REGEX = CLOSING.replace("/", r"\/")
# In the thinking anything goes, up to the first closing marker.
WITH_THINKING = rf"""start: ("{OPENING}" thinking)? answer
thinking[lazy]: /(?s:.*){_CLOSING_IN_REGEX}/
"""
WITHOUT_THINKING = "start: answer\n"


class JsonConstraint:
    """Follows one output, and tells which tokens keep it on the way to JSON by its schema."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = torch.zeros(1, -(-vocabulary // 32), dtype=torch.int32)

    def accept(self, token: int) -> None:
        """Called with each token of the output, in order."""
        self._matcher.consume_token(token)
        self._check()

    def mask(self) -> Tensor:
        """[vocabulary / 32] int32 on the host, a bit for each token that may come next; changed by the next call."""
        fill_next_token_bitmask(self._matcher, self._mask.numpy())
        self._check()
        return self._mask[0]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest("json_schema is too complicated to be followed; simplify its patterns and choices.")


class JsonConstraints:
    """Makes the constraints of a model's outputs."""

    def __init__(self, tokenizer: TikTokenTokenizer) -> None:
        self._tokenizer = tokenizer

    def by_schema(self, schema: str, thinks: bool) -> JsonConstraint:
        """Of an output whose answer is JSON by a schema.

        Args:
            schema: a JSON Schema, in JSON.
            thinks: whether thinking may go before the answer.
        Raises:
            InvalidRequest: it is none, or has something that cannot be enforced; the message names that.
        """
        parsed = _parse(schema) | {"x-guidance": STYLE}
        start = WITH_THINKING if thinks else WITHOUT_THINKING
        grammar = f"{start}answer: %json {json.dumps(parsed)}\n"
        if not is_affordable(grammar):
            raise InvalidRequest(
                f"json_schema takes more than {SECONDS} seconds or {MEMORY >> 30} GB of memory to prepare, the limits; "
                "simplify its patterns, choices and numbers."
            )
        matcher = LLMatcher(self._matchers_tokenizer, grammar)
        if matcher.is_error():
            told = matcher.get_error().splitlines()[0].rpartition("JSON schema: ")[2]
            told = told.partition(" Enable '")[0]  # an option of llguidance's, which a client cannot set
            reason = printable(told)[:200].rstrip(".:")
            raise InvalidRequest(f"json_schema cannot be enforced: {reason}; leave that out or change it.")
        _check_exact(parsed)
        return JsonConstraint(matcher, self._tokenizer.vocab_size)

    @cached_property
    def _matchers_tokenizer(self) -> LLTokenizer:  # takes 0.6 s
        end = self._tokenizer.control["<|im_end|>"]
        return lltokenizer_from_encoding(self._tokenizer.encoding, n_vocab=self._tokenizer.vocab_size, eos_token=end)


def _parse(schema: str) -> dict[str, Any]:
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequest(
            f"json_schema has {len(schema):,} characters and the limit is {MAX_SCHEMA_CHARACTERS:,}; shorten it."
        )
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        raise InvalidRequest("json_schema is not JSON; send a JSON Schema, an object in JSON.") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("json_schema is not an object; send a JSON Schema, an object in JSON.")
    return parsed


def _check_exact(value: Any, fixed: bool = False) -> None:
    """Refuses whole numbers in the const and enum of a schema that would not be the answer's as they stand there."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_exact(part, fixed or key in ("const", "enum"))
    elif isinstance(value, list):
        for part in value:
            _check_exact(part, fixed)
    elif fixed and isinstance(value, int) and abs(value) > MAX_EXACT:
        raise InvalidRequest(
            f"json_schema has a const or enum with a number beyond {MAX_EXACT:,}, the limit; make it a string."
        )
