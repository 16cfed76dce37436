# SPDX-License-Identifier: Apache-2.0
"""Owns programs in other people's operators: `quantized_decomposed`, which torchao's lowering for x86 and ExecuTorch read.

A layer becomes dequantize, float convolution, quantize, on float biases: what such a lowering turns into an integer kernel. These
operators multiply by the reciprocal of a scale where ours divide, so that a value near the middle of two levels may come out as
the other one. Scales for blocks, and grids of one bit, have no such operators; they stay torch's own.

Checked with torchao 0.18: `lower_pt2e_quantized_to_x86` makes an integer kernel of every Conv1d, Conv2d and Linear, and what it
makes runs, flattened convolutions included (torchao's own quantizer writes programs that then fail at a view). Transposed and
three-dimensional convolutions stay float there. On a CPU without VNNI its kernels saturate: train weights with 'int7'.

torch registers the operators in `torch.ao.quantization.fx._decomposed`, which torchao imports, too; nothing else of it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.convert import copy_of, replace_module, set_mode
from lightning_quant.direct import carried
from lightning_quant.integer import IntegerLayer, Rounding
from lightning_quant.intercept import operators_aside
from lightning_quant.operators import integer_type
from lightning_quant.quantizers import Grid

DIALECTS = ("lightning_quant", "quantized_decomposed")


def _operators() -> Any:
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def _there_and_back(x: Tensor, grid: Grid, low: int, high: int) -> Tensor:
    """x on its grid, in float32."""
    ops, dtype = torch.ops.quantized_decomposed, integer_type(grid.qmax)
    x = x if x.dtype == torch.float32 else x.float()
    q = ops.quantize_per_tensor(x, grid.scale, grid.zero_point, low, high, dtype)
    back: Tensor = ops.dequantize_per_tensor(q, grid.scale, grid.zero_point, low, high, dtype)
    return back


class _Rounded(nn.Module):
    """A `Rounding` for the whole tensor."""

    def __init__(self, one: Rounding) -> None:
        super().__init__()
        assert one.grid is not None
        self.grid, self.low, self.high = one.grid, one.low, one.high

    def forward(self, x: Tensor) -> Tensor:
        return _there_and_back(x, self.grid, self.low, self.high)


class _Layer(nn.Module):
    """An `IntegerLayer` as float arithmetic between the operators."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.x, self.y, self.geometry, self.rectify = layer.x, layer.y, layer.geometry, layer.rectify
        channels = len(layer.weight)
        zero = torch.zeros(()) if layer.zero_point is None else layer.zero_point
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.scale.expand(channels).clone())
        self.register_buffer("zero_point", zero.to(torch.int64).expand(channels).clone())
        self.register_buffer("bias", (layer.bias.double() * layer.x.scale * layer.scale.double()).to(torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        g, dim = self.geometry, self.weight.dim()
        x = _there_and_back(g.for_kernel(input, dim), self.x, self.x.qmin, self.x.qmax)
        w = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scale, self.zero_point, 0, -128, 127, torch.int8
        )
        if g.kind == "linear":
            out = F.linear(x, w, self.bias)
        else:
            convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dim - 2]
            out = convolve(x, w, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if self.y is not None:
            out = _there_and_back(out, self.y, self.y.clip_low, self.y.clip_high)
        elif self.rectify is not None:
            out = out.clamp(*self.rectify)
        return carried(g.from_kernel(out, input, dim), input.dtype)


def in_quantized_decomposed(deployed: nn.Module) -> nn.Module:
    """A copy of a deployed model that calls the operators of `quantized_decomposed` where it called ours."""
    _operators()
    twin = set_mode(copy_of(deployed), "reference")
    roots = [twin, *(one for module in list(twin.modules()) for one in operators_aside(module))]
    for root in roots:
        for module in list(root.modules()):
            if isinstance(module, IntegerLayer):
                replace_module(root, module, _Layer(module).eval())
            elif isinstance(module, Rounding) and module.grid is not None:
                replace_module(root, module, _Rounded(module).eval())
    return twin


def without_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without quantize operators that read what was just dequantized from the same grid."""
    ops = torch.ops.quantized_decomposed
    graph = program.graph
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.target is not ops.quantize_per_tensor.default:
            continue
        source = node.args[0]
        while source.op == "call_function" and str(source.target) in ("aten.to.dtype", "aten._to_copy.default"):
            source = source.args[0]
        is_back = source.op == "call_function" and source.target is ops.dequantize_per_tensor.default
        if is_back and source.args[1:3] == node.args[1:3] and source.args[5] == node.args[5]:
            (low, high), (had_low, had_high) = node.args[3:5], source.args[3:5]
            if low <= had_low and had_high <= high:
                node.replace_all_uses_with(source.args[0])
                graph.erase_node(node)
    _in_order(graph)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _in_order(graph: torch.fx.Graph) -> None:
    """Copy what is flattened behind a convolution: the lowering's kernels leave channels last, which no view can flatten."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if not any(str(node.target).startswith("aten.conv") for node in calls):
        return
    for node in calls:
        value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], torch.fx.Node) else None
        flattens = str(node.target).rpartition(".")[0] in ("aten.flatten", "aten.view", "aten.reshape")
        if flattens and isinstance(value, Tensor) and value.dim() > 2:
            with graph.inserting_before(node):
                kind: dict[str, Any] = {"memory_format": torch.contiguous_format}
                whole = graph.call_function(torch.ops.aten.clone.default, (node.args[0],), kind)
            whole.meta = dict(node.args[0].meta)
            node.replace_input_with(node.args[0], whole)
