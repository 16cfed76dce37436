# SPDX-License-Identifier: Apache-2.0
"""Owns observers that keep a histogram: percentiles, least divergence, least rounding error; and the quantizer that uses one.

The histogram counts exactly: its bins are 2^e wide and begin at multiples of that, so that a range that grows merges bins in
pairs and moves no value to a wrong one. What it holds depends on the values alone, not on how they came in batches.

To look for a range costs up to a few hundredths of a second. Training steps that observe use one that lags: it is looked for
again when the number of batches has grown by an eighth. Everything else (evaluation, frozen ranges, conversion) uses the range
of all batches. Neither depends on when a checkpoint was saved or a validation run.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_quant.config import TensorSpec
from lightning_quant.keys import kind_of_observer, percent_of
from lightning_quant.quantizers import ActivationQuantizer, Grid, wide

BINS = 4096  # 2049 to 4096 of them lie between the least and the greatest value
_SMALLEST = -126  # 2^-126 is the smallest normal float32


class Histogram:
    """Counts of values in bins [k 2^e, (k + 1) 2^e) that cover 0 and all values seen; zeros are counted apart.

    `counts`: int64 (BINS,) on the host, of the bins `first`, `first` + 1, ..; `exponent`: e, the least for which they suffice;
    `zeros`: how many values were 0, which is a level of every grid; `least`, `greatest`: of all values.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent, self.first, self.zeros, self.batches = _SMALLEST, 0, 0, 0
        self.least, self.greatest = math.inf, -math.inf

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Count a batch: float32 or float64, any shape and device, finite, at least one value; `low`, `high`: its ends.

        On an accelerator the values are counted there, and the host waits for the counts.
        """
        self.cover(low, high)
        index = torch.div(x, self.width).floor_().sub_(self.first).to(torch.int64).flatten()
        self.counts += torch.bincount(index, minlength=BINS).cpu()
        zeros = int((x == 0).sum())
        self.counts[-self.first] -= zeros
        self.zeros += zeros
        self.batches += 1

    def _grow(self) -> None:
        """Widen and move the bins so that they cover 0, the least and the greatest value."""
        low, high = min(self.least, 0.0), max(self.greatest, 0.0)
        if low == high:
            return
        exponent = max(self.exponent, math.frexp(high - low)[1] - BINS.bit_length() + 1)
        while math.floor(high / math.ldexp(1.0, exponent)) - math.floor(low / math.ldexp(1.0, exponent)) >= BINS:
            exponent += 1
        self._move_to(exponent, math.floor(low / math.ldexp(1.0, exponent)))

    def _move_to(self, exponent: int, first: int) -> None:
        """Have bins 2^exponent wide, `first` being the number of the first; they cover what is counted."""
        if (exponent, first) != (self.exponent, self.first):
            (held,) = self.counts.nonzero(as_tuple=True)
            merged = torch.div(held + self.first, 2 ** min(exponent - self.exponent, 62), rounding_mode="floor") - first
            self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts[held])
            self.exponent, self.first = exponent, first

    def cover(self, low: float, high: float) -> None:
        """Have the bins that values from `low` to `high` call for, too."""
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        self._grow()

    def counts_in(self, bins: Histogram) -> Tensor:
        """What is counted, in the bins of a histogram that covers it, and the number of zeros behind them: int64 (BINS + 1,)."""
        self._move_to(bins.exponent, bins.first)
        return torch.cat([self.counts, torch.tensor([self.zeros])])

    def take(self, counts: Tensor, batches: int) -> None:
        """Count what `counts_in` gave, which makes so many batches."""
        self.counts += counts[:-1]
        self.zeros += int(counts[-1])
        self.batches += batches

    def edges(self) -> Tensor:
        """The ends of the bins, float64 (BINS + 1,)."""
        return torch.arange(self.first, self.first + BINS + 1, dtype=torch.float64) * self.width

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of all values lie, interpolated between neighbours in rank, to within a bin."""
        place = -self.first  # zeros stand between the negative bins and the others
        counts = torch.cat([self.counts[:place], torch.tensor([self.zeros]), self.counts[place:]])
        upto = counts.cumsum(0)

        def ranked(k: int) -> float:
            if k in (0, int(upto[-1]) - 1):
                return self.least if k == 0 else self.greatest
            bin_ = int(torch.searchsorted(upto, k, right=True))
            if bin_ == place:
                return 0.0
            inside = (k - int(upto[bin_] - counts[bin_]) + 0.5) / int(counts[bin_])
            value = (self.first + bin_ - (bin_ > place) + inside) * self.width
            return min(max(value, self.least), self.greatest)

        rank = (int(upto[-1]) - 1) * (percent / 100)
        below = math.floor(rank)
        return ranked(below) + (rank - below) * (ranked(math.ceil(rank)) - ranked(below))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers and one tensor."""
        return {**vars(self), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        vars(self).update({**state, "counts": state["counts"].cpu().clone()})


# -- observers: which range a histogram speaks for ----------------------------------------------------------------------


class HistogramObserver:
    """Counts batches and says what range they speak for.

    Args:
        spec: the grid that the range is for; one scale.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec, self.histogram = spec, Histogram()

    def observe(self, x: Tensor, low: float, high: float) -> None:
        """Count one batch, as `Histogram.add` does."""
        self.histogram.add(x, low, high)

    def range(self) -> tuple[float, float]:
        """(low, high) of everything counted so far; there is something. Always the same for the same counts."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The histogram, as numbers and tensors."""
        return self.histogram.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        self.histogram.load_state_dict(state)


