# SPDX-License-Identifier: Apache-2.0
"""Owns the options of `export_model`: what each may be, and for which files; checked before training and before writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from lightning_quant.config import ConfigError, TensorSpec, raise_problems
from lightning_quant.dialects import DIALECTS
from lightning_quant.formats import PROFILES, check_format
from lightning_quant.keys import guess
from lightning_quant.layers import Plan
from lightning_quant.targets import is_activation

# What we write into an `.onnx` file's metadata ourselves.
RESERVED = ("inputs", "multiply_adds", "package", "profile", "torch", "whole")

_ALL, _PROGRAMS, _ONNX, _PT2 = (".onnx", ".pt2", ".pt"), (".onnx", ".pt2"), (".onnx",), (".pt2",)
Check = Callable[[Any], str]  # what is wrong with a value; nothing if nothing is


def _switch(value: Any) -> str:
    return "" if isinstance(value, bool) else f"expected True or False, got {value!r}"


def _number(high: float) -> Check:
    """A check for a number from 0 to `high`, numpy's included."""
    limits = "0 or more" if math.isinf(high) else f"from 0 to {high:g}"

    def check(value: Any) -> str:
        fits = not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= high
        return "" if fits else f"expected a number, {limits}, got {value!r}"

    return check


def _one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, str) and value in allowed
        return (
            "" if fits else f"expected one of {', '.join(map(repr, allowed))}, got {value!r}.{guess(value, allowed)}".rstrip(".")
        )

    return check


def _texts(value: Any) -> str:
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for item in value.items() for part in item):
        return f"expected a dict of texts, got {value!r}"
    taken = [key for key in RESERVED if key in value]
    return (
        f"{', '.join(map(repr, taken))} would take the place of what the file says of itself; give another key" if taken else ""
    )


# name -> (default, check of anything else than None where None is the default, suffixes it means something for)
_TABLE: dict[str, tuple[Any, Check, Sequence[str]]] = {
    "example_input": (None, lambda _: "", _ALL),
    "dynamic_batch": (True, _switch, _PROGRAMS),
    "dynamic_size": (False, _switch, _PROGRAMS),
    "atol": (None, _number(math.inf), _PROGRAMS),
    "min_equal": (None, _number(1.0), _PROGRAMS),
    "min_int8_share": (None, _number(1.0), _ONNX),
    "profile": ("onnxruntime", _one_of(*PROFILES), _ONNX),
    "signed": (None, _switch, _ONNX),
    "reduce_range": (False, _switch, _ALL),
    "metadata": (None, _texts, _ONNX),
    "dialect": (DIALECTS[0], _one_of(*DIALECTS), _PT2),
}
OPTIONS = tuple(_TABLE)


def check_options(suffix: str, options: Mapping[str, Any], place: str = "") -> None:
    """Raise one ConfigError for all that is wrong with options of `export_model` for a file of this suffix.

    `place` stands before each message.

    Raises:
        ConfigError: an unknown option, a value that is none of its own, or one that means nothing for this suffix.
    """
    problems: list[str] = []
    others: dict[str, list[str]] = {}
    lead = f"{place}: " if place else ""
    for name, value in options.items():
        if name not in _TABLE:
            problems.append(f"{lead}unknown option {name!r}; allowed: {', '.join(_TABLE)}.{guess(name, _TABLE)}")
            continue
        default, check, suffixes = _TABLE[name]
        if value is None and default is None:
            continue
        if wrong := check(value):
            problems.append(f"{lead}{name}: {wrong}.")
        elif suffix not in suffixes and value != default:
            others.setdefault(" and ".join(suffixes), []).append(name)
    problems += [f"{lead}{', '.join(names)}: for {known} files alone, not for {suffix}." for known, names in others.items()]
    raise_problems(problems)


def export_options(export: Any) -> dict[str, dict[str, Any]]:
    """Options of `export_model` by suffix, from what the callback's `export` may be.

    Raises:
        ConfigError: for anything else, an unknown suffix, an unknown option or a value that it cannot have.
    """
    if export is None:
        return {}
    if isinstance(export, str):
        export = [export]
    if not isinstance(export, Mapping | Sequence):
        raise ConfigError(f"export: expected None, a suffix, a list of suffixes or a dict suffix -> options, got {export!r}.")
    wrong = isinstance(export, Mapping) and any(not isinstance(given, Mapping | None) for given in export.values())
    if wrong:
        raise ConfigError(f"export: expected a dict of options for each suffix, got {export!r}.")
    options = {s: dict(given or {}) for s, given in export.items()} if isinstance(export, Mapping) else {s: {} for s in export}
    for suffix, given in options.items():
        check_format(suffix, "export")
        check_options(suffix, given, f"export[{suffix!r}]")
    return options


def _one_scale(spec: TensorSpec) -> bool:
    return spec.granularity in ("default", "per_tensor")


def check_plan(plan: Plan, export: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a ConfigError if a file is asked for that no model of this plan can become, before it is trained."""
    if export.get(".onnx", {}).get("profile") != "tensorrt":
        return
    if export[".onnx"].get("signed") is False:
        raise ConfigError("export['.onnx']: profile='tensorrt' needs signed activations; leave signed out.")
    shifted = [
        f"{layer.name}.{target.target}"
        for layer in plan.layers
        for target in (*layer.targets.values(), *(() if layer.inner is None else (layer.inner,)))
        if is_activation(target.target) and target.active and target.spec.scheme != "symmetric" and _one_scale(target.spec)
    ]
    if shifted:
        more = f" and {len(shifted) - 5} more" if len(shifted) > 5 else ""
        raise ConfigError(
            "export['.onnx']: profile='tensorrt': TensorRT knows signed activations with the zero point 0 alone; those of "
            f"{', '.join(map(repr, shifted[:5]))}{more} are others. Give quant_dtype 'int8' and quant_scheme 'symmetric' for "
            "_input_ and _output_."
        )
