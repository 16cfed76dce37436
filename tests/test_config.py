# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `config.py`: what a `config_list` may say, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_quant.config import PRESETS, ConfigError, Rule, TensorSpec, parse_rules, raise_problems
from lightning_quant.keys import APPLY_METHODS, GRANULARITIES, METHODS, OBSERVERS, SCHEMES, Blocks, closest, guess

TARGET_KEYS = "apply_method, granularity, method, observer, quant_dtype, quant_scheme"  # sorted, as all keys in errors
KEYS = (
    "apply_method, exclude_op_names, exclude_op_names_re, exclude_op_types, fuse_names, granularity, high_precision_output, "
    "method, observer, op_names, op_names_re, op_types, quant_dtype, quant_scheme, target_names, target_settings"
)
SELECTION_KEYS = ["op_names", "op_types", "exclude_op_names", "exclude_op_types", "target_names"]


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
        "op_names_re": ["conv."],
        "op_types": ["Conv2d"],
        "exclude_op_names": ["conv3"],
        "exclude_op_names_re": ["conv4.*"],
        "exclude_op_types": ["Linear"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
        "apply_method": "clamp_round",
        "observer": "minmax",
        "method": "qat",
        "target_settings": {"weight": {"quant_scheme": "symmetric", "granularity": "per_tensor"}},
        "fuse_names": [("conv1", "bn1"), ["conv2", "bn2", "relu2"]],
        "high_precision_output": False,
    }
    assert parse_rules([entry]) == (
        Rule(
            where="config_list[0]",
            op_names=("conv1", "conv2"),
            op_names_re=("conv.",),
            op_types=("Conv2d",),
            exclude_op_names=("conv3",),
            exclude_op_names_re=("conv4.*",),
            exclude_op_types=("Linear",),
            target_names=("_input_", "weight"),
            settings={
                "quant_dtype": "int8",
                "quant_scheme": "affine",
                "granularity": "default",
                "apply_method": "clamp_round",
                "observer": "minmax",
                "method": "qat",
            },
            target_settings={"weight": {"quant_scheme": "symmetric", "granularity": "per_tensor"}},
            fuse=(("conv1", "bn1"), ("conv2", "bn2", "relu2")),
            float_output=False,
            preset=False,
        ),
    )


def test_what_is_left_out_stays_open() -> None:
    assert rule() == Rule(where="config_list[0]", op_types=("Linear",))
    got = Rule(where="here")
    assert (got.op_names, got.exclude_op_types, got.target_names, got.fuse, got.preset) == ((), (), None, None, False)
    assert not got.settings
    assert not got.target_settings


@pytest.mark.parametrize("key", ["quant_dtype", "quant_scheme", "granularity", "apply_method", "observer", "method"])
def test_a_quantization_key_that_is_none_is_not_given(key: str) -> None:
    assert rule(**{key: None}) == rule()
    assert rule(target_settings={"weight": {key: None}}).target_settings == {"weight": {}}


@pytest.mark.parametrize("shape", [list, tuple, lambda entries: entries[0], lambda entries: {"config_list": entries}])
def test_a_list_may_be_a_tuple_one_entry_or_a_dict_that_holds_it(shape: Any) -> None:
    assert parse_rules(shape([{"op_types": ["Linear"]}])) == (Rule(where="config_list[0]", op_types=("Linear",)),)


def test_rules_keep_the_order_and_know_their_place() -> None:
    rules = parse_rules(({"op_names": ["a"]}, {"op_names": ["b"]}))
    assert [(r.op_names, r.where) for r in rules] == [(("a",), "config_list[0]"), (("b",), "config_list[1]")]


