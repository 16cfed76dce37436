# SPDX-License-Identifier: Apache-2.0
"""Owns calibration by the callback: at the start of a fit, or all that a fit without training does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.calibrate import calibrate, correct_biases
from lightning_quant.calibration import BATCHES, Calibration
from lightning_quant.prepare import prepared_groups, quantizer_state, quantizers_of
from lightning_quant.rounding import learn_rounding

TrainerMaker = Callable[..., Trainer]
LAYERS = [{"op_types": ["Conv2d", "Linear"]}]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(X)
    return y


def lit() -> Lit:
    torch.manual_seed(0)
    return Lit()


@pytest.mark.parametrize("calibration", [None, 2, {"batches": 2}, Calibration(batches=2)], ids=["none", "int", "dict", "object"])
def test_a_fit_without_epochs_calibrates_and_converts(calibration: Any, quiet_trainer: TrainerMaker) -> None:
    model, callback = lit(), QuantFusionCallback(LAYERS, calibration=calibration, verbose=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "weights and statistics stay"
    twin = lit()
    prepare_model(twin, make_plan(twin, LAYERS, example_input=X))
    calibrate(twin, [x for x, _ in loader()][: 2 if calibration else BATCHES])
    assert quantizer_state(model) == quantizer_state(twin)


def test_biases_are_corrected_for_the_rounding_that_was_learned(
    quiet_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    briefly = partial(learn_rounding, iterations=20)
    monkeypatch.setattr("lightning_quant.calibration.learn_rounding", briefly)
    low = [{**LAYERS[0], "target_settings": {"weight": {"quant_dtype": "int2"}}}]
    calibration = {"batches": 2, "correct_biases": True, "learn_rounding": True}
    callback = QuantFusionCallback(low, calibration=calibration, verbose=0)
    quiet_trainer(max_epochs=0, callbacks=[callback]).fit(lit(), loader(), loader(seed=1))
    twin, batches = lit(), [x for x, _ in loader()][:2]
    prepare_model(twin, make_plan(twin, low, example_input=X))
    calibrate(twin, batches)
    briefly(twin, batches)
    learned = evaluated(twin)
    correct_biases(twin, batches)
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(twin))
    assert not torch.equal(learned, evaluated(twin)), "there was something to correct"


def test_no_steps_are_no_training_either(quiet_trainer: TrainerMaker) -> None:
    model, callback = lit(), QuantFusionCallback(LAYERS, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback], max_steps=0).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))


def test_without_training_data_there_is_nothing_to_calibrate_with(quiet_trainer: TrainerMaker) -> None:
    model, callback = lit(), QuantFusionCallback(LAYERS, verbose=0, example_input=X)
    with pytest.warns(UserWarning, match="so nothing was converted"):
        quiet_trainer(max_epochs=1, callbacks=[callback], limit_train_batches=0).fit(model, loader(), loader(seed=1))
    callback = QuantFusionCallback(LAYERS, calibration=4, verbose=0, example_input=X)
    with pytest.raises(ConfigError, match="no batch of the training data is to be had: there is no data"):
        quiet_trainer(max_epochs=1, callbacks=[callback], limit_train_batches=0).fit(lit(), loader(), loader(seed=1))


class Order(Lit):
    """Remembers the batches that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(float(batch[0].sum()))
        return loss


def test_training_after_it_sees_the_data_it_would_have_seen(quiet_trainer: TrainerMaker) -> None:
    runs = []
    for batches in (0, 3):
        torch.manual_seed(0)
        model = Order()
        torch.manual_seed(1)
        callback = QuantFusionCallback(LAYERS, calibration=batches, verbose=0)
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(shuffle=True), loader(seed=1))
        runs.append((model.seen, quantizer_state(model)))
    assert runs[0][0] == runs[1][0]
    assert len(runs[0][0]) == 4
    assert runs[0][1] != runs[1][1], "the ranges began elsewhere"


