"""The rules of the benchmarks: own kernels, results checked before timing, no host time in CUDA times."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cases  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import onednn.calls  # noqa: E402
import onednn.library  # noqa: E402
import operators  # noqa: E402
import peers  # noqa: E402
import plan_table  # noqa: E402
import plots  # noqa: E402
import processes  # noqa: E402
import proof  # noqa: E402
import public_rows  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402
import worker  # noqa: E402
from plot_style import NEUTRAL  # noqa: E402

from normfused.cuda_plans import cuda_device  # noqa: E402


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


def test_a_call_on_the_cpu_is_repeated_before_it_is_timed_until_an_idle_processor_has_its_full_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))  # each reading is a second later
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "WARM_SECONDS", 3)
    calls: list[int] = []
    seconds = timing.host_sampler(lambda: calls.append(0), [torch.zeros(1)])()
    assert (len(calls), seconds) == (1 + 2 + 1, 1)  # once, until 3 seconds have passed, and the timed one


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


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_bytes_of_cuda_plans(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that fits shared memory is read once, and a large one with channels last twice."""
    monkeypatch.setattr(cases, "cuda_device", lambda _: cuda_device("h100"))
    small = cases.Case(operation, (32, 64, 28, 28), torch.float32, "NCHW")
    large = cases.Case(operation, (256, 64, 112, 112), torch.bfloat16, "channels_last")
    for case, traffic in ((small, "resident"), (large, "streaming")):
        assert 1 <= cases.traffic_bytes(case, "planned") / cases.traffic_bytes(case, traffic) < 1.01


CASE = cases.Case("training_forward", (4, 16, 5, 5), torch.float32, "NCHW")


def environment_as_note(case: cases.Case) -> worker.Offer:
    return dataclasses.replace(processes.kept(case), note=str(os.environ.get("MALLOC_MMAP_MAX_")))


def dies_of_moments(case: cases.Case) -> worker.Offer:
    if case.operation == "channel_moments":
        os._exit(9)
    return processes.kept(case)


@pytest.mark.usefixtures("needs_extension")
def test_a_worker_checks_and_times_a_case_in_its_own_environment() -> None:
    before = dict(os.environ)
    remote = worker.Worker(["kept"], environment_as_note, {"MALLOC_MMAP_MAX_": "0"})
    try:
        for case in (CASE, dataclasses.replace(CASE, dtype=torch.bfloat16)):
            prepared = remote.prepare(case)
            assert 0 < prepared.error["kept"] < cases.WRONG[case.dtype]
            assert prepared.note == "0"
            assert remote.sampler("kept")() > 0
        with pytest.raises(worker.WorkerError, match="kept: KeyError: 'other'"):
            remote.sampler("other")()
    finally:
        remote.close()
    assert dict(os.environ) == before


@pytest.mark.usefixtures("needs_extension")
def test_a_worker_that_dies_fails_its_case_and_is_restarted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = processes.Process(("kept",), dies_of_moments, lambda: None)
    monkeypatch.setattr(processes, "PROCESSES", (process,))
    options = ["--tiny", "--device", "cpu", "--threads", "1", "--only", "^channel.*-2x8x6x6-float32-NCHW"]
    monkeypatch.setattr(sys, "argv", ["report.py", *options, "--peers", "kept", "--out", str(tmp_path)])
    assert report.main() == report.INCOMPLETE
    written = report.Report.load(tmp_path)
    (failure,) = written.failures
    assert failure["name"].startswith("channel_moments-")
    assert failure["error"] == "WorkerError: the process of kept died with status 9"
    (result,) = written.results
    assert result["operation"] == "channel_sums"
    assert set(result["seconds"]) == {"normfused", "torch", "kept", "copy"}


def hangs(case: cases.Case) -> worker.Offer:
    threading.Event().wait()
    raise AssertionError


def test_a_worker_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(worker, "END_SECONDS", 0.0)
    remote = worker.Worker(["kept"], hangs)
    with pytest.raises(worker.WorkerError, match="the process of kept did not answer for 0 s"):
        remote.prepare(CASE)
    assert remote.pid is None


