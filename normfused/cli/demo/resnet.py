"""A small residual network (He et al., 2015, arXiv:1512.03385) with leaky ReLUs, and batch norm or group norm.

Leaky ReLU is invertible, so ``normfused.convert`` can apply all its optimizations, including in-place batch norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Group norm with groups of four channels."""
    return nn.GroupNorm(channels // 4, channels)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """Two 3 x 3 convolutions with a residual connection; (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3, 1), norm(outputs)
        self.relu = nn.LeakyReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return cast(Tensor, self.relu(y))


class ResNet(nn.Module):
    """Three blocks, of 16, 32 and 64 channels, for images of shape (C, H, W); 78,000 parameters."""

    def __init__(self, channels: int, classes: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(channels, 16, 3, 1), norm(16), nn.LeakyReLU(inplace=True))
        self.blocks = nn.Sequential(Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 64, 2, norm))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, classes)."""
        return cast(Tensor, self.head(self.blocks(self.stem(x)).mean((2, 3))))
