# SPDX-License-Identifier: Apache-2.0
"""Owns every change to a user's model: `prepare_model` attaches a plan in place, `restore_model` undoes it completely."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_quant.blocks import BlockQuantizer
from lightning_quant.config import ConfigError, TensorSpec
from lightning_quant.fusion import Ending, FusedGroup, install
from lightning_quant.group import Group, Share, group_of, is_group_head, join, leave
from lightning_quant.intercept import (
    End,
    Head,
    OperatorGroup,
    disown,
    is_owner,
    is_prepared,
    operator_groups,
    own,
    prepared_elsewhere,
)
from lightning_quant.keys import INPUT, OUTPUT, WEIGHT, kind_of_observer
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.learned import ACTIVATION_METHODS
from lightning_quant.methods import weight_quantizer_kind
from lightning_quant.observers import OBSERVERS, HistogramQuantizer
from lightning_quant.patterns import BatchNorm, clamp_of
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.record import moved
from lightning_quant.schedule import Phase
from lightning_quant.settings import kept_bases
from lightning_quant.sites import SHARED, Operator
from lightning_quant.targets import Arguments, is_activation, is_input, owner_of
from lightning_quant.weights import WeightQuantizer
from lightning_quant.wrapped import ModuleGroup, WrappedModule


def prepare_model(model: nn.Module, plan: Plan, *, memory: str = "exact", simulate_bias: bool = False) -> nn.Module:
    """Attach `plan` to `model`, in place, and return it.

    `memory`: "exact", or "lean" for less memory and more time in training (see `checked_memory`). `simulate_bias`: training
    rounds biases to the int32 grid that they are deployed on, s_x s_w (those that batch norm moves, once it is frozen); eval
    always does. It matters at few bits, where that grid is coarse, and costs a pass over each weight. Afterwards `model.train()`
    quantizes and moves the ranges, `model.eval()` runs the folded integer layers on frozen ranges (float until every range of
    a layer is known; simulated where gradients are asked for). Parameters, buffers, their names and order, hooks and
    `state_dict()` are as before: classes change, nothing is replaced or renamed.

    Raises:
        ConfigError: if the model is prepared already or lacks a module of the plan, or for an option; it is then unchanged.
    """
    lean, simulate_bias = checked_memory(memory) == "lean", checked_switch("simulate_bias", simulate_bias)
    modules = _modules_of(model, plan)
    quantizers = _make_quantizers(plan, modules)
    for quantizer in quantizers.values():
        quantizer.lean = lean
    sources = {f"{layer.name}.{target}": p.source for layer in plan.layers for target, p in layer.targets.items()}
    tied: Tied = {}
    groups = [(_make_group(layer, quantizers, sources, modules, tied), modules[layer.name]) for layer in plan.layers]
    places = {layer.name: place for place, layer in enumerate(sorted(plan.layers, key=lambda layer: layer.order))}
    for (group, _), layer in zip(groups, plan.layers, strict=True):
        group.shares, group.place, group.lean = _shares(group, layer), places[layer.name], lean
        group.decided = layer.decisions()
        if isinstance(group, FusedGroup):
            group.simulate_bias = simulate_bias
        if isinstance(group, Ending):  # a hook may hand on another tensor, too
            group.loose = layer.loose or any(modules[name]._forward_hooks for name in (layer.name, *layer.fused_with)[:-1])
            through = group.activation.site.through if isinstance(group.activation, Operator) else ""
            group.stands_for = model.get_submodule(through) if through else None
    try:
        for group, head in groups:  # operators first: a module may own some and be quantized itself
            _catch(group, head, model)
        _leave(plan, model)
        for group, head in groups:
            if isinstance(group, Ending):
                install(group, None if isinstance(head, Operator) else head)
            else:
                join(group, head, WrappedModule)
    except BaseException:
        restore_model(model)
        raise
    take_no_fast_path(model)
    return model


def take_no_fast_path(model: nn.Module) -> None:
    """Have torch's encoders call their layers, until `restore_model`."""
    for module in model.modules():
        for kind, (switch, off) in _FAST_PATHS.items():
            if isinstance(module, kind) and switch in module.__dict__:
                module.__dict__[_SAVED + switch] = module.__dict__[switch]
                module.__dict__[switch] = off


