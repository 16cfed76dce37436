# SPDX-License-Identifier: Apache-2.0
"""Owns what a `config_list` says: entries and presets become frozen `Rule`s here, checked as far as that needs no model.

What a rule means for a given module (precedence, defaults, targets that exist) is decided in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_quant.keys import (
    DISTILLATION,
    DISTILLATION_ENTRY,
    DISTILLATION_METHODS,
    ENTRY,
    QUANTIZATION,
    SELECTION,
    WEIGHT_OBSERVERS,
    Blocks,
    Key,
    Problems,
    check_keys,
    closest,
    guess,
    is_list,
    number,
    unknown_key,
)
from lightning_quant.pruning_keys import PRUNING, PRUNING_ENTRY


class ConfigError(MisconfigurationException):
    """What a user asked for cannot be done: says where, what was found, what is allowed and what to do.

    Several problems of one stage are reported together, one a line.
    """


def check_fields(given: Mapping[str, Any], cls: type, place: str) -> None:
    """Raise a ConfigError for a key of `given` that is no field of the dataclass `cls`."""
    known = [one.name for one in fields(cls)]
    for key in given:
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key!r}; allowed: {', '.join(known)}.{guess(str(key), known)}")


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` that carries every problem, or return when there is none."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What is decided for one target: the integer grid, how many scales share a tensor, how range and gradient are found.

    `qmin`, `qmax`: the ends of the grid, both included. See the equation in `quantizers.py`.
    """

    dtype: str
    scheme: str
    granularity: str | Blocks
    qmin: int
    qmax: int
    apply_method: str = "qat_clamp_round"
    observer: str = "default"
    method: str = "qat"

    @classmethod
    def make(cls, dtype: str, scheme: str, granularity: str | Blocks, *, weight: bool, **rest: str) -> TensorSpec:
        """The spec of `dtype` ('int8', 'uint4'); a signed affine *activation* owns the extra level -2^(N-1).

        A runtime saturates int8 at -128, so an activation grid that stopped at -127 could not ship; weights stop at
        -2^(N-1)+1, symmetric about zero, so that a negative batch-norm scale folds into the integers by negation.
        """
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        if bits == 1:
            qmin, qmax = -1, 1
        elif dtype.startswith("u"):
            qmin, qmax = 0, 2**bits - 1
        else:
            qmax = 2 ** (bits - 1) - 1
            qmin = -qmax if weight or scheme == "symmetric" else -qmax - 1
        return cls(dtype=dtype, scheme=scheme, granularity=granularity, qmin=qmin, qmax=qmax, **rest)

    @property
    def bits(self) -> int:
        """The number N of bits."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def offset(self) -> int:
        """What is taken from a value of an unsigned grid to store it signed: 2^(N-1), or 0 for a signed grid."""
        return 2 ** (self.bits - 1) if self.qmin == 0 else 0

    @property
    def grid(self) -> tuple[str, str, str | Blocks, str]:
        """What two targets must have in common to share a quantizer."""
        return self.dtype, self.scheme, self.granularity, self.method

    def kernel(self, dims: int) -> tuple[int, ...]:
        """The block size along each of `dims` dimensions, -1 for a whole one; longer than `dims` if it cannot fit."""
        if isinstance(self.granularity, Blocks):
            return self.granularity.kernel(dims)
        lead = {"out_channel": (1,), "in_channel": (-1, 1), "per_channel": (-1, 1)}.get(self.granularity, ())
        return lead + (-1,) * (dims - len(lead))

    def __str__(self) -> str:
        return f"{self.dtype} {self.scheme} {self.granularity}"


def observer_problem(observer: str, scheme: str, granularity: str | Blocks, activation: bool) -> str | None:
    """Why a target on this grid cannot have an observer, or None."""
    if not activation and observer not in WEIGHT_OBSERVERS:
        return (
            f"{observer} is for activations; a parameter's range is that of its values now (default), or the share of it that "
            "rounds best (mse)."
        )
    if not activation and observer == "mse" and scheme != "symmetric":
        return f"mse needs a symmetric grid for a parameter, and this one is {scheme}; write quant_scheme: symmetric, or default."
    if activation and observer not in ("default", "moving_average", "minmax") and granularity != "per_tensor":
        return (
            f"{observer} keeps one histogram a tensor, and granularity {granularity} asks for several scales; write granularity: "
            "per_tensor, or take moving_average or minmax."
        )
    return None


def method_problem(spec: TensorSpec, activation: bool) -> str | None:
    """Why a target cannot be trained by its method as it is otherwise decided; None if it can."""
    if spec.method == "bnn" and spec.dtype != "int1":
        return f"its values are -1 and 1, quant_dtype 'int1', not {spec.dtype!r}; leave quant_dtype out."
    if spec.dtype == "int1" and spec.method != "bnn":
        return "int1 has one bit, which only method 'bnn' trains."
    if spec.method in ("qat", "ptq") or (spec.method == "pact" and not activation):
        return None
    if spec.observer != "default":
        return f"nothing is observed, so observer {spec.observer!r} is in vain; leave it out."
    if activation:
        return _activation_problem(spec)
    if spec.scheme != "symmetric" or spec.qmin == 0:
        return f"a parameter has a grid without a zero point, quant_scheme 'symmetric' and an int quant_dtype, not {spec}."
    if spec.method in ("dorefa", "bnn") and spec.granularity != "per_tensor":
        return f"a parameter has one scale, granularity 'default' or 'per_tensor', not {spec.granularity}."
    return None


def _activation_problem(spec: TensorSpec) -> str | None:
    if spec.granularity != "per_tensor":
        return f"an activation has one scale, granularity 'per_tensor', not {spec.granularity}."
    if spec.method == "dorefa" and spec.scheme != "affine":
        return "an activation is cut to [0, 1], quant_scheme 'affine', not 'symmetric', which has levels below 0."
    return None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of a `config_list`, checked; `settings` holds the shorthand keys that the user gave, nothing else.

    `fuse`: groups of names, "auto", or None where the entry says nothing. `float_output`: `high_precision_output`. `preset`: the
    entry is part of a preset, which may name types that a model lacks.
    """

    where: str
    op_names: tuple[str, ...] = ()
    op_names_re: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()
    exclude_op_names: tuple[str, ...] = ()
    exclude_op_names_re: tuple[str, ...] = ()
    exclude_op_types: tuple[str, ...] = ()
    target_names: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    target_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fuse: tuple[tuple[str, ...], ...] | str | None = None
    float_output: bool | None = None
    preset: bool = False


