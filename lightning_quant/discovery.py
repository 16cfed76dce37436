# SPDX-License-Identifier: Apache-2.0
"""Owns the fuse groups of a plan: those that a config names, proven or refused by the recorded forward, and those it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from lightning_quant.config import Rule
from lightning_quant.folding import affine_problem, channels_of, scale_and_shift
from lightning_quant.graph import OUTSIDE, Boundary, Graph, Node
from lightning_quant.keys import WEIGHT, Problems, closest
from lightning_quant.matching import Draft, draft_of
from lightning_quant.patterns import (
    TRANSPOSED,
    BatchNorm,
    is_add,
    is_batch_norm,
    is_head,
    pattern_problem,
    roles_of,
)
from lightning_quant.selection import Modules
from lightning_quant.sites import Operator, is_operator
from lightning_quant.targets import is_activation, owner_of


def collect_groups(
    rules: Sequence[Rule],
    chosen: Mapping[str, Sequence[str]],
    modules: Modules,
    graph: Graph | None,
    drafts: dict[str, Draft],
    problems: Problems,
) -> None:
    """Give every draft its group, after the checks that need the modules but no forward.

    `chosen`: the names that each rule selects, by its place. A rule without `fuse_names`, or with `auto`, leaves it to the
    recorded forward; a list decides for everything that the entry selects: the groups that it names and no other.
    """
    owner: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        for name in chosen[rule.where]:
            draft = drafts[name]
            if rule.fuse is None:
                draft.auto = draft.auto or not draft.fused_by
                continue
            draft.auto = isinstance(rule.fuse, str)
            draft.fused_by = draft.fused_by if draft.group and rule.fuse else rule.where
            if draft.group and not rule.fuse:
                for member in draft.group:
                    owner.pop(member, None)
                draft.group = ()
        if rule.fuse is None or isinstance(rule.fuse, str):
            continue
        for given in rule.fuse:
            named = tuple(modules.aliases.get(name, name) for name in given)
            if (problem := _calls_problem(named, modules, graph)) is not None:
                problems.append(f"{rule.where}: fuse_names {given!r}: {problem}")
                continue
            named = _calls_meant(named, modules, graph)
            taken = next((name for name in named if owner.get(name, named) != named), None)
            problem = group_problem(named, modules, set(chosen[rule.where]))
            if problem is None and taken is not None:
                problem = f"{taken!r} is already fused in {owner[taken]!r}; a module belongs to one group."
            if problem is not None:
                problems.append(f"{rule.where}: fuse_names {given!r}: {problem}")
                continue
            owner.update(dict.fromkeys(named, named))
            _give(rule, named, modules.by_name, drafts, problems)
    for draft in [draft for draft in drafts.values() if draft.group]:
        problems.extend(absorb(draft, drafts))


def _calls_problem(group: tuple[str, ...], modules: Modules, graph: Graph | None) -> str | None:
    """Why no call of a shared activation carries on the member before it; None if one does."""
    for name, after in pairwise(group):
        if graph is None or after not in modules.sites or not graph.calls(name):
            continue
        readers = [node for call in graph.calls(name) for node in graph.consumers(call.index)]
        if any(node.name in modules.sites[after] for node in readers):
            continue
        found = ", ".join(repr(node.name) for node in readers) or "nothing"
        between = next((r for r in readers if any(n.name in modules.sites[after] for n in graph.consumers(r.index))), None)
        hint = "" if between is None else f" The call behind that one is meant by (..., {name!r}, {between.name!r}, {after!r})."
        return f"no call of {after!r} reads the output of {name!r} (that is read by {found}).{hint}"
    return None


def _calls_meant(group: tuple[str, ...], modules: Modules, graph: Graph | None) -> tuple[str, ...]:
    """A named group with the call of a shared activation that carries on the member before it, in place of the activation."""
    meant: list[str] = []
    for name in group:
        sites = modules.sites.get(name, [])
        calls = graph.calls(meant[-1]) if graph is not None and meant else []
        readers = {node.name for call in calls for node in (() if graph is None else graph.consumers(call.index))}
        meant.append(next((site for site in sites if site in readers), sites[0] if sites else name))
    return tuple(meant)


def _give(
    rule: Rule, named: tuple[str, ...], modules: Mapping[str, nn.Module], drafts: dict[str, Draft], problems: Problems
) -> None:
    """Give the drafts of a named group's heads what is fused with them."""
    for group in _kernels(named, modules):
        head = _head_of(group, modules)
        if head not in drafts and group is not named and is_operator(modules[head]):
            drafts[head] = draft_of(rule, head, modules[head], problems)
        if head in drafts:
            drafts[head].auto, drafts[head].fused_by = False, rule.where
            drafts[head].group = group if len(group) > 1 else ()
            drafts[head].whole = () if group[0] == named[0] else named


