# SPDX-License-Identifier: Apache-2.0
"""Owns the three registries of settings: who finds what under which name, what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from toys import FUSED, Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, make_plan
from lightning_quant.settings import DistillationSetting, PruningSetting, QuantizationSetting

Registry = type[QuantizationSetting] | type[PruningSetting] | type[DistillationSetting]
REGISTRIES: list[Registry] = [QuantizationSetting, PruningSetting, DistillationSetting]
# A setting that each registry takes, and one that says something else.
SOME: dict[Registry, tuple[dict[str, Any], dict[str, Any]]] = {
    QuantizationSetting: ({"p": {"quant_dtype": "int4"}, "_output_": {}}, {"_input_": {"quant_scheme": "symmetric"}}),
    PruningSetting: ({"p": {"sparse_ratio": 0.5}}, {"weight": {"apply_method": "add"}}),
    DistillationSetting: ({"_output_": {"lambda": 0.5, "apply_method": "kl"}}, {"_output_": {"link": ["a", "b"]}}),
}
every_registry = pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.__name__)

pytestmark = pytest.mark.usefixtures("own_registries")


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    tables = [table for owner in REGISTRIES for table in (owner.registry, owner._types)]
    before = copy.deepcopy([list(table.items()) for table in tables])
    yield
    assert [list(table.items()) for table in tables] == before, "also the settings' own contents and their order"


class Own(nn.Module):
    """A module of a user's own, with a parameter p."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.p


class Kept(Own):
    """Computes what Own computes."""


class Changed(Own):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.p.sum()


def class_of_another_file(name: str = "Own", file: str = "another_file") -> type[nn.Module]:
    """A class of that name that is not this file's."""
    return type(name, (nn.Module,), {"forward": lambda self, x: x, "__module__": file, "__qualname__": name})


# -- register, unregister, get -----------------------------------------------------------------------------------------------


@every_registry
@pytest.mark.parametrize("called", ["Own", Own, f"{__name__}.Own"], ids=["name", "class", "dotted path"])
def test_registered_by_name_class_or_dotted_path(registry: Registry, called: Any) -> None:
    setting, _ = SOME[registry]
    registry.register(called, setting)
    assert registry.get(called) == setting
    assert registry.get(Own) == setting
    assert registry.get(Own()) == setting
    assert registry.find(Own) == setting
    assert list(registry.get(Own)) == list(setting), "in the user's order"
    registry.unregister(called)
    with pytest.raises(ConfigError, match=f"{registry.__name__}: '{getattr(called, '__name__', called)}' is not registered"):
        registry.unregister(called)


@every_registry
def test_registering_again_replaces_whole(registry: Registry) -> None:
    first, second = SOME[registry]
    registry.register(Own, first)
    registry.register(Own, second)
    assert registry.get(Own) == second, "not merged"
    registry.register("Own", first)
    assert registry.get(Own) == first, "the name and the class are one entry"
    assert list(registry.registry).count("Own") == 1


@every_registry
def test_settings_are_copied_in_and_out(registry: Registry) -> None:
    given = copy.deepcopy(SOME[registry][0])
    expected = copy.deepcopy(given)
    registry.register(Own, given)
    for key in given:
        given[key]["granularity"] = "default"
    given["further"] = {}
    assert registry.get(Own) == expected
    got = registry.get(Own)
    for keys in got.values():
        keys.clear()
    got.clear()
    assert registry.get(Own) == expected


def test_nested_values_are_copied_too() -> None:
    sizes, align = [1, -1], {"module_name": None, "target_name": "weight", "dims": [0]}
    QuantizationSetting.register(Own, {"p": {"granularity": sizes}})
    PruningSetting.register(Own, {"p": {"align": align}})
    sizes[0] = 7
    align["dims"].append(1)  # type: ignore[union-attr]
    assert QuantizationSetting.get(Own) == {"p": {"granularity": [1, -1]}}
    PruningSetting.get(Own)["p"]["align"]["dims"].append(2)
    assert PruningSetting.get(Own)["p"]["align"]["dims"] == [0]


