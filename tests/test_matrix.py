# SPDX-License-Identifier: Apache-2.0
"""Owns the matrix of Lightning's features: in each, training that is interrupted and resumed is training that never stopped.

Where a float model alone is not bitwise after a resume, the same row without the callback shows it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from toys import FUSED, Lit, Net, loader

from lightning_quant import QuantFusionCallback
from lightning_quant.integer import IntegerLayer
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
SCHEDULE = {"observe_stop": "epoch 3", "freeze_batch_norm": "epoch 3"}


# -- models, one a way to optimize -----------------------------------------------------------------------------------------------


class Groups(Lit):
    """Weights decay, everything else does not."""

    def configure_optimizers(self) -> Optimizer:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 0.01)


class Scheduled(Lit):
    """A learning rate that moves: at every step, or as `each` says."""

    each: ClassVar[dict[str, Any]] = {"interval": "step"}

    def schedule(self, optimizer: Optimizer) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), **self.each}}


class Sequential(Scheduled):
    def schedule(self, optimizer: Optimizer) -> Any:
        parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
        return lr_scheduler.SequentialLR(optimizer, parts, [5])


class Lambda(Scheduled):
    def schedule(self, optimizer: Optimizer) -> Any:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


class OneCycle(Scheduled):
    def schedule(self, optimizer: Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=16)


class Cosine(Scheduled):
    def schedule(self, optimizer: Optimizer) -> Any:
        return lr_scheduler.CosineAnnealingLR(optimizer, 16)


class Plateau(Scheduled):
    each: ClassVar[dict[str, Any]] = {"monitor": "val_loss"}

    def schedule(self, optimizer: Optimizer) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


class Two(Lit):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        early = [p for name, p in self.named_parameters() if name.startswith(("conv1", "bn1"))]
        late = [p for name, p in self.named_parameters() if not name.startswith(("conv1", "bn1"))]
        return [Adam(early, 0.01), SGD(late, 0.01, momentum=0.9)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class Newton(Lit):
    """LBFGS: several forwards a step."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.02, max_iter=3, history_size=3)


class Late(Lit):
    """Its layers are built in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        for name in Net()._modules:
            delattr(self, name)

    def configure_model(self) -> None:
        if not hasattr(self, "conv1"):
            for name, module in Net().named_children():
                self.add_module(name, module)


class LateSetup(Late):
    """Its layers are built in setup."""

    def setup(self, stage: str) -> None:
        Late.configure_model(self)

    def configure_model(self) -> None:
        pass


class Backboned(Lit):
    """For BackboneFinetuning: the convolutions are the backbone, frozen at first."""

    @property
    def backbone(self) -> nn.Module:
        return nn.ModuleList([self.get_submodule(name) for name in ("conv1", "bn1", "conv2", "bn2")])

    def configure_optimizers(self) -> Optimizer:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Mute(Lit):
    """Logs nothing in training: torch 2.13 cannot compile Lightning's `self.log`, with a float model neither."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])


class Batched(Lit):
    """For BatchSizeFinder: it may choose the batch size."""

    batch_size = 16

    def train_dataloader(self) -> Any:
        return loader(batch=self.batch_size)


class Rarely(Two):
    """One optimizer, stepped by hand after every fourth batch."""

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.01)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


