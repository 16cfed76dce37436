# SPDX-License-Identifier: Apache-2.0
"""Owns the first example: the Mnist net of NNI's module-fusion documentation, from float training to an int8 ONNX file.

python examples/mnist.py                              # scikit-learn's handwritten digits, under a minute
python examples/mnist.py --data mnist.npz --epochs 2  # MNIST: arrays x_train, y_train, x_test, y_test

The same net from a terminal, without a line of quantization in Python: mnist.yaml.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_quant import QuantFusionCallback, load_deployed

# The documentation's config, as it stands: one layer.
DOCUMENTATION: list[dict[str, Any]] = [
    {
        "target_names": ["_input_", "weight", "_output_"],
        "op_names": ["conv1"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
        "fuse_names": [("conv1", "batchnorm1")],
    }
]
# What we recommend: the whole net, every activation fused into the layer before it.
WHOLE_NET: list[dict[str, Any]] = [
    {
        "op_types": ["Conv2d", "Linear"],
        "fuse_names": [("conv1", "batchnorm1", "relu1"), ("conv2", "relu2"), ("fc1", "relu3")],
    }
]
CONFIGS = {"documentation": DOCUMENTATION, "whole": WHOLE_NET}


class Mnist(LightningModule):
    """Images (N, 1, 28, 28) to log-probabilities (N, 10); nothing in it knows of quantization.

    Args:
        learning_rate: of Adam.
    """

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1 = nn.ReLU6()
        self.relu2 = nn.ReLU6()
        self.relu3 = nn.ReLU6()
        self.max_pool1 = nn.MaxPool2d(2, 2)
        self.max_pool2 = nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(20)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.batchnorm1(self.conv1(x)))
        x = self.max_pool1(x)
        x = self.relu2(self.conv2(x))
        x = self.max_pool2(x)
        x = x.flatten(1)
        x = self.relu3(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.nll_loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        classes: Tensor = self(batch[0]).argmax(1)
        return classes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def load_data(file: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of normalised images (1, 28, 28) and labels: MNIST from `file`, or scikit-learn's 8x8 digits, enlarged."""
    if file is not None:
        with np.load(file) as arrays:
            parts = [(torch.from_numpy(arrays[f"x_{s}"]).float() / 255, arrays[f"y_{s}"]) for s in ("train", "test")]
    else:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(digits.images / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
        x_train, x_test, y_train, y_test = split
        parts = [(torch.from_numpy(x).float(), y) for x, y in ((x_train, y_train), (x_test, y_test))]
    train, test = (
        TensorDataset(
            (F.interpolate(images[:, None], (28, 28), mode="bilinear") - 0.1307) / 0.3081,
            torch.from_numpy(labels.astype("int64")),
        )
        for images, labels in parts
    )
    return train, test


class MnistData(LightningDataModule):
    """What `load_data` gives; a tenth of the training images is for validation.

    Args:
        file: an .npz file of MNIST (arrays x_train, y_train, x_test, y_test); None for scikit-learn's digits.
        batch_size: of training; the others take 500 images at a time.
    """

    def __init__(self, file: Path | None = None, batch_size: int = 64) -> None:
        super().__init__()
        self.file, self.batch_size = file, batch_size
        self.parts: list[Dataset[tuple[Tensor, ...]]] = []

    def setup(self, stage: str) -> None:
        train, test = load_data(self.file)
        # The same images in every process: what is validated here must not be what was trained on there.
        self.parts = [*random_split(train, [0.9, 0.1], generator=torch.Generator().manual_seed(0)), test]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[1], batch_size=500)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[2], batch_size=500)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.test_dataloader()


def trainer(epochs: int, out: Path, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, default_root_dir=out, logger=False, accelerator="cpu", enable_model_summary=False, **options
    )


def accuracy_of(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return (predicted == labels).double().mean().item()


def onnx_accuracy(path: Path, test: TensorDataset) -> float:
    from lightning_quant.export import onnxruntime_session

    images, labels = test.tensors
    session = onnxruntime_session(path)
    name = session.get_inputs()[0].name
    predicted = np.concatenate([session.run(None, {name: part.numpy()})[0].argmax(1) for part in images.split(500)])
    return float((predicted == labels.numpy()).mean())


def float_onnx_bytes(model: nn.Module, test: TensorDataset, out: Path) -> int:
    """Size of the float net as ONNX, for the table."""
    from lightning_quant.export import export_model

    path = export_model(model.eval(), out / "float.onnx", example_input=test.tensors[0][:8])
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an MNIST .npz; default: scikit-learn's digits")
    parser.add_argument("--config", choices=CONFIGS, default="whole", help="which config_list (default: whole)")
    parser.add_argument("--epochs", type=int, help="float epochs (default: 2 with --data, else 10)")
    parser.add_argument("--quantized-epochs", type=int, help="epochs with the callback (default: 1 with --data, else 5)")
    parser.add_argument("--out", type=Path, default=Path("mnist_out"), help="folder for model.onnx and model.pt2")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    seed_everything(0, verbose=False)

    train, test = load_data(options.data)
    train_loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    test_loader = DataLoader(test, batch_size=500)
    model = Mnist()
    quick = options.data is None

    first = trainer(options.epochs or (10 if quick else 2), options.out, enable_checkpointing=False)
    first.fit(model, train_loader, test_loader)
    rows = [("float", accuracy_of(model.eval(), test), float_onnx_bytes(model, test, options.out))]

    callback = QuantFusionCallback(CONFIGS[options.config], export=[".onnx", ".pt2"], dirpath=options.out)
    model.train()
    model.learning_rate = 2e-4
    second = trainer(
        options.quantized_epochs or (5 if quick else 1), options.out, callbacks=[callback], enable_checkpointing=False
    )
    second.fit(model, train_loader, test_loader)
    (validated,) = second.validate(model, test_loader, verbose=False)

    onnx, program = options.out / "model.onnx", options.out / "model.pt2"
    rows.append(("quantized (validate)", validated["accuracy"], 0))
    rows.append(("deployed model.pt2", accuracy_of(load_deployed(program), test), program.stat().st_size))
    rows.append(("onnxruntime model.onnx", onnx_accuracy(onnx, test), onnx.stat().st_size))
    print(f"\n{'':24}{'accuracy':>10}{'bytes':>12}")
    for name, accuracy, size in rows:
        print(f"{name:24}{accuracy:>10.2%}{size or '':>12}")
    print(f"\nfiles: {os.fspath(onnx)}, {os.fspath(program)}")


if __name__ == "__main__":
    main()
