# SPDX-License-Identifier: Apache-2.0
"""Owns what prepared models gain from a few batches without training: ranges, and biases without the mean error of rounding.

Nothing here needs labels or an optimizer, and nothing moves but what is named: `calibrate` finds ranges, `learn_rounding`
(rounding.py) the integers of weights, `correct_biases` shifts biases. In this order each builds on the one before.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant.config import ConfigError
from lightning_quant.convert import unobserved
from lightning_quant.folding import weight_of
from lightning_quant.fusion import FusedGroup
from lightning_quant.group import Group
from lightning_quant.patterns import BatchNorm
from lightning_quant.prepare import apply_phase, drop_deployed_layers, prepared_groups, quantizers_of, simulated
from lightning_quant.record import moved, split_example
from lightning_quant.schedule import Phase
from lightning_quant.wrapped import ModuleGroup

Model = TypeVar("Model", bound=nn.Module)
Call = tuple[tuple[Any, ...], dict[str, Any]]
FLOAT, OBSERVE, QUANTIZED = (
    Phase(observe=False, quantize=False),
    Phase(observe=True, quantize=False),
    Phase(observe=False, quantize=True),
)
PATIENCE = 2.0  # seconds before a bar appears


# -- passes -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module, phase: Phase, *, calibrating: bool = False) -> Iterator[None]:
    """`model` in eval mode and without gradients, simulating in `phase`; flags and phases restored after."""
    groups = [group for _, group in prepared_groups(model).values()]
    training = [(module, module.training) for module in model.modules()]
    before = [(group, group.phase, group.partly) for group in groups]
    try:
        for module, _ in training:
            module.training = False  # not eval(), which a user's class may have made do more
        apply_phase(model, phase)
        for group in groups:
            group.calibrating = calibrating
        with simulated(model), torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for group, was, partly in before:
            group.phase, group.partly, group.calibrating = was, partly, False
        drop_deployed_layers(model)


def groups_of(model: nn.Module, verb: str) -> dict[str, tuple[nn.Module, Group]]:
    """The groups of a prepared model; a ConfigError if it is not prepared."""
    groups = prepared_groups(model)
    if not groups:
        raise ConfigError(f"{verb}: {type(model).__name__} is not prepared; call prepare_model(model, plan) first.")
    return groups


def check_ready(model: nn.Module, verb: str) -> None:
    """A ConfigError unless every range is known."""
    if blind := unobserved(model):
        raise ConfigError(f"{verb}: no range is known for {', '.join(blind)}; call calibrate(model, batches) or train first.")


def calls_of(model: nn.Module, batches: Iterable[Any], steps: int | None, verb: str) -> Iterator[Call]:
    """What the model is called with for each batch, on its device; a ConfigError where that cannot be."""
    if steps is not None and steps < 1:
        raise ConfigError(f"{verb}: steps={steps!r} is no number of batches; give 1 or more, or None for all.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    number = -1
    for number, batch in enumerate(islice(batches, steps)):
        args, kwargs = split_example(tuple(batch) if isinstance(batch, list) else batch)
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"{verb}: batch {number} does not fit {type(model).__name__}.forward ({error}). Each batch is what the model is "
                "called with: a tensor, a tuple or list of positional arguments, a dict of keyword arguments or (tuple, dict). "
                "Leave labels out: (x for x, _ in loader)."
            ) from None
        yield moved(args, device), moved(kwargs, device)
    if number < 0:
        raise ConfigError(f"{verb}: `batches` is empty; a generator is used up after one pass, a DataLoader or list is not.")


def progress(what: Iterable[Any], title: str, total: int | None = None) -> Any:
    """A progress bar that only appears where it takes long."""
    return tqdm(what, desc=title, total=total, delay=PATIENCE, leave=False)


def calibrate(model: Model, batches: Iterable[Any], *, steps: int | None = None) -> Model:
    """Find the ranges of a prepared model from batches, without training; returns `model`.

    The float model runs in eval mode: batch norm on its running statistics, which stay, no dropout, no gradients. Each range
    becomes the mean of the batches' ranges (with `observer: minmax` the widest); what was known before is forgotten, but not
    what was trained (method `lsq` and its like). Afterwards `model.eval()` runs integers. Train or eval mode is left as it was.

    Args:
        model: prepared.
        batches: what the model is called with, one after the other, each in a form that `make_plan` takes as `example_input`; a
            list, as DataLoaders make of tuples, counts as a tuple.
        steps: how many batches at most; None for all.

    Raises:
        ConfigError: if the model is not prepared, there is no batch, or one does not fit the model's forward.
    """
    groups_of(model, "calibrate")
    total = steps if steps is not None or not isinstance(batches, Sized) else len(batches)
    quantizers = list(quantizers_of(model).values())
    calls = calls_of(model, batches, steps, "calibrate")
    first = next(calls)  # what is wrong with it shows before anything is forgotten
    with evaluating(model, OBSERVE, calibrating=True):
        for quantizer in quantizers:
            quantizer.forget()
            quantizer.averaged = 0
        try:
            for args, kwargs in progress(_chained(first, calls), "calibrating", total):
                model(*args, **kwargs)
        finally:
            for quantizer in quantizers:
                quantizer.averaged = None
    if blind := unobserved(model):
        warnings.warn(f"calibrate: no batch reached {', '.join(blind)}; these layers stay float.", stacklevel=2)
    return model


def _chained(first: Call, rest: Iterator[Call]) -> Iterator[Call]:
    yield first
    yield from rest


def weighted_groups(groups: Mapping[str, tuple[nn.Module, Group]]) -> dict[str, tuple[nn.Module, FusedGroup]]:
    """The groups around a convolution or linear layer."""
    found = {name: (head, group) for name, (head, group) in groups.items() if isinstance(group, FusedGroup)}
    return {name: one for name, one in found.items() if not isinstance(one[0], BatchNorm)}


def run_all(model: nn.Module, calls: Iterable[Call], phase: Phase) -> None:
    """Run the model on every call, simulating in `phase`."""
    with evaluating(model, phase):
        for args, kwargs in calls:
            model(*args, **kwargs)


@contextlib.contextmanager
def tapped(groups: Mapping[str, FusedGroup], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context `see` is shown what each group made, before its activation and its rounding."""

    def tap(name: str) -> Callable[[Tensor], None]:
        return lambda x: see(name, x)

    for name, group in groups.items():
        group.tap = tap(name)
    try:
        yield
    finally:
        for group in groups.values():
            group.tap = None


