# SPDX-License-Identifier: Apache-2.0
"""Owns the recorded forward: which module or functional operator produced and consumed each tensor.

One forward in eval mode is watched, not traced: control flow takes the branch that the example input takes, keyword
arguments and nested outputs are as the user wrote them, and nothing of the model is changed when it is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.keys import INPUT
from lightning_quant.patterns import is_own_part
from lightning_quant.settings import is_kind
from lightning_quant.sites import Operator, Operators, Place, Site, name_of, place
from lightning_quant.targets import Arguments, on_tensors, outputs_of, tensors_in

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
_DROP_FUNCTIONS = frozenset(["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"])
_PASSING_FUNCTIONS = _DROP_FUNCTIONS | frozenset([
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "channel_shuffle", "chunk", "clone", "contiguous",
    "detach", "expand", "expand_as", "flatten", "flip", "getitem", "index_select", "max_pool1d", "max_pool2d", "max_pool3d",
    "movedim", "mT", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "repeat", "repeat_interleave", "reshape",
    "reshape_as", "roll", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T", "tensor_split",
    "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
])
_TAKES_VALUES = frozenset([
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
    return op in _DROP_FUNCTIONS and not (args[2] if len(args) > 2 else kwargs.get("training", True))


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


def split_example(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments from a tensor, a tuple, a dict of keywords or a pair (tuple, dict)."""
    if isinstance(example_input, tuple):
        pair = len(example_input) == 2 and isinstance(example_input[0], tuple) and isinstance(example_input[1], Mapping)
        if pair:
            return tuple(example_input[0]), dict(example_input[1])
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with its tensors on `device`."""
    return on_tensors(lambda tensor: tensor.to(device), value)


def copied(value: Any) -> Any:
    """`value` with clones of its tensors: each owns its storage and nothing more."""
    return on_tensors(lambda tensor: tensor.detach().clone(), value)


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of `module` is one node: torch's own childless layers, what users derive from them and register."""
    if is_own_part(module):
        return True
    if next(module.children(), None) is not None or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return any(base.__module__.startswith("torch.nn.modules") and base is not nn.Module for base in type(module).__mro__)


