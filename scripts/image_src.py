"""Lays out the image's /src as `cog build` would: what .dockerignore leaves of the checkout, and the API's schema."""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from cog_schema import ROOT, schema

COG = ".cog"  # of its own working files `cog build` leaves the schema in the image, made anew
WILDCARDS = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def image_files(checkout: Path) -> list[Path]:
    """The files that `COPY . /src` takes from a checkout, relative to it and sorted."""
    lines = [line.strip() for line in (checkout / ".dockerignore").read_text().splitlines()]
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = []
    for folder, subfolders, names in os.walk(checkout):
        here = Path(folder).relative_to(checkout)
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        found += [here / name for name in names + links]
    return sorted(file for file in found if file.parts[0] != COG and not _ignored(file.as_posix(), patterns))


def lay_out(checkout: Path, files: Iterable[Path], target: Path) -> None:
    """Copies some of a checkout's files, and writes the schema where Cog's server looks for it."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout / file, target / file, follow_symlinks=False)
    (target / COG).mkdir(parents=True)
    (target / COG / "openapi_schema.json").write_text(json.dumps(schema((checkout / "predict.py").read_text())))


def _ignored(file: str, patterns: list[str]) -> bool:
    """Docker's rules: the last pattern counts that matches a file or a folder around it; `!` takes it in again."""
    ignored = False
    for pattern in patterns:
        if re.fullmatch(_expression(pattern.removeprefix("!")) + "(/.*)?", file):
            ignored = not pattern.startswith("!")
    return ignored


def _expression(pattern: str) -> str:
    """A pattern, which begins at the root, as a regular expression. It may hold no [ranges]."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    return "".join(WILDCARDS.get(part, re.escape(part)) for part in parts)


def main() -> int:
    """Lays it out; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="an empty folder, or one that is not there yet, outside the checkout")
    target: Path = parser.parse_args().target.resolve()
    if target.is_relative_to(ROOT) or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        print(f"error: {target} must be an empty folder outside {ROOT}", file=sys.stderr)
        return 2
    lay_out(ROOT, image_files(ROOT), target)
    files = [file for file in target.rglob("*") if file.is_file()]
    print(f"{target}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
