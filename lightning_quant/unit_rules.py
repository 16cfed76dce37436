# SPDX-License-Identifier: Apache-2.0
"""Owns what each operator does to units: which meet, which move, which must stay.

What moves values is run on the units themselves. An operator that no rule knows has the units that it reads stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_quant.targets import on_tensors, tensors_in
from lightning_quant.units import Flow, Shadow, coordinate, fixed, squeezed


@dataclass(kw_only=True)
class Call:
    """One operator at work: what it reads, what is known of that, what it made."""

    flow: Flow
    where: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Sequence[Tensor]
    shadows: Mapping[int, Shadow]
    before: Mapping[int, Tensor]  # of an operator that writes in place: what stood there
    result: Any = field(default=None)

    @property
    def name(self) -> str:
        """`aten.add.Tensor` is add."""
        return name_of(self.func)

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def raw(self, tensor: Tensor) -> Shadow:
        """What is known of an argument."""
        return self.shadows[id(tensor)]

    def of(self, tensor: Tensor) -> Shadow:
        """What is known of an argument, as an activation."""
        return self.flow.lifted(self.shadows[id(tensor)])

    def value(self, tensor: Tensor) -> Tensor:
        """An argument's numbers before the operator."""
        return self.before.get(id(tensor), tensor)

    @property
    def output(self) -> Tensor:
        """The first tensor that was made."""
        return next(iter(tensors_in(self.result)))

    @property
    def reader(self) -> str:
        """Who reads, for messages."""
        return f"{self.name} in {self.where}"


Rule = Callable[[Call], list[Shadow]]


def name_of(func: Any) -> str:
    """The name of an aten operator, without its overload."""
    return str(func._schema.name).partition("::")[2]


def unknown(call: Call, why: str = "") -> list[Shadow]:
    """An operator without a rule: all that it reads stays."""
    for tensor in call.read:
        call.flow.pin(call.raw(tensor), why or f"{call.reader} reads it")
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    live = random or any(bool(call.raw(tensor).live.any()) for tensor in call.read)
    return [fixed(tensor.dim(), live) for tensor in tensors_in(call.result)]


# -- values move ------------------------------------------------------------------------------------------------------


def moved(call: Call) -> list[Shadow]:
    """The operator itself moves units."""
    data = [tensor for tensor in call.read if tensor.is_floating_point() or len(call.read) == 1]
    if not data or any(bool(call.raw(tensor).live.any()) for tensor in call.read if not any(tensor is one for one in data)):
        return unknown(call)  # indices that depend on the input
    if len(data) == 1 and call.raw(data[0]).stored:
        known = call.raw(data[0])
        assert known.index is not None
        moved = _run(call, {id(data[0]): known.index})
        return [Shadow(fixed(one.dim(), False).units, fixed(one.dim(), False).live, known.stored, one.long()) for one in moved]
    shadows = {id(tensor): call.of(tensor) for tensor in data}
    units = _run(call, {id(one): shadows[id(one)].units.expand(one.shape) for one in data})
    live = _run(call, {id(one): shadows[id(one)].live.expand(one.shape) for one in data})
    return [Shadow(squeezed(one.long()), squeezed(other.bool())) for one, other in zip(units, live, strict=True)]


def _run(call: Call, instead: Mapping[int, Tensor]) -> list[Tensor]:
    """The operator on other numbers, in float64: exact, and known to operators that move floats only."""
    args, kwargs = on_tensors(lambda one: instead[id(one)].double() if id(one) in instead else one, (call.args, call.kwargs))
    if "dtype" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    if call.name in ("view", "_unsafe_view"):  # strides are others here
        return [args[0].reshape(args[1])]
    return list(tensors_in(call.func(*args, **kwargs)))


def same(call: Call) -> list[Shadow]:
    """A copy, perhaps of another dtype."""
    return [call.raw(call.read[0])]


