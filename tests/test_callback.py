# SPDX-License-Identifier: Apache-2.0
"""Owns life inside a Trainer: real fits, checkpoints, resumes and tests with the callback, and what it must not disturb."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_prepare import traces
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info
from torchmetrics import MeanMetric
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, ParityError, QuantFusionCallback, Schedule, load_deployed
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def fit(make: TrainerMaker, model: LightningModule, callback: Callback, epochs: int = 1, **options: Any) -> Trainer:
    callbacks = [callback, *options.pop("more", [])]
    ckpt_path, data = options.pop("ckpt_path", None), options.pop("data", None)
    trainer = make(max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(model, data or loader(), loader(seed=1), ckpt_path=ckpt_path)
    return trainer


def evaluate(model: torch.nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    return out


# -- the promise -------------------------------------------------------------------------------------------------------------


def test_one_line_leaves_a_deployed_model_that_is_the_validated_one(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED)
    trainer = fit(quiet_trainer, model, callback)
    assert callback.deployed_model is not None
    assert isinstance(callback.deployed_model, Lit)
    assert torch.equal(callback.deployed_model(X), evaluate(model))
    (prepared,) = trainer.validate(model, loader(seed=1), verbose=False)
    (deployed,) = quiet_trainer().validate(callback.deployed_model, loader(seed=1), verbose=False)
    assert prepared == deployed


class Watch(Callback):
    """Records what a user could hold on to, at every stage."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(traces(pl_module)[:-1])


def test_nothing_a_user_holds_changes_during_fit(quiet_trainer: TrainerMaker) -> None:
    model, watch = Lit(), Watch()
    calls: list[int] = []
    model.get_submodule("conv1").register_forward_pre_hook(lambda m, args: calls.append(1))
    model.get_submodule("relu1").register_forward_hook(lambda m, args, out: calls.append(2))
    before = traces(model)[:-1]
    with pytest.warns(UserWarning, match="hooks on conv1, relu1 are not in the deployed copy"):
        fit(quiet_trainer, model, QuantFusionCallback(FUSED), more=[watch], num_sanity_val_steps=0)
    assert len(watch.seen) == 4
    assert all(seen == before for seen in watch.seen)
    assert traces(model)[:-1] == before
    assert calls == [1, 2] * 8, "each hook once a training and validation batch, never in the recorded forward"


def test_a_checkpoint_loads_where_the_package_is_not_installed(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    trainer = fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    code = (
        "import sys; sys.modules['lightning_quant'] = None; sys.path.insert(0, sys.argv[2]); import torch; from toys import Lit;"
        "model = Lit.load_from_checkpoint(sys.argv[1], map_location='cpu');"
        "assert type(model.conv1).__name__ == 'Conv2d';"
        "torch.load(sys.argv[1], weights_only=True)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.ckpt", Path(__file__).parent], check=True, timeout=120)


@pytest.mark.parametrize("own_generator", [False, True], ids=["global seed", "own generator"])
def test_bypassed_training_is_the_users_training_bit_for_bit(own_generator: bool, quiet_trainer: TrainerMaker) -> None:
    """Also shows that finding the example input moves no random state and no loader position (shuffled data)."""
    finals = []
    for callbacks in ([], [QuantFusionCallback(FUSED, schedule={"quantize_start": None, "freeze_batch_norm": None}, verbose=0)]):
        seed_everything(3, verbose=False)
        model = Lit()
        generator = torch.Generator().manual_seed(1) if own_generator else None
        data = DataLoader(loader().dataset, batch_size=16, shuffle=True, generator=generator)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no quantized training step was run.*")
            quiet_trainer(max_epochs=2, callbacks=callbacks).fit(model, data, loader(seed=1))
        drawn = torch.rand(3, generator=generator)
        finals.append({**model.state_dict(), "random": torch.rand(3), "drawn": drawn})
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


# -- the plan and its example input --------------------------------------------------------------------------------------------


def test_the_plan_is_said_once(quiet_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.INFO):
        fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED))
    plans = list({r.created: r.getMessage() for r in caplog.records if "the plan" in r.getMessage()}.values())
    assert len(plans) == 1
    assert "conv1   bn1, relu1" in plans[0]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, verbose=0))
    assert not [r for r in caplog.records if "QuantFusionCallback" in r.getMessage()]


