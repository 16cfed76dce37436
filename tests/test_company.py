# SPDX-License-Identifier: Apache-2.0
"""Owns life beside other callbacks, in either order of the list: what they do is done, and what was validated is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from test_matrix import Backboned, Batched
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
orders = pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
methods = pytest.mark.parametrize("method", ["qat", "lsq"])
# Lightning's advice on these callbacks is not what is tested.
quietly = pytest.mark.filterwarnings("ignore::UserWarning")


def ours(method: str = "qat", **options: Any) -> QuantFusionCallback:
    return QuantFusionCallback([{**FUSED[0], "method": method}], **{"verbose": 0, **options})


def ordered(callback: Callback, others: list[Callback], *, first: bool) -> list[Callback]:
    return [callback, *others] if first else [*others, callback]


def evaluate(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    return out


def deployed_of(callback: QuantFusionCallback) -> LightningModule:
    assert isinstance(callback.deployed_model, LightningModule)
    return callback.deployed_model


def losses(make: TrainerMaker, model: LightningModule) -> Any:
    return make().test(model, loader(seed=2), verbose=False)


# -- those that only watch or count -------------------------------------------------------------------------------------------

WATCHING: dict[str, Callable[[Path], list[Callback]]] = {
    "several ModelCheckpoints": lambda folder: [
        ModelCheckpoint(folder / "best", monitor="val_loss"),
        ModelCheckpoint(folder / "last", save_last=True),
        ModelCheckpoint(folder / "steps", every_n_train_steps=3, save_top_k=-1),
    ],
    "EarlyStopping": lambda folder: [EarlyStopping("val_loss", patience=0, min_delta=10.0)],
    "RichProgressBar": lambda folder: [RichProgressBar()],
    "TQDMProgressBar": lambda folder: [TQDMProgressBar()],
    "ModelSummary": lambda folder: [ModelSummary(max_depth=-1)],
    "RichModelSummary": lambda folder: [RichModelSummary(max_depth=-1)],
    "LearningRateMonitor": lambda folder: [LearningRateMonitor(log_momentum=True, log_weight_decay=True)],
    "DeviceStatsMonitor": lambda folder: [DeviceStatsMonitor(cpu_stats=False)],
    "Timer": lambda folder: [Timer("00:01:00:00")],
    "GradientAccumulationScheduler": lambda folder: [GradientAccumulationScheduler({0: 1, 1: 2})],
    "LambdaCallback": lambda folder: [LambdaCallback(on_train_epoch_end=lambda trainer, module: None)],
    "ThroughputMonitor": lambda folder: [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2)],
    "OnExceptionCheckpoint": lambda folder: [OnExceptionCheckpoint(folder)],
}


@quietly
@orders
@pytest.mark.parametrize("name", WATCHING)
def test_beside_those_that_watch_training_is_as_without_them(
    name: str, first: bool, quiet_trainer: TrainerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals, logged = [], name in ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor")
    for others in (WATCHING[name](tmp_path), []):
        torch.manual_seed(0)
        model, callback = Lit(), ours("lsq")
        counts = [GradientAccumulationScheduler({0: 1, 1: 2})] if "Accumulation" in name and not others else []
        options: dict[str, Any] = {"enable_progress_bar": "Bar" in name, "enable_model_summary": "Summary" in name}
        trainer = quiet_trainer(
            max_epochs=1 if name == "EarlyStopping" and not others else 2,
            callbacks=ordered(callback, [*others, *counts], first=first),
            enable_checkpointing=any("Checkpoint" in type(one).__name__ for one in others),
            logger=CSVLogger(tmp_path) if logged and others else False,
            log_every_n_steps=1,
            **options if others else {},
        )
        trainer.fit(model, loader(), loader(seed=1))
        source_is_best = "ModelCheckpoint" in name and others
        if not source_is_best:
            assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))
        finals.append({**model.state_dict(), **learned_parameters(model)})
    # A stop for want of improvement is one epoch later: the first has nothing to compare with.
    if name != "EarlyStopping":
        assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


@orders
def test_the_first_monitored_checkpoint_is_deployed_whatever_others_keep(
    first: bool, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    savers: list[Callback] = [
        ModelCheckpoint(tmp_path / "last", save_last=True),
        ModelCheckpoint(tmp_path / "worst", filename="{epoch}", monitor="val_loss", mode="max"),
        ModelCheckpoint(tmp_path / "best", filename="{epoch}", monitor="val_loss"),
    ]
    model, callback = Lit(), ours()
    trainer = quiet_trainer(max_epochs=3, callbacks=ordered(callback, savers, first=first), enable_checkpointing=True)
    trainer.fit(model, loader(), loader(seed=1))
    worst, best = (list(tmp_path.glob(f"{name}/*.ckpt")) for name in ("worst", "best"))
    assert len(worst) == len(best) == 1
    assert worst[0].name != best[0].name
    results = [trainer.test(model, loader(seed=2), ckpt_path=path, verbose=False) for path in (*worst, *best)]
    assert results[0] != results[1]
    assert losses(quiet_trainer, deployed_of(callback)) == results[0]


class Cut(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("power cut")


@quietly
@methods
def test_a_checkpoint_of_an_exception_resumes(method: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callbacks = [OnExceptionCheckpoint(tmp_path, "cut"), Cut(), ours(method)]
    with pytest.raises(RuntimeError, match="power cut"):
        quiet_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True).fit(Lit(), loader(), loader(seed=1))
    resumed, callback = Lit(), ours(method)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(resumed, loader(), loader(seed=1), ckpt_path=tmp_path / "cut.ckpt")
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(resumed))


# -- averages ------------------------------------------------------------------------------------------------------------------


class Shown(Callback):
    """What the model gives at the end of each validation, while averaged weights are in place, and its weights then."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.outputs.append(pl_module(X).clone())
            self.weights.append(pl_module.get_submodule("conv1").weight.detach().clone())  # type: ignore[operator]


