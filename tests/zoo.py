# SPDX-License-Identifier: Apache-2.0
"""Owns the zoo, part one: small versions of the nets for images and signals that people quantize, written as their users do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One network shape: how to make it, and what it is called with.

    `exports`: whether torch.export can follow its forward at all; `dynamic`: whether its batch size may be left free; `config`:
    what is asked for.
    """

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    exports: bool = True
    dynamic: bool = True
    config: Any = "int8"


ZOO: dict[str, Shape] = {}


def shape(*size: int, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a net whose forward takes one normal tensor of this size."""
    return shape_of(lambda: torch.randn(*size), **options)


def shape_of(example: Callable[[], Any], **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a net with what it is called with."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        ZOO[cls.__name__] = Shape(name=cls.__name__, make=cls, example=example, **options)
        return cls

    return register


# -- images -------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        nn.init.zeros_(self.bn2.weight)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Any:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + identity)


@shape(8, 3, 16, 16)
class ResidualZeroGamma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.maxpool(self.stem(x))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class SharedReluBottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


@shape(8, 3, 8, 8)
class TorchvisionStyleResNet(nn.Module):
    """One in-place ReLU for all positions of a block, `out += identity`: as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(SharedReluBottleneck(8), SharedReluBottleneck(8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


@shape(8, 3, 8, 8)
class PreActivationResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        out = self.conv1(torch.relu(self.bn1(x)))
        out = self.conv2(torch.relu(self.bn2(out)))
        x = x + out
        return self.fc(F.adaptive_avg_pool2d(torch.relu(self.bn(x)), 1).flatten(1))


class ConvBNReLU6(nn.Sequential):
    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.use_res_connect = stride == 1 and cin == cout
        layers: list[nn.Module] = [ConvBNReLU6(cin, hidden, 1)] if expand != 1 else []
        layers += [ConvBNReLU6(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


@shape(8, 3, 16, 16)
class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBNReLU6(3, 8, stride=2), InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Any:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


@shape(8, 3, 16, 16)
class SqueezeExciteHardswish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
        )
        self.se = SqueezeExcite(8)
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.project(self.se(self.depthwise(x)))
        return self.classifier(self.pool(x).flatten(1))


@shape(8, 3, 16, 16)
class EfficientNetBlock(nn.Module):
    """MBConv as timm writes it: functional SiLU and sigmoid gate, and a scale by `*=`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv_dw, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.conv_pwl, self.bn3 = nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        shortcut = x
        x = F.silu(self.bn1(self.conv_pw(x)))
        x = F.silu(self.bn2(self.conv_dw(x)))
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = x * gate
        x = self.bn3(self.conv_pwl(x)) + shortcut
        return self.head(x.mean(dim=[2, 3]))


class DenseLayer(nn.Module):
    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(cin), nn.ReLU(inplace=True), nn.Conv2d(cin, 8, 1, bias=False)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, growth, 3, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> Any:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


@shape(8, 3, 8, 8)
class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.denselayer1, self.denselayer2 = DenseLayer(6, 4), DenseLayer(10, 4)
        # A transition without an activation: here a batch norm stands right before a convolution that does not pad.
        self.transition = nn.Sequential(nn.BatchNorm2d(14), nn.Conv2d(14, 8, 1, bias=False), nn.AvgPool2d(2, 2))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        features = [self.conv0(x)]
        features.append(self.denselayer1(features))
        features.append(self.denselayer2(features))
        x = self.transition(torch.cat(features, 1))
        x = F.relu(x, inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Any:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)


@shape(8, 3, 16, 16)
class ShuffleNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage = nn.Sequential(ShuffleUnit(8), ShuffleUnit(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stage(self.maxpool(self.conv1(x)))
        a, b = torch.split(x, 4, dim=1)
        return self.fc(torch.cat([b, a], 1).mean([2, 3]))


class BasicConv2d(nn.Module):
    def __init__(self, cin: int, cout: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(self.conv(x)), inplace=True)


@shape(8, 3, 8, 8)
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 8, kernel_size=3, padding=1)
        self.branch1x1 = BasicConv2d(8, 4, kernel_size=1)
        self.branch5x5_1, self.branch5x5_2 = BasicConv2d(8, 4, kernel_size=1), BasicConv2d(4, 4, kernel_size=5, padding=2)
        self.branch7_1 = BasicConv2d(8, 4, kernel_size=(1, 7), padding=(0, 3))
        self.branch7_2 = BasicConv2d(4, 4, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = BasicConv2d(8, 4, kernel_size=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        outputs = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch7_2(self.branch7_1(x)),
            self.branch_pool(pooled),
        ]
        x = torch.cat(outputs, 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class DoubleConv(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Any:
        return self.double_conv(x)


@shape(4, 3, 16, 16)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 4), DoubleConv(4, 8), DoubleConv(8, 16)
        self.up1, self.conv1 = nn.ConvTranspose2d(16, 8, 2, stride=2), DoubleConv(16, 8)
        self.up2, self.conv2 = nn.ConvTranspose2d(8, 4, 2, stride=2), DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        up = self.up2(x)
        dy, dx = x1.size()[2] - up.size()[2], x1.size()[3] - up.size()[3]
        up = F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.outc(self.conv2(torch.cat([x1, up], dim=1)))


@shape(8, 1, 64)
class AudioDepthwise1d(nn.Module):
    """A keyword spotter: depthwise separable 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 8, 9, stride=4, padding=4), nn.BatchNorm1d(8)
        self.dw, self.bn2 = nn.Conv1d(8, 8, 5, padding=2, groups=8, bias=False), nn.BatchNorm1d(8)
        self.pw, self.bn3 = nn.Conv1d(8, 12, 1, bias=False), nn.BatchNorm1d(12)
        self.pool = nn.MaxPool1d(2)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.dw(x)))
        x = self.pool(F.relu6(self.bn3(self.pw(x))))
        x = F.avg_pool1d(x, x.shape[-1]).squeeze(-1)
        return F.log_softmax(self.fc(x), dim=-1)


class Residual3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels)
        self.conv2, self.bn2 = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        return (self.bn2(self.conv2(out)) + x).relu()


