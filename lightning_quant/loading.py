# SPDX-License-Identifier: Apache-2.0
"""Owns what comes back: `load_deployed`, and the `.pt` file, which is written only if the same model comes back from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import lightning_quant.operators  # noqa: F401  (registers what saved programs call)
from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of
from lightning_quant.files import as_path, packed, read_program, read_weights, unpacked, write_weights
from lightning_quant.group import own_class
from lightning_quant.manifest import LAYERS, manifest_of, rebuilt, rebuilt_from
from lightning_quant.parity import ParityError, ParityReport, outputs_of, outputs_parity


def write_numbers(deployed: nn.Module, beside: Path, target: Path, example_input: Any) -> ParityReport:
    """Write state dict and manifest of a deployed model to `beside`, which is to become `target`, and read them back.

    Returns:
        The outputs for `example_input`, if there is one, of what came back: all equal.

    Raises:
        ParityError: if what comes back is not the same model, bit for bit.
    """
    state, small = packed(
        {key: value.cpu() if isinstance(value, Tensor) else value for key, value in deployed.state_dict().items()}
    )
    write_weights({"manifest": manifest_of(deployed), "state": state, "packed": small}, beside)
    found = read_weights(beside)
    back = rebuilt_from(deployed, found["manifest"], unpacked(found["state"], found["packed"]))
    here = copy_of(deployed).to("cpu")
    problem, outputs = _not_the_same(back, here), []
    if not problem and example_input is not None:
        mine, theirs = (outputs_of(model, example_input) for model in (back, here))
        outputs = outputs_parity("file, deployed", mine, theirs, [])
        if len(mine) != len(theirs) or not all(map(_is_same, mine, theirs)):
            problem = "the model gives other numbers on the example input"
    if problem:
        raise ParityError(f"{target.name}: read back, {problem}; nothing was written to {target}. Write a .pt2 file instead.")
    return ParityReport(file=target.name, layers=(), outputs=tuple(outputs))


def _not_the_same(found: nn.Module, wanted: nn.Module) -> str:
    """What is not bit for bit what it was; nothing if all is."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    keys = [key for key in {**theirs, **ours} if not _is_same(ours.get(key), theirs.get(key))]
    if keys:
        return f"{keys[0]!r} is not what it was"
    return "" if repr(found) == repr(wanted) else "a layer is not what it was"


def _is_same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


