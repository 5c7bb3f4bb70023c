"""Image transforms in the style of torchvision. They compose with torchvision's and do not require it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normfused._torch_private import flatten_tree, unflatten_tree
from normfused.data.images import FEW_CHANNELS, as_array, as_nchw
from normfused.data.normalization import ImageConstants, as_numbers, check_image
from normfused.data.stats import ChannelStats, measure

__all__ = [
    "CIFAR10",
    "FASHION_MNIST",
    "IMAGENET",
    "Denormalize",
    "MinMaxNormalize",
    "Normalize",
    "Preset",
    "QuantileNormalize",
    "Standardize",
    "ToNormalizedTensor",
]

Numbers = float | Sequence[float] | Tensor


class Preset(NamedTuple):
    """Mean and standard deviation of a data set per channel, for values in 0..1.

    Example:
        >>> from normfused.transforms import IMAGENET, Normalize
        >>> Normalize(*IMAGENET)
        Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


#: The values that torchvision's pretrained models expect, from a random subset of the training images, resized and
#: cropped. The std is the mean of the standard deviations of single images, which is smaller than that of all pixels:
#: https://github.com/pytorch/vision/pull/1965.
IMAGENET = Preset((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: All pixels of the 50,000 training images. The std (0.2023, 0.1994, 0.2010) that is often used is the mean of the
#: standard deviations of single images.
CIFAR10 = Preset((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
#: All pixels of the 60,000 training images, by normfused stats train-images-idx3-ubyte.gz.
FASHION_MNIST = Preset((0.2860,), (0.3530,))


class _ImageTransform(nn.Module):
    """A transform of images, alone or with what belongs to them.

    Called with one image it returns the result. Called with more, such as ``(image, label)`` or a dict, it returns the
    same structure, in which the images are replaced and everything else is as it was. Images are those of
    ``torchvision.tv_tensors`` and PIL images; if there are none, the first tensor of at least three dimensions, in the
    order of :mod:`torch.utils._pytree`. The result of a subclass of :class:`torch.Tensor` is of that subclass.
    """

    def _transformed(self, image: Any) -> Tensor:
        """The result for one image."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:
        """Transform the image, or the images among several inputs or in a tuple, list or dict."""
        sample = inputs[0] if len(inputs) == 1 else inputs
        if not isinstance(sample, (tuple, list, Mapping)):
            return _of_the_type_of(sample, self._transformed(sample))
        leaves, structure = flatten_tree(sample)
        chosen = _images_among(leaves)
        if not chosen:
            kinds = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
            raise TypeError(f"{type(self).__name__}: no image among the inputs: {kinds}")
        for index in chosen:
            leaves[index] = _of_the_type_of(leaves[index], self._transformed(leaves[index]))
        return unflatten_tree(leaves, structure)


def _images_among(leaves: list[Any]) -> list[int]:
    """The indices of the images, as torchvision's v2 transforms choose them."""
    # Neither package is needed. Without it there are no objects of its classes.
    tv_tensors, pillow = sys.modules.get("torchvision.tv_tensors"), sys.modules.get("PIL.Image")
    kinds = (*((tv_tensors.Image, tv_tensors.Video) if tv_tensors else ()), *((pillow.Image,) if pillow else ()))
    images = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]
    others = (tv_tensors.TVTensor,) if tv_tensors else ()
    plain = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not isinstance(x, others) and x.dim() > 2]
    return images or plain[:1]


def _of_the_type_of(image: Any, output: Tensor) -> Tensor:
    """The output as the subclass of Tensor that the input has, with its metadata."""
    kind = type(image)
    plain = not isinstance(image, Tensor) or kind in (Tensor, nn.Parameter)
    # A subclass that implements operators, such as FakeTensor, makes its own results.
    if plain or isinstance(output, kind) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return output
    result: Any = output.as_subclass(kind)
    if hasattr(result, "copy_meta_from"):  # MONAI's MetaTensor
        result.copy_meta_from(image)
    else:
        vars(result).update(vars(image))
    return cast("Tensor", result)


class Normalize(_ImageTransform):
    """``(x * scale - mean) / std`` for each channel: torchvision's ``Normalize`` that also accepts integers.

    It needs one pass over memory, and one kernel launch on CUDA; the constants are arguments of the launch.

    Args:
        mean, std: one number, one per channel, or a tensor of shape ``(N, C)`` for the images of a batch of shape
            ``(N, C, H, W)``, for values after scaling.
        inplace: overwrite and return the input, which must be floating.
        scale: factor of the input; default 1/255 for uint8, 1 otherwise.
        eps: minimum divisor: a ``std`` below it is replaced by it.
        dtype: dtype of the output; default that of the input, float32 for integers.
        memory_format: of the output; default that of the input.

    Raises:
        ValueError: ``std`` that is not positive with ``eps=0``; constants that are not finite; different numbers of
            means and stds; ``inplace`` with ``dtype`` or ``memory_format``. A call raises as
            :func:`normfused.normalize`.

    Example:
        >>> import torch
        >>> from normfused.transforms import Normalize
        >>> Normalize(mean=0.5, std=0.5)(torch.zeros(3, 2, 2, dtype=torch.uint8)).unique()
        tensor([-1.])

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
            raise ValueError(f"{type(self).__name__}: inplace=True excludes dtype and memory_format")

    @property
    def mean(self) -> list[Any]:
        """The means, for values after scaling, as in torchvision."""
        return self.constants.listed("mean")

    @property
    def std(self) -> list[Any]:
        """The divisors: the standard deviations, but at least ``eps``."""
        return self.constants.listed("std")

    def _transformed(self, image: Tensor) -> Tensor:
        if self.inplace:
            return self.constants.normalize_(image)
        return self.constants.normalize(image, self.dtype, self.memory_format)

    def extra_repr(self) -> str:  # noqa: D102
        return f"mean={self.mean}, std={self.std}"


class ToNormalizedTensor(Normalize):
    """``ToTensor`` and ``Normalize`` in one pass: from a PIL image, array or tensor to a normalized tensor.

    Args:
        mean, std, scale, eps: as in :class:`Normalize`.
        dtype: dtype of the output, default float32.
        memory_format: of the output: ``torch.contiguous_format``, the default, or ``torch.channels_last``.

    Raises:
        ValueError: as :class:`Normalize`.

    Example:
        >>> import numpy as np
        >>> from normfused.transforms import ToNormalizedTensor
        >>> ToNormalizedTensor(mean=0.5, std=0.5)(np.zeros((4, 6, 3), dtype=np.uint8)).shape
        torch.Size([3, 4, 6])
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

    def forward(self, *inputs: Any) -> Any:
        """Normalize a PIL image, an array or a tensor, integers or floating, which is not changed.

        Args:
            inputs: a PIL image, an array of shape ``(H, W)``, ``(H, W, C)`` or ``(N, H, W, C)``, or a tensor of shape
                ``(..., C, H, W)``. Or several values, or a tuple, list or dict, with one or more images.

        Returns:
            A new tensor of shape ``(..., C, H, W)``; for several values the same structure with the new tensors.
        """
        return super().forward(*inputs)

    def _transformed(self, image: Any) -> Tensor:
        return super()._transformed(_as_tensor(image))


class Denormalize(_ImageTransform):
    """The inverse of :class:`Normalize`: ``x * std + mean``, which is in 0..1 for images that were uint8.

    Args:
        mean, std: the arguments of ``Normalize``.
        dtype: dtype of the output, default that of the input. ``torch.uint8``: the result times 255, rounded and
            clamped to 0..255.

    Raises:
        ValueError: ``std`` that is not positive; constants that are not finite; different numbers of means and stds.

    Example:
        >>> import torch
        >>> from normfused.transforms import Denormalize, Normalize
        >>> image = torch.tensor([[[0, 128, 255]]], dtype=torch.uint8)
        >>> Denormalize(0.5, 0.5, dtype=torch.uint8)(Normalize(0.5, 0.5)(image))
        tensor([[[  0, 128, 255]]], dtype=torch.uint8)
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
        self.constants.images = given.images
        self.mean, self.std, self.dtype = given.listed("mean"), given.listed("std"), dtype

    def _transformed(self, image: Tensor) -> Tensor:
        if self.dtype != torch.uint8:
            return self.constants.normalize(image, self.dtype)
        white = self.constants.normalize(image, torch.promote_types(image.dtype, torch.float32))
        return white.round_().clamp_(0, 255).to(torch.uint8)

    def extra_repr(self) -> str:  # noqa: D102
        return f"mean={self.mean}, std={self.std}"


class QuantileNormalize(_ImageTransform):
    """Map images linearly from two quantiles of a data set to a range, and clip them to it.

    It is :class:`MinMaxNormalize` without the influence of outliers. :meth:`normfused.ChannelStats.quantile` computes
    the quantiles. Input is that of :class:`ToNormalizedTensor`.

    Args:
        low, high: one number or one per channel, for values after scaling.
        range: the values that ``low`` and ``high`` are mapped to.
        clip: whether values below ``low`` and above ``high`` become the ends of ``range``.
        scale: factor of the input; default 1/255 for uint8, 1 otherwise.
        eps: minimum extent: a difference of ``high`` and ``low`` below it is replaced by it.
        dtype: dtype of the output; default that of the input, float32 for integers.

    Raises:
        ValueError: ``high`` that is not above ``low`` with ``eps=0``; numbers that are not finite; a ``range`` that is
            not in ascending order; different numbers of channels. A call raises as
            :func:`normfused.normalize`.

    Example:
        >>> import torch, normfused
        >>> from normfused.transforms import QuantileNormalize
        >>> images = torch.arange(101.0).view(1, 1, 101)
        >>> low, high = normfused.ChannelStats(quantiles=(0.1, 0.9)).update(images).quantile()
        >>> QuantileNormalize(low, high)(torch.tensor([[[5.0, 10.0, 50.0, 90.0, 99.0]]]))
        tensor([[[0.0000, 0.0000, 0.5000, 1.0000, 1.0000]]])
    """

    def __init__(
        self,
        low: Numbers,
        high: Numbers,
        range: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
        *,
        scale: float | None = None,
        eps: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.range, self.clip, self.dtype = _check_range(name, range), clip, dtype
        self.low, self.high = (as_numbers(name, which, values) for which, values in (("low", low), ("high", high)))
        if len(self.low) != len(self.high) and 1 not in (len(self.low), len(self.high)):
            raise ValueError(f"{name}: low has {len(self.low)} numbers, but high has {len(self.high)}")
        channels = max(len(self.low), len(self.high))
        lows, highs = (values * (channels // len(values)) for values in (self.low, self.high))
        for channel, (below, above) in enumerate(zip(lows, highs, strict=True)):
            if above < below or (above == below and eps == 0):
                hint = "; eps= sets a minimum extent" if above == below else ""
                raise ValueError(f"{name}: high must be above low, got {above} and {below} for channel {channel}{hint}")
        start, end = self.range
        stds = [max(above - below, eps) / (end - start) for below, above in zip(lows, highs, strict=True)]
        means = [below - start * std for below, std in zip(lows, stds, strict=True)]
        self.constants = ImageConstants(name, means, stds, scale)

    def _transformed(self, image: Any) -> Tensor:
        output = self.constants.normalize(_as_tensor(image), self.dtype)
        return output.clamp_(*self.range) if self.clip else output

    def extra_repr(self) -> str:  # noqa: D102
        return f"low={self.low}, high={self.high}, range={self.range}, clip={self.clip}"


class _ByOwnStatistics(_ImageTransform):
    """Normalizes images by their own statistics."""

    def __init__(self, over: str, per_channel: bool, eps: float, dtype: torch.dtype | None) -> None:
        super().__init__()
        name = type(self).__name__
        if over not in ("image", "batch"):
            raise ValueError(f"{name}: over must be 'image' or 'batch', got {over!r}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"{name}: eps must be a non-negative finite number, got {eps}")
        self.over, self.per_channel, self.eps, self.dtype = over, per_channel, eps, dtype

    def _mean_and_std(self, stats: ChannelStats) -> tuple[Tensor, Tensor]:
        """The subtrahend and the divisor of each channel, shape (C,)."""
        raise NotImplementedError

    def _transformed(self, image: Any) -> Tensor:
        x = _as_tensor(image)
        name = type(self).__name__
        check_image(name, x)
        *batch, channels, height, width = x.shape
        images = math.prod(batch)
        # Reshape so that values that share their statistics are one channel.
        if self.over == "image":
            grouped = x.reshape((1, images * channels, height, width) if self.per_channel else (1, images, -1, width))
        else:
            grouped = x.reshape((images, channels, height, width) if self.per_channel else (1, 1, -1, width))
        stats = measure(grouped, "NCHW", ChannelStats())
        if excluded := int(stats.nonfinite.sum()):
            warnings.warn(f"{name}: the statistics exclude {excluded} NaN or infinite values", RuntimeWarning, 2)
        mean, std = self._mean_and_std(stats)
        output = ImageConstants(name, mean, std).normalize(grouped, self.dtype)
        return output.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"over={self.over!r}, per_channel={self.per_channel}"


class Standardize(_ByOwnStatistics):
    """Subtract the mean of the images and divide by their standard deviation (z-score).

    The statistics are the images' own, exclude NaN and infinities, and are constants to autograd. To normalize by given
    constants use :class:`Normalize`. Input is that of :class:`ToNormalizedTensor`.

    Args:
        over: ``"image"``: statistics of each image; ``"batch"``: of all images together.
        per_channel: statistics of each channel, or of all channels together.
        correction: subtracted from the count in the variance, as in :func:`torch.var`: 0 or 1.
        eps: a standard deviation up to it (for uint8 after scaling to 0..1) is replaced by 1, so that a constant image
            becomes 0.
        dtype: dtype of the output; default that of the input, float32 for integers.

    Raises:
        ValueError: an argument that is not listed. A call raises as :func:`normfused.normalize`.

    Example:
        >>> import torch
        >>> from normfused.transforms import Standardize
        >>> Standardize()(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[-1.,  1.]]])
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
        std = stats.std * (stats.count / (stats.count - self.correction)).sqrt()
        return stats.mean, torch.where(std > self.eps, std, 1.0)


