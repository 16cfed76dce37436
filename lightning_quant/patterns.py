# SPDX-License-Identifier: Apache-2.0
"""Owns the pattern table: which modules and operators fuse, in which order, and what each of them does in a group.

A group is one of

    [batch norm]  weighted layer  [batch norm]  [activation]        the first batch norm: where the fold is exact
    batch norm  clamp                                               a scale and a shift for each channel
    add  clamp

A clamp (ReLU, ReLU6, Hardtanh) is done by the ends of the grid behind it and costs nothing. Any other activation is a curve: the
tensor before it is rounded, too, because no CPU runtime ends an integer convolution in a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.keys import guess
from lightning_quant.settings import is_kind
from lightning_quant.sites import Operator

BatchNorm = nn.modules.batchnorm._BatchNorm
Clamp = tuple[float, float]
Affine = Callable[[nn.Module], tuple[Tensor, Tensor]]

# weighted layer -> the batch norm of its dimensions
HEADS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _hardtanh(module: nn.Module) -> Clamp:
    if isinstance(module, Operator):
        return float(module.constant(1, "min_val", -1.0)), float(module.constant(2, "max_val", 1.0))
    assert isinstance(module, nn.Hardtanh)
    return float(module.min_val), float(module.max_val)


# activation -> where it cuts off; (type of the module, name of the operator, ends)
_CLAMPS: tuple[tuple[type[nn.Module], str, Callable[[nn.Module], Clamp]], ...] = (
    (nn.ReLU, "relu", lambda _: (0.0, math.inf)),
    (nn.ReLU6, "relu6", lambda _: (0.0, 6.0)),
    (nn.Hardtanh, "hardtanh", _hardtanh),
)
_CURVES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.LeakyReLU, "leaky_relu"),
    (nn.PReLU, "prelu"),
    (nn.SiLU, "silu"),
    (nn.Hardswish, "hardswish"),
    (nn.GELU, "gelu"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.Hardsigmoid, "hardsigmoid"),
)


# -- rows of users ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A row that a user added: behind `head` stand a `norm`, if it has one, and an `activation`, if it has one."""

    head: type[nn.Module]
    norm: type[nn.Module] | None = None
    affine: Affine | None = None
    activation: type[nn.Module] | str | None = None


USER_ROWS: list[Fusion] = []
_FUNCTIONS = (F, torch, Tensor)
_NOT_ELEMENTWISE = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.GLU,
)


def register_fusion(types: Sequence[type[nn.Module] | str], *, affine: Affine | None = None) -> None:
    """Add a pattern: `register_fusion((nn.Conv2d, FrozenBatchNorm, nn.Mish), affine=lambda norm: (norm.scale, norm.shift))`.

    The counterpart of torch's `additional_fuser_method_mapping`. Parts of the pattern fuse, too: a `Conv2d` with a `Mish` alone.
    In training every member runs its own forward; deployed, the norm is folded into the layer before it.

    Args:
        types: a weighted layer (Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear), then a norm, an activation, or both in this order.
            An activation is a module class whose forward takes one tensor and works elementwise, or the name of an operator that
            models call as a function ("mish").
        affine: for a norm that is no batch norm: takes the module and returns (scale, shift), float (C,) each, such that in eval
            mode its output is `x * scale + shift` along dimension 1 (the last for Linear).

    Raises:
        ConfigError: for a pattern of another form.
    """
    place = "register_fusion"
    if isinstance(types, str | type) or not 2 <= len(types) <= 3:
        raise ConfigError(f"{place}: expected 2 or 3 types, such as (nn.Conv2d, nn.BatchNorm2d, nn.Mish), got {types!r}.")
    for one in types:
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise ConfigError(f"{place}: {one!r} is no module class and no operator's name.")
    for one in types:
        if isinstance(one, str) and not any(hasattr(source, one) for source in _FUNCTIONS):
            names = [name for source in _FUNCTIONS for name in dir(source) if not name.startswith("_")]
            raise ConfigError(f"{place}: torch has no function {one!r}.{guess(one, dict.fromkeys(names))}")
    head, *rest = types
    base = None if isinstance(head, str) else next((h for h in HEADS if issubclass(head, h) and head.forward is h.forward), None)
    if base is None or isinstance(head, str):
        known = ", ".join(cls.__name__ for cls in HEADS)
        raise ConfigError(f"{place}: a group begins with a weighted layer that keeps torch's forward ({known}), not {head!r}.")
    known_norm = not isinstance(rest[0], str) and issubclass(rest[0], (HEADS[base], nn.SyncBatchNorm))
    norm = None
    if affine is not None or len(rest) == 2:
        if isinstance(rest[0], str) or (affine is None and not known_norm):
            raise ConfigError(
                f"{place}: {rest[0]!r} stands where a norm does; give `affine`, a function from the module to (scale, shift)."
            )
        norm = rest[0]
    activation = rest[-1] if len(rest) == 2 or norm is None else None
    if isinstance(activation, type) and issubclass(activation, _NOT_ELEMENTWISE):
        raise ConfigError(f"{place}: {activation!r} does not work elementwise, so it cannot end a group; quantize it by itself.")
    row = Fusion(head=head, norm=norm, affine=affine, activation=activation)
    USER_ROWS[:] = [*(old for old in USER_ROWS if (old.head, old.norm, old.activation) != (head, norm, activation)), row]


def _is(module: nn.Module, kind: type[nn.Module] | str | None) -> bool:
    if isinstance(kind, str):
        return isinstance(module, Operator) and module.site.op == kind and module.count == 1
    return kind is not None and is_kind(module, kind)