class Inner(LightningModule):
    """Its training step calls a submodule, not itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        try:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        except Exception as error:  # a user's own guard must not swallow the capture
            raise AssertionError from error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def prefixed(prefix: str) -> list[dict[str, Any]]:
    return [{**FUSED[0], "fuse_names": [[prefix + name for name in group] for group in FUSED[0]["fuse_names"]]}]


def test_a_step_that_calls_a_submodule_is_recorded_there(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(prefixed("net."), export=".pt2", dirpath=tmp_path, verbose=0)
    model = Inner()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
    assert "recorded from 'net'" in str(callback.plan)
    assert torch.equal(load_deployed(tmp_path / "model.pt2")(X), evaluate(model.net))


class Distill(Lit):
    """Calls a teacher before itself; the teacher must be neither recorded nor quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0])
        return torch.nn.functional.mse_loss(self(batch[0]), target)


def test_a_module_called_before_the_models_own_forward_is_not_taken_for_it(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, Distill(), callback)
    assert callback.plan is not None
    assert [layer.name for layer in callback.plan.layers] == ["conv1", "conv2", "fc"]
    assert any("teacher.conv1 (Conv2d) is not called" in note for note in callback.plan.notes)


def test_layers_left_float_because_the_recording_began_elsewhere_are_said(quiet_trainer: TrainerMaker) -> None:
    class Two(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Linear(4, 4)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self.other(self.net(batch[0])), batch[1])

    with pytest.warns(UserWarning, match=r"other \(Linear\) is not called .*; recorded from 'net', .*give example_input"):
        quiet_trainer(max_epochs=1, callbacks=[QuantFusionCallback(prefixed("net."), verbose=0)]).fit(Two(), loader())


