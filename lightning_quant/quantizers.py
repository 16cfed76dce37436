# SPDX-License-Identifier: Apache-2.0
"""Owns the equation: ranges become grids, and tensors are rounded to them with a straight-through gradient.

    q = clamp(round_half_even(x / s) + z, qmin, qmax)          x_hat = (q - z) * s

`s` (scale) is float32 and positive, `z` (zero point) is an integer in [qmin, qmax]. Per tensor both are scalars; per
output channel they have the length of dimension 0 and broadcast over the rest. Ranges always contain 0, so that zero
is a level and padding is exact. `x` is *divided* by `s`: the reciprocal would flip ties, and runtimes divide.

The gradient is the clipped straight-through estimator (Jacob et al. 2018, arXiv 1712.05877; Bengio et al. 2013, arXiv
1308.3432): 1 where the rounded value lies inside [qmin, qmax], ends included, 0 elsewhere. Values half a step outside an
end, to 2^-22 of that place, get 0 whichever way they round; nowhere else do the two differ.

Other granularities have one scale for each block of a tensor (`Blocks` in keys.py), spread until it broadcasts.

Nothing here is an `nn.Module`: quantizers must not be seen by `parameters()`, `buffers()` or `state_dict()`.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.config import TensorSpec

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


def on_host(x: Tensor) -> bool:
    """Whether range arithmetic for x is done in Python numbers: on CPU, unless torch.compile would bake them in."""
    return x.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()


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


# A value beyond half a step outside an end by this share or more rounds to that end, whatever float32 makes of its quotient: two
# roundings of 2^-24 each lie between. Clamped there first, nothing needs to be clamped after rounding.
_INWARDS = 1 - 2.0**-22


def _fake_quantize(x: Tensor, scale: float, lower: float, upper: float) -> Tensor:
    """x clamped to [lower, upper] and rounded; its gradient is the clamp's, by torch's own kernels: they save x, need no Python.

    `lower`, `upper`: no farther out than half a step beyond the ends, inwards by `_INWARDS`.
    """
    y = F.hardtanh(x, lower, upper)
    y.detach().div_(scale).round_().mul_(scale)  # the same memory, unseen by autograd
    return y


class _Exchanged(torch.autograd.Function):
    """See `exchanged`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach()  # not the argument itself, which the model could not write into

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def exchanged(x: Tensor, value: Tensor) -> Tensor:
    """`value` in place of x, in its own memory; the gradient passes to x unchanged: straight through, where nothing clips."""
    return _Exchanged.apply(x, value)  # type: ignore[no-any-return]


class _FakeQuantizeLean(torch.autograd.Function):
    """As `_fake_quantize`, with the same gradient, but a byte a value is kept for it in place of the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, lower: float, upper: float) -> Tensor:
        # lower < x < upper is x between the next numbers inwards, ends included: what clamp leaves as it is.
        inner = torch.nextafter(x.new_tensor([lower, upper]), x.new_tensor([math.inf, -math.inf])).tolist()
        ctx.save_for_backward(x.clamp(*inner).eq(x))
        return _round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        # The kernel of `_fake_quantize`, on the mask as numbers: what lies outside is chosen as 0, not multiplied by it.
        return torch.ops.aten.hardtanh_backward(grads[0], inside.to(grads[0].dtype), 0.5, 2.0), None, None, None, None, None


class _FakeQuantizeDevice(torch.autograd.Function):
    """Scale and bounds as 0-dim tensors: an accelerator is never asked for a value, so the host never waits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, lower: Tensor, upper: Tensor, lean: bool
    ) -> Tensor:
        ctx.save_for_backward(*((_inside(x, lower, upper),) if lean else (x, lower, upper)))
        return _round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, *ends = ctx.saved_tensors
        return grads[0] * (_inside(inside, *ends) if ends else inside), None, None, None, None, None, None


def _inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return (x > lower).logical_and_(x < upper)


