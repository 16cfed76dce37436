# SPDX-License-Identifier: Apache-2.0
"""Owns what is handed over at the end of a fit: the check that the conversion is the validated model, and its files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_quant.config import ConfigError
from lightning_quant.convert import convert_model, unobserved
from lightning_quant.export import Exported, export_with_reports
from lightning_quant.files import check_folder
from lightning_quant.layers import Plan
from lightning_quant.options import check_plan
from lightning_quant.parity import ParityError
from lightning_quant.prepare import prepared_groups, rounds_all
from lightning_quant.record import copied, split_example, undisturbed
from lightning_quant.schedule import Phase, Schedule
from lightning_quant.targets import tensors_in, uncompiled_name

_NO_EXAMPLE = "export: needs example_input, because the forward could not be recorded from the training data."


def converted(prepared: nn.Module, entry: str, example: Any) -> nn.Module:
    """What `convert_model` makes of a prepared model, checked with the arguments that its submodule `entry` was recorded with.

    Without an `example` nothing is checked.

    Raises:
        ConfigError: if the model is not prepared or a range was never observed.
        ParityError: if the converted model gives other numbers.
    """
    deployed = convert_model(prepared)
    if example is not None:
        check_conversion(prepared.get_submodule(entry), deployed.get_submodule(uncompiled_name(entry)), example)
    return deployed


class Handover:
    """What the process that trained hands to the one that called fit (ddp_spawn, ddp_notebook): a file, read once.

    Nothing else that the callback learns while training comes back from there. `path` is made up before the processes part, and
    stays the same in what is pickled; a copy has its own. The process that made it up removes the file, at its end if not before.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"lightning_quant-{uuid.uuid4().hex}.pt"
        self.owner = os.getpid()
        self.waiting = True  # whether a fit may have ended elsewhere; not so where this process fits
        weakref.finalize(self, _remove, self.path, self.owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        twin = Handover()
        twin.waiting = self.waiting
        if self.path.is_file():
            os.link(self.path, twin.path)
        return twin

    def give(self, **parts: Any) -> dict[str, str]:
        """Write the file. Of parts that cannot be pickled nothing is handed over; returns the reasons, by name."""
        content, failed = {}, {}
        for name, part in parts.items():
            buffer = io.BytesIO()
            try:
                torch.save(part, buffer)
                content[name] = buffer.getvalue()
            except Exception as error:  # noqa: BLE001  (pickle raises many kinds)
                failed[name] = f"{type(error).__name__}: {error}"
        partial = self.path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            torch.save(content, file)
        partial.replace(self.path)
        return failed

    def take(self) -> dict[str, Any]:
        """The parts, if a fit has ended elsewhere since; the file is gone then. Processes of a later fit or test only read it."""
        if not self.waiting or not self.path.is_file():
            return {}
        content = torch.load(self.path, weights_only=True)
        if os.getpid() == self.owner:
            self.path.unlink()
        else:
            self.waiting = False
        return {name: torch.load(io.BytesIO(part), map_location="cpu", weights_only=False) for name, part in content.items()}


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has a copy of what is to be finalized
        path.unlink(missing_ok=True)


def fits_elsewhere(trainer: pl.Trainer) -> bool:
    """Whether this process was started for the fit and is gone after it, while another one called fit."""
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(trainer.strategy.launcher).__mro__)


def writes(trainer: pl.Trainer) -> bool:
    """Whether this process writes the files of a fit; a trial run overwrites nothing."""
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)


def check_conversion(prepared: nn.Module, deployed: nn.Module, example: Any) -> None:
    """Raise a ParityError unless both give the same numbers; a forward that looks into its layers may not."""
    try:
        expected = _outputs(prepared, example)
    except Exception as error:  # noqa: BLE001  (a forward that needs its trainer, say: nothing is known against the conversion)
        rank_zero_warn(f"the conversion was not checked: a copy of the trained model fails outside the Trainer: {error}")
        return
    try:
        found = _outputs(deployed, example)
        same = len(expected) == len(found) and all(map(_equal, expected, found))
        why = "gives other numbers than the prepared model in eval mode"
    except Exception as error:  # noqa: BLE001  (whatever the user's forward stumbles on)
        same, why = False, f"fails: {error}"
    if not same:
        raise ParityError(
            f"the converted model {why} on the example input. A forward that reads the weight or the dtype of a fused layer "
            "cannot be converted: leave that layer out of config_list. The trained model is unharmed."
        )


def check_removal(prepared: nn.Module, small: nn.Module, example: Any, biases: Sequence[str]) -> None:
    """Warn if a prepared model without its masked channels gives other numbers than with them.

    Zeros leave sums of integers as they are. Constants that moved into `biases` are rounded with these instead of by themselves.
    """
    try:
        expected = _outputs(prepared, example)
    except Exception:  # noqa: BLE001  (as in check_conversion, which says so)
        return
    found = _outputs(small, example)
    if len(expected) == len(found) and all(map(_equal, expected, found)):
        return
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    most = max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30) for a, b in pairs)
    where = f" The constants of masked channels moved into {', '.join(biases)}, where they are rounded anew." if biases else ""
    rank_zero_warn(
        f"without its masked channels the model differs from what was validated by up to {most:.1e} of an output's largest "
        f"value, on the example input.{where} Mask the biases (and batch norms) of masked channels, too, or keep the channels "
        "(shrink: false) for the very same numbers."
    )


