"""Networks of the families that use batch norm: small widths, original topologies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return torch.relu(torch.add(x if self.downsample is None else self.downsample(x), out))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """He et al., 2015, arXiv:1512.03385."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: list[int], width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(inputs, width << i, 2 if i > 0 and j == 0 else 1))
                inputs = (width << i) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> ResNet:
    return ResNet(BasicBlock, [2, 2, 2, 2])


def resnet50() -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3])


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), conv(2 * growth, growth, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1)), inplace=True))
        return self.conv2(self.norm2(x).relu())


class DenseNet(nn.Module):
    """Huang et al., 2016, arXiv:1608.06993."""

    def __init__(self, depths: tuple[int, ...] = (2, 3), growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks, self.transitions, width = nn.ModuleList(), nn.ModuleList(), 8
        for depth in depths:
            self.blocks.append(nn.ModuleList(DenseLayer(width + i * growth, growth) for i in range(depth)))
            width += depth * growth
            layers = [nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, width // 2, 1), nn.AvgPool2d(2)]
            self.transitions.append(nn.Sequential(*layers))
            width //= 2
        self.norm, self.classifier = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = transition(torch.cat(features, 1))
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.add = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., 2018, arXiv:1801.04381."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            *(InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 6), InvertedResidual(12, 12, 1, 6)),
            *(conv(12, 24, 1), nn.BatchNorm2d(24), nn.Hardswish()),
        )
        self.classifier = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    first = (conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
    return nn.Sequential(*first, conv(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.SiLU())


class UNet(nn.Module):
    """Ronneberger et al., 2015, arXiv:1505.04597."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(3, 4), double_conv(4, 8), double_conv(8, 16)
        self.up2, self.conv2 = nn.ConvTranspose2d(16, 8, 2, 2), double_conv(16, 8)
        self.up1, self.conv1 = nn.ConvTranspose2d(8, 4, 2, 2), double_conv(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.conv2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.conv1(torch.cat([a, self.up1(b)], 1)))


class GAN(nn.Module):
    """A generator followed by its discriminator: Radford et al., 2015, arXiv:1511.06434."""

    def __init__(self) -> None:
        super().__init__()

        def up(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(True)]

        def down(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)]

        self.generator = nn.Sequential(*up(3, 8), *up(8, 4), nn.Conv2d(4, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.Tanh())
        self.discriminator = nn.Sequential(*down(3, 4), *down(4, 8), nn.Conv2d(8, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(self.generator(x)).flatten(1)


class DecoderBlock(nn.Module):
    """A residual block of the decoder of Stable Diffusion's autoencoder: Rombach et al., 2021, arXiv:2112.10752."""

    def __init__(self, inputs: int = 32, outputs: int = 64, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.dropout, self.shortcut = nn.Dropout(0.0), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class ChannelLayerNorm(nn.LayerNorm):
    """timm's and torchvision's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


ChannelLayerNorm.__module__ = "torchvision.models.convnext"
ChannelLayerNorm.__name__ = ChannelLayerNorm.__qualname__ = "LayerNorm2d"


class ConvNeXtBlock(nn.Module):
    """A stem and a block of Liu et al., 2022, arXiv:2201.03545."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), ChannelLayerNorm(width, eps=1e-6))
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.narrow(F.gelu(self.wide(h))).permute(0, 3, 1, 2)
        return x + self.scale * h


class TransformerBlock(nn.Module):
    """Layer norms before attention and before the network, as in GPT-2; the last norm is an RMS norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.last = nn.LayerNorm(width), nn.RMSNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.network(self.norm2(x))
        return self.last(x)


MODELS = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "densenet": DenseNet,
    "mobilenetv2": MobileNetV2,
    "unet": UNet,
    "gan": GAN,
}
