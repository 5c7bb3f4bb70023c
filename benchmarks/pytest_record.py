"""A pytest plugin (``-p pytest_record``): selects the tests of one device and records each outcome as the test ends.

The environment variable NORMFUSED_TEST_DEVICE names the device, NORMFUSED_TEST_RECORD the file, which receives one line
of JSON per test. A run that is killed leaves the outcomes so far.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest


def is_of(device: str, test: str) -> bool:
    """Whether the test's parameters, as part of its name, include the device."""
    return re.search(rf"[\[-]{device}[\]-]", test) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not is_of(os.environ["NORMFUSED_TEST_DEVICE"], item.nodeid)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With pytest-xdist the controlling process receives the workers' reports too, and records them.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.skipped and isinstance(report.longrepr, tuple):
        line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        line["reason"] = str(report.longrepr)[-2000:]
    _write(line)


# The skip reasons of the fixtures in tests/conftest.py if the machine or the build has no CUDA.
UNFIT = ("torch sees no CUDA device", "normfused was built without CUDA", "needs the extension")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write({"test": report.nodeid, "outcome": "failed", "reason": str(report.longrepr)[-2000:]})


def _write(line: dict[str, Any]) -> None:
    with Path(os.environ["NORMFUSED_TEST_RECORD"]).open("a") as file:
        print(json.dumps(line), file=file)


class Counts(NamedTuple):
    passed: int
    failed: int
    skipped: Counter[str]  # by reason
    unfit: Counter[str]  # skipped because this machine or build has no CUDA, by reason

    def __str__(self) -> str:
        reasons = "; ".join(f"{n} × {reason}" for reason, n in (self.skipped + self.unfit).most_common(4))
        skipped = sum(self.skipped.values()) + sum(self.unfit.values())
        return f"{self.passed} passed, {self.failed} failed, {skipped} skipped" + (f" ({reasons})" if reasons else "")


def count(record: Path, device: str) -> Counts:
    """Counts the recorded tests of a device by outcome. Failures count for any device."""
    passed, failed = 0, 0
    skipped: Counter[str] = Counter()
    unfit: Counter[str] = Counter()
    for text in record.read_text().splitlines() if record.exists() else []:
        line = json.loads(text)
        failed += line["outcome"] == "failed"
        if is_of(device, line["test"]):
            passed += line["outcome"] == "passed"
            if line["outcome"] == "skipped":
                reason = line.get("reason", "")
                (unfit if reason.startswith(UNFIT) else skipped)[reason] += 1
    return Counts(passed, failed, skipped, unfit)
