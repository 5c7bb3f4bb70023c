"""The results of the demo: a table, a plot and a JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import normfused
from normfused.cli.demo.errors import DemoError
from normfused.cli.demo.experiments import COMPARED, IN_PLACE, OUR_GROUP_NORM, OURS, THEIR_GROUP_NORM, THEIRS
from normfused.cli.demo.training import Curve, Training
from normfused.data.files import replace

PLOT = "curves.png"
RESULTS = "results.json"

# The curves of both libraries coincide: one is drawn broad, the other dashed on top of it.
_STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#7fb3e6", "linewidth": 5},
    THEIRS: {"color": "#0b3c6f", "linewidth": 1.5, "linestyle": "--", "zorder": 3},
    OUR_GROUP_NORM: {"color": "#7fb3e6", "linewidth": 5},
    THEIR_GROUP_NORM: {"color": "#0b3c6f", "linewidth": 1.5, "linestyle": "--", "zorder": 3},
    IN_PLACE: {"color": "#3c9d6b", "linewidth": 2.5, "linestyle": ":", "zorder": 4},
    "no batch norm": {"color": "#d1692b", "linewidth": 2},
    "raw inputs": {"color": "#7a7a7a", "linewidth": 2},
}


@dataclass(frozen=True)
class Comparison:
    """normfused's layers compared with torch.nn's.

    The largest difference of the training accuracies of an epoch; the ratio of the times of the fastest epochs; the
    ratio of the bytes saved for backward. Ratios are torch.nn's value divided by normfused's.
    """

    largest_difference: float
    time_ratio: float
    saved_ratio: float
    norm: str = OURS

    def __str__(self) -> str:
        return (
            f"{self.norm}, normfused and torch.nn: training accuracies differ by at most "
            f"{self.largest_difference:.4f}; torch.nn takes {self.time_ratio:.2f} times as long "
            f"and saves {self.saved_ratio:.2f} times as many bytes for backward"
        )


def compare(curves: list[Curve]) -> Comparison | None:
    """The comparison; None if one of the two runs is missing."""
    by_name = {curve.run: curve for curve in curves}
    pair = next((pair for pair in COMPARED if by_name.keys() >= {*pair}), None)
    if pair is None:
        return None
    ours, theirs = (by_name[name] for name in pair)
    return Comparison(
        largest_difference=max(abs(a.accuracy - b.accuracy) for a, b in zip(ours.epochs, theirs.epochs, strict=True)),
        time_ratio=best_seconds(theirs) / best_seconds(ours),
        saved_ratio=theirs.saved_bytes / ours.saved_bytes,
        norm=pair[0],
    )


def best_seconds(curve: Curve) -> float:
    """Seconds of the fastest epoch, because warm-up and other load of the machine only add time."""
    return min(epoch.seconds for epoch in curve.epochs)


def row(curve: Curve) -> str:
    """A row of the table: the results of the last epoch, and the times."""
    last = curve.epochs[-1]
    return _align(
        curve.run,
        f"{last.accuracy:.4f}",
        "-" if curve.test_accuracy is None else f"{curve.test_accuracy:.4f}",
        f"{last.loss:.4f}",
        f"{best_seconds(curve):.2f}",
        f"{sum(epoch.seconds for epoch in curve.epochs):.1f}",
        f"{curve.saved_bytes / 1e6:.1f}",
    )


def _align(run: str, *figures: str) -> str:
    return f"{run:<21}" + "".join(f"{figure:>15}" for figure in figures)


HEADER = _align("run", "train accuracy", "test accuracy", "train loss", "best epoch, s", "total, s", "saved, MB")


class Report:
    """The files of an output folder, which is created if it does not exist.

    Raises:
        DemoError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder = folder
        self.training = training
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"cannot write to {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DemoError(f"cannot write to {folder}: no permission")

    def save(self, curves: list[Curve]) -> None:
        """Replace both files, each in one step: an interruption leaves the former file as it was."""
        results = json.dumps(self._results(curves), indent=2, default=str)
        replace(self.folder / RESULTS, results.encode() + b"\n")
        replace(self.folder / PLOT, self._plot(curves))

    def _results(self, curves: list[Curve]) -> dict[str, Any]:
        training, dataset = self.training, self.training.dataset
        comparison = compare(curves)
        return {
            "settings": {
                "experiment": training.experiment.name,
                "epochs": training.epochs,
                "seed": training.seed,
                "device": str(training.device),
                "threads": torch.get_num_threads(),
                "batch_size": training.batch_size,
                "steps_per_epoch": training.steps_per_epoch,
                "shuffle": training.shuffle,
                "optimizer": "Adam",
                "learning_rate": training.experiment.learning_rate,
            },
            "data": {
                "name": dataset.name,
                "source": dataset.source,
                "training_images": len(dataset.train),
                "test_images": len(dataset.test) if dataset.test else 0,
                "mean": training.standardization.mean.tolist(),
                "std": training.standardization.std.tolist(),
            },
            "versions": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "torch": torch.__version__,
                "normfused": normfused.info(),
            },
            "runs": [asdict(curve) for curve in curves],
            "comparison": asdict(comparison) if comparison else None,
        }

    def _plot(self, curves: list[Curve]) -> bytes:
        training = self.training
        figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
        figure.suptitle(
            f"{training.dataset.name}, {len(training.dataset.train):,} images: "
            f"{training.experiment.name.upper()}, "
            f"Adam {training.experiment.learning_rate:g}, batch size {training.batch_size}"
        )
        accuracy, loss = figure.subplots(1, 2)
        for curve in curves:
            numbers = range(1, len(curve.epochs) + 1)
            style = _STYLES[curve.run] | {"label": curve.run, "marker": "."}
            accuracy.plot(numbers, [epoch.accuracy for epoch in curve.epochs], **style)
            loss.plot(numbers, [epoch.loss for epoch in curve.epochs], **style)
        _label(accuracy, "training accuracy")
        _label(loss, "training loss (cross-entropy)")
        accuracy.legend(loc="lower right", handlelength=3)
        png = BytesIO()
        figure.savefig(png, format="png")
        return png.getvalue()


def _label(axes: Axes, quantity: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
