# SPDX-License-Identifier: Apache-2.0
"""One callback prunes, distils and quantizes in one fit: any of the three alone, or together."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from toys import FUSED, Lit, fingerprint, loader

from lightning_quant import ConfigError, QuantFusionCallback, load_deployed
from lightning_quant.integer import IntegerLayer
from lightning_quant.masks import Masks, make_pruning
from lightning_quant.prepare import prepared_groups, restore_model
from lightning_quant.record import record, split_example
from lightning_quant.schedule import Clock

TrainerMaker = Callable[..., Trainer]
HALF: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def fitted(make: TrainerMaker, *args: Any, model: Lit | None = None, epochs: int = 3, **options: Any) -> tuple[Lit, Any]:
    torch.manual_seed(0)
    model = model or Lit()
    callback = QuantFusionCallback(*args, **{"verbose": 0, "source": "last", **options})
    make(max_epochs=epochs, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    return model, callback


def output(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(x)
    return found


def rows(weight: Tensor) -> int:
    """How many output channels are not all zero."""
    return int(weight.flatten(1).any(1).sum())


# -- pruning alone ------------------------------------------------------------------------------------------------------------


def test_pruning_alone_ships_a_small_float_model(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model, callback = fitted(quiet_trainer, pruning=HALF, export=".onnx", dirpath=tmp_path)
    assert not prepared_groups(model) and type(model.conv1) is nn.Conv2d
    assert [rows(model.get_submodule(name).weight) for name in ("conv1", "conv2")] == [4, 4]  # type: ignore[arg-type]
    deployed = callback.deployed_model
    assert [deployed.conv1.weight.shape, deployed.conv2.weight.shape] == [(4, 3, 3, 3), (4, 4, 3, 3)]
    assert deployed.fc.weight.shape == (4, 4 * 16)
    assert torch.allclose(output(deployed), output(model), atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert torch.allclose(torch.as_tensor(found), output(model), atol=1e-5)
    assert callback.shrunk.after.parameters == sum(p.numel() for p in deployed.parameters())


def test_without_shrink_the_masked_model_ships(quiet_trainer: TrainerMaker) -> None:
    model, callback = fitted(quiet_trainer, pruning={"config_list": HALF, "shrink": False})
    assert callback.deployed_model.conv1.weight.shape == (8, 3, 3, 3) and callback.shrunk is None
    assert torch.equal(output(callback.deployed_model), output(model))


def with_constants() -> Any:
    """What is behind masked channels of conv2 is a constant: the bias of the norm behind it is not masked."""
    torch.manual_seed(3)
    model: Any = Lit()
    nn.init.constant_(model.bn2.bias, 0.5)
    return model


def test_constants_that_go_leave_the_validated_integers(quiet_trainer: TrainerMaker) -> None:
    model = with_constants()
    _, callback = fitted(quiet_trainer, "int8", model=model, pruning={"config_list": HALF, "dependencies": False})
    assert "fc.weight" in callback.shrunk.cuts.biases and callback.deployed_model.fc.weight.shape == (4, 4 * 16)
    for x in (X, 3 * X.flip(0)):
        assert torch.equal(output(callback.deployed_model, x), output(model, x))


def test_a_removal_that_rounds_otherwise_says_how_much(quiet_trainer: TrainerMaker) -> None:
    model = with_constants()
    affine = ["int8", {"op_names": ["fc"], "target_names": ["weight"], "quant_scheme": "affine"}]  # a grid that is not held
    said = r"differs from what was validated by up to (\S+) .* moved into fc.bias, .* Mask the biases .*shrink: false"
    with pytest.warns(UserWarning, match=said) as seen:
        _, callback = fitted(quiet_trainer, affine, model=model, pruning={"config_list": HALF, "dependencies": False})
    (told,) = (match[1] for one in seen if (match := re.search(said, str(one.message))))
    (x,), _ = split_example(callback._example)
    masked = output(model, x)  # the deployed arithmetic, with all channels
    moved = float((output(callback.deployed_model, x) - masked).abs().max() / masked.abs().max())
    assert moved > 1e-3 and float(told) == pytest.approx(moved, rel=0.05)


def test_what_is_masked_is_the_least_of_the_weights(quiet_trainer: TrainerMaker) -> None:
    class Frozen(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model: Any = Frozen()
    norms = model.conv1.weight.detach().abs().flatten(1).sum(1)
    fitted(quiet_trainer, model=model, pruning={"config_list": HALF, "dependencies": False})
    kept = model.conv1.weight.flatten(1).any(1)
    assert torch.equal(kept, norms >= norms.sort().values[4])


def test_masks_without_training(quiet_trainer: TrainerMaker) -> None:
    _, callback = fitted(quiet_trainer, "int8", pruning=HALF, epochs=0)
    assert callback.deployed_model.conv1.weight.shape == (4, 3, 3, 3)
    assert isinstance(callback.deployed_model.conv1, IntegerLayer)
    with pytest.warns(UserWarning, match="these masks need gradients of training steps, and there are none: no masks"):
        fitted(quiet_trainer, pruning=[{**HALF[0], "metric": "taylor"}], epochs=0)


def test_a_fit_that_ends_before_its_masks_are_made_says_so(quiet_trainer: TrainerMaker) -> None:
    pruning = {"config_list": HALF, "stop": "step 100"}
    with pytest.warns(UserWarning, match=r"the fit ended after 1 of 10 updates of its masks"):
        fitted(quiet_trainer, pruning=pruning)


# -- a teacher alone ----------------------------------------------------------------------------------------------------------


def test_a_teacher_alone_is_the_same_loss_written_into_the_step(quiet_trainer: TrainerMaker) -> None:
    teacher = Lit()

    class Taught(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            out = self(x)
            with torch.no_grad():
                target = F.log_softmax(teacher.eval()(x) / 2, -1)
            added = F.kl_div(F.log_softmax(out / 2, -1), target, reduction="batchmean", log_target=True) * 4
            return F.cross_entropy(out, y) + added

    torch.manual_seed(0)
    by_hand = Taught()
    quiet_trainer(max_epochs=3).fit(by_hand, loader(), loader(seed=1))
    model, callback = fitted(quiet_trainer, distillation="kl", teacher=teacher)
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    assert not prepared_groups(model)
    assert torch.equal(output(callback.deployed_model), output(model))


# -- together -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_three() -> dict[str, Any]:
    return {"config_list": FUSED, "pruning": HALF, "distillation": "kl", "teacher": "self"}


def test_all_three_in_one_fit(quiet_trainer: TrainerMaker, tmp_path: Path, all_three: dict[str, Any]) -> None:
    model, callback = fitted(quiet_trainer, **all_three, export=".onnx", dirpath=tmp_path)
    conv = callback.deployed_model.conv2
    assert isinstance(conv, IntegerLayer) and conv.weight.shape == (4, 4, 3, 3)
    assert torch.allclose(output(callback.deployed_model), output(model), atol=1e-5)
    (exported,) = callback.exported
    assert exported.parity.different == 0 < exported.parity.integers
    assert "self" not in str(callback.deployed_model.__dict__), "nothing of the teacher ships"


def test_the_model_is_left_as_it_was(quiet_trainer: TrainerMaker, all_three: dict[str, Any]) -> None:
    model, _ = fitted(quiet_trainer, **all_three)
    restore_model(model)
    twin = Lit()
    twin.load_state_dict(model.state_dict())
    assert [one[:-1] for one in fingerprint(model) if isinstance(one, tuple) and len(one) == 6] == [
        one[:-1] for one in fingerprint(twin) if isinstance(one, tuple) and len(one) == 6
    ]
    assert rows(model.get_submodule("conv1").weight) == 4, "its weights stay masked"  # type: ignore[arg-type]


def test_a_fit_that_fails_leaves_no_trace(quiet_trainer: TrainerMaker, all_three: dict[str, Any]) -> None:
    class Fails(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("in the user's own code")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="in the user's own code"):
        fitted(quiet_trainer, model=model, **all_three)
    assert "training_step" not in model.__dict__
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_second_fit_keeps_its_masks(quiet_trainer: TrainerMaker, all_three: dict[str, Any]) -> None:
    model, callback = fitted(quiet_trainer, **all_three)
    before = callback.masks.by_target()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    after = callback.masks.by_target()
    assert callback.masks.done == 10 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Looks(Callback):
    """How many channels of conv1 are not zero in validation, and after each training batch."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.trained: list[int] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.validated.append(rows(pl_module.conv1.weight))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.trained.append(rows(pl_module.conv1.weight))


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_masked_too(quiet_trainer: TrainerMaker, first: bool, all_three: dict[str, Any]) -> None:
    callback, looks = QuantFusionCallback(**all_three, verbose=0, source="last"), Looks()
    pair = [callback, EMAWeightAveraging(decay=0.9)]
    torch.manual_seed(0)
    model = Lit()
    trainer = quiet_trainer(max_epochs=4, callbacks=[*(pair if first else pair[::-1]), looks], num_sanity_val_steps=0)
    trainer.fit(model, loader(), loader(seed=1))
    assert looks.trained[-8:] == [4] * 8 and looks.validated[-4:] == [4] * 4
    deployed: Any = callback.deployed_model
    assert deployed.conv1.weight.shape[0] == 4
    assert torch.allclose(output(callback.deployed_model), output(model), atol=1e-5)  # type: ignore[arg-type]


