# SPDX-License-Identifier: Apache-2.0
"""Owns torch's int8 kernels for CPUs (oneDNN) as another way to the same sums: what is computed equals `direct.py`, bit for bit.

The kernels take uint8 inputs and int8 weights and give the exact int32 sums, as float32; scales are ours. CPUs without VNNI add
pairs of products in 16 bits, which saturate: there only weights run whose pairs cannot, 2 max(q_x) max|q_w| < 2^15 (7 bits, say).
Packed weights are made at the first call and stand in no file.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_quant.geometry import Geometry
from lightning_quant.quantizers import Grid

_INT16_MAX = 2**15 - 1


@functools.cache
def missing() -> str:
    """Why no kernel can run here; nothing where they do."""
    if not hasattr(torch.ops.onednn, "qconv_pointwise") or not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN kernels"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this CPU has no int8 kernels in oneDNN"
    return ""


@functools.cache
def saturates() -> bool:
    """Whether this CPU's kernels add pairs of products in 16 bits: tried with the largest products, in both kinds of layer."""
    x, w = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((64, 64), 127, dtype=torch.int8)
    exact = 64 * 255 * 127
    grid = Grid(scale=1.0, zero_point=0, qmin=0, qmax=255, clip_low=0, clip_high=255)
    conv = Geometry(kind="conv", stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    sums = [
        Kernel(w, None, grid, Geometry(kind="linear"))(x.float()),
        Kernel(w[:, :, None, None], None, grid, conv)(x.float()[:, :, None, None].repeat(1, 1, 9, 9)),
    ]
    return any(bool((one != exact).any()) for one in sums)


def problem(weight: Tensor, zero_point: Tensor | None, x: Grid, geometry: Geometry) -> str:
    """Why a layer cannot run on these kernels; nothing if it can."""
    if missing():
        return missing()
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if geometry.kind not in ("conv", "linear") or weight.dim() not in (2, 3, 4):
        return f"there is no kernel for {geometry.kind} layers of {weight.dim() - 2} dimensions"
    if zero_point is not None and bool(zero_point.any()):
        return "its weight has zero points"
    if 2 * x.qmax * int(weight.to(torch.int16).abs().max()) > _INT16_MAX and saturates():
        return "this CPU has no VNNI: 8-bit weights saturate (7-bit ones do not)"
    return ""


class Kernel:
    """Sums of products on oneDNN's kernels, exact where they stay under 2^24.

    Args:
        weight: int8 (C, I / groups, ...) with zero point 0; bias: int32 (C,) or None.
        x: grid of the input, on [0, 255].
        geometry: of the layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, x: Grid, geometry: Geometry) -> None:
        self.x, self.geometry, self.linear = x, geometry, geometry.kind == "linear"
        self.bias = None if bias is None else bias.to(torch.float32)
        self.ones = torch.ones(len(weight))
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        g, ops = geometry, torch.ops.onednn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.linear:
                self.packed: Tensor = ops.qlinear_prepack(weight.contiguous(), None)
            else:
                self.packed = ops.qconv_prepack(
                    weight.contiguous(), self.ones, 1.0, x.zero_point, g.stride, g.padding, g.dilation, g.groups, None
                )

    def __call__(self, q: Tensor) -> Tensor:
        """float32 sums of q, integers from the zero point on in float32: (N, I, ...) to (N, C, ...), in the layout of q."""
        g, ops, zero = self.geometry, torch.ops.onednn, self.x.zero_point
        shifted = q.add_(zero) if zero else q
        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        head = (1.0, zero, self.packed, self.ones, self.zeros, self.bias)
        if self.linear:
            out: Tensor = ops.qlinear_pointwise(shifted.to(torch.uint8), *head, *tail)
            return out
        last = q.dim() == 4 and not q.is_contiguous()
        integers = shifted.to(torch.uint8, memory_format=torch.channels_last) if q.dim() == 4 else shifted.to(torch.uint8)
        out = ops.qconv_pointwise(integers, *head, g.stride, g.padding, g.dilation, g.groups, *tail)
        return out if last else out.contiguous()
