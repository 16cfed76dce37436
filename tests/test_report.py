# SPDX-License-Identifier: Apache-2.0
"""Owns what `summarize` says: numbers by hand, bytes by what is really stored, and how it is shown."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_more  # noqa: F401  (registers its nets)
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import FUSED, Calls, Lit, Net, fingerprint, loader
from zoo import ZOO

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model, restore_model, summarize
from lightning_quant.prepare import apply_phase, quantizer_state
from lightning_quant.record import split_example
from lightning_quant.schedule import Phase
from lightning_quant.summary import LayerReport, Report
from lightning_quant.tables import Cell, html_table, text_table
from lightning_quant.targets import tensors_in

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def prepared(net: nn.Module, config: Any = "int8", x: Any = X, steps: int = 3) -> nn.Module:
    """Prepared, with ranges of a few training passes."""
    prepare_model(net, make_plan(net, config, example_input=x)).train()
    args, kwargs = split_example(x)
    for _ in range(steps):
        net(*args, **kwargs)
    return net


def layer(report: Report, name: str) -> LayerReport:
    (found,) = [one for one in report.layers if one.name == name]
    return found


def decibels(x: Any, rounded: Any) -> float:
    x, rounded = (np.asarray(side, dtype=np.float64).ravel() for side in (x, rounded))
    return float(10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum()))


# -- numbers --------------------------------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    net = prepared(Net())
    state, report = quantizer_state(net), summarize(net)
    assert [one.name for one in report.layers] == ["conv1", "conv2", "fc"]
    conv = layer(report, "conv1")
    assert (conv.type, conv.fused) == ("Conv2d", ("bn1", "relu1"))
    assert list(conv.tensors) == ["_input_", "weight", "_output_"]
    weight, output = conv.tensors["weight"], conv.tensors["_output_"]
    w = net.get_parameter("conv1.weight").detach().double().numpy()
    variance = net.get_buffer("bn1.running_var").double().numpy()
    k = (net.get_parameter("bn1.weight").detach().double().numpy() / np.sqrt(variance + 1e-5)).reshape(-1, 1, 1, 1)
    scale = np.abs(w).max((1, 2, 3), keepdims=True) / 127
    assert (weight.dtype, weight.bits, weight.scheme, weight.granularity) == ("int8", 8, "symmetric", "out_channel")
    assert weight.scale == pytest.approx(((scale * k).min(), (scale * k).max()), rel=1e-6)
    assert weight.zero_point == (0, 0)
    assert (weight.low, weight.high) == pytest.approx(((w * k).min(), (w * k).max()))
    assert weight.signal_to_noise == pytest.approx(decibels(w * k, np.rint(w / scale) * scale * k), abs=1e-4)
    assert weight.effective_bits == pytest.approx(((weight.signal_to_noise or 0) - 1.76) / 6.02)
    assert weight.zeros == pytest.approx((np.rint(w / scale) == 0).mean())
    assert (weight.clipped, weight.channels, weight.zero_channels, weight.dead_channels) == (0.0, 8, 0, 0)
    high = state["conv1._output_"]["high"]
    assert (output.dtype, output.bits, output.scheme, output.granularity) == ("uint8", 8, "affine", "per_tensor")
    assert (output.low, output.high) == pytest.approx((0, high))
    assert output.scale == pytest.approx((high / 255, high / 255))
    assert output.zero_point == (0, 0)
    assert output.signal_to_noise is None, "not measured without an input"
    assert conv.parameters == 8 * 3 * 9 + 16
    assert conv.float_bytes == 4 * (8 * 3 * 9 + 4 * 8)
    assert conv.stored_bytes == 8 * 3 * 9 + 4 * 8 + 4 * 8, "int8 weights, float32 scales, int32 biases"
    assert conv.multiply_adds is None


def test_sums() -> None:
    net = prepared(Net())
    report = summarize(net, example_input=X)
    assert report.model == "Net"
    assert report.parameters == sum(p.numel() for p in Net().parameters())
    assert report.other_bytes == 0
    floats = [t for t in (*Net().parameters(), *Net().buffers()) if t.is_floating_point()]
    assert report.float_bytes == sum(4 * tensor.numel() for tensor in floats)
    assert report.multiply_adds == 8 * (8 * 27 * 64 + 8 * 72 * 64 + 128 * 4)
    assert [one.multiply_adds for one in report.layers] == [8 * 8 * 27 * 64, 8 * 8 * 72 * 64, 8 * 128 * 4]


def test_activations_are_held_against_the_float_model() -> None:
    """Noise adds up along the way: the reference is the float net, not the layer's own input."""
    net = prepared(Net())
    state, report = quantizer_state(net), summarize(net, example_input=X)
    exact: dict[str, Tensor] = {}
    net.eval()
    apply_phase(net, Phase(observe=False, quantize=False))
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: exact.update({name: out.detach()}))
        for name, module in net.named_modules()
    ]
    with torch.no_grad():
        outputs = net(X)
        for hook in hooks:
            hook.remove()
        apply_phase(net, Phase(observe=False))
        rounded: dict[str, Tensor] = {}
        for name in ("relu1", "relu2"):
            net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: rounded.update({name: out}))
        final = net(X)  # on integers
    for name, relu in (("conv1", "relu1"), ("conv2", "relu2")):
        measured = layer(report, name).tensors["_output_"].signal_to_noise
        assert measured == pytest.approx(decibels(exact[relu], rounded[relu]), abs=0.05)
        assert measured is not None and 25 < measured < 45
    assert report.signal_to_noise == pytest.approx(decibels(outputs, final), abs=0.1)
    own = layer(report, "conv1").tensors["_input_"]
    scale = np.float32((state["conv1._input_"]["high"] - state["conv1._input_"]["low"]) / 255)
    zero = np.rint(-state["conv1._input_"]["low"] / np.float64(scale))
    q = np.rint(X.numpy() / scale) + zero
    assert own.signal_to_noise == pytest.approx(decibels(X, (np.clip(q, 0, 255) - zero) * scale), abs=1e-3)
    assert own.clipped == pytest.approx(((q < 0) | (q > 255)).mean(), abs=1e-6)


