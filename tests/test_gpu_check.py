"""benchmarks/gpu_check.py keeps its deadline and tells what failed, on any machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"
SAY = [sys.executable, "-c", "print('first'); print('last line')"]
FAIL = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
SLEEP = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def verdicts(folder: Path) -> list[tuple[str, bool, str]]:
    return [(v["stage"], v["passed"], v["summary"]) for v in json.loads((folder / "verdicts.json").read_text())]


def test_each_stage_leaves_verdict_and_log(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path / "check", seconds=60)
    check.run("one", SAY, SAY, least_seconds=1)
    assert verdicts(check.folder) == [("one", True, "last line")]
    assert (check.folder / "one.log").read_text().count("last line\n") == 2
    check.run("two", FAIL, SAY, least_seconds=1)  # stops at what failed
    assert verdicts(check.folder)[1] == ("two", False, "why")
    assert "last line\n" not in (check.folder / "two.log").read_text().partition("why")[2]
    check.skip("three", "there is none")
    assert verdicts(check.folder)[2] == ("three", True, "skipped: there is none")


def test_deadline_is_kept(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=2)
    check.run("slow", SLEEP, least_seconds=0.5)
    check.run("late", SAY, least_seconds=0.5)
    (slow, late) = verdicts(tmp_path)
    assert slow == ("slow", False, "timed out")
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert late[:2] == ("late", False)
    assert late[2].startswith("not run: ")


def test_small_set_for_the_sanitizer_is_not_empty(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(gpu_check.os, "access", lambda *_: True)
    check = gpu_check.Check(tmp_path, seconds=60)
    monkeypatch.setattr(check, "run", lambda stage, *commands, **_: ran.extend(commands))
    gpu_check.sanitize(check)
    memcheck, racecheck = ran
    assert memcheck[memcheck.index("--tool") + 1] == "memcheck"
    assert racecheck[racecheck.index("--tool") + 1] == "racecheck"
    pytest_command = [*memcheck[memcheck.index(sys.executable) :], "--collect-only"]
    # As Check.run does, away from the checkout, whose folder normfused has no extension.
    listed = subprocess.run(pytest_command, capture_output=True, text=True, cwd=tmp_path)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert "22/" in listed.stdout.splitlines()[-1], listed.stdout + listed.stderr


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
