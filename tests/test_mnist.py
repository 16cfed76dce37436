# SPDX-License-Identifier: Apache-2.0
"""Owns the promise on real data: MNIST, both configs, every step from float training to onnxruntime, image by image."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import run_recorded
from lightning.pytorch import Trainer, seed_everything
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantFusionCallback, load_deployed
from lightning_quant.export import export_model, onnxruntime_session
from lightning_quant.prepare import simulated

pytestmark = pytest.mark.slow  # four epochs of all of MNIST
ROOT = Path(__file__).parents[1]
LATER_RATE = 2e-4


def load_example() -> ModuleType:
    if "mnist_example" not in sys.modules:
        spec = importlib.util.spec_from_file_location("mnist_example", ROOT / "examples" / "mnist.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["mnist_example"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["mnist_example"]


@dataclass
class Run:
    """What one config leaves behind. `float_accuracies`: before the quantized epoch, and after the same epoch in float."""

    config: str
    float_accuracies: tuple[float, float]
    model: nn.Module
    callback: QuantFusionCallback
    folder: Path
    images: Tensor
    labels: Tensor

    def predict(self, model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in self.images.split(1000)])

    def accuracy(self, log_probabilities: Tensor) -> float:
        return float((log_probabilities.argmax(1) == self.labels).double().mean())

    @property
    def deployed(self) -> nn.Module:
        assert self.callback.deployed_model is not None
        return self.callback.deployed_model


def fit(model: nn.Module, train: TensorDataset, test: TensorDataset, folder: Path, **options: Any) -> None:
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, loader, DataLoader(test, batch_size=1000))  # type: ignore[arg-type]


FloatRun = tuple[nn.Module, nn.Module, TensorDataset, TensorDataset]


@pytest.fixture(scope="module")
def float_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> FloatRun:
    """The net of the documentation after two float epochs on all of MNIST; the same after a third; the data."""
    example = load_example()
    train, test = example.load_data(shared / "data" / "mnist.npz")
    seed_everything(0, verbose=False)
    model = example.Mnist()
    folder = tmp_path_factory.mktemp("float")
    fit(model, train, test, folder, max_epochs=2)
    further = copy.deepcopy(model)
    further.learning_rate = LATER_RATE
    fit(further, train, test, folder, max_epochs=1)
    return model.eval(), further.eval(), train, test


@pytest.fixture(scope="module", params=["documentation", "whole"])
def run(
    request: pytest.FixtureRequest,
    float_run: FloatRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """One quantized epoch with one of the two configs."""
    trained, further, train, test = float_run
    model, folder = copy.deepcopy(trained).train(), tmp_path_factory.mktemp(request.param)
    images, labels = test.tensors
    callback = QuantFusionCallback(load_example().CONFIGS[request.param], export=[".onnx", ".pt2"], dirpath=folder)
    result = Run(request.param, (0.0, 0.0), model, callback, folder, images, labels)
    result.float_accuracies = (result.accuracy(result.predict(trained)), result.accuracy(result.predict(further)))
    model.learning_rate = LATER_RATE  # type: ignore[assignment]
    fit(model, train, test, folder, max_epochs=1, callbacks=[callback])
    model.eval()
    return result


def test_accuracy_is_kept(run: Run) -> None:
    assert run.float_accuracies[0] >= 0.985
    assert run.accuracy(run.predict(run.model)) >= max(run.float_accuracies) - 0.002


def test_deployed_equals_eval_mode_bit_for_bit(run: Run) -> None:
    prepared, integers = run_recorded(run.model, run.images[:2000])
    deployed, deployed_integers = run_recorded(run.deployed, run.images[:2000])
    assert len(integers) == (2 if run.config == "documentation" else 7)
    assert all(torch.equal(a, b) for a, b in zip(integers, deployed_integers, strict=True))
    assert torch.equal(prepared, deployed)
    assert torch.equal(run.predict(run.model), run.predict(run.deployed))


def test_program_equals_deployed_on_every_image(run: Run) -> None:
    program = load_deployed(run.folder / "model.pt2")
    _, integers = run_recorded(program, run.images[:2000])
    _, expected = run_recorded(run.deployed, run.images[:2000])
    assert all(torch.equal(a, b) for a, b in zip(integers, expected, strict=True))
    ours, theirs = run.predict(run.deployed), run.predict(program)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert (ours - theirs).abs().max() <= 1e-4


def with_integer_outputs(path: Path, target: Path) -> list[str]:
    """Write a copy of an ONNX file that also returns every quantized tensor; returns their names, in order."""
    model = onnx.load(path)
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    made = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    names = [clipped.get(name, name) for name in made]  # where saturation is not the clamp, the Clip behind it is
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in names)
    onnx.save(model, target)
    return names


def without_repeats(integers: list[Tensor]) -> list[Tensor]:
    """Those that are no copy of one before: the file reads a tensor where the model puts it on its own grid again."""
    return [one for place, one in enumerate(integers) if not any(torch.equal(one, before) for before in integers[:place])]


def test_onnxruntime_equals_deployed_on_every_image_and_integer(run: Run, tmp_path: Path) -> None:
    names = with_integer_outputs(run.folder / "model.onnx", tmp_path / "all.onnx")
    session = onnxruntime_session(tmp_path / "all.onnx")
    different = classes = compared = 0
    for part in run.images.split(1000):
        expected, integers = run_recorded(run.deployed, part)
        integers = without_repeats(integers)
        output, *found = session.run(None, {session.get_inputs()[0].name: part.numpy()})
        assert len(found) == len(integers) == len(names)
        for a, b in zip(found, integers, strict=True):
            different += int((a != b.numpy()).sum())
            compared += a.size
        classes += int((output.argmax(1) != expected.argmax(1).numpy()).sum())
        assert np.abs(output - expected.numpy()).max() <= 1e-4
    assert (different, classes) == (0, 0), f"of {compared} integers and 10,000 images"
    assert compared > 60_000_000


def test_the_file_as_exported_gives_the_same_classes(run: Run) -> None:
    session = onnxruntime_session(run.folder / "model.onnx")
    feed = session.get_inputs()[0].name
    found = np.concatenate([session.run(None, {feed: part.numpy()})[0] for part in run.images.split(1000)])
    expected = run.predict(run.deployed).numpy()
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert np.abs(found - expected).max() <= 1e-4


def test_simulated_forward_agrees(run: Run) -> None:
    integers = run.predict(run.model)
    with simulated(run.model):
        floats = run.predict(run.model)
    assert not torch.equal(integers, floats), "the simulation must be another computation"
    assert int((integers.argmax(1) == floats.argmax(1)).sum()) >= 9990


def optimized_ops(path: Path, target: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(target), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(target).graph.node)


def test_structure_of_the_onnx_file(run: Run, tmp_path: Path) -> None:
    model = onnx.load(run.folder / "model.onnx")
    ops = Counter(node.op_type for node in model.graph.node)
    executed = optimized_ops(run.folder / "model.onnx", tmp_path / "optimized.onnx")
    assert {imported.domain: imported.version for imported in model.opset_import}[""] >= 21
    assert ops["BatchNormalization"] == 0
    if run.config == "documentation":
        assert executed["QLinearConv"] == 1
        return
    assert (executed["QLinearConv"], executed["QGemm"]) == (2, 2)
    assert executed["Conv"] == executed["Gemm"] == executed["FusedConv"] == 0
    producer = {node.output[0]: node for node in model.graph.node}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = (producer[name] for name in node.input[1:3])
            assert (weight.op_type, bias.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert stored[weight.input[0]].data_type == onnx.TensorProto.INT8
            assert stored[bias.input[0]].data_type == onnx.TensorProto.INT32
    assert not any(
        tensor.data_type == onnx.TensorProto.FLOAT and numpy_helper.to_array(tensor).ndim > 1 for tensor in stored.values()
    )


def test_sizes(run: Run, float_run: FloatRun, tmp_path: Path) -> None:
    if run.config == "documentation":
        pytest.skip("one layer of four is quantized: the file hardly shrinks")
    reference = export_model(float_run[0], tmp_path / "float.onnx", example_input=run.images[:8])
    assert (run.folder / "model.onnx").stat().st_size <= 0.28 * reference.stat().st_size
    tensors = sum(t.numel() * t.element_size() for t in run.deployed.state_dict().values())
    # A program is a zip with its code; what it may not carry along is data: a whole batch is 200 kB.
    assert (run.folder / "model.pt2").stat().st_size <= tensors + 48_000


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_is_free(run: Run, batch: int) -> None:
    session = onnxruntime_session(run.folder / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: run.images[:batch].numpy()})
    program = load_deployed(run.folder / "model.pt2")
    with torch.no_grad():
        expected = run.deployed(run.images[:batch])
        assert torch.allclose(program(run.images[:batch]), expected, atol=1e-5)
    assert np.abs(found - expected.numpy()).max() <= 1e-4
