# SPDX-License-Identifier: Apache-2.0
"""Owns what others in a Trainer ask of us: precision for integers, parameter groups without strangers, how far a run is."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import nn
from torch.optim import Optimizer

from lightning_quant.config import ConfigError
from lightning_quant.prepare import give_to_optimizers, learned_parameters
from lightning_quant.schedule import Clock

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that keeps weights in less than float32, or in layers of its own.

    Integers are made from weights: of those in bfloat16, which has 8 bits, neighbours would fall together.
    """
    plugin, found = type(trainer.precision_plugin).__name__, str(trainer.precision)
    if found in PRECISIONS and plugin != "BitsandbytesPrecision":
        return
    what = f"precision={found!r}" if found not in PRECISIONS else f"the precision plugin {plugin}"
    instead = "16-mixed" if found == "16-true" else "bf16-mixed"
    raise ConfigError(
        f"{what}: the weights that are rounded to integers would not be in float32; allowed: {', '.join(PRECISIONS)}. Use "
        f"Trainer(precision={instead!r})."
    )


def clock_of(trainer: pl.Trainer, pl_module: pl.LightningModule, total_steps: float) -> Clock:
    """The time of the training batch that begins; `total_steps`: optimizer steps of the run as Lightning estimates them.

    That estimate is a step a batch. Optimizers stepped by hand make more steps or fewer: such a run is measured by its batches,
    or by its steps where `max_steps` ends it earlier. Batches are counted from the epoch, the only count that is right whenever
    the checkpoint of a resumed run was saved.
    """
    step, epoch = trainer.global_step, trainer.current_epoch
    if pl_module.automatic_optimization:
        return Clock(step=step, epoch=epoch, done=step, length=total_steps)
    ends: list[tuple[float, float]] = []
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and math.isfinite(batches):
        ends.append((epoch * batches + trainer.fit_loop.batch_idx, epochs * batches))
    if trainer.max_steps > 0:
        ends.append((step, trainer.max_steps))
    done, length = max(ends, key=lambda end: end[0] / end[1], default=(step, math.inf))
    return Clock(step=step, epoch=epoch, done=done, length=length)


# -- finetuning ------------------------------------------------------------------------------------------------------------


def stand_before_finetuning(trainer: pl.Trainer, callback: Callback) -> None:
    """Have our hooks run before those of finetuning callbacks; the others keep their order, also while they are being called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = next((place for place, other in enumerate(callbacks) if isinstance(other, BaseFinetuning)), len(callbacks))
    if callback in callbacks[first + 1 :]:
        callbacks.remove(callback)
        callbacks.insert(first, callback)


class ParameterGroups:
    """What methods learn, in the optimizers' parameter groups, where a finetuning callback adds groups to these.

    Such a callback writes down, at the start of an epoch, which parameters each group has, by the names that the model has for
    them; on a resume it builds the groups from that. What our methods learn has no name there: it stands aside meanwhile.

    `places`: learned number -> [optimizer, parameter group, place in its list], plain numbers for a checkpoint.
    """

    def __init__(self) -> None:
        self.places: dict[str, list[int]] = {}
        self._aside = False

    def begin(self, trainer: pl.Trainer, model: nn.Module, *, resumed: bool, names: Container[str] | None) -> None:
        """Give what is learned to the optimizers; on a resume, to the groups that there were, once they are there again.

        A finetuning callback builds them after our turn; next, the states of the optimizers are loaded. `names`: what these
        states know; None for all that is learned.
        """
        self._aside = False
        waiting = dict(self.places) if resumed else {}
        if not (waiting and _finetunes(trainer)):
            give_to_optimizers(model, trainer.optimizers, names)
            return

        def put(*_: Any) -> None:
            _put(model, trainer.optimizers, waiting)
            waiting.clear()

        for optimizer in trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(put)

    def set_aside(self, trainer: pl.Trainer, model: nn.Module) -> None:
        """Take what is learned out of the groups; what the optimizers keep for it stays."""
        if not _finetunes(trainer):
            return
        learned = learned_parameters(model)
        names = {id(parameter): name for name, parameter in learned.items()}
        self.places, self._aside = {}, True
        for o, optimizer in enumerate(trainer.optimizers):
            for g, group in enumerate(optimizer.param_groups):
                found = {names[id(p)]: [o, g, place] for place, p in enumerate(group["params"]) if id(p) in names}
                group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in names]
                self.places |= found

    def put_back(self, trainer: pl.Trainer, model: nn.Module) -> None:
        """Undo `set_aside`, if it was done."""
        if self._aside:
            _put(model, trainer.optimizers, self.places)
            self._aside = False


def _finetunes(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _put(model: nn.Module, optimizers: list[Optimizer], places: Mapping[str, list[int]]) -> None:
    learned = learned_parameters(model)
    present = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for name, (o, g, place) in sorted(places.items(), key=lambda item: item[1]):
        if name in learned and id(learned[name]) not in present:
            optimizers[o].param_groups[g]["params"].insert(place, learned[name])