def _outputs(model: nn.Module, example: Any) -> list[torch.Tensor]:
    args, kwargs = split_example(example)
    with undisturbed(model), isolate_rng(), torch.no_grad():
        torch.manual_seed(0)
        return list(tensors_in(model(*copied(args), **copied(kwargs))))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def fingerprint(model: nn.Module) -> str:
    """Tells the module that was fitted from others: its parameters' names, shapes and values, of whatever dtype."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        if not isinstance(parameter, nn.UninitializedParameter):
            digest.update(parameter.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hand_over(
    handover: Handover, parts: Mapping[str, Any], deployed: nn.Module | None, entry: str, folder: Path | None, example: Any
) -> None:
    """Hand `parts` and a deployed model to the process that called fit; a model that cannot be pickled by a file, `model.pt2`.

    `entry`: the name of the module that the file holds, called with `example`. Without a `folder` no such file is written.
    """
    failed = handover.give(**parts, deployed=deployed)
    if "deployed" not in failed:
        return
    if folder is None:  # a trial run overwrites nothing
        rank_zero_warn(
            f"QuantFusionCallback: the deployed model cannot be pickled ({failed['deployed']}); in the process that called fit, "
            "deployed_model is None after a fast_dev_run."
        )
        handover.give(**parts, deployed=None)
        return
    rank_zero_warn(
        f"QuantFusionCallback: the deployed model cannot be pickled ({failed['deployed']}); in the process that called fit, "
        f"deployed_model is what {folder / 'model.pt2'} holds."
    )
    assert deployed is not None
    write_files(deployed.get_submodule(entry), folder, {".pt2": {}}, example)
    handover.give(**parts, file=str(folder / "model.pt2"))


def unfinished(model: nn.Module, phase: Phase, layers: int, schedule: Schedule) -> str | None:
    """Why a prepared model is not to be converted, None if it is: eval mode would not show what is shipped.

    `phase`: that in which training ended, with `layers` of its layers.
    """
    groups, blind = len(prepared_groups(model)), unobserved(model)
    if not phase.quantize or not layers:
        return "no quantized training step was run"
    if blind:
        return f"no range was observed for {', '.join(blind)} (in eval mode while training, or never called)"
    if rounds_all(model):
        return None
    if layers < groups:
        moment = f"progressive={schedule.progressive!r}"
        return f"only {layers} of {groups} layers were quantized by the end ({moment}; let it come earlier)"
    moment = f"activations_start={schedule.activations_start!r}"
    return f"only weights were quantized by the end ({moment}; let activations start earlier)"


def with_config(suffix: str, options: Mapping[str, Any], config_list: Any) -> dict[str, Any]:
    """Options of `export_model` that have an `.onnx` file say what the model was made by."""
    if suffix != ".onnx":
        return dict(options)
    said = {"config_list": json.dumps(config_list, default=str), **(options.get("metadata") or {})}
    return {**options, "metadata": said}


def check_delivery(plan: Plan, formats: Mapping[str, Mapping[str, Any]], example: Any, folder: Path | None) -> None:
    """Raise a ConfigError before training if the files that are asked for cannot be written after it.

    Makes `folder`; without one nothing will be written.
    """
    check_plan(plan, formats)
    if formats and example is None:
        raise ConfigError(_NO_EXAMPLE)
    if folder is None:
        return
    for suffix in formats:
        if (target := folder / f"model{suffix}").is_dir():
            raise ConfigError(
                f"dirpath: {os.fspath(target)!r} is a folder, and the name of a file to write. Give another dirpath."
            )
        check_folder(folder, "dirpath")


def write_files(
    model: nn.Module,
    folder: Path,
    formats: Mapping[str, Mapping[str, Any]],
    example: Any,
    *,
    prepared: nn.Module | None = None,
    config_list: Any = None,
    verbose: int = 0,
) -> tuple[Exported, ...]:
    """Write `model<suffix>` for each format, {suffix: options of `export_model`}; one that fails does not keep others from it.

    `prepared`: what `model` was converted from; it is compared with it, too.

    Raises:
        ConfigError: without an example input.
        ConfigError | ParityError | OSError: the first failure, when all have been tried; warns of further ones.
    """
    if formats and example is None:
        raise ConfigError(_NO_EXAMPLE)
    failed: list[Exception] = []
    done: list[Exported] = []
    for suffix, options in formats.items():
        try:
            asked = {"example_input": example, **with_config(suffix, options, config_list)}
            done.append(exported := export_with_reports(model, folder / f"model{suffix}", prepared=prepared, **asked))
        except (ConfigError, ParityError, OSError) as error:
            failed.append(error)
        else:
            if verbose:
                rank_zero_info(f"QuantFusionCallback: wrote {exported.path}: {exported.summary()}")
    for further in failed[1:]:
        rank_zero_warn(f"QuantFusionCallback: {further}")
    if failed:
        raise failed[0]
    return tuple(done)
