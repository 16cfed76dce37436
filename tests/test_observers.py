# SPDX-License-Identifier: Apache-2.0
"""Owns the observers that keep histograms: against references in numpy, through growth and strange batches, saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_fusion import prepared, sgd_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, export_model, make_plan
from lightning_quant.config import TensorSpec
from lightning_quant.export import onnxruntime_session
from lightning_quant.keys import OBSERVERS as WORDS
from lightning_quant.keys import Blocks, plain_observer
from lightning_quant.observers import (
    BINS,
    OBSERVERS,
    Histogram,
    HistogramObserver,
    HistogramQuantizer,
    PercentileObserver,
    _two_ends,
    divergences,
)
from lightning_quant.prepare import (
    apply_phase,
    is_complete,
    load_quantizer_state,
    prepared_groups,
    quantizer_state,
    quantizers_of,
    simulated,
)
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.schedule import Phase
from lightning_quant.weights import MseWeight, WeightQuantizer, best_ratio

Array = np.ndarray[Any, np.dtype[np.float64]]


def spec(observer: str, dtype: str = "uint8", scheme: str = "affine") -> TensorSpec:
    return TensorSpec.make(dtype, scheme, "per_tensor", weight=False, observer=observer)


def observed(observer: str, *batches: Tensor, dtype: str = "uint8", scheme: str = "affine", **options: Any) -> HistogramQuantizer:
    quantizer = HistogramQuantizer(spec(observer, dtype, scheme), "layer._output_", **options)
    for batch in batches:
        quantizer.observe(batch)
    return quantizer


def final(quantizer: HistogramQuantizer) -> tuple[float, float]:
    """The range of all batches."""
    quantizer.settled = True
    quantizer.grid()
    assert isinstance(quantizer.low, float)
    assert isinstance(quantizer.high, float)
    return quantizer.low, quantizer.high


def sample(kind: str, n: int = 50_000) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, generator=generator)
    flat = torch.rand(n, generator=generator)
    return {
        "normal": x * 3,
        "relu": x.relu(),
        "negative": -x.abs(),
        "skewed": -flat.log() - 0.4,
        "laplace": -flat.log() * x.sign() + 0.1,
        "outliers": torch.where(flat < 1e-3, x * 12, x),
        "flat": flat * 5 - 2,
    }[kind]


KINDS = ["normal", "relu", "negative", "skewed", "laplace", "outliers", "flat"]


def test_every_word_has_a_class() -> None:
    assert [*OBSERVERS] == [word for word in WORDS if word not in ("default", "moving_average", "minmax")]


# -- the histogram -----------------------------------------------------------------------------------------------------


def growing(n: int = 9) -> list[Tensor]:
    """Batches whose range grows a thousandfold, to either side, with zeros."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(500, generator=generator) * 3.0 ** (i if i % 2 else n - i) / 50 for i in range(n)]
    return [torch.cat([batch, torch.zeros(3)]) for batch in batches]


def test_counts_are_those_of_all_values_at_once_whatever_the_order_of_the_batches() -> None:
    batches = growing()
    everything = torch.cat(batches).double().numpy()
    for order in (batches, batches[::-1], [torch.cat(batches)]):
        histogram = Histogram()
        for batch in order:
            histogram.add(batch, float(batch.min()), float(batch.max()))
        edges = histogram.edges().numpy()
        expected, _ = np.histogram(everything[everything != 0], bins=edges)
        # numpy closes its last bin, which here holds nothing.
        np.testing.assert_array_equal(histogram.counts.numpy(), expected)
        assert histogram.zeros == 27
        assert (histogram.least, histogram.greatest) == (everything.min(), everything.max())
        assert BINS / 2 < (everything.max() - everything.min()) / histogram.width <= BINS
        assert math.frexp(histogram.width)[0] == 0.5, "a power of two"
        assert histogram.batches == len(order)


def test_a_range_that_grows_merges_bins() -> None:
    histogram, widths = Histogram(), []
    for most in (1.0, 1.5, 2.5, 300.0, 1e30):
        histogram.add(torch.tensor([most, most / 2]), most / 2, most)
        widths.append(histogram.width)
    assert widths == sorted(widths)
    assert len(set(widths)) >= 4
    assert int(histogram.counts.sum()) == 10
    assert int(histogram.counts[-histogram.first]) == 8, "seen from 1e30 the others are one bin"
    histogram.add(torch.tensor([-1e31]), -1e31, -1e31)
    assert int(histogram.counts.sum()) == 11
    assert histogram.counts.nonzero().flatten().tolist()[0] == 0


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_values_are_counted(scale: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64).mul(scale).to(dtype)
    histogram = Histogram()
    histogram.add(x, float(x.min()), float(x.max()))
    assert int(histogram.counts.sum()) + histogram.zeros == 1001
    value = histogram.percentile(75)
    assert abs(value - float(np.percentile(x.double().numpy(), 75))) <= histogram.width
    assert histogram.width <= max(scale / 1000, 2.0**-126)


# -- percentile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [50, 75.5, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_numpys_of_all_batches_within_a_bin(kind: str, percent: float) -> None:
    x = sample(kind)
    quantizer = observed(f"percentile:{percent}", *x.split([10, 1, 4989, 45_000]))
    assert isinstance(quantizer.observer, PercentileObserver)
    low, high = quantizer.observer.range()
    width = quantizer.observer.histogram.width
    assert width < 0.02
    assert low == pytest.approx(np.percentile(x.double().numpy(), 100 - percent), abs=width)
    assert high == pytest.approx(np.percentile(x.double().numpy(), percent), abs=width)
    if percent == 100:
        assert (low, high) == (float(x.min()), float(x.max()))


