# SPDX-License-Identifier: Apache-2.0
"""Owns the callback's part in several processes: when they merge, and what comes back to the process that called fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from lightning_quant.delivery import Handover, fits_elsewhere, hand_over
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

    def _take_over(self) -> None:
        """Take what a fit left that ran in processes of its own."""
        if found := self._handover.take():
            self._plan = found.get("plan")
            self._deployed = load_deployed(found["file"]) if "file" in found else found["deployed"]

    def _hand_over(self, trainer: pl.Trainer, entry: str, folder: Path, example: Any) -> None:
        """The end of a fit: leave plan and deployed model to the process that called it, if that is another one."""
        if not fits_elsewhere(trainer):
            self._handover.waiting = True
        elif trainer.is_global_zero:
            hand_over(self._handover, self._plan, self._deployed, entry, folder, example)

    # -- merging ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be merged.

        Raises:
            ConfigError: for a strategy that keeps parts of weights in each process.
        """
        check_strategy(trainer.strategy)
        if stage == "fit":
            self._handover.waiting = False

    def _join_ranks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, parameters: bool) -> None:
        """Begin alike in all processes, and merge from now on. `parameters`: the weights have changed since they were equal."""
        if trainer.world_size > 1:
            check_same_plan(pl_module)
            begin_alike(pl_module, parameters=parameters)
            self._ranks = Ranks(pl_module, trainer.strategy.root_device)

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
        self._handover.waiting = not fits_elsewhere(trainer)

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