class MinMaxNormalize(_ByOwnStatistics):
    """Map images linearly from their minimum and maximum to a range. Both are constants to autograd.

    Args:
        range: the values that minimum and maximum are mapped to.
        over, per_channel, dtype: as in :class:`Standardize`; ``per_channel`` is False by default.
        eps: an extent up to it (for uint8 after scaling to 0..1) is replaced by 1: a constant image becomes
            ``range[0]``.

    Raises:
        ValueError: ``range`` is not two finite numbers in ascending order. A call raises as
            :func:`normfused.normalize`.

    Example:
        >>> import torch
        >>> from normfused.transforms import MinMaxNormalize
        >>> MinMaxNormalize((-1, 1))(torch.tensor([[[2.0, 3.0, 4.0]]]))
        tensor([[[-1.,  0.,  1.]]])
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
        self.range = _check_range("MinMaxNormalize", range)

    def _mean_and_std(self, stats: ChannelStats) -> tuple[Tensor, Tensor]:
        low, high = self.range
        extent = stats.max - stats.min
        std = torch.where(extent > self.eps, extent / (high - low), 1.0)
        return stats.min - low * std, std

    def _transformed(self, image: Any) -> Tensor:
        # Clamped, because rounding can exceed the range by one unit in the last place.
        stretched: Tensor = super()._transformed(image)
        return stretched.clamp_(*self.range)

    def extra_repr(self) -> str:  # noqa: D102
        return f"range={self.range}, {super().extra_repr()}"


def _check_range(name: str, range: tuple[float, float]) -> tuple[float, float]:
    low, high = range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name}: range must be two finite numbers in ascending order, got {range}")
    return low, high


def _as_tensor(image: Any) -> Tensor:
    """A tensor unchanged; anything else as a view of shape (..., C, H, W)."""
    if isinstance(image, Tensor):
        return image
    array = as_array(image)
    shape = tuple(array.shape)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"an array needs 2, 3 or 4 dimensions, got shape {shape}")
    if array.ndim > 2 and shape[-1] not in FEW_CHANNELS and shape[-3] in FEW_CHANNELS:
        raise ValueError(f"an array of shape {shape} would have {shape[-1]} channels: pass a tensor for {shape[-3]}")
    images = as_nchw(array, ("HW", "HWC", "NHWC")[array.ndim - 2])
    return images if array.ndim == 4 else images.squeeze(0)
