# SPDX-License-Identifier: Apache-2.0
"""Owns how the weights of layers lie: output channels first, and masks of rows and columns in a weight's own order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_quant.keys import WEIGHT
from lightning_quant.patterns import TRANSPOSED


def canonical_shape(module: nn.Module, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a parameter with output channels first; of a transposed convolution (in, out / groups, ...) otherwise."""
    if name == WEIGHT and isinstance(module, TRANSPOSED):
        return (shape[1] * module.groups, shape[0] // module.groups, *shape[2:])
    return tuple(shape)


def first_out(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """A tensor with a parameter's shape, output channels first."""
    if name != WEIGHT or not isinstance(module, TRANSPOSED):
        return x
    groups = module.groups
    split = x.reshape(groups, x.shape[0] // groups, *x.shape[1:]).transpose(1, 2)
    return split.reshape(canonical_shape(module, name, x.shape))


def raw(module: nn.Module, name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The reverse of `first_out`, of a mask that multiplies a tensor of `shape`."""
    if name != WEIGHT or not isinstance(module, TRANSPOSED):
        return mask
    if module.groups == 1:
        return mask.transpose(0, 1)
    groups = module.groups
    whole = mask.expand(shape[0], shape[1], *mask.shape[2:])
    split = whole.reshape(groups, shape[0] // groups, *whole.shape[1:]).transpose(1, 2)
    return split.reshape(shape[1] * groups, shape[0] // groups, *whole.shape[2:])


def columns(module: nn.Module, mask: Tensor) -> Tensor:
    """What a mask of input channels does to the weight that reads them."""
    weight = module._parameters[WEIGHT]
    assert weight is not None
    rest = (1,) * (weight.dim() - 2)
    groups = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):
        return mask.reshape(-1, 1, *rest)
    found = mask.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return found.reshape(weight.shape[0], -1, *rest) if groups > 1 else mask.reshape(1, -1, *rest)