# -- presets ----------------------------------------------------------------------------------------------------------

_RELATED = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "AvgPool1d", "AvgPool2d", "AvgPool3d"]
_RELATED += ["AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"]
_OPERATORS = ["add", "mul", "matmul", "bmm", "cat", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d"]
_OPERATORS += ["adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"]
_WEIGHTED = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear", "Bilinear"]
_TABLES = ["Embedding", "EmbeddingBag"]
_SEQUENCES = ["MultiheadAttention", "LSTM", "GRU", "RNN"]
PRESETS: dict[str, list[dict[str, Any]]] = {
    # Weights int8 per channel, activations uint8, groups found by themselves; what stands between layers, where runtimes have it.
    "int8": [{"op_types": [*_WEIGHTED, *_TABLES, *_SEQUENCES, *_RELATED, *_OPERATORS], "fuse_names": "auto"}],
    # A quarter of the bytes, float arithmetic: for models that memory holds up.
    "int8-weight-only": [{"op_types": [*_WEIGHTED, *_TABLES, *_SEQUENCES], "target_names": ["*weight*"], "fuse_names": "auto"}],
    # Weights on 15 levels, activations as in int8.
    "w4a8": [
        {
            "op_types": [*_WEIGHTED, *_TABLES, *_SEQUENCES, *_RELATED, *_OPERATORS],
            "target_settings": {"*weight*": {"quant_dtype": "int4"}},
            "fuse_names": "auto",
        }
    ],
}


# -- parsing ----------------------------------------------------------------------------------------------------------


_SELECTING = ("op_names", "op_names_re", "op_types")


def _rule(
    entry: Any,
    where: str,
    problems: Problems,
    *,
    preset: bool = False,
    rows: Mapping[str, Key] = ENTRY,
    keys: Mapping[str, Key] = QUANTIZATION,
    selecting: bool = True,
) -> Rule | None:
    """One entry of a list whose entries have the keys `rows`, of which `keys` are what it says of tensors.

    `selecting`: it must select something.
    """
    if not isinstance(entry, Mapping):
        problems.append(f"{where}: expected a dict, got {entry!r}.")
        return None
    problems.extend(unknown_key(key, rows, where) for key in entry if key not in rows)
    misspelt = any(name in _SELECTING for key in entry if key not in rows for name in closest(str(key), rows, 1))
    if selecting and not misspelt and not any(key in entry for key in _SELECTING):
        problems.append(
            f"{where}: selects nothing; give op_names (module names), op_names_re (regular expressions) or op_types (classes)."
        )
    read = {
        key: rows[key].check(entry[key], f"{where}[{key!r}]", problems)
        for key in (*SELECTION, "target_names", "target_settings", "fuse_names", "high_precision_output")
        if key in entry and key in rows
    }
    fuse, float_output = read.pop("fuse_names", None), read.pop("high_precision_output", None)
    settings = {key: entry[key] for key in keys if key in entry}
    return Rule(
        where=where,
        settings=check_keys(settings, keys, where, problems),
        fuse=fuse,
        float_output=float_output,
        preset=preset,
        **read,
    )


def _entries(config_list: Any) -> Sequence[Any]:
    """The entries of whatever a config_list may be: a list, one entry, a preset's name, or a dict that holds the list."""
    if isinstance(config_list, Mapping) and set(config_list) == {"config_list"}:
        config_list = config_list["config_list"]
    if isinstance(config_list, str | Mapping) and config_list:
        return [config_list]
    if not is_list(config_list) or not config_list:
        raise ConfigError(
            f"config_list: expected a non-empty list of dicts, one dict or a preset ({', '.join(PRESETS)}), got {config_list!r}; "
            "the shortest useful ones are 'int8' and [{'op_types': ['Linear']}]."
        )
    entries: Sequence[Any] = config_list
    return entries


def parse_rules(config_list: Any) -> tuple[Rule, ...]:
    """Check a `config_list` as far as that needs no model and return its rules, in order.

    Args:
        config_list: a list of entries, each a dict of the keys in `keys.py` or the name of a preset ("int8",
            "int8-weight-only", "w4a8"), which stands for its entries; one entry serves as a list of one.

    Raises:
        ConfigError: with every problem found, each with its path inside the list.
    """
    problems: Problems = []
    rules: list[Rule | None] = []
    for index, entry in enumerate(_entries(config_list)):
        where = f"config_list[{index}]"
        if isinstance(entry, str):
            if entry in PRESETS:
                rules += [_rule(part, f"{where} ({entry!r})", problems, preset=True) for part in PRESETS[entry]]
            else:
                problems.append(f"{where}: {entry!r} is no preset; known: {', '.join(PRESETS)}.{guess(entry, PRESETS)}")
        else:
            rules.append(_rule(entry, where, problems))
    raise_problems(problems)
    return tuple(rule for rule in rules if rule is not None)


# -- other lists than config_list -------------------------------------------------------------------------------------


def parse_pruning(entries: Any) -> tuple[Rule, ...]:
    """Check the entries of a `pruning` list as far as that needs no model: a list of dicts, or one dict.

    Raises:
        ConfigError: with every problem found, each with its path inside the list.
    """
    if isinstance(entries, Mapping) and entries:
        entries = [entries]
    if not is_list(entries) or not entries:
        raise ConfigError(
            f"pruning: expected a non-empty list of dicts, one dict, or a dict with config_list and options, got {entries!r}; "
            f"the "
            "shortest useful one is [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}]."
        )
    problems: Problems = []
    rules: list[Rule | None] = []
    for index, entry in enumerate(entries):
        where = f"pruning[{index}]"
        rules.append(rule := _rule(entry, where, problems, rows=PRUNING_ENTRY, keys=PRUNING))
        if rule is not None:
            said = {where: rule.settings} | {f"{where}['target_settings'][{t!r}]": s for t, s in rule.target_settings.items()}
            problems.extend(problem for place, keys in said.items() for problem in contradictions(keys, place))
    raise_problems(problems)
    return tuple(rule for rule in rules if rule is not None)


def contradictions(keys: Mapping[str, Any], where: str) -> Problems:
    """What cannot be said of one target at once, in one place; a key that is None says nothing."""
    given = {key for key in keys if keys[key] is not None}
    problems: Problems = []
    if {"sparse_ratio", "sparse_threshold"} <= given:
        problems.append(f"{where}: sparse_ratio and sparse_threshold exclude each other; give one.")
    scored = given & {"sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio", "global_group_id", "metric"}
    for key in ("align", "pattern"):
        others = scored - ({"metric"} if key == "pattern" else set())
        if key in given and others:
            found = ", ".join(sorted(others))
            problems.append(f"{where}: {key} decides the mask, so {found} would say nothing; leave one of them out.")
    if "pattern" in given and (others := given & {"align", "granularity", "dependency_group_id", "internal_metric_block"}):
        problems.append(f"{where}: pattern decides the blocks, so {', '.join(sorted(others))} would say nothing; leave it out.")
    low, high = keys.get("min_sparse_ratio"), keys.get("max_sparse_ratio")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        problems.append(f"{where}: min_sparse_ratio {low:g} is greater than max_sparse_ratio {high:g}; exchange them.")
    return problems


@dataclass(frozen=True, kw_only=True)
class DistillationRules:
    """What `distillation` says, checked as far as that needs no model. `own`: the weight of the loss of the user's own step."""

    rules: tuple[Rule, ...]
    own: float = 1.0


def parse_distillation(given: Any) -> DistillationRules:
    """Check what `distillation` says and return it.

    Args:
        given: a list of entries, each a dict of selection, targets and the keys of DISTILLATION in `keys.py`; an entry that
            selects nothing means the model's own output. One entry serves as a list of one, the name of a loss as an entry that
            says no more ("kl"), and a dict of `config_list` and `origin_loss_lambda` weighs the loss of the step itself, too.

    Raises:
        ConfigError: with every problem found, each with its path inside the list.
    """
    problems: Problems = []
    own: Any = 1.0
    if isinstance(given, Mapping) and "config_list" in given:
        allowed = ("config_list", "origin_loss_lambda")
        problems.extend(unknown_key(key, allowed, "distillation") for key in given if key not in allowed)
        own = number(0, 1e30)(given.get("origin_loss_lambda", 1.0), "distillation['origin_loss_lambda']", problems)
        given = given["config_list"]
    entries: Any = [given] if isinstance(given, str | Mapping) else given
    if not is_list(entries) or not entries:
        raise ConfigError(
            f"distillation: expected a non-empty list of dicts, one dict or a loss ({', '.join(DISTILLATION_METHODS)}), got "
            f"{given!r}; the shortest useful ones are 'kl' and [{{'op_types': ['Conv2d']}}]."
        )
    rules: list[Rule | None] = []
    for index, entry in enumerate(entries):
        where = f"distillation[{index}]"
        if isinstance(entry, str):
            DISTILLATION["apply_method"].check(entry, where, problems)
            rules.append(Rule(where=where, settings={"apply_method": entry}))
        else:
            rules.append(rule := _rule(entry, where, problems, rows=DISTILLATION_ENTRY, keys=DISTILLATION, selecting=False))
            if rule is not None and not selects(rule) and any(getattr(rule, f"exclude_{key}") for key in _SELECTING):
                problems.append(f"{where}: there are only exclude keys; give op_names, op_names_re or op_types, too.")
    raise_problems(problems)
    return DistillationRules(rules=tuple(rule for rule in rules if rule is not None), own=float(own))


def selects(rule: Rule) -> bool:
    """Whether a rule names modules; in `distillation` one that does not means the model's own output."""
    return any(getattr(rule, key) for key in _SELECTING)


__all__ = [
    "PRESETS",
    "ConfigError",
    "DistillationRules",
    "Rule",
    "TensorSpec",
    "closest",
    "parse_distillation",
    "parse_pruning",
    "parse_rules",
    "raise_problems",
]
