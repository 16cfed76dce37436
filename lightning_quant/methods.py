# SPDX-License-Identifier: Apache-2.0
"""Owns the methods that learn the grid of a parameter, or fix it, and the table of all of them.

Their scales are those of the weight as it is, whatever norms are folded into it: a norm's factor multiplies the scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError, TensorSpec
from lightning_quant.quantizers import MIN_SCALE, block_mean, exchanged, sign, spread, wide
from lightning_quant.weights import MseWeight, WeightGrid, WeightQuantizer, quantize_weight, round_weight


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
        # A step of the optimizer may have gone past zero. Past autograd's version counter: a layer may run twice in one forward.
        self.scale.data.clamp_(min=MIN_SCALE)
        return self.scale

    def grid(self, weight: Tensor) -> WeightGrid:
        """The learned scales, spread over their blocks."""
        scale = spread(self._positive().detach(), weight.shape).to(weight.dtype)
        return WeightGrid(scale.flatten()[0] if self.scale.numel() == 1 else scale, None)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight on its learned grid."""
        assert fold is None and channel is None, self.name
        data = wide(weight)
        if self.scale.device != weight.device:  # the model has moved
            self.scale.data = self.scale.data.to(weight.device)
        scale = spread(self._positive(), weight.shape).to(data.dtype)
        factor = 1 / math.sqrt(self.count * self.spec.qmax)
        y: Tensor = _LearnedRound.apply(data, scale, self.spec.qmin, self.spec.qmax, factor)
        return y.to(weight.dtype)


class LsqPlusWeight(LsqWeight):
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576, section 4): learned scales from max(|m - 3 d|, |m + 3 d|) / 2^(b-1).

    m and d are the mean and standard deviation of the values that share a scale. No offset, as in the paper.
    """

    def __init__(self, spec: TensorSpec, name: str, weight: Tensor) -> None:
        super().__init__(spec, name, weight)
        data, kernel = weight.detach().float(), spec.kernel(weight.dim())
        mean = block_mean(data, kernel)
        spread_out = (block_mean(data.square(), kernel) - mean.square()).clamp_(min=0).sqrt_()
        start = torch.maximum((mean - 3 * spread_out).abs(), (mean + 3 * spread_out).abs()) / 2 ** (spec.bits - 1)
        with torch.no_grad():
            self.scale.copy_(torch.where(start > 0, start, torch.ones_like(start)))


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
        return WeightGrid(weight.new_full((), 1 / self.spec.qmax), None)  # filled in place: the host does not wait

    def integers(self, weight: Tensor, grid: WeightGrid) -> Tensor:
        """The integers of the squashed weight."""
        return quantize_weight(self._squashed(weight), grid, self.spec)

    def clipped(self, weight: Tensor, grid: WeightGrid) -> Tensor:  # noqa: ARG002
        """None: the maximum is the end of the grid."""
        return torch.zeros_like(weight, dtype=torch.bool)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The squashed weight, rounded."""
        assert fold is None and channel is None, self.name
        data = wide(weight)
        return round_weight(self._squashed(data), self.grid(data).scale).to(weight.dtype)


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
        return sign(weight)

    def clipped(self, weight: Tensor, grid: WeightGrid) -> Tensor:  # noqa: ARG002
        """Beyond -1 and 1."""
        return weight.detach().abs() > 1

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The sign."""
        assert fold is None and channel is None, self.name
        if torch.is_grad_enabled():
            with torch.no_grad():
                weight.clamp_(-1, 1)
        return exchanged(weight, sign(weight.detach()))


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
        data = wide(weight)
        with torch.no_grad():
            folded = data if fold is None else data * fold
            grid, q = self.grid(folded), self._checked(folded)
            value = (q if grid.zero_point is None else q - grid.zero_point) * grid.scale
            if fold is not None:
                value = torch.where(fold == 0, data, value / fold)  # a dead channel: whatever it holds is multiplied by 0
        return exchanged(data, value).to(weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The integers, of the weight's shape and the smallest type that holds the grid, and the grid, on the host."""
        zero = self.fixed.zero_point
        grid = {"scale": self.fixed.scale.cpu(), **({} if zero is None else {"zero_point": zero.cpu()})}
        return {"q": self.q.cpu(), **grid}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state has integers and scales of these shapes."""
        own = self.state_dict()
        return set(own) == set(state) and all(one.shape == state[key].shape for key, one in own.items())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        self.changes += 1
        self.q, self.fixed = state["q"].to(self.q.dtype), WeightGrid(state["scale"], state.get("zero_point"))


WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {
    "qat": WeightQuantizer,
    "ptq": WeightQuantizer,  # what a parameter is rounded to is known without calibration
    "lsq": LsqWeight,
    "lsq+": LsqPlusWeight,
    "pact": WeightQuantizer,
    "dorefa": DorefaWeight,
    "bnn": BinaryWeight,
}
OBSERVED: dict[str, type[WeightQuantizer]] = {"mse": MseWeight}


def weight_quantizer_kind(spec: TensorSpec) -> type[WeightQuantizer]:
    """Which quantizer a parameter of this grid has: by its observer where that says something, else by its method."""
    return OBSERVED.get(spec.observer) or WEIGHT_METHODS[spec.method]
