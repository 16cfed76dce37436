# SPDX-License-Identifier: Apache-2.0
"""Owns what norms and weighted layers do to units, and the table of all rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.unit_rules import (
    Call,
    Rule,
    alike,
    empty,
    gated,
    met_units,
    moved,
    name_of,
    over,
    padded,
    pointwise,
    reduced,
    same,
    shuffled,
    softmax,
    spatial,
    unknown,
    written,
    zero_padding,
)
from lightning_quant.units import IN, OUT, Conv, Reading, Shadow, by_group, coordinate, fixed, squeezed


def _by_channel(call: Call, tensors: Sequence[Tensor | None], x: Tensor, channel: int) -> Tensor:
    """The units of x, made one for each index of its dimension `channel`, with those of vectors of that length: to broadcast."""
    flow, count = call.flow, x.shape[channel]
    flat = call.of(x).units.movedim(channel, 0).flatten(1)
    first, why = flat[:, 0].expand(count), f"{call.reader} reads channels of which some are not known"
    flow.units.join(flat, first.view(-1, 1), why)
    for tensor in tensors:
        if tensor is not None:
            flow.units.join(first, _vector(call, tensor), why)
    return flow.units.roots(first).view([count if dim == channel else 1 for dim in range(x.dim())])


def _vector(call: Call, tensor: Tensor) -> Tensor:
    """The units of a vector."""
    return call.of(tensor).units.flatten()


def _batch_norm(call: Call) -> list[Shadow]:
    x, weight, bias, mean, variance = call.args[:5]
    training = bool(call.args[5]) if call.name == "native_batch_norm" else False
    units = _by_channel(call, [weight, bias, mean, variance], x, 1)
    live = call.of(x).live
    if training:  # an instance norm
        live = live.any(0, keepdim=True)
        for dim in range(2, live.dim()):
            live = live.any(dim, keepdim=True)
    if weight is not None:
        live = live & (weight != 0).view(1, -1, *[1] * (x.dim() - 2))
    return [Shadow(squeezed(units), squeezed(live)), fixed(1, live=True)]


def _layer_norm(call: Call) -> list[Shadow]:
    x, shape = call.args[:2]
    for tensor in call.read[1:]:
        call.flow.pin(call.raw(tensor), f"{call.where} takes mean and variance over all channels")
    dims = range(-len(shape), 0)
    known = call.of(x)
    if any(known.units.shape[dim] > 1 for dim in dims):
        call.flow.units.pin(known.units, f"{call.where} takes mean and variance over all channels, masked ones included")
    live = over(call, Shadow(torch.zeros_like(known.units), known.live), dims, keep=True)[0].live
    weight = call.args[2]
    if weight is not None:
        live = live & (weight != 0)
    return [Shadow(known.units, squeezed(live)), fixed(x.dim(), live=True)]


def _group_norm(call: Call) -> list[Shadow]:
    x, weight, bias, _, channels, _, groups = call.args[:7]
    units = _by_channel(call, [weight, bias], x, 1)
    together = units.expand(1, channels, *units.shape[2:]).reshape(groups, -1)
    call.flow.units.join(together, together[:, :1], f"{call.where} takes mean and variance over a group that stays")
    known = call.of(x)
    live = known.live.movedim(1, 0).flatten(1).any(1).expand(channels).view(groups, -1).any(1, keepdim=True)
    live = live.expand(groups, channels // groups).reshape(1, channels, *[1] * (x.dim() - 2))
    if weight is not None:
        live = live & (weight != 0).view(1, channels, *[1] * (x.dim() - 2))
    return [Shadow(squeezed(call.flow.units.roots(units)), squeezed(live)), fixed(2, live=True)]


# -- layers with weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Input:
    """What a weighted layer reads: `x` and `live` of shape (I, all positions), `units` (I,)."""

    x: Tensor
    live: Tensor
    units: Tensor


def _reading(call: Call, given: _Input, weight: str, bias: str | None, columns: Tensor, unread: Tensor, borders: str) -> Reading:
    """What cutting channels out of a layer's input does; `unread`: (I,), its column is all zeros.

    `borders`: why a channel that is constant is none for this layer; "" if it is.
    """
    low, high = given.x.amin(1), given.x.amax(1)
    live = given.live.any(1).expand(len(low))
    values, kept = torch.zeros(len(low), dtype=torch.float64), {}
    for channel in (~unread).nonzero().flatten().tolist():
        value, most = float(low[channel]), float(high[channel])
        if live[channel]:
            kept[channel] = f"{call.where} reads it, and it is not constant: what makes it is not masked altogether"
        elif most - value > 1e-9 * max(abs(value), abs(most), 1e-3):
            kept[channel] = f"{call.where} reads it, and it is not the same constant everywhere"
        elif value and (borders or bias is None):
            kept[channel] = f"{call.where} reads it, a constant {value:.4g}, {borders or 'and has no bias of its own for it'}"
        else:
            values[channel] = value
    return Reading(where=call.where, weight=weight, bias=bias, units=given.units, values=values, columns=columns, kept=kept)


def _whole(call: Call, tensor: Tensor | None) -> str | None:
    """The name of the parameter or buffer that `tensor` is, untouched; "" for None, None if it is none."""
    if tensor is None:
        return ""
    known = call.raw(tensor)
    same = known.index is not None and call.flow.shapes[known.stored] == tuple(tensor.shape)
    return known.stored if same and known.index is not None and bool((known.index.flatten().diff() == 1).all()) else None


def _convolution(call: Call) -> list[Shadow]:
    x, weight, bias, _, padding, _, transposed, _, groups = call.args[:9]
    flow, name = call.flow, _whole(call, weight)
    if not name:
        return unknown(call, f"{call.where} reads it, whose weight is computed from others")
    rows, columns = weight.shape[0], weight.shape[1] * groups
    conv = Conv(transposed=transposed, groups=groups, outputs=columns, inputs=rows)
    conv = conv if transposed else Conv(transposed=False, groups=groups, outputs=rows, inputs=columns)
    if flow.convs.setdefault(name, conv) != conv:
        return unknown(call)
    made, read = flow.units.of(name, OUT, conv.outputs), flow.units.of(name, IN, conv.inputs)
    units = _by_channel(call, [], x, 1)
    flow.units.join(units.flatten(), read, f"{call.where} reads a tensor whose channels are not known")
    if bias is not None:
        flow.units.join(made, _vector(call, bias), f"{call.where} has a bias that is computed")
    parts = by_group(weight.double(), conv).flatten(3)
    weighs = torch.block_diag(*parts.abs().sum(-1))  # (outputs, inputs)
    live = call.of(x).live.movedim(1, 0).flatten(1)
    if groups == conv.inputs > 1:  # depthwise: a channel is made of one, and goes with it
        flow.units.join(made.view(groups, -1), read.view(groups, 1), f"{call.where} has one channel only")
    else:
        borders = "and pads it with zeros" if any(padding) else "and is transposed: borders see less of it" if transposed else ""
        given = _Input(x=x.movedim(1, 0).flatten(1), live=live, units=read)
        sums, unread = torch.block_diag(*parts.sum(-1)), (weighs == 0).all(0)
        flow.readings.append(_reading(call, given, name, _whole(call, bias), sums, unread, borders))
    shape = [1, conv.outputs, *[1] * (x.dim() - 2)]
    alive = ((weighs != 0) & live.any(1)).any(1)
    return [Shadow(squeezed(made.view(shape)), squeezed(alive.view(shape)))]


def _matrix(call: Call) -> list[Shadow]:
    """`addmm`, `mm`: a linear layer, where the second factor is a parameter's matrix."""
    bias, x, weight = call.args[:3] if call.name == "addmm" else (None, *call.args[:2])
    axes = _axes(call, call.raw(weight))
    if axes is None or call.raw(x).stored:
        return _product(call) if bias is None else unknown(call, f"{call.where} reads it, whose weight is computed from others")
    (name, column, ins), (_, row, outs) = axes
    flow, shape = call.flow, call.flow.shapes[name]
    made, read = flow.units.of(name, row, shape[row])[outs], flow.units.of(name, column, shape[column])[ins]
    if bias is not None:
        flow.units.join(made, _vector(call, bias), f"{call.where} has a bias that is computed")
    known, why = call.of(x), f"{call.where} reads a tensor whose channels are not known"
    live = known.live.transpose(0, 1)
    alive = squeezed(((weight != 0).transpose(0, 1) & live.any(1)).any(1).view(1, -1))
    rows = flow.units.free(known.units)
    if known.units.shape[1] == 1 and bool(rows.any()):  # units go along the rows: positions are mixed, in each channel alike
        flow.units.pin(read, why)
        flow.units.pin(made, f"{call.where} mixes positions")
        return [Shadow(known.units, alive)]
    flow.units.join(rows, read.view(1, -1), why)
    columns = weight.transpose(0, 1).double()
    whole = _whole(call, bias) if tuple(weight.shape) == shape[::-1] else None
    given = _Input(x=x.transpose(0, 1), live=live, units=read)
    flow.readings.append(_reading(call, given, name, whole, columns, (columns == 0).all(0), ""))
    return [Shadow(squeezed(made.view(1, -1)), alive)]


