"""``pytest --expect="..."``: a run fails unless it shows that it tested what it was to test. CI uses it.

The words are those of ``EXPECTATIONS``. The evidence is counted: calls of the extension's operators, launches of CUDA
kernels in the simulator, tests that passed. So a run of no tests, or of tests that were skipped, fails. With several
processes the evidence of all of them is added up.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import normfused
from normfused import _extension

EXPECTATIONS = {
    "extension": "every process has loaded the extension, and its operators were called",
    "operators": "each operator that the extension binds was called",
    "best": "every process runs the best instruction set of this machine, as torch detects it",
    "baseline": "every process runs this instruction set",
    "avx2": "every process runs this instruction set",
    "avx512": "every process runs this instruction set",
    "cuda": "every process runs the CUDA kernels in the simulator",
    "simulator": "CUDA kernels were launched in the simulator",
    "compiled": "tests that compile kernels passed, and none was skipped for lack of a tool",
}
INSTRUCTION_SETS = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}  # by torch's names
_NO_OPERATORS = {"memory_stats", "empty_cache", "cpu_capability", "has_cuda", "has_memory_pool", "uses_threads"}
# Folders of tests that compile kernels, and the skips that remain where all tools are installed.
_COMPILED = ["cpu_kernels", "host_cuda", "memory", "cuda_build"]
_ALLOWED_SKIP = "this machine supports"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("evidence")
    words = "; ".join(f"{word}: {meaning}" for word, meaning in EXPECTATIONS.items())
    group.addoption("--expect", help=f"fail unless these are true, separated by spaces. {words}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--expect") is not None:
        config.pluginmanager.register(Expectations(config), "evidence")


def nvcc() -> str | None:
    return shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


class Expectations:
    """Collects the evidence of this process, and where it has workers that of the workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.words = config.getoption("--expect").split()
        if not self.words or not set(self.words) <= EXPECTATIONS.keys():
            known = ", ".join(EXPECTATIONS)
            raise pytest.UsageError(f"--expect: expected words of {known}, got {config.getoption('--expect')!r}")
        self.is_worker = hasattr(config, "workerinput")
        self.calls: Counter[str] = Counter()
        self.evidence: list[dict[str, Any]] = []  # of each process that ran tests
        self.problems: list[str] = []
        self.passed: Counter[str] = Counter()  # by file
        self.skipped: list[tuple[str, str]] = []  # test and reason
        self.folder: TemporaryDirectory[str] | None = None
        if "simulator" in self.words and not self.is_worker:
            self.folder = TemporaryDirectory()
            os.environ["CUDAHOST_LAUNCHES"] = f"{self.folder.name}/launches"  # workers inherit it
        self.original = {name: getattr(_extension.C, name) for name in self.operators()}
        for name, operator in self.original.items():
            setattr(_extension.C, name, self._counted(name, operator))

    def pytest_unconfigure(self) -> None:
        for name, operator in self.original.items():
            setattr(_extension.C, name, operator)
        if self.folder is not None:
            self.folder.cleanup()
            del os.environ["CUDAHOST_LAUNCHES"]

    def operators(self) -> Iterator[str]:
        """The names of the extension's functions that are operators."""
        for name, value in vars(_extension.C).items() if _extension.C is not None else ():
            is_function = callable(value) and not isinstance(value, type) and not name.startswith("_")
            if is_function and not name.startswith("cuda_") and name not in _NO_OPERATORS:
                yield name

    def _counted(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operator)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return operator(*args, **kwargs)

        return counted

    # ---- evidence

    def own_evidence(self) -> dict[str, Any]:
        info = normfused.info()
        return {
            "extension": info["extension"],
            "capability": info["cpu_capability"],
            "best": INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability()),
            "operators": sorted(self.original),
            "calls": dict(self.calls),
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self.passed[Path(report.nodeid.split("::")[0]).as_posix()] += 1
        elif report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.append((report.nodeid, reason))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        evidence = getattr(node, "workeroutput", {}).get("evidence")
        if evidence is None:
            self.problems.append(f"process {node.gateway.id} ended without evidence")
        else:
            self.evidence.append(evidence)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.is_worker:
            self.config.workeroutput["evidence"] = self.own_evidence()  # type: ignore[attr-defined]
            return
        if not self.config.pluginmanager.hasplugin("dsession"):  # xdist's, of a process that has workers
            self.evidence.append(self.own_evidence())
        for word in self.words:
            self.problems += [f"{word}: {problem}" for problem in self.missing(word)]
        if self.problems and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        calls = sum(sum(evidence["calls"].values()) for evidence in self.evidence)
        sets = sorted({str(evidence["capability"]) for evidence in self.evidence})
        terminalreporter.section("expectations")
        terminalreporter.write_line(
            f"{sum(self.passed.values())} tests passed in {len(self.evidence)} processes; {calls} calls of operators, "
            f"instruction set {', '.join(sets)}; {self.launches()} launches of CUDA kernels in the simulator"
        )
        for problem in self.problems:
            terminalreporter.write_line(f"NOT MET {problem}", red=True)
        if not self.problems:
            terminalreporter.write_line(f"met: {' '.join(self.words)}")

    def launches(self) -> int:
        file = Path(os.environ.get("CUDAHOST_LAUNCHES", ""))
        return sum(map(int, file.read_text().split())) if self.folder is not None and file.is_file() else 0

    # ---- expectations

    def missing(self, word: str) -> Iterator[str]:
        """What is missing for this expectation, if anything is."""
        if not self.evidence:
            yield "no process ran tests"
        elif word == "extension":
            if any(evidence["extension"] != "loaded" for evidence in self.evidence):
                yield "the extension is not loaded"
            if not any(evidence["calls"] for evidence in self.evidence):
                yield "no operator was called"
        elif word == "operators":
            called = {name for evidence in self.evidence for name in evidence["calls"]}
            names = sorted({name for evidence in self.evidence for name in evidence["operators"]} - called)
            if names or not called:
                yield f"operators that were not called: {', '.join(names) or 'all'}"
        elif word == "simulator":
            if self.launches() == 0:
                yield "no CUDA kernel was launched"
        elif word == "compiled":
            yield from self._not_compiled()
        else:
            for evidence in self.evidence:
                expected = evidence["best"] if word == "best" else word
                if evidence["capability"] != expected:
                    yield f"a process ran {evidence['capability']}, expected {expected}"

    def _not_compiled(self) -> Iterator[str]:
        for folder in _COMPILED:
            if folder == "cuda_build" and nvcc() is None:
                continue
            if not any(f"/{folder}/" in f"/{file}" for file in self.passed):
                yield f"no test of {folder} passed"
            for test, reason in self.skipped:
                if f"/{folder}/" in f"/{test}" and _ALLOWED_SKIP not in reason:
                    yield f"{test} was skipped: {reason}"
