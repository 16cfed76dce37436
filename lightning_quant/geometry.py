# SPDX-License-Identifier: Apache-2.0
"""Owns the geometry of weighted layers: stride, padding and what else they do apart from their numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a weighted layer does apart from its numbers. pad: for `F.pad`, or None.

    kind: 'conv', 'linear', 'conv_transpose' or 'scale' (one weight for each channel of dimension 1, any shape).
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad: tuple[int, ...] | None = None
    pad_mode: str = "constant"
    output_padding: tuple[int, ...] = ()

    def prepared_input(self, x: Tensor) -> Tensor:
        """x padded where the convolution itself cannot pad so (reflect, circular, replicate, uneven 'same')."""
        return x if self.pad is None else F.pad(x, self.pad, mode=self.pad_mode)

    def for_kernel(self, input: Tensor, dim: int) -> Tensor:
        """A layer's input as its kernel takes it: padded, with a batch, a linear layer's as rows. dim: of the weight."""
        if self.kind == "linear":
            return input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        if self.kind == "scale":
            return as_signal(input)
        x = self.prepared_input(input)
        return x.unsqueeze(0) if self._is_unbatched(input, dim) else x

    def from_kernel(self, out: Tensor, input: Tensor, dim: int) -> Tensor:
        """What a kernel made of `for_kernel(input, dim)`, in the shape that the layer's result has."""
        if self.kind == "linear":
            return out if input.dim() == 2 else out.reshape(*input.shape[:-1], out.shape[-1])
        if self.kind == "scale":
            return out.reshape(input.shape)
        return out.squeeze(0) if self._is_unbatched(input, dim) else out

    def _is_unbatched(self, input: Tensor, dim: int) -> bool:
        return self.kind == "conv" and input.dim() == dim - 1

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """The geometry of a convolution, transposed or not, a linear layer or a batch norm."""
        if isinstance(layer, nn.Linear):
            return cls(kind="linear")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return cls(kind="scale", stride=(1,), padding=(0,), dilation=(1,), groups=layer.num_features)
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            sizes = (layer.stride, layer.padding, layer.dilation, layer.output_padding)
            stride, pad, dilation, more = (_per_dimension(size, layer) for size in sizes)  # type: ignore[arg-type]
            plain = cls(kind="conv_transpose", stride=stride, padding=pad, dilation=dilation, groups=layer.groups)
            return replace(plain, output_padding=more)
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


def as_signal(x: Tensor) -> Tensor:
    """(N, C) or (N, C, ...) as (N, C, L)."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _per_dimension(value: int | tuple[int, ...], layer: nn.modules.conv._ConvNd) -> tuple[int, ...]:
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
