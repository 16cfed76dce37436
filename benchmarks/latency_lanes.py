# SPDX-License-Identifier: Apache-2.0
"""Owns what latency.py compares: one float net for each runtime, in float, quantized by us and by the runtime's own tool.

Everything of a net is calibrated on the same batches. OpenVINO (`pip install openvino`) and torchao are lanes where they are
installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import torch
from timed_nets import layers_of
from torch import Tensor, nn

from lightning_quant import convert_model, export_model, make_plan, prepare_model
from lightning_quant.calibrate import calibrate
from lightning_quant.convert import set_mode
from lightning_quant.execution import execution_report
from lightning_quant.runtime import EXACT_SUMS, optimized_graph

Run = Callable[[Tensor], Any]
FEED = "x"


class Subject(NamedTuple):
    """A float net in eval mode, and what it is calibrated with."""

    model: nn.Module
    batches: Sequence[Tensor]


def deployed(subject: Subject, bits: int = 8) -> nn.Module:
    """The net in int8, additions and pools, too; its weights with `bits` bits."""
    model = copy.deepcopy(subject.model)
    weights = {**layers_of(model)[0], "target_names": ["weight"], "quant_dtype": f"int{bits}"}
    prepare_model(model, make_plan(model, ["int8", weights], example_input=subject.batches[0]))
    return convert_model(calibrate(model, subject.batches).eval())


# -- files --------------------------------------------------------------------------------------------------------------

FILES = {
    "float": "float",
    "ours": "ours",
    "ours7": "ours, 7-bit weights",
    "openvino": "ours, for OpenVINO",
    "static": "quantize_static",
}


@contextmanager
def quiet() -> Iterator[None]:
    """What exporters and other people's tools say of themselves is left out."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """A float net in eval mode as .onnx, free batch size, batch norm folded; `example` of 2 samples."""
    with quiet():
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            opset_version=21,
            input_names=[FEED],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    assert not [n for n in onnx.load(path).graph.node if n.op_type == "BatchNormalization"]  # the exporter folds it


def write_files(subject: Subject, folder: Path, kinds: Sequence[str] = tuple(FILES)) -> dict[str, Path]:
    """The net as .onnx files, by these keys of FILES."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {key: folder / f"{key}.onnx" for key in kinds}
    example = subject.batches[0]
    with quiet():
        write_float(subject.model, example[:2], paths["float"])
        eight = deployed(subject)
        export_model(eight, paths["ours"], example_input=example)
        if "openvino" in kinds:
            export_model(eight, paths["openvino"], example_input=example, profile="openvino")
        export_model(deployed(subject, 7), paths["ours7"], example_input=example, reduce_range=True)
        _quantize_static(paths["float"], paths["static"], subject.batches)
    return paths


def _quantize_static(source: Path, target: Path, batches: Sequence[Tensor]) -> None:
    """onnxruntime's own quantization: QDQ, uint8 activations, int8 weights, a scale for each channel."""
    tool: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {FEED: batch.numpy()}

    kinds = tool.QuantType
    tool.quantize_static(
        source,
        target,
        Reader(),
        quant_format=tool.QuantFormat.QDQ,
        activation_type=kinds.QUInt8,
        weight_type=kinds.QInt8,
        per_channel=True,
    )


def products(path: Path) -> tuple[int, int]:
    """(how many nodes multiply integer matrices, how many multiply any) in the graph that onnxruntime runs."""
    kinds = [
        node.op_type for node in optimized_graph(path).node if any(word in node.op_type for word in ("Conv", "Gemm", "MatMul"))
    ]
    return sum(kind.startswith("Q") or "Integer" in kind for kind in kinds), len(kinds)


def int8_share(path: Path) -> float | None:
    """The share of the multiply-adds in int8, of a file that `export_model` wrote."""
    noted = any(entry.key == "lightning_quant.multiply_adds" for entry in onnx.load(path).metadata_props)
    return execution_report(path).int8_share if noted else None


# -- runtimes -----------------------------------------------------------------------------------------------------------


