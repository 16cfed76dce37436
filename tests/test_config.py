# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `config.py`: what a `config_list` may say, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_quant.config import ConfigError, Rule, Scheme, TensorSpec, closest, parse_rules, raise_problems

KEYS = "fuse_names, granularity, op_names, op_types, quant_dtype, quant_scheme, target_names, target_settings"  # sorted


def rule(**keys: Any) -> Rule:
    return parse_rules([{"op_types": ["Linear"], **keys}])[0]


def error_of(config_list: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_rules(config_list)
    return str(caught.value)


# -- what is accepted -----------------------------------------------------------------------------------------------


def test_a_full_entry_becomes_a_rule_field_by_field() -> None:
    entry = {
        "op_names": ["conv1", "conv2"],
        "op_types": ["Conv2d"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
        "target_settings": {"weight": {"quant_scheme": "symmetric", "granularity": "per_tensor"}},
        "fuse_names": [("conv1", "bn1"), ["conv2", "bn2", "relu2"]],
    }
    (got,) = parse_rules([entry])
    assert got.index == 0
    assert got.op_names == ("conv1", "conv2")
    assert got.op_types == ("Conv2d",)
    assert got.target_names == ("_input_", "weight")
    assert got.settings == {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "default"}
    assert got.target_settings == {"weight": {"quant_scheme": "symmetric", "granularity": "per_tensor"}}
    assert got.fuse_names == (("conv1", "bn1"), ("conv2", "bn2", "relu2"))


def test_what_is_left_out_stays_open() -> None:
    got = rule()
    assert (got.op_names, got.target_names, got.fuse_names) == ((), None, ())
    assert not got.settings
    assert not got.target_settings


def test_rules_keep_the_order_and_know_their_place() -> None:
    rules = parse_rules(({"op_names": ["a"]}, {"op_names": ["b"]}))
    assert [(r.op_names, r.where) for r in rules] == [(("a",), "config_list[0]"), (("b",), "config_list[1]")]


@pytest.mark.parametrize("key", ["op_names", "op_types", "target_names"])
def test_lists_and_tuples_of_names_are_the_same_and_repeats_count_once(key: str) -> None:
    assert getattr(rule(**{key: ["b", "a", "b"]}), key) == ("b", "a")
    assert getattr(rule(**{key: ("b", "a")}), key) == ("b", "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_dtype", "int8"),
        ("quant_dtype", "uint8"),
        ("quant_scheme", "affine"),
        ("quant_scheme", "symmetric"),
        ("granularity", "default"),
        ("granularity", "out_channel"),
        ("granularity", "per_tensor"),
    ],
)
def test_every_allowed_word_is_taken_over_as_it_stands(key: str, value: str) -> None:
    assert rule(**{key: value}).settings == {key: value}
    assert rule(target_settings={"weight": {key: value}}).target_settings == {"weight": {key: value}}


@pytest.mark.parametrize("empty", [[], ()], ids=["list", "tuple"])
def test_no_fuse_groups_is_a_valid_wish(empty: Any) -> None:
    assert rule(fuse_names=empty).fuse_names == ()


def test_a_rule_does_not_follow_later_changes_of_the_users_dict() -> None:
    weight = {"quant_dtype": "int8"}
    entry: dict[str, Any] = {"op_names": ["a"], "fuse_names": [["a", "b"]], "target_settings": {"weight": weight}}
    (got,) = parse_rules([entry])
    weight["quant_dtype"] = "uint8"
    entry["op_names"].append("z")
    entry["fuse_names"][0].append("c")
    assert got.target_settings["weight"]["quant_dtype"] == "int8"
    assert got.op_names == ("a",)
    assert got.fuse_names == (("a", "b"),)


