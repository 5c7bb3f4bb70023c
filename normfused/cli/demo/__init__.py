"""The command ``normfused demo``: a small network is trained with and without batch norm."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from normfused.cli import INTERRUPTED
from normfused.cli.demo.data import find_dataset
from normfused.cli.demo.dataset import Standardization
from normfused.cli.demo.errors import DemoError
from normfused.cli.demo.experiments import EXPERIMENTS
from normfused.cli.demo.report import HEADER, PLOT, RESULTS, Report, compare, row
from normfused.cli.demo.training import Curve, Training, train

__all__ = ["DemoError", "Settings", "run_demo"]


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    ``data`` None: search the default folders. ``limit`` None: all training images. ``shuffle``: shuffle the images in
    each epoch; otherwise they are used in stored order.
    """

    experiment: str
    data: Path | None
    limit: int | None
    shuffle: bool
    epochs: int
    seed: int
    device: str
    out: Path


def run_demo(settings: Settings) -> int:
    """Train all runs of an experiment, print a table row after each, and return the exit code.

    Files are written after each run, so that completed runs survive an interruption.

    Raises:
        CommandError, OSError: data, device or output folder cannot be used; the message is one line.
    """
    training = _prepare(settings)
    report = Report(settings.out, training)
    print(f"{training}\n\n{HEADER}", flush=True)
    curves: list[Curve] = []
    try:
        for run in training.experiment.runs:
            curve = train(run, training)
            report.save([*curves, curve])
            curves.append(curve)
            print(row(curve), flush=True)
    except KeyboardInterrupt:
        count = f"{len(curves)} of {len(training.experiment.runs)} runs"
        print(f"\ninterrupted: {count} are complete and saved in {settings.out}", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{compare(curves)}\n{settings.out / PLOT}, {settings.out / RESULTS}")
    return 0


def _prepare(settings: Settings) -> Training:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("device cuda: torch finds no CUDA device")
    experiment = EXPERIMENTS[settings.experiment]
    dataset = find_dataset(settings.data).limited(settings.limit)
    return Training(
        experiment=experiment,
        dataset=dataset,
        standardization=Standardization.of(dataset),
        epochs=settings.epochs,
        seed=settings.seed,
        device=torch.device(settings.device),
        batch_size=experiment.batch_size(len(dataset.train)),
        shuffle=settings.shuffle,
    )
