# SPDX-License-Identifier: Apache-2.0
"""Owns the decisions of pruning: model, entries and recorded forward become a `PruningPlan`; all problems in one ConfigError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_quant.channels import Channels, in_channels, out_channels
from lightning_quant.config import ConfigError, Rule, contradictions, parse_pruning, raise_problems
from lightning_quant.graph import Graph
from lightning_quant.intercept import is_prepared
from lightning_quant.keys import OUTPUT, WEIGHT, Blocks, Problems, guess
from lightning_quant.layers import Plan
from lightning_quant.layouts import canonical_shape
from lightning_quant.mask_groups import Work, check_targets, follow, units_of
from lightning_quant.matching import expand
from lightning_quant.patterns import is_batch_norm, is_head
from lightning_quant.plan import scope_of
from lightning_quant.pruning import METRICS, Wanted, grid_of
from lightning_quant.pruning_keys import PRUNING
from lightning_quant.pruning_plan import MaskedTarget, MaskSpec, Pruning, PruningPlan
from lightning_quant.selection import Modules, select
from lightning_quant.settings import PruningSetting, Setting, checked_setting, is_called
from lightning_quant.sites import is_operator
from lightning_quant.spared import check_zeros, note_frozen, note_spared, of_teacher, spared
from lightning_quant.targets import is_activation, is_input, owner_of, parameters_named

_DECIDES = ("sparse_ratio", "sparse_threshold", "pattern", "align")
_OF_SCORES = ("max_sparse_ratio", "min_sparse_ratio", "global_group_id", "dependency_group_id", "internal_metric_block", "metric")
_MANY = 2**14  # blocks whose distances to each other fit in a GiB
_FINE_METRICS = ("level", "taylor", "movement", "random")


def make_pruning(
    model: nn.Module,
    pruning: Any,
    graph: Graph | None = None,
    settings: Mapping[str, Setting] | None = None,
    root: str | None = None,
    teacher: nn.Module | None = None,
    quantized: Plan | None = None,
) -> PruningPlan:
    """Decide which tensors of `model` are masked, how and when; changes nothing.

    Args:
        pruning: a list of entries (see CONFIG.md), one of them, or a dict with `config_list` and the options of `Pruning`.
        graph: the recorded forward of the model, or of `root`; without it no dependencies are found.
        settings: settings of module types (class name or dotted path -> target -> keys) for this plan only.
        root: the submodule that names are relative to.
        teacher: a module that is never masked, though it may be one of the model's.
        quantized: how the model will be quantized: what is masked must have a 0 there.

    With a graph, a layer that the recorded forward does not use (of a frozen net beside the one that trains, say) is masked only
    where `op_names` names it.

    Raises:
        ConfigError: with every problem found.
    """
    options = Pruning.make(pruning)
    rules = parse_pruning(options.config_list)
    if is_prepared(model):
        raise ConfigError(f"{type(model).__name__} is prepared for quantization; plan its pruning before, on the float model.")
    modules = Modules(scope_of(model, root), root or "")
    channels = Channels(graph if options.dependencies or _uses_slim(rules) else None, modules.by_name)
    work = Work(modules, channels, graph, options, f"{root}." if root else "")
    work.taught = of_teacher(modules, teacher)
    local = _local_settings(settings, modules, work.problems)
    for rule in rules:
        _apply(rule, work, local)
    if graph is None:
        work.notes.append("no recorded forward: layers whose channels meet are masked one by one; give example_input")
    elif not graph.shapes:
        work.notes.append("the forward was traced without shapes: layers whose channels meet are masked one by one")
    note_spared(work)
    raise_problems(work.problems)
    check_targets(work)
    raise_problems(work.problems)
    units = units_of(work)
    raise_problems(work.problems)
    if options.dependencies:
        follow(work)
    check_zeros(work, quantized)
    raise_problems(work.problems)
    note_frozen(work)
    if not any(target.scored for target in work.targets.values()):
        work.notes.insert(0, "nothing is masked: no entry gives sparse_ratio, sparse_threshold, min_sparse_ratio or pattern")
    order = {name: place for place, name in enumerate(modules.by_name)}
    targets = sorted(work.targets.values(), key=lambda target: order[target.module])
    prefixed = [_prefixed(target, work.prefix) for target in targets]
    units = [replace(u, members=tuple((work.prefix + name, at) for name, at in u.members)) for u in units]
    return PruningPlan(
        targets=tuple(prefixed),
        units=tuple(units),
        options=options,
        channels=channels,
        prefix=work.prefix,
        notes=tuple(work.notes),
    )


def _uses_slim(rules: Sequence[Rule]) -> bool:
    return any("slim" in (r.settings.get("metric"), *(t.get("metric") for t in r.target_settings.values())) for r in rules)


def _prefixed(target: MaskedTarget, prefix: str) -> MaskedTarget:
    align = target.spec.align
    spec = target.spec if align is None else replace(target.spec, align=(prefix + align[0], align[1]))
    return replace(target, module=prefix + target.module, spec=spec, scale=target.scale and prefix + target.scale)


def _local_settings(settings: Any, modules: Modules, problems: Problems) -> dict[str, Setting]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings: expected a dict from module type to setting, got {settings!r}.")
    for name in settings:
        if not any(is_called(type(module), str(name)) for module in modules.by_name.values()):
            problems.append(f"settings: {name!r} matches no module; the model has {modules.types()}.")
    return {str(name): checked_setting(one, PRUNING, f"settings[{name!r}]", problems) for name, one in settings.items()}


# -- which targets, and what is said of them --------------------------------------------------------------------------


def _apply(rule: Rule, work: Work, local: Mapping[str, Setting]) -> None:
    left: list[str] = []
    chosen = 0
    for name in select(rule, work.modules, work.problems, work.notes):
        module = work.modules.by_name[name]
        named = any(alias in rule.op_names for alias in work.modules.names_of(name))
        setting = PruningSetting.find(type(module), local)
        if setting is None and rule.target_settings:
            setting = {}
        if setting is None or is_operator(module):
            if named:
                work.problems.append(f"{rule.where}: {_unregistered(name, module)}")
            else:
                left.append(f"{name} ({type(module).__name__})")
            continue
        chosen += 1
        if spared(name, rule, work, named=named):
            continue
        before = len(work.problems)
        found = _targets(rule, setting, name, module, work.problems)
        if len(work.problems) > before:
            continue
        ends = "" if named or not found else _end(name, found, rule, setting, module, work)
        if ends:
            work.notes.append(f"{rule.where}: {ends}")
            continue
        for target in found:
            _decide(rule, setting, name, module, target, work)
    if left and not chosen:
        work.problems.append(f"{rule.where}: {_unregistered(*_first(left, work.modules))}")
    elif left:
        work.notes.append(f"{rule.where}: left as they are, without a setting: {', '.join(left)}")


def _first(left: Sequence[str], modules: Modules) -> tuple[str, nn.Module]:
    name = left[0].rpartition(" (")[0]
    return name, modules.by_name[name]


def _unregistered(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    owned = [own for own, _ in module.named_parameters()]
    example = ", ".join(f"{own!r}: {{}}" for own in owned[:2]) or "'_output_': {'align': ...}"
    return (
        f"{name!r} is a {kind}, which has no pruning setting.{guess(kind, PruningSetting.registry)} To register one: "
        f"PruningSetting.register({kind!r}, {{{example}}}), or give target_settings."
    )


def _targets(rule: Rule, setting: Setting, name: str, module: nn.Module, problems: Problems) -> list[str]:
    """The targets that a rule means, by their one name, in the order of the data."""
    found: list[str] = []
    for said, own in ((rule.target_names or (), True), (rule.target_settings, True), (setting, False)):
        if said is setting and rule.target_names is not None:
            continue
        for target in said:
            meant = expand(module, target)
            if own and not meant:
                problems.append(f"{rule.where}: {_no_target(name, module, target)}")
            if said is rule.target_settings and rule.target_names is not None and not set(meant) & set(found):
                problems.append(
                    f"{rule.where}: target_settings has {target!r}, but target_names leaves it out; add it or drop its settings."
                )
            if not own and not meant and (hidden := _computed(name, module, target)):
                problems.append(f"{rule.where}: {hidden}")
            found += [one for one in meant if one not in found]
    return found


def _no_target(name: str, module: nn.Module, target: str) -> str:
    if hidden := _computed(name, module, target):
        return hidden
    known = ["_input_", *parameters_named(module, "*"), OUTPUT]
    return (
        f"{name!r} ({type(module).__name__}) has no target {target!r}; it has {', '.join(known)}.{guess(target, known)}"
        if getattr(module, target, 0) is not None
        else f"{name!r} ({type(module).__name__}) has no target {target!r}: it is None there; it has {', '.join(known)}."
    )


def _computed(name: str, module: nn.Module, target: str) -> str:
    """What to say of a parameter that torch prunes or computes from others; nothing where it is not so."""
    if is_activation(target) or "*" in target or parameters_named(module, target):
        return ""
    owner, own = owner_of(module, target)
    if f"{own}_orig" in owner._parameters and f"{own}_mask" in owner._buffers:
        return (
            f"the {target} of {name!r} is being pruned by torch.nn.utils.prune, which has a mask of its own; make that permanent "
            f"first (prune.remove(module, {own!r})) or leave the layer out."
        )
    if isinstance(getattr(owner, own, None), Tensor) and own not in owner._buffers:
        return (
            f"the {target} of {name!r} is no Parameter of its own (parametrized or weight-normed), so a mask could not stay in "
            f"it; make it permanent first (torch.nn.utils.parametrize.remove_parametrizations(module, {own!r})) or leave the "
            "layer out."
        )
    return ""


def _end(name: str, targets: Sequence[str], rule: Rule, setting: Setting, module: nn.Module, work: Work) -> str:
    """Why a layer that a pattern swept up is left out: its output channels are the model's."""
    if name not in work.channels.ends or not (is_head(module) or is_batch_norm(module)):
        return ""
    for target in targets:
        if is_input(target) and not is_batch_norm(module):
            continue
        spec = _merged(rule, setting, module, target)
        fine = spec.get("metric") == "level" and "granularity" not in spec
        other = spec.get("granularity", "default") not in ("default", "out_channel")
        if spec.get("pattern") is None and not fine and not other and "align" not in spec:
            return f"{name} makes what the model returns and keeps all its channels; name it in op_names to mask them"
    return ""


