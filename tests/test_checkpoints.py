# SPDX-License-Identifier: Apache-2.0
"""Owns what stands in checkpoints: any of them resumes or is tested, in this process or another, with the callback or without."""

from __future__ import annotations

import copy
import gzip
import io
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from test_callback import Inner, Scripted, evaluate, fit, keeper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from toys import FUSED, Lit, fingerprint, loader

from lightning_quant import ConfigError, QuantFusionCallback
from lightning_quant.checkpoints import differences
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
LEARNED: list[dict[str, Any]] = [{**FUSED[0], "method": "lsq"}]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def quiet(config_list: Any = FUSED, **options: Any) -> QuantFusionCallback:
    return QuantFusionCallback(config_list, verbose=0, **options)


def saved(make: TrainerMaker, path: Path, config_list: Any = FUSED, model: LightningModule | None = None, **options: Any) -> Lit:
    """A model that was fitted for an epoch, with its checkpoint at `path`."""
    model = model or Lit()
    fit(make, model, quiet(config_list, **options)).save_checkpoint(path)
    return model  # type: ignore[return-value]


# -- an evaluation in a fresh process, as it were: a new Trainer, a new model, a new callback -----------------------------


def run(trainer: Trainer, stage: str, model: LightningModule, path: Path | None) -> Any:
    """What Trainer.validate, test or predict gives on the data of seed 1."""
    options: dict[str, Any] = {} if stage == "predict" else {"verbose": False}
    return getattr(trainer, stage)(model, loader(seed=1), ckpt_path=path, **options)


