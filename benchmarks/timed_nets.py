# SPDX-License-Identifier: Apache-2.0
"""Owns the nets that the benchmarks time, each also as torch.ao wants it written.

Shapes as in the peers' measurements: images 64x64, batch 32, ten classes; an MLP 256-512-512-512-10 at batch 128; encoders of 64
tokens at batch 32. They are written as users write them: modules for layers, functions for what has no parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Groups = list[tuple[str, ...]]


# -- the MNIST net and ResNet-18 -----------------------------------------------------------------------------------------


class Mnist(nn.Module):
    """The layers of examples/mnist.py: images (N, 1, 28, 28) to log-probabilities (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1, self.relu2, self.relu3 = nn.ReLU6(), nn.ReLU6(), nn.ReLU6()
        self.max_pool1, self.max_pool2 = nn.MaxPool2d(2, 2), nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool1(self.relu1(self.batchnorm1(self.conv1(x))))
        x = self.max_pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


class Block(nn.Module):
    """ResNet's basic block, one module per ReLU, so that the first can be fused."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.down: nn.Module | None = None
        if stride != 1 or channels != out:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.join(self.bn2(self.conv2(y)), shortcut)

    def join(self, y: Tensor, shortcut: Tensor) -> Tensor:
        joined: Tensor = self.relu2(y + shortcut)
        return joined


class TorchAoBlock(Block):
    """The block as torch.ao wants it written: add and ReLU in one module that can be observed."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__(channels, out, stride)
        self.add_relu = torch.ao.nn.quantized.FloatFunctional()

    def join(self, y: Tensor, shortcut: Tensor) -> Tensor:
        return self.add_relu.add_relu(y, shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with ten classes: images (N, 3, 64, 64) to logits (N, 10)."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        stages = [nn.Sequential(block(c, out, stride), block(out, out, 1)) for c, out, stride in widths]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet_groups(net: nn.Module) -> Groups:
    groups: Groups = [("conv1", "bn1", "relu")]
    for name, module in net.named_modules():
        if isinstance(module, Block):
            groups += [(f"{name}.conv1", f"{name}.bn1", f"{name}.relu1"), (f"{name}.conv2", f"{name}.bn2")]
            if module.down is not None:
                groups.append((f"{name}.down.0", f"{name}.down.1"))
    return groups


# -- MobileNetV2 --------------------------------------------------------------------------------------------------------


def conv_norm(channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU6, as torchvision's Conv2dNormActivation has them."""
    conv = nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, table 1): expand by 1x1, filter each channel by 3x3, project by 1x1."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [conv_norm(channels, hidden, 1)]
        layers += [conv_norm(hidden, hidden, 3, stride=stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return self.join(x, y) if self.use_res_connect else y

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TorchAoInvertedResidual(InvertedResidual):
    """The block with its addition as a module that torch.ao can observe."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__(channels, out, stride, expansion)
        self.skip_add = torch.ao.nn.quantized.FloatFunctional()

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return self.skip_add.add(x, y)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.0 with ten classes, torchvision's layers and names: images (N, 3, 64, 64) to logits (N, 10)."""

    # expansion, channels, blocks, stride of the first block
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, block: type[InvertedResidual] = InvertedResidual) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_norm(3, 32, 3, stride=2)]
        channels = 32
        for expansion, out, blocks, first_stride in self.stages:
            for index in range(blocks):
                features.append(block(channels, out, 1 if index else first_stride, expansion))
                channels = out
        features.append(conv_norm(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def torch_ao_mobilenet() -> MobileNetV2:
    """The net with ReLU in place of ReLU6, which torch.ao cannot fuse: what torchvision's quantizable copy does."""
    net = MobileNetV2(TorchAoInvertedResidual)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU(inplace=True))
    return net


def mobilenet_groups(net: nn.Module) -> Groups:
    """Every convolution with the batch norm, and the ReLU, that follow it in its Sequential."""
    groups: Groups = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Sequential):
            children = list(module.named_children())
            for (conv, first), (norm, second), *rest in (children[i:] for i in range(len(children) - 1)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    relu = [rest[0][0]] if rest and isinstance(rest[0][1], nn.ReLU) else []
                    groups.append(tuple(f"{name}.{part}" for part in (conv, norm, *relu)))
    return groups


# -- encoders -----------------------------------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """A transformer encoder's block: attention and two linear layers, each after a layer norm, each with a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.activation = activation()
        self.linear2 = nn.Linear(hidden, width)

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attend(self.norm1(x)))
        y: Tensor = self.linear2(self.activation(self.linear1(self.norm2(x))))
        return x + y


class TorchAoEncoderBlock(EncoderBlock):
    """The block as torch.ao wants it written: additions as modules, stubs where float functions hand a tensor back."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__(width, heads, hidden, activation)
        quantization: Any = torch.ao.quantization
        self.add1, self.add2 = torch.ao.nn.quantized.FloatFunctional(), torch.ao.nn.quantized.FloatFunctional()
        self.attended, self.float_qkv = quantization.QuantStub(), quantization.DeQuantStub()
        self.activated, self.float_hidden = quantization.QuantStub(), quantization.DeQuantStub()

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.float_qkv(self.qkv(x))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.attended(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return attended

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1.add(x, self.proj(self.attend(self.norm1(x))))
        hidden = self.linear1(self.norm2(x))
        if isinstance(self.activation, nn.GELU):  # torch.ao has int8 kernels for ReLU, none for GELU
            hidden = self.activated(self.activation(self.float_hidden(hidden)))
        else:
            hidden = self.activation(hidden)
        return self.add2.add(x, self.linear2(hidden))


class Encoder(nn.Module):
    """Patches (N, 64, 48) through an encoder, to logits (N, 10) of the mean token."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        activation: type[nn.Module] = nn.GELU,
        block: type[EncoderBlock] = EncoderBlock,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(48, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(block(width, heads, 4 * width, activation) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.place(self.embed(x)))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits

    def place(self, x: Tensor) -> Tensor:
        return x + self.position


class TorchAoEncoder(Encoder):
    """The encoder as torch.ao wants it written: the position is added in float."""

    def __init__(self, width: int, layers: int, heads: int, *, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__(width, layers, heads, activation=activation, block=TorchAoEncoderBlock)
        quantization: Any = torch.ao.quantization
        self.float_embedded, self.placed = quantization.DeQuantStub(), quantization.QuantStub()

    def place(self, x: Tensor) -> Tensor:
        placed: Tensor = self.placed(self.float_embedded(x) + self.position)
        return placed


def encoder_groups(net: nn.Module) -> Groups:
    """Linear layers with the ReLU behind them."""
    blocks = [(name, module) for name, module in net.named_modules() if isinstance(module, EncoderBlock)]
    return [(f"{name}.linear1", f"{name}.activation") for name, block in blocks if isinstance(block.activation, nn.ReLU)]


# -- the small ones -----------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    """256-512-512-512-10 with a module per ReLU: (N, 256) to logits (N, 10)."""
    layers: list[nn.Module] = []
    for width, out in ((256, 512), (512, 512), (512, 512)):
        layers += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


# -- all of them --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[dict[str, Any]]:
    """The config list that quantizes convolutions and linear layers; a list may name no type that the model lacks."""
    types = {type(module) for module in model.modules()} & {nn.Conv2d, nn.Linear}
    return [{"op_types": sorted(kind.__name__ for kind in types)}]


class Net(NamedTuple):
    """One net to time. `torch_ao`: the same net, with the same parameter names, as torch.ao wants it written."""

    make: Callable[[], nn.Module]
    torch_ao: Callable[[], nn.Module]
    torch_ao_groups: Callable[[nn.Module], Groups]
    loss: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]


NETS = {
    "mnist": Net(
        make=Mnist,
        torch_ao=Mnist,
        torch_ao_groups=lambda _: [("conv1", "batchnorm1")],  # torch.ao fuses no ReLU6
        loss=F.nll_loss,
        shape=(64, 1, 28, 28),
    ),
    "resnet18": Net(
        make=ResNet18,
        torch_ao=lambda: ResNet18(TorchAoBlock),
        torch_ao_groups=resnet_groups,
        loss=F.cross_entropy,
        shape=(32, 3, 64, 64),
    ),
    "mobilenetv2": Net(
        make=MobileNetV2,
        torch_ao=torch_ao_mobilenet,
        torch_ao_groups=mobilenet_groups,
        loss=F.cross_entropy,
        shape=(32, 3, 64, 64),
    ),
    "encoder": Net(
        make=lambda: Encoder(256, layers=4, heads=8),
        torch_ao=lambda: TorchAoEncoder(256, layers=4, heads=8),
        torch_ao_groups=encoder_groups,
        loss=F.cross_entropy,
        shape=(32, 64, 48),
    ),
    "tiny_transformer": Net(
        make=lambda: Encoder(128, layers=2, heads=4, activation=nn.ReLU),
        torch_ao=lambda: TorchAoEncoder(128, layers=2, heads=4, activation=nn.ReLU),
        torch_ao_groups=encoder_groups,
        loss=F.cross_entropy,
        shape=(32, 64, 48),
    ),
    "mlp": Net(
        make=mlp,
        torch_ao=mlp,
        torch_ao_groups=lambda _: [("0", "1"), ("2", "3"), ("4", "5")],
        loss=F.cross_entropy,
        shape=(128, 256),
    ),
}