@pytest.mark.parametrize("key", SELECTION_KEYS)
def test_lists_and_tuples_of_names_are_the_same_and_repeats_count_once(key: str) -> None:
    assert getattr(rule(**{key: ["b", "a", "b"]}), key) == ("b", "a")
    assert getattr(rule(**{key: ("b", "a")}), key) == ("b", "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("quant_dtype", f"{sign}int{bits}") for sign in ("", "u") for bits in range(2, 17)),
        *(("quant_scheme", scheme) for scheme in SCHEMES),
        *(("granularity", granularity) for granularity in GRANULARITIES),
        *(("apply_method", method) for method in APPLY_METHODS),
        *(("observer", observer) for observer in OBSERVERS),
        *(("method", method) for method in METHODS),
    ],
)
def test_every_allowed_word_is_taken_over_as_it_stands(key: str, value: str) -> None:
    assert rule(**{key: value}).settings == {key: value}
    assert rule(target_settings={"weight": {key: value}}).target_settings == {"weight": {key: value}}


BLOCKS: list[tuple[Any, Blocks, str]] = [
    ([1, -1], Blocks(sizes=(1, -1)), "[1, -1]"),
    ((1, -1), Blocks(sizes=(1, -1)), "[1, -1]"),
    ([-1], Blocks(sizes=(-1,)), "[-1]"),
    ([4, 2, 1, 8], Blocks(sizes=(4, 2, 1, 8)), "[4, 2, 1, 8]"),
    ([[1], "back", -1], Blocks(sizes=(1,), side="back", pad=-1), "[[1], 'back', -1]"),
    ([[-1, 1], "back", 3], Blocks(sizes=(-1, 1), side="back", pad=3), "[[-1, 1], 'back', 3]"),
    ([[2], "back"], Blocks(sizes=(2,), side="back", pad=1), "[[2], 'back', 1]"),
    ([(2, 1), "front", 1], Blocks(sizes=(2, 1)), "[2, 1]"),
    ([[2], "front", -1], Blocks(sizes=(2,), pad=-1), "[[2], 'front', -1]"),
]


@pytest.mark.parametrize(("value", "blocks", "text"), BLOCKS, ids=str)
def test_a_granularity_as_a_list(value: Any, blocks: Blocks, text: str) -> None:
    assert rule(granularity=value).settings == {"granularity": blocks}
    assert rule(target_settings={"weight": {"granularity": value}}).target_settings == {"weight": {"granularity": blocks}}
    assert str(blocks) == text


@pytest.mark.parametrize(
    ("value", "dims", "kernel"),
    [
        ([1, -1], 2, (1, -1)),
        ([1, -1], 4, (1, 1, 1, -1)),
        ([[1], "back", -1], 4, (1, -1, -1, -1)),
        ([[-1, 1], "back"], 4, (-1, 1, 1, 1)),
        ([[2], "front", -1], 3, (-1, -1, 2)),
        ([3, -1], 1, (3, -1)),
        ([4], 0, (4,)),
    ],
    ids=str,
)
def test_nnis_padding(value: list[Any], dims: int, kernel: tuple[int, ...]) -> None:
    """nni.md 1.6: a bare list is padded at the front with 1."""
    assert rule(granularity=value).settings["granularity"].kernel(dims) == kernel


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_its_entries(name: str) -> None:
    parts = parse_rules(PRESETS[name])
    expected = tuple(dataclasses.replace(part, where=f"config_list[0] ({name!r})", preset=True) for part in parts)
    assert parse_rules(name) == parse_rules([name]) == expected
    refined = parse_rules([name, {"op_names": ["fc"]}])
    assert refined[:-1] == expected
    assert refined[-1] == Rule(where="config_list[1]", op_names=("fc",))


@pytest.mark.parametrize("shape", [list, tuple])
def test_auto_and_groups(shape: Any) -> None:
    assert rule(fuse_names="auto").fuse == "auto"
    assert rule(fuse_names=None).fuse is None
    assert rule(fuse_names=shape([shape(["a", "b"]), ("c", "d", "e")])).fuse == (("a", "b"), ("c", "d", "e"))


@pytest.mark.parametrize("empty", [[], ()], ids=["list", "tuple"])
def test_no_fuse_groups_is_a_valid_wish(empty: Any) -> None:
    assert rule(fuse_names=empty).fuse == ()


