# SPDX-License-Identifier: Apache-2.0
"""Owns which channels of a masked model can be cut out without changing what it computes, and why the others stay.

A channel goes if what makes it is masked, if every layer that reads it would miss nothing but a constant, which goes into that
layer's bias, and if all tensors stay rectangular. No model is changed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_quant.units import IN, OUT, Conv, Dim, Flow, Reading, by_group


@dataclass(kw_only=True)
class Cuts:
    """What to cut out of a model, by the names of its parameters and buffers.

    `gone`: bool over a dimension's indices, True where it goes; `convs`: how convolutions read their weights; `biases`: what is
    added to a layer before: name of its weight -> (name of its bias, "" if it has none yet; float64 (O,)); `kept`: why units that
    could have gone stay, by slice (name, dimension, index); `shapes`: of parameters and buffers before; `ranges`: what goes of
    the ranges of a prepared model, (dimension, bool over its indices) by quantizer; `heads`: of
    attention, bool over its heads, by its name; `norms`: how many channels are left to norms without numbers of their own.
    """

    gone: dict[tuple[str, Dim], Tensor] = field(default_factory=dict)
    convs: dict[str, Conv] = field(default_factory=dict)
    biases: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    kept: dict[tuple[str, Dim, int], str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """`values`, which lie as the parameter or buffer `name` does, without what goes."""
        if name in self.convs:
            return _cut_convolution(values, self.convs[name], self.gone.get((name, OUT)), self.gone.get((name, IN)))
        for (own, dim), gone in self.gone.items():
            if own == name and isinstance(dim, int):
                values = values.index_select(dim, (~gone).nonzero().flatten().to(values.device))
        return values

    def names(self) -> set[str]:
        """The parameters and buffers that get smaller."""
        return {name for (name, _), gone in self.gone.items() if bool(gone.any())}

    def units(self, flow: Flow) -> Tensor:
        """Which units go, bool."""
        going = torch.zeros(len(flow.units), dtype=torch.bool)
        for (name, dim), gone in self.gone.items():
            if (slices := flow.slices(name, dim)) is not None:
                going[slices[gone]] = True
        going[0] = False
        return going

    def groups(self, name: str) -> int:
        """How many groups a convolution has left."""
        return len(_kept_groups(self.convs[name], self.gone.get((name, OUT)), self.gone.get((name, IN))))


def _sides(conv: Conv, outputs: Tensor | None, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """What stays, bool (groups, outputs of a group), (groups, inputs of a group)."""
    sides = [
        torch.ones(size, dtype=torch.bool) if gone is None else ~gone
        for gone, size in ((outputs, conv.outputs), (inputs, conv.inputs))
    ]
    return sides[0].view(conv.groups, -1), sides[1].view(conv.groups, -1)


def _kept_groups(conv: Conv, outputs: Tensor | None, inputs: Tensor | None) -> list[int]:
    made, read = _sides(conv, outputs, inputs)
    return [group for group in range(conv.groups) if bool(made[group].any()) and bool(read[group].any())]


def _cut_convolution(values: Tensor, conv: Conv, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    made, read = (side.to(values.device) for side in _sides(conv, outputs, inputs))
    parts = by_group(values, conv)
    kept = [parts[group][made[group]][:, read[group]] for group in _kept_groups(conv, outputs, inputs)]
    return torch.cat([one.transpose(0, 1) for one in kept] if conv.transposed else kept).contiguous()


def masked_slices(flow: Flow, masks: Mapping[str, Tensor]) -> dict[tuple[str, Dim], Tensor]:
    """Which slices of parameters are masked altogether: bool over each dimension's indices. `masks`: True is what stays."""
    found: dict[tuple[str, Dim], Tensor] = {}
    for name, mask in masks.items():
        stays = mask.detach().cpu().bool().expand(flow.shapes[name])
        if name in flow.convs:
            parts = by_group(stays, flow.convs[name]).flatten(3).any(-1)
            found[name, OUT], found[name, IN] = ~parts.any(2).flatten(), ~parts.any(1).flatten()
            continue
        for dim in range(stays.dim()):
            found[name, dim] = ~stays.movedim(dim, 0).flatten(1).any(1) if stays.dim() > 1 else ~stays
    return {key: gone for key, gone in found.items() if bool(gone.any())}


def find_cuts(
    flow: Flow, masked: Mapping[tuple[str, Dim], Tensor], without_bias: Mapping[str, bool], tried: set[int] | None = None
) -> Cuts:
    """What of the masked slices can go, each with all that vanishes with it.

    Args:
        flow: of the masked model.
        masked: as `masked_slices` has it.
        without_bias: by name of a weight whose layer has no bias, whether the layer can be given one.
        tried: if given, only these units may go.
    """
    return _Choice(flow, masked, without_bias, tried).made()


