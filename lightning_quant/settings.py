# SPDX-License-Identifier: Apache-2.0
"""Owns the templates of module types: which targets a type has and what they are when a `config_list` says nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_quant.config import INPUT, OUTPUT, WEIGHT

# Weights: int8, symmetric, one scale per output channel, so that batch norm folds exactly (see fusion.py).
# Activations: uint8 affine, one scale a tensor: what CPU runtimes execute; int8 affine is the same grid moved by 128.
_ACTIVATION = {"quant_dtype": "uint8", "quant_scheme": "affine", "granularity": "default"}
_WEIGHTED = {
    INPUT: _ACTIVATION,
    WEIGHT: {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "default"},
    OUTPUT: _ACTIVATION,
}
_REGISTRY: dict[type[nn.Module], Mapping[str, Mapping[str, str]]] = {
    nn.Conv1d: _WEIGHTED,
    nn.Conv2d: _WEIGHTED,
    nn.Conv3d: _WEIGHTED,
    nn.Linear: _WEIGHTED,
}


def is_kind(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` computes what a `cls` computes: the class itself or a subclass that keeps its forward."""
    return _keeps_forward(type(module), cls)


def _keeps_forward(derived: type[nn.Module], base: type[nn.Module]) -> bool:
    return issubclass(derived, base) and derived.forward is base.forward


def registered_names() -> list[str]:
    """The class names that have a quantization setting, in registration order."""
    return [cls.__name__ for cls in _REGISTRY]


def registered_base(module_type: type[nn.Module]) -> type[nn.Module] | None:
    """The registered type whose setting `module_type` uses, or None.

    A subclass counts as its base only where it keeps the base's forward: with a forward of its own, what the layer
    computes is unknown.
    """
    return next((base for base in _REGISTRY if _keeps_forward(module_type, base)), None)


def setting_of(base: type[nn.Module]) -> Mapping[str, Mapping[str, str]]:
    """Target -> default `quant_dtype`, `quant_scheme`, `granularity` of a registered type."""
    return _REGISTRY[base]
