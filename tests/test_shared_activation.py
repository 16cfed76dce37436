# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that an activation which several layers share is fused with each of them, call by call.

The reference is the same net with an activation of its own at every call: it must plan, train and deploy alike, bit for bit.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_quant import (
    ConfigError,
    convert_model,
    export_model,
    fuse_model,
    load_deployed,
    make_plan,
    prepare_model,
    register_fusion,
    restore_model,
)
from lightning_quant.layers import Plan
from lightning_quant.patterns import USER_ROWS
from lightning_quant.prepare import quantizers_of
from lightning_quant.sites import SHARED

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
INT8 = "int8"


class Block(nn.Module):
    """torchvision's BasicBlock; `own` gives every call an activation of its own."""

    def __init__(self, inputs: int, outputs: int, act: Callable[[], nn.Module], own: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.relu = act()
        self.relu2 = act() if own else self.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        y: Tensor = self.relu2(out)
        return y


def net(own: bool, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two blocks and a head."""
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(Block(3, 6, act, own), Block(6, 6, act, own), pool)


def steps(model: nn.Module, number: int = 3) -> list[Tensor]:
    """The outputs and last gradients of some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    seen: list[Tensor] = []
    for step in range(number):
        optimizer.zero_grad()
        y: Tensor = model(X + 0.1 * step)
        y.square().mean().backward()
        optimizer.step()
        seen.append(y.detach())
    return [*seen, *(p.grad for p in model.parameters() if p.grad is not None)]


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(X)
    return y


def groups(plan: Plan) -> list[tuple[str, int]]:
    """The quantized layers, and how many more are fused with each."""
    return [(layer.name, len(layer.fused_with)) for layer in plan.layers]


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU,
        lambda: nn.ReLU(True),
        nn.ReLU6,
        lambda: nn.Hardtanh(-0.5, 0.7),
        nn.SiLU,
        nn.GELU,
        lambda: nn.LeakyReLU(0.2),
    ],
    ids=["relu", "in place", "relu6", "hardtanh", "silu", "gelu", "leaky"],
)
@pytest.mark.parametrize("example", [X, None], ids=["recorded", "traced"])
def test_it_is_as_if_every_call_had_an_activation_of_its_own(act: Callable[[], nn.Module], example: Tensor | None) -> None:
    shared, own = net(False, act), net(True, act)
    before = {name: type(module) for name, module in shared.named_modules()}
    plan, twin = (make_plan(model, INT8, example_input=example) for model in (shared, own))
    assert groups(plan) == groups(twin)
    curve = act in (nn.SiLU, nn.GELU) or isinstance(act(), nn.LeakyReLU)
    assert ("0.add", 0 if curve else 1) in groups(plan)
    assert next(layer for layer in plan.layers if layer.name == "0.conv1").fused_with == ("0.bn1", "0.relu_1")
    prepare_model(shared, plan)
    prepare_model(own, twin)
    for a, b in zip(steps(shared), steps(own), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(evaluated(shared), evaluated(own))
    deployed = convert_model(shared)
    assert torch.equal(evaluated(deployed), evaluated(own))
    restore_model(shared)
    assert {name: type(module) for name, module in shared.named_modules()} == before
    assert not any(SHARED in vars(module) for module in shared.modules())
    assert torch.equal(evaluated(shared), evaluated(restore_model(own)))


def test_files_copies_and_pickles_of_it_compute_the_same(tmp_path: Path) -> None:
    model = net(False)
    prepare_model(model, make_plan(model, INT8, example_input=X))
    steps(model)
    expected = evaluated(model)
    assert torch.equal(evaluated(copy.deepcopy(model)), expected)
    deployed = convert_model(model)
    for one in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(evaluated(one), expected)
    export_model(deployed, tmp_path / "net.pt2", example_input=X)
    assert torch.equal(load_deployed(tmp_path / "net.pt2")(X), expected)
    onnx = pytest.importorskip("onnx")
    export_model(deployed, tmp_path / "net.onnx", example_input=X)
    types = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert "Relu" not in types
    assert "Add" in types


ENTRIES: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "named": ({"op_names": ["0.relu"]}, {"0.relu_1": (), "0.relu_2": ()}),
    "one call named": ({"op_names": ["0.relu_2"]}, {"0.relu_2": ()}),
    "pattern": ({"op_names_re": [r"1\.relu$"]}, {"1.relu_1": (), "1.relu_2": ()}),
    "type": ({"op_types": ["ReLU"]}, dict.fromkeys(("0.relu_1", "0.relu_2", "1.relu_1", "1.relu_2"), ())),
    "the function's type": ({"op_types": ["relu"], "op_names_re": ["0"]}, {"0.relu_1": (), "0.relu_2": ()}),
    "all but": ({"op_types": ["ReLU"], "exclude_op_names": ["1.relu", "0.relu_1"]}, {"0.relu_2": ()}),
    "a group": (
        {"op_names": ["0.conv1"], "fuse_names": [("0.conv1", "0.bn1", "0.relu")]},
        {"0.conv1": ("0.bn1", "0.relu_1")},
    ),
    "a group of the second call": (
        {"op_names": ["0.add"], "fuse_names": [("0.add", "0.relu")]},
        {"0.add": ("0.relu_2",)},
    ),
    "fused and alone": (
        {"op_names": ["0.conv1", "0.relu"]},
        {"0.conv1": ("0.bn1",), "0.relu_1": (), "0.relu_2": ()},
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_calls_are_selected_by_the_activation_and_one_by_one(case: str) -> None:
    entry, expected = ENTRIES[case]
    model = net(False)
    plan = make_plan(model, [entry], example_input=X)
    assert {layer.name: layer.fused_with for layer in plan.layers} == expected
    prepare_model(model, plan)
    steps(model)
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


def test_it_may_have_two_names() -> None:
    model = net(False)
    assert model[0].relu2 is model[0].relu
    plans = [make_plan(model, [{"op_names": [name]}], example_input=X) for name in ("0.relu", "0.relu2")]
    assert [[layer.name for layer in plan.layers] for plan in plans] == [["0.relu_1", "0.relu_2"]] * 2
    entry = {"op_names": ["0.add"], "fuse_names": [("0.add", "0.relu2")]}
    assert make_plan(model, [entry], example_input=X).layers[0].fused_with == ("0.relu_2",)


def test_a_call_alone_says_whose_it_is() -> None:
    plan = make_plan(net(False), [{"op_names": ["0.relu"]}], example_input=X)
    assert [layer.notes for layer in plan.layers] == [("a call of 0.relu",)] * 2


def test_names_are_relative_to_root() -> None:
    model = nn.ModuleDict({"other": nn.ReLU(), "net": net(False)})
    plan = make_plan(model, INT8, example_input=X, root="net")
    assert {operator.site.through for operator in plan.operators.values()} >= {"net.0.relu", "net.1.relu"}
    prepare_model(model, plan)
    own = net(True)
    prepare_model(own, make_plan(own, INT8, example_input=X))
    for a, b in zip(steps(model["net"]), steps(own), strict=True):
        assert torch.equal(a, b)


def test_one_module_in_the_whole_net() -> None:
    """Sequentials call it at one place of torch's own code; the how manyth call it is tells."""
    act = nn.ReLU()

    def layers(act: Callable[[], nn.Module]) -> nn.Sequential:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(6, 6, 3), act(), nn.Conv2d(6, 6, 1), act())
        return nn.Sequential(nn.Conv2d(3, 6, 3), act(), inner, nn.Conv2d(6, 6, 1), act(), nn.Flatten(), nn.Linear(96, 4))

    shared, own = layers(lambda: act), layers(nn.ReLU)
    for model in (shared, own):
        prepare_model(model, make_plan(model, INT8, example_input=X))
    for a, b in zip(steps(shared), steps(own), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(evaluated(convert_model(shared)), evaluated(own))


class Loop(nn.Module):
    """One layer and one activation, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.relu(self.conv(x))
        return x


def test_a_loop_is_one_group() -> None:
    model = Loop()
    plan = make_plan(model, INT8, example_input=X)
    assert groups(plan) == [("conv", 1)]
    assert plan.layers[0].fused_with == ("relu",)
    prepare_model(model, plan)
    steps(model)
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


class Recomputed(nn.Module):
    """The first call is in a checkpoint, whose second run, in backward, cannot be caught."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: self.relu(self.conv1(x)), x, use_reentrant=False)
        z: Tensor = self.relu(self.conv2(y))
        return z


def test_in_a_checkpoint_it_stays_one_module() -> None:
    model = Recomputed()
    plan = make_plan(model, [{"op_types": ["Conv2d", "ReLU"]}], example_input=X)
    assert groups(plan) == [("conv1", 0), ("conv2", 0), ("relu", 0)]
    prepare_model(model, plan)
    steps(model)
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


class Skipping(nn.Module):
    """Blocks that can be left out, as in LayerDrop; the last one has a GroupNorm, so nothing is fused there."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
        self.acts = nn.ModuleList([nn.ReLU() for _ in range(3)] if own else [nn.ReLU()] * 3)
        self.skipped = -1

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm, act) in enumerate(zip(self.convs, self.norms, self.acts, strict=True)):
            if i != self.skipped:
                x = act(norm(conv(x)))
        return x


def test_a_skipped_block_does_not_shift_what_is_deployed() -> None:
    outputs: list[Tensor] = []
    for own in (False, True):
        model = Skipping(own)
        prepare_model(model, make_plan(model, [{"op_types": ["Conv2d"]}], example_input=X))
        steps(model)
        deployed = convert_model(model)
        model.skipped = deployed.skipped = 1  # type: ignore[assignment]
        assert (evaluated(deployed) >= 0).all(), "the last activation is still there"
        assert torch.equal(evaluated(deployed), evaluated(model))
        outputs.append(evaluated(deployed))
    assert torch.equal(*outputs)


def test_a_block_skipped_in_training_leaves_the_ranges_of_others_alone() -> None:
    states = []
    for own in (False, True):
        model = Skipping(own)
        with torch.no_grad():
            model.norms[2].weight.fill_(50.0)  # type: ignore[operator]
        prepare_model(model, make_plan(model, [{"op_types": ["Conv2d", "ReLU"]}], example_input=X)).train()
        with torch.no_grad():
            for model.skipped in (-1, 1, -1, 1):
                model(X)
        states.append([list(q.state_dict().values()) for q in quantizers_of(model).values() if q.name.startswith("convs")])
    assert states[0] == states[1]
    assert len(states[0]) == 4  # the input, and one behind each layer


def test_a_module_of_another_prepared_model_is_refused() -> None:
    act = nn.ReLU()
    shared, other = net(False, lambda: act), nn.Sequential(nn.Conv2d(3, 3, 1), act)
    for first, second, name in ((shared, other, "1"), (other, shared, "0.relu")):
        prepare_model(first, make_plan(first, INT8, example_input=X))
        before = {name: type(module) for name, module in second.named_modules()}
        with pytest.raises(ConfigError, match=f"'{name}' of Sequential is part of another prepared model, too; give each"):
            prepare_model(second, make_plan(second, INT8, example_input=X))
        assert {name: type(module) for name, module in second.named_modules()} == before
        restore_model(first)
    prepare_model(shared, make_plan(shared, INT8, example_input=X))


def test_a_hook_added_later_sees_what_it_saw() -> None:
    seen: list[Tensor] = []
    model = net(False)
    prepare_model(model, make_plan(model, INT8, example_input=X))
    steps(model)
    model[0].relu.register_forward_pre_hook(lambda module, args: seen.append(args[0].min()))  # type: ignore[union-attr]
    evaluated(model)
    assert len(seen) == 2
    assert max(seen) < 0, "not what the integer layer has clamped"


def test_it_may_be_told_to_work_in_place_later() -> None:
    model = net(False)
    prepare_model(model, make_plan(model, INT8, example_input=X))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    steps(model)
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


def test_an_activation_that_register_fusion_added_by_name() -> None:
    assert ("0.conv1", 1) in groups(make_plan(net(False, nn.Mish), INT8, example_input=X))
    before = list(USER_ROWS)
    try:
        register_fusion((nn.Conv2d, nn.BatchNorm2d, "mish"))
        model = net(False, nn.Mish)
        plan = make_plan(model, INT8, example_input=X)
        assert {("0.conv1", 2), ("0.conv2", 1), ("1.conv1", 2)} <= set(groups(plan))
        prepare_model(model, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(model)
        assert torch.equal(evaluated(convert_model(model)), evaluated(model))
    finally:
        USER_ROWS[:] = before


def test_names_that_look_like_calls_are_answered_with_the_calls() -> None:
    with pytest.raises(ConfigError, match=r"'0.relu_3' matches no module.* Its calls are 0.relu_1, 0.relu_2."):
        make_plan(net(False), [{"op_names": ["0.relu_3"]}], example_input=X)


def test_fuse_model_keeps_it() -> None:
    model = net(False)
    steps(model)
    fused = fuse_model(copy.deepcopy(model).eval(), example_input=X)
    assert torch.allclose(evaluated(fused), evaluated(model), atol=1e-5)
    training = fuse_model(copy.deepcopy(model).train(), example_input=X)
    for a, b in zip(steps(training), steps(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
