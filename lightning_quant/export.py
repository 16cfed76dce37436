# SPDX-License-Identifier: Apache-2.0
"""Owns the outside world: a deployed model becomes a file, is checked against the model it came from, and comes back.

A file is written beside its target and renamed when its check has passed: a failed export leaves the target as it was.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import lightning_quant.operators  # noqa: F401  (registers what saved programs call)
from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of
from lightning_quant.dialects import DIALECTS, check_dialect, in_quantized_decomposed, without_pairs
from lightning_quant.files import packed, read_program, read_weights, unpacked, write_program, write_weights, written
from lightning_quant.manifest import manifest_of, rebuilt, rebuilt_from
from lightning_quant.onnx_graph import require, unshared_weights, write_onnx
from lightning_quant.record import copied, moved, split_example
from lightning_quant.targets import on_tensors, tensors_in

# onnxruntime's int8 kernels for CPUs without VNNI add pairs of products in 16 bits and saturate; this option has them add
# exactly there and changes nothing on other CPUs.
_EXACT_SUMS = ("session.x64quantprecision", "1")


class ParityError(RuntimeError):
    """An exported file does not compute what the deployed model computes; no file was left at the target path."""


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPTIONS = ("example_input", "dynamic_batch", "atol", "dialect")


def check_format(suffix: Any, place: str) -> None:
    """Raise a ConfigError if `suffix` is no format, or one whose packages are missing; costs no import."""
    if suffix not in (known := (*_FORMATS, ".pt")):
        raise ConfigError(f"{place}: unknown suffix {suffix!r}; known: {', '.join(known)}.")
    missing = [name for name in _ONNX_PACKAGES if suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: ONNX export needs {', '.join(missing)}, which is not installed: pip install 'lightning_quant[onnx]'."
        )


# -- the program --------------------------------------------------------------------------------------------------------


def export_options(export: Any) -> dict[str, dict[str, Any]]:
    """Options of `export_model` by suffix, from what the callback's `export` may be.

    Raises:
        ConfigError: for anything else, an unknown suffix or an unknown option.
    """
    if export is None:
        return {}
    if isinstance(export, str):
        export = [export]
    if not isinstance(export, Mapping | Sequence):
        raise ConfigError(f"export: expected None, a suffix, a list of suffixes or a dict suffix -> options, got {export!r}.")
    wrong = isinstance(export, Mapping) and any(not isinstance(given, Mapping | None) for given in export.values())
    if wrong:
        raise ConfigError(f"export: expected a dict of options for each suffix, got {export!r}.")
    options = {s: dict(given or {}) for s, given in export.items()} if isinstance(export, Mapping) else {s: {} for s in export}
    for suffix, given in options.items():
        check_format(suffix, "export")
        for key in given:
            if key not in OPTIONS:
                raise ConfigError(f"export[{suffix!r}]: unknown option {key!r}; allowed: {', '.join(OPTIONS)}.")
    return options


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


def onnxruntime_session(path: str | os.PathLike[str], *, exact_sums: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, default optimizations, whose int8 sums are exact on every CPU.

    Without `exact_sums` onnxruntime's defaults hold, which saturate 16-bit sums on CPUs without VNNI.
    """
    (runtime,) = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if not exact_sums:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry(*_EXACT_SUMS)
    return runtime.InferenceSession(unshared_weights(Path(path)), options, providers=["CPUExecutionProvider"])


