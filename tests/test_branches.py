# SPDX-License-Identifier: Apache-2.0
"""Owns the checks that no forward is silently misread: branches, interleaved calls, views, masks, tensors kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import ConfigError, convert_model, fuse_model, make_plan, prepare_model, restore_model

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# 16 bits: what is read rightly differs from the float model by 1e-4, what is misread by much more.
FINE = {"quant_dtype": "uint16", "observer": "minmax"}


class Net(nn.Module):
    """Some layers and a forward given as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.c, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.other, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.path = forward
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


def trained(forward: Callable[[Any, Tensor], Any], *inputs: Tensor, example: Tensor | None = None) -> nn.Module:
    """Prepared with fine grids for every convolution and linear layer, and calibrated on the inputs."""
    model = Net(forward)
    entry = {
        "op_types": ["Conv2d", "Linear"],
        "target_settings": {"weight": {"quant_dtype": "int16"}, "_input_": FINE, "_output_": FINE},
    }
    prepare_model(model, make_plan(model, [entry], example_input=inputs[0] if example is None else example))
    for x in inputs * 3:
        model.train()(x)
    return model.eval()


def assert_right(forward: Callable[[Any, Tensor], Any], *inputs: Tensor) -> None:
    model = trained(forward, *inputs)
    with torch.no_grad():
        found = [model(x) for x in inputs]
        deployed = convert_model(model)
        for x, y in zip(inputs, found, strict=True):
            assert torch.equal(deployed(x), y)
        restore_model(model)
        for x, y in zip(inputs, found, strict=True):
            wanted = model(x)
            assert (y - wanted).abs().max() <= 2e-3 * wanted.abs().max()


def interleaved(self: Any, x: Tensor) -> Tensor:
    a, b = self.c(x), self.c(x.flip(3))
    a, b = self.bn(a), self.bn(b)
    out: Tensor = self.act(a) - self.act(b)
    return out


def listed(self: Any, x: Tensor) -> Tensor:
    ys = [self.c(v) for v in (x, x + 1, x - 1)]
    ys = [self.bn(y) for y in ys]
    return torch.cat([F.silu(y) for y in ys], 1)


