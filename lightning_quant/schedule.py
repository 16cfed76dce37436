# SPDX-License-Identifier: Apache-2.0
"""Owns time: a `Schedule` maps a `Clock` to a `Phase`, as a pure function, so that a resumed run lands where it was."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_quant.config import ConfigError, closest

Moment = int | float | str | None
_TEXT = re.compile(r"\s*(?:(step|epoch)\s+(\d+)|(\d+(?:\.\d+)?)\s*%)\s*")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where training stands: optimizer steps done, epochs done, steps of the whole run (`inf` if unknown)."""

    step: int
    epoch: int
    total_steps: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the quantizers and batch norms do during one training step; plain flags, set from outside the modules."""

    observe: bool = True
    quantize: bool = True
    freeze_batch_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When ranges are observed, when quantization begins and when batch norm stops moving.

    Each field is a moment: an int is an optimizer step, a float in [0, 1] a share of the run, `"epoch 3"`, `"step 500"`
    and `"80%"` say it in words, and None means never. A phase begins with the training step at its moment.

    Args:
        observe_start: first step whose activations move the ranges (a moving average, see `quantizers.py`).
        observe_stop: from here on the ranges stand still.
        quantize_start: from here on training quantizes; before it the observers run on the float model.
        freeze_batch_norm: from here on the batch norms of fused groups normalise with their running statistics and do
            not move them; their weights and biases go on training (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.4).
            Never by default: it steadies a fine-tuning whose rate has decayed, and ruins a run whose rate has not.

    Steps are Lightning's `global_step`: with several optimizers in manual optimization each of them counts; say such moments
    as epochs.

    Raises:
        ConfigError: for a moment that cannot be read, or an observer that stops before it starts.
    """

    observe_start: Moment = 0
    observe_stop: Moment = 0.9
    quantize_start: Moment = 0
    freeze_batch_norm: Moment = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(getattr(self, field.name), field.name)
        (kind, start), (other, stop) = _unit(self.observe_start), _unit(self.observe_stop)
        if kind == other != "never" and 0 < stop <= start:
            raise ConfigError(
                f"schedule: observe_stop={self.observe_stop!r} comes no later than observe_start={self.observe_start!r}: "
                "no range would ever be observed; let it stop later, or never (None)."
            )

    @classmethod
    def make(cls, given: Schedule | Mapping[str, Any] | None) -> Schedule:
        """A Schedule from itself, from a dict of its fields (as YAML gives it) or from None (the defaults)."""
        if given is None or isinstance(given, Schedule):
            return given or cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"schedule: expected a Schedule, a dict of its fields or None, got {given!r}.")
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                hint = closest(str(key), known, 1)
                guess = f" Did you mean {hint[0]!r}?" if hint else ""
                raise ConfigError(f"schedule: unknown key {key!r}; allowed: {', '.join(known)}.{guess}")
        return cls(**given)

    @property
    def needs_total_steps(self) -> bool:
        """Whether a moment is a share of the run, so that its length must be known."""
        return any(_unit(getattr(self, field.name))[0] == "share" for field in fields(self))

    def phase_at(self, clock: Clock) -> Phase:
        """The phase of the training step that begins at `clock`."""
        return Phase(
            observe=_reached(self.observe_start, clock) and not _reached(self.observe_stop, clock),
            quantize=_reached(self.quantize_start, clock),
            freeze_batch_norm=_reached(self.freeze_batch_norm, clock),
        )


def _check(moment: Moment, name: str) -> None:
    kind, value = _unit(moment)
    if kind == "wrong" or (kind == "share" and not 0 <= value <= 1) or value < 0:
        raise ConfigError(
            f"schedule: {name}={moment!r} is no moment; give an int (step), a float in [0, 1] (share of the run), "
            "'epoch 3', 'step 500', '80%' or None (never)."
        )


def _unit(moment: Moment) -> tuple[str, float]:
    if moment is None:
        return "never", math.inf
    if isinstance(moment, bool):
        return "wrong", 0
    if isinstance(moment, int | float):
        return ("step" if isinstance(moment, int) else "share"), moment
    match = _TEXT.fullmatch(moment) if isinstance(moment, str) else None
    if match is None:
        return "wrong", 0
    word, count, percent = match.groups()
    return (word, int(count)) if word else ("share", float(percent) / 100)


def _reached(moment: Moment, clock: Clock) -> bool:
    kind, value = _unit(moment)
    if kind == "epoch":
        return clock.epoch >= value
    if kind == "share":
        # A run of unknown length never reaches a share of itself, except its beginning.
        # The millionth of a step takes back what floats add: 0.07 of 100 steps is step 7, not 8.
        return value == 0 or (math.isfinite(clock.total_steps) and clock.step >= value * clock.total_steps - 1e-6)
    return clock.step >= value
