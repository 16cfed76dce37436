# SPDX-License-Identifier: Apache-2.0
"""Owns fits with a teacher: the same as with the loss written into the step; the teacher and the model stay what they were."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distils import (
    ENTRIES,
    IMAGE,
    ByHand,
    Distils,
    Make,
    added,
    assert_close,
    begun,
    by_layer,
    copied,
    fit,
    teacher_net,
    weights,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from toys import FUSED, Calls, Lit, Net, fingerprint

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.prepare import LEARNED, learned_parameters, restore_model

# -- fits, against the same loss written into the step -----------------------------------------------------------------------


class Lbfgs(Lit):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class HandLbfgs(ByHand):
    configure_optimizers = Lbfgs.configure_optimizers


def scaler() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))]


FITS: dict[str, tuple[Callable[[], dict[str, Any]], type[Lit], type[ByHand], float]] = {
    "plain": (dict, Lit, ByHand, 1e-5),
    "accumulated": (lambda: {"accumulate_grad_batches": 2}, Lit, ByHand, 1e-5),
    "clipped": (lambda: {"gradient_clip_val": 0.1}, Lit, ByHand, 1e-5),
    "bf16": (lambda: {"precision": "bf16-mixed"}, Lit, ByHand, 2e-3),
    "16 with a scaler": (lambda: {"plugins": scaler()}, Lit, ByHand, 2e-3),
    "64": (lambda: {"precision": "64-true"}, Lit, ByHand, 1e-5),
    "closures": (lambda: {"max_epochs": 1}, Lbfgs, HandLbfgs, 2e-4),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_that_with_the_loss_in_the_step(name: str, quiet_trainer: Make) -> None:
    options, kind, twin, tolerance = FITS[name]
    torch.manual_seed(0)
    model = kind()
    reference = twin.of(teacher_net())
    if name == "64":
        reference.__dict__["teacher"].double()
    callback = Distils(ENTRIES, teacher_net())
    fit(quiet_trainer, model, callback, **options())
    fit(quiet_trainer, reference, **options())
    assert_close(model, reference, rtol=tolerance, atol=tolerance)
    torch.manual_seed(0)
    alone = kind()
    fit(quiet_trainer, alone, **options())
    assert (weights(alone)["fc.weight"] - weights(model)["fc.weight"]).abs().max() > 10 * tolerance
    for losses in callback.losses:
        assert set(losses) == {"_output_", "pool._output_", "loss"}
        assert losses["loss"] == pytest.approx(losses["_output_"] + losses["pool._output_"], rel=1e-5)


def test_case_26_a_model_that_is_its_own_teacher(quiet_trainer: Make) -> None:
    """NNI's case 26: lambda 0.5, mse, the module of the same name; but the teacher is left as it was."""
    torch.manual_seed(0)
    model, teacher = Lit(), Lit().train()
    teacher.load_state_dict(model.state_dict())
    teacher.get_submodule("bn1").eval()
    before = fingerprint(teacher)
    entry = {"op_names": ["fc"], "target_names": ["_output_"], "lambda": 0.5, "link": "fc", "apply_method": "mse"}
    callback = Distils([entry], teacher)
    keys = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    fit(quiet_trainer, model, callback, max_epochs=2)
    assert fingerprint(teacher) == before  # classes, training flags, hooks, parameters, buffers
    assert [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()] == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "training_step" not in model.__dict__ and LEARNED not in model.__dict__

    class Twin(ByHand):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                wanted: Tensor = self.__dict__["teacher"](batch[0])
            found: Tensor = self(batch[0])
            return F.cross_entropy(found, batch[1]) + 0.5 * (found - wanted).square().mean()

    reference = Twin.of(teacher)
    fit(quiet_trainer, reference, max_epochs=2)
    assert_close(model, reference)
    assert callback.losses[-1]["fc._output_"] > 0


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_the_own_loss_may_weigh_less(quiet_trainer: Make) -> None:
    """NNI's origin_loss_lambda; and a step that returns a dict, or None."""

    class Dict(Lit):
        seen: list[Any] = []  # noqa: RUF012

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else {"loss": loss, "more": 3}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(outputs)

    class Twin(ByHand):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            own = F.cross_entropy(found := self(batch[0]), batch[1])
            with torch.no_grad():
                wanted = self.__dict__["teacher"](batch[0])
            return None if batch_idx == 1 else 0.25 * own + ((found - wanted) ** 2).mean()

    torch.manual_seed(0)
    model = Dict()
    reference = Twin.of(teacher_net())
    distillation = {"config_list": ["mse"], "origin_loss_lambda": 0.25}
    fit(quiet_trainer, model, Distils(distillation, teacher_net()), max_epochs=1)
    fit(quiet_trainer, reference, max_epochs=1)
    assert_close(model, reference)
    assert [set(outputs) for outputs in model.seen] == [{"loss", "more"}, set(), {"loss", "more"}, {"loss", "more"}]


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("calls", [False, True])
def test_the_first_batches_may_be_skipped(calls: bool, quiet_trainer: Make) -> None:
    """Whether the model is called, and its loss asked for, is seen in the first batch that is not."""

    class Skips(Lit):
        skips = 2

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx >= self.skips:
                return super().training_step(batch, batch_idx)
            return (self(batch[0]), None)[1] if calls else None

    class Never(Skips):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            skipped = super().training_step(batch, batch_idx) if batch_idx < self.skips else None
            return self.forward(batch[0]).sum() if batch_idx >= self.skips else skipped

    callback = Distils("kl", teacher_net())
    fit(quiet_trainer, Skips(), callback, max_epochs=1)
    assert [set(losses) for losses in callback.losses] == [set(), set(), *[{"_output_", "loss"}] * 2]
    with pytest.raises(ConfigError, match="the first training batch did not call Never"):
        fit(quiet_trainer, Never(), Distils("kl", teacher_net()), max_epochs=1)


