# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `integer.py`: deployed layers against int64 arithmetic in numpy, and the operators against torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.direct import EXACT_FLOAT32
from lightning_quant.geometry import Geometry
from lightning_quant.integer import FoldedWeight, IntegerLayer, PartlyIntegerLayer
from lightning_quant.quantizers import Grid

Array = npt.NDArray[Any]
Padding = list[tuple[int, int]]
Grids = tuple[Grid, Grid | None]


# -- the reference: numpy, int64 ------------------------------------------------------------------------------------


def grid(scale: float, zero: int, low: int = 0, high: int = 255, clip: tuple[int, int] | None = None) -> Grid:
    clip_low, clip_high = clip or (low, high)
    scale = float(np.float32(scale))
    return Grid(scale=scale, zero_point=zero, qmin=low, qmax=high, clip_low=clip_low, clip_high=clip_high)


X, Y = grid(0.02, 120), grid(0.3, 100)


def numpy_quantize(x: Array, g: Grid) -> Array:
    """q - z: x / s in float32, rounded half to even and clipped."""
    steps: Array = np.rint(x.astype(np.float32) / np.float32(g.scale))
    return np.asarray(np.clip(steps, g.qmin - g.zero_point, g.qmax - g.zero_point).astype(np.int64))


def numpy_pad(x: Array, pad: Padding, mode: str) -> Array:
    modes = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}
    padded: Array = np.pad(x, [(0, 0), (0, 0), *pad], mode=modes[mode])  # type: ignore[call-overload]
    return padded


