"""Which calls wait for the device because the host needs a value. Counted on the CPU, from the operators called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfused

X = (4, 6, 5, 5)


class Waits(TorchDispatchMode):
    """The calls whose result, or its size, the host reads from the device."""

    NAMES = ("nonzero", "_local_scalar_dense", "is_nonzero", "item", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.NAMES or by_mask:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_are_counted() -> None:
    x, mask = torch.randn(4), torch.tensor([True, False, True, False])
    for call in (lambda: x[mask], lambda: mask.nonzero(), lambda: bool(mask.any()), lambda: x.sum().item()):
        with Waits() as waits:
            call()
        assert len(waits.calls) == 1


def frozen(**options: Any) -> nn.Module:
    layer = normfused.BatchNormAct2d(6, "leaky_relu", inplace=True, **options).freeze()
    layer.weight.requires_grad_(False)
    return layer


def masked(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return layer(x, residual, torch.rand(4, 5, 5) < 0.7)


LAYER, ACTIVATED, IN_PLACE = (
    lambda: normfused.BatchNorm2d(6, nonfinite="skip", momentum=None),
    lambda: normfused.BatchNormAct2d(6, "relu"),
    lambda: normfused.BatchNormAct2d(6, "leaky_relu", inplace=True),
)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], int]] = {
    "training": (LAYER, lambda layer, x, _: layer(x), 0),
    "evaluation": (lambda: LAYER().eval(), lambda layer, x, _: layer(x), 0),
    "activated sum": (ACTIVATED, lambda layer, x, residual: layer(x, residual), 0),
    "promoted sum": (ACTIVATED, lambda layer, x, residual: layer(x, residual.double()), 0),
    "masked": (LAYER, lambda layer, x, _: masked(layer, x, None), 1),
    "masked sum": (ACTIVATED, masked, 1),
    "masked evaluation": (lambda: ACTIVATED().eval(), masked, 0),
    "in place": (IN_PLACE, lambda layer, x, _: layer(x.clone()), 1),
    "in place in evaluation": (lambda: IN_PLACE().eval(), lambda layer, x, _: layer(x.clone()), 1),
    "in place, frozen": (frozen, lambda layer, x, _: layer(x.clone()), 0),
}


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("case", CASES)
def test_how_often_a_forward_waits(case: str) -> None:
    """Backward never does."""
    make, call, expected = CASES[case]
    layer = make()
    x, residual = (torch.randn(X, requires_grad=True) for _ in range(2))
    with Waits() as waits:
        y = call(layer, x, residual)
        assert len(waits.calls) == expected, waits.calls
        y.sum().backward()
    assert len(waits.calls) == expected, waits.calls


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_in_place_with_constant_statistics_and_any_weights(activation: str | None, with_bias: bool) -> None:
    """If no gradient of the weight is requested, x is not needed, even for channels with weight 0."""
    x = torch.randn(X, dtype=torch.float64)
    results = []
    for inplace in (True, False):
        layer = normfused.BatchNormAct2d(6, activation, bias=with_bias, inplace=inplace, dtype=torch.float64).freeze()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.0, 1e-320, -1.5, 1e-200, 0.0, 1.0]))
            if with_bias:
                layer.bias.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0, -2.0, 3.0]))
            layer.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        layer.weight.requires_grad_(False)
        source = x.clone().requires_grad_()
        parameters = [source, *([layer.bias] if with_bias else [])]
        y = layer(source * 1)
        grads = torch.autograd.grad(y, parameters, y.detach().cos().requires_grad_(), create_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
        results.append([y, *grads])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    layer.inplace = True
    torch.autograd.gradgradcheck(lambda t: layer(t * 1), (x.clone().requires_grad_(),))
