# SPDX-License-Identifier: Apache-2.0
"""Owns which output channels belong together, by the recorded forward: where they meet, one mask has to do for all.

Every output channel of a weighted layer gets a number; the numbers travel with the data through what keeps channels apart
(batch norm, activations, pools, flatten, ...). Where an addition or multiplication brings two together, where a concatenation
along another dimension does, and through a depthwise convolution, channels are one class: removed together or not at all. A
grouped convolution does not join channels, but needs as many of each of its groups. What is not understood (a reshape that mixes
channels, attention) makes unknown channels, number 0, which belong to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.graph import OUTSIDE, Boundary, Graph, Node
from lightning_quant.patterns import TRANSPOSED, is_batch_norm, is_head
from lightning_quant.settings import is_kind

UNKNOWN = 0
# fmt: off
_JOINS = frozenset(["add", "sub", "mul", "div", "truediv", "true_divide", "maximum", "minimum", "max", "min", "where", "lerp"])
_EACH = frozenset([  # functions that compute every channel from itself
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "alpha_dropout", "celu", "clamp", "clip", "clone",
    "contiguous", "cos",
    "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu", "exp", "feature_dropout", "float", "gelu", "half",
    "hardsigmoid", "hardswish", "hardtanh", "instance_norm", "interpolate", "leaky_relu", "log", "max_pool1d", "max_pool2d",
    "max_pool3d", "mish", "neg", "pad", "pow", "relu", "relu6", "selu", "sigmoid", "silu", "sin", "softplus", "sqrt", "square",
    "tanh", "threshold", "to", "type", "upsample",
])
_RESHAPES = frozenset(["flatten", "view", "reshape", "ravel", "squeeze", "unsqueeze", "unflatten"])
_REDUCES = frozenset(["mean", "sum", "amax", "amin", "std", "var", "prod"])
# fmt: on
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Softsign),
    *(nn.Tanhshrink, nn.Threshold),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    nn.AdaptiveMaxPool3d,
)
_OTHERS = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Upsample),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
_EACH_MODULE: tuple[type[nn.Module], ...] = (*_ACTIVATIONS, *_POOLS, *_OTHERS)


def out_channels(layer: nn.Module) -> int:
    """How many output channels a weighted layer has."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return int(weight.shape[1] * _groups(layer) if isinstance(layer, TRANSPOSED) else weight.shape[0])


def in_channels(layer: nn.Module) -> int:
    """How many input channels a weighted layer has."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return int(weight.shape[0] if isinstance(layer, TRANSPOSED) else weight.shape[1] * _groups(layer))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    return 1 < _groups(layer) == in_channels(layer)


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


@dataclass(frozen=True)
class _Labels:
    """The channels of a tensor: they lie along `dim`; (channels, k) numbers of what each is made of, repeated to fill up k."""

    dim: int
    ids: Tensor


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Classes of channels with members in the same layers: (layer, the channel that it has in each class), at least one."""

    members: tuple[tuple[str, Tensor], ...]


