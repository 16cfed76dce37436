# SPDX-License-Identifier: Apache-2.0
"""Owns the example without a line of quantization in Python: a LightningCLI script; `digits.yaml` and `quant.yaml` say the rest.

python examples/cli.py fit --config examples/digits.yaml   # a few seconds; writes digits_out/model.onnx and more
python examples/cli.py test --config examples/digits.yaml --ckpt_path digits_out/checkpoints/best.ckpt
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class DigitsNet(LightningModule):
    """Images (N, 1, 8, 8) to logits (N, 10); nothing in it knows of quantization.

    Args:
        width: channels of the first convolution; the second has twice as many.
        learning_rate: of Adam.
    """

    def __init__(self, width: int = 16, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.relu3 = nn.Linear(2 * width * 4, 64), nn.ReLU()
        self.fc2 = nn.Linear(64, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        logits: Tensor = self.fc2(self.relu3(self.fc1(x.flatten(1))))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Digits(LightningDataModule):
    """scikit-learn's 1797 handwritten digits: 70 % to train, 10 % to validate, 20 % to test.

    Args:
        batch_size: of training; the other two take 256 images at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.parts: list[Dataset[tuple[Tensor, ...]]] = []

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        whole = TensorDataset(images, torch.tensor(digits.target))
        # The same images in every process: those that `test` sees must not be among those that `fit` trained on.
        self.parts = list(random_split(whole, [0.7, 0.1, 0.2], generator=torch.Generator().manual_seed(0)))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[1], batch_size=256)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[2], batch_size=256)


class SaveFitConfig(SaveConfigCallback):
    """Writes `config.yaml` beside the model that it describes; `test` in the same folder must not replace it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def main() -> None:
    LightningCLI(
        DigitsNet,
        Digits,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