def test_the_registries_are_three() -> None:
    for registry in REGISTRIES:
        registry.register("OnlyHere", SOME[registry][0])
        for other in REGISTRIES:
            assert ("OnlyHere" in other.registry) == (other is registry)
        registry.unregister("OnlyHere")


@every_registry
def test_unregistering_by_class_and_what_remains(registry: Registry) -> None:
    first, second = SOME[registry]
    registry.register(Own, first)
    registry.register(f"{__name__}.Own", second)
    assert registry.get(Own) == second, "a dotted path comes before a name"
    registry.unregister(f"{__name__}.Own")
    assert registry.get(Own) == first
    registry.unregister(Own)
    assert "Own" not in registry.registry


@pytest.mark.parametrize("registry", [QuantizationSetting, PruningSetting], ids=lambda r: r.__name__)
def test_unknown_types_have_the_closest_names_in_the_error(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=rf"^{registry.__name__}: 'Lineer' is not registered\. Closest: 'Linear'"):
        registry.get("Lineer")
    with pytest.raises(ConfigError, match=r"Setting: 'Conv5d' is not registered\. Closest: 'Conv3d', 'Conv2d', 'Conv1d'"):
        registry.unregister("Conv5d")
    with pytest.raises(ConfigError, match=rf"^{registry.__name__}: 'Own' is not registered\.$|Closest"):
        registry.get(Own)
    with pytest.raises(ConfigError, match=rf"^{registry.__name__}: 'Qq' is not registered\.$"):
        registry.get("Qq")


def test_any_module_can_be_distilled() -> None:
    """NNI: an output setting is registered for every type by itself."""
    expected = {"_output_": {"lambda": 1.0, "link": "auto", "apply_method": "mse"}}
    assert DistillationSetting.get(Own) == expected
    assert DistillationSetting.get(nn.Linear(2, 2)) == expected
    assert DistillationSetting.find(Changed) == expected
    DistillationSetting.register(Own, {"_output_": {"lambda": 2}})
    assert DistillationSetting.get(Kept) == {"_output_": {"lambda": 2}}


# -- temporary ---------------------------------------------------------------------------------------------------------------


@every_registry
def test_temporary_is_gone_afterwards(registry: Registry) -> None:
    setting, _ = SOME[registry]
    with registry.temporary(Own, setting):
        assert registry.get(Own) == setting
    assert "Own" not in registry.registry
    assert "Own" not in registry._types


@every_registry
def test_temporary_is_gone_after_an_exception(registry: Registry) -> None:
    first, second = SOME[registry]
    registry.register(Own, first)
    order = list(registry.registry)

    def fail() -> None:
        assert registry.get(Own) == second
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), registry.temporary(Own, second):
        fail()
    assert registry.get(Own) == first
    assert list(registry.registry) == order
    with pytest.raises(ConfigError), registry.temporary("Other", {"p": {"nonsense": 1}}):
        pass
    assert "Other" not in registry.registry


def test_temporary_in_place_of_a_built_in_one() -> None:
    before = QuantizationSetting.get("Linear")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with QuantizationSetting.temporary("Linear", {"weight": {"quant_dtype": "int3"}}):
        (layer, _) = make_plan(net, [{"op_types": ["Linear"]}]).layers
        assert {name: str(one.spec) for name, one in layer.targets.items()} == {"weight": "int3 symmetric out_channel"}
        with QuantizationSetting.temporary(nn.Linear, {"weight": {}, "bias": {}}):
            assert list(QuantizationSetting.get("Linear")) == ["weight", "bias"]
        assert list(QuantizationSetting.get("Linear")) == ["weight"]
    assert QuantizationSetting.get("Linear") == before
    assert QuantizationSetting._types["Linear"] is nn.Linear
    (layer, _) = make_plan(net, [{"op_types": ["Linear"]}]).layers
    assert list(layer.targets) == ["_input_", "weight", "_output_"]


