# SPDX-License-Identifier: Apache-2.0
"""Owns quantized modules of any type: every registered type against an independent fake quantization, and their calls."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_fusion import prepared
from torch import Tensor, nn

from lightning_quant import ConfigError, convert_model, export_model, load_deployed, make_plan, prepare_model, restore_model
from lightning_quant.export import onnxruntime_session
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.prepare import prepared_groups, quantizer_state
from lightning_quant.settings import QuantizationSetting
from lightning_quant.targets import tensors_in

Array = npt.NDArray[Any]

pytestmark = pytest.mark.usefixtures("own_registries")


class One(nn.Module):
    """Hands its arguments to a module called m; `pick` one of several outputs."""

    def __init__(self, m: nn.Module, pick: int | None = None) -> None:
        super().__init__()
        self.m, self.pick = m, pick

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.m(*args, **kwargs)
        return out if self.pick is None else out[self.pick]


def image(batch: int = 8) -> Tensor:
    return torch.randn(batch, 4, 12, 12)


def words() -> Tensor:
    return torch.randn(8, 6, 16)


def volume() -> Tensor:
    return torch.randn(3, 4, 6, 6, 6)


def vector() -> Tensor:
    return torch.randn(8, 16)


def indices() -> Tensor:
    return torch.randint(0, 30, (8, 6))


def three_times() -> tuple[Tensor, Tensor, Tensor]:
    x = words()
    return x, x, x


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "Linear": (lambda: nn.Linear(16, 8), vector),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 8), lambda: (vector(), vector())),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3), words),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3), image),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 3), volume),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), words),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), image),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 3), volume),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(16), vector),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), image),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), volume),
    "LayerNorm": (lambda: nn.LayerNorm(16), words),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), image),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), words),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), image),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), volume),
    "Embedding": (lambda: nn.Embedding(30, 16), indices),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(30, 16), indices),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), three_times),
    "LSTM": (lambda: nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True), words),
    "GRU": (lambda: nn.GRU(16, 12, batch_first=True), words),
    "RNN": (lambda: nn.RNN(16, 12, batch_first=True), words),
    "PReLU": (lambda: nn.PReLU(4), image),
    "Softmax": (lambda: nn.Softmax(1), vector),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), words),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), image),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), volume),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), words),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), image),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), volume),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), words),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), image),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), volume),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), words),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), image),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), volume),
    "Dropout": (lambda: nn.Dropout(0.0), vector),
    "Dropout1d": (lambda: nn.Dropout1d(0.0), words),
    "Dropout2d": (lambda: nn.Dropout2d(0.0), image),
    "Dropout3d": (lambda: nn.Dropout3d(0.0), volume),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), image),
    **{
        kind.__name__: (kind, image)
        for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid)
    },
    **{kind.__name__: (kind, image) for kind in (nn.Hardsigmoid, nn.Tanh, nn.Identity, nn.Flatten)},
}
PICKS = {"MultiheadAttention": 0, "LSTM": 0, "GRU": 0, "RNN": 0}
every_module = pytest.mark.parametrize("name", MODULES)


def case(name: str) -> tuple[One, Any, list[dict[str, Any]]]:
    """(a net around one module, what it is called with, the config that quantizes it)."""
    make, given = MODULES[name]
    return One(make(), PICKS.get(name)), given(), [{"op_types": [name]}]


def arguments(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def evaluated(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return net.eval()(*args, **kwargs)


def test_every_registered_module_type_is_tested() -> None:
    kinds = {name for name, kind in QuantizationSetting._types.items() if kind.__module__.startswith("torch.")}
    assert kinds == set(MODULES)


# -- an independent fake quantization ------------------------------------------------------------------------------------------


def numpy_parameter(values: Tensor, granularity: Any, levels: int = 127, transposed: int = 0) -> Tensor:
    """Symmetric signed integers by the largest magnitude, one scale for each index of the dimension that has scales.

    `transposed`: the groups of a transposed convolution, whose output channels are along dimension 1 of each group's rows.
    """
    w = values.detach().numpy()
    if transposed:
        parts = [part.transpose(0, 1) for part in values.chunk(transposed)]
        return torch.cat([numpy_parameter(part, "out_channel", levels).transpose(0, 1) for part in parts])
    kept = {"out_channel": 0, "in_channel": 1}.get(granularity)
    dims = tuple(d for d in range(w.ndim) if d != kept)
    scale = (np.abs(w).max(dims, keepdims=True) / np.float32(levels)).astype(np.float32)
    return torch.from_numpy(np.clip(np.rint(w / scale), -levels, levels) * scale)


class NumpyGrid:
    """An unsigned affine grid of 8 bits by the range of the one batch that was seen."""

    def __init__(self, x: Tensor) -> None:
        low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        self.scale = np.float32((high - low) / 255)
        self.zero = np.clip(-np.rint(low / float(self.scale)), 0, 255)

    def __call__(self, x: Tensor) -> Tensor:
        q = np.clip(np.rint(x.detach().numpy() / self.scale) + self.zero, 0, 255)
        return torch.from_numpy(((q - self.zero) * self.scale).astype(np.float32))


def numpy_reference(module: nn.Module, layer: LayerPlan, args: tuple[Any, ...], pick: int | None) -> tuple[Tensor, float]:
    """(what eval gives after one batch of training, the step of the output or 0): from the plan and the float module alone."""
    twin = copy.deepcopy(module)
    for name, plan in layer.targets.items():
        if not name.startswith("_"):
            owner = twin.get_submodule(name.rpartition(".")[0])
            groups = module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            rounded = numpy_parameter(twin.get_parameter(name), plan.spec.granularity, transposed=groups)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(rounded))
    grids: dict[str, NumpyGrid] = {}
    given = list(args)
    for position, x in enumerate(args):
        target = layer.targets.get(f"_input_{position or ''}")
        if target is not None:
            own = f"{layer.name}.{target.target}"
            grids[own] = grids[target.source] if target.source else NumpyGrid(x)
            given[position] = grids[own](x)

    def run(mode: bool) -> Tensor:
        with torch.no_grad():
            out = twin.train(mode)(*given)
        found: Tensor = out if pick is None else out[pick]
        return found

    trained = run(True)
    y, made = run(False), layer.targets.get("_output_")
    if made is None:
        return y, 0.0
    grid = grids[made.source] if made.source else NumpyGrid(trained)
    return grid(y), float(grid.scale)


@every_module
def test_a_module_against_an_independent_fake_quantization(name: str) -> None:
    """One batch of training sets the ranges; eval, the converted copy and numpy agree; the float module is near."""
    net, given, config = case(name)
    args = arguments(given)
    expected = evaluated(copy.deepcopy(net).train(), *args)
    plan = make_plan(net, config, example_input=given)
    (layer,) = plan.layers
    reference, step = numpy_reference(net.m, layer, args, net.pick)
    before = [*net.state_dict()], [id(p) for p in net.parameters()], [id(b) for b in net.buffers()]
    prepare_model(net, plan)
    assert ([*net.state_dict()], [id(p) for p in net.parameters()], [id(b) for b in net.buffers()]) == before
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
    if name == "MultiheadAttention":
        inputs = [inputs[0]] * 3
    out = net.train()(*inputs)
    assert out.grad_fn is not None
    (out * torch.randn_like(out)).sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in inputs if x.is_floating_point())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    found = evaluated(net, *args)
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, *args), found)
    difference = (found - reference).abs()
    if step:
        assert float(difference.max()) <= 1.01 * step, "the order of sums may tip a level"
        assert float((difference > 1e-4 * step).float().mean()) <= 0.01
    else:
        assert float(difference.max()) <= 1e-4, "an integer layer's bias lies on its own grid"
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.06 or name.startswith("BatchNorm")
    assert ([*net.state_dict()], [id(p) for p in net.parameters()], [id(b) for b in net.buffers()]) == before
    restore_model(net)
    assert type(net.m) is type(case(name)[0].m)
    assert not any("_lightning_quant" in key for module in net.modules() for key in module.__dict__)


# -- how a call goes through -----------------------------------------------------------------------------------------------------


class Signature(nn.Module):
    """x and p alone matter; everything else is there to be passed in all the ways of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.eye(4))

    def forward(
        self, x: Tensor, y: Tensor | None = None, scale: float = 1.0, *rest: Tensor, key: Tensor | None = None, **more: Any
    ) -> Tensor:
        out = x @ self.p
        for other in (y, *rest, key, *more.values()):
            if isinstance(other, Tensor) and other.is_floating_point():
                out = out + other @ self.p
        return out * scale


