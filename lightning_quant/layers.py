# SPDX-License-Identifier: Apache-2.0
"""Owns what a plan is made of: one row for each quantized layer, and the whole; both print themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_quant.matching import TargetPlan
from lightning_quant.sites import Operator
from lightning_quant.tables import html_table, text_table


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One quantized module or operator, what is fused with it, and its quantized targets.

    `folds`: a weighted layer or batch norm, which becomes one folded layer with what is fused with it; any other module keeps
    its own forward and is quantized around it, and an operator (`operator`) where it is called. `inner`: what is decided for the
    tensor that an activation reads which no grid can do (a curve); None for ReLU and its like. `calls`: in the recorded forward;
    `order`: its place there among the layers; `loose`: dropout or identity stands between members.
    """

    name: str
    type: str
    batch_norm: str | None
    activation: str | None
    targets: Mapping[str, TargetPlan]
    notes: tuple[str, ...] = ()
    folds: bool = True
    norm_before: str | None = None
    inner: TargetPlan | None = None
    operator: bool = False
    calls: int = 0
    order: int = 0
    loose: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the modules and operators behind the head, in the order of the data."""
        return tuple(name for name in (self.batch_norm, self.activation) if name is not None)

    @property
    def fused_with(self) -> tuple[str, ...]:
        """Names of all modules and operators of the group but the head."""
        return (*(() if self.norm_before is None else (self.norm_before,)), *self.members)

    @property
    def start(self) -> str:
        """Name of the module or operator that takes the group's input."""
        return self.norm_before or self.name

    @property
    def end(self) -> str:
        """Name of the module or operator whose output is the group's."""
        return self.members[-1] if self.members else self.name

    def decisions(self) -> dict[str, str]:
        """What is decided, a text for the layer and one for each target: layers with equal texts are prepared alike."""
        found = {self.name: f"{self.type} fused with {', '.join(self.fused_with)}" if self.fused_with else f"{self.type} alone"}
        for target in (*self.targets.values(), *(() if self.inner is None else (self.inner,))):
            spec = target.spec
            words = [spec.dtype, spec.scheme, str(spec.granularity), spec.apply_method, f"observer {spec.observer}", spec.method]
            shared = [] if target.source is None else [f"shared with {target.source}"]
            found[f"{self.name}.{target.target}"] = " ".join([*words, *shared])
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `prepare_model` will do; `print(plan)` is a table of it.

    `left`: what computes in float, by name, with the reason. `operators`: what the forwards call as functions, by name.
    """

    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, Operator] = field(default_factory=dict)

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows, notes=[f"note: {note}" for note in self._remarks])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows, notes=self._remarks)

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [row for layer in self.layers for row in _rows(layer)]

    @property
    def _remarks(self) -> list[str]:
        """The notes, and what computes in float, by reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        return [*self.notes, *(f"in float, {reason}: {', '.join(names)}" for reason, names in reasons.items())]


_HEAD = ("module", "fused with", "target", "dtype", "scheme", "granularity", "decided by", "notes")


def _rows(layer: LayerPlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    names = (layer.name, ", ".join(layer.fused_with))
    targets = list(layer.targets.values())
    if layer.inner is not None:
        targets.insert(len(targets) - 1, layer.inner)
    for position, target in enumerate(targets):
        spec, notes = target.spec, list(target.notes)
        if target.source:
            notes.insert(0, f"shared with {target.source}")
        if not position:
            notes.extend(layer.notes)
        lead = names if not position else ("", "")
        rows.append((*lead, target.target, spec.dtype, spec.scheme, str(spec.granularity), target.decided_by, "; ".join(notes)))
    return rows