# -- wrong settings ------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Registry, Any, str]] = [
    (
        QuantizationSetting,
        {"p": {"quant_dtpe": "int8"}},
        r"register\('Own'\)\['p'\]: unknown key 'quant_dtpe'.* mean 'quant_dtype'",
    ),
    (QuantizationSetting, {"p": {"quant_dtype": "int99"}}, r"\['p'\]\['quant_dtype'\]: 'int99' has more than 16 bits"),
    (QuantizationSetting, {"p": {"granularity": [0]}}, r"\['p'\]\['granularity'\]: expected one of"),
    (QuantizationSetting, {"p": {"apply_method": "mul"}}, r"\['apply_method'\]: 'mul' is not one of bypass, clamp_round"),
    (
        QuantizationSetting,
        {"p": {"sparse_ratio": 0.5}},
        "'sparse_ratio' is a key of pruning",
    ),
    (
        QuantizationSetting,
        {"p": {"observer": "max"}},
        r"\['observer'\]: 'max' is not one of default, moving_average, minmax, percentile",
    ),
    (QuantizationSetting, {}, r"^QuantizationSetting.register\('Own'\): the setting has no target"),
    (QuantizationSetting, ["p"], r"expected a dict from target to settings, got \['p'\]"),
    (QuantizationSetting, None, "expected a dict from target to settings, got None"),
    (QuantizationSetting, {"p": "int8"}, r"\['p'\]: expected a dict of settings, got 'int8'"),
    (QuantizationSetting, {0: {}}, "a target is a string, got 0"),
    (PruningSetting, {"p": {"quant_dtype": "int8"}}, "unknown key 'quant_dtype'"),
    (PruningSetting, {"p": {"sparse_ratio": 1.5}}, r"\['sparse_ratio'\]: 1.5 is not in the range 0 to 1"),
    (PruningSetting, {"p": {"min_sparse_ratio": 1}}, r"1 is not in the range 0 to 1 \(excluded\)"),
    (PruningSetting, {"p": {"sparse_ratio": "half"}}, "expected a number from 0 to 1, got 'half'"),
    (PruningSetting, {"p": {"sparse_ratio": True}}, "expected a number from 0 to 1, got True"),
    (PruningSetting, {"p": {"internal_metric_block": 1.5}}, "expected an integer from 1"),
    (PruningSetting, {"p": {"global_group_id": 1.5}}, "expected an integer or a string that names the group"),
    (PruningSetting, {"p": {"align": "weight"}}, r"\['align'\]: expected a dict with module_name, target_name, dims"),
    (PruningSetting, {"p": {"align": {"target_name": "weight"}}}, r"\['align'\]\['dims'\]: expected a list of dimensions"),
    (PruningSetting, {"p": {"align": {"dims": [0]}}}, r"\['target_name'\]: expected the name of a target, got None"),
    (PruningSetting, {"p": {"align": {"target_name": "w", "dims": [0], "dim": 1}}}, "unknown key 'dim'; .*Did you mean 'dims'"),
    (
        PruningSetting,
        {"p": {"sparse_ratio": 0.5, "sparse_threshold": 0.1}},
        r"\['p'\]: sparse_ratio and sparse_threshold exclude",
    ),
    (DistillationSetting, {"_output_": {"lambda": -1}}, "-1 is not in the range"),
    (DistillationSetting, {"_output_": {"apply_method": "mae"}}, "'mae' is not one of mse, kl"),
    (DistillationSetting, {"_output_": {"link": 3}}, r"\['link'\]: expected a list of strings, got 3"),
    (DistillationSetting, {}, "the setting has no target"),
]


@pytest.mark.parametrize(("registry", "setting", "match"), WRONG, ids=[f"{r.__name__[:5]} {s}" for r, s, _ in WRONG])
def test_wrong_settings_are_refused_and_change_nothing(registry: Registry, setting: Any, match: str) -> None:
    registry.register(Own, SOME[registry][0])
    with pytest.raises(ConfigError, match=match):
        registry.register(Own, setting)
    assert registry.get(Own) == SOME[registry][0]


