# SPDX-License-Identifier: Apache-2.0
"""Owns guarantee G3 inside torch: the deployed copy is what eval mode computed, bit for bit, and the original lives on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import run_recorded
from test_fusion import prepared, sgd_steps
from torch import Tensor, nn
from toys import FUSED, Net

from lightning_quant import ConfigError, convert_model
from lightning_quant.integer import IntegerLayer, PartlyIntegerLayer

GROUPS = FUSED[0]["fuse_names"]
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "default": FUSED,
    "int8": [{**FUSED[0], "quant_dtype": "int8"}],
    "uint8": [{**FUSED[0], "quant_dtype": "uint8"}],
    "affine": [{**FUSED[0], "quant_scheme": "affine"}],
    "symmetric": [{**FUSED[0], "quant_scheme": "symmetric"}],
    "int8 symmetric": [{**FUSED[0], "quant_scheme": "symmetric", "quant_dtype": "int8"}],
    "per_tensor": [{**FUSED[0], "granularity": "per_tensor"}],
    "per_tensor affine": [{**FUSED[0], "granularity": "per_tensor", "quant_scheme": "affine"}],
    "unfused": [{"op_types": ["Conv2d", "Linear"], "fuse_names": []}],
    "found": [{"op_types": ["Conv2d", "Linear"]}],
    "conv-bn only": [{"op_types": ["Conv2d", "Linear"], "fuse_names": [group[:2] for group in GROUPS]}],
    "quantized logits": [*FUSED, {"op_names": ["fc"], "target_names": ["_input_", "weight", "_output_"]}],
    "weights only": [{**FUSED[0], "target_names": ["weight"]}],
    "inputs only": [{**FUSED[0], "target_names": ["_input_"]}],
    "outputs only": [{**FUSED[0], "target_names": ["_output_"]}],
    "no outputs": [{**FUSED[0], "target_names": ["_input_", "weight"]}],
    "no inputs": [{**FUSED[0], "target_names": ["weight", "_output_"]}],
    "one layer": [{"op_names": ["conv2"], "fuse_names": [GROUPS[1]]}],
}


def trained(config: list[dict[str, Any]], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    net = prepared(Net(activation), config, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 5)
    with torch.no_grad():  # negative, zero and tiny gamma, as pruned and zero-initialised nets have them
        net.get_parameter("bn1.weight")[:3] = torch.tensor([-0.7, 0.0, 1e-9])
    return net.eval()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6], ids=lambda a: a.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_deployed_is_eval_mode_bit_for_bit(name: str, activation: type[nn.Module]) -> None:
    net = trained(CONFIGS[name], activation)
    deployed, x = convert_model(net), torch.randn(32, 3, 8, 8)
    expected, integers = run_recorded(net, x)
    found, deployed_integers = run_recorded(deployed, x)
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(integers, deployed_integers, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_deployed_is_close_to_the_simulation(name: str) -> None:
    """The straight-through graph that was trained, with gradients on, is another computation of the same function."""
    net = trained(CONFIGS[name])
    x = torch.randn(64, 3, 8, 8)
    with torch.enable_grad():
        simulation = net(x).detach()
    with torch.no_grad():
        found = convert_model(net)(x)
    assert (found - simulation).abs().max() <= 0.03 * simulation.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_deployed_is_close_to_float(name: str) -> None:
    net = trained(CONFIGS[name])
    twin = Net()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        found, expected = convert_model(net)(x), twin.eval()(x)
    assert (found - expected).std() <= 0.1 * expected.std()
    assert name == "outputs only" or not torch.equal(found, expected)


def test_deployed_is_plain_small_and_evaluating() -> None:
    net = trained(FUSED)
    deployed = convert_model(net)
    assert isinstance(deployed, Net)
    kinds = {name: type(module) for name, module in deployed.named_modules()}
    assert kinds["conv1"] is kinds["conv2"] is kinds["fc"] is IntegerLayer
    assert kinds["bn1"] is kinds["relu1"] is kinds["bn2"] is kinds["relu2"] is nn.Identity
    assert not list(deployed.parameters())
    assert not any(module.training for module in deployed.modules())
    state = deployed.state_dict()
    assert {key: state[key].dtype for key in ("conv1.weight", "conv1.bias", "conv1.scale")} == {
        "conv1.weight": torch.int8,
        "conv1.bias": torch.int32,
        "conv1.scale": torch.float32,
    }


def test_a_layer_without_a_grid_says_so() -> None:
    deployed = convert_model(trained(CONFIGS["weights only"]))
    assert isinstance(deployed.conv1, PartlyIntegerLayer)
    assert "int8 weight, float arithmetic" in repr(deployed.conv1)


def test_converting_touches_nothing_and_can_be_repeated() -> None:
    net = trained(FUSED)
    before = copy.deepcopy(net.state_dict())
    first = convert_model(net)
    sgd_steps(net.train(), 2)
    second, x = convert_model(net.eval()), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(first(x), second(x))
        assert torch.equal(second(x), net(x))
    assert list(before) == list(net.state_dict())
    assert not torch.equal(before["conv1.weight"], net.state_dict()["conv1.weight"])


@pytest.mark.parametrize(("batch", "size"), [(1, 8), (7, 8)])
def test_other_batch_sizes(batch: int, size: int) -> None:
    net = trained(FUSED)
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        assert torch.equal(convert_model(net)(x), net(x))


def test_a_head_without_activation_grid_keeps_its_activation() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(6, 5), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.relu(self.fc(x))
            return out

    net, x = Tail(), torch.randn(64, 6) * 9
    prepared(net, [{"op_names": ["fc"], "fuse_names": [("fc", "relu")]}], x).train()(x)
    with torch.no_grad():
        found = convert_model(net)(x)
        assert torch.equal(found, net.eval()(x))
    assert (float(found.min()), float(found.max())) == (0.0, 6.0)


def test_not_prepared() -> None:
    with pytest.raises(ConfigError, match="Net is not prepared; call prepare_model"):
        convert_model(Net())


def test_never_observed_names_the_layer() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"no range was observed for conv1\._input_, conv1\._output_.*run training steps"):
        convert_model(net)
