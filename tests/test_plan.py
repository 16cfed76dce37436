# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `plan.py`: what a `config_list` means for a model, which groups are refused and why, who shares a range."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import Calls, fingerprint

from lightning_quant.config import ConfigError
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.plan import make_plan
from lightning_quant.prepare import prepare_model


class Net(nn.Module):
    """Two conv-bn-relu blocks, a pool, two linear layers and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU6()
        self.drop = nn.Dropout()
        self.fc1 = nn.Linear(64, 6)
        self.fc2 = nn.Linear(6, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        out: Tensor = self.fc2(self.fc1(self.drop(x.flatten(1))))
        return out


class Branching(Net):
    """Asks what a number is, which no symbolic trace can answer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


UNSEEN = (
    "no recorded forward (no example_input was given, and symbolic tracing failed: symbolically traced variables cannot be used "
    "as inputs to control flow)"
)


IMAGE, ROW = torch.ones(1, 3, 8, 8), torch.ones(2, 4)
BLOCKS = [("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2")]


def layers_of(plan: Plan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def planned(*entries: dict[str, Any]) -> dict[str, LayerPlan]:
    return layers_of(make_plan(Net(), entries, example_input=IMAGE))


def specs(layer: LayerPlan) -> dict[str, str]:
    """Target -> 'dtype scheme granularity qmin..qmax'."""
    return {name: f"{t.spec} {t.spec.qmin}..{t.spec.qmax}" for name, t in layer.targets.items()}


def error_of(model: nn.Module, config_list: Any, example: Any = None, **options: Any) -> str:
    """The text of the ConfigError; the model must be as it was."""
    before = fingerprint(model)
    with pytest.raises(ConfigError) as caught:
        make_plan(model, config_list, example_input=example, **options)
    assert fingerprint(model) == before
    return str(caught.value)


# -- the printed plan -------------------------------------------------------------------------------------------------

WHOLE: list[dict[str, Any]] = [
    {"op_types": ["Conv2d", "Linear"], "fuse_names": BLOCKS},
    {"op_names": ["fc1"], "target_names": ["weight"], "quant_dtype": "uint8", "quant_scheme": "affine"},
]
TABLE = """\
module  fused with  target    dtype  scheme     granularity  decided by      notes
------  ----------  --------  -----  ---------  -----------  --------------  --------------------------------------------------
conv1   bn1, relu1  _input_   uint8  affine     per_tensor   config_list[0]
                    weight    int8   symmetric  out_channel  config_list[0]
                    _output_  uint8  affine     per_tensor   config_list[0]
conv2   bn2, relu2  _input_   uint8  affine     per_tensor   config_list[0]  shared with conv1._output_
                    weight    int8   symmetric  out_channel  config_list[0]
                    _output_  uint8  affine     per_tensor   config_list[0]
fc1                 _input_   uint8  affine     per_tensor   config_list[0]  shared with conv2._output_
                    weight    uint8  affine     out_channel  config_list[1]  overrules config_list[0]
                    _output_  uint8  affine     per_tensor   config_list[0]
fc2                 _input_   uint8  affine     per_tensor   config_list[0]  shared with fc1._output_; last layer: float output
                    weight    int8   symmetric  out_channel  config_list[0]
note: unused (Linear) is not called in the recorded forward and stays float"""


def test_the_printed_plan_is_the_whole_truth() -> None:
    assert str(make_plan(Net(), WHOLE, example_input=IMAGE)) == TABLE


def test_making_a_plan_changes_nothing() -> None:
    model = Net()
    model.bn1.eval()
    before = fingerprint(model)
    make_plan(model, WHOLE, example_input=IMAGE)
    assert fingerprint(model) == before


def test_members_and_end_of_a_group() -> None:
    got = planned({"op_names": ["conv1", "conv2", "fc1"], "fuse_names": [BLOCKS[0], ("conv2", "bn2")]})
    assert (got["conv1"].batch_norm, got["conv1"].activation) == ("bn1", "relu1")
    assert [layer.members for layer in got.values()] == [("bn1", "relu1"), ("bn2",), ()]
    assert [layer.end for layer in got.values()] == ["relu1", "bn2", "fc1"]
    assert [layer.type for layer in got.values()] == ["Conv2d", "Conv2d", "Linear"]


# -- precedence within one entry -----------------------------------------------------------------------------------------

ACT, INT8_ACT = "uint8 affine per_tensor 0..255", "int8 affine per_tensor -128..127"
WEIGHT = "int8 symmetric out_channel -127..127"
PRECEDENCE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "bare": ({}, {"_input_": ACT, "weight": WEIGHT, "_output_": ACT}),
    "shorthand dtype": (
        {"quant_dtype": "int8"}, {"_input_": INT8_ACT, "weight": WEIGHT, "_output_": INT8_ACT},
    ),
    "shorthand scheme": (
        {"quant_scheme": "affine"},
        {"_input_": ACT, "weight": "int8 affine out_channel -127..127", "_output_": ACT},
    ),
    "shorthand per_tensor": (
        {"granularity": "per_tensor"},
        {"_input_": ACT, "weight": "int8 symmetric per_tensor -127..127", "_output_": ACT},
    ),
    "shorthand default": ({"granularity": "default"}, {"_input_": ACT, "weight": WEIGHT, "_output_": ACT}),
    "symmetric int8": (
        {"quant_dtype": "int8", "quant_scheme": "symmetric"},
        {"_input_": "int8 symmetric per_tensor -127..127", "weight": WEIGHT, "_output_": "int8 symmetric per_tensor -127..127"},
    ),
    "target_settings alone": (
        {"target_settings": {"_input_": {"quant_dtype": "int8"}}}, {"_input_": INT8_ACT, "weight": WEIGHT, "_output_": ACT},
    ),
    "target_settings over shorthand": (
        {
            "quant_dtype": "int8",
            "quant_scheme": "symmetric",
            "target_settings": {"_input_": {"quant_dtype": "uint8", "quant_scheme": "affine"}},
        },
        {"_input_": ACT, "weight": WEIGHT, "_output_": "int8 symmetric per_tensor -127..127"},
    ),
    "merged key by key": (
        {"quant_dtype": "uint8", "target_settings": {"weight": {"granularity": "per_tensor"}}},
        {"_input_": ACT, "weight": "uint8 symmetric per_tensor 0..255", "_output_": ACT},
    ),
    "target_names": ({"target_names": ["weight"]}, {"weight": WEIGHT}),
    "two targets in the order of the data": (
        {"target_names": ["_output_", "_input_"]}, {"_input_": ACT, "_output_": ACT},
    ),
    "NNI's documentation": (
        {
            "target_names": ["_input_", "weight", "_output_"],
            "quant_dtype": "int8",
            "quant_scheme": "affine",
            "granularity": "default",
        },
        {"_input_": INT8_ACT, "weight": "int8 affine out_channel -127..127", "_output_": INT8_ACT},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "expected"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_setting_then_shorthand_then_target_settings(entry: dict[str, Any], expected: dict[str, str]) -> None:
    layer = planned({"op_names": ["conv1"], **entry})["conv1"]
    assert specs(layer) == expected
    assert list(layer.targets) == list(expected)
    assert {target.decided_by for target in layer.targets.values()} == {"config_list[0]"}


def test_out_channel_as_shorthand_is_meant_for_the_weight() -> None:
    layer = planned({"op_names": ["conv1"], "granularity": "out_channel"})["conv1"]
    assert specs(layer) == {"_input_": ACT, "weight": WEIGHT, "_output_": ACT}
    notes = {name: target.notes for name, target in layer.targets.items()}
    assert notes == {"_input_": ("out_channel is for weights",), "weight": (), "_output_": ("out_channel is for weights",)}


# -- precedence between entries -----------------------------------------------------------------------------------------


def test_the_later_entry_wins_per_target_and_says_so() -> None:
    got = planned(
        {"op_names": ["fc1", "fc2"], "target_names": ["weight"]},
        {"op_names": ["fc1"], "target_names": ["weight", "_output_"], "quant_dtype": "uint8"},
    )
    weight, output = got["fc1"].targets["weight"], got["fc1"].targets["_output_"]
    assert (weight.spec.dtype, weight.decided_by, weight.notes) == ("uint8", "config_list[1]", ("overrules config_list[0]",))
    assert (output.decided_by, output.notes) == ("config_list[1]", ())
    other = got["fc2"].targets["weight"]
    assert (other.spec.dtype, other.decided_by, other.notes) == ("int8", "config_list[0]", ())


def test_entries_do_not_merge_key_by_key() -> None:
    got = planned(
        {"op_names": ["fc1"], "quant_dtype": "uint8", "granularity": "per_tensor"},
        {"op_names": ["fc1"], "target_names": ["weight"], "quant_scheme": "affine"},
    )
    assert specs(got["fc1"])["weight"] == "int8 affine out_channel -127..127"


def test_the_last_of_three_entries_wins_over_the_second() -> None:
    entries = [{"op_names": ["fc1"], "quant_dtype": dtype} for dtype in ("uint8", "int8", "uint8")]
    weight = planned(*entries)["fc1"].targets["weight"]
    assert (weight.spec.dtype, weight.decided_by, weight.notes) == ("uint8", "config_list[2]", ("overrules config_list[1]",))


FLOAT_WEIGHT = "float weight: float arithmetic"


@pytest.mark.parametrize(
    ("targets", "conv", "linear"),
    [
        (["_input_", "weight", "_output_"], (), ()),
        (["_input_", "weight"], ("no output grid: float arithmetic",), ()),
        (["weight", "_output_"], ("no input grid: float arithmetic",), ("no input grid: float arithmetic",)),
        (["weight"], ("no input grid: float arithmetic",), ("no input grid: float arithmetic",)),
        (["_output_"], ("no input grid: float arithmetic",), ("no input grid: float arithmetic",)),
        (["_input_", "_output_"], (FLOAT_WEIGHT,), (FLOAT_WEIGHT,)),
        (["_input_"], (FLOAT_WEIGHT,), (FLOAT_WEIGHT,)),
    ],
    ids=str,
)
def test_a_layer_that_lacks_a_grid_says_what_follows(targets: list[str], conv: tuple[str, ...], linear: tuple[str, ...]) -> None:
    got = planned({"op_names": ["conv1", "fc1", "fc2"], "target_names": targets})
    assert (got["conv1"].notes, got["fc1"].notes) == (conv, linear)


def test_a_group_stays_when_a_later_entry_decides_a_target_anew() -> None:
    got = planned({"op_names": ["conv1"], "fuse_names": [BLOCKS[0]]}, {"op_types": ["Conv2d"], "quant_scheme": "affine"})
    assert got["conv1"].members == ("bn1", "relu1")
    assert got["conv1"].targets["weight"].decided_by == "config_list[1]"


# -- selection ----------------------------------------------------------------------------------------------------------


class Renamed(nn.Conv2d):
    """Keeps the forward of its base."""


class Rescaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def subclasses() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), Renamed(3, 3, 1), Rescaled(3, 3, 1), nn.Flatten(), nn.Linear(192, 2))


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({"op_types": ["Conv2d"]}, ["conv1", "conv2"]),
        ({"op_types": ["Linear", "Conv2d"]}, ["conv1", "conv2", "fc1", "fc2"]),
        ({"op_names": ["fc2", "conv1"]}, ["conv1", "fc2"]),
        ({"op_names": ["fc1", "relu1"], "op_types": ["Linear"]}, ["fc1"]),
        ({"op_names": ["fc1", "fc1"]}, ["fc1"]),
    ],
    ids=str,
)
def test_names_and_types_select_in_the_order_of_the_model(entry: dict[str, Any], names: list[str]) -> None:
    assert list(planned(entry)) == names


