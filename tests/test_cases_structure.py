# SPDX-License-Identifier: Apache-2.0
"""Owns acceptance cases B1 to B15: fusion of odd structures is right or refused with the reason, and nothing is lost."""

from __future__ import annotations

import copy
import io
import operator
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, fuse_model, make_plan, prepare_model, restore_model
from lightning_quant.layers import LayerPlan, Plan

TrainerMaker = Callable[..., Trainer]
BatchNorm = nn.modules.batchnorm._BatchNorm
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))

# -- what several cases need --------------------------------------------------------------------------------------------


def randomised(model: nn.Module) -> Any:
    """`model` with the statistics, gammas and betas of a trained one, in eval mode."""
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            with torch.no_grad():
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_(std=0.3)
                norm.running_var.uniform_(0.5, 2.0)
                norm.weight.normal_()
                norm.bias.normal_()
    return model.eval()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal, relative to outputs of order 1."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1.0)


def assert_fuses_right(model: nn.Module, groups: Any = None, x: Tensor = X) -> nn.Module:
    """Fused, in eval and train mode, the model is what it was, statistics included; returns the folded one."""
    model.eval()
    folded = fuse_model(model, groups, example_input=x)
    with torch.no_grad():
        assert_same(folded(x), model(x))
        twin = copy.deepcopy(model).train()
        alive = fuse_model(twin, groups, example_input=x)
        for _ in range(2):
            assert_same(alive(x), twin(x))
        for a, b in zip(alive.buffers(), twin.buffers(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        assert_same(alive.eval()(x), twin.eval()(x))
    return folded


def settled(model: nn.Module, *batches: Tensor) -> None:
    """Let running statistics be those of these batches, so that training and eval mode compute nearly the same."""
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()
    for batch in batches:
        model(batch)


def assert_quantizes_right(model: nn.Module, config: Any = "int8", x: Tensor = X) -> tuple[Plan, nn.Module]:
    """After a step the int8 model is near the float one; what is converted is what eval shows."""
    with torch.no_grad():
        settled(model, x)
        expected = model.eval()(x)
    plan = make_plan(model, config, example_input=x)
    prepare_model(model, plan).train()
    with torch.no_grad():
        model(x)
        found = model.eval()(x)
        deployed = convert_model(model)
        assert torch.equal(deployed(x), found)
    assert (found - expected).square().mean() <= 0.002 * (expected - expected.mean()).square().mean()
    restore_model(model)
    return plan, deployed


def layer_of(plan: Plan, name: str) -> LayerPlan:
    return next(layer for layer in plan.layers if layer.name == name)


def notes_of(plan: Plan, name: str) -> str:
    return "; ".join(layer_of(plan, name).notes)


class Pair(nn.Module):
    """conv-bn, conv-bn and one activation; the forwards below join them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return y


# -- structure ----------------------------------------------------------------------------------------------------------


def test_b01_a_relu_that_two_groups_use() -> None:
    """torch.ao: the second use becomes Identity; wrong by 1.60, silently."""
    model = randomised(Pair())
    folded = assert_fuses_right(model)
    assert isinstance(folded.bn1, nn.Identity)
    assert isinstance(folded.bn2, nn.Identity)
    assert isinstance(folded.relu, nn.ReLU)
    plan, deployed = assert_quantizes_right(model)
    assert [layer.fused_with for layer in plan.layers] == [("bn1", "relu_1"), ("bn2", "relu_2")]
    assert (deployed(X) >= 0).all()
    groups = [["conv1", "bn1", "relu"], ["conv2", "bn2", "relu"]]
    for some in (groups[:1], groups[1:], groups):
        assert_fuses_right(model, some)
        heads = [head for head, *_ in some]
        plan, deployed = assert_quantizes_right(model, [{"op_names": heads, "fuse_names": [tuple(group) for group in some]}])
        assert [layer.fused_with for layer in plan.layers] == [(f"bn{h[-1]}", f"relu_{h[-1]}") for h in heads]
        assert (deployed(X) >= 0).all()


@pytest.mark.parametrize("relu", [nn.PReLU(), nn.ReLU()], ids=["own parameter", "hook"])
def test_b01_an_activation_that_is_no_function_stays_one_module(relu: nn.Module) -> None:
    model = randomised(Pair())
    model.relu = relu
    if isinstance(relu, nn.ReLU):
        relu.register_forward_hook(lambda *_: None)
    plan, _ = assert_quantizes_right(model)
    assert [layer.fused_with for layer in plan.layers if layer.folds] == [("bn1",), ("bn2",)]
    why = "'relu' is called 2 times and 'bn1' once; a shared module cannot be fused"
    assert why in notes_of(plan, "conv1")
    for mode in (True, False):
        with pytest.raises(ConfigError, match=why):
            fuse_model(model.train(mode), [["conv1", "bn1", "relu"]], example_input=X)
    with pytest.raises(ConfigError, match="'relu' is already fused in"):
        fuse_model(model, [["conv1", "bn1", "relu"], ["conv2", "bn2", "relu"]], example_input=X)


def test_b02_members_that_are_not_adjacent() -> None:
    """torch.ao fuses conv1 with bn2: wrong by 1.49, silently."""
    model, why = randomised(Pair()), r"'bn2' does not read the output of 'conv1' \(that is read by 'bn1'\)"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in (True, False):
        with pytest.raises(ConfigError, match=why):
            fuse_model(model.train(mode), [["conv1", "bn2"]], example_input=X, inplace=True)
    with pytest.raises(ConfigError, match=why):
        make_plan(model, [{"op_names": ["conv1"], "fuse_names": [("conv1", "bn2")]}], example_input=X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model.conv1) is nn.Conv2d


class Skip(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        out: Tensor = self.relu(self.bn1(y)) + y
        return out


def test_b03_a_convolution_with_a_second_consumer() -> None:
    model, why = randomised(Skip()), "the output of 'conv1' is also read by 'add'"
    assert isinstance(assert_fuses_right(model).bn1, nn.BatchNorm2d)
    for mode in (True, False):
        with pytest.raises(ConfigError, match=why):
            fuse_model(model.train(mode), [["conv1", "bn1"]], example_input=X)
    plan, _ = assert_quantizes_right(model)
    assert layer_of(plan, "conv1").fused_with == ()
    assert f"not fused further: {why}" in notes_of(plan, "conv1")
    assert layer_of(plan, "bn1").fused_with == ("relu",)


class Siamese(Pair):
    def trunk(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return (self.trunk(x) - self.trunk(x.flip(3))).abs()


class Levels(Pair):
    """One convolution, a batch norm for each level."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv1(x.flip(3)))], 1)


def test_b04_a_convolution_called_twice_with_its_batch_norm() -> None:
    model = randomised(Siamese())
    assert isinstance(assert_fuses_right(model).bn1, nn.Identity)
    plan, _ = assert_quantizes_right(model)
    assert layer_of(plan, "conv1").fused_with == ("bn1", "relu")
    assert "called 2 times: one range for all" in notes_of(plan, "conv1")


def test_b04_a_convolution_with_a_batch_norm_for_each_level() -> None:
    model, why = randomised(Levels()), "'bn1' is called once and 'conv1' 2 times; a shared module cannot be fused"
    assert isinstance(assert_fuses_right(model).bn1, nn.BatchNorm2d)
    with pytest.raises(ConfigError, match=why):
        fuse_model(model, [["conv1", "bn1"]], example_input=X)
    with pytest.raises(ConfigError, match=why):
        fuse_model(model, [["conv1", "bn1"], ["conv1", "bn2"]], example_input=X)
    plan, _ = assert_quantizes_right(model)
    assert layer_of(plan, "conv1").fused_with == ()
    assert why in notes_of(plan, "conv1")


@pytest.mark.parametrize("training", [True, False])
def test_b05_fusing_twice_changes_nothing(training: bool) -> None:
    """torch.ao: AssertionError."""
    model = randomised(Net()).train(training)
    once = fuse_model(model, example_input=X)
    before = [(name, type(module)) for name, module in once.named_modules()]
    numbers = {name: value.clone() for name, value in once.state_dict().items()}
    for groups in (None, [["conv1", "bn1", "relu1"]]) if training else (None,):
        twice = fuse_model(once, groups, example_input=X)
        assert [(name, type(module)) for name, module in twice.named_modules()] == before
        assert all(torch.equal(numbers[name], value) for name, value in twice.state_dict().items())
    assert before != [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        assert_same(twice.eval()(X), model.eval()(X))
    prepare_model(model, make_plan(model, "int8", example_input=X))
    with pytest.raises(ConfigError, match="already prepared"):
        make_plan(model, "int8", example_input=X)
    with pytest.raises(ConfigError, match="is prepared for quantization, which fuses"):
        fuse_model(model, example_input=X)


class SameForward(nn.Conv2d):
    """A Conv2d with a method of its own and the forward of torch's."""

    def cost(self) -> int:
        return self.weight.numel()


class OwnForward(nn.Conv2d):
    """A convolution that scales what it returns."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def test_b06_a_subclass_with_the_same_forward_is_fused() -> None:
    """torch.ao: no fuser method for it; Horizon does not convert it and fails later."""
    model = randomised(nn.Sequential(SameForward(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    folded = assert_fuses_right(model)
    assert isinstance(folded.get_submodule("1"), nn.Identity)
    assert type(folded.get_submodule("0")) is SameForward
    plan, _ = assert_quantizes_right(model)
    assert [(layer.type, layer.fused_with) for layer in plan.layers] == [("Conv2d", ("1", "2"))]
    prepare_model(model, plan)
    assert isinstance(model[0], SameForward)
    assert model[0].cost() == 6 * 3 * 9


def test_b06_a_subclass_with_its_own_forward_is_not() -> None:
    model = randomised(nn.Sequential(OwnForward(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    assert isinstance(assert_fuses_right(model).get_submodule("1"), nn.BatchNorm2d)
    plan, _ = assert_quantizes_right(model)
    assert "Conv2d leaves out 0 (OwnForward): a forward of its own" in str(plan)
    assert plan.left["0"] == "not selected"
    with pytest.raises(ConfigError, match=r"\(OwnForward, BatchNorm2d\) is no pattern that fuses"):
        fuse_model(model, [["0", "1"]], example_input=X)


# -- hooks --------------------------------------------------------------------------------------------------------------

Event = tuple[str, Any]


def hooked(model: nn.Module, events: list[Event]) -> list[Any]:
    """Hooks of every kind on the first, the middle and the last member of the first group; what they saw goes to `events`."""

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *given: Any) -> None:
            tensors = [value for value in given if isinstance(value, Tensor)]
            tensors += [value for part in given if isinstance(part, tuple) for value in part]
            tensors += [value for part in given if isinstance(part, dict) for value in part.values()]
            events.append((name, [tensor.detach().clone() for tensor in tensors]))

        return hook

    conv, norm, relu = (model.get_submodule(name) for name in ("conv1", "bn1", "relu1"))
    return [
        conv.register_forward_pre_hook(see("conv pre")),
        conv.register_forward_pre_hook(see("conv pre, with kwargs"), with_kwargs=True),
        conv.register_forward_pre_hook(see("conv pre, prepended"), prepend=True),
        conv.register_forward_hook(see("conv post")),
        conv.register_forward_hook(see("conv post, always"), always_call=True),
        norm.register_forward_pre_hook(see("bn pre")),
        norm.register_forward_hook(see("bn post, with kwargs"), with_kwargs=True),
        relu.register_forward_pre_hook(see("relu pre")),
        relu.register_forward_hook(see("relu post")),
        relu.register_forward_hook(see("relu post, prepended"), prepend=True),
        relu.register_forward_hook(see("relu post, always, with kwargs"), with_kwargs=True, always_call=True),
    ]


class Keywords(Net):
    """Net, whose first convolution is called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(input=x)))
        out: Tensor = self.fc(self.pool(self.relu2(self.bn2(self.conv2(x)))).flatten(1))
        return out


def _fused(model: nn.Module, how: str) -> None:
    if how.startswith("fused"):
        fuse_model(model.train(how.endswith("train")), example_input=X, inplace=True)
    else:
        prepare_model(model, make_plan(model.eval(), FUSED, example_input=X)).train()
        if how.endswith("eval"):
            model(X)
            model.eval()


@pytest.mark.parametrize("make", [Net, Keywords])
@pytest.mark.parametrize("how", ["fused, eval", "fused, train", "prepared, train", "prepared, eval"])
def test_b07_hooks_fire_once_in_order_and_can_be_removed(how: str, make: type[Net]) -> None:
    """torch.ao: pre-hooks twice, middle ones lost, handles dead, with_kwargs a TypeError."""
    model, wanted, found = randomised(make()), list[Event](), list[Event]()
    twin = copy.deepcopy(model).train(how.endswith("train"))
    hooked(twin, wanted)
    handles = hooked(model, found)
    _fused(model, how)
    found.clear()
    with torch.no_grad():
        twin(X)
        model(X)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert len({name for name, _ in found}) == len(found) == len(handles)
    saw = dict(found)
    for name, expected in wanted:
        assert len(saw[name]) == len(expected), name
        if how == "fused, eval" and name.startswith(("conv post", "bn")):
            continue  # between the members of a folded group stands the folded output
        for a, b in zip(saw[name], expected, strict=True):
            if how.startswith("fused"):
                assert_same(a, b)
            elif how == "prepared, train":  # on batch statistics, rounded
                assert (a - b).abs().max() <= 0.04 * b.abs().max(), name
    assert saw["relu post"][0].min() >= 0
    for handle in handles:
        handle.remove()
    found.clear()
    model(X)
    assert not found
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", ["fused, eval", "fused, train", "prepared, train", "prepared, eval"])
def test_b07_hooks_may_be_added_later_change_values_and_always_run(how: str) -> None:
    model, seen = randomised(Net()), list[str]()
    _fused(model, how)
    with torch.no_grad():
        before = model(X)
        handle = model.relu1.register_forward_hook(lambda *_: torch.zeros(8, 8, 8, 8))
        assert not torch.allclose(model(X), before)
        handle.remove()
        pre = model.conv1.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 0,), kwargs), with_kwargs=True)
        assert not torch.allclose(model(X), before)
        pre.remove()
        model.conv1.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
        model.conv1.register_forward_hook(lambda *_: seen.append("else"))
        with pytest.raises(RuntimeError):
            model.conv1(torch.ones(1, 5, 8, 8))
    assert seen == ["always"]


