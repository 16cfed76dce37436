# SPDX-License-Identifier: Apache-2.0
"""Owns a deployed model as plain data, and the way back: a manifest and a state dict make it again from the user's own net.

The manifest is dicts, lists, strings, numbers and tensors, so that `torch.load(weights_only=True)` reads it. It says of every
deployed layer what it is; everything else (the forward, other modules, activations that are curves) is the user's class. What is
named is named as in the float net.

Operators that a forward calls as functions are known by their places in the code. Another version of Python, or an edit above the
forward, moves them; so the forward is traced again (or run on an example input), and they are found by place, else by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of, replace_module
from lightning_quant.group import own_class
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer, Stamp
from lightning_quant.intercept import SITES, Deployed, Done, RoundedOperator, Sites, disown, is_owner, own
from lightning_quant.layer_data import Data, Stamps, layer_data, made_layer, made_operator, operator_data, other_shape
from lightning_quant.masked import masks_passing
from lightning_quant.narrow import cut_alike
from lightning_quant.plan import forward_graph
from lightning_quant.prepare import restore_model, take_no_fast_path
from lightning_quant.sites import SHARED, Operator, Site
from lightning_quant.sparsity import CAME, CUTS
from lightning_quant.wrapped import QuantizedModule

Key = tuple[str, Any, int]
LAYERS = (IntegerLayer, PartlyIntegerLayer, ActivatedLayer, QuantizedModule)
# -- names of the float net, in the deployed one ----------------------------------------------------------------------


def _own_names(deployed: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the deployed model, name in the float net, module), parents first; what is inside our own layers left out."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str, name: str) -> Iterator[tuple[str, str, nn.Module]]:
        if id(module) in seen or isinstance(module, RoundedOperator):
            return
        seen.add(id(module))
        yield path, name, module
        if isinstance(module, IntegerLayer | PartlyIntegerLayer | ActivatedLayer):
            return
        if isinstance(module, QuantizedModule):
            if module.inner is not None:
                yield from walk(module.inner, f"{path}.inner".lstrip("."), name)
            return
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{key}".lstrip("."), f"{name}.{key}".lstrip("."))

    yield from walk(deployed, "", "")


def _found(model: nn.Module, name: str) -> nn.Module:
    """The module of this name in the float net, some layers of which may be deployed already."""
    module = model
    for part in name.split(".") if name else []:
        if isinstance(module, QuantizedModule) and module.inner is not None:
            module = module.inner
        child = module._modules.get(part)
        if child is None:
            raise ConfigError(
                f"this net has no module {name!r}, which the file has numbers for. "
                "Give an instance of the class that was trained."
            )
        module = child
    return module


# -- the whole model --------------------------------------------------------------------------------------------------


def manifest_of(deployed: nn.Module) -> Data:
    """What `rebuilt` needs beside the state dict.

    Raises:
        ConfigError: if `deployed` has no deployed layer, an activation that plain data cannot name, or masks of what passes.
    """
    if passing := [name for name, module in deployed.named_modules() if masks_passing(module)]:
        raise ConfigError(
            f"{', '.join(passing)} mask what passes them, which a .pt file cannot hold: it has the numbers of layers alone. "
            "Write .pt2 or .onnx, which are whole programs."
        )
    stamps = Stamps()
    layers: list[Data] = []
    idle: list[str] = []
    owners: list[Data] = []
    shared: list[str] = []
    for path, name, module in _own_names(deployed):
        if isinstance(module, IntegerLayer | PartlyIntegerLayer | ActivatedLayer | QuantizedModule):
            marks = [hook for hook in module._forward_hooks.values() if isinstance(hook, Stamp)]
            known = {"name": name, "path": path, "came": module.__dict__.get(CAME)}
            layers.append({**known, "stamp": stamps.number(marks[0] if marks else None), **layer_data(module)})
        elif type(module) is nn.Identity:
            idle.append(name)
        if is_owner(module):
            owners.append({"name": name, **_sites_data(module.__dict__[SITES], module, stamps)})
        if SHARED in module.__dict__:
            shared.append(name)
    cuts = deployed.__dict__.get(CUTS)
    if not layers and not owners and cuts is None:
        raise ConfigError(f"{type(deployed).__name__} has no deployed layer; give what convert_model returned.")
    parts = {"layers": layers, "idle": idle, "owners": owners, "shared": shared, "others": _others(deployed)}
    return {"model": own_class(deployed).__name__, **parts, "cuts": cuts}


def _others(deployed: nn.Module) -> dict[str, str]:
    """What the modules are that are the user's own, by name: the class, and for torch's the arguments that its text shows."""
    found: dict[str, str] = {}
    for _, name, module in _own_names(deployed):
        if not isinstance(module, IntegerLayer | PartlyIntegerLayer | ActivatedLayer | QuantizedModule):
            kind = own_class(module)
            shown = kind.__module__.startswith("torch.nn.") and not issubclass(kind, _DropoutNd)
            found[name] = f"{kind.__name__}({module.extra_repr()})" if shown else kind.__name__
    return found


def _check_others(net: nn.Module, wanted: Mapping[str, str]) -> None:
    """Raise a ConfigError that names the first module that is another one than in the file."""
    found = _others(net)
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{name or 'the model'!r} is {found.get(name, 'not there')} in this net and was {wanted.get(name, 'not there')} "
                "when the file was written. Make the net with the arguments that the trained one was made with."
            )


def _sites_data(sites: Sites, owner: nn.Module, stamps: Stamps) -> Data:
    acts: list[Data] = []
    for key, act in sites.acts.items():
        if isinstance(act, Done):
            acts.append({"key": key, "done": stamps.number(act.stamp), "loose": act.loose})
        else:
            assert isinstance(act, Deployed)
            held = isinstance(act.child, str)
            layer = owner._modules[act.child] if isinstance(act.child, str) else act.child
            assert isinstance(layer, RoundedOperator)
            acts.append({"key": key, "child": act.child if held else None, "rounds": operator_data(layer, stamps)})
    return {
        "acts": acts,
        "float": sorted(sites.float),
        "names": [(key, name) for key, name in sites.names.items()],
        "made_here": sites.made_here,
        "shared": sites.shared,
    }


def rebuilt(model: nn.Module, manifest: Data, state: Mapping[str, Any], *, example_input: Any = None) -> nn.Module:
    """A deployed copy of `model`, on the CPU, in eval mode; `model`, float or prepared, is left as it is.

    Args:
        model: an instance of the class that was trained, made with the same arguments; its numbers do not matter.
        manifest, state: of `manifest_of` and of `state_dict()` of the deployed model.
        example_input: what `model` is called with; needed where functions are quantized and its forward cannot be traced.

    Raises:
        ConfigError: if the net is another one than was trained.
    """
    found = own_class(model).__name__
    if found != manifest["model"]:
        raise ConfigError(f"the file was written of a {manifest['model']}, and model is a {found}.")
    net = restore_model(copy_of(model)).to("cpu").eval()
    if manifest["cuts"] is not None:
        cut_alike(net, manifest["cuts"])
        net.__dict__[CUTS] = manifest["cuts"]
    return _rebuilt(net, manifest, state, _places(net, manifest["owners"], example_input))


Places = Sequence[Mapping[Key, Site] | None]


def _rebuilt(net: nn.Module, manifest: Data, state: Mapping[str, Any], places: Places) -> nn.Module:
    """`net`, changed in place."""
    take_no_fast_path(net)
    stamps = Stamps()
    for data in manifest["layers"]:
        old = _found(net, data["name"])
        prefix = f"{data['path']}." if data["path"] else ""
        new = made_layer(data, old, data["name"], functools.partial(_found, net), state, prefix)
        if (stamp := stamps.of(data["stamp"])) is not None:
            new.register_forward_hook(stamp)
        if data.get("came") is not None:
            new.__dict__[CAME] = data["came"]
        if old is net:
            net = new
        else:
            replace_module(net, old, new)
            if isinstance(new, QuantizedModule):
                new.inner = old
        if isinstance(new, ActivatedLayer):
            _take_activation(net, new)
    for name in manifest["idle"]:
        if type(old := _found(net, name)) is not nn.Identity:
            replace_module(net, old, nn.Identity())
    for name in manifest["shared"]:
        _found(net, name).__dict__[SHARED] = True
    for data, moved in zip(manifest["owners"], places, strict=True):
        _own(_found(net, data["name"]), data, moved, stamps)
    _check_others(net, manifest["others"])
    _fill(net, state)
    return net.eval()


def _take_activation(net: nn.Module, layer: ActivatedLayer) -> None:
    """Have the activation behind a layer do nothing where the net calls it: the layer does it."""
    held, layer.activation = layer.activation, None
    assert held is not None
    held._forward_hooks.clear()
    held._forward_pre_hooks.clear()
    replace_module(net, held, nn.Identity())
    layer.activation = held


def _own(owner: nn.Module, data: Data, moved: Mapping[Key, Site] | None, stamps: Stamps) -> None:
    """Have a module catch its operators. `moved`: where they are called now; None where the file says."""
    inner = owner.inner if isinstance(owner, QuantizedModule) else owner
    assert isinstance(inner, nn.Module)
    sites = own(inner)
    names = {_key(key): name for key, name in data["names"]}
    for one in data["acts"]:
        if "done" in one:
            stamp = stamps.of(one["done"])
            assert stamp is not None
            act: Any = Done(stamp, one["loose"])
        else:
            layer = made_operator(one["rounds"], stamps)
            if one["child"] is not None:
                inner.add_module(one["child"], layer)
            act = Deployed(layer if one["child"] is None else one["child"])
        key = _key(one["key"])
        _put(sites, key, act, names.get(key, ""), moved)
    for key in map(_key, data["float"]):
        _put(sites, key, None, names.get(key, ""), moved)
    if moved is None:
        sites.made_here, sites.shared = data["made_here"], data["shared"]


def _put(sites: Sites, key: Key, act: Any, name: str, moved: Mapping[Key, Site] | None) -> None:
    site = Site(owner="", op=key[0], place=key[1], repeat=key[2]) if moved is None else moved[key]
    if act is None:
        sites.leave(site, name)
    else:
        sites.add(site, act, name)


def _key(data: Any) -> Key:
    op, place, repeat = data
    return op, tuple(tuple(frame) for frame in place), repeat


# -- operators, found again -------------------------------------------------------------------------------------------


def _places(net: nn.Module, owners: Sequence[Data], example_input: Any) -> list[Mapping[Key, Site] | None]:
    """For each owner: None if its operators are called where the file says, else where they are called now."""
    if not owners:
        return []
    operators = _operators(net, owners, example_input)
    now = {(operator.site.owner, operator.site.op, operator.site.place, operator.site.repeat) for operator in operators.values()}
    found: list[Mapping[Key, Site] | None] = []
    for owner in owners:
        keys = [_key(one["key"]) for one in owner["acts"]]
        if all((owner["name"], *key) in now for key in keys):
            found.append(None)
            continue
        ours = {name: one.site for name, one in operators.items() if one.site.owner == owner["name"]}
        names = {name: _key(key) for key, name in owner["names"]}
        if {name: site.op for name, site in ours.items()} != {name: key[0] for name, key in names.items()}:
            other = sorted(set(ours) ^ set(names))
            raise ConfigError(
                f"the forward of {owner['name'] or 'the model'!r} calls other operators than when the file was written: "
                f"{', '.join(other)}. Give the class that was trained, or an "
                "example_input of the kind that the plan was made with."
            )
        found.append({key: ours[name] for name, key in names.items()})
    return found


def _operators(net: nn.Module, owners: Sequence[Data], example_input: Any) -> dict[str, Operator]:
    """What the net's forwards call as functions, by name."""
    scope = ""
    graph, why = forward_graph(net, example_input)
    if graph is None:  # a LightningModule's own forward may be none
        scope = _common([owner["name"] for owner in owners])
        inside = forward_graph(_found(net, scope), None)[0] if scope else None
        if inside is None:
            raise ConfigError(
                f"the file has operators that {owners[0]['name'] or 'the model'!r} calls as functions, and {why}. Give "
                "load_deployed an example_input, by which they are found."
            )
        graph = inside
    prefix = f"{scope}." if scope else ""
    found: dict[str, Operator] = {}
    for name, operator in graph.operators.items():
        site = operator.site
        operator.site = dataclasses.replace(site, owner=f"{prefix}{site.owner}".rstrip("."))
        found[f"{prefix}{name}"] = operator
    return found


