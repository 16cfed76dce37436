# SPDX-License-Identifier: Apache-2.0
"""Owns smaller layers: a model whose channels are masked becomes one that does not have them, and computes the same.

Tried against this: Torch-Pruning 1.6.1. It does not look at values (constants that survive a mask are lost), takes any operator
that it does not know for arithmetic, and knows neither unequal groups, channel shuffle, pixel shuffle nor ranges of quantizers.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of
from lightning_quant.cuts import Cuts, find_cuts, masked_slices, units_of
from lightning_quant.flow import follow, stored_tensors
from lightning_quant.keys import INPUT, OUTPUT
from lightning_quant.methods import LsqWeight
from lightning_quant.prepare import drop_deployed_layers, prepared_groups, restore_model
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.record import moved, split_example, undisturbed
from lightning_quant.tables import text_table
from lightning_quant.targets import is_input, on_tensors, tensors_in
from lightning_quant.unit_rules import by_group
from lightning_quant.units import IN, OUT, Dim, Flow
from lightning_quant.weights import MseWeight, WeightGrid, WeightQuantizer

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a float model costs: parameters, bytes of parameters and buffers, multiply-adds of one call with the example."""

    parameters: int
    bytes: int
    multiply_adds: int


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """A model with smaller layers, and what became of the channels that were masked.

    `removed`: by layer and parameter ('conv1.weight'), how many of how many slices went, along its first dimension ("rows") and
    its second ("columns"); `kept`: by the same names, how many masked slices stay, by reason. `before`, `after`: of the float
    model.
    """

    model: nn.Module
    before: Cost
    after: Cost
    removed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [[name, f"{count} of {size}", ""] for name, (count, size) in self.removed.items()]
        rows += [[name, "", f"{count} stay: {why}"] for name, reasons in self.kept.items() for why, count in reasons.items()]
        sums = [
            f"{label}: {_grouped(before)} -> {_grouped(after)} ({after / max(before, 1):.0%})"
            for label, before, after in (
                ("parameters", self.before.parameters, self.after.parameters),
                ("bytes", self.before.bytes, self.after.bytes),
                ("multiply-adds", self.before.multiply_adds, self.after.multiply_adds),
            )
        ]
        return text_table(["parameter", "removed", "kept"], rows, notes=["", *sums])


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def shrink_model(
    model: nn.Module,
    masks: Mapping[str, Tensor],
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
        example_input: what the model (or `entry`) is called with.
        entry: the name of the submodule that the example is for.
        required: names of layers that must get smaller by all that is masked of them.

    Raises:
        ConfigError: for a mask that fits no parameter, a value that is masked and not 0, or a required layer that cannot shrink.
    """
    names = _first_names(model)
    masks = _checked_masks(model, masks, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the copy that ships
        plain = restore_model(copy_of(model)).eval().cpu()
    run = _Run(plain, example_input, entry)
    flow = run.flow()
    _pin_scales(flow, model, names)
    masked = masked_slices(flow, masks)
    cuts = _proven(run, flow, masked)
    problems = _problems(cuts, required)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    result = copy_of(model)
    cut_model(result, replace(cuts, ranges=_ranges(flow, model, cuts)))
    small = run.cut(cuts)
    return Shrunk(
        model=result,
        before=cost_of(run.model, run.example, run.entry),
        after=cost_of(small, run.example, run.entry),
        removed=_removed(flow, cuts),
        kept=_kept(cuts),
    )


def cost_of(model: nn.Module, example_input: Any, entry: str = "") -> Cost:
    """What a float model costs; it is left as it was."""
    args, kwargs = split_example(example_input)
    tensors = list(stored_tensors(model).values())
    with undisturbed(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_submodule(entry)(*args, **kwargs)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors),
        multiply_adds=counter.get_total_flops() // 2,
    )


# -- what is asked ----------------------------------------------------------------------------------------------------


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first = {id(tensor): name for name, tensor in stored_tensors(model).items()}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first[id(tensor)] for name, tensor in every}


def _checked_masks(model: nn.Module, masks: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors, found, problems = dict(model.named_parameters()), {}, []
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
    found = []
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


# -- what can be done, tried out --------------------------------------------------------------------------------------


class _Run:
    """A float copy on the host in float64, where its forward allows that, and what it is called with."""

    def __init__(self, model: nn.Module, example_input: Any, entry: str) -> None:
        self.entry = entry
        example = moved(split_example(example_input), "cpu")
        wide = on_tensors(lambda one: one.double() if one.is_floating_point() else one, example)
        for self.model, self.example, self.relative in (
            (copy.deepcopy(model).double(), wide, 1e-9),
            (model, example, TOLERANCE),
        ):
            try:
                self.expected = self.outputs(self.model)
            except RuntimeError:  # float32 is written somewhere in the forward
                continue
            return
        self.expected = self.outputs(self.model)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        args, kwargs = on_tensors(torch.clone, self.example)
        with undisturbed(model), torch.no_grad():
            return list(tensors_in(model.get_submodule(self.entry)(*args, **kwargs)))

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
            if not all(_alike(a, b, self.relative) for a, b in zip(found, expected, strict=True)):
                return "the forward has sizes or places of channels written in"
        return ""


def _alike(found: Tensor, expected: Tensor, relative: float) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    most = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())) if expected.numel() else 1.0
    return torch.allclose(found, expected, rtol=0, atol=relative * most, equal_nan=True)


def _randomise(model: nn.Module, cuts: Cuts) -> None:
    """Random numbers for all weights, 0 for those that go: whatever the values are, cutting must leave the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan**0.5
            values = values.abs() + 0.5 if name.endswith("running_var") else values
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
    cuts = find_cuts(flow, masked, bias)
    if not run.problem(cuts):
        return cuts
    accepted: set[int] = set()
    for key, gone in masked.items():
        units = units_of(flow, {key: gone}) - accepted
        if units and (why := run.problem(find_cuts(flow, masked, bias, accepted | units))):
            flow.units.pin(torch.tensor(sorted(units)), why)
        else:
            accepted |= units
    return find_cuts(flow, masked, bias)


def _can_have_bias(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Linear | _ConvNd) and owner.bias is None


# -- the ranges of a prepared model -----------------------------------------------------------------------------------


def _pin_scales(flow: Flow, model: nn.Module, names: Mapping[str, str]) -> None:
    """Have channels stay that share a scale with others, but not with all."""
    for _, group in prepared_groups(model).values():
        for weight in group.parameter_quantizers:
            name = names[weight.name]
            if weight.spec.method == "bnn":
                flow.pin_stored(name, f"{weight.name} has one bit, and no 0")
            kernel = weight.spec.kernel(len(flow.shapes[name]))
            for dim, block in enumerate(kernel):
                if block not in (1, -1) or (block == 1 and dim == 1 and kernel[0] != 1 and flow.groups(name) > 1):
                    side = flow.side(name, dim)
                    if (units := flow.slices(name, side)) is not None:
                        flow.units.pin(units, f"{weight.name} has a scale for each block of {block}")
        for quantizer in group.quantizers:
            for dim, units in _blocks(flow, quantizer):
                if quantizer.spec.kernel(units.dim())[dim] != 1:
                    flow.units.pin(units, f"{quantizer.name} has a range for each block of channels")


def _blocks(flow: Flow, quantizer: ActivationQuantizer) -> Iterator[tuple[int, Tensor]]:
    """(dimension, units) for the dimensions along which a quantizer has several ranges and its tensor several units."""
    if not isinstance(quantizer.low, Tensor) or quantizer.low.numel() == 1:
        return
    layer, _, target = quantizer.name.rpartition(".")
    sides = flow.boundaries.get(layer, ([], []))
    number = target.removeprefix(INPUT).removeprefix(OUTPUT)
    tensors, place = sides[0 if is_input(target) else 1], int(number) if number.isdigit() else 0
    units = tensors[place] if place < len(tensors) else None
    if units is None or units.dim() != quantizer.low.dim():
        raise ConfigError(
            f"{quantizer.name}: it has a range for each channel, and its channels cannot be told from those of other tensors, so "
            "that the model cannot shrink. Give it granularity 'per_tensor', or leave out shrink."
        )
    for dim, size in enumerate(quantizer.low.shape):
        if size > 1 and units.shape[dim] > 1:
            yield dim, units


def _ranges(flow: Flow, model: nn.Module, cuts: Cuts) -> dict[str, list[tuple[int, Tensor]]]:
    """What goes of the ranges of a prepared model: (dimension, bool over its indices) by quantizer."""
    going = torch.zeros(len(flow.units), dtype=torch.bool)
    for (name, dim), gone in cuts.gone.items():
        slices = flow.slices(name, dim)
        assert slices is not None
        going[slices[gone]] = True
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for _, group in prepared_groups(model).values():
        for quantizer in group.quantizers:
            for dim, units in _blocks(flow, quantizer):
                others = [other for other in range(units.dim()) if other != dim]
                gone = going[flow.units.roots(units)].all(others) if others else going[flow.units.roots(units)]
                found.setdefault(quantizer.name, []).append((dim, gone))
    return found


def _cut_ranges(model: nn.Module, cuts: Cuts, names: Mapping[str, str]) -> None:
    """Have the quantizers of a prepared model fit its smaller layers; the values that they go on with stay."""
    done: set[int] = set()
    for _, group in prepared_groups(model).values():
        for weight in group.parameter_quantizers:
            if id(weight) not in done:
                done.add(id(weight))
                _cut_weight_quantizer(weight, cuts, names[weight.name])
        for quantizer in group.quantizers:
            for dim, gone in cuts.ranges.get(quantizer.name, []) if id(quantizer) not in done else []:
                for key in ("low", "high", "young"):
                    if isinstance(side := getattr(quantizer, key), Tensor) and side.dim():
                        setattr(quantizer, key, side.index_select(dim, (~gone).nonzero().flatten().to(side.device)))
                quantizer.changes += 1
            done.add(id(quantizer))


def _cut_weight_quantizer(quantizer: WeightQuantizer, cuts: Cuts, name: str) -> None:
    """What a quantizer keeps for each scale of its weight, or for each value."""
    if name not in cuts.names():
        return
    shape = cuts.shapes[name]

    def cut(values: Tensor) -> Tensor:
        if values.dim() != len(shape) or values.numel() == 1:
            return values
        smaller = cuts.tensor(name, values.detach().expand(shape))
        for dim, size in enumerate(values.shape):
            smaller = smaller.narrow(dim, 0, 1) if size == 1 else smaller
        return smaller.contiguous()

    for holder in (quantizer, getattr(quantizer, "before", None)):
        for key, value in list(vars(holder).items()) if holder is not None else []:
            if isinstance(value, nn.Parameter):
                value.data = cut(value.data)
            elif isinstance(value, Tensor):
                setattr(holder, key, cut(value))
            elif isinstance(value, WeightGrid):
                zero = None if value.zero_point is None else cut(value.zero_point)
                setattr(holder, key, WeightGrid(cut(value.scale), zero))
        smaller = cuts.tensor(name, torch.empty(shape))
        if isinstance(holder, MseWeight):
            kernel = holder.spec.kernel(len(shape))
            holder.blocks = tuple(1 if k == -1 else n // k for k, n in zip(kernel, smaller.shape, strict=True))
        if isinstance(holder, LsqWeight):
            holder.count = smaller.numel() / holder.scale.numel()
    quantizer.faint = None
    quantizer.changes += 1


# -- a smaller model --------------------------------------------------------------------------------------------------


def cut_model(model: nn.Module, cuts: Cuts) -> None:
    """Cut channels out of a model, float or prepared, in place. What went into the biases was computed for its numbers."""
    names, gone = _first_names(model), dict(cuts.gone)
    for weight, (bias, added) in cuts.biases.items():
        owner, values = model.get_submodule(weight.rpartition(".")[0]), stored_tensors(model)
        with torch.no_grad():
            if bias:
                values[bias].add_(added.to(values[bias]))
                continue
            owner.bias = nn.Parameter(added.to(values[weight]))
        made = gone.get((weight, OUT), gone.get((weight, 0)))
        name = f"{weight.rpartition('.')[0]}.bias"
        if made is not None:
            gone[name, 0] = made
    cuts = replace(cuts, gone=gone)
    _cut_ranges(model, cuts, names)
    tensors = stored_tensors(model)
    smaller: dict[int, Tensor] = {}
    for name in cuts.names():
        old = tensors[name]
        new = cuts.tensor(name, old.detach()).clone()
        smaller[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None and id(value) in smaller:
                    table[key] = smaller[id(value)]
        name = names.get(f"{prefix}.weight" if prefix else "weight", "")
        _set_sizes(module, cuts.groups(name) if name in cuts.convs else 1)
    drop_deployed_layers(model)


def _set_sizes(module: nn.Module, groups: int) -> None:
    """Have a layer's own account of its sizes be that of its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, _NormBase):
        sized = next((one for one in (weight, module._buffers.get("running_mean")) if one is not None), None)
        module.num_features = module.num_features if sized is None else len(sized)
    if weight is None:
        return
    if isinstance(module, _ConvNd):
        module.groups = groups
        ends = weight.shape[0], weight.shape[1] * groups
        module.out_channels, module.in_channels = ends[::-1] if module.transposed else ends
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = len(weight) * module.num_groups // module.num_channels
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