def test_percentile_alone_is_the_99_99th() -> None:
    x = sample("normal")
    assert final(observed("percentile", x)) == final(observed("percentile:99.99", x))
    assert final(observed("percentile", x)) != final(observed("percentile:99.9", x))
    assert [plain_observer(f"percentile{p}") for p in ("", ":99.990", ":99.90", ":100.0", ":50")] == [
        "percentile",
        "percentile",
        "percentile:99.9",
        "percentile:100",
        "percentile:50",
    ]
    assert plain_observer("mse") == "mse"


def test_few_values_are_interpolated_as_numpy_does() -> None:
    x = torch.tensor([-1.0, 0.0, 0.0, 5.0, 9.0])
    for percent in (0, 10, 40, 60, 62.5, 80, 99, 100):
        histogram = Histogram()
        histogram.add(x, -1.0, 9.0)
        assert histogram.percentile(percent) == pytest.approx(np.percentile(x.numpy(), percent), abs=histogram.width)


def test_a_percentile_that_leaves_nothing_says_so_and_keeps_the_ends() -> None:
    x = torch.cat([torch.zeros(1000), torch.tensor([3.0])])
    quantizer = observed("percentile:99", x)
    with pytest.warns(UserWarning, match=r"layer\._output_: percentile:99 leaves the range \[0, 0\]"):
        assert final(quantizer) == (0.0, 3.0)
    quantizer.observe(x)
    assert final(quantizer) == (0.0, 3.0), "said once"


# -- entropy: Migacz 2017, in plain loops ------------------------------------------------------------------------------


def naive_divergence(counts: Array, start: int, end: int, levels: int) -> float:
    """KL(P || Q) of the bins [start, end): outliers into the ends of P, Q from `levels` groups of the bins themselves."""
    kept = counts[start:end]
    p = kept.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    group = np.arange(len(kept)) * levels // len(kept)
    sums, filled = np.bincount(group, kept), np.bincount(group, kept > 0)
    q = np.where(kept > 0, sums[group] / np.maximum(filled[group], 1), 0.0)
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    if (q[used] == 0).any():
        return math.inf
    return float((p[used] * np.log(p[used] / q[used])).sum())


def reference_counts(x: Tensor, width: float) -> tuple[Array, Array]:
    """(at and above zero, below zero): histograms of the values other than 0, away from zero."""
    values = x.double().numpy()
    index = np.floor(values[values != 0] / width).astype(int)
    positive, negative = index[index >= 0], -1 - index[index < 0]
    return np.bincount(positive).astype(float), np.bincount(negative).astype(float)


def reference_end(counts: Array, levels: int) -> int:
    """The end of least divergence; candidates end in a bin that holds something, the widest of equals wins."""
    held = np.flatnonzero(counts) + 1
    ends = [int(end) for end in held[::-1] if end >= levels]
    return min(ends, key=lambda end: naive_divergence(counts, 0, end, levels))


