# SPDX-License-Identifier: Apache-2.0
"""Owns training from scratch with fusion: the task on which NNI 3.0's `fuse_names` loses 27 to 66 points."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import make_plan, prepare_model


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.down = nn.Sequential()
        if stride > 1 or channels != width:
            self.down = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(out + self.down(x))
        return result


class SmallResNet(nn.Module):
    """CIFAR ResNet with one block a stage, width 8: (N, 3, 16, 16) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn(self.conv(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def groups(net: nn.Module) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("conv", "bn", "relu")]
    for name, module in net.named_modules():
        if isinstance(module, Block):
            found += [(f"{name}.conv1", f"{name}.bn1", f"{name}.relu1"), (f"{name}.conv2", f"{name}.bn2")]
            if len(module.down):
                found.append((f"{name}.down.0", f"{name}.down.1"))
    return found


def data(seed: int, n: int) -> tuple[Tensor, Tensor]:
    prototypes = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(123))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (n,), generator=generator)
    return prototypes[y] * 0.35 + torch.randn(n, 3, 16, 16, generator=generator), y


def accuracy_after_training(net: nn.Module, steps: int = 160) -> float:
    (x, y), (x_test, y_test) = data(1, 1024), data(2, 4096)  # 512 images would be uncertain by 2 points
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    for step in range(steps):
        part = slice(start := (step * 64) % 1024, start + 64)
        optimizer.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net.eval()(x_test).argmax(1) == y_test).double().mean())


def with_bias(net: nn.Module) -> nn.Module:
    """Every convolution with a bias of zeros."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return net


RUNS = [("scratch_bias_false", "default"), ("scratch_bias_false", "per_tensor"), ("scratch_bias_true", "default")]
CASES = [
    pytest.param(regime, granularity, seed, marks=[pytest.mark.slow] if seed or regime == "scratch_bias_true" else [])
    for regime, granularity in RUNS
    for seed in range(3)
]


@pytest.mark.parametrize(("regime", "granularity", "seed"), CASES)
def test_fused_from_scratch_is_as_good_as_unfused(regime: str, granularity: str, seed: int) -> None:
    torch.manual_seed(seed)
    unfused = SmallResNet() if regime == "scratch_bias_false" else with_bias(SmallResNet())
    fused = copy.deepcopy(unfused)
    entry: dict[str, Any] = {"op_types": ["Conv2d", "Linear"], "granularity": granularity}
    x = torch.randn(2, 3, 16, 16)
    alone = make_plan(unfused, [{**entry, "fuse_names": []}], example_input=x)
    assert not any(layer.fused_with for layer in alone.layers)
    prepare_model(unfused, alone)
    prepare_model(fused, make_plan(fused, [{**entry, "fuse_names": groups(fused)}], example_input=x))
    reference, ours = accuracy_after_training(unfused), accuracy_after_training(fused)
    assert reference >= 0.8, "the task must be learnable"
    assert ours >= reference - 0.03