def test_all_problems_of_a_setting_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        QuantizationSetting.register(Own, {"p": {"quant_dtype": "int0", "scheme": 1}, "_output_": {"granularity": "all"}})
    assert str(error.value).startswith("3 problems:\n- ")


def test_ratio_and_threshold_exclude_each_other_only_where_both_are_given() -> None:
    for given in ({"sparse_ratio": 0.5}, {"sparse_threshold": 0.5}, {"sparse_ratio": None, "sparse_threshold": 1}):
        PruningSetting.register(Own, {"p": given})
    PruningSetting.register(Own, {"p": {"sparse_ratio": 0.5}, "q": {"sparse_threshold": 0.5}})


@every_registry
@pytest.mark.parametrize("thing", [3, int, Own.forward], ids=["number", "other class", "function"])
def test_what_is_no_module_type_is_refused(registry: Registry, thing: Any) -> None:
    with pytest.raises(ConfigError, match=f"{registry.__name__}.register: expected a module class or its name"):
        registry.register(thing, SOME[registry][0])


# -- classes of one name -----------------------------------------------------------------------------------------------------


@every_registry
def test_another_class_of_a_registered_name_is_refused(registry: Registry) -> None:
    first, second = SOME[registry]
    other = class_of_another_file()
    registry.register(Own, first)
    with pytest.raises(ConfigError, match=r"is taken by .*\.Own, and another_file\.Own is another class; register 'another_f"):
        registry.register(other, second)
    assert registry.get(Own) == first
    registry.register("another_file.Own", second)
    assert registry.get(Own) == first
    assert registry.get(other) == second
    assert registry.get(other()) == second
    registry.unregister("Own")
    registry.register(other, first)
    assert registry.find(other) == second, "its dotted path is still there"


def test_a_class_that_merely_has_the_name_of_a_registered_one_is_not_found() -> None:
    QuantizationSetting.register(Own, {"p": {}})
    other = class_of_another_file()
    assert QuantizationSetting.find(other) is None
    assert QuantizationSetting.find(class_of_another_file("Linear")) is None, "not torch's"
    QuantizationSetting.unregister(Own)
    QuantizationSetting.register("Own", {"p": {}})
    assert QuantizationSetting.find(other) == {"p": {}}, "a bare name is for every class of that name, as in NNI"


@every_registry
def test_a_class_that_is_defined_again_replaces(registry: Registry) -> None:
    """As in a notebook, where a cell runs twice."""
    first, second = SOME[registry]
    cell, again = (class_of_another_file("Cell", "__main__") for _ in range(2))
    registry.register(cell, first)
    registry.register(again, second)
    assert registry.get(again) == second
    assert registry._types["Cell"] is again


def test_a_class_that_is_defined_again_is_found_without_registering_again() -> None:
    cell, again = (class_of_another_file("Cell", "__main__") for _ in range(2))
    QuantizationSetting.register(cell, {"_input_": {}})
    assert QuantizationSetting.find(again) == {"_input_": {}}


def test_two_classes_of_one_name_in_one_model() -> None:
    other = class_of_another_file()
    QuantizationSetting.register(Own, {"_input_": {"quant_dtype": "int8"}})
    QuantizationSetting.register("another_file.Own", {"_input_": {"quant_dtype": "uint4"}})
    net = nn.Sequential(Own(), other())
    plan = make_plan(net, [{"op_types": ["Own"]}])
    assert [str(layer.targets["_input_"].spec) for layer in plan.layers] == ["int8 affine per_tensor", "uint4 affine per_tensor"]
    plan = make_plan(net, [{"op_types": ["another_file.Own"]}])
    assert [layer.name for layer in plan.layers] == ["1"]


# -- subclasses --------------------------------------------------------------------------------------------------------------