def is_own_part(module: nn.Module) -> bool:
    """Whether a user's row names the class of `module`: then it is one step of a group, whatever its forward calls."""
    parts = [part for row in USER_ROWS for part in (row.norm, row.activation) if not isinstance(part, str)]
    return any(_is(module, part) for part in parts)


def affine_of(norm: nn.Module) -> Affine | None:
    """The user's function for a norm that is no batch norm, prepared or not."""
    rows = (row for row in reversed(USER_ROWS) if row.affine is not None and row.norm is not None)
    return next((row.affine for row in rows if row.norm is not None and isinstance(norm, row.norm)), None)


def is_activation_name(op: str) -> bool:
    """Whether an operator of this name can be the activation of a group."""
    return op in {row[1] for row in (*_CLAMPS, *_CURVES)} or is_registered(op)


def is_registered(op: str) -> bool:
    """Whether an operator of this name ends a pattern that a user added."""
    return any(row.activation == op for row in USER_ROWS)


# -- roles --------------------------------------------------------------------------------------------------------------


def is_head(module: nn.Module) -> bool:
    """Whether `module` is a weighted layer with the forward of torch's own."""
    return any(is_kind(module, cls) for cls in HEADS)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm with the forward of torch's own."""
    return any(is_kind(module, cls) for cls in NORMS) or _takes_any_dims(module)


def _takes_any_dims(module: nn.Module) -> bool:
    """Whether it is a batch norm that leaves the number of dimensions open: what Lightning puts back for a SyncBatchNorm."""
    return is_kind(module, BatchNorm) and not isinstance(module, NORMS)


def is_add(module: nn.Module) -> bool:
    """Whether it is an addition of two tensors."""
    return isinstance(module, Operator) and module.site.op == "add" and module.count == 2 and module.constant(2, "alpha", 1) == 1


def is_norm_for(module: nn.Module, head: nn.Module) -> bool:
    """Whether `module` normalises what `head` makes: the batch norm of its dimensions, SyncBatchNorm, or a user's norm."""
    wanted = next((norm for cls, norm in HEADS.items() if isinstance(head, cls)), None)
    if wanted is not None and (is_kind(module, wanted) or is_kind(module, nn.SyncBatchNorm) or _takes_any_dims(module)):
        return True
    return any(_is(head, row.head) and row.affine is not None and _is(module, row.norm) for row in USER_ROWS)


def clamp_of(module: nn.Module) -> Clamp | None:
    """Where the activation `module` cuts off below and above (0 and infinity for ReLU), or None if it is no clamp."""
    for cls, op, ends in _CLAMPS:
        if _is(module, cls) or _is(module, op):
            return ends(module)
    return None


def is_plain_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's activations without parameters: it does what a function called there would do.

    Those of the table, and those whose function ends a pattern of the user's ("mish" for `nn.Mish`).
    """
    kinds = [*(cls for cls, *_ in _CLAMPS), *(cls for cls, _ in _CURVES)]
    if any(is_kind(module, cls) for cls in kinds if cls is not nn.PReLU):
        return True
    own = type(module).__module__ == nn.modules.activation.__name__ and next(module.parameters(), None) is None
    return own and is_registered(type(module).__name__.lower())


def is_activation(module: nn.Module, head: nn.Module) -> bool:
    """Whether `module` is an activation that fuses behind `head`."""
    if clamp_of(module) is not None:
        return True
    if not is_head(head):
        return False
    if any(_is(module, cls) or _is(module, op) for cls, op in _CURVES):
        return True
    return any(_is(head, row.head) and _is(module, row.activation) for row in USER_ROWS)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What the members of a group are, by their positions."""

    head: int
    norm_before: int | None = None
    norm: int | None = None
    activation: int | None = None


def roles_of(members: Sequence[nn.Module]) -> Roles | None:
    """The roles of these modules and operators in this order, or None if they are no group."""
    rest = list(range(len(members)))
    before = rest.pop(0) if len(members) > 1 and is_batch_norm(members[0]) and is_head(members[1]) else None
    head = rest.pop(0)
    norm = rest.pop(0) if rest and is_head(members[head]) and is_norm_for(members[rest[0]], members[head]) else None
    activation = rest.pop(0) if rest and is_activation(members[rest[0]], members[head]) else None
    begins = is_head(members[head]) or is_batch_norm(members[head]) or is_add(members[head])
    return None if rest or not begins else Roles(head=head, norm_before=before, norm=norm, activation=activation)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def pattern_problem(members: Sequence[nn.Module]) -> str | None:
    """Why these modules and operators, in this order, are no group; None if they are one."""
    if roles_of(members) is not None:
        return None
    clamps, curves = "/".join(cls.__name__ for cls, *_ in _CLAMPS), "/".join(cls.__name__ for cls, _ in _CURVES)
    heads = "/".join(cls.__name__ for cls in HEADS)
    own = f" Of your own: {', '.join(_row(row) for row in USER_ROWS)}." if USER_ROWS else ""
    return (
        f"({', '.join(map(_name, members))}) is no pattern that fuses; a group is {heads}, then optionally the batch norm of the "
        f"same dimensions, then optionally {clamps}/{curves}, as modules or functions; a batch norm may stand before a layer "
        f"that does not pad; or batch norm or add, then {clamps}.{own} `register_fusion` adds patterns."
    )


def _row(row: Fusion) -> str:
    parts = (row.head, row.norm, row.activation)
    return "(" + ", ".join(part if isinstance(part, str) else part.__name__ for part in parts if part is not None) + ")"
