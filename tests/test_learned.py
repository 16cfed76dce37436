# SPDX-License-Identifier: Apache-2.0
"""Owns the methods that learn or fix a grid: their numbers and gradients against the papers' formulas, and real training.

The reference is written from the papers, value by value in float64, without our code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from toys import Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, export_model, load_deployed, make_plan, prepare_model
from lightning_quant.config import TensorSpec
from lightning_quant.learned import LsqActivation, LsqPlusActivation, PactActivation
from lightning_quant.methods import BinaryWeight, DorefaWeight, LsqPlusWeight, LsqWeight
from lightning_quant.prepare import (
    learned_parameters,
    load_quantizer_state,
    prepared_groups,
    quantizer_state,
    quantizers_of,
    restore_model,
)
from lightning_quant.quantizers import Grid

TrainerMaker = Callable[..., Trainer]
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
METHODS = ["lsq", "lsq+", "pact", "dorefa"]


def spec(dtype: str, method: str, *, weight: bool = False, granularity: str = "per_tensor", scheme: str = "") -> TensorSpec:
    return TensorSpec.make(dtype, scheme or ("symmetric" if weight else "affine"), granularity, weight=weight, method=method)


# -- formulas, in float64, one value after the other -----------------------------------------------------------------------


def half_even(value: float) -> float:
    return float(round(value))


def lsq(
    x: list[float], g: list[float], s: float, low: float, high: float, factor: float
) -> tuple[list[float], list[float], float]:
    """Esser et al. 2020, equations 1 to 3 and 5: (values, gradients of x, gradient of s)."""
    values, by_x, by_s = [], [], 0.0
    for one, upstream in zip(x, g, strict=True):
        v = one / s
        values.append(half_even(min(max(v, low), high)) * s)
        inside = low < v < high
        by_x.append(upstream if inside else 0.0)
        by_s += upstream * (half_even(v) - v if inside else (low if v <= low else high))
    return values, by_x, by_s * factor


POINTS = [-9.0, -4.03, -4.0, -3.9, -1.26, -0.7, -0.1, 0.0, 0.1, 0.3, 0.9, 1.74, 2.3, 3.49, 3.51, 3.7, 4.2, 7.6, 30.0]
UPSTREAM = [0.7, -1.1, 0.4, 2.0, -0.3, 1.2, 0.5, -2.0, 0.9, 1.4, -0.6, 0.8, -1.7, 0.2, 1.1, -0.9, 0.35, 1.3, -0.45]


def points() -> tuple[Tensor, Tensor]:
    """One example of 19 features, and the gradient that arrives."""
    return torch.tensor([POINTS], dtype=torch.float64).requires_grad_(), torch.tensor([UPSTREAM], dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_of_an_activation(bits: int, signed: bool) -> None:
    x, upstream = points()
    quantizer = LsqActivation(spec(f"int{bits}" if signed else f"uint{bits}", "lsq", scheme="symmetric" if signed else ""), "x")
    quantizer.load_state_dict({"scale": 0.5, "zero_point": 0})
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -high if signed else 0
    values, by_x, by_s = lsq(POINTS, UPSTREAM, 0.5, low, high, 1 / math.sqrt(19 * high))
    before = upstream.clone()
    y = quantizer(x)
    y.backward(upstream)
    assert torch.equal(upstream, before), "the caller's gradient is not written to"
    torch.testing.assert_close(y.detach(), torch.tensor([values], dtype=torch.float64), rtol=0, atol=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([by_x], dtype=torch.float64), rtol=0, atol=1e-6)
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(by_s, rel=1e-6, abs=1e-6)


def test_lsq_behind_a_relu_is_lsq_of_the_relu() -> None:
    x, upstream = points()
    quantizer = LsqActivation(spec("uint4", "lsq"), "x", rectified=True)
    quantizer.observe(x)
    mean = sum(max(one, 0.0) for one in POINTS) / len(POINTS)
    start = 2 * mean / math.sqrt(15)
    assert quantizer.scale.item() == pytest.approx(start, rel=1e-6)
    assert quantizer.zero_point == 0
    values, by_x, by_s = lsq(POINTS, UPSTREAM, quantizer.scale.item(), 0, 15, 1 / math.sqrt(19 * 15))
    y = quantizer(x)
    y.backward(upstream)
    torch.testing.assert_close(y.detach(), torch.tensor([values], dtype=torch.float64), rtol=0, atol=1e-6)
    assert x.grad is not None and quantizer.scale.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([by_x], dtype=torch.float64), rtol=0, atol=1e-6)
    assert quantizer.scale.grad.item() == pytest.approx(by_s, rel=1e-5)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [-1.0, 1.0, 2.0]], ids=["none below zero", "some below zero"])
def test_lsq_starts_signed_where_the_first_batch_is(values: list[float]) -> None:
    quantizer = LsqActivation(spec("uint8", "lsq"), "x")
    before = quantizer.ready
    quantizer.observe(torch.tensor([values]))
    zero = 128 if min(values) < 0 else 0
    assert (before, quantizer.ready) == (False, True)
    assert quantizer.zero_point == zero
    assert quantizer.scale.item() == pytest.approx(2 * sum(map(abs, values)) / 3 / math.sqrt(255 - zero), rel=1e-6)
    quantizer.observe(torch.tensor([values]) * 100)
    assert quantizer.scale.item() < 1, "no later batch moves it"


@pytest.mark.parametrize("offset", [-2.1, -0.4, 0.0])
def test_lsq_plus_of_an_activation(offset: float) -> None:
    """Bhalgat et al. 2020, equations 1, 5 and 6, with the zero point that a runtime can have, round(-beta / s)."""
    x, upstream = points()
    quantizer = LsqPlusActivation(spec("uint4", "lsq+"), "x")
    s = 0.4
    zero = min(max(round(-offset / s), 0), 15)
    quantizer.load_state_dict({"scale": s, "offset": offset, "zero_point": zero})
    factor = 1 / math.sqrt(19 * 15)
    values, by_x, by_s = lsq(POINTS, UPSTREAM, float(torch.tensor(s)), -zero, 15 - zero, factor)
    by_offset = sum(g for g, passed in zip(UPSTREAM, by_x, strict=True) if not passed) * factor
    y = quantizer(x)
    y.backward(upstream)
    torch.testing.assert_close(y.detach(), torch.tensor([values], dtype=torch.float64), rtol=0, atol=1e-6)
    assert x.grad is not None and quantizer.scale.grad is not None and quantizer.offset.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([by_x], dtype=torch.float64), rtol=0, atol=1e-6)
    assert quantizer.scale.grad.item() == pytest.approx(by_s, rel=1e-5)
    assert quantizer.offset.grad.item() == pytest.approx(by_offset, rel=1e-5)


def test_lsq_plus_deploys_the_zero_point_that_the_last_step_left() -> None:
    quantizer = LsqPlusActivation(spec("uint8", "lsq+"), "x")
    quantizer.observe(torch.tensor([[-1.0, 0.5, 4.1]]))
    with torch.no_grad():
        quantizer.offset.fill_(-2.0)
    grid = quantizer.grid()
    assert isinstance(grid, Grid)
    assert grid.zero_point == round(2.0 / (5.1 / 255))


def test_lsq_plus_starts_from_the_ends_of_the_first_batch() -> None:
    quantizer = LsqPlusActivation(spec("uint8", "lsq+"), "x")
    quantizer.observe(torch.tensor([[-1.0, 0.5, 4.1]]))
    assert quantizer.scale.item() == pytest.approx(5.1 / 255, rel=1e-6)
    assert quantizer.zero_point == 50
    assert quantizer.offset.item() == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_pact(signed: bool) -> None:
    """Choi et al. 2018, equations 1 to 3: y = clip(x, 0, a), rounded on a / (2^k - 1); dy/da is 1 from a on."""
    x, upstream = points()
    quantizer = PactActivation(spec("int4" if signed else "uint4", "pact", scheme="symmetric" if signed else ""), "x")
    quantizer.load_state_dict({"alpha": 3.7, "zero_point": 0})
    alpha = float(torch.tensor(3.7))
    steps = 7 if signed else 15
    bottom = -alpha if signed else 0.0
    values = [half_even(min(max(one, bottom), alpha) / (alpha / steps)) * alpha / steps for one in POINTS]
    by_x = [g if bottom < one < alpha else 0.0 for one, g in zip(POINTS, UPSTREAM, strict=True)]
    by_alpha = sum(g for one, g in zip(POINTS, UPSTREAM, strict=True) if one >= alpha)
    by_alpha -= sum(g for one, g in zip(POINTS, UPSTREAM, strict=True) if signed and one <= -alpha)
    y = quantizer(x)
    y.backward(upstream)
    torch.testing.assert_close(y.detach(), torch.tensor([values], dtype=torch.float64), rtol=0, atol=1e-6)
    assert x.grad is not None and quantizer.alpha.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([by_x], dtype=torch.float64), rtol=0, atol=1e-6)
    assert quantizer.alpha.grad.item() == pytest.approx(by_alpha, rel=1e-6)


class Residual(nn.Module):
    """A convolution whose output is added to, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.inplace = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), inplace

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        if not self.inplace:
            return (out + x).relu()
        out += x
        return out.relu_()


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact"])
def test_what_a_quantizer_gave_may_be_overwritten(method: str) -> None:
    found: list[dict[str, Tensor]] = []
    for inplace in (False, True):
        model = Residual(inplace)
        prepare_model(model, make_plan(model, [{"op_types": ["Conv2d"], "method": method}], example_input=X)).train()
        model(X).square().sum().backward()
        learned = {name: one.grad for name, one in learned_parameters(model).items()}
        found.append({k: g for k, g in {**learned, "weight": model.conv.weight.grad}.items() if g is not None})
    assert len(found[0]) >= 3
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_a_batch_with_nan_is_no_beginning() -> None:
    quantizer = LsqActivation(spec("uint8", "lsq"), "conv._output_")
    with pytest.warns(UserWarning, match="conv._output_: a batch holds NaN or infinity"):
        quantizer.observe(torch.tensor([[1.0, math.nan]]))
    states = [quantizer.ready]
    quantizer.observe(torch.tensor([[1.0, 2.0]]))
    assert [*states, quantizer.ready] == [False, True]


