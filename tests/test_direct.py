# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `direct.py`: equal to the operators and to int64 arithmetic, and made anew when its buffers change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IntegerRecorder, run_recorded
from torch import Tensor, nn

from lightning_quant.direct import EXACT_FLOAT32, parts_of, plain, sides_of, worst_sum
from lightning_quant.geometry import Geometry
from lightning_quant.integer import FoldedWeight, IntegerLayer, Rounding
from lightning_quant.quantizers import Grid, float32


def grid(scale: float, zero: int, low: int = 0, high: int = 255, clip: tuple[int, int] | None = None) -> Grid:
    clip_low, clip_high = clip or (low, high)
    return Grid(scale=float32(scale), zero_point=zero, qmin=low, qmax=high, clip_low=clip_low, clip_high=clip_high)


X, Y = grid(0.02, 120), grid(0.3, 100)


def folded_of(shape: tuple[int, ...], *, zero_point: bool = False, per_tensor: bool = False, bits: int = 8) -> FoldedWeight:
    channels, most = shape[0], 2 ** (bits - 1) - 1
    return FoldedWeight(
        q=torch.randint(-most, most + 1, shape).to(torch.int8),
        scale=torch.rand(()) * 0.01 + 0.001 if per_tensor else torch.rand(channels) * 0.01 + 0.001,
        zero_point=torch.randint(-most, most + 1, (channels,)).to(torch.int8) if zero_point else None,
        bias=torch.randn(channels, dtype=torch.float64),
    )


