# SPDX-License-Identifier: Apache-2.0
"""Owns grids of every kind through a layer's life: bits, blocks, observers, gradients; trained, deployed, exported, resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from test_fusion import prepared
from torch import Tensor, nn
from toys import Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, export_model, make_plan, prepare_model
from lightning_quant.blocks import BlockQuantizer
from lightning_quant.export import onnxruntime_session
from lightning_quant.prepare import apply_phase, load_quantizer_state, prepared_groups, quantizer_state
from lightning_quant.schedule import Phase

Array = npt.NDArray[Any]
HOLD = Phase(observe=False)
BLOCKS = "a scale for each block"


def ends(dtype: str, *, weight: bool = True, scheme: str = "affine") -> tuple[int, int]:
    """(lowest, highest) level, as the documentation of `quant_dtype` says."""
    bits = int(dtype.lstrip("uint"))
    if dtype.startswith("u"):
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top if weight or scheme == "symmetric" else -top - 1), top


def numpy_rounded(values: Array, kernel: tuple[int, ...], low: int, high: int, scheme: str) -> tuple[Array, Array]:
    """(rounded values, scale of each): block by block in plain loops, each on the grid of its smallest and largest value."""
    sizes = [size if block == -1 else block for size, block in zip(values.shape, kernel, strict=True)]
    out, steps = np.empty_like(values), np.empty_like(values)
    for start in itertools.product(*(range(0, size, block) for size, block in zip(values.shape, sizes, strict=True))):
        place = tuple(slice(at, at + block) for at, block in zip(start, sizes, strict=True))
        block = values[place]
        if scheme == "symmetric":
            scale = np.float32(np.abs(block).max() / np.float32((high - low) / 2))
            zero = (low + high + 1) // 2
        else:
            least, most = min(block.min(), np.float32(0)), max(block.max(), np.float32(0))
            scale = np.float32((most - least) / np.float32(high - low))
            zero = np.clip(low - np.rint(least / scale), low, high)
        out[place], steps[place] = (np.clip(np.rint(block / scale) + zero, low, high) - zero) * scale, scale
    return out, steps


class Stack(nn.Module):
    """conv or linear, perhaps bn, perhaps ReLU: names a, bn, act."""

    def __init__(self, kind: str, norm: bool = False, act: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.a: nn.Module = nn.Conv2d(4, 6, 3, padding=1) if kind == "conv" else nn.Linear(8, 6)
        if norm:
            self.bn = nn.BatchNorm2d(6) if kind == "conv" else nn.BatchNorm1d(6)
            with torch.no_grad():
                self.bn.weight.copy_(torch.tensor([1.0, -0.7, 0.3, -1.4, 2.0, 0.5]))
                self.bn.bias.normal_()
                self.bn.running_mean.normal_()  # type: ignore[union-attr]
                self.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if act is not None:
            self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def batch(kind: str, count: int = 16) -> Tensor:
    return torch.randn(count, 4, 7, 7) if kind == "conv" else torch.randn(count, 8)


def evaluated(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = net.eval()(x)
    return found


# -- bits ------------------------------------------------------------------------------------------------------------------------

DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 5, 7, 8, 9, 12, 15, 16)]


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_layer_of_any_bits_against_numpy(kind: str, dtype: str, scheme: str) -> None:
    """Input, weight and output on one type; the reference rounds in numpy and multiplies in float64."""
    net, x, bits = Stack(kind), batch(kind), int(dtype.lstrip("uint"))
    config = [
        {"op_names": ["a"], "target_names": ["_input_", "weight", "_output_"], "quant_dtype": dtype, "quant_scheme": scheme}
    ]
    weight, bias = (net.get_parameter(f"a.{name}").detach().numpy() for name in ("weight", "bias"))
    prepared(net, config, x).train()
    trained = net(x).detach()
    w, w_step = numpy_rounded(weight, (1,) + (-1,) * (weight.ndim - 1), *ends(dtype), scheme)
    grid = (-1,) * x.dim(), *ends(dtype, weight=False, scheme=scheme), scheme
    given, x_step = numpy_rounded(x.numpy(), *grid)
    step = (x_step.flat[0] * w_step.reshape(6, -1)[:, 0]).astype(np.float64)
    stored = bias if bits > 8 else np.rint(bias / step) * step  # in an integer layer the bias lies on the grid of the sums

    def through(b: Array) -> Array:
        data, rows, shift = (torch.from_numpy(values).double() for values in (given, w, b))
        out = F.conv2d(data, rows, shift, padding=1) if kind == "conv" else F.linear(data, rows, shift)
        return out.float().numpy()

    made, y_step = numpy_rounded(through(bias), *grid)
    level = float(y_step.flat[0])
    low = min(float(through(bias).min()), 0.0)
    zero = grid[1] - np.rint(low / level) if scheme == "affine" else (grid[1] + grid[2] + 1) // 2
    again = (np.clip(np.rint(through(stored) / level), grid[1] - zero, grid[2] - zero) * level).astype(np.float32)
    for found, expected in ((trained, made), (evaluated(net, x), again)):
        difference = np.abs(found.numpy() - expected)
        assert difference.max() <= 1.01 * level, "one level, where the order of sums tips it"
        assert (difference > 0.05 * level).mean() < (0.005 if bits <= 12 else 0.03)
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), evaluated(net, x))
    layer = deployed.get_submodule("a")
    assert type(layer).__name__ == ("IntegerLayer" if bits <= 8 else "PartlyIntegerLayer")
    assert layer.get_buffer("weight").dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert len(evaluated(net, x).unique()) <= grid[2] - grid[1] + 1


class Many(nn.Module):
    """Layers whose names say their types: linear layers, and convolutions on the same numbers."""

    def __init__(self, linear: list[str], conv: list[str]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({dtype: nn.Linear(32, 24) for dtype in linear})
        self.conv = nn.ModuleDict({dtype: nn.Conv2d(2, 24, 3) for dtype in conv})

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [layer(x) for layer in self.linear.values()]
        return found + [layer(x.view(-1, 2, 4, 4)) for layer in self.conv.values()]


def test_layers_of_any_bits_in_onnxruntime(tmp_path: Path) -> None:
    """8 bits and fewer in integer kernels, more in float arithmetic; stored as int4, int8, int16; equal to the deployed."""
    linear, conv = ["int2", "uint3", "int4", "uint8", "int9", "uint12", "int16", "uint16"], ["uint2", "int4", "int10", "int16"]
    net, x = Many(linear, conv), torch.randn(16, 32)
    names = [f"linear.{dtype}" for dtype in linear] + [f"conv.{dtype}" for dtype in conv]
    common = {"target_names": ["_input_", "weight", "_output_"]}
    config = [{"op_names": [name], "quant_dtype": name.partition(".")[2], **common} for name in names]
    prepared(net, config, x).train()(x)
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "m.onnx", example_input=x)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    for name in names:
        bits = int(name.partition(".")[2].lstrip("uint"))
        dtype = onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8 if bits <= 8 else onnx.TensorProto.INT16
        assert stored[f"{name}.weight_int4" if bits <= 4 else f"{name}.weight"] == dtype
    with torch.no_grad():
        expected = deployed.eval()(x)
    session = onnxruntime_session(path)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for name, a, b in zip(names, expected, found, strict=True):
        bits = int(name.partition(".")[2].lstrip("uint"))
        difference = (a - torch.as_tensor(b)).abs()
        if bits <= 8:
            assert not bool(difference.any()), name
        else:
            assert float(difference.max()) <= 1.01 * float(a.max() - a.min()) / (2**bits - 1), name
            assert float((difference > 1e-5).float().mean()) < 0.02, name


# -- blocks ----------------------------------------------------------------------------------------------------------------------

CONV_BLOCKS: list[tuple[Any, tuple[int, ...]]] = [
    ("in_channel", (-1, 1, -1, -1)),
    ([1, -1], (1, 1, 1, -1)),
    ([2, 2, -1, -1], (2, 2, -1, -1)),
    ([3, -1, -1, -1], (3, -1, -1, -1)),
    ([[1, 2], "back", -1], (1, 2, -1, -1)),
    ([-1, -1, 1, 3], (-1, -1, 1, 3)),
    ([[-1], "front", 1], (1, 1, 1, -1)),
    ("out_channel", (1, -1, -1, -1)),
    ("per_tensor", (-1, -1, -1, -1)),
]
LINEAR_BLOCKS: list[tuple[Any, tuple[int, ...]]] = [
    ("in_channel", (-1, 1)),
    ([1, 4], (1, 4)),
    ([2, -1], (2, -1)),
    ([3, 2], (3, 2)),
    ([4], (1, 4)),
    ([[2], "back"], (2, 1)),
]
BLOCK_CASES = [("conv", *row) for row in CONV_BLOCKS] + [("linear", *row) for row in LINEAR_BLOCKS]


@pytest.mark.parametrize("norm", [False, True], ids=["alone", "bn"])
@pytest.mark.parametrize(
    "grid", [("int8", "symmetric"), ("int8", "affine"), ("uint4", "affine"), ("uint4", "symmetric")], ids=str
)
@pytest.mark.parametrize(("kind", "granularity", "kernel"), BLOCK_CASES, ids=[f"{k} {g}" for k, g, _ in BLOCK_CASES])
def test_blocks_of_a_weight_against_numpy(
    kind: str, granularity: Any, kernel: tuple[int, ...], grid: tuple[str, str], norm: bool
) -> None:
    """Folded with a batch norm of either sign: what lies on the grid is the folded weight, each block by its own range."""
    net, x = Stack(kind, norm), batch(kind)
    keys = {"quant_dtype": grid[0], "quant_scheme": grid[1]}
    settings = {"weight": {"granularity": granularity}}
    entry: dict[str, Any] = {"op_names": ["a"], "target_names": ["weight"], **keys, "target_settings": settings}
    if norm:
        entry["fuse_names"] = [("a", "bn")]
    prepared(net, [entry], x).train()(x)
    deployed = convert_model(net)
    weight, bias = (net.get_parameter(f"a.{name}").detach().numpy() for name in ("weight", "bias"))
    k = np.ones(6)
    if norm:
        bn: Any = net.bn
        k = (bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()).numpy()
        bias = (bias - bn.running_mean.double().numpy()) * k + bn.bias.detach().double().numpy()
    column = (-1,) + (1,) * (weight.ndim - 1)
    if kernel[0] == 1:  # each channel has scales of its own: rounding and scaling change places
        folded = numpy_rounded(weight, kernel, *ends(grid[0]), grid[1])[0] * k.reshape(column)
    else:
        c = np.abs(k).reshape(column).astype(np.float32)
        folded = numpy_rounded(weight * c, kernel, *ends(grid[0]), grid[1])[0] * np.sign(k).reshape(column)
    w, b = torch.from_numpy(folded).double(), torch.from_numpy(np.asarray(bias)).double()
    expected = F.conv2d(x.double(), w, b, padding=1) if kind == "conv" else F.linear(x.double(), w, b)
    found = evaluated(deployed, x)
    assert torch.equal(found, evaluated(net, x))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    layer = deployed.get_submodule("a")
    q = layer.get_buffer("weight")
    assert q.dtype == torch.int8
    assert len(q.unique()) <= ends(grid[0])[1] - ends(grid[0])[0] + 1


@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6], ids=["none", "ReLU", "ReLU6"])
@pytest.mark.parametrize("granularity", [[2, 2, -1, -1], "in_channel", [1, -1]], ids=str)
def test_blocks_train_like_they_deploy(granularity: Any, act: type[nn.Module] | None) -> None:
    """Everything quantized, batch norm and activation fused: after training, eval and the simulation stay one level apart."""
    net, x = Stack("conv", True, act), batch("conv")
    group = ("a", "bn") if act is None else ("a", "bn", "act")
    settings = {"weight": {"granularity": granularity, "quant_scheme": "affine"}}
    entry = {
        "op_names": ["a"],
        "target_names": ["_input_", "weight", "_output_"],
        "fuse_names": [group],
        "target_settings": settings,
    }
    prepared(net, [entry], x).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters() if name != "a.bias")
    found = evaluated(net, x)
    groups: Any = list(prepared_groups(net).values())
    groups[0][1].simulate = True
    simulated = evaluated(net, x)
    step = groups[0][1].output.grid().scale
    assert (found - simulated).abs().max() <= 1.01 * step
    assert ((found - simulated).abs() > 0.5 * step).float().mean() < 0.02
    assert torch.equal(evaluated(convert_model(net), x), found)


class Blocky(nn.Module):
    """Layers whose weights and activations have blocks of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.transposed = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.wide, self.narrow = nn.Linear(8, 6), nn.Linear(6, 4)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([1.0, -0.7, 0.3, -1.4, 2.0, 0.5]))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transposed(self.relu(self.bn(self.conv(x)))), self.narrow(self.wide(y))


