# SPDX-License-Identifier: Apache-2.0
"""Owns what a fit tells its loggers: signal-to-noise ratios and effective bits of each layer, phases, settings."""

from __future__ import annotations

import copy
import csv
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_phases import Rows
from torch import Tensor, nn
from torchmetrics.functional.audio import signal_noise_ratio
from toys import FUSED, Lit, Net, loader

from lightning_quant import QuantFusionCallback, make_plan, prepare_model
from lightning_quant.monitor import Meters, RoundingLoss, effective_bits, stored_parameters
from lightning_quant.prepare import apply_phase, quantizer_state, quantizers_of
from lightning_quant.schedule import Phase

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def decibels(x: Any, rounded: Any) -> float:
    """By numpy, in double precision."""
    x, rounded = (np.asarray(side, dtype=np.float64).ravel() for side in (x, rounded))
    return float(10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum()))


def by_range(x: Tensor, low: float, high: float) -> Any:
    """uint8, affine, by numpy."""
    scale = np.float32((high - min(low, 0.0)) / 255)
    zero = np.rint(-min(low, 0.0) / np.float64(scale))
    return (np.clip(np.rint(x.numpy() / scale) + zero, 0, 255) - zero) * scale


def by_maximum(weight: Tensor, levels: int = 127) -> Any:
    """Symmetric, a scale for each output channel, by numpy."""
    w = weight.detach().numpy()
    scale = np.abs(w).max(axis=tuple(range(1, w.ndim)), keepdims=True) / np.float32(levels)
    return np.rint(w / scale) * scale


# -- the metric -----------------------------------------------------------------------------------------------------------


def test_the_ratio_is_that_of_all_batches_together() -> None:
    metric = RoundingLoss(2)
    batches = [scale * torch.randn(2, 3, n) for scale, n in ((0.1, 5), (10.0, 7), (1.0, 4))]
    noisy = [x + 0.1 * torch.randn_like(x) for x in batches]
    for x, y in zip(batches, noisy, strict=True):
        metric.update(1, x, y, 0.5)
    found = metric.compute()
    whole, rounded = (torch.cat([x.flatten() for x in side]) for side in (batches, noisy))
    assert float(found["signal_to_noise"][1]) == pytest.approx(decibels(whole, rounded), abs=1e-5)
    assert float(found["signal_to_noise"][1]) == pytest.approx(float(signal_noise_ratio(rounded, whole)), abs=1e-3)
    assert float(found["clipped"][1]) == 0.5
    assert math.isnan(found["signal_to_noise"][0]) and math.isnan(found["clipped"][0])
    separately = np.mean([decibels(x, y) for x, y in zip(batches, noisy, strict=True)])
    assert abs(separately - decibels(whole, rounded)) > 3, "not the mean of the batches' decibels"


