"""The statistics of single channels: exact sums of integers, and moments of floating values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from normfused import _extension, reference
from normfused.data.histogram import Histogram, histograms_of
from normfused.functional import channel_moments
from normfused.layout import values_per_channel

_MAX_VALUES = 2**29  # per channel, in one call of the kernel

Weight = int | Fraction
_INT64 = 2**63
_MOST = 2**127  # values of one channel: 2^63 of them, with the largest weight
_LEAST = 2.0**-64  # of the weights: with others the sums of squares of int64 can exceed float64


class Sums(NamedTuple):
    """Exact sums of the integers of one channel, before any scaling; Fractions if images have such weights."""

    count: Weight  # type: ignore[assignment]  # hides tuple.count
    sum: Weight
    sum_of_squares: Weight
    min: int
    max: int
    histogram: Histogram | None = None

    def merge(self, other: Sums) -> Sums:
        """The sums of both sets of values."""
        return Sums(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_of_squares + other.sum_of_squares,
            min(self.min, other.min),
            max(self.max, other.max),
            _merged_histograms(self.histogram, other.histogram),
        )

    def weighted(self, weight: Weight) -> Sums:
        """The sums if each value occurred ``weight`` times."""
        return self._replace(
            count=self.count * weight,
            sum=self.sum * weight,
            sum_of_squares=self.sum_of_squares * weight,
            histogram=self.histogram and self.histogram.weighted(weight),
        )

    def moments(self, scale: float) -> Moments:
        """The moments of the values times ``scale``. The subtraction is of exact numbers, so nothing cancels."""
        if self.count == 0:
            return NO_VALUES._replace(histogram=self.histogram)
        std = math.sqrt(self.count * self.sum_of_squares - self.sum**2) / self.count * scale
        mean, histogram = self.sum / self.count * scale, self.histogram and self.histogram.scaled(scale)
        return Moments(self.count, mean, std, self.min * scale, self.max * scale, 0, histogram)


class Moments(NamedTuple):
    """Moments of the finite floating values of one channel, and the number of values that are not finite.

    They hold the standard deviation, because the squares of float64 values can overflow and underflow float64.
    """

    count: Weight  # type: ignore[assignment]  # hides tuple.count
    mean: float
    std: float
    min: float
    max: float
    nonfinite: int = 0
    histogram: Histogram | None = None

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values. Source: Chan, Golub and LeVeque, 1983."""
        count = self.count + other.count
        mine, others = float(self.count / (count or 1)), float(other.count / (count or 1))
        unit = 1.0 if math.isfinite(other.mean - self.mean) else 2.0  # in units of 2 the difference does not overflow
        delta = other.mean / unit - self.mean / unit
        deviations = self.std / unit * math.sqrt(mine), other.std / unit * math.sqrt(others)
        return Moments(
            count,
            unit * (self.mean / unit + delta * others),
            unit * math.hypot(*deviations, delta * math.sqrt(mine * others)),
            min(self.min, other.min),
            max(self.max, other.max),
            self.nonfinite + other.nonfinite,
            _merged_histograms(self.histogram, other.histogram),
        )

    def weighted(self, weight: Weight) -> Moments:
        """The moments if each value occurred ``weight`` times."""
        return self._replace(count=self.count * weight, histogram=self.histogram and self.histogram.weighted(weight))

    def scaled(self, scale: float) -> Moments:
        """The moments of the values times ``scale``."""
        return self._replace(
            mean=self.mean * scale,
            std=self.std * scale,
            min=self.min * scale,
            max=self.max * scale,
            histogram=self.histogram and self.histogram.scaled(scale),
        )


def _merged_histograms(mine: Histogram | None, other: Histogram | None) -> Histogram | None:
    return mine.merge(other) if mine is not None and other is not None else None


NO_SUMS = Sums(0, 0, 0, 2**63 - 1, -(2**63))
NO_VALUES = Moments(0, 0.0, 0.0, math.inf, -math.inf)

Record = TypeVar("Record", Sums, Moments)


def merged(mine: tuple[Record, ...], others: tuple[Record, ...]) -> tuple[Record, ...]:
    """The records of each channel merged; no records at all if there are no values of this kind."""
    if not mine or not others:
        return mine or others
    return tuple(a.merge(b) for a, b in zip(mine, others, strict=True))


def to_dict(record: Sums | Moments) -> dict[str, Any]:
    """The fields, for JSON: Fractions as strings, and of a channel without values None for the infinite extremes."""
    fields: dict[str, Any] = record._asdict()
    fields = {name: str(value) if isinstance(value, Fraction) else value for name, value in fields.items()}
    if record.count == 0:
        fields |= {"min": None, "max": None}
    return fields | {"histogram": record.histogram and record.histogram.to_dict()}


def from_dict(fields: Mapping[str, Any], empty: Record) -> Record:
    """The inverse of :func:`to_dict`. ``empty`` is the record of a channel without values.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: fields that no images have.
    """
    values: dict[str, Any] = dict(fields)
    if values.keys() != set(empty._fields):
        raise ValueError(f"fields {', '.join(values)} instead of {', '.join(empty._fields)}")
    values |= {name: _fraction(value) for name, value in fields.items() if isinstance(value, str)}
    if values["count"] == 0:
        values |= {"min": empty.min, "max": empty.max}
    if values["histogram"] is not None:
        values["histogram"] = Histogram.from_dict(values["histogram"])
    record = type(empty)(**values)
    _check_record(record)
    return record


def _fraction(text: str) -> Fraction:
    # Fraction() also accepts exponents, with which a few characters stand for a number that fills the memory.
    if not re.fullmatch(r"-?[0-9]+(/[0-9]+)?", text):
        raise ValueError(f"{text!r} is no fraction")
    return Fraction(text)


