# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that a wrong config is one `ConfigError` with place, reason and remedy, and leaves the model untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from toys import fingerprint

from lightning_quant.config import ConfigError, parse_rules
from lightning_quant.layers import Plan
from lightning_quant.plan import make_plan
from lightning_quant.prepare import prepare_model, restore_model
from lightning_quant.settings import QuantizationSetting

pytestmark = pytest.mark.usefixtures("own_registries")


class Pair(nn.Module):
    """Two inputs, a switch and two parameters; no setting is registered for it."""

    def __init__(self) -> None:
        super().__init__()
        self.p1 = nn.Parameter(torch.randn(6, 6))
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        return left @ self.p1 * self.gain * scale + right


class Shifted(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Net(nn.Module):
    """conv-bn-relu, a conv that is read twice, an activation with two names, a table and modules of other types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU6()
        self.again = self.relu2
        self.embed = nn.Embedding(5, 256)
        self.fc1 = nn.Linear(256, 6)
        self.pair = Pair()
        self.own = Shifted(6, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.conv2(x)
        x = self.relu2(self.bn2(x)) + x
        y = self.fc1(x.flatten(1) + self.embed(tokens))
        out: Tensor = self.own(self.pair(y, right=y))
        return out


class Branching(Net):
    """Asks what a number is, which no symbolic trace can answer."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x, tokens)


EXAMPLE = (torch.ones(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
UNSEEN = (
    "no example_input was given, and symbolic tracing failed: symbolically traced variables cannot be used as inputs to control "
    "flow"
)
Row = tuple[Any, str]


def row(config: Any, text: str) -> Row:
    """A config and what is said of it."""
    return config, text


def watched(kind: type[Net] = Net) -> Net:
    """A net with everything that an error may not touch: hooks, frozen weights, a part in eval mode."""
    model = kind()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv1.register_forward_hook(lambda module, args, output: None)
    model.fc1.register_forward_pre_hook(lambda module, args: None)
    return model


def refusal(model: nn.Module, config: Any, example: Any = None, **options: Any) -> str:
    """The text of the one ConfigError; neither the model nor the config may have changed."""
    before, given = fingerprint(model), copy.deepcopy(config)
    with pytest.raises(MisconfigurationException) as caught:
        make_plan(model, config, example_input=example, **options)
    assert type(caught.value) is ConfigError
    assert fingerprint(model) == before
    assert config == given
    return str(caught.value)


def together(*problems: str) -> str:
    return "\n- ".join([f"{len(problems)} problems:", *problems])


# -- what shows without a model -----------------------------------------------------------------------------------------

KEYS = (
    "apply_method, exclude_op_names, exclude_op_names_re, exclude_op_types, fuse_names, granularity, high_precision_output, "
    "method, observer, op_names, op_names_re, op_types, quant_dtype, quant_scheme, target_names, target_settings"
)
TARGET_KEYS = "apply_method, granularity, method, observer, quant_dtype, quant_scheme"
TYPES = "allowed: int2 to int16 and uint2 to uint16."
LIST = (
    "config_list: expected a non-empty list of dicts, one dict or a preset (int8, int8-weight-only, w4a8), got {}; the shortest "
    "useful ones are 'int8' and [{{'op_types': ['Linear']}}]."
)
SIZES = (
    "expected one of default, per_tensor, out_channel, in_channel, per_channel, block sizes such as [1, -1] (each positive, or "
    "-1 for the whole dimension) or [sizes, 'front' or 'back', padding], got"
)
FIRST, WEIGHT = "config_list[0]", "config_list[0]['target_settings']['weight']"


def linear(**keys: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Linear"], **keys}]


def weight(**keys: Any) -> list[dict[str, Any]]:
    return linear(target_settings={"weight": keys})


WORDS: dict[str, Row] = {
    "None": row(None, LIST.format("None")),
    "a number": row(8, LIST.format("8")),
    "True": row(True, LIST.format("True")),
    "empty list": row([], LIST.format("[]")),
    "empty dict": row({}, LIST.format("{}")),
    "an empty list in a dict": row({"config_list": []}, LIST.format("[]")),
    "an entry that is None": row([None], f"{FIRST}: expected a dict, got None."),
    "an entry that is a number": row([3], f"{FIRST}: expected a dict, got 3."),
    "an entry that is a list": row([["op_types", ["Linear"]]], f"{FIRST}: expected a dict, got ['op_types', ['Linear']]."),
    "an entry that is empty": row(
        [{}],
        f"{FIRST}: selects nothing; give op_names (module names), op_names_re (regular expressions) or op_types (classes).",
    ),
    "an entry without a selection": row(
        [{"quant_dtype": "int8", "exclude_op_names": ["fc1"]}],
        f"{FIRST}: selects nothing; give op_names (module names), op_names_re (regular expressions) or op_types (classes).",
    ),
    "unknown preset in the list": row(
        ["w4a4"],
        f"{FIRST}: 'w4a4' is no preset; known: int8, int8-weight-only, w4a8. Did you mean 'w4a8'?",
    ),
    "unknown key": row(
        linear(quant_dtyp="int8"), f"{FIRST}: unknown key 'quant_dtyp'; allowed: {KEYS}. Did you mean 'quant_dtype'?"
    ),
    "unknown key of a selection": row(
        [{"op_type": ["Linear"], "op_names": ["fc1"]}],
        f"{FIRST}: unknown key 'op_type'; allowed: {KEYS}. Did you mean 'op_types'?",
    ),
    "unknown key of another library": row(linear(zzz=8), f"{FIRST}: unknown key 'zzz'; allowed: {KEYS}."),
    "a key of pruning": row(
        linear(sparse_ratio=0.5),
        f"{FIRST}: 'sparse_ratio' is a key of pruning; allowed: {KEYS}.",
    ),
    "a key of distillation": row(
        weight(link="auto"),
        f"{WEIGHT}: 'link' is a key of distillation; allowed: {TARGET_KEYS}.",
    ),
    "unknown key that is no string": row(
        [{"op_names": ["fc1"]}, {"op_names": ["fc1"], 3: 4}],
        f"config_list[1]: unknown key '3'; allowed: {KEYS}.",
    ),
    "unknown key of a target": row(
        weight(granularty="default"),
        f"{WEIGHT}: unknown key 'granularty'; allowed: {TARGET_KEYS}. Did you mean 'granularity'?",
    ),
    "key of an entry in a target": row(
        weight(op_names=["fc1"]),
        f"{WEIGHT}: unknown key 'op_names'; allowed: {TARGET_KEYS}.",
    ),
    "op_types as a string": row(
        [{"op_types": "Linear"}],
        f"{FIRST}['op_types']: expected a list of strings, got 'Linear'; write ['Linear'] for one name.",
    ),
    "op_types with a class": row(
        [{"op_types": [nn.Linear]}],
        f"{FIRST}['op_types']: expected a list of strings, got [{nn.Linear!r}]; write ['Linear'] for one name.",
    ),
    "op_names as a dict": row(
        [{"op_names": {"fc1": None}}],
        f"{FIRST}['op_names']: expected a list of strings, got {{'fc1': None}}; write ['conv1'] for one name.",
    ),
    "op_names as a number": row(
        [{"op_names": 1}],
        f"{FIRST}['op_names']: expected a list of strings, got 1; write ['conv1'] for one name.",
    ),
    "op_names as None": row(
        [{"op_names": None}],
        f"{FIRST}['op_names']: expected a list of strings, got None; write ['conv1'] for one name.",
    ),
    "op_names empty": row(
        [{"op_names": []}], f"{FIRST}['op_names']: the list is empty; name at least one, or leave the key out."
    ),
    "target_names empty": row(
        linear(target_names=[]),
        f"{FIRST}['target_names']: the list is empty; name at least one, or leave the key out.",
    ),
    "target_names as a string": row(
        linear(target_names="weight"),
        f"{FIRST}['target_names']: expected a list of strings, got 'weight'; write ['weight'] for one name.",
    ),
    "exclude_op_names with a number": row(
        linear(exclude_op_names=["fc1", 3]),
        f"{FIRST}['exclude_op_names']: expected a list of strings, got ['fc1', 3]; write ['conv1'] for one name.",
    ),
    "exclude_op_types as None": row(
        linear(exclude_op_types=None),
        f"{FIRST}['exclude_op_types']: expected a list of strings, got None; write ['conv1'] for one name.",
    ),
    "invalid regex": row(
        [{"op_names_re": ["conv("]}],
        f"{FIRST}['op_names_re']: 'conv(' is no regular expression: missing ), unterminated subpattern at position 4.",
    ),
    "invalid regex to exclude": row(
        linear(exclude_op_names_re=["*"]),
        f"{FIRST}['exclude_op_names_re']: '*' is no regular expression: nothing to repeat at position 0.",
    ),
    "op_names_re as a string": row(
        [{"op_names_re": "conv.*"}],
        f"{FIRST}['op_names_re']: expected a list of strings, got 'conv.*'; write ['conv.*'] for one name.",
    ),
    "int0": row(linear(quant_dtype="int0"), f"{FIRST}['quant_dtype']: 'int0' is no integer type; {TYPES} Did you mean 'int8'?"),
    "uint1": row(
        linear(quant_dtype="uint1"),
        f"{FIRST}['quant_dtype']: 'uint1' has one bit without a sign; one bit is int1, the values -1 and 1, of method 'bnn'.",
    ),
    "int17": row(linear(quant_dtype="int17"), f"{FIRST}['quant_dtype']: 'int17' has more than 16 bits; {TYPES}"),
    "uint99": row(weight(quant_dtype="uint99"), f"{WEIGHT}['quant_dtype']: 'uint99' has more than 16 bits; {TYPES}"),
    "float8": row(weight(quant_dtype="float8"), f"{WEIGHT}['quant_dtype']: 'float8' is no integer type; {TYPES}"),
    "bits as a number": row(linear(quant_dtype=8), f"{FIRST}['quant_dtype']: 8 is no integer type; {TYPES} Did you mean 'int8'?"),
    "scheme": row(
        linear(quant_scheme="asymmetric"),
        f"{FIRST}['quant_scheme']: 'asymmetric' is not one of affine, symmetric. Did you mean 'affine'?",
    ),
    "scheme as a list": row(
        weight(quant_scheme=["affine"]), f"{WEIGHT}['quant_scheme']: ['affine'] is not one of affine, symmetric."
    ),
    "granularity": row(
        linear(granularity="output_channel"),
        f"{FIRST}['granularity']: 'output_channel' is not one of default, per_tensor, out_channel, in_channel, per_channel, nor "
        "a list of block sizes such as [1, -1]. Did you mean 'out_channel'?",
    ),
    "size 0": row(weight(granularity=[0, -1]), f"{WEIGHT}['granularity']: {SIZES} [0, -1]."),
    "size -2": row(weight(granularity=[1, -2]), f"{WEIGHT}['granularity']: {SIZES} [1, -2]."),
    "size True": row(linear(granularity=[True, -1]), f"{FIRST}['granularity']: {SIZES} [True, -1]."),
    "size 0.5": row(linear(granularity=[0.5]), f"{FIRST}['granularity']: {SIZES} [0.5]."),
    "no sizes": row(linear(granularity=[]), f"{FIRST}['granularity']: {SIZES} []."),
    "padding at no side": row(linear(granularity=[[1], "left", -1]), f"{FIRST}['granularity']: {SIZES} [[1], 'left', -1]."),
    "padding with 0": row(linear(granularity=[[1], "back", 0]), f"{FIRST}['granularity']: {SIZES} [[1], 'back', 0]."),
    "granularity as a number": row(linear(granularity=1), f"{FIRST}['granularity']: {SIZES} 1."),
    "apply_method": row(
        linear(apply_method="lsq_clamp_round"),
        f"{FIRST}['apply_method']: 'lsq_clamp_round' is not one of bypass, clamp_round, qat_clamp_round. Did you mean "
        "'qat_clamp_round'?",
    ),
    "observer": row(
        linear(observer="histogram"),
        f"{FIRST}['observer']: 'histogram' is not one of default, moving_average, minmax, percentile, entropy, mse.",
    ),
    "method": row(
        linear(method="slq"),
        f"{FIRST}['method']: 'slq' is not one of qat, ptq, lsq, lsq+, pact, dorefa, bnn. Did you mean 'lsq'?",
    ),
    "target_settings as a list": row(
        linear(target_settings=["weight"]),
        f"{FIRST}['target_settings']: expected a dict from target to settings, got ['weight'].",
    ),
    "target_settings as None": row(
        linear(target_settings=None),
        f"{FIRST}['target_settings']: expected a dict from target to settings, got None.",
    ),
    "the settings of a target as a string": row(
        linear(target_settings={"weight": "int8"}),
        f"{WEIGHT}: expected a dict of settings, got 'int8'.",
    ),
    "fuse_names as a string": row(
        linear(fuse_names="conv1"),
        f"{FIRST}['fuse_names']: expected a list of groups such as [('conv1', 'bn1')] or 'auto', got 'conv1'.",
    ),
    "one group without its list": row(
        linear(fuse_names=("conv1", "bn1")),
        f"{FIRST}['fuse_names']: expected a list of groups, got one group; write [('conv1', 'bn1')].",
    ),
    "a group that is a string": row(
        linear(fuse_names=["conv1"]),
        f"{FIRST}['fuse_names'][0]: expected a tuple or list of module names, got 'conv1'.",
    ),
    "a group of one": row(
        linear(fuse_names=[("conv1", "bn1"), ["conv2"]]),
        f"{FIRST}['fuse_names'][1]: a group has 2 to 5 names, got 1: ('conv2',).",
    ),
    "a group of six": row(
        linear(fuse_names=[list("abcdef")]),
        f"{FIRST}['fuse_names'][0]: a group has 2 to 5 names, got 6: ('a', 'b', 'c', 'd', 'e', 'f').",
    ),
    "high_precision_output as a string": row(
        linear(high_precision_output="yes"), f"{FIRST}['high_precision_output']: expected true, false or nothing, got 'yes'."
    ),
    "high_precision_output of a target": row(
        weight(high_precision_output=True), f"{WEIGHT}: unknown key 'high_precision_output'; allowed: {TARGET_KEYS}."
    ),
    "a typo of high_precision_output": row(
        linear(high_precision_outputs=True),
        f"{FIRST}: unknown key 'high_precision_outputs'; allowed: {KEYS}. Did you mean 'high_precision_output'?",
    ),
    "a name twice in a group": row(
        linear(fuse_names=[("conv1", "bn1", "conv1")]),
        f"{FIRST}['fuse_names'][0]: a name stands twice in ('conv1', 'bn1', 'conv1'); a module can be fused once.",
    ),
}


@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["no example", "example"])
@pytest.mark.parametrize("name", WORDS)
def test_what_shows_without_a_model(name: str, example: Any) -> None:
    config, text = WORDS[name]
    assert refusal(watched(), config, example) == text


@pytest.mark.parametrize("name", WORDS)
def test_parsing_alone_says_the_same(name: str) -> None:
    config, text = WORDS[name]
    with pytest.raises(ConfigError) as caught:
        parse_rules(config)
    assert str(caught.value) == text.replace("'3'", "3")


def test_an_unknown_preset() -> None:
    """A bare string may be a path, too; sources.py says so."""
    text = refusal(watched(), "int88")
    assert text.startswith("config_list: 'int88' is neither a preset (int8, int8-weight-only, w4a8) nor a file; looked in ")
    assert text.endswith(" Did you mean 'int8'?")


# -- what shows with the modules ----------------------------------------------------------------------------------------

MODULES_ALONE = (
    "the model has BatchNorm2d (2), Conv2d (2), Embedding (1), Linear (2), Pair (1), ReLU (1), ReLU6 (1), Shifted (1)."
)
HAS = f"{MODULES_ALONE.removesuffix('.')}, add (3), matmul (1), mul (2)."
LATER = "Layers built later are not visible before on_fit_start."
FEW = "the model has 'conv1', 'bn1', 'relu1', 'conv2', 'bn2', ..."
NEAR = "the model has 'conv2', 'conv1', 'own', ..."
UNKNOWN = (
    "'pair' is a Pair, which has no quantization setting. Registered are Linear, Conv1d, Conv2d, Conv3d, Bilinear, "
    "ConvTranspose1d and others. To register one: "
    f"QuantizationSetting.register('{__name__}.Pair', {{'_input_': {{}}, 'p1': {{}}, '_output_': {{}}}})"
)
SHIFTED = (
    "'own' is a Shifted (a Linear with its own forward), which has no quantization setting. To register one: "
    f"QuantizationSetting.register('{__name__}.Shifted', {{'_input_': {{}}, 'weight': {{}}, '_output_': {{}}}})"
)
OF_FC1 = "it has _input_, weight, bias, _output_."
FIT = "config_list[0]['target_settings'][{!r}]['granularity']: "


def names(*op_names: str, **keys: Any) -> list[dict[str, Any]]:
    return [{"op_names": list(op_names), **keys}]


def blocks(module: str, target: str, granularity: Any) -> list[dict[str, Any]]:
    return names(module, target_settings={target: {"granularity": granularity}})


MODULES: dict[str, Row] = {
    "close names": row(names("conv9"), f"{FIRST}: op_names 'conv9' matches no module. Close: 'conv2', 'conv1', 'own'. {LATER}"),
    "a name like no other": row(names("zzzzz"), f"{FIRST}: op_names 'zzzzz' matches no module. {LATER}"),
    "an empty name": row(names(""), f"{FIRST}: op_names '' matches no module. {LATER}"),
    "the name of a parameter": row(
        names("fc1", "conv1.weight"),
        f"{FIRST}: op_names 'conv1.weight' matches no module. Close: 'conv1'. {LATER}",
    ),
    "a regex in op_names": row(
        names("conv.*"),
        f"{FIRST}: op_names 'conv.*' matches no module. Close: 'conv2', 'conv1'. For a regular expression write op_names_re. "
        + LATER,
    ),
    "a regex in exclude_op_names": row(
        [{"op_types": ["Conv2d"], "exclude_op_names": ["^zz"]}],
        f"{FIRST}: exclude_op_names '^zz' matches no module. For a regular expression write exclude_op_names_re. {LATER}",
    ),
    "an excluded name": row(
        [{"op_types": ["Conv2d"], "exclude_op_names": ["cnv1"]}],
        f"{FIRST}: exclude_op_names 'cnv1' matches no module. Close: 'conv1', 'conv2', 'fc1'. {LATER}",
    ),
    "a regex that matches nothing": row(
        [{"op_names_re": ["fully.*"]}], f"{FIRST}: op_names_re 'fully.*' matches no module; {FEW}"
    ),
    "a regex that matches only inside": row([{"op_names_re": ["onv"]}], f"{FIRST}: op_names_re 'onv' matches no module; {NEAR}"),
    "an excluded regex": row(
        [{"op_types": ["Conv2d"], "exclude_op_names_re": ["Conv"]}],
        f"{FIRST}: exclude_op_names_re 'Conv' matches no module; {NEAR}",
    ),
    "a type": row([{"op_types": ["Conv3d"]}], f"{FIRST}: op_types 'Conv3d' matches no module; {HAS} Did you mean 'Conv2d'?"),
    "a type in lower case": row(
        [{"op_types": ["conv2d"]}], f"{FIRST}: op_types 'conv2d' matches no module; {HAS} Did you mean 'Conv2d'?"
    ),
    "a type like no other": row([{"op_types": ["Zzz"]}], f"{FIRST}: op_types 'Zzz' matches no module; {HAS}"),
    "a dotted type": row(
        [{"op_types": ["torch.nn.Conv3d"]}],
        f"{FIRST}: op_types 'torch.nn.Conv3d' matches no module; {HAS} Did you mean 'Conv2d'?",
    ),
    "an excluded type": row(
        [{"op_types": ["Conv2d"], "exclude_op_types": ["Linaer"]}],
        f"{FIRST}: exclude_op_types 'Linaer' matches no module; {HAS} Did you mean 'Linear'?",
    ),
    "an operator": row(
        [{"op_types": ["cat"]}],
        f"{FIRST}: op_types 'cat' matches no module; {HAS} It is an operator that models call as a function, and the recorded "
        "forward calls none.",
    ),
    "the name of an operator": row(
        names("pair.add_7"),
        f"{FIRST}: op_names 'pair.add_7' matches no module. Close: 'pair.add', 'pair.mul_1', 'pair.matmul'. {LATER}",
    ),
    "a base whose forward nobody keeps": row(
        [{"op_types": ["Module"]}],
        f"{FIRST}: op_types 'Module' matches no module; {HAS} Its subclasses here have a forward of their own; name them by "
        "their own type.",
    ),
    "the model's own type": row([{"op_types": ["Net"]}], f"{FIRST}: op_types 'Net' matches no module; {HAS}"),
    "excludes take back everything": row(
        [{"op_types": ["Conv2d"], "exclude_op_names_re": ["conv"]}],
        f"{FIRST}: the exclude keys take back everything that is selected; drop one of them.",
    ),
    "an excluded type takes back a name": row(
        names("conv1", exclude_op_types=["Conv2d"]),
        f"{FIRST}: the exclude keys take back everything that is selected; drop one of them.",
    ),
    "an alias takes back its module": row(
        names("relu2", exclude_op_names=["again"]),
        f"{FIRST}: the exclude keys take back everything that is selected; drop one of them.",
    ),
    "names and types apart": row(
        names("fc1", op_types=["Conv2d"]),
        f"{FIRST}: the names and op_types together select no module; drop one of the keys.",
    ),
    "a type without a setting": row(names("pair"), f"{FIRST}: {UNKNOWN}"),
    "a type without a setting, by type": row([{"op_types": ["Pair"], "quant_dtype": "int4"}], f"{FIRST}: {UNKNOWN}"),
    "a type without a setting, targets named": row(names("pair", target_names=["p1"]), f"{FIRST}: {UNKNOWN}"),
    "a subclass with its own forward": row(names("own"), f"{FIRST}: {SHIFTED}"),
    "a regex that only such modules match": row(
        [{"op_names_re": ["own", "pair$"]}],
        f"{FIRST}: nothing that it selects can be quantized: {UNKNOWN} {SHIFTED}",
    ),
    "a typo in target_names, many modules": row(
        [{"op_names_re": ["conv", "fc"], "target_names": ["wieght"]}],
        f"{FIRST}: nothing that it selects can be quantized: 'conv1' (Conv2d) has no target 'wieght'; {OF_FC1} Did you mean "
        "'weight'? 'conv2' (Conv2d) has no target 'wieght'; it has _input_, weight, _output_. Did you mean 'weight'? And 1 more.",
    ),
    "a typo in target_names": row(
        names("fc1", target_names=["wieght"]),
        f"{FIRST}: 'fc1' (Linear) has no target 'wieght'; {OF_FC1} Did you mean 'weight'?",
    ),
    "a typo in target_settings": row(
        names("fc1", target_settings={"p1": {}}),
        f"{FIRST}: 'fc1' (Linear) has no target 'p1'; {OF_FC1}",
    ),
    "a typo in target_settings beside target_names": row(
        names("fc1", target_names=["bias"], target_settings={"biases": {}}),
        f"{FIRST}: 'fc1' (Linear) has no target 'biases'; {OF_FC1} Did you mean 'bias'?",
    ),
    "an empty target": row(names("fc1", target_names=[""]), f"{FIRST}: 'fc1' (Linear) has no target ''; {OF_FC1}"),
    "a pattern that no parameter matches": row(
        names("fc1", target_names=["p*"]),
        f"{FIRST}: 'fc1' (Linear) has no target 'p*'; {OF_FC1}",
    ),
    "an argument beyond the signature": row(
        names("fc1", target_names=["_input_3"]),
        f"{FIRST}: 'fc1' (Linear) has no target '_input_3'; the arguments of its forward are input.",
    ),
    "a third argument of two": row(
        names("pair", target_settings={"p1": {}, "_input_2": {}}),
        f"{FIRST}: 'pair' (Pair) has no target '_input_2'; the arguments of its forward are left, right, scale.",
    ),
    "an argument that does not exist": row(
        names("pair", target_settings={"_input_foo": {}}),
        f"{FIRST}: 'pair' (Pair) has no target '_input_foo'; the arguments of its forward are left, right, scale.",
    ),
    "the bias of a layer without": row(
        names("conv2", target_names=["weight", "bias"]),
        f"{FIRST}: 'conv2' (Conv2d) has no target 'bias': it is None there; it has _input_, weight, _output_.",
    ),
    "a second output of a layer": row(
        names("fc1", target_names=["_output_1"]),
        f"{FIRST}: 'fc1' (Linear) has no target '_output_1'; {OF_FC1} Did you mean '_output_'?",
    ),
    "a named output of a layer": row(
        names("fc1", target_names=["_output_hidden"]),
        f"{FIRST}: 'fc1' (Linear) has no target '_output_hidden'; {OF_FC1} Did you mean '_output_'?",
    ),
    "two names for one argument": row(
        names("pair", target_settings={"_input_1": {}, "_input_right": {}}),
        f"{FIRST}: '_input_1' and '_input_right' are one target of 'pair'; name it once.",
    ),
    "two names for one output": row(
        names("fc1", target_names=["_output_0", "_output_"]),
        f"{FIRST}: '_output_0' and '_output_' are one target of 'fc1'; name it once.",
    ),
    "two names for one target in target_settings": row(
        names("fc1", target_names=["_input_"], target_settings={"_input_": {"quant_dtype": "int8"}, "_input_input": {}}),
        f"{FIRST}: '_input_' and '_input_input' are one target of 'fc1'; name it once.",
    ),
    "target_settings left out by target_names": row(
        names("fc1", target_names=["_input_"], target_settings={"weight": {"quant_dtype": "int4"}}),
        f"{FIRST}: target_settings has 'weight', but target_names leaves it out; add it or drop its settings.",
    ),
    "out_channel of an argument": row(
        blocks("fc1", "_input_", "out_channel"),
        FIT.format("_input_") + "out_channel is for weights; activations take default, per_tensor, per_channel or block sizes.",
    ),
    "in_channel of an output": row(
        blocks("fc1", "_output_", "in_channel"),
        FIT.format("_output_") + "in_channel is for weights; activations take default, per_tensor, per_channel or block sizes.",
    ),
    "per_channel of a weight": row(
        blocks("fc1", "weight", "per_channel"),
        FIT.format("weight") + "per_channel is for activations; parameters take default, per_tensor, out_channel or in_channel.",
    ),
    "in_channel of a vector": row(
        blocks("fc1", "bias", "in_channel"),
        FIT.format("bias") + "in_channel has more dimensions than the parameter of shape (6,); give at most 1.",
    ),
    "more sizes than dimensions": row(
        blocks("fc1", "weight", [1, 1, -1]),
        FIT.format("weight") + "[1, 1, -1] has more dimensions than the parameter of shape (6, 256); give at most 2.",
    ),
    "blocks that do not divide": row(
        blocks("fc1", "weight", [4, -1]),
        FIT.format("weight") + "the blocks [4, -1] do not divide the shape (6, 256); give divisors, or -1.",
    ),
    "blocks that do not divide, padded at the back": row(
        blocks("conv1", "weight", [[-1, 2], "back", -1]),
        FIT.format("weight") + "the blocks [-1, 2, -1, -1] do not divide the shape (4, 3, 3, 3); give divisors, or -1.",
    ),
    "an observer of a weight": row(
        names("fc1", target_settings={"weight": {"observer": "minmax"}}),
        "config_list[0]['target_settings']['weight']['observer']: minmax is for activations; a parameter's range is that of its "
        "values now (default), or the share of it that rounds best (mse).",
    ),
    "a granularity that fits no target": row(
        names("fc1", target_names=["weight"], granularity="per_channel"),
        f"{FIRST}['granularity']: per_channel fits no target of this entry: per_channel is for activations.",
    ),
    "a granularity that fits no target, where something is overruled": row(
        [*names("fc1"), *names("fc1", target_names=["_input_"], granularity="in_channel", observer="minmax")],
        "config_list[1]['granularity']: in_channel fits no target of this entry: in_channel is for weights.",
    ),
    "int1": row(
        linear(quant_dtype="int1", target_names=["weight"]),
        f"{FIRST}: method 'qat' of 'weight' of Linear: int1 has one bit, which only method 'bnn' trains.",
    ),
    "bnn of 8 bits": row(
        linear(method="bnn", quant_dtype="int8", target_names=["weight"]),
        f"{FIRST}: method 'bnn' of 'weight' of Linear: its values are -1 and 1, quant_dtype 'int1', not 'int8'; leave "
        "quant_dtype out.",
    ),
    "an observer for parameters alone": row(
        names("fc1", target_names=["weight", "bias"], observer="minmax"),
        f"{FIRST}['observer']: observers are for activations, and this entry quantizes parameters only; what they can have "
        "(default, mse) stands in target_settings.",
    ),
    "high-precision output of no layer": row(
        [{"op_types": ["ReLU"], "high_precision_output": True}],
        f"{FIRST}['high_precision_output']: is for convolutions and linear layers, and this entry decides for none; to leave an "
        "output float, leave '_output_' out of target_names.",
    ),
    "a buffer": row(
        names("bn1", target_names=["running_mean"]),
        f"{FIRST}: the running_mean of 'bn1' is a buffer; targets are parameters, arguments and outputs.",
    ),
    "an unknown member": row(
        names("conv1", fuse_names=[("conv1", "bn9")]),
        f"{FIRST}: fuse_names ('conv1', 'bn9'): 'bn9' names nothing that can be fused. Close: 'bn2', 'bn1'.",
    ),
    "an unknown member like no other": row(
        names("conv1", fuse_names=[("conv1", "zzzzz")]),
        f"{FIRST}: fuse_names ('conv1', 'zzzzz'): 'zzzzz' names nothing that can be fused.",
    ),
    "a head that is not selected": row(
        names("conv1", fuse_names=[("fc1", "relu1")]),
        f"{FIRST}: fuse_names ('fc1', 'relu1'): 'fc1' heads the group, but this entry does not select it; add it to op_names.",
    ),
    "types that do not fuse": row(
        names("conv1", fuse_names=[("conv1", "relu1", "bn1")]),
        f"{FIRST}: fuse_names ('conv1', 'relu1', 'bn1'): (Conv2d, ReLU, BatchNorm2d) is no pattern that fuses; a group is "
        "Conv1d/Conv2d/Conv3d/ConvTranspose1d/ConvTranspose2d/ConvTranspose3d/Linear, then optionally the batch norm of the same "
        "dimensions, then optionally ReLU/ReLU6/Hardtanh/LeakyReLU/PReLU/SiLU/Hardswish/GELU/Sigmoid/Tanh/Hardsigmoid, as "
        "modules or functions; a batch norm may stand before a layer that does not pad; or batch norm or add, then ReLU/ReLU6/"
        "Hardtanh. `register_fusion` adds patterns.",
    ),
}


@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["traced", "example"])
@pytest.mark.parametrize("name", MODULES)
def test_what_shows_with_the_modules(name: str, example: Any) -> None:
    config, text = MODULES[name]
    assert refusal(watched(), config, example) == text


ONLY_SEEN = "Operators that a forward calls as functions show only with example_input."
# What is said of operators where no forward could be seen.
WITHOUT_A_FORWARD = {
    "an operator": f"{FIRST}: op_types 'cat' matches no module; {MODULES_ALONE} It is an operator that models call as a "
    "function, and there is no recorded forward: give example_input.",
    "the name of an operator": f"{FIRST}: op_names 'pair.add_7' matches no module. Close: 'pair'. {ONLY_SEEN}",
}


@pytest.mark.parametrize("name", MODULES)
def test_what_shows_with_the_modules_where_no_forward_can_be_seen(name: str) -> None:
    config, text = MODULES[name]
    expected = WITHOUT_A_FORWARD.get(name, text.replace(HAS, MODULES_ALONE))
    assert refusal(watched(Branching), config) == expected


@pytest.mark.parametrize("name", MODULES)
def test_a_good_entry_before_hides_nothing(name: str) -> None:
    config, text = MODULES[name]
    moved = text.replace("config_list[1]", "config_list[2]").replace("config_list[0]", "config_list[1]")
    assert refusal(watched(), [{"op_names": ["bn2"]}, *config]) == moved


NOTHING = "the model has no layer that this preset quantizes; it has"


@pytest.mark.parametrize(
    ("model", "has"), [(nn.Sequential(nn.ReLU(), nn.Flatten()), "Flatten (1), ReLU (1)"), (nn.Sequential(), "no modules")]
)
def test_a_preset_that_finds_nothing(model: nn.Module, has: str) -> None:
    assert refusal(model, "int8") == f"config_list[0] ('int8'): {NOTHING} {has}."


# -- what shows in the recorded forward -----------------------------------------------------------------------------------

FLOATING = "is no floating-point tensor in the recorded forward"
BATCH = (
    "the batch; its length changes, so write 'per_channel' or [[-1, 1], 'back', -1] for a scale for each index of dimension 1."
)
SEEN: dict[str, Row] = {
    "a second output of a module with one": row(
        names("pair", target_settings={"_output_1": {}}),
        f"{FIRST}: '_output_1' of 'pair' {FLOATING}: it is absent; there are _output_.",
    ),
    "a named output of a tensor": row(
        names("pair", target_settings={"_output_hidden": {}}),
        f"{FIRST}: '_output_hidden' of 'pair' {FLOATING}: it is absent; there are _output_.",
    ),
    "an argument that is not passed": row(
        names("pair", target_settings={"_input_scale": {}}),
        f"{FIRST}: '_input_scale' of 'pair' {FLOATING}: it is not given at all; there are _input_, _input_1.",
    ),
    "blocks along the batch": row(
        blocks("fc1", "_input_", [1, -1]),
        f"{FIRST}: '_input_' of 'fc1': granularity [1, -1] divides dimension 0 of the activation of shape (2, 256), {BATCH}",
    ),
    "blocks along the batch by padding": row(
        blocks("conv1", "_input_", [-1, 1]),
        f"{FIRST}: '_input_' of 'conv1': granularity [-1, 1] divides dimension 0 of the activation of shape (2, 3, 8, 8), "
        + BATCH,
    ),
    "more sizes than dimensions": row(
        blocks("fc1", "_output_", [-1, 1, 1]),
        f"{FIRST}: '_output_' of 'fc1': granularity [-1, 1, 1] has more dimensions than the activation of shape (2, 6).",
    ),
    "blocks that do not divide": row(
        blocks("conv1", "_output_", [[-1, 3], "back", -1]),
        f"{FIRST}: '_output_' of 'conv1': the blocks [-1, 3, -1, -1] do not divide the activation of shape (2, 4, 8, 8).",
    ),
    "nothing selected is called": row(
        names("unused"),
        "config_list: none of the selected modules (unused) is called in the recorded forward; check example_input and root.",
    ),
    "a member that is also named": row(
        names("conv1", "bn1", fuse_names=[("conv1", "bn1")]),
        f"{FIRST}: fuse_names ('conv1', 'bn1'): 'bn1' is also quantized by its name, but a fused module has no targets of its "
        "own; take it out of op_names or out of the group.",
    ),
    "an output that is read twice": row(
        names("conv2", fuse_names=[("conv2", "bn2")]),
        f"{FIRST}: fuse_names ('conv2', 'bn2'): the output of 'conv2' is also read by 'add'; fused, it would not exist.",
    ),
    "a member that reads another": row(
        names("conv1", fuse_names=[("conv1", "bn1", "relu2")]),
        f"{FIRST}: fuse_names ('conv1', 'bn1', 'relu2'): 'relu2' does not read the output of 'bn1' (that is read by 'relu1').",
    ),
    "a module in two groups": row(
        [*names("conv1", fuse_names=[("conv1", "bn1", "relu1")]), *names("conv2", fuse_names=[("conv2", "bn1")])],
        "config_list[1]: fuse_names ('conv2', 'bn1'): 'bn1' is already fused in ('conv1', 'bn1', 'relu1'); a module belongs to "
        "one group.",
    ),
    "a bias that batch norm folds into": row(
        names("conv1", target_names=["weight", "bias"], fuse_names=[("conv1", "bn1")]),
        f"{FIRST}: 'bias' of 'conv1' has no grid of its own: batch norm folds into it, and a folded bias is int32 on the layer's "
        "grid by itself; leave it out of the targets.",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_shows_in_the_recorded_forward(name: str) -> None:
    config, text = SEEN[name]
    assert refusal(watched(), config, EXAMPLE) == text


def test_integers_are_no_floating_point_tensor() -> None:
    text = refusal(watched(), names("embed", target_names=["_input_", "weight"]), EXAMPLE)
    assert text.startswith(f"{FIRST}: '_input_' of 'embed' {FLOATING}")
    assert text.endswith("; there are none.")


def test_nothing_is_left_of_the_targets() -> None:
    """What is not asked for by name gives way to what the forward shows; all of it, here."""
    text = "config_list: the recorded forward left no target to quantize; name one in target_names."
    model = nn.Sequential(nn.Flatten(), nn.Embedding(4, 4))
    assert refusal(model, [{"op_types": ["Flatten"]}], torch.zeros(2, 1, dtype=torch.long)) == text


def test_groups_need_a_forward() -> None:
    assert refusal(watched(Branching), names("conv1", fuse_names=[("conv1", "bn1")])) == (
        f"fuse_names: nothing is fused unseen, and there is no recorded forward ({UNSEEN}); give example_input, what the model "
        "is called with, so that one forward can show that each member reads the one before it and nothing else does."
    )


def test_a_forward_that_fails() -> None:
    text = refusal(watched(), names("conv1"), (torch.ones(2, 5, 8, 8), EXAMPLE[1]))
    assert text.startswith("example_input: the recorded forward of Net failed: ")
    assert text.endswith(
        ". Give what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or "
        "(tuple, dict)."
    )


@pytest.mark.parametrize(
    ("granularity", "why"),
    [
        ("per_channel", "its shape is unknown without example_input"),
        ([[1], "back", -1], "granularity [[1], 'back', -1] divides dimension 0 of the activation of shape (2, 256), the batch"),
    ],
)
def test_a_granularity_that_fits_no_activation(granularity: Any, why: str) -> None:
    example = None if granularity == "per_channel" else EXAMPLE
    entry = {"target_names": ["_input_"], "granularity": granularity, "observer": "minmax"}
    text = refusal(watched(), [*names("fc1"), *names("fc1", **entry)], example)
    assert text.startswith("config_list[1]['granularity']: ")
    assert text.endswith(f" fits no target of this entry: {why}.")


def test_an_unknown_root() -> None:
    assert refusal(watched(), names("conv1"), root="par") == "root 'par' is no module of Net. Close: 'pair'."
    assert refusal(watched(), names("conv1"), root=3) == "root: expected the name of a submodule or None, got 3."


def test_names_are_relative_to_root() -> None:
    text = f"{FIRST}: op_names 'net.conv1' matches no module. Close: 'conv1', 'conv2'. Names are relative to root 'net'. {LATER}"
    model = nn.ModuleDict({"net": watched()})
    assert refusal(model, names("net.conv1"), root="net") == text


def test_many_modules_of_one_unknown_type_are_one_problem() -> None:
    model = nn.Sequential(Pair(), Pair(), Pair())
    text = f"{FIRST}: {UNKNOWN} The same holds for 2 more.".replace("'pair'", "'0'")
    assert refusal(model, [{"op_types": ["Pair"]}]) == text


# -- several problems at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["no example", "example"])
def test_all_problems_of_the_words_are_reported_together(example: Any) -> None:
    config = [
        {"op_type": ["Linear"], "granularity": [0]},
        3,
        "int9",
        {
            "op_names_re": ["("],
            "fuse_names": [("a",)],
            "target_settings": {"weight": {"quant_dtype": "uint1", "x": 1}, "bias": 0},
        },
    ]
    assert refusal(watched(), config, example) == together(
        f"{FIRST}: unknown key 'op_type'; allowed: {KEYS}. Did you mean 'op_types'?",
        f"{FIRST}['granularity']: {SIZES} [0].",
        "config_list[1]: expected a dict, got 3.",
        "config_list[2]: 'int9' is no preset; known: int8, int8-weight-only, w4a8. Did you mean 'int8'?",
        "config_list[3]['op_names_re']: '(' is no regular expression: missing ), unterminated subpattern at position 0.",
        f"config_list[3]['target_settings']['weight']: unknown key 'x'; allowed: {TARGET_KEYS}.",
        "config_list[3]['target_settings']['weight']['quant_dtype']: 'uint1' has one bit without a sign; one bit is int1, the "
        "values -1 and 1, of method 'bnn'.",
        "config_list[3]['target_settings']['bias']: expected a dict of settings, got 0.",
        "config_list[3]['fuse_names'][0]: a group has 2 to 5 names, got 1: ('a',).",
    )


def test_all_problems_of_the_model_and_its_forward_are_reported_together() -> None:
    config = [
        *names("conv9", "fc1", target_names=["wieght", "_input_7"]),
        {"op_types": ["Conv2d", "Zzz"], "fuse_names": [("conv1", "bn2"), ("conv2", "bn2"), ("fc1", "relu1")]},
        *names(
            "pair", target_settings={"_output_1": {}, "_input_": {"granularity": [1, 1]}, "gain": {"granularity": "in_channel"}}
        ),
        {"op_types": ["Linear"], "exclude_op_names": ["fc1", "unused"]},
    ]
    assert refusal(watched(), config, EXAMPLE) == together(
        f"{FIRST}: op_names 'conv9' matches no module. Close: 'conv2', 'conv1', 'own'. {LATER}",
        f"{FIRST}: 'fc1' (Linear) has no target 'wieght'; {OF_FC1} Did you mean 'weight'?",
        f"{FIRST}: 'fc1' (Linear) has no target '_input_7'; the arguments of its forward are input.",
        f"config_list[1]: op_types 'Zzz' matches no module; {HAS}",
        "config_list[2]['target_settings']['gain']['granularity']: in_channel has more dimensions than the parameter of shape "
        "(6,); give at most 1.",
        "config_list[3]: the exclude keys take back everything that is selected; drop one of them.",
        "config_list[1]: fuse_names ('conv2', 'bn2'): 'bn2' is already fused in ('conv1', 'bn2'); a module belongs to one group.",
        "config_list[1]: fuse_names ('fc1', 'relu1'): 'fc1' heads the group, but this entry does not select it; add it to "
        "op_names.",
        "config_list[1]: fuse_names ('conv1', 'bn2'): 'bn2' does not read the output of 'conv1' (that is read by 'bn1').",
        f"config_list[2]: '_output_1' of 'pair' {FLOATING}: it is absent; there are _output_.",
        "config_list[2]: '_input_' of 'pair': granularity [1, 1] divides dimension 0 of the activation of shape (2, 6), " + BATCH,
    )


def test_one_mistake_is_said_once_however_many_layers_it_meets() -> None:
    config = [{"op_types": ["Linear", "Conv2d"], "target_settings": {"_input_": {"granularity": "out_channel"}}}]
    assert "\n" not in refusal(watched(), config, EXAMPLE)


# -- modules that cannot be quantized as they are -------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def with_computed(name: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, name, Doubled())
    return layer


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "weight"),
    "parametrized weight": (lambda: with_computed("weight"), "weight"),
    "parametrized bias": (lambda: with_computed("bias"), "bias"),
    "pruned weight": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5), "weight"),
    "pruned bias": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "bias", amount=0.5), "bias"),
}


