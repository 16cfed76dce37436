# SPDX-License-Identifier: Apache-2.0
"""Owns time: a `Schedule` maps a `Clock` to a `Phase`, as a pure function, so that a resumed run lands where it was."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_quant.config import ConfigError, check_fields
from lightning_quant.keys import guess

Moment = int | float | str | None
WITH_WEIGHTS = "with weights"
_TEXT = re.compile(r"\s*(?:(step|epoch)\s+(\d+)|(\d+(?:\.\d+)?)\s*%)\s*")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where training stands: optimizer steps done, epochs done, and `done` of `length`, the run's, in whatever it is measured.

    `length` is `inf` where it is unknown.
    """

    step: int
    epoch: int
    done: float
    length: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the quantizers and batch norms of a layer do during one training step; plain flags, set from outside the modules.

    `quantize`: its parameters are rounded. `quantize_activations`: so is what goes in and out; false where `quantize` is.
    """

    observe: bool = True
    quantize: bool = True
    quantize_activations: bool = True
    freeze_batch_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize_activations", self.quantize and self.quantize_activations)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When ranges are observed, when quantization begins and when batch norm stops moving.

    Each field is a moment: an int is an optimizer step, a float in [0, 1] a share of the run, `"epoch 3"`, `"step 500"`
    and `"80%"` say it in words, and None means never. A phase begins with the training step at its moment.

    Args:
        observe_start: first step whose activations move the ranges (a moving average, see `quantizers.py`).
        observe_stop: from here on the ranges stand still. By default for the last tenth, in a run of any length: the average
            forgets within some hundred steps, so nothing is lost by a late stop, and what trains on after it is on the grid
            that ships. An earlier stop needs activations that have settled (torchvision's reference: epoch 4 of 90, at a
            fine-tuning rate).
        quantize_start: from here on training quantizes; before it the observers run on the float model.
        activations_start: from here on activations are rounded, too, never before the weights of their layer. "with weights"
            (the default): together with them. None: never; such a run trains weights alone and is not converted.
        progressive: until this moment layers begin one after the other, in the order of the data: layer i of n (from 0) at
            quantize_start + i/n of the way to it, its activations with it or at activations_start, whichever is later. Both
            moments must be of one unit (0 is in any); in epochs a layer begins with the first epoch that has reached its moment.
            None: all layers at once.
        freeze_batch_norm: from here on the batch norms of fused groups normalise with their running statistics and do
            not move them; their weights and biases go on training (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.4).
            Never by default: it steadies a fine-tuning whose rate has decayed, and ruins a run whose rate has not (by 10 to 40
            points when it was the default). The moments in use elsewhere (200 000 steps, epoch 3 of 90, epoch 1) have no share of
            a run in common that could stand here.

    Until everything is rounded, eval mode computes what training computes, on the running statistics of batch norm; from then on
    it runs the integer layers. Steps are Lightning's `global_step`: with several optimizers in manual optimization each of them
    counts; say such moments as epochs or as shares. Shares are measured in optimizer steps; in manual optimization, where the
    steps to come are not known beforehand, in batches, or in steps of `max_steps` where these end the run earlier.

    Raises:
        ConfigError: for a moment that cannot be read, or moments that contradict each other.
    """

    observe_start: Moment = 0
    observe_stop: Moment = 0.9
    quantize_start: Moment = 0
    activations_start: Moment = WITH_WEIGHTS
    progressive: Moment = None
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
        self._check_activations()
        self._check_progressive()

    def _check_activations(self) -> None:
        if self.activations_start in (WITH_WEIGHTS, None):
            return
        if self.quantize_start is None:
            raise ConfigError(
                f"schedule: activations_start={self.activations_start!r} without quantize_start: activations are rounded where "
                "weights are; give quantize_start, or leave activations_start out."
            )
        pair = _in_one_unit(self.quantize_start, self.activations_start)
        if pair is not None and pair[1] < pair[0]:
            raise ConfigError(
                f"schedule: activations_start={self.activations_start!r} comes before quantize_start={self.quantize_start!r}: "
                f"activations are never rounded before weights; let them start later, or {WITH_WEIGHTS!r}."
            )

    def _check_progressive(self) -> None:
        if self.progressive is None:
            return
        pair = _in_one_unit(self.quantize_start, self.progressive)
        if pair is None:
            raise ConfigError(
                f"schedule: progressive={self.progressive!r} and quantize_start={self.quantize_start!r} are not of one unit, and "
                "the layers begin between them; give both as steps, as epochs or as shares of the run."
            )
        if pair[1] <= pair[0]:
            raise ConfigError(
                f"schedule: progressive={self.progressive!r} comes no later than quantize_start={self.quantize_start!r}: no time "
                "is left between the layers; let it come later, or leave it out (None: all at once)."
            )

    @classmethod
    def make(cls, given: Schedule | Mapping[str, Any] | None) -> Schedule:
        """A Schedule from itself, from a dict of its fields (as YAML gives it) or from None (the defaults)."""
        if given is None or isinstance(given, Schedule):
            return given or cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"schedule: expected a Schedule, a dict of its fields or None, got {given!r}.")
        check_fields(given, cls, "schedule")
        return cls(**given)

    @property
    def needs_total_steps(self) -> bool:
        """Whether a moment is a share of the run, so that its length must be known."""
        return any(_unit(getattr(self, field.name))[0] == "share" for field in fields(self))

    def phase_at(self, clock: Clock) -> Phase:
        """The phase of the training step that begins at `clock`, for layers that have begun."""
        return Phase(
            observe=_reached(self.observe_start, clock) and not _reached(self.observe_stop, clock),
            quantize=_reached(self.quantize_start, clock),
            quantize_activations=self.activations_start == WITH_WEIGHTS or _reached(self.activations_start, clock),
            freeze_batch_norm=_reached(self.freeze_batch_norm, clock),
        )

    def layers_at(self, clock: Clock, layers: int) -> int:
        """How many of `layers` layers have begun, the first ones in the order of the data; all where `progressive` is None."""
        if self.progressive is None:
            return layers
        pair = _in_one_unit(self.quantize_start, self.progressive)
        assert pair is not None
        start, stop = pair
        kind = _unit(self.progressive)[0]
        return sum(_past(kind, start + index * (stop - start) / layers, clock) for index in range(layers))


