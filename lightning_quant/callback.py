# SPDX-License-Identifier: Apache-2.0
"""Owns the hooks: Lightning's events become calls of plan, prepare, schedule, convert and export; no maths here."""

from __future__ import annotations

import copy
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.calibration import Calibration, calibrated, equalized, gathered, trains
from lightning_quant.capture import recorded, restore_place
from lightning_quant.checkpoints import (
    SavesWithWeights,
    best_checkpoint,
    check_decisions,
    put_learned_aside,
    put_learned_back,
    saves_alone,
)
from lightning_quant.company import ParameterGroups, check_precision, clock_of, stand_before_finetuning
from lightning_quant.compression import Compresses, checked_lists
from lightning_quant.config import PRESETS, ConfigError, parse_rules
from lightning_quant.convert import convert_model, copy_of, load_weights, made_permanent, strayed, uncompiled, unobserved
from lightning_quant.delivery import check_delivery, unfinished, write_files, writes
from lightning_quant.export import Exported, export_options
from lightning_quant.files import checked_folder
from lightning_quant.layers import Plan
from lightning_quant.logs import Logs
from lightning_quant.plan import parse_settings, plan_from_graph
from lightning_quant.prepare import (
    apply_phase,
    checked_memory,
    checked_switch,
    decisions,
    give_to_optimizers,
    load_quantizer_state,
    members_of,
    prepare_model,
    prepared_groups,
    quantizer_state,
    rounds_all,
    take_from_optimizers,
)
from lightning_quant.processes import give_statistics
from lightning_quant.ranks import from_first, together
from lightning_quant.schedule import Phase, Schedule
from lightning_quant.sources import ConfigFile, read_config
from lightning_quant.targets import uncompiled_name

_FLOAT = Phase(observe=False, quantize=False)