@pytest.fixture
def never_operators(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it forbids the operators: what runs from then on is direct."""

    def refuse(layer: IntegerLayer, x: Tensor) -> Tensor:
        raise AssertionError(f"{layer} on {tuple(x.shape)} ran by operators")

    return lambda: monkeypatch.setattr(IntegerLayer, "_by_operators", refuse)


# -- equal to the operators -------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 11)),
    "conv1d uneven": (lambda: nn.Conv1d(3, 5, 4, padding="same"), (2, 3, 11)),
    "conv1d alone": (lambda: nn.Conv1d(3, 5, 3), (3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 6)),
    "conv2d no batch": (lambda: nn.Conv2d(3, 4, 3, padding=1), (0, 3, 7, 6)),
    "conv2d alone": (lambda: nn.Conv2d(3, 4, (1, 4), padding=(0, 1)), (3, 7, 6)),
    "conv2d groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 7, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 6)),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 7, 6)),
    "conv2d replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=(0, 1, 2)), (1, 2, 4, 5, 4)),
    "linear": (lambda: nn.Linear(7, 6), (5, 7)),
    "linear alone": (lambda: nn.Linear(7, 6), (7,)),
    "linear 4": (lambda: nn.Linear(7, 6), (2, 3, 4, 7)),
    "linear no rows": (lambda: nn.Linear(7, 6), (0, 3, 7)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 3, 4)),
    "batch norm of rows": (lambda: nn.BatchNorm1d(6), (5, 6)),
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "channels": {},
    "one scale": {"per_tensor": True},
    "zero points": {"zero_point": True},
    "int4": {"bits": 4},
}
ENDS: dict[str, tuple[Grid | None, tuple[float, float] | None]] = {
    "uint8": (Y, None),
    "int8": (grid(0.3, -20, -128, 127), None),
    "symmetric": (grid(0.3, 0, -127, 127), None),
    "relu6": (grid(0.3, 3, clip=(3, 200)), None),
    "float": (None, None),
    "float relu6": (None, (0.0, 6.0)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_direct_and_by_operators_are_equal(name: str, weight: str, end: str, never_operators: Callable[[], None]) -> None:
    make, shape = LAYERS[name]
    float_layer: Any = make()
    kernel = float_layer.weight.shape if float_layer.weight.dim() > 1 else (6, 1, 1)
    y, rectify = ENDS[end]
    layer = IntegerLayer(folded_of(tuple(kernel), **WEIGHTS[weight]), Geometry.of(float_layer), X, y, rectify)
    x = torch.randn(shape) * 1.5
    by_operators, integers = run_recorded(layer, x)
    assert len(integers) == (1 if y is None else 2), "the recorder sees operators"
    never_operators()
    direct = layer(x)
    assert direct.shape == by_operators.shape
    assert torch.equal(direct, by_operators)
    assert torch.equal(layer(x.double()), by_operators.double())


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": (2, 1), "dilation": 2}, {"stride": (1, 2), "padding": 1}], ids=str
)
@pytest.mark.parametrize("kernel", [1, 3, (3, 1)])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_large_weight_that_meets_few_places_is_one_product(
    samples: int, kernel: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    float_layer = nn.Conv2d(260, 256, kernel, **options)
    layer = IntegerLayer(folded_of(tuple(float_layer.weight.shape)), Geometry.of(float_layer), X, Y)
    x = torch.randn(samples, 260, 3, 3)
    by_operators, _ = run_recorded(layer, x)
    places = by_operators.numel() // 256
    called: list[str] = []

    def noted(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            called.append(name)
            return original(*args)

        return call

    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, noted(name, getattr(F, name)))
    got = layer(x)
    assert set(called) == {"linear" if places <= 9 else "conv2d"}
    assert got.is_contiguous()
    assert torch.equal(got, by_operators)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_sample_is_the_same_in_every_batch(memory: torch.memory_format) -> None:
    layer = IntegerLayer(folded_of((4, 4, 3, 3)), Geometry.of(nn.Conv2d(4, 4, 3, padding=1)), X, Y)
    x = torch.randn(40, 4, 24, 24).to(memory_format=memory)
    together = layer(x)
    assert torch.equal(together, run_recorded(layer, x)[0])
    for number in (1, 2, 17):
        assert torch.equal(together[:number], layer(x[:number]))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("clip", [False, True])
def test_a_rounding_without_operators_is_equal(bits: int, clip: bool) -> None:
    high = 2**bits - 1
    act = Rounding(grid(3.0 / high, high // 3, 0, high, (high // 3, high - 1)), clip=clip)
    x = torch.randn(1000) * 2
    with IntegerRecorder():
        by_operators = act(x)
    assert torch.equal(act(x), by_operators)
    assert len(by_operators.unique()) > 5


# -- equal to int64 ---------------------------------------------------------------------------------------------------


def int64_sums(q: Tensor, w: Tensor, groups: int) -> Tensor:
    """The sums of a convolution without padding, or of a linear layer, in int64; w: (C, I, k, k) or (C, I)."""
    if w.dim() == 2:
        return q.long() @ w.long().T
    windows = q.long().unfold(2, w.shape[2], 1).unfold(3, w.shape[3], 1)
    grouped = windows.unflatten(1, (groups, -1))
    kernels = w.long().unflatten(0, (groups, -1))
    return torch.einsum("ngihwkl,goikl->ngohw", grouped, kernels).flatten(1, 2)


SIGNS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "all 127": lambda shape: torch.full(shape, 127),
    "all -127": lambda shape: torch.full(shape, -127),
    "both": lambda shape: torch.randint(0, 2, shape) * 254 - 127,
    "all 127 but a few": lambda shape: torch.where(torch.rand(shape) < 0.1, torch.randint(-127, 128, shape), 127),
}
SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4608, 4), (3, 4608)),
    "conv": (lambda: nn.Conv2d(512, 4, 3), (2, 512, 4, 3)),
    "groups": (lambda: nn.Conv2d(1024, 4, 3, groups=2), (2, 1024, 4, 3)),
}


@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("name", SHAPES)
def test_sums_beyond_2_to_the_24_are_exact(name: str, signs: str, zero: int, never_operators: Callable[[], None]) -> None:
    """4608 products of 127 and 255 make 1.5 * 10^8; inputs at both ends of the grid, and of the sign that the weight has."""
    make, shape = SHAPES[name]
    float_layer: Any = make()
    groups = getattr(float_layer, "groups", 1)
    q = SIGNS[signs](tuple(float_layer.weight.shape))
    bias = torch.tensor([0.0, 12345.0, -77777.0, 3.0], dtype=torch.float64)
    folded = FoldedWeight(q=q.to(torch.int8), scale=torch.ones(4), zero_point=None, bias=bias)
    never_operators()
    layer = IntegerLayer(folded, Geometry.of(float_layer), grid(1.0, zero), None)
    ends = torch.tensor([255, 0, 255])[: shape[0]].view(-1, *[1] * (len(shape) - 1))  # of whole samples
    levels = torch.where(torch.rand(shape) < 0.05, torch.randint(0, 256, shape), ends)
    column = bias.long() if q.dim() == 2 else bias.long().view(1, -1, 1, 1)
    exact = int64_sums(levels - zero, q, groups) + column
    got = layer((levels - zero).float())
    assert torch.equal(got, exact.float())
    if signs.startswith("all"):
        assert int(exact.abs().max()) > EXACT_FLOAT32, "or the test shows nothing"
        assert int(exact.remainder(2).max()) == 1, "odd sums need more bits than float32 has"


@pytest.mark.parametrize("bias", [2.0**23, -(2.0**24) - 1, 2.0**30 + 1])
def test_a_bias_that_float32_cannot_hold_beside_the_sums_is_added_exactly(
    bias: float, never_operators: Callable[[], None]
) -> None:
    never_operators()
    q = torch.randint(-127, 128, (2, 300))
    folded = FoldedWeight(
        q=q.to(torch.int8), scale=torch.ones(2), zero_point=None, bias=torch.tensor([bias, 1.0], dtype=torch.float64)
    )
    layer = IntegerLayer(folded, Geometry.of(nn.Linear(300, 2)), grid(1.0, 0), None)
    x = torch.randint(0, 256, (50, 300))
    assert torch.equal(layer(x.float()), (int64_sums(x, q, 1) + torch.tensor([int(bias), 1])).float())


@pytest.mark.parametrize("groups", [2, 6])
def test_a_large_bias_in_groups(groups: int, never_operators: Callable[[], None]) -> None:
    never_operators()
    q, x = torch.randint(-127, 128, (6, 6 // groups, 3, 3)), torch.randint(0, 256, (2, 6, 5, 5))
    bias = torch.tensor([2.0**24 + 3, 1, -(2.0**30) - 5, 0, 7, 2.0**23], dtype=torch.float64)
    folded = FoldedWeight(q=q.to(torch.int8), scale=torch.ones(6), zero_point=None, bias=bias)
    layer = IntegerLayer(folded, Geometry.of(nn.Conv2d(6, 6, 3, groups=groups)), grid(1.0, 0), None)
    assert torch.equal(layer(x.float()), (int64_sums(x, q, groups) + bias.long().view(1, -1, 1, 1)).float())


def test_a_single_channel_that_is_too_much_is_left_to_the_operators() -> None:
    """Sums over 1000 places in one input channel cannot be split by channels."""
    folded = FoldedWeight(
        q=torch.full((1, 1, 1001), 127).to(torch.int8), scale=torch.ones(1), zero_point=None, bias=torch.ones(1).double()
    )
    layer = IntegerLayer(folded, Geometry.of(nn.Conv1d(1, 1, 1001)), grid(1.0, 0), None)
    x = torch.full((1, 1, 1001), 255.0)
    assert layer.wide
    assert layer(x).item() == float(torch.tensor(1001 * 127 * 255 + 1).float())
    assert int(layer(x).item()) > EXACT_FLOAT32


@pytest.mark.parametrize("zero", [0, 7, 128, 255])
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_worst_sum_is_the_largest_of_any_inputs_in_any_order(zero: int, zero_point: bool) -> None:
    folded = folded_of((5, 6, 3), zero_point=zero_point)
    bias = torch.randint(-5000, 5000, (5,), dtype=torch.int32)
    x = grid(1.0, zero)
    w = folded.q.long() - (0 if folded.zero_point is None else folded.zero_point.long().view(-1, 1, 1))
    ends = torch.stack([w * (0 - zero), w * (255 - zero)])
    most = ends.amax(0).clamp(min=0).flatten(1).sum(1) + bias.clamp(min=0)
    least = ends.amin(0).clamp(max=0).flatten(1).sum(1) + bias.clamp(max=0)
    assert worst_sum(sides_of(folded.q, folded.zero_point), bias, x) == max(int(most.max()), -int(least.min()))


def test_a_layer_is_split_no_further_than_needed() -> None:
    """600 weights of 127 at 255 make 1.16 * 2^24; from a zero point in the middle, half of that."""
    bias, sides = torch.zeros(1), sides_of(torch.full((1, 600), 127), None)
    assert parts_of(sides, bias, grid(1.0, 0)) == ([300, 300], True)
    assert parts_of(sides, bias, grid(1.0, 128)) == ([600], True)
    assert parts_of(sides, bias + 2**24, grid(1.0, 0)) == ([300, 300], False)
    assert parts_of(sides_of(torch.full((1, 1, 600), 127), None), bias, grid(1.0, 0)) is None


# -- the numbers follow the buffers -----------------------------------------------------------------------------------


def made() -> tuple[IntegerLayer, IntegerLayer, Tensor]:
    """Two layers of one shape, the first one of which has computed already, and an input."""
    geometry = Geometry.of(nn.Linear(7, 6))
    one, other = (IntegerLayer(folded_of((6, 7), zero_point=True), geometry, X, Y) for _ in range(2))
    x = torch.randn(40, 7)
    assert not torch.equal(one(x), other(x))
    return one, other, x


def test_loading_a_state_dict() -> None:
    one, other, x = made()
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), run_recorded(other, x)[0])


def test_loading_wider_weights_makes_the_layer_wide() -> None:
    geometry, shape = Geometry.of(nn.Linear(600, 1)), (1, 600)
    zeros = torch.zeros(1, dtype=torch.float64)
    small, large = (
        IntegerLayer(
            FoldedWeight(q=torch.full(shape, v).to(torch.int8), scale=torch.ones(1), zero_point=None, bias=zeros),
            geometry, grid(1.0, 0), None,
        )
        for v in (1, 127)
    )  # fmt: skip
    assert (small.wide, large.wide) == (False, True)
    small.load_state_dict(large.state_dict())
    assert small.wide


@pytest.mark.parametrize("name", ["weight", "scale", "zero_point", "bias"])
@pytest.mark.parametrize("way", ["write", "exchange", "data", "assign"])
def test_a_buffer_that_changes(name: str, way: str) -> None:
    one, other, x = made()
    for key in ("weight", "scale", "zero_point", "bias"):
        if key != name:
            getattr(one, key).copy_(getattr(other, key))
    assert not torch.equal(one(x), other(x)), "or this buffer does not matter"
    if way == "write":
        getattr(one, name).copy_(getattr(other, name))
    elif way == "exchange":
        setattr(one, name, getattr(other, name).clone())
    elif way == "data":
        getattr(one, name).data = getattr(other, name).clone()
    else:
        one.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(one(x), run_recorded(other, x)[0])


def test_functional_call_computes_with_the_buffers_it_is_given() -> None:
    one, other, x = made()
    before = one(x)
    given: Any = dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(one, given, (x,)), other(x))
    assert torch.equal(one(x), before)


def test_another_grid() -> None:
    one, _, x = made()
    one(x)
    one.y = grid(0.5, 90)
    assert torch.equal(one(x), run_recorded(one, x)[0])


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_files_hold_integers_alone(used: bool) -> None:
    one, _, x = made()
    fresh = IntegerLayer(folded_of((6, 7)), one.geometry, X, Y)
    layer = one if used else fresh
    expected = run_recorded(layer, x)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert set(vars(again)) == set(vars(fresh)), "what was made to compute is not copied"
        assert {key: value.dtype for key, value in again.state_dict().items()} == {
            key: value.dtype for key, value in layer.state_dict().items()
        }
        assert torch.equal(again(x), expected)
    assert not list(layer.parameters())


def test_a_copy_goes_its_own_way() -> None:
    one, other, x = made()
    before, twin = one(x), copy.deepcopy(one)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))
    assert torch.equal(one(x), before)


def test_moving_a_layer_drops_the_numbers() -> None:
    one, _, x = made()
    before, held = one(x), set(vars(one))
    assert one.to("cpu") is one
    assert held - set(vars(one)) == {"_direct"}
    assert torch.equal(one(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scales_of_another_dtype_are_left_to_the_operators(dtype: torch.dtype) -> None:
    one, _, x = made()
    one.to(dtype)
    expected = run_recorded(one, x.to(dtype))[0]
    assert torch.equal(one(x.to(dtype)), expected)


def test_numbers_made_in_inference_mode_serve_outside_it() -> None:
    one, _, x = made()
    fresh = copy.deepcopy(one)
    with torch.inference_mode():
        inside = fresh(x)
    assert torch.equal(fresh(x), inside)
    assert torch.equal(fresh(x), one(x))


def test_buffers_that_were_made_in_inference_mode_are_read_at_every_call() -> None:
    """Writing to them leaves no trace."""
    with torch.inference_mode():
        one, other, x = made()
        one.weight.copy_(other.weight)
        for name in ("scale", "zero_point", "bias"):
            getattr(one, name).copy_(getattr(other, name))
        assert torch.equal(one(x), other(x))
    assert torch.equal(one(x), run_recorded(other, x)[0])


# -- who sees operators -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_what_is_plain() -> None:
    x = torch.randn(3)
    assert plain(x)
    assert not plain(nn.Parameter(x))
    needs = torch.randn(3, requires_grad=True) * 1.0
    assert not plain(needs)
    with torch.no_grad():
        assert plain(needs)
    with torch.inference_mode():
        assert plain(x)
    with IntegerRecorder():
        assert not plain(x)
    seen: list[bool] = []

    def look(t: Tensor) -> Tensor:
        seen.append(plain(t))
        return t * 2

    torch.func.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [False, False]


def test_an_exported_program_calls_our_operators() -> None:
    one, _, x = made()
    one(x)
    program = torch.export.export(one, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"lightning_quant.{name}.default" for name in ("quantize", "linear", "dequantize")} == called
    assert {name for name, _ in program.named_buffers()} == {"weight", "scale", "zero_point", "bias"}
    assert torch.equal(program.module()(x), one(x))


def test_a_gradient_still_ends_here() -> None:
    """An integer layer has none: it must not seem to have one that is zero."""
    one, _, x = made()
    assert not one(x.requires_grad_()).requires_grad
    assert not one(x.detach()).requires_grad
