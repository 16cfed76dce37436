# SPDX-License-Identifier: Apache-2.0
"""Owns `summarize`: a prepared or deployed model becomes a report of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError, TensorSpec
from lightning_quant.fusion import Ending, FusedGroup
from lightning_quant.group import Group, own_class
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer, Rounding
from lightning_quant.intercept import OperatorGroup, RoundedOperator
from lightning_quant.keys import INPUT, OUTPUT, WEIGHT
from lightning_quant.monitor import Measured, StoredParameter, counted_on, measured_on, stored_parameters
from lightning_quant.patterns import TRANSPOSED
from lightning_quant.prepare import prepared_groups
from lightning_quant.quantizers import ActivationQuantizer, BlockGrid, Grid, SignGrid
from lightning_quant.sites import Operator
from lightning_quant.sparsity import Came, added, came_of, is_smaller, noted, sizes_before, work_before
from lightning_quant.summary import Before, LayerReport, Report, TensorReport
from lightning_quant.targets import is_input, owner_of
from lightning_quant.wrapped import ModuleGroup, QuantizedModule

_Found = TypeVar("_Found")

# -- summarize --------------------------------------------------------------------------------------------------------


def summarize(model: nn.Module, *, example_input: Any = None) -> Report:
    """The report of a prepared, pruned or deployed model; the model is as before.

    A deployed model has no float weights any more to be compared with: signal-to-noise ratios are those of a prepared one.
    Weights that are 0 in float show as sparsity. Where pruning removed channels the report has every number before and after;
    after a fit that removes them `callback.deployed_model` is smaller, and `callback.shrunk.model` the same, prepared.

    Args:
        model: what `prepare_model`, a fit with the callback, `convert_model`, `callback.deployed_model` or `shrink_model` gives.
        example_input: what `model` is called with, as for `make_plan`; a batch of real data, say. A prepared model is run on it
            in eval mode, in float and with everything rounded: activations and the outputs of the model then have the
            signal-to-noise ratio between the two, activations the share of values that their grid cuts off, layers their
            multiply-adds. The activations of one run are kept meanwhile. Of a deployed model multiply-adds alone are counted.

    Raises:
        ConfigError: if the model is neither prepared nor deployed nor pruned, or cannot be called with `example_input`.
    """
    groups = prepared_groups(model)
    return _of_prepared(model, groups, example_input) if groups else _of_deployed_model(model, example_input)


def _of_deployed_model(model: nn.Module, example_input: Any) -> Report:
    deployed = list(_deployed_layers(model))
    counts = {} if example_input is None else _called(counted_on, model, example_input)
    past, came = _Past(model, counts), [noted(module) for _, module in deployed]
    layers = [
        replace(_of_deployed(name, module), **past.of(name, one), multiply_adds=counts.get(name))
        for (name, module), one in zip(deployed, came, strict=True)
    ]
    held = {id(tensor): tensor for _, module in deployed for tensor in (*module.parameters(), *module.buffers())}
    floats: dict[int, Tensor] = {}
    pruned = list(past.pruned(held, floats))
    if not layers and not pruned:
        raise ConfigError(
            f"summarize: {type(model).__name__} is neither prepared nor deployed nor pruned; call prepare_model(model, plan) "
            "first, or give what convert_model returns."
        )
    notes = ["nothing is quantized; the layers are those with weights that are 0, or were removed"]
    if layers:
        notes = ["deployed: float weights are gone, so nothing is known of signal-to-noise ratios; summarize the prepared model"]
    if any(one.dtype.startswith("uint") for layer in layers for one in (*layer.of("input"), *layer.of("output"))):
        notes.append(
            "deployed activations are unsigned integers: what was configured as int8 is uint8, its zero point moved by 128"
        )
    came.append(came_of(floats.values(), past.sizes))
    parameters, float_bytes = (sum(getattr(one, key) for one in (*layers, *pruned)) for key in ("parameters", "float_bytes"))
    sums = {"parameters": parameters, "float_bytes": float_bytes}
    return _whole(model, [*layers, *pruned], sums, {**held, **floats}, past, came, notes=tuple(notes))


def _called(measure: Callable[[nn.Module, Any], _Found], model: nn.Module, example_input: Any) -> _Found:
    """`measure`, which calls the model, with a failed forward reported as a ConfigError."""
    try:
        return measure(model, example_input)
    except Exception as error:
        raise ConfigError(
            f"example_input: the forward of {own_class(model).__name__} failed: {error}. Give what the model is "
            "called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or (tuple, dict)."
        ) from error


def _of_prepared(model: nn.Module, groups: Mapping[str, tuple[nn.Module, Group]], example_input: Any) -> Report:
    measured = Measured() if example_input is None else _called(measured_on, model, example_input)
    stored: dict[str, list[StoredParameter]] = {}
    for one in stored_parameters(model):
        stored.setdefault(one.layer, []).append(one)
    names = {id(module): name for name, module in model.named_modules()}
    ordered = sorted(groups.items(), key=lambda item: item[1][1].place)  # as the data goes
    past, held = _Past(model, measured.multiply_adds), _tensors_of(groups.values())
    layers = [_of_group(head, group, stored.get(name, []), measured, past, names) for name, (head, group) in ordered]
    layers += past.pruned(dict(held), held)
    blind = [group.name for _, (_, group) in ordered if not group.ready]
    notes = [f"no ranges yet: {', '.join(blind)}"] if blind else []
    if blind and measured.output is not None:  # these were not rounded, so the number would be that of another model
        notes[0] += "; what quantization costs the model's outputs is therefore unknown"
        measured = replace(measured, output=None)
    if measured.strayed:
        notes.append(f"called otherwise when rounded than in float, and left out: {', '.join(measured.strayed)}")
    sums = {
        "parameters": sum(t.numel() for t in held.values() if isinstance(t, nn.Parameter)),
        "float_bytes": _bytes(held.values()),
    }
    came = [came_of(held.values(), past.sizes)]
    return _whole(model, layers, sums, held, past, came, signal_to_noise=measured.output, notes=tuple(notes))


def _tensors_of(groups: Iterable[tuple[nn.Module, Group]]) -> dict[int, Tensor]:
    """The parameters and buffers of prepared layers, by their ids."""
    modules = [one for head, group in groups for one in _modules_of(head, group)]
    return {id(tensor): tensor for one in modules for tensor in (*one.parameters(), *one.buffers())}


def _modules_of(head: nn.Module, group: Group) -> list[nn.Module]:
    """The modules of a prepared layer."""
    modules = [one for one in (*group.ahead, *group.members) if not isinstance(one, Operator)]
    return modules if isinstance(group, OperatorGroup) else [*modules, head]


class _Past:
    """What the layers of a model were before pruning removed channels, where it did.

    `counts`: multiply-adds of the model as it is, by the names of modules.
    """

    def __init__(self, model: nn.Module, counts: Mapping[str, int]) -> None:
        self.model, self.counts = model, counts
        self.sizes, self.work, self.smaller = sizes_before(model), work_before(model, counts), is_smaller(model)

    def of(self, name: str, one: Came | None) -> dict[str, Any]:
        """The fields of the report of a layer, or of the model, that say it."""
        if one is None:
            return {}
        work = self.work.get(name, self.counts.get(name))
        before = Before(parameters=one.parameters, float_bytes=one.float_bytes, multiply_adds=work)
        return {"sparsity": one.sparsity, "before": before if self.smaller else None}

    def pruned(self, held: Mapping[int, Tensor], found: dict[int, Tensor]) -> Iterable[LayerReport]:
        """The layers that have zeros in their weights, or less of these, beside those with the tensors `held`.

        `found`: where their tensors go, by their ids.
        """
        for name, module in self.model.named_modules():
            tables = (module._parameters, module._buffers)
            own = [one for table in tables for one in table.values() if one is not None and id(one) not in held]
            one = came_of(own, self.sizes)
            if one.sparsity is None:
                continue
            found.update((id(tensor), tensor) for tensor in own)
            past = self.of(name, one) if name else {**self.of(name, one), "before": None}
            yield LayerReport(
                name=name,
                type=own_class(module).__name__,
                fused=(),
                tensors={},
                parameters=sum(tensor.numel() for tensor in own if isinstance(tensor, nn.Parameter)),
                float_bytes=_bytes(own),
                stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in own),
                multiply_adds=self.counts.get(name) if name else None,
                **past,
            )


def _whole(
    model: nn.Module,
    layers: Sequence[LayerReport],
    sums: Mapping[str, int],
    held: Mapping[int, Tensor],
    past: _Past,
    came: Sequence[Came | None],
    **more: Any,
) -> Report:
    """The report of these layers, which have the tensors `held` and these `sums`, with the rest. `came`: what they were."""
    everything = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    others = [tensor for key, tensor in everything.items() if key not in held]
    other, rest = _bytes(others), came_of(others, past.sizes)
    known = [layer.stored_bytes for layer in layers if layer.stored_bytes is not None]
    whole = added([one for one in came if one is not None])
    return Report(
        model=own_class(model).__name__,
        layers=tuple(layers),
        parameters=sums["parameters"] + sum(tensor.numel() for tensor in others if isinstance(tensor, nn.Parameter)),
        float_bytes=other + sums["float_bytes"],
        stored_bytes=other + sum(known) if len(known) == len(layers) else None,
        other_bytes=other,
        multiply_adds=past.counts.get(""),
        **{**past.of("", added([whole, rest])), "sparsity": whole.sparsity, "other_bytes_before": rest.float_bytes},
        **more,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of floating-point tensors; counters (`num_batches_tracked`) are not part of what a layer computes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())


# -- prepared layers --------------------------------------------------------------------------------------------------


def _of_group(
    head: nn.Module,
    group: Group,
    stored: Sequence[StoredParameter],
    measured: Measured,
    past: _Past,
    names: Mapping[int, str],
) -> LayerReport:
    tensors = {target: _of_activation(target, one, measured) for target, one in _activations(group)}
    parameters = [_of_parameter(one, head) for one in stored]
    inputs = {target: one for target, one in tensors.items() if is_input(target)}
    tensors = {**inputs, **{one.target: one for one in parameters}, **tensors}
    modules = _modules_of(head, group)
    held = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    trained = {id(p): p for module in modules for p in module.parameters()}
    kind = "operator" if isinstance(group, OperatorGroup) else own_class(head).__name__
    return LayerReport(
        name=group.name,
        type=kind,
        fused=tuple(names.get(id(one), getattr(getattr(one, "site", None), "op", "")) for one in (*group.ahead, *group.members)),
        tensors=tensors,
        parameters=sum(p.numel() for p in trained.values()),
        float_bytes=_bytes(held.values()),
        stored_bytes=_stored_bytes(head, group),
        multiply_adds=None if isinstance(group, OperatorGroup) else measured.multiply_adds.get(group.name),
        **({} if isinstance(group, OperatorGroup) else past.of(group.name, came_of(held.values(), past.sizes))),
    )


def _activations(group: Group) -> list[tuple[str, ActivationQuantizer]]:
    """The quantizers of a layer's activations by its own names for them, in the order of the data."""
    found: list[tuple[str, ActivationQuantizer | None]] = []
    if isinstance(group, FusedGroup):
        found = [(INPUT, group.input), ("_inner_", group.inner), (OUTPUT, group.output)]
    elif isinstance(group, OperatorGroup):
        found = [(f"{INPUT}{position or ''}", how[0]) for position, how in group.inputs.items()]
        found += [(target, how[0]) for target, how in group.outputs.items()]
        found += [(OUTPUT, group.output)]
    elif isinstance(group, ModuleGroup):
        found = [(argument.target, quantizer) for argument, quantizer, *_ in group.inputs]
        found += [(target, how[0]) for target, how in group.outputs.items()]
    return [(target, quantizer) for target, quantizer in found if quantizer is not None]


