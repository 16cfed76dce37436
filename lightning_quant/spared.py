# SPDX-License-Identifier: Apache-2.0
"""Owns what pruning leaves alone: a teacher, layers that the forward does not use, those whose grid has no 0, frozen ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_quant.config import Rule
from lightning_quant.layers import Plan
from lightning_quant.mask_groups import Work
from lightning_quant.pruning import METRICS
from lightning_quant.selection import Modules
from lightning_quant.targets import owner_of

_TAUGHT, _UNUSED = "the teacher's", "not called in the recorded forward"


def of_teacher(modules: Modules, teacher: nn.Module | None) -> frozenset[str]:
    """The names of modules that are the teacher's, or hold a Parameter of its."""
    if teacher is None:
        return frozenset()
    parts = {*map(id, teacher.modules()), *map(id, teacher.parameters())}
    owned = {name: [module, *module.parameters(recurse=False)] for name, module in modules.by_name.items()}
    return frozenset(name for name, things in owned.items() if any(id(one) in parts for one in things))


def spared(name: str, rule: Rule, work: Work, *, named: bool) -> bool:
    """Whether a selected module stays as it is, which is noted; a problem if it is the teacher's and `named` in op_names."""
    if name in work.taught and named:
        work.problems.append(f"{rule.where}: {name!r} is the teacher's, which stays as it is; leave it out.")
        return True
    if named or (name not in work.taught and _used(name, work)):
        return False
    work.left.append((rule.where, name, _TAUGHT if name in work.taught else _UNUSED))
    return True


def _used(name: str, work: Work) -> bool:
    """Whether the recorded forward calls a module, or reads a parameter of it past it; True where none was recorded."""
    graph, modules = work.graph, work.modules
    if graph is None or graph.boundaries.get(name) or any(one.site.through == name for one in graph.operators.values()):
        return True
    own = [own for own, _ in modules.by_name[name].named_parameters()]
    return any(f"{alias}.{one}" in graph.readers_of_parameters for one in own for alias in modules.names_of(name))


def note_spared(work: Work) -> None:
    """Say what stays as it is, and why; a problem if that is everything."""
    if work.left and not work.targets and not work.problems:
        every = _some([f"{name} ({why})" for _, name, why in work.left])
        work.problems.append(
            f"pruning: nothing is left to mask: {every}; check example_input, root and teacher, or name layers in op_names."
        )
    grouped: dict[tuple[str, str], list[str]] = {}
    for where, name, why in work.left:
        grouped.setdefault((where, why), []).append(name)
    for (where, why), names in grouped.items():
        how = "; name them in op_names to mask them" if why == _UNUSED else ""
        work.notes.append(f"{where}: {why}, so left as they are: {_some(names)}{how}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_zeros(work: Work, quantized: Plan | None) -> None:
    """Add problems: masked parameters that are quantized to values without a 0."""
    layers = {} if quantized is None else {layer.name: layer for layer in quantized.layers}
    told: set[str] = set()
    for target in work.targets.values():
        name = work.prefix + target.module
        how = layers[name].targets.get(target.values) if name in layers and target.values is not None else None
        if how is not None and how.active and how.spec.method == "bnn" and name not in told:
            told.add(name)
            work.problems.append(
                f"{target.decided_by}: {work.prefix}{target.name} is masked, and {how.decided_by} quantizes it by method 'bnn', "
                "whose values are -1 and 1: what is masked would not be 0. Leave the layer out of one of the two, or take "
                "another method ('qat' with int2)."
            )


def note_frozen(work: Work) -> None:
    """Say which targets have no scores while they do not train."""
    frozen: list[str] = []
    for target in work.targets.values():
        if target.scored and METRICS[target.spec.metric].step is not None and target.values is not None:
            owner, own = owner_of(work.modules.by_name[target.module], target.values)
            parameter = owner._parameters[own]
            frozen += [target.name] if parameter is not None and not parameter.requires_grad else []
    if frozen:
        work.notes.append(
            f"frozen, and scored by gradients: {_some(frozen)}; masked from the first update on that comes while they train"
        )
