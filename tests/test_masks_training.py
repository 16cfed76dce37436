# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of masks while a model is trained: gradients, schedules, resuming, quantization, a Trainer around it all."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from toys import Calls, Lit, Net, loader

from lightning_quant import (
    QuantFusionCallback,
    convert_model,
    export_model,
    load_deployed,
    make_plan,
    prepare_model,
    restore_model,
)
from lightning_quant.config import ConfigError
from lightning_quant.export import onnxruntime_session
from lightning_quant.masks import Masks, make_pruning
from lightning_quant.record import record
from lightning_quant.schedule import Clock
from lightning_quant.targets import owner_of

SLOW = {"schedule": "linear", "start": 0, "stop": 20, "updates": 4}


def clock(step: int, length: float = 40) -> Clock:
    return Clock(step=step, epoch=0, done=step, length=length)


class Loop:
    """A training loop of `Net` on random data, with masks where the interface wants them."""

    def __init__(self, pruning: Any, model: nn.Module | None = None, lr: float = 0.05, momentum: float = 0.9) -> None:
        torch.manual_seed(1)
        self.model = (Net() if model is None else model).train()
        self.x, self.y = torch.randn(40, 8, 3, 8, 8), torch.randint(0, 4, (40, 8))
        graph = record(self.model, self.x[0])
        self.masks = Masks(self.model, make_pruning(self.model, pruning, graph))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def run(self, start: int, stop: int, watch: Callable[[int], None] = lambda step: None) -> None:
        for step in range(start, stop):
            self.masks.step(clock(step))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x[step]), self.y[step]).backward()
            self.masks.after_backward()
            watch(step)
            self.optimizer.step()
            self.masks.apply()


def conv_entry(**keys: Any) -> dict[str, Any]:
    return {"config_list": [{"op_names": ["conv1", "conv2"], "target_names": ["weight"], **keys}], **SLOW}


@pytest.mark.parametrize("metric", ["l1", "l2", "level", "fpgm", "slim", "taylor", "movement", "random"])
def test_masks_grow_and_hold_under_momentum(metric: str) -> None:
    loop = Loop(conv_entry(sparse_ratio=0.5, metric=metric))
    shares: list[float] = []

    def watch(step: int) -> None:
        for name, mask in loop.masks.by_target().items():
            owner, own = owner_of(loop.model, name)
            assert not owner.get_parameter(own)[~mask].any()
        shares.append(loop.masks.sparsity()["conv1.weight"])

    before = {name: one.detach().clone() for name, one in loop.model.named_parameters()}
    loop.run(0, 40, watch)
    expected = [0.0] * 5 + [0.125] * 5 + [0.25] * 5 + [0.375] * 5 + [0.5] * 20
    assert shares == expected
    moved = [name for name, one in loop.model.named_parameters() if not torch.equal(one, before[name])]
    assert set(moved) == set(before)
    if metric != "level":  # batch norms behind masked channels are masked, too
        assert torch.equal(loop.masks.by_target()["bn1.weight"], loop.masks.by_target()["conv1.weight"].flatten(1).all(1))
        assert loop.masks.sparsity()["bn1.bias"] == 0.5


@pytest.mark.parametrize("metric", ["l1", "level", "random", "taylor", "fpgm"])
def test_a_masked_block_stays_masked(metric: str) -> None:
    loop, seen = Loop(conv_entry(sparse_ratio=0.75, metric=metric)), list[Tensor]()
    loop.run(0, 40, lambda step: seen.append(loop.masks.by_target()["conv1.weight"]))
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(seen))
    assert sum(not torch.equal(earlier, later) for earlier, later in itertools.pairwise(seen)) == 4