def test_b07_backward_hooks_stay() -> None:
    model, seen = randomised(Net()), list[str]()
    for name in ("conv1", "bn1", "relu1"):
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.append(name))
    twin = copy.deepcopy(model)
    for how in ("fused, train", "prepared, train"):
        net = copy.deepcopy(twin)
        _fused(net, how)
        seen.clear()
        net(X.clone().requires_grad_()).sum().backward()
        assert seen == ["relu1", "bn1", "conv1"]


def test_b07_hooks_are_named_in_the_plan_and_not_deployed() -> None:
    model, seen = randomised(Net()), list[Event]()
    hooked(model, seen)
    with pytest.warns(UserWarning, match="hooks on conv1, relu1 are not in the deployed copy. If one of them changes"):
        plan, deployed = assert_quantizes_right(model, FUSED)
    assert "hooks on conv1, bn1, relu1 run while training and are not deployed" in notes_of(plan, "conv1")
    seen.clear()
    deployed(X)
    assert not seen


# -- optimizers, state dicts, copies ------------------------------------------------------------------------------------


def _all_parts_train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model.train()(X), torch.arange(8) % 4).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("how", ["fused, train", "prepared, train", "callback"])
def test_b08_an_optimizer_made_before_holds_every_tensor(how: str, quiet_trainer: TrainerMaker) -> None:
    """torch.ao's eval fold leaves stale tensors in it."""
    model = Lit(lr=0.01) if how == "callback" else randomised(Net())
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    parts: list[dict[str, Any]] = [{"params": biases, "weight_decay": 0.0}, {"params": others}]
    optimizer = torch.optim.SGD(parts, lr=0.5, weight_decay=0.1)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    if how == "callback":
        callback = QuantFusionCallback("int8", verbose=0)
        quiet_trainer(callbacks=[callback], max_epochs=1).fit(model, loader(), loader(16))
    else:
        _fused(model, how)
    for _ in range(2):
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
        assert {id(p) for p in model.parameters()} == {id(p) for p in (*biases, *others)}
        _all_parts_train(model, optimizer)
        restore_model(model)


