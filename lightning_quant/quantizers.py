# SPDX-License-Identifier: Apache-2.0
"""Owns the equation: ranges become grids, and tensors are rounded to them with a straight-through gradient.

    q = clamp(round_half_even(x / s) + z, qmin, qmax)          x_hat = (q - z) * s

`s` (scale) is float32 and positive, `z` (zero point) is an integer in [qmin, qmax]. Per tensor both are scalars; per
output channel they have the length of dimension 0 and broadcast over the rest. Ranges always contain 0, so that zero
is a level and padding is exact. `x` is *divided* by `s`: the reciprocal would flip ties, and runtimes divide.

The gradient is the clipped straight-through estimator (Jacob et al. 2018, arXiv 1712.05877; Bengio et al. 2013, arXiv
1308.3432): 1 where the rounded value lies inside [qmin, qmax], ends included, 0 elsewhere. For values exactly half a
step outside an end `hardtanh_backward` gives 0 where round-half-even may still land inside; nowhere else do the two differ.

Other granularities have one scale for each block of a tensor (`Blocks` in keys.py), spread until it broadcasts.

Nothing here is an `nn.Module`: quantizers must not be seen by `parameters()`, `buffers()` or `state_dict()`.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_quant.config import ConfigError, TensorSpec

MOMENTUM = 0.01
YOUNG = 100  # so many batches a range that began at nothing widens at once: as many as the average remembers
# Below this a scale is no longer a normal step for float32 data; NNI and torch floor it at the same value.
MIN_SCALE = torch.finfo(torch.float32).eps


def float32(value: float) -> float:
    """The float32 nearest to `value`, as a Python float: what a runtime will hold."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One tensor-wide grid. `clip_low`, `clip_high`: the levels an absorbed ReLU or ReLU6 leaves, inside [qmin, qmax]."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    clip_low: int
    clip_high: int

    def unsigned(self) -> Grid:
        """The same values as unsigned integers: int8 moved by 128, int4 by 8; scale unchanged."""
        shift = self.qmax + 1 if self.qmin < 0 else 0
        return Grid(
            scale=self.scale,
            zero_point=self.zero_point + shift,
            qmin=self.qmin + shift,
            qmax=self.qmax + shift,
            clip_low=self.clip_low + shift,
            clip_high=self.clip_high + shift,
        )


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """A grid for each block: float32 `scale` and `zero_point` that broadcast against the activation."""

    scale: Tensor
    zero_point: Tensor
    spec: TensorSpec


@dataclass(frozen=True, kw_only=True)
class SignGrid:
    """The two values -1 and 1; 0 and above is 1."""