def test_a_subclass_has_the_setting_where_it_keeps_the_forward() -> None:
    QuantizationSetting.register(Own, {"p": {"quant_dtype": "int5"}})
    assert QuantizationSetting.get(Kept()) == {"p": {"quant_dtype": "int5"}}
    assert QuantizationSetting.find(Changed) is None
    with pytest.raises(ConfigError, match="'Changed' is not registered"):
        QuantizationSetting.get(Changed)
    QuantizationSetting.register(Kept, {"p": {"quant_dtype": "int6"}})
    assert QuantizationSetting.get(Kept) == {"p": {"quant_dtype": "int6"}}, "its own comes first"
    assert QuantizationSetting.get(Own) == {"p": {"quant_dtype": "int5"}}


def test_a_subclass_of_torchs_with_its_own_forward_needs_a_setting() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Renamed(nn.Linear):
        pass

    assert QuantizationSetting.get(Renamed) == QuantizationSetting.get("Linear")
    assert QuantizationSetting.find(Scaled) is None
    net = nn.Sequential(Scaled(4, 4))
    with pytest.raises(ConfigError, match=r"'0' is a Scaled \(a Linear with its own forward\), which has no") as error:
        make_plan(net, [{"op_names": ["0"]}])
    assert f"QuantizationSetting.register('{__name__}" in str(error.value), "the error says how"
    QuantizationSetting.register(Scaled, QuantizationSetting.get("Linear"))
    (layer,) = make_plan(net, [{"op_names": ["0"]}], example_input=torch.randn(2, 4)).layers
    assert not layer.folds, "its forward is its own, so it is quantized around it"


# -- settings for one plan ---------------------------------------------------------------------------------------------------


def table() -> list[Any]:
    return copy.deepcopy([list(owner.registry.items()) for owner in REGISTRIES])


@pytest.mark.parametrize("name", ["Linear", "torch.nn.modules.linear.Linear"])
def test_local_settings_of_a_plan_come_first(name: str) -> None:
    before = table()
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    local = {name: {"weight": {"quant_dtype": "int3"}}}
    plan = make_plan(net, [{"op_types": ["Linear", "ReLU"], "fuse_names": []}], settings=local)
    targets = {layer.name: list(layer.targets) for layer in plan.layers}
    assert targets == {"0": ["weight"], "1": ["_input_", "_output_"], "2": ["weight"]}
    assert plan.layers[0].targets["weight"].spec.dtype == "int3"
    assert table() == before
    assert list(make_plan(net, [{"op_types": ["Linear"]}]).layers[0].targets) == ["_input_", "weight", "_output_"]


def test_local_settings_of_a_type_that_is_nowhere_registered() -> None:
    net = nn.Sequential(Own())
    with pytest.raises(ConfigError, match=r"'0' is a Own, which has no quantization setting"):
        make_plan(net, [{"op_types": ["Own"]}])
    (layer,) = make_plan(net, [{"op_types": ["Own"]}], settings={"Own": {"p": {}}}).layers
    assert list(layer.targets) == ["p"]
    assert "Own" not in QuantizationSetting.registry


WRONG_LOCAL: list[tuple[Any, str]] = [
    ({"Own": {"p": {"quant_dtype": "uint1"}}}, r"settings\['Own'\]\['p'\]\['quant_dtype'\]: 'uint1' has one bit"),
    ({"Own": {}}, r"settings\['Own'\]: the setting has no target"),
    ({"Own": None}, r"settings\['Own'\]: expected a dict from target to settings"),
    ([1], "settings: expected a dict from module type to setting"),
]


