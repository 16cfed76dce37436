# SPDX-License-Identifier: Apache-2.0
"""Owns what a config says of operators, fuse groups and float outputs: who is meant, which entry decides, what stays float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Calls as AnyCalls
from toys import fingerprint

from lightning_quant.config import ConfigError
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.plan import make_plan
from lightning_quant.prepare import prepare_model
from lightning_quant.settings import QuantizationSetting

pytestmark = pytest.mark.usefixtures("own_registries")

IMAGE, ROW = torch.ones(2, 3, 6, 6), torch.ones(2, 4)
EXAMPLES = pytest.mark.parametrize("seen", [False, True], ids=["traced", "recorded"])


class Block(nn.Module):
    """A residual block whose activations and addition are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """Two residual blocks, a global average, a cat of three, a learned scale and a constant, a division, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(Block(), Block())
        self.gamma = nn.Parameter(torch.ones(9))
        self.fc1 = nn.Linear(9, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(x).mean((2, 3))
        y = torch.cat([y, y * 0.5, y], 1) * self.gamma + 1
        out: Tensor = self.fc2(self.fc1(y / 3))
        return out


class Calls(AnyCalls):
    """With one argument that has a name, so that it can be traced, too."""

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def planned(*entries: Any, seen: bool = True, model: nn.Module | None = None, example: Any = IMAGE) -> Plan:
    return make_plan(Net() if model is None else model, list(entries), example_input=example if seen else None)


def layers_of(plan: Plan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def error_of(*entries: Any, seen: bool = True, model: nn.Module | None = None, example: Any = IMAGE) -> str:
    """The text of the ConfigError; the model must be as it was."""
    model = Net() if model is None else model
    before = fingerprint(model)
    with pytest.raises(ConfigError) as caught:
        planned(*entries, seen=seen, model=model, example=example)
    assert fingerprint(model) == before
    return str(caught.value)


# -- operators by name, pattern and type ----------------------------------------------------------------------------------

OPS = ["stage.0.relu", "stage.0.add", "stage.0.relu_1", "stage.1.relu", "stage.1.add", "stage.1.relu_1"]
OWN = ["mean", "mul", "cat", "mul_1", "add"]


@EXAMPLES
@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({"op_names": ["stage.0.add"]}, ["stage.0.add"]),
        ({"op_names": ["add", "stage.1.relu_1"]}, ["stage.1.relu_1", "add"]),
        ({"op_names_re": [r"stage\.0\.(add|relu)"]}, ["stage.0.relu", "stage.0.add", "stage.0.relu_1"]),
        ({"op_types": ["add"]}, ["stage.0.add", "stage.1.add", "add"]),
        ({"op_types": ["relu"]}, [name for name in OPS if "relu" in name]),
        ({"op_types": ["mean", "cat", "mul"]}, ["mean", "mul", "cat", "mul_1"]),
        ({"op_names_re": [r"stage\."], "op_types": ["add"]}, ["stage.0.add", "stage.1.add"]),
        ({"op_types": ["add"], "exclude_op_names": ["stage.1.add"]}, ["stage.0.add", "add"]),
        ({"op_types": ["add"], "exclude_op_names_re": ["stage"]}, ["add"]),
        ({"op_names_re": ["m|add|cat"], "exclude_op_types": ["mul", "mean"]}, ["cat", "add"]),
    ],
    ids=str,
)
def test_operators_are_selected_like_modules(entry: dict[str, Any], names: list[str], seen: bool) -> None:
    plan = planned({**entry, "fuse_names": []}, seen=seen)
    assert [layer.name for layer in plan.layers] == names
    assert all(layer.operator and not layer.members for layer in plan.layers)
    assert {layer.name: layer.type for layer in plan.layers} == {
        name: name.rpartition(".")[2].removesuffix("_1") for name in names
    }


def test_operators_stand_behind_the_modules_of_their_owner() -> None:
    plan = planned({"op_names_re": ["stage"], "fuse_names": []})
    parts = ["conv1", "bn1", "conv2", "bn2", "relu", "add", "relu_1"]
    assert [layer.name for layer in plan.layers] == [f"stage.{i}.{part}" for i in (0, 1) for part in parts]


def test_later_entries_decide_operators_like_modules() -> None:
    entries = [{"op_types": ["add"]}, {"op_names": ["stage.1.add"], "target_settings": {"_input_1": {"quant_dtype": "int4"}}}]
    got = layers_of(planned(*entries))
    assert [str(t.spec) for t in got["stage.0.add"].targets.values()] == ["uint8 affine per_tensor"] * 3
    assert [t.spec.dtype for t in got["stage.1.add"].targets.values()] == ["uint8", "int4", "uint8"]
    assert got["stage.1.add"].targets["_input_1"].notes == ("overrules config_list[0]",)


def test_bypass_leaves_one_operand_float() -> None:
    bypass = {"op_names": ["stage.0.add"], "target_settings": {"_input_1": {"apply_method": "bypass"}}}
    assert [t.active for t in layers_of(planned(bypass))["stage.0.add"].targets.values()] == [True, False, True]


def test_root_holds_for_operators() -> None:
    plan = make_plan(nn.ModuleDict({"net": Net()}), [{"op_names": ["stage.0.add", "cat"]}], example_input=IMAGE, root="net")
    assert [layer.name for layer in plan.layers] == ["net.stage.0.add", "net.cat"]
    assert plan.left["net.stage.1.add"] == "not selected"


# -- operands -------------------------------------------------------------------------------------------------------------


@EXAMPLES
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mean", ["_input_", "_output_"]),
        ("mul", ["_input_", "_output_"]),
        ("cat", ["_input_", "_input_1", "_input_2", "_output_"]),
        ("mul_1", ["_input_", "_input_1", "_output_"]),
        ("add", ["_input_", "_output_"]),
        ("stage.0.add", ["_input_", "_input_1", "_output_"]),
    ],
)
def test_the_operands_of_an_operator_are_its_tensors(name: str, targets: list[str], seen: bool) -> None:
    """A number is none; a parameter and every item of a list are."""
    plan = planned({"op_names": [name]}, seen=seen)
    assert list(plan.layers[0].targets) == targets
    assert error_of({"op_names": [name], "target_names": [f"_input_{len(targets) - 1}"]}, seen=seen).startswith(
        f"config_list[0]: {name!r} ({name.rpartition('.')[2].removesuffix('_1')}) has no target '_input_{len(targets) - 1}'"
    )


@EXAMPLES
def test_a_constant_on_the_left_and_a_buffer_keep_their_places(seen: bool) -> None:
    """`buffer * x`: the first operand is the buffer, whose range is its own."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.b((1 + m.a(x)) + m.a.shift * m.a(x))

    layer = nn.Linear(4, 4)
    layer.register_buffer("shift", torch.full((4,), 9.0))
    model = Calls(forward, a=layer, b=nn.Linear(4, 4))
    got = layers_of(planned({"op_types": ["Linear", "add", "mul"]}, seen=seen, model=model, example=ROW))
    sources = {name: {t: p.source for t, p in layer.targets.items()} for name, layer in got.items()}
    assert sources["mul"] == {"_input_": None, "_input_1": "a._output_", "_output_": None}
    assert sources["add"] == {"_input_": "a._output_", "_output_": None}
    assert sources["add_1"] == {"_input_": "add._output_", "_input_1": "mul._output_", "_output_": None}


