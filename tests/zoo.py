"""More families of networks: small widths, original topologies, the code styles of libraries."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from models import MODELS, conv, resnet18, resnet50
from timm_like import BatchNormAct2d, DropPath
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features, self.classifier = features, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


def vgg() -> nn.Module:
    """Simonyan and Zisserman, 2014, with batch norm, as torchvision builds it."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (4, "M", 8, "M", 8, 8, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
    return Classifier(nn.Sequential(*layers), inputs)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True))
        return x * self.gate(scale)


class SEBottleneck(nn.Module):
    """Hu et al., 2017."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, groups=groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, width, 1), nn.BatchNorm2d(width)
        self.se, self.act = SqueezeExcite(width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        y += x
        return self.act(y)


def seresnext() -> nn.Module:
    stem = nn.Sequential(conv(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return Classifier(nn.Sequential(stem, SEBottleneck(8, 2), SEBottleneck(8, 4)), 8)


class ConvBNAct(nn.Sequential):
    """torchvision's Conv2dNormActivation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.SiLU
    ):
        layers = [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=1e-3)]
        super().__init__(*layers, *([act()] if act is not None else []))


class MBConv(nn.Module):
    """Tan and Le, 2019, with stochastic depth."""

    def __init__(self, width: int, act: type[nn.Module], drop: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            ConvBNAct(width, 2 * width, 1, act=act),
            ConvBNAct(2 * width, 2 * width, 3, groups=2 * width, act=act),
            SqueezeExcite(2 * width, nn.Hardsigmoid if act is nn.Hardswish else nn.Sigmoid),
            ConvBNAct(2 * width, width, 1, act=None),
        )
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.drop_path(self.block(x))
        result += x
        return result


def efficientnet() -> nn.Module:
    return Classifier(nn.Sequential(ConvBNAct(3, 8, stride=2), MBConv(8, nn.SiLU, 0.0), MBConv(8, nn.SiLU, 0.2)), 8)


def mobilenetv3() -> nn.Module:
    act = nn.Hardswish
    return Classifier(
        nn.Sequential(ConvBNAct(3, 8, stride=2, act=act), MBConv(8, act, 0.0), ConvBNAct(8, 8, act=act)), 8
    )


class ShuffleUnit(nn.Module):
    """Ma et al., 2018."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            *(conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
            *(conv(half, half, 3, groups=half), nn.BatchNorm2d(half)),
            *(conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        y = torch.cat((first, self.branch(second)), dim=1)
        n, c, h, w = y.size()
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet() -> nn.Module:
    return Classifier(nn.Sequential(ConvBNAct(3, 8, stride=2, act=nn.ReLU), ShuffleUnit(8), ShuffleUnit(8)), 8)


class BasicConv2d(nn.Module):
    """torchvision's block of GoogLeNet and Inception."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Szegedy et al., 2014."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inputs, 4)
        self.branch2 = nn.Sequential(BasicConv2d(inputs, 4), BasicConv2d(4, 4, 3))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv2d(inputs, 4))

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


def googlenet() -> nn.Module:
    return Classifier(nn.Sequential(BasicConv2d(3, 8, 3), nn.MaxPool2d(2), Inception(8), Inception(12)), 12)


