# SPDX-License-Identifier: Apache-2.0
"""Owns the decisions: model, rules and recorded forward become a `Plan` that says what will be done to each layer, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_quant.config import PRESETS, ConfigError, Rule, parse_rules, raise_problems
from lightning_quant.discovery import (
    absorb,
    absorb_between,
    adrift,
    auto_group,
    between,
    claim_parts,
    collect_groups,
    cut_problem,
    flow_problem,
    grid_problem,
    parts_of,
)
from lightning_quant.fusion import runs_on_integers
from lightning_quant.graph import Boundary, Graph
from lightning_quant.intercept import is_prepared
from lightning_quant.keys import INPUT, OUTPUT, QUANTIZATION, WEIGHT, Problems, closest, guess
from lightning_quant.layers import LayerPlan, Plan
from lightning_quant.matching import Draft, TargetPlan, apply_rule, fitted, idle_keys
from lightning_quant.patterns import Roles, clamp_of, is_batch_norm, is_head, is_registered, roles_of
from lightning_quant.record import record
from lightning_quant.selection import Modules
from lightning_quant.settings import QuantizationSetting, Setting, checked_setting, is_called, kept_bases
from lightning_quant.sharing import free_last_output, share
from lightning_quant.sites import Operator, is_operator
from lightning_quant.sources import read_config
from lightning_quant.symbolic import trace
from lightning_quant.targets import canonical_output, is_activation, is_input, output_key

# -- one layer at a time ----------------------------------------------------------------------------------------------


def _layer(draft: Draft, modules: Mapping[str, nn.Module]) -> LayerPlan:
    """What was drafted for one module, in the order of its data, with what there is to say about it."""
    module, targets = draft.module, draft.ordered()
    group = draft.group or (draft.name,)
    roles = roles_of([modules[name] for name in group])
    norm, act, before = (None if p is None else group[p] for p in _positions(roles))
    folds = is_head(module) or (bool(draft.group) and is_batch_norm(module))
    inner = None
    if act is not None and clamp_of(modules[act]) is None and OUTPUT in targets and targets[OUTPUT].active:
        end = targets[OUTPUT]
        why = f"before {act}: no integer kernel ends in it"
        inner = TargetPlan(target="_inner_", spec=end.spec, decided_by=end.decided_by, notes=(why,))
    layer = LayerPlan(
        name=draft.name,
        type=kept_bases(type(module))[-1].__name__ if is_head(module) else type(module).__name__,
        batch_norm=norm,
        activation=act,
        targets=targets,
        folds=folds,
        norm_before=before,
        inner=inner,
        operator=is_operator(module),
    )
    return replace(layer, notes=(*draft.notes, *_arithmetic(layer)))


def _positions(roles: Roles | None) -> tuple[int | None, int | None, int | None]:
    return (None, None, None) if roles is None else (roles.norm, roles.activation, roles.norm_before)


def _arithmetic(layer: LayerPlan) -> list[str]:
    """Why a layer runs in float arithmetic, if it does."""
    active = {name: target for name, target in layer.targets.items() if target.active}
    if layer.operator:
        return []
    if not layer.folds:
        return ["float arithmetic around its own forward"]
    if layer.type.startswith("ConvTranspose"):
        return ["no integer kernel for transposed convolutions: float arithmetic"]
    if layer.type.startswith("BatchNorm"):
        return [] if INPUT in active and OUTPUT in active else ["no grid on both sides: float arithmetic"]
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
    if INPUT in draft.targets and not is_head(draft.module) and not is_operator(draft.module):
        others = [t for t, one in calls[0].inputs.items() if one.floating and t not in draft.targets]
        draft.notes.extend(f"{target} stays float (name it in target_names)" for target in others)


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
            groups and finds shared tensors. Without it the forward is traced symbolically; where that fails, nothing can be
            fused, no operator is seen and every input has its own quantizer.
        settings: settings of module types for this plan alone, over the registered ones: class name or dotted path -> target
            -> keys, as in `QuantizationSetting.register`; or a path.
        root: name of the submodule that the names in `config_list` are relative to; None for `model` itself.

    Raises:
        ConfigError: with every problem found.
    """
    scope = scope_of(model, root)
    graph, why = forward_graph(scope, example_input)
    config_list = read_config(config_list, presets=PRESETS)
    if settings is not None:
        settings = read_config(settings, presets=(), name="settings")
    return plan_from_graph(model, config_list, graph, settings=settings, root=root, no_graph_because=why)


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


def forward_graph(scope: nn.Module, example_input: Any) -> tuple[Graph | None, str]:
    """(the graph of a recorded forward, else of a symbolic trace, else None, why there is none)."""
    if example_input is not None:
        return record_forward(scope, example_input), ""
    traced = trace(scope)
    missing = "no example_input was given"
    return (None, f"{missing}, and {traced}") if isinstance(traced, str) else (traced, "")


