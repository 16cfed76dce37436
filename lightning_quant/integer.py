# SPDX-License-Identifier: Apache-2.0
"""Owns the deployed layers: int8 weight, int32 bias, requantization; what eval mode runs and what conversion emits.

The arithmetic of a weighted layer, per output channel (x, w, y: integers; s: scales, z: zero points):

    acc = sum (q_x - z_x) (q_w - z_w) + q_b              an exact integer; q_b = round(b / (s_x s_w)) is int32
    q_y = clamp(round_half_even(float32(acc) * m) + z_y)       m = (s_x * s_w) / s_y, in float32, in this order

which is what ONNX Runtime's QLinearConv and QGemm compute, bit for bit. Without an output grid the layer returns
float32(acc) * (s_x * s_w). Convolutions run on integer-valued floats at float speed: exact while every partial sum stays
under 2^24; where the worst case does not, `direct.py` splits them. The operators, which saved programs call, accumulate in
float64 (exact to 2^53) then: the layer is marked `wide`.

What no integer kernel can run (a missing grid, more than 8 bits, scales inside a channel) is float arithmetic on
dequantized integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_quant.operators  # noqa: F401  (registers them)
from lightning_quant import onednn
from lightning_quant.config import ConfigError, TensorSpec
from lightning_quant.direct import (
    EXACT_FLOAT32,
    DirectLayer,
    carried,
    marks_of,
    parts_of,
    plain,
    round_to,
    sides_of,
    worst_sum,
)
from lightning_quant.geometry import Geometry, as_signal
from lightning_quant.operators import along_channels, dequantized_weight, round_by_blocks, step_on
from lightning_quant.quantizers import BlockGrid, Grid, SignGrid, sign, wide
from lightning_quant.weights import WeightQuantizer

_INT32_MAX = 2**31 - 1
_DIRECT = "_direct"  # in the instance's dict: neither a buffer nor in what is copied, saved or traced

# -- parameters and activations on their grids ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IntegerTensor:
    """A parameter as it is stored: signed integers `q` (int8, or int16 above 8 bits), float32 `scale`, `zero_point` like q.

    The value is (q - zero_point) * scale. Scale and zero point are () per tensor, (C,) for channels of dimension 0, and
    otherwise have one value a block along each of q's dimensions; zero_point is None for 0.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


def storage(spec: TensorSpec) -> torch.dtype:
    """The dtype that holds a parameter of this grid."""
    return torch.int8 if spec.bits <= 8 else torch.int16


def integer_tensor(weight: Tensor, quantizer: WeightQuantizer) -> IntegerTensor:
    """A parameter on its grid as training rounded it; any float dtype, any shape."""
    w, spec = wide(weight.detach()), quantizer.spec
    grid = quantizer.grid(w)
    q, dtype = quantizer.integers(w, grid), storage(spec)
    zero = grid.zero_point
    return IntegerTensor(
        q=(q - spec.offset).to(dtype),
        scale=one_a_block(grid.scale, spec).to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny),
        zero_point=None if zero is None else (one_a_block(zero, spec) - spec.offset).to(dtype),
    )


def one_a_block(values: Tensor, spec: TensorSpec, lead: int = 0) -> Tensor:
    """What `weight_grid` spread over blocks, one value a block again (from dimension `lead` on); (C,) per out-channel."""
    if spec.granularity in ("per_tensor", "out_channel"):
        return values.flatten() if values.dim() else values
    for dim, block in enumerate(spec.kernel(values.dim())):
        if dim >= lead and block > 1 and values.shape[dim] > 1:
            values = values.index_select(dim, torch.arange(0, values.shape[dim], block, device=values.device))
    return values