class _Choice:
    """Units that are to go, fewer and fewer."""

    def __init__(
        self, flow: Flow, masked: Mapping[tuple[str, Dim], Tensor], without_bias: Mapping[str, bool], tried: set[int] | None
    ) -> None:
        self.flow, self.masked, self.without_bias = flow, masked, without_bias
        wanted = units_of(flow, masked)
        self.why: dict[int, str] = {}
        self.going = torch.zeros(len(flow.units), dtype=torch.bool)
        self.going[torch.tensor(sorted(wanted if tried is None else wanted & tried), dtype=torch.int64)] = True
        self.going[0] = False

    def keep(self, units: Iterable[int], why: str) -> bool:
        """Have units stay; whether that changes anything."""
        news = [unit for unit in units if bool(self.going[unit])]
        for unit in news:
            self.going[unit] = False
            self.why[unit] = why
        return bool(news)

    def goes(self, units: Tensor) -> Tensor:
        return self.going[self.flow.units.roots(units)]

    def made(self) -> Cuts:
        flow = self.flow
        for unit, why in flow.units.why.items():
            self.keep([flow.units.find(unit)], why)
        for reading in flow.readings:
            roots = flow.units.roots(reading.units).tolist()
            for channel, why in reading.kept.items():
                self.keep([roots[channel]], why)
        while self._rectangular() | self._balanced() | self._with_bias() | self._not_empty():
            pass
        cuts = Cuts(convs=dict(flow.convs), shapes=dict(flow.shapes))
        for name, dim in flow.units.blocks:
            slices = flow.slices(name, dim)
            assert slices is not None
            if bool((gone := self.going[slices]).any()):
                cuts.gone[name, dim] = gone
        for (name, dim), wanted in self.masked.items():
            slices = flow.slices(name, dim)
            for index in wanted.nonzero().flatten().tolist():
                if slices is None:
                    cuts.kept[name, dim, index] = "the forward does not use it as a channel"
                elif not bool(self.going[slices[index]]):
                    unit, together = int(slices[index]), int((slices == slices[index]).sum())
                    why = self.why.get(unit) or flow.units.why.get(unit, "")
                    cuts.kept[name, dim, index] = f"{why} ({together} of them go only together)" if together > 1 and unit else why
        for weight, (bias, added, _) in self._biases().items():
            if bool(added.any()):
                cuts.biases[weight] = bias, added
        return cuts

    def _rectangular(self) -> bool:
        """What is cut of a tensor must be whole slices of it, and leave something."""
        changed = False
        for units, where in self.flow.tensors.values():
            gone = self.goes(units)
            if not bool(gone.any()):
                continue
            covered = torch.zeros_like(gone)
            for dim, size in enumerate(gone.shape):
                if size > 1:
                    others = [other for other in range(gone.dim()) if other != dim]
                    covered |= gone.all(others, keepdim=True) if others else gone
            left = gone if bool(gone.all()) else gone & ~covered
            roots = torch.unique(self.flow.units.roots(units)[left]).tolist()
            changed |= self.keep(roots, f"{where} arranges channels in a way that leaves holes where it goes")
        return changed

    def _balanced(self) -> bool:
        """Groups of a convolution that stay must stay alike."""
        changed = False
        for name, conv in self.flow.convs.items():
            made, read = self.flow.slices(name, OUT), self.flow.slices(name, IN)
            if conv.groups == 1 or made is None or read is None:
                continue
            sides = [units.view(conv.groups, -1) for units in (made, read)]
            counts = [(~self.going[units]).sum(1) for units in sides]
            staying = (counts[0] > 0) | (counts[1] > 0)
            for units, count in zip(sides, counts, strict=True):
                most = max(1, int(count[staying].max())) if bool(staying.any()) else 0
                for group in staying.nonzero().flatten().tolist():
                    gone = [unit for unit in units[group].tolist() if bool(self.going[unit])]
                    missing = most - int(count[group])
                    why = f"the groups of {name.removesuffix('.weight')} must keep equally many channels"
                    changed |= missing > 0 and self.keep(gone[:missing], why)
        return changed

    def _biases(self) -> dict[str, tuple[str, Tensor, list[Reading]]]:
        """By name of a weight: (its bias, what is added to it, by whom); NaN where two calls of a layer add unlike constants."""
        found: dict[str, tuple[str, Tensor, list[Reading]]] = {}
        for reading in self.flow.readings:
            if reading.bias is None:  # nothing is added
                continue
            going = self.goes(reading.units)
            added = reading.columns[:, going] @ reading.values[going]
            if reading.weight in found:
                bias, other, readings = found[reading.weight]
                added = torch.where((added - other).abs() <= 1e-9 * (1 + other.abs()), other, torch.nan)
                found[reading.weight] = bias, added, [*readings, reading]
            else:
                found[reading.weight] = reading.bias, added, [reading]
        return found

    def _with_bias(self) -> bool:
        """A layer must be able to take the constants."""
        changed = False
        for weight, (bias, added, readings) in self._biases().items():
            if bool(added.isnan().any()):
                why = f"{readings[0].where} is called several times and would need another bias each time"
            elif bool(added.any()) and not bias and not self.without_bias.get(weight, False):
                why = f"{readings[0].where} reads it, a constant, and cannot be given a bias"
            else:
                continue
            for reading in readings:
                changed |= self.keep(self.flow.units.roots(reading.units)[reading.values != 0].tolist(), why)
        return changed

    def _not_empty(self) -> bool:
        """Every layer keeps a channel."""
        changed = False
        for name, dim in self.flow.units.blocks:
            slices = self.flow.slices(name, dim)
            if slices is not None and bool(self.going[slices].all()):
                changed |= self.keep([int(slices[0])], f"all channels of {name} are masked; one stays")
        return changed


def units_of(flow: Flow, masked: Mapping[tuple[str, Dim], Tensor]) -> set[int]:
    """The units of masked slices."""
    found: set[int] = set()
    for (name, dim), wanted in masked.items():
        slices = flow.slices(name, dim)
        found |= set() if slices is None else set(slices[wanted].tolist())
    return found - {0}
