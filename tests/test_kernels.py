# SPDX-License-Identifier: Apache-2.0
"""Owns the operators between grids that onnxruntime has integer kernels for: the rule of each, and how far ours may differ.

A convolution's and a linear layer's kernel equals ours bit for bit, on any data; tables (Sigmoid, LeakyRelu, Concat) do, too. The
others compute in float32 by rules of their own, which are other rules on other CPUs (ARM adds in fixed point), so that no model
can equal all of them: where the exact result lies within float32's error of the middle between two integers, one may be the upper
and one the lower. Those rules are held here, by emulation, on all pairs of integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_quant import convert_model, make_plan, prepare_model
from lightning_quant.export import export_with_reports, onnxruntime_session
from lightning_quant.quantizers import Grid
from lightning_quant.runtime import optimized_graph

WITH_FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # the rules below are those of such CPUs
Integers = NDArray[np.int64]
Floats = NDArray[Any]
one = np.float32


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Mul(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Matmul(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class Cat(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Sigmoid(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a)


class LeakyRelu(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return F.leaky_relu(a, 0.1)


class Pool(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return F.avg_pool2d(a, 2)


class Mean(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.mean((2, 3))


class Softmax(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return F.softmax(a, -1)


# -- the rules, in the order of their roundings; what a kernel has before it saturates, and the exact value ------------------


def add(q: list[Integers], x: list[Grid], y: Grid) -> tuple[Floats, Floats]:
    a, b = (one(g.scale) / one(y.scale) for g in x)
    offsets = one(float(a) * x[0].zero_point + float(b * one(x[1].zero_point)))
    fixed = one(y.zero_point) - offsets
    half = (q[1] * float(b) + float(fixed)).astype(one)  # a fused multiply-add rounds once
    return np.rint((q[0] * float(a) + half.astype(float)).astype(one)), _real(q, x)[0] + _real(q, x)[1]


def mul(q: list[Integers], x: list[Grid], y: Grid) -> tuple[Floats, Floats]:
    ratio = one(x[0].scale) * one(x[1].scale) / one(y.scale)
    product = (q[0] - x[0].zero_point) * (q[1] - x[1].zero_point)
    return np.rint(product.astype(one) * ratio + one(y.zero_point)), _real(q, x)[0] * _real(q, x)[1]


def matmul(q: list[Integers], x: list[Grid], y: Grid) -> tuple[Floats, Floats]:
    ratio = one(x[0].scale) * one(x[1].scale) / one(y.scale)
    total = (q[0] - x[0].zero_point) @ (q[1] - x[1].zero_point)
    return np.rint(total.astype(one) * ratio) + y.zero_point, _real(q, x)[0] @ _real(q, x)[1]


def mean(q: list[Integers], x: list[Grid], y: Grid) -> tuple[Floats, Floats]:
    total = (q[0] - x[0].zero_point).sum((2, 3))
    ratio = one(x[0].scale) / (one(y.scale) * one(q[0][0, 0].size))
    return np.rint(total.astype(one) * ratio) + y.zero_point, _real(q, x)[0].mean((2, 3))


def pool(q: list[Integers], x: list[Grid], y: Grid) -> tuple[Floats, Floats]:
    real = (q[0] - x[0].zero_point).astype(one) * one(x[0].scale)
    total = real[:, :, ::2, ::2] + real[:, :, ::2, 1::2]
    total = total + real[:, :, 1::2, ::2]
    total = total + real[:, :, 1::2, 1::2]
    n, c, h, w = q[0].shape
    exact = _real(q, x)[0].reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return np.rint(total / one(4) / one(y.scale) + one(y.zero_point)), exact


def _real(q: list[Integers], x: list[Grid]) -> list[Floats]:
    return [(part - g.zero_point) * float(one(g.scale)) for part, g in zip(q, x, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A net of one operator, how its kernel is called, the kernel's rule, and what it reads: how many, of which shape."""

    make: Callable[[], nn.Module]
    name: str
    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    rule: Callable[[list[Integers], list[Grid], Grid], tuple[Floats, Floats]] | None = None


PAIRS = (256, 256)
OPERATORS = {
    "add": Operator(make=Add, name="add", kernel="QLinearAdd", shapes=(PAIRS, PAIRS), rule=add),
    "mul": Operator(make=Mul, name="mul", kernel="QLinearMul", shapes=(PAIRS, PAIRS), rule=mul),
    "matmul": Operator(make=Matmul, name="matmul", kernel="QLinearMatMul", shapes=((64, 48), (48, 64)), rule=matmul),
    "mean": Operator(make=Mean, name="mean", kernel="QLinearGlobalAveragePool", shapes=((128, 64, 7, 7),), rule=mean),
    "pool": Operator(make=Pool, name="avg_pool2d", kernel="QLinearAveragePool", shapes=((64, 16, 8, 8),), rule=pool),
    "cat": Operator(make=Cat, name="cat", kernel="QLinearConcat", shapes=(PAIRS, PAIRS)),
    "sigmoid": Operator(make=Sigmoid, name="sigmoid", kernel="QLinearSigmoid", shapes=(PAIRS,)),
    "leaky_relu": Operator(make=LeakyRelu, name="leaky_relu", kernel="QLinearLeakyRelu", shapes=(PAIRS,)),
}


SEEDS = {"add": 5, "mul": 4, "matmul": 0, "mean": 5, "pool": 2}  # grids of which some integers differ