def test_only_a_checkpoint_with_all_its_masks_is_the_best(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    class Scripted(Lit):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(float(self.current_epoch)))

    callback = QuantFusionCallback(pruning={"config_list": HALF, "stop": "epoch 2"}, verbose=0)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback, saver], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="the best, of epoch 0, was saved before everything was quantized or masked"):
        trainer.fit(Scripted(), loader(), loader(seed=1))
    best = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    kept = best["state_dict"]["conv1.weight"].flatten(1).any(1)
    deployed: Any = callback.deployed_model
    assert torch.equal(deployed.conv1.weight, best["state_dict"]["conv1.weight"][kept])


def test_a_checkpoint_is_tested_in_a_fresh_process_with_its_masks(
    quiet_trainer: TrainerMaker, tmp_path: Path, all_three: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, callback = Lit(), QuantFusionCallback(**all_three, verbose=0, source="last")
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model, loader(), loader(seed=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(Lit().state_dict())
    other, again = Lit(), QuantFusionCallback(**all_three, verbose=0)
    (there,) = quiet_trainer(callbacks=[again]).test(other, loader(seed=2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    (here,) = trainer.test(model, loader(seed=2), verbose=False)
    assert there == here
    assert torch.equal(output(again.convert(other)), output(callback.deployed_model))  # type: ignore[arg-type]
    without = QuantFusionCallback(FUSED, verbose=0)
    with pytest.raises(ConfigError, match="the checkpoint is of a run with `pruning`, and this callback has none"):
        quiet_trainer(max_epochs=4, callbacks=[without]).fit(Lit(), loader(), loader(seed=1), ckpt_path=tmp_path / "a.ckpt")


def test_numbers_for_loggers(quiet_trainer: TrainerMaker, all_three: dict[str, Any]) -> None:
    callback = QuantFusionCallback(**all_three, verbose=0, source="last", log_every_n_steps=1)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model := Lit(), loader(), loader(seed=1))
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    masked = [dict(model.named_parameters())[name] for name in callback.masks.by_target()]  # type: ignore[union-attr]
    zeros = sum(int((values == 0).sum()) for values in masked) / sum(values.numel() for values in masked)
    assert numbers["prune/sparsity"] == pytest.approx(zeros) and zeros > 0.5
    assert numbers["distill/loss"] == numbers["distill/_output_"] > 0


# -- by hand ------------------------------------------------------------------------------------------------------------------


def test_in_manual_optimization_the_step_adds_the_loss(quiet_trainer: TrainerMaker) -> None:
    class ByHand(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss + ours.distillation_loss())
            optimizer.step()

    teacher = Lit()
    ours = QuantFusionCallback(distillation="kl", teacher=teacher, verbose=0, source="last")
    torch.manual_seed(0)
    model = ByHand()
    quiet_trainer(max_epochs=3, callbacks=[ours]).fit(model, loader(), loader(seed=1))
    automatic, _ = fitted(quiet_trainer, distillation="kl", teacher=teacher)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), automatic.parameters(), strict=True))


