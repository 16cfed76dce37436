# SPDX-License-Identifier: Apache-2.0
"""Owns constants of masked channels on the grids of a prepared model: without them it has the integers that were validated.

A deployed layer sums integers: a channel that is always x adds (q_x - z_x) times the integers of its column, a whole number of
steps of the int32 bias. That number goes into the bias, which comes to lie in the middle of a step so that float32 cannot turn
it, and the weight keeps its scales, though the largest values of a row may be among the columns that go.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.convert import convert_model
from lightning_quant.cuts import Cuts
from lightning_quant.folding import scale_and_shift, weight_of
from lightning_quant.fusion import FusedGroup
from lightning_quant.group import Group
from lightning_quant.integer import ActivatedLayer, IntegerLayer
from lightning_quant.prepare import prepared_groups
from lightning_quant.quantizers import exchanged, wide
from lightning_quant.record import copied, moved, split_example
from lightning_quant.targets import parameter_of, tensors_in
from lightning_quant.units import IN, by_group
from lightning_quant.weights import WeightGrid, WeightQuantizer


class HeldWeight(WeightQuantizer):
    """Rounds a weight to the grid that it had; values beyond the ends of the grid, if training goes on, are cut off."""

    unfolded = True

    def __init__(self, before: WeightQuantizer, weight: Tensor) -> None:
        super().__init__(before.spec, before.name, weight)
        self.changes, self.training = before.changes + 1, before.training
        self.held = before.grid(wide(weight.detach()))

    def grid(self, weight: Tensor) -> WeightGrid:
        """The grid that is held."""
        return WeightGrid(self.held.scale.to(weight), self.held.zero_point)

    def rounded(self, weight: Tensor, fold: Tensor | None = None, channel: tuple[int, ...] | None = None) -> Tensor:
        """The weight on the grid that is held, straight-through."""
        assert fold is None and channel is None, self.name
        grid = self.grid(wide(weight.detach()))
        return exchanged(weight, (self.integers(wide(weight.detach()), grid) * grid.scale).to(weight.dtype))


def hold_constants(model: nn.Module, cuts: Cuts, example_input: Any, entry: str) -> Cuts:
    """`cuts` whose biases are those of the integers of `model`, prepared and masked; its quantizers hold grids where they must.

    Layers without integers, or whose weight has a grid of another kind (learned, with a zero point, one scale under a norm),
    keep the constants of the float model.
    """
    groups = {name: found for name, found in prepared_groups(model).items() if isinstance(found[1], FusedGroup)}
    columns = _columns(groups, cuts)
    if not columns:
        return cuts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when what is left is converted
            deployed = convert_model(model).cpu()
    except ConfigError:  # it has no integers yet
        return cuts
    layers = {name: one for name in columns if (one := _integer_layer(deployed, name)) is not None}
    read = _constants(deployed, layers, example_input, entry)
    shared = Counter(id(one) for _, group in prepared_groups(model).values() for one in group.parameter_quantizers)
    biases = dict(cuts.biases)
    for name, (weight, gone) in columns.items():
        head, group = groups[name]
        assert isinstance(group, FusedGroup)
        if name not in read or bool(read[name][gone].isnan().any()):
            continue
        if shared[id(group.weight)] != 1 or not _is_plain(group, head, layers[name]):
            continue
        if weight in biases:
            q, conv = layers[name].weight.double(), cuts.convs.get(weight)
            sums = q if conv is None else torch.block_diag(*by_group(q, conv).flatten(3).sum(-1))
            biases[weight] = biases[weight][0], _moved_bias(group, head, layers[name], sums[:, gone] @ read[name][gone])
        assert group.weight is not None
        group.weight = HeldWeight(group.weight, weight_of(head))
    return replace(cuts, biases=biases)


def _columns(groups: Mapping[str, tuple[nn.Module, Group]], cuts: Cuts) -> dict[str, tuple[str, Tensor]]:
    """Layers that lose columns with numbers in them: (name of the weight, which inputs go, bool (I,))."""
    found = {}
    for name, (head, group) in groups.items():
        weight = f"{name}.weight" if name else "weight"
        conv = cuts.convs.get(weight)
        gone = cuts.gone.get((weight, 1 if conv is None else IN))
        if gone is None or group.weight is None or (conv is not None and conv.transposed):  # type: ignore[attr-defined]
            continue
        w = weight_of(head).detach().cpu()
        size = w.abs() if conv is None else torch.block_diag(*by_group(w.abs(), conv).flatten(3).amax(-1))
        if bool(size[:, gone].any()):
            found[name] = weight, gone
    return found


def _integer_layer(deployed: nn.Module, name: str) -> IntegerLayer | None:
    layer: Any = deployed.get_submodule(name)
    layer = layer.layer if isinstance(layer, ActivatedLayer) else layer
    return layer if isinstance(layer, IntegerLayer) else None


def _is_plain(group: FusedGroup, head: nn.Module, layer: IntegerLayer) -> bool:
    """Whether a layer's integers are those of its own weight, with at most one scale for each output channel."""
    quantizer = group.weight
    if type(quantizer) is not WeightQuantizer or group.bias is not None or group.norm_before is not None:
        return False
    stands = group.norm is None or quantizer.commutes(weight_of(head))
    return stands and layer.zero_point is None and layer.scale.dim() <= 1


def _moved_bias(group: FusedGroup, head: nn.Module, layer: IntegerLayer, added: Tensor) -> Tensor:
    """What to add to the bias of a layer, float64 (O,), so that its int32 bias is larger by `added`."""
    bias = parameter_of(head, "bias")
    old = torch.zeros_like(added) if bias is None else bias.detach().cpu().double()
    wanted = (layer.bias.double() + added) * (layer.scale.double() * layer.x.scale)
    if group.norm is None:
        return wanted - old
    k, t = (side.cpu() for side in scale_and_shift(group.norm))
    return torch.where(k == 0, 0.0, (wanted - t) / torch.where(k == 0, 1.0, k) - old)


def _constants(deployed: nn.Module, layers: dict[str, IntegerLayer], example_input: Any, entry: str) -> dict[str, Tensor]:
    """For each layer that is called, what its input channels always are, float64 (I,) in steps from zero; NaN for the others."""
    found: dict[str, Tensor] = {}

    def look(name: str, layer: IntegerLayer, given: Collection[Any]) -> None:
        x = next(iter(tensors_in(given))).detach().float()
        x = x.movedim(1 if layer.weight.dim() > 2 else -1, 0).flatten(1)
        least, most = (end - layer.x.zero_point for end in (layer.x.clip_low, layer.x.clip_high))
        q = torch.round(x / layer.x.scale).clamp_(least, most).double()
        constant = torch.where((q == q[:, :1]).all(1), q[:, 0], torch.nan)
        before = found.setdefault(name, constant)
        found[name] = torch.where(before == constant, before, torch.nan)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name, layer=layer: look(name, layer, given))
        for name, layer in layers.items()
    ]
    args, kwargs = copied(moved(split_example(example_input), "cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            deployed.get_submodule(entry)(*args, **kwargs)
    except Exception:  # noqa: BLE001  (a forward that looks into its layers: the check of the conversion says so)
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found
