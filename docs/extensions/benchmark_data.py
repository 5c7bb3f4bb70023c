"""The cells of the benchmarks: one operation, shape, dtype and layout on one machine, from the committed JSON files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cases  # noqa: E402
import conversion  # noqa: E402
import norms  # noqa: E402

RESULTS = BENCHMARKS / "results"
LAYOUTS = {"NCHW": "channels first", "channels_last": "channels last"}
Quartiles = dict[str, float]  # "median", and with some benchmarks "q1" and "q3"
Key = tuple[str, tuple[int, ...], str, str]


@dataclass(frozen=True)
class Cell:
    operation: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    seconds: Quartiles = field(default_factory=dict)  # of normfused, if they were recorded
    ratios: dict[str, Quartiles] = field(default_factory=dict)  # by peer: its time / time of normfused
    copies: dict[str, Quartiles] = field(default_factory=dict)  # by bytes: time of normfused / time of copying them

    @property
    def key(self) -> Key:
        return self.operation, self.shape, self.dtype, self.layout

    def smallest_ratio(self) -> float:
        return min((ratio["median"] for ratio in self.ratios.values()), default=float("inf"))


@dataclass(frozen=True)
class Run:
    """A committed JSON file."""

    file: Path
    folder: Path  # relative to the results: the machine, and where there are several runs of it, which one
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell]
    failed: int  # cells that are wrong or were not measured

    @property
    def device(self) -> str:
        """A short name, such as Intel Xeon for Intel(R) Xeon(R) Processor, and which run of it."""
        name = self.machine.get("gpu") or re.sub(r"\((R|TM)\)| Processor| CPU", "", self.machine["cpu"])
        return ", ".join((name, *self.folder.parts[1:]))

    @property
    def date(self) -> str:
        return str(self.machine["date"])[:10]


def _grid(rows: Sequence[Any]) -> Iterator[Cell]:
    for row in rows:
        operation = cases.OPERATIONS[row["operation"]]
        names = {
            "resident": "{}R + {}W".format(*operation.resident),
            "streaming": "{}R + {}W".format(*operation.streaming),
            "planned": "planned bytes",
        }
        yield Cell(
            operation.title,
            tuple(row["shape"]),
            row["dtype"],
            LAYOUTS[row["layout"]],
            row["seconds"]["normfused"],
            {peer: ratio for peer, ratio in row["speedup"].items() if peer not in ("copy", "clone")},
            {names[traffic]: distance for traffic, distance in row["floor_distance"].items()},
        )


def _norms(rows: Sequence[Any]) -> Iterator[Cell]:
    for row in rows:
        floor = norms.floor(norms.NORMS[row["norm"]], row["operation"])
        yield Cell(
            f"{row['norm']}, {row['operation']}",
            tuple(row["shape"]),
            row["dtype"],
            row["layout"],
            ratios={"torch": {"median": row["speedup"]}},
            copies={f"{floor:g} times the tensor": {"median": row["copies"] / floor}},
        )


def _activations(rows: Sequence[Any]) -> Iterator[Cell]:
    for row in rows:
        operation = f"BN + {row['activation']} training, forward + backward"
        ratios = {"torch": {"median": row["speedup"]}}
        yield Cell(operation, tuple(row["shape"]), row["dtype"], LAYOUTS[row["layout"]], ratios=ratios)


def _conversion(rows: Sequence[Any]) -> Iterator[Cell]:
    shapes = {(name, shape[0]): shape for name, _, shape in conversion.CASES}
    for row in rows:
        yield Cell(
            f"converted {row['model']}, {row['mode']}",
            shapes[row["model"], row["batch"]],
            "float32",
            LAYOUTS["NCHW"],
            {"median": row["seconds"]["converted"]},
            {"torch": {"median": 1 / row["to_torch"]}},
        )


READERS: dict[str, Callable[[Sequence[Any]], Iterator[Cell]]] = {
    "results": _grid,
    "norms": _norms,
    "activations": _activations,
    "conversion": _conversion,
}
ELSEWHERE = ("images", "memory", "public", "sync")  # not measured by operation, shape, dtype and layout


def read(folder: Path = RESULTS) -> list[Run]:
    """The runs of all committed files of cells."""
    runs = []
    for file in sorted(folder.glob("*/**/*.json")):
        if file.relative_to(folder).parts[0].endswith("-partial") or file.stem in ELSEWHERE:
            continue
        if file.stem not in READERS:
            raise ValueError(f"{file}: no reader for this file; known are {', '.join((*READERS, *ELSEWHERE))}")
        content = json.loads(file.read_text())
        cells = list(READERS[file.stem](content[file.stem]))
        failed = len(content.get("failures", ()))
        relative = file.parent.relative_to(folder)
        runs.append(Run(file, relative, content["machine"], content.get("settings", {}), cells, failed))
    if not runs:
        raise ValueError(f"{folder} holds no results")
    return runs


def not_run_on_cuda(runs: Sequence[Run]) -> list[Cell]:
    """The cells planned for a GPU that no GPU has run: the grid of batch norm, and the other norms and activations."""
    planned = [
        Cell(cases.OPERATIONS[case.operation].title, case.shape, cases.dtype_name(case.dtype), LAYOUTS[case.layout])
        for case in cases.grid("cuda")
    ]
    for run in runs:
        if run.file.stem in ("norms", "activations"):
            planned += [Cell(*cell.key) for cell in run.cells]
    done = {cell.key for run in runs if run.machine["device"] == "cuda" for cell in run.cells}
    return list({cell.key: cell for cell in planned if cell.key not in done}.values())
