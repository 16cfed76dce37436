# SPDX-License-Identifier: Apache-2.0
"""Owns the words of a `config_list`: one row for each key, with its check, its default, its JSON schema and its text.

`config.py` parses with these rows, `settings.py` checks registered settings with them, `schema.py` prints them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

SCHEMES = ("affine", "symmetric")
GRANULARITIES = ("default", "per_tensor", "out_channel", "in_channel", "per_channel")
APPLY_METHODS = ("bypass", "clamp_round", "qat_clamp_round")
OBSERVERS = ("default", "moving_average", "minmax", "percentile", "entropy", "mse")
WEIGHT_OBSERVERS = ("default", "mse")  # those that a parameter can have
METHODS = ("qat", "ptq", "lsq", "lsq+", "pact", "dorefa", "bnn")
DISTILLATION_METHODS = ("mse", "kl", "cosine", "attention")
INPUT, WEIGHT, OUTPUT = "_input_", "weight", "_output_"

Problems = list[str]
Check = Callable[[Any, str, Problems], Any]


def closest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` nearest to `word`, best first; for "did you mean" texts."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def guess(word: Any, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest name, or nothing."""
    near = closest(word, known, 1) if isinstance(word, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def is_list(value: Any) -> bool:
    """Whether `value` is a list in the sense of a config: any sequence but a string."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def unknown_key(key: Any, allowed: Iterable[str], where: str) -> str:
    """The problem of a key that is not in `allowed`."""
    names = sorted(allowed)
    kind = _ELSEWHERE.get(key)
    if kind is not None and not any(_ELSEWHERE.get(name) == kind for name in names):
        own = f"which has a list and settings of its own ({kind}=[...], {kind.capitalize()}Setting)"
        return f"{where}: {key!r} is a key of {kind}, {own}; allowed: {', '.join(names)}."
    return f"{where}: unknown key {key!r}; allowed: {', '.join(names)}.{guess(key, names)}"


# -- granularity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A granularity written as a list: the size of the block along each dimension that shares one scale; -1 is all of it.

    NNI's padding rules, for a tensor with more dimensions than `sizes`: a bare list of sizes is padded at the *front* with
    1, so `[1, -1]` on a (4, 2, 3, 3) weight is [1, 1, 1, -1] (a scale of shape (4, 2, 3, 1)), and equals `out_channel` only
    for a 2-D weight. `[sizes, "back", -1]` pads at the back with -1: `[[1], "back", -1]` is `out_channel` for any weight. The
    third item is what is padded, 1 if left out. A block size must divide its dimension.
    """

    sizes: tuple[int, ...]
    side: str = "front"
    pad: int = 1

    def kernel(self, dims: int) -> tuple[int, ...]:
        """The block size along each of `dims` dimensions; longer than that if there are too many sizes."""
        padding = (self.pad,) * (dims - len(self.sizes))
        return padding + self.sizes if self.side == "front" else self.sizes + padding

    def __str__(self) -> str:
        sizes = list(self.sizes)
        return str(sizes if (self.side, self.pad) == ("front", 1) else [sizes, self.side, self.pad])


def _sizes(value: Any) -> bool:
    return is_list(value) and bool(value) and all(type(size) is int and (size == -1 or size > 0) for size in value)


def _granularity(value: Any, where: str, problems: Problems) -> str | Blocks:
    if isinstance(value, str):
        if value not in GRANULARITIES:
            problems.append(
                f"{where}: {value!r} is not one of {', '.join(GRANULARITIES)}, nor a list of block sizes such as [1, -1]."
                + guess(value, GRANULARITIES)
            )
        return value
    if _sizes(value):
        return Blocks(sizes=tuple(value))
    if is_list(value) and len(value) in (2, 3) and _sizes(value[0]) and value[1] in ("front", "back"):
        pad = value[2] if len(value) == 3 else 1
        if type(pad) is int and (pad == -1 or pad > 0):
            return Blocks(sizes=tuple(value[0]), side=value[1], pad=pad)
    problems.append(
        f"{where}: expected one of {', '.join(GRANULARITIES)}, block sizes such as [1, -1] (each positive, or -1 for the whole "
        f"dimension) or [sizes, 'front' or 'back', padding], got {value!r}."
    )
    return "default"


# -- checks -----------------------------------------------------------------------------------------------------------


def choice(*allowed: str, synonyms: Mapping[str, str] | None = None) -> Check:
    """A check for one word out of `allowed`."""

    def check(value: Any, where: str, problems: Problems) -> str:
        if not isinstance(value, str) or value not in allowed:
            meant = (synonyms or {}).get(value, value) if isinstance(value, str) else value
            problems.append(f"{where}: {value!r} is not one of {', '.join(allowed)}.{guess(meant, allowed)}")
        return str(value)

    return check


_PERCENTILE = "percentile:([5-9][0-9](?:[.][0-9]+)?|100(?:[.]0+)?)"


def percent_of(observer: str) -> float:
    """The p of `percentile:p`, 99.99 if it is left out."""
    found = re.fullmatch(_PERCENTILE, observer)
    return 99.99 if found is None else float(found[1])


def kind_of_observer(observer: str) -> str:
    """An observer without its number: `percentile` of `percentile:99.9`."""
    return observer.partition(":")[0]


def plain_observer(observer: str) -> str:
    """The one way to write an observer: `percentile:99.990` is `percentile`."""
    if kind_of_observer(observer) != "percentile":
        return observer
    percent = percent_of(observer)
    return "percentile" if percent == 99.99 else f"percentile:{percent:.15g}"


def _observer(value: Any, where: str, problems: Problems) -> str:
    if isinstance(value, str) and re.fullmatch("percentile *:.*", value):
        if re.fullmatch(_PERCENTILE, value) is None:
            problems.append(
                f"{where}: {value!r} names no percentile from 50 to 100; write 'percentile:99.9', or 'percentile' for 99.99."
            )
        return value
    return str(choice(*OBSERVERS)(value, where, problems))


def _dtype(value: Any, where: str, problems: Problems) -> str:
    found = re.fullmatch(r"(u?)int([1-9][0-9]*)", value) if isinstance(value, str) else None
    if found is None:
        word = f"int{value}" if type(value) is int else str(value).removeprefix("torch.").lower()
        near = guess(word, ("int8", "uint8", "int4", "uint4", "int16", "uint16"))
        problems.append(f"{where}: {value!r} is no integer type; allowed: int2 to int16 and uint2 to uint16.{near}")
    elif found[0] == "uint1":
        problems.append(f"{where}: {value!r} has one bit without a sign; one bit is int1, the values -1 and 1, of method 'bnn'.")
    elif len(found[2]) > 2 or int(found[2]) > 16:
        problems.append(f"{where}: {value!r} has more than 16 bits; allowed: int2 to int16 and uint2 to uint16.")
    return str(value)


def names(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    """A check for a list of strings; doubles are dropped."""
    if not is_list(value) or not all(isinstance(name, str) for name in value):
        classes = [part.__name__ for part in value if isinstance(part, type)] if is_list(value) else []
        example = value if isinstance(value, str) else (classes or ["conv1"])[0]
        problems.append(f"{where}: expected a list of strings, got {value!r}; write [{example!r}] for one name.")
        return ()
    if not value:
        problems.append(f"{where}: the list is empty; name at least one, or leave the key out.")
    return tuple(dict.fromkeys(value))


def _patterns(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    patterns = names(value, where, problems)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{where}: {pattern!r} is no regular expression: {error}.")
    return patterns


def _switch(value: Any, where: str, problems: Problems) -> bool | None:
    if value is not None and not isinstance(value, bool):
        problems.append(f"{where}: expected true, false or nothing, got {value!r}.")
        return None
    return value


def _groups(value: Any, where: str, problems: Problems) -> tuple[tuple[str, ...], ...] | str | None:
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if not is_list(value):
        problems.append(f"{where}: expected a list of groups such as [('conv1', 'bn1')] or 'auto', got {value!r}.")
        return ()
    if len(value) > 1 and all(isinstance(name, str) for name in value):
        problems.append(f"{where}: expected a list of groups, got one group; write [{tuple(value)!r}].")
        return ()
    groups: list[tuple[str, ...]] = []
    for position, group in enumerate(value):
        place = f"{where}[{position}]"
        if not is_list(group) or not all(isinstance(name, str) for name in group):
            problems.append(f"{place}: expected a tuple or list of module names, got {group!r}.")
        elif not 2 <= len(group) <= 5:
            problems.append(f"{place}: a group has 2 to 5 names, got {len(group)}: {tuple(group)!r}.")
        elif len(set(group)) < len(group):
            problems.append(f"{place}: a name stands twice in {tuple(group)!r}; a module can be fused once.")
        else:
            groups.append(tuple(group))
    return tuple(groups)


def number(low: float, high: float, *, whole: bool = False, open_high: bool = False) -> Check:
    """A check for a number in [low, high], or [low, high) where `open_high`; `whole`: an integer."""
    limits = f"{low:g} to {high:g}" + (" (excluded)" if open_high else "")

    def check(value: Any, where: str, problems: Problems) -> Any:
        fits = isinstance(value, int) if whole else isinstance(value, int | float)
        if not fits or isinstance(value, bool):
            problems.append(f"{where}: expected {'an integer' if whole else 'a number'} from {limits}, got {value!r}.")
        elif not low <= value <= high or (open_high and value == high):
            problems.append(f"{where}: {value!r} is not in the range {limits}.")
        return value

    return check


def _link(value: Any, where: str, problems: Problems) -> Any:
    if not isinstance(value, str):
        return list(names(value, where, problems))
    return value


def _distillation_method(value: Any, where: str, problems: Problems) -> Any:
    path = isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))
    if not (path or callable(value) or (isinstance(value, str) and value in DISTILLATION_METHODS)):
        problems.append(
            f"{where}: {value!r} is not one of {', '.join(DISTILLATION_METHODS)}, nor a function of (student, teacher) or the "
            f"path of one, 'package.module.function'.{guess(value, DISTILLATION_METHODS)}"
        )
    return value


def _temperature(value: Any, where: str, problems: Problems) -> Any:
    if value == 0:
        problems.append(f"{where}: a temperature is greater than 0.")
    return number(0, 1e6)(value, where, problems)


# -- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key: `schema` is the JSON schema of its value; `default`, `text` and `values` (of no `enum`) are for readers."""

    check: Check
    schema: Mapping[str, Any]
    default: str
    text: str
    values: str = ""


def check_keys(value: Any, rows: Mapping[str, Key], where: str, problems: Problems) -> dict[str, Any]:
    """The keys of one target, checked; a key that is None counts as not given."""
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a dict of settings, got {value!r}.")
        return {}
    problems.extend(unknown_key(key, rows, where) for key in value if key not in rows)
    return {key: row.check(value[key], f"{where}[{key!r}]", problems) for key, row in rows.items() if value.get(key) is not None}


def target_settings(rows: Mapping[str, Key]) -> Check:
    """A check for a dict from target to keys, each of one of `rows`."""

    def check(value: Any, where: str, problems: Problems) -> dict[str, Mapping[str, Any]]:
        if not isinstance(value, Mapping):
            problems.append(f"{where}: expected a dict from target to settings, got {value!r}.")
            return {}
        return {str(target): check_keys(keys, rows, f"{where}[{target!r}]", problems) for target, keys in value.items()}

    return check


def _one_of(*allowed: str) -> dict[str, Any]:
    return {"enum": list(allowed)}


_NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_SIZES = {"type": "array", "minItems": 1, "items": {"type": "integer", "anyOf": [{"const": -1}, {"minimum": 1}]}}
_SIDE = {"type": "array", "minItems": 2, "maxItems": 3, "prefixItems": [_SIZES, _one_of("front", "back"), {"type": "integer"}]}
_GROUP = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 5, "uniqueItems": True}