AVERAGES: dict[str, Callable[[], Callback]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
    "WeightAveraging": WeightAveraging,
}


@orders
@methods
@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_that_was_validated_is_deployed(name: str, method: str, first: bool, quiet_trainer: TrainerMaker) -> None:
    """Weight by weight as in float training: the averages are those that the same Trainer makes of the trained weights."""
    model, callback, shown, average = Lit(), ours(method), Shown(), AVERAGES[name]()
    trainer = quiet_trainer(max_epochs=2, callbacks=[*ordered(callback, [average], first=first), shown], limit_val_batches=1)
    trainer.fit(model, loader(), loader(seed=1))
    assert len(shown.outputs) == 2
    assert torch.equal(evaluate(deployed_of(callback)), shown.outputs[-1])
    assert torch.equal(evaluate(model), shown.outputs[-1])
    assert losses(quiet_trainer, deployed_of(callback)) == losses(quiet_trainer, model)
    assert torch.equal(model.get_submodule("conv1").weight, shown.weights[-1])  # type: ignore[arg-type]


@quietly
@orders
@methods
def test_the_averaged_best_is_deployed(method: str, first: bool, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    model, callback, shown = Lit(), ours(method), Shown()
    others: list[Callback] = [EMAWeightAveraging(decay=0.8), saver]
    callbacks = [*ordered(callback, others, first=first), shown]
    quiet_trainer(max_epochs=3, callbacks=callbacks, limit_val_batches=1, enable_checkpointing=True).fit(
        model, loader(), loader(seed=1)
    )
    assert any(torch.equal(evaluate(deployed_of(callback)), output) for output in shown.outputs)
    assert not torch.equal(shown.outputs[0], shown.outputs[-1])
    fresh = quiet_trainer(callbacks=[ours(method)])
    assert fresh.test(Lit(), loader(seed=2), ckpt_path=saver.best_model_path, verbose=False) == losses(
        quiet_trainer, deployed_of(callback)
    )


@orders
@methods
def test_stochastic_weight_averages_are_deployed(method: str, first: bool, quiet_trainer: TrainerMaker) -> None:
    """The mean of the weights with which epochs began, and batch norm's statistics made anew for it, though they are frozen."""

    class Starts(Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.weights.append(pl_module.get_submodule("conv1").weight.detach().double())  # type: ignore[operator]

    model, callback, starts = Lit(), ours(method, schedule={"freeze_batch_norm": 2}), Starts()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [*ordered(callback, [averaging], first=first), starts]
    before = model.get_submodule("bn1").running_mean.clone()  # type: ignore[operator]
    quiet_trainer(max_epochs=4, callbacks=callbacks).fit(model, loader(), loader(seed=1))
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))
    assert losses(quiet_trainer, deployed_of(callback)) == losses(quiet_trainer, model)
    weight = model.get_submodule("conv1").weight.detach().double()  # type: ignore[operator]
    torch.testing.assert_close(weight, torch.stack(starts.weights[:4]).mean(0), rtol=1e-5, atol=1e-7)
    assert not torch.equal(model.get_submodule("bn1").running_mean, before)  # type: ignore[arg-type]


