# SPDX-License-Identifier: Apache-2.0
"""Owns one deployed layer as plain data (dicts, lists, strings, numbers, tensors), and the layer that the data describes.

Each kind has a way there and a way back. Parameters stand in the state dict; what was the user's (the forward of a module, an
activation that is a curve) is taken from the user's net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.geometry import Geometry
from lightning_quant.group import own_class
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer, Rounding, Stamp
from lightning_quant.intercept import RoundedOperator
from lightning_quant.patterns import is_activation_name
from lightning_quant.quantizers import Grid
from lightning_quant.sites import Operator, Site, Slot, name_of, operator_type
from lightning_quant.targets import Arguments, owner_of
from lightning_quant.wrapped import QuantizedModule

Data = dict[str, Any]
Find = Callable[[str], nn.Module]  # a module of the user's net by its name
# Where activations are looked up that a manifest names: it can call nothing else.
_FUNCTIONS: dict[str, Any] = {
    "torch.nn.functional": torch.nn.functional,
    "torch": torch,
    "torch.Tensor": Tensor,
    "torch.special": torch.special,
}

# -- parts ------------------------------------------------------------------------------------------------------------


def _grid_data(grid: Grid | None) -> list[Any] | None:
    return None if grid is None else list(dataclasses.astuple(grid))


def _grid(data: Sequence[Any] | None) -> Grid | None:
    names = [field.name for field in dataclasses.fields(Grid)]
    return None if data is None else Grid(**dict(zip(names, data, strict=True)))


def _rounding_data(one: nn.Module | None) -> Data | None:
    if not isinstance(one, Rounding):
        return None  # nothing, or an `nn.Identity`
    data: Data = {"sign": one.sign, "grid": _grid_data(one.grid), "ends": [one.low, one.high]}
    blocks = {} if one.sign or one.grid is not None else {"scale": one.scale, "zero_point": one.zero_point}
    return data | {name: tensor.detach().clone() for name, tensor in blocks.items()}


def _rounding(data: Data | None) -> Rounding | None:
    if data is None:
        return None
    one = Rounding.__new__(Rounding)
    nn.Module.__init__(one)
    one.sign, one.grid = data["sign"], _grid(data["grid"])
    one.low, one.high = data["ends"]
    for name in ("scale", "zero_point"):
        if name in data:
            one.register_buffer(name, data[name].clone())
    return one


def _tensors(layer: nn.Module) -> list[tuple[str, bool]]:
    """(name, whether there is one) of a layer's own buffers."""
    return [(name, tensor is not None) for name, tensor in layer._buffers.items()]


def _register(layer: nn.Module, names: Sequence[tuple[str, bool]], state: Mapping[str, Tensor], prefix: str) -> None:
    for name, is_there in names:
        layer.register_buffer(name, state[f"{prefix}{name}"].clone() if is_there else None)


