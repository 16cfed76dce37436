# SPDX-License-Identifier: Apache-2.0
"""Owns folding: the norms of a group go into the weight and bias of its layer, on the integers that training used.

Notation: k = gamma / sigma and t = beta - mu k are the scale and shift of a norm in eval mode. Behind a layer

    k (w x + b) + t = (k w) x + (k b + t)                            k over the output channels

before it, where the layer sees every input once or not at all (no padding),

    w (k x + t) + b = (w k) x + (b + sum w t)                        k over the input channels

The batch norm that is a group's head is a layer of one weight per channel: w = k, on 127 levels, exactly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_quant.config import TensorSpec
from lightning_quant.integer import FoldedWeight, bias_steps, one_a_block, storage
from lightning_quant.patterns import TRANSPOSED, BatchNorm, affine_of
from lightning_quant.quantizers import wide
from lightning_quant.targets import parameter_of
from lightning_quant.weights import WeightGrid, WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weighted layer with its norms: what a fold reads. `weight`, `bias`: the quantizers of its parameters, or None."""

    head: nn.Module
    norm_before: nn.Module | None = None
    norm: nn.Module | None = None
    weight: WeightQuantizer | None = None
    bias: WeightQuantizer | None = None


def weight_of(head: nn.Module) -> Tensor:
    """The Parameter itself, also while a rounded tensor hides it; while it is being pruned, what is left of it."""
    weight = parameter_of(head, "weight")
    assert weight is not None
    return weight


def channels_of(head: nn.Module) -> int:
    """How many channels a weighted layer makes."""
    weight = weight_of(head)
    return weight.shape[1] * head.groups if isinstance(head, TRANSPOSED) else weight.shape[0]


