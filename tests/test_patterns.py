# SPDX-License-Identifier: Apache-2.0
"""Owns the pattern table: every pattern beyond a layer, batch norm and ReLU, against plain torch in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from test_fusion import BYPASS, randomised
from test_mnist import optimized_ops
from torch import Tensor, nn

from lightning_quant import ConfigError, convert_model, export_model, make_plan, prepare_model, restore_model
from lightning_quant.export import onnxruntime_session
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer
from lightning_quant.layers import Plan
from lightning_quant.patterns import USER_ROWS, pattern_problem, register_fusion, roles_of
from lightning_quant.prepare import apply_phase, quantizer_state

EVERY = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"]
EVERY += ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
Act = Callable[[Tensor], Tensor]
Numbers = dict[str, dict[str, Any]]


class One(nn.Module):
    """One group: [norm before] layer [norm] [activation], which is a module or a function."""

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module | None = None,
        act: Act | None = None,
        *,
        before: nn.Module | None = None,
        size: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.layer, self.norm, self.act, self.size = before, layer, norm, act, size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.before is None else self.before(x)
        y = self.layer(y) if self.size is None else self.layer(y, output_size=self.size)
        y = y if self.norm is None else self.norm(y)
        return y if self.act is None else self.act(y)


def prepared(net: nn.Module, x: Tensor, **keys: Any) -> Plan:
    """Prepare for every type, found by itself; the one group ends on a grid, too."""
    types = sorted({type(module).__name__ for module in net.modules()} & set(EVERY))
    plan = make_plan(net, [{"op_types": types, "high_precision_output": False, **keys}], example_input=x)
    prepare_model(net, plan)
    return plan


def fused(plan: Plan) -> dict[str, list[str]]:
    return {layer.name: list(layer.fused_with) for layer in plan.layers}


def evaluated(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = net.eval()(x)
    return y


# -- the reference: written out from the equations, in float64 -------------------------------------------------------------


def on_grid(x: Tensor, numbers: dict[str, Any]) -> tuple[Tensor, float]:
    """(x on the unsigned affine grid of 8 bits over a range, the step)."""
    low, high = min(numbers["low"], 0.0), max(numbers["high"], 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return (torch.round(x / step).add(zero).clamp(0, 255) - zero) * step, step


def k_and_t(norm: Any) -> tuple[Tensor, Tensor]:
    k = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return k, norm.bias.detach().double() - k * norm.running_mean.double()


def rounded(block: Tensor) -> Tensor:
    """Symmetric, on 255 levels, by the largest magnitude."""
    step = block.abs().max() / 127
    return block if step == 0 else torch.round(block / step) * step


def weights_of(head: Any, k: Tensor) -> Tensor:
    """The weight times k of its output channel, rounded for each output channel by itself."""
    w: Tensor = head.weight.detach().double().clone()
    transposed = isinstance(head, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    for channel in range(len(k)):
        if transposed:
            rows, columns = w.shape[0] // head.groups, w.shape[1]
            part = w[channel // columns * rows :][:rows, channel % columns]
        else:
            part = w[channel]
        part.copy_(rounded(part * k[channel]))
    return w


def reference(net: One, x: Tensor, state: Numbers) -> tuple[Tensor, float]:
    """(what eval computes, the step of its end), from the float modules and the ranges alone."""
    head: Any = copy.deepcopy(net.layer).double()
    channels = int(head.out_features if isinstance(head, nn.Linear) else head.out_channels)
    k, t = (torch.ones(channels).double(), torch.zeros(channels).double()) if net.norm is None else k_and_t(net.norm)
    bias = torch.zeros(channels).double() if head.bias is None else head.bias.detach().double()
    with torch.no_grad():
        head.weight.copy_(weights_of(head, k))
        head.bias = nn.Parameter(bias * k + t)
        x = on_grid(x.double(), state["layer._input_"])[0]
        y = head(x) if net.size is None else head(x, output_size=net.size)
        if "layer._inner_" in state:
            y = on_grid(y, state["layer._inner_"])[0]
        act = copy.deepcopy(net.act).double() if isinstance(net.act, nn.Module) else net.act
        y = y if act is None else act(y)
        return on_grid(y, state["layer._output_"])


def assert_near(found: Tensor, expected: Tensor, step: float, steps: float = 1.01, ends: bool = True) -> None:
    """The last bit of a sum may tip a level, here and there.

    `ends`: whether the ends of the range are compared as closely; no level may stand where a clamp cuts off.
    """
    difference = (found.double() - expected).abs()
    assert found.unique().numel() > 5, "a constant would agree with anything"
    assert float(difference.max()) <= steps * step
    if not ends:
        difference = difference[(expected > expected.min()) & (expected < expected.max())]
        assert difference.numel() > 100
    assert float((difference > 0.01 * step).double().mean()) <= 0.02


def check(net: One, x: Tensor, names: list[str], steps: float = 1.01, ends: bool = True) -> nn.Module:
    """Bypassed training is the float net's; eval is the reference and the converted net; returns the converted net."""
    twin = copy.deepcopy(net).train()
    plan = prepared(net, x)
    assert fused(plan) == {"layer": names}
    apply_phase(net, BYPASS)
    before = copy.deepcopy(net.state_dict())
    found, expected = net.train()(x), twin(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()) + 1e-6), name
    for name, buffer in net.named_buffers():
        assert torch.allclose(buffer, twin.get_buffer(name), atol=1e-6), name
    net.load_state_dict(before)
    apply_phase(net, type(BYPASS)())
    net.zero_grad()
    out = net(x)
    (out * weights).sum().backward()
    head_weight = net.layer.get_parameter("weight")
    assert head_weight.grad is not None and torch.isfinite(head_weight.grad).all() and head_weight.grad.abs().max() > 0
    found = evaluated(net, x)
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    state, restored = quantizer_state(net), restore_model(copy.deepcopy(net))
    assert isinstance(restored, One)
    assert_near(found, *reference(restored, x, state), steps, ends)
    return deployed