# -- in steps ----------------------------------------------------------------------------------------------------------

CURVES = ("one_shot", "linear", "agp")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When something that grows grows, in how many steps, and along which curve; a pure function of the clock.

    Args:
        schedule: "one_shot": all of it at `start`. "linear": equal parts. "agp": 1 - (1 - t)^3 of it after the share t of the
            steps, fast while much is left and slowly at the end (Zhu and Gupta 2017, "To prune, or not to prune", eq. 1).
        start: the moment from which it grows (see `Schedule`).
        stop: the moment of the last of the steps; the first comes a step's length after `start`.
        updates: the number of steps.

    Raises:
        ConfigError: for a schedule that is none, for moments that are none or not of one unit, for no step.
    """

    schedule: str = "agp"
    start: Moment = 0
    stop: Moment = 0.5
    updates: int = 10

    def __post_init__(self) -> None:
        if self.schedule not in CURVES:
            raise ConfigError(f"schedule: {self.schedule!r} is not one of {', '.join(CURVES)}.{guess(self.schedule, CURVES)}")
        if type(self.updates) is not int or self.updates < 1:
            raise ConfigError(f"updates: expected an integer from 1, got {self.updates!r}.")
        for name in ("start", "stop"):
            _check(getattr(self, name), name)
        if self.start is None or self.schedule == "one_shot":
            return
        pair = _in_one_unit(self.start, self.stop)
        if pair is None:
            raise ConfigError(
                f"schedule: start={self.start!r} and stop={self.stop!r} are not of one unit, and the steps lie between them; "
                "give both as steps, as epochs or as shares of the run."
            )
        if pair[1] <= pair[0]:
            raise ConfigError(f"schedule: stop={self.stop!r} comes no later than start={self.start!r}; let it come later.")

    @property
    def steps(self) -> int:
        """How many there are."""
        return 1 if self.schedule == "one_shot" else self.updates

    @property
    def needs_total_steps(self) -> bool:
        """Whether a moment is a share of the run, so that its length must be known."""
        moments = (self.start,) if self.schedule == "one_shot" else (self.start, self.stop)
        return any(_unit(moment)[0] == "share" for moment in moments)

    def done_at(self, clock: Clock) -> int:
        """How many of the steps are due when the training step at `clock` begins."""
        if self.schedule == "one_shot":
            return int(_reached(self.start, clock))
        if self.start is None:
            return 0
        pair = _in_one_unit(self.start, self.stop)
        assert pair is not None
        start, stop = pair
        kind = _unit(self.stop)[0]
        return sum(_past(kind, start + (stop - start) * step / self.updates, clock) for step in range(1, self.updates + 1))

    def share_after(self, done: int) -> float:
        """What share of the whole is there after `done` of the steps, in [0, 1]."""
        part = done / self.steps
        return 1 - (1 - part) ** 3 if self.schedule == "agp" else part

    def done_by(self, share: float) -> int:
        """How many of the steps are done where this share of the whole is there: the most that come to no more."""
        return max(done for done in range(self.steps + 1) if self.share_after(done) <= share + 1e-12)


def _check(moment: Moment, name: str) -> None:
    if name == "activations_start" and moment == WITH_WEIGHTS:
        return
    kind, value = _unit(moment)
    if kind == "wrong" or (kind == "share" and not 0 <= value <= 1) or value < 0:
        words = f", {WITH_WEIGHTS!r}" if name == "activations_start" else ""
        none = "all at once" if name == "progressive" else "never"
        raise ConfigError(
            f"schedule: {name}={moment!r} is no moment; give an int (step), a float in [0, 1] (share of the run), "
            f"'epoch 3', 'step 500', '80%'{words} or None ({none})."
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


def _in_one_unit(first: Moment, second: Moment) -> tuple[float, float] | None:
    """Both as numbers of one unit; None where they have none in common. The beginning is 0 in every unit."""
    (kind, start), (other, stop) = _unit(first), _unit(second)
    if "never" in (kind, other):
        return None
    return (start, stop) if kind == other or 0 in (start, stop) else None


def _reached(moment: Moment, clock: Clock) -> bool:
    kind, value = _unit(moment)
    return _past(kind, value, clock)


def _past(kind: str, value: float, clock: Clock) -> bool:
    if kind == "epoch":
        return clock.epoch >= value
    if kind == "share":
        # A run of unknown length never reaches a share of itself, except its beginning.
        # The millionth of a step takes back what floats add: 0.07 of 100 steps is step 7, not 8.
        return value == 0 or (math.isfinite(clock.length) and clock.done >= value * clock.length - 1e-6)
    return clock.step >= value