def test_the_trial_step_touches_no_metric_and_logs_nothing(quiet_trainer: TrainerMaker) -> None:
    class Metered(Lit):
        """Its forward is for inference only: the step calls a submodule, then a metric."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.meter, self.logged = Net(), MeanMetric(), 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.meter(loss.detach())
            self.logged += 1
            return loss

    counts: list[tuple[int, int]] = []

    class Count(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counts.append((pl_module.meter.update_count, pl_module.logged))  # type: ignore[union-attr,arg-type]

    callback = QuantFusionCallback([{"op_names": ["net.conv1"]}], verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback, Count()]).fit(Metered(), loader(), loader(seed=1))
    assert counts == [(0, 0)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at every tensor's .grad
def test_a_compiled_net_trains_and_deploys(quiet_trainer: TrainerMaker) -> None:
    model, callback = Inner(), QuantFusionCallback(prefixed("net."), verbose=0)
    model.net.compile(backend="eager")
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
    assert callback.deployed_model is not None
    assert torch.equal(evaluate(callback.deployed_model.get_submodule("net")), evaluate(model.net))


def test_a_module_compiled_as_a_whole_is_converted(quiet_trainer: TrainerMaker) -> None:
    """LightningModule.compile leaves what it made in copies of the module: they must not run the original."""
    model, callback = Inner(), QuantFusionCallback(prefixed("net."), verbose=0)
    model.compile(backend="eager")
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
    assert callback.deployed_model is not None
    assert torch.equal(evaluate(callback.deployed_model.get_submodule("net")), evaluate(model.net))


def test_root_makes_names_relative(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, root="net", verbose=0)
    model = Inner()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
    assert list(prepared_groups(model)) == ["net.conv1", "net.conv2", "net.fc"]
    with pytest.raises(ConfigError, match=r"root 'nets' is no module of Inner. Close: 'net'"):
        quiet_trainer(max_epochs=1, callbacks=[QuantFusionCallback(FUSED, root="nets")]).fit(Inner(), loader())


@pytest.mark.parametrize("source", ["argument", "example_input_array", "training data"])
def test_sources_of_the_example_input(source: str, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, example_input=X[:3] if source == "argument" else None, verbose=0)
    if source == "example_input_array":
        model.example_input_array = X[:5]
    fit(quiet_trainer, model, callback)
    sizes = {"argument": 3, "example_input_array": 5, "training data": 16}
    example = callback._example if source != "training data" else callback._example[0][0]
    assert len(example) == sizes[source]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            yield torch.randn(3, 8, 8, generator=generator), torch.randint(0, 4, (), generator=generator)


class Batches:
    """Not a DataLoader at all."""

    def __iter__(self) -> Any:
        yield from ([X, torch.zeros(8, dtype=torch.long)] for _ in range(3))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("kind", ["iterable", "own class", "mapping"])
def test_kinds_of_training_data(kind: str, quiet_trainer: TrainerMaker) -> None:
    kinds: dict[str, Any] = {
        "iterable": DataLoader(Stream(), batch_size=8),
        "own class": Batches(),
        "mapping": {"a": loader(shuffle=True), "b": loader(seed=2)},
    }

    class Step(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    model, callback = Step(), QuantFusionCallback(FUSED, schedule=Schedule(observe_stop=None, freeze_batch_norm=None), verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, kinds[kind], loader(seed=1))
    assert callback.deployed_model is not None


class NoStep(Lit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("no step today")


def test_without_any_example_fusing_is_refused_with_the_reason(quiet_trainer: TrainerMaker) -> None:
    class Odd(NoStep):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)  # no symbol can say

    model = Odd()
    with pytest.raises(
        ConfigError,
        match=r"no recorded forward \(a trial step failed: no step today; symbolic tracing failed: .*\); give example",
    ):
        fit(quiet_trainer, model, QuantFusionCallback(FUSED))
    assert not prepared_groups(model)


def test_without_any_example_the_forward_is_traced(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    with pytest.raises(RuntimeError, match="no step today"):
        fit(quiet_trainer, NoStep(), callback)
    assert callback.plan is not None
    assert {layer.name: layer.members for layer in callback.plan.layers} == {
        "conv1": ("bn1", "relu1"),
        "conv2": ("bn2", "relu2"),
        "fc": (),
    }
    said = "no example input (a trial step failed: no step today): the forward was traced symbolically"
    assert said in str(callback.plan)


# -- bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config_list": []}, "config_list: expected a non-empty list of dicts"),
        ({"source": "latest"}, "source: 'latest' is not one of best, last"),
        ({"export": ".tflite"}, r"export: unknown suffix '\.tflite'; known: \.onnx, \.pt2"),
        ({"export": True}, "export: expected None, a suffix, a list of suffixes or a dict suffix -> options, got True"),
        (
            {"export": {".pt2": {"opset": 13}}},
            r"export\['\.pt2'\]: unknown option 'opset'; allowed: example_input, dynamic_batch, dynamic_size, atol",
        ),
        ({"schedule": {"freeze": 1}}, "schedule: unknown key 'freeze'.*Did you mean 'freeze_batch_norm'"),
        ({"schedule": 3}, "schedule: expected a Schedule, a dict of its fields or None, got 3"),
    ],
)
def test_the_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantFusionCallback(**{"config_list": FUSED, **arguments})


def test_a_wrong_name_stops_fit_before_the_first_batch(quiet_trainer: TrainerMaker) -> None:
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MisconfigurationException, match=r"op_names 'conv9' matches no module. Close: 'conv"):
        fit(quiet_trainer, model, QuantFusionCallback([{"op_names": ["conv9"]}]))
    assert not prepared_groups(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- time ----------------------------------------------------------------------------------------------------------------------


class Phases(Callback):
    """Records the phase and the ranges at every training batch."""

    def __init__(self) -> None:
        self.phases: list[tuple[bool, bool, bool]] = []
        self.ranges: list[dict[str, Any]] = []
        self.norms: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        phase = next(iter(prepared_groups(pl_module).values()))[1].phase
        self.phases.append((phase.observe, phase.quantize, phase.freeze_batch_norm))
        self.ranges.append(quantizer_state(pl_module))
        self.norms.append(pl_module.bn1.running_mean.clone())  # type: ignore[union-attr,operator]


MOMENTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    # field and moment -> the field's flag at each of 12 steps (3 epochs of 4)
    "observe_start step": ({"observe_start": 2, "observe_stop": None}, [0] * 2 + [1] * 10),
    "observe_stop epoch": ({"observe_stop": "epoch 2"}, [1] * 8 + [0] * 4),
    "observe_stop share": ({"observe_stop": 0.5}, [1] * 6 + [0] * 6),
    "quantize_start step": ({"quantize_start": "step 5"}, [0] * 5 + [1] * 7),
    "quantize_start percent": ({"quantize_start": "25%"}, [0] * 3 + [1] * 9),
    "freeze_batch_norm epoch": ({"freeze_batch_norm": "epoch 1"}, [0] * 4 + [1] * 8),
    "freeze_batch_norm never": ({"freeze_batch_norm": None}, [0] * 12),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_the_schedule_acts_at_its_moment_and_only_there(name: str, quiet_trainer: TrainerMaker) -> None:
    given, flags = MOMENTS[name]
    schedule = {"observe_stop": None, "freeze_batch_norm": None, **given}
    phases = Phases()
    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, schedule=schedule, verbose=0), epochs=3, more=[phases])
    column = {"observe": 0, "quantize": 1, "freeze": 2}[name.split("_", maxsplit=1)[0]]
    assert [int(phase[column]) for phase in phases.phases] == flags
    others = [phase[:column] + phase[column + 1 :] for phase in phases.phases]
    assert len(set(others)) == 1, "one field moves one flag"


def test_frozen_ranges_and_batch_norms_stand_still(quiet_trainer: TrainerMaker) -> None:
    phases = Phases()
    schedule = {"observe_stop": "epoch 1", "freeze_batch_norm": "epoch 2"}
    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, schedule=schedule, verbose=0), epochs=3, more=[phases])
    assert phases.ranges[3] == phases.ranges[11]
    assert phases.ranges[2] != phases.ranges[3]
    assert torch.equal(phases.norms[7], phases.norms[11])
    assert not torch.equal(phases.norms[6], phases.norms[7])


class AroundValidation(Callback):
    """Compares the ranges before and after the sanity check and every validation."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.compared = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = quantizer_state(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert quantizer_state(pl_module) == self.before
        if trainer.sanity_checking:
            assert all(value["low"] is None for value in self.before.values())
        self.compared += 1