class Calls(nn.Module):
    """Calls its module in a way of its own."""

    def __init__(self, how: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.m, self.how = Signature(), how

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.how(self.m, x, y)


def both(m: nn.Module, x: Tensor, y: Tensor) -> Any:
    return m(x, y)


WAYS: list[tuple[str, Callable[..., Any], list[str], list[str]]] = [
    ("positional", both, ["_input_", "_input_1"], ["_input_", "_input_1"]),
    ("by name", lambda m, x, y: m(x, y=y), ["_input_x", "_input_y"], ["_input_", "_input_1"]),
    ("all by name", lambda m, x, y: m(y=y, x=x), ["_input_0", "_input_1"], ["_input_", "_input_1"]),
    ("keyword-only", lambda m, x, y: m(x, key=y), ["_input_", "_input_key"], ["_input_", "_input_key"]),
    ("more positional", lambda m, x, y: m(x, None, 1.0, y), ["_input_", "_input_3"], ["_input_", "_input_3"]),
    ("more keywords", lambda m, x, y: m(x, other=y), ["_input_", "_input_other"], ["_input_", "_input_other"]),
    ("beside a default", lambda m, x, y: m(y, scale=1.0), ["_input_"], ["_input_"]),
    ("beside integers", lambda m, x, y: m(y, torch.arange(4)), ["_input_"], ["_input_"]),
]


@pytest.mark.parametrize(("how", "asked", "found"), [way[1:] for way in WAYS], ids=[way[0] for way in WAYS])
def test_arguments_are_rounded_however_they_are_passed(how: Callable[..., Any], asked: list[str], found: list[str]) -> None:
    net, x, y = Calls(how), torch.randn(5, 4), torch.randn(5, 4) * 3
    plan = make_plan(net, [{"op_names": ["m"], "target_settings": {target: {} for target in asked}}], example_input=(x, y))
    assert [name for name in plan.layers[0].targets if name.startswith("_input_")] == found
    prepare_model(net, plan).train()(x, y)
    deployed = convert_model(net)
    result = evaluated(net, x, y)
    assert torch.equal(evaluated(deployed, x, y), result)
    rounded = [NumpyGrid(t)(t) for t in ((x, y) if len(found) == 2 else (y,))]
    assert (result - sum(rounded)).abs().max() < 1e-5, "p is the identity, which its own grid keeps"
    assert len(quantizer_state(net)) == len(found)


def signature_plan(target: str, how: Callable[..., Any] = both) -> Plan:
    return make_plan(
        Calls(how), [{"op_names": ["m"], "target_settings": {target: {}}}], example_input=(torch.randn(5, 4), torch.randn(5, 4))
    )


def test_arguments_that_a_call_lacks() -> None:
    with pytest.raises(ConfigError, match=r"'_input_1' of 'm' is no floating-point tensor in the recorded forward: .*not given"):
        signature_plan("_input_1", lambda m, x, y: m(x))
    with pytest.raises(ConfigError, match=r"'_input_2' of 'm' is no floating-point tensor in the recorded forward.*float"):
        signature_plan("_input_2", lambda m, x, y: m(x, y, 2.0))
    with pytest.raises(ConfigError, match=r"'m' \(Linear\) has no target '_input_1'; the arguments of its forward are input"):
        make_plan(One(nn.Linear(2, 2)), [{"op_names": ["m"], "target_settings": {"_input_1": {}}}])
    plan = signature_plan("_input_1")
    assert list(plan.layers[0].targets) == ["_input_1"]
    net = Calls(lambda m, x, y: m(x, y) if x.sum() > 0 else m(x))
    prepare_model(net, plan).train()(torch.ones(5, 4), torch.ones(5, 4))
    assert net(-torch.ones(5, 4), torch.ones(5, 4)).shape == (5, 4), "a later call may leave it out"


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    """As transformers return it."""

    hidden: Tensor
    pooled: Tensor
    count: int = 3


CONTAINERS: list[tuple[str, Callable[[Tensor, Tensor], Any], str, str]] = [
    ("tuple", lambda a, b: (a, b), "_output_", "_output_1"),
    ("list", lambda a, b: [a, b], "_output_0", "_output_1"),
    ("named tuple", Pair, "_output_", "_output_1"),
    ("dict", lambda a, b: {"first": a, "second": b, "n": 3}, "_output_first", "_output_second"),
    ("ordered dict", lambda a, b: OrderedDict(first=a, second=b), "_output_", "_output_second"),
    ("dataclass", Result, "_output_hidden", "_output_pooled"),
]


class Returns(nn.Module):
    """p x and p x + 1 in a container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.p, self.wrap = nn.Parameter(torch.randn(4, 4)), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x @ self.p, x @ self.p + 1)


@pytest.mark.parametrize(("wrap", "first", "second"), [row[1:] for row in CONTAINERS], ids=[row[0] for row in CONTAINERS])
@pytest.mark.parametrize("both", [True, False], ids=["both", "second"])
def test_outputs_in_containers(wrap: Callable[[Tensor, Tensor], Any], first: str, second: str, both: bool) -> None:
    net, x = One(Returns(wrap)), torch.randn(6, 4)
    targets = [first, second] if both else [second]
    plan = make_plan(net, [{"op_names": ["m"], "target_settings": {target: {} for target in targets}}], example_input=x)
    a, b = x @ net.m.get_parameter("p"), x @ net.m.get_parameter("p") + 1
    expected = wrap(NumpyGrid(a)(a) if both else a.detach(), NumpyGrid(b)(b))
    trained = prepare_model(net, plan).train()(x)
    assert type(trained) is type(expected)
    found = evaluated(net, x)
    deployed = evaluated(convert_model(net), x)
    for result in (trained, found, deployed):
        assert type(result) is type(expected)
        assert all((one - other).abs().max() < 1e-6 for one, other in zip(tensors_in(result), tensors_in(expected), strict=True))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    if isinstance(expected, Result):
        assert found.count == 3


def test_an_output_that_is_not_there() -> None:
    config = [{"op_names": ["m"], "target_settings": {"_output_2": {}}}]
    with pytest.raises(ConfigError, match=r"'_output_2' of 'm' is no floating-point tensor .*; there are _output_, _output_1"):
        make_plan(One(Returns(lambda a, b: (a, b))), config, example_input=torch.randn(2, 4))


# -- one module in several places ------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One module called twice, and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ELU()
        self.again = self.act
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.norm(self.act(x) * 2))
        return y


@pytest.mark.parametrize("called", ["act", "again"])
def test_a_module_called_twice_under_two_names(called: str) -> None:
    net, x = Twice(), torch.randn(6, 8)
    plan = make_plan(net, [{"op_names": [called]}], example_input=x)
    (layer,) = plan.layers
    assert layer.name == "act"
    assert {"also called again", "called 2 times: one range for all"} <= set(layer.notes)
    prepare_model(net, plan).train()(x)
    second = net.norm(nn.functional.elu(x) * 2)
    low = x.min().item() + 0.01 * (second.min().item() - x.min().item())
    assert abs(quantizer_state(net)["act._input_"]["low"] - low) < 0.05, "both calls moved the one range"
    found, deployed = evaluated(net, x), convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    assert deployed.get_submodule("again") is deployed.get_submodule("act")
    assert type(deployed.get_submodule("act")).__name__ == "QuantizedModule"


def test_naming_one_module_by_both_names_is_naming_it_once() -> None:
    plan = make_plan(Twice(), [{"op_names": ["act", "again"]}], example_input=torch.randn(6, 8))
    assert [layer.name for layer in plan.layers] == ["act"]
    assert plan.layers[0].notes.count("also called again") == 1


def test_a_module_that_works_in_place_is_refused_where_that_shows() -> None:
    """Rounded, the ReLU writes to the rounded copy, and what is read by the old name is no longer rectified."""

    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y: Tensor = self.act(x)
            return x + y

    x = torch.randn(4, 8)
    with pytest.raises(ConfigError, match=r"'act' \(ReLU\) works in place and its input is used afterwards by its old name"):
        make_plan(Shows(), [{"op_types": ["ReLU"]}], example_input=x)


class Parent(nn.Module):
    """A module with a parameter and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.q = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) @ self.q
        return y


