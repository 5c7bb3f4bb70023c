"""Layers as timm defines them, under timm's names, by which convert recognizes them without importing timm."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MODULE = "timm.layers.norm_act"


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        return x * (x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob) / keep_prob)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm, then `drop`, then `act`, in its own forward."""

    def __init__(
        self, num_features: int, act_layer: Any = nn.ReLU, apply_act: bool = True, drop_layer: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        update = self.training and self.track_running_stats
        if update:
            self.num_batches_tracked.add_(1)
        buffers = (self.running_mean, self.running_var) if update or not self.training else (None, None)
        x = F.batch_norm(x, *buffers, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class FrozenBatchNormAct2d(nn.Module):
    """Batch norm with constant statistics, then `drop`, then `act`."""

    def __init__(self, num_features: int, act_layer: Any = nn.ReLU) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.drop, self.act = nn.Identity(), act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.act(self.drop(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)))


# convert recognizes classes by module and name, and pickle finds them by these.
for _name in ("timm", "timm.layers", _MODULE):
    sys.modules.setdefault(_name, types.ModuleType(_name))
for _kind in (BatchNormAct2d, FrozenBatchNormAct2d):
    _kind.__module__ = _MODULE
    setattr(sys.modules[_MODULE], _kind.__name__, _kind)