def test_several_forwards_in_a_step_have_the_mean(quiet_trainer: Make) -> None:
    class Halves(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0])  # does not count
            parts = [self(half) for half in batch[0].chunk(2)]
            return F.cross_entropy(torch.cat(parts), batch[1])

    class Twin(ByHand):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0])
                wanted = [self.__dict__["teacher"](half) for half in batch[0].chunk(2)]
            parts = [self(half) for half in batch[0].chunk(2)]
            added: list[Tensor] = [(a - b).square().mean() for a, b in zip(parts, wanted, strict=True)]
            return F.cross_entropy(torch.cat(parts), batch[1]) + (added[0] + added[1]) / 2

    torch.manual_seed(0)
    model = Halves()
    reference = Twin.of(teacher_net())
    fit(quiet_trainer, model, Distils("mse", teacher_net()), max_epochs=1)
    fit(quiet_trainer, reference, max_epochs=1)
    assert_close(model, reference)


class Manual(Lit):
    """Two optimizers; the step asks for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if "ask" in self.__dict__:
            loss = loss + self.__dict__["ask"]()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in (parameters[:3], parameters[3:])]


def test_in_manual_optimization_the_step_asks_for_the_loss(quiet_trainer: Make) -> None:
    callback = Distils(ENTRIES, teacher_net())
    torch.manual_seed(0)
    model = Manual()
    model.__dict__["ask"] = callback.distiller.loss
    fit(quiet_trainer, model, callback, max_epochs=2)
    reference = ByHand.of(teacher_net())  # one optimizer with all parameters does the same
    fit(quiet_trainer, reference, max_epochs=2)
    assert_close(model, reference)
    with pytest.raises(ConfigError, match=r"In manual optimization training_step adds the loss itself: self\.manual"):
        fit(quiet_trainer, Manual(), Distils("kl", teacher_net()), max_epochs=1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at whatever it is given
@pytest.mark.parametrize("whole", [True, False], ids=["the LightningModule", "the net in it"])
def test_compiled_modules(whole: bool, quiet_trainer: Make) -> None:
    torch.compiler.reset()

    torch.manual_seed(0)
    model: Any = Lit() if whole else Inside(Net())
    reference = ByHand.of(teacher_net())
    if not whole:
        model.net = torch.compile(model.net, backend="eager")
    prefix = "" if whole else "net."
    teacher = teacher_net() if whole else Calls(lambda self, x: self.net(x), net=teacher_net())
    entries = [ENTRIES[0], {**ENTRIES[1], "op_names": [f"{prefix}pool"]}]
    fitted: Any = torch.compile(model, backend="eager") if whole else model
    callback = Distils(entries, teacher)
    fit(quiet_trainer, fitted, callback, max_epochs=2)
    fit(quiet_trainer, reference, max_epochs=2)
    assert len(callback.losses) == 8 and all(f"{prefix}pool._output_" in losses for losses in callback.losses)
    assert_close(model if whole else model.net._orig_mod, reference)


class Inside(Lit):
    """`Lit` around a net of its own."""

    def __init__(self, net: nn.Module) -> None:
        LightningModule.__init__(self)
        self.lr, self.optimizer, self.net = 0.05, "sgd", net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_teacher_shows_its_layers_also_when_it_was_compiled_for_a_validation(quiet_trainer: Make) -> None:
    """The fit is that of the same nets, not compiled. Code of the student's validation is that of its copy's forward, too."""
    torch.compiler.reset()
    entries = [{"op_names": ["net.pool"]}, {"op_names": ["net.fc"], "target_names": ["_input_"]}]

    def run(compiled: bool, teacher: Any) -> tuple[Inside, dict[str, float]]:
        torch.manual_seed(0)
        model: Any = Inside(Net())
        if compiled:
            model.net = torch.compile(model.net, backend="eager")
        callback = Distils(entries, teacher)
        fit(quiet_trainer, model, callback, num_sanity_val_steps=1)
        return getattr(model.net, "_orig_mod", model.net), callback.losses[-1]

    other: Any = Inside(teacher_net())
    other.net = torch.compile(other.net, backend="eager")
    with torch.no_grad():
        other.eval()(torch.zeros(16, 3, 8, 8))
    for own, twin in (("self", "self"), (other, Inside(teacher_net()))):
        found, losses = run(True, own)
        expected, wanted = run(False, twin)
        assert_close(found, expected)
        assert losses == pytest.approx(wanted, rel=1e-4) and losses["net.pool._output_"] > 1e-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_teacher_that_is_compiled_itself(quiet_trainer: Make) -> None:
    """Of its output alone the compiled code is run; of what is inside, the layers."""
    torch.compiler.reset()
    student, x = Net(), torch.randn(4, 3, 8, 8)
    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: runs.append(1) or graph.forward(*args)  # type: ignore[func-returns-value]

    teacher: Any = torch.compile(teacher_net(), backend=backend)
    for entries in ("mse", ["mse", {"op_names": ["pool"]}, {"op_names": [""], "target_names": ["_input_"]}]):
        found = added(begun(entries, student, teacher), student, x)
        expected = added(begun(entries, student, teacher_net()), student, x)
        assert len(found) == len(expected) and {key: float(value) for key, value in found.items()} == pytest.approx(
            {key: float(value) for key, value in expected.items()}, rel=1e-5
        )
        assert bool(runs) == (entries == "mse")
        runs.clear()


def test_the_teachers_forward_may_ask_the_trainer(tmp_path: Path, quiet_trainer: Make) -> None:
    asked: list[tuple[bool, int]] = []

    class Asks(Lit):
        def forward(self, x: Tensor) -> Tensor:
            asked.append((self.training, self.trainer.current_epoch))
            if self.trainer.global_step > 0:
                self.log("asked", float(self.training))  # Lightning has no place for it outside of a hook
            return super().forward(x)

    torch.manual_seed(0)
    model = Asks()
    options: dict[str, Any] = {"distillation": "kl", "verbose": 0, "example_input": IMAGE}
    trainer = fit(quiet_trainer, model, QuantFusionCallback(teacher="self", **options), enable_checkpointing=False)
    assert {(False, 1), (True, 1)} <= set(asked) and "log" not in model.__dict__
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(quiet_trainer, Asks(), QuantFusionCallback(teacher=tmp_path / "a.ckpt", **options), max_epochs=1)


@pytest.mark.parametrize("config_list", [None, "int8"])
def test_the_whole_plan_is_there_after_a_fit_and_shows_in_notebooks(config_list: str | None, quiet_trainer: Make) -> None:
    options: dict[str, Any] = {"distillation": ENTRIES, "teacher": "self", "verbose": 0}
    callback = QuantFusionCallback(config_list, pruning=[{"op_names": ["conv1"], "sparse_ratio": 0.5}], **options)
    assert callback.whole_plan() == ""
    fit(quiet_trainer, Lit(), callback, max_epochs=1)
    plan = callback.whole_plan()
    parts = [*([callback.plan] if config_list else []), callback.pruning_plan, callback._distiller.links]  # type: ignore[union-attr]
    assert plan == "\n\n".join(map(str, parts)) and "kl (temperature 4)" in plan
    page, texts = plan._repr_html_(), [""]
    plan._repr_pretty_(SimpleNamespace(text=texts.append), False)
    assert texts[-1] == plan and page.count("<table") == len(parts)
    assert "kl (temperature 4)" in page and "conv1" in page
    alone = QuantFusionCallback(**options)
    fit(quiet_trainer, Lit(), alone, max_epochs=1)
    assert alone.whole_plan() == str(parts[-1])


# -- the teacher -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_self_is_the_float_model_when_training_begins_also_after_a_resume(tmp_path: Path, quiet_trainer: Make) -> None:
    """A fresh process has that teacher from the checkpoint, and the run goes on bit for bit; quantized, too, it stays float."""
    entries = ["kl", {"op_names": ["bn2"], "apply_method": "attention"}]

    def run(epochs: int, seed: int = 0, **options: Any) -> tuple[Lit, Distils]:
        torch.manual_seed(seed)
        model, callback = Lit(optimizer="adam"), Distils(entries, "self", config_list=options.pop("config_list", None))
        keeper = ModelCheckpoint(dirpath=options.pop("folder", tmp_path / "straight"), save_last=True)
        fit(quiet_trainer, model, callback, keeper, max_epochs=epochs, enable_checkpointing=True, **options)
        return model, callback

    torch.manual_seed(0)
    first = Lit().state_dict()
    model, straight = run(2)
    run(1, folder=tmp_path / "broken")
    path = tmp_path / "broken" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["Distils"]
    resumed, again = run(2, seed=1, folder=tmp_path / "resumed", ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(resumed).values(), strict=True))
    assert straight.losses[4:] == again.losses
    _, quantized = run(1, config_list=[{"op_types": ["Conv2d", "Linear"]}], folder=tmp_path / "quantized")
    for state in (saved, *(one.distiller.state_dict() for one in (straight, again, quantized))):
        assert not state["projections"] and set(state["teacher"]) == set(first)
        assert all(torch.equal(value, first[name]) for name, value in state["teacher"].items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_projections_train_and_resume_bit_for_bit(tmp_path: Path, quiet_trainer: Make) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            self.neck, self.fc = nn.Linear(192, 20), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.neck(self.body(x).flatten(1)))
            return out

    torch.manual_seed(3)
    teacher = Wide()
    entries = [{"op_names": ["pool"], "link": "body"}, {"op_names": ["fc"], "link": "neck", "apply_method": "cosine"}]
    names = ["pool._output_->body.weight", "pool._output_->body.bias", "fc._output_->neck.weight", "fc._output_->neck.bias"]

    def run(epochs: int, folder: str, seed: int = 0, **options: Any) -> tuple[Lit, Distils, Trainer]:
        torch.manual_seed(seed)
        model, callback = Lit(optimizer="adam", lr=0.01), Distils(entries, teacher)
        keeper = ModelCheckpoint(dirpath=tmp_path / folder, save_last=True)
        trainer = fit(quiet_trainer, model, callback, keeper, max_epochs=epochs, enable_checkpointing=True, **options)
        return model, callback, trainer

    model, straight, trainer = run(2, folder="straight")
    before = begun(entries, Lit(), teacher).learned
    assert list(straight.distiller.learned) == names
    assert [tuple(p.shape) for p in straight.distiller.learned.values()] == [(12, 8), (12,), (20, 4), (20,)]
    assert all(not torch.equal(before[name], p) for name, p in straight.distiller.learned.items())
    ours = {id(parameter) for parameter in straight.distiller.learned.values()}
    assert ours <= {id(parameter) for parameter in trainer.optimizers[0].param_groups[0]["params"]}
    assert not ours & {id(parameter) for parameter in model.parameters()} and len(model.state_dict()) == len(Lit().state_dict())
    run(1, folder="broken")
    path = tmp_path / "broken" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert len(content["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(Lit().parameters()))
    resumed, again, _ = run(2, folder="resumed", seed=5, ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(resumed).values(), strict=True))
    pairs = zip(straight.distiller.learned.values(), again.distiller.learned.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_first_batch_of_a_resumed_int8_fit_sums_gradients_as_it_would_be_summed_later(
    tmp_path: Path, quiet_trainer: Make
) -> None:
    """The student's tensor goes on to its next layer and to the projection: two gradients, in an order and a memory layout."""
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(768, 4))
    entries = [{"op_names": ["relu1"], "link": "1", "lambda": 0.2}]

    def run(epochs: int, seed: int = 0, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model, callback = Lit(optimizer="adam"), QuantFusionCallback("int8", distillation=entries, teacher=teacher, verbose=0)
        keeper = ModelCheckpoint(dirpath=tmp_path / f"{epochs} {seed}", save_last=True)
        fit(quiet_trainer, model, callback, keeper, max_epochs=epochs, enable_checkpointing=True, **options)
        return weights(model)

    straight = run(3)
    run(1)
    resumed = run(3, seed=1, ckpt_path=tmp_path / "1 0" / "last.ckpt")
    assert {name: float((straight[name] - value).abs().max()) for name, value in resumed.items()} == dict.fromkeys(straight, 0.0)


class TwoGroups(Lit):
    """With what is learned of the first layers in the first group, and the rest in the second, both before others' numbers."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        return torch.optim.Adam([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.01)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_projection_may_be_new_or_given_up_at_a_resume(given_up: bool, tmp_path: Path, quiet_trainer: Make) -> None:
    """What else the optimizer kept is there again: of the model's own parameters, and of scales that are learned in both runs."""
    teacher = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Flatten(), nn.Linear(768, 4))
    options: dict[str, Any] = {"distillation": [{"op_names": ["relu1"], "link": "0"}], "teacher": teacher}
    entries = [{"op_types": ["Conv2d", "Linear"], "method": "lsq"}]

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            states = trainer.optimizers[0].state
            found = {**dict(pl_module.named_parameters()), **learned_parameters(pl_module)}
            self.kept = {name: copy.deepcopy(states[p]) for name, p in found.items() if p in states}
            self.names = {id(p): name for name, p in found.items()}
            groups = trainer.optimizers[0].param_groups
            self.groups = [[self.names[id(p)] for p in group["params"]] for group in groups]
            self.values = {name: p.detach().clone() for name, p in found.items()}
            trainer.should_stop = True

    torch.manual_seed(0)
    callback = QuantFusionCallback(entries, verbose=0, **(options if given_up else {}))
    trainer = fit(quiet_trainer, first := TwoGroups(), callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    states = trainer.optimizers[0].state
    before = {name: states[p] for name, p in {**dict(first.named_parameters()), **learned_parameters(first)}.items()}
    ours = {name for name in before if "->" in name}
    again, seen = QuantFusionCallback(entries, verbose=0, **({} if given_up else options)), Looks()
    fit(quiet_trainer, second := TwoGroups(), again, seen, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert len(ours) == 2 * given_up and "conv1.weight.scale" in before
    assert {name: {key: float(value.sum()) for key, value in state.items()} for name, state in seen.kept.items()} == {
        name: {key: float(value.sum()) for key, value in state.items()} for name, state in before.items() if name not in ours
    }
    now = learned_parameters(second)
    new = [name for name in now if "->" in name]
    assert len(new) == 2 * (not given_up) and {name for group in seen.groups for name in group} == {*before, *new} - ours
    assert all(not torch.equal(now[name], seen.values[name]) for name in new)  # they train


def test_a_projection_learns_the_regression(quiet_trainer: Make) -> None:
    """FitNets: with the student standing still, what remains is linear regression of the teacher on the student's features."""
    student, teacher, x = nn.Sequential(nn.Linear(5, 3)), nn.Sequential(nn.Linear(5, 7)), torch.randn(64, 5)
    distiller = begun([{"op_names": ["0"]}], student, teacher, x)
    optimizer = torch.optim.LBFGS([*learned_parameters(student).values()], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with distiller.batch():
            student(x)
            loss = distiller.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    features = torch.cat([student(x), torch.ones(64, 1)], 1).detach().double()
    target = teacher(x).detach().double()
    residual = (features @ torch.linalg.lstsq(features, target).solution - target).square().mean()
    torch.testing.assert_close(distiller.losses["loss"].double(), residual, rtol=1e-4, atol=1e-7)
    assert residual > 1e-3
    distiller.end()
    assert restore_model(student) is student and learned_parameters(student) == {}


def test_what_is_learned_is_no_part_of_the_deployed_copy() -> None:
    student, teacher = Net(), nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(320, 4))
    begun([{"op_names": ["conv2"], "link": "0"}], student, teacher)
    prepare_model(student, make_plan(student, FUSED, example_input=IMAGE))
    student(torch.randn(8, 3, 8, 8))
    assert set(learned_parameters(student)) == {"conv2._output_->0.weight", "conv2._output_->0.bias"}
    deployed = convert_model(student)
    assert LEARNED not in deployed.__dict__ and learned_parameters(copy.deepcopy(student)) == {}
    assert all("->" not in name for name in (*deployed.state_dict(), *student.state_dict()))


def test_a_teacher_from_a_checkpoint(tmp_path: Path, quiet_trainer: Make) -> None:
    torch.manual_seed(4)
    saved = Lit(optimizer="adam")
    trainer = fit(quiet_trainer, saved, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    torch.manual_seed(0)
    student = Lit()
    state = torch.random.get_rng_state()
    x = torch.randn(4, 3, 8, 8)
    torch.random.set_rng_state(state)
    by_path = begun("mse", student, tmp_path / "float.ckpt")
    by_class = begun("mse", student, {"class_path": "toys.Lit", "ckpt_path": str(tmp_path / "float.ckpt")})
    assert torch.equal(torch.random.get_rng_state(), state)
    by_path.begin(student, example=IMAGE)
    found = added(by_path, student, x)
    torch.testing.assert_close(found["_output_"], F.mse_loss(copied(student, Net())(x), copied(saved, Net()).eval()(x)))
    assert by_class.links is not None
    prepare_model(student, make_plan(student, FUSED, example_input=IMAGE))
    assert type(begun("mse", student, str(tmp_path / "float.ckpt"))._run.teacher.module) is Lit  # type: ignore[union-attr]
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    for teacher, text in (
        (tmp_path / "flaot.ckpt", r"there is no checkpoint '.*flaot.ckpt'\. Close: 'float.ckpt'"),
        ({"class_path": "toys.Litt", "ckpt_path": "a"}, r"\['class_path'\]: 'toys.Litt' cannot be imported"),
        ({"class_path": "torch.nn.Linear", "ckpt_path": "a"}, "Linear has no load_from_checkpoint; give the teacher as a module"),
        (
            {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel", "ckpt_path": str(tmp_path / "float.ckpt")},
            r"(?s)teacher: .* cannot be loaded as a BoringModel: RuntimeError.*[^}]\. Or give the teacher as a module",
        ),
        (
            tmp_path / "other.ckpt",
            r"(?s)cannot be loaded as a Lit: RuntimeError: .* If it is of another class, give {'class_path': .*}\. Or give ",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            begun("mse", Lit(), teacher)


def test_a_model_that_was_compiled_before_is_refused() -> None:
    torch.compiler.reset()

    def outer(net: Any) -> Calls:
        return Calls(lambda self, x: self.net(x), net=net)

    student, x = outer(torch.compile(Net(), backend="eager")), torch.randn(4, 3, 8, 8)
    student(x)
    distiller = begun(["mse", {"op_names": ["net.pool"]}], student, outer(teacher_net()))
    distiller.start()
    student(x)
    with pytest.raises(
        ConfigError, match=r"net\.pool\._output_ does not show, because torch\.compile had compiled the model before"
    ):
        distiller.loss()
    distiller.end()
    torch.compiler.reset()
    distiller = begun(["mse", {"op_names": ["net.pool"]}], student, outer(teacher_net()))
    assert set(added(distiller, student, x)) == {"_output_", "net.pool._output_", "loss"}


def test_layers_that_torchs_encoders_pass_by_show() -> None:
    """In eval mode without gradients an encoder's fused kernel would not call them."""
    with torch.random.fork_rng():
        student, teacher = (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2) for _ in "ab")
    x = torch.randn(3, 5, 8)
    entries = [{"op_names": ["layers.0.linear1", "layers.1.norm2", "layers.1"]}]
    found = added(begun(entries, student, teacher, x), student, x)
    made: list[list[Tensor]] = []
    for net in (student.train(), teacher.train()):  # without dropout train mode computes what eval does
        first, second = net.layers
        inner: list[Tensor] = []
        with first.linear1.register_forward_hook(lambda *call, inner=inner: inner.append(call[2])):
            out = second(first(x))
        made.append([inner[0], out])
    torch.testing.assert_close(found["layers.0.linear1._output_"], F.mse_loss(made[0][0], made[1][0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["layers.1._output_"], F.mse_loss(made[0][1], made[1][1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["layers.1.norm2._output_"], found["layers.1._output_"])
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    own, other = [
        Calls(lambda self, x: self.net(x, src_key_padding_mask=mask), net=copy.deepcopy(net)) for net in (student, teacher)
    ]
    found = added(begun([{"op_names": ["net.layers.0"]}], own, other, x), own, x)  # not on nested tensors
    firsts = [net.layers[0](x, src_key_padding_mask=mask) for net in (student, teacher.train())]
    torch.testing.assert_close(found["net.layers.0._output_"], F.mse_loss(*firsts), rtol=1e-4, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_teacher_may_be_of_another_type_and_on_its_own_flags() -> None:
    """A float64 teacher of a float32 student; one in a module of the user's that `train()` reaches."""
    student, teacher, x = Net(), teacher_net().double(), torch.randn(4, 3, 8, 8)
    own = copied(student, Net())(x)
    found = added(begun("mse", student, teacher), student, x)
    torch.testing.assert_close(found["_output_"], F.mse_loss(own, teacher(x.double()).float()))
    assert teacher.conv1.weight.dtype == torch.float64
    holder = Lit()
    holder.teacher = teacher_net().requires_grad_(False)
    distiller = begun("mse", holder, holder.teacher)
    holder.train()
    before = weights(holder.teacher)
    own = by_layer(copied(holder_state(holder), Net()), x)["fc"]
    found = added(distiller, holder, x)
    assert holder.teacher.training
    torch.testing.assert_close(found["_output_"], F.mse_loss(own, copied(holder.teacher, Net()).eval()(x)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(holder.teacher).values(), strict=True))


def holder_state(model: nn.Module) -> nn.Module:
    """The layers of `Net` in a model that has more."""
    net = Net()
    net.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("teacher.")})
    return net


def test_the_teacher_computes_once_for_an_input_that_comes_again() -> None:
    calls = []

    class Counting(Net):
        def forward(self, x: Tensor, word: str = "") -> Tensor:
            calls.append(torch.is_grad_enabled() or torch.is_inference_mode_enabled())
            return super().forward(x)

    student, x = Counting(), torch.randn(4, 3, 8, 8)
    distiller = begun("mse", student, Counting())
    student.__dict__["forward"] = lambda x, word="": Net.forward(student, x)
    calls.clear()
    with distiller.batch():
        for _ in range(3):
            student(x)
        student(x.clone())
        student(y := torch.randn(4, 3, 8, 8))
        student(y.add_(1))
        student(y, "one")
        student(y, "two")
        distiller.loss()
    assert calls == [False] * 6


def test_hooks_are_there_in_training_step_alone(quiet_trainer: Make) -> None:
    """Not in validation, where a watched group would be simulated, also where a batch is left out."""
    hooked: list[tuple[str, bool]] = []

    class Looks(Lit):
        def note(self, when: str) -> None:
            hooked.append((when, any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            self.note("start")
            return -1 if batch_idx == 2 and not self.current_epoch else None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.note("step")
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            self.note("backward")

        def on_validation_start(self) -> None:
            self.note("validation")

    fit(quiet_trainer, Looks(), Distils(ENTRIES, "self"), max_epochs=2)
    batch = [("start", False), ("step", True), ("backward", False)]
    assert hooked == [*batch * 2, ("start", False), *batch * 4, ("validation", False)]


def test_an_exception_leaves_nothing_behind(quiet_trainer: Make) -> None:
    class Fails(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    model, teacher = Fails(), teacher_net()
    before = fingerprint(teacher)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(quiet_trainer, model, Distils("kl", teacher))
    assert fingerprint(teacher) == before and "training_step" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    distiller = begun("kl", model, teacher)
    with pytest.raises(RuntimeError, match="on purpose"), distiller.batch():
        raise RuntimeError("on purpose")
    assert not model._forward_hooks
    step = model.training_step
    distiller.start()
    wrapped = model.__dict__["training_step"]
    assert wrapped is not step and inspect.signature(wrapped) == inspect.signature(step)
    twin = copy.deepcopy(model)
    assert twin.__dict__["training_step"].__self__ is twin
    distiller.end()
    assert "training_step" not in model.__dict__
    patched = model.__dict__["training_step"] = lambda batch, batch_idx: None
    distiller.begin(model, example=IMAGE)
    distiller.start()
    assert model.__dict__["training_step"] is not patched
    distiller.end()
    assert model.__dict__["training_step"] is patched