def test_a_quantized_parent_with_a_quantized_child() -> None:
    net, x = One(Parent()), torch.randn(16, 8)
    expected = evaluated(copy.deepcopy(net), x)
    config = [
        {"op_names": ["m"], "target_settings": {"_input_": {}, "q": {}, "_output_": {}}},
        {"op_names": ["m.fc"], "target_names": ["_input_", "weight", "_output_"]},
    ]
    plan = make_plan(net, config, example_input=x)
    assert {layer.name: list(layer.targets) for layer in plan.layers} == {
        "m": ["_input_", "q", "_output_"],
        "m.fc": ["_input_", "weight", "_output_"],
    }
    prepare_model(net, plan).train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    found, deployed = evaluated(net, x), convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    assert (found - expected).abs().max() / expected.abs().max() < 0.05
    assert {type(module).__name__ for module in deployed.modules()} >= {"QuantizedModule", "IntegerLayer"}
    assert not list(deployed.parameters())
    restore_model(net)
    assert torch.equal(evaluated(net, x), expected)


def test_parameters_in_children_by_dotted_name_and_wildcard() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList([torch.randn(4, 4) for _ in range(3)])
            self.named = nn.ParameterDict({"gate": torch.randn(4, 4)})
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x @ part
            gate: Tensor = self.named["gate"]
            return x @ gate + self.shift

    x = torch.randn(5, 4)
    for given, names in (
        ({"parts.*": {"quant_dtype": "int4"}, "parts.1": {"granularity": "in_channel"}}, ["parts.0", "parts.1", "parts.2"]),
        ({"*": {}}, ["shift", "parts.0", "parts.1", "parts.2", "named.gate"]),
        ({"named.gate": {}, "shift": {}}, ["shift", "named.gate"]),
    ):
        net = One(Table())
        plan = make_plan(net, [{"op_names": ["m"], "target_settings": given}], example_input=x)
        targets = plan.layers[0].targets
        assert sorted(targets) == sorted(names)
        twin = copy.deepcopy(net)
        for name in names:
            levels = 7 if name.startswith("parts") and "*" not in given else 127
            rounded = numpy_parameter(twin.m.get_parameter(name), targets[name].spec.granularity, levels)
            twin.m.get_parameter(name).data.copy_(rounded)
        prepare_model(net, plan).train()(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        found = evaluated(net, x)
        assert (found - evaluated(twin, x)).abs().max() < 1e-5
        assert torch.equal(evaluated(convert_model(net), x), found)
        restore_model(net)
        assert [name for name, _ in net.m.named_parameters()] == [name for name, _ in twin.m.named_parameters()]
    (layer,) = make_plan(
        One(Table()),
        [{"op_names": ["m"], "target_settings": {"parts.*": {"quant_dtype": "int4"}, "parts.1": {"granularity": "in_channel"}}}],
    ).layers
    assert str(layer.targets["parts.1"].spec) == "int4 symmetric in_channel"
    assert str(layer.targets["parts.0"].spec) == "int4 symmetric out_channel"


def test_self_attention_has_one_input_quantizer() -> None:
    class Attends(One):
        def forward(self, x: Tensor) -> Any:
            return self.m(x, x, x)[0]

    net, x = Attends(nn.MultiheadAttention(16, 4, batch_first=True)), words()
    plan = make_plan(net, [{"op_names": ["m"]}], example_input=x)
    assert {name: target.source for name, target in plan.layers[0].targets.items()} == {
        "_input_": None,
        "_input_1": "m._input_",
        "_input_2": "m._input_",
        "in_proj_weight": None,
        "out_proj.weight": None,
        "_output_": None,
    }
    prepare_model(net, plan).train()(x)
    assert sorted(quantizer_state(net)) == ["m._input_", "m._output_"]
    ((_, group),) = prepared_groups(net).values()
    assert len({id(quantizer) for quantizer in group.quantizers}) == 2
    assert group.quantizers[0].changes == 1, "observed once a forward"
    found = evaluated(net, x)
    assert torch.equal(evaluated(convert_model(net), x), found)


def test_attention_with_masks_weights_and_its_own_widths() -> None:
    net = One(nn.MultiheadAttention(16, 4, batch_first=True, kdim=8, vdim=8, add_bias_kv=True))
    x, other, mask = words(), torch.randn(8, 5, 8), torch.zeros(8, 5, dtype=torch.bool)
    mask[:, 4] = True
    example = ((x, other, other), {"key_padding_mask": mask, "need_weights": True})
    expected, weights = evaluated(copy.deepcopy(net), *example[0], **example[1])
    plan = make_plan(net, [{"op_types": ["MultiheadAttention"]}], example_input=example)
    assert list(plan.layers[0].targets) == [
        *("_input_", "_input_1", "_input_2", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight", "_output_"),
    ]
    prepare_model(net, plan).train()(*example[0], **example[1])
    found = evaluated(net, *example[0], **example[1])
    assert all(torch.equal(a, b) for a, b in zip(evaluated(convert_model(net), *example[0], **example[1]), found, strict=True))
    assert (found[0] - expected).abs().max() < 0.02
    assert (found[1] - weights).abs().max() < 0.02


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(x).mean(1))
        return y


def test_a_tied_weight_stays_tied() -> None:
    net, x = Tied(), torch.randint(0, 12, (6, 5))
    expected = evaluated(copy.deepcopy(net), x)
    prepared(net, [{"op_types": ["Embedding", "Linear"]}], x).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).sum().backward()
    assert len(list(net.parameters())) == 1
    assert net.head.weight is net.table.weight
    gradient = net.head.weight.grad
    assert gradient is not None
    assert gradient[x.unique()].abs().sum() > 0
    found, deployed = evaluated(net, x), convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    assert (found - expected).abs().max() / expected.abs().max() < 0.05
    assert torch.equal(deployed.get_buffer("table.weight"), deployed.get_buffer("head.weight")), "the same integers"
    net.train()
    optimizer.step()
    restore_model(net)
    assert net.head.weight is net.table.weight
    assert not torch.equal(evaluated(net, x), expected)


