# SPDX-License-Identifier: Apache-2.0
"""Owns what is measured of a prepared model: what rounding loses, which values grids cut off, how far ranges drift.

Activations are measured in single passes, which the caller begins and ends; in all others a quantizer asks one attribute.

    signal-to-noise ratio     10 log10( sum x^2 / sum (x - x_hat)^2 )  in dB        x: before rounding, x_hat: after
    effective number of bits  (signal-to-noise ratio - 1.76) / 6.02                 IEEE Std 1241-2010, section 9.4

The second inverts what an ideal converter of N bits makes of a full-scale sine; a tensor whose values do not fill their grid
so evenly has fewer effective bits than stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric, Metric

from lightning_quant.config import ConfigError
from lightning_quant.folding import fold, folded, folded_grid
from lightning_quant.fusion import FusedGroup
from lightning_quant.group import Group
from lightning_quant.integer import IntegerTensor, integer_tensor
from lightning_quant.keys import WEIGHT
from lightning_quant.patterns import BatchNorm
from lightning_quant.prepare import apply_phase, prepared_groups, quantizers_of, simulated
from lightning_quant.quantizers import ActivationQuantizer, Grid, SignGrid, wide
from lightning_quant.record import copied, moved, multiply_adds, split_example, undisturbed
from lightning_quant.schedule import Phase
from lightning_quant.targets import owner_of, tensors_in
from lightning_quant.weights import WeightQuantizer
from lightning_quant.wrapped import ModuleGroup

Ranges = dict[str, Tensor]  # by target name: float64, least values in row 0, greatest in row 1


def checked_interval(steps: int | None) -> int:
    """How many steps there are between measurements, 0 for never; a ConfigError if it is no such number."""
    if not isinstance(steps, int | None) or isinstance(steps, bool) or (steps or 0) < 0:
        raise ConfigError(f"log_every_n_steps: expected a number of steps, or None or 0 for never, got {steps!r}.")
    return steps or 0


# -- what rounding loses ----------------------------------------------------------------------------------------------


def effective_bits(decibels: float) -> float:
    """The bits of an ideal converter with this signal-to-noise ratio (IEEE Std 1241-2010): (dB - 1.76) / 6.02."""
    return (decibels - 1.76) / 6.02


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What rounding does to one tensor: dB, and a share in [0, 1]. No number: infinite (exact) or NaN (all zero, or unseen)."""

    signal_to_noise: float
    clipped: float

    @property
    def effective_bits(self) -> float:
        """By the signal-to-noise ratio."""
        return effective_bits(self.signal_to_noise)