def checked_memory(memory: Any) -> str:
    """`memory` if it is one of the two ways to keep what gradients need.

    "exact" keeps the tensors before rounding. "lean" keeps a byte a value in their place (methods with learned scales keep the
    tensor), and of rounded weights the scales, from which backward rounds again. Both give the same numbers; lean takes longer.
    """
    if memory not in ("exact", "lean"):
        raise ConfigError(f"memory: {memory!r} is not one of exact, lean.")
    return str(memory)


def checked_switch(name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is not true or false.")
    return value


def _modules_of(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules of `model` and the operators of `plan` by name; a ConfigError if the plan is not for this model."""
    if is_prepared(model):
        raise ConfigError(f"{type(model).__name__} is already prepared; call restore_model(model) first.")
    if (name := prepared_elsewhere(model)) is not None:
        raise ConfigError(
            f"{name!r} of {type(model).__name__} is part of another prepared model, too; give each a module of its own, or call "
            "restore_model on the other one first."
        )
    modules = {**plan.operators, **dict(model.named_modules())}
    missing = [name for layer in plan.layers for name in (layer.name, *layer.fused_with) if name not in modules]
    sites = [modules[name] for layer in plan.layers for name in (layer.name, *layer.fused_with) if name not in missing]
    needed = [name for one in sites if isinstance(one, Operator) for name in (one.site.owner, one.site.through)]
    missing += [name for name in dict.fromkeys(needed) if name and name not in modules]
    if missing:
        raise ConfigError(
            f"the plan names {', '.join(map(repr, missing))}, which {type(model).__name__} lacks; make the plan anew."
        )
    other = [layer for layer in plan.layers if not _is_of(modules[layer.name], layer)]
    if other:
        raise ConfigError(
            f"the plan has a {other[0].type} called {other[0].name!r}, which is a {type(modules[other[0].name]).__name__} here; "
            "make the plan anew."
        )
    return modules


def _catch(group: Group, head: nn.Module, model: nn.Module) -> None:
    """Have the operators of a group caught where the forward of their owner calls them."""
    if isinstance(head, Operator):
        assert isinstance(group, OperatorGroup)
        own(model.get_submodule(head.site.owner)).add(head.site, Head(group))
    if isinstance(group, Ending) and isinstance(group.activation, Operator):
        site = group.activation.site
        own(model.get_submodule(site.owner)).add(site, End(group, group.activation))


def _leave(plan: Plan, model: nn.Module) -> None:
    """Have owners know the operators that stay as they are, and shared activations that they stand for functions."""
    for name, operator in plan.operators.items():
        if is_owner(owner := model.get_submodule(operator.site.owner)):
            own(owner).leave(operator.site, name)
        if operator.site.through:
            model.get_submodule(operator.site.through).__dict__[SHARED] = True


def _is_of(module: nn.Module, layer: LayerPlan) -> bool:
    """Whether a layer of a plan can be this module: of its type, with its parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    wanted = {name for name in layer.targets if not is_activation(name)}
    return any(cls.__name__ == layer.type for cls in kept_bases(type(module))) and wanted <= parameters


# torch's fused encoder kernel reads the weights of linear1 and linear2 itself and would pass our layers by; an encoder with a
# padding mask hands nested tensors on, for that kernel alone. They ask these attributes first: (name, what turns it off). The
# copy that is deployed needs the same.
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_SAVED = "_lightning_quant_"
LEARNED = "_lightning_quant_learned"  # in the `__dict__` of a model: what is learned beside it that belongs to no layer


class Learned(dict[str, nn.Parameter]):
    """Such parameters by name: 'layer1._output_->block1.weight'. A copy of the model has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Learned:
        return Learned()


def _make_quantizers(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, ActivationQuantizer]:
    """Every quantizer that is not shared, by the name of its target: 'conv1._output_'."""
    quantizers: dict[str, ActivationQuantizer] = {}
    for layer in plan.layers:
        clamp = None if layer.activation is None else clamp_of(modules[layer.activation])
        if layer.inner is not None:
            name = f"{layer.name}.{layer.inner.target}"
            quantizers[name] = _quantizer_kind(layer.inner.spec)(layer.inner.spec, name)
        for target, decided in layer.targets.items():
            if is_activation(target) and decided.active and decided.source is None:
                name, rectified = f"{layer.name}.{target}", not is_input(target) and clamp is not None
                floor, cap = clamp if rectified and clamp is not None else (0.0, math.inf)
                kind = _quantizer_kind(decided.spec)
                quantizers[name] = kind(decided.spec, name, rectified=rectified, cap=cap, floor=floor)
    return quantizers


def _quantizer_kind(spec: TensorSpec) -> type[ActivationQuantizer]:
    if spec.method in ACTIVATION_METHODS:
        return ACTIVATION_METHODS[spec.method]
    if spec.granularity != "per_tensor":
        return BlockQuantizer
    return HistogramQuantizer if kind_of_observer(spec.observer) in OBSERVERS else ActivationQuantizer


def _make_group(
    layer: LayerPlan,
    quantizers: Mapping[str, ActivationQuantizer],
    sources: Mapping[str, str | None],
    modules: Mapping[str, nn.Module],
    tied: Tied,
) -> Group:
    targets = {name: target for name, target in layer.targets.items() if target.active}

    def shared(name: str) -> tuple[ActivationQuantizer, bool, bool]:
        """(quantizer, whether this layer moves its range, whether the tensor arrives unrounded)."""
        own = origin = f"{layer.name}.{name}"
        while (further := sources[origin]) is not None:
            origin = further
        source = sources[own]
        arrives_rounded = source is not None and (not is_input(name) or f".{OUTPUT}" in source)
        return quantizers[origin], source is None, not arrives_rounded

    module = modules[layer.name]
    own = {name: target.spec for name, target in targets.items() if not is_activation(name)}
    parameters = {name: _weight_quantizer(layer.name, module, name, spec, tied) for name, spec in own.items()}
    activation = None if layer.activation is None else modules[layer.activation]
    if layer.operator:
        arguments = Arguments(type(module))
        places = {t: argument.position or 0 for t in targets if is_input(t) and (argument := arguments.find(t)) is not None}
        return OperatorGroup(
            layer.name,
            inputs={position: shared(target) for target, position in places.items()},
            outputs={t: shared(t) for t in targets if t.startswith(OUTPUT) and activation is None},
            activation=activation,
            output=quantizers[f"{layer.name}.{OUTPUT}"] if OUTPUT in targets and activation is not None else None,
        )
    if not layer.folds:
        arguments = Arguments(type(module))
        found = [(arguments.find(name), shared(name)) for name in targets if is_input(name)]
        return ModuleGroup(
            layer.name,
            inputs=[(argument, *how) for argument, how in found if argument is not None],
            parameters=parameters,
            outputs={name: shared(name) for name in targets if is_activation(name) and not is_input(name)},
        )
    given = shared(INPUT) if INPUT in targets else (None, True, True)
    return FusedGroup(
        layer.name,
        norm_before=None if layer.norm_before is None else modules[layer.norm_before],
        norm=None if layer.batch_norm is None else modules[layer.batch_norm],
        activation=activation,
        input=given[0],
        input_owned=given[1],
        input_applied=given[2],
        weight=parameters.get(WEIGHT),
        bias=parameters.get("bias"),
        inner=None if layer.inner is None else quantizers[f"{layer.name}.{layer.inner.target}"],
        output=quantizers[f"{layer.name}.{OUTPUT}"] if OUTPUT in targets else None,
    )


# What learns a grid, by its parameter and what is decided for it: layers that share the parameter share the grid.
Tied = dict[tuple[int, TensorSpec], WeightQuantizer]


def _weight_quantizer(layer: str, module: nn.Module, name: str, spec: TensorSpec, tied: Tied) -> WeightQuantizer:
    owner, own_name = owner_of(module, name)
    parameter = owner._parameters[own_name]
    assert parameter is not None
    made = weight_quantizer_kind(spec)(spec, f"{layer}.{name}", parameter)
    return tied.setdefault((id(parameter), spec), made) if made.learned else made


def _shares(group: Group, layer: LayerPlan) -> dict[Any, Share]:
    """The inputs of a group whose ranges other layers move, by position."""
    if isinstance(group, FusedGroup):
        inputs = {0: (group.input, group.input_owned)}
    elif isinstance(group, OperatorGroup):
        inputs = {position: (how[0], how[1]) for position, how in group.inputs.items()}
    else:
        assert isinstance(group, ModuleGroup)
        inputs = {index: (quantizer, owned) for index, (_, quantizer, owned, _) in enumerate(group.inputs)}
    found: dict[Any, Share] = {}
    for key, (quantizer, owned) in inputs.items():
        if quantizer is not None and not owned:
            maker = quantizer.name[: quantizer.name.rindex("._")]
            if layer.calls and maker != layer.name:
                found[key] = Share(quantizer, layer.calls)
    return found


def restore_model(model: nn.Module) -> nn.Module:
    """Undo `prepare_model`: every module gets its own class back and quantizers are gone; returns `model`, float again.

    Weights and batch-norm statistics stay as training left them. A model that is not prepared is returned as it is.
    """
    model.__dict__.pop(LEARNED, None)
    for module in model.modules():
        leave(module)
        disown(module)
        module.__dict__.pop(SHARED, None)
        for switch, _ in _FAST_PATHS.values():
            if _SAVED + switch in module.__dict__:
                module.__dict__[switch] = module.__dict__.pop(_SAVED + switch)
    return model


def members_of(model: nn.Module) -> dict[str, nn.Module]:
    """The members of a prepared model's layers, by name."""
    return {name: module for name, module in model.named_modules() if group_of(module) is not None}


def relink(model: nn.Module, members: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The members as they are now: a batch norm that was exchanged for another takes over its role.

    Lightning puts SyncBatchNorm in the place of batch norms before a fit and something like the batch norm back after it. Both
    are new modules around the same parameters; left so, what is folded into the layer before would be applied again.

    Args:
        model: prepared.
        members: `members_of` this model before.
    """
    modules, found = dict(model.named_modules()), dict(members)
    for name, old in members.items():
        new, group = modules.get(name, old), group_of(old)
        if new is not old and group is not None and group_of(new) is None and isinstance(new, BatchNorm):
            group.exchange(old, new)
            found[name] = new
    return found


def prepared_groups(model: nn.Module) -> dict[str, tuple[nn.Module, Group]]:
    """(head, group) by the head's name, in the order of the model; an operator's head is its owner. Empty if not prepared."""
    found: dict[str, tuple[nn.Module, Group]] = {}
    for name, module in model.named_modules():
        group = group_of(module)
        if group is not None and is_group_head(module):
            found[name] = (module, group)
        found.update({one.name: (module, one) for one in operator_groups(module)})
    return found


def decisions(model: nn.Module) -> dict[str, str]:
    """What a prepared model's plan has decided, a text for each layer and target; equal texts are prepared alike."""
    return {name: text for _, group in prepared_groups(model).values() for name, text in group.decided.items()}


def apply_phase(model: nn.Module, phase: Phase, layers: int | None = None) -> None:
    """Set what the quantizers and batch norms of a prepared model do from the next forward on.

    `layers`: how many layers, in the order of the data, are quantized where the phase has it; None for all.
    """
    groups = [group for _, group in prepared_groups(model).values()]
    waiting = replace(phase, quantize=False)
    for group in groups:
        group.phase = phase if layers is None or group.place < layers else waiting
    partly = not all(group.rounds_all for group in groups)
    for group in groups:
        group.partly = partly


def rounds_all(model: nn.Module) -> bool:
    """Whether the phase of a prepared model has everything rounded that ever is."""
    return not any(group.partly for _, group in prepared_groups(model).values())


def drop_deployed_layers(model: nn.Module) -> None:
    """Have the next eval forward fold the parameters as they are then; for changes that neither train() nor eval() sees."""
    for _, group in prepared_groups(model).values():
        group.deployed = None


@contextlib.contextmanager
def simulated(model: nn.Module) -> Iterator[None]:
    """Within this context eval mode simulates in float, batch norm unfolded, instead of running integers."""
    groups = [group for _, group in prepared_groups(model).values()]
    before = [group.simulate for group in groups]
    for group in groups:
        group.simulate = True
    try:
        yield
    finally:
        for group, flag in zip(groups, before, strict=True):
            group.simulate = flag


def quantizers_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of a prepared model by target name ('conv1._output_'), each once however many layers share it."""
    return {quantizer.name: quantizer for _, group in prepared_groups(model).values() for quantizer in group.quantizers}


def _stateful(model: nn.Module) -> dict[str, ActivationQuantizer | WeightQuantizer]:
    """Whatever has a state of its own, by target name: activations, and parameters whose grid is more than their values."""
    groups = [group for _, group in prepared_groups(model).values()]
    weights = {quantizer.name: quantizer for group in groups for quantizer in group.parameter_quantizers}
    return {**quantizers_of(model), **{name: quantizer for name, quantizer in weights.items() if quantizer.state_dict()}}


def learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is learned beside a prepared model's own parameters: 'conv1.weight.scale' -> a Parameter of float32.

    They are no part of the model (`parameters()` does not have them), so an optimizer of yours must be given them:
    `SGD([*model.parameters(), *learned_parameters(model).values()], ...)`. With a Trainer the callback sees to that.
    """
    found = _stateful(model).items()
    scales = {f"{name}.{key}": parameter for name, quantizer in found for key, parameter in quantizer.learned.items()}
    return {**scales, **model.__dict__.get(LEARNED, {})}


def give_to_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], names: Container[str] | None = None) -> None:
    """Append what a prepared model learns to parameter groups that optimizers have, each to one with its layer's parameters.

    Of groups with the same learning rate one without weight decay is taken, but for clipping levels (PACT), which are to decay.
    No group is added: schedulers know how many there are. Called twice, it changes nothing. `names`: of these numbers only.
    """
    modules = dict(model.named_modules())
    for name, parameter in learned_parameters(model).items():
        there = any(parameter is other for one in optimizers for group in one.param_groups for other in group["params"])
        if there or (names is not None and name not in names):
            continue
        group = _group_for(name, modules, optimizers)
        if group is None:
            raise ConfigError(
                f"{name} is to be learned, but no optimizer has a parameter group; method 'qat' learns nothing, nor does "
                "distillation between tensors of equal shapes."
            )
        group["params"].append(parameter)


def take_from_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Undo `give_to_optimizers`; what the optimizers kept for these parameters goes, too."""
    learned = {id(parameter): parameter for parameter in learned_parameters(model).values()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in learned]
        for parameter in learned.values():
            optimizer.state.pop(parameter, None)


def _group_for(name: str, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, Any] | None:
    """The parameter group that a learned number joins: that of its layer, else of what is around it, else the first."""
    layer = name
    while True:
        parameters = {id(parameter) for parameter in modules[layer].parameters()} if layer in modules else set()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(id(parameter) in parameters for parameter in group["params"]):
                    even = [g for g in optimizer.param_groups if g.get("lr") == group.get("lr") and not g.get("weight_decay")]
                    return even[0] if even and not name.endswith(".alpha") else group
        if not layer:
            return next((group for optimizer in optimizers for group in optimizer.param_groups), None)
        layer = layer.rpartition(".")[0]


def quantizer_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every range and learned scale of a prepared model by target name, as plain numbers or tensors on the host."""
    return {name: quantizer.state_dict() for name, quantizer in _stateful(model).items()}


def is_complete(state: Mapping[str, Any]) -> bool:
    """Whether a state saved by `quantizer_state` has a range for everything, so that the model can be converted."""
    return all(value is not None for one in state.values() for value in one.values())


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take over ranges saved by `quantizer_state`.

    Raises:
        ConfigError: if names, granularities or observers differ from the model's; nothing is loaded then.
    """
    own = _stateful(model)
    if set(own) != set(state):
        lacking, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        raise ConfigError(
            f"the saved quantizers are of another config_list: missing {lacking}, unexpected {extra}. Use the config_list of "
            "that run, or load only its weights and start a new fit."
        )
    differ = [name for name, quantizer in own.items() if not quantizer.accepts(state[name])]
    if differ:
        raise ConfigError(
            f"the saved ranges of {', '.join(differ)} have another granularity, observer or method. Use the config_list of that "
            "run, or load only its weights and start a new fit."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    drop_deployed_layers(model)
    for name, quantizer in own.items():
        quantizer.load_state_dict(moved(state[name], device))
