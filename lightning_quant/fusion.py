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
from lightning_quant.group import KEY, Group, Member, hidden, join
from lightning_quant.integer import FoldedWeight, Geometry, IntegerLayer, PartlyIntegerLayer, one_a_block, storage
from lightning_quant.quantizers import ActivationQuantizer, BlockGrid, Grid, fake_quantize_weight, quantize_weight, weight_grid
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


class FusedGroup(Group):
    """A convolution or linear layer and what is fused behind it.

    Args:
        name: the head's name in the model.
        batch_norm, activation: the other members, or None.
        input: quantizer of the head's input, or None. `input_owned`: this group moves its range; `input_applied`: the
            tensor arrives unrounded, so the head rounds it.
        weight, bias: grids of the head's parameters, or None.
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
        bias: TensorSpec | None = None,
    ) -> None:
        super().__init__(name)
        self.batch_norm, self.activation = batch_norm, activation
        self.input, self.input_owned, self.input_applied = input, input_owned, input_applied
        self.weight, self.bias, self.output = weight, bias, output

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Of the input and of the end, where they are rounded."""
        return [quantizer for quantizer in (self.input, self.output) if quantizer is not None]

    @property
    def members(self) -> list[nn.Module]:
        """The modules behind the head, in order."""
        return [module for module in (self.batch_norm, self.activation) if module is not None]

    def deploy(self, head: nn.Module) -> nn.Module:
        """The folded layer."""
        return deployed_layer(head, self)

    def round_input(self, x: Tensor) -> Tensor:
        """The head's input on its grid, its range moved first if this group owns it."""
        if self.input is None:
            return x
        if self.observing and self.input_owned:
            self.input.observe(x)
        return self.input(x) if self.input_applied and self.phase.quantize and self.input.ready else x

    def rounded_parameters(self, head: nn.Module) -> dict[str, Tensor]:
        """The head's quantized parameters on their grids, with gradient."""
        rounded: dict[str, Tensor] = {}
        if self.weight is not None:
            weight, fold = weight_of(head), None
            if self.batch_norm is not None and self.weight.kernel(weight.dim())[0] != 1:
                wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
                fold = _channel_factor(self.batch_norm).abs().to(wide).view(-1, *[1] * (weight.dim() - 1))
            rounded["weight"] = fake_quantize_weight(weight, self.weight, fold)
        bias = head._parameters.get("bias")
        if self.bias is not None and bias is not None:
            rounded["bias"] = fake_quantize_weight(bias, self.bias)
        return rounded

    def finish(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """The group's result from the tensor that reaches its end (before the activation), or None if `member` is not
        the end or the end stays float: then the member's own forward is what counts."""
        behind = self.members
        if self.output is None or (behind and member is not behind[-1]):
            return None
        if self.observing:
            self.output.observe(x)
        return self.output(x) if self.phase.quantize and self.output.ready else None


# -- the classes that members get -------------------------------------------------------------------------------------


class _Head(Member):
    """A convolution or linear layer that begins a group."""

    begins = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group: FusedGroup | None = self.__dict__.get(KEY)
        if group is None:
            return super().forward(input)  # type: ignore[no-any-return]
        if group.begin(self, [input]):
            deployed: Tensor = group.deployed_now(self)(input)
            return deployed
        x = group.round_input(input)
        quantize = group.phase.quantize and (group.observing or group.ready)
        with hidden(self, group.rounded_parameters(self) if quantize else {}):
            y: Tensor = super().forward(x)
        rounded = group.finish(self, y)
        return y if rounded is None else rounded


class _BatchNormMember(Member):
    """The batch norm of a group: itself, with statistics that the schedule can stop."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group: FusedGroup | None = self.__dict__.get(KEY)
        if group is None:
            return super().forward(input)  # type: ignore[no-any-return]
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


class _ActivationMember(Member):
    """The activation of a group: where the end is rounded, the clamp of the grid does its work."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        group: FusedGroup | None = self.__dict__.get(KEY)
        if group is None:
            return super().forward(input)  # type: ignore[no-any-return]
        if group.integer_pass:
            return input
        rounded = group.finish(self, input)
        if rounded is not None:
            return rounded
        y: Tensor = super().forward(input)
        return y


def install(group: FusedGroup, head: nn.Module) -> None:
    """Make `head` and the group's members work as one; parameters, buffers, names and hooks are not touched."""
    roles: list[tuple[nn.Module | None, type[Member]]] = [
        (head, _Head),
        (group.batch_norm, _BatchNormMember),
        (group.activation, _ActivationMember),
    ]
    for module, role in roles:
        if module is not None:
            join(group, module, role)


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


def _folded_bias(head: nn.Module, norm: nn.Module | None, spec: TensorSpec | None = None) -> Tensor:
    """b' = (b - mu) k + beta, float64 (C,); b on the grid of `spec` if it has one."""
    weight, parameter = weight_of(head), head._parameters.get("bias")
    bias: Tensor | None = parameter
    if bias is not None and spec is not None:
        bias = fake_quantize_weight(bias.detach(), spec)
    b = weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.detach().double()
    if norm is None:
        return b
    assert isinstance(norm, BatchNorm) and norm.running_mean is not None
    b = (b - norm.running_mean.double()) * _channel_factor(norm)
    return b if norm.bias is None else b + norm.bias.detach().double()


def fold(head: nn.Module, norm: nn.Module | None, spec: TensorSpec, bias: TensorSpec | None = None) -> FoldedWeight:
    """The head's weight on the integers that training used, with batch norm folded in.

    Args:
        head: Conv1d/2d/3d or Linear.
        norm: the batch norm behind it with running statistics, or None.
        spec: the grid of the weight.
        bias: the grid of the head's bias, or None.
    """
    w = weight_of(head).detach()
    w = w if w.dtype == torch.float64 else w.float()
    k = w.new_ones(w.shape[0], dtype=torch.float64) if norm is None else _channel_factor(norm)
    column = [-1, *[1] * (w.dim() - 1)]
    c, negative = k.abs().view(column), (k < 0).view(column)
    if spec.kernel(w.dim())[0] == 1:  # (1): the integers are those of the unfolded weight
        grid = weight_grid(w, spec)
        q, scale = quantize_weight(w, grid, spec), grid.scale.double() * c
    else:
        grid = weight_grid(w * c.to(w.dtype), spec)
        q, scale = quantize_weight(w * c.to(w.dtype), grid, spec), grid.scale.double()
    zero = grid.zero_point
    # sign(k) goes into the integers: -q, or the mirror of q on an unsigned grid; the zero point goes with them.
    mirror = spec.qmin + spec.qmax
    q = torch.where(negative, mirror - q, q)
    if zero is not None:
        zero = torch.where(negative, mirror - zero, zero)
        scale = scale.expand_as(zero)
    lead = 0 if zero is None else 1  # a zero point may differ between the channels of a block
    scale, zero = one_a_block(scale, spec, lead), None if zero is None else one_a_block(zero, spec, lead)
    if scale.dim() == 1:
        q, scale = _steps_for_empty_channels(q, scale, zero)
    return FoldedWeight(
        q=(q - spec.offset).to(storage(spec)),
        scale=scale.to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny),
        zero_point=None if zero is None else (zero - spec.offset).to(storage(spec)),
        bias=_folded_bias(head, norm, bias),
    )