def test_a_rule_does_not_follow_later_changes_of_the_users_dict() -> None:
    weight = {"quant_dtype": "int8"}
    entry: dict[str, Any] = {"op_names": ["a"], "fuse_names": [["a", "b"]], "target_settings": {"weight": weight}}
    (got,) = parse_rules([entry])
    weight["quant_dtype"] = "uint8"
    entry["op_names"].append("z")
    entry["fuse_names"][0].append("c")
    assert got.target_settings["weight"]["quant_dtype"] == "int8"
    assert got.op_names == ("a",)
    assert got.fuse == (("a", "b"),)


@pytest.mark.parametrize("value", [True, False, None])
def test_high_precision_output_is_a_switch_with_three_places(value: bool | None) -> None:
    assert rule(high_precision_output=value).float_output is value
    assert rule().float_output is None


@pytest.mark.parametrize("value", ["true", "yes", 1, 0, 1.0, [True], {"_output_": True}], ids=repr)
def test_high_precision_output_is_nothing_else(value: Any) -> None:
    text = f"config_list[0]['high_precision_output']: expected true, false or nothing, got {value!r}."
    assert error_of([{"op_types": ["Linear"], "high_precision_output": value}]) == text


@pytest.mark.parametrize("names", [2, 3, 4, 5])
def test_a_group_has_two_to_five_names(names: int) -> None:
    assert rule(fuse_names=[list("abcdef"[:names])]).fuse == (tuple("abcdef"[:names]),)


def test_a_rule_and_a_spec_are_frozen() -> None:
    spec = TensorSpec.make("int8", "affine", "per_tensor", weight=True)
    for frozen, name in ((rule(), "where"), (spec, "qmin")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


# -- what is refused: each row differs from a valid entry in one value ------------------------------------------------

NAMES = "config_list[0][{key!r}]: expected a list of strings, got {value!r}; write ['conv1'] for one name."


@pytest.mark.parametrize("key", [*SELECTION_KEYS, "op_names_re", "exclude_op_names_re"])
@pytest.mark.parametrize(
    "value", ["conv1", b"conv1", 3, None, [3], ["a", None], {"a": 1}], ids=lambda value: type(value).__name__ + str(value)
)
def test_names_that_are_no_list_of_strings(key: str, value: Any) -> None:
    assert error_of([{"op_types": ["Linear"], key: value}]) == NAMES.format(key=key, value=value)


def test_one_name_without_its_list_is_shown_in_it() -> None:
    text = "config_list[0]['op_types']: expected a list of strings, got 'Conv2d'; write ['Conv2d'] for one name."
    assert error_of([{"op_types": "Conv2d"}]) == text


@pytest.mark.parametrize("key", [*SELECTION_KEYS, "op_names_re", "exclude_op_names_re"])
def test_an_empty_list_of_names(key: str) -> None:
    expected = f"config_list[0][{key!r}]: the list is empty; name at least one, or leave the key out."
    assert error_of([{"op_types": ["Linear"], key: []}]) == expected


TYPES = "allowed: int2 to int16 and uint2 to uint16."
SIZES = "nor a list of block sizes such as [1, -1]."
WORDS: list[tuple[str, Any, str]] = [
    (
        "quant_dtype",
        "uint1",
        "'uint1' has one bit without a sign; one bit is int1, the values -1 and 1, of method 'bnn'.",
    ),
    ("quant_dtype", "int17", f"'int17' has more than 16 bits; {TYPES}"),
    ("quant_dtype", "uint99", f"'uint99' has more than 16 bits; {TYPES}"),
    ("quant_dtype", "int" + "9" * 5000, f"'int{'9' * 5000}' has more than 16 bits; {TYPES}"),
    ("quant_dtype", "int0", f"'int0' is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", "int08", f"'int08' is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", "uint-8", f"'uint-8' is no integer type; {TYPES} Did you mean 'uint8'?"),
    ("quant_dtype", "int\u0668", f"'int\u0668' is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", "INT8", f"'INT8' is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", "float8", f"'float8' is no integer type; {TYPES}"),
    ("quant_dtype", 8, f"8 is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", True, f"True is no integer type; {TYPES}"),
    ("quant_dtype", "torch.qint8", f"'torch.qint8' is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_dtype", ["int8"], f"['int8'] is no integer type; {TYPES} Did you mean 'int8'?"),
    ("quant_scheme", "symetric", "'symetric' is not one of affine, symmetric. Did you mean 'symmetric'?"),
    ("quant_scheme", True, "True is not one of affine, symmetric."),
    ("granularity", "per_chanel", f"'per_chanel' is not one of {', '.join(GRANULARITIES)}, {SIZES} Did you mean 'per_channel'?"),
    ("granularity", "zzz", f"'zzz' is not one of {', '.join(GRANULARITIES)}, {SIZES}"),
    ("apply_method", "clampround", f"'clampround' is not one of {', '.join(APPLY_METHODS)}. Did you mean 'clamp_round'?"),
    ("apply_method", [], f"[] is not one of {', '.join(APPLY_METHODS)}."),
    (
        "observer",
        "min_max",
        "'min_max' is not one of default, moving_average, minmax, percentile, entropy, mse. Did you mean 'minmax'?",
    ),
    ("observer", 0.01, "0.01 is not one of default, moving_average, minmax, percentile, entropy, mse."),
    ("method", "slq", "'slq' is not one of qat, ptq, lsq, lsq+, pact, dorefa, bnn. Did you mean 'lsq'?"),
    ("method", "quat", "'quat' is not one of qat, ptq, lsq, lsq+, pact, dorefa, bnn. Did you mean 'qat'?"),
]
IDS = [f"{key}={value}"[:30] for key, value, _ in WORDS]


@pytest.mark.parametrize(("key", "value", "text"), WORDS, ids=IDS)
def test_a_wrong_word_in_the_shorthand(key: str, value: Any, text: str) -> None:
    assert error_of([{"op_types": ["Linear"], key: value}]) == f"config_list[0][{key!r}]: {text}"


@pytest.mark.parametrize(("key", "value", "text"), WORDS, ids=IDS)
def test_a_wrong_word_in_target_settings(key: str, value: Any, text: str) -> None:
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {key: value}}}
    assert error_of([entry]) == f"config_list[0]['target_settings']['weight'][{key!r}]: {text}"