@pytest.mark.parametrize("kind", [LsqActivation, LsqPlusActivation, PactActivation])
def test_a_batch_of_zeros_is_no_beginning(kind: type[LsqActivation | LsqPlusActivation | PactActivation]) -> None:
    """Neither sign nor size of what a batch norm of weight 0 will make is known; without levels below 0 it would be stuck."""
    method = {LsqActivation: "lsq", LsqPlusActivation: "lsq+", PactActivation: "pact"}[kind]
    quantizer = kind(spec("uint8", method), "x")
    quantizer.observe(torch.zeros(2, 3))
    states = [quantizer.ready]
    quantizer.observe(torch.tensor([[-0.001, 0.0, 0.002]]))
    x = torch.zeros(1, 3, requires_grad=True)
    quantizer(x).sum().backward()
    assert [*states, quantizer.ready] == [False, True]
    assert quantizer.zero_point > 0
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 1.0]]


# -- weights ------------------------------------------------------------------------------------------------------------

W = torch.tensor([POINTS[:9], POINTS[9:18]], dtype=torch.float64)
G = torch.tensor([UPSTREAM[:9], UPSTREAM[9:18]], dtype=torch.float64)


@pytest.mark.parametrize("granularity", ["per_tensor", "out_channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_of_a_weight(bits: int, granularity: str) -> None:
    weight = nn.Parameter(W.clone())
    quantizer = LsqWeight(spec(f"int{bits}", "lsq", weight=True, granularity=granularity), "w", weight)
    high = 2 ** (bits - 1) - 1
    rows = [W.flatten().tolist()] if granularity == "per_tensor" else W.tolist()
    upstream = [G.flatten().tolist()] if granularity == "per_tensor" else G.tolist()
    starts = [2 * sum(map(abs, row)) / len(row) / math.sqrt(high) for row in rows]
    assert quantizer.scale.flatten().tolist() == pytest.approx(starts, rel=1e-6)
    with torch.no_grad():
        quantizer.scale.mul_(0.6)
    y = quantizer.rounded(weight)
    y.backward(G)
    scales = quantizer.scale.flatten().tolist()
    found = [lsq(r, u, s, -high, high, 1 / math.sqrt(len(r) * high)) for r, u, s in zip(rows, upstream, scales, strict=True)]
    expected = torch.tensor([value for values, *_ in found for value in values], dtype=torch.float64)
    torch.testing.assert_close(y.detach().flatten(), expected, rtol=0, atol=1e-6)
    assert weight.grad is not None and quantizer.scale.grad is not None
    by_x = torch.tensor([value for _, values, _ in found for value in values], dtype=torch.float64)
    torch.testing.assert_close(weight.grad.flatten(), by_x, rtol=0, atol=1e-6)
    assert quantizer.scale.grad.flatten().tolist() == pytest.approx([by_s for *_, by_s in found], rel=1e-5, abs=1e-6)


def test_lsq_plus_of_a_weight_starts_from_its_spread() -> None:
    quantizer = LsqPlusWeight(spec("int4", "lsq+", weight=True, granularity="out_channel"), "w", W)
    rows = [(row.mean().item(), row.std(unbiased=False).item()) for row in W]
    expected = [max(abs(m - 3 * d), abs(m + 3 * d)) / 8 for m, d in rows]
    assert quantizer.scale.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_dorefa_of_a_weight() -> None:
    """Zhou et al. 2016, equation 9, on a grid with a zero; differentiated by hand, the maximum's own path included."""
    weight = nn.Parameter(W.clone())
    quantizer = DorefaWeight(spec("int4", "dorefa", weight=True), "w", weight)
    y = quantizer.rounded(weight)
    y.backward(G)
    bent = [math.tanh(one) for one in W.flatten().tolist()]
    top = max(map(abs, bent))
    where = max(range(len(bent)), key=lambda i: abs(bent[i]))
    assert y.detach().flatten().tolist() == pytest.approx([half_even(one / top * 7) / 7 for one in bent], abs=1e-6)
    g = G.flatten().tolist()
    by_bent = [one / top for one in g]
    by_bent[where] -= math.copysign(1, bent[where]) * sum(a * b for a, b in zip(g, bent, strict=True)) / top**2
    expected = [one * (1 - b * b) for one, b in zip(by_bent, bent, strict=True)]
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_the_sign_of_a_weight() -> None:
    weight = nn.Parameter(torch.tensor([[-3.0, -0.2, 0.0, 0.7, 1.5]]))
    quantizer = BinaryWeight(spec("int2", "bnn", weight=True), "w", weight)
    y = quantizer.rounded(weight)
    assert y.tolist() == [[-1, -1, 1, 1, 1]]
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    y.backward(upstream)
    assert weight.grad is not None
    assert weight.grad.tolist() == upstream.tolist()
    assert weight.tolist() == [[-1.0, pytest.approx(-0.2), 0.0, pytest.approx(0.7), 1.0]]


# -- in a model ---------------------------------------------------------------------------------------------------------


def trained(method: str, bits: int = 4, **keys: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    entry = {
        "op_types": ["Conv2d", "Linear"],
        "method": method,
        "target_settings": {name: {"quant_dtype": f"uint{bits}"} for name in ("_input_", "_output_")},
        **keys,
    }
    entry["target_settings"]["weight"] = {"quant_dtype": f"int{bits}"}
    prepare_model(model, make_plan(model, [entry], example_input=X)).train()
    with torch.no_grad():
        model(X)
    optimizer = torch.optim.SGD([*model.parameters(), *learned_parameters(model).values()], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(X)
    return y


@pytest.mark.parametrize("granularity", ["default", "per_tensor"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_validated_is_what_ships(method: str, granularity: str, tmp_path: Path) -> None:
    model = trained(method, granularity=granularity)
    expected = evaluated(model)
    deployed = convert_model(model)
    assert torch.equal(evaluated(deployed), expected)
    levels = {name: m.weight.unique().numel() for name, m in deployed.named_modules() if getattr(m, "weight", None) is not None}
    assert set(levels) == {"conv1", "conv2", "fc"}
    assert all(2 < count <= 15 for count in levels.values()), "4 bits"
    export_model(deployed, tmp_path / "net.pt2", example_input=X)
    assert torch.equal(load_deployed(tmp_path / "net.pt2")(X), expected)
    pytest.importorskip("onnx")
    export_model(deployed, tmp_path / "net.onnx", example_input=X)  # compared with onnxruntime there
    restore_model(model)
    assert type(model.conv1) is nn.Conv2d


@pytest.mark.parametrize("method", METHODS)
def test_deployed_is_near_what_training_computes(method: str) -> None:
    model = trained(method, bits=8)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        simulated: Tensor = model(X)
        found = evaluated(model)
    grid = quantizers_of(model)["fc._output_"].grid()
    assert isinstance(grid, Grid)
    steps = ((found - simulated) / grid.scale).abs()  # batch statistics against their unbiased variance: a level may tip
    assert steps.max() <= 8
    assert steps.mean() < 0.5


def test_learned_numbers_and_their_names() -> None:
    model = trained("lsq+")
    activations = ["conv1._input_.scale", "conv1._input_.offset", "conv1._output_.scale", "conv2._output_.scale"]
    activations += ["fc._output_.scale", "fc._output_.offset"]
    assert set(learned_parameters(model)) == {*activations, "conv1.weight.scale", "conv2.weight.scale", "fc.weight.scale"}
    assert not {id(p) for p in learned_parameters(model).values()} & {id(p) for p in model.parameters()}
    assert list(model.state_dict()) == list(Net().state_dict())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned_parameters(model).values())


@pytest.mark.parametrize("target", ["weight", "_input_", None])
def test_one_bit_needs_no_other_key(target: str | None, quiet_trainer: TrainerMaker) -> None:
    """`method: bnn` says int1 by itself, in an entry or for one target, and a trained net ships."""
    keys: dict[str, Any] = {"method": "bnn"} if target is None else {"target_settings": {target: {"method": "bnn"}}}
    entries: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"]}, {"op_names": ["conv2"], **keys}]
    model = Lit()
    callback = QuantFusionCallback(entries, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback.plan is not None and callback.deployed_model is not None
    specs = {name: one.spec for name, one in next(x for x in callback.plan.layers if x.name == "conv2").targets.items()}
    chosen = set(specs) if target is None else {target}
    assert {name for name, one in specs.items() if (one.dtype, one.scheme) == ("int1", "symmetric")} == chosen
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))
    if target != "_input_":
        weight = callback.deployed_model.get_submodule("conv2").get_buffer("weight")
        assert set(weight.flatten().tolist()) == {-1, 1}


def test_a_copy_learns_by_itself() -> None:
    model = trained("lsq")
    twin = copy.deepcopy(model)
    assert same(quantizer_state(twin), quantizer_state(model))
    with torch.no_grad():
        for parameter in learned_parameters(twin).values():
            parameter.mul_(2)
    assert not same(quantizer_state(twin), quantizer_state(model))


class Twice(nn.Module):
    """One layer that runs twice in a forward, on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + self.fc(2 * x)
        return y


@pytest.mark.parametrize("method", [*METHODS, "bnn"])
def test_a_layer_that_runs_twice(method: str) -> None:
    """Its gradients are the sums over both runs, as those of two layers with the same numbers."""
    x = torch.randn(4, 6)
    config = [{"op_types": ["Linear"], "method": method, "high_precision_output": False}]
    net = Twice()
    prepare_model(net, make_plan(net, config, example_input=x)).train()(x)
    twin = copy.deepcopy(net)
    net(x).sum().backward()
    for part in (x, 2 * x):
        twin.fc(part).sum().backward()
    pairs = zip(
        [*net.parameters(), *learned_parameters(net).values()],
        [*twin.parameters(), *learned_parameters(twin).values()],
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_scale_past_zero_is_positive_again() -> None:
    model = trained("lsq")
    with torch.no_grad():
        for parameter in learned_parameters(model).values():
            parameter.fill_(-1.0)
        assert model.train()(X).isfinite().all()
    assert all((parameter > 0).all() for parameter in learned_parameters(model).values())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


# -- with a Trainer -----------------------------------------------------------------------------------------------------


class Grouped(Lit):
    """A head with another learning rate; biases and norms without weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = dict(self.named_parameters())
        head = [p for name, p in named.items() if name.startswith("fc")]
        plain = [p for name, p in named.items() if not name.startswith("fc") and p.dim() == 1]
        rest = [p for name, p in named.items() if not name.startswith("fc") and p.dim() > 1]
        groups: list[dict[str, Any]] = [
            {"params": rest, "weight_decay": 1e-2},
            {"params": plain, "weight_decay": 0.0},
            {"params": head, "lr": 0.5, "weight_decay": 1e-2},
        ]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


class Sees(QuantFusionCallback):
    """Remembers which parameter group holds what is learned."""

    found: dict[str, int]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        groups = trainer.optimizers[0].param_groups
        learned = learned_parameters(pl_module).items()
        self.found = {n: [any(p is q for q in g["params"]) for g in groups].index(True) for n, p in learned}


@pytest.mark.parametrize(("method", "own"), [("lsq", 1), ("pact", 0)])
def test_what_is_learned_joins_a_group_of_its_layer(method: str, own: int, quiet_trainer: TrainerMaker) -> None:
    model, callback = Grouped(), Sees([{"op_types": ["Conv2d", "Linear"], "method": method}], verbose=0)
    before = sum(1 for _ in model.parameters())
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(model, loader(), loader(seed=1))
    assert callback.found
    for name, group in callback.found.items():
        assert group == (2 if name.startswith("fc") else own), name
    after = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert after == before + len(callback.found), "they stay, so that a checkpoint that is saved now can be resumed"
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(callback.deployed_model), evaluated(model))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["lsq+", "pact"])
def test_resume_is_bitwise(method: str, optimizer: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Any, Lit, QuantFusionCallback]:
        torch.manual_seed(0)
        model = Lit(lr=0.01, optimizer=optimizer)
        callback = QuantFusionCallback([{"op_types": ["Conv2d", "Linear"], "method": method}], verbose=0)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(model, loader(), loader(seed=1), ckpt_path=ckpt_path)
        return trainer, model, callback

    _, straight, reference = run(4)
    kept = tmp_path / "half.ckpt"
    run(2)[0].save_checkpoint(kept)
    torch.load(kept, weights_only=True)
    _, resumed, callback = run(4, kept)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert same(quantizer_state(straight), quantizer_state(resumed))
    assert reference.deployed_model is not None
    assert callback.deployed_model is not None
    assert torch.equal(evaluated(reference.deployed_model), evaluated(callback.deployed_model))


def test_one_optimizer_for_two_fits(quiet_trainer: TrainerMaker) -> None:
    class Keeps(Lit):
        kept: Any = None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.kept = self.kept or torch.optim.Adam(self.parameters(), lr=0.01)
            kept: torch.optim.Optimizer = self.kept
            return kept

    model, callback = Keeps(), QuantFusionCallback([{"op_types": ["Linear"], "method": "lsq"}], verbose=0)
    for _ in range(2):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
        (group,) = model.kept.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in [*model.parameters(), *learned_parameters(model).values()]}


def test_learned_scales_move_and_help(quiet_trainer: TrainerMaker) -> None:
    """At 2 bits, from the same start, training with learned scales fits the data better than with scales that stay."""
    losses = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = Net()
        settings = {name: {"quant_dtype": "uint2"} for name in ("_input_", "_output_")}
        settings["weight"] = {"quant_dtype": "int2"}
        entry = {"op_types": ["Conv2d", "Linear"], "method": "lsq", "target_settings": settings}
        prepare_model(model, make_plan(model, [entry], example_input=X)).train()
        with torch.no_grad():
            model(X)
        learned = list(learned_parameters(model).values())
        start = [p.detach().clone() for p in learned]
        optimizer = torch.optim.Adam([*model.parameters(), *([] if frozen else learned)], lr=0.01)
        target = torch.arange(16) % 4
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), target)
            loss.backward()
            optimizer.step()
        moved = [bool((a != b).any()) for a, b in zip(start, learned, strict=True)]
        assert all(moved) != frozen
        losses.append(float(loss.detach()))
    assert losses[0] < losses[1]


