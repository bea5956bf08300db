"""Writes README's tables of inputs and of settings anew, from predict.py and kimi_vl/settings.py."""

import argparse
import re
from dataclasses import fields
from typing import Any

from cog_schema import ROOT, schema

from kimi_vl.settings import PREFIX, Settings

README = ROOT / "README.md"
KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "JSON"}


def inputs() -> str:
    """The table of predict()'s inputs."""
    properties = schema((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]
    rows = [f"| `{name}` | {_kind(given)} | {_default(given)} | {given['description']} |" for name, given in properties.items()]
    return "\n".join(["| name | what | default | |", "|---|---|---|---|", *rows])


def settings() -> str:
    """The table of environment variables."""
    rows = [
        f"| `{PREFIX}{setting.name.upper()}` | {setting.default} | {setting.metadata['meaning']} |"
        for setting in fields(Settings)
    ]
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows])


def updated(readme: str) -> str:
    """The text of README with the tables as they must be: the first ones after their headings."""
    for heading, table in (("Inputs", inputs()), ("Settings", settings())):
        pattern = rf"(### {heading}\n.*?\n\n)(\|[^\n]*\n)+"
        readme, count = re.subn(pattern, lambda found, table=table: f"{found[1]}{table}\n", readme, count=1, flags=re.S)
        assert count == 1, heading
    return readme


def _kind(given: dict[str, Any]) -> str:
    if given["type"] == "array":
        return f"list of {_kind(given['items']) if given['items'].get('format') != 'uri' else 'files'}"
    if given.get("format") == "uri":
        return "file"
    if "minimum" in given and "maximum" in given:
        return f"{KINDS[given['type']]}, {given['minimum']} to {given['maximum']}"
    return KINDS[given["type"]]


def _default(given: dict[str, Any]) -> str:
    default = given.get("default", "required")
    return "none" if default in ("", [], None) else str(default).lower() if isinstance(default, bool) else str(default)


def main() -> None:
    """Writes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(updated(README.read_text()))


if __name__ == "__main__":
    main()
