# SPDX-License-Identifier: Apache-2.0
"""Owns the teacher: where it comes from, and its forward, which leaves it and the student as they were."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of
from lightning_quant.distillation import imported
from lightning_quant.group import own_class
from lightning_quant.keys import closest
from lightning_quant.record import undisturbed
from lightning_quant.targets import on_tensors, tensors_in

SELF = "self"


def checked_teacher(teacher: Any) -> Any:
    """`teacher` if it can be one.

    A module; the path of a LightningModule's checkpoint, which is loaded with the class of the student's LightningModule;
    `{"class_path": "package.module.Class", "ckpt_path": path}` for one of another class; "self" for the student as it is,
    float, when training begins.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(teacher, nn.Module) or (isinstance(teacher, str | os.PathLike) and str(teacher)):
        return teacher
    if isinstance(teacher, Mapping):
        keys = ("class_path", "ckpt_path")
        if set(teacher) != set(keys) or not all(isinstance(teacher[key], str | os.PathLike) for key in keys):
            raise ConfigError(f"teacher: expected a dict of class_path and ckpt_path, both strings, got {dict(teacher)!r}.")
        return dict(teacher)
    raise ConfigError(
        "teacher: expected a module, the path of a checkpoint, {'class_path': ..., 'ckpt_path': ...} or 'self', got "
        f"{teacher!r}."
    )


def found_teacher(teacher: Any, model: nn.Module, entry: str) -> tuple[nn.Module, nn.Module]:
    """(the teacher, the module of it that is called with the input).

    Of a LightningModule the module with the name of the student's is called, where it has one: what `training_step` calls may be
    `self.net`. Of any other module its own forward is.

    Raises:
        ConfigError: if a checkpoint cannot be loaded, or the teacher shares parameters with the student.
    """
    if isinstance(teacher, str) and teacher == SELF:
        module = model.get_submodule(entry)
        found = in_trainer(copy_of(module._orig_mod if isinstance(module, OptimizedModule) else module), model)
        return found, found
    if isinstance(teacher, nn.Module):
        found = teacher
        student = {id(parameter) for parameter in model.get_submodule(entry).parameters() if parameter.requires_grad}
        shared = [name for name, parameter in found.named_parameters() if id(parameter) in student]
        if shared:
            raise ConfigError(
                f"teacher: it has parameters of the student ({', '.join(shared[:3])}), which training moves; give teacher='self' "
                "for the student as it is when training begins, or a copy.deepcopy. A teacher that is a module of the student's "
                "own must not train: teacher.requires_grad_(False)."
            )
    else:
        cls, path = own_class(model), teacher
        if isinstance(teacher, Mapping):
            cls, path = imported(teacher["class_path"], "teacher['class_path']"), teacher["ckpt_path"]
        found = in_trainer(_loaded(cls, path, isinstance(teacher, Mapping)), model)
    inner = dict(found.named_modules()).get(entry) if entry and hasattr(found, "training_step") else None
    return found, found if inner is None else inner


def in_trainer(found: nn.Module, model: nn.Module) -> nn.Module:
    """`found`, made here: its forward may ask the Trainer of `model` for the epoch, say, and what it logs goes nowhere."""
    for module in found.modules():
        if "_trainer" in module.__dict__:
            module.__dict__["_trainer"] = model.__dict__.get("_trainer")
            module.__dict__.update(log=_nothing, log_dict=_nothing)
    return found


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _loaded(cls: Any, path: Any, named: bool) -> nn.Module:
    """A LightningModule from its checkpoint, with the random state of the run as it was."""
    if not hasattr(cls, "load_from_checkpoint"):
        raise ConfigError(f"teacher: {getattr(cls, '__name__', cls)} has no load_from_checkpoint; give the teacher as a module.")
    if not Path(path).is_file():
        folder = Path(path).parent
        near = closest(Path(path).name, [one.name for one in folder.iterdir()]) if folder.is_dir() else []
        hint = f" Close: {', '.join(map(repr, near))}." if near else ""
        raise ConfigError(f"teacher: there is no checkpoint {str(path)!r}.{hint}")
    options: dict[str, Any] = {"map_location": "cpu"}
    if "weights_only" in inspect.signature(cls.load_from_checkpoint).parameters:  # Lightning 2.5 lacks it
        options["weights_only"] = True
    try:
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = cls.load_from_checkpoint(path, **options)
    except Exception as error:
        other = "" if named else " If it is of another class, give {'class_path': ..., 'ckpt_path': ...}."
        raise ConfigError(
            f"teacher: {str(path)!r} cannot be loaded as a {cls.__name__}: {type(error).__name__}: "
            f"{str(error).strip(' .')}.{other} Or give the "
            "teacher as a module."
        ) from error
    return module


