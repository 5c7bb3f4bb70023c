"""Renders tables and plots from the archives of gpu_check.py, on any machine."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import activations
import command
import gpu_build
import images
import machine
import memory
import norms
import public_rows
import tables
from report import Report
from timing import FULL

RESULTS = Path(__file__).resolve().parent / "results"
REHEARSAL = "REHEARSAL, figures without meaning"
GRID = ("n256", "n32", "growth")  # stages that are parts of one table
# Stages with a table of their own.
ALONE = ("first", "overlap", "serial", "unstaged", "unpipelined", "graphs", "compile")


def main(archives: Sequence[Path], out: Path | None) -> int:
    """Renders archives of one device into results/<device>/. If a stage ran twice, its later result counts.

    A rehearsal is rendered into `out`, or into a folder next to its archive, and never into results.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folders = [unpack(archive, Path(scratch) / str(index)) for index, archive in enumerate(archives)]
        runs = [json.loads((folder / "verdicts.json").read_text()) for folder in folders]
        devices = {(run["device"], run["rehearsal"]) for run in runs}
        if len(devices) > 1:
            print(f"archives of different devices: {', '.join(sorted(name for name, _ in devices))}", file=sys.stderr)
            return 1
        ((device, rehearsal),) = devices
        if rehearsal or device == "none":
            name = archives[0].name.removesuffix(".tar.gz")
            target = out or archives[0].parent / f"{name}.rendered"
            if RESULTS in target.resolve().parents:
                print(f"{target} is for results of a GPU, and this is a rehearsal", file=sys.stderr)
                return 1
        else:
            target = (out or RESULTS / device).resolve()
        target.mkdir(parents=True, exist_ok=True)
        render(folders, runs, target)
    print(f"\nwritten to {target}")
    return 0


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def render(folders: Sequence[Path], runs: Sequence[dict[str, Any]], target: Path) -> None:
    write_verdicts(runs, target / "check.md")
    logs = target / "check"
    for folder, run in zip(folders, runs, strict=True):
        copy(folder, "logs", logs)
        for name in ("operators.json", "test.jsonl", "large.jsonl"):
            copy(folder, name, logs)
        for name in ("memory.json", "activations.json", "images.json", "norms.json", "public.json"):
            copy(folder, name, target)
            relabel_file(target / name, run)
    merge([part for part in parts(folders, runs, GRID)], target)
    for name in ALONE:
        merge([part for part in parts(folders, runs, (name,))], target / name)
    if (target / "memory.json").exists():
        memory.write(target)
    for name, module in (("activations", activations), ("images", images), ("norms", norms)):
        if (target / f"{name}.json").exists():
            command.write(name, module.render, target, norms.draw if module is norms else None)
    if RESULTS in target.parents and (target / "public.json").exists():
        public_rows.write_table()


def copy(folder: Path, name: str, target: Path) -> None:
    source = folder / name
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / name)


def parts(folders: Sequence[Path], runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Report]:
    """The measurements of these stages, in the order of the archives."""
    found = []
    for folder, run in zip(folders, runs, strict=True):
        for name in names:
            if (folder / name / "results.json").exists():
                part = Report.load(folder / name)
                relabel(part.machine, run)
                found.append(part)
    return found


def merge(found: Sequence[Report], target: Path) -> None:
    """Merges reports into one and renders its table and plots. The later result of a case counts."""
    if not found:
        return
    whole = Report(found[-1].machine, dict(found[-1].settings))
    results = {result["name"]: result for part in found for result in part.results}
    failures = {failure["name"]: failure for part in found for failure in part.failures}
    for part in found:  # a failure counts only if no report has a result
        for result in part.results:
            if all(failure["name"] != result["name"] for failure in part.failures):
                failures.pop(result["name"], None)
    whole.results, whole.failures = list(results.values()), list(failures.values())
    whole.memory = next((part.memory for part in reversed(found) if part.memory), [])
    # A subset of the grid is a full result; one with few rounds is marked as partial.
    rounds = [part.settings["least_rounds"] for part in found]
    whole.settings |= {"partial": min(rounds) < FULL.min_rounds, "least_rounds": min(rounds)}
    target.mkdir(parents=True, exist_ok=True)
    whole.save(target)
    whole.render(target)


def revision(measured_on: dict[str, Any], run: dict[str, Any]) -> str:
    """The git revision of a run.

    If the measured checkout had no git, this checkout's revision if the sources are equal, otherwise their digest.
    """
    known = measured_on.get("revision") or run["revision"]
    if not known and run["sources"] == gpu_build.sources():
        known = machine.revision()
    return known or f"sources {run['sources']}"


def relabel(measured_on: dict[str, Any], run: dict[str, Any]) -> None:
    """Adds the revision to the description of the machine, and marks a rehearsal. Titles show both."""
    measured_on["revision"] = revision(measured_on, run)
    if run["rehearsal"] and not measured_on["cpu"].startswith(REHEARSAL):
        measured_on["cpu"] = f"{REHEARSAL}, {measured_on['cpu']}"


def relabel_file(file: Path, run: dict[str, Any]) -> None:
    if file.exists():
        content = json.loads(file.read_text())
        relabel(content["machine"], run)
        file.write_text(json.dumps(content, indent=1) + "\n")


def write_verdicts(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes the last verdict of each stage."""
    last = {v["stage"]: (run, v) for run in runs for v in run["verdicts"]}
    lines = [
        (
            stage,
            verdict["status"],
            f"{verdict['seconds']:.0f}",
            f"{verdict['cap']:.0f}",
            verdict["summary"].replace("|", "\\|"),
            f"{run['started']}, {run['revision'] or run['sources']}",
        )
        for stage, (run, verdict) in last.items()
    ]
    marked = "**A rehearsal: nothing here says anything of a GPU.**\n\n" if runs[0]["rehearsal"] else ""
    header = ("stage", "verdict", "seconds", "cap", "what it showed", "run")
    title = f"# gpu_check.py on {runs[0]['device']}\n\n{marked}"
    file.write_text(title + tables.table(header, lines, text_columns=2) + "\n")
