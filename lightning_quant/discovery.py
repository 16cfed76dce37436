# SPDX-License-Identifier: Apache-2.0
"""Owns the fuse groups of a plan: those that a config names, proven or refused by the recorded forward, and those it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from lightning_quant.config import Rule
from lightning_quant.fusion import BatchNorm, is_head, pattern_problem
from lightning_quant.graph import Graph
from lightning_quant.keys import Problems, closest
from lightning_quant.matching import Draft, Modules
from lightning_quant.targets import is_activation, owner_of


def collect_groups(
    rules: Sequence[Rule], chosen: Mapping[str, Sequence[str]], modules: Modules, drafts: dict[str, Draft], problems: Problems
) -> None:
    """Give every draft its group, after the checks that need the modules but no forward.

    `chosen`: the names that each rule selects, by its place. A rule with `fuse_names: auto` marks the layers that it selects; an
    empty list takes back what earlier rules asked of them; groups rule the modules that they name.
    """
    owner: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        if rule.fuse is None:
            continue
        selected = set(chosen[rule.where])
        if not rule.fuse or isinstance(rule.fuse, str):
            for name in chosen[rule.where]:
                drafts[name].auto, drafts[name].fused_by = bool(rule.fuse), rule.where
                if drafts[name].group and not rule.fuse:
                    for member in drafts[name].group:
                        owner.pop(member, None)
                    drafts[name].group = ()
            continue
        for given in rule.fuse:
            group = tuple(modules.aliases.get(name, name) for name in given)
            problem = group_problem(group, modules.by_name, selected)
            taken = next((name for name in group if owner.get(name, group) != group), None)
            if problem is None and taken is not None:
                problem = f"{taken!r} is already fused in {owner[taken]!r}; a module belongs to one group."
            if problem is not None:
                problems.append(f"{rule.where}: fuse_names {given!r}: {problem}")
            elif group[0] in drafts:
                owner.update(dict.fromkeys(group, group))
                head = drafts[group[0]]
                head.group, head.auto, head.fused_by = group, False, rule.where
    for draft in [draft for draft in drafts.values() if draft.group]:
        problems.extend(absorb(draft, drafts))


def absorb(draft: Draft, drafts: dict[str, Draft], *, quietly: bool = False) -> Problems:
    """Take the members of a group out of the drafts: fused, they have no targets of their own; problems if they were named."""
    problems: Problems = []
    for name in draft.group[1:]:
        if name not in drafts:
            continue
        if drafts[name].named and not quietly:
            problems.append(
                f"{draft.fused_by}: fuse_names {draft.group!r}: {name!r} is also quantized by its name, but a fused module has "
                "no targets of its own; take it out of op_names or out of the group."
            )
        del drafts[name]
        draft.notes.append(f"{name} is fused and has no targets of its own")
    return problems


def parts_of(draft: Draft) -> dict[nn.Module, str]:
    """Modules inside a drafted one whose parameters are its targets -> the target: an attention layer's out_proj, say."""
    found: dict[nn.Module, str] = {}
    for target, plan in draft.targets.items():
        if plan.active and not is_activation(target) and "." in target:
            found[owner_of(draft.module, target)[0]] = target
    return found


def claim_parts(drafts: dict[str, Draft], modules: Mapping[str, nn.Module]) -> Problems:
    """Take the parts of drafted modules out of the drafts: a parameter is rounded in one place; problems if they were named."""
    problems: Problems = []
    for draft in list(drafts.values()):
        for part, target in parts_of(draft).items() if draft.name in drafts else ():
            for other in list(drafts.values()):
                if part not in (other.module, *(modules[name] for name in other.group)):
                    continue
                if other.named or other.group:
                    name = next(name for name in (other.name, *other.group) if modules[name] is part)
                    problems.append(
                        f"{draft.targets[target].decided_by}: {target!r} of {draft.name!r} is a parameter of {name!r}, which is "
                        "quantized by itself; leave one of the two out."
                    )
                else:
                    del drafts[other.name]
                    draft.notes.append(f"{other.name} is a part of it and has no targets of its own")
    return problems


