# SPDX-License-Identifier: Apache-2.0
"""Owns what the schedule's phases do to a model: late starts, weights before activations, layer by layer, and what is logged."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_recorded
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.monitor import Meters, clipped_summary, drift, ranges_of
from lightning_quant.prepare import (
    apply_phase,
    load_quantizer_state,
    prepared_groups,
    quantizer_state,
    quantizers_of,
    rounds_all,
)
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.schedule import Phase

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
WEIGHTS = Phase(quantize_activations=False)


def by_hand(weight: Tensor) -> Tensor:
    """int8, symmetric, a scale for each output channel: w on its grid, by numpy."""
    w = weight.detach().numpy()
    scale = np.abs(w).max(axis=tuple(range(1, w.ndim)), keepdims=True) / np.float32(127)
    return torch.from_numpy(np.clip(np.rint(w / scale), -127, 127) * scale)


def on_grid(x: Tensor, low: float, high: float) -> Tensor:
    """uint8, affine, one scale, by numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / np.float64(scale)), 0, 255)
    q = np.clip(np.rint(x.detach().numpy() / scale) + zero, 0, 255)
    return torch.from_numpy(((q - zero) * scale).astype(np.float32))


def prepared(net: nn.Module, config: Any = FUSED, x: Any = X) -> nn.Module:
    return prepare_model(net, make_plan(net, config, example_input=x))


def net_by_hand(net: nn.Module, x: Tensor, ranges: dict[str, tuple[float, float]] | None = None, layers: int = 3) -> Tensor:
    """`Net` with the weights of its first `layers` layers on their grids; activations too where there are ranges."""
    twin = copy.deepcopy(net)
    for place in (1, 2):
        conv, bn = getattr(twin, f"conv{place}"), getattr(twin, f"bn{place}")
        on = place <= layers
        if place == 1 and on and ranges is not None:
            x = on_grid(x, *ranges["conv1._input_"])
        x = F.conv2d(x, by_hand(conv.weight) if on else conv.weight, padding=1)
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, net.training, 0.1, bn.eps).relu()
        if on and ranges is not None:
            x = on_grid(x, *ranges[f"conv{place}._output_"])
    fc: Any = twin.fc
    return F.linear(F.max_pool2d(x, 2).flatten(1), by_hand(fc.weight) if layers == 3 else fc.weight, fc.bias)


# -- late start ---------------------------------------------------------------------------------------------------------------


