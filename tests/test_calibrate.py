# SPDX-License-Identifier: Apache-2.0
"""Owns what a few batches give without training: ranges of the eval model, biases without mean error, learned rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fusion import prepared
from torch import Tensor, nn
from toys import FUSED, Net, fingerprint, loader

from lightning_quant import ConfigError, convert_model, patterns, register_fusion, restore_model
from lightning_quant.calibrate import calibrate, correct_biases
from lightning_quant.fusion import FusedGroup
from lightning_quant.methods import WEIGHT_METHODS, FixedRounding
from lightning_quant.prepare import prepared_groups, quantizer_state, simulated
from lightning_quant.rounding import GAMMA, ZETA, _rectified, learn_rounding

BATCHES = [x for x, _ in loader(64)]
LOW_BITS = [{**FUSED[0], "quant_dtype": "int3", "target_names": ["weight"]}]


def net_with_statistics(bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> Net:
    """Batch norms that are neither new nor true for the data."""
    net = Net(activation, bias=bias)
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
    return net


def ready(net: nn.Module, config: list[dict[str, Any]] | None = None) -> nn.Module:
    return calibrate(prepared(net, FUSED if config is None else config, BATCHES[0]), BATCHES)


def group_of(net: nn.Module, name: str) -> FusedGroup:
    group = prepared_groups(net)[name][1]
    assert isinstance(group, FusedGroup)
    return group


# -- ranges -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["default", "minmax"])
def test_ranges_are_those_of_the_float_model_in_eval_mode(observer: str) -> None:
    net = net_with_statistics()
    lows: dict[str, list[float]] = {}
    highs: dict[str, list[float]] = {}
    with torch.no_grad():
        twin = copy.deepcopy(net).eval()
        for x in BATCHES:
            one = F.relu(twin.bn1(twin.conv1(x)))
            two = F.relu(twin.bn2(twin.conv2(one)))
            for key, value in {"conv1._input_": x, "conv1._output_": one, "conv2._output_": two}.items():
                lows.setdefault(key, []).append(float(value.min()))
                highs.setdefault(key, []).append(float(value.max()))
    low, high = (np.mean, np.mean) if observer == "default" else (np.min, np.max)
    ready(net, [{**FUSED[0], "target_settings": {t: {"observer": observer} for t in ("_input_", "_output_")}}])
    state = quantizer_state(net)
    for key, values in lows.items():
        floor = 0.0 if key != "conv1._input_" else low(values)
        np.testing.assert_allclose(state[key]["low"], floor, rtol=1e-5)
        np.testing.assert_allclose(state[key]["high"], high(highs[key]), rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_but_ranges_moves(training: bool) -> None:
    net = nn.Sequential(net_with_statistics(), nn.Dropout(0.5)).train(training)
    net[0].bn1.eval()  # type: ignore[union-attr]
    prepared(net, [{"op_types": ["Conv2d", "Linear"]}], BATCHES[0])
    before, noise = fingerprint(net), torch.get_rng_state()
    assert calibrate(net, BATCHES) is net
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(state["low"] is not None for state in quantizer_state(net).values())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_afterwards_eval_runs_what_is_deployed() -> None:
    net = ready(net_with_statistics()).eval()
    with torch.no_grad():
        deployed, found = convert_model(net)(BATCHES[0]), net(BATCHES[0])
        assert torch.equal(deployed, found)
        assert not torch.equal(found, restore_model(net)(BATCHES[0]))


def test_operators_and_wrapped_modules_are_calibrated() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gru = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.gru(self.a(x) + x)[0]
            return out

    batches = [torch.randn(2, 3, 4) for _ in range(3)]
    net = calibrate(prepared(Mixed().eval(), [{"op_types": ["Linear", "add", "GRU"]}], batches[0]), batches)
    with torch.no_grad():
        assert torch.equal(convert_model(net)(batches[0]), net(batches[0]))


def test_a_layer_that_is_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.tanh(self.fc(x)))
            return out

    net, x = Twice(), torch.randn(8, 4) * 5
    with torch.no_grad():
        expected = (float(x.max()) + float(torch.tanh(net.fc(x)).max())) / 2
    calibrate(prepared(net, [{"op_types": ["Linear"], "target_names": ["_input_", "weight"]}], x), [x])
    assert math.isclose(quantizer_state(net)["fc._input_"]["high"], expected, rel_tol=1e-6)


def test_calibrating_again_begins_anew_and_training_moves_on() -> None:
    net = ready(net_with_statistics())
    calibrate(net, [x * 10 for x in BATCHES])
    twin = calibrate(prepared(restore_model(copy.deepcopy(net)), FUSED, BATCHES[0]), [x * 10 for x in BATCHES])
    assert quantizer_state(net) == quantizer_state(twin)
    before = quantizer_state(net)["conv1._input_"]["high"]
    net.train()(BATCHES[0])
    after = quantizer_state(net)["conv1._input_"]["high"]
    assert math.isclose(after, before + 0.01 * (float(BATCHES[0].max()) - before), rel_tol=1e-6), "the momentum of training"


def test_a_wrong_batch_forgets_nothing() -> None:
    net = ready(net_with_statistics())
    state = quantizer_state(net)
    with pytest.raises(ConfigError, match=r"batch 0 does not fit Net\.forward"):
        calibrate(net, [(BATCHES[0], BATCHES[0])])
    assert quantizer_state(net) == state, "what is wrong with the first batch shows before anything is forgotten"


def test_batches_have_the_forms_of_example_inputs() -> None:
    states = []
    for wrap in (lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}, lambda x: ((), {"x": x})):
        torch.manual_seed(0)
        states.append(quantizer_state(calibrate(prepared(Net(), FUSED, BATCHES[0]), map(wrap, BATCHES), steps=2)))
    assert all(state == states[0] for state in states)
    torch.manual_seed(0)
    assert states[0] != quantizer_state(calibrate(prepared(Net(), FUSED, BATCHES[0]), BATCHES, steps=3))


TOOLS: list[Callable[..., Any]] = [calibrate, correct_biases, learn_rounding]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_wrong_calls_are_errors(tool: Callable[..., Any]) -> None:
    name = tool.__name__
    with pytest.raises(ConfigError, match=rf"{name}: Net is not prepared; call prepare_model\(model, plan\) first"):
        tool(Net(), BATCHES)
    net = prepared(Net(), FUSED, BATCHES[0])
    if tool is not calibrate:
        with pytest.raises(ConfigError, match=rf"{name}: no range is known for .*conv1\._input_.*call calibrate"):
            tool(net, BATCHES)
    calibrate(net, BATCHES)
    with pytest.raises(ConfigError, match=rf"{name}: steps=0 is no number of batches; give 1 or more, or None"):
        tool(net, BATCHES, steps=0)
    with pytest.raises(ConfigError, match=rf"{name}: `batches` is empty; a generator is used up after one pass"):
        tool(net, iter(()))
    with pytest.raises(ConfigError, match=rf"{name}: batch 0 does not fit Net.forward \(too many.*Leave labels out"):
        tool(net, loader(16))


@pytest.mark.parametrize("key", ["iterations", "batch_size", "lr", "strength"])
def test_wrong_options_of_learned_rounding_are_errors(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"learn_rounding: {key}=-1 is out of range"):
        learn_rounding(Net(), BATCHES, **{key: -1})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.side = nn.Linear(4, 4), nn.Linear(4, 4), True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) if self.side else self.b(x)
        return out


def test_what_no_batch_reaches_is_said() -> None:
    x = torch.randn(3, 4)
    net = Branching()
    prepared(net, [{"op_types": ["Linear"], "target_names": ["_input_", "weight"]}], x)
    net.side = False
    with pytest.warns(UserWarning, match=r"calibrate: no batch reached a\._input_; these layers stay float"):
        calibrate(net, [x])


# -- biases -----------------------------------------------------------------------------------------------------------------


def preactivations(net: Net, x: Tensor) -> dict[str, Tensor]:
    """What the weighted layers make (with batch norm), in float, in order."""
    one = net.bn1(net.conv1(x))
    two = net.bn2(net.conv2(F.relu(one)))
    return {"conv1": one, "conv2": two, "fc": net.fc(net.pool(F.relu(two)).flatten(1))}


@torch.no_grad()
def quantized_preactivations(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same of the quantized model: weights from a deployed copy's integers, inputs rounded by the equation."""

    def grid(name: str, value: Tensor) -> Tensor:
        low, high = (min(state[name]["low"], 0.0), max(state[name]["high"], 0.0))
        scale = np.float32((high - low) / 255)
        zero = round(-low / float(scale))
        y: Tensor = ((value / float(scale)).round() + zero).clamp(0, 255).sub(zero).mul(float(scale))
        return y

    def weight(layer: nn.Module) -> Tensor:
        w: Tensor = layer.get_parameter("weight").detach()
        scale = w.abs().flatten(1).amax(1).view(-1, *[1] * (w.dim() - 1)) / 127
        return (w / scale).round() * scale

    state, modules = quantizer_state(net), dict(net.named_modules())

    def norm(name: str, value: Tensor) -> Tensor:
        m = modules[name]
        assert isinstance(m, nn.BatchNorm2d)
        return F.batch_norm(value, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)

    conv1, conv2, fc = modules["conv1"], modules["conv2"], modules["fc"]
    y = grid("conv1._input_", x)
    one = norm("bn1", F.conv2d(y, weight(conv1), conv1.get_parameter("bias"), padding=1))
    two = norm("bn2", F.conv2d(grid("conv1._output_", F.relu(one)), weight(conv2), conv2.get_parameter("bias"), padding=1))
    three = F.linear(F.max_pool2d(grid("conv2._output_", F.relu(two)), 2).flatten(1), weight(fc), fc.get_parameter("bias"))
    return {"conv1": one, "conv2": two, "fc": three}


