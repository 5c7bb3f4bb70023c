"""Residuals whose dtype differs from the input's: results equal ``activation(batch_norm(x) + residual)`` in torch.

Runs on the fallback too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import dtype_id, lay_out
from ranks import Ranks
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused import _extension
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.functional import batch_norm

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PAIRS = [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]]

pairs = pytest.mark.parametrize("dtypes", PAIRS, ids=dtype_id)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture(params=["extension", "fallback"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        monkeypatch.setattr(_extension, "C", None)


def separately(x: Tensor, *arguments: Any, residual: Tensor, activation: str, **options: Any) -> Tensor:
    y = F.batch_norm(x, *arguments, **options) + residual
    return ACTIVATIONS[activation](y, ACTIVATION_PARAMS.get(activation, 0.0))


def step(function: Callable[..., Tensor], x: Tensor, residual: Tensor, activation: str, training: bool) -> list[Tensor]:
    """Output, gradients and running statistics."""
    torch.manual_seed(1)
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    of_parameters = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    weight, bias = (torch.randn(6).to(**of_parameters).requires_grad_() for _ in range(2))
    buffers = torch.randn(6).to(**of_parameters), (torch.rand(6) + 0.5).to(**of_parameters)
    y = function(x, *buffers, weight, bias, training=training, residual=residual, activation=activation)
    grads = torch.autograd.grad(y, (x, weight, bias, residual), torch.randn(y.shape).to(y))
    return [y.detach(), *grads, *buffers]


def assert_close(ours: list[Tensor], theirs: list[Tensor], *rounded: torch.dtype) -> None:
    """Equal dtypes, and equal values within the rounding of intermediate results in the given dtypes."""
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for got, want in zip(ours, theirs, strict=True):
        eps = max(torch.finfo(dtype).eps for dtype in (*rounded, got.dtype, torch.float32))
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps * max(1, want.abs().max().item()))


@pairs
@modes
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("_both")
def test_results_are_promoted_as_by_torch(
    dtypes: tuple[torch.dtype, torch.dtype], training: bool, activation: str, layout: str, device: torch.device
) -> None:
    x, residual = (lay_out(torch.randn(8, 6, 5, 5).to(device, dtype), layout) for dtype in dtypes)
    if "relu" in activation:
        residual = residual + 20 * residual.sign()  # no sum is near the kink, where rounding could change the slope
    ours, theirs = (step(function, x, residual, activation, training) for function in (batch_norm, separately))
    assert ours[0].dtype == torch.promote_types(*dtypes)
    assert ours[0].stride() == x.stride()
    assert ours[4].dtype == residual.dtype
    assert_close(ours, theirs, *dtypes)


@pairs
@modes
def test_excluded_positions_do_not_matter(
    dtypes: tuple[torch.dtype, torch.dtype], training: bool, device: torch.device
) -> None:
    mask = torch.rand(8, 5, 5, device=device) < 0.6
    x, residual = (torch.randn(8, 6, 5, 5).to(device, dtype) for dtype in dtypes)
    rows = [t.movedim(1, -1)[mask] for t in (x, residual)]
    left_out = ~mask.unsqueeze(1)
    dirty = [t.masked_fill(left_out, torch.nan) for t in (x, residual)]

    def masked(*arguments: Any, **options: Any) -> Tensor:
        return batch_norm(*arguments, **options, mask=mask)

    y, grad_x, *_, grad_residual = step(masked, *dirty, "silu", training)[:5]
    assert y.dtype == torch.promote_types(*dtypes)
    for tensor in (y, grad_x, grad_residual):
        assert torch.equal(tensor.masked_select(left_out), tensor.new_zeros(tensor.masked_select(left_out).shape))
    expected = separately_of_rows(*rows, training)
    assert_close([y.movedim(1, -1)[mask]], [expected], *dtypes)


def separately_of_rows(x: Tensor, residual: Tensor, training: bool) -> Tensor:
    return step(separately, x, residual, "silu", training)[0]


@modes
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=dtype_id)
@pytest.mark.usefixtures("needs_extension")
def test_compiled(dtypes: tuple[torch.dtype, torch.dtype], training: bool) -> None:
    torch._dynamo.reset()
    x, residual = (torch.randn(8, 6, 5, 5).to(dtype) for dtype in dtypes)
    compiled = torch.compile(batch_norm, backend="aot_eager", fullgraph=True)
    ours, theirs = (step(function, x, residual, "relu", training) for function in (compiled, batch_norm))
    assert_close(ours, theirs, *dtypes)


@modes
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=dtype_id)
@pytest.mark.usefixtures("_both")
def test_second_derivatives_and_forward_mode(dtypes: tuple[torch.dtype, torch.dtype], training: bool) -> None:
    x, residual = (torch.randn(5, 6, 4).to(dtype) for dtype in dtypes)
    buffers = (torch.zeros(6, dtype=dtypes[0]), torch.ones(6, dtype=dtypes[0]))

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = function(a, *(t.clone() for t in buffers), training=training, residual=b, activation="silu")
        grads = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), (a, b)))

    def pushed(function: Callable[..., Tensor]) -> list[Tensor]:
        def of(a: Tensor, b: Tensor) -> Tensor:
            mean_and_var = (None, None) if training else buffers
            return function(a, *mean_and_var, training=training, residual=b, activation="silu")

        return list(torch.func.jvp(of, (x, residual), (x.cos(), residual.sin())))

    for derivatives in (second, pushed):
        ours, theirs = derivatives(batch_norm), derivatives(separately)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x)


class Separate(nn.BatchNorm2d):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(super().forward(x) + residual)


@modes
def test_a_float32_residual_under_autocast(training: bool, device: torch.device) -> None:
    x = torch.randn(4, 6, 8, 8, device=device)
    results = []
    for norm in (normfused.BatchNormAct2d(6), Separate(6)):
        block = Block(norm).to(device).train(training)
        with torch.autocast(device.type, torch.bfloat16):
            y = block(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    assert results[0][0].dtype == torch.float32
    assert_close(*results, torch.bfloat16)


@pytest.mark.parametrize("layer", [normfused.BatchNorm2d, normfused.BatchNormAct2d, normfused.SyncBatchNorm])
def test_layers(layer: Callable[..., nn.Module], device: torch.device) -> None:
    x = torch.randn(4, 6, 8, 8, device=device)
    norm = layer(6).to(device)
    assert norm(x.half(), x).dtype == torch.float32
    assert norm(x, x.half()).dtype == torch.float32


def test_errors_change_nothing() -> None:
    x, residual = torch.randn(4, 6).half(), torch.randn(4, 6)
    buffers = torch.zeros(6), torch.ones(6)
    for options, kind, message in (
        (
            {"residual": residual.long()},
            TypeError,
            "residual must be float32, float64, .* got torch.int64",
        ),
        ({"residual": residual[:2]}, ValueError, r"residual must have input's shape \(4, 6\), got \(2, 6\)"),
        ({"residual": residual.to("meta")}, ValueError, "residual is on meta, but input is on cpu"),
        ({"residual": residual, "activation": "mish"}, ValueError, "unknown activation 'mish'"),
        ({"residual": residual, "eps": -1.0}, ValueError, "eps must be a non-negative finite number"),
    ):
        with pytest.raises(kind, match=f"^batch_norm: {message}"):
            batch_norm(x, *buffers, training=True, **options)
    assert torch.equal(buffers[0], torch.zeros(6))
    assert torch.equal(buffers[1], torch.ones(6))


@pytest.mark.parametrize("environment", [{}, {"NORMFUSED_SYNC_DEBUG": "1"}], ids=["plain", "debug"])
def test_synchronized(ranks: Ranks, environment: dict[str, str]) -> None:
    ranks.run(2, synchronized, **environment)


def synchronized() -> None:
    """A layer on two ranks equals a layer on the whole batch."""
    rank = torch.distributed.get_rank()
    for dtypes in PAIRS:
        x, residual = (torch.randn(8, 6, 5).to(dtype) for dtype in dtypes)
        for activation, mask in (("relu", None), ("identity", None), ("silu", torch.rand(8, 5) < 0.7)):
            dtype = torch.promote_types(dtypes[0], torch.float32)
            outcomes = []
            for shared in (True, False):
                part = slice(4 * rank, 4 * rank + 4) if shared else slice(None)
                cls: Any = normfused.SyncBatchNormAct if shared else normfused.BatchNormAct1d
                layer = cls(6, activation, dtype=dtype)
                a, b = (t.detach()[part].clone().requires_grad_() for t in (x, residual))
                y = layer(a, b, None if mask is None else mask[part])
                (y.double() * torch.arange(40.0).view(8, 1, 5)[part]).sum().backward()
                own = slice(None) if shared else slice(4 * rank, 4 * rank + 4)
                outcomes.append([y.detach()[own], a.grad[own], b.grad[own], layer.running_mean, layer.running_var])
            for got, want in zip(*outcomes, strict=True):
                assert got.dtype == want.dtype
                eps = max(torch.finfo(t).eps for t in (*dtypes, torch.float32))
                torch.testing.assert_close(got, want, rtol=16 * eps, atol=16 * eps * want.abs().max().item())