BLOCKY: list[dict[str, Any]] = [
    {
        "op_names": ["conv"],
        "fuse_names": [("conv", "bn", "relu")],
        "target_settings": {
            "weight": {"granularity": [2, 2, -1, -1], "quant_scheme": "affine"},
            "_input_": {"granularity": "per_channel"},
        },
    },
    {"op_names": ["transposed"], "target_settings": {"weight": {"granularity": [2, 1, -1, -1]}, "_output_": {}}},
    {
        "op_names": ["wide"],
        "target_settings": {"weight": {"granularity": [1, 4]}, "_output_": {"granularity": [[-1, 2], "back"]}},
    },
    {"op_names": ["narrow"], "target_settings": {"weight": {"granularity": "in_channel", "quant_dtype": "int12"}}},
]


def test_blocks_in_onnxruntime(tmp_path: Path) -> None:
    net, given = Blocky(), (torch.randn(8, 4, 6, 6), torch.randn(8, 8))
    plan = make_plan(net, BLOCKY, example_input=given)
    assert [str(layer.targets["weight"].spec.granularity) for layer in plan.layers] == [
        *("[2, 2, -1, -1]", "[2, 1, -1, -1]", "[1, 4]", "in_channel"),
    ]
    prepare_model(net, plan).train()(*given)
    deployed = convert_model(net)
    with torch.no_grad():
        expected = net.eval()(*given)
        assert all(torch.equal(a, b) for a, b in zip(deployed(*given), expected, strict=True))
    session = onnxruntime_session(export_model(deployed, tmp_path / "m.onnx", example_input=given))
    found = session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), given, strict=True)})
    for a, b in zip(expected, found, strict=True):
        assert float(((a - torch.as_tensor(b)).abs() > 1e-4).float().mean()) < 0.01


