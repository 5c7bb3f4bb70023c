"""Shared by the tests: tensors in every layout, the arguments of batch norm, and an oracle with an error bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Input dtype and dtype of parameters and buffers.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]

LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced", "expanded", "offset"]


def sample_id(value: object) -> str:
    """The id of a parameter. Shapes of many values are marked, for runs that are slow: ``-k "not many_values"``."""
    has_many = isinstance(value, tuple) and math.prod(value) > 10_000
    return f"many_values {value}" if has_many else str(value)


def dtype_id(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "-".join(dtype_id(v) for v in value)
    return str(value)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """`values` in another memory layout. "expanded" repeats the first sample."""
    unused = torch.nan if values.is_floating_point() else 77  # appears in the result if it is read
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":  # for any number of dimensions: (N, L, C).transpose(1, 2) and so on
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # dense, but neither channels first nor channels last
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        base = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), unused)
        view = base[..., 1::2]
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "offset":
        base = values.new_full((values.numel() + 3,), unused)
        return base[3:].view(values.shape).copy_(values)
    raise ValueError(layout)


def recording_subclass() -> tuple[type[Tensor], list[str]]:
    """A subclass of Tensor, and the names of the functions that its tensors were passed to."""
    calls: list[str] = []

    class Recording(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    return Recording, calls


@dataclass
class Arguments:
    """The tensors of one call of batch norm."""

    input: Tensor
    grad_output: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor


def make_arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    affine: bool = True,
) -> Arguments:
    channels = shape[1]
    to_parameter = {"dtype": parameter_dtype, "device": device}
    offset = (torch.arange(channels) % 5).view(-1, *[1] * (len(shape) - 2)) - 1.0
    return Arguments(
        input=lay_out((torch.randn(shape) * 1.5 + offset).to(device, dtype), layout),
        grad_output=lay_out(torch.randn(shape).to(device, dtype), grad_layout),
        weight=(torch.randn(channels) + 0.2).to(**to_parameter) if affine else None,
        bias=torch.randn(channels).to(**to_parameter) if affine else None,
        running_mean=torch.randn(channels).to(**to_parameter),
        running_var=(torch.rand(channels) + 0.5).to(**to_parameter),
    )


@dataclass
class Results:
    """The results of a forward and a backward pass. A gradient is None if the call has no such parameter."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor


def run(batch_norm, arguments: Arguments, training: bool, momentum: float = 0.1, eps: float = 1e-5) -> Results:
    """One forward and backward pass of a function with torch.nn.functional.batch_norm's signature."""
    x = arguments.input.detach().requires_grad_()
    parameters = [
        None if p is None else p.detach().clone().requires_grad_() for p in (arguments.weight, arguments.bias)
    ]
    buffers = arguments.running_mean.clone(), arguments.running_var.clone()
    y = batch_norm(x, *buffers, *parameters, training, momentum, eps)
    inputs = [x, *(p for p in parameters if p is not None)]
    grads = [*torch.autograd.grad(y, inputs, arguments.grad_output), None, None][:3]
    return Results(y.detach(), *grads, *buffers)


def _exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().astype(np.longdouble)


def assert_as_close_as_torch(
    ours: Results,
    theirs: Results,
    arguments: Arguments,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """The error of each of `ours` is at most 1.05 times that of `theirs`, plus 4 ulp of the natural scale.

    The true value is computed in long double from the same inputs. The natural scale is the sum of the absolute values
    of the terms: a sum that is rounded at each step has an error of some ulps of it. The mean is such a sum too. The
    ulp is that of the arithmetic, float32 or float64. Half an ulp of the dtype of the result is added for its final
    rounding.
    """
    x, g = _exact(arguments.input), _exact(arguments.grad_output)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [1, -1] + [1] * (x.ndim - 2)
    count = x.size // x.shape[1]
    old_mean, old_var = _exact(arguments.running_mean), _exact(arguments.running_var)
    w = np.ones_like(old_mean) if arguments.weight is None else _exact(arguments.weight)
    b = np.zeros_like(old_mean) if arguments.bias is None else _exact(arguments.bias)

    mean = x.mean(axes) if training else old_mean
    var = ((x - mean.reshape(shape)) ** 2).mean(axes) if training else old_var
    invstd = 1 / np.sqrt(var + np.longdouble(eps))
    d = (x - mean.reshape(shape)) * invstd.reshape(shape)
    scale = (w * invstd).reshape(shape)
    sums = g.sum(axes), (g * d).sum(axes)
    magnitudes = abs(g).sum(axes), abs(g * d).sum(axes)
    size_of_grad = abs(g)
    grad = g
    if training:
        grad = g - (sums[0].reshape(shape) + d * sums[1].reshape(shape)) / count
        size_of_grad = abs(g) + (magnitudes[0].reshape(shape) + abs(d) * magnitudes[1].reshape(shape)) / count
    m = np.longdouble(momentum) if training else np.longdouble(0)
    unbiased = var * count / (count - 1) if training else var
    size_of_mean = abs(x).mean(axes) if training else 0 * mean
    truths = {
        "output": (
            d * w.reshape(shape) + b.reshape(shape),
            abs(scale) * (abs(x - mean.reshape(shape)) + size_of_mean.reshape(shape)) + abs(b.reshape(shape)),
        ),
        "grad_input": (scale * grad, abs(scale) * size_of_grad),
        "grad_weight": (sums[1], magnitudes[1]),
        "grad_bias": (sums[0], magnitudes[0]),
        "running_mean": ((1 - m) * old_mean + m * mean, abs(old_mean) + m * abs(x).mean(axes)),
        "running_var": ((1 - m) * old_var + m * unbiased, old_var + m * unbiased),
    }
    arithmetic = torch.finfo(torch.promote_types(arguments.input.dtype, torch.float32)).eps
    for field in fields(Results):
        got, torch_got = getattr(ours, field.name), getattr(theirs, field.name)
        assert (got is None) == (torch_got is None), field.name
        if got is None:
            continue
        assert got.shape == torch_got.shape, field.name
        assert got.dtype == torch_got.dtype, field.name
        truth, magnitude = truths[field.name]
        tiny = torch.finfo(got.dtype).smallest_normal
        error, torch_error = (abs(_exact(t) - truth) / (magnitude + tiny) for t in (got, torch_got))
        torch_error[np.isnan(torch_error)] = np.inf
        bound = 1.05 * torch_error.max() + 4 * arithmetic + torch.finfo(got.dtype).eps / 2
        assert error.max() <= bound, f"{field.name}: {error.max():.3g}, torch's {torch_error.max():.3g}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
