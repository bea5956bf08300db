"""What the person who runs the service can set: environment variables that begin with KIMI_VL_."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kimi_vl.errors import Misconfigured

PREFIX = "KIMI_VL_"
LARGEST_SECONDS = 1_000_000_000  # 31 years; the system's timers do not take much more


def _setting(default: Any, meaning: str, unset: str = "") -> Any:
    """A field; `unset` says what its being empty comes to."""
    return field(default=default, metadata={"meaning": meaning, "unset": unset})


@dataclass(frozen=True)
class Settings:
    """Each field is the variable KIMI_VL_ + its name in capitals."""

    model: str = _setting(
        "",
        "Which model answers: thinking, thinking-2506, instruct, tiny, a checkpoint folder, or one on the hub: "
        "hf://owner/name[@revision].",
        "thinking for the server; on the command line the first model whose weights are there",
    )
    weights_dir: str = _setting(
        "",
        "Where downloaded models are put and looked for; the server fetches an absent one into it.",
        "the project's weights/",
    )
    quantization: str = _setting(
        "auto",
        "Bits of the decoder's weights on a GPU: none (16), int8, int4 (of the experts, else 8), or auto: the first of "
        "these with which a context of 32,768 tokens fits in the GPU's memory.",
    )
    max_images: int = _setting(8, "Most pictures in a request.")
    max_image_bytes: int = _setting(20_000_000, "Largest picture file, in bytes.")
    max_image_pixels: int = _setting(
        64_000_000, "Largest picture, or frame of a video, in pixels (width times height)."
    )
    max_request_pixels: int = _setting(100_000_000, "Most pixels of all pictures of a request together.")
    max_documents: int = _setting(8, "Most documents in a request.")
    max_document_bytes: int = _setting(100_000_000, "Largest document, in bytes.")
    max_video_bytes: int = _setting(1_000_000_000, "Largest video, in bytes.")
    max_media_seconds: int = _setting(
        60,
        "Longest that a request's files may take to come from URLs, and its pictures, documents or video to be read.",
    )
    max_seconds: int = _setting(
        0,
        "Longest that a request may take, in seconds; what was made by then is returned. timeout_s can only be "
        "shorter.",
        "no limit",
    )
    allow_urls: bool = _setting(False, "1 fetches pictures that messages have at https URLs; 0 refuses such messages.")
    allow_private_urls: bool = _setting(
        False, "1 fetches from private addresses, too, such as a storage in your own network; 0 from public ones alone."
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads the variables that are set.

        Raises:
            Misconfigured: a number that is none or too large, or a variable that does not exist.
        """
        known = {PREFIX + f.name.upper(): f for f in fields(cls)}
        values: dict[str, Any] = {}
        for variable in (name for name in environment if name.startswith(PREFIX)):
            if variable not in known:
                raise Misconfigured(f"{variable} is not a setting; there are {', '.join(known)}")
            setting, text = known[variable], environment[variable]
            if text:  # an empty one is as good as none: that is how a compose file passes on what is not set
                values[setting.name] = _value(variable, text, setting.type)
        return cls(**values)


def _value(variable: str, text: str, kind: object) -> str | int | bool:
    if kind is int and not text.isdecimal():
        raise Misconfigured(f"{variable} must be a whole number from 0 up, not {text!r}")
    if kind is bool and text not in ("0", "1"):
        raise Misconfigured(f"{variable} must be 0 or 1, not {text!r}")
    if kind is int and variable.endswith("_SECONDS") and int(text) > LARGEST_SECONDS:
        raise Misconfigured(f"{variable} may be at most {LARGEST_SECONDS:,}, not {text}")
    return int(text) if kind is int else text == "1" if kind is bool else text
