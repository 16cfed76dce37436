# SPDX-License-Identifier: Apache-2.0
"""Owns what a power cut leaves behind: a run killed anywhere goes on from its last checkpoint to the same end, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback, load_deployed
from lightning_quant.prepare import quantizer_state

EPOCHS, KILLS = 4, 10  # for each of two methods
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class EpochSeeded(Sampler[int]):
    """An order that the epoch alone decides, as Lightning's own distributed sampler has it."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class Told(Callback):
    """Tells the parent how far the run is."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.pipe.send("batch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pipe.send("epoch")  # a checkpoint is written next

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pipe.send("end")  # the deployed file is written next


def trained(folder: Path, method: str, pipe: Connection) -> None:
    """One life of the run in `folder`: it goes on from the last checkpoint that is there, and tells its end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = loader(48).dataset.tensors  # type: ignore[attr-defined]
    data = DataLoader(TensorDataset(images, labels), batch_size=8, sampler=EpochSeeded(48))
    saver = ModelCheckpoint(folder, save_last=True, enable_version_counter=False, save_on_train_epoch_end=True)
    schedule = {"quantize_start": "epoch 1", "observe_stop": "epoch 3", "freeze_batch_norm": "epoch 2"}
    config = [{**FUSED[0], "method": method}]
    quant = QuantFusionCallback(config, schedule=schedule, export=".pt2", dirpath=folder, source="last", verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=EPOCHS,
            callbacks=[Told(pipe), quant, saver],
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Lit(optimizer="adam" if method == "lsq" else "sgd")
        trainer.fit(model, data, loader(16, seed=1), ckpt_path="last")
    torch.save({"weights": model.state_dict(), "ranges": quantizer_state(model)}, folder / "result.pt")
    pipe.send("done")


def life(folder: Path, method: str, kill_at: tuple[str, int, float] | None) -> bool:
    """Run one life, killed `kill_at` (event, how many of them, seconds later); whether it came to its end."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=trained, args=(folder, method, theirs))
    process.start()
    theirs.close()
    seen: dict[str, int] = {}
    try:
        while "done" not in seen:
            event = ours.recv()
            seen[event] = seen.get(event, 0) + 1
            if kill_at is not None and seen.get(kill_at[0], 0) == kill_at[1]:
                time.sleep(kill_at[2])
                process.kill()
                break
    except EOFError:
        pass
    process.join()
    assert process.exitcode in (0, -9), "the run itself failed"
    return process.exitcode == 0


def content(folder: Path) -> tuple[Any, Any, Tensor]:
    """(weights, ranges, what the deployed file computes)."""
    result = torch.load(folder / "result.pt", weights_only=True)
    return result["weights"], result["ranges"], load_deployed(folder / "model.pt2")(X)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_a_killed_run_ends_as_if_nothing_had_happened(method: str, tmp_path: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "lightning.pytorch", "lightning_quant", "toys"])
    chance, killed = random.Random(method), list[str]()
    assert life(tmp_path / "whole", method, None)
    whole = content(tmp_path / "whole")
    while len(killed) < KILLS:
        folder, done = tmp_path / f"after_{len(killed)}", False
        while not done:
            event = chance.choices(["batch", "epoch", "end"], [5, 3, 2])[0]
            number = chance.randint(1, 8) if event == "batch" else 1
            later = chance.uniform(0, 2.0 if event == "end" else 0.02)
            done = life(folder, method, (event, number, later) if len(killed) < KILLS else None)
            killed += [] if done else [event]
            if (folder / "model.pt2").exists():  # whole or not at all, whenever the kill came
                assert torch.equal(load_deployed(folder / "model.pt2")(X), whole[2])
        assert same(whole, content(folder))
    assert set(killed) == {"batch", "epoch", "end"}
