# SPDX-License-Identifier: Apache-2.0
"""Owns selection: which modules and operators of a model a rule names, by name, pattern and type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_quant.config import Rule
from lightning_quant.keys import Problems, closest, guess
from lightning_quant.settings import OPERATORS, QuantizationSetting, is_called
from lightning_quant.sites import Operator
from lightning_quant.targets import uncompiled_name


class Modules:
    """The modules of a model by name, each once, and the operators that its forwards call, each behind its owner's modules.

    `aliases`: the further names of modules that have several. `recorded`: whether operators could be seen. `unset`: the
    operators that have no setting, by name. `sites`: the names of the calls of a shared activation, by its own name; whoever
    selects it means them.
    """

    def __init__(
        self,
        scope: nn.Module,
        root: str = "",
        operators: Mapping[str, Operator] | None = None,
        unset: Mapping[str, Operator] | None = None,
    ) -> None:
        self.root, self.recorded, self.unset = root, operators is not None, unset or {}
        self.by_name: dict[str, nn.Module] = {
            name: module for name, module in scope.named_modules() if not (name and isinstance(module, OptimizedModule))
        }
        first = {id(module): name for name, module in self.by_name.items()}
        every = [(name, first.get(id(module), name)) for name, module in scope.named_modules(remove_duplicate=False)]
        self.aliases = {name: own for name, own in every if own != name}
        self.aliases |= {short: own for name, own in every if (short := uncompiled_name(name)) != name}
        self.sites: dict[str, list[str]] = {}
        order = list(self.by_name)
        for name, operator in (operators or {}).items():
            owner = operator.site.owner
            inside = [i for i, other in enumerate(order) if not owner or other == owner or other.startswith(f"{owner}.")]
            order.insert(inside[-1] + 1, name)
            if operator.site.through:
                self.sites.setdefault(operator.site.through, []).append(name)
        self.by_name = {name: self.by_name[name] if name in self.by_name else (operators or {})[name] for name in order}

    def names_of(self, name: str) -> list[str]:
        """Every name of the module called `name`; of a call of a shared activation, the activation's, too."""
        module = self.by_name.get(name)
        own = module.site.through if isinstance(module, Operator) and module.site.through else name
        return [*dict.fromkeys([name, own]), *(alias for alias, first in self.aliases.items() if first == own)]

    def type_of(self, name: str) -> type[nn.Module]:
        """The class that op_types finds: a module's; of a call of a shared activation, the activation's."""
        module = self.by_name[name]
        through = module.site.through if isinstance(module, Operator) else ""
        return type(self.by_name[through or name])

    def about(self, name: str) -> str:
        """What there is to say of a name that nothing has, if it may be an operator's."""
        if name in self.unset:
            return f" It is an operator without a setting. {_register(self.unset[name].site.op)}"
        if (calls := self.sites.get(re.sub(r"_\d+$", "", name))) is not None:
            return f" Its calls are {', '.join(calls)}."
        op = re.sub(r"_\d+$", "", name.rpartition(".")[2])
        unseen = not self.recorded and op in QuantizationSetting.registry
        return " Operators that a forward calls as functions show only with example_input." if unseen else ""

    def types(self) -> str:
        """What the model has, for error texts."""
        counts = Counter(type(module).__name__ for name, module in self.by_name.items() if name)
        return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "no modules"