def alike(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "config_list", [FUSED, LEARNED, ["int8", {"op_types": ["Linear"], "observer": "percentile:99"}]], ids=str
)
def test_a_new_model_shows_what_the_trained_one_shows(
    stage: str, config_list: Any, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    trained = saved(quiet_trainer, tmp_path / "a.ckpt", config_list)
    expected = run(quiet_trainer(), stage, trained, None)
    torch.manual_seed(1)
    other, callback = Lit(), quiet(config_list)
    assert alike(run(quiet_trainer(callbacks=[callback]), stage, other, tmp_path / "a.ckpt"), expected)
    assert quantizer_state(other).keys() == quantizer_state(trained).keys()
    assert torch.equal(callback.convert(other)(X), evaluate(trained))

    with pytest.warns(UserWarning, match=r"add the following callbacks: \['QuantFusionCallback'\]"):
        float_result = run(quiet_trainer(), stage, Lit(), tmp_path / "a.ckpt")
    twin = Lit()
    twin.load_state_dict(trained.state_dict())
    assert alike(float_result, run(quiet_trainer(), stage, twin, None))
    assert not alike(float_result, expected)


def test_a_model_that_was_tested_can_be_fitted(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    saved(quiet_trainer, tmp_path / "a.ckpt", LEARNED)
    model, callback = Lit(), quiet(LEARNED)
    run(quiet_trainer(callbacks=[callback]), "test", model, tmp_path / "a.ckpt")
    before = {name: float(value.detach().mean()) for name, value in learned_parameters(model).items()}
    fit(quiet_trainer, model, callback)
    after = {name: float(value.detach().mean()) for name, value in learned_parameters(model).items()}
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before), "what was attached in inference mode is trained"


def test_the_module_that_training_called_is_recorded_again(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Tested(Inner):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("sum", self.net(batch[0]).double().sum())

    config = [{"op_types": ["Conv2d", "Linear"]}]
    trained = Tested()
    trainer = quiet_trainer(max_epochs=1, callbacks=[quiet(config)])
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = run(quiet_trainer(), "test", trained, None)
    callback = quiet(config)
    assert run(quiet_trainer(callbacks=[callback]), "test", Tested(), tmp_path / "a.ckpt") == expected
    assert "recorded from 'net'" in str(callback.plan)


def test_an_evaluation_that_cannot_be_recorded_says_what_to_do(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Partial(Lit):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.get_submodule("conv1")(batch[0])

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise TypeError("no proxies")
            return super().forward(x)

    saved(quiet_trainer, tmp_path / "a.ckpt", FUSED, Partial())
    model = Partial()
    before = fingerprint(model)[: len(list(model.modules()))]
    with pytest.raises(ConfigError, match=r"attached for test: .*in another way than training did: give example_input"):
        run(quiet_trainer(callbacks=[quiet()]), "test", model, tmp_path / "a.ckpt")
    assert not prepared_groups(model)
    assert [row[:2] for row in fingerprint(model)[: len(before)]] == [row[:2] for row in before]
    given = quiet(FUSED, example_input=X)
    run(quiet_trainer(callbacks=[given]), "test", model, tmp_path / "a.ckpt")
    assert prepared_groups(model)


def test_a_checkpoint_of_an_unquantized_phase_is_said(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no quantized training step was run"):
        trained = saved(quiet_trainer, tmp_path / "a.ckpt", schedule={"quantize_start": "epoch 3"})
    with pytest.warns(UserWarning, match="from before everything was quantized; test shows it so"):
        result = run(quiet_trainer(callbacks=[quiet()]), "test", Lit(), tmp_path / "a.ckpt")
    assert result == run(quiet_trainer(), "test", trained, None)


class Parts(Lit):
    """Predicts by its parts, where the other steps call the whole."""

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.get_submodule("relu1")(self.get_submodule("bn1")(self.get_submodule("conv1")(batch[0])))
        return features.mean((2, 3))  # type: ignore[no-any-return]


def test_a_stage_that_calls_the_model_otherwise_is_attached_by_tracing(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    trained = saved(quiet_trainer, tmp_path / "a.ckpt", FUSED, Parts())
    callback = quiet()
    found = run(quiet_trainer(callbacks=[callback]), "predict", Parts(), tmp_path / "a.ckpt")
    assert alike(found, run(quiet_trainer(), "predict", trained, None))
    assert "predict_step does not call Parts" in str(callback.plan)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_checkpoint_without_our_state_is_said_to_be_shown_in_float(
    fitted: bool, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    plain = quiet_trainer(max_epochs=1)
    plain.fit(Lit(), loader(), loader(seed=1))
    plain.save_checkpoint(tmp_path / "float.ckpt")
    model, callback = Lit(), quiet()
    if fitted:
        fit(quiet_trainer, model, callback)
    shown = "its weights with the ranges of the last fit" if fitted else "the float model"
    with pytest.warns(UserWarning, match=f"nothing of this callback in .*float.ckpt: test shows {shown}"):
        run(quiet_trainer(callbacks=[callback]), "test", model, tmp_path / "float.ckpt")


def test_an_early_checkpoint_is_said_to_be_one_in_the_fitting_process_too(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, callback = Lit(), quiet(schedule={"quantize_start": "epoch 1"})
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(quiet_trainer, model, callback, 2, more=[saver], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="from before everything was quantized; test shows it so"):
        run(trainer, "test", model, tmp_path / "epoch=0.ckpt")


# -- checkpoints of weights alone --------------------------------------------------------------------------------------------


class OwnHook(Scripted):
    """Has a hook of its own, which must still be called, and called once."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = checkpoint.get("mine", 0) + 1


@pytest.mark.parametrize("config_list", [FUSED, LEARNED], ids=["qat", "lsq"])
def test_the_best_weights_meet_their_own_ranges(config_list: Any, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, callback = OwnHook(), quiet(config_list)
    before = sorted(vars(model))
    options: dict[str, Any] = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer = fit(quiet_trainer, model, callback, 3, more=[keeper(tmp_path, save_weights_only=True)], **options)
    assert "on_save_checkpoint" not in vars(model)
    assert sorted(vars(model)) == before or set(vars(model)) - set(before) <= {"_lightning_quant_owner"}
    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert file["mine"] == 1
    assert set(file["callbacks"]) == {"QuantFusionCallback"}
    assert "optimizer_states" not in file
    trainer.test(model, loader(seed=1), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model)), "the best weights with the ranges of their epoch"
    other = OwnHook()
    run(quiet_trainer(callbacks=[quiet(config_list)]), "test", other, tmp_path / "epoch=1.ckpt")
    assert torch.equal(evaluate(other), evaluate(model))


def test_a_hook_of_the_instance_is_put_back(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, calls = Scripted(), []
    hook = model.__dict__["on_save_checkpoint"] = lambda checkpoint: calls.append(sorted(checkpoint))

    class Crash(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert pl_module.__dict__["on_save_checkpoint"] is not hook
            copy.deepcopy(pl_module.on_save_checkpoint)
            trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(quiet_trainer, model, quiet(), more=[Crash()])
    assert model.__dict__["on_save_checkpoint"] is hook
    assert len(calls) == 1
    assert "callbacks" in torch.load(tmp_path / "w.ckpt", weights_only=True)


class Renames(Scripted):
    """Saves its weights under other names, and takes them back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"m.{key}": value for key, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {key.removeprefix("m."): value for key, value in checkpoint["state_dict"].items()}


class Zipped(TorchCheckpointIO):
    """Writes files that torch.load cannot read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).write_bytes(gzip.compress(buffer.getvalue()))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(io.BytesIO(gzip.decompress(Path(path).read_bytes())), weights_only=False)
        return content


@pytest.mark.parametrize("how", ["hooks", "plugin", "memory"])
def test_the_best_checkpoint_is_read_as_the_trainer_reads_it(how: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, callback = Renames() if how == "hooks" else Scripted(), quiet()
    folder = "memory://best" if how == "memory" else tmp_path
    saver = ModelCheckpoint(folder, filename="{epoch}", monitor="score")
    options: dict[str, Any] = {"plugins": [Zipped()]} if how == "plugin" else {}
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[callback, saver], enable_checkpointing=True, num_sanity_val_steps=0, **options
    )
    trainer.fit(model, loader(), loader(seed=1))
    last = evaluate(model)
    run(trainer, "test", model, "best")  # type: ignore[arg-type]
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))
    assert not torch.equal(last, evaluate(model))


def test_a_checkpoint_that_cannot_be_read_is_named(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (tmp_path / "epoch=1.ckpt").write_bytes(b"no checkpoint")

    model, callback = Scripted(), quiet()
    options: dict[str, Any] = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    with (
        pytest.warns(UserWarning, match=r"epoch=1.ckpt cannot be read: \w+Error: "),
        pytest.warns(UserWarning, match="so the last weights are converted"),
    ):
        fit(quiet_trainer, model, callback, 3, more=[Breaks(), keeper(tmp_path)], **options)
    assert callback.deployed_model is not None
    assert torch.equal(callback.deployed_model(X), evaluate(model))


def test_a_callback_that_thins_checkpoints_may_stand_before_ours(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Thin(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
            checkpoint.pop("optimizer_states", None)

    model = Lit()
    trainer = quiet_trainer(max_epochs=1, callbacks=[Thin(), quiet(LEARNED)])
    trainer.fit(model, loader(), loader(seed=1))
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    other = Lit()
    run(quiet_trainer(callbacks=[quiet(LEARNED)]), "test", other, tmp_path / "thin.ckpt")
    assert torch.equal(evaluate(other), evaluate(model))


# -- another config_list ---------------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[Any, str]] = {
    "dtype": (
        [{**FUSED[0], "quant_dtype": "int4"}],
        r"config_list\[0\]\['quant_dtype'\]: nothing in the checkpoint, 'int4' here",
    ),
    "method": ([{**FUSED[0], "method": "ptq"}], r"config_list\[0\]\['method'\]: nothing in the checkpoint, 'ptq' here"),
    "layers": ([{"op_names": ["fc"]}], r"config_list\[0\]\['op_types'\]: \['Conv2d', 'Linear'\] in the checkpoint, nothing here"),
    "one more": ([*FUSED, {"op_names": ["fc"], "quant_dtype": "int4"}], r"config_list\[1\]: nothing in the checkpoint, \{"),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_of_another_config_is_refused_with_the_difference(
    name: str, stage: str, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    saved(quiet_trainer, tmp_path / "a.ckpt")
    config, text = OTHER[name]
    model, trainer = Lit(), quiet_trainer(max_epochs=2, callbacks=[quiet(config)])
    data = [loader(seed=seed) for seed in ((0, 1) if stage == "fit" else (1,))]
    with pytest.raises(ConfigError, match=rf"saved under another config_list: .*{text}.*load only its weights"):
        getattr(trainer, stage)(model, *data, ckpt_path=tmp_path / "a.ckpt")
    assert not prepared_groups(model)


def test_other_settings_are_named(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    saved(quiet_trainer, tmp_path / "a.ckpt", settings={"Linear": {"weight": {"quant_dtype": "int4"}}})
    with pytest.raises(ConfigError, match=r"settings: \{'Linear'.* in the checkpoint, nothing here"):
        fit(quiet_trainer, Lit(), quiet(), 2, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.usefixtures("own_registries")
def test_what_a_registry_changed_is_named(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    from lightning_quant import QuantizationSetting

    saved(quiet_trainer, tmp_path / "a.ckpt", "int8")
    QuantizationSetting.register("Linear", {"_input_": {}, "weight": {"quant_dtype": "int4"}, "_output_": {}})
    with pytest.raises(
        ConfigError, match=r"under another plan: plan\['fc.weight'\]: 'int8 .*' in the checkpoint, 'int4 .*' here"
    ):
        fit(quiet_trainer, Lit(), quiet("int8"), 2, ckpt_path=tmp_path / "a.ckpt")


def test_other_words_for_the_same_decisions_are_no_difference(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    saved(quiet_trainer, tmp_path / "a.ckpt")
    same = [*FUSED, {"op_names": ["fc"], "granularity": "default"}]
    fit(quiet_trainer, Lit(), quiet(same), 2, ckpt_path=tmp_path / "a.ckpt")


def test_differences_of_nested_data() -> None:
    before = [{"a": [1, 2], "b": {"c": "x"}}]
    now = [{"a": [1, 3, 4], "b": {"d": "x"}}, "int8"]
    assert list(differences(before, now, "l")) == [
        "l[0]['a'][1]: 2 in the checkpoint, 3 here",
        "l[0]['a'][2]: nothing in the checkpoint, 4 here",
        "l[0]['b']['c']: 'x' in the checkpoint, nothing here",
        "l[0]['b']['d']: nothing in the checkpoint, 'x' here",
        "l[1]: nothing in the checkpoint, 'int8' here",
    ]
    assert not list(differences(now, copy.deepcopy(now), "l"))


@pytest.mark.parametrize("other", ["dtype", "method"])
def test_a_second_fit_with_other_decisions_begins_anew(other: str, quiet_trainer: TrainerMaker) -> None:
    """Also where names and shapes of the ranges agree, so that they would load."""
    model = Lit()
    fit(quiet_trainer, model, quiet())
    with pytest.warns(UserWarning, match="no quantized training step was run"):
        fit(quiet_trainer, model, quiet(OTHER[other][0], schedule={"quantize_start": "epoch 9", "observe_start": "epoch 9"}))
    low = quantizer_state(model)["conv1._output_"]["low"]
    assert (low is None) if other == "dtype" else (low is not None), "only ptq calibrates"


# -- float checkpoints, and ours without the callback ---------------------------------------------------------------------


class TwoGroups(Lit):
    """Has two parameter groups, with what is learned in the first: the numbers of what follows it move."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        groups = [{"params": parameters[:3], "weight_decay": 0.0}, {"params": parameters[3:], "weight_decay": 1e-3}]
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_float_checkpoint_is_resumed_with_learned_scales(optimizer: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    float_trainer = quiet_trainer(max_epochs=1)
    start = TwoGroups(optimizer=optimizer)
    float_trainer.fit(start, loader(), loader(seed=1))
    float_trainer.save_checkpoint(tmp_path / "float.ckpt")
    kept = torch.load(tmp_path / "float.ckpt", weights_only=True)["optimizer_states"][0]["state"]

    class AtStart(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if not hasattr(self, "groups"):
                self.states = {id(p): copy.deepcopy(s) for p, s in trainer.optimizers[0].state.items()}
                self.groups = [list(group["params"]) for group in trainer.optimizers[0].param_groups]

    model, seen, callback = TwoGroups(optimizer=optimizer), AtStart(), quiet(LEARNED)
    fit(quiet_trainer, model, callback, 2, more=[seen], ckpt_path=tmp_path / "float.ckpt")
    own = [self.states[id(p)] for self in [seen] for p in model.parameters()]
    for now, before in zip(own, kept.values(), strict=True):
        assert now.keys() == before.keys()
        assert all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(before[key])) for key in now)
    learned = {id(p) for p in learned_parameters(model).values()}
    assert learned <= {id(p) for group in seen.groups for p in group}
    assert callback.deployed_model is not None


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("module", [Lit, TwoGroups])
def test_ours_goes_on_without_the_callback(
    module: type[Lit], optimizer: str, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """The optimizers' states in the file are those of the model's own parameters, as a float run would have saved them."""
    trained = saved(quiet_trainer, tmp_path / "a.ckpt", LEARNED, module(optimizer=optimizer))
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = file["optimizer_states"]
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == len(list(trained.parameters()))
    plain = module(optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(plain, loader(), loader(seed=1), ckpt_path=tmp_path / "a.ckpt")
    twin = module(optimizer=optimizer)
    twin.load_state_dict(file["state_dict"])
    (by_hand,) = [twin.configure_optimizers()]
    by_hand.load_state_dict(state)
    for batch in loader():
        by_hand.zero_grad()
        torch.nn.functional.cross_entropy(twin.train()(batch[0]), batch[1]).backward()
        by_hand.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), twin.state_dict().values(), strict=True))


def test_an_optimizer_with_a_state_of_its_own_form_is_left_alone(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"packed": super().state_dict()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict["packed"])

    class Model(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Odd(self.parameters(), lr=0.05, momentum=0.9)

    straight = Model()
    torch.manual_seed(3)
    fit(quiet_trainer, straight, quiet(LEARNED), 2)
    torch.manual_seed(0)
    first = Model()
    first.load_state_dict(straight.state_dict())
    fit(quiet_trainer, first, quiet(LEARNED)).save_checkpoint(tmp_path / "a.ckpt")
    fit(quiet_trainer, Model(), quiet(LEARNED), 2, ckpt_path=tmp_path / "a.ckpt")


# -- bitwise ------------------------------------------------------------------------------------------------------------------


def everything(trainer: Trainer, model: LightningModule) -> list[Any]:
    """Weights, buffers, ranges, learned numbers and the optimizer's memory."""
    numbers: list[Any] = [value.clone() for value in model.state_dict().values()]
    numbers += [
        torch.as_tensor(v) for state in quantizer_state(model).values() for v in state.values() if isinstance(v, float | Tensor)
    ]
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            memory = [optimizer.state[parameter] for parameter in group["params"]]
            numbers += [torch.as_tensor(value) for state in memory for value in state.values() if value is not None]
    return numbers


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("keys", [{}, {"method": "lsq"}, {"method": "lsq+"}, {"observer": "mse"}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resume_between_epochs_is_bitwise(
    optimizer: str, keys: dict[str, Any], quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    config_list = [{**FUSED[0], **keys}]
    schedule = {"observe_stop": "epoch 3", "freeze_batch_norm": "epoch 2"}

    def trained(epochs: int, path: Path | None = None) -> tuple[list[Any], QuantFusionCallback]:
        torch.manual_seed(0)
        model, callback = TwoGroups(optimizer=optimizer), quiet(config_list, schedule=schedule)
        trainer = fit(quiet_trainer, model, callback, epochs, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return everything(trainer, model), callback

    straight, reference = trained(4)
    trained(2)
    resumed, callback = trained(4, tmp_path / "2.ckpt")
    assert same(straight, resumed)
    assert reference.deployed_model is not None
    assert callback.deployed_model is not None
    assert torch.equal(reference.deployed_model(X), callback.deployed_model(X))


@pytest.mark.parametrize("config_list", [FUSED, LEARNED], ids=["qat", "lsq"])
def test_a_resume_in_mid_epoch_with_a_stateful_loader_is_bitwise(
    config_list: Any, quiet_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """The loader knows where it was; finding the example input in it must not move it."""

    def trained(steps: int, path: Path | None = None) -> list[Any]:
        torch.manual_seed(0)
        order = torch.Generator().manual_seed(5)
        model, saver = Lit(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        options: dict[str, Any] = {"enable_checkpointing": True, "max_steps": steps}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(exists and is not empty|mid-epoch|set_vital).*")
            data = StatefulDataLoader(loader(128).dataset, batch_size=8, shuffle=True, generator=order)
            trainer = fit(quiet_trainer, model, quiet(config_list), -1, more=[saver], data=data, ckpt_path=path, **options)
        return everything(trainer, model)

    straight = trained(12)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    trained(5)
    assert same(straight, trained(12, tmp_path / "step=5.ckpt"))


# -- the file -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_list", [FUSED, LEARNED, [{**FUSED[0], "observer": "mse"}]], ids=["qat", "lsq", "mse"])
def test_a_checkpoint_is_plain_data(config_list: Any, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model = saved(quiet_trainer, tmp_path / "a.ckpt", config_list)
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = file["callbacks"]["QuantFusionCallback"]
    assert state["version"] == 1
    assert state["config_list"] == [{**config_list[0], "fuse_names": [list(group) for group in FUSED[0]["fuse_names"]]}]
    assert set(state["quantizers"]) == set(quantizer_state(model))
    assert file["hyper_parameters"] == {"lr": 0.05, "optimizer": "sgd"}, "nothing of ours is passed to __init__"
    assert isinstance(Lit.load_from_checkpoint(tmp_path / "a.ckpt"), nn.Module)


def test_an_unknown_version_is_refused(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    saved(quiet_trainer, tmp_path / "a.ckpt")
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    file["callbacks"]["QuantFusionCallback"]["version"] = 7
    torch.save(file, tmp_path / "b.ckpt")
    with pytest.raises(ConfigError, match="the checkpoint's state is of version 7; this release reads version 1"):
        run(quiet_trainer(callbacks=[quiet()]), "test", Lit(), tmp_path / "b.ckpt")


def test_predictions_of_a_new_model_are_those_of_the_deployed_one(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, callback = Lit(), quiet()
    fit(quiet_trainer, model, callback).save_checkpoint(tmp_path / "a.ckpt")
    data = DataLoader(TensorDataset(X), batch_size=4)
    trainer = quiet_trainer(callbacks=[quiet()])
    found = trainer.predict(Lit(), data, ckpt_path=tmp_path / "a.ckpt")
    assert found is not None
    assert callback.deployed_model is not None
    assert torch.equal(torch.cat([torch.as_tensor(one) for one in found]), callback.deployed_model(X))


# -- a fresh process ---------------------------------------------------------------------------------------------------------


def in_a_process(path: Path, results: Any) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both: tuple[list[Callback], ...] = ([quiet(LEARNED)], [])
        found = [Trainer(callbacks=c, **options).test(Lit(), loader(seed=1), path, False) for c in both]
    results.put(found)


def test_a_fresh_process_gives_the_exact_loss(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model = saved(quiet_trainer, tmp_path / "a.ckpt", LEARNED)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=in_a_process, args=(tmp_path / "a.ckpt", results))
    process.start()
    quantized, plain = results.get()
    process.join()
    assert quantized == run(quiet_trainer(), "test", model, None)
    assert plain == run(quiet_trainer(), "test", Lit.load_from_checkpoint(tmp_path / "a.ckpt"), None)
    assert plain != quantized
