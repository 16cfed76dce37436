# SPDX-License-Identifier: Apache-2.0
"""Owns the comparison of a file with its model, layer by layer, and the choices that change the file and not its numbers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import run_recorded
from lightning.pytorch import LightningModule
from onnx import TensorProto, numpy_helper
from test_convert import CONFIGS, trained
from test_fusion import prepared
from test_mnist import optimized_ops
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import FUSED

from lightning_quant import (
    ConfigError,
    ParityError,
    convert_model,
    export_model,
    formats,
    load_deployed,
    make_plan,
    prepare_model,
)
from lightning_quant.execution import execution_report
from lightning_quant.export import check_parity, export_with_reports, onnxruntime_session
from lightning_quant.onnx_graph import write_onnx
from lightning_quant.parity import layer_parity, output_parity, outputs_parity, wrong_integers
from lightning_quant.prepare import simulated
from lightning_quant.program import Tap, only_integers_meet_grids, program_of

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def run_onnx(path: Path, x: Tensor, *, exact_sums: bool = True) -> Tensor:
    session = onnxruntime_session(path, exact_sums=exact_sums)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


# -- the report -------------------------------------------------------------------------------------------------------------


def test_every_layer_is_compared(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["quantized logits"]))
    for suffix in (".onnx", ".pt2"):
        report = export_with_reports(deployed, tmp_path / f"model{suffix}", example_input=X).parity
        found = [(layer.name, layer.values, layer.different, layer.equal, layer.most, layer.mean) for layer in report.layers]
        sizes = {"conv1": [32 * 3 * 64, 32 * 8 * 64], "conv2": [32 * 8 * 64], "fc": [32 * 128, 32 * 4]}  # of 32 of 48 samples
        assert found == [(name, size, 0, 1.0, 0.0, 0.0) for name, each in sizes.items() for size in each]
        (output,) = report.outputs
        assert (output.most, output.mean, output.relative, output.agreement, output.classes) == (0, 0, 0, 1, 48)
        assert output.step == pytest.approx(float(deployed.get_submodule("fc").y.scale))  # type: ignore[union-attr, arg-type]
        assert report.first is None
        assert (report.integers, report.different) == (sum(sum(each) for each in sizes.values()), 0)


def shifted(path: Path, name: str) -> None:
    """Move the weights of a layer in a file by one level."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.int8(1), name))
    onnx.save(model, path)


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written has other weights in conv2."""

    def write(program: Any, path: Path, **choices: Any) -> None:
        write_onnx(program, path, **choices)
        shifted(path, "conv2.weight")

    monkeypatch.setitem(formats.FORMATS, ".onnx", (write, formats.run_onnx))


@pytest.mark.usefixtures("tampered")
def test_the_first_layer_that_differs_is_named(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["affine"]))
    with pytest.raises(ParityError, match=r"output 0 differs .*nothing was written.* The first layer that differs is 'conv2' \("):
        export_model(deployed, tmp_path / "model.onnx", example_input=X)
    with pytest.raises(
        ParityError, match=r"in layer 'conv2' only .*% of the integers equal .*at least 99\.0000%.*Lower min_equal"
    ):
        export_model(deployed, tmp_path / "model.onnx", example_input=X, atol=10, min_equal=0.99)
    assert not list(tmp_path.iterdir())
    report = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X, atol=10).parity
    assert report.first is not None
    assert (report.first.name, report.first.value) == ("conv2", "conv_1")
    assert [layer.different > 0 for layer in report.layers] == [False, False, True, True]


@pytest.mark.usefixtures("tampered")
def test_differences_are_counted_as_by_hand(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["affine"]))
    report = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X[:32], atol=10).parity
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("conv_1", TensorProto.UINT8, None))
    onnx.save(model, tmp_path / "more.onnx")
    output, integers = onnxruntime_session(tmp_path / "more.onnx").run(None, {"x": X[:32].numpy()})
    expected, made = run_recorded(deployed, X[:32])
    gap = np.abs(integers.astype(int) - made[3].numpy().astype(int))
    (layer,) = (layer for layer in report.layers if layer.value == "conv_1")
    assert layer.different == int((gap > 0).sum())
    assert layer.most == int(gap.max())
    assert layer.mean == pytest.approx(gap.mean())
    off, largest = np.abs(output - expected.numpy()), float(expected.abs().max())
    (end,) = report.outputs
    assert end.step is None
    assert end.most == pytest.approx(off.max() / largest)
    assert end.mean == pytest.approx(off.mean() / largest)
    assert end.same == (output.argmax(1) == expected.numpy().argmax(1)).sum()


def test_a_report_is_a_table(tmp_path: Path) -> None:
    report = export_with_reports(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X).parity
    text = str(report)
    assert "file, deployed       0    0     0  relative     100.00%" in text
    assert ["conv2", "conv_1", "16,384", "100.0000%", "0", "0"] in [line.split() for line in text.splitlines()]
    assert "file: model.onnx; first layer that differs: none" in text
    html = report._repr_html_()
    assert html.count("<table") == 2
    assert "conv2" in html
    assert report.summary() == "43,008 of 43,008 integers equal; outputs equal"


def test_a_model_without_integers_has_no_table_of_layers(tmp_path: Path) -> None:
    exported = export_with_reports(nn.Linear(3, 2).eval(), tmp_path / "model.onnx", example_input=torch.randn(4, 3))
    assert exported.parity.layers == ()
    assert str(exported.parity).endswith("file: model.onnx")


# -- later, on real batches -------------------------------------------------------------------------------------------------


def test_parity_on_batches_with_the_prepared_model(tmp_path: Path) -> None:
    net = trained(FUSED)
    deployed = convert_model(net)
    for suffix in (".onnx", ".pt2"):
        path = export_model(deployed, tmp_path / f"model{suffix}", example_input=X[:4])
        report = check_parity(deployed, path, [X[:16], (X[16:],)], prepared=net)
        assert sum(layer.values for layer in report.layers if layer.value == "conv") == 48 * 8 * 64
        assert report.different == 0
        file, evaluated, fake = report.outputs
        assert (file.pair, file.classes, file.relative <= 1e-6) == ("file, deployed", 48, True)
        assert (evaluated.pair, evaluated.most, evaluated.same) == ("deployed, prepared in eval", 0, 48)
        with torch.no_grad():
            ours = [deployed(part) for part in (X[:16], X[16:])]
            with simulated(net):
                theirs = [net(part) for part in (X[:16], X[16:])]
        gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
        assert fake.pair == "deployed, fake-quantized"
        assert fake.relative == pytest.approx(max(gaps), rel=1e-5)
        assert fake.same == sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in zip(ours, theirs, strict=True))
    assert net.training is False


def test_parity_of_another_model(tmp_path: Path) -> None:
    path = export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    with pytest.raises(ParityError, match=r"model\.onnx: output 0 differs .*the file was not changed"):
        check_parity(convert_model(trained(CONFIGS["symmetric"])), path, [X])


def test_check_parity_refuses(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.pt2", example_input=X)
    with pytest.raises(ConfigError, match="batches: there is none"):
        check_parity(deployed, path, [])
    with pytest.raises(ConfigError, match=r"absent\.onnx': there is no such file"):
        check_parity(deployed, tmp_path / "absent.onnx", [X])
    with pytest.raises(ConfigError, match=r"unknown suffix '\.bin'"):
        check_parity(deployed, tmp_path / "model.bin", [X])
    with pytest.raises(ConfigError, match="prepared: Net is not prepared"):
        check_parity(deployed, path, [X], prepared=deployed)
    with pytest.raises(ConfigError, match=r"weights\.pt': a \.pt file is compared number by number when it is written"):
        check_parity(deployed, export_model(deployed, tmp_path / "weights.pt"), [X])
    whole = export_model(deployed, tmp_path / "model.onnx", example_input=X).read_bytes()
    for content in (b"", whole[:3000], path.read_bytes()):  # nothing, a part, a program under this name
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ConfigError, match=r"model\.onnx' is damaged, or no \.onnx file: onnxruntime says"):
            check_parity(deployed, tmp_path / "model.onnx", [X])
        with pytest.raises(ConfigError, match=r"model\.onnx' is no \.onnx file that export_model wrote, or is damaged"):
            execution_report(tmp_path / "model.onnx")


class Named(nn.Module):
    """An addition, a mean, and a layer whose name is that of a part of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end((self.first(x) + x).mean((2, 3)))
        return out


