# SPDX-License-Identifier: Apache-2.0
"""Owns the mathematics of masks: blocks of a tensor, how much each is worth, and which of them stay. Tensors alone, no modules.

A tensor is cut in blocks of equal size (a filter, a row, a single value). A metric gives each block a score; the blocks with
the smallest scores are masked. A mask is boolean, True where values stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.keys import Blocks

_TINY = 1e-6  # of a block: what floats add to a product, 0.29 * 100 say, must not cost a block


# -- blocks -----------------------------------------------------------------------------------------------------------


def grid_of(shape: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """How many blocks of `kernel` (sizes, -1 for a whole dimension) lie along each dimension of `shape`; sizes must divide."""
    return tuple(1 if k == -1 else size // k for size, k in zip(shape, kernel, strict=True))


def blocks_of(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """`x` as (number of blocks, values of a block), the blocks in the order of their places."""
    split: list[int] = []
    for size, count in zip(x.shape, grid_of(x.shape, kernel), strict=True):
        split += [count, size // count]
    dims = x.dim()
    ordered = x.reshape(split).permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2))
    return ordered.reshape(math.prod(split[::2]), -1)


def spread(mask: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """A mask of blocks, (number of blocks,), as one that multiplies a tensor of `shape`: of size 1 along whole dimensions."""
    mask = mask.reshape(grid_of(shape, kernel))
    for dim, k in enumerate(kernel):
        if k > 1:
            mask = mask.repeat_interleave(k, dim)
    return mask


def reduced(mask: Tensor, dims: Sequence[int]) -> Tensor:
    """A full mask of a tensor over the dimensions `dims` alone, in their order: True where anything stays."""
    kept = sorted(dim % mask.dim() for dim in dims)
    others = [dim for dim in range(mask.dim()) if dim not in kept]
    for dim in reversed(others):
        mask = mask.any(dim)
    return mask


def passing_kernel(granularity: str | Blocks, dims: int) -> tuple[int, ...]:
    """The block sizes of an input or output with `dims` dimensions: unless told otherwise, a mask along dimension 1."""
    if isinstance(granularity, Blocks):
        return granularity.kernel(dims)
    return (-1, 1, *(-1,) * (dims - 2)) if dims > 1 else (1,)


# -- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a score is made from, for one target of n blocks.

    Args:
        blocks: (n, size) float32, its values. Masked ones are 0, except for metrics that let them return.
        kept: (n,) bool, what the last mask keeps.
        statistic: (n,) float32, the mean over training steps since the last mask (`taylor`) or the sum over all of them
            (`movement`); None for other metrics.
        scale: (n,) float32, the scale of the batch norm behind each block, for `slim`; None where the values are scales.
        generator: for `random`; on the CPU, so that all processes and devices draw the same.
    """

    blocks: Tensor
    kept: Tensor
    statistic: Tensor | None = None
    scale: Tensor | None = None
    generator: torch.Generator | None = None


def l1_norm(evidence: Evidence) -> Tensor:
    """Sum of absolute values (Li et al. 2017, "Pruning Filters for Efficient ConvNets", step 1 of section 3.1)."""
    return evidence.blocks.abs().sum(1)


def l2_norm(evidence: Evidence) -> Tensor:
    """Euclidean norm."""
    return evidence.blocks.square().sum(1).sqrt()


def fpgm(evidence: Evidence) -> Tensor:
    """Sum of distances to all other blocks that are kept (He et al. 2019, "Filter Pruning via Geometric Median", eq. 6).

    The block nearest to the others' geometric median is what they can replace best. O(n^2 size).
    """
    blocks = evidence.blocks
    far = torch.cdist(blocks, blocks[evidence.kept], compute_mode="donot_use_mm_for_euclid_dist")
    return far.sum(1)


def slim(evidence: Evidence) -> Tensor:
    """Magnitude of the batch norm's scale (Liu et al. 2017, "Network Slimming", section 3)."""
    return evidence.blocks.abs().sum(1) if evidence.scale is None else evidence.scale.abs()


def from_statistic(evidence: Evidence) -> Tensor:
    """What training steps have gathered; see `taylor_step` and `movement_step`."""
    assert evidence.statistic is not None
    return evidence.statistic


def at_random(evidence: Evidence) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(len(evidence.blocks), generator=evidence.generator).to(evidence.blocks.device)


def taylor_step(values: Tensor, gradients: Tensor) -> Tensor:
    """(sum over a block of g w)^2, for blocks (n, size) (Molchanov et al. 2019, "Importance Estimation", eq. 9).

    The first-order estimate of the squared change of the loss if the block were 0.
    """
    return (values * gradients).sum(1).square()


