# SPDX-License-Identifier: Apache-2.0
"""Owns precedence: which targets of a selected module a rule means, and what is decided for each.

The order of precedence is stated and held in `resolve`, and nowhere else.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_quant.config import ConfigError, Rule, TensorSpec, method_problem, observer_problem
from lightning_quant.keys import INPUT, OUTPUT, WEIGHT, WEIGHT_OBSERVERS, Blocks, Problems, closest, guess, plain_observer
from lightning_quant.patterns import TRANSPOSED, is_batch_norm, is_head
from lightning_quant.selection import Modules, select
from lightning_quant.settings import (
    ACTIVATION_DEFAULTS,
    OPERATORS,
    PARAMETER_DEFAULTS,
    VARIADIC_OPERATORS,
    QuantizationSetting,
    Setting,
    dotted,
)
from lightning_quant.sites import Operator, is_operator
from lightning_quant.targets import Arguments, canonical_output, is_activation, is_input, parameters_named


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """One quantized target. `source`: the quantizer it shares ('conv1._output_'), or None if it has its own.

    `lenient`: its granularity was said for all targets of an entry, so it falls to a default where it does not fit; `fell`:
    why it did.
    """

    target: str
    spec: TensorSpec
    decided_by: str
    source: str | None = None
    notes: tuple[str, ...] = ()
    lenient: bool = False
    fell: str = ""

    @property
    def active(self) -> bool:
        """Whether it is rounded at all."""
        return self.spec.apply_method != "bypass"


@dataclass
class Draft:
    """A selected module while its plan is being made.

    `named`: op_names said so; `explicit`: targets that were named; `group`: what is fused, in the order of the data, `auto`:
    whether that is to be found, and `fused_by`, the entry that says so; `whole`: the group that a config names where it is cut in
    two kernels before this module; `float_output`: what an entry says of its output; `swept`: only presets selected it.
    """

    name: str
    module: nn.Module
    targets: dict[str, TargetPlan] = field(default_factory=dict)
    explicit: set[str] = field(default_factory=set)
    group: tuple[str, ...] = ()
    auto: bool = False
    fused_by: str = ""
    whole: tuple[str, ...] = ()
    named: bool = False
    swept: bool = True
    float_output: bool | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def behind(self) -> tuple[str, ...]:
        """The members of its group behind it."""
        return self.group[self.group.index(self.name) + 1 :] if self.group else ()

    def ordered(self) -> dict[str, TargetPlan]:
        """The targets in the order of the data: arguments, parameters, outputs."""
        rank = [*sorted(t for t in self.targets if is_input(t)), *parameters_named(self.module, "*")]
        return {t: self.targets[t] for t in sorted(self.targets, key=lambda t: rank.index(t) if t in rank else len(rank))}


# -- targets ----------------------------------------------------------------------------------------------------------


def apply_rule(
    rule: Rule,
    modules: Modules,
    drafts: dict[str, Draft],
    problems: Problems,
    notes: list[str],
    settings: Mapping[str, Setting] | None = None,
) -> list[str]:
    """Decide, for every module that a rule selects, the targets that it names; returns the names of those modules."""
    soft = rule.preset or not (rule.op_names or rule.op_types)  # what a pattern sweeps up need not all be quantizable
    before = len(problems)
    left: dict[str, str] = {}  # what there is to say -> why
    chosen: list[str] = []
    unknown: dict[type, list[str]] = {}
    for name in select(rule, modules, problems, notes):
        module = modules.by_name[name]
        named = any(alias in rule.op_names for alias in modules.names_of(name))
        setting = QuantizationSetting.find(type(module), settings)
        if setting is None and rule.target_settings:
            setting = {}  # a temporary full setting
        if setting is None or "forward" in vars(module):
            if soft and not named:
                left[f"{name} ({type(module).__name__})"] = _unfit(name, module, settings)
            elif setting is None:
                unknown.setdefault(type(module), []).append(name)
            else:
                problems.append(f"{rule.where}: {_unfit(name, module, settings)}")
            continue
        own: Problems = []
        lacking: list[str] = []
        targets = _targets(rule, setting, name, module, own, lacking)
        if own and soft and not named:
            reason = own[0].removeprefix(f"{rule.where}: ")
            left[reason.rstrip(".")] = reason
            continue
        problems.extend(own)
        chosen.append(name)
        draft = drafts.setdefault(name, Draft(name, module))
        draft.named |= named
        draft.swept &= rule.preset
        if rule.float_output is not None or targets.get(OUTPUT):  # a later entry that names the output wants it rounded
            draft.float_output = rule.float_output
        draft.notes.extend(note for note in _other_names(name, modules) if note not in draft.notes)
        draft.notes += [f"its setting also names {', '.join(lacking)}, which it lacks"] if lacking else []
        for target, explicit in targets.items():
            _decide(rule, setting, target, draft, explicit, problems)
    for first, *others in unknown.values():
        more = f" The same holds for {len(others)} more." if others else ""
        problems.append(f"{rule.where}: {_unfit(first, modules.by_name[first], settings)}{more}")
    if left and not chosen and len(problems) == before:
        more = f" And {len(left) - 2} more." if len(left) > 2 else ""
        problems.append(f"{rule.where}: nothing that it selects can be quantized: {' '.join([*left.values()][:2])}{more}")
    elif left:
        notes.append(f"{rule.where}: left as they are, without a setting: {', '.join(left)}")
    return chosen


def _other_names(name: str, modules: Modules) -> list[str]:
    module = modules.by_name[name]
    if isinstance(module, Operator):
        return [f"a call of {module.site.through}"] if module.site.through else []
    return [f"also called {alias}" for alias in modules.names_of(name)[1:]]


def draft_of(rule: Rule, name: str, operator: nn.Module, problems: Problems) -> Draft:
    """The draft of an operator that a rule means without selecting it: it is a member of a group that the rule names."""
    draft = Draft(name, operator, swept=rule.preset)
    setting = QuantizationSetting.find(type(operator)) or {}
    for target in _targets(replace(rule, target_names=None, target_settings={}), setting, name, operator, problems, []):
        _decide(rule, setting, target, draft, False, problems)
    return draft


def _unfit(name: str, module: nn.Module, settings: Mapping[str, Setting] | None) -> str:
    """Why a selected module cannot be quantized, and how it could."""
    if "forward" in vars(module):
        return f"{name!r} has a forward of its own on the instance; what it computes is unknown. Leave it out."
    kind, known = type(module), [*QuantizationSetting.registry, *(settings or {})]
    base = next((c.__name__ for c in kind.__mro__ if c.__name__ in known), None)
    own = "" if base is None else f" (a {base} with its own forward)"
    near = closest(kind.__name__, [name for name in known if name not in OPERATORS])
    hint = f" Closest registered: {', '.join(near)}." if near else f" Registered are {', '.join(known[:6])} and others."
    hint = hint if base is None else ""
    parameters = "".join(f", {p!r}: {{}}" for p, tensor in module.named_parameters() if not is_lazy(tensor) and tensor.dim() > 1)
    return (
        f"{name!r} is a {kind.__name__}{own}, which has no quantization setting.{hint} To register one: "
        f"QuantizationSetting.register({dotted(kind)!r}, {{'_input_': {{}}{parameters}, '_output_': {{}}}})"
    )


def _targets(
    rule: Rule, setting: Setting, name: str, module: nn.Module, problems: Problems, lacking: list[str]
) -> dict[str, bool]:
    """The targets that a rule means, by their one name, and whether it named them itself.

    `lacking`: collects what the type's setting names and this module has not.
    """
    if problem := _unsteady(module):
        problems.append(f"{rule.where}: {name!r} ({type(module).__name__}) {problem}")
        return {}
    found: dict[str, bool] = {}
    settings = rule.target_settings
    if rule.preset:  # what a preset says of weights is for weighted layers
        settings = {} if is_batch_norm(module) else {key: one for key, one in settings.items() if expand(module, key)}
    for said in (rule.target_names or (), settings):
        spelled: dict[str, str] = {}
        for target in said:
            meant = expand(module, target)
            for one in meant:
                if spelled.setdefault(one, target) != target and "*" not in target + spelled[one]:
                    problems.append(f"{rule.where}: {spelled[one]!r} and {target!r} are one target of {name!r}; name it once.")
            if not meant:
                problems.append(f"{rule.where}: {_parametrized(name, module, target) or _no_target(name, module, target)}")
            elif said is rule.target_names or rule.target_names is None:
                found.update(dict.fromkeys(meant, True))
            elif not found.keys() & set(meant):
                problems.append(
                    f"{rule.where}: target_settings has {target!r}, but target_names leaves it out; add it or drop its settings."
                )
    computed = ["weight", "bias"] if is_head(module) else []  # a folded layer reads both, whether they are targets or not
    if rule.target_names is None:
        computed += _of_setting(setting, name, module, found, lacking)
        if lacking and not found:
            problems.append(f"{rule.where}: the setting of {type(module).__name__}: {_no_target(name, module, lacking[0])}")
    problems.extend(f"{rule.where}: {text}" for target in computed if (text := _parametrized(name, module, target)))
    return found


def _of_setting(setting: Setting, name: str, module: nn.Module, found: dict[str, bool], lacking: list[str]) -> list[str]:
    """Add the targets of a type's setting to `found`; returns those that mean nothing here."""
    nothing: list[str] = []
    for target in setting:
        meant = _meant(module, target)
        found.update({one: False for one in meant if one not in found})
        nothing += [] if meant else [target]
        left_out = is_operator(module) or _parametrized(name, module, target)  # an operator's constant, say
        if not meant and not left_out and getattr(module, target, 0) is not None:
            lacking.append(target)
    return nothing


