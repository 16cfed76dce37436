# SPDX-License-Identifier: Apache-2.0
"""Owns ONNX: a program as QuantizeLinear and DequantizeLinear around float operators, which runtimes make integer kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_quant.config import ConfigError

OPSET = 21


def require(*modules: str) -> list[Any]:
    """The modules, imported; a ConfigError that says what to install where one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ONNX export needs the package {error.name!r}, which is not installed: pip install 'lightning_quant[onnx]'."
        ) from error


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program to `path`."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["output"] if len(program.graph_signature.user_outputs) == 1 else None,
            custom_translation_table=_onnx_translations(),
            verbose=False,
        )
    assert exported is not None
    _tidy(exported.model.graph)
    exported.save(path)


def _tidy(graph: Any) -> None:
    """Drop the build machine's stack traces, keep neighbouring grids apart, give every layer a weight and zero point of its own.

    The exporter merges equal constants (batch norms of one width have equal integers); onnxruntime's exact-sums pass rewrites
    those of each layer in place and fails on one that two layers share.
    """
    (ir,) = require("onnx_ir")
    taken: set[str] = set()
    for node in list(graph):
        _pool_for_mean(graph, node)
    for node in list(graph):
        if uses := _apart(node):
            value = uses[0][0].inputs[uses[0][1]]
            barrier = ir.node("Max", [value])  # of one: nothing is fused through it
            graph.insert_after(value.producer(), barrier)
            for user, slot in uses:
                user.replace_input_with(slot, barrier.outputs[0])
        for part in (node, *node.outputs):
            part.metadata_props.clear()
        _unmerge(graph, node, taken)


def _unmerge(graph: Any, node: Any, taken: set[str]) -> None:
    """Give the DequantizeLinear of a layer's weight a zero point of its own, and a weight, if an equal one was merged with it."""
    (ir,) = require("onnx_ir")
    zero = node.inputs[2] if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 else None
    if zero is None or zero.const_value is None or not zero.is_initializer() or zero.dtype != ir.DataType.INT8:
        return
    multiplied = any(user.op_type in ("Conv", "Gemm") for user, _ in node.outputs[0].uses())
    stem = node.inputs[0].name
    for slot, kind in ((2, "_zero_point"), (0, "")):
        value = node.inputs[slot]
        if value.name in taken and (slot or multiplied):
            names = itertools.chain([f"{stem}{kind}"], (f"{stem}{kind}_{count}" for count in itertools.count(1)))
            name = next(name for name in names if name not in graph.initializers)
            own = ir.Value(name=name, const_value=value.const_value, type=value.type, shape=value.shape)
            graph.register_initializer(own)
            node.replace_input_with(slot, own)
        if slot or multiplied:
            taken.add(value.name)


def _pool_for_mean(graph: Any, node: Any) -> None:
    """GlobalAveragePool for a mean over all but the first two dimensions: runtimes have it on integers, ReduceMean not."""
    (ir,) = require("onnx_ir")
    if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return
    shape, axes = node.inputs[0].shape, sorted(int(axis) for axis in node.inputs[1].const_value.numpy().ravel())
    rank = 0 if shape is None else len(shape)
    if rank < 3 or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return
    keeps = node.attributes.get("keepdims")
    pooled = ir.node("GlobalAveragePool", [node.inputs[0]])
    graph.insert_before(node, pooled)
    if keeps is None or keeps.value:
        node.outputs[0].replace_all_uses_with(pooled.outputs[0])
        last = pooled
    else:
        wanted = ir.Value(name=f"{node.name}_axes", const_value=ir.tensor(list(range(2, rank)), dtype=ir.DataType.INT64))
        graph.register_initializer(wanted)
        last = ir.node("Squeeze", [pooled.outputs[0], wanted])
        graph.insert_before(node, last)
        node.outputs[0].replace_all_uses_with(last.outputs[0])
    last.outputs[0].name = node.outputs[0].name
    for index, output in enumerate(graph.outputs):
        if output is node.outputs[0]:
            graph.outputs[index] = last.outputs[0]
    graph.remove(node)


_MOVES = ("Concat", "Expand", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def _apart(node: Any) -> list[tuple[Any, int]]:
    """The uses of a tensor that onnxruntime must not fuse with what makes it: (node, input), all of one tensor.

    Fused, a grid behind another grid would be rescaled, which moves levels; a float layer between grids would get integer
    weights of onnxruntime's own; and a stored parameter that is a factor in float arithmetic would have the other factor
    rounded to 8 bits (MatMulNBits), or its scales of rows taken for those of columns.
    """
    if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
        return list(node.outputs[0].uses()) if _multiplied(node.outputs[0]) else []
    source = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
    if source is not None and source.op_type == "DequantizeLinear":
        pairs = zip(node.inputs[1:3], source.inputs[1:3], strict=True)
        return [(node, 0)] if any(a is not b and (a.const_value.numpy() != b.const_value.numpy()).any() for a, b in pairs) else []
    return [(node, 0)] if node.op_type != "MatMul" and _in_floats(node) and _dequantized(node.inputs[0]) else []


def _in_floats(node: Any) -> bool:
    """Whether a node is a product in float arithmetic: not that of an integer layer, which is known by its int32 bias."""
    bias = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and str(bias and bias.inputs[0].dtype) != "INT32"


def _dequantized(value: Any) -> bool:
    source = value.producer()
    kind = None if source is None else source.op_type
    return kind == "DequantizeLinear" or (kind in _MOVES and _dequantized(source.inputs[0]))


def _multiplied(value: Any) -> bool:
    return any(_in_floats(u) or (u.op_type in _MOVES and any(map(_multiplied, u.outputs))) for u, _ in value.uses())


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs what it skips and, inside, uses what torch itself deprecates: no user can act on it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"torch.onnx cannot translate the model: {error.__cause__ or error} Write .pt2, or no file.") from error
    finally:
        logging.disable(level)


