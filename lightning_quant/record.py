# SPDX-License-Identifier: Apache-2.0
"""Owns recording: one forward, watched, makes a graph.

It runs in eval mode and is watched, not traced: control flow takes the branch that the example input takes, keyword
arguments and nested outputs are as the user wrote them, and nothing of the model is changed when it is over.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant.graph import DROP_FUNCTIONS, OUTSIDE, TAKES_VALUES, Boundary, Graph, Node, Seen, keeps_grid, module_passes
from lightning_quant.keys import INPUT
from lightning_quant.patterns import is_own_part, is_plain_activation
from lightning_quant.sites import Operators, Place, Site, name_of, place
from lightning_quant.targets import Arguments, on_tensors, outputs_of, tensors_in


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
    """Watches modules through global hooks and functions through `__torch_function__`, for the modules of one model.

    `shared`: names of modules whose calls count as calls of the function that they call.
    """

    def __init__(self, model: nn.Module, shared: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.names = {id(module): name for name, module in model.named_modules() if name not in shared}
        self.shared = {id(module): name for name, module in model.named_modules() if name in shared}
        self.through: list[str] = []  # the shared modules under way
        self.lost: set[str] = set()  # shared modules that were called where nothing can find the call again
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
        computing = {self.names[id(part)] for module in computed for part in module.modules()}  # weights, no activations
        self.unreachable = computing | {name for name, module in model.named_modules() if "forward" in vars(module)}
        self.operators = Operators(name for name, _ in model.named_modules())
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
        if id(module) in self.shared:
            self.through.append(self.shared[id(module)])
        elif id(module) in self.names:
            self.owners.append(self.names[id(module)])
            self.begun.append((self.calls, [self.seen(value) for value in args]))
            self.counts.append(Counter())
            self.calls += 1
            self.inside_leaf += id(module) in self.leaves

    def leave(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest`: (keyword arguments, output), or (None,) after an exception, which the model may well catch."""
        kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
        if id(module) in self.shared:
            self.through.pop()
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
            self.leaks += reads if op in TAKES_VALUES else []
            return result
        owner = self.owners[-1] if self.owners else ""
        name = self._named(func, op, () if where is None or owner in self.unreachable else where, args, kwargs)
        for parameter in (one for tensor in read for one in self.parameters.get(id(tensor), ())):
            if parameter.rpartition(".")[0] != owner:
                self.parameter_readers.setdefault(parameter, []).append(name)
        passing = keeps_grid(op, args, kwargs)
        idle = op in DROP_FUNCTIONS
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
        through = self.through[-1] if self.through else ""
        self.lost |= {through} if through and not where else set()
        site = Site(owner=self.owners[-1] if self.owners else "", op=op, place=where, repeat=repeat, through=through)
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


def multiply_adds(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    """What was counted while `model` was called, by the names of modules, "" for it all; two operations are a multiply-add."""
    root, found = type(model).__name__, {}
    for name, counts in counter.get_flop_counts().items():
        own = "" if name == "Global" else name.removeprefix(f"{root}.")
        if name == "Global" or own != name:
            found[own] = sum(counts.values()) // 2
    return found


def _part_of_model(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if getattr(hook, "part_of_model", False))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without its hooks; flags, hooks, buffers, RNG and the attention fast path restored after.

    Hooks with a true attribute `part_of_model` stay: without these the model would compute something else.
    """
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
                module._forward_hooks = _part_of_model(module._forward_hooks)
                module._forward_pre_hooks = _part_of_model(module._forward_pre_hooks)
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
    return calls_apart(model, lambda shared: _recorded(model, example_input, model if entry is None else entry, shared))


def calls_apart(model: nn.Module, run: Callable[[frozenset[str]], tuple[Graph, set[str]]]) -> Graph:
    """The graph in which the calls of shared activations count one by one.

    `run`: makes a graph, given the names of such modules; with it, those among them whose calls nothing can find again.
    """
    graph, _ = run(frozenset())
    shared = _shared_activations(model, graph)
    while shared:
        apart, lost = run(shared)
        if not lost:
            return apart
        shared -= lost
    return graph


def _shared_activations(model: nn.Module, graph: Graph) -> frozenset[str]:
    """The names of activations that are called on what several others made: `self.relu` of a residual block.

    Each call of one is then what the same function would be, called there: fused with the layer before it, rounded on a range
    of its own. A loop's activation, always behind the same layer, is fused with that, however often it is called.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        reads = {graph.before(call.reads[0]) if call.reads else OUTSIDE for call in graph.calls(name)}
        makers = {graph.nodes[index].name if index != OUTSIDE else "" for index in reads}
        if len(makers) > 1 and is_plain_activation(module) and not _HOOKED.intersection(k for k, v in vars(module).items() if v):
            found.add(name)
    return frozenset(found)


_HOOKED = frozenset(["forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])


def _recorded(model: nn.Module, example_input: Any, entry: nn.Module, shared: frozenset[str]) -> tuple[Graph, set[str]]:
    """(the graph of one forward, the `shared` modules that cannot count as functions after all)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = split_example(copied(moved(example_input, device)))
    recorder = _Recorder(model, shared)
    for position, tensor in enumerate(tensors_in((args, kwargs))):
        recorder.add("input", f"input_{position}", "input", (), tensor)
    with undisturbed(model), torch.no_grad():
        before = register_module_forward_pre_hook(recorder.enter)
        after = register_module_forward_hook(recorder.leave, with_kwargs=True, always_call=True)
        try:
            with recorder, _UnseenReads(recorder), torch.compiler.set_stance("force_eager"):
                output = entry(*args, **kwargs)
        finally:
            before.remove()
            after.remove()
            torch_module._global_forward_hooks_with_kwargs.pop(after.id, None)  # torch leaves it, and torch.compile then warns
    made = [recorder.source(tensor) for tensor in tensors_in(output)]
    kept = [tensor for module in model.modules() for tensor in tensors_in(vars(module)) if id(tensor) in recorder.producer]
    leaks = dict.fromkeys([*recorder.leaks, *(recorder.producer[id(tensor)][0] for tensor in kept)])
    graph = Graph(
        nodes=tuple(recorder.nodes),
        outputs=(*made, *(index for index in leaks if index not in made)),
        side_effects=frozenset(recorder.side_effects),
        split=frozenset(recorder.split),
        boundaries={name: tuple(calls) for name, calls in recorder.boundaries.items()},
        operators=recorder.operators.by_name,
        readers_of_parameters={name: tuple(dict.fromkeys(readers)) for name, readers in recorder.parameter_readers.items()},
    )
    return graph, recorder.lost
