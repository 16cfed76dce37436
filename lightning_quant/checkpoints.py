# SPDX-License-Identifier: Apache-2.0
"""Owns what of ours stands in a checkpoint: decisions to compare, learned numbers beside the optimizers', the best one of a run.

All of it is plain data (numbers, strings, tensors, lists, dicts), so that checkpoints load with `weights_only=True`.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_quant.config import ConfigError
from lightning_quant.prepare import is_complete, learned_parameters

# -- another config_list -------------------------------------------------------------------------------------------------


def check_decisions(saved: Mapping[str, Any], now: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Refuse a state that was saved under other decisions, with what differs.

    Args:
        saved: the callback's state.
        now: what is decided now, as `prepare.decisions` gives it.
        config: what that was decided by: 'config_list' and 'settings'.

    Raises:
        ConfigError: naming the first differences, of the config if it differs, else of the decisions.
    """
    before = saved["decisions"]
    if before == now:
        return
    found = [line for key, value in config.items() for line in differences(saved.get(key), value, key)]
    lines = found or list(differences(before, now, "plan"))
    rest = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
    raise ConfigError(
        f"the checkpoint was saved under another {'config_list' if found else 'plan'}: {'; '.join(lines[:4])}{rest}. Use the "
        "config_list of that run, or load only its weights (load_from_checkpoint) and start a new fit."
    )


def differences(before: Any, now: Any, place: str) -> Iterator[str]:
    """Where two pieces of plain data differ: "config_list[0]['quant_dtype']: 'int8' in the checkpoint, 'int4' here"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{place}[{key!r}]")
    elif _is_list(before) and _is_list(now):
        for index in range(max(len(before), len(now))):
            pair = [one[index] if index < len(one) else None for one in (before, now)]
            yield from differences(pair[0], pair[1], f"{place}[{index}]")
    elif before != now:
        yield f"{place}: {_said(before)} in the checkpoint, {_said(now)} here"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


# -- what is learned, in the optimizers' states --------------------------------------------------------------------------

# A learned number's name, where it stood in an optimizer's saved state, and what the optimizer kept for it.
Removed = list[dict[str, Any]]


def without_learned(saved: dict[str, Any], optimizer: Optimizer, model: torch.nn.Module) -> tuple[dict[str, Any], Removed]:
    """An optimizer's saved state as it would be without what the model's methods learn, and what was taken out.

    So the checkpoint resumes where this package is not installed, with the optimizer's own parameters. A state that is not of
    the form of `torch.optim.Optimizer.state_dict` is left as it is.
    """
    ours = {id(parameter): name for name, parameter in learned_parameters(model).items()}
    groups = saved.get("param_groups")
    live = [group["params"] for group in optimizer.param_groups]
    if not ours or not isinstance(groups, list) or [len(g.get("params", ())) for g in groups] != [len(g) for g in live]:
        return saved, []
    removed: Removed = []
    kept, states = [], dict(saved.get("state", {}))
    for index, (group, parameters) in enumerate(zip(groups, live, strict=True)):
        ids = list(group["params"])
        for place, (key, parameter) in enumerate(zip(list(ids), parameters, strict=True)):
            if id(parameter) in ours:
                ids.remove(key)
                where = {"name": ours[id(parameter)], "group": index, "place": place}
                removed.append({**where, "key": key, "state": states.pop(key, None)})
        kept.append({**group, "params": ids})
    return {**saved, "state": states, "param_groups": kept}, removed


def with_learned(saved: dict[str, Any], removed: Removed, names: Container[str] | None = None) -> dict[str, Any]:
    """Undo `without_learned`, for what has one of `names` if they are given; an earlier release gave no names."""
    groups = [{**group, "params": list(group["params"])} for group in saved["param_groups"]] if removed else []
    states = dict(saved["state"]) if removed else {}
    left_out: Counter[int] = Counter()
    for one in removed:  # in the order of their places, so that each is inserted where it stood
        if names is not None and "name" in one and one["name"] not in names:
            left_out[one["group"]] += 1
            continue
        groups[one["group"]]["params"].insert(one["place"] - left_out[one["group"]], one["key"])
        if one["state"] is not None:
            states[one["key"]] = one["state"]
    return {**saved, "state": states, "param_groups": groups} if removed else saved


def put_learned_aside(
    checkpoint: dict[str, Any], state: dict[str, Any], optimizers: Sequence[Optimizer], model: torch.nn.Module
) -> None:
    """Move what is learned from the optimizers' states in a checkpoint to `state`, the callback's in it."""
    parted = [without_learned(*pair, model) for pair in zip(checkpoint["optimizer_states"], optimizers, strict=True)]
    checkpoint["optimizer_states"] = [saved for saved, _ in parted]
    state["optimizers"], state["learned"] = [removed for _, removed in parted], list(learned_parameters(model))


def put_learned_back(checkpoint: dict[str, Any], state: Mapping[str, Any], model: torch.nn.Module) -> set[str]:
    """Undo `put_learned_aside` for what is still learned, before the optimizers load their states. The names of that.

    What is new in this run the saved states do not know; what was given up they would not fit with.
    """
    now = set(learned_parameters(model))
    before: list[str] | None = state.get("learned")  # None: of an earlier release, whose plan tells all that is learned
    known = now if before is None else now.intersection(before)
    parts = state.get("optimizers") or [[] for _ in checkpoint["optimizer_states"]]
    pairs = zip(checkpoint["optimizer_states"], parts, strict=True)
    checkpoint["optimizer_states"] = [with_learned(saved, removed, known) for saved, removed in pairs]
    return known


# -- checkpoints of weights alone ----------------------------------------------------------------------------------------


class SavesWithWeights:
    """Stands for a module's `on_save_checkpoint` during fit: checkpoints of weights alone have no other hook.

    Without it the best weights would meet the last ranges. `state` gives the callback's state, which is added where a
    checkpoint has none of any callback; the module's own hook is called as before.
    """

    def __init__(self, module: LightningModule, key: str, state: Callable[[], dict[str, Any]]) -> None:
        self.key, self.state = key, state
        self.before = module.__dict__.get("on_save_checkpoint")
        self.own = module.on_save_checkpoint
        module.__dict__["on_save_checkpoint"] = self

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Add the state and call the module's own hook."""
        if "callbacks" not in checkpoint and "state_dict" in checkpoint:
            checkpoint["callbacks"] = {self.key: copy.deepcopy(self.state())}
        self.own(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has no use for it, and must not drag the Trainer's callbacks along."""
        return copy.deepcopy(self.own, memo)


def saves_alone(module: LightningModule) -> None:
    """Undo `SavesWithWeights`."""
    hook = module.__dict__.get("on_save_checkpoint")
    if isinstance(hook, SavesWithWeights):
        del module.__dict__["on_save_checkpoint"]
        if hook.before is not None:
            module.__dict__["on_save_checkpoint"] = hook.before


# -- the best one --------------------------------------------------------------------------------------------------------


def _content(trainer: Trainer, path: str) -> dict[str, Any] | str:
    """A checkpoint as the Trainer reads it, wherever and however it was written, on the host; or why it cannot."""
    io = trainer.strategy.checkpoint_io
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False}  # this run wrote it
    taken = inspect.signature(io.load_checkpoint).parameters
    try:
        content: dict[str, Any] = io.load_checkpoint(path, **{key: one for key, one in options.items() if key in taken})
    except Exception as error:  # noqa: BLE001  (a plugin of the user's, a file system somewhere)
        return f"{type(error).__name__}: {error}"
    return content


