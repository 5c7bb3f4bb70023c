"""Image transforms in the style of torchvision's, which they compose with and do not need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfused.data.images import as_array, as_nchw
from normfused.data.normalization import ImageConstants, check_image
from normfused.data.stats import ChannelStats, measure

__all__ = [
    "CIFAR10",
    "FASHION_MNIST",
    "IMAGENET",
    "Denormalize",
    "MinMaxNormalize",
    "Normalize",
    "Preset",
    "Standardize",
    "ToNormalizedTensor",
]

Numbers = float | Sequence[float] | Tensor


class Preset(NamedTuple):
    """Constants of a data set, for values in 0..1: ``Normalize(*IMAGENET)``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# As torchvision's pretrained models expect them: from a random subset of the training images, resized and cropped. The
# std is the mean of single images' standard deviations, smaller than that of all pixels:
# https://github.com/pytorch/vision/pull/1965.
IMAGENET = Preset((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Of all pixels of the 50,000 training images. The std of (0.2023, 0.1994, 0.2010), often seen, is single images' mean.
CIFAR10 = Preset((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
# Of all pixels of the 60,000 training images: normfused stats train-images-idx3-ubyte.gz.
FASHION_MNIST = Preset((0.2860,), (0.3530,))


class Normalize(nn.Module):
    """``(x * scale - mean) / std`` for each channel: torchvision's ``Normalize``, which takes bytes too.

    One pass over memory, and one launch on CUDA, where the constants travel with the launch.

    Args:
        mean, std: a number for all channels, or one for each, of values times ``scale``.
        inplace: write over floating input, and return that.
        scale: default 1/255 for uint8 input, 1 for floating.
        eps: the least divisor: a ``std`` below it counts as ``eps``.
        dtype: of the output; default the input's, float32 for uint8.
        memory_format: of the output; default the input's.

    Raises:
        ValueError: a ``std`` that is not above 0 where ``eps`` is 0; constants that are not finite, or do not fit each
        other. What a call raises: :func:`normfused.functional.normalize`.

    Source: https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.Normalize.html
    """

    def __init__(
        self,
        mean: Numbers,
        std: Numbers,
        inplace: bool = False,
        *,
        scale: float | None = None,
        eps: float = 0.0,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        self.constants = ImageConstants(type(self).__name__, mean, std, scale, eps)
        self.inplace = inplace
        self.dtype = dtype
        self.memory_format = memory_format
        if inplace and (dtype is not None or memory_format != torch.preserve_format):
            raise ValueError(f"{type(self).__name__}: inplace=True leaves dtype and memory_format as they are")

    def forward(self, image: Tensor) -> Tensor:
        """Of shape ``(..., C, H, W)``, uint8 or floating, on any device."""
        if self.inplace:
            return self.constants.normalize_(image)
        return self.constants.normalize(image, self.dtype, self.memory_format)

    def extra_repr(self) -> str:  # noqa: D102
        return f"mean={self.constants.mean}, std={self.constants.std}"


class ToNormalizedTensor(Normalize):
    """``ToTensor`` and ``Normalize`` in one pass: a PIL image, an array or a tensor to a normalized tensor.

    Args:
        mean, std, scale, eps: as for :class:`Normalize`.
        dtype: of the output.
        memory_format: of the output: ``torch.contiguous_format``, or ``torch.channels_last``.
    """

    def __init__(
        self,
        mean: Numbers,
        std: Numbers,
        *,
        scale: float | None = None,
        eps: float = 0.0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(mean, std, scale=scale, eps=eps, dtype=dtype, memory_format=memory_format)

    def forward(self, image: Any) -> Tensor:
        """Of a PIL image, an array ``(H, W)``, ``(H, W, C)`` or ``(N, H, W, C)``, or a tensor ``(..., C, H, W)``.

        uint8 or floating; never written. Returns a new tensor of shape ``(..., C, H, W)``.
        """
        return super().forward(_as_tensor(image))


class Denormalize(nn.Module):
    """Undoes :class:`Normalize`: ``x * std + mean``, in 0..1 where that came from bytes.

    Args:
        mean, std: as they were given to ``Normalize``.
        dtype: of the output, default the input's; ``torch.uint8`` gives ``x * 255``, rounded and kept within 0..255.
    """

    def __init__(self, mean: Numbers, std: Numbers, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name, white = type(self).__name__, 255 if dtype == torch.uint8 else 1
        given = ImageConstants(name, mean, std)
        channels = max(len(given.mean), len(given.std))
        means, stds = (values * (channels // len(values)) for values in (given.mean, given.std))
        # x * std + mean is (x - (-mean / std)) / (1 / std).
        shift = [-m / s for m, s in zip(means, stds, strict=True)]
        self.constants = ImageConstants(name, shift, [1 / (s * white) for s in stds], 1.0)
        self.mean, self.std, self.dtype = given.mean, given.std, dtype

    def forward(self, image: Tensor) -> Tensor:
        """Of shape ``(..., C, H, W)``, floating."""
        if self.dtype != torch.uint8:
            return self.constants.normalize(image, self.dtype)
        white = self.constants.normalize(image, torch.promote_types(image.dtype, torch.float32))
        return white.round_().clamp_(0, 255).to(torch.uint8)

    def extra_repr(self) -> str:  # noqa: D102
        return f"mean={self.mean}, std={self.std}"


class _ByOwnStatistics(nn.Module):
    """Normalizes images by what they are themselves."""

    def __init__(self, over: str, per_channel: bool, eps: float, dtype: torch.dtype | None) -> None:
        super().__init__()
        name = type(self).__name__
        if over not in ("image", "batch"):
            raise ValueError(f"{name}: over must be 'image' or 'batch', got {over!r}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"{name}: eps must be a non-negative finite number, got {eps}")
        self.over, self.per_channel, self.eps, self.dtype = over, per_channel, eps, dtype

    def _mean_and_std(self, stats: ChannelStats) -> tuple[Tensor, Tensor]:
        """What is taken off, and what the rest is divided by, shape (C,)."""
        raise NotImplementedError

    def forward(self, image: Any) -> Tensor:
        x = _as_tensor(image)
        name = type(self).__name__
        check_image(name, x)
        *batch, channels, height, width = x.shape
        images = math.prod(batch)
        # Values that share their statistics become a channel.
        if self.over == "image":
            grouped = x.reshape((1, images * channels, height, width) if self.per_channel else (1, images, -1, width))
        else:
            grouped = x.reshape((images, channels, height, width) if self.per_channel else (1, 1, -1, width))
        mean, std = self._mean_and_std(measure(grouped, "NCHW", None))
        output = ImageConstants(name, mean, std).normalize(grouped, self.dtype)
        return output.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"over={self.over!r}, per_channel={self.per_channel}"


class Standardize(_ByOwnStatistics):
    """The z-score of images by their own mean and standard deviation, which are constants to autograd.

    Args:
        over: ``"image"``: each image by its own statistics; ``"batch"``: all images together.
        per_channel: each channel by its own statistics, or all channels together.
        correction: what is taken off the count in the variance: 0 or 1.
        eps: deviations up to it, of bytes in 0..1, are not divided by: what is constant becomes 0.
        dtype: of the output; default the input's, float32 for uint8.

    NaN and infinities are left out of the statistics. Called as :meth:`ToNormalizedTensor.forward`.
    """

    def __init__(
        self,
        over: str = "image",
        per_channel: bool = True,
        *,
        correction: int = 0,
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(over, per_channel, eps, dtype)
        if correction not in (0, 1):
            raise ValueError(f"Standardize: correction must be 0 or 1, got {correction!r}")
        self.correction = correction

    def _mean_and_std(self, stats: ChannelStats) -> tuple[Tensor, Tensor]:
        std = (stats.m2 / (stats.count - self.correction)).sqrt()
        return stats.mean, torch.where(std > self.eps, std, 1.0)


class MinMaxNormalize(_ByOwnStatistics):
    """Images stretched from their own least and greatest value to a range; both are constants to autograd.

    Args:
        range: what the least and the greatest value become.
        over, per_channel, dtype: as for :class:`Standardize`.
        eps: extents up to it, of bytes in 0..1, are not stretched: what is constant becomes the range's first end.
    """

    def __init__(
        self,
        range: tuple[float, float] = (0.0, 1.0),
        over: str = "image",
        per_channel: bool = False,
        *,
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(over, per_channel, eps, dtype)
        low, high = range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"MinMaxNormalize: range must be two finite numbers, the lesser first, got {range}")
        self.range = low, high

    def _mean_and_std(self, stats: ChannelStats) -> tuple[Tensor, Tensor]:
        low, high = self.range
        extent = stats.max - stats.min
        std = torch.where(extent > self.eps, extent / (high - low), 1.0)
        return stats.min - low * std, std

    def forward(self, image: Any) -> Tensor:
        """As :meth:`ToNormalizedTensor.forward`."""
        # Rounding may lead an ulp out of the range.
        return super().forward(image).clamp_(*self.range)

    def extra_repr(self) -> str:  # noqa: D102
        return f"range={self.range}, {super().extra_repr()}"


def _as_tensor(image: Any) -> Tensor:
    """A tensor as it is; of anything else a view of shape (..., C, H, W)."""
    if isinstance(image, Tensor):
        return image
    array = as_array(image)
    images = as_nchw(array, None)
    return images if array.ndim == 4 else images.squeeze(0)
