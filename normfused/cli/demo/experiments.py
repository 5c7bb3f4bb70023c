"""The networks of the demo, and the runs of each with and without batch norm.

The CNN and its settings are those of deeplizard's PyTorch course
(https://deeplizard.com/learn/video/bCQ2cNhUWQ8), whose figures come from images in stored order:
shuffled, training ends almost 0.01 higher. Batch norm: Ioffe, Szegedy, "Batch Normalization:
Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015,
https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

import normfused
from normfused.cli.demo.dataset import CLASSES
from normfused.cli.demo.errors import DemoError
from normfused.cli.demo.resnet import Norm, ResNet, group_norm

OURS = "batch norm"
THEIRS = "batch norm (torch.nn)"
IN_PLACE = "batch norm, in place"
OUR_GROUP_NORM = "group norm"
THEIR_GROUP_NORM = "group norm (torch.nn)"
COMPARED = ((OURS, THEIRS), (OUR_GROUP_NORM, THEIR_GROUP_NORM))

STEPS_PER_EPOCH = 15  # minimum; smaller data sets use smaller batches


class NormLayers(Protocol):
    """The module that batch norm layers come from: ``normfused`` or ``torch.nn``."""

    @property
    def BatchNorm1d(self) -> Callable[[int], nn.Module]:  # noqa: N802
        """For (N, C) inputs."""

    @property
    def BatchNorm2d(self) -> Callable[[int], nn.Module]:  # noqa: N802
        """For (N, C, H, W) inputs."""


@dataclass(frozen=True)
class Run:
    """One training of the network; without batch norm if ``layers`` is None."""

    name: str
    layers: NormLayers | None
    standardized: bool = True
    inplace: bool = False


@dataclass(frozen=True)
class Experiment:
    """A network, trained with Adam in several runs."""

    name: str
    network: Callable[[torch.Size, Run], nn.Module]
    learning_rate: float
    largest_batch: int
    runs: tuple[Run, ...]

    def batch_size(self, images: int) -> int:
        """The batch size for that number of training images.

        Raises:
            DemoError: too few images for batches of two.
        """
        size = min(self.largest_batch, images // STEPS_PER_EPOCH)
        if size < 2:
            raise DemoError(f"{images} training images are too few: at least {2 * STEPS_PER_EPOCH} are needed")
        return size


def cnn(image: torch.Size, layers: NormLayers | None) -> nn.Sequential:
    """Two convolutions and three linear layers, for images of shape (C, H, W).

    For 28 x 28 pixels the first linear layer has 12 x 4 x 4 = 192 inputs. Images below 16 pixels would become empty, so
    their convolutions are 3 x 3 and padded.
    """
    channels, *sides = image
    kernel, padding = (5, 0) if min(sides) >= 16 else (3, 1)
    margin = kernel - 1 - 2 * padding
    height, width = (((side - margin) // 2 - margin) // 2 for side in sides)
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *([layers.BatchNorm2d(6)] if layers else []),
        nn.Conv2d(6, 12, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * height * width, 120),
        nn.ReLU(),
        *([layers.BatchNorm1d(120)] if layers else []),
        nn.Linear(120, 60),
        nn.ReLU(),
        nn.Linear(60, CLASSES),
    )


def mlp(image: torch.Size, layers: NormLayers | None) -> nn.Sequential:
    """Three linear layers, batch norm before each ReLU, for images of shape (C, H, W)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(image.numel(), 64),
        *([layers.BatchNorm1d(64)] if layers else []),
        nn.ReLU(),
        nn.Linear(64, 32),
        *([layers.BatchNorm1d(32)] if layers else []),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def resnet(image: torch.Size, run: Run, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """A residual network of torch.nn's layers, converted if the run uses normfused."""
    network = ResNet(image[0], CLASSES, norm)
    return normfused.convert(network, inplace=run.inplace) if run.layers is normfused else network


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="cnn",
            network=lambda image, run: cnn(image, run.layers),
            learning_rate=0.01,
            largest_batch=1000,
            runs=(
                Run(OURS, normfused),
                Run("no batch norm", None),
                Run("raw inputs", None, standardized=False),
                Run(THEIRS, nn),
            ),
        ),
        Experiment(
            name="mlp",
            network=lambda image, run: mlp(image, run.layers),
            learning_rate=1e-4,
            largest_batch=10,
            runs=(Run(OURS, normfused), Run("no batch norm", None), Run(THEIRS, nn)),
        ),
        Experiment(
            name="resnet",
            network=resnet,
            learning_rate=1e-3,
            largest_batch=200,
            runs=(Run(OURS, normfused), Run(IN_PLACE, normfused, inplace=True), Run(THEIRS, nn)),
        ),
        Experiment(
            name="groupnorm",
            network=lambda image, run: resnet(image, run, group_norm),
            learning_rate=1e-3,
            largest_batch=200,
            runs=(Run(OUR_GROUP_NORM, normfused), Run(THEIR_GROUP_NORM, nn)),
        ),
    )
}
