"""What the container is built from: cog.yaml, requirements.txt and what is made of it, requirements.lock."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
COG_YAML = yaml.safe_load((ROOT / "cog.yaml").read_text())
BUILD = COG_YAML["build"]


def lines(file: str) -> list[str]:
    """The requirements of a file, each on one line."""
    joined = (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    return [line for line in joined if line and not line.startswith("#")]


LINES = lines("requirements.txt")
LOCKED = [line.partition(" --hash=") for line in lines(BUILD["python_requirements"])]  # requirement, "--hash=", hashes
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
COG = Requirement(f"cog=={BUILD['sdk_version']}")  # installed by `cog build` itself

# of Cog's schema of cog.yaml, which allows no others
KEYS = {"build", "image", "predict", "run", "environment", "weights", "concurrency", "train"}
BUILD_KEYS = {"cuda", "cudnn", "gpu", "python_version", "python_requirements", "system_packages", "sdk_version", "run"}

PIP_OFFLINE = "connection broken by"  # in pip's warning when it tries again


def pinned(line: str) -> str:
    """The version that a requirement allows alone."""
    (specifier,) = Requirement(line).specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{line} is no exact pin"
    return specifier.version


def test_cog_yaml_says_only_what_cog_knows() -> None:
    assert set(COG_YAML) <= KEYS
    assert set(BUILD) <= BUILD_KEYS
    assert BUILD["gpu"] is True
    assert BUILD["python_version"] == "3.12"


def test_cog_yaml_names_a_predictor_that_exists() -> None:
    file, name = COG_YAML["predict"].split(":")
    classes = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)]
    assert name in [node.name for node in classes]


@pytest.mark.parametrize("line", LINES)
def test_every_requirement_is_an_exact_pin(line: str) -> None:
    assert pinned(line)


@pytest.mark.parametrize("declared", DECLARED)
def test_every_dependency_is_pinned_within_its_range(declared: str) -> None:
    pins = {Requirement(line).name: pinned(line) for line in [*LINES, str(COG)]}
    dependency = Requirement(declared)
    assert dependency.name in pins
    assert dependency.specifier.contains(pins[dependency.name])


def test_every_package_of_the_container_is_locked_with_hashes() -> None:
    versions = {Requirement(requirement).name: pinned(requirement) for requirement, _, _ in LOCKED}
    for line in LINES:
        assert versions[Requirement(line).name] == pinned(line), "run scripts/lock_requirements.py"
    assert not versions.keys() & {"cog", "coglet"}, "`cog build` takes these out of it"
    for requirement, found, hashes in LOCKED:
        assert found, requirement
        assert re.fullmatch(r"(--hash=sha256:[0-9a-f]{64} *)+", f"--hash={hashes}"), requirement


def test_cog_passes_the_hashes_on_and_still_finds_torch() -> None:
    """By the rules of pkg/requirements in Cog's source: of a line that its first expression finds, only what it found
    is passed on; its second and third find the package and the version, which choose CUDA."""
    for requirement, found, hashes in LOCKED:
        line = f"{requirement}{found}{hashes}"
        assert not re.search(r"([a-zA-Z0-9\-_]+)==([^ ]+)|--find-links=|-f\s+|--extra-index-url=", line), line
        name, version = re.match(r"[\w.\-]+", line), re.search(r"[<>=!~]=?\s*([^\s,;|]+)", line)
        assert name and version
        if name[0] == "torch":
            assert f"{name[0]}=={version[1]}" in LINES


def test_the_pins_are_to_be_had_as_wheels_and_fit_together() -> None:
    """For the container's Python and Linux, whatever this one's are; pip reads metadata and fetches no large wheel."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(5, 29)]
    older = [f"--platform=manylinux{year}_x86_64" for year in (1, 2010, 2014)]
    container = [f"--python-version={BUILD['python_version']}", "--only-binary=:all:", *platforms, *older]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--target=not-written-to"]
    patience = ["--retries=1", "--timeout=15", "--use-feature=fast-deps", "--disable-pip-version-check"]
    result = subprocess.run([*pip, *patience, *container, *LINES, str(COG)], capture_output=True, text=True)
    if result.returncode and PIP_OFFLINE in result.stderr:
        pytest.skip("no package index answers")
    assert result.returncode == 0, result.stderr
    found = result.stdout.split("Would install ")[-1].lower().replace("_", "-").split()
    assert {line.replace("==", "-") for line in LINES} <= set(found)