@shape(4, 1, 4, 8, 8)
class ResNet3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 4, 3, stride=(1, 2, 2), padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU())
        self.block = Residual3d(4)
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.pool(self.block(self.stem(x))).flatten(1))


@shape(4, 8, 1, 1)
class DCGANGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 1, 0, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Any:
        return self.main(z)


@shape(4, 3, 16, 16)
class DCGANDiscriminator(nn.Module):
    """Spectral norm on a convolution and LeakyReLU behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, 2, 1, bias=False)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, 1, 1))
        self.out = nn.Conv2d(8, 1, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.conv1(x), 0.2, inplace=True)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2, inplace=True)
        x = F.leaky_relu(self.conv3(x), 0.2)
        return torch.sigmoid(self.out(x)).view(-1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Any:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = (self.gamma * x).permute(0, 3, 1, 2)
        return shortcut + x


@shape(4, 3, 16, 16)
class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class RepVGGBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(channels)
        self.rbr_dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.nonlinearity = nn.ReLU()

    def forward(self, inputs: Tensor) -> Any:
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + self.rbr_identity(inputs))


@shape(8, 3, 8, 8)
class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stage1 = nn.Sequential(*[RepVGGBlock(8) for _ in range(2)])
        self.gap, self.linear = nn.AdaptiveAvgPool2d(output_size=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        out = self.gap(self.stage1(self.stem(x)))
        return self.linear(out.view(out.size(0), -1))


@shape(4, 3, 32, 32)
class FeaturePyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.c3 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.c4 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.ModuleList([nn.Conv2d(c, 8, 1) for c in (4, 8, 8)])
        self.layer = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        last = self.inner[2](c4)
        results = [self.layer[2](last)]
        for index, feature in ((1, c3), (0, c2)):
            lateral = self.inner[index](feature)
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.layer[index](last))
        return {f"p{level}": result for level, result in enumerate(results, start=2)}


class ASPP(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(cout), nn.ReLU())
                for rate in (1, 2)
            ]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(cin, cout, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(3 * cout, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        res = [conv(x) for conv in self.convs]
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*res, pooled], dim=1))


@shape(4, 3, 16, 16)
class DeepLab(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.aspp, self.classifier = ASPP(8, 4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        x = self.classifier(self.aspp(self.backbone(x)))
        return {"out": F.interpolate(x, size=size, mode="bilinear", align_corners=False)}


@shape(4, 1, 8, 8)
class SuperResolution(nn.Module):
    """Pixel shuffle, PReLU, and a global skip from the upsampled input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(1, 8, 5, padding=2), nn.PReLU(8)
        self.conv2, self.prelu2 = nn.Conv2d(8, 8, 3, padding=1), nn.PReLU()
        self.conv3, self.shuffle = nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Any:
        base = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.prelu2(self.conv2(self.prelu1(self.conv1(x))))
        return torch.clamp(base + self.shuffle(self.conv3(x)), -1.5, 1.5)


