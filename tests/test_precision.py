# SPDX-License-Identifier: Apache-2.0
"""Owns precision and compilers in a Trainer: what stays float32, what is refused, that compiled training is eager training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from test_matrix import Mute
from torch import Tensor, nn
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback
from lightning_quant.prepare import learned_parameters, prepared_groups, quantizer_state

TrainerMaker = Callable[..., Trainer]
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
methods = pytest.mark.parametrize("method", ["qat", "lsq", "lsq+", "pact"])


def ours(method: str = "qat", config: Any = FUSED, **options: Any) -> QuantFusionCallback:
    return QuantFusionCallback([{**rule, "method": method} for rule in config], **{"verbose": 0, **options})


def evaluate(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    return out


def mixed(precision: str) -> dict[str, Any]:
    """Options of a Trainer. On a CPU Lightning makes bf16-mixed of 16-mixed unless it is given a scaler."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


def deployed_of(callback: QuantFusionCallback) -> LightningModule:
    assert isinstance(callback.deployed_model, LightningModule)
    return callback.deployed_model


# -- what stays float32 -------------------------------------------------------------------------------------------------------


class Kinds(Callback):
    """The dtypes of what is learned, its gradients and what the optimizer keeps for it; what the layers hand on."""

    def __init__(self) -> None:
        self.learned: set[torch.dtype] = set()
        self.passed: set[torch.dtype] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.get_submodule("conv2").register_forward_hook(lambda module, args, out: self.passed.add(out.dtype))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for parameter in learned_parameters(pl_module).values():
            assert parameter.grad is not None
            kept = [value for value in trainer.optimizers[0].state[parameter].values() if isinstance(value, Tensor)]
            self.learned |= {tensor.dtype for tensor in (parameter, parameter.grad, *kept)}


