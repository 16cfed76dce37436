# SPDX-License-Identifier: Apache-2.0
"""Owns the ways through a Trainer: what comes before and after fit, options of its loops, fits that break off or do nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import FUSED, Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
STAGES = ["validate", "test", "predict"]


def ours(method: str = "qat", **options: Any) -> QuantFusionCallback:
    return QuantFusionCallback([{**FUSED[0], "method": method}], **{"verbose": 0, **options})


def evaluate(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    return out


def shown(trainer: Trainer, model: LightningModule, stage: str) -> list[Any]:
    """What a Trainer says of a model: losses or predictions."""
    if stage == "predict":
        batches: Any = trainer.predict(model, DataLoader(TensorDataset(X), batch_size=4))
        return [batch.tolist() for batch in batches]
    run = {"validate": trainer.validate, "test": trainer.test}[stage]
    return list(run(model, loader(seed=1), verbose=False))


def assert_deployed_as_validated(callback: QuantFusionCallback, model: LightningModule) -> None:
    assert callback.deployed_model is not None
    assert torch.equal(evaluate(callback.deployed_model), evaluate(model))
    model.train()


# -- before and after fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qat", "lsq"])
@pytest.mark.parametrize("stage", STAGES)
def test_before_fit_it_is_the_float_model_and_afterwards_the_deployed_one(
    stage: str, method: str, quiet_trainer: TrainerMaker
) -> None:
    model, callback = Lit(), ours(method)
    float_twin = copy.deepcopy(model)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    assert shown(trainer, model, stage) == shown(quiet_trainer(), float_twin, stage)
    assert vars(callback)["_deployed"] is None
    assert not prepared_groups(model)
    trainer.fit(model, loader(), loader(seed=1))  # nothing made in inference mode is in the way
    assert callback.deployed_model is not None
    assert isinstance(callback.deployed_model, LightningModule)
    after = shown(trainer, model, stage)
    assert after == shown(quiet_trainer(), callback.deployed_model, stage)
    assert after != shown(quiet_trainer(), float_twin, stage)
    ranges = quantizer_state(model)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(model, loader(), loader(seed=1))
    assert quantizer_state(model) != ranges
    assert_deployed_as_validated(callback, model)


class Shapes(Callback):
    """Ranges and calls before the first training batch: the sanity check and the summary's forward have run by then."""

    def __init__(self) -> None:
        self.ranges: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ranges = quantizer_state(pl_module)


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_summary_and_sanity_check_leave_every_range_untouched(method: str, quiet_trainer: TrainerMaker) -> None:
    model, seen = Lit(), Shapes()
    model.example_input_array = X
    trainer = quiet_trainer(max_epochs=1, callbacks=[ours(method), seen], enable_model_summary=True, num_sanity_val_steps=-1)
    trainer.fit(model, loader(), loader(seed=1))
    activations = [state for name, state in seen.ranges.items() if "._" in name]  # grids of weights begin from the weights
    found = [value for state in activations for value in state.values()]
    assert found
    assert found == [None] * len(found)


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_another_model_is_attached_and_the_first_let_go(method: str, quiet_trainer: TrainerMaker) -> None:
    callback, first, second = ours(method), Lit(), Lit()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(first, loader(), loader(seed=1))
    before, ranges = evaluate(first), str(quantizer_state(first))
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(second, loader(seed=3), loader(seed=1))
    assert torch.equal(evaluate(first), before)
    assert str(quantizer_state(first)) == ranges
    assert str(callback.state_dict()["quantizers"]) == str(quantizer_state(second)) != ranges
    assert_deployed_as_validated(callback, second)
    first.train()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(first, loader(), loader(seed=1))
    assert_deployed_as_validated(callback, first)