@pytest.mark.parametrize(
    "value",
    [
        *([], [0], [-2], [1.0], [True], [1, -1, False], [None], ["1"], [[1]], [[1], "back", -1, 1], [[], "back"], [[0], "back"]),
        *([[1], "side"], [[1], 0], ["back", [1]], [[1], "back", 0], [[1], "back", -2], [[1], "back", True], [[1], "back", "1"]),
        *([1, "back"], 1, -1, True, {}, {"sizes": [1]}, b"default"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["['granularity']", "['target_settings']['weight']['granularity']"], ids=["short", "target"])
def test_a_granularity_that_means_nothing(value: Any, where: str) -> None:
    entry = {"granularity": value} if where == "['granularity']" else {"target_settings": {"weight": {"granularity": value}}}
    expected = (
        f"config_list[0]{where}: expected one of default, per_tensor, out_channel, in_channel, per_channel, block sizes such as "
        "[1, -1] (each positive, or -1 for the whole dimension) or [sizes, 'front' or 'back', padding], got "
    )
    assert error_of([{"op_types": ["Linear"], **entry}]) == f"{expected}{value!r}."


@pytest.mark.parametrize("key", ["op_names_re", "exclude_op_names_re"])
@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("conv[", "unterminated character set at position 4"),
        ("(a", "missing ), unterminated subpattern at position 0"),
        ("*", "nothing to repeat at position 0"),
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("(?a)(?u)a", "ASCII and UNICODE flags are incompatible"),
    ],
)
def test_no_regular_expression(key: str, pattern: str, why: str) -> None:
    text = f"config_list[0][{key!r}]: {pattern!r} is no regular expression: {why}."
    assert error_of([{"op_types": ["Linear"], key: ["fine", pattern]}]) == text


