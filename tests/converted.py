"""Shared by the tests of converted models: small models, and a comparison of everything observable in their calls."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import BasicBlock, ResNet
from torch import Tensor, nn

import normfused

OURS = (normfused.BatchNorm1d, normfused.BatchNorm2d, normfused.BatchNorm3d)


def block(inputs: int = 3, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A stem and a head. Its forward is the given function."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.head = block(), block()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return flat([getattr(value, f.name) for f in dataclasses.fields(value)])
    if isinstance(value, dict):
        return flat([*value.values()])
    return [t for item in value for t in flat(item)] if isinstance(value, (list, tuple)) else []


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  # users call the legacy generator


def run(model: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype, backward: bool) -> list[Any]:
    """Everything observable in a few calls: outputs, gradients, state and plain attributes."""
    seed()
    seen: list[Any] = []
    for shape in shapes:
        x = (torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype).requires_grad_(backward)
        y = model(x)
        seen.append([t.detach().clone() for t in flat(y)])
        seen.append(type(y).__name__)
        if backward and any(t.requires_grad for t in flat(y)):
            model.zero_grad()
            sum((t.double() ** 3).sum() for t in flat(y) if t.requires_grad).backward()
            seen.append([None if t.grad is None else t.grad.clone() for t in [x, *model.parameters()]])
    seen.append([t.detach().clone() for t in [*model.parameters(), *model.buffers()]])
    plain = {k: v for m in model.modules() for k, v in vars(m).items() if isinstance(v, (int, float, str))}
    return [*seen, plain]


def assert_same(
    stock: nn.Module,
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float64,
    backward: bool = True,
    fused: int | None = None,
    converted: nn.Module | None = None,
) -> nn.Module:
    """Check that `stock` and its conversion behave the same. Returns the conversion."""
    stock = stock.to(dtype)
    ours = normfused.convert(copy.deepcopy(stock)) if converted is None else converted.to(dtype)
    shapes = shapes or [(4, 3, 5, 5), (4, 3, 5, 5), (6, 3, 5, 5)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for got, expected in zip(*(run(m, shapes, dtype, backward) for m in (ours, stock)), strict=True):
        if isinstance(expected, list):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        else:
            assert got == expected
    if fused is not None:
        assert len(normfused.conversion_report(ours).fused) == fused, normfused.conversion_report(ours)
    return ours


def resnet10() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1])


def types(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def images(n: int = 4, size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(dtype)
