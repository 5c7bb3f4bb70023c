"""Norms in plain operations of torch, in float64. They decide which is right if torch and normfused differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)
SINGLE = (torch.float32, torch.float64)


def batch_definition(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm in plain operations."""
    if x.dim() == 1:
        return x * 1
    dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
    wide = x.double()
    mean, var = (None if t is None else t.double().view(shape) for t in (running_mean, running_var))
    if training:
        mean = wide.mean(dims, keepdim=True)
        var = (wide - mean).square().mean(dims, keepdim=True)
    y = (wide - mean) / (var + eps).sqrt()
    y = y if weight is None else y * weight.double().view(shape)
    return (y if bias is None else y + bias.double().view(shape)).to(x.dtype)


def group_definition(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group norm in plain operations."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    wide = x.double().reshape(x.size(0), num_groups, -1)
    deviation = wide - wide.mean(-1, keepdim=True)
    y = (deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()).view(x.shape)
    y = y if weight is None else y * weight.double().view(shape)
    return (y if bias is None else y + bias.double().view(shape)).to(x.dtype)


def instance_definition(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance norm in plain operations. torch's gradients in bfloat16 are not as accurate as these would be."""
    if x.dtype in HALF:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if use_input_stats:
        return group_definition(x, x.size(1), weight, bias, eps)
    return batch_definition(x, running_mean, running_var, weight, bias, False, momentum, eps)


def layer_definition(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm in plain operations."""
    dims = tuple(range(-len(normalized_shape), 0))
    deviation = x.double() - x.double().mean(dims, keepdim=True)
    y = deviation / (deviation.square().mean(dims, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def rms_definition(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS norm in plain operations. Complex numbers are torch's alone."""
    if x.is_complex():
        return F.rms_norm(x, normalized_shape, weight, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype if x.dtype in SINGLE else torch.float32).eps if eps is None else eps
    y = x.double() / (x.double().square().mean(dims, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight.double()).to(x.dtype)


DEFINITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_definition,
    F.group_norm: group_definition,
    F.instance_norm: instance_definition,
    F.layer_norm: layer_definition,
    F.local_response_norm: F.local_response_norm,
    F.rms_norm: rms_definition,
}
