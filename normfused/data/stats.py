"""Mean, standard deviation and range of the channels of many images, of any batch and image sizes."""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from normfused.checks import check_process_group
from normfused.data import files
from normfused.data.histogram import Histogram, check_quantiles
from normfused.data.images import as_array, as_nchw, mask_as_nchw
from normfused.data.records import (
    NO_SUMS,
    NO_VALUES,
    Moments,
    Sums,
    Weight,
    check_weights,
    from_dict,
    merged,
    records_of,
    to_dict,
)

# Held while an object is read and updated, and while the process forks. Reentrant, because a signal handler may fork.
_merging = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_merging.acquire, after_in_parent=_merging.release, after_in_child=_merging.release)

NONFINITE = "the images contain NaN or infinity; the statistics exclude them and .nonfinite counts them"


class ChannelMismatchError(ValueError):
    """Images with another number of channels than those before."""


class ChannelStats:
    """Statistics of each channel over all pixels of all images so far. Pixels weigh the same, if images do.

    Integers are summed exactly: any split, order and merge of the images gives bitwise identical results. Floating
    values are merged in float64. NaN and infinities are excluded and counted. Objects can be pickled, and are equal
    (``==``) if they hold the same numbers.

    Args:
        scale: positive factor of the values in all results but ``sums``. Default: 1/255 for uint8, as in torchvision's
            ``ToTensor``, and 1 otherwise.
        nodata: a number that stands for a missing value, before scaling. Such values are left out of every figure.
        quantiles: numbers from 0 to 1, such as ``(0.01, 0.99)``. With any, each channel has a
            :class:`~normfused.data.histogram.Histogram`, from which :meth:`quantile` computes these and all others:
            exact for integers of 16 bits and float16, within 0.05 % for float32 and float64. It takes memory for each
            distinct value, about 1,000 for each power of two.

    Attributes:
        scale, nodata, quantiles: the arguments.
        images: number of images, without those of weight 0.
        complete: False if :func:`normfused.dataset_stats` was interrupted.
        integer_scale: factor of integer values; None before the first of them.

    Raises:
        ValueError: ``scale`` is not a positive number, ``nodata`` is not a finite one, or a quantile is not in 0..1.
            Results raise it before the first image.

    Example:
        >>> import torch, normfused
        >>> stats = normfused.ChannelStats()
        >>> stats.update(torch.tensor([[[0, 255]], [[255, 255]]], dtype=torch.uint8))
        ChannelStats(images=1, channels=2, mean=[0.5000, 1.0000], std=[0.5000, 0.0000])
        >>> stats.mean
        tensor([0.5000, 1.0000], dtype=torch.float64)
        >>> print(normfused.ChannelStats().update(torch.tensor([[[0.0, 1.0]]])))
        1 image
        channel  count    mean     std     min     max
              0      2  0.5000  0.5000  0.0000  1.0000
        normfused.transforms.Normalize(mean=[0.5000], std=[0.5000])
        >>> normfused.ChannelStats(quantiles=[0.5]).update(torch.tensor([[[0.0, 3.0, 4.0]]])).quantile(0.5)
        tensor([3.], dtype=torch.float64)

    Source: Chan, Golub and LeVeque, 1983, "Algorithms for Computing the Sample Variance".
    """

    def __init__(
        self, scale: float | None = None, nodata: float | None = None, quantiles: Sequence[float] = ()
    ) -> None:
        if scale is not None and (not isinstance(scale, (int, float)) or not 0 < scale < math.inf):
            raise ValueError(f"scale must be a positive number or None, got {scale!r}")
        if nodata is not None and (not isinstance(nodata, (int, float)) or not math.isfinite(nodata)):
            raise ValueError(f"nodata must be a finite number or None, got {nodata!r}")
        self.scale = scale
        self.nodata = nodata
        self.quantiles = check_quantiles(quantiles)
        self.images = 0
        self.complete = True
        self.integer_scale: float | None = None
        self._sums: tuple[Sums, ...] = ()  # one per channel; empty before the first integers
        self._floats: tuple[Moments, ...] = ()  # the same for floating values

    def update(self, images: Any, layout: str | None = None, mask: Any = None, weights: Any = None) -> ChannelStats:
        """Add one image or a batch. Changes this object and returns it. Several threads may call it at the same time.

        Args:
            images: tensor, NumPy array or PIL image of uint8, int8, int16, uint16, int32, int64, float16, bfloat16,
                float32 or float64. It is not copied, except for uint16, PIL images, and arrays with reversed byte order
                or negative strides.
            layout: a letter for each dimension: N for images, C for channels, any other for a dimension of an image.
                For example ``"NHW"`` for many grayscale images, ``"CDHW"`` for a volume, ``"TCHW"`` for a video,
                ``"NC"`` for a table. The default depends on the number of dimensions: ``"HW"``, ``"CHW"``, ``"NCHW"``
                for a tensor, ``"HW"``, ``"HWC"``, ``"NHWC"`` otherwise.
            mask: bool tensor or array, True for the values to count: of the shape of ``images``, or without C for all
                channels alike. A NumPy masked array has its own, which is True for the others.
            weights: how many times each image counts, as if it occurred so often: a number for each image, 0 or from
                2^-64 to 2^64, such as the weights of ``torch.utils.data.WeightedRandomSampler``. Default: 1.

        Raises:
            ValueError: no values; a number of channels that differs from the images before; a shape that does not fit
                ``layout``; the default layout with more than 4 channels, which is as likely another one; a mask of
                another shape; a PIL image of palette indices; integer dtypes with different default scales.
            TypeError: an unsupported dtype, such as bool; a mask that is not bool.

        Warns:
            RuntimeWarning: at the first NaN or infinity.

        Example:
            >>> import numpy as np, normfused
            >>> stats = normfused.ChannelStats()
            >>> for image in np.zeros((3, 4, 4, 3), dtype=np.uint8):  # images of shape (H, W, C)
            ...     _ = stats.update(image)
            >>> stats.images, stats.channels
            (3, 3)
        """
        was_finite = not self._has_nonfinite()
        self.merge(measure(images, layout, self, mask, weights))
        if was_finite and self._has_nonfinite():
            warnings.warn(NONFINITE, RuntimeWarning, stacklevel=2)
        return self

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Add the images of ``other``, which is not changed. Changes this object and returns it.

        Raises:
            ValueError: ``other`` has another number of channels, scale or nodata, or other quantiles. Neither object
                has changed then.

        Example:
            >>> import torch, normfused
            >>> first, second = (normfused.ChannelStats().update(torch.ones(1, 2, 2) * v) for v in (1, 3))
            >>> first.merge(second).mean
            tensor([2.], dtype=torch.float64)
        """
        with _merging:
            self._merge(other)
        return self

    def _merge(self, other: ChannelStats) -> None:
        if self.channels and other.channels and self.channels != other.channels:
            raise ChannelMismatchError(f"channels: got {other.channels}, but the images before have {self.channels}")
        for name, mine in self._arguments().items():
            if mine != (others := getattr(other, name)):
                raise ValueError(f"cannot merge {name}={others} into {name}={mine}")
        scales = {s.integer_scale for s in (self, other)} - {None}
        if len(scales) > 1:
            raise ValueError("uint8 is scaled by 1/255, other integers by 1: pass scale= to scale all images alike")
        self.__dict__.update(  # in one step, so that Ctrl-C cannot leave half an update
            images=self.images + other.images,
            complete=self.complete and other.complete,
            integer_scale=next(iter(scales), None),
            _sums=merged(self._sums, other._sums),
            _floats=merged(self._floats, other._floats),
        )

    def weigh(self, weight: Weight) -> ChannelStats:
        """Count each image ``weight`` times, a positive number. Changes this object and returns it."""
        if weight == 1:
            return self
        self._sums = tuple(sums.weighted(weight) for sums in self._sums)
        self._floats = tuple(moments.weighted(weight) for moments in self._floats)
        return self

    def all_reduce(self, process_group: distributed.ProcessGroup | None = None) -> ChannelStats:
        """Merge the statistics of all processes, in the order of their ranks. Changes this object and returns it.

        The result is the same on each rank.

        Args:
            process_group: the processes; default all.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialized, or this process is not in the group.
            ValueError: on each rank, if channels or scales differ between ranks.
        """
        check_process_group("all_reduce", process_group)
        ranks: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(ranks, self, group=process_group)
        total = self.empty()
        for rank in ranks:
            total.merge(rank)
        self.__dict__.update(vars(total))
        return self

    def empty(self) -> ChannelStats:
        """A new object without images, with the same arguments."""
        return ChannelStats(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "nodata": self.nodata, "quantiles": self.quantiles}

    @property
    def channels(self) -> int | None:
        """Number of channels; None before the first image."""
        return len(self._sums or self._floats) or None

    @property
    def sums(self) -> tuple[Sums, ...]:
        """Count, sum, sum of squares, minimum, maximum and histogram of the integers of each channel; not scaled."""
        return self._sums

    @property
    def count(self) -> Tensor:
        """Number of values of each channel, without those that are not finite, shape (C,), int64.

        Of images with weights it is the sum of the weights of the values; float64 if they are not integers of 64 bits.
        """
        counts = [m.count for m in self._moments()]
        fits = all(isinstance(count, int) and count < 2**63 for count in counts)
        return torch.tensor(counts if fits else list(map(float, counts)))

    @property
    def nonfinite(self) -> Tensor:
        """Number of NaNs and infinities of each channel, which are excluded, shape (C,), int64."""
        return torch.tensor([m.nonfinite for m in self._moments()])

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, shape (C,), float64; NaN without values."""
        return self._result(lambda m: m.mean if m.count else math.nan)

    @property
    def min(self) -> Tensor:
        """Minimum of each channel, shape (C,), float64; infinity without values."""
        return self._result(lambda m: m.min)

    @property
    def max(self) -> Tensor:
        """Maximum of each channel, shape (C,), float64; -infinity without values."""
        return self._result(lambda m: m.max)

    @property
    def m2(self) -> Tensor:
        """Sum of squared deviations from the mean, shape (C,), float64.

        ``m2 / (count - 1)`` is the unbiased variance.
        """
        return self._result(lambda m: m.std * m.std * m.count)

    @property
    def var(self) -> Tensor:
        """Biased variance of each channel, the square of :attr:`std`, shape (C,), float64; NaN without values."""
        return self.std.square()

    @property
    def std(self) -> Tensor:
        """Biased standard deviation of each channel, shape (C,), float64; NaN without values.

        It is right for values of any magnitude. Below 1e-154 and above 1e154 its square, :attr:`var`, underflows or
        overflows float64.
        """
        return self._result(lambda m: m.std if m.count else math.nan)

    def quantile(self, q: float | Sequence[float] | None = None) -> Tensor:
        """Quantiles of each channel, as ``numpy.quantile`` computes them; exact where the histogram is.

        Between two values they are interpolated linearly. With weights that are not integers it is the smallest value
        at which the share of the weights up to it reaches ``q``: the method ``"inverted_cdf"`` of ``numpy.quantile``.

        Args:
            q: a number from 0 to 1 or several; default those of the constructor.

        Returns:
            Shape (C,) for a number, else (Q, C), float64; NaN without values.

        Raises:
            ValueError: this object was made without ``quantiles``; no images; ``q`` is not from 0 to 1.

        Example:
            >>> import torch, normfused
            >>> stats = normfused.ChannelStats(quantiles=(0.25, 0.75))
            >>> stats.update(torch.tensor([[[0, 10, 20]], [[1, 1, 2]]])).quantile()
            tensor([[ 5.0000,  1.0000],
                    [15.0000,  1.5000]], dtype=torch.float64)
        """
        if isinstance(q, (int, float)):
            return self.quantile((q,))[0]
        numbers = self.quantiles if q is None else check_quantiles(q)
        moments = zip(self.histograms, self._moments(), strict=True)
        return torch.from_numpy(np.stack([h.quantiles(numbers, m.min, m.max) for h, m in moments], axis=1))

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """The histogram of each channel, of its scaled values.

        Raises:
            ValueError: this object was made without ``quantiles``; no images.

        Example:
            >>> import torch, normfused
            >>> (histogram,) = normfused.ChannelStats(quantiles=[0.5]).update(torch.tensor([[[5, 7, 5]]])).histograms
            >>> histogram.values.tolist(), histogram.counts.tolist()
            ([5.0, 7.0], [2, 1])
        """
        if not self.quantiles:
            raise ValueError("no histograms: pass quantiles= to ChannelStats")
        return tuple(m.histogram for m in self._moments() if m.histogram is not None)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, exact, as a dict for JSON.

        Example:
            >>> import torch, normfused
            >>> stats = normfused.ChannelStats().update(torch.ones(1, 2, 2))
            >>> normfused.ChannelStats.from_dict(stats.to_dict()) == stats
            True
        """
        return {
            **self._arguments(),
            "images": self.images,
            "complete": self.complete,
            "integer_scale": self.integer_scale,
            "sums": [to_dict(channel) for channel in self._sums],
            "moments": [to_dict(channel) for channel in self._floats],
        }

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> ChannelStats:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError, ArithmeticError: other dicts.
        """
        stats = cls(figures["scale"], figures["nodata"], figures["quantiles"])
        stats.images, stats.complete = figures["images"], figures["complete"]
        stats.integer_scale = figures["integer_scale"]
        stats._sums = tuple(from_dict(channel, NO_SUMS) for channel in figures["sums"])
        stats._floats = tuple(from_dict(channel, NO_VALUES) for channel in figures["moments"])
        stats._check()
        return stats

    def _check(self) -> None:
        """Raise ``ValueError`` unless there are images with these figures."""
        records: tuple[Sums | Moments, ...] = (*self._sums, *self._floats)
        if type(self.images) is not int or type(self.complete) is not bool or (self.images > 0) != bool(records):
            raise ValueError(f"images={self.images!r}, complete={self.complete!r}, {len(records)} records")
        if self._sums and self._floats and len(self._sums) != len(self._floats):
            raise ValueError(f"{len(self._sums)} channels of integers, {len(self._floats)} of floating values")
        is_scale = isinstance(self.integer_scale, (int, float)) and 0 < self.integer_scale < math.inf
        if not is_scale if self._sums else self.integer_scale is not None:
            raise ValueError(f"integer_scale={self.integer_scale!r}")
        if any((record.histogram is not None) != bool(self.quantiles) for record in records):
            raise ValueError("histograms without quantiles, or quantiles without histograms")

    def save(self, path: str | Path) -> None:
        """Write all numbers as JSON. An existing file is replaced in one step."""
        files.replace(Path(path), files.as_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> ChannelStats:
        """Read a file that :meth:`save` or ``normfused stats --json`` wrote.

        Raises:
            ValueError: other content; the message names the file.
            OSError: the file cannot be read.

        Example:
            >>> import tempfile, torch, normfused
            >>> stats = normfused.ChannelStats().update(torch.ones(1, 2, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     stats.save(f"{folder}/stats.json")
            ...     normfused.ChannelStats.load(f"{folder}/stats.json") == stats
            True
        """
        content = Path(path).read_bytes()
        try:
            figures = json.loads(content)
            return cls.from_dict(figures.get("stats", figures))  # the file of the command holds more
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a saved ChannelStats: {error!r}") from error

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, ChannelStats) else NotImplemented

    def __repr__(self) -> str:
        if self.channels is None:
            return "ChannelStats(images=0)"
        mean, std = (f"[{', '.join(map(_four_digits, values.tolist()))}]" for values in (self.mean, self.std))
        return f"ChannelStats(images={self.images}, channels={self.channels}, mean={mean}, std={std})"

    def __str__(self) -> str:
        """A table of the channels, and the code of the matching ``normfused.transforms.Normalize``."""
        if self.channels is None:
            return "no images yet"
        columns = {"count": [f"{count:,}" for count in self.count.tolist()]}
        figures = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        if self.quantiles:
            figures |= {f"{100 * q:.10g}%": values for q, values in zip(self.quantiles, self.quantile(), strict=True)}
        columns |= {name: [_four_digits(v) for v in values.tolist()] for name, values in figures.items()}
        if self._has_nonfinite():
            columns["nonfinite"] = [f"{count:,}" for count in self.nonfinite.tolist()]
        scale = self.integer_scale or self.scale or 1.0
        what = "integers" if self._floats and not self.scale else "values"
        lines = [f"{self.images:,} image{'s' if self.images > 1 else ''}"]
        if scale != 1:
            lines[0] += f", {what} divided by {1 / scale:g}"
        table = [["channel", *map(str, range(self.channels))], *([name, *cells] for name, cells in columns.items())]
        widths = [max(map(len, column)) for column in table]
        for cells in zip(*table, strict=True):
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        lines.append(f"normfused.transforms.{self._normalize_call()}")
        constant = [str(channel) for channel, value in enumerate(self.std.tolist()) if value == 0]
        if constant:
            lines[-1] += f"  # constant, with a std of 0: channel {', '.join(constant)}"
        if len(set(self.quantiles)) > 1:
            lines.append(f"normfused.transforms.{self._quantile_call()}")
        return "\n".join(lines)

    def _normalize_call(self) -> str:
        """The code of the transform that normalizes these images."""
        pairs = list(zip(self.mean.tolist(), self.std.tolist(), strict=True))
        mean, std = ", ".join(_mean_for(*pair) for pair in pairs), ", ".join(_four_digits(std) for _, std in pairs)
        return f"Normalize(mean=[{mean}], std=[{std}]{self._scale_argument()})"

    def _quantile_call(self) -> str:
        """The code of the transform that maps the outer quantiles to 0 and 1."""
        outer = self.quantile((min(self.quantiles), max(self.quantiles)))
        extents = (outer[1] - outer[0]).tolist()
        low, high = (", ".join(map(_mean_for, values, extents)) for values in outer.tolist())
        code = f"QuantileNormalize(low=[{low}], high=[{high}]{self._scale_argument()})"
        empty = [str(channel) for channel, extent in enumerate(extents) if extent == 0]
        return f"{code}  # equal quantiles: channel {', '.join(empty)}" if empty else code

    def _scale_argument(self) -> str:
        return "" if self.scale is None else f", scale={_fraction(self.scale)}"

    def _moments(self) -> tuple[Moments, ...]:
        """Scaled moments of each channel, of its integers and floating values together."""
        if self.channels is None:
            raise ValueError("no images yet")
        integers = tuple(channel.moments(self.integer_scale or 1.0) for channel in self._sums)
        return merged(integers, tuple(channel.scaled(self.scale or 1.0) for channel in self._floats))

    def _result(self, figure: Callable[[Moments], float]) -> Tensor:
        return torch.tensor([figure(channel) for channel in self._moments()], dtype=torch.float64)

    def _has_nonfinite(self) -> bool:
        return any(channel.nonfinite for channel in self._floats)