def test_a_regular_expression_too_deep_for_python() -> None:
    pattern = "(" * 500 + ")" * 500
    text = f"config_list[0]['op_names_re']: {pattern!r} is no regular expression: maximum recursion depth exceeded"
    assert error_of([{"op_names_re": [pattern]}]).startswith(text)


GROUPS = "expected a list of groups such as [('conv1', 'bn1')] or 'auto', got"


@pytest.mark.parametrize(
    ("key", "value", "where", "text"),
    [
        ("fuse_names", "conv1", "", f"{GROUPS} 'conv1'."),
        ("fuse_names", "Auto", "", f"{GROUPS} 'Auto'."),
        ("fuse_names", True, "", f"{GROUPS} True."),
        ("fuse_names", {"a": "b"}, "", f"{GROUPS} {{'a': 'b'}}."),
        ("fuse_names", ["conv1"], "[0]", "expected a tuple or list of module names, got 'conv1'."),
        ("fuse_names", [3], "[0]", "expected a tuple or list of module names, got 3."),
        ("fuse_names", [("a", "b"), ("a", 3)], "[1]", "expected a tuple or list of module names, got ('a', 3)."),
        ("fuse_names", [("a",)], "[0]", "a group has 2 to 5 names, got 1: ('a',)."),
        ("fuse_names", [list("abcdef")], "[0]", "a group has 2 to 5 names, got 6: ('a', 'b', 'c', 'd', 'e', 'f')."),
        ("fuse_names", [()], "[0]", "a group has 2 to 5 names, got 0: ()."),
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


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        *((key, "pruning") for key in ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "sparsity")),
        *((key, "pruning") for key in ("align", "global_group_id", "dependency_group_id", "internal_metric_block")),
        ("lambda", "distillation"),
        ("link", "distillation"),
    ],
)
def test_a_key_of_what_is_still_to_be_built(key: str, kind: str) -> None:
    text = f"{key!r} is a key of {kind}; allowed:"
    assert error_of([{"op_types": ["Linear"], key: 0.5}]) == f"config_list[0]: {text} {KEYS}."
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {key: 0.5}}}
    assert error_of([entry]) == f"config_list[0]['target_settings']['weight']: {text} {TARGET_KEYS}."


@pytest.mark.parametrize("key", ["op_name", "op_type", "op_name_re", "op_names_regex"])
def test_a_misspelt_selection_is_one_problem(key: str) -> None:
    text = error_of([{key: ["a"]}])
    assert text.startswith(f"config_list[0]: unknown key {key!r}; allowed: ")
    assert text.count("\n") == 0


@pytest.mark.parametrize(("key", "hint"), [("quant_dtyp", " Did you mean 'quant_dtype'?"), ("op_names", ""), (None, "")])
def test_an_unknown_key_of_a_target(key: Any, hint: str) -> None:
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {key: "int8"}}}
    where = "config_list[0]['target_settings']['weight']"
    assert error_of([entry]) == f"{where}: unknown key {key!r}; allowed: {TARGET_KEYS}.{hint}"


@pytest.mark.parametrize("entry", [None, 3, True, ["op_names"], [("op_names", ["a"])]], ids=str)
def test_an_entry_that_is_no_dict(entry: Any) -> None:
    assert error_of([{"op_names": ["a"]}, entry]) == f"config_list[1]: expected a dict, got {entry!r}."


@pytest.mark.parametrize(
    "entry", [{}, {"quant_dtype": "int8"}, {"fuse_names": [("a", "b")]}, {"exclude_op_names": ["a"]}], ids=str
)
def test_an_entry_that_selects_nothing(entry: dict[str, Any]) -> None:
    expected = (
        "config_list[0]: selects nothing; give op_names (module names), op_names_re (regular expressions) or op_types (classes)."
    )
    assert error_of([entry]) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [("int9", " Did you mean 'int8'?"), ("W4A8", " Did you mean 'w4a8'?"), ("w4a4", " Did you mean 'w4a8'?"), ("Linear", "")],
)
def test_an_unknown_preset(name: str, hint: str) -> None:
    text = f"{name!r} is no preset; known: int8, int8-weight-only, w4a8.{hint}"
    assert error_of(name) == error_of([name]) == f"config_list[0]: {text}"
    assert error_of(["int8", name]) == f"config_list[1]: {text}"


