# SPDX-License-Identifier: Apache-2.0
"""Owns onnxruntime: sessions whose sums are exact, what each layer returns in them, the graph that they really run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.onnx_notes import require
from lightning_quant.record import split_example
from lightning_quant.targets import tensors_in

# onnxruntime's int8 kernels for CPUs without VNNI add pairs of products in 16 bits and saturate; this option has them add
# exactly there and changes nothing on other CPUs.
EXACT_SUMS = ("session.x64quantprecision", "1")


def onnxruntime_session(path: str | os.PathLike[str], *, exact_sums: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, default optimizations, whose int8 sums are exact on every CPU.

    Without `exact_sums` onnxruntime's defaults hold, which saturate 16-bit sums on CPUs without VNNI.
    """
    return _session(os.fspath(path), exact_sums)


def _session(path: str, exact_sums: bool, more: Sequence[str] = (), optimized: str | None = None) -> Any:
    (runtime,) = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if exact_sums:
        options.add_session_config_entry(*EXACT_SUMS)
    whole: Any = _unshared_weights(path, more) if exact_sums or more else path
    return runtime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])


def runner(
    path: Path, *, exact_sums: bool = True, more: Sequence[str] = ()
) -> Callable[[Any], tuple[list[Tensor], list[Tensor]]]:
    """What calls a file with an example input and returns (its outputs, the values named `more`)."""
    session = _session(os.fspath(path), exact_sums, more)
    feeds, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    wanted = [name for name in outputs if name not in more] + list(more)

    def run(example_input: Any) -> tuple[list[Tensor], list[Tensor]]:
        arrays = {name: tensor.numpy() for name, tensor in _by_name(example_input, feeds).items()}
        found = [torch.as_tensor(array) for array in session.run(wanted, arrays)]
        place = len(found) - len(more)
        return found[:place], found[place:]

    return run


def _by_name(example_input: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of an example input for a file's inputs: keyword arguments by their names, in any order, others in theirs."""
    args, kwargs = split_example(example_input)
    given = [("", tensor) for tensor in tensors_in(args)] + [pair for key, value in kwargs.items() for pair in _named(key, value)]
    known: dict[str, Tensor] = {}
    rest: list[Tensor] = []
    for name, tensor in given:
        if name in names and name not in known:
            known[name] = tensor
        else:
            rest.append(tensor)
    free = [name for name in names if name not in known]
    return known | dict(zip(free, rest, strict=True))


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument, named as torch.export names inputs: `batch` and its key `ids` make `batch_ids`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}_{key}", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named(f"{name}_{place}", item)
    else:
        for tensor in tensors_in(value):
            yield "", tensor


def made_in(path: Path, names: Collection[str]) -> list[str]:
    """Those of the names that a node of the file makes and that are no outputs of it already, in the order of the file."""
    (onnx,) = require("onnx")
    graph = onnx.load(path, load_external_data=False).graph
    outputs = {value.name for value in graph.output}
    return [name for node in graph.node for name in node.output if name in names and name not in outputs]


def optimized_graph(path: Path, *, exact_sums: bool = False) -> Any:
    """The graph (an onnx GraphProto) that onnxruntime runs after its own optimizations."""
    (onnx,) = require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        _session(os.fspath(path), exact_sums, optimized=str(target))
        return onnx.load(target).graph


def _unshared_weights(path: str, more: Sequence[str]) -> bytes:
    """The file's model with every weight read once: onnxruntime's exact-sums pass fails on a layer that is called twice.

    `more`: values to return beside its outputs.
    """
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
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    return bytes(model.SerializeToString())
