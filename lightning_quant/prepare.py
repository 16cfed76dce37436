# SPDX-License-Identifier: Apache-2.0
"""Owns every change to a user's model: `prepare_model` attaches a plan in place, `restore_model` undoes it completely."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_quant.config import INPUT, OUTPUT, WEIGHT, ConfigError
from lightning_quant.fusion import FusedGroup, activation_cap, group_of, install, is_group_head, uninstall
from lightning_quant.plan import LayerPlan, Plan
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.schedule import Phase


def prepare_model(model: nn.Module, plan: Plan) -> nn.Module:
    """Attach `plan` to `model`, in place, and return it.

    Afterwards `model.train()` quantizes and moves the ranges, `model.eval()` runs the folded integer layers on frozen
    ranges (float until every range of a layer is known; simulated where gradients are asked for). Parameters, buffers,
    their names and order, hooks and `state_dict()` are as before: classes change, nothing is replaced or renamed.

    Raises:
        ConfigError: if the model is prepared already or lacks a module of the plan; the model is then unchanged.
    """
    if any(is_group_head(module) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} is already prepared; call restore_model(model) first.")
    modules = dict(model.named_modules())
    missing = [name for layer in plan.layers for name in (layer.name, *layer.members) if name not in modules]
    if missing:
        raise ConfigError(
            f"the plan names {', '.join(map(repr, missing))}, which {type(model).__name__} lacks; make the plan anew."
        )
    quantizers = _make_quantizers(plan, modules)
    groups = [(_make_group(layer, quantizers, modules), modules[layer.name]) for layer in plan.layers]
    for group, head in groups:
        install(group, head)
    for module in model.modules():
        # torch's fused encoder kernel reads the weights of linear1 and linear2 itself and would pass our layers by. It
        # asks this attribute first; the copy that is deployed needs the same.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.__dict__[_FAST_PATH] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
    return model


_FAST_PATH = "_lightning_quant_fast_path"


def _make_quantizers(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, ActivationQuantizer]:
    """Every quantizer that is not shared, by the name of its target: 'conv1._output_'."""
    quantizers: dict[str, ActivationQuantizer] = {}
    for layer in plan.layers:
        cap = None if layer.activation is None else activation_cap(modules[layer.activation])
        for target in (INPUT, OUTPUT):
            if target in layer.targets and layer.targets[target].source is None:
                name, rectified = f"{layer.name}.{target}", target == OUTPUT and cap is not None
                quantizers[name] = ActivationQuantizer(
                    layer.targets[target].spec,
                    name,
                    rectified=rectified,
                    cap=cap if rectified and cap is not None else math.inf,
                )
    return quantizers


def _make_group(layer: LayerPlan, quantizers: Mapping[str, ActivationQuantizer], modules: Mapping[str, nn.Module]) -> FusedGroup:
    target = layer.targets.get(INPUT)
    source = None if target is None else target.source
    return FusedGroup(
        layer.name,
        batch_norm=None if layer.batch_norm is None else modules[layer.batch_norm],
        activation=None if layer.activation is None else modules[layer.activation],
        input=None if target is None else quantizers[source or f"{layer.name}.{INPUT}"],
        input_owned=source is None,
        input_applied=source is None or not source.endswith(f".{OUTPUT}"),
        weight=layer.targets[WEIGHT].spec if WEIGHT in layer.targets else None,
        output=quantizers[f"{layer.name}.{OUTPUT}"] if OUTPUT in layer.targets else None,
    )


def restore_model(model: nn.Module) -> nn.Module:
    """Undo `prepare_model`: every module gets its own class back and quantizers are gone; returns `model`, float again.

    Weights and batch-norm statistics stay as training left them. A model that is not prepared is returned as it is.
    """
    for module in model.modules():
        uninstall(module)
        if isinstance(module, nn.TransformerEncoderLayer) and _FAST_PATH in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)
    return model


def fused_groups(model: nn.Module) -> dict[str, tuple[nn.Module, FusedGroup]]:
    """(head, group) by the head's name, in the order of the model; empty if it is not prepared."""
    found: dict[str, tuple[nn.Module, FusedGroup]] = {}
    for name, module in model.named_modules():
        group = group_of(module)
        if group is not None and is_group_head(module):
            found[name] = (module, group)
    return found


def apply_phase(model: nn.Module, phase: Phase) -> None:
    """Set what the quantizers and batch norms of a prepared model do from the next forward on."""
    for _, group in fused_groups(model).values():
        group.phase = phase


def drop_deployed_layers(model: nn.Module) -> None:
    """Have the next eval forward fold the parameters as they are then; for changes that neither train() nor eval() sees."""
    for _, group in fused_groups(model).values():
        group.deployed = None


@contextlib.contextmanager
def simulated(model: nn.Module) -> Iterator[None]:
    """Within this context eval mode simulates in float, batch norm unfolded, instead of running integers."""
    groups = [group for _, group in fused_groups(model).values()]
    before = [group.simulate for group in groups]
    for group in groups:
        group.simulate = True
    try:
        yield
    finally:
        for group, flag in zip(groups, before, strict=True):
            group.simulate = flag


def quantizer_state(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Every range of a prepared model by target name ('conv1._output_'), as plain numbers."""
    state: dict[str, dict[str, float | None]] = {}
    for _, group in fused_groups(model).values():
        for quantizer in (group.input, group.output):
            if quantizer is not None:
                state[quantizer.name] = quantizer.state_dict()
    return state


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take over ranges saved by `quantizer_state`.

    Raises:
        ConfigError: if the names differ from the model's; nothing is loaded then.
    """
    own = quantizer_state(model)
    if set(own) != set(state):
        lacking, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        raise ConfigError(
            f"the saved quantizers are of another config_list: missing {lacking}, unexpected {extra}. Use the config_list of "
            "that run, or load only its weights and start a new fit."
        )
    for _, group in fused_groups(model).values():
        group.deployed = None
        for quantizer in (group.input, group.output):
            if quantizer is not None:
                quantizer.load_state_dict(state[quantizer.name])
