# SPDX-License-Identifier: Apache-2.0
"""Owns units: sets of slices of parameters and buffers that can only be cut out of a model together.

A unit is a channel with all that belongs to it: rows of the layers that make it, an index of the norms that scale it, columns of
the layers that read it. Every element of every tensor of a forward carries one, see `flow.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A dimension, or the channels of a convolution's weight whatever its layout and groups are.
Dim = int | str
OUT, IN = "out", "in"


class Units:
    """Sets of slices that vanish together; unit 0 is what never does."""

    def __init__(self) -> None:
        self._parent = [0]
        self._table: Tensor | None = None
        self.blocks: dict[tuple[str, Dim], tuple[int, int]] = {}  # slices of a tensor -> its first unit, how many
        self.why: dict[int, str] = {0: "no layer makes it"}  # by root: why it stays

    def of(self, name: str, dim: Dim, size: int) -> Tensor:
        """The units of a stored tensor's slices along a dimension, int64 (size,); a single slice never vanishes."""
        if size == 1:
            return torch.zeros(1, dtype=torch.int64)
        if (name, dim) not in self.blocks:
            first = len(self._parent)
            self._parent.extend(range(first, first + size))
            self.blocks[name, dim], self._table = (first, size), None
        first, _ = self.blocks[name, dim]
        return torch.arange(first, first + size)

    def __len__(self) -> int:
        return len(self._parent)

    def find(self, unit: int) -> int:
        """The name of the set that a unit is in."""
        while self._parent[unit] != unit:
            self._parent[unit] = unit = self._parent[self._parent[unit]]
        return unit

    def roots(self, units: Tensor) -> Tensor:
        """`find` of each element."""
        if self._table is None:
            table = torch.tensor(self._parent)
            while not torch.equal(further := table[table], table):
                table = further
            self._table = table
        return self._table[units]

    def free(self, units: Tensor) -> Tensor:
        """`roots`, 0 for those that are known to stay."""
        roots = self.roots(units)
        stays = torch.zeros(len(self._parent), dtype=torch.bool)
        stays[torch.tensor([self.find(unit) for unit in self.why])] = True
        return torch.where(stays[roots], 0, roots)

    def join(self, first: Tensor, second: Tensor, why: str) -> None:
        """Make units that meet one; where one of them is 0, `why` the other stays. Shapes broadcast."""
        pairs = torch.stack([side.flatten() for side in torch.broadcast_tensors(self.roots(first), self.roots(second))], 1)
        for pair in torch.unique(pairs, dim=0).tolist():
            a, b = (self.find(unit) for unit in pair)
            if a == b:
                continue
            if 0 in (a, b):
                self.why.setdefault(a or b, why)
                continue
            self._parent[b], self._table = a, None
            if b in self.why:
                self.why.setdefault(a, self.why.pop(b))

    def pin(self, units: Tensor, why: str) -> None:
        """Have units stay."""
        for unit in torch.unique(self.roots(units)).tolist():
            self.why.setdefault(unit, why)


@dataclass(frozen=True)
class Shadow:
    """What is known of a tensor's elements.

    `units` (int64), `live` (bool: may depend on the input): of its dimensions, 1 where all along a dimension are alike. `stored`:
    the parameter or buffer whose elements these are, moved at most; `index`: where they lie in it, flat, of the tensor's shape.
    """

    units: Tensor
    live: Tensor
    stored: str = ""
    index: Tensor | None = None


def fixed(dims: int, live: bool) -> Shadow:
    """Of a tensor that no unit goes through."""
    ones = (1,) * dims
    return Shadow(torch.zeros(ones, dtype=torch.int64), torch.full(ones, live))


@dataclass(frozen=True, kw_only=True)
class Conv:
    """How a convolution reads a weight that is as it is stored."""

    transposed: bool
    groups: int
    outputs: int
    inputs: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A weighted layer reads its input: what cutting channels of that input out does.

    `units` of its input channels, (I,); `values`: the constants that go into the bias with a channel, float64 (I,), 0 where there
    is none; `columns`: what they are multiplied by, float64 (O, I); `bias`: where they go, "" if there is none yet, None if there
    cannot be; `kept`: why a channel cannot be cut out, by index.
    """

    where: str
    weight: str
    bias: str | None
    units: Tensor
    values: Tensor
    columns: Tensor
    kept: Mapping[int, str]


@dataclass(kw_only=True)
class Flow:
    """What one forward showed.

    `shapes`: of stored tensors; `convs`: how convolutions read them; `tensors`: units of tensors that cuts must leave
    rectangular, and where they were made; `boundaries`: units of each module's arguments and results, of its first call.
    """

    units: Units = field(default_factory=Units)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    convs: dict[str, Conv] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    tensors: dict[tuple[tuple[int, ...], bytes], tuple[Tensor, str]] = field(default_factory=dict)
    boundaries: dict[str, tuple[list[Tensor | None], list[Tensor | None]]] = field(default_factory=dict)

    def slices(self, name: str, dim: Dim) -> Tensor | None:
        """The sets that a stored tensor's slices are in, (size,); None where nothing gave them units."""
        if (name, dim) not in self.units.blocks:
            return None
        first, size = self.units.blocks[name, dim]
        return self.units.roots(torch.arange(first, first + size))

    def side(self, name: str, dim: int) -> Dim:
        """A dimension of a stored tensor as units know it."""
        if name not in self.convs or dim > 1:
            return dim
        return IN if (dim == 1) != self.convs[name].transposed else OUT

    def groups(self, name: str) -> int:
        """How many groups a weight has."""
        return self.convs[name].groups if name in self.convs else 1

    def pin(self, shadow: Shadow, why: str) -> None:
        """Have all that a tensor carries stay."""
        if shadow.stored:
            self.pin_stored(shadow.stored, why)
        self.units.pin(shadow.units, why)

    def pin_stored(self, name: str, why: str) -> None:
        """Have a parameter or buffer stay as it is."""
        for dim, size in enumerate(self.shapes[name]):
            self.units.pin(self.units.of(name, dim, size), why)
        if name in self.convs:
            self.units.pin(self.units.of(name, OUT, self.convs[name].outputs), why)
            self.units.pin(self.units.of(name, IN, self.convs[name].inputs), why)

    def lifted(self, shadow: Shadow) -> Shadow:
        """A stored tensor as any other: its one long dimension has units; with several of them, it stays as it is."""
        if not shadow.stored:
            return shadow
        assert shadow.index is not None
        shape = self.shapes[shadow.stored]
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) != 1:
            self.pin_stored(shadow.stored, f"{shadow.stored} is used in a way that does not tell its channels apart")
            return fixed(shadow.units.dim(), live=False)
        units = self.units.of(shadow.stored, long[0], shape[long[0]])[coordinate(shadow.index, shape, long[0])]
        return Shadow(squeezed(units), shadow.live)


def squeezed(values: Tensor) -> Tensor:
    """`values` with 1 for every dimension along which all are alike."""
    for dim in range(values.dim()):
        if values.shape[dim] > 1 and bool((values == values.narrow(dim, 0, 1)).all()):
            values = values.narrow(dim, 0, 1)
    return values


def coordinate(index: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Where flat indices into a tensor of `shape` lie along a dimension."""
    return index // math.prod(shape[dim + 1 :]) % shape[dim]


def by_group(weight: Tensor, conv: Conv) -> Tensor:
    """A convolution's weight as (groups, outputs of a group, inputs of a group, ...)."""
    parts = weight.reshape(conv.groups, weight.shape[0] // conv.groups, *weight.shape[1:])
    return parts.transpose(1, 2) if conv.transposed else parts
