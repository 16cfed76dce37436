# SPDX-License-Identifier: Apache-2.0
"""Owns the graph of a forward that cannot be run, for want of an example input: traced symbolically, without shapes.

`torch.fx` runs the forward on stand-ins. What depends on values or shapes cannot be followed; then there is no graph. What the
trace takes for granted (default arguments, eval mode) is what the recorded forward would take. Nothing of the trace is executed.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_quant.graph import (
    OUTSIDE,
    Boundary,
    Graph,
    Node,
    Seen,
    idles,
    keeps_grid,
    module_passes,
)
from lightning_quant.keys import INPUT, OUTPUT
from lightning_quant.record import calls_apart, is_leaf, undisturbed
from lightning_quant.sites import MODULE_CALL, Operators, Place, Site, name_of, place, plain_name
from lightning_quant.targets import Arguments, outputs_of

# What says how large a tensor is or of which kind; in a recorded forward it is a number and no call.
_FACTS = frozenset(["shape", "size", "dim", "ndim", "numel", "nelement", "dtype", "device", "stride", "is_floating_point"])

_AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.imod, operator.ipow)


class _StandIn(fx.Proxy):
    """A stand-in for which `x += y` is not `x = x + y`."""


def _augment(function: Any) -> Any:
    def augmented(self: _StandIn, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return augmented


for _function in _AUGMENTED:
    setattr(_StandIn, f"__{_function.__name__}__", _augment(_function))


class _Tracer(fx.Tracer):
    """Notes, for every call of a module and of an operator, what a recorder would; shapes are unknown."""

    def __init__(self, model: nn.Module, shared: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.shared = {id(module): name for name, module in model.named_modules() if name in shared}
        self.through: list[str] = []  # the shared activations under way (record.py)
        self.lost: set[str] = set()
        self.nodes: list[Node] = []
        self.index: dict[fx.Node, int] = {}
        self.facts: set[fx.Node] = set()
        self.overwritten: dict[fx.Node, int] = {}  # what was written over in place -> the call that did
        self.renamed: dict[fx.Node, fx.Node] = {}  # what was written over in place -> the result
        self.side_effects: set[int] = set()
        self.boundaries: dict[str, list[Boundary]] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.operators = Operators(self.names.values())
        self.owners: list[tuple[str, Counter[tuple[str, Place]]]] = [("", Counter())]
        self.parameter_readers: dict[str, list[str]] = {}
        self.calls = 0
        self.running = False

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """The stand-ins for the arguments; fx asserts of default arguments that they are what they are."""
        made = super().create_args_for_root(*args, **kwargs)
        self.running = True
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """The leaves of a recorded forward."""
        return is_leaf(m) and id(m) not in self.shared

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A stand-in for the result of `node`."""
        return _StandIn(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """A stand-in, and the node that it is the result of."""
        # The outermost forward is not called as a module.
        where = place(ends=MODULE_CALL | {_traced.__code__}, known=lambda module: id(module) not in self.shared)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind in ("call_function", "call_method"):
            if self.running:
                self._operator(kind, target, args, kwargs, where or (), proxy)
        elif kind == "placeholder":
            self._node(proxy, "input", f"input_{len(self.nodes)}", "input", [])
        return proxy

    def _operator(self, kind: str, target: Any, args: Any, kwargs: Any, where: Place, proxy: fx.Proxy) -> None:
        op = name_of(target) if kind == "call_function" else plain_name(target)
        op = str(args[1]) if op == "getattr" else op  # x.T, x.shape
        if op in _FACTS or self._counts(target, args, kwargs):
            self.facts.add(proxy.node)
            return
        owner, counts = self.owners[-1]
        counts[op, where] += 1
        through = self.through[-1] if self.through else ""
        self.lost |= {through} if through and not where else set()
        site = Site(owner=owner, op=op, place=where, repeat=counts[op, where] - 1, through=through)
        function = target if kind == "call_function" else getattr(torch.Tensor, target)
        known = self._without_proxies((args, kwargs))
        name = self.operators.name(site, function, *known)
        reads = self._reads((args, kwargs))
        inputs = {f"{INPUT}{i or ''}": one for i, one in enumerate(reads)}
        for parameter in _parameters((args, kwargs)):
            if parameter.rpartition(".")[0] != owner:
                self.parameter_readers.setdefault(parameter, []).append(name)
        index = self._node(proxy, "function", name, op, reads, keeps_grid(op, *known), idles(op, *known))
        self._boundary(name, inputs, {OUTPUT: _seen(index)})
        if _in_place(target, kwargs) and isinstance(args[0], fx.Proxy):
            self.overwritten[args[0].node], self.renamed[args[0].node] = index, proxy.node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A call of a module, leaf or not."""
        if id(m) in self.shared:
            self.through.append(self.shared[id(m)])
            try:
                return super().call_module(m, forward, args, kwargs)
            finally:
                self.through.pop()
        name, order = self.names[id(m)], self.calls
        self.calls += 1
        given = {t: self._seen(value) for t, value in Arguments(type(m)).passed(args, kwargs).items()}
        self.owners.append((name, Counter()))
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self.owners.pop()
        if is_leaf(m):
            passing, idle = module_passes(m)
            index = self._node(result, "module", name, type(m).__name__, self._reads((args, kwargs)), passing, idle)
            if getattr(m, "inplace", False) and not passing and args and isinstance(args[0], fx.Proxy):
                self.overwritten[args[0].node], self.renamed[args[0].node] = index, result.node
        made = {OUTPUT: result} if isinstance(result, fx.Proxy) else outputs_of(result)
        self.boundaries.setdefault(name, []).append(
            Boundary(order=order, inputs=given, outputs={t: self._seen(one) for t, one in made.items()})
        )
        return result

    def _node(
        self, proxy: Any, kind: str, name: str, op: str, reads: list[Seen], passing: bool = False, idle: bool = False
    ) -> int:
        index = len(self.nodes)
        sources = tuple(one.source for one in reads)
        self.nodes.append(Node(index=index, kind=kind, name=name, op=op, reads=sources, dims=0, passing=passing, idle=idle))
        self.index[proxy.node] = index
        return index

    def _boundary(self, name: str, inputs: Mapping[str, Seen], outputs: Mapping[str, Seen]) -> None:
        self.boundaries.setdefault(name, []).append(Boundary(order=self.calls, inputs=inputs, outputs=outputs))
        self.calls += 1

    def _counts(self, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call computes with sizes and the like alone: `x.shape[0] // 2`."""
        passed: list[fx.Node] = []
        fx.node.map_aggregate((args, kwargs), lambda one: passed.append(one.node) if isinstance(one, fx.Proxy) else one)
        arithmetic = isinstance(target, str) or getattr(target, "__module__", "") in ("_operator", "builtins", "math")
        return bool(passed) and arithmetic and self.facts.issuperset(passed)

    def _without_proxies(self, call: Any) -> Any:
        """The call with empty tensors and plain numbers for stand-ins: where tensors are, and which constants."""

        def known(one: Any) -> Any:
            return one if not isinstance(one, fx.Proxy) else 0 if one.node in self.facts else torch.empty(0)

        return fx.node.map_aggregate(call, known)

    def _reads(self, value: Any) -> list[Seen]:
        """The tensors in a value, stand-ins and constants, in their order."""
        found: list[Seen] = []

        def look(one: Any) -> Any:
            if isinstance(one, Tensor) or (isinstance(one, fx.Proxy) and one.node not in self.facts):
                found.append(self._seen(one))
            return one

        fx.node.map_aggregate(value, look)
        return found

    def by_old_name(self, node: fx.Node) -> bool:
        """Whether what `node` made was written over in place, which is noted of the calls that did."""
        one: fx.Node | None = node
        while one in self.overwritten:
            self.side_effects.add(self.overwritten[one])
            one = self.renamed.get(one)
        return one is not node

    def _seen(self, value: Any) -> Seen:
        if isinstance(value, fx.Proxy):
            kind = "number" if value.node in self.facts else "Parameter" if value.node.op == "get_attr" else "Tensor"
            if self.by_old_name(value.node):
                return _seen(OUTSIDE, kind)
            return _seen(self.index.get(value.node, OUTSIDE), kind)  # a parameter is made by no call
        return _seen(OUTSIDE, type(value).__name__) if not isinstance(value, Tensor) else _constant(value)


def _seen(source: int, kind: str = "Tensor") -> Seen:
    return Seen(source=source, shape=None, floating=kind in ("Tensor", "Parameter"), type=kind)


def _constant(tensor: Tensor) -> Seen:
    """A tensor that the forward did not compute from its input: a buffer, or one that it makes."""
    return Seen(source=OUTSIDE, shape=None, floating=tensor.is_floating_point(), type="Tensor")


def _in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes over its first argument: `x += y`, `x.relu_()`, `F.relu(x, inplace=True)`."""
    if kwargs.get("inplace") or target in _AUGMENTED:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"


def _parameters(call: Any) -> list[str]:
    """The names of the parameters among what is passed."""
    found: list[str] = []

    def look(one: Any) -> Any:
        if isinstance(one, fx.Proxy) and one.node.op == "get_attr":
            found.append(str(one.node.target))
        return one

    fx.node.map_aggregate(call, look)
    return found


def trace(model: nn.Module) -> Graph | str:
    """The graph of `model` in eval mode without shapes, or why it cannot be traced. The model is left as it was."""
    try:
        return calls_apart(model, lambda shared: _traced(model, shared))
    except _UntraceableError as reason:
        return str(reason)


class _UntraceableError(Exception):
    """Why a forward cannot be traced."""


def _traced(model: nn.Module, shared: frozenset[str]) -> tuple[Graph, set[str]]:
    """(the graph, the `shared` modules that cannot count as functions after all), as record.py has it."""
    tracer = _Tracer(model, shared)
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    with undisturbed(model):
        try:
            traced = tracer.trace(model, concrete_args=defaults or None)
        except Exception as error:
            raise _UntraceableError(f"symbolic tracing failed: {error}".partition("\n")[0]) from error
    outputs: list[int] = []
    for node in traced.find_nodes(op="output"):
        outputs += [tracer.index[one] for one in node.all_input_nodes if one in tracer.index]
        for one in node.all_input_nodes:
            tracer.by_old_name(one)
    graph = Graph(
        nodes=tuple(tracer.nodes),
        outputs=tuple(outputs),
        side_effects=frozenset(tracer.side_effects),
        boundaries={name: tuple(calls) for name, calls in tracer.boundaries.items()},
        operators=tracer.operators.by_name,
        readers_of_parameters={name: tuple(dict.fromkeys(readers)) for name, readers in tracer.parameter_readers.items()},
        shapes=False,
    )
    return graph, tracer.lost