class Channels:
    """The channels of one recorded forward.

    Attributes:
        first: the number of channel 0 of each weighted layer; the others follow it.
        follows: of batch norms and depthwise convolutions, (channels, k) numbers of what each of their channels reads, in the
            order of the data.
        ends: weighted layers and batch norms with a way to what the model returns that no further weighted layer stands on.
        norm_behind: the batch norm that reads a weighted layer and no other, by that layer's name.
    """

    def __init__(self, graph: Graph | None, modules: Mapping[str, nn.Module]) -> None:
        self.first: dict[str, int] = {}
        self.follows: dict[str, Tensor] = {}
        self.norm_behind: dict[str, str] = {}
        self.ends: frozenset[str] = frozenset()
        self.total = 1
        self._parent: list[int] = [UNKNOWN]
        self._tags: list[tuple[int, tuple[str, str, int]]] = []
        self._counts: dict[str, int] = {}
        self._layers_of: dict[int, set[str]] = {}  # by class, once it is asked for
        if graph is None or not graph.shapes:
            return
        self._graph, self._modules = graph, modules
        self._labels: dict[int, _Labels] = {}
        calls: dict[str, Iterator[Boundary]] = {}
        for node in graph.nodes:
            boundaries = graph.boundaries.get(node.name, ())
            if node.kind == "input" or len(boundaries) != len(graph.calls(node.name)):
                continue
            call = next(calls.setdefault(node.name, iter(boundaries)))
            found = self._module(node, call) if node.kind == "module" else self._function(node, call)
            if found is not None and node.index not in graph.split:
                self._labels[node.index] = found
        self.ends = frozenset(self._ends())
        del self._graph, self._modules, self._labels  # a plan is data, without the model

    # -- classes ------------------------------------------------------------------------------------------------------

    def root(self, atom: int) -> int:
        """The number that stands for the class of channel `atom`."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _join(self, ids: Tensor) -> None:
        """Make the channels of each row of `ids` one class."""
        for row in ids.tolist():
            known = [self.root(atom) for atom in dict.fromkeys(row) if atom != UNKNOWN]
            for other in known[1:]:
                self._parent[max(known[0], other)] = known[0] = min(known[0], other)

    def segments(self, layers: Collection[str]) -> list[Segment]:
        """The channels of `layers` by classes, classes with the same layers (and groups of grouped convolutions) together.

        A batch norm can be one of them where it alone reads a layer: it has that layer's channels.
        """
        members: dict[int, list[tuple[str, int]]] = {}
        for name in [*self.first, *self.norm_behind.values()]:
            if name in layers:
                for channel, atom in enumerate(self._atoms(name)):
                    members.setdefault(self.root(atom), []).append((name, channel))
        tags: dict[int, list[tuple[str, str, int]]] = {}
        for atom, tag in self._tags:
            tags.setdefault(self.root(atom), []).append(tag)
        alike: dict[Any, list[list[tuple[str, int]]]] = {}
        for root, found in members.items():
            names = tuple(name for name, _ in found)
            alike.setdefault((names, tuple(sorted(set(tags.get(root, []))))), []).append(found)
        return [
            Segment(members=tuple((name, torch.tensor([one[place][1] for one in classes])) for place, name in enumerate(key[0])))
            for key, classes in alike.items()
        ]

    def joined(self, layer: str) -> set[str]:
        """The other layers that have a channel in a class with one of `layer`."""
        if layer not in self.first:
            return set()
        if not self._layers_of:
            for other in self.first:
                for atom in self._atoms(other):
                    self._layers_of.setdefault(self.root(atom), set()).add(other)
        return set().union(*(self._layers_of[self.root(atom)] for atom in self._atoms(layer))) - {layer}

    def _atoms(self, name: str) -> Sequence[int]:
        """The numbers of the channels of a layer, or of the layer that a batch norm reads."""
        if name in self.first:
            return range(self.first[name], self.first[name] + self._counts[name])
        atoms: list[int] = self.follows[name][:, 0].tolist()
        return atoms

    # -- one call -----------------------------------------------------------------------------------------------------

    def _module(self, node: Node, call: Boundary) -> _Labels | None:
        module = self._modules.get(node.name)
        shapes = [seen.shape for seen in call.outputs.values()]
        if module is None or len(shapes) != 1 or shapes[0] is None or not node.reads:
            return None
        read, shape = self._labels.get(node.reads[0]), shapes[0]
        if is_head(module) and "weight" in module._parameters:
            return self._weighted(node.name, module, read, shape)
        if read is None:
            return None
        if is_batch_norm(module):
            self.follows[node.name] = read.ids
            maker = self._graph.nodes[self._graph.before(node.reads[0])]
            once = all(len(self._graph.calls(name)) == 1 for name in (maker.name, node.name))
            alone = len(self._graph.consumers(maker.index)) == 1 and not self._graph.returned(maker.index)
            if maker.name in self.first and once and alone:
                self.norm_behind[maker.name] = node.name
            return read
        if isinstance(module, nn.Flatten | nn.Unflatten):
            return self._reshaped(call, read, shape)
        each = any(is_kind(module, cls) for cls in _EACH_MODULE)
        return read if each and len(shape) > read.dim and shape[read.dim] == len(read.ids) else None

    def _weighted(self, name: str, module: nn.Module, read: _Labels | None, shape: tuple[int, ...]) -> _Labels | None:
        count, groups = out_channels(module), _groups(module)
        if name not in self.first:
            self.first[name], self._counts[name] = self.total, count
            self.total += count
            self._parent.extend(range(self.first[name], self.total))
        ids = torch.arange(self.first[name], self.first[name] + count)[:, None]
        weight = module._parameters["weight"]
        assert weight is not None
        if groups > 1 and is_depthwise(module):
            if read is not None:
                each = read.ids.repeat_interleave(count // groups, 0)
                self.follows[name] = each
                self._join(torch.cat([ids, each], 1))
        elif groups > 1:
            self._tags += [(atom, ("out", name, c * groups // count)) for c, atom in enumerate(ids[:, 0].tolist())]
            if read is not None:
                rows = enumerate(read.ids.tolist())
                self._tags += [
                    (atom, ("in", name, c * groups // len(read.ids))) for c, row in rows for atom in row if atom != UNKNOWN
                ]
        dim = len(shape) - 1 if isinstance(module, nn.Linear) else len(shape) - weight.dim() + 1
        return _Labels(dim, ids) if 0 <= dim < len(shape) and shape[dim] == count else None

    def _function(self, node: Node, call: Boundary) -> _Labels | None:
        outputs = [seen.shape for seen in call.outputs.values()]
        if not outputs or outputs[0] is None or not node.reads:
            return None
        shape, read = outputs[0], self._labels.get(node.reads[0])
        if node.op in _JOINS:
            return self._met(node, call, shape)
        if node.op in ("cat", "concat", "concatenate"):
            return self._concatenated(node, call, shape)
        if read is None or (len(node.reads) > 1 and node.op not in ("prelu", "batch_norm")):
            return None
        if node.op in _RESHAPES:
            return self._reshaped(call, read, shape)
        if node.op in _REDUCES:
            return self._reduced(node, read, shape)
        if node.op in ("permute", "transpose", "swapaxes", "swapdims"):
            return self._permuted(node, read)
        return read if node.op in _EACH and len(shape) > read.dim and shape[read.dim] == len(read.ids) else None

    def _met(self, node: Node, call: Boundary, shape: tuple[int, ...]) -> _Labels | None:
        """What an operator makes of two tensors, elementwise."""
        ids: list[Tensor] = []
        place: int | None = None
        unknown = False
        for source, seen in zip(node.reads, call.inputs.values(), strict=False):
            read = self._labels.get(source) if source != OUTSIDE else None
            if read is None or seen.shape is None:
                unknown |= seen.shape is not None and math.prod(seen.shape) > 1
                continue
            dim = read.dim + len(shape) - len(seen.shape)  # broadcasting begins at the last dimension
            if place not in (None, dim) or not 0 <= dim < len(shape) or shape[dim] != len(read.ids):
                return None
            place = dim
            ids.append(read.ids)
        if place is None:
            return None
        self._join(torch.cat(ids, 1))
        if unknown and node.op not in ("mul", "div", "truediv", "true_divide"):
            ids.append(torch.zeros(len(ids[0]), 1, dtype=torch.long))
        return _Labels(place, _narrow(torch.cat(ids, 1)))

    def _concatenated(self, node: Node, call: Boundary, shape: tuple[int, ...]) -> _Labels | None:
        parts = [(self._labels.get(source), seen.shape) for source, seen in zip(node.reads, call.inputs.values(), strict=False)]
        known = [read for read, _ in parts if read is not None]
        if not known or any(part is None or len(part) != len(shape) for _, part in parts):
            return None
        shapes = [part for _, part in parts if part is not None]
        along = [d for d in range(len(shape)) if sum(one[d] for one in shapes) == shape[d] and shape[d] != shapes[0][d]]
        dim = known[0].dim
        if any(read.dim != dim for read in known) or (len(shapes) > 1 and len(along) != 1):
            return None
        blank = [torch.zeros(one[dim], 1, dtype=torch.long) for one in shapes]
        ids = [nothing if read is None else read.ids for (read, _), nothing in zip(parts, blank, strict=True)]
        if along and along[0] == dim:
            width = max(one.shape[1] for one in ids)
            return _Labels(dim, torch.cat([_wide(one, width) for one in ids]))
        self._join(torch.cat(ids, 1))
        return _Labels(dim, _narrow(torch.cat(ids, 1)))

    def _reshaped(self, call: Boundary, read: _Labels, shape: tuple[int, ...]) -> _Labels | None:
        before = next((seen.shape for seen in call.inputs.values() if seen.shape is not None), None)
        if before is None or shape[: read.dim] != before[: read.dim] or len(shape) <= read.dim:
            return None
        if shape[read.dim] == before[read.dim] == len(read.ids):
            return read
        if len(shape) == read.dim + 1 and shape[read.dim] == math.prod(before[read.dim :]):
            return _Labels(read.dim, read.ids.repeat_interleave(math.prod(before[read.dim + 1 :]), 0))
        return None

    def _constants(self, node: Node) -> tuple[list[Any], Mapping[str, Any]] | None:
        operator = self._graph.operators.get(node.name)
        if operator is None:
            return None
        args, kwargs = operator.call
        return list(args[1:]), kwargs

    def _reduced(self, node: Node, read: _Labels, shape: tuple[int, ...]) -> _Labels | None:
        given = self._constants(node)
        if given is None:
            return None
        args, kwargs = given
        dims = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
        if not isinstance(dims, int | tuple | list):
            return None
        rank, one = node.dims, [dims] if isinstance(dims, int) else list(dims)
        gone = {d % rank for d in one}
        if read.dim in gone:
            return None
        dim = read.dim if len(shape) == rank else read.dim - sum(d < read.dim for d in gone)
        return _Labels(dim, read.ids) if dim < len(shape) and shape[dim] == len(read.ids) else None

    def _permuted(self, node: Node, read: _Labels) -> _Labels | None:
        given = self._constants(node)
        if given is None:
            return None
        args, kwargs = given
        rank = node.dims
        order = list(range(rank))
        if node.op == "permute":
            dims = args[0] if args and isinstance(args[0], tuple | list) else args or kwargs.get("dims", ())
            order = [d % rank for d in dims] if all(isinstance(d, int) for d in dims) and len(dims) == rank else []
        else:
            pair = [*args, *kwargs.values()]
            if len(pair) == 2 and all(isinstance(d, int) for d in pair):
                a, b = (d % rank for d in pair)
                order[a], order[b] = order[b], order[a]
            else:
                order = []
        return _Labels(order.index(read.dim), read.ids) if read.dim in order else None

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _ends(self) -> Iterator[str]:
        nodes, todo, seen = self._graph.nodes, [i for i in self._graph.outputs if i != OUTSIDE], set[int]()
        while todo:
            node = nodes[todo.pop()]
            if node.index in seen:
                continue
            seen.add(node.index)
            module = self._modules.get(node.name) if node.kind == "module" else None
            if module is not None and (is_head(module) or is_batch_norm(module)):
                yield node.name
            if module is None or not is_head(module):
                todo += [i for i in node.reads if i != OUTSIDE]

    # -- masks --------------------------------------------------------------------------------------------------------

    def followed(self, masks: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The masks (channels,) of the followers `names`, in the order of the data, where `masks` has those of layers.

        A channel stays where anything that it is made of does.
        """
        alive = torch.ones(self.total, dtype=torch.bool)
        for name, mask in masks.items():
            if name in self.first:
                alive[self.first[name] : self.first[name] + len(mask)] = mask.cpu()
        found: dict[str, Tensor] = {}
        for name in names:
            found[name] = alive[self.follows[name]].any(1)
            if name in self.first:
                alive[self.first[name] : self.first[name] + len(found[name])] = found[name]
        return found


def _wide(ids: Tensor, width: int) -> Tensor:
    """`ids` with its first column repeated, so that it has `width`."""
    return torch.cat([ids, ids[:, :1].expand(-1, width - ids.shape[1])], 1)


def _narrow(ids: Tensor) -> Tensor:
    """`ids` without equal columns."""
    columns: Tensor = torch.unique(ids, dim=1)
    return columns
