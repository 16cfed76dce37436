# SPDX-License-Identifier: Apache-2.0
"""Owns the decisions: model, rules and recorded forward become a `Plan` that says what will be done to each layer, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_quant.config import PRESETS, ConfigError, Rule, parse_rules, raise_problems
from lightning_quant.discovery import absorb, auto_group, claim_parts, collect_groups, flow_problem, parts_of
from lightning_quant.fusion import BatchNorm, activation_cap, is_head, runs_on_integers
from lightning_quant.graph import Boundary, Graph, record
from lightning_quant.group import is_group_head
from lightning_quant.keys import INPUT, OUTPUT, QUANTIZATION, WEIGHT, Problems, closest, guess
from lightning_quant.matching import Draft, Modules, TargetPlan, apply_rule, fitted, idle_keys
from lightning_quant.settings import Setting, checked_setting, is_called, kept_bases
from lightning_quant.sources import read_config
from lightning_quant.targets import canonical_output, is_activation, is_input, output_key


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One quantized module, the modules fused behind it and its quantized targets.

    `folds`: a convolution or linear layer, which becomes one folded layer with what is fused behind it; any other module
    keeps its own forward and is quantized around it.
    """

    name: str
    type: str
    batch_norm: str | None
    activation: str | None
    targets: Mapping[str, TargetPlan]
    notes: tuple[str, ...] = ()
    folds: bool = True

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
        rows.append((*lead, target.target, spec.dtype, spec.scheme, str(spec.granularity), target.decided_by, "; ".join(notes)))
    return rows


# -- one layer at a time ----------------------------------------------------------------------------------------------


def _layer(draft: Draft, modules: Mapping[str, nn.Module]) -> LayerPlan:
    """What was drafted for one module, in the order of its data, with what there is to say about it."""
    module, targets = draft.module, draft.ordered()
    norm = next((n for n in draft.group[1:] if isinstance(modules[n], BatchNorm)), None)
    act = next((n for n in draft.group[1:] if activation_cap(modules[n]) is not None), None)
    folds = is_head(module)
    layer = LayerPlan(
        name=draft.name,
        type=kept_bases(type(module))[-1].__name__ if folds else type(module).__name__,
        batch_norm=norm,
        activation=act,
        targets=targets,
        folds=folds,
    )
    return replace(layer, notes=(*draft.notes, *_arithmetic(layer)))


def _arithmetic(layer: LayerPlan) -> list[str]:
    """Why a layer runs in float arithmetic, if it does."""
    active = {name: target for name, target in layer.targets.items() if target.active}
    if not layer.folds:
        return ["float arithmetic around its own forward"]
    if odd := [name for name, target in active.items() if not runs_on_integers(target.spec) and name != "bias"]:
        return [f"no integer kernel has {', '.join(f'{active[name].spec} for {name}' for name in odd)}: float arithmetic"]
    if INPUT in active and WEIGHT not in active:
        return ["float weight: float arithmetic"]
    if INPUT not in active:
        return ["no input grid: float arithmetic"]
    return ["no output grid: float arithmetic"] if OUTPUT not in active and layer.type != "Linear" else []


def _shaped(draft: Draft, calls: Sequence[Boundary], end: Sequence[Boundary], problems: Problems) -> None:
    """Hold the activations of a draft against what its calls were given and what they returned.

    A target of the type's setting that is no float tensor here (an argument left out, integer indices) is dropped; one that
    was asked for is a problem.
    """
    for target in [t for t in draft.targets if is_activation(t)]:
        plan = draft.targets[target]
        if is_input(target):
            found = [call.inputs.get(target) for call in calls]
        else:
            found = [call.outputs.get(output_key(canonical_output(target), call.outputs) or "") for call in end]
        seen = next((one for one in found if one is not None and one.floating), None)
        if seen is None:
            if target in draft.explicit:
                what = next(
                    (f"a {one.type}" for one in found if one is not None), "not given at all" if is_input(target) else "absent"
                )
                tensors = calls[0].inputs if is_input(target) else end[0].outputs
                known = ", ".join(name for name, one in tensors.items() if one.floating) or "none"
                problems.append(
                    f"{plan.decided_by}: {target!r} of {draft.name!r} is no floating-point tensor in the recorded forward: it "
                    f"is {what}; there are {known}."
                )
            elif any(one is not None for one in found) or not is_input(target):
                draft.notes.append(f"{target} is no floating-point tensor here and stays as it is")
            del draft.targets[target]
            continue
        draft.targets[target], problem = fitted(plan, seen.shape)
        if problem is not None:
            problems.append(f"{plan.decided_by}: {target!r} of {draft.name!r}: {problem}.")
    if INPUT in draft.targets and not is_head(draft.module):
        others = [t for t, one in calls[0].inputs.items() if one.floating and t not in draft.targets]
        draft.notes.extend(f"{target} stays float (name it in target_names)" for target in others)


