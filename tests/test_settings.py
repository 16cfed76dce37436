# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `settings.py` on types: what computes the same, what a class is called, which setting a subclass uses."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.keys import DISTILLATION, QUANTIZATION
from lightning_quant.pruning_keys import PRUNING
from lightning_quant.settings import (
    OPERATORS,
    QuantizationSetting,
    Setting,
    checked_setting,
    dotted,
    is_called,
    is_kind,
    kept_bases,
)

pytestmark = pytest.mark.usefixtures("own_registries")

ACTIVATION = {"quant_dtype": "uint8", "quant_scheme": "affine", "granularity": "default", "apply_method": "qat_clamp_round"}
PARAMETER = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "default", "apply_method": "qat_clamp_round"}
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Renamed(nn.Conv2d):
    """Keeps the forward of its base."""


class Rescaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Again(Rescaled):
    """Keeps a forward that is not torch's."""


class Mixed(Renamed, nn.Module):
    extra = 1


class Custom(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Derived(Custom):
    """Keeps the forward of a module of the user's own."""


def outer() -> type[nn.Module]:
    """Another class with the name `Custom`."""

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    return Custom


# -- what computes the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "base", "same"),
    [
        (nn.Conv2d(1, 1, 1), nn.Conv2d, True),
        (Renamed(1, 1, 1), nn.Conv2d, True),
        (Mixed(1, 1, 1), nn.Conv2d, True),
        (Rescaled(1, 1, 1), nn.Conv2d, False),
        (Again(1, 1, 1), nn.Conv2d, False),
        (Again(1, 1, 1), Rescaled, True),
        (nn.Conv1d(1, 1, 1), nn.Conv2d, False),
        (nn.Conv2d(1, 1, 1), Renamed, False),
        (nn.SyncBatchNorm(1), nn.BatchNorm2d, False),
        (nn.ReLU6(), nn.Hardtanh, True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(1, 1), nn.Linear, True),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_a_module_is_of_a_kind_where_it_keeps_the_forward(module: nn.Module, base: type[nn.Module], same: bool) -> None:
    assert is_kind(module, base) is same


@pytest.mark.parametrize(
    ("module_type", "names"),
    [
        (nn.Conv2d, ["Conv2d"]),
        (Renamed, ["Renamed", "Conv2d"]),
        (Mixed, ["Mixed", "Renamed", "Conv2d"]),
        (Rescaled, ["Rescaled"]),
        (Again, ["Again", "Rescaled"]),
        (nn.ReLU6, ["ReLU6", "Hardtanh"]),
        (nn.BatchNorm1d, ["BatchNorm1d", "_BatchNorm"]),
        (nn.LSTM, ["LSTM"]),
        (Derived, ["Derived", "Custom"]),
        (nn.ModuleList, ["ModuleList"]),
        (nn.Module, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_bases_whose_forward_is_kept_nearest_first(module_type: type[nn.Module], names: list[str]) -> None:
    assert [base.__name__ for base in kept_bases(module_type)] == names


# -- names of a class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_type", "name", "called"),
    [
        (nn.Conv2d, "Conv2d", True),
        (nn.Conv2d, "torch.nn.Conv2d", True),
        (nn.Conv2d, "torch.nn.modules.conv.Conv2d", True),
        (nn.Conv2d, "torch.nn.modules.Conv2d", True),
        (nn.Conv2d, "conv2d", False),
        (nn.Conv2d, "Conv", False),
        (nn.Conv2d, "nn.Conv2d", False),
        (nn.Conv2d, "torch.nn.Linear", False),
        (nn.Conv2d, "Module", False),
        (nn.Conv2d, "", False),
        (nn.Conv2d, ".Conv2d", False),
        (nn.Conv2d, "torch.nn.", False),
        (Renamed, "Renamed", True),
        (Renamed, "Conv2d", True),
        (Renamed, "torch.nn.Conv2d", True),
        (Renamed, f"{__name__}.Renamed", True),
        (Renamed, "torch.nn.Renamed", False),
        (Rescaled, "Conv2d", False),
        (Rescaled, f"{__name__}.Rescaled", True),
        (outer(), "Custom", True),
        (outer(), f"{__name__}.Custom", False),
        (outer(), f"{__name__}.outer.<locals>.Custom", True),
        (Custom, f"{__name__}.Custom", True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_a_class_may_be_called(module_type: type[nn.Module], name: str, called: bool) -> None:
    assert is_called(module_type, name) is called


def test_a_dotted_path_tells_classes_of_one_name_apart() -> None:
    assert dotted(nn.Conv2d) == "torch.nn.modules.conv.Conv2d"
    assert dotted(outer()) == f"{__name__}.outer.<locals>.Custom"
    assert dotted(Custom) == f"{__name__}.Custom"


def test_a_module_that_is_not_imported_is_not_imported_for_a_name() -> None:
    assert "tests_that_nobody_imports" not in sys.modules
    assert not is_called(Custom, "tests_that_nobody_imports.Custom")
    assert "tests_that_nobody_imports" not in sys.modules


# -- the setting that a type uses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", WEIGHTED, ids=lambda cls: cls.__name__)
def test_the_bare_defaults_of_weighted_types(base: type[nn.Module]) -> None:
    setting = QuantizationSetting.get(base)
    assert setting == {"_input_": ACTIVATION, "weight": PARAMETER, "_output_": ACTIVATION}
    assert list(setting) == ["_input_", "weight", "_output_"]


OF_A_LAYER = {"_input_": ACTIVATION, "weight": PARAMETER, "_output_": ACTIVATION}
THROUGH = {"_input_": ACTIVATION, "_output_": ACTIVATION}


@pytest.mark.parametrize(
    ("module_type", "setting"),
    [
        (nn.ConvTranspose2d, OF_A_LAYER),
        (nn.Bilinear, {"_input_": ACTIVATION, "_input_1": ACTIVATION, "weight": PARAMETER, "_output_": ACTIVATION}),
        (nn.BatchNorm2d, THROUGH),
        (nn.LayerNorm, THROUGH),
        (nn.ReLU, THROUGH),
        (nn.MaxPool2d, THROUGH),
        (nn.Dropout, THROUGH),
        (nn.Embedding, {"weight": PARAMETER}),
        (nn.LSTM, {"weight_*": PARAMETER}),
        (
            nn.MultiheadAttention,
            {
                **dict.fromkeys(("_input_", "_input_1", "_input_2"), ACTIVATION),
                "*_weight": PARAMETER,
                "out_proj.weight": PARAMETER,
                "_output_": ACTIVATION,
            },
        ),
        (Renamed, {"_input_": ACTIVATION, "weight": PARAMETER, "_output_": ACTIVATION}),
        (Mixed, {"_input_": ACTIVATION, "weight": PARAMETER, "_output_": ACTIVATION}),
        (nn.modules.linear.NonDynamicallyQuantizableLinear, QuantizationSetting.get("Linear")),
        (nn.LazyLinear, QuantizationSetting.get("Linear")),
        (Rescaled, None),
        (Again, None),
        (Custom, None),
        (nn.Sequential, None),
        (nn.Module, None),
        (nn.LSTMCell, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_type_has_its_setting_and_a_subclass_that_of_the_forward_it_keeps(
    module_type: type[nn.Module], setting: Setting | None
) -> None:
    assert QuantizationSetting.find(module_type) == setting


@pytest.mark.parametrize("name", ["add", "matmul", "einsum"])
def test_operators_with_two_inputs(name: str) -> None:
    assert name in OPERATORS
    assert QuantizationSetting.get(name) == {"_input_": ACTIVATION, "_input_1": ACTIVATION, "_output_": ACTIVATION}


@pytest.mark.parametrize("name", ["relu", "cat", "mean"])
def test_operators_with_one(name: str) -> None:
    assert name in OPERATORS
    assert QuantizationSetting.get(name) == THROUGH


P1: Setting = {"p1": {}}
P2: Setting = {"p2": {}}


def test_a_subclass_uses_what_was_registered_for_its_base() -> None:
    QuantizationSetting.register(Custom, P1)
    assert QuantizationSetting.find(Derived) == P1


def test_the_class_itself_comes_before_its_base() -> None:
    QuantizationSetting.register(Custom, P1)
    QuantizationSetting.register(Derived, P2)
    assert QuantizationSetting.find(Derived) == P2
    assert QuantizationSetting.find(Custom) == P1


def test_a_dotted_path_comes_before_a_name() -> None:
    QuantizationSetting.register("Custom", P1)
    QuantizationSetting.register(f"{__name__}.Custom", P2)
    assert QuantizationSetting.find(Custom) == P2
    assert QuantizationSetting.find(outer()) == P1


def test_a_name_serves_any_class_of_that_name_a_class_itself_alone() -> None:
    QuantizationSetting.register("Custom", P1)
    assert QuantizationSetting.find(outer()) == QuantizationSetting.find(Custom) == P1
    QuantizationSetting.register(Custom, P2)
    assert QuantizationSetting.find(Custom) == P2
    assert QuantizationSetting.find(outer()) is None


@pytest.mark.parametrize("name", ["Custom", f"{__name__}.Custom"])
def test_local_settings_come_before_registered_ones(name: str) -> None:
    QuantizationSetting.register(Custom, P1)
    assert QuantizationSetting.find(Custom, {name: P2}) == P2
    assert QuantizationSetting.find(Derived, {name: P2}) == P2
    assert QuantizationSetting.find(Custom, {"Other": P2}) == QuantizationSetting.find(Custom, {}) == P1


def test_a_registered_class_comes_before_local_settings_of_its_base() -> None:
    QuantizationSetting.register(Derived, P1)
    assert QuantizationSetting.find(Derived, {"Custom": P2}) == P1


# -- the checks of a setting --------------------------------------------------------------------------------------------

KEYS = "apply_method, granularity, method, observer, quant_dtype, quant_scheme"
BAD: list[tuple[Any, list[str]]] = [
    (None, ["here: expected a dict from target to settings, got None."]),
    (["weight"], ["here: expected a dict from target to settings, got ['weight']."]),
    ({}, ["here: the setting has no target; give at least one, such as {'weight': {}}."]),
    ({3: {}}, ["here: a target is a string, got 3."]),
    ({"weight": None}, ["here['weight']: expected a dict of settings, got None."]),
    (
        {"weight": {"quant_dtyp": "int8"}, "_input_": {"quant_scheme": "no"}},
        [
            f"here['weight']: unknown key 'quant_dtyp'; allowed: {KEYS}. Did you mean 'quant_dtype'?",
            "here['_input_']['quant_scheme']: 'no' is not one of affine, symmetric.",
        ],
    ),
]


@pytest.mark.parametrize(("setting", "expected"), BAD, ids=lambda value: str(value)[:30])
def test_the_problems_of_a_setting_are_collected(setting: Any, expected: list[str]) -> None:
    problems: list[str] = []
    checked_setting(setting, QUANTIZATION, "here", problems)
    assert problems == expected


def test_the_module_of_an_alignment_is_a_name_or_none() -> None:
    problems: list[str] = []
    align = {"module_name": 3, "target_name": "weight", "dims": [0]}
    checked_setting({"bias": {"align": align}}, PRUNING, "here", problems)
    assert problems == ["here['bias']['align']['module_name']: expected a module's name or None for the same module, got 3."]


@pytest.mark.parametrize("link", ["layer1", ["layer1", "layer2"], "auto"])
def test_a_link_is_a_name_or_several(link: Any) -> None:
    problems: list[str] = []
    assert checked_setting({"_output_": {"link": link}}, DISTILLATION, "here", problems) == {"_output_": {"link": link}}
    assert not problems


def test_a_checked_setting_is_a_deep_copy() -> None:
    given: dict[str, dict[str, Any]] = {"weight": {"granularity": [1, -1]}}
    problems: list[str] = []
    got = checked_setting(given, QUANTIZATION, "here", problems)
    given["weight"]["granularity"].append(4)
    assert got == {"weight": {"granularity": [1, -1]}}
    assert not problems


@pytest.mark.parametrize(("setting", "expected"), BAD, ids=lambda value: str(value)[:30])
def test_registering_a_bad_setting_changes_nothing(setting: Any, expected: list[str]) -> None:
    before = dict(QuantizationSetting.registry)
    with pytest.raises(ConfigError) as caught:
        QuantizationSetting.register("Custom", setting)
    texts = [text.replace("here", "QuantizationSetting.register('Custom')", 1) for text in expected]
    assert str(caught.value) == (texts[0] if len(texts) == 1 else "\n- ".join([f"{len(texts)} problems:", *texts]))
    assert dict(QuantizationSetting.registry) == before
