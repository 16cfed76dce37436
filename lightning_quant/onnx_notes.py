# SPDX-License-Identifier: Apache-2.0
"""Owns what an .onnx file says of itself: nodes named by their modules, the work of each, the grids of its inputs."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lightning_quant.config import ConfigError


def require(*modules: str) -> list[Any]:
    """The modules, imported; a ConfigError that says what to install where one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ONNX export needs the package {error.name!r}, which is not installed: pip install 'lightning_quant[onnx]'."
        ) from error


def innermost(error: BaseException) -> str:
    """The reason behind the reasons of an error of torch's exporter, as the start of a sentence, without its pointers to logs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n\n")[0] or type(error).__name__
    return text if text.endswith((".", "!")) else f"{text}."


APART = "/apart"  # ends the names of nodes that do nothing
NOTE, _SCOPES, CLASSES = "lightning_quant.", "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"


def notes_in(path: Path) -> dict[str, str]:
    """What `export_model` noted in a file, without the prefix of its keys."""
    (onnx,) = require("onnx")
    props = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key.removeprefix(NOTE): entry.value for entry in props if entry.key.startswith(NOTE)}


def last_of(node: Any, key: str, place: int = -1) -> str:
    """What the exporter noted of where a node comes from: names, or classes, from the model to the operator."""
    noted = ast.literal_eval(node.metadata_props.get(key, "[]"))
    return str(noted[place]) if len(noted) >= -place else ""


def give_name(node: Any, names: dict[str, int]) -> None:
    """`layer1.0.conv1/Conv`: the module, a slash, the operator; a number where a module has several."""
    name = f"{last_of(node, _SCOPES, -2).partition('@')[0]}/{node.op_type}"
    count = names[name] = names.get(name, -1) + 1
    node.name = f"{name}_{count}" if count else name


def whole_module(node: Any) -> str | None:
    """The name of the module around a node that computes in float as a whole, on rounded tensors; None if there is none."""
    names, classes = (ast.literal_eval(node.metadata_props.get(key, "[]")) for key in (_SCOPES, CLASSES))
    found = (name for name, kind in zip(names, classes, strict=False) if str(kind).endswith(".QuantizedModule"))
    return next((str(name) for name in found), None)


def module_of(name: str) -> str:
    """The module of a node that `_name` named, also if onnxruntime has added to its name; "" for the model itself."""
    return name.partition("/")[0]


def output_names(program: torch.export.ExportedProgram) -> list[str] | None:
    """`output`, a dict's keys, `output_0` and on, or both joined; None where something else than tensors is returned."""
    ends = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    spec = program.call_spec.out_spec
    if spec is None or spec.num_leaves != len(ends) or len({getattr(end, "name", None) for end in ends} - {None}) != len(ends):
        return None
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(ends)), spec))[0]
    taken = {node.name for node in program.graph.nodes if node.op != "output"}
    names: list[str] = []
    for path, _ in paths:
        words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        name = "_".join(words if words and not words[0].isdigit() else ["output", *words])
        while name in taken:
            name += "_output"
        taken.add(name)
        names.append(name)
    return names


def name_batch(graph: Any) -> None:
    """Call the free first dimension of the inputs `batch`, wherever it counts."""
    (ir,) = require("onnx_ir")
    free = [value.shape[0].value for value in graph.inputs if value.shape and not isinstance(value.shape[0], int)]
    if not free or free[0] is None or not str(free[0]).isidentifier():
        return
    symbol = re.compile(rf"\b{free[0]}\b")
    for value in (*graph.inputs, *(made for node in graph for made in node.outputs)):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([symbol.sub("batch", dim) if isinstance(dim, str) else dim for dim in dims])


def sizes_of(graph: Any, program: torch.export.ExportedProgram) -> dict[str, int]:
    """The free dimensions of the inputs as they were in the example, the batch (dimension 0) as 1."""
    sizes: dict[str, int] = {}
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    for value in graph.inputs:
        for place, (dim, size) in enumerate(zip(value.shape or (), shapes.get(value.name, ()), strict=False)):
            if not isinstance(dim, int):
                sizes[str(dim.value)] = size.node.hint if place and isinstance(size, torch.SymInt) else 1
    return sizes


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SAME_SHAPE = ("QuantizeLinear", "Clip", "Relu", "Max")
_RECURRENT = ("LSTM", "GRU", "RNN")


def work_of(graph: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Multiply-adds of one sample, by the name of the node, of all nodes that multiply matrices."""
    return {node.name: _multiply_adds(node, sizes) for node in graph if node.op_type in (*PRODUCTS, *_RECURRENT)}


def _multiply_adds(node: Any, sizes: Mapping[str, int]) -> int:
    """0 where a shape is not known."""
    same = [user.outputs[0] for user, slot in node.outputs[0].uses() if user.op_type in _SAME_SHAPE and not slot]
    ends = [_shape(value, sizes) for value in (node.outputs[0], *same)]  # inside an operator the exporter knows less
    shapes = [None if value is None else _shape(value, sizes) for value in node.inputs[:3]]
    shapes.append(next((end for end in ends if end is not None), None))
    x, w, out = shapes[0], shapes[1], shapes[-1]
    if x is None or w is None:
        return 0
    if node.op_type in _RECURRENT:
        steps = x[0] * x[1] if len(x) == 3 else 0
        return steps * sum(math.prod(shape) for shape in shapes[1:3] if shape)
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if out is None:
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(w[1:])
    transposed = node.attributes.get("transA")
    return math.prod(out) * (x[-2] if transposed is not None and transposed.value else x[-1])


def _shape(value: Any, sizes: Mapping[str, int]) -> list[int] | None:
    if value.shape is None or any(not isinstance(dim, int) and dim.value is None for dim in value.shape):
        return None
    (sympy,) = require("sympy")  # torch needs it
    known = {name: sympy.Integer(size) for name, size in sizes.items()}
    found = [dim if isinstance(dim, int) else sympy.sympify(str(dim.value), locals=known) for dim in value.shape]
    return None if any(getattr(dim, "free_symbols", ()) for dim in found) else [int(dim) for dim in found]


def input_grids(graph: Any) -> dict[str, dict[str, Any]]:
    """Scale, zero point and range of each input of the model that is quantized as it comes."""
    grids: dict[str, dict[str, Any]] = {}
    for value in graph.inputs:
        for node, slot in value.uses():
            if node.op_type == "QuantizeLinear" and slot == 0:
                scale, zero = (node.inputs[place].const_value.numpy() for place in (1, 2))
                ends = np_info(zero.dtype)
                low, high = ((end - int(zero)) * float(scale) for end in ends)
                grids[value.name] = {
                    "scale": float(scale),
                    "zero_point": int(zero),
                    "dtype": str(zero.dtype),
                    "range": [low, high],
                }
    return grids


def np_info(dtype: Any) -> tuple[int, int]:
    """The least and the greatest integer of a numpy dtype."""
    (np,) = require("numpy")
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
