# SPDX-License-Identifier: Apache-2.0
"""Owns weights: the grid of a parameter by its values now, its rounding with gradient, and the methods that train it.

The equation is that of `quantizers.py`. A `WeightQuantizer` rounds one parameter of one prepared layer; `fold` below is what
norms multiply the weight by when they are folded into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError, TensorSpec
from lightning_quant.quantizers import MIN_SCALE, block_mean, block_range, spread


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
    if spec.granularity in ("per_tensor", "out_channel"):
        keep = spec.granularity == "out_channel"
        dims = tuple(range(1 if keep else 0, weight.dim()))
        high, low = (
            (weight.amax(dims, keepdim=keep), weight.amin(dims, keepdim=keep)) if dims else (weight.clone(), weight.clone())
        )
    else:
        low, high = (spread(side, weight.shape).clone() for side in block_range(weight, spec.kernel(weight.dim())))
    if spec.scheme == "symmetric":
        scale = _positive(torch.maximum(high, low.neg_()).div_((spec.qmax - spec.qmin) / 2))
        zero = (spec.qmax + spec.qmin + 1) // 2
        return WeightGrid(scale, torch.full_like(scale, zero) if zero else None)
    high, low = high.clamp_(min=0), low.clamp_(max=0)
    scale = _positive((high - low).div_(spec.qmax - spec.qmin))
    return WeightGrid(scale, (spec.qmin - (low / scale).round_()).clamp_(spec.qmin, spec.qmax))


def _positive(scale: Tensor) -> Tensor:
    """In place: 1 for a channel of zeros, and never so small that dividing by it overflows."""
    return scale.masked_fill_(scale == 0, 1.0).clamp_(min=torch.finfo(scale.dtype).tiny)


def quantize_weight(weight: Tensor, grid: WeightGrid, spec: TensorSpec) -> Tensor:
    """The integers of a weight on `grid`, carried as floats of its dtype and shape."""
    q = torch.div(weight, grid.scale).round_()
    if grid.zero_point is not None:
        q.add_(grid.zero_point)
    return q.clamp_(spec.qmin, spec.qmax)


class _RoundWeight(torch.autograd.Function):
    """Symmetric about zero with the current absolute maximum: nothing can clip, so the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.div(weight, scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


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


def _faint_step(weight: Tensor, grid: WeightGrid, fold: Tensor, spec: TensorSpec, channel: tuple[int, ...]) -> Tensor:
    """The step of a folded weight, seen from the unfolded weight: s / c, and another one for faint channels.

    A channel whose folded weights all round to 0 (gamma near 0) would have zero batch statistics, and then neither its
    gamma nor its running variance could ever recover. It is trained on a grid of its own; deployed it is 0 plus beta.
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
    return torch.where(most == 0, torch.where(own > 0, own, 1.0), step)


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
    if weight.dtype in (torch.float16, torch.bfloat16):
        return fake_quantize_weight(weight.float(), spec, fold, channel, ratio).to(weight.dtype)
    with torch.no_grad():
        data = weight.detach()
        grid = weight_grid(data if fold is None else data * fold, spec)
        grid = grid if ratio is None else narrowed(grid, ratio, data.shape)
        step = grid.scale if fold is None else _faint_step(data, grid, fold, spec, channel or (1, *[-1] * (data.dim() - 1)))
    if grid.zero_point is None and ratio is None:
        y: Tensor = _RoundWeight.apply(weight, step)
    else:
        zero = step.new_zeros(()) if grid.zero_point is None else grid.zero_point
        passes = spec.apply_method == "clamp_round"
        y = _FakeQuantizeWeight.apply(weight, step, zero, spec.qmin, spec.qmax, passes)
    return y


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

    def __init__(self, spec: TensorSpec, name: str, weight: Tensor) -> None:  # noqa: ARG002  (others begin from the weight)
        self.spec, self.name = spec, name
        self.changes = 0  # counts what moved the grid but the weight itself
        self.training = False  # whether this pass is one of training

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What the optimizer is to train, by name."""
        return {}

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
        return fake_quantize_weight(weight, self.spec, fold, channel)

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

    def _ratio(self, weight: Tensor) -> Tensor:
        return best_ratio(weight, self.spec) if self.ratio is None else self.ratio

    def grid(self, weight: Tensor) -> WeightGrid:
        """The narrowed grid; before training a share that is not kept, so that an evaluation settles nothing."""
        return narrowed(weight_grid(weight, self.spec), self._ratio(weight), weight.shape)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight on the narrowed grid."""
        with torch.no_grad():
            data = weight.detach()
            data = data if data.dtype == torch.float64 else data.float()
            ratio = self._ratio(data if fold is None else data * fold)
        if self.ratio is None and self.training:
            self.ratio = ratio
            self.changes += 1
        return fake_quantize_weight(weight, self.spec, fold, channel, ratio)

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


class _LearnedRound(torch.autograd.Function):
    """Esser et al. 2020, equations 1, 3 and 5; `scale` broadcasts against x.

    With q = clamp(round(x / s)) and g the gradient of q s: x gets g where x / s lies inside the ends, 0 elsewhere; s gets the
    sum of g (round(x / s) - x / s) inside and of g q outside, which is sum(g q) - sum(g_x x / s), times the gradient scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, factor: float) -> Tensor:
        q = torch.div(x, scale).round_().clamp_(low, high)
        ctx.save_for_backward(x, scale, q)
        ctx.ends = low, high, factor
        return q * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, q = ctx.saved_tensors
        low, high, factor = ctx.ends
        v = x / scale
        inside = (v > low).logical_and_(v < high)
        gradient = grads[0] * inside
        by_scale = (grads[0] * q).sub_(gradient * v).mul_(factor)
        return gradient, by_scale.sum_to_size(scale.shape), None, None, None