def test_the_order_is_the_models_whatever_the_order_of_the_entries() -> None:
    assert list(planned({"op_names": ["fc1"]}, {"op_names": ["conv1"]})) == ["conv1", "fc1"]


@pytest.mark.parametrize(
    ("types", "names"),
    [(["Conv2d"], ["0", "1"]), (["Renamed"], ["1"]), (["Linear"], ["4"]), (["Linear", "Renamed"], ["1", "4"])],
    ids=str,
)
def test_a_type_selects_subclasses_that_keep_its_forward(types: list[str], names: list[str]) -> None:
    plan = make_plan(subclasses(), [{"op_types": types}], example_input=IMAGE)
    assert [layer.name for layer in plan.layers] == names


def test_a_plan_of_a_subclass_names_the_base() -> None:
    plan = make_plan(subclasses(), [{"op_names": ["1"]}], example_input=IMAGE)
    assert plan.layers[0].type == "Conv2d"


@pytest.mark.parametrize("entry", [{"op_types": ["Rescaled"]}, {"op_names": ["2"]}], ids=str)
def test_a_subclass_with_its_own_forward_is_refused(entry: dict[str, Any]) -> None:
    assert error_of(subclasses(), [entry]) == (
        "config_list[0]: '2' is a Rescaled (a Conv2d with its own forward), which has no quantization setting. To register one: "
        f"QuantizationSetting.register('{__name__}.Rescaled', {{'_input_': {{}}, 'weight': {{}}, '_output_': {{}}}})"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conv1", "'conv1' has a forward of its own on the instance; what it computes is unknown. Leave it out."),
        ("relu1", "fuse_names {group!r}: 'relu1' has a forward of its own on the instance; what it computes is unknown."),
    ],
)
def test_a_module_whose_instance_was_given_a_forward_is_refused(name: str, text: str) -> None:
    model = Net()
    model.get_submodule(name).forward = lambda x: x * 2
    expected = "config_list[0]: " + text.format(group=BLOCKS[0])
    assert expected in error_of(model, [{"op_names": ["conv1"], "fuse_names": [BLOCKS[0]]}])


