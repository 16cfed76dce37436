# SPDX-License-Identifier: Apache-2.0
"""Owns the words of a `pruning` list: one row for each key that `config_list` does not have or that means something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_quant.keys import (
    ENTRY,
    QUANTIZATION,
    SELECTION,
    Key,
    Problems,
    choice,
    is_list,
    number,
    target_settings,
    unknown_key,
)

METRIC_NAMES = ("l1", "l2", "level", "fpgm", "slim", "taylor", "movement", "random")


def _group_id(value: Any, where: str, problems: Problems) -> Any:
    if not isinstance(value, int | str) or isinstance(value, bool):
        problems.append(f"{where}: expected an integer or a string that names the group, got {value!r}.")
    return value


def _align(value: Any, where: str, problems: Problems) -> Any:
    keys = ("module_name", "target_name", "dims")
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a dict with {', '.join(keys)}, got {value!r}.")
        return {}
    problems.extend(unknown_key(key, keys, where) for key in value if key not in keys)
    if not isinstance(value.get("target_name"), str):
        problems.append(f"{where}['target_name']: expected the name of a target, got {value.get('target_name')!r}.")
    if not isinstance(value.get("module_name"), str | None):
        problems.append(
            f"{where}['module_name']: expected a module's name or None for the same module, got {value['module_name']!r}."
        )
    dims: Any = value.get("dims")
    if not is_list(dims) or not all(type(dim) is int for dim in dims):
        problems.append(f"{where}['dims']: expected a list of dimensions, got {dims!r}.")
    return {**value, "dims": list(dims) if is_list(dims) else []}


def _pattern(value: Any, where: str, problems: Problems) -> Any:
    found = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", value) if isinstance(value, str) else None
    if found is None or not int(found[1]) < int(found[2]):
        problems.append(f"{where}: {value!r} is no pattern; write 'N:M', N of every M values stay, N less than M: '2:4'.")
    return str(value)


_ID = {"type": ["integer", "string"]}
_ALIGN = {
    "type": "object",
    "properties": {
        "module_name": {"type": ["string", "null"]},
        "target_name": {"type": "string"},
        "dims": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["target_name", "dims"],
    "additionalProperties": False,
}


def _ratio(text: str, *, open_high: bool = False) -> Key:
    schema: dict[str, Any] = {"type": "number", "minimum": 0, "exclusiveMaximum" if open_high else "maximum": 1}
    check, values = number(0, 1, open_high=open_high), "0 to 1" + (", 1 excluded" if open_high else "")
    return Key(check=check, schema=schema, values=values, default="none", text=text)


PRUNING: dict[str, Key] = {
    "sparse_ratio": _ratio(
        "Share of blocks that are masked: floor(n ratio) of n, those with the smallest scores, the first ones of equal scores. "
        "At "
        "least one block of a target always stays."
    ),
    "sparse_threshold": Key(
        check=number(-1e30, 1e30),
        schema={"type": "number"},
        values="number",
        default="none",
        text="Blocks with a smaller score are masked. Not together with `sparse_ratio`.",
    ),
    "max_sparse_ratio": _ratio("At most this share of a target is masked, whatever ratio, threshold or global group say."),
    "min_sparse_ratio": _ratio("At least this share.", open_high=True),
    "global_group_id": Key(
        check=_group_id,
        schema=_ID,
        values="integer, string",
        default="none",
        text="The blocks of all targets with this id are ranked together, and `sparse_ratio`, equal for all, is the share of "
        "all.",
    ),
    "dependency_group_id": Key(
        check=_group_id,
        schema=_ID,
        values="integer, string",
        default="found in the recorded forward",
        text="All targets with this id share one mask, made from the mean of their scores; numbers of blocks and ratios must be "
        "equal. Left out, layers whose channels meet (additions, grouped and depthwise convolutions, concatenations) do so by "
        "themselves.",
    ),
    "granularity": Key(
        check=QUANTIZATION["granularity"].check,
        schema=QUANTIZATION["granularity"].schema,
        values="`default`, `out_channel`, `in_channel`, `per_channel`; block sizes; `[sizes, side, padding]`",
        default="`out_channel`; of metric `level` single values; of inputs and outputs `per_channel`",
        text="What a block is. `out_channel`: all that makes one output channel (dimension 0; of transposed convolutions the "
        "one that "
        "holds them). `in_channel`: all that reads one input channel. `per_channel`: dimension 1 of an input or output. A list "
        "gives block sizes as in `config_list`; `[1]` is single values.",
    ),
    "metric": Key(
        check=choice(*METRIC_NAMES),
        schema={"enum": list(METRIC_NAMES)},
        default="l1",
        text="What a block is worth. `l1`, `l2`: its norm (Li et al. 2017). `level`: the same of single values (Han et al. "
        "2015). "
        "`fpgm`: its distance to all others (He et al. 2019). `slim`: the scale of the batch norm behind it, or of the batch "
        "norm "
        "selected, whose scales an L1 penalty pulls to 0 in training (Liu et al. 2017). `taylor`: the estimated change of the "
        "loss "
        "without it (Molchanov et al. 2019). `movement`: how far training moves it away from 0; a masked block may return (Sanh "
        "et al. 2020). `random`.",
    ),
    "pattern": Key(
        check=_pattern,
        schema={"type": "string", "pattern": "^[1-9][0-9]*:[1-9][0-9]*$"},
        values="`2:4`, `N:M`",
        default="none",
        text="N of every M values along the input channels stay, by metric `level`, `taylor`, `movement` or `random`, in place "
        "of a "
        "ratio (Mishra et al. 2021, Zhou et al. 2021).",
    ),
    "internal_metric_block": Key(
        check=number(1, 2**31, whole=True),
        schema={"type": "integer", "minimum": 1},
        values="integer",
        default="found in the recorded forward",
        text="The blocks are cut in so many equal parts, in order, and each loses the same share: what a grouped convolution "
        "needs.",
    ),
    "align": Key(
        check=_align,
        schema=_ALIGN,
        values="dict of `module_name`, `target_name`, `dims`",
        default="none",
        text="The mask follows that of another target: a block stays where anything of that target's does, seen along its "
        "`dims`. "
        "`module_name` none: of the same module. In any order, also to a target that is aligned itself.",
    ),
    "apply_method": Key(
        check=choice("bypass", "mul", "add"),
        schema={"enum": ["bypass", "mul", "add"]},
        default="mul",
        text="`mul`: masked values are 0. `add`: -1000 is added to them (inputs and outputs alone: what a softmax reads). "
        "`bypass`: "
        "the target is left as it is.",
    ),
}
_OWN_TEXT = {
    "target_names": "Which tensors of a module: parameters by name, `_input_`, `_output_`. An input or output of a layer with "
    "weights, "
    "or of a batch norm, is masked by masking its parameters, which computes the same.",
    "target_settings": "For one target, any of the pruning keys; they overrule the entry's own, key by key.",
}
PRUNING_ENTRY: dict[str, Key] = {
    **SELECTION,
    "target_names": Key(
        check=ENTRY["target_names"].check,
        schema=ENTRY["target_names"].schema,
        values=ENTRY["target_names"].values,
        default=ENTRY["target_names"].default,
        text=_OWN_TEXT["target_names"],
    ),
    "target_settings": Key(
        check=target_settings(PRUNING),
        schema={"type": "object", "additionalProperties": {"$ref": "#/$defs/pruning_target"}},
        values=ENTRY["target_settings"].values,
        default="none",
        text=_OWN_TEXT["target_settings"],
    ),
    **PRUNING,
}
