"""Calls of layer norm and RMS norm by normfused and by torch, for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normfused.functional import layer_norm, layer_norm2d, rms_norm, rms_norm2d

EPS = 1e-5


def values_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(x: Tensor, dims: int | None, rms: bool, tensors: dict[str, Tensor | None], scale_offset: float = 0.0) -> Any:
    """The function for `dims` normalized dimensions, None for channels."""
    options = {name: tensors.get(name) for name in ("residual", "scale", "shift")}
    arguments = (tensors.get("weight"),) if rms else (tensors.get("weight"), tensors.get("bias"))
    if dims is None:
        function: Any = rms_norm2d if rms else layer_norm2d
        return function(x, *arguments, EPS, **options, scale_offset=scale_offset)
    function = rms_norm if rms else layer_norm
    return function(x, x.shape[-dims:], *arguments, EPS, **options, scale_offset=scale_offset)


def by_torch(
    x: Tensor, dims: int | None, rms: bool, tensors: dict[str, Tensor | None], scale_offset: float = 0.0
) -> Any:
    """The same by torch's operators."""
    total = x if tensors.get("residual") is None else x + tensors["residual"]
    moved = total.movedim(1, -1) if dims is None else total
    shape = moved.shape[-(dims or 1) :]
    y = F.rms_norm(moved, shape, None, EPS) if rms else F.layer_norm(moved, shape, None, None, EPS)
    for name in ("weight", "bias", "scale", "shift"):
        value = tensors.get(name)
        if value is None or (rms and name == "bias"):
            continue
        if name in ("scale", "shift"):
            value = value.reshape(x.size(0), *[1] * (x.dim() - 1 - len(shape)), *shape)
        value = value + (name == "scale") + scale_offset * (name == "weight")
        y = y * value if name in ("weight", "scale") else y + value
    return (y.movedim(-1, 1) if dims is None else y), total


def assert_close(a: Tensor, b: Tensor, tolerance: float, name: str) -> None:
    error = (a.double().cpu() - b.double().cpu()).abs().max() / (b.abs().max().cpu() + 1e-3)
    assert error <= tolerance, f"{name}: {error:.2e}"