# -- pruning -------------------------------------------------------------------------------------------------------------------


def zeros(tensor: Any) -> int:
    return int((tensor == 0).sum())


@quietly
@orders
@methods
@pytest.mark.parametrize("permanent", [True, False], ids=["made permanent", "masks stay"])
@pytest.mark.parametrize("what", [["weight"], ["weight", "bias"]], ids=["weights", "weights and biases"])
def test_pruned_zeros_are_zero_integers(
    what: list[str], permanent: bool, method: str, first: bool, quiet_trainer: TrainerMaker
) -> None:
    """Weights of convolutions, batch norms and all: what the mask has set to zero is zero in the deployed model."""
    model, callback = Lit(), ours(method)
    pruning = ModelPruning(
        "l1_unstructured",
        parameter_names=what,
        amount=0.3,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=permanent,
    )
    quiet_trainer(max_epochs=2, callbacks=ordered(callback, [pruning], first=first)).fit(model, loader(), loader(seed=1))
    assert prune.is_pruned(model) != permanent
    deployed = deployed_of(callback)
    assert torch.equal(evaluate(deployed), evaluate(model))
    assert not prune.is_pruned(deployed)
    assert not [key for key in deployed.state_dict() if key.endswith(("_orig", "_mask"))]
    total = 0
    for name in ("conv1", "conv2", "fc"):
        weight: Any = model.get_submodule(name).weight
        integers: Any = deployed.get_submodule(name).weight
        assert integers.dtype == torch.int8
        assert zeros(integers[weight == 0]) == zeros(weight)
        total += zeros(weight)
    assert total > 400, "about half of 960, global over all layers"


@quietly
@methods
@pytest.mark.parametrize("permanent", [True, False], ids=["made permanent", "masks stay"])
@pytest.mark.parametrize("mode", ["min", "max"], ids=["last", "before any mask"])
def test_the_best_of_a_pruned_run_is_deployed(
    mode: str, permanent: bool, method: str, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """The first checkpoint is of before the first mask, with other keys than the last ones if masks stay."""

    class Counts(Lit):
        def on_validation_epoch_end(self) -> None:
            self.log("score", -float(self.current_epoch))

    pruning = ModelPruning(
        "l1_unstructured",
        parameter_names=["weight"],
        amount=0.3,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=permanent,
    )
    # Otherwise Lightning saves after it has pruned: weights that it did not validate, with a float model neither.
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", mode=mode, save_on_train_epoch_end=False)
    model, callback, shown = Counts(), ours(method), Shown()
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[callback, pruning, saver, shown], enable_checkpointing=True, limit_val_batches=1
    )
    trainer.fit(model, loader(), loader(seed=1))
    assert saver.best_model_path.endswith("epoch=1.ckpt" if mode == "min" else "epoch=0.ckpt")
    assert torch.equal(evaluate(deployed_of(callback)), shown.outputs[-1 if mode == "min" else 0])
    assert not torch.equal(shown.outputs[0], shown.outputs[-1])