def quantized(one_of: Operator, inputs: tuple[Tensor, ...]) -> Any:
    """The operator, deployed, with grids that have these inputs' ranges."""
    targets: dict[str, Any] = {"_input_": {}, "_output_": {}, **({"_input_1": {}} if len(inputs) == 2 else {})}
    net = one_of.make()
    plan = make_plan(net, [{"op_types": [one_of.name], "target_settings": targets}], example_input=inputs)
    prepare_model(net, plan)
    with torch.no_grad():
        net.train()(*inputs)
    return convert_model(net.eval())


@dataclass(frozen=True, kw_only=True)
class Called:
    """What went in and came out, as integers: the kernel's and ours."""

    q: list[Integers]
    grids: list[Grid]
    y: Grid
    found: Integers
    ours: Integers


def integers_of(values: Any, grid: Grid) -> Integers:
    """The integers of values that lie on the grid."""
    q = np.asarray(values, np.float64) / float(np.float32(grid.scale)) + grid.zero_point
    assert np.abs(q - np.rint(q)).max() < 1e-3
    return np.rint(q).astype(np.int64)


def called_on_all(this: Operator, seed: int, signed: bool, path: Path) -> Called:
    """The operator on grids with the ranges of random inputs, called with integers of those grids."""
    torch.manual_seed(seed)
    inputs = tuple(torch.randn(shape) * (0.2 + 3 * torch.rand(())) + torch.randn(()) for shape in this.shapes)
    deployed = quantized(this, inputs)
    export_with_reports(deployed, path, example_input=inputs, signed=signed, dynamic_batch=False)
    assert Counter(node.op_type for node in optimized_graph(path).node)[this.kernel] == 1
    rounded = getattr(deployed, this.name)
    grids, y = [part.grid for part in rounded.rounds_in], rounded.rounds_out[0].grid
    if this.shapes[0] == PAIRS:
        every = np.arange(256)
        q = [np.broadcast_to(every[:, None], PAIRS), np.broadcast_to(every[None], PAIRS)][: len(grids)]
    else:
        q = [torch.randint(0, 256, shape).numpy() for shape in this.shapes]
    x = [(part - grid.zero_point).astype(np.float32) * np.float32(grid.scale) for part, grid in zip(q, grids, strict=True)]
    session = onnxruntime_session(path)
    feeds = {node.name: part for node, part in zip(session.get_inputs(), x, strict=True)}
    found = integers_of(session.run(None, feeds)[0], y)
    with torch.no_grad():
        ours = integers_of(deployed(*(torch.from_numpy(part) for part in x)), y)
    assert len(np.unique(found)) > 20
    return Called(q=q, grids=grids, y=y, found=found, ours=ours)


def assert_differs_at_ties_alone(this: Operator, one_of: Called) -> None:
    if this.rule is None:
        assert (one_of.found == one_of.ours).all()
        return
    _, exact = this.rule(one_of.q, one_of.grids, one_of.y)
    real = exact / float(np.float32(one_of.y.scale))
    from_tie = np.abs(real - np.floor(real) - 0.5)
    other = one_of.found != one_of.ours
    assert np.abs(one_of.found - one_of.ours).max() <= 1
    assert from_tie[other].max(initial=0) < 1e-4
    assert other.mean() < 0.05


@pytest.mark.parametrize("name", [name for name, this in OPERATORS.items() if this.rule])
def test_a_kernel_follows_its_rule_and_differs_from_ours_at_ties_alone(name: str, tmp_path: Path) -> None:
    this = OPERATORS[name]
    here = called_on_all(this, SEEDS[name], False, tmp_path / "model.onnx")
    assert_differs_at_ties_alone(this, here)
    assert this.rule is not None
    if WITH_FMA:
        by_rule, _ = this.rule(here.q, here.grids, here.y)
        assert (here.found == np.clip(by_rule, 0, 255)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_so_do_signed_integers_and_other_grids(name: str, tmp_path: Path) -> None:
    for seed in range(4):
        assert_differs_at_ties_alone(
            OPERATORS[name], called_on_all(OPERATORS[name], seed, seed % 2 == 0, tmp_path / "model.onnx")
        )


@pytest.mark.parametrize("signed", [False, True])
def test_even_attention_does_not_overflow(signed: bool, tmp_path: Path) -> None:
    """onnxruntime's QLinearSoftmax then gives 0: float32 overflows in it. The file keeps it from being used."""
    this = Operator(make=Softmax, name="softmax", kernel="Softmax", shapes=((128, 64),))
    torch.manual_seed(0)
    deployed = quantized(this, (0.1 * torch.randn(128, 64),))
    fresh = 0.15 * torch.randn(128, 64)
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=fresh, signed=signed)
    assert exported.parity.different == 0
    session = onnxruntime_session(exported.path)
    found = session.run(None, {session.get_inputs()[0].name: fresh.numpy()})[0]
    y = deployed.softmax.rounds_out[0].grid
    assert y.scale * 148 * 64 < 1, "a grid on which QLinearSoftmax would overflow"
    with torch.no_grad():
        assert (integers_of(found, y) == integers_of(deployed(fresh), y)).all()
    assert found.min() > 0.2 / 64
    assert exported.execution is not None
    (run,) = (node for node in exported.execution.nodes if node.operator == "Softmax")
    assert (run.integer, run.reason) == (False, "onnxruntime's int8 kernel overflows where probabilities are nearly even")
