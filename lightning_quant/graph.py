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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.settings import is_kind
from lightning_quant.targets import Arguments, on_tensors, outputs_of, tensors_in

OUTSIDE = -1
# What leaves every value on its grid: it moves, drops or repeats values but makes no new ones. In eval mode, for dropout.
_PASSING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
# fmt: off
_PASSING_FUNCTIONS = frozenset([
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "channel_shuffle", "clone", "contiguous",
    "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "flatten", "max_pool1d", "max_pool2d", "max_pool3d",
    "movedim", "permute", "pixel_shuffle", "pixel_unshuffle", "reshape", "squeeze", "swapaxes", "t", "transpose",
    "unflatten", "unsqueeze", "view",
])
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call. kind: 'input', 'module' or 'function'; op: type or function name; reads: producers, OUTSIDE for others.

    `dims`: the number of dimensions of the first tensor read; `passing`: leaves values on the grid they came with.
    """

    index: int
    kind: str
    name: str
    op: str
    reads: tuple[int, ...]
    dims: int
    passing: bool


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
    """The calls of one forward, in order, and which of them the model returned.

    `boundaries`: every module's calls, by its name. `side_effects`: calls that wrote over a tensor which was then used by the
    name it had before: `self.relu(x); use(x)`. `split`: nodes that made several tensors, which their number does not tell apart.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    side_effects: frozenset[int] = frozenset()
    split: frozenset[int] = frozenset()
    boundaries: Mapping[str, tuple[Boundary, ...]] = dataclasses.field(default_factory=dict)

    def calls(self, name: str) -> list[Node]:
        """Every call of the module `name`, in order."""
        return [node for node in self.nodes if node.kind == "module" and node.name == name]

    def readers(self, index: int) -> list[Node]:
        """The calls that read the result of node `index`, once for each."""
        return [node for node in self.nodes if index in node.reads]

    def origin(self, index: int) -> int:
        """The node whose values arrive at node `index`: through pools, reshapes and whatever else makes none."""
        while index != OUTSIDE and self.nodes[index].passing and self.nodes[index].reads:
            index = self.nodes[index].reads[0]
        return index

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


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of `module` is one node: torch's own childless layers and what users derive from them."""
    if next(module.children(), None) is not None or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return any(base.__module__.startswith("torch.nn.modules") and base is not nn.Module for base in type(module).__mro__)


class _Recorder(TorchFunctionMode):
    """Watches modules through global hooks and functions through `__torch_function__`, for the modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.names = {id(module): name for name, module in model.named_modules()}
        self.leaves = {id(module) for module in model.modules() if _is_leaf(module)}
        self.producer: dict[int, tuple[int, int]] = {}  # id of a tensor -> its call, its version after that call
        self.overwritten: dict[int, int] = {}  # id of a tensor -> the module call that wrote over it
        self.side_effects: set[int] = set()
        self.alive: list[Tensor] = []  # a tensor freed during the forward could give its id to another one
        self.owners: list[str] = []
        self.boundaries: dict[str, list[Boundary]] = {}
        self.begun: list[tuple[int, list[Seen]]] = []  # of the calls that are under way: their order, their positional arguments
        self.calls = 0
        self.split: set[int] = set()
        self.inside_leaf = 0
        self.inside_function = 0
        self.counts: Counter[str] = Counter()

    def add(
        self, kind: str, name: str, op: str, read: Any, made: Any, passing: bool = False, reads: Sequence[int] | None = None
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
        if id(tensor) in self.overwritten:
            self.side_effects.add(self.overwritten[id(tensor)])
        index, version = self.producer.get(id(tensor), (OUTSIDE, 0))
        return index if written or version == tensor._version else OUTSIDE

    def enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self.names:
            self.owners.append(self.names[id(module)])
            self.begun.append((self.calls, [self.seen(value) for value in args]))
            self.calls += 1
            self.inside_leaf += id(module) in self.leaves

    def leave(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest`: (keyword arguments, output), or (None,) after an exception, which the model may well catch."""
        kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
        if id(module) not in self.names:
            return output
        self.owners.pop()
        order, positional = self.begun.pop()
        passed = enumerate(Arguments(type(module)).passed(args, kwargs).items())
        given = {target: positional[i] if i < len(positional) else self.seen(value) for i, (target, value) in passed}
        if id(module) in self.leaves:
            if self.inside_leaf == 1:
                passing = any(is_kind(module, cls) for cls in _PASSING_MODULES)
                came_in = isinstance(output, Tensor) and any(output is tensor for tensor in tensors_in((args, kwargs)))
                reads = [self.source(tensor, written=came_in) for tensor in tensors_in((args, kwargs))]
                self.add("module", self.names[id(module)], type(module).__name__, (args, kwargs), output, passing, reads)
                if came_in and not passing:
                    # An in-place ReLU: its result goes on as another object, so that it shows who uses the old one.
                    self.overwritten[id(output)] = len(self.nodes) - 1
                    output = output.view_as(output)
                    self.producer[id(output)] = len(self.nodes) - 1, output._version
                    self.alive.append(output)
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
        return Seen(source=source, shape=tuple(value.shape), floating=value.is_floating_point(), type="Tensor")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [] if self.inside_leaf else [self.source(tensor) for tensor in tensors_in((args, kwargs))]
        self.inside_function += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside_function -= 1
        if not self.inside_leaf:
            op = _plain_name(func)
            made = args[0] if op == "setitem" else result
            if any(True for _ in tensors_in(made)):
                owner = self.owners[-1] if self.owners else ""
                stem = f"{owner}.{op}" if owner else op
                name = f"{stem}_{self.counts[stem]}" if self.counts[stem] else stem
                self.counts[stem] += 1
                passing = op in _PASSING_FUNCTIONS
                if passing and op.startswith("dropout"):  # F.dropout drops unless it is told that training is over
                    with torch._C.DisableTorchFunction():
                        passing = torch.equal(result, args[0] if args else kwargs["input"])
                self.add("function", name, op, (args, kwargs), made, passing, reads)
        return result


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


def _plain_name(func: Any) -> str:
    """'add' for torch.add, Tensor.add_, `a + b`, `a += b` and `1 + a`: one name for one operator."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    name = name.strip("_")
    for prefix in ("i", "r"):
        if name[:1] == prefix and name[1:] in {"add", "sub", "mul", "div", "truediv", "floordiv", "matmul", "pow", "mod"}:
            return name[1:]
    return name


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
    made = tuple(recorder.source(tensor) for tensor in tensors_in(output))
    return Graph(
        nodes=tuple(recorder.nodes),
        outputs=made,
        side_effects=frozenset(recorder.side_effects),
        split=frozenset(recorder.split),
        boundaries={name: tuple(calls) for name, calls in recorder.boundaries.items()},
    )
