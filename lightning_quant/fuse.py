# SPDX-License-Identifier: Apache-2.0
"""Owns fusion of a float model, for people without a Trainer or without quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_quant.config import ConfigError
from lightning_quant.convert import copy_of, replace_module
from lightning_quant.folding import Layer, folded, weight_of
from lightning_quant.graph import Graph
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.patterns import is_head, roles_of
from lightning_quant.plan import forward_graph, plan_from_graph
from lightning_quant.prepare import prepare_model, prepared_groups, restore_model

Model = TypeVar("Model", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def fuse_model(
    model: Model, groups: Sequence[Sequence[str]] | None = None, *, example_input: Any = None, inplace: bool = False
) -> Model:
    """Fuse batch norms with the layers around them; nothing is quantized.

    In eval mode they are folded: weights and biases are rewritten (a bias is made where there was none), batch norms become
    `nn.Identity`, in float64 arithmetic. In train mode they stay alive: layers get a class that trains as before, batch
    statistics included, and folds by itself in `eval()`; `restore_model` undoes it, and a further call in eval mode folds for
    good. A Parameter that another module holds, too, stays as it is there. Modules keep their names. Hooks stay where they are
    and their handles work: those of a batch norm move to what replaces it. In eval mode a hook between a layer and its batch
    norm sees the folded output; in train mode it sees what it saw.

    Args:
        model: the float model, in train or eval mode as a whole.
        groups: lists of names, in the order of the data, as torch's `fuse_modules` takes them; a single list is one group. None:
            every group that the recorded forward shows.
        example_input: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or
            (tuple, dict). Without it the forward is traced symbolically.
        inplace: change `model` itself, not a copy.

    Returns:
        The fused model; calling it again changes nothing.

    Raises:
        ConfigError: where a group is not one, with the reason; where the forward can neither be recorded nor traced; or where
            `model` is prepared for quantization.
    """
    if any(group.quantizers for _, group in prepared_groups(model).values()):
        raise ConfigError(f"{type(model).__name__} is prepared for quantization, which fuses; call restore_model(model) first.")
    model = model if inplace else copy_of(model)
    if model.training and prepared_groups(model):
        return model
    restore_model(model)
    plan = _plan(model, groups, example_input)
    if model.training:
        if plan.layers:
            prepare_model(model, plan)
        return model
    modules = dict(model.named_modules())
    for layer in plan.layers:
        _fold(model, layer, modules)
    return model


def _plan(model: nn.Module, groups: Sequence[Sequence[str]] | None, example_input: Any) -> Plan:
    """The groups with a batch norm, nothing of which is rounded."""
    if groups is not None and groups and all(isinstance(name, str) for name in groups):
        groups = [groups]  # type: ignore[list-item]
    graph, why = forward_graph(model, example_input)
    if graph is None:
        raise ConfigError(f"fuse_model: nothing is fused unseen, and there is no recorded forward ({why}); give example_input.")
    modules = {**graph.operators, **dict(model.named_modules())}
    if groups is None:
        heads = [name for name, module in modules.items() if name and is_head(module) and _is_free(name, module, graph)]
        fuse: Any = "auto"
    else:
        heads = [_head(group, modules) for group in groups]
        fuse = [tuple(group) for group in groups]
    if not heads:
        return Plan(layers=())
    entry = {
        "op_names": heads,
        "target_names": ["_output_"],
        "apply_method": "bypass",
        "fuse_names": fuse,
        "high_precision_output": False,
    }
    try:
        plan = plan_from_graph(model, [entry], graph)
    except ConfigError as error:  # it is not the user's entry
        raise ConfigError(str(error).replace("config_list[0]: fuse_names ", "fuse_model: group ")) from None
    return replace(plan, layers=tuple(layer for layer in plan.layers if layer.fused_with))


def _is_free(name: str, head: nn.Module, graph: Graph) -> bool:
    """Whether a layer is called, and its parameters are its own and read by nothing else."""
    own = ("weight", "bias")
    return (
        bool(graph.calls(name))
        and own[0] in head._parameters
        and not any(f"{name}.{p}" in graph.readers_of_parameters for p in own)
    )


def _head(group: Sequence[str], modules: dict[str, nn.Module]) -> str:
    roles = roles_of([modules[name] for name in group]) if all(name in modules for name in group) else None
    return group[0 if roles is None else roles.head]


@torch.no_grad()
def _fold(model: nn.Module, layer: LayerPlan, modules: dict[str, nn.Module]) -> None:
    norms = [modules[name] for name in (layer.norm_before, layer.batch_norm) if name is not None]
    head = modules[layer.name]
    if not norms or "weight" not in head._parameters or any(norm.training for norm in norms):
        return
    before = None if layer.norm_before is None else modules[layer.norm_before]
    behind = None if layer.batch_norm is None else modules[layer.batch_norm]
    weight, bias = folded(Layer(head=head, norm_before=before, norm=behind))
    held = [parameter for other in model.modules() if other is not head for parameter in other._parameters.values()]
    for key, value in (("weight", weight), ("bias", bias)):
        old = head._parameters.get(key)
        if old is None or any(old is parameter for parameter in held):  # none yet, or tied: another module keeps the old one
            like = weight_of(head) if old is None else old
            head._parameters[key] = nn.Parameter(value.to(like), requires_grad=like.requires_grad)
        else:
            old.copy_(value)
    for norm in norms:
        new = nn.Identity()
        for hooks in _HOOKS:
            new.__dict__[hooks] = norm.__dict__[hooks]
        replace_module(model, norm, new.train(norm.training))