def onnxruntime_run(path: Path, *, exact_sums: bool = False) -> Run:
    """A file in onnxruntime on one thread, as it comes or with the option for exact sums."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact_sums:
        options.add_session_config_entry(*EXACT_SUMS)
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    return lambda x: session.run(None, {feed: x.numpy()})[0]


def onnxruntime_lanes(subject: Subject, files: dict[str, Path], x: Tensor) -> dict[str, Run]:
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    keys = [key for key in FILES if key != "openvino"]
    lanes = {FILES[key]: onnxruntime_run(files[key]) for key in keys}
    for key in keys[1:]:
        title = f"{FILES[key]}, exact sums"
        try:
            lanes[title] = onnxruntime_run(files[key], exact_sums=True)
        except state.Fail as error:  # onnxruntime cannot, of files in which two layers share a constant
            print(f"    left out in onnxruntime: {title} ({str(error).strip()[-60:]})")
    return lanes


def openvino_run(path: Path) -> Run:
    """A file in OpenVINO on one thread, floats as float32."""
    openvino: Any = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda x: request.infer([x.numpy()])[0]


def openvino_lanes(subject: Subject, files: dict[str, Path], x: Tensor) -> dict[str, Run]:
    return {FILES[key]: openvino_run(files[key]) for key in ("float", "openvino", "static")}


def eager_lanes(subject: Subject, files: dict[str, Path], x: Tensor) -> dict[str, Run]:
    """torch itself: what does not run on int8 kernels here is said, and runs in float32 on integers."""
    lanes: dict[str, Run] = {"float": subject.model}
    for bits in (8, 7):
        model = deployed(subject, bits)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            set_mode(model, "onednn")
        title = "ours" if bits == 8 else f"ours, {bits}-bit weights"
        for one in said:
            names, _, reason = str(one.message).removeprefix("mode 'onednn': ").partition(" run as in 'integer': ")
            print(f"    eager, {title}: {len(names.split(', '))} layers run in float32 on integers: {reason}")
        lanes[title] = model
    return lanes


def inductor_lanes(subject: Subject, files: dict[str, Path], x: Tensor) -> dict[str, Run]:
    """torch.compile with frozen weights: float, our program lowered by torchao, torchao's own quantization lowered.

    What torch or torchao cannot compile is left out, with what they say.
    """
    dynamo: Any = importlib.import_module("torch._dynamo")
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.freezing = True
    dynamo.reset()

    def lowered(model: nn.Module) -> nn.Module:
        lowering: Any = importlib.import_module("torchao.quantization.pt2e.lowering")
        return cast(nn.Module, lowering.lower_pt2e_quantized_to_x86(model, (x,)))

    def ours() -> nn.Module:
        path = files["ours"].with_name(f"batch{len(x)}.pt2")
        export_model(deployed(subject), path, example_input=x, dynamic_batch=False, dialect="quantized_decomposed")
        return lowered(torch.export.load(path).module())

    makers: dict[str, Callable[[], nn.Module]] = {"float": lambda: subject.model}
    if not _needs("torchao")():
        makers |= {"ours": ours, "torchao PT2E": lambda: lowered(_pt2e(subject, x))}
    lanes: dict[str, Run] = {}
    for title, make in makers.items():
        try:
            with quiet(), torch.no_grad():
                run = torch.compile(make())
                run(x)
        except RuntimeError as error:
            print(f"    left out in Inductor: {title} ({' '.join(str(error).split())[:200]})")
        else:
            lanes[title] = run
    return lanes


def _pt2e(subject: Subject, x: Tensor) -> nn.Module:
    """The net quantized after training by torchao's PT2E with its quantizer for x86."""
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    tool: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = tool.prepare_pt2e(torch.export.export(subject.model, (x,)).module(), quantizer)
    for batch in subject.batches:
        for part in batch.split(len(x)):
            if len(part) == len(x):
                prepared(part)
    converted: nn.Module = tool.convert_pt2e(prepared)
    return converted


def _needs(package: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(package) else f"{package} is not installed"


class Runtime(NamedTuple):
    """`lanes(subject, files, x)`, for inputs like x; `missing()` says why it has none, `lacks()` why not all."""

    title: str
    lanes: Callable[[Subject, dict[str, Path], Tensor], dict[str, Run]]
    missing: Callable[[], str] = lambda: ""
    lacks: Callable[[], str] = lambda: ""


RUNTIMES = {
    "onnxruntime": Runtime("onnxruntime", onnxruntime_lanes, _needs("onnxruntime")),
    "openvino": Runtime("OpenVINO", openvino_lanes, _needs("openvino")),
    "eager": Runtime("eager torch", eager_lanes),
    "inductor": Runtime("Inductor", inductor_lanes, lacks=_needs("torchao")),
}


def accuracy_of(run: Run, test: tuple[Tensor, Tensor]) -> float:
    """Percent of the test images."""
    hits = sum(
        int((np.asarray(run(x)).argmax(1) == y.numpy()).sum()) for x, y in zip(*(part.split(250) for part in test), strict=True)
    )
    return 100 * hits / len(test[1])
