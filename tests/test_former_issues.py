# SPDX-License-Identifier: Apache-2.0
"""Owns the issues that ended Lightning's own quantization callback, a test each, named after the issue."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from test_callback import X, evaluate, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback, restore_model
from lightning_quant.integer import IntegerLayer
from lightning_quant.prepare import prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]


def test_6457_load_from_checkpoint_works_during_training(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """Its checkpoints held fake-quantizers under keys of their own, which the user's class did not have."""
    loaded: list[Lit] = []

    class Load(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            loaded.append(Lit.load_from_checkpoint(tmp_path / "now.ckpt", strict=True))
            own, other = pl_module.state_dict(), loaded[-1].state_dict()
            assert list(own) == list(other)
            assert all(torch.equal(own[key], other[key]) for key in own)

    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, verbose=0), 2, more=[Load()])
    assert len(loaded) == 2
    assert not prepared_groups(loaded[0])
    assert not torch.equal(evaluate(loaded[0]), evaluate(loaded[1]))


def test_7427_one_trainer_fits_twice(quiet_trainer: TrainerMaker) -> None:
    """Its model was converted in place: the second fit crashed."""
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    trainer = fit(quiet_trainer, model, callback)
    first, classes = callback.deployed_model, [type(module) for module in model.modules()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader(seed=1))
    assert trainer.current_epoch == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [type(module) for module in model.modules()] == classes, "attached once"
    assert callback.deployed_model is not first
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))


def test_8507_validation_data_moves_no_range(quiet_trainer: TrainerMaker) -> None:
    """Its observers watched validation, too."""
    huge = DataLoader(TensorDataset(1e4 * X, torch.zeros(8, dtype=torch.long)), batch_size=8)

    def ranges(data: DataLoader[Any]) -> Any:
        torch.manual_seed(0)
        model = Lit()
        trainer = quiet_trainer(max_epochs=2, callbacks=[QuantFusionCallback(FUSED, verbose=0)], val_check_interval=2)
        trainer.fit(model, loader(), data)
        before = quantizer_state(model)
        trainer.validate(model, huge, verbose=False)
        trainer.test(model, huge, verbose=False)
        trainer.predict(model, huge)
        assert quantizer_state(model) == before
        return before

    assert ranges(huge) == ranges(loader(seed=1))


@pytest.mark.parametrize("first", ["pruning", "quantization"])
def test_11047_pruning_and_quantization_in_one_run(first: str, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    names = ("conv1", "conv2", "fc")
    pruned = [(model.get_submodule(name), "weight") for name in names]
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=pruned, amount=0.5)
    callbacks = [pruning, callback] if first == "pruning" else [callback, pruning]
    quiet_trainer(max_epochs=2, callbacks=callbacks).fit(model, loader(), loader(seed=1))
    deployed = callback.deployed_model
    assert deployed is not None
    assert torch.equal(deployed(X), evaluate(model))
    for name in names:
        layer, weight = deployed.get_submodule(name), model.get_parameter(f"{name}.weight")
        assert isinstance(layer, IntegerLayer)
        zeros = weight == 0
        assert float(zeros.float().mean()) >= 0.3
        assert bool((layer.weight[zeros] == 0).all()), "what is pruned is zero where it is deployed"


def loss_of(model: nn.Module) -> float:
    """The mean over batches of one size."""
    losses = [F.cross_entropy(evaluate(model, x), y) for x, y in loader(seed=1)]
    return float(torch.stack(losses).double().mean())


@pytest.mark.parametrize("which", ["path", "best", "last"])
def test_12896_a_checkpoint_is_tested_after_fit(which: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """Its model was converted in `on_fit_end`, and took no checkpoint of training any more."""
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    trainer = fit(quiet_trainer, model, callback, 2, more=[saver], enable_checkpointing=True)
    path = saver.best_model_path if which == "path" else which
    (result,) = trainer.test(model, loader(seed=1), ckpt_path=path, verbose=False)
    if which == "last":
        assert result["test_loss"] == pytest.approx(loss_of(model), rel=1e-6)
        in_float = loss_of(restore_model(model))
        assert abs(result["test_loss"] - in_float) > 1e-5 * in_float, "10 times what is allowed above"
    else:
        assert callback.deployed_model is not None
        (deployed,) = quiet_trainer().test(callback.deployed_model, loader(seed=1), verbose=False)  # type: ignore[arg-type]
        assert result == deployed
        assert result["test_loss"] == pytest.approx(float(saver.best_model_score), abs=0)  # type: ignore[arg-type]


def test_12900_restoring_and_converting_change_no_result(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """The same data gave one loss in training, another after a restore, and a third after the conversion."""
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    trainer = fit(quiet_trainer, model, callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    in_fit = float(trainer.callback_metrics["val_loss"])
    (here,) = trainer.validate(model, loader(seed=1), verbose=False)
    again = quiet_trainer(callbacks=[QuantFusionCallback(FUSED, verbose=0)])
    (restored,) = again.validate(Lit(), loader(seed=1), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    (converted,) = quiet_trainer().validate(callback.deployed_model, loader(seed=1), verbose=False)  # type: ignore[arg-type]
    assert in_fit == here["val_loss"] == restored["val_loss"] == converted["val_loss"]


class Rows(Dataset[dict[str, Tensor]]):
    """Two integer tensors and a mask, by name."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"tokens": torch.randint(0, 11, (6,), generator=generator), "mask": torch.rand(6, generator=generator) > 0.3}


class Keywords(LightningModule):
    """Called with keyword arguments, one of them optional and one an integer tensor; gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, *, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = torch.relu(self.first(self.table(tokens))) * scale
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": self.second(x.mean(1))}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch, scale=2.0)["logits"].square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_15862_keyword_arguments_reach_forward(quiet_trainer: TrainerMaker) -> None:
    """Its wrapper of `forward` took one tensor."""
    model, callback = Keywords(), QuantFusionCallback(["int8", {"op_types": ["Embedding"]}], verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, DataLoader(Rows(), batch_size=4))
    batch = next(iter(DataLoader(Rows(), batch_size=8)))
    assert callback.deployed_model is not None
    assert set(prepared_groups(model)) >= {"table", "first", "second"}
    seen = []
    with torch.no_grad():
        for with_mask, scale in itertools.product((True, False), (1.0, 2.0)):
            given = {"tokens": batch["tokens"], "scale": scale, **({"mask": batch["mask"]} if with_mask else {})}
            seen.append(model.eval()(**given)["logits"])
            assert torch.equal(callback.deployed_model(**given)["logits"], seen[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), "every argument has its effect"
