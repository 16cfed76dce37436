# SPDX-License-Identifier: Apache-2.0
"""Owns the methods that train the grid of an activation, or fix it, instead of observing its range.

What an optimizer is to train are Parameters of the quantizer, outside the module tree (`prepare.learned_parameters`). They begin
from the first batch. Zero points are integers, because runtimes have no others: 0 stays a level and padding exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.quantizers import MIN_SCALE, ActivationQuantizer, SignGrid, affine_range, float32, on_host, sign, wide


class _LearnedGrid(torch.autograd.Function):
    """A tensor on the grid of a learned scale and offset: y = (clamp(round(x / s) + z, qmin, qmax) - z) s, low = qmin - z.

    x gets g where x / s lies inside the ends, 0 elsewhere (Esser et al. 2020, equation 5). s gets the sum of g (round(x / s)
    - x / s) inside and g times the end outside (equation 3), that is of g (y - x) / s and g y / s. The offset gets the sum of g
    outside (Bhalgat et al. 2020, equation 6). Both are multiplied by `factor`.

    y is computed again for the gradient, not kept: the model may write into it (`out += x`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, low: Any, high: Any, factor: float) -> Tensor:
        s = float(scale.detach()) if on_host(x) else scale
        y = torch.div(x, s).round_().clamp_(low, high).mul_(s)
        ctx.save_for_backward(x, scale, *(end for end in (low, high) if isinstance(end, Tensor)))
        ctx.ends = (low, high) if not isinstance(low, Tensor) else None
        ctx.factor, ctx.offset = factor, offset is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *ends = ctx.saved_tensors
        low, high = ends or ctx.ends
        g, s = grads[0], scale
        if on_host(x):
            s = float(scale.detach())
            inside = torch.ops.aten.hardtanh_backward(g, x, low * s, high * s)
        else:
            inside = torch.where((x > low * scale).logical_and_(x < high * scale), g, 0)
        # Value by value, so that sums of large terms are never subtracted; x is cut to the ends first: infinity is one of them.
        cut, outside = x.clamp(low * s, high * s), g - inside
        y = torch.div(cut, s).round_().mul_(s)
        by_scale = torch.addcmul((y - cut).mul_(g), outside, y).sum().float().div_(scale).mul_(ctx.factor)
        by_offset = outside.sum().float().mul_(ctx.factor) if ctx.offset else None
        return inside, by_scale, by_offset, None, None, None


@dataclass(frozen=True)
class First:
    """What a grid begins from: mean absolute value, number of values, least and greatest of them."""

    size: float
    count: int
    least: float
    greatest: float

    @classmethod
    def of(cls, x: Tensor) -> First:
        """Of a batch, float32."""
        return cls(float(x.abs().mean()), x.numel(), float(x.amin()), float(x.amax()))

    @classmethod
    def of_all(cls, parts: Sequence[First]) -> First:
        """Of a batch that came in parts."""
        count = sum(part.count for part in parts)
        size = sum(part.size * part.count for part in parts) / count
        return cls(size, count, min(part.least for part in parts), max(part.greatest for part in parts))

    @property
    def furthest(self) -> float:
        """The greatest absolute value."""
        return max(-self.least, self.greatest)


