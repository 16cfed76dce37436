# SPDX-License-Identifier: Apache-2.0
"""Owns weights: the grid of a parameter by its values now, and its rounding with gradient.

The equation is that of `quantizers.py`. A `WeightQuantizer` rounds one parameter of one prepared layer; `fold` below is what
norms multiply the weight by when they are folded into it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import TensorSpec
from lightning_quant.quantizers import block_mean, block_range, exchanged, on_host, spread, wide


@dataclass(frozen=True)
class WeightGrid:
    """Scale (float32) and zero point (float32 integers, or None for 0) of a weight, broadcastable against it."""

    scale: Tensor
    zero_point: Tensor | None


def weight_grid(weight: Tensor, spec: TensorSpec) -> WeightGrid:
    """The grid of a weight by its range *now*: a lagging average would clip weights that grow (see fusion.py).

    `weight`: float, dimension 0 is the output channel. Scale and zero point have the shape (C, 1, ..) per out-channel,
    () per tensor, and otherwise one value a block, spread over it. A channel of zeros gets scale 1.
    """
    if spec.scheme == "symmetric":
        scale = _positive(_largest(weight, spec).div_((spec.qmax - spec.qmin) / 2))
        zero = (spec.qmax + spec.qmin + 1) // 2
        return WeightGrid(scale, torch.full_like(scale, zero) if zero else None)
    low, high = _ends(weight, spec)
    high, low = high.clamp_(min=0), low.clamp_(max=0)
    scale = _positive((high - low).div_(spec.qmax - spec.qmin))
    return WeightGrid(scale, (spec.qmin - (low / scale).round_()).clamp_(spec.qmin, spec.qmax))


def _ends(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """(least, greatest) value that shares a scale, new tensors of the shape that scales have."""
    if spec.granularity not in ("per_tensor", "out_channel"):
        low, high = (spread(side, weight.shape).clone() for side in block_range(weight, spec.kernel(weight.dim())))
        return low, high
    keep = spec.granularity == "out_channel"
    dims = tuple(range(1 if keep else 0, weight.dim()))
    return (weight.amin(dims, keepdim=keep), weight.amax(dims, keepdim=keep)) if dims else (weight.clone(), weight.clone())


_SMALL = 1 << 15  # below this many values one pass less is slower than one call less


def _largest(weight: Tensor, spec: TensorSpec) -> Tensor:
    """The largest absolute value that shares a scale, a new tensor of the shape that scales have."""
    if spec.granularity == "out_channel" and weight.dim() > 1 and weight.numel() < _SMALL:
        return weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    low, high = _ends(weight, spec)
    return torch.maximum(high, low.neg_())


def _plain_step(weight: Tensor, spec: TensorSpec) -> Tensor | None:
    """The scale of `weight_grid` for training, in fewer steps; None where the grid is not symmetric about zero.

    A channel of zeros has the least scale, not 1: it is rounded to zeros all the same.
    """
    if spec.scheme != "symmetric" or spec.qmin != -spec.qmax:
        return None
    scale = _largest(weight, spec).div_((spec.qmax - spec.qmin) / 2)
    return scale.clamp_(min=torch.finfo(scale.dtype).tiny)


def _positive(scale: Tensor) -> Tensor:
    """In place: 1 for a channel of zeros, and never so small that dividing by it overflows."""
    return scale.masked_fill_(scale == 0, 1.0).clamp_(min=torch.finfo(scale.dtype).tiny)


def quantize_weight(weight: Tensor, grid: WeightGrid, spec: TensorSpec) -> Tensor:
    """The integers of a weight on `grid`, carried as floats of its dtype and shape."""
    q = torch.div(weight, grid.scale).round_()
    if grid.zero_point is not None:
        q.add_(grid.zero_point)
    return q.clamp_(spec.qmin, spec.qmax)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """round(weight / scale) scale, with the gradient passing: on a symmetric grid of the current maximum nothing can clip."""
    return exchanged(weight, _rounded(weight.detach(), scale))


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.div(weight, scale).round_().mul_(scale)


def _plainly_rounded(weight: Tensor, step: Tensor) -> Tensor:
    """`round_weight` of a parameter itself, which `rounded_again` may repeat."""
    y = round_weight(weight, step)
    if not torch.compiler.is_dynamo_compiling() and y.grad_fn is not None:
        y.grad_fn.step = step  # type: ignore[attr-defined]
    return y


class _FakeQuantizeWeight(torch.autograd.Function):
    """With a zero point, whose rounding can push an end of the range half a step over the grid, or clipped: a mask is kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, passes: bool) -> Tensor:
        q = torch.div(weight, scale).round_().add_(zero)
        if not passes:
            ctx.save_for_backward((q >= qmin).logical_and_(q <= qmax))
        return q.clamp_(qmin, qmax).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] * ctx.saved_tensors[0] if ctx.saved_tensors else grads[0]
        return grad, None, None, None, None, None