def test_one_item_of_a_cat_can_be_left_out() -> None:
    got = planned({"op_names": ["cat"], "target_names": ["_input_", "_input_2", "_output_"]})
    assert list(got.layers[0].targets) == ["_input_", "_input_2", "_output_"]


def test_rounded_operands_are_rounded() -> None:
    """3 bits on every operand of (x + 1) * gamma: the result is that of torch's own fake quantization."""

    def forward(m: Any, x: Tensor) -> Any:
        return (x + 1) * m.scales[0]

    scales = nn.ParameterList([torch.tensor([0.1, 0.4, 0.5, 1.0])])
    model = Calls(forward, scales=scales)
    x = torch.tensor([[-1.0, 0.3, 1.1, 2.0]])
    plan = make_plan(model, [{"op_types": ["add", "mul"], "quant_dtype": "uint3"}], example_input=x)
    got = prepare_model(model, plan).train()(x)

    def rounded(values: Tensor) -> Tensor:
        low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
        scale = (high - low) / 7
        zero = round(-low / scale)
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 7)

    gamma = scales[0].detach()
    expected = rounded(rounded(rounded(x) + 1) * rounded(gamma))
    assert not torch.allclose(expected, (x + 1) * gamma, atol=0.02)
    assert torch.allclose(got, expected, atol=1e-6)


