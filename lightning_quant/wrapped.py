# SPDX-License-Identifier: Apache-2.0
"""Owns quantized modules of any type: their own forward, run on rounded arguments and rounded parameters.

For the length of a call the rounded parameters stand in the instance's `__dict__`, where Python looks before
`nn.Module.__getattr__` finds the Parameter: the user's forward reads them by the names it knows, gradients flow through the
rounding to the Parameters, and nothing is renamed or copied. Deployed, the parameters are integers and the forward reads
what they stand for, in float arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.group import Group, Member, hidden, leave, own_class
from lightning_quant.integer import KeepsDtypes, Rounding, carrying, integer_tensor, widened
from lightning_quant.operators import dequantized_weight
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.targets import Argument, on_tensors, owner_of, parameter_of, tensors_in, with_outputs
from lightning_quant.weights import WeightQuantizer

Round = Callable[[Tensor], Tensor]
_ONE_AT_A_TIME = threading.RLock()  # parameters are exchanged in the module itself, which threads of a server may share


def _rounded_call(
    forward: Callable[..., Any],
    inputs: Sequence[tuple[Argument, Round]],
    outputs: Mapping[str, Round],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """forward on rounded arguments, its results rounded; two arguments that are one tensor stay one."""
    done: list[tuple[Tensor, Round, Tensor]] = []
    for argument, act in inputs:
        value = argument.read(args, kwargs)
        if isinstance(value, Tensor) and value.is_floating_point():
            rounded = next((result for one, by, result in done if one is value and by is act), None)
            if rounded is None:
                rounded = act(value)
                done.append((value, act, rounded))
            args, kwargs = argument.replaced(args, kwargs, rounded)
    if torch.compiler.is_dynamo_compiling():  # in training: the kernel below is one of eval
        return with_outputs(forward(*args, **kwargs), outputs)
    # torch's fused attention kernel takes other sums in eval mode than in training, and reads weights past their module.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        return with_outputs(forward(*args, **kwargs), outputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class ModuleGroup(Group):
    """One module of any type with quantized targets.

    Args:
        name: the module's name in the model.
        inputs: (argument, quantizer, whether this group moves its range, whether the tensor arrives unrounded).
        parameters: grid by parameter name, as in `named_parameters()`.
        outputs: (quantizer, whether this group moves its range, whether it is to be rounded) by output target.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[tuple[Argument, ActivationQuantizer, bool, bool]],
        parameters: Mapping[str, WeightQuantizer],
        outputs: Mapping[str, tuple[ActivationQuantizer, bool, bool]],
    ) -> None:
        super().__init__(name)
        self.inputs, self.parameters, self.outputs = list(inputs), dict(parameters), dict(outputs)

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Of the arguments, then of the outputs."""
        return [quantizer for _, quantizer, _, _ in self.inputs] + [quantizer for quantizer, _, _ in self.outputs.values()]

    @property
    def parameter_quantizers(self) -> list[WeightQuantizer]:
        """Of the parameters."""
        return list(self.parameters.values())

    def rounding(self, quantizer: ActivationQuantizer, owned: bool, applied: bool) -> Round:
        """What happens to one activation in this pass: its range moves, then it is rounded."""

        def act(x: Tensor) -> Tensor:
            return self.rounded(quantizer, x, owned=owned, applied=applied)

        return act

    def simulated(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The user's forward on fake-quantized tensors, with gradients."""
        for index, (argument, *_) in enumerate(self.inputs):
            if isinstance(argument.read(args, kwargs), Tensor):
                self.read(index)
        rounds: dict[int, Round] = {}
        inputs = [
            (argument, rounds.setdefault(id(quantizer), self.rounding(quantizer, owned, applied)))
            for argument, quantizer, owned, applied in self.inputs
        ]
        outputs = {target: self.rounding(*how) for target, how in self.outputs.items()}
        tensors: dict[str, Tensor] = {}
        if self.rounds_parameters:
            tensors = {name: quantizer.rounded(_parameter(head, name)) for name, quantizer in self.parameters.items()}
        with hidden(head, tensors):
            return _rounded_call(_own_forward(head), inputs, outputs, args, kwargs)

    def deploy(self, head: nn.Module) -> nn.Module:
        """The integers of this module around its forward; the module itself stays outside."""
        return QuantizedModule(self, head)


def _own_forward(head: nn.Module) -> Callable[..., Any]:
    """The forward of the user's class, of a prepared module."""
    assert isinstance(head, Member)
    forward: Callable[..., Any] = super(Member, head).forward
    return forward


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = parameter_of(*owner_of(module, name))
    assert parameter is not None
    return parameter