# -- activations with a scale for each channel -----------------------------------------------------------------------------------


def test_a_scale_for_each_channel_of_the_input() -> None:
    net, x = Stack("conv"), batch("conv") * torch.tensor([0.01, 1.0, 10.0, 100.0]).view(4, 1, 1)
    entry = {"op_names": ["a"], "target_names": ["_input_"], "target_settings": {"_input_": {"granularity": "per_channel"}}}
    prepared(net, [entry], x).train()
    twin = nn.Conv2d(4, 6, 3, padding=1)
    twin.load_state_dict(net.a.state_dict())
    out = net(x)
    rounded = torch.from_numpy(numpy_rounded(x.numpy(), (-1, 1, -1, -1), 0, 255, "affine")[0])
    expected = twin(rounded)
    assert (out - expected).abs().max() < 1e-4
    assert (rounded - x)[:, 0].abs().max() < 1e-3, "the faint channel keeps its values"
    found = evaluated(net, x)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(evaluated(convert_model(net), x), found)


def test_channels_that_change_their_number_are_an_error() -> None:
    net, x = nn.Sequential(nn.Identity()), torch.randn(2, 4, 6)
    entry = {"op_names": ["0"], "target_names": ["_input_"], "target_settings": {"_input_": {"granularity": "per_channel"}}}
    prepared(net, [entry], x).train()(x)
    net(torch.randn(5, 4, 3))
    with pytest.raises(ConfigError, match=r"0\._input_: granularity per_channel met a tensor of shape \(2, 5, 6\).*\(1, 4, 1\)"):
        net(torch.randn(2, 5, 6))
    before = quantizer_state(net)["0._input_"]["low"]
    net(torch.randn(2, 4, 6))
    assert quantizer_state(net)["0._input_"]["low"].shape == before.shape, "and harms nothing"


