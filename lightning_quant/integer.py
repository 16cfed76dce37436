# SPDX-License-Identifier: Apache-2.0
"""Owns the deployed layers: int8 weight, int32 bias, requantization; what eval mode runs and what conversion emits.

The arithmetic of a weighted layer, per output channel (x, w, y: integers; s: scales, z: zero points):

    acc = sum (q_x - z_x) (q_w - z_w) + q_b              an exact integer; q_b = round(b / (s_x s_w)) is int32
    q_y = clamp(round_half_even(float32(acc) * m) + z_y)       m = (s_x * s_w) / s_y, in float32, in this order

which is what ONNX Runtime's QLinearConv and QGemm compute, bit for bit. Without an output grid the layer returns
float32(acc) * (s_x * s_w). Convolutions run on integer-valued floats at float speed: exact while every partial sum stays
under 2^24; where the worst case does not, the layer is marked `wide` and accumulates in float64 (exact to 2^53).

Operators (namespace `lightning_quant`, plain integer tensors, usable on any device, with shapes for torch.export):
quantize, dequantize, dequantize_weight, conv, linear. Importing this module is all that a saved program needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.quantizers import Grid

_LIBRARY = torch.library.Library("lightning_quant", "DEF")
_LIBRARY.define("quantize(Tensor x, float scale, int zero_point, int low, int high) -> Tensor")
_LIBRARY.define("dequantize(Tensor q, float scale, int zero_point) -> Tensor")
_LIBRARY.define("dequantize_weight(Tensor q, Tensor scale, Tensor? zero_point) -> Tensor")
_TAIL = "float? y_scale, int y_zero_point, int low, int high, bool wide) -> Tensor"
_HEAD = "Tensor q, float x_scale, int x_zero_point, Tensor weight, Tensor scale, Tensor? zero_point, Tensor bias"
_LIBRARY.define(f"conv({_HEAD}, int[] stride, int[] padding, int[] dilation, int groups, {_TAIL}")
_LIBRARY.define(f"linear({_HEAD}, {_TAIL}")

EXACT_FLOAT32 = 2**24
_INT32_MAX = 2**31 - 1


# Where torch keeps the precision of its float32 kernels, by device; each holds "none", "ieee", "tf32" or "bf16".
_BACKENDS: Any = torch.backends  # its submodules are not typed
_PRECISIONS: dict[str, tuple[Any, ...]] = {
    "cpu": (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv),
    "cuda": (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv),
}


@contextlib.contextmanager
def _exact_float(device: str) -> Iterator[None]:
    """No autocast, no TF32, no bfloat16 matmul: integer-valued floats must stay integers."""
    loose = [(b, b.fp32_precision) for b in _PRECISIONS.get(device, ()) if b.fp32_precision not in ("none", "ieee")]
    for backend, _ in loose:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, precision in loose:
            backend.fp32_precision = "none"  # inherits again, if that is where the value came from
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    q = torch.div(x.float(), scale).round_().add_(zero_point).clamp_(low, high)
    return q.to(torch.uint8)


def _dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


def _along_channels(values: Tensor, dim: int, channel: int) -> Tensor:
    """A per-channel vector reshaped to broadcast along `channel`; a scalar as it is."""
    if values.dim() == 0:
        return values
    shape = [1] * dim
    shape[channel] = -1
    return values.view(shape)


def _dequantize_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    w = q.to(torch.float32)
    if zero_point is not None:
        w -= _along_channels(zero_point, q.dim(), 0).to(torch.float32)
    return w.mul_(_along_channels(scale, q.dim(), 0))


def _operands(q: Tensor, x_zero: int, weight: Tensor, zero: Tensor | None, wide: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    w = weight.to(dtype)
    if zero is not None:
        w -= _along_channels(zero, weight.dim(), 0).to(dtype)
    return q.to(dtype).sub_(x_zero), w


def _requantize(acc: Tensor, real: Tensor, channel: int, y_scale: float | None, y_zero: int, low: int, high: int) -> Tensor:
    """acc: exact integers, float32 or float64; real: s_x * s_w in float32, () or (C,)."""
    if y_scale is None:
        return acc.to(torch.float32) * _along_channels(real, acc.dim(), channel)
    multiplier = _along_channels(real / y_scale, acc.dim(), channel)
    q = (acc.to(torch.float32) * multiplier).round_().clamp_(low - y_zero, high - y_zero).add_(y_zero)
    return q.to(torch.uint8)


def _conv(
    q: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    y_scale: float | None,
    y_zero_point: int,
    low: int,
    high: int,
    wide: bool,
) -> Tensor:
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    with _exact_float(q.device.type):
        x, w = _operands(q, x_zero_point, weight, zero_point, wide)
        acc = convolve(x, w, bias.to(w.dtype), stride, padding, dilation, groups)
    return _requantize(acc, x_scale * scale, 1, y_scale, y_zero_point, low, high)


def _linear(
    q: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor,
    y_scale: float | None,
    y_zero_point: int,
    low: int,
    high: int,
    wide: bool,
) -> Tensor:
    with _exact_float(q.device.type):
        x, w = _operands(q, x_zero_point, weight, zero_point, wide)
        acc = F.linear(x, w, bias.to(w.dtype))
    return _requantize(acc, x_scale * scale, 1, y_scale, y_zero_point, low, high)


def _quantize_shape(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _dequantize_shape(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


for _name, _kernel, _shape in (
    ("quantize", _quantize, _quantize_shape),
    ("dequantize", _dequantize, _dequantize_shape),
    ("dequantize_weight", _dequantize_weight, _dequantize_weight),
    ("conv", _conv, _conv),
    ("linear", _linear, _linear),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightning_quant::{_name}", _shape, lib=_LIBRARY)


# -- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FoldedWeight:
    """A weighted layer after folding, on the host of its choice; what every deployed layer is made from.

    q: (C, ...) integers of the folded weight as int8. scale: float32, (C,) or (). zero_point: int8 like scale, or None
    for 0. bias: float64 (C,), real valued, not yet on a grid.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a weighted layer does apart from its numbers. kind: 'conv' or 'linear'; pad: for `F.pad`, or None."""

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad: tuple[int, ...] | None = None
    pad_mode: str = "constant"

    def prepared_input(self, x: Tensor) -> Tensor:
        """x padded where the convolution itself cannot pad so (reflect, circular, replicate, uneven 'same')."""
        return x if self.pad is None else F.pad(x, self.pad, mode=self.pad_mode)

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """The geometry of a Conv1d, Conv2d, Conv3d or Linear."""
        if isinstance(layer, nn.Linear):
            return cls(kind="linear")
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d), type(layer)
        stride, dilation = (_per_dimension(value, layer) for value in (layer.stride, layer.dilation))
        groups = layer.groups
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            pad = _explicit_padding(layer)
            if layer.padding_mode != "zeros" or pad[::2] != pad[1::2]:
                mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
                none = (0,) * len(stride)
                return cls(kind="conv", stride=stride, padding=none, dilation=dilation, groups=groups, pad=pad, pad_mode=mode)
            return cls(kind="conv", padding=pad[::-2], stride=stride, dilation=dilation, groups=groups)
        padding = _per_dimension(layer.padding, layer)
        return cls(kind="conv", padding=padding, stride=stride, dilation=dilation, groups=groups)


def _per_dimension(value: int | tuple[int, ...], layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """One number a spatial dimension: torch's forward also takes a bare one, set after the layer was made."""
    return (value,) * (layer.weight.dim() - 2) if isinstance(value, int) else tuple(value)