def _common(names: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    parts = [name.split(".") if name else [] for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _fill(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Load all numbers, in the dtypes of the file."""
    for key, tensor in net.state_dict(keep_vars=True).items():
        given = state.get(key)
        if isinstance(tensor, Tensor) and isinstance(given, Tensor):
            if tensor.shape != given.shape:
                raise ConfigError(other_shape(key, tensor, given))
            if tensor.dtype != given.dtype:
                tensor.data = tensor.data.to(given.dtype)
    try:
        net.load_state_dict(dict(state), strict=True)
    except Exception as error:
        raise ConfigError(
            f"this net does not take the numbers of the file; it is another one than was trained: {error}"
        ) from error


def rebuilt_from(deployed: nn.Module, manifest: Data, state: Mapping[str, Any]) -> nn.Module:
    """As `rebuilt`, with the forward of the deployed model itself: what a file that was just written says of it."""
    return _rebuilt(_bare(deployed), manifest, state, [None] * len(manifest["owners"]))


def _bare(deployed: nn.Module) -> nn.Module:
    """A copy of a deployed model that `_rebuilt` takes for the float net: nothing is caught, wrapped or left out."""
    net = copy_of(deployed).to("cpu")
    for _, _, module in list(_own_names(net)):
        module.__dict__.pop(SHARED, None)
        if is_owner(module):
            for name in [name for name, child in module._modules.items() if isinstance(child, RoundedOperator)]:
                del module._modules[name]
            disown(module)
        if isinstance(module, ActivatedLayer) and module.origin and module.activation is not None:
            held, module.activation = module.activation, None
            replace_module(net, _found(net, module.origin), held)
    for _, _, module in reversed(list(_own_names(net))):
        if isinstance(module, QuantizedModule):
            assert module.inner is not None
            inner, module.inner = module.inner, None
            net = inner if module is net else net
            replace_module(net, module, inner)
    return net