# -- what a review found -------------------------------------------------------------------------------------------------------


def test_masks_of_a_tied_parameter_by_its_later_name(quiet_trainer: TrainerMaker) -> None:
    class Tied(Lit):
        def __init__(self) -> None:
            super().__init__()
            ours: Any = self
            ours.conv2.weight = nn.Parameter(ours.conv2.weight.detach().clone())
            self.again = nn.Conv2d(8, 8, 3, padding=1)
            self.again.weight = ours.conv2.weight

    pruning = [{"op_names": ["again"], "sparse_ratio": 0.5, "metric": "level"}]
    model, callback = fitted(quiet_trainer, model=Tied(), pruning=pruning)
    assert float((model.get_submodule("conv2").weight == 0).float().mean()) == 0.5  # type: ignore[union-attr]
    assert torch.equal(output(callback.deployed_model), output(model))


def test_masks_that_never_come_are_said(quiet_trainer: TrainerMaker) -> None:
    with pytest.warns(UserWarning, match=r"the fit ended after 0 of \d+ updates of its masks; train longer, or let `stop`"):
        fitted(quiet_trainer, pruning={"config_list": HALF, "schedule": "one_shot", "start": "epoch 5"})


def done_of(callback: QuantFusionCallback) -> int:
    return 0 if callback.masks is None else callback.masks.done  # None: while the forward is recorded


