# SPDX-License-Identifier: Apache-2.0
"""Owns fused groups: which types fuse, what each member does in training and in eval, and how a group folds.

A group is a convolution or linear layer (the head), an optional batch norm and an optional ReLU or ReLU6. Its modules
stay where they are; each gets a class that knows the group. In training every member does its own part, so that hooks
between them see what they saw before:

    head:  conv(fq(x), fq(w))         batch norm: itself, on batch statistics         end: fq(act(.)), one pass

In eval the head runs the folded integer layer of `integer.py` and the others hand its result on.

Why one convolution is enough. Let k = gamma / sigma, c = |k|, and let the weight be quantized per output channel by its
range now, on a grid that is symmetric about zero (-127..127; for uint8 read 255 - q for -q). Then for every channel

    fq(w k) = k fq(w)        (1)  the scale of w k is c s_w, so (w k) / (c s_w) = sign(k) w / s_w: the same integers, negated

so BN(conv(x, fq(w))) with k from the batch *is* the layer whose folded weight was quantized: no second convolution, no
division by gamma, exact batch statistics, and nothing special at gamma = 0 or gamma < 0. (Krishnamoorthi 2018 section 3.2
and torch.ao scale the weight, quantize it and divide the output by k: NaN at gamma = 0. Nagel et al. 2021, arXiv
2106.08295 section 5.2, state (1).) Folding is then lossless: q' = sign(k) q, s' = c s_w, b' = (b - mu) k + beta.

A grid shared by all channels does not have (1). There the weight side carries the whole cost: w' = fq(w c) / c with c from
the running statistics, detached; still one convolution and a real batch norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.config import TensorSpec
from lightning_quant.integer import FoldedWeight, Geometry, IntegerLayer, PartlyIntegerLayer
from lightning_quant.quantizers import ActivationQuantizer, fake_quantize_weight, quantize_weight, weight_grid
from lightning_quant.schedule import Phase
from lightning_quant.settings import is_kind

BatchNorm = nn.modules.batchnorm._BatchNorm
_BATCH_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
# activation type -> the level it caps at
ACTIVATIONS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}
_KEY = "_lightning_quant"


# -- patterns -------------------------------------------------------------------------------------------------------


def is_head(module: nn.Module) -> bool:
    """Whether a group can begin with `module`: a weighted layer with the forward of torch's own."""
    return any(is_kind(module, cls) for cls in _BATCH_NORM_OF)


def is_batch_norm_for(module: nn.Module, head: nn.Module) -> bool:
    """Whether `module` normalises what `head` makes: the batch norm of its dimensions, or SyncBatchNorm."""
    wanted = next((norm for cls, norm in _BATCH_NORM_OF.items() if isinstance(head, cls)), None)
    return wanted is not None and (is_kind(module, wanted) or is_kind(module, nn.SyncBatchNorm))


def activation_cap(module: nn.Module) -> float | None:
    """Where the activation `module` is cut off above (infinity for ReLU), or None if it is not one that fuses."""
    return next((cap for cls, cap in ACTIVATIONS.items() if is_kind(module, cls)), None)


def pattern_problem(members: list[nn.Module]) -> str | None:
    """Why these modules, in this order, are no group; None if they are one."""
    head, rest = members[0], members[1:]
    tail = rest[1:] if rest and is_head(head) and is_batch_norm_for(rest[0], head) else rest
    fits = is_head(head) and len(tail) <= 1 and all(activation_cap(module) is not None for module in tail)
    if fits:
        return None
    types = ", ".join(type(module).__name__ for module in members)
    heads, ends = "/".join(cls.__name__ for cls in _BATCH_NORM_OF), "/".join(cls.__name__ for cls in ACTIVATIONS)
    return (
        f"({types}) is no pattern that fuses; a group is {heads}, then optionally the batch norm of the same "
        f"dimensions, then optionally {ends}."
    )


# -- the state that the members of a group share ----------------------------------------------------------------------


