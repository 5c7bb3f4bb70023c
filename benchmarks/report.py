"""Measures all cases and writes results.json, table.md and plots: ``python benchmarks/report.py``."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import machine
import onednn.library
import plots
import processes
import tables
import torch
from cases import Case, grid
from growth import Growth, Level, measure_growth, measure_levels
from measure import Result, complaint, measure, median_result, summarize
from peers import DEFAULT, LOCAL, PEERS, REMOTE, REQUIRED, not_measured
from timing import FULL, QUICK, Budget
from timing import TINY as TINY_BUDGET
from worker import Worker

import normfused

INCOMPLETE = 3  # exit status if cases failed or time ran out


@dataclasses.dataclass
class Report:
    """The content of results.json."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = dataclasses.field(default_factory=list)
    memory: list[Growth] = dataclasses.field(default_factory=list)
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)  # name of the case, and the error
    levels: list[Level] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Report:
        return cls(**json.loads((folder / "results.json").read_text()))

    @classmethod
    def median_of(cls, runs: Sequence[Report]) -> Report:
        """The medians of several runs of one build on one machine.

        A peer may be missing in some runs. What is not measured in each case, such as memory, is that of the first run.

        Raises:
            ValueError: If the runs differ in the machine, the software or the cases.
        """
        first = runs[0]
        for name in ("cpu", "gpu", "caches", "threads", "torch", "python", "compiler", "revision"):
            if len({str(run.machine.get(name)) for run in runs}) > 1:
                raise ValueError(f"the runs differ in {name}: {', '.join(str(run.machine.get(name)) for run in runs)}")
        if any(run.settings["partial"] != first.settings["partial"] for run in runs):
            raise ValueError("some runs have few rounds or a part of the cases")
        cases = [{result["name"]: result for result in run.results} for run in runs]
        for case in cases[1:]:
            if different := case.keys() ^ cases[0].keys():
                raise ValueError(f"only some runs have {min(different)}")
        whole = copy.deepcopy(first)
        whole.machine["load_average"] = max(run.machine["load_average"] for run in runs)
        whole.settings["runs"] = [run.machine["date"] for run in runs]
        whole.results = [median_result([case[name] for case in cases]) for name in cases[0]]
        whole.failures = [failure for run in runs for failure in run.failures]
        return whole

    def save(self, folder: Path) -> None:
        """Replaces results.json atomically: an interruption leaves the previous file."""
        path = folder / "results.json"
        temporary = path.with_suffix(".json.part")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        temporary.replace(path)

    def render(self, folder: Path) -> None:
        """Writes table.md and the plots, and prints the summary."""
        parts = (self.machine, self.settings, self.results, self.memory, self.failures, self.levels)
        (folder / "table.md").write_text(tables.render(*parts))
        plots.draw(self.machine, self.results, folder)
        print(tables.render(*parts, every_case=False))
        print(f"written to {folder}")

    def fail(self, case: Case, message: str) -> None:
        self.failures.append({"name": case.name, "error": message})
        print(f"FAILED {case.name}: {message}", file=sys.stderr, flush=True)

    def add(self, case: Case, budget: Budget, arguments: argparse.Namespace, workers: Sequence[Worker] = ()) -> str:
        """Measures a case and returns a line about it. An error is recorded in `failures`, and is not raised."""
        device: str = arguments.device
        # Profile the first case of each operation: which library's kernels run does not depend on the shape.
        done = [*self.results, *self.failures]
        profile = device == "cuda" and all(not item["name"].startswith(f"{case.operation}-") for item in done)
        try:
            peers, graphs = _peers(arguments), arguments.graphs
            measured = measure(case, device, budget, peers, workers=workers, graphs=graphs, profile=profile)
            self.results.append(summarize(case, measured, device))
        except Exception as error:  # torch.compile may raise anything, and a worker may die
            self.fail(case, f"{type(error).__name__}: {error}".splitlines()[0])
            if device == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost, since no later case could run
            return "failed"
        if wrong := complaint(case, measured):
            self.fail(case, wrong)
        return _line(case, self.results[-1])


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.render:
        Report.load(arguments.render).render(arguments.render)
        return 0
    if arguments.median:
        try:
            report = Report.median_of([Report.load(folder) for folder in arguments.median])
        except ValueError as error:
            _parser().error(f"--median: {error}")
        folder = arguments.out or _folder(report)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder)
        report.render(folder)
        return 0

    if arguments.graphs and arguments.device == "cpu" and not arguments.tiny:
        _parser().error("--graphs needs CUDA")
    info = normfused.info()
    if info["extension"] != "loaded":
        print(f"the benchmarks need the extension, which is not loaded: {info['fallback_reason']}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        cases.COMPILER = "eager"
    budget = TINY_BUDGET if arguments.tiny else QUICK if arguments.quick else FULL
    partial = arguments.quick or arguments.tiny or arguments.only is not None
    workers, missing = processes.workers(_peers(arguments), arguments.threads)
    for line in not_measured(missing):
        print(line, file=sys.stderr)
    settings = {
        "partial": partial,
        "seconds_per_case": budget.seconds,
        "least_rounds": budget.min_rounds,
        "peers": [peer for peer in _peers(arguments) if peer not in missing],
        "missing_peers": missing,
        "onednn": onednn.library.version() if any("onednn" in worker.peers for worker in workers) else None,
        "graphs": arguments.graphs,
        "tiny": arguments.tiny,
    }
    report = Report(machine.describe(arguments.device), settings)
    folder: Path = arguments.out or _folder(report)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _measure(report, budget, arguments, folder, workers)
    finally:
        for worker in workers:
            worker.close()
        report.save(folder)
        if not arguments.no_render:
            report.render(folder)


def _measure(
    report: Report, budget: Budget, arguments: argparse.Namespace, folder: Path, workers: Sequence[Worker]
) -> int:
    """Measures the chosen cases, and saves after each. Returns the exit status."""
    end = time.monotonic() + arguments.seconds
    pattern = re.compile(arguments.only or "")
    chosen = [c for c in grid(arguments.device, quick=arguments.quick, tiny=arguments.tiny) if pattern.search(c.name)]
    if not arguments.tiny and pattern.search("memory"):
        report.memory = measure_growth(arguments.device, arguments.threads)
        report.levels = measure_levels(arguments.threads) if arguments.device == "cpu" else []
    gc.freeze()  # each case collects garbage; this excludes the objects of imported modules
    for index, case in enumerate(chosen, 1):
        if time.monotonic() > end:
            print(f"out of time: {index - 1} of {len(chosen)} cases measured")
            return INCOMPLETE
        try:
            line = report.add(case, budget, arguments, workers)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {index - 1} of {len(chosen)} cases measured", file=sys.stderr)
            return 130
        report.save(folder)
        print(f"[{index}/{len(chosen)}] {line}", flush=True)
    print(f"{len(report.results)} of {len(chosen)} cases measured, {len(report.failures)} wrong or failed")
    return INCOMPLETE if report.failures else 0


def _folder(report: Report) -> Path:
    partial = "-partial" if report.settings["partial"] else ""
    return Path(__file__).parent / "results" / (machine.slug(report.machine) + partial)


def _peers(arguments: argparse.Namespace) -> list[str]:
    """The names of the peers to measure, in the order of `PEERS`."""
    default = LOCAL if arguments.tiny else DEFAULT[arguments.device]
    chosen = default if arguments.peers is None else arguments.peers.split(",")
    if unknown := [peer for peer in chosen if peer not in PEERS or (peer in REMOTE and arguments.device == "cuda")]:
        raise SystemExit(f"report.py: no peer {', '.join(unknown)} on {arguments.device}; --help lists them")
    more = [peer for peer in ("compile", "native") if getattr(arguments, peer)]
    return [peer for peer in PEERS if peer in (*REQUIRED, *chosen, *more)]


def _line(case: Case, result: Result) -> str:
    seconds, speedup = result["seconds"], result["speedup"]["torch"]["median"]
    ours, theirs = (seconds[peer]["median"] * 1e3 for peer in ("normfused", "torch"))
    return f"{case.name:66} {ours:8.3f} ms, torch {theirs:8.3f} ms, speedup {speedup:6.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_cuda = torch.cuda.is_available() and normfused.info()["cuda"]
    add = parser.add_argument
    add("--quick", action="store_true", help="three of the nine shapes, few rounds")
    add("--only", metavar="PATTERN", help="only the cases (and 'memory') whose name matches this regular expression")
    names = f"peers to measure besides {' and '.join(REQUIRED)}, separated by commas, of {', '.join(PEERS)}"
    add("--peers", metavar="NAMES", help=f"{names}; if not given, those of the device")
    add("--compile", action="store_true", help="measure torch.compile of torch.nn too; compilation takes long")
    add("--native", action="store_true", help="measure torch.nn without cuDNN too (CUDA)")
    add("--graphs", action="store_true", help="time replays of CUDA graphs (CUDA)")
    add("--tiny", action="store_true", help="rehearsal: two small shapes, two rounds; the figures mean nothing")
    add("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    add("--no-render", action="store_true", help="write results.json only; see --render")
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu", help="device to measure on")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--out", type=Path, metavar="DIR", help="folder of the results; if not given, results/<device>")
    add("--median", type=Path, nargs="+", metavar="DIR", help="measure nothing: write the medians of these runs")
    add("--render", type=Path, metavar="DIR", help="measure nothing: write table and plots from DIR/results.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
