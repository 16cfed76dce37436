# SPDX-License-Identifier: Apache-2.0
"""Owns the forward of an integer layer without operators: the same integers, held in float32, as fast as a float layer.

What `operators.py` computes from int8 weights and uint8 tensors at every call is made once here, or left out: weights and
multipliers are float32 already, integers stay in float32, and zero points move into the ends of clamps. Integers below 2^24
are exact in float32, so that both ways give equal values (a zero may have another sign, and what is NaN stays NaN here, where
an integer has no NaN). Nothing here is seen by exporters, compilers or whatever watches operators: for them `plain` is false.

A sum of products of inputs in [lo, hi], lo <= 0 <= hi, in any order and however far it has come, lies between

    -(hi sum(w-) - lo sum(w+))  and  hi sum(w+) - lo sum(w-)         w+ = max(w, 0), w- = max(-w, 0)

Where one of these reaches 2^24, the input channels are split into parts for which neither does. Two parts are added in float32,
which rounds their sum once, as conversion of the exact integer would; more are added in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant import onednn
from lightning_quant.geometry import Geometry
from lightning_quant.operators import along_channels, exact_float, is_exact_float, step_on
from lightning_quant.quantizers import Grid

EXACT_FLOAT32 = 2**24
_LARGE, _FEW = 2**16, 9  # values of a weight, places in all samples
Buffers = Mapping[str, Tensor | None]
Settings = tuple[Geometry, Grid, Grid | None, tuple[float, float] | None]
_BUFFERS = ("weight", "scale", "zero_point", "bias")


def plain(x: Any) -> bool:
    """Whether a forward on x only has to compute: nothing traces, exports, transforms, watches or differentiates it."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler follows no further
        and type(x) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def carried(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` in the dtype that came in; float32 under autocast, because 8 bits of mantissa cannot hold 256 levels."""
    return out if dtype == torch.float32 or torch.is_autocast_enabled(out.device.type) else out.to(dtype)


def round_to(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """clamp(round(x / scale), low, high) in float32, a new tensor; scale: (); the ends count from the zero point."""
    return torch.div(x if x.dtype == torch.float32 else x.float(), scale).round_().clamp_(low, high)


# -- sums -------------------------------------------------------------------------------------------------------------


Sides = tuple[Tensor, Tensor]  # sum(w+) and sum(w-) of each output and input channel: (C, I) each, float64


def sides_of(weight: Tensor, zero_point: Tensor | None) -> Sides:
    """The sums of the positive and of the negative q_w - z_w; weight: integers (C, I, ...)."""
    w = shifted(weight, zero_point).flatten(2) if weight.dim() > 2 else shifted(weight, zero_point).unsqueeze(2)
    return w.clamp(min=0).sum(2, dtype=torch.float64), w.clamp(max=0).sum(2, dtype=torch.float64).neg()


def shifted(weight: Tensor, zero_point: Tensor | None) -> Tensor:
    """q_w - z_w in float32: exact, because integers have at most 16 bits."""
    w = weight.to(torch.float32)
    return w if zero_point is None else w - along_channels(zero_point, w.dim(), 0).to(torch.float32)


def worst_sum(sides: Sides, bias: Tensor | None, x: Grid) -> float:
    """The largest |partial sum| that any input on the grid can cause; bias: (C,)."""
    low, high = x.qmin - x.zero_point, x.qmax - x.zero_point
    up, down = (side.sum(1) for side in sides)
    most, least = high * up - low * down, high * down - low * up
    if bias is not None:
        most, least = most + bias.double().clamp(min=0), least - bias.double().clamp(max=0)
    return float(torch.maximum(most, least).max())


def parts_of(sides: Sides, bias: Tensor, x: Grid) -> tuple[list[int], bool] | None:
    """(numbers of input channels whose sums are exact in float32, whether the first ones' can take the bias).

    None where a single input channel is too much.
    """
    late = float(bias.double().abs().max()) >= EXACT_FLOAT32 / 2
    for number in range(1, sides[0].shape[1] + 1):
        parts = list(zip(*(side.tensor_split(number, 1) for side in sides), strict=True))
        biases = [None if late else bias, *[None] * (number - 1)]
        if all(worst_sum(part, one, x) < EXACT_FLOAT32 for part, one in zip(parts, biases, strict=True)):
            return [up.shape[1] for up, _ in parts], not late
    return None


def convolve_few(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor | None:
    """`F.conv2d` as one matrix product, for a large weight that meets few places; None where that is no gain.

    torch's convolution would spend most of its time on reordering the weight: 3.2 ms for 512 x 512 x 3 x 3 on 2 x 2 places, where
    this takes 0.8 (AMD EPYC, one thread). Exact sums are the same in any order.
    """
    g, kernel = geometry, w.shape[2:]
    if g.groups != 1 or w.numel() < _LARGE or len(kernel) != 2 or x.device.type != "cpu":
        return None
    rows = zip(x.shape[2:], g.padding, g.dilation, kernel, g.stride, strict=True)
    height, width = ((size + 2 * pad - wide * (k - 1) - 1) // step + 1 for size, pad, wide, k, step in rows)
    if not 0 < len(x) * height * width <= _FEW:
        return None
    columns = F.unfold(x, tuple(kernel), g.dilation, g.padding, g.stride).transpose(1, 2)
    return F.linear(columns, w.flatten(1), bias).transpose(1, 2).contiguous().view(len(x), len(w), height, width)


# -- the layer --------------------------------------------------------------------------------------------------------


class DirectLayer:
    """The numbers of an `IntegerLayer` as its forward uses them, from its buffers as they are now; in no state dict.

    Args:
        buffers: of the layer, by name: weight, scale, zero_point, bias.
        settings: of the layer: geometry, grid of the input, grid of the output, ends of an activation on a float output.

    `mode`: "onednn" for torch's int8 kernels, where they can run this layer. `possible`: whether its sums can be split so that
    float32 holds them; else the operators compute in float64. The weights are held in float32, beside the layer's int8, or packed
    for those kernels: four bytes more a weight, or one, from the first forward on.
    """

    def __init__(self, buffers: Buffers, settings: Settings, mode: str = "integer") -> None:
        weight, scale, zero_point, bias = (buffers[name] for name in _BUFFERS)
        assert weight is not None
        assert scale is not None
        assert bias is not None
        self.made_from, self.marks, self.settings, self.mode = dict(buffers), marks_of(buffers), settings, mode
        self.geometry, self.x, self.y, self.rectify = settings
        g, x, y, dim = self.geometry, self.x, self.y, weight.dim()
        linear = g.kind == "linear"
        sides = sides_of(weight, zero_point)
        found = parts_of(sides, bias, x)
        self.possible = found is not None and scale.dtype == torch.float32  # `.half()` reaches scales
        if found is None:
            return
        self.widths, early = found
        self.parts: list[Tensor | onednn.Kernel] = []
        if mode == "onednn" and not onednn.problem(weight, zero_point, x, g):
            biases = [bias if early else None, *[None] * (len(self.widths) - 1)]
            pieces = zip(weight.split(self.widths, 1), biases, strict=True)
            self.parts += [onednn.Kernel(piece, one, x, g) for piece, one in pieces]
        else:
            self.parts += [part.contiguous() for part in shifted(weight, zero_point).split(self.widths, 1)]
        self.bias = bias.to(torch.float32) if early else None
        self.late = None if early else bias.double()
        self.x_scale = step_on(x.scale, weight.device)
        self.low, self.high = x.qmin - x.zero_point, x.qmax - x.zero_point
        factor = x.scale * scale
        if y is not None:
            self.y_scale = step_on(y.scale, weight.device)
            self.y_low, self.y_high = y.clip_low - y.zero_point, y.clip_high - y.zero_point
            factor = factor / self.y_scale
        self.factor = along_channels(factor, 2 if linear else dim, 1)
        self.dim, self.function = dim, "linear" if linear else f"conv{dim - 2}d"
        self.options: tuple[Any, ...] = () if linear else (g.stride, g.padding, g.dilation, g.groups)

    def __call__(self, input: Tensor) -> Tensor:
        """As `IntegerLayer.forward`, for a plain input."""
        x = self.geometry.for_kernel(input, self.dim)
        out = self._sum(round_to(x, self.x_scale, self.low, self.high)).mul_(self.factor)
        if self.y is not None:
            out = out.round_().clamp_(self.y_low, self.y_high).mul_(self.y_scale)
        elif self.rectify is not None:
            out = out.clamp_(*self.rectify)
        return carried(self.geometry.from_kernel(out, input, self.dim), input.dtype)

    def _sum(self, q: Tensor) -> Tensor:
        """The exact sums with the bias, rounded to float32: a new tensor. q: integers from the zero point on."""
        device = q.device.type
        if is_exact_float(device):
            return self._summed(q)
        with exact_float(device):
            return self._summed(q)

    def _summed(self, q: Tensor) -> Tensor:
        if len(self.parts) == 1 and self.late is None:
            return self._multiply(q, self.parts[0], self.bias)
        inputs = self._split(q)
        first = self._multiply(inputs[0], self.parts[0], self.bias)
        if len(self.parts) == 2 and self.late is None:
            return first.add_(self._multiply(inputs[1], self.parts[1], None))
        total = first.double()
        for one, part in zip(inputs[1:], self.parts[1:], strict=True):
            total.add_(self._multiply(one, part, None))
        if self.late is not None:
            total.add_(along_channels(self.late, total.dim(), 1))
        return total.float()

    def _multiply(self, q: Tensor, w: Tensor | onednn.Kernel, bias: Tensor | None) -> Tensor:
        if isinstance(w, onednn.Kernel):  # it has the bias
            return w(q)
        if self.dim == 4 and (few := convolve_few(q, w, bias, self.geometry)) is not None:
            return few
        out: Tensor = getattr(F, self.function)(q, w, bias, *self.options)
        return out

    def _split(self, q: Tensor) -> list[Tensor]:
        """The input channels of the parts; those of every group."""
        groups = self.geometry.groups
        if len(self.parts) == 1:
            return [q]
        if groups == 1:
            return list(q.split(self.widths, 1))
        grouped = q.unflatten(1, (groups, -1)).split(self.widths, 2)
        return [one.flatten(1, 2) for one in grouped]


def marks_of(buffers: Buffers) -> list[int] | None:
    """What changes when a buffer is exchanged, written to, or given other data; None where writing leaves no mark."""
    marks: list[int] = []
    try:
        for name in _BUFFERS:
            if (one := buffers[name]) is not None:
                marks += (id(one), one._version, one.data_ptr())
    except RuntimeError:  # made in inference mode
        return None
    return marks
