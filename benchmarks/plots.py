"""The results as bar charts: times faster than torch.nn, and distance to the floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import DTYPES, LAYOUTS, OPERATIONS, dtype_name
from matplotlib.axes import Axes
from measure import Result
from targets import LARGE, TARGETS, figure, speedup_target

SPEEDUPS = ("training_forward", "training_forward_backward", "eval_forward", "channel_moments")
FLOORS = ("training_forward", "training_backward", "eval_forward", "channel_moments")
SERIES = [(dtype_name(dtype), layout) for dtype in DTYPES for layout in LAYOUTS]
COLORS = dict(zip(SERIES, ("#1f5a99", "#9cc3e6", "#c2591b", "#f3b48b"), strict=True))
WIDTH = 0.2
TARGET_COLOR = "#2b8a3e"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def draw(machine: dict[str, Any], results: list[Result], folder: Path) -> list[Path]:
    """One figure of each kind per batch size."""
    paths = []
    grid = [r for r in results if r["operation"] != "small_call"]
    for batch in sorted({r["shape"][0] for r in grid}, reverse=True):
        of_batch = [r for r in grid if r["shape"][0] == batch]
        where = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, batch {batch}"
        for kind, operations, panel, title in (
            ("speedup", SPEEDUPS, _speedup_panel, "Times faster than torch.nn eager"),
            ("floor", FLOORS, _floor_panel, "Time over that of copying the bytes each must move (floor = 1)"),
        ):
            paths.append(folder / f"{kind}-n{batch}.png")
            _figure(paths[-1], f"{title}\n{where}", operations, panel, of_batch, machine["device"])
    return paths


def _figure(
    path: Path,
    title: str,
    operations: tuple[str, ...],
    panel: Callable[[Axes, str, list[Result], str], None],
    results: list[Result],
    device: str,
) -> None:
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
        for ax, operation in zip(axes.flat, operations, strict=True):
            ax.set_title(OPERATIONS[operation].title)
            panel(ax, operation, [r for r in results if r["operation"] == operation], device)
        fig.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[series]) for series in SERIES]
        labels = [" ".join(series) for series in SERIES]
        fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _speedup_panel(ax: Axes, operation: str, results: list[Result], device: str) -> None:
    _bars(ax, results, lambda r: figure(r, "speedup"))
    _line(ax, 1, "torch.nn", "#555555")
    if target := speedup_target(device, operation):
        _line(ax, target.bound, f"target for the geometric mean {target.bound:g}×", TARGET_COLOR)


def _floor_panel(ax: Axes, operation: str, results: list[Result], device: str) -> None:
    info = OPERATIONS[operation]
    _bars(ax, results, lambda r: figure(r, "resident"))
    if info.streaming != info.resident:
        # What is left of the distance where the tensor cannot stay on chip between statistics and apply.
        for position, result in _positions(results):
            ax.hlines(figure(result, "streaming"), position - WIDTH * 0.45, position + WIDTH * 0.45, "black", lw=1.2)
        ax.plot([], [], color="black", lw=1.2, label="distance when streaming")
        ax.legend(frameon=False, loc="upper left")
    _line(ax, 1, "floor", "#555555")
    bounds = {t.bound: t for t in TARGETS if (t.device, t.operation, t.figure) == (device, operation, "resident")}
    for bound, target in bounds.items():
        note = f", tensors ≥ {LARGE // 10**6} MB" if target.least_bytes else ""
        _line(ax, bound, f"target {bound:.3g}×{note}", TARGET_COLOR)


def _shapes(results: list[Result]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r["shape"][1], r["shape"][2]) for r in results))


def _positions(results: list[Result]) -> list[tuple[float, Result]]:
    shapes = _shapes(results)
    return [
        (
            shapes.index((r["shape"][1], r["shape"][2]))
            + (SERIES.index((r["dtype"], r["layout"])) - (len(SERIES) - 1) / 2) * WIDTH,
            r,
        )
        for r in results
    ]


def _bars(ax: Axes, results: list[Result], height: Callable[[Result], float]) -> None:
    for position, result in _positions(results):
        ax.bar(position, height(result), WIDTH * 0.92, color=COLORS[result["dtype"], result["layout"]])
    shapes = _shapes(results)
    ax.set_xticks(range(len(shapes)), [f"{channels}×{side}²" for channels, side in shapes])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(bottom=0)


def _line(ax: Axes, height: float, label: str, color: str) -> None:
    ax.axhline(height, color=color, lw=1, ls="--" if color == TARGET_COLOR else "-")
    ax.annotate(
        label,
        (1, height),
        (0, 2),
        ax.get_yaxis_transform(),
        "offset points",
        ha="right",
        va="bottom",
        color=color,
        fontsize=8,
    )
