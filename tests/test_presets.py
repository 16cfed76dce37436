# SPDX-License-Identifier: Apache-2.0
"""Owns the presets on whole models, from plan to onnxruntime, and what onnxruntime must leave alone in their files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_fusion import prepared
from torch import Tensor, nn

from lightning_quant import ConfigError, convert_model, export_model, load_deployed, make_plan, prepare_model, restore_model
from lightning_quant.export import onnxruntime_session
from lightning_quant.layers import Plan

PRESETS = ["int8", "int8-weight-only", "w4a8"]


class Images(nn.Module):
    """conv, bn, relu, a convolution without a norm and relu6, pool, linear, relu, linear: (N, 3, 8, 8) to (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.down, self.relu6, self.pool = nn.Conv2d(8, 8, 3, stride=2), nn.ReLU6(), nn.MaxPool2d(2)
        self.fc, self.act, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu6(self.down(self.relu(self.bn(self.conv(x))))))
        y: Tensor = self.head(self.act(self.fc(x.flatten(1))))
        return y


class Words(nn.Module):
    """Embedding, a transformer layer, an LSTM and a linear layer: (N, L) indices to (N, L, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.lstm, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.encoder(self.table(x)))[0])
        return y


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def indices(count: int = 8) -> Tensor:
    return torch.randint(0, 30, (count, 5))


def evaluated(net: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net.eval()(*args, **kwargs)
    return found


def table(plan: Plan) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Members and targets of every layer: dtype, and granularity where it is not one scale."""
    return {
        layer.name: (
            layer.members,
            {t: f"{p.spec.dtype} {p.spec.granularity}".removesuffix(" per_tensor") for t, p in layer.targets.items()},
        )
        for layer in plan.layers
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_a_preset_for_images(preset: str) -> None:
    weight = {"weight": "int4 out_channel" if preset == "w4a8" else "int8 out_channel"}
    whole = {"_input_": "uint8", **weight, "_output_": "uint8"}
    inner = weight if preset == "int8-weight-only" else whole
    last = weight if preset == "int8-weight-only" else {"_input_": "uint8", **weight}
    plan = make_plan(Images(), preset, example_input=images())
    assert table(plan) == {
        "conv": (("bn", "relu"), inner),
        "down": (("relu6",), inner),
        "fc": (("act",), inner),
        "head": ((), last),
    }
    assert f"config_list[0] ('{preset}')" in str(plan)
    if preset == "int8":
        assert {layer.name: layer.targets["_input_"].source for layer in plan.layers} == {
            "conv": None,
            "down": "conv._output_",
            "fc": "down._output_",
            "head": "fc._output_",
        }


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_a_preset_for_words(preset: str) -> None:
    weight = "int4 out_channel" if preset == "w4a8" else "int8 out_channel"
    found = table(make_plan(Words(), preset, example_input=indices()))
    adds = [] if preset == "int8-weight-only" else ["encoder.add", "encoder.add_1"]
    assert list(found) == ["table", "encoder.self_attn", "encoder.linear1", "encoder.linear2", *adds, "lstm", "head"]
    assert found["table"] == ((), {"weight": weight})
    assert found["lstm"] == ((), {"weight_ih_l0": weight, "weight_hh_l0": weight})
    attention = {"in_proj_weight": weight, "out_proj.weight": weight}
    if preset == "int8-weight-only":
        assert found["encoder.self_attn"][1] == attention
        assert found["encoder.linear1"][1] == found["head"][1] == {"weight": weight}
    else:
        ends = {"_input_": "uint8", "_input_1": "uint8", "_input_2": "uint8"}
        assert found["encoder.self_attn"][1] == {**ends, **attention, "_output_": "uint8"}
        assert found["encoder.linear1"][1] == {"_input_": "uint8", "weight": weight, "_output_": "uint8"}
        assert found["head"][1] == {"_input_": "uint8", "weight": weight}


def test_presets_are_refined_by_later_entries() -> None:
    plan = make_plan(
        Images(), ["int8", {"op_names": ["fc"], "target_names": ["weight"], "quant_dtype": "int4"}], example_input=images()
    )
    found = table(plan)
    assert found["fc"] == (("act",), {"_input_": "uint8", "weight": "int4 out_channel", "_output_": "uint8"})
    assert found["conv"][1]["weight"] == "int8 out_channel"
    assert "overrules config_list[0] ('int8')" in str(plan)
    taken = table(make_plan(Images(), ["int8", {"op_names": ["conv"], "fuse_names": []}], example_input=images()))
    assert taken["conv"][0] == ()
    assert taken["down"][0] == ("relu6",), "of the named layer alone"
    named = table(make_plan(Images(), ["int8", {"op_names": ["conv"], "fuse_names": [["conv", "bn"]]}], example_input=images()))
    assert named["conv"][0] == ("bn",)
    alone = table(make_plan(Images(), ["int8", {"op_names": ["relu"]}], example_input=images()))
    assert alone["conv"][0] == ("bn",), "what is quantized by name of its own is not fused"
    assert alone["relu"][1] == {"_input_": "uint8", "_output_": "uint8"}


def test_a_preset_with_its_groups_taken_back_still_learns_and_deploys() -> None:
    net, x = Images(), images()
    prepare_model(net, make_plan(net, ["int8", {"op_names": ["conv"], "fuse_names": []}], example_input=x)).train()(x)
    deployed = convert_model(net)
    assert deployed.get_submodule("bn").geometry.kind == "scale"  # type: ignore[union-attr]
    assert isinstance(deployed.get_submodule("relu"), nn.Identity), "of the batch norm, a layer of its own now"
    assert isinstance(deployed.get_submodule("relu6"), nn.Identity)
    assert torch.equal(evaluated(deployed, x), evaluated(net, x))


def test_unknown_presets_and_models_without_anything_to_do() -> None:
    with pytest.raises(ConfigError, match=r"'int7'.*int8"):
        make_plan(Images(), ["int7"], example_input=images())
    with pytest.raises(ConfigError, match=r"the model has no layer that this preset quantizes; it has ReLU \(1\)"):
        make_plan(nn.Sequential(nn.ReLU()), "int8", example_input=images())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["images", "words"])