def test_layers_have_the_plans_names(tmp_path: Path) -> None:
    net = Named()
    plan = make_plan(net, ["int8"], example_input=X)
    prepare_model(net, plan)
    net.train()(X)
    path = tmp_path / "model.pt2"
    report = export_with_reports(convert_model(net.eval()), path, example_input=X).parity
    assert {"first", "add", "mean"} <= {layer.name for layer in report.layers} <= {layer.name for layer in plan.layers}


@pytest.mark.parametrize("batches", [None, 5, X, {"x": X}, "x"], ids=["None", "number", "tensor", "dict", "text"])
def test_what_is_no_list_of_batches(batches: Any, tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.pt2", example_input=X)
    with pytest.raises(ConfigError, match=f"batches: expected a list of example inputs, .* got a {type(batches).__name__}"):
        check_parity(deployed, path, batches)


def test_a_loaders_batches_hold_labels(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.pt2", example_input=X)
    data = DataLoader(TensorDataset(X, torch.zeros(len(X))), batch_size=16)
    with pytest.raises(
        ConfigError, match=r"batches\[0\]: the forward of Net fails on this list: .*\(\(images,\) for images, _ in"
    ):
        check_parity(deployed, path, data)
    assert check_parity(deployed, path, ((images,) for images, _ in data)).different == 0


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_batches_of_another_size_than_a_file_takes(suffix: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / f"model{suffix}", example_input=X[:40], dynamic_batch=False)
    for example, free in ((X[:40], True), (X[:10], False)):
        with pytest.raises(
            ConfigError, match=r"(?s)batches\[0\]: model.* cannot be run on it: .*give such, and dynamic_batch=False"
        ):
            check_parity(deployed, path, [example], dynamic_batch=free)
    assert check_parity(deployed, path, [X[:40]], dynamic_batch=False).different == 0


class Wrapped(LightningModule):
    """The net is inside, as where a step calls it; there is no forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_a_prepared_module_that_cannot_be_called(tmp_path: Path) -> None:
    net = trained(FUSED)
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "model.pt2", example_input=X)
    with pytest.raises(ConfigError, match=r"prepared, called with batches\[0\]: the forward of Wrapped fails on this Tensor"):
        check_parity(deployed, path, [X], prepared=Wrapped(net))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt"])
def test_what_the_model_cannot_be_called_with(suffix: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    wrong: dict[str, Any] = {
        "the forward of Net fails on this list: .* give the inputs alone": [X],
        "the forward of Net fails on this tuple: .*takes 2 positional arguments": (X, torch.zeros(48)),
        "the forward of Net fails on this Tensor: .*to have 3 channels": torch.randn(4, 1, 8, 8),
        "no tensor in it, but a ndarray; give what the model is called with: a tensor": X.numpy(),
        "no tensor in it, but a DataLoader; give": DataLoader(TensorDataset(X)),
    }
    for message, example in wrong.items():
        with pytest.raises(ConfigError, match=rf"(?s)^example_input: {message}"):
            export_model(deployed, tmp_path / f"model{suffix}", example_input=example)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_in_a_weight_of_an_onnx_file_is_named(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.onnx", example_input=X)
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "conv2.weight")
    content = bytearray(weight.raw_data)
    content[7] ^= 0x40
    weight.raw_data = bytes(content)
    onnx.save(model, path)
    with pytest.raises(ParityError, match=r"the file was not changed\. The first layer that differs is 'conv2'"):
        check_parity(deployed, path, [X])


class Residual(nn.Module):
    """Float operators between grids: an addition, a norm, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y) + y)
        out: Tensor = self.fc(self.norm(self.c(y).mean((2, 3))))
        return out


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(1)
    net = Residual()
    prepare_model(net, make_plan(net, "int8", example_input=X))
    for _ in range(3):
        net.train()(X)
    return convert_model(net.eval())


