# SPDX-License-Identifier: Apache-2.0
"""Owns ONNX: a program as QuantizeLinear and DequantizeLinear around float operators, which runtimes make integer kernels."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_quant.config import ConfigError
from lightning_quant.onnx_forms import look_up_integers, pool_for_mean, turn_keys
from lightning_quant.onnx_notes import (
    APART,
    CLASSES,
    NOTE,
    PRODUCTS,
    give_name,
    innermost,
    input_grids,
    last_of,
    name_batch,
    np_info,
    output_names,
    require,
    sizes_of,
    whole_module,
    work_of,
)

OPSET = 21


@dataclass(frozen=True, kw_only=True)
class Style:
    """What differs between files for one runtime and another; the integers are the same in all.

    `signed`: activations as int8 with the zero point moved by 128, else uint8. `float_clips`: an activation that saturation does
    not do is a Relu or Clip in front of QuantizeLinear, else one on integers behind it. `float_biases`: float32, else int32.
    `packed`: weights whose integers fit into 4 bits are stored as INT4 and widened when the file is loaded.
    """

    signed: bool = False
    float_clips: bool = False
    float_biases: bool = False
    packed: bool = False


def write_onnx(program: torch.export.ExportedProgram, path: Path, style: Style, notes: Mapping[str, str]) -> None:
    """Write a program to `path`; `notes` become metadata of the file, beside the work of each node."""
    (passes,) = require("onnx_ir.passes.common")
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=output_names(program),
            custom_translation_table=_onnx_translations(style),
            verbose=False,
        )
    assert exported is not None
    graph = exported.model.graph
    whole = _tidy(graph)
    passes.RemoveUnusedNodesPass()(exported.model)
    if not any(node.op_type in ("Loop", "If", "Scan") for node in graph):  # of what is inside these it infers other types
        passes.ShapeInferencePass()(exported.model)
    if style.packed:
        _pack(graph)
    name_batch(graph)
    exported.model.metadata_props.update({f"{NOTE}{key}": value for key, value in notes.items()})
    exported.model.metadata_props[f"{NOTE}multiply_adds"] = json.dumps(work_of(graph, sizes_of(graph, program)))
    exported.model.metadata_props[f"{NOTE}whole"] = json.dumps(whole)
    exported.model.metadata_props[f"{NOTE}inputs"] = json.dumps(input_grids(graph))
    exported.save(path)


def _tidy(graph: Any) -> list[str]:
    """Name nodes by their modules, drop the build machine's stack traces, keep neighbouring grids apart, unmerge constants.

    The exporter merges equal constants (batch norms of one width have equal integers); onnxruntime's exact-sums pass rewrites
    those of each layer in place and fails on one that two layers share. Returns the modules that compute in float as a whole.
    """
    (ir,) = require("onnx_ir")
    rounding = (n for n in graph if n.op_type in ("QuantizeLinear", "DequantizeLinear") and not n.inputs[0].is_initializer())
    taken = {node.inputs[2].name for node in rounding}  # a weight's zero point must not be an activation's, either
    for node in list(graph):
        pool_for_mean(graph, node)
        look_up_integers(graph, node)
        _stay_on_grid(graph, node)
        turn_keys(graph, node)
    for node in list(graph):
        if node.op_type == "Clip" and (_is_needless(node) or _is_cut(node)):
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)
        _drop_pair(graph, node)
    names: dict[str, int] = {}
    whole: set[str] = set()
    for node in list(graph):
        give_name(node, names)
        if (name := whole_module(node)) is not None:
            whole.add(name)
    barriers: dict[str, int] = {}
    for node in list(graph):
        if uses := _apart(node):
            value = uses[0][0].inputs[uses[0][1]]
            count = barriers[value.producer().name] = barriers.get(value.producer().name, 0) + 1
            name = f"{value.producer().name}{f'/{count}' if count > 1 else ''}{APART}"
            barrier = ir.node("Max", [value], name=name)  # of one: nothing is fused through it
            barrier.outputs[0].type, barrier.outputs[0].shape = value.type, value.shape
            graph.insert_after(value.producer(), barrier)
            for user, slot in uses:
                user.replace_input_with(slot, barrier.outputs[0])
        for part in (node, *node.outputs):
            part.metadata_props.clear()
        _unmerge(graph, node, taken)
        if node.op_type == "QuantizeLinear":  # the exporter takes the program's word for it
            for made in (node, *(user for user, _ in node.outputs[0].uses() if user.op_type == "Clip")):
                made.outputs[0].type = ir.TensorType(node.inputs[2].dtype)
    return sorted(whole)


# -- rewriting --------------------------------------------------------------------------------------------------------------


def _pack(graph: Any) -> None:
    """Store weights that fit into 4 bits as INT4: onnxruntime widens them once, when it loads the file, to its int8 kernels."""
    (ir,) = require("onnx_ir")
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.INT8 or not any(n.op_type == "DequantizeLinear" and not slot for n, slot in value.uses()):
            continue
        integers = value.const_value.numpy()
        if integers.size < 2 or integers.min() < -8 or integers.max() > 7:
            continue
        packed = ir.tensor(integers, dtype=ir.DataType.INT4, name=f"{name}_int4")
        stored = ir.Value(name=packed.name, const_value=packed, type=ir.TensorType(ir.DataType.INT4), shape=value.shape)
        uses = list(value.uses())
        graph.register_initializer(stored)
        wide = ir.node("Cast", [stored], {"to": int(ir.DataType.INT8)}, name=f"{uses[0][0].name}/widen")
        graph.insert_before(graph[0], wide)
        for user, slot in uses:
            user.replace_input_with(slot, wide.outputs[0])
        del graph.initializers[name]
        wide.outputs[0].name = name
        wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(ir.DataType.INT8), value.shape


def _is_needless(clip: Any) -> bool:
    """Whether a Clip of floats in front of a grid cuts what comes from the same grid and was cut as far there."""
    users = [user for user, _ in clip.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "QuantizeLinear":
        return False
    grid = [value.const_value.numpy() for value in users[0].inputs[1:3]]
    low, high = (value.const_value.numpy() for value in clip.inputs[1:3])
    source = clip.inputs[0].producer()
    while source is not None:
        if source.op_type == "DequantizeLinear":
            same = [value.const_value is not None for value in source.inputs[1:3]] == [True, True] and all(
                bool((value.const_value.numpy() == mine).all()) for value, mine in zip(source.inputs[1:3], grid, strict=True)
            )
            if not same:
                return False
        elif source.op_type == "Relu":
            return bool(low <= 0)
        elif source.op_type == "Clip":
            least, most = (value.const_value.numpy() for value in source.inputs[1:3])
            return bool(low <= least and most <= high)
        elif source.op_type not in (*_MOVES, "QuantizeLinear"):
            return False
        source = source.inputs[0].producer()
    return False


def _is_cut(clip: Any) -> bool:
    """Whether a Clip reads a Clip that cuts as much."""
    source = clip.inputs[0].producer()
    if source is None or source.op_type != "Clip":
        return False
    least, most, low, high = (value.const_value.numpy() for one in (source, clip) for value in one.inputs[1:3])
    return bool(low <= least and most <= high)


def _drop_pair(graph: Any, node: Any) -> None:
    """Let what reads integers that were dequantized and put on the same grid again read them as they were.

    onnxruntime drops such pairs itself; OpenVINO computes some of them.
    """
    source = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
    if source is None or source.op_type != "DequantizeLinear" or _grids_differ(node, source):
        return
    node.outputs[0].replace_all_uses_with(source.inputs[0])
    graph.remove(node, safe=True)
    if not source.outputs[0].uses() and not source.outputs[0].is_graph_output():
        graph.remove(source, safe=True)


def _grids_differ(node: Any, source: Any) -> bool:
    """Whether scale or zero point of two nodes are other numbers."""
    pairs = zip(node.inputs[1:3], source.inputs[1:3], strict=True)
    return any(a is not b and (a.const_value.numpy() != b.const_value.numpy()).any() for a, b in pairs)


def _ends_in_grids(value: Any) -> bool:
    """Whether all that reads a value rounds it to a grid, or moves it to where that happens."""
    users = [user for user, _ in value.uses()]
    moves = (user.op_type in _MOVES and _ends_in_grids(user.outputs[0]) for user in users if user.op_type != "QuantizeLinear")
    return bool(users) and all(moves)


def _stay_on_grid(graph: Any, node: Any) -> None:
    """A pool of integers gives integers, whoever reads them: say so by a grid behind it, or onnxruntime pools in float."""
    (ir,) = require("onnx_ir")
    source = node.inputs[0].producer() if node.op_type == "MaxPool" else None
    if source is None or source.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
        return
    grid, uses = list(source.inputs[1:3]), list(node.outputs[0].uses())
    if _ends_in_grids(node.outputs[0]):
        return
    q = ir.node("QuantizeLinear", [node.outputs[0], *grid])
    back = ir.node("DequantizeLinear", [q.outputs[0], *grid])
    for made, like in ((q, source.inputs[0]), (back, node.outputs[0])):
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].type, made.outputs[0].shape = like.type, node.outputs[0].shape
    graph.insert_after(node, [q, back])
    for user, slot in uses:
        user.replace_input_with(slot, back.outputs[0])


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


_MOVES = ("Concat", "Expand", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def _apart(node: Any) -> list[tuple[Any, int]]:
    """The uses of a tensor that onnxruntime must not fuse with what makes it: (node, input), all of one tensor.

    Fused, a grid behind another grid would be rescaled, which moves levels; a float layer between grids would get integer
    weights of onnxruntime's own; a stored parameter that is a factor in float arithmetic would have the other factor
    rounded to 8 bits (MatMulNBits), or its scales of rows taken for those of columns; and QLinearSoftmax, whose table of float32
    powers reaches 3.4e38 / (148 n) for rows of n, overflows to 0 on a grid whose step is below 1 / (148 n), one of nearly even
    attention, say (and rounds the reciprocal of the step down).
    """
    if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
        return list(node.outputs[0].uses()) if _multiplied(node.outputs[0]) else []
    source = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
    if source is not None and source.op_type == "Softmax":
        return [(node, 0)]
    if source is not None and source.op_type == "DequantizeLinear":
        return [(node, 0)] if _grids_differ(node, source) else []
    return [(node, 0)] if node.op_type != "MatMul" and _in_floats(node) and _dequantized(node.inputs[0]) else []


def _in_floats(node: Any) -> bool:
    """Whether a node is a product in float arithmetic: not that of an integer layer, which one of our operators was."""
    return node.op_type in PRODUCTS and not str(last_of(node, CLASSES)).startswith("lightning_quant.")


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
        raise ConfigError(f"torch.onnx cannot translate the model: {innermost(error)} Write .pt2, or no file.") from error
    finally:
        logging.disable(level)


@functools.cache
def _onnx_translations(style: Style) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our operators as QuantizeLinear / DequantizeLinear around float Conv and Gemm: what runtimes turn into integer kernels.

    A weight's zero point is explicit even where it is 0 (onnxruntime fuses QGemm only then), bias is int32 behind a
    DequantizeLinear with s_x * s_w, and a clip that saturation does not do is a Clip on integers, behind the fused kernel.
    """
    np, onnx, onnxscript = require("numpy", "onnx", "onnxscript")
    op = onnxscript.opset21

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))

    def grid(high: Any) -> tuple[Any, int, int, int]:
        """(dtype, its ends, what is taken off an unsigned integer)."""
        name, shift = ("int8", 2**7) if high <= 255 else ("int16", 2**15)
        dtype = np.dtype(name if style.signed else f"u{name}")
        return dtype, *np_info(dtype), shift if style.signed else 0

    def quantize(x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
        dtype, least, most, shift = grid(high)
        x = x if x.dtype in (None, 1) else op.Cast(x, to=1)  # float32, as in our operator
        zero, ends = zero_point - shift, (low - shift, high - shift)
        whole = ends == (least, most)
        if not whole and (style.float_clips or dtype.itemsize > 1):
            # onnxruntime has no Clip of uint16, others none of any integer; before the division it is as exact: (n s) / s rounds
            # to n.
            below, above = (constant((end - zero) * np.float32(scale), np.float32) for end in ends)
            x = op.Relu(x) if ends == (zero, most) else op.Clip(x, below, above)
            whole = True
        q = op.QuantizeLinear(x, constant(scale, np.float32), constant(zero, dtype))
        return q if whole else op.Clip(q, *(constant(end, dtype) for end in ends))

    def dequantize(q: Any, scale: Any, zero: Any) -> Any:
        dtype, _, _, shift = grid(255 if q.dtype.itemsize == 1 else 65535)
        return op.DequantizeLinear(q, constant(scale, np.float32), constant(zero - shift, dtype))

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
        step = op.Mul(constant(x_scale, np.float32), scale)
        b = op.Mul(op.Cast(bias, to=1), step) if style.float_biases else op.DequantizeLinear(bias, step, axis=0)
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