class KeepsDtypes(nn.Module):
    """A module whose own buffers keep their dtypes: `model.double()`, say, is for float layers. They move between devices."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self._buffers)
        super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


class Rounding(KeepsDtypes):
    """An activation's grid as a module: float tensor in, float32 tensor on the grid out.

    Args:
        grid: one grid for the tensor, or one for each block, or the sign.
        clip: end at the levels that an absorbed activation leaves.
    """

    mode = "integer"  # see `set_mode`
    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid | BlockGrid | SignGrid, *, clip: bool = False) -> None:
        super().__init__()
        self.grid, self.sign = grid.unsigned() if isinstance(grid, Grid) else None, isinstance(grid, SignGrid)
        if isinstance(grid, SignGrid):
            self.low, self.high = -1, 1
        elif isinstance(grid, Grid):
            g = grid.unsigned()
            self.low, self.high = (g.clip_low, g.clip_high) if clip else (g.qmin, g.qmax)
        else:
            offset = grid.spec.qmax + 1 if grid.spec.qmin < 0 else 0
            self.low, self.high = grid.spec.qmin + offset, grid.spec.qmax + offset
            self.register_buffer("scale", grid.scale.clone())
            self.register_buffer("zero_point", grid.zero_point + offset)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Round x to the grid."""
        ops = torch.ops.lightning_quant
        if self.sign:
            return sign(x).float()
        if self.grid is not None and self.mode == "reference":
            return rounded_by_floats(x, self.grid.scale, self.low - self.grid.zero_point, self.high - self.grid.zero_point)
        if self.grid is None:
            have, want = tuple(self.scale.shape), tuple(x.shape)
            if len(have) != len(want) or any(n not in (1, size) for n, size in zip(have, want, strict=True)):
                raise ConfigError(f"an activation of shape {want} met scales for the blocks of another shape, {have}.")
            round_blocks = round_by_blocks if self.mode == "reference" else ops.round_blocks
            rounded: Tensor = round_blocks(x, self.scale, self.zero_point, self.low, self.high)
        elif plain(x):
            low, high = self.low - self.grid.zero_point, self.high - self.grid.zero_point
            step = step_on(self.grid.scale, x.device)
            rounded = round_to(x, step, low, high).mul_(step)
        else:
            q = ops.quantize(x, self.grid.scale, self.grid.zero_point, self.low, self.high)
            rounded = ops.dequantize(q, self.grid.scale, self.grid.zero_point)
        return rounded

    def extra_repr(self) -> str:
        """The integers."""
        return "sign" if self.sign else f"{self.low}..{self.high}" + (" for each block" if self.grid is None else "")


