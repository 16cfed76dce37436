# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that what ships is what was validated, against onnxruntime itself: nothing here asks the export's own check.

Integers are read from the graph that onnxruntime makes of a file, every one of its nodes, and compared with the deployed model's;
outputs with the eval mode of the prepared model, on data that no export has seen, and on whole test sets of trained nets.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import IntegerRecorder, run_recorded
from numpy.typing import NDArray
from test_zoo import in_onnxruntime
from torch import Tensor, nn
from toys import Net

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.export import export_with_reports
from lightning_quant.prepare import quantizer_state, simulated
from lightning_quant.program import only_integers_meet_grids, program_of
from lightning_quant.runtime import EXACT_SUMS

Array = NDArray[Any]
_MOVES = ("Transpose", "Reshape", "Split", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Gather", "Expand")


# -- every node of onnxruntime's graph ----------------------------------------------------------------------------------------


def run_whole(path: Path, inputs: list[Array], folder: Path) -> tuple[dict[str, Array], list[onnx.NodeProto]]:
    """All values of the graph that onnxruntime makes of a file, as they are in it: optimized first, then run as it stands."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    options.add_session_config_entry(*EXACT_SUMS)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimized.onnx")
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name and name not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feeds = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
    return dict(zip(names, session.run(names, feeds), strict=True)), list(model.graph.node)


def matches(found: Array, recorded: list[Array]) -> set[int]:
    """Which of the recorded tensors hold these integers, in this order or with the channels moved to the end."""
    forms = [found.ravel()] + ([np.moveaxis(found, -1, 1).ravel()] if found.ndim > 2 else [])
    return {
        place
        for place, one in enumerate(recorded)
        if one.size == found.size and any(np.array_equal(form, one.ravel()) for form in forms)
    }


def integer_nodes(
    path: Path, inputs: list[Array], recorded: list[Array], folder: Path
) -> tuple[Counter[str], set[str], set[int]]:
    """(kernels that make integers, those of them that no tensor of the deployed model equals, the tensors that one equals)."""
    values, nodes = run_whole(path, inputs, folder)
    kernels: Counter[str] = Counter()
    others: set[str] = set()
    equal: set[int] = set()
    for node in nodes:
        array = values[node.output[0]]
        if array.dtype == np.uint8:
            assert len(np.unique(array)) > 1
            kernels[node.op_type] += 1
            hits = matches(array, recorded)
            equal |= hits
            if not hits:
                others.add(node.name)
    return kernels, others, equal


WHOLE = {  # what onnxruntime makes integers with, in these nets
    "mnist": {"QLinearConv": 2, "QGemm": 1, "NhwcMaxPool": 2},
    "resnet18": {"QLinearConv": 20, "QLinearAdd": 8, "NhwcMaxPool": 1, "QLinearGlobalAveragePool": 1},
    "mobilenetv2": {"QLinearConv": 52, "QLinearAdd": 10, "QLinearGlobalAveragePool": 1},
}


@pytest.mark.parametrize("name", ["mnist", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenetv2"))])
def test_every_integer_of_onnxruntimes_graph_is_ours(name: str, tmp_path: Path) -> None:
    """And every tensor of integers of ours is one of its: none is compared with nothing."""
    from timed_nets import NETS

    net = NETS[name]
    model, shape = net.make(), net.shape[1:]
    x = torch.randn(8, *shape)
    prepare_model(model, make_plan(model, "int8", example_input=x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        net.loss(model(torch.randn(16, *shape)), torch.randint(0, 10, (16,))).backward()
        optimizer.step()
    deployed = convert_model(model.eval())
    path = export_with_reports(deployed, tmp_path / "model.onnx", example_input=x).path
    fresh = torch.randn(4, *shape)
    output, recorded = run_recorded(deployed, fresh)
    with torch.no_grad():
        assert torch.equal(output, model(fresh))
    kernels, others, equal = integer_nodes(path, [fresh.numpy()], [one.numpy() for one in recorded], tmp_path)
    assert others == set()
    assert equal == set(range(len(recorded)))
    assert {kernel: count for kernel, count in kernels.items() if kernel not in _MOVES} == {"QuantizeLinear": 1, **WHOLE[name]}


# -- what training simulated ----------------------------------------------------------------------------------------------------


def test_c1_c5_simulation_deployed_model_and_onnxruntime_agree(tmp_path: Path) -> None:
    """Layer by layer within a step and for 99 % equal; accuracy within 0.1 %, 99 % of the classes equal."""
    x, fresh = torch.randn(256, 3, 8, 8), torch.randn(1000, 3, 8, 8)

    def brightest(images: Tensor) -> Tensor:  # a task that can be learned: which quarter is the brightest
        return nn.functional.avg_pool2d(images.mean(1), 4).flatten(1).argmax(1)

    net = Net()
    prepare_model(net, make_plan(net, "int8", example_input=x))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    net.train()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), brightest(x)).backward()
        optimizer.step()
    deployed, ranges = convert_model(net.eval()), quantizer_state(net)
    seen: dict[str, list[Tensor]] = {"relu1": [], "relu2": []}
    for name, outputs in seen.items():
        net.get_submodule(name).register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out.detach().clone()))
    with torch.no_grad():
        integers = net(fresh)
        with simulated(net):
            simulation = net(fresh)
        assert torch.equal(integers, deployed(fresh))
    assert not torch.equal(simulation, integers), "it must be another computation"
    for name, (a, b) in seen.items():
        side = ranges[f"conv{name[-1]}._output_"]
        step = (side["high"] - side["low"]) / 255
        assert len(a.unique()) > 50
        assert (a - b).abs().max() <= 1.01 * step
        assert (a == b).double().mean() >= 0.99
    path = export_with_reports(deployed, tmp_path / "model.onnx", example_input=x).path
    found = in_onnxruntime(path, fresh)[0]
    for one in (integers, found):
        right, wanted = (int((logits.argmax(1) == brightest(fresh)).sum()) for logits in (one, simulation))
        assert wanted > 600  # of 250 by chance
        assert abs(right - wanted) <= 1
        assert (one.argmax(1) == simulation.argmax(1)).sum() >= 990
        assert torch.cosine_similarity(one.flatten(), simulation.flatten(), dim=0) >= 0.999


# -- trained nets, whole test sets --------------------------------------------------------------------------------------------


@pytest.mark.slow  # trained nets, real Trainers
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("name", "epochs"),
    [("mnist", 0), ("animals", 0), ("animals", 1), ("photos", 0), ("emoji", 0), ("emoji", 1), ("depthwise", 0)],
)
def test_no_prediction_changes_in_onnxruntime(name: str, epochs: int, tmp_path: Path) -> None:
    """Eval mode of the net that the Trainer leaves behind, calibrated or trained, against the file: every test image."""
    from accuracy import NETS, data_of, fit, float_net

    net = NETS[name]
    model = float_net(net)
    callback = QuantFusionCallback("int8", calibration=16, root="net", verbose=0)
    fit(model, net, 0, callbacks=[callback], max_epochs=epochs)
    deployed, (images, labels) = callback.deployed_model, data_of(net).test
    assert deployed is not None
    path = export_with_reports(deployed, tmp_path / "model.onnx", example_input=images[:64]).path
    with torch.no_grad():
        wanted = torch.cat([model.eval()(part) for part in images.split(250)])
        assert torch.equal(wanted, torch.cat([deployed(part) for part in images.split(250)]))
    found = torch.cat([in_onnxruntime(path, part)[0] for part in images.split(1000)])
    assert float((wanted.argmax(1) == labels).double().mean()) > (0.95 if name in ("mnist", "animals") else 0.6)
    changed = int((found.argmax(1) != wanted.argmax(1)).sum())
    whole = only_integers_meet_grids(program_of(deployed, images[:2], True))
    assert whole == (name in ("mnist", "animals"))
    assert changed <= (0 if whole else 0.001 * len(images))
    if whole:
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert len(images) == {"mnist": 10_000, "animals": 2000, "photos": 750}.get(name, 792)


# -- free sizes -----------------------------------------------------------------------------------------------------------------


class FullyConvolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        out: Tensor = self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class Flattening(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5), how

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        out: Tensor = self.fc(x.flatten(1) if self.how == "flatten" else x.reshape(-1, 256))
        return out


def after_training(net: nn.Module, x: Tensor) -> nn.Module:
    """The net, prepared, two steps later, in eval mode."""
    prepare_model(net, make_plan(net, "int8", example_input=x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net.train()
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net.eval()


def test_c10_batches_and_sizes_that_training_never_saw(tmp_path: Path) -> None:
    """Trained with 32 of 24x24: batches of 1 and 7 at three sizes, no integer other than in eval mode."""
    net = after_training(FullyConvolutional(), torch.randn(32, 3, 24, 24))
    deployed = convert_model(net)
    path = export_with_reports(
        deployed, tmp_path / "model.onnx", example_input=torch.randn(32, 3, 24, 24), dynamic_size=True
    ).path
    for shape in [(1, 3, 24, 24), (7, 3, 33, 17), (2, 3, 64, 40)]:
        x = torch.randn(shape)
        with torch.no_grad(), IntegerRecorder() as recorder:
            wanted = deployed(x)
        with torch.no_grad():
            assert torch.equal(net(x), wanted)
        kernels, others, equal = integer_nodes(path, [x.numpy()], [one.numpy() for one in recorder.tensors], tmp_path)
        assert others == set()
        assert equal == set(range(len(recorder.tensors)))
        assert kernels["QLinearConv"] == 2
        assert torch.equal(in_onnxruntime(path, x)[0].argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("how", ["flatten", "reshape"])
def test_a_net_that_flattens_one_size_is_refused_other_sizes(how: str, tmp_path: Path) -> None:
    """torch.export takes the sizes for free there: only their product is bound."""
    x = torch.randn(8, 3, 8, 8)
    deployed = convert_model(after_training(Flattening(how), x))
    words = r"Flattening cannot be exported with free sizes: at twice the example's size it fails \(.*give dynamic_size=False"
    with pytest.raises(ConfigError, match=words):
        export_with_reports(deployed, tmp_path / "model.onnx", example_input=x, dynamic_size=True)
    assert not list(tmp_path.iterdir())