def _meant(module: nn.Module, target: str) -> list[str]:
    """The targets that a type's setting means; the input of an operator that takes a list is everything in it."""
    if isinstance(module, Operator) and target == INPUT and module.site.op in VARIADIC_OPERATORS:
        return [f"{INPUT}{position or ''}" for position in range(module.count)]
    return expand(module, target)


def _unsteady(module: nn.Module) -> str | None:
    """Why the parameters of a module cannot be rounded for the length of a call; None if they can."""
    if any(map(is_lazy, module.parameters())):
        return "is lazy and its parameters have no shape yet; call the model once before planning."
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which rewrites its weight in every forward; leave it out, or renormalise in the training step."
    return None


def expand(module: nn.Module, target: str) -> list[str]:
    """The targets of `module` that a target's name means, by their one name; none if it has no such target."""
    if is_input(target):
        argument = Arguments(type(module)).find(target)
        beyond = isinstance(module, Operator) and argument is not None and (argument.position or 0) >= module.count
        return [] if argument is None or beyond else [argument.target]
    if target.startswith(OUTPUT):
        one = canonical_output(target)
        return [] if one != OUTPUT and is_head(module) else [one]
    return parameters_named(module, target)


def _no_target(name: str, module: nn.Module, target: str) -> str:
    lead = f"{name!r} ({type(module).__name__}) has no target {target!r}"
    if is_input(target):
        return f"{lead}; the arguments of its forward are {Arguments(type(module))}."
    owned = parameters_named(module, "*")
    known = [INPUT, *owned, OUTPUT]
    if target.replace(".", "").isidentifier() and getattr(module, target, 0) is None:
        return f"{lead}: it is None there; it has {', '.join(known)}."
    return f"{lead}; it has {', '.join(known)}.{guess(target, known)}"