def shuffled(call: Call) -> list[Shadow]:
    """`channel_shuffle`: of each group of channels equally many, in the same places."""
    x, groups = call.read[0], int(call.argument(1, "groups"))
    units = call.of(x).units
    if units.shape[1] > 1:
        parts = units.movedim(1, 0).flatten(1)[:, 0].view(groups, -1)
        call.flow.tensors[tuple(parts.shape), parts.numpy().tobytes()] = parts, call.where
    return moved(call)


def alike(call: Call) -> list[Shadow]:
    """Zeros and the like, in the shape of a tensor."""
    known = call.of(call.read[0])
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    return [Shadow(known.units, torch.full((1,) * known.units.dim(), random))]


def written(call: Call) -> list[Shadow]:
    """`copy_`: what stood there is gone."""
    target, source = call.of(call.read[0]), call.of(call.read[1])
    units = padded(source.units, target.units.dim())
    if bool(target.units.any()):
        units = met_units(call, [target, source], [call.read[0].shape, call.read[1].shape])
    return [Shadow(units, padded(source.live, units.dim()))]


def empty(call: Call) -> list[Shadow]:
    """A new tensor, of which what is given is but the kind."""
    return [fixed(call.output.dim(), live=False)]


def spatial(call: Call) -> list[Shadow]:
    """Pools, pads and interpolation: each channel by itself."""
    known, count = call.of(call.read[0]), int(next(filter(str.isdigit, call.name)))
    return over(call, known, range(-count, 0), keep=True)