class LsqWeight(WeightQuantizer):
    """Learned step size (Esser et al. 2020, arXiv 1902.08153): one scale a block, from 2 mean|w| / sqrt(qmax).

    The gradient of a scale is multiplied by 1 / sqrt(n qmax), n values to a scale. Zero point 0.
    """

    unfolded = True

    def __init__(self, spec: TensorSpec, name: str, weight: Tensor) -> None:
        super().__init__(spec, name, weight)
        size = weight.detach().float().abs()
        blocks = block_mean(size, spec.kernel(weight.dim()))
        self.count = weight.numel() / blocks.numel()
        start = blocks.mul_(2 / math.sqrt(spec.qmax))
        self.scale = nn.Parameter(torch.where(start > 0, start, torch.ones_like(start)))

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The scales."""
        return {"scale": self.scale}

    def _positive(self) -> Tensor:
        with torch.no_grad():  # a step of the optimizer may have gone past zero
            self.scale.clamp_(min=MIN_SCALE)
        return self.scale

    def grid(self, weight: Tensor) -> WeightGrid:
        """The learned scales, spread over their blocks."""
        scale = spread(self._positive().detach(), weight.shape).to(weight.dtype)
        return WeightGrid(scale.flatten()[0] if self.scale.numel() == 1 else scale, None)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight on its learned grid."""
        assert fold is None and channel is None, self.name
        wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        if self.scale.device != weight.device:  # the model has moved
            self.scale.data = self.scale.data.to(weight.device)
        scale = spread(self._positive(), weight.shape).to(wide.dtype)
        factor = 1 / math.sqrt(self.count * self.spec.qmax)
        y: Tensor = _LearnedRound.apply(wide, scale, self.spec.qmin, self.spec.qmax, factor)
        return y.to(weight.dtype)


class DorefaWeight(WeightQuantizer):
    """DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160, equation 9): tanh(w) / max|tanh(w)| on a fixed grid over [-1, 1].

    The paper's 2^k levels have no zero; a runtime's integers do, so ours are the 2^k - 1 of the symmetric grid. Gradients are
    those of the formula, rounding passed straight through, the maximum included. One scale, 1 / qmax.
    """

    unfolded = True

    def _squashed(self, weight: Tensor) -> Tensor:
        bent = weight.tanh()
        most = bent.abs().amax()
        return bent / torch.where(most > 0, most, 1.0)

    def grid(self, weight: Tensor) -> WeightGrid:
        """1 / qmax."""
        return WeightGrid(weight.new_tensor(1 / self.spec.qmax), None)

    def integers(self, weight: Tensor, grid: WeightGrid) -> Tensor:
        """The integers of the squashed weight."""
        return quantize_weight(self._squashed(weight), grid, self.spec)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The squashed weight, rounded."""
        assert fold is None and channel is None, self.name
        wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        y: Tensor = _RoundWeight.apply(self._squashed(wide), self.grid(wide).scale)
        return y.to(weight.dtype)


class _Exchanged(torch.autograd.Function):
    """Another value in place of x; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Sign(torch.autograd.Function):
    """+1 at 0; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class BinaryWeight(WeightQuantizer):
    """Binarized networks (Courbariaux et al. 2016, arXiv 1602.02830, algorithm 1): the sign of the weight, scale 1.

    The gradient reaches the real weight unchanged, and in training the real weight is kept in [-1, 1], as the paper's update is.
    """

    unfolded = True

    def grid(self, weight: Tensor) -> WeightGrid:
        """Scale 1."""
        return WeightGrid(weight.new_ones(()), None)

    def integers(self, weight: Tensor, grid: WeightGrid) -> Tensor:  # noqa: ARG002
        """-1 and 1."""
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The sign."""
        assert fold is None and channel is None, self.name
        if torch.is_grad_enabled():
            with torch.no_grad():
                weight.clamp_(-1, 1)
        y: Tensor = _Sign.apply(weight)
        return y