class RoundingLoss(Metric):
    """The signal-to-noise ratio and the share of clipped values of several tensors, over all their batches and processes.

    One metric for all, so that processes exchange one small tensor a measurement. torchmetrics' own SignalNoiseRatio is the mean
    of the decibels of each last dimension; here sums of squares are added up first, so that the ratio is that of the whole.

    Args:
        tensors: how many there are; a row of the state each.
        kwargs: as for every torchmetrics metric.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, tensors: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(tensors, 4, dtype=torch.float64), dist_reduce_fx="sum")
        if tensors:
            self.update(0, torch.zeros(0), torch.zeros(0))  # a process that sees nothing answers the others, without a warning

    def update(self, row: int, x: Tensor, rounded: Tensor, clipped: float = 0.0) -> None:
        """Add one batch of one tensor. `x`, `rounded`: of one shape, any float dtype; `clipped`: a share, in [0, 1]."""
        x, rounded = wide(x.detach()), wide(rounded.detach())
        signal, noise = (torch.linalg.vector_norm(y.flatten(), dtype=torch.float64).square() for y in (x, x - rounded))
        self.sums[row] += torch.stack([signal, noise, *signal.new_tensor([clipped * x.numel(), x.numel()])]).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """`signal_to_noise` in dB (infinite: nothing was lost) and `clipped` in [0, 1], float64 (tensors,); NaN where unseen."""
        signal, noise, clipped, number = self.sums.unbind(1)
        return {"signal_to_noise": 10 * torch.log10(signal / noise), "clipped": clipped / number}

    def losses(self) -> list[Loss]:
        """The same as numbers, one `Loss` a tensor."""
        found = {key: values.view(-1).tolist() for key, values in self.compute().items()}  # torchmetrics squeezes a single one
        return [Loss(signal_to_noise=ratio, clipped=share) for ratio, share in zip(*found.values(), strict=True)]


class Meters:
    """Measures these quantizers in training passes from now on until `stop`; what they do not round does not count."""

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        self.quantizers, self.metric = dict(quantizers), RoundingLoss(len(quantizers))
        for row, quantizer in enumerate(self.quantizers.values()):
            quantizer.meter = partial(self._add, row, quantizer)

    def _add(self, row: int, quantizer: ActivationQuantizer, x: Tensor, y: Tensor, training: bool) -> None:
        if training and y is not x:
            if self.metric.sums.device != x.device and x.device.type != "mps":  # which has no float64
                self.metric.to(x.device)
            self.metric.update(row, quantizer.rectify(wide(x.detach())), y, quantizer.clipped_share(x))

    def stop(self) -> dict[str, Loss]:
        """What was measured, by target name, for those that were rounded at all."""
        for quantizer in self.quantizers.values():
            quantizer.meter = None
        if not self.quantizers:
            return {}
        found = zip(self.quantizers, self.metric.losses(), strict=True)
        return {name: loss for name, loss in found if not math.isnan(loss.clipped)}


def clipped_summary(losses: Mapping[str, Loss]) -> dict[str, float]:
    """`clipped_mean`, `clipped_max`: of the shares of clipped values, in [0, 1]; empty without any."""
    shares = [loss.clipped for loss in losses.values()]
    return {"clipped_mean": sum(shares) / len(shares), "clipped_max": max(shares)} if shares else {}


# -- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """A quantized parameter as it is and as it is deployed, norms folded into both: `exact` (float64) and `integers`.

    `layer`, `target`: whose it is, and its name there. `clipped`: bool, which values are cut off.
    """

    layer: str
    target: str
    exact: Tensor
    integers: IntegerTensor
    clipped: Tensor
    quantizer: WeightQuantizer

    @property
    def name(self) -> str:
        """Its target name ('conv1.weight')."""
        return f"{self.layer}.{self.target}"

    @property
    def rounded(self) -> Tensor:
        """What the integers stand for, float32."""
        integers = self.integers
        value: Tensor = torch.ops.lightning_quant.dequantize_weight(integers.q, integers.scale, integers.zero_point)
        return value

    @property
    def loss(self) -> Loss:
        """What rounding does to it."""
        metric = RoundingLoss(1, sync_on_compute=False).to(self.exact.device)
        metric.update(0, self.exact, self.rounded.to(self.exact.dtype), float(self.clipped.double().mean()))
        return metric.losses()[0]


def stored_parameters(model: nn.Module) -> Iterator[StoredParameter]:
    """Every parameter of a prepared model that is quantized, as it is now; a shared one for each layer that has it."""
    for head, group in prepared_groups(model).values():
        with torch.no_grad():
            if isinstance(group, FusedGroup):
                yield from _of_fused(head, group)
            elif isinstance(group, ModuleGroup):
                for name, quantizer in group.parameters.items():
                    owner, own = owner_of(head, name)
                    yield _stored(group, name, owner._parameters[own], quantizer)


def _stored(group: Group, target: str, parameter: Tensor | None, quantizer: WeightQuantizer) -> StoredParameter:
    assert parameter is not None
    data = wide(parameter.detach())
    return StoredParameter(
        layer=group.name,
        target=target,
        exact=data.double(),
        integers=integer_tensor(parameter, quantizer),
        clipped=quantizer.clipped(data, quantizer.grid(data)),
        quantizer=quantizer,
    )


def _of_fused(head: nn.Module, group: FusedGroup) -> Iterator[StoredParameter]:
    layer = group.layer(head)
    if group.weight is not None and not isinstance(head, BatchNorm):
        grid, weight, *_ = folded_grid(layer)
        yield StoredParameter(
            layer=group.name,
            target=WEIGHT,
            exact=folded(layer)[0],
            integers=fold(layer),
            clipped=group.weight.clipped(weight, grid),
            quantizer=group.weight,
        )
    if group.bias is not None:
        yield _stored(group, "bias", head._parameters["bias"], group.bias)


# -- a model on one input ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A prepared model on one input, rounded against float.

    `losses`: of activations, by target name. `output`: dB, of all that the model returns; None if nothing is comparable.
    `multiply_adds`: in float, by the names of modules, "" for the whole. `strayed`: activations that were not made alike.
    """

    losses: Mapping[str, Loss] = field(default_factory=dict)
    output: float | None = None
    multiply_adds: Mapping[str, int] = field(default_factory=dict)
    strayed: tuple[str, ...] = ()