class Weights(Callback):
    """Records all parameters and buffers, and the ranges, after every training batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.ranges: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append({key: value.clone() for key, value in pl_module.state_dict().items()})
        self.ranges.append(quantizer_state(pl_module))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_late_start_is_float_training_bit_for_bit_until_its_moment(quiet_trainer: TrainerMaker) -> None:
    runs = []
    for ours in ([], [QuantFusionCallback(FUSED, schedule={"quantize_start": 5, "observe_start": 2}, verbose=0)]):
        torch.manual_seed(0)
        weights = Weights()
        quiet_trainer(max_epochs=2, callbacks=[*ours, weights]).fit(Lit(), loader(), loader(seed=1))
        runs.append(weights)
    float_run, late = runs
    assert [same(a, b) for a, b in zip(float_run.seen, late.seen, strict=True)] == [True] * 5 + [False] * 3
    known = [all(value["low"] is not None for value in ranges.values()) for ranges in late.ranges]
    assert known == [False] * 2 + [True] * 6, "observers run on the float model before"


# -- weights first ------------------------------------------------------------------------------------------------------------


def test_weights_first_in_training_is_the_float_net_on_rounded_weights() -> None:
    torch.manual_seed(3)
    twin = Net()
    net = prepared(copy.deepcopy(twin)).train()
    apply_phase(net, WEIGHTS)
    twin.train()
    out = net(X)
    assert torch.equal(out, net_by_hand(twin, X))
    assert not torch.equal(out, twin(X))
    ranges = quantizer_state(net)
    assert ranges["conv1._input_"] == {"low": float(X.min()), "high": float(X.max())}, "observed, though not rounded"
    block = F.batch_norm(F.conv2d(X, by_hand(twin.conv1.weight), padding=1), None, None, training=True).relu()
    assert ranges["conv1._output_"]["high"] == pytest.approx(float(block.max()), rel=1e-6)


def test_weights_first_passes_gradients_straight_through() -> None:
    torch.manual_seed(3)
    twin = Net().train()
    net = prepared(copy.deepcopy(twin)).train()
    apply_phase(net, WEIGHTS)
    net(X).square().sum().backward()
    with torch.no_grad():
        for module in (twin.conv1, twin.conv2, twin.fc):
            module.weight.copy_(by_hand(module.weight))
    twin(X).square().sum().backward()
    for (name, own), wanted in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        assert wanted.grad is not None
        assert wanted.grad.abs().max() > 0, name
        assert torch.equal(own.grad, wanted.grad), name


def test_weights_first_in_eval_is_what_training_computes_on_running_statistics() -> None:
    torch.manual_seed(3)
    net = prepared(Net()).train()
    apply_phase(net, WEIGHTS)
    for _ in range(3):
        net(X)
    out, integers = run_recorded(net.eval(), X)
    assert torch.equal(out, net_by_hand(_float_twin(net), X))
    assert not integers
    assert not rounds_all(net)
    apply_phase(net, Phase())
    full, integers = run_recorded(net, X)
    assert rounds_all(net)
    assert len(integers) > 2, "integer layers run as soon as everything is rounded, without a call of eval()"
    assert not torch.equal(full, out)
    assert torch.equal(full, convert_model(net)(X))
    apply_phase(net, WEIGHTS)
    assert torch.equal(run_recorded(net, X)[0], out), "and not a moment longer"


def _float_twin(net: nn.Module) -> Net:
    twin = Net()
    twin.load_state_dict(net.state_dict())
    return twin.train(net.training)


@pytest.mark.parametrize("training", [True, False])
def test_weights_alone_wait_for_no_range(training: bool) -> None:
    """Observers that start later do not hold weights up, in eval mode neither."""
    twin = Net().train(training)
    net = prepared(copy.deepcopy(twin)).train(training)
    apply_phase(net, Phase(observe=False, quantize_activations=False))
    with torch.no_grad():
        assert torch.equal(net(X), net_by_hand(twin, X))
    assert all(value["low"] is None for value in quantizer_state(net).values())


class Mixed(nn.Module):
    """A module that is quantized around its forward, an operator, and a curve behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.fc, self.silu = nn.Bilinear(6, 6, 5, bias=False), nn.Linear(5, 5, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x, x)
        out: Tensor = self.silu(self.fc(y)) + y
        return out


@pytest.mark.parametrize("training", [True, False])
def test_weights_first_in_other_kinds_of_layers(training: bool) -> None:
    x = torch.randn(9, 6)
    twin = Mixed()
    net = prepared(copy.deepcopy(twin), [{"op_types": ["Bilinear", "Linear", "add"], "high_precision_output": False}], x)
    groups = prepared_groups(net)
    assert list(groups) == ["add", "both", "fc"]
    assert [name for name, _ in sorted(groups.items(), key=lambda item: item[1][1].place)] == ["both", "fc", "add"]
    net.train()
    net(x)
    net.train(training)
    apply_phase(net, Phase(observe=False, quantize_activations=False))
    y = F.bilinear(x, x, by_hand(twin.both.weight))
    wanted = F.silu(F.linear(y, by_hand(twin.fc.weight))) + y
    with torch.no_grad():
        out, integers = run_recorded(net, x)
    assert torch.equal(out, wanted)
    assert not integers


def test_weights_first_where_weights_are_all_there_is() -> None:
    net = prepared(Net(), [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "fuse_names": FUSED[0]["fuse_names"]}])
    apply_phase(net.train(), WEIGHTS)
    net(X)
    assert rounds_all(net)
    with torch.no_grad():
        assert torch.equal(net.eval()(X), convert_model(net)(X))
    with torch.no_grad():
        torch.testing.assert_close(net(X), net_by_hand(_float_twin(net), X))


