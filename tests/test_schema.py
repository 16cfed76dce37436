# SPDX-License-Identifier: Apache-2.0
"""Owns the truth of the written reference: CONFIG.md, the JSON schemas, README's table of precedence."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from torch import nn

from lightning_quant import QuantizationSetting, make_plan, schema
from lightning_quant.config import PRESETS, ConfigError, parse_distillation, parse_pruning, parse_rules
from lightning_quant.keys import DISTILLATION, DISTILLATION_ENTRY, ENTRY, QUANTIZATION
from lightning_quant.plan import parse_settings
from lightning_quant.pruning_keys import PRUNING, PRUNING_ENTRY
from lightning_quant.pruning_plan import Pruning
from lightning_quant.settings import PruningSetting

ROOT = Path(__file__).parents[1]


@functools.cache
def validator(kind: str) -> Any:
    return jsonschema.Draft202012Validator(schema.SCHEMAS[kind]())


def valid(config: Any, kind: str = "config_list") -> bool:
    return bool(validator(kind).is_valid(config))


def written() -> dict[str, str]:
    return {path.name: path.read_text() for path in [*schema.FOLDER.glob("*.schema.json"), schema.FOLDER / "CONFIG.md"]}


def test_the_written_files_are_what_the_code_says() -> None:
    assert written() == schema.files(), "run python -m lightning_quant.schema"
    assert len(written()) == 4


def test_writing_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written()
    monkeypatch.setattr(schema, "FOLDER", tmp_path)
    schema.write()
    assert written() == before


@pytest.mark.parametrize("kind", schema.SCHEMAS)
def test_the_schema_is_a_schema(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.SCHEMAS[kind]())


def test_every_reference_leads_somewhere() -> None:
    for make in schema.SCHEMAS.values():
        whole = make()
        found = set(re.findall(r"'\$ref': '#/\$defs/(\w+)'", str(whole)))
        assert found == set(whole["$defs"])


def test_the_wheel_has_them() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lightning_quant"]
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in written())


@pytest.mark.parametrize(
    "name",
    [
        *ENTRY,
        *DISTILLATION_ENTRY,
        *PRESETS,
        *QuantizationSetting.registry,
        *PRUNING_ENTRY,
        *PruningSetting.registry,
        *(one.name for one in fields(Pruning)),
    ],
)
def test_the_page_names_everything(name: str) -> None:
    assert re.search(rf"\b{re.escape(name)}\b", schema.page())


ENTRIES: list[dict[str, Any]] = [
    {"op_types": ["Linear"]},
    {"op_names": ["a"], "quant_dtype": None},
    {"op_names_re": ["a.*"], "exclude_op_names": ["ab"], "granularity": [1, -1], "fuse_names": [["a", "b"]]},
    {"op_types": ["Linear"], "granularity": [[1], "back", -1], "apply_method": "clamp_round", "observer": "minmax"},
    *(
        {"op_types": ["Linear"], "observer": f"percentile{percent}"}
        for percent in ("", ":50", ":99.9", ":99.999", ":100", ":100.0")
    ),
    {"op_types": ["Linear"], "target_settings": {"weight": {"quant_dtype": "uint16", "method": "qat"}}, "fuse_names": "auto"},
    {"op_types": ["add"], "op_names": ["layer1.0.add"], "fuse_names": [["a", "b", "c", "d", "e"]], "high_precision_output": True},
    *({"op_types": ["Linear"], "fuse_names": [], "high_precision_output": value} for value in (False, None)),
]


@pytest.mark.parametrize(
    "config_list", ["int8", ["int8", ENTRIES[0]], {"config_list": ["w4a8"]}, *ENTRIES, *([entry] for entry in ENTRIES)], ids=str
)
def test_what_the_parser_takes_the_schema_takes(config_list: Any) -> None:
    assert parse_rules(config_list)
    assert valid(config_list)


@pytest.mark.parametrize(
    "config_list",
    [
        "int9",
        [],
        [3],
        ["int8", {"quant_dtype": "int8"}],
        {"op_types": "Linear"},
        {"op_types": []},
        {"op_types": ["Linear"], "quant_dtyp": "int8"},
        *({"op_types": ["Linear"], "quant_dtype": dtype} for dtype in ("uint1", "int17", "float8", "int08", 8)),
        *(
            {"op_types": ["Linear"], "observer": f"percentile{value}"}
            for value in (":", ":49.9", ":100.1", ":101", ":1e2", ":99.", ": 99", ":-99", ":099", "99")
        ),
        *({"op_types": ["Linear"], "granularity": value} for value in ("channel", [0], [[1], "left", -1], [[1]], [1.5], [True])),
        *(
            {"op_types": ["Linear"], "target_settings": value}
            for value in (["a"], {"weight": {"op_names": ["a"]}}, {"weight": 3})
        ),
        *(
            {"op_types": ["Linear"], "fuse_names": value}
            for value in ("all", ["a", "b"], [["a"]], [["a", "b", "c", "d", "e", "f"]], [["a", "a"]])
        ),
        *({"op_types": ["Linear"], "high_precision_output": value} for value in ("true", 1, [True])),
        {"op_types": ["Linear"], "target_settings": {"weight": {"high_precision_output": True}}},
    ],
    ids=str,
)
def test_what_the_parser_refuses_the_schema_refuses(config_list: Any) -> None:
    with pytest.raises(Exception, match="config_list"):
        parse_rules(config_list)
    assert not valid(config_list)


WRONG: list[Any] = [[], {"a": 1}, True]
ALIGN = {"module_name": None, "target_name": "weight", "dims": [0]}
MASKED: list[dict[str, Any]] = [
    {"op_types": ["Linear"], "sparse_ratio": 0.5},
    {
        "op_types": ["Linear"],
        "sparse_ratio": None,
        "sparse_threshold": 1,
        "pattern": None,
        "min_sparse_ratio": 0.1,
        "max_sparse_ratio": 1,
    },
    {"op_names": ["a"], "metric": "fpgm", "dependency_group_id": 1, "global_group_id": "g", "internal_metric_block": 2},
    {"op_names": ["a"], "target_names": ["weight"], "pattern": "2:4", "target_settings": {"weight": {"apply_method": "mul"}}},
    {"op_names": ["a"], "target_settings": {"bias": {"align": ALIGN}}, "granularity": [[1], "back", -1]},
]


@pytest.mark.parametrize("pruning", [*MASKED, *([entry] for entry in MASKED)], ids=str)
def test_what_the_parser_of_pruning_takes_the_schema_takes(pruning: Any) -> None:
    assert parse_pruning(pruning)
    assert valid(pruning, "pruning") and valid({"config_list": pruning, "schedule": "linear"}, "pruning")


@pytest.mark.parametrize(
    "keys",
    [
        *({key: value} for key in PRUNING for value in WRONG),
        *({"sparse_ratio": value} for value in (-0.1, 1.1, "half")),
        *({"pattern": value} for value in ("2", "0:4", "a:b", 2)),
        *({"align": value} for value in ({"dims": [0]}, {**ALIGN, "dim": 1}, {**ALIGN, "dims": 0})),
        {"min_sparse_ratio": 1},
        {"metric": "l3"},
        {"quant_dtype": "int8"},
        {"op_types": []},
    ],
    ids=str,
)
def test_what_the_parser_of_pruning_refuses_the_schema_refuses(keys: dict[str, Any]) -> None:
    entry = {"op_types": ["Linear"], **keys}
    with pytest.raises(ConfigError, match=r"pruning\[0\]"):
        parse_pruning([entry])
    assert not valid([entry], "pruning") and not valid({"config_list": [entry]}, "pruning")


TARGET: dict[str, Any] = {
    "sparse_ratio": 0.5,
    "sparse_threshold": 1.0,
    "max_sparse_ratio": 0.9,
    "min_sparse_ratio": 0.1,
    "global_group_id": 1,
    "dependency_group_id": 2,
    "granularity": "out_channel",
    "metric": "level",
    "pattern": "2:4",
    "internal_metric_block": 2,
    "align": ALIGN,
    "apply_method": "mul",
}


@pytest.mark.parametrize("pair", list(itertools.combinations(PRUNING, 2)), ids="-".join)
@pytest.mark.parametrize("place", ["entry", "target"])
def test_keys_that_exclude_each_other(pair: tuple[str, str], place: str) -> None:
    """The schema says of each pair of keys what the parser says."""
    keys = {key: TARGET[key] for key in pair}
    entry = {"op_types": ["Linear"], **(keys if place == "entry" else {"target_settings": {"weight": keys}})}
    try:
        parse_pruning([entry])
    except ConfigError:
        assert not valid([entry], "pruning")
    else:
        assert valid([entry], "pruning")


def test_some_pairs_exclude_each_other_and_some_do_not() -> None:
    both = {"op_types": ["Linear"], "sparse_ratio": 0.5, "sparse_threshold": 1}
    assert not valid(both, "pruning") and valid({**both, "sparse_ratio": None}, "pruning")
    assert valid({"op_types": ["Linear"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.9}, "pruning")


NO_OPTIONS: list[Any] = [[], {"a": 1}, "word", -0.5]
OPTIONS: list[dict[str, Any]] = [
    *({"schedule": word} for word in ("one_shot", "linear", "agp")),
    *({"stop": moment} for moment in (5, 1, 0.9, 1.0, "epoch 3", "step 500", "80%", " 99.5 % ", "100%", "100.0%")),
    {"start": "epoch 1", "stop": "epoch 12", "updates": 1},
    {"schedule": "one_shot", "start": None},
    {"dependencies": False, "shrink": False, "penalty": 0, "seed": -3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_that_pruning_takes(options: dict[str, Any]) -> None:
    whole = {"config_list": MASKED[0], **options}
    assert Pruning.make(whole)
    assert valid(whole, "pruning")


@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name in [one.name for one in fields(Pruning)] for value in NO_OPTIONS),
        *({"stop": moment} for moment in (-1, 1.5, True, "epoch", "3 epochs", "101%", "80 percent", "epoch 3.5")),
        {"updates": 0},
        {"shrink": 1},
        {"seed": True},
        {"penalty": "1e-4"},
        {"sparse_ratio": 0.5},
        {"schedul": "agp"},
        {"config_list": None},
    ],
    ids=str,
)
def test_options_that_pruning_refuses(options: dict[str, Any]) -> None:
    whole = {"config_list": MASKED[0], **options}
    with pytest.raises(ConfigError):
        parse_pruning(Pruning.make(whole).config_list)
    assert not valid(whole, "pruning")
    assert not valid({name: value for name, value in whole.items() if name != "config_list"}, "pruning"), "nor without entries"


def test_the_pages_defaults_of_options_are_those_of_the_class() -> None:
    own = {one.name: one.default for one in fields(Pruning) if one.name != "config_list"}
    table = re.search(r"\| option \| default \|.*?\n\|[-|]+\n((?:\|.*\n)+)", schema.page())
    assert table is not None
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")[:2]] for row in table[1].splitlines()]
    assert {name: yaml.safe_load(text) if name != "penalty" else float(text) for name, text in cells} == own


# -- distillation -----------------------------------------------------------------------------------------------------------

TAUGHT: list[Any] = [
    {"apply_method": "kl", "temperature": 4},
    {"op_names": ["a", "b"], "lambda": 0.5, "link": "auto"},
    {"op_types": ["Conv2d"], "exclude_op_names": ["a"], "link": ["c", "d"], "apply_method": "attention", "dim": -1},
    {"op_names_re": ["a.*"], "target_names": ["_input_"], "apply_method": "package.module.function", "lambda": None},
    {"op_names": [""], "target_settings": {"_output_": {"lambda": 2, "temperature": None, "dim": 1}}},
    {},
]


@pytest.mark.parametrize(
    "given", ["kl", "mse", ["cosine", *TAUGHT], ["package.loss"], *TAUGHT, *([one] for one in TAUGHT)], ids=str
)
def test_what_the_parser_of_distillation_takes_the_schema_takes(given: Any) -> None:
    for whole in (given, {"config_list": given}, {"config_list": given, "origin_loss_lambda": 0.5}):
        assert parse_distillation(whole).rules
        assert valid(whole, "distillation")


@pytest.mark.parametrize(
    "keys",
    [
        *({key: value} for key in DISTILLATION for value in WRONG),
        *({"lambda": value} for value in (-0.1, "1", 1e31)),
        *({"temperature": value} for value in (0, -1, 1e7)),
        *({"dim": value} for value in (17, -17, 1.5, "1")),
        *({"apply_method": value} for value in ("l1", "kl.", ".kl", "a b.c", "a.1b", 3)),
        *({"link": value} for value in ([3], 3)),
        {"lamda": 1},
        {"quant_dtype": "int8"},
        {"sparse_ratio": 0.5},
        {"op_types": []},
        {"op_names": "a"},
        {"target_settings": {"_output_": {"op_names": ["a"]}}},
        {"target_settings": {"_output_": 3}},
    ],
    ids=str,
)
def test_what_the_parser_of_distillation_refuses_the_schema_refuses(keys: dict[str, Any]) -> None:
    entry = {"op_types": ["Linear"], **keys}
    with pytest.raises(ConfigError, match=r"distillation\[0\]"):
        parse_distillation([entry])
    assert not valid([entry], "distillation") and not valid(entry, "distillation")


@pytest.mark.parametrize(
    "given",
    [
        [],
        3,
        "l1",
        ["l1"],
        [3],
        {"exclude_op_names": ["a"]},
        {"config_list": []},
        {"config_list": "kl", "origin_loss_lambda": -1},
        {"config_list": "kl", "origin_loss_lambda": None},
        {"config_list": "kl", "origin_los_lambda": 1},
        {"origin_loss_lambda": 1},
    ],
    ids=str,
)
def test_other_things_that_are_no_distillation(given: Any) -> None:
    with pytest.raises(ConfigError, match="distillation"):
        parse_distillation(given)
    assert not valid(given, "distillation")


def test_the_examples_fit_the_schema() -> None:
    assert valid(yaml.safe_load((ROOT / "examples" / "quant.yaml").read_text()))
    snippets = re.findall(r"```yaml\n(.*?)```", schema.page(), flags=re.DOTALL)
    kinds = [re.match(r"# yaml-language-server: \$schema=(\w+)\.schema\.json\n", snippet) for snippet in snippets]
    found = {kind[1] if kind else "settings": yaml.safe_load(one) for kind, one in zip(kinds, snippets, strict=True)}
    assert found.keys() == {*schema.SCHEMAS, "settings"} and len(snippets) == 4
    assert all(valid(one, kind) for kind, one in found.items() if kind != "settings")
    assert parse_settings(found["settings"])
    assert len(parse_rules(found["config_list"])) == 2
    assert len(parse_distillation(found["distillation"]).rules) == 3
    pruning = Pruning.make(found["pruning"])
    assert pruning.stop == "60%" and len(parse_pruning(pruning.config_list)) == 2


def test_every_row_has_a_text_and_a_default() -> None:
    for rows in (ENTRY, QUANTIZATION, PRUNING_ENTRY, DISTILLATION_ENTRY):
        assert all(key.text.endswith(".") and key.default for key in rows.values())


# -- README's table of precedence ---------------------------------------------------------------------------------------


def precedence() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"\| the type's setting .*?\n\|[-|]+\n((?:\|.*\n)+)", text)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("row", precedence(), ids=str)
def test_the_readmes_truth_table(row: list[str]) -> None:
    setting, own, targets, later, wanted = row

    def said(word: str) -> dict[str, Any]:
        return {} if word == "nothing" else {"quant_dtype": word}

    config: list[dict[str, Any]] = [{"op_types": ["Linear"], **said(own), "target_settings": {"weight": said(targets)}}]
    if later != "does not select it":
        config.append({"op_names": ["0"], **said(later)})
    with QuantizationSetting.temporary("Linear", {"_input_": {}, "weight": said(setting)}):
        (layer,) = make_plan(nn.Sequential(nn.Linear(4, 4)), config).layers
    assert layer.targets["weight"].spec.dtype == wanted
    overruled = any("overrules config_list[0]" in note for note in layer.targets["weight"].notes)
    assert overruled == (later != "does not select it")


def test_the_table_is_whole() -> None:
    assert len(precedence()) == 6
