# SPDX-License-Identifier: Apache-2.0
"""Owns what is measured of quantizers while training: values that the grids cut off, and how far ranges drift.

Values are counted in single steps, which the caller begins and ends; in all other steps a quantizer asks one attribute. The
metrics here exchange nothing between processes by themselves, which would be one exchange for each: see `ranks.merge_clipped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric

from lightning_quant.config import ConfigError
from lightning_quant.quantizers import ActivationQuantizer, Grid

Ranges = dict[str, Tensor]  # by target name: float64, least values in row 0, greatest in row 1


def checked_interval(steps: int | None) -> int:
    """How many steps there are between measurements, 0 for never; a ConfigError if it is no such number."""
    if not isinstance(steps, int | None) or isinstance(steps, bool) or (steps or 0) < 0:
        raise ConfigError(f"log_every_n_steps: expected a number of steps, or None or 0 for never, got {steps!r}.")
    return steps or 0


def begin_count(quantizers: Iterable[ActivationQuantizer]) -> None:
    """Have these quantizers count what they clip, on top of what they have counted since `end_count`."""
    for quantizer in quantizers:
        quantizer.clipped = quantizer.clipped or MeanMetric(sync_on_compute=False)


def end_count(quantizers: Iterable[ActivationQuantizer]) -> dict[str, float]:
    """Have them stop. `clipped_mean`, `clipped_max`: of the quantizers' shares of clipped values, in [0, 1].

    A share is taken over all values that a quantizer has rounded since `begin_count`. Empty if none has rounded any.
    """
    shares = MeanMetric(sync_on_compute=False), MaxMetric(sync_on_compute=False)
    for quantizer in quantizers:
        if quantizer.clipped is not None and quantizer.clipped.update_count:
            share = quantizer.clipped.compute()
            for metric in shares:
                metric.update(share)
        quantizer.clipped = None
    if not shares[0].update_count:
        return {}
    return {"clipped_mean": float(shares[0].compute()), "clipped_max": float(shares[1].compute())}


def ranges_of(quantizers: Mapping[str, ActivationQuantizer]) -> Ranges:
    """The ranges that are known, on the host."""
    return {name: ends for name, quantizer in quantizers.items() if (ends := _ends(quantizer)) is not None}


def _ends(quantizer: ActivationQuantizer) -> Tensor | None:
    if not quantizer.ready:
        return None
    if quantizer.low is None or quantizer.high is None:  # a learned grid: what it reaches
        grid = quantizer.grid()
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