def group_problem(group: tuple[str, ...], modules: Mapping[str, nn.Module], selected: set[str]) -> str | None:
    """Why these modules cannot be a group, as far as that shows without a forward; None if they can."""
    for name in group:
        if name not in modules:
            near = closest(name, modules)
            return f"{name!r} is no module." + (f" Close: {', '.join(map(repr, near))}." if near else "")
    members = [modules[name] for name in group]
    if (problem := pattern_problem(members)) is not None:
        return problem
    if group[0] not in selected:
        return f"{group[0]!r} heads the group, but this entry does not select it; add it to op_names."
    patched = next((name for name, module in zip(group, members, strict=True) if "forward" in vars(module)), None)
    if patched is not None:
        return f"{patched!r} has a forward of its own on the instance; what it computes is unknown."
    norm = members[1]
    if isinstance(norm, BatchNorm):
        weight = members[0]._parameters.get("weight")  # None: computed from others, which is said of the layer itself
        if weight is not None and norm.num_features != len(weight):
            return f"{group[1]!r} has {norm.num_features} features, {group[0]!r} makes {len(weight)}."
        if norm.running_var is None:
            return f"{group[1]!r} has no running statistics (track_running_stats=False), so nothing can be folded."
    return None


def auto_group(
    name: str, modules: Mapping[str, nn.Module], graph: Graph, taken: set[str], *, fold_norm: bool
) -> tuple[tuple[str, ...], str | None]:
    """(the longest group that begins with the layer `name` and that the recorded forward allows or (), why it ends there).

    `fold_norm`: whether a batch norm may be in it. A reason is given where something follows that could have been fused.
    """
    group: tuple[str, ...] = (name,)
    why: str | None = None
    while is_head(modules[name]) and len(group) < 3:
        calls = graph.calls(group[-1])
        readers = graph.readers(calls[0].index) if calls else []
        fusable = [r for r in readers if r.kind == "module" and pattern_problem([modules[n] for n in (*group, r.name)]) is None]
        if not fusable or (isinstance(modules[fusable[0].name], BatchNorm) and not fold_norm):
            break
        longer = (*group, fusable[0].name)
        if fusable[0].name in taken:
            why = f"{fusable[0].name!r} is quantized or fused elsewhere"
        else:
            why = group_problem(longer, modules, {name}) or flow_problem(longer, modules, graph)
        if why is not None or len(set(longer)) < len(longer):
            break
        group = longer
    return (group if len(group) > 1 else ()), why


def flow_problem(group: tuple[str, ...], modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """Why the data does not flow through a group as its names say; None if it does."""
    heads = graph.calls(group[0])
    if not heads:
        return f"{group[0]!r} is not called in the recorded forward."
    return next((problem for name, after in pairwise(group) if (problem := _edge_problem(name, after, modules, graph))), None)


def _edge_problem(name: str, after: str, modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """Why the module `after` does not simply carry on what `name` made; None if it does, at every call."""
    calls, later = graph.calls(name), graph.calls(after)
    if any(call.index in graph.side_effects for call in later):
        return f"{after!r} works in place and its input is used afterwards by its old name; fused, nothing is written there."
    if len(calls) != len(later):
        return f"{after!r} is called {len(later)} times and {name!r} {len(calls)} times; a shared module cannot be fused."
    for call, follower in zip(calls, later, strict=True):
        readers = [node.name for node in graph.readers(call.index)]
        found = f"that is read by {', '.join(map(repr, readers)) or 'nothing'}"
        if call.index not in follower.reads:
            return f"{after!r} does not read the output of {name!r} ({found})."
        if len(readers) > 1 or call.index in graph.outputs:
            others = [repr(reader) for reader in readers if reader != after]
            others += ["the model's output"] * (call.index in graph.outputs)
            return f"the output of {name!r} is also read by {', '.join(others)}; fused, it would not exist."
        if isinstance(modules[after], nn.BatchNorm1d) and isinstance(modules[name], nn.Conv1d) and follower.dims == 2:
            return f"{after!r} normalises dimension 1 of an input without a batch dimension; give batches (N, C, L)."
        if isinstance(modules[after], nn.BatchNorm1d) and isinstance(modules[name], nn.Linear) and follower.dims != 2:
            return f"{after!r} normalises dimension 1 of a {follower.dims}-D input; it folds into a Linear only on 2-D."
    return None