# -- what the recorded forward decides --------------------------------------------------------------------------------


def _ends(layers: Sequence[LayerPlan], graph: Graph) -> dict[int, tuple[LayerPlan, str]]:
    """The node that makes a layer's one output -> (layer, that output's target); outputs that stay float count, too.

    Where the last layer inside another one makes what the outer one returns, the outer one's rounding is what arrives.
    """
    ends: dict[int, tuple[LayerPlan, str]] = {}
    for layer in sorted(layers, key=lambda layer: -layer.name.count(".")):
        for call in graph.boundaries.get(layer.end, ()):
            made = {key: seen for key, seen in call.outputs.items() if seen.shape is not None}
            if len(made) == 1:
                (key, seen), *_ = made.items()
                target = next((t for t in layer.targets if not is_input(t) and output_key(t, call.outputs) == key), OUTPUT)
                if seen.source not in graph.split and (seen.source not in ends or _rounded_output(layer, target)):
                    ends[seen.source] = (layer, target)
    return ends


def _enclosing(layer: LayerPlan, layers: Sequence[LayerPlan]) -> LayerPlan | None:
    """The innermost layer around this one that rounds what it is given."""
    around = [
        other
        for other in layers
        if layer.name.startswith(f"{other.name}.") and any(is_input(t) and p.active for t, p in other.targets.items())
    ]
    return max(around, key=lambda other: len(other.name), default=None)


def _rounded_output(layer: LayerPlan, target: str) -> TargetPlan | None:
    plan = layer.targets.get(target)
    return plan if plan is not None and plan.active else None


def _share(layers: list[LayerPlan], graph: Graph) -> list[LayerPlan]:
    """One quantizer per tensor: an input that arrives rounded on an equal grid needs none, two readers share one.

    A module that only hands values on (a pool, say) has one range for what comes in and what goes out.
    """
    layers = [_passed_on(layer, graph) for layer in layers]
    ends = _ends(layers, graph)
    stops = {index for index, end in ends.items() if _rounded_output(*end) is not None}
    order = sorted(layers, key=lambda layer: graph.boundaries[layer.name][0].order)
    first_reader: dict[tuple[Any, ...], str] = {}
    source: dict[tuple[str, str], str] = {}

    def origin(index: int) -> int:
        while index >= 0 and index not in stops and graph.nodes[index].passing and graph.nodes[index].reads:
            index = graph.nodes[index].reads[0]
        return index

    for layer in order:
        around = _enclosing(layer, layers)
        inside = "" if around is None else f"{around.name}."  # what comes in there is rounded anew
        for target, plan in layer.targets.items():
            if not is_input(target) or not plan.active:
                continue
            reads = {call.inputs[target].source if target in call.inputs else -1 for call in graph.boundaries[layer.name]}
            # Blocks have the dimensions of their tensor, which a reshape on the way may have changed.
            whole = plan.spec.granularity == "per_tensor"
            makers = [ends.get(origin(index) if whole else index) for index in reads]
            maker = makers[0] if all(m is not None and m == makers[0] for m in makers) else None
            if maker is not None and (layer.name.startswith(f"{maker[0].name}.") or not maker[0].name.startswith(inside)):
                maker = None
            made = None if maker is None else _rounded_output(*maker)
            if made is not None and made.spec.grid == plan.spec.grid:
                assert maker is not None
                source[layer.name, target] = f"{maker[0].name}.{maker[1]}"
            elif len(reads) == 1 and min(reads) >= 0 and not reads & graph.split:
                own = f"{layer.name}.{target}"
                alike = (min(reads), inside, plan.spec.grid, plan.spec.apply_method, plan.spec.observer)
                owner = first_reader.setdefault(alike, own)
                if owner != own:
                    source[layer.name, target] = owner
    return [
        replace(layer, targets={t: replace(p, source=source.get((layer.name, t), p.source)) for t, p in layer.targets.items()})
        for layer in layers
    ]


