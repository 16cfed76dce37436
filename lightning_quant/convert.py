# SPDX-License-Identifier: Apache-2.0
"""Owns conversion: a trained, prepared model becomes a plain copy with integer layers; the trained one stays trainable."""

from __future__ import annotations

import copy

from torch import nn

from lightning_quant.config import ConfigError
from lightning_quant.prepare import prepared_groups, quantizers_of
from lightning_quant.wrapped import QuantizedModule


def convert_model(model: nn.Module) -> nn.Module:
    """A deployed copy of a prepared model: same class and call, fused groups replaced by folded integer layers.

    In the copy the head of every group is an `IntegerLayer` (int8 weight, int32 bias; float arithmetic on int8 weights
    where a grid is missing), batch norms and activations of groups are `nn.Identity`, any other quantized module is a
    `QuantizedModule` (integer parameters around its own forward), and everything runs in eval mode on the device the model
    is on. Hooks on members of groups are not copied (the plan names them). The result equals the
    prepared model's eval mode without gradients bit for bit, unless the model's forward looks into its layers.

    Raises:
        ConfigError: if the model is not prepared, or a range was never observed (the layer is named).
    """
    if not prepared_groups(model):
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
    for head, group in prepared_groups(deployed).values():
        layer = group.deploy(head)
        for member in group.members:
            _replace(deployed, member, nn.Identity())
        _replace(deployed, head, layer)
        if isinstance(layer, QuantizedModule):
            layer.take_over()
    return deployed.eval()


def unobserved(model: nn.Module) -> list[str]:
    """The quantizers of a prepared model that have no range yet, by target name ('conv1._output_')."""
    return [name for name, quantizer in quantizers_of(model).items() if not quantizer.ready]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered, under all its names."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