def test_validation_and_sanity_check_move_no_range(quiet_trainer: TrainerMaker) -> None:
    around = AroundValidation()
    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, verbose=0), epochs=2, more=[around])
    assert around.compared == 3


def test_the_sanity_check_sees_the_float_model_bit_for_bit(quiet_trainer: TrainerMaker) -> None:
    class Sanity(Callback):
        out: Tensor

        def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            Sanity.out = evaluate(pl_module)
            pl_module.train()

    model = Lit()
    expected = evaluate(copy.deepcopy(model))
    fit(quiet_trainer, model, QuantFusionCallback([{"op_types": ["Conv2d"], "target_names": ["weight"]}]), more=[Sanity()])
    assert torch.equal(Sanity.out, expected)


def test_a_run_of_unknown_length_says_that_shares_never_come(quiet_trainer: TrainerMaker) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="the length of this run is unknown"):
        fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, verbose=0), epochs=-1, more=[Stop()], min_steps=1)


# -- checkpoints ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_is_bitwise(optimizer: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    schedule = {"observe_stop": "epoch 3", "freeze_batch_norm": "epoch 2"}

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Trainer, Lit, QuantFusionCallback]:
        torch.manual_seed(0)
        model, callback = Lit(optimizer=optimizer), QuantFusionCallback(FUSED, schedule=schedule, verbose=0)
        trainer = fit(quiet_trainer, model, callback, epochs, ckpt_path=ckpt_path)
        return trainer, model, callback

    _, straight, reference = run(4)
    run(2)[0].save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, callback = run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert quantizer_state(straight) == quantizer_state(resumed)
    assert reference.deployed_model is not None
    assert callback.deployed_model is not None
    assert torch.equal(reference.deployed_model(X), callback.deployed_model(X))