def select(rule: Rule, modules: Modules, problems: Problems, notes: list[str]) -> list[str]:
    """The names that a rule selects, in the order of the model: ((names or regexes) and types) minus excludes.

    A module that is registered under several names is selected by any of them, once, under its first.
    """
    before = len(problems)
    included = _by_name(rule, "", modules, problems)
    excluded = _by_name(rule, "exclude_", modules, problems)
    types = _by_type(rule, "op_types", modules, problems, notes)
    excluded |= _by_type(rule, "exclude_op_types", modules, problems, [])
    every = set(modules.by_name) - {""}
    chosen = (included if rule.op_names or rule.op_names_re else every) & (types if rule.op_types else every)
    names = [name for name in modules.by_name if name in chosen - excluded and name not in modules.sites]
    if excluded and not chosen & excluded:
        notes.append(f"{rule.where}: the exclude keys take nothing out of what it selects")
    if not names and len(problems) == before:
        if rule.preset:
            problems.append(f"{rule.where}: the model has no layer that this preset quantizes; it has {modules.types()}.")
        elif chosen:
            problems.append(f"{rule.where}: the exclude keys take back everything that is selected; drop one of them.")
        else:
            problems.append(f"{rule.where}: the names and op_types together select no module; drop one of the keys.")
    return names


def _by_name(rule: Rule, prefix: str, modules: Modules, problems: Problems) -> set[str]:
    found: set[str] = set()
    key = f"{prefix}op_names"
    for name in getattr(rule, key):
        first = name if name in modules.by_name else modules.aliases.get(name)
        if first:
            found.update([first, *modules.sites.get(first, [])])
            continue
        near = closest(name, [other for other in (*modules.by_name, *modules.aliases) if other])
        hint = f" Close: {', '.join(map(repr, near))}." if near else ""
        if re.search(r"[*^$\\+|(\[]", name):
            hint += f" For a regular expression write {key}_re."
        if modules.root and name.startswith(f"{modules.root}."):
            hint += f" Names are relative to root {modules.root!r}."
        hint += modules.about(name) or " Layers built later are not visible before on_fit_start."
        problems.append(f"{rule.where}: {key} {name!r} matches no module.{hint}")
    for pattern in getattr(rule, f"{key}_re"):
        matched = {name for name in modules.by_name if name and any(re.match(pattern, n) for n in modules.names_of(name))}
        if not matched:
            near = closest(re.sub(r"[^\w.]", "", pattern), [name for name in modules.by_name if name])
            some = ", ".join(map(repr, near or [name for name in modules.by_name if name][:5]))
            problems.append(f"{rule.where}: {key}_re {pattern!r} matches no module; the model has {some}, ...")
        found |= matched
    return found


def _by_type(rule: Rule, key: str, modules: Modules, problems: Problems, notes: list[str]) -> set[str]:
    found: set[str] = set()
    for type_name in getattr(rule, key):
        kinds_of = {name: {type(module), modules.type_of(name)} for name, module in modules.by_name.items() if name}
        matched = {name for name, kinds in kinds_of.items() if any(is_called(kind, type_name) for kind in kinds)}
        derived = [name for name, m in modules.by_name.items() if any(c.__name__ == type_name for c in type(m).__mro__)]
        changed = [f"{name} ({type(modules.by_name[name]).__name__})" for name in derived if name and name not in matched]
        if changed and (matched or rule.preset):
            notes.append(f"{rule.where}: {type_name} leaves out {', '.join(changed)}: a forward of its own")
        if not matched and not rule.preset:
            kinds = {c.__name__ for name, m in modules.by_name.items() if name for c in type(m).__mro__}
            if type_name in kinds:
                hint = " Its subclasses here have a forward of their own; name them by their own type."
            else:
                hint = guess(type_name.rpartition(".")[2], [type(m).__name__ for name, m in modules.by_name.items() if name])
            if any(one.site.op == type_name for one in modules.unset.values()):
                hint = f" It is an operator without a setting. {_register(type_name)}"
            elif type_name in OPERATORS:
                why = (
                    "the recorded forward calls none" if modules.recorded else "there is no recorded forward: give example_input"
                )
                hint = f" It is an operator that models call as a function, and {why}."
            problems.append(f"{rule.where}: {key} {type_name!r} matches no module; the model has {modules.types()}.{hint}")
        found |= matched
    return found


def _register(op: str) -> str:
    return f"To register one: QuantizationSetting.register({op!r}, {{'_input_': {{}}, '_output_': {{}}}})"
