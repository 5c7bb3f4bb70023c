"""Errors of the activations and their gradients, in ulp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from ulp_exact import ACTIVATIONS, DOUBLE, MULTIPLE, Exact, Pair, errors, to_multiple

from normfused.activations import ACTIVATION_PARAMS
from normfused.activations import ACTIVATIONS as OF_TORCH
from normfused.functional import batch_norm

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RANGES = {"|z| ≤ 5": 5.0, "|z| ≤ 1e9": 1e9}
# Smaller results are left out: there the exponential of float32 loses digits, or is 0.
LEAST = {torch.float64: 2.0**-1000, torch.float16: 0.0}  # else 2^-100
BLOCK = 1 << 18
# float32: exponents for which results are neither linear nor constant to within rounding. Elsewhere the sample is
# thinner.
CURVED, THINNER = range(-12, 7), 61

# The derivatives that are sums, whose terms can cancel.
SUMS = {"hardswish", "tanh", "silu", "gelu", "gelu_tanh"}

# name of an activation, z -> its output and its gradient
Function = Callable[[str, Tensor], tuple[Tensor, Tensor]]
Figures = dict[str, float]


class Sample(NamedTuple):
    """Which values are measured. Of 16-bit formats it is all."""

    every: int  # of float32, the bit patterns that this divides
    doubles: int  # the number of float64 values


# Each value of SMALL is one of FULL.
FULL, SMALL = Sample(every=61, doubles=4096), Sample(every=61 * 7, doubles=256)


def normfused(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation that changes no value before the activation."""
    z = z.detach().requires_grad_()
    wide = torch.promote_types(z.dtype, torch.float32)
    y = batch_norm(z.view(1, 1, -1), torch.zeros(1, dtype=wide), torch.ones(1, dtype=wide), eps=0.0, activation=name)
    return y.detach().view(-1), torch.autograd.grad(y, z, torch.ones_like(y))[0]


def torch_nn(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """torch's kernels."""
    z = z.detach().requires_grad_()
    y = F.silu(z) if name == "silu" else OF_TORCH[name](z, ACTIVATION_PARAMS.get(name, 0.0))
    return y.detach(), torch.autograd.grad(y, z, torch.ones_like(y))[0]


def _singles(every: int) -> Iterator[Tensor]:
    """Finite float32 values, in blocks that fit the cache."""
    parts = []
    for exponent in range(-127, 30):
        step = every if exponent in CURVED else every * THINNER
        first = exponent + 127 << 23
        patterns = torch.arange(-(-first // step) * step, first + (1 << 23), step, dtype=torch.int32)
        for part in patterns.split(BLOCK):
            parts.append(part)
            if sum(map(len, parts)) >= BLOCK:
                yield _with_both_signs(parts)
                parts = []
    yield _with_both_signs(parts)


def _with_both_signs(patterns: list[Tensor]) -> Tensor:
    magnitudes = torch.cat(patterns).view(torch.float32)
    return torch.cat([magnitudes, -magnitudes])


def _doubles(count: int) -> Tensor:
    """Half of them uniform in [-8, 8), half uniform in the exponent, from 2^-60 to 2^20."""
    generator = np.random.default_rng(0)
    uniform, exponents = generator.uniform(-8, 8, FULL.doubles), generator.uniform(-60, 20, FULL.doubles)
    halves = (part[: count // 2] for part in (uniform, np.exp2(exponents) * np.sign(uniform)))
    return torch.from_numpy(np.concatenate([*halves]))


def blocks(dtype: torch.dtype, sample: Sample) -> Iterator[Tensor]:
    if dtype == torch.float32:
        yield from _singles(sample.every)
    elif dtype == torch.float64:
        yield _doubles(sample.doubles)
    else:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        yield values[values.isfinite()]


def _exact(name: str, z: Tensor) -> Pair:
    function = ACTIVATIONS[name]
    return function(MULTIPLE, to_multiple(z)) if z.dtype == torch.float64 else function(DOUBLE, z.double())


def _figures(z: Tensor, got: Tensor, exact: Exact) -> Iterator[tuple[str, float]]:
    """The maximum errors, in ulp of the result or of its terms, in each range."""
    result = np.abs(np.asarray(exact.value)).astype(np.float64)
    has_digits = (result == 0) | (result >= LEAST.get(z.dtype, 2.0**-100))
    for measure, error in errors(got, exact)._asdict().items():
        for label, limit in RANGES.items():
            counted = has_digits & (z.double().abs().numpy() <= limit)
            yield f"{measure}, {label}", error[counted].max(initial=0).item()


def measure(functions: dict[str, Function], sample: Sample) -> dict[str, Figures]:
    """For each implementation the maximum errors."""
    results: dict[str, Figures] = {who: {} for who in functions}
    for dtype, name in itertools.product(FLOATS, ACTIVATIONS):
        for z in blocks(dtype, sample):
            exact = _exact(name, z)
            for who, function in functions.items():
                for what, got, want in zip(("output", "gradient"), function(name, z), exact, strict=True):
                    for label, figure in _figures(z, got, want):
                        key = f"{str(dtype)[6:]}, {name}, {what}, {label}"
                        results[who][key] = max(results[who].get(key, 0.0), figure)
    return results