def test_b08_folding_in_place_keeps_the_tensors_that_remain() -> None:
    model = randomised(Net())
    weight, bias = model.conv1.weight, model.fc.bias
    fuse_model(model, example_input=X, inplace=True)
    assert model.conv1.weight is weight
    assert model.fc.bias is bias
    assert model.conv1.bias.requires_grad  # torch.ao: a new bias does not train
    assert {name for name, _ in model.named_parameters()} == {
        f"{n}.{p}" for n in ("conv1", "conv2", "fc") for p in ("weight", "bias")
    }


@pytest.mark.parametrize("how", ["fused, train", "prepared, train"])
def test_b09_state_dict_keys_are_the_originals(how: str) -> None:
    """torch.ao changes them three times; a float checkpoint loads into no fused model."""
    model, other = randomised(Net()), randomised(Net())
    keys = list(model.state_dict())
    _fused(model, how)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in Net().named_parameters()]
    model.load_state_dict(other.state_dict(), strict=True)
    back = Net()
    back.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(back.eval()(X), other(X))
    restore_model(model)
    assert list(model.state_dict()) == keys


class Operators(Pair):
    """Convolutions joined by operators that are called as functions."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(y)) + y
        return torch.cat([F.relu(z), y], 1).mean((2, 3))


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
        "copy of a copy": copy.deepcopy(pickle.loads(pickle.dumps(model))),
    }


@pytest.mark.parametrize("make", [Net, Operators])
def test_b10_copies_compute_the_same(make: type[nn.Module]) -> None:
    model = randomised(make())
    plan = make_plan(model, "int8", example_input=X)
    assert any(layer.operator for layer in plan.layers) == (make is Operators)
    prepare_model(model, plan).train()(X)
    later = torch.flip(X, (3,)) * 1.5
    copies = _copies(model)
    assert len(copies) == 4
    trained = copy.deepcopy(model)(later).detach()
    with torch.no_grad():
        wanted = model.eval()(later)
        deployed = convert_model(model)
    for name, one in copies.items():
        assert one.training, name
        assert torch.equal(one(later), trained), name  # moves its own ranges only
    with torch.no_grad():
        assert torch.equal(model(later), wanted), "a copy's ranges moved the model's"
        for name, one in _copies(model).items():
            assert torch.equal(one(later), wanted), name
            assert torch.equal(convert_model(one)(later), wanted), name
            assert type(restore_model(one)) is make, name
        for name, one in _copies(deployed).items():
            assert torch.equal(one(later), wanted), name
            assert not one.training


def test_b10_saved_converted_models_load_in_a_new_process(tmp_path: Path) -> None:
    saved: list[nn.Module] = []
    for make in (Net, Operators):
        model = randomised(make())
        prepare_model(model, make_plan(model, "int8", example_input=X)).train()(X)
        saved.append(convert_model(model))
    torch.save((saved, X), tmp_path / "models.pt")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        f"models, x = torch.load({str(tmp_path / 'models.pt')!r}, weights_only=False)\n"
        "with torch.no_grad():\n"
        f"    torch.save([model(x) for model in models], {str(tmp_path / 'outputs.pt')!r})"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    with torch.no_grad():
        for found, deployed in zip(torch.load(tmp_path / "outputs.pt"), saved, strict=True):
            assert torch.equal(found, deployed(X))


# -- containers, operators, reparametrized weights ----------------------------------------------------------------------


def test_b11_a_sequential_keeps_its_length_and_indices() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    names = [name for name, _ in model.named_modules()]
    last = model[2]
    plan, deployed = assert_quantizes_right(model)
    assert layer_of(plan, "0").fused_with == ("1", "2")
    alive = fuse_model(model.train(), example_input=X)
    folded = fuse_model(model.eval(), example_input=X)
    prepare_model(model, plan)
    for one in (model, alive, folded, deployed):
        assert isinstance(one, nn.Sequential)
        assert len(one) == 4
        assert len(list(one)) == 4
        assert isinstance(one[2], nn.Module)
        assert [name for name, _ in one.named_modules() if "." not in name] == names
    assert model[2] is last
    y = X
    with torch.no_grad():
        for layer in deployed.children():
            y = layer(y)
        assert torch.equal(y, deployed(X))


class EveryOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = F.relu(self.a(x)), self.b(x)
        one = torch.add(p, q)
        two = p + q
        two += one
        three = operator.add(one, q)
        out: Tensor = self.c(torch.cat([one, two, three, torch.relu(one)], 1))
        return out


def test_b12_operators_are_found_without_edits() -> None:
    """torch.ao and Horizon: to be rewritten as FloatFunctional and modules by hand."""
    plan, deployed = assert_quantizes_right(randomised(EveryOperator()))
    found = [(layer.name, layer.fused_with) for layer in plan.layers]
    wanted = [("a", ("relu",)), ("b", ()), ("c", ())]
    wanted += [("add", ()), ("add_1", ()), ("add_2", ()), ("add_3", ()), ("cat", ())]
    assert found == wanted
    assert plan.left == {"relu_1": "not selected"}
    assert all("_output_" in layer.targets for layer in plan.layers)
    for name in ("add", "add_1", "add_2", "add_3", "cat"):
        assert layer_of(plan, name).type == name.split("_")[0]
        assert isinstance(deployed.get_submodule(name), nn.Module)


class Branches(nn.Module):
    """Which operators run is for the data to say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x))
        y = y + 1 if x.sum() > 0 else torch.tanh(y)
        out: Tensor = self.b(y)
        return out


