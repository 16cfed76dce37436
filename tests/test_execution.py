# SPDX-License-Identifier: Apache-2.0
"""Owns the account of what onnxruntime runs in int8: read from its own graph, by module, with the reason and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
import torch.nn.functional as F
from test_convert import CONFIGS, trained
from test_mnist import optimized_ops
from test_parity import X, after_steps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import FUSED

from lightning_quant import ConfigError, ParityError, convert_model, export_model
from lightning_quant.execution import ExecutionReport, NodeRun, execution_report
from lightning_quant.export import export_with_reports


def test_a_net_that_runs_in_int8(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    report = execution_report(export_model(deployed, tmp_path / "model.onnx", example_input=X))
    found = [(node.module, node.operator, node.integer, node.reason) for node in report.nodes]
    assert found == [
        ("conv1", "QLinearConv", True, ""),
        ("conv2", "QLinearConv", True, ""),
        ("pool", "NhwcMaxPool", True, ""),
        ("fc", "QGemm", True, ""),
    ]
    assert report.int8_share == 1.0
    assert report.summary() == "3 of 3 products run in int8, 100.0% of the multiply-adds"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deployed(X[:1])
    assert 2 * sum(node.multiply_adds for node in report.products) == counter.get_total_flops()


def test_a_module_is_named_once_in_the_summary() -> None:
    whys = [("a", "x"), ("a", "y"), ("a", "x"), ("", "x"), ("b", "x"), ("c", "x")]
    nodes = [NodeRun(module=module, operator="MatMul", integer=False, product=True, reason=reason) for module, reason in whys]
    text = ExecutionReport(file="model.onnx", nodes=tuple(nodes)).summary()
    assert text.endswith("in float: a (x; y), the model (x), b (x) and 1 more")


class Branch(nn.Module):
    """A convolution and a linear layer, and what a case puts around them."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.middle, self.fc = nn.Conv2d(3, 4, 3), middle or nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.middle(self.conv(x)).flatten(2).amax(2))
        return out


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y @ y.transpose(-1, -2)


class Case(NamedTuple):
    net: Callable[[], nn.Module]
    config: list[dict[str, Any]]
    module: str
    reason: str
    remedy: str


WHOLE: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"]}]
CASES = {
    "a layer left out": Case(Branch, [{"op_types": ["Linear"]}], "conv", "its weight is not quantized", "config_list"),
    "no input grid": Case(
        Branch,
        [{"op_types": ["Linear"]}, {"op_names": ["conv"], "target_names": ["weight", "_output_"]}],
        "conv",
        "its input is not on a grid",
        "'_input_'",
    ),
    "no output grid": Case(
        Branch,
        [{"op_names": ["conv"], "target_names": ["_input_", "weight"]}, {"op_types": ["Linear"]}],
        "conv",
        "behind it stands Reshape, not a grid",
        "'_output_'",
    ),
    "transposed": Case(
        lambda: Branch(nn.ConvTranspose2d(4, 4, 2)),
        [{"op_types": ["Conv2d", "Linear", "ConvTranspose2d"]}],
        "middle",
        "no int8 kernel for ConvTranspose",
        "OpenVINO",
    ),
    "sixteen bits": Case(
        Branch,
        [*WHOLE, {"op_names": ["conv"], "quant_dtype": "int16"}],
        "conv",
        "a grid of more than 8 bits",
        "8 bits or fewer",
    ),
    "a product": Case(Product, [{"op_types": ["Linear"]}], "", "its inputs are not on grids", "matmul"),
}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


def test_of_a_module_that_is_one_layer_no_part_is_to_be_selected(tmp_path: Path) -> None:
    x = torch.randn(4, 6, 8)
    deployed = convert_model(after_steps(Attends(), [{"op_types": ["MultiheadAttention", "Linear"]}], x))
    report = export_with_reports(deployed, tmp_path / "model.onnx", example_input=x).execution
    assert report is not None
    slow = [node for node in report.nodes if not node.integer]
    assert len([node for node in slow if node.product]) == 4  # the projections, the scores, the weighted sum, and out again
    assert {(node.module, node.reason) for node in slow} == {("attention", "its module computes in float on rounded tensors")}
    assert all(node.remedy == "write it as layers and operators (nn.Linear, torch.matmul)" for node in slow)
    assert [node.module for node in report.products if node.integer] == ["head"]


