"""The results as dot plots: speed compared with torch, and time compared with a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import DTYPES, LAYOUTS, OPERATIONS, dtype_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Result
from targets import Figure as Value
from targets import figure

# One color per dtype and one marker per layout.
COLORS = dict(zip(map(dtype_name, DTYPES), ("#1f5a99", "#c2591b"), strict=True))
MARKERS = dict(zip(LAYOUTS, ("o", "D"), strict=True))
SERIES = [(dtype_name(dtype), layout) for dtype in DTYPES for layout in LAYOUTS]
STEP = 0.19  # vertical distance between the series of a row
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
}


@dataclass(frozen=True)
class Chart:
    """One file of plots: a panel per operation, a row per shape, a dot per dtype and layout."""

    name: str
    title: str
    axis: str
    operations: tuple[str, ...]
    value: Value


CHARTS = (
    Chart(
        "speedup",
        "Speed compared with eager torch; right of the line normfused is faster",
        "time of torch / time of normfused",
        (
            *("training_forward", "training_forward_backward", "eval_forward"),
            *("relu_forward_backward", "add_relu_forward_backward", "channel_moments"),
        ),
        "speedup",
    ),
    Chart(
        "floor",
        "Time compared with a copy of as many bytes as the operation has to move; the line is the copy's speed",
        "time of normfused / time of the copy",
        ("training_forward", "training_backward", "eval_forward", "channel_moments"),
        "resident",
    ),
)


def draw(machine: dict[str, Any], results: list[Result], folder: Path) -> None:
    """Writes one file per chart and batch size."""
    grid = [r for r in results if r["operation"] != "small_call"]
    where = _where(machine)
    for batch in {r["shape"][0] for r in grid}:
        of_batch = [r for r in grid if r["shape"][0] == batch]
        for chart in CHARTS:
            title = f"{chart.title}\nmedians at batch {batch}; {where}"
            _draw(chart, title, of_batch, folder / f"{chart.name}-n{batch}.png")


def draw_norms(machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes norms.png: a panel per operation, a row per norm and shape, a dot per dtype and layout."""
    cases = list(dict.fromkeys((row["norm"], tuple(row["shape"])) for row in rows))
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    layouts = dict(zip(dict.fromkeys(row["layout"] for row in rows), LAYOUTS, strict=False))
    title = f"{CHARTS[0].title}\nmedians; {_where(machine)}"
    with plt.rc_context(STYLE):
        fig, axes = _panels(operations, len(operations), 1.2 + 0.26 * len(cases), CHARTS[0].axis)
        for row in rows:
            place = cases.index((row["norm"], tuple(row["shape"])))
            ax = axes.flat[operations.index(row["operation"])]
            _draw_dot(ax, row["speedup"], row["dtype"], layouts[row["layout"]], place)
        _label(axes[0, 0], [f"{norm}, {'×'.join(map(str, shape))}" for norm, shape in cases])
        _save(fig, title, folder / "norms.png")


def _where(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_capability']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, {machine['date'][:10]}"


def _draw(chart: Chart, title: str, results: list[Result], path: Path) -> None:
    shapes = list(dict.fromkeys((r["shape"][1], r["shape"][2]) for r in results))
    columns = 3 if len(chart.operations) > 4 else 4
    rows = len(chart.operations) // columns
    with plt.rc_context(STYLE):
        titles = [OPERATIONS[operation].title for operation in chart.operations]
        fig, axes = _panels(titles, columns, 0.9 + rows * (0.8 + 0.3 * len(shapes)), chart.axis)
        for result in results:
            if result["operation"] in chart.operations:
                ax = axes.flat[chart.operations.index(result["operation"])]
                place = shapes.index((result["shape"][1], result["shape"][2]))
                _draw_dot(ax, figure(result, chart.value), result["dtype"], result["layout"], place)
        _label(axes[0, 0], [f"{channels}×{side}×{side}" for channels, side in shapes])
        for ax in axes[:, 0]:
            ax.set_ylabel("channels × height × width")
        _save(fig, title, path)


def _panels(titles: Sequence[str], columns: int, height: float, axis: str) -> tuple[Figure, Any]:
    """A figure with a panel per title, and its array of axes."""
    rows = len(titles) // columns
    fig, axes = plt.subplots(
        rows, columns, figsize=(12, height), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title, loc="left")
        ax.axvline(1, color="#333333", lw=1)
        ax.tick_params(axis="y", length=0)
    for ax in axes[-1]:
        ax.set_xlabel(axis)
    return fig, axes


def _save(fig: Figure, title: str, path: Path) -> None:
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    fig.legend(handles=_handles(), loc="outside lower center", ncols=len(SERIES), frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _draw_dot(ax: Axes, value: float, dtype: str, layout: str, row: int) -> None:
    y = row + (SERIES.index((dtype, layout)) - (len(SERIES) - 1) / 2) * STEP
    ax.plot(value, y, MARKERS[layout], color=COLORS[dtype], **_face(layout), ms=4.5)


def _face(layout: str) -> dict[str, str]:
    """Hollow markers for channels_last, so that layouts differ without color too."""
    return {} if layout == LAYOUTS[0] else {"mfc": "white"}


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker=MARKERS[layout], color=COLORS[dtype], label=f"{dtype} {layout}", **_face(layout))
        for dtype, layout in SERIES
    ]


def _label(ax: Axes, rows: list[str]) -> None:
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
