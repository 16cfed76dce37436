# SPDX-License-Identifier: Apache-2.0
"""Owns the words of a `config_list`: every key, its type and its limits; dicts become frozen `Rule`s here, without a model.

What a rule means for a given module (precedence, defaults, targets that exist) is decided in `plan.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

Scheme = Literal["affine", "symmetric"]
Granularity = Literal["per_tensor", "out_channel"]

DTYPES = ("int8", "uint8")
SCHEMES = ("affine", "symmetric")
GRANULARITIES = ("default", "out_channel", "per_tensor")
INPUT, WEIGHT, OUTPUT = "_input_", "weight", "_output_"


class ConfigError(MisconfigurationException):
    """What a user asked for cannot be done: says where, what was found, what is allowed and what to do.

    Several problems of one stage are reported together, one a line.
    """


def closest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` nearest to `word`, best first; for "did you mean" texts."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` that carries every problem, or return when there is none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What is decided for one target: the integer grid and how many scales share a tensor.

    `qmin`, `qmax`: the ends of the grid, both included. See the equation in `quantizers.py`.
    """

    dtype: str
    scheme: Scheme
    granularity: Granularity
    qmin: int
    qmax: int

    @classmethod
    def make(cls, dtype: str, scheme: Scheme, granularity: Granularity, *, weight: bool) -> TensorSpec:
        """The spec of `dtype` ('int8', 'uint8'); a signed affine *activation* owns the extra level -2^(N-1).

        A runtime saturates int8 at -128, so an activation grid that stopped at -127 could not ship; weights stop at
        -2^(N-1)+1, symmetric about zero, so that a negative batch-norm scale folds into the integers by negation.
        """
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        if dtype.startswith("u"):
            qmin, qmax = 0, 2**bits - 1
        else:
            qmax = 2 ** (bits - 1) - 1
            qmin = -qmax if weight or scheme == "symmetric" else -qmax - 1
        return cls(dtype=dtype, scheme=scheme, granularity=granularity, qmin=qmin, qmax=qmax)

    def __str__(self) -> str:
        return f"{self.dtype} {self.scheme} {self.granularity}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of a `config_list`, checked; `settings` holds the shorthand keys that the user gave, nothing else."""

    index: int
    op_names: tuple[str, ...]
    op_types: tuple[str, ...]
    target_names: tuple[str, ...] | None
    settings: Mapping[str, str]
    target_settings: Mapping[str, Mapping[str, str]]
    fuse_names: tuple[tuple[str, ...], ...]

    @property
    def where(self) -> str:
        """The place of this rule in error texts and in the plan."""
        return f"config_list[{self.index}]"


# -- the keys: one row each -----------------------------------------------------------------------------------------

Problems = list[str]


def _sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _names(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    if not _sequence(value) or not all(isinstance(name, str) for name in value):
        example = value if isinstance(value, str) else "conv1"
        problems.append(f"{where}: expected a list of strings, got {value!r}; write [{example!r}] for one name.")
        return ()
    if not value:
        problems.append(f"{where}: the list is empty; name at least one, or leave the key out.")
    return tuple(dict.fromkeys(value))


_SYNONYMS = {"asymmetric": "affine", "per_channel": "out_channel"}


def _choice(allowed: Sequence[str]) -> Callable[[Any, str, Problems], str]:
    def check(value: Any, where: str, problems: Problems) -> str:
        if not isinstance(value, str) or value not in allowed:
            hint = closest(_SYNONYMS.get(value, value), allowed, 1) if isinstance(value, str) else []
            guess = f" Did you mean {hint[0]!r}?" if hint else ""
            problems.append(f"{where}: {value!r} is not one of {', '.join(allowed)}.{guess}")
        return str(value)

    return check


def _groups(value: Any, where: str, problems: Problems) -> tuple[tuple[str, ...], ...]:
    if not _sequence(value):
        problems.append(f"{where}: expected a list of groups such as [('conv1', 'bn1')], got {value!r}.")
        return ()
    if len(value) > 1 and all(isinstance(name, str) for name in value):
        problems.append(f"{where}: expected a list of groups, got one group; write [{tuple(value)!r}].")
        return ()
    groups: list[tuple[str, ...]] = []
    for position, group in enumerate(value):
        place = f"{where}[{position}]"
        if not _sequence(group) or not all(isinstance(name, str) for name in group):
            problems.append(f"{place}: expected a tuple or list of module names, got {group!r}.")
        elif not 2 <= len(group) <= 3:
            problems.append(f"{place}: a group has 2 or 3 names, got {len(group)}: {tuple(group)!r}.")
        elif len(set(group)) < len(group):
            problems.append(f"{place}: a name stands twice in {tuple(group)!r}; a module can be fused once.")
        else:
            groups.append(tuple(group))
    return tuple(groups)


SETTING_KEYS: dict[str, Callable[[Any, str, Problems], str]] = {
    "quant_dtype": _choice(DTYPES),
    "quant_scheme": _choice(SCHEMES),
    "granularity": _choice(GRANULARITIES),
}
ENTRY_KEYS = ("op_names", "op_types", "target_names", "target_settings", "fuse_names", *SETTING_KEYS)


def _unknown(key: Any, allowed: Sequence[str], where: str) -> str:
    hint = closest(str(key), allowed, 1)
    guess = f" Did you mean {hint[0]!r}?" if hint else ""
    return f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(allowed))}.{guess}"


