# SPDX-License-Identifier: Apache-2.0
"""Owns what a pruning plan is made of: options, one row for each masked target, groups that share masks; it prints itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_quant.channels import Channels
from lightning_quant.config import ConfigError, check_fields
from lightning_quant.keys import Blocks
from lightning_quant.pruning import Wanted
from lightning_quant.schedule import Moment, Pace
from lightning_quant.tables import html_table, text_table


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What `pruning` says beside its entries.

    Args:
        config_list: the entries.
        schedule, start, stop, updates: when masks are made; see `Pace`. By default "agp", in ten updates over the first half.
        dependencies: layers whose channels meet share masks, and batch norms behind masked layers are masked with them.
        shrink: conversion removes masked channels.
        penalty: weight of the L1 norm of batch-norm scales that metric `slim` adds to the loss, until the last update.
        seed: for metric `random`.

    Raises:
        ConfigError: for an unknown option or a value that it cannot have.
    """

    config_list: Any
    schedule: str = "agp"
    start: Moment = 0
    stop: Moment = 0.5
    updates: int = 10
    dependencies: bool = True
    shrink: bool = True
    penalty: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dependencies", "shrink"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"pruning: {name}={getattr(self, name)!r} is not true or false.")
        if isinstance(self.penalty, bool) or not isinstance(self.penalty, int | float) or not self.penalty >= 0:
            raise ConfigError(f"pruning: penalty={self.penalty!r} is no number from 0; 1e-4 is usual.")
        if type(self.seed) is not int:
            raise ConfigError(f"pruning: seed={self.seed!r} is no integer.")
        try:
            _ = self.pace
        except ConfigError as error:
            raise ConfigError(f"pruning: {error}") from None

    @classmethod
    def make(cls, given: Any) -> Pruning:
        """From entries (a list, or one dict), or from a dict with the key `config_list` and options."""
        if isinstance(given, Pruning):
            return given
        if isinstance(given, Mapping) and set(given) & {"config_list", "schedule", "start", "stop", "updates", "shrink"}:
            check_fields(given, cls, "pruning")
            if "config_list" not in given:
                raise ConfigError(f"pruning: options without entries, {dict(given)!r}; add config_list: [{{...}}].")
            return cls(**given)
        return cls(config_list=given)

    @property
    def pace(self) -> Pace:
        """When masks are made."""
        return Pace(schedule=self.schedule, start=self.start, stop=self.stop, updates=self.updates)


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """What is decided for one target; the keys of an entry, with their defaults.

    `align`: (name of the target that it follows, its dims).
    """

    wanted: Wanted = field(default_factory=Wanted)
    metric: str = "l1"
    pattern: tuple[int, int] | None = None
    granularity: str | Blocks = "default"
    global_id: int | str | None = None
    dependency_id: int | str | None = None
    align: tuple[str, tuple[int, ...]] | None = None
    apply_method: str = "mul"

    @property
    def asks(self) -> bool:
        """Whether it asks for a mask by scores."""
        one = self.wanted
        return self.pattern is not None or one.ratio is not None or one.threshold is not None or bool(one.least)

    def __str__(self) -> str:
        if self.align is not None:
            return f"as {self.align[0]} along {list(self.align[1])}"
        if self.pattern is not None:
            return f"{self.pattern[0]}:{self.pattern[1]}"
        one = self.wanted
        words = [f"{one.ratio:g}"] if one.ratio is not None else []
        words += [f"below {one.threshold:g}"] if one.threshold is not None else []
        words += [f"at least {one.least:g}"] if one.least else []
        words += [f"at most {one.most:g}"] if one.most is not None else []
        words += [f"in {one.parts} parts"] if one.parts > 1 else []
        return ", ".join(words) or "nothing"


@dataclass(frozen=True, kw_only=True)
class MaskedTarget:
    """One target with a mask.

    Args:
        module, target: their names; `name` is both.
        type: of the module.
        values: the parameter whose blocks are the mask's; None for an input or output that is masked where it passes.
        shape: of that parameter, output channels first (see `masks.py` on transposed convolutions).
        kernel: its blocks.
        grid: how many blocks lie along each dimension that is not whole.
        scale: for metric `slim`, the batch norm whose scales are the scores; None where the values are scales themselves.
        follows: the mask is that of the channels it reads, of other layers.
        decided_by: the entry.
    """

    module: str
    target: str
    type: str
    spec: MaskSpec
    values: str | None
    shape: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    scale: str | None = None
    follows: bool = False
    decided_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """'conv1.weight'."""
        return f"{self.module}.{self.target}" if self.module else self.target

    @property
    def scored(self) -> bool:
        """Whether its mask comes from scores of its own."""
        return self.spec.asks and self.spec.align is None and not self.follows


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """Targets that share one mask: (target, which of its blocks each of the mask's is; None: all, in order)."""

    members: tuple[tuple[str, Tensor | None], ...]
    wanted: Wanted
    global_id: int | str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningPlan:
    """Everything that `Masks` will do; `print(plan)` is a table of it."""

    targets: tuple[MaskedTarget, ...]
    units: tuple[Unit, ...]
    options: Pruning
    channels: Channels
    prefix: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows, notes=[f"note: {note}" for note in self.notes])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows, notes=self.notes)

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        shared = {name: _others(name, unit) for unit in self.units for name, _ in unit.members if len(unit.members) > 1}
        return [_row(target, shared.get(target.name, "")) for target in self.targets]

    def decisions(self) -> dict[str, str]:
        """What is decided for each target, as text; masks of a checkpoint fit a plan with equal texts."""
        return {
            target.name: f"{target.spec} by {target.spec.metric}, blocks {list(target.kernel)} of {list(target.shape)}, "
            f"{target.spec.apply_method}"
            for target in self.targets
        }


_HEAD = ("module", "target", "masked", "metric", "blocks", "shares its mask with", "decided by", "notes")


def _others(name: str, unit: Unit) -> str:
    names = list(dict.fromkeys(other for other, _ in unit.members if other != name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _row(target: MaskedTarget, shared: str) -> tuple[str, ...]:
    spec = target.spec
    count = " x ".join(map(str, target.grid))
    masked = "what it reads" if target.follows else str(spec)
    metric = spec.metric if target.scored else ""
    notes = [*(["add"] if spec.apply_method == "add" else []), *target.notes]
    return (target.module, target.target, masked, metric, count, shared, target.decided_by, "; ".join(notes))