class Stub:
    """A worker without a process: its peer takes one second."""

    peers = ("kept",)
    pid = None

    def __init__(self, error: float) -> None:
        self.error = error

    def prepare(self, case: cases.Case) -> worker.Prepared:
        return worker.Prepared({"kept": self.error}, "chosen")

    def sampler(self, peer: str) -> timing.Sampler:
        return lambda: 1.0


@pytest.mark.usefixtures("needs_extension")
def test_a_peer_of_a_worker_is_measured_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["torch", "kept", "copy"]
    measured = measure.measure(CASE, "cpu", timing.TINY, chosen, workers=[Stub(1e-7)])
    assert measured.samples["kept"] == [1.0] * timing.TINY.min_rounds
    result = measure.summarize(CASE, measured, "cpu")
    assert list(result["seconds"]) == ["normfused", *chosen]
    assert result["speedup"]["kept"]["median"] > 0
    assert result["error"]["kept"] == 1e-7
    assert result["notes"] == {"kept": "chosen"}

    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("the case was timed"))
    with pytest.raises(AssertionError, match=r"relative error of kept is 2\.0e-01"):
        measure.measure(CASE, "cpu", timing.TINY, chosen, workers=[Stub(0.2)])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_running_threads_of_other_processes_are_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert worker._running([process.pid])
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not worker._running([process.pid])
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("needs_extension")
def test_only_known_peers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, name in (("cpu", "other"), ("cuda", "kept")):
        monkeypatch.setattr(sys, "argv", ["report.py", "--tiny", "--device", device, "--peers", name])
        with pytest.raises(SystemExit, match=f"no peer {name} on {device}"):
            report.main()


def test_each_peer_covers_the_cases_it_can_compute() -> None:
    grid = cases.grid("cpu", tiny=True)
    covered = {peer: {case.operation for case in grid if peers.PEERS[peer].covers(case)} for peer in peers.PEERS}
    assert covered["torch"] == covered["kept"] == set(cases.OPERATIONS)
    assert covered["mkldnn"] == {"training_forward", "eval_forward"}
    assert covered["onednn"] == set(cases.OPERATIONS) - {*cases.STATISTICS, "add_relu_forward_backward"}
    assert peers.peer_names(CASE, ["copy", "mkldnn", "torch"]) == ["normfused", "torch", "mkldnn", "copy"]
    assert peers.peer_names(CASE) == ["normfused", "torch", "copy", "clone"]


def test_mkldnn_computes_what_it_covers() -> None:
    for operation in ("training_forward", "eval_forward"):
        case = dataclasses.replace(CASE, operation=operation)
        offer = processes.mkldnn(case)
        assert torch.equal(offer.inputs[0], cases.inputs(case, "cpu")[0].flatten())
        results = offer.plain(offer.calls["mkldnn"]())
        assert cases.Oracle(case, "cpu").error("mkldnn", results) < cases.WRONG[case.dtype]


@pytest.mark.skipif(processes._no_onednn() is not None, reason=f"{processes._no_onednn()}")
@pytest.mark.parametrize("layout", onednn.calls.LAYOUTS)
def test_onednn_computes_what_it_covers_in_every_layout(layout: str) -> None:
    shape = CASE.shape
    for operation, dtype, kind in product(cases.OPERATIONS, cases.DTYPES, cases.LAYOUTS):
        case = cases.Case(operation, shape, dtype, kind)
        if not peers.PEERS["onednn"].covers(case):
            continue
        problem = onednn.calls.Problem(case, layout)
        oracle = cases.Oracle(case, "cpu")
        for call in (problem.fresh, problem.reusing()):
            assert oracle.error("onednn", problem.plain(call())) < cases.WRONG[dtype], case.name


