# SPDX-License-Identifier: Apache-2.0
"""Owns which masks depend on which: aligned targets, groups that share one, layers that follow what they read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_quant.channels import Channels, out_channels
from lightning_quant.config import raise_problems
from lightning_quant.graph import Graph
from lightning_quant.keys import OUTPUT, WEIGHT, Problems
from lightning_quant.layouts import canonical_shape
from lightning_quant.patterns import is_batch_norm
from lightning_quant.pruning import Wanted, passing_kernel
from lightning_quant.pruning_plan import MaskedTarget, MaskSpec, Pruning, Unit
from lightning_quant.selection import Modules
from lightning_quant.targets import is_activation, owner_of


@dataclass
class Work:
    """What is known while a plan is being made.

    `taught`: modules that are the teacher's; `left`: those that an entry swept up and that stay as they are:
    (the entry, the name, why).
    """

    modules: Modules
    channels: Channels
    graph: Graph | None
    options: Pruning
    prefix: str
    targets: dict[str, MaskedTarget] = field(default_factory=dict)
    problems: Problems = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    circles: set[frozenset[str]] = field(default_factory=set)
    taught: frozenset[str] = frozenset()
    left: list[tuple[str, str, str]] = field(default_factory=list)


# -- aligned targets --------------------------------------------------------------------------------------------------


def check_targets(work: Work) -> None:
    """Aligned targets lead to masks that fit; parameters that two modules share have one; slim finds its batch norms."""
    _merge_tied(work)
    for target in list(work.targets.values()):
        if target.spec.align is not None:
            _check_align(target, work)
        elif target.scored and target.spec.metric == "slim":
            _find_scale(target, work)
    raise_problems(work.problems)
    for name, target in work.targets.items():
        if target.spec.align is None:
            continue
        free = free_dims(work.targets[target.spec.align[0]], target.spec.align[1])
        if isinstance(free, str):
            work.problems.append(f"{target.decided_by}: {name}: {free}")
        elif target.values is None:
            problem = _unfit(target, free, work)
            work.targets[name] = replace(target, grid=free)
            work.problems.extend([f"{target.decided_by}: {name}: {problem}"] if problem else [])
        elif free != target.grid:
            work.problems.append(
                f"{target.decided_by}: {name} has {_times(target.grid)} blocks and follows {target.spec.align[0]}, which has "
                f"{_times(free)} along dims {list(target.spec.align[1])}; change dims or granularity."
            )


def _times(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


def free_dims(source: MaskedTarget, dims: Sequence[int]) -> tuple[int, ...] | str:
    """How long the mask of `source` is along `dims`; a text where it has no such dimensions."""
    if is_activation(source.target):
        return (
            source.grid
            if len(dims) == len(source.grid)
            else f"align: {source.name} has a mask along {len(source.grid)} dimension."
        )
    rank = len(source.shape)
    if not dims or any(not -rank <= d < rank for d in dims) or len({d % rank for d in dims}) < len(dims):
        return f"align: dims {list(dims)} are no dimensions of {source.name}, whose shape is {list(source.shape)}."
    return tuple(source.shape[d] for d in sorted(d % rank for d in dims))


def _unfit(target: MaskedTarget, free: tuple[int, ...], work: Work) -> str:
    """Why a mask does not fit what passes in the recorded forward; nothing where it does, or is unknown."""
    calls = () if work.graph is None else work.graph.boundaries.get(target.module, ())
    for call in calls:
        seen = {**call.inputs, **call.outputs}.get(target.target)
        if seen is None or seen.shape is None:
            return f"the recorded forward shows no such tensor; it has {', '.join([*call.inputs, *call.outputs])}."
        kernel = passing_kernel(target.spec.granularity, len(seen.shape))
        if len(kernel) != len(seen.shape) or any(k not in (1, -1) for k in kernel):
            return f"granularity {target.spec.granularity} does not fit a tensor of shape {list(seen.shape)}: 1 and -1 only."
        if tuple(size for size, k in zip(seen.shape, kernel, strict=True) if k == 1) != free:
            return (
                f"its shape is {list(seen.shape)}, blocks {list(kernel)}, and the mask that it follows has {_times(free)} "
                "values; change granularity or dims."
            )
    return ""


def _check_align(target: MaskedTarget, work: Work) -> None:
    path = [target.name]
    while True:
        align = work.targets[path[-1]].spec.align
        if align is None:
            return
        if align[0] not in work.targets:
            if path == [target.name]:
                work.problems.append(
                    f"{target.decided_by}: {target.name} follows {align[0]!r}, which no entry selects; select it, with a "
                    "sparse_ratio, say."
                )
            return
        if align[0] in path:
            circle = frozenset(path[path.index(align[0]) :])
            if circle in work.circles:
                return
            work.circles.add(circle)
            path = path[path.index(align[0]) :]
            work.problems.append(
                f"{target.decided_by}: align goes round in a circle: {' -> '.join([*path, align[0]])}; one of them must have a "
                "mask of its own."
            )
            return
        path.append(align[0])


def _find_scale(target: MaskedTarget, work: Work) -> None:
    module = work.modules.by_name[target.module]
    if is_batch_norm(module):
        return
    norm = work.channels.norm_behind.get(target.module)
    if (
        norm is None
        or work.modules.by_name[norm]._parameters[WEIGHT] is None
        or target.kernel[:1] != (1,)
        or max(target.kernel[1:]) > 0
    ):
        work.problems.append(
            f"{target.decided_by}: {target.name}: metric 'slim' scores output channels by the scales of the batch norm that "
            "reads them, and the recorded forward shows none that reads this layer alone; take another metric."
        )
        return
    work.targets[target.name] = replace(target, scale=norm)


def _merge_tied(work: Work) -> None:
    """Of targets that are one Parameter, the first decides."""
    first: dict[int, str] = {}
    for name, target in list(work.targets.items()):
        if target.values is None or is_activation(target.target):
            continue
        owner, own = owner_of(work.modules.by_name[target.module], target.values)
        known = first.setdefault(id(owner._parameters[own]), name)
        if known != name:
            one, other = work.targets[known], work.targets.pop(name)
            if (one.spec.asks and other.spec.asks) and replace(one.spec, align=None) != replace(other.spec, align=None):
                work.problems.append(f"{other.decided_by}: {name} is {known}, one Parameter with two settings; give them once.")
            work.notes.append(f"{name} is the same Parameter as {known} and has its mask")


# -- groups -----------------------------------------------------------------------------------------------------------


def units_of(work: Work) -> list[Unit]:
    """Groups of targets that share masks: those with an id, those whose channels meet, and single ones."""
    scored = [target for target in work.targets.values() if target.scored and target.spec.pattern is None]
    units: list[Unit] = []
    named: dict[int | str, list[MaskedTarget]] = {}
    for target in scored:
        if target.spec.dependency_id is not None:
            named.setdefault(target.spec.dependency_id, []).append(target)
    for key, members in named.items():
        _check_equal(members, f"dependency_group_id {key!r}", work.problems)
        if len({math.prod(member.grid) for member in members}) == 1:
            parts = math.lcm(*(member.spec.wanted.parts for member in members))
            wanted = replace(members[0].spec.wanted, parts=parts)
            units.append(_unit([(member.name, None) for member in members], wanted, members[0], work))
    free = [target for target in scored if target.spec.dependency_id is None]
    by_layer = {target.module: target for target in free if work.options.dependencies and _by_channel(target, work)}
    for segment in work.channels.segments(by_layer):
        members = [by_layer[layer] for layer, _ in segment.members]
        _check_equal(members, "their channels meet (see dependencies), so they", work.problems)
        whole = all(len(at) == math.prod(by_layer[layer].grid) for layer, at in segment.members)
        wanted = members[0].spec.wanted
        wanted = replace(wanted, parts=math.lcm(*(member.spec.wanted.parts for member in members)) if whole else 1)
        units.append(_unit([(by_layer[layer].name, at) for layer, at in segment.members], wanted, members[0], work))
    taken = {name for unit in units for name, _ in unit.members}
    units += [_unit([(target.name, None)], target.spec.wanted, target, work) for target in free if target.name not in taken]
    _check_global(units, work)
    _note_partners(by_layer, work)
    return units


def _unit(members: Sequence[tuple[str, Tensor | None]], wanted: Wanted, first: MaskedTarget, work: Work) -> Unit:
    at = members[0][1]
    count = math.prod(first.grid) if at is None else len(at)
    if count % wanted.parts:
        work.problems.append(
            f"{first.decided_by}: internal_metric_block: {count} blocks of {first.name} do not fall into {wanted.parts} "
            "equal parts."
        )
        wanted = replace(wanted, parts=1)
    return Unit(members=tuple(members), wanted=wanted, global_id=first.spec.global_id)


def _by_channel(target: MaskedTarget, work: Work) -> bool:
    """Whether its blocks are the output channels of a layer that the graph knows."""
    name = target.module
    known = name in work.channels.first or name in work.channels.norm_behind.values()
    alone = target.target in (WEIGHT, OUTPUT)
    return known and alone and target.kernel[:1] == (1,) and all(k == -1 for k in target.kernel[1:])


def _check_equal(members: Sequence[MaskedTarget], what: str, problems: Problems) -> None:
    """What targets of one mask must have in common."""
    first = members[0]

    def said(target: MaskedTarget) -> dict[str, Any]:
        one = target.spec.wanted
        limits = {"sparse_ratio": one.ratio, "sparse_threshold": one.threshold}
        limits |= {"min_sparse_ratio": one.least, "max_sparse_ratio": one.most}
        return {**limits, "metric": target.spec.metric, "global_group_id": target.spec.global_id}

    for other in members[1:]:
        differ = [
            f"{key} {said(first)[key]!r} and {said(other)[key]!r}" for key in said(first) if said(first)[key] != said(other)[key]
        ]
        if what.startswith("dependency") and math.prod(first.grid) != math.prod(other.grid):
            differ.insert(0, f"{math.prod(first.grid)} and {math.prod(other.grid)} blocks")
        if differ:
            problems.append(
                f"{other.decided_by}: {first.name} and {other.name}: {what} share one mask, but have {', '.join(differ)}; "
                "make them equal"
                + (", or give dependencies: false." if what.startswith("their") else ", or leave one out of the group.")
            )
            return


def _check_global(units: Sequence[Unit], work: Work) -> None:
    groups: dict[int | str, list[Unit]] = {}
    for unit in units:
        if unit.global_id is not None:
            groups.setdefault(unit.global_id, []).append(unit)
    for key, members in groups.items():
        first = members[0]
        for other in members[1:]:
            one, two = first.wanted, other.wanted
            names = f"{first.members[0][0]} and {other.members[0][0]}"
            if (one.ratio, one.threshold) != (two.ratio, two.threshold):
                work.problems.append(
                    f"pruning: {names}: global_group_id {key!r} ranks them together, but they have sparse_ratio {one.ratio!r} "
                    f"and {two.ratio!r}, sparse_threshold {one.threshold!r} and {two.threshold!r}; make them equal."
                )
                break
            metrics = {work.targets[name].spec.metric for unit in (first, other) for name, _ in unit.members}
            if len(metrics) > 1:
                work.problems.append(
                    f"pruning: {names}: global_group_id {key!r} ranks them together, but they have metrics "
                    f"{' and '.join(sorted(metrics))}, whose scores cannot be compared; make them equal."
                )
                break
        if any(unit.wanted.parts > 1 for unit in members):
            work.notes.append(
                f"global_group_id {key!r}: ranked together, the parts of internal_metric_block lose unequal numbers"
            )


def _note_partners(by_layer: Mapping[str, MaskedTarget], work: Work) -> None:
    for layer in by_layer:
        others = sorted(
            other
            for other in work.channels.joined(layer)
            if other not in by_layer and other not in work.channels.follows and f"{other}.{WEIGHT}" not in work.targets
        )
        if others:
            work.notes.append(f"{layer} shares channels with {', '.join(others)}, which no entry masks: they cannot be removed")


# -- what follows -----------------------------------------------------------------------------------------------------


def follow(work: Work) -> None:
    """Batch norms and depthwise convolutions behind masked layers, and layers before masked batch norms, have their masks."""
    masked = {target.module for target in work.targets.values() if _rows(target, work)}
    chosen = {*work.taught, *(target.module for target in work.targets.values())}
    before = {norm: layer for layer, norm in work.channels.norm_behind.items()}
    for norm in [norm for norm in before if norm in masked and before[norm] not in chosen]:
        _add_followers(before[norm], f"as {norm} behind it", work)
        masked.add(before[norm])
    alive = torch.zeros(work.channels.total, dtype=torch.bool)
    for name in masked & set(work.channels.first):
        first = work.channels.first[name]
        alive[first : first + out_channels(work.modules.by_name[name])] = True
    for name, ids in work.channels.follows.items():
        if name not in chosen and name not in masked and bool(alive[ids].all(1).any()):
            _add_followers(name, "as the channels it reads", work)
            if name in work.channels.first:
                first = work.channels.first[name]
                alive[first : first + len(ids)] = alive[ids].all(1)


def _rows(target: MaskedTarget, work: Work) -> bool:
    """Whether a target masks output channels."""
    whole = target.kernel[:1] == (1,) and all(k == -1 for k in target.kernel[1:])
    return (
        target.target in (WEIGHT, OUTPUT)
        and whole
        and target.values == WEIGHT
        and (target.scored or target.spec.align is not None)
    )


def _add_followers(name: str, note: str, work: Work) -> None:
    module = work.modules.by_name[name]
    for own in (WEIGHT, "bias"):
        parameter = module._parameters.get(own)
        if parameter is not None:
            shape = canonical_shape(module, own, parameter.shape)
            made = MaskedTarget(
                module=name,
                target=own,
                type=type(module).__name__,
                spec=MaskSpec(),
                values=own,
                shape=shape,
                kernel=(1, *(-1,) * (len(shape) - 1)),
                grid=(shape[0],),
                follows=True,
                decided_by="dependencies",
                notes=(note,),
            )
            work.targets[made.name] = made


def aligned_order(targets: Iterable[MaskedTarget]) -> list[MaskedTarget]:
    """The aligned ones among them, each behind the one that it follows."""
    waiting = {target.name: target for target in targets if target.spec.align is not None}
    order: list[MaskedTarget] = []

    def place(target: MaskedTarget) -> None:
        if target.name in waiting:
            del waiting[target.name]
            assert target.spec.align is not None
            if (source := waiting.get(target.spec.align[0])) is not None:
                place(source)
            order.append(target)

    for target in list(waiting.values()):
        place(target)
    return order