def _of_activation(target: str, quantizer: ActivationQuantizer, measured: Measured) -> TensorReport:
    loss = measured.losses.get(quantizer.name)
    return TensorReport(
        target=target,
        **_of_spec(quantizer.spec),
        **(_of_grid(quantizer.grid()) if quantizer.ready else {}),
        signal_to_noise=None if loss is None else _number(loss.signal_to_noise),
        clipped=None if loss is None else loss.clipped,
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _of_spec(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "bits": spec.bits, "scheme": spec.scheme, "granularity": str(spec.granularity)}


def _of_grid(grid: Grid | BlockGrid | SignGrid) -> dict[str, Any]:
    """Ends, scale and zero point."""
    if isinstance(grid, SignGrid):
        return {"low": -1.0, "high": 1.0, "scale": (1.0, 1.0), "zero_point": (0, 0)}
    if isinstance(grid, Grid):
        low, high = ((end - grid.zero_point) * grid.scale for end in (grid.clip_low, grid.clip_high))
        return {"low": low, "high": high, "scale": (grid.scale,) * 2, "zero_point": (grid.zero_point,) * 2}
    return _of_blocks(grid.scale, grid.zero_point, grid.spec.qmin, grid.spec.qmax)


def _of_blocks(scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> dict[str, Any]:
    low, high = (qmin - zero) * scale, (qmax - zero) * scale
    ends = {"scale": (float(scale.min()), float(scale.max())), "zero_point": (int(zero.min()), int(zero.max()))}
    return {"low": float(low.min()), "high": float(high.max()), **ends}


def _of_parameter(one: StoredParameter, head: nn.Module) -> TensorReport:
    loss, exact = one.loss, one.exact
    zero = one.rounded == 0
    channels, dead = (_channels(where, head if one.target == WEIGHT else None) for where in (zero, exact == 0))
    zeros = one.integers.zero_point
    return TensorReport(
        target=one.target,
        **_of_spec(one.quantizer.spec),
        low=float(exact.min()),
        high=float(exact.max()),
        scale=(float(one.integers.scale.min()), float(one.integers.scale.max())),
        zero_point=(0, 0) if zeros is None else (int(zeros.min()), int(zeros.max())),
        signal_to_noise=_number(loss.signal_to_noise),
        clipped=loss.clipped,
        channels=None if channels is None else channels.numel(),
        zero_channels=None if channels is None else int(channels.sum()),
        dead_channels=None if channels is None or dead is None else int((channels & dead).sum()),
        zeros=float(zero.double().mean()),
    )


def _channels(zero: Tensor, head: nn.Module | None) -> Tensor | None:
    """Which output channels are zero throughout, bool (C,); None for a parameter without channels."""
    if zero.dim() < 2:
        return None
    if isinstance(head, TRANSPOSED):  # (in, out / groups, ..)
        zero = zero.unflatten(0, (head.groups, -1)).transpose(1, 2).flatten(0, 1)
    return zero.flatten(1).all(1)


def _stored_bytes(head: nn.Module, group: Group) -> int | None:
    """What the deployed layer holds, all buffers and float parameters."""
    if isinstance(group, OperatorGroup):
        return 0
    if not group.ready:
        return None
    with torch.inference_mode(False), torch.no_grad():
        layer = group.deploy(head)
    rest: list[Tensor] = []
    if isinstance(group, ModuleGroup):  # its other parameters stay as they are
        quantized = {id(owner_of(head, name)[0]._parameters[owner_of(head, name)[1]]) for name in group.parameters}
        rest = [tensor for tensor in (*head.parameters(), *head.buffers()) if id(tensor) not in quantized]
    elif isinstance(group, Ending) and group.activation is not None and group.clamp is None:
        rest = list(group.activation.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in (*layer.buffers(), *layer.parameters(), *rest))


# -- deployed layers --------------------------------------------------------------------------------------------------


def _deployed_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, ActivatedLayer | IntegerLayer | PartlyIntegerLayer | QuantizedModule | RoundedOperator):
            inside.append(name)
            yield name, module


def _of_deployed(name: str, module: nn.Module) -> LayerReport:
    layer = module.layer if isinstance(module, ActivatedLayer) else module
    tensors: list[TensorReport] = []
    kind, values = "operator", 0
    if isinstance(layer, IntegerLayer | PartlyIntegerLayer):
        kind, values = layer.geometry.kind, layer.weight.numel() + layer.bias.numel()
        tensors += [] if layer.x is None else [_of_rounding(INPUT, layer.x)]
        if layer.scale is not None:
            tensors.append(_of_integers(WEIGHT, layer.weight, layer.scale, layer.zero_point))
        end = module.rounds_out if isinstance(module, ActivatedLayer) else layer.y
        tensors += [] if end is None else [_of_rounding(OUTPUT, end)]
    elif isinstance(layer, QuantizedModule):
        kind = layer.type_name
        tensors += [_of_rounding(a.target, r) for a, r in zip(layer.arguments, layer.rounds_in, strict=True)]
        for parameter, keys in layer.stored.items():
            q, scale, zero = (layer._buffers.get(key) for key in keys)
            assert q is not None and scale is not None
            tensors.append(_of_integers(parameter, q, scale, zero))
            values += q.numel()
        ends = zip(layer.targets, layer.rounds_out, strict=True)
        tensors += [_of_rounding(target, end) for target, end in ends if isinstance(end, Rounding)]
    elif isinstance(layer, RoundedOperator):
        places = zip(layer.positions, layer.rounds_in, strict=True)
        tensors += [_of_rounding(f"{INPUT}{position or ''}", one) for position, one in places]
        tensors += [_of_rounding(target, one) for target, one in zip(layer.targets, layer.rounds_out, strict=True)]
        tensors += [] if layer.end is None else [_of_rounding(OUTPUT, layer.end)]
    inner = (
        layer.inner if isinstance(layer, QuantizedModule) else module.activation if isinstance(module, ActivatedLayer) else None
    )
    values += 0 if inner is None else sum(p.numel() for p in inner.parameters())
    return LayerReport(
        name=name,
        type=kind,
        fused=(),
        tensors={one.target: one for one in tensors},
        parameters=values,
        float_bytes=4 * values,
        stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*module.buffers(), *module.parameters())),
    )