@pytest.mark.parametrize(("settings", "match"), WRONG_LOCAL, ids=str)
def test_wrong_local_settings_are_refused_early(settings: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_plan(nn.Sequential(Own()), [{"op_types": ["Own"]}], settings=settings)
    with pytest.raises(ConfigError, match=match):
        QuantFusionCallback([{"op_types": ["Own"]}], settings=settings)


def test_local_settings_of_the_callback(quiet_trainer: Callable[..., Trainer]) -> None:
    before = table()
    callback = QuantFusionCallback(FUSED, settings={"Conv2d": {"weight": {"quant_dtype": "int5"}, "_output_": {}}}, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Lit(), loader(32), loader(16))
    assert callback.plan is not None
    found = {layer.name: list(layer.targets) for layer in callback.plan.layers}
    assert found == {"conv1": ["weight", "_output_"], "conv2": ["weight", "_output_"], "fc": ["_input_", "weight"]}
    assert callback.plan.layers[0].targets["weight"].spec.dtype == "int5"
    assert callback.deployed_model is not None
    assert table() == before


# -- what is there at start ------------------------------------------------------------------------------------------------------

# fmt: off
MODULES = [
    "Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "BatchNorm1d",
    "BatchNorm2d", "BatchNorm3d", "LayerNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Embedding",
    "EmbeddingBag", "MultiheadAttention", "LSTM", "GRU", "RNN", "ReLU", "ReLU6", "Hardtanh", "LeakyReLU", "PReLU", "ELU", "GELU",
    "SiLU", "Hardswish", "Sigmoid", "Hardsigmoid", "Tanh", "Softmax", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d",
    "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "Dropout", "Identity", "Flatten", "Upsample",
]
OPERATORS = [
    "add", "sub", "mul", "matmul", "bmm", "einsum", "relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "hardswish",
    "sigmoid", "hardsigmoid", "tanh", "softmax", "cat", "stack", "mean", "interpolate", "pad", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
]
# fmt: on


def test_what_is_registered_at_start() -> None:
    assert set(MODULES) | set(OPERATORS) <= set(QuantizationSetting.registry)
    assert {"Linear", "Conv2d", "ConvTranspose1d", "BatchNorm3d", "Embedding"} <= set(PruningSetting.registry)


@pytest.mark.parametrize("name", MODULES)
def test_a_built_in_setting_belongs_to_torchs_class(name: str) -> None:
    torchs = getattr(nn, name)
    assert QuantizationSetting._types[name] is torchs
    setting = QuantizationSetting.get(torchs)
    assert setting == QuantizationSetting.get(name)
    for target, keys in setting.items():
        activation = target.startswith(("_input_", "_output_"))
        assert keys["quant_dtype"] == ("uint8" if activation else "int8")
        assert keys["quant_scheme"] == ("affine" if activation else "symmetric")
        assert keys["apply_method"] == "qat_clamp_round"
        assert keys["granularity"] == "default"


@pytest.mark.parametrize("registry", [QuantizationSetting, PruningSetting], ids=lambda r: r.__name__)
def test_what_is_registered_could_be_registered(registry: Registry) -> None:
    for name in list(registry.registry):
        registry.register(name, registry.get(name))


def test_settings_of_operators() -> None:
    for name in OPERATORS:
        inputs = [target for target in QuantizationSetting.get(name) if target.startswith("_input_")]
        assert inputs == (["_input_", "_input_1"] if name in ("add", "sub", "mul", "matmul", "bmm", "einsum") else ["_input_"])


def test_pruning_masks_follow_the_weight() -> None:
    for name in ("Linear", "Conv2d", "BatchNorm2d"):
        assert PruningSetting.get(name) == {
            "weight": {"granularity": "default", "apply_method": "mul"},
            "bias": {"align": {"module_name": None, "target_name": "weight", "dims": [0]}, "apply_method": "mul"},
        }
    assert list(PruningSetting.get("Embedding")) == ["weight"]


def test_a_module_type_by_any_of_its_dotted_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.Linear is defined in torch.nn.modules.linear; a user's package re-exports its classes, too."""
    package = ModuleType("some_package")
    package.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_package", package)
    QuantizationSetting.register("torch.nn.Linear", {"weight": {"quant_dtype": "int3"}})
    QuantizationSetting.register("some_package.Own", {"p": {"quant_dtype": "int3"}})
    assert QuantizationSetting.get(nn.Linear) == {"weight": {"quant_dtype": "int3"}}
    assert QuantizationSetting.get(Own) == {"p": {"quant_dtype": "int3"}}