def test_clipped_activations_show() -> None:
    net = prepared(Net())
    narrow = summarize(net, example_input=3 * X)
    clipped = layer(narrow, "conv1").tensors["_input_"].clipped
    assert clipped is not None and clipped > 0.05
    assert layer(summarize(net, example_input=X), "conv1").tensors["_input_"].clipped == 0


def test_channels_that_round_to_zero_and_dead_ones() -> None:
    net = Net()
    with torch.no_grad():
        net.conv1.weight[2] = 0  # dead: pruned
        net.conv1.weight[5] *= 1e-4  # faint: one scale for the tensor rounds it to zero
        net.fc.weight[1, :] = 0
    prepared(net, [{**FUSED[0], "target_settings": {"weight": {"granularity": "per_tensor"}}}])
    weight = layer(summarize(net), "conv1").tensors["weight"]
    assert (weight.channels, weight.zero_channels, weight.dead_channels) == (8, 2, 1)
    assert "2/8 (1 in float, too)" in str(summarize(net))
    assert layer(summarize(net), "fc").tensors["weight"].zero_channels == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_transposed_convolution(groups: int) -> None:
    layers = nn.ConvTranspose2d(4, 6, 2, groups=groups)
    net = nn.Sequential(layers)
    with torch.no_grad():
        layers.weight[: 4 // groups, 1] = 0  # the first group of inputs
    prepared(net, x=torch.randn(2, 4, 3, 3))
    weight = layer(summarize(net), "0").tensors["weight"]
    assert (weight.channels, weight.zero_channels, weight.dead_channels) == (6, 1, 1)


@pytest.mark.parametrize("bits", [3, 4, 8, 12])
def test_bytes_are_those_that_are_stored_not_those_that_could_be(bits: int) -> None:
    net = prepared(nn.Sequential(nn.Linear(16, 10)), [{"op_types": ["Linear"], "quant_dtype": f"int{bits}"}], torch.randn(4, 16))
    one = layer(summarize(net), "0")
    assert one.tensors["weight"].bits == bits
    assert one.stored_bytes == 160 * (2 if bits > 8 else 1) + 4 * 10 + 4 * 10
    effective = one.tensors["weight"].effective_bits
    assert effective is not None and bits - 1.5 < effective < bits + 0.5


@pytest.mark.parametrize("name", ZOO)
def test_every_shape_of_net(name: str) -> None:
    """Bytes are those of the converted copy; the model is as before; two runs tell the same."""
    shape = ZOO[name]
    example = shape.example()
    net = prepared(shape.make(), shape.config, example).eval()
    args, kwargs = split_example(example)
    before = fingerprint(net)
    outputs = list(tensors_in(net(*args, **kwargs)))
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        report = summarize(net, example_input=example)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert [one[:3] for one in fingerprint(net)] == [one[:3] for one in before]
    assert all(torch.equal(a, b) for a, b in zip(outputs, tensors_in(net(*args, **kwargs)), strict=True))
    assert report.signal_to_noise is not None
    assert report.signal_to_noise > 15
    deployed = convert_model(net)
    held = {id(tensor): tensor for tensor in (*deployed.buffers(), *deployed.parameters())}
    real = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert report.stored_bytes == summarize(deployed).stored_bytes == real
    again = summarize(net, example_input=example)
    assert again.to_dict() == report.to_dict()
    json.dumps(report.to_dict(), allow_nan=True)
    assert str(report).count("\n") >= len(report.layers) + 2


@pytest.mark.parametrize("name", ["MobileNetV2", "UNet", "AttentionEncoder", "LSTMTagger"])
def test_multiply_adds_are_those_of_the_float_net(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ZOO[name]
    example = shape.example()
    args, kwargs = split_example(example)
    monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", lambda _: None)  # else what is set back is False for good
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # a kernel that torch does not count
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape.make().eval()(*args, **kwargs)
    net = prepared(shape.make(), shape.config, example)
    report = summarize(net, example_input=example)
    assert report.multiply_adds == counter.get_total_flops() // 2 > 0
    deployed = summarize(convert_model(net), example_input=example)
    own = {one.name: one.multiply_adds for one in deployed.layers if one.type in ("conv", "linear")}
    assert own == {one.name: one.multiply_adds for one in report.layers if one.name in own}
    assert not own or all(own.values())


def test_a_module_with_several_parameters_shows_the_worst() -> None:
    lstm = nn.LSTM(6, 5)
    net = nn.Sequential(lstm)
    with torch.no_grad():
        lstm.get_parameter("weight_hh_l0")[0].mul_(100)
    prepared(net, [{"op_types": ["LSTM"], "target_settings": {"weight_*": {"granularity": "per_tensor"}}}], torch.randn(4, 2, 6))
    one = layer(summarize(net), "0")
    ratios = {name: one.tensors[name].signal_to_noise for name in ("weight_ih_l0", "weight_hh_l0")}
    worst = one.worst("weight")
    assert worst is not None and worst.target == min(ratios, key=lambda name: ratios[name] or 0)
    assert summarize(net).rows()[0]["weight_signal_to_noise"] == min(r for r in ratios.values() if r is not None)


def test_layers_that_share_a_learned_grid_each_have_a_row() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    prepared(net, [{"op_types": ["Linear"], "method": "lsq"}], torch.randn(4, 6))
    report = summarize(net)
    assert [list(one.tensors) for one in report.layers] == [["_input_", "weight", "_output_"], ["_input_", "weight"]]
    assert report.parameters == 36 + 6 + 6
    assert report.float_bytes == 4 * report.parameters


# -- what can be reported -------------------------------------------------------------------------------------------------


def test_without_ranges_bytes_are_not_known() -> None:
    net = Net()
    prepare_model(net, make_plan(net, "int8", example_input=X))
    report = summarize(net)
    assert report.stored_bytes is None
    assert report.notes == ("no ranges yet: conv1, conv2, fc",)
    assert layer(report, "conv1").tensors["_output_"].high is None
    assert layer(report, "conv1").tensors["weight"].signal_to_noise is not None
    measured = summarize(net, example_input=X)
    assert measured.multiply_adds
    assert all(one.tensors["_input_"].signal_to_noise is None for one in measured.layers)
    assert measured.signal_to_noise is None, "nothing was rounded, so nothing is exact"
    unknown = "no ranges yet: conv1, conv2, fc; what quantization costs the model's outputs is therefore unknown"
    assert measured.notes == (unknown,)
    assert "signal-to-noise" not in str(measured)


def test_an_operator_without_ranges_is_named() -> None:
    net = Calls(lambda net, x: net.fc(x) + x, fc=nn.Linear(4, 4))
    prepare_model(net, make_plan(net, [{"op_types": ["add"]}], example_input=torch.randn(2, 4)))
    (note,) = summarize(net).notes
    assert note == "no ranges yet: add"
    assert summarize(net, example_input=torch.randn(2, 4)).signal_to_noise is None


def test_weights_alone_have_no_ranges_to_wait_for() -> None:
    net = Net()
    prepare_model(net, make_plan(net, "int8-weight-only", example_input=X))
    report = summarize(net, example_input=X)
    assert report.stored_bytes is not None
    assert report.signal_to_noise is not None and report.signal_to_noise > 30
    assert list(layer(report, "conv1").tensors) == ["weight"]


def test_what_is_not_quantized_is_counted() -> None:
    net = prepared(Net(), [{"op_names": ["conv1"]}])
    report = summarize(net, example_input=X)
    others = [net.get_submodule(name) for name in ("conv2", "bn2", "fc")]
    floats = [t for module in others for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert report.other_bytes == sum(4 * tensor.numel() for tensor in floats)
    assert "(not quantized)" in str(report)
    assert report.stored_bytes == summarize(convert_model(net)).stored_bytes


def test_a_deployed_model() -> None:
    net = prepared(Net(), "w4a8")
    report, source = summarize(convert_model(net)), summarize(net)
    assert [one.name for one in report.layers] == ["conv1", "conv2", "fc"]
    for one, other in zip(report.layers, source.layers, strict=True):
        assert one.stored_bytes == other.stored_bytes
        weight, before = one.tensors["weight"], other.tensors["weight"]
        assert (weight.dtype, weight.bits) == ("int8", before.bits), "what is stored, and the bits that its integers need"
        assert weight.scale == before.scale
        assert weight.signal_to_noise is None
        assert one.tensors["_input_"].scale == other.tensors["_input_"].scale
    assert "float weights are gone" in str(report)


def test_a_deployed_activation_is_unsigned_and_it_is_said() -> None:
    signed = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
    net = prepared(Net(), [{"op_names": ["conv1"], "target_names": ["_input_"], "target_settings": {"_input_": signed}}])
    before, report = layer(summarize(net), "conv1").tensors["_input_"], summarize(convert_model(net))
    after = layer(report, "conv1").tensors["_input_"]
    assert (before.dtype, before.zero_point) == ("int8", (0, 0))
    assert (after.dtype, after.zero_point, after.scale) == ("uint8", (128, 128), before.scale)
    assert "deployed activations are unsigned integers: what was configured as int8 is uint8, its zero point" in str(report)
    weights = convert_model(prepared(Net(), "int8-weight-only"))
    assert "unsigned" not in str(summarize(weights))


def test_neither_prepared_nor_deployed_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"summarize: Net is neither prepared nor deployed nor pruned; call prepare_model\(model, plan\)"
    ):
        summarize(Net())
    with pytest.raises(ConfigError, match="neither prepared nor deployed"):
        summarize(restore_model(prepared(Net())))


def test_after_a_fit(quiet_trainer: Callable[..., Trainer]) -> None:
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    report = summarize(model, example_input=X)
    assert report.model == "Lit"
    assert report.signal_to_noise is not None and report.signal_to_noise > 20
    assert callback.deployed_model is not None
    assert summarize(callback.deployed_model).stored_bytes == report.stored_bytes


def test_a_forward_that_fails_leaves_everything_as_it_was() -> None:
    net = prepared(Net())
    state, phases = copy.deepcopy(quantizer_state(net)), fingerprint(net)
    with pytest.raises(
        ConfigError, match=r"example_input: the forward of Net failed: .*channels.* Give what the model is called"
    ):
        summarize(net, example_input=torch.randn(2, 5, 8, 8))
    for model in (net, convert_model(net)):
        with pytest.raises(
            ConfigError, match=r"example_input: the forward of Net failed: .*Give what the model is called with: a"
        ):
            summarize(model, example_input="foo")
    assert quantizer_state(net) == state
    assert [one[:3] for one in fingerprint(net)] == [one[:3] for one in phases]
    assert net.training


class Branching(nn.Module):
    """Calls its layer, which changes nothing in float, twice if it has changed something."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if torch.equal(y, x) else self.fc(y)


def test_what_is_called_otherwise_when_rounded_is_left_out() -> None:
    net = Branching()
    prepare_model(net, make_plan(net, [{"op_types": ["Linear"]}], example_input=torch.randn(3, 4))).train()
    net(torch.randn(3, 4))
    report = summarize(net, example_input=torch.randn(3, 4))
    assert "called otherwise when rounded than in float, and left out: fc._input_" in report.notes[0]
    assert layer(report, "fc").tensors["_input_"].signal_to_noise is None


# -- how it is shown ------------------------------------------------------------------------------------------------------


class Checked(html.parser.HTMLParser):
    """Refuses tags that do not close and whatever is loaded or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.cells = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "table", "thead", "tbody", "tr", "th", "td"), tag
        assert {name for name, _ in attrs} <= {"style", "title"}
        assert all("url(" not in (value or "") for _, value in attrs)
        self.open.append(tag)
        self.cells += tag == "td"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_report_in_a_notebook() -> None:
    report = summarize(prepared(Net()), example_input=X)
    found = Checked(report._repr_html_())
    assert {"layer", "conv1", "bn1, relu1", "weight dB", "total"} <= set(found.text)
    assert found.cells % (len(report.layers) + 1) == 0
    assert "linear-gradient" in report._repr_html_()
    assert re.search(r'title="_output_ uint8 affine per_tensor range 0 \.\. [\d.]+ scale', report._repr_html_())
    assert not re.search(r"(?<![-\w])(color|background):\s*(#|black|white)", report._repr_html_()), "the theme's own colours"


def test_a_plan_in_a_notebook() -> None:
    net = nn.Sequential()
    net.add_module("<img src=x>", nn.Linear(4, 4))
    plan = make_plan(net, [{"op_types": ["Linear"]}], example_input=torch.randn(2, 4))
    found = Checked(plan._repr_html_())
    assert "<img src=x>" in found.text
    assert "decided by" in found.text
    prepare_model(net, plan).train()(torch.randn(2, 4))
    assert "<img src=x>" in Checked(summarize(net)._repr_html_()).text


def test_text_is_aligned() -> None:
    lines = str(summarize(prepared(Net()), example_input=X)).splitlines()
    widths = [len(part) for part in lines[1].split("  ")]
    assert lines[0].startswith("layer  type    fused with")
    assert [line for line in lines if line.startswith("total")]
    ends = np.cumsum([width + 2 for width in widths]) - 2
    assert all(len(line) <= ends[-1] for line in lines[:6])
    column = lines[0].index("weight dB") + len("weight dB")
    assert all(line[column - 1].isdigit() for line in lines[2:5]), "numbers end at the right"


def test_tables() -> None:
    head: tuple[str, ...] = ("name", "n")
    rows: list[tuple[str | Cell, ...]] = [("a", "1"), (Cell("long", bar=2.0, good=-1.0, title='"'), "22")]
    assert text_table(head, rows, right=["n"], notes=["said"]) == "name   n\n----  --\na      1\nlong  22\nsaid"
    found = html_table(head, rows, right=["n"], notes=["<b>"], caption="c", total=("sum", "23"))
    assert "hsla(0,75%,45%,.35) 100%" in found
    assert 'title="&quot;"' in found
    assert Checked(found).text == ["c", "name", "n", "a", "1", "long", "22", "sum", "23", "<b>"]


def test_rows_are_a_dataframe() -> None:
    report = summarize(prepared(Net()), example_input=X)
    rows = report.rows()
    assert [row["name"] for row in rows] == ["conv1", "conv2", "fc"]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(isinstance(value, int | float | str | None) for row in rows for value in row.values())
    assert rows[0]["fused"] == "bn1, relu1"
    assert rows[0]["output_scale_least"] == rows[0]["output_scale_greatest"] is not None
    assert rows[2]["output_dtype"] is None
    found = json.loads(json.dumps(report.to_dict()))
    assert found["layers"][0]["tensors"][1]["signal_to_noise"] == rows[0]["weight_signal_to_noise"]
    assert found["stored_bytes"] == report.stored_bytes


def test_a_weight_that_loses_nothing() -> None:
    fc = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        fc.weight.copy_(torch.tensor([[127.0, 3.0], [-127.0, 5.0]]))
    report = summarize(prepared(nn.Sequential(fc), x=torch.randn(3, 2)))
    ratio = report.layers[0].tensors["weight"].signal_to_noise
    assert ratio == math.inf
    assert "exact" in str(report)
    assert "exact" in Checked(report._repr_html_()).text


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = prepared(ZOO["MobileNetV2"].make(), "int8", ZOO["MobileNetV2"].example())
    report = summarize(net, example_input=ZOO["MobileNetV2"].example())
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    ratios, ranges, sizes = figure.axes
    assert [label.get_text() for label in ratios.get_yticklabels()] == [one.name for one in report.layers]
    known = [one.worst("weight") for one in report.layers]
    expected = [one.signal_to_noise for one in known if one is not None and one.signal_to_noise not in (None, math.inf)]
    weights = next(bars for bars in ratios.containers if bars.get_label() == "weight")
    assert [bar.get_width() for bar in weights] == pytest.approx(expected)
    assert [bar.get_width() for bar in sizes.containers[1]] == pytest.approx(
        [(one.stored_bytes or 0) / 1000 for one in report.layers]
    )
    assert {bars.get_label() for bars in ranges.containers} == {"input", "output"}
    assert summarize(convert_model(net)).plot() is not figure, "a deployed model has one, too"


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"plot: needs matplotlib; install lightning_quant\[report\], or matplotlib itself."):
        summarize(prepared(Net())).plot()