@pytest.mark.parametrize("name", CASES)
def test_what_runs_in_float_is_named_with_reason_and_remedy(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    x = torch.randn(4, 6, 8) if case.net is Product else X[:4]
    deployed = convert_model(after_steps(case.net(), case.config, x))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=x)
    report = exported.execution
    assert report is not None
    (node,) = [node for node in report.products if not node.integer]
    assert node.module == case.module
    assert case.reason in node.reason
    assert case.remedy in node.remedy
    others = [other for other in report.products if other.integer]
    assert others or name != "transposed"
    assert 0 <= report.int8_share < 1
    assert report.int8_share == sum(one.multiply_adds for one in others) / sum(one.multiply_adds for one in report.products)
    assert node.multiply_adds > 0
    ops = optimized_ops(exported.path, tmp_path / "optimized.onnx")
    floats = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "ConvTranspose", "FusedGemm"}
    assert len([kind for kind in ops.elements() if kind in floats]) == 1
    assert f"{case.module or '(model)'}" in str(report)
    assert f"in float: {case.module or 'the model'} ({node.reason})" in report.summary()
    assert node.reason in report._repr_html_().replace("&#x27;", "'")


def test_too_little_in_int8_is_an_error(tmp_path: Path) -> None:
    case = CASES["a layer left out"]
    deployed = convert_model(after_steps(case.net(), case.config, X[:4]))
    with pytest.raises(
        ParityError, match=r"onnxruntime would run .*% of the multiply-adds in int8, less than the 90\.0% .*'?conv"
    ):
        export_model(deployed, tmp_path / "model.onnx", example_input=X[:4], min_int8_share=0.9)
    assert not list(tmp_path.iterdir())
    export_model(deployed, tmp_path / "model.onnx", example_input=X[:4], min_int8_share=0.001)
    with pytest.raises(ConfigError, match=r"min_int8_share: for \.onnx files alone, not for \.pt2"):
        export_model(deployed, tmp_path / "model.pt2", example_input=X[:4], min_int8_share=0.5)


def test_the_share_counts_free_sizes_as_in_the_example(tmp_path: Path) -> None:
    deployed = convert_model(after_steps(Branch(), WHOLE, X[:4]))
    fixed = export_with_reports(deployed, tmp_path / "fixed.onnx", example_input=X[:4]).execution
    free = export_with_reports(deployed, tmp_path / "free.onnx", example_input=X[:4], dynamic_size=True).execution
    assert fixed is not None
    assert free is not None
    assert [node.multiply_adds for node in free.products] == [node.multiply_adds for node in fixed.products] == [36 * 4 * 27, 8]


class Attention(nn.Module):
    """Two heads of four channels over five tokens."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.causal = nn.Linear(8, 24), nn.Linear(8, 8), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(x.shape))
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_two_products_of_known_work_and_one_transpose_of_its_keys(causal: bool, tmp_path: Path) -> None:
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    deployed = convert_model(after_steps(Attention(causal), [{"op_names": ["qkv"]}], x))
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=x, atol=1e-5)
    assert exported.execution is not None
    work = {(node.module, node.multiply_adds) for node in exported.execution.products}
    assert work == {("qkv", 5 * 8 * 24), ("", 2 * 5 * 5 * 4), ("proj", 5 * 8 * 8)}
    assert len(exported.execution.products) == 4
    assert "not known" not in exported.execution.summary()
    ops = Counter(node.op_type for node in onnx.load(exported.path).graph.node)
    assert ops["Transpose"] <= 4  # the heads to the front, the keys, the heads back, the float weight
    assert "Shape" not in ops or causal  # a mask is made for the length that comes


def test_unknown_work_in_float_keeps_no_bound() -> None:
    known = NodeRun(module="a", operator="QGemm", integer=True, multiply_adds=8, product=True)
    unknown = NodeRun(module="b", operator="MatMul", integer=False, product=True, reason="its inputs are not on grids")
    report = ExecutionReport(file="m.onnx", nodes=(known, unknown))
    assert (report.int8_share, report.keeps(0.5), report.keeps(0.0)) == (1.0, False, True)
    assert "100.0% of the multiply-adds (without 1 whose shape is not known)" in report.summary()
    assert ExecutionReport(file="m.onnx", nodes=(known,)).keeps(1.0)


def test_only_files_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.onnx': there is no such file"):
        execution_report(tmp_path / "absent.onnx")
    path = export_model(convert_model(trained(CONFIGS["default"])), tmp_path / "model.onnx", example_input=X)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    for name in ("other.onnx", "broken.onnx"):
        with pytest.raises(ConfigError, match=rf"{name}' is no \.onnx file that export_model wrote, or is damaged"):
            execution_report(tmp_path / name)
