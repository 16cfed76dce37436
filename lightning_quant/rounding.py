# SPDX-License-Identifier: Apache-2.0
"""Owns learned rounding: which weights of a prepared model to round up and which down, found from batches without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibrate import (
    FLOAT,
    QUANTIZED,
    UNREACHED,
    Call,
    calls_of,
    channel_means,
    check_ready,
    evaluating,
    groups_of,
    progress,
    report,
    run_all,
    tapped,
    weighted_groups,
)
from lightning_quant.config import ConfigError
from lightning_quant.folding import grid_factor, weight_of
from lightning_quant.fusion import FusedGroup, own_forward
from lightning_quant.group import hidden
from lightning_quant.methods import FixedRounding, LsqWeight
from lightning_quant.prepare import drop_deployed_layers
from lightning_quant.quantizers import wide
from lightning_quant.weights import WeightQuantizer, quantize_weight
from lightning_quant.wrapped import ModuleGroup

ZETA, GAMMA = 1.1, -0.1
BETA = (20.0, 2.0)
WARM_UP = 0.2


@dataclass(frozen=True, kw_only=True)
class LearnedLayer:
    """One layer's mean squared error of its output, against the float model's: rounded to nearest, and as learned.

    `turned`: the share of values that are no longer rounded to the nearest level.
    """

    nearest: float
    learned: float
    turned: float


@dataclass(frozen=True, kw_only=True)
class LearnedRounding:
    """What `learn_rounding` did, by layer, and the reason for every layer that is left."""

    layers: Mapping[str, LearnedLayer]
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{name}: error {one.nearest:.3g} -> {one.learned:.3g}, {one.turned:.1%} of values turned"
            for name, one in self.layers.items()
        ]
        return report(lines, self.left)


@dataclass(frozen=True, kw_only=True)
class _Options:
    iterations: int
    batch_size: int
    lr: float
    strength: float
    seed: int


def learn_rounding(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    iterations: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-2,
    strength: float = 100.0,
    seed: int = 0,
) -> LearnedRounding:
    """Learn for each weight whether to round it up or down, layer by layer in the order of the data, in place.

    AdaRound (Nagel et al. 2020, arXiv 2004.10568): with h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1), equation 23, the
    weight of a layer is s clamp(floor(w / s) + h(V)) while it is learned, and V minimizes (equation 25)

        |f(W x) - f(W~ x^)|^2 + strength sum(1 - |2 h(V) - 1|^beta)

    f: the layer's batch norm (on running statistics) and activation; x: its input in the float model, x^: in the quantized one,
    whose earlier layers are learned already. beta falls from 20 to 2. The second term, which drives h to 0 or 1, begins after a
    fifth of the iterations. Both terms are relative here (to the error of nearest rounding, to the number of values), so that
    `strength` suits layers of any size. Where nearest rounding turns out better on all batches together it is kept. A weight of
    exactly 0, a masked one say, stays 0.

    Afterwards the integers of these weights are fixed: they hold as long as the weights (and the norms behind them, on a grid
    that several channels share) stay as they are, and converting or running a weight that has moved by a step is a ConfigError.
    The weights themselves are not touched, and `restore_model` takes the rounding away.

    Args:
        model: prepared, with known ranges.
        batches, steps: as for `calibrate`; they are kept in memory, as are the inputs and outputs of one layer.
        iterations: steps of Adam for each layer. batch_size: rows of the batches in each of them. lr: of Adam.
        strength: of the second term. seed: of the choice of rows.

    Raises:
        ConfigError: as `correct_biases`, or for a number out of its range.
    """
    for key, value, least in (
        ("iterations", iterations, 1),
        ("batch_size", batch_size, 1),
        ("lr", lr, 0),
        ("strength", strength, 0),
    ):
        if value < least or not math.isfinite(value):
            raise ConfigError(f"learn_rounding: {key}={value!r} is out of range; give a number of {least} or more.")
    groups = groups_of(model, "learn_rounding")
    check_ready(model, "learn_rounding")
    calls = list(calls_of(model, batches, steps, "learn_rounding"))
    options = _Options(iterations=iterations, batch_size=batch_size, lr=lr, strength=strength, seed=seed)
    left = {name: _OWN_FORWARD for name, (_, group) in groups.items() if isinstance(group, ModuleGroup) and group.parameters}
    weighted = {name: one for name, one in weighted_groups(groups).items() if one[1].weight is not None}
    order = list(channel_means(model, calls, weighted, FLOAT))
    left.update({name: UNREACHED for name in weighted if name not in order})
    layers: dict[str, LearnedLayer] = {}
    for name in progress(order, "learning to round"):
        found = _learn_layer(model, name, weighted[name], calls, options)
        if isinstance(found, str):
            left[name] = found
        else:
            layers[name] = found
    drop_deployed_layers(model)
    return LearnedRounding(layers=layers, left=left)


_OWN_FORWARD = "it is quantized around its own forward, which has no one weight and output"


def _learn_layer(
    model: nn.Module, name: str, layer: tuple[nn.Module, FusedGroup], calls: list[Call], options: _Options
) -> LearnedLayer | str:
    """Learn the rounding of one layer and fix it; or why not."""
    head, group = layer
    before = group.weight.before if isinstance(group.weight, FixedRounding) else group.weight
    if type(before) not in (WeightQuantizer, LsqWeight):
        return f"method {before.spec.method!r} rounds another tensor than the weight" if before else "its weight is not quantized"
    group.weight = before
    pairs = _pairs(model, name, layer, calls)
    if isinstance(pairs, str):
        return pairs
    with evaluating(model, QUANTIZED):
        assert before is not None
        learner = _Learner(head, group, before, pairs)
        group.weight, report = learner.learn(options)
    return report


Data = list[tuple[Tensor, Tensor]]  # (rounded input, float output) of each call


def _pairs(model: nn.Module, name: str, layer: tuple[nn.Module, FusedGroup], calls: list[Call]) -> Data | str:
    """What a layer reads in the quantized model, and what it makes in the float one, before its activation."""
    head, group = layer
    made: list[Tensor] = []
    with tapped({name: group}, lambda _, x: made.append(x.detach().clone())):
        run_all(model, calls, FLOAT)
    read: list[Tensor] = []
    more: list[Any] = []

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        more.extend([*args[1:], *kwargs.values()] if args else [None])
        read.extend(x.clone() for x in args[:1])

    start = head if group.norm_before is None else group.norm_before
    handle = start.register_forward_pre_hook(see, with_kwargs=True)
    try:
        run_all(model, calls, QUANTIZED)
    finally:
        handle.remove()
    if more:
        return "it is called with more than one positional tensor"
    if len(read) != len(made):
        return f"the quantized model calls it {len(read)} times, the float one {len(made)} times"
    rounds = group.input is not None and group.input_applied
    with torch.no_grad():
        read = [group.input(x) if rounds and group.input is not None else x for x in read]
    return list(zip(read, made, strict=True))


class _Learner:
    """The optimization of one layer's rounding; the model is in eval mode."""

    def __init__(self, head: nn.Module, group: FusedGroup, before: WeightQuantizer, pairs: Data) -> None:
        self.head, self.group, self.before = head, group, before
        weight = weight_of(head).detach()
        self.weight = wide(weight)
        self.factor = grid_factor(group.layer(head))
        self.folded = self.weight if self.factor is None else self.weight * self.factor
        self.grid = before.grid(self.folded)
        self.rest = {key: value for key, value in group.rounded_parameters(head).items() if key != "weight"}
        self.pairs = [(x, self._activated(z)) for x, z in pairs]

    def _activated(self, z: Tensor) -> Tensor:
        return z if self.group.activation is None else own_forward(self.group.activation)(z)

    def _value(self, q: Tensor) -> Tensor:
        """The weight that integers (or what lies between them) stand for."""
        value = (q if self.grid.zero_point is None else q - self.grid.zero_point) * self.grid.scale
        return value if self.factor is None else torch.where(self.factor == 0, self.weight, value / self.factor)

    def _made(self, x: Tensor, q: Tensor) -> Tensor:
        """The layer's output with the weight on `q`, behind its activation."""
        group, weight = self.group, self._value(q).to(weight_of(self.head).dtype)
        x = x if group.norm_before is None else own_forward(group.norm_before)(x)
        with hidden(self.head, {**self.rest, "weight": weight}):
            y = own_forward(self.head)(x)
        return self._activated(y if group.norm is None else own_forward(group.norm)(y))

    def _error(self, q: Tensor) -> float:
        """The mean squared error over all pairs."""
        total = sum(float((self._made(x, q) - y).double().square().sum()) for x, y in self.pairs)
        return total / max(sum(y.numel() for _, y in self.pairs), 1)

    def _rows(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Some rows of one call, or all of it where there is no batch dimension."""
        x, y = self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]
        if x.dim() < max(weight_of(self.head).dim(), 2) or x.shape[0] != y.shape[0]:
            return x, y
        rows = torch.randperm(x.shape[0], generator=generator)[:count].to(x.device)
        return x[rows], y[rows]

    def learn(self, options: _Options) -> tuple[FixedRounding, LearnedLayer]:
        """(the fixed rounding, what it gains)."""
        spec = self.before.spec
        nearest = quantize_weight(self.folded, self.grid, spec)
        error = self._error(nearest)
        best, q = error, nearest
        if error > 0:
            exact = self.folded / self.grid.scale
            exact = exact if self.grid.zero_point is None else exact + self.grid.zero_point
            floor = exact.floor()
            # A weight of exactly 0 stays 0: it may be masked.
            held = torch.where(self.folded == 0, nearest - floor, torch.nan)
            up = self._optimized(floor, exact - floor, held, error, options)
            learned = (floor + up).clamp(spec.qmin, spec.qmax)
            if (found := self._error(learned)) < error:
                best, q = found, learned
        report = LearnedLayer(nearest=error, learned=best, turned=float((q != nearest).double().mean()))
        return FixedRounding(self.before, self.grid, q), report

    def _optimized(self, floor: Tensor, rest: Tensor, held: Tensor, error: float, options: _Options) -> Tensor:
        """Which values to round up: 1.0, else 0.0. `rest`: how far above the level below them they are, in steps.

        `held`: the answer for values that have no choice; NaN for the others.
        """
        spec, generator = self.before.spec, torch.Generator().manual_seed(options.seed)
        v = torch.logit((rest - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=options.lr)
        for iteration in range(options.iterations):
            x, y = self._rows(generator, options.batch_size)
            with torch.enable_grad():
                h = torch.where(held.isnan(), _rectified(v), held)
                made = self._made(x, (floor + h).clamp(spec.qmin, spec.qmax))
                loss = (made - y).square().mean() / error
                t = iteration / options.iterations
                if t >= WARM_UP:
                    beta = BETA[1] + (BETA[0] - BETA[1]) * (1 + math.cos(math.pi * (t - WARM_UP) / (1 - WARM_UP))) / 2
                    loss = loss + options.strength * (1 - (2 * h - 1).abs().pow(beta)).mean()
                (v.grad,) = torch.autograd.grad(loss, v)
            optimizer.step()
        with torch.no_grad():
            return torch.where(held.isnan(), (_rectified(v) >= 0.5).to(floor.dtype), held)


def _rectified(v: Tensor) -> Tensor:
    """Nagel et al. 2020, equation 23."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


__all__ = ["LearnedLayer", "LearnedRounding", "learn_rounding"]