def channel_means(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        key: torch.cat([one[key] for one in values]).double().transpose(0, 1).flatten(1).mean(1)
        for key in ("conv1", "conv2", "fc")
    }


def test_no_mean_error_is_left() -> None:
    net = net_with_statistics()
    twin = copy.deepcopy(net).eval()
    with torch.no_grad():
        expected = channel_means([preactivations(twin, x) for x in BATCHES])
    ready(net)
    before = channel_means([quantized_preactivations(net, x) for x in BATCHES])
    report = correct_biases(net, BATCHES)
    after = channel_means([quantized_preactivations(net, x) for x in BATCHES])
    assert list(report.shifts) == ["conv1", "conv2", "fc"]
    for key, mean in expected.items():
        error, rest = (before[key] - mean).abs().max(), (after[key] - mean).abs().max()
        assert error > 1e-4, "there was something to correct"
        assert rest < 0.02 * error, key
    first = float((before["conv1"] - expected["conv1"]).abs().max())
    assert math.isclose(report.shifts["conv1"], first, rel_tol=1e-3)
    with torch.no_grad():
        assert torch.equal(convert_model(net.eval())(BATCHES[0]), net(BATCHES[0]))


def test_only_biases_move() -> None:
    net = ready(net_with_statistics(bias=False))
    before = copy.deepcopy(net.state_dict())
    ranges = quantizer_state(net)
    correct_biases(net, BATCHES)
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"bn1.bias", "bn2.bias", "fc.bias"}
    assert quantizer_state(net) == ranges
    assert net.training


