# SPDX-License-Identifier: Apache-2.0
"""Owns the truth of the written reference: CONFIG.md, the JSON schema, README's table of precedence."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from torch import nn

from lightning_quant import QuantizationSetting, make_plan, schema
from lightning_quant.config import PRESETS, ConfigError, parse_distillation, parse_pruning, parse_rules
from lightning_quant.keys import DISTILLATION, ENTRY, QUANTIZATION
from lightning_quant.plan import parse_settings
from lightning_quant.pruning_keys import PRUNING, PRUNING_ENTRY
from lightning_quant.pruning_plan import Pruning
from lightning_quant.settings import PruningSetting

ROOT = Path(__file__).parents[1]


def valid(config_list: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema.json_schema()).is_valid(config_list))


def test_the_written_files_are_what_the_code_says() -> None:
    before = schema.SCHEMA.read_text(), schema.PAGE.read_text()
    remedy = "run python -m lightning_quant.schema"
    assert before[1] == schema.page(), remedy
    assert yaml.safe_load(before[0]) == schema.json_schema(), remedy


def test_writing_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = schema.SCHEMA.read_text(), schema.PAGE.read_text()
    monkeypatch.setattr(schema, "SCHEMA", tmp_path / "schema.json")
    monkeypatch.setattr(schema, "PAGE", tmp_path / "page.md")
    schema.write()
    assert ((tmp_path / "schema.json").read_text(), (tmp_path / "page.md").read_text()) == before


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema.json_schema())


@pytest.mark.parametrize(
    "name",
    [
        *ENTRY,
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


def valid_pruning(pruning: Any) -> bool:
    whole = {**schema.json_schema(), "anyOf": [{"$ref": "#/$defs/pruning"}]}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(pruning))


WRONG: list[Any] = [[], {"a": 1}, True]
ALIGN = {"module_name": None, "target_name": "weight", "dims": [0]}
MASKED: list[dict[str, Any]] = [
    {"op_types": ["Linear"], "sparse_ratio": 0.5},
    {"op_types": ["Linear"], "sparse_ratio": None, "sparse_threshold": 1, "min_sparse_ratio": 0.1, "max_sparse_ratio": 1},
    {"op_names": ["a"], "metric": "fpgm", "dependency_group_id": 1, "global_group_id": "g", "internal_metric_block": 2},
    {"op_names": ["a"], "target_names": ["weight"], "pattern": "2:4", "target_settings": {"weight": {"apply_method": "mul"}}},
    {"op_names": ["a"], "target_settings": {"bias": {"align": ALIGN}}, "granularity": [[1], "back", -1]},
]


@pytest.mark.parametrize("pruning", [*MASKED, *([entry] for entry in MASKED)], ids=str)
def test_what_the_parser_of_pruning_takes_the_schema_takes(pruning: Any) -> None:
    assert parse_pruning(pruning)
    assert valid_pruning(pruning) and valid_pruning({"config_list": pruning, "schedule": "linear"})


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
    assert not valid_pruning([entry])


def test_the_examples_fit_the_schema() -> None:
    assert valid(yaml.safe_load((ROOT / "examples" / "quant.yaml").read_text()))
    snippet, distillation, settings = re.findall(r"```yaml\n(.*?)```", schema.page(), flags=re.DOTALL)
    assert parse_settings(yaml.safe_load(settings))
    assert valid(yaml.safe_load(snippet))
    assert len(parse_rules(yaml.safe_load(snippet))) == 2
    assert len(parse_distillation(yaml.safe_load(distillation)).rules) == 3


def test_every_row_has_a_text_and_a_default() -> None:
    for rows in (ENTRY, QUANTIZATION, PRUNING_ENTRY, DISTILLATION):
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
