# SPDX-License-Identifier: Apache-2.0
"""Owns the program: a deployed model as torch.export's graph, which dimensions are free in it, where its integers are."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import lightning_quant.operators  # noqa: F401  (registers what programs call)
from lightning_quant.config import ConfigError
from lightning_quant.integer import Rounding
from lightning_quant.record import copied, split_example
from lightning_quant.targets import on_tensors, tensors_in


def _two_samples(value: Any, batch: int) -> Any:
    """The first two samples of every tensor with the batch's length, cloned: a slice would drag its whole storage along.

    A batch of one is doubled: torch.export takes a dimension of size 1 for a constant.
    """

    def two(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == batch:
            tensor = (torch.cat([tensor, tensor]) if batch == 1 else tensor)[:2]
        return tensor.detach().clone()

    return on_tensors(two, value)


def _dynamic(value: Any, dim: Any, batch: int, sizes: bool) -> Any:
    """The `dynamic_shapes` of torch.export for one argument: dimension 0 free where it is the batch, 2 and up with `sizes`."""
    if isinstance(value, Mapping):
        return {key: _dynamic(item, dim, batch, sizes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_dynamic(item, dim, batch, sizes) for item in value)
    if not isinstance(value, Tensor) or not value.dim():
        return None
    free = {0: dim} if dim is not None and value.shape[0] == batch else {}
    return (free | dict.fromkeys(range(2, value.dim()), torch.export.Dim.DYNAMIC) if sizes else free) or None


def program_of(
    model: nn.Module, example_input: Any, dynamic_batch: bool, dynamic_size: bool = False
) -> torch.export.ExportedProgram:
    """`model` as torch.export's graph; on the CPU.

    Args:
        model: in eval mode.
        example_input: as in `export_model`; it is cut to two samples where the batch size is free.
        dynamic_batch: dimension 0 is free on every input that shares the length of the first one's.
        dynamic_size: dimensions 2 and up are free on every input.

    Raises:
        ConfigError: if there is no tensor in the example, the forward cannot be exported, or it does not take other sizes.
    """
    args, kwargs = split_example(example_input)
    first = next(tensors_in((args, kwargs)), None)
    if first is None:
        raise ConfigError("example_input: no tensor in it; give what the model is called with.")
    batch = first.shape[0] if first.dim() else -1
    if dynamic_size and all(tensor.dim() < 3 for tensor in tensors_in((args, kwargs))):
        found = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in((args, kwargs)))
        raise ConfigError(
            f"dynamic_size: it leaves dimensions 2 and up free (height and width, or length, behind batch and channels), and the "
            f"example input has none: {found}. Leave dynamic_size out."
        )
    shapes = None
    if dynamic_batch or dynamic_size:
        # By the lengths of the example, before it is cut to two samples: then other inputs may have length 2, too.
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        dim = torch.export.Dim("batch") if dynamic_batch else None
        shapes = {name: _dynamic(value, dim, batch, dynamic_size) for name, value in bound.items()}
    if dynamic_batch:
        args, kwargs = _two_samples(args, batch), _two_samples(kwargs, batch)
    else:
        args, kwargs = copied(args), copied(kwargs)
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except ConfigError:
        raise
    except torch._dynamo.exc.UserError as error:
        free, option = ("free sizes", "dynamic_size") if dynamic_size else ("a free batch size", "dynamic_batch")
        raise ConfigError(
            f"{type(model).__name__} cannot be exported with {free}: {error}. Mend the forward (a size written as a number?) or "
            f"give {option}=False."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"torch.export cannot export {type(model).__name__}: {error}. If its forward fixes the batch size, give "
            "dynamic_batch=False."
        ) from error
    if dynamic_size:
        _check_sizes(program, type(model).__name__, args, kwargs)
    return program


def _check_sizes(program: torch.export.ExportedProgram, name: str, args: Any, kwargs: Any) -> None:
    """Raise a ConfigError unless the program takes twice the size, too.

    torch.export takes a size for free where it is bound to another: height times width, by a layer that reads all pixels.
    """

    def twice(tensor: Tensor) -> Tensor:
        return tensor.repeat(1, 1, *[2] * (tensor.dim() - 2)) if tensor.dim() > 2 else tensor.clone()

    try:
        with torch.no_grad():
            program.module()(*on_tensors(twice, args), **on_tensors(twice, kwargs))
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be exported with free sizes: at twice the example's size it fails ({error}). Have it pool to one "
            "size before what reads all of it (nn.AdaptiveAvgPool2d, say), or give dynamic_size=False."
        ) from error


_KEEPS_VALUES = frozenset(
    f"aten.{name}"
    for name in ("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "alias", "max_pool1d")
) | {"aten.max_pool2d", "aten.max_pool3d", "aten.pixel_shuffle", "aten._unsafe_view", "aten.contiguous"}


def only_integers_meet_grids(program: torch.export.ExportedProgram) -> bool:
    """Whether no float arithmetic stands between one grid and the next."""
    ends = ("lightning_quant.quantize.default", "lightning_quant.round_blocks.default")
    return all(_from_integers(node.args[0]) for node in program.graph.nodes if str(node.target) in ends)


def _from_integers(value: Any) -> bool:
    """Whether a value is an input of the program or lies on a grid already: nothing computes on it in between."""
    while value.op == "call_function" and str(value.target).rpartition(".")[0] in _KEEPS_VALUES:
        value = value.args[0]
    return value.op == "placeholder" or str(value.target) == "lightning_quant.dequantize.default"


# -- its tensors of integers --

_QUANTIZE, _DEQUANTIZE = "lightning_quant.quantize.default", "lightning_quant.dequantize.default"
MAKE_INTEGERS = (_QUANTIZE, "lightning_quant.conv.default", "lightning_quant.linear.default")
INTEGERS = (torch.uint8, torch.uint16)


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A tensor of integers inside a program: its place among those that our operators make, its name, its layer.

    `exact`: it is made of integers, or of an input, by integer arithmetic alone. `steps`: what makes it of the integers before it
    has steps of its own (a comparison, a rounding without integers), where a last bit may count for much.
    """

    place: int
    value: str
    layer: str
    exact: bool = True
    steps: bool = False


