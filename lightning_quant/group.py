# SPDX-License-Identifier: Apache-2.0
"""Owns what the modules of one prepared layer share: its phase, its quantizers, and when eval runs the deployed layer.

A prepared module keeps its place and its tensors; its class becomes a subclass of its own (`FusedConv2d`), made here, which
reaches the group through the instance's `__dict__`. `fusion.py` and `wrapped.py` say what such classes do.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code
from torch.nn.utils.prune import BasePruningMethod

from lightning_quant.config import ConfigError
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.schedule import Phase
from lightning_quant.targets import owner_of
from lightning_quant.weights import WeightQuantizer

KEY = "_lightning_quant"
# Read in every forward of every layer, where `map` takes half the time of a generator.
_TRAINING = operator.attrgetter("training")
_HOOKS, _PRE_HOOKS = operator.attrgetter("_forward_hooks"), operator.attrgetter("_forward_pre_hooks")


class Strays:
    """How often data took another way than in the recorded forward.

    In training that may be a branch of training alone, which does no harm: where eval forwards were run, theirs count.
    """

    def __init__(self) -> None:
        self.training, self.evaluating, self.trained, self.evaluated = 0, 0, 0, 0

    def count(self, stray: bool, *, training: bool) -> None:
        """Count one tensor."""
        if training:
            self.trained, self.training = self.trained + 1, self.training + stray
        else:
            self.evaluated, self.evaluating = self.evaluated + 1, self.evaluating + stray

    @property
    def number(self) -> int:
        """How many went astray, of `of`."""
        return self.evaluating if self.evaluated else self.training

    @property
    def of(self) -> int:
        """How many tensors were looked at."""
        return self.evaluated or self.trained


class Share:
    """An input whose range another layer moves, and which is read `reads` times in the recorded forward.

    Where the forward branches, what is read may come from elsewhere: then its maker did not run before it.
    """

    def __init__(self, quantizer: ActivationQuantizer, reads: int) -> None:
        self.quantizer, self.reads = quantizer, reads
        self.seen, self.since, self.strays = quantizer.passes, 0, Strays()

    def read(self, *, training: bool) -> None:
        """Count one reading."""
        made, self.seen = self.quantizer.passes > self.seen, self.quantizer.passes
        self.since = 1 if made else self.since + 1
        self.strays.count(self.since > self.reads or self.seen == 0, training=training)


class Group:
    """One prepared layer: its head, and the modules behind it that were fused with it; never in the module tree."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decided: Mapping[str, str] = {}  # by its plan: a text for the layer and each target
        self.phase = Phase()
        self.lean = False  # less is kept for backward
        self.place = 0  # among the layers, in the order of the data
        self.partly = False  # something in the model is not rounded yet: eval mode computes what training computes
        self.simulate = False  # eval mode simulates too, for comparisons
        self.calibrating = False  # eval mode observes too
        self.deployed: nn.Module | None = None  # built at the first eval forward, dropped by train() and eval()
        self.deployed_from: tuple[list[nn.Module], list[Any], list[int]] = ([], [], [])  # see `_now`
        self.integer_pass = False  # this pass runs the deployed layer
        self.observing = False  # this pass: training or calibrating, and the schedule lets ranges move
        self.again = False  # nothing is counted: this pass repeats one for its gradients, or it is compiled
        self.training = True  # this pass is one of training
        self.shares: dict[Any, Share] = {}  # by what the layer calls the input

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "deployed": None, "deployed_from": ([], [], [])}

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Those that this layer uses, in the order of the data; a shared one belongs to several layers."""
        raise NotImplementedError

    @property
    def parameter_quantizers(self) -> list[WeightQuantizer]:
        """Those of the head's parameters."""
        return []

    @property
    def members(self) -> list[nn.Module]:
        """The modules and operators behind the head, in order."""
        return []

    @property
    def ahead(self) -> list[nn.Module]:
        """The modules before the head, in order."""
        return []

    def read_from(self, head: nn.Module) -> list[nn.Module]:
        """The modules that the deployed layer is made from."""
        return [head, *self.ahead, *self.members]

    def tensors(self, head: nn.Module) -> list[Tensor]:
        """What the deployed layer is made from, apart from ranges."""
        return [tensor for module in self.read_from(head) for tensor in (*module.parameters(), *module.buffers())]

    def _now(self, modules: list[nn.Module]) -> tuple[list[Any], list[int]]:
        """(parameters, buffers and children of these modules, how often each grid moved, those of other groups too)."""
        held = [one for m in modules for table in (m._parameters, m._buffers, m._modules) for one in table.values()]
        return held, [one.changes for one in self.quantizers] + [one.changes for one in self.parameter_quantizers]

    def deploy(self, head: nn.Module) -> nn.Module:
        """The layer that replaces the group after training, from its numbers as they are now; owns all its tensors."""
        raise NotImplementedError

    def exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Have `new`, which has taken the place of the member `old` in the model, be the member."""
        role = type(old).__dict__["_made_from"][0]
        leave(old)
        join(self, new, role)
        for key, value in vars(self).items():
            if value is old:
                setattr(self, key, new)
            elif isinstance(value, list):
                value[:] = [new if one is old else one for one in value]
        self.deployed, self.deployed_from = None, ([], [], [])

    def read(self, key: Any) -> None:
        """Count that an input was read whose range may be another layer's, in this pass."""
        if key in self.shares and not self.again:
            self.shares[key].read(training=self.training)

    @property
    def ready(self) -> bool:
        """Whether every quantizer of the group has a range."""
        return all([quantizer.ready for quantizer in self.quantizers])  # noqa: C419  (a compiler follows it)

    @property
    def rounds_all(self) -> bool:
        """Whether the phase has all of the group rounded that ever is."""
        return self.phase.quantize and (self.phase.quantize_activations or not self.quantizers)

    @property
    def rounds_parameters(self) -> bool:
        """Whether this pass rounds parameters: with activations, not before these have ranges; alone, at once."""
        return self.phase.quantize and (self.observing or self.ready or not self.phase.quantize_activations)

    @property
    def traces(self) -> bool:
        """Whether torch.compile can follow this layer in training now, and need not leave it to Python."""
        follows = [*(one.traces for one in self.quantizers), *(one.traces for one in self.parameter_quantizers)]
        return not self.calibrating and all(follows)

    def _moves(self, quantizer: ActivationQuantizer) -> bool:
        """Whether this pass moves a range: calibration does, training not where the method is `ptq` (Nagel et al. 2021)."""
        return self.observing and (self.calibrating or quantizer.spec.method != "ptq")

    def rounded(self, quantizer: ActivationQuantizer, x: Tensor, *, owned: bool = True, applied: bool = True) -> Tensor:
        """One activation in this pass: its range moves, then it is rounded.

        `owned`: this group moves the range; `applied`: the tensor arrives unrounded.
        """
        if not torch.compiler.is_dynamo_compiling():  # compiled code has no counters: each would be compiled anew at every step
            quantizer.passes += owned
        if owned and self._moves(quantizer):
            quantizer.observe(x)
        y = quantizer(x) if applied and self.phase.quantize_activations and quantizer.ready else x
        if quantizer.meter is not None and applied and not self.again and x.numel():
            quantizer.meter(x, y, self.training)
        return y

    def begin(self, head: nn.Module, inputs: list[Tensor]) -> bool:
        """Decide what this pass is; True if the deployed layer runs."""
        if torch.compiler.is_dynamo_compiling():  # compiled is training alone; see `Member`
            self.again, self.training, self.observing, self.integer_pass = True, True, self.phase.observe, False
            self.deployed = None
            return False
        # A forward inside backward is a checkpoint's second one: on the range of the first, which has observed the batch.
        self.again = torch._C._current_graph_task_id() != -1
        self.training = head.training
        self.observing = (head.training or self.calibrating) and self.phase.observe and not self.again
        if not self.again:
            for quantizer in self.quantizers:
                quantizer.settled = not self._moves(quantizer)
        for parameter in self.parameter_quantizers:
            parameter.training = self.training
        self.integer_pass = (
            self.phase.quantize
            and not (self.training or self.partly or self.simulate)
            and self.ready
            and not any(map(_TRAINING, (*self.ahead, *self.members)))
            and not self._wants_gradient(head, inputs)
            and not self._is_watched(head)
        )
        if not self.integer_pass:
            self.deployed = None  # a pass with gradients, or in training: the weights may move after it
        return self.integer_pass

    def _wants_gradient(self, head: nn.Module, inputs: list[Tensor]) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in (*inputs, *self.tensors(head)))

    def _is_watched(self, head: nn.Module) -> bool:
        """Whether a user's hook sits between members and must see the tensors of the float model."""
        chain = [*self.ahead, head, *self.members]
        return any(map(_HOOKS, chain[:-1])) or any(map(watching, filter(_PRE_HOOKS, chain[1:])))

    def deployed_now(self, head: nn.Module) -> nn.Module:
        """The deployed layer; built once, from the parameters and ranges as they are now."""
        modules, before, moved = self.deployed_from
        # Children are compared with the tensors, so that the list of all modules need not be made again.
        held, changes = self._now(modules)
        same = moved == changes and len(before) == len(held) and all(map(operator.is_, before, held))
        shared = set()
        for share in self.shares.values():
            share.read(training=False)
            shared.add(id(share.quantizer))
        for quantizer in self.quantizers:
            quantizer.passes += id(quantizer) not in shared
        if self.deployed is None or not same:  # functional_call, say, puts other tensors in their place
            modules = list(dict.fromkeys(one for module in self.read_from(head) for one in module.modules()))
            self.deployed_from = (modules, *self._now(modules))
            # Outside inference mode: what is built during trainer.test() may be used by a later fit's validation.
            with torch.inference_mode(False), torch.no_grad():
                self.deployed = self.deploy(head)
        return self.deployed