@quietly
@methods
def test_pruned_epochs_are_validated_as_they_are(method: str, quiet_trainer: TrainerMaker) -> None:
    """The masked gammas and betas of now are folded, not those of the last forward."""

    class Fresh(Callback):
        compared = 0

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                mine, anew = evaluate(pl_module), evaluate(convert_model(pl_module))
                pl_module.train()
                assert torch.equal(mine, anew)
                Fresh.compared += prune.is_pruned(pl_module)

    pruning = ModelPruning("l1_unstructured", parameter_names=["weight", "bias"], amount=0.3, use_lottery_ticket_hypothesis=False)
    model, callback = Lit(), ours(method)
    quiet_trainer(max_epochs=3, callbacks=[callback, pruning, Fresh()]).fit(model, loader(), loader(seed=1))
    assert Fresh.compared >= 2


def test_a_mask_stops_the_gradient_and_a_fresh_value_is_folded() -> None:
    """By hand: after an optimizer step `norm.weight` is of the forward before, but what counts is the masked parameter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    prepare_model(net, make_plan(net, "int8", example_input=X)).train()
    for module, name in ((net[0], "weight"), (net[0], "bias"), (net[1], "weight"), (net[1], "bias")):
        prune.random_unstructured(module, name, amount=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert zeros(net[0].weight_orig.grad) >= zeros(net[0].weight_mask)
        optimizer.step()
    deployed = convert_model(net)
    for module, name in ((net[0], "weight"), (net[0], "bias"), (net[1], "weight"), (net[1], "bias")):
        prune.remove(module, name)
    assert torch.equal(evaluate(deployed), evaluate(net))
    assert torch.equal(evaluate(convert_model(net)), evaluate(net))


# -- finetuning ----------------------------------------------------------------------------------------------------------------


class Groups(Callback):
    """Which groups the optimizer has, and what is learned, after every epoch."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []
        self.learned: list[dict[str, Tensor]] = []
        self.weights: list[Tensor] = []
        self.means: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sizes.append([len(group["params"]) for group in trainer.optimizers[0].param_groups])
        self.learned.append({name: value.detach().clone() for name, value in learned_parameters(pl_module).items()})
        self.weights.append(pl_module.get_submodule("conv1").weight.detach().clone())  # type: ignore[operator]
        self.means.append(pl_module.get_submodule("bn1").running_mean.clone())  # type: ignore[operator]


@quietly
@orders
@methods
@pytest.mark.parametrize("train_bn", [True, False])
def test_a_backbone_is_frozen_then_trained_and_scales_train_with_it(
    train_bn: bool, method: str, first: bool, quiet_trainer: TrainerMaker
) -> None:
    model, callback, groups = Backboned(), ours(method), Groups()
    finetuning = BackboneFinetuning(1, backbone_initial_lr=0.01) if train_bn else FrozenNorms(1, backbone_initial_lr=0.01)
    callbacks = [*ordered(callback, [finetuning], first=first), groups]
    before = model.get_submodule("bn1").running_mean.clone()  # type: ignore[operator]
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(model, loader(), loader(seed=1))
    learned = len(learned_parameters(model))
    assert (learned > 0) == (method == "lsq")
    plain = 6 if train_bn else 2
    assert groups.sizes == [[plain + learned], [plain + learned, 8 - plain], [plain + learned, 8 - plain]]
    assert torch.equal(groups.means[0], before) != train_bn
    assert not torch.equal(groups.weights[0], groups.weights[1])
    for one, two in zip(groups.learned, groups.learned[1:], strict=False):
        assert all(not torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))


