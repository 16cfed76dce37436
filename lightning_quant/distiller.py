# SPDX-License-Identifier: Apache-2.0
"""Owns distillation at work: tensors are tapped in a training batch, and how far they are apart joins the loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError, parse_distillation, raise_problems
from lightning_quant.distillation import BRIDGED, Projection, distance, feature_dim, loss_named, mismatch, name_of
from lightning_quant.keys import OUTPUT, Problems
from lightning_quant.links import Link, Links, TeacherNames, make_links, several, uneven, unlike
from lightning_quant.prepare import LEARNED, Learned
from lightning_quant.record import moved, split_example
from lightning_quant.taps import Place, Seen, Taps
from lightning_quant.targets import is_compiled, is_input
from lightning_quant.teacher import SELF, Teacher, checked_teacher, evaluating, found_teacher


class _Pair(NamedTuple):
    """A forward of the student and what the teacher made of the same input."""

    student: Seen
    teacher: Seen


class _JoinsLoss:
    """Stands for a LightningModule's `training_step` during a batch: what is added joins the loss that it returns.

    An addition to the loss in `on_before_backward` would come too late: it is divided for accumulation and scaled for half
    precision by then, and DistributedDataParallel has looked for unused parameters.
    """

    def __init__(self, module: nn.Module, run: _Run) -> None:
        self.run, self.before = run, module.__dict__.get("training_step")
        self.own: Any = module.training_step
        self.__wrapped__ = getattr(self.own, "__wrapped__", self.own)  # whose arguments Lightning looks at
        self.module = module
        module.__dict__["training_step"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The step, and the added loss; anew for each call of an optimizer's closure."""
        self.run.pairs.clear()
        self.run.open()  # no sooner: DistributedDataParallel calls the module with a batch, for whose length this is its forward
        try:
            output = self.own(*args, **kwargs)
        finally:
            self.run.close()
        if not self.module.automatic_optimization:
            return output
        self.run.skipped = output is None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):  # a skipped step, or what Lightning has a word about
            return output
        total = loss if self.run.links.own == 1 else loss * self.run.links.own
        added = self.run.loss()
        if added is not None:
            total = total + added.to(total.device)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def undo(self) -> None:
        """Put the module's own back."""
        if self.module.__dict__.get("training_step") is self:
            del self.module.__dict__["training_step"]
            if self.before is not None:
                self.module.__dict__["training_step"] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module, made in a training batch, has no teacher."""
        return copy.deepcopy(self.own, memo)


class _Run:
    """What one fit has: the teacher, taps on both models, the pairs of forwards of the step."""

    def __init__(self, links: Links, model: nn.Module, entry: str, teacher: Teacher, names: TeacherNames) -> None:
        self.links, self.model, self.teacher = links, model, teacher
        self.called, self.entry, self.teacher_name = model.get_submodule(entry), entry, names.called
        modules = {link.module: model.get_submodule(link.module) if link.module else self.called for link in links.links}
        self.student = Taps({(link.module, link.target): modules[link.module] for link in links.links})
        self.taught = Taps(
            {
                # The teacher's own output shows outside of a compiled one, too.
                (name, link.target): teacher.called if name == names.called and not is_input(link.target) else names.by_name[name]
                for link in links.links
                for name in link.teachers
            }
        )
        teacher.show(self.taught.places.values())
        self.taught.copies.update({place: True for place in self.taught.places if is_input(place[1])})  # the student gets these
        self.unseen = set(self.student.places if is_compiled(model) else ())  # code has the hooks of when it was compiled
        self.projections: dict[tuple[Place, str], Projection] = {}
        self.losses: dict[str, Tensor] = {}
        self.pairs: list[_Pair] = []
        self.known: tuple[Any, list[tuple[int, int]], Seen] | None = None  # what the teacher was called with last in this batch
        self.handles: list[Any] = []
        self.step: _JoinsLoss | None = None
        self.fresh = True  # no batch is over yet
        self.met = self.asked = self.skipped = False  # a forward was paired, its loss asked for; the step returned nothing

    # -- a batch ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A LightningModule is watched while it is in `training_step`, any other from now on."""
        self.stop()
        if hasattr(self.model, "training_step"):
            if self.fresh and is_compiled(self.model):
                torch.compiler.reset()  # another model's code is taken where it fits, and has no hooks
            self.step = _JoinsLoss(self.model, self)
        else:
            self.open()

    def stop(self) -> None:
        """Take everything away again."""
        if self.step is not None:
            self.step.undo()
        self.close()
        self.step, self.known = None, None
        self.pairs.clear()

    def open(self) -> None:
        """Put hooks in place."""
        self.handles.append(self.called.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
        self.student.open()
        self.handles.append(self.called.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Remove them."""
        for handle in self.handles:
            handle.remove()
        self.student.settle()
        self.student.close()
        self.handles = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        # A forward inside backward is a checkpoint's second one.
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and not self.student.inside:
            self.pairs.append(_Pair({}, self._teach(args, kwargs)))
            self.student.begin()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, *_: Any) -> None:
        if self.student.inside:
            self.pairs[-1].student.update(self.student.end())
            self.unseen.difference_update(self.pairs[-1].student)
            self.met = True

    def _teach(self, args: Any, kwargs: Any) -> Seen:
        """What is tapped in the teacher's forward; once for an input that comes again, as with LBFGS."""
        plain = not kwargs and all(isinstance(one, Tensor) for one in args)  # else a word may make the difference
        marks = [(id(tensor), tensor._version) for tensor in args] if plain else []
        if marks and self.known is not None and marks == self.known[1]:
            return self.known[2]
        self.taught.open()
        try:
            self.taught.begin()
            self.teacher(args, kwargs)
            seen = self.taught.end()
            self.taught.settle()
        finally:
            self.taught.close()
        self.known = (args, marks, seen)
        return seen

    # -- the loss -----------------------------------------------------------------------------------------------------

    def loss(self) -> Tensor | None:
        """What the forwards since the last time add, a scalar with gradient; None if there was none."""
        self.asked = True
        self.student.settle()
        added: dict[str, Tensor] = {}
        for link in self.links.links:
            values = [value for pair in self.pairs for value in self._values(link, pair)]
            if values:
                added[link.name] = link.weight * torch.stack(values).mean()
        self.pairs.clear()
        if not added:
            return None
        total = torch.stack([value.to(next(iter(added.values()))) for value in added.values()]).sum()
        self.losses = {**{name: value.detach() for name, value in added.items()}, "loss": total.detach()}
        return total

    def _values(self, link: Link, pair: _Pair) -> list[Tensor]:
        """The loss of a link in each call of its module; none where the student left the module out (stochastic depth)."""
        students = pair.student.get((link.module, link.target), [])
        if not students and (link.module, link.target) in self.unseen:
            raise ConfigError(
                f"{link.decided_by}: {link.name} does not show, because torch.compile had compiled the model before it was to; "
                "call torch.compiler.reset() before the fit."
            )
        raise_problems(self._unnamed(link))
        found: list[Tensor] = []
        for index, student in enumerate(students):
            near: list[Tensor] = []
            for name in link.teachers:
                teachers = pair.teacher.get((name, link.target), [])
                if len(teachers) != len(students):
                    raise ConfigError(uneven(link, name, len(students), len(teachers)))
                near.append(self._distance(link, name, student, teachers[index]))
            found.append(near[0] if len(near) == 1 else torch.stack(near).min())
        return found

    def _unnamed(self, link: Link) -> list[str]:
        """What is wrong with a link of the model's output that does not say which, where student or teacher returns several."""
        if link.module or link.chosen or link.target != OUTPUT:
            return []
        found = [("student", self.student.several.get(("", OUTPUT), ()))]
        found += [("teacher", self.taught.several.get((name, OUTPUT), ())) for name in link.teachers if name == self.teacher_name]
        return next(([several(link, whose, outputs)] for whose, outputs in found if len(outputs) > 1), [])

    def _distance(self, link: Link, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        place = (link.module, link.target)
        dim = self.dim(link, student)
        bridge = self.projections.get((place, name))
        if bridge is None and (why := mismatch(link.method, student.shape, teacher.shape, dim)) is not None:
            raise ConfigError(unlike(link, name, student, teacher, why))
        if bridge is None and _bridged(link, student, teacher, dim):
            why = "a projection between them must be known before training; give example_input"
            raise ConfigError(unlike(link, name, student, teacher, why))
        student = student if bridge is None else bridge(student)
        return distance(link.method, student, teacher, dim=dim, temperature=link.temperature, where=link.decided_by)

    def dim(self, link: Link, student: Tensor) -> int:
        """The dimension of features in a student's tensor."""
        return feature_dim(self.student.places[link.module, link.target], student.dim()) if link.dim is None else link.dim

    # -- before the first batch ---------------------------------------------------------------------------------------

    def try_out(self, example: Any) -> list[str]:
        """Run both models on `example`, and compare what is tapped: projections are made here. Problems, or nothing."""
        like = next(self.model.parameters(), None)
        args, kwargs = split_example(example if like is None else moved(example, like.device))
        with evaluating(self.model):
            try:
                self.student.open()
                self.student.begin()
                self.called(*args, **kwargs)
                student = self.student.end()
            finally:
                self.student.close()
            try:
                teacher = self._teach(args, kwargs)
            except Exception as error:
                raise ConfigError(
                    f"teacher: its forward fails on what the student is called with: {type(error).__name__}: {error}. It "
                    "must take the student's input."
                ) from error
            finally:
                self.known = None
        problems: list[str] = []
        for link in self.links.links:
            place = (link.module, link.target)
            if unnamed := self._unnamed(link):
                problems += unnamed
                continue
            if place not in student:
                problems.append(self._absent(link, self.student, place, "student"))
            for name in link.teachers:
                if (name, link.target) not in teacher:
                    problems.append(self._absent(link, self.taught, (name, link.target), "teacher"))
                elif place in student:
                    problems += self._compared(link, name, student[place], teacher[name, link.target])
        return problems

    def _absent(self, link: Link, taps: Taps, place: Place, whose: str) -> str:
        where = f"{link.decided_by}: {place[0] or 'the model'!r}"
        if place in taps.missing:
            return f"{where}: its {place[1]} in the {whose}'s forward is no tensor but: {taps.missing[place]}."
        return f"{where} is not called in the {whose}'s forward, so there is nothing to compare; leave it out, or link another."

    def _compared(self, link: Link, name: str, students: list[Tensor], teachers: list[Tensor]) -> list[str]:
        """Try the first pair, and make its projection if it needs one."""
        if len(students) != len(teachers):
            return [uneven(link, name, len(students), len(teachers))]
        student, teacher = students[0], teachers[0]
        place, dim = (link.module, link.target), self.dim(link, student)
        if (why := mismatch(link.method, student.shape, teacher.shape, dim)) is not None:
            return [unlike(link, name, student, teacher, why)]
        if _bridged(link, student, teacher, dim):
            full = f"{link.name}->{name or 'output'}"
            self.projections[place, name] = Projection(full, student.shape[dim], teacher.shape[dim], dim, like=student)
        try:
            self._distance(link, name, student, teacher)
        except ConfigError as error:
            return [str(error)]
        except Exception as error:  # noqa: BLE001  (a function of the user's may raise anything)
            return [unlike(link, name, student, teacher, f"{name_of(link.method)} fails: {type(error).__name__}: {error}")]
        return []


def _bridged(link: Link, student: Tensor, teacher: Tensor, dim: int) -> bool:
    return link.method in BRIDGED and student.shape[dim] != teacher.shape[dim]


class Distiller:
    """What a student is to learn from a teacher, from parsing to the loss; nothing of it joins the student's module tree.

    With a Trainer: `begin` when the fit starts, before the model is prepared; `start` and `stop` around each training batch;
    `end` when the fit is over, or broken off. By hand::

        distiller = Distiller("kl", teacher)
        distiller.begin(model, example=x)
        for x, y in data:
            with distiller.batch():
                loss = cross_entropy(model(x), y) + distiller.loss()
                loss.backward()
        distiller.end()

    The teacher computes just before the student does, on what the student is called with (`begin(entry=)` says which module that
    is). A student that is called several times in a step has the mean over its calls; calls without gradients do not count. With
    automatic optimization the loss joins what `training_step` returns: before it is divided for accumulation and scaled for half
    precision, and inside DistributedDataParallel's forward. In manual optimization `training_step` adds `loss()` itself.

    Args:
        distillation: see `parse_distillation`: a list of entries, or the name of a loss for the model's own output.
        teacher: see `checked_teacher`: a module, a checkpoint, or "self".

    Attributes:
        learned: parameters of projections between widths, by name; an optimizer must train them. They begin and resume with
            this object, and `learned_parameters(model)` has them from `begin` on.
        links: what is compared, from `begin` on; `print(links)` shows it.

    Raises:
        ConfigError: for what is wrong without a model; `begin` for the rest.
    """

    def __init__(self, distillation: Any, teacher: Any) -> None:
        if distillation is None:
            raise ConfigError(
                "teacher: nothing is to be learned from it; give distillation, such as 'kl' for the model's output."
            )
        self.rules = parse_distillation(distillation)
        if teacher is None:
            raise ConfigError(
                "distillation: there is no teacher; give teacher: a module, the path of a checkpoint, or 'self' for the float "
                "model as it is when training begins."
            )
        self.given = checked_teacher(teacher)
        for rule in self.rules.rules:
            for keys in (rule.settings, *rule.target_settings.values()):
                loss_named(keys.get("apply_method", "mse"), f"{rule.where}['apply_method']")
        self.learned: dict[str, nn.Parameter] = {}
        self.links: Links | None = None
        self._run: _Run | None = None
        self._saved: dict[str, Tensor] | None = None  # the weights of a teacher that was the student
        self._kept: dict[str, Any] = {}  # the state when there is no run

    # -- a run --------------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, *, entry: str = "", example: Any = None, root: str | None = None) -> None:
        """Find the teacher, decide what is compared, and try it on `example`; before `prepare_model`.

        Args:
            model: the student, float.
            entry: the name in it of the module that is called with the input.
            example: what that is called with: a tensor, a tuple, a dict of keyword arguments or (tuple, dict). None: widths that
                differ cannot be bridged, and what does not fit shows in the first batch only.
            root: the module that names in entries are relative to.

        Raises:
            ConfigError: with every problem found; the model and the teacher are then as they were.
        """
        self.end()
        self.links = None
        model.__dict__.pop(LEARNED, None)
        module, called = found_teacher(self.given, model, entry)
        names = TeacherNames(module, called, entry)
        problems: Problems = []
        links = make_links(self.rules.rules, model, root or "", entry, names, problems, own=self.rules.own)
        raise_problems(problems)
        teacher = Teacher(module, called, next(model.parameters(), None))
        try:
            run = _Run(links, model, entry, teacher, names)
            if example is not None:
                raise_problems(run.try_out(example))
        except BaseException:
            teacher.leave()
            raise
        self._run, self._saved, self.links = run, None, links
        self.learned = {
            f"{bridge.name}.{key}": parameter
            for bridge in run.projections.values()
            for key, parameter in (("weight", bridge.weight), ("bias", bridge.bias))
        }
        if self.learned:
            model.__dict__[LEARNED] = Learned(self.learned)

    def end(self) -> None:
        """The fit is over: the teacher's flags and device are as before, and every hook is gone."""
        if self._run is not None:
            self._kept = self.state_dict()
            self._run.stop()
            self._run.teacher.leave()
            if is_compiled(self._run.model):
                torch.compiler.reset()
        self._run = None

    def start(self) -> None:
        """A training batch begins: a LightningModule's `training_step` is watched, and returns the added loss, too."""
        if self._run is not None:
            self._run.start()

    def stop(self) -> None:
        """It is over.

        Raises:
            ConfigError: once, if that was the first batch that was not skipped and nothing was learned from the teacher in it.
        """
        if self._run is not None:
            first, skipped = self._run.fresh, self._run.skipped
            self._run.stop()
            if first and skipped:
                self._run.met = self._run.asked = False
                return
            self._run.fresh = False
            if first and not self._run.met:
                kind = type(self._run.called).__name__
                raise ConfigError(
                    f"distillation: the first training batch did not call {kind} ({self._run.entry or 'the model'!r}) with "
                    "gradients, so there is nothing to compare. Call the module, `self(x)` or `self.net(x)`, not its forward; "
                    "what example_input shows must be what training_step calls."
                )
            if first and not self._run.asked:
                raise ConfigError(
                    "distillation: the first training batch did not ask for its loss. In manual optimization training_step adds "
                    "the loss itself: self.manual_backward(loss + callback.distillation_loss()), after the student's forward."
                )

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """A training batch, without a Trainer: within it, ask for `loss()` after the forward."""
        if self._run is not None:
            self._run.stop()
            self._run.open()
        try:
            yield
        except BaseException:
            if self._run is not None:
                self._run.stop()
            raise
        self.stop()

    def loss(self) -> Tensor:
        """What the forwards since the last time add to the loss, a scalar with gradient; 0 where there was none."""
        found = None if self._run is None else self._run.loss()
        return torch.zeros(()) if found is None else found

    @property
    def losses(self) -> dict[str, Tensor]:
        """Of the last step, detached: what each link added (its lambda included), by its name, and 'loss', their sum."""
        return {} if self._run is None else dict(self._run.losses)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Projections, and the weights of a teacher that was the student when training began: plain tensors on the host."""
        if self._run is None:
            return dict(self._kept)
        if self.given == SELF and self._saved is None:  # they stay as they are, so they are copied once
            state = self._run.teacher.module.state_dict()
            self._saved = {name: value.detach().cpu().clone() for name, value in state.items()}
        projections = {name: parameter.detach().cpu().clone() for name, parameter in self.learned.items()}
        return {"projections": projections, "teacher": self._saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, after `begin`; without a run it is only kept, to be saved again.

        Raises:
            ConfigError: if projections differ, or the saved run's teacher was not the student and this one's is.
        """
        if self._run is None:
            self._kept = dict(state)
            return
        saved, own = state["projections"], self.learned
        there, here = (sorted(f"{name} {tuple(p.shape)}" for name, p in some.items()) for some in (saved, own))
        if there != here:
            raise ConfigError(
                f"the checkpoint's projections are of another distillation: {there} there, {here} here. Use the distillation and "
                "the teacher of that run, or load only its weights and start a new fit."
            )
        if self.given == SELF and state.get("teacher") is None:
            raise ConfigError(
                "teacher: 'self' is the float model when training began, and the checkpoint is of a run that did not keep it; "
                "give the path of a checkpoint from before training."
            )
        if self.given == SELF:
            try:
                self._run.teacher.module.load_state_dict(state["teacher"])
            except RuntimeError as error:
                raise ConfigError(f"the checkpoint's teacher is another model than this one: {error}") from error
            self._saved = dict(state["teacher"])
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