def best_checkpoint(trainer: Trainer, key: str, run: str) -> tuple[str, dict[str, Any]] | None:
    """(path, content) of the best checkpoint of the first monitored ModelCheckpoint that this run saved quantized.

    None without such a ModelCheckpoint or such a checkpoint. Warns where there is a better one from before, or none at all.
    """
    monitored = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not monitored:
        return None
    keeper = monitored[0]
    ranked = sorted(keeper.best_k_models.items(), key=lambda item: float(item[1]), reverse=keeper.mode == "max")
    paths = [path for path, _ in ranked] or [keeper.best_model_path]
    early: list[int] = []  # epochs whose checkpoints are better, but not of the quantized model
    found: tuple[str, dict[str, Any]] | None = None
    for path in filter(None, paths):
        checkpoint = _content(trainer, path)
        if isinstance(checkpoint, str):
            rank_zero_warn(f"{key}: the checkpoint {path} cannot be read: {checkpoint}")
            continue
        state = checkpoint.get("callbacks", {}).get(key)
        if not state or state["run"] != run:
            continue
        if state.get("rounds_all", state["phase"]["quantize"]) and is_complete(state["quantizers"]):
            found = path, checkpoint
            break
        early.append(checkpoint["epoch"])
    if found is None or early:
        which = "none was saved by this fit with everything quantized or masked"
        if early:
            which = f"the best, of epoch {early[0]}, was saved before everything was quantized or masked"
        instead = "the last weights are converted" if found is None else f"that of epoch {found[1]['epoch']} is converted"
        rank_zero_warn(
            f"{key}: of the checkpoints of {type(keeper).__name__}(monitor={keeper.monitor!r}) {which}, so {instead}. Let "
            "quantization start earlier, or keep more checkpoints (save_top_k)."
        )
    return found
