# SPDX-License-Identifier: Apache-2.0
"""Owns the tests of the benchmark scripts: the nets are those the tables name, and every script runs on a small one."""

from __future__ import annotations

import pytest
import step_time
import torch
from lanes import LANES, present
from timed_nets import NETS, layers_of
from torch import nn

from lightning_quant import make_plan

# Counted by torchvision 0.28 for resnet18 and mobilenet_v2 (11 689 512 and 3 504 872 with 1000 classes), with ten classes;
# the encoders and the MLP by hand: per block 12 d^2 + 13 d, then embedding, positions, last norm and head.
PARAMETERS = {
    "mnist": 431_080 + 40,
    "resnet18": 11_689_512 - 990 * 513,
    "mobilenetv2": 3_504_872 - 990 * 1281,
    "encoder": 4 * (12 * 256**2 + 13 * 256) + 49 * 256 + 64 * 256 + 2 * 256 + 10 * 257,
    "tiny_transformer": 2 * (12 * 128**2 + 13 * 128) + 49 * 128 + 64 * 128 + 2 * 128 + 10 * 129,
    "mlp": 257 * 512 + 2 * 513 * 512 + 10 * 513,
}


@pytest.mark.parametrize("name", NETS)
def test_the_nets_are_those_of_the_tables(name: str) -> None:
    net = NETS[name]
    model, rewritten = net.make(), net.torch_ao()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    rewritten.load_state_dict(model.state_dict())
    model.eval()
    rewritten.eval()
    x = torch.randn(2, *net.shape[1:])
    with torch.no_grad():
        expected, found = model(x), rewritten(x)
    assert expected.shape == (2, 10)
    if name == "mobilenetv2":  # ReLU in place of ReLU6: the same only where no value reaches 6
        assert not any(isinstance(module, nn.ReLU6) for module in rewritten.modules())
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NETS)
def test_convolutions_and_linear_layers_are_fused_as_far_as_they_can_be(name: str) -> None:
    model = NETS[name].make()
    plan = make_plan(model, layers_of(model), example_input=torch.randn(2, *NETS[name].shape[1:]))
    weighted = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    norms = [n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert {layer.name for layer in plan.layers} == set(weighted)
    assert {name for layer in plan.layers for name in layer.fused_with} >= set(norms)


def test_step_time_prints_a_ratio_per_lane(capsys: pytest.CaptureFixture[str]) -> None:
    lanes = present(list(LANES))
    capsys.readouterr()
    step_time.main(["--nets", "mlp", "--rounds", "2", "--threads", "1", "1"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("mlp")]
    assert [row[18:40].strip() for row in rows] == 2 * [LANES[lane].title for lane in lanes]
    assert {"float", "ours", "frozen", "int8", "torch_ao"} <= set(lanes)
    counts = dict(zip(lanes, (int(row[40:50]) for row in rows), strict=False))
    assert counts["float"] == 0
    assert counts["ours"] == counts["frozen"] == 4 + 4  # weights; input and three activations
    assert counts["torch_ao"] == 4 + 5  # the last layer's output, too
    for left_out in set(LANES) - set(lanes):
        assert f"left out: {LANES[left_out].title} ({LANES[left_out].missing()})" in printed


def test_step_time_measures_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    step_time.main(["--nets", "mlp", "--rounds", "2", "--lanes", "ours"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert [row[18:40].strip() for row in rows] == ["float", "ours"]
    assert float(rows[1].split()[-3]) > 0


def test_quartiles_are_of_the_ratios_round_by_round() -> None:
    assert step_time.quartiles_of_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == [1.5, 2.0, 2.5]
