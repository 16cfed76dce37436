# SPDX-License-Identifier: Apache-2.0
"""Owns the outside world: a deployed model becomes a file, is checked against the model it came from, and comes back.

A file is written beside its target and takes its place when its check has passed: a failed export leaves the target as it was.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.convert import for_files, in_float32
from lightning_quant.dialects import DIALECTS, in_quantized_decomposed, without_pairs
from lightning_quant.execution import ExecutionReport, execution_report
from lightning_quant.files import as_path, check_target, written
from lightning_quant.formats import FORMATS, WEIGHTS, Profile, Run, check_format, style_of
from lightning_quant.integer import IntegerLayer
from lightning_quant.loading import load_deployed, write_numbers
from lightning_quant.onnx_notes import notes_in
from lightning_quant.options import OPTIONS, check_options, export_options
from lightning_quant.parity import (
    LayerParity,
    OutputParity,
    ParityError,
    ParityReport,
    call_watched,
    layer_parity,
    merged,
    outputs_of,
    outputs_parity,
    raise_if_wrong,
    raise_unless,
    unsigned,
    wrong_integers,
)
from lightning_quant.prepare import prepared_groups, simulated
from lightning_quant.program import INTEGERS, only_integers_meet_grids, outputs_have_steps, program_of, steps_of, taps_of
from lightning_quant.record import copied, moved, split_example, undisturbed
from lightning_quant.runtime import EXACT_SUMS, onnxruntime_session
from lightning_quant.targets import on_tensors, tensors_in

__all__ = [
    "OPTIONS",
    "Exported",
    "ParityError",
    "Profile",
    "check_format",
    "check_parity",
    "export_model",
    "export_options",
    "export_with_reports",
    "load_deployed",
    "onnxruntime_session",
]


# -- export and its check -------------------------------------------------------------------------------------------------


_PAIR, _FEW = "file, deployed", 32
_KERNELS = "onnxruntime"  # the profile whose files run integer layers on integer kernels here


def _few(example: Any) -> Any:
    """The first samples of what the model is called with: all its integers are kept for the comparison."""
    args, kwargs = split_example(example)
    first = next(tensors_in((args, kwargs)))
    batch = first.shape[0] if first.dim() else -1

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:_FEW] if tensor.dim() and tensor.shape[0] == batch else tensor

    return (on_tensors(cut, args), on_tensors(cut, kwargs)) if batch > _FEW else example


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """A file that runs, and the model that it came from."""

    path: Path
    name: str
    deployed: nn.Module
    program: torch.export.ExportedProgram
    free: bool
    exact: bool  # whether a runtime can only agree
    kernels: bool = True  # whether it runs integer layers on integer kernels, not in float

    def __call__(
        self, example: Any, prepared: nn.Module | None = None, *, as_given: Any = None, exact_sums: bool = True
    ) -> ParityReport:
        """Compare outputs on the whole example, integers on its first samples (all of them, if the batch size is fixed).

        `as_given`: the example in the dtypes that the prepared model takes.
        """
        steps, more = steps_of(self.program), {} if exact_sums else {"exact_sums": False}
        run = functools.partial(FORMATS[self.path.suffix][1], self.path, **more)
        wanted = outputs_of(self.deployed, example)
        outputs = outputs_parity(_PAIR, run()(copied(example))[0], wanted, steps)
        if prepared is not None:
            with undisturbed(prepared):
                outputs += outputs_parity("deployed, prepared in eval", wanted, outputs_of(prepared, as_given), steps)
                with simulated(prepared):
                    outputs += outputs_parity("deployed, fake-quantized", wanted, outputs_of(prepared, as_given), steps)
        layers, own = self._layers(run, _few(example) if self.free else example) if taps_of(self.program) else ([], [])
        return ParityReport(file=self.name, layers=tuple(layers), outputs=tuple(outputs), own=tuple(own))

    def _layers(self, run: Callable[..., Run], few: Any) -> tuple[list[LayerParity], list[OutputParity]]:
        """Each layer from the start of the model, and by itself: of what the file's layers before it made."""
        taps, model = taps_of(self.program), self.deployed
        _, made = call_watched(model, few)
        if len(made) <= max(tap.place for tap in taps):  # the exporter may drop what is not used
            model = self.program.module()
            _, made = call_watched(model, few)
        outputs, found = run(taps)(copied(few))
        there = [(tap, q) for tap, q in zip(taps, found, strict=True) if q is not None and made[tap.place] is not None]
        exact = {tap.place for tap, q in there if tap.exact and self.kernels and q.dtype in INTEGERS}
        own, wrong = wrong_integers(model, few, {tap.place: unsigned(q) for tap, q in there}, exact)
        layers = [replace(layer_parity(tap, q, cast(Tensor, made[tap.place])), wrong=wrong[tap.place]) for tap, q in there]
        return layers, outputs_parity(_PAIR, outputs, own, steps_of(self.program))

    def raise_unless(self, report: ParityReport, atol: float | None, min_equal: float | None, why: str) -> None:
        allowed = atol if atol is not None else (1e-4 if self.exact else 5e-2)
        least = min_equal if min_equal is not None else (1.0 if self.exact and atol is None else 0.0)
        raise_unless(report, target=self.name, pair=_PAIR, atol=allowed, min_equal=least, why=why)
        if atol is None and min_equal is None:
            raise_if_wrong(report, target=self.name, atol=5e-2 if outputs_have_steps(self.program) else 1e-4, why=why)


