# SPDX-License-Identifier: Apache-2.0
"""Owns what a report says of pruning: zeros, bytes and multiply-adds before and after, counted again by hand."""

from __future__ import annotations

import copy
import html
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, load_deployed, make_plan, prepare_model, summarize
from lightning_quant.shrink import shrink_model
from lightning_quant.summary import LayerReport, Report

TrainerMaker = Callable[..., Trainer]
HALF: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
GROUPS = {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2"), "fc": ("fc",)}
# Output channels and inputs of each, before and after half of the channels of both convolutions are gone.
WAS, IS = {"conv1": (8, 3), "conv2": (8, 8), "fc": (4, 128)}, {"conv1": (4, 3), "conv2": (4, 4), "fc": (4, 64)}


def fitted(make: TrainerMaker, *args: Any, **options: Any) -> tuple[Lit, Any]:
    torch.manual_seed(0)
    model, callback = Lit(), QuantFusionCallback(*args, **{"verbose": 0, "source": "last", **options})
    make(max_epochs=2, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    return model, callback


def layer(report: Report, name: str) -> LayerReport:
    (found,) = [one for one in report.layers if one.name == name]
    return found


def work(name: str, ends: tuple[int, int], samples: int) -> int:
    """Multiply-adds by hand: 3x3 convolutions keep 8x8 pixels."""
    outputs, inputs = ends
    return samples * outputs * inputs * (1 if name == "fc" else 9 * 64)


def weights(name: str, ends: tuple[int, int]) -> int:
    return ends[0] * ends[1] * (1 if name == "fc" else 9)


def parameters(name: str, ends: tuple[int, int]) -> int:
    """Of the layer with its batch norm."""
    return weights(name, ends) + ends[0] * (1 if name == "fc" else 2)


def float_bytes(name: str, ends: tuple[int, int]) -> int:
    """A batch norm has four vectors."""
    return 4 * (weights(name, ends) + ends[0] * (1 if name == "fc" else 4))


def zeros(model: nn.Module, name: str) -> int:
    return int((model.get_parameter(f"{name}.weight") == 0).sum())


# -- what was removed ---------------------------------------------------------------------------------------------------------


def test_before_and_after_by_hand(quiet_trainer: TrainerMaker) -> None:
    model, callback = fitted(quiet_trainer, FUSED, pruning=HALF)
    for report in (summarize(callback.shrunk.model, example_input=X), summarize(callback.deployed_model, example_input=X)):
        for name in GROUPS:
            one = layer(report, name)
            assert one.before is not None
            assert one.before.parameters == parameters(name, WAS[name])
            assert one.before.float_bytes == float_bytes(name, WAS[name])
            assert one.before.multiply_adds == work(name, WAS[name], len(X))
            assert one.multiply_adds == work(name, IS[name], len(X))
            assert one.stored_bytes == weights(name, IS[name]) + 8 * IS[name][0], (
                "int8, a scale and an int32 bias for each output"
            )
            kept = weights(name, IS[name])
            assert (
                one.sparsity
                == pytest.approx(1 - kept / weights(name, WAS[name]))
                == zeros(model, name) / weights(name, WAS[name])
            )
        before = report.before
        assert before is not None
        assert before.parameters == sum(p.numel() for p in Net().parameters())
        assert before.float_bytes == sum(float_bytes(name, WAS[name]) for name in GROUPS)
        assert before.multiply_adds == sum(work(name, WAS[name], len(X)) for name in GROUPS)
        assert report.multiply_adds == sum(work(name, IS[name], len(X)) for name in GROUPS)
        assert report.stored_bytes == sum(weights(name, IS[name]) + 8 * IS[name][0] for name in GROUPS)
        counts = [(zeros(model, name), weights(name, WAS[name])) for name in GROUPS]
        assert report.sparsity == pytest.approx(sum(a for a, _ in counts) / sum(b for _, b in counts))
    small = summarize(callback.shrunk.model)
    assert small.parameters == callback.shrunk.after.parameters == sum(parameters(name, IS[name]) for name in GROUPS)
    assert layer(small, "conv1").float_bytes == float_bytes("conv1", IS["conv1"])
    assert layer(small, "conv1").before is not None and layer(small, "conv1").multiply_adds is None


def test_while_masked_only_sparsity_shows(quiet_trainer: TrainerMaker) -> None:
    model, _ = fitted(quiet_trainer, FUSED, pruning=HALF)
    report = summarize(model, example_input=X)
    assert report.before is None and all(one.before is None for one in report.layers)
    assert [one.sparsity for one in report.layers] == [zeros(model, name) / weights(name, WAS[name]) for name in GROUPS]
    assert layer(report, "conv1").sparsity == 0.5
    assert layer(report, "conv1").multiply_adds == work("conv1", WAS["conv1"], len(X))
    assert " 50.0 %" in str(report) and "->" not in str(report)


def test_a_pattern_removes_nothing_and_ships_its_zeros(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    pruning = [{"op_names": ["conv2", "fc"], "pattern": "2:4", "metric": "level"}]
    model, callback = fitted(quiet_trainer, FUSED, pruning=pruning, export=".pt", dirpath=tmp_path)
    assert zeros(model, "conv2") == 8 * 8 * 9 // 2, "the test wants a pattern"
    for deployed in (callback.deployed_model, load_deployed(tmp_path / "model.pt", model=Lit())):
        report = summarize(deployed)
        assert [one.sparsity for one in report.layers] == [None, 0.5, 0.5]
        assert report.before is None
        assert report.sparsity == pytest.approx((288 + 256) / (216 + 576 + 512))


def test_the_weights_file_remembers(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    _, callback = fitted(quiet_trainer, FUSED, pruning=HALF, export=".pt", dirpath=tmp_path)
    loaded = summarize(load_deployed(tmp_path / "model.pt", model=Lit()), example_input=X)
    assert loaded.to_dict() == summarize(callback.deployed_model, example_input=X).to_dict()
    assert loaded.before is not None


def test_layers_that_are_not_quantized(quiet_trainer: TrainerMaker) -> None:
    _, callback = fitted(quiet_trainer, [{"op_names": ["conv1"], "fuse_names": [["conv1", "bn1", "relu1"]]}], pruning=HALF)
    for model in (callback.shrunk.model, callback.deployed_model):
        report = summarize(model, example_input=X)
        assert [one.name for one in report.layers] == ["conv1", "conv2", "fc"]
        conv = layer(report, "conv2")
        assert (conv.type, dict(conv.tensors), conv.fused) == ("Conv2d", {}, ())
        assert conv.before is not None
        assert (conv.before.parameters, conv.parameters) == (576, 144)
        assert (conv.before.float_bytes, conv.float_bytes, conv.stored_bytes) == (4 * 576, 4 * 144, 4 * 144)
        assert (conv.before.multiply_adds, conv.multiply_adds) == tuple(work("conv2", e["conv2"], len(X)) for e in (WAS, IS))
        assert (report.other_bytes_before, report.other_bytes) == (4 * 4 * 8, 4 * 4 * 4), "bn2"
        assert report.before is not None
        assert report.before.float_bytes == sum(float_bytes(name, WAS[name]) for name in GROUPS)
        assert "(not quantized)" in str(report)


def test_pruning_alone(quiet_trainer: TrainerMaker) -> None:
    model, callback = fitted(quiet_trainer, pruning=HALF)
    report = summarize(callback.deployed_model, example_input=X)
    assert [one.name for one in report.layers] == list(GROUPS)
    assert report.before is not None
    assert (report.before.parameters, report.parameters) == (1340, sum(p.numel() for p in callback.deployed_model.parameters()))
    assert report.stored_bytes == report.float_bytes == callback.shrunk.after.bytes - 2 * 8, "without the counters of batch norms"
    assert (report.before.multiply_adds, report.multiply_adds) == tuple(
        sum(work(name, ends[name], len(X)) for name in GROUPS) for ends in (WAS, IS)
    )
    assert report.notes == ("nothing is quantized; the layers are those with weights that are 0, or were removed",)
    assert "(other layers)" in str(report)
    masked = summarize(model)
    assert masked.before is None
    assert [one.sparsity for one in masked.layers] == [zeros(model, name) / weights(name, WAS[name]) for name in GROUPS]


def test_another_number_of_samples_and_pixels() -> None:
    """Shares are those of the example that the model was made smaller with; of other inputs they are the same."""
    torch.manual_seed(0)
    first_layer = nn.Conv2d(3, 6, 3, bias=False)
    net = nn.Sequential(first_layer, nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    with torch.no_grad():
        first_layer.weight[[0, 3]] = 0.0
    small = shrink_model(net, None, X).model
    report = summarize(small, example_input=torch.randn(5, 3, 12, 12))
    assert report.before is not None
    first, second = 5 * 100 * 27, 5 * 64 * 9  # for each output channel, and for each of its inputs
    assert report.before.multiply_adds == 6 * first + 4 * 3 * second
    assert report.multiply_adds == 4 * first + 4 * 2 * second


class Inner(nn.Module):
    """A net around another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_a_model_inside_another() -> None:
    torch.manual_seed(0)
    whole = Inner().eval()
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[:3] = False
    with torch.no_grad():
        whole.net.conv1.weight.mul_(mask)
        for parameter in (whole.net.bn1.weight, whole.net.bn1.bias):
            parameter.mul_(mask.flatten())
    masks = {"net.conv1.weight": mask, "net.bn1.weight": mask.flatten(), "net.bn1.bias": mask.flatten()}
    small = shrink_model(whole, masks, X, entry="net").model
    report = summarize(small, example_input=X)
    assert report.before is not None and report.multiply_adds is not None
    gone = 3 * 27 * 64 + 8 * 3 * 9 * 64
    assert report.before.multiply_adds == sum(work(name, WAS[name], len(X)) for name in GROUPS)
    assert report.before.multiply_adds - report.multiply_adds == len(X) * gone
    assert layer(report, "net.conv1").before == layer(summarize(small.get_submodule("net"), example_input=X), "conv1").before


def test_a_bias_that_removal_made_was_not_there() -> None:
    layer_0 = nn.Conv2d(2, 4, 1)
    net = nn.Sequential(layer_0, nn.Conv2d(4, 3, 1, bias=False))
    with torch.no_grad():
        layer_0.weight[1] = 0.0
    small = shrink_model(net, {"0.weight": layer_0.weight != 0}, torch.randn(2, 2, 4, 4)).model
    assert small.get_parameter("1.bias").shape == (3,), "the test wants a constant"
    for model in (small, convert_model(_ready(small))):
        before = summarize(model).before
        assert before is not None
        assert before.parameters == 4 * 2 + 4 + 3 * 4
    report = summarize(small)
    assert (report.parameters, layer(report, "1").parameters) == (3 * 2 + 3 + 3 * 3 + 3, 9 + 3)


def _ready(net: nn.Module) -> nn.Module:
    x = torch.randn(4, 2, 4, 4)
    prepare_model(net, make_plan(net, "int8", example_input=x)).train()(x)
    return net


# -- zeros that nobody removed --------------------------------------------------------------------------------------------


def test_a_net_without_zeros_has_no_column() -> None:
    net = Net()
    prepare_model(net, make_plan(net, "int8", example_input=X)).train()(X)
    for model in (net, convert_model(net)):
        report = summarize(model)
        assert report.sparsity is None and report.before is None
        assert "sparsity" not in str(report)
        assert report.rows()[0]["sparsity"] is None


def test_zeros_of_a_tied_weight_count_once() -> None:
    first, last = nn.Linear(6, 6), nn.Linear(6, 6)
    net, last.weight = nn.Sequential(first, nn.ReLU(), last), first.weight
    with torch.no_grad():
        first.weight[:2] = 0.0
    prepare_model(net, make_plan(net, "int8", example_input=torch.randn(4, 6))).train()(torch.randn(4, 6))
    report = summarize(net)
    assert [one.sparsity for one in report.layers] == [pytest.approx(1 / 3)] * 2
    assert report.sparsity == pytest.approx(1 / 3)


def test_a_net_that_is_nothing_of_the_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="summarize: Net is neither prepared nor deployed nor pruned; call prepare_model"):
        summarize(Net(), example_input=X)


def test_a_report_changes_nothing(quiet_trainer: TrainerMaker) -> None:
    _, callback = fitted(quiet_trainer, FUSED, pruning=HALF)
    small = callback.shrunk.model
    before = copy.deepcopy(small.state_dict())
    first, again = (summarize(small, example_input=X).to_dict() for _ in range(2))
    assert first == again
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


# -- how it is shown ------------------------------------------------------------------------------------------------------


def test_the_table_the_notebook_and_the_rows(quiet_trainer: TrainerMaker) -> None:
    _, callback = fitted(quiet_trainer, FUSED, pruning=HALF)
    report = summarize(callback.deployed_model, example_input=X)
    lines = {line.split()[0]: line for line in str(report).splitlines()}
    total = f"{sum(work(n, WAS[n], 6) for n in GROUPS):,} -> {sum(work(n, IS[n], 6) for n in GROUPS):,}"
    assert total in lines["total"] and total in html.unescape(report._repr_html_())
    assert f"{parameters('conv2', WAS['conv2'])} -> {4 * 36 + 4}" in lines["conv2"], "deployed: a bias in place of the norm"
    assert "75.0 %" in lines["conv2"] and "75.0 %" in report._repr_html_()
    times = sum(float_bytes(n, WAS[n]) for n in GROUPS) / sum(weights(n, IS[n]) + 8 * IS[n][0] for n in GROUPS)
    assert f"5.5 kB as it came in float, 604 B as stored: {times:.2f} times smaller" in str(report)
    row = report.rows()[1]
    assert (row["sparsity"], row["float_bytes_before"]) == (0.75, float_bytes("conv2", WAS["conv2"]))
    assert (row["multiply_adds_before"], row["multiply_adds"]) == tuple(work("conv2", e["conv2"], 6) for e in (WAS, IS))
    whole = report.to_dict()
    assert (whole["parameters_before"], whole["layers"][1]["parameters_before"]) == (1340, 592)
    assert "4 of 8" in callback.shrunk._repr_html_() and "parameters: 1 340 -&gt; 528" in callback.shrunk._repr_html_()
    assert "before" not in whole and "before" not in whole["layers"][0]
    said: list[str] = []
    callback.shrunk._repr_pretty_(SimpleNamespace(text=said.append), cycle=False)
    assert said == [str(callback.shrunk)]