def watching(module: nn.Module) -> bool:
    """Whether a hook sees what goes into a module; pruning has hooks that only mask parameters."""
    return not all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def group_of(module: nn.Module) -> Group | None:
    """The group that `module` belongs to, or None."""
    group: Group | None = module.__dict__.get(KEY)
    return group


class Made:
    """What classes have that are made at run time from a role and the module's own class; pickle makes them again."""

    _made_prefix = ""  # like all names here out of the way of the user's own

    @staticmethod
    def _made_names(base: type[nn.Module]) -> dict[str, Any]:
        """What a class made from `base` has besides."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (_recipe(type(self)),), self.__getstate__()


_CLASSES: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def made_class(role: type, base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` with a role: `FusedConv2d`; where the role has no prefix, of the base's name."""
    if (role, base) not in _CLASSES:
        names: dict[str, Any] = {"__doc__": f"A prepared {base.__name__}.", "_made_from": (role, base)}
        if not role._made_prefix:  # type: ignore[attr-defined]
            names.update(__doc__=base.__doc__, __module__=base.__module__, __qualname__=base.__qualname__)
        names.update(role._made_names(base))  # type: ignore[attr-defined]
        _CLASSES[role, base] = type(f"{role._made_prefix}{base.__name__}", (role, base), names)  # type: ignore[attr-defined]
    return _CLASSES[role, base]


