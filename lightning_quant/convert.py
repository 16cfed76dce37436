# SPDX-License-Identifier: Apache-2.0
"""Owns conversion: a trained, prepared model becomes a plain copy with integer layers; the trained one stays trainable."""

from __future__ import annotations

import copy

from torch import nn

from lightning_quant.config import ConfigError
from lightning_quant.fusion import deployed_layer
from lightning_quant.prepare import fused_groups


def convert_model(model: nn.Module) -> nn.Module:
    """A deployed copy of a prepared model: same class and call, fused groups replaced by folded integer layers.

    In the copy the head of every group is an `IntegerLayer` (int8 weight, int32 bias; float arithmetic on int8 weights
    where a grid is missing), batch norms and activations of groups are `nn.Identity`, and everything runs in eval mode on
    the device the model is on. Hooks on members of groups are not copied (the plan names them). The result equals the
    prepared model's eval mode without gradients bit for bit, unless the model's forward looks into its layers.

    Raises:
        ConfigError: if the model is not prepared, or a range was never observed (the layer is named).
    """
    if not fused_groups(model):
        raise ConfigError(
            f"{type(model).__name__} is not prepared; call prepare_model(model, plan) and train or calibrate it first."
        )
    blind = unobserved(model)
    if blind:
        raise ConfigError(
            f"no range was observed for {', '.join(blind)}: run training steps (model.train()) with "
            "representative data through these layers first, or leave them out of config_list."
        )
    deployed = copy.deepcopy(model)
    for module in deployed.modules():
        module._compiled_call_impl = None  # what torch.compile made is bound to the original's layers
    for name, (head, group) in fused_groups(deployed).items():
        layer = deployed_layer(head, group)
        for member in group.members:
            _replace(deployed, _name_of(deployed, member), nn.Identity())
        _replace(deployed, name, layer)
    return deployed.eval()


def unobserved(model: nn.Module) -> list[str]:
    """The quantizers of a prepared model that have no range yet, by target name ('conv1._output_')."""
    groups = (group for _, group in fused_groups(model).values())
    quantizers = (q for group in groups for q in (group.input, group.output) if q is not None)
    return list(dict.fromkeys(q.name for q in quantizers if not q.ready))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` is registered, under all its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