def test_masks_hold_behind_each_step_of_a_batch(quiet_trainer: TrainerMaker) -> None:
    seen: list[tuple[int, int]] = []

    class TwoSteps(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            for _ in range(2):
                seen.append((rows(self.get_submodule("conv1").weight), done_of(callback)))  # type: ignore[arg-type]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    callback = QuantFusionCallback(pruning={"config_list": HALF, "start": 2, "schedule": "one_shot"}, verbose=0, source="last")
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(TwoSteps(), loader(), loader(seed=1))
    assert {found for found, done in seen if not done} == {8} and {found for found, done in seen if done} == {4}


def test_lbfgs_searches_among_masked_weights_alone(quiet_trainer: TrainerMaker) -> None:
    seen: list[tuple[int, int]] = []

    class Searches(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append((rows(self.get_submodule("conv1").weight), done_of(callback)))  # type: ignore[arg-type]
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    callback = QuantFusionCallback(pruning={"config_list": HALF, "start": 2, "schedule": "one_shot"}, verbose=0, source="last")
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Searches(), loader(), loader(seed=1))
    assert {found for found, done in seen if not done} == {8} and {found for found, done in seen if done} == {4}
    assert len(seen) > 2 * trainer.global_step  # forwards within steps


def test_each_optimizers_gradients_count_once(quiet_trainer: TrainerMaker) -> None:
    counts: dict[str, int] = {}

    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
            counts.update({} if callback.masks is None else callback.masks._counts)

        def configure_optimizers(self) -> Any:
            ours: Any = self
            heads = set(ours.conv2.parameters())
            rest = [one for one in self.parameters() if one not in heads]
            return [torch.optim.SGD(heads, lr=0.01), torch.optim.SGD(rest, lr=0.01)]

    pruning = {
        "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "metric": "taylor"}],
        "schedule": "one_shot",
        "start": 99,
    }
    callback = QuantFusionCallback(pruning=pruning, verbose=0, source="last")
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    with pytest.warns(UserWarning, match="the fit ended after 0 of"):
        trainer.fit(Two(), loader(), loader(seed=1))
    assert counts == {"conv1.weight": len(loader()), "conv2.weight": len(loader())}


def test_a_scale_that_two_layers_are_judged_by_is_penalised_once() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    entries = [{"op_names": ["0", "1"], "sparse_ratio": 0.5, "metric": "slim"}]
    graph = record(model, X)
    masks = Masks(
        model, make_pruning(model, {"config_list": entries, "penalty": 0.25, "start": 9, "schedule": "one_shot"}, graph)
    )
    model[1].weight.grad = torch.zeros(4)
    masks.after_backward()
    assert model[1].weight.grad.tolist() == [0.25] * 4


def test_another_callback_finds_modules_of_their_own_class(quiet_trainer: TrainerMaker) -> None:
    class Passing(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.conv0, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.act(self.conv0(x)))

    follows = {"align": {"module_name": "conv0", "target_name": "weight", "dims": [0]}, "granularity": [-1, 1, -1, -1]}
    pruning: list[dict[str, Any]] = [
        {"op_names": ["conv0"], "sparse_ratio": 0.34},
        {"op_names": ["act"], "target_settings": {"_output_": follows}},
    ]
    model = Passing()
    fitted(quiet_trainer, model=model, pruning=pruning)
    assert type(model.act) is not nn.ReLU
    fitted(quiet_trainer, model=model, pruning=pruning)
    fitted(quiet_trainer, "int8", model=model)
    restore_model(model)
    assert type(model.act) is nn.ReLU


def test_nothing_of_the_teacher_ships(quiet_trainer: TrainerMaker) -> None:
    wide: Any = Lit()
    wide.conv1, wide.bn1, wide.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
    entries = [{"op_names": ["conv1"]}]
    _, callback = fitted(quiet_trainer, distillation=entries, teacher=wide)
    deployed = callback.deployed_model
    assert [name for name in vars(deployed) if "learned" in name] == []
    assert not any(one.requires_grad for one in deployed.parameters())


def test_a_fit_behind_an_evaluation_of_its_checkpoint_knows_its_teacher(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    given: dict[str, Any] = {"config_list": "int8", "distillation": "kl", "teacher": "self", "verbose": 0, "source": "last"}
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[QuantFusionCallback(**given)])
    trainer.fit(Lit(), loader(), loader(seed=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = QuantFusionCallback(**given)
    later = quiet_trainer(max_epochs=2, callbacks=[callback])
    later.validate(model := Lit(), loader(seed=1), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    later.fit(model, loader(), loader(seed=1))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["QuantFusionCallback"]["distillation"]["teacher"]
    again = callback.state_dict()["distillation"]["teacher"]
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_values_that_are_not_finite_do_not_stay_behind_a_mask(quiet_trainer: TrainerMaker) -> None:
    class Overflows(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == trainer.estimated_stepping_batches:
                gone = ~callback.masks.by_target()["conv1.weight"]  # type: ignore[union-attr]
                pl_module.conv1.weight.data[gone] = torch.inf

    callback = QuantFusionCallback(pruning=HALF, verbose=0, source="last")
    quiet_trainer(max_epochs=2, callbacks=[callback, Overflows()]).fit(Lit(), loader(), loader(seed=1))
    assert callback.deployed_model is not None
    assert bool(torch.isfinite(output(callback.deployed_model)).all())


def test_losses_are_logged_when_the_trainers_are(quiet_trainer: TrainerMaker, all_three: dict[str, Any]) -> None:
    sent: list[tuple[int, dict[str, float]]] = []

    class Keeps(Logger):
        name, version = "keeps", "0"

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any(name.startswith(("distill/", "prune/")) for name in metrics):
                sent.append((step or 0, dict(metrics)))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    callback = QuantFusionCallback(**all_three, verbose=0, source="last")
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback], logger=Keeps(), log_every_n_steps=3)
    trainer.fit(Lit(), loader(), loader(seed=1))
    assert [step for step, _ in sent] == list(range(2, trainer.global_step, 3)) and len(sent) >= 2
    assert {*sent[-1][1]} == {"prune/sparsity", "distill/loss", "distill/_output_"}


def test_the_inputs_of_the_last_layer_may_be_masked(quiet_trainer: TrainerMaker) -> None:
    pruning = [{"op_types": ["Linear"], "target_names": ["_input_"], "sparse_ratio": 0.5}]
    model, callback = fitted(quiet_trainer, pruning=pruning)
    assert int(model.get_submodule("fc").weight.any(0).sum()) == 64 and callback.sparsity() == 0.5  # type: ignore[operator]
    assert repr(callback.masks).endswith("updates made, 256 of 512 values masked)")


@pytest.mark.parametrize("given", [{"config_list": "int8"}, {"pruning": HALF}])
def test_a_frozen_net_that_comes_first_is_not_what_is_compressed(quiet_trainer: TrainerMaker, given: dict[str, Any]) -> None:
    class First(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.net = Lit().requires_grad_(False), Lit()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            soft = self.teacher(batch[0])
            return F.cross_entropy(self.net(batch[0]), batch[1]) + F.mse_loss(self.net(batch[0]), soft)

    torch.manual_seed(0)
    model, callback = First(), QuantFusionCallback(**given, verbose=0)
    frozen = [one.clone() for one in model.teacher.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not called in the recorded forward and stays float", UserWarning)
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(model, loader())
    assert all(map(torch.equal, frozen, model.teacher.parameters()))
    assert callback._entry == "net" and callback.plan is not None
    names = [one.name for one in callback.plan.layers] if callback.masks is None else list(callback.masks.by_target())
    assert names and all(name.startswith("net.") for name in names)


def test_an_embedding_loses_features_not_words(quiet_trainer: TrainerMaker) -> None:
    plan = make_pruning(
        nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2)), [{"op_types": ["Embedding"], "sparse_ratio": 0.5}], None
    )
    masks = Masks(model := nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2)), plan)
    assert masks.step(Clock(step=99, epoch=9, done=1.0, length=1.0))
    assert int(model[0].weight.any(0).sum()) == 4 and bool(model[0].weight.any(1).all())  # type: ignore[operator]


# -- what cannot be -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "nothing to do; give config_list"),
        ({"distillation": "kl"}, "distillation: there is no teacher"),
        ({"teacher": "self"}, "teacher: nothing is to be learned from it"),
        ({"pruning": []}, "pruning: expected a non-empty list"),
        (
            {"pruning": [{"op_types": ["Conv2d"], "sparse_ratio": 1.5}]},
            r"pruning\[0\]\['sparse_ratio'\]: 1.5 is not in the range 0 to 1",
        ),
        ({"pruning": "nowhere.yaml"}, "pruning: .*nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_the_constructor(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        QuantFusionCallback(**given)


def test_lists_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "masks.yaml").write_text("- op_types: [Conv2d]\n  sparse_ratio: 0.5\n")
    callback = QuantFusionCallback(pruning=tmp_path / "masks.yaml")
    assert callback.pruning is not None
    assert callback.pruning.config_list == HALF


@pytest.mark.parametrize("quantized", [True, False])
def test_numbers_of_a_smaller_model_come_back_into_the_net_as_it_was_made(
    quiet_trainer: TrainerMaker, tmp_path: Path, quantized: bool
) -> None:
    given: dict[str, Any] = {"config_list": FUSED} if quantized else {}
    _, callback = fitted(quiet_trainer, **given, pruning=HALF, export=".pt", dirpath=tmp_path)
    loaded = load_deployed(tmp_path / "model.pt", model=Lit())
    assert torch.equal(output(loaded), output(callback.deployed_model))
    assert loaded.get_submodule("conv1").weight.shape == (4, 3, 3, 3)
    again = load_deployed(tmp_path / "model.pt", model=loaded if not quantized else Lit())
    assert torch.equal(output(again), output(callback.deployed_model))
