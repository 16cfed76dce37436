# SPDX-License-Identifier: Apache-2.0
"""Owns smaller layers: a model whose channels are masked becomes one that does not have them, and computes the same.

Tried against this: Torch-Pruning 1.6.1. It does not look at values (constants that survive a mask are lost), takes any operator
that it does not know for arithmetic, and knows neither unequal groups, channel shuffle, pixel shuffle nor ranges of quantizers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of, made_permanent
from lightning_quant.cuts import Cuts, find_cuts, masked_slices, units_of
from lightning_quant.heads import add_heads
from lightning_quant.held import hold_constants
from lightning_quant.narrow import cut_model, first_names, keep_cuts, norms_of, pin_scales, ranges_of
from lightning_quant.prepare import restore_model
from lightning_quant.tables import html_table, text_table
from lightning_quant.trial import Cost, Trial
from lightning_quant.units import IN, OUT, Dim, Flow


@dataclass(frozen=True, kw_only=True, repr=False)
class Shrunk:
    """A model with smaller layers, and what became of the channels that were masked.

    `removed`: by layer and parameter ('conv1.weight'), how many of how many slices went, along its first dimension ("rows") and
    its second ("columns"); `kept`: by the same names, how many masked slices stay, by reason. `before`, `after`: of the float
    model. `cuts`: for `cut_model`, which has another instance of the model, as it was made, fit the small one's `state_dict`.
    """

    model: nn.Module
    cuts: Cuts
    before: Cost
    after: Cost
    removed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows, notes=["", *self._sums])

    def __repr__(self) -> str:
        stay = sum(sum(reasons.values()) for reasons in self.kept.values())
        kept = f", {stay} masked slices stay" if stay else ""
        return f"Shrunk({type(self.model).__name__}, {', '.join(self._sums)}{kept})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows, notes=self._sums)

    @property
    def _rows(self) -> list[list[str]]:
        rows = [[name, f"{count} of {size}", ""] for name, (count, size) in self.removed.items()]
        return rows + [
            [name, "", f"{count} stay: {why}"] for name, reasons in self.kept.items() for why, count in reasons.items()
        ]

    @property
    def _sums(self) -> list[str]:
        return [
            f"{label}: {_grouped(before)} -> {_grouped(after)} ({after / max(before, 1):.0%})"
            for label, before, after in (
                ("parameters", self.before.parameters, self.after.parameters),
                ("bytes", self.before.bytes, self.after.bytes),
                ("multiply-adds", self.before.multiply_adds, self.after.multiply_adds),
            )
        ]


_HEAD = ("parameter", "removed", "kept")


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def shrink_model(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example_input: Any,
    *,
    entry: str = "",
    required: Sequence[str] = (),
) -> Shrunk:
    """A copy of a masked model without the channels that are masked; the model itself stays as it is.

    Channels that are constants without being zero (their bias or batch norm is not masked) go into the bias of the layers that
    read them, where that is exact. What cannot go without changing what the model computes stays, and the result says why:
    channels that only some members of a residual addition mask, constants that a padding convolution reads, channels that a
    LayerNorm counts, the model's own outputs. The copy is held against the model on the example and, with random numbers for all
    weights, against a twin, so that nothing goes unnoticed behind small weights.

    Args:
        model: float, or prepared: then quantizers keep their ranges, cut where they have one for each channel.
        masks: by the name of a parameter, what stays of it: bool, to broadcast against it. Masked values are 0 in the model.
            None: what is 0 in parameters with several dimensions is masked.
        example_input: what the model (or `entry`) is called with.
        entry: the name of the submodule that the example is for.
        required: names of layers that must get smaller by all that is masked of them.

    Raises:
        ConfigError: for a mask that fits no parameter, a value that is masked and not 0, or a required layer that cannot shrink.
        UncallableError: a ConfigError, too, where the forward of a copy of the model fails with the example.
    """
    model = made_permanent(copy_of(model))  # what torch.nn.utils.prune masks is 0 in the parameter
    run, flow, cuts = _cuts(model, masks, example_input, entry)
    problems = _problems(cuts, required)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    cuts = replace(cuts, ranges=ranges_of(flow, model, cuts))
    before, after = run.cost(run.model), run.cost(run.cut(cuts))
    keep_cuts(model, model.get_submodule(entry), cuts, _less_work(before, after))
    cut_model(model, hold_constants(model, cuts, example_input, entry))
    return Shrunk(
        model=model,
        cuts=cuts,
        before=before,
        after=after,
        removed=_removed(flow, cuts),
        kept=_kept(cuts),
    )


def unread_values(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any, *, entry: str = "") -> dict[str, Tensor]:
    """Masks of the values that `shrink_model` removes because what they multiply is always 0, by parameter; True stays.

    Such values change nothing but the range of their channel, and with it the grid of a quantized weight. Masked while the
    model is trained, they are not missed when they go: what ships is then what was validated, bit for bit.
    """
    run, flow, cuts = _cuts(made_permanent(copy_of(model)), masks, example_input, entry)
    found: dict[str, Tensor] = {}
    factors = {*flow.convs, *(reading.weight for reading in flow.readings)}
    for name in sorted(cuts.names() - set(cuts.biases)):  # where constants go into a bias, the values that they met count
        size = cuts.shapes[name]
        if len(size) > 1:
            place = torch.arange(1, math.prod(size) + 1, dtype=torch.float64).reshape(size)
            stays = torch.zeros(math.prod(size) + 1, dtype=torch.bool)
            stays[cuts.tensor(name, place).flatten().long()] = True
            stays = stays[1:].reshape(size)
            if name in factors or run.same_without(name, stays):  # a parameter that is added makes a constant
                found[name] = stays
    return found


def _cuts(model: nn.Module, masks: Mapping[str, Tensor] | None, example_input: Any, entry: str) -> tuple[Trial, Flow, Cuts]:
    names = first_names(model)
    if masks is None:
        masks = {name: parameter != 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    masks = _checked_masks(model, masks, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the first copy
        plain = restore_model(copy_of(model)).eval().cpu()
    run = Trial(plain, example_input, entry)
    flow = run.flow()
    pin_scales(flow, model, names)
    masked = masked_slices(flow, masks)
    cuts = _proven(run, flow, masked)
    return run, flow, _try_heads(run, masks, names, cuts)


# -- what is asked ----------------------------------------------------------------------------------------------------


def _checked_masks(model: nn.Module, masks: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors, problems = dict(model.named_parameters()), []
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        first = names.get(name, "")
        if first not in tensors:
            problems.append(f"masks[{name!r}]: {type(model).__name__} has no parameter of this name")
            continue
        shape = tuple(tensors[first].shape)
        try:
            stays = mask.detach().bool().cpu().expand(shape)
        except RuntimeError:
            problems.append(f"masks[{name!r}]: shape {tuple(mask.shape)} does not broadcast to the parameter's {shape}")
            continue
        if bool(tensors[first].detach().cpu()[~stays].any()):
            problems.append(f"masks[{name!r}]: {name} is not 0 where it is masked; apply the mask before")
        found[first] = found[first] & stays if first in found else stays
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return found


def _problems(cuts: Cuts, required: Sequence[str]) -> list[str]:
    found: list[str] = []
    for layer in required:
        reasons = Counter(why for (name, _, _), why in cuts.kept.items() if name.rpartition(".")[0] == layer)
        if reasons:
            said = "; ".join(f"{count} masked stay, because {why}" for why, count in reasons.items())
            found.append(f"{layer!r} cannot shrink: {said}")
    return found


_SIDES: dict[Dim, str] = {OUT: "", IN: " (inputs)", 0: "", 1: " (inputs)"}


def _label(name: str, dim: Dim) -> str:
    return name + _SIDES.get(dim, f" (dimension {dim})")


def _removed(flow: Flow, cuts: Cuts) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for (name, dim), gone in cuts.gone.items():
        if isinstance(dim, str) or name not in flow.convs:
            found[_label(name, dim)] = int(gone.sum()), len(gone)
    return found


def _kept(cuts: Cuts) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (name, dim, _), why in cuts.kept.items():
        reasons = found.setdefault(_label(name, dim), {})
        reasons[why] = reasons.get(why, 0) + 1
    return found


def _less_work(before: Cost, after: Cost) -> dict[str, list[int]]:
    """Multiply-adds of the modules that have less to do than before: [before, after]."""
    both = before.by_module.keys() & after.by_module.keys()
    return {name: [b, a] for name in sorted(both) if (b := before.by_module[name]) > (a := after.by_module[name])}


# -- what can be done, tried out --------------------------------------------------------------------------------------


def _proven(run: Trial, flow: Flow, masked: Mapping[tuple[str, Dim], Tensor]) -> Cuts:
    """What can go, tried out; where the forward does not bear all of it, as much as it bears, parameter by parameter."""
    bias = {name: _can_have_bias(run.model, name) for name in {reading.weight for reading in flow.readings}}

    def find(tried: set[int] | None = None) -> Cuts:
        cuts = find_cuts(flow, masked, bias, tried)
        return replace(cuts, norms=norms_of(flow, run.model, cuts))

    cuts = find()
    for example in run.unlike(cuts):
        _keep_unlike(flow, run.flow(example))
        cuts = find()
    if not run.problem(cuts):
        return cuts
    accepted: set[int] = set()
    for key, gone in masked.items():
        units = units_of(flow, {key: gone}) - accepted
        if units and (why := run.problem(find(accepted | units))):
            flow.units.pin(torch.tensor(sorted(units)), why)
        else:
            accepted |= units
    return find()


def _keep_unlike(flow: Flow, other: Flow) -> None:
    """Have channels stay whose constants are others for an input of another size, which `other` has seen."""
    if [one.weight for one in flow.readings] != [one.weight for one in other.readings]:
        return
    for number, (one, there) in enumerate(zip(flow.readings, other.readings, strict=True)):
        unlike = (one.values - there.values).abs() > 1e-9 * (1 + one.values.abs())
        for channel in there.kept:
            unlike[channel] = True
        why = f"{one.where} reads it, a constant that depends on the size of the input"
        kept = dict.fromkeys(unlike.nonzero().flatten().tolist(), why) | dict(one.kept)
        flow.readings[number] = replace(one, kept=kept)


def _try_heads(run: Trial, masks: Mapping[str, Tensor], names: Mapping[str, str], cuts: Cuts) -> Cuts:
    """`cuts` with attention heads, if the model bears that."""
    more = copy.deepcopy(cuts)
    add_heads(run.model, masks, names, more)
    why = run.problem(more) if more.heads else ""
    if not why:
        return more
    for name in more.heads:
        for key in [key for key in cuts.kept if key[0].startswith(f"{name}.")]:
            cuts.kept[key] = why
    return cuts


def _can_have_bias(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Linear | _ConvNd) and owner.bias is None