def _axes(call: Call, known: Shadow) -> list[tuple[str, int, Tensor]] | None:
    """For both axes of a matrix of a stored tensor: (name, the dimension of it, the indices along that); None if it is none."""
    if not known.stored or known.index is None or known.index.dim() != 2:
        return None
    shape, found = call.flow.shapes[known.stored], []
    for axis in (0, 1):
        places = [coordinate(known.index, shape, dim) for dim in range(len(shape))]
        index = [one.select(1 - axis, 0) for one in places]
        fits = [
            dim
            for dim, one in enumerate(places)
            if bool((one == one.narrow(1 - axis, 0, 1)).all()) and len(torch.unique(index[dim])) == known.index.shape[axis]
        ]
        fits = fits[:1] if known.index.shape[axis] == 1 else fits
        if len(fits) != 1:
            return None
        found.append((known.stored, fits[0], index[fits[0]]))
    return found


def _product(call: Call) -> list[Shadow]:
    """A matrix product of activations: what it sums over stays; rows, columns and the dimensions before move."""
    first, second = call.args[:2]
    a, b = call.of(first), call.of(second)
    if first.dim() < 2 or second.dim() < 2:
        return unknown(call)
    for known, dim in ((a, -1), (b, -2)):
        if known.units.shape[dim] > 1:
            call.flow.units.pin(known.units, _heads(call) if known.units.shape[0] > 1 else f"{call.reader} sums over it")
    sides = [Shadow(a.units[..., :1], a.live), Shadow(b.units[..., :1, :], b.live)]
    shapes = [[*first.shape[:-1], 1], [*second.shape[:-2], 1, second.shape[-1]]]
    units = met_units(call, sides, shapes)
    left, right = (known.live.expand(one.shape).double() for known, one in ((a, first), (b, second)))
    most = [
        torch.maximum(one.abs().nan_to_num(1.0, 1.0), live) for one, live in ((first.double(), left), (second.double(), right))
    ]
    live = (left @ most[1] > 0) | (most[0] @ right > 0)
    live = live | (call.output != 0) if bool(units.any()) else live  # a sum over as many as the input has
    return [Shadow(units, squeezed(live))]


