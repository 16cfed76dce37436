# SPDX-License-Identifier: Apache-2.0
"""Owns programs in other people's operators: they compute what is deployed, and torchao's lowering finds its kernels in them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import CONFIGS
from test_convert import trained as trained_net
from test_zoo import assert_close, called, output_steps, trained
from torch import nn
from toys import Net
from zoo import ZOO

from lightning_quant import (
    ConfigError,
    ParityError,
    QuantFusionCallback,
    convert_model,
    export_model,
    load_deployed,
    make_plan,
    prepare_model,
)
from lightning_quant.record import split_example
from lightning_quant.targets import tensors_in

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
SOME = ["ResidualZeroGamma", "MobileNetV2", "DCGANGenerator", "HandEncoder", "LSTMTagger", "TabularNet", "ModuleContainers"]


def written(deployed: nn.Module, path: Path, example: Any, **options: Any) -> Counter[str]:
    """Export in the dialect; how often each operator is called."""
    export_model(deployed, path, example_input=example, dialect="quantized_decomposed", **options)
    return Counter(str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function")


def after_steps(net: nn.Module, config: Any, example: torch.Tensor) -> nn.Module:
    """The deployed net after two forwards in training."""
    prepare_model(net, make_plan(net, config, example_input=example))
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(example)
    return convert_model(net.eval())


@pytest.mark.parametrize("name", SOME)
def test_a_program_in_the_dialect_computes_what_is_deployed(name: str, tmp_path: Path) -> None:
    one, path = trained(name), tmp_path / "model.pt2"
    ops = written(one.deployed, path, one.example, dynamic_batch=ZOO[name].dynamic)
    assert not [op for op in ops if op.startswith("lightning_quant")]
    assert ops["quantized_decomposed.quantize_per_tensor.default"] > 0
    args, kwargs = split_example(one.fresh)
    with torch.no_grad():
        found = list(tensors_in(load_deployed(path)(*args, **kwargs)))
        assert_close(found, called(one.deployed, one.fresh), output_steps(name, one), 0.99, 0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_be_written(name: str, tmp_path: Path) -> None:
    deployed, path = convert_model(trained_net(CONFIGS[name])), tmp_path / "model.pt2"
    written(deployed, path, X)
    with torch.no_grad():
        found, wanted = load_deployed(path)(X[:3]), deployed(X[:3])
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_a_tensor_is_quantized_once(tmp_path: Path) -> None:
    ops = written(convert_model(trained_net(CONFIGS["default"])), tmp_path / "model.pt2", X)
    quantize, back = (ops[f"quantized_decomposed.{name}.default"] for name in ("quantize_per_tensor", "dequantize_per_tensor"))
    assert ops["quantized_decomposed.dequantize_per_channel.default"] == 3  # of the weights
    # The input, after each convolution, and behind the pooling, which passes floats on.
    assert (quantize, back) == (4, 4)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("model.pt2", {"dialect": "mlir"}, "dialect: expected one of 'lightning_quant', 'quantized_decomposed', got 'mlir'"),
        ("model.onnx", {"dialect": "quantized_decomposed"}, r"dialect: for \.pt2 files alone, not for \.onnx"),
        ("weights.pt", {"dialect": "quantized_decomposed"}, r"dialect: for \.pt2 files alone, not for \.pt\."),
    ],
)
def test_what_cannot_be_written_is_refused(path: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(convert_model(trained_net(CONFIGS["default"])), tmp_path / path, example_input=X, **options)
    assert not list(tmp_path.iterdir())


def test_it_is_an_option_of_the_callback_and_its_bound_can_be_set(tmp_path: Path) -> None:
    QuantFusionCallback("int8", export={".pt2": {"dialect": "quantized_decomposed"}})
    deployed = convert_model(trained_net(CONFIGS["default"]))
    with pytest.raises(ParityError, match="differs from the deployed model's by"):
        written(deployed, tmp_path / "model.pt2", X, atol=0)
    assert not list(tmp_path.iterdir())


def test_what_is_flattened_behind_a_convolution_is_copied_first(tmp_path: Path) -> None:
    """An integer convolution of torchao's leaves channels last, where a view of all of them fails."""
    path = tmp_path / "model.pt2"
    written(convert_model(trained_net(CONFIGS["default"])), path, X)
    program = torch.export.load(path)
    views = [node for node in program.graph.nodes if "flatten" in str(node.target) or "view" in str(node.target)]
    assert len(views) == 1
    assert views[0].args[0].target is torch.ops.aten.clone.default
    assert views[0].args[0].kwargs == {"memory_format": torch.contiguous_format}
    linear = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Flatten(1), nn.Linear(24, 4))  # nothing to be copied in it
    ops = written(after_steps(linear, "int8", torch.randn(5, 3, 6)), tmp_path / "linear.pt2", torch.randn(5, 3, 6))
    assert not [op for op in ops if op.startswith("aten.clone")]


def test_torchao_runs_what_it_lowered(tmp_path: Path) -> None:
    """Weights of 7 bits: the integers are the deployed model's on a CPU without VNNI, too."""
    lowering = pytest.importorskip("torchao.quantization.pt2e.lowering")
    targets = {"_input_": {}, "weight": {"quant_dtype": "int7"}, "_output_": {}}
    net = Net()
    deployed = after_steps(net, [{"op_types": ["Conv2d", "Linear"], "target_settings": targets}], X)
    written(deployed, tmp_path / "model.pt2", X, dynamic_batch=False)
    lowered = lowering.lower_pt2e_quantized_to_x86(load_deployed(tmp_path / "model.pt2").program, (X,))
    ops = Counter(str(node.target).partition(".default")[0] for node in lowered.graph.nodes)
    assert (ops["onednn.qconv_pointwise"], ops["onednn.qlinear_pointwise"]) == (2, 1)
    with torch.no_grad():
        found, wanted = lowered(X), deployed(X)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_torchao_lowers_every_layer_to_an_integer_kernel(tmp_path: Path) -> None:
    lowering = pytest.importorskip("torchao.quantization.pt2e.lowering")
    one, path = trained("ResidualZeroGamma"), tmp_path / "model.pt2"
    written(one.deployed, path, one.example, dynamic_batch=False)
    lowered = lowering.lower_pt2e_quantized_to_x86(load_deployed(path).program, (one.example,))
    ops = Counter(str(node.target).partition(".default")[0] for node in lowered.graph.nodes)
    assert (ops["onednn.qconv_pointwise"], ops["onednn.qlinear_pointwise"]) == (6, 1)
    assert not {"aten.convolution", "aten.conv2d", "aten.linear", "aten.addmm"} & set(ops)
