# SPDX-License-Identifier: Apache-2.0
"""Owns other forms of the same operators, for which runtimes have kernels on integers, in an .onnx file's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_quant.onnx_notes import require


def look_up_integers(graph: Any, node: Any) -> None:
    """Gather rows of integers and dequantize those, where the exporter dequantizes a whole table at every call."""
    (ir,) = require("onnx_ir")
    table = node.inputs[0].producer() if node.op_type == "Gather" else None
    axis = node.attributes.get("axis")
    if table is None or table.op_type != "DequantizeLinear" or not table.inputs[0].is_initializer() or (axis and axis.value):
        return
    q, scale, zero = table.inputs[0], table.inputs[1], table.inputs[2]
    indices, rank = node.inputs[1], 0 if scale.shape is None else len(scale.shape)
    if rank > 1 or q.shape is None or len(q.shape) != 2:
        return
    made: list[Any] = []

    def add(kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        made.append(ir.node(kind, inputs, attributes or None))
        return made[-1].outputs[0]

    if rank == 0:
        rows = add("DequantizeLinear", [add("Gather", [q, indices], axis=0), scale, zero])
    else:
        last = ir.Value(name=f"{node.outputs[0].name}_last", const_value=ir.tensor([-1], dtype=ir.DataType.INT64))
        graph.register_initializer(last)

        def of_rows(values: Any) -> Any:
            return add("Unsqueeze", [add("Gather", [values, indices], axis=0), last])

        rows = add("Cast", [add("Gather", [q, indices], axis=0)], to=int(ir.DataType.FLOAT))
        if zero.const_value is None or zero.const_value.numpy().any():
            rows = add("Sub", [rows, add("Cast", [of_rows(zero)], to=int(ir.DataType.FLOAT))])
        rows = add("Mul", [rows, of_rows(scale)])
    for one in made:
        one.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    _take_place(graph, node, rows)


def pool_for_mean(graph: Any, node: Any) -> None:
    """GlobalAveragePool for a mean over all but the first two dimensions: runtimes have it on integers, ReduceMean not."""
    (ir,) = require("onnx_ir")
    if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return
    shape, axes = node.inputs[0].shape, sorted(int(axis) for axis in node.inputs[1].const_value.numpy().ravel())
    rank = 0 if shape is None else len(shape)
    if rank < 3 or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return
    keeps = node.attributes.get("keepdims")
    pooled = last = ir.node("GlobalAveragePool", [node.inputs[0]])
    graph.insert_before(node, pooled)
    if keeps is not None and not keeps.value:
        wanted = ir.Value(name=f"{node.name}_axes", const_value=ir.tensor(list(range(2, rank)), dtype=ir.DataType.INT64))
        graph.register_initializer(wanted)
        last = ir.node("Squeeze", [pooled.outputs[0], wanted])
        graph.insert_before(node, last)
    for made in (pooled, last):
        made.metadata_props.update(node.metadata_props)
    _take_place(graph, node, last.outputs[0])


def turn_keys(graph: Any, node: Any) -> None:
    """One Transpose for the keys of attention, where the exporter flattens them, transposes, and reads the old shape again."""
    (ir,) = require("onnx_ir")
    turn = node.inputs[0].producer() if node.op_type == "Reshape" else None
    if turn is None or turn.op_type != "Transpose" or list(turn.attributes["perm"].value) != [0, 2, 1]:  # always written
        return
    flat = turn.inputs[0].producer()
    if flat is None or flat.op_type != "Reshape" or flat.inputs[0].shape is None:
        return
    keys, rank = flat.inputs[0], len(flat.inputs[0].shape)
    rows, columns = [rank - 2], [rank - 1]
    before, after = (_axes_in(one.inputs[1], keys, rank) for one in (flat, node))
    if rank < 3 or before != [None, rows, columns] or after != [list(range(rank - 2)), columns, rows]:
        return
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned = ir.node("Transpose", [keys], {"perm": order})
    turned.metadata_props.update(node.metadata_props)
    graph.insert_before(node, turned)
    _take_place(graph, node, turned.outputs[0])
    turned.outputs[0].shape = ir.Shape([keys.shape[axis] for axis in order])


def _axes_in(shape: Any, value: Any, rank: int) -> list[list[int] | None]:
    """For each part that a shape is put together of: the dimensions of `value` that it holds, None where it is not of those."""
    maker = shape.producer()
    return [] if maker is None or maker.op_type != "Concat" else [_axes_of(part, value, rank) for part in maker.inputs]


def _axes_of(part: Any, value: Any, rank: int) -> list[int] | None:
    cut = part.producer()
    whole = cut.inputs[0].producer() if cut is not None and cut.op_type == "Slice" else None
    if whole is None or whole.op_type != "Shape" or whole.inputs[0] is not value:
        return None
    if "end" in whole.attributes or ("start" in whole.attributes and whole.attributes["start"].value):
        return None
    ends = [end.const_value for end in cut.inputs[1:]]
    if len(ends) not in (2, 3) or any(end is None for end in ends):
        return None
    start, end = (int(one.numpy().item()) for one in ends[:2])
    return list(range(rank))[start:end]


def _take_place(graph: Any, node: Any, value: Any) -> None:
    """Let `value` be what `node` made, under its name, and drop the node."""
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = value
    old.replace_all_uses_with(value)
    value.name = old.name
    inputs = [source for source in node.inputs if source is not None]
    graph.remove(node, safe=True)
    for source in inputs:
        maker = source.producer()
        if maker is not None and maker.op_type == "DequantizeLinear" and not source.uses():
            graph.remove(maker, safe=True)
