import sys
from pathlib import Path

import pytest
from image_src import ROOT, image_files, lay_out, main

IN_THE_IMAGE = ["predict.py", "kimi_vl/service.py", "scripts/download_weights.py", "weights/big/model.safetensors"]
NOT_IN_IT = [
    ".ci/run",
    ".cog/tmp/left_over",
    ".git/HEAD",
    ".venv/bin/python",
    "examples/shapes.png",
    "kimi_vl/__pycache__/service.pyc",
    "kimi_vl.egg-info/PKG-INFO",
    "notes.txt",
    "scripts/check",
    "tests/test_service.py",
    "weights/.big.lock",
    "weights/.big.partial/model.safetensors",
    "weights/hub/.other.partial/model.safetensors",
]


def make(folder: Path, dockerignore: str, files: list[str]) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / ".dockerignore").write_text(dockerignore)
    return folder


def test_the_image_holds_what_running_needs(tmp_path: Path) -> None:
    checkout = make(tmp_path, (ROOT / ".dockerignore").read_text(), IN_THE_IMAGE + NOT_IN_IT)
    assert [str(file) for file in image_files(checkout)] == sorted(IN_THE_IMAGE)


def test_cog_build_does_not_refuse_the_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines.index("!.cog") > lines.index("*"), "it wants its own folder in the build's context"


@pytest.mark.parametrize(
    ("dockerignore", "kept"),
    [
        ("", [".dockerignore", "a/b.py", "a/c/b.py", "b.py", "cc/b.py"]),
        ("b.py", [".dockerignore", "a/b.py", "a/c/b.py", "cc/b.py"]),
        ("/b.py/\n# a", [".dockerignore", "a/b.py", "a/c/b.py", "cc/b.py"]),
        ("**/b.py", [".dockerignore"]),
        ("*/b.py", [".dockerignore", "a/c/b.py", "b.py"]),
        ("a/**", [".dockerignore", "b.py", "cc/b.py"]),
        ("a\n!a/c", [".dockerignore", "a/c/b.py", "b.py", "cc/b.py"]),
        ("a\n!a/c\na/c/b.py", [".dockerignore", "b.py", "cc/b.py"]),
        ("c?", [".dockerignore", "a/b.py", "a/c/b.py", "b.py"]),
        ("*\n!cc", ["cc/b.py"]),
    ],
)
def test_dockers_rules(tmp_path: Path, dockerignore: str, kept: list[str]) -> None:
    checkout = make(tmp_path, dockerignore, ["a/b.py", "a/c/b.py", "b.py", "cc/b.py"])
    assert [str(file) for file in image_files(checkout)] == kept


def test_a_layout_holds_the_files_and_the_schema(tmp_path: Path) -> None:
    files = [Path("predict.py"), Path("kimi_vl/service.py")]
    lay_out(ROOT, files, tmp_path)
    found = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(found) == sorted([*files, Path(".cog/openapi_schema.json")])


@pytest.mark.parametrize("target", [ROOT / "build", ROOT, Path(__file__).parent])
def test_only_an_empty_folder_elsewhere_will_do(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["image_src.py", str(target)])
    assert main() == 2
    assert "must be an empty folder outside" in capsys.readouterr().err