# -- what is said of operators that are not there --------------------------------------------------------------------------


@EXAMPLES
def test_an_operator_without_a_setting_says_how_to_register_one(seen: bool) -> None:
    how = "It is an operator without a setting. To register one: "
    how += "QuantizationSetting.register('div', {'_input_': {}, '_output_': {}})"
    assert error_of({"op_names": ["div"]}, seen=seen) == f"config_list[0]: op_names 'div' matches no module. {how}"
    by_type = error_of({"op_types": ["div"]}, seen=seen)
    assert by_type.startswith("config_list[0]: op_types 'div' matches no module; the model has BatchNorm2d (4), Block (2), ")
    assert by_type.endswith(f"add (3), cat (1), mean (1), mul (2), relu (4). {how}")
    member = error_of({"op_types": ["Linear"], "fuse_names": [("fc1", "div")]}, seen=seen)
    assert member == f"config_list[0]: fuse_names ('fc1', 'div'): 'div' names nothing that can be fused. {how}"
    QuantizationSetting.register("div", {"_input_": {}, "_output_": {}})
    assert list(planned({"op_types": ["div"]}, seen=seen).layers[0].targets) == ["_input_", "_output_"]


def test_an_operator_that_is_never_called_says_so() -> None:
    text = error_of({"op_types": ["matmul"]})
    assert text.endswith(" It is an operator that models call as a function, and the recorded forward calls none.")
    assert error_of({"op_names": ["stage.0.ad"]}).startswith(
        "config_list[0]: op_names 'stage.0.ad' matches no module. Close: 'stage.0.add', "
    )


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"op_names": ["stage.0.add_1"]}, "op_names 'stage.0.add_1' matches no module."),
        ({"op_types": ["Linear"], "exclude_op_names": ["add"]}, "exclude_op_names 'add' matches no module."),
        (
            {"op_types": ["Conv2d"], "fuse_names": [("stage.0.conv1", "add")]},
            "'add' names nothing that can be fused.",
        ),
    ],
    ids=str,
)
def test_operators_need_a_forward(entry: dict[str, Any], text: str) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    said = error_of(entry, seen=False, model=Branching())
    assert text in said
    assert said.endswith(" Operators that a forward calls as functions show only with example_input.")


# -- who decides of groups ------------------------------------------------------------------------------------------------

CONVS: dict[str, Any] = {"op_types": ["Conv2d"]}
FIRST_PAIR = ("stage.0.conv1", "stage.0.bn1")


def groups(*entries: Any, **options: Any) -> dict[str, tuple[str, ...]]:
    """Head -> members, of the first block."""
    found = layers_of(planned(*entries, **options))
    return {name.removeprefix("stage.0."): layer.members for name, layer in found.items() if name.startswith("stage.0.")}


AUTO = {"conv1": ("stage.0.bn1", "stage.0.relu"), "conv2": ("stage.0.bn2",)}


@EXAMPLES
def test_groups_are_found_unless_told_otherwise(seen: bool) -> None:
    assert groups(CONVS, seen=seen) == AUTO
    assert groups({**CONVS, "fuse_names": "auto"}, seen=seen) == AUTO
    assert groups({**CONVS, "fuse_names": []}, seen=seen) == {"conv1": (), "conv2": ()}


@EXAMPLES
def test_a_list_decides_for_all_that_its_entry_selects(seen: bool) -> None:
    assert groups({**CONVS, "fuse_names": [FIRST_PAIR]}, seen=seen) == {"conv1": ("stage.0.bn1",), "conv2": ()}
    elsewhere = {"op_names": ["stage.0.conv1"], "fuse_names": [FIRST_PAIR]}
    assert groups({"op_names": ["stage.0.conv2"]}, elsewhere, seen=seen) == {"conv1": ("stage.0.bn1",), "conv2": ("stage.0.bn2",)}