def movement_step(values: Tensor, gradients: Tensor) -> Tensor:
    """-(sum over a block of g w), for blocks (n, size) (Sanh et al. 2020, "Movement Pruning", eq. 3 and 4, rate 1).

    Its sum over steps grows where a descent step moves values away from 0. g is the gradient by the *masked* value, w the
    value behind the mask, so that a masked block's score goes on moving and it can return (straight through).
    """
    return -(values * gradients).sum(1)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. `step`: what a training step adds to its statistic; `mean`: whether that is a mean since the last mask.

    `returns`: whether a masked block may come back; `fine`: whether a block is a single value unless told otherwise.
    """

    score: Callable[[Evidence], Tensor]
    step: Callable[[Tensor, Tensor], Tensor] | None = None
    mean: bool = False
    returns: bool = False
    fine: bool = False


METRICS: dict[str, Metric] = {
    "l1": Metric(score=l1_norm),
    "l2": Metric(score=l2_norm),
    "level": Metric(score=l1_norm, fine=True),  # of single values: magnitude pruning (Han et al. 2015, section 3)
    "fpgm": Metric(score=fpgm),
    "slim": Metric(score=slim),
    "taylor": Metric(score=from_statistic, step=taylor_step, mean=True),
    "movement": Metric(score=from_statistic, step=movement_step, returns=True),
    "random": Metric(score=at_random),
}


# -- scores -> masks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How many blocks are to be masked: a `ratio` of them or those that score below `threshold`, within two ratios.

    `parts`: the blocks are cut in so many equal parts, in order, and each loses the same number (grouped convolutions).
    """

    ratio: float | None = None
    threshold: float | None = None
    least: float | None = None
    most: float | None = None
    parts: int = 1

    def count(self, scores: Tensor, share: float = 1.0) -> int:
        """How many of `scores` (n,) are masked when `share` of the final number is due; at least one block always stays."""
        n = len(scores)
        final = n * (self.ratio or 0.0) if self.threshold is None else float((scores < self.threshold).sum())
        low, high = self.limits(n)
        return int(min(max(final, low), high) * share + _TINY)

    def limits(self, n: int) -> tuple[int, int]:
        """The smallest and largest number of n blocks that may be masked in the end; the largest wins where they contradict."""
        low = math.ceil(n * (self.least or 0.0) - _TINY)
        high = min(n - 1, n if self.most is None else math.floor(n * self.most + _TINY))
        return min(low, max(high, 0)), max(high, 0)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask (n,) without the `count` smallest scores; of equal ones the first are masked."""
    mask = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores, stable=True)[:count]] = False
    return mask


def one_mask(scores: Tensor, wanted: Wanted, share: float = 1.0) -> Tensor:
    """The mask (n,) of one target, or of a group that shares one."""
    if wanted.parts == 1:
        return lowest(scores, wanted.count(scores, share))
    return torch.cat([lowest(part, wanted.count(part, share)) for part in scores.chunk(wanted.parts)])


def global_masks(scores: Sequence[Tensor], wanted: Sequence[Wanted], share: float = 1.0) -> list[Tensor]:
    """The masks of targets that are ranked together, each within its own limits.

    All want the same ratio (of the blocks of all), or the same threshold. What a target must lose at least it loses first; the
    rest of the number is taken in the order of the scores, from targets that may lose more.
    """
    lows, highs, finals = [], [], 0.0
    for one, want in zip(scores, wanted, strict=True):
        low, high = want.limits(len(one))
        lows.append(int(low * share + _TINY))
        highs.append(high)
        below = float((one < want.threshold).sum()) if want.threshold is not None else len(one) * (want.ratio or 0.0)
        finals += below
    left = int(finals * share + _TINY) - sum(lows)
    orders = [torch.argsort(one, stable=True) for one in scores]
    open_to = [order[low:high] for order, low, high in zip(orders, lows, highs, strict=True)]
    pool = torch.cat([one[places] for one, places in zip(scores, open_to, strict=True)])
    owner = torch.cat([torch.full_like(places, index) for index, places in enumerate(open_to)])
    taken = owner[torch.argsort(pool, stable=True)[: max(left, 0)]]
    counts = [low + int((taken == index).sum()) for index, low in enumerate(lows)]
    return [lowest(one, count) for one, count in zip(scores, counts, strict=True)]


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask of a weight (out, in, ...) that keeps the n greatest of every m scores in a row along `in`, m dividing it.

    What sparse tensor cores compute (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", 2:4; Zhou et al. 2021,
    "Learning N:M Fine-Grained Structured Sparse Neural Networks"). Of equal scores the later ones stay.
    """
    rows = scores.movedim(1, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, m)
    order = torch.argsort(groups, dim=-1, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, order[..., : m - n], False)
    return mask.reshape(rows.shape).movedim(-1, 1)
