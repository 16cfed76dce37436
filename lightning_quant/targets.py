# SPDX-License-Identifier: Apache-2.0
"""Owns what a target's name means for a module: which argument, which output, which parameters; and how to exchange them.

`_input_` is the first argument of forward (`_input_0` is another name for it), `_input_1` the second, `_input_<name>` the
argument of that name, passed by position, by keyword or not at all. `_output_` is the result or the first of several,
`_output_1` the second of a tuple or list, `_output_<key>` an entry of a dict or a field of a dataclass. Everything else is
a parameter by its name in `named_parameters()`; `*` in it stands for any part of a name.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_quant.keys import INPUT, OUTPUT

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def is_input(target: str) -> bool:
    """Whether a target is an argument of forward."""
    return target.startswith(INPUT)


def is_activation(target: str) -> bool:
    """Whether a target is an argument or an output, not a parameter."""
    return target.startswith((INPUT, OUTPUT))


def canonical_output(target: str) -> str:
    """`_output_` for `_output_0`; any other output as it is."""
    return OUTPUT if target == f"{OUTPUT}0" else target


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a forward: `position` among the positional ones, or None; `name`, or None in `*args`."""

    position: int | None
    name: str | None
    default: Any = None

    @property
    def target(self) -> str:
        """Its one name in a plan."""
        return f"{INPUT}{self.name if self.position is None else (self.position or '')}"

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call passes for it, its default where it passes nothing."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name, self.default) if self.name is not None else None

    def replaced(self, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with `value` in its place."""
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), dict(kwargs)
        assert self.name is not None
        return tuple(args), {**kwargs, self.name: value}


class Arguments:
    """The arguments of a forward (a bound method or a class's function, `self` left out), by target."""

    def __init__(self, module_type: type[nn.Module]) -> None:
        try:
            parameters = list(inspect.signature(module_type.forward).parameters.values())
            if not isinstance(inspect.getattr_static(module_type, "forward"), staticmethod):
                del parameters[:1]
        except (AttributeError, TypeError, ValueError):  # a scripted or built-in forward says nothing of its arguments
            parameters = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        named = [p for p in parameters if p.kind in _POSITIONAL]
        plain = [None if p.default is inspect.Parameter.empty else p.default for p in named]
        self.listed = [
            Argument(position=i, name=None if p.kind is inspect.Parameter.POSITIONAL_ONLY else p.name, default=default)
            for i, (p, default) in enumerate(zip(named, plain, strict=True))
        ]
        self.names = [p.name for p in named]
        only = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        self.keyword = {
            p.name: Argument(position=None, name=p.name, default=None if p.default is inspect.Parameter.empty else p.default)
            for p in only
        }
        self.more_positional = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        self.more_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def find(self, target: str) -> Argument | None:
        """The argument that an input target names, or None if forward has no such argument."""
        name = target.removeprefix(INPUT) or "0"
        if name.isdecimal() and len(name) < 4:
            index = int(name)
            if index < len(self.listed):
                return self.listed[index]
            return Argument(position=index, name=None) if self.more_positional else None
        if name in self.names:
            return self.listed[self.names.index(name)]
        if name in self.keyword:
            return self.keyword[name]
        return Argument(position=None, name=name) if self.more_keywords and name.isidentifier() else None

    def passed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call passes, by target, in the order of the signature."""
        found = [*self.listed[: len(args)], *(Argument(position=i, name=None) for i in range(len(self.listed), len(args)))]
        found += [argument for name in kwargs if (argument := self.find(INPUT + name)) is not None]
        return {argument.target: argument.read(args, kwargs) for argument in found}

    def __str__(self) -> str:
        names = [*self.names, *self.keyword] + ["*args"] * self.more_positional + ["**kwargs"] * self.more_keywords
        return ", ".join(names) or "none"


def outputs_of(result: Any) -> dict[str, Any]:
    """What a forward returned, by target."""
    if isinstance(result, Mapping):
        return {f"{OUTPUT}{key}": value for key, value in result.items()}
    if isinstance(result, list | tuple) and not hasattr(result, "_fields"):
        return {f"{OUTPUT}{index or ''}": value for index, value in enumerate(result)}
    if hasattr(result, "_fields"):  # a named tuple: by position and by name
        return {f"{OUTPUT}{index or ''}": value for index, value in enumerate(result)}
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f"{OUTPUT}{field.name}": getattr(result, field.name) for field in dataclasses.fields(result)}
    return {OUTPUT: result}


def output_key(target: str, outputs: Mapping[str, Any]) -> str | None:
    """The key of `outputs_of` that a target names: itself, or for `_output_` the first; None if there is none."""
    if target in outputs:
        return target
    return next(iter(outputs), None) if target == OUTPUT else None


def with_outputs(result: Any, act: Mapping[str, Callable[[Tensor], Tensor]]) -> Any:
    """`result` with the named outputs replaced by `act` of them, where they are floating-point tensors; the same container."""
    outputs = outputs_of(result)
    changed: dict[str, Any] = {}
    for target, change in act.items():
        key = output_key(target, outputs)
        if key is not None and isinstance(outputs[key], Tensor) and outputs[key].is_floating_point():
            changed[key] = change(outputs[key])
    if not changed:
        return result
    if isinstance(result, Mapping):
        clone: Any = copy.copy(result)
        for key in result:
            if f"{OUTPUT}{key}" in changed:
                clone[key] = changed[f"{OUTPUT}{key}"]
        return clone
    new = {**outputs, **changed}
    if isinstance(result, list | tuple):
        return type(result)(*new.values()) if hasattr(result, "_fields") else type(result)(new.values())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        clone = copy.copy(result)
        for key, value in changed.items():
            object.__setattr__(clone, key.removeprefix(OUTPUT), value)  # the dataclass may be frozen
        return clone
    return new[OUTPUT]


def parameters_named(module: nn.Module, target: str) -> list[str]:
    """The parameters of `module` (and its children) that a target names, in their order."""
    if "*" not in target:
        return [target] if any(name == target for name, _ in module.named_parameters(remove_duplicate=False)) else []
    # Of a module that is registered twice, once; of a parameter that two modules hold, in both: each reads its own.
    own = [
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name, parameter in child._parameters.items()
        if parameter is not None
    ]
    return [name for name in own if fnmatch.fnmatchcase(name, target)]


def owner_of(module: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """(the child that holds a parameter, its name there)."""
    path, _, name = parameter.rpartition(".")
    return module.get_submodule(path) if path else module, name


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was given this LightningModule, or a module in it."""
    return model.__dict__.get("_compiler_ctx") is not None or any(isinstance(one, OptimizedModule) for one in model.modules())


def uncompiled_name(name: str) -> str:
    """The name that a module has where `torch.compile(module)` wraps nothing: 'net._orig_mod.conv' -> 'net.conv'."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter that `module` itself holds, also while another tensor hides it; None without one.

    Of one that is being pruned (`torch.nn.utils.prune`), what the mask leaves of it now: the attribute is of the last forward.
    """
    parameter: Tensor | None = module._parameters.get(name)
    if parameter is None and (mask := module._buffers.get(f"{name}_mask")) is not None:
        original = module._parameters.get(f"{name}_orig")
        return None if original is None else original * mask.to(original.dtype)
    return parameter


# -- the tensors of a call ----------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def on_tensors(act: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `act` applied to its tensors, in nested lists, tuples, named tuples and dicts."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, Mapping):
        return {key: on_tensors(act, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_tensors(act, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(on_tensors(act, item) for item in value)
    return value