def test_conversion_leaves_the_module_and_takes_what_is_for_training(quiet_trainer: TrainerMaker) -> None:
    class Before(Callback):
        """Not the last hook before conversion, but none of Lightning's comes between that moves a number."""

        state: dict[str, Tensor]

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            Before.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

    model, callback = Lit(), ours("lsq")
    quiet_trainer(max_epochs=1, callbacks=[callback, Before()]).fit(model, loader(), loader(seed=1))
    after = model.state_dict()
    assert list(after) == list(Before.state)
    assert all(torch.equal(value, Before.state[key]) for key, value in after.items())
    assert callback.deployed_model is not None
    assert not [m for m in callback.deployed_model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not list(callback.deployed_model.parameters())
    assert not learned_parameters(callback.deployed_model)


# -- options of the loops ---------------------------------------------------------------------------------------------------

LOOPS: dict[str, tuple[dict[str, Any], int]] = {
    # options of the Trainer, and how many steps are trained in 2 epochs of 4 batches
    "overfit_batches": ({"overfit_batches": 2}, 4),
    "no sanity check": ({"num_sanity_val_steps": 0}, 8),
    "all of the sanity check": ({"num_sanity_val_steps": -1}, 8),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2}, 8),
    "no validation": ({"limit_val_batches": 0}, 8),
    "inference_mode": ({"inference_mode": False}, 8),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1}, 8),
    "barebones": ({"barebones": True}, 8),
    "detect_anomaly": ({"detect_anomaly": True}, 8),
    "max_steps": ({"max_steps": 3}, 3),
    "limit_train_batches": ({"limit_train_batches": 0.5}, 4),
    "val_check_interval": ({"val_check_interval": 0.5}, 8),
    "val across epochs": ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 8),
    "deterministic": ({"deterministic": "warn"}, 8),
    "max_time": ({"max_time": "00:01:00:00"}, 8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_options_of_the_loops(name: str, quiet_trainer: TrainerMaker) -> None:
    options, steps = LOOPS[name]
    model, callback = Lit(), ours("lsq")
    try:
        trainer = quiet_trainer(**{"max_epochs": 2, **options}, callbacks=[callback])
        trainer.fit(model, loader(), loader(seed=1))
        assert trainer.global_step == steps
        assert_deployed_as_validated(callback, model)
        trainer.validate(model, loader(seed=1), verbose=False)
        again = quiet_trainer(max_epochs=1, callbacks=[callback])
        again.fit(model, loader(), loader(seed=1))
        assert_deployed_as_validated(callback, model)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_time": {"seconds": 0}}, {"max_steps": 0}], ids=str
)
def test_after_a_fit_of_nothing_the_model_is_float_and_can_be_fitted(
    options: dict[str, Any], quiet_trainer: TrainerMaker
) -> None:
    model, callback = Lit(), ours(calibration=0)
    expected = evaluate(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="no quantized training step was run, so nothing was converted"):
        quiet_trainer(**{"max_epochs": 1, **options}, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is None
    assert torch.equal(evaluate(model), expected)
    with pytest.raises(ConfigError, match=r"no range was observed for conv1\._input_"):
        callback.convert(model)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model.train(), loader(), loader(seed=1))
    assert_deployed_as_validated(callback, model)


# -- fits that break off -----------------------------------------------------------------------------------------------------