def left_nets() -> dict[str, tuple[nn.Module, str, str]]:
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    shared[2].bias = shared[0].bias
    return {
        "no bias": (nn.Sequential(nn.Linear(4, 4, bias=False)), "0", "it has no bias and no batch norm"),
        "plain norm": (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)),
            "0",
            "its batch norm has no bias (affine=False)",
        ),
        "shared": (shared, "0", "its bias is shared with another module"),
        "own forward": (
            nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)),
            "0",
            "it is quantized around its own forward, of which",
        ),
    }


@pytest.mark.parametrize("name", left_nets())
def test_biases_that_cannot_be_corrected_are_left(name: str) -> None:
    net, layer, reason = left_nets()[name]
    x = torch.randint(0, 4, (3, 2)) if name == "own forward" else torch.randn(5, 4)
    report = correct_biases(
        calibrate(
            prepared(net, [{"op_types": sorted({type(m).__name__ for m in net.children()} & {"Linear", "Embedding"})}], x), [x]
        ),
        [x],
    )
    assert report.left[layer].startswith(reason)
    assert f"left as it is: {layer}: {reason}" in str(report)


class Scaled(nn.Module):
    """A norm of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def test_norms_of_the_users_own_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "USER_ROWS", [])
    register_fusion((nn.Linear, Scaled), affine=lambda norm: (norm.scale, norm.shift))  # type: ignore[arg-type,return-value]
    x = torch.randn(5, 4)
    net = calibrate(prepared(nn.Sequential(nn.Linear(4, 4), Scaled()), [{"op_types": ["Linear"]}], x), [x])
    assert correct_biases(net, [x]).left == {"0": "the norm behind it is no batch norm, whose bias would be known"}


def test_unreached_layers_are_left() -> None:
    x = torch.randn(3, 4)
    net = Branching()
    prepared(net, [{"op_types": ["Linear"], "target_names": ["weight"]}], x)
    assert "b" not in correct_biases(net, [x]).shifts
    net.side = False
    assert correct_biases(net, [x]).left["a"] == "no batch reached it"
    assert learn_rounding(net, [x], iterations=1).left["a"] == "no batch reached it"


# -- learned rounding -------------------------------------------------------------------------------------------------------


def test_the_rectified_sigmoid_is_the_papers() -> None:
    v = torch.linspace(-6, 6, 41, dtype=torch.float64)
    expected = np.clip(1 / (1 + np.exp(-v.numpy())) * (1.1 - -0.1) + -0.1, 0, 1)
    np.testing.assert_allclose(_rectified(v).numpy(), expected, rtol=1e-12)
    assert (ZETA, GAMMA) == (1.1, -0.1)


@pytest.mark.parametrize("granularity", ["out_channel", "per_tensor"])
def test_learned_rounding_is_better_than_nearest(granularity: str) -> None:
    """The error of a layer, by a reference in plain torch. Where the inputs' mean is not zero, errors of one sign add up."""
    net = net_with_statistics()
    twin = copy.deepcopy(net).eval()
    batches = [x * 0.3 + 1 for x in BATCHES]
    calibrate(prepared(net, [{**LOW_BITS[0], "granularity": granularity}], batches[0]), batches)
    weights = copy.deepcopy(net.state_dict())
    report = learn_rounding(net, batches, iterations=120, lr=0.05)
    assert list(report.layers) == ["conv1", "conv2", "fc"]
    assert not report.left
    x = torch.cat(batches)
    with torch.no_grad():
        norm = twin.bn1
        assert norm.running_var is not None
        k = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
        w = twin.conv1.weight * k if granularity == "per_tensor" else twin.conv1.weight
        scale = w.abs().max() / 3 if granularity == "per_tensor" else w.abs().flatten(1).amax(1).view(-1, 1, 1, 1) / 3
        fixed = group_of(net, "conv1").weight
        assert isinstance(fixed, FixedRounding)
        q = fixed.q.float() * (k.sign() if granularity == "per_tensor" else 1)  # k's sign is folded later
        assert bool(((w / scale - q).abs() < 1 + 1e-4).all()), "floor or ceil"
        assert q.abs().max() <= 3

        @torch.no_grad()
        def error(integers: Tensor) -> float:
            value = integers * scale / (k if granularity == "per_tensor" else 1)
            made = F.relu(twin.bn1(F.conv2d(x, value, twin.conv1.bias, padding=1)))
            return float((made - F.relu(twin.bn1(twin.conv1(x)))).square().mean())

        nearest = (w / scale).round()
    found = report.layers["conv1"]
    assert math.isclose(found.nearest, error(nearest), rel_tol=1e-3)
    assert math.isclose(found.learned, error(q), rel_tol=1e-3)
    assert found.learned < 0.9 * found.nearest
    assert math.isclose(found.turned, float((q != nearest).double().mean()), rel_tol=1e-6)
    assert all(one.learned <= one.nearest for one in report.layers.values())
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items()), "the weights themselves stay"
    with torch.no_grad():
        net.eval()
        assert torch.equal(convert_model(net)(x), net(x))
        integers = net(x)
        with simulated(net):
            assert torch.allclose(net(x), integers, atol=1e-4)