def _on(side: float | Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An end of a range as a tensor; a number is filled in there, because copying it would have the host wait."""
    assert side is not None
    return side.to(device, dtype) if isinstance(side, Tensor) else torch.full((), side, dtype=dtype, device=device)


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
        self.lean = False  # keep a mask for the gradient, not the tensor
        self.averaged: int | None = None  # while calibrating: the range is the mean of this many batches
        self.low: float | Tensor | None = None
        self.high: float | Tensor | None = None
        self.young: int | Tensor = 0  # for how many batches it goes on to widen at once
        self.changes = 0  # counts what moved the range, so that what was built on it can tell
        self.passes = 0  # how often the layer that moves its range ran
        self.settled = False  # whether this pass leaves the range alone; what lags behind the batches (observers.py) can tell
        # Set for the passes that are measured: shown what came, what became of it and whether the pass is one of training.
        self.meter: Callable[[Tensor, Tensor, bool], None] | None = None
        self.noted: list[Any] | None = None  # of several processes: what this one observed since they last met (ranks.py)
        self._unmoved: tuple[Any, ...] = ()  # the range before the first of these
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
    def traces(self) -> bool:
        """Whether torch.compile can follow this quantizer now, its numbers being tensors then."""
        return self.meter is None and self.averaged is None and self.noted is None

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
        if torch.compiler.is_dynamo_compiling():  # a number that is counted up would be compiled anew at every step
            return
        self.changes += 1
        self.averaged = None if self.averaged is None else self.averaged + 1

    def observe(self, x: Tensor) -> None:
        """Move the range by one batch. `x`: any shape, floating point; before the ReLU if that is absorbed."""
        x = x.detach()
        if x.numel() == 0:
            return
        self._count()
        cut = self.rectified and self.floor == 0.0  # nothing below it counts
        if on_host(x):
            low, high = (0.0, x.amax()) if cut else x.aminmax()
            ends = float(low), float(high)
            if self.noted is not None:
                self._note(*ends)
            self._observe_host(*ends)
        else:
            greatest = x.amax()
            least = (greatest.new_zeros(()) if cut else x.amin()).float()
            if self.noted is not None:
                self._note(least, greatest.float())
            self._observe_device(least, greatest.float())

    def _note(self, low: float | Tensor, high: float | Tensor) -> None:
        """Keep the ends of a batch, and the range before the first of them, until the processes meet."""
        assert self.noted is not None
        if not self.noted:
            self._unmoved = self.low, self.high, self.young
        self.noted.append((low, high))

    def move_together(self, batches: Sequence[tuple[Any, Any]]) -> None:
        """Move the range by these (least, greatest) in place of what this process has noted: those of all processes' values.

        They are numbers or tensors, as this quantizer notes them.
        """
        if self.noted:
            self.low, self.high, self.young = self._unmoved
        self.noted = []
        for low, high in batches:
            self.changes += 1
            if isinstance(low, Tensor):
                self._observe_device(low, high)
            else:
                self._observe_host(low, high)

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
        olds = [_on(side, low.device, torch.float32) for side in (self.low, self.high)]
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
        scale, zero = self._numbers()
        low, high = self._clip(scale, zero)
        return Grid(scale=scale, zero_point=zero, qmin=self.spec.qmin, qmax=self.spec.qmax, clip_low=low, clip_high=high)

    def _clip(self, scale: float, zero: int) -> tuple[int, int]:
        """The levels that the absorbed activation leaves."""
        low, high = self.spec.qmin, self.spec.qmax
        if self.rectified:
            low = max(low, zero + round(float32(float32(self.floor) / scale)))  # the quotient that tensors have
            if math.isfinite(self.cap):
                high = min(high, zero + round(float32(float32(self.cap) / scale)))
        return low, high

    def _numbers(self) -> tuple[float, int]:
        """(scale, zero point) of the range."""
        assert self.low is not None and self.high is not None, self.name
        return affine_range(float(self.low), float(self.high), self.spec)

    def scale_for(self, x: Tensor) -> float | Tensor:
        """The scale now: a number where x is on the host, else a tensor there. `ready` must hold; one for the tensor."""
        return self._numbers()[0] if on_host(x) else self._scale_and_zero(x.device)[0]

    def rectify(self, x: Tensor) -> Tensor:
        """What the activation before it makes of x, if that is absorbed: what it would hand on if nothing were rounded."""
        return x.clamp(self.floor, self.cap) if self.rectified else x

    def clipped_share(self, x: Tensor) -> float:
        """The share of x's values, in [0, 1], whose integer lies outside [qmin, qmax] before the clamp.

        `x` as for a call, not empty; `ready` must hold. What the activation before it cuts off is not clipped: behind a ReLU only
        values above the upper end count. Waits for an accelerator.
        """
        x, grid = self.rectify(wide(x.detach())), self.grid()
        if isinstance(grid, SignGrid):  # where the gradient of a sign stops
            return float((x.abs() > 1).count_nonzero()) / x.numel()
        q = torch.div(x, grid.scale).round_().add_(grid.zero_point)
        return float((q < self.spec.qmin).logical_or_(q > self.spec.qmax).count_nonzero()) / x.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """x rounded to the grid, same shape and dtype; applies the absorbed ReLU. `ready` must hold."""
        if self.rectified and not self.absorbs:
            x = F.hardtanh(x, self.floor, self.cap)  # not x.clamp: its gradient at 0 is 1
        y = self._on_host(wide(x)) if on_host(x) else self._on_device(wide(x))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _on_host(self, x: Tensor) -> Tensor:
        scale, zero = self._numbers()
        low, high = (end - zero for end in self._clip(scale, zero))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _round_to_grid(x, scale, low, high)
        if self.spec.apply_method == "clamp_round":
            return exchanged(x, _round_to_grid(x.detach(), scale, low, high))  # what is clipped passes its gradient, too
        lower, upper = (low - 0.5) * scale * _INWARDS, (high + 0.5) * scale * _INWARDS
        if self.absorbs:
            lower, upper = max(lower, self.floor), min(upper, self.cap)
        most = torch.finfo(x.dtype).max
        lower, upper = max(lower, -most), min(upper, most)
        if self.lean:
            return _FakeQuantizeLean.apply(x, scale, low, high, lower, upper)  # type: ignore[no-any-return]
        return _fake_quantize(x, scale, lower, upper)

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
        y: Tensor = _FakeQuantizeDevice.apply(x, scale, bottom, top, lower, upper, self.lean)
        return y

    def _scale_and_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """float32 scale and integer-valued zero point of the range, as tensors of its shape on `device`."""
        spec = self.spec
        # The host reckons in double and rounds the scale to float32: so must the device, or zero points differ.
        double = torch.float32 if device.type == "mps" else torch.float64
        low, high = (_on(side, device, double) for side in (self.low, self.high))
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
