"""Writes requirements.lock: the container's packages with all that they need, each with the hashes of its files.

Needs uv (pip install uv) and an index of packages. Run it after every change of requirements.txt or of cog.yaml's
sdk_version.
"""

import argparse
import re
import subprocess
from tempfile import NamedTemporaryFile

from cog_schema import ROOT

LOCK = ROOT / "requirements.lock"
BY_COG = ("cog", "coglet")  # `cog build` installs them itself, and takes them out of what it is given
HEADER = """\
# What the container runs, with the hash of every file that may be installed. Made by scripts/lock_requirements.py.
# The spaces around == matter: of "name==version --hash=..." Cog passes on to pip only what stands before the hashes.
"""


def compiled(python: str, sdk: str) -> str:
    """The requirements as uv pins them for the container's Python and Linux, beside this version of Cog."""
    command = [
        "uv",
        "pip",
        "compile",
        "requirements.txt",
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    command += [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_28", "--only-binary=:all:"]
    command += [f"--no-emit-package={name}" for name in BY_COG]
    with NamedTemporaryFile("w", suffix=".txt") as cog:
        cog.write(f"cog=={sdk}\n")
        cog.flush()
        return subprocess.run([*command, cog.name], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _of_cog_yaml(key: str) -> str:
    (value,) = re.findall(rf'^ +{key}: "(.+)"$', (ROOT / "cog.yaml").read_text(), flags=re.MULTILINE)
    return str(value)


def main() -> None:
    """Writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    python, sdk = (_of_cog_yaml(key) for key in ("python_version", "sdk_version"))
    pins = compiled(python, sdk)
    LOCK.write_text(HEADER + re.sub(r"^(\S+)==", r"\1 == ", pins, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