def _merged(rule: Rule, setting: Setting, module: nn.Module, target: str) -> dict[str, Any]:
    """setting <- entry <- target_settings, key by key; of ratio, threshold, pattern and align the last one said."""
    base = next((dict(keys) for own, keys in setting.items() if target in expand(module, own)), {})
    own = next((dict(keys) for said, keys in rule.target_settings.items() if target in expand(module, said)), {})
    base = {key: value for key, value in base.items() if value is not None}
    shorthand = dict(rule.settings)
    if "align" in base:  # follows what is masked, unless its own settings say otherwise
        shorthand = {key: value for key, value in shorthand.items() if key == "apply_method"}
    merged: dict[str, Any] = {}
    for keys in (base, shorthand, own):
        if said := [key for key in _DECIDES if key in keys]:
            gone = [*_DECIDES, *(_OF_SCORES if "align" in said else ())]
            gone += ["granularity", *_OF_SCORES[:5]] if "pattern" in said else []
            merged = {key: value for key, value in merged.items() if key not in gone}
        merged.update(keys)
    return merged


def _decide(rule: Rule, setting: Setting, name: str, module: nn.Module, target: str, work: Work) -> None:
    merged, where = _merged(rule, setting, module, target), f"{rule.where}: {name}.{target}"
    if merged.get("apply_method") == "bypass":
        work.targets.pop(f"{name}.{target}", None)
        work.notes.append(f"{rule.where}: {name}.{target} is left as it is (bypass)")
        return
    found = [text for text in contradictions(merged, where) if "min_sparse_ratio" in text or "exclude each other" in text]
    work.problems.extend(found)
    align = merged.get("align")
    spec = MaskSpec(
        wanted=Wanted(
            ratio=merged.get("sparse_ratio"),
            threshold=merged.get("sparse_threshold"),
            least=merged.get("min_sparse_ratio"),
            most=merged.get("max_sparse_ratio"),
            parts=merged.get("internal_metric_block", 1),
        ),
        metric=merged.get("metric", "level" if "pattern" in merged else "l1"),
        pattern=None if "pattern" not in merged else _numbers(merged["pattern"]),
        granularity=_read(merged.get("granularity", "default")),
        global_id=merged.get("global_group_id"),
        dependency_id=merged.get("dependency_group_id"),
        align=None if align is None else _source(align, name, rule, work),
        apply_method=merged.get("apply_method", "mul"),
    )
    before = work.targets.get(f"{name}.{target}")
    notes = () if before is None else (f"overrules {before.decided_by}",)
    made = _made(name, target, module, spec, work, where)
    if made is not None:
        work.targets[made.name] = replace(made, decided_by=rule.where, notes=notes)