def onnx_ops(deployed: nn.Module, x: Tensor, path: Path) -> Counter[str]:
    """Export, which checks parity itself; compare once more; the operators of the file."""
    export_model(deployed, path, example_input=x)
    session = onnxruntime_session(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = evaluated(deployed, x)
    share = ((torch.as_tensor(found) - expected).abs() > 1e-5 * expected.abs().max()).double().mean()
    assert float(share) <= 0.01
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# -- transposed convolutions -------------------------------------------------------------------------------------------------

SPREAD: dict[int, tuple[Any, Any]] = {
    1: (nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.ConvTranspose3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("more", ["", "output_padding", "output_size"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["groups 1", "groups 2", "depthwise"])
@pytest.mark.parametrize("dims", SPREAD)
def test_transposed_convolutions_fold(dims: int, groups: int, more: str, tmp_path: Path) -> None:
    kind, norm = SPREAD[dims]
    x = torch.randn(4, 4, *[5] * dims)
    padding = {"output_padding": 1} if more == "output_padding" else {}
    layer = kind(4, 8, 3, stride=2, padding=1, groups=groups, bias=more == "", **padding)
    net = One(layer, randomised(norm(8)), nn.ReLU(), size=[10] * dims if more == "output_size" else None)
    deployed = check(net, x, ["norm", "act"])
    assert isinstance(deployed.get_submodule("layer"), PartlyIntegerLayer), "no CPU runtime has an integer kernel"
    assert evaluated(deployed, x).shape[2:] == (*[10 if more else 9] * dims,)
    assert "BatchNormalization" not in onnx_ops(deployed, x, tmp_path / "m.onnx")


@pytest.mark.parametrize("keys", [{"quant_scheme": "affine"}, {"quant_dtype": "uint8"}], ids=str)
def test_a_transposed_convolution_with_a_zero_point_keeps_its_batch_norm(keys: dict[str, Any]) -> None:
    x, config = torch.randn(4, 4, 5, 5), {"op_types": ["ConvTranspose2d"], "target_settings": {"weight": keys}}
    net = One(nn.ConvTranspose2d(4, 8, 3), randomised(nn.BatchNorm2d(8)), nn.ReLU())
    plan = make_plan(net, [config], example_input=x)
    assert fused(plan) == {"layer": []}
    assert "'norm' folds into 'layer' only on a weight grid without a zero point" in str(plan)
    with pytest.raises(ConfigError, match=r"'norm' folds into 'layer' only on a weight grid without a zero point"):
        make_plan(net, [{**config, "fuse_names": [("layer", "norm")]}], example_input=x)


# -- clamps ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 3.0)], ids=str)
@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_hardtanh_is_done_by_the_grid(ends: tuple[float, float], as_module: bool, tmp_path: Path) -> None:
    act: Act = nn.Hardtanh(*ends) if as_module else lambda y: F.hardtanh(y, *ends)
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(0.5)
    net, x = One(nn.Conv2d(4, 8, 3, padding=1), norm, act), torch.randn(8, 4, 6, 6)
    deployed = check(net, x, ["norm", "act" if as_module else "hardtanh"], ends=False)
    y = evaluated(deployed, x)
    assert isinstance(deployed.get_submodule("layer"), IntegerLayer)
    assert (float(y.min()), float(y.max())) == pytest.approx(ends, abs=1e-2 * (ends[1] - ends[0]))
    onnx_ops(deployed, x, tmp_path / "m.onnx")
    ops = optimized_ops(tmp_path / "m.onnx", tmp_path / "optimized.onnx")
    assert ops["QLinearConv"] == 1
    assert not {"Conv", "FusedConv"} & set(ops), "the clamp keeps nothing in float"


# -- curves ------------------------------------------------------------------------------------------------------------------

CURVES: dict[str, tuple[Callable[[], nn.Module], Act]] = {
    "leaky_relu": (lambda: nn.LeakyReLU(0.2), lambda y: F.leaky_relu(y, 0.2)),
    "silu": (nn.SiLU, F.silu),
    "hardswish": (nn.Hardswish, F.hardswish),
    "gelu": (nn.GELU, F.gelu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "tanh": (nn.Tanh, torch.tanh),
    "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid),
}


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
@pytest.mark.parametrize("name", CURVES)
def test_curves(name: str, as_module: bool, tmp_path: Path) -> None:
    make, function = CURVES[name]
    net = One(nn.Conv2d(4, 8, 3, padding=1, bias=False), randomised(nn.BatchNorm2d(8)), make() if as_module else function)
    x = torch.randn(8, 4, 6, 6)
    deployed = check(net, x, ["norm", "act" if as_module else name], steps=2.01)  # a tipped level before the curve moves it
    assert isinstance(deployed.get_submodule("layer"), ActivatedLayer)
    assert isinstance(deployed.get_submodule("layer.layer"), IntegerLayer)
    ops = onnx_ops(deployed, x, tmp_path / "m.onnx")
    assert ops["QuantizeLinear"] == 3, "the input, what the curve reads, the output"


class MadeHere(nn.Module):
    """Activations that a forward makes itself: one place in the code for two of them and for a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.relu = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(self.one, nn.ReLU(), self.two, self.relu)(x)
        y: Tensor = nn.Sequential(self.three, nn.SiLU())(x)
        return y


def test_activations_that_a_forward_makes_itself_fuse() -> None:
    net, x = MadeHere(), torch.randn(64, 6)
    twin = copy.deepcopy(net)
    assert fused(prepared(net, x)) == {"one": ["relu_1"], "two": ["relu"], "three": ["silu"]}
    net.train()(x)
    assert {name: numbers["low"] for name, numbers in quantizer_state(net).items() if "_output_" in name} == {
        "one._output_": 0.0,
        "two._output_": 0.0,
        "three._output_": pytest.approx(float(evaluated(twin, x).min()), abs=0.02),
    }
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), evaluated(net, x))
    assert (evaluated(net, x) - evaluated(twin, x)).abs().max() <= 0.05 * evaluated(twin, x).abs().max()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_keeps_its_approximation(approximate: str) -> None:
    net, x = One(nn.Linear(6, 8), None, nn.GELU(approximate=approximate)), torch.randn(64, 6)
    check(net, x, ["act"], steps=2.01)


@pytest.mark.parametrize("shared", [True, False], ids=["one slope", "a slope a channel"])
def test_prelu_trains_its_slope(shared: bool, tmp_path: Path) -> None:
    net, x = One(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.PReLU(1 if shared else 8)), torch.randn(8, 4, 6, 6)
    assert fused(prepared(net, x)) == {"layer": ["norm", "act"]}
    slope = net.get_parameter("act.weight")
    before = slope.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(x).square().mean().backward()
        optimizer.step()
    assert not torch.isclose(slope, before).any()
    deployed = convert_model(net.eval())
    found = evaluated(net, x)
    assert torch.equal(evaluated(deployed, x), found)
    onnx_ops(deployed, x, tmp_path / "m.onnx")
    with torch.no_grad():
        slope.fill_(-3.0)
    assert torch.equal(evaluated(deployed, x), found), "the deployed net owns its slope"
    assert not torch.equal(evaluated(net, x), found)
    assert torch.equal(evaluated(convert_model(net), x), evaluated(net, x))


def test_a_functional_prelu_reads_the_parameter_of_its_module() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.slope = nn.Linear(6, 8), nn.Parameter(torch.full((8,), 0.3))

        def forward(self, x: Tensor) -> Tensor:
            return F.prelu(self.layer(x), self.slope)

    net, x = Reads(), torch.randn(64, 6)
    twin = copy.deepcopy(net)
    prepared(net, x)
    net.train()(x).square().sum().backward()
    assert net.slope.grad is not None and net.slope.grad.abs().min() > 0
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), evaluated(net, x))
    assert (evaluated(net, x) - evaluated(twin, x)).abs().max() <= 0.05 * evaluated(twin, x).abs().max()


# -- norms in other places ----------------------------------------------------------------------------------------------------


def test_a_synchronised_batch_norm_in_eval_is_a_batch_norm() -> None:
    """In training it needs a process group; frozen, a CPU runs it."""
    norm, x = randomised(nn.BatchNorm2d(8)), torch.randn(8, 4, 6, 6)
    one = One(nn.Conv2d(4, 8, 3), norm, nn.ReLU())
    other = copy.deepcopy(one)
    other.norm = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))
    assert type(other.norm) is nn.SyncBatchNorm
    found = []
    for net in (one, other):
        assert fused(prepared(net, x)) == {"layer": ["norm", "act"]}
        net.train()
        net.norm.eval()  # type: ignore[union-attr]
        net(x)
        deployed = convert_model(net)
        assert isinstance(deployed.get_submodule("layer"), IntegerLayer)
        assert torch.equal(evaluated(deployed, x), evaluated(net, x))
        found.append(evaluated(net, x))
    assert torch.equal(*found)
    assert isinstance(other.norm, nn.SyncBatchNorm)


@pytest.mark.parametrize("make", [None, nn.ReLU, nn.ReLU6, lambda: F.relu6], ids=["alone", "ReLU", "ReLU6", "F.relu6"])
@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm2d, (8, 6, 5, 5)), (nn.BatchNorm1d, (64, 6)), (nn.BatchNorm1d, (8, 6, 9))]
)
def test_a_batch_norm_is_a_layer_of_exact_weights(
    norm: type[nn.Module], shape: tuple[int, ...], make: Callable[[], Act] | None, tmp_path: Path
) -> None:
    act = None if make is None else make()
    net, x = One(randomised(norm(6)), None, act), torch.randn(shape)
    with torch.no_grad():
        net.get_parameter("layer.weight")[1] = -0.7
    plan = prepared(net, x)
    assert fused(plan) == {"layer": [] if act is None else ["act" if isinstance(act, nn.Module) else "relu6"]}
    net.train()(x)
    found, state = evaluated(net, x), quantizer_state(net)
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    if act is not None:
        layer = deployed.get_submodule("layer")
        assert isinstance(layer, IntegerLayer)
        k, _ = k_and_t(net.layer)
        assert layer.weight.flatten().tolist() == (127 * torch.sign(k)).tolist()
        assert {-127, 0, 127} == set(layer.weight.flatten().tolist())
    k, t = (side.view(-1, *[1] * (x.dim() - 2)) for side in k_and_t(net.layer))
    y = on_grid(x.double(), state["layer._input_"])[0] * k + t
    assert_near(found, *on_grid(y if act is None else act(y), state["layer._output_"]))
    onnx_ops(deployed, x, tmp_path / "m.onnx")


BEFORE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.BatchNorm1d(4), lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (8, 4, 9)),
    "conv2d": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: nn.BatchNorm2d(6), (8, 4, 9, 9)),
    "groups": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (8, 4, 6, 6)),
    "depthwise": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), (8, 4, 6, 6)),
    "conv3d": (lambda: nn.BatchNorm3d(4), lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (4, 4, 4, 4, 4)),
    "linear": (lambda: nn.BatchNorm1d(4), lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (64, 4)),
}


@pytest.mark.parametrize("behind", [True, False], ids=["norm behind", "no norm behind"])
@pytest.mark.parametrize("name", BEFORE)
def test_a_batch_norm_before_a_layer_folds_into_it(name: str, behind: bool, tmp_path: Path) -> None:
    """Gamma of any sign, and zero: the first channel."""
    make_before, make_head, make_norm, shape = BEFORE[name]
    before, head = randomised(make_before()), make_head()
    with torch.no_grad():
        before.get_parameter("weight")[1] = -0.8
    norm = randomised(make_norm()) if behind else None
    net, x = One(head, norm, nn.ReLU(), before=before), torch.randn(shape)
    twin = copy.deepcopy(net).train()
    group = ["before", "layer", *(["norm"] if behind else []), "act"]
    plan = prepared(net, x, fuse_names=[group])
    (layer,) = plan.layers
    assert (layer.name, layer.norm_before, layer.batch_norm) == ("layer", "before", "norm" if behind else None)
    apply_phase(net, BYPASS)
    numbers = copy.deepcopy(net.state_dict())
    expected = twin(x)
    assert (net.train()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for one, buffer in net.named_buffers():
        assert torch.allclose(buffer, twin.get_buffer(one), atol=1e-6), one
    net.load_state_dict(numbers)
    apply_phase(net, type(BYPASS)())
    net.train()(x)
    found, state = evaluated(net, x), quantizer_state(net)
    deployed = convert_model(net)
    assert torch.equal(evaluated(deployed, x), found)
    assert isinstance(deployed.get_submodule("layer"), IntegerLayer)
    assert isinstance(deployed.get_submodule("before"), nn.Identity)
    # The reference: w c, rounded, for c = |k|; 1 for the dead channel, which adds its shift alone.
    k, t = k_and_t(net.before)
    c, groups = torch.where(k == 0, 1.0, k.abs()), int(getattr(head, "groups", 1))
    w = head.get_parameter("weight").detach().double().clone()
    k2, t2 = k_and_t(net.norm) if behind else (torch.ones(len(w)).double(), torch.zeros(len(w)).double())
    bias = head.get_parameter("bias").detach().double().clone()
    for out in range(len(w)):
        first = out * groups // len(w) * w.shape[1]
        inputs = slice(first, first + w.shape[1])
        column = (-1, *[1] * (w.dim() - 2))
        on_levels = rounded(w[out] * c[inputs].view(column))
        bias[out] += (on_levels * (t / c)[inputs].view(column)).sum()
        w[out] = on_levels * torch.sign(k)[inputs].view(column) * k2[out]
    plain_head: Any = copy.deepcopy(make_head()).double()
    with torch.no_grad():
        plain_head.weight.copy_(w)
        plain_head.bias.copy_(bias * k2 + t2)
        y = plain_head(on_grid(x.double(), state["layer._input_"])[0]).relu()
    assert_near(found, *on_grid(y, state["layer._output_"]))
    assert "BatchNormalization" not in onnx_ops(deployed, x, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("head", "weight", "message"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), {}, "'before' stands before 'layer', which pads"),
        (nn.Conv2d(4, 6, 3, padding="same"), {}, "'before' stands before 'layer', which pads"),
        (nn.ConvTranspose2d(4, 6, 3), {}, "'before' stands before a transposed convolution"),
        (
            nn.Conv2d(4, 6, 3),
            {"quant_scheme": "affine"},
            "'before' folds into 'layer' only on a weight grid without a zero point",
        ),
        (nn.Conv2d(4, 6, 3), {"quant_dtype": "uint8"}, "'before' folds into 'layer' only on a weight grid without a zero point"),
    ],
    ids=["padding", "same", "transposed", "affine", "uint8"],
)
def test_a_batch_norm_before_a_layer_is_refused(head: nn.Module, weight: dict[str, Any], message: str) -> None:
    net, x = One(head, before=randomised(nn.BatchNorm2d(4))), torch.randn(4, 4, 6, 6)
    config = {"op_names": ["layer"], "target_settings": {"weight": weight}}
    with pytest.raises(ConfigError, match=message):
        make_plan(net, [{**config, "fuse_names": [("before", "layer")]}], example_input=x)
    plan = make_plan(net, [config], example_input=x)
    assert fused(plan) == {"layer": []}
    assert message in str(plan)


# -- patterns of users --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_rows() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = list(USER_ROWS)
    yield
    USER_ROWS[:] = before


class Frozen(nn.Module):
    """A norm of its own: a scale and a shift, along dimension 1 (the last of a matrix)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(-1.0, 2.0, features))
        self.register_buffer("shift", torch.linspace(0.5, -0.5, features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.get_buffer("scale").view(shape) + self.get_buffer("shift").view(shape)

    # what the reference reads, as of a batch norm
    weight = property(lambda self: self.scale)
    bias = property(lambda self: self.shift)
    running_mean = property(lambda self: torch.zeros_like(self.scale))
    running_var = property(lambda self: torch.ones_like(self.scale))
    eps = 0.0


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.5 * x)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.get_buffer("scale"), norm.get_buffer("shift")


@pytest.mark.usefixtures("own_rows")
@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (lambda: nn.Conv2d(4, 8, 3), (8, 4, 6, 6)),
        (lambda: nn.Linear(4, 8), (64, 4)),
        (lambda: nn.ConvTranspose2d(4, 8, 3), (8, 4, 5, 5)),
    ],
    ids=["Conv2d", "Linear", "ConvTranspose2d"],
)
def test_a_norm_and_an_activation_of_ones_own(head: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    layer, x = head(), torch.randn(shape)
    assert fused(make_plan(One(layer, Frozen(8), Swish()), [{"op_names": ["layer"]}], example_input=x)) == {"layer": []}
    register_fusion((type(layer), Frozen, Swish), affine=affine)
    assert pattern_problem([layer, Frozen(8), Swish()]) is None
    assert pattern_problem([layer, Swish()]) is None, "parts of a pattern fuse, too"
    assert pattern_problem([layer, Frozen(8)]) is None
    deployed = check(One(layer, Frozen(8), Swish()), x, ["norm", "act"], steps=2.01)
    assert isinstance(deployed.get_submodule("norm"), nn.Identity)
    assert isinstance(deployed.get_submodule("act"), nn.Identity)
    onnx_ops(deployed, x, tmp_path / "m.onnx")


@pytest.mark.usefixtures("own_rows")
def test_an_activation_of_ones_own_by_the_name_of_its_operator(tmp_path: Path) -> None:
    net, x = One(nn.Conv2d(4, 8, 3), randomised(nn.BatchNorm2d(8)), F.mish), torch.randn(8, 4, 6, 6)
    register_fusion((nn.Conv2d, nn.BatchNorm2d, "mish"))
    deployed = check(net, x, ["norm", "mish"], steps=2.01)
    onnx_ops(deployed, x, tmp_path / "m.onnx")
    assert roles_of([nn.Linear(1, 1), nn.Mish()]) is None, "of the layer that was named alone"


@pytest.mark.usefixtures("own_rows")
def test_a_pattern_registered_again_takes_the_place_of_the_first() -> None:
    register_fusion((nn.Conv2d, Frozen), affine=lambda norm: (norm.get_buffer("scale") * 7, norm.get_buffer("shift")))
    register_fusion((nn.Conv2d, Frozen), affine=affine)
    assert len([row for row in USER_ROWS if row.norm is Frozen]) == 1
    check(One(nn.Conv2d(4, 8, 3), Frozen(8), nn.ReLU()), torch.randn(8, 4, 6, 6), ["norm", "act"])
    assert "Of your own: (Conv2d, Frozen)." in str(pattern_problem([nn.Conv2d(1, 1, 1), Swish()]))


WRONG_AFFINE: dict[str, tuple[Any, str]] = {
    "values": (
        lambda norm: (norm.scale * 1.1, norm.shift),
        "is not what it computes in eval mode: relative difference 0.1",
    ),
    "shapes": (lambda norm: (norm.scale[:3], norm.shift), r"gives shapes \[\(3,\), \(8,\)\]; 'layer' makes 8 channels"),
}


@pytest.mark.usefixtures("own_rows")
@pytest.mark.parametrize("case", WRONG_AFFINE)
def test_an_affine_function_is_held_against_the_norms_forward(case: str) -> None:
    function, message = WRONG_AFFINE[case]
    register_fusion((nn.Conv2d, Frozen), affine=function)
    net, x = One(nn.Conv2d(4, 8, 3), Frozen(8), nn.ReLU()), torch.randn(8, 4, 6, 6)
    with pytest.raises(ConfigError, match=f"the affine function of 'norm' {message}"):
        make_plan(net, [{"op_names": ["layer"], "fuse_names": [("layer", "norm")]}], example_input=x)
    (layer,) = make_plan(net, [{"op_names": ["layer"]}], example_input=x).layers
    assert layer.fused_with == ()
    assert "not fused further: the affine function of 'norm'" in str(layer.notes)


class Strict(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 8, "eight at a time"
        return super().forward(x)


@pytest.mark.usefixtures("own_rows")
def test_an_affine_function_of_a_norm_that_cannot_be_tried_is_not_believed() -> None:
    register_fusion((nn.Conv2d, Strict), affine=affine)
    net, x = One(nn.Conv2d(4, 8, 3), Strict(8), nn.ReLU()), torch.randn(8, 4, 6, 6)
    message = r"cannot be held against its forward, which fails on a tensor of shape \(2, 8, 3, 3\): eight at a time"
    with pytest.raises(ConfigError, match=message):
        make_plan(net, [{"op_names": ["layer"], "fuse_names": [("layer", "norm")]}], example_input=x)


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


HEADS = "Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear"
NOT_TWO_OR_THREE = "register_fusion: expected 2 or 3 types, such as (nn.Conv2d, nn.BatchNorm2d, nn.Mish), got "
GIVE = "stands where a norm does; give `affine`, a function from the module to (scale, shift)."
WRONG: dict[str, tuple[Any, str]] = {
    "one": ((nn.Conv2d,), f"{NOT_TWO_OR_THREE}{(nn.Conv2d,)!r}."),
    "a string": ("conv", f"{NOT_TWO_OR_THREE}'conv'."),
    "four": ((nn.Conv2d,) * 4, f"{NOT_TWO_OR_THREE}{(nn.Conv2d,) * 4!r}."),
    "no class": ((nn.Conv2d, F.mish), f"register_fusion: {F.mish!r} is no module class and no operator's name."),
    "an instance": (("x", 3), "register_fusion: 3 is no module class and no operator's name."),
    "no layer first": (
        (nn.ReLU, nn.Mish),
        f"register_fusion: a group begins with a weighted layer that keeps torch's forward ({HEADS}), not {nn.ReLU!r}.",
    ),
    "an operator first": (
        ("conv2d", nn.Mish),
        f"register_fusion: a group begins with a weighted layer that keeps torch's forward ({HEADS}), not 'conv2d'.",
    ),
    "a forward of its own": (
        (OwnConv, nn.Mish),
        f"register_fusion: a group begins with a weighted layer that keeps torch's forward ({HEADS}), not {OwnConv!r}.",
    ),
    "a norm without affine": (
        (nn.Conv2d, Frozen, nn.Mish),
        f"register_fusion: {Frozen!r} stands where a norm does; give `affine`, a function from the module to (scale, shift).",
    ),
    "a misspelt operator": ((nn.Conv2d, "mihs"), "register_fusion: torch has no function 'mihs'. Did you mean 'mish'?"),
    "no activation": (
        (nn.Conv2d, nn.BatchNorm2d, nn.Softmax),
        f"register_fusion: {nn.Softmax!r} does not work elementwise, so it cannot end a group; quantize it by itself.",
    ),
    "a norm of other dimensions": (
        (nn.Conv2d, nn.BatchNorm1d, nn.Mish),
        f"register_fusion: {nn.BatchNorm1d!r} {GIVE}",
    ),
}


@pytest.mark.usefixtures("own_rows")
@pytest.mark.parametrize(("types", "message"), WRONG.values(), ids=WRONG)
def test_patterns_that_cannot_be_registered(types: Any, message: str) -> None:
    before = list(USER_ROWS)
    with pytest.raises(ConfigError) as caught:
        register_fusion(types)
    assert str(caught.value) == message
    assert before == USER_ROWS


class Between(nn.Module):
    """A linear layer, ReLU, and a batch norm before the next layer; optionally one at the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.norm(F.relu(self.first(x))))
        return out


def test_a_batch_norm_before_a_layer_is_folded_unasked_where_grids_suit_all_its_channels() -> None:
    config = [{"op_types": ["Linear"]}]
    plan = make_plan(Between(), config, example_input=torch.randn(8, 4))
    assert [layer.fused_with for layer in plan.layers] == [("relu",), ("norm",)]
    unlike = Between()
    with torch.no_grad():
        unlike.norm.weight[0] = 20.0
    plan = make_plan(unlike, config, example_input=torch.randn(8, 4))
    assert [layer.fused_with for layer in plan.layers] == [("relu",), ()]
    assert (
        "not fused further: 'norm' scales its channels too unlike for one grid of each row of the weight; name the group to "
        "have it folded" in plan.layers[1].notes
    )
    named = [{"op_types": ["Linear"], "fuse_names": [("norm", "second")]}]
    assert make_plan(unlike, named, example_input=torch.randn(8, 4)).layers[1].norm_before == "norm"


def test_a_batch_norm_at_the_models_input_is_not_folded_unasked() -> None:
    """Raw features of unlike sizes on one grid would lose the small ones; batch norm makes them alike first."""
    net, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(8, 4)
    (layer,) = make_plan(net, [{"op_types": ["Linear"]}], example_input=x).layers
    assert layer.norm_before is None
    assert "'0' reads the model's input: folded, features of unlike sizes would share one grid" in str(layer.notes)
    (layer,) = make_plan(net, [{"op_types": ["Linear"], "fuse_names": [("0", "1")]}], example_input=x).layers
    assert layer.norm_before == "0"