PRESENT = "BatchNorm2d (2), Conv2d (2), Dropout (1), Linear (3), MaxPool2d (1), ReLU (1), ReLU6 (1)"
LATER = "Layers built later are not visible before on_fit_start."


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"op_names": ["conv9"]}, f"op_names 'conv9' matches no module. Close: 'conv2', 'conv1'. {LATER}"),
        ({"op_names": ["zzzzz"]}, f"op_names 'zzzzz' matches no module. {LATER}"),
        ({"op_types": ["Conv3d"]}, f"op_types 'Conv3d' matches no module; the model has {PRESENT}. Did you mean 'Conv2d'?"),
        ({"op_types": ["Zzz"]}, f"op_types 'Zzz' matches no module; the model has {PRESENT}."),
        (
            {"op_names": ["fc1"], "target_names": ["wieght"]},
            "'fc1' (Linear) has no target 'wieght'; it has _input_, weight, bias, _output_. Did you mean 'weight'?",
        ),
        (
            {"op_names": ["fc1"], "target_settings": {"p1": {}}},
            "'fc1' (Linear) has no target 'p1'; it has _input_, weight, bias, _output_.",
        ),
        (
            {"op_names": ["fc1"], "target_names": ["_input_"], "target_settings": {"weight": {"quant_dtype": "int8"}}},
            "target_settings has 'weight', but target_names leaves it out; add it or drop its settings.",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("example", [None, IMAGE], ids=["no example", "example"])
def test_a_selection_that_cannot_be_served(entry: dict[str, Any], text: str, example: Any) -> None:
    assert error_of(Net(), [{"op_names": ["fc2"]}, entry], example) == f"config_list[1]: {text}"


@pytest.mark.parametrize("target", ["_input_", "_output_"])
def test_out_channel_asked_of_an_activation(target: str) -> None:
    """One mistake, said once, however many layers it meets."""
    entry = {"op_types": ["Linear"], "target_settings": {target: {"granularity": "out_channel"}}}
    place = f"config_list[0]['target_settings'][{target!r}]['granularity']"
    text = "out_channel is for weights; activations take default, per_tensor, per_channel or block sizes."
    assert error_of(Net(), [entry]) == f"{place}: {text}"


@pytest.mark.parametrize(
    "entry", [{"op_names": ["relu1"], "op_types": ["Linear"]}, {"op_names": ["fc1"], "op_types": ["Conv2d"]}], ids=str
)
@pytest.mark.parametrize("example", [None, IMAGE], ids=["no example", "example"])
def test_names_and_types_that_no_module_has_together(entry: dict[str, Any], example: Any) -> None:
    """Each exists; another entry that selects something hides nothing."""
    text = "config_list[1]: the names and op_types together select no module; drop one of the keys."
    assert error_of(Net(), [{"op_names": ["fc2"]}, entry], example) == text


@pytest.mark.parametrize("example", [None, IMAGE], ids=["no example", "example"])
def test_the_type_of_the_model_itself_selects_nothing(example: Any) -> None:
    text = f"config_list[0]: op_types 'Net' matches no module; the model has {PRESENT}."
    assert error_of(Net(), [{"op_types": ["Net"]}], example) == text
    assert error_of(nn.Linear(4, 4), [LINEAR], ROW).startswith("config_list[0]: op_types 'Linear' matches no module")


def test_all_problems_are_reported_together() -> None:
    config = [
        {"op_names": ["conv9", "fc1"], "target_names": ["wieght"]},
        {"op_types": ["Conv2d"], "fuse_names": [("conv1", "bn2", "bn1"), ("conv2", "nothing")]},
        {"op_names": ["relu1"], "target_settings": {"_input_": {"granularity": "in_channel"}}},
    ]
    lines = error_of(Net(), config, IMAGE).splitlines()
    assert lines[0] == "5 problems:"
    assert [re.match(r"- (config_list\[\d\]\S*:) \S+ \S+", line)[0] for line in lines[1:]] == [  # type: ignore[index]
        "- config_list[0]: op_names 'conv9'",
        "- config_list[0]: 'fc1' (Linear)",
        "- config_list[2]['target_settings']['_input_']['granularity']: in_channel is",
        "- config_list[1]: fuse_names ('conv1',",
        "- config_list[1]: fuse_names ('conv2',",
    ]


# -- fuse groups: what the modules forbid -----------------------------------------------------------------------------------

PATTERN = (
    "is no pattern that fuses; a group is Conv1d/Conv2d/Conv3d/ConvTranspose1d/ConvTranspose2d/ConvTranspose3d/Linear, then "
    "optionally the batch norm of the same dimensions, then optionally ReLU/ReLU6/Hardtanh/LeakyReLU/PReLU/SiLU/Hardswish/GELU/"
    "Sigmoid/Tanh/Hardsigmoid, as modules or functions; a batch norm may stand before a layer that does not pad; or batch norm "
    "or add, then ReLU/ReLU6/Hardtanh. `register_fusion` adds patterns."
)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (("conv1", "bn9"), "'bn9' names nothing that can be fused. Close: 'bn2', 'bn1'."),
        (("conv1", "zzzzz"), "'zzzzz' names nothing that can be fused."),
        (("zzzzz", "bn1"), "'zzzzz' names nothing that can be fused."),
        (("bn1", "relu1"), "'bn1' heads the group, but this entry does not select it; add it to op_names."),
        (("relu1", "bn1"), f"(ReLU, BatchNorm2d) {PATTERN}"),
        (("bn1", "conv2"), "'bn1' stands before 'conv2', which pads: what is padded is not normalised, so it cannot be folded."),
        (("bn1", "fc1"), "'bn1' has 4 features, 'fc1' takes 64."),
        (("conv1", "relu1", "bn1"), f"(Conv2d, ReLU, BatchNorm2d) {PATTERN}"),
        (("conv1", "pool"), f"(Conv2d, MaxPool2d) {PATTERN}"),
        (("conv1", "bn1", "bn2"), f"(Conv2d, BatchNorm2d, BatchNorm2d) {PATTERN}"),
        (("conv1", "conv2"), f"(Conv2d, Conv2d) {PATTERN}"),
        (("fc1", "bn1"), f"(Linear, BatchNorm2d) {PATTERN}"),
        (("conv1", "relu1", "relu2"), f"(Conv2d, ReLU, ReLU6) {PATTERN}"),
        (("fc1", "relu1"), "'fc1' heads the group, but this entry does not select it; add it to op_names."),
    ],
    ids=str,
)
@pytest.mark.parametrize("example", [None, IMAGE], ids=["no example", "example"])
def test_a_group_that_the_modules_forbid(group: tuple[str, ...], text: str, example: Any) -> None:
    expected = f"config_list[0]: fuse_names {group!r}: {text}"
    assert error_of(Net(), [{"op_types": ["Conv2d"], "fuse_names": [group]}], example) == expected


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (nn.BatchNorm1d(5), "'bn' has 5 features, 'fc' makes 4."),
        (
            nn.BatchNorm1d(4, track_running_stats=False),
            "'bn' has no running statistics (track_running_stats=False), so nothing can be folded.",
        ),
    ],
    ids=["features", "no statistics"],
)
@pytest.mark.parametrize("example", [None, ROW], ids=["no example", "example"])
def test_a_batch_norm_that_does_not_fit(norm: nn.Module, text: str, example: Any) -> None:
    model = Calls(lambda m, x: m.fc(x), fc=nn.Linear(4, 4), bn=norm)
    expected = f"config_list[0]: fuse_names ('fc', 'bn'): {text}"
    assert error_of(model, [{"op_types": ["Linear"], "fuse_names": [("fc", "bn")]}], example) == expected


