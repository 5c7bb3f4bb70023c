"""The named tuples that the channel statistics return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ChannelSums(NamedTuple):
    """Result of :func:`normfused.channel_sums`.

    Attributes:
        count: values per channel, an ``int``.
        sum: sum of the values, shape ``(C,)``; float64 for floating input, int64 for integers. So are all that follow.
        sum_of_squares: sum of their squares, shape ``(C,)``.
        min: minimum, shape ``(C,)``.
        max: maximum, shape ``(C,)``.

    Example:
        >>> import torch, normfused
        >>> sums = normfused.channel_sums(torch.tensor([[1, 2], [3, 4]]))
        >>> sums.count, sums.sum.tolist(), sums.sum_of_squares.tolist()
        (2, [4, 6], [10, 20])
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    sum: Tensor
    sum_of_squares: Tensor
    min: Tensor
    max: Tensor


class ChannelMoments(NamedTuple):
    """Result of :func:`normfused.channel_moments`.

    Attributes:
        count: values per channel, an ``int``.
        mean: mean, shape ``(C,)``, float64, as all that follow.
        m2: sum of squared deviations from the mean, shape ``(C,)``: ``m2 / count`` is the biased variance.
        min: minimum, shape ``(C,)``.
        max: maximum, shape ``(C,)``.

    Example:
        >>> import torch, normfused
        >>> moments = normfused.channel_moments(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.count, moments.mean.tolist(), moments.m2.tolist()
        (2, [2.0, 3.0], [2.0, 2.0])
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    m2: Tensor
    min: Tensor
    max: Tensor
