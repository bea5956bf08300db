"""What importing the package does to Python's collector, in a process of its own."""

import json
import subprocess
import sys

import pytest

STATE = "print(json.dumps([gc.isenabled(), gc.get_stats()[2]['collections'], gc.get_freeze_count()]))"


@pytest.mark.parametrize("imports", ["import kimi_vl", "import kimi_vl, kimi_vl.service, kimi_vl.engine.fast.engine"])
def test_imports_are_not_searched_for_garbage_and_later_objects_are(imports: str) -> None:
    command = [sys.executable, "-c", f"import gc, json; {imports}; {STATE}"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    enabled, full_collections, frozen = json.loads(output)
    assert enabled
    assert full_collections == 0
    assert frozen > 100_000


def test_a_collector_that_was_off_stays_off() -> None:
    command = [sys.executable, "-c", "import gc; gc.disable(); import kimi_vl; print(gc.isenabled())"]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "False\n"