# -- its forward --------------------------------------------------------------------------------------------------------


class Teacher:
    """A teacher at work: in eval mode, without gradients, where the student is; `leave` undoes all of it.

    Without gradients by `no_grad`, not by `inference_mode`: tensors of the latter cannot be kept for the student's backward.

    Args:
        module: the teacher.
        called: the module of it that is called.
        like: a parameter of the student: its device and dtype.
    """

    def __init__(self, module: nn.Module, called: nn.Module, like: Tensor | None) -> None:
        self.module, self.called = module, called
        self.modules = list(module.modules())
        self.modes = [one.training for one in self.modules]
        tensors = list(chain(module.parameters(), module.buffers()))
        self.devices = {tensor.device for tensor in tensors}
        floating = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        self.dtype = floating.dtype if floating is not None and like is not None and floating.dtype != like.dtype else None
        self.eager = False
        self.writes: bool | None = None  # whether it writes over what it is given; unknown before its first forward
        if like is not None and self.devices - {like.device} and len(self.devices) == 1:
            module.to(like.device)
        module.eval()

    def show(self, tapped: Iterable[nn.Module]) -> None:
        """Have these modules be called: compiled code around one has the hooks of when it was compiled, a validation's say."""
        compiled = [one for one in self.modules if isinstance(one, OptimizedModule) or one._compiled_call_impl is not None]
        inside = {id(module) for one in compiled for module in one.modules() if module is not one or one._compiled_call_impl}
        self.eager = any(id(module) in inside for module in tapped)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One forward on what the student is called with, in the student's autocast; what is of interest is tapped."""
        if any(one.training for one in self.modules):  # part of the user's module, say, which `train()` reaches
            with self._evaluating():
                self(args, kwargs)
            return
        eager = torch.compiler.set_stance("force_eager") if self.eager else contextlib.nullcontext()
        with torch.no_grad(), _every_layer(), eager:
            if self.dtype is not None:
                args, kwargs = on_tensors(lambda x: x.to(self.dtype) if x.is_floating_point() else x, (args, kwargs))
            given = [] if self.writes is False else list(tensors_in((args, kwargs)))
            before = [(tensor, tensor._version, tensor.clone()) for tensor in given]
            self.called(*args, **kwargs)
            self.writes = False
            for tensor, version, values in before:
                if tensor._version != version:  # the student reads it, too
                    self.writes = True
                    tensor.copy_(values)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [one.training for one in self.modules]
        self.module.eval()
        try:
            yield
        finally:
            for one, mode in zip(self.modules, modes, strict=True):
                one.training = mode

    def leave(self) -> None:
        """Put flags and device back."""
        if len(self.devices) == 1:
            (device,) = self.devices
            if any(tensor.device != device for tensor in chain(self.module.parameters(), self.module.buffers())):
                self.module.to(device)
        for one, mode in zip(self.modules, self.modes, strict=True):
            one.training = mode


@contextlib.contextmanager
def _every_layer() -> Iterator[None]:
    """Within this context torch's encoders call their layers: their fused kernel would not, and has zeros for what is padded."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is in eval mode, without hooks, gradients and compilers; all is as it was afterwards."""
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