CASES: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, groups=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "norm before": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)),
    "curve": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3, groups=2)),
    "dead channel": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("granularity", ["out_channel", "per_tensor"])
@pytest.mark.parametrize("name", CASES)
def test_other_groups_learn_and_deploy(name: str, granularity: str) -> None:
    net = CASES[name]()
    if name == "dead channel":
        with torch.no_grad():
            net.get_parameter("1.weight")[0] = 0
    types = {type(m).__name__ for m in net if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}  # type: ignore[attr-defined]
    weight = {"quant_dtype": "int4", "granularity": granularity}
    entry = {"op_types": sorted(types), "target_settings": {"weight": weight}}
    batches = [x * 0.3 + 1 for x in BATCHES[:2]]
    calibrate(prepared(net, [entry], batches[0]), batches)
    report = learn_rounding(net, batches, iterations=60, lr=0.1)
    assert all(one.learned <= one.nearest for one in report.layers.values())
    assert any(one.turned for one in report.layers.values())
    with torch.no_grad():
        net.eval()
        out = net(batches[0])
        assert bool(torch.isfinite(out).all())
        assert torch.equal(convert_model(net)(batches[0]), out)


@pytest.mark.parametrize(
    "keys",
    [{}, {"granularity": "per_tensor"}, {"quant_dtype": "uint8", "quant_scheme": "affine"}, {"method": "lsq"}],
    ids=str,
)
def test_masked_weights_stay_zero(keys: dict[str, Any]) -> None:
    """2 of 4 of them are 0, and rounding is learned for the others, behind a batch norm too."""
    torch.manual_seed(1)
    net: nn.Module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    batches = [torch.randn(8, 4, 7, 7) * 0.5 + 1 for _ in range(2)]
    with torch.no_grad():
        for weight in (net.get_parameter("0.weight"), net.get_parameter("3.weight")):
            weight.view(-1, 4)[:, ::2] = 0
    entry = {"op_types": ["Conv2d"], "target_settings": {"weight": keys}}
    calibrate(prepared(net, [entry], batches[0]), batches)
    report = learn_rounding(net, batches, iterations=150, lr=0.05, strength=1)
    assert any(one.turned for one in report.layers.values()) and set(report.layers) == {"0", "3"}
    for name in report.layers:
        fixed = group_of(net, name).weight
        assert isinstance(fixed, FixedRounding)
        zero = 0 if fixed.fixed.zero_point is None else fixed.fixed.zero_point
        gone = net.get_parameter(f"{name}.weight") == 0
        assert int(gone.sum()) == gone.numel() // 2 and not (fixed.q - zero)[gone].any()
    deployed: Any = convert_model(net.eval())
    with torch.no_grad():
        assert torch.equal(deployed(batches[0]), net(batches[0]))