def _kernels(group: tuple[str, ...], modules: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The kernels that run a group: a runtime's addition is one of its own, so that the layer's output is rounded before it."""
    cut = next((i for i, name in enumerate(group) if i and is_add(modules[name])), None)
    return [group] if cut is None else [group[:cut], group[cut:]]


def _head_of(group: tuple[str, ...], modules: Mapping[str, nn.Module]) -> str:
    roles = roles_of([modules[name] for name in group])
    return group[0 if roles is None else roles.head]


def absorb(draft: Draft, drafts: dict[str, Draft], *, quietly: bool = False) -> Problems:
    """Take the members of a group out of the drafts: fused, they have no targets of their own; problems if they were named."""
    problems: Problems = []
    for name in draft.group:
        if name not in drafts or name == draft.name:
            continue
        if drafts[name].named and not quietly:
            problems.append(
                f"{draft.fused_by}: fuse_names {draft.group!r}: {name!r} is also quantized by its name, but a fused module has "
                "no targets of its own; take it out of op_names or out of the group."
            )
        if not drafts[name].swept:  # a preset means whatever there is
            draft.notes.append(f"{name} is fused and has no targets of its own")
        del drafts[name]
    return problems


def absorb_between(draft: Draft, drafts: dict[str, Draft], graph: Graph) -> Problems:
    """`absorb` for the dropout and identity between a group's members: deployed, what passes there is the group's output."""
    inside = tuple(between(draft.group, graph))
    return absorb(replace(draft, group=(draft.name, *inside)), drafts) if inside else []


def between(group: tuple[str, ...], graph: Graph) -> Iterator[str]:
    """The names of the dropouts and identities that the data passes on its way through a group."""
    for read in (read for name in group[1:] for call in graph.calls(name) for read in call.reads[:1]):
        index = read
        while index != OUTSIDE and graph.nodes[index].idle and len(graph.nodes[index].reads) == 1:
            yield graph.nodes[index].name
            index = graph.nodes[index].reads[0]


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


# -- groups that a config names -----------------------------------------------------------------------------------------


def group_problem(group: tuple[str, ...], modules: Modules, selected: set[str]) -> str | None:
    """Why these modules and operators cannot be a group, as far as that shows without a forward; None if they can."""
    for name in group:
        if name not in modules.by_name:
            near = closest(name, modules.by_name)
            hint = f" Close: {', '.join(map(repr, near))}." if near else ""
            return f"{name!r} names nothing that can be fused.{hint}{modules.about(name)}"
    kernels = _kernels(group, modules.by_name)
    for kernel in kernels:
        members = [modules.by_name[name] for name in kernel]
        if (problem := pattern_problem(members)) is not None:
            return problem
        if (problem := members_problem(kernel, members)) is not None:
            return problem
    head = _head_of(kernels[0], modules.by_name)
    if head not in selected:
        return f"{head!r} heads the group, but this entry does not select it; add it to op_names."
    return None


def members_problem(group: Sequence[str], members: Sequence[nn.Module]) -> str | None:
    """Why modules in the right order are no group after all."""
    patched = next((name for name, module in zip(group, members, strict=True) if "forward" in vars(module)), None)
    if patched is not None:
        return f"{patched!r} has a forward of its own on the instance; what it computes is unknown."
    roles = roles_of(members)
    assert roles is not None
    head = members[roles.head]
    for position, made in ((roles.norm, True), (roles.norm_before, False), (None if is_head(head) else roles.head, None)):
        norm = None if position is None else members[position]
        if not isinstance(norm, BatchNorm) or position is None:
            continue
        if (
            made is not None and head._parameters.get("weight") is not None
        ):  # None: computed from others, said of the layer itself
            features = channels_of(head) if made else _inputs_of(head)
            if norm.num_features != features:
                verb = "makes" if made else "takes"
                return f"{group[position]!r} has {norm.num_features} features, {group[roles.head]!r} {verb} {features}."
        if norm.running_var is None:
            return f"{group[position]!r} has no running statistics (track_running_stats=False), so nothing can be folded."
    norm = None if roles.norm is None else members[roles.norm]
    if norm is not None and (problem := affine_problem(norm, head)) is not None:
        makes = f"{group[roles.head]!r} makes {channels_of(head)} channels"
        return f"the affine function of {group[roles.norm or 0]!r} {problem}; {makes}."
    return _padding_problem(group, members) if roles.norm_before is not None else None


def _inputs_of(head: nn.Module) -> int:
    return int(head.in_features if isinstance(head, nn.Linear) else head.in_channels)  # type: ignore[arg-type]


def _padding_problem(group: Sequence[str], members: Sequence[nn.Module]) -> str | None:
    """Why a batch norm cannot be folded into the layer behind it."""
    head = members[1]
    if isinstance(head, TRANSPOSED):
        return f"{group[0]!r} stands before a transposed convolution, whose outputs see unlike shares of a shift."
    padding = getattr(head, "padding", 0)
    none = padding == "valid" or (not isinstance(padding, str) and not any([padding] if isinstance(padding, int) else padding))
    if not none:
        return f"{group[0]!r} stands before {group[1]!r}, which pads: what is padded is not normalised, so it cannot be folded."
    return None


# -- groups that are found ----------------------------------------------------------------------------------------------


def auto_group(
    draft: Draft, modules: Mapping[str, nn.Module], graph: Graph, taken: set[str], *, fold_norm: bool
) -> tuple[tuple[str, ...], str | None]:
    """(the longest group with a layer as head that the recorded forward allows or (), why it ends there).

    `fold_norm`: whether a batch norm may be in it. A reason is given where something follows that could have been fused.
    """
    group: tuple[str, ...] = (draft.name,)
    why: str | None = None
    while roles_of([modules[name] for name in group]) is not None:
        calls = graph.calls(group[-1])
        readers = graph.consumers(calls[0].index) if calls else []
        fusable = [r.name for r in readers if r.name in modules and _begins([modules[n] for n in (*group, r.name)])]
        if not fusable or (is_batch_norm(modules[fusable[0]]) and not fold_norm):
            norms = [r.name for r in readers if r.name in modules and is_batch_norm(modules[r.name])]
            if norms and len(group) > 1 and is_head(draft.module):
                why = f"{norms[0]!r} stands behind the activation, where a batch norm cannot be folded"
            break
        longer = (*group, fusable[0])
        why = _why_not(draft, longer, modules, graph, taken)
        if why is not None or len(set(longer)) < len(longer):
            break
        group = longer
    before = _norm_before(draft, modules, graph) if is_head(draft.module) and fold_norm else None
    if before is not None and before not in taken:  # most often it belongs to the layer before it
        longer = (before, *group)
        problem = _why_not(draft, longer, modules, graph, taken) or _unlike(draft, before, modules, graph)
        group, why = (longer, why) if problem is None else (group, "; ".join(r.rstrip(".") for r in (why, problem) if r))
    return (group if len(group) > 1 else ()), why


def _begins(members: Sequence[nn.Module]) -> bool:
    roles = roles_of(members)
    return roles is not None and roles.head == 0


def _why_not(draft: Draft, group: tuple[str, ...], modules: Mapping[str, nn.Module], graph: Graph, taken: set[str]) -> str | None:
    for name in group:
        readers = [r for own, _ in modules[name].named_parameters() for r in graph.readers_of_parameters.get(f"{name}.{own}", ())]
        if readers:
            return f"a parameter of {name!r} is also read by {readers[0]!r}; fused, it would not exist"
    new = next((name for name in (*group, *between(group, graph)) if name in taken and name != draft.name), None)
    if new is not None:
        return f"{new!r} is quantized or fused elsewhere"
    problem = members_problem(group, [modules[name] for name in group])
    return problem or flow_problem(group, modules, graph) or grid_problem(draft, group, modules)


def _norm_before(draft: Draft, modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """The batch norm whose output a layer reads."""
    calls = graph.calls(draft.name)
    made = graph.before(calls[0].reads[0]) if calls and calls[0].reads else OUTSIDE
    if made == OUTSIDE or graph.nodes[made].kind != "module" or graph.nodes[made].name not in modules:
        return None
    name = graph.nodes[made].name
    return name if is_batch_norm(modules[name]) else None


_SPREAD = 16.0


def _unlike(draft: Draft, name: str, modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """Why a batch norm before a layer is better not folded into it unasked: channels would share grids that suit few of them."""
    if not any(target.active for target in draft.targets.values()):
        return None
    calls = graph.calls(name)
    made = graph.origin(calls[0].reads[0]) if calls and calls[0].reads else OUTSIDE
    if made == OUTSIDE or graph.nodes[made].kind == "input":
        return (
            f"{name!r} reads the model's input: folded, features of unlike sizes would share one grid; name the group to have it"
        )
    k = scale_and_shift(modules[name])[0].abs()
    if float(k.max()) > _SPREAD * float(k.median()):
        return f"{name!r} scales its channels too unlike for one grid of each row of the weight; name the group to have it folded"
    return None


def grid_problem(draft: Draft, group: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
    """Why a norm cannot be folded onto the grid of the head's weight."""
    norms = [name for name in group if name != draft.name and is_batch_norm(modules[name])]
    weight = draft.targets.get(WEIGHT)
    turns = isinstance(draft.module, TRANSPOSED) or (bool(norms) and group[0] == norms[0])
    if norms and turns and weight is not None and weight.active and weight.spec.method in ("lsq", "lsq+", "dorefa", "bnn"):
        how = "before it" if group[0] == norms[0] else "behind a transposed convolution"
        return f"{norms[0]!r} stands {how}, and folds there only into a weight of method 'qat', not {weight.spec.method!r}."
    if norms and turns and weight is not None and weight.active and (weight.spec.qmin == 0 or weight.spec.scheme != "symmetric"):
        return (
            f"{norms[0]!r} folds into {draft.name!r} only on a weight grid without a zero point (int, symmetric), "
            f"not on {weight.spec}."
        )
    return None


def adrift(drafts: Mapping[str, Draft], graph: Graph) -> dict[str, str]:
    """The operators that only a preset selects and that are better left in float, with the reason.

    They work on values which no quantized layer made: masks of attention, positions, variances, which 256 levels would destroy.
    """
    made: set[int] = set()
    for draft in drafts.values():
        if not (draft.swept and is_operator(draft.module)):
            made |= _outputs(draft, graph)
            first = graph.boundaries.get(draft.group[0] if draft.group else draft.name, ())
            read = {seen.source for call in first for seen in call.inputs.values()}
            made |= read | {graph.origin(index) for index in read}
    swept = [draft for draft in drafts.values() if draft.swept and isinstance(draft.module, Operator)]
    found: dict[str, str] = {}
    for draft in sorted(swept, key=lambda draft: graph.calls(draft.name)[0].index) if made else ():
        calls = graph.boundaries[draft.name]
        if type(draft.module).__name__ == "mean" and not all(_pools(draft.module, call) for call in calls):
            found[draft.name] = "a mean that is no pooling"
        elif all(_among(draft.module, call, made, graph) for call in calls):
            made |= _outputs(draft, graph)
        else:
            found[draft.name] = "not between quantized layers"
    return found


def _outputs(draft: Draft, graph: Graph) -> set[int]:
    last = graph.boundaries.get(draft.behind[-1] if draft.behind else draft.name, ())
    return {seen.source for call in last for seen in call.outputs.values()}


def _pools(operator: nn.Module, call: Boundary) -> bool:
    """Whether a mean is over all dimensions behind the first two."""
    assert isinstance(operator, Operator)
    shape = next(iter(call.inputs.values())).shape
    if shape is None:
        return True
    dims = operator.constant(1, "dim", None)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return sorted(dim % len(shape) for dim in dims) == list(range(2, len(shape)))


def _arrives(index: int, made: set[int], graph: Graph) -> bool:
    """Whether a value of `made` arrives at a node, unchanged."""
    while index != OUTSIDE and index not in made:
        node = graph.nodes[index]
        index = node.reads[0] if node.passing and node.reads else OUTSIDE
    return index != OUTSIDE


def _among(operator: nn.Module, call: Boundary, made: set[int], graph: Graph) -> bool:
    """Whether what an operator reads was made, or is read, by quantized layers; for products of matrices and cat, some of it."""
    assert isinstance(operator, Operator)
    given = [seen for seen in call.inputs.values() if seen.floating]
    known = [seen.type == "Parameter" or _arrives(seen.source, made, graph) for seen in given]
    return any(known) if operator.site.op in ("matmul", "bmm", "einsum", "cat", "stack") else all(known)


# -- what the data says -------------------------------------------------------------------------------------------------


def flow_problem(group: tuple[str, ...], modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """Why the data does not flow through a group as its names say; None if it does."""
    if not graph.calls(group[0]):
        return f"{group[0]!r} is not called in the recorded forward."
    return next((problem for name, after in pairwise(group) if (problem := _edge_problem(name, after, modules, graph))), None)


def cut_problem(draft: Draft, graph: Graph) -> str | None:
    """Why the first module of a group's second kernel, an addition, does not carry on what the first made; None if it does."""
    if not draft.whole:
        return None
    name = draft.whole[draft.whole.index(draft.name) - 1]
    for call, follower in zip(graph.calls(name), graph.calls(draft.name), strict=False):
        if call.index not in map(graph.before, follower.reads):
            readers = ", ".join(repr(node.name) for node in graph.consumers(call.index)) or "nothing"
            return f"{draft.name!r} does not read the output of {name!r} (that is read by {readers})."
    return None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _edge_problem(name: str, after: str, modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
    """Why `after` does not simply carry on what `name` made; None if it does, at every call."""
    calls, later = graph.calls(name), graph.calls(after)
    written = next((call.name for call in (*calls, *later) if call.index in graph.side_effects), None)
    if written is not None:
        return f"{written!r} works in place and its input is used afterwards by its old name; fused, nothing is written there."
    if len(calls) != len(later):
        counts = f"{after!r} is called {_times(len(later))} and {name!r} {_times(len(calls))}"
        return f"{counts}; a shared module cannot be fused."
    for call, follower in zip(calls, later, strict=True):
        readers = [node.name for node in graph.consumers(call.index)]
        found = f"that is read by {', '.join(map(repr, readers)) or 'nothing'}"
        if call.index not in map(graph.before, follower.reads):
            return f"{after!r} does not read the output of {name!r} ({found})."
        returned = graph.returned(call.index)
        if len(readers) > 1 or returned:
            others = [repr(reader) for reader in readers if reader != after] + ["the model's output"] * returned
            return f"the output of {name!r} is also read by {', '.join(others)}; fused, it would not exist."
        if (problem := _dims_problem(name, after, modules, follower, graph)) is not None:
            return problem
    return None


def _dims_problem(name: str, after: str, modules: Mapping[str, nn.Module], node: Node, graph: Graph) -> str | None:
    """Why a batch norm does not normalise the channels of the layer on its other side."""
    first, second = modules[name], modules[after]
    norm, other, which = (second, first, after) if isinstance(second, BatchNorm) else (first, second, name)
    if not isinstance(norm, BatchNorm) or not isinstance(other, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
        return None
    linear = isinstance(other, nn.Linear)
    if not graph.shapes:
        return f"{which!r} may normalise a dimension that is not the channels'; only example_input can show." if linear else None
    if linear and node.dims != 2:
        return f"{which!r} normalises dimension 1 of a {node.dims}-D input; it folds into a Linear only on 2-D."
    if not linear and node.dims == 2:
        return f"{which!r} normalises dimension 1 of an input without a batch dimension; give batches (N, C, L)."
    return None
