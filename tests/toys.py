# SPDX-License-Identifier: Apache-2.0
"""Owns the small nets that several tests train, and what can be noticed of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FUSED: list[dict[str, Any]] = [
    {
        "op_types": ["Conv2d", "Linear"],
        "fuse_names": [("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2")],
    }
]


class Net(nn.Module):
    """Two conv-bn-act blocks and a head: (N, 3, 8, 8) to (N, 4)."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = activation()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = activation()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        out: Tensor = self.fc(x.flatten(1))
        return out


class Calls(nn.Module):
    """Runs one function on itself and its arguments; `layers` are its submodules."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Lit(LightningModule):
    """A LightningModule around the layers of `Net`, which it owns itself."""

    def __init__(self, lr: float = 0.05, optimizer: str = "sgd") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.optimizer = lr, optimizer
        for name, module in Net().named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Net.forward(self, x)  # type: ignore[arg-type]
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).float(), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x).float(), y))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x).float(), y))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def fingerprint(model: nn.Module) -> list[Any]:
    """What a user could notice of a model: classes, flags, attributes, hooks and numbers."""
    modules = [
        (name, type(m), m.training, sorted(m.__dict__), [*m._forward_hooks.items()], [*m._forward_pre_hooks.items()])
        for name, m in model.named_modules()
    ]
    numbers = [(key, id(value), value.dtype, value.tolist()) for key, value in model.state_dict(keep_vars=True).items()]
    return [*modules, *numbers]


def loader(n: int = 64, batch: int = 16, seed: int = 0, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Random images (n, 3, 8, 8) and labels 0..3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)