def test_processes_are_one() -> None:
    """What torchmetrics gathers from all processes is added up: the ratio is that of the union of their data."""
    here, there = torch.randn(40), 5 * torch.randn(30)
    noisy = [x + 0.1 * torch.randn_like(x) for x in (here, there)]
    other = RoundingLoss(2)
    other.update(1, there, noisy[1], 0.5)
    gathered: list[int] = []

    def gather(own: Tensor, group: Any = None) -> list[Tensor]:
        gathered.append(own.numel())
        return [own, other.sums]

    metric = RoundingLoss(2, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(1, here, noisy[0], 0.1)
    found = metric.compute()
    assert float(found["signal_to_noise"][1]) == pytest.approx(decibels(torch.cat([here, there]), torch.cat(noisy)), abs=1e-5)
    assert float(found["clipped"][1]) == pytest.approx((0.1 * 40 + 0.5 * 30) / 70)
    assert gathered == [8], "one small tensor, however many layers there are"


def test_shares_count_by_values() -> None:
    metric = RoundingLoss(1)
    metric.update(0, torch.ones(30), torch.ones(30), 0.1)
    metric.update(0, torch.ones(10), torch.ones(10), 0.5)
    assert float(metric.compute()["clipped"]) == pytest.approx(8 / 40)
    assert math.isinf(metric.compute()["signal_to_noise"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_type_is_measured(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype)
    metric = RoundingLoss(1)
    metric.update(0, x, x + torch.tensor(0.25, dtype=dtype))
    expected = decibels(x.double(), (x + torch.tensor(0.25, dtype=dtype)).double())
    assert float(metric.compute()["signal_to_noise"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", [6, 8, 12])
def test_an_ideal_converter_has_the_bits_that_it_has(bits: int) -> None:
    """IEEE Std 1241's effective number of bits, of what it is defined by: a full-scale sine."""
    sine = np.sin(2 * np.pi * np.arange(100_000) * np.sqrt(2) / 17)
    step = 2 / 2**bits
    rounded = (np.floor(sine / step) + 0.5) * step
    metric = RoundingLoss(1)
    metric.update(0, torch.from_numpy(sine), torch.from_numpy(rounded))
    assert effective_bits(float(metric.compute()["signal_to_noise"])) == pytest.approx(bits, abs=0.05)


# -- activations and parameters -------------------------------------------------------------------------------------------


def test_what_each_activation_loses_by_hand() -> None:
    net = prepare_model(Net(), make_plan(Net(), FUSED, example_input=X)).train()
    net(X)
    apply_phase(net, Phase(observe=False))
    seen: dict[str, Tensor] = {}
    for name in ("bn1", "bn2"):
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.detach()}))
    meters = Meters(quantizers_of(net))
    net(X)
    state, found = quantizer_state(net), meters.stop()
    assert set(found) == {"conv1._input_", "conv1._output_", "conv2._output_"}
    for name, x in (
        ("conv1._input_", X),
        ("conv1._output_", seen["bn1"].clamp(min=0)),
        ("conv2._output_", seen["bn2"].clamp(min=0)),
    ):
        expected = decibels(x, by_range(x, state[name]["low"], state[name]["high"]))
        assert found[name].signal_to_noise == pytest.approx(expected, abs=1e-3), name
        assert 30 < expected < 60
        assert found[name].effective_bits == pytest.approx((expected - 1.76) / 6.02, abs=1e-3)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("int4", 7)])
def test_what_each_weight_loses_by_hand(dtype: str, levels: int) -> None:
    net = Net()
    with torch.no_grad():
        net.bn1.weight.copy_(torch.linspace(-2, 3, 8))
        net.bn1.running_var.copy_(torch.linspace(0.5, 2, 8))  # type: ignore[union-attr]
    entry = {**FUSED[0], "target_settings": {"weight": {"quant_dtype": dtype}}}
    prepare_model(net, make_plan(net, [entry], example_input=X))
    found = {one.quantizer.name: one.loss for one in stored_parameters(net)}
    assert set(found) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert found["fc.weight"].signal_to_noise == pytest.approx(
        decibels(net.fc.weight.detach(), by_maximum(net.fc.weight, levels)), abs=1e-4
    )
    assert net.bn1.running_var is not None
    k = (net.bn1.weight / (net.bn1.running_var + net.bn1.eps).sqrt()).detach().view(-1, 1, 1, 1).double().numpy()
    w = net.conv1.weight.detach().double().numpy()
    folded = decibels(w * k, by_maximum(net.conv1.weight, levels) * k)
    assert found["conv1.weight"].signal_to_noise == pytest.approx(folded, abs=1e-4), "what is deployed: norms are folded in"
    assert all(loss.clipped == 0 for loss in found.values())