class FixedRounding(WeightQuantizer):
    """A weight whose grid and integers are decided: each value was rounded up or down on purpose (AdaRound, Nagel et al. 2020).

    The integers hold for the weight that they were chosen for. A value that has moved by a whole step or more since is an error;
    so is one whose norm has, where a norm is folded into the weight before it is rounded. The gradient passes.

    Args:
        before: the quantizer that it takes the place of.
        grid: the grid of the weight (with what is folded into it).
        q: the integers, of the weight's shape.
    """

    def __init__(self, before: WeightQuantizer, grid: WeightGrid, q: Tensor) -> None:
        self.spec, self.name, self.unfolded = before.spec, before.name, before.unfolded
        self.changes = before.changes + 1
        self.before, self.fixed = before, grid
        fits = (
            d for d in (torch.int8, torch.int16) if torch.iinfo(d).min <= self.spec.qmin and self.spec.qmax <= torch.iinfo(d).max
        )
        self.q = q.to(next(fits, torch.int32))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        zero = self.fixed.zero_point
        return self.q.to(device), self.fixed.scale.to(device), None if zero is None else zero.to(device)

    def _checked(self, weight: Tensor) -> Tensor:
        """The integers as floats, if they are `weight`'s."""
        q, scale, zero = self._on(weight.device)
        q = q.to(weight.dtype)
        exact = weight.detach() / scale.to(weight.dtype)
        exact = (exact if zero is None else exact + zero.to(weight.dtype)).clamp(self.spec.qmin, self.spec.qmax)
        moved = (exact - q).abs() >= 1 + 1e-3
        if bool(moved.any()):
            raise ConfigError(
                f"{self.name}: {int(moved.sum())} of {moved.numel()} values are a step or more away from the integers that were "
                "learned for them: the weight, or the norm behind it, has changed since. Call learn_rounding again."
            )
        return q

    def grid(self, weight: Tensor) -> WeightGrid:
        """The grid as it was decided."""
        _, scale, zero = self._on(weight.device)
        return WeightGrid(scale.to(weight.dtype), None if zero is None else zero.to(weight.dtype))

    def integers(self, weight: Tensor, grid: WeightGrid) -> Tensor:  # noqa: ARG002
        """The integers as they were decided; a ConfigError if the weight has changed."""
        return self._checked(weight)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:  # noqa: ARG002
        """The weight on its integers, same shape and dtype, with gradient."""
        wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        with torch.no_grad():
            folded = wide if fold is None else wide * fold
            grid, q = self.grid(folded), self._checked(folded)
            value = (q if grid.zero_point is None else q - grid.zero_point) * grid.scale
            if fold is not None:
                value = torch.where(fold == 0, wide, value / fold)  # a dead channel: whatever it holds is multiplied by 0
        y: Tensor = _Exchanged.apply(wide, value)
        return y.to(weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The integers, of the weight's shape and the smallest type that holds the grid, and the grid, on the host."""
        zero = self.fixed.zero_point
        return {"q": self.q.cpu(), "scale": self.fixed.scale.cpu(), "zero_point": None if zero is None else zero.cpu()}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state has integers and scales of these shapes."""
        own = self.state_dict()
        return set(own) == set(state) and all(
            (one is None) == (state[key] is None) and (one is None or one.shape == state[key].shape) for key, one in own.items()
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        self.changes += 1
        self.q, self.fixed = state["q"].to(self.q.dtype), WeightGrid(state["scale"], state["zero_point"])


WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {
    "qat": WeightQuantizer,
    "lsq": LsqWeight,
    "lsq+": LsqWeight,
    "pact": WeightQuantizer,
    "dorefa": DorefaWeight,
    "bnn": BinaryWeight,
}
OBSERVED: dict[str, type[WeightQuantizer]] = {"mse": MseWeight}


def weight_quantizer_kind(spec: TensorSpec) -> type[WeightQuantizer]:
    """Which quantizer a parameter of this grid has: by its observer where that says something, else by its method."""
    return OBSERVED.get(spec.observer) or WEIGHT_METHODS[spec.method]
