# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `pruning.py`: blocks, metrics and masks beside numpy; and of the pace at which masks grow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_quant.config import ConfigError
from lightning_quant.keys import DISTILLATION, ENTRY, QUANTIZATION, Blocks, unknown_key
from lightning_quant.pruning import (
    METRICS,
    Evidence,
    Wanted,
    blocks_of,
    global_masks,
    lowest,
    movement_step,
    n_of_m,
    one_mask,
    passing_kernel,
    reduced,
    spread,
    taylor_step,
)
from lightning_quant.pruning_keys import METRIC_NAMES, PRUNING
from lightning_quant.schedule import Clock, Pace

KERNELS = [
    ((4, 6), (1, -1)),
    ((4, 6), (-1, 1)),
    ((4, 6), (2, 3)),
    ((4, 6), (1, 1)),
    ((4, 6), (-1, -1)),
    ((4, 2, 3, 3), (1, -1, -1, -1)),
    ((4, 2, 3, 3), (-1, 1, -1, -1)),
    ((4, 2, 3, 3), (2, 1, -1, 3)),
    ((5,), (1,)),
]


def numpy_blocks(x: np.ndarray[Any, Any], kernel: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
    """The blocks, cut out one by one."""
    sizes = [size if k == -1 else k for size, k in zip(x.shape, kernel, strict=True)]
    starts = [range(0, size, step) for size, step in zip(x.shape, sizes, strict=True)]
    corners = itertools.product(*starts)
    return [x[tuple(slice(a, a + s) for a, s in zip(corner, sizes, strict=True))] for corner in corners]


@pytest.mark.parametrize(("shape", "kernel"), KERNELS)
def test_blocks_are_those_that_slices_cut_out(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = np.stack([block.reshape(-1) for block in numpy_blocks(x.numpy(), kernel)])
    np.testing.assert_array_equal(blocks_of(x, kernel).numpy(), expected)


@pytest.mark.parametrize(("shape", "kernel"), KERNELS)
def test_a_mask_of_blocks_masks_these_blocks(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x = torch.rand(shape) + 1
    mask = torch.rand(len(blocks_of(x, kernel))) > 0.5
    left = blocks_of(x * spread(mask, shape, kernel), kernel)
    assert torch.equal((left != 0).all(1), mask) and torch.equal((left != 0).any(1), mask)
    assert spread(mask, shape, kernel).dim() == len(shape)


def test_a_mask_reduced_over_dims() -> None:
    mask = torch.rand(3, 4, 2) > 0.6
    np.testing.assert_array_equal(reduced(mask, [0]).numpy(), mask.numpy().any(axis=(1, 2)))
    np.testing.assert_array_equal(reduced(mask, [1, -1]).numpy(), mask.numpy().any(axis=0))
    np.testing.assert_array_equal(reduced(mask, [0, 1, 2]).numpy(), mask.numpy())


@pytest.mark.parametrize(
    ("granularity", "dims", "kernel"),
    [
        ("default", 4, (-1, 1, -1, -1)),
        ("per_channel", 2, (-1, 1)),
        ("default", 1, (1,)),
        (Blocks(sizes=(-1, 1)), 2, (-1, 1)),
        (Blocks(sizes=(-1, 1)), 3, (1, -1, 1)),
    ],
)
def test_the_dimension_of_a_passing_mask(granularity: str | Blocks, dims: int, kernel: tuple[int, ...]) -> None:
    assert passing_kernel(granularity, dims) == kernel


# -- metrics, each as its paper has it, in float64 numpy -----------------------------------------------------------------


def geometric_median(blocks: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]) -> list[float]:
    """He et al. 2019, eq. 6: g(x) = sum over the kept filters F of |x - F|."""
    return [sum(math.dist(one, other) for other in blocks[kept]) for one in blocks]


EXPECTED: dict[str, Any] = {
    "l1": lambda b, k: [sum(abs(v) for v in one) for one in b],
    "level": lambda b, k: [sum(abs(v) for v in one) for one in b],
    "l2": lambda b, k: [math.sqrt(sum(v * v for v in one)) for one in b],
    "fpgm": geometric_median,
    "slim": lambda b, k: [sum(abs(v) for v in one) for one in b],
}


@pytest.mark.parametrize("metric", EXPECTED)
@pytest.mark.parametrize("size", [1, 18])
def test_scores_are_the_papers(metric: str, size: int) -> None:
    blocks, kept = torch.randn(7, size), torch.tensor([True, True, False, True, True, True, False])
    blocks[~kept] = 0
    expected = EXPECTED[metric](blocks.double().numpy(), kept.numpy())
    np.testing.assert_allclose(METRICS[metric].score(Evidence(blocks=blocks, kept=kept)).numpy(), expected, rtol=1e-5)


def test_slim_scores_a_layer_by_the_scales_behind_it() -> None:
    evidence = Evidence(blocks=torch.randn(3, 9), kept=torch.ones(3, dtype=torch.bool), scale=torch.tensor([-2.0, 0.5, 0.0]))
    assert METRICS["slim"].score(evidence).tolist() == [2.0, 0.5, 0.0]


def test_random_scores_are_those_of_the_generator() -> None:
    evidence = Evidence(
        blocks=torch.zeros(5, 2), kept=torch.ones(5, dtype=torch.bool), generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(METRICS["random"].score(evidence), torch.rand(5, generator=torch.Generator().manual_seed(3)))


def test_taylor_is_the_squared_first_order_change_of_the_loss() -> None:
    values, gradients = torch.randn(4, 6), torch.randn(4, 6)
    expected = [float(np.dot(w, g)) ** 2 for w, g in zip(values.double().numpy(), gradients.double().numpy(), strict=True)]
    np.testing.assert_allclose(taylor_step(values, gradients).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_movement_grows_where_descent_moves_values_away_from_zero() -> None:
    values, gradients = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[-0.5], [0.5], [0.5], [-0.5]])
    assert movement_step(values, gradients).tolist() == [0.5, -0.5, 0.5, -0.5]  # w - g: 1.5, 0.5, -1.5, -0.5


def test_every_metric_has_a_word_and_every_word_a_metric() -> None:
    assert set(METRICS) == set(METRIC_NAMES)


# -- scores -> masks: cases 23 and 25 of NNI ------------------------------------------------------------------------------


def kept(mask: Tensor) -> list[int]:
    return mask.int().tolist()


ROWS = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(ratio=0.5), [0, 0, 1, 1]),
        (Wanted(ratio=0.3), [0, 1, 1, 1]),
        (Wanted(threshold=2.5), [0, 0, 1, 1]),
        (Wanted(threshold=2.5, most=0.25), [0, 1, 1, 1]),
        (Wanted(threshold=0.5), [1, 1, 1, 1]),
        (Wanted(threshold=0.5, least=0.5), [0, 0, 1, 1]),
        (Wanted(ratio=0.25, least=0.6), [0, 0, 0, 1]),
        (Wanted(ratio=0.75, most=0.5), [0, 0, 1, 1]),
        (Wanted(threshold=100.0), [0, 0, 0, 1]),  # one block always stays
        (Wanted(ratio=1.0), [0, 0, 0, 1]),
        (Wanted(least=0.5), [0, 0, 1, 1]),
        (Wanted(ratio=0.5, parts=2), [0, 1, 0, 1]),
        (Wanted(), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_the_smallest_scores_are_masked(wanted: Wanted, expected: list[int]) -> None:
    assert kept(one_mask(ROWS, wanted)) == expected


def test_of_equal_scores_the_first_are_masked() -> None:
    assert kept(one_mask(torch.tensor([2.0, 1.0, 1.0, 1.0]), Wanted(ratio=0.5))) == [1, 0, 0, 1]


@pytest.mark.parametrize("ratio", [0.07, 0.29, 0.57, 0.58, 0.7])
def test_a_share_that_floats_cannot_write_costs_no_block(ratio: float) -> None:
    assert int((~one_mask(torch.rand(100), Wanted(ratio=ratio))).sum()) == round(100 * ratio)


def test_blocks_of_two_by_two() -> None:
    weight = torch.tensor([[0.1, 0.2, 3.0, 4.0], [0.3, 0.1, 2.0, 5.0]])
    mask = one_mask(METRICS["level"].score(evidence_of(weight, (2, 2))), Wanted(ratio=0.5))
    assert spread(mask, weight.shape, (2, 2)).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def evidence_of(weight: Tensor, kernel: tuple[int, ...]) -> Evidence:
    blocks = blocks_of(weight, kernel)
    return Evidence(blocks=blocks, kept=torch.ones(len(blocks), dtype=torch.bool))


def test_a_global_ratio_ranks_all_values_together() -> None:
    """Case 23: 0.5 of 4x3 and 2x4 values; the small ones are mostly those of the first."""
    first, second = torch.arange(1.0, 13.0), torch.tensor([2.5, 20.0, 8.5, 21.0, 22.0, 23.0, 24.0, 25.0])
    masks = global_masks([first, second], [Wanted(ratio=0.5)] * 2)
    assert [int((~mask).sum()) for mask in masks] == [8, 2]
    together = np.sort(np.concatenate([first.numpy(), second.numpy()]))
    gone = np.concatenate([one.numpy()[~mask.numpy()] for one, mask in zip([first, second], masks, strict=True)])
    np.testing.assert_array_equal(np.sort(gone), together[:10])


def test_global_limits_hold_for_each_target() -> None:
    first, second = torch.arange(10.0), torch.arange(100.0, 110.0)
    masks = global_masks([first, second], [Wanted(ratio=0.5, most=0.6), Wanted(ratio=0.5, least=0.2)])
    assert [int((~mask).sum()) for mask in masks] == [6, 4]
    masks = global_masks([first, second], [Wanted(ratio=0.5)] * 2)
    assert [int((~mask).sum()) for mask in masks] == [9, 1]  # one block of the first always stays
    masks = global_masks([first, second], [Wanted(threshold=5.0)] * 2)
    assert [int((~mask).sum()) for mask in masks] == [5, 0]


def test_masks_grow_with_their_share() -> None:
    scores = [torch.rand(40), torch.rand(60)]
    for share in (0.25, 0.5, 1.0):
        assert sum(int((~m).sum()) for m in global_masks(scores, [Wanted(ratio=0.8)] * 2, share)) == int(80 * share)
        assert int((~one_mask(scores[0], Wanted(threshold=0.5), share)).sum()) == int(int((scores[0] < 0.5).sum()) * share)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8), (1, 4)])
