# SPDX-License-Identifier: Apache-2.0
"""Owns which numbers of a model vanish together: one forward, watched operator by operator.

Each tensor has a shadow of units (`units.py`), and what an operator does to its arguments is done to their shadows
(`unit_rules.py`). Elements also carry whether they may depend on the input: a masked channel does not, and is what its bias and
norm make of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.record import split_example, undisturbed
from lightning_quant.targets import tensors_in
from lightning_quant.unit_layers import rule_of
from lightning_quant.unit_rules import Call
from lightning_quant.units import Flow, Shadow, fixed, squeezed


def follow(model: nn.Module, example_input: Any, entry: nn.Module | None = None) -> Flow:
    """Watch one forward of a float model in eval mode, on the host; the model is left as it was.

    Args:
        model: float, on the host.
        example_input: as for `record`, of the model's dtype.
        entry: the submodule to call instead of `model`; names stay those of `model`.

    Raises:
        Exception: whatever the forward raises.
    """
    args, kwargs = split_example(example_input)
    watcher = _Watcher(model)
    for tensor in tensors_in((args, kwargs)):
        watcher.note(tensor, fixed(tensor.dim(), live=True))
    with undisturbed(model), torch.no_grad():
        hooks = [
            register_module_forward_pre_hook(watcher.enter),
            register_module_forward_hook(watcher.leave, always_call=True),
        ]
        try:
            with torch.compiler.set_stance("force_eager"), watcher:
                output = (model if entry is None else entry)(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    for tensor in tensors_in(output):
        watcher.flow.pin(watcher.flow.lifted(watcher.shadow(tensor)), "the model returns it")
    return watcher.flow


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _places(tensor: Tensor) -> Tensor:
    """Where the elements of a tensor lie in its memory."""
    places = torch.tensor(int(tensor.storage_offset()))
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        places = places + (torch.arange(size) * stride).view([-1, *[1] * (tensor.dim() - dim - 1)])
    return places


class _Watcher(TorchDispatchMode):
    """Gives every tensor of a forward its shadow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.shadows: dict[int, Shadow] = {}
        self.alive: list[Tensor] = []  # a tensor freed during the forward could give its id to another one
        self.sharing: dict[int, list[Tensor]] = {}  # storage -> tensors in it
        self.stale: set[int] = set()  # written to through another tensor
        self.names = {id(module): name for name, module in model.named_modules()}
        self.path: list[str] = []
        for name, tensor in stored_tensors(model).items():
            self.flow.shapes[name] = tuple(tensor.shape)
            plain = fixed(tensor.dim(), live=False)
            self.note(tensor, Shadow(plain.units, plain.live, name, torch.arange(tensor.numel()).view(tensor.shape)))

    def enter(self, module: nn.Module, *_: Any) -> None:
        if id(module) in self.names:
            self.path.append(self.names[id(module)])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self.names:
            self.path.pop()
            self.flow.boundaries.setdefault(self.names[id(module)], (self._seen(args), self._seen(output)))

    def _seen(self, value: Any) -> list[Tensor | None]:
        shadows = [self.shadows.get(id(tensor)) for tensor in tensors_in(value)]
        return [None if shadow is None else shadow.units for shadow in shadows]

    def note(self, tensor: Tensor, shadow: Shadow) -> None:
        self.shadows[id(tensor)] = shadow
        self.stale.discard(id(tensor))
        self.alive.append(tensor)
        sharing = self.sharing.setdefault(tensor.untyped_storage()._cdata, [])
        if not any(tensor is other for other in sharing):
            sharing.append(tensor)

    def _keep_rectangular(self, units: Tensor) -> None:
        if sum(size > 1 for size in units.shape) != 1 and bool(units.any()):  # along one dimension any cut is a cut
            self.flow.tensors.setdefault((tuple(units.shape), units.numpy().tobytes()), (units, self.where))

    def _written(self, tensor: Tensor, shadow: Shadow) -> None:
        """Have the other tensors in the memory of one that was written to know what stands there now."""
        places = _places(tensor)
        for other in self.sharing[tensor.untyped_storage()._cdata]:
            known = self.shadows[id(other)]
            if other is tensor:
                continue
            if known.stored or shadow.stored or other.dtype != tensor.dtype:
                self.stale.add(id(other))
                continue
            size = int(max(places.max(), (theirs := _places(other)).max())) + 1
            new = torch.full((size,), -1).index_put_((places.flatten(),), shadow.units.expand(tensor.shape).flatten())[theirs]
            live = torch.zeros(size, dtype=torch.bool).index_put_((places.flatten(),), shadow.live.expand(tensor.shape).flatten())
            units = squeezed(torch.where(new < 0, known.units.expand(other.shape), new))
            self.note(other, Shadow(units, squeezed(torch.where(new < 0, known.live.expand(other.shape), live[theirs]))))

    @property
    def where(self) -> str:
        return self.path[-1] if self.path and self.path[-1] else "the forward"

    def shadow(self, tensor: Tensor) -> Shadow:
        """What is known of a tensor; of one that came about unseen (`.data`), what is known of its memory."""
        known = self.shadows.get(id(tensor))
        if known is not None and id(tensor) not in self.stale:
            return known
        others = self.sharing.get(tensor.untyped_storage()._cdata, [])
        for other in others:
            same = other.shape == tensor.shape and other.stride() == tensor.stride() and other.data_ptr() == tensor.data_ptr()
            if same and id(other) not in self.stale:
                return self.shadows[id(other)]
        for other in others:
            self.flow.pin(self.shadows[id(other)], f"{self.where} reads it after it was written to through a view")
        return fixed(tensor.dim(), live=bool(others))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = list(tensors_in((args, kwargs)))
        call = Call(
            flow=self.flow,
            where=self.where,
            func=func,
            args=args,
            kwargs=kwargs,
            read=read,
            shadows={id(tensor): self.shadow(tensor) for tensor in read},
            before={id(tensor): tensor.clone() for tensor in read} if func._schema.is_mutable else {},
        )
        if not func.is_view and call.name != "copy_":  # a tensor that is written part by part has holes meanwhile
            for tensor in read[1:] if func._schema.is_mutable else read:
                self._keep_rectangular(call.raw(tensor).units)
        call.result = result = func(*args, **kwargs)
        made = rule_of(func)(call)
        for number, output in enumerate(tensors_in(result)):
            shadow = made[min(number, len(made) - 1)]
            if shadow.units.dim() != output.dim():
                shadow = fixed(output.dim(), live=True)
            self.note(output, shadow)
            if func._schema.is_mutable:
                self._written(output, shadow)
        return result