class PercentileObserver(HistogramObserver):
    """`percentile:p`: from the (100 - p)th to the pth percentile of all values, zeros among them; p is 99.99 if left out."""

    def range(self) -> tuple[float, float]:
        """Both percentiles."""
        percent = percent_of(self.spec.observer)
        return self.histogram.percentile(100 - percent), self.histogram.percentile(percent)


def divergences(counts: Tensor, starts: Tensor, ends: Tensor, levels: int) -> Tensor:
    """KL(P || Q) in nats for several ways of clipping a histogram (Migacz 2017, "8-bit inference with TensorRT").

    P is the histogram with all that lies outside the bins [start, end) added to the first and the last of them. Q has the
    counts of these bins without the outliers, in `levels` groups of equally many bins (a bin k of n is in group k levels // n);
    the sum of a group is spread evenly over those of its bins that hold something. Both are normalised.

    Args:
        counts: float64 (bins,), >= 0.
        starts, ends: int64 (c,), with end - start >= levels.
        levels: how many values the quantized tensor can take.

    Returns:
        float64 (c,); infinity where outliers would go to a bin that is empty.
    """

    def upto(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(1), values.cumsum(0)])

    mass, filled, logs = upto(counts), upto((counts > 0).double()), upto(torch.xlogy(counts, counts))
    total, below, above = mass[-1], mass[starts], mass[-1] - mass[ends]
    first, last = counts[starts], counts[ends - 1]
    own = logs[ends] - logs[starts] - torch.xlogy(first, first) - torch.xlogy(last, last)
    own += torch.xlogy(first + below, first + below) + torch.xlogy(last + above, last + above)
    # The sum over bins of P ln Q is one over groups, in which Q is constant.
    steps = torch.arange(levels + 1) * (ends - starts).unsqueeze(1)
    borders = starts.unsqueeze(1) + torch.div(steps + levels - 1, levels, rounding_mode="floor")
    held = mass[borders].diff(dim=1)
    q = held / (filled[borders].diff(dim=1).clamp_(min=1) * held.sum(1, keepdim=True))
    held[:, 0] += below
    held[:, -1] += above
    found = (own - torch.xlogy(held, q).sum(1)) / total - total.log()
    lost = ((first == 0) & (below > 0)) | ((last == 0) & (above > 0))
    return found.masked_fill_(lost, math.inf)