@pytest.mark.parametrize("shape", [(4, 8), (3, 16, 3, 3)])
def test_n_of_every_m_input_channels_stay(n: int, m: int, shape: tuple[int, ...]) -> None:
    scores = torch.randperm(math.prod(shape)).float().reshape(shape)
    mask = n_of_m(scores, n, m).numpy()
    for group in range(shape[1] // m):
        part, stays = scores.numpy()[:, group * m : (group + 1) * m], mask[:, group * m : (group + 1) * m]
        rank = part.argsort(axis=1).argsort(axis=1)
        np.testing.assert_array_equal(stays, rank >= m - n)


def test_lowest_of_nothing_masks_nothing() -> None:
    assert kept(lowest(ROWS, 0)) == [1, 1, 1, 1]


# -- the pace ---------------------------------------------------------------------------------------------------------


def clock(step: int, length: float = 100) -> Clock:
    return Clock(step=step, epoch=step // 10, done=step, length=length)


@pytest.mark.parametrize(("schedule", "shares"), [("linear", [20, 40, 60, 80]), ("agp", [46, 70, 78, 80]), ("one_shot", [80])])
def test_how_many_of_100_rows_are_masked_update_by_update(schedule: str, shares: list[int]) -> None:
    """Case 25."""
    pace, scores = Pace(schedule=schedule, updates=4, stop=1.0), torch.rand(100)
    masks = [one_mask(scores, Wanted(ratio=0.8), pace.share_after(done + 1)) for done in range(pace.steps)]
    assert [int((~mask).sum()) for mask in masks] == shares


@pytest.mark.parametrize("schedule", ["one_shot", "linear", "agp"])
def test_a_share_says_how_many_steps_are_done(schedule: str) -> None:
    for updates in (1, 2, 3, 7, 10, 100):
        pace = Pace(schedule=schedule, updates=updates)
        shares = [pace.share_after(done) for done in range(pace.steps + 1)]
        assert list(map(pace.done_by, shares)) == list(range(pace.steps + 1))
        between = [(low + high) / 2 for low, high in itertools.pairwise(shares)]
        assert list(map(pace.done_by, between)) == list(range(pace.steps))


@pytest.mark.parametrize(
    ("pace", "moments"),
    [
        (Pace(start=0, stop=40, updates=4), [10, 20, 30, 40]),
        (Pace(start=20, stop=40, updates=4), [25, 30, 35, 40]),
        (Pace(start=0.2, stop=0.4, updates=2), [30, 40]),
        (Pace(start=0, stop="50%", updates=5), [10, 20, 30, 40, 50]),
        (Pace(start="epoch 2", stop="epoch 4", updates=2), [30, 40]),
        (Pace(schedule="one_shot", start=7, stop="epoch 1"), [7]),
        (Pace(schedule="one_shot"), [0]),
        (Pace(start=None), []),
    ],
)
def test_updates_come_at_their_moments(pace: Pace, moments: list[int]) -> None:
    done = [pace.done_at(clock(step)) for step in range(100)]
    assert [step for step in range(100) if done[step] > (done[step - 1] if step else 0)] == moments
    assert done[-1] == len(moments)
    if moments:
        assert pace.share_after(done[-1]) == 1


def test_a_run_of_no_steps_is_at_its_end() -> None:
    assert Pace().done_at(Clock(step=0, epoch=0, done=0, length=0)) == 10


def test_what_needs_the_length_of_the_run() -> None:
    assert Pace().needs_total_steps and not Pace(schedule="one_shot").needs_total_steps and not Pace(stop=9).needs_total_steps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "apg"}, "schedule: 'apg' is not one of one_shot, linear, agp. Did you mean 'agp'?"),
        ({"updates": 0}, "updates: expected an integer from 1, got 0."),
        ({"updates": True}, "updates: expected an integer from 1, got True."),
        ({"start": "soon"}, "schedule: start='soon' is no moment"),
        ({"stop": 1.5}, "schedule: stop=1.5 is no moment"),
        ({"start": "epoch 1", "stop": 100}, "schedule: start='epoch 1' and stop=100 are not of one unit"),
        ({"start": 100, "stop": 100}, "schedule: stop=100 comes no later than start=100; let it come later."),
    ],
)
def test_a_pace_that_is_none(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pace(**options)
    assert str(caught.value).startswith(text)


# -- words ------------------------------------------------------------------------------------------------------------


def test_keys_of_other_lists_are_told_apart() -> None:
    for kind, rows in (("pruning", PRUNING), ("distillation", DISTILLATION)):
        for key in set(rows) - {*QUANTIZATION, "dim"}:  # that may be a slip for the "dims" of align
            assert f"{key!r} is a key of {kind}, which has a list" in unknown_key(key, ENTRY, "config_list[0]")
            assert "unknown key" in unknown_key(key + "_", rows, kind)