class Breaks(Lit):
    """Fails once, in the third call of one of its hooks."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error, self.left = where, error, 3

    def _maybe(self, where: str) -> None:
        self.left -= where == self.where
        if self.left == 0:
            self.left -= 1
            raise self.error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self._trainer is not None and self.trainer.training and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self._maybe("training_step")
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._maybe("validation_step")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._maybe("on_before_optimizer_step")

    def on_train_epoch_end(self) -> None:
        self._maybe("on_train_epoch_end")


PLACES = ["training_step", "validation_step", "on_before_optimizer_step", "on_train_epoch_end"]


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
@pytest.mark.parametrize("error", [RuntimeError("power cut"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("where", PLACES)
def test_a_fit_that_breaks_off_can_be_converted_by_hand_and_fitted_again(
    where: str, error: BaseException, quiet_trainer: TrainerMaker
) -> None:
    model, callback = Breaks(where, error), ours("lsq")
    own = dict(vars(model))
    trainer = quiet_trainer(max_epochs=4, num_sanity_val_steps=0, callbacks=[callback])
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(model, loader(), loader(seed=1))
    assert model.left == -1
    assert callback.deployed_model is None
    assert "on_save_checkpoint" not in vars(model)
    assert set(vars(model)) - set(own) <= {"_lightning_quant"}
    deployed = callback.convert(model)
    assert torch.equal(evaluate(deployed), evaluate(model))
    model.train()
    groups = len(prepared_groups(model))
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert len(prepared_groups(model)) == groups
    assert_deployed_as_validated(callback, model)


class BreaksEarly(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook
        setattr(self, hook, self._break)

    def _break(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("too early")


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start"])
def test_a_fit_that_breaks_off_before_the_first_batch(hook: str, first: bool, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), ours("lsq")
    expected = evaluate(copy.deepcopy(model))
    both: list[Callback] = [BreaksEarly(hook), callback] if first else [callback, BreaksEarly(hook)]
    with pytest.raises(RuntimeError, match="too early"):
        quiet_trainer(max_epochs=1, callbacks=both).fit(model, loader(), loader(seed=1))
    assert torch.equal(evaluate(model), expected)
    with pytest.raises(ConfigError, match=r"no range was observed|is not prepared"):
        callback.convert(model)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model.train(), loader(), loader(seed=1))
    assert_deployed_as_validated(callback, model)


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_fit_that_breaks_off_at_its_end(hook: str, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), ours()
    with pytest.raises(RuntimeError, match="too early"):
        quiet_trainer(max_epochs=1, callbacks=[BreaksEarly(hook), callback]).fit(model, loader(), loader(seed=1))
    assert torch.equal(evaluate(callback.convert(model)), evaluate(model))
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model.train(), loader(), loader(seed=1))
    assert_deployed_as_validated(callback, model)


# -- time, where steps are not batches -----------------------------------------------------------------------------------------


class Flags(Callback):
    """(observe, freeze_batch_norm) and the running mean after every training batch, by number of batches seen."""

    def __init__(self) -> None:
        self.flags: list[tuple[int, bool, bool]] = []
        self.means: list[Tensor] = []
        self.gammas: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        phase = next(iter(prepared_groups(pl_module).values()))[1].phase
        self.flags.append((self.step, phase.observe, phase.freeze_batch_norm))
        bn: Any = pl_module.get_submodule("bn1")
        self.means.append(bn.running_mean.clone())
        self.gammas.append(bn.weight.detach().clone())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed in mid-epoch"])
def test_accumulated_batches_and_moments(resumed: bool, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """16 batches an epoch, 4 to a step: the ranges stop at step 3, batch norm at step 5, that is within an epoch each."""
    schedule = {"observe_stop": 3, "freeze_batch_norm": 5}

    def run(ckpt_path: Path | None) -> list[tuple[int, bool, bool]]:
        flags, saver = Flags(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = quiet_trainer(
            max_epochs=2, accumulate_grad_batches=4, enable_checkpointing=True, callbacks=[ours(schedule=schedule), flags, saver]
        )
        trainer.fit(Lit(), loader(64, 4), loader(seed=1), ckpt_path=ckpt_path)
        return flags.flags

    found = run(None)
    if resumed:
        found = run(tmp_path / "step=2.ckpt")
        assert found[0][0] == 2
    assert {step for step, observe, _ in found if observe} == set(range(2 if resumed else 0, 3))
    assert {step for step, _, frozen in found if frozen} == set(range(5, 8))
    assert {step for step, *_ in found} == set(range(2 if resumed else 0, 8))
    if not resumed:
        assert len(found) == 32


class TrainsItself(Lit):
    """Puts itself in train mode in every step, as users do after an evaluation of their own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.train()
        return super().training_step(batch, batch_idx)


def test_frozen_statistics_survive_the_users_train_calls_and_gamma_still_trains(quiet_trainer: TrainerMaker) -> None:
    flags = Flags()
    callbacks = [ours(schedule={"freeze_batch_norm": 4}), flags]
    quiet_trainer(max_epochs=2, callbacks=callbacks).fit(TrainsItself(), loader(), loader(seed=1))
    assert not torch.equal(flags.means[2], flags.means[3])
    assert all(torch.equal(mean, flags.means[3]) for mean in flags.means[4:])
    assert all(not torch.equal(one, two) for one, two in zip(flags.gammas[3:], flags.gammas[4:], strict=False))
