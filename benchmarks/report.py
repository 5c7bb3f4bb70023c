"""Measures the grid and writes results.json, table.md and plots: ``python benchmarks/report.py``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import machine
import plots
import tables
import torch
from cases import Case, grid
from growth import Growth, measure_growth
from measure import Result, measure, summarize
from timing import FULL, QUICK

import normfused


@dataclasses.dataclass
class Report:
    machine: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = dataclasses.field(default_factory=list)
    memory: list[Growth] = dataclasses.field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Replaces results.json in one step: an interrupted run keeps what it had."""
        path = folder / "results.json"
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        unfinished.replace(path)

    def render(self, folder: Path) -> None:
        parts = (self.machine, self.settings, self.results, self.memory)
        (folder / "table.md").write_text(tables.render(*parts))
        plots.draw(self.machine, self.results, folder)
        print(tables.summary(*parts))
        print(f"\nwritten to {folder}")


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.render:
        Report(**json.loads((arguments.render / "results.json").read_text())).render(arguments.render)
        return 0

    device: str = arguments.device
    info = normfused.info()
    if info["extension"] != "loaded":
        print(f"nothing to measure, the extension is not loaded: {info['why_fallback']}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)

    budget = QUICK if arguments.quick else FULL
    partial = arguments.quick or arguments.only is not None
    pattern = re.compile(arguments.only or "")
    cases = [case for case in grid(device, quick=arguments.quick) if pattern.search(case.name)]
    more = [peer for peer in ("compile", "native") if getattr(arguments, peer)]
    settings = {
        "partial": partial,
        "seconds_per_case": budget.seconds,
        "least_rounds": budget.least_rounds,
        "more_peers": more,
    }
    report = Report(machine.describe(device), settings)
    default = Path(__file__).parent / "results" / (machine.slug(report.machine) + ("-partial" if partial else ""))
    folder: Path = arguments.out or default
    folder.mkdir(parents=True, exist_ok=True)

    try:
        if pattern.search("memory"):
            report.memory = measure_growth(device, arguments.threads)
        for index, case in enumerate(cases, 1):
            report.results.append(summarize(case, measure(case, device, budget, more), device))
            report.save(folder)
            print(f"[{index}/{len(cases)}] {_line(case, report.results[-1])}", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(report.results)} of {len(cases)} cases measured", file=sys.stderr)
        return 130
    finally:
        report.save(folder)
        report.render(folder)
    return 0


def _line(case: Case, result: Result) -> str:
    seconds, speedup = result["seconds"], result["speedup"]["torch"]["median"]
    ours, theirs = (seconds[peer]["median"] * 1e3 for peer in ("normfused", "torch"))
    return f"{case.name:66} {ours:8.3f} ms, torch {theirs:8.3f} ms, {speedup:6.2f} times faster"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_cuda = torch.cuda.is_available() and normfused.info()["cuda"]
    add = parser.add_argument
    add("--quick", action="store_true", help="three of the nine shapes, few rounds")
    add("--only", metavar="PATTERN", help="cases (and 'memory') whose name this regular expression finds")
    add("--compile", action="store_true", help="measure torch.compile of torch.nn too; compiling takes long")
    add("--native", action="store_true", help="measure torch.nn without cuDNN too; for CUDA")
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu", help="where to measure")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--out", type=Path, metavar="DIR", help="folder of the results; without it results/<device> beside this file")
    add("--render", type=Path, metavar="DIR", help="measure nothing: table and plots anew from DIR/results.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