def _run_program(path: Path) -> Callable[[Any], list[Tensor]]:
    module = read_program(path).module()

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
    ".onnx": (write_onnx, _run_onnx),
    ".pt2": (write_program, _run_program),
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
    example_input: Any = None,
    dynamic_batch: bool = True,
    atol: float | None = None,
    dialect: str = "lightning_quant",
) -> Path:
    """Write a deployed model to `path`, in the format of its suffix, checked against the model before it appears there.

    `.onnx`: opset 21, QuantizeLinear/DequantizeLinear around Conv and Gemm, int8 weight and int32 bias initializers;
    checked in onnxruntime. `.pt2`: an ExportedProgram with our own operators; `load_deployed` reads it. `.pt`: the numbers and a
    manifest that says of every deployed layer what it is; `load_deployed(path, model=net)` makes the model again from the float
    net's class. The other arguments say nothing there: the check is that every number, and every output for `example_input` if
    there is one, comes back bit for bit. Parameters of 2 and 4 bits are packed in the file. No file holds `example_input`.

    Args:
        deployed: what `convert_model` returned (any module in eval mode works). Moved nowhere: put it on the CPU first.
        path: where to; folders are made.
        example_input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict). Its
            outputs are compared; give real data, as much as you like.
        dynamic_batch: leave dimension 0 free on every input that shares the length of the first one's.
        atol: allowed difference of any output, relative to its largest finite absolute value. None: 1e-4 where every
            quantized tensor comes from integers (or is an input), so that a runtime can only agree; 5e-2 where a float
            operator stands before a quantizer, whose last bit may tip a value to the next level, or where `dialect` is given.
        dialect: of a .pt2 file: our own operators, exact; or "quantized_decomposed" for torchao's x86 lowering and ExecuTorch
            (see dialects.py).

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
    check_dialect(dialect, target.suffix)
    if target.suffix == ".pt":
        return _export_weights(deployed, target, example_input)
    if example_input is None:
        raise ConfigError(f"{target.suffix} export needs example_input: what the model is called with.")
    write, run = _FORMATS[target.suffix]
    example = moved(example_input, "cpu")
    if dialect == DIALECTS[0]:
        program = _program(deployed, example, dynamic_batch)
        exact = _only_integers_meet_grids(program)
    else:
        program, exact = without_pairs(_program(in_quantized_decomposed(deployed), example, dynamic_batch)), False
    allowed = atol if atol is not None else (1e-4 if exact else 5e-2)
    with written(target) as beside:
        write(program, beside)
        _check(beside, target, run(beside), deployed, example, allowed)
    return target


def _export_weights(deployed: nn.Module, target: Path, example_input: Any) -> Path:
    """State dict and manifest, read back and compared before they appear at their path."""
    state, small = packed(
        {key: value.cpu() if isinstance(value, Tensor) else value for key, value in deployed.state_dict().items()}
    )
    with written(target) as beside:
        write_weights({"manifest": manifest_of(deployed), "state": state, "packed": small}, beside)
        found = read_weights(beside)
        back = rebuilt_from(deployed, found["manifest"], unpacked(found["state"], found["packed"]))
        if problem := _not_the_same(back, copy_of(deployed).to("cpu"), moved(example_input, "cpu")):
            raise ParityError(f"{target.name}: read back, {problem}; nothing was written to {target}. Write a .pt2 file instead.")
    return target


def _not_the_same(found: nn.Module, wanted: nn.Module, example_input: Any) -> str:
    """What is not bit for bit what it was; nothing if all is."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    keys = [key for key in {**theirs, **ours} if not _is_same(ours.get(key), theirs.get(key))]
    if keys:
        return f"{keys[0]!r} is not what it was"
    if repr(found) != repr(wanted):
        return "a layer is not what it was"
    if example_input is not None:
        args, kwargs = split_example(example_input)
        with torch.no_grad():
            pairs = [list(tensors_in(model(*copied(args), **copied(kwargs)))) for model in (found, wanted)]
        if len(pairs[0]) != len(pairs[1]) or not all(map(_is_same, *pairs)):
            return "the model gives other numbers on the example input"
    return ""


def _is_same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


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


def load_deployed(path: str | os.PathLike[str], *, model: nn.Module | None = None, example_input: Any = None) -> nn.Module:
    """The model in a `.pt2` or `.pt` file that `export_model` wrote, on the CPU, in eval mode.

    A `.pt2` file needs nothing else and gives a module that is always in eval mode; it takes its arguments as the example input
    gave them: those that were positional by position, the others by name. A `.pt` file has the numbers alone.

    Args:
        path: what `export_model` returned.
        model: for a `.pt` file, the user's net: an instance of the class that was trained, made with the same arguments. The
            result is a deployed copy; `model` is left as it is.
        example_input: for a `.pt` file of a net that calls quantized operators as functions, where its forward cannot be traced:
            what it is called with. It shows where the operators are called.

    Raises:
        ConfigError: if the file is missing, damaged, or none that `export_model` wrote, or if it does not fit `model`. Nothing of
            the file is run.
    """
    source, place = Path(path), f"path {os.fspath(path)!r}"
    if source.suffix not in (".pt2", ".pt"):
        raise ConfigError(f"{place}: load_deployed reads .pt2 and .pt files; run .onnx files in onnxruntime.")
    if not source.is_file():
        raise ConfigError(f"{place}: there is no such file.")
    if (source.suffix == ".pt") != (model is not None):
        needs = (
            "needs model, an instance of the class that was trained" if model is None else "is a model by itself: leave out model"
        )
        raise ConfigError(f"{place}: a {source.suffix} file {needs}.")
    if model is None:
        return DeployedProgram(read_program(source).module())
    found = read_weights(source)
    try:
        return rebuilt(model, found["manifest"], unpacked(found["state"], found["packed"]), example_input=example_input)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{place} is no file that export_model wrote, or is damaged: {error!r}") from error