@pytest.mark.parametrize(
    ("groups", "taken", "owner"),
    [
        ([("conv1", "bn1"), ("conv1", "bn1", "relu1")], "conv1", ("conv1", "bn1")),
        ([("conv1", "relu1"), ("conv2", "relu1")], "relu1", ("conv1", "relu1")),
        ([("conv1", "bn1", "relu1"), ("conv2", "bn1")], "bn1", ("conv1", "bn1", "relu1")),
    ],
    ids=str,
)
@pytest.mark.parametrize("entries", [1, 2])
def test_a_member_of_two_groups(groups: list[tuple[str, ...]], taken: str, owner: tuple[str, ...], entries: int) -> None:
    parts = [groups] if entries == 1 else [groups[:1], groups[1:]]
    config = [{"op_types": ["Conv2d"], "fuse_names": part} for part in parts]
    text = (
        f"config_list[{entries - 1}]: fuse_names {groups[1]!r}: {taken!r} is already fused in {owner!r}; a module belongs to one "
    )
    flow = "config_list[0]: fuse_names ('conv1', 'relu1'): 'relu1' does not read the output of 'conv1' (that is read by 'bn1')."
    problems = [f"{text}group.", flow] if taken == "relu1" else [f"{text}group."]
    expected = "2 problems:\n- " + "\n- ".join(problems) if len(problems) > 1 else problems[0]
    assert error_of(Net(), config, IMAGE) == expected