def _check_record(record: Sums | Moments) -> None:
    """Raise ``ValueError`` unless there are values with this record."""
    figures = record._asdict()
    histogram = figures.pop("histogram")
    floating = {"mean", "std", "min", "max"} if isinstance(record, Moments) else set()
    weights = {"count", "sum", "sum_of_squares"}
    for name, value in figures.items():
        kinds = (int, float) if name in floating else (int, Fraction) if name in weights else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r}")
    if isinstance(record, Moments):
        possible = math.isfinite(record.mean) and 0 <= record.std < math.inf and 0 <= record.nonfinite < _INT64
        possible = possible and (record.count == 0 or -math.inf < record.min <= record.max < math.inf)
    else:
        largest = record.count * max(record.min**2, record.max**2)
        possible = record.sum**2 <= record.count * record.sum_of_squares <= record.count * largest
        possible = possible and record.count * record.min <= record.sum <= record.count * record.max
        possible = possible and min(record.min, record.max) >= -_INT64 and max(record.min, record.max) < _INT64
    if not possible or not 0 <= record.count <= _MOST:
        raise ValueError(f"no values have {figures}")
    if histogram is not None and histogram.counts.dtype.kind == "i" and sum(histogram.counts.tolist()) != record.count:
        raise ValueError(f"a histogram of other than {record.count} values")


def check_weights(weights: Any, count: int) -> list[Weight]:
    """One weight for each of ``count`` images, exact.

    Raises:
        ValueError: other values, or another number of them.
    """
    values = weights.tolist() if isinstance(weights, (Tensor, np.ndarray)) else weights
    numbers = [values] if isinstance(values, (int, float)) else list(values)
    if len(numbers) != count:
        raise ValueError(f"weights must hold a number for each of {count} images, got {len(numbers)}")
    for number in numbers:
        if not isinstance(number, (int, float, Fraction)) or not (number == 0 or _LEAST <= number <= 1 / _LEAST):
            raise ValueError(f"weights must be 0, or numbers from 2^-64 to 2^64, got {number!r}")
    fractions = map(Fraction, numbers)
    return [int(number) if number.denominator == 1 else number for number in fractions]


def records_of(x: Tensor, with_histograms: bool) -> tuple[Any, ...]:
    """The sums of each channel of integers, the moments of each channel of floating values, of shape (N, C, ...)."""
    if (with_histograms or not x.is_floating_point()) and values_per_channel(x) > _MAX_VALUES:
        longest = max((size, dim) for dim, size in enumerate(x.shape) if dim != 1)[1]
        first, second = (records_of(half, with_histograms) for half in x.chunk(2, longest))
        return merged(first, second)
    if with_histograms and x.dtype in (torch.uint8, torch.int8, torch.int16):
        return tuple(map(_sums_of, histograms_of(x)))
    records = _float_moments(x) if x.is_floating_point() else _integer_sums(x)
    if with_histograms:
        records = tuple(record._replace(histogram=h) for record, h in zip(records, histograms_of(x), strict=True))
    return records


def _integer_sums(x: Tensor) -> tuple[Any, ...]:
    sums = reference.integer_sums if _extension.C is None else _extension.C.integer_sums
    channels = sums(x.detach()).T.tolist()
    return tuple(Sums(values_per_channel(x), _joined(c[:2]), _joined(c[2:6]), *c[6:]) for c in channels)


def _sums_of(histogram: Histogram) -> Sums:
    """The sums of integers of up to 16 bits, whose histogram is exact; of up to 2^29 of them int64 holds the sums."""
    values, counts = histogram.values.astype(np.int64), histogram.counts
    if not len(values):
        return NO_SUMS._replace(histogram=histogram)
    count, total, squares = (int((counts * values**power).sum()) for power in range(3))
    return Sums(count, total, squares, int(values[0]), int(values[-1]), histogram)


def _joined(digits: list[int]) -> int:
    """The number with these digits in base 2^32."""
    return sum(digit << 32 * k for k, digit in enumerate(digits))


def _float_moments(x: Tensor) -> tuple[Any, ...]:
    count, *figures = channel_moments(x)
    finite = torch.stack(figures).isfinite().all()
    mean, m2, low, high = (figure.tolist() for figure in figures)
    if not finite or not all(_has_squares(*extremes) for extremes in zip(low, high, strict=True)):
        return tuple(_extreme_moments(channel) for channel in x.unbind(1))
    std = [math.sqrt(value / count) for value in m2]
    return tuple(Moments(count, *values) for values in zip(mean, std, low, high, strict=True))


def _has_squares(low: float, high: float) -> bool:
    """Whether squares of values from ``low`` to ``high``, and of their deviations, are within the range of float64."""
    return low == high or (high - low > 2.0**-500 and max(-low, high) < 2.0**500)


def _extreme_moments(channel: Tensor) -> Moments:
    """The moments of the finite values of one channel, of any magnitude."""
    finite = channel[channel.isfinite()]
    count, nonfinite = finite.numel(), channel.numel() - finite.numel()
    if count == 0:
        return NO_VALUES._replace(nonfinite=nonfinite)
    low, high = (extreme.item() for extreme in finite.aminmax())
    # Multiplication by a power of two is exact, or loses what is negligible compared with the largest value.
    unit = 1.0 if _has_squares(low, high) else 2.0 ** (600 if high - low > 1 else -600)
    _, mean, m2, *_ = channel_moments((finite / unit).unsqueeze(1))
    return Moments(count, mean.item() * unit, math.sqrt(m2.item() / count) * unit, low, high, nonfinite)