def _called(model: nn.Module, example: Any, place: str) -> list[Tensor]:
    """The outputs of a call.

    Raises:
        ConfigError: if `example`, which `place` names, is nothing that the model can be called with.
    """
    kind, found = type(model).__name__, type(example).__name__
    forms = "a tensor, a tuple of positional arguments, a dict of keyword arguments or (tuple, dict)"
    if next(tensors_in(split_example(example)), None) is None:
        raise ConfigError(f"{place}: no tensor in it, but a {found}; give what the model is called with: {forms}.")
    try:
        return outputs_of(model, example)
    except ConfigError:  # a forward of the user's that says what it wants
        raise
    except Exception as error:
        hint = " Of a loader's lists give the inputs alone: ((images,) for images, _ in loader)." if found == "list" else ""
        raise ConfigError(
            f"{place}: the forward of {kind} fails on this {found}: {str(error).rstrip('.')}. "
            f"Give what the model is called with: {forms}.{hint}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written, and what was found out about it. `execution`: of `.onnx` files."""

    path: Path
    parity: ParityReport
    execution: ExecutionReport | None

    def summary(self) -> str:
        """One line."""
        numbers = "every number and output comes back" if self.parity.outputs else "every number comes back"
        first = f"{numbers} bit for bit" if self.path.suffix == WEIGHTS else self.parity.summary()
        return first if self.execution is None else f"{first}; {self.execution.summary()}"


def export_model(
    deployed: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    atol: float | None = None,
    min_equal: float | None = None,
    min_int8_share: float | None = None,
    profile: Profile = "onnxruntime",
    signed: bool | None = None,
    reduce_range: bool = False,
    metadata: Mapping[str, str] | None = None,
    dialect: str = DIALECTS[0],
) -> Path:
    """Write a deployed model to `path`, in the format of its suffix, checked against the model before it appears there.

    `.onnx`: opset 21, QuantizeLinear/DequantizeLinear around Conv and Gemm, int8 weight and int32 bias initializers (INT4 where a
    weight's integers have no more than 4 bits; onnxruntime widens them when it loads); checked in onnxruntime. Its metadata say
    versions, the grids of its inputs and the work of each node. `.pt2`: an ExportedProgram with our own operators;
    `load_deployed` reads it. `.pt`: the numbers and a manifest that says of every deployed layer what it is;
    `load_deployed(path, model=net)` makes the model again from the float net's class. There the check is that every number, and
    every output for `example_input` if there is one, comes back bit for bit; parameters of 2 and 4 bits are packed. No file holds
    `example_input`. `export_with_reports` is the same and returns what was found.

    Args:
        deployed: what `convert_model` returned (any module in eval mode works). Moved nowhere: put it on the CPU first.
        path: where to; folders are made.
        example_input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict). Its
            outputs are compared, and the integers of its first 32 samples in every layer; give real data, as much as you like.
            An `.onnx` file takes and computes float32: what is of another floating dtype, of the model, too, is made so.
        dynamic_batch: leave dimension 0 free on every input that shares the length of the first one's.
        dynamic_size: leave dimensions 2 and up free on every input: height and width of (N, C, H, W), the length of (N, C, L).
            Of (N, T, D) that is D, which a linear layer fixes: T cannot be left free.
        atol: allowed difference of any output, relative to its largest finite absolute value. None: 1e-4 where every
            quantized tensor comes from integers (or is an input), so that a runtime can only agree; 5e-2 where a float
            operator stands before a quantizer, whose last bit may tip a value to the next level, or where `dialect` is given.
        min_equal: the least share of equal integers in any layer. None: 1.0 where atol's None means 1e-4. Elsewhere, unless atol
            is given, each layer by itself must be right: its integers are those that the deployed model makes of the file's own
            before them, but for values within 1e-2 of a level of a tie (2 % others, where a comparison or a rounding without
            integers comes before them), and outputs are within 1e-4 of what it makes of them.
        min_int8_share: `.onnx`: the least share of multiply-adds that onnxruntime runs in int8.
        profile: `.onnx`: the runtime that it is for. "onnxruntime": unsigned activations, activation functions that saturation
            does not do as Clip of integers. "openvino": the same with Relu and Clip of floats, no INT4. "tensorrt": as that,
            activations signed with zero point 0 (the model must be trained so), float biases.
        signed: `.onnx`: activations as int8, zero points moved by 128 (the integers' meaning stays); None: as the profile has it.
            onnxruntime itself then runs layers in float whose input or output two operators read (an addition's, say).
        reduce_range: check that no weight needs more than 7 bits, so that sums do not saturate on CPUs without VNNI, and that
            onnxruntime's default kernels agree here. Nothing is rounded anew: train with quant_dtype 'int7' for weights.
        metadata: `.onnx`: further metadata, keys without the prefix `lightning_quant.`.
        dialect: `.pt2`: our own operators, exact; or "quantized_decomposed" for torchao's x86 lowering and ExecuTorch (see
            dialects.py).

    Returns:
        The path.

    Raises:
        ConfigError: unknown suffix, missing package, a wrong option, a forward that cannot be exported, a choice that the model
            rules out, a place that cannot be written to.
        ParityError: the file computes something else, or less in int8 than asked for; the target is as it was before.
    """
    options = {key: value for key, value in locals().items() if key not in ("deployed", "path")}
    return export_with_reports(deployed, path, **options).path


def export_with_reports(
    deployed: nn.Module, path: str | os.PathLike[str], *, prepared: nn.Module | None = None, **options: Any
) -> Exported:
    """As `export_model`, with the same options; returns the path, the parity report and, of `.onnx`, the execution report.

    `prepared`: as in `check_parity`; reported, not bounded. Not for `.pt`.
    """
    target = as_path(path)
    check_format(target.suffix, f"path {os.fspath(path)!r}")
    check_options(target.suffix, options)
    check_target(target)
    given = {name: one.default for name, one in inspect.signature(export_model).parameters.items() if name in OPTIONS} | options
    return _export(deployed, target, prepared, **given)


def _export(
    deployed: nn.Module,
    target: Path,
    prepared: nn.Module | None,
    *,
    example_input: Any,
    dynamic_batch: bool,
    dynamic_size: bool,
    atol: float | None,
    min_equal: float | None,
    min_int8_share: float | None,
    profile: Profile,
    signed: bool | None,
    reduce_range: bool,
    metadata: Mapping[str, str] | None,
    dialect: str,
) -> Exported:
    _check_model(deployed, target.suffix)
    if reduce_range:
        _check_range(deployed)
    given_as = moved(example_input, "cpu")
    if example_input is not None:
        _check_numbers(given_as, "example_input")
    deployed, example = _as_written(deployed, given_as, target.suffix)
    if example is not None:
        _called(deployed, example, "example_input")
    if target.suffix == WEIGHTS:
        with written(target) as beside:
            report = write_numbers(deployed, beside, target, example)
        return Exported(path=target, parity=report, execution=None)
    if example_input is None:
        raise ConfigError(f"{target.suffix} export needs example_input: what the model is called with.")
    ours = dialect == DIALECTS[0]
    program = program_of(deployed if ours else in_quantized_decomposed(deployed), example, dynamic_batch, dynamic_size)
    if ours:
        style = style_of(profile, signed, program)
    else:
        style, program = style_of("onnxruntime", None, program), without_pairs(program)
    exact = ours and only_integers_meet_grids(program)
    notes = {"package": _version(), "torch": torch.__version__, "profile": profile, **(metadata or {})}
    with written(target) as beside:
        FORMATS[target.suffix][0](program, beside, style=style, notes=notes)
        compare = _Comparison(
            path=beside,
            name=target.name,
            deployed=deployed,
            program=program,
            free=dynamic_batch,
            exact=exact,
            kernels=profile == _KERNELS,
        )
        report = compare(example, prepared, as_given=given_as)
        compare.raise_unless(report, atol, min_equal, f"nothing was written to {target}")
        execution = None
        if target.suffix == ".onnx":
            _check_default_kernels(compare, target, example, (atol, min_equal), reduce_range)
            execution = replace(execution_report(beside), file=target.name)
            if min_int8_share is not None and not execution.keeps(min_int8_share):
                raise ParityError(
                    f"{target.name}: onnxruntime would run {execution.int8_share:.1%} of the multiply-adds in int8, less than "
                    f"the {min_int8_share:.1%} of min_int8_share; nothing was written to {target}. {execution.summary()}."
                )
    return Exported(path=target, parity=report, execution=execution)


def _check_model(deployed: Any, suffix: str) -> None:
    """Raise a ConfigError unless `deployed` is a module that is ready to be shipped."""
    if not isinstance(deployed, nn.Module):
        raise ConfigError(f"deployed: expected a module, got {deployed!r}; give what convert_model returned.")
    if prepared_groups(deployed):
        raise ConfigError(
            f"{type(deployed).__name__} is prepared, which is for training; export what convert_model(model) returns."
        )
    if any(module.training for module in deployed.modules()):
        raise ConfigError(
            f"{type(deployed).__name__} is in train mode; export what convert_model returned, or call eval() first."
        )
    devices = {str(tensor.device) for tensor in (*deployed.parameters(), *deployed.buffers())}
    wrong = sorted(device for device in devices if device == "meta" or (device != "cpu" and suffix != WEIGHTS))
    if wrong:
        raise ConfigError(
            f"{type(deployed).__name__} is on {', '.join(wrong)}; "
            + (
                "there are no numbers to write."
                if "meta" in wrong
                else "files are made and checked on the CPU: give deployed.cpu()."
            )
        )


def _check_numbers(example: Any, name: str) -> None:
    """Raise a ConfigError where a tensor holds NaN: no grid has it, and a runtime's rounding of it is its own."""
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors_in(split_example(example))):
        raise ConfigError(
            f"{name}: there is NaN in it, for which no integer stands: the deployed model passes it on, a file makes numbers of "
            "it. Give real data."
        )