class Scripted(Lit):
    """Logs a metric that says which epoch is best."""

    scores = (0.3, 0.1, 0.2)

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.scores[self.current_epoch])


def keeper(tmp_path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", **options)


@pytest.mark.parametrize("source", ["best", "last"])
def test_the_best_checkpoint_is_converted_unless_last_is_asked_for(
    source: Any, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    model, callback = Scripted(), QuantFusionCallback(FUSED, source=source, verbose=0)
    options: dict[str, Any] = {"enable_checkpointing": True, "more": [keeper(tmp_path)], "num_sanity_val_steps": 0}
    trainer = fit(quiet_trainer, model, callback, 3, **options)
    assert callback.deployed_model is not None
    last = evaluate(model)
    (best,) = trainer.test(model, loader(seed=1), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert torch.equal(callback.deployed_model(X), evaluate(model) if source == "best" else last)
    if source == "best":
        assert isinstance(callback.deployed_model, LightningModule)
        (deployed,) = quiet_trainer().test(callback.deployed_model, loader(seed=1), verbose=False)
        assert deployed == best


def test_best_skips_checkpoints_from_before_quantization(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(FUSED, schedule={"quantize_start": "epoch 2"}, verbose=0)
    options: dict[str, Any] = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    model = Scripted()
    with pytest.warns(UserWarning, match="the best, of epoch 1, was saved before .* so that of epoch 2 is converted. Let quant"):
        fit(quiet_trainer, model, callback, 3, more=[keeper(tmp_path, save_top_k=-1)], **options)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model)), "epoch 2 is the only quantized one"


def test_best_without_our_state_falls_back_to_last_aloud(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(FUSED, schedule={"quantize_start": "epoch 2"}, verbose=0)
    model = Scripted()
    said = r"monitor='score'\) the best, of epoch 1, was saved before everything was quantized or masked, so the last weights"
    with pytest.warns(UserWarning, match=said):
        fit(quiet_trainer, model, callback, 3, more=[keeper(tmp_path)], enable_checkpointing=True, num_sanity_val_steps=0)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))


def test_state_is_plain(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, Lit(), callback)
    state = callback.state_dict()
    assert state["config_list"] == [{**FUSED[0], "fuse_names": [list(group) for group in FUSED[0]["fuse_names"]]}]
    assert set(state["quantizers"]) == {"conv1._input_", "conv1._output_", "conv2._output_"}
    assert state["phase"]["quantize"] is True


# -- other lives ---------------------------------------------------------------------------------------------------------------


def test_fit_twice_goes_on_where_it_was(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, model, callback)
    first, ranges = callback.deployed_model, quantizer_state(model)
    fit(quiet_trainer, model, callback, 1, limit_train_batches=1, num_sanity_val_steps=0)
    second = quantizer_state(model)
    low, high = ranges["conv1._output_"]["high"], second["conv1._output_"]["high"]
    assert low is not None
    assert high is not None
    assert 0 < abs(high - low) <= 0.05 * abs(low), "one step of the moving average, not a fresh start"
    assert callback.deployed_model is not first
    assert len(prepared_groups(model)) == 3


def test_a_second_fit_with_another_config_begins_anew(quiet_trainer: TrainerMaker) -> None:
    model = Lit()
    fit(quiet_trainer, model, QuantFusionCallback(FUSED, verbose=0))
    callback = QuantFusionCallback([{"op_names": ["fc"]}], verbose=0)
    fit(quiet_trainer, model, callback)
    assert list(prepared_groups(model)) == ["fc"]
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))