def test_the_same_group_in_two_entries_is_one_group() -> None:
    entry = {"op_names": ["conv1"], "fuse_names": [BLOCKS[0]]}
    assert planned(entry, entry)["conv1"].members == ("bn1", "relu1")


# -- fuse groups: what the recorded forward forbids ---------------------------------------------------------------------------


def fuse_error(function: Callable[..., Any], group: tuple[str, ...], example: Any = ROW, **layers: nn.Module) -> str:
    """The reason why `group` is refused in the net that `function` computes."""
    text = error_of(Calls(function, **layers), [{"op_types": ["Linear"], "fuse_names": [group]}], example)
    start = f"config_list[0]: fuse_names {group!r}: "
    assert text.startswith(start)
    return text.removeprefix(start)


def parts(**more: nn.Module) -> dict[str, nn.Module]:
    return {"fc": nn.Linear(4, 4), "bn": nn.BatchNorm1d(4), "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True), **more}


def skip(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    return m.bn(y) + y


def two_skips(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    return m.bn(y) + m.relu(y) + y.mean()


def inner_skip(m: Any, x: Tensor) -> Any:
    y = m.bn(m.fc(x))
    return m.relu(y) * y


def hidden_returned(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    return m.bn(y), {"hidden": y}


def hidden_returned_and_read(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    return m.bn(y) + y, y


def end_read_twice(m: Any, x: Tensor) -> Any:
    y = m.bn(m.fc(x))
    return y, y * 2


def in_place(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    m.inplace(y)
    return y + 1


def in_place_and_returned(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    return m.inplace(y), y


FLOWS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[str, ...], str]] = {
    "not adjacent": (
        lambda m, x: m.relu(m.bn(m.fc(x))), ("fc", "relu"),
        "'relu' does not read the output of 'fc' (that is read by 'bn').",
    ),
    "not adjacent to a function": (
        lambda m, x: m.bn(F.relu(m.fc(x))), ("fc", "bn"), "'bn' does not read the output of 'fc' (that is read by 'relu_1').",
    ),
    "read by nothing": (
        lambda m, x: m.bn(x) + 0 * len(m.fc(x)), ("fc", "bn"),
        "'bn' does not read the output of 'fc' (that is read by nothing).",
    ),
    "wrong order": (
        lambda m, x: m.fc(m.bn(x)), ("fc", "bn"), "'bn' does not read the output of 'fc' (that is read by nothing).",
    ),
    "second consumer": (
        skip, ("fc", "bn"),
        "the output of 'fc' is also read by 'add'; fused, it would not exist.",
    ),
    "two further consumers": (
        two_skips, ("fc", "bn"),
        "the output of 'fc' is also read by 'relu', 'mean'; fused, it would not exist.",
    ),
    "consumer of the middle": (
        inner_skip, ("fc", "bn", "relu"),
        "the output of 'bn' is also read by 'mul'; fused, it would not exist.",
    ),
    "returned by the model": (
        hidden_returned, ("fc", "bn"),
        "the output of 'fc' is also read by the model's output; fused, it would not exist.",
    ),
    "returned and read": (
        hidden_returned_and_read, ("fc", "bn"),
        "the output of 'fc' is also read by 'add', the model's output; fused, it would not exist.",
    ),
    "head called twice": (
        lambda m, x: m.relu(m.fc(x)) + m.fc(x), ("fc", "relu"),
        "'relu' is called once and 'fc' 2 times; a shared module cannot be fused.",
    ),
    "member not called": (
        lambda m, x: m.fc(x), ("fc", "bn"), "'bn' is called 0 times and 'fc' once; a shared module cannot be fused.",
    ),
    "written over": (
        in_place, ("fc", "inplace"),
        "'inplace' works in place and its input is used afterwards by its old name; fused, nothing is written there.",
    ),
    "written over and returned": (
        in_place_and_returned, ("fc", "inplace"),
        "'inplace' works in place and its input is used afterwards by its old name; fused, nothing is written there.",
    ),
    "head not called": (lambda m, x: m.bn(x), ("fc", "bn"), "'fc' is not called in the recorded forward."),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_a_group_that_the_data_does_not_flow_through(name: str) -> None:
    function, group, text = FLOWS[name]
    assert fuse_error(function, group, **parts()) == text


def test_names_across_blocks_are_refused_with_the_true_reader() -> None:
    text = "config_list[0]: fuse_names ('conv1', 'bn2'): 'bn2' does not read the output of 'conv1' (that is read by 'bn1')."
    assert error_of(Net(), [{"op_types": ["Conv2d"], "fuse_names": [("conv1", "bn2")]}], IMAGE) == text


def test_all_groups_that_do_not_flow_are_reported_together() -> None:
    groups = [("conv1", "bn2"), ("conv2", "bn1")]
    lines = error_of(Net(), [{"op_types": ["Conv2d"], "fuse_names": groups}], IMAGE).splitlines()
    assert lines[0] == "2 problems:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [["- config_list[0]", f"fuse_names {group!r}"] for group in groups]


def test_linear_and_batch_norm_on_sequences() -> None:
    """BatchNorm1d normalises dimension 1; a Linear makes the last. Features agree here only by chance."""
    reason = "'bn' normalises dimension 1 of a 3-D input; it folds into a Linear only on 2-D."
    assert fuse_error(lambda m, x: m.bn(m.fc(x)), ("fc", "bn"), torch.ones(2, 4, 4), **parts()) == reason


def test_convolution_and_batch_norm_without_a_batch() -> None:
    """BatchNorm1d takes the channels of a bare (C, L) for a batch. Channels and length agree here only by chance."""
    model = Calls(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv1d(3, 4, 1), bn=nn.BatchNorm1d(4))
    config = [{"op_types": ["Conv1d"], "fuse_names": [("conv", "bn")]}]
    reason = "'bn' normalises dimension 1 of an input without a batch dimension; give batches (N, C, L)."
    assert error_of(model, config, torch.ones(3, 4)) == f"config_list[0]: fuse_names ('conv', 'bn'): {reason}"
    assert make_plan(model, config, example_input=torch.ones(2, 3, 4)).layers[0].members == ("bn",)


def test_a_group_that_names_a_shared_activation_means_the_call_behind_it() -> None:
    model = Calls(lambda m, x: m.relu(m.fc(m.relu(x))), **parts())
    plan = make_plan(model, [{"op_types": ["Linear"], "fuse_names": [("fc", "relu")]}], example_input=ROW)
    assert plan.layers[0].members == ("relu_2",)
    model = Calls(lambda m, x: m.relu(m.fc(m.relu(x)) + 1), **parts())
    text = error_of(model, [{"op_types": ["Linear"], "fuse_names": [("fc", "relu")]}], ROW)
    assert text == (
        "config_list[0]: fuse_names ('fc', 'relu'): no call of 'relu' reads the output of 'fc' (that is read by 'add'). The call "
        "behind that one is meant by (..., 'fc', 'add', 'relu')."
    )


@pytest.mark.parametrize(
    ("group", "function"),
    [
        (("fc", "bn"), lambda m, x: m.bn(m.fc(x))),
        (("fc", "relu"), lambda m, x: m.relu(m.fc(x))),
        (("fc", "bn", "relu"), lambda m, x: m.relu(m.bn(m.fc(x)))),
        (("fc", "bn", "relu"), lambda m, x: m.relu(m.bn(m.fc(m.relu(m.bn(m.fc(x))))))),
        (("fc", "bn"), end_read_twice),
        (("fc", "inplace"), lambda m, x: m.inplace(m.fc(x)) + x),
    ],
    ids=["norm", "relu", "both", "whole group twice", "end read twice", "in place"],
)
def test_a_group_that_the_data_flows_through(group: tuple[str, ...], function: Callable[..., Any]) -> None:
    model = Calls(function, **parts())
    plan = make_plan(model, [{"op_types": ["Linear"], "fuse_names": [group]}], example_input=ROW)
    assert plan.layers[0].members == group[1:]


# -- the last layer -----------------------------------------------------------------------------------------------------


def outputs(function: Callable[..., Any], *entries: dict[str, Any], example: Any = ROW, **layers: nn.Module) -> dict[str, bool]:
    """Layer -> whether its output is quantized."""
    plan = make_plan(Calls(function, **layers), entries, example_input=example)
    return {layer.name: "_output_" in layer.targets for layer in plan.layers}


def two(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), **more}


def hidden_and_head(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y, m.b(y)


LINEAR = {"op_types": ["Linear"]}


@pytest.mark.parametrize(
    ("function", "quantized"),
    [
        (lambda m, x: m.b(m.a(x)), {"a": True, "b": False}),
        (lambda m, x: F.log_softmax(m.b(m.a(x)), 1), {"a": True, "b": False}),
        (lambda m, x: (m.a(x), m.b(x)), {"a": False, "b": False}),
        (lambda m, x: m.b(F.relu(m.a(x)) + x), {"a": True, "b": False}),
        (hidden_and_head, {"a": True, "b": False}),
        (lambda m, x: m.a(m.b(m.a(x))), {"a": True, "b": True}),
    ],
    ids=["chain", "softmax", "two heads", "skip", "hidden returned", "shared head"],
)
def test_a_linear_layer_that_no_other_follows_keeps_a_float_output(
    function: Callable[..., Any], quantized: dict[str, bool]
) -> None:
    assert outputs(function, LINEAR, **two()) == quantized


@pytest.mark.parametrize(
    "entry",
    [
        {**LINEAR, "target_names": ["_input_", "weight", "_output_"]},
        {**LINEAR, "target_settings": {"_output_": {"quant_dtype": "int8"}}},
    ],
    ids=["target_names", "target_settings"],
)
def test_an_output_asked_for_by_name_beats_the_default_of_the_last_layer(entry: dict[str, Any]) -> None:
    assert outputs(lambda m, x: m.b(m.a(x)), entry, **two()) == {"a": True, "b": True}


def test_a_layer_before_an_unselected_one_is_the_last() -> None:
    assert outputs(lambda m, x: m.b(m.a(x)), {"op_names": ["a"]}, **two()) == {"a": False}


def test_the_last_linear_layer_says_that_its_output_is_float() -> None:
    layer = planned({"op_types": ["Linear"]})["fc2"]
    assert layer.notes == ("last layer: float output",)
    assert list(layer.targets) == ["_input_", "weight"]


def test_the_end_of_the_last_group_counts() -> None:
    entry = {**LINEAR, "fuse_names": [("b", "relu")]}
    got = outputs(lambda m, x: F.softmax(m.relu(m.b(m.a(x))), 1), entry, **two(relu=nn.ReLU()))
    assert got == {"a": True, "b": False}


def test_a_last_convolution_keeps_its_quantized_output_and_says_why() -> None:
    layer = planned({"op_types": ["Conv2d"]})["conv2"]
    assert "_output_" in layer.targets
    assert layer.notes == ("last layer, output quantized: no int8 convolution has a float output",)


# -- shared quantizers --------------------------------------------------------------------------------------------------


def sources(function: Callable[..., Any], *entries: dict[str, Any], **layers: nn.Module) -> dict[str, str | None]:
    """Layer -> the quantizer that its input shares."""
    plan = make_plan(Calls(function, **layers), entries or (LINEAR,), example_input=ROW)
    return {layer.name: layer.targets["_input_"].source for layer in plan.layers if "_input_" in layer.targets}


def branches_of_a_relu(m: Any, x: Tensor) -> Any:
    y = F.relu(x)
    return m.a(y) + m.b(y)


def branches_of_a(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y) + m.c(y)


def a_then_b_twice(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y) + m.b(y.flatten(1))


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: y,
        lambda m, y: m.drop(y),
        lambda m, y: m.flat(y),
        lambda m, y: torch.flatten(y, 1),
        lambda m, y: F.max_pool1d(y, 1),
        lambda m, y: m.pool(y.unsqueeze(1)).squeeze(1),
        lambda m, y: m.drop(m.flat(y)).view(2, 4).contiguous(),
    ],
    ids=["nothing", "dropout", "flatten", "torch.flatten", "F.max_pool1d", "max pool", "several"],
)
def test_an_input_that_arrives_rounded_needs_no_quantizer(between: Callable[[Any, Tensor], Tensor]) -> None:
    layers = two(drop=nn.Dropout(), flat=nn.Flatten(), pool=nn.MaxPool1d(1))
    assert sources(lambda m, x: m.b(between(m, m.a(x))), **layers) == {"a": None, "b": "a._output_"}


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: F.softmax(y, 1),
        lambda m, y: m.soft(y),
        lambda m, y: y + 1,
        lambda m, y: F.avg_pool1d(y, 1),
        lambda m, y: torch.cat([y, y], 1)[:, :4],
    ],
    ids=["F.softmax", "Softmax", "add", "average", "cat"],
)
def test_new_values_need_their_own_quantizer(between: Callable[[Any, Tensor], Tensor]) -> None:
    assert sources(lambda m, x: m.b(between(m, m.a(x))), **two(soft=nn.Softmax(1))) == {"a": None, "b": None}


@pytest.mark.parametrize("between", [lambda m, y: F.relu(y), lambda m, y: m.relu(y)], ids=["F.relu", "relu"])
def test_new_values_need_no_quantizer_where_they_are_fused(between: Callable[[Any, Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.b(between(m, m.a(x)))

    assert sources(forward, **two(relu=nn.ReLU())) == {"a": None, "b": "a._output_"}
    assert sources(forward, {**LINEAR, "fuse_names": []}, **two(relu=nn.ReLU())) == {"a": None, "b": None}


def test_the_output_of_a_group_is_that_of_its_end() -> None:
    entry = {**LINEAR, "fuse_names": [("a", "bn", "relu")]}
    layers = two(bn=nn.BatchNorm1d(4), relu=nn.ReLU())
    assert sources(lambda m, x: m.b(m.relu(m.bn(m.a(x)))), entry, **layers) == {"a": None, "b": "a._output_"}


def test_two_readers_of_one_tensor_share_the_quantizer_of_the_first_called() -> None:
    assert sources(lambda m, x: m.b(x) + m.a(x), **two()) == {"a": "b._input_", "b": None}
    assert sources(branches_of_a_relu, **two()) == {"a": None, "b": "a._input_"}


def test_readers_of_different_tensors_share_nothing() -> None:
    assert sources(lambda m, x: m.a(x + 1) + m.b(x), **two()) == {"a": None, "b": None}


@pytest.mark.parametrize(
    "setting", [{"quant_dtype": "int8"}, {"quant_scheme": "symmetric"}, {"quant_dtype": "int8", "quant_scheme": "symmetric"}]
)
def test_only_equal_grids_are_shared(setting: dict[str, str]) -> None:
    entry = {"op_names": ["b"], "target_settings": {"_input_": setting}}
    assert sources(lambda m, x: m.b(m.a(x)), LINEAR, entry, **two()) == {"a": None, "b": None}
    assert sources(lambda m, x: m.a(x) + m.b(x), LINEAR, entry, **two()) == {"a": None, "b": None}


def test_a_float_output_has_no_quantizer_to_share() -> None:
    entry = {**LINEAR, "target_names": ["_input_", "weight"]}
    assert sources(lambda m, x: m.b(m.a(x)), entry, **two()) == {"a": None, "b": None}


def test_three_readers_of_a_float_output_share_one_quantizer() -> None:
    entry = {**LINEAR, "target_names": ["_input_", "weight"]}
    layers = two(c=nn.Linear(4, 4))
    got = sources(branches_of_a, entry, **layers)
    assert got == {"a": None, "b": None, "c": "b._input_"}


def test_a_layer_called_on_two_tensors_has_its_own_range_and_says_so() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)) + m.b(x), **two())
    plan = make_plan(model, [{**LINEAR, "target_names": ["_input_", "weight", "_output_"]}], example_input=ROW)
    layer = layers_of(plan)["b"]
    assert layer.targets["_input_"].source is None
    assert layer.notes == ("called 2 times: one range for all",)


def test_a_layer_called_twice_behind_one_maker_shares_its_output() -> None:
    assert sources(a_then_b_twice, **two()) == {"a": None, "b": "a._output_"}


# -- what is not called, and no example --------------------------------------------------------------------------------------


def test_a_layer_that_is_not_called_is_noted_and_stays_float() -> None:
    plan = make_plan(Net(), [LINEAR], example_input=IMAGE)
    assert list(layers_of(plan)) == ["fc1", "fc2"]
    assert plan.notes == ("unused (Linear) is not called in the recorded forward and stays float",)


def test_nothing_left_to_quantize_is_an_error() -> None:
    text = "config_list: none of the selected modules (unused) is called in the recorded forward; check example_input and root."
    assert error_of(Net(), [{"op_names": ["unused"]}], IMAGE) == text


def test_without_an_example_the_forward_is_traced() -> None:
    """The same layers, groups and shared quantizers as those of a recorded forward."""
    entry = {"op_types": ["Conv2d", "Linear"]}
    traced, recorded = make_plan(Net(), [entry]), make_plan(Net(), [entry], example_input=IMAGE)
    assert layers_of(traced)["conv1"].members == ("bn1", "relu1")
    assert traced.layers == recorded.layers
    assert traced.notes == ("no example input: the forward was traced symbolically, so shapes are unknown", *recorded.notes)


def test_where_no_forward_can_be_seen_every_input_has_its_own_quantizer() -> None:
    plan = make_plan(Branching(), [{"op_types": ["Conv2d", "Linear"], "fuse_names": []}])
    assert list(layers_of(plan)) == ["conv1", "conv2", "fc1", "fc2", "unused"]
    for layer in plan.layers:
        assert list(layer.targets) == ["_input_", "weight", "_output_"]
        assert layer.targets["_input_"].source is None
    (note,) = plan.notes
    assert note == f"{UNSEEN}: every input has its own quantizer and every output is quantized; give example_input to share them"


def test_nothing_is_fused_unseen() -> None:
    text = (
        f"fuse_names: nothing is fused unseen, and there is {UNSEEN}; give example_input, what the model is called with, so that "
        "one forward can show that each member reads the one before it and nothing else does."
    )
    assert error_of(Branching(), [{"op_types": ["Conv2d"], "fuse_names": [BLOCKS[0]]}]) == text


def test_a_forward_that_fails_says_what_the_example_should_be() -> None:
    text = error_of(Net(), [LINEAR], torch.ones(1, 5, 8, 8))
    assert text.startswith("example_input: the recorded forward of Net failed: ")
    assert "expected input[1, 5, 8, 8] to have 3 channels" in text
    remedy = (
        "Give what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or "
        "(tuple, dict)."
    )
    assert text.endswith(remedy)


def test_the_failure_itself_is_the_cause() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(Net(), [LINEAR], example_input=torch.ones(1, 5, 8, 8))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "example", [(IMAGE,), {"x": IMAGE}, ((IMAGE,), {}), ((), {"x": IMAGE})], ids=["args", "kwargs", "pair", "k"]
)
def test_every_form_of_an_example(example: Any) -> None:
    assert list(layers_of(make_plan(Net(), [LINEAR], example_input=example))) == ["fc1", "fc2"]


def test_a_prepared_model_is_refused() -> None:
    model = Net()
    prepare_model(model, make_plan(model, [LINEAR]))
    text = "Net is already prepared; call restore_model(model) before planning again."
    assert error_of(model, [LINEAR]) == text
    assert error_of(model, [LINEAR], IMAGE) == text


def test_a_malformed_config_list_is_refused_first() -> None:
    assert error_of(Net(), [{}], IMAGE).startswith("config_list[0]: selects nothing")


def pruned(layer: nn.Module) -> nn.Module:
    made: nn.Module = prune.random_unstructured(layer, "weight", amount=0.5)
    return made


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, pruned], ids=["weight_norm", "pruned"])
@pytest.mark.parametrize("example", [None, ROW], ids=["no example", "example"])
def test_a_weight_that_is_computed_anew_at_each_use_is_refused(make: Callable[[nn.Module], nn.Module], example: Any) -> None:
    text = (
        "config_list[0]: the weight of '0' is no Parameter of its own (parametrized, weight-normed or pruned); make it "
        "permanent first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove) or leave the layer out."
    )
    assert error_of(nn.Sequential(make(nn.Linear(4, 4)), nn.Linear(4, 2)), [LINEAR], example) == text