class QuantFusionCallback(Compresses):
    r"""Trains a quantized, fused model out of any LightningModule and converts it to int8 at the end of fit.

    In `on_fit_start` the callback records one forward, makes a plan (printed once) and attaches it: the selected modules and
    operators get quantizers, and layers are fused with the batch norms and activations that the forward shows. Modules,
    parameters, their names and order, hooks, optimizers and checkpoints stay the user's own. While training, the schedule moves
    and freezes ranges and batch norm. Validation runs the integer arithmetic that is deployed. In `on_fit_end` a copy is
    converted; `pl_module` stays trainable.

    Args:
        config_list: a list of dicts, each of which selects modules (`op_names`, `op_names_re`, `op_types`, `exclude_*`) and says
            how they are quantized (`target_names`, `quant_dtype`, `quant_scheme`, `granularity`, `apply_method`, `observer`,
            `target_settings`, `fuse_names`; see CONFIG.md); the shortest is `[{"op_types": ["Conv2d", "Linear"]}]`. Or one
            such dict, a preset's name ("int8", also as an entry of the list), or the path of a YAML or JSON file that holds
            any of these; under LightningCLI a path is relative to the YAML file that names it. None: nothing is quantized.
        pruning: entries that say what is masked, or a dict of `config_list` and the options of `Pruning` (schedule, start, stop,
            updates, shrink, ...), or a path; see CONFIG.md. Masked values are 0 in the parameters; masked channels are gone in
            `deployed_model`.
        distillation: entries that say what is compared with the teacher's, the name of a loss ("kl": of the outputs), or a path.
        teacher: a module, the path of a checkpoint, `{"class_path": ..., "ckpt_path": ...}`, or "self": the float model as it is
            when the first fit begins.
        settings: settings of module types (class name or dotted path -> target -> keys), for this callback only: a dict or a
            YAML or JSON path; see `QuantizationSetting`.
        schedule: a `Schedule`, a dict of its fields, or None for its defaults.
        calibration: what is done with training data before training: a number of batches that ranges are found with, or a dict of
            `batches`, `equalize`, `correct_biases`, `learn_rounding` (see `Calibration`). With `max_epochs=0` that is all, and
            the model is converted untrained; otherwise None leaves the ranges to training, but for those of method `ptq`.
        root: name of the submodule that the names in `config_list` are relative to; None for the LightningModule.
        example_input: what the root's forward is called with (a tensor, a tuple of positional arguments, a dict of keyword
            arguments or (tuple, dict)). None: `example_input_array`, else a batch of the training data as `training_step`
            hands it on: to the LightningModule's own forward, or else to the first module that it calls (the step is aborted
            there; no optimizer, random state or loader position moves).
        source: "best" converts the best checkpoint of the first monitored ModelCheckpoint among those saved while
            everything was quantized, "last" the weights at the end of fit. Without such a checkpoint "best" is "last".
        export: None, a suffix (".onnx", ".pt2", ".pt"), a list of suffixes or {suffix: options of `export_model`}: files
            `model<suffix>` written in `on_fit_end` by the first process, not in a `fast_dev_run`. They hold the module that was
            recorded: the LightningModule, or `root`, or the first module that `training_step` calls.
        dirpath: folder of those files; None for the trainer's log folder.
        memory: "exact", or "lean" for less memory and more time in training, the numbers being the same: what gradients need is
            kept as a byte a value (methods with learned scales keep four), and rounded weights are rounded again in backward.
        simulate_bias: round biases in training, too, to the int32 grid on which they are deployed; eval does so in any case.
        log_every_n_steps: every so many training steps (counted as Lightning does for its own loggers) these go to the Trainer's
            loggers and `callback_metrics`: `quant/phase` (0: nothing is rounded, 1: weights or some layers, 2: everything),
            `quant/observe` and `quant/freeze_batch_norm` (0 or 1), `quant/clipped_mean` and `quant/clipped_max` (share of an
            activation's values that its grid cut off in that step, mean and greatest over the activations that were rounded),
            `quant/range_drift` (change of the ranges since the last time, relative to their width). To the loggers alone, for
            each tensor that was rounded: `quant/signal_to_noise/conv1._output_` in dB, `quant/effective_bits/conv1.weight`
            (see monitor.py; neither where nothing was lost) and `quant/clipped/conv1._output_`. Phases are logged as they begin,
            too. Numbers are those of all processes. None or 0: nothing is measured. On an accelerator such a step waits for the
            device. `prune/sparsity` and `distill/<link>` (what each added to the loss) are logged then, too, or, left out, when
            the Trainer's own numbers are. What the callback was given goes to the loggers once, as hyperparameters
            `quant/config_list`, `quant/settings`, `quant/schedule`.
        verbose: 0 says nothing, 1 prints the plan, the phases as they begin and what was converted.

    Attributes:
        plan: the `Plan` of what is quantized, from `on_fit_start` on; `print(callback.whole_plan())` has masks and teacher, too.
        deployed_model: the converted model on the CPU, from `on_fit_end` on; None if something was not quantized by then. Where
            the fit runs in processes of its own (ddp_spawn, ddp_notebook), both are there when it has returned.
        exported: what was written in `on_fit_end` in this process, and how each file compares with the prepared model in eval and
            fake-quantized, on the last fit's first validation batch if there was one: `print(callback.exported[0].parity)`.
        masks: the `Masks` at work, None without `pruning`; `shrunk`: what became of masked channels, after fit.

    Raises:
        ConfigError: (a MisconfigurationException) in the constructor for what needs no model, in `setup` for a strategy that
            gives a process parts of weights, in `on_fit_start` for the rest, before the first batch; the model is then unchanged.

    Example::

        callback = QuantFusionCallback([{"op_types": ["Conv2d", "Linear"]}])
        trainer = Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(model, data)
        predictions = callback.deployed_model(images)
    """

    def __init__(
        self,
        config_list: Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | ConfigFile | os.PathLike[str] | str | None = None,
        *,
        pruning: Sequence[Mapping[str, Any]] | Mapping[str, Any] | os.PathLike[str] | str | None = None,
        distillation: Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | os.PathLike[str] | str | None = None,
        teacher: nn.Module | Mapping[str, Any] | os.PathLike[str] | str | None = None,
        settings: Mapping[str, Any] | ConfigFile | os.PathLike[str] | str | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        calibration: Calibration | Mapping[str, Any] | int | None = None,
        root: str | None = None,
        example_input: Any = None,
        source: Literal["best", "last"] = "best",
        export: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        memory: Literal["exact", "lean"] = "exact",
        simulate_bias: bool = False,
        log_every_n_steps: int | None = None,
        verbose: int = 1,
    ) -> None:
        checked_lists(config_list, pruning, distillation, teacher)
        super().__init__(pruning, distillation, teacher)
        self.config_list = None if config_list is None else read_config(config_list, presets=PRESETS)
        self.settings = None if settings is None else read_config(settings, presets=(), name="settings")
        if self.config_list is not None:
            parse_rules(self.config_list)
        parse_settings(self.settings)
        if source not in ("best", "last"):
            raise ConfigError(f"source: {source!r} is not one of best, last.")
        self.schedule, self.calibration = Schedule.make(schedule), Calibration.make(calibration)
        self.memory, self.simulate_bias = checked_memory(memory), checked_switch("simulate_bias", simulate_bias)
        self.root, self.example_input, self.source = root, example_input, source
        self.export, self.dirpath, self.verbose = export_options(export), checked_folder(dirpath), verbose
        self.exported: tuple[Exported, ...] = ()
        self.logs = Logs(log_every_n_steps)
        self.log_every_n_steps = self.logs.every
        self._phase, self._layers = _FLOAT, 0  # how many layers are in this phase, the first ones in the order of the data
        self._total_steps = math.inf
        self._run = ""  # the fit that a checkpoint belongs to: a ModelCheckpoint may still keep those of another
        self._late = False  # optimizers get what is learned only after their state is restored, which knows nothing of it
        self._loading: dict[str, Any] | None = None  # the checkpoint whose optimizer states the Trainer loads next
        self._groups = ParameterGroups()
        self._told = False

    # -- attach -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose checkpoint may be restored next; a module prepared in an earlier fit takes its state at once."""
        super().setup(trainer, pl_module, stage)
        if self.config_list is not None:
            check_precision(trainer)
        stand_before_finetuning(trainer, self)
        self._module = pl_module if self._module is pl_module and self._is_attached(pl_module) else None
        self._pending, self._late, self._loading = None, False, None
        self.load_state_dict(self._left_for(trainer, pl_module, stage))
        self._restored = False  # that was no checkpoint's

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan and attach. A module that is prepared already (a second fit) keeps its ranges, if its plan stays the same."""
        self.logs.stop()
        with uncompiled(pl_module):
            self._begin_fit(trainer, pl_module)
        SavesWithWeights(pl_module, self.state_key, self.state_dict)
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: the plan\n{self.whole_plan()}")

    def _is_attached(self, pl_module: nn.Module) -> bool:
        """Whether the model is as a fit of this callback left it."""
        return bool(prepared_groups(pl_module)) or (self.config_list is None and self._module is pl_module)

    def _begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._relink(pl_module)
        own = self._state(pl_module) if self._is_attached(pl_module) else None
        before, self._told = self.plan, False
        take_from_optimizers(pl_module, trainer.optimizers)  # of the fit before, if the user keeps one optimizer for both
        self._restore(pl_module)
        try:
            self._attach(trainer, pl_module, own)
        except BaseException:
            take_from_optimizers(pl_module, trainer.optimizers)
            self._restore(pl_module)
            if before is not None and own is not None:
                self.plan = before
                self._prepare(pl_module, before)
                self._load(pl_module, own)
            raise

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, own: dict[str, Any] | None) -> None:
        """Attach with the state of a checkpoint, else that of the fit before (`own`), else anew."""
        folder = self._folder(trainer) if self.export else Path()  # a collective: on all ranks
        self.plan = plan = together(lambda: self._checked_plan(trainer, pl_module, folder))
        self.deployed_model, self.exported, self.shrunk, self._told_why = None, (), None, False
        self._last.forget()
        entry = pl_module.get_submodule(self._entry)
        gather = partial(gathered, self.calibration, plan, trainer, pl_module, entry, self._example)
        state = self._pending or own
        anew = state is None or (state is own and self._module is not pl_module)  # another callback's: its ranges at most
        calls = gather() if anew and self.config_list is not None else []
        if anew:
            equalized(self.calibration, entry, self._example, verbose=self.verbose)
        self._attach_teacher(pl_module)
        self._prepare(pl_module, plan)
        if state is own is not None and own["decisions"] != decisions(pl_module):
            rank_zero_info(f"{type(self).__name__}: this config_list is not that of the fit before; ranges begin anew")
            state, calls, anew = None, calls if anew else gather(), True
        if anew:
            self._run, self.logs.ranges = from_first(uuid.uuid4().hex), {}
            self._set_phase(pl_module, _FLOAT)
            if state is not None:
                load_quantizer_state(pl_module, state["quantizers"])
            if not trains(trainer):
                self._mask_untrained()
            if calibrated(self.calibration, entry, calls, verbose=self.verbose) and not trains(trainer):
                self._set_phase(pl_module, Phase(observe=False))
        elif state is not None:
            self._load(pl_module, state)
        self._join_ranks(trainer, pl_module, parameters=bool(calls) or self.calibration.equalize, observe=self._phase.observe)
        if not self._late:
            loading, state_key = self._loading, self.state_key
            known = None if loading is None else put_learned_back(loading, loading["callbacks"][state_key], pl_module)
            self._groups.begin(trainer, pl_module, resumed=self._restored, names=known)
        self._module, self._pending, self._loading, self._members = pl_module, None, None, members_of(pl_module)
        if not trains(trainer):  # else when training starts, after the Trainer has logged the module's own
            self._log_settings(trainer, pl_module)

    def _log_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        given = {"config_list": self.config_list, "settings": self.settings, "schedule": dict(vars(self.schedule))}
        self.logs.settings(trainer, pl_module, given | self._asked())

    def _prepare(self, pl_module: pl.LightningModule, plan: Plan) -> None:
        self._attach_masks(pl_module)
        prepare_model(pl_module, plan, memory=self.memory, simulate_bias=self.simulate_bias)

    def _make_plan(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str = "fit", before: str | None = None
    ) -> Plan:
        seen = recorded(trainer, pl_module, self.root, self.example_input, stage, before)
        self._entry, self._example, why = seen.entry, seen.example, seen.why or "no example input was found"
        options: dict[str, Any] = {"settings": self.settings, "root": self.root, "no_graph_because": why}
        plan = (
            Plan(layers=()) if self.config_list is None else plan_from_graph(pl_module, self.config_list, seen.graph, **options)
        )
        self._plan_masks(pl_module, seen.graph, plan)
        if self._example is not None and self._entry != (self.root or ""):
            note = f"recorded from {self._entry!r}, the first module that training_step calls; else give example_input"
            if plan.notes:
                rank_zero_warn(f"{type(self).__name__}: {'; '.join(plan.notes)}; {note}")
            plan = replace(plan, notes=(*plan.notes, note))
        return plan

    def _checked_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> Plan:
        plan = self._make_plan(trainer, pl_module)
        check_delivery(plan, self.export, self._example, folder if writes(trainer) else None)
        return plan

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    # -- time ---------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn how long the run is, for moments that are shares of it; tell the loggers what was asked for."""
        restore_place(trainer)
        give_to_optimizers(pl_module, trainer.optimizers)
        self._mask_after_steps(trainer.optimizers)
        self._log_settings(trainer, pl_module)
        if self.schedule.needs_total_steps or (self.pruning is not None and self.pruning.pace.needs_total_steps):
            steps = trainer.estimated_stepping_batches
            self._total_steps = math.inf if steps in (-1, math.inf) else float(steps)
            if math.isinf(self._total_steps):
                rank_zero_warn(
                    f"{type(self).__name__}: the length of this run is unknown, so moments of the schedule that are shares of "
                    "it never come; give max_steps, or moments as steps or epochs."
                )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finetuning callbacks, whose turn it is next, look at the parameter groups."""
        self._groups.set_aside(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The phase is a function of the clock alone, so a resumed run is where it was."""
        self._groups.put_back(trainer, pl_module)
        clock = clock_of(trainer, pl_module, self._total_steps)
        assert self.plan is not None
        phase, layers = self.schedule.phase_at(clock), self.schedule.layers_at(clock, len(self.plan.layers))
        before, now = (self._phase, self._layers), (phase, layers)
        if now != before:
            self.logs.change(trainer, before, now, len(self.plan.layers), verbose=self.verbose)
            self._set_phase(pl_module, phase, layers)
        self._begin_compressed_batch(trainer, clock)
        self.logs.begin_step(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge ranges over processes; log what was measured in this step, once its last batch is through."""
        if self._ranks is not None and self._phase.observe:
            self._ranks.end_batch()
        self._end_compressed_batch()
        self.logs.end_step(trainer, pl_module, self._phase, self._layers, self._compression_numbers)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say early which layers have no range or are fused wrongly, not only when there is nothing to convert."""
        if not self._told and (problem := strayed(pl_module)):
            self._told = True
            rank_zero_warn(f"{type(self).__name__}: {problem} Left so, the model cannot be converted.")
        blind = unobserved(pl_module) if self._phase.observe and not self._told else []
        if blind:
            self._told = True
            rank_zero_warn(
                f"{type(self).__name__}: a whole epoch gave {', '.join(blind)} no range: in eval mode while training, not called "
                "or only in a branch or a checkpoint that the recorded forward did not take. Left so, nothing will be converted; "
                "put these layers in train mode or leave them out of config_list."
            )

    def _set_phase(self, pl_module: pl.LightningModule, phase: Phase, layers: int | None = None) -> None:
        self._phase, self._layers = phase, len(prepared_groups(pl_module)) if layers is None else layers
        apply_phase(pl_module, phase, layers)
        self._watch(phase.observe)

    # -- the end ------------------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert a copy of the best checkpoint (or of the last weights) and export it."""
        saves_alone(pl_module)
        self._end_teaching()
        self._end_masking()
        self._leave_ranks()  # of a fit that trained nothing
        folder = self._folder(trainer)  # a collective: on all ranks
        self._relink(pl_module)
        if (why := self._unfinished(pl_module)) is not None:
            rank_zero_warn(f"{type(self).__name__}: {why}, so nothing was converted; `deployed_model` is None.")
        else:
            best = self.source == "best" and trains(trainer)
            choose = partial(best_checkpoint, trainer, self.state_key, self._run) if best else lambda: None
            self._deliver_together(trainer, pl_module, choose, partial(self._deliver, trainer, pl_module, folder))
        self._hand_over(trainer, self._entry, folder, self._example)
        self._last.forget()

    def _deliver(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        folder: Path,
        origin: tuple[str, dict[str, Any]] | None,
        statistics: dict[str, Tensor],
    ) -> None:
        """What each process does: `origin` or the last weights become `deployed_model`; the first one writes files."""
        twin = made_permanent(copy_of(pl_module))
        give_statistics(twin, statistics)
        if origin is not None:
            twin.on_load_checkpoint(origin[1])  # what the module's own hooks do to checkpoints
            load_weights(twin, origin[1]["state_dict"], strict=pl_module.strict_loading)
            load_quantizer_state(twin, origin[1]["callbacks"][self.state_key]["quantizers"])
        small = self._smaller(twin)
        self.deployed_model = deployed = self._converted(small)
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: converted {'the last weights' if origin is None else origin[0]}")
        if writes(trainer):
            written = deployed.get_submodule(uncompiled_name(self._entry))
            prepared = small.get_submodule(self._entry) if prepared_groups(small) else None
            example = self._last.like(self._example)
            self.exported = write_files(
                written, folder, self.export, example, prepared=prepared, config_list=self.config_list, verbose=self.verbose
            )

    def _unfinished(self, pl_module: nn.Module) -> str | None:
        """Why the model as it is now is not to be converted."""
        return None if self.config_list is None else unfinished(pl_module, self._phase, self._layers, self.schedule)

    def convert(self, pl_module: nn.Module) -> nn.Module:
        """Convert a copy of `pl_module` as it is now, keep it as `deployed_model` and return it.

        Raises:
            ConfigError: if it is not prepared, a range was never observed, or masks are another process's.
        """
        self._relink(pl_module)
        twin = self._smaller(copy_of(pl_module)) if self.pruning is not None else pl_module
        self.deployed_model = deployed = self._converted(twin) if self.config_list is None else convert_model(twin)
        return deployed

    # -- state: plain numbers, tensors and strings, so that checkpoints load with weights_only=True -----------------------

    @property
    @override
    def state_key(self) -> str:
        """The same for subclasses, so that a checkpoint outlives a renamed class."""
        return QuantFusionCallback.__name__

    @override
    def state_dict(self) -> dict[str, Any]:
        """Ranges by target name, the phase, the config_list and settings as they were read."""
        return dict(self._pending or self._elsewhere()) if self._module is None else self._state(self._module)

    def _state(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {
            "version": 1,
            "run": self._run,
            "config_list": copy.deepcopy(self.config_list),
            "settings": copy.deepcopy(self.settings),
            "decisions": decisions(pl_module),
            "entry": self._entry,
            "phase": dict(vars(self._phase)),
            "layers": self._layers,
            "rounds_all": rounds_all(pl_module) and self._masks_are_made(),
            "logged": dict(self.logs.ranges),
            "quantizers": quantizer_state(pl_module),
            **self._compression_state(),
            "places": copy.deepcopy(self._groups.places),
        }

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what is learned beside the model's parameters out of the optimizers' states; it is added to our own."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and "optimizer_states" in checkpoint:
            put_learned_aside(checkpoint, state, trainer.optimizers, pl_module)

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """It is put back in `on_fit_start`; a checkpoint without a state of ours has optimizer states without it."""
        self._late = self.state_key not in checkpoint["callbacks"]
        if not self._late and trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
            self._loading = checkpoint

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module its own hook: checkpoints of weights alone that are saved from here on have no ranges."""
        super().on_exception(trainer, pl_module, exception)
        saves_alone(pl_module)
        self._groups.put_back(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over at once where the model is prepared, else in `on_fit_start`."""
        if not state_dict:
            return
        self._restored, self._pending = True, None if self._module is not None else state_dict
        if self._module is not None:
            self._load(self._module, state_dict)

    def _load(self, pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
        if state.get("version") != 1:
            raise ConfigError(f"the checkpoint's state is of version {state.get('version')!r}; this release reads version 1.")
        check_decisions(state, decisions(pl_module), {"config_list": self.config_list, "settings": self.settings})
        load_quantizer_state(pl_module, state["quantizers"])
        self._load_compression(state)
        self._run, self.logs.ranges = state["run"], dict(state.get("logged", {}))
        self._groups.places = copy.deepcopy(state.get("places", {}))
        self._set_phase(pl_module, Phase(**state["phase"]), state.get("layers"))  # states of old lack both
