"""Exact activations and norms, and errors in units in the last place: the references of ulp.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch
from torch import Tensor


class Exact(NamedTuple):
    """Exact values, and for each the sum of the absolute values of the terms that its formula adds."""

    value: Any
    terms: Any


def _product(value: Any) -> Exact:
    return Exact(value, abs(value))


def _sum(*terms: Any) -> Exact:
    return Exact(sum(terms), sum(abs(term) for term in terms))


def _power_of_two(exponent: Any) -> Any:
    return (exponent + 1023 << 52).view(np.float64)


def ulps(error: Any, at: Any, dtype: torch.dtype) -> Any:
    """Errors in units in the last place of `dtype` at the values `at`: the distance of the numbers around them."""
    limits = torch.finfo(dtype)
    exponent = (at.view(np.int64) >> 52 & 0x7FF) - 1023
    units = -np.maximum(exponent, int(math.log2(limits.smallest_normal))) - int(math.log2(limits.eps))
    return error * _power_of_two(units >> 1) * _power_of_two(units - (units >> 1))


def errors(got: Tensor, exact: Exact, dtype: torch.dtype | None = None) -> Exact:
    """The errors in ulp of the exact values, and in ulp of their terms. The ulp is that of `dtype`, or of `got`."""
    value, terms = (np.asarray(part) for part in exact)
    error = np.abs(got.detach().double().numpy() - value).astype(np.float64)
    of_value, of_terms = (ulps(error, part.astype(np.float64), dtype or got.dtype) for part in (value, terms))
    # A sum that cancels to 0 has no unit in the last place.
    return Exact(np.where((value == 0) & (terms != 0), 0, of_value), of_terms)


# ---- activations: z to the exact output and gradient, in either arithmetic ----

DOUBLE = SimpleNamespace(
    exp=torch.exp, expm1=torch.expm1, erfc=torch.special.erfc, where=torch.where, sqrt=math.sqrt, pi=math.pi
)
# 100 bits, in arrays of objects.
MULTIPLE = SimpleNamespace(
    exp=np.frompyfunc(mpmath.exp, 1, 1),
    expm1=np.frompyfunc(mpmath.expm1, 1, 1),
    erfc=np.frompyfunc(mpmath.erfc, 1, 1),
    where=np.where,
    sqrt=mpmath.sqrt,
    pi=mpmath.pi,
)
mpmath.mp.prec = 100
GELU_CUBE = 0.044715
Pair = tuple[Exact, Exact]


def to_multiple(values: Tensor) -> Any:
    return np.array([mpmath.mpf(value) for value in values.double().tolist()], dtype=object)


def _piecewise_linear(below: float, ceiling: float = math.inf) -> Callable[[Any, Any], Pair]:
    def activation(m: Any, z: Any) -> Pair:
        value = m.where(z < 0, z * below, m.where(z > ceiling, 0 * z + ceiling, z))
        slope = m.where(z <= 0, 0 * z + below, m.where(z >= ceiling, 0 * z, 0 * z + 1))
        return _product(value), _product(slope)

    return activation


def _elu(m: Any, z: Any) -> Pair:
    below = m.where(z > 0, 0 * z, z)
    return _product(m.where(z > 0, z, m.expm1(below))), _product(m.exp(below))


def _hardswish(m: Any, z: Any) -> Pair:
    inside, zero = abs(z) < 3, 0 * z
    value = m.where(inside, z * (z + 3) / 6, m.where(z > 0, z, zero))
    slope = m.where(inside, (2 * z + 3) / 6, m.where(z > 0, zero + 1, zero))
    return _product(value), Exact(slope, m.where(inside, (2 * abs(z) + 3) / 6, slope))


def _sigmoid_and_complement(m: Any, z: Any) -> tuple[Any, Any]:
    e = m.exp(-abs(z))
    smaller, larger = e / (1 + e), 1 / (1 + e)
    return m.where(z > 0, larger, smaller), m.where(z > 0, smaller, larger)


def _sigmoid(m: Any, z: Any) -> Pair:
    s, complement = _sigmoid_and_complement(m, z)
    return _product(s), _product(s * complement)


def _tanh(m: Any, z: Any) -> Pair:
    e = m.expm1(-2 * abs(z))
    t, (s, complement) = -e / (2 + e), _sigmoid_and_complement(m, 2 * z)
    return _product(m.where(z < 0, -t, t)), Exact(4 * s * complement, 1 + t * t)


def _silu(m: Any, z: Any) -> Pair:
    s, complement = _sigmoid_and_complement(m, z)
    return _product(z * s), _sum(s, z * (s * complement))


def _gelu(m: Any, z: Any) -> Pair:
    distribution, density = m.erfc(z * (-1 / m.sqrt(2))) / 2, m.exp(z * z * (-1 / 2)) / m.sqrt(2 * m.pi)
    return _product(z * distribution), _sum(distribution, z * density)


def _gelu_tanh(m: Any, z: Any) -> Pair:
    factor = m.sqrt(8 / m.pi)
    s, complement = _sigmoid_and_complement(m, factor * (z + GELU_CUBE * z * z * z))
    return _product(z * s), _sum(s, z * (s * complement) * (factor * (1 + 3 * GELU_CUBE * z * z)))


# With the default parameters.
ACTIVATIONS: dict[str, Callable[[Any, Any], Pair]] = {
    "relu": _piecewise_linear(0),
    "relu6": _piecewise_linear(0, 6),
    "leaky_relu": _piecewise_linear(0.01),
    "elu": _elu,
    "hardswish": _hardswish,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


# ---- norms, in long double ----


def to_wide(values: Tensor) -> Any:
    """The values as long double, which has 64 significant bits."""
    return values.detach().double().numpy().astype(np.longdouble)


def _slope_of(name: str | None, z: Any) -> tuple[Any, Any]:
    """An activation and its derivative."""
    if name is None:
        return z, np.ones_like(z)
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    assert name == "silu"
    s = 1 / (1 + np.exp(-z))
    return z * s, s + z * s / (1 + np.exp(z))


class Norm(NamedTuple):
    """A normalization of an array over `axes`, with parameters of a shape that broadcasts to the array's."""

    axes: tuple[int, ...]
    eps: float
    subtracts_mean: bool = True
    activation: str | None = None

    def statistics(self, x: Any) -> dict[str, Exact]:
        size = abs(x).mean(self.axes, keepdims=True)
        mean = x.mean(self.axes, keepdims=True) if self.subtracts_mean else 0 * size
        variance = ((x - mean) ** 2).mean(self.axes, keepdims=True)
        invstd = 1 / np.sqrt(variance + np.longdouble(self.eps))
        return {"mean": Exact(mean, size), "variance": _product(variance), "invstd": _product(invstd)}

    def results(self, x: Any, grad: Any, weight: Any, bias: Any, running: Sequence[Any] = ()) -> dict[str, Exact]:
        """Output and gradients. `running`: the mean and variance to use instead of those of `x`."""
        own = self.statistics(x)
        mean, variance = running or (own["mean"].value, own["variance"].value)
        invstd = 1 / np.sqrt(variance + np.longdouble(self.eps))
        d = (x - mean) * invstd
        y, slope = _slope_of(self.activation, d * weight + bias)
        g = grad * slope
        k = g * weight
        terms = [invstd * k]
        sizes = [abs(terms[0])]
        if not running:
            size = abs(k).mean(self.axes, keepdims=True), abs(k * d).mean(self.axes, keepdims=True)
            terms += [-invstd * d * (k * d).mean(self.axes, keepdims=True)]
            sizes += [invstd * abs(d) * size[1]]
            if self.subtracts_mean:
                terms += [-invstd * k.mean(self.axes, keepdims=True)]
                sizes += [invstd * size[0]]
        over = tuple(axis for axis, length in enumerate(weight.shape) if length == 1)
        return {
            "output": Exact(y, abs(d * weight) + abs(bias)),  # of an activation: the terms of its input
            "grad_input": Exact(sum(terms), sum(sizes)),
            "grad_weight": Exact((g * d).sum(over), abs(g * d).sum(over)),
            "grad_bias": Exact(g.sum(over), abs(g).sum(over)),
        }


def _window_sums(values: Any, left: int, right: int) -> Any:
    channels = values.shape[1]
    return np.stack([values[:, max(c - left, 0) : c + right + 1].sum(1) for c in range(channels)], 1)


def local_response_norm(x: Any, grad: Any, size: int, alpha: float, beta: float, k: float) -> Pair:
    """Output and gradient of the input."""
    left, right, scale = size // 2, (size - 1) // 2, np.longdouble(alpha) / size
    base = k + scale * _window_sums(x * x, left, right)
    factor = base ** -np.longdouble(beta)
    shares = grad * x * factor / base
    direct, slope = grad * factor, -2 * scale * beta * x
    size_of_rest = abs(slope) * _window_sums(abs(shares), right, left)
    gradient = direct + slope * _window_sums(shares, right, left)
    return _product(x * factor), Exact(gradient, abs(direct) + size_of_rest)