def affine_problem(norm: nn.Module, head: nn.Module) -> str | None:
    """Why the user's function does not say what a norm behind `head` does; None if it does, or there is none.

    Held against the norm's own forward in eval mode, on a tensor of the head's output's dimensions.
    """
    affine, weight = affine_of(norm), head._parameters.get("weight")
    if affine is None or weight is None:
        return None
    channels = channels_of(head)
    scale, shift = affine(norm)
    if (found := [tuple(scale.shape), tuple(shift.shape)]) != [(channels,)] * 2:
        return f"gives shapes {found}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *[3] * (weight.dim() - 2), generator=generator).to(scale)
    alone = copy.deepcopy(norm).eval()
    alone._forward_hooks.clear()
    alone._forward_pre_hooks.clear()
    with torch.no_grad():
        try:
            y = alone(x)
        except Exception as error:  # noqa: BLE001  (the user's own forward)
            return f"cannot be held against its forward, which fails on a tensor of shape {tuple(x.shape)}: {error}"
        shape = [1, channels, *[1] * (x.dim() - 2)]
        difference = (y - (x * scale.view(shape) + shift.view(shape))).abs().max() / (y.abs().max() + 1e-12)
    return None if difference <= 1e-3 else f"is not what it computes in eval mode: relative difference {float(difference):.2g}"


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(k, t) of a norm by its running statistics, float64 (C,), detached."""
    affine = affine_of(norm)
    if affine is not None:
        k, t = (side.detach().double() for side in affine(norm))
        return k, t
    assert isinstance(norm, BatchNorm) and norm.running_var is not None and norm.running_mean is not None
    k = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    weight, bias = (
        parameter_of(norm, key) if f"{key}_mask" in norm._buffers else getattr(norm, key) for key in ("weight", "bias")
    )
    k = k if weight is None else k * weight.detach().double()
    t = -norm.running_mean.detach().double() * k
    return k, t if bias is None else t + bias.detach().double()


def over_outputs(values: Tensor, head: nn.Module) -> Tensor:
    """One value for each output channel, (C,), to broadcast against the head's weight."""
    weight = weight_of(head)
    if not isinstance(head, TRANSPOSED):
        return values.view(-1, *[1] * (weight.dim() - 1))
    # (in, out / groups, ..): the rows of one group of inputs make the same group of outputs.
    spread = values.view(head.groups, 1, -1).expand(-1, weight.shape[0] // head.groups, -1)
    return spread.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def over_inputs(values: Tensor, head: nn.Module) -> Tensor:
    """One value for each input channel to broadcast against the weight of a convolution or linear layer."""
    weight = weight_of(head)
    groups = int(getattr(head, "groups", 1))
    spread = values.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return spread.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _factor(layer: Layer, dtype: torch.dtype) -> Tensor | None:
    """|k| of the norms on both sides, to broadcast against the weight; None without norms. 1 for a dead input channel."""
    factor: Tensor | None = None
    if layer.norm is not None:
        factor = over_outputs(scale_and_shift(layer.norm)[0].abs(), layer.head)
    if layer.norm_before is not None:
        k = scale_and_shift(layer.norm_before)[0].abs()
        before = over_inputs(torch.where(k > 0, k, 1.0), layer.head)
        factor = before if factor is None else factor * before
    return None if factor is None else factor.to(dtype)


def grid_factor(layer: Layer) -> Tensor | None:
    """What the weight is multiplied by before it is rounded, to broadcast against it; None where norms leave integers alone."""
    weight, quantizer = weight_of(layer.head), layer.weight
    if quantizer is None or _commutes(layer, quantizer):
        return None
    return _factor(layer, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def rounded_weight(layer: Layer) -> Tensor:
    """The layer's weight as training uses it: such that folded it lies on the grid of `layer.weight`; with gradient.

    Where a norm's k stands outside the grid's own scales (one for each output channel, symmetric), the fold changes nothing of
    the integers and the weight is rounded as it is.
    """
    weight, quantizer = weight_of(layer.head), layer.weight
    assert quantizer is not None
    if _commutes(layer, quantizer):
        return quantizer.rounded(weight)
    channel = None
    if isinstance(layer.head, TRANSPOSED):
        channel = (weight.shape[0] // layer.head.groups, 1, *[-1] * (weight.dim() - 2))
    return quantizer.rounded(weight, grid_factor(layer), channel)


def _commutes(layer: Layer, quantizer: WeightQuantizer) -> bool:
    """Whether the norms of a layer multiply the scales of its weight and leave the integers."""
    alone = layer.norm_before is None and not isinstance(layer.head, TRANSPOSED)
    return quantizer.unfolded or (alone and quantizer.commutes(weight_of(layer.head)))


def folded_bias(layer: Layer) -> Tensor:
    """b' = b k + t (with what a norm before the layer adds to b), float64 (C,); b on its grid if it has one."""
    weight, bias = weight_of(layer.head), parameter_of(layer.head, "bias")
    if bias is not None and layer.bias is not None:
        with torch.no_grad():
            bias = layer.bias.rounded(bias)
    b = weight.new_zeros(channels_of(layer.head), dtype=torch.float64) if bias is None else bias.detach().double()
    if layer.norm_before is not None:
        w = (weight if layer.weight is None else rounded_weight(layer)).detach().double()
        shift = over_inputs(scale_and_shift(layer.norm_before)[1], layer.head)
        b = b + (w * shift).flatten(1).sum(1)
    if layer.norm is None:
        return b
    k, t = scale_and_shift(layer.norm)
    return b * k + t


def _signs(layer: Layer) -> Tensor | None:
    """Where the fold turns the sign of a weight, to broadcast against it."""
    negative: Tensor | None = None
    if layer.norm is not None:
        negative = over_outputs(scale_and_shift(layer.norm)[0] < 0, layer.head)
    if layer.norm_before is not None:
        before = over_inputs(scale_and_shift(layer.norm_before)[0] < 0, layer.head)
        negative = before if negative is None else negative ^ before
    return negative


def folded_grid(layer: Layer) -> tuple[WeightGrid, Tensor, Tensor, TensorSpec]:
    """(grid, what has its integers there, the float64 scales of the folded weight, their spec); the weight is quantized."""
    quantizer = layer.weight
    assert quantizer is not None
    spec, w, factor = quantizer.spec, wide(weight_of(layer.head).detach()), _factor(layer, torch.float64)
    if not _commutes(layer, quantizer):
        w = w if factor is None else w * factor.to(w.dtype)
        grid = quantizer.grid(w)
        return grid, w, grid.scale.double(), spec
    grid = quantizer.grid(w)  # (1) in fusion.py: the integers are those of the unfolded weight
    if factor is None:
        return grid, w, grid.scale.double(), spec
    if spec.granularity == "per_tensor":  # one scale, times one for each channel
        spec = replace(spec, granularity="out_channel")
    return grid, w, grid.scale.double() * factor, spec


def bias_error(layer: Layer, x_scale: float | Tensor) -> Tensor:
    """What the int32 grid of the deployed layer adds to its bias, float64 (C,), at most half a step s_x s_w.

    For weights with one scale, or one for each output channel; `x_scale`: the scale of the layer's input.
    """
    _, _, scale, _ = folded_grid(layer)
    bias = folded_bias(layer)
    step = bias_steps(scale.flatten().expand(bias.shape[0]).to(torch.float32), bias, x_scale)
    return torch.round(bias / step).mul_(step).sub_(bias)


def fold(layer: Layer) -> FoldedWeight:
    """The layer's weight on the integers that training used, with its norms folded in."""
    quantizer, head = layer.weight, layer.head
    assert quantizer is not None
    grid, w, scale, spec = folded_grid(layer)
    q, zero, negative = quantizer.integers(w, grid), grid.zero_point, _signs(layer)
    # sign(k) goes into the integers: -q, or the mirror of q on an unsigned grid; the zero point goes with them.
    mirror = spec.qmin + spec.qmax
    if negative is not None:
        q = torch.where(negative, mirror - q, q)
        zero = None if zero is None else torch.where(negative, mirror - zero, zero)
    if layer.norm_before is not None:  # a dead input channel adds nothing but its shift, which is in the bias
        dead = over_inputs(scale_and_shift(layer.norm_before)[0] == 0, head)
        q = torch.where(dead, torch.zeros_like(q) if zero is None else zero, q)
    if zero is not None:
        scale = scale.expand_as(zero)
    lead = 0 if zero is None else 1  # a zero point may differ between the channels of a block
    scale, zero = one_a_block(scale, spec, lead), None if zero is None else one_a_block(zero, spec, lead)
    if scale.dim() == 1 and not isinstance(head, TRANSPOSED):
        q, scale = _steps_for_empty_channels(q, scale, zero)
    return FoldedWeight(
        q=(q - spec.offset).to(storage(spec)),
        scale=scale.to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny),
        zero_point=None if zero is None else (zero - spec.offset).to(storage(spec)),
        bias=folded_bias(layer),
    )


def _steps_for_empty_channels(q: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """A channel of zeros (gamma = 0, pruned) is its bias: on a small step, which `_widened` raises as far as int32 needs."""
    column = [-1, *[1] * (q.dim() - 1)]
    level = (torch.zeros_like(scale) if zero is None else zero).to(q.dtype).view(column)
    q = torch.where((scale == 0).view(column), level, q)
    return q, torch.where((q == level).flatten(1).all(1), 2.0**-23, scale)


def folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """(weight, bias) with the norms folded in, float64, for a layer whose weight is not quantized."""
    w = weight_of(layer.head).detach().double()
    if layer.norm is not None:
        w = w * over_outputs(scale_and_shift(layer.norm)[0], layer.head)
    if layer.norm_before is not None:
        w = w * over_inputs(scale_and_shift(layer.norm_before)[0], layer.head)
    return w, folded_bias(layer)


def folded_float(layer: Layer) -> tuple[Tensor, Tensor]:
    """(float32 weight, float64 bias) with the norms folded in."""
    weight, bias = folded(layer)
    return weight.to(torch.float32), bias


def channel_weight(norm: nn.Module) -> FoldedWeight:
    """A batch norm in eval mode as a convolution with one weight of +-127 for each channel: exact, whatever k is."""
    k, t = scale_and_shift(norm)
    q = torch.sign(k).mul_(127).to(torch.int8).view(-1, 1, 1)
    scale = torch.where(k == 0, 2.0**-23, k.abs() / 127).to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)
    return FoldedWeight(q=q, scale=scale, zero_point=None, bias=t)


def channel_float(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(float32 weight (C, 1, 1), float64 bias) of a batch norm in eval mode."""
    k, t = scale_and_shift(norm)
    return k.to(torch.float32).view(-1, 1, 1), t