def test_a_grid_with_a_zero_point() -> None:
    net: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    x = torch.randn(40, 6)
    weight = {"weight": {"quant_dtype": "uint3", "quant_scheme": "affine"}}
    calibrate(prepared(net, [{"op_types": ["Linear"], "target_settings": weight}], x), [x])
    report = learn_rounding(net, [x], iterations=100, lr=0.05)
    fixed = group_of(net, "0").weight
    assert isinstance(fixed, FixedRounding)
    assert fixed.q.min() >= 0
    assert fixed.q.max() <= 7
    assert report.layers["0"].learned < report.layers["0"].nearest
    with torch.no_grad():
        assert torch.equal(convert_model(net.eval())(x), net(x))


def test_the_rounding_holds_for_its_weight_alone() -> None:
    net = ready(net_with_statistics(), LOW_BITS)
    learn_rounding(net, BATCHES, iterations=20)
    conv = net.get_submodule("conv1")
    weight = conv.get_parameter("weight")
    out = net.train()(BATCHES[0])
    out.sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.abs().sum() > 0), "the gradient passes"
    with torch.no_grad():
        weight.add_(10)
    message = r"conv1\.weight: .* of 216 values are a step or more away .*Call learn_rounding again"
    with pytest.raises(ConfigError, match=message):
        net(BATCHES[0])
    with pytest.raises(ConfigError, match=message):
        convert_model(net)
    learn_rounding(net, BATCHES, iterations=1)
    convert_model(net)
    restore_model(net)(BATCHES[0])


