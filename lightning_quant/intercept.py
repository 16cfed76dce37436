# SPDX-License-Identifier: Apache-2.0
"""Owns operators at run time: what a forward calls as a function is caught where it is called, rounded, fused or skipped.

The module whose forward calls planned operators (their owner) gets a subclass of its own class, of the same name, whose forward
runs under a `TorchFunctionMode`. An operator is known by its place in the code (sites.py), so that neither a branch that
only training takes nor an operator of a child is mistaken for it; one that was not recorded stays float, and that is said.
The user's forward is neither rewritten nor traced.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lightning_quant.fusion import Ending
from lightning_quant.group import KEY, Made, drop_bound_forward, is_group_head, made_class, own_class
from lightning_quant.integer import Rounding, Stamp, carrying, widened
from lightning_quant.quantizers import ActivationQuantizer, Grid
from lightning_quant.sites import MADE_HERE, SHARED, Operator, Place, Site, always, name_of, place, with_tensors
from lightning_quant.targets import tensors_in, with_outputs

SITES = "_lightning_quant_sites"
Round = tuple[ActivationQuantizer, bool, bool]  # (quantizer, whether this group moves its range, whether it is to be rounded)


class OperatorGroup(Ending):
    """A planned operator, and the activation behind it that is fused with it.

    Args:
        name, activation, inner, output: as in `Ending`; without an activation `outputs` rounds.
        inputs: by the position of the tensor among those that the operator reads.
        outputs: by output target.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Mapping[int, Round],
        outputs: Mapping[str, Round],
        activation: nn.Module | None = None,
        output: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__(name, activation=activation, inner=None, output=output)
        self.inputs, self.outputs = dict(inputs), dict(outputs)

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Of what is read, then of what is made."""
        end = [] if self.output is None else [self.output]
        return [*(quantizer for quantizer, *_ in self.inputs.values()), *(q for q, *_ in self.outputs.values()), *end]

    @property
    def members(self) -> list[nn.Module]:
        """The activation."""
        return [] if self.activation is None else [self.activation]

    def read_from(self, head: nn.Module) -> list[nn.Module]:  # noqa: ARG002
        """The activation: an operator has no parameters."""
        return self.members

    def _is_watched(self, head: nn.Module) -> bool:  # noqa: ARG002
        ends = [*self.members, *([] if self.stands_for is None else [self.stands_for])]
        return any(module._forward_pre_hooks for module in ends)

    def _round(self, quantizer: ActivationQuantizer, owned: bool, applied: bool) -> Callable[[Tensor], Tensor]:
        def act(x: Tensor) -> Tensor:
            return self.rounded(quantizer, x, owned=owned, applied=applied)

        return act

    def run(self, owner: nn.Module, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operator on rounded tensors, its result rounded unless an activation follows."""
        tensors = list(tensors_in((args, kwargs)))
        if self.begin(owner, tensors):
            layer = self.deployed_now(owner)
            assert isinstance(layer, RoundedOperator)
            result = layer.run(func, args, kwargs)
            return self.hand_on(result, 0, True) if isinstance(result, Tensor) else result
        acts = {position: self._round(*how) for position, how in self.inputs.items()}
        done: dict[tuple[int, int], Tensor] = {}
        for position, act in acts.items():
            if position < len(tensors) and tensors[position].is_floating_point():
                self.read(position)
                key = id(tensors[position]), id(self.inputs[position][0])
                done[key] = done[key] if key in done else act(tensors[position])
                tensors[position] = done[key]
        args, kwargs = with_tensors((args, kwargs), tensors)
        made = func(*args, **kwargs)
        made = with_outputs(made, {target: self._round(*how) for target, how in self.outputs.items()})
        return self.hand_on(made, 0, False) if isinstance(made, Tensor) else made

    def deploy(self, head: nn.Module) -> nn.Module:  # noqa: ARG002
        """The roundings around the operator."""
        return RoundedOperator(self)


