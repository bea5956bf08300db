"""Writes README's tables of inputs, settings and limits anew, from the code's own constants."""

import argparse
from dataclasses import Field, fields
from typing import Any

from cog_schema import ROOT, schema

from kimi_vl import request
from kimi_vl.media import confined, documents, videos
from kimi_vl.media.download import MAX_REDIRECTS
from kimi_vl.output import grammar_check
from kimi_vl.output.json_constraint import MAX_SCHEMA_CHARACTERS
from kimi_vl.prompt import messages
from kimi_vl.settings import PREFIX, Settings

README = ROOT / "README.md"
LISTED = {"file": "files", "text": "texts", "JSON": "JSON objects"}
KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "JSON"}


def inputs() -> str:
    """The table of predict()'s inputs."""
    properties = schema((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]
    rows = [
        f"| `{name}` | {_kind(given)} | {_default(given)} | {given['description']} |"
        for name, given in properties.items()
    ]
    return "\n".join(["| name | what | default | |", "|---|---|---|---|", *rows])


def settings() -> str:
    """The table of environment variables."""
    rows = [
        f"| `{PREFIX}{setting.name.upper()}` | {_set(setting)} | {setting.metadata['meaning']} |"
        for setting in fields(Settings)
    ]
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows])


def limits() -> str:
    """The table of what a request may have; what the operator can change is named by its variable."""
    default = Settings()
    bounds = {
        "all texts together": f"{request.MAX_CHARACTERS:,} characters, and what fits the context with the pictures",
        "`messages`": f"{messages.MAX_MESSAGES:,}, with {messages.MAX_PARTS:,} parts in all",
        "pictures": f"{_settable(default, 'max_images')}; {_settable(default, 'max_request_pixels', ' pixels')} in all",
        "a picture": f"{_size(default, 'max_image_bytes')}; {_settable(default, 'max_image_pixels', ' pixels')}",
        "documents": f"{_settable(default, 'max_documents')}; {documents.MAX_PAGES:,} pages in all",
        "a document": _size(default, "max_document_bytes"),
        "`pages`": f"{documents.MAX_PICKS:,} characters",
        "a video": f"{_size(default, 'max_video_bytes')}; {videos.MAX_FRAMES} of its frames are seen",
        "reading pictures, documents or a video": f"{confined.MEMORY >> 20} MB of memory, "
        f"{_settable(default, 'max_media_seconds', ' seconds')}, in a process of its own",
        "reading a page, or a picture": f"{confined.STEP_SECONDS} seconds of one core; beyond "
        f"{confined.STEP_PIXELS / 1e6:g} megapixels time in proportion to them",
        "a URL": f"{messages.MAX_URL_CHARACTERS:,} characters, {MAX_REDIRECTS} redirects, public addresses; for all "
        f"together {_settable(default, 'max_media_seconds', ' seconds')}",
        "`stop`": f"{request.MAX_STOPS} texts of {request.MAX_STOP_CHARACTERS} characters",
        "`json_schema`": f"{MAX_SCHEMA_CHARACTERS:,} characters, {grammar_check.SECONDS} seconds and "
        f"{grammar_check.MEMORY >> 30} GB of memory to prepare",
        "`max_new_tokens`": f"{request.MAX_NEW_TOKENS:,}, and what the context has left",
    }
    return "\n".join(["| what | at most |", "|---|---|", *[f"| {what} | {most} |" for what, most in bounds.items()]])


def updated(readme: str) -> str:
    """The text of README with the tables as they must be: the first ones after their headings."""
    for heading, table in (("Inputs", inputs()), ("Settings", settings()), ("Limits", limits())):
        first = readme.index("\n| ", readme.index(f"\n### {heading}\n")) + 1
        readme = readme[:first] + table + readme[readme.index("\n\n", first) :]
    return readme


def _kind(given: dict[str, Any]) -> str:
    if given["type"] == "array":
        return f"list of {LISTED[_kind(given['items'])]}"
    if given.get("format") == "uri":
        return "file"
    if "minimum" in given and "maximum" in given:
        return f"{KINDS[given['type']]}, {given['minimum']} to {given['maximum']}"
    return KINDS[given["type"]]


def _settable(default: Settings, name: str, unit: str = "") -> str:
    return f"{getattr(default, name):,}{unit} (`{PREFIX}{name.upper()}`)"


def _size(default: Settings, name: str) -> str:
    return f"{getattr(default, name) / 1e6:,g} MB (`{PREFIX}{name.upper()}`)"


def _set(setting: Field[Any]) -> str:
    default: Any = setting.default
    return setting.metadata["unset"] or str(int(default) if setting.type is bool else default)


def _default(given: dict[str, Any]) -> str:
    default = given.get("default")
    if default in ("", [], None):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def main() -> None:
    """Writes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(updated(README.read_text()))


if __name__ == "__main__":
    main()
