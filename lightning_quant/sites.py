# SPDX-License-Identifier: Apache-2.0
"""Owns operators that a forward calls as functions (`F.relu(x)`, `a + b`): their names, and their places in the code.

A place is the chain of code positions from the operator up to the module's forward. It tells two additions of one forward
apart whatever branch was taken before them, in training and in eval, and needs no edit of that forward.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from lightning_quant.targets import on_tensors, tensors_in

Place = tuple[tuple[str, int, int], ...]
# The frames between a call of a module and its forward: `_call_impl`, and a function inside it where there are hooks.
_CALL = nn.Module._call_impl.__code__
MODULE_CALL = frozenset({_CALL, *(part for part in _CALL.co_consts if isinstance(part, CodeType))})
# In a place: a call of a module that counts as the function it calls. One that the forward has made itself and no model holds,
# `nn.ReLU()(x)`, or a shared activation, which has this key in its `__dict__` while the model is prepared.
MADE_HERE = ("", 0, 0)
SHARED = "_lightning_quant_shared"
_ON_THE_WAY = ("torch.fx.", "torch._dynamo.", "torch.overrides", "lightning_quant.symbolic")  # _dynamo wraps fx's trace
_SYNONYMS = {"concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub", "truediv": "div", "clip": "clamp"}


def always(_: Any) -> bool:
    """That any module counts."""
    return True


def place(
    until: CodeType | None = None, ends: frozenset[CodeType] = MODULE_CALL, known: Callable[[Any], bool] = always
) -> Place | None:
    """Where the code is that runs the operator at hand, from there up to a forward; the caller is a `__torch_function__`.

    `until`: the frame in which the search ends. None if a module is called in between: then the operator is that module's.
    Without `until`, the innermost call of a module ends it (or what else `ends` has); None if there is a checkpoint on the way,
    whose second run, in backward, is not under that forward, or a compiled function, which will not call Python. `known`:
    whether a module counts; others are code like any.
    """
    found: list[tuple[str, int, int]] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is until:
            return tuple(found)
        name = frame.f_globals.get("__name__", "")
        if code in ends:
            if known is always or known(frame.f_locals.get("self")):
                return tuple(found) if until is None else None
            found += [MADE_HERE] * (code is _CALL)
        elif until is None and (name == "torch.utils.checkpoint" or code.co_name == "compile_wrapper"):
            return None
        elif not name.startswith(_ON_THE_WAY):  # how torch got here
            found.append((code.co_name, code.co_firstlineno, frame.f_lasti))
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=4096)
def name_of(func: Any) -> str:
    """'add' for torch.add, Tensor.add_, `a + b`, `a += b` and `1 + a`: one name for one operator."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return plain_name(name)


def plain_name(name: str) -> str:
    """The operator's name: 'add' for '__iadd__', 'add_' and '__radd__'."""
    name = name.strip("_")
    for prefix in ("i", "r"):
        if name[:1] == prefix and name[1:] in {"add", "sub", "mul", "div", "truediv", "floordiv", "matmul", "pow", "mod"}:
            name = name[1:]
    return _SYNONYMS.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an operator is called: by which module, which operator, at which place, the how manyth time there.

    `through`: the module that stands for the operator, an activation that is called at several places; '' for a function.
    """

    owner: str
    op: str
    place: Place
    repeat: int
    through: str = ""


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in a recorded call."""

    index: int


def with_tensors(call: Any, tensors: Sequence[Tensor]) -> Any:
    """`call` (nested tuples, lists, dicts) with its tensors replaced, in their order."""
    remaining = iter(tensors)
    return on_tensors(lambda _: next(remaining), call)


class Operator(nn.Module):
    """A recorded call of an operator as a module: named, matched and fused like one; called, it does the operator's work.

    Its class is made for the operator (`add`), so that a config's `op_types` finds it. It is never part of a model.

    Args:
        site: where it is called.
        function: what was called, with which positional and keyword arguments (Slots in place of tensors).
    """

    def __init__(self, site: Site, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.site, self.function = site, function
        slots = itertools.count()
        self.call = on_tensors(lambda _: Slot(next(slots)), (tuple(args), dict(kwargs)))
        self.count = len(list(tensors_in((args, kwargs))))
        self.eval()

    def forward(self, *tensors: Tensor) -> Any:
        """The recorded call on other tensors."""
        args, kwargs = _filled(self.call, tensors)
        return self.function(*args, **kwargs)

    def constant(self, position: int, name: str, default: Any) -> Any:
        """A constant of the call, by the position and the name that its argument has."""
        args, kwargs = self.call
        return args[position] if position < len(args) else kwargs.get(name, default)

    def is_called_so(self, args: Any, kwargs: Any) -> bool:
        """Whether a call of an activation has the constants of the recorded one; it may work in place or not."""
        slots = itertools.count()
        here = on_tensors(lambda _: Slot(next(slots)), (tuple(args), dict(kwargs)))
        return bool(_without_switches(here) == _without_switches(self.call))

    def extra_repr(self) -> str:
        """Its owner."""
        return f"in {self.site.owner or 'the model'}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_operator, (self.site.op,), self.__getstate__()


def _without_switches(call: Any) -> Any:
    args, kwargs = call
    return [one for one in args if not isinstance(one, bool)], {k: one for k, one in kwargs.items() if not isinstance(one, bool)}


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, Mapping):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_filled(item, tensors) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, tensors) for item in value)
    return value


@functools.cache
def operator_type(op: str) -> type[Operator]:
    """The class of an operator's calls."""
    return type(op, (Operator,), {"__doc__": f"A call of {op}."})


def _empty_operator(op: str) -> Operator:
    cls = operator_type(op)
    return cls.__new__(cls)


def is_operator(module: nn.Module) -> bool:
    """Whether a named thing is an operator that a forward calls as a function."""
    return isinstance(module, Operator)


class Operators:
    """Names for what is called as a function: one for each site, none that a module has."""

    def __init__(self, modules: Any) -> None:
        self.taken = set(modules)
        self.names: dict[Site, str] = {}
        self.by_name: dict[str, Operator] = {}

    def name(self, site: Site, function: Callable[..., Any], args: Any, kwargs: Any) -> str:
        """The name of the operator at `site`: `layer1.0.add`, the second of its forward `layer1.0.add_1`.

        The calls of a module that stands for one are numbered from 1 on: `layer1.0.relu_1` is the first call of `layer1.0.relu`.
        """
        if site not in self.names:
            stem = site.through or (f"{site.owner}.{site.op}" if site.owner else site.op)
            name, count = stem, 0
            while name in self.taken:
                count += 1
                name = f"{stem}_{count}"
            self.taken.add(name)
            self.names[site] = name
            if site.place:  # else nothing can find it again
                self.by_name[name] = operator_type(site.op)(site, function, args, kwargs)
        return self.names[site]