# -- layer by layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_the_first_layers_are_rounded_and_no_others(layers: int, training: bool) -> None:
    torch.manual_seed(3)
    net = prepared(Net()).train()
    net(X)
    ranges = {name: (value["low"], value["high"]) for name, value in quantizer_state(net).items()}
    net.train(training)
    apply_phase(net, Phase(observe=False), layers)
    with torch.no_grad():
        out, integers = run_recorded(net, X)
    wanted = net_by_hand(_float_twin(net), X, ranges, layers)
    assert rounds_all(net) is (layers == 3)
    assert bool(integers) is (layers == 3 and not training)
    if integers:  # folded: what lies between two levels may go either way
        torch.testing.assert_close(out, wanted.detach(), rtol=0, atol=2e-3)
        assert float(wanted.abs().amax().detach()) > 0.1
        assert torch.equal(out, convert_model(net)(X))
    else:
        assert torch.equal(out, wanted)


class Backwards(nn.Module):
    """Defined in another order than it is called; a branch, a pool, two readers of one tensor, an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.right, self.left, self.stem = nn.Linear(8, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 3)
        self.pool, self.mean = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x) + self.right(x))
        out: Tensor = self.fc(self.mean(self.pool(x)).flatten(1))
        return out


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of quantizers, each time one rounds."""
    names: list[str] = []
    own = ActivationQuantizer.__call__

    def call(self: ActivationQuantizer, x: Tensor) -> Tensor:
        names.append(self.name)
        return own(self, x)

    monkeypatch.setattr(ActivationQuantizer, "__call__", call)
    return names


def test_layers_begin_in_the_order_of_the_data_and_each_tensor_is_rounded_once(rounded: list[str]) -> None:
    net = prepared(Backwards(), "int8").train()
    order = [name for name, _ in sorted(prepared_groups(net).items(), key=lambda item: item[1][1].place)]
    assert order == ["stem", "left", "right", "add", "pool", "mean", "fc"]
    rows = []
    for layers in range(len(order) + 1):
        apply_phase(net, Phase(), layers)
        rounded.clear()
        net(X)
        rows.append(sorted(rounded))
        assert len(rows[-1]) == len(set(rows[-1])), "nothing is rounded twice"
    assert rows[0] == []
    assert rows[1] == ["stem._input_", "stem._output_"], "the maker's phase decides, whoever reads"
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(rows))
    assert rows[-1] == sorted(quantizers_of(net)), "in the end nothing is left out"


class Begun(Callback):
    """Records which layers are quantized in every training batch, and whether eval runs integers."""

    def __init__(self) -> None:
        self.layers: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        groups = prepared_groups(pl_module)
        self.layers.append(" ".join(name for name, (_, group) in groups.items() if group.phase.quantize))


def test_progressive_in_a_fit(quiet_trainer: TrainerMaker) -> None:
    begun = Begun()
    callback = QuantFusionCallback(FUSED, schedule={"quantize_start": 2, "progressive": 8}, verbose=0)
    quiet_trainer(max_epochs=3, callbacks=[callback, begun]).fit(Lit(), loader(), loader(seed=1))
    assert begun.layers == ["", "", "conv1", "conv1", "conv1 conv2", "conv1 conv2", *["conv1 conv2 fc"] * 6]
    assert callback.deployed_model is not None