@pytest.mark.parametrize("targets", [None, ["_input_"], ["weight"], ["weight", "bias"]], ids=str)
@pytest.mark.parametrize("name", COMPUTED)
def test_parameters_that_are_computed_are_refused_whether_they_are_targets_or_not(name: str, targets: list[str] | None) -> None:
    """Folding reads the weight and the bias of a layer in any case."""
    make, parameter = COMPUTED[name]
    model = nn.Sequential(make(), nn.BatchNorm1d(4))
    text = (
        f"config_list[0]: the {parameter} of '0' is no Parameter of its own (parametrized, weight-normed or pruned); make it "
        "permanent first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove) or leave the layer out."
    )
    entry: dict[str, Any] = {"op_names": ["0"]} if targets is None else {"op_names": ["0"], "target_names": targets}
    assert refusal(model, [entry], torch.ones(2, 4)) == text
    assert text in refusal(model, [{**entry, "fuse_names": [("0", "1")]}])


def test_a_preset_that_finds_only_computed_weights() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    text = refusal(model, "int8", torch.ones(2, 4))
    assert text.startswith("config_list[0] ('int8'): nothing that it selects can be quantized: the weight of '0' is no Parameter")


def test_a_forward_on_the_instance_is_refused() -> None:
    model = watched()
    for module in (model.bn1, model.fc1):
        module.__dict__["forward"] = nn.Identity()
    own = "has a forward of its own on the instance; what it computes is unknown."
    config = names("fc1", "conv1", fuse_names=[("conv1", "bn1")])
    problems = [f"{FIRST}: 'fc1' {own} Leave it out.", f"{FIRST}: fuse_names ('conv1', 'bn1'): 'bn1' {own}"]
    assert refusal(model, config) == together(*problems)


