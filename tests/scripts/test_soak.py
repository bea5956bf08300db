"""The soak in short, and what it makes of what has grown."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bench import full_size
from soak import Window, compare, in_process, main, soak, table
from soaking.errands import errands
from soaking.subjects import CogServer, InProcess, Subject
from soaking.usage import Held, held

from kimi_vl.service import Service
from kimi_vl.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
HALF = 10  # of the errands
SMALL = {"num_hidden_layers": 2, "n_routed_experts": 8, "hidden_size": 64, "intermediate_size": 32}
READ_AND_KEEP = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    for step in (lambda: None, lambda: sum(mapped[:: mmap.PAGESIZE]), lambda: b"1" * len(mapped)):
        kept = step()
        print(flush=True)
        input()
"""
HELD = Held(memory=1000, descriptors=100, threads=10, temporary_files=0)


@pytest.fixture(params=["cog", "service"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    (tmp_path / "temporary").mkdir()
    if request.param == "cog":
        subject: Subject = CogServer("tiny", tmp_path / "temporary", tmp_path / "log")
    else:
        subject = InProcess(Service.load(Settings(model="tiny")), knows=True)
    yield subject
    subject.close()


def test_all_errands_end_as_they_must_and_leave_nothing(subject: Subject, tmp_path: Path) -> None:
    windows = soak(subject, tmp_path, tmp_path / "temporary", lambda done: done == 2 * HALF, HALF)
    assert [len(window.seconds) for window in windows] == [HALF] * 2
    rows = {row.name: row for row in compare(*windows)}
    for name in ("file descriptors", "threads", "temporary files"):
        assert rows[name].is_kept, table(list(rows.values()))
    assert rows["memory, MB"].last < 1.1 * rows["memory, MB"].first


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_its_server_ends_with_it(way: signal.Signals) -> None:
    soaking = subprocess.Popen([sys.executable, ROOT / "scripts" / "soak.py"], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{soaking.pid}/task/{soaking.pid}/children")
    while not (servers := children.read_text().split()):
        assert soaking.poll() is None
        time.sleep(0.05)
    soaking.send_signal(way)
    soaking.wait(30)
    assert not any(Path(f"/proc/{server}").exists() for server in servers)


def test_random_weights_run_every_errand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "TEXT", full_size.TEXT | SMALL)
    monkeypatch.setattr(full_size, "VISION", full_size.VISION | {"num_hidden_layers": 1, "hidden_size": 64})
    subject = in_process("random")
    for errand, _ in zip(errands(tmp_path, max_new_tokens=2), range(2 * HALF), strict=False):
        subject.run(errand)
    subject.close()


def test_a_window_that_is_not_full_is_left_out(tmp_path: Path) -> None:
    class Idle:
        process = os.getpid()

        def __init__(self) -> None:
            self.names: list[str] = []

        def run(self, errand: object) -> None:
            self.names.append(errand.name)  # type: ignore[attr-defined]

    subject = Idle()
    windows = soak(subject, tmp_path, tmp_path, lambda done: done == 9, 4)  # type: ignore[arg-type]
    assert [sum(map(len, window.seconds.values())) for window in windows] == [4, 4]
    names = [errand.name for errand, _ in zip(errands(tmp_path, 9), range(9), strict=False)]
    assert subject.names == names


@pytest.mark.parametrize(
    ("change", "exceeded"),
    [
        ({}, set()),
        ({"memory": 1020}, set()),
        ({"memory": 1021}, {"memory, MB"}),
        ({"descriptors": 103, "threads": 11}, {"file descriptors", "threads"}),
        ({"temporary_files": 1}, {"temporary files"}),
        ({"gpu_memory": 1}, {"GPU memory, MB"}),
    ],
)
def test_what_has_grown_beyond_its_limit_is_told(change: dict[str, int], exceeded: set[str]) -> None:
    windows = Window([HELD], {"sum": [1.0]}), Window([replace(HELD, **change)], {"sum": [1.1]})
    rows = compare(*windows)
    assert {row.name for row in rows if not row.is_kept} == exceeded
    assert table(rows).count("exceeded") == len(exceeded)


def test_what_takes_longer_is_told() -> None:
    first, last = Window([HELD], {"sum": [1.0, 1.0, 9.0]}), Window([HELD], {"sum": [1.2, 1.2, 0.1]})
    assert [row.name for row in compare(first, last) if not row.is_kept] == ["seconds for each of the errands"]


def test_memory_is_what_a_process_keeps_but_not_the_files_that_it_reads(tmp_path: Path) -> None:
    size = 100_000_000
    (tmp_path / "file").write_bytes(bytes(size))
    command = [sys.executable, "-c", READ_AND_KEEP, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        memory = []
        for _ in range(3):
            process.stdout.readline()
            memory.append(held([process.pid], tmp_path).memory)
            process.stdin.write(b"\n")
            process.stdin.flush()
    assert memory[1] - memory[0] < size / 10
    assert memory[2] - memory[1] > size * 9 / 10


@pytest.mark.parametrize("requests", ["-1", "0", "599"])
def test_too_few_requests_to_compare_are_refused_before_the_first(
    requests: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak.py", "--requests", requests])
    with pytest.raises(SystemExit):
        main()
    assert "--requests must be at least 600" in capsys.readouterr().err