def record_forward(model: nn.Module, example_input: Any, entry: nn.Module | None = None) -> Graph:
    """`record`, with a failed forward reported as a ConfigError."""
    try:
        return record(model, example_input, entry=entry)
    except Exception as error:
        called = type(model if entry is None else entry).__name__
        raise ConfigError(
            f"example_input: the recorded forward of {called} failed: {error}. Give what the model is "
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
    scope = scope_of(model, root)
    if is_prepared(model):
        raise ConfigError(f"{type(model).__name__} is already prepared; call restore_model(model) before planning again.")
    known = {**QuantizationSetting.registry, **(local or {})}
    operators = {} if graph is None else graph.operators
    seen = {name: one for name, one in operators.items() if one.site.op in known or is_registered(one.site.op)}
    unset = {name: one for name, one in operators.items() if name not in seen}
    modules = Modules(scope, root or "", None if graph is None else seen, unset)
    problems: Problems = []
    notes: list[str] = []
    drafts: dict[str, Draft] = {}
    for name in local or {}:
        if not any(is_called(type(module), name) for module in modules.by_name.values()):
            hint = guess(name, [type(module).__name__ for module in modules.by_name.values()])
            problems.append(f"settings: {name!r} matches no module; the model has {modules.types()}.{hint}")
    chosen = {rule.where: apply_rule(rule, modules, drafts, problems, notes, local) for rule in rules}
    collect_groups(rules, chosen, modules, graph, drafts, problems)
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
    if graph is not None and not graph.shapes:
        because = f" ({no_graph_because})" if no_graph_because else ""
        notes.append(f"no example input{because}: the forward was traced symbolically, so shapes are unknown")
    left: dict[str, str] = {}
    layers = _layers(rules, drafts, modules.by_name, graph, notes, problems, left)
    prefix = f"{root}." if root else ""
    selected = {name for names in chosen.values() for name in names}
    left = {} if graph is None else {**_left(layers, graph, known, selected), **left}
    members = {name for layer in layers for name in layer.fused_with}
    operators = {} if graph is None else graph.operators
    kept = {name for name, one in operators.items() if one.site.op in known or is_registered(one.site.op)}
    operators = {name: one for name, one in operators.items() if name in kept | members}
    return Plan(
        layers=tuple(_renamed(layer, prefix) for layer in layers),
        notes=(*notes, *([] if graph is None else _read_elsewhere(layers, graph))),
        left={prefix + name: reason for name, reason in left.items()},
        operators={prefix + name: _moved(one, prefix) for name, one in operators.items()},
    )


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
    left: dict[str, str],
) -> list[LayerPlan]:
    """The layers in the order of the model, checked against the recorded forward where there is one."""
    names = [name for name in modules if name in drafts]
    if graph is None:
        for name in names:
            targets = drafts[name].targets
            targets.update({t: fitted(plan, None)[0] for t, plan in targets.items() if is_activation(t)})
        raise_problems([*problems, *idle_keys(rules, drafts.values())])
        alone = [_layer(drafts[name], modules) for name in names]
        return [free_last_output(layer, alone, drafts[layer.name], None) for layer in alone]
    for name in sorted(names, key=lambda name: _rank(modules[name])):  # a batch norm belongs to the layer before it, if it can
        if name in drafts:
            _against_forward(drafts[name], drafts, modules, graph, notes, problems)
    raise_problems([*problems, *idle_keys(rules, drafts.values())])
    for name, reason in adrift(drafts, graph).items():
        left.update(dict.fromkeys((name, *drafts.pop(name).behind), reason))
    layers = [_layer(drafts[name], modules) for name in names if name in drafts]
    calls = {layer.name: graph.boundaries[layer.start] for layer in layers}
    order = {name: place for place, name in enumerate(sorted(calls, key=lambda name: calls[name][0].order))}
    layers = [
        replace(
            layer,
            calls=len(calls[layer.name]),
            order=order[layer.name],
            loose=any(between(drafts[layer.name].group, graph)),
        )
        for layer in layers
    ]
    if not layers:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConfigError(
            f"config_list: none of the selected modules ({some}) is called in the recorded forward; check example_input and root."
        )
    layers = [free_last_output(layer, layers, drafts[layer.name], graph) for layer in layers]
    if not any(layer.targets for layer in layers):
        raise ConfigError("config_list: the recorded forward left no target to quantize; name one in target_names.")
    return share([layer for layer in layers if layer.targets], graph)


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
    if calls and (readers := _other_readers(draft, graph)):
        said = f"{name}.{readers[0]} is also read by {readers[1]}, past {name}, which therefore"
        if draft.named or draft.group:
            problems.append(f"config_list: {said} cannot be quantized; leave it out.")
        else:
            notes.append(f"{said} stays float")
            del drafts[name]
        return
    if draft.auto and calls and not draft.group:
        modules = {**graph.operators, **modules}
        taken = {member for other in drafts.values() for member in other.group}
        taken |= {other.name for other in drafts.values() if other.named}
        parts = {part for other in drafts.values() for part in parts_of(other)}
        taken |= {other for other, module in modules.items() if module in parts}
        draft.group, why = auto_group(draft, modules, graph, taken, fold_norm="bias" not in draft.targets)
        draft.notes += [f"not fused further: {why.rstrip('.')}"] if why else []
        absorb(draft, drafts, quietly=True)
    elif draft.group and (problem := flow_problem(draft.group, modules, graph) or grid_problem(draft, draft.group, modules)):
        problems.append(f"{draft.fused_by}: fuse_names {draft.group!r}: {problem}")
        return
    problems.extend(absorb_between(draft, drafts, graph))
    if calls and (problem := cut_problem(draft, graph)) is not None:
        problems.append(f"{draft.fused_by}: fuse_names {draft.whole!r}: {problem}")
        return
    if not calls:
        del drafts[name]
        notes.append(f"{name} ({type(draft.module).__name__}) is not called in the recorded forward and stays float")
        return
    if "bias" in draft.targets and any(is_batch_norm(modules[member]) for member in draft.group):
        problems.append(
            f"{draft.targets['bias'].decided_by}: 'bias' of {name!r} has no grid of its own: batch norm folds into it, and a "
            "folded bias is int32 on the layer's grid by itself; leave it out of the targets."
        )
    if not draft.group and any(call.index in graph.side_effects for call in graph.calls(name)):
        if is_operator(draft.module) and not draft.named:  # a preset or a type swept it up
            del drafts[name]
            return
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
    _shaped(draft, graph.boundaries[draft.group[0]] if draft.group else calls, end, problems)