def numpy_conv(x: Array, w: Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Array:
    """The sum over kernel positions, in int64; x is padded already."""
    kernel, n, out_channels = w.shape[2:], x.shape[0], w.shape[0]
    sizes = [(s - d * (k - 1) - 1) // t + 1 for s, d, k, t in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
    xs = x.reshape(n, groups, -1, *x.shape[2:])
    ws = w.reshape(groups, out_channels // groups, *w.shape[1:])
    total = np.zeros((n, groups, out_channels // groups, *sizes), np.int64)
    for place in itertools.product(*map(range, kernel)):
        each = zip(place, dilation, sizes, stride, strict=True)
        window: Any = (..., *(slice(p * d, p * d + (z - 1) * t + 1, t) for p, d, z, t in each))
        corner: Any = (..., *place)
        total += np.einsum("ngi...,goi->ngo...", xs[window], ws[corner])
    return total.reshape(n, out_channels, *sizes)


def column(values: Array, dim: int) -> Array:
    return values if values.ndim == 0 else values.reshape(1, -1, *[1] * (dim - 2))


def numpy_finish(acc: Array, folded: FoldedWeight, x: Grid, y: Grid | None) -> Array:
    """Bias, requantization and dequantization, as the module's docstring states them."""
    scale = folded.scale.numpy()
    bias = np.rint(folded.bias.numpy() / (x.scale * scale.astype(np.float64))).astype(np.int64)
    acc = (acc + column(bias, acc.ndim)).astype(np.float32)
    real = np.float32(x.scale) * scale
    if y is None:
        return np.asarray(acc * column(real, acc.ndim))
    steps = np.rint(acc * column(real / np.float32(y.scale), acc.ndim))
    steps = np.clip(steps, y.clip_low - y.zero_point, y.clip_high - y.zero_point)
    return np.asarray(steps.astype(np.float32) * np.float32(y.scale))


def shifted(folded: FoldedWeight) -> Array:
    """q_w - z_w."""
    q = folded.q.numpy().astype(np.int64)
    if folded.zero_point is None:
        return q
    return np.asarray(q - folded.zero_point.numpy().astype(np.int64).reshape(-1, *[1] * (q.ndim - 1)))


def reference_conv(
    x: Tensor, folded: FoldedWeight, layer: Any, pad: list[tuple[int, int]], grids: tuple[Grid, Grid | None]
) -> Array:
    q = numpy_quantize(x.numpy(), grids[0])
    acc = numpy_conv(numpy_pad(q, pad, layer.padding_mode), shifted(folded), layer.stride, layer.dilation, layer.groups)
    return numpy_finish(acc, folded, *grids)


def reference_linear(x: Tensor, folded: FoldedWeight, grids: Grids) -> Array:
    q = numpy_quantize(x.reshape(-1, x.shape[-1]).numpy(), grids[0])
    out = numpy_finish(q @ shifted(folded).T, folded, *grids)
    return out.reshape(*x.shape[:-1], len(folded.q))


def random_weight(shape: tuple[int, ...], *, zero_point: bool = False, per_tensor: bool = False) -> FoldedWeight:
    channels = shape[0]
    scale = torch.rand(()) * 0.01 + 0.001 if per_tensor else torch.rand(channels) * 0.01 + 0.001
    return FoldedWeight(
        q=torch.randint(-127, 128, shape).to(torch.int8),
        scale=scale,
        zero_point=torch.randint(-127, 128, (channels,)).to(torch.int8) if zero_point else None,
        bias=torch.randn(channels, dtype=torch.float64),
    )


# -- convolutions ---------------------------------------------------------------------------------------------------

CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Padding]] = {
    # layer, input shape, (before, after) padding of every dimension by hand
    "1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 11), [(0, 0)]),
    "1d stride": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 11), [(1, 1)]),
    "1d same even": (lambda: nn.Conv1d(3, 5, 4, padding="same"), (2, 3, 11), [(1, 2)]),
    "1d valid": (lambda: nn.Conv1d(3, 5, 4, padding="valid"), (2, 3, 11), [(0, 0)]),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 6), [(1, 1), (1, 1)]),
    "2d stride": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 1)), (2, 3, 7, 6), [(0, 0), (0, 0)]),
    "2d uneven padding": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 0)), (2, 3, 7, 6), [(2, 2), (0, 0)]),
    "2d kernel": (lambda: nn.Conv2d(3, 4, (1, 4), padding=(0, 1)), (2, 3, 7, 6), [(0, 0), (1, 1)]),
    "2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 7, 6), [(1, 1), (1, 1)]),
    "2d same uneven": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 7, 6), [(1, 1), (2, 2)]),
    "2d same even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 7, 6), [(0, 1), (1, 2)]),
    "2d same dilated": (
        lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 2)), (2, 3, 7, 6), [(1, 2), (2, 2)],
    ),
    "2d dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(1, 2), padding=(1, 2)), (2, 3, 7, 6), [(1, 1), (2, 2)]),
    "2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 7, 6), [(1, 1), (2, 2)]),
    "2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 7, 6), [(2, 2), (1, 1)]),
    "2d replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 7, 6), [(1, 1), (1, 1)]),
    "2d circular same even": (
        lambda: nn.Conv2d(3, 4, 2, padding="same", padding_mode="circular"), (2, 3, 7, 6), [(0, 1), (0, 1)],
    ),
    "2d groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 7, 6), [(1, 1), (1, 1)]),
    "2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 6), [(0, 0), (0, 0)]),
    "2d pointwise": (lambda: nn.Conv2d(6, 8, 1, stride=2), (2, 6, 7, 6), [(0, 0), (0, 0)]),
    "3d": (lambda: nn.Conv3d(2, 3, 3, padding=(0, 1, 2)), (1, 2, 4, 5, 4), [(0, 0), (1, 1), (2, 2)]),
    "3d same even": (lambda: nn.Conv3d(2, 3, 2, padding="same"), (1, 2, 4, 5, 4), [(0, 1), (0, 1), (0, 1)]),
    "3d stride": (lambda: nn.Conv3d(2, 4, 2, stride=2, groups=2), (1, 2, 4, 5, 4), [(0, 0), (0, 0), (0, 0)]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("y", [Y, None], ids=["grid", "float"])
def test_a_convolution_is_int64_arithmetic(name: str, y: Grid | None) -> None:
    make, shape, pad = CONVS[name]
    layer: Any = make()
    folded, x = random_weight(tuple(layer.weight.shape)), torch.randn(shape)
    got = IntegerLayer(folded, Geometry.of(layer), X, y)(x)
    expected = reference_conv(x, folded, layer, pad, (X, y))
    assert got.shape == layer(x).shape
    assert np.array_equal(got.numpy(), expected)
    assert len(np.unique(expected)) > 10


@pytest.mark.parametrize(
    "options",
    [{"zero_point": True}, {"per_tensor": True}, {"zero_point": True, "per_tensor": False}],
    ids=["zero points", "one scale", "zero points and scales"],
)
@pytest.mark.parametrize("name", ["2d", "2d reflect", "2d depthwise", "1d same even"])
def test_weights_with_zero_points_and_with_one_scale(name: str, options: dict[str, bool]) -> None:
    make, shape, pad = CONVS[name]
    layer: Any = make()
    folded, x = random_weight(tuple(layer.weight.shape), **options), torch.randn(shape)
    got = IntegerLayer(folded, Geometry.of(layer), X, Y)(x)
    assert np.array_equal(got.numpy(), reference_conv(x, folded, layer, pad, (X, Y)))


@pytest.mark.parametrize("name", ["1d stride", "2d", "2d reflect", "2d same even", "3d"])
def test_an_input_without_a_batch(name: str) -> None:
    make, shape, pad = CONVS[name]
    layer: Any = make()
    folded, x = random_weight(tuple(layer.weight.shape)), torch.randn(shape)[:1]
    got = IntegerLayer(folded, Geometry.of(layer), X, Y)(x[0])
    assert np.array_equal(got.numpy(), reference_conv(x, folded, layer, pad, (X, Y))[0])


@pytest.mark.parametrize(
    ("change", "pad"),
    [
        ({"padding": (2, 2)}, 2),
        ({"padding": (0, 0)}, 0),
        ({"padding": (2, 2), "dilation": (2, 2)}, 2),
        ({"padding": 2}, 2),
        ({"stride": 2, "dilation": 1}, 1),
    ],
    ids=["wider", "none", "dilated", "a bare padding", "a bare stride"],
)
def test_a_geometry_that_was_changed_after_the_layer_was_made(change: dict[str, Any], pad: int) -> None:
    """Segmentation nets dilate a finished backbone by setting `padding` and `dilation`; torch's forward reads those."""
    layer: Any = nn.Conv2d(3, 4, 3, padding=1)
    for key, value in change.items():
        setattr(layer, key, value)
    folded, x = random_weight((4, 3, 3, 3)), torch.randn(1, 3, 8, 8)
    got = IntegerLayer(folded, Geometry.of(layer), X, Y)(x)
    assert got.shape == layer(x).shape
    layer.stride, layer.dilation = np.broadcast_to(layer.stride, 2), np.broadcast_to(layer.dilation, 2)
    assert np.array_equal(got.numpy(), reference_conv(x, folded, layer, [(pad, pad)] * 2, (X, Y)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_same_padding_follows_a_dilation_that_was_changed() -> None:
    layer: Any = nn.Conv2d(3, 4, (3, 4), padding="same")
    layer.dilation = (2, 1)
    folded, x = random_weight((4, 3, 3, 4)), torch.randn(1, 3, 8, 8)
    got = IntegerLayer(folded, Geometry.of(layer), X, Y)(x)
    assert got.shape == layer(x).shape
    assert np.array_equal(got.numpy(), reference_conv(x, folded, layer, [(2, 2), (1, 2)], (X, Y)))


# -- linear layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 5, 7), (2, 3, 4, 7), (0, 7), (0, 3, 7)], ids=str)
@pytest.mark.parametrize("y", [Y, None], ids=["grid", "float"])
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero points"])
def test_a_linear_layer_is_int64_arithmetic(shape: tuple[int, ...], y: Grid | None, zero_point: bool) -> None:
    folded, x = random_weight((6, 7), zero_point=zero_point), torch.randn(shape)
    got = IntegerLayer(folded, Geometry.of(nn.Linear(7, 6)), X, y)(x)
    assert got.shape == (*shape[:-1], 6)
    assert np.array_equal(got.numpy(), reference_linear(x, folded, (X, y)))


GRIDS = {
    "uint8": grid(0.02, 77),
    "uint8 zero at 0": grid(0.02, 0),
    "uint8 zero at 255": grid(0.02, 255),
    "int8": grid(0.02, -20, -128, 127),
    "int8 symmetric": grid(0.02, 0, -127, 127),
    "relu": grid(0.02, 0, 0, 255, (0, 255)),
    "relu6 clipped": grid(0.02, 3, 0, 255, (3, 200)),
    "symmetric relu": grid(0.02, 0, -127, 127, (0, 127)),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_every_kind_of_grid_on_either_side(name: str, side: str) -> None:
    folded, x = random_weight((6, 7)), torch.randn(40, 7) * 3
    grids = (GRIDS[name], Y) if side == "input" else (X, GRIDS[name])
    got = IntegerLayer(folded, Geometry.of(nn.Linear(7, 6)), *grids)(x)
    assert np.array_equal(got.numpy(), reference_linear(x, folded, grids))
    if side == "output":
        levels = (got / GRIDS[name].scale).round() + GRIDS[name].zero_point
        assert int(levels.min()) >= GRIDS[name].clip_low
        assert int(levels.max()) <= GRIDS[name].clip_high


@pytest.mark.parametrize("rectify", [(0.0, math.inf), (0.0, 6.0)], ids=["relu", "relu6"])
def test_an_activation_on_a_float_output(rectify: tuple[float, float]) -> None:
    folded, x = random_weight((6, 7)), torch.randn(40, 7) * 3
    got = IntegerLayer(folded, Geometry.of(nn.Linear(7, 6)), X, None, rectify)(x)
    expected = np.clip(reference_linear(x, folded, (X, None)), *rectify)
    assert np.array_equal(got.numpy(), expected)
    assert 0.0 in expected
    assert expected.max() > 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_input_is_kept(kind: str, dtype: torch.dtype) -> None:
    layer: Any = nn.Linear(7, 6) if kind == "linear" else nn.Conv1d(7, 6, 2)
    x = torch.randn(5, 7).to(dtype) if kind == "linear" else torch.randn(2, 7, 5).to(dtype)
    made = IntegerLayer(random_weight(tuple(layer.weight.shape)), Geometry.of(layer), X, Y)
    got = made(x)
    assert got.dtype == dtype
    assert torch.equal(got, made(x.float()).to(dtype))


def test_the_input_and_the_weights_are_not_written_to() -> None:
    made = IntegerLayer(random_weight((6, 7), zero_point=True), Geometry.of(nn.Linear(7, 6)), X, None, (0.0, 1.0))
    x = torch.randn(5, 7)
    kept, state = x.clone(), {key: value.clone() for key, value in made.state_dict().items()}
    first = made(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(state[key], value) for key, value in made.state_dict().items())
    assert torch.equal(made(x), first)


def test_what_a_layer_stores() -> None:
    made = IntegerLayer(random_weight((6, 7), zero_point=True), Geometry.of(nn.Linear(7, 6)), X, Y)
    dtypes = {key: value.dtype for key, value in made.state_dict().items()}
    expected = {"weight": torch.int8, "scale": torch.float32, "zero_point": torch.int8, "bias": torch.int32}
    assert dtypes == expected
    assert not list(made.parameters())
    assert not made.training
    assert "zero_point" not in IntegerLayer(random_weight((6, 7)), Geometry.of(nn.Linear(7, 6)), X, Y).state_dict()


def test_a_layer_says_what_it_is() -> None:
    linear, conv = Geometry.of(nn.Linear(7, 6)), Geometry.of(nn.Conv1d(7, 6, 2))
    made = IntegerLayer(random_weight((6, 7)), linear, X, None)
    assert repr(made) == "IntegerLayer(linear, (6, 7), int8 weight, int32 bias, uint8 -> float32)"
    made = IntegerLayer(random_weight((6, 7, 2)), conv, X, Y)
    assert repr(made) == "IntegerLayer(conv, (6, 7, 2), int8 weight, int32 bias, uint8 -> uint8)"


# -- exactness --------------------------------------------------------------------------------------------------------


def wide_case(kind: str) -> tuple[FoldedWeight, Geometry, Tensor]:
    """4096 products of up to 127 * 255: sums around 10^8, where float32 has steps of 8."""
    shape = (16, 4096) if kind == "linear" else (16, 4096, 1, 1)
    q = torch.randint(100, 128, shape).to(torch.int8)
    folded = FoldedWeight(q=q, scale=torch.ones(16), zero_point=None, bias=torch.zeros(16, dtype=torch.float64))
    x = torch.randint(200, 256, (8, 4096)).float()
    if kind == "linear":
        return folded, Geometry.of(nn.Linear(4096, 16)), x
    return folded, Geometry.of(nn.Conv2d(4096, 16, 1)), x.view(8, 4096, 1, 1)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sums_beyond_float32_are_exact(kind: str) -> None:
    folded, geometry, x = wide_case(kind)
    exact = (x.view(8, -1).long() @ folded.q.view(16, -1).long().T).numpy()
    made = IntegerLayer(folded, geometry, grid(1.0, 0), None)
    got = made(x).view(8, 16).numpy()
    narrow = (x.view(8, -1) @ folded.q.view(16, -1).float().T).numpy()
    assert exact.min() > EXACT_FLOAT32
    assert not np.array_equal(narrow, exact.astype(np.float32))  # what a float32 layer would give
    assert made.wide
    assert np.array_equal(got, exact.astype(np.float32))


def test_a_wide_sum_is_requantized_in_float32() -> None:
    """float32(113499997) is 113500000; times 1e-6 that is 113.5, which rounds to 114, and the exact product to 113."""
    q, bias = torch.ones(1, 1, dtype=torch.int8), torch.tensor([113_499_997.0], dtype=torch.float64)
    folded = FoldedWeight(q=q, scale=torch.ones(1), zero_point=None, bias=bias)
    made = IntegerLayer(folded, Geometry.of(nn.Linear(1, 1)), grid(1.0, 0), grid(1e6, 0))
    assert made.wide
    assert made(torch.zeros(1, 1)).item() == 114e6


@pytest.mark.parametrize(("bias", "wide"), [(65_535, False), (65_536, True), (-65_536, False), (-(2**24), True)])
def test_a_layer_is_wide_from_a_worst_sum_of_two_to_the_24(bias: int, wide: bool) -> None:
    """516 weights of 127 and one of 4: 65536 * 255 + 65536 = 2^24; a negative bias comes before them, alone."""
    q = torch.tensor([[127] * 516 + [4]]).to(torch.int8)
    assert int(q.sum()) * 255 + 65_536 == EXACT_FLOAT32
    folded = FoldedWeight(q=q, scale=torch.ones(1), zero_point=None, bias=torch.tensor([bias], dtype=torch.float64))
    assert IntegerLayer(folded, Geometry.of(nn.Linear(517, 1)), grid(1.0, 0), None).wide is wide


@pytest.mark.parametrize(("zero", "wide"), [(0, True), (128, False), (255, True)])
def test_the_worst_sum_counts_from_the_zero_point_of_the_input(zero: int, wide: bool) -> None:
    q = torch.full((1, 600), 127).to(torch.int8)  # 600 * 127 * 255 > 2^24 > 600 * 127 * 128
    folded = FoldedWeight(q=q, scale=torch.ones(1), zero_point=None, bias=torch.zeros(1, dtype=torch.float64))
    assert IntegerLayer(folded, Geometry.of(nn.Linear(600, 1)), grid(1.0, zero), None).wide is wide


def test_the_worst_sum_counts_from_the_zero_point_of_the_weight() -> None:
    q, zero = torch.full((1, 400), 127).to(torch.int8), torch.tensor([-127], dtype=torch.int8)
    for zero_point, wide in ((None, False), (zero, True)):  # 400 * 127 * 255 < 2^24 < 400 * 254 * 255
        folded = FoldedWeight(q=q, scale=torch.ones(1), zero_point=zero_point, bias=torch.zeros(1, dtype=torch.float64))
        assert IntegerLayer(folded, Geometry.of(nn.Linear(400, 1)), grid(1.0, 0), None).wide is wide


@pytest.mark.parametrize("bias", [1.0, -1.0, 40.0])
@pytest.mark.parametrize("y", [grid(0.5, 128), None], ids=["grid", "float"])
@pytest.mark.parametrize("per_tensor", [False, True], ids=["scales", "one scale"])
def test_a_bias_that_int32_cannot_hold_widens_the_step(bias: float, y: Grid | None, per_tensor: bool) -> None:
    """1.0 / (0.02 * 1e-8) is 5e9: wrapped into int32 it would come out as -0.42."""
    scale = torch.tensor(1e-8) if per_tensor else torch.tensor([1e-8, 0.5])
    folded = FoldedWeight(
        q=torch.tensor([[100, -50], [3, 5]]).to(torch.int8),
        scale=scale,
        zero_point=None,
        bias=torch.tensor([bias, 0.0], dtype=torch.float64),
    )
    made = IntegerLayer(folded, Geometry.of(nn.Linear(2, 2)), X, y)
    got = made(torch.tensor([[1.0, -1.0]]))
    assert got[0, 0].item() == pytest.approx(bias, abs=2e-6, rel=2e-7)  # the weights themselves add 1.5e-6
    assert int(made.bias[0]) * bias > 0
    if not per_tensor:
        assert made.scale[1].item() == 0.5
        assert made.weight[1].tolist() == [3, 5]


def test_the_widened_weight_is_the_same_weight_on_larger_steps() -> None:
    q, zero = torch.tensor([[100, -50]]).to(torch.int8), torch.tensor([20], dtype=torch.int8)
    folded = FoldedWeight(q=q, scale=torch.tensor([4e-8]), zero_point=zero, bias=torch.tensor([4.0], dtype=torch.float64))
    made = IntegerLayer(folded, Geometry.of(nn.Linear(2, 1)), X, None)
    step = 2 * 4.0 / (X.scale * (2**31 - 1))
    assert made.scale.item() == pytest.approx(step, rel=1e-6)
    assert made.weight.tolist() == [[20 + round(80 * 4e-8 / step), 20 + round(-70 * 4e-8 / step)]]
    assert int(made.bias[0]) == pytest.approx(2**30, rel=1e-6)


# -- nothing global changes the integers, and nothing global is changed ---------------------------------------------------


@pytest.fixture
def layers() -> list[tuple[IntegerLayer, Tensor]]:
    conv: Any = nn.Conv2d(3, 4, 3, padding=1)
    narrow = IntegerLayer(random_weight((4, 3, 3, 3)), Geometry.of(conv), X, Y)
    linear = IntegerLayer(random_weight((6, 70)), Geometry.of(nn.Linear(70, 6)), X, None)
    folded, geometry, x = wide_case("linear")
    wide = IntegerLayer(folded, geometry, grid(1.0, 0), None)
    return [(narrow, torch.randn(2, 3, 9, 9)), (linear, torch.randn(5, 70)), (wide, x)]


def test_autocast_changes_nothing(layers: list[tuple[IntegerLayer, Tensor]]) -> None:
    for layer, x in layers:
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = layer(x)
            assert torch.is_autocast_enabled("cpu")
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, plain)


@pytest.mark.parametrize("partly", [False, True], ids=["integer", "partly integer"])
@pytest.mark.parametrize("y", [Y, None], ids=["grid", "float"])
def test_under_autocast_the_output_is_float32_whatever_comes_in(partly: bool, y: Grid | None) -> None:
    """bfloat16 has 8 bits of mantissa: it cannot hold 256 levels."""
    folded, geometry = random_weight((6, 7)), Geometry.of(nn.Linear(7, 6))
    made = PartlyIntegerLayer(folded, geometry, None, y, None) if partly else IntegerLayer(folded, geometry, X, y)
    x = torch.randn(50, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(x)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, made(x.float()))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_changes_nothing_and_is_restored(layers: list[tuple[IntegerLayer, Tensor]], precision: str) -> None:
    plain = [layer(x) for layer, x in layers]
    try:
        torch.set_float32_matmul_precision(precision)
        again = [layer(x) for layer, x in layers]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_the_multiplication_itself_runs_exactly(
    layers: list[tuple[IntegerLayer, Tensor]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU without bfloat16 units cannot show a difference in the result, so the settings are looked at from inside."""
    seen: list[tuple[bool, bool]] = []
    original: Callable[..., Tensor] = getattr(F, name)

    def spy(*args: Any) -> Tensor:
        mkldnn: Any = torch.backends.mkldnn
        exact = {mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision} <= {"none", "ieee"}
        seen.append((exact, torch.is_autocast_enabled("cpu")))
        return original(*args)

    monkeypatch.setattr(F, name, spy)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer, x in layers:
                layer(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {(True, False)}


def test_the_setting_is_restored_when_the_multiplication_fails(layers: list[tuple[IntegerLayer, Tensor]]) -> None:
    linear, x = layers[1]
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x[:, :-1])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", ["mkldnn.matmul", "cuda.matmul", "cudnn.conv"])
def test_torchs_newer_precision_settings_are_no_obstacle(layers: list[tuple[IntegerLayer, Tensor]], backend: str) -> None:
    """torch refuses to *read* the old setting once a new one (`torch.backends.cuda.matmul.fp32_precision`) is in use."""
    plain = [layer(x) for layer, x in layers]
    place: Any = torch.backends
    for part in backend.split("."):
        place = getattr(place, part)
    before = place.fp32_precision
    try:
        place.fp32_precision = "tf32"
        again = [layer(x) for layer, x in layers]
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_precision_that_is_inherited_stays_inherited(layers: list[tuple[IntegerLayer, Tensor]]) -> None:
    """What follows `torch.backends.fp32_precision` must go on following it, not keep the value of that moment."""
    place: Any = torch.backends
    place.mkldnn.matmul.fp32_precision = place.mkldnn.conv.fp32_precision = "none"
    try:
        place.fp32_precision = "tf32"
        for layer, x in layers:
            layer(x)
        assert {place.mkldnn.matmul.fp32_precision, place.mkldnn.conv.fp32_precision} == {"tf32"}
        place.fp32_precision = "ieee"
        assert {place.mkldnn.matmul.fp32_precision, place.mkldnn.conv.fp32_precision} == {"ieee"}
    finally:
        place.fp32_precision = place.mkldnn.matmul.fp32_precision = place.mkldnn.conv.fp32_precision = "none"


# -- layers that lack a grid ----------------------------------------------------------------------------------------------


def float_fake_quantize(x: Tensor, g: Grid) -> Tensor:
    steps = np.clip(np.rint(x.numpy() / np.float32(g.scale)), g.clip_low - g.zero_point, g.clip_high - g.zero_point)
    return torch.from_numpy(steps.astype(np.float32) * np.float32(g.scale))


@pytest.mark.parametrize("rectify", [None, (0.0, 6.0)], ids=["plain", "relu6"])
@pytest.mark.parametrize("y", [None, grid(0.05, 100), grid(0.05, 10, clip=(10, 130))], ids=["y float", "y grid", "y relu"])
@pytest.mark.parametrize("x_grid", [None, X], ids=["x float", "x grid"])
@pytest.mark.parametrize("weight", ["float", "scales", "one scale", "zero points"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_partly_integer_layer_is_plain_torch(
    kind: str, weight: str, x_grid: Grid | None, y: Grid | None, rectify: tuple[float, float] | None
) -> None:
    layer: Any = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2) if kind == "conv" else nn.Linear(7, 6)
    shape = tuple(layer.weight.shape)
    whole = random_weight(shape, zero_point=weight == "zero points", per_tensor=weight == "one scale")
    pair = (layer.weight.detach(), torch.randn(6, dtype=torch.float64))
    folded = pair if weight == "float" else whole
    x = torch.randn(2, 4, 6, 5) if kind == "conv" else torch.randn(3, 2, 7)
    got = PartlyIntegerLayer(folded, Geometry.of(layer), x_grid, y, rectify)(x)

    column_scale = whole.scale.view(-1, *[1] * (len(shape) - 1)) if whole.scale.dim() else whole.scale
    w = pair[0] if weight == "float" else torch.from_numpy(shifted(whole)).float() * column_scale
    bias = (pair[1] if weight == "float" else whole.bias).float()
    inside = x if x_grid is None else float_fake_quantize(x, x_grid)
    out = F.conv2d(inside, w, bias, 2, 1, 1, 2) if kind == "conv" else F.linear(inside, w, bias)
    out = out if rectify is None else out.clamp(*rectify)
    assert torch.equal(got, out if y is None else float_fake_quantize(out, y))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", ["1d same even", "2d reflect", "2d circular same even", "3d", "2d same dilated"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
def test_a_partly_integer_layer_pads_as_the_layer_does(name: str, batched: bool) -> None:
    make, shape, _ = CONVS[name]
    layer: Any = make()
    x = torch.randn(shape) if batched else torch.randn(shape)[0]
    pair = (layer.weight.detach(), layer.bias.detach().double())
    torch.testing.assert_close(PartlyIntegerLayer(pair, Geometry.of(layer), None, None, None)(x), layer(x).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_partly_integer_layer_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    made = PartlyIntegerLayer(random_weight((6, 7)), Geometry.of(nn.Linear(7, 6)), None, None, None)
    x = torch.randn(5, 7).to(dtype)
    assert made(x).dtype == dtype
    assert torch.equal(made(x), made(x.float()).to(dtype))


@pytest.mark.parametrize("y", [Y, None], ids=["grid", "float"])
def test_autocast_changes_nothing_in_a_partly_integer_layer(y: Grid | None) -> None:
    made = PartlyIntegerLayer(random_weight((6, 7)), Geometry.of(nn.Linear(7, 6)), None, y, None)
    x = torch.randn(50, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(x)
        assert torch.is_autocast_enabled("cpu")
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, made(x))


@pytest.mark.parametrize(
    ("weight", "x", "y", "words"),
    [
        (True, None, None, "int8 weight"),
        (True, X, None, "int8 weight, rounded input"),
        (False, X, Y, "float weight, rounded input, rounded output"),
        (False, None, Y, "float weight, rounded output"),
    ],
)
def test_a_partly_integer_layer_says_what_it_is(weight: bool, x: Grid | None, y: Grid | None, words: str) -> None:
    folded = random_weight((6, 7)) if weight else (torch.randn(6, 7), torch.zeros(6, dtype=torch.float64))
    made = PartlyIntegerLayer(folded, Geometry.of(nn.Linear(7, 6)), x, y, None)
    said = f"linear, (6, 7), {words}, float arithmetic"
    children = [f"  ({name}): Rounding(0..255)\n" for name, g in (("x", x), ("y", y)) if g is not None]
    expected = f"PartlyIntegerLayer(\n  {said}\n{''.join(children)})" if children else f"PartlyIntegerLayer({said})"
    assert repr(made) == expected


# -- the operators ------------------------------------------------------------------------------------------------------

OPS = torch.ops.lightning_quant
Q2D, Q4D = torch.randint(0, 256, (3, 7), dtype=torch.uint8), torch.randint(0, 256, (2, 4, 6, 5), dtype=torch.uint8)
W2D, W4D = torch.randint(-127, 128, (6, 7), dtype=torch.int8), torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8)
SCALE, ZERO = torch.full((6,), 0.01), torch.arange(-3, 3, dtype=torch.int8)
BIAS = torch.arange(6, dtype=torch.int32)
WINDOW = ([2, 1], [1, 1], [1, 1], 2)
GRID, FLOAT, WIDE = (0.3, 100, 0, 255, False), (None, 0, 0, 0, False), (None, 0, 0, 0, True)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "quantize": (OPS.quantize.default, (torch.randn(2, 3, 4), 0.02, 120, 0, 255)),
    "quantize float64": (OPS.quantize.default, (torch.randn(3, dtype=torch.float64), 0.02, 120, 0, 255)),
    "quantize empty": (OPS.quantize.default, (torch.randn(0, 4), 0.02, 120, 0, 255)),
    "dequantize": (OPS.dequantize.default, (Q4D, 0.02, 120)),
    "dequantize_weight": (OPS.dequantize_weight.default, (W4D, SCALE, None)),
    "dequantize_weight zero": (OPS.dequantize_weight.default, (W4D, SCALE, ZERO)),
    "dequantize_weight scalar": (OPS.dequantize_weight.default, (W2D, torch.tensor(0.1), None)),
    "linear grid": (OPS.linear.default, (Q2D, 0.02, 120, W2D, SCALE, None, BIAS, *GRID)),
    "linear float": (OPS.linear.default, (Q2D, 0.02, 120, W2D, SCALE, ZERO, BIAS, *FLOAT)),
    "linear wide": (OPS.linear.default, (Q2D, 0.02, 120, W2D, torch.tensor(0.1), None, BIAS, *WIDE)),
    "conv grid": (OPS.conv.default, (Q4D, 0.02, 120, W4D, SCALE, ZERO, BIAS, *WINDOW, *GRID)),
    "conv float": (OPS.conv.default, (Q4D, 0.02, 120, W4D, torch.tensor(0.1), None, BIAS, *WINDOW, *FLOAT)),
    "conv wide": (OPS.conv.default, (Q4D, 0.02, 120, W4D, SCALE, None, BIAS, *WINDOW, *WIDE)),
    "quantize 16 bits": (OPS.quantize.default, (torch.randn(2, 3), 1e-4, 30000, 0, 65535)),
    "dequantize 16 bits": (OPS.dequantize.default, (Q2D.to(torch.uint16), 0.02, 120)),
    "dequantize_weight blocks": (OPS.dequantize_weight.default, (W2D, torch.rand(6, 1), ZERO.view(6, 1))),
    "round_blocks": (OPS.round_blocks.default, (torch.randn(2, 4, 3), torch.rand(1, 4, 1), torch.zeros(1, 4, 1), 0, 15)),
}


@pytest.mark.parametrize("name", CALLS)
def test_schemas_and_shapes_of_the_operators(name: str) -> None:
    operator, args = CALLS[name]
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("x", "q"), [(0.0, 10), (0.25, 10), (0.75, 12), (1.25, 12), (-5.0, 0), (-99.0, 0), (100.0, 200), (1e9, 200)]
)
def test_quantize_by_hand(x: float, q: int) -> None:
    """Scale 1/2, zero point 10, levels 0..200; ties go to even."""
    assert OPS.quantize(torch.tensor([x]), 0.5, 10, 0, 200).tolist() == [q]


def test_quantize_divides() -> None:
    """1/s would flip some ties of float32(0.3)."""
    s = np.float32(0.3)
    x = (np.arange(128) + 0.5).astype(np.float32) * s
    divided, reciprocal = np.rint(x / s), np.rint(x * (np.float32(1) / s))
    assert (divided != reciprocal).any()
    assert np.array_equal(OPS.quantize(torch.from_numpy(x), float(s), 0, 0, 255).numpy(), divided)


def test_dequantize_by_hand() -> None:
    assert OPS.dequantize(torch.tensor([0, 10, 255], dtype=torch.uint8), 0.5, 10).tolist() == [-5.0, 0.0, 122.5]


def test_dequantize_weight_by_hand() -> None:
    q, zero = torch.tensor([[4, -4], [10, 0]], dtype=torch.int8), torch.tensor([2, -2], dtype=torch.int8)
    scale = torch.tensor([0.5, 0.25])
    assert OPS.dequantize_weight(q, scale, None).tolist() == [[2.0, -2.0], [2.5, 0.0]]
    assert OPS.dequantize_weight(q, scale, zero).tolist() == [[1.0, -3.0], [3.0, 0.5]]
    assert OPS.dequantize_weight(q, torch.tensor(2.0), None).tolist() == [[8.0, -8.0], [20.0, 0.0]]


def test_dequantize_weight_of_blocks_by_hand() -> None:
    """Blocks of two along dimension 1, a scale for each row; a zero point for each row."""
    q = torch.tensor([[4, -4, 1, 2], [10, 0, 3, 4]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0], [0.25, 1.0]]), torch.tensor([[2], [-2]], dtype=torch.int8)
    assert OPS.dequantize_weight(q, scale, None).tolist() == [[2.0, -2.0, 2.0, 4.0], [2.5, 0.0, 3.0, 4.0]]
    assert OPS.dequantize_weight(q, scale, zero).tolist() == [[1.0, -3.0, -2.0, 0.0], [3.0, 0.5, 5.0, 6.0]]


def test_round_blocks_by_hand() -> None:
    """Scales 1/2 and 2, zero points 10 and 0, levels 0..20; ties go to even."""
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[10.0, 0.0]])
    x = torch.tensor([[0.25, 1.0], [0.75, 3.0], [-99.0, -99.0], [99.0, 99.0]])
    assert OPS.round_blocks(x, scale, zero, 0, 20).tolist() == [[0.0, 0.0], [1.0, 4.0], [-5.0, 0.0], [5.0, 40.0]]


def test_linear_by_hand() -> None:
    """(12-10)*3 + (9-10)*4 + 5 = 7 steps of 0.5*0.2; on a grid of 0.2 that is 3.5, rounded to 4, moved by 1."""
    q, w = torch.tensor([[12, 9]], dtype=torch.uint8), torch.tensor([[3, 4]], dtype=torch.int8)
    head = (q, 0.5, 10, w, torch.tensor([0.2]), None, torch.tensor([5], dtype=torch.int32))
    assert OPS.linear(*head, None, 0, 0, 0, False).item() == pytest.approx(0.7)
    assert OPS.linear(*head, 0.2, 1, 0, 255, False).item() == 5
    assert OPS.linear(*head, 0.2, 1, 0, 3, False).item() == 3


def test_the_multiplier_is_divided_by_the_output_scale() -> None:
    """s / 2s is one half, s * (1 / 2s) a little less for this s: every odd sum is a tie, rounded to even."""
    s = float(np.float32(47 / 997))
    assert np.float32(s) * np.float32(1 / (2 * s)) < 0.5
    q = torch.arange(1, 255, 2, dtype=torch.uint8).unsqueeze(1)
    one, bias = torch.ones(1, 1, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    got = OPS.linear(q, 1.0, 0, one, torch.tensor([s]), None, bias, 2 * s, 0, 0, 255, False)
    assert np.array_equal(got.numpy(), np.rint(q.numpy() / 2))