class WrappedModule(Member):
    """The role of a module that is quantized around its own forward."""

    _made_prefix = "Quantized"
    _made_begins = True

    def _made_run(self, group: ModuleGroup, *args: Any, **kwargs: Any) -> Any:
        passed = [*args, *kwargs.values()]
        if group.begin(self, [value for value in passed if isinstance(value, Tensor)]):
            return group.deployed_now(self)(*args, **kwargs)
        return group.simulated(self, args, kwargs)


class QuantizedModule(KeepsDtypes):
    """A module of any type as it is deployed: integer parameters, rounded arguments and outputs, float arithmetic.

    Called with what the module's own forward takes. A parameter `p1` is stored as the buffers `p1` (integers), `p1_scale` and,
    where the grid is not symmetric, `p1_zero_point`; dots in names become `__`.
    """

    mode = "integer"  # see `set_mode`

    def __init__(self, group: ModuleGroup, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["_forward_of"] = head  # not a child: the prepared model holds it already
        self.type_name = own_class(head).__name__
        self.arguments = [argument for argument, *_ in group.inputs]
        self.targets = list(group.outputs)
        self.rounds_in = nn.ModuleList(Rounding(quantizer.grid()) for _, quantizer, *_ in group.inputs)
        self.rounds_out = nn.ModuleList(Rounding(how[0].grid()) if how[2] else nn.Identity() for how in group.outputs.values())
        shared: dict[int, int] = {}
        self.first = [shared.setdefault(id(quantizer), i) for i, (_, quantizer, *_) in enumerate(group.inputs)]
        self.parameter_dtypes: dict[str, torch.dtype] = {}
        self.inner: nn.Module | None = None
        self.stored: dict[str, tuple[str, str, str]] = {}
        integers = {name: integer_tensor(_parameter(head, name), one) for name, one in group.parameters.items()}
        for name, tensor in integers.items():
            self.parameter_dtypes[name] = _parameter(head, name).dtype
            self.stored[name] = (self._store(name.replace(".", "__"), tensor.q), "", "")
        for name, tensor in integers.items():  # after the integers, so that a parameter called `w_scale` keeps its name
            key = self.stored[name][0]
            zero_point = "" if tensor.zero_point is None else self._store(f"{key}_zero_point", tensor.zero_point)
            self.stored[name] = (key, self._store(f"{key}_scale", tensor.scale), zero_point)
        self.eval()

    def _store(self, key: str, tensor: Tensor) -> str:
        """Register a buffer under `key`, or the next name that is free."""
        while hasattr(type(self), key) or key in self.__dict__ or key in self._buffers or key in self._modules:
            key += "_"
        self.register_buffer(key, tensor)
        return key

    def _value(self, name: str) -> Tensor:
        q, scale, zero_point = (self._buffers.get(key) for key in self.stored[name])
        dequantize: Any = dequantized_weight if self.mode == "reference" else torch.ops.lightning_quant.dequantize_weight
        value: Tensor = dequantize(q, scale, zero_point)
        return value.to(self.parameter_dtypes[name])

    def take_over(self) -> None:
        """Become independent of the prepared module: a copy of it, without the parameters that are integers now."""
        head: nn.Module = self.__dict__.pop("_forward_of")
        inner = head
        leave(inner)
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
        for name in self.parameter_dtypes:
            owner, own = owner_of(inner, name)
            owner._parameters[own] = None
        for layer in inner.modules():
            if isinstance(layer, nn.RNNBase):
                layer.__dict__["_flat_weights"] = [getattr(layer, name, None) for name in layer._flat_weights_names]
        self.inner = inner.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Round, run the module's own forward, round."""
        device = next((value.device.type for value in tensors_in((args, kwargs))), "cpu")
        if torch.is_autocast_enabled(device):  # validation must compute what is shipped, in float32
            with torch.autocast(device, enabled=False):
                return self.forward(*on_tensors(widened, args), **on_tensors(widened, kwargs))
        head: nn.Module | None = self.__dict__.get("_forward_of")
        if head is not None:
            module, forward = head, _own_forward(head)
        else:
            assert self.inner is not None
            module, forward = self.inner, self.inner.forward
        rounds = [carrying(act) for act in self.rounds_in]
        inputs = [(argument, rounds[i]) for argument, i in zip(self.arguments, self.first, strict=True)]
        outputs = {target: carrying(act) for target, act in zip(self.targets, self.rounds_out, strict=True)}
        with _ONE_AT_A_TIME, hidden(module, {name: self._value(name) for name in self.parameter_dtypes}):
            return _rounded_call(forward, inputs, outputs, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module's own callers read of it (`num_heads`, `batch_first`) is still there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self._modules.get("inner") if "_modules" in self.__dict__ else None
            if inner is None:
                raise
            return getattr(inner, name)

    def extra_repr(self) -> str:
        """The module's type, and which tensors are integers."""
        stored = [f"{name}: {str(getattr(self, keys[0]).dtype).removeprefix('torch.')}" for name, keys in self.stored.items()]
        return ", ".join([self.type_name, *stored, "float arithmetic"])