class _Recorder(TorchFunctionMode):
    """Watches modules through global hooks and functions through `__torch_function__`, for the modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.names = {id(module): name for name, module in model.named_modules()}
        self.leaves = {id(module) for module in model.modules() if is_leaf(module)}
        self.producer: dict[int, tuple[int, int]] = {}  # id of a tensor -> its call, its version after that call
        self.overwritten: dict[int, int] = {}  # id of a tensor -> the call that wrote over it
        self.renamed: dict[int, int] = {}  # id of a tensor that was written over -> id of what it is called since
        self.side_effects: set[int] = set()
        self.writers: dict[int, int] = {}  # storage -> the call that wrote to it last
        self.leaks: list[int] = []  # calls whose values the model takes out of tensors, or keeps
        self.alive: list[Tensor] = []  # a tensor freed during the forward could give its id to another one
        self.owners: list[str] = []
        self.boundaries: dict[str, list[Boundary]] = {}
        self.begun: list[tuple[int, list[Seen]]] = []  # of the calls that are under way: their order, their positional arguments
        self.calls = 0
        self.split: set[int] = set()
        self.inside_leaf = 0
        self.inside_function = 0
        computed = [module for module in model.modules() if isinstance(module, ParametrizationList)]
        self.computing = {self.names[id(part)] for module in computed for part in module.modules()}  # weights, no activations
        self.operators = Operators(self.names.values())
        self.counts: list[Counter[tuple[str, Place]]] = [Counter()]  # of the calls under way: the operators run at a place
        self.parameters: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.parameters.setdefault(id(parameter), []).append(name)
        self.parameter_readers: dict[str, list[str]] = {}

    def add(
        self,
        kind: str,
        name: str,
        op: str,
        read: Any,
        made: Any,
        passing: bool = False,
        reads: Sequence[int] | None = None,
        idle: bool = False,
    ) -> None:
        inputs, outputs = list(tensors_in(read)), list(tensors_in(made))
        if not outputs:
            return
        node = Node(
            index=len(self.nodes),
            kind=kind,
            name=name,
            op=op,
            reads=tuple(map(self.source, inputs)) if reads is None else tuple(reads),
            dims=inputs[0].dim() if inputs else 0,
            passing=passing,
            idle=idle,
            floating=any(tensor.is_floating_point() for tensor in outputs),
        )
        self.nodes.append(node)
        if len(outputs) > 1:
            self.split.add(node.index)
        for tensor in outputs:
            self.producer[id(tensor)] = node.index, tensor._version
            self.alive.append(tensor)

    def source(self, tensor: Tensor, written: bool = False) -> int:
        """The call that made what `tensor` holds now; OUTSIDE if it was written to unseen, through a view or a script.

        `written`: the call at hand has written to it already.
        """
        name: int | None = id(tensor)
        while name in self.overwritten:  # and what was written over that in turn
            self.side_effects.add(self.overwritten[name])
            name = self.renamed.get(name)
        index, version = self.producer.get(id(tensor), (OUTSIDE, 0))
        if written or version == tensor._version:
            return index
        if (writer := self.writers.get(tensor.untyped_storage()._cdata)) is not None:  # through a view of it
            self.side_effects.add(writer)
        return OUTSIDE

    def enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self.names:
            self.owners.append(self.names[id(module)])
            self.begun.append((self.calls, [self.seen(value) for value in args]))
            self.counts.append(Counter())
            self.calls += 1
            self.inside_leaf += id(module) in self.leaves

    def leave(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest`: (keyword arguments, output), or (None,) after an exception, which the model may well catch."""
        kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
        if id(module) not in self.names:
            return output
        self.owners.pop()
        self.counts.pop()
        order, positional = self.begun.pop()
        passed = enumerate(Arguments(type(module)).passed(args, kwargs).items())
        given = {target: positional[i] if i < len(positional) else self.seen(value) for i, (target, value) in passed}
        if id(module) in self.leaves:
            if self.inside_leaf == 1:
                passing, idle = module_passes(module)
                came_in = isinstance(output, Tensor) and any(output is tensor for tensor in tensors_in((args, kwargs)))
                reads = [self.source(tensor, written=came_in) for tensor in tensors_in((args, kwargs))]
                self.add("module", self.names[id(module)], type(module).__name__, (args, kwargs), output, passing, reads, idle)
                if came_in and not passing:  # an in-place ReLU
                    output = self._renamed(output)
            self.inside_leaf -= 1
        made = {target: self.seen(value) for target, value in outputs_of(output).items()}
        boundary = Boundary(order=order, inputs=given, outputs=made)
        self.boundaries.setdefault(self.names[id(module)], []).append(boundary)
        return output

    def seen(self, value: Any) -> Seen:
        if not isinstance(value, Tensor):
            return Seen(source=OUTSIDE, shape=None, floating=False, type=type(value).__name__)
        index, version = self.producer.get(id(value), (OUTSIDE, 0))
        source = index if version == value._version else OUTSIDE  # written to unseen, through a view or a script
        kind = "Parameter" if id(value) in self.parameters else "Tensor"
        return Seen(source=source, shape=tuple(value.shape), floating=value.is_floating_point(), type=kind)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        where = None if self.inside_leaf else place(known=lambda module: id(module) in self.names)
        read = [] if self.inside_leaf else list(tensors_in((args, kwargs)))
        reads = [self.source(tensor) for tensor in read]
        versions = {id(tensor): tensor._version for tensor in read}
        inputs = {f"{INPUT}{index or ''}": self.seen(tensor) for index, tensor in enumerate(read)}
        self.inside_function += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside_function -= 1
        op = name_of(func)
        made = args[0] if op == "setitem" else result
        if self.inside_leaf or not any(True for _ in tensors_in(made)):
            self.leaks += reads if op in _TAKES_VALUES else []
            return result
        owner = self.owners[-1] if self.owners else ""
        name = self._named(func, op, () if where is None or owner in self.computing else where, args, kwargs)
        for parameter in (one for tensor in read for one in self.parameters.get(id(tensor), ())):
            if parameter.rpartition(".")[0] != owner:
                self.parameter_readers.setdefault(parameter, []).append(name)
        passing = keeps_grid(op, args, kwargs)
        idle = op in _DROP_FUNCTIONS
        if idle:  # F.dropout drops unless it is told that training is over
            with torch._C.DisableTorchFunction():
                passing = idle = torch.equal(result, args[0] if args else kwargs["input"])
        unchanged = isinstance(result, Tensor) and versions.get(id(result), -1) == result._version
        if unchanged and len(read) == 1:  # `x.to(device)`, `x.float()`, `x.contiguous()` of what is so already
            passing = idle = True
        self.add("function", name, op, (args, kwargs), made, passing, reads, idle)
        if isinstance(result, Tensor) and versions.get(id(result), result._version) != result._version:  # written in place
            result = self._renamed(result)
        outputs = {target: self.seen(value) for target, value in outputs_of(made if op == "setitem" else result).items()}
        self.boundaries.setdefault(name, []).append(Boundary(order=self.calls, inputs=inputs, outputs=outputs))
        self.calls += 1
        return result

    def _named(self, func: Any, op: str, where: Place, args: Any, kwargs: Any) -> str:
        self.counts[-1][op, where] += 1
        repeat = self.counts[-1][op, where] - 1
        site = Site(owner=self.owners[-1] if self.owners else "", op=op, place=where, repeat=repeat)
        return self.operators.name(site, func, args, kwargs)

    def _renamed(self, tensor: Tensor) -> Tensor:
        """What the last node wrote in place, as another object: so it shows who uses the old one."""
        self.overwritten[id(tensor)] = self.writers[tensor.untyped_storage()._cdata] = len(self.nodes) - 1
        self.inside_function += 1
        with torch._C.DisableTorchFunction():
            alias = tensor.view_as(tensor)
        self.inside_function -= 1
        self.producer[id(alias)] = len(self.nodes) - 1, alias._version
        self.renamed[id(tensor)] = id(alias)
        self.alive.append(alias)
        return alias


