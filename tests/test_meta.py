"""Tensors without values, on the "meta" device: results have the right shapes, and errors are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfused
import normfused.functional as F

pytestmark = pytest.mark.usefixtures("needs_extension")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm2d": (lambda: normfused.BatchNorm2d(4), (2, 4, 3, 3)),
    "BatchNorm2d in evaluation": (lambda: normfused.BatchNorm2d(4).eval(), (2, 4, 3, 3)),
    "GroupNorm": (lambda: normfused.GroupNorm(2, 4), (2, 4, 3)),
    "InstanceNormAct2d": (lambda: normfused.InstanceNormAct2d(4, affine=True), (2, 4, 3, 3)),
    "LayerNorm": (lambda: normfused.LayerNorm((4, 3)), (2, 4, 3)),
    "LayerNorm2d": (lambda: normfused.LayerNorm2d(4), (2, 4, 3, 3)),
    "RMSNorm": (lambda: normfused.RMSNorm(3), (2, 3)),
    "LocalResponseNorm": (lambda: normfused.LocalResponseNorm(3), (2, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_shapes(name: str) -> None:
    make, shape = LAYERS[name]
    x = torch.empty(shape, device="meta", requires_grad=True)
    layer = make().to("meta")
    y = layer(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def of(device: str) -> Callable[..., Tensor]:
    return lambda *shape, dtype=torch.float32: torch.zeros(shape, device=device, dtype=dtype)


Make = Callable[..., Tensor]
CALLS: dict[str, Callable[[Make], object]] = {
    "weight of batch norm": lambda t: F.batch_norm(t(2, 4, 3), None, None, t(3), training=True),
    "bias of batch norm": lambda t: F.batch_norm(t(2, 4, 3), None, None, None, t(5), training=True),
    "parameter with two dimensions": lambda t: F.batch_norm(t(2, 4, 3), None, None, t(4, 1), training=True),
    "running mean": lambda t: F.batch_norm(t(2, 4, 3), t(3), t(4)),
    "running variance in training": lambda t: F.batch_norm(t(2, 4, 3), t(4), t(5), training=True),
    "dtype of a parameter": lambda t: F.batch_norm(t(2, 4, 3), t(4), t(4), t(4, dtype=torch.float64)),
    "residual of batch norm": lambda t: F.batch_norm(t(2, 4, 3), t(4), t(4), residual=t(2, 4, 2)),
    "layer of other channels": lambda t: normfused.BatchNorm2d(3).to(t(1).device)(t(2, 4, 3, 3)),
    "in place": lambda t: normfused.BatchNormAct1d(3, None, inplace=True).to(t(1).device)(t(2, 4)),
    "weight of group norm": lambda t: F.group_norm(t(2, 4, 3), 2, t(3)),
    "weight of each sample": lambda t: F.group_norm(t(2, 4, 3), 2, t(3, 4)),
    "groups": lambda t: F.group_norm(t(2, 4, 3), 3),
    "residual of group norm": lambda t: F.group_norm(t(2, 4, 3), 2, residual=t(2, 4)),
    "scale of group norm": lambda t: F.group_norm(t(2, 4, 3), 2, scale=t(4, 4)),
    "weight of instance norm": lambda t: F.instance_norm(t(2, 4, 3), weight=t(5)),
    "weight of layer norm": lambda t: F.layer_norm(t(2, 4, 3), (4, 3), t(3)),
    "bias of layer norm": lambda t: F.layer_norm(t(2, 4, 3), (3,), None, t(4)),
    "residual of layer norm": lambda t: F.layer_norm(t(2, 4, 3), (3,), residual=t(4, 3)),
    "weight of RMS norm": lambda t: F.rms_norm(t(2, 3), (3,), t(2)),
    "dtype of group norm": lambda t: F.group_norm(t(2, 4, 3), 2, t(4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_are_those_of_the_cpu(name: str) -> None:
    with pytest.raises((ValueError, TypeError)) as on_cpu:
        CALLS[name](of("cpu"))
    with pytest.raises(on_cpu.type) as on_meta:
        CALLS[name](of("meta"))
    assert str(on_meta.value) == str(on_cpu.value)
