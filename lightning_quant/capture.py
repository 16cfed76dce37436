# SPDX-License-Identifier: Apache-2.0
"""Owns finding what a model is called with: an aborted step on a first batch shows it, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_quant.graph import Graph
from lightning_quant.plan import record_forward, scope_of
from lightning_quant.record import moved
from lightning_quant.symbolic import trace

# By the trainer's function: the step of a LightningModule, and where the trainer has its data.
_STEPS = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloaders"),
    "test": ("test_step", "test_dataloaders"),
    "predict": ("predict_step", "predict_dataloaders"),
}


def find_example(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    scope: nn.Module,
    example_input: Any,
    stage: str = "fit",
    entry: nn.Module | None = None,
) -> tuple[nn.Module, Any] | str:
    """(module, what it is called with) for the recorded forward, or why there is none.

    In this order: `example_input`, which is for `scope`; `example_input_array`; a first batch of the data of `stage` ("fit",
    "validate", "test", "predict"), as its step hands it to `scope`, or, where `scope` is the LightningModule and is not called,
    to the first module that is trained. `entry`: the module that was found so in another stage; it is waited for instead.
    """
    if example_input is not None:
        return scope, trainer.precision_plugin.convert_input(example_input)
    array = pl_module.example_input_array
    if array is None and stage == "fit":
        trainer.fit_loop.setup_data()
    with _trial(pl_module):
        if array is not None:
            array = trainer.precision_plugin.convert_input(array)
            if scope is pl_module:
                return scope, array
            args, kwargs = ((), array) if isinstance(array, dict) else (array if isinstance(array, tuple) else (array,), {})
            args, kwargs = trainer.strategy.batch_to_device((args, kwargs))
            return _captured(scope, lambda: pl_module(*args, **kwargs))
        try:
            batch = _first_batch(trainer, pl_module, stage)
            root = entry or scope
            others = [module for module in pl_module.modules() if module is not root] if scope is pl_module else []
            wait = entry is not None or _has_forward(pl_module)
            if not wait:  # a frozen teacher may come first, or what only moves images
                trained = [module for module in others if any(one.requires_grad for one in module.parameters())]
                others = trained or others
            return _captured(root, lambda: _step(pl_module, batch, stage), others, wait=wait)
        except _NoBatchError as reason:
            return str(reason)


def find_calls(
    trainer: pl.Trainer, pl_module: pl.LightningModule, entry: nn.Module, number: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]] | str:
    """What `entry` is called with in the training steps of the first `number` batches, or why that cannot be had.

    Every step is aborted there; loaders, random state, buffers and metrics are as they were afterwards.
    """
    trainer.fit_loop.setup_data()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    others = [module for module in pl_module.modules() if module is not entry] if entry is not pl_module else []
    with _trial(pl_module), contextlib.ExitStack() as stack:
        try:
            for batch in stack.enter_context(contextlib.closing(_batches(trainer, pl_module, number))):
                found = _captured(entry, lambda batch=batch: _step(pl_module, batch), others)  # type: ignore[misc]
                if isinstance(found, str) or found[0] is not entry:
                    return found if isinstance(found, str) else f"training_step does not call {type(entry).__name__}"
                calls.append(found[1])
        except _NoBatchError as reason:
            return str(reason)
    return calls


def restore_place(trainer: pl.Trainer) -> None:
    """Give stateful loaders of a resumed run their place in the data, once its state is restored.

    Lightning does so where it makes the loaders; made early, for an example, they would begin the epoch anew.
    """
    loop = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A model's forward as it was seen: `entry`, the name of the module that was called with `example`; None if there was none.

    Without an example the graph is traced; it is None with the reason in `why` if that fails, too.
    """

    graph: Graph | None
    why: str = ""
    entry: str = ""
    example: Any = None


def recorded(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    root: str | None,
    example_input: Any,
    stage: str = "fit",
    before: str | None = None,
) -> Recorded:
    """Record a forward of the model, or of its submodule `root`, on what `find_example` finds.

    `before`: the name of the entry in another stage. Where this stage does not call that module, the forward is traced.
    """
    scope = scope_of(pl_module, root)
    known = None if before is None else pl_module.get_submodule(before)
    found = find_example(trainer, pl_module, scope, example_input, stage, known)
    if not isinstance(found, str) and known not in (None, found[0]) and example_input is None:
        found = f"{_STEPS[stage][0]} does not call {type(known).__name__}{f' {before!r}' if before else ''}"
    if isinstance(found, str):
        traced = trace(scope)
        return Recorded(graph=None, why=f"{found}; {traced}") if isinstance(traced, str) else Recorded(graph=traced, why=found)
    entry, example = found[0], moved(found[1], "cpu")
    name = next(name for name, module in pl_module.named_modules() if module is entry)
    with trainer.precision_plugin.forward_context():
        return Recorded(graph=record_forward(scope, example, entry), entry=name, example=example)


@contextlib.contextmanager
def _trial(pl_module: pl.LightningModule) -> Iterator[None]:
    """No gradients, no logging; random state, buffers, metrics and `requires_grad` flags as they were afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    toggled = dict(getattr(pl_module, "_param_requires_grad_state", {}))  # Lightning's toggle_optimizer keeps notes there
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    metrics = [(m, m.update_count) for m in pl_module.modules() if isinstance(m, Metric)]
    with isolate_rng():
        try:
            pl_module.__dict__["log"] = pl_module.__dict__["log_dict"] = lambda *_, **__: None
            with torch.no_grad():
                yield
        finally:
            del pl_module.__dict__["log"], pl_module.__dict__["log_dict"]
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            pl_module._param_requires_grad_state = toggled
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
            for metric, count in metrics:
                if metric.update_count != count:
                    metric.reset()


class _NoBatchError(Exception):
    """Why no batch of the data can be had."""


class _Reached(BaseException):
    """Carries the arguments out of an aborted training step; no `except Exception` of the user's may stop it."""

    def __init__(self, call: tuple[nn.Module, Any]) -> None:
        self.call = call


