# SPDX-License-Identifier: Apache-2.0
"""Owns the decisions: model, rules and recorded forward become a `Plan` that says what will be done to each layer, and why.

Precedence, decided in `_resolve` and nowhere else: within one entry, the type's setting <- the entry's shorthand keys <-
its `target_settings`, merged key by key; between entries the later one wins, per module and target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_quant.config import INPUT, OUTPUT, WEIGHT, ConfigError, Rule, TensorSpec, closest, parse_rules, raise_problems
from lightning_quant.fusion import BatchNorm, activation_cap, is_group_head, pattern_problem
from lightning_quant.graph import Graph, record
from lightning_quant.settings import registered_base, registered_names, setting_of

ACTIVATION_TARGETS = (INPUT, OUTPUT)


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """One quantized target. `source`: the quantizer it shares ('conv1._output_'), or None if it has its own."""

    target: str
    spec: TensorSpec
    decided_by: str
    source: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One weighted layer, the modules fused behind it and its quantized targets."""

    name: str
    type: str
    batch_norm: str | None
    activation: str | None
    targets: Mapping[str, TargetPlan]
    notes: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the modules behind the head, in the order of the data."""
        return tuple(name for name in (self.batch_norm, self.activation) if name is not None)

    @property
    def end(self) -> str:
        """Name of the module whose output is the group's."""
        return self.members[-1] if self.members else self.name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `prepare_model` will do; `print(plan)` is a table of it."""

    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("module", "fused with", "target", "dtype", "scheme", "granularity", "decided by", "notes")
        rows = [row for layer in self.layers for row in _rows(layer)]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        rule = tuple("-" * width for width in widths)
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, rule, *rows)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _rows(layer: LayerPlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    names = (layer.name, ", ".join(layer.members))
    for position, target in enumerate(layer.targets.values()):
        spec, notes = target.spec, list(target.notes)
        if target.source:
            notes.insert(0, f"shared with {target.source}")
        if not position:
            notes.extend(layer.notes)
        lead = names if not position else ("", "")
        rows.append((*lead, target.target, spec.dtype, spec.scheme, spec.granularity, target.decided_by, "; ".join(notes)))
    return rows


# -- selection and precedence -----------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """A layer while its plan is being made."""

    module: nn.Module
    targets: dict[str, TargetPlan] = field(default_factory=dict)
    explicit: set[str] = field(default_factory=set)
    group: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def _is_type(module: nn.Module, name: str) -> bool:
    """Whether `name` is the class of `module`, or a base class whose forward it keeps."""
    return any(c.__name__ == name and type(module).forward is getattr(c, "forward", None) for c in type(module).__mro__)


def _select(rule: Rule, modules: Mapping[str, nn.Module], problems: list[str]) -> list[str]:
    """The names that a rule selects, in the order of the model: op_names and op_types must both hold where both stand."""
    before = len(problems)
    for name in rule.op_names:
        if name not in modules:
            near = closest(name, modules)
            hint = f" Close: {', '.join(map(repr, near))}." if near else ""
            problems.append(
                f"{rule.where}: op_names {name!r} matches no module.{hint} "
                "Layers built later are not visible before on_fit_start."
            )
    for type_name in rule.op_types:
        if not any(_is_type(module, type_name) for name, module in modules.items() if name):
            counts = Counter(type(module).__name__ for name, module in modules.items() if name)
            near = closest(type_name, counts, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            present = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            problems.append(f"{rule.where}: op_types {type_name!r} matches no module; the model has {present}.{hint}")

    def selected(name: str, module: nn.Module) -> bool:
        named = not rule.op_names or name in rule.op_names
        return named and (not rule.op_types or any(_is_type(module, t) for t in rule.op_types))

    names = [name for name, module in modules.items() if name and selected(name, module)]
    if not names and len(problems) == before:
        problems.append(f"{rule.where}: op_names and op_types together select no module; drop one of the two keys.")
    return names


def _resolve(rule: Rule, setting: Mapping[str, Mapping[str, str]], target: str) -> tuple[TensorSpec, tuple[str, ...]]:
    """What one entry decides for one target: setting <- shorthand <- target_settings, key by key; with notes.

    `granularity: default` is one scale per output channel for weights and one per tensor for activations. A shorthand
    `out_channel` is meant for the weight where it stands beside activations; those stay per tensor and the note says so.
    """
    weight, notes = target not in ACTIVATION_TARGETS, []
    own = rule.target_settings.get(target, {})
    keys = {**setting[target], **rule.settings, **own}
    granularity = keys["granularity"]
    if granularity == "out_channel" and not weight:
        if own.get("granularity") == "out_channel":
            raise ConfigError(
                f"{rule.where}['target_settings'][{target!r}]['granularity']: 'out_channel' is for weights; "
                "activations take default or per_tensor."
            )
        notes.append("out_channel is for weights")
        granularity = "per_tensor"
    if granularity == "default":
        granularity = "out_channel" if weight else "per_tensor"
    scheme: Any = keys["quant_scheme"]
    shape: Any = granularity
    return TensorSpec.make(keys["quant_dtype"], scheme, shape, weight=weight), tuple(notes)


def _apply_rule(rule: Rule, modules: Mapping[str, nn.Module], drafts: dict[str, _Draft], problems: list[str]) -> None:
    """Decide, for every module that a rule selects, the targets that it names."""
    for name in _select(rule, modules, problems):
        module = modules[name]
        base = registered_base(type(module))
        if base is None or module._parameters.get(WEIGHT) is None or "forward" in vars(module):
            problems.append(f"{rule.where}: {_unfit(name, module)}")
            continue
        setting = setting_of(base)
        wanted = rule.target_names if rule.target_names is not None else tuple(setting)
        for target in dict.fromkeys([*wanted, *rule.target_settings]):
            if target not in setting:
                near = closest(target, setting, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                known = ", ".join(setting)
                problems.append(f"{rule.where}: {name!r} ({base.__name__}) has no target {target!r}; it has {known}.{hint}")
            elif target not in wanted:
                problems.append(
                    f"{rule.where}: target_settings has {target!r}, but target_names leaves it out; add it or drop its settings."
                )
            else:
                _decide(rule, setting, target, drafts.setdefault(name, _Draft(module)), problems)


def _unfit(name: str, module: nn.Module) -> str:
    """Why a selected module cannot be quantized."""
    if "forward" in vars(module):
        return f"{name!r} has a forward of its own on the instance; what it computes is unknown. Leave it out."
    if registered_base(type(module)) is not None:
        return (
            f"the weight of {name!r} is no Parameter of its own (parametrized, weight-normed or pruned); make it permanent first "
            "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove) or leave the layer out."
        )
    known = registered_names()
    derived = any(base.__name__ in known for base in type(module).__mro__)
    own = " (a subclass with its own forward)" if derived else ""
    return f"{name!r} is a {type(module).__name__}{own}, which has no quantization setting; registered: {', '.join(known)}."


def _decide(rule: Rule, setting: Mapping[str, Mapping[str, str]], target: str, draft: _Draft, problems: list[str]) -> None:
    try:
        spec, notes = _resolve(rule, setting, target)
    except ConfigError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return
    before = draft.targets.get(target)
    if before is not None:
        notes = (*notes, f"overrules {before.decided_by}")
    draft.targets[target] = TargetPlan(target=target, spec=spec, decided_by=rule.where, notes=notes)
    if target in (rule.target_names or ()) or target in rule.target_settings:
        draft.explicit.add(target)


# -- fuse groups ------------------------------------------------------------------------------------------------------


def _collect_groups(
    rules: Sequence[Rule], modules: Mapping[str, nn.Module], drafts: dict[str, _Draft], problems: list[str]
) -> None:
    """Give every draft its group, after the checks that need the modules but no forward."""
    owner: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        selected = set(_select(rule, modules, []))
        for group in rule.fuse_names:
            problem = _group_problem(group, modules, selected)
            taken = next((name for name in group if owner.get(name, group) != group), None)
            if problem is None and taken is not None:
                problem = f"{taken!r} is already fused in {owner[taken]!r}; a module belongs to one group."
            if problem is not None:
                problems.append(f"{rule.where}: fuse_names {group!r}: {problem}")
            elif group[0] in drafts:
                owner.update(dict.fromkeys(group, group))
                drafts[group[0]].group = group


def _group_problem(group: tuple[str, ...], modules: Mapping[str, nn.Module], selected: set[str]) -> str | None:
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
        weight = members[0].weight
        features = len(weight) if isinstance(weight, nn.Parameter) else -1
        if norm.num_features != features:
            return f"{group[1]!r} has {norm.num_features} features, {group[0]!r} makes {features}."
        if norm.running_var is None:
            return f"{group[1]!r} has no running statistics (track_running_stats=False), so nothing can be folded."
    return None


def _flow_problem(group: tuple[str, ...], modules: Mapping[str, nn.Module], graph: Graph) -> str | None:
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


# -- what the recorded forward decides --------------------------------------------------------------------------------


def _share_inputs(layers: list[LayerPlan], graph: Graph) -> list[LayerPlan]:
    """One quantizer per tensor: an input that arrives rounded on an equal grid needs none, two readers share one."""
    ends = {call.index: layer for layer in layers for call in graph.calls(layer.end)}
    order = sorted(layers, key=lambda layer: graph.calls(layer.name)[0].index)
    first_reader: dict[tuple[int, TensorSpec], str] = {}
    source: dict[str, str] = {}
    for layer in order:
        target = layer.targets.get(INPUT)
        if target is None:
            continue
        reads = {call.reads[0] if call.reads else -1 for call in graph.calls(layer.name)}
        makers = {ends[o].name if o in ends else "" for o in map(graph.origin, reads)}
        maker = next((p for p in layers if p.name in makers), None) if len(makers) == 1 else None
        if maker is not None and OUTPUT in maker.targets and maker.targets[OUTPUT].spec == target.spec:
            source[layer.name] = f"{maker.name}.{OUTPUT}"
        elif len(reads) == 1 and min(reads) >= 0:
            owner = first_reader.setdefault((min(reads), target.spec), layer.name)
            if owner != layer.name:
                source[layer.name] = f"{owner}.{INPUT}"
    return [
        replace(layer, targets={**layer.targets, INPUT: replace(layer.targets[INPUT], source=source[layer.name])})
        if layer.name in source
        else layer
        for layer in layers
    ]


def _free_last_output(layer: LayerPlan, layers: list[LayerPlan], explicit: set[str], graph: Graph) -> LayerPlan:
    """High-precision output: a last weighted layer keeps a float output unless `_output_` was asked for by name."""
    if OUTPUT not in layer.targets or OUTPUT in explicit:
        return layer
    after = set().union(*(graph.downstream(call.index) for call in graph.calls(layer.end)))
    names = {graph.nodes[index].name for index in after if graph.nodes[index].kind == "module"}
    if any(other.name in names for other in layers):
        return layer
    if layer.type != "Linear":
        return replace(layer, notes=(*layer.notes, "last layer, output quantized: no int8 convolution has a float output"))
    targets = {name: target for name, target in layer.targets.items() if name != OUTPUT}
    return replace(layer, targets=targets, notes=(*layer.notes, "last layer: float output"))


def _finish(draft: _Draft, name: str, modules: Mapping[str, nn.Module]) -> LayerPlan:
    base = registered_base(type(draft.module))
    assert base is not None
    norm = next((n for n in draft.group[1:] if isinstance(modules[n], BatchNorm)), None)
    act = next((n for n in draft.group[1:] if activation_cap(modules[n]) is not None), None)
    order = [t for t in (INPUT, WEIGHT, OUTPUT) if t in draft.targets]
    if INPUT in order and WEIGHT not in order:
        draft.notes.append("float weight: onnxruntime rounds it by itself where input and output are quantized")
    elif INPUT not in order:
        draft.notes.append("no input grid: float arithmetic")
    elif OUTPUT not in order and base is not nn.Linear:
        draft.notes.append("no output grid: float arithmetic")
    return LayerPlan(
        name=name,
        type=base.__name__,
        batch_norm=norm,
        activation=act,
        targets={target: draft.targets[target] for target in order},
        notes=tuple(draft.notes),
    )


def make_plan(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    *,
    example_input: Any = None,
    root: str | None = None,
) -> Plan:
    """Decide what `config_list` means for `model`; changes nothing.

    Args:
        model: the float model.
        config_list: see `parse_rules`.
        example_input: what `model` (or its submodule `root`) is called with: a tensor, a tuple of positional arguments,
            a dict of keyword arguments or (tuple, dict). One forward in eval mode is recorded with it, which proves fuse
            groups and finds shared tensors. Without it nothing can be fused and every input has its own quantizer.
        root: name of the submodule that the names in `config_list` are relative to; None for `model` itself.

    Raises:
        ConfigError: with every problem found.
    """
    scope = scope_of(model, root)
    graph = None if example_input is None else record_forward(scope, example_input)
    return plan_from_graph(model, config_list, graph, root=root)


def scope_of(model: nn.Module, root: str | None) -> nn.Module:
    """The module that names in a config_list are relative to."""
    modules = dict(model.named_modules())
    if root and root not in modules:
        near = closest(root, modules)
        hint = f" Close: {', '.join(map(repr, near))}." if near else ""
        raise ConfigError(f"root {root!r} is no module of {type(model).__name__}.{hint}")
    scope: nn.Module = modules[root or ""]
    return scope


def record_forward(model: nn.Module, example_input: Any, entry: nn.Module | None = None) -> Graph:
    """`record`, with a failed forward reported as a ConfigError."""
    try:
        return record(model, example_input, entry=entry)
    except Exception as error:
        raise ConfigError(
            f"example_input: the recorded forward of {type(entry or model).__name__} failed: {error}. Give what the model is "
            "called with: a tensor, a tuple of positional arguments, a dict of keyword arguments or (tuple, dict)."
        ) from error


def plan_from_graph(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    graph: Graph | None,
    *,
    root: str | None = None,
    no_graph_because: str = "no example_input was given",
) -> Plan:
    """`make_plan` on a forward that was recorded already (of `root`, names relative to it), or on none."""
    rules = parse_rules(config_list)
    modules = dict(scope_of(model, root).named_modules())
    if any(is_group_head(module) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} is already prepared; call restore_model(model) before planning again.")
    problems: list[str] = []
    drafts: dict[str, _Draft] = {}
    for rule in rules:
        _apply_rule(rule, modules, drafts, problems)
    _collect_groups(rules, modules, drafts, problems)
    raise_problems(list(dict.fromkeys(problems)))
    notes: list[str] = []
    if graph is None:
        if any(draft.group for draft in drafts.values()):
            raise ConfigError(
                f"fuse_names: nothing is fused unseen, and there is no recorded forward ({no_graph_because}); give "
                "example_input, what the model is called with, so that one forward can show that each member reads the one "
                "before it and nothing else does."
            )
        notes.append(
            f"no recorded forward ({no_graph_because}): every input has its own quantizer and every output is quantized; "
            "give example_input to share them"
        )
    layers = _layers(drafts, modules, graph, notes)
    prefix = f"{root}." if root else ""
    return Plan(layers=tuple(_renamed(layer, prefix) for layer in layers), notes=tuple(notes))


def _layers(
    drafts: Mapping[str, _Draft], modules: Mapping[str, nn.Module], graph: Graph | None, notes: list[str]
) -> list[LayerPlan]:
    """The layers in the order of the model, checked against the recorded forward where there is one."""
    names = [name for name in modules if name in drafts]
    if graph is None:
        return [_finish(drafts[name], name, modules) for name in names]
    problems: list[str] = []
    layers: list[LayerPlan] = []
    for name in names:
        draft, calls = drafts[name], graph.calls(name)
        if draft.group and (problem := _flow_problem(draft.group, modules, graph)):
            problems.append(f"fuse_names {draft.group!r}: {problem}")
        elif not calls:
            notes.append(f"{name} ({type(draft.module).__name__}) is not called in the recorded forward and stays float")
        else:
            hooked = [n for n in (draft.group or (name,)) if modules[n]._forward_hooks or modules[n]._forward_pre_hooks]
            if hooked:
                draft.notes.append(f"hooks on {', '.join(hooked)} run while training and are not deployed")
            if len(calls) > 1:
                draft.notes.append(f"called {len(calls)} times: one range for all")
            layers.append(_finish(draft, name, modules))
    raise_problems(problems)
    if not layers:
        raise ConfigError(
            "config_list: none of the selected modules is called in the recorded forward; check example_input and root."
        )
    layers = [_free_last_output(layer, layers, drafts[layer.name].explicit, graph) for layer in layers]
    return _share_inputs([layer for layer in layers if layer.targets], graph)


def _renamed(layer: LayerPlan, prefix: str) -> LayerPlan:
    if not prefix:
        return layer
    targets = {
        key: replace(target, source=None if target.source is None else prefix + target.source)
        for key, target in layer.targets.items()
    }
    norm = None if layer.batch_norm is None else prefix + layer.batch_norm
    activation = None if layer.activation is None else prefix + layer.activation
    return replace(layer, name=prefix + layer.name, batch_norm=norm, activation=activation, targets=targets)
