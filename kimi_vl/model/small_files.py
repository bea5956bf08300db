"""The small files of a checkpoint folder: what they are called, and how they are read without trusting them."""

import json
from pathlib import Path
from typing import Any

from kimi_vl.errors import Misconfigured, printable

CONFIG, PREPROCESSOR, VOCABULARY = "config.json", "preprocessor_config.json", "tiktoken.model"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 100_000_000  # bytes of a file, or of a safetensors header
MOST_LEVELS = 100  # of lists and objects in each other, in a configuration or the index
LARGEST_NUMBER = 1e9  # anywhere in a configuration; rope_theta is 800,000
LONGEST_REASON = 1000  # characters of a sentence that refuses a folder


def refusal(path: Path, why: str) -> Misconfigured:
    """What is raised for a file of a checkpoint folder that makes it useless."""
    reason = printable(f"{path.name} {why}"[:LONGEST_REASON])  # both can hold commands for a terminal, or a flood
    return Misconfigured(f"the model folder {path.parent} cannot be used: {reason}")


def unreadable(path: Path, error: OSError) -> Misconfigured:
    """What is raised for one that the system does not let be read."""
    return refusal(path, f"cannot be read ({error.strerror})")


def is_file(path: Path) -> bool:
    """Whether a file is there.

    Raises:
        Misconfigured: that cannot be told.
    """
    try:
        return path.is_file()
    except OSError as error:  # no right to look there, or a name that is too long
        raise unreadable(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        Misconfigured: it cannot be read, holds none, or a number beyond LARGEST_NUMBER.
    """
    values = parse_json(path, read_bytes(path))
    _check_numbers(path, values)
    return values


def read_bytes(path: Path) -> bytes:
    """All of a file.

    Raises:
        Misconfigured: it is not there, too large, or cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise refusal(path, f"is larger than {LARGEST_JSON:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise refusal(path, "is missing") from None
    except OSError as error:
        raise unreadable(path, error) from None


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object in some bytes of a file.

    Raises:
        Misconfigured: there is none, or NaN or an infinity in it.
    """

    def refuse(constant: str) -> None:
        raise refusal(path, f"holds {constant}, which is no number that can be used")

    try:
        values = json.loads(data.decode(), parse_constant=refuse)  # others take no BOM, and nothing but UTF-8
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise refusal(path, "is damaged: it holds no JSON object in UTF-8 without a BOM; copy or fetch it again")
    return values


def _check_numbers(path: Path, value: Any, keys: tuple[str, ...] = ()) -> None:
    if len(keys) > MOST_LEVELS:
        raise refusal(path, f"is nested more than {MOST_LEVELS} levels deep")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(path, inner, (*keys, str(key)))
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        raise refusal(path, f"has {'.'.join(keys)} {value}, and no number in it may exceed {LARGEST_NUMBER:,.0f}")


def is_number(value: Any) -> bool:
    """Of JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """A number of JSON that is written without a fraction."""
    return isinstance(value, int) and not isinstance(value, bool)
