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
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of, made_permanent
from lightning_quant.cuts import Cuts, find_cuts, masked_slices, units_of
from lightning_quant.flow import follow, stored_tensors
from lightning_quant.heads import add_heads
from lightning_quant.narrow import cut_model, first_names, keep_cuts, norms_of, pin_scales, ranges_of
from lightning_quant.prepare import restore_model
from lightning_quant.record import moved, multiply_adds, split_example, undisturbed
from lightning_quant.tables import html_table, text_table
from lightning_quant.targets import on_tensors, tensors_in
from lightning_quant.units import IN, OUT, Dim, Flow, by_group

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a float32 model costs: parameters, bytes of parameters and buffers, multiply-adds of one call with the example.

    `by_module`: multiply-adds by the names of modules in what was called, "" for it all, of two samples at most.
    """

    parameters: int
    bytes: int
    multiply_adds: int
    by_module: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
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

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows, notes=self._sums)

    @property
    def _rows(self) -> list[list[str]]:
        rows = [[name, f"{count} of {size}", ""] for name, (count, size) in self.removed.items()]
        rows += [[name, "", f"{count} stay: {why}"] for name, reasons in self.kept.items() for why, count in reasons.items()]
        return rows

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
    """
    model = made_permanent(copy_of(model))  # what torch.nn.utils.prune masks is 0 in the parameter
    run, flow, cuts = _cuts(model, masks, example_input, entry)
    problems = _problems(cuts, required)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    cuts = replace(cuts, ranges=ranges_of(flow, model, cuts))
    before, after = run.cost(run.model), run.cost(run.cut(cuts))
    keep_cuts(model, model.get_submodule(entry), cuts, _less_work(before, after))
    cut_model(model, cuts)
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
    _, _, cuts = _cuts(made_permanent(copy_of(model)), masks, example_input, entry)
    found: dict[str, Tensor] = {}
    for name in sorted(cuts.names() - set(cuts.biases)):  # where constants go into a bias, the values that they met count
        size = cuts.shapes[name]
        if len(size) > 1:
            place = torch.arange(1, math.prod(size) + 1, dtype=torch.float64).reshape(size)
            stays = torch.zeros(math.prod(size) + 1, dtype=torch.bool)
            stays[cuts.tensor(name, place).flatten().long()] = True
            found[name] = stays[1:].reshape(size)
    return found


def _cuts(model: nn.Module, masks: Mapping[str, Tensor] | None, example_input: Any, entry: str) -> tuple[_Run, Flow, Cuts]:
    names = first_names(model)
    if masks is None:
        masks = {name: parameter != 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    masks = _checked_masks(model, masks, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the first copy
        plain = restore_model(copy_of(model)).eval().cpu()
    run = _Run(plain, example_input, entry)
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


class _Run:
    """A float copy on the host in float64, where its forward allows that, and what it is called with: two samples, if it may be.

    `times`: how many times as large the example was.
    """

    def __init__(self, model: nn.Module, example_input: Any, entry: str) -> None:
        self.entry = entry
        whole = moved(split_example(example_input), "cpu")
        sizes = {one.shape[0] if one.dim() else 0 for one in tensors_in(whole)}
        batch = sizes.pop() if len(sizes) == 1 else 0
        few = on_tensors(lambda one: one[:2], whole) if batch > 2 else whole
        wide = copy.deepcopy(model).double()
        tries = [(wide, few, 1e-9), (wide, whole, 1e-9), (model, few, TOLERANCE), (model, whole, TOLERANCE)]
        for self.model, example, self.relative in tries:
            self.times = batch / 2 if example is few and batch > 2 else 1.0
            self.example = example if self.model is model else on_tensors(_doubled, example)
            try:
                self.expected = self.outputs(self.model)
            except Exception:
                if example is whole and self.model is model:
                    raise
                continue  # float32, or how many samples there are, is written somewhere in the forward
            return

    def outputs(self, model: nn.Module) -> list[Tensor]:
        args, kwargs = on_tensors(torch.clone, self.example)
        with undisturbed(model), torch.no_grad():
            return list(tensors_in(model.get_submodule(self.entry)(*args, **kwargs)))

    def cost(self, model: nn.Module) -> Cost:
        with FlopCounterMode(display=False) as counter:
            self.outputs(model)
        tensors = stored_tensors(model).values()
        return Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            bytes=sum(tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors),
            multiply_adds=round(counter.get_total_flops() / 2 * self.times),
            by_module=multiply_adds(model.get_submodule(self.entry), counter),
        )

    def flow(self) -> Flow:
        return follow(self.model, on_tensors(torch.clone, self.example), self.model.get_submodule(self.entry))

    def cut(self, cuts: Cuts) -> nn.Module:
        small = copy.deepcopy(self.model)
        cut_model(small, cuts)
        return small

    def problem(self, cuts: Cuts) -> str:
        """Why a smaller model does not compute the same; "" if it does."""
        twin = copy.deepcopy(self.model)
        _randomise(twin, cuts)
        plain = replace(cuts, biases={})
        random_small = copy.deepcopy(twin)
        if not cuts.names():
            return ""
        try:
            small = self.cut(cuts)
            cut_model(random_small, plain)
            pairs = [(self.outputs(small), self.expected), (self.outputs(random_small), self.outputs(twin))]
        except Exception as error:  # noqa: BLE001  (the user's own forward)
            return f"the forward has sizes written in: {str(error).splitlines()[0]}"
        for found, expected in pairs:
            if len(found) != len(expected) or not all(_alike(a, b, self.relative) for a, b in zip(found, expected, strict=True)):
                return "the forward has sizes or places of channels written in"
        return ""


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _alike(found: Tensor, expected: Tensor, relative: float) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    most = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())) if expected.numel() else 1.0
    return torch.allclose(found, expected, rtol=0, atol=relative * most, equal_nan=True)


def _randomise(model: nn.Module, cuts: Cuts) -> None:
    """Random numbers for all weights, 0 for those that go: whatever the values are, cutting must leave the outputs."""
    generator, buffers = torch.Generator().manual_seed(0), dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan**0.5
            values = values.abs() + 0.5 if name in buffers else values  # a variance, say
            tensor.copy_(values)
            for (own, dim), gone in cuts.gone.items():
                if own == name:
                    _clear(tensor, dim, gone, cuts, name)


def _clear(tensor: Tensor, dim: Dim, gone: Tensor, cuts: Cuts, name: str) -> None:
    if isinstance(dim, int):
        tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
        return
    conv = cuts.convs[name]
    parts = by_group(tensor, conv)
    shape = [conv.groups, -1, 1] if dim == OUT else [conv.groups, 1, -1]
    parts.masked_fill_(gone.view([*shape, *[1] * (parts.dim() - 3)]), 0)


def _proven(run: _Run, flow: Flow, masked: Mapping[tuple[str, Dim], Tensor]) -> Cuts:
    """What can go, tried out; where the forward does not bear all of it, as much as it bears, parameter by parameter."""
    bias = {name: _can_have_bias(run.model, name) for name in {reading.weight for reading in flow.readings}}

    def find(tried: set[int] | None = None) -> Cuts:
        cuts = find_cuts(flow, masked, bias, tried)
        return replace(cuts, norms=norms_of(flow, run.model, cuts))

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


def _try_heads(run: _Run, masks: Mapping[str, Tensor], names: Mapping[str, str], cuts: Cuts) -> Cuts:
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