def test_blocks_that_no_longer_divide_are_an_error() -> None:
    net, x = nn.Sequential(nn.Identity()), torch.randn(2, 4)
    entry = {"op_names": ["0"], "target_names": ["_input_"], "target_settings": {"_input_": {"granularity": [-1, 2]}}}
    prepared(net, [entry], x).train()(x)
    with pytest.raises(
        ConfigError, match=r"granularity \[-1, 2\] met a tensor of shape \(2, 5\): which these blocks do not divide"
    ):
        net(torch.randn(2, 5))
    with pytest.raises(ConfigError, match=r"the blocks \[-1, 3\] do not divide the activation of shape \(2, 4\)"):
        make_plan(
            nn.Sequential(nn.Identity()),
            [{"op_names": ["0"], "target_settings": {"_input_": {"granularity": [-1, 3]}}}],
            example_input=x,
        )


# -- observers -------------------------------------------------------------------------------------------------------------------

BATCHES = [[-1.0, 2.0], [-3.0, 1.0], [0.5, 10.0]]


@pytest.mark.parametrize(
    ("observer", "expected"),
    [
        ("minmax", [(-1.0, 2.0), (-3.0, 2.0), (-3.0, 10.0)]),
        ("moving_average", [(-1.0, 2.0), (-1.02, 1.99), (-1.0048, 2.0701)]),
        ("default", [(-1.0, 2.0), (-1.02, 1.99), (-1.0048, 2.0701)]),
    ],
)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_observers(observer: str, expected: list[tuple[float, float]], granularity: str) -> None:
    net = nn.Sequential(nn.Identity())
    keys = {"observer": observer, "granularity": granularity}
    entry = {"op_names": ["0"], "target_names": ["_input_"], "target_settings": {"_input_": keys}}
    prepared(net, [entry], torch.zeros(2, 2, 2)).train()
    for values, (low, high) in zip(BATCHES, expected, strict=True):
        twice = [[values, [2 * value for value in values]]] * 3  # (3, 2, 2): the second channel is the first one doubled
        x = torch.tensor([values] if granularity == "per_tensor" else twice)
        net(x)
        state = quantizer_state(net)["0._input_"]
        if granularity == "per_tensor":
            assert (state["low"], state["high"]) == pytest.approx((low, high), abs=1e-6)
        else:
            assert state["low"].flatten().tolist() == pytest.approx([low, 2 * low], abs=1e-6)
            assert state["high"].flatten().tolist() == pytest.approx([high, 2 * high], abs=1e-6)