def taps_of(program: torch.export.ExportedProgram) -> list[Tap]:
    """The tensors of integers that a program makes, without those that repeat another one's on the same grid."""
    taps: list[Tap] = []
    nodes = [node for node in program.graph.nodes if str(node.target) in MAKE_INTEGERS]
    for place, node in enumerate(nodes):
        if node.meta["val"].dtype not in INTEGERS or (str(node.target) == _QUANTIZE and _repeats(node)):
            continue
        exact = str(node.target) != _QUANTIZE or _from_integers(node.args[0])
        steps = not exact and has_steps([node.args[0]])
        taps.append(Tap(place=place, value=node.name, layer=_layer_of(node), exact=exact, steps=steps))
    return taps


_STEPS = ("round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "floor_divide", "remainder", "fmod")


def has_steps(values: Sequence[Any]) -> bool:
    """Whether what makes these values, of integers on grids and of inputs, jumps: a last bit of a float may count for much."""
    seen: set[torch.fx.Node] = set()
    open_ones = [value for value in values if isinstance(value, torch.fx.Node)]
    while open_ones:
        node = open_ones.pop()
        if node in seen or node.op != "call_function" or str(node.target) in (_DEQUANTIZE, *MAKE_INTEGERS):
            continue
        seen.add(node)
        reads = node.all_input_nodes
        made = list(tensors_in(node.meta.get("val")))
        floats = any(one.is_floating_point() for source in reads for one in tensors_in(source.meta.get("val")))
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if (
            str(node.target) == "lightning_quant.round_blocks.default"
            or name in _STEPS
            or not isinstance(node.target, OpOverload)
        ):
            if node.target is not operator.getitem:
                return True
        elif floats and any(not one.is_floating_point() for one in made):
            return True
        open_ones += reads
    return False


def outputs_have_steps(program: torch.export.ExportedProgram) -> bool:
    """`has_steps` of what the program returns."""
    return has_steps(list(program.graph.output_node().all_input_nodes))


def _repeats(node: torch.fx.Node) -> bool:
    """Whether a quantize node only undoes a dequantize node."""
    source = node.args[0]
    return isinstance(source, torch.fx.Node) and str(source.target) == _DEQUANTIZE and source.args[1:] == node.args[1:3]


def zero_points_of(program: torch.export.ExportedProgram) -> list[tuple[str, int, int]]:
    """(layer, zero point, middle of the grid's dtype) of every activation on a grid."""
    found: list[tuple[str, int, int]] = []
    for node in program.graph.nodes:
        if str(node.target) in MAKE_INTEGERS and node.meta["val"].dtype in INTEGERS:
            zero = node.args[2] if str(node.target) == _QUANTIZE else node.args[-4]
            found.append((_layer_of(node), int(zero), 2**7 if node.meta["val"].dtype == torch.uint8 else 2**15))
    return found


_PART = re.compile(r"\.(end|rounds_(in|out)(\.\d+)?)$")


def _layer_of(node: torch.fx.Node) -> str:
    """The name of the module or operator that a node is of: the plan's, not that of a part of it that rounds."""
    path, kind = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1]
    name = str(path).partition("@")[0]
    return _PART.sub("", name) if str(kind).rstrip("'>").endswith(f".{Rounding.__name__}") else name


def steps_of(program: torch.export.ExportedProgram) -> list[float | None]:
    """For each output the step of its grid, if it has one."""
    nodes = {node.name: node for node in program.graph.nodes}
    ends = [nodes.get(str(name)) for name in program.graph_signature.user_outputs]
    return [float(end.args[1]) if end is not None and str(end.target) == _DEQUANTIZE else None for end in ends]
