# SPDX-License-Identifier: Apache-2.0
"""Owns the hooks: Lightning's events become calls of plan, prepare, schedule, convert and export; no maths here."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_quant.config import ConfigError, parse_rules
from lightning_quant.convert import convert_model, unobserved
from lightning_quant.export import FORMATS, export_model
from lightning_quant.graph import Graph, moved
from lightning_quant.plan import Plan, plan_from_graph, record_forward, scope_of
from lightning_quant.prepare import (
    apply_phase,
    drop_deployed_layers,
    fused_groups,
    load_quantizer_state,
    prepare_model,
    quantizer_state,
    restore_model,
)
from lightning_quant.schedule import Clock, Phase, Schedule

_FLOAT = Phase(observe=False, quantize=False)


class QuantFusionCallback(Callback):
    r"""Trains a quantized, fused model out of any LightningModule and converts it to int8 at the end of fit.

    In `on_fit_start` the callback records one forward, makes a plan (printed once) and attaches it: convolutions and linear
    layers are fused with their batch norms and ReLUs and get quantizers. Modules, parameters, their names and order, hooks,
    optimizers and checkpoints stay the user's own. While training, the schedule moves and freezes ranges and batch norm.
    Validation runs the integer arithmetic that is deployed. In `on_fit_end` a copy is converted; `pl_module` stays trainable.

    Args:
        config_list: a list of dicts, see `parse_rules`; the shortest is `[{"op_types": ["Conv2d", "Linear"]}]`.
        schedule: a `Schedule`, a dict of its fields, or None for its defaults.
        root: name of the submodule that the names in `config_list` are relative to; None for the LightningModule.
        example_input: what the root's forward is called with (a tensor, a tuple of positional arguments, a dict of keyword
            arguments or (tuple, dict)). None: `example_input_array`, else a batch of the training data as `training_step`
            hands it on (the step is aborted there; no optimizer, random state or loader position moves).
        source: "best" converts the best checkpoint of the first monitored ModelCheckpoint among those saved while
            quantization was active, "last" the weights at the end of fit. Without such a checkpoint "best" is "last".
        export: None, a suffix (".onnx", ".pt2"), a list of suffixes or {suffix: options of `export_model`}: files
            `model<suffix>` written in `on_fit_end` by the first process.
        dirpath: folder of those files; None for the trainer's log folder.
        verbose: 0 says nothing, 1 prints the plan and what was converted.

    Attributes:
        plan: the `Plan`, from `on_fit_start` on.
        deployed_model: the converted model on the CPU, from `on_fit_end` on; None if nothing was calibrated.

    Raises:
        ConfigError: (a MisconfigurationException) in the constructor for what needs no model, in `on_fit_start` for the
            rest, before the first batch; the model is then unchanged.

    Example::

        callback = QuantFusionCallback([{"op_types": ["Conv2d", "Linear"]}])
        trainer = Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(model, data)
        predictions = callback.deployed_model(images)
    """

    def __init__(
        self,
        config_list: Sequence[Mapping[str, Any]],
        *,
        schedule: Schedule | Mapping[str, Any] | None = None,
        root: str | None = None,
        example_input: Any = None,
        source: Literal["best", "last"] = "best",
        export: str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__()
        parse_rules(config_list)
        if source not in ("best", "last"):
            raise ConfigError(f"source: {source!r} is not one of best, last.")
        self.config_list = _plain(config_list)
        self.schedule = Schedule.make(schedule)
        self.root, self.example_input, self.source = root, example_input, source
        self.export, self.dirpath, self.verbose = _export_options(export), dirpath, verbose
        self.plan: Plan | None = None
        self.deployed_model: nn.Module | None = None
        self._module: pl.LightningModule | None = None
        self._phase = _FLOAT
        self._total_steps = math.inf
        self._pending: dict[str, Any] | None = None
        self._example: Any = None
        self._entry = ""

    # -- attach -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose checkpoint may be restored next; a module prepared in an earlier fit takes its state at once."""
        if stage == "fit" and trainer.world_size > 1:
            raise ConfigError(
                f"{type(self).__name__}: {trainer.world_size} processes would each have ranges of their own; merging them is not "
                "built yet. Use Trainer(devices=1, num_nodes=1)."
            )
        self._module, self._pending = (pl_module if fused_groups(pl_module) else None), None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan and attach. A module that is prepared already (a second fit) keeps its ranges."""
        state = self._pending
        if state is None and fused_groups(pl_module):
            state = {"quantizers": quantizer_state(pl_module), "phase": vars(self._phase)}
        restore_model(pl_module)
        self.plan, self.deployed_model = self._make_plan(trainer, pl_module), None
        prepare_model(pl_module, self.plan)
        self._module, self._pending = pl_module, None
        if state is None:
            self._set_phase(pl_module, _FLOAT)
        else:
            self._load(pl_module, state)
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: the plan\n{self.plan}")

    def _make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        scope, why = scope_of(pl_module, self.root), "no example input was found"
        graph: Graph | None = None
        found = self._find_example(trainer, pl_module, scope)
        if isinstance(found, str):
            why = found
        else:
            entry, self._example = found[0], moved(found[1], "cpu")
            self._entry = next(name for name, module in pl_module.named_modules() if module is entry)
            with trainer.precision_plugin.forward_context():
                graph = record_forward(scope, self._example, entry)
        plan = plan_from_graph(pl_module, self.config_list, graph, root=self.root, no_graph_because=why)
        if graph is not None and self._entry != (self.root or ""):
            note = (
                f"recorded from {self._entry!r}, the first module that training_step calls; give example_input to record another"
            )
            plan = Plan(layers=plan.layers, notes=(*plan.notes, note))
        return plan

    def _find_example(self, trainer: pl.Trainer, pl_module: pl.LightningModule, scope: nn.Module) -> tuple[nn.Module, Any] | str:
        """(module, what it is called with) for the recorded forward, or why there is none."""
        if self.example_input is not None:
            return scope, self.example_input
        array = pl_module.example_input_array
        if array is not None:
            if scope is pl_module:
                return scope, array
            args, kwargs = ((), array) if isinstance(array, dict) else (array if isinstance(array, tuple) else (array,), {})
            return _captured([scope], lambda: pl_module(*args, **kwargs))
        trainer.fit_loop.setup_data()
        with isolate_rng(), torch.no_grad():
            try:
                batch = _first_batch(trainer, pl_module)
                modules = [scope] if self.root else list(pl_module.modules())
                return _captured(modules, lambda: _training_step(pl_module, batch))
            except _NoBatchError as reason:
                return str(reason)

    # -- time ---------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn how long the run is, for moments that are shares of it."""
        if self.schedule.needs_total_steps:
            steps = trainer.estimated_stepping_batches
            self._total_steps = math.inf if steps in (-1, math.inf) else float(steps)
            if math.isinf(self._total_steps):
                rank_zero_warn(
                    f"{type(self).__name__}: the length of this run is unknown, so moments of the schedule that are shares of "
                    "it never come; give max_steps, or moments as steps or epochs."
                )

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The phase is a function of the clock alone, so a resumed run is where it was."""
        clock = Clock(step=trainer.global_step, epoch=trainer.current_epoch, total_steps=self._total_steps)
        phase = self.schedule.phase_at(clock)
        if phase != self._phase:
            self._set_phase(pl_module, phase)

    def _set_phase(self, pl_module: pl.LightningModule, phase: Phase) -> None:
        self._phase = phase
        apply_phase(pl_module, phase)

    # Whatever moved the weights since the model was last in eval mode (an averaging callback, a loaded checkpoint), an
    # evaluation begins with fresh integers; they are folded at its first forward, after every callback's start hook.
    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._tell_if_float(pl_module, "validate")
        drop_deployed_layers(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._tell_if_float(pl_module, "test")
        drop_deployed_layers(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fold anew for this loop."""
        self._tell_if_float(pl_module, "predict")
        drop_deployed_layers(pl_module)

    def _tell_if_float(self, pl_module: pl.LightningModule, stage: str) -> None:
        if self._pending is not None and not fused_groups(pl_module):
            rank_zero_warn(
                f"{type(self).__name__}: this model was never fitted here, so {stage} shows the float model; the checkpoint's "
                "ranges are applied when fit starts."
            )

    # -- the end ------------------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert a copy of the best checkpoint (or of the last weights) and export it."""
        blind = unobserved(pl_module)
        if not self._phase.quantize or blind:
            why = f"no range was observed for {', '.join(blind)} (in eval mode while training, or never called)"
            why = why if self._phase.quantize else "no quantized training step was run"
            rank_zero_warn(f"{type(self).__name__}: {why}, so nothing was converted; `deployed_model` is None.")
            return
        origin = self._best_checkpoint(trainer) if self.source == "best" else None
        if origin is None:
            self.convert(pl_module)
        else:
            checkpoint = origin[1]
            twin = copy.deepcopy(pl_module)
            twin.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
            load_quantizer_state(twin, checkpoint["callbacks"][self.state_key]["quantizers"])
            self.deployed_model = convert_model(twin)
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: converted {'the last weights' if origin is None else origin[0]}")
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective: on all ranks
        if trainer.is_global_zero:
            self._export(folder)

    def convert(self, pl_module: nn.Module) -> nn.Module:
        """Convert a copy of `pl_module` as it is now, keep it as `deployed_model` and return it.

        Raises:
            ConfigError: if it is not prepared or a range was never observed.
        """
        self.deployed_model = convert_model(pl_module)
        return self.deployed_model

    def _best_checkpoint(self, trainer: pl.Trainer) -> tuple[str, dict[str, Any]] | None:
        """The best checkpoint of the first monitored ModelCheckpoint that was saved with quantization active."""
        monitored = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
        if not monitored:
            return None
        keeper = monitored[0]
        ranked = sorted(keeper.best_k_models.items(), key=lambda item: float(item[1]), reverse=keeper.mode == "max")
        paths = [path for path, _ in ranked] or [keeper.best_model_path]
        for path in filter(os.path.isfile, paths):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)  # this run wrote it
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state and state["phase"]["quantize"]:
                return path, checkpoint
        rank_zero_warn(
            f"{type(self).__name__}: no checkpoint of {type(keeper).__name__}(monitor={keeper.monitor!r}) was saved with "
            "quantization active, so the last weights are converted. Let quantization start earlier, keep more checkpoints "
            "(save_top_k), or save whole ones (save_weights_only=False)."
        )
        return None

    def _export(self, folder: Path) -> None:
        assert self.deployed_model is not None
        if self.export and self._example is None:
            raise ConfigError("export: needs example_input, because the forward could not be recorded from the training data.")
        for suffix, options in self.export.items():
            model = self.deployed_model.get_submodule(self._entry)
            path = export_model(model, folder / f"model{suffix}", **{"example_input": self._example, **options})
            if self.verbose:
                rank_zero_info(f"{type(self).__name__}: wrote {path}")

    # -- state: plain numbers, tensors and strings, so that checkpoints load with weights_only=True -----------------------

    @property
    @override
    def state_key(self) -> str:
        """The same for subclasses, so that a checkpoint outlives a renamed class."""
        return "QuantFusionCallback"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Ranges by target name, the phase and the config_list."""
        if self._module is None:
            return dict(self._pending or {})
        return {
            "version": 1,
            "config_list": copy.deepcopy(self.config_list),
            "phase": dict(vars(self._phase)),
            "quantizers": quantizer_state(self._module),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over at once where the model is prepared, else in `on_fit_start`."""
        if not state_dict:
            return
        if self._module is not None:
            self._load(self._module, state_dict)
        else:
            self._pending = state_dict

    def _load(self, pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
        load_quantizer_state(pl_module, state["quantizers"])
        self._set_phase(pl_module, Phase(**state["phase"]))


# -- the constructor's arguments ----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists: what a checkpoint and YAML hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _export_options(export: Any) -> dict[str, dict[str, Any]]:
    if export is None:
        return {}
    if isinstance(export, str):
        export = [export]
    options = dict(export) if isinstance(export, Mapping) else {suffix: {} for suffix in export}
    for suffix in options:
        if suffix not in FORMATS:
            raise ConfigError(f"export: unknown suffix {suffix!r}; known: {', '.join(FORMATS)}.")
    return {suffix: dict(given or {}) for suffix, given in options.items()}


# -- what the training data calls the model with ------------------------------------------------------------------------


class _NoBatchError(Exception):
    """Why no batch of the training data can be had."""


class _Reached(BaseException):
    """Carries the arguments out of an aborted training step; no `except Exception` of the user's may stop it."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = (module, args, kwargs)


def _captured(modules: Iterable[nn.Module], run: Any) -> tuple[nn.Module, Any] | str:
    """The first of `modules` that `run` calls, and what with; the call is aborted. Or why there was none."""

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(module, args, kwargs)

    handles = [module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for module in modules]
    try:
        run()
    except _Reached as reached:
        module, args, kwargs = reached.call
        return module, (tuple(args), dict(kwargs))
    except Exception as error:  # noqa: BLE001  (a user's step may raise anything; the plan says what)
        return f"a trial training step failed: {error}"
    finally:
        for handle in handles:
            handle.remove()
    return "a trial training step called no module"


def _training_step(pl_module: pl.LightningModule, batch: Any) -> None:
    names = list(inspect.signature(pl_module.training_step).parameters)
    if "dataloader_iter" in names:
        raise _NoBatchError("training_step takes a dataloader_iter")
    pl_module.training_step(*((batch, 0) if len(names) > 1 else (batch,)))


def _first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """A first batch of the training data, on the device, with the loaders' own iterators left untouched."""
    loaders = trainer.train_dataloader
    if loaders is None:
        raise _NoBatchError("there is no training data")
    batch = trainer.precision_plugin.convert_input(_sample(loaders))
    batch = pl_module.on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _sample(loaders: Any) -> Any:
    """One batch with the structure of the loaders."""
    if isinstance(loaders, Mapping):
        return {key: _sample(loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(_sample(loader) for loader in loaders)
    if not isinstance(loaders, DataLoader):
        return next(iter(loaders))
    generators = [g for g in (loaders.generator, getattr(loaders.sampler, "generator", None)) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        if isinstance(loaders.dataset, IterableDataset) or loaders.batch_sampler is None:
            if loaders.persistent_workers:
                raise _NoBatchError("an iterable dataset with persistent workers has one iterator only")
            return next(iter(loaders))
        # Not through the loader: that would start workers, or move a persistent iterator that training is to read.
        indices = next(iter(loaders.batch_sampler))
        return loaders.collate_fn([loaders.dataset[index] for index in indices])
    except StopIteration:
        raise _NoBatchError("the training data is empty") from None
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
