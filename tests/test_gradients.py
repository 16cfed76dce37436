# SPDX-License-Identifier: Apache-2.0
"""Owns gradients: every method, as a config names it, against the estimator of its paper; whose tensors backward writes to.

The estimators are written from the papers in float64, value by value, without our code. Points lie inside the grid, on its ends
and within half a step of them, and beyond; steps are powers of two, so that nothing hides in the rounding of a quotient.
"""

from __future__ import annotations

import copy
import importlib
import math
import pkgutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Net

import lightning_quant
from lightning_quant import make_plan, prepare_model
from lightning_quant.calibrate import calibrate
from lightning_quant.prepare import (
    apply_phase,
    learned_parameters,
    load_quantizer_state,
    prepared_groups,
    quantizer_state,
    quantizers_of,
)
from lightning_quant.rounding import learn_rounding
from lightning_quant.schedule import Phase

HOLD = Phase(observe=False)
State = dict[str, dict[str, Any]]


def points(low: int, high: int) -> list[float]:
    """Places on a grid of integers from low to high: (inside, halves among them), the ends and around them, beyond."""
    inside = [low + 0.3, low + 0.8, (low + high) / 2 + 0.05, high - 0.6, high - 0.2, (low + high) // 2 + 0.5]
    ends = [low - 0.3, low - 0.05, low, low + 0.05, high - 0.05, high, high + 0.05, high + 0.3]
    return [*inside, 0.0, *ends, low - 0.7, low - 9.0, high + 0.7, high + 33.0]


def upstream(shape: tuple[int, ...]) -> Tensor:
    """The gradient that arrives: all different, of both signs, float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def close(found: Tensor | None, expected: Any) -> None:
    assert found is not None
    torch.testing.assert_close(found.detach().double(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


# -- the estimators, one value after the other ------------------------------------------------------------------------------

Row = tuple[list[float], list[float], dict[str, float]]  # values, gradients of x, gradients of what is learned


def straight_through(x: list[float], g: list[float], s: float, zero: int, qmin: int, qmax: int) -> Row:
    """Jacob et al. 2018, equation 12; the gradient passes where the integer lies on the grid."""
    q = [round(one / s) + zero for one in x]
    values = [(min(max(one, qmin), qmax) - zero) * s for one in q]
    return values, [one if qmin <= level <= qmax else 0.0 for level, one in zip(q, g, strict=True)], {}


def lsq(x: list[float], g: list[float], s: float, low: int, high: int, count: float, span: int) -> Row:
    """Esser et al. 2020, equations 1 to 3 and 5, gradient scale 1 / sqrt(count span); Bhalgat et al. 2020, equation 6."""
    values, by_x, by_s, by_offset = [], [], 0.0, 0.0
    for one, up in zip(x, g, strict=True):
        v = one / s
        inside = low < v < high
        values.append(round(min(max(v, low), high)) * s)
        by_x.append(up if inside else 0.0)
        by_s += up * (round(v) - v if inside else low if v <= low else high)
        by_offset += 0.0 if inside else up
    scale = 1 / math.sqrt(count * span)
    return values, by_x, {"scale": by_s * scale, "offset": by_offset * scale}


def pact(x: list[float], g: list[float], alpha: float, steps: int, signed: bool) -> Row:
    """Choi et al. 2018, equations 1 to 3; signed: the same on both sides of zero."""
    bottom, s = (-alpha if signed else 0.0), alpha / steps
    values = [round(min(max(one, bottom), alpha) / s) * s for one in x]
    by_x = [up if bottom < one < alpha else 0.0 for one, up in zip(x, g, strict=True)]
    above = sum(up for one, up in zip(x, g, strict=True) if one >= alpha)
    below = sum(up for one, up in zip(x, g, strict=True) if signed and one <= bottom)
    return values, by_x, {"alpha": above - below}


def dorefa(x: list[float], g: list[float], levels: int) -> Row:
    """Zhou et al. 2016, equations 5 and 11: quantize_k(clip(x, 0, 1)), the rounding passed straight through."""
    values = [round(min(max(one, 0.0), 1.0) * levels) / levels for one in x]
    return values, [up if 0 <= one <= 1 else 0.0 for one, up in zip(x, g, strict=True)], {}


def binary(x: list[float], g: list[float]) -> Row:
    """Courbariaux et al. 2016, equations 1 and 4."""
    return [1.0 if one >= 0 else -1.0 for one in x], [up if abs(one) <= 1 else 0.0 for one, up in zip(x, g, strict=True)], {}


# -- activations ------------------------------------------------------------------------------------------------------------


def rounding(x: Tensor, *, relu: bool = False, **keys: Any) -> tuple[nn.Module, str]:
    """(a prepared net that does nothing but round, or what a ReLU makes of it; the name of the target)."""
    net = nn.Sequential(OrderedDict[str, nn.Module](act=nn.Identity()))
    entry: dict[str, Any] = {"op_names": ["act"], "target_names": ["_input_"], **keys}
    if relu:
        net = nn.Sequential(OrderedDict[str, nn.Module](act=nn.Linear(1, 1, bias=False), relu=nn.ReLU()))
        nn.init.ones_(net.get_parameter("act.weight"))
        entry = {**entry, "target_names": ["_output_"], "fuse_names": [("act", "relu")]}
    prepare_model(net.double(), make_plan(net, [entry], example_input=x.detach())).train()
    apply_phase(net, HOLD)
    return net, "act._output_" if relu else "act._input_"


def through(net: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(values, gradient) of one forward and backward."""
    x = x.clone().requires_grad_()
    y: Tensor = net(x)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad


S = 0.25
GRIDS = [("uint4", "affine", 5, 0, 15), ("int4", "affine", -2, -8, 7), ("int8", "symmetric", 0, -127, 127)]
GRIDS += [("uint2", "affine", 1, 0, 3), ("int2", "symmetric", 0, -1, 1), ("uint8", "symmetric", 128, 0, 255)]


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("method", ["qat", "ptq"])
@pytest.mark.parametrize(("dtype", "scheme", "zero", "qmin", "qmax"), GRIDS, ids=[f"{d} {s}" for d, s, *_ in GRIDS])
def test_straight_through_of_an_activation(
    dtype: str, scheme: str, zero: int, qmin: int, qmax: int, method: str, relu: bool
) -> None:
    zero = qmin if relu and scheme == "affine" else zero
    values = [v * S for v in points(qmin - zero, qmax - zero)]
    x, g = torch.tensor([values], dtype=torch.float64)[..., None], upstream((1, len(values), 1))
    net, name = rounding(x, relu=relu, method=method, quant_dtype=dtype, quant_scheme=scheme)
    half = (qmax - qmin) / 2 * S
    ends = (-half, half) if scheme == "symmetric" else ((qmin - zero) * S, (qmax - zero) * S)
    load_quantizer_state(net, {name: dict(zip(("low", "high"), ends, strict=True))})
    y, gradient = through(net, x, g)
    into = [max(v, 0.0) for v in values] if relu else values
    expected, by_x, _ = straight_through(into, g.flatten().tolist(), S, zero, qmin, qmax)
    by_x = [one if value > 0 or not relu else 0.0 for one, value in zip(by_x, values, strict=True)]
    assert 0 < by_x.count(0.0) < len(by_x)
    close(y.flatten(), expected)
    close(gradient.flatten(), by_x)


@pytest.mark.parametrize("method", ["qat", "ptq"])
@pytest.mark.parametrize(("dtype", "scheme", "zero", "qmin", "qmax"), GRIDS[:3], ids=[f"{d} {s}" for d, s, *_ in GRIDS[:3]])
def test_straight_through_of_channels(dtype: str, scheme: str, zero: int, qmin: int, qmax: int, method: str) -> None:
    """Two examples, three channels with steps of their own: what one clips, another does not."""
    steps = [S, 4 * S, S / 8]
    values = [v * S for v in points(qmin - zero, qmax - zero)]
    x = torch.tensor(values, dtype=torch.float64).expand(2, 3, -1).clone()
    g = upstream(tuple(x.shape))
    net, name = rounding(x, method=method, quant_dtype=dtype, quant_scheme=scheme, granularity="per_channel")
    low, high = (torch.tensor([(end - zero) * s for s in steps]).view(1, 3, 1) for end in (qmin, qmax))
    load_quantizer_state(net, {name: {"low": low, "high": high}})
    y, gradient = through(net, x, g)
    for example in range(2):
        for channel, s in enumerate(steps):
            expected, by_x, _ = straight_through(values, g[example, channel].tolist(), s, zero, qmin, qmax)
            close(y[example, channel], expected)
            close(gradient[example, channel], by_x)
    assert len({tuple((gradient[0, channel] == 0).tolist()) for channel in range(3)}) == 3


LSQ = [("lsq", "uint4", "affine", 0, 15), ("lsq", "int4", "symmetric", -7, 7), ("lsq", "int2", "symmetric", -1, 1)]
LSQ += [("lsq+", "uint4", "affine", -5, 10), ("lsq+", "int8", "affine", -100, 155), ("lsq+", "uint2", "affine", -1, 2)]


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(("method", "dtype", "scheme", "low", "high"), LSQ, ids=[f"{m} {d}" for m, d, *_ in LSQ])
def test_a_learned_step_of_an_activation(method: str, dtype: str, scheme: str, low: int, high: int, relu: bool) -> None:
    if relu:
        dtype, scheme, low, high = f"uint{dtype[-1]}", "affine", 0, 2 ** int(dtype[-1]) - 1
    values = [v * S for v in points(low, high)]
    x, g = torch.tensor([values], dtype=torch.float64)[..., None], upstream((1, len(values), 1))
    net, name = rounding(x, relu=relu, method=method, quant_dtype=dtype, quant_scheme=scheme)
    net(x)  # learned numbers begin with the first batch
    qmin = -(2 ** (int(dtype[-1]) - 1)) if scheme == "affine" and not dtype.startswith("u") else 0
    state: dict[str, Any] = {"scale": S, "zero_point": qmin - low if scheme == "affine" else 0}
    if method == "lsq+" and not relu:
        state["offset"] = -state["zero_point"] * S  # the value of level 0
    load_quantizer_state(net, {name: state})
    y, gradient = through(net, x, g)
    into = [max(v, 0.0) for v in values] if relu else values
    span = high if method == "lsq" else high - low
    expected, by_x, learned = lsq(into, g.flatten().tolist(), S, low, high, len(values), span)
    assert 0 < by_x.count(0.0) < len(by_x)
    close(y.flatten(), expected)
    close(gradient.flatten(), by_x)
    found = learned_parameters(net)
    assert set(found) == {f"{name}.{key}" for key in (("scale", "offset") if "offset" in state else ("scale",))}
    for key, parameter in found.items():
        close(parameter.grad, learned[key.rpartition(".")[2]])


@pytest.mark.parametrize(("dtype", "signed", "relu"), [("uint4", False, False), ("int4", True, False), ("uint2", False, True)])
def test_a_learned_clip_of_an_activation(dtype: str, signed: bool, relu: bool) -> None:
    steps = 2 ** (int(dtype[-1]) - signed) - 1
    values = [v * S for v in points(-steps if signed else 0, steps)]
    x, g = torch.tensor([values], dtype=torch.float64)[..., None], upstream((1, len(values), 1))
    net, name = rounding(x, relu=relu, method="pact", quant_dtype=dtype, quant_scheme="symmetric" if signed else "affine")
    load_quantizer_state(net, {name: {"alpha": steps * S, "zero_point": 0}})
    y, gradient = through(net, x, g)
    expected, by_x, learned = pact(values, g.flatten().tolist(), steps * S, steps, signed)
    assert 0 < by_x.count(0.0) < len(by_x)
    close(y.flatten(), expected)
    close(gradient.flatten(), by_x)
    close(learned_parameters(net)[f"{name}.alpha"].grad, learned["alpha"])


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_of_an_activation(bits: int, relu: bool) -> None:
    """Values within half a step beyond an end are rounded to it, and get no gradient."""
    levels = 2**bits - 1
    values = [v / levels for v in points(0, levels) if v % 1 != 0.5]
    x, g = torch.tensor([values], dtype=torch.float64)[..., None], upstream((1, len(values), 1))
    net, _ = rounding(x, relu=relu, method="dorefa", quant_dtype=f"uint{bits}")
    y, gradient = through(net, x, g)
    expected, by_x, _ = dorefa(values, g.flatten().tolist(), levels)
    by_x = [one if value > 0 or not relu else 0.0 for one, value in zip(by_x, values, strict=True)]
    assert sum(expected[i] in (0.0, 1.0) and by_x[i] == 0.0 for i in range(len(values))) >= 8, "cut off"
    close(y.flatten(), expected)
    close(gradient.flatten(), by_x)


def test_dorefa_passes_everything_where_clipping_shall_not_stop_the_gradient() -> None:
    x, g = torch.tensor([[-3.0, -0.01, 0.4, 1.01, 7.0]], dtype=torch.float64), upstream((1, 5))
    net, _ = rounding(x, method="dorefa", apply_method="clamp_round")
    y, gradient = through(net, x, g)
    close(y, [[0.0, 0.0, 102 / 255, 1.0, 1.0]])
    close(gradient, g)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_the_sign_of_an_activation(relu: bool) -> None:
    beyond = math.nextafter(1.0, 2.0)
    values = [-9.0, -beyond, -1.0, -0.4, -1e-30, 0.0, 1e-30, 0.7, 1.0, beyond, 30.0]
    x, g = torch.tensor([values], dtype=torch.float64)[..., None], upstream((1, len(values), 1))
    net, _ = rounding(x, relu=relu, method="bnn")
    y, gradient = through(net, x, g)
    expected, by_x, _ = binary([max(v, 0.0) for v in values] if relu else values, g.flatten().tolist())
    by_x = [one if value > 0 or not relu else 0.0 for one, value in zip(by_x, values, strict=True)]
    close(y.flatten(), expected)
    close(gradient.flatten(), by_x)


# -- weights ----------------------------------------------------------------------------------------------------------------


def weighing(rows: list[list[float]], **keys: Any) -> nn.Module:
    """A prepared linear layer `fc` without bias, float64, with these rows; given the unit matrix, it shows its weight."""
    net = nn.Sequential(OrderedDict(fc=nn.Linear(len(rows[0]), len(rows), bias=False))).double()
    with torch.no_grad():
        net.get_parameter("fc.weight").copy_(torch.tensor(rows, dtype=torch.float64))
    entry = {"op_names": ["fc"], "target_names": ["weight"], **keys}
    prepare_model(net, make_plan(net, [entry])).train()
    apply_phase(net, HOLD)
    return net


def shown(net: nn.Module, g: Tensor) -> tuple[Tensor, Tensor]:
    """(the weight as a training forward sees it, its gradient where `g` arrives at it)."""
    weight = net.get_parameter("fc.weight")
    y = net(torch.eye(weight.shape[1], dtype=torch.float64)).T
    y.backward(g)
    assert weight.grad is not None
    return y.detach(), weight.grad


def blocks(granularity: str, rows: list[list[float]]) -> list[list[float]]:
    """What shares a scale."""
    return rows if granularity == "out_channel" else [[one for row in rows for one in row]]


def cut(g: Tensor, granularity: str) -> list[list[float]]:
    return blocks(granularity, g.tolist())


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
@pytest.mark.parametrize("method", ["qat", "ptq", "pact"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_straight_through_of_a_weight(bits: int, method: str, granularity: str) -> None:
    """Symmetric about zero, to the greatest absolute value now: inside and on the ends the gradient passes, beyond is nothing."""
    high = 2 ** (bits - 1) - 1
    row = [v * S for v in points(-high, high) if abs(v) <= high]
    rows = [row, [4 * v for v in row], [-v / 8 for v in row]]
    net = weighing(rows, method=method, quant_dtype=f"int{bits}", granularity=granularity)
    g = upstream((3, len(row)))
    y, gradient = shown(net, g)
    for block, ups, value, by_w in zip(
        *(blocks(granularity, r) for r in (rows, g.tolist(), y.tolist(), gradient.tolist())), strict=True
    ):
        s = max(map(abs, block)) / high
        expected, by_x, _ = straight_through(block, ups, s, 0, -high, high)
        assert by_x == ups, "nothing is clipped"
        close(torch.tensor(value), expected)
        close(torch.tensor(by_w), by_x)


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
def test_straight_through_of_a_clipped_weight(granularity: str) -> None:
    """`observer: mse` may end the grid below the greatest value: half of it here, so that the points beyond are clipped."""
    row = [v * S for v in points(-7, 7) if abs(v) < 14]
    rows = [[*row, 14 * S], [*(4 * v for v in row), -56 * S]]
    keys = {"granularity": granularity, "quant_dtype": "int4", "observer": "mse"}
    net = weighing(rows, target_settings={"weight": keys})
    count = len(blocks(granularity, rows))
    load_quantizer_state(net, {"fc.weight": {"ratio": torch.full((count, 1), 0.5)}})
    g = upstream((2, len(rows[0])))
    y, gradient = shown(net, g)
    for block, ups, value, by_w in zip(
        *(blocks(granularity, r) for r in (rows, g.tolist(), y.tolist(), gradient.tolist())), strict=True
    ):
        expected, by_x, _ = straight_through(block, ups, max(map(abs, block)) / 14, 0, -7, 7)
        assert 0 < by_x.count(0.0) < len(by_x)
        close(torch.tensor(value), expected)
        close(torch.tensor(by_w), by_x)


@pytest.mark.parametrize("method", ["qat", "ptq"])
@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["ends on levels", "ends between levels"])
def test_straight_through_of_a_weight_with_a_zero_point(shift: float, granularity: str, method: str) -> None:
    """-5 to 10 steps, or -5.5 to 9.5: there the zero point is 6 and the greatest value half a step over level 15, clipped."""
    row = [(v - shift) * S for v in (-5.0, -4.7, -2.2, 0.3, 1.0, 6.8, 9.6, 9.9, 10.0)]
    rows = [row, [4 * v for v in row]]
    net = weighing(rows, method=method, quant_dtype="uint4", quant_scheme="affine", granularity=granularity)
    g = upstream((2, len(row)))
    y, gradient = shown(net, g)
    clipped = 0
    for block, ups, value, by_w in zip(
        *(blocks(granularity, r) for r in (rows, g.tolist(), y.tolist(), gradient.tolist())), strict=True
    ):
        s = (max(block) - min(block)) / 15
        expected, by_x, _ = straight_through(block, ups, s, -round(min(block) / s), 0, 15)
        clipped += by_x.count(0.0)
        close(torch.tensor(value), expected)
        close(torch.tensor(by_w), by_x)
    assert (clipped > 0) == (shift > 0)


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
@pytest.mark.parametrize("method", ["lsq", "lsq+"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_learned_step_of_a_weight(bits: int, method: str, granularity: str) -> None:
    high = 2 ** (bits - 1) - 1
    row = [v * S for v in points(-high, high)]
    rows = [row, [4 * v for v in row]]
    net = weighing(rows, method=method, quant_dtype=f"int{bits}", granularity=granularity)
    steps = [S, 4 * S] if granularity == "out_channel" else [2 * S]
    load_quantizer_state(net, {"fc.weight": {"scale": torch.tensor(steps)[:, None]}})
    g = upstream((2, len(row)))
    y, gradient = shown(net, g)
    found = learned_parameters(net)["fc.weight.scale"].grad
    assert found is not None
    ours = [blocks(granularity, part.tolist()) for part in (y, gradient)]
    for index, (s, block, ups) in enumerate(zip(steps, blocks(granularity, rows), cut(g, granularity), strict=True)):
        expected, by_x, learned = lsq(block, ups, s, -high, high, len(block), high)
        assert 0 < by_x.count(0.0) < len(by_x)
        close(torch.tensor(ours[0][index]), expected)
        close(torch.tensor(ours[1][index]), by_x)
        close(found.flatten()[index], learned["scale"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_of_a_weight(bits: int) -> None:
    """Zhou et al. 2016, equation 9, differentiated by autograd in float64, the rounding passed straight through."""
    high = 2 ** (bits - 1) - 1
    rows = [[-30.0, -2.0, -0.9, -0.2, 0.0, 0.1], [0.4, 1.3, 1.9, 2.6, 8.0, -0.01]]
    net = weighing(rows, method="dorefa", quant_dtype=f"int{bits}")
    g = upstream((2, 6))
    y, gradient = shown(net, g)
    w = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    bent = w.tanh() / w.tanh().abs().max()
    close(y, (bent.detach() * high).round() / high)
    (expected,) = torch.autograd.grad(bent, w, g)
    close(gradient, expected)


def test_the_sign_of_a_weight() -> None:
    """Courbariaux et al. 2016, algorithm 1: the gradient reaches all of it, and the weight is clipped to [-1, 1]."""
    rows = [[-3.0, -1.0, -0.2, -1e-9, 0.0, 0.7, 1.0, 1.5]]
    net = weighing(rows, method="bnn")
    g = upstream((1, 8))
    y, gradient = shown(net, g)
    close(y, [[1.0 if one >= 0 else -1.0 for one in rows[0]]])
    close(gradient, g)
    close(net.get_parameter("fc.weight"), [[min(max(one, -1.0), 1.0) for one in rows[0]]])


# -- cases 7 to 10 of NNI's acceptance list: their gradients (their values: test_nni.py) ---------------------------------------

W = [[-1.0, 0.5], [2.0, 0.25]]
LEVELS = [("int2", 1), ("int3", 3), ("int4", 7), ("int8", 127), ("int16", 32767)]


@pytest.mark.parametrize(("dtype", "high"), LEVELS, ids=[dtype for dtype, _ in LEVELS])
def test_case_07_gradient_on_the_levels_of_every_type(dtype: str, high: int) -> None:
    net = weighing(W, quant_dtype=dtype, quant_scheme="symmetric", granularity="per_tensor")
    g = upstream((2, 2))
    y, gradient = shown(net, g)
    close(y, [[round(w * high / 2) * 2 / high for w in row] for row in W])
    close(gradient, g)


def test_case_08_gradient_on_a_range_that_moved() -> None:
    """[0.5, 2], then [-1, 4]: the range is -0.015 .. 2.02 less what its zero point rounds off, and clips the second batch."""
    net, _ = rounding(torch.zeros(2), quant_dtype="int8", quant_scheme="affine", granularity="per_tensor")
    apply_phase(net, Phase())
    seen = [through(net, torch.tensor(batch), torch.tensor([3.0, 5.0])) for batch in ([0.5, 2.0], [-1.0, 4.0], [0.5, 2.0])]
    assert [gradient.tolist() for _, gradient in seen] == [[3.0, 5.0], [0.0, 0.0], [3.0, 5.0]]
    close(seen[1][0], [0.0, 2.02])
    apply_phase(net, HOLD)
    _, gradient = through(net, torch.tensor([10.0, -10.0]), torch.tensor([3.0, 5.0]))
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_case_09_gradient_with_its_granularities(granularity: str) -> None:
    """Symmetric int8 on -1 .. 1, x = [0.3, 5]: [1, 0], and what arrives stays as it was."""
    x = torch.tensor([[0.3, 5.0], [1.0, -1.0]])
    net, _ = rounding(x, quant_dtype="int8", quant_scheme="symmetric", granularity=granularity)
    apply_phase(net, Phase())
    net(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    apply_phase(net, HOLD)
    g = torch.ones(2, 2)
    y, gradient = through(net, x, g)
    close(y, [[38 / 127, 1.0], [1.0, -1.0]])
    assert gradient.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert torch.equal(g, torch.ones(2, 2))


@pytest.mark.parametrize("quantized", [False, True], ids=["steps 1, 2", "steps 3, 4"])
def test_case_10_gradient_before_and_after_the_start(quantized: bool) -> None:
    """int2 symmetric, x = [1, 1]: the values jump, the gradient of the weight is x all along."""
    net = weighing(W, quant_dtype="int2", quant_scheme="symmetric", granularity="per_tensor")
    apply_phase(net, Phase(quantize=quantized))
    y = net(torch.ones(1, 2, dtype=torch.float64))
    y.backward(torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    close(y, [[0.0, 2.0]] if quantized else [[-0.5, 2.25]])
    close(net.get_parameter("fc.weight").grad, [[2.0, 2.0], [3.0, 3.0]])


# -- what arrives is never written to ------------------------------------------------------------------------------------------

ACTIVATIONS: list[dict[str, Any]] = [
    *({"method": method} for method in ("qat", "ptq", "lsq", "lsq+", "pact", "dorefa", "bnn")),
    {"granularity": "per_channel"},
    {"apply_method": "clamp_round"},
    {"observer": "mse"},
    {"quant_scheme": "symmetric"},
    {"memory": "lean"},
]
WEIGHTS: list[dict[str, Any]] = [
    *({"method": method} for method in ("qat", "lsq", "lsq+", "dorefa", "bnn")),
    {"quant_scheme": "affine"},
    {"quant_scheme": "affine", "granularity": "per_tensor", "apply_method": "clamp_round"},
    {"target_settings": {"weight": {"observer": "mse"}}},
    {"granularity": [1, 2]},
]
Path = tuple[Callable[[], Tensor], list[Tensor]]  # a forward, and the leaves that get gradients


def activation_path(keys: dict[str, Any], relu: bool) -> Path:
    x = torch.randn(4, 6, 1, dtype=torch.float64)
    net, _ = rounding(x, relu=relu, **{key: value for key, value in keys.items() if key != "memory"})
    for quantizer in quantizers_of(net).values():
        quantizer.lean = "memory" in keys
    calibrate(net, [x])
    given = (2 * x).requires_grad_()
    return lambda: net(given), [given, *learned_parameters(net).values()]


def weight_path(keys: dict[str, Any]) -> Path:
    """The quantizer's own result, so that what arrives reaches it untouched."""
    net = weighing(torch.randn(4, 6).tolist(), **keys)
    weight = net.get_parameter("fc.weight")
    (quantizer,) = prepared_groups(net)["fc"][1].parameter_quantizers
    return lambda: quantizer.rounded(weight), [weight, *learned_parameters(net).values()]


def fixed_path() -> Path:
    """A weight whose rounding was learned."""
    net = nn.Sequential(OrderedDict(fc=nn.Linear(6, 4)))
    prepare_model(net, make_plan(net, [{"op_names": ["fc"]}], example_input=torch.randn(2, 6)))
    batches = [torch.randn(8, 6)]
    learn_rounding(calibrate(net, batches), batches, iterations=2)
    (quantizer,) = prepared_groups(net)["fc"][1].parameter_quantizers
    weight = net.get_parameter("fc.weight")
    return lambda: quantizer.rounded(weight), [weight]


def paths() -> Iterator[tuple[str, Callable[[], Path]]]:
    for keys in ACTIVATIONS:
        for relu in (False, True):
            if not (relu and keys.get("granularity")):
                yield f"activation {keys} {'relu' if relu else ''}", lambda keys=keys, relu=relu: activation_path(keys, relu)  # type: ignore[misc]
    for keys in WEIGHTS:
        yield f"weight {keys}", lambda keys=keys: weight_path(keys)  # type: ignore[misc]
    yield "weight of learned rounding", fixed_path


PATHS = dict(paths())


def gradients(run: Callable[[], Tensor], leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    run().backward(g)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    return found


@pytest.mark.parametrize("name", PATHS)
def test_what_arrives_is_never_written_to(name: str) -> None:
    run, leaves = PATHS[name]()
    g = torch.randn_like(run())
    kept = g.clone()
    first = gradients(run, leaves, g)
    assert torch.equal(g, kept)
    run().backward(g)  # adds to what is there already
    for leaf in leaves:
        assert leaf.grad is not None
        leaf.grad.add_(1)
    assert torch.equal(g, kept), "a gradient that was handed on is not the caller's tensor"
    spread = torch.tensor(1.5, dtype=g.dtype).expand(g.shape)
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(run, leaves, spread), gradients(run, leaves, spread.clone()), strict=True)
    )
    assert spread.stride() == (0,) * g.dim() and float(spread.sum()) == pytest.approx(1.5 * g.numel())
    assert any(bool((one != 0).any()) for one in first)


def reached(y: Tensor) -> set[str]:
    """The names of the autograd nodes behind y."""
    todo, names, seen = [y.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [further for further, _ in node.next_functions]
    return names


def test_these_are_all_the_gradients_that_the_package_writes_itself() -> None:
    for module in pkgutil.iter_modules(lightning_quant.__path__):
        importlib.import_module(f"lightning_quant.{module.name}")
    own = {c.__name__ for c in torch.autograd.Function.__subclasses__() if c.__module__.startswith("lightning_quant.")}
    assert len(own) >= 8
    names = set[str]()
    for make in PATHS.values():
        run, _ = make()
        names |= reached(run())
    assert own <= {name.removesuffix("Backward") for name in names}


@pytest.mark.parametrize("method", ["qat", "ptq", "lsq", "lsq+", "pact", "dorefa"])
@pytest.mark.parametrize("granularity", ["default", "per_tensor"])
def test_what_arrives_at_a_whole_net_is_never_written_to(granularity: str, method: str) -> None:
    """Its last layer is rounded, too; a second net gets the same gradient, laid out in memory as one number."""
    x = torch.randn(4, 3, 8, 8)
    net = Net()
    entry = {"op_types": ["Conv2d", "Linear"], "method": method, "granularity": granularity, "high_precision_output": False}
    prepare_model(net, make_plan(net, [entry], example_input=x))
    calibrate(net, [x])
    twin = copy.deepcopy(net)
    assert set(quantizers_of(net)) >= {"conv1._input_", "conv1._output_", "conv2._output_", "fc._output_"}
    assert quantizer_state(net)
    g = torch.full((4, 4), 0.7)
    net.train()(x).backward(g)
    assert torch.equal(g, torch.full((4, 4), 0.7))
    spread = torch.tensor(0.7).expand(4, 4)
    twin.train()(x).backward(spread)
    assert float(spread[0, 0]) == pytest.approx(0.7)
    one, other = ([p.grad for p in (*n.parameters(), *learned_parameters(n).values())] for n in (net, twin))
    for a, b in zip(one, other, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums run in another order
    assert any(bool((a != 0).any()) for a in one if a is not None)