def _parametrized(name: str, module: nn.Module, target: str) -> str | None:
    """What is wrong with a parameter that is there, but computed from others; None where it is not so."""
    if is_activation(target) or parameters_named(module, target) or not isinstance(getattr(module, target, None), Tensor):
        return None
    if target in dict(module.named_buffers()):
        return f"the {target} of {name!r} is a buffer; targets are parameters, arguments and outputs."
    return (
        f"the {target} of {name!r} is no Parameter of its own (parametrized, weight-normed or pruned); make it permanent first "
        "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove) or leave the layer out."
    )


# -- precedence -------------------------------------------------------------------------------------------------------


def _decide(rule: Rule, setting: Setting, target: str, draft: Draft, explicit: bool, problems: Problems) -> None:
    try:
        spec, notes = resolve(rule, setting, target, draft.module)
    except ConfigError as error:
        problems.append(f"{error}")
        return
    fell = notes[0] if notes else ""
    before = draft.targets.get(target)
    if before is not None:
        notes = (*notes, f"overrules {before.decided_by}")
    said = {"bypass": "bypass: stays float", "clamp_round": "clamp_round"}.get(spec.apply_method, "")
    found = [spec.observer] if spec.observer not in ("default", "moving_average") else []
    trained = [spec.method] if spec.method != "qat" else []
    notes = tuple(note for note in (*notes, said, *found, *trained) if note)
    own = matching_keys(rule.target_settings, target, draft.module)
    lenient = "granularity" in rule.settings and "granularity" not in own
    draft.targets[target] = TargetPlan(target=target, spec=spec, decided_by=rule.where, notes=notes, lenient=lenient, fell=fell)
    if explicit:
        draft.explicit.add(target)


