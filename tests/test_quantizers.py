# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `quantizers.py`: grids, rounding and gradients against numpy, torch's own kernel and hand-made numbers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lightning_quant.config import TensorSpec
from lightning_quant.quantizers import (
    ActivationQuantizer,
    Grid,
    affine_range,
    float32,
)
from lightning_quant.weights import fake_quantize_weight, quantize_weight, weight_grid

Array = npt.NDArray[Any]
EPS = 2.0**-23


def activation(dtype: str = "uint8", scheme: str = "affine") -> TensorSpec:
    return TensorSpec.make(dtype, scheme, "per_tensor", weight=False)


def weight(dtype: str = "int8", scheme: str = "symmetric", granularity: str = "per_tensor") -> TensorSpec:
    return TensorSpec.make(dtype, scheme, granularity, weight=True)


def quantizer(low: float, high: float, spec: TensorSpec | None = None, **options: Any) -> ActivationQuantizer:
    made = ActivationQuantizer(spec or activation(), "conv1._output_", **options)
    made.load_state_dict({"low": low, "high": high})
    return made


def numpy_fake_quantize(x: Array, scale: float, zero: int, qmin: int, qmax: int) -> Array:
    """The equation of the module's docstring in numpy: float32 division, round half even."""
    steps = np.rint(x.astype(np.float32) / np.float32(scale))
    q = np.clip(steps, qmin - zero, qmax - zero).astype(np.int64) + zero
    rounded: Array = (q - zero).astype(np.float32) * np.float32(scale)
    return rounded


# (low, high, dtype, scheme) -> (scale, zero point, qmin, qmax), computed by hand
GRIDS: list[tuple[float, float, str, str, float, int, int, int]] = [
    (0.0, 2.55, "uint8", "affine", 2.55 / 255, 0, 0, 255),
    (-1.0, 1.0, "uint8", "affine", 2 / 255, 127, 0, 255),  # 1 / float32(2 / 255) is 127.4999957
    (-1.0, 2.0, "uint8", "affine", 3 / 255, 85, 0, 255),
    (0.5, 2.0, "uint8", "affine", 2 / 255, 0, 0, 255),
    (-2.0, -0.5, "uint8", "affine", 2 / 255, 255, 0, 255),
    (0.5, 2.0, "int8", "affine", 2 / 255, -128, -128, 127),
    (-1.0, 2.0, "int8", "affine", 3 / 255, -43, -128, 127),
    (-2.0, -0.5, "int8", "affine", 2 / 255, 127, -128, 127),
    (-1.0, 2.0, "int8", "symmetric", 2 / 127, 0, -127, 127),
    (-3.0, 2.0, "int8", "symmetric", 3 / 127, 0, -127, 127),
    (-1.0, 2.0, "uint8", "symmetric", 2 / 127.5, 128, 0, 255),
    (0.0, 0.0, "uint8", "affine", EPS, 0, 0, 255),
    (0.0, 0.0, "int8", "symmetric", EPS, 0, -127, 127),
    (0.0, 1e-9, "uint8", "affine", EPS, 0, 0, 255),
    (-1e30, 1e30, "uint8", "affine", 2e30 / 255, 128, 0, 255),
    (-3e38, 3e38, "int8", "symmetric", 3e38 / 127, 0, -127, 127),
    (0.0, 1e-3, "int8", "affine", 1e-3 / 255, -128, -128, 127),
]
GRID_IDS = [f"{row[2]} {row[3]} {row[0]}..{row[1]}" for row in GRIDS]


# -- ranges become grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "dtype", "scheme", "scale", "zero", "qmin", "qmax"), GRIDS, ids=GRID_IDS)
def test_the_grid_of_a_range(
    low: float, high: float, dtype: str, scheme: str, scale: float, zero: int, qmin: int, qmax: int
) -> None:
    expected = Grid(scale=float(np.float32(scale)), zero_point=zero, qmin=qmin, qmax=qmax, clip_low=qmin, clip_high=qmax)
    assert quantizer(low, high, activation(dtype, scheme)).grid() == expected
    assert affine_range(low, high, activation(dtype, scheme)) == (expected.scale, zero)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -2.5, 0.0, 1e-40, 16_777_217.0])
def test_float32_is_what_numpy_holds(value: float) -> None:
    assert float32(value) == float(np.float32(value))


@pytest.mark.parametrize(
    ("qmin", "qmax", "zero", "shift"), [(-128, 127, -43, 128), (-127, 127, 0, 128), (0, 255, 85, 0)], ids=str
)
def test_unsigned_moves_the_integers_and_keeps_the_scale(qmin: int, qmax: int, zero: int, shift: int) -> None:
    grid = Grid(scale=0.25, zero_point=zero, qmin=qmin, qmax=qmax, clip_low=zero, clip_high=qmax - 3)
    moved = grid.unsigned()
    assert (moved.scale, moved.zero_point - zero) == (0.25, shift)
    assert (moved.qmin - qmin, moved.qmax - qmax) == (shift, shift)
    assert (moved.clip_low - zero, moved.clip_high - (qmax - 3)) == (shift, shift)
    assert moved.qmin >= 0
    assert moved.qmax == 255