class RoundedOperator(nn.Module):
    """An operator as it is deployed: rounded tensors in, float arithmetic, rounded tensors out.

    Where it is called in the forward of its owner stays the user's; `run` is called there.
    """

    def __init__(self, group: OperatorGroup) -> None:
        super().__init__()
        self.positions = [position for position, how in group.inputs.items() if how[2]]
        self.rounds_in = nn.ModuleList(Rounding(group.inputs[position][0].grid()) for position in self.positions)
        self.targets = [target for target, how in group.outputs.items() if how[2]]
        grids = [group.outputs[target][0].grid() for target in self.targets]
        self.rounds_out = nn.ModuleList(Rounding(grid) for grid in grids)
        self.clamp = group.clamp
        self.end: Rounding | None = None
        self.stamp = group.stamp if isinstance(group.activation, Operator) else None
        if group.output is not None:
            grid = group.output.grid()
            self.end = Rounding(grid, clip=True)
            if isinstance(grid, Grid):
                self.clamp = None  # the ends of the grid do it
        self.eval()

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Round, call, round."""
        tensors = list(tensors_in((args, kwargs)))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        if torch.is_autocast_enabled(device):  # validation must compute what is shipped, in float32
            with torch.autocast(device, enabled=False):
                args, kwargs = with_tensors((args, kwargs), list(map(widened, tensors)))
                return self.run(func, args, kwargs)
        for position, act in zip(self.positions, self.rounds_in, strict=True):
            if position < len(tensors) and tensors[position].is_floating_point():
                tensors[position] = carrying(act)(tensors[position])
        args, kwargs = with_tensors((args, kwargs), tensors)
        made = func(*args, **kwargs)
        if self.clamp is not None:
            made = made.clamp(*self.clamp)
        if self.end is not None:
            made = carrying(self.end)(made)
        made = with_outputs(made, dict(zip(self.targets, map(carrying, self.rounds_out), strict=True)))
        return made if self.stamp is None else self.stamp.on(made)

    def extra_repr(self) -> str:
        """What is rounded."""
        return f"{len(self.positions)} inputs, {len(self.targets) + (self.end is not None)} outputs, float arithmetic"


# -- what happens at a site -------------------------------------------------------------------------------------------


class Head:
    """The site of a planned operator."""

    def __init__(self, group: OperatorGroup) -> None:
        self.group = group

    def __call__(self, owner: nn.Module, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operator's result."""
        return self.group.run(owner, func, args, kwargs)