def matching_keys(settings: Mapping[str, Mapping[str, Any]], target: str, module: nn.Module) -> dict[str, Any]:
    """The keys that apply to `target`, merged: what stands for several targets first, what names it alone last.

    `_input_` also stands for every argument without keys of its own, `_output_` for every output, `weight_*` for parameters.
    """
    general = INPUT if is_input(target) else OUTPUT if target.startswith(OUTPUT) else None
    merged: dict[str, Any] = {}

    def merge(names: Iterable[str]) -> None:
        for name in names:
            merged.update({key: value for key, value in settings[name].items() if value is not None})

    if general is None:
        merge(name for name in settings if "*" in name and fnmatch.fnmatchcase(target, name))
        merge(name for name in settings if name == target)
    else:
        merge(name for name in settings if name in (general, f"{general}0"))
        merge(name for name in settings if name not in (general, f"{general}0") and target in expand(module, name))
    return merged


def resolve(rule: Rule, setting: Setting, target: str, module: nn.Module) -> tuple[TensorSpec, tuple[str, ...]]:
    """What one entry decides for one target, with notes.

    Precedence within the entry, key by key: the defaults (parameters int8 symmetric, activations uint8 affine) <- the
    type's setting <- the entry's shorthand keys <- its `target_settings`. A key that is None counts as not given. Between
    entries the later one wins, per module and target, whole: it starts from the setting again.

    A shorthand granularity is meant for the targets that can have it; the others keep theirs and a note says so. The same
    granularity in `target_settings` or in a setting, where it names the target, is an error.

    Raises:
        ConfigError: for a granularity or observer that the target cannot have.
    """
    activation = is_activation(target)
    own = matching_keys(rule.target_settings, target, module)
    template = {**(ACTIVATION_DEFAULTS if activation else PARAMETER_DEFAULTS), **matching_keys(setting, target, module)}
    keys = {**template, **rule.settings, **own}
    place, notes = f"{rule.where}['target_settings'][{target!r}]", list[str]()
    method = keys.get("method", "qat")
    if method in ("dorefa", "bnn") and not activation and keys["granularity"] == "default":
        keys["granularity"] = "per_tensor"
    if method == "bnn" and "quant_dtype" not in {*rule.settings, *own}:  # registered settings have the 8 bits of all the others
        keys.update(quant_dtype="int1", quant_scheme="symmetric")
    granularity, problem = _granularity(keys["granularity"], target, module)
    if problem is not None and "granularity" in own:
        raise ConfigError(f"{place}['granularity']: {problem}")
    if problem is not None and "granularity" in rule.settings:
        notes.append(problem.partition(";")[0])
        granularity, problem = _granularity(template["granularity"], target, module)
    if problem is not None:
        raise ConfigError(f"QuantizationSetting of {type(module).__name__}[{target!r}]['granularity']: {problem}")
    observer = plain_observer((keys if activation else {**template, **own}).get("observer", "default"))
    problem = observer_problem(observer, keys["quant_scheme"], granularity, activation)
    if problem is not None:
        said = place if "observer" in own else rule.where if activation and "observer" in rule.settings else None
        raise ConfigError(f"{said or f'QuantizationSetting of {type(module).__name__}[{target!r}]'}['observer']: {problem}")
    spec = TensorSpec.make(
        keys["quant_dtype"],
        keys["quant_scheme"],
        granularity,
        weight=not activation,
        apply_method=keys.get("apply_method", "qat_clamp_round"),
        observer=observer,
        method=method,
    )
    if (problem := method_problem(spec, activation)) is not None:
        raise ConfigError(f"{rule.where}: method {method!r} of {target!r} of {type(module).__name__}: {problem}")
    return spec, tuple(notes)