def _four_digits(value: float) -> str:
    """Four decimals; four significant digits for small values, so that a small std is not shown as 0, and huge ones."""
    return f"{value:.4f}" if value == 0 or not (abs(value) < 0.1 or 1e16 < abs(value) < math.inf) else f"{value:#.4g}"


def _mean_for(mean: float, std: float) -> str:
    """A mean with an error of at most 1/1000 of the standard deviation: as in `_four_digits`, or with more decimals."""
    if not 0 < std < math.inf or abs(mean - float(_four_digits(mean))) <= std / 1000:
        return _four_digits(mean)
    return f"{mean:.{max(0, 3 - math.floor(math.log10(std)))}f}"


def _fraction(scale: float) -> str:
    """The number as Python code, as 1/n where that is the same number."""
    inverse = round(1 / scale) if 1e-15 < scale < 1 else 1
    return f"1/{inverse}" if inverse > 1 and 1 / inverse == scale else repr(scale)


def measure(images: Any, layout: str | None, like: ChannelStats, mask: Any = None, weights: Any = None) -> ChannelStats:
    """The statistics of these images alone, without warnings, with the arguments of ``like``.

    Arguments as in :meth:`ChannelStats.update`.
    """
    x, counted = values_of(images, layout, like, mask)
    if weights is None:
        return _measured(x, counted, like)
    total, numbers = like.empty(), check_weights(weights, x.size(0))
    for weight in dict.fromkeys(numbers):
        if weight > 0:  # images of equal weight together
            chosen = torch.tensor([number == weight for number in numbers], device=x.device)
            kept = None if counted is None else tuple(channel[chosen] for channel in counted)
            total.merge(_measured(x[chosen], kept, like).weigh(weight))
    return total