def report(lines: Iterable[str], left: Mapping[str, str]) -> str:
    """What was done, a line each, and what was left, with the reason."""
    return "\n".join([*lines, *(f"left as it is: {name}: {reason}" for name, reason in left.items())])


# -- bias correction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What `correct_biases` did: the greatest shift of a channel by layer, and the reason for every layer that is left."""

    shifts: Mapping[str, float]
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: shifted by up to {shift:.3g}" for name, shift in self.shifts.items()]
        return report(lines, self.left)


def correct_biases(model: nn.Module, batches: Iterable[Any], *, steps: int | None = None) -> Correction:
    """Take the mean error of quantization out of every weighted layer, channel by channel, in place.

    Nagel et al. 2019 (arXiv 1906.04721, section 4.2 and appendix D): rounding moves the mean of what a layer makes. With y the
    layer of the float model and y~ that of the quantized one on the same batches, whose earlier layers are corrected already,
    E[y~] - E[y] is taken from the bias, or from that of the batch norm behind the layer. One pass over the batches for each
    layer. Values of biases change; nothing else does.

    Args:
        model: prepared, with known ranges.
        batches, steps: as for `calibrate`; they are kept in memory.

    Raises:
        ConfigError: as `calibrate`, or if a range is not known yet.
    """
    groups = groups_of(model, "correct_biases")
    check_ready(model, "correct_biases")
    calls = list(calls_of(model, batches, steps, "correct_biases"))
    left = {name: _NO_FOLD for name, (_, group) in groups.items() if isinstance(group, ModuleGroup) and group.parameters}
    shifts: dict[str, float] = {}
    weighted = weighted_groups(groups)
    expected = channel_means(model, calls, weighted, FLOAT)
    left.update({name: UNREACHED for name in weighted if name not in expected})
    for name in progress(expected, "correcting biases"):
        head, group = weighted[name]
        bias = _bias_of(model, name, head, group)
        if isinstance(bias, str):
            left[name] = bias
            continue
        error = channel_means(model, calls, {name: weighted[name]}, QUANTIZED)[name] - expected[name]
        with torch.no_grad():
            bias.sub_(error.to(bias))
        shifts[name] = float(error.abs().max())
    drop_deployed_layers(model)
    return Correction(shifts=shifts, left=left)


_NO_FOLD = "it is quantized around its own forward, of which no bias is known"
UNREACHED = "no batch reached it"


def _bias_of(model: nn.Module, name: str, head: nn.Module, group: FusedGroup) -> nn.Parameter | str:
    """The parameter that moves the mean of a layer's output, or why there is none."""
    norm = group.norm
    if norm is not None and not isinstance(norm, BatchNorm):
        return "the norm behind it is no batch norm, whose bias would be known"
    bias = (head if norm is None else norm)._parameters.get("bias")
    if bias is None:
        return "it has no bias and no batch norm" if norm is None else "its batch norm has no bias (affine=False)"
    if sum(bias is parameter for module in model.modules() for parameter in module._parameters.values()) > 1:
        return "its bias is shared with another module"
    return bias


def channel_means(
    model: nn.Module, calls: Iterable[Call], weighted: Mapping[str, tuple[nn.Module, FusedGroup]], phase: Phase
) -> dict[str, Tensor]:
    """The mean of each layer's output by channel, before activation and rounding, float64 (C,); in the order of the data."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        axis = 1 - weight_of(weighted[name][0]).dim()
        total = x.detach().double().movedim(axis, 0).flatten(1).sum(1)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + x.numel() // x.shape[axis]

    with tapped({name: group for name, (_, group) in weighted.items()}, see):
        run_all(model, calls, phase)
    return {name: total / counts[name] for name, total in sums.items()}


__all__ = ["Correction", "calibrate", "correct_biases"]