# -- rounding: forward ----------------------------------------------------------------------------------------------


def spread(scale: float, zero: int, qmin: int, qmax: int) -> Tensor:
    """Values inside, at the ends of and well outside a grid, every half step among them."""
    halves = torch.arange(2 * (qmin - zero) - 8, 2 * (qmax - zero) + 9) / 2
    inside = torch.empty(4096).uniform_(qmin - zero - 9, qmax - zero + 9)
    return torch.cat([halves, inside, torch.tensor([-1e4, 1e4])]) * scale


@pytest.mark.parametrize(("low", "high", "dtype", "scheme", "scale", "zero", "qmin", "qmax"), GRIDS, ids=GRID_IDS)
def test_forward_is_the_equation_bit_for_bit(
    low: float, high: float, dtype: str, scheme: str, scale: float, zero: int, qmin: int, qmax: int
) -> None:
    scale = float(np.float32(scale))
    x = spread(scale, zero, qmin, qmax)
    got = quantizer(low, high, activation(dtype, scheme))(x)
    assert np.array_equal(got.numpy(), numpy_fake_quantize(x.numpy(), scale, zero, qmin, qmax))


@pytest.mark.parametrize(("low", "high", "dtype", "scheme", "scale", "zero", "qmin", "qmax"), GRIDS, ids=GRID_IDS)
def test_forward_is_torchs_kernel_but_for_reciprocal_ties(
    low: float, high: float, dtype: str, scheme: str, scale: float, zero: int, qmin: int, qmax: int
) -> None:
    scale = float(np.float32(scale))
    x = spread(scale, zero, qmin, qmax)
    got = quantizer(low, high, activation(dtype, scheme))(x)
    reference = torch.fake_quantize_per_tensor_affine(x, scale, zero, qmin, qmax)
    ratio = x.double() / scale
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(got[~tie], reference[~tie])
    assert bool((tie.sum() > 200) & ((~tie).sum() > 4000))


def test_values_are_divided_not_multiplied_by_the_reciprocal() -> None:
    """1/s flips ties: at s = float32(0.3) some (k + 1/2) s would land on the other side."""
    s = np.float32(0.3)
    x = (np.arange(-127, 127) + 0.5).astype(np.float32) * s
    divided, reciprocal = np.rint(x / s), np.rint(x * (np.float32(1) / s))
    assert (divided != reciprocal).any()
    got = quantizer(-38.1, 38.1, activation("int8", "symmetric"))(torch.from_numpy(x))
    assert np.array_equal(got.numpy(), divided.astype(np.float32) * s)


def test_halves_round_to_even() -> None:
    got = quantizer(-127.0, 127.0, activation("int8", "symmetric"))(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]))
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


def test_zero_is_a_level_even_where_the_range_leaves_it_out() -> None:
    for low, high in ((0.5, 2.0), (-2.0, -0.7), (-0.3, 1.1)):
        assert quantizer(low, high)(torch.zeros(1)).item() == 0.0


def test_the_input_is_not_written_to() -> None:
    x = torch.linspace(-3, 3, 50)
    kept = x.clone()
    with torch.no_grad():
        y = quantizer(-1.0, 1.0)(x)
    assert torch.equal(x, kept)
    assert not torch.equal(y, kept)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (), (2, 3, 4, 5)], ids=str)