def _numbers(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def _read(granularity: Any) -> str | Blocks:
    """A registered setting holds it as it was written, an entry as it was checked."""
    read: str | Blocks = PRUNING["granularity"].check(granularity, "", []) if not isinstance(granularity, Blocks) else granularity
    return read


def _source(align: Mapping[str, Any], name: str, rule: Rule, work: Work) -> tuple[str, tuple[int, ...]]:
    """The target that another follows, by its one name."""
    other, dims = align.get("module_name"), tuple(align["dims"])
    module_name = name if other is None else work.modules.aliases.get(other, other)
    module = work.modules.by_name.get(module_name)
    if module is None:
        near = guess(other, work.modules.by_name)
        work.problems.append(f"{rule.where}: align of {name!r}: {other!r} is no module of the model.{near}")
        return "", dims
    meant = expand(module, align["target_name"])
    if len(meant) != 1:
        work.problems.append(f"{rule.where}: align of {name!r}: {_no_target(module_name, module, align['target_name'])}")
        return "", dims
    return f"{module_name}.{meant[0]}", dims


# -- blocks -----------------------------------------------------------------------------------------------------------


def _made(name: str, target: str, module: nn.Module, spec: MaskSpec, work: Work, where: str) -> MaskedTarget | None:
    """The target with its blocks; None with a problem."""
    made = MaskedTarget(module=name, target=target, type=type(module).__name__, spec=spec, values=None)
    weighted = (is_head(module) and WEIGHT in module._parameters) or (
        is_batch_norm(module) and module._parameters[WEIGHT] is not None
    )
    if is_activation(target):
        if spec.pattern is not None:
            work.problems.append(f"{where}: a pattern is for parameters; give it to a weight.")
            return None
        if not weighted or spec.apply_method == "add" or target not in ("_input_", OUTPUT):
            return _passing(made, work, where)
        values = WEIGHT
    else:
        if spec.apply_method == "add":
            work.problems.append(f"{where}: apply_method 'add' is for inputs and outputs; a masked parameter is 0, write 'mul'.")
            return None
        values = target
    if any(map(is_lazy, module.parameters())):
        work.problems.append(f"{where}: {name!r} is lazy and has no shape yet; call the model once before planning.")
        return None
    owner, own = owner_of(module, values)
    parameter = owner._parameters[own]
    assert parameter is not None
    shape = canonical_shape(module, values, parameter.shape)
    if is_activation(target):
        channels = (out_channels if target == OUTPUT else in_channels)(module) if is_head(module) else shape[0]
        first = target == OUTPUT or is_batch_norm(module)
        kernel = (1, *(-1,) * (len(shape) - 1)) if first else (-1, 1, *(-1,) * (len(shape) - 2))
        if is_input(target) and is_head(module) and getattr(module, "groups", 1) > 1:
            if spec.align is None and spec.asks:
                work.problems.append(
                    f"{where}: the inputs of a grouped convolution have no scores; align them to another target."
                )
                return None
            kernel = ()
        return replace(made, values=values, shape=shape, kernel=kernel, grid=(channels,))
    found = _checked_kernel(spec, shape)
    if isinstance(found, str):
        work.problems.append(f"{where}: {found}")
        return None
    grid = tuple(count for count, k in zip(grid_of(shape, found), found, strict=True) if k != -1)
    return replace(made, values=values, shape=shape, kernel=found, grid=grid)


def _checked_kernel(spec: MaskSpec, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    """The block sizes of a parameter, or what is wrong with them."""
    found = _kernel(spec, shape)
    if isinstance(found, str) or spec.metric != "fpgm" or not spec.asks:
        return found
    count = math.prod(grid_of(shape, found))
    return (
        found
        if count <= _MANY
        else (
            f"metric 'fpgm' compares every block with every other, and it has {count}; at most {_MANY}: take larger blocks "
            "or another metric."
        )
    )


def _kernel(spec: MaskSpec, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    """The block sizes of a parameter, or what is wrong with them."""
    dims, said = len(shape), spec.granularity
    if not dims:
        return "a single number has no blocks; leave it out."
    if spec.pattern is not None:
        n, m = spec.pattern
        if spec.metric not in _FINE_METRICS:
            return f"a pattern ranks single values; metric {spec.metric!r} does not, take one of {', '.join(_FINE_METRICS)}."
        if dims < 2 or shape[1] % m:
            return f"pattern {n}:{m} needs a number of input channels that {m} divides; its shape is {list(shape)}."
        return (1,) * dims
    if isinstance(said, Blocks):
        kernel = said.kernel(dims)
        if len(kernel) != dims or any(k != -1 and size % k for k, size in zip(kernel, shape, strict=False)):
            return f"granularity {said} does not divide its shape {list(shape)}."
        return kernel
    return _named_kernel(spec, shape)


def _named_kernel(spec: MaskSpec, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    dims, said = len(shape), spec.granularity
    if said in ("per_tensor", "per_channel"):
        what = "one block, which always stays" if said == "per_tensor" else "for inputs and outputs"
        return f"granularity {said!r} is {what}; write out_channel, in_channel or block sizes."
    if said == "in_channel":
        return (
            (-1, 1, *(-1,) * (dims - 2))
            if dims > 1
            else f"granularity 'in_channel' needs two dimensions; its shape is {list(shape)}."
        )
    if said == "default" and METRICS[spec.metric].fine and spec.align is None:
        return (1,) * dims
    return (1, *(-1,) * (dims - 1))


def _passing(made: MaskedTarget, work: Work, where: str) -> MaskedTarget | None:
    """An input or output that is masked where it passes: by another target's mask."""
    if made.spec.align is None:
        if made.spec.asks:
            work.problems.append(
                f"{where}: what passes a {made.type} has no values to score before it is there; align it to a parameter "
                "(align: {module_name, target_name, dims})."
            )
        return None
    return made