def _heads(call: Call) -> str:
    """Why channels stay that a forward splits into heads: `x.view(B, T, heads, -1)` says how many there are."""
    return f"{call.reader} works on heads, and how many is written into the forward (nn.MultiheadAttention can lose whole heads)"


def _attention(call: Call) -> list[Shadow]:
    """`scaled_dot_product_attention`: (..., heads, positions, channels)."""
    return unknown(call, _heads(call) if call.read[0].dim() > 3 and call.read[0].shape[-3] > 1 else "")


def _embedding(call: Call) -> list[Shadow]:
    table = call.args[0]
    axes = _axes(call, call.raw(table))
    if axes is None:
        return unknown(call)
    name, dim, index = axes[1]
    dims = call.output.dim()
    units = call.flow.units.of(name, dim, call.flow.shapes[name][dim])[index]
    return [Shadow(squeezed(padded(units, dims)), squeezed(padded((table != 0).any(0), dims)))]


def _names(text: str) -> list[str]:
    return text.split()


_RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "addmm": _matrix,
    "mm": _matrix,
    "bmm": _product,
    "embedding": _embedding,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "constant_pad_nd": zero_padding,
    "copy_": written,
    "glu": gated,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    **dict.fromkeys(_names("channel_shuffle native_channel_shuffle"), shuffled),
    **dict.fromkeys(_names("new_empty new_zeros new_ones new_full new_empty_strided"), empty),
    "as_strided": unknown,
    **dict.fromkeys(_names("_softmax _log_softmax"), softmax),
    **dict.fromkeys(_names("mean sum nansum amax amin max min var std argmax argmin prod any all"), reduced),
    **dict.fromkeys(_names("clone _to_copy detach alias lift_fresh"), same),
    **dict.fromkeys(_names("zeros_like ones_like full_like empty_like rand_like randn_like fill_ zero_"), alike),
    **dict.fromkeys(_names("hardswish hardswish_ _prelu_kernel rsub log_sigmoid_forward"), pointwise),
    **dict.fromkeys(
        _names(
            "cat stack repeat roll flip index_select index gather pixel_shuffle pixel_unshuffle "
            "unsafe_split unsafe_chunk unsafe_split_with_sizes _unsafe_view slice_scatter select_scatter "
            "view_copy expand_copy repeat_interleave"
        ),
        moved,
    ),
    **dict.fromkeys(
        _names(
            "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
            "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
            "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_linear1d "
            "_upsample_nearest_exact1d _upsample_nearest_exact2d reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d"
        ),
        spatial,
    ),
}


def rule_of(func: Any) -> Rule:
    """The rule of an operator."""
    name = name_of(func)
    if name in _RULES:
        return _RULES[name]
    if func.is_view:
        return moved
    return pointwise if torch.Tag.pointwise in func.tags else unknown