def _measured(x: Tensor, counted: tuple[Tensor, ...] | None, like: ChannelStats) -> ChannelStats:
    """The statistics of a tensor of shape (N, C, ...). ``counted``: which values of each channel; None: all."""
    stats = like.empty()
    stats.images = x.size(0)
    parts = [x]
    if counted is not None:
        parts = [channel[kept].unsqueeze(1) for channel, kept in zip(x.unbind(1), counted, strict=True)]
    records = tuple(record for part in parts for record in records_of(part, bool(like.quantiles)))
    if x.is_floating_point():
        stats._floats = records
    else:
        stats._sums, stats.integer_scale = records, scale_of(x.dtype, like.scale)
    return stats


def values_of(
    images: Any, layout: str | None, like: ChannelStats, mask: Any = None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The images as a tensor of shape (N, C, ...), and which values of each channel count; None: all."""
    masks = [] if mask is None else [mask]
    if isinstance(images, np.ma.MaskedArray):
        if images.mask is not np.ma.nomask:
            masks.append(~np.ma.getmaskarray(images))
        images = images.data
    x = as_nchw(images, layout)
    counted = [mask_as_nchw(mask, as_array(images), layout).to(x.device).expand_as(x) for mask in masks]
    if like.nodata is not None and _holds(x.dtype, like.nodata):
        counted.append(x != (like.nodata if x.is_floating_point() else int(like.nodata)))
    return x, torch.stack(counted).all(0).unbind(1) if counted else None


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether a number can be among values of ``dtype``. torch's comparisons wrap one that cannot."""
    if dtype.is_floating_point:
        return True
    limits = torch.iinfo(dtype)
    return number == int(number) and limits.min <= number <= limits.max


def scale_of(dtype: torch.dtype, scale: float | None) -> float:
    """The factor of values of ``dtype``; ``scale`` is the one that the user gave."""
    return scale or (1 / 255 if dtype == torch.uint8 else 1.0)