def test_another_callback_goes_on_with_the_ranges_in_a_run_of_its_own(quiet_trainer: TrainerMaker) -> None:
    lsq: Any = [{**FUSED[0], "method": "lsq"}]
    model, first, second = Lit(), QuantFusionCallback(lsq, verbose=0), QuantFusionCallback(lsq, verbose=0)
    fit(quiet_trainer, model, first)
    scales = {name: one.detach().clone() for name, one in learned_parameters(model).items()}
    seen: list[bool] = []

    class AtStart(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(all(torch.equal(scales[name], one) for name, one in learned_parameters(pl_module).items()))

    fit(quiet_trainer, model, second, more=[AtStart()])
    assert seen == [True]
    assert second.state_dict()["run"] not in ("", first.state_dict()["run"])
    assert second.deployed_model is not None


def test_another_callback_calibrates_a_model_that_is_prepared(quiet_trainer: TrainerMaker) -> None:
    """As when a cell of a notebook is run again."""
    model = Lit()
    for _ in range(2):
        callback = QuantFusionCallback("int8", verbose=0)
        quiet_trainer(max_epochs=0, callbacks=[callback]).fit(model, loader(), loader(seed=1))
        assert callback.deployed_model is not None
        assert torch.equal(callback.deployed_model(X), evaluate(model))


@pytest.mark.parametrize("kind", ["lock", "losses", "generator"])
def test_what_cannot_be_copied_is_shared_and_named(kind: str, quiet_trainer: TrainerMaker) -> None:
    class Keeps(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Any = {"lock": threading.Lock(), "losses": [], "generator": (i for i in range(3))}[kind]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if kind == "losses":
                self.kept.append(loss)
            return loss

    model, callback = Keeps(), QuantFusionCallback(FUSED, verbose=0)
    with pytest.warns(UserWarning, match="kept cannot be copied; the deployed model shares that with the trained one"):
        fit(quiet_trainer, model, callback)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))


class InWorkers(Dataset[tuple[Tensor, Tensor]]):
    """Can be read in a worker alone, as with a file that it opens."""

    handle: Any = None

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.handle[index], torch.tensor(index % 4)