def test_a_second_fit_keeps_its_ranges(quiet_trainer: TrainerMaker) -> None:
    model, callback = lit(), QuantFusionCallback(LAYERS, calibration=1, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    before = quantizer_state(model)
    quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(seed=9), loader(seed=1))
    assert quantizer_state(model) == before


class Frozen(nn.Module):
    """A net whose training_step calls it by itself, with a keyword argument and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x)) * mask)
        return y


class Inside(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.teacher = Frozen(), nn.Linear(3, 2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch["x"], mask=batch["mask"]) - self.teacher(batch["x"])).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_module_that_training_step_calls_is_what_is_calibrated(quiet_trainer: TrainerMaker) -> None:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    mask = (x[:, :1] > 0).float()
    parts = {name: DataLoader(TensorDataset(one), batch_size=8) for name, one in (("x", x), ("mask", mask))}

    class Paired(Inside):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({"x": batch["x"][0], "mask": batch["mask"][0]}, batch_idx)

    model, callback = Paired(), QuantFusionCallback([{"op_types": ["Linear"]}], root="net", calibration=3, verbose=0)
    quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, parts)
    assert callback.deployed_model is not None
    seen = quantizer_state(model)["net.fc1._input_"]
    thirds = [x[8 * i : 8 * i + 8] for i in range(3)]
    assert seen["low"] == pytest.approx(float(sum(one.min() for one in thirds)) / 3, rel=1e-5)
    assert seen["high"] == pytest.approx(float(sum(one.max() for one in thirds)) / 3, rel=1e-5)


def test_rounding_and_biases_are_learned_where_nothing_is_trained(quiet_trainer: TrainerMaker) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "target_settings": {"weight": {"quant_dtype": "int3"}}}]
    x = torch.cat([x for x, _ in loader()])
    with torch.no_grad():
        expected = lit().eval()(x)
    errors = []
    for options in ({}, {"correct_biases": True, "learn_rounding": True}):
        model, callback = lit(), QuantFusionCallback(config, calibration={"batches": 4, **options}, verbose=0)
        quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(), loader(seed=1))
        assert callback.deployed_model is not None
        assert torch.equal(evaluated(callback.deployed_model), evaluated(model))
        with torch.no_grad():
            errors.append(float((callback.deployed_model(x) - expected).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_equalizing_an_uneven_net_saves_it(shared: Path, monkeypatch: pytest.MonkeyPatch, quiet_trainer: TrainerMaker) -> None:
    """A depthwise net trained on real pictures, its channels made uneven: rounded per tensor it is lost, equalized it is not."""
    monkeypatch.syspath_prepend(str(shared / "data" / "float"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    from nets import RECIPES, unequalize  # type: ignore[import-not-found]

    data = np.load(shared / "data" / "emoji32.npz")

    def images(key: str, count: int) -> Tensor:
        return torch.from_numpy(data[key][:count]).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module = RECIPES["emoji_ds_relu"][1]()
            self.net.load_state_dict(torch.load(shared / "data" / "float" / "emoji_ds_relu.pt", weights_only=True))
            unequalize(self.net.eval(), 30)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0]).mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    train = DataLoader(TensorDataset(images("x_train", 128)), batch_size=64)
    x, y = images("x_test", 400), torch.from_numpy(data["y_test"][:400].astype("int64"))
    config: list[Any] = ["int8", {"op_types": ["Conv2d", "Linear"], "granularity": "per_tensor"}]
    accuracy = []
    for equalize in (False, True):
        model, callback = Net(), QuantFusionCallback(config, calibration={"equalize": equalize, "batches": 2}, verbose=0)
        quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, train)
        assert callback.deployed_model is not None
        with torch.no_grad():
            accuracy.append(float((callback.deployed_model(x).argmax(1) == y).double().mean()))
    assert accuracy[0] < 0.2
    assert accuracy[1] >= 0.65


WRONG: list[tuple[Any, str]] = [
    ("32", "calibration: expected a number of batches, a dict of settings or None, got '32'"),
    (True, "calibration: expected a number of batches, a dict of settings or None, got True"),
    (-1, "calibration: batches=-1 is no number of batches; give 0 or more, or None"),
    ({"batches": 1.5}, "calibration: batches=1.5 is no number of batches"),
    ({"equalise": True}, "calibration: unknown key 'equalise'; allowed: equalize, batches, .*Did you mean 'equalize'"),
    ({"equalize": "yes"}, "calibration: equalize='yes': expected true or false"),
    (
        {"batches": 0, "correct_biases": True},
        "correct_biases and learn_rounding need ranges, but batches=0 finds none",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_calibration_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantFusionCallback(LAYERS, calibration=given)


def test_integers_are_not_learned_before_training(quiet_trainer: TrainerMaker) -> None:
    model, callback = lit(), QuantFusionCallback(LAYERS, calibration={"equalize": True, "learn_rounding": True}, verbose=0)
    with pytest.raises(ConfigError, match="learn_rounding fixes the integers of the weights, which training would move"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert not prepared_groups(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), lit().state_dict().values(), strict=True))


def test_data_that_cannot_be_had(quiet_trainer: TrainerMaker) -> None:
    def stream() -> Any:
        while True:
            yield [X, torch.zeros(8, dtype=torch.long)]

    model, callback = lit(), QuantFusionCallback(LAYERS, calibration=2, example_input=X, verbose=0)
    with pytest.raises(ConfigError, match="is to be had: the data is a stream that runs once"):
        quiet_trainer(max_epochs=1, max_steps=1, callbacks=[callback]).fit(model, stream(), loader(seed=1))
    assert not prepared_groups(model)


def test_equalizing_needs_a_recorded_forward(quiet_trainer: TrainerMaker) -> None:
    class Stepless(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("not today")

    model = Stepless()
    callback = QuantFusionCallback([{"op_names": ["fc"]}], calibration={"equalize": True}, verbose=0)
    with pytest.raises(ConfigError, match="calibration: equalize needs a recorded forward; give example_input"):
        quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(), loader(seed=1))


# -- method ptq -------------------------------------------------------------------------------------------------------------

PTQ: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"], "method": "ptq"}]
MIXED: list[dict[str, Any]] = [*LAYERS, {"op_names": ["conv2"], "method": "ptq", "observer": "percentile:99.9"}]


def calibrated_twin(config: list[dict[str, Any]], batches: int) -> dict[str, dict[str, Any]]:
    """The ranges that `calibrate` finds in an untrained `lit()`."""
    twin = lit()
    prepare_model(twin, make_plan(twin, config, example_input=X))
    calibrate(twin, [x for x, _ in loader()][:batches])
    return quantizer_state(twin)


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_ptq_without_epochs_needs_no_argument(bits: int, quiet_trainer: TrainerMaker) -> None:
    keys = {name: {"quant_dtype": f"{'' if name == 'weight' else 'u'}int{bits}"} for name in ("weight", "_input_", "_output_")}
    config = [{**PTQ[0], "target_settings": keys}]
    model, callback = lit(), QuantFusionCallback(config, verbose=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert quantizer_state(model) == calibrated_twin(config, BATCHES)
    weight = callback.deployed_model.get_submodule("conv1").get_buffer("weight")
    assert all(2 <= len(set(channel.flatten().tolist())) <= 2**bits - 1 for channel in weight)


class Ranges(Callback):
    """Keeps the ranges at the end of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, dict[str, Any]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(quantizer_state(pl_module))