@pytest.mark.parametrize(
    "config_list", [None, [], (), {}, "", 3, b"int8", {"a"}, {"config_list": []}, {"config_list": None}], ids=repr
)
def test_a_config_list_that_is_no_list_of_entries(config_list: Any) -> None:
    got = config_list["config_list"] if isinstance(config_list, dict) and config_list else config_list
    assert error_of(config_list) == (
        "config_list: expected a non-empty list of dicts, one dict or a preset (int8, int8-weight-only, w4a8), got "
        f"{got!r}; the shortest useful ones are 'int8' and [{{'op_types': ['Linear']}}]."
    )


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
    for fragment in ("3 problems:", "unknown key 'typo'", "'f' is no integer type", "['_input_']: expected a dict of settings"):
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


def test_a_guess_is_the_nearest_word_or_nothing() -> None:
    assert guess("conv9", ["conv1", "relu"]) == " Did you mean 'conv1'?"
    assert guess("zzz", ["conv1"]) == guess(None, ["conv1"]) == guess([], ["conv1"]) == ""


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
        ("int2", "symmetric", True, -1, 1),
        ("int2", "affine", False, -2, 1),
        ("uint2", "affine", False, 0, 3),
        ("int4", "symmetric", True, -7, 7),
        ("int4", "symmetric", False, -7, 7),
        ("int4", "affine", False, -8, 7),
        ("uint4", "affine", True, 0, 15),
        ("int7", "affine", True, -63, 63),
        ("int16", "symmetric", True, -32767, 32767),
        ("int16", "affine", False, -32768, 32767),
        ("uint16", "affine", False, 0, 65535),
    ],
)
def test_ends_of_the_grid(dtype: str, scheme: str, weight: bool, qmin: int, qmax: int) -> None:
    spec = TensorSpec.make(dtype, scheme, "per_tensor", weight=weight)
    assert (spec.dtype, spec.scheme, spec.granularity) == (dtype, scheme, "per_tensor")
    assert (spec.qmin, spec.qmax) == (qmin, qmax)
    assert spec.bits == int(dtype.removeprefix("u").removeprefix("int"))
    assert spec.offset == (2 ** (spec.bits - 1) if dtype[0] == "u" else 0)


def test_a_spec_prints_its_three_words() -> None:
    assert str(TensorSpec.make("uint8", "affine", "out_channel", weight=True)) == "uint8 affine out_channel"
    blocks = Blocks(sizes=(-1, 2), side="back")
    assert str(TensorSpec.make("int4", "affine", blocks, weight=False)) == "int4 affine [[-1, 2], 'back', 1]"


def test_a_spec_is_trained_by_the_defaults_unless_told_otherwise() -> None:
    spec = TensorSpec.make("int8", "affine", "per_tensor", weight=False)
    assert (spec.apply_method, spec.observer) == ("qat_clamp_round", "default")
    spec = TensorSpec.make("int8", "affine", "per_tensor", weight=False, apply_method="bypass", observer="minmax")
    assert (spec.apply_method, spec.observer) == ("bypass", "minmax")


@pytest.mark.parametrize(
    ("granularity", "kernel"),
    [
        ("per_tensor", (-1, -1, -1, -1)),
        ("out_channel", (1, -1, -1, -1)),
        ("in_channel", (-1, 1, -1, -1)),
        ("per_channel", (-1, 1, -1, -1)),
        (Blocks(sizes=(2, -1)), (1, 1, 2, -1)),
    ],
    ids=str,
)
def test_the_blocks_of_a_granularity(granularity: Any, kernel: tuple[int, ...]) -> None:
    """nni.md 1.6, the column "kernel"."""
    assert TensorSpec.make("int8", "symmetric", granularity, weight=True).kernel(4) == kernel
