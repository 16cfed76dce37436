# SPDX-License-Identifier: Apache-2.0
"""Owns cross-layer equalization: channels between two layers are scaled such that one grid suits them all; same float function.

Nagel et al. 2019 (arXiv 1906.04721, section 4.1): where f(s x) = s f(x) for s > 0, as for ReLU,

    w2 f(w1 x + b1) = (w2 S) f(S^-1 w1 x + S^-1 b1)                  S = diag(s)

With r1 and r2 the greatest absolute weights that make and that read a channel, s = r1 / sqrt(r1 r2) gives both sqrt(r1 r2)
(equations 9 to 11). A batch norm behind the first layer is scaled in its stead, weight and bias: its statistics stay true, and it
trains as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibrate import report
from lightning_quant.config import ConfigError
from lightning_quant.folding import channels_of, over_inputs, over_outputs, weight_of
from lightning_quant.graph import OUTSIDE, Graph, Node
from lightning_quant.intercept import is_prepared
from lightning_quant.patterns import TRANSPOSED, clamp_of, is_batch_norm, is_head
from lightning_quant.plan import forward_graph
from lightning_quant.settings import is_kind
from lightning_quant.sites import Operator

TOLERANCE = 1e-4  # all factors of a round within 1 +- this: it is over


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers whose channels were scaled: `first` (its batch norm `norm`, if it has one) by 1 / s, `second` by s.

    `least`, `greatest`: of the factors s of all rounds together, one a channel.
    """

    first: str
    second: str
    norm: str | None
    least: float
    greatest: float


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """What `equalize_model` did: the pairs, in the order of the data, and the reason for every layer that begins none."""

    pairs: tuple[Pair, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 0

    def __str__(self) -> str:
        lines = [
            f"{' + '.join(name for name in (pair.first, pair.norm) if name)} -> {pair.second}: "
            f"factors {pair.least:.3g} to {pair.greatest:.3g}"
            for pair in self.pairs
        ]
        return report(lines, self.left)


@torch.no_grad()
def equalize_model(model: nn.Module, *, example_input: Any = None, iterations: int = 100) -> Equalization:
    """Equalize the channels between layers, in place: the same function, with weights that suit one scale a tensor.

    A pair is a convolution (transposed, grouped and depthwise ones, too) or linear layer, optionally its batch norm, then
    ReLU, LeakyReLU, PReLU or nothing, then whatever leaves channels apart and scaled as they are (dropout, pools, means over
    other dimensions, reshapes; a channel may become several features of a linear layer), then a second such layer that alone
    reads what the first makes. Each layer may be second in one pair and first in the next; rounds over all pairs go on until
    no factor changes. A channel without weights on either side keeps its scale.

    Values change, in float64 arithmetic rounded once; Parameter objects, names, shapes, running statistics and hooks stay. Do it
    before `prepare_model`.

    Args:
        model: the float model, in train or eval mode.
        example_input: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or
            (tuple, dict). Without it the forward is traced symbolically, and pairs that only shapes can prove are left.
        iterations: rounds at most.

    Raises:
        ConfigError: if the model is prepared, where its forward can neither be recorded nor traced, or for `iterations` < 1.
    """
    if iterations < 1:
        raise ConfigError(f"equalize_model: iterations={iterations!r} is no number of rounds; give 1 or more.")
    if is_prepared(model):
        raise ConfigError(
            f"{type(model).__name__} is prepared, so its ranges would no longer fit; equalize before prepare_model, or call "
            "restore_model(model) first."
        )
    graph, why = forward_graph(model, example_input)
    if graph is None:
        raise ConfigError(
            f"equalize_model: pairs are proven by a recorded forward, and there is none ({why}); give example_input."
        )
    search = _Search(model, graph)
    links: list[_Link] = []
    left: dict[str, str] = {}
    for name in search.heads():
        found = search.link(name)
        if isinstance(found, str):
            left[name] = found
        else:
            links.append(found)
    factors, rounds = _balance(links, iterations)
    pairs = tuple(
        Pair(
            first=link.names[0],
            norm=None if link.norm is None else link.names[1],
            second=link.names[2],
            least=float(s.min()),
            greatest=float(s.max()),
        )
        for link, s in zip(links, factors, strict=True)
    )
    return Equalization(pairs=pairs, left=left, rounds=rounds)


# -- the arithmetic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Link:
    """The modules of a pair; each channel of `first` is read as `repeat` neighbouring features of `second`.

    `norm`, `second_norm`: the batch norms behind the two, whose scales count as their weights' and of which `norm` is changed.
    """

    first: nn.Module
    norm: nn.Module | None
    second: nn.Module
    second_norm: nn.Module | None
    repeat: int
    names: tuple[str, str, str]


Values = dict[int, Tensor]  # float64 copies by the id of their Parameter


def _balance(links: list[_Link], iterations: int) -> tuple[list[Tensor], int]:
    """Scale the parameters of all pairs in place; (s of each pair, how many rounds it took)."""
    norms = [norm._parameters.get("weight") for link in links for norm in (link.norm, link.second_norm) if norm is not None]
    used = [p for link in links for p in (*_made_by(link), weight_of(link.first), weight_of(link.second))]
    parameters: dict[int, Tensor] = {id(p): p for p in (*used, *norms) if p is not None}
    values: Values = {key: p.detach().to("cpu", torch.float64, copy=True) for key, p in parameters.items()}
    factors = [torch.ones(channels_of(link.first), dtype=torch.float64) for link in links]
    rounds, furthest = 0, math.inf if links else 0.0
    while rounds < iterations and furthest > TOLERANCE:
        rounds, furthest = rounds + 1, 0.0
        for link, total in zip(links, factors, strict=True):
            s = _factor(link, values)
            for parameter in _made_by(link):
                value = values[id(parameter)]
                value.div_(over_outputs(s, link.first) if parameter is weight_of(link.first) else s)
            values[id(weight_of(link.second))].mul_(_over_inputs(s.repeat_interleave(link.repeat), link.second))
            total.mul_(s)
            furthest = max(furthest, float(s.log().abs().max()))
    for key, original in parameters.items():
        original.copy_(values[key])
    return factors, rounds


def _made_by(link: _Link) -> list[nn.Parameter]:
    """The parameters that are divided: of the batch norm if there is one, else of the first layer."""
    owner = link.first if link.norm is None else link.norm
    return [p for p in (owner._parameters["weight"], owner._parameters.get("bias")) if p is not None]


def _factor(link: _Link, values: Values) -> Tensor:
    """s = r1 / sqrt(r1 r2), float64 (C,); 1 where a channel has no weights."""
    made, read = _effective(link.first, link.norm, values), _effective(link.second, link.second_norm, values)
    made = _grouped(made, link.first).amax((1, 3)).flatten() if isinstance(link.first, TRANSPOSED) else made.flatten(1).amax(1)
    transposed = isinstance(link.second, TRANSPOSED)
    read = read.flatten(1).amax(1) if transposed else _grouped(read, link.second).amax((1, 3)).flatten()
    s = (made / (read := read.view(-1, link.repeat).amax(1))).sqrt()
    return torch.where((made > 0) & (read > 0) & torch.isfinite(s) & (s > 0), s, 1.0)


def _effective(head: nn.Module, norm: nn.Module | None, values: Values) -> Tensor:
    """|w| with the norm behind it folded in: what will be quantized."""
    weight = values[id(weight_of(head))].abs()
    if norm is None:
        return weight
    gamma, variance = norm._parameters.get("weight"), norm.running_var
    assert isinstance(variance, Tensor)
    k = torch.rsqrt(variance.detach().cpu().double() + float(norm.eps))  # type: ignore[arg-type]
    return weight * over_outputs(k if gamma is None else k * values[id(gamma)].abs(), head)


def _grouped(weight: Tensor, head: nn.Module) -> Tensor:
    """A weight as (groups, dimension 0 of a group, dimension 1, kernel)."""
    groups = int(getattr(head, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _over_inputs(s: Tensor, head: nn.Module) -> Tensor:
    if isinstance(head, TRANSPOSED):
        return s.view(-1, *[1] * (weight_of(head).dim() - 1))
    return over_inputs(s, head)


# -- what leaves channels apart and scaled as they are ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """Where the channels of a layer stand: along `axis`, counted from the end (negative), each `repeat` times in a row.

    `shape`: of the tensor, None if it is unknown.
    """

    axis: int
    repeat: int
    shape: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One call behind a layer; `module`: the module or operator, None if only its name is known; `shape`: of its result."""

    node: Node
    module: nn.Module | None
    shape: tuple[int, ...] | None


def _same(channels: _Channels, step: _Step) -> _Channels | str:
    return _Channels(axis=channels.axis, repeat=channels.repeat, shape=step.shape)


def _pool(spatial: int) -> Callable[[_Channels, _Step], _Channels | str]:
    def act(channels: _Channels, step: _Step) -> _Channels | str:
        if channels.axis >= -spatial:
            return f"{step.node.name!r} pools over its channels"
        return _same(channels, step)

    return act


def _reshape(channels: _Channels, step: _Step) -> _Channels | str:
    """What stands before the channels is as it was, and each channel is one row of neighbours."""
    before, after = channels.shape, step.shape
    if before is None or after is None:
        return f"only example_input can show where {step.node.name!r} puts its channels"
    axis = len(before) + channels.axis
    for place, size in enumerate(after):
        if math.prod(after[:place]) == math.prod(before[:axis]) and size % before[axis] == 0 and size:
            times = size // before[axis]
            return _Channels(axis=place - len(after), repeat=channels.repeat * times, shape=after)
    return f"{step.node.name!r} does not keep its channels apart"


def _reduce(channels: _Channels, step: _Step) -> _Channels | str:
    """A mean, sum or maximum over other dimensions."""
    if channels.shape is None or step.shape is None or not isinstance(step.module, Operator):
        return f"only example_input can show what {step.node.name!r} does to its channels"
    dims = step.module.constant(1, "dim", None)
    size, rank = len(channels.shape), len(step.shape)
    gone = {dim % size for dim in ([dims] if isinstance(dims, int) else dims or range(size))}
    axis = size + channels.axis
    if axis in gone:
        return f"{step.node.name!r} reduces its channels"
    place = axis if rank == size else axis - sum(dim < axis for dim in gone)
    return _Channels(axis=place - rank, repeat=channels.repeat, shape=step.shape)


# (types of modules, names of operators, where the channels are afterwards)
_STEPS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...], Callable[[_Channels, _Step], _Channels | str]], ...] = (
    ((nn.ReLU, nn.LeakyReLU, nn.PReLU), ("relu", "leaky_relu", "prelu"), _same),
    ((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("clone", "contiguous"), _same),
    (
        (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
        ("max_pool1d", "avg_pool1d", "adaptive_max_pool1d", "adaptive_avg_pool1d"),
        _pool(1),
    ),
    (
        (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
        ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
        _pool(2),
    ),
    (
        (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d),
        ("max_pool3d", "avg_pool3d", "adaptive_max_pool3d", "adaptive_avg_pool3d"),
        _pool(3),
    ),
    (
        (nn.Flatten, nn.Unflatten),
        ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as"),
        _reshape,
    ),
    ((), ("mean", "sum", "amax"), _reduce),
)
_SHIFTING = ("AlphaDropout", "FeatureAlphaDropout", "alpha_dropout", "feature_alpha_dropout")  # in training


def _after(channels: _Channels, step: _Step) -> _Channels | str:
    """Where the channels are behind one call, or why a scaled channel does not come out scaled."""
    node, module = step.node, step.module
    for types, operators, act in _STEPS:
        if node.op in operators if node.kind == "function" else module is not None and any(is_kind(module, t) for t in types):
            return act(channels, step)
    if node.idle and node.op not in _SHIFTING:  # a cast of what is so already, F.dropout
        return _same(channels, step)
    clamp = None if module is None else clamp_of(module)
    if clamp is not None:
        ends = " and ".join(f"{end:g}" for end in clamp if end and math.isfinite(end))
        return f"{node.name!r} ({node.op}) cuts off at {ends}; a scaled channel would be cut off elsewhere"
    return f"{node.name!r} ({node.op}) stands behind it, out of which a scaled channel does not come scaled"


# -- the search ---------------------------------------------------------------------------------------------------------


def _spatial(head: nn.Module) -> int:
    return weight_of(head).dim() - 2


class _Search:
    """Finds the layer behind each layer in the graph of a forward, or why there is none."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph, self.modules = graph, dict(model.named_modules())
        self.shapes = {
            seen.source: seen.shape
            for calls in graph.boundaries.values()
            for call in calls
            for seen in (*call.inputs.values(), *call.outputs.values())
            if seen.shape is not None and seen.source != OUTSIDE
        }
        self.holders: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), []).append(name)

    def heads(self) -> list[str]:
        """The weighted layers, in the order of the data; what is never called last."""
        names = [name for name, module in self.modules.items() if is_head(module)]
        first = {name: calls[0].index for name in names if (calls := self.graph.calls(name))}
        return sorted(names, key=lambda name: first.get(name, len(self.graph.nodes)))

    def link(self, name: str) -> _Link | str:
        """The pair that a layer begins, or why it begins none."""
        head = self.modules[name]
        if (problem := self._own_problem(name, ())) is not None:
            return problem
        index, norm = self.graph.calls(name)[0].index, ""
        channels = _Channels(axis=-1 - _spatial(head), repeat=1, shape=self.shapes.get(index))
        path, idle = [index], True
        while True:
            found = self._reader(index)
            if isinstance(found, str):
                return found
            module = self.modules.get(found.name)
            if found.kind == "module" and module is not None and is_head(module):
                problem = self._second_problem(name, found.name, channels) or self._changed_problem(norm or name, path)
                return self._linked((name, norm, found.name), channels.repeat) if problem is None else problem
            if idle and not norm and found.kind == "module" and module is not None and is_batch_norm(module):
                if (problem := self._norm_problem(name, found.name, channels)) is not None:
                    return problem
                norm, path, after = found.name, [], _same(channels, self._step(found))
            else:
                after = _after(channels, self._step(found))
                idle = idle and found.idle
            if isinstance(after, str):
                return after
            index, channels = found.index, after
            path.append(index)

    def _linked(self, names: tuple[str, str, str], repeat: int) -> _Link:
        first, norm, second = (self.modules[name] if name else None for name in names)
        assert first is not None and second is not None
        behind = self._norm_behind(names[2])
        return _Link(first=first, norm=norm, second=second, second_norm=behind, repeat=repeat, names=names)

    def _norm_behind(self, name: str) -> nn.Module | None:
        """The batch norm that normalises what a layer makes, and is folded into its weight later."""
        index = self.graph.calls(name)[0].index
        channels = _Channels(axis=-1 - _spatial(self.modules[name]), repeat=1, shape=self.shapes.get(index))
        while not isinstance(found := self._reader(index), str):
            module = self.modules.get(found.name)
            if found.kind == "module" and module is not None and is_batch_norm(module):
                problem = self._dimension_problem(name, found.name, channels)
                return module if problem is None and module.running_var is not None else None
            if not found.idle:
                break
            index = found.index
        return None

    def _step(self, node: Node) -> _Step:
        module = self.graph.operators.get(node.name) if node.kind == "function" else self.modules.get(node.name)
        return _Step(node=node, module=module, shape=self.shapes.get(node.index))

    def _reader(self, index: int) -> Node | str:
        """The one call that reads what node `index` made."""
        node, readers = self.graph.nodes[index], self.graph.readers(index)
        if index in self.graph.outputs:
            return f"the model returns or keeps what {node.name!r} makes"
        if index in self.graph.side_effects:
            return f"{node.name!r} works in place and its input is used afterwards by its old name"
        if not readers:
            return f"nothing reads what {node.name!r} makes"
        if len(readers) > 1:
            return f"what {node.name!r} makes is read by {', '.join(repr(reader.name) for reader in readers)}"
        reader = readers[0]
        if reader.reads[0] != index or reader.reads.count(index) > 1 or reader.index in self.graph.split:
            return f"{reader.name!r} ({reader.op}) stands behind it, out of which a scaled channel does not come scaled"
        module = self.modules.get(reader.name)
        if reader.kind == "module" and module is not None and "forward" in vars(module):
            return f"{reader.name!r} has a forward of its own on the instance; what it computes is unknown"
        return reader

    def _own_problem(self, name: str, keys: tuple[str, ...]) -> str | None:
        """Why a layer cannot take part: it is called more or less than once, or its parameters `keys` are not its own."""
        module, calls = self.modules[name], len(self.graph.calls(name))
        if module._parameters.get("weight") is None:
            return f"the weight of {name!r} is computed from others, or missing"
        if calls != 1:
            return f"{name!r} is called {calls} times" if calls else f"{name!r} is not called in the recorded forward"
        if "forward" in vars(module):
            return f"{name!r} has a forward of its own on the instance; what it computes is unknown"
        for key in keys:
            parameter = module._parameters.get(key)
            others = [other for other in self.holders.get(id(parameter), ()) if other != name]
            if others:
                return f"the {key} of {name!r} is shared with {others[0]!r}"
            if readers := self.graph.readers_of_parameters.get(f"{name}.{key}"):
                return f"the {key} of {name!r} is also read by {readers[0]!r}"
        return None

    def _changed_problem(self, name: str, path: list[int]) -> str | None:
        """Why what makes the channels cannot be scaled: its parameters, or a hook that reads what stands on the way."""
        if (problem := self._own_problem(name, ("weight", "bias"))) is not None:
            return problem
        for other, calls in self.graph.boundaries.items():
            module = self.modules.get(other)
            if module is None:
                continue
            for call in calls:
                read = [*call.inputs.values()] if module._forward_pre_hooks else []
                read += [*call.outputs.values()] if module._forward_hooks else []
                if any(seen.source in path for seen in read):
                    return f"a hook on {other!r} reads what would be scaled"
        return None

    def _second_problem(self, name: str, second: str, channels: _Channels) -> str | None:
        """Why the layer that is reached does not read the channels of the first one."""
        module = self.modules[second]
        if (problem := self._own_problem(second, ("weight",))) is not None:
            return problem
        features = int(getattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels"))
        if channels.axis != -1 - _spatial(module) or features != channels_of(self.modules[name]) * channels.repeat:
            return f"{second!r} reads another dimension than that of its channels"
        return None

    def _norm_problem(self, name: str, norm: str, channels: _Channels) -> str | None:
        """Why a batch norm cannot be scaled in place of the layer before it."""
        module = self.modules[norm]
        if module.running_var is None:
            return f"{norm!r} has no running statistics, so what it multiplies by is unknown"
        if module._parameters.get("weight") is None:
            return f"{norm!r} has no weight to scale (affine=False) and undoes what is done before it"
        return self._dimension_problem(name, norm, channels)

    def _dimension_problem(self, name: str, norm: str, channels: _Channels) -> str | None:
        dims = None if channels.shape is None else len(channels.shape)
        if dims is None and _spatial(self.modules[name]) < 2:
            return f"only example_input can show which dimension {norm!r} normalises"
        if dims is not None and dims + channels.axis != 1:
            return f"{norm!r} normalises another dimension than that of its channels"
        return None


__all__ = ["Equalization", "Pair", "equalize_model"]
