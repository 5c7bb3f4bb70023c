"""Mean, standard deviation and range of a data set's channels, whatever its batches and the sizes of its images."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from normfused.checks import check_process_group
from normfused.data import files
from normfused.data.images import as_nchw
from normfused.functional import channel_moments, channel_sums

NONFINITE = "the images hold NaN or infinity, left out of the statistics and counted in .nonfinite"


class Sums(NamedTuple):
    """Exact figures of one channel's integers as they came, before any scale."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    sum: int
    sum_of_squares: int
    min: int
    max: int

    def merge(self, other: Sums) -> Sums:
        """Of both together."""
        return Sums(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_of_squares + other.sum_of_squares,
            min(self.min, other.min),
            max(self.max, other.max),
        )

    def moments(self, scale: float) -> Moments:
        """Of the values times ``scale``; nothing cancels, as the difference is one of integers."""
        deviations = self.count * self.sum_of_squares - self.sum**2
        m2 = deviations / self.count * scale**2
        return Moments(self.count, self.sum / self.count * scale, m2, self.min * scale, self.max * scale)


class Moments(NamedTuple):
    """Figures of one channel's finite floating values, and how many others there were."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: float
    m2: float
    min: float
    max: float
    nonfinite: int = 0

    def merge(self, other: Moments) -> Moments:
        """Of both together. Source: Chan, Golub and LeVeque, 1983."""
        count = self.count + other.count
        share, delta = other.count / max(count, 1), other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta**2 * self.count * share,
            min(self.min, other.min),
            max(self.max, other.max),
            self.nonfinite + other.nonfinite,
        )

    def scaled(self, scale: float) -> Moments:
        """Of the values times ``scale``."""
        return Moments(
            self.count, self.mean * scale, self.m2 * scale**2, self.min * scale, self.max * scale, self.nonfinite
        )


_Figures = TypeVar("_Figures", Sums, Moments)


def _merged(mine: tuple[_Figures, ...], others: tuple[_Figures, ...]) -> tuple[_Figures, ...]:
    if not mine or not others:
        return mine or others
    return tuple(a.merge(b) for a, b in zip(mine, others, strict=True))


class ChannelStats:
    """Statistics of each channel over all pixels of all images given so far: every pixel counts alike.

    Integers are summed exactly, so that any split, order and merge of the images gives the same result to the last bit.
    Floating values are merged in float64 (Chan, Golub and LeVeque, 1983). NaN and infinities are left out and counted.
    Picklable; two are ``==`` when they hold the same figures.

    Args:
        scale: positive; what values are multiplied by in every result but ``sums``. Default: 1/255 for uint8, as
            torchvision's ``ToTensor`` does, 1 for all else.

    Attributes:
        scale: as given.
        images: how many images there were.
        complete: False where :func:`dataset_stats` was interrupted.
        integer_scale: what integers are multiplied by; None while there are none.
    """

    def __init__(self, scale: float | None = None) -> None:
        if scale is not None and (not isinstance(scale, (int, float)) or not 0 < scale < math.inf):
            raise ValueError(f"scale must be a positive number or None, got {scale!r}")
        self.scale = scale
        self.images = 0
        self.complete = True
        self.integer_scale: float | None = None
        self._sums: tuple[Sums, ...] = ()  # a channel each; empty while no integers have come
        self._floats: tuple[Moments, ...] = ()  # the same for floating values

    def update(self, images: Any, layout: str | None = None) -> ChannelStats:
        """Adds one image or a batch, and returns this object.

        Args:
            images: a tensor, numpy array or PIL image of uint8, int8, int16, uint16, int32, int64, float16, bfloat16,
                float32 or float64. Read where it lies; only uint16, arrays of reversed byte order or negative strides
                and PIL images are copied.
            layout: ``"HW"``, ``"CHW"``, ``"HWC"``, ``"NHW"``, ``"NCHW"``, ``"NHWC"`` or ``"NC"``. Default, by the
                number of dimensions: ``"HW"``, ``"CHW"``, ``"NCHW"`` for a tensor, ``"HW"``, ``"HWC"``, ``"NHWC"`` for
                anything else.

        Raises:
            ValueError: no values; another number of channels than before; a shape that does not fit ``layout``, or
                whose guessed layout has a strange number of channels; a PIL image of palette indices; integer dtypes
                of different default scales.
            TypeError: a dtype that is not supported, bool among them.

        Warns:
            RuntimeWarning: at the first NaN or infinity.
        """
        was_finite = not self._has_nonfinite()
        self.merge(measure(images, layout, self.scale))
        if was_finite and self._has_nonfinite():
            warnings.warn(NONFINITE, RuntimeWarning, stacklevel=2)
        return self

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Adds all that another one holds, and returns this object; ``other`` stays as it is.

        Raises:
            ValueError: ``other`` has another number of channels or another scale. Nothing has changed then.
        """
        if self.channels and other.channels and self.channels != other.channels:
            raise ValueError(f"channels: got {other.channels}, but the images before have {self.channels}")
        if self.scale != other.scale:
            raise ValueError(f"cannot merge scale={other.scale} into scale={self.scale}")
        scales = {s.integer_scale for s in (self, other)} - {None}
        if len(scales) > 1:
            raise ValueError("uint8 is scaled by 1/255, other integers by 1: pass scale= to scale all images alike")
        self.__dict__.update(  # in one step, which Ctrl-C cannot cut in two
            images=self.images + other.images,
            complete=self.complete and other.complete,
            integer_scale=next(iter(scales), None),
            _sums=_merged(self._sums, other._sums),
            _floats=_merged(self._floats, other._floats),
        )
        return self

    def all_reduce(self, process_group: distributed.ProcessGroup | None = None) -> ChannelStats:
        """Replaces this by the merge over all processes of ``process_group``, equal on each, and returns it.

        The ranks' figures are merged in the ranks' order. ``process_group=None``: all processes.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialized, or this process is not in the group.
            ValueError: the ranks' channels or scales differ; it raises on each rank.
        """
        check_process_group("all_reduce", process_group)
        ranks: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(ranks, self, group=process_group)
        total = ChannelStats(self.scale)
        for rank in ranks:
            total.merge(rank)
        self.__dict__.update(vars(total))
        return self

    @property
    def channels(self) -> int | None:
        """How many channels the images have; None while there are no images."""
        return len(self._sums or self._floats) or None

    @property
    def sums(self) -> tuple[Sums, ...]:
        """For each channel count, sum, sum of squares, min and max of its integers: exact, and not scaled."""
        return self._sums

    @property
    def count(self) -> Tensor:
        """How many values each channel has in the statistics, shape (C,), int64."""
        return torch.tensor([m.count for m in self._moments()])

    @property
    def nonfinite(self) -> Tensor:
        """How many values of each channel were NaN or infinite and left out, shape (C,), int64."""
        return torch.tensor([m.nonfinite for m in self._moments()])

    @property
    def mean(self) -> Tensor:
        """Shape (C,), float64; NaN for a channel without values."""
        return self._result(lambda m: m.mean if m.count else math.nan)

    @property
    def min(self) -> Tensor:
        """Shape (C,), float64; infinity for a channel without values."""
        return self._result(lambda m: m.min)

    @property
    def max(self) -> Tensor:
        """Shape (C,), float64; -infinity for a channel without values."""
        return self._result(lambda m: m.max)

    @property
    def m2(self) -> Tensor:
        """Sum of squared deviations from the mean, (C,), float64; ``m2 / (count - 1)`` is the unbiased variance."""
        return self._result(lambda m: m.m2)

    @property
    def var(self) -> Tensor:
        """Biased variance, ``m2 / count``, shape (C,), float64; NaN for a channel without values."""
        return self._result(lambda m: m.m2 / m.count if m.count else math.nan)

    @property
    def std(self) -> Tensor:
        """Square root of :attr:`var`, shape (C,), float64."""
        return self.var.sqrt()

    def to_dict(self) -> dict[str, Any]:
        """All figures, exactly, for JSON."""
        return {
            "scale": self.scale,
            "images": self.images,
            "complete": self.complete,
            "integer_scale": self.integer_scale,
            "sums": [channel._asdict() for channel in self._sums],
            "moments": [channel._asdict() for channel in self._floats],
        }

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> ChannelStats:
        """What :meth:`to_dict` was called on."""
        stats = cls(figures["scale"])
        stats.images, stats.complete = figures["images"], figures["complete"]
        stats.integer_scale = figures["integer_scale"]
        stats._sums = tuple(Sums(**channel) for channel in figures["sums"])
        stats._floats = tuple(Moments(**channel) for channel in figures["moments"])
        return stats

    def save(self, path: str | Path) -> None:
        """Writes all figures as JSON; a file that is there is replaced in one step."""
        files.replace(Path(path), json.dumps(self.to_dict(), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> ChannelStats:
        """What :meth:`save` or ``normfused stats --json`` wrote.

        Raises:
            ValueError: the file holds anything else; the text names it.
        """
        content = Path(path).read_bytes()
        try:
            figures = json.loads(content)
            return cls.from_dict(figures.get("stats", figures))  # the command's file has more in it
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a saved ChannelStats: {error!r}") from error

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, ChannelStats) else NotImplemented

    def __repr__(self) -> str:
        if self.channels is None:
            return "ChannelStats(images=0)"
        mean, std = (f"[{', '.join(map(_four_digits, values.tolist()))}]" for values in (self.mean, self.std))
        return f"ChannelStats(images={self.images}, channels={self.channels}, mean={mean}, std={std})"

    def __str__(self) -> str:
        """A table of the channels, and the line for ``normfused.transforms.Normalize``."""
        if self.channels is None:
            return "no images yet"
        columns = {"count": [f"{count:,}" for count in self.count.tolist()]}
        figures = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
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
        mean, std = (", ".join(columns[name]) for name in ("mean", "std"))
        lines.append(f"normfused.transforms.Normalize(mean=[{mean}], std=[{std}])")
        constant = [str(channel) for channel, value in enumerate(self.std.tolist()) if value == 0]
        if constant:
            lines[-1] += f"  # constant, with a std of 0: channel {', '.join(constant)}"
        return "\n".join(lines)

    def _moments(self) -> tuple[Moments, ...]:
        """Of each channel's integers and floating values together, scaled."""
        if self.channels is None:
            raise ValueError("no images yet")
        integers = tuple(channel.moments(self.integer_scale or 1.0) for channel in self._sums)
        return _merged(integers, tuple(channel.scaled(self.scale or 1.0) for channel in self._floats))

    def _result(self, figure: Callable[[Moments], float]) -> Tensor:
        return torch.tensor([figure(channel) for channel in self._moments()], dtype=torch.float64)

    def _has_nonfinite(self) -> bool:
        return any(channel.nonfinite for channel in self._floats)


def _four_digits(value: float) -> str:
    """Four decimals, or four significant digits where these are more: a small std is not 0."""
    return f"{value:.4f}" if value == 0 or not abs(value) < 0.1 else f"{value:#.4g}"


def measure(images: Any, layout: str | None, scale: float | None) -> ChannelStats:
    """The statistics of these images alone, without a warning; see :meth:`ChannelStats.update`."""
    x = as_nchw(images, layout)
    stats = ChannelStats(scale)
    stats.images = x.size(0)
    if x.is_floating_point():
        stats._floats = _float_moments(x)
    else:
        stats.integer_scale = scale_of(x.dtype, scale)
        stats._sums = _integer_sums(x)
    return stats


def scale_of(dtype: torch.dtype, scale: float | None) -> float:
    """What values of ``dtype`` are multiplied by."""
    return scale or (1 / 255 if dtype == torch.uint8 else 1.0)


def _integer_sums(x: Tensor) -> tuple[Sums, ...]:
    count, *figures = channel_sums(x)
    channels = [Sums(count, *values) for values in zip(*(f.tolist() for f in figures), strict=True)]
    largest = max(max(-channel.min, channel.max) for channel in channels)
    if largest**2 * count >= 2**63:  # the sums may have overflowed; Python's integers do not
        lists = (channel.flatten().tolist() for channel in x.unbind(1))
        channels = [Sums(count, sum(v), sum(i * i for i in v), min(v), max(v)) for v in lists]
    return tuple(channels)


def _float_moments(x: Tensor) -> tuple[Moments, ...]:
    count, *figures = channel_moments(x)
    if torch.stack(figures).isfinite().all():
        return tuple(Moments(count, *values) for values in zip(*(f.tolist() for f in figures), strict=True))
    return tuple(_finite_moments(channel) for channel in x.unbind(1))


def _finite_moments(channel: Tensor) -> Moments:
    finite = channel[channel.isfinite()]
    count, *figures = channel_moments(finite.unsqueeze(1))
    return Moments._make([count, *(f.item() for f in figures), channel.numel() - finite.numel()])
