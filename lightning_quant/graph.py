# SPDX-License-Identifier: Apache-2.0
"""Owns the graph of a forward: which module or functional operator produced and consumed each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_quant.settings import is_kind
from lightning_quant.sites import Operator

OUTSIDE = -1
_DROPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# What leaves every value on its grid: it moves, drops or repeats values but makes no new ones. In eval mode, for dropout.
_PASSING_MODULES = (
    *_DROPS,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
)
# fmt: off
DROP_FUNCTIONS = frozenset(["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"])
_PASSING_FUNCTIONS = DROP_FUNCTIONS | frozenset([
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "channel_shuffle", "chunk", "clone", "contiguous",
    "detach", "expand", "expand_as", "flatten", "flip", "getitem", "index_select", "max_pool1d", "max_pool2d", "max_pool3d",
    "movedim", "mT", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "repeat", "repeat_interleave", "reshape",
    "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T", "tensor_split",
    "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
])
TAKES_VALUES = frozenset([
    "allclose", "array", "bool", "complex", "contains", "equal", "float", "format", "index", "int", "is_nonzero", "item", "numpy",
    "repr", "str", "tolist",
])
# fmt: on


def keeps_grid(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function moves values only, given its arguments; a pad adds zeros, which every grid has, or repeats."""

    def argument(position: int, name: str, default: Any) -> Any:
        return args[position] if position < len(args) else kwargs.get(name, default)

    if op == "pad":
        return argument(2, "mode", "constant") != "constant" or not argument(3, "value", 0)
    if op == "interpolate":
        return argument(3, "mode", "nearest") in ("nearest", "nearest-exact")
    return op in _PASSING_FUNCTIONS


def idles(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function is a dropout that is told that training is over."""
    return op in DROP_FUNCTIONS and not (args[2] if len(args) > 2 else kwargs.get("training", True))


def module_passes(module: nn.Module) -> tuple[bool, bool]:
    """(whether a leaf only moves values, whether it returns what it is given), in eval mode."""
    return any(is_kind(module, cls) for cls in _PASSING_MODULES), any(is_kind(module, cls) for cls in _DROPS)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call. kind: 'input', 'module' or 'function'; op: type or function name; reads: producers, OUTSIDE for others.

    `dims`: the number of dimensions of the first tensor read, 0 if unknown; `passing`: leaves values on the grid they came
    with; `idle`: in eval mode it returns what it is given (identity, dropout); `floating`: whether it makes floats.
    """

    index: int
    kind: str
    name: str
    op: str
    reads: tuple[int, ...]
    dims: int
    passing: bool
    idle: bool = False
    floating: bool = True


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One argument or output of a call: which node made it (OUTSIDE for others), and its shape; None if it is no tensor."""

    source: int
    shape: tuple[int, ...] | None
    floating: bool
    type: str


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """One call of a module, leaf or not: its arguments and outputs by target (`_input_`, `_output_1`).

    `order`: its place among all calls of modules, by their beginning.
    """

    order: int
    inputs: Mapping[str, Seen]
    outputs: Mapping[str, Seen]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The calls of one forward, in order, and which of them the model returned, kept or took values out of.

    `boundaries`: every module's and operator's calls, by name. `side_effects`: calls that wrote over a tensor which was then
    used by the name it had before: `self.relu(x); use(x)`. `split`: nodes that made several tensors, which their number does not
    tell apart. `operators`: what was called as a function, by name, in the order of first calls. `readers_of_parameters`:
    operators that read a parameter of a module that is not theirs, by the parameter's name. `shapes`: whether they are known.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    side_effects: frozenset[int] = frozenset()
    split: frozenset[int] = frozenset()
    boundaries: Mapping[str, tuple[Boundary, ...]] = dataclasses.field(default_factory=dict)
    operators: Mapping[str, Operator] = dataclasses.field(default_factory=dict)
    readers_of_parameters: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: bool = True

    def calls(self, name: str) -> list[Node]:
        """Every call of the module or operator `name`, in order."""
        return [node for node in self.nodes if node.kind != "input" and node.name == name]

    def readers(self, index: int) -> list[Node]:
        """The calls that read the result of node `index`, once for each."""
        return [node for node in self.nodes if index in node.reads]

    def origin(self, index: int) -> int:
        """The node whose values arrive at node `index`: through pools, reshapes and whatever else makes none."""
        while index != OUTSIDE and self.nodes[index].passing and self.nodes[index].reads:
            index = self.nodes[index].reads[0]
        return index

    def before(self, index: int) -> int:
        """The node that made what node `index` hands on: itself, or one before it if it is dropout or identity."""
        while index != OUTSIDE and self.nodes[index].idle and len(self.nodes[index].reads) == 1:
            index = self.nodes[index].reads[0]
        return index

    def consumers(self, index: int) -> list[Node]:
        """`readers`, where dropout and identity do not count but those that read them do."""
        found: dict[int, Node] = {}
        for node in self.readers(index):
            for last in self.consumers(node.index) if node.idle and len(node.reads) == 1 else [node]:
                found[last.index] = last
        return list(found.values())

    def returned(self, index: int) -> bool:
        """Whether the model returns what node `index` made, or hands it to dropout or identity that it returns."""
        return index in self.outputs or any(node.idle and self.returned(node.index) for node in self.readers(index))

    def downstream(self, index: int) -> set[int]:
        """Every node that depends on node `index`."""
        found = {index}
        for node in self.nodes[index + 1 :]:
            if found.intersection(node.reads):
                found.add(node.index)
        return found - {index}
