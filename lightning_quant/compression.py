# SPDX-License-Identifier: Apache-2.0
"""Owns the callback's part in pruning and distillation: what is attached, when masks are made, what joins the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_quant.config import ConfigError, parse_pruning
from lightning_quant.convert import copy_of
from lightning_quant.delivery import check_removal, converted
from lightning_quant.distillation import plain
from lightning_quant.distiller import Distiller
from lightning_quant.evaluation import EvaluatesAsShipped
from lightning_quant.graph import Graph
from lightning_quant.keys import DISTILLATION_METHODS
from lightning_quant.layers import Plan
from lightning_quant.masked import unmask_all
from lightning_quant.masks import Masks, make_pruning
from lightning_quant.prepare import LEARNED, drop_deployed_layers, prepared_groups
from lightning_quant.pruning_plan import Pruning, PruningPlan
from lightning_quant.schedule import Clock
from lightning_quant.shrink import shrink_model, unread_values
from lightning_quant.sources import read_config
from lightning_quant.tables import Tables
from lightning_quant.trial import UncallableError

_END = Clock(step=2**62, epoch=2**62, done=1.0, length=1.0)


class Compresses(EvaluatesAsShipped):
    """What a callback needs that masks parameters and has a teacher, before and while it quantizes."""

    config_list: Any
    verbose: int
    root: str | None

    def __init__(self, pruning: Any, distillation: Any, teacher: Any) -> None:
        super().__init__()
        self.pruning: Pruning | None = None
        if pruning is not None:
            self.pruning = Pruning.make(read_config(pruning, presets=(), name="pruning"))
            parse_pruning(self.pruning.config_list)
        self.distillation: Any = None
        self._distiller: Distiller | None = None
        if distillation is not None or teacher is not None:
            if distillation is not None:
                self.distillation = read_config(distillation, presets=DISTILLATION_METHODS, name="distillation")
            self._distiller = Distiller(self.distillation, teacher)
        self.masks: Masks | None = None
        self.pruning_plan: PruningPlan | None = None
        self._told_why = False  # why there are no masks
        self._handles: list[RemovableHandle] = []  # of the optimizers' hooks, while training goes on

    # -- attach ---------------------------------------------------------------------------------------------------------

    def _plan_masks(self, pl_module: nn.Module, graph: Graph | None, plan: Plan) -> None:
        """Decide what is masked, on the float model that `graph` is a forward of and `plan` quantizes."""
        if self.pruning is not None:
            given = None if self._distiller is None else self._distiller.given
            teacher = given if isinstance(given, nn.Module) else None
            self.pruning_plan = make_pruning(pl_module, self.pruning, graph, root=self.root, teacher=teacher, quantized=plan)

    def _attach_masks(self, pl_module: nn.Module) -> None:
        """Before quantizers: they see what is masked."""
        if self.pruning_plan is not None:
            self.masks, self._told_why = Masks(pl_module, self.pruning_plan), False

    def _attach_teacher(self, pl_module: nn.Module) -> None:
        """Before masks and quantizers: the float model may be its own teacher."""
        if self._distiller is not None:
            self._distiller.begin(pl_module, entry=self._entry, example=self._example, root=self.root)

    @override
    def _restore(self, pl_module: nn.Module) -> None:
        """Modules have their own classes again, and the teacher is as it was; masked values stay zero."""
        super()._restore(pl_module)
        self._end_teaching()
        self._end_masking()
        unmask_all(pl_module)  # those of another callback, too
        self.masks = None

    def _mask_untrained(self) -> None:
        """All masks at once, where no training follows."""
        if self.masks is not None and not self.masks.step(_END) and self.masks.done == 0:
            self._told_why = True
            rank_zero_warn(f"{type(self).__name__}: these masks need gradients of training steps, and there are none: no masks.")
        self._mask_unread()

    def _mask_unread(self) -> None:
        """With the last of the masks, mask what nothing reads any more, where it is to be removed."""
        masks = self.masks
        if masks is None or not self._masks_are_made():
            return
        if without := masks.unmasked():
            rank_zero_warn(
                f"{type(self).__name__}: {', '.join(without)} got no mask: scored by gradients, and frozen at every update. "
                "Let it train before the last one (`stop` of `pruning`), or take a metric of values, such as l1."
            )
        if masks.plan.options.shrink and self._example is not None:
            try:
                masks.also(unread_values(masks.model, masks.by_target(), self._example, entry=self._entry))
            except UncallableError:
                return  # nothing will be removed: said at the end of the fit, with what is shipped instead

    def whole_plan(self) -> Tables:
        """What will be quantized, masked and taught, as tables: `print` it, or let a notebook show it."""
        links = None if self._distiller is None else self._distiller.links
        plan = None if self.config_list is None else self.plan
        return Tables.of(*(one for one in (plan, self.pruning_plan, links) if one is not None))

    # -- state ------------------------------------------------------------------------------------------------------------

    def _compression_state(self) -> dict[str, Any]:
        return {
            "masks": None if self.masks is None else self.masks.state_dict(),
            "distillation": None if self._distiller is None else self._distiller.state_dict(),
        }

    def _load_compression(self, state: Mapping[str, Any]) -> None:
        """Take over masks, and what the teacher's part had learned; either may be new in this run."""
        if (saved := state.get("masks")) is not None:
            if self.masks is None:
                raise ConfigError(
                    "the checkpoint is of a run with `pruning`, and this callback has none, so that what is masked would grow "
                    "again. Use the `pruning` of that run, or load only its weights (load_from_checkpoint) and start a new fit."
                )
            self.masks.load_state_dict(saved)
        if self._distiller is not None and state.get("distillation") is not None:
            self._distiller.load_state_dict(state["distillation"])  # in an evaluation it is kept for the next fit

    def _masks_are_made(self) -> bool:
        """Whether no new masks are to come."""
        return self.masks is None or self.masks.done >= self.masks.plan.options.pace.steps

    # -- a training step ----------------------------------------------------------------------------------------------

    def distillation_loss(self) -> Tensor:
        """For manual optimization: what the teacher adds to the loss of the forwards since the last call, a scalar.

        With automatic optimization it joins the loss that `training_step` returns, and this is 0.
        """
        return torch.zeros(()) if self._distiller is None else self._distiller.loss()

    def _begin_compressed_batch(self, trainer: pl.Trainer, clock: Clock) -> None:
        masks = self.masks
        new = masks is not None and masks.plan.options.pace.done_at(clock) > masks.done and masks.step(clock)
        if masks is not None and masks.waits_long and not self._told_why:
            self._told_why = True
            rank_zero_warn(f"{type(self).__name__}: {_waiting(masks)}")
        if masks is not None and new:
            self._told_why = False
            self._mask_unread()
            for one in trainer.optimizers:
                if isinstance(one, LBFGS):
                    one.state.clear()  # its directions are of all values
        if masks is not None and new and self.verbose:
            whole = f"{masks.done} of {masks.plan.options.pace.steps}"
            rank_zero_info(
                f"step {trainer.global_step} (epoch {trainer.current_epoch}): masks {whole}, {self.sparsity():.1%} of the "
                "values of masked parameters are 0"
            )
        if self._distiller is not None:
            self._distiller.start()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Masks may need the gradients."""
        if self.masks is not None:
            self.masks.after_backward([one for group in optimizer.param_groups for one in group["params"]])
            if isinstance(optimizer, LBFGS):
                self.masks.mask_gradients()

    def _mask_after_steps(self, optimizers: Sequence[Optimizer]) -> None:
        """Have each step of these optimizers, of which a batch may have several, leave masked values 0."""
        self._end_masking()
        if (masks := self.masks) is not None:
            self._handles = [one.register_step_post_hook(lambda *_: masks.apply()) for one in optimizers]

    def _end_masking(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _end_compressed_batch(self) -> None:
        if self._distiller is not None:
            self._distiller.stop()

    def sparsity(self) -> float:
        """The share of the values of masked parameters that are 0 by their masks; 0 without masks."""
        if self.masks is None:
            return 0.0
        masks = self.masks.by_target().values()
        return sum(int((~mask).sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)

    def _compression_numbers(self) -> dict[str, float]:
        """For loggers: how much is masked, and what each link to the teacher added in the last step."""
        numbers: dict[str, float] = {} if self.masks is None else {"prune/sparsity": self.sparsity()}
        losses = {} if self._distiller is None else self._distiller.losses
        return numbers | {f"distill/{name}": float(value) for name, value in losses.items()}

    # -- evaluation: on weights that someone else put there, too ---------------------------------------------------------

    def _apply_masks(self, *places: int) -> None:
        if self.masks is not None and not any(places):
            self.masks.apply()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Averaged weights, say, are masked as those in training are."""
        self._apply_masks(batch_idx, dataloader_idx)
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self._apply_masks(batch_idx, dataloader_idx)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self._apply_masks(batch_idx, dataloader_idx)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def _smaller(self, twin: nn.Module) -> nn.Module:
        """`twin`, a copy of the trained model, masked, without the channels that are masked if they are to go."""
        if self.pruning is None:
            return twin
        if self.masks is None:
            raise ConfigError(
                "convert: there are no masks in this process, so nothing would be removed. Call fit before; of a fit in "
                "processes of its own (ddp_spawn, ddp_notebook) deployed_model is the result."
            )
        if not self._masks_are_made() and not self._told_why:
            done, of = self.masks.done, self.masks.plan.options.pace.steps
            how = _waiting(self.masks) if self.masks.waits_for else "train longer, or let `stop` of `pruning` come earlier."
            rank_zero_warn(f"{type(self).__name__}: the fit ended after {done} of {of} updates of its masks; {how}")
        found, parameters = self.masks.by_target(), dict(twin.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, mask in found.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)  # not mul_: NaN would stay
        drop_deployed_layers(twin)
        if not self.masks.plan.options.shrink:
            return twin
        if self._example is None:
            rank_zero_warn(f"{type(self).__name__}: nothing is removed without a recorded forward; give example_input.")
            return twin
        try:
            self.shrunk = shrunk = shrink_model(twin, found, self._example, entry=self._entry)
        except UncallableError as error:
            rank_zero_warn(
                f"{type(self).__name__}: {error}. What ships is the masked model, as large as before. Move what needs the "
                "Trainer (self.trainer, self.log) from forward into training_step, or set `shrink` of `pruning` to false."
            )
            return twin
        if prepared_groups(twin):
            wide, small = (model.get_submodule(self._entry) for model in (twin, shrunk.model))
            check_removal(
                wide, small, self._example, sorted({bias or weight for weight, (bias, _) in shrunk.cuts.biases.items()})
            )
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: masked channels removed\n{self.shrunk}")
        return shrunk.model

    def _converted(self, twin: nn.Module) -> nn.Module:
        """What ships of a copy of the trained model, which may be pruned or taught alone."""
        if self.config_list is not None:
            return converted(twin, self._entry, self._example)
        deployed = copy_of(twin).eval().requires_grad_(False)
        deployed.__dict__.pop(LEARNED, None)
        return deployed

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """No hook and no borrowed teacher stays."""
        super().on_exception(trainer, pl_module, exception)
        self._end_teaching()
        self._end_masking()

    def _end_teaching(self) -> None:
        if self._distiller is not None:
            self._distiller.end()

    def _asked(self) -> dict[str, Any]:
        """What was asked for, as plain data."""
        pruning = None if self.pruning is None else dict(vars(self.pruning))
        return {"pruning": pruning, "distillation": plain(self.distillation)}


def _waiting(masks: Masks) -> str:
    """What to do about masks that are due and have no scores."""
    names = masks.waits_for
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"masks are due, and wait for gradients of {some}, which never came. In manual optimization step with self.optimizers(), "
        "not with use_pl_optimizer=False; leave out layers that training does not use, or take a metric of values, such as l1."
    )


def checked_lists(config_list: Any, pruning: Any, distillation: Any, teacher: Any) -> None:
    """Raise a ConfigError if a callback is given nothing to do."""
    if config_list is None and pruning is None and distillation is None and teacher is None:
        raise ConfigError(
            "QuantFusionCallback: nothing to do; give config_list ('int8' is the shortest), pruning or distillation."
        )


__all__ = ["Compresses", "checked_lists"]
