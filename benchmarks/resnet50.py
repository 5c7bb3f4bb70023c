"""ResNet-50 (He et al., 2015, arXiv:1512.03385) from torch.nn's layers, with a choice of activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), activation()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), activation()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


def resnet50(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Maps images of shape (N, 3, 224, 224) to logits of shape (N, 1000)."""
    blocks, inputs = [], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if block == 0 else 1, activation))
            inputs = 4 * width
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), activation(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def frozen(model: nn.Module) -> nn.Module:
    """Freezes the statistics and parameters of each batch norm, as fine-tuning does, and returns `model`.

    The other layers stay in training mode.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False).eval()
    return model


def images(batch: int, device: str, side: int = 224) -> Tensor:
    """A random batch of shape (batch, 3, side, side)."""
    return torch.randn(batch, 3, side, side, device=device)