def _steps_for_empty_channels(q: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """A channel of zeros (gamma = 0, pruned) is its bias: on a small step, which `_widened` raises as far as int32 needs."""
    column = [-1, *[1] * (q.dim() - 1)]
    level = (torch.zeros_like(scale) if zero is None else zero).to(q.dtype).view(column)
    q = torch.where((scale == 0).view(column), level, q)
    return q, torch.where((q == level).flatten(1).all(1), 2.0**-23, scale)


def folded_float(head: nn.Module, norm: nn.Module | None, bias: TensorSpec | None = None) -> tuple[Tensor, Tensor]:
    """(float32 weight, float64 bias) with batch norm folded in, for a layer whose weight is not quantized."""
    w = weight_of(head).detach().double()
    if norm is not None:
        w = w * _channel_factor(norm).view(-1, *[1] * (w.dim() - 1))
    return w.to(torch.float32), _folded_bias(head, norm, bias)


def runs_on_integers(spec: TensorSpec | None) -> bool:
    """Whether integer kernels take a tensor on this grid: up to 8 bits, one scale for it or for each output channel."""
    return spec is not None and spec.bits <= 8 and spec.granularity in ("per_tensor", "out_channel")


def deployed_layer(head: nn.Module, group: FusedGroup) -> nn.Module:
    """The layer that replaces a group after training, from its numbers as they are now; owns all its tensors."""
    geometry, norm = Geometry.of(head), group.batch_norm
    x = None if group.input is None else group.input.grid()
    y = None if group.output is None else group.output.grid()
    cap = None if group.activation is None else next(c for t, c in ACTIVATIONS.items() if isinstance(group.activation, t))
    rectify = None if cap is None or isinstance(y, Grid) else (0.0, cap)
    whole = all(runs_on_integers(spec) for spec in (group.weight, *(q.spec for q in group.quantizers)))
    if whole and group.weight is not None and isinstance(x, Grid) and (isinstance(y, Grid) or geometry.kind == "linear"):
        assert not isinstance(y, BlockGrid)
        layer: nn.Module = IntegerLayer(fold(head, norm, group.weight, group.bias), geometry, x, y, rectify)
    elif group.weight is None:
        layer = PartlyIntegerLayer(folded_float(head, norm, group.bias), geometry, x, y, rectify)
    else:
        layer = PartlyIntegerLayer(fold(head, norm, group.weight, group.bias), geometry, x, y, rectify)
    return layer.to(weight_of(head).device)
