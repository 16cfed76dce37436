# SPDX-License-Identifier: Apache-2.0
"""Owns fused groups: what each member does in training and in eval.

The members of a group (patterns.py) stay where they are; each gets a class that knows the group. In training every member does
its own part, so that hooks between them see what they saw before:

    head:  conv(fq(x), fq(w))         batch norm: itself, on batch statistics         end: fq(act(.)), one pass

In eval the head runs the folded integer layer of `integer.py` and the others hand its result on.

Why one convolution is enough. Let k = gamma / sigma, c = |k|, and let the weight be quantized per output channel by its
range now, on a grid that is symmetric about zero (-127..127; for uint8 read 255 - q for -q). Then for every channel

    fq(w k) = k fq(w)        (1)  the scale of w k is c s_w, so (w k) / (c s_w) = sign(k) w / s_w: the same integers, negated

so BN(conv(x, fq(w))) with k from the batch *is* the layer whose folded weight was quantized: no second convolution, no
division by gamma, exact batch statistics, and nothing special at gamma = 0 or gamma < 0. (Krishnamoorthi 2018 section 3.2
and torch.ao scale the weight, quantize it and divide the output by k: NaN at gamma = 0. Nagel et al. 2021, arXiv
2106.08295 section 5.2, state (1).) Folding is then lossless: q' = sign(k) q, s' = c s_w, b' = (b - mu) k + beta.

A grid shared by all channels does not have (1), nor does a batch norm before the layer, whose k runs over the input channels.
There the weight side carries the whole cost: w' = fq(w c) / c with c from the running statistics, detached; still one
convolution and a real batch norm.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.config import TensorSpec
from lightning_quant.folding import (
    Layer,
    bias_error,
    channel_float,
    channel_weight,
    fold,
    folded_bias,
    folded_float,
    rounded_weight,
    weight_of,
)
from lightning_quant.geometry import Geometry
from lightning_quant.group import Group, Member, Strays, hidden, join
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer, Stamp
from lightning_quant.keys import WEIGHT
from lightning_quant.patterns import TRANSPOSED, BatchNorm, clamp_of
from lightning_quant.quantizers import ActivationQuantizer, BlockGrid, Grid, SignGrid, exchanged
from lightning_quant.sites import Operator
from lightning_quant.targets import parameter_of
from lightning_quant.weights import WeightQuantizer, rounded_again

# -- the state that the members of a group share ----------------------------------------------------------------------


class _Passing(NamedTuple):
    """A tensor between two members: its version when it was made, who is to read it, what it is."""

    tensor: weakref.ref[Tensor]
    version: int
    to: int
    integer: bool
    training: bool


HEAD = -1  # where a norm before it hands on to
# What reaches a member: the deployed layer's result; what the member before it made; that, changed on its way; something else.
Arrival = Literal["integer", "member", "changed", "foreign"]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Ending(Group):
    """What all fused groups have: an end, which an activation may be, where the result is rounded.

    Args:
        name: the head's name in the model.
        activation: a module, an operator, or None.
        inner: quantizer of what an activation that is a curve reads, or None.
        output: quantizer at the group's end, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        activation: nn.Module | None,
        inner: ActivationQuantizer | None,
        output: ActivationQuantizer | None,
    ) -> None:
        super().__init__(name)
        self.activation, self.inner, self.output = activation, inner, output
        self.clamp = None if activation is None else clamp_of(activation)  # its ends; None if it is a curve
        self.tap: Callable[[Tensor], None] | None = None  # is shown what reaches the end, before the activation and its rounding
        self.loose = False  # dropout stands between members: in training it hands on another tensor
        self.stamp = Stamp()  # of the deployed layer
        self.stands_for: nn.Module | None = None  # the module whose call the activation is, if it is an operator
        self.strays = Strays()
        self.under_way: dict[int, _Passing] = {}  # what members made and the next one has not read yet

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "under_way": {}}

    def _is_watched(self, head: nn.Module) -> bool:
        return super()._is_watched(head) or (self.stands_for is not None and bool(self.stands_for._forward_pre_hooks))

    @property
    def strayed(self) -> int:
        """How many tensors did not go from member to member as recorded; one forward may have been broken off by an exception."""
        lost = [passing for passing in self.under_way.values() if passing.tensor() is None]
        same = [passing for passing in lost if passing.training == (not self.strays.evaluated)]
        return self.strays.number + (0 if self.loose else max(len(same) - 1, 0))

    def count(self, stray: bool, *, training: bool | None = None) -> None:
        """Count one tensor on its way between members."""
        self.strays.count(stray and not self.loose, training=self.training if training is None else training)

    def hand_on(self, y: Tensor, to: int, integer: bool) -> Tensor:
        """What a member made, on its way to the next one, `members[to]`. `integer`: the deployed layer's result."""
        if to < len(self.members) and not self.again:
            if self.under_way:
                for key in [key for key, passing in self.under_way.items() if passing.tensor() is None]:
                    self.count(True, training=self.under_way.pop(key).training)
            self.under_way[id(y)] = _Passing(weakref.ref(y), _version(y), to, integer, self.training)
        return y

    def expects(self, to: int, x: Any) -> bool:
        """Whether x is what the member before `members[to]` made."""
        passing = self.under_way.get(id(x))
        return passing is not None and passing.tensor() is x and passing.to == to

    def arrive(self, to: int, x: Tensor) -> Arrival:
        """What x is for `members[to]`, which has nothing left to do with an integer layer's result.

        The forward may take another branch than the recorded one and bring a member something else, or change it on the way: in
        training a member does its own part anyway, but what is foreign moves no range, and `convert_model` refuses.
        """
        if self.again:
            return "member"
        passing = self.under_way.get(id(x))
        genuine = passing is not None and passing.tensor() is x and passing.to == to and passing.version == _version(x)
        self.count(not genuine)
        if not genuine:
            changed = next((key for key, passing in self.under_way.items() if passing.to == to), None)
            if changed is None:
                return "foreign"
            del self.under_way[changed]
            return "changed"
        assert passing is not None
        if passing.integer and to != HEAD and to + 1 < len(self.members):  # the head makes another tensor
            self.under_way[id(x)] = _Passing(passing.tensor, passing.version, to + 1, True, passing.training)
        else:
            del self.under_way[id(x)]
        return "integer" if passing.integer else "member"

    def finish(self, member: nn.Module, x: Tensor, own: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """The group's result from the tensor that reaches its end, or None if the member's own forward is what counts.

        `x`: before the activation. `own`: the forward of a member that is an activation. The range of a clamp's output is
        observed through the clamp, so a pass that only observes still runs the clamp itself.
        """
        behind = self.members
        if behind and member is not behind[-1]:
            return None
        if self.tap is not None:
            self.tap(x)
        if own is None or self.clamp is not None:
            if self.output is None:
                return None
            y = self.rounded(self.output, x)
            return None if y is x else y
        y = own(x if self.inner is None else self.rounded(self.inner, x))
        return y if self.output is None else self.rounded(self.output, y)


class FusedGroup(Ending):
    """A convolution or linear layer, or a batch norm, and what is fused before and behind it.

    Args:
        name, activation, inner, output: as in `Ending`.
        norm_before, norm: the norms before and behind the head, or None.
        input: quantizer of the group's input, or None. `input_owned`: this group moves its range; `input_applied`: the
            tensor arrives unrounded, so the group rounds it.
        weight, bias: quantizers of the head's parameters, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        norm: nn.Module | None,
        activation: nn.Module | None,
        input: ActivationQuantizer | None,
        input_owned: bool,
        input_applied: bool,
        weight: WeightQuantizer | None,
        output: ActivationQuantizer | None,
        bias: WeightQuantizer | None = None,
        norm_before: nn.Module | None = None,
        inner: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__(name, activation=activation, inner=inner, output=output)
        self.norm_before, self.norm = norm_before, norm
        self._members = [module for module in (norm, activation) if module is not None]
        self.input, self.input_owned, self.input_applied = input, input_owned, input_applied
        self.weight, self.bias = weight, bias
        self.head: nn.Module | None = None
        self.simulate_bias = False  # the bias is rounded as it will be deployed
        self.bias_error: Tensor | None = None  # in this pass, for the norm behind the head

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Of the input, of what a curve reads and of the end, where they are rounded."""
        return [quantizer for quantizer in (self.input, self.inner, self.output) if quantizer is not None]

    @property
    def ends_in_curve(self) -> bool:
        """Whether an activation that is no clamp ends the group."""
        return self.activation is not None and self.clamp is None

    @property
    def end(self) -> ActivationQuantizer | None:
        """Of what the weighted layer itself gives, a clamp included."""
        return self.inner if self.ends_in_curve else self.output

    @property
    def parameter_quantizers(self) -> list[WeightQuantizer]:
        """Of the weight and of the bias, where they are rounded."""
        return [quantizer for quantizer in (self.weight, self.bias) if quantizer is not None]

    @property
    def members(self) -> list[nn.Module]:
        """The modules and operators behind the head, in order."""
        return self._members

    @property
    def ahead(self) -> list[nn.Module]:
        """The norm before the head, if there is one."""
        return [] if self.norm_before is None else [self.norm_before]

    def layer(self, head: nn.Module) -> Layer:
        """What a fold reads."""
        return Layer(head=head, norm_before=self.norm_before, norm=self.norm, weight=self.weight, bias=self.bias)

    def deploy(self, head: nn.Module) -> nn.Module:
        """The folded layer."""
        return deployed_layer(head, self)

    def round_input(self, x: Tensor) -> Tensor:
        """The group's input on its grid, its range moved first if this group owns it."""
        if self.input is None:
            return x
        self.read(0)
        return self.rounded(self.input, x, owned=self.input_owned, applied=self.input_applied)

    def kept_for_backward(self, head: nn.Module, rounded: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """In lean memory rounded weights are not kept for backward but made again."""
        if not self.lean or WEIGHT not in rounded or torch.compiler.is_dynamo_compiling():  # a compiler decides for itself
            return contextlib.nullcontext()
        return rounded_again(weight_of(head), rounded[WEIGHT])

    def note_bias_error(self, head: nn.Module, x: Tensor) -> Tensor | None:
        """What rounding adds to the bias of the deployed layer, of the head's dtype, or None where it is not simulated.

        While batch norm moves with its batches there is no folded bias yet to round.
        """
        self.bias_error = None
        norms = [norm for norm in (self.norm_before, self.norm) if isinstance(norm, BatchNorm)]
        known = self.phase.freeze_batch_norm or not any(norm.training for norm in norms)
        if not (self.simulate_bias and known and self.input is not None and self.input.ready and integers_throughout(head, self)):
            return None
        if self.rounds_parameters and self.phase.quantize_activations:
            with torch.no_grad():
                self.bias_error = bias_error(self.layer(head), self.input.scale_for(x)).to(weight_of(head).dtype)
        return self.bias_error

    def settled(self, y: Tensor) -> Tensor:
        """What head and norm made, channels that are deployed as constants exchanged for them (`_faint_step`)."""
        faint = None if self.weight is None or not self.rounds_parameters else self.weight.faint
        if faint is None or self.head is None:
            return y
        with torch.no_grad():
            shape = [-1] if isinstance(self.head, nn.Linear) else [1, -1, *[1] * (y.dim() - 2)]
            constant = folded_bias(self.layer(self.head)).to(y.dtype).view(shape)
            value = torch.where(faint.view(shape), constant, y)
        return exchanged(y, value)

    def rounded_parameters(self, head: nn.Module) -> dict[str, Tensor]:
        """The head's quantized parameters on their grids, with gradient."""
        rounded: dict[str, Tensor] = {}
        if self.weight is not None:
            rounded[WEIGHT] = rounded_weight(self.layer(head))
        bias = parameter_of(head, "bias")
        if self.bias is not None and bias is not None:
            rounded["bias"] = self.bias.rounded(bias)
        return rounded


# -- the classes that members get -------------------------------------------------------------------------------------


def _batch_norm(norm: Any, own: Callable[[Tensor], Tensor], x: Tensor, group: FusedGroup) -> Tensor:
    """A batch norm itself, with statistics that the schedule can stop."""
    # Without a momentum somebody recomputes the statistics (Lightning's SWA, torch's update_bn): that must get through.
    frozen = group.phase.freeze_batch_norm and isinstance(norm, BatchNorm) and norm.training and norm.momentum is not None
    error = group.bias_error if norm is group.norm and isinstance(norm, BatchNorm) and (frozen or not norm.training) else None
    if (frozen or error is not None) and norm.running_mean is not None:
        bias = norm.bias if error is None else error if norm.bias is None else norm.bias + error
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps)
    return own(x)


class _Head(Member):
    """A weighted layer that begins a group, or stands behind a norm that does."""

    _made_begins = True

    def _made_run(self, group: FusedGroup, input: Tensor, *rest: Any, **named: Any) -> Tensor:
        behind = group.norm_before is not None
        if group.arrive(HEAD, input) == "integer" if behind else group.begin(self, [input]):
            deployed: Tensor = group.deployed_now(self)(input, *rest, **named)
            return group.hand_on(deployed, 0, True)
        x = input if behind else group.round_input(input)
        rounded = group.rounded_parameters(self) if group.rounds_parameters else {}
        error, bias = group.note_bias_error(self, x) if group.simulate_bias else None, parameter_of(self, "bias")
        if error is not None and group.norm is None:  # without a bias, what a norm before the layer adds
            rounded["bias"] = error if bias is None else rounded.get("bias", bias) + error
        with hidden(self, rounded), group.kept_for_backward(self, rounded):
            y: Tensor = self._made_own(x, *rest, **named)
        y = y if group.norm is not None else group.settled(y)
        end = group.finish(self, y)
        return group.hand_on(y if end is None else end, 0, False)


class _NormHead(Member):
    """A batch norm that is a group's head: BatchNorm, ReLU."""

    _made_begins = True

    def _made_run(self, group: FusedGroup, input: Tensor) -> Tensor:
        if group.begin(self, [input]):
            deployed: Tensor = group.deployed_now(self)(input)
            return group.hand_on(deployed, 0, True)
        y = _batch_norm(self, self._made_own, group.round_input(input), group)
        rounded = group.finish(self, y)
        return group.hand_on(y if rounded is None else rounded, 0, False)


class _NormBefore(Member):
    """The batch norm before a group's weighted layer: it takes the group's input."""

    def _made_run(self, group: FusedGroup, input: Tensor) -> Tensor:
        assert group.head is not None
        if group.begin(group.head, [input]):
            return group.hand_on(input.view_as(input), HEAD, True)  # an object of its own: others may hold the input
        return group.hand_on(_batch_norm(self, self._made_own, group.round_input(input), group), HEAD, False)


class _NormMember(Member):
    """The norm behind a group's head."""

    def _made_run(self, group: FusedGroup, input: Tensor) -> Tensor:
        arrival = group.arrive(0, input)
        if arrival == "integer":
            return input
        y = _batch_norm(self, self._made_own, input, group)
        if arrival == "foreign":
            return y
        y = group.settled(y)
        rounded = group.finish(self, y)
        return group.hand_on(y if rounded is None else rounded, 1, False)


class _ActivationMember(Member):
    """The activation of a group: where the end is rounded, the clamp of the grid does its work."""

    def _made_run(self, group: Ending, input: Tensor) -> Tensor:
        arrival = group.arrive(len(group.members) - 1, input)
        if arrival == "integer":
            return input
        rounded = None if arrival == "foreign" else group.finish(self, input, self._made_own)
        if rounded is not None:
            return rounded
        y: Tensor = self._made_own(input)
        return y


def install(group: Ending, head: nn.Module | None) -> None:
    """Make `head` and the group's members work as one; parameters, buffers, names and hooks are not touched.

    `head`: None for an operator. Members that are operators are found where they are called (intercept.py).
    """
    if head is not None:
        join(group, head, _NormHead if isinstance(head, BatchNorm) else _Head)
    if isinstance(group, FusedGroup):
        group.head = head
        if group.norm_before is not None:
            join(group, group.norm_before, _NormBefore)
        if group.norm is not None:
            join(group, group.norm, _NormMember)
    if group.activation is not None and not isinstance(group.activation, Operator):
        join(group, group.activation, _ActivationMember)


# -- the deployed layer -----------------------------------------------------------------------------------------------


def runs_on_integers(spec: TensorSpec | None) -> bool:
    """Whether integer kernels take a tensor on this grid: up to 8 bits, one scale for it or for each output channel."""
    return spec is not None and spec.bits <= 8 and spec.granularity in ("per_tensor", "out_channel")


def integers_throughout(head: nn.Module, group: FusedGroup) -> bool:
    """Whether the deployed layer multiplies integers: every tensor is on a grid that integer kernels take.

    No CPU runtime has an integer kernel for transposed convolutions, and none takes signs. Only linear layers give floats.
    """
    ends = [quantizer for quantizer in (group.input, group.end) if quantizer is not None]
    specs: list[TensorSpec | None] = [quantizer.spec for quantizer in ends]
    specs += [] if isinstance(head, BatchNorm) else [None if group.weight is None else group.weight.spec]
    whole = all(map(runs_on_integers, specs)) and not any(quantizer.spec.method == "bnn" for quantizer in ends)
    given = group.input is not None and (group.end is not None or Geometry.of(head).kind == "linear")
    return whole and given and not isinstance(head, TRANSPOSED)


def deployed_layer(head: nn.Module, group: FusedGroup) -> nn.Module:
    """The layer that replaces a group after training, from its numbers as they are now; owns all its tensors."""
    geometry, normalises = Geometry.of(head), isinstance(head, BatchNorm)
    x, y = (None if quantizer is None else quantizer.grid() for quantizer in (group.input, group.end))
    rectify = None if group.clamp is None or isinstance(y, Grid) else group.clamp
    if integers_throughout(head, group) and isinstance(x, Grid) and not isinstance(y, BlockGrid | SignGrid):
        weight = channel_weight(head) if normalises else fold(group.layer(head))
        layer: nn.Module = IntegerLayer(weight, geometry, x, y, rectify)
    elif normalises:
        layer = PartlyIntegerLayer(channel_float(head), geometry, x, y, rectify)
    elif group.weight is None:
        layer = PartlyIntegerLayer(folded_float(group.layer(head)), geometry, x, y, rectify)
    else:
        layer = PartlyIntegerLayer(fold(group.layer(head)), geometry, x, y, rectify)
    if group.ends_in_curve:
        assert group.activation is not None
        out = None if group.output is None else group.output.grid()
        layer = ActivatedLayer(layer, own_forward(group.activation), out)
    return layer.to(_device_of(head))


def _device_of(head: nn.Module) -> torch.device:
    tensors = [*head._parameters.values(), *head._buffers.values()]
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the user's class, of a member; an operator's is itself."""
    forward: Callable[..., Any] = super(Member, module).forward if isinstance(module, Member) else module.forward
    return forward


__all__ = ["Ending", "FusedGroup", "deployed_layer", "install", "own_forward", "runs_on_integers"]