class HighResolution(nn.Module):
    """Wang et al., 2019: two resolutions that exchange features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNAct(3, 4, stride=2, act=nn.ReLU)
        self.transition = nn.ModuleList([ConvBNAct(4, 4, act=nn.ReLU), ConvBNAct(4, 8, stride=2, act=nn.ReLU)])
        up = nn.Sequential(conv(8, 4, 1), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2.0))
        down = nn.Sequential(conv(4, 8, 3, 2), nn.BatchNorm2d(8))
        self.fuse = nn.ModuleList([nn.ModuleList([nn.Identity(), up]), nn.ModuleList([down, nn.Identity()])])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = [layer(x) for layer in self.transition]
        fused = []
        for row in self.fuse:
            y: Tensor | int = 0
            for j, layer in enumerate(row):
                y = y + layer(branches[j])
            fused.append(F.relu(y))
        return self.head(torch.cat([t.mean((2, 3)) for t in fused], 1))


class CSP(nn.Module):
    """As in YOLO detectors: chunks, a list of outputs, and one concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBNAct(width, width, 1), ConvBNAct(width + width // 2, width, 1)
        self.m = nn.ModuleList(
            nn.Sequential(ConvBNAct(width // 2, width // 2), ConvBNAct(width // 2, width // 2)) for _ in [0]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(y[-1] + m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


def yolo() -> nn.Module:
    return Classifier(nn.Sequential(ConvBNAct(3, 8, stride=2), CSP(8), ConvBNAct(8, 8, stride=2), CSP(8)), 8)


class PointNet(nn.Module):
    """Qi et al., 2016: layers over points, and over their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.fc1, self.bn3, self.fc2 = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)).max(2).values
        return self.fc2(F.relu(self.bn3(self.dropout(self.fc1(x)))))


class RepVGGBlock(nn.Module):
    """Ding et al., 2021: the sum of three normalized branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(OrderedDict(conv=conv(width, width, 3), bn=nn.BatchNorm2d(width)))
        self.pointwise = nn.Sequential(OrderedDict(conv=conv(width, width, 1), bn=nn.BatchNorm2d(width)))
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


def repvgg() -> nn.Module:
    return Classifier(nn.Sequential(ConvBNAct(3, 8, act=nn.ReLU), RepVGGBlock(8), RepVGGBlock(8)), 8)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((48, 16), (16, 16), (16, 8)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ELU()]
        self.net, self.out = nn.Sequential(*layers), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(F.adaptive_avg_pool2d(x, 4).flatten(1)))


class Video(nn.Module):
    """Tran et al., 2017: three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(inplace=True))
        self.conv, self.bn, self.fc = nn.Conv3d(4, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.avg_pool2d(x, 4).unsqueeze(2).repeat(1, 1, 2, 1, 1))
        return self.fc(F.relu(self.bn(self.conv(x)) + x).mean((2, 3, 4)))


class ConvMixer(nn.Module):
    """Trockman and Kolter, 2022: the activation comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.GELU(), nn.BatchNorm2d(8))
        self.pointwise = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x)
        return self.head(self.pointwise(x).mean((2, 3)))


class Ghost(nn.Module):
    """Han et al., 2019: a cheap operation on the first half, and a slice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.outputs = outputs
        self.primary = nn.Sequential(conv(inputs, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True))
        self.cheap = nn.Sequential(conv(half, half, 3, groups=half), nn.BatchNorm2d(half), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)[:, : self.outputs]


def ghostnet() -> nn.Module:
    return Classifier(nn.Sequential(Ghost(3, 8), nn.MaxPool2d(2), Ghost(8, 8)), 8)


class TimmBlock(nn.Module):
    """A bottleneck as timm writes it: timm's batch norms with activation, drop path, optional attention."""

    def __init__(self, width: int, act: type[nn.Module], drop: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, 1), BatchNormAct2d(width, act_layer=act)
        self.conv2, self.bn2 = conv(width, width, 3), BatchNormAct2d(width, act_layer=act)
        self.conv3, self.bn3 = conv(width, width, 1), BatchNormAct2d(width, apply_act=False)
        self.attn: nn.Module | None = None
        self.drop_path, self.act = DropPath(drop), act(inplace=True)

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        x = self.bn3(self.conv3(x))
        if self.attn is not None:
            x = self.attn(x)
        x = self.drop_path(x) + shortcut
        return self.act(x)


class TimmNet(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU, drop: float = 0.0, checkpointing: bool = False) -> None:
        super().__init__()
        self.pretrained_cfg, self.num_features = {"input_size": (3, 32, 32)}, 8
        self.stem = nn.Sequential(OrderedDict(conv=conv(3, 8, 3, 2), bn=BatchNormAct2d(8, act_layer=act)))
        self.stages = nn.Sequential(*(TimmBlock(8, act, drop) for _ in range(2)))
        self.head = nn.Linear(8, 10)
        self.grad_checkpointing = checkpointing

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


ZOO: dict[str, Any] = {
    **MODELS,
    "vgg": vgg,
    "seresnext": seresnext,
    "efficientnet": efficientnet,
    "mobilenetv3": mobilenetv3,
    "shufflenet": shufflenet,
    "googlenet": googlenet,
    "hrnet": HighResolution,
    "yolo": yolo,
    "pointnet": PointNet,
    "repvgg": repvgg,
    "mlp": MLP,
    "video": Video,
    "convmixer": ConvMixer,
    "ghostnet": ghostnet,
    "timm relu": TimmNet,
    "timm silu, drop path": lambda: TimmNet(nn.SiLU, 0.3),
}
# Numbers of batch norms and of fused ones; all are replaced. The others are residuals of a fused one, or are followed
# by another operation.
EXPECTED = {
    "resnet18": (20, 17),
    "resnet50": (53, 49),
    "densenet": (14, 14),
    "mobilenetv2": (11, 10),
    "unet": (10, 10),
    "gan": (5, 5),
    "vgg": (4, 4),
    "seresnext": (7, 5),
    "efficientnet": (7, 6),
    "mobilenetv3": (5, 5),
    "shufflenet": (7, 5),
    "googlenet": (9, 9),
    "hrnet": (5, 3),
    "yolo": (10, 10),
    "pointnet": (3, 2),
    "repvgg": (7, 5),
    "mlp": (3, 3),
    "video": (2, 2),
    "convmixer": (3, 1),
    "ghostnet": (4, 4),
    "timm relu": (7, 7),
    "timm silu, drop path": (7, 5),
}
__all__ = ["EXPECTED", "ZOO", "resnet18", "resnet50"]