class _UnseenReads(TorchDispatchMode):
    """Records operators that reach tensors past `__torch_function__`, as scripted functions do: they read, too."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if recorder.inside_leaf or recorder.inside_function:
            return func(*args, **kwargs)
        reads = [recorder.source(tensor) for tensor in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        recorder.add("function", str(func), str(func), (args, kwargs), result, False, reads)
        return result


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without its hooks; flags, hooks, buffers, RNG and the attention fast path restored after."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules]
    buffers = [(module, key, b, b.detach().clone()) for module in modules for key, b in module._buffers.items() if b is not None]
    bounded = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None]
    tables = [(module.weight, module.weight.detach().clone()) for module in bounded]  # their forward rewrites it
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it would run a whole encoder layer without its submodules
            for module in modules:
                module.training = False
                module._forward_hooks, module._forward_pre_hooks = type(hooks[0][0])(), type(hooks[0][1])()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, flag, (after, before) in zip(modules, training, hooks, strict=True):
                module.training, module._forward_hooks, module._forward_pre_hooks = flag, after, before
            with torch.no_grad():
                for weight, saved in tables:
                    weight.copy_(saved)
                for module, key, buffer, saved in buffers:
                    module._buffers[key] = buffer  # the forward may have put another tensor there
                    buffer.copy_(saved)


def record(model: nn.Module, example_input: Any, *, entry: nn.Module | None = None) -> Graph:
    """Run one forward in eval mode and return what was called on what.

    Args:
        model: any module; left exactly as it was (flags, hooks, buffers, random state).
        example_input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict).
        entry: the submodule to call instead of `model`; names stay those of `model`.

    Raises:
        Exception: whatever the forward raises.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = split_example(copied(moved(example_input, device)))
    recorder = _Recorder(model)
    for position, tensor in enumerate(tensors_in((args, kwargs))):
        recorder.add("input", f"input_{position}", "input", (), tensor)
    with undisturbed(model), torch.no_grad():
        before = register_module_forward_pre_hook(recorder.enter)
        after = register_module_forward_hook(recorder.leave, with_kwargs=True, always_call=True)
        try:
            with recorder, _UnseenReads(recorder), torch.compiler.set_stance("force_eager"):
                output = (entry or model)(*args, **kwargs)
        finally:
            before.remove()
            after.remove()
    made = [recorder.source(tensor) for tensor in tensors_in(output)]
    kept = [tensor for module in model.modules() for tensor in tensors_in(vars(module)) if id(tensor) in recorder.producer]
    leaks = dict.fromkeys([*recorder.leaks, *(recorder.producer[id(tensor)][0] for tensor in kept)])
    return Graph(
        nodes=tuple(recorder.nodes),
        outputs=(*made, *(index for index in leaks if index not in made)),
        side_effects=frozenset(recorder.side_effects),
        split=frozenset(recorder.split),
        boundaries={name: tuple(calls) for name, calls in recorder.boundaries.items()},
        operators=recorder.operators.by_name,
        readers_of_parameters={name: tuple(dict.fromkeys(readers)) for name, readers in recorder.parameter_readers.items()},
    )