def test_a_rule_and_a_spec_are_frozen() -> None:
    spec = TensorSpec.make("int8", "affine", "per_tensor", weight=True)
    for frozen, name in ((rule(), "index"), (spec, "qmin")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


# -- what is refused: each row differs from a valid entry in one value ------------------------------------------------

NAMES = "config_list[0][{key!r}]: expected a list of strings, got {value!r}; write ['conv1'] for one name."


@pytest.mark.parametrize("key", ["op_names", "op_types", "target_names"])
@pytest.mark.parametrize(
    "value", ["conv1", b"conv1", 3, None, [3], ["a", None], {"a": 1}], ids=lambda value: type(value).__name__ + str(value)
)
def test_names_that_are_no_list_of_strings(key: str, value: Any) -> None:
    assert error_of([{"op_types": ["Linear"], key: value}]) == NAMES.format(key=key, value=value)


@pytest.mark.parametrize("key", ["op_names", "op_types", "target_names"])
def test_an_empty_list_of_names(key: str) -> None:
    expected = f"config_list[0][{key!r}]: the list is empty; name at least one, or leave the key out."
    assert error_of([{"op_types": ["Linear"], key: []}]) == expected


WORDS = [
    ("quant_dtype", "int4", "'int4' is not one of int8, uint8. Did you mean 'int8'?"),
    ("quant_dtype", "float", "'float' is not one of int8, uint8."),
    ("quant_dtype", 8, "8 is not one of int8, uint8."),
    ("quant_dtype", None, "None is not one of int8, uint8."),
    ("quant_dtype", ["int8"], "['int8'] is not one of int8, uint8."),
    ("quant_scheme", "symetric", "'symetric' is not one of affine, symmetric. Did you mean 'symmetric'?"),
    ("quant_scheme", True, "True is not one of affine, symmetric."),
    ("granularity", "per_channel", "'per_channel' is not one of default, out_channel, per_tensor. Did you mean 'out_channel'?"),
    ("granularity", [-1, 1], "[-1, 1] is not one of default, out_channel, per_tensor."),
    ("granularity", {}, "{} is not one of default, out_channel, per_tensor."),
]
IDS = [f"{key}={value}" for key, value, _ in WORDS]


@pytest.mark.parametrize(("key", "value", "text"), WORDS, ids=IDS)
def test_a_wrong_word_in_the_shorthand(key: str, value: Any, text: str) -> None:
    assert error_of([{"op_types": ["Linear"], key: value}]) == f"config_list[0][{key!r}]: {text}"


@pytest.mark.parametrize(("key", "value", "text"), WORDS, ids=IDS)
def test_a_wrong_word_in_target_settings(key: str, value: Any, text: str) -> None:
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {key: value}}}
    assert error_of([entry]) == f"config_list[0]['target_settings']['weight'][{key!r}]: {text}"


@pytest.mark.parametrize(
    ("key", "value", "where", "text"),
    [
        ("fuse_names", "conv1", "", "expected a list of groups such as [('conv1', 'bn1')], got 'conv1'."),
        ("fuse_names", None, "", "expected a list of groups such as [('conv1', 'bn1')], got None."),
        ("fuse_names", {"a": "b"}, "", "expected a list of groups such as [('conv1', 'bn1')], got {'a': 'b'}."),
        ("fuse_names", ["conv1"], "[0]", "expected a tuple or list of module names, got 'conv1'."),
        ("fuse_names", [3], "[0]", "expected a tuple or list of module names, got 3."),
        ("fuse_names", [("a", "b"), ("a", 3)], "[1]", "expected a tuple or list of module names, got ('a', 3)."),
        ("fuse_names", [("a",)], "[0]", "a group has 2 or 3 names, got 1: ('a',)."),
        ("fuse_names", [["a", "b", "c", "d"]], "[0]", "a group has 2 or 3 names, got 4: ('a', 'b', 'c', 'd')."),
        ("fuse_names", [()], "[0]", "a group has 2 or 3 names, got 0: ()."),
        ("fuse_names", [("a", "a")], "[0]", "a name stands twice in ('a', 'a'); a module can be fused once."),
        ("target_settings", ["weight"], "", "expected a dict from target to settings, got ['weight']."),
        ("target_settings", None, "", "expected a dict from target to settings, got None."),
        ("target_settings", {"weight": "int8"}, "['weight']", "expected a dict of settings, got 'int8'."),
        ("target_settings", {"weight": None}, "['weight']", "expected a dict of settings, got None."),
    ],
    ids=str,
)
def test_a_wrong_shape_of_groups_or_target_settings(key: str, value: Any, where: str, text: str) -> None:
    assert error_of([{"op_types": ["Linear"], key: value}]) == f"config_list[0][{key!r}]{where}: {text}"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("op_name", " Did you mean 'op_names'?"),
        ("quant_dtyp", " Did you mean 'quant_dtype'?"),
        ("fuse_name", " Did you mean 'fuse_names'?"),
        ("zzz", ""),
        (7, ""),
    ],
)
def test_an_unknown_key_of_an_entry(key: Any, hint: str) -> None:
    assert error_of([{"op_types": ["Linear"], key: 1}]) == f"config_list[0]: unknown key {key!r}; allowed: {KEYS}.{hint}"


@pytest.mark.parametrize(("key", "hint"), [("quant_dtyp", " Did you mean 'quant_dtype'?"), ("op_names", ""), (None, "")])
def test_an_unknown_key_of_a_target(key: Any, hint: str) -> None:
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {key: "int8"}}}
    where = "config_list[0]['target_settings']['weight']"
    allowed = "granularity, quant_dtype, quant_scheme"
    assert error_of([entry]) == f"{where}: unknown key {key!r}; allowed: {allowed}.{hint}"