def rounded_by_floats(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """clamp(round(x / scale), low, high) * scale in float32, by torch's operators; the ends count from the zero point."""
    step = step_on(scale, x.device)
    return torch.clamp(torch.round(x.float() / step), low, high) * step


class Stamp:
    """A mark that a deployed layer puts on what it makes, by which the activation behind it knows that its work is done.

    It is an attribute of the tensor object, so that threads do not mix; writing to the tensor takes it off.
    """

    _NAME = "_lightning_quant_made_by"
    part_of_model = True  # see `record.undisturbed`

    def on(self, y: Tensor) -> Tensor:
        """y, marked."""
        setattr(y, self._NAME, (self, 0 if y.is_inference() else y._version))
        return y

    def is_on(self, x: Any) -> bool:
        """Whether x was marked so and is as it was."""
        found = getattr(x, self._NAME, None)
        return found is not None and found[0] is self and found[1] == (0 if x.is_inference() else x._version)

    def off(self, x: Tensor) -> None:
        """Take the mark off x, if it is on: the work is done once."""
        if self.is_on(x):
            delattr(x, self._NAME)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """As a forward hook of the layer."""
        if isinstance(output, Tensor):
            self.on(output)


def widened(x: Tensor) -> Tensor:
    """x, in float32 if it is of a half type: what is shipped computes in float32, whatever autocast says."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def carrying(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`act` in the dtype of what it is given."""

    def rounded(x: Tensor) -> Tensor:
        return act(x).to(x.dtype)

    return rounded


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FoldedWeight(IntegerTensor):
    """A weighted layer after folding, on the host of its choice; what every deployed layer is made from.

    q: (C, ...) integers of the folded weight. bias: float64 (C,), real valued, not yet on a grid.
    """

    bias: Tensor


def _least_steps(bias: Tensor, x_scale: float | Tensor) -> Tensor:
    """The least scale of a weight for its bias, float32 (C,): s_w >= 2 |b| / (s_x (2^31 - 1)), else int32 overflows."""
    return (bias.abs() * 2 / (x_scale * _INT32_MAX)).to(torch.float32)


def bias_steps(scale: Tensor, bias: Tensor, x_scale: float | Tensor) -> Tensor:
    """The step of each channel's int32 bias, s_x s_w, float64 (C,). `scale`: of the weight, float32 (C,); `bias`: float64."""
    return torch.maximum(scale, _least_steps(bias, x_scale)).double() * x_scale


def _widened(folded: FoldedWeight, x_scale: float) -> FoldedWeight:
    """The same weight on steps large enough for its bias."""
    least = _least_steps(folded.bias, x_scale)
    floor = least if folded.scale.dim() else least.max()
    if not bool((floor > folded.scale).any()):
        return folded
    scale = torch.maximum(folded.scale, floor)
    ratio = along_channels(folded.scale.double() / scale.double(), folded.q.dim(), 0)
    zero = torch.zeros_like(folded.scale, dtype=torch.int8) if folded.zero_point is None else folded.zero_point
    shift = along_channels(zero, folded.q.dim(), 0).double()
    q = ((folded.q.double() - shift) * ratio).round_().add_(shift).to(torch.int8)
    return FoldedWeight(q=q, scale=scale, zero_point=folded.zero_point, bias=folded.bias)


class IntegerLayer(KeepsDtypes):
    """A convolution or linear layer on integers: float tensor in, float tensor out, both on their grids.

    Args:
        folded: weight and bias with batch norm folded in.
        geometry: stride, padding and the rest.
        x: grid of the input.
        y: grid of the output; None for a float output (high-precision head).
        rectify: (low, high) of an activation on a float output, or None; on a grid the clamp does it.

    Shapes: as `nn.Conv*d` and `nn.Linear`; any floating dtype in, the same dtype out (float32 under autocast).
    """

    mode = "integer"  # see `set_mode`
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor

    def __init__(
        self,
        folded: FoldedWeight,
        geometry: Geometry,
        x: Grid,
        y: Grid | None,
        rectify: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.x, self.y, self.geometry = x.unsigned(), None if y is None else y.unsigned(), geometry
        self.rectify = rectify
        folded = _widened(folded, self.x.scale)
        step = self.x.scale * folded.scale.double()
        self.register_buffer("weight", folded.q)
        self.register_buffer("scale", folded.scale)
        self.register_buffer("zero_point", folded.zero_point)
        self.register_buffer("bias", torch.round(folded.bias / step).clamp_(-_INT32_MAX, _INT32_MAX).to(torch.int32))
        self.wide = self._is_wide()
        self.eval()

    def _is_wide(self) -> bool:
        return worst_sum(sides_of(self.weight, self.zero_point), self.bias, self.x) >= EXACT_FLOAT32

    def forward(self, input: Tensor) -> Tensor:
        """Quantize, multiply and accumulate, requantize, dequantize."""
        if self.mode == "reference":
            return self._by_floats(input)
        empty = self.mode == "onednn" and not input.numel()  # oneDNN's kernel for Conv1d fails there
        if plain(input) and not empty and (direct := self._direct_now()) is not None:
            return direct(input)
        return self._by_operators(input)

    def _direct_now(self) -> DirectLayer | None:
        """The numbers of a forward without operators, from the buffers as they are; None where there are none."""
        marks = marks_of(self._buffers)
        settings = (self.geometry, self.x, self.y, self.rectify)
        direct: DirectLayer | None = self.__dict__.get(_DIRECT)
        if marks is None:
            return None
        if direct is None or direct.marks != marks or direct.settings != settings or direct.mode != self.mode:
            with torch.inference_mode(False), torch.no_grad():  # other modes may use it, too
                direct = self.__dict__[_DIRECT] = DirectLayer(self._buffers, settings, self.mode)
        return direct if direct.possible else None

    def onednn_problem(self) -> str:
        """Why torch's int8 kernels cannot run this layer; nothing if they can."""
        if parts_of(sides_of(self.weight, self.zero_point), self.bias, self.x) is None:
            return "the sums of a single input channel may pass 2^24"
        return onednn.problem(self.weight, self.zero_point, self.x, self.geometry)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(_DIRECT, None)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop(_DIRECT, None)
        super()._load_from_state_dict(*args, **kwargs)
        self.wide = self.wide if self.weight.is_meta else self._is_wide()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _DIRECT}

    def _by_operators(self, input: Tensor) -> Tensor:
        """As `forward`, from the integers and by the operators that saved programs call."""
        ops, grid = torch.ops.lightning_quant, self.x
        x = self.geometry.for_kernel(input, self.weight.dim())
        q = ops.quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
        out = self._multiply(q)
        if self.y is not None:
            out = ops.dequantize(out, self.y.scale, self.y.zero_point)
        elif self.rectify is not None:
            out = out.clamp(*self.rectify)
        return carried(self.geometry.from_kernel(out, input, self.weight.dim()), input.dtype)

    def _by_floats(self, input: Tensor) -> Tensor:
        """As `forward`, in float32 on dequantized integers, by torch's operators alone: the last bit of a sum may tip a level."""
        x, y, g, dim = self.x, self.y, self.geometry, self.weight.dim()
        with torch.autocast(input.device.type, enabled=False):
            w = dequantized_weight(self.weight, self.scale, self.zero_point)
            b = self.bias.to(torch.float32) * (x.scale * self.scale)
            q = rounded_by_floats(g.for_kernel(input.float(), dim), x.scale, x.qmin - x.zero_point, x.qmax - x.zero_point)
            if g.kind == "linear":
                out = F.linear(q, w, b)
            else:
                convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dim - 2]
                out = convolve(q, w, b, g.stride, g.padding, g.dilation, g.groups)
            if y is not None:
                out = rounded_by_floats(out, y.scale, y.clip_low - y.zero_point, y.clip_high - y.zero_point)
            elif self.rectify is not None:
                out = out.clamp(*self.rectify)
        return carried(g.from_kernel(out, input, dim), input.dtype)

    def _multiply(self, q: Tensor) -> Tensor:
        ops, g, y = torch.ops.lightning_quant, self.geometry, self.y
        head = (q, self.x.scale, self.x.zero_point, self.weight, self.scale, self.zero_point, self.bias)
        tail = (None, 0, 0, 0, self.wide) if y is None else (y.scale, y.zero_point, y.clip_low, y.clip_high, self.wide)
        if g.kind == "linear":
            out: Tensor = ops.linear(*head, *tail)
        else:
            out = ops.conv(*head, g.stride, g.padding, g.dilation, g.groups, *tail)
        return out

    def extra_repr(self) -> str:
        """Kind, shape of the weight, what comes in and goes out."""
        y = "float32" if self.y is None else "uint8"
        return f"{self.geometry.kind}, {tuple(self.weight.shape)}, int8 weight, int32 bias, uint8 -> {y}"