@pytest.mark.parametrize(
    "later",
    [
        {**CONVS, "quant_dtype": "int4"},
        {**CONVS, "fuse_names": "auto"},
        {**CONVS, "fuse_names": [("stage.1.conv1", "stage.1.bn1")]},
    ],
    ids=["nothing", "auto", "a list"],
)
def test_later_entries_leave_a_named_group(later: dict[str, Any]) -> None:
    assert groups({**CONVS, "fuse_names": [FIRST_PAIR]}, later)["conv1"] == ("stage.0.bn1",)


def test_a_later_entry_that_says_nothing_turns_nothing_on_and_auto_does() -> None:
    off = {**CONVS, "fuse_names": []}
    assert groups(off, CONVS) == groups(off) == {"conv1": (), "conv2": ()}
    assert groups(off, {**CONVS, "fuse_names": "auto"}) == AUTO


def test_an_error_names_the_entry_that_named_the_group() -> None:
    wrong = {**CONVS, "fuse_names": [("stage.0.conv1", "stage.0.bn2")]}
    text = error_of(wrong, {**CONVS, "fuse_names": [("stage.1.conv1", "stage.1.bn1")]})
    assert text == (
        "config_list[0]: fuse_names ('stage.0.conv1', 'stage.0.bn2'): 'stage.0.bn2' does not read the output of 'stage.0.conv1' "
        "(that is read by 'stage.0.bn1')."
    )


def test_a_group_with_an_addition_is_two_kernels() -> None:
    whole = ("stage.0.conv2", "stage.0.bn2", "stage.0.add", "stage.0.relu_1")
    got = layers_of(planned({"op_names": ["stage.0.conv2"], "fuse_names": [whole]}))
    assert {name: layer.members for name, layer in got.items()} == {
        "stage.0.conv2": ("stage.0.bn2",),
        "stage.0.add": ("stage.0.relu_1",),
    }
    assert got["stage.0.add"].targets["_input_"].source == "stage.0.conv2._output_"


