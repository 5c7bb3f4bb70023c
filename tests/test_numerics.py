"""Accuracy in hard cases, in which fast formulas lose digits. Runs on the fallback too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import assert_same_bits, dtype_id, lay_out
from torch import Tensor
from torch.nn import functional as F

import normfused
from normfused import reference
from normfused.functional import batch_norm

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and unbiased variance of a training forward pass."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = (torch.zeros(x.size(1), device=x.device, dtype=dtype) for _ in range(2))
    y = batch_norm(x, mean, var, training=True, momentum=1.0, eps=eps)
    return y, mean, var


@layouts
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(2, 2, 500_000), (100_000, 10), (64, 8, 49), (3, 5)], ids=str)
def test_variance_with_a_large_mean(device: torch.device, shape: tuple[int, ...], ratio: float, layout: str) -> None:
    sign = torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0).view(-1, *[1] * (len(shape) - 2))
    x = lay_out((torch.randn(shape) + ratio * sign).to(device), layout)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    exact_var, exact_mean = torch.var_mean(x.double(), axes)
    y, mean, var = statistics(x)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    moments = normfused.channel_moments(x)
    biased = torch.var(x.double(), axes, correction=0)
    torch.testing.assert_close(moments.m2 / moments.count, biased, rtol=1e-5, atol=0)
    # A CUDA thread sums some hundred deviations in float before they are merged in double.
    cuda = device.type == "cuda" or normfused.info()["cpu_capability"] == "cuda"
    torch.testing.assert_close(moments.mean, exact_mean, rtol=1e-10 if cuda else 1e-12, atol=0)
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", [(7, 6), (64, 6, 7, 7), (3, 6, 333), (2, 6, 70_001)], ids=str)
def test_constant_channel(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    constants = torch.tensor([0.0, 1.0, 0.1, -1e4, 1 / 3, 6e-5]).to(device, dtype)
    x = constants.view(-1, *[1] * (len(shape) - 2)).expand(shape)
    x = lay_out(x, layout)
    dtype_of_buffers = torch.promote_types(dtype, torch.float32)
    mean, var = (torch.zeros(6, device=device, dtype=dtype_of_buffers) for _ in range(2))
    weight, bias = (torch.randn(6).to(device, dtype_of_buffers) for _ in range(2))
    y = batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0)
    assert_same_bits(var, torch.zeros_like(var))
    assert_same_bits(mean, constants.to(mean.dtype))
    assert torch.equal(y, bias.to(dtype).view(-1, *[1] * (len(shape) - 2)).expand(shape))
    moments = normfused.channel_moments(x)
    assert torch.equal(moments.m2, torch.zeros_like(moments.m2))
    assert torch.equal(moments.mean, constants.double())


def test_three_consecutive_numbers(device: torch.device) -> None:
    x = torch.tensor([[10000.0], [10001.0], [10002.0]], device=device)
    y, mean, var = statistics(x, eps=0.0)
    assert mean.item() == 10001
    assert var.item() == 1
    moments = normfused.channel_moments(x)
    assert (moments.m2 / moments.count).sqrt().item() == pytest.approx(0.816497, abs=5e-7)
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)


@layouts
def test_half_precision_does_not_overflow(device: torch.device, layout: str) -> None:
    x = lay_out(torch.full((1000, 1, 1000), 200.0, device=device, dtype=torch.float16), layout)
    y, mean, var = statistics(x)
    assert mean.item() == 200
    assert var.item() == 0
    assert torch.equal(y, torch.zeros_like(y))
    sums = normfused.channel_sums(x)
    assert sums.sum.item() == 200e6
    assert sums.sum_of_squares.item() == 40_000e6
    assert normfused.channel_moments(x).mean.item() == 200


@layouts
def test_bfloat16_with_a_large_mean(device: torch.device, layout: str) -> None:
    x = lay_out((torch.randn(64, 4, 28, 28) * 0.1 + 5).to(device, torch.bfloat16), layout)
    y, _, _ = statistics(x)
    std = y.double().std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=0.01)


@layouts
@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_moments_of_huge_values_are_finite(device: torch.device, size: float, layout: str) -> None:
    x = lay_out((torch.rand(40, 3, 50) * 2 - 1).mul(size).to(device), layout)
    moments = normfused.channel_moments(x)
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=size * 1e-12)
    torch.testing.assert_close(moments.m2 / moments.count, var, rtol=1e-9, atol=0)
    sums = normfused.channel_sums(x)
    torch.testing.assert_close(sums.sum_of_squares, x.double().square().sum((0, 2)), rtol=1e-9, atol=0)


@layouts
def test_batch_norm_around_1e19(device: torch.device, layout: str) -> None:
    x = lay_out((torch.randn(40, 3, 50) * 1e18 + 1e19).to(device), layout)
    y, mean, var = statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("shape", [(9, 20), (4, 20, 30), (3, 20, 40, 41)], ids=str)
@layouts
def test_nonfinite_stays_in_its_channel(
    device: torch.device, shape: tuple[int, ...], value: float, dtype: torch.dtype, layout: str, training: bool
) -> None:
    clean = torch.randn(shape).to(device, dtype)
    dirty = clean.clone()
    dirty[1, 7, ...] = value
    others = torch.arange(20, device=device) != 7

    def run(function, values: Tensor) -> list[Tensor]:
        x = lay_out(values, layout).requires_grad_()
        parameters = [torch.full((20,), 1.5, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        buffers = [torch.ones(20, device=device, dtype=dtype) for _ in range(2)]
        y = function(x, *buffers, *parameters, training)
        grads = torch.autograd.grad(y, (x, *parameters), (clean * clean).contiguous())
        return [t.detach() for t in (y, *grads, *buffers)]

    ours, untouched, theirs = run(batch_norm, dirty), run(batch_norm, clean), run(F.batch_norm, dirty)
    for a, b, expected in zip(ours, untouched, theirs, strict=True):
        channel = 1 if a.dim() > 1 else 0
        keep = others.nonzero().flatten()
        assert_same_bits(a.index_select(channel, keep), b.index_select(channel, keep))
        got, torch_got = a.select(channel, 7), expected.select(channel, 7)
        assert torch.equal(got.isnan(), torch_got.isnan())
        assert torch.equal(got.isinf(), torch_got.isinf())
        assert torch.equal(got[got.isinf()], torch_got[got.isinf()])


def in_place(x: Tensor, *arguments, **options) -> Tensor:
    return batch_norm(x.clone(), *arguments, **options, inplace=True)


def of_samples(x: Tensor, mean: Tensor | None, var: Tensor | None, *, nonfinite_batches: Tensor, **options) -> Tensor:
    buffers = {name: b for name, b in (("mean", mean), ("var", var), ("counter", nonfinite_batches)) if b is not None}
    samples = {name: torch.stack([b, b]) for name, b in buffers.items()}

    def one(x: Tensor, samples: dict[str, Tensor]) -> Tensor:
        vectors = (samples.get("mean"), samples.get("var"))
        return batch_norm(x, *vectors, **options, nonfinite_batches=samples["counter"])

    y = torch.func.vmap(one)(torch.stack([x, x]), samples)
    for name, buffer in buffers.items():
        assert torch.equal(samples[name][0], samples[name][1])
        buffer.copy_(samples[name][0])
    return y[0]


@layouts
@pytest.mark.parametrize("buffers", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("function", [batch_norm, in_place, of_samples, reference.batch_norm], ids=lambda f: f.__name__)
def test_nonfinite_statistics_are_skipped_and_counted(
    device: torch.device, layout: str, buffers: bool, function: Callable[..., Tensor]
) -> None:
    """Statistics are nonfinite if their mean or variance is. eps and the running statistics do not matter."""
    values = torch.randn(8, 6, 4, dtype=torch.float64)
    values[:, 1] = 0.5  # constant: with eps=0 the inverse standard deviation is infinite, the statistics are finite
    values[:, 2] = 2.0**700 * torch.tensor([1.0, -1.0, 1.0, -1.0])  # the variance overflows, the mean is 0
    values[3, 3, 1] = torch.inf
    values[5, 4, 2] = torch.nan
    values[4, 5, :2] = torch.tensor([torch.inf, -torch.inf])
    x = lay_out(values.to(device), layout)
    mean, var = (torch.full((6,), value, dtype=torch.float64, device=device) for value in (3.0, 5.0))
    counter = torch.full((6,), 7, device=device)
    tracked = (mean, var) if buffers else (None, None)
    function(x, *tracked, training=True, momentum=0.25, eps=0.0, nonfinite_batches=counter)
    assert counter.tolist() == [7, 7, 8, 8, 8, 8]
    if buffers:
        new_var, new_mean = torch.var_mean(values[:, :2].to(device), (0, 2))
        torch.testing.assert_close(mean[:2], 0.75 * 3 + 0.25 * new_mean)
        torch.testing.assert_close(var[:2], 0.75 * 5 + 0.25 * new_var)
    assert mean[2 if buffers else 0 :].tolist() == [3.0] * (4 if buffers else 6)
    assert var[2 if buffers else 0 :].tolist() == [5.0] * (4 if buffers else 6)


@layouts
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], ids=hex)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_nan_in_a_parameter_is_nan_in_a_narrow_output(
    device: torch.device, name: str, payload: int, layout: str
) -> None:
    """Rounding to bfloat16 adds to the bits of a float. The carry could turn a NaN into a number."""
    x = lay_out(torch.randn(8, 40, 5, 5, device=device).bfloat16(), layout)
    vectors = {n: torch.ones(40, device=device) for n in ("weight", "bias", "running_mean", "running_var")}
    vectors[name][7] = torch.tensor(payload, dtype=torch.int32, device=device).view(torch.float32)
    is_nan = batch_norm(x, **vectors).isnan()
    assert is_nan[:, 7].all()
    assert not is_nan[:, :7].any()
    assert not is_nan[:, 8:].any()


@layouts
def test_grad_weight_over_a_million_values(device: torch.device, layout: str) -> None:
    values = torch.randn(500, 2, 2000) + torch.tensor([[100.0], [-100.0]])
    x = lay_out(values.to(device), layout)
    weight = torch.ones(2, device=device, requires_grad=True)
    # Correlated with the values: with noise alone, the true gradient would be near zero.
    grad_output = (torch.randn(x.shape) + values.sign() * (values.abs() - 100)).to(device)
    y = batch_norm(x, None, None, weight, None, training=True)
    (grad_weight,) = torch.autograd.grad(y, weight, grad_output)
    exact = weight.detach().double().requires_grad_()
    y = F.batch_norm(x.double(), None, None, exact, None, training=True)
    (expected,) = torch.autograd.grad(y, exact, grad_output.double())
    assert expected.abs().min() > 1e5
    torch.testing.assert_close(grad_weight.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_subnormal_and_tiny_values(device: torch.device, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = (torch.randn(50, 3) * 16).to(device, dtype) * tiny
    y, _, _ = statistics(x)
    expected = x.double() / 1e-5**0.5 - (x.double() / 1e-5**0.5).mean(0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=16 * tiny)
    moments = normfused.channel_moments(x)
    assert torch.equal(moments.min, x.double().amin(0))
    assert torch.equal(moments.max, x.double().amax(0))
