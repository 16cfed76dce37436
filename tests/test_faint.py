# SPDX-License-Identifier: Apache-2.0
"""Owns channels whose folded weights all round to 0: training sees the constant that is deployed, and can still revive them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import make_plan, prepare_model
from lightning_quant.prepare import apply_phase, prepared_groups, quantizers_of
from lightning_quant.quantizers import Grid
from lightning_quant.schedule import Phase

HELD = Phase(observe=False, freeze_batch_norm=True)


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def depthwise() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 12, 3, groups=3), nn.BatchNorm2d(12))


def transposed() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU())


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (conv, (16, 3, 8, 8)),
    "grouped": (depthwise, (16, 3, 8, 8)),
    "transposed": (transposed, (16, 4, 6, 6)),
    "linear": (linear, (64, 5)),
}
FAINT = [1, 4]  # channels


def prepared(name: str) -> tuple[Any, Tensor]:
    """A net with per-tensor weights, of which two channels are 1e-4 of the others; trained statistics, ranges known."""
    torch.manual_seed(2)
    make, shape = NETS[name]
    net: Any = make()
    x = torch.randn(shape) + 0.3
    norm = net[1]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[FAINT] *= 1e-4
        norm.bias.normal_()
    for _ in range(40):
        net.train()(x)
    entry = {
        "op_types": [type(net[0]).__name__],
        "high_precision_output": False,
        "target_settings": {"weight": {"granularity": "per_tensor"}},
    }
    prepare_model(net, make_plan(net, [entry], example_input=x)).train()(x)
    apply_phase(net, HELD)
    return net, x


@pytest.mark.parametrize("name", NETS)
def test_training_sees_the_constant_that_is_deployed(name: str) -> None:
    net, x = prepared(name)
    trained = net.train()(x).detach()
    with torch.no_grad():
        deployed = net.eval()(x)
    for channel in FAINT:
        assert bool((deployed[:, channel] == deployed[:1, channel].flatten()[0]).all())
        assert torch.equal(trained[:, channel], deployed[:, channel]), channel
    alive = [c for c in range(trained.shape[1]) if c not in FAINT]
    assert float(trained[:, alive].std()) > 0.1
    (output,) = (quantizer for name, quantizer in quantizers_of(net).items() if name.endswith("_output_"))
    grid = output.grid()
    assert isinstance(grid, Grid)
    assert float((trained - deployed).abs().max()) <= grid.scale * 1.01


@pytest.mark.parametrize("name", NETS)
def test_a_faint_channel_keeps_its_gradients_and_statistics(name: str) -> None:
    net, x = prepared(name)
    norm = net[1]
    apply_phase(net, Phase(observe=False))
    with torch.no_grad():
        norm.bias.fill_(1.0)  # the ReLU lets them through
    norm.running_var.fill_(1.0)
    g = torch.randn_like(net.train()(x))
    net.zero_grad()
    net(x).backward(g)
    assert bool((norm.weight.grad[FAINT] != 0).all())
    assert torch.isfinite(net[0].weight.grad).all()
    before = norm.running_var[FAINT].clone()
    for _ in range(300):
        net(x)
    twin = norm.running_var[FAINT]
    assert bool((twin > 1e-3).all()), f"statistics of the channel, not of its zeros: {before} -> {twin}"


def test_a_channel_that_grows_comes_back() -> None:
    net, x = prepared("conv")
    norm = net[1]
    ((_, group),) = prepared_groups(net).values()
    quantizer = group.parameter_quantizers[0]
    net.train()(x)
    assert quantizer.faint is not None and quantizer.faint.nonzero().flatten().tolist() == FAINT
    with torch.no_grad():
        norm.weight[FAINT] *= 1e4
    net(x)
    assert quantizer.faint is None


def test_scales_for_each_channel_have_no_faint_ones() -> None:
    torch.manual_seed(2)
    net: Any = conv()
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        net[1].weight[FAINT] *= 1e-4
    prepare_model(net, make_plan(net, [{"op_types": ["Conv2d"]}], example_input=x)).train()(x)
    ((_, group),) = prepared_groups(net).values()
    assert group.parameter_quantizers[0].faint is None


def test_behind_a_norm_alone() -> None:
    """Batch norm, then a linear layer: its outputs are constants, too, where the folded weights round to 0."""
    torch.manual_seed(2)
    net: Any = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8))
    x = torch.randn(64, 5) * 3
    with torch.no_grad():
        net[1].weight[FAINT] *= 1e-4
    for _ in range(40):
        net.train()(x)
    entry = {
        "op_types": ["Linear"],
        "high_precision_output": False,
        "fuse_names": [("0", "1")],
        "target_settings": {"weight": {"granularity": "per_tensor"}},
    }
    prepare_model(net, make_plan(net, [entry], example_input=x)).train()(x)
    apply_phase(net, HELD)
    trained = net.train()(x).detach()
    with torch.no_grad():
        deployed = net.eval()(x)
    for channel in FAINT:
        assert bool((deployed[:, channel] == deployed[:1, channel].flatten()[0]).all())
        assert torch.equal(trained[:, channel], deployed[:, channel])


@pytest.mark.parametrize("fuse_names", [[], [("0", "1")]])
def test_the_model_may_write_into_what_was_exchanged(fuse_names: list[Any]) -> None:
    """As an in-place ReLU does that nothing rounds, or a residual addition."""
    torch.manual_seed(2)
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    twin: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        net[1].weight[FAINT] *= 1e-5
    twin.load_state_dict(net.state_dict())
    entry = {"op_names": ["0"], "target_names": ["weight"], "granularity": "per_tensor", "fuse_names": fuse_names}
    outputs = []
    for model in (net, twin):
        prepare_model(model, make_plan(model, [entry], example_input=x)).train()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(net[0].weight.grad, twin[0].weight.grad)