def _recipe(cls: type) -> Any:
    made = cls.__dict__.get("_made_from")
    return cls if made is None else (made[0], _recipe(made[1]))


def _rebuilt(recipe: Any) -> type[nn.Module]:
    cls: type[nn.Module] = made_class(recipe[0], _rebuilt(recipe[1])) if isinstance(recipe, tuple) else recipe
    return cls


def _empty(recipe: Any) -> nn.Module:
    cls = _rebuilt(recipe)
    return cls.__new__(cls)


def followed() -> bool:
    """Whether torch.compile follows this code, or waits to compile the next function it finds."""
    return torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None


class Member(Made, nn.Module):
    """What all members share: the deployed layer is dropped whenever the numbers behind it may change.

    A member's class is made at run time from its role and its own class: `FusedConv2d(Head, Conv2d)`. torch.compile follows it in
    training, with ranges that are tensors. It is left to Python in eval, whose bits are those that ship and no compiler's, and
    where something needs Python: histograms, logging, and a learned scale that has not seen a batch when the compiler comes by
    (it does not come again by itself: run a step, or calibrate, before).
    """

    _made_prefix = "Fused"
    _made_begins = False  # whether this role is the head of its group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The member's part of its group's work."""
        group: Group | None = self.__dict__.get(KEY)
        if group is None:  # a forward made this instance by self.__class__()
            return super().forward(*args, **kwargs)
        if torch.compiler.is_exporting():
            raise ConfigError(
                f"{group.name!r} is prepared for training; what is exported would be its simulation, its ranges would be lost. "
                "Export the converted model: export_model(convert_model(model), path, example_input=x)."
            )
        if not followed() or (torch.compiler.is_dynamo_compiling() and self.training and group.traces):
            return self._made_run(group, *args, **kwargs)
        return self._made_apart(group, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _made_apart(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        return self._made_run(group, *args, **kwargs)

    def _made_run(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _made_own(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the user's class."""
        return super().forward(*args, **kwargs)

    def _made_forget(self) -> None:
        if KEY in self.__dict__:  # an instance that a forward made by self.__class__() has no group
            self.__dict__[KEY].deployed = None

    def train(self, mode: bool = True) -> Any:
        """As ever."""
        self._made_forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._made_forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made_forget()
        super()._load_from_state_dict(*args, **kwargs)


# Where the compiler cannot follow a member it calls it, and would compile this frame by itself, for every layer anew.
skip_code(Member.forward.__code__)


def join(group: Group, module: nn.Module, role: type[Member]) -> None:
    """Give `module` its role in the group; parameters, buffers, names and hooks are not touched."""
    cls = made_class(role, type(module))  # first: a class may refuse to be derived from
    module.__dict__[KEY] = group
    module.__class__ = cls


def drop_bound_forward(module: nn.Module) -> None:
    """Delete a `forward` on the instance that is bound to a class made at run time: Lightning's DDP leaves one behind."""
    bound = module.__dict__.get("forward")
    if getattr(bound, "__self__", None) is module and "forward" in module.__dict__:
        del module.__dict__["forward"]


def leave(module: nn.Module) -> None:
    """Give a member back its own class."""
    if module.__dict__.pop(KEY, None) is not None:
        module.__class__ = type(module).__bases__[1]
        drop_bound_forward(module)


def is_group_head(module: nn.Module) -> bool:
    """Whether `module` begins a prepared group."""
    return isinstance(module, Member) and module._made_begins


def own_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, prepared or not."""
    cls = type(module)
    while issubclass(cls, Made):
        cls = cls.__bases__[1]
    return cls


# -- tensors in place of parameters ------------------------------------------------------------------------------------

_ABSENT = object()


@contextlib.contextmanager
def hidden(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context `module` and its children read `tensors` in place of their parameters of these names.

    Python finds an entry of the instance's `__dict__` before `nn.Module.__getattr__` finds the Parameter. What stood there before
    (a call of the same module around this one, say) stands there again afterwards.
    """
    if not tensors:
        yield
        return
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