def of(state: dict[str, dict[str, Any]], *layers: str) -> dict[str, dict[str, Any]]:
    return {name: {k: repr(v) for k, v in one.items()} for name, one in state.items() if name.split(".")[0] in layers}


@pytest.mark.parametrize("calibration", [None, 2])
def test_training_moves_no_range_of_ptq(calibration: int | None, quiet_trainer: TrainerMaker) -> None:
    """Nor does what another layer of another method does; the other layer's ranges begin there and move."""
    model, ranges = lit(), Ranges()
    callback = QuantFusionCallback(MIXED, calibration=calibration, schedule={"observe_stop": None}, verbose=0)
    before = model.get_parameter("conv2.weight").detach().clone()
    quiet_trainer(max_epochs=2, callbacks=[callback, ranges]).fit(model, loader(), loader(seed=1))
    start = calibrated_twin(MIXED, calibration or BATCHES)
    assert len(ranges.seen) == 8
    assert len(of(start, "conv2")) == 2, "_input_ of its own, because the methods differ, and _output_"
    for state in ranges.seen:
        assert of(state, "conv2") == of(start, "conv2")
        assert of(state, "conv1", "fc") != of(start, "conv1", "fc")
    assert not torch.equal(before, model.get_parameter("conv2.weight")), "its weights train"
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))
    assert of(quantizer_state(model), "conv2") == of(start, "conv2")