def _other_readers(draft: Draft, graph: Graph) -> tuple[str, str] | None:
    """(a parameter of a drafted module, an operator of another module that reads it): deployed, it is no float tensor."""
    for target in [*draft.targets, *(("weight", "bias") if is_head(draft.module) else ())]:
        for reader in graph.readers_of_parameters.get(f"{draft.name}.{target}", ()):
            owner = graph.operators[reader].site.owner if reader in graph.operators else ""
            if owner != draft.name and not owner.startswith(f"{draft.name}."):
                return target, reader
    return None


def _rank(module: nn.Module) -> int:
    return 0 if is_head(module) else 1 if is_batch_norm(module) else 2


UNCAUGHT = "where nothing can catch it (in a checkpoint, a compiled function, or a forward set on the instance)"


def _left(layers: Sequence[LayerPlan], graph: Graph, known: Mapping[str, Setting], selected: set[str]) -> dict[str, str]:
    """What computes in float, with the reason, in the order of the data; what only moves values does not compute."""
    taken = {name for layer in layers for name in (layer.name, *layer.fused_with)}
    inside = tuple(f"{layer.name}." for layer in layers)
    read_elsewhere = {parameter.rpartition(".")[0] for parameter in graph.readers_of_parameters} & selected
    left: dict[str, str] = {}
    for node in graph.nodes:
        if (
            node.kind == "input"
            or node.passing
            or not node.floating
            or node.name in taken
            or node.name.startswith(inside or ("\0",))
        ):
            continue
        if node.kind == "function" and node.name not in graph.operators:
            weight = ".parametrizations." in f".{node.name}"
            left[node.name] = "computes a weight" if weight else UNCAUGHT
            continue
        if node.kind == "function" and node.index in graph.side_effects:
            left[node.name] = f"{node.op} in place, and what it wrote over is used afterwards by its old name"
        elif node.kind == "module" and node.name in read_elsewhere:
            left[node.name] = "a parameter of it is read past it, too"
        elif node.kind == "module" or node.op in known:
            left[node.name] = "not selected"
        else:
            left[node.name] = f"no setting for {node.op}"
    return left


def _read_elsewhere(layers: Sequence[LayerPlan], graph: Graph) -> list[str]:
    """Notes on parameters that an operator reads past their module: there they are not rounded."""
    notes: list[str] = []
    for parameter, readers in graph.readers_of_parameters.items():
        name, _, own = parameter.rpartition(".")
        inside = any(name.startswith(f"{layer.name}.") for layer in layers)
        if own and not inside and not graph.boundaries.get(name):
            notes.append(f"{parameter} is read by {', '.join(readers)}, though {name} is never called; it stays float")
    return notes


def _moved(operator: Operator, prefix: str) -> Operator:
    """The operator with its owner's name in the whole model."""
    if prefix:
        owner, through = (f"{prefix}{operator.site.owner}".rstrip("."), operator.site.through and prefix + operator.site.through)
        operator.site = replace(operator.site, owner=owner, through=through)
    return operator


def _renamed(layer: LayerPlan, prefix: str) -> LayerPlan:
    if not prefix:
        return layer
    targets = {
        key: replace(target, source=None if target.source is None else prefix + target.source)
        for key, target in layer.targets.items()
    }
    names = {key: getattr(layer, key) for key in ("batch_norm", "activation", "norm_before")}
    others: dict[str, Any] = {key: None if name is None else prefix + name for key, name in names.items()}
    return replace(layer, name=prefix + layer.name, targets=targets, **others)