def test_an_observer_is_for_activations() -> None:
    for config in (
        {"op_names": ["a"], "target_settings": {"weight": {"observer": "minmax"}}},
        {"op_names": ["a"], "target_settings": {"bias": {"observer": "moving_average"}}},
    ):
        with pytest.raises(ConfigError, match=r"\['observer'\]: (minmax|moving_average) is for activations"):
            make_plan(Stack("linear"), [config])
    plan = make_plan(Stack("linear"), [{"op_names": ["a"], "observer": "minmax", "high_precision_output": False}])
    assert {name: one.spec.observer for name, one in plan.layers[0].targets.items()} == {
        "_input_": "minmax",
        "weight": "default",
        "_output_": "minmax",
    }


# -- apply_method ----------------------------------------------------------------------------------------------------------------

METHODS = ["clamp_round", "qat_clamp_round", "bypass"]


def probed(net: nn.Module, entry: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output for x and the gradient of its sum at x, under the range that x cut to [-1, 1] gave."""
    prepared(net, [entry], x).train()(x.clamp(-1, 1))
    apply_phase(net, HOLD)
    given = x.clone().requires_grad_()
    y = net(given)
    y.sum().backward()
    assert given.grad is not None
    return y, given.grad


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_the_gradient_of_an_activation(scheme: str, granularity: str) -> None:
    """Only the method varies: below, at both ends of and above the range of -1 to 1."""
    x = torch.tensor([-9.0, -0.99, 0.3, 0.99, 9.0]).view(1, 1, 5).repeat(2, 2, 1)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for method in METHODS:
        net = nn.Sequential(nn.Identity())
        keys = {"apply_method": method, "quant_scheme": scheme, "granularity": granularity}
        entry = {"op_names": ["0"], "target_settings": {"_input_": keys}, "target_names": ["_input_"]}
        y, gradient = probed(net, entry, x)
        found[method] = y[0, 0].tolist(), gradient[1, 1].tolist()
    assert found["qat_clamp_round"][1] == [0, 1, 1, 1, 0]
    assert found["clamp_round"][1] == [1, 1, 1, 1, 1]
    assert found["clamp_round"][0] == found["qat_clamp_round"][0]
    assert found["clamp_round"][0][0] == pytest.approx(-1.0, abs=0.01)
    assert found["bypass"] == (x[0, 0].tolist(), [1, 1, 1, 1, 1])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6], ids=lambda a: a.__name__)
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_the_gradient_of_a_fused_activation(act: type[nn.Module], scheme: str, granularity: str) -> None:
    """`clamp_round` passes what the grid clips, never what the ReLU stops."""
    x = torch.tensor([[-2.0], [0.5], [0.9], [5.0], [9.0]])
    found: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for method in METHODS:
        net = nn.Sequential(nn.Linear(1, 1), act())
        nn.init.ones_(net[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(net[0].bias)  # type: ignore[arg-type]
        keys = {"apply_method": method, "quant_scheme": scheme, "granularity": granularity}
        entry = {
            "op_names": ["0"],
            "target_names": ["_output_"],
            "target_settings": {"_output_": keys},
            "fuse_names": [("0", "1")],
        }
        y, gradient = probed(net, entry, x)
        found[method], values[method] = gradient.flatten().tolist(), y.flatten().tolist()
    assert found["qat_clamp_round"] == [0, 1, 1, 0, 0]
    assert found["clamp_round"] == found["bypass"] == [0, 1, 1, 1, 0 if act is nn.ReLU6 else 1]
    assert values["clamp_round"] == values["qat_clamp_round"] == pytest.approx([0, 0.5, 0.9, 1, 1], abs=0.01)
    assert values["bypass"] == pytest.approx([0, 0.5, 0.9, 5, 6 if act is nn.ReLU6 else 9])


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel", [1, 1]], ids=str)
def test_the_gradient_of_a_weight(granularity: Any) -> None:
    """-1.5 to 1.5 on four levels of step 1: half to even puts zero on level 2, and 1.5 would be level 4."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for method in METHODS:
        net = nn.Sequential(nn.Linear(4, 1, bias=False))
        weight = net[0].weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            weight.copy_(torch.tensor([[-1.5, 0.4, 1.5, 1.1]]))
        keys = {"quant_dtype": "uint2", "quant_scheme": "affine", "apply_method": method, "granularity": granularity}
        entry = {"op_names": ["0"], "target_names": ["weight"], "target_settings": {"weight": keys}}
        y = prepared(net, [entry], torch.eye(4)).train()(torch.eye(4))
        y.sum().backward()
        assert weight.grad is not None
        found[method] = y.flatten().tolist(), weight.grad.flatten().tolist()
        deployed = convert_model(net).get_submodule("0")
        assert deployed.get_buffer("weight").dtype == (torch.float32 if method == "bypass" else torch.int8)
    whole = granularity != [1, 1]
    assert found["clamp_round"][0] == found["qat_clamp_round"][0]
    assert found["bypass"][0] == pytest.approx([-1.5, 0.4, 1.5, 1.1])
    assert found["bypass"][1] == [1, 1, 1, 1]
    assert found["clamp_round"][1] == [1, 1, 1, 1]
    if whole:
        assert found["clamp_round"][0] == [-2, 0, 1, 1]
        assert found["qat_clamp_round"][1] == [1, 1, 0, 1]


def test_bypassed_targets_are_in_the_plan_and_nowhere_else() -> None:
    net, x = Stack("linear"), batch("linear")
    plan = make_plan(net, [{"op_names": ["a"], "apply_method": "bypass"}], example_input=x)
    assert "bypass: stays float" in str(plan)
    before = evaluated(net, x)
    prepare_model(net, plan).train()
    assert not quantizer_state(net)
    assert torch.equal(net(x), before)
    assert torch.allclose(evaluated(convert_model(net), x), before, atol=1e-6)


# -- saved and resumed -----------------------------------------------------------------------------------------------------------


def test_ranges_of_blocks_are_saved_and_restored() -> None:
    given = (torch.randn(8, 4, 6, 6), torch.randn(8, 8))
    net, twin = prepared(Blocky(), BLOCKY, given).train(), prepared(Blocky(), BLOCKY, given)
    for _ in range(3):
        net(torch.randn(8, 4, 6, 6), torch.randn(8, 8))
    state = quantizer_state(net)
    assert state["conv._input_"]["low"].shape == (1, 4, 1, 1)
    assert state["wide._output_"]["high"].shape == (1, 3)
    twin.load_state_dict(net.state_dict())
    load_quantizer_state(twin, state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net.eval()(*given), twin.eval()(*given), strict=True))
    twin.train()(*given)
    assert torch.equal(quantizer_state(net)["conv._input_"]["low"], state["conv._input_"]["low"]), "the twin has its own"


