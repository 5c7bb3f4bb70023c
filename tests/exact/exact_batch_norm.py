"""Calls of batch norm with exact data, and their results. Shared by the tests in one and in several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from exact_data import (
    FAR,
    MOMENTUM,
    Statistics,
    assert_exact,
    nearest,
    running_average,
    statistics,
    tensor_of,
    to_tensor,
)
from torch import Tensor

from normfused.functional import batch_norm

SLOPE = Fraction(1, 4)  # of leaky ReLU
ACTIVATIONS: dict[str | None, Callable[[Fraction], Fraction]] = {
    None: lambda z: z,
    "relu": lambda z: max(z, Fraction(0)),
    "relu6": lambda z: min(max(z, Fraction(0)), Fraction(6)),
    "leaky_relu": lambda z: z if z > 0 else z * SLOPE,
}
_WEIGHTS = [Fraction(1), Fraction(-2), Fraction(1, 2), Fraction(-1)]
_BIASES = [Fraction(numerator, 4) for numerator in (1, -2, 3, 5, -7)]
PASSED, BLOCKED = [1, 2, 3, 5], [0, -1, -3, -4]  # inputs of an activation that pass the gradient, and that block it


@dataclass(frozen=True)
class Call:
    """What a call of batch norm does, apart from its tensors."""

    training: bool = True
    activation: str | None = None
    residual: bool = False
    inplace: bool = False
    correction: int = 1
    variance: int = 2  # of the whole batch
    invstd: Fraction = Fraction(1, 2)

    @property
    def eps(self) -> float:
        return float(1 / self.invstd**2 - self.variance)


@dataclass
class BatchNormData:
    """The tensors of a call with input (N, C, L), and its results."""

    call: Call
    input: Tensor
    grad_output: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    expected: dict[str, Tensor]
    mask: Tensor | None = None

    def laid_out(self, layout: Callable[[Tensor], Tensor], device: torch.device) -> BatchNormData:
        changes = {
            "input": layout(self.input.to(device)),
            "grad_output": layout(self.grad_output.to(device)),
            "residual": None if self.residual is None else layout(self.residual.to(device)),
        }
        parameters = ("weight", "bias", "running_mean", "running_var")
        return replace(self, **changes, **{name: getattr(self, name).to(device) for name in parameters})

    def check(self) -> None:
        """Runs forward and backward, and compares all results with the expected ones."""
        call, leaves = self.call, [self.input.detach().requires_grad_()]
        leaves += [tensor.clone().requires_grad_() for tensor in (self.weight, self.bias)]
        if self.residual is not None:
            leaves.append(self.residual.detach().requires_grad_())
        x, weight, bias, *residual = leaves
        buffers = self.running_mean.clone(), self.running_var.clone()
        output = batch_norm(
            x + torch.zeros_like(x) if call.inplace else x,  # an operation in place needs an input that is no leaf
            *buffers,
            weight,
            bias,
            call.training,
            float(MOMENTUM),
            call.eps,
            residual=residual[0] if residual else None,
            activation=call.activation,
            activation_param=float(SLOPE) if call.activation == "leaky_relu" else None,
            mask=self.mask,
            running_var_correction=call.correction,
            inplace=call.inplace,
        )
        got = {"output": output.detach().clone()}
        gradients = torch.autograd.grad(output, leaves, self.grad_output)
        got |= zip(("grad_input", "grad_weight", "grad_bias", "grad_residual"), gradients, strict=False)
        got |= {"running_mean": buffers[0], "running_var": buffers[1]}
        assert got.keys() == self.expected.keys()
        assert_exact(**{name: (got[name], self.expected[name]) for name in got})


@functools.cache
def make(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    call: Call,
    shuffled: bool = False,
) -> BatchNormData:
    """A call with input of shape (N, C, L)."""
    samples, channels, length = shape
    data = statistics(channels, [samples * length], shuffled, call.variance)
    return of_statistics(data, samples, dtype, parameter_dtype, call, far=shuffled)


def of_statistics(
    data: Statistics, samples: int, dtype: torch.dtype, parameter_dtype: torch.dtype, call: Call, far: bool
) -> BatchNormData:
    """The call whose channels have these statistics, and means near FAR or near 0."""
    channels, count = data.d.shape
    invstd, variance, generator = call.invstd, call.variance, data.generator
    channel, d = np.arange(channels)[:, None], data.d
    weight = [_WEIGHTS[c % len(_WEIGHTS)] for c in range(channels)]
    bias = [_BIASES[c % len(_BIASES)] for c in range(channels)]
    mean = generator.integers(-8, 9, channels).tolist()
    if far:
        mean = [FAR + 100 + abs(value) for value in mean]
    grad, alpha, beta = data.grad, data.alpha.tolist(), data.beta.tolist()

    if call.training:
        offset = [0] * channels
        old_mean, old_var = [value + 8 * (c % 3) for c, value in enumerate(mean)], [4 + c % 5 for c in range(channels)]
    else:  # statistics of which the mean is not that of the data
        offset = [c % 3 - 1 for c in range(channels)]
        old_mean, old_var = [value + offset[c] for c, value in enumerate(mean)], [variance] * channels

    def normalized(c: int, d: int) -> Fraction:
        return weight[c] * invstd * (d - offset[c]) + bias[c]

    passes = data.factor > 0
    target: np.ndarray | int = 0  # of the residual: the input of the activation
    if call.residual:
        blocked = [*BLOCKED, 6, 7] if call.activation == "relu6" else BLOCKED
        target = np.where(passes, generator.choice(PASSED, d.shape), generator.choice(blocked, d.shape))
        if call.activation == "leaky_relu":
            target = generator.choice(PASSED + BLOCKED, d.shape)
    elif call.activation in ("relu", "relu6"):  # blocks all values of every third channel, and none of the others
        bias = [Fraction(-8) if c % 3 == 2 else value + 4 - min(0, value) for c, value in enumerate(bias)]
        bias = [min(value, Fraction(5)) for value in bias]
        weight = [value / 4 for value in weight]
        is_blocked = (channel % 3 == 2).repeat(count, axis=1)
        grad, passes = np.where(is_blocked, 0, grad), ~is_blocked
        alpha, beta = ([0 if c % 3 == 2 else value for c, value in enumerate(values)] for values in (alpha, beta))

    def before_activation(c: int, d: int, target: int) -> Fraction:
        return Fraction(target) if call.residual else normalized(c, d)

    def grad_output(c: int, d: int, target: int, grad: int, passes: int) -> Fraction:
        if call.activation in ("relu", "relu6") and not passes:
            return Fraction(3)  # which does not reach the input
        return grad / SLOPE if call.activation == "leaky_relu" and before_activation(c, d, target) <= 0 else grad

    def grad_input(c: int, d: int, grad: int) -> Fraction:
        through_statistics = alpha[c] + d * invstd**2 * beta[c] * variance if call.training else 0
        return weight[c] * invstd * (grad - through_statistics)

    def arranged(function: Callable[..., Fraction], *arguments: object) -> Tensor:
        values = tensor_of(function, dtype, channel, *(np.broadcast_to(a, d.shape) for a in arguments))
        return values.view(channels, samples, count // samples).transpose(0, 1).contiguous()

    def parameter(values: list[Fraction]) -> Tensor:
        return to_tensor([nearest(value, parameter_dtype) for value in values], parameter_dtype)

    sums = [(a * count, (b * variance - o * a) * count) for a, b, o in zip(alpha, beta, offset, strict=True)]
    expected = {
        "output": arranged(lambda *at: ACTIVATIONS[call.activation](before_activation(*at)), d, target),
        "grad_input": arranged(grad_input, d, grad),
        "grad_weight": parameter([invstd * of_product for _, of_product in sums]),
        "grad_bias": parameter([Fraction(of_grad) for of_grad, _ in sums]),
        "running_mean": to_tensor(old_mean, parameter_dtype),
        "running_var": to_tensor(old_var, parameter_dtype),
    }
    if call.training:
        averages = [(1 - MOMENTUM) * old + MOMENTUM * new for old, new in zip(old_mean, mean, strict=True)]
        expected["running_mean"] = to_tensor(averages, parameter_dtype)
        expected["running_var"] = to_tensor(
            [running_average(Fraction(old), variance, count, parameter_dtype, call.correction) for old in old_var],
            parameter_dtype,
        )
    residual = None
    if call.residual:
        expected["grad_residual"] = arranged(lambda c, grad: Fraction(grad), grad)
        residual = arranged(lambda c, d, target: target - normalized(c, d), d, target)
    return BatchNormData(
        call,
        arranged(lambda c, d: Fraction(mean[c] + d), d),
        arranged(grad_output, d, target, grad, passes),
        residual,
        to_tensor(weight, parameter_dtype),
        to_tensor(bias, parameter_dtype),
        to_tensor(old_mean, parameter_dtype),
        to_tensor(old_var, parameter_dtype),
        expected,
    )