class _Comparison:
    """The activations of a run in float, then those of the same run rounded, call by call."""

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer], device: torch.device) -> None:
        self.quantizers, self.rounds = dict(quantizers), False
        self.exact: dict[str, list[Tensor]] = {name: [] for name in quantizers}
        self.strayed: dict[str, None] = {}
        self.metric = RoundingLoss(len(quantizers) + 1, sync_on_compute=False).to(device)  # the last row: the model's outputs
        for row, (name, quantizer) in enumerate(self.quantizers.items()):
            quantizer.meter = partial(self._see, row, name)

    def _see(self, row: int, name: str, x: Tensor, y: Tensor, training: bool) -> None:  # noqa: ARG002
        quantizer = self.quantizers[name]
        if not self.rounds:
            self.exact[name].append(quantizer.rectify(wide(x.detach())))
            return
        exact = self.exact[name].pop(0) if self.exact[name] else None
        if exact is None or exact.shape != y.shape:
            self.strayed[name] = None
        elif y is not x:
            self.metric.update(row, exact, y, quantizer.clipped_share(x))

    def result(self, before: Sequence[Tensor], after: Sequence[Tensor], counts: Mapping[str, int]) -> Measured:
        """What was found; `before`, `after`: the outputs."""
        self.strayed.update((name, None) for name, rest in self.exact.items() if rest)
        row, alike = len(self.quantizers), [x.shape for x in before] == [y.shape for y in after]
        for x, y in zip(before, after, strict=True) if alike else ():
            if x.is_floating_point():
                self.metric.update(row, x, y)
        *losses, output = self.metric.losses()
        seen = {name: loss for name, loss in zip(self.quantizers, losses, strict=True) if not math.isnan(loss.clipped)}
        return Measured(
            losses={name: loss for name, loss in seen.items() if name not in self.strayed},
            output=None if math.isnan(output.signal_to_noise) else output.signal_to_noise,
            multiply_adds=counts,
            strayed=tuple(self.strayed),
        )


def measured_on(model: nn.Module, example_input: Any) -> Measured:
    """Run a prepared model on an input twice, in eval mode, in float and with everything rounded; the model is as before.

    `example_input`: as for `make_plan`. Both runs simulate, batch norm unfolded; multiply-adds are those that torch counts.
    """
    groups = [group for _, group in prepared_groups(model).values()]
    before = [(group.phase, group.partly) for group in groups]
    args, kwargs = split_example(moved(example_input, _device_of(model)))

    def run(*, rounds: bool) -> list[Tensor]:
        apply_phase(model, Phase(observe=False, quantize=rounds))
        comparison.rounds = rounds
        torch.manual_seed(0)
        return list(tensors_in(model(*copied(args), **copied(kwargs))))

    comparison = _Comparison(quantizers_of(model), _device_of(model))
    try:
        with undisturbed(model), simulated(model), torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                exact = run(rounds=False)
            rounded = run(rounds=True)
    finally:
        for quantizer in comparison.quantizers.values():
            quantizer.meter = None
        for group, (phase, partly) in zip(groups, before, strict=True):
            group.phase, group.partly = phase, partly
    return comparison.result(exact, rounded, multiply_adds(model, counter))


def counted_on(model: nn.Module, example_input: Any) -> dict[str, int]:
    """The multiply-adds of one call in eval mode, by the names of modules, "" for the whole; the model is as before."""
    args, kwargs = split_example(moved(example_input, _device_of(model)))
    with undisturbed(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*copied(args), **copied(kwargs))
    return multiply_adds(model, counter)


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


# -- ranges -----------------------------------------------------------------------------------------------------------


def ranges_of(quantizers: Mapping[str, ActivationQuantizer]) -> Ranges:
    """The ranges that are known, on the host."""
    return {name: ends for name, quantizer in quantizers.items() if (ends := _ends(quantizer)) is not None}


def _ends(quantizer: ActivationQuantizer) -> Tensor | None:
    if not quantizer.ready:
        return None
    if quantizer.low is None or quantizer.high is None:  # a learned grid: what it reaches
        grid = quantizer.grid()
        if isinstance(grid, SignGrid):
            return torch.tensor([-1.0, 1.0], dtype=torch.float64)
        assert isinstance(grid, Grid), quantizer.name
        levels = torch.tensor([grid.qmin - grid.zero_point, grid.qmax - grid.zero_point], dtype=torch.float64)
        return levels * grid.scale
    return torch.stack([torch.as_tensor(side, dtype=torch.float64).cpu() for side in (quantizer.low, quantizer.high)])


def drift(before: Ranges, now: Ranges) -> float | None:
    """How far ranges have moved: (|change of the low end| + |change of the high end|) / width before, the mean over all.

    A range with a scale for each block counts by the mean of its blocks. Those of no width or no value are left out; None if none
    is left.
    """
    mean = MeanMetric(sync_on_compute=False)
    for name in before.keys() & now.keys():
        width = before[name][1] - before[name][0]
        moved = (now[name] - before[name]).abs().sum(0)
        shares = (moved / width)[(width > 0) & moved.isfinite()]
        if shares.numel():
            mean.update(shares.mean())
    return float(mean.compute()) if mean.update_count else None
