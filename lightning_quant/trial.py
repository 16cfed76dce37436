# SPDX-License-Identifier: Apache-2.0
"""Owns trying out a smaller model: on the example, with random numbers for all weights, and on inputs of other sizes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant.config import ConfigError
from lightning_quant.cuts import Cuts
from lightning_quant.flow import follow, stored_tensors
from lightning_quant.narrow import cut_model
from lightning_quant.record import moved, multiply_adds, split_example, undisturbed
from lightning_quant.targets import on_tensors, tensors_in
from lightning_quant.units import OUT, Dim, Flow, by_group

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a float32 model costs: parameters, bytes of parameters and buffers, multiply-adds of one call with the example.

    `by_module`: multiply-adds by the names of modules in what was called, "" for it all, of two samples at most.
    """

    parameters: int
    bytes: int
    multiply_adds: int
    by_module: Mapping[str, int] = field(default_factory=dict, compare=False)


class UncallableError(ConfigError):
    """The forward of a copy of the model fails, outside the Trainer, with the example: nothing can be tried out."""


class Trial:
    """A float copy on the host in float64, where its forward allows that, and what it is called with: two samples, if it may be.

    `times`: how many times as large the example was. Raises an UncallableError if the forward fails in all of these ways.
    """

    def __init__(self, model: nn.Module, example_input: Any, entry: str) -> None:
        self.entry = entry
        whole = moved(split_example(example_input), "cpu")
        sizes = {one.shape[0] if one.dim() else 0 for one in tensors_in(whole)}
        batch = sizes.pop() if len(sizes) == 1 else 0
        few = on_tensors(lambda one: one[:2], whole) if batch > 2 else whole
        wide = copy.deepcopy(model).double()
        tries = [(wide, few, 1e-9), (wide, whole, 1e-9), (model, few, TOLERANCE), (model, whole, TOLERANCE)]
        for self.model, example, self.relative in tries:
            self.times = batch / 2 if example is few and batch > 2 else 1.0
            self.example = example if self.model is model else on_tensors(_doubled, example)
            try:
                self.expected = self.outputs(self.model)
            except Exception as error:  # the user's own forward
                if example is whole and self.model is model:
                    raise UncallableError(
                        "channels cannot be removed: the forward of a copy of the model, which has no Trainer, fails with the "
                        f"example input: {type(error).__name__}: {str(error).rstrip('.')}"
                    ) from error
                continue  # float32, or how many samples there are, is written somewhere in the forward
            break
        self._others: list[tuple[Any, list[Tensor]]] | None = None

    def outputs(self, model: nn.Module, example: Any = None) -> list[Tensor]:
        """What a model with the same modules makes of the example, or of another one."""
        args, kwargs = on_tensors(torch.clone, self.example if example is None else example)
        with undisturbed(model), torch.no_grad():
            return list(tensors_in(model.get_submodule(self.entry)(*args, **kwargs)))

    def cost(self, model: nn.Module) -> Cost:
        """What a model with the same modules costs with the whole example."""
        with FlopCounterMode(display=False) as counter:
            self.outputs(model)
        tensors = stored_tensors(model).values()
        return Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            bytes=sum(tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors),
            multiply_adds=round(counter.get_total_flops() / 2 * self.times),
            by_module=multiply_adds(model.get_submodule(self.entry), counter),
        )

    def flow(self, example: Any = None) -> Flow:
        """What a forward of the model shows, with the example or another one."""
        example = self.example if example is None else example
        model = copy.deepcopy(self.model)  # a forward may keep something for the size that it has seen last
        return follow(model, on_tensors(torch.clone, example), model.get_submodule(self.entry))

    def others(self) -> list[tuple[Any, list[Tensor]]]:
        """The example in other sizes that the forward takes, and what the model makes of it."""
        if self._others is None:
            self._others, seen = [], set[tuple[int, int]]()
            for places, sizes in _changes(list(tensors_in(self.example))):
                if not places <= seen:
                    found = next((one for size in sizes if (one := self._resized(places, size)) is not None), None)
                    if found is not None:
                        self._others.append(found)
                        seen |= places
        return self._others

    def _resized(self, places: set[tuple[int, int]], size: int) -> tuple[Any, list[Tensor]] | None:
        """The example with another size in these (tensor, dimension); None if the forward does not take it, or not as such."""
        numbers = iter(range(len(list(tensors_in(self.example)))))
        example = on_tensors(lambda one: _repeated(one, next(numbers), places, size), self.example)
        tensors = list(tensors_in(self.example))
        before = {tensors[number].shape[0] for number, dim in places if dim == 0}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nobody called the model so
                made = self.outputs(copy.deepcopy(self.model), example)
        except Exception:  # noqa: BLE001  (the user's own forward)
            return None
        # `x.view(-1, 800)` takes images of many sizes, and makes other samples of them
        lengths = [(size if one.shape[0] in before else one.shape[0]) if one.dim() else 0 for one in self.expected]
        return (example, made) if lengths == [one.shape[0] if one.dim() else 0 for one in made] else None

    def unlike(self, cuts: Cuts) -> list[Any]:
        """The examples of other sizes for which a smaller model does not compute the same."""
        found = []
        for example, expected in self.others() if cuts.names() else []:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    same = self._same(self.outputs(self.cut(cuts), example), expected)
            except Exception:  # noqa: BLE001  (the user's own forward)
                same = False
            found += [] if same else [example]
        return found

    def cut(self, cuts: Cuts) -> nn.Module:
        """A copy with smaller layers."""
        small = copy.deepcopy(self.model)
        cut_model(small, cuts)
        return small

    def same_without(self, name: str, stays: Tensor) -> bool:
        """Whether the model computes the same if a parameter or buffer is 0 where `stays` is False."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            stored_tensors(model)[name].masked_fill_(~stays, 0)
        return self._same(self.outputs(model), self.expected)

    def problem(self, cuts: Cuts) -> str:
        """Why a smaller model does not compute the same; "" if it does."""
        twin = copy.deepcopy(self.model)
        _randomise(twin, cuts)
        plain = replace(cuts, biases={})
        random_small = copy.deepcopy(twin)
        if not cuts.names():
            return ""
        try:
            small = self.cut(cuts)
            cut_model(random_small, plain)
            pairs = [(self.outputs(small), self.expected), (self.outputs(random_small), self.outputs(twin))]
        except Exception as error:  # noqa: BLE001  (the user's own forward)
            return f"the forward has sizes written in: {str(error).splitlines()[0]}"
        if not all(self._same(found, expected) for found, expected in pairs):
            return "the forward has sizes or places of channels written in"
        return "for an input of another size the small model would compute something else" if self.unlike(cuts) else ""

    def _same(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        return len(found) == len(expected) and all(_alike(a, b, self.relative) for a, b in zip(found, expected, strict=True))


def _changes(tensors: list[Tensor]) -> Iterator[tuple[set[tuple[int, int]], list[int]]]:
    """What to change of sizes, (tensor, dimension) together, and to what, what is tried first before: one size, one dimension."""
    places = {(number, dim): size for number, one in enumerate(tensors) for dim, size in enumerate(one.shape)}
    batches, others = ([(place, size) for place, size in places.items() if (place[1] == 0) == first] for first in (True, False))
    for size in dict.fromkeys(size for _, size in batches):
        yield {place for place, other in batches if other == size}, [size + 1, 2 * size, *([size // 2] if size > 1 else [])]
    for key in dict.fromkeys([*(("size", size) for _, size in others), *(("dim", place[1]) for place, _ in others)]):
        chosen = {place: size for place, size in others if key in (("size", size), ("dim", place[1]))}
        for size in dict.fromkeys(chosen.values()):
            half = [size // 2] if size > 1 else []  # cheaper, but one of something is often a case of its own
            several, one = [n for n in half if n > 1], [n for n in half if n == 1]
            yield {place for place, other in chosen.items() if other == size}, [*several, 2 * size, size + 1, *one]


def _repeated(tensor: Tensor, number: int, places: set[tuple[int, int]], size: int) -> Tensor:
    """`tensor` with `size` along what is named of its dimensions: numbers that are there, so that indices stay ones."""
    for dim, length in enumerate(tensor.shape):
        if (number, dim) in places and length:
            tensor = tensor.index_select(dim, torch.arange(size) % length)
    return tensor


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _alike(found: Tensor, expected: Tensor, relative: float) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    most = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())) if expected.numel() else 1.0
    return torch.allclose(found, expected, rtol=0, atol=relative * most, equal_nan=True)


def _randomise(model: nn.Module, cuts: Cuts) -> None:
    """Random numbers for all weights, 0 for those that go: whatever the values are, cutting must leave the outputs."""
    generator, buffers = torch.Generator().manual_seed(0), dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan**0.5
            values = values.abs() + 0.5 if name in buffers else values  # a variance, say
            tensor.copy_(values)
            for (own, dim), gone in cuts.gone.items():
                if own == name:
                    _clear(tensor, dim, gone, cuts, name)


def _clear(tensor: Tensor, dim: Dim, gone: Tensor, cuts: Cuts, name: str) -> None:
    if isinstance(dim, int):
        tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
        return
    conv = cuts.convs[name]
    parts = by_group(tensor, conv)
    shape = [conv.groups, -1, 1] if dim == OUT else [conv.groups, 1, -1]
    parts.masked_fill_(gone.view([*shape, *[1] * (parts.dim() - 3)]), 0)
