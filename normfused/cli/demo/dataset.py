"""The data of the demo in memory, and its normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import normfused
from normfused.cli.demo.errors import DemoError

CLASSES = 10
SMALLEST_SIDE = 4  # smaller images are empty after the second pooling of the network


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) of uint8 and their labels (N,) of int64 in 0..9."""

    images: Tensor
    labels: Tensor

    @classmethod
    def checked(cls, images: Tensor, labels: Tensor, path: Path) -> Split:
        """A split of checked images and labels. Labels may have any integer dtype.

        Raises:
            DemoError: different numbers of images and labels, labels out of range, or images that are too small; the
                message names ``path``.
        """
        if labels.shape != images.shape[:1]:
            raise DemoError(f"{path}: {len(labels)} labels for {len(images)} images")
        lowest, highest = int(labels.min()), int(labels.max())
        if not 0 <= lowest <= highest < CLASSES:
            raise DemoError(f"{path}: labels are {lowest} to {highest}, not 0 to {CLASSES - 1}")
        height, width = images.shape[2:]
        if min(height, width) < SMALLEST_SIDE:
            raise DemoError(
                f"{path}: images of {height}x{width} pixels, but the networks need at least "
                f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
            )
        return cls(images, labels.long())

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        """The first ``count`` images."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A training split, an optional test split, and the value of a white pixel."""

    name: str
    source: str
    train: Split
    test: Split | None
    white: int = 255

    def limited(self, images: int | None) -> Dataset:
        """The data set with the first ``images`` training images only; ``source`` records the limit.

        The data set itself if it has no more images, or if ``images`` is None.
        """
        if images is None or images >= len(self.train):
            return self
        source = f"{self.source}, first {images} of {len(self.train)} training images"
        return replace(self, source=source, train=self.train.first(images))


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of each channel, shape (C,), float64, for pixels scaled to 0..1."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, dataset: Dataset) -> Standardization:
        """The statistics of all pixels of the training split, with the biased variance.

        Raises:
            DemoError: the standard deviation of a channel is 0.
        """
        stats = normfused.ChannelStats(scale=1 / dataset.white).update(dataset.train.images)
        if not stats.std.all():
            raise DemoError(f"{dataset.source}: all pixels of a channel have the same value")
        return cls(stats.mean, stats.std)

    def apply(self, images: Tensor, white: int) -> Tensor:
        """Normalized float32 images from uint8 images of shape (N, C, H, W)."""
        return normfused.normalize(images, self.mean, self.std, scale=1 / white)