@pytest.mark.parametrize("entry", [None, "Linear", 3, ["op_names"], [("op_names", ["a"])]], ids=str)
def test_an_entry_that_is_no_dict(entry: Any) -> None:
    assert error_of([{"op_names": ["a"]}, entry]) == f"config_list[1]: expected a dict, got {entry!r}."


@pytest.mark.parametrize("entry", [{}, {"quant_dtype": "int8"}, {"fuse_names": [("a", "b")]}], ids=str)
def test_an_entry_that_selects_nothing(entry: dict[str, Any]) -> None:
    text = "config_list[0]: selects nothing; give op_names (module names) or op_types (class names)."
    assert error_of([entry]) == text


@pytest.mark.parametrize("config_list", [None, [], (), "int8", 3], ids=repr)
def test_a_config_list_that_is_no_list_of_entries(config_list: Any) -> None:
    text = f"config_list: expected a non-empty list of dicts, got {config_list!r}; the shortest useful one is"
    assert error_of(config_list) == text + " [{'op_types': ['Linear']}]."


@pytest.mark.parametrize("entry", [{"op_types": ["Linear"]}, {}], ids=str)
def test_one_entry_without_its_list(entry: dict[str, Any]) -> None:
    expected = f"config_list: expected a non-empty list of dicts, got {entry!r}; put it in a list: [{{...}}]."
    assert error_of(entry) == expected


def test_one_group_without_its_list() -> None:
    text = error_of([{"op_names": ["conv"], "fuse_names": ("conv", "bn")}])
    assert text == "config_list[0]['fuse_names']: expected a list of groups, got one group; write [('conv', 'bn')]."


def test_asymmetric_is_called_affine() -> None:
    assert error_of([{"op_names": ["conv"], "quant_scheme": "asymmetric"}]).endswith("Did you mean 'affine'?")


# -- how errors are reported ------------------------------------------------------------------------------------------


def test_all_problems_of_all_entries_are_reported_together() -> None:
    text = error_of([{"op_names": "a", "quant_dtyp": 1}, {"op_types": ["Linear"], "granularity": "x"}, {}])
    lines = text.splitlines()
    assert lines[0] == "4 problems:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "- config_list[0]",
        "- config_list[0]['op_names']",
        "- config_list[1]['granularity']",
        "- config_list[2]",
    ]


def test_both_problems_of_one_target_are_reported() -> None:
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {"quant_dtype": "f", "typo": 1}, "_input_": 3}}
    text = error_of([entry])
    for fragment in ("3 problems:", "unknown key 'typo'", "'f' is not one of", "['_input_']: expected a dict of settings"):
        assert fragment in text


def test_config_errors_are_lightnings_misconfiguration() -> None:
    with pytest.raises(MisconfigurationException, match="selects nothing"):
        parse_rules([{}])


@pytest.mark.parametrize(
    ("problems", "text"),
    [(["one"], "one"), (["one", "two"], "2 problems:\n- one\n- two")],
    ids=["one stands alone", "several are counted"],
)
def test_raise_problems(problems: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        raise_problems(problems)


def test_no_problem_raises_nothing() -> None:
    raise_problems([])


def test_closest_gives_the_nearest_first_and_no_strangers() -> None:
    assert closest("conv9", ["conv1", "relu", "conv99"]) == ["conv99", "conv1"]
    assert closest("conv9", ["conv1", "conv99"], 1) == ["conv99"]
    assert closest("xyz", ["conv1"]) == []


# -- TensorSpec.make: the ends of the grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scheme", "weight", "qmin", "qmax"),
    [
        ("int8", "symmetric", True, -127, 127),
        ("int8", "affine", True, -127, 127),
        ("int8", "symmetric", False, -127, 127),
        ("int8", "affine", False, -128, 127),
        ("uint8", "symmetric", True, 0, 255),
        ("uint8", "affine", True, 0, 255),
        ("uint8", "symmetric", False, 0, 255),
        ("uint8", "affine", False, 0, 255),
    ],
)
def test_ends_of_the_grid(dtype: str, scheme: Scheme, weight: bool, qmin: int, qmax: int) -> None:
    spec = TensorSpec.make(dtype, scheme, "per_tensor", weight=weight)
    assert (spec.dtype, spec.scheme, spec.granularity) == (dtype, scheme, "per_tensor")
    assert (spec.qmin, spec.qmax) == (qmin, qmax)


def test_a_spec_prints_its_three_words() -> None:
    assert str(TensorSpec.make("uint8", "affine", "out_channel", weight=True)) == "uint8 affine out_channel"
