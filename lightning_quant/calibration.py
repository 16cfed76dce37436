# SPDX-License-Identifier: Apache-2.0
"""Owns what the callback does with batches of the training data before training, or instead of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.calibrate import Call, calibrate, correct_biases
from lightning_quant.capture import find_calls
from lightning_quant.config import ConfigError, check_fields
from lightning_quant.equalize import equalize_model
from lightning_quant.layers import Plan
from lightning_quant.ranks import calls_of_all, share_of
from lightning_quant.rounding import learn_rounding
from lightning_quant.targets import is_activation

BATCHES = 32  # as many as calibration takes where nobody says; ranges change little with more


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is done at the start of a fit that begins anew, in this order.

    Calibration is all there is for targets of method `ptq` (post-training quantization, Nagel et al. 2021, arXiv 2106.08295,
    section 3): training rounds them from the moment that the schedule has for it, straight through as `qat`, on ranges that
    stay. Their neighbours of other methods begin from what calibration found, and move on.

    Args:
        equalize: equalize the channels between layers first, the float function unchanged (`equalize_model`).
        batches: with how many batches of the training data the ranges are found, in eval mode (`calibrate`). None: 32 if the
            trainer is to train nothing (`max_epochs=0`) or a target has method `ptq`, else 0, so that training finds them. Of
            several processes each brings its share of that number and calibrates with all of them, as one process would.
        learn_rounding: learn for each weight whether to round it up or down (`learn_rounding`); only where nothing is trained.
        correct_biases: take the mean error of rounding out of biases (`correct_biases`).

    Raises:
        ConfigError: for a value of another type.
    """

    equalize: bool = False
    batches: int | None = None
    learn_rounding: bool = False
    correct_biases: bool = False

    def __post_init__(self) -> None:
        wrong = self.batches is not None and (type(self.batches) is not int or self.batches < 0)
        if wrong:
            raise ConfigError(f"calibration: batches={self.batches!r} is no number of batches; give 0 or more, or None.")
        for name in ("equalize", "correct_biases", "learn_rounding"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"calibration: {name}={getattr(self, name)!r}: expected true or false.")
        if self.batches == 0 and (self.correct_biases or self.learn_rounding):
            raise ConfigError("calibration: correct_biases and learn_rounding need ranges, but batches=0 finds none.")

    @classmethod
    def make(cls, given: Calibration | Mapping[str, Any] | int | None) -> Calibration:
        """A Calibration from itself, a dict of its fields (as YAML gives it), a number of batches, or None (the defaults)."""
        if given is None or isinstance(given, Calibration):
            return given or cls()
        if isinstance(given, int) and not isinstance(given, bool):
            return cls(batches=given)
        if not isinstance(given, Mapping):
            raise ConfigError(f"calibration: expected a number of batches, a dict of settings or None, got {given!r}.")
        check_fields(given, cls, "calibration")
        return cls(**given)


def trains(trainer: pl.Trainer) -> bool:
    """Whether a fit of this trainer runs any training step."""
    return 0 not in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches)


def calibrated_only(plan: Plan) -> list[str]:
    """The activations of a plan whose ranges only calibration finds: 'conv1._output_'."""
    found = [(layer.name, target, one) for layer in plan.layers for target, one in layer.targets.items() if is_activation(target)]
    return [f"{name}.{target}" for name, target, one in found if one.active and one.source is None and one.spec.method == "ptq"]


def _named(targets: Sequence[str]) -> str:
    return targets[0] if len(targets) == 1 else f"{targets[0]} and {len(targets) - 1} more"


def gathered(
    calibration: Calibration, plan: Plan, trainer: pl.Trainer, pl_module: pl.LightningModule, entry: nn.Module, example: Any
) -> list[Call]:
    """The calls of `entry` that are calibrated with, none if nothing is; changes nothing.

    `entry`: the module that was recorded on `example`, None if it could not be.

    Raises:
        ConfigError: if the training data cannot be had, integers would be learned that training moves, there is nothing to
            equalize by, or a target of method `ptq` would have no range.
    """
    training, number, only = trains(trainer), calibration.batches, calibrated_only(plan)
    corrects = calibration.correct_biases or calibration.learn_rounding
    if training and calibration.learn_rounding:
        raise ConfigError(
            "calibration: learn_rounding fixes the integers of the weights, which training would move; use it with "
            "Trainer(max_epochs=0)."
        )
    if calibration.equalize and example is None:
        raise ConfigError("calibration: equalize needs a recorded forward; give example_input.")
    if number == 0 and only:
        raise ConfigError(
            f"calibration: batches=0 finds no range, and method 'ptq' of {_named(only)} has no other; give 1 or more, or None "
            f"for {BATCHES}."
        )
    if number is None:
        number = BATCHES if corrects or only or not training else 0
    if not number:
        return []
    calls = calls_of_all(find_calls(trainer, pl_module, entry, share_of(number)), number, trainer.strategy.root_device)
    if not isinstance(calls, str):
        return calls
    if calibration.batches is None and not corrects and not only:
        return []  # nobody asked for it
    why = f" Method 'ptq' of {_named(only)} needs them." if only else ""
    raise ConfigError(f"calibration: no batch of the training data is to be had: {calls}.{why}")


def equalized(calibration: Calibration, model: nn.Module, example: Any, *, verbose: int) -> None:
    """Equalize the float model, if that is asked for."""
    if calibration.equalize:
        found = equalize_model(model, example_input=example)
        if verbose:
            rank_zero_info(f"calibration: equalized\n{found}")


def calibrated(calibration: Calibration, model: nn.Module, calls: list[Call], *, verbose: int) -> bool:
    """Find the ranges of a prepared model, and what else is asked for; whether it is calibrated now."""
    if not calls:
        return False
    calibrate(model, calls)
    # Corrected biases are the quantized model's: rounding that is learned after them would learn what they have moved.
    reports: list[Any] = [learn_rounding(model, calls)] if calibration.learn_rounding else []
    reports += [correct_biases(model, calls)] if calibration.correct_biases else []
    if verbose:
        said = "".join(f"\n{report}" for report in reports)
        rank_zero_info(f"calibration: ranges found with {len(calls)} batches{said}")
    return True