def test_clipped_weights_by_hand() -> None:
    first = nn.Linear(6, 5)
    net, config = nn.Sequential(first, nn.Linear(5, 4)), [{"op_types": ["Linear"], "method": "lsq", "quant_dtype": "int4"}]
    prepare_model(net, make_plan(net, config, example_input=torch.randn(2, 6)))
    with torch.no_grad():
        first.weight.mul_(4)  # the learned scales stay
    (one, two) = stored_parameters(net)
    scale = one.integers.scale.view(-1, 1)
    assert one.loss.clipped == pytest.approx(float(((first.weight / scale).round().abs() > 7).double().mean()))
    assert one.loss.clipped > 0.1
    assert one.loss.signal_to_noise < two.loss.signal_to_noise


METHODS: list[dict[str, Any]] = [
    {"method": "lsq"},
    {"method": "lsq+", "quant_dtype": "int4"},
    {"method": "pact"},
    {"method": "dorefa", "quant_dtype": "int4"},
    {"method": "bnn", "quant_dtype": "int1"},
    {"observer": "mse"},
    {"target_settings": {"_output_": {"granularity": "per_channel"}, "_input_": {"granularity": "per_channel"}}},
]


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: str(next(iter(keys.values())))[:10])
def test_every_method_is_measured(keys: dict[str, Any], quiet_trainer: TrainerMaker) -> None:
    rows = Rows()
    callback = QuantFusionCallback([{**FUSED[0], **keys}], log_every_n_steps=1, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback], logger=rows).fit(Lit(), loader(), loader(seed=1))
    last = rows.rows[max(rows.rows)]
    for kind in ("signal_to_noise", "effective_bits", "clipped"):
        names = {key.removeprefix(f"quant/{kind}/") for key in last if key.startswith(f"quant/{kind}/")}
        assert names >= {"conv1.weight", "conv2.weight", "fc.weight", "conv1._output_"}, kind
    assert all(math.isfinite(value) for value in last.values())


# -- when and where -------------------------------------------------------------------------------------------------------


def test_numbers_of_each_layer_go_to_loggers_alone(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(FUSED, log_every_n_steps=2, verbose=0)
    logger = CSVLogger(tmp_path, name="csv")
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback], logger=logger, log_every_n_steps=1)
    trainer.fit(Lit(), loader(), loader(seed=1))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    activations = ["conv1._input_", "conv1._output_", "conv2._output_"]
    weights = ["conv1.weight", "conv2.weight", "fc.weight"]
    each = {f"quant/{kind}/{name}" for kind in ("signal_to_noise", "effective_bits", "clipped") for name in activations + weights}
    assert each <= set(rows[0])
    for name in each:
        assert [int(row["step"]) for row in rows if row[name]] == [1, 3, 5, 7], name
    for row in rows:
        if row["quant/effective_bits/conv1.weight"]:
            bits, ratio = (float(row[f"quant/{kind}/conv1.weight"]) for kind in ("effective_bits", "signal_to_noise"))
            assert bits == pytest.approx((ratio - 1.76) / 6.02)
            assert 5 < bits < 8
    assert not each & set(trainer.callback_metrics), "hundreds of numbers are no summary"
    assert "quant/clipped_mean" in trainer.callback_metrics


def test_only_what_is_rounded_is_logged(quiet_trainer: TrainerMaker) -> None:
    rows = Rows()
    callback = QuantFusionCallback(FUSED, schedule={"quantize_start": 2, "activations_start": 4}, log_every_n_steps=1, verbose=0)
    quiet_trainer(max_epochs=2, callbacks=[callback], logger=rows).fit(Lit(), loader(), loader(seed=1))
    found = {step: {key.split("/")[2].split(".")[1] for key in row if key.count("/") == 2} for step, row in rows.rows.items()}
    both = {"weight", "_input_", "_output_"}
    assert found == {0: set(), 1: set(), 2: {"weight"}, 3: {"weight"}, **dict.fromkeys(range(4, 8), both)}