# -- what cannot be ---------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a grid with a zero point": (
        {"method": "lsq", "target_settings": {"weight": {"quant_scheme": "affine"}}},
        r"method 'lsq' of 'weight' of Linear: a parameter has a grid without a zero point, .*, not int8 affine out_channel\.",
    ),
    "an unsigned weight": (
        {"method": "dorefa", "target_settings": {"weight": {"quant_dtype": "uint8"}}},
        r"method 'dorefa' of 'weight' of Linear: a parameter has a grid without a zero point",
    ),
    "scales of an activation's blocks": (
        {"method": "pact", "target_settings": {"_input_": {"granularity": "per_channel"}}},
        r"method 'pact' of '_input_' of Linear: an activation has one scale, granularity 'per_tensor', not per_channel\.",
    ),
    "an observer": (
        {"method": "lsq", "observer": "minmax"},
        r"method 'lsq' of '_input_' of Linear: nothing is observed, so observer 'minmax' is in vain; leave it out\.",
    ),
    "levels below 0 of a dorefa activation": (
        {"method": "dorefa", "target_settings": {"_input_": {"quant_scheme": "symmetric"}}},
        r"method 'dorefa' of '_input_' of Linear: an activation is cut to \[0, 1\], quant_scheme 'affine', not 'symmetric'",
    ),
    "scales of a dorefa weight": (
        {"method": "dorefa", "target_settings": {"weight": {"granularity": "out_channel"}}},
        r"of 'weight' of Linear: a parameter has one scale, granularity 'default' or 'per_tensor', not out_channel\.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_method_cannot_have(case: str) -> None:
    keys, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        make_plan(Net(), [{"op_names": ["fc"], **keys}], example_input=X)


@pytest.mark.parametrize(
    ("net", "group"),
    [
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), ("0", "1")),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), ("0", "1")),
    ],
    ids=["behind a transposed convolution", "before it"],
)
def test_norms_that_do_not_fold_into_learned_scales(net: Callable[[], nn.Module], group: tuple[str, str], request: Any) -> None:
    where = request.node.callspec.id
    entry = {"op_names": ["0" if where.startswith("behind") else "1"], "method": "lsq", "fuse_names": [group]}
    with pytest.raises(ConfigError, match=f"stands {where}, and folds there only into a weight of method 'qat', not 'lsq'"):
        make_plan(net(), [entry], example_input=X)
    model = net()
    plan = make_plan(model, [{**entry, "fuse_names": "auto"}], example_input=X)
    assert [layer.fused_with for layer in plan.layers] == [()]
    prepare_model(model, plan).train()
    model(X)
    assert torch.equal(evaluated(convert_model(model)), evaluated(model))