def test_a_lazy_layer_is_refused() -> None:
    text = "'0' (LazyLinear) is lazy and its parameters have no shape yet; call the model once before planning."
    model = nn.Sequential(nn.LazyLinear(4))
    before = [type(module) for module in model.modules()]
    for config, start in (([{"op_types": ["Linear"]}], ""), ("int8", " ('int8'): nothing that it selects can be quantized:")):
        with pytest.raises(ConfigError) as caught:
            make_plan(model, config)
        assert str(caught.value) == f"config_list[0]{start or ':'} {text}"
    assert [type(module) for module in model.modules()] == before


def test_a_table_that_rewrites_itself_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    assert refusal(model, names("0")) == (
        "config_list[0]: '0' (Embedding) has max_norm, which rewrites its weight in every forward; leave it out, or renormalise "
        "in the training step."
    )


def test_a_prepared_model_is_refused_and_stays_prepared() -> None:
    model = Net()
    prepare_model(model, make_plan(model, names("conv1"), example_input=EXAMPLE))
    text = "Net is already prepared; call restore_model(model) before planning again."
    assert refusal(model, names("conv1")) == refusal(model, names("conv1"), EXAMPLE) == text
    restore_model(model)
    assert isinstance(make_plan(model, names("conv1"), example_input=EXAMPLE), Plan)


