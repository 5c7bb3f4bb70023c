"""Batch norm folded into the layer before it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

_Folded = TypeVar("_Folded", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@torch.no_grad()
def fold_bn(previous: _Folded, bn: nn.Module) -> _Folded:
    """A copy of ``previous`` that does what it and the batch norm behind it do in evaluation.

    Args:
        previous: ``Linear``, ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d``, of any groups, with a bias or without.
        bn: a batch norm of torch.nn's or ours, in evaluation mode, with running statistics and no activation.

    Returns:
        A new module, with a bias, in ``previous``' dtype; the arithmetic is in float32 or wider. Neither argument is
        changed.

    Raises:
        TypeError: one of them is of another kind. ValueError: ``bn`` is in training mode, has no running statistics, an
        activation, or not as many channels as ``previous`` gives.
    """
    if not isinstance(previous, _FOLDABLE):
        raise TypeError(f"fold_bn: previous must be a Linear, Conv or ConvTranspose, got {type(previous).__name__}")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"fold_bn: bn must be a batch norm, got {type(bn).__name__}")
    if bn.training:
        raise ValueError("fold_bn: bn is in training mode, in which it depends on the batch; call eval() first")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn has no running statistics")
    if getattr(bn, "activation", None):
        raise ValueError(f"fold_bn: bn has an activation, {bn.activation!r}, which cannot be folded")
    channels = previous.out_features if isinstance(previous, nn.Linear) else previous.out_channels
    if channels != bn.num_features:
        raise ValueError(f"fold_bn: bn has {bn.num_features} channels, but previous gives {channels}")

    dtype = torch.promote_types(previous.weight.dtype, torch.float32)
    mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
    scale = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    weight = previous.weight.to(dtype)
    if isinstance(previous, _TRANSPOSED):  # (in, out / groups, ...): the groups follow each other along the first
        groups = previous.groups
        parts = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = parts.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = torch.zeros_like(mean) if previous.bias is None else previous.bias.to(dtype)
    bias = (bias - mean) * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(dtype)

    folded = copy.deepcopy(previous)
    folded.weight = nn.Parameter(weight.to(previous.weight.dtype), previous.weight.requires_grad)
    folded.bias = nn.Parameter(bias.to(previous.weight.dtype), previous.weight.requires_grad)
    return folded
