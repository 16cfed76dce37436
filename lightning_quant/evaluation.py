# SPDX-License-Identifier: Apache-2.0
"""Owns the callback's part in evaluation: each loop shows what is shipped; a batch is kept for the checks of files."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_quant.config import ConfigError
from lightning_quant.convert import uncompiled
from lightning_quant.layers import Plan
from lightning_quant.prepare import drop_deployed_layers, members_of, prepared_groups, relink, restore_model, rounds_all
from lightning_quant.processes import ManyProcesses
from lightning_quant.ranks import together
from lightning_quant.record import copied, moved, split_example


class LastBatch:
    """What a module was called with in the first batch of the last validation, on the CPU."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None, "_handle": None}

    def watch(self, module: nn.Module) -> None:
        """Keep what the next call of `module` is given, instead of what was kept. Compiled modules are left alone."""
        self.leave()
        if not any(isinstance(one, OptimizedModule) for one in module.modules()):
            self._seen = None
            self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen is None:
            with torch.inference_mode(False):
                self._seen = copied(moved((args, kwargs), "cpu"))

    def leave(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def forget(self) -> None:
        """Watch no longer, and keep nothing."""
        self.leave()
        self._seen = None

    def like(self, example: Any) -> Any:
        """What was kept, if a call with it is one like that of `example` but for the number of samples; else `example`."""
        if self._seen is None or example is None:
            return example
        (ours, here), (theirs, there) = (pytree.tree_flatten(one) for one in (self._seen, split_example(example)))
        return self._seen if here == there and all(map(_alike, ours, theirs)) else example


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.dim() == other.dim() and one.shape[1:] == other.shape[1:] and one.numel() > 0
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # noqa: BLE001  (arrays have no single answer; what else a user's class does is not known)
        return False


class EvaluatesAsShipped(ManyProcesses):
    """What a callback needs so that validate, test and predict show the deployed arithmetic, in a fresh process, too."""

    export: dict[str, dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self._module: pl.LightningModule | None = None
        self._members: dict[str, nn.Module] = {}
        self._pending: dict[str, Any] | None = None
        self._restored = False  # whether a checkpoint of this run brought a state of ours
        self._entry = ""
        self._example: Any = None
        self._last = LastBatch()

    def _make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, before: str | None) -> Plan:
        raise NotImplementedError

    def _prepare(self, pl_module: pl.LightningModule, plan: Plan) -> None:
        raise NotImplementedError

    def _load(self, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _restore(self, pl_module: nn.Module) -> None:
        """The float model as it is now."""
        restore_model(pl_module)

    def _relink(self, pl_module: nn.Module) -> None:
        self._members = relink(pl_module, self._members) if self._module is pl_module else {}

    # Whatever moved the weights since the last eval mode (an averaging callback, a loaded checkpoint), an evaluation begins with
    # fresh integers, folded at its first forward, after every callback's start hook.
    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._begin_evaluation(trainer, pl_module, "validate")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._begin_evaluation(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._begin_evaluation(trainer, pl_module, "predict")

    def _begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._relink(pl_module)
        drop_deployed_layers(pl_module)
        if self._pending is not None:
            with torch.inference_mode(False), uncompiled(pl_module):  # what is made in it could not be trained later
                self._attach_restored(trainer, pl_module, self._pending, stage)
        if trainer.state.fn == "fit" or trainer.ckpt_path is None:
            return
        if not self._restored:
            shown = "its weights with the ranges of the last fit" if prepared_groups(pl_module) else "the float model"
            rank_zero_warn(
                f"{type(self).__name__}: there is nothing of this callback in {trainer.ckpt_path}: {stage} shows {shown}."
            )
        elif not rounds_all(pl_module):
            rank_zero_warn(f"{type(self).__name__}: the checkpoint is from before everything was quantized; {stage} shows it so.")

    def _attach_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any], stage: str) -> None:
        """Attach to a model that was not fitted here, as it was when its checkpoint was saved."""
        self._restore(pl_module)
        try:
            self.plan = together(lambda: self._make_plan(trainer, pl_module, stage, state["entry"]))
            self._prepare(pl_module, self.plan)
            self._load(pl_module, state)
        except ConfigError as error:
            self._restore(pl_module)
            raise ConfigError(
                f"the checkpoint's state cannot be attached for {stage}: {error} If the callback has the arguments of that run, "
                f"{stage} calls the model in another way than training did: give example_input, or leave it out for float."
            ) from error
        self._module, self._pending, self._members = pl_module, None, members_of(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Where files are to be written, have them compared on data of the validation."""
        if self.export and batch_idx == dataloader_idx == 0 and trainer.state.fn == "fit" and prepared_groups(pl_module):
            self._last.watch(pl_module.get_submodule(self._entry))

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch is enough."""
        self._last.leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        super().on_exception(trainer, pl_module, exception)
        self._last.leave()
