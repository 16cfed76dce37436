# SPDX-License-Identifier: Apache-2.0
"""Owns the formats: for each suffix what must be installed, how a program is written and how the file is run again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_quant.config import ConfigError
from lightning_quant.files import read_program, write_program
from lightning_quant.onnx_graph import Style, write_onnx
from lightning_quant.parity import ParityError, call_watched
from lightning_quant.program import Tap, zero_points_of
from lightning_quant.runtime import made_in, runner

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_format(suffix: Any, place: str) -> None:
    """Raise a ConfigError if `suffix` is no format, or one whose packages are missing; costs no import."""
    if suffix not in (known := (*FORMATS, WEIGHTS)):
        raise ConfigError(f"{place}: unknown suffix {suffix!r}; known: {', '.join(known)}.")
    missing = [name for name in _ONNX_PACKAGES if suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: ONNX export needs {', '.join(missing)}, which is not installed: pip install 'lightning_quant[onnx]'."
        )


Run = Callable[[Any], tuple[list[Tensor], list[Tensor | None]]]  # example input -> (outputs, integers at the taps)


def run_program(path: Path, taps: Sequence[Tap] = ()) -> Run:
    """What runs a `.pt2` file and returns its outputs and the integers at `taps`, None where it has none there."""
    module = read_program(path).module()

    def run(example_input: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        outputs, made = call_watched(module, example_input)
        return outputs, [made[tap.place] if tap.place < len(made) else None for tap in taps]

    return run


def run_onnx(path: Path, taps: Sequence[Tap] = (), exact_sums: bool = True) -> Run:
    """The same for an `.onnx` file, in onnxruntime; `exact_sums` as in `onnxruntime_session`.

    Raises:
        ParityError: if onnxruntime does not take the file.
    """
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


def _write_program(program: torch.export.ExportedProgram, path: Path, **_: Any) -> None:
    write_program(program, path)


FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Run]]] = {
    ".onnx": (write_onnx, run_onnx),
    ".pt2": (_write_program, run_program),
}

WEIGHTS = ".pt"  # numbers and a manifest; see loading.py

# -- files for one runtime and another --

Profile = Literal["onnxruntime", "openvino", "tensorrt"]
PROFILES = {
    "onnxruntime": Style(packed=True),
    "openvino": Style(float_clips=True),
    "tensorrt": Style(signed=True, float_clips=True, float_biases=True),
}


def style_of(profile: str, signed: bool | None, program: torch.export.ExportedProgram) -> Style:
    """How `profile` wants the program written; `signed` None: as the profile has it.

    Raises:
        ConfigError: if the profile is unknown, or the program's grids are none that its runtime knows.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile: expected one of {', '.join(map(repr, PROFILES))}, got {profile!r}.")
    style = PROFILES[profile]
    if signed is not None:
        style = replace(style, signed=signed)
    shifted = [layer for layer, zero, middle in zero_points_of(program) if zero != middle]
    if profile == "tensorrt" and (shifted or not style.signed):
        names = ", ".join(dict.fromkeys(repr(name) for name in shifted[:5]))
        raise ConfigError(
            "profile='tensorrt': TensorRT knows signed activations with the zero point 0 alone, and "
            + (f"those of {names} have another" if shifted else "signed=False asks for unsigned ones")
            + ". Train with quant_dtype 'int8' and quant_scheme 'symmetric' for _input_ and _output_, and leave signed out."
        )
    return style
