"""Nine images of different sizes, and their statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfused import ChannelStats
from normfused.data.records import Sums


def random_images(sizes: list[tuple[int, ...]], channels: int = 3, seed: int = 0) -> list[np.ndarray]:
    """HWC images of uint8 whose channels and images differ in brightness and contrast."""
    random = np.random.default_rng(seed)
    images = []
    for size in sizes:
        values = random.normal(random.uniform(40, 200, channels), random.uniform(5, 60, channels), (*size, channels))
        images.append(values.clip(0, 255).astype(np.uint8))
    return images


SIZES = [(11, 7), (5, 5), (1, 30), (17, 4), (8, 8), (3, 2), (20, 20), (9, 1), (6, 13)]
IMAGES = random_images(SIZES)
PIXELS = np.concatenate([image.reshape(-1, 3) for image in IMAGES])  # (values, channels)


def exact_sums(pixels: np.ndarray) -> tuple[Sums, ...]:
    columns = [[int(v) for v in column] for column in pixels.T]
    return tuple(Sums(len(c), sum(c), sum(v * v for v in c), min(c), max(c)) for c in columns)


def assert_close(got: Tensor, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


def assert_is_of_all_pixels(stats: ChannelStats) -> None:
    scaled = PIXELS / 255.0
    assert stats.sums == exact_sums(PIXELS)
    assert (stats.channels, stats.images, stats.complete) == (3, len(IMAGES), True)
    assert stats.count.tolist() == [len(PIXELS)] * 3
    assert stats.count.dtype == stats.nonfinite.dtype == torch.int64
    assert_close(stats.mean, scaled.mean(0))
    assert_close(stats.var, scaled.var(0))
    assert_close(stats.m2 / (stats.count - 1), scaled.var(0, ddof=1))
    assert_close(stats.std, scaled.std(0))
    assert_close((stats.m2 / (stats.count - 1)).sqrt(), scaled.std(0, ddof=1))
    assert_close(stats.min, scaled.min(0))
    assert_close(stats.max, scaled.max(0))


HWC = IMAGES[0]
CHW = torch.from_numpy(HWC).permute(2, 0, 1)


BOOLS = "images must be of uint8, int8, int16, uint16, int32, int64, float16, bfloat16, float32 or float64, got "
OTHER_CHANNELS = "channels: got 1, but the images before have 3"
