# SPDX-License-Identifier: Apache-2.0
"""Owns taps: hooks that note what goes in and out of modules, for the length of a forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.targets import Arguments, is_input, output_key, outputs_of

Place = tuple[str, str]  # a module's name and a target
Seen = dict[Place, list[Tensor]]  # what was there in each call of the module


class Taps:
    """Hooks that note tensors of one model while `inside`; they are in place between `open` and `close` only.

    A tensor that is written over later is noted as a copy: what was there when it was made counts. Whether it is shows in the
    first batch (`settle`); compiled code always copies.

    Args:
        places: the module of each place.
    """

    def __init__(self, places: Mapping[Place, nn.Module]) -> None:
        self.places = places
        self.arguments = {key: Arguments(type(module)).find(key[1]) for key, module in places.items() if is_input(key[1])}
        self.inside = False
        self.seen: Seen = {}
        self.missing: dict[Place, str] = {}  # what was returned in place of a target
        self.several: dict[Place, tuple[str, ...]] = {}  # the tensors that were returned together, by target, if there were more
        self.copies: dict[Place, bool] = {}
        self.first: list[tuple[Place, Tensor, int, list[Tensor], int]] = []  # (place, tensor, its version, list, where in it)
        self.handles: list[Any] = []

    def open(self) -> None:
        """Put the hooks in place."""
        for key, module in self.places.items():
            if is_input(key[1]):
                before = functools.partial(self._before, key)
                self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                self.handles.append(module.register_forward_hook(functools.partial(self._after, key)))

    def close(self) -> None:
        """Remove them, and forget what was noted."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen, self.first, self.inside = [], {}, [], False

    def begin(self) -> None:
        """A forward begins."""
        self.seen, self.inside = {}, True

    def end(self) -> Seen:
        """It is over: what was noted."""
        self.inside = False
        seen, self.seen = self.seen, {}
        return seen

    def settle(self) -> None:
        """Before what was noted is used: learn which tensors were written over by now; of the others no copy is kept.

        A copy passes its gradient on later than the tensor itself does. Sums of gradients, and so a fit that is resumed, whose
        first batch is a later one of the fit that was not, would then differ in their last bits.
        """
        for key, tensor, version, *_ in self.first:
            self.copies[key] = self.copies.get(key, False) or tensor._version != version
        for key, tensor, _, noted, place in self.first:
            if not self.copies[key]:
                noted[place] = tensor
        self.first = []

    def _before(self, key: Place, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside:
            argument = self.arguments[key]
            self._note(key, None if argument is None else argument.read(args, kwargs), {})

    def _after(self, key: Place, _: nn.Module, __: Any, result: Any) -> None:
        if self.inside:
            outputs = outputs_of(result)
            name = output_key(key[1], outputs)
            if len(outputs) > 1:
                self.several[key] = tuple(name for name, one in outputs.items() if isinstance(one, Tensor))
            self._note(key, None if name is None else outputs[name], outputs)

    def _note(self, key: Place, value: Any, outputs: Mapping[str, Any]) -> None:
        if not isinstance(value, Tensor):
            self.missing[key] = ", ".join(outputs) if value is None and outputs else f"a {type(value).__name__}"
            return
        if torch.compiler.is_dynamo_compiling():
            value = value.clone()
        elif self.copies.get(key, True):
            if key not in self.copies:
                noted = self.seen.setdefault(key, [])
                self.first.append((key, value, value._version, noted, len(noted)))
            value = value.clone()
        self.seen.setdefault(key, []).append(value)