def _settings(value: Mapping[Any, Any], where: str, problems: Problems) -> dict[str, str]:
    return {key: SETTING_KEYS[key](value[key], f"{where}[{key!r}]", problems) for key in SETTING_KEYS if key in value}


def _target_settings(value: Any, where: str, problems: Problems) -> dict[str, Mapping[str, str]]:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a dict from target to settings, got {value!r}.")
        return {}
    targets: dict[str, Mapping[str, str]] = {}
    for target, settings in value.items():
        place = f"{where}[{target!r}]"
        if not isinstance(settings, Mapping):
            problems.append(f"{place}: expected a dict of settings, got {settings!r}.")
            continue
        problems.extend(_unknown(key, list(SETTING_KEYS), place) for key in settings if key not in SETTING_KEYS)
        targets[str(target)] = _settings(settings, place, problems)
    return targets


def _rule(entry: Any, index: int, problems: Problems) -> Rule | None:
    where = f"config_list[{index}]"
    if not isinstance(entry, Mapping):
        problems.append(f"{where}: expected a dict, got {entry!r}.")
        return None
    problems.extend(_unknown(key, ENTRY_KEYS, where) for key in entry if key not in ENTRY_KEYS)
    if not ("op_names" in entry or "op_types" in entry):
        problems.append(f"{where}: selects nothing; give op_names (module names) or op_types (class names).")

    def read(key: str, parse: Callable[[Any, str, Problems], Any], absent: Any) -> Any:
        return parse(entry[key], f"{where}[{key!r}]", problems) if key in entry else absent

    return Rule(
        index=index,
        op_names=read("op_names", _names, ()),
        op_types=read("op_types", _names, ()),
        target_names=read("target_names", _names, None),
        settings=_settings(entry, where, problems),
        target_settings=read("target_settings", _target_settings, {}),
        fuse_names=read("fuse_names", _groups, ()),
    )


def parse_rules(config_list: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Check a `config_list` as far as that needs no model and return its rules, in order.

    Args:
        config_list: a list of dicts with the keys `op_names`, `op_types`, `target_names`, `quant_dtype` (int8, uint8),
            `quant_scheme` (affine, symmetric), `granularity` (default, out_channel, per_tensor), `fuse_names`
            (groups of 2 or 3 names) and `target_settings` (target -> the three quantization keys).

    Raises:
        ConfigError: with every problem found, each with its path inside the list.
    """
    if not _sequence(config_list) or not config_list:
        raise ConfigError(
            f"config_list: expected a non-empty list of dicts, got {config_list!r}; "
            + (
                "put it in a list: [{...}]."
                if isinstance(config_list, Mapping)
                else "the shortest useful one is [{'op_types': ['Linear']}]."
            )
        )
    problems: Problems = []
    rules = [_rule(entry, index, problems) for index, entry in enumerate(config_list)]
    raise_problems(problems)
    return tuple(rule for rule in rules if rule is not None)