def _explicit_padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """(left, right, top, bottom, ..) for `F.pad`, as torch's own forward pads: other modes by what the layer was made with."""
    if layer.padding_mode != "zeros":
        return tuple(layer._reversed_padding_repeated_twice)
    sides: list[int] = []
    for dilation, size in zip(reversed(_per_dimension(layer.dilation, layer)), reversed(layer.kernel_size), strict=True):
        total = dilation * (size - 1) if layer.padding == "same" else 0
        sides += [total // 2, total - total // 2]
    return tuple(sides)


def _widened(folded: FoldedWeight, x_scale: float) -> FoldedWeight:
    """The same weight on steps large enough for its bias: s_w >= 2 |b| / (s_x (2^31 - 1)), else int32 overflows."""
    least = (folded.bias.abs() * 2 / (x_scale * _INT32_MAX)).to(torch.float32)
    floor = least if folded.scale.dim() else least.max()
    if not bool((floor > folded.scale).any()):
        return folded
    scale = torch.maximum(folded.scale, floor)
    ratio = _along_channels(folded.scale.double() / scale.double(), folded.q.dim(), 0)
    zero = torch.zeros_like(folded.scale, dtype=torch.int8) if folded.zero_point is None else folded.zero_point
    shift = _along_channels(zero, folded.q.dim(), 0).double()
    q = ((folded.q.double() - shift) * ratio).round_().add_(shift).to(torch.int8)
    return FoldedWeight(q=q, scale=scale, zero_point=folded.zero_point, bias=folded.bias)


def _carried(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` in the dtype that came in; float32 under autocast, because 8 bits of mantissa cannot hold 256 levels."""
    return out if dtype == torch.float32 or torch.is_autocast_enabled(out.device.type) else out.to(dtype)


class IntegerLayer(nn.Module):
    """A convolution or linear layer on integers: float tensor in, float tensor out, both on their grids.

    Args:
        folded: weight and bias with batch norm folded in.
        geometry: stride, padding and the rest.
        x: grid of the input.
        y: grid of the output; None for a float output (high-precision head).
        rectify: (low, high) of an activation on a float output, or None; on a grid the clamp does it.

    Shapes: as `nn.Conv*d` and `nn.Linear`; any floating dtype in, the same dtype out (float32 under autocast).
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor

    def __init__(
        self,
        folded: FoldedWeight,
        geometry: Geometry,
        x: Grid,
        y: Grid | None,
        rectify: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.x, self.y, self.geometry = x.unsigned(), None if y is None else y.unsigned(), geometry
        self.rectify = rectify
        folded = _widened(folded, self.x.scale)
        step = self.x.scale * folded.scale.double()
        self.register_buffer("weight", folded.q)
        self.register_buffer("scale", folded.scale)
        self.register_buffer("zero_point", folded.zero_point)
        self.register_buffer("bias", torch.round(folded.bias / step).clamp_(-_INT32_MAX, _INT32_MAX).to(torch.int32))
        self.wide = self._worst_sum() >= EXACT_FLOAT32
        self.eval()

    def _worst_sum(self) -> float:
        """The largest |partial sum| that any input on the grid can cause."""
        w = self.weight.double()
        if self.zero_point is not None:
            w = w - _along_channels(self.zero_point, w.dim(), 0).double()
        reach = max(self.x.zero_point - self.x.qmin, self.x.qmax - self.x.zero_point)
        return float((w.abs().flatten(1).sum(1) * reach + self.bias.double().abs()).max())

    def forward(self, x: Tensor) -> Tensor:
        """Quantize, multiply and accumulate, requantize, dequantize."""
        ops, grid, g = torch.ops.lightning_quant, self.x, self.geometry
        dtype = x.dtype
        x = g.prepared_input(x)
        lead = x.shape[:-1]
        if g.kind == "linear" and x.dim() != 2:
            x = x.reshape(-1, x.shape[-1])
        unbatched = g.kind == "conv" and x.dim() == self.weight.dim() - 1
        if unbatched:
            x = x.unsqueeze(0)
        q = ops.quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
        out = self._multiply(q)
        if self.y is not None:
            out = ops.dequantize(out, self.y.scale, self.y.zero_point)
        elif self.rectify is not None:
            out = out.clamp(*self.rectify)
        if g.kind == "linear" and len(lead) != 1:
            out = out.reshape(*lead, out.shape[-1])
        if unbatched:
            out = out.squeeze(0)
        return _carried(out, dtype)

    def _multiply(self, q: Tensor) -> Tensor:
        ops, g, y = torch.ops.lightning_quant, self.geometry, self.y
        head = (q, self.x.scale, self.x.zero_point, self.weight, self.scale, self.zero_point, self.bias)
        tail = (None, 0, 0, 0, self.wide) if y is None else (y.scale, y.zero_point, y.clip_low, y.clip_high, self.wide)
        if g.kind == "linear":
            out: Tensor = ops.linear(*head, *tail)
        else:
            out = ops.conv(*head, g.stride, g.padding, g.dilation, g.groups, *tail)
        return out

    def extra_repr(self) -> str:
        """Kind, shape of the weight, what comes in and goes out."""
        y = "float32" if self.y is None else "uint8"
        return f"{self.geometry.kind}, {tuple(self.weight.shape)}, int8 weight, int32 bias, uint8 -> {y}"


class PartlyIntegerLayer(nn.Module):
    """A layer that lacks a grid on its weight or its input, so that no integer kernel can run it: float arithmetic.

    Args:
        folded: the weight on its grid, or a pair (float32 weight, float64 bias) where the weight is not quantized.
        geometry: stride, padding and the rest.
        x: grid of the input, or None.
        y: grid of the output, or None.
        rectify: (low, high) of an activation that no output grid applies, or None.
    """

    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bias: Tensor

    def __init__(
        self,
        folded: FoldedWeight | tuple[Tensor, Tensor],
        geometry: Geometry,
        x: Grid | None,
        y: Grid | None,
        rectify: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.x, self.y = None if x is None else x.unsigned(), None if y is None else y.unsigned()
        self.geometry, self.rectify = geometry, rectify
        whole = isinstance(folded, FoldedWeight)
        self.register_buffer("weight", folded.q if isinstance(folded, FoldedWeight) else folded[0])
        self.register_buffer("scale", folded.scale if isinstance(folded, FoldedWeight) else None)
        self.register_buffer("zero_point", folded.zero_point if isinstance(folded, FoldedWeight) else None)
        bias = folded.bias if isinstance(folded, FoldedWeight) else folded[1]
        self.register_buffer("bias", bias.to(torch.float32))
        self.weight_quantized = whole
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Round the input, run the float layer on the dequantized weight, round the output."""
        ops, g = torch.ops.lightning_quant, self.geometry
        dtype, w = x.dtype, self.weight
        if torch.is_autocast_enabled(x.device.type):  # validation must compute what is shipped, in float32
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float())
        if self.scale is not None:
            w = ops.dequantize_weight(w, self.scale, self.zero_point)
        if self.x is not None:
            q = ops.quantize(x, self.x.scale, self.x.zero_point, self.x.qmin, self.x.qmax)
            x = ops.dequantize(q, self.x.scale, self.x.zero_point)
        x = g.prepared_input(x.float())
        if g.kind == "linear":
            out = F.linear(x, w, self.bias)
        else:
            convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[w.dim() - 2]
            out = convolve(x, w, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if self.rectify is not None:
            out = out.clamp(*self.rectify)
        if self.y is not None:
            q = ops.quantize(out, self.y.scale, self.y.zero_point, self.y.clip_low, self.y.clip_high)
            out = ops.dequantize(q, self.y.scale, self.y.zero_point)
        return _carried(out, dtype)

    def extra_repr(self) -> str:
        """Kind, shape of the weight, which tensors are integers."""
        words = ["int8 weight" if self.weight_quantized else "float weight"]
        words += ["uint8 input"] * (self.x is not None) + ["uint8 output"] * (self.y is not None)
        return f"{self.geometry.kind}, {tuple(self.weight.shape)}, {', '.join(words)}, float arithmetic"