@shape(8, 1, 8, 8)
class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6)
        )
        self.decoder = nn.Sequential(
            nn.Linear(6, 32),
            nn.ReLU(),
            nn.Unflatten(1, (8, 2, 2)),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 2, 2),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Any:
        return self.decoder(self.encoder(x))


@shape(8, 1, 8, 8)
class VariationalAutoencoder(nn.Module):
    """Draws its latent in training only; two linear heads read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mean, self.logvar = nn.Linear(64, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.fc3, self.fc4 = nn.Linear(4, 16), nn.Linear(16, 64)

    def reparameterize(self, mean: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mean
        std = torch.exp(0.5 * logvar)
        return mean + torch.randn_like(std) * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.fc1(x.view(-1, 64)))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        z = self.reparameterize(mean, logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, logvar


@shape(8, 3, 8, 8)
class VGGDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = 3
        for item in (8, "M", 8, 8, "M"):
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(cin, item, 3, padding=1), nn.Dropout2d(0.1), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                cin = item
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(32, 16), nn.Dropout(), nn.ReLU(True), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Any:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@shape(8, 3, 8, 8)
class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.gn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.conv2, self.gn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8)
        self.instance, self.head = nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.gn1(self.conv1(x)))
        x = x + F.relu(self.gn2(self.conv2(x)))
        return self.head(self.instance(x))


@shape(8, 3, 8, 8)
class ConstantsAndInPlace(nn.Module):
    """Arithmetic with numbers and buffers, augmented assignments, and in-place functions."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = (x - self.mean) / 0.25
        x = self.bn1(self.conv1(x)).relu_()
        y = self.conv2(x)
        y *= self.scale
        y += x
        y = 1 + y * 0.5
        y.clamp_(min=0)
        return self.fc(y.mean(dim=(2, 3))) / 2.0


@shape(8, 3, 16, 16)
class SharedHeadTwoNorms(nn.Module):
    """RetinaNet's way: one convolution on two levels, with a batch norm of its own for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.cls = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = F.relu(self.stem(x))
        p4 = F.relu(self.down(p3))
        return [self.cls(F.relu(norm(self.head(p)))) for norm, p in zip(self.norms, (p3, p4), strict=True)]


@shape(8, 3, 8, 8)
class NestedSharedRelu(nn.Module):
    """One ReLU object in several Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), relu),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), relu, nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU6())),
            nn.Flatten(),
            nn.Sequential(nn.Linear(256, 8), relu, nn.Identity(), nn.Linear(8, 3)),
        )

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@shape(8, 1, 8, 8, config=["int8", {"op_types": ["relu", "tanh", "add", "avg_pool2d"]}])
class FunctionalOnly(nn.Module):
    """Parameters of its own, no layers at all."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(4, 1, 3, 3) * 0.3), nn.Parameter(torch.zeros(4))
        self.gamma, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.w2, self.b2 = nn.Parameter(torch.randn(3, 64) * 0.1), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        x = F.conv2d(x, self.w1, self.b1, padding=1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, self.training)
        x = F.avg_pool2d(F.relu(x), 2)
        x = x + torch.tanh(x)
        return F.linear(torch.flatten(x, 1), self.w2, self.b2)