def test_the_bias_of_a_linear_layer() -> None:
    net, x = One(nn.Linear(16, 8)), vector()
    config = [{"op_names": ["m"], "target_names": ["weight", "bias"], "target_settings": {"bias": {"quant_dtype": "int4"}}}]
    twin = copy.deepcopy(net)
    for name, levels, granularity in (("weight", 127, "out_channel"), ("bias", 7, None)):
        twin.m.get_parameter(name).data.copy_(numpy_parameter(twin.m.get_parameter(name), granularity, levels))
    out = prepared(net, config, x).train()(x)
    assert (out - twin(x)).abs().max() < 1e-5
    found = evaluated(net, x)
    assert (found - evaluated(twin, x)).abs().max() < 1e-5
    assert torch.equal(evaluated(convert_model(net), x), found)
    out.sum().backward()
    assert net.m.get_parameter("bias").grad is not None


# -- life of a prepared model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MultiheadAttention", "LSTM", "Embedding", "PReLU"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_prepared_model_is_copied_with_its_ranges(name: str, how: str) -> None:
    net, given, config = case(name)
    args = arguments(given)
    prepared(net, config, given).train()(*args)
    twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert type(twin.m) is type(net.m)
    assert quantizer_state(twin) == quantizer_state(net)
    found = evaluated(net, *args)
    assert torch.equal(evaluated(twin, *args), found)
    twin.train()(*[x * 3 if x.is_floating_point() else x for x in args])
    assert torch.equal(evaluated(net, *args), found), "the copy is its own"
    with torch.no_grad():
        next(twin.parameters()).mul_(0)
    assert torch.equal(evaluated(net, *args), found)
    restore_model(twin)
    assert type(twin.m).__name__ == name