@pytest.mark.parametrize("known", [None, 1.0, -1.0], ids=["no example", "first branch", "second branch"])
def test_b12_control_flow_is_right_on_every_branch(known: float | None) -> None:
    """Where one branch was recorded, the other one is quantized by its modules, or it is said."""
    model, batches = randomised(Branches()), [X + 1, X - 1]
    plan = make_plan(model, "int8", example_input=None if known is None else X + known)
    found = [(layer.name, layer.fused_with) for layer in plan.layers]
    if known is None:
        assert found == [("a", ()), ("bn", ()), ("b", ())]
        assert "tracing failed: symbolically traced variables cannot be used as inputs to control flow" in plan.notes[0]
        assert "nothing is fused; give example_input" in plan.notes[0]
        assert all(target.source is None for layer in plan.layers for target in layer.targets.values())
    else:
        assert found == ([("a", ("bn",)), ("b", ()), ("add", ())] if known > 0 else [("a", ("bn", "tanh")), ("b", ())])
    with torch.no_grad():
        settled(model, *batches)
        expected = [model.eval()(x) for x in batches]
        if known == -1.0:  # tanh is not where the convolution's output goes on the other branch
            prepare_model(model, plan).train()
            for x in batches * 2:
                model(x)
            with pytest.raises(
                ConfigError, match=r"'a': 2 of \d tensors did not go through what is fused.*Give fuse_names: \[\]"
            ):
                convert_model(model)
            plan = make_plan(restore_model(model), ["int8", {"op_names": ["a"], "fuse_names": []}], example_input=X - 1)
        if known == 1.0:  # nor does b read the sum on the other branch, whose range it would have
            prepare_model(model, plan).train()
            for x in batches * 2:
                model(x)
            with pytest.raises(ConfigError, match=r"'b': 2 of 4 inputs did not come from.*'add._output_'"):
                convert_model(model)
            plan = make_plan(restore_model(model), [{"op_types": ["Conv2d"]}], example_input=X + 1)
        prepare_model(model, plan).train()
        for x in batches * 100:
            model(x)
        deployed = convert_model(model.eval())
        for x, wanted in zip(batches, expected, strict=True):
            assert torch.equal(deployed(x), model(x))
            assert (deployed(x) - wanted).abs().mean() <= 0.1 * wanted.abs().mean()


