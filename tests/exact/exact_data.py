"""Data for which every result of a norm is a number of few bits, and these results in integers and fractions.

A statistic, such as a channel of batch norm, has ``count`` values x = mean + d with integers d such that

    sum(d) = 0,    sum(d^2) = variance * count,    |d| <= 3,

so mean and biased variance are integers. Tests choose eps = 4^k - variance: invstd = 2^-k. The gradient g consists of
integers f * (alpha + beta * d) + h, where the integers f and h are the same for d and -d, and their sums over the
values of each |d| are those of f = 1 and h = 0. Hence

    sum(g) = alpha * count,    sum(g * d) = beta * variance * count,

and the means that backward subtracts are integers too. g is 0 where f is 0: there an activation may block the gradient.
Means, weights, biases and momentum are small multiples of powers of two. ``Statistics`` checks these equations.

**Why the results are exact.** Kernels sum deviations from a pivot in S, which is float64 for float64 and otherwise
float32, and finish in float64. Integers below 2^24 are exact in S. Two kinds of order keep all sums integers:

*Paired.* Values 2i and 2i + 1 are mean + d and mean - d; an odd count ends with the mean. A range that begins at an
even position then has the mean of the whole, if its length is even or it reaches the end. CPU kernels take as pivot the
mean of such a range, which is the mean of the statistic; all parts have this mean too, so merging them adds zeros. The
ranges begin at odd positions if splits have an odd number of positions, or if rows that are reduced in lanes have an
odd number and at least 16 are read together: the tests use other shapes. A CUDA kernel takes the pivot from a few
values that a thread reads. It is a number of few bits if these are a power of two: the tests use such shapes.

*Shuffled*, of float32 only. The mean is near 2^23, where neighbouring floats differ by 1. So any pivot is an integer,
and sums in S are exact, for any order, split, layout, alignment and number of threads, on the CPU and on CUDA. Only
steps in float64 are rounded, to a relative error of 2^-40 at most, and the float32 that is nearest to a result is the
exact value. That is not 0, where the error would remain: biases, alpha and beta are not.

Variances with Bessel's correction are quotients count / (count - 1): see ``running_average``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

import normfused

FAR = 1 << 23  # the least number whose neighbours in float32 differ by 1
MOMENTUM = Fraction(1, 4)


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The value of the dtype that is nearest to a number: ties to even. Precondition: it is a normal number."""
    if value == 0:
        return value
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent += (magnitude >= Fraction(2) ** exponent) - bits
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


def to_tensor(values: Sequence[Fraction | int], dtype: torch.dtype) -> Tensor:
    """These numbers, which must be values of the dtype."""
    result = torch.tensor([float(value) for value in values], dtype=torch.float64).to(dtype)
    for value, rounded in zip(values, result.double().tolist(), strict=True):
        assert value == Fraction(rounded), f"{value} is not a {dtype}"
    return result


def tensor_of(function: Callable[..., Fraction], dtype: torch.dtype, *arguments: Any) -> Tensor:
    """The tensor of function(a[i], b[i], ...), in fractions, for integer arrays that are broadcast."""
    arrays = np.broadcast_arrays(*(np.asarray(argument, dtype=np.int64) for argument in arguments))
    lows, sizes = [int(array.min()) for array in arrays], [int(np.ptp(array)) + 1 for array in arrays]
    # A number for each combination of arguments: the function is called once for each that occurs.
    number = np.ravel_multi_index([array - low for array, low in zip(arrays, lows, strict=True)], sizes)
    table = torch.zeros(math.prod(sizes), dtype=dtype)
    occurs = np.flatnonzero(np.bincount(number.ravel()))
    combinations = zip(*(i + low for i, low in zip(np.unravel_index(occurs, sizes), lows, strict=True)), strict=True)
    table[occurs] = to_tensor([function(*map(int, values)) for values in combinations], dtype)
    return table[torch.from_numpy(number)]


def assert_exact(**results: tuple[Tensor | None, Tensor]) -> None:
    """Each result has the dtype, the shape and the values of the expected one."""
    for name, (got, expected) in results.items():
        assert got is not None, name
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        got = got.detach().cpu()
        if not torch.equal(got, expected):
            wrong = (got != expected).nonzero()
            place = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name}: {len(wrong)} of {got.numel()} values differ, first {list(place)}: "
                f"got {got[place].item()!r}, expected {expected[place].item()!r}"
            )