def _granularity(value: Any, target: str, module: nn.Module) -> tuple[str | Blocks, str | None]:
    """(the granularity in its plainest form, why the target cannot have it or None)."""
    blocks = _blocks(value)
    if is_activation(target):
        if value in ("out_channel", "in_channel"):
            return "per_tensor", f"{value} is for weights; activations take default, per_tensor, per_channel or block sizes."
        return "per_tensor" if value == "default" else blocks, None
    shape: Sequence[int] = module.get_parameter(target).shape
    if value == "per_channel":
        return "per_tensor", "per_channel is for activations; parameters take default, per_tensor, out_channel or in_channel."
    if value == "default" and isinstance(module, TRANSPOSED) and target == WEIGHT:
        # (in, out / groups, ..): an output channel is a column of one group.
        one_group = Blocks(sizes=(shape[0] // module.groups, 1), side="back", pad=-1)
        value = blocks = "in_channel" if module.groups == 1 else one_group
    elif value == "default":
        return ("out_channel" if len(shape) > 1 else "per_tensor"), None
    kernel = TensorSpec.make("int8", "symmetric", blocks, weight=True).kernel(len(shape))
    return _plainest(blocks, kernel, shape)


def _blocks(value: Any) -> str | Blocks:
    if not isinstance(value, list | tuple):
        granularity: str | Blocks = value
        return granularity
    if isinstance(value[0], list | tuple):  # a registered setting keeps what the user wrote
        return Blocks(sizes=tuple(value[0]), side=value[1], pad=value[2] if len(value) == 3 else 1)
    return Blocks(sizes=tuple(value))


def _plainest(value: str | Blocks, kernel: Sequence[int], shape: Sequence[int]) -> tuple[str | Blocks, str | None]:
    """`out_channel` and `per_tensor` for block sizes that mean them; with the reason where they do not fit `shape`."""
    if len(kernel) > len(shape):
        return value, f"{value} has more dimensions than the parameter of shape {tuple(shape)}; give at most {len(shape)}."
    if any(block > 0 and size % block for block, size in zip(kernel, shape, strict=True)):
        return value, f"the blocks {list(kernel)} do not divide the shape {tuple(shape)}; give divisors, or -1."
    whole = [block in (-1, size) for block, size in zip(kernel, shape, strict=True)]
    if all(whole):
        return ("out_channel" if value == "out_channel" else "per_tensor"), None
    return ("out_channel", None) if kernel[0] == 1 and all(whole[1:]) else (value, None)


def idle_keys(rules: Iterable[Rule], drafts: Iterable[Draft]) -> Problems:
    """The keys that nothing of what their entries decide can have."""
    problems: Problems = []
    drafts = list(drafts)
    plans = [plan for draft in drafts for plan in draft.targets.values()]
    for rule in rules:
        mine = [plan for plan in plans if plan.decided_by == rule.where]
        if mine and "granularity" in rule.settings and all(plan.fell for plan in mine):
            why = mine[0].fell.removeprefix("one scale: ")
            problems.append(f"{rule.where}['granularity']: {rule.settings['granularity']} fits no target of this entry: {why}.")
        if mine and rule.settings.get("observer", "default") != "default" and not any(is_activation(p.target) for p in mine):
            problems.append(
                f"{rule.where}['observer']: observers are for activations, and this entry quantizes parameters only; what they "
                f"can have ({', '.join(WEIGHT_OBSERVERS)}) stands in target_settings."
            )
        heads = [d for d in drafts if is_head(d.module) and any(p.decided_by == rule.where for p in d.targets.values())]
        if mine and rule.float_output is True and not heads:
            problems.append(
                f"{rule.where}['high_precision_output']: is for convolutions and linear layers, and this entry decides for none; "
                "to leave an output float, leave '_output_' out of target_names."
            )
    return problems


def fitted(plan: TargetPlan, shape: Sequence[int] | None) -> tuple[TargetPlan, str | None]:
    """An activation's target held against its recorded shape (None: unknown), and why it cannot be so, or None."""
    if plan.spec.granularity == "per_tensor" or (shape is None and not plan.lenient):
        return plan, None
    problem = "its shape is unknown without example_input" if shape is None else _shape_problem(plan.spec, shape)
    one_scale = replace(plan, spec=replace(plan.spec, granularity="per_tensor"))
    if problem is not None and plan.lenient:
        fell = f"one scale: {problem.partition(';')[0]}"
        return replace(one_scale, notes=(*plan.notes, fell), fell=fell), None
    if problem is None and shape is not None:
        kernel = plan.spec.kernel(len(shape))
        if all(block in (-1, size) for block, size in zip(kernel, shape, strict=True)):
            return one_scale, None
    return plan, problem


def _shape_problem(spec: TensorSpec, shape: Sequence[int]) -> str | None:
    kernel = spec.kernel(len(shape))
    if len(kernel) > len(shape):
        return f"granularity {spec.granularity} has more dimensions than the activation of shape {tuple(shape)}"
    if kernel and kernel[0] != -1:
        return (
            f"granularity {spec.granularity} divides dimension 0 of the activation of shape {tuple(shape)}, the batch; its "
            "length changes, so write 'per_channel' or [[-1, 1], 'back', -1] for a scale for each index of dimension 1"
        )
    if any(block > 0 and size % block for block, size in zip(kernel, shape, strict=True)):
        return f"the blocks {list(kernel)} do not divide the activation of shape {tuple(shape)}"
    return None
