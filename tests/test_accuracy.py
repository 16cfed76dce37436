# SPDX-License-Identifier: Apache-2.0
"""Owns the accuracy of what ships, on real data: a bar for each net and its bits, beside naive rounding.

Nets, recipes and naive rounding are those of benchmarks/accuracy.py. One seed here; its three give the means and the spread in
benchmarks/README.md, from which the bars below keep their distance.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import NAIVE, NETS, Net, accuracy, bits_of, calibrated, data_of, ends_of, fine_tuned, float_net, run_lane
from conftest import run_recorded
from torch import Tensor, nn

pytestmark = [
    pytest.mark.slow,  # minutes of training on real pictures
    pytest.mark.usefixtures("shared"),
]


def percent(net: Net, model: nn.Module) -> float:
    return accuracy(model, data_of(net).test)


def integers_of(deployed: nn.Module) -> dict[str, Tensor]:
    """The int8 tensors of every deployed weight, by the name of its layer."""
    state = deployed.state_dict()
    found = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.int8 and tensor.dim() > 1}
    return {name.removeprefix("net.").removesuffix(".weight"): tensor for name, tensor in found.items()}


def assert_bits_are_real(net: Net, setting: str, deployed: nn.Module) -> None:
    """Every layer has integers: no channel more of them than its bits have, and some channel more than two from 3 bits on."""
    model = float_net(net)
    weights, ends = integers_of(deployed), ends_of(model) if setting.endswith("*") else []
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert sorted(weights) == sorted(layers)
    for name, weight in weights.items():
        bits = 8 if name in ends else bits_of(setting)[0]
        most = max(len(channel.unique()) for channel in weight)
        assert most <= 2**bits - 1, name
        assert most > (1 if bits == 2 else 2), name
    _, activations = run_recorded(deployed, data_of(net).test[0][:16])
    inner = activations[1:-2] if ends else activations  # the image, what the pool makes, what the last layer reads
    assert len(inner) >= 3
    assert max(int(a.max()) for a in inner) < 2 ** bits_of(setting)[1]


# net, bits, lane, what it must reach, what naive rounding must not. Float nets have 96.9, 90.4 and 69.2; the three seeds of the
# benchmark end 0.4, 1.5, 0.8, 2.0 and 0.3 points or more above the first five bars.
BARS = [
    ("animals", "W3A8", "qat", 96.4, 88.0),
    ("photos", "W3A8", "qat", 89.0, 75.0),
    ("photos", "W4A4*", "lsq", 88.5, 86.0),
    ("uneven30", "W8A8", "qat, equalized", 66.0, 20.0),
    ("uneven100", "W8A8", "qat, equalized", 67.5, 60.0),
    ("animals", "W2A8", "lsq", 95.5, 50.0),
]


@pytest.mark.parametrize(("name", "setting", "lane", "least", "most"), BARS)
def test_training_wins_back_what_naive_rounding_loses(name: str, setting: str, lane: str, least: float, most: float) -> None:
    """If naive rounding came near, this test would say nothing."""
    net = NETS[name]
    assert percent(net, run_lane(net, setting, NAIVE, 0)) <= most
    deployed = run_lane(net, setting, lane, 0)
    assert percent(net, deployed) >= least
    assert_bits_are_real(net, setting, deployed)


@pytest.mark.parametrize("name", ["animals", "photos", "depthwise", "depthwise-relu", "emoji", "mnist"])
def test_eight_bits_without_training_cost_next_to_nothing(name: str) -> None:
    net = NETS[name]
    deployed = calibrated(net, "W8A8", 0)
    assert percent(net, deployed) >= percent(net, float_net(net)) - 0.5
    assert_bits_are_real(net, "W8A8", deployed)


def test_equalizing_saves_eight_bits_without_training() -> None:
    net = NETS["uneven30"]
    assert percent(net, calibrated(net, "W8A8", 0)) <= 20
    assert percent(net, calibrated(net, "W8A8", 0, equalize=True)) >= percent(net, float_net(net)) - 1.5


def test_correcting_biases_saves_three_bits_without_training() -> None:
    net = NETS["animals"]
    assert percent(net, calibrated(net, "W3A8", 0)) <= 88
    assert percent(net, calibrated(net, "W3A8", 0, biases=True)) >= 92


def test_eight_bits_with_training() -> None:
    net = NETS["depthwise"]
    assert percent(net, fine_tuned(net, "W8A8", 0)) >= percent(net, float_net(net)) - 1.5
