"""Group norm and instance norm of exact data: every result has the exact value, with tolerance 0."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import DTYPES, dtype_id, lay_out, sample_id
from exact_batch_norm import ACTIVATIONS, SLOPE
from exact_data import MOMENTUM, assert_exact, running_average, statistics, to_tensor
from exact_rows import rows_of
from torch import Tensor

import normfused
from normfused import functional

pytestmark = pytest.mark.usefixtures("needs_extension")

Shape = tuple[int, int, int, int]  # samples, groups, channels of a group, positions


def channels_last(tensor: Tensor) -> Tensor:
    return lay_out(tensor, "channels_last")


def check(
    shape: Shape,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    shuffled: bool,
    device: torch.device,
    activation: str | None = None,
    with_residual: bool = False,
    layouts: tuple[Callable[[Tensor], Tensor], ...] = (Tensor.contiguous, channels_last),
) -> None:
    samples, groups, width, length = shape
    channels = groups * width
    index = (np.arange(samples * channels * length) // length % channels).reshape(samples * groups, width * length)
    for seed in range(20):
        data = statistics(samples * groups, [width * length], shuffled, seed=seed)
        rows = rows_of(data, index, dtype, parameter_dtype, shuffled, activation, after=with_residual)
        if not shuffled or (rows.expected["grad_weight"] * rows.expected["grad_bias"]).all():
            break  # shuffled data are exact if no result is 0, and those of a channel can be
    expected = {
        name: value.view(samples, channels, length) if value.dim() == 2 else value
        for name, value in rows.expected.items()
        if with_residual or name != "grad_residual"
    }
    for layout in layouts:
        leaves = [
            layout(value.view(samples, channels, length).to(device)).requires_grad_()
            for value in (rows.input, *([rows.residual] if with_residual else []))
        ]
        x, *residual = leaves
        weight, bias = (value.to(device).requires_grad_() for value in (rows.weight.clone(), rows.bias.clone()))
        output = normfused.functional.group_norm(
            x,
            groups,
            weight,
            bias,
            rows.eps,
            residual=residual[0] if residual else None,
            activation=activation,
            activation_param=float(SLOPE) if activation == "leaky_relu" else None,
        )
        grad_output = layout(rows.grad_output.view(samples, channels, length).to(device))
        gradients = torch.autograd.grad(output, [x, weight, bias, *residual], grad_output)
        got = {"output": output}
        got |= zip(("grad_input", "grad_weight", "grad_bias", "grad_residual"), gradients, strict=False)
        assert got.keys() == expected.keys()
        assert_exact(**{name: (got[name], expected[name]) for name in got})


# Each comment names what changes there in csrc/kernels/cpu/plan.cpp: plan_rows() or, channels last, plan_columns().
SHAPES = [
    (3, 2, 3, 25),  # short rows
    (2, 4, 2, 49),
    (5, 3, 1, 17),  # instance norm
    (1, 2, 65, 401),  # more rows than one unit
    (1, 2, 4, 32_767),  # the largest group that is one part
    (1, 2, 4, 32_770),  # groups of several parts
    (2, 1, 3, 44_000),  # with rows of several
    (1, 32, 2, 4097),  # channels last: positions are divided
]


@pytest.mark.parametrize("shape", SHAPES, ids=sample_id)
def test_values_in_any_order(shape: Shape, device: torch.device) -> None:
    check(shape, torch.float32, torch.float32, True, device)


@pytest.mark.parametrize("shape", [(2, 4, 2, 64), (4, 8, 1, 32), (2, 2, 16, 256)], ids=sample_id)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=dtype_id)
def test_every_dtype(dtype: torch.dtype, parameter_dtype: torch.dtype, shape: Shape, device: torch.device) -> None:
    check(shape, dtype, parameter_dtype, False, device)


@pytest.mark.parametrize("shape", [(1, 2, 5, 26_216), (2, 3, 3, 30)], ids=sample_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_divided_groups(dtype: torch.dtype, shape: Shape) -> None:
    check(shape, dtype, torch.promote_types(dtype, torch.float32), False, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(activation: str | None, dtype: torch.dtype, device: torch.device) -> None:
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    check((2, 2, 2, 64), dtype, parameter_dtype, dtype == torch.float32, device, activation, True)


@pytest.mark.parametrize("layout", ["permuted", "sliced", "offset"])
def test_layouts(layout: str, device: torch.device) -> None:
    layouts = (lambda tensor: lay_out(tensor, layout),)
    check((3, 2, 3, 35), torch.float32, torch.float32, True, device, "relu", True, layouts)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int, thread_count: None) -> None:
    torch.set_num_threads(threads)
    for shape in ((1, 2, 4, 32_771), (3, 16, 3, 100)):
        check(shape, torch.float32, torch.float32, True, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_modulation(dtype: torch.dtype, device: torch.device) -> None:
    """scale and shift of each sample: powers of two less 1, and multiples of 1/4."""
    samples, channels, length = 3, 4, 32
    wide = torch.promote_types(dtype, torch.float32)
    data = statistics(samples * channels, [length], False)
    index = np.arange(samples * channels)[:, None].repeat(length, axis=1)  # a weight for each sample
    rows = rows_of(data, index, dtype, wide, False)
    x, grad = (value.view(samples, channels, length).to(device) for value in (rows.input, rows.grad_output))
    scale, shift = (value.view(samples, channels).to(device) for value in (rows.weight - 1, rows.bias))
    leaves = [value.requires_grad_() for value in (x, scale, shift)]
    output = functional.instance_norm(x, eps=rows.eps, scale=scale, shift=shift)
    got = dict(zip(("grad_input", "grad_weight", "grad_bias"), torch.autograd.grad(output, leaves, grad), strict=True))
    got["output"] = output
    assert_exact(**{name: (value.flatten(), rows.expected[name].flatten()) for name, value in got.items()})


def test_running_statistics_of_instance_norm(device: torch.device) -> None:
    """The running statistics are those of each sample, averaged over two of them."""
    count, samples, channels = 64, 2, 3
    rows = rows_of(
        statistics(samples * channels, [count], False), np.zeros((6, count), int), torch.float64, torch.float64, False
    )
    x = rows.input.view(samples, channels, count)
    means = [[Fraction(x[n, c].sum().item()) / count for n in range(samples)] for c in range(channels)]
    buffers = [torch.full((channels,), value, dtype=torch.float64, device=device) for value in (4, 8)]
    functional.instance_norm(x.to(device), *buffers, momentum=float(MOMENTUM), eps=rows.eps)
    mean = [(1 - MOMENTUM) * 4 + MOMENTUM * sum(values) / samples for values in means]
    variance = running_average(Fraction(8), 2, count, torch.float64)
    assert_exact(
        running_mean=(buffers[0], to_tensor(mean, torch.float64)),
        running_var=(buffers[1], to_tensor([variance] * channels, torch.float64)),
    )