def test_ptq_rounds_from_the_first_step_straight_through(quiet_trainer: TrainerMaker) -> None:
    """The first step's gradients are those of `qat` on the same ranges, calibrated and frozen."""
    gradients = []

    class Kept(Lit):
        def on_after_backward(self) -> None:
            gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    frozen: dict[str, Any] = {"calibration": BATCHES, "schedule": {"observe_start": None}}
    runs: list[tuple[list[dict[str, Any]] | None, dict[str, Any]]] = [(PTQ, {}), (LAYERS, frozen), (None, {})]
    for config, options in runs:
        torch.manual_seed(0)
        model = Kept()
        callbacks = [] if config is None else [QuantFusionCallback(config, verbose=0, **options)]
        quiet_trainer(max_steps=1, callbacks=callbacks, num_sanity_val_steps=0).fit(model, loader(), loader(seed=1))
    ours, qat, plain = gradients
    assert all(torch.equal(a, b) for a, b in zip(ours, qat, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_resumed_run_keeps_the_ranges_of_ptq(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """On other data than it was calibrated with; and as a run that was never interrupted."""

    def run(epochs: int, ckpt: Path | None, seed: int = 0) -> LightningModule:
        model, callback = lit(), QuantFusionCallback(MIXED, schedule={"observe_stop": None}, verbose=0)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(model, loader(seed=seed), loader(seed=1), ckpt_path=ckpt, weights_only=True if ckpt else None)
        trainer.save_checkpoint(tmp_path / f"{epochs}-{seed}-{ckpt is None}.ckpt")
        return model

    first = run(1, None)
    path = tmp_path / "1-0-True.ckpt"
    whole, resumed, elsewhere = run(2, None), run(2, path), run(2, path, seed=9)
    assert of(quantizer_state(resumed), "conv2") == of(quantizer_state(first), "conv2")
    assert of(quantizer_state(elsewhere), "conv2") == of(quantizer_state(first), "conv2")
    assert of(quantizer_state(elsewhere), "fc") != of(quantizer_state(first), "fc")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert repr(quantizer_state(whole)) == repr(quantizer_state(resumed))


def test_the_schedule_holds_for_ptq(quiet_trainer: TrainerMaker) -> None:
    """Before `quantize_start` nothing is rounded; `observe_start` and `observe_stop` are not about it."""
    model, ranges = lit(), Ranges()
    callback = QuantFusionCallback(PTQ, schedule={"quantize_start": 2, "observe_start": None}, verbose=0)
    twin = lit()
    with pytest.warns(UserWarning, match="no quantized training step was run, so nothing was converted"):
        quiet_trainer(max_steps=2, callbacks=[callback, ranges]).fit(model, loader(), loader(seed=1))
    quiet_trainer(max_steps=2).fit(twin, loader(), loader(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert of(ranges.seen[-1], "conv1", "conv2", "fc") == of(calibrated_twin(PTQ, BATCHES), "conv1", "conv2", "fc")


class Residual(Lit):
    """With an operator and a module that is quantized around its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)

    def forward(self, x: Tensor) -> Tensor:
        conv1, bn1, relu1, conv2, bn2, relu2, pool, fc, norm = self.children()
        x = relu1(bn1(conv1(x)))
        x = pool(relu2(bn2(conv2(x))) + x)
        y: Tensor = fc(norm(x.flatten(1)))
        return y


def test_ptq_of_other_kinds_of_layers(quiet_trainer: TrainerMaker) -> None:
    config: list[dict[str, Any]] = [
        {
            "op_types": ["Conv2d", "Linear", "LayerNorm", "add"],
            "method": "ptq",
            "target_settings": {"_input_": {"observer": "minmax"}},
        },
        {"op_names": ["conv1"], "method": "ptq", "target_settings": {"_output_": {"granularity": "per_channel"}}},
    ]
    torch.manual_seed(0)
    model, ranges = Residual(), Ranges()
    callback = QuantFusionCallback(config, schedule={"observe_stop": None}, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback, ranges]).fit(model, loader(), loader(seed=1))
    assert {type(quantizer).__name__ for quantizer in quantizers_of(model).values()} == {"ActivationQuantizer", "BlockQuantizer"}
    assert len(ranges.seen) == 4 and len(ranges.seen[0]) >= 6
    assert all(repr(state) == repr(ranges.seen[0]) for state in ranges.seen)
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))


def test_ptq_and_learned_methods_together(quiet_trainer: TrainerMaker) -> None:
    config: list[dict[str, Any]] = [
        {"op_types": ["Conv2d"], "method": "ptq"},
        {"op_types": ["Linear"], "method": "lsq", "high_precision_output": False},
    ]
    model, ranges = lit(), Ranges()
    callback = QuantFusionCallback(config, verbose=0)
    quiet_trainer(max_epochs=2, callbacks=[callback, ranges]).fit(model, loader(), loader(seed=1))
    convs = [of(state, "conv1", "conv2") for state in ranges.seen]
    assert all(state == convs[0] for state in convs)
    assert ranges.seen[0]["fc._output_"]["scale"] != ranges.seen[-1]["fc._output_"]["scale"]
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))


def test_ptq_without_a_trainer_is_calibrated_by_hand() -> None:
    model = lit()
    plan = make_plan(model, PTQ, example_input=X)
    assert "ptq" in str(plan)
    prepare_model(model, plan).train()(X)
    with pytest.raises(ConfigError, match=r"no range was observed for conv1\._input_, .*method 'ptq' at least, calibrate"):
        convert_model(model)
    calibrate(model, [X])
    before = quantizer_state(model)
    model.train()(10 * X)
    assert quantizer_state(model) == before
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


def test_ptq_needs_batches(quiet_trainer: TrainerMaker) -> None:
    for config, name in ((PTQ, "conv1._input_ and 2 more"), ([{**PTQ[0], "op_types": ["Linear"]}], "fc._input_")):
        for epochs in (0, 1):
            callback = QuantFusionCallback(config, calibration=0, verbose=0)
            model = lit()
            with pytest.raises(
                ConfigError, match=f"batches=0 finds no range, and method 'ptq' of {name} has no other; give 1 or"
            ):
                quiet_trainer(max_epochs=epochs, callbacks=[callback]).fit(model, loader(), loader(seed=1))
            assert not prepared_groups(model)
    callback = QuantFusionCallback(PTQ, verbose=0, example_input=X)
    with pytest.raises(
        ConfigError, match=r"no batch of the training data is to be had: .*Method 'ptq' of conv1._input_ and 2 more"
    ):
        quiet_trainer(max_epochs=1, callbacks=[callback], limit_train_batches=0).fit(lit(), loader(), loader(seed=1))


def test_one_bit_is_not_for_ptq() -> None:
    with pytest.raises(ConfigError, match="method 'ptq' of 'weight' of Linear: int1 has one bit, which only method 'bnn' trains"):
        make_plan(lit(), [{"op_types": ["Linear"], "target_settings": {"weight": {"method": "ptq", "quant_dtype": "int1"}}}])