@pytest.mark.parametrize(("metric", "at"), [("level", 10), ("taylor", 7), ("movement", 7), ("movement", 26), ("random", 10)])
def test_a_run_that_stops_goes_on_bit_for_bit(metric: str, at: int) -> None:
    pruning = conv_entry(sparse_ratio=0.5, metric=metric)
    whole = Loop(pruning)
    whole.run(0, 40)
    first, second = Loop(pruning), Loop(pruning)
    first.run(0, at)
    buffer = copy.deepcopy([first.model.state_dict(), first.optimizer.state_dict(), first.masks.state_dict()])
    second.model.load_state_dict(buffer[0])
    second.optimizer.load_state_dict(buffer[1])
    second.masks.load_state_dict(buffer[2])
    second.run(at, 40)
    for (name, one), (_, other) in zip(whole.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_the_state_is_plain_and_of_one_plan(tmp_path: Path) -> None:
    loop = Loop(conv_entry(sparse_ratio=0.5, metric="movement"))
    loop.run(0, 12)
    torch.save(loop.masks.state_dict(), tmp_path / "masks.pt")
    state = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert all(mask.dtype == torch.bool for mask in state["masks"].values())
    other = Loop(conv_entry(sparse_ratio=0.25, metric="movement"))
    with pytest.raises(ConfigError, match=r"the saved masks are of another `pruning`: conv1.weight, conv2.weight differ"):
        other.masks.load_state_dict(state)
    assert other.masks.done == 0


# -- metrics from gradients ---------------------------------------------------------------------------------------------


class _TopV(torch.autograd.Function):
    """Sanh et al. 2020, eq. 2 and 3: the greatest scores stay; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, masked: int) -> Tensor:
        mask = torch.ones(scores.numel())
        mask[scores.flatten().argsort(stable=True)[:masked]] = 0
        return mask.reshape(scores.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def test_movement_is_that_of_scores_learned_straight_through() -> None:
    """The paper's own form: W' = W * top_v(S), S learned by SGD of rate 1, beside ours; values come back as they were."""
    x, y = torch.randn(30, 16, 6), torch.randn(30, 16, 5)
    twin, ours = nn.Linear(6, 5), nn.Linear(6, 5)
    ours.load_state_dict(twin.state_dict())
    model = nn.Sequential(ours)
    entries = [{"op_names": ["0"], "target_names": ["weight"], "metric": "movement", "granularity": [1], "sparse_ratio": 0.5}]
    masks = Masks(model, make_pruning(model, {"config_list": entries, "schedule": "linear", "stop": 20, "updates": 10}))
    scores, mask, returned = torch.zeros(5, 6, requires_grad=True), torch.ones(5, 6), 0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (twin, ours)]
    for step in range(30):
        if step % 2 == 0 and 0 < step <= 20:
            new = _TopV.apply(scores.detach(), int(15 * step / 20 + 1e-9))
            returned, mask = returned + int(((new == 1) & (mask == 0)).sum()), new
        masks.step(clock(step))
        assert torch.equal(masks.by_target().get("0.weight", torch.ones(5, 6, dtype=torch.bool)).float(), mask), step
        torch.testing.assert_close(ours.weight.detach(), (twin.weight * mask).detach())
        for optimizer in optimizers:
            optimizer.zero_grad()
        gate = mask + scores - scores.detach()  # the value of the mask, the gradient of the scores
        F.mse_loss(F.linear(x[step], twin.weight * gate, twin.bias), y[step]).backward()
        F.mse_loss(model(x[step]), y[step]).backward()
        masks.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        masks.apply()
        with torch.no_grad():
            assert scores.grad is not None
            scores -= scores.grad
            scores.grad = None
    assert returned > 0


def test_what_follows_a_block_comes_back_with_it() -> None:
    """A batch norm left at 0 would keep a channel dead whose weights have returned."""
    loop = Loop(conv_entry(sparse_ratio=0.5, metric="movement"))
    seen: list[Tensor] = []

    def watch(step: int) -> None:
        rows = loop.masks.by_target()["conv1.weight"].flatten(1).any(1)
        seen.append(rows)
        assert torch.equal(loop.model.get_parameter("conv1.weight").detach().flatten(1).any(1), rows), step
        assert torch.equal(loop.model.get_parameter("bn1.weight") != 0, rows), step

    loop.run(0, 7, watch)
    name = "conv1.weight"
    gone = ~loop.masks.by_target()[name].flatten(1).any(1)
    loop.masks._statistics[name] = torch.where(gone, 1e9, loop.masks._statistics[name])  # it moved away from 0 like no other
    loop.run(7, 20, watch)
    assert any((later & ~earlier).any() for earlier, later in itertools.pairwise(seen))


def test_taylor_is_the_mean_over_the_steps_since_the_last_mask() -> None:
    loop, squares = Loop(conv_entry(sparse_ratio=0.5, metric="taylor")), list[Any]()

    def watch(step: int) -> None:
        weight: Any = loop.model.get_parameter("conv1.weight")
        product = weight.detach().double().numpy() * weight.grad.double().numpy()
        squares.append(product.reshape(8, -1).sum(1) ** 2)

    loop.run(0, 5, watch)
    mean = np.mean(squares, axis=0)
    loop.masks.step(clock(5))
    assert int(np.argmin(mean)) == int((~loop.masks.by_target()["conv1.weight"].flatten(1).any(1)).nonzero()[0])
    squares.clear()
    gone = loop.masks.by_target()["conv1.weight"].flatten(1).any(1).numpy()
    loop.run(5, 10, watch)
    loop.masks.step(clock(10))
    mean = np.where(gone, np.mean(squares, axis=0), -1)
    rows = loop.masks.by_target()["conv1.weight"].flatten(1).any(1).numpy()
    assert set(np.flatnonzero(~rows)) == set(np.argsort(mean)[:2])


def test_a_step_that_overflowed_is_not_counted() -> None:
    loop = Loop(conv_entry(sparse_ratio=0.5, metric="taylor"))
    loop.run(0, 2)
    before = loop.masks.state_dict()["statistics"]
    for name in before:
        parameter = loop.model.get_parameter(name)
        assert parameter.grad is not None
        parameter.grad.fill_(torch.inf)
        parameter.grad.view(-1)[0] = torch.nan
    loop.masks.after_backward()
    after = loop.masks.state_dict()["statistics"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_are_waited_for() -> None:
    loop = Loop({"config_list": conv_entry(sparse_ratio=0.5, metric="taylor")["config_list"], "schedule": "one_shot"})
    assert not loop.masks.step(clock(0))
    loop.run(0, 1)
    assert loop.masks.step(clock(1)) and loop.masks.sparsity()["conv1.weight"] == 0.5


def test_slim_pulls_scales_to_zero_until_the_last_mask() -> None:
    loop = Loop({**conv_entry(sparse_ratio=0.5, metric="slim"), "penalty": 0.25})
    scale = loop.model.get_parameter("bn1.weight")
    for step, adds in ((0, True), (25, False)):
        loop.masks.step(clock(step))
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model(loop.x[0]), loop.y[0]).backward()
        assert scale.grad is not None
        before = scale.grad.clone()
        loop.masks.after_backward()
        torch.testing.assert_close(scale.grad - before, 0.25 * scale.detach().sign() * adds)


class Branch(Net):
    """`Net`, whose second block may be left out."""

    both = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x))) if self.both else x
        out: Tensor = self.fc(self.pool(x).flatten(1))
        return out


def test_a_parameter_without_gradient_is_waited_for() -> None:
    model = Branch()
    loop = Loop(conv_entry(sparse_ratio=0.5, metric="movement"), model)

    def waits() -> tuple[int, tuple[str, ...], bool]:
        return loop.masks.done, loop.masks.waits_for, loop.masks.waits_long

    model.both = False
    loop.run(0, 5)
    assert waits() == (0, (), False), "nothing is due"
    loop.run(5, 10)
    assert waits() == (0, ("conv2.weight",), False)
    loop.run(10, 12)
    assert waits() == (0, ("conv2.weight",), True)
    model.both = True
    loop.run(12, 14)
    assert waits() == (2, (), False)


def test_an_epoch_is_a_long_wait() -> None:
    loop = Loop({**conv_entry(sparse_ratio=0.5, metric="taylor"), "schedule": "one_shot"})
    for epoch, long in ((0, False), (0, False), (1, True)):
        assert not loop.masks.step(Clock(step=0, epoch=epoch, done=0, length=40)) and loop.masks.waits_long == long


@pytest.mark.parametrize("metric", ["taylor", "movement"])
def test_what_is_frozen_is_not_waited_for_and_joins_when_it_trains(metric: str) -> None:
    loop = Loop(conv_entry(sparse_ratio=0.5, metric=metric))
    frozen = loop.model.get_parameter("conv2.weight").requires_grad_(False)
    loop.run(0, 12)
    assert loop.masks.done == 2 and loop.masks.waits_for == ()
    assert [loop.masks.sparsity()[f"conv{i}.weight"] for i in (1, 2)] == [0.25, 0]
    assert loop.masks.unmasked() == ("conv2.weight",) and bool(frozen.all())
    frozen.requires_grad_(True)
    loop.run(12, 30)
    assert [loop.masks.sparsity()[f"conv{i}.weight"] for i in (1, 2)] == [0.5, 0.5] and loop.masks.unmasked() == ()
    assert int(frozen.flatten(1).any(1).sum()) == 4


def test_a_frozen_member_has_the_mask_that_the_others_of_its_group_make() -> None:
    loop = Loop(conv_entry(sparse_ratio=0.5, metric="taylor", dependency_group_id=1))
    loop.model.get_parameter("conv2.weight").requires_grad_(False)
    squares: list[Any] = []

    def watch(step: int) -> None:
        weight: Any = loop.model.get_parameter("conv1.weight")
        squares.append((weight.detach() * weight.grad).double().flatten(1).sum(1).square().numpy())

    loop.run(0, 5, watch)
    loop.masks.step(clock(5))
    least = int(np.argmin(np.mean(squares, axis=0)))
    for name in ("conv1.weight", "conv2.weight"):
        gone = ~loop.masks.by_target()[name].flatten(1).any(1)
        assert gone.nonzero().flatten().tolist() == [least], name
    assert loop.masks.unmasked() == ()


# -- another schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({}, 3),
        ({"schedule": "one_shot"}, 0),
        ({"updates": 2}, 1),
        ({"updates": 8}, 6),
        ({"updates": 40}, 30),
        ({"schedule": "agp"}, 1),
        ({"schedule": "agp", "updates": 40}, 14),
        ({"stop": 36}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("metric", ["l1", "movement"])
def test_a_run_goes_on_by_another_schedule_to_all_that_was_asked(changes: dict[str, Any], done: int, metric: str) -> None:
    """0.75 of it is there, 3 of 4 equal parts: by agp 1 of 4 is 0.578 and 2 are 0.875, 14 of 40 are 0.725 and 15 are 0.756."""
    pruning = conv_entry(sparse_ratio=0.5, metric=metric)
    first, second = Loop(pruning), Loop({**pruning, **changes})
    first.run(0, 17)
    assert first.masks.sparsity()["conv1.weight"] == 0.375
    second.model.load_state_dict(first.model.state_dict())
    second.masks.load_state_dict(copy.deepcopy(first.masks.state_dict()))
    assert second.masks.done == done and second.masks.sparsity()["conv1.weight"] == 0.375
    shares: list[float] = []
    second.run(17, 40, lambda step: shares.append(second.masks.sparsity()["conv1.weight"]))
    assert shares == sorted(shares) and shares[0] >= 0.375 and shares[-1] == 0.5
    assert second.masks.done == second.masks.plan.options.pace.steps


# -- together with quantization -----------------------------------------------------------------------------------------


def test_masks_are_inside_what_the_quantizer_sees() -> None:
    loop = Loop({"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "schedule": "one_shot"})
    plan = make_plan(loop.model, [{"op_types": ["Conv2d", "Linear"]}], example_input=loop.x[0])
    prepare_model(loop.model, plan)
    loop.run(0, 10)
    rows = loop.masks.by_target()["conv1.weight"].flatten(1).any(1)
    deployed = convert_model(loop.model.eval())
    layer: Any = deployed.get_submodule("conv1")
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight.flatten(1).any(1), rows) and not layer.bias[~rows].any()
    with torch.no_grad():
        assert torch.equal(deployed(loop.x[0]), loop.model(loop.x[0]))
        shown = nn.Sequential(deployed.get_submodule("conv1"))(loop.x[0])
    assert (shown.abs().sum((0, 2, 3)) > 0).tolist() == rows.tolist()
    assert type(restore_model(loop.model).get_submodule("conv1")) is nn.Conv2d


def test_eval_mode_sees_masks_that_change() -> None:
    loop = Loop({"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "schedule": "one_shot", "start": 5})
    prepare_model(loop.model, make_plan(loop.model, [{"op_types": ["Conv2d", "Linear"]}], example_input=loop.x[0]))
    loop.run(0, 4)
    loop.model.eval()
    with torch.no_grad():
        before = loop.model(loop.x[0])
        assert loop.masks.step(clock(5))
        after = loop.model(loop.x[0])
        assert not torch.equal(before, after) and torch.equal(after, convert_model(loop.model)(loop.x[0]))
        loop.model.get_parameter("conv1.weight").fill_(1.0)  # averaged weights, say
        loop.masks.apply()
        assert torch.equal(loop.model(loop.x[0]), convert_model(loop.model)(loop.x[0]))
        assert not loop.model.get_parameter("conv1.weight")[~loop.masks.by_target()["conv1.weight"]].any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_what_passes_is_masked_in_the_deployed_model_too(activation: type[nn.Module], tmp_path: Path) -> None:
    model = Calls(lambda m, x: m.fc2(m.act(m.fc(x))), fc=nn.Linear(3, 4), act=activation(), fc2=nn.Linear(4, 4))
    x = torch.randn(16, 3)
    align = {"module_name": "fc", "target_name": "weight", "dims": [0]}
    entries = [
        {"op_names": ["fc"], "sparse_ratio": 0.5},
        {"op_names": ["act"], "target_settings": {"_output_": {"align": align}}},
    ]
    plan = make_plan(model, [{"op_types": ["Linear", activation.__name__]}], example_input=x)
    masks = Masks(model, make_pruning(model, {"config_list": entries, "schedule": "one_shot"}, record(model, x)))
    masks.step(clock(0))
    prepare_model(model, plan)
    for _ in range(3):
        model.train()(x)
    with torch.no_grad():
        shown = model.eval()(x)
        deployed = convert_model(model)
        assert torch.equal(deployed(x), shown)
        probe = deployed.get_submodule("act")(torch.ones(2, 4))
        assert not probe[:, ~masks.passing()["act._output_"]].any() and probe.any()
        if activation is nn.ReLU:
            export_model(deployed, tmp_path / "model.pt2", example_input=x)
            assert torch.equal(load_deployed(tmp_path / "model.pt2")(x), shown)
        else:
            export_model(deployed, tmp_path / "model.onnx", example_input=x)
            (found,) = onnxruntime_session(tmp_path / "model.onnx").run(None, {"args_0": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), shown)
        with pytest.raises(ConfigError, match=r"act mask what passes them, which a .pt file cannot hold.* Write .pt2 or .onnx"):
            export_model(deployed, tmp_path / "model.pt", example_input=x)
        masks._passing["act._output_"].mask = torch.ones(4, dtype=torch.bool)
        assert torch.equal(deployed(x), shown), "the copy has a mask of its own"
    with pytest.raises(ConfigError, match=r"is prepared for quantization, too; call restore_model\(model\) before"):
        masks.remove()
    restore_model(model)
    masks.remove()
    assert type(model.get_submodule("act")) is activation


# -- a Trainer ----------------------------------------------------------------------------------------------------------


class Prunes(pl.Callback):
    """The least that a callback does with masks."""

    def __init__(self, pruning: Any) -> None:
        self.pruning, self.masks, self.pending = pruning, None, None

    masks: Masks | None
    pending: Any

    def clock(self, trainer: Trainer) -> Clock:
        return Clock(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            done=trainer.global_step,
            length=trainer.estimated_stepping_batches,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        graph = record(pl_module, torch.randn(2, 3, 8, 8))
        self.masks = Masks(pl_module, make_pruning(pl_module, self.pruning, graph))
        if self.pending is not None:
            self.masks.load_state_dict(self.pending)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        assert self.masks is not None
        self.masks.step(self.clock(trainer))

    def on_before_optimizer_step(self, *_: Any) -> None:
        assert self.masks is not None
        self.masks.after_backward()

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.masks is not None
        self.masks.apply()

    def on_validation_batch_start(self, *_: Any) -> None:
        if self.masks is not None:
            self.masks.apply()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.masks is None else self.masks.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pending = state_dict


PRUNING = {"config_list": [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "metric": "taylor"}], "updates": 3}


def fit(make: Callable[..., Trainer], folder: Path, ckpt: Path | None = None) -> tuple[Lit, Prunes, Any]:
    torch.manual_seed(0)
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module, prunes, quant = Lit(), Prunes(PRUNING), QuantFusionCallback([{"op_types": ["Conv2d", "Linear"]}], verbose=0)
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "accumulate_grad_batches": 2}
    trainer = make(max_epochs=3, callbacks=[prunes, quant, saves], **options)
    trainer.fit(module, loader(128), loader(16), ckpt_path=ckpt)
    return module, prunes, quant


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_prune_and_quantize_in_one_fit_and_resume(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    whole, prunes, quant = fit(quiet_trainer, tmp_path)
    assert prunes.masks is not None and prunes.masks.done == 3
    rows = prunes.masks.by_target()["conv1.weight"].flatten(1).any(1)
    assert int(rows.sum()) == 4 and "fc.weight" not in prunes.masks.by_target()
    layer: Any = quant.deployed_model.conv1
    assert torch.equal(layer.weight.flatten(1).any(1), rows)
    again, resumed, _ = fit(quiet_trainer, tmp_path / "again", tmp_path / "step=4.ckpt")
    assert resumed.masks is not None and resumed.pending["done"] == 1 and resumed.pending["statistics"]
    for (name, one), (_, other) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["conv1.weight"].flatten(1).any(1), rows) and set(saved) == set(Lit().state_dict())


def test_beside_model_pruning(quiet_trainer: Callable[..., Trainer]) -> None:
    """Of other layers it does no harm; of the same parameter it is refused by name."""
    for name, refused in (("fc", False), ("conv2", True)):
        module = Lit()
        other = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=[(module.get_submodule(name), "weight")])
        one_shot = {"config_list": PRUNING["config_list"][0] | {"metric": "l1"}, "schedule": "one_shot"}  # type: ignore[index]
        prunes = Prunes(one_shot)
        trainer = quiet_trainer(max_epochs=2, callbacks=[prunes, other], num_sanity_val_steps=0)
        if refused:
            with pytest.raises(ConfigError, match=r"conv2.weight: torch.nn.utils.prune \(ModelPruning\) has taken the"):
                trainer.fit(module, loader(32), loader(16))
        else:
            trainer.fit(module, loader(32), loader(16))
            assert prunes.masks is not None and prunes.masks.sparsity()["conv2.weight"] == 0.5
            assert float((module.fc.weight == 0).float().mean()) >= 0.5  # type: ignore[union-attr]


def test_averaged_weights_are_masked_when_they_are_validated(quiet_trainer: Callable[..., Trainer]) -> None:
    seen: list[Tensor] = []

    class Watched(Lit):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            seen.append(self.get_parameter("conv1.weight").detach().flatten(1).any(1))
            super().validation_step(batch, batch_idx)

    module, prunes = Watched(), Prunes(PRUNING)
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    trainer = quiet_trainer(max_epochs=3, callbacks=[prunes, average], num_sanity_val_steps=0)
    trainer.fit(module, loader(128), loader(16))
    assert prunes.masks is not None
    assert torch.equal(seen[-1], prunes.masks.by_target()["conv1.weight"].flatten(1).any(1)) and int(seen[-1].sum()) == 4


# -- masks that have to wait, in a fit ----------------------------------------------------------------------------------

TAYLOR: dict[str, Any] = {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "metric": "taylor"}], "updates": 2}


def masked_by(make: Callable[..., Trainer], model: Lit, pruning: Any, epochs: int) -> tuple[Any, list[str]]:
    """The callback after a fit, and what it warned of."""
    callback = QuantFusionCallback(pruning=pruning, source="last", verbose=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(max_epochs=epochs, callbacks=[callback], num_sanity_val_steps=0).fit(model, loader(64), loader(16))
    return callback, [str(one.message) for one in seen if "QuantFusionCallback: " in str(one.message)]


class PastTheTrainer(Lit):
    """Steps with its own optimizer, of which no callback hears."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return loss


@pytest.mark.parametrize("at_the_end", [False, True])
def test_gradients_that_never_come_are_said_once(at_the_end: bool, quiet_trainer: Callable[..., Trainer]) -> None:
    pruning = {**TAYLOR, "schedule": "one_shot"} if at_the_end else TAYLOR
    callback, said = masked_by(quiet_trainer, PastTheTrainer(), pruning, 1 if at_the_end else 3)
    assert callback.sparsity() == 0 and len(said) == 1
    assert "masks are due, and wait for gradients of conv1.weight, conv2.weight, which never came. In manual opt" in said[0]
    assert ("the fit ended after 0 of 1 updates of its masks; masks are due" in said[0]) == at_the_end
    assert "with self.optimizers(), not with use_pl_optimizer=False; leave out layers that training does not use" in said[0]


def test_a_frozen_layer_keeps_no_other_from_its_masks(quiet_trainer: Callable[..., Trainer]) -> None:
    model = Lit()
    model.get_submodule("conv2").requires_grad_(False)
    callback, said = masked_by(quiet_trainer, model, TAYLOR, 2)
    assert callback.masks.sparsity()["conv1.weight"] == 0.5 and callback.deployed_model.conv1.weight.shape == (4, 3, 3, 3)
    assert callback.deployed_model.conv2.weight.shape == (8, 4, 3, 3)
    (told,) = said
    assert "conv2.weight got no mask: scored by gradients, and frozen at every update. Let it train before the last" in told
    assert "frozen, and scored by gradients: conv2.weight" in str(callback.pruning_plan)


def test_where_all_have_masks_nothing_is_said(quiet_trainer: Callable[..., Trainer]) -> None:
    callback, said = masked_by(quiet_trainer, Lit(), TAYLOR, 2)
    assert callback.masks.sparsity()["conv1.weight"] == 0.5 and said == []