class EntropyObserver(HistogramObserver):
    """`entropy`: clips where the clipped distribution and its quantized version diverge least (Migacz 2017, TensorRT).

    Which ends move follows from the grid. Affine, values on one side of zero (behind a ReLU): the end away from zero, on all
    levels of the grid. Symmetric: the same for |x|, on the levels from zero up. Affine with values on both sides: both ends,
    from the best of a coarse grid of pairs, one after the other and then both in small steps, until neither moves. Zeros are
    left out: every grid has them, and in a group with others they would count as spread. A grid with more levels than the
    histogram has bins (12 bits) clips nothing.
    """

    def range(self) -> tuple[float, float]:
        """The range of least divergence."""
        h, counts = self.histogram, self.histogram.counts.double()
        zero, levels = -h.first, self.spec.qmax - self.spec.qmin + 1
        positive, negative = counts[zero:], counts[:zero].flip(0)
        low, high = min(h.least, 0.0), max(h.greatest, 0.0)
        if self.spec.scheme == "symmetric":
            sides = torch.zeros(max(len(positive), len(negative)), dtype=torch.float64)
            sides[: len(positive)] += positive
            sides[: len(negative)] += negative
            end = _one_end(sides, (levels + 1) // 2) * h.width
            return max(-end, low), min(end, high)
        if not bool(negative.any()):
            return low, min(_one_end(positive, levels) * h.width, high)
        if not bool(positive.any()):
            return max(-_one_end(negative, levels) * h.width, low), high
        start, stop = _two_ends(counts, zero, levels)
        return max((start - zero) * h.width, low), min((stop - zero) * h.width, high)


_AT_ONCE = 2**18  # numbers in a table of candidates and levels


def _best(counts: Tensor, starts: Tensor, ends: Tensor, levels: int) -> tuple[int, int]:
    """The (start, end) of least divergence, the first of equals."""
    rows = max(_AT_ONCE // levels, 1)
    parts = zip(starts.split(rows), ends.split(rows), strict=True)
    found = int(torch.cat([divergences(counts, *part, levels) for part in parts]).argmin())
    return int(starts[found]), int(ends[found])


def _one_end(counts: Tensor, levels: int) -> int:
    """Up to which bin to keep a histogram that begins at zero: the end of least divergence, the widest of equals."""
    ends = counts.nonzero().flatten().flip(0) + 1  # outliers can only go to a bin that holds something
    if len(ends) == 0 or int(ends[0]) <= levels:
        return int(ends[0]) if len(ends) else 0
    ends = ends[ends >= levels]
    return _best(counts, torch.zeros_like(ends), ends, levels)[1]


def _two_ends(counts: Tensor, zero: int, levels: int) -> tuple[int, int]:
    """The bins [start, end) to keep around `zero`."""
    held = counts.nonzero().flatten()
    starts, ends = held[held < zero], held[held >= zero].flip(0) + 1  # the widest first
    if int(ends[0] - starts[0]) <= levels:
        return int(starts[0]), int(ends[0])

    def best_of(starts: Tensor, ends: Tensor) -> tuple[int, int]:
        pairs = torch.cartesian_prod(starts, ends)
        pairs = pairs[pairs[:, 1] - pairs[:, 0] >= levels]
        return _best(counts, pairs[:, 0], pairs[:, 1], levels)

    some = [side[torch.linspace(0, len(side) - 1, 32).round().long().unique()] for side in (starts, ends)]
    start, end = best_of(*some)
    for _ in range(8):
        before = start, end
        end = best_of(torch.tensor([start]), ends)[1]
        start = best_of(starts, torch.tensor([end]))[0]
        start, end = best_of(starts[(starts - start).abs() <= 12], ends[(ends - end).abs() <= 12])
        if (start, end) == before:
            break
    return start, end


class MseObserver(HistogramObserver):
    """`mse`: the range whose grid rounds the values seen with the least squared error, clipping included.

    The error is that of the grid itself, with its number of levels and its rounded zero point; values count as spread evenly
    over their bin. The search goes from coarse to fine: pairs of ends all over the range, then smaller and smaller steps.
    """

    def range(self) -> tuple[float, float]:
        """The range of least error."""
        h = self.histogram
        low, high = min(h.least, 0.0), max(h.greatest, 0.0)
        if int(h.counts.count_nonzero()) <= 1:  # one value, as far as bins can tell
            return low, high
        if self.spec.scheme == "symmetric":
            most = max(-low, high)
            end = self._searched(0.0, most)[1]
            return max(-end, low), min(end, high)
        return self._searched(low, high)

    def _searched(self, low: float, high: float) -> tuple[float, float]:
        """The best pair of ends in [low, 0] x [0, high]; a side that is 0 stays so."""
        many = 24 if low < 0 < high else 128
        shares = (torch.arange(many, -1, -1, dtype=torch.float64) / many) ** 2  # dense where outliers leave the best range
        lows, highs = (shares * side if side else torch.zeros(1, dtype=torch.float64) for side in (low, high))
        pairs = torch.cartesian_prod(lows, highs)
        pairs = pairs[pairs[:, 1] > pairs[:, 0]]
        best = pairs[int(self._errors(pairs).argmin())]
        steps = torch.tensor([-low, high], dtype=torch.float64) * (2 / many)
        limits = torch.tensor([[low, 0.0], [0.0, high]], dtype=torch.float64)
        moves = torch.linspace(-1, 1, 17, dtype=torch.float64)
        for _ in range(3):
            for side in (0, 1, 0, 1):
                if steps[side] > 0:
                    near = best.repeat(len(moves) + 1, 1)  # the best so far stays first: it wins against its equals
                    near[1:, side] = (near[1:, side] + moves * steps[side]).clamp(*limits[side].tolist())
                    near = near[near[:, 1] > near[:, 0]]
                    best = near[int(self._errors(near).argmin())]
            steps = steps / 8
        return float(best[0]), float(best[1])

    def _errors(self, pairs: Tensor) -> Tensor:
        """The summed squared error of every (low, high), float64 (c, 2) to (c,); zeros have none.

        With y = x / s and m the level that y goes to, s^3 (m / 12 + (y - m)^3 / 3) is an antiderivative of the squared error,
        continuous over levels and clipped ends alike; its difference over a bin, by the bin's width, is the mean there.
        """
        spec, h = self.spec, self.histogram
        low, high = pairs[:, :1], pairs[:, 1:]
        if spec.scheme == "symmetric":
            scale = torch.maximum(-low, high) / ((spec.qmax - spec.qmin) / 2)
            zero = torch.full_like(scale, (spec.qmax + spec.qmin + 1) // 2)
        else:
            scale = (high - low) / (spec.qmax - spec.qmin)
            zero = (spec.qmin - (low / scale).round()).clamp_(spec.qmin, spec.qmax)
        padded = torch.cat([h.counts.new_zeros(1), h.counts, h.counts.new_zeros(1)])
        weights = -padded.diff()  # of the antiderivative at each edge
        (held,) = weights.nonzero(as_tuple=True)
        y = h.edges()[held] / scale
        level = y.round().clamp_(min=spec.qmin - zero).clamp_(max=spec.qmax - zero)
        total = (y - level).pow_(3).div_(3).add_(level.div_(12)) @ weights[held].double()
        return total * scale.squeeze(1) ** 3 / h.width


OBSERVERS: dict[str, type[HistogramObserver]] = {
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
    "mse": MseObserver,
}


# -- the quantizer ------------------------------------------------------------------------------------------------------

_OWN = ("low", "high", "observer", "lagging", "searched")  # of a saved state; the rest is the observer's


class HistogramQuantizer(ActivationQuantizer):
    """An activation whose range a histogram speaks for; see the module's docstring for which range is used when.

    Counted is what lies behind the clamp where one is absorbed. A batch with NaN or infinity is left out and reported once. On
    an accelerator each observed batch makes the host wait: its ends, its counts and the range are host numbers.
    """

    def __init__(self, spec: TensorSpec, name: str, **options: Any) -> None:
        super().__init__(spec, name, **options)
        self.observer = OBSERVERS[kind_of_observer(spec.observer)](spec)
        self.lagging: tuple[float, float] | None = None
        self.searched = 0  # how many batches `lagging` speaks for
        self._whole: tuple[int, float, float] | None = None  # how many batches there were, and their range
        self._collapsed = False
        self.fresh = Histogram()  # of several processes: what this one observed since they last met

    @property
    def batches(self) -> int:
        """How many batches count."""
        return self.observer.histogram.batches

    @property
    def ready(self) -> bool:
        """Whether a batch counts; of several processes, this one's first batch does before they meet."""
        return self.batches > 0 or self.lagging is not None

    @property
    def traces(self) -> bool:
        """Never: a histogram grows with what it meets."""
        return False

    def forget(self) -> None:
        """Begin anew with the next batch."""
        super().forget()
        self.observer = OBSERVERS[kind_of_observer(self.spec.observer)](self.spec)
        self.lagging, self.searched, self._whole = None, 0, None

    def observe(self, x: Tensor) -> None:
        """Count one batch. `x`: any shape, floating point; before the ReLU if that is absorbed."""
        x = x.detach()
        if x.numel() == 0:
            return
        x = wide(x)
        low, high = float(x.amin()), float(x.amax())
        if not (math.isfinite(low) and math.isfinite(high)):
            self._warn()
            if self.noted is not None:
                self.noted.append((-math.inf, math.inf))
            return
        if self.rectified:
            x, (low, high) = x.clamp(self.floor, self.cap), (min(max(side, self.floor), self.cap) for side in (low, high))
        self._count()
        if self.noted is None:
            self.observer.observe(x, low, high)
            return
        self.noted.append((low, high))
        self.fresh.add(x, low, high)
        if not self.batches:
            alone = OBSERVERS[kind_of_observer(self.spec.observer)](self.spec)
            alone.histogram = self.fresh
            self.lagging = self._range_of(alone)

    def count_together(self, counts: Tensor, batches: int) -> None:
        """Count what all processes have observed since they last met, in the bins of the histogram; none is a batch left out."""
        if self.noted is not None:
            self.noted, self.fresh = [], Histogram()
        if not self.searched:
            self.lagging = None
        if batches:
            self.observer.histogram.take(counts, batches)
            self.changes += 1

    def _search(self) -> tuple[float, float]:
        """The range of all batches; looked for once."""
        if self._whole is None or self._whole[0] != self.batches:
            self._whole = self.batches, *self._range_of(self.observer)
        return self._whole[1:]

    def _range_of(self, observer: HistogramObserver) -> tuple[float, float]:
        low, high = observer.range()
        h = observer.histogram
        if low == high == 0 and h.least < h.greatest:
            low, high = h.least, h.greatest
            if not self._collapsed:
                self._collapsed = True
                warnings.warn(
                    f"{self.name}: {self.spec.observer} leaves the range [0, 0], because so many of its values are 0; the "
                    "least and the greatest value are used instead. Take a higher percentile or another observer.",
                    stacklevel=4,
                )
        return low, high

    def _update(self) -> None:
        """Have `low` and `high` be what this pass is to use."""
        if self.settled:
            self.low, self.high = self._search()
            return
        if self.lagging is None or (self.batches > self.searched and 8 * self.batches >= 9 * self.searched):
            self.lagging, self.searched = self._search(), self.batches
        self.low, self.high = self.lagging

    def grid(self) -> Grid:
        """The grid as host numbers; `ready` must hold."""
        grid = super().grid()
        assert isinstance(grid, Grid)
        return grid

    def _numbers(self) -> tuple[float, int]:
        self._update()
        return super()._numbers()

    def _scale_and_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        self._update()
        return super()._scale_and_zero(device)

    def state_dict(self) -> dict[str, Any]:
        """The range of all batches, None before the first; the observer's counts and the range that training uses."""
        low, high = self._search() if self.batches else (None, None)
        return {
            "low": low,
            "high": high,
            "observer": self.spec.observer,
            "lagging": () if self.lagging is None else self.lagging,
            "searched": self.searched,
            **self.observer.state_dict(),
        }

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved state is one of this observer."""
        return set(state) == {*_OWN, *self.observer.state_dict()} and state["observer"] == self.spec.observer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved; the range of all batches follows from the counts."""
        self.observer.load_state_dict({key: value for key, value in state.items() if key not in _OWN})
        self.lagging = (state["lagging"][0], state["lagging"][1]) if state["lagging"] else None
        self.searched, self._whole = state["searched"], None
        self.changes += 1