class End:
    """The site of an operator that is the activation of a group."""

    def __init__(self, group: Ending, operator: Operator) -> None:
        self.group, self.operator = group, operator

    def expects(self, x: Any) -> bool:
        """Whether x is what this activation is to read; wherever it is called, the call is this one."""
        return self.group.expects(len(self.group.members) - 1, x)

    def __call__(self, owner: nn.Module, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """The group's end."""
        (x,) = tensors_in((args, kwargs))
        arrival = self.group.arrive(len(self.group.members) - 1, x)
        if arrival == "integer":
            self.group.count(not self.operator.is_called_so(args, kwargs))
            return x
        if arrival == "foreign":
            return func(*args, **kwargs)
        if not self.operator.is_called_so(args, kwargs):  # another slope or other ends than were recorded, and will be deployed
            self.group.count(True)
            return func(*args, **kwargs)

        def own(x: Tensor) -> Tensor:
            filled, named = with_tensors((args, kwargs), [x])
            y: Tensor = func(*filled, **named)
            return y

        rounded = self.group.finish(self.operator, x, own)
        return func(*args, **kwargs) if rounded is None else rounded


class Done:
    """The site of an activation in a deployed model: the layer before it has done its work, if it was that layer.

    `stamp`: what that layer puts on its results. `loose`: dropout stands between them, so that the stamp may be lost.
    """

    def __init__(self, stamp: Stamp, loose: bool) -> None:
        self.stamp, self.loose = stamp, loose

    def expects(self, x: Any) -> bool:
        """Whether x is that layer's result; wherever the activation is called, the call is this one."""
        return self.stamp.is_on(x)

    def __call__(self, owner: nn.Module, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """What it was given, or the activation of something else, which another branch brought."""
        x = next(tensors_in((args, kwargs)))
        done = self.loose or self.expects(x)
        self.stamp.off(x)  # the forward may call the same activation on its result
        return x if done else func(*args, **kwargs)


class Deployed:
    """The site of an operator in a deployed model. `child`: its RoundedOperator, or that one's name in the owner."""

    def __init__(self, child: str | nn.Module) -> None:
        self.child = child

    def __call__(self, owner: nn.Module, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operator's result."""
        layer = owner._modules[self.child] if isinstance(self.child, str) else self.child
        assert isinstance(layer, RoundedOperator)
        return layer.run(func, args, kwargs)


class Sites:
    """What happens where in the forward of one owner."""

    def __init__(self) -> None:
        self.acts: dict[tuple[str, Place, int], Any] = {}
        self.ops: set[str] = set()
        self.float: set[tuple[str, Place, int]] = set()  # where the plan leaves an operator as it is
        self.names: dict[tuple[str, Place, int], str] = {}  # what the plan calls them
        self.told: set[str] = set()
        self.ends: dict[str, list[Any]] = {}  # activations by operator, which are known by what they read
        self.made_here = False  # whether one of them is in a module that the forward makes
        self.shared = False  # whether one of them is in a shared activation

    def add(self, site: Site, act: Any, name: str = "") -> None:
        """Have `act` called at `site`; `name`: of its operator."""
        self._put((site.op, site.place, site.repeat), act)
        self._look(site, name)

    def exchange(self, new: Callable[[Any], Any]) -> None:
        """Have what `new` makes of an act happen in its place."""
        self.ends = {}
        for key, act in list(self.acts.items()):
            self._put(key, new(act))

    def _put(self, key: tuple[str, Place, int], act: Any) -> None:
        self.acts[key] = act
        self.ops.add(key[0])
        if isinstance(act, End | Done):
            self.ends.setdefault(key[0], []).append(act)

    def leave(self, site: Site, name: str = "") -> None:
        """Note that a recorded operator stays as it is, unless it is planned."""
        self.float.add((site.op, site.place, site.repeat))
        self._look(site, name)

    def _look(self, site: Site, name: str) -> None:
        if name:
            self.names[site.op, site.place, site.repeat] = name
        self.shared |= bool(site.through)
        self.made_here |= MADE_HERE in site.place and not site.through

    def act(self, op: str, where: Place, repeat: int, args: Any, kwargs: Any) -> Any:
        """What is to happen at a call, or None: by what it reads, where that is known, else by its place."""
        ends = self.ends.get(op)
        if ends:
            x = next(tensors_in((args, kwargs)), None)
            by_reading = next((end for end in ends if end.expects(x)), None)
            if by_reading is not None:
                return by_reading
        return self.acts.get((op, where, repeat))

    def tell(self, owner: nn.Module, op: str) -> None:
        """Say once that an operator stays float that was not recorded."""
        if op not in self.told:
            self.told.add(op)
            warnings.warn(
                f"the forward of {type(owner).__name__} calls {op!r} where the recorded forward did not; there it stays float.",
                stacklevel=4,
            )


# -- catching ---------------------------------------------------------------------------------------------------------


class _Call:
    """One forward of an owner that is under way."""

    def __init__(self, owner: nn.Module, sites: Sites) -> None:
        self.owner, self.sites = owner, sites
        self.counts: Counter[tuple[str, Place]] = Counter()
        self.known = self.holds if sites.made_here else self.is_one_itself if sites.shared else always

    def is_one_itself(self, module: Any) -> bool:
        """Whether a module that is called on the way is no shared activation, whose calls count as its function's."""
        return SHARED not in module.__dict__

    def holds(self, module: Any) -> bool:
        """Whether it is a part of the owner besides, not one that its forward has made."""
        return self.is_one_itself(module) and any(one is module for one in self.owner.modules())


class _Interceptor(TorchFunctionMode):
    """One for all owners whose forwards are under way in a thread; the innermost one's operators are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self.calls[-1]
        op = name_of(func)
        if op in call.sites.ops and (where := place(_forward_under.__code__, known=call.known)) is not None:
            repeat = call.counts[op, where]
            call.counts[op, where] += 1
            act = call.sites.act(op, where, repeat, args, kwargs)
            if act is not None:
                return act(call.owner, func, args, kwargs)
            computes = any(tensor.is_floating_point() for tensor in tensors_in((args, kwargs)))
            if computes and (op, where, repeat) not in call.sites.float:
                call.sites.tell(call.owner, op)
        return func(*args, **kwargs)


_THREAD = threading.local()


def _forward_under(call: _Call, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`forward`, with its operators caught."""
    mode: _Interceptor | None = getattr(_THREAD, "mode", None)
    if mode is not None and mode in _get_current_function_mode_stack():
        mode.calls.append(call)
        try:
            return forward(*args, **kwargs)
        finally:
            mode.calls.pop()
    before, _THREAD.mode = mode, _Interceptor()
    _THREAD.mode.calls.append(call)
    try:
        with _THREAD.mode:
            return forward(*args, **kwargs)
    finally:
        _THREAD.mode = before


class Owner(Made):
    """The role of a module whose forward calls planned operators."""

    @staticmethod
    def _made_names(base: type[nn.Module]) -> dict[str, Any]:
        """A forward with the signature of the module's own: exporters name inputs by it, and arguments are bound to it."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self: Owner, *args: Any, **kwargs: Any) -> Any:
            return Owner.forward(self, *args, **kwargs)

        forward.__signature__, forward.__doc__ = inspect.signature(base.forward), base.forward.__doc__
        return {"forward": forward}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its operators caught."""
        sites: Sites | None = self.__dict__.get(SITES)
        own: Callable[..., Any] = super().forward  # type: ignore[misc]
        if sites is None:
            return own(*args, **kwargs)
        return _forward_under(_Call(self, sites), own, args, kwargs)  # type: ignore[arg-type]


def own(module: nn.Module) -> Sites:
    """Make `module` the owner of operators, if it is none yet, and return its sites."""
    if SITES not in module.__dict__:
        cls = made_class(Owner, type(module))
        module.__dict__[SITES] = Sites()
        module.__class__ = cls
    sites: Sites = module.__dict__[SITES]
    return sites


def disown(module: nn.Module) -> None:
    """Give an owner back its own class."""
    if module.__dict__.pop(SITES, None) is not None:
        module.__class__ = type(module).__bases__[1]
        drop_bound_forward(module)


def is_prepared(model: nn.Module) -> bool:
    """Whether any layer or operator of `model` is prepared."""
    return any(is_group_head(module) or SITES in module.__dict__ for module in model.modules())


def prepared_elsewhere(model: nn.Module) -> str | None:
    """The name of a module that belongs to a group of another prepared model; None if there is none."""
    held = (name for name, module in model.named_modules() if KEY in module.__dict__ or SHARED in module.__dict__)
    return None if is_prepared(model) else next(held, None)


def is_owner(module: nn.Module) -> bool:
    """Whether operators of `module` are planned."""
    return SITES in module.__dict__


def operator_groups(module: nn.Module) -> list[OperatorGroup]:
    """The planned operators of a module."""
    sites: Sites | None = module.__dict__.get(SITES)
    return [] if sites is None else [act.group for act in sites.acts.values() if isinstance(act, Head)]


def operators_aside(module: nn.Module) -> list[nn.Module]:
    """The deployed operators of an owner that are not its children."""
    sites: Sites | None = module.__dict__.get(SITES)
    acts = [] if sites is None else sites.acts.values()
    return [act.child for act in acts if isinstance(act, Deployed) and isinstance(act.child, nn.Module)]


def deploy_sites(owner: nn.Module) -> None:
    """Make the owner in a converted copy independent of groups: a `RoundedOperator` for each planned operator, as a child."""
    sites: Sites = owner.__dict__[SITES]
    code = getattr(own_class(owner).forward, "__code__", None)
    walks = code is not None and {"children", "named_children", "modules", "named_modules", "_modules"} & set(code.co_names)
    iterates = bool(walks) or isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)  # it would call what it finds

    def deployed(act: Any) -> Any:
        if isinstance(act, End):
            return Done(act.group.stamp, act.group.loose)
        layer, child = act.group.deploy(owner), act.group.name.rpartition(".")[2]
        if iterates:
            return Deployed(layer)
        while hasattr(owner, child):
            child += "_"
        owner.add_module(child, layer)
        return Deployed(child)

    sites.exchange(deployed)