# -- rows ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One feature: a model, what is in the Trainer beside ours, and whether float alone is bitwise after a resume."""

    model: type[Lit] = Lit
    more: Callable[[], list[Callback]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    make_options: Callable[[], Mapping[str, Any]] = dict
    wrap: Callable[[LightningModule], Any] = lambda model: model
    resume_from: str = "last.ckpt"
    bitwise: bool = True
    best_is_deployed: bool = True  # WeightAveraging puts weights back that are not averaged when test("best") loads
    restored_in_float32: bool = False  # a fresh Trainer loads weights before it converts the module to double
    apart: tuple[str, ...] = ()  # what Lightning itself does not bring back, with a float model neither


def scaled() -> Mapping[str, Any]:
    """16-mixed on a CPU, where Lightning has no scaler of its own; its first steps overflow and are skipped."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**18))]}


ROWS = {
    "plain": Row(),
    "param groups": Row(model=Groups),
    "SequentialLR": Row(model=Sequential),
    "LambdaLR": Row(model=Lambda),
    "OneCycleLR": Row(model=OneCycle),
    "CosineAnnealingLR": Row(model=Cosine),
    "ReduceLROnPlateau": Row(model=Plateau, resume_from="end.ckpt"),
    "two optimizers by hand": Row(model=Two),
    "LBFGS": Row(model=Newton),
    "accumulate_grad_batches": Row(options={"accumulate_grad_batches": 3}),
    "GradientAccumulationScheduler": Row(more=lambda: [GradientAccumulationScheduler({0: 1, 1: 4})]),
    "clip by norm": Row(options={"gradient_clip_val": 0.1}),
    "clip by value": Row(options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": Row(options={"precision": "bf16-mixed"}),
    "16-mixed": Row(make_options=scaled),
    "64-true": Row(options={"precision": "64-true"}, bitwise=False, restored_in_float32=True),
    "configure_model": Row(model=Late),
    "setup": Row(model=LateSetup),
    "torch.compile": Row(model=Mute, wrap=lambda model: torch.compile(model, backend="eager")),
    "EMAWeightAveraging": Row(more=lambda: [EMAWeightAveraging(decay=0.9)], best_is_deployed=False),
    "StochasticWeightAveraging": Row(
        more=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3, annealing_epochs=1)]
    ),
    "SWA, resumed within": Row(
        more=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)],
        apart=("scheduler 0.last_epoch",),
    ),
    "ModelPruning": Row(
        more=lambda: [
            ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.2, use_lottery_ticket_hypothesis=False)
        ],
        bitwise=False,
    ),
    "LearningRateFinder": Row(more=lambda: [LearningRateFinder(num_training_steps=5, update_attr=True)], bitwise=False),
    "BatchSizeFinder": Row(
        model=Batched, more=lambda: [BatchSizeFinder(mode="power", max_trials=1, steps_per_trial=1)], bitwise=False
    ),
    "val_check_interval": Row(options={"val_check_interval": 3}, bitwise=False),
    "BackboneFinetuning, frozen": Row(model=Backboned, more=lambda: [BackboneFinetuning(3, backbone_initial_lr=0.01)]),
    "BackboneFinetuning, trained": Row(
        model=Backboned, more=lambda: [BackboneFinetuning(1, backbone_initial_lr=0.01)], bitwise=False
    ),
}


def ours_of(method: str) -> QuantFusionCallback:
    """The callback; method "all" masks by gradients and has the float model for a teacher besides."""
    if method != "all":
        return QuantFusionCallback([{**FUSED[0], "method": method}], schedule=SCHEDULE, verbose=0)
    return QuantFusionCallback(
        FUSED,
        pruning={
            "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "metric": "taylor"}],
            "stop": "step 3",
            "updates": 2,
        },
        distillation=["kl", {"op_names": ["relu1"], "apply_method": "cosine", "lambda": 0.5}],
        teacher="self",
        schedule=SCHEDULE,
        verbose=0,
    )


def run(
    make: TrainerMaker, row: Row, folder: Path, method: str, epochs: int, ckpt_path: Path | None = None
) -> tuple[Trainer, Lit, QuantFusionCallback | None]:
    """A fit of this row; `method` "float" is without the callback."""
    torch.manual_seed(0)
    model = row.model()
    ours = None if method == "float" else ours_of(method)
    saver = ModelCheckpoint(folder, monitor="val_loss", save_last=True)
    trainer = make(
        max_epochs=epochs,
        callbacks=[*([ours] if ours else []), *row.more(), saver],
        enable_checkpointing=True,
        num_sanity_val_steps=1,
        **row.options,
        **row.make_options(),
    )
    data = None if isinstance(model, Batched) else loader()
    trainer.fit(row.wrap(model), data, loader(seed=1), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    return trainer, model, ours


def everything(trainer: Trainer, model: Lit) -> dict[str, Any]:
    """All numbers that training has moved, by where they are."""
    found: dict[str, Any] = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    learned = learned_parameters(model)
    found |= {f"learned.{key}": value.detach().clone() for key, value in learned.items()}
    found |= dict(leaves("ranges", quantizer_state(model)))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, QuantFusionCallback) and callback.masks is not None:
            found |= dict(leaves("masks", callback.masks.state_dict()))
    for index, optimizer in enumerate(trainer.optimizers):
        found |= dict(leaves(f"optimizer {index}", optimizer.state_dict()))
    for index, config in enumerate(trainer.lr_scheduler_configs):
        found |= dict(leaves(f"scheduler {index}", config.scheduler.state_dict()))
    return found


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from leaves(f"{name}.{key}", inner)
    elif isinstance(value, Tensor):
        yield name, value.clone()
    elif isinstance(value, int | float | str | None):
        yield name, value


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Where two states differ, one bit being enough."""
    assert set(one) == set(two)
    return [key for key, value in one.items() if not _equal(value, two[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


# Lightning's advice on all these features is not what is tested.
quietly = pytest.mark.filterwarnings("ignore::UserWarning")
BITWISE = [name for name, row in ROWS.items() if row.bitwise]
QUICK = ("plain", "accumulate_grad_batches", "16-mixed", "EMAWeightAveraging")
# There the step itself adds the teacher's loss; frozen layers have no gradients, by which these masks are made, until the end.
BY_HAND = ("two optimizers by hand", "BackboneFinetuning, frozen")
NOT_BITWISE = [name for name, row in ROWS.items() if not row.bitwise]


def cases(names: list[str], *, slow: tuple[str, str]) -> list[Any]:
    """Every name with both methods; what takes seconds is left to the second step."""
    every = [(name, method) for name in names for method in ("qat", "lsq")]
    return [pytest.param(*case, marks=[pytest.mark.slow] if case == slow else []) for case in every]


@quietly
@pytest.mark.parametrize(("name", "method"), cases(BITWISE, slow=("torch.compile", "qat")))
def test_resumed_is_uninterrupted(name: str, method: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    same_as_uninterrupted(ROWS[name], method, quiet_trainer, tmp_path)


def same_as_uninterrupted(row: Row, method: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> QuantFusionCallback:
    trainer, model, ours = run(quiet_trainer, row, tmp_path / "straight", method, 4)
    straight = everything(trainer, model)
    assert bool(learned_parameters(model)) == (method == "lsq")
    run(quiet_trainer, row, tmp_path / "halves", method, 2)
    again, resumed, callback = run(quiet_trainer, row, tmp_path / "halves", method, 4, tmp_path / "halves" / row.resume_from)
    assert not [key for key in differing(straight, everything(again, resumed)) if key not in row.apart]
    assert again.global_step == trainer.global_step
    assert same_output(ours, callback)
    assert_one_best(quiet_trainer, row, trainer, model, ours)
    assert ours is not None
    return ours


@quietly
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in BITWISE if n not in BY_HAND]
)
def test_so_it_is_with_masks_and_a_teacher(name: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    ours = same_as_uninterrupted(ROWS[name], "all", quiet_trainer, tmp_path)
    assert isinstance(conv := ours.deployed_model.conv2, IntegerLayer)  # type: ignore[union-attr]
    assert conv.weight.shape == (4, 4, 3, 3)


@quietly
@pytest.mark.parametrize(("name", "method"), cases(NOT_BITWISE, slow=("BatchSizeFinder", "qat")))
def test_where_float_alone_deviates_resumes_agree(name: str, method: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """Whatever Lightning does there, it does to the end, and each resume from the same file does it again."""
    row, start = ROWS[name], tmp_path / "start.ckpt"
    trainer, model, ours = run(quiet_trainer, row, tmp_path / "straight", method, 2)
    shutil.copy(tmp_path / "straight" / row.resume_from, start)
    runs = [run(quiet_trainer, row, tmp_path / str(index), method, 4, start) for index in range(2)]
    one, two = (everything(again, resumed) for again, resumed, _ in runs)
    assert not differing(one, two)
    assert differing(everything(trainer, model), one), "it went on"
    assert same_output(runs[0][2], runs[1][2], wide=name == "64-true")
    assert_one_best(quiet_trainer, row, trainer, model, ours)


@quietly
@pytest.mark.parametrize("name", NOT_BITWISE)
def test_float_alone_deviates(name: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """If this fails, Lightning has mended it: make the row bitwise."""
    row = ROWS[name]
    straight = everything(*run(quiet_trainer, row, tmp_path / "straight", "float", 4)[:2])
    run(quiet_trainer, row, tmp_path / "halves", "float", 2)
    again, resumed, _ = run(quiet_trainer, row, tmp_path / "halves", "float", 4, tmp_path / "halves" / row.resume_from)
    assert [key for key in differing(straight, everything(again, resumed)) if key.startswith("model.")]


def same_output(one: QuantFusionCallback | None, two: QuantFusionCallback | None, *, wide: bool = False) -> bool:
    """Whether two deployed models give the same bits."""
    assert one is not None
    assert two is not None
    assert one.deployed_model is not None
    assert two.deployed_model is not None
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64 if wide else torch.float32)
    with torch.no_grad():
        return torch.equal(one.deployed_model(x), two.deployed_model(x))


def assert_one_best(make: TrainerMaker, row: Row, trainer: Trainer, model: Lit, ours: QuantFusionCallback | None) -> None:
    """`test("best")` in the training process, by a fresh Trainer with a fresh model, and of what was deployed: one result."""
    assert ours is not None
    assert ours.deployed_model is not None
    (here,) = trainer.test(model, loader(seed=2), ckpt_path="best", verbose=False)
    deployed = ours.deployed_model
    assert isinstance(deployed, LightningModule)
    options = {key: value for key, value in {**row.options, **row.make_options()}.items() if key in ("precision", "plugins")}
    (shipped,) = make(**options).test(deployed, loader(seed=2), verbose=False)
    saver = trainer.checkpoint_callback
    assert isinstance(saver, ModelCheckpoint)
    anew = QuantFusionCallback(ours.config_list, pruning=None if ours.pruning is None else vars(ours.pruning), verbose=0)
    fresh = make(callbacks=[anew], **options)
    (there,) = fresh.test(row.wrap(row.model()), loader(seed=2), ckpt_path=saver.best_model_path, verbose=False)
    if row.restored_in_float32:
        assert there == pytest.approx(shipped, rel=1e-5)
    else:
        assert there == shipped
    assert (here == shipped) == row.best_is_deployed


# -- the default schedule where optimizers are stepped by hand -----------------------------------------------------------------


class Moments(Callback):
    """Whether ranges move, batch by batch; may save a checkpoint before or after a batch."""

    def __init__(self, save: str = "", path: Path | None = None) -> None:
        self.observes: list[bool] = []
        self.save, self.path = save, path

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.save == "before" and len(self.observes) == 9:
            trainer.save_checkpoint(str(self.path))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.observes.append(prepared_groups(pl_module)["conv1"][1].phase.observe)
        if self.save == "after" and len(self.observes) == 9:
            trainer.save_checkpoint(str(self.path))


@pytest.mark.parametrize(
    ("model", "limits", "moving", "still"),
    [
        (Lit, {"max_epochs": 5}, 18, 2),
        (Two, {"max_epochs": 5}, 18, 2),
        (Rarely, {"max_epochs": 5}, 18, 2),
        (Two, {"max_steps": 40}, 18, 2),
        (Two, {"max_epochs": 5, "max_steps": 20}, 9, 1),
        (Two, {"max_epochs": 5, "max_steps": 200}, 18, 2),
        (Rarely, {"max_epochs": -1, "max_steps": 10}, 36, 4),
    ],
)
def test_ranges_stand_still_for_the_last_tenth(
    model: type[Lit], limits: dict[str, int], moving: int, still: int, quiet_trainer: TrainerMaker
) -> None:
    moments = Moments()
    quiet_trainer(callbacks=[QuantFusionCallback(FUSED, verbose=0), moments], **limits).fit(model(), loader(), loader(seed=1))
    assert moments.observes == [True] * moving + [False] * still


@quietly
@pytest.mark.parametrize("save", ["before", "after"])
@pytest.mark.parametrize("model", [Two, Rarely])
def test_a_share_is_the_same_after_a_resume_within_an_epoch(
    model: type[Lit], save: str, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """Saved when 9 of 20 batches were through, whichever hook it was."""
    path = tmp_path / "within.ckpt"
    first, second = Moments(save, path), Moments()
    for moments, given in ((first, None), (second, path)):
        callbacks = [QuantFusionCallback(FUSED, verbose=0), moments]
        quiet_trainer(max_epochs=5, callbacks=callbacks).fit(model(), loader(), loader(seed=1), ckpt_path=given)
    assert first.observes == [True] * 18 + [False] * 2
    assert second.observes == [True] * 9 + [False] * 2