@pytest.mark.parametrize("act", [(), ("relu",)], ids=["add", "add and relu"])
def test_an_addition_that_reads_something_else_is_refused(act: tuple[str, ...]) -> None:
    """Two kernels or not: the names say that one carries on what the other made."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.b(F.relu(x + x)) - m.a(x)

    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    group = ("a", "add", *act)
    assert error_of({"op_names": ["a"], "fuse_names": [group]}, model=model, example=ROW) == (
        f"config_list[0]: fuse_names {group!r}: 'add' does not read the output of 'a' (that is read by 'sub')."
    )


# -- high_precision_output ------------------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {"op_types": ["Linear"]}
NAMED: dict[str, Any] = {**LINEAR, "target_names": ["_input_", "weight", "_output_"]}


def rounded_outputs(*entries: Any, seen: bool = True) -> list[str]:
    return [layer.name for layer in planned(*entries, seen=seen).layers if "_output_" in layer.targets]


@EXAMPLES
@pytest.mark.parametrize(
    ("entry", "rounded"),
    [
        (LINEAR, ["fc1"]),
        ({**LINEAR, "high_precision_output": None}, ["fc1"]),
        ({**LINEAR, "high_precision_output": False}, ["fc1", "fc2"]),
        ({**LINEAR, "high_precision_output": True}, []),
        (NAMED, ["fc1", "fc2"]),
        ({**NAMED, "high_precision_output": False}, ["fc1", "fc2"]),
        ({**NAMED, "high_precision_output": True}, []),
        ({**LINEAR, "target_names": ["weight"], "high_precision_output": False}, []),
    ],
    ids=str,
)
def test_who_keeps_a_float_output(entry: dict[str, Any], rounded: list[str], seen: bool) -> None:
    assert rounded_outputs(entry, seen=seen) == rounded


@pytest.mark.parametrize(
    ("entries", "rounded"),
    [
        ([{**LINEAR, "high_precision_output": True}, {"op_names": ["fc1"], "high_precision_output": False}], ["fc1"]),
        ([{**LINEAR, "high_precision_output": False}, {"op_names": ["fc2"], "quant_dtype": "int4"}], ["fc1", "fc2"]),
        ([{**LINEAR, "high_precision_output": True}, {"op_names": ["fc1"], "target_names": ["_output_"]}], ["fc1"]),
        ([{**LINEAR, "high_precision_output": True}, {"op_names": ["fc1"], "target_names": ["weight"]}], []),
        ([NAMED, {**LINEAR, "high_precision_output": True}], []),
        (["int8", {"op_names": ["fc2"], "high_precision_output": False}], None),
    ],
    ids=str,
)
def test_the_later_entry_says_who_keeps_a_float_output(entries: list[Any], rounded: list[str] | None) -> None:
    found = [name for name in rounded_outputs(*entries) if name.startswith("fc")]
    assert found == (["fc1", "fc2"] if rounded is None else rounded)


def test_a_float_output_is_said() -> None:
    got = layers_of(planned({**LINEAR, "high_precision_output": True}))
    assert [layer.notes for layer in got.values()] == [("high_precision_output: float output",)] * 2
    assert layers_of(planned(LINEAR))["fc2"].notes == ("last layer: float output",)


def test_a_float_output_behind_a_curve_has_no_inner_grid() -> None:
    model = Calls(lambda m, x: m.b(F.silu(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    got = layers_of(planned({**LINEAR, "high_precision_output": True}, model=model, example=ROW))["a"]
    assert (got.members, got.inner, list(got.targets)) == (("silu",), None, ["_input_", "weight"])
    kept = layers_of(planned(LINEAR, model=model, example=ROW))["a"]
    assert kept.inner is not None
    assert list(kept.targets) == ["_input_", "weight", "_output_"]


# -- what stays float -----------------------------------------------------------------------------------------------------


@EXAMPLES
def test_what_stays_float_and_why(seen: bool) -> None:
    plan = planned(CONVS, {"op_names": ["stage.0.add"]}, seen=seen)
    assert list(plan.left.items()) == [
        ("stage.1.add", "not selected"),
        ("stage.1.relu_1", "not selected"),
        ("mean", "not selected"),
        ("mul", "not selected"),
        ("cat", "not selected"),
        ("mul_1", "not selected"),
        ("add", "not selected"),
        ("div", "no setting for div"),
        ("fc1", "not selected"),
        ("fc2", "not selected"),
    ]
    assert layers_of(plan)["stage.0.add"].members == ("stage.0.relu_1",)
    lines = str(plan).splitlines()[-2:]
    assert lines == [
        "note: in float, not selected: stage.1.add, stage.1.relu_1, mean, mul, cat, mul_1, add, fc1, fc2",
        "note: in float, no setting for div: div",
    ]


@EXAMPLES
def test_what_only_moves_values_is_not_said_to_stay_float(seen: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        first, second = y.view(y.shape[0], -1).chunk(2, dim=y.dim() - 1)
        return m.b(torch.cat([second, first], 1).reshape(x.size(0), x.shape[1] // 1))

    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    plan = planned({"op_types": ["Linear", "cat"]}, seen=seen, model=model, example=ROW)
    assert plan.left == {}
    assert "in float" not in str(plan)


@EXAMPLES
def test_an_operator_that_writes_over_what_is_used_again_stays_float(seen: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        before = y
        y += x
        return m.b(y) + before

    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    plan = planned("int8", seen=seen, model=model, example=ROW)
    written = {"add": "add in place, and what it wrote over is used afterwards by its old name"}
    # A trace does not know what a tensor holds that was written over; a preset leaves what reads it alone.
    unknown = {} if seen else {"add_1": "not between quantized layers"}
    assert [layer.name for layer in plan.layers] == ["a", "b", *(["add_1"] if seen else [])]
    assert plan.left == {**written, **unknown}
    text = error_of({"op_names": ["add"]}, seen=seen, model=model, example=ROW)
    assert text.startswith("config_list: 'add' (add) works in place and its input is used afterwards by its old name")


@EXAMPLES
def test_a_plan_is_the_same_traced_and_recorded_and_every_time(seen: bool) -> None:
    """Constants, parameters and operators in list arguments: the same names, places, grids and sharing."""
    wanted, found = planned("int8"), planned("int8", seen=seen)
    assert found.layers == wanted.layers
    assert found.left == wanted.left
    assert {name: one.site for name, one in found.operators.items()} == {name: one.site for name, one in wanted.operators.items()}
