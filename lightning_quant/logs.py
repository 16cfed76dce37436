# SPDX-License-Identifier: Apache-2.0
"""Owns what a fit tells the Trainer's loggers, and when: its settings once, phases as they change, measurements every n steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.monitor import (
    Loss,
    Meters,
    Ranges,
    checked_interval,
    clipped_summary,
    drift,
    ranges_of,
    stored_parameters,
)
from lightning_quant.prepare import prepared_groups, quantizers_of, rounds_all
from lightning_quant.schedule import Phase


class Logs:
    """What one callback logs.

    Args:
        every: so many training steps lie between measurements; None or 0 for none, which then cost nothing.

    Attributes:
        ranges: the ranges when they were last logged; they are saved, so that a resumed run logs what an uninterrupted one does.
    """

    def __init__(self, every: int | None) -> None:
        self.every = checked_interval(every)
        self.ranges: Ranges = {}
        self._meters: Meters | None = None
        self._begun = 0  # the optimizer step that is being measured
        self._changed = False

    def begin_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before a training batch: measure from here on, if this step is one of those."""
        if not self.every:
            return
        if (_step_to_log(trainer) + 1) % self.every == 0:
            if self._meters is None:  # else gradients are accumulated: the step goes on
                self._meters, self._begun = Meters(quantizers_of(pl_module)), trainer.global_step
        else:
            self.stop()  # that step was broken off

    def stop(self) -> None:
        """Measure no more: a step may have been broken off, with its fit even."""
        if self._meters is not None:
            self._meters.stop()
            self._meters = None

    def end_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        phase: Phase,
        layers: int,
        further: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """After a training batch: log what was measured, once its step is through, and a phase that has begun.

        `further`: measures what else there is, by the names under which it is logged; without a choice of `log_every_n_steps`
        it is logged in steps of the Trainer's.
        """
        measured = self._meters is not None
        if measured and pl_module.automatic_optimization and trainer.global_step == self._begun:
            return  # where gradients are accumulated the step goes on
        if not measured and not self._changed:
            if not self.every and _trainer_logs(trainer) and (others := further()):
                self._send(trainer, {}, {}, others)
            return
        self._changed = False
        summary: dict[str, float] = {
            "phase": 2 if rounds_all(pl_module) else int(phase.quantize and layers > 0),
            "observe": int(phase.observe),
            "freeze_batch_norm": int(phase.freeze_batch_norm),
        }
        each: dict[str, float] = {}
        others = {}
        if self._meters is not None:
            activations, self._meters = self._meters.stop(), None
            summary.update(clipped_summary(activations))
            ranges = ranges_of(quantizers_of(pl_module))
            if (moved := drift(self.ranges, ranges)) is not None:
                summary["range_drift"] = moved
            self.ranges = ranges
            each, others = dict(_named({**activations, **_parameters(pl_module)})), further()
        self._send(trainer, summary, each, others)

    def _send(
        self, trainer: pl.Trainer, summary: Mapping[str, float], each: Mapping[str, float], others: Mapping[str, float]
    ) -> None:
        """`summary` and `others` go to loggers and `callback_metrics`, `each`, perhaps hundreds of numbers, to loggers alone."""
        named, further = ({f"quant/{name}": float(value) for name, value in part.items()} for part in (summary, each))
        named |= others
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
        for logger in trainer.loggers:  # not pl_module.log: that reaches them in steps of the Trainer's choice only
            logger.log_metrics({**named, **further}, step=_step_to_log(trainer))

    def change(self, trainer: pl.Trainer, before: tuple[Phase, int], now: tuple[Phase, int], of: int, *, verbose: int) -> None:
        """A phase begins with the next batch. `before`, `now`: (phase, how many layers are in it), `of` layers."""
        self._changed = self.every > 0
        if verbose and of and (words := _in_words(before, now, of)):
            rank_zero_info(f"step {trainer.global_step} (epoch {trainer.current_epoch}): {words}")

    def settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, given: Mapping[str, Any]) -> None:
        """Log what the fit was asked for as `quant/<name>`, beside the module's hyperparameters, which are let alone.

        `hparams` are passed to `__init__` by `load_from_checkpoint`. No argument of an `__init__` has a slash in its name, so
        nothing is overwritten. The module's own are sent along: what TensorBoard shows is the last call's. Nothing is logged with
        Trainer(enable_autolog_hparams=False).
        """
        if not getattr(trainer, "enable_autolog_hparams", True):  # Lightning 2.5.1 has no such switch
            return
        ours = {f"quant/{name}": copy.deepcopy(value) for name, value in given.items() if value is not None}
        candidates: tuple[Any, Any] = (pl_module, getattr(trainer, "datamodule", None))
        owners = [one for one in candidates if getattr(one, "_log_hyperparams", False)]
        own = {key: value for one in owners for key, value in one.hparams_initial.items() if key != "_class_path"}
        for logger in trainer.loggers:
            logger.log_hyperparams({**own, **ours})


def _parameters(pl_module: pl.LightningModule) -> dict[str, Loss]:
    """What rounding does to each parameter that is rounded now, by target name."""
    now = [group for _, group in prepared_groups(pl_module).values() if group.phase.quantize]
    rounded = {id(quantizer) for group in now for quantizer in group.parameter_quantizers}
    return {one.name: one.loss for one in stored_parameters(pl_module) if id(one.quantizer) in rounded}


def _named(losses: Mapping[str, Loss]) -> Iterator[tuple[str, float]]:
    for name, loss in losses.items():
        if math.isfinite(loss.signal_to_noise):  # not all loggers can store that nothing was lost
            yield f"signal_to_noise/{name}", loss.signal_to_noise
            yield f"effective_bits/{name}", loss.effective_bits
        yield f"clipped/{name}", loss.clipped


def _in_words(before: tuple[Phase, int], now: tuple[Phase, int], of: int) -> str:
    """What a new phase changes."""
    (old, had), (new, have) = before, now
    words: list[str] = []
    rounds, rounded = new.quantize and have > 0, old.quantize and had > 0
    what = "weights and activations are" if new.quantize_activations else "weights are"
    if rounds and (not rounded or have != had):
        words.append(f"{what} rounded" if have == of else f"{what} rounded in {have} of {of} layers")
    elif rounds and new.quantize_activations and not old.quantize_activations:
        words.append("activations are rounded, too")
    elif rounded and not rounds:
        words.append("nothing is rounded")
    if new.observe != old.observe:
        words.append("ranges move" if new.observe else "ranges freeze")
    if new.freeze_batch_norm != old.freeze_batch_norm:
        words.append("batch norm freezes" if new.freeze_batch_norm else "batch norm moves")
    return ", ".join(words)


def _trainer_logs(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's own numbers of this batch, the last of its step, go to loggers."""
    every, loop = getattr(trainer, "log_every_n_steps", 0), trainer.fit_loop.epoch_loop
    return every > 0 and (_step_to_log(trainer) + 1) % every == 0 and not loop._should_accumulate()


def _step_to_log(trainer: pl.Trainer) -> int:
    """The number under which Lightning's own loggers file this step, the same in all batches that accumulate for it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
