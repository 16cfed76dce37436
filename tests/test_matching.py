# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `matching.py` and `discovery.py`: what a rule selects, its targets and grids, and which groups are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Net, fingerprint

from lightning_quant.config import ConfigError
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.plan import make_plan
from lightning_quant.settings import QuantizationSetting

pytestmark = pytest.mark.usefixtures("own_registries")

IMAGE, ROW = torch.ones(2, 3, 8, 8), torch.ones(2, 4)
ACT, WEIGHT = "uint8 affine per_tensor", "int8 symmetric out_channel"


class Pair(nn.Module):
    """Two arguments, a parameter, an activation with two names inside."""

    def __init__(self) -> None:
        super().__init__()
        self.p1 = nn.Parameter(torch.randn(4, 4))
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(left @ self.p1)) + right
        return out


class Branching(Net):
    """Asks what a number is, which no symbolic trace can answer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pair(x, right=x * 2)
        return out


class Named(nn.Conv2d):
    """Keeps the forward of its base."""


class Halved(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def layers_of(plan: Plan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def planned(*entries: Any, example: Any = IMAGE, model: nn.Module | None = None, **options: Any) -> dict[str, LayerPlan]:
    return layers_of(make_plan(Net() if model is None else model, list(entries), example_input=example, **options))


def specs(layer: LayerPlan) -> dict[str, str]:
    """Target -> 'dtype scheme granularity'."""
    return {name: str(target.spec) for name, target in layer.targets.items()}


def error_of(model: nn.Module, config_list: Any, example: Any = None) -> str:
    """The text of the ConfigError; the model must be as it was."""
    before = fingerprint(model)
    with pytest.raises(ConfigError) as caught:
        make_plan(model, config_list, example_input=example)
    assert fingerprint(model) == before
    return str(caught.value)


# -- selection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({"op_names_re": ["conv"]}, ["conv1", "conv2"]),
        ({"op_names_re": ["conv1$", "fc"]}, ["conv1", "fc"]),
        ({"op_names_re": ["(conv|bn)2"]}, ["conv2", "bn2"]),
        ({"op_names": ["fc"], "op_names_re": ["conv1"]}, ["conv1", "fc"]),
        ({"op_names_re": [".*1"], "op_types": ["Conv2d"]}, ["conv1"]),
        ({"op_names": ["fc"], "op_names_re": [".*1"], "op_types": ["Conv2d", "Linear"]}, ["conv1", "fc"]),
        ({"op_types": ["Conv2d"], "exclude_op_names": ["conv1"]}, ["conv2"]),
        ({"op_types": ["Conv2d", "Linear"], "exclude_op_names_re": ["c"]}, ["fc"]),
        ({"op_names_re": ["(conv|bn)"], "exclude_op_types": ["BatchNorm2d"]}, ["conv1", "conv2"]),
        ({"op_types": ["torch.nn.Conv2d"]}, ["conv1", "conv2"]),
        ({"op_types": ["torch.nn.modules.conv.Conv2d"]}, ["conv1", "conv2"]),
        ({"op_types": ["Hardtanh", "MaxPool2d"]}, ["pool"]),
    ],
    ids=str,
)
def test_names_or_regexes_and_types_minus_excludes(entry: dict[str, Any], names: list[str]) -> None:
    """nni.md 1.1; ReLU6 is a Hardtanh to torch, but none is here."""
    model = Net() if "Hardtanh" not in entry.get("op_types", ()) else Net(nn.ReLU6)
    found = list(planned({**entry, "fuse_names": []}, model=model))
    assert [name for name in found if not name.startswith("relu")] == names
    assert ("relu1" in found) == ("Hardtanh" in entry.get("op_types", ()))


@pytest.mark.parametrize("name", ["0", "Named", f"{__name__}.Named", "Conv2d"])
def test_a_subclass_goes_by_its_own_name_and_those_of_its_kept_bases(name: str) -> None:
    model = nn.Sequential(Named(3, 3, 1), nn.Conv2d(3, 3, 1))
    entry = {"op_names": [name]} if name == "0" else {"op_types": [name]}
    assert list(planned(entry, model=model)) == (["0", "1"] if name == "Conv2d" else ["0"])


@pytest.mark.parametrize(
    "entry", [{"op_names": ["pair.first"]}, {"op_names": ["pair.second"]}, {"op_names_re": ["pair.s"]}], ids=str
)
def test_a_module_with_two_names_is_selected_by_either_once(entry: dict[str, Any]) -> None:
    got = planned(entry, model=Twice(), example=ROW)
    assert list(got) == ["pair.first"]
    assert got["pair.first"].notes[0] == "also called pair.second"
    both = planned({"op_names": ["pair.second", "pair.first"]}, entry, model=Twice(), example=ROW)
    assert both["pair.first"].notes == got["pair.first"].notes


def test_a_preset_takes_what_the_model_has() -> None:
    got = planned("int8")
    assert list(got) == ["conv1", "conv2", "fc"]
    assert {target.decided_by for layer in got.values() for target in layer.targets.values()} == {"config_list[0] ('int8')"}


def test_a_pattern_leaves_what_cannot_be_quantized_and_says_so() -> None:
    plan = make_plan(Twice(), [{"op_names_re": ["pair"]}], example_input=ROW)
    assert list(layers_of(plan)) == ["pair.first", "pair.matmul", "pair.add"]
    assert plan.notes == ("config_list[0]: left as they are, without a setting: pair (Pair)",)


def test_a_pattern_leaves_modules_without_the_target() -> None:
    plan = make_plan(Net(), [{"op_names_re": ["fc|relu"], "target_names": ["weight"]}], example_input=IMAGE)
    assert list(layers_of(plan)) == ["fc"]
    (note,) = plan.notes
    assert note == (
        "config_list[0]: left as they are, without a setting: 'relu1' (ReLU) has no target 'weight'; it has _input_, _output_, "
        "'relu2' (ReLU) has no target 'weight'; it has _input_, _output_"
    )


def test_excludes_that_take_nothing_are_noted() -> None:
    plan = make_plan(Net(), [{"op_types": ["Conv2d"], "exclude_op_names": ["fc"]}], example_input=IMAGE)
    assert list(layers_of(plan)) == ["conv1", "conv2"]
    assert plan.notes == ("config_list[0]: the exclude keys take nothing out of what it selects",)


@pytest.mark.parametrize("entry", [{"op_types": ["Conv2d"]}, "int8"], ids=str)
def test_subclasses_with_a_forward_of_their_own_are_left_out_and_noted(entry: Any) -> None:
    plan = make_plan(nn.Sequential(nn.Conv2d(3, 3, 1), Halved(3, 3, 1)), [entry], example_input=IMAGE)
    assert list(layers_of(plan)) == ["0"]
    (note,) = plan.notes
    assert note.endswith(": Conv2d leaves out 1 (Halved): a forward of its own")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("entry", [{"op_types": ["Linear"]}, {"op_names_re": [""]}, "int8"], ids=str)
@pytest.mark.parametrize("example", [None, ROW], ids=["no example", "example"])
def test_scripted_modules_are_left_alone(entry: Any, example: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    assert list(planned(entry, model=model, example=example)) == ["0"]


# -- targets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["_input_0", "weight"], ["_input_", "weight"]),
        (["_input_input", "_output_0"], ["_input_", "_output_"]),
        (["*"], ["weight", "bias"]),
        (["w*", "*t"], ["weight"]),
        (["_output_", "bias", "weight", "_input_"], ["_input_", "weight", "bias", "_output_"]),
    ],
    ids=str,
)
def test_targets_have_one_name_each_in_the_order_of_the_data(targets: list[str], found: list[str]) -> None:
    assert list(planned({"op_names": ["fc"], "target_names": targets})["fc"].targets) == found


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"p1": {}}, {"p1": WEIGHT}),
        ({"_input_": {}, "_output_": {}}, {"_input_": ACT, "_output_": ACT}),
        ({"_input_right": {"quant_dtype": "int4"}}, {"_input_1": "int4 affine per_tensor"}),
        ({"p1": {}, "first.*": {}}, {"p1": WEIGHT, "first.weight": WEIGHT, "first.bias": "int8 symmetric per_tensor"}),
    ],
    ids=str,
)
def test_target_settings_are_a_setting_for_a_type_without_one(settings: dict[str, Any], found: dict[str, str]) -> None:
    got = planned({"op_names": ["pair"], "target_settings": settings}, model=Twice(), example=ROW)
    assert specs(got["pair"]) == found


def test_local_settings_are_those_of_this_plan_alone() -> None:
    entry = {"op_types": ["Pair"]}
    got = planned(entry, model=Twice(), example=ROW, settings={"Pair": {"_input_": {}, "p1": {"granularity": "in_channel"}}})
    assert specs(got["pair"]) == {"_input_": ACT, "p1": "int8 symmetric in_channel"}
    assert "'pair' is a Pair, which has no quantization setting" in error_of(Twice(), [entry], ROW)


def test_a_registered_setting_may_hold_targets_that_a_module_lacks() -> None:
    """A bias that is None."""
    QuantizationSetting.register("Linear", {"_input_": {}, "weight": {}, "bias": {}})
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    got = planned({"op_types": ["Linear"]}, model=model, example=ROW)
    assert [list(layer.targets) for layer in got.values()] == [["_input_", "weight"], ["_input_", "weight", "bias"]]


def test_targets_of_a_setting_that_a_module_lacks_are_noted() -> None:
    settings: dict[str, Any] = {"Pair": {"p1": {}, "p2": {}, "_input_4": {}}}
    layer = planned({"op_types": ["Pair"]}, model=Twice(), example=ROW, settings=settings)["pair"]
    assert list(layer.targets) == ["p1"]
    assert layer.notes[0] == "its setting also names p2, _input_4, which it lacks"


# -- precedence ---------------------------------------------------------------------------------------------------------


def test_what_stands_for_several_targets_comes_first_and_what_names_one_last() -> None:
    settings = {
        "_input_right": {"quant_scheme": "symmetric"},
        "_input_": {"quant_dtype": "int4"},
        "p1": {"quant_dtype": "int2"},
        "p*": {"quant_dtype": "int4", "granularity": "per_tensor"},
        "first.*": {"quant_dtype": "int4"},
    }
    got = planned({"op_names": ["pair"], "target_settings": settings}, model=Twice(), example=ROW)
    assert specs(got["pair"]) == {
        "_input_": "int4 affine per_tensor",
        "_input_1": "int4 symmetric per_tensor",
        "p1": "int2 symmetric per_tensor",
        "first.weight": "int4 symmetric out_channel",
        "first.bias": "int4 symmetric per_tensor",
    }


def test_a_key_that_is_none_overrules_nothing() -> None:
    entry = {"op_names": ["fc"], "quant_dtype": "int4", "target_settings": {"weight": {"quant_dtype": None}, "_input_": {}}}
    assert specs(planned(entry)["fc"])["weight"] == "int4 symmetric out_channel"


def test_how_a_target_is_trained_is_said_like_its_grid() -> None:
    entry = {"op_names": ["conv1"], "apply_method": "clamp_round", "target_settings": {"_input_": {"observer": "minmax"}}}
    targets = planned(entry)["conv1"].targets
    assert [(t.spec.apply_method, t.spec.observer) for t in targets.values()] == [
        ("clamp_round", "minmax"),
        ("clamp_round", "default"),
        ("clamp_round", "default"),
    ]


def test_an_observer_for_all_targets_is_meant_for_the_activations() -> None:
    targets = planned({"op_names": ["conv1"], "observer": "minmax"})["conv1"].targets
    assert [target.spec.observer for target in targets.values()] == ["minmax", "default", "minmax"]


def test_a_bypassed_target_stays_float_and_says_so() -> None:
    layer = planned({"op_names": ["conv1"], "target_settings": {"weight": {"apply_method": "bypass"}}})["conv1"]
    assert [target.active for target in layer.targets.values()] == [True, False, True]
    assert layer.targets["weight"].notes == ("bypass: stays float",)
    assert layer.notes[0].startswith("float weight")


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        (
            {"target_names": ["_input_", "_output_"], "quant_dtype": "int16"},
            "int16 affine per_tensor for _input_, int16 affine per_tensor for _output_",
        ),
        ({"target_settings": {"weight": {"quant_dtype": "int12"}}}, "int12 symmetric out_channel for weight"),
        (
            {"target_settings": {"weight": {"granularity": "in_channel"}, "_input_": {"granularity": "per_channel"}}},
            "uint8 affine per_channel for _input_, int8 symmetric in_channel for weight",
        ),
    ],
    ids=str,
)
def test_a_grid_that_no_kernel_has_says_so(entry: dict[str, Any], note: str) -> None:
    assert planned({"op_names": ["conv1"], **entry})["conv1"].notes[0] == f"no integer kernel has {note}: float arithmetic"


# -- granularity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "target", "value", "found"),
    [
        ("fc", "weight", [1, -1], "out_channel"),
        ("fc", "weight", [[1], "back", -1], "out_channel"),
        ("fc", "weight", [1, 128], "out_channel"),
        ("fc", "weight", [-1], "out_channel"),
        ("fc", "weight", [-1, -1], "per_tensor"),
        ("fc", "weight", [4, 128], "per_tensor"),
        ("fc", "weight", [2, -1], "[2, -1]"),
        ("fc", "weight", "in_channel", "in_channel"),
        ("fc", "bias", "default", "per_tensor"),
        ("fc", "bias", "out_channel", "out_channel"),
        ("fc", "bias", [1], "out_channel"),
        ("fc", "bias", [2], "[2]"),
        ("conv1", "weight", [1, -1], "[1, -1]"),
        ("conv1", "weight", [1, -1, -1, -1], "out_channel"),
        ("conv1", "weight", [[1], "back", -1], "out_channel"),
        ("conv1", "weight", [[1], "back"], "[[1], 'back', 1]"),
        ("conv1", "weight", "per_tensor", "per_tensor"),
        ("conv1", "_input_", "per_channel", "per_channel"),
        ("conv1", "_input_", "default", "per_tensor"),
        ("conv1", "_input_", [[-1, 3], "back", -1], "per_tensor"),
        ("conv1", "_input_", [-1, 1, 2, 4], "[-1, 1, 2, 4]"),
        ("conv1", "_output_", [[-1, 4], "back", -1], "[[-1, 4], 'back', -1]"),
        ("fc", "_input_", "per_channel", "per_channel"),
        ("fc", "_input_", [-1, 128], "per_tensor"),
    ],
    ids=str,
)
def test_a_granularity_in_its_plainest_form(module: str, target: str, value: Any, found: str) -> None:
    entry = {"op_names": [module], "target_names": [target], "target_settings": {target: {"granularity": value}}}
    assert str(planned(entry)[module].targets[target].spec.granularity) == found
    QuantizationSetting.register(type(Net().get_submodule(module)), {target: {"granularity": value}})
    got = planned({"op_names": [module], "target_names": [target]})
    assert str(got[module].targets[target].spec.granularity) == found, "the same as a registered setting"


ROWS = "one scale: granularity [[1], 'back', -1] divides dimension 0 of the activation of shape"
SHORTHAND: list[tuple[Any, dict[str, tuple[str, tuple[str, ...]]]]] = [
    (
        "per_channel",
        {
            "_input_": ("per_channel", ()),
            "weight": ("out_channel", ("per_channel is for activations",)),
            "_output_": ("per_channel", ()),
        },
    ),
    (
        "in_channel",
        {
            "_input_": ("per_tensor", ("in_channel is for weights",)),
            "weight": ("in_channel", ()),
            "_output_": ("per_tensor", ("in_channel is for weights",)),
        },
    ),
    (
        [[1], "back", -1],
        {
            "_input_": ("per_tensor", (f"{ROWS} (2, 3, 8, 8), the batch",)),
            "weight": ("out_channel", ()),
            "_output_": ("per_tensor", (f"{ROWS} (2, 8, 8, 8), the batch",)),
        },
    ),
    (
        [[-1, 4], "back", -1],
        {
            "_input_": (
                "per_tensor",
                ("one scale: the blocks [-1, 4, -1, -1] do not divide the activation of shape (2, 3, 8, 8)",),
            ),
            "weight": ("out_channel", ("the blocks [-1, 4, -1, -1] do not divide the shape (8, 3, 3, 3)",)),
            "_output_": ("[[-1, 4], 'back', -1]", ()),
        },
    ),
]


@pytest.mark.parametrize(("value", "found"), SHORTHAND, ids=str)
def test_a_granularity_for_all_targets_applies_where_it_can(value: Any, found: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    targets = planned({"op_names": ["conv1"], "granularity": value})["conv1"].targets
    assert {name: (str(target.spec.granularity), target.notes) for name, target in targets.items()} == found


def test_without_a_forward_a_granularity_for_all_targets_is_one_scale_for_activations() -> None:
    layer = planned({"op_names": ["conv1"], "granularity": [2, -1, -1, -1]}, example=None)["conv1"]
    assert specs(layer) == {"_input_": ACT, "weight": "int8 symmetric [2, -1, -1, -1]", "_output_": ACT}
    assert layer.targets["_input_"].notes == ("one scale: its shape is unknown without example_input",)
    asked = {"op_names": ["conv1"], "target_settings": {"_input_": {"granularity": "per_channel"}}}
    assert specs(planned(asked, example=None)["conv1"])["_input_"] == "uint8 affine per_channel"


# -- groups that are found ------------------------------------------------------------------------------------------------

AUTO: dict[str, Any] = {"op_types": ["Conv2d", "Linear"], "fuse_names": "auto"}
BLOCKS = {"conv1": ("bn1", "relu1"), "conv2": ("bn2", "relu2"), "fc": ()}


def members(*entries: Any, **options: Any) -> dict[str, tuple[str, ...]]:
    return {name: layer.members for name, layer in planned(*entries, **options).items()}


def test_groups_are_found_for_every_layer_of_the_entry() -> None:
    assert members(AUTO) == members("int8") == BLOCKS
    assert members(AUTO, model=Net(nn.ReLU6)) == BLOCKS
    assert members(AUTO, model=Net(nn.Sigmoid)) == BLOCKS
    assert members(AUTO, model=Net(nn.ELU)) == {"conv1": ("bn1",), "conv2": ("bn2",), "fc": ()}
    conv1_and_fc = {**AUTO, "exclude_op_names": ["conv2"]}
    assert members(conv1_and_fc, {"op_names": ["conv2"]}) == BLOCKS
    assert members(conv1_and_fc, {"op_names": ["conv2"], "fuse_names": []}) == {**BLOCKS, "conv2": ()}


NAMED: dict[str, Any] = {**AUTO, "fuse_names": [("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2")]}


@pytest.mark.parametrize("first", [AUTO, "int8", NAMED], ids=str)
def test_an_empty_list_takes_groups_back(first: Any) -> None:
    """The preset selects the batch norm, too: alone, it fuses with the activation behind it."""
    alone = {"bn1": ("relu1",)} if first == "int8" else {}
    assert members(first, {"op_names": ["conv1"], "fuse_names": []}) == {**BLOCKS, "conv1": (), **alone}


def test_a_module_that_was_taken_back_may_be_fused_anew() -> None:
    first = {**AUTO, "fuse_names": [("conv1", "bn1", "relu1")]}
    back = {"op_names": ["conv1"], "fuse_names": []}
    again = {"op_names": ["conv1"], "fuse_names": [("conv1", "bn1")]}
    assert members(first, back, again)["conv1"] == ("bn1",)


def test_a_group_that_is_named_beats_one_that_is_found() -> None:
    named = {"op_names": ["conv1"], "fuse_names": [("conv1", "bn1")]}
    assert members(AUTO, named) == members({**named, "op_names": ["conv1"]}, AUTO, named) == {**BLOCKS, "conv1": ("bn1",)}


def test_an_entry_that_says_nothing_of_groups_leaves_them() -> None:
    assert members(AUTO, {"op_names": ["conv1"], "quant_dtype": "int4"}) == BLOCKS


def test_modules_that_were_named_are_not_found_and_those_swept_up_are() -> None:
    assert members(AUTO, {"op_names": ["bn1"]})["conv1"] == ()
    got = planned(AUTO, {"op_types": ["BatchNorm2d", "ReLU"]})
    assert list(got) == ["conv1", "conv2", "fc"]
    assert got["conv1"].notes == ("bn1 is fused and has no targets of its own", "relu1 is fused and has no targets of its own")


def test_a_bias_with_a_grid_keeps_batch_norm_out() -> None:
    entry = {**AUTO, "target_names": ["_input_", "weight", "bias", "_output_"], "op_types": ["Conv2d"]}
    assert members(entry, model=Net(bias=True)) == {"conv1": (), "conv2": ()}


def test_what_ends_a_group_too_early_is_said() -> None:
    named = planned(AUTO, {"op_names": ["relu1"]})["conv1"]
    assert named.members == ("bn1",)
    assert named.notes == ("not fused further: 'relu1' is quantized or fused elsewhere",)


def test_groups_are_not_found_where_no_forward_can_be_seen() -> None:
    assert members(AUTO, example=None) == BLOCKS
    assert members(AUTO, example=None, model=Branching()) == dict.fromkeys(BLOCKS, ())
    (note,) = make_plan(Branching(), [AUTO]).notes
    assert note == (
        "no recorded forward (no example_input was given, and symbolic tracing failed: symbolically traced variables cannot be "
        "used as inputs to control flow): every input has its own quantizer and every output is quantized, "
        "nothing is fused; give example_input to share them"
    )


# -- a module that only hands values on -----------------------------------------------------------------------------------


def test_a_pool_has_one_range_for_what_comes_in_and_goes_out() -> None:
    targets = planned({"op_types": ["MaxPool2d"]})["pool"].targets
    assert [target.source for target in targets.values()] == [None, "pool._input_"]
    apart = planned({"op_types": ["MaxPool2d"], "target_settings": {"_output_": {"quant_dtype": "int4"}}})["pool"].targets
    assert [target.source for target in apart.values()] == [None, None]


# -- parts of a quantized module -------------------------------------------------------------------------------------------


def blocks() -> nn.Sequential:
    """A container with a layer, its batch norm and a second layer."""
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), nn.Linear(4, 2))


PART: dict[str, Any] = {"op_names": ["0"], "target_settings": {"0.weight": {"quant_dtype": "int4"}}}


@pytest.mark.parametrize("example", [None, ROW], ids=["no example", "example"])
def test_a_parameter_is_rounded_in_one_place(example: Any) -> None:
    """What a module has as a target of its own, the modules inside it have not, whoever swept them up."""
    got = layers_of(make_plan(blocks(), ["int8", PART], example_input=example))
    assert list(got) == ["0", "0.1", "1"]
    assert specs(got["0"]) == {"0.weight": "int4 symmetric out_channel"}
    assert "0.0 is a part of it and has no targets of its own" in got["0"].notes


def test_a_part_that_was_named_is_a_problem() -> None:
    text = "config_list[0]: '0.weight' of '0' is a parameter of '0.0', which is quantized by itself; leave one of the two out."
    assert error_of(blocks(), [PART, {"op_names": ["0.0"]}], ROW) == text


@pytest.mark.parametrize(("target", "member"), [("0.weight", "0.0"), ("1.weight", "0.1"), ("1.bias", "0.1")])
def test_a_part_that_is_fused_is_a_problem(target: str, member: str) -> None:
    entry = {"op_names": ["0"], "target_settings": {target: {}}}
    fused = {"op_types": ["Linear"], "fuse_names": [("0.0", "0.1")]}
    text = (
        f"config_list[1]: {target!r} of '0' is a parameter of {member!r}, which is quantized by itself; leave one of the two out."
    )
    assert error_of(blocks(), [fused, entry], ROW) == text


def test_groups_are_not_found_through_a_part() -> None:
    entry = {"op_names": ["0"], "target_settings": {"1.weight": {}}}
    got = layers_of(make_plan(blocks(), ["int8", entry], example_input=ROW))
    assert got["0.0"].members == ()
    assert layers_of(make_plan(blocks(), "int8", example_input=ROW))["0.0"].members == ("0.1", "0.2")


@pytest.mark.parametrize("example", [None, torch.ones(2, 3, 8)], ids=["no example", "example"])
def test_the_projection_of_an_attention_layer_is_a_part_of_it(example: Any) -> None:
    """It is a Linear, too, but attention reads its weight past its call: a layer of its own would never be observed."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0))
    got = layers_of(make_plan(model, "int8", example_input=example))
    additions = [] if example is None else ["0.add", "0.add_1"]  # its forward branches, which no trace can follow
    assert list(got) == ["0.self_attn", "0.linear1", "0.linear2", *additions]
    assert "out_proj.weight" in got["0.self_attn"].targets
