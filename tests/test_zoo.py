# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that nets of every usual shape go from float to a file without an edit, fused rightly on the way.

`zoo.json` says, for each net, what is fused with what, which other layers and operators are quantized, and what stays float for
which reason. `python tests/test_zoo.py` writes it anew; read its diff.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_more  # noqa: F401  (registers its nets)
from torch import Tensor, nn
from zoo import ZOO, Shape

from lightning_quant import ConfigError, convert_model, fuse_model, make_plan, prepare_model
from lightning_quant.export import export_with_reports, onnxruntime_session
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.patterns import BatchNorm
from lightning_quant.prepare import quantizer_state, simulated
from lightning_quant.record import record, split_example
from lightning_quant.targets import on_tensors, tensors_in

SNAPSHOT = Path(__file__).with_name("zoo.json")
# Batch norms at the model's input: folded, features of unlike sizes would share a grid; without grids nothing speaks against it.
ONLY_IN_FLOAT = {"BatchNormFirst": {"net.0"}}
NAMES = pytest.mark.parametrize("name", ZOO)


# -- one net, from float to integers --------------------------------------------------------------------------------------


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that a call returns."""
    args, kwargs = split_example(on_tensors(torch.clone, example))
    return list(tensors_in(model(*args, **kwargs)))


def loss_of(outputs: list[Tensor]) -> Tensor:
    losses = [(output - 0.5).square().mean() for output in outputs if output.is_floating_point()]
    return torch.stack(losses).sum()


def train(model: nn.Module, example: Any, steps: int = 3) -> list[list[Tensor]]:
    """A user's loop; returns the outputs of every step. What is random in a forward is the same in every call of this."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    seen: list[list[Tensor]] = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        outputs = called(model, example)
        loss_of(outputs).backward()
        optimizer.step()
        seen.append([output.detach() for output in outputs])
    return seen


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A net after three quantized steps, and its deployed copy."""

    net: nn.Module
    deployed: nn.Module
    plan: Plan
    example: Any
    fresh: Any


def made(shape: Shape) -> tuple[nn.Module, Any]:
    """The float net and what it is called with; the same in every call."""
    torch.manual_seed(0)
    return shape.make(), shape.example()


@functools.cache
def trained(name: str) -> Trained:
    net, example = made(ZOO[name])
    fresh = ZOO[name].example()
    plan = make_plan(net, ZOO[name].config, example_input=example)
    prepare_model(net, plan)
    train(net, example)
    return Trained(net=net, deployed=convert_model(net.eval()), plan=plan, example=example, fresh=fresh)


# -- the plan -------------------------------------------------------------------------------------------------------------


def snapshot(name: str) -> dict[str, Any]:
    net, example = made(ZOO[name])
    plan = make_plan(net, ZOO[name].config, example_input=example)
    return {
        "fused": {layer.name: ", ".join(layer.fused_with) for layer in plan.layers if layer.fused_with},
        "alone": [layer.name for layer in plan.layers if not layer.fused_with],
        "left": dict(plan.left),
        "not fused further": {
            layer.name: note.partition(": ")[2]
            for layer in plan.layers
            for note in layer.notes
            if note.startswith("not fused further")
        },
        "notes": list(plan.notes),
    }


@NAMES
def test_what_is_fused_and_what_stays_float_is_what_was_reviewed(name: str) -> None:
    assert snapshot(name) == json.loads(SNAPSHOT.read_text())[name]


def test_the_snapshot_has_every_net_and_no_other() -> None:
    assert list(json.loads(SNAPSHOT.read_text())) == list(ZOO)
    assert len(ZOO) >= 32


# -- quantized ------------------------------------------------------------------------------------------------------------


@NAMES
def test_eval_after_training_equals_the_deployed_model(name: str) -> None:
    one = trained(name)
    with torch.no_grad():
        for example in (one.example, one.fresh):
            found, expected = called(one.deployed, example), called(one.net, example)
            assert len(found) == len(expected) > 0
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
                assert a.isfinite().all()
    assert any(output.std() > 0 for output in expected if output.is_floating_point())


@NAMES
def test_the_signature_stays_the_users(name: str) -> None:
    one = trained(name)
    for net in (one.net, one.deployed):
        assert inspect.signature(net.forward) == inspect.signature(made(ZOO[name])[0].forward)
        assert type(net).__name__ == name


def test_attributes_of_a_users_class_are_not_hidden() -> None:
    class Named(nn.Module):
        prefix, begins, names = "mine", "mine", "mine"

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x) + x

    net, x = Named(), torch.randn(4, 3)
    prepare_model(net, make_plan(net, "int8", example_input=x))
    assert type(net) is not Named  # it owns an addition
    assert (net.prefix, net.begins, net.names) == ("mine", "mine", "mine")


def output_steps(name: str, one: Trained) -> list[float | None]:
    """The step of the grid that each output lies on; None for those in float."""
    graph = record(*made(ZOO[name]))
    ends: dict[str, LayerPlan] = {layer.end: layer for layer in one.plan.layers}
    sources = {f"{layer.name}.{target}": p.source for layer in one.plan.layers for target, p in layer.targets.items()}
    ranges = quantizer_state(one.net)
    steps: list[float | None] = []
    for index in graph.outputs:
        node = graph.nodes[index]
        while node.passing:
            node = graph.nodes[node.reads[0]]
        origin = f"{ends[node.name].name}._output_" if node.name in ends else ""
        while sources.get(origin):
            origin = str(sources[origin])
        side = ranges.get(origin)
        steps.append(None if side is None else (max(side["high"], 0.0) - min(side["low"], 0.0)) / 255)
    return steps


def assert_close(found: list[Tensor], expected: list[Tensor], steps: list[float | None], share: float, relative: float) -> None:
    """On a grid: within one step for this share of the elements; integers: equal for it; floats: close in relative terms."""
    for a, b, step in zip(found, expected, steps[: len(expected)], strict=True):  # behind them, values that steered branches
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert (a == b).double().mean() >= 0.75  # an argmax of a small net has ties
        elif step is not None:
            assert ((a - b).abs() <= 1.01 * step).double().mean() >= share
        else:
            assert (a - b).norm() <= relative * b.norm()


# What stands between grids in float there, and rounds otherwise than onnxruntime's kernel of it (test_kernels.py has the rule).
BY_ONE_AT_TIES = {"WaveNet": "QLinearMul"}


def in_onnxruntime(path: Path, example: Any) -> list[Tensor]:
    session = onnxruntime_session(path)
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), tensors_in(split_example(example)), strict=True)}
    return [torch.as_tensor(np.asarray(array)) for array in session.run(None, feeds)]


def changed_rows(found: Tensor, wanted: Tensor) -> int:
    """Rows whose largest entry is another one, and not by a tie: the two entries differ in `wanted` by more than rounding."""
    a, b = found.argmax(-1, keepdim=True), wanted.argmax(-1, keepdim=True)
    gap = wanted.gather(-1, b) - wanted.gather(-1, a)
    return int((gap > 1e-5 * wanted.abs().max()).sum())


@NAMES
def test_no_net_of_the_zoo_is_silently_wrong(name: str, tmp_path: Path) -> None:
    """Either it is refused with a reason, or onnxruntime gives what the prepared model gives in eval mode, on fresh data."""
    one, path = trained(name), tmp_path / "model.onnx"
    if not ZOO[name].exports:
        with pytest.raises(ConfigError, match=f"torch.export cannot export {name}"):
            export_with_reports(one.deployed, path, example_input=one.example)
        assert not path.exists()
        return
    report = export_with_reports(one.deployed, path, example_input=one.example, dynamic_batch=ZOO[name].dynamic).parity
    torch.manual_seed(77)
    for _ in range(2):
        fresh = ZOO[name].example()
        with torch.no_grad():
            wanted, deployed = called(one.net.eval(), fresh), called(one.deployed, fresh)
        found = in_onnxruntime(path, fresh)
        assert len(found) >= len(wanted) > 0  # behind them, values that steered branches
        for a, b, c in zip(found, wanted, deployed, strict=False):
            assert torch.equal(b, c)
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            allowed = 0.01 if name in BY_ONE_AT_TIES else 1e-6
            assert (a - b).abs().max() <= allowed * b.abs().max()
            if b.is_floating_point() and b.dim() > 1 and b.shape[-1] > 1:
                assert changed_rows(a, b) == 0
    assert report.integers > 0
    if name not in BY_ONE_AT_TIES:
        assert report.different == 0


@NAMES
def test_the_deployed_model_is_what_training_simulated(name: str) -> None:
    one = trained(name)
    with torch.no_grad(), simulated(one.net):
        expected = called(one.net, one.fresh)
    with torch.no_grad():
        found = called(one.deployed, one.fresh)
    assert_close(found, expected, output_steps(name, one), 0.99, 0.02)


# -- fused and not quantized ----------------------------------------------------------------------------------------------


def in_double(name: str) -> tuple[nn.Module, Any]:
    """The float net in float64 with batch norms that have seen data, some of whose gammas are negative or 0."""
    net, example = made(ZOO[name])
    net, example = net.double(), on_tensors(lambda x: x.double() if x.is_floating_point() else x, example)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, BatchNorm) and module.weight.abs().max() > 0:
                module.weight.uniform_(-0.5, 1.5)
                module.weight[0] = 0
                module.bias.normal_()
        net.train()
        for _ in range(3):
            called(net, example)
    return net, example


def norms_with_a_layer(name: str) -> set[str]:
    """Names of the batch norms that the snapshot has in a group with a weighted layer."""
    modules = dict(in_double(name)[0].named_modules())
    fused = json.loads(SNAPSHOT.read_text())[name]["fused"]
    groups = [members.split(", ") for head, members in fused.items() if not isinstance(modules.get(head), BatchNorm)]
    return {member for group in groups for member in group if isinstance(modules.get(member), BatchNorm)}


@NAMES
def test_an_eval_fold_equals_the_float_net(name: str) -> None:
    net, example = in_double(name)
    net.eval()
    with torch.no_grad():
        expected = called(net, example)
        fused = fuse_model(net, example_input=example)
        found = called(fused, example)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    before, after = dict(net.named_modules()), dict(fused.named_modules())
    assert list(before) == list(after)
    folded = {one for one, module in before.items() if isinstance(module, BatchNorm) and isinstance(after[one], nn.Identity)}
    assert folded == norms_with_a_layer(name) | ONLY_IN_FLOAT.get(name, set())


@NAMES
def test_a_fused_net_trains_as_the_plain_one(name: str) -> None:
    net, example = in_double(name)
    plain = copy.deepcopy(net)
    fused = fuse_model(net.train(), example_input=example)
    for step, (found, expected) in enumerate(zip(train(fused, example), train(plain, example), strict=True)):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max(), f"step {step}"
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-9 * max(1.0, float(value.abs().max())), key
    with torch.no_grad():  # eval runs the folded layers, in float32
        for a, b in zip(called(fused.eval(), example), called(plain.eval(), example), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    SNAPSHOT.write_text(json.dumps({name: snapshot(name) for name in ZOO}, indent=1) + "\n")
