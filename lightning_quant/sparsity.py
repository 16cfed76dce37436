# SPDX-License-Identifier: Apache-2.0
"""Owns what pruning did to a model, read from the model alone: zeros in its weights, the sizes that its layers came with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from torch import Tensor, nn

CUTS = "_lightning_quant_cuts"  # in the `__dict__` of a model that was made smaller, so that a net of its class can be, too
CAME = "_lightning_quant_came"  # in that of a deployed layer, whose float weights are gone


@dataclass(frozen=True, kw_only=True)
class Came:
    """What a float layer was before anything was removed from it.

    `parameters`: numbers that training moves; `float_bytes`: theirs and those of running statistics. `weights`: values of the
    parameters with two or more dimensions; `zeros` of them are 0, `removed` are gone.
    """

    parameters: int
    float_bytes: int
    weights: int
    zeros: int
    removed: int

    @property
    def sparsity(self) -> float | None:
        """The share of weights that are 0 or gone, in [0, 1]; None where none is."""
        gone = self.zeros + self.removed
        return gone / self.weights if gone else None


Sizes = Mapping[int, int]


def sizes_before(model: nn.Module) -> dict[int, int]:
    """How many values a tensor had before the model was made smaller, by the id of the parameter or buffer; of these alone.

    A bias that holds the constants of removed channels, in a layer that had none, had 0.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        cuts = module.__dict__.get(CUTS)
        if cuts is None:
            continue
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        for name, shape in cuts["shapes"].items():
            if name in tensors:
                found[id(tensors[name])] = math.prod(shape)
        for weight in cuts["biases"]:
            bias = tensors.get(".".join([*weight.split(".")[:-1], "bias"]))
            found.update({} if bias is None else {id(bias): 0})
    return found


def is_smaller(model: nn.Module) -> bool:
    """Whether channels were removed from the model."""
    return any(module.__dict__.get(CUTS, {}).get("shapes") for module in model.modules())


def came(modules: Iterable[nn.Module], sizes: Sizes) -> Came:
    """What a layer that these modules make was, what is inside them included. `sizes`: of `sizes_before`."""
    return came_of((tensor for module in modules for tensor in (*module.parameters(), *module.buffers())), sizes)


def came_of(tensors: Iterable[Tensor], sizes: Sizes) -> Came:
    """The same for parameters and buffers; a tensor that stands there twice counts once."""
    own = {id(tensor): tensor for tensor in tensors if tensor.is_floating_point()}.values()
    trained = [one for one in own if isinstance(one, nn.Parameter)]
    weights = [one for one in trained if one.dim() > 1]
    before = {id(one): sizes.get(id(one), one.numel()) for one in own}
    return Came(
        parameters=sum(before[id(one)] for one in trained),
        float_bytes=sum(before[id(one)] * one.element_size() for one in own),
        weights=sum(before[id(one)] for one in weights),
        zeros=sum(int((one.detach() == 0).sum()) for one in weights),
        removed=sum(before[id(one)] - one.numel() for one in weights),
    )


def added(parts: Sequence[Came]) -> Came:
    """What several layers were together."""
    return Came(**{key.name: sum(getattr(one, key.name) for one in parts) for key in fields(Came)})


def note_came(layer: nn.Module, one: Came) -> None:
    """Keep this with the deployed layer."""
    layer.__dict__[CAME] = asdict(one)


def noted(layer: nn.Module) -> Came | None:
    """What was kept with a deployed layer."""
    found = layer.__dict__.get(CAME)
    return None if found is None else Came(**found)


def work_before(model: nn.Module, counts: Mapping[str, int]) -> dict[str, int]:
    """Multiply-adds before channels were removed, by the names of modules, "" for the whole model; of those alone that got less.

    `counts`: those of the smaller model, by the same names. The shares are those of the example that the model was made smaller
    with, and hold for others that differ from it in the number of samples or, for convolutions, in their height and width.
    """
    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, (before, after) in module.__dict__.get(CUTS, {}).get("multiply_adds", {}).items():
            whole = ".".join(filter(None, (prefix, name)))
            if after and whole in counts:
                found[whole] = round(counts[whole] * before / after)
        if prefix and prefix in found and CUTS in module.__dict__ and "" in counts:
            found[""] = counts[""] + found[prefix] - counts[prefix]
    return found