# -- root ----------------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.stem(x))
        return out


def test_names_are_relative_to_root_and_the_plan_speaks_of_the_model() -> None:
    plan = make_plan(Wrapper(), WHOLE, example_input=IMAGE, root="net")
    got = layers_of(plan)
    assert list(got) == ["net.conv1", "net.conv2", "net.fc1", "net.fc2"]
    assert got["net.conv1"].members == ("net.bn1", "net.relu1")
    assert got["net.conv1"].targets["_input_"].source is None
    assert got["net.conv2"].targets["_input_"].source == "net.conv1._output_"


def test_root_changes_nothing_but_names() -> None:
    inside, alone = make_plan(Wrapper(), WHOLE, example_input=IMAGE, root="net"), make_plan(Net(), WHOLE, example_input=IMAGE)
    assert [specs(layer) for layer in inside.layers] == [specs(layer) for layer in alone.layers]
    assert [layer.notes for layer in inside.layers] == [layer.notes for layer in alone.layers]


def test_an_empty_root_is_the_model() -> None:
    assert make_plan(Net(), WHOLE, example_input=IMAGE, root="") == make_plan(Net(), WHOLE, example_input=IMAGE)


@pytest.mark.parametrize(("root", "hint"), [("nett", " Close: 'net', 'net.fc2', 'net.fc1'."), ("zzzzz", "")])
def test_an_unknown_root(root: str, hint: str) -> None:
    assert error_of(Wrapper(), [LINEAR], IMAGE, root=root) == f"root {root!r} is no module of Wrapper.{hint}"


def test_names_outside_root_are_unknown() -> None:
    text = error_of(Wrapper(), [{"op_names": ["stem"]}], IMAGE, root="net")
    assert text.startswith("config_list[0]: op_names 'stem' matches no module.")
