# SPDX-License-Identifier: Apache-2.0
"""Owns modules whose inputs or outputs are masked where they pass: their own forward between two masks.

The class of such a module becomes a subclass of its own, of the same name, that computes what it did and is found by the same
settings: its `forward` is the user's, the masks stand around `__call__`. Nothing is registered; the masks are in `__dict__`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.group import Made, drop_bound_forward, made_class
from lightning_quant.keys import Blocks
from lightning_quant.pruning import passing_kernel
from lightning_quant.targets import Argument, with_outputs

KEY = "_lightning_quant_masks"
_MASKED = -1000.0  # what `add` adds: exp of it is 0


@dataclass
class PassingMask:
    """The mask of one input or output; None until there is one. It lies along the dimensions whose block size is 1.

    `argument`: which one of forward's it is; None for an output.
    """

    name: str
    target: str
    argument: Argument | None
    granularity: str | Blocks
    method: str
    mask: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, masked: 0, or 1000 less."""
        if self.mask is None:
            return x
        kernel = passing_kernel(self.granularity, x.dim())
        shape = [size if k == 1 else 1 for size, k in zip(x.shape, kernel, strict=False)]
        if len(kernel) != x.dim() or [size for size, k in zip(x.shape, kernel, strict=False) if k == 1] != list(self.mask.shape):
            raise ConfigError(
                f"{self.name}: a tensor of shape {list(x.shape)} came by, and its mask of shape {list(self.mask.shape)} lies "
                f"along blocks {list(kernel)}; change the target's granularity."
            )
        mask = self.mask.to(x.device).reshape(shape)
        return x * mask if self.method == "mul" else x + torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, _MASKED)


class MaskedModule(Made, nn.Module):
    """The role of a module with masked inputs or outputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, its arguments and results masked."""
        masks: list[PassingMask] | None = self.__dict__.get(KEY)
        if masks is None:  # a forward made this instance by self.__class__()
            return super().__call__(*args, **kwargs)
        for mask in masks:
            if mask.argument is not None:
                value = mask.argument.read(args, kwargs)
                if isinstance(value, Tensor) and value.is_floating_point():
                    args, kwargs = mask.argument.replaced(args, kwargs, mask(value))
        result = super().__call__(*args, **kwargs)
        return with_outputs(result, {mask.target: mask for mask in masks if mask.argument is None})


def mask_passing(module: nn.Module, masks: list[PassingMask]) -> None:
    """Have `module` mask what passes; parameters, buffers, names and hooks are not touched."""
    cls = made_class(MaskedModule, type(module))
    module.__dict__[KEY] = masks
    module.__class__ = cls


def masks_passing(module: nn.Module) -> bool:
    """Whether an input or output of `module` is masked where it passes."""
    return KEY in module.__dict__


def carry_passing(old: nn.Module, new: nn.Module) -> None:
    """Have what takes a module's place mask what passes as that did."""
    if KEY in old.__dict__ and KEY not in new.__dict__:
        mask_passing(new, old.__dict__[KEY])


def unmask_all(model: nn.Module) -> None:
    """`unmask_passing` for all modules of a model that is not prepared, whoever masked what passes there."""
    for module in model.modules():
        unmask_passing(module)


def unmask_passing(module: nn.Module) -> None:
    """Give such a module its own class back."""
    if KEY not in module.__dict__:
        return
    if type(module).__dict__.get("_made_from", (None,))[0] is not MaskedModule:
        raise ConfigError(f"{type(module).__name__} is prepared for quantization, too; call restore_model(model) before.")
    del module.__dict__[KEY]
    module.__class__ = type(module).__bases__[1]
    drop_bound_forward(module)
