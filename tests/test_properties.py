"""Properties of batch norm for any shape, layout, dtype and values. Runs on the fallback too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from common import DTYPES, Arguments, assert_as_close_as_torch, assert_same_bits, dtype_id, lay_out, run
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import normfused
from normfused.functional import batch_norm

check = hypothesis.settings(
    max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
)

# Sizes around the vector widths, for full vectors and tails, and around the tile sizes of the kernels.
SIZES = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257])
MAX_VALUES = 20_000  # values of a tensor


@st.composite
def shapes(draw: st.DrawFn, min_values: int = 2, dims: tuple[int, int] = (2, 6)) -> tuple[int, ...]:
    """A shape with at least min_values values per channel, and at most MAX_VALUES in total, for fast tests."""
    shape = [draw(SIZES) for _ in range(draw(st.integers(*dims)))]
    while torch.Size(shape).numel() > MAX_VALUES:
        largest = max(range(len(shape)), key=lambda i: shape[i])
        shape[largest] = (shape[largest] + 1) // 2
    hypothesis.assume(torch.Size(shape).numel() >= min_values * shape[1])
    return tuple(shape)


@st.composite
def strided(draw: st.DrawFn, values: Tensor) -> Tensor:
    """Equal values with other strides: dimensions in any order in memory, with steps, gaps and an offset."""
    order = draw(st.permutations(range(values.dim())))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in order]
    starts = [draw(st.sampled_from([0, 0, 1])) for _ in order]
    memory = values.permute(order)
    sizes = [start + step * size for start, step, size in zip(starts, steps, memory.shape, strict=True)]
    base = values.new_full(sizes, torch.nan)
    view = base[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    view = view[tuple(slice(size) for size in memory.shape)].copy_(memory)
    return view.permute([order.index(i) for i in range(values.dim())])


def randn(draw: Callable[..., Any], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from a drawn seed. Drawing each value would be slow, and would not test more."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@check
@hypothesis.given(data=st.data(), shape=shapes())
def test_any_strides_are_as_close_as_torch(
    data: st.DataObject, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], training: bool
) -> None:
    draw = data.draw
    (dtype, parameter_dtype), channels = dtypes, shape[1]
    offset, scale = draw(st.sampled_from([0.0, 2.0, -5.0])), draw(st.sampled_from([1.0, 0.01, 20.0]))
    vectors = [randn(draw, channels, dtype=parameter_dtype) for _ in range(4)]
    x = ((randn(draw, *shape, dtype=torch.float64) + offset) * scale).to(dtype)
    given = Arguments(
        input=draw(strided(x)),
        grad_output=draw(strided(randn(draw, *shape, dtype=dtype))),
        weight=draw(st.sampled_from([vectors[0], None])),
        bias=draw(st.sampled_from([vectors[1], None])),
        running_mean=vectors[2],
        running_var=vectors[3].abs() + 0.5,
    )
    ours, theirs = (run(f, given, training, momentum=0.3, eps=1e-3) for f in (batch_norm, F.batch_norm))
    assert_as_close_as_torch(ours, theirs, given, training, momentum=0.3, eps=1e-3)


@check
@hypothesis.given(st.data(), shapes(), st.booleans())
def test_output_is_dense_and_input_unchanged(data: st.DataObject, shape: tuple[int, ...], training: bool) -> None:
    x = data.draw(strided(randn(data.draw, *shape)))
    before = x.clone()
    y = batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]), training=training)
    assert_same_bits(x, before)
    assert y.shape == x.shape
    assert y.untyped_storage().nbytes() == x.numel() * x.element_size()


@check
@hypothesis.given(st.data(), shapes(), st.sampled_from(DTYPES))
def test_eval_output_depends_only_on_the_value_and_its_channel(
    data: st.DataObject, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x = randn(data.draw, *shape, dtype=dtypes[0])
    vectors = [randn(data.draw, shape[1], dtype=dtypes[1]) for _ in range(4)]
    vectors[1] = vectors[1].abs() + 0.1
    y = batch_norm(x, *vectors)
    assert_same_bits(batch_norm(data.draw(strided(x)), *vectors), y)
    n = data.draw(st.integers(0, shape[0] - 1))
    assert_same_bits(batch_norm(x[n : n + 1], *vectors), y[n : n + 1])
    c = data.draw(st.integers(0, shape[1] - 1))
    assert_same_bits(batch_norm(x[:, c : c + 1], *(v[c : c + 1] for v in vectors)), y[:, c : c + 1])


@check
@hypothesis.given(st.data(), shapes(), st.sampled_from(["contiguous", "channels_last"]))
def test_channels_are_independent(data: st.DataObject, shape: tuple[int, ...], layout: str) -> None:
    c = data.draw(st.integers(0, shape[1] - 1))
    x, g = randn(data.draw, *shape), randn(data.draw, *shape)
    others = data.draw(st.sampled_from([0.0, 1e10, torch.inf, torch.nan]))
    results = []
    for value in (1.0, others):
        changed = x.clone().mul_(value)
        changed[:, c] = x[:, c]
        given = Arguments(lay_out(changed, layout), lay_out(g, layout), *torch.ones(4, shape[1]).unbind())
        r = run(batch_norm, given, training=True)
        results.append([r.output[:, c], r.grad_input[:, c], *(t[c] for t in list(vars(r).values())[2:])])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@check
@hypothesis.given(st.data(), shapes(min_values=3), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_shift_of_the_input_are_removed(
    data: st.DataObject, shape: tuple[int, ...], scale: float, shift: float
) -> None:
    x = randn(data.draw, *shape, dtype=torch.float64)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    hypothesis.assume(x.std(axes).min() > 1e-2)
    y = batch_norm(x, None, None, training=True, eps=0.0)
    torch.testing.assert_close(batch_norm(x * scale + shift, None, None, training=True, eps=0.0), y, rtol=0, atol=1e-7)
    torch.testing.assert_close(batch_norm(-x, None, None, training=True, eps=0.0), -y, rtol=1e-10, atol=1e-10)
    zeros = torch.zeros(shape[1], dtype=torch.float64)
    torch.testing.assert_close(y.mean(axes), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().mean(axes), zeros + 1, rtol=1e-10, atol=0)


@check
@hypothesis.given(st.data(), shapes())
def test_grad_input_does_not_change_mean_and_variance(data: st.DataObject, shape: tuple[int, ...]) -> None:
    x = randn(data.draw, *shape, dtype=torch.float64).requires_grad_()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    hypothesis.assume(x.std(axes).min() > 1e-2)
    y = batch_norm(x, None, None, training=True, eps=0.0)
    g = randn(data.draw, *shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(y, x, g, retain_graph=True)
    zeros = torch.zeros(shape[1], dtype=torch.float64)
    torch.testing.assert_close(grad.sum(axes), zeros, rtol=0, atol=1e-8)
    torch.testing.assert_close((grad * y).sum(axes), zeros, rtol=0, atol=1e-8)
    (along_y,) = torch.autograd.grad(y, x, y.detach() + 1)
    torch.testing.assert_close(along_y, torch.zeros_like(x), rtol=0, atol=1e-8)


@check
@hypothesis.given(st.data(), shapes(min_values=1), st.sampled_from([d for d, _ in DTYPES]))
def test_moments_of_parts_merge_to_those_of_the_whole(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = data.draw(strided(randn(data.draw, *shape, dtype=dtype) + 3))
    cut = data.draw(st.integers(0, shape[0]))
    whole = normfused.channel_moments(x)
    a, b = (normfused.channel_moments(part) for part in (x[:cut], x[cut:]))
    assert a.count + b.count == whole.count
    # Chan, Golub and LeVeque, 1983.
    delta = b.mean - a.mean
    mean = a.mean + delta * b.count / whole.count
    m2 = a.m2 + b.m2 + delta**2 * (a.count * b.count / whole.count)
    torch.testing.assert_close(mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, whole.m2, rtol=1e-5, atol=1e-10)
    assert torch.equal(torch.minimum(a.min, b.min), whole.min)
    assert torch.equal(torch.maximum(a.max, b.max), whole.max)
    total, first, second = (normfused.channel_sums(part) for part in (x, x[:cut], x[cut:]))
    torch.testing.assert_close(first.sum + second.sum, total.sum, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(first.sum_of_squares + second.sum_of_squares, total.sum_of_squares, rtol=1e-12, atol=0)