class PartlyIntegerLayer(KeepsDtypes):
    """A layer that lacks a grid on its weight or its input, so that no integer kernel can run it: float arithmetic.

    Args:
        folded: the weight on its grid, or a pair (float32 weight, float64 bias) where the weight is not quantized.
        geometry: stride, padding and the rest.
        x: grid of the input, or None.
        y: grid of the output, or None.
        rectify: (low, high) of an activation that no output grid applies, or None.
    """

    mode = "integer"  # see `set_mode`
    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bias: Tensor

    def __init__(
        self,
        folded: FoldedWeight | tuple[Tensor, Tensor],
        geometry: Geometry,
        x: Grid | BlockGrid | SignGrid | None,
        y: Grid | BlockGrid | SignGrid | None,
        rectify: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.x, self.y = None if x is None else Rounding(x), None if y is None else Rounding(y, clip=True)
        self.geometry, self.rectify = geometry, rectify
        whole = isinstance(folded, FoldedWeight)
        self.register_buffer("weight", folded.q if isinstance(folded, FoldedWeight) else folded[0])
        self.register_buffer("scale", folded.scale if isinstance(folded, FoldedWeight) else None)
        self.register_buffer("zero_point", folded.zero_point if isinstance(folded, FoldedWeight) else None)
        bias = folded.bias if isinstance(folded, FoldedWeight) else folded[1]
        self.register_buffer("bias", bias.to(torch.float32))
        self.weight_quantized = whole
        self.eval()

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Round the input, run the float layer on the dequantized weight, round the output."""
        g = self.geometry
        x, dtype, w = input, input.dtype, self.weight
        if torch.is_autocast_enabled(x.device.type):  # validation must compute what is shipped, in float32
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), output_size)
        if self.scale is not None:
            dequantize = dequantized_weight if self.mode == "reference" else torch.ops.lightning_quant.dequantize_weight
            w = dequantize(w, self.scale, self.zero_point)
        if self.x is not None:
            x = self.x(x)
        x = g.prepared_input(x.float())
        if g.kind == "linear":
            out = F.linear(x, w, self.bias)
        elif g.kind == "scale":
            out = F.conv1d(as_signal(x), w, self.bias, groups=g.groups).reshape(x.shape)
        elif g.kind == "conv_transpose":
            spread = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[w.dim() - 2]
            more = self._output_padding(x, output_size)
            out = spread(x, w, self.bias, g.stride, g.padding, more, g.groups, g.dilation)
        else:
            convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[w.dim() - 2]
            out = convolve(x, w, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if self.rectify is not None:
            out = out.clamp(*self.rectify)
        if self.y is not None:
            out = self.y(out)
        return carried(out, dtype)

    def _output_padding(self, x: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        g = self.geometry
        if output_size is None:
            return g.output_padding
        dims = len(g.stride)
        kernel = self.weight.shape[-dims:]
        rows = zip(output_size[-dims:], x.shape[-dims:], g.stride, g.padding, g.dilation, kernel, strict=True)
        return tuple(size - ((n - 1) * stride - 2 * pad + wide * (k - 1) + 1) for size, n, stride, pad, wide, k in rows)

    def extra_repr(self) -> str:
        """Kind, shape of the weight, which tensors are integers."""
        words = [f"{str(self.weight.dtype).removeprefix('torch.')} weight" if self.weight_quantized else "float weight"]
        words += ["rounded input"] * (self.x is not None) + ["rounded output"] * (self.y is not None)
        return f"{self.geometry.kind}, {tuple(self.weight.shape)}, {', '.join(words)}, float arithmetic"


class ActivatedLayer(nn.Module):
    """A layer whose activation is a curve: its own output is rounded, the activation is float arithmetic, its result rounded.

    Args:
        layer: an IntegerLayer or PartlyIntegerLayer.
        activation: the forward of the activation, taking one tensor.
        y: grid of the activation's output, or None.
    """

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor], y: Grid | BlockGrid | SignGrid | None) -> None:
        super().__init__()
        self.layer, self.rounds_out = layer, None if y is None else Rounding(y)
        self.__dict__["_forward_of"] = activation  # not a child: the prepared model holds it already
        self.activation: nn.Module | None = None
        self.origin = ""
        self.eval()

    def take_over(self, activation: nn.Module, origin: str) -> None:
        """Become independent of the prepared model: `activation` is a module of its own class, which was `origin` there."""
        del self.__dict__["_forward_of"]
        self.activation, self.origin = activation.eval(), origin

    def forward(self, input: Tensor, *rest: Any, **named: Any) -> Tensor:
        """The layer, the activation, the rounding."""
        y: Tensor = self.layer(input, *rest, **named)
        activation = self.activation if self.activation is not None else self.__dict__["_forward_of"]
        if torch.is_autocast_enabled(y.device.type):
            with torch.autocast(y.device.type, enabled=False):
                out: Tensor = activation(y.float())
        else:
            out = activation(y)
        return out if self.rounds_out is None else carried(self.rounds_out(out), y.dtype)
