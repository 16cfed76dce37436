# SPDX-License-Identifier: Apache-2.0
"""Owns the account of what onnxruntime runs in int8 and what in float: node by node, by module, why, and what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_quant.config import ConfigError
from lightning_quant.files import as_path
from lightning_quant.onnx_notes import APART, NOTE, module_of, require
from lightning_quant.runtime import optimized_graph
from lightning_quant.tables import html_table, text_table


@dataclass(frozen=True, kw_only=True)
class NodeRun:
    """A node as onnxruntime runs it.

    `module`: of the model, "" for its own forward. `operator`: of onnxruntime (`QLinearConv`). `multiply_adds`: of one sample;
    0 where nothing is multiplied, or a shape is not known. `reason`, `remedy`: why it runs in float, and what would change that.
    """

    module: str
    operator: str
    integer: bool
    multiply_adds: int = 0
    product: bool = False
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class ExecutionReport:
    """What onnxruntime makes of a file; `print(report)` is a table of it, and so is a cell of a notebook.

    Operators that only bring numbers from one form to the other (`QuantizeLinear`, `Cast`, shapes) are left out.
    """

    file: str
    nodes: tuple[NodeRun, ...]

    @property
    def products(self) -> tuple[NodeRun, ...]:
        """The nodes that multiply matrices."""
        return tuple(node for node in self.nodes if node.product)

    @property
    def int8_share(self) -> float:
        """The share of the known multiply-adds that run in int8; 1 where nothing is multiplied."""
        whole = sum(node.multiply_adds for node in self.products)
        return sum(node.multiply_adds for node in self.products if node.integer) / whole if whole else 1.0

    def keeps(self, least: float) -> bool:
        """Whether at least this share runs in int8; not where it cannot be known, because work in float has an unknown shape."""
        unknown = any(not node.integer and not node.multiply_adds for node in self.products)
        return self.int8_share >= least and not (unknown and least > 0)

    def summary(self) -> str:
        """One line."""
        slow = [node for node in self.products if not node.integer]
        number = len(self.products)
        text = f"{number - len(slow)} of {number} products run in int8, {self.int8_share:.1%} of the multiply-adds"
        if unknown := sum(not node.multiply_adds for node in self.products):
            text += f" (without {unknown} whose shape is not known)"
        reasons: dict[str, dict[str, None]] = {}
        for node in slow:
            reasons.setdefault(node.module or "the model", {})[node.reason] = None
        names = ", ".join(f"{name} ({'; '.join(why)})" for name, why in list(reasons.items())[:3])
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return f"{text}; in float: {names}{more}" if slow else text

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows(), right={"multiply-adds"}, notes=[f"{self.file}: {self.summary()}"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows(), right={"multiply-adds"}, notes=[f"{self.file}: {self.summary()}"])

    def _rows(self) -> list[list[str]]:
        return [
            [
                node.module or "(model)",
                node.operator,
                "int8" if node.integer else "float",
                f"{node.multiply_adds:,}" if node.product else "",
                f"{node.reason}; {node.remedy}" if node.remedy else node.reason,
            ]
            for node in self.nodes
        ]


_HEAD = ["module", "operator", "runs in", "multiply-adds", "why, and what to do"]
_INTEGER_PRODUCTS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger")
_MULTIPLY = ("Conv", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention")
# What carries numbers as they come: in int8 where those are.
_CARRIERS = (
    "MaxPool",
    "NhwcMaxPool",
    "Clip",
    "Concat",
    "Max",
    "Resize",
    "Gather",
    "Pad",
    "DepthToSpace",
    "SpaceToDepth",
    "Slice",
)
_SILENT = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "Split", "Tile")
_PLUMBING = (
    "QuantizeLinear",
    "DequantizeLinear",
    "Cast",
    "Shape",
    "Constant",
    "ConstantOfShape",
    "Range",
    "Size",
    "NonZero",
    "ReorderInput",
    "ReorderOutput",
)
_WITH_KERNEL = (
    "Add",
    "Mul",
    "Concat",
    "AveragePool",
    "GlobalAveragePool",
    "Sigmoid",
    "LeakyRelu",
    "Where",
    "Relu",
    "Clip",
)


def execution_report(path: str | os.PathLike[str]) -> ExecutionReport:
    """Which nodes of a `.onnx` file that `export_model` wrote onnxruntime runs in int8, read from the graph it optimizes.

    Raises:
        ConfigError: for a file of another origin, or none.
    """
    source = as_path(path)
    (onnx,) = require("onnx")
    if not source.is_file():
        raise ConfigError(f"path {os.fspath(path)!r}: there is no such file.")
    try:
        model = onnx.load(source)
        notes = {entry.key: entry.value for entry in model.metadata_props}
        work: dict[str, int] = json.loads(notes[f"{NOTE}multiply_adds"])
        whole: list[str] = json.loads(notes.get(f"{NOTE}whole", "[]"))
    except Exception as error:
        raise ConfigError(f"path {os.fspath(path)!r} is no .onnx file that export_model wrote, or is damaged.") from error
    return ExecutionReport(file=source.name, nodes=tuple(_nodes(model.graph, optimized_graph(source), work, whole)))


def _nodes(written: Any, run: Any, work: Mapping[str, int], whole: Sequence[str]) -> list[NodeRun]:
    files = _Graph(written, whole)
    integers, sizes = _integer_values(run), _sizes(run)
    found: list[tuple[int, NodeRun]] = []
    kernels: dict[str, str] = {}
    for node in run.node:
        if any(word in node.op_type for word in _MULTIPLY):
            origin = files.origin(node, work)
            if origin and kernels.get(origin) not in _INTEGER_PRODUCTS:
                kernels[origin] = node.op_type
        elif node.op_type not in (*_PLUMBING, *_SILENT) and not (node.name.endswith(APART) or sizes.issuperset(node.output)):
            integer = node.op_type.startswith("QLinear") or (node.op_type in _CARRIERS and node.input[0] in integers)
            reason, remedy = ("", "") if integer else files.whole_module(node) or files.mixed(node) or _why_float(node.op_type)
            name, place = module_of(node.name) if "/" in node.name else "", files.place(node)
            found.append((place, NodeRun(module=name, operator=node.op_type, integer=integer, reason=reason, remedy=remedy)))
    for name, number in work.items():  # one that is not found by its name has been fused into, or named as, something in float
        node = files.nodes[name]
        kernel = kernels.get(name, node.op_type)
        integer = kernel in _INTEGER_PRODUCTS
        reason, remedy = ("", "") if integer else files.reason(node)
        run_as = NodeRun(
            module=module_of(name),
            operator=kernel,
            integer=integer,
            multiply_adds=number,
            product=True,
            reason=reason,
            remedy=remedy,
        )
        found.append((files.place(node), run_as))
    return [run_as for _, run_as in sorted(found, key=lambda one: one[0])]


def _integer_values(graph: Any) -> set[str]:
    """The names of values that are integers of a grid."""
    (onnx,) = require("onnx")
    types = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    found = {tensor.name for tensor in graph.initializer if tensor.data_type in types}
    for node in graph.node:
        gemm = node.op_type == "QGemm" and len(node.input) > 7
        makes = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear") or gemm
        if makes or (node.op_type in (*_CARRIERS, *_SILENT) and node.input and node.input[0] in found):
            found.update(node.output)
    return found


def _sizes(graph: Any) -> set[str]:
    """The names of values that are computed from shapes and constants alone."""
    (onnx,) = require("onnx")
    whole = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    found = {tensor.name for tensor in graph.initializer if tensor.data_type in whole}
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or (node.input and found.issuperset(name for name in node.input if name)):
            found.update(node.output)
    return found


def _why_float(operator: str) -> tuple[str, str]:
    if operator == "Softmax":  # see _apart in onnx_graph.py
        return "onnxruntime's int8 kernel overflows where probabilities are nearly even", ""
    if operator in _WITH_KERNEL:
        return "not all that it reads and makes is on a grid", "quantize its inputs and its output (op_types, target_names)"
    return "onnxruntime has no int8 kernel for it", ""


class _Graph:
    """The graph of a file: who makes and who reads what."""

    def __init__(self, graph: Any, whole: Sequence[str]) -> None:
        self.whole = whole
        self.nodes = {node.name: node for node in graph.node}
        self.places = {name: place for place, name in enumerate(self.nodes)}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tensor.data_type for tensor in graph.initializer}

    def origin(self, node: Any, work: Mapping[str, int]) -> str:
        """The name of the node that multiplies matrices in the file and that onnxruntime made this one of; it extends names."""
        name = re.sub(r"_token_\d+$", "", node.name)
        while name and name not in work:
            cut = max(name.rfind("/"), name.rfind("_"))
            name = name[:cut] if cut > 0 else ""
        made = (self.makers[value].name for value in node.output if value in self.makers)
        return name or next((one for one in made if one in work), "")

    def place(self, node: Any) -> int:
        """Where in the file a node of the optimized graph belongs; at the end if that is not known."""
        known = [node.name, re.sub(r"_token_\d+$", "", node.name)]
        known += [self.makers[value].name for value in node.output if value in self.makers]
        return next((self.places[name] for name in known if name in self.places), len(self.places))

    def _source(self, name: str) -> Any:
        """What made a value, behind what only moves it."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in (*_SILENT, "Max") and maker.input:
            maker = self.makers.get(maker.input[0])
        return maker

    def reason(self, node: Any) -> tuple[str, str]:
        """(why onnxruntime runs this product in float, what to do)."""
        (onnx,) = require("onnx")
        if whole := self.whole_module(node):
            return whole
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return f"onnxruntime has no int8 kernel for {node.op_type}", "leave it float, or run the file in OpenVINO"
        x, w = (self._source(name) for name in node.input[:2])
        wide = [self.stored.get(one.input[0]) for one in (x, w) if one is not None and one.op_type == "DequantizeLinear"]
        fixed = w is None or (w.op_type == "DequantizeLinear" and w.input[0] in self.stored)
        if onnx.TensorProto.INT16 in wide or self._wide(x):
            return "a grid of more than 8 bits", "8 bits or fewer for its weight and its input"
        if not fixed and (w.op_type != "DequantizeLinear" or x is None or x.op_type != "DequantizeLinear"):
            return "its inputs are not on grids", "select the operator in config_list (op_types: [matmul]), both inputs"
        if w is None or w.op_type != "DequantizeLinear":
            return "its weight is not quantized", "select it in config_list"
        if x is None or x.op_type != "DequantizeLinear":
            return "its input is not on a grid", "add '_input_' to its target_names"
        return self._reason_behind(node)

    def whole_module(self, node: Any) -> tuple[str, str] | None:
        """The same for parts of a module that is one layer to us (`nn.MultiheadAttention`, a type of the user's)."""
        name = module_of(node.name) if "/" in node.name else ""
        if not any(name == one or name.startswith(f"{one}.") for one in self.whole):
            return None
        return "its module computes in float on rounded tensors", "write it as layers and operators (nn.Linear, torch.matmul)"

    def _reason_behind(self, node: Any) -> tuple[str, str]:
        """The same for one whose input and weight are on grids."""
        if node.op_type != "Conv":
            return "its module computes in float on rounded tensors", ""
        behind = ", ".join(dict.fromkeys(reader.op_type for reader in self.readers.get(node.output[0], [])))
        if "QuantizeLinear" not in behind:
            why = f"behind it stands {behind}, not a grid" if behind else "its output is float"
            return why, "add '_output_' to its target_names"
        if mixed := self.mixed(node):
            return mixed
        return "its module computes in float on rounded tensors", "profile='onnxruntime', if the file was written with another"

    def mixed(self, node: Any) -> tuple[str, str] | None:
        """Reason and remedy where all that a node reads and makes is on grids, of signed integers.

        onnxruntime makes them unsigned on CPUs like these, where one operator alone reads them; then types differ.
        """
        (onnx,) = require("onnx")
        here = self.nodes.get(re.sub(r"_token_\d+$", "", node.name))
        if here is None or here.op_type not in (*_WITH_KERNEL, "Conv"):
            return None
        behind = self.readers.get(here.output[0], [])
        ends = [*(self._source(name) for name in here.input if name not in self.stored), *behind]
        if not behind or any(one is None or one.op_type not in ("DequantizeLinear", "QuantizeLinear") for one in ends):
            return None
        if not any(self.stored.get(one.input[2]) == onnx.TensorProto.INT8 for one in behind):
            return None
        return "onnxruntime leaves signed activations that two operators read, and makes the others unsigned", "leave out signed"

    def _wide(self, maker: Any) -> bool:
        """Whether a DequantizeLinear reads integers of 16 bits."""
        (onnx,) = require("onnx")
        types = (onnx.TensorProto.INT16, onnx.TensorProto.UINT16)
        return maker is not None and maker.op_type == "DequantizeLinear" and self.stored.get(maker.input[2]) in types
