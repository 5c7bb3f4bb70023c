"""The rules of the benchmarks: own kernels, results checked before timing, no host time in CUDA times."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cases  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import operators  # noqa: E402
import proof  # noqa: E402
import public_rows  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402


@pytest.mark.usefixtures("needs_extension")
def test_operators_py_runs_every_operator() -> None:
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("normfused::")}
    with_kernels = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")}
    assert {f"normfused::{name}" for name in operators.OPERATORS} == with_kernels


def test_kernels_of_normfused_are_recognized_by_name() -> None:
    assert proof.is_ours("void normfused::cuda::reduce_rows<normfused::cuda::Moments<float>, 4>(...)")
    assert proof.is_ours("_ZN9normfused4cuda11reduce_rowsI...")
    assert not proof.is_ours("void at::native::batch_norm_collect_statistics_kernel<...>")


def kernels(*names: str) -> Callable[[Any], Any]:
    """A replacement of proof.observe: the profiler reports kernels of these names."""
    ours, others = ([n for n in names if proof.is_ours(n) == mine] for mine in (True, False))
    return lambda call: proof.Kernels(Counter(ours), Counter(others), {0}, 1e-6)


def test_a_call_that_runs_another_librarys_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "observe", kernels("void at::native::batch_norm()"))
    with pytest.raises(AssertionError, match="forward: no kernel of normfused ran, but void at::native::batch_norm"):
        proof.prove("forward", lambda: None, ours=True)
    proof.prove("torch", lambda: None, ours=False)
    monkeypatch.setattr(proof, "observe", kernels("void normfused::cuda::apply_flat()", "void at::native::add()"))
    proof.prove("forward", lambda: None, ours=True)
    with pytest.raises(AssertionError, match="torch: kernels of normfused ran"):
        proof.prove("torch", lambda: None, ours=False)
    monkeypatch.setattr(proof, "observe", kernels())
    for ours in (True, False):
        with pytest.raises(proof.Unseen, match="the profiler saw no kernel"):
            proof.prove("forward", lambda: None, ours=ours)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("peer", ["normfused", "torch", "copy"])
@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_a_peer_with_wrong_results_is_not_timed(peer: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("training_forward", (4, 3, 5, 5), torch.float32, "NCHW")
    build = cases.build_calls

    def faulty(*arguments: Any) -> dict[str, Any]:
        calls = build(*arguments)
        correct = calls[peer]
        calls[peer] = lambda: [t + 0.1 if fault == "wrong" else t * torch.nan for t in correct()]
        return calls

    assert measure.measure(case, "cpu", timing.TINY).error["normfused"] < 1e-6
    monkeypatch.setattr(measure, "build_calls", faulty)
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("the case was timed"))
    with pytest.raises(AssertionError, match=f"relative error of {peer} is"):
        measure.measure(case, "cpu", timing.TINY)


@pytest.mark.usefixtures("needs_extension")
def test_a_case_without_profiled_kernels_is_measured_and_reported_as_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("training_forward", (4, 3, 5, 5), torch.float32, "NCHW")
    monkeypatch.setattr(proof, "observe", kernels())
    measured = measure.measure(case, "cpu", timing.TINY, profile=True)
    assert len(measured.samples["normfused"]) == timing.TINY.min_rounds
    assert "the profiler saw no kernel" in (measure.complaint(case, measured) or "")
    exact = measured._replace(unseen=None)
    assert measure.complaint(case, exact) is None
    inexact = exact._replace(error={**exact.error, "normfused": 2e-6})
    assert measure.complaint(case, inexact) == "relative error 2.0e-06 exceeds the tolerance 1.0e-06"


@pytest.mark.usefixtures("needs_extension")
def test_a_failing_case_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = report.measure

    def failing(case: Any, *arguments: Any, **named: Any) -> Any:
        if case.operation == "channel_sums":
            raise RuntimeError("CUDA out of memory\nand more")
        return original(case, *arguments, **named)

    monkeypatch.setattr(report, "measure", failing)
    options = ["--tiny", "--device", "cpu", "--threads", "1", "--only", "^channel.*-2x8x6x6-float32-NCHW"]
    monkeypatch.setattr(sys, "argv", ["report.py", *options, "--out", str(tmp_path)])
    assert report.main() == report.INCOMPLETE
    written = report.Report.load(tmp_path)
    assert [result["operation"] for result in written.results] == ["channel_moments"]
    assert written.failures[0]["error"] == "RuntimeError: CUDA out of memory"
    assert "| channel_sums-2x8x6x6-float32-NCHW | RuntimeError: CUDA out of memory |" in capsys.readouterr().out


class Device:
    """A simulated CUDA device with one stream, and the clock of its host."""

    def __init__(self) -> None:
        self.host, self.busy_until = 0.0, 0.0
        self.launched: list[str] = []

    def launch(self, what: str, seconds: float, host: float = 1e-6) -> None:
        """Queues work that takes `seconds` on the device. Queueing takes `host` seconds on the host."""
        self.host += host
        self.busy_until = max(self.busy_until, self.host) + seconds
        self.launched.append(what)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    """torch.cuda.Event on the simulated device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.launch("event", 0)
        self.at = self.device.busy_until

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Replaces the functions of torch.cuda that timing.py uses."""
    fake = Device()
    zeros, total = torch.zeros, torch.sum
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(timing.CudaEvents, "min_bytes", 1 << 10)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(1, device="meta") if device == "cuda" else None)
    monkeypatch.setattr(torch, "sum", lambda *a, **k: fake.launch("read", 8e-5) if a[0].is_meta else total(*a, **k))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: fake.launch("sleep", cycles / 2e9))
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return fake


@pytest.mark.parametrize("host", [1e-5, 1e-3])
def test_cuda_time_includes_no_host_time(device: Device, host: float) -> None:
    """However long the launches take: the device evicts its L2, sleeps, then runs the queued call."""
    stopwatch = timing.CudaEvents()

    def call() -> None:
        device.launch("kernel", 3e-6, host=host)
        device.launch("kernel", 4e-6, host=host)

    for _ in range(3):
        device.launched.clear()
        assert stopwatch(call) == pytest.approx(7e-6)
    # One attempt: an earlier call has found a sleep that is long enough.
    assert device.launched == ["read", "sleep", "event", "kernel", "kernel", "event"]
    assert not stopwatch.uncovered[call]


def test_a_call_that_synchronizes_is_counted_as_uncovered(device: Device) -> None:
    stopwatch = timing.CudaEvents()

    def call() -> None:
        device.launch("kernel", 3e-6)
        device.host = device.busy_until  # synchronizes

    stopwatch(call)
    stopwatch(call)
    assert stopwatch.uncovered[call] == 2


RESULTS = [file for file in sorted(BENCHMARKS.glob("results/*/*.json")) if not file.parent.name.endswith("-partial")]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_committed_tables_are_rendered_by_this_code(file: Path) -> None:
    name = file.stem
    if name == "public":  # see the next test
        return
    content = json.loads(file.read_text())
    if name == "results":
        text, table = tables.render(*content.values()), file.with_name("table.md")
    elif name == "memory":
        text, table = memory.render(content), file.with_suffix(".md")
    else:
        text, table = import_module(name).render(content["machine"], content[name]), file.with_suffix(".md")
    assert table.read_text() == text, f"python benchmarks/{'report' if name == 'results' else name}.py --render"


def test_published_cases_are_rendered_as_not_run_until_they_are_measured() -> None:
    text = public_rows.render([])
    assert (BENCHMARKS / "results/public.md").read_text() == public_rows.render(
        public_rows.collect(public_rows.RESULTS)
    ), "public_rows.py --render"
    for row in public_rows.ROWS:
        (line,) = (line for line in text.splitlines() if f"| {row.what} |" in line)
        assert row.source in line
        assert ("not run" if row.case else "no kernel yet") in line
    result = {"seconds": {peer: {"median": 9e-4} for peer in ("normfused", "torch")}}
    row = {"what": public_rows.ROWS[0].what, "result": result, "busy_seconds": {"normfused": 8e-4, "torch": 1e-3}}
    described = {"gpu": "GPU X", "normfused": "1", "revision": "r", "torch": "2", "threads": 1, "date": "d"}
    text = public_rows.render([{"machine": described, "rows": [row]}])
    assert "| GPU X | 900 µs | 900 µs | 800 µs, 1 ms |" in text
    assert text.count("not run") == 3 * (sum(row.case is not None for row in public_rows.ROWS) - 1)