@pytest.mark.parametrize(
    "schedule",
    [
        {"quantize_start": 2, "progressive": 11},
        {"activations_start": 9},
        {"quantize_start": "25%", "activations_start": "75%", "progressive": "80%", "freeze_batch_norm": "epoch 2"},
    ],
    ids=["progressive", "weights first", "both"],
)
def test_a_resume_in_mid_epoch_is_bitwise(schedule: dict[str, Any], quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    batch = next(iter(loader()))  # Lightning begins an epoch's data anew: all its batches are alike here
    data = DataLoader(TensorDataset(*(torch.cat([side] * 4) for side in batch)), batch_size=16)

    rows: list[Rows] = []

    def run(stop: int, ckpt_path: Path | None = None) -> tuple[Lit, QuantFusionCallback, Begun]:
        torch.manual_seed(0)
        rows.append(Rows(4))
        begun, saver = Begun(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        model, callback = Lit(), QuantFusionCallback(FUSED, schedule=schedule, log_every_n_steps=4, source="last", verbose=0)
        callbacks = [callback, begun, saver, Stop(stop)]
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True, logger=rows[-1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(nothing was converted|exists and is not empty|mid-epoch|epoch end).*")
            trainer.fit(model, data, loader(seed=1), ckpt_path=ckpt_path)
        return model, callback, begun

    straight, reference, begun = run(12)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    run(6)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=6.ckpt"]
    resumed, callback, again = run(12, tmp_path / "step=6.ckpt")
    assert len(set(begun.layers)) > 1 or "activations_start" in schedule
    assert again.layers == begun.layers[6:]
    assert same(straight.state_dict(), resumed.state_dict())
    assert quantizer_state(straight) == quantizer_state(resumed)
    one, two = reference.state_dict(), callback.state_dict()
    assert {key: one[key] for key in ("phase", "layers", "rounds_all")} == {
        key: two[key] for key in ("phase", "layers", "rounds_all")
    }
    assert [list(run.measured) for run in rows] == [[3, 7, 11], [3], [7, 11]]
    assert {**rows[1].rows, **rows[2].rows} == rows[0].rows, "drift is since what the first half has logged"
    assert all("quant/range_drift" in row for row in rows[2].measured.values())
    assert reference.deployed_model is not None
    assert callback.deployed_model is not None
    assert torch.equal(reference.deployed_model(X), callback.deployed_model(X))


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step < 12
        if trainer.should_stop:
            trainer.limit_val_batches = 0


# -- what is not finished is not converted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"quantize_start": None}, "no quantized training step was run"),
        ({"activations_start": None}, r"only weights were quantized by the end \(activations_start=None; let activations start"),
        ({"activations_start": "epoch 9"}, r"only weights were quantized by the end \(activations_start='epoch 9'; let activ"),
        ({"progressive": 5}, r"only 2 of 3 layers were quantized by the end \(progressive=5; let it come earlier\)"),
    ],
    ids=str,
)
def test_a_half_quantized_model_is_not_converted(schedule: dict[str, Any], said: str, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, schedule=schedule, verbose=0)
    with pytest.warns(UserWarning, match=f"{said}.*so nothing was converted; `deployed_model` is None"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is None
    assert callback.state_dict()["rounds_all"] is False


def test_a_run_of_weights_alone_is_converted_whatever_activations_do(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback("int8-weight-only", schedule={"activations_start": None}, verbose=0)
    model = Lit()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is not None
    with torch.no_grad():
        assert torch.equal(callback.deployed_model(X), model.eval()(X))


class Scripted(Lit):
    """Every epoch is worse than the one before."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(self.current_epoch))


@pytest.mark.parametrize("schedule", [{"activations_start": "epoch 2"}, {"quantize_start": "epoch 0", "progressive": "epoch 2"}])
def test_best_skips_checkpoints_of_half_quantized_models(
    schedule: dict[str, Any], quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", save_top_k=-1)
    model, callback = Scripted(), QuantFusionCallback(FUSED, schedule=schedule, verbose=0)
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback, saver], enable_checkpointing=True, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"the best, of epoch 0, was saved before .* so that of epoch 2 is converted"):
        trainer.fit(model, loader(), loader(seed=1))
    third = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    net = prepared(Lit())
    net.load_state_dict(third["state_dict"])
    load_quantizer_state(net, third["callbacks"]["QuantFusionCallback"]["quantizers"])
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), convert_model(net)(X))


# -- state --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [True, False])
def test_states_from_before_there_were_such_phases_load(quantize: bool, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    state = callback.state_dict()
    for key in ("layers", "rounds_all", "logged"):
        del state[key]
    state["phase"] = {"observe": True, "quantize": quantize, "freeze_batch_norm": False}
    callback.load_state_dict(state)
    assert {group.phase for _, group in prepared_groups(model).values()} == {Phase(quantize=quantize)}
    assert rounds_all(model) is quantize
    with pytest.raises(ConfigError, match="the checkpoint's state is of version 2; this release reads version 1"):
        callback.load_state_dict({**state, "version": 2})


def test_the_state_knows_which_layers_had_begun(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, schedule={"progressive": 6}, verbose=0)
    with pytest.warns(UserWarning, match="only 2 of 3 layers"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    state = copy.deepcopy(callback.state_dict())
    apply_phase(model, Phase())
    callback.load_state_dict(state)
    assert [group.phase.quantize for _, group in prepared_groups(model).values()] == [True, True, False]
    assert not rounds_all(model)


# -- what is measured ---------------------------------------------------------------------------------------------------------


def test_clipped_values_are_those_beyond_the_grid() -> None:
    net = prepared(Net(), [{**FUSED[0], "op_types": ["Conv2d"]}]).train()
    net(X)
    state = quantizer_state(net)
    state["conv1._input_"] = {"low": -1.0, "high": 1.5}
    state["conv1._output_"] = {"low": 0.0, "high": 1.25}
    load_quantizer_state(net, state)
    apply_phase(net, Phase(observe=False))
    seen: dict[str, Tensor] = {}
    net.get_submodule("bn1").register_forward_hook(lambda m, args, out: seen.update(bn1=out.detach()))
    net.get_submodule("bn2").register_forward_hook(lambda m, args, out: seen.update(bn2=out.detach()))
    quantizers = quantizers_of(net)
    meters = Meters(quantizers)
    net(X)
    got = clipped_summary(meters.stop())
    step, zero = np.float32(2.5 / 255), 102
    q = np.rint(X.numpy() / step) + zero
    high = state["conv2._output_"]["high"]
    shares = [
        ((q < 0) | (q > 255)).mean(),
        (np.rint(seen["bn1"].numpy() / np.float32(1.25 / 255)) > 255).mean(),  # below 0 it is the ReLU that cuts
        (np.rint(seen["bn2"].numpy() / np.float32(high / 255)) > 255).mean(),
    ]
    assert shares[0] > 0.1
    assert shares[1] > 0.02
    assert got == {"clipped_mean": pytest.approx(np.mean(shares), rel=1e-5), "clipped_max": pytest.approx(max(shares), rel=1e-5)}
    assert all(quantizer.meter is None for quantizer in quantizers.values()), "counting has ended"


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("activation", [None, nn.ReLU, nn.ReLU6, nn.Hardtanh])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_clipped_share_by_hand(granularity: str, activation: type[nn.Module] | None, scheme: str) -> None:
    names = [["fc", "act"]] if activation is not None else []
    net = nn.Sequential()
    net.fc = nn.Linear(6, 4)
    if activation is not None:
        net.act = activation()
    entry = {
        "op_types": ["Linear"],
        "target_names": ["_output_"],
        "quant_dtype": "int8" if scheme == "symmetric" else "uint8",
        "target_settings": {"_output_": {"granularity": granularity, "quant_scheme": scheme}},
        "fuse_names": names,
    }
    prepared(net, [entry], torch.randn(5, 6)).train()
    net(torch.randn(50, 6))
    (quantizer,) = quantizers_of(net).values()
    x = 12 * torch.randn(200, 4)
    ends: dict[Any, tuple[float, float]] = {None: (-np.inf, np.inf), nn.ReLU: (0, np.inf), nn.ReLU6: (0, 6), nn.Hardtanh: (-1, 1)}
    inside = np.clip(x.numpy(), *ends[activation])
    low, high = (np.asarray(side, dtype=np.float64).reshape(1, -1) for side in (quantizer.low, quantizer.high))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if scheme == "symmetric":
        q = np.rint(inside / (np.maximum(-low, high) / 127))
        share = ((q < -127) | (q > 127)).mean()
        assert quantizer.spec.qmin == -127
    else:
        step = np.float32((high - low) / 255)
        q = np.rint(inside / step) + np.clip(np.rint(-low / step.astype(np.float64)), 0, 255)
        share = ((q < 0) | (q > 255)).mean()
    assert quantizer.clipped_share(x) == pytest.approx(share, abs=1e-6)
    assert 0 < share < 1 or activation in (nn.ReLU6, nn.Hardtanh)


def test_only_what_is_rounded_in_training_is_counted() -> None:
    net = prepared(Net()).train()
    net(X)
    quantizers = quantizers_of(net)

    def counted(phase: Phase, training: bool) -> int:
        apply_phase(net.train(training), phase)
        meters = Meters(quantizers)
        net(X)
        return len(meters.stop())

    assert counted(Phase(), training=True) == 3
    assert counted(WEIGHTS, training=True) == 0
    assert counted(Phase(quantize=False), training=True) == 0
    assert counted(Phase(), training=False) == 0


def test_drift_by_hand() -> None:
    before = {
        "a": torch.tensor([0.0, 2.0]),
        "b": torch.tensor([[-1.0, 0.0], [1.0, 4.0]]),
        "flat": torch.zeros(2),
        "gone": torch.ones(2),
    }
    now = {
        "a": torch.tensor([0.0, 3.0]),
        "b": torch.tensor([[-2.0, 0.0], [2.0, 4.0]]),
        "flat": torch.ones(2),
        "new": torch.ones(2),
    }
    assert drift(before, now) == pytest.approx((0.5 + (1.0 + 0.0) / 2) / 2)
    assert drift(before, before) == 0
    assert drift({}, now) is None
    assert drift({"flat": torch.zeros(2)}, now) is None


class Rows(Logger):
    """Keeps what it is given, by step."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.rows: dict[int, dict[str, float]] = {}
        self.hparams: list[dict[str, Any]] = []

    name = "rows"
    version = 0

    @property
    def measured(self) -> dict[int, dict[str, float]]:
        """The steps that are measured: the others only say that a phase begins, by three numbers."""
        return {step: row for step, row in self.rows.items() if (step + 1) % self.every == 0 or len(row) > 3}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams.append(dict(params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {key: value for key, value in metrics.items() if key.startswith("quant/")}
        if ours:
            assert step is not None
            assert step not in self.rows, "one row a step"
            self.rows[step] = ours


def logged(make: TrainerMaker, schedule: dict[str, Any], **options: Any) -> tuple[dict[int, dict[str, float]], Trainer, Weights]:
    every = options.pop("every", 2)
    rows, weights = Rows(every or 1), Weights()
    callback = QuantFusionCallback(FUSED, schedule=schedule, log_every_n_steps=every, verbose=0)
    trainer = make(max_epochs=3, callbacks=[callback, weights], logger=rows, **options)
    trainer.fit(Lit(), loader(), loader(seed=1))
    return rows.measured, trainer, weights


def test_what_is_logged_when(quiet_trainer: TrainerMaker) -> None:
    schedule = {"quantize_start": 2, "activations_start": 6, "observe_stop": 8, "freeze_batch_norm": 10}
    rows, trainer, weights = logged(quiet_trainer, schedule)
    assert list(rows) == [1, 3, 5, 7, 9, 11], "the steps that Lightning's own every-2 would take"
    assert [row["quant/phase"] for row in rows.values()] == [0, 1, 1, 2, 2, 2]
    assert [row["quant/observe"] for row in rows.values()] == [1, 1, 1, 1, 0, 0]
    assert [row["quant/freeze_batch_norm"] for row in rows.values()] == [0, 0, 0, 0, 0, 1]
    assert ["quant/clipped_mean" in row for row in rows.values()] == [False] * 3 + [True] * 3
    assert all(0 <= row["quant/clipped_mean"] <= row["quant/clipped_max"] <= 1 for row in list(rows.values())[3:])
    assert any(row["quant/clipped_max"] > row["quant/clipped_mean"] > 0 for row in list(rows.values())[3:])
    for before, step in itertools.pairwise(rows):
        changes = []
        for name, old in weights.ranges[before].items():
            new = weights.ranges[step][name]
            changes.append((abs(new["low"] - old["low"]) + abs(new["high"] - old["high"])) / (old["high"] - old["low"]))
        assert rows[step]["quant/range_drift"] == pytest.approx(np.mean(changes), rel=1e-5, abs=1e-9)
    assert "quant/range_drift" not in rows[1]
    assert rows[5]["quant/range_drift"] > 0
    assert rows[11]["quant/range_drift"] == 0
    assert trainer.callback_metrics["quant/phase"] == 2


def test_a_progressive_run_is_in_phase_1_until_all_layers_have_begun(quiet_trainer: TrainerMaker) -> None:
    rows, *_ = logged(quiet_trainer, {"quantize_start": 2, "progressive": 8}, every=1)
    assert [row["quant/phase"] for row in rows.values()] == [0] * 2 + [1] * 4 + [2] * 6


def test_accumulated_batches_are_one_step(quiet_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    own = ActivationQuantizer.clipped_share

    def share(self: ActivationQuantizer, x: Tensor) -> float:
        shares.append(own(self, x))
        return shares[-1]

    monkeypatch.setattr(ActivationQuantizer, "clipped_share", share)
    rows, *_ = logged(quiet_trainer, {}, every=3, accumulate_grad_batches=2, num_sanity_val_steps=0)
    assert list(rows) == [2, 5], "of 6 optimizer steps"
    assert len(shares) == 2 * 2 * 3, "two batches of three quantizers, in each of two steps"
    for row, part in zip(rows.values(), (shares[:6], shares[6:]), strict=True):
        means = [(a + b) / 2 for a, b in zip(part[:3], part[3:], strict=True)]
        assert row["quant/clipped_mean"] == pytest.approx(np.mean(means), rel=1e-5)
        assert row["quant/clipped_max"] == pytest.approx(max(means), rel=1e-5)


@pytest.fixture
def no_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ActivationQuantizer, x: Tensor) -> float:
        raise AssertionError("counted")

    monkeypatch.setattr(ActivationQuantizer, "clipped_share", refuse)


@pytest.mark.parametrize("every", [None, 0])
@pytest.mark.usefixtures("no_counting")
def test_by_default_nothing_is_logged_or_counted(every: int | None, quiet_trainer: TrainerMaker) -> None:
    rows, trainer, _ = logged(quiet_trainer, {}, every=every)
    assert rows == {}
    assert not [name for name in trainer.callback_metrics if name.startswith("quant/")]


@pytest.mark.usefixtures("no_counting")
def test_other_steps_count_nothing(quiet_trainer: TrainerMaker) -> None:
    assert logged(quiet_trainer, {}, every=13)[0] == {}


def test_logging_changes_no_training_and_needs_no_logger(quiet_trainer: TrainerMaker) -> None:
    finals = []
    for every in (None, 1):
        torch.manual_seed(0)
        model, callback = Lit(), QuantFusionCallback(FUSED, log_every_n_steps=every, verbose=0)
        trainer = quiet_trainer(max_epochs=2, callbacks=[callback], logger=False)
        trainer.fit(model, loader(), loader(seed=1))
        finals.append(model.state_dict())
    assert same(*finals)
    names = {name for name in trainer.callback_metrics if name.startswith("quant/")}
    ours = ("phase", "observe", "freeze_batch_norm", "clipped_mean", "clipped_max", "range_drift")
    assert names == {f"quant/{name}" for name in ours}


def test_ranges_of_a_model_that_saw_nothing() -> None:
    assert ranges_of(quantizers_of(prepared(Net()))) == {}


@pytest.mark.parametrize("given", [-1, True, 2.5, "10"], ids=repr)
def test_what_is_no_number_of_steps_is_refused(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"log_every_n_steps: expected a number of steps, or None or 0 for never, got {given!r}"
    ):
        QuantFusionCallback(FUSED, log_every_n_steps=given)