# -- settings -----------------------------------------------------------------------------------------------------------

P1_MISFIT = (
    "QuantizationSetting of Pair['p1']['granularity']: the blocks [4, -1] do not divide the shape (6, 6); give divisors, or -1."
)
SETTINGS: dict[str, Row] = {
    "a list": row([["Pair"]], "settings: expected a dict from module type to setting, got [['Pair']]."),
    "a number": row(3, "settings: expected a dict from module type to setting, got 3."),
    "a setting that is None": row({"Pair": None}, "settings['Pair']: expected a dict from target to settings, got None."),
    "a setting without a target": row(
        {"Pair": {}},
        "settings['Pair']: the setting has no target; give at least one, such as {'weight': {}}.",
    ),
    "a target that is None": row({"Pair": {"p1": None}}, "settings['Pair']['p1']: expected a dict of settings, got None."),
    "an unknown key": row(
        {"Pair": {"p1": {"dtype": "int8"}}},
        f"settings['Pair']['p1']: unknown key 'dtype'; allowed: {TARGET_KEYS}. Did you mean 'quant_dtype'?",
    ),
    "a type that the model lacks": row(
        {"Pair": {"p1": {}}, "Pear": {"p1": {}}}, f"settings: 'Pear' matches no module; {HAS} Did you mean 'Pair'?"
    ),
    "a target that the type lacks": row(
        {"Pair": {"p2": {}}},
        f"{FIRST}: the setting of Pair: 'pair' (Pair) has no target 'p2'; it has _input_, p1, gain, _output_. Did you mean 'p1'?",
    ),
    "an argument that the type lacks": row(
        {"Pair": {"_input_4": {}}},
        f"{FIRST}: the setting of Pair: 'pair' (Pair) has no target '_input_4'; the arguments of its forward are left, right, "
        "scale.",
    ),
    "a wrong word": row(
        {"Pair": {"p1": {"quant_scheme": "none"}}},
        "settings['Pair']['p1']['quant_scheme']: 'none' is not one of affine, symmetric.",
    ),
    "sizes that do not divide": row(
        {"Pair": {"p1": {"granularity": [4, -1]}}},
        P1_MISFIT,
    ),
    "a granularity of weights": row(
        {"Pair": {"_input_": {"granularity": "out_channel"}}},
        "QuantizationSetting of Pair['_input_']['granularity']: out_channel is for weights; activations take default, "
        "per_tensor, per_channel or block sizes.",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be(name: str) -> None:
    settings, text = SETTINGS[name]
    assert refusal(watched(), names("pair"), EXAMPLE, settings=settings) == text


@pytest.mark.parametrize("entry", [{}, {"granularity": "per_channel"}], ids=str)
def test_a_registered_granularity_that_does_not_fit(entry: Mapping[str, Any]) -> None:
    """An entry's own granularity gives way to that of the setting, which must fit then."""
    QuantizationSetting.register(Pair, {"p1": {"granularity": [4, -1]}})
    assert refusal(watched(), names("pair", **entry)) == P1_MISFIT


def test_all_problems_of_settings_are_reported_together() -> None:
    settings = {"Pair": {"p1": {"x": 1}}, "Shifted": {}}
    assert refusal(watched(), names("pair"), settings=settings) == together(
        f"settings['Pair']['p1']: unknown key 'x'; allowed: {TARGET_KEYS}.",
        "settings['Shifted']: the setting has no target; give at least one, such as {'weight': {}}.",
    )
