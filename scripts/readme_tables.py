"""Writes README's tables of inputs and of settings anew, from predict.py and kimi_vl/settings.py."""

import argparse
from dataclasses import Field, fields
from typing import Any

from cog_schema import ROOT, schema

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


def updated(readme: str) -> str:
    """The text of README with the tables as they must be: the first ones after their headings."""
    for heading, table in (("Inputs", inputs()), ("Settings", settings())):
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