def _passed_on(layer: LayerPlan, graph: Graph) -> LayerPlan:
    nodes = graph.calls(layer.name)
    given, made = layer.targets.get(INPUT), layer.targets.get(OUTPUT)
    if not nodes or not all(node.passing for node in nodes) or given is None or made is None:
        return layer
    one_scale = given.spec.granularity == "per_tensor"
    if not (given.active and made.active and one_scale) or given.spec.grid != made.spec.grid:
        return layer
    return replace(layer, targets={**layer.targets, OUTPUT: replace(made, source=f"{layer.name}.{INPUT}")})


def _free_last_output(layer: LayerPlan, layers: list[LayerPlan], explicit: set[str], graph: Graph) -> LayerPlan:
    """High-precision output: a last weighted layer keeps a float output unless `_output_` was asked for by name."""
    if not layer.folds or OUTPUT not in layer.targets or OUTPUT in explicit:
        return layer
    ends = {call.index for call in graph.calls(layer.end)}
    after = ends.union(*(graph.downstream(index) for index in ends))
    for other in layers:
        calls = graph.boundaries.get(other.name, ())
        if other.name != layer.name and any(seen.source in after for call in calls for seen in call.inputs.values()):
            return layer
    if layer.type != "Linear":
        return replace(layer, notes=(*layer.notes, "last layer, output quantized: no int8 convolution has a float output"))
    targets = {name: target for name, target in layer.targets.items() if name != OUTPUT}
    return replace(layer, targets=targets, notes=(*layer.notes, "last layer: float output"))


# -- the whole --------------------------------------------------------------------------------------------------------


def make_plan(
    model: nn.Module,
    config_list: Any,
    *,
    example_input: Any = None,
    settings: Mapping[str, Setting] | None = None,
    root: str | None = None,
) -> Plan:
    """Decide what `config_list` means for `model`; changes nothing.

    Args:
        model: the float model.
        config_list: a list of entries, one entry, a preset's name or a YAML or JSON path; see `parse_rules`.
        example_input: what `model` (or its submodule `root`) is called with: a tensor, a tuple of positional arguments,
            a dict of keyword arguments or (tuple, dict). One forward in eval mode is recorded with it, which proves fuse
            groups and finds shared tensors. Without it nothing can be fused and every input has its own quantizer.
        settings: settings of module types for this plan alone, over the registered ones: class name or dotted path -> target
            -> keys, as in `QuantizationSetting.register`; or a path.
        root: name of the submodule that the names in `config_list` are relative to; None for `model` itself.

    Raises:
        ConfigError: with every problem found.
    """
    scope = scope_of(model, root)
    graph = None if example_input is None else record_forward(scope, example_input)
    config_list = read_config(config_list, presets=PRESETS)
    if settings is not None:
        settings = read_config(settings, presets=(), name="settings")
    return plan_from_graph(model, config_list, graph, settings=settings, root=root)


def scope_of(model: nn.Module, root: str | None) -> nn.Module:
    """The module that names in a config_list are relative to."""
    if not isinstance(root, str | None):
        raise ConfigError(f"root: expected the name of a submodule or None, got {root!r}.")
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
    config_list: Any,
    graph: Graph | None,
    *,
    settings: Mapping[str, Setting] | None = None,
    root: str | None = None,
    no_graph_because: str = "no example_input was given",
) -> Plan:
    """`make_plan` on a forward that was recorded already (of `root`, names relative to it), or on none."""
    rules = parse_rules(config_list)
    local = parse_settings(settings)
    modules = Modules(scope_of(model, root), root or "")
    if any(is_group_head(module) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} is already prepared; call restore_model(model) before planning again.")
    problems: Problems = []
    notes: list[str] = []
    drafts: dict[str, Draft] = {}
    for name in local or {}:
        if not any(is_called(type(module), name) for module in modules.by_name.values()):
            hint = guess(name, [type(module).__name__ for module in modules.by_name.values()])
            problems.append(f"settings: {name!r} matches no module; the model has {modules.types()}.{hint}")
    chosen = {rule.where: apply_rule(rule, modules, drafts, problems, notes, local) for rule in rules}
    collect_groups(rules, chosen, modules, drafts, problems)
    problems.extend(claim_parts(drafts, modules.by_name))
    if graph is None:
        if any(draft.group for draft in drafts.values()):
            problems.append(
                f"fuse_names: nothing is fused unseen, and there is no recorded forward ({no_graph_because}); give "
                "example_input, what the model is called with, so that one forward can show that each member reads the one "
                "before it and nothing else does."
            )
        auto = ", nothing is fused" if any(draft.auto for draft in drafts.values()) else ""
        notes.append(
            f"no recorded forward ({no_graph_because}): every input has its own quantizer and every output is quantized{auto}; "
            "give example_input to share them"
        )
    layers = _layers(rules, drafts, modules.by_name, graph, notes, problems)
    prefix = f"{root}." if root else ""
    return Plan(layers=tuple(_renamed(layer, prefix) for layer in layers), notes=tuple(notes))