def _as_written(deployed: nn.Module, example: Any, suffix: str) -> tuple[nn.Module, Any]:
    """(the model, what it is called with) as a file of this suffix has them: `.onnx` files compute in float32."""
    if suffix == ".pt2":
        return deployed, example
    model = for_files(deployed)
    if suffix != ".onnx":
        return model, example
    return in_float32(model), on_tensors(lambda x: x.float() if x.is_floating_point() else x, example)


def check_parity(
    deployed: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    prepared: nn.Module | None = None,
    dynamic_batch: bool = True,
    atol: float | None = None,
    min_equal: float | None = None,
) -> ParityReport:
    """Compare a file that `export_model` wrote with the model that it came from, on real data: `print` what this returns.

    Args:
        deployed: the model that was exported, on the CPU.
        path: the file, `.onnx` or `.pt2`.
        batches: example inputs, one after the other: `[images]`, or `((images,) for images, _ in loader)`.
        prepared: the prepared model that `deployed` was converted from: its eval mode and its fake-quantized forward are compared
            with the deployed model, too.
        dynamic_batch, atol, min_equal: as in `export_model`.

    Raises:
        ConfigError: the file is missing, damaged, of no format that can be compared, or of another model; no batch.
        ParityError: a bound is not kept.
    """
    source = _comparable(path)
    _check_model(deployed, source.suffix)
    bounds = {"atol": atol, "min_equal": min_equal, "dynamic_batch": dynamic_batch}
    check_options(source.suffix, bounds)
    if prepared is not None and not prepared_groups(prepared):
        raise ConfigError(f"prepared: {type(prepared).__name__} is not prepared; give what prepare_model changed.")
    if isinstance(batches, Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise ConfigError(f"batches: expected a list of example inputs, or another iterable, got a {type(batches).__name__}.")
    reports: list[ParityReport] = []
    compare: _Comparison | None = None
    for number, batch in enumerate(batches):
        as_given = moved(batch, "cpu")
        _check_numbers(as_given, f"batches[{number}]")
        deployed, example = _as_written(deployed, as_given, source.suffix)
        _called(deployed, example, f"batches[{number}]")
        if compare is None:
            if prepared is not None:
                with undisturbed(prepared):
                    _called(prepared, as_given, "prepared, called with batches[0]")
            program = program_of(deployed, example, dynamic_batch)
            compare = _Comparison(
                path=source,
                name=source.name,
                deployed=deployed,
                program=program,
                free=dynamic_batch,
                exact=only_integers_meet_grids(program),
                kernels=source.suffix != ".onnx" or notes_in(source).get("profile") == _KERNELS,
            )
        try:
            reports.append(compare(example, prepared, as_given=as_given))
        except (ConfigError, ParityError):
            raise
        except Exception as error:
            raise ConfigError(
                f"batches[{number}]: {source.name} cannot be run on it: {str(error).rstrip('.')}. A file that was written with "
                "dynamic_batch=False takes batches of that size alone: give such, and dynamic_batch=False here."
            ) from error
    if compare is None:
        raise ConfigError("batches: there is none; give at least one example input.")
    if len({tuple((layer.name, layer.value) for layer in report.layers) for report in reports}) != 1:
        raise ConfigError(f"path {os.fspath(path)!r}: the layers differ from batch to batch; compare with one batch at a time.")
    report = merged(reports)
    compare.raise_unless(report, atol, min_equal, "the file was not changed")
    return report


def _comparable(path: Any) -> Path:
    """The path of a file that is there and can be run; a ConfigError says what else it is."""
    source = as_path(path)
    check_format(source.suffix, f"path {os.fspath(path)!r}")
    if not source.is_file():
        raise ConfigError(f"path {os.fspath(path)!r}: there is no such file.")
    if source.suffix == WEIGHTS:
        raise ConfigError(f"path {os.fspath(path)!r}: a {WEIGHTS} file is compared number by number when it is written.")
    if source.suffix == ".onnx":
        try:
            onnxruntime_session(source)
        except Exception as error:
            raise ConfigError(f"path {os.fspath(path)!r} is damaged, or no .onnx file: onnxruntime says {error}") from error
    return source


def _check_default_kernels(
    compare: _Comparison, target: Path, example: Any, bounds: tuple[float | None, float | None], must: bool
) -> None:
    """Where onnxruntime's default kernels saturate and differ: an error if the caller ruled that out, else a warning."""
    try:
        compare.raise_unless(compare(example, exact_sums=False), *bounds, "")
    except ParityError as error:
        text = (
            f"onnxruntime's default int8 kernels saturate on this CPU (it has no VNNI) and give other results for {target.name}"
        )
        if must:
            raise ParityError(f"{text}, though no weight needs more than 7 bits; nothing was written to {target}.") from error
        warnings.warn(
            f"{text}. On such CPUs create the session with options.add_session_config_entry{EXACT_SUMS!r}, or train weights "
            "with quant_dtype 'int7' and export with reduce_range=True.",
            stacklevel=4,
        )


def _check_range(deployed: nn.Module) -> None:
    """Raise a ConfigError unless the integers of every layer for an integer kernel lie in -64..63."""
    layers = [(name, module.weight) for name, module in deployed.named_modules() if isinstance(module, IntegerLayer)]
    wide = [name for name, weight in layers if weight.numel() and (int(weight.min()) < -64 or int(weight.max()) > 63)]
    if wide:
        raise ConfigError(
            f"reduce_range: the weights of {', '.join(map(repr, wide[:5]))} need more than 7 bits. Rounding them now would ship "
            "another model than was validated: train (or calibrate) with quant_dtype 'int7' for weights."
        )


def _version() -> str:
    try:
        return version("lightning_quant")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