def test_an_optimizer_without_parameters_cannot_learn(quiet_trainer: TrainerMaker) -> None:
    class Without(Lit):
        def configure_optimizers(self) -> None:  # type: ignore[override]
            return None

    model, callback = Without(), QuantFusionCallback([{"op_types": ["Linear"], "method": "lsq"}], verbose=0)
    with (
        pytest.raises(ConfigError, match=r"fc\._input_\.scale is to be learned, but no optimizer has a parameter group"),
        pytest.warns(UserWarning, match="configure_optimizers"),
    ):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert not prepared_groups(model)


def test_another_methods_state_is_refused() -> None:
    saved = quantizer_state(trained("lsq"))
    model = trained("lsq+")
    with pytest.raises(ConfigError, match="have another granularity, observer or method"):
        load_quantizer_state(model, saved)
    assert all(quantizer.ready for quantizer in quantizers_of(model).values())


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_gradient_of_a_scale_survives_millions_of_values(bits: int) -> None:
    """Against float64: differences are taken value by value, not between sums."""
    x = torch.randn(2, 700_000).relu_()
    g = torch.rand_like(x) + 0.5
    quantizer = LsqActivation(spec(f"uint{bits}", "lsq"), "x", rectified=True)
    quantizer.observe(x)
    s = quantizer.scale.item()
    quantizer(x.requires_grad_()).backward(g)
    v, high = x.detach().double() / s, 2**bits - 1
    inside = (v > 0) & (v < high)
    ends = torch.where(v <= 0, 0.0, float(high))
    expected = (g.double() * torch.where(inside, v.round() - v, ends)).sum() / math.sqrt(700_000 * high)
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


def test_infinite_values_do_not_poison_a_scale() -> None:
    quantizer = LsqActivation(spec("uint8", "lsq"), "x")
    quantizer.observe(torch.tensor([[-1.0, 2.0]]))
    x = torch.tensor([[-math.inf, 0.5, math.inf]], requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None and bool(quantizer.scale.grad.isfinite())