def opened(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.handle = torch.randn(32, 3, 8, 8)  # type: ignore[attr-defined]


class AtOnce(Dataset[tuple[Tensor, Tensor]]):
    """Gives whole batches of items."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(3, 8, 8), torch.tensor(index % 4)) for index in indices]


def test_data_that_only_its_loader_can_read(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    data = DataLoader(InWorkers(), batch_size=8, num_workers=1, worker_init_fn=opened)
    fit(quiet_trainer, Lit(), callback, data=data)
    assert "the data cannot be read outside its loader: TypeError: 'NoneType'" in str(callback.plan)
    assert callback.deployed_model is not None


def test_data_that_comes_in_batches(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, Lit(), callback, data=DataLoader(AtOnce(), batch_size=8))
    assert "traced" not in str(callback.plan)
    assert callback.deployed_model is not None


def test_a_step_that_takes_any_arguments(quiet_trainer: TrainerMaker) -> None:
    class AnyNumber(Lit):
        def training_step(self, *args: Any) -> Tensor:
            batch, batch_idx = args
            return super().training_step(batch, batch_idx)

    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, AnyNumber(), callback)
    assert "traced" not in str(callback.plan)


def test_a_failed_second_fit_leaves_the_first_one_in_place(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, model, callback)
    ranges, expected = quantizer_state(model), evaluate(model)
    callback.config_list = [{"op_names": ["conv9"]}]
    with pytest.raises(ConfigError, match="op_names 'conv9' matches no module"):
        fit(quiet_trainer, model.train(), callback)
    assert quantizer_state(model) == ranges
    assert torch.equal(evaluate(model), expected)


def test_a_failed_resume_leaves_a_float_model(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    fit(quiet_trainer, Lit(), QuantFusionCallback([{"op_names": ["fc"]}], verbose=0)).save_checkpoint(tmp_path / "other.ckpt")
    model = Lit()
    with pytest.raises(ConfigError, match="under another config_list"):
        fit(quiet_trainer, model, QuantFusionCallback(FUSED, verbose=0), 2, ckpt_path=tmp_path / "other.ckpt")
    assert not prepared_groups(model)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_best_checkpoint_of_another_fit_is_not_taken(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Worse(Scripted):
        scores = (0.9, 0.8, 0.7)

    callback, saver = QuantFusionCallback(FUSED, verbose=0), keeper(tmp_path)
    options: dict[str, Any] = {"enable_checkpointing": True, "more": [saver], "num_sanity_val_steps": 0}
    fit(quiet_trainer, Scripted(), callback, 3, **options)
    other = Worse()
    with pytest.warns(UserWarning, match="so the last weights are converted"):
        fit(quiet_trainer, other, callback, 3, **{**options, "more": [saver]})
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(other))


class LooksInside(Lit):
    """Reads a fused layer's dtype: in the deployed copy that is int8."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.get_submodule("conv1").weight.dtype))  # type: ignore[arg-type]


def test_a_forward_that_looks_into_its_layers_is_found_out(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    with pytest.raises(ParityError, match=r"the converted model (gives other numbers|fails).*leave that layer out"):
        fit(quiet_trainer, LooksInside(), callback)
    assert callback.deployed_model is None


@pytest.mark.parametrize("called", [F.gelu, F.silu, F.hardswish, F.leaky_relu, torch.tanh, F.relu])
def test_an_activation_called_as_a_function_runs_once(
    called: Callable[[Tensor], Tensor], quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    class Calls(Lit):
        def forward(self, x: Tensor) -> Tensor:
            layers: Any = self
            out: Tensor = layers.fc(layers.pool(called(layers.conv2(called(layers.conv1(x))))).flatten(1))
            return out

    callback, model = QuantFusionCallback("int8", verbose=0, export=[".pt2", ".onnx"], dirpath=tmp_path), Calls()
    fit(quiet_trainer, model, callback)
    x = next(iter(loader(seed=1)))[0]
    deployed = callback.deployed_model
    assert deployed is not None
    with torch.no_grad():
        assert torch.equal(deployed(x), model.eval()(x))
        assert torch.equal(load_deployed(tmp_path / "model.pt2")(x), deployed(x))


def test_a_forward_that_needs_its_trainer_is_converted_unchecked(quiet_trainer: TrainerMaker) -> None:
    class NeedsTrainer(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.trainer.current_epoch

    callback = QuantFusionCallback(FUSED, verbose=0)
    with pytest.warns(UserWarning, match="the conversion was not checked: a copy of the trained model fails outside the Trainer"):
        fit(quiet_trainer, NeedsTrainer(), callback)
    assert callback.deployed_model is not None


class Lying(Lit):
    """Computes something else once it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 1 if torch.compiler.is_exporting() else out


def test_two_failed_formats_are_both_said(quiet_trainer: TrainerMaker) -> None:
    with (
        pytest.raises(ParityError, match=r"model\.onnx: output 0 differs"),
        pytest.warns(UserWarning, match=r"model\.pt2: output 0 differs"),
    ):
        fit(quiet_trainer, Lying(), QuantFusionCallback(FUSED, export=[".onnx", ".pt2"], verbose=0))


def test_hooks_on_members_are_named_in_the_plan(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    model.get_submodule("relu1").register_forward_hook(lambda m, args, out: None)
    with pytest.warns(UserWarning, match="hooks on relu1 are not in the deployed copy"):
        fit(quiet_trainer, model, callback)
    assert "hooks on relu1 run while training and are not deployed" in str(callback.plan)


class Toggling(Lit):
    """Manual optimization as Lightning's GAN example has it: the first thing a step does is to toggle an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)  # type: ignore[arg-type]
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        self.untoggle_optimizer(optimizer)  # type: ignore[arg-type]


def test_manual_optimization_with_toggled_parameters(quiet_trainer: TrainerMaker) -> None:
    model, callback = Toggling(), QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, model, callback)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert callback.deployed_model is not None


def test_a_stream_that_runs_once_loses_no_batch(quiet_trainer: TrainerMaker) -> None:
    class Once(IterableDataset[tuple[Tensor, Tensor]]):
        def __init__(self) -> None:
            self.items = iter([(X[0], torch.tensor(1))] * 16)

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> tuple[Tensor, Tensor]:
            return next(self.items)

    phases = Phases()
    callback = QuantFusionCallback([{"op_types": ["Linear"]}], schedule={"observe_stop": None}, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback, phases]).fit(Lit(), DataLoader(Once(), batch_size=4), loader(seed=1))
    assert len(phases.phases) == 4
    assert "the data is a stream that runs once" in str(callback.plan)


def test_another_model_with_the_same_callback(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, Lit(), callback)
    other = Lit()
    fit(quiet_trainer, other, callback)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(other))


def test_a_swapped_model_works_under_a_trainer_without_the_callback(quiet_trainer: TrainerMaker) -> None:
    model = Lit()
    fit(quiet_trainer, model, QuantFusionCallback(FUSED, verbose=0))
    quiet_trainer(max_epochs=1).fit(model, loader(), loader(seed=1))
    predictions = quiet_trainer().predict(model, DataLoader(TensorDataset(X), batch_size=8))
    assert predictions is not None
    assert torch.equal(torch.as_tensor(predictions[0]), evaluate(model))


@pytest.mark.parametrize(("options", "calibration"), [({"max_epochs": 0}, 0), ({"limit_train_batches": 0}, None)], ids=str)
def test_nothing_trained_nor_calibrated_is_nothing_converted_and_said(
    options: dict[str, Any], calibration: int | None, quiet_trainer: TrainerMaker
) -> None:
    callback = QuantFusionCallback(FUSED, example_input=X, calibration=calibration, verbose=0)
    with pytest.warns(UserWarning, match="no quantized training step was run, so nothing was converted"):
        quiet_trainer(**{"max_epochs": 1, **options}, callbacks=[callback]).fit(Lit(), loader(), loader(seed=1))
    assert callback.deployed_model is None
    with pytest.raises(ConfigError, match=r"no range was observed for conv1\._input_"):
        callback.convert(Lit() if callback._module is None else callback._module)


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")
def test_a_model_in_eval_mode_is_named(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    with (
        pytest.warns(UserWarning, match=r"no range was observed for conv1\._input_, .* \(in eval mode while training"),
        pytest.warns(UserWarning, match=r"a whole epoch gave conv1\._input_, .* no range.*put these layers in train mode"),
    ):
        fit(quiet_trainer, Lit().eval(), callback, 2)
    assert callback.deployed_model is None


def test_fast_dev_run(quiet_trainer: TrainerMaker) -> None:
    callback = QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, Lit(), callback, fast_dev_run=True)
    assert callback.deployed_model is not None


def test_convert_by_hand_after_an_exception(quiet_trainer: TrainerMaker) -> None:
    class Crash(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 1:
                raise RuntimeError("power cut")

    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(quiet_trainer, model, callback, more=[Crash()])
    deployed = callback.convert(model)
    assert deployed is callback.deployed_model
    assert torch.equal(deployed(X), evaluate(model))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision: Any, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    fit(quiet_trainer, model, callback, precision=precision)
    assert callback.deployed_model is not None
    assert all(isinstance(value["high"], float) for value in quantizer_state(model).values())
    x = X.double() if precision == "64-true" else X
    with torch.no_grad():
        assert torch.equal(callback.deployed_model(x), evaluate(model, x))


# -- export at the end of fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [".pt2", [".pt2"], {".pt2": {"atol": 1e-5}}], ids=str)
def test_export_forms(export: Any, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(FUSED, export=export, dirpath=tmp_path / "out", verbose=0)
    fit(quiet_trainer, Lit(), callback)
    assert callback.deployed_model is not None
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert torch.equal(load_deployed(tmp_path / "out" / "model.pt2")(X), callback.deployed_model(X))


def test_a_trial_run_overwrites_no_file(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"a good one")
    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, export=".pt2", verbose=0), fast_dev_run=True)
    assert (tmp_path / "model.pt2").read_bytes() == b"a good one"


def test_one_failed_format_does_not_take_the_others_along(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    export: dict[str, dict[str, Any]] = {".onnx": {}, ".pt2": {"atol": 1e6}}
    with pytest.raises(ParityError, match=r"model\.onnx: output 0 differs"):
        fit(quiet_trainer, Lying(), QuantFusionCallback(FUSED, export=export, verbose=0))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_export_goes_to_the_trainers_folder_by_default(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    fit(quiet_trainer, Lit(), QuantFusionCallback(FUSED, export=".pt2", verbose=0))
    assert (tmp_path / "model.pt2").is_file()