@methods
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_ranges_scales_and_integers_are_of_float32(precision: str, method: str, quiet_trainer: TrainerMaker) -> None:
    """Under autocast the first layer sees float32, too: its range is that of a run in 32; weights make the same integers."""
    states, integers, half = [], [], Kinds()
    for options, watching in (({}, []), (mixed(precision), [half])):
        torch.manual_seed(0)
        model, callback = Lit(lr=0.0, optimizer="adam"), ours(method)
        quiet_trainer(max_epochs=1, callbacks=[callback, *watching], **options).fit(model, loader(), loader(seed=1))
        states.append(quantizer_state(model))
        integers.append([value for value in deployed_of(callback).state_dict().values() if value.dtype == torch.int8])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert half.passed == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert half.learned == ({torch.float32} if method != "qat" else set())
    first = "conv1._input_"
    assert states[0][first] == states[1][first]
    assert all(isinstance(value, int | float) for value in states[1][first].values())
    assert len(integers[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*integers, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_integers_of_weights_by_hand(precision: str, quiet_trainer: TrainerMaker) -> None:
    """round(w / (max |w| / 127)) of each output channel in float64, the sign of gamma on it."""
    model, callback = Lit(lr=0.0), ours()
    with torch.no_grad():
        model.get_submodule("bn1").weight[::2] *= -1  # type: ignore[index,operator]
    quiet_trainer(max_epochs=1, callbacks=[callback], **mixed(precision)).fit(model, loader(), loader(seed=1))
    weight = model.get_submodule("conv1").weight.detach().double()  # type: ignore[operator]
    sign = model.get_submodule("bn1").weight.detach().double().sign().view(-1, 1, 1, 1)  # type: ignore[operator]
    expected = (weight / (weight.abs().amax((1, 2, 3), keepdim=True) / 127)).round() * sign
    found: Any = deployed_of(callback).get_submodule("conv1").weight
    assert torch.equal(found.double(), expected)


class Seen(Callback):
    """What validation gave."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with trainer.precision_plugin.forward_context():
            self.outputs.append(pl_module(X))


@methods
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_what_was_validated_under_autocast_ships_in_float32(precision: str, method: str, quiet_trainer: TrainerMaker) -> None:
    """No float layer stands between: pooling and reshaping move values only, the last layer gives float32."""
    model, callback, seen = Lit(), ours(method), Seen()
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback, seen], **mixed(precision))
    trainer.fit(model, loader(), loader(seed=1))
    assert seen.outputs[-1].dtype == torch.float32
    assert torch.equal(deployed_of(callback)(X), seen.outputs[-1])
    validated = trainer.validate(model, loader(seed=1), verbose=False)
    assert validated == quiet_trainer().validate(deployed_of(callback), loader(seed=1), verbose=False)


def test_a_float_layer_between_computes_in_the_precision_that_is_asked_for(quiet_trainer: TrainerMaker) -> None:
    rule = [{"op_names": ["conv1", "fc"], "fuse_names": [("conv1", "bn1", "relu1")]}]
    model, callback, seen = Lit(), ours("qat", rule), Seen()
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback, seen], precision="bf16-mixed")
    trainer.fit(model, loader(), loader(seed=1))
    deployed = deployed_of(callback)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deployed(X), seen.outputs[-1])
    assert not torch.equal(deployed(X), seen.outputs[-1])
    same = quiet_trainer(precision="bf16-mixed").validate(deployed, loader(seed=1), verbose=False)
    assert same == trainer.validate(model, loader(seed=1), verbose=False)


def test_steps_that_a_scaler_skips_leave_scales_alone(quiet_trainer: TrainerMaker) -> None:
    class Track(Callback):
        def __init__(self) -> None:
            self.values: list[list[float]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.values.append([float(p.detach()) for n, p in learned_parameters(pl_module).items() if "._" in n])

    scaler, track = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15), Track()
    model, callback = Lit(), ours("lsq")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    quiet_trainer(max_epochs=2, callbacks=[callback, track], plugins=plugins).fit(model, loader(), loader(seed=1))
    assert track.values[0] == track.values[1], "begun by the first batch, and its step was skipped, as was the next"
    assert track.values[-1] != track.values[1]
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))


@methods
def test_double_ships_the_same_integers_for_inputs_of_either_kind(method: str, quiet_trainer: TrainerMaker) -> None:
    """What the deployed model gives is of its input's dtype; a layer that was left in float stays float64."""
    model, callback = Lit(), ours(method)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback], precision="64-true")
    trainer.fit(model, loader(), loader(seed=1))
    deployed, double = deployed_of(callback), X.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert deployed(double).dtype == torch.float64
    assert torch.equal(deployed(double), evaluate(model, double))
    assert deployed(X).dtype == torch.float32
    assert torch.equal(deployed(X).double(), deployed(double))
    (validated,) = trainer.validate(model, loader(seed=1), verbose=False)
    (shipped,) = quiet_trainer(precision="64-true").validate(deployed, loader(seed=1), verbose=False)
    assert validated == shipped
    assert torch.equal(deployed.double()(double), evaluate(model, double)), "made double by a Trainer, say"
    state = [tensor for one in quantizer_state(model).values() for tensor in one.values() if isinstance(tensor, Tensor)]
    assert {tensor.dtype for tensor in state} <= {torch.float32}