def zero_padding(call: Call) -> list[Shadow]:
    """Zeros around the values: each channel by itself, unless there are channels of zeros then."""
    known, pad = call.of(call.read[0]), call.argument(1)
    dims = [-1 - number // 2 for number, width in enumerate(pad) if width]
    if all(known.units.shape[dim] == 1 for dim in dims):
        return [known]
    return moved(call)


# -- values meet ------------------------------------------------------------------------------------------------------


def padded(values: Tensor, dims: int) -> Tensor:
    """`values` with dimensions of 1 in front."""
    return values.reshape((1,) * (dims - values.dim()) + tuple(values.shape))


def met_units(call: Call, shadows: Sequence[Shadow], shapes: Sequence[Sequence[int]]) -> Tensor:
    """The units of elements that several tensors of these shapes make together, by broadcasting; none of them stored."""
    flow, dims = call.flow, max(map(len, shapes))
    units = [padded(flow.units.roots(shadow.units), dims) for shadow in shadows]
    sizes = [(1,) * (dims - len(shape)) + tuple(shape) for shape in shapes]
    why = f"{call.reader} has it meet a tensor whose channels are not known"
    met = torch.zeros((1,) * dims, dtype=torch.int64)
    for one in units:
        if bool(one.any()):
            if bool(met.any()):
                flow.units.join(met, one, why)
            met = torch.where(met == 0, one, met)
    varying = [dim for dim, size in enumerate(met.shape) if size > 1]
    for one, size in zip(units, sizes, strict=True):
        if not bool(one.any()) and any(size[dim] > 1 for dim in varying):  # else it is a number, or a map over positions
            flow.units.pin(met, why)
    return squeezed(flow.units.roots(met))


def pointwise(call: Call) -> list[Shadow]:
    """Arithmetic: what meets is one unit."""
    tensors = [tensor for tensor in call.read if tensor.numel() > 1 or tensor.dim()] or list(call.read)
    if not tensors:
        return [fixed(call.output.dim(), live=False)]
    if len(tensors) == 1 and call.name in ("clone", "contiguous"):
        return [call.raw(tensors[0])]
    shadows = [call.raw(tensor) for tensor in tensors]
    active = [(known, tensor.shape) for known, tensor in zip(shadows, tensors, strict=True) if not known.stored]
    shown = met_units(call, [known for known, _ in active], [shape for _, shape in active]) if active else None
    full = [known if not known.stored else _aligned(call, known, shown) for known in shadows]
    units = met_units(call, full, [tensor.shape for tensor in tensors])
    live = torch.zeros((), dtype=torch.bool)
    for tensor in call.read:
        live = live | call.raw(tensor).live
    if call.name in ("mul", "mul_"):  # a constant 0 stays one, whatever it is multiplied by
        for tensor in call.read:
            zero = (call.value(tensor) == 0) & ~call.raw(tensor).live
            live = live & ~zero
    return [Shadow(units, squeezed(padded(live, call.output.dim())))]


def _aligned(call: Call, known: Shadow, shown: Tensor | None) -> Shadow:
    """A stored tensor that meets activations: its slices along the dimension that their units go along."""
    flow = call.flow
    assert known.index is not None
    shape = flow.shapes[known.stored]
    long = [dim for dim, size in enumerate(shape) if size > 1]
    if len(long) > 1 and shown is not None and bool(shown.any()):
        index = padded(known.index, max(shown.dim(), known.index.dim()))
        wide, index = torch.broadcast_tensors(padded(shown, index.dim()), index)
        for dim in long:
            place = coordinate(index, shape, dim)
            pairs = torch.unique(torch.stack([place.flatten(), wide.flatten()], 1), dim=0)
            if len(pairs) == shape[dim] and len(torch.unique(pairs[:, 1])) > 1:
                units = flow.units.of(known.stored, dim, shape[dim])[coordinate(known.index, shape, dim)]
                return Shadow(squeezed(units), known.live)
    return flow.lifted(known)


def gated(call: Call) -> list[Shadow]:
    """`glu`: one half times the sigmoid of the other."""
    x, dim = call.read[0], int(call.argument(1, "dim", -1))
    known, half = call.of(x), x.shape[dim] // 2
    sides = [squeezed(known.units.expand(x.shape).narrow(dim, start, half)) for start in (0, half)]
    lives = [known.live.expand(x.shape).narrow(dim, start, half) for start in (0, half)]
    size = list(call.output.shape)
    units = met_units(call, [Shadow(sides[0], lives[0]), Shadow(sides[1], lives[1])], [size, size])
    zero = (x.narrow(dim, 0, half) == 0) & ~lives[0]
    return [Shadow(units, squeezed((lives[0] | lives[1]) & ~zero))]


# -- values are summed ------------------------------------------------------------------------------------------------


def over(call: Call, known: Shadow, dims: Sequence[int] | range, *, keep: bool) -> list[Shadow]:
    """A result over whole dimensions: what goes into one of its elements goes together, or stays where that is everything."""
    units, live = known.units, known.live
    along = [dim % max(units.dim(), 1) for dim in dims]
    beside = any(size > 1 for dim, size in enumerate(units.shape) if dim not in along)
    for dim in along:
        if units.shape[dim] > 1:
            why = f"{call.reader} goes over all channels"
            if beside:
                call.flow.units.join(units, units.narrow(dim, 0, 1), why)
            else:
                call.flow.units.pin(units, why)
            units = call.flow.units.roots(units.narrow(dim, 0, 1)) if beside else torch.zeros_like(units.narrow(dim, 0, 1))
        live = live.any(dim, keepdim=True)
    if not keep:
        units, live = (one.reshape([size for dim, size in enumerate(one.shape) if dim not in along]) for one in (units, live))
    return [Shadow(units, live)]


def reduced(call: Call) -> list[Shadow]:
    """Means, sums and the like over dimensions."""
    x = call.read[0]
    known, dims = call.of(x), call.argument(1, "dim")
    if isinstance(dims, Tensor):  # the greater of two
        return pointwise(call)
    dims = [dims] if isinstance(dims, int) else dims if isinstance(dims, list | tuple) and dims else list(range(x.dim()))
    if call.name in ("sum", "nansum"):  # how many are added may change with the input's size
        known = Shadow(known.units, squeezed(known.live | (x != 0)))
    return over(call, known, dims, keep=call.output.dim() == x.dim())


def softmax(call: Call) -> list[Shadow]:
    """Each element depends on all along a dimension, on how many there are, too: equal ones are no constant."""
    known = call.of(call.read[0])
    return over(call, Shadow(known.units, torch.ones_like(known.live)), [call.argument(1)], keep=True)