def test_a_preset_from_training_to_onnxruntime(kind: str, preset: str, tmp_path: Path) -> None:
    net, make = (Images(), images) if kind == "images" else (Words(), indices)
    example = make()
    keys = list(net.state_dict())
    prepare_model(net, make_plan(net, preset, example_input=example)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses: list[float] = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(example) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
    found, deployed = evaluated(net, example), convert_model(net)
    assert torch.equal(evaluated(deployed, example), found)
    assert list(net.state_dict()) == keys
    assert not [name for name, p in deployed.named_parameters() if p.dim() > 1], "every matrix is integers"
    other = make(3)
    expected = evaluated(deployed, other)
    restore_model(net)
    assert (evaluated(net, other) - expected).abs().mean() < (0.2 if preset == "w4a8" else 0.05) * expected.abs().mean()
    if (kind, preset) == ("words", "w4a8"):
        return  # in a file it is what int8 is, and exporting takes time
    path = export_model(deployed, tmp_path / "m.onnx", example_input=example)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    floats = [t for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT]
    assert not [t.name for t in floats if len(t.dims) > 1 and min(t.dims) > 1], "no float matrix in the file"
    session = onnxruntime_session(path)
    (again,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    difference = (torch.as_tensor(again) - expected).abs()
    assert difference.max() < (1e-5 if kind == "images" or preset == "int8-weight-only" else 0.05 * expected.abs().max())
    if (kind, preset) == ("images", "int8"):
        loaded = load_deployed(export_model(deployed, tmp_path / "m.pt2", example_input=example))
        assert torch.equal(evaluated(loaded, other), expected)


# -- what onnxruntime must leave alone -------------------------------------------------------------------------------


class Between(nn.Module):
    """Layers with float weights between quantized ones, each followed by what runtimes fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.up, self.fine, self.last = nn.ConvTranspose2d(4, 8, 2, stride=2), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(nn.functional.max_pool2d(self.b(self.a(x)).relu(), 2))
        x = self.up(x).relu().amax((2, 3))
        y: Tensor = self.last(self.fine(x).relu())
        return y


def test_float_layers_between_quantized_ones_stay_float_in_onnxruntime(tmp_path: Path) -> None:
    """onnxruntime rounds the float weights of a layer between grids to 8 bits, one scale each, unless it is held off."""
    net, x = Between(), torch.randn(16, 3, 12, 12)
    config = [
        {"op_names": ["a", "c", "last"], "target_names": ["_input_", "weight", "_output_"]},
        {"op_names": ["up"], "target_names": ["_input_"]},
    ]
    prepared(net, config, x).train()(x)
    deployed = convert_model(net)
    session = onnxruntime_session(export_model(deployed, tmp_path / "m.onnx", example_input=x))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    difference = (torch.as_tensor(found) - evaluated(deployed, x)).abs()
    assert (difference > 1e-5).float().mean() < 0.05, "a tipped level here and there, not other weights"


class Products(nn.Module):
    """One matrix from the left, one from the right, as a linear layer and in parts: three-dimensional data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.rows = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(-1, 16, 4, 4).transpose(1, 2) @ self.rows.view(4, 4, 16)
        return nn.functional.linear(self.left @ x @ self.right, self.rows) + heads.sum(1)


@pytest.mark.parametrize("ends", [(), ("_input_", "_output_")], ids=["weights", "all"])
def test_parameters_of_any_module_are_multiplied_as_they_are(ends: tuple[str, ...], tmp_path: Path) -> None:
    """onnxruntime takes scales of rows for scales of columns, or rounds the data to 8 bits, unless it is held off."""
    net, x = nn.Sequential(Products()), torch.randn(4, 16, 16)
    settings: dict[str, Any] = {name: {} for name in (*ends, "left", "right", "rows")}
    prepared(net, [{"op_names": ["0"], "target_settings": settings}], x).train()(x)
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "m.onnx", example_input=x)
    assert {t.name for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8} >= {
        "0.left",
        "0.right",
        "0.rows",
    }
    session = onnxruntime_session(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = evaluated(deployed, x)
    assert ((torch.as_tensor(found) - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.002


# -- encoders with masks ---------------------------------------------------------------------------------------------


def test_an_encoder_with_a_padding_mask() -> None:
    """In eval mode torch's encoder hands nested tensors on (and warns), for a kernel of its own that reads float weights."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.encoder(x, src_key_padding_mask=mask)
            return y

    net, x, mask = Masked(), torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = evaluated(copy.deepcopy(net), x, mask)
    plan = make_plan(net, "int8", example_input=(x, mask))
    before = [(name, vars(module).get("use_nested_tensor")) for name, module in net.named_modules()]
    prepare_model(net, plan).train()(x, mask)
    found = evaluated(net, x, mask)
    assert torch.equal(evaluated(convert_model(net), x, mask), found)
    assert (found - expected)[:, :3].abs().max() < 0.1
    restore_model(net)
    assert [(name, vars(module).get("use_nested_tensor")) for name, module in net.named_modules()] == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(evaluated(net, x, mask), expected)
    assert not any("lightning_quant" in key for module in net.modules() for key in vars(module))


def test_a_whole_transformer() -> None:
    net = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
    given = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    expected = evaluated(copy.deepcopy(net), *given)
    plan = make_plan(net, "int8", example_input=given)
    cross = next(layer for layer in plan.layers if layer.name.endswith("multihead_attn"))
    assert cross.targets["_input_"].source is None
    assert cross.targets["_input_2"].source == "decoder.layers.0.multihead_attn._input_1", "key and value are one tensor"
    prepare_model(net, plan).train()(*given).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    found = evaluated(net, *given)
    assert torch.equal(evaluated(convert_model(net), *given), found)
    assert (found - expected).abs().max() < 0.1
