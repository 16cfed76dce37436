# SPDX-License-Identifier: Apache-2.0
"""Owns masks at work: when they are made, from which numbers, and how they stay in the parameters while these are trained.

A masked parameter is 0 where its mask says so: in place, after each optimizer step, so that the forward costs nothing, the
quantizer sees zeros and a checkpoint holds them. The mask of an input or output of a weighted layer is that of the columns or
rows of its weight. Weights of transposed convolutions, (in, out / groups, ...), are looked at as (out, in / groups, ...),
output channels first as in all other layers; masks that are handed out have the parameter's own shape.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.keys import OUTPUT, WEIGHT
from lightning_quant.layouts import canonical_shape, columns, first_out, raw
from lightning_quant.mask_groups import aligned_order
from lightning_quant.masked import PassingMask, mask_passing, unmask_passing
from lightning_quant.masking import make_pruning
from lightning_quant.patterns import is_batch_norm
from lightning_quant.prepare import drop_deployed_layers
from lightning_quant.pruning import METRICS, Evidence, Metric, blocks_of, global_masks, n_of_m, one_mask, reduced, spread
from lightning_quant.pruning_plan import MaskedTarget, Pruning, PruningPlan, Unit
from lightning_quant.schedule import Clock, Pace
from lightning_quant.targets import Arguments, is_activation, is_input, owner_of


class Masks:
    """The masks of one model, made by a plan as training goes on.

    In a training loop: `step(clock)` before each training step, `after_backward()` between backward (all of them, where gradients
    are accumulated) and the optimizer's step, `apply()` behind that step. `apply()` also where the weights were changed
    otherwise: before an evaluation on averaged weights, before saving and converting. Attach before `prepare_model`.

    Args:
        model: the float model that the plan was made for; its tensors, names and hooks stay as they are. Modules whose inputs or
            outputs are masked where they pass change their class until `remove()`.
        plan: of `make_pruning`.

    Raises:
        ConfigError: if the plan is not for this model.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan) -> None:
        self.model, self.plan = model, plan
        self.done = 0  # how many updates there were
        self.waits_long = False
        self._since: tuple[int, int] | None = None  # the updates due, and the epoch, when one began to wait
        self._pace = plan.options.pace
        self._targets = {target.name: target for target in plan.targets}
        self._masks: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._hidden: dict[str, Tensor] = {}
        self._further: dict[str, Tensor] = {}
        self._acting: list[tuple[str, nn.Module, str, Tensor]] = []
        self._modules = dict(model.named_modules())
        self._check()
        self._passing: dict[str, PassingMask] = {}
        by_module: dict[str, list[PassingMask]] = {}
        for target in plan.targets:
            if target.values is None:
                argument = Arguments(type(self._modules[target.module])).find(target.target) if is_input(target.target) else None
                one = PassingMask(target.name, target.target, argument, target.spec.granularity, target.spec.apply_method)
                self._passing[target.name] = one
                by_module.setdefault(target.module, []).append(one)
        for name, masks in by_module.items():
            mask_passing(self._modules[name], masks)

    def _check(self) -> None:
        for target in self.plan.targets:
            module = self._modules.get(target.module)
            if module is None:
                raise ConfigError(f"the plan masks {target.name!r}, which {type(self.model).__name__} lacks; make the plan anew.")
            if target.values is not None:
                shape = canonical_shape(module, target.values, self._parameter(module, target).shape)
                if shape != target.shape:
                    raise ConfigError(
                        f"the plan masks {target.name!r} of shape {list(target.shape)}, and here it has {list(shape)}; "
                        "make the plan anew."
                    )

    def _parameter(self, module: nn.Module, target: MaskedTarget) -> Tensor:
        assert target.values is not None
        return _own(*owner_of(module, target.values), target.name)

    # -- training -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self, parameters: Collection[Tensor] | None = None) -> None:
        """Take what a metric needs from the gradients of this step, and add the penalty of `slim` to them.

        Nothing happens after the last update. `parameters`: those of the optimizer whose step follows; all, if left out.
        """
        if self.done >= self._pace.steps:
            return
        stepped = None if parameters is None else set(map(id, parameters))
        scales: dict[int, Tensor] = {}
        for name, target in self._targets.items():
            if not target.scored:
                continue
            metric = METRICS[target.spec.metric]
            if metric.step is not None:
                parameter = self._parameter(self._modules[target.module], target)
                if parameter.grad is not None and (stepped is None or id(parameter) in stepped):
                    self._gather(name, target, metric, parameter.grad)
            elif target.spec.metric == "slim":
                scale = self._scale(target)
                scales[id(scale)] = scale  # of a layer and its batch norm it is the same
        for key, scale in scales.items():
            if scale.grad is not None and (stepped is None or key in stepped):
                scale.grad.add_(scale.sign(), alpha=self.plan.options.penalty)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked values to 0, for an optimizer that runs forwards in its step (LBFGS)."""
        for name, owner, own, mask in self._acting:
            gradient = _own(owner, own, name).grad
            if gradient is not None:
                gradient.mul_(mask.to(gradient.device))

    def _gather(self, name: str, target: MaskedTarget, metric: Metric, gradient: Tensor) -> None:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        assert metric.step is not None
        step = metric.step(self._blocks(target, self._value(target)), self._blocks(target, gradient))
        step = step.nan_to_num_(0.0, 0.0, 0.0)  # a step that overflowed says nothing, and must not stay for ever
        before = self._statistics.get(name)
        self._statistics[name] = step if before is None else before.to(step.device) + step
        self._counts[name] = self._counts.get(name, 0) + 1

    def __repr__(self) -> str:
        masks = self.by_target().values()
        gone, of = sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        return f"Masks({self.done} of {self._pace.steps} updates made, {gone:,} of {of:,} values masked)"

    def step(self, clock: Clock) -> bool:
        """Make new masks where the schedule has an update before the training step at `clock`, and apply them.

        Metrics that need gradients wait for the first of them (`waits_for`; `waits_long` once another update is due, or another
        epoch has begun), but not for those of what is frozen: it has its mask from the first update on that comes while it
        trains. Returns whether masks were made.
        """
        due = self._pace.done_at(clock) if self.done < self._pace.steps else self.done
        if due > self.done and self._missing():
            self._since = self._since or (due, clock.epoch)
            self.waits_long = due > self._since[0] or clock.epoch > self._since[1]
            return False
        self._since, self.waits_long = None, False
        if due > self.done:
            self._update(due)
            return True
        return False

    def _missing(self) -> tuple[str, ...]:
        """Targets scored by gradients that have not come yet, and will."""
        return tuple(
            name
            for name, target in self._targets.items()
            if _gathers(target)
            and name not in self._statistics
            and self._parameter(self._modules[target.module], target).requires_grad
        )

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Targets whose gradients an update that is due waits for."""
        return () if self._since is None else self._missing()

    def unmasked(self) -> tuple[str, ...]:
        """Targets that are to have a mask by their gradients, and have none so far."""
        return tuple(name for name, target in self._targets.items() if _gathers(target) and name not in self._masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked values to 0."""
        for name, owner, own, mask in self._acting:
            parameter = _own(owner, own, name)
            parameter.mul_(mask if mask.device == parameter.device else mask.to(parameter.device))  # a fifth of masked_fill_
        if self._acting and not self.model.training:
            drop_deployed_layers(self.model)

    # -- new masks ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, due: int) -> None:
        share = self._pace.share_after(due)
        scores = {
            name: self._score(target, due)
            for name, target in self._targets.items()
            if target.scored and target.spec.pattern is None and self._has_scores(target)
        }
        self._mask_units(scores, share)
        for name, target in self._targets.items():
            if target.scored and target.spec.pattern is not None and self._has_scores(target):
                self._masks[name] = self._pattern(target, share, due)
        for name in [name for name, t in self._targets.items() if t.scored and METRICS[t.spec.metric].mean]:
            self._statistics.pop(name, None)
            self._counts.pop(name, None)
        self._derive()
        self.done = due
        self._attach()

    def _has_scores(self, target: MaskedTarget) -> bool:
        return not _gathers(target) or target.name in self._statistics

    def _mask_units(self, scores: Mapping[str, Tensor], share: float) -> None:
        grouped: dict[Any, list[tuple[Unit, Tensor]]] = {}
        for place, unit in enumerate(self.plan.units):
            known = [(scores[name], at) for name, at in unit.members if name in scores]  # others are frozen
            if not known:
                continue
            found = [score if at is None else score[at.to(score.device)] for score, at in known]
            mean = torch.stack([one.to(found[0].device) for one in found]).mean(0)
            grouped.setdefault(("alone", place) if unit.global_id is None else unit.global_id, []).append((unit, mean))
        for members in grouped.values():
            if members[0][0].global_id is None:
                masks = [one_mask(mean, unit.wanted, share) for unit, mean in members]
            else:
                device = members[0][1].device
                masks = global_masks([mean.to(device) for _, mean in members], [unit.wanted for unit, _ in members], share)
            for (unit, _), mask in zip(members, masks, strict=True):
                for name, at in unit.members:
                    device = self._parameter(self._modules[self._targets[name].module], self._targets[name]).device
                    own = self._mask(self._targets[name]).to(device, copy=True)
                    own[slice(None) if at is None else at.to(device)] = mask.to(device)
                    self._masks[name] = own

    def _score(self, target: MaskedTarget, due: int) -> Tensor:
        metric, name = METRICS[target.spec.metric], target.name
        blocks = self._blocks(target, self._value(target))
        kept = self._masks.get(name)
        kept = torch.ones(len(blocks), dtype=torch.bool, device=blocks.device) if kept is None else kept.to(blocks.device)
        statistic = self._statistics.get(name)
        if statistic is not None:
            statistic = statistic.to(blocks.device) / (self._counts[name] if metric.mean else 1)
        # One stream for each target and update, the same in every process.
        seed = zlib.crc32(f"{self.plan.options.seed} {name} {due}".encode())
        evidence = Evidence(
            blocks=blocks,
            kept=kept,
            statistic=statistic,
            scale=None if target.scale is None else self._scale(target).float(),
            generator=torch.Generator().manual_seed(seed),
        )
        scores = metric.score(evidence)
        return scores if metric.returns else scores.masked_fill(~kept, -torch.inf)

    def _pattern(self, target: MaskedTarget, share: float, due: int) -> Tensor:
        assert target.spec.pattern is not None
        n, m = target.spec.pattern
        scores = self._score(target, due).reshape(target.shape)
        return n_of_m(scores, m - int((m - n) * share + 1e-6), m).reshape(-1)

    def _derive(self) -> None:
        """The masks that follow others, from those that were made."""
        for target in aligned_order(self.plan.targets):
            assert target.spec.align is not None
            source, dims = target.spec.align
            mask = self._whole(self._targets[source])
            if not is_activation(source.removeprefix(f"{self._targets[source].module}.")):
                mask = reduced(mask, dims)
            self._masks[target.name] = mask if target.values is None else mask.reshape(-1)
            if target.values is None:
                self._passing[target.name].mask = mask
        prefix = self.plan.prefix
        own = {t.module.removeprefix(prefix): self._mask(t) for t in self.plan.targets if not t.follows and _of_rows(t)}
        channels = self.plan.channels
        behind = {layer: own[norm] for layer, norm in channels.norm_behind.items() if norm in own and layer not in own}
        following = [t for t in self.plan.targets if t.follows]
        names = {t.module.removeprefix(prefix) for t in following}
        found = channels.followed({**own, **behind}, [name for name in channels.follows if name in names and name not in behind])
        for target in following:
            name = target.module.removeprefix(prefix)
            self._masks[target.name] = (behind[name] if name in behind else found[name]).clone()

    def _mask(self, target: MaskedTarget) -> Tensor:
        """The mask of blocks now, (blocks,); all True before the first update."""
        mask = self._masks.get(target.name)
        if mask is None:
            mask = torch.ones(math.prod(target.grid), dtype=torch.bool)
        return mask

    def _whole(self, target: MaskedTarget) -> Tensor:
        """Its mask over the parameter, output channels first; of an input or output over its channels."""
        if is_activation(target.target):
            return self._mask(target).reshape(target.grid)
        return spread(self._mask(target), target.shape, target.kernel).expand(target.shape)

    # -- masks in their places ----------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """What `apply` multiplies from now on; values of metrics that let them return are kept, and come back."""
        before = {name: mask for name, _, _, mask in self._acting}
        self._acting = [(name, *owner_of(self.model, name), mask) for name, mask in self._combined().items()]
        if any(map(_returns, self.plan.targets)):  # with a block that comes back come the bias and the batch norm that follow it
            for name, owner, own, _ in self._acting:
                parameter = _own(owner, own, name)
                held = self._hidden.get(name)
                value = (
                    parameter if held is None else torch.where(before[name].to(parameter.device), parameter, held.to(parameter))
                )
                self._hidden[name] = value.detach().clone()
                parameter.copy_(value)
        for place, (name, owner, own, mask) in enumerate(self._acting):
            parameter = _own(owner, own, name)
            self._acting[place] = (name, owner, own, mask.to(parameter.device))
            parameter.masked_fill_(~mask.to(parameter.device), 0)  # infinity, too, of which a product would leave NaN
        drop_deployed_layers(self.model)

    def _combined(self) -> dict[str, Tensor]:
        """The mask of every parameter, of a shape that multiplies it; those of several targets together."""
        found: dict[str, Tensor] = {}
        for target in self.plan.targets:
            if target.values is None or target.name not in self._masks:
                continue
            for own, mask in self._of_parameters(target).items():
                name = f"{target.module}.{own}" if target.module else own
                found[name] = mask if name not in found else found[name] & mask.to(found[name].device)
        for name, mask in self._further.items():
            found[name] = mask if name not in found else found[name] & mask.to(found[name].device)
        return found

    @torch.no_grad()
    def also(self, masks: Mapping[str, Tensor]) -> None:
        """Mask these values from now on, too: bool of the shapes of parameters, by name, True where a value stays."""
        for name, mask in masks.items():
            before = self._further.get(name)
            self._further[name] = mask if before is None else before & mask.to(before.device)
        self._attach()

    def _of_parameters(self, target: MaskedTarget) -> dict[str, Tensor]:
        """What the mask of one target does to the parameters of its module."""
        module, mask = self._modules[target.module], self._mask(target)
        if not is_activation(target.target):
            return {target.target: raw(module, target.target, spread(mask, target.shape, target.kernel), target.shape)}
        if target.target != OUTPUT and not is_batch_norm(module):
            return {WEIGHT: columns(module, mask)}
        rows = raw(module, WEIGHT, mask.reshape(-1, *(1,) * (len(target.shape) - 1)), target.shape)
        biased = target.target == OUTPUT and module._parameters.get("bias") is not None
        return {WEIGHT: rows, **({"bias": mask} if biased else {})}

    # -- numbers of a target ------------------------------------------------------------------------------------------

    def _value(self, target: MaskedTarget) -> Tensor:
        """The values behind the mask where they are kept, else those that are there."""
        parameter = self._parameter(self._modules[target.module], target).detach()
        name = f"{target.module}.{target.values}" if target.module else str(target.values)
        held = self._hidden.get(name) if _returns(target) else None
        if held is None:
            return parameter
        mask = next(mask for other, _, _, mask in self._acting if other == name)
        value: Tensor = torch.where(mask.to(parameter.device), parameter, held.to(parameter))
        return value

    def _blocks(self, target: MaskedTarget, x: Tensor) -> Tensor:
        """(blocks, values) float32 of a tensor with the shape of its parameter."""
        module = self._modules[target.module]
        return blocks_of(first_out(module, str(target.values), x).float(), target.kernel)

    def _scale(self, target: MaskedTarget) -> Tensor:
        scale: Tensor | None = self._modules[target.scale or target.module]._parameters[WEIGHT]
        assert scale is not None
        return scale

    # -- what there is ------------------------------------------------------------------------------------------------

    def by_target(self) -> dict[str, Tensor]:
        """The masks of parameters now, by name ('conv1.weight'): bool, of the parameter's shape, True where a value stays."""
        combined = self._combined()
        found: dict[str, Tensor] = {}
        for target in self.plan.targets:
            if target.values is None:
                continue
            module = self._modules[target.module]
            for own in self._names(target, module):
                name = f"{target.module}.{own}" if target.module else own
                parameter = _own(*owner_of(module, own), name)
                mask = combined.get(name, torch.ones((), dtype=torch.bool)).to(parameter.device)
                found[name] = mask.expand(parameter.shape).clone()
        further = {name: mask.clone() for name, mask in self._further.items() if name not in found}
        return {**found, **further}

    def _names(self, target: MaskedTarget, module: nn.Module) -> list[str]:
        if not is_activation(target.target):
            return [target.target]
        biased = target.target == OUTPUT and module._parameters.get("bias") is not None
        return [WEIGHT, *(["bias"] if biased else [])]

    def passing(self) -> dict[str, Tensor]:
        """The masks of inputs and outputs that are masked where they pass, by name ('softmax._input_')."""
        return {name: one.mask for name, one in self._passing.items() if one.mask is not None}

    def sparsity(self) -> dict[str, float]:
        """The share of each masked parameter's values, by name, that its mask has set to 0."""
        return {name: 1 - float(mask.float().mean()) for name, mask in self.by_target().items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks, what was gathered and what was decided: plain tensors on the CPU, numbers and texts."""

        def host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

        return {
            "done": self.done,
            "masks": host(self._masks),
            "statistics": host(self._statistics),
            "counts": dict(self._counts),
            "hidden": host(self._hidden),
            "further": host(self._further),
            "decisions": self.plan.decisions(),
            "curve": [self._pace.schedule, self._pace.updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state and apply its masks. By another schedule they grow on from the share of theirs that was reached.

        Raises:
            ConfigError: if it is of another plan; nothing is loaded then.
        """
        own = self.plan.decisions()
        if own != state["decisions"]:
            names = sorted(name for name in {*own, *state["decisions"]} if own.get(name) != state["decisions"].get(name))
            raise ConfigError(
                f"the saved masks are of another `pruning`: {', '.join(names)} differ. Use the `pruning` of that run, or "
                "load only its weights and start a new fit."
            )
        schedule, updates = state["curve"]
        reached = Pace(schedule=schedule, updates=updates).share_after(state["done"])
        self.done, self._counts = self._pace.done_by(reached), dict(state["counts"])
        self._masks, self._statistics = dict(state["masks"]), dict(state["statistics"])
        self._hidden, self._further = dict(state["hidden"]), dict(state["further"])
        for name, one in self._passing.items():
            one.mask = self._masks.get(name)
        self._acting = [
            (name, owner, own_name, mask.to(_own(owner, own_name, name).device))
            for name, mask in self._combined().items()
            for owner, own_name in [owner_of(self.model, name)]
        ]
        self.apply()
        drop_deployed_layers(self.model)

    def remove(self) -> None:
        """Give modules that mask what passes their own class back; parameters stay as they are, masked."""
        for target in self.plan.targets:
            if target.values is None:
                unmask_passing(self._modules[target.module])


# -- parameters ---------------------------------------------------------------------------------------------------------


def _own(owner: nn.Module, own: str, name: str) -> Tensor:
    """A parameter that a module holds itself.

    Raises:
        ConfigError: if something else has put a mask or a computation in its place since.
    """
    parameter = owner._parameters.get(own)
    if parameter is None:
        what = "torch.nn.utils.prune (ModelPruning)" if f"{own}_orig" in owner._parameters else "a parametrization"
        raise ConfigError(
            f"{name}: {what} has taken the Parameter's place since the masks were planned; use one of the two for this layer."
        )
    return parameter


def _gathers(target: MaskedTarget) -> bool:
    """Whether its scores come from gradients."""
    return target.scored and METRICS[target.spec.metric].step is not None


def _returns(target: MaskedTarget) -> bool:
    return target.scored and METRICS[target.spec.metric].returns


def _of_rows(target: MaskedTarget) -> bool:
    """Whether its mask is one of output channels."""
    rows = target.kernel[:1] == (1,) and all(k == -1 for k in target.kernel[1:])
    return rows and target.values == WEIGHT and target.target in (WEIGHT, OUTPUT)


__all__ = ["MaskedTarget", "Masks", "Pruning", "PruningPlan", "make_pruning"]