@pytest.mark.parametrize("name", ["LSTM", "GRU", "MultiheadAttention", "Embedding", "LayerNorm", "ConvTranspose2d"])
@pytest.mark.parametrize("where", ["autocast", "float64"])
def test_other_precisions(name: str, where: str) -> None:
    net, given, config = case(name)
    args = arguments(given)
    if (name, where) == ("LSTM", "autocast"):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                net(*args)
        except RuntimeError as error:
            pytest.skip(f"torch's own LSTM has no bfloat16 on this CPU: {error}")
    if where == "float64":
        net, args = net.double(), tuple(x.double() if x.is_floating_point() else x for x in args)
    plan = make_plan(net, config, example_input=args)
    prepare_model(net, plan).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        out = net(*args)
        out.float().square().mean().backward()
        with torch.no_grad():
            found = net.eval()(*args)
            deployed = convert_model(net)
            assert torch.equal(deployed(*args), found)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert (found - out).abs().max() < 0.1 * out.abs().max()
    if where == "autocast":
        assert torch.equal(evaluated(deployed, *args), found), "validation under autocast shows what ships"
    else:
        assert out.dtype == torch.float64


# Of each kind one, because exporting takes time; the presets' tests have convolutions, LSTM and whole encoders.
IN_FILES = [
    "Bilinear",
    "ConvTranspose2d",
    "LayerNorm",
    "EmbeddingBag",
    "RNN",
    "PReLU",
    "GELU",
    "Softmax",
    "AvgPool2d",
    "Upsample",
]