@pytest.mark.parametrize("dtype", ["uint4", "int3"])
@pytest.mark.parametrize("kind", ["relu", "negative", "outliers"])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_entropy_finds_the_threshold_of_plain_loops(kind: str, dtype: str, scheme: str) -> None:
    x = sample(kind, 4000)
    x = x.relu() if kind == "outliers" and scheme == "affine" else x
    quantizer = observed("entropy", *x.chunk(3), dtype=dtype, scheme=scheme)
    histogram = quantizer.observer.histogram
    positive, negative = reference_counts(x, histogram.width)
    grid = 2 ** int(dtype[-1]) - (scheme == "symmetric" and dtype.startswith("int"))
    if scheme == "symmetric":
        sides = np.zeros(max(len(positive), len(negative)))
        sides[: len(positive)] += positive
        sides[: len(negative)] += negative
        end = reference_end(sides, (grid + 1) // 2) * histogram.width
        expected = (max(-end, min(histogram.least, 0.0)), min(end, max(histogram.greatest, 0.0)))
    elif kind == "negative":
        expected = (max(-reference_end(negative, grid) * histogram.width, histogram.least), 0.0)
    else:
        expected = (0.0, min(reference_end(positive, grid) * histogram.width, histogram.greatest))
    assert final(quantizer) == expected
    if kind == "outliers":
        assert expected[1] < 0.6 * histogram.greatest, "they are clipped"


@pytest.mark.parametrize("levels", [4, 15, 100, 256])
def test_divergences_of_any_bins_are_those_of_plain_loops(levels: int) -> None:
    numbers = np.random.default_rng(1)
    counts = numbers.poisson(np.exp(-np.abs(np.arange(600) - 250) / 60) * 20).astype(float)
    starts = numbers.integers(0, 250, 40)
    ends = np.minimum(starts + levels + numbers.integers(0, 340, 40), 600)
    found = divergences(torch.tensor(counts), torch.tensor(starts), torch.tensor(ends), levels)
    expected = [naive_divergence(counts, int(a), int(b), levels) for a, b in zip(starts, ends, strict=True)]
    assert sum(map(math.isinf, expected)) < 20
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert min(expected) >= 0


@pytest.mark.parametrize("seed", range(6))
def test_entropy_on_both_sides_of_zero_comes_to_the_best_pair(seed: int) -> None:
    numbers, zero, levels = np.random.default_rng(seed), 50 + 10 * seed, 16
    place = np.abs(np.arange(160) - zero)
    counts = numbers.poisson(2000 * np.exp(-place / (6 + 2 * seed)) + 0.3).astype(float)
    starts, ends = np.flatnonzero(counts[:zero]), np.flatnonzero(counts[zero:]) + zero + 1
    every = {
        (int(a), int(b)): naive_divergence(counts, int(a), int(b), levels)
        for a in starts[::2]
        for b in ends[::2]
        if b - a >= levels
    }
    found = _two_ends(torch.tensor(counts), zero, levels)
    assert naive_divergence(counts, *found, levels) <= 1.02 * min(every.values())
    assert min(every.values()) < 0.9 * naive_divergence(counts, int(starts[0]), int(ends[-1]), levels)


def test_entropy_clips_both_ends_of_an_affine_range() -> None:
    x = sample("outliers")
    low, high = final(observed("entropy", x))
    assert float(x.min()) < low < -2
    assert 2 < high < float(x.max())


def test_entropy_with_more_levels_than_bins_clips_nothing() -> None:
    x = sample("outliers")
    for dtype, scheme in (("uint16", "affine"), ("int16", "symmetric")):
        assert final(observed("entropy", x, dtype=dtype, scheme=scheme)) == (float(x.min()), float(x.max()))


# -- least squared error -----------------------------------------------------------------------------------------------


def rounding_error(x: Array, low: float, high: float, dtype: str, scheme: str) -> float:
    """The mean squared error of the equation in quantizers.py, in float64, for a range."""
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    if dtype.startswith("u"):
        qmin, qmax = 0, 2**bits - 1
    else:
        qmax = 2 ** (bits - 1) - 1
        qmin = -qmax if scheme == "symmetric" else -qmax - 1
    if scheme == "symmetric":
        scale, zero = max(-low, high) / ((qmax - qmin) / 2), (qmin + qmax + 1) // 2
    else:
        scale = (high - low) / (qmax - qmin)
        zero = min(max(qmin - round(low / scale), qmin), qmax)
    q = np.clip(np.round(x / scale) + zero, qmin, qmax)
    return float(np.mean(((q - zero) * scale - x) ** 2))


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [("uint8", "affine"), ("int8", "symmetric"), ("uint4", "affine"), ("int3", "symmetric"), ("uint2", "affine")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_any_range_tried_on_the_values_themselves(kind: str, dtype: str, scheme: str) -> None:
    x = sample(kind, 6000)
    values = x.double().numpy()
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    many = 160 if low == 0 or high == 0 or scheme == "symmetric" else 26
    shares = np.arange(1, many + 1) / many
    if scheme == "symmetric":
        most = max(-low, high)
        pairs = [(-share * most, share * most) for share in shares]
    else:
        pairs = [(a * low, b * high) for a in (shares if low else [0.0]) for b in (shares if high else [0.0])]
    best = min(rounding_error(values, a, b, dtype, scheme) for a, b in pairs)
    found = final(observed("mse", *x.chunk(4), dtype=dtype, scheme=scheme))
    assert low <= found[0] <= 0 <= found[1] <= high
    assert rounding_error(values, *found, dtype, scheme) <= 1.02 * best
    if dtype in ("uint4", "uint2") and kind == "outliers":
        assert rounding_error(values, *found, dtype, scheme) < 0.8 * rounding_error(values, low, high, dtype, scheme)


def test_mse_of_many_bits_keeps_nearly_everything() -> None:
    x = sample("flat")
    low, high = final(observed("mse", x, dtype="uint16"))
    assert (low, high) == pytest.approx((float(x.min()), float(x.max())), rel=1e-3)


# -- what batches may be like ------------------------------------------------------------------------------------------

HISTOGRAMS = ["percentile", "percentile:99.9", "entropy", "mse"]


@pytest.mark.parametrize("observer", HISTOGRAMS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 6.0, 1e-30, -1e30])
def test_a_constant_is_its_own_range(observer: str, value: float) -> None:
    quantizer = observed(observer, torch.full((5, 3), value))
    low, high = final(quantizer)
    assert [min(low, 0.0), max(high, 0.0)] == pytest.approx([min(value, 0.0), max(value, 0.0)])
    if abs(value) > 0.5:
        assert quantizer(torch.full((2,), value)).tolist() == pytest.approx([value, value], rel=1e-6)


@pytest.mark.parametrize("observer", HISTOGRAMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_with_nan_or_infinity_is_left_out_and_reported_once(observer: str, bad: float) -> None:
    quantizer, x = observed(observer), sample("normal", 100)
    with pytest.warns(UserWarning, match=r"layer\._output_: a batch holds NaN or infinity; it does not move the range"):
        quantizer.observe(torch.tensor([1.0, bad]))
    assert quantizer.batches == 0
    quantizer.observe(x)
    before = final(quantizer)
    quantizer.observe(torch.tensor([bad, 1e6]))
    assert quantizer.batches == 1
    assert final(quantizer) == before == final(observed(observer, x))


@pytest.mark.parametrize("observer", HISTOGRAMS)
@pytest.mark.parametrize(("floor", "cap"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
def test_what_is_counted_lies_behind_an_absorbed_clamp(observer: str, floor: float, cap: float) -> None:
    x = sample("normal") * 2
    rectified = observed(observer, *x.chunk(3), rectified=True, floor=floor, cap=cap)
    plain = observed(observer, *x.clamp(floor, cap).chunk(3))
    assert final(rectified) == final(plain)
    low, high = final(rectified)
    assert floor <= low <= high <= cap
    assert high > 0.9 * min(cap, 4.0)
    grid = rectified.grid()
    assert grid.clip_low == max(grid.qmin, grid.zero_point + round(floor / grid.scale))
    if floor == 0:
        assert (low, grid.clip_low) == (0.0, 0)


def test_zeros_do_not_move_entropy_and_mse() -> None:
    x = sample("outliers")
    for observer in ("entropy", "mse"):
        assert final(observed(observer, x, torch.zeros(10**6))) == final(observed(observer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_counted_as_what_they_are(dtype: torch.dtype) -> None:
    x = sample("normal", 500).to(dtype)
    quantizer = observed("percentile:100", x, torch.empty(0, dtype=dtype))
    assert quantizer.batches == 1
    assert final(quantizer) == (float(x.min()), float(x.max()))
    assert quantizer(x).dtype == dtype


@pytest.mark.parametrize("observer", HISTOGRAMS)
def test_the_arithmetic_of_accelerators_gives_the_same_numbers(observer: str) -> None:
    """On the host's tensors: what an accelerator runs, where range and scale are 0-dim tensors."""
    x = sample("normal", 2000)
    one, two = observed(observer), observed(observer)
    for batch in x.chunk(12):
        for quantizer in (one, two):
            quantizer.observe(batch)
        assert torch.equal(one._on_host(batch), two._on_device(batch))
    assert (one.low, one.high) == (two.low, two.high)
    assert one.searched == two.searched == 11


# -- which range when --------------------------------------------------------------------------------------------------


def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many batches there were at each search."""
    at: list[int] = []
    own = PercentileObserver.range

    def counted(self: PercentileObserver) -> tuple[float, float]:
        at.append(self.histogram.batches)
        return own(self)

    monkeypatch.setattr(PercentileObserver, "range", counted)
    return at


def test_training_looks_again_when_the_batches_have_grown_by_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    at, quantizer = searches(monkeypatch), observed("percentile:100")
    widest: list[float] = []
    for i in range(1, 61):
        quantizer.observe(torch.tensor([float(i), -1.0]))
        quantizer(torch.zeros(1))
        widest.append(float(quantizer.high or 0))
    assert at == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 17, 20, 23, 26, 30, 34, 39, 44, 50, 57]
    assert widest[:11] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 11]
    assert quantizer.high == 57
    assert final(quantizer) == (-1.0, 60.0)
    final(quantizer)
    assert at[-1] == 60
    assert len(at) == 23, "what is known is not looked for again"


def test_saving_and_evaluating_do_not_change_training() -> None:
    quiet, busy = observed("percentile:100"), observed("percentile:100")
    for i in range(1, 61):
        for quantizer in (quiet, busy):
            quantizer.settled = False
            quantizer.observe(torch.tensor([float(i), -1.0]))
        a = quiet(torch.linspace(-1, 60, 50))
        assert torch.equal(a, busy(torch.linspace(-1, 60, 50)))
        assert busy.state_dict()["high"] == i
        assert final(busy) == (-1.0, float(i))


def test_changes_move_with_the_range() -> None:
    quantizer = observed("mse", torch.randn(10))
    before = quantizer.changes
    quantizer.observe(torch.randn(10) * 5)
    assert quantizer.changes > before
    before = quantizer.changes
    quantizer.load_state_dict(observed("mse", torch.randn(7)).state_dict())
    assert quantizer.changes > before


def observing(observer: str) -> list[dict[str, Any]]:
    return [{**FUSED[0], "observer": observer}]


@pytest.mark.parametrize("observer", HISTOGRAMS)
def test_evaluation_frozen_ranges_and_conversion_use_the_range_of_all_batches(observer: str) -> None:
    net, x = Net(), torch.randn(4, 3, 8, 8)
    prepared(net, observing(observer), x).train()
    sgd_steps(net, 19)
    quantizer = quantizers_of(net)["conv1._output_"]
    assert isinstance(quantizer, HistogramQuantizer)
    assert (quantizer.batches, quantizer.searched) == (19, 17)
    expected = quantizer.observer.range()
    lags = [one.lagging != one.observer.range() for one in quantizers_of(net).values() if isinstance(one, HistogramQuantizer)]
    assert any(lags)
    deployed = convert_model(net)
    assert not quantizer.settled
    with torch.no_grad():
        shown = net.eval()(x)
        assert (quantizer.low, quantizer.high) == expected
        assert torch.equal(shown, deployed(x))
        with simulated(net):
            assert (net(x) - shown).abs().max() < 0.02
            assert (quantizer.low, quantizer.high) == expected
    apply_phase(net, Phase(observe=False))
    net.train()(x)
    assert (quantizer.low, quantizer.high, quantizer.batches) == (*expected, 19)
    apply_phase(net, Phase())
    net(x)
    assert quantizer.batches == 20
    assert (quantizer.low, quantizer.high) == quantizer.lagging


def test_a_checkpoints_second_forward_uses_the_range_of_the_first() -> None:
    layer = nn.Linear(6, 6)
    net = prepared(nn.Sequential(layer), [{"op_names": ["0"], "observer": "percentile:100"}], torch.randn(4, 6)).train()
    seen: list[Tensor] = []
    given = quantizers_of(net)["0._input_"]
    assert isinstance(given, HistogramQuantizer)
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    for i in range(1, 13):
        seen.clear()
        x = (torch.randn(8, 6) * i).requires_grad_()
        with set_checkpoint_early_stop(False):
            checkpoint(net, x, use_reentrant=False).sum().backward()
        assert len(seen) == 2
        assert torch.equal(*seen)
        with torch.no_grad():
            net.eval()(x)
        net.train()
    assert given.batches == 12, "and is not counted again"
    hook.remove()


# -- saved and resumed -------------------------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else type(a) is type(b) and a == b


@pytest.mark.parametrize("observer", HISTOGRAMS)
def test_a_state_comes_back_bit_for_bit_and_goes_on_alike(observer: str, tmp_path: Path) -> None:
    batches = growing(24)
    one, two = observed(observer), observed(observer)
    for batch in batches[:13]:
        one.observe(batch)
        one(batch)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert two.accepts(state)
    assert is_complete({"layer._output_": state})
    two.load_state_dict(state)
    assert all(equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    for batch in batches[13:]:
        for quantizer in (one, two):
            quantizer.observe(batch)
        assert torch.equal(one(batch), two(batch))
    assert one.searched == two.searched > 13
    assert all(equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert not equal(state["counts"], one.state_dict()["counts"]), "the saved one is a copy"


def test_a_state_before_the_first_batch_is_not_complete() -> None:
    empty = observed("mse")
    assert not is_complete({"a": empty.state_dict()})
    assert not is_complete({"a": {"low": None, "high": None}})
    assert is_complete({"a": {"low": 0.0, "high": 1.0}})
    twin = observed("mse", torch.randn(5))
    twin.load_state_dict(empty.state_dict())
    assert not twin.ready
    twin.observe(torch.tensor([2.0]))
    assert final(twin) == (0.0, 2.0)


def test_states_of_other_observers_are_refused() -> None:
    x = torch.randn(20)
    plain = ActivationQuantizer(spec("minmax"), "layer._output_")
    plain.observe(x)
    for observer in HISTOGRAMS:
        state = observed(observer, x).state_dict()
        assert [observed(other).accepts(state) for other in HISTOGRAMS] == [other == observer for other in HISTOGRAMS]
        assert not plain.accepts(state)
        assert not observed(observer).accepts(plain.state_dict())
    net, x = Net(), torch.randn(4, 3, 8, 8)
    prepared(net, observing("mse"), x).train()(x)
    state = quantizer_state(net)
    for other in ("entropy", "minmax", "default"):
        twin = prepared(Net(), observing(other), x)
        with pytest.raises(
            ConfigError, match=r"the saved ranges of conv1\._input_.* have another granularity, observer or method"
        ):
            load_quantizer_state(twin, state)


@pytest.mark.parametrize("observer", ["percentile:99.9", "entropy", "mse"])
def test_a_resumed_run_is_the_uninterrupted_one(observer: str, quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    config = [{**FUSED[0], "observer": observer, "target_settings": {"weight": {"observer": "mse"}}}]

    def run(epochs: int, ckpt: Path | None = None) -> tuple[Trainer, Lit, QuantFusionCallback]:
        torch.manual_seed(1)
        model, callback = Lit(), QuantFusionCallback(config, schedule={"observe_stop": "step 19"}, verbose=0)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(model, loader(96), loader(16, seed=1), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return trainer, model, callback

    run(2)[0].save_checkpoint(tmp_path / "half.ckpt")  # 12 steps: the range that training uses is that of 11 batches
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["QuantFusionCallback"]["quantizers"]
    assert saved["conv1._output_"]["searched"] == 11
    assert saved["conv1._output_"]["batches"] == 12
    assert observer == "entropy" or any(one["lagging"] != (one["low"], one["high"]) for one in saved.values() if "lagging" in one)
    assert saved["conv1.weight"]["ratio"].shape == (8, 1, 1, 1)
    (_, whole, first), (_, resumed, second) = run(4), run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    states, again = quantizer_state(whole), quantizer_state(resumed)
    assert states.keys() == again.keys()
    assert states["conv1._output_"]["batches"] == 19
    assert all(equal(value, again[name][key]) for name, state in states.items() for key, value in state.items())
    assert first.deployed_model is not None
    assert second.deployed_model is not None
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(first.deployed_model(x), second.deployed_model(x))
        assert torch.equal(first.deployed_model(x), resumed.eval()(x))


def test_the_best_checkpoint_is_found_among_states_of_every_kind(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    config = [{**FUSED[0], "observer": "mse", "target_settings": {"weight": {"observer": "mse"}}}]
    callback = QuantFusionCallback(config, verbose=0)
    keeper = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_top_k=1)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback, keeper], enable_checkpointing=True)
    trainer.fit(Lit(), loader(), loader(16, seed=1))
    state = torch.load(keeper.best_model_path, weights_only=True)
    twin = prepared(Lit(), config, torch.randn(2, 3, 8, 8))
    twin.load_state_dict(state["state_dict"])
    load_quantizer_state(twin, state["callbacks"]["QuantFusionCallback"]["quantizers"])
    x = torch.randn(4, 3, 8, 8)
    assert callback.deployed_model is not None
    with torch.no_grad():
        assert torch.equal(callback.deployed_model(x), twin.eval()(x))


# -- exported ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["percentile:99.9", "entropy", "mse"])
def test_a_net_trained_with_each_is_exported(observer: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    config = [{**FUSED[0], "observer": observer, "target_settings": {"weight": {"observer": "mse"}}}]
    net = prepared(Net(), config, x).train()
    sgd_steps(net, 5)
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "net.onnx", example_input=x)
    session = onnxruntime_session(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = deployed(x)
    assert float(expected.std()) > 0.01
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    ranges = {name: (one["low"], one["high"]) for name, one in quantizer_state(net).items() if "low" in one}
    plain = prepared(Net(), observing("minmax"), x).train()
    assert {name for name in ranges if not name.endswith("weight")} == set(quantizers_of(plain))


# -- the config --------------------------------------------------------------------------------------------------------


def targets(**entry: Any) -> dict[str, str]:
    entry = {"op_names": ["0"], "high_precision_output": False, **entry}
    (layer,) = make_plan(nn.Sequential(nn.Conv2d(4, 4, 1)), [entry], example_input=torch.randn(2, 4, 3, 3)).layers
    return {name: target.spec.observer for name, target in layer.targets.items()}


def test_an_entrys_observer_is_for_its_activations() -> None:
    assert targets(observer="mse") == {"_input_": "mse", "weight": "default", "_output_": "mse"}
    assert targets(observer="percentile:99.990") == {"_input_": "percentile", "weight": "default", "_output_": "percentile"}
    settings = {"weight": {"observer": "mse"}, "_output_": {"observer": "percentile:99.50"}}
    assert targets(observer="entropy", target_settings=settings) == {
        "_input_": "entropy",
        "weight": "mse",
        "_output_": "percentile:99.5",
    }


def test_the_plan_names_the_observer() -> None:
    plan = make_plan(Net(), observing("percentile:99.5"), example_input=torch.randn(2, 3, 8, 8))
    assert "percentile:99.5" in str(plan)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"observer": "percentile:49"}, r"config_list\[0\]\['observer'\]: 'percentile:49' names no percentile from 50 to 100"),
        ({"observer": "percentile:x"}, r"'percentile:x' names no percentile from 50 to 100; write 'percentile:99.9'"),
        (
            {"observer": "percentil"},
            r"'percentil' is not one of default, .*, percentile, entropy, mse\. Did you mean 'percentile'",
        ),
        (
            {"target_settings": {"_input_": {"observer": "mse", "granularity": "per_channel"}}},
            r"\['_input_'\]\['observer'\]: mse keeps one histogram a tensor, and granularity per_channel asks for several",
        ),
        (
            {"observer": "percentile:99", "granularity": "per_channel"},
            r"config_list\[0\]\['observer'\]: percentile:99 keeps one histogram a tensor",
        ),
        (
            {"observer": "entropy", "target_settings": {"_output_": {"granularity": [[-1, 2], "back", -1]}}},
            r"config_list\[0\]\['observer'\]: entropy keeps one histogram a tensor, and granularity \[\[-1, 2\], 'back', -1\]",
        ),
        (
            {"target_settings": {"weight": {"observer": "entropy"}}},
            r"\['weight'\]\['observer'\]: entropy is for activations; a parameter's range is that of its values now \(default\)",
        ),
        (
            {"target_settings": {"weight": {"observer": "mse", "quant_scheme": "affine"}}},
            r"\['weight'\]\['observer'\]: mse needs a symmetric grid for a parameter, and this one is affine; write quant_scheme",
        ),
        (
            {"observer": "mse", "target_names": ["weight"]},
            r"this entry quantizes parameters only; what they can have \(default, mse\) stands in target_settings",
        ),
    ],
)
def test_what_an_observer_cannot_be_is_said(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        targets(**entry)


def test_a_registered_setting_with_an_observer_that_does_not_fit_is_named() -> None:
    x = torch.randn(2, 4, 3, 3)
    setting = {"Conv2d": {"_input_": {}, "weight": {"observer": "minmax"}}}
    with pytest.raises(ConfigError, match=r"QuantizationSetting of Conv2d\['weight'\]\['observer'\]: minmax is for activations"):
        make_plan(nn.Sequential(nn.Conv2d(4, 4, 1)), [{"op_names": ["0"]}], example_input=x, settings=setting)
    setting = {"Conv2d": {"_input_": {"observer": "percentile:99"}, "weight": {"observer": "mse"}}}
    (layer,) = make_plan(nn.Sequential(nn.Conv2d(4, 4, 1)), [{"op_names": ["0"]}], example_input=x, settings=setting).layers
    assert [target.spec.observer for target in layer.targets.values()] == ["percentile:99", "mse"]


def test_readers_with_other_percentiles_have_ranges_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x)  # type: ignore[no-any-return]

    config = [
        {"op_names": ["a"], "observer": "percentile"},
        {"op_names": ["b"], "observer": "percentile:99.99"},
        {"op_names": ["c"], "observer": "percentile:99"},
    ]
    plan = make_plan(Two(), config, example_input=torch.randn(3, 4))
    assert [layer.targets["_input_"].source for layer in plan.layers] == [None, "a._input_", None]


def test_every_observer_makes_its_own_quantizer() -> None:
    for observer in WORDS:
        net = prepared(Net(), observing(observer), torch.randn(2, 3, 8, 8))
        kinds = {type(quantizer) for _, group in prepared_groups(net).values() for quantizer in group.quantizers}
        assert kinds == {HistogramQuantizer if observer in OBSERVERS else ActivationQuantizer}


def test_an_observer_says_its_range() -> None:
    with pytest.raises(NotImplementedError):
        HistogramObserver(spec("mse")).range()


# -- parameters: the share of the largest value that rounds best ---------------------------------------------------------


def weight_spec(dtype: str = "int4", granularity: Any = "out_channel", **rest: str) -> TensorSpec:
    return TensorSpec.make(dtype, "symmetric", granularity, weight=True, observer="mse", **rest)


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Normal weights, other in size for each channel; with few levels their largest are better clipped."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)


def brute_ratio(block: Array, qmin: int, qmax: int) -> float:
    """The share of the largest value, out of 0.3, 0.32, .. 1, with the least squared error; the greatest of equals."""
    errors: dict[float, float] = {}
    zero = (qmin + qmax + 1) // 2
    for i in range(35, -1, -1):
        share = 0.3 + 0.02 * i
        scale = share * np.abs(block).max() / ((qmax - qmin) / 2)
        q = np.clip(np.round(block / scale) + zero, qmin, qmax)
        errors[share] = float((((q - zero) * scale - block) ** 2).sum())
    return min(errors, key=lambda share: errors[share])


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "uint3"])
@pytest.mark.parametrize(
    ("granularity", "split"),
    [
        ("out_channel", list),
        ("per_tensor", lambda w: [w]),
        ("in_channel", lambda w: [w[:, j] for j in range(w.shape[1])]),
        (Blocks(sizes=(2,), side="back", pad=-1), lambda w: [w[i : i + 2] for i in range(0, 6, 2)]),
    ],
    ids=["out_channel", "per_tensor", "in_channel", "blocks"],
)
def test_a_weights_shares_are_those_of_brute_force(dtype: str, granularity: Any, split: Callable[[Any], list[Array]]) -> None:
    w, grid = weights(6, 4, 30).double(), weight_spec(dtype, granularity)
    expected = [brute_ratio(block, grid.qmin, grid.qmax) for block in split(w.numpy())]
    found = best_ratio(w, grid)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-12)
    quantizer = MseWeight(grid, "a.weight", w)
    assert tuple(found.shape) == quantizer.blocks
    if dtype == "int4":
        assert min(expected) < 0.9, "something is clipped"
    if dtype == "int2":
        assert len({round(share, 2) for share in expected}) > 1 or granularity == "per_tensor"


def test_a_weight_lies_on_its_narrowed_grid() -> None:
    w, grid = weights(3, 500), weight_spec()
    quantizer = MseWeight(grid, "a.weight", w)
    y = quantizer.rounded(w)
    for row, rounded, ratio in zip(w.double().numpy(), y.double().numpy(), best_ratio(w, grid).flatten().tolist(), strict=True):
        scale = ratio * np.abs(row).max() / 7
        np.testing.assert_allclose(rounded, np.clip(np.round(row / scale), -7, 7) * scale, rtol=1e-5, atol=1e-7)
    plain = WeightQuantizer(weight_spec(), "a.weight", w)
    assert (y - w).square().sum() < 0.9 * (plain.rounded(w) - w).square().sum()
    grid_now = quantizer.grid(w)
    assert torch.equal(quantizer.integers(w, grid_now) * grid_now.scale, y), "what is deployed is what trained"


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_clipped_weights_get_no_gradient(dtype: str) -> None:
    w = weights(3, 500).requires_grad_()
    upstream = torch.randn(3, 500)
    spec_ = weight_spec(dtype)
    quantizer = MseWeight(spec_, "a.weight", w)
    quantizer.rounded(w).backward(upstream)
    scale, zero = quantizer.grid(w.detach()).scale, (spec_.qmin + spec_.qmax + 1) // 2
    q = (w.detach().double() / scale.double()).round() + zero
    inside = (q >= spec_.qmin) & (q <= spec_.qmax)
    assert w.grad is not None
    assert torch.equal(w.grad, upstream * inside)
    assert 3 <= int((~inside).sum()) < 100
    assert bool((q[inside] == spec_.qmax).any()), "an end is inside"
    w.grad.zero_()
    MseWeight(weight_spec(dtype, apply_method="clamp_round"), "a.weight", w).rounded(w).backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_a_share_is_found_in_training_and_stays() -> None:
    w = weights(3, 50)
    quantizer = MseWeight(weight_spec(), "a.weight", w)
    assert quantizer.state_dict() == {"ratio": ()}
    assert is_complete({"a.weight": quantizer.state_dict()})
    quantizer.rounded(w)
    quantizer.grid(w)
    assert quantizer.ratio is None, "an evaluation settles nothing"
    quantizer.training = True
    quantizer.rounded(w)
    assert quantizer.changes == 1
    kept = quantizer.state_dict()["ratio"]
    other = weights(3, 50, seed=1)
    assert not torch.equal(best_ratio(other, weight_spec()), kept)
    quantizer.rounded(other)
    assert torch.equal(quantizer.state_dict()["ratio"], kept)
    scale = kept * other.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(quantizer.grid(other).scale, scale, rtol=1e-6, atol=0)
    assert quantizer.commutes(w)
    for k in (0.5, -4.0):
        assert torch.equal(quantizer.rounded(other * k), quantizer.rounded(other) * k)


def test_a_share_is_saved_and_held_to_its_shape() -> None:
    w = weights(3, 50)
    quantizer, twin = (MseWeight(weight_spec(), "a.weight", w) for _ in range(2))
    quantizer.training = True
    quantizer.rounded(w)
    state = quantizer.state_dict()
    assert twin.accepts(state)
    assert twin.accepts({"ratio": ()})
    twin.load_state_dict(state)
    assert twin.changes == 1
    assert torch.equal(twin.rounded(weights(3, 50, seed=1)), quantizer.rounded(weights(3, 50, seed=1)))
    for wrong in ({"ratio": torch.ones(4, 1)}, {"scale": torch.ones(3, 1)}, {}, {"low": 0.0, "high": 1.0}):
        assert not twin.accepts(wrong)
    twin.load_state_dict({"ratio": ()})
    assert twin.ratio is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_keep_them(dtype: torch.dtype) -> None:
    w = weights(3, 20).to(dtype)
    quantizer = MseWeight(weight_spec(), "a.weight", w)
    y = quantizer.rounded(w)
    assert y.dtype == dtype
    wide = w if dtype == torch.float64 else w.float()
    assert torch.equal(y, MseWeight(weight_spec(), "a.weight", wide).rounded(wide).to(dtype))


def test_a_weight_of_zeros_or_of_one_value_keeps_its_range() -> None:
    w = torch.zeros(3, 4)
    w[1] = 2.5
    w[2, 0] = -1e-38
    quantizer = MseWeight(weight_spec(), "a.weight", w)
    assert best_ratio(w, weight_spec())[:2].flatten().tolist() == [1.0, 1.0]
    assert quantizer.rounded(w)[:2].tolist() == [[0.0] * 4, [2.5] * 4]
    assert bool(torch.isfinite(quantizer.rounded(w)).all())


@pytest.mark.parametrize("granularity", ["default", "per_tensor"])
def test_a_convolution_with_batch_norm_folds_without_loss(granularity: str) -> None:
    """`per_tensor`: the grid is that of the folded weight, found on it."""
    net, x = Net(), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        net.conv2.weight.copy_(weights(8, 8, 3, 3))
        net.bn2.weight.copy_(torch.linspace(-2, 2, 8))
    keys = {"observer": "mse", "quant_dtype": "int3", "granularity": granularity}
    prepared(net, [{**FUSED[0], "target_settings": {"weight": keys}}], x).train()
    sgd_steps(net, 4)
    (quantizer,) = prepared_groups(net)["conv2"][1].parameter_quantizers
    assert isinstance(quantizer, MseWeight)
    assert quantizer.ratio is not None
    assert quantizer.ratio.shape == ((8, 1, 1, 1) if granularity == "default" else (1, 1, 1, 1))
    assert float(quantizer.ratio.min()) < 0.95
    found = quantizer_state(net)
    assert {name for name in found if name.endswith("weight")} == {"conv1.weight", "conv2.weight", "fc.weight"}
    deployed = convert_model(net)
    head = deployed.get_submodule("conv2").get_submodule("")
    with torch.no_grad():
        shown = net.eval()(x)
        assert torch.equal(deployed(x), shown)
        with simulated(net):
            assert (net(x) - shown).abs().max() < 0.05 * shown.abs().max()
    integers = next(b for b in head.buffers() if b.dtype == torch.int8)
    assert int((integers.abs() == 3).sum()) > 2 * 8, "more than one value a channel is at an end"


def test_a_state_with_shares_makes_a_twin() -> None:
    config, x = [{**FUSED[0], "target_settings": {"weight": {"observer": "mse", "quant_dtype": "int3"}}}], torch.randn(4, 3, 8, 8)
    net = prepared(Net(), config, x).train()
    sgd_steps(net, 3)
    twin = prepared(Net(), config, x)
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        load_quantizer_state(twin, quantizer_state(net))
        expected = net.eval()(x)
        assert torch.equal(twin.eval()(x), expected)
        state = quantizer_state(net)
        state["conv1.weight"]["ratio"] *= 0.5
        load_quantizer_state(twin, state)
        assert not torch.equal(twin(x), expected), "the layer is folded anew"
    plain = prepared(Net(), FUSED, x)
    with pytest.raises(ConfigError, match=r"another config_list: missing \[\], unexpected \['conv1\.weight'"):
        load_quantizer_state(plain, state)


def test_modules_of_any_type_can_have_it() -> None:
    table, x = nn.Embedding.from_pretrained(weights(5, 8), freeze=False), torch.arange(5)
    net = nn.Sequential(table, nn.LayerNorm(8))
    config = [{"op_names": ["0"], "target_settings": {"weight": {"observer": "mse", "quant_dtype": "int3"}}}]
    prepared(net, config, x).train()(x).sum().backward()
    deployed = convert_model(net)
    assert quantizer_state(net)["0.weight"]["ratio"].shape == (5, 1)
    with torch.no_grad():
        assert torch.equal(deployed(x), net.eval()(x))
