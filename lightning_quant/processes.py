# SPDX-License-Identifier: Apache-2.0
"""Owns the callback's part in several processes: when they merge, and what comes back to the process that called fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_quant.delivery import Handover, fingerprint, fits_elsewhere, hand_over
from lightning_quant.export import load_deployed
from lightning_quant.layers import Plan
from lightning_quant.ranks import Ranks, begin_alike, check_same_plan, check_strategy, from_first, statistics_of_first, together

_HEAVY = ("optimizer_states", "lr_schedulers", "loops")  # parts of a checkpoint that conversion has no use for
Chosen = tuple[str, dict[str, Any]] | None  # a checkpoint's path and content


class ManyProcesses(Callback):
    """What a callback needs that trains in several processes, or in others than the one that called fit."""

    def __init__(self) -> None:
        super().__init__()
        self._handover = Handover()
        self._plan: Plan | None = None
        self._deployed: nn.Module | None = None
        self._shrunk: Any = None
        self.pruning_plan: Any = None
        self._left: dict[str, Any] = {}  # the callback's state at the end of a fit elsewhere, and the module's fingerprint
        self._ranks: Ranks | None = None  # in training with several processes

    # -- what comes back --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """What was decided."""
        self._take_over()
        return self._plan

    @plan.setter
    def plan(self, plan: Plan | None) -> None:
        self._plan = plan

    @property
    def deployed_model(self) -> nn.Module | None:
        """The converted model."""
        self._take_over()
        return self._deployed

    @deployed_model.setter
    def deployed_model(self, model: nn.Module | None) -> None:
        self._deployed = model

    @property
    def shrunk(self) -> Any:
        """What was removed, a `shrink.Shrunk`; None where nothing was. Of a fit elsewhere its `model` is `deployed_model`."""
        self._take_over()
        return self._shrunk

    @shrunk.setter
    def shrunk(self, shrunk: Any) -> None:
        self._shrunk = shrunk

    def _take_over(self) -> None:
        """Take what a fit left that ran in processes of its own."""
        if found := self._handover.take():
            self._plan, self._left = found.get("plan"), found.get("left") or {}
            self._deployed = load_deployed(found["file"]) if "file" in found else found.get("deployed")
            self.pruning_plan, shrunk = found.get("pruning_plan"), found.get("shrunk")
            self._shrunk = None if shrunk is None else replace(shrunk, model=self._deployed)

    def _elsewhere(self) -> dict[str, Any]:
        """The callback's state at the end of the last fit, if that ran elsewhere."""
        self._take_over()
        return dict(self._left.get("state", {}))

    def _left_for(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> dict[str, Any]:
        """That state, if `pl_module` is what was fitted (told by its weights, since a process may have a copy); else it goes."""
        if (state := self._elsewhere()) and self._left["module"] != fingerprint(pl_module):
            self._left, state = {}, {}
            if stage != "fit" and not trainer.ckpt_path:
                rank_zero_warn(
                    f"{type(self).__name__}: the weights are not those with which the last fit ended in its own processes, so "
                    f"{getattr(stage, 'value', stage)} shows the float model. Give ckpt_path= to show what a checkpoint holds."
                )
        return state

    def _hand_over(self, trainer: pl.Trainer, entry: str, folder: Path, example: Any) -> None:
        """The end of a fit: leave plan and deployed model to the process that called it, if that is another one."""
        if not fits_elsewhere(trainer):
            self._handover.waiting, self._left = True, {}
        elif trainer.is_global_zero:
            state = self.state_dict()
            left = {"state": state, "module": fingerprint(trainer.lightning_module)} if state else {}
            place = None if getattr(trainer, "fast_dev_run", False) else folder
            shrunk = None if self._shrunk is None else replace(self._shrunk, model=None)  # the deployed one comes along
            parts = {"plan": self._plan, "left": left, "pruning_plan": self.pruning_plan, "shrunk": shrunk}
            hand_over(self._handover, parts, self._deployed, entry, place, example)

    # -- merging ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be merged.

        Raises:
            ConfigError: for a strategy that keeps parts of weights in each process.
        """
        check_strategy(trainer.strategy)
        if stage == "fit":
            self._take_over()
            self._handover.waiting = False
            if fits_elsewhere(trainer):
                trainer.strategy.barrier()  # all have read what the last fit left
                if trainer.is_global_zero:  # if this one fails, nothing of the last may look like its result
                    self._handover.give(plan=None, deployed=None)

    def _join_ranks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, parameters: bool, observe: bool) -> None:
        """Begin alike in all processes, and merge from now on.

        `parameters`: the weights have changed since they were equal. `observe`: whether ranges are to move now.
        """
        if trainer.world_size > 1:
            check_same_plan(pl_module)
            begin_alike(pl_module, parameters=parameters)
            self._ranks = Ranks(pl_module, trainer.strategy.root_device)
            self._watch(observe)

    def _watch(self, observe: bool) -> None:
        """Ranges move from now on, or do not."""
        if self._ranks is not None:
            self._ranks.watch(observe)

    def _leave_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.leave()
        self._ranks = None

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Average the gradients of what is learned when DistributedDataParallel does: a GradScaler looks at them after this."""
        if self._ranks is not None and getattr(trainer.model, "require_backward_grad_sync", True):
            self._ranks.average_gradients()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Processes have met for the last time."""
        self._leave_ranks()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """No other process is waited for after this."""
        self._leave_ranks()
        self._handover.waiting = not fits_elsewhere(trainer) or self._handover.owner == os.getpid()  # who called fit is told, too

    # -- the end ----------------------------------------------------------------------------------------------------

    def _deliver_together(
        self, trainer: pl.Trainer, pl_module: nn.Module, choose: Callable[[], Chosen], deliver: Callable[[Any, Any], None]
    ) -> None:
        """Call `deliver` with the checkpoint that the first process chooses and reads, and with its statistics of batch norm.

        A failure in one process is one in all.
        """
        if (chosen := together(lambda: choose() if trainer.is_global_zero else None)) is not None:
            chosen = chosen[0], {key: part for key, part in chosen[1].items() if key not in _HEAVY}
        chosen, statistics = from_first(chosen), statistics_of_first(pl_module)
        together(lambda: deliver(chosen, statistics))


def give_statistics(model: nn.Module, statistics: dict[str, torch.Tensor]) -> None:
    """Put these in the place of a model's own, by name."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in statistics:
                buffer.copy_(statistics[name])
