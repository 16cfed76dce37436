# SPDX-License-Identifier: Apache-2.0
"""Owns which tensors of a student are compared with which of a teacher: (rules, model, teacher) -> Links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_quant.config import Rule, selects
from lightning_quant.distillation import TEMPERATURE, Method, loss_named, name_of
from lightning_quant.keys import INPUT, OUTPUT, Problems, closest
from lightning_quant.selection import Modules, select
from lightning_quant.settings import DistillationSetting
from lightning_quant.tables import html_table, text_table
from lightning_quant.targets import Arguments, canonical_output, is_activation, is_input, uncompiled_name

_HEAD = ("student", "teacher", "loss", "lambda", "decided by", "notes")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One tensor of the student and what it is to be like.

    `module`: its full name in the model; "" is the module that is called with the input, whose output is the model's own.
    `teachers`: names of modules in the teacher, "" for the one that is called; of several the nearest counts, batch by batch
    (NNI's DynamicLayerwiseDistiller). `dim`: None where `feature_dim` decides. `decided_by`: the place of the entry. `chosen`:
    whether that names the target; else it is the output, and there must be one.
    """

    module: str
    target: str
    teachers: tuple[str, ...]
    weight: float
    method: Method
    temperature: float
    dim: int | None
    decided_by: str
    chosen: bool = True
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages and logs: 'layer1._output_', or '_output_' for the model's own."""
        return f"{uncompiled_name(self.module)}.{self.target}" if self.module else self.target


@dataclass(frozen=True, kw_only=True)
class Links:
    """Everything that distillation compares; `print(links)` is a table of it. `own`: the weight of the step's own loss."""

    links: tuple[Link, ...]
    own: float = 1.0

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows, notes=[f"note: {note}" for note in self._notes])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return html_table(_HEAD, self._rows, notes=self._notes)

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                link.name,
                " or ".join(name or "the model" for name in link.teachers),
                name_of(link.method) + (f" (temperature {link.temperature:g})" if link.method == "kl" else ""),
                f"{link.weight:g}",
                link.decided_by,
                "; ".join(link.notes),
            )
            for link in self.links
        ]

    @property
    def _notes(self) -> list[str]:
        return [] if self.own == 1 else [f"the loss of the step itself is weighed by {self.own:g}"]


class TeacherNames:
    """The modules of a teacher by name, compiled or not, and which of them a student's module corresponds to.

    `called`: the module of the teacher that is called with the input; `entry`: the student's, by its name in the model.
    """

    def __init__(self, teacher: nn.Module, called: nn.Module, entry: str) -> None:
        self.by_name: dict[str, nn.Module] = dict(teacher.named_modules(remove_duplicate=False))
        self.by_name.update({uncompiled_name(name): module for name, module in [*self.by_name.items()]})
        self.kind, self.entry = type(teacher).__name__, uncompiled_name(entry)
        inside = {id(module) for module in called.modules()}
        self.inside = {name for name, module in self.by_name.items() if id(module) in inside}
        inner = getattr(called, "_orig_mod", called)  # of a compiled module
        self.called: str = next(name for name, module in self.by_name.items() if module in (called, inner))

    def same(self, module: str) -> str | None:
        """The teacher's name of what the student calls `module`, or None; the model itself is what is called."""
        if not module:
            return self.called
        own = uncompiled_name(module)
        short = own.removeprefix(f"{self.entry}.") if self.entry else own
        return next((name for name in (own, short) if name in self.inside), None)

    def problem(self, name: str) -> str:
        """Why nothing can be linked with `name`, with close names."""
        if name in self.by_name:
            return f"is outside of what is called with the input, {self.called!r}."
        near = closest(name, [other for other in self.inside if other])
        hint = f" Close: {', '.join(map(repr, near))}." if near else ""
        return f"is no module of the teacher, a {self.kind}.{hint}"


def make_links(
    rules: Sequence[Rule],
    model: nn.Module,
    root: str,
    entry: str,
    teacher: TeacherNames,
    problems: Problems,
    *,
    own: float = 1.0,
) -> Links:
    """What the rules compare. Within an entry: setting of the type, the entry's keys, its target_settings; a later entry wins.

    Args:
        rules: as `parse_distillation` gives them.
        model: the student. `root`: the name of the module in it that names are relative to.
        entry: the name in the model of the module that is called with the input.
        teacher: names in the teacher.
        problems: gets what is wrong.
        own: see `Links`.
    """
    modules, called = Modules(model.get_submodule(root), root, operators={}), model.get_submodule(entry)
    found: dict[tuple[str, str], Link] = {}
    for rule in rules:
        names = _selected(rule, modules, problems)
        for name in names:
            full = "" if not name else f"{root}.{name}" if root else name
            if full and entry and not f"{full}.".startswith(f"{entry}."):
                problems.append(
                    f"{rule.where}: {name!r} is not in {entry!r}, the module that is called with the input and that the teacher "
                    "is called in place of; define forward in the LightningModule, so that it holds both."
                )
                continue
            full = "" if uncompiled_name(full) == uncompiled_name(entry) else full
            module = modules.by_name[name] if full else getattr(called, "_orig_mod", called)
            for target, keys in _targets(rule, module, problems, name).items():
                link = _link(rule, full, target, keys, teacher, problems)
                if link is not None:
                    before = found.pop((full, target), None)
                    note = () if before is None else (f"overrules {before.decided_by}",)
                    found[full, target] = Link(**{**vars(link), "notes": note})
    return Links(links=tuple(found.values()), own=own)