def test_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    made = quantizer(-1.0, 1.0)
    assert made(x).shape == shape
    assert made._on_device(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(500).to(dtype).requires_grad_()
    y = quantizer(-1.0, 2.0)(x)
    expected = numpy_fake_quantize(x.detach().float().numpy(), 3 / 255, 85, 0, 255)
    assert y.dtype == dtype
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == dtype


def test_float64_is_rounded_in_float64() -> None:
    scale = float(np.float32(3 / 255))
    x = torch.cat([torch.randn(500, dtype=torch.float64), torch.tensor([2.5 * scale * (1 + 1e-12)], dtype=torch.float64)])
    y = quantizer(-1.0, 2.0)(x)
    assert y.dtype == torch.float64
    assert np.array_equal(y.numpy(), np.clip(np.rint(x.numpy() / scale), -85, 170) * scale)
    assert y[-1].item() == 3 * scale


# -- rounding: gradient -----------------------------------------------------------------------------------------------


def gradient(function: Any, x: Tensor) -> Tensor:
    """d function(x) / dx for an upstream gradient of distinct numbers."""
    x = x.detach().clone().requires_grad_()
    upstream = torch.arange(1, x.numel() + 1, dtype=x.dtype).view_as(x)
    (grad,) = torch.autograd.grad(function(x), x, upstream)
    return grad


@pytest.mark.parametrize(("low", "high", "dtype", "scheme", "scale", "zero", "qmin", "qmax"), GRIDS, ids=GRID_IDS)
def test_the_gradient_is_torchs_but_for_ties_at_the_ends(
    low: float, high: float, dtype: str, scheme: str, scale: float, zero: int, qmin: int, qmax: int
) -> None:
    scale = float(np.float32(scale))
    x = spread(scale, zero, qmin, qmax)
    ends = torch.tensor([qmin - zero - 0.5, qmax - zero + 0.5], dtype=torch.float64)
    x = x[((x.double() / scale).unsqueeze(1) - ends).abs().amin(1) > 1e-4]
    got = gradient(quantizer(low, high, activation(dtype, scheme)), x)
    expected = gradient(lambda t: torch.fake_quantize_per_tensor_affine(t, scale, zero, qmin, qmax), x)
    assert torch.equal(got, expected)
    assert 0 < int((got == 0).sum()) < x.numel()


@pytest.mark.parametrize(
    ("steps", "passes"),
    [(0.0, 1), (126.9, 1), (127.0, 1), (127.49, 1), (127.51, 0), (128.0, 0), (-127.0, 1), (-127.49, 1), (-127.51, 0)],
)
def test_the_gradient_passes_where_the_rounded_value_is_on_the_grid(steps: float, passes: int) -> None:
    """Scale 1/2, levels -127..127: rounded values 127 and -127 are the ends, included."""
    made = quantizer(-63.5, 63.5, activation("int8", "symmetric"))
    assert gradient(made, torch.tensor([steps / 2])).item() == passes


def test_the_gradient_of_the_acceptance_list() -> None:
    made = quantizer(-1.0, 1.0, activation("int8", "symmetric"))
    assert gradient(made, torch.tensor([0.3, 5.0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("path", ["__call__", "_on_host", "_on_device"])
def test_the_callers_gradient_is_never_written_to(path: str) -> None:
    made = quantizer(-1.0, 1.0)
    x = torch.tensor([0.3, 5.0, -0.2], requires_grad=True)
    upstream = torch.tensor([3.0, 4.0, 5.0])
    getattr(made, path)(x).backward(upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 0.0, 5.0]
    x.grad.zero_()
    assert upstream.tolist() == [3.0, 4.0, 5.0]


def test_no_graph_is_built_without_gradients() -> None:
    made = quantizer(-1.0, 1.0)
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert made(x).grad_fn is None
    assert made(x.detach()).grad_fn is None


# -- an absorbed ReLU ---------------------------------------------------------------------------------------------------

RECTIFIED: list[tuple[str, str, float]] = [
    ("uint8", "affine", math.inf),
    ("uint8", "affine", 6.0),
    ("int8", "affine", math.inf),
    ("int8", "affine", 6.0),
    ("int8", "symmetric", math.inf),
    ("int8", "symmetric", 6.0),
    ("uint8", "symmetric", 6.0),
]
# Without exact zeros, sixes and half steps, where relu, relu6 and the grid each have their own one-sided gradient.
BEFORE_RELU = torch.linspace(-9.03, 9.07, 1000)


@pytest.mark.parametrize("high", [2.0, 5.99, 6.0, 8.0])
@pytest.mark.parametrize(("dtype", "scheme", "cap"), RECTIFIED, ids=str)
def test_an_absorbed_relu_is_relu_then_fake_quantize(dtype: str, scheme: str, cap: float, high: float) -> None:
    spec, top = activation(dtype, scheme), min(high, cap)
    made = quantizer(0.0, top, spec, rectified=True, cap=cap)
    scale, zero = affine_range(0.0, top, spec)

    def reference(x: Tensor) -> Tensor:
        rectified = x.clamp(0.0, cap)
        return torch.fake_quantize_per_tensor_affine(rectified, scale, zero, spec.qmin, spec.qmax)

    assert torch.equal(made(BEFORE_RELU), reference(BEFORE_RELU))
    assert torch.equal(gradient(made, BEFORE_RELU), gradient(reference, BEFORE_RELU))
    assert made(BEFORE_RELU).min() == 0.0


@pytest.mark.parametrize(("dtype", "scheme", "cap"), RECTIFIED, ids=str)
def test_the_gradient_of_an_absorbed_relu_is_zero_at_zero(dtype: str, scheme: str, cap: float) -> None:
    """torch's relu(0) and relu6(0) have gradient 0; a dark image makes whole channels of exact zeros."""
    made = quantizer(0.0, 2.0, activation(dtype, scheme), rectified=True, cap=cap)
    x = torch.tensor([0.0, -0.0, 0.5, -0.5])
    assert gradient(made, x).tolist() == gradient(torch.relu, x).tolist() == [0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "scheme", "cap", "high", "clip_low", "clip_high"),
    [
        ("uint8", "affine", math.inf, 2.0, 0, 255),
        ("uint8", "affine", 6.0, 2.0, 0, 255),
        ("uint8", "affine", 6.0, 6.0, 0, 255),
        ("uint8", "affine", 6.0, 10.0, 0, 153),  # a loaded range beyond the cap
        ("int8", "affine", 6.0, 6.0, -128, 127),
        ("int8", "symmetric", math.inf, 2.0, 0, 127),
        ("int8", "symmetric", 6.0, 6.0, 0, 127),
        ("uint8", "symmetric", 6.0, 6.0, 128, 255),
    ],
)
def test_the_levels_that_an_absorbed_relu_leaves(
    dtype: str, scheme: str, cap: float, high: float, clip_low: int, clip_high: int
) -> None:
    grid = quantizer(0.0, high, activation(dtype, scheme), rectified=True, cap=cap).grid()
    assert isinstance(grid, Grid)
    assert (grid.clip_low, grid.clip_high) == (clip_low, clip_high)


@pytest.mark.parametrize(("cap", "top"), [(math.inf, 8.0), (6.0, 6.0)])
def test_a_rectified_range_starts_at_zero_and_ends_at_the_cap(cap: float, top: float) -> None:
    made = ActivationQuantizer(activation(), "a", rectified=True, cap=cap)
    made.observe(torch.tensor([-5.0, 8.0]))
    assert made.state_dict() == {"low": 0.0, "high": top}


def test_a_rectified_range_of_negative_values_is_empty() -> None:
    made = ActivationQuantizer(activation(), "a", rectified=True)
    made.observe(torch.tensor([-5.0, -1.0]))
    assert made.state_dict() == {"low": 0.0, "high": 0.0}


# -- observation ----------------------------------------------------------------------------------------------------


def test_the_moving_average_of_the_acceptance_list() -> None:
    made = ActivationQuantizer(activation("int8"), "fc1._input_")
    made.observe(torch.tensor([0.5, 2.0]))
    assert made.state_dict() == {"low": 0.5, "high": 2.0}
    grid = made.grid()
    assert isinstance(grid, Grid)
    assert grid.scale == pytest.approx(2 / 255, rel=1e-7)
    assert grid.zero_point == -128
    made.observe(torch.tensor([[-1.0], [4.0]]))
    state = made.state_dict()
    assert state["low"] == pytest.approx(0.5 + 0.01 * (-1 - 0.5))  # 0.485
    assert state["high"] == pytest.approx(2.0 + 0.01 * (4 - 2.0))  # 2.02
    assert made(torch.tensor([10.0, -10.0])).tolist() == [pytest.approx(2.02), 0.0]
    assert made.state_dict() == state


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_a_range_that_began_at_nothing_follows_what_grows(device: bool) -> None:
    """As behind a batch norm whose weight begins at 0: 100 batches widen it at once, then it is an average again."""

    def observe(made: ActivationQuantizer, *values: float) -> dict[str, Any]:
        x = torch.tensor(values)
        made._observe_device(x.amin(), x.amax()) if device else made.observe(x)
        return made.state_dict()

    made = ActivationQuantizer(activation(), "conv1._output_")
    for _ in range(3):
        state = observe(made, 0.0, 0.0)
    for step in range(1, 100):
        made = ActivationQuantizer(activation(), "conv1._output_")
        made.load_state_dict(state)  # as a resumed run has it
        state = observe(made, -0.05 * step, 0.1 * step)
        assert (state["low"], state["high"]) == (pytest.approx(-0.05 * step), pytest.approx(0.1 * step))
    assert state["young"] == 2
    state = observe(made, -1.0, 1.0)
    assert (state["high"], state["young"]) == (pytest.approx(9.9), 1), "nothing shrinks yet"
    state = observe(made, 0.0, 20.0)
    assert set(state) == {"low", "high"}
    assert state["high"] == pytest.approx(9.9 + 0.01 * 10.1)


def test_a_range_of_nothing_is_judged_by_the_least_scale() -> None:
    for high, grows in ((255 * 1e-7, True), (255 * 1.3e-7, False)):
        made = quantizer(0.0, high)
        made.observe(torch.tensor([0.0, 1.0]))
        assert (made.state_dict()["high"] == 1.0) == grows
    constant = quantizer(5.0, 5.0)
    constant.observe(torch.tensor([0.0, 10.0]))
    assert constant.state_dict() == {"low": pytest.approx(4.95), "high": pytest.approx(5.05)}


def test_ready_after_the_first_batch() -> None:
    made = ActivationQuantizer(activation(), "a")
    assert not made.ready
    made.observe(torch.ones(1))
    assert made.ready


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_an_empty_tensor_is_no_observation(shape: tuple[int, ...]) -> None:
    made = ActivationQuantizer(activation(), "a")
    made.observe(torch.empty(shape))
    assert not made.ready
    made.observe(torch.tensor([-1.0, 1.0]))
    made.observe(torch.empty(shape))
    assert made.state_dict() == {"low": -1.0, "high": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_is_left_out_and_said_once(bad: float) -> None:
    made = ActivationQuantizer(activation(), "conv1._output_")
    with pytest.warns(UserWarning, match=r"^conv1\._output_: a batch holds NaN or infinity; it does not move the range\.$"):
        made.observe(torch.tensor([0.0, bad]))
    assert not made.ready
    made.observe(torch.tensor([-1.0, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.observe(torch.tensor([bad, 5.0]))
    assert made.state_dict() == {"low": -1.0, "high": 1.0}


def test_observation_keeps_no_graph() -> None:
    made = ActivationQuantizer(activation(), "a")
    x = torch.ones(3, requires_grad=True)
    made.observe(x * 2)
    assert made.state_dict() == {"low": 2.0, "high": 2.0}
    assert isinstance(made.high, float)


def test_a_bfloat16_batch_moves_a_float_range() -> None:
    """bfloat16 has steps of 1/128 at 1: a range kept in it could never move by one per cent."""
    made = ActivationQuantizer(activation(), "a")
    made.observe(torch.tensor([0.0, 1.0], dtype=torch.bfloat16))
    made.observe(torch.tensor([0.0, 1.25], dtype=torch.bfloat16))
    assert made.state_dict()["high"] == pytest.approx(1.0025, rel=1e-7)


@pytest.mark.parametrize(
    ("batch", "state"), [(None, {"low": None, "high": None}), ([-1.5, 0.25], {"low": -1.5, "high": 0.25})], ids=["new", "used"]
)
def test_the_state_goes_round(batch: list[float] | None, state: dict[str, float | None]) -> None:
    made, other = ActivationQuantizer(activation(), "a"), quantizer(3.0, 4.0)
    if batch is not None:
        made.observe(torch.tensor(batch))
    assert made.state_dict() == state
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == state
    assert other.ready is made.ready


# -- the path of accelerators, on CPU tensors ---------------------------------------------------------------------------


def observed_on_device(batches: list[list[float]], **options: Any) -> ActivationQuantizer:
    made = ActivationQuantizer(activation(), "a", **options)
    for batch in batches:
        x = torch.tensor(batch)
        made._observe_device(torch.zeros(()) if made.rectified else x.amin(), x.amax())
    return made


def observed_on_host(batches: list[list[float]], **options: Any) -> ActivationQuantizer:
    made = ActivationQuantizer(activation(), "a", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            made.observe(torch.tensor(batch))
    return made


@pytest.mark.parametrize("options", [{}, {"rectified": True}, {"rectified": True, "cap": 6.0}], ids=str)
@pytest.mark.parametrize(
    "batches",
    [
        [[0.5, 2.0]],
        [[0.5, 2.0], [-1.0, 4.0], [-3.0, 9.0]],
        [[-2.0, -1.0]],
        [[-1.0, 1.0], [math.nan, 50.0], [-2.0, 3.0]],
        [[-1.0, 1.0], [0.0, math.inf]],
        [[math.nan, 50.0], [-1.0, 1.0]],
        [[-1.0, math.inf], [-1.0, 1.0], [-2.0, 2.0]],
        [[0.0, 0.0], [math.nan, 1.0], [-1.0, 1.0], [-2.0, math.inf], [-3.0, 5.0], [-0.5, 0.5]],
    ],
    ids=["one", "three", "negative", "nan inside", "inf last", "nan first", "inf first", "nothing first"],
)
def test_the_device_observes_what_the_host_observes(batches: list[list[float]], options: dict[str, Any]) -> None:
    device, host = observed_on_device(batches, **options), observed_on_host(batches, **options)
    assert isinstance(device.low, Tensor)
    assert device.low.dtype == torch.float32
    assert device.state_dict() == pytest.approx(host.state_dict(), rel=1e-6)


def test_a_device_that_saw_only_nan_has_no_range_to_save() -> None:
    """A saved NaN would be moved by one per cent for ever, and a grid of NaN is none."""
    made = observed_on_device([[math.nan, 50.0]])
    assert made.state_dict() == {"low": None, "high": None}
    other = ActivationQuantizer(activation(), "a")
    other.load_state_dict(made.state_dict())
    other.observe(torch.tensor([-1.0, 1.0]))
    assert other.state_dict() == {"low": -1.0, "high": 1.0}


def test_a_range_goes_on_moving_on_the_device_after_it_was_loaded() -> None:
    made = quantizer(-1.0, 1.0)
    made._observe_device(torch.tensor(-2.0), torch.tensor(3.0))
    assert made.state_dict() == pytest.approx({"low": -1.01, "high": 1.02}, rel=1e-6)


DEVICE: list[tuple[str, str, dict[str, Any]]] = [
    ("uint8", "affine", {}),
    ("int8", "affine", {}),
    ("int8", "symmetric", {}),
    ("uint8", "symmetric", {}),
    ("uint8", "affine", {"rectified": True}),
    ("int8", "affine", {"rectified": True, "cap": 6.0}),
]


@pytest.mark.parametrize(
    "ends", [(-1.0, 2.0), (0.0, 6.0), (0.5, 4.0), (-4.0, -0.5), (-0.25, 0.75), (-1.0, 1.0), (-3.0, 3.0), (0.0, 0.0)], ids=str
)
@pytest.mark.parametrize(("dtype", "scheme", "options"), DEVICE, ids=str)
def test_the_device_rounds_what_the_host_rounds(
    dtype: str, scheme: str, options: dict[str, Any], ends: tuple[float, float]
) -> None:
    """Ends whose difference is exact in float32, so that both paths have the same scale."""
    low, high = (0.0, max(ends[1], 0.0)) if options else ends
    made = quantizer(low, high, activation(dtype, scheme), **options)
    x = torch.cat([torch.linspace(-7.03, 7.07, 999), torch.tensor([0.0])])
    assert torch.equal(made._on_device(x), made._on_host(x))
    assert torch.equal(gradient(made._on_device, x), gradient(made._on_host, x))


@pytest.mark.parametrize(("dtype", "scheme", "options"), DEVICE, ids=str)
def test_the_device_scale_is_the_hosts_to_float32_precision(dtype: str, scheme: str, options: dict[str, Any]) -> None:
    made = quantizer(0.0 if options else -0.7391, 1.2345, activation(dtype, scheme), **options)
    x = torch.linspace(-2.0, 2.0, 777)
    torch.testing.assert_close(made._on_device(x), made._on_host(x), rtol=1e-6, atol=1e-9)


def test_the_device_computes_without_gradients_too() -> None:
    made = quantizer(-1.0, 2.0)
    x = torch.linspace(-3, 3, 100, requires_grad=True)
    with torch.no_grad():
        y = made._on_device(x)
    assert y.grad_fn is None
    assert torch.equal(y, made._on_device(x))


# -- weights --------------------------------------------------------------------------------------------------------

W = torch.tensor([[-1.0, 0.5], [2.0, 0.25]])

NNI = [
    # dtype, scheme, granularity, scale, zero point, rounded weight
    ("int8", "symmetric", "per_tensor", 2 / 127, None, [[-1.007874, 0.503937], [2.0, 0.251969]]),
    ("int8", "affine", "per_tensor", 3 / 254, -42, [[-1.003937, 0.496063], [1.996063, 0.248031]]),
    ("int8", "affine", "out_channel", [[1.5 / 254], [2 / 254]], [[42], [-127]], [[-0.998031, 0.501969], [2.0, 0.251969]]),
    ("int8", "symmetric", "out_channel", [[1 / 127], [2 / 127]], None, [[-1.0, 0.503937], [2.0, 0.251969]]),
    (
        "uint8",
        "affine",
        "per_tensor",
        3 / 255,
        85,
        [[-1.0, 0.494118], [2.0, 0.247059]],
    ),  # NNI rounds z + 42.5, we and ONNX round 42.5
    ("uint8", "symmetric", "per_tensor", 2 / 127.5, 128, [[-1.003922, 0.501961], [1.992157, 0.250980]]),
]
NNI_IDS = [f"{row[0]} {row[1]} {row[2]}" for row in NNI]


@pytest.mark.parametrize(("dtype", "scheme", "granularity", "scale", "zero", "rounded"), NNI, ids=NNI_IDS)
def test_weights_of_the_acceptance_list(dtype: str, scheme: str, granularity: str, scale: Any, zero: Any, rounded: Any) -> None:
    spec = weight(dtype, scheme, granularity)
    grid = weight_grid(W, spec)
    torch.testing.assert_close(grid.scale, torch.tensor(scale, dtype=torch.float32), rtol=1e-6, atol=0)
    assert (None if grid.zero_point is None else grid.zero_point.tolist()) == zero
    torch.testing.assert_close(fake_quantize_weight(W, spec), torch.tensor(rounded), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(("granularity", "shape"), [("per_tensor", ()), ("out_channel", (4, 1, 1, 1))])
def test_the_shape_of_the_scale_of_a_conv_weight(scheme: str, granularity: str, shape: tuple[int, ...]) -> None:
    assert weight_grid(torch.randn(4, 2, 3, 3), weight("int8", scheme, granularity)).scale.shape == shape


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_of_a_weight_are_whole_and_inside_the_grid(dtype: str, scheme: str, granularity: str) -> None:
    spec = weight(dtype, scheme, granularity)
    w = torch.randn(6, 5, 3) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1.0, 1.0]).view(6, 1, 1)
    w[4], w[5] = w[4].abs(), -w[5].abs()
    kept = w.clone()
    grid = weight_grid(w, spec)
    q = quantize_weight(w, grid, spec)
    zero = 0.0 if grid.zero_point is None else grid.zero_point
    assert torch.equal(w, kept)
    assert torch.equal(q, q.round())
    assert int(q.min()) >= spec.qmin
    assert int(q.max()) <= spec.qmax
    steps = ((q - zero) - w / grid.scale).abs()
    assert float(steps.max()) <= 1.001  # uint8 symmetric clips its maximum by half a step, a zero point moves by half
    assert torch.equal((q - zero) * grid.scale, fake_quantize_weight(w, spec))


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("fill", [0.0, 1e-45, 2e-43, 1e-38])
def test_a_channel_of_nothing_is_finite(scheme: str, fill: float) -> None:
    w = torch.stack([torch.full((3,), fill), torch.ones(3)])
    grid = weight_grid(w, weight("int8", scheme, "out_channel"))
    assert bool((grid.scale > 0).all())
    assert float((w / grid.scale).abs().max()) < 254.5
    y = fake_quantize_weight(w, weight("int8", scheme, "out_channel"))
    assert bool(y.isfinite().all())
    assert float(y[0].abs().max()) <= 2e-38
    torch.testing.assert_close(y[1], w[1])


def test_a_channel_of_zeros_has_scale_one() -> None:
    assert weight_grid(torch.zeros(2, 3), weight(granularity="out_channel")).scale.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
def test_scaling_a_channel_by_any_factor_keeps_its_integers(granularity: str) -> None:
    """fq(w k) = k fq(w), which the fusion of batch norm rests on; powers of two, so that floats are exact."""
    spec, w = weight(granularity=granularity), torch.randn(3, 7)
    k = torch.tensor([[-4.0], [0.25], [-1.0]]) if granularity == "out_channel" else torch.tensor(-0.5)
    assert torch.equal(fake_quantize_weight(w * k, spec), fake_quantize_weight(w, spec) * k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_a_half_precision_weight_lies_on_the_grid_that_is_deployed(dtype: torch.dtype, scheme: str) -> None:
    """Scales are float32: folding works in float32, and a scale rounded to 8 bits would train other integers."""
    spec = weight("int8", scheme, "out_channel")
    w = torch.randn(4, 64).to(dtype)
    got = fake_quantize_weight(w, spec)
    assert got.dtype == dtype
    assert torch.equal(got, fake_quantize_weight(w.float(), spec).to(dtype))


def test_the_gradient_of_a_symmetric_weight_passes_unchanged() -> None:
    w = torch.randn(4, 5, requires_grad=True)
    upstream = torch.randn(4, 5)
    kept = upstream.clone()
    fake_quantize_weight(w, weight(granularity="out_channel")).backward(upstream)
    assert w.grad is not None
    assert torch.equal(w.grad, kept)
    w.grad.zero_()
    assert torch.equal(upstream, kept)


@pytest.mark.parametrize(("dtype", "scheme"), [("int8", "affine"), ("uint8", "affine"), ("uint8", "symmetric")])
def test_the_gradient_of_a_weight_with_a_zero_point_is_torchs(dtype: str, scheme: str) -> None:
    spec, w = weight(dtype, scheme), torch.randn(16, 32)
    grid = weight_grid(w, spec)
    assert grid.zero_point is not None
    scale, zero = float(grid.scale), int(grid.zero_point)
    got = gradient(lambda t: fake_quantize_weight(t, spec), w)
    expected = gradient(lambda t: torch.fake_quantize_per_tensor_affine(t, scale, zero, spec.qmin, spec.qmax), w)
    assert torch.equal(got, expected)


def test_the_zero_point_can_push_an_end_off_the_grid_and_its_gradient_stops() -> None:
    """uint8 symmetric: the positive maximum is level 255.5, so it rounds to 256, is clamped and gets no gradient."""
    w = torch.tensor([[3.0, -3.0, 1.5]])
    spec = weight("uint8", "symmetric")
    assert gradient(lambda t: fake_quantize_weight(t, spec), w).tolist() == [[0.0, 2.0, 3.0]]
    assert fake_quantize_weight(w, spec).tolist() == [pytest.approx([3 * 127 / 127.5, -3 * 128 / 127.5, 3 * 64 / 127.5])]


# -- weights seen through a batch norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [weight(), weight("int8", "affine"), weight("uint8", "affine")], ids=str)
def test_a_folded_weight_lies_on_the_grid_of_the_product(spec: TensorSpec) -> None:
    w, c = torch.randn(5, 8), torch.tensor([[0.5], [2.0], [1.0], [0.75], [1.5]])
    product = (w * c).double()
    scale, zero = float(weight_grid(w * c, spec).scale), weight_grid(w * c, spec).zero_point
    z = 0.0 if zero is None else float(zero)
    q = np.clip(np.rint(product.numpy() / scale) + z, spec.qmin, spec.qmax)
    expected = (q - z) * scale / c.numpy()
    np.testing.assert_allclose(fake_quantize_weight(w, spec, c).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_a_folded_weight_passes() -> None:
    w = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    fake_quantize_weight(w, weight(), torch.tensor([[0.5], [0.0], [2.0]])).backward(upstream)
    assert w.grad is not None
    assert torch.equal(w.grad, upstream)


@pytest.mark.parametrize("spec", [weight(), weight("int8", "affine"), weight("uint8", "affine")], ids=str)
@pytest.mark.parametrize("tiny", [0.0, 1e-38, 1e-20, 1e-6, 1e-3])
def test_a_channel_with_gamma_near_zero_stays_finite_and_alive(spec: TensorSpec, tiny: float) -> None:
    """Its folded weights would all round to 0; then its batch statistics would be 0 and its gamma could never recover."""
    w = torch.tensor([[0.5, -1.0, 0.75, 0.01], [0.3, 0.2, -0.1, 1.0]])
    y = fake_quantize_weight(w, spec, torch.tensor([[tiny], [1.0]]))
    assert bool(y.isfinite().all())
    # Half a step: 1/127/2 on a symmetric grid; with the zero point of the other channel only 23 levels reach down to -1.
    torch.testing.assert_close(y[0], w[0], rtol=0, atol=0.004 if spec.scheme == "symmetric" else 0.022)
    torch.testing.assert_close(y[1], w[1], rtol=0, atol=0.006)


def test_all_gammas_zero() -> None:
    w = torch.randn(3, 4)
    y = fake_quantize_weight(w, weight(), torch.zeros(3, 1))
    torch.testing.assert_close(y, w, rtol=0, atol=float(w.abs().max()) / 127)


def test_a_channel_of_zeros_behind_a_batch_norm() -> None:
    w = torch.stack([torch.zeros(4), torch.randn(4)])
    for c in (0.0, 1.0):
        y = fake_quantize_weight(w, weight(), torch.tensor([[c], [1.0]]))
        assert y[0].tolist() == [0.0] * 4
        assert bool(y.isfinite().all())


def test_a_channel_exactly_half_a_step_high_stays_alive() -> None:
    """Half a step rounds to even, to 0: all of the channel would vanish, as below half a step."""
    step = float(np.float32(1 / 127))
    w = torch.tensor([[1.0, 0.5], [step / 2, step / 4]])
    y = fake_quantize_weight(w, weight(), torch.ones(2, 1))
    assert float(y[1].abs().max()) > 0


def test_a_channel_that_floats_round_to_half_a_step_stays_alive() -> None:
    """w c is a little over half a step here, and w / (s / c) exactly half of one."""
    w, c = torch.tensor([[0.9469050168991089], [0.004004877060651779]]), torch.tensor([[1.0], [0.9308581948280334]])
    assert float(fake_quantize_weight(w, weight(), c)[1]) > 0


def test_a_clamp_on_a_tie_of_levels_is_deployed_as_it_is_trained() -> None:
    """A quotient that is a half in double and none in float32: the level of the end is that of tensors."""
    one = quantizer(-1.0, 9.408, rectified=True, floor=-1.0, cap=9.408)
    x = torch.tensor([-3.0, -1.0, 0.0, 9.408, 20.0], requires_grad=True)
    trained, grid = one(x).detach(), one.grid()
    assert isinstance(grid, Grid)
    levels = ((trained / grid.scale).round() + grid.zero_point).tolist()
    assert (levels[0], levels[-1]) == (grid.clip_low, grid.clip_high)


def test_the_widest_range() -> None:
    x = torch.tensor([-1.7e38, 0.0, 1.7e38], requires_grad=True)
    y = quantizer(-1.7e38, 1.7e38)(x)
    y.backward(torch.ones(3))
    assert torch.isfinite(y).all()
    assert x.grad is not None
    assert x.grad[1] == 1
    quantizer(-3.4e38, 3.4e38, activation("int8", "symmetric"))(x).sum().backward()
