"""The results as bar charts: times faster than torch, and distance to the floor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import DTYPES, LAYOUTS, OPERATIONS, dtype_name
from matplotlib.axes import Axes
from measure import Result
from targets import Figure, figure, find_target

SERIES = [(dtype_name(dtype), layout) for dtype in DTYPES for layout in LAYOUTS]
COLORS = dict(zip(SERIES, ("#1f5a99", "#9cc3e6", "#c2591b", "#f3b48b"), strict=True))
TARGET_COLOR = "#2b8a3e"
WIDTH = 0.2
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


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    operations: tuple[str, ...]
    bar: Figure
    tick: Figure | None = None


CHARTS = (
    Chart(
        "speedup",
        "Times faster than torch eager. Dashed: target for the geometric mean",
        (
            *("training_forward", "training_forward_backward"),
            *("relu_forward_backward", "add_relu_forward_backward"),
            *("eval_forward", "channel_moments"),
        ),
        "speedup",
    ),
    Chart(
        "floor",
        "Distance to the floor: time over that of 1R + 1W (backward 2R + 1W, moments 1R) at copy speed. Black ticks: "
        "over that of 2R + 1W (4R + 1W).\nDashed: target for the geometric mean, on the CPU of tensors ≥ 25 MB",
        ("training_forward", "training_backward", "eval_forward", "channel_moments"),
        "resident",
        "streaming",
    ),
)


def draw(machine: dict[str, Any], results: list[Result], folder: Path) -> None:
    """One file per chart and batch size."""
    grid = [r for r in results if r["operation"] != "small_call"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    for batch in {r["shape"][0] for r in grid}:
        for chart in CHARTS:
            title = f"{chart.title}\n{where}, batch {batch}"
            path = folder / f"{chart.name}-n{batch}.png"
            _draw(chart, title, [r for r in grid if r["shape"][0] == batch], machine["device"], path)


def _draw(chart: Chart, title: str, results: list[Result], device: str, path: Path) -> None:
    shapes = list(dict.fromkeys((r["shape"][1], r["shape"][2]) for r in results))
    with plt.rc_context(STYLE):
        rows = len(chart.operations) // 2
        fig, axes = plt.subplots(rows, 2, figsize=(12, 3.5 * rows), layout="constrained")
        for ax, operation in zip(axes.flat, chart.operations, strict=True):
            ax.set_title(OPERATIONS[operation].title)
            ax.set_xticks(range(len(shapes)), [f"{channels}×{side}²" for channels, side in shapes])
            ax.tick_params(axis="x", length=0, labelsize=8)
            ax.margins(x=0.01)
            for result in results:
                if result["operation"] == operation:
                    _draw_bar(ax, chart, result, shapes.index((result["shape"][1], result["shape"][2])))
            ax.axhline(1, color="#555555", lw=1)
            if target := find_target(device, operation, chart.bar):
                _draw_target(ax, target.bound)
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[series]) for series in SERIES]
        fig.legend(handles, [" ".join(s) for s in SERIES], loc="outside lower center", ncols=4, frameon=False)
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _draw_bar(ax: Axes, chart: Chart, result: Result, group: int) -> None:
    series = result["dtype"], result["layout"]
    x = group + (SERIES.index(series) - (len(SERIES) - 1) / 2) * WIDTH
    ax.bar(x, figure(result, chart.bar), WIDTH * 0.92, color=COLORS[series])
    if chart.tick is not None and figure(result, chart.tick) != figure(result, chart.bar):
        ax.hlines(figure(result, chart.tick), x - WIDTH * 0.46, x + WIDTH * 0.46, "black", lw=1.2)


def _draw_target(ax: Axes, bound: float) -> None:
    ax.axhline(bound, color=TARGET_COLOR, lw=1, ls="--")
    beside = (1, bound), (3, 0), ax.get_yaxis_transform(), "offset points"
    ax.annotate(f"{bound:.3g}×", *beside, va="center", color=TARGET_COLOR)
