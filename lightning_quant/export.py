# SPDX-License-Identifier: Apache-2.0
"""Owns the outside world: a deployed model becomes a file, is checked against the model it came from, and comes back.

A file is written beside its target and renamed when its check has passed: a failed export leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import lightning_quant.operators  # noqa: F401  (registers what saved programs call)
from lightning_quant.config import ConfigError
from lightning_quant.graph import copied, moved, split_example
from lightning_quant.targets import on_tensors, tensors_in

OPSET = 21
# onnxruntime's int8 kernels for CPUs without VNNI add pairs of products in 16 bits and saturate; this option has them add
# exactly there and changes nothing on other CPUs.
_EXACT_SUMS = ("session.x64quantprecision", "1")


class ParityError(RuntimeError):
    """An exported file does not compute what the deployed model computes; no file was left at the target path."""


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPTIONS = ("example_input", "dynamic_batch", "atol")


def check_format(suffix: Any, place: str) -> None:
    """Raise a ConfigError if `suffix` is no format, or one whose packages are missing; costs no import."""
    if suffix not in _FORMATS:
        raise ConfigError(f"{place}: unknown suffix {suffix!r}; known: {', '.join(_FORMATS)}.")
    missing = [name for name in _ONNX_PACKAGES if suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: ONNX export needs {', '.join(missing)}, which is not installed: pip install 'lightning_quant[onnx]'."
        )


def _require(*modules: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ONNX export needs the package {error.name!r}, which is not installed: pip install 'lightning_quant[onnx]'."
        ) from error


# -- the program --------------------------------------------------------------------------------------------------------


def _two_samples(value: Any, batch: int) -> Any:
    """The first two samples of every tensor with the batch's length, cloned: a slice would drag its whole storage along.

    A batch of one is doubled: torch.export takes a dimension of size 1 for a constant.
    """

    def two(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == batch:
            tensor = (torch.cat([tensor, tensor]) if batch == 1 else tensor)[:2]
        return tensor.detach().clone()

    return on_tensors(two, value)


def _dynamic(value: Any, dim: Any, batch: int) -> Any:
    """The `dynamic_shapes` of torch.export for one argument: dimension 0 free where it is the batch."""
    if isinstance(value, Mapping):
        return {key: _dynamic(item, dim, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_dynamic(item, dim, batch) for item in value)
    return {0: dim} if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else None


def _program(model: nn.Module, example_input: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    args, kwargs = split_example(example_input)
    first = next(tensors_in((args, kwargs)), None)
    if first is None:
        raise ConfigError("example_input: no tensor in it; give what the model is called with.")
    batch = first.shape[0] if first.dim() else -1
    if dynamic_batch:
        # By the lengths of the example, before it is cut to two samples: then other inputs may have length 2, too.
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        shapes = {name: _dynamic(value, torch.export.Dim("batch"), batch) for name, value in bound.items()}
        args, kwargs = _two_samples(args, batch), _two_samples(kwargs, batch)
    else:
        args, kwargs, shapes = copied(args), copied(kwargs), None
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be exported with a free batch size: {error}. Mend the forward (a batch size "
            "written as a number?) or give dynamic_batch=False."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"torch.export cannot export {type(model).__name__}: {error}. If its forward fixes the batch size, give "
            "dynamic_batch=False."
        ) from error


# -- formats: one row each ------------------------------------------------------------------------------------------------


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["output"] if len(program.graph_signature.user_outputs) == 1 else None,
            custom_translation_table=_onnx_translations(),
            verbose=False,
        )
    assert exported is not None
    _tidy(exported.model.graph)
    exported.save(path)


def _tidy(graph: Any) -> None:
    """Drop the build machine's stack traces, keep neighbouring grids apart, give every weight a zero point of its own.

    The exporter merges equal constants; onnxruntime's exact-sums pass rewrites each layer's zero point in place and fails
    on one that two layers share.
    """
    (ir,) = _require("onnx_ir")
    taken: set[str] = set()
    for node in list(graph):
        if uses := _apart(node):
            value = uses[0][0].inputs[uses[0][1]]
            barrier = ir.node("Max", [value])  # of one: nothing is fused through it
            graph.insert_after(value.producer(), barrier)
            for user, slot in uses:
                user.replace_input_with(slot, barrier.outputs[0])
        for part in (node, *node.outputs):
            part.metadata_props.clear()
        zero = node.inputs[2] if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 else None
        if zero is None or zero.const_value is None or not zero.is_initializer() or zero.dtype != ir.DataType.INT8:
            continue
        if zero.name in taken:
            name = f"{node.inputs[0].name}_zero_point"
            own = ir.Value(name=name, const_value=zero.const_value, type=zero.type, shape=zero.shape)
            graph.register_initializer(own)
            node.replace_input_with(2, own)
        taken.add(zero.name)


_MOVES = ("Concat", "Expand", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def _apart(node: Any) -> list[tuple[Any, int]]:
    """The uses of a tensor that onnxruntime must not fuse with what makes it: (node, input), all of one tensor.

    Fused, a grid behind another grid would be rescaled, which moves levels; a float layer between grids would get integer
    weights of onnxruntime's own; and a stored parameter that is a factor in float arithmetic would have the other factor
    rounded to 8 bits (MatMulNBits), or its scales of rows taken for those of columns.
    """
    if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
        return list(node.outputs[0].uses()) if _multiplied(node.outputs[0]) else []
    source = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
    if source is not None and source.op_type == "DequantizeLinear":
        pairs = zip(node.inputs[1:3], source.inputs[1:3], strict=True)
        return [(node, 0)] if any(a is not b and (a.const_value.numpy() != b.const_value.numpy()).any() for a, b in pairs) else []
    return [(node, 0)] if node.op_type != "MatMul" and _in_floats(node) and _dequantized(node.inputs[0]) else []


def _in_floats(node: Any) -> bool:
    """Whether a node is a product in float arithmetic: not that of an integer layer, which is known by its int32 bias."""
    bias = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and str(bias and bias.inputs[0].dtype) != "INT32"


def _dequantized(value: Any) -> bool:
    source = value.producer()
    kind = None if source is None else source.op_type
    return kind == "DequantizeLinear" or (kind in _MOVES and _dequantized(source.inputs[0]))


def _multiplied(value: Any) -> bool:
    return any(_in_floats(u) or (u.op_type in _MOVES and any(map(_multiplied, u.outputs))) for u, _ in value.uses())


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs what it skips and, inside, uses what torch itself deprecates: no user can act on it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"torch.onnx cannot translate the model: {error.__cause__ or error} Write .pt2, or no file.") from error
    finally:
        logging.disable(level)


@functools.cache
def _onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our operators as QuantizeLinear / DequantizeLinear around float Conv and Gemm: what runtimes turn into integer kernels.

    A weight's zero point is explicit even where it is 0 (onnxruntime fuses QGemm only then), bias is int32 behind a
    DequantizeLinear with s_x * s_w, and a clip that saturation does not do is a Clip on integers, behind the fused kernel.
    """
    np, onnx, onnxscript = _require("numpy", "onnx", "onnxscript")
    op = onnxscript.opset21

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))

    def quantize(x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
        dtype = np.uint8 if high <= 255 else np.uint16
        if dtype == np.uint16 and (low, high) != (0, 65535):
            # onnxruntime has no Clip of uint16; before the division it is as exact: (n s) / s rounds to n.
            ends = ((end - zero_point) * np.float32(scale) for end in (low, high))
            x = op.Clip(x, *(constant(end, np.float32) for end in ends))
        q = op.QuantizeLinear(x, constant(scale, np.float32), constant(zero_point, dtype))
        return q if (low, high) == (0, 255) or dtype == np.uint16 else op.Clip(q, constant(low, dtype), constant(high, dtype))

    def dequantize(q: Any, scale: Any, zero: Any) -> Any:
        return op.DequantizeLinear(q, constant(scale, np.float32), constant(zero, q.dtype.numpy()))

    def dequantize_weight(q: Any, scale: Any, zero_point: Any) -> Any:
        shape, steps = list(q.shape), list(scale.shape)
        if len(steps) < 2 and steps in ([], shape[:1]):
            zero = constant(np.zeros(steps), q.dtype.numpy()) if zero_point is None else zero_point
            return op.DequantizeLinear(q, scale, zero, axis=0)
        # One scale a block: along every dimension its blocks, then the places in a block.
        split = [part for size, blocks in zip(shape, steps, strict=True) for part in (blocks, size // blocks)]

        def spread(values: Any) -> Any:
            return op.Reshape(values, constant([part for blocks in values.shape for part in (blocks, 1)], np.int64))

        w = op.Reshape(op.Cast(q, to=1), constant(split, np.int64))
        if zero_point is not None:
            w = op.Sub(w, op.Cast(spread(zero_point), to=1))
        return op.Reshape(op.Mul(w, spread(scale)), constant(shape, np.int64))

    def round_blocks(x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
        least, most = (op.Sub(constant(end, np.float32), zero_point) for end in (low, high))
        return op.Mul(op.Min(op.Max(op.Round(op.Div(x, scale)), least), most), scale)

    def operands(head: Sequence[Any]) -> tuple[Any, Any, Any]:
        q, x_scale, x_zero_point, weight, scale, zero_point, bias = head
        b = op.DequantizeLinear(bias, op.Mul(constant(x_scale, np.float32), scale), axis=0)
        return dequantize(q, x_scale, x_zero_point), dequantize_weight(weight, scale, zero_point), b

    def requantize(y: Any, tail: Sequence[Any]) -> Any:
        scale, zero_point, low, high, _ = tail
        return y if scale is None else quantize(y, scale, zero_point, low, high)

    def conv(*arguments: Any) -> Any:
        stride, padding, dilation, groups = arguments[7:11]
        geometry = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        return requantize(op.Conv(*operands(arguments[:7]), **geometry), arguments[11:])

    def linear(*arguments: Any) -> Any:
        return requantize(op.Gemm(*operands(arguments[:7]), transB=1), arguments[7:])

    ops = torch.ops.lightning_quant
    return {
        ops.quantize.default: quantize,
        ops.dequantize.default: dequantize,
        ops.dequantize_weight.default: dequantize_weight,
        ops.round_blocks.default: round_blocks,
        ops.conv.default: conv,
        ops.linear.default: linear,
    }


def onnxruntime_session(path: str | os.PathLike[str], *, exact_sums: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, default optimizations, whose int8 sums are exact on every CPU.

    Without `exact_sums` onnxruntime's defaults hold, which saturate 16-bit sums on CPUs without VNNI.
    """
    (runtime,) = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if not exact_sums:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry(*_EXACT_SUMS)
    return runtime.InferenceSession(_unshared_weights(Path(path)), options, providers=["CPUExecutionProvider"])


def _unshared_weights(path: Path) -> bytes:
    """The file's model with every weight read once: onnxruntime's exact-sums pass fails on a layer that is called twice."""
    (onnx,) = _require("onnx")
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    seen: set[str] = set()
    for position, node in reversed(list(enumerate(model.graph.node))):
        for slot, name in enumerate(node.input):
            if name in seen and name in dequantized:
                again = f"{name}/again_{position}"  # no exporter writes such a name
                copy = model.graph.node.add()
                copy.CopyFrom(dequantized[name])
                copy.name, copy.output[0], node.input[slot] = again, again, again
                for part, source in enumerate(copy.input):
                    tensor = model.graph.initializer.add()
                    tensor.CopyFrom(stored[source])
                    tensor.name = copy.input[part] = f"{source}/again_{position}"
                model.graph.node.remove(copy)
                model.graph.node.insert(position, copy)
            seen.add(name)
    return bytes(model.SerializeToString())


def _run_program(path: Path) -> Callable[[Any], list[Tensor]]:
    module = torch.export.load(path).module()

    def run(example_input: Any) -> list[Tensor]:
        args, kwargs = split_example(example_input)
        with torch.no_grad():
            return list(tensors_in(module(*args, **kwargs)))

    return run


def _run_onnx(path: Path, exact_sums: bool = True) -> Callable[[Any], list[Tensor]]:
    try:
        session = onnxruntime_session(path, exact_sums=exact_sums)
    except Exception as error:
        raise ParityError(f"onnxruntime cannot run the exported file, so it was not written: {error}") from error

    def run(example_input: Any) -> list[Tensor]:
        feeds = [tensor.numpy() for tensor in tensors_in(split_example(example_input))]
        names = [node.name for node in session.get_inputs()]
        return [torch.as_tensor(array) for array in session.run(None, dict(zip(names, feeds, strict=True)))]

    return run


_FORMATS: dict[str, tuple[Callable[[torch.export.ExportedProgram, Path], None], Callable[[Path], Any]]] = {
    ".onnx": (_write_onnx, _run_onnx),
    ".pt2": (torch.export.save, _run_program),
}


# -- export and its check -------------------------------------------------------------------------------------------------


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, int]:
    """(largest difference relative to the largest value, index of that output) over all outputs."""
    worst = (0.0, 0)
    if len(found) != len(wanted):
        return math.inf, min(len(found), len(wanted))
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.shape != b.shape:
            return math.inf, index
        equal = (a == b) | (a.isnan() & b.isnan())  # also where both are NaN or infinite
        if not bool(equal.all()):
            scale = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_ones(())
            gap = float((a.double() - b.double())[~equal].abs().max() / scale.double().clamp(min=1e-12))
            worst = max(worst, (math.inf if math.isnan(gap) else gap, index))
    return worst


_KEEPS_VALUES = frozenset(
    f"aten.{name}"
    for name in ("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "alias", "max_pool1d")
) | {"aten.max_pool2d", "aten.max_pool3d", "aten.pixel_shuffle", "aten._unsafe_view", "aten.contiguous"}


def _only_integers_meet_grids(program: torch.export.ExportedProgram) -> bool:
    """Whether no float arithmetic stands between one grid and the next."""
    for node in program.graph.nodes:
        if str(node.target) in ("lightning_quant.quantize.default", "lightning_quant.round_blocks.default"):
            source = node.args[0]
            while source.op == "call_function" and str(source.target).rpartition(".")[0] in _KEEPS_VALUES:
                source = source.args[0]
            if source.op != "placeholder" and str(source.target) != "lightning_quant.dequantize.default":
                return False
    return True


def _check(path: Path, target: Path, run: Callable[[Any], list[Tensor]], model: nn.Module, example: Any, atol: float) -> None:
    args, kwargs = split_example(copied(example))  # a forward may write to what it is given
    with torch.no_grad():
        wanted = list(tensors_in(model(*args, **kwargs)))
    gap, index = _difference(run(copied(example)), wanted)
    if not gap <= atol:
        raise ParityError(
            f"{target.name}: output {index} differs from the deployed model's by {gap:.3g} of its largest value (allowed "
            f"{atol:g}) on the example input; nothing was written to {target}. Raise atol only if that is acceptable."
        )
    if path.suffix == ".onnx" and _difference(_run_onnx(path, exact_sums=False)(copied(example)), wanted)[0] > atol:
        warnings.warn(
            "onnxruntime's default int8 kernels saturate on this CPU (it has no VNNI) and give other results for "
            f"{target.name}. On such CPUs create the session with options.add_session_config_entry{_EXACT_SUMS!r}.",
            stacklevel=3,
        )


def export_model(
    deployed: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any,
    dynamic_batch: bool = True,
    atol: float | None = None,
) -> Path:
    """Write a deployed model to `path`, in the format of its suffix, checked against the model before it appears there.

    `.onnx`: opset 21, QuantizeLinear/DequantizeLinear around Conv and Gemm, int8 weight and int32 bias initializers;
    checked in onnxruntime. `.pt2`: an ExportedProgram with our own operators; `load_deployed` reads it.

    Args:
        deployed: what `convert_model` returned (any module in eval mode works). Moved nowhere: put it on the CPU first.
        path: where to; folders are made.
        example_input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict). Its
            outputs are compared; give real data, as much as you like.
        dynamic_batch: leave dimension 0 free on every input that shares the length of the first one's.
        atol: allowed difference of any output, relative to its largest finite absolute value. None: 1e-4 where every
            quantized tensor comes from integers (or is an input), so that a runtime can only agree; 5e-2 where a float
            operator stands before a quantizer, whose last bit may tip a value to the next level.

    Returns:
        The path.

    Raises:
        ConfigError: unknown suffix, missing package, or a forward that cannot be exported.
        ParityError: the file computes something else; the target is as it was before.
    """
    target = Path(path)
    check_format(target.suffix, f"path {os.fspath(path)!r}")
    if any(module.training for module in deployed.modules()):
        raise ConfigError(
            f"{type(deployed).__name__} is in train mode; export what convert_model returned, or call eval() first."
        )
    write, run = _FORMATS[target.suffix]
    example = moved(example_input, "cpu")
    program = _program(deployed, example, dynamic_batch)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        write(program, beside)
        allowed = atol if atol is not None else (1e-4 if _only_integers_meet_grids(program) else 5e-2)
        _check(beside, target, run(beside), deployed, example, allowed)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


class DeployedProgram(nn.Module):
    """An exported program as a module of an ordinary evaluation loop: `eval()` does nothing, `train()` is refused."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program, self.training = program, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        if mode:
            raise ConfigError("a loaded program cannot be trained; train the model that it was converted from.")
        return self


def load_deployed(path: str | os.PathLike[str]) -> nn.Module:
    """The model in a `.pt2` file that `export_model` wrote, on CPU: an `nn.Module` that is always in eval mode.

    It takes its arguments as the example input gave them: those that were positional by position, the others by name.

    Raises:
        ConfigError: if the file is missing or is no such program.
    """
    source = Path(path)
    if source.suffix != ".pt2":
        raise ConfigError(f"path {os.fspath(path)!r}: load_deployed reads .pt2 files; run .onnx files in onnxruntime.")
    if not source.is_file():
        raise ConfigError(f"path {os.fspath(path)!r}: there is no such file.")
    try:
        return DeployedProgram(torch.export.load(source).module())
    except Exception as error:
        raise ConfigError(f"path {os.fspath(path)!r} is no program that export_model wrote, or is damaged: {error}") from error
