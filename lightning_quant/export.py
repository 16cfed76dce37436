# SPDX-License-Identifier: Apache-2.0
"""Owns the outside world: a deployed model becomes a file, is checked against the model it came from, and comes back.

A file is written beside its target and renamed when its check has passed: a failed export leaves the target as it was.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

import lightning_quant.operators  # noqa: F401  (registers what saved programs call)
from lightning_quant.config import ConfigError
from lightning_quant.execution import ExecutionReport, execution_report
from lightning_quant.integer import IntegerLayer
from lightning_quant.onnx_graph import Dialect, write_onnx
from lightning_quant.parity import (
    LayerParity,
    ParityError,
    ParityReport,
    call_watched,
    layer_parity,
    merged,
    outputs_parity,
    raise_unless,
)
from lightning_quant.prepare import prepared_groups, simulated
from lightning_quant.program import Tap, only_integers_meet_grids, program_of, steps_of, taps_of, zero_points_of
from lightning_quant.record import copied, moved, split_example, undisturbed
from lightning_quant.runtime import EXACT_SUMS, made_in, onnxruntime_session, runner
from lightning_quant.targets import on_tensors, tensors_in

__all__ = [
    "OPTIONS",
    "DeployedProgram",
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
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_format(suffix: Any, place: str) -> None:
    """Raise a ConfigError if `suffix` is no format, or one whose packages are missing; costs no import."""
    if suffix not in _FORMATS:
        raise ConfigError(f"{place}: unknown suffix {suffix!r}; known: {', '.join(_FORMATS)}.")
    missing = [name for name in _ONNX_PACKAGES if suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: ONNX export needs {', '.join(missing)}, which is not installed: pip install 'lightning_quant[onnx]'."
        )


# -- options --------------------------------------------------------------------------------------------------------


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


# -- formats: one row each ------------------------------------------------------------------------------------------------

Run = Callable[[Any], tuple[list[Tensor], list[Tensor | None]]]  # example input -> (outputs, integers at the taps)


def _run_program(path: Path, taps: Sequence[Tap] = ()) -> Run:
    module = torch.export.load(path).module()

    def run(example_input: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        outputs, made = call_watched(module, example_input)
        return outputs, [made[tap.place] if tap.place < len(made) else None for tap in taps]

    return run


def _run_onnx(path: Path, taps: Sequence[Tap] = (), exact_sums: bool = True) -> Run:
    try:
        there = made_in(path, {tap.value for tap in taps}) if taps else []
        session = runner(path, exact_sums=exact_sums, more=there)
    except Exception as error:
        raise ParityError(f"onnxruntime cannot run the exported file, so it was not written: {error}") from error

    def run(example_input: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        outputs, found = session(example_input)
        values = dict(zip(there, found, strict=True))
        return outputs, [values.get(tap.value) for tap in taps]

    return run


def _save_program(program: torch.export.ExportedProgram, path: Path, **_: Any) -> None:
    torch.export.save(program, path)


_FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Run]]] = {
    ".onnx": (write_onnx, _run_onnx),
    ".pt2": (_save_program, _run_program),
}

Profile = Literal["onnxruntime", "openvino", "tensorrt"]
_PROFILES = {
    "onnxruntime": Dialect(packed=True),
    "openvino": Dialect(float_clips=True),
    "tensorrt": Dialect(signed=True, float_clips=True, float_biases=True),
}


def _dialect(profile: str, signed: bool | None, program: torch.export.ExportedProgram) -> Dialect:
    if profile not in _PROFILES:
        raise ConfigError(f"profile: expected one of {', '.join(map(repr, _PROFILES))}, got {profile!r}.")
    dialect = _PROFILES[profile]
    if signed is not None:
        dialect = replace(dialect, signed=signed)
    shifted = [layer for layer, zero, middle in zero_points_of(program) if zero != middle]
    if profile == "tensorrt" and (shifted or not dialect.signed):
        names = ", ".join(dict.fromkeys(repr(name) for name in shifted[:5]))
        raise ConfigError(
            "profile='tensorrt': TensorRT knows signed activations with the zero point 0 alone, and "
            + (f"those of {names} have another" if shifted else "signed=False asks for unsigned ones")
            + ". Train with quant_dtype 'int8' and quant_scheme 'symmetric' for _input_ and _output_, and leave signed out."
        )
    return dialect


# -- export and its check -------------------------------------------------------------------------------------------------


_PAIR, _FEW = "file, deployed", 32


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

    def __call__(self, example: Any, prepared: nn.Module | None = None) -> ParityReport:
        """Compare outputs on the whole example, integers on its first samples (all of them, if the batch size is fixed)."""
        taps, steps = taps_of(self.program), steps_of(self.program)
        run = _FORMATS[self.path.suffix][1]
        wanted = _call(self.deployed, example)
        outputs = outputs_parity(_PAIR, run(self.path)(copied(example))[0], wanted, steps)
        if prepared is not None:
            with undisturbed(prepared):
                outputs += outputs_parity("deployed, prepared in eval", wanted, _call(prepared, example), steps)
                with simulated(prepared):
                    outputs += outputs_parity("deployed, fake-quantized", wanted, _call(prepared, example), steps)
        layers: list[LayerParity] = []
        if taps:
            few = _few(example) if self.free else example
            _, made = call_watched(self.deployed, few)
            if len(made) <= max(tap.place for tap in taps):  # the exporter may drop what is not used
                _, made = call_watched(self.program.module(), few)
            _, found = run(self.path, taps)(copied(few))
            for tap, integers in zip(taps, found, strict=True):
                expected = made[tap.place]
                if integers is not None and expected is not None:
                    layers.append(layer_parity(tap, integers, expected))
        return ParityReport(file=self.name, layers=tuple(layers), outputs=tuple(outputs))

    def raise_unless(self, report: ParityReport, atol: float | None, min_equal: float | None, why: str) -> None:
        exact = only_integers_meet_grids(self.program)
        allowed = atol if atol is not None else (1e-4 if exact else 5e-2)
        least = min_equal if min_equal is not None else (1.0 if exact and atol is None else 0.0)
        raise_unless(report, target=self.name, pair=_PAIR, atol=allowed, min_equal=least, why=why)


def _call(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = split_example(copied(example))  # a forward may write to what it is given
    with torch.no_grad():
        return list(tensors_in(model(*args, **kwargs)))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written, and what was found out about it. `execution`: of `.onnx` files."""

    path: Path
    parity: ParityReport
    execution: ExecutionReport | None

    def summary(self) -> str:
        """One line."""
        return "; ".join([self.parity.summary(), *([self.execution.summary()] if self.execution is not None else [])])