class Zoo(nn.Module):
    """Modules of all kinds, each on an input of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = {name: MODULES[name][1] for name in IN_FILES}
        self.m = nn.ModuleDict({name: MODULES[name][0]() for name in IN_FILES})

    def forward(self, img: Tensor, seq: Tensor, vec: Tensor, ids: Tensor) -> list[Tensor]:
        tensors = {image: (img,), words: (seq,), vector: (vec,), indices: (ids,)}
        found = [module(*tensors.get(self.kinds[name], (vec, vec))) for name, module in self.m.items()]
        return [out[0] if isinstance(out, tuple) else out for out in found]


def test_files_of_modules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, given = Zoo(), (image(), words(), vector(), indices())
    plan = make_plan(net, [{"op_types": IN_FILES}], example_input=given)
    plan_of = {layer.name.removeprefix("m."): layer for layer in plan.layers}
    assert set(plan_of) == set(IN_FILES)
    prepare_model(net, plan).train()(*given)
    deployed = convert_model(net)
    expected = evaluated(deployed, *given)
    loaded = load_deployed(export_model(deployed, tmp_path / "zoo.pt2", example_input=given))
    session = onnxruntime_session(export_model(deployed, tmp_path / "zoo.onnx", example_input=given))
    found = session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), given, strict=True)})
    again = evaluated(loaded, *given)
    assert not caplog.records, "the exporter's own remarks help nobody"
    groups: dict[str, Any] = {name.removeprefix("m."): group for name, (_, group) in prepared_groups(net).items()}
    for name, a, b, c in zip(IN_FILES, expected, again, found, strict=True):
        assert torch.equal(a, b), name
        difference = (a - torch.as_tensor(c)).abs()
        step = groups[name].quantizers[-1].grid().scale if "_output_" in plan_of[name].targets else 0.0
        assert float(difference.max()) < 1e-5 + 1.01 * step, name
        # Averages of levels tie often; onnxruntime has a table of exponentials.
        assert float((difference > 1e-5).float().mean()) < {"AvgPool2d": 0.03, "Softmax": 0.2}.get(name, 0.002), name


def test_what_onnx_cannot_say_is_said(tmp_path: Path) -> None:
    net = One(nn.AdaptiveAvgPool3d(2))
    with pytest.raises(ConfigError, match=r"torch.onnx cannot translate the model: .*_adaptive_avg_pool3d"):
        export_model(net.eval(), tmp_path / "m.onnx", example_input=volume())
    assert not list(tmp_path.iterdir())