def parse_settings(settings: Any) -> dict[str, Setting] | None:
    """The `settings` argument, checked: class name or dotted path -> target -> keys.

    Raises:
        ConfigError: with every problem found.
    """
    if settings is None:
        return None
    problems: Problems = []
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings: expected a dict from module type to setting, got {settings!r}.")
    local = {
        str(name): checked_setting(setting, QUANTIZATION, f"settings[{name!r}]", problems) for name, setting in settings.items()
    }
    raise_problems(problems)
    return local


def _layers(
    rules: Sequence[Rule],
    drafts: dict[str, Draft],
    modules: Mapping[str, nn.Module],
    graph: Graph | None,
    notes: list[str],
    problems: Problems,
) -> list[LayerPlan]:
    """The layers in the order of the model, checked against the recorded forward where there is one."""
    names = [name for name in modules if name in drafts]
    if graph is None:
        for name in names:
            targets = drafts[name].targets
            targets.update({t: fitted(plan, None)[0] for t, plan in targets.items() if is_activation(t)})
        raise_problems([*problems, *idle_keys(rules, drafts.values())])
        return [_layer(drafts[name], modules) for name in names]
    for name in names:
        if name in drafts:
            _against_forward(drafts[name], drafts, modules, graph, notes, problems)
    raise_problems([*problems, *idle_keys(rules, drafts.values())])
    layers = [_layer(drafts[name], modules) for name in names if name in drafts]
    if not layers:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConfigError(
            f"config_list: none of the selected modules ({some}) is called in the recorded forward; check example_input and root."
        )
    layers = [_free_last_output(layer, layers, drafts[layer.name].explicit, graph) for layer in layers]
    if not any(layer.targets for layer in layers):
        raise ConfigError("config_list: the recorded forward left no target to quantize; name one in target_names.")
    return _share([layer for layer in layers if layer.targets], graph)


def _against_forward(
    draft: Draft,
    drafts: dict[str, Draft],
    modules: Mapping[str, nn.Module],
    graph: Graph,
    notes: list[str],
    problems: Problems,
) -> None:
    """Check one draft against its calls, find its group, and note what there is to note; drops it if it is not called."""
    name, calls = draft.name, graph.boundaries.get(draft.name, ())
    if draft.auto and calls and not draft.group:
        taken = {member for other in drafts.values() for member in other.group}
        taken |= {other.name for other in drafts.values() if other.named}
        parts = {part for other in drafts.values() for part in parts_of(other)}
        taken |= {other for other, module in modules.items() if module in parts}
        draft.group, why = auto_group(name, modules, graph, taken, fold_norm="bias" not in draft.targets)
        draft.notes += [f"not fused further: {why.rstrip('.')}"] if why else []
        absorb(draft, drafts, quietly=True)
    elif draft.group and (problem := flow_problem(draft.group, modules, graph)):
        problems.append(f"{draft.fused_by}: fuse_names {draft.group!r}: {problem}")
        return
    if not calls:
        del drafts[name]
        notes.append(f"{name} ({type(draft.module).__name__}) is not called in the recorded forward and stays float")
        return
    if "bias" in draft.targets and any(isinstance(modules[member], BatchNorm) for member in draft.group):
        problems.append(
            f"{draft.targets['bias'].decided_by}: 'bias' of {name!r} has no grid of its own: batch norm folds into it, and a "
            "folded bias is int32 on the layer's grid by itself; leave it out of the targets."
        )
    if not draft.group and any(call.index in graph.side_effects for call in graph.calls(name)):
        problems.append(
            f"config_list: {name!r} ({type(draft.module).__name__}) works in place and its input is used afterwards "
            "by its old name; rounded, nothing is written there. Leave it out."
        )
    hooked = [n for n in (draft.group or (name,)) if modules[n]._forward_hooks or modules[n]._forward_pre_hooks]
    if hooked:
        draft.notes.append(f"hooks on {', '.join(hooked)} run while training and are not deployed")
    if len(calls) > 1:
        draft.notes.append(f"called {len(calls)} times: one range for all")
    end = graph.boundaries.get(draft.group[-1], ()) if draft.group else calls
    _shaped(draft, calls, end, problems)


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