class LearnedActivation(ActivationQuantizer):
    """What quantizers with a scale of their own have in common: `_start` sets it by the first batch, no later one moves it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The clamp of the grid is the ReLU where the grid begins at 0; any other clamp is done before.
        self.absorbs = self.rectified and self.floor == 0.0 and math.isinf(self.cap)
        self.zero_point = self.spec.qmin
        self.started = False

    @property
    def ready(self) -> bool:
        """Whether a first batch was seen."""
        return self.started

    @property
    def traces(self) -> bool:
        """After the first batch, which waits for its numbers."""
        return self.started and super().traces

    def observe(self, x: Tensor) -> None:
        """Begin from the first batch without NaN or infinity that holds more than zeros.

        A grid that began from zeros would not know their sign or size, and where it has no levels below 0 it would stop the
        gradient of what is to grow out of them (a batch norm's weight may begin at 0).
        """
        if self.started or x.numel() == 0:
            return
        x = x.detach().float()
        if not bool(torch.isfinite(x).all()):
            self._warn()
            if self.noted is not None:
                self.noted.append(None)
            return
        first = First.of(x.clamp(self.floor, self.cap) if self.rectified else x)
        if self.noted is not None:
            self.noted.append(first)
        self._begin(first, x.device)

    def _begin(self, first: First, device: torch.device) -> None:
        if not first.furthest:
            return
        with torch.no_grad():
            for parameter in self.learned.values():
                parameter.data = parameter.data.to(device)
            self._start(first)
        self.started = True
        self.changes += 1

    def begin_together(self, processes: Sequence[Sequence[First | None]], device: torch.device) -> bool:
        """Begin from what all processes have noted in place of what this one has; whether there was something to begin from.

        The first call of the layer in which no process met NaN or infinity, and one met more than zeros, is what counts.
        """
        self.started, self.noted = False, []
        for call in range(max(map(len, processes), default=0)):
            parts = [noted[call] for noted in processes if len(noted) > call]
            whole = [part for part in parts if part is not None]
            if not self.started and len(whole) == len(parts):
                self._begin(First.of_all(whole), device)
        return self.started

    def _start(self, first: First) -> None:
        """Begin from a batch that holds more than zeros."""
        raise NotImplementedError

    def _zero_for(self, first: First) -> int:
        """The zero point for a first batch: the grid's middle where it has to be symmetric about zero, else its least level."""
        signed = self.spec.scheme == "symmetric" or (not self.absorbs and first.least < 0)
        return (self.spec.qmax + self.spec.qmin + 1) // 2 if signed else self.spec.qmin

    def _bound(self) -> None:
        """Keep what is learned positive: a step of the optimizer may have gone past zero."""
        raise NotImplementedError

    def _scale(self) -> Tensor:
        """The scale now, detached, 0-dim."""
        raise NotImplementedError

    def _zero(self, scale: Tensor) -> Tensor | int:  # noqa: ARG002  (what moves with it)
        """The zero point now; a tensor where it moves."""
        return self.zero_point

    def _numbers(self) -> tuple[float, int]:
        self._bound()
        scale = self._scale()
        return float32(float(scale)), int(self._zero(scale))

    def scale_for(self, x: Tensor) -> float | Tensor:
        """As for every quantizer."""
        return self._numbers()[0] if on_host(x) else self._scale()

    def __call__(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype, with gradients to x and to what is learned."""
        if not torch.compiler.is_dynamo_compiling():
            for parameter in self.learned.values():
                if parameter.device != x.device:  # the model has moved
                    parameter.data = parameter.data.to(x.device)
        if self.rectified and not self.absorbs:
            x = F.hardtanh(x, self.floor, self.cap)
        self._bound()
        y = self._rounded(wide(x))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The learned numbers and the zero point; None before the first batch."""
        if not self.started:
            return {**dict.fromkeys(self.learned), "zero_point": None}
        return {
            **{name: float(value.detach()) for name, value in self.learned.items()},
            "zero_point": int(self._zero(self._scale())),
        }

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state is of this method."""
        return set(state) == set(self.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved; parameters stay the same objects."""
        self.changes += 1
        self.started = state["zero_point"] is not None
        if self.started:
            self.zero_point = state["zero_point"]
            with torch.no_grad():
                for name, parameter in self.learned.items():
                    parameter.fill_(state[name])


class LsqActivation(LearnedActivation):
    """Learned step size (Esser et al. 2020, arXiv 1902.08153): from 2 mean|x| / sqrt(Qp), gradient times 1 / sqrt(N Qp).

    N is the number of features, one example's values. Behind a ReLU, or where the first batch has no negative value, the grid is
    unsigned (Qn = 0), else symmetric about zero.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The scale."""
        return {"scale": self.scale}

    def _start(self, first: First) -> None:
        self.zero_point = self._zero_for(first)
        self.scale.fill_(2 * first.size / math.sqrt(self.spec.qmax - self.zero_point))

    def _bound(self) -> None:
        self.scale.data.clamp_(min=MIN_SCALE)  # past autograd's version counter: a layer may run twice in one forward

    def _scale(self) -> Tensor:
        return self.scale.detach()

    def _rounded(self, x: Tensor) -> Tensor:
        return self._on_grid(x, None, self.spec.qmax - self.zero_point)

    def _on_grid(self, x: Tensor, offset: Tensor | None, levels: int) -> Tensor:
        """`levels`: what the gradients of scale and offset are tempered by, with the number of features."""
        zero = self._zero(self._scale())
        if isinstance(zero, Tensor) and on_host(x):
            zero = int(zero)
        low, high = self.spec.qmin - zero, self.spec.qmax - zero
        features = x.numel() / max(x.shape[0], 1) if x.dim() else 1
        y: Tensor = _LearnedGrid.apply(x, self.scale, offset, low, high, 1 / math.sqrt(max(features, 1) * levels))
        return y


class LsqPlusActivation(LsqActivation):
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): scale and offset learned, from the first batch's least and greatest value.

    The offset is the value of level 0, beta; the zero point is round(-beta / s), clamped to the grid, so that 0 stays a level:
    the paper's real offset has no counterpart in a runtime. Behind a ReLU the offset is 0 and stays.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.offset = nn.Parameter(torch.zeros(()))
        self.moves = not (self.rectified and self.floor == 0.0) and self.spec.scheme == "affine"

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """Scale, and the offset where it moves."""
        return {**super().learned, "offset": self.offset} if self.moves else super().learned

    def _start(self, first: First) -> None:
        scale, self.zero_point = affine_range(first.least, first.greatest, self.spec)
        self.scale.fill_(scale)
        self.offset.fill_(-self.zero_point * scale)

    def _zero(self, scale: Tensor) -> Tensor | int:
        if not self.moves:
            return self.zero_point
        return (-self.offset.detach().double() / scale.double()).round_().clamp_(self.spec.qmin, self.spec.qmax).float()

    def _rounded(self, x: Tensor) -> Tensor:
        return self._on_grid(x, self.offset if self.moves else None, self.spec.qmax - self.spec.qmin)


class _Clipped(torch.autograd.Function):
    """Choi et al. 2018, equations 1 to 3: clip to [low, alpha], round; alpha gets the sum of g where x >= alpha."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, steps: int, signed: bool) -> Tensor:
        scale = (alpha / steps).to(x.dtype)
        ctx.save_for_backward(x, alpha)
        ctx.signed = signed
        return torch.div(x, scale).round_().clamp_(-steps if signed else 0, steps).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        g, above = grads[0], x >= alpha
        below = x <= (-alpha if ctx.signed else 0)
        by_alpha = torch.where(above, g, 0).sum()
        if ctx.signed:
            by_alpha = by_alpha - torch.where(below, g, 0).sum()
        return g * above.logical_or(below).logical_not_(), by_alpha.to(alpha.dtype), None, None


class PactActivation(LearnedActivation):
    """PACT (Choi et al. 2018, arXiv 1805.06085): a learned clipping level alpha; the scale is alpha / levels.

    The paper begins from a large constant and decays it; here alpha begins at the first batch's greatest value, and decays with
    the optimizer's own weight decay. Where the first batch has negative values the clip is [-alpha, alpha].
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha = nn.Parameter(torch.ones(()))

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The clipping level."""
        return {"alpha": self.alpha}

    def _start(self, first: First) -> None:
        self.zero_point = self._zero_for(first)
        self.alpha.fill_(first.furthest)

    def _bound(self) -> None:
        self.alpha.data.clamp_(min=MIN_SCALE * (self.spec.qmax - self.zero_point))

    def _scale(self) -> Tensor:
        return self.alpha.detach().double() / (self.spec.qmax - self.zero_point)

    def _rounded(self, x: Tensor) -> Tensor:
        steps, signed = self.spec.qmax - self.zero_point, self.zero_point > self.spec.qmin
        y: Tensor = _Clipped.apply(x, self.alpha, steps, signed)
        return y


class DorefaActivation(ActivationQuantizer):
    """DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160): activations are cut to [0, 1] and rounded; nothing is learned."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.low, self.high = 0.0, 1.0

    def forget(self) -> None:
        """Nothing: the range is fixed."""

    def observe(self, x: Tensor) -> None:
        """Nothing: the range is fixed."""

    def __call__(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype. The cut stops the gradient, also where a value beyond an end rounds to it."""
        cuts = torch.is_grad_enabled() and x.requires_grad and self.spec.apply_method != "clamp_round"
        return super().__call__(x.clamp(0, 1) if cuts else x)


class _SignClipped(torch.autograd.Function):
    """Courbariaux et al. 2016, equation 4: the sign forward, the gradient of the hard tanh backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = grads[0] * (x.abs() <= 1)
        return gradient


class BinaryActivation(ActivationQuantizer):
    """Binarized networks (Courbariaux et al. 2016, arXiv 1602.02830): the sign of the activation, 1 at 0; nothing is learned.

    No runtime has a kernel for it: deployed, it is float arithmetic on -1 and 1.
    """

    @property
    def ready(self) -> bool:
        """Always."""
        return True

    def observe(self, x: Tensor) -> None:
        """Nothing: there is no range."""

    def grid(self) -> SignGrid:
        """The sign."""
        return SignGrid()

    def __call__(self, x: Tensor) -> Tensor:
        """The sign of x, of the same dtype; of what an absorbed clamp leaves of x."""
        y: Tensor = _SignClipped.apply(F.hardtanh(x, self.floor, self.cap) if self.rectified else x)
        return y

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether nothing was saved."""
        return not state

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: ARG002
        """Nothing to take over."""
        self.changes += 1


ACTIVATION_METHODS: dict[str, type[ActivationQuantizer]] = {
    "lsq": LsqActivation,
    "lsq+": LsqPlusActivation,
    "pact": PactActivation,
    "dorefa": DorefaActivation,
    "bnn": BinaryActivation,
}

__all__ = ["ACTIVATION_METHODS", "LearnedActivation"]
