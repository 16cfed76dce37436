# SPDX-License-Identifier: Apache-2.0
"""Owns what is handed over at the end of a fit: the check that the conversion is the validated model, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_quant.config import ConfigError
from lightning_quant.convert import convert_model
from lightning_quant.export import export_with_reports
from lightning_quant.parity import ParityError
from lightning_quant.record import copied, split_example, undisturbed
from lightning_quant.targets import tensors_in


def converted(prepared: nn.Module, entry: str, example: Any) -> nn.Module:
    """What `convert_model` makes of a prepared model, checked with the arguments that its submodule `entry` was recorded with.

    Without an `example` nothing is checked.

    Raises:
        ConfigError: if the model is not prepared or a range was never observed.
        ParityError: if the converted model gives other numbers.
    """
    deployed = convert_model(prepared)
    if example is not None:
        check_conversion(prepared.get_submodule(entry), deployed.get_submodule(entry), example)
    return deployed


def check_conversion(prepared: nn.Module, deployed: nn.Module, example: Any) -> None:
    """Raise a ParityError unless both give the same numbers; a forward that looks into its layers may not."""
    args, kwargs = split_example(example)

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with undisturbed(model), isolate_rng(), torch.no_grad():
            torch.manual_seed(0)
            return list(tensors_in(model(*copied(args), **copied(kwargs))))

    try:
        expected = outputs(prepared)
    except Exception as error:  # noqa: BLE001  (a forward that needs its trainer, say: nothing is known against the conversion)
        rank_zero_warn(f"the conversion was not checked: a copy of the trained model fails outside the Trainer: {error}")
        return
    try:
        found = outputs(deployed)
        same = len(expected) == len(found) and all(map(_equal, expected, found))
        why = "gives other numbers than the prepared model in eval mode"
    except Exception as error:  # noqa: BLE001  (whatever the user's forward stumbles on)
        same, why = False, f"fails: {error}"
    if not same:
        raise ParityError(
            f"the converted model {why} on the example input. A forward that reads the weight or the dtype of a fused layer "
            "cannot be converted: leave that layer out of config_list. The trained model is unharmed."
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def write_files(model: nn.Module, folder: Path, formats: Mapping[str, Mapping[str, Any]], example: Any, *, verbose: int) -> None:
    """Write `model<suffix>` for each format, {suffix: options of `export_model`}; one that fails does not keep others from it.

    Raises:
        ConfigError: without an example input.
        ConfigError | ParityError | OSError: the first failure, when all have been tried; warns of further ones.
    """
    if formats and example is None:
        raise ConfigError("export: needs example_input, because the forward could not be recorded from the training data.")
    failed: list[Exception] = []
    for suffix, options in formats.items():
        try:
            exported = export_with_reports(model, folder / f"model{suffix}", **{"example_input": example, **options})
        except (ConfigError, ParityError, OSError) as error:
            failed.append(error)
        else:
            if verbose:
                rank_zero_info(f"QuantFusionCallback: wrote {exported.path}: {exported.summary()}")
    for further in failed[1:]:
        rank_zero_warn(f"QuantFusionCallback: {further}")
    if failed:
        raise failed[0]