def _of_rounding(target: str, end: Any) -> TensorReport:
    """An activation of a deployed layer: a Grid, or a Rounding."""
    grid = end if isinstance(end, Grid) else end.grid
    if grid is not None:
        bits = (grid.qmax - grid.qmin).bit_length()
        return TensorReport(target=target, dtype=f"uint{bits}", bits=bits, **_of_grid(grid))
    if end.sign:
        return TensorReport(target=target, dtype="int1", bits=1, **_of_grid(SignGrid()))
    bits = (end.high - end.low).bit_length()
    return TensorReport(target=target, dtype=f"uint{bits}", bits=bits, **_of_blocks(end.scale, end.zero_point, end.low, end.high))


def _of_integers(target: str, q: Tensor, scale: Tensor, zero: Tensor | None) -> TensorReport:
    value = torch.ops.lightning_quant.dequantize_weight(q, scale, zero)
    reach = max(int(q.max()), -int(q.min()) - (int(q.min()) < -1))
    channels = _channels(value == 0, None)
    return TensorReport(
        target=target,
        dtype=str(q.dtype).removeprefix("torch."),
        bits=1 + reach.bit_length(),
        low=float(value.min()),
        high=float(value.max()),
        scale=(float(scale.min()), float(scale.max())),
        zero_point=(0, 0) if zero is None else (int(zero.min()), int(zero.max())),
        channels=None if channels is None else channels.numel(),
        zero_channels=None if channels is None else int(channels.sum()),
        zeros=float((value == 0).double().mean()),
    )