class FrozenNorms(BackboneFinetuning):
    """Freezes batch norms, too: Lightning does it by `track_running_stats = False`."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.get_submodule("conv1"))
        self.freeze([pl_module.get_submodule(name) for name in ("bn1", "conv2", "bn2")], train_bn=False)


class Stepwise(BaseFinetuning):
    """Unfreezes a layer an epoch, from the back."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze([pl_module.get_submodule("conv1"), pl_module.get_submodule("conv2")], train_bn=True)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        for moment, name in ((1, "conv2"), (2, "conv1")):
            if epoch == moment:
                self.unfreeze_and_add_param_group(pl_module.get_submodule(name), optimizer, lr=0.01)


@quietly
@orders
@methods
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "same objects"])
def test_finetuning_of_ones_own_resumes_where_it_was(
    fresh: bool, method: str, first: bool, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """Lightning freezes anew what was unfrozen; but groups, momenta and scales are where they were."""
    model, callback, groups = Backboned(), ours(method), Groups()
    trainer = quiet_trainer(max_epochs=2, callbacks=[*ordered(callback, [Stepwise()], first=first), groups])
    trainer.fit(model, loader(), loader(seed=1))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again, other = Backboned() if fresh else model, Groups(), ours(method) if fresh else callback
    trainer = quiet_trainer(max_epochs=3, callbacks=[*ordered(other, [Stepwise()], first=not first), again])
    trainer.fit(resumed, loader(), loader(seed=1), ckpt_path=tmp_path / "half.ckpt")
    assert again.sizes == [[*groups.sizes[-1], 1]]
    assert len(trainer.optimizers[0].state) == sum(again.sizes[0])
    names = {id(value): name for name, value in learned_parameters(resumed).items()}
    ids = [id(parameter) for parameter in trainer.optimizers[0].param_groups[0]["params"] if id(parameter) in names]
    assert [names[one] for one in ids] == list(learned_parameters(model))


def test_without_finetuning_the_order_of_callbacks_is_the_users(quiet_trainer: TrainerMaker) -> None:
    callback, other = ours(), Groups()
    trainer = quiet_trainer(max_epochs=1, callbacks=[other, callback])
    trainer.fit(Lit(), loader(), loader(seed=1))
    assert [one for one in trainer.callbacks if one in (callback, other)] == [other, callback]  # type: ignore[attr-defined]


# -- tuners --------------------------------------------------------------------------------------------------------------------


class Start(Callback):
    """Whether any range was known when training began."""

    def __init__(self) -> None:
        self.ready: list[bool] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = prepared_groups(pl_module).values()
        self.ready = [quantizer.ready for _, group in groups for quantizer in group.quantizers]


TUNERS: list[tuple[Callable[[], Callback], type[Lit]]] = [
    (lambda: LearningRateFinder(num_training_steps=5), Lit),
    (lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1), Batched),
]


@quietly
@orders
@pytest.mark.parametrize(("tuner", "kind"), TUNERS, ids=["LearningRateFinder", "BatchSizeFinder"])
def test_a_tuners_trials_leave_no_range(
    tuner: Callable[[], Callback], kind: type[Lit], first: bool, quiet_trainer: TrainerMaker
) -> None:
    model, callback, start = kind(), ours("lsq"), Start()
    trainer = quiet_trainer(max_epochs=1, callbacks=[*ordered(callback, [tuner()], first=first), start])
    trainer.fit(model, None if kind is Batched else loader(), loader(seed=1))
    assert start.ready
    assert not any(start.ready)
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))


@quietly
@methods
def test_a_tuner_in_a_second_fit_moves_no_range(method: str, quiet_trainer: TrainerMaker) -> None:
    """The model is prepared by then, so trials run on it; Lightning restores what they have moved."""

    class Known(Callback):
        ranges = ""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            Known.ranges = str(quantizer_state(pl_module))

    model, callback = Lit(), ours(method, schedule={"observe_stop": None})
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    before = str(quantizer_state(model))
    callbacks = [callback, LearningRateFinder(num_training_steps=5), Known()]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(model, loader(), loader(seed=1))
    assert Known.ranges == before != str(quantizer_state(model))
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))