def block_range(x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(least, greatest) value of each block; `kernel`: the block size along each dimension of x, -1 for all of it.

    Shapes: x (d0, d1, ..), result (d0 / k0, d1 / k1, ..).
    """
    sizes = [size if block == -1 else block for block, size in zip(kernel, x.shape, strict=True)]
    split = x.reshape([part for size, block in zip(x.shape, sizes, strict=True) for part in (size // block, block)])
    dims = tuple(range(1, 2 * x.dim(), 2))
    return split.amin(dims), split.amax(dims)


def wide(x: Tensor) -> Tensor:
    """x in float32 or float64: range and grid arithmetic is never narrower."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sign(x: Tensor) -> Tensor:
    """1 where x is 0 or above, else -1; same shape and dtype."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def block_mean(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The mean of each block, as `block_range` has its ends."""
    sizes = [size if block == -1 else block for block, size in zip(kernel, x.shape, strict=True)]
    split = x.reshape([part for size, block in zip(x.shape, sizes, strict=True) for part in (size // block, block)])
    return split.mean(tuple(range(1, 2 * x.dim(), 2)))


def spread(values: Tensor, shape: Sequence[int]) -> Tensor:
    """One value a block, repeated along its block until it broadcasts against a tensor of `shape`."""
    for dim, (have, want) in enumerate(zip(values.shape, shape, strict=True)):
        values = values if have in (1, want) else values.repeat_interleave(want // have, dim)
    return values


def affine_range(low: float, high: float, spec: TensorSpec) -> tuple[float, int]:
    """(scale, zero point) of the range [low, high], widened to contain 0, on the grid of `spec` (Jacob et al. 2018)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.scheme == "symmetric":
        scale = max(-low, high) / ((spec.qmax - spec.qmin) / 2)
        return max(float32(scale), MIN_SCALE), (spec.qmax + spec.qmin + 1) // 2
    scale = max(float32((high - low) / (spec.qmax - spec.qmin)), MIN_SCALE)
    return scale, min(max(spec.qmin - round(low / scale), spec.qmin), spec.qmax)


# -- kernels: activations -------------------------------------------------------------------------------------------
# torch's own fake-quantize kernels are scalar on CPU; four vectorised passes are 4 to 5 times faster and bit-identical.


def _round_to_grid(x: Tensor, scale: Any, low: Any, high: Any) -> Tensor:
    """clamp(round(x / s), low, high) * s, with low = qmin - z and high = qmax - z; one new tensor, four passes."""
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


class _FakeQuantizeHost(torch.autograd.Function):
    """Scalars on the host (CPU): backward is one fused pass and stores no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, lower: float, upper: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (lower, upper)
        return _round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.bounds), None, None, None, None, None


class _FakeQuantizeDevice(torch.autograd.Function):
    """Scale and bounds as 0-dim tensors: an accelerator is never asked for a value, so the host never waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(x, lower, upper)
        return _round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lower, upper = ctx.saved_tensors
        inside = (x > lower).logical_and_(x < upper)
        return grads[0] * inside, None, None, None, None, None


class ActivationQuantizer:
    """Observes one activation tensor and rounds it to its grid; one scale for the tensor.

    The first observed batch sets the range, later ones move it: r <- r + 0.01 (r_batch - r) (Jacob et al. 2018), or with
    `observer: minmax` widen it to the least and greatest value seen. While `averaged` counts, the range is the mean of the
    batches' instead. A range of nothing (a batch norm's weight may begin at 0) is no beginning: the average would clip what grows
    out of it for a hundred steps, so for as many the range widens at once. A batch with NaN or infinity is left out and reported
    once. On CPU the range is two Python floats; on an accelerator two 0-dim float32 tensors that never leave it. All range
    arithmetic is float32 or better, whatever autocast says.

    Args:
        spec: the grid.
        name: what it belongs to, for messages (`conv1._output_`).
        rectified: a ReLU or Hardtanh stands before it and is absorbed: values outside its ends become its ends by the grid's.
        cap: the upper end of that clamp (6.0 for ReLU6, infinity for ReLU); floor: the lower (0.0, for Hardtanh -1.0).
    """

    def __init__(
        self, spec: TensorSpec, name: str, *, rectified: bool = False, cap: float = math.inf, floor: float = 0.0
    ) -> None:
        self.spec, self.name, self.rectified, self.cap, self.floor = spec, name, rectified, cap, floor
        self.averaged: int | None = None  # while calibrating: the range is the mean of this many batches
        self.low: float | Tensor | None = None
        self.high: float | Tensor | None = None
        self.young: int | Tensor = 0  # for how many batches it goes on to widen at once
        self.changes = 0  # counts what moved the range, so that what was built on it can tell
        self.passes = 0  # how often the layer that moves its range ran
        self.settled = False  # whether this pass leaves the range alone; what lags behind the batches (observers.py) can tell
        self.clipped: MeanMetric | None = None  # set for the steps that count what the ends of the grid cut off
        # With z in the middle of the grid the clamp cannot be the ReLU, nor where clipping shall not stop the gradient.
        self.absorbs = rectified and spec.scheme == "affine" and spec.apply_method != "clamp_round"
        self._warned = False

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What an optimizer is to train, by name."""
        return {}

    @property
    def ready(self) -> bool:
        """Whether a range is known. An accelerator is not asked whether its first batches were all NaN."""
        return self.low is not None

    @property
    def momentum(self) -> float:
        """How far one batch moves the range."""
        return MOMENTUM if self.averaged is None else 1 / max(self.averaged, 1)

    def forget(self) -> None:
        """Begin anew with the next batch."""
        self.low = self.high = None
        self.young = 0
        self.changes += 1

    def _count(self) -> None:
        self.changes += 1
        self.averaged = None if self.averaged is None else self.averaged + 1

    def observe(self, x: Tensor) -> None:
        """Move the range by one batch. `x`: any shape, floating point; before the ReLU if that is absorbed."""
        x = x.detach()
        if x.numel() == 0:
            return
        self._count()
        high = x.amax()
        low = high.new_zeros(()) if self.rectified and self.floor == 0.0 else x.amin()
        if x.device.type == "cpu":
            self._observe_host(float(low), float(high))
        else:
            self._observe_device(low.float(), high.float())

    def _observe_host(self, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high)):
            self._warn()
            return
        if self.rectified:
            low, high = (min(max(side, self.floor), self.cap) for side in (low, high))
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.spec.observer == "minmax" or self._grows(float(self.low), float(self.high)):
            self.low, self.high = min(float(self.low), low), max(float(self.high), high)
        else:
            self.low, self.high = float(self.low), float(self.high)
            self.low += self.momentum * (low - self.low)
            self.high += self.momentum * (high - self.high)

    @property
    def _least(self) -> float:
        """The width of a range whose scale is the least there is."""
        return MIN_SCALE * (self.spec.qmax - self.spec.qmin)

    def _grows(self, low: float, high: float) -> bool:
        """Whether the next batch widens the range at once, because it was nothing not long ago."""
        if self.averaged is None:
            nothing = max(high, 0.0) - min(low, 0.0) <= self._least
            self.young = YOUNG if nothing else max(int(self.young) - 1, 0)
        return self.averaged is None and int(self.young) > 0

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(f"{self.name}: a batch holds NaN or infinity; it does not move the range.", stacklevel=3)
            self._warned = True

    def _observe_device(self, low: Tensor, high: Tensor) -> None:
        finite = torch.isfinite(low) & torch.isfinite(high)
        if self.rectified:
            low, high = low.clamp(self.floor, self.cap), high.clamp(self.floor, self.cap)
        if self.low is None or self.high is None:
            self.low, self.high = torch.full_like(low, math.nan), torch.full_like(high, math.nan)
        olds = [torch.as_tensor(side, dtype=torch.float32, device=low.device) for side in (self.low, self.high)]
        grows: Tensor | None = None
        if self.averaged is None and self.spec.observer != "minmax":
            before = self.young if isinstance(self.young, Tensor) else torch.full_like(low, self.young)
            nothing = olds[1].clamp(min=0) - olds[0].clamp(max=0) <= self._least
            young = torch.where(nothing, YOUNG, (before - 1).clamp_(min=0))
            self.young, grows = torch.where(finite, young, before), young > 0
        for name, old, new, widest in (("low", olds[0], low, torch.minimum), ("high", olds[1], high, torch.maximum)):
            moved = widest(old, new) if self.spec.observer == "minmax" else old + self.momentum * (new - old)
            moved = moved if grows is None else torch.where(grows, widest(old, new), moved)
            moved = torch.where(torch.isnan(old), new, moved)  # NaN: no batch has counted yet
            setattr(self, name, torch.where(finite, moved, old))

    def grid(self) -> Grid | BlockGrid | SignGrid:
        """The grid as host numbers; `ready` must hold. Costs a synchronisation where the range is on an accelerator."""
        spec, (scale, zero) = self.spec, self._numbers()
        low, high = spec.qmin, spec.qmax
        if self.rectified:
            low = max(low, zero + round(self.floor / scale))
            if math.isfinite(self.cap):
                high = min(high, zero + round(self.cap / scale))
        return Grid(scale=scale, zero_point=zero, qmin=spec.qmin, qmax=spec.qmax, clip_low=low, clip_high=high)

    def _numbers(self) -> tuple[float, int]:
        """(scale, zero point) of the range."""
        assert self.low is not None and self.high is not None, self.name
        return affine_range(float(self.low), float(self.high), self.spec)

    def clipped_share(self, x: Tensor) -> float:
        """The share of x's values, in [0, 1], whose integer lies outside [qmin, qmax] before the clamp.

        `x` as for a call, not empty; `ready` must hold. What the activation before it cuts off is not clipped: behind a ReLU only
        values above the upper end count. Waits for an accelerator.
        """
        x, grid = x.detach(), self.grid()
        x = wide(x)
        x = x.clamp(self.floor, self.cap) if self.rectified else x
        if isinstance(grid, SignGrid):  # where the gradient of a sign stops
            return float((x.abs() > 1).count_nonzero()) / x.numel()
        q = torch.div(x, grid.scale).round_().add_(grid.zero_point)
        return float((q < self.spec.qmin).logical_or_(q > self.spec.qmax).count_nonzero()) / x.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """x rounded to the grid, same shape and dtype; applies the absorbed ReLU. `ready` must hold."""
        if self.rectified and not self.absorbs:
            x = F.hardtanh(x, self.floor, self.cap)  # not x.clamp: its gradient at 0 is 1
        y = self._on_host(wide(x)) if x.device.type == "cpu" else self._on_device(wide(x))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _on_host(self, x: Tensor) -> Tensor:
        grid = self.grid()
        assert isinstance(grid, Grid)
        low, high = grid.clip_low - grid.zero_point, grid.clip_high - grid.zero_point
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _round_to_grid(x, grid.scale, low, high)
        lower, upper = (low - 0.5) * grid.scale, (high + 0.5) * grid.scale
        if self.absorbs:
            lower, upper = max(lower, self.floor), min(upper, self.cap)
        if self.spec.apply_method == "clamp_round":
            lower, upper = -math.inf, math.inf
        y: Tensor = _FakeQuantizeHost.apply(x, grid.scale, low, high, lower, upper)
        return y

    def _on_device(self, x: Tensor) -> Tensor:
        spec = self.spec
        scale, zero = self._scale_and_zero(x.device)
        bottom, top = spec.qmin - zero, spec.qmax - zero
        lower, upper = (bottom - 0.5) * scale, (top + 0.5) * scale
        if self.absorbs:
            bottom, top = torch.maximum(bottom, (self.floor / scale).round()), torch.minimum(top, (self.cap / scale).round())
            lower, upper = lower.clamp(min=self.floor), upper.clamp(max=self.cap)
        if spec.apply_method == "clamp_round":
            lower, upper = torch.full_like(lower, -math.inf), torch.full_like(upper, math.inf)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _round_to_grid(x, scale, bottom, top)
        y: Tensor = _FakeQuantizeDevice.apply(x, scale, bottom, top, lower, upper)
        return y

    def _scale_and_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """float32 scale and integer-valued zero point of the range, as tensors of its shape on `device`."""
        spec = self.spec
        # The host reckons in double and rounds the scale to float32: so must the device, or zero points differ.
        double = torch.float32 if device.type == "mps" else torch.float64
        low, high = (torch.as_tensor(r, dtype=double, device=device) for r in (self.low, self.high))
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if spec.scheme == "symmetric":
            scale = (torch.maximum(-low, high) / ((spec.qmax - spec.qmin) / 2)).float().clamp_(min=MIN_SCALE)
            return scale, torch.full_like(scale, (spec.qmax + spec.qmin + 1) // 2)
        scale = ((high - low) / (spec.qmax - spec.qmin)).float().clamp_(min=MIN_SCALE)
        return scale, (spec.qmin - (low / scale).round_()).clamp_(spec.qmin, spec.qmax).float()

    def state_dict(self) -> dict[str, Any]:
        """The range as plain numbers, None where there is none."""
        low, high = (None if value is None or math.isnan(value) else float(value) for value in (self.low, self.high))
        return {"low": low, "high": high, **({"young": int(self.young)} if self.young else {})}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved range is one number a side, as this quantizer's."""
        return set(state) - {"young"} == {"low", "high"} and not any(
            isinstance(side, Tensor) and side.dim() for side in state.values()
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a range saved by `state_dict`."""
        self.low, self.high, self.young = state["low"], state["high"], state.get("young", 0)
        self.changes += 1


class BlockQuantizer(ActivationQuantizer):
    """An activation with a scale for each block of its dimensions: one for each channel, say.

    The range is a pair of float32 tensors on the device of the activation, shape (dimension / block) along every dimension;
    that shape belongs to the layer, so a batch that would need another one is an error.
    """

    def observe(self, x: Tensor) -> None:
        """Move the ranges by one batch; a block with NaN or infinity is left out."""
        x = x.detach()
        if x.numel() == 0:
            return
        self._count()
        low, high = (side.float() for side in block_range(x, self._checked_kernel(x)))
        if x.device.type == "cpu" and not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            self._warn()
            return
        self._observe_device(low, high)

    def _kernel(self, x: Tensor) -> tuple[int, ...]:
        kernel = self.spec.kernel(x.dim())
        if len(kernel) != x.dim() or any(block > 0 and size % block for block, size in zip(kernel, x.shape, strict=True)):
            raise self._misfit(x, "which these blocks do not divide")
        return kernel

    def _checked_kernel(self, x: Tensor) -> tuple[int, ...]:
        """The size of a block along each dimension; a ConfigError unless x has one block for each range."""
        kernel = self._kernel(x)
        blocks = tuple(1 if block == -1 else size // block for block, size in zip(kernel, x.shape, strict=True))
        if isinstance(self.low, Tensor) and tuple(self.low.shape) != blocks:
            raise self._misfit(x, f"its ranges have the shape {tuple(self.low.shape)}, this batch needs {blocks}")
        return kernel

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved range has a value for each block."""
        sides = [side is None or (isinstance(side, Tensor) and side.dim() > 0) for side in state.values()]
        return set(state) - {"young"} == {"low", "high"} and all(sides)

    def _misfit(self, x: Tensor, why: str) -> ConfigError:
        return ConfigError(
            f"{self.name}: granularity {self.spec.granularity} met a tensor of shape {tuple(x.shape)}: {why}. A scale for each "
            "block needs dimensions of one size; use 'per_tensor' or -1 for those that change."
        )

    def grid(self) -> BlockGrid:
        """Scales and zero points, each value repeated along its block: they broadcast against the activation."""
        assert isinstance(self.low, Tensor), self.name
        scale, zero = self._scale_and_zero(self.low.device)
        return BlockGrid(scale=scale, zero_point=zero, spec=self.spec)

    def _spread(self, values: Tensor) -> Tensor:
        for dim, block in enumerate(self.spec.kernel(values.dim())):
            values = values.repeat_interleave(block, dim) if block > 1 else values
        return values

    def _on_host(self, x: Tensor) -> Tensor:
        return self._on_device(x)

    def _on_device(self, x: Tensor) -> Tensor:
        self._checked_kernel(x)
        return super()._on_device(x)

    def _scale_and_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale, zero = super()._scale_and_zero(device)
        return self._spread(scale), self._spread(zero)

    def state_dict(self) -> dict[str, Any]:
        """The ranges as tensors on the host, None where there are none."""
        young = {"young": self.young.cpu()} if isinstance(self.young, Tensor) and bool(self.young.any()) else {}
        sides = {"low": self.low, "high": self.high}
        return {**{key: side.cpu() if isinstance(side, Tensor) else None for key, side in sides.items()}, **young}