def _has_forward(pl_module: pl.LightningModule) -> bool:
    """Whether waiting for the LightningModule's own forward makes sense, and is harmless: no optimizer steps on the way."""
    return type(pl_module).forward is not pl.LightningModule.forward and pl_module.automatic_optimization


def _captured(
    root: nn.Module, run: Callable[[], Any], others: Sequence[nn.Module] = (), *, wait: bool = True
) -> tuple[nn.Module, Any] | str:
    """(module, arguments) of the call of `root` in `run`, which is aborted there; or why there was none.

    Without such a call, the first call of one of `others` is what counts. With `wait` one of them may run before `root` (a
    teacher); the second one, or a failure, ends the waiting: it is a loss, a metric or a logger that must not be touched.
    """
    first: list[tuple[nn.Module, Any]] = []
    inside = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal inside
        call = (module, (tuple(args), dict(kwargs)))
        if module is root:
            raise _Reached(call)
        if not inside and (first or not wait):
            raise _Reached(first[0] if first else call)
        first.append(call)
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    handles = [m.register_forward_pre_hook(enter, prepend=True, with_kwargs=True) for m in (root, *others)]
    handles += [m.register_forward_hook(leave, always_call=True) for m in others]
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    except _Reached as reached:
        return reached.call
    except Exception as error:  # noqa: BLE001  (a user's step may raise anything; the plan says what)
        return first[0] if first else f"a trial step failed: {error}"
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else "a trial step called no module"


def _step(pl_module: pl.LightningModule, batch: Any, stage: str = "fit") -> None:
    step = getattr(pl_module, _STEPS[stage][0])
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise _NoBatchError(f"{_STEPS[stage][0]} takes a dataloader_iter")
    any_number = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters.values())
    step(*(batch, 0, 0)[: 2 if any_number else max(1, min(len(parameters), 2 + ("dataloader_idx" in parameters)))])


def _first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Any:
    """A first batch of the stage's data, on the device, with the loaders' own iterators left untouched."""
    with contextlib.closing(_batches(trainer, pl_module, 1, stage)) as batches:
        return next(batches)


def _batches(trainer: pl.Trainer, pl_module: pl.LightningModule, number: int, stage: str = "fit") -> Generator[Any]:
    """The first batches of the stage's data, on the device, with the loaders' own iterators left untouched."""
    loaders = getattr(trainer, _STEPS[stage][1])
    if stage != "fit" and isinstance(loaders, list | tuple | Mapping):  # Lightning takes one of them after the other
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders), None)
    if loaders is None:
        raise _NoBatchError("there is no data")
    with contextlib.closing(_samples(loaders)) as samples:
        count = 0
        for count, sample in enumerate(itertools.islice(samples, number), start=1):  # noqa: B007
            batch = trainer.precision_plugin.convert_input(sample)
            batch = pl_module._on_before_batch_transfer(batch)  # the data module's hook or the module's, as Lightning chooses
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    if not count:
        raise _NoBatchError("the data is empty")


def _samples(loaders: Any) -> Generator[Any]:
    """Batches with the structure of the loaders, until one of them ends."""
    if isinstance(loaders, Mapping):
        yield from (dict(zip(loaders, parts, strict=True)) for parts in zip(*map(_samples, loaders.values()), strict=False))
        return
    if isinstance(loaders, list | tuple):
        yield from (type(loaders)(parts) for parts in zip(*map(_samples, loaders), strict=False))
        return
    if not isinstance(loaders, DataLoader):
        yield from _restartable(loaders)
        return
    generators = [g for g in (loaders.generator, getattr(loaders.sampler, "generator", None)) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        if isinstance(loaders.dataset, IterableDataset) or loaders.batch_sampler is None:
            if loaders.persistent_workers:
                raise _NoBatchError("an iterable dataset with persistent workers has one iterator only")
            _restartable(loaders.dataset)
            yield from loaders
            return
        # Not through the loader: that would start workers, or move a persistent iterator that training is to read.
        for indices in _twin(loaders.batch_sampler):
            yield _fetched(loaders, indices)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _fetched(loader: DataLoader[Any], indices: Any) -> Any:
    """A batch, in this process; what needs a worker's (`worker_init_fn`) cannot be had."""
    try:
        together = getattr(loader.dataset, "__getitems__", None)
        items = [loader.dataset[index] for index in indices] if together is None else together(indices)
        return loader.collate_fn(items)
    except Exception as error:
        raise _NoBatchError(f"the data cannot be read outside its loader: {type(error).__name__}: {error}") from error


def _twin(sampler: Any) -> Any:
    """A sampler with its own place in the data: an evaluation's has its iterator already, a stateful one keeps count."""
    twin = copy.copy(sampler)
    for name in ("sampler", "batch_sampler", "_batch_sampler"):
        if name in getattr(twin, "__dict__", {}):
            twin.__dict__[name] = _twin(twin.__dict__[name])
    return twin


def _restartable(source: Any) -> Iterator[Any]:
    """An iterator over a source that can be iterated again; a stream that runs once would lose what is taken here."""
    if isinstance(source, IterableDataset | Iterator) or not hasattr(source, "__len__"):
        iterator: Iterator[Any] = iter(source)
        if iterator is source:
            raise _NoBatchError("the data is a stream that runs once")
        return iterator
    return iter(source)
