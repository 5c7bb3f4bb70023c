"""torch.func and forward-mode differentiation, against torch's own batch norm. Runs on the fallback too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from normfused.functional import batch_norm

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def both(training: bool):
    """Our batch norm and torch's, as functions of input and weight alone."""
    buffers = (None, None) if training else (double(3), double(3).abs() + 0.5)
    return [lambda x, w, f=f: f(x, *buffers, w, None, training) for f in (batch_norm, F.batch_norm)]


def assert_close(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev], ids=["jacfwd", "jacrev"])
@modes
def test_jacobians(training: bool, transform) -> None:
    ours, theirs = both(training)
    x, w = double(4, 3, 2), double(3)
    assert_close(transform(ours, argnums=(0, 1))(x, w), transform(theirs, argnums=(0, 1))(x, w))


@modes
def test_jvp_and_linearize(training: bool) -> None:
    ours, theirs = both(training)
    values, tangents = (double(4, 3, 2), double(3)), (double(4, 3, 2), double(3))
    expected = torch.func.jvp(theirs, values, tangents)
    assert_close(torch.func.jvp(ours, values, tangents), expected)
    output, linear = torch.func.linearize(ours, *values)
    assert_close((output, linear(*tangents)), expected)


@modes
def test_hessian(training: bool) -> None:
    x, w = double(4, 3, 2), double(3)
    hessians = [torch.func.hessian(lambda x, f=f: (f(x, w) ** 3).sum())(x) for f in both(training)]
    assert hessians[1].abs().max() > 0.1
    assert_close(*hessians)


@modes
def test_forward_mode_keeps_tangents(training: bool) -> None:
    x, w, tangents = double(4, 3, 2), double(3), (double(4, 3, 2), double(3))
    results = []
    for function in both(training):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip((x, w), tangents, strict=True)]
            results.append(forward_ad.unpack_dual(function(*duals)).tangent)
    assert_close(*results)


@modes
def test_vmap_over_parameters_alone(training: bool) -> None:
    x, weights = double(4, 3, 2), double(5, 3)
    assert_close(*(torch.func.vmap(function, in_dims=(None, 0))(x, weights) for function in both(training)))


@modes
def test_batched_gradients(training: bool) -> None:
    x, w, grads = double(4, 3, 2).requires_grad_(), double(3).requires_grad_(), double(5, 4, 3, 2)
    results = [torch.autograd.grad(function(x, w), (x, w), grads, is_grads_batched=True) for function in both(training)]
    assert_close(*results)