@functools.cache
def _onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our operators as QuantizeLinear / DequantizeLinear around float Conv and Gemm: what runtimes turn into integer kernels.

    A weight's zero point is explicit even where it is 0 (onnxruntime fuses QGemm only then), bias is int32 behind a
    DequantizeLinear with s_x * s_w, and a clip that saturation does not do is a Clip on integers, behind the fused kernel.
    """
    np, onnx, onnxscript = require("numpy", "onnx", "onnxscript")
    op = onnxscript.opset21

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))

    def quantize(x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
        dtype = np.uint8 if high <= 255 else np.uint16
        if dtype == np.uint16 and (low, high) != (0, 65535):
            # onnxruntime has no Clip of uint16; before the division it is as exact: (n s) / s rounds to n.
            ends = ((end - zero_point) * np.float32(scale) for end in (low, high))
            x = op.Clip(x, *(constant(end, np.float32) for end in ends))
        q = op.QuantizeLinear(x, constant(scale, np.float32), constant(zero_point, dtype))
        return q if (low, high) == (0, 255) or dtype == np.uint16 else op.Clip(q, constant(low, dtype), constant(high, dtype))

    def dequantize(q: Any, scale: Any, zero: Any) -> Any:
        return op.DequantizeLinear(q, constant(scale, np.float32), constant(zero, q.dtype.numpy()))

    def dequantize_weight(q: Any, scale: Any, zero_point: Any) -> Any:
        shape, steps = list(q.shape), list(scale.shape)
        if len(steps) < 2 and steps in ([], shape[:1]):
            zero = constant(np.zeros(steps), q.dtype.numpy()) if zero_point is None else zero_point
            return op.DequantizeLinear(q, scale, zero, axis=0)
        # One scale a block: along every dimension its blocks, then the places in a block.
        split = [part for size, blocks in zip(shape, steps, strict=True) for part in (blocks, size // blocks)]

        def spread(values: Any) -> Any:
            return op.Reshape(values, constant([part for blocks in values.shape for part in (blocks, 1)], np.int64))

        w = op.Reshape(op.Cast(q, to=1), constant(split, np.int64))
        if zero_point is not None:
            w = op.Sub(w, op.Cast(spread(zero_point), to=1))
        return op.Reshape(op.Mul(w, spread(scale)), constant(shape, np.int64))

    def round_blocks(x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
        least, most = (op.Sub(constant(end, np.float32), zero_point) for end in (low, high))
        return op.Mul(op.Min(op.Max(op.Round(op.Div(x, scale)), least), most), scale)

    def operands(head: Sequence[Any]) -> tuple[Any, Any, Any]:
        q, x_scale, x_zero_point, weight, scale, zero_point, bias = head
        b = op.DequantizeLinear(bias, op.Mul(constant(x_scale, np.float32), scale), axis=0)
        return dequantize(q, x_scale, x_zero_point), dequantize_weight(weight, scale, zero_point), b

    def requantize(y: Any, tail: Sequence[Any]) -> Any:
        scale, zero_point, low, high, _ = tail
        return y if scale is None else quantize(y, scale, zero_point, low, high)

    def conv(*arguments: Any) -> Any:
        stride, padding, dilation, groups = arguments[7:11]
        geometry = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        return requantize(op.Conv(*operands(arguments[:7]), **geometry), arguments[11:])

    def linear(*arguments: Any) -> Any:
        return requantize(op.Gemm(*operands(arguments[:7]), transB=1), arguments[7:])

    ops = torch.ops.lightning_quant
    return {
        ops.quantize.default: quantize,
        ops.dequantize.default: dequantize,
        ops.dequantize_weight.default: dequantize_weight,
        ops.round_blocks.default: round_blocks,
        ops.conv.default: conv,
        ops.linear.default: linear,
    }


def unshared_weights(path: Path) -> bytes:
    """The file's model with every weight read once: onnxruntime's exact-sums pass fails on a layer that is called twice."""
    (onnx,) = require("onnx")
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    seen: set[str] = set()
    for position, node in reversed(list(enumerate(model.graph.node))):
        for slot, name in enumerate(node.input):
            if name in seen and name in dequantized:
                again = f"{name}/again_{position}"  # no exporter writes such a name
                copy = model.graph.node.add()
                copy.CopyFrom(dequantized[name])
                copy.name, copy.output[0], node.input[slot] = again, again, again
                for part, source in enumerate(copy.input):
                    tensor = model.graph.initializer.add()
                    tensor.CopyFrom(stored[source])
                    tensor.name = copy.input[part] = f"{source}/again_{position}"
                model.graph.node.remove(copy)
                model.graph.node.insert(position, copy)
            seen.add(name)
    return bytes(model.SerializeToString())
