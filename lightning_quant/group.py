# SPDX-License-Identifier: Apache-2.0
"""Owns what the modules of one prepared layer share: its phase, its quantizers, and when eval runs the deployed layer.

A prepared module keeps its place and its tensors; its class becomes a subclass of its own (`FusedConv2d`), made here, which
reaches the group through the instance's `__dict__`. `fusion.py` and `wrapped.py` say what such classes do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.schedule import Phase
from lightning_quant.targets import owner_of

KEY = "_lightning_quant"


class Group:
    """One prepared layer: its head, and the modules behind it that were fused with it; never in the module tree."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.phase = Phase()
        self.simulate = False  # eval mode simulates too, for comparisons
        self.deployed: nn.Module | None = None  # built at the first eval forward, dropped by train() and eval()
        self.deployed_from: list[Any] = []  # what it was built on: parameters, buffers, and ranges, which may be another group's
        self.integer_pass = False  # this pass runs the deployed layer
        self.observing = False  # this pass: training, and the schedule lets ranges move

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "deployed": None, "deployed_from": []}

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Those that this layer uses, in the order of the data; a shared one belongs to several layers."""
        raise NotImplementedError

    @property
    def members(self) -> list[nn.Module]:
        """The modules behind the head, in order."""
        return []

    def deploy(self, head: nn.Module) -> nn.Module:
        """The layer that replaces the group after training, from its numbers as they are now; owns all its tensors."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether every quantizer of the group has a range."""
        return all(quantizer.ready for quantizer in self.quantizers)

    def begin(self, head: nn.Module, inputs: list[Tensor]) -> bool:
        """Decide what this pass is; True if the deployed layer runs."""
        # A forward inside backward is a checkpoint's second one: on the range of the first, which has observed the batch.
        again = torch._C._current_graph_task_id() != -1
        self.observing = head.training and self.phase.observe and not again
        self.integer_pass = (
            not any(module.training for module in (head, *self.members))
            and self.phase.quantize
            and not self.simulate
            and self.ready
            and not self._wants_gradient(head, inputs)
            and not self._is_watched(head)
        )
        if not self.integer_pass:
            self.deployed = None  # a pass with gradients, or in training: the weights may move after it
        return self.integer_pass

    def _wants_gradient(self, head: nn.Module, inputs: list[Tensor]) -> bool:
        if not torch.is_grad_enabled():
            return False
        modules = (head, *self.members)
        return any(x.requires_grad for x in inputs) or any(p.requires_grad for m in modules for p in m.parameters())

    def _is_watched(self, head: nn.Module) -> bool:
        """Whether a user's hook sits between members and must see the tensors of the float model."""
        members = self.members
        if not members:
            return False
        inner = [head._forward_hooks, *(module._forward_pre_hooks for module in members)]
        return any(inner) or any(module._forward_hooks for module in members[:-1])

    def deployed_now(self, head: nn.Module) -> nn.Module:
        """The deployed layer; built once, from the parameters and ranges as they are now."""
        modules = (head, *self.members)
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        numbers = [*tensors, *(quantizer.changes for quantizer in self.quantizers)]
        before = self.deployed_from
        same = len(before) == len(numbers) and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(before, numbers, strict=True)
        )
        if self.deployed is None or not same:  # functional_call, say, puts other tensors in their place
            self.deployed_from = numbers
            # Outside inference mode: what is built during trainer.test() may be used by a later fit's validation.
            with torch.inference_mode(False), torch.no_grad():
                self.deployed = self.deploy(head)
        return self.deployed


def group_of(module: nn.Module) -> Group | None:
    """The group that `module` belongs to, or None."""
    group: Group | None = module.__dict__.get(KEY)
    return group


class Member(nn.Module):
    """What all members share: the deployed layer is dropped whenever the numbers behind it may change.

    A member's class is made at run time from its role and its own class: `FusedConv2d(Head, Conv2d)`. torch.compile runs
    members as they are: ranges are host numbers that change with every batch.
    """

    prefix = "Fused"
    begins = False  # whether this role is the head of its group

    def _forget(self) -> None:
        if KEY in self.__dict__:  # an instance that a forward made by self.__class__() has no group
            self.__dict__[KEY].deployed = None

    def train(self, mode: bool = True) -> Any:
        """As ever."""
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickle finds it again by what it was made from.
        return _empty_member, type(self).__bases__, self.__getstate__()


_CLASSES: dict[tuple[type[Member], type[nn.Module]], type[nn.Module]] = {}


def _member_class(role: type[Member], base: type[nn.Module]) -> type[nn.Module]:
    if (role, base) not in _CLASSES:
        doc = f"A prepared {base.__name__}."
        _CLASSES[role, base] = type(f"{role.prefix}{base.__name__}", (role, base), {"__doc__": doc})
    return _CLASSES[role, base]


def _empty_member(role: type[Member], base: type[nn.Module]) -> nn.Module:
    cls = _member_class(role, base)
    return cls.__new__(cls)


def join(group: Group, module: nn.Module, role: type[Member]) -> None:
    """Give `module` its role in the group; parameters, buffers, names and hooks are not touched."""
    cls = _member_class(role, type(module))  # first: a class may refuse to be derived from
    module.__dict__[KEY] = group
    module.__class__ = cls


def leave(module: nn.Module) -> None:
    """Give a member back its own class."""
    if module.__dict__.pop(KEY, None) is not None:
        module.__class__ = type(module).__bases__[1]


def is_group_head(module: nn.Module) -> bool:
    """Whether `module` begins a prepared group."""
    return isinstance(module, Member) and module.begins


def own_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, prepared or not."""
    return type(module).__bases__[1] if isinstance(module, Member) else type(module)


# -- tensors in place of parameters ------------------------------------------------------------------------------------

_ABSENT = object()


@contextlib.contextmanager
def hidden(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context `module` and its children read `tensors` in place of their parameters of these names.

    Python finds an entry of the instance's `__dict__` before `nn.Module.__getattr__` finds the Parameter. What stood there before
    (a call of the same module around this one, say) stands there again afterwards.
    """
    places = [(*owner_of(module, name), tensor) for name, tensor in tensors.items()]
    before = [owner.__dict__.get(name, _ABSENT) for owner, name, _ in places]
    recurrent = [owner for owner in dict.fromkeys(owner for owner, _, _ in places) if isinstance(owner, nn.RNNBase)]
    flat = [owner._flat_weights for owner in recurrent]
    try:
        for owner, name, tensor in places:
            owner.__dict__[name] = tensor
        for layer, weights in zip(recurrent, flat, strict=True):  # they read a list that they keep beside their parameters
            names = layer._flat_weights_names
            layer.__dict__["_flat_weights"] = [layer.__dict__.get(n, w) for n, w in zip(names, weights, strict=True)]
        yield
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
        for layer, weights in zip(recurrent, flat, strict=True):
            layer.__dict__["_flat_weights"] = weights
