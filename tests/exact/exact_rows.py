"""Calls of norms whose statistics are those of a sample or of a position, with exact data, and their results.

Everything is an array of shape (statistics, count). The weight of a value has an index: that of its channel, or of its
column. The gradient of the normalized value is that of ``Statistics``, and grad_output is its quotient by the weight,
a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from exact_batch_norm import ACTIVATIONS, BLOCKED, PASSED, SLOPE
from exact_data import FAR, Statistics, nearest, tensor_of, to_tensor
from torch import Tensor

INVSTD = Fraction(1, 2)
RMS_MEAN = 1  # of the input of RMS norm: mean(x^2) = RMS_MEAN^2 + variance
_WEIGHTS = [Fraction(1), Fraction(-2), Fraction(1, 2), Fraction(-1), Fraction(2)]
_BIASES = [Fraction(numerator, 4) for numerator in (1, -2, 3, 5, -7)]


@dataclass
class Rows:
    """Tensors of shape (statistics, count), parameters of shape (indices,), and the results."""

    eps: float
    input: Tensor
    grad_output: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    expected: dict[str, Tensor]


def rows_of(
    data: Statistics,
    index: np.ndarray,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    far: bool,
    activation: str | None = None,
    after: bool = False,
    rms: bool = False,
) -> Rows:
    """The call with these statistics. `index`: of the weight of each value; `after`: a residual after the norm."""
    d, generator, variance = data.d, data.generator, data.variance
    if rms:
        mean = np.full((len(d), 1), RMS_MEAN)
    else:
        mean = generator.integers(-8, 9, (len(d), 1)) + (FAR + 100 if far else 0)
    kind = index % len(_WEIGHTS)  # functions depend on it and not on the index, of which there can be many
    blocked = [*BLOCKED, 6, 7] if activation == "relu6" else BLOCKED
    passes = data.factor > 0
    target = np.where(passes, generator.choice(PASSED, d.shape), generator.choice(blocked, d.shape))

    def deviation(d: Any) -> Any:
        """What is multiplied with invstd."""
        return d + RMS_MEAN if rms else d

    def normalized(kind: int, d: int) -> Fraction:
        return _WEIGHTS[kind] * INVSTD * deviation(d) + (0 if rms else _BIASES[kind])

    def output(kind: int, d: int, target: int) -> Fraction:
        return ACTIVATIONS[activation](Fraction(target)) if after else normalized(kind, d)

    def grad_output(kind: int, grad: int, passes: int, target: int) -> Fraction:
        if activation in ("relu", "relu6") and not passes:
            return Fraction(3)  # which does not reach the input
        return grad / _WEIGHTS[kind] / (SLOPE if activation == "leaky_relu" and target <= 0 else 1)

    def grad_input(alpha: int, beta: int, d: int, grad: int) -> Fraction:
        of_mean = 0 if rms else alpha
        of_product = beta * variance + (RMS_MEAN * alpha if rms else 0)
        return INVSTD * (grad - of_mean - deviation(d) * INVSTD**2 * of_product)

    def parameter(values: list[Fraction], kinds: np.ndarray) -> Tensor:
        return to_tensor([values[kind] for kind in kinds], parameter_dtype)

    def grad_parameter(values: np.ndarray, factor: Fraction) -> Tensor:
        """The sums, for each index, of factor * values / weight. The values are integers: float64 holds their sums."""
        totals = np.bincount(index.ravel(), weights=values.ravel().astype(np.float64))
        return tensor_of(
            lambda total, kind: nearest(factor * total / _WEIGHTS[kind], parameter_dtype),
            parameter_dtype,
            totals.astype(np.int64),
            kinds,
        )

    kinds = np.arange(int(index.max()) + 1) % len(_WEIGHTS)
    return Rows(
        float(1 / INVSTD**2 - variance - (RMS_MEAN**2 if rms else 0)),
        tensor_of(lambda mean, d: Fraction(mean + d), dtype, mean, d),
        tensor_of(grad_output, dtype, kind, data.grad, passes, target),
        tensor_of(lambda kind, d, target: target - normalized(kind, d), dtype, kind, d, target)
        if after
        else tensor_of(Fraction, dtype, generator.integers(-3, 4, d.shape)),
        parameter(_WEIGHTS, kinds),
        parameter(_BIASES, kinds),
        {
            "output": tensor_of(output, dtype, kind, d, target),
            "grad_input": tensor_of(grad_input, dtype, data.alpha[:, None], data.beta[:, None], d, data.grad),
            "grad_residual": tensor_of(lambda kind, grad: grad / _WEIGHTS[kind], dtype, kind, data.grad),
            "grad_weight": grad_parameter(data.grad * deviation(d), INVSTD),
            "grad_bias": grad_parameter(data.grad, Fraction(1)),
        },
    )