def test_the_rounding_can_be_saved() -> None:
    net = ready(net_with_statistics(), LOW_BITS)
    learn_rounding(net, BATCHES, iterations=50, lr=0.05)
    fixed = group_of(net, "conv1").weight
    assert isinstance(fixed, FixedRounding)
    state = fixed.state_dict()
    assert state["q"].dtype == torch.int8
    assert state["q"].shape == net.get_parameter("conv1.weight").shape
    twin = FixedRounding(fixed.before, fixed.fixed, torch.zeros_like(fixed.q))
    assert twin.accepts(state)
    assert not twin.accepts({**state, "q": state["q"][:1]})
    assert not twin.accepts({"q": state["q"]})
    twin.load_state_dict(state)
    weight = net.get_parameter("conv1.weight")
    assert torch.equal(twin.rounded(weight), fixed.rounded(weight))


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_methods_with_grids_of_their_own(method: str) -> None:
    """A learned scale is kept; a grid for another tensor than the weight is left."""
    x, net = torch.randn(64, 6) + 1, nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    weight = {"weight": {"quant_dtype": "int3"}}
    calibrate(prepared(net, [{"op_types": ["Linear"], "target_settings": weight}], x), [x])
    group = group_of(net, "0")
    assert group.weight is not None
    spec = replace(group.weight.spec, method=method)
    group.weight = WEIGHT_METHODS[method](spec, "0.weight", net.get_parameter("0.weight"))
    report = learn_rounding(net, [x], iterations=100, lr=0.05)
    if method == "dorefa":
        assert report.left == {"0": "method 'dorefa' rounds another tensor than the weight"}
        return
    assert report.layers["0"].learned < report.layers["0"].nearest
    with torch.no_grad():
        assert torch.equal(convert_model(net.eval())(x), net(x))


def test_a_forward_that_calls_more_or_less_often_is_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.times = nn.Linear(4, 4), 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.fc(x)
            self.times += 1
            return x

    x = torch.randn(3, 4)
    net = calibrate(prepared(Odd(), [{"op_types": ["Linear"], "target_names": ["weight"]}], x), [x])
    found = learn_rounding(net, [x], iterations=1).left["fc"]
    assert found == "the quantized model calls it 5 times, the float one 4 times"


def test_layers_that_round_something_else_are_left() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 2, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.up(x, [17])
            return out

    x = torch.randn(3, 2, 8)
    report = learn_rounding(calibrate(prepared(Sized(), [{"op_types": ["ConvTranspose1d"]}], x), [x]), [x], iterations=1)
    assert report.left["up"] == "it is called with more than one positional tensor"
    assert str(report) == "left as it is: up: it is called with more than one positional tensor"
    ids = torch.randint(0, 4, (3, 2))
    net = calibrate(prepared(nn.Sequential(nn.Embedding(4, 4)), [{"op_types": ["Embedding"]}], ids), [ids])
    assert learn_rounding(net, [ids], iterations=1).left["0"].startswith("it is quantized around its own forward")