class Producers(nn.Module):
    """On one branch an addition makes what the second layer reads, on the other an exponential, which is no setting's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).abs()
        y = torch.tanh(y) + 0.1 if x.sum() > 0 else torch.exp(y)
        out: Tensor = self.b(y)
        return out


def test_b12_a_range_of_one_branch_is_not_that_of_the_other() -> None:
    model, batches = Producers(), [X + 1, X - 1]
    plan = make_plan(model, ["int8", {"op_types": ["add"]}], example_input=batches[0])
    with torch.no_grad():
        expected = [model(x) for x in batches]
        prepare_model(model, plan).train()
        for x in batches * 100:
            model(x)
        try:
            deployed = convert_model(model.eval())
        except ConfigError as refused:
            assert "branches" in str(refused)  # noqa: PT017
            return
        for x, wanted in zip(batches, expected, strict=True):
            assert (deployed(x) - wanted).abs().mean() <= 0.1 * wanted.abs().mean()


REPARAMETRIZED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm by hook": nn.utils.spectral_norm,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_b13_computed_weights_are_refused_and_the_rest_goes_on(name: str) -> None:
    conv = REPARAMETRIZED[name](nn.Conv2d(3, 6, 3))
    model = randomised(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)))
    model(X).sum().backward()  # leaves tensors behind that no deepcopy of torch takes
    model.zero_grad()
    why = "the weight of '0' is no Parameter of its own"
    with pytest.raises(ConfigError, match=why):
        make_plan(model, [{"op_names": ["0"]}], example_input=X)
    for mode in (True, False):
        with pytest.raises(ConfigError, match=why):
            fuse_model(model.train(mode), [["0", "1"]], example_input=X)
    folded = fuse_model(model.eval(), example_input=X)
    assert isinstance(folded.get_submodule("1"), nn.BatchNorm2d)
    assert isinstance(folded.get_submodule("4"), nn.Identity)
    with torch.no_grad():
        expected = model(X)
        assert_same(folded(X), expected)
    plan = make_plan(model, "int8", example_input=X)
    assert why in str(plan)
    assert [(layer.name, layer.fused_with) for layer in plan.layers] == [("1", ("2",)), ("3", ("4",))]
    prepare_model(model, plan).train()
    model(X).sum().backward()
    deployed = convert_model(model)
    with torch.no_grad():
        assert torch.equal(deployed(X), model.eval()(X))


def test_b13_a_pruned_layer_does_not_stop_the_end_of_fit(quiet_trainer: TrainerMaker) -> None:
    model, callback = Lit(), QuantFusionCallback("int8", verbose=0)
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    quiet_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(model, loader(), loader(16))
    assert not model.conv1.weight.is_leaf  # type: ignore[union-attr]
    assert callback.deployed_model is not None
    with torch.no_grad():
        assert torch.equal(callback.deployed_model(X), model.eval()(X))


def test_b13_after_remove_parametrizations_it_is_a_layer_like_any_other() -> None:
    model = randomised(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)))
    with torch.no_grad():
        expected = model(X)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert isinstance(assert_fuses_right(model).get_submodule("1"), nn.Identity)
    with torch.no_grad():
        assert_same(model(X), expected)


# -- what is said -------------------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"op_names": ["conv_1"]}, r"op_names 'conv_1' matches no module. Close: 'conv1'"),
    "operator": ({"op_names": ["adds"]}, r"op_names 'adds' matches no module. Close: 'add'"),
    "type": ({"op_types": ["Conv2D"]}, r"op_types 'Conv2D' matches no module; .*Did you mean 'Conv2d'\?"),
    "pattern": ({"op_names_re": [r"layer\d"]}, r"op_names_re 'layer\\\\d' matches no module; the model has 'conv1'"),
    "exclusion": ({"op_types": ["Conv2d"], "exclude_op_names": ["conv9"]}, "exclude_op_names 'conv9' matches no module"),
    "group": (
        {"op_names": ["conv1"], "fuse_names": [("conv1", "bm1")]},
        r"'bm1' names nothing that can be fused. Close: 'bn1'",
    ),
    "operator in a group": (
        {"op_names": ["conv1"], "fuse_names": [("conv1", "bn1", "rely")]},
        "'rely' names nothing that can be fused. Close: 'relu'",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_b14_what_matches_nothing_is_an_error_with_close_matches(case: str) -> None:
    """Horizon and torch.ao are silent."""
    entry, message = NOTHING[case]
    with pytest.raises(ConfigError, match=message):
        make_plan(Operators(), [entry], example_input=X)
    if "fuse_names" in entry:
        with pytest.raises(ConfigError, match=message) as caught:
            fuse_model(Operators(), [list(group) for group in entry["fuse_names"]], example_input=X)
        assert str(caught.value).startswith("fuse_model: group ")


class Candidates(nn.Module):
    """24 layers that could be fused with what follows, each fourth in a way that allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if not i else 4, 4, 3, padding=1) for i in range(24))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, track_running_stats=i % 4 != 2) for i in range(24))
        self.shared = nn.ReLU()
        self.never = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = conv(x)
            z = norm(y)
            if i % 4 == 0:  # fused to its end; the activation is shared
                x = self.shared(z)
            elif i % 4 == 1:  # a second consumer
                x = F.relu(z) + y
            elif i % 4 == 2:  # no running statistics
                x = torch.erf(z)
            else:  # fused to its end
                x = F.relu(z)
        return x