@pytest.mark.parametrize("config", ["int8-weight-only", "int8"])
def test_a_deployed_model_of_any_kind_of_layer_can_be_made_double(config: str, quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback(config, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    deployed = deployed_of(callback)
    expected, dtypes = evaluate(deployed), {key: value.dtype for key, value in deployed.state_dict().items()}
    found = evaluate(deployed.double(), X.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=1e-6)
    assert {key: value.dtype for key, value in deployed.state_dict().items()} == dtypes
    assert torch.equal(evaluate(deployed), expected)


# -- what is refused -----------------------------------------------------------------------------------------------------------


class TransformerEngine(Precision):
    """Stands for Lightning's plugin, whose package needs a GPU."""

    precision = "transformer-engine"


class BitsandbytesPrecision(Precision):
    """Stands for Lightning's plugin of this name, whose package needs a GPU."""


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_without_integers_weights_may_be_of_half_precision(precision: Any, quiet_trainer: TrainerMaker) -> None:
    """Pruning and distillation alone make no integers of them."""
    torch.manual_seed(0)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    model, teacher = Lit(lr=0.005), Net().to(dtype)
    callback = QuantFusionCallback(
        pruning=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
        distillation=["kl"],
        teacher=teacher,
        source="last",
        verbose=0,
    )
    quiet_trainer(max_epochs=2, plugins=[HalfPrecision(precision)], callbacks=[callback]).fit(model, loader(), loader(seed=1))
    deployed = deployed_of(callback)
    assert {value.dtype for value in deployed.state_dict().values() if value.is_floating_point()} == {dtype}
    assert [tuple(deployed.get_parameter(name).shape) for name in ("conv1.weight", "fc.weight")] == [(4, 3, 3, 3), (4, 64)]
    found, masked = (evaluate(net, X.to(dtype)) for net in (deployed, model))
    assert (found - masked).abs().max() < 0.05 * masked.std(0).max()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bf16-true": ({"precision": "bf16-true"}, r"precision='bf16-true': .*allowed: 32-true, .*Trainer\(precision='bf16-mixed'\)"),
    "16-true": ({"plugins": [HalfPrecision("16-true")]}, r"precision='16-true': .*Use Trainer\(precision='16-mixed'\)"),
    "transformer-engine": ({"plugins": [TransformerEngine()]}, r"precision='transformer-engine': .*precision='bf16-mixed'"),
    "bitsandbytes": ({"plugins": [BitsandbytesPrecision()]}, r"the precision plugin BitsandbytesPrecision: .*'bf16-mixed'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_half_types_for_weights_are_refused_at_setup(name: str, quiet_trainer: TrainerMaker) -> None:
    options, message = REFUSED[name]
    model = Lit()
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(max_epochs=1, callbacks=[ours()], **options).fit(model, loader(), loader(seed=1))
    assert not prepared_groups(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -- torch.compile -------------------------------------------------------------------------------------------------------------

# dynamo looks at the .grad of every tensor; Lightning advises to turn cudagraphs off
slow = pytest.mark.slow  # each compiles for seconds
compiling = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    torch._dynamo.reset()


class Functional(Mute):
    """Its own forward calls operators: they are caught where they are called, compiled or not."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # type: ignore[operator]
        y = F.relu(self.bn2(self.conv2(x)))  # type: ignore[operator]
        out: Tensor = self.fc(F.max_pool2d(x + y, 2).flatten(1))  # type: ignore[operator]
        return out


def fitted(
    make: TrainerMaker, model: LightningModule, wrap: Callable[[LightningModule], Any], method: str, times: int = 1
) -> QuantFusionCallback:
    callback = ours(method, [{"op_types": ["Conv2d", "Linear", *(["add"] if isinstance(model, Functional) else [])]}])
    for _ in range(times):
        make(max_epochs=2, callbacks=[callback]).fit(wrap(model.train()), loader(), loader(seed=1))
    return callback


@compiling
@pytest.mark.parametrize(
    ("kind", "times", "method"),
    [
        (Functional, 1, "qat"),
        (Functional, 2, "lsq"),
        *(
            pytest.param(kind, times, method, marks=slow)
            for kind, times, method in ((Mute, 1, "qat"), (Mute, 1, "lsq"), (Functional, 2, "qat"))
        ),
    ],
)
def test_a_fit_of_a_compiled_module_is_the_eager_one(
    kind: type[Mute], times: int, method: str, quiet_trainer: TrainerMaker
) -> None:
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        model = kind()
        callback = fitted(quiet_trainer, model, wrap, method, times)
        numbers = {**model.state_dict(), **learned_parameters(model)}
        found.append((numbers, str(quantizer_state(model)), str(callback.plan), evaluate(deployed_of(callback))))
        assert torch.equal(found[-1][3], evaluate(model))
    (eager, ranges, plan, out), (compiled, ranges2, plan2, out2) = found
    assert plan == plan2
    if method == "lsq":
        assert all(torch.equal(eager[key], compiled[key]) for key in eager)
        assert ranges == ranges2
        assert torch.equal(out, out2)
    else:  # compiled code divides by a scale that is a tensor of float32, the other by a number of Python
        assert all(torch.allclose(eager[key], compiled[key], rtol=1e-3, atol=1e-3) for key in eager)


@compiling
def test_a_fresh_compiled_module_is_tested_as_the_fitted_one(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    model = Functional()
    callback = fitted(quiet_trainer, model, lambda m: m, "qat")
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model.train(), loader(), loader(seed=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer.test(model, loader(seed=2), verbose=False)
    fresh: Any = torch.compile(Functional(), backend="eager")
    anew = quiet_trainer(callbacks=[QuantFusionCallback(callback.config_list, verbose=0)])
    assert anew.test(fresh, loader(seed=2), ckpt_path=tmp_path / "a.ckpt", verbose=False) == expected


@compiling
def test_the_deployed_model_of_a_compiled_one_is_a_true_copy(quiet_trainer: TrainerMaker) -> None:
    """A deep copy of such a module runs the original's forward, unless what was compiled is dropped."""
    model = Mute()
    deployed = deployed_of(fitted(quiet_trainer, model, lambda m: torch.compile(m, backend="eager"), "qat"))
    expected = evaluate(deployed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not evaluate(model).any()
    assert torch.equal(evaluate(deployed), expected)
    assert deployed._compiler_ctx is None
    assert model._compiler_ctx is not None
    assert not {"forward", "training_step"} & set(vars(deployed))


@compiling
@pytest.mark.parametrize("method", ["qat", pytest.param("lsq", marks=slow)])
def test_the_number_of_graphs_does_not_grow_with_the_steps(method: str, quiet_trainer: TrainerMaker) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    counts: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counts.append(counter.frame_count)

    schedule = {"observe_stop": None, "freeze_batch_norm": None}
    callback = ours(method, [{"op_types": ["Conv2d", "Linear"]}], schedule=schedule)
    model: Any = torch.compile(Mute(), backend=counter)
    quiet_trainer(max_epochs=5, callbacks=[callback, Count()], limit_val_batches=0).fit(model, loader())
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4


class Wraps(LightningModule):
    """Its net is compiled by itself, where `when` says, or not at all."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.net = when, Net()
        if when == "__init__":
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.when == "configure_model":
            self.net, self.when = torch.compile(self.net, backend="eager"), ""  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": ([{"op_names": ["net.conv1", "net.fc"], "fuse_names": [("net.conv1", "net.bn1", "net.relu1")]}], {}),
    "patterns": ([{"op_names_re": [r"net\.conv\d"], "exclude_op_names": ["net.conv2"]}], {}),
    "types": ([{"op_types": ["Conv2d", "Linear"]}], {}),
    "root": ([{"op_names": ["conv1"], "fuse_names": [("conv1", "bn1")]}], {"root": "net"}),
}


@compiling
@pytest.mark.parametrize(
    ("when", "rule", "method"),
    [
        ("__init__", "names", "qat"),
        ("__init__", "root", "lsq"),
        pytest.param("configure_model", "types", "lsq", marks=slow),
        pytest.param("__init__", "patterns", "lsq", marks=slow),
    ],
)
def test_a_net_compiled_by_itself_has_its_own_names(when: str, rule: str, method: str, quiet_trainer: TrainerMaker) -> None:
    config, options = RULES[rule]
    found = []
    for moment in ("never", when):
        torch.manual_seed(0)
        model, callback = Wraps(moment), ours(method, config, **options)
        quiet_trainer(max_epochs=1, limit_train_batches=2, callbacks=[callback]).fit(model, loader(), loader(seed=1))
        deployed = deployed_of(callback)
        assert torch.equal(evaluate(deployed), evaluate(model))
        found.append((list(deployed.state_dict()), str(deployed), evaluate(deployed)))
    assert found[0][:2] == found[1][:2]
    assert not [key for key in found[1][0] if "_orig_mod" in key]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=0 if method == "lsq" else 0.05)


@compiling
def test_a_layer_compiled_by_itself_is_found(quiet_trainer: TrainerMaker) -> None:
    model, callback = Wraps("never"), ours("qat", [{"op_names": ["net.conv1"]}])
    model.net.conv1 = torch.compile(model.net.conv1, backend="eager")  # type: ignore[assignment]
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert type(deployed_of(callback).get_submodule("net.conv1")).__name__ == "IntegerLayer"
    assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))


@pytest.mark.slow
@compiling
def test_compiled_after_fit(quiet_trainer: TrainerMaker) -> None:
    """What is prepared may be compiled: validation gives the same, and so does a fit that goes on."""
    finals = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        model = Mute()
        callback = fitted(quiet_trainer, model, lambda model: model, "qat")
        again: Any = wrap(model)
        validated = quiet_trainer().validate(again, loader(seed=1), verbose=False)
        model.train()
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(again, loader(), loader(seed=1))
        assert torch.equal(evaluate(deployed_of(callback)), evaluate(model))
        finals.append((validated, evaluate(deployed_of(callback))))
    assert finals[0][0] == finals[1][0]
    assert torch.equal(finals[0][1], finals[1][1])