def _selection(text: str, check: Check = names) -> Key:
    return Key(check=check, schema=_NAMES, default="none", text=text, values="list of strings")


SELECTION: dict[str, Key] = {
    "op_names": _selection("Names of modules, as in `named_modules()`; relative to `root` where that is given."),
    "op_names_re": _selection("Regular expressions on names, matched from the start (`re.match`), as in NNI.", _patterns),
    "op_types": _selection(
        "Types of modules: a class name (`Conv2d`), a dotted path (`torch.nn.Conv2d`) or a base class whose forward is kept."
    ),
    "exclude_op_names": _selection("Names that are taken out again."),
    "exclude_op_names_re": _selection("Regular expressions on names that are taken out again.", _patterns),
    "exclude_op_types": _selection("Types that are taken out again."),
}
QUANTIZATION: dict[str, Key] = {
    "quant_dtype": Key(
        check=_dtype,
        schema={"type": "string", "pattern": "^(int1|u?int([2-9]|1[0-6]))$"},
        values="`int2` to `int16`, `uint2` to `uint16`, `int1` with method `bnn`",
        default="parameters int8, activations uint8",
        text="The integers: int2 to int16, uint2 to uint16. Parameters of `int<N>` end at -2^(N-1)+1, symmetric about zero, "
        "and so do symmetric activations; affine activations have -2^(N-1), too. More than 8 bits run in float arithmetic.",
    ),
    "quant_scheme": Key(
        check=choice(*SCHEMES, synonyms={"asymmetric": "affine"}),
        schema=_one_of(*SCHEMES),
        default="parameters symmetric, activations affine",
        text="Whether the grid has a zero point (affine) or is symmetric about zero.",
    ),
    "granularity": Key(
        check=_granularity,
        schema={"anyOf": [_one_of(*GRANULARITIES), _SIZES, _SIDE]},
        values=", ".join(f"`{name}`" for name in GRANULARITIES) + "; block sizes; `[sizes, side, padding]`",
        default="default",
        text="How many scales a tensor has. `default`: parameters one for each output channel (1-D parameters: one), activations "
        "one. `per_tensor`: one. `out_channel`: one for each index of dimension 0; `in_channel`: of dimension 1 (parameters). "
        "`per_channel`: of dimension 1 (activations). A list gives block sizes, -1 for a whole dimension: `[1, -1]` is padded at "
        "the front with 1, `[[1], 'back', -1]` at the back with -1. What an entry says for all its targets applies where it can: "
        "an activation that cannot have it keeps one scale, and the plan says so.",
    ),
    "apply_method": Key(
        check=choice(*APPLY_METHODS),
        schema=_one_of(*APPLY_METHODS),
        default="qat_clamp_round",
        text="`qat_clamp_round`: the gradient is 0 where a value was clipped (Jacob et al. 2018). `clamp_round`: it passes "
        "everywhere. `bypass`: the target stays float.",
    ),
    "observer": Key(
        check=_observer,
        schema={"anyOf": [_one_of(*OBSERVERS), {"type": "string", "pattern": f"^{_PERCENTILE}$"}]},
        values=", ".join(f"`{name}`" for name in OBSERVERS) + "; `percentile:p`, p from 50 to 100",
        default="default",
        text="How a range is found. `default`: activations `moving_average` (0.01 of each batch's minimum and maximum), "
        "parameters by their values at every step. `minmax`: the smallest and largest value seen (activations). The others keep "
        "a histogram of all values (activations with one scale); they cost a step more time, and on an accelerator a wait for "
        "each batch. `percentile:p`: the (100 - p)th and pth percentile, p 99.99 if left out. `entropy`: clips where the clipped "
        "distribution and its quantized version diverge least (KL, Migacz 2017; zeros left out; above 11 bits it clips nothing). "
        "`mse`: the range that rounds with the least squared error. `mse` in the `target_settings` of a parameter whose grid is "
        "symmetric: the scale is that share of the largest value, from 0.3 to 1, whose error is least when it is first rounded.",
    ),
    "method": Key(
        check=choice(*METHODS),
        schema=_one_of(*METHODS),
        default="qat",
        text="How the grid is found and trained. `qat`: the observed range of an activation, the present range of a parameter, "
        "gradients straight through (Jacob et al. 2018). `ptq`: as `qat`, but only calibration finds the range of an activation, "
        "and no training moves it (Nagel et al. 2021); the callback calibrates by itself, and `Trainer(max_epochs=0)` has it do "
        "no more. `lsq`: learned scales (Esser et al. 2020). `lsq+`: learned scales, and learned offsets of activations (Bhalgat "
        "et al. 2020). `pact`: a learned clipping level of activations, parameters as `qat` (Choi et al. 2018). `dorefa`: "
        "parameters through tanh, one scale; activations on [0, 1] (Zhou et al. 2016). `bnn`: the sign, int1 (Courbariaux et al. "
        "2016). All but `qat` and `ptq` have one scale for an activation, and symmetric grids with a sign for parameters.",
    ),
}
_TARGETS: dict[str, Any] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/target"}}
ENTRY: dict[str, Key] = {
    **SELECTION,
    "target_names": Key(
        check=names,
        schema=_NAMES,
        values="list of strings",
        default="those of the type's setting, and those in target_settings",
        text="Which tensors of a module: `_input_` (the first argument), `_input_1`, `_input_<argument>`, `_output_`, "
        "`_output_1`, `_output_<key>` of a dict, and parameters by name (`weight`, `bias`, `p1`, `out_proj.weight`); `*` stands "
        "for any part of a parameter's name (`weight_*`). Buffers and tensors inside nested tuples are no targets.",
    ),
    "target_settings": Key(
        check=target_settings(QUANTIZATION),
        schema=_TARGETS,
        values="dict from target to keys",
        default="none",
        text="For one target, any of the quantization keys; they overrule the entry's own, key by key. What is said for "
        "`_input_` also holds for further arguments without keys of their own, and for `_output_` likewise.",
    ),
    "fuse_names": Key(
        check=_groups,
        schema={"anyOf": [{"const": "auto"}, {"type": "null"}, {"type": "array", "items": _GROUP}]},
        values="`auto`; list of lists of 2 to 5 names",
        default="auto",
        text="Groups of names, in the order of the data, that become one layer: a weighted layer (convolution, transposed or "
        "not, linear), then batch norm, then an activation; also with a batch norm before it, or an addition behind it. `auto` "
        "finds them in the recorded forward for every layer that the entry selects. A list decides for everything that the entry "
        "selects: these groups, those that entries before it named, and no other; `[]` turns fusion off.",
    ),
    "high_precision_output": Key(
        check=_switch,
        schema={"type": ["boolean", "null"]},
        values="`true`, `false`",
        default="a linear layer that no other quantized layer follows has a float output",
        text="Whether the outputs of the weighted layers that the entry selects stay float, weights and inputs quantized.",
    ),
    **QUANTIZATION,
}
WEIGHT_OF_LOSS = {"type": "number", "minimum": 0, "maximum": 1e30}
_WORD = "[A-Za-z_][A-Za-z0-9_]*"
DISTILLATION: dict[str, Key] = {
    "lambda": Key(
        check=number(0, 1e30), schema=WEIGHT_OF_LOSS, values="a number from 0", default="1.0", text="Weight of this loss."
    ),
    "link": Key(
        check=_link,
        schema={"anyOf": [{"type": "string"}, _NAMES]},
        values="`auto`, a name, a list of names",
        default="auto",
        text="The teacher's module, by name; `auto` is the one of the same name. Of a list, the nearest one in each batch.",
    ),
    "apply_method": Key(
        check=_distillation_method,
        schema={"anyOf": [_one_of(*DISTILLATION_METHODS), {"type": "string", "pattern": rf"^{_WORD}(\.{_WORD})+$"}]},
        values=", ".join(f"`{name}`" for name in DISTILLATION_METHODS) + "; a function of (student, teacher) or its path",
        default="mse",
        text="The loss. `mse`: the mean squared difference. `kl`: KL divergence of softened classes, times the square of the "
        "temperature (Hinton et al. 2015). `cosine`: 1 - the cosine between features. `attention`: the squared difference of "
        "normalised maps of where activations are great (Zagoruyko and Komodakis 2017). All are means over positions.",
    ),
    "temperature": Key(
        check=_temperature,
        schema={"type": "number", "exclusiveMinimum": 0, "maximum": 1e6},
        values="a number above 0",
        default="2.0",
        text="Of `kl`: what logits are divided by.",
    ),
    "dim": Key(
        check=number(-16, 16, whole=True),
        schema={"type": "integer", "minimum": -16, "maximum": 16},
        values="an integer",
        default="1 from four dimensions on and for layers of sequences (`Conv1d`), else the last; linear layers: the last",
        text="The dimension of classes, channels or features.",
    ),
}
DISTILLATION_ENTRY: dict[str, Key] = {
    **SELECTION,
    "target_names": ENTRY["target_names"],
    "target_settings": replace(
        ENTRY["target_settings"],
        check=target_settings(DISTILLATION),
        schema={"type": "object", "additionalProperties": {"$ref": "#/$defs/distillation_target"}},
        text="For one target, any of the distillation keys; they overrule the entry's own, key by key.",
    ),
    **DISTILLATION,
}
# What stands in lists of its own; "sparsity" is what older NNI called a ratio. A test holds the names to the rows.
_ELSEWHERE = {
    **dict.fromkeys(("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio", "sparsity"), "pruning"),
    **dict.fromkeys(("global_group_id", "dependency_group_id", "internal_metric_block", "align", "metric", "pattern"), "pruning"),
    **dict.fromkeys((key for key in DISTILLATION if key not in (*QUANTIZATION, "dim")), "distillation"),
}