PER_CHANNEL: list[dict[str, Any]] = [
    {
        "op_types": ["Conv2d"],
        "fuse_names": [("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2")],
        "target_settings": {
            "_input_": {"granularity": "per_channel"},
            "_output_": {"granularity": "per_channel", "observer": "minmax"},
        },
    },
    {"op_types": ["Linear"], "quant_dtype": "int8"},
]


def test_a_checkpoint_with_ranges_of_channels_resumes(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """One run of two epochs, and the same run stopped after the first: bit for bit; plain tensors and numbers in the file."""

    def run(epochs: int, ckpt: Path | None = None) -> tuple[Lit, QuantFusionCallback]:
        torch.manual_seed(1)
        model, callback = Lit(), QuantFusionCallback(PER_CHANNEL, schedule={"observe_stop": None}, verbose=0)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(model, loader(), loader(16, seed=1), ckpt_path=ckpt, weights_only=True if ckpt else None)
        if ckpt is None and epochs == 1:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        return model, callback

    run(1)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["QuantFusionCallback"]["quantizers"]
    assert state["conv1._input_"]["low"].shape == (1, 3, 1, 1)
    assert state["conv1._output_"]["high"].shape == (1, 8, 1, 1)
    (whole, first), (resumed, second) = run(2), run(2, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    ranges, again = quantizer_state(whole), quantizer_state(resumed)
    assert ranges.keys() == again.keys()
    for name, side in itertools.product(ranges, ("low", "high")):
        assert torch.equal(torch.as_tensor(ranges[name][side]), torch.as_tensor(again[name][side])), name
    quantizers = [q for _, group in prepared_groups(resumed).values() for q in group.quantizers]
    assert sum(isinstance(quantizer, BlockQuantizer) for quantizer in quantizers) == 4
    assert first.deployed_model is not None
    assert second.deployed_model is not None
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(evaluated(first.deployed_model, x), evaluated(second.deployed_model, x))
    assert torch.equal(evaluated(second.deployed_model, x), evaluated(resumed, x))