def test_missing_onednn_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("DNNLROOT", raising=False)
    monkeypatch.setattr(onednn.library, "CACHE", tmp_path / "cache")
    workers, missing = processes.workers(["torch", "onednn"], 1)
    assert not workers
    assert missing["onednn"].startswith("oneDNN is not installed (pip install onednn-cpu-gomp")
    (line,) = peers.not_measured({"onednn": "reason", "onednn_reused": "reason"})
    assert line == "Not measured: oneDNN and oneDNN into existing outputs. reason"
    for name, text in (("oneapi/dnnl/dnnl.hpp", "#error broken\n"), ("oneapi/dnnl/dnnl_version.h", "")):
        (tmp_path / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "include" / name).write_text(text)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libdnnl.so.3").touch()
    if shutil.which(os.environ.get("CXX", "c++")):
        assert "broken" in (processes._no_onednn() or "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert processes._no_onednn() == "no C++ compiler for the driver of oneDNN"


def test_the_cache_that_a_size_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {"L1 data": "48K", "L1 instruction": "32K", "L2 unified": "2048K", "L3 unified": "32M"}
    monkeypatch.setattr(machine, "_caches", lambda: caches)
    sizes = (1, 2 << 20, (2 << 20) + 1, 32 << 20, (32 << 20) + 1)
    assert [machine.fits(size) for size in sizes] == ["L2", "L2", "L3", "L3", "memory"]
    caches.clear()
    assert machine.fits(1) is None


def results_of(device: str, speedups: dict[str, float]) -> list[measure.Result]:
    """Results of all cases of a device. Each peer that covers a case has its speedup."""
    copied = {traffic: {"q1": 1.2, "median": 1.2, "q3": 1.2} for traffic in ("resident", "streaming")}
    results = []
    for case in cases.grid(device):
        times = {peer: x for peer, x in speedups.items() if peers.PEERS[peer].covers(case)}
        results.append(
            {
                **{"name": case.name, "operation": case.operation, "shape": list(case.shape), "layout": case.layout},
                **{"dtype": cases.dtype_name(case.dtype), "tensor_bytes": case.tensor_bytes, "rounds": 2},
                "seconds": {peer: {"q1": x, "median": x, "q3": x} for peer, x in {"normfused": 1, **times}.items()},
                "speedup": {peer: {"q1": x, "median": x, "q3": x} for peer, x in times.items()},
                "floor_distance": copied,
                "fits": "L3" if case.tensor_bytes < 16 << 20 else "memory",
                "notes": {"onednn": "nhwc, kernel"} if "onednn" in times else {},
            }
        )
    return results  # type: ignore[return-value]


def test_targets_of_each_peer() -> None:
    speedups = {"torch": 3.0, "kept": 2.0, "mkldnn": 2.6, "onednn": 1.5, "copy": 1.0}
    results = results_of("cpu", speedups)
    every = next(t for t in targets.TARGETS if t.operation is None and t.peer == "torch")
    against = {t.peer: t for t in targets.TARGETS if t.peer in ("mkldnn", "onednn")}
    assert (every.value(results), every.reached(3.0)) == (3.0, True)
    assert against["mkldnn"].value(results) == pytest.approx(2.6)
    assert against["onednn"].value(results) == 1.5

    slow = next(r for r in results if r["name"] == "eval_forward-32x64x56x56-bfloat16-channels_last")
    slow["speedup"]["onednn"]["median"] = 0.9
    assert against["onednn"].value(results) == 0.9
    assert not against["onednn"].reached(0.9)
    del slow["speedup"]["onednn"]
    assert against["onednn"].value(results) is None
    assert every.value(results) == 3.0
    assert every.value(results[1:]) is None


def test_tables_list_each_peer_each_cache_and_slow_cases() -> None:
    results = results_of("cpu", {"torch": 3.0, "kept": 2.0, "onednn": 1.5, "copy": 1.0})
    described = json.loads(next(file for file in RESULTS if file.name == "results.json").read_text())["machine"]
    settings = {"partial": False, "seconds_per_case": 1, "least_rounds": 2, "onednn": "3.2.0"}
    settings["missing_peers"] = {"mkldnn": "torch was built without oneDNN"}
    text = tables.render(described, settings, results, [])
    assert "oneDNN 3.2.0" in text
    assert "Not measured: torch via to_mkldnn. torch was built without oneDNN" in text
    assert "| operation | torch | torch with kept pages | oneDNN |" in text
    assert "| BN training, forward | 3.00 (3.00) | 2.00 (2.00) | 1.50 (1.50) |" in text
    assert "| channel_moments | 3.00 (3.00) | 2.00 (2.00) | – |" in text
    assert "| operation | L3 | memory |" in text
    assert "| BN training, forward | 1.20 (20) | 1.20 (16) |" in text
    assert "No case is slower than torch." in text
    assert "## Slower than oneDNN" not in text
    assert "| nhwc, kernel |" in text
    results[0]["speedup"]["torch"] = {"q1": 0.4, "median": 0.5, "q3": 0.6}
    text = tables.render(described, settings, results, [])
    assert "| BN training, forward | 32×64×112², float32, NCHW | 0.50 | 0.40–0.60 |" in text


def test_tables_compare_cases_in_which_onednn_is_faster_with_the_least_traffic() -> None:
    results = results_of("cpu", {"torch": 3.0, "onednn": 1.5, "copy": 1.0})
    forward, backward = (
        next(r for r in results if (r["operation"], r["layout"]) == (operation, layout))
        for operation, layout in (("training_forward", "NCHW"), ("training_backward", "channels_last"))
    )
    for result, theirs in ((forward, 0.5), (backward, 0.75)):
        result["speedup"]["onednn"] = {"q1": theirs, "median": theirs, "q3": theirs}
        result["seconds"]["onednn"] = {"q1": theirs, "median": theirs, "q3": theirs}
        result["seconds"]["normfused"] = {"q1": 1.0, "median": 1.0, "q3": 1.0}
    forward["floor_distance"]["resident"] = {"q1": 2.5, "median": 2.5, "q3": 2.5}
    backward["floor_distance"]["streaming"] = {"q1": 1.25, "median": 1.25, "q3": 1.25}
    text = "\n".join(tables._slower_than_onednn(results))
    assert text.count("×112²") == 2
    assert "| BN training, forward | 32×64×112², float32, NCHW | 0.50 | 1e+03 | 500 | 400 |  |" in text
    bound = "1e+03 | 750 | 800 | **above oneDNN's** |"
    assert f"| BN training, backward | 32×64×112², float32, channels_last | 0.75 | {bound}" in text


def run_with(speedup: float, peers: tuple[str, ...] = ("torch",), **machine: object) -> report.Report:
    """A run of report.py in which each case has these speedups."""
    described: dict[str, object] = {"device": "cpu", "cpu": "a CPU", "revision": "abc", "load_average": speedup}
    settings = {"partial": False, "seconds_per_case": 1, "least_rounds": 2}
    results = results_of("cpu", {peer: speedup * (index + 1) for index, peer in enumerate(peers)})
    return report.Report(described | {"date": f"day {speedup}"} | machine, settings, results)


def test_the_median_of_several_runs() -> None:
    runs = [run_with(3), run_with(1, ("torch", "kept")), run_with(2, ("torch", "kept"))]
    runs[0].results[0]["speedup"]["torch"]["median"] = 0.5
    merged = report.Report.median_of(runs)
    assert [result["speedup"]["torch"]["median"] for result in merged.results[:2]] == [1, 2]
    assert merged.results[1]["speedup"]["kept"] == {"q1": 3, "median": 3, "q3": 3}  # of two runs
    assert merged.settings["runs"] == ["day 3", "day 1", "day 2"]
    assert merged.machine["load_average"] == 3
    assert runs[0].results[0]["speedup"]["torch"]["median"] == 0.5
    assert len(merged.results) == len(runs[0].results)
    described = json.loads(next(file for file in RESULTS if file.name == "results.json").read_text())["machine"]
    text = tables.render(described | merged.machine, merged.settings, merged.results, [])
    assert "Medians of 3 runs, day 3, day 1, day 2; in each 1 s and at least 2 rounds per case" in text


def test_only_runs_of_the_same_build_and_cases_have_a_median() -> None:
    with pytest.raises(ValueError, match="differ in revision: abc, def"):
        report.Report.median_of([run_with(1), run_with(2, revision="def")])
    fewer, partial = run_with(1), run_with(1)
    name = fewer.results.pop()["name"]
    with pytest.raises(ValueError, match=f"only some runs have {name}"):
        report.Report.median_of([run_with(1), fewer])
    partial.settings["partial"] = True
    with pytest.raises(ValueError, match="few rounds or a part of the cases"):
        report.Report.median_of([run_with(1), partial])


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


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(color: str, page: str) -> float:
    low, high = sorted((luminance(color), luminance(page)))
    return (high + 0.05) / (low + 0.05)


def test_plots_read_on_white_and_dark_pages_and_on_a_phone(tmp_path: Path) -> None:
    """WCAG 2 asks for a contrast of 3 for graphics, and of 4.5 for small text, which no color has on both pages."""
    described = json.loads(next(file for file in RESULTS if file.name == "results.json").read_text())["machine"]
    plots.draw(described, results_of("cpu", {"torch": 3.0, "copy": 1.0}), tmp_path)
    case = {"norm": "GroupNorm", "shape": (2, 32, 3), "dtype": "float32", "layout": "channels first", "speedup": 2.0}
    plots.draw_norms(described, [case | {"operation": name} for name in ("forward", "forward + backward")], tmp_path)
    plots.draw_memory(
        described, "title", [plots.Bars("ours", True, 1, 2), plots.Bars("torch", False, 3, 4)], tmp_path / "m.svg"
    )
    drawn = {path: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(path.name for path in drawn) == ["floor-n32.svg", "m.svg", "norms.svg", "speedup-n32.svg"]
    for path, text in drawn.items():
        assert 'width="432pt"' in text, path
        texts = re.findall(r'<g id="text_\d+">.*?<g style="([^"]*)" transform', text, re.DOTALL)
        assert len(texts) == text.count('<g id="text_') > 0, path
        assert all(f"fill: {NEUTRAL}" in style for style in texts), path  # black is not written
        colors = set(re.findall(r"(?:fill|stroke): (#\w{6})", text))
        for color in colors:
            least = 4.2 if color == NEUTRAL else 3
            assert min(contrast(color, "#ffffff"), contrast(color, "#131416")) >= least, (path, color)


@pytest.mark.usefixtures("needs_extension")
def test_the_table_of_plans_is_that_of_the_kernels() -> None:
    assert plan_table.batch_norms_of_resnet50().total() == 53
    assert plan_table.RESULT.read_text() == plan_table.render(), "python benchmarks/plan_table.py"


def test_published_cases_are_rendered_as_not_run_until_they_are_measured() -> None:
    text = public_rows.render([])
    assert (BENCHMARKS / "results/public.md").read_text() == public_rows.render(
        public_rows.collect(public_rows.RESULTS)
    ), "public_rows.py --render"
    for row in public_rows.ROWS:
        (line,) = (line for line in text.splitlines() if f"| {row.what} |" in line)
        assert row.source in line
        assert ("not run" if row.case else public_rows.NO_SHAPE) in line
    result = {"seconds": {peer: {"median": 9e-4} for peer in ("normfused", "torch")}}
    row = {"what": public_rows.ROWS[0].what, "result": result, "busy_seconds": {"normfused": 8e-4, "torch": 1e-3}}
    described = {"gpu": "GPU X", "normfused": "1", "revision": "r", "torch": "2", "threads": 1, "date": "d"}
    text = public_rows.render([{"machine": described, "rows": [row]}])
    assert "| GPU X | 900 µs | 900 µs | 800 µs, 1 ms |" in text
    assert text.count("not run") == 3 * (sum(row.case is not None for row in public_rows.ROWS) - 1)