def _selected(rule: Rule, modules: Modules, problems: Problems) -> list[str]:
    """The names that a rule selects; "" is the model, selected by an entry without names and types, or by its name."""
    if not selects(rule):
        return [""]
    if "" not in rule.op_names:
        return select(rule, modules, problems, [])
    rest = tuple(name for name in rule.op_names if name)
    others = select(Rule(**{**vars(rule), "op_names": rest}), modules, problems, []) if rest or rule.op_names_re else []
    return ["", *others]


def _targets(rule: Rule, module: nn.Module, problems: Problems, name: str) -> dict[str, dict[str, Any]]:
    """What is said for each target of one module, by its one name."""
    setting = DistillationSetting.find(type(module)) or {}
    wanted = rule.target_names or (*setting, *(target for target in rule.target_settings if target not in setting))
    targets: dict[str, dict[str, Any]] = {}
    for target in wanted:
        if not is_activation(target):
            problems.append(
                f"{rule.where}: target {target!r} of {name!r}: distillation compares what goes in and out: {INPUT}, {OUTPUT}, "
                f"{OUTPUT}1, ..."
            )
            continue
        argument = Arguments(type(module)).find(target) if is_input(target) else None
        if is_input(target) and argument is None:
            problems.append(f"{rule.where}: {name!r} has no argument {target!r}; it has {Arguments(type(module))}.")
            continue
        given = next((k for t, k in rule.target_settings.items() if canonical_output(t) == canonical_output(target)), {})
        one = canonical_output(target) if argument is None else argument.target
        targets[one] = {**setting.get(target, {}), **rule.settings, **given}
    return targets


def _link(
    rule: Rule, module: str, target: str, keys: Mapping[str, Any], teacher: TeacherNames, problems: Problems
) -> Link | None:
    """One link, or None with the reason in `problems`."""
    where = f"{rule.where}: {module or 'the model'}.{target}"
    method, asked = keys.get("apply_method", "mse"), keys.get("link", "auto")
    if "temperature" in keys and method != "kl":
        problems.append(f"{where}: temperature is for 'kl', and the loss is {name_of(method)!r}; leave it out.")
    names: list[str] = []
    for name in [asked] if isinstance(asked, str) else asked:
        linked = teacher.same(module) if name == "auto" else name if name in teacher.inside else None
        if linked is not None:
            names.append(linked)
        elif name == "auto":
            problems.append(f"{where}: link 'auto': {module!r} {teacher.problem(module)} Give `link`, a module of the teacher.")
        else:
            problems.append(f"{where}: link {name!r} {teacher.problem(name)}")
    if not names:
        return None
    return Link(
        module=module,
        target=target,
        teachers=tuple(dict.fromkeys(names)),
        weight=float(keys.get("lambda", 1.0)),
        method=loss_named(method, rule.where),
        temperature=float(keys.get("temperature", TEMPERATURE)),
        dim=keys.get("dim"),
        decided_by=rule.where,
        chosen=any(canonical_output(one) == target for one in (*(rule.target_names or ()), *rule.target_settings)),
    )


def uneven(link: Link, name: str, students: int, teachers: int) -> str:
    """What is wrong where a student's tensor was there another number of times than the teacher's."""
    return (
        f"{link.decided_by}: {link.name} was there {students} times in the student's forward, and {teachers} times in that of "
        f"the teacher, in {name or 'the model'!r}: it is unknown which belong together."
    )


def unlike(link: Link, name: str, student: Tensor, teacher: Tensor, why: str) -> str:
    """What is wrong where their shapes do not go together."""
    return (
        f"{link.decided_by}: {link.name} has shape {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
        f"teacher ({name or 'the model'!r}): {why}."
    )


def several(link: Link, whose: str, outputs: Sequence[str]) -> str:
    """What is wrong where a model returns several tensors, and the entry does not say which of them is meant."""
    names = [f"{OUTPUT}0" if name == OUTPUT else name for name in outputs]
    if whose == "student":
        one = next((name for name in names if name.removeprefix(OUTPUT) in ("logits", "out", "output")), names[0])
        do = f"Name one in the entry: {{'apply_method': {name_of(link.method)!r}, 'target_names': [{one!r}]}}"
    else:
        do = "Name one that both return in the entry ('target_names'), or let `link` name the module of the teacher that makes it"
    return (
        f"{link.decided_by}: the {whose} returns {len(names)} tensors, {', '.join(names)}, and it is not said which of them is "
        f"the model's output. {do}."
    )
