"""The results as plots: speed compared with torch, time compared with a copy of the same bytes, and memory."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from cases import DTYPES, LAYOUTS, OPERATIONS, dtype_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Result
from plot_style import BLUE, NEUTRAL, ORANGE, STYLE, WIDTH, save
from targets import Figure as Value
from targets import figure

# One color and one marker per dtype. Markers of channels_last are hollow.
COLORS = dict(zip(map(dtype_name, DTYPES), (BLUE, ORANGE), strict=True))
MARKERS = dict(zip(map(dtype_name, DTYPES), ("o", "D"), strict=True))
SERIES = [(dtype_name(dtype), layout) for dtype in DTYPES for layout in LAYOUTS]
STEP = 0.19  # vertical distance between the series of a row
ROW = 0.27  # inches
COLUMNS = 2


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
        "Speed compared with eager torch: faster right of the line",
        "time of torch /\ntime of normfused",
        (
            *("training_forward", "training_forward_backward", "eval_forward"),
            *("relu_forward_backward", "add_relu_forward_backward", "channel_moments"),
        ),
        "speedup",
    ),
    Chart(
        "floor",
        "Time compared with a copy of the bytes that the operation has to move; the line is the copy's speed",
        "time of normfused /\ntime of the copy",
        ("training_forward", "training_backward", "eval_forward", "channel_moments"),
        "resident",
    ),
)


def draw(machine: dict[str, Any], results: list[Result], folder: Path) -> None:
    """Writes one file per chart and batch size."""
    grid = [r for r in results if r["operation"] != "small_call"]
    for batch in {r["shape"][0] for r in grid}:
        of_batch = [r for r in grid if r["shape"][0] == batch]
        for chart in CHARTS:
            title = f"{chart.title}\nmedians at batch {batch}; {_where(machine)}"
            _draw(chart, title, of_batch, folder / f"{chart.name}-n{batch}.svg")


def draw_norms(machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes norms.svg: a panel per operation, a row per norm and shape, a dot per dtype and layout."""
    shapes: dict[str, list[str]] = {}
    for row in rows:
        of_norm = shapes.setdefault(row["norm"], [])
        if _text(row["shape"]) not in of_norm:
            of_norm.append(_text(row["shape"]))
    labels = [
        label for norm, of_norm in shapes.items() for label in ((norm, ""), *((norm, shape) for shape in of_norm))
    ]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    layouts = dict(zip(dict.fromkeys(row["layout"] for row in rows), LAYOUTS, strict=False))
    with plt.rc_context(STYLE):
        fig, axes = _panels(operations, len(labels), CHARTS[0].axis)
        for row in rows:
            ax = axes.flat[operations.index(row["operation"])]
            place = labels.index((row["norm"], _text(row["shape"])))
            _draw_dot(ax, row["speedup"], row["dtype"], layouts[row["layout"]], place)
        _label(axes, [shape or norm for norm, shape in labels])
        for (_, shape), label in zip(labels, axes[0, 0].get_yticklabels(), strict=True):
            label.set_fontweight("normal" if shape else "bold")
        fig.legend(handles=_handles(), loc="outside lower center", ncols=COLUMNS)
        save(fig, f"{CHARTS[0].title}\nmedians; {_where(machine)}", folder / "norms.svg")


class Bars(NamedTuple):
    """Two sizes of one mode, in bytes."""

    title: str
    ours: bool
    saved: int
    peak: int


def draw_memory(machine: dict[str, Any], what: str, modes: Sequence[Bars], path: Path) -> None:
    """Draws the bytes saved for backward, filled, and the peak, hollow."""
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, 1.8 + 0.5 * len(modes)))
        for place, mode in enumerate(modes):
            color = BLUE if mode.ours else NEUTRAL
            for size, offset, face in ((mode.saved, -0.2, color), (mode.peak, 0.2, "none")):
                ax.barh(place + offset, size / 2**30, 0.34, facecolor=face, edgecolor=color)
                text = (size / 2**30, place + offset), (3, 0)
                ax.annotate(f"{size / 2**30:.2f}", *text, textcoords="offset points", va="center", fontsize=9)
        ax.set_yticks(range(len(modes)), [textwrap.fill(mode.title, 18) for mode in modes])
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.set_xlabel("GiB")
        kinds = (("saved for backward", NEUTRAL), ("peak of the step", "none"))
        handles = [Patch(facecolor=face, edgecolor=NEUTRAL, label=label) for label, face in kinds]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        save(fig, f"{what}\n{_where(machine)}", path)


def _text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _where(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_capability']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, {machine['date'][:10]}"


def _draw(chart: Chart, title: str, results: list[Result], path: Path) -> None:
    shapes = list(dict.fromkeys(tuple(r["shape"][1:]) for r in results))
    titles = [OPERATIONS[operation].title for operation in chart.operations]
    with plt.rc_context(STYLE):
        fig, axes = _panels(titles, len(shapes), chart.axis)
        for result in results:
            if result["operation"] in chart.operations:
                ax = axes.flat[chart.operations.index(result["operation"])]
                place = shapes.index(tuple(result["shape"][1:]))
                _draw_dot(ax, figure(result, chart.value), result["dtype"], result["layout"], place)
        _label(axes, [_text(shape) for shape in shapes])
        fig.legend(handles=_handles(), loc="outside lower center", ncols=COLUMNS)
        save(fig, title, path)


def _panels(titles: Sequence[str], labels: int, axis: str) -> tuple[Figure, Any]:
    """A figure with a panel of so many labels per title, and its array of axes."""
    rows = len(titles) // COLUMNS
    height = 2 + rows * (0.6 + ROW * labels)  # with the title, the axis and the legend
    fig, axes = plt.subplots(rows, COLUMNS, figsize=(WIDTH, height), sharex=True, sharey=True, squeeze=False)
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(textwrap.fill(title, 24))
        ax.axvline(1, color=NEUTRAL, lw=1.5)
    for ax in axes[-1]:
        ax.set_xlabel(axis)
    return fig, axes


def _draw_dot(ax: Axes, value: float, dtype: str, layout: str, row: int) -> None:
    y = row + (SERIES.index((dtype, layout)) - (len(SERIES) - 1) / 2) * STEP
    ax.plot(value, y, MARKERS[dtype], color=COLORS[dtype], **_face(layout), ms=4.5)


def _face(layout: str) -> dict[str, str]:
    return {} if layout == LAYOUTS[0] else {"mfc": "none"}


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker=MARKERS[dtype], color=COLORS[dtype], label=f"{dtype} {layout}", **_face(layout))
        for dtype, layout in SERIES
    ]


def _label(axes: Any, rows: list[str]) -> None:
    """Labels the rows, and the speeds on a logarithmic axis. All panels share both axes."""
    for ax in axes.flat:
        for row in range(0, len(rows), 2):
            ax.axhspan(row - 0.5, row + 0.5, color=NEUTRAL, alpha=0.1, lw=0)
    ax = axes[0, 0]
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
