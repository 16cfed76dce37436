# SPDX-License-Identifier: Apache-2.0
"""Owns cutting channels out of a model, float or prepared: tensors, sizes, ranges that layers have for each channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_quant.config import ConfigError
from lightning_quant.cuts import Cuts
from lightning_quant.flow import stored_tensors
from lightning_quant.heads import cut_heads
from lightning_quant.keys import INPUT, OUTPUT
from lightning_quant.methods import LsqWeight
from lightning_quant.prepare import drop_deployed_layers, prepared_groups, quantizers_of
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.sparsity import CUTS
from lightning_quant.targets import is_input
from lightning_quant.units import OUT, Conv, Flow
from lightning_quant.weights import MseWeight, WeightGrid, WeightQuantizer


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first = {id(tensor): name for name, tensor in stored_tensors(model).items()}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first[id(tensor)] for name, tensor in every}


# -- what was cut out of a model, kept with it ------------------------------------------------------------------------


def keep_cuts(model: nn.Module, small: nn.Module, cuts: Cuts, work: Mapping[str, list[int]]) -> None:
    """Note in `small` what was cut out of `model`, where their tensors have other names in it: the names are those in `small`.

    `work`: multiply-adds before and after, by the names of modules in `small`.
    """
    own, tensors = first_names(model), dict(stored_tensors(model))
    first = {id(tensor): name for name, tensor in tensors.items()}
    names = {first[id(tensor)]: name for name, tensor in stored_tensors(small).items() if id(tensor) in first}
    heads = {id(module): name for name, module in small.named_modules()}
    small.__dict__[CUTS] = {
        "gone": [(names[name], dim, gone) for (name, dim), gone in cuts.gone.items() if name in names],
        "convs": {names[name]: asdict(conv) for name, conv in cuts.convs.items() if name in names},
        "biases": [names[own[name]] for name, (bias, _) in cuts.biases.items() if not bias and own[name] in names],
        "heads": {heads[id(model.get_submodule(name))]: gone for name, gone in cuts.heads.items()},
        "norms": {heads[id(model.get_submodule(name))]: count for name, count in cuts.norms.items()},
        "shapes": {names[name]: list(tensors[name].shape) for name in cuts.names() if name in names},
        "multiply_adds": dict(work),
    }


def cut_alike(net: nn.Module, data: Mapping[str, Any]) -> None:
    """Cut out of a float net, in place, what `keep_cuts` noted of another one of its class; new biases are 0.

    A net whose tensors are not as large as those were is left as it is.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(net).items()}
    if any(shapes.get(name) != tuple(before) for name, before in data["shapes"].items()):
        return  # smaller already, or another net: who loads numbers into it compares shapes
    cuts = Cuts(
        gone={(name, dim): gone for name, dim, gone in data["gone"]},
        convs={name: Conv(**conv) for name, conv in data["convs"].items()},
        biases={name: ("", torch.zeros(_outputs(shapes[name], data["convs"].get(name)))) for name in data["biases"]},
        heads=dict(data["heads"]),
        norms=dict(data["norms"]),
        shapes=shapes,
    )
    cut_model(net, cuts)


def _outputs(shape: tuple[int, ...], conv: Mapping[str, Any] | None) -> int:
    return shape[0] if conv is None else int(conv["outputs"])


# -- the ranges of a prepared model -----------------------------------------------------------------------------------


def pin_scales(flow: Flow, model: nn.Module, names: Mapping[str, str]) -> None:
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
    for quantizer in quantizers_of(model).values():
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


def ranges_of(flow: Flow, model: nn.Module, cuts: Cuts) -> dict[str, list[tuple[int, Tensor]]]:
    """What goes of the ranges of a prepared model: (dimension, bool over its indices) by quantizer."""
    going = cuts.units(flow)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for quantizer in quantizers_of(model).values():
        for dim, units in _blocks(flow, quantizer):
            others = [other for other in range(units.dim()) if other != dim]
            gone = going[flow.units.roots(units)].all(others) if others else going[flow.units.roots(units)]
            found.setdefault(quantizer.name, []).append((dim, gone))
    return found


def norms_of(flow: Flow, model: nn.Module, cuts: Cuts) -> dict[str, int]:
    """How many channels are left to norms that have no tensor to tell."""
    going, found = cuts.units(flow), {}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase | nn.GroupNorm) and not any(one.dim() for one in stored_tensors(module).values()):
            units = (flow.boundaries.get(name, ([], []))[0] or [None])[0]
            if units is not None and units.dim() > 1:
                gone = going[flow.units.roots(units)].movedim(1, 0).flatten(1).all(1)
                size = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
                found[name] = size - int(gone.sum())
    return found


def _cut_ranges(model: nn.Module, cuts: Cuts, names: Mapping[str, str]) -> None:
    """Have the quantizers of a prepared model fit its smaller layers; the values that they go on with stay."""
    done: set[int] = set()
    for _, group in prepared_groups(model).values():
        for weight in group.parameter_quantizers:
            if id(weight) not in done:
                done.add(id(weight))
                _cut_weight_quantizer(weight, cuts, names[weight.name])
    for quantizer in quantizers_of(model).values():
        for dim, gone in cuts.ranges.get(quantizer.name, []):
            for key in ("low", "high", "young"):
                if isinstance(side := getattr(quantizer, key), Tensor) and side.dim():
                    setattr(quantizer, key, side.index_select(dim, (~gone).nonzero().flatten().to(side.device)))
            quantizer.changes += 1


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
    names, gone = first_names(model), dict(cuts.gone)
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
        _set_sizes(module, cuts.groups(name) if name in cuts.convs else 1, cuts.norms.get(prefix))
    for name, heads in cuts.heads.items():
        cut_heads(model.get_submodule(name), heads)
    drop_deployed_layers(model)


def _set_sizes(module: nn.Module, groups: int, channels: int | None) -> None:
    """Have a layer's own account of its sizes be that of its tensors; `channels`: of a norm that has none."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.RNNBase):  # it keeps its parameters in a list, too
        module.input_size = getattr(module, "weight_ih_l0").shape[1]  # noqa: B009
        module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in module._flat_weights_names]
    if isinstance(module, _NormBase):
        sized = next((one for one in (weight, module._buffers.get("running_mean")) if one is not None), None)
        module.num_features = len(sized) if sized is not None else channels or module.num_features
    if isinstance(module, nn.GroupNorm):
        left = len(weight) if weight is not None else channels or module.num_channels
        module.num_groups, module.num_channels = left * module.num_groups // module.num_channels, left
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
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