@pytest.fixture(scope="module")
def residual_file(residual: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(residual, tmp_path_factory.mktemp("residual") / "model.onnx", example_input=X)


def with_other(path: Path, name: str, change: Any, folder: Path) -> Path:
    """The file with another tensor under this name."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    onnx.save(model, folder / "other.onnx")
    return folder / "other.onnx"


@pytest.mark.parametrize(
    ("name", "layer", "change"),
    [
        ("a.bias", "a", lambda b: b + b.dtype.type(30)),
        ("b.weight", "b", lambda w: np.where(np.arange(w.size).reshape(w.shape) == 7, w // 2, w)),  # one of 576
        ("norm.bias", "fc", lambda b: b + np.float32(0.004)),
        ("fc.bias", "", lambda b: b + b.dtype.type(9)),
    ],
)
def test_default_bounds_find_a_wrong_layer_between_float_operators(
    name: str, layer: str, change: Any, residual: nn.Module, residual_file: Path, tmp_path: Path
) -> None:
    other = with_other(residual_file, name, change, tmp_path)
    assert check_parity(residual, other, [X], min_equal=0).outputs[0].relative < 5e-2, "it is not much"
    with pytest.raises(ParityError, match=rf"layer '{layer}' computes something else" if layer else "output 0 differs by .* own"):
        check_parity(residual, other, [X])


def test_an_honest_file_with_float_operators_keeps_the_default_bounds(residual: nn.Module, residual_file: Path) -> None:
    assert not only_integers_meet_grids(program_of(residual, X, True))
    assert check_parity(residual, residual_file, [X, X[:5] * 0.7]).different <= 9


def test_a_layer_does_not_answer_for_those_before_it(residual: nn.Module, residual_file: Path, tmp_path: Path) -> None:
    other = with_other(residual_file, "a.bias", lambda b: b + b.dtype.type(300), tmp_path)
    layers = check_parity(residual, other, [X], min_equal=0).layers
    assert sum(layer.different > 0 for layer in layers) > 3
    assert {layer.name for layer in layers if layer.wrong} == {"a"}


@pytest.mark.parametrize("options", [{"signed": True}, {"profile": "openvino"}], ids=str)
def test_honest_files_of_other_styles_keep_the_default_bounds(
    options: dict[str, Any], residual: nn.Module, tmp_path: Path
) -> None:
    exported = export_with_reports(residual, tmp_path / "model.onnx", example_input=X, **options)
    assert check_parity(residual, exported.path, [X]).different <= 9
    assert exported.execution is not None
    reasons = {(node.operator, node.reason, node.remedy) for node in exported.execution.nodes if not node.integer}
    why = ("onnxruntime leaves signed activations that two operators read, and makes the others unsigned", "leave out signed")
    assert ({("Conv", *why), ("Add", *why)} <= reasons) == ("signed" in options)


def test_a_tie_may_go_either_way_in_float_alone() -> None:
    ops = torch.ops.lightning_quant
    x = torch.tensor([0.5, 1.48, 1.496, 2.6, 300.0, float("nan")])
    found = torch.tensor([1, 2, 2, 3, 255, 7], dtype=torch.int32)

    def model(x: Tensor) -> Tensor:
        out: Tensor = ops.dequantize(ops.quantize(x, 1.0, 0, 0, 255), 1.0, 0)
        return out

    outputs, wrong = wrong_integers(model, x, {0: found}, exact=())
    assert wrong == {0: 1}, "1.48 is no tie"
    assert outputs[0].tolist() == found.tolist(), "the rest of the model reads the file's"
    assert wrong_integers(model, x[:3], {0: found[:3]}, exact={0})[1] == {0: 3}
    assert wrong_integers(model, x, {0: found[:2]}, exact=())[1] == {0: 6}, "another shape"


# -- differences, by hand ---------------------------------------------------------------------------------------------------

TAP = Tap(place=0, value="conv", layer="conv1")


def test_integers_of_a_signed_grid_are_the_same_moved() -> None:
    ours = torch.tensor([0, 128, 255, 7], dtype=torch.uint8)
    found = layer_parity(TAP, torch.tensor([-128, 0, 127, -120], dtype=torch.int8), ours)
    assert (found.different, found.most, found.mean, found.equal) == (1, 1.0, 0.25, 0.75)
    wide = layer_parity(TAP, torch.tensor([-32768, 32767], dtype=torch.int16), torch.tensor([0, 65535]).to(torch.uint16))
    assert wide.different == 0


def test_another_shape_differs_everywhere() -> None:
    found = layer_parity(TAP, torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    assert (found.different, found.values, found.most) == (3, 3, math.inf)
    assert output_parity("a, b", 0, torch.zeros(2), torch.zeros(3), None).relative == math.inf


def test_an_output_on_a_grid_is_compared_in_steps() -> None:
    found = output_parity("a, b", 0, torch.tensor([[1.0, 2.5], [4.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5)
    assert (found.most, found.mean, found.relative) == (2.0, 1.25, 0.25)
    assert (found.classes, found.same, found.agreement) == (2, 1, 0.5)
    assert output_parity("a, b", 0, torch.ones(2), torch.ones(2), None).agreement is None


def test_classes_are_in_dimension_one() -> None:
    wanted = torch.zeros(2, 3, 4, 5)
    wanted[:, 1] = 1
    found = wanted.clone()
    found[0, 2, 0, :4] = 2
    maps = output_parity("a, b", 0, found, wanted, None)
    assert (maps.classes, maps.same) == (40, 36)
    unknown = output_parity("a, b", 0, found[..., 0], wanted[..., 0], None)  # tokens or signals
    assert (unknown.classes, unknown.agreement) == (0, None)


def test_nan_and_infinity() -> None:
    nan, inf = float("nan"), float("inf")
    assert output_parity("a, b", 0, torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0]), None).relative == 0
    assert output_parity("a, b", 0, torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0]), None).relative == inf


def test_another_number_of_outputs() -> None:
    (found,) = outputs_parity("a, b", [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], [None, None])
    assert (found.index, found.relative) == (1, math.inf)


# -- choices: the file changes, the integers do not --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"signed": True}, {"profile": "openvino"}, {"profile": "openvino", "signed": True}], ids=str)
@pytest.mark.parametrize("name", ["affine", "symmetric", "int8 symmetric"])
def test_choices_keep_every_integer(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS[name], nn.ReLU6))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X, atol=1e-4, **options)
    assert exported.parity.integers == 43_008
    assert exported.parity.different == 0
    model = onnx.load(exported.path)
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name in zeros}
    assert types == {TensorProto.INT8 if "signed" in options else TensorProto.UINT8}
    makers = {out: node.op_type for node in model.graph.node for out in node.output}
    clips = [node for node in model.graph.node if node.op_type in ("Clip", "Relu")]
    assert bool(clips) == ("symmetric" in name)
    assert all(
        (makers[node.input[0]] == "QuantizeLinear") == ("profile" not in options) for node in clips if node.input[0] in makers
    )


SIGNED = [{**FUSED[0], "quant_dtype": "int8", "quant_scheme": "symmetric"}]


def test_the_tensorrt_profile_has_zero_points_of_zero_alone(tmp_path: Path) -> None:
    deployed = convert_model(trained(SIGNED))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X, profile="tensorrt")
    assert exported.parity.different == 0
    model = onnx.load(exported.path)
    tensors = stored(exported.path)
    linear = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert linear
    for node in linear:
        zero = numpy_helper.to_array(tensors[node.input[2]])
        assert zero.dtype == np.int8
        assert not zero.any()
    assert not [
        tensor for tensor in tensors.values() if tensor.data_type == TensorProto.INT32 and tensor.name.endswith("bias_int")
    ]
    with pytest.raises(ConfigError, match=r"zero point 0 alone, and those of 'conv1'.* have another.*quant_scheme 'symmetric'"):
        export_model(convert_model(trained(FUSED)), tmp_path / "other.onnx", example_input=X, profile="tensorrt")
    with pytest.raises(ConfigError, match="signed=False asks for unsigned ones"):
        export_model(deployed, tmp_path / "other.onnx", example_input=X, profile="tensorrt", signed=False)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("options", [{"profile": "openvino"}, {"signed": True}, {"metadata": {}}], ids=str)
def test_choices_of_onnx_files_are_refused_for_programs(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}: for \.onnx files alone, not for \.pt2"):
        export_model(convert_model(trained(FUSED)), tmp_path / "model.pt2", example_input=X, **options)


def test_an_unknown_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile: expected one of 'onnxruntime', 'openvino', 'tensorrt', got 'tflite'"):
        export_model(convert_model(trained(FUSED)), tmp_path / "m.onnx", example_input=X, profile="tflite")  # type: ignore[arg-type]


def weights_of(bits: int) -> list[dict[str, Any]]:
    return [{**FUSED[0], "target_settings": {"weight": {"quant_dtype": f"int{bits}"}}}]


def test_weights_of_four_bits_are_stored_in_four_and_run_in_int8(tmp_path: Path) -> None:
    deployed = convert_model(trained(weights_of(4)))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X)
    assert exported.parity.different == 0
    packed = {name.removesuffix("_int4"): t for name, t in stored(exported.path).items() if t.data_type == TensorProto.INT4}
    assert set(packed) == {"conv1.weight", "conv2.weight", "fc.weight"}
    for name, tensor in packed.items():
        assert len(tensor.raw_data) == math.ceil(math.prod(tensor.dims) / 2)
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), deployed.state_dict()[name].numpy())
    ops = optimized_ops(exported.path, tmp_path / "optimized.onnx")
    assert (ops["QLinearConv"], ops["QGemm"], ops["Cast"]) == (2, 1, 0)
    assert exported.execution is not None
    assert exported.execution.int8_share == 1.0


def test_weights_of_eight_bits_are_not_packed(tmp_path: Path) -> None:
    path = export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    assert not [tensor for tensor in stored(path).values() if tensor.data_type == TensorProto.INT4]


def test_reduce_range_rounds_nothing_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reduce_range: the weights of 'conv1', 'conv2', 'fc' need more than 7 bits.*'int7'"):
        export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X, reduce_range=True)
    deployed = convert_model(trained(weights_of(7)))
    path = export_model(deployed, tmp_path / "model.onnx", example_input=X, reduce_range=True)
    weights = [numpy_helper.to_array(t) for name, t in stored(path).items() if name.endswith("weight")]
    assert max(int(abs(weight.astype(int)).max()) for weight in weights) == 63
    with torch.no_grad():  # without the option that makes sums exact, on any CPU
        assert (run_onnx(path, X, exact_sums=False) - deployed(X)).abs().max() <= 1e-5


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = self.pool(x)
        x = torch.relu(self.conv2(x) + x[:, :, 1:-1, 1:-1])
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def after_steps(net: nn.Module, config: Any, example: Any) -> nn.Module:
    """The net, prepared and run in train mode."""
    prepare_model(net, make_plan(net, config, example_input=example))
    net.train()
    for _ in range(2):
        net(*(example if isinstance(example, tuple) else (example,)))
    return net.eval()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_height_and_width_are_free_where_asked_for(suffix: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 12, 12)
    deployed = convert_model(after_steps(Convolutions(), "int8", x))
    path = export_model(deployed, tmp_path / f"model{suffix}", example_input=x, dynamic_size=True)
    run = load_deployed(path) if suffix == ".pt2" else lambda one: run_onnx(path, one)
    for shape in [(1, 3, 12, 12), (7, 3, 20, 16), (2, 3, 9, 31)]:
        other = torch.randn(shape)
        with torch.no_grad():
            expected = deployed(other)
            assert (run(other) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_forward_of_one_size_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[2] == 8 else x

    with pytest.raises(ConfigError, match=r"(?s)Sized cannot be exported with free sizes.*give dynamic_size=False"):
        export_model(Sized().eval(), tmp_path / "model.pt2", example_input=X, dynamic_size=True)


def test_metadata(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.onnx", example_input=X, metadata={"config_list": "mine"})
    notes = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert notes["lightning_quant.torch"] == torch.__version__
    assert notes["lightning_quant.profile"] == "onnxruntime"
    assert notes["lightning_quant.config_list"] == "mine"
    grid = deployed.get_submodule("conv1").x
    assert f'"x": {{"scale": {grid.scale}, "zero_point": {grid.zero_point}, "dtype": "uint8"' in notes["lightning_quant.inputs"]  # type: ignore[union-attr]
    assert "/tmp" not in path.read_bytes().decode("latin1"), "no paths of the machine that wrote it"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(40, 6), nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.fc(self.table(words).mean(1))
        return out


@pytest.mark.parametrize("setting", [{}, {"granularity": "per_tensor"}, {"quant_scheme": "affine"}], ids=str)
def test_embeddings_look_up_integers(setting: dict[str, Any], tmp_path: Path) -> None:
    words = torch.randint(0, 40, (8, 5))
    config = [
        {"op_types": ["Linear"]},
        {"op_types": ["Embedding"], "target_names": ["weight"], "target_settings": {"weight": setting}},
    ]
    deployed = convert_model(after_steps(Words(), config, words))
    path = export_model(deployed, tmp_path / "model.onnx", example_input=words, atol=1e-5)
    tables = [stored(path)[node.input[0]] for node in onnx.load(path).graph.node if node.op_type == "Gather"]
    (table,) = [tensor for tensor in tables if list(tensor.dims) == [40, 6]]
    assert table.data_type == TensorProto.INT8
    assert not [t for t in stored(path).values() if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    with torch.no_grad():
        assert (run_onnx(path, words) - deployed(words)).abs().max() <= 1e-6


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_mean_may_be_what_the_model_returns(keepdim: bool, tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3), keepdim=keepdim)  # type: ignore[no-any-return]

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    deployed = convert_model(after_steps(Pooled(), [{"op_types": ["Conv2d"]}], x))
    export_model(deployed, tmp_path / "model.onnx", example_input=x)
    (found,) = onnxruntime_session(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), deployed(x), atol=1e-6)
    assert found.shape == ((4, 4, 1, 1) if keepdim else (4, 4))


def test_a_pool_that_an_addition_reads_stays_in_int8(tmp_path: Path) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(torch.relu(self.stem(x)))
            return torch.relu(self.conv(x) + x)

    deployed = convert_model(after_steps(Stem(), "int8", X))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=X)
    assert exported.parity.different == 0
    assert exported.execution is not None
    assert {node.operator: node.integer for node in exported.execution.nodes if not node.product} == {
        "NhwcMaxPool": True,
        "QLinearAdd": True,
    }


# -- fusion.md's cases ------------------------------------------------------------------------------------------------------


def test_c2_integers_lie_in_the_narrow_range(tmp_path: Path) -> None:
    path = export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    weights = {name: numpy_helper.to_array(tensor) for name, tensor in stored(path).items() if name.endswith("weight")}
    assert len(weights) == 3
    for weight in weights.values():
        assert weight.dtype == np.int8
        assert weight.min() >= -127
    assert not weights["conv1.weight"][1].any(), "gamma is 0 there"


def test_c3_only_integer_weights_and_no_batch_norm(tmp_path: Path) -> None:
    path = export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    graph, tensors = onnx.load(path).graph, stored(path)
    makers = {out: node for node in graph.node for out in node.output}
    assert not {"BatchNormalization", "Relu"} & {node.op_type for node in graph.node}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 3
    for node in products:
        types = [tensors[makers[name].input[0]].data_type for name in node.input[1:3]]
        assert types == [TensorProto.INT8, TensorProto.INT32]


def test_c6_a_channel_whose_gamma_is_nearly_zero_gives_its_beta(tmp_path: Path) -> None:
    net = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), [{"op_types": ["Conv2d"]}], X).train()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1e-9, 1e-12, -1e-10, 1.0]))  # type: ignore[index]
        net[1].bias.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # type: ignore[index]
    for _ in range(3):
        net(X)
    path = export_model(convert_model(net.eval()), tmp_path / "model.onnx", example_input=X)
    found = run_onnx(path, X)[:, :3]
    assert (found - 1).abs().max() <= 0.02  # half a step of the output's grid


def test_c7_the_grid_behind_relu6_ends_at_six(tmp_path: Path) -> None:
    net = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6()), [{"op_types": ["Conv2d"]}], X).train()
    with torch.no_grad():
        net[1].weight.fill_(9.0)  # type: ignore[index]
    for _ in range(3):
        assert net(X).max() > 5.9
    path = export_model(convert_model(net.eval()), tmp_path / "model.onnx", example_input=X)
    last = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"][-1]
    scale, zero = (numpy_helper.to_array(stored(path)[name]) for name in last.input[1:3])
    assert float(scale) <= float(np.float32(6 / 255))
    assert int(zero) == 0
    assert Counter(node.op_type for node in onnx.load(path).graph.node)["Clip"] == 0


# -- the benchmarks' nets ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "resnet18", "mobilenetv2"])
def test_onnxruntime_computes_every_integer_of_the_timed_nets(name: str, tmp_path: Path) -> None:
    """QLinearConv, QGemm, QLinearAdd, QLinearGlobalAveragePool and pools, on what they really read (C4, too)."""
    from timed_nets import NETS

    net = NETS[name]
    model, shape = net.make(), net.shape[1:]
    x = torch.randn(16, *shape)
    prepare_model(model, make_plan(model, "int8", example_input=x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(3):
        net.loss(model(torch.randn(16, *shape)), torch.randint(0, 10, (16,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = export_with_reports(convert_model(model.eval()), tmp_path / "model.onnx", example_input=x)
    assert exported.parity.integers > 300_000
    assert exported.parity.different == 0
    assert exported.parity.outputs[0].relative <= 1e-6
    assert exported.execution is not None
    assert exported.execution.int8_share == 1.0
    assert [node.operator for node in exported.execution.nodes if not node.integer] == (["LogSoftmax"] if name == "mnist" else [])
    ops = optimized_ops(exported.path, tmp_path / "optimized.onnx")
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BatchNormalization", "Relu", "Clip"} & set(ops)
