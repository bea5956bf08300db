"""The server as the image starts and ends it: from /src alone, and when it can no longer answer."""

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.contract.conftest import ROOT, Server

SUM = {"prompt": "What is 12 + 7?", "temperature": 0.0}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the packages of this one, but not the project's own editable install: their .pth files are not read."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "bin" / "python"


def environment(python: Path) -> dict[str, str]:
    return {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": "", "LOG_FORMAT": "console"}


def test_it_answers_from_that_folder_alone(image: Path, python: Path, tmp_path: Path) -> None:
    where = [python, "-c", "import kimi_vl; print(kimi_vl.__file__)"]
    run: dict[str, Any] = {"env": os.environ | environment(python), "capture_output": True, "text": True}
    assert "No module named 'kimi_vl'" in subprocess.run(where, cwd=tmp_path, **run).stderr
    assert Path(subprocess.run(where, cwd=image, **run).stdout.strip()).is_relative_to(image)

    with Server("tiny", tmp_path / "log", image, **environment(python)) as server:
        assert server.health["status"] == "READY"
        assert server.predict(**SUM)["output"][0]["answer"] == "19"
        assert server.predict(**SUM, top_p=2)["detail"], "its schema is there"


def test_the_compose_files_health_check(server: Server) -> None:
    compose = yaml.safe_load((ROOT / "examples" / "compose.yaml").read_text())
    how, *command = compose["services"]["kimi-vl"]["healthcheck"]["test"]
    assert how == "CMD"
    command[0] = sys.executable
    port = str(server.client.base_url.port)
    for given, healthy in ((port, True), ("1", False)):
        run = subprocess.run([part.replace("5000", given) for part in command], stderr=subprocess.DEVNULL)
        assert (run.returncode == 0) is healthy


def broken(image: Path, log: Path, predictor: str) -> Server:
    return Server("tiny", log, image, COG_PREDICT_TYPE_STUB=f"{Path(__file__).with_name('broken.py')}:{predictor}")


def test_a_lost_gpu_fails_one_request_and_ends_the_server(image: Path, tmp_path: Path) -> None:
    with broken(image, tmp_path / "log", "LostGpu") as server:
        assert server.health["status"] == "READY"
        result = server.predict(**SUM)
        assert result["status"] == "failed"
        assert result["logs"] == ""
        assert result["error"].endswith("The server failed to answer; your request is not at fault, send it again.")
        assert server.process.wait(timeout=10) == 0, "nobody asked after its health"
        log = server.log.read_text()
        assert "device-side assert triggered" in log
        assert "this server ends" in log


def test_a_dead_engine_is_unhealthy_and_ends_the_server(image: Path, tmp_path: Path) -> None:
    with broken(image, tmp_path / "log", "DeadEngine") as server:
        assert server.health["status"] == "UNHEALTHY"
        assert server.process.wait(timeout=10) == 0