@pytest.mark.parametrize("forward", [interleaved, listed])
def test_calls_of_a_group_may_interleave(forward: Callable[[Any, Tensor], Any]) -> None:
    assert_right(forward, X)
    twin = Net(forward).eval()
    fused = fuse_model(Net(forward).train(), example_input=X).eval()
    with torch.no_grad():
        wanted = twin(X)
        assert (fused(X) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def positive(x: Tensor) -> bool:
    return bool(x.sum() > 0)


def skips_the_norm(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    y = self.bn(y) if positive(x) else y
    out: Tensor = self.act(y)
    return out


def another_head(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.act(self.c(x)) if positive(x) else self.act(self.other(x)) + self.c(x)
    return out


def writes_between(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    if not positive(x):
        y += 1.0
    out: Tensor = self.act(y)
    return out


def another_slope(self: Any, x: Tensor) -> Tensor:
    out: Tensor = F.leaky_relu(self.c(x), 0.01 if positive(x) else 0.9)
    return out


@pytest.mark.parametrize("forward", [skips_the_norm, another_head, writes_between, another_slope])
def test_a_branch_through_a_group_is_refused_not_misread(forward: Callable[[Any, Tensor], Any]) -> None:
    up, down = X + 1, X - 1
    model = trained(forward, up, down)
    twin = Net(forward)
    twin.load_state_dict(model.state_dict())
    message = r"'c': \d of \d+ tensors did not go through what is fused there as in the recorded forward.*Give fuse_names: \[\]"
    with pytest.raises(ConfigError, match=message + r".*run the model once in eval mode before"):
        convert_model(model)
    with torch.no_grad():
        model(up), model(down)
    with pytest.raises(ConfigError, match=message + r" for these layers, so that they are quantized alone\.$"):
        convert_model(model)


def test_a_branch_of_training_alone_is_no_misreading_once_eval_was_seen() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c(x)
        if self.training and positive(x):
            return torch.tanh(y)
        out: Tensor = self.act(self.bn(y))
        return out

    model = trained(forward, X + 1, X - 1)
    with pytest.raises(ConfigError, match="branches in training only, run the model once in eval mode"):
        convert_model(model)
    with torch.no_grad():
        found = [model(X + 1), model(X - 1)]
        deployed = convert_model(model)
        assert torch.equal(deployed(X + 1), found[0])


def test_interleaving_and_exceptions_leave_nothing_behind() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c(x)
        if x.shape[0] == 1:
            raise ValueError("one sample")
        out: Tensor = self.act(y)
        return out

    model = trained(forward, X)
    with pytest.raises(ValueError, match="one sample"), torch.no_grad():
        model(X[:1])
    with torch.no_grad():
        assert torch.equal(convert_model(model)(X), model(X))


# -- writes that the old name shows -------------------------------------------------------------------------------------


def view_first(_: Any, y: Tensor) -> Tensor:
    v = y[:, :2]
    v.mul_(3.0)
    return y


def half_added(_: Any, y: Tensor) -> Tensor:
    y[:, :2].add_(y[:, 2:])
    return y


@pytest.mark.parametrize("write", [view_first, half_added])
def test_an_operator_that_writes_through_a_view_is_left_alone(write: Callable[[Any, Tensor], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.fc(write(self, torch.exp(-self.c(x))).mean((2, 3)))
        return out

    model, twin = Net(forward), Net(forward)
    plan = make_plan(model, "int8", example_input=X)
    (left,) = [reason for name, reason in plan.left.items() if name in ("mul", "add")]
    assert "in place" in left or left == "not between quantized layers"
    prepare_model(model, plan).train()(X)
    with torch.no_grad():
        wanted, found = twin.train()(X), model.train()(X)
    assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()


# -- tensors that leave the forward otherwise ---------------------------------------------------------------------------


def stashed(self: Any, x: Tensor) -> Tensor:
    self.feature = self.c(x)
    out: Tensor = self.act(self.feature)
    return out


def listed_features(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    self.kept = [y]
    out: Tensor = self.act(y)
    return out


def asked(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    out: Tensor = self.act(y) * (1.0 if y.max().item() > 0 else 2.0) + 0 * sum(y.flatten()[:2].tolist())
    return out


@pytest.mark.parametrize("forward", [stashed, listed_features, asked])
def test_what_leaves_the_forward_otherwise_is_not_fused_away(forward: Callable[[Any, Tensor], Any]) -> None:
    plan = make_plan(Net(forward), [{"op_types": ["Conv2d"]}], example_input=X)
    assert plan.layers[0].fused_with == ()
    assert "also read by" in str(plan.layers[0].notes)


def test_a_norm_whose_parameters_are_read_is_not_folded_away() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.c(x)) * self.bn.weight.view(-1, 1, 1)
        return out

    model = Net(forward)
    plan = make_plan(model, [{"op_types": ["Conv2d"]}], example_input=X)
    assert plan.layers[0].fused_with == ()
    assert "a parameter of 'bn' is also read by 'view'; fused, it would not exist" in str(plan.layers[0].notes)
    assert isinstance(fuse_model(model.eval(), example_input=X).bn, nn.BatchNorm2d)


# -- values that are no activations -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) + self.mask
        out: Tensor = scores.softmax(-1) @ self.v(x)
        return out


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_preset_leaves_masks_alone(low: float) -> None:
    model, x = Attention(torch.full((6, 6), low).triu(1)), torch.randn(16, 6, 8)
    plan = make_plan(model, "int8", example_input=x)
    assert plan.left["add"] == "not between quantized layers"
    assert {"matmul", "matmul_1"} <= {layer.name for layer in plan.layers}
    with torch.no_grad():
        wanted = model(x)
        prepare_model(model, plan).train()(x)
        assert (convert_model(model.eval())(x) - wanted).abs().max() <= 0.1 * wanted.abs().max()


def test_a_preset_leaves_variances_alone() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c(x)
        y = y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)
        out: Tensor = self.fc(y.mean((2, 3)))
        return out

    model = Net(forward)
    plan = make_plan(model, "int8", example_input=X)
    assert (plan.left["mean"], plan.left["add"]) == ("a mean that is no pooling", "not between quantized layers")
    assert plan.left["mul"] == "not between quantized layers"
    prepare_model(model, plan).train()(X)
    with torch.no_grad():
        assert bool(convert_model(model.eval())(X).isfinite().all())


# -- owners -------------------------------------------------------------------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)
        return out


class Walks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x


@pytest.mark.parametrize("make", [lambda: Residual(nn.Conv2d(3, 3, 1), nn.ReLU()), Walks], ids=["Sequential", "children()"])
def test_an_owner_that_walks_over_its_children_finds_only_its_own(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(make(), nn.Conv2d(3, 4, 1))
    plan = make_plan(model, "int8", example_input=X)
    assert any(layer.type == "add" for layer in plan.layers)
    prepare_model(model, plan).train()(X)
    deployed = convert_model(model.eval())
    with torch.no_grad():
        assert torch.equal(deployed(X), model(X))
    assert len(list(deployed[0].children())) == 2  # type: ignore[index]


def test_restoring_takes_back_a_forward_that_a_strategy_bound() -> None:
    """Lightning's DDP sets `module.forward = original_forward` on the instance after each step."""
    model = Net(lambda self, x: self.act(self.c(x)) + 1)
    wanted = model(X)
    prepare_model(model, make_plan(model, "int8", example_input=X))
    model.forward = model.forward  # type: ignore[method-assign]
    restore_model(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(X), wanted)