class FusedGroup:
    """What the members of one group share; lives in each member's `__dict__`, never in the module tree.

    Args:
        name: the head's name in the model.
        batch_norm, activation: the other members, or None.
        input: quantizer of the head's input, or None. `input_owned`: this group moves its range; `input_applied`: the
            tensor arrives unrounded, so the head rounds it.
        weight: grid of the weight, or None.
        output: quantizer at the group's end, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        batch_norm: nn.Module | None,
        activation: nn.Module | None,
        input: ActivationQuantizer | None,
        input_owned: bool,
        input_applied: bool,
        weight: TensorSpec | None,
        output: ActivationQuantizer | None,
    ) -> None:
        self.name = name
        self.batch_norm, self.activation = batch_norm, activation
        self.input, self.input_owned, self.input_applied = input, input_owned, input_applied
        self.weight, self.output = weight, output
        self.phase = Phase()
        self.simulate = False  # eval mode simulates too, for comparisons
        self.deployed: nn.Module | None = None  # built at the first eval forward, dropped by train() and eval()
        self.deployed_ranges: list[Any] = []  # what it was built on; a shared range may be another group's to move
        self.integer_pass = False  # this pass: the head ran the deployed layer, the others hand on
        self.observing = False  # this pass: training, and the schedule lets ranges move

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "deployed": None}

    @property
    def ready(self) -> bool:
        """Whether every quantizer of the group has a range."""
        return all(quantizer.ready for quantizer in (self.input, self.output) if quantizer is not None)

    @property
    def members(self) -> list[nn.Module]:
        """The modules behind the head, in order."""
        return [module for module in (self.batch_norm, self.activation) if module is not None]

    def begin(self, head: nn.Module, x: Tensor) -> bool:
        """Decide what this pass is; True if the deployed layer runs."""
        self.observing = head.training and self.phase.observe
        self.integer_pass = (
            not any(module.training for module in (head, *self.members))
            and self.phase.quantize
            and not self.simulate
            and self.ready
            and not self._wants_gradient(head, x)
            and not self._is_watched(head)
        )
        if not self.integer_pass:
            self.deployed = None  # a pass with gradients, or in training: the weights may move after it
        return self.integer_pass

    def _wants_gradient(self, head: nn.Module, x: Tensor) -> bool:
        modules = (head, *self.members)
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for m in modules for p in m.parameters()))

    def _is_watched(self, head: nn.Module) -> bool:
        """Whether a user's hook sits between members and must see the tensors of the float model."""
        members = self.members
        if not members:
            return False
        inner = [head._forward_hooks, *(module._forward_pre_hooks for module in members)]
        return any(inner) or any(module._forward_hooks for module in members[:-1])

    def round_input(self, x: Tensor) -> Tensor:
        """The head's input on its grid, its range moved first if this group owns it."""
        if self.input is None:
            return x
        if self.observing and self.input_owned:
            self.input.observe(x)
        return self.input(x) if self.input_applied and self.phase.quantize and self.input.ready else x

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The head's weight on its grid, with gradient."""
        assert self.weight is not None
        fold = None
        if self.batch_norm is not None and self.weight.granularity == "per_tensor":
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            fold = _channel_factor(self.batch_norm).abs().to(wide).view(-1, *[1] * (weight.dim() - 1))
        return fake_quantize_weight(weight, self.weight, fold)

    def finish(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """The group's result from the tensor that reaches its end (before the activation), or None if `member` is not
        the end or the end stays float: then the member's own forward is what counts."""
        behind = self.members
        if self.output is None or (behind and member is not behind[-1]):
            return None
        if self.observing:
            self.output.observe(x)
        return self.output(x) if self.phase.quantize and self.output.ready else None

    def run_deployed(self, head: nn.Module, x: Tensor) -> Tensor:
        """The folded layer on x; built once, from the parameters and ranges as they are now."""
        ranges = [(q.low, q.high) for q in (self.input, self.output) if q is not None]
        if self.deployed is None or ranges != self.deployed_ranges:
            self.deployed_ranges = ranges
            # Outside inference mode: what is built during trainer.test() may be used by a later fit's validation.
            with torch.inference_mode(False), torch.no_grad():
                self.deployed = deployed_layer(head, self)
        y: Tensor = self.deployed(x)
        return y


def group_of(module: nn.Module) -> FusedGroup | None:
    """The group that `module` belongs to, or None."""
    group: FusedGroup | None = module.__dict__.get(_KEY)
    return group


# -- the classes that members get -------------------------------------------------------------------------------------


class _Member(nn.Module):
    """What all members share: the deployed layer is dropped whenever the numbers behind it may change.

    A member's class is made at run time from its role and its own class: `FusedConv2d(_Head, Conv2d)`. torch.compile runs
    members as they are: ranges are host numbers that change with every batch.
    """

    def _group(self) -> FusedGroup:
        group: FusedGroup = self.__dict__[_KEY]
        return group

    def train(self, mode: bool = True) -> Any:
        self._group().deployed = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._group().deployed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._group().deployed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickle finds it again by what it was made from.
        return _empty_member, type(self).__bases__, self.__dict__


class _Head(_Member):
    """A convolution or linear layer that begins a group."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group.begin(self, input):
            return group.run_deployed(self, input)
        x = group.round_input(input)
        if group.weight is None or not group.phase.quantize or not (group.observing or group.ready):
            y: Tensor = super().forward(x)
        else:
            # An entry in the instance's __dict__ hides the Parameter for the length of the original forward.
            self.__dict__["weight"] = group.rounded_weight(weight_of(self))
            try:
                y = super().forward(x)
            finally:
                del self.__dict__["weight"]
        rounded = group.finish(self, y)
        return y if rounded is None else rounded


class _BatchNormMember(_Member):
    """The batch norm of a group: itself, with statistics that the schedule can stop."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group.integer_pass:
            return input
        norm: Any = self
        # Without a momentum somebody recomputes the statistics (Lightning's SWA, torch's update_bn): that must get through.
        frozen = group.phase.freeze_batch_norm and norm.training and norm.momentum is not None
        if frozen and norm.running_mean is not None:
            y = F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        else:
            y = super().forward(input)
        rounded = group.finish(norm, y)
        return y if rounded is None else rounded


class _ActivationMember(_Member):
    """The activation of a group: where the end is rounded, the clamp of the grid does its work."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group.integer_pass:
            return input
        rounded = group.finish(self, input)
        if rounded is not None:
            return rounded
        y: Tensor = super().forward(input)
        return y


_CLASSES: dict[tuple[type[_Member], type[nn.Module]], type[nn.Module]] = {}


def _member_class(role: type[_Member], base: type[nn.Module]) -> type[nn.Module]:
    if (role, base) not in _CLASSES:
        doc = f"A {base.__name__} in a fused group."
        _CLASSES[role, base] = type(f"Fused{base.__name__}", (role, base), {"__doc__": doc})
    return _CLASSES[role, base]


def _empty_member(role: type[_Member], base: type[nn.Module]) -> nn.Module:
    cls = _member_class(role, base)
    return cls.__new__(cls)


def install(group: FusedGroup, head: nn.Module) -> None:
    """Make `head` and the group's members work as one; parameters, buffers, names and hooks are not touched."""
    roles: list[tuple[nn.Module | None, type[_Member]]] = [
        (head, _Head),
        (group.batch_norm, _BatchNormMember),
        (group.activation, _ActivationMember),
    ]
    for module, role in roles:
        if module is not None:
            module.__dict__[_KEY] = group
            module.__class__ = _member_class(role, type(module))


def uninstall(module: nn.Module) -> None:
    """Give a member back its own class."""
    if module.__dict__.pop(_KEY, None) is not None:
        module.__class__ = type(module).__bases__[1]


def is_group_head(module: nn.Module) -> bool:
    """Whether `module` begins an installed group."""
    return isinstance(module, _Head)


# -- folding ----------------------------------------------------------------------------------------------------------


def weight_of(head: nn.Module) -> nn.Parameter:
    """The Parameter itself, also while a rounded tensor hides it."""
    weight = head._parameters["weight"]
    assert weight is not None
    return weight


def _channel_factor(norm: nn.Module) -> Tensor:
    """k = gamma / sigma by the running statistics, float64 (C,), detached."""
    assert isinstance(norm, BatchNorm) and norm.running_var is not None
    k = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    return k if norm.weight is None else k * norm.weight.detach().double()


def _folded_bias(head: nn.Module, norm: nn.Module | None) -> Tensor:
    """b' = (b - mu) k + beta, float64 (C,)."""
    weight, bias = weight_of(head), head._parameters.get("bias")
    b = weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.detach().double()
    if norm is None:
        return b
    assert isinstance(norm, BatchNorm) and norm.running_mean is not None
    b = (b - norm.running_mean.double()) * _channel_factor(norm)
    return b if norm.bias is None else b + norm.bias.detach().double()


def fold(head: nn.Module, norm: nn.Module | None, spec: TensorSpec) -> FoldedWeight:
    """The head's weight on the integers that training used, with batch norm folded in.

    Args:
        head: Conv1d/2d/3d or Linear.
        norm: the batch norm behind it with running statistics, or None.
        spec: the grid of the weight.
    """
    w = weight_of(head).detach()
    w = w if w.dtype == torch.float64 else w.float()
    k = w.new_ones(w.shape[0], dtype=torch.float64) if norm is None else _channel_factor(norm)
    column = [-1, *[1] * (w.dim() - 1)]
    if spec.granularity == "out_channel":
        grid = weight_grid(w, spec)
        q, scale = quantize_weight(w, grid, spec), grid.scale.flatten().double() * k.abs()
        zero = None if grid.zero_point is None else grid.zero_point.flatten()
    else:
        c = k.abs().to(w.dtype).view(column)
        grid = weight_grid(w * c, spec)
        q, scale = quantize_weight(w * c, grid, spec), grid.scale.double()
        zero = grid.zero_point
    if zero is not None:
        zero, scale = zero.expand(w.shape[0]), scale.expand(w.shape[0])
    # sign(k) goes into the integers: -q, or the mirror of q on an unsigned grid; the zero point goes with them.
    mirror, negative = spec.qmin + spec.qmax, k < 0
    q = torch.where(negative.view(column), mirror - q, q)
    shift = 128 if spec.qmin == 0 else 0
    if zero is not None:
        zero = (torch.where(negative, mirror - zero, zero) - shift).to(torch.int8)
    if scale.dim():
        # A channel of zeros (gamma = 0, pruned) is its bias: on a small step, which _widened raises as far as int32 needs.
        level = (torch.zeros_like(scale) if zero is None else zero.double() + shift).to(q.dtype).view(column)
        q = torch.where((scale == 0).view(column), level, q)
        scale = torch.where((q == level).flatten(1).all(1), 2.0**-23, scale)
    return FoldedWeight(
        q=(q - shift).to(torch.int8),
        scale=scale.to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny),
        zero_point=zero,
        bias=_folded_bias(head, norm),
    )


def folded_float(head: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(float32 weight, float64 bias) with batch norm folded in, for a layer whose weight is not quantized."""
    w = weight_of(head).detach().double()
    if norm is not None:
        w = w * _channel_factor(norm).view(-1, *[1] * (w.dim() - 1))
    return w.to(torch.float32), _folded_bias(head, norm)


def deployed_layer(head: nn.Module, group: FusedGroup) -> nn.Module:
    """The layer that replaces a group after training, from its numbers as they are now; owns all its tensors."""
    geometry, norm = Geometry.of(head), group.batch_norm
    x = None if group.input is None else group.input.grid()
    y = None if group.output is None else group.output.grid()
    cap = None if group.activation is None else next(c for t, c in ACTIVATIONS.items() if isinstance(group.activation, t))
    rectify = None if cap is None or y is not None else (0.0, cap)
    if group.weight is not None and x is not None and (y is not None or geometry.kind == "linear"):
        layer: nn.Module = IntegerLayer(fold(head, norm, group.weight), geometry, x, y, rectify)
    else:
        folded = folded_float(head, norm) if group.weight is None else fold(head, norm, group.weight)
        layer = PartlyIntegerLayer(folded, geometry, x, y, rectify)
    return layer.to(weight_of(head).device)