def _magnitudes(pairs: int, total: int) -> np.ndarray:
    """`pairs` integers from 0 to 3 whose squares add up to `total`."""
    for threes in range(3):
        rest = total - pairs - 8 * threes  # what 2 instead of 1 adds 3 to, and 0 instead of 1 subtracts 1 from
        twos = -(-rest // 3)
        zeros = 3 * twos - rest
        if rest >= 0 and threes + twos + zeros <= pairs:
            ones = pairs - threes - twos - zeros
            return np.repeat([3, 2, 0, 1], [threes, twos, zeros, ones])
    raise ValueError(f"{total} is not a sum of {pairs} squares of integers up to 3")


@dataclass
class Statistics:
    """The integers d, g and f of several statistics, as arrays of shape (statistics, count)."""

    d: np.ndarray
    grad: np.ndarray
    factor: np.ndarray
    alpha: np.ndarray  # (statistics,)
    beta: np.ndarray
    variance: int
    generator: np.random.Generator

    def __post_init__(self) -> None:
        count = self.d.shape[1]
        assert not self.d.sum(1).any()
        assert (np.square(self.d).sum(1) == self.variance * count).all()
        assert (self.grad.sum(1) == self.alpha * count).all()
        assert ((self.grad * self.d).sum(1) == self.beta * self.variance * count).all()
        assert not self.grad[self.factor == 0].any()


def _part(
    generator: np.random.Generator, number: int, count: int, variance: int, shuffled: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers d, f and h, in a random order of pairs, or shuffled."""
    pairs = count // 2
    magnitude = _magnitudes(pairs, variance * count // 2)
    factor, addend = np.ones_like(magnitude), np.zeros_like(magnitude)
    for value in range(4):
        (same,) = np.nonzero(magnitude == value)
        for pattern, array in (([2, 2, 0, 0], factor), ([1, -1, 0, 0], addend)):
            array[same[: len(same) // 4 * 4]] = np.resize(pattern, len(same) // 4 * 4)
    order = generator.permuted(np.tile(np.arange(pairs), (number, 1)), axis=1)
    d = generator.choice([-1, 1], (number, pairs)) * magnitude[order]
    results = []
    for first, second, last in ((d, -d, 0), (factor[order], factor[order], 1), (addend[order], addend[order], 0)):
        values = np.stack((first, second), axis=-1).reshape(number, 2 * pairs)
        results.append(np.pad(values, ((0, 0), (0, count % 2)), constant_values=last))
    if shuffled:
        places = generator.permuted(np.tile(np.arange(count), (number, 1)), axis=1)
        results = [np.take_along_axis(values, places, axis=1) for values in results]
    d, factors, addends = results
    return d, factors, addends


def statistics(
    number: int,
    counts: Sequence[int],
    shuffled: bool,
    variance: int = 2,
    shifts: Sequence[int] | None = None,
    seed: int = 0,
) -> Statistics:
    """Statistics of sum(counts) values each, in parts of this variance. `shifts`: their means less that of all."""
    generator = np.random.default_rng(seed)
    shifts = [0] * len(counts) if shifts is None else shifts
    between = sum(count * shift**2 for count, shift in zip(counts, shifts, strict=True))
    assert between % sum(counts) == 0
    parts = [_part(generator, number, count, variance, shuffled) for count in counts]
    d = np.concatenate([part[0] + shift for part, shift in zip(parts, shifts, strict=True)], axis=1)
    factor, addend = (np.concatenate([part[k] for part in parts], axis=1) for k in (1, 2))
    alpha, beta = generator.choice([-2, -1, 1, 2], (number, 1)), generator.choice([-1, 1], (number, 1))
    grad = factor * (alpha + beta * d) + addend
    return Statistics(d, grad, factor, alpha[:, 0], beta[:, 0], variance + between // sum(counts), generator)


def running_average(old: Fraction, variance: int, count: int, dtype: torch.dtype, correction: int = 1) -> Fraction:
    """running_var after a batch. The corrected variance is the float64 nearest to the quotient, and the average, of
    which the products with momentum 1/4 are exact, is rounded to float64 and to the dtype.
    """
    corrected = nearest(Fraction(variance * count, count - correction), torch.float64)
    average = nearest((1 - MOMENTUM) * old + MOMENTUM * corrected, torch.float64)
    return nearest(average, dtype)


def on_cuda(device: torch.device) -> bool:
    """Whether CUDA kernels run: on a GPU, or in the simulator of ``host_cuda/``."""
    return device.type == "cuda" or normfused.info()["cpu_capability"] == "cuda"
