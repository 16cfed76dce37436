# SPDX-License-Identifier: Apache-2.0
"""Owns our operators: the integer arithmetic of deployed layers as torch.library functions; all that a saved program needs.

Namespace `lightning_quant`, plain integer tensors, usable on any device, with shapes for torch.export: quantize, dequantize,
dequantize_weight, round_blocks, conv, linear. The arithmetic is stated in `integer.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_quant.quantizers import spread

_LIBRARY = torch.library.Library("lightning_quant", "DEF")
_LIBRARY.define("quantize(Tensor x, float scale, int zero_point, int low, int high) -> Tensor")
_LIBRARY.define("dequantize(Tensor q, float scale, int zero_point) -> Tensor")
_LIBRARY.define("round_blocks(Tensor x, Tensor scale, Tensor zero_point, int low, int high) -> Tensor")
_LIBRARY.define("dequantize_weight(Tensor q, Tensor scale, Tensor? zero_point) -> Tensor")
_TAIL = "float? y_scale, int y_zero_point, int low, int high, bool wide) -> Tensor"
_HEAD = "Tensor q, float x_scale, int x_zero_point, Tensor weight, Tensor scale, Tensor? zero_point, Tensor bias"
_LIBRARY.define(f"conv({_HEAD}, int[] stride, int[] padding, int[] dilation, int groups, {_TAIL}")
_LIBRARY.define(f"linear({_HEAD}, {_TAIL}")


# Where torch keeps the precision of its float32 kernels, by device: (module, torch's names for it); each holds "none", "ieee",
# "tf32" or "bf16".
_BACKENDS: Any = torch.backends  # its submodules are not typed
_PRECISIONS: dict[str, tuple[tuple[Any, tuple[str, str]], ...]] = {
    "cpu": ((_BACKENDS.mkldnn.matmul, ("mkldnn", "matmul")), (_BACKENDS.mkldnn.conv, ("mkldnn", "conv"))),
    "cuda": ((_BACKENDS.cuda.matmul, ("cuda", "matmul")), (_BACKENDS.cudnn.conv, ("cuda", "conv"))),
}


def is_exact_float(device: str) -> bool:
    """Whether integer-valued floats stay integers with the settings as they are: no autocast, no TF32, no bfloat16 matmul."""
    precision = torch._C._get_fp32_precision_getter  # what the property reads, at a fifth of its cost
    strict = (precision(*names) in ("none", "ieee") for _, names in _PRECISIONS.get(device, ()))
    return not torch.is_autocast_enabled(device) and all(strict)


@contextlib.contextmanager
def exact_float(device: str) -> Iterator[None]:
    """No autocast, no TF32, no bfloat16 matmul: integer-valued floats must stay integers."""
    places = [backend for backend, _ in _PRECISIONS.get(device, ())]
    loose = [(b, b.fp32_precision) for b in places if b.fp32_precision not in ("none", "ieee")]
    for backend, _ in loose:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext():
            yield
    finally:
        for backend, precision in loose:
            backend.fp32_precision = "none"  # inherits again, if that is where the value came from
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def step_on(scale: float, device: torch.device) -> Tensor:
    """A scale as a tensor: torch takes it in half the time of a number, and CUDA divides by it, not times the reciprocal."""
    return torch.full((), scale, dtype=torch.float32, device=device)


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    q = torch.div(x.float(), step_on(scale, x.device)).round_().add_(zero_point).clamp_(low, high)
    return q.to(integer_type(high))


def integer_type(high: int) -> torch.dtype:
    """The dtype of a quantized activation whose grid ends at `high`."""
    return torch.uint8 if high <= 255 else torch.uint16


def _dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


def along_channels(values: Tensor, dim: int, channel: int) -> Tensor:
    """A per-channel vector reshaped to broadcast along `channel`; a scalar as it is."""
    if values.dim() == 0:
        return values
    shape = [1] * dim
    shape[channel] = -1
    return values.view(shape)


def _over(values: Tensor, q: Tensor) -> Tensor:
    """One value for the tensor, for each channel of dimension 0 or for each block, to broadcast against q."""
    return spread(values, q.shape) if values.dim() == q.dim() else along_channels(values, q.dim(), 0)


def dequantized_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(q - zero_point) * scale in float32: one value for the tensor, for each channel of dimension 0 or for each block."""
    w = q.to(torch.float32)
    if zero_point is not None:
        w -= _over(zero_point, q).to(torch.float32)
    return w.mul_(_over(scale, q))


def round_by_blocks(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """x on a grid for each block, in float32."""
    q = torch.div(x.float(), scale).round_().clamp_(low - zero_point, high - zero_point)
    return q.mul_(scale)


def _operands(q: Tensor, x_zero: int, weight: Tensor, zero: Tensor | None, wide: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    w = weight.to(dtype)
    if zero is not None:
        w -= along_channels(zero, weight.dim(), 0).to(dtype)
    return q.to(dtype).sub_(x_zero), w


def _requantize(acc: Tensor, real: Tensor, channel: int, y_scale: float | None, y_zero: int, low: int, high: int) -> Tensor:
    """acc: exact integers, float32 or float64; real: s_x * s_w in float32, () or (C,)."""
    if y_scale is None:
        return acc.to(torch.float32) * along_channels(real, acc.dim(), channel)
    multiplier = along_channels(real / step_on(y_scale, real.device), acc.dim(), channel)
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
    with exact_float(q.device.type):
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
    with exact_float(q.device.type):
        x, w = _operands(q, x_zero_point, weight, zero_point, wide)
        acc = F.linear(x, w, bias.to(w.dtype))
    return _requantize(acc, x_scale * scale, 1, y_scale, y_zero_point, low, high)


def _quantize_shape(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x, dtype=integer_type(high))


def _dequantize_shape(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


for _name, _kernel, _shape in (
    ("quantize", _quantize, _quantize_shape),
    ("dequantize", _dequantize, _dequantize_shape),
    ("dequantize_weight", dequantized_weight, dequantized_weight),
    ("round_blocks", round_by_blocks, round_by_blocks),
    ("conv", _conv, _conv),
    ("linear", _linear, _linear),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightning_quant::{_name}", _shape, lib=_LIBRARY)


@register_flop_formula([torch.ops.lightning_quant.conv, torch.ops.lightning_quant.linear])
def _flops(*shapes: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """What torch's counter (and Lightning's ModelSummary) adds for a call, by the shapes of its tensors."""
    weight: Sequence[int] = shapes[3]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])