def _call_data(value: Any) -> Any:
    """The arguments of a recorded call as plain data, tensors aside."""
    if isinstance(value, Slot):
        return {"slot": value.index}
    if isinstance(value, Mapping):
        return {"dict": {key: _call_data(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_call_data(item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"an argument {value!r} of an activation is no plain data; write a .pt2 file instead.")


def _call(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    ((kind, value),) = data.items()
    if kind == "slot":
        return Slot(value)
    if kind == "dict":
        return {key: _call(item) for key, item in value.items()}
    return (tuple if kind == "tuple" else list)(_call(item) for item in value)


def _function_data(operator: Operator) -> Data:
    """An activation that was called as a function."""
    name = getattr(operator.function, "__name__", "")
    for place, namespace in _FUNCTIONS.items():
        if getattr(namespace, name, None) is operator.function:
            return {"op": operator.site.op, "function": [place, name], "call": _call_data(operator.call), "count": operator.count}
    raise ConfigError(f"the activation {operator.function!r} is no function of torch's; write a .pt2 file instead.")


def _function(data: Data) -> Operator:
    place, name = data["function"]
    function = getattr(_FUNCTIONS.get(place), name, None)
    if function is None or name_of(function) != data["op"] or not is_activation_name(data["op"]):
        raise ConfigError(
            f"the file names an activation {place}.{name}, which torch does not have or nobody registered: call register_fusion "
            "as the program did that trained the model."
        )
    args, kwargs = _call(data["call"])
    operator = operator_type(data["op"])(Site(owner="", op=data["op"], place=(), repeat=0), function, args, kwargs)
    operator.call, operator.count = (args, kwargs), data["count"]
    return operator


# -- layers: a way there and a way back each ----------------------------------------------------------------------------


class Stamps:
    """Numbers for what layers put on their results."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.made: dict[int, Stamp] = {}

    def number(self, stamp: Stamp | None) -> int | None:
        """The number of a stamp."""
        return None if stamp is None else self.numbers.setdefault(id(stamp), len(self.numbers))

    def of(self, number: int | None) -> Stamp | None:
        """The stamp of a number."""
        return None if number is None else self.made.setdefault(number, Stamp())


def layer_data(layer: nn.Module) -> Data:
    """A deployed layer's settings; its tensors stand in the state dict."""
    data: Data = {"tensors": _tensors(layer)}
    if isinstance(layer, IntegerLayer):
        data |= {"kind": "integer", "x": _grid_data(layer.x), "y": _grid_data(layer.y)}
    elif isinstance(layer, PartlyIntegerLayer):
        data |= {"kind": "partly", "x": _rounding_data(layer.x), "y": _rounding_data(layer.y)}
        data["quantized"] = layer.weight_quantized
    elif isinstance(layer, ActivatedLayer):
        function = _function_data(layer.activation) if isinstance(layer.activation, Operator) else None
        data |= {"kind": "activated", "layer": layer_data(layer.layer), "y": _rounding_data(layer.rounds_out)}
        return data | {"activation": layer.origin, "function": function}
    else:
        assert isinstance(layer, QuantizedModule)
        data |= {"kind": "module", "type": layer.type_name, "arguments": [one.target for one in layer.arguments]}
        data |= {"targets": layer.targets, "first": layer.first, "stored": dict(layer.stored)}
        data |= {"x": list(map(_rounding_data, layer.rounds_in)), "y": list(map(_rounding_data, layer.rounds_out))}
        return data | {"dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in layer.parameter_dtypes.items()}}
    return data | {"geometry": dataclasses.asdict(layer.geometry), "rectify": layer.rectify}


def made_layer(data: Data, old: nn.Module, name: str, find: Find, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The deployed layer of this description in the place of `old`, which has `name` in the net."""
    kinds: dict[str, type[nn.Module]] = {
        "integer": IntegerLayer,
        "partly": PartlyIntegerLayer,
        "activated": ActivatedLayer,
        "module": QuantizedModule,
    }
    cls = kinds[data["kind"]]
    layer: Any = nn.Module.__new__(cls)
    nn.Module.__init__(layer)
    _register(layer, data["tensors"], state, prefix)
    if data["kind"] == "activated":
        layer.layer = made_layer(data["layer"], old, name, find, state, f"{prefix}layer.")
        layer.rounds_out, layer.origin = _rounding(data["y"]), data["activation"]
        layer.activation = _function(data["function"]) if data["function"] else find(data["activation"])
    elif data["kind"] == "module":
        _wrap(layer, data, old, name)
    else:
        stored: Data = {key: tuple(v) if isinstance(v, list) else v for key, v in data["geometry"].items()}
        geometry = Geometry(**stored)
        _check_layer(old, name, geometry, layer.weight)
        layer.geometry, layer.rectify = geometry, None if data["rectify"] is None else tuple(data["rectify"])
        if isinstance(layer, IntegerLayer):
            x = _grid(data["x"])
            assert x is not None
            layer.x, layer.y = x, _grid(data["y"])
            layer.wide = layer._is_wide()
        else:
            layer.x, layer.y, layer.weight_quantized = _rounding(data["x"]), _rounding(data["y"]), data["quantized"]
    made: nn.Module = layer
    return made


def _wrap(layer: QuantizedModule, data: Data, old: nn.Module, name: str) -> None:
    """Fill in a module of any type."""
    if own_class(old).__name__ != data["type"]:
        raise ConfigError(
            f"{name!r} is a {own_class(old).__name__} in this net and was a {data['type']} when the file was written."
        )
    known = Arguments(own_class(old))
    arguments = [known.find(target) for target in data["arguments"]]
    if None in arguments:
        raise ConfigError(f"{name!r}: the forward of {data['type']} takes other arguments than when the file was written.")
    layer.type_name, layer.targets, layer.first = data["type"], list(data["targets"]), list(data["first"])
    layer.arguments = [argument for argument in arguments if argument is not None]
    layer.rounds_in = nn.ModuleList(one for one in map(_rounding, data["x"]) if one is not None)
    layer.rounds_out = nn.ModuleList(_rounding(one) or nn.Identity() for one in data["y"])
    layer.parameter_dtypes = {key: getattr(torch, dtype) for key, dtype in data["dtypes"].items()}
    layer.stored = {key: tuple(names) for key, names in data["stored"].items()}
    for key, (stored, *_) in layer.stored.items():
        owner, last = owner_of(old, key)
        have = owner._parameters.get(last)
        if have is not None and have.shape != layer._buffers[stored].shape:  # type: ignore[union-attr]
            raise ConfigError(other_shape(f"{name}.{key}", have, layer._buffers[stored]))
    layer.inner = None
    layer.__dict__["_forward_of"] = old
    layer.take_over()


def _check_layer(old: nn.Module, name: str, geometry: Geometry, weight: Tensor) -> None:
    """Raise a ConfigError unless the float net has the layer there that was deployed."""
    if isinstance(old, IntegerLayer | PartlyIntegerLayer | ActivatedLayer):  # the check of what was just written
        return
    try:
        here = Geometry.of(old)
    except AssertionError:
        raise ConfigError(
            f"{name!r} is a {type(old).__name__} in this net, where the file has a {geometry.kind} layer."
        ) from None
    if here != geometry:
        raise ConfigError(f"{name!r} is {here} in this net and was {geometry} when the file was written.")
    own = old._parameters.get("weight")
    if own is not None and (own.shape != weight.shape if geometry.kind != "scale" else len(own) != len(weight)):
        raise ConfigError(other_shape(f"{name}.weight", own, weight))


def other_shape(name: str, have: Tensor, wanted: Tensor | None) -> str:
    """What to say where a net's tensor is not as large as the file's."""
    return (
        f"{name!r} has shape {tuple(have.shape)} in this net and {() if wanted is None else tuple(wanted.shape)} in the file. "
        "Make the net with the arguments that the trained one was made with."
    )


def operator_data(one: RoundedOperator, stamps: Stamps) -> Data:
    """The roundings around an operator."""
    return {
        "positions": one.positions,
        "targets": one.targets,
        "x": list(map(_rounding_data, one.rounds_in)),
        "y": list(map(_rounding_data, one.rounds_out)),
        "clamp": one.clamp,
        "end": _rounding_data(one.end),
        "stamp": stamps.number(one.stamp),
    }


def made_operator(data: Data, stamps: Stamps) -> RoundedOperator:
    """The operator of this description."""
    one = RoundedOperator.__new__(RoundedOperator)
    nn.Module.__init__(one)
    one.positions, one.targets = list(data["positions"]), list(data["targets"])
    one.rounds_in = nn.ModuleList(r for r in map(_rounding, data["x"]) if r is not None)
    one.rounds_out = nn.ModuleList(r for r in map(_rounding, data["y"]) if r is not None)
    one.clamp = None if data["clamp"] is None else tuple(data["clamp"])
    one.end, one.stamp = _rounding(data["end"]), stamps.of(data["stamp"])
    return one