class DeployedProgram(nn.Module):
    """An exported program as a module of an ordinary evaluation loop: `eval()` does nothing, `train()` is refused.

    It moves between devices, its tensors as what the program makes anew; its dtypes are those of its operators and stay.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program, self.training = program.module(), False
        signature = program.module_call_graph[0].signature
        names = [] if signature is None else list(signature.forward_arg_names or [])
        spec = program.call_spec.in_spec
        number, more = (0, 0) if spec is None else (spec.child(0).num_children, spec.child(1).num_children)
        self.named = len({*names}) == number + more  # not those of a forward with *args
        self.by_position, self.by_name = names[:number], names[number:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program. What the example input gave by position may come by name.

        Raises:
            ConfigError: for arguments that the example input had not, or had by name and are given by position.
        """
        if not self.named:
            return self.program(*args, **kwargs)
        missing = self.by_position[len(args) :]
        if len(args) > len(self.by_position) or {*kwargs} != {*missing, *self.by_name}:
            takes = [*self.by_position, *(f"{name}=" for name in self.by_name)]
            gets = [*("a value" for _ in args), *(f"{name}=" for name in kwargs)]
            raise ConfigError(
                f"the program takes ({', '.join(takes)}), what its example input had, and got ({', '.join(gets)}). Give these."
            )
        return self.program(*args, *(kwargs[name] for name in missing), **{name: kwargs[name] for name in self.by_name})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tensors = [*self.program.parameters(), *self.program.buffers()]
        if any(fn(tensor.new_empty(0)).dtype != tensor.dtype for tensor in tensors):
            raise ConfigError(
                "a loaded program keeps its dtypes: its operators and scales were made for them. Move it between devices "
                "alone, or convert the model to another dtype before it is exported."
            )
        super()._apply(fn, recurse)
        if isinstance(self.program, torch.fx.GraphModule):
            _make_on(self.program, fn(torch.empty(0)).device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        if mode:
            raise ConfigError("a loaded program cannot be trained; train the model that it was converted from.")
        return self


def _make_on(program: torch.fx.GraphModule, device: torch.device) -> None:
    """Have a program keep its constants on this device, and make what it makes anew there (`torch.arange`, say).

    torch.export wrote down the device of the trace, and holds constants beside the buffers.
    """

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    changed = False
    for node in program.graph.nodes:
        if node.op == "get_attr":
            place, _, name = node.target.rpartition(".")
            holder = program.get_submodule(place)
            if isinstance(held := vars(holder).get(name), Tensor):
                setattr(holder, name, held.to(device))
        before = (node.args, node.kwargs)
        node.args, node.kwargs = (torch.fx.node.map_aggregate(part, there) for part in before)
        changed = changed or (node.args, node.kwargs) != before
    if changed:
        program.recompile()


def load_deployed(path: str | os.PathLike[str], *, model: nn.Module | None = None, example_input: Any = None) -> nn.Module:
    """The model in a `.pt2` or `.pt` file that `export_model` wrote, on the CPU, in eval mode.

    A `.pt2` file needs nothing else and gives a module that is always in eval mode; it takes the arguments that the example
    input had: those that were positional by position or by name, the others by name. A `.pt` file has the numbers alone.

    Args:
        path: what `export_model` returned.
        model: for a `.pt` file, the user's net: an instance of the class that was trained, made with the same arguments. The
            result is a deployed copy; `model` is left as it is.
        example_input: for a `.pt` file of a net that calls quantized operators as functions, where its forward cannot be traced:
            what it is called with. It shows where the operators are called.

    Raises:
        ConfigError: if the file is missing, damaged, or none that `export_model` wrote, or if it does not fit `model`. Nothing of
            the file is run.
    """
    source = as_path(path)
    place = f"path {os.fspath(path)!r}"
    if source.suffix not in (".pt2", ".pt"):
        raise ConfigError(f"{place}: load_deployed reads .pt2 and .pt files; run .onnx files in onnxruntime.")
    if not source.is_file():
        raise ConfigError(f"{place}: there is no such file.")
    if (source.suffix == ".pt") != (model is not None):
        needs = (
            "needs model, an instance of the class that was trained" if model is None else "is a model by itself: leave out model"
        )
        raise ConfigError(f"{place}: a {source.suffix} file {needs}.")
    if model is None:
        return DeployedProgram(read_program(source))
    found = read_weights(source)
    _check_class(model, found.get("manifest"), place)
    try:
        return rebuilt(model, found["manifest"], unpacked(found["state"], found["packed"]), example_input=example_input)
    except ConfigError as error:
        raise ConfigError(f"{place}: {_COLOURS.sub('', str(error))}") from error
    except Exception as error:
        text = _COLOURS.sub("", f"{type(error).__name__}: {error}")
        raise ConfigError(f"{place} is no file that export_model wrote, or is damaged: {text}") from error


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # torch colours some of its messages


def _check_class(model: Any, manifest: Any, place: str) -> None:
    """Raise a ConfigError if `model` is no module, or deployed already, or the file is one of a net inside it."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}; give an instance of it" if isinstance(model, type) else f"{model!r}; give one"
        raise ConfigError(f"{place}: model: expected an instance of the class that was trained, got {given}.")
    deployed = next((name for name, one in model.named_modules() if isinstance(one, LAYERS)), None)
    if deployed is not None:
        raise ConfigError(
            f"{place}: model is deployed already ({deployed!r}); give a new instance of the class that was trained."
        )
    kind = manifest.get("model") if isinstance(manifest, dict) else None
    if own_class(model).__name__ != kind:
        inside = [name for name, one in model.named_modules() if name and own_class(one).__name__ == kind]
        if inside:
            raise ConfigError(
                f"{place}: the file was written of a {kind}, which is {inside[0]!r} of this {own_class(model).__name__}; give "
                f"model.{inside[0]}."
            )