def test_b15_a_report_of_24_candidates() -> None:
    model = Candidates()
    plan = make_plan(model, "int8", example_input=X)
    report = str(plan)
    layers = {layer.name: layer for layer in plan.layers}
    rows = {line.split("  ")[0]: line for line in report.splitlines()}
    for i in range(24):
        name, norm = f"convs.{i}", f"norms.{i}"
        fused, why = {
            0: ((norm, f"shared_{i // 4 + 1}"), ""),
            1: ((), f"not fused further: the output of '{name}' is also read by '{'add' if i == 1 else f'add_{i // 4}'}'"),
            2: ((), f"not fused further: '{norm}' has no running statistics"),
            3: ((norm, f"relu_{i // 4 * 2 + 1}"), ""),
        }[i % 4]
        assert layers[name].fused_with == fused
        assert why in rows[name]
        assert "not fused" in rows[name] or not why
        assert all(member in rows[name] for member in fused)
    assert f"in float, no setting for erf: {', '.join(['erf', *(f'erf_{i}' for i in range(1, 6))])}" in report
    assert "never (Conv2d) is not called in the recorded forward and stays float" in report
    prepare_model(model, plan)
    with pytest.raises(
        ConfigError, match=r"no range was observed for .*\bconvs.0._input_, .*\bconvs.23._output_.*: run training steps"
    ):
        convert_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(X)
    with torch.no_grad():
        assert torch.equal(convert_model(model)(X), model.eval()(X))
