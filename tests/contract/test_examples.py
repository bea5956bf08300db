"""Every request in examples/ runs as it stands, through the real Cog server; the script that sends them prints it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {
    "conversation": "42",
    "document": "358",
    "video": "39",
    "thinking_budget": "3",
    "stop": "1",
    "sampling": None,
    "json_schema": '{"sum": 19}',
    "timeout": "19",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_examples_requests(name: str, server: Any) -> None:
    request = json.loads((ROOT / "examples" / "requests" / f"{name}.json").read_text())
    result = server.predict(**request["input"])
    (output,) = result["output"]
    assert output["answer"]
    assert ANSWERS[name] in (None, output["answer"])
    if name == "thinking_budget":
        assert "I have thought enough and answer now." in output["thinking"]


def test_each_request_is_tested() -> None:
    assert {file.stem for file in (ROOT / "examples" / "requests").iterdir()} == ANSWERS.keys()


def test_the_script_that_asks(server: Any, tmp_path: Path) -> None:
    script = (ROOT / "examples" / "ask.py").read_text()
    assert "http://localhost:5000" in script
    here = tmp_path / "ask.py"
    here.write_text(script.replace("http://localhost:5000", str(server.client.base_url).rstrip("/")))
    command = [sys.executable, here, ROOT / "examples" / "requests" / "stop.json"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "1\n"


def test_the_script_that_asks_replicate(tmp_path: Path) -> None:
    """Its client knows a model of one's own by its version alone, and returns what an iterator made as an iterator."""
    client = tmp_path / "replicate.py"
    client.write_text(
        "def run(model, input):\n"
        "    assert model == 'OWNER/kimi-vl:VERSION' and input['stop'] == ['9']\n"
        "    yield {'thinking': '', 'answer': '1'}\n"
    )
    script = ROOT / "examples" / "ask_replicate.py"
    (line,) = re.findall(r"python (examples/ask_replicate\.py .*)\"\"\"", script.read_text())
    command = [sys.executable, *line.replace("document.json", "stop.json").split()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout == "1\n"