def test_a_step_of_several_batches_is_measured_as_a_whole(quiet_trainer: TrainerMaker) -> None:
    shapes: list[int] = []
    own = RoundingLoss.update

    def update(self: RoundingLoss, row: int, x: Tensor, rounded: Tensor, clipped: float = 0.0) -> None:
        shapes.append(x.numel())
        own(self, row, x, rounded, clipped)

    rows, callback = Rows(), QuantFusionCallback(FUSED, log_every_n_steps=2, verbose=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundingLoss, "update", update)
        quiet_trainer(max_epochs=1, callbacks=[callback], logger=rows, accumulate_grad_batches=2).fit(
            Lit(), loader(), loader(seed=1)
        )
    assert list(rows.rows) == [0, 1]
    weights = [8 * 3 * 9, 8 * 8 * 9, 4 * 8 * 16]
    activations = 2 * [16 * 3 * 64, 16 * 8 * 64, 16 * 8 * 64]
    measured = sorted(number for number in shapes if number)
    assert measured == sorted([*activations, *weights]), "two batches of three activations, the weights once"


class Breaks(Callback):
    """Ends a fit in the middle of a step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        raise RuntimeError("broken off")


def test_a_step_that_was_broken_off_does_not_count(quiet_trainer: TrainerMaker) -> None:
    def logged(*, broken: bool) -> dict[int, dict[str, float]]:
        rows, callback = Rows(), QuantFusionCallback(FUSED, log_every_n_steps=1, verbose=0)
        if broken:
            trainer = quiet_trainer(max_epochs=1, callbacks=[callback, Breaks()])
            with pytest.raises(RuntimeError, match="broken off"):
                trainer.fit(Lit(), loader(), loader(seed=1))
        torch.manual_seed(1)
        quiet_trainer(max_epochs=1, callbacks=[callback], logger=rows).fit(Lit(), loader(), loader(seed=1))
        return rows.rows

    assert logged(broken=True) == logged(broken=False)


def test_phases_are_told_as_they_begin(quiet_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"quantize_start": 2, "activations_start": 3, "observe_stop": 6, "freeze_batch_norm": 7}
    rows, callback = Rows(), QuantFusionCallback(FUSED, schedule=schedule, log_every_n_steps=100)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        quiet_trainer(max_epochs=2, callbacks=[callback], logger=rows).fit(Lit(), loader(), loader(seed=1))
    assert [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")] == [
        "step 0 (epoch 0): ranges move",
        "step 2 (epoch 0): weights are rounded",
        "step 3 (epoch 0): activations are rounded, too",
        "step 6 (epoch 1): ranges freeze",
        "step 7 (epoch 1): batch norm freezes",
    ]
    assert {step: tuple(row.values()) for step, row in rows.rows.items()} == {
        0: (0, 1, 0),
        2: (1, 1, 0),
        3: (2, 1, 0),
        6: (2, 0, 0),
        7: (2, 0, 1),
    }, "no more than the three numbers of a phase"


def test_layers_that_begin_one_after_the_other_are_told(quiet_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture) -> None:
    callback = QuantFusionCallback(FUSED, schedule={"progressive": 3, "observe_stop": None})
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Lit(), loader(), loader(seed=1))
    assert [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")] == [
        "step 0 (epoch 0): weights and activations are rounded in 1 of 3 layers, ranges move",
        "step 1 (epoch 0): weights and activations are rounded in 2 of 3 layers",
        "step 2 (epoch 0): weights and activations are rounded",
    ]


def test_verbose_0_tells_nothing(quiet_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        quiet_trainer(max_epochs=1, callbacks=[QuantFusionCallback(FUSED, verbose=0)]).fit(Lit(), loader(), loader(seed=1))
    assert not [record for record in caplog.records if record.getMessage().startswith("step ")]


def test_off_nothing_is_measured_or_sent(quiet_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("lightning_quant.logs.Meters", refuse)
    monkeypatch.setattr("lightning_quant.logs.stored_parameters", refuse)
    rows, model = Rows(), Lit()
    callback, measuring = QuantFusionCallback(FUSED, verbose=0), QuantFusionCallback(FUSED, log_every_n_steps=1, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback], logger=rows).fit(model, loader(), loader(seed=1))
    assert rows.rows == {}
    assert all(quantizer.meter is None for quantizer in quantizers_of(model).values())
    with pytest.raises(AssertionError, match="measured"):
        quiet_trainer(max_epochs=1, callbacks=[measuring]).fit(Lit(), loader(), loader(seed=1))


# -- settings -------------------------------------------------------------------------------------------------------------


class Named(Lit):
    """With hyperparameters of names that could be ours."""

    def __init__(self, lr: float = 0.05, quant: str = "mine", config_list: int = 3) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class Data(LightningDataModule):
    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return loader(self.hparams["rows"])

    def val_dataloader(self) -> Any:
        return loader(seed=1)


def test_the_config_goes_to_the_logger_and_not_into_hparams(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    config = tmp_path / "quant.yaml"
    config.write_text(yaml.safe_dump([{"op_types": ["Conv2d", "Linear"]}]))
    model, saver = Named(lr=0.01, quant="yours"), ModelCheckpoint(tmp_path / "kept", save_last=True)
    before = copy.deepcopy(dict(model.hparams))
    callback = QuantFusionCallback(config, schedule={"observe_stop": 3}, verbose=0)
    logger = CSVLogger(tmp_path, name="csv")
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback, saver], logger=logger, enable_checkpointing=True)
    trainer.fit(model, datamodule=Data(32))
    written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert {key: written[key] for key in before} == before, "the module's own"
    assert before == {"lr": 0.01, "optimizer": "sgd", "quant": "yours", "config_list": 3}
    assert written["rows"] == 32
    assert written["quant/config_list"] == [{"op_types": ["Conv2d", "Linear"]}]
    assert written["quant/schedule"]["observe_stop"] == 3
    assert "quant/settings" not in written
    assert dict(model.hparams) == before
    checkpoint = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == before
    assert checkpoint["callbacks"]["QuantFusionCallback"]["config_list"] == [{"op_types": ["Conv2d", "Linear"]}]
    loaded = Named.load_from_checkpoint(tmp_path / "kept" / "last.ckpt")
    assert dict(loaded.hparams) == before


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_last_call_has_everything(epochs: int, quiet_trainer: TrainerMaker) -> None:
    """TensorBoardLogger writes a summary of each call's parameters alone; the last one is shown."""
    rows = Rows()
    callback = QuantFusionCallback(FUSED, verbose=0)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback], logger=rows)
    trainer.fit(Named(), loader(), loader(seed=1))
    (ours,) = [given for given in rows.hparams if "quant/config_list" in given]
    assert ours["quant/config_list"] == callback.config_list
    assert {"lr": 0.05, "quant": "mine", "config_list": 3}.items() <= ours.items()
    assert rows.hparams[-1] is ours or epochs == 0, "without training the Trainer's own call comes last"


class Silent(LightningModule):
    """Whose hyperparameters are not for loggers."""

    def __init__(self, secret: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.fc = nn.Linear(192, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.fc(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_is_not_for_loggers_is_not_logged(quiet_trainer: TrainerMaker) -> None:
    rows = Rows()
    quiet_trainer(max_epochs=1, callbacks=[QuantFusionCallback("int8", verbose=0)], logger=rows).fit(Silent(), loader())
    (ours,) = rows.hparams
    assert "secret" not in ours
    assert ours["quant/config_list"] == "int8"


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_trainer_that_is_to_log_no_settings_logs_none(epochs: int, quiet_trainer: TrainerMaker) -> None:
    rows = Rows()
    callback = QuantFusionCallback(FUSED, log_every_n_steps=1, verbose=0)
    options: dict[str, Any] = {"max_epochs": epochs, "logger": rows, "enable_autolog_hparams": False}
    quiet_trainer(callbacks=[callback], **options).fit(Named(), loader(), loader(seed=1))
    assert rows.hparams == []
    assert bool(rows.rows) == (epochs > 0), "measurements are no settings"
