"""The style of all plots: SVG without a background, whose text and marks read on white and on dark pages.

A plot is six inches wide, the width of a column of text. A phone shows it at two thirds of that size.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

NEUTRAL = "#7a7a7a"  # text and axes: equal contrast, 4.3, to white and to the darkest background, #131416
BLUE = "#2f7fc8"
ORANGE = "#cc6a22"
WIDTH = 6.0  # inches
LINE = 64  # characters of the title in a line
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": NEUTRAL,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.labelcolor": NEUTRAL,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "grid.alpha": 0.35,
    "grid.color": NEUTRAL,
    "legend.frameon": False,
    "svg.hashsalt": "normfused",  # the same file for the same results
    "text.color": NEUTRAL,
    "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL,
    "ytick.major.size": 0,
}


def save(fig: Figure, title: str, path: Path) -> None:
    """Writes the figure below its title, whose lines are wrapped, and closes it."""
    lines = [textwrap.fill(line, LINE) for line in title.splitlines()]
    fig.suptitle("\n".join(lines), x=0.01, ha="left", fontsize="medium")
    fig.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(fig)