def export_model(
    deployed: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    atol: float | None = None,
    min_equal: float | None = None,
    min_int8_share: float | None = None,
    profile: Profile = "onnxruntime",
    signed: bool | None = None,
    reduce_range: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a deployed model to `path`, in the format of its suffix, checked against the model before it appears there.

    `.onnx`: opset 21, QuantizeLinear/DequantizeLinear around Conv and Gemm, int8 weight and int32 bias initializers (INT4 where a
    weight's integers have no more than 4 bits; onnxruntime widens them when it loads); checked in onnxruntime. Its metadata say
    versions, the grids of its inputs and the work of each node. `.pt2`: an ExportedProgram with our own operators;
    `load_deployed` reads it. `export_with_reports` is the same and returns what was found.

    Args:
        deployed: what `convert_model` returned (any module in eval mode works). Moved nowhere: put it on the CPU first.
        path: where to; folders are made.
        example_input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (tuple, dict). Its
            outputs are compared, and the integers of its first 32 samples in every layer; give real data, as much as you like.
        dynamic_batch: leave dimension 0 free on every input that shares the length of the first one's.
        dynamic_size: leave dimensions 2 and up free on every input: height and width, or length.
        atol: allowed difference of any output, relative to its largest finite absolute value. None: 1e-4 where every
            quantized tensor comes from integers (or is an input), so that a runtime can only agree; 5e-2 where a float
            operator stands before a quantizer, whose last bit may tip a value to the next level.
        min_equal: the least share of equal integers in any layer. None: 1.0 where atol's None means 1e-4, else 0.
        min_int8_share: `.onnx`: the least share of multiply-adds that onnxruntime runs in int8.
        profile: `.onnx`: the runtime that it is for. "onnxruntime": unsigned activations, activation functions that saturation
            does not do as Clip of integers. "openvino": the same with Relu and Clip of floats, no INT4. "tensorrt": as that,
            activations signed with zero point 0 (the model must be trained so), float biases.
        signed: `.onnx`: activations as int8, zero points moved by 128 (the integers' meaning stays); None: as the profile has it.
        reduce_range: check that no weight needs more than 7 bits, so that sums do not saturate on CPUs without VNNI, and that
            onnxruntime's default kernels agree here. Nothing is rounded anew: train with quant_dtype 'int7' for weights.
        metadata: `.onnx`: further metadata, keys without the prefix `lightning_quant.`.

    Returns:
        The path.

    Raises:
        ConfigError: unknown suffix, missing package, a forward that cannot be exported, a choice that the model rules out.
        ParityError: the file computes something else, or less in int8 than asked for; the target is as it was before.
    """
    options = {key: value for key, value in locals().items() if key not in ("deployed", "path")}
    return export_with_reports(deployed, path, **options).path


OPTIONS = tuple(inspect.signature(export_model).parameters)[2:]


def export_with_reports(deployed: nn.Module, path: str | os.PathLike[str], **options: Any) -> Exported:
    """As `export_model`, with the same options; returns the path, the parity report and, of `.onnx`, the execution report."""
    given = {name: one.default for name, one in inspect.signature(export_model).parameters.items() if name in OPTIONS} | options
    return _export(deployed, Path(path), **given)


def _export(
    deployed: nn.Module,
    target: Path,
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
) -> Exported:
    check_format(target.suffix, f"path {os.fspath(target)!r}")
    if any(module.training for module in deployed.modules()):
        raise ConfigError(
            f"{type(deployed).__name__} is in train mode; export what convert_model returned, or call eval() first."
        )
    given: dict[str, Any] = {"min_int8_share": min_int8_share, "signed": signed, "metadata": metadata}
    given["profile"] = None if profile == "onnxruntime" else profile
    if target.suffix != ".onnx" and (named := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{', '.join(named)}: for .onnx files alone, not for {target.suffix}.")
    write = _FORMATS[target.suffix][0]
    example = moved(example_input, "cpu")
    program = program_of(deployed, example, dynamic_batch, dynamic_size)
    dialect = _dialect(profile, signed, program)
    if reduce_range:
        _check_range(deployed)
    notes = {"package": _version(), "torch": torch.__version__, "profile": profile, **(metadata or {})}
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        write(program, beside, dialect=dialect, notes=notes)
        compare = _Comparison(path=beside, name=target.name, deployed=deployed, program=program, free=dynamic_batch)
        report = compare(example)
        compare.raise_unless(report, atol, min_equal, f"nothing was written to {target}")
        execution = None
        if target.suffix == ".onnx":
            _check_default_kernels(beside, target, _call(deployed, example), example, compare, atol, reduce_range)
            execution = replace(execution_report(beside), file=target.name)
            if min_int8_share is not None and not execution.keeps(min_int8_share):
                raise ParityError(
                    f"{target.name}: onnxruntime would run {execution.int8_share:.1%} of the multiply-adds in int8, less than "
                    f"the {min_int8_share:.1%} of min_int8_share; nothing was written to {target}. {execution.summary()}."
                )
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return Exported(path=target, parity=report, execution=execution)


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
        ConfigError: the file is missing, of no known format, or of another model; no batch.
        ParityError: a bound is not kept.
    """
    source = Path(path)
    check_format(source.suffix, f"path {os.fspath(path)!r}")
    if not source.is_file():
        raise ConfigError(f"path {os.fspath(path)!r}: there is no such file.")
    if prepared is not None and not prepared_groups(prepared):
        raise ConfigError(f"prepared: {type(prepared).__name__} is not prepared; give what prepare_model changed.")
    reports: list[ParityReport] = []
    compare: _Comparison | None = None
    for batch in batches:
        example = moved(batch, "cpu")
        if compare is None:
            program = program_of(deployed, example, dynamic_batch)
            compare = _Comparison(path=source, name=source.name, deployed=deployed, program=program, free=dynamic_batch)
        reports.append(compare(example, prepared))
    if compare is None:
        raise ConfigError("batches: there is none; give at least one example input.")
    if len({tuple((layer.name, layer.value) for layer in report.layers) for report in reports}) != 1:
        raise ConfigError(f"path {os.fspath(path)!r}: the layers differ from batch to batch; compare with one batch at a time.")
    report = merged(reports)
    compare.raise_unless(report, atol, min_equal, "the file was not changed")
    return report


def _check_default_kernels(
    path: Path, target: Path, wanted: list[Tensor], example: Any, compare: _Comparison, atol: float | None, must: bool
) -> None:
    """Where onnxruntime's default kernels saturate and differ: an error if the caller ruled that out, else a warning."""
    outputs = outputs_parity(_PAIR, _run_onnx(path, exact_sums=False)(copied(example))[0], wanted, [])
    try:
        compare.raise_unless(ParityReport(file=target.name, layers=(), outputs=tuple(outputs)), atol, None, "")
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
