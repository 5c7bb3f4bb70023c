"""How often each value occurs, and quantiles of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from normfused import _extension, reference

_MAX_COUNT = 2**53  # sums of two such counts do not overflow int64, and are exact in float64


def _within_range(counts: np.ndarray) -> np.ndarray:
    return counts if counts.sum() < _MAX_COUNT else counts.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Histogram:
    """The values that occur in a channel, and how often.

    Integers from -2^15 to 2^16 - 1 are exact. Larger ones and floating values are rounded to 11 significant bits, a
    relative error of at most 1/2048; so float16, bfloat16 and floating values that are integers up to 2048 are exact.
    NaN and infinities are left out. Objects are equal (``==``) if they hold the same numbers.

    Attributes:
        values: ascending, shape (K,), float64.
        counts: of each value, shape (K,), int64; float64 if images have weights that are not integers, or that are so
            large that the sum of all counts exceeds 2^53.

    Source: buckets of constant relative width, of which any two sets can be merged, as in Masson, Rim and Lee, 2019,
    "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees".
    """

    values: np.ndarray
    counts: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return np.array_equal(self.values, other.values) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]  # arrays can change

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values."""
        if np.array_equal(self.values, other.values):
            return Histogram(self.values, _within_range(self.counts + other.counts))
        values = np.union1d(self.values, other.values)
        counts = np.zeros(len(values), np.result_type(self.counts, other.counts))
        for histogram in (self, other):
            counts[np.searchsorted(values, histogram.values)] += histogram.counts
        return Histogram(values, _within_range(counts))

    def weighted(self, weight: int | Fraction) -> Histogram:
        """The histogram with all counts times ``weight``."""
        if isinstance(weight, int) and weight * int(self.counts.sum()) < _MAX_COUNT:
            return Histogram(self.values, self.counts * weight)
        return Histogram(self.values, self.counts * float(weight))

    def scaled(self, scale: float) -> Histogram:
        """The histogram of the values times ``scale``, a positive number."""
        return Histogram(self.values * scale, self.counts)

    def quantiles(self, q: Sequence[float], low: float, high: float) -> np.ndarray:
        """The quantiles of these values, of which ``low`` and ``high`` are the exact minimum and maximum, float64.

        They are those of ``numpy.quantile``: between two values by linear interpolation; with fractional counts the
        smallest value at which the share of the counts up to it reaches ``q``, its method "inverted_cdf".
        """
        wanted, ends = np.asarray(q, np.float64), np.cumsum(self.counts)
        if len(ends) == 0:
            return np.full(len(wanted), np.nan)
        if self.counts.dtype.kind == "f":
            found = self.values[np.searchsorted(ends / ends[-1], wanted)]
            return np.clip(np.where(wanted == 0, low, np.where(wanted == 1, high, found)), low, high)
        last = int(ends[-1]) - 1

        def at(rank: np.ndarray) -> np.ndarray:
            values = self.values[np.searchsorted(ends, rank, side="right")]
            return np.clip(np.where(rank <= 0, low, np.where(rank >= last, high, values)), low, high)

        position = wanted * last
        before = np.floor(position)
        share = position - before
        below, above = at(before), at(np.minimum(before + 1, last))
        with np.errstate(over="ignore", invalid="ignore"):
            distance = above - below
            # As numpy.quantile rounds it.
            result = np.where(share < 0.5, below + distance * share, above - distance * (1 - share))
        return np.where(np.isfinite(distance), result, below * (1 - share) + above * share)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as lists, for JSON."""
        return {"values": self.values.tolist(), "counts": self.counts.tolist()}

    @classmethod
    def from_dict(cls, lists: Mapping[str, Any]) -> Histogram:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: lists of another kind.
        """
        if any(type(number) not in (int, float) for name in ("values", "counts") for number in lists[name]):
            raise TypeError("a histogram consists of numbers")
        values, counts = np.array(lists["values"], np.float64), np.array(lists["counts"])
        if counts.dtype.kind != "f":
            counts = counts.astype(np.int64)
        is_ascending = np.isfinite(values).all() and (values[1:] > values[:-1]).all()
        if len(values) != len(counts) or not is_ascending or not (np.isfinite(counts) & (counts >= 0)).all():
            raise ValueError("a histogram has ascending values, and for each of them a count")
        return cls(values, counts)


def check_quantiles(q: Any) -> tuple[float, ...]:
    """``q`` as a tuple.

    Raises:
        ValueError: it is not a sequence of numbers from 0 to 1.
    """
    try:
        numbers = tuple(float(number) for number in q)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"quantiles must be a sequence of numbers from 0 to 1, got {q!r}")
    return numbers


def histograms_of(x: Tensor) -> tuple[Histogram, ...]:
    """The histogram of each channel of a tensor of shape (N, C, ...), before any scaling."""
    count = _extension.C.value_counts if _extension.C is not None and x.is_cpu else reference.value_counts
    values, counts, sizes = count(x.detach())
    values, counts = values.cpu().numpy(), counts.cpu().numpy()
    ends = np.cumsum(sizes.cpu().numpy())[:-1]
    return tuple(map(Histogram, np.split(values, ends), np.split(counts, ends)))