def _faint_step(
    weight: Tensor, grid: WeightGrid, fold: Tensor, spec: TensorSpec, channel: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """(the step of a folded weight, seen from the unfolded weight; which channels are faint, (C,), None where none is).

    The step is s / c. A channel whose folded weights all round to 0 is faint: gamma near 0, or far weaker than the channel that
    sets the scale. Deployed it is a constant. Its zeros would leave the norm behind it without statistics, and neither gamma
    nor the running variance could ever recover: so its weights are rounded on a grid of their own here, and what the norm makes
    of them is exchanged for the constant (`FusedGroup.settled`), the gradient passing as it does through rounding.
    """
    zero: Tensor | float = 0.0 if grid.zero_point is None else grid.zero_point
    low, high = (spread(side, weight.shape) for side in block_range(weight, channel))
    high, low = high.clamp(min=0), low.clamp(max=0)
    above, below = torch.as_tensor(spec.qmax - zero).clamp(min=1), torch.as_tensor(zero - spec.qmin).clamp(min=1)
    own = torch.maximum(high / above, -low / below)
    step = grid.scale / fold
    if step.dim() and step.numel() > high.numel():  # scales inside a channel: it is faint where all of it rounds to 0
        most = spread(block_range((weight.abs() / step).round_(), channel)[1], weight.shape)
    else:
        most = (torch.maximum(high, -low) / step).round_()
    dead = most == 0
    if on_host(weight) and not bool(dead.any()):
        return step, None
    faint = block_range(dead.expand(weight.shape).to(torch.uint8), channel)[0].flatten().bool()
    return torch.where(dead, torch.where(own > 0, own, 1.0), step), faint


def fake_quantize_weight(
    weight: Tensor,
    spec: TensorSpec,
    fold: Tensor | None = None,
    channel: tuple[int, ...] | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """A weight rounded to its grid, with gradient; same shape and dtype.

    Args:
        weight: float (C, ...).
        spec: its grid.
        fold: None, or what the weight is multiplied by where norms are folded into it: |gamma| / sigma, detached, >= 0, to
            broadcast against it, (C, 1, ...) for a norm behind the layer. Then the *folded* weight `weight * fold` is what lies
            on the grid, and `fq(weight * fold) / fold` is returned: the general weight-side path, see fusion.py.
        channel: the block that makes one output channel, as in `block_range`; None for an index of dimension 0.
        ratio: None, or what `narrowed` takes: values beyond the narrower grid are clipped and get no gradient.
    """
    return _rounded_with_faint(weight, spec, fold, channel, ratio)[0]


def _rounded_with_faint(
    weight: Tensor, spec: TensorSpec, fold: Tensor | None, channel: tuple[int, ...] | None, ratio: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(the weight rounded, which channels are faint, see `_faint_step`)."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        y, faint = _rounded_with_faint(weight.float(), spec, fold, channel, ratio)
        return y.to(weight.dtype), faint
    data, faint = weight.detach(), None
    if fold is None and ratio is None and (plain := _plain_step(data, spec)) is not None:
        return _plainly_rounded(weight, plain), None
    with torch.no_grad():
        grid = weight_grid(data if fold is None else data * fold, spec)
        grid = grid if ratio is None else narrowed(grid, ratio, data.shape)
        step = grid.scale
        if fold is not None:
            step, faint = _faint_step(data, grid, fold, spec, channel or (1, *[-1] * (data.dim() - 1)))
    if grid.zero_point is None and ratio is None:
        return _plainly_rounded(weight, step), faint
    zero = step.new_zeros(()) if grid.zero_point is None else grid.zero_point
    passes = spec.apply_method == "clamp_round"
    return _FakeQuantizeWeight.apply(weight, step, zero, spec.qmin, spec.qmax, passes), faint


# -- kept for backward ------------------------------------------------------------------------------------------------


def _changed_since() -> RuntimeError:
    return RuntimeError(
        "a tensor that backward needs was changed in place after the forward (memory: lean looks at versions as autograd does); "
        "change it after backward, or clone it."
    )


@contextlib.contextmanager
def rounded_again(weight: Tensor, rounded: Tensor) -> Iterator[None]:
    """What is saved for backward in this context of `rounded`, the rounded `weight`, is not kept but made again.

    The steps are remembered, so that backward has the same bits. Only where rounding is a plain one; what else is saved stays,
    or goes the way that hooks around this context have for it (a checkpoint's, say). A weight that has changed by then is an
    error, as it is without.
    """
    step = None if rounded.grad_fn is None else getattr(rounded.grad_fn, "step", None)
    if step is None:
        yield
        return
    origin, place, shape = weight.detach(), rounded.untyped_storage().data_ptr(), rounded.shape
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # hooks do not nest: these would be left out

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() == place:
            return None, origin._version, (saved.shape, saved.stride(), saved.storage_offset())
        return (saved, saved._version, None) if outer is None else (outer[0](saved), None, None)

    def unpack(kept: Any) -> Tensor:
        saved, version, how = kept
        if how is None and outer is not None:
            found: Tensor = outer[1](saved)
            return found
        if (origin if how else saved)._version != version:
            raise _changed_since()
        if how is None:
            return saved  # type: ignore[no-any-return]
        return _rounded(origin, step).view(shape).as_strided(*how)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# -- methods ----------------------------------------------------------------------------------------------------------


class WeightQuantizer:
    """Rounds one parameter of a prepared layer. Method `qat`: to its range now, straight-through (Jacob et al. 2018).

    Args:
        spec: the grid.
        name: what it belongs to (`conv1.weight`).
        weight: the parameter, from whose values methods begin.
    """

    # Whether scales are those of the weight as it is, whatever norms are folded into it; they multiply the scales, then.
    unfolded = False
    faint: Tensor | None = None  # in this pass: which output channels are a constant when deployed

    def __init__(self, spec: TensorSpec, name: str, weight: Tensor) -> None:  # noqa: ARG002  (others begin from the weight)
        self.spec, self.name = spec, name
        self.changes = 0  # counts what moved the grid but the weight itself
        self.training = False  # whether this pass is one of training

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What the optimizer is to train, by name."""
        return {}

    @property
    def traces(self) -> bool:
        """Whether torch.compile can follow this quantizer now."""
        return True

    def commutes(self, weight: Tensor) -> bool:
        """Whether a factor for each index of dimension 0 multiplies the scales and leaves the integers."""
        return self.unfolded or self.spec.kernel(weight.dim())[0] == 1

    def grid(self, weight: Tensor) -> WeightGrid:
        """The grid of `weight`, float32 or float64."""
        return weight_grid(weight, self.spec)

    def integers(self, weight: Tensor, grid: WeightGrid) -> Tensor:
        """The integers of `weight` on its grid, as floats of its shape."""
        return quantize_weight(weight, grid, self.spec)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight rounded, same shape and dtype, with gradient; `fold`, `channel` as in `fake_quantize_weight`."""
        y, self.faint = _rounded_with_faint(weight, self.spec, fold, channel, None)
        return y

    def clipped(self, weight: Tensor, grid: WeightGrid) -> Tensor:
        """Which values lie beyond the ends of the grid and are cut off, bool of the weight's shape."""
        q = torch.div(weight.detach(), grid.scale).round_()
        q = q if grid.zero_point is None else q.add_(grid.zero_point)
        return (q < self.spec.qmin).logical_or_(q > self.spec.qmax)

    def state_dict(self) -> dict[str, Any]:
        """What cannot be had from the weight, as tensors on the host."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.learned.items()}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state is one of this method and granularity."""
        own = self.learned
        return set(own) == set(state) and all(isinstance(v, Tensor) and v.shape == own[k].shape for k, v in state.items())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved; parameters stay the same objects."""
        self.changes += 1
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(state[name])


_RATIOS = [0.3 + 0.02 * i for i in range(35, -1, -1)]  # 1 first: it wins against its equals


def narrowed(grid: WeightGrid, ratio: Tensor, shape: Sequence[int]) -> WeightGrid:
    """`grid` with its scales multiplied by `ratio`, one value a block of a weight of `shape`, as `block_range` has them."""
    factor = spread(ratio.to(grid.scale), shape).reshape(grid.scale.shape)
    return WeightGrid((grid.scale * factor).clamp_(min=torch.finfo(grid.scale.dtype).tiny), grid.zero_point)


def best_ratio(weight: Tensor, spec: TensorSpec) -> Tensor:
    """For each block of a weight's grid, which share of its absolute maximum rounds it with the least squared error.

    `weight`: float32 or float64, any shape; `spec`: symmetric. 36 shares from 0.3 to 1 are tried. Result: of the weight's dtype
    and device, one value a block, as `block_range` has them. A block of zeros has 1.
    """
    grid, kernel = weight_grid(weight, spec), spec.kernel(weight.dim())
    zero: Tensor | float = 0.0 if grid.zero_point is None else grid.zero_point
    best = torch.ones_like(block_mean(weight, kernel))
    least = torch.full_like(best, math.inf)
    for share in _RATIOS:
        ratio = torch.full_like(best, share)
        narrow = narrowed(grid, ratio, weight.shape)
        rounded = quantize_weight(weight, narrow, spec).sub_(zero).mul_(narrow.scale)
        error = block_mean(rounded.sub_(weight).square_(), kernel)
        better = error < least
        best, least = torch.where(better, ratio, best), torch.where(better, error, least)
    return best


class MseWeight(WeightQuantizer):
    """`observer: mse`: scales are a share of the weight's absolute maximum now, one fixed share a block (see `best_ratio`).

    The share is looked for when the weight is first rounded in training, on what lies on the grid (folded, where a norm's
    factor does not commute), and stays. So a grid still scales with its weight, fq(k w) = k fq(w), and norms fold as ever.
    """

    def __init__(self, spec: TensorSpec, name: str, weight: Tensor) -> None:
        super().__init__(spec, name, weight)
        self.blocks = tuple(1 if k == -1 else n // k for k, n in zip(spec.kernel(weight.dim()), weight.shape, strict=True))
        self.ratio: Tensor | None = None

    @property
    def traces(self) -> bool:
        """Once the shares are settled."""
        return self.ratio is not None

    def _ratio(self, weight: Tensor) -> Tensor:
        return best_ratio(weight, self.spec) if self.ratio is None else self.ratio

    def grid(self, weight: Tensor) -> WeightGrid:
        """The narrowed grid; before training a share that is not kept, so that an evaluation settles nothing."""
        return narrowed(weight_grid(weight, self.spec), self._ratio(weight), weight.shape)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight on the narrowed grid."""
        with torch.no_grad():
            data = wide(weight.detach())
            ratio = self._ratio(data if fold is None else data * fold)
        if self.ratio is None and self.training:
            self.ratio = ratio
            self.changes += 1
        y, self.faint = _rounded_with_faint(weight, self.spec, fold, channel, ratio)
        return y

    def state_dict(self) -> dict[str, Any]:
        """The shares; none before training, which lacks nothing: a weight can be converted without."""
        return {"ratio": () if self.ratio is None else self.ratio.cpu().clone()}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state has a share for each block."""
        shape = [tuple(ratio.shape) if isinstance(ratio, Tensor) else ratio for ratio in state.values()]
        return set(state) == {"ratio"} and shape[0] in (self.blocks, ())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        self.ratio = state["ratio"].clone() if isinstance(state["ratio"], Tensor) else None
        self.changes += 1
