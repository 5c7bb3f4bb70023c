"""Fixtures: the device of a test, and what it needs of the installation."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from expectations import pytest_addoption, pytest_configure  # noqa: F401
from ranks import Ranks

import normfused
from normfused.data import pictures


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not normfused.info()["cuda"]:
        return "normfused was built without CUDA"
    return None


_WHY_NO_CUDA = _why_no_cuda()
# Folders of tests that compile kernels anew, and run them under sanitizers or read their machine code; torch's own test
# suites; files whose many cases in Python do not depend on the machine; tests of the build, of benchmarks and of tests.
_EXHAUSTIVE = {
    "compilers",
    "cpu_kernels",
    "fuzz",
    "cuda_build",
    "host_cuda",
    "memory",
    "test_benchmarks.py",
    "test_build_machine.py",
    "test_convert_hooks.py",
    "test_convert_python.py",
    "test_convert_tools.py",
    "test_expectations.py",
    "test_gpu_check.py",
    "test_install.py",
    "test_processes.py",
    "test_torch_suites.py",
    "test_torch_tools.py",
    "test_ulp.py",
}
# Files that take longest. They run first: a file that is still running when all others have ended leaves cores idle.
_LONG = {
    "test_kernels.py",
    "test_cpu_kernels.py",
    "test_fuzz.py",
    "test_cuda_build.py",
    "test_examples.py",
    "test_convert.py",
    "test_masks.py",
    "test_gpu_check.py",
    "test_torch_suites.py",
    "test_notebooks.py",
    "test_expectations.py",
    "test_exact_instruction_sets.py",
    "test_processes.py",
}

if "PYTEST_XDIST_WORKER" in os.environ:  # which share the cores; two threads are what tests of threads need
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core, up to eight: each holds torch, and some tests start processes of their own."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(cores), 8)


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.path.name, item.path.parent.name} & _EXHAUSTIVE and not item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.exhaustive)
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and _WHY_NO_CUDA is not None:
        pytest.skip(_WHY_NO_CUDA)
    return torch.device(request.param)


@pytest.fixture
def needs_extension() -> None:
    info = normfused.info()
    if info["extension"] != "loaded":
        pytest.skip(f"needs the extension: {info['fallback_reason']}")


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts back the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps built programs between test runs, if pytest has a cache."""
    kept = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    return kept.mkdir("compiled") if kept else tmp_path_factory.mktemp("compiled")


@pytest.fixture
def folder(request: pytest.FixtureRequest, cache: Path) -> Iterator[Path]:
    """An empty folder. Its path is the same in every run: for ccache, a path in a command is part of the command."""
    folder = cache / re.sub(r"\W+", "-", request.node.name)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # From the reports: with several processes this one has run no test itself.
    stats = terminalreporter.stats
    for report in [*stats.get("passed", []), *stats.get("failed", [])]:
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"{report.nodeid}\n{text.strip()}\n")
    skipped = sum(str(_WHY_NO_CUDA) in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} CUDA cases skipped: {_WHY_NO_CUDA}")


@pytest.fixture(params=["0", "0 with threads", "2"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, thread_count: None) -> int:
    """The number of worker processes that read files, and whether threads read pictures if there are none."""
    monkeypatch.setattr(pictures, "THREAD_BYTES", 0 if "threads" in request.param else 1 << 60)
    torch.set_num_threads(2)
    return int(request.param.split()[0])
