"""Views that negate their memory, such as the imaginary part of a conjugate: read as they are, never written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normfused
from normfused import functional, transforms

SHAPE = (2, 3, 4, 5)


def negated(*shape: int) -> Tensor:
    view = torch.complex(torch.randn(shape), torch.rand(shape) - 2).conj().imag  # from 1 to 2
    assert view.is_neg()
    return view


def batch_norm_gradient(grad: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, grad.numel()).sin().view(SHAPE).requires_grad_()
    functional.batch_norm(x, None, None, training=True).backward(grad)
    assert x.grad is not None
    return x.grad


READS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "batch norm": (SHAPE, lambda x: functional.batch_norm(x, None, None, training=True)),
    "evaluation": (SHAPE, lambda x: normfused.BatchNorm2d(3).eval()(x)),
    "residual": (SHAPE, lambda x: functional.batch_norm(torch.ones(SHAPE), None, None, training=True, residual=x)),
    "weight": (
        (3,),
        lambda w: functional.batch_norm(torch.arange(120.0).view(SHAPE).sin(), None, None, w, training=True),
    ),
    "gradient": (SHAPE, batch_norm_gradient),
    "moments": (SHAPE, lambda x: normfused.channel_moments(x).m2),
    "sums": (SHAPE, lambda x: normfused.channel_sums(x).sum),
    "local response norm": (SHAPE, lambda x: functional.local_response_norm(x, 3)),
    "normalize": (SHAPE, lambda x: normfused.normalize(x, 0.5, 0.5)),
    "ChannelStats": (SHAPE, lambda x: normfused.ChannelStats().update(x).std),
    "Standardize": (SHAPE, lambda x: transforms.Standardize()(x)),
    "MinMaxNormalize": (SHAPE, lambda x: transforms.MinMaxNormalize()(x)),
}


@pytest.mark.parametrize("name", READS)
def test_is_read(name: str) -> None:
    shape, function = READS[name]
    x = negated(*shape)
    assert torch.equal(function(x), function(x.resolve_neg()))


def write_running(**which: Tensor) -> None:
    buffers = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), **which}
    functional.batch_norm(torch.randn(SHAPE), **buffers, training=True)


WRITES: dict[str, tuple[str, tuple[int, ...], Callable[[Tensor], object]]] = {
    "running_mean": ("running_mean is written to", (3,), lambda v: write_running(running_mean=v)),
    "running_var": ("running_var is written to", (3,), lambda v: write_running(running_var=v)),
    "out": ("out is written to", SHAPE, lambda out: normfused.normalize(torch.randn(SHAPE), 0.5, 0.5, out=out)),
    "normalize_": ("normalize_ cannot write over input", SHAPE, lambda x: normfused.normalize_(x, 0.5, 0.5)),
    "inplace": ("inplace=True cannot write over input", SHAPE, lambda x: normfused.BatchNorm2d(3, inplace=True)(x)),
}


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("name", WRITES)
def test_is_not_written_to(name: str) -> None:
    message, shape, function = WRITES[name]
    view = negated(*shape)
    before = view.resolve_neg().clone()
    with pytest.raises(RuntimeError, match=f"{message}.*a view that negates its memory.*resolve_neg"):
        function(view)
    assert torch.equal(view.resolve_neg(), before)


@pytest.mark.usefixtures("needs_extension")
def test_every_operator_that_writes_refuses_it() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normfused::")]
    writes = [name for name in names if is_mutable(name)]
    assert len(writes) >= 6
    for name in writes:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Negative"), name


def is_mutable(name: str) -> bool:
    operator = getattr(torch.ops.normfused, name.removeprefix("normfused::"))
    return bool(operator.default._schema.is_mutable)
