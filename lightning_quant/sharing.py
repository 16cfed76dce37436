# SPDX-License-Identifier: Apache-2.0
"""Owns placement: one quantizer for each tensor, whoever makes it and however many read it; borders of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_quant.graph import Graph
from lightning_quant.keys import INPUT, OUTPUT
from lightning_quant.layers import LayerPlan
from lightning_quant.matching import Draft, TargetPlan
from lightning_quant.targets import is_input, output_key


def _ends(layers: Sequence[LayerPlan], graph: Graph) -> dict[int, tuple[LayerPlan, str]]:
    """The node that makes a layer's one output -> (layer, that output's target); outputs that stay float count, too.

    Where the last layer inside another one makes what the outer one returns, the outer one's rounding is what arrives.
    """
    ends: dict[int, tuple[LayerPlan, str]] = {}
    for layer in sorted(layers, key=lambda layer: -layer.name.count(".")):
        for call in graph.boundaries.get(layer.end, ()):
            made = {key: seen for key, seen in call.outputs.items() if seen.type == "Tensor"}
            if len(made) == 1:
                (key, seen), *_ = made.items()
                target = next((t for t in layer.targets if not is_input(t) and output_key(t, call.outputs) == key), OUTPUT)
                if seen.source not in graph.split and (seen.source not in ends or _rounded_output(layer, target)):
                    ends[seen.source] = (layer, target)
    return ends


def _enclosing(layer: LayerPlan, layers: Sequence[LayerPlan]) -> LayerPlan | None:
    """The innermost layer around this one that rounds what it is given."""
    around = [
        other
        for other in layers
        if layer.name.startswith(f"{other.name}.") and any(is_input(t) and p.active for t, p in other.targets.items())
    ]
    return max(around, key=lambda other: len(other.name), default=None)


def _rounded_output(layer: LayerPlan, target: str) -> TargetPlan | None:
    plan = layer.targets.get(target)
    return plan if plan is not None and plan.active else None


def share(layers: list[LayerPlan], graph: Graph) -> list[LayerPlan]:
    """One quantizer per tensor: an input that arrives rounded on an equal grid needs none, two readers share one.

    A module that only hands values on (a pool, say) has one range for what comes in and what goes out.
    """
    layers = [_passed_on(layer, graph) for layer in layers]
    ends = _ends(layers, graph)
    stops = {index for index, end in ends.items() if _rounded_output(*end) is not None}
    order = sorted(layers, key=lambda layer: graph.boundaries[layer.start][0].order)
    first_reader: dict[tuple[Any, ...], str] = {}
    source: dict[tuple[str, str], str] = {}

    def origin(index: int) -> int:
        while index >= 0 and index not in stops and graph.nodes[index].passing and graph.nodes[index].reads:
            index = graph.nodes[index].reads[0]
        return index

    for layer in order:
        around = _enclosing(layer, layers)
        inside = "" if around is None else f"{around.name}."  # what comes in there is rounded anew
        for target, plan in layer.targets.items():
            if not is_input(target) or not plan.active:
                continue
            reads = {call.inputs[target].source if target in call.inputs else -1 for call in graph.boundaries[layer.start]}
            # Blocks have the dimensions of their tensor, which a reshape on the way may have changed.
            whole = plan.spec.granularity == "per_tensor"
            makers = [ends.get(origin(index) if whole else index) for index in reads]
            maker = makers[0] if all(m is not None and m == makers[0] for m in makers) else None
            if maker is not None and (layer.name.startswith(f"{maker[0].name}.") or not maker[0].name.startswith(inside)):
                maker = None
            made = None if maker is None else _rounded_output(*maker)
            if made is not None and made.spec.grid == plan.spec.grid:
                assert maker is not None
                source[layer.name, target] = f"{maker[0].name}.{maker[1]}"
            elif len(reads) == 1 and min(reads) >= 0 and not reads & graph.split:
                own = f"{layer.name}.{target}"
                alike = (min(reads), inside, plan.spec.grid, plan.spec.apply_method, plan.spec.observer)
                owner = first_reader.setdefault(alike, own)
                if owner != own:
                    source[layer.name, target] = owner
    return [
        replace(layer, targets={t: replace(p, source=source.get((layer.name, t), p.source)) for t, p in layer.targets.items()})
        for layer in layers
    ]


def _passed_on(layer: LayerPlan, graph: Graph) -> LayerPlan:
    nodes = graph.calls(layer.name)
    given, made = layer.targets.get(INPUT), layer.targets.get(OUTPUT)
    if not nodes or not all(node.passing for node in nodes) or given is None or made is None:
        return layer
    one_scale = given.spec.granularity == "per_tensor"
    if not (given.active and made.active and one_scale) or given.spec.grid != made.spec.grid:
        return layer
    return replace(layer, targets={**layer.targets, OUTPUT: replace(made, source=f"{layer.name}.{INPUT}")})


def free_last_output(layer: LayerPlan, layers: list[LayerPlan], draft: Draft, graph: Graph | None) -> LayerPlan:
    """High-precision output: a last weighted layer keeps a float output unless it was asked to be rounded.

    `_output_` in target_names asks for it, and so does `high_precision_output: false`; `true` leaves the output of every layer
    that its entry selects float.
    """
    norm = layer.type.startswith(("BatchNorm", "SyncBatchNorm"))
    if not layer.folds or norm or OUTPUT not in layer.targets or draft.float_output is False:
        return layer
    if draft.float_output is not True:
        if OUTPUT in draft.explicit or graph is None or not _is_last(layer, layers, graph):
            return layer
        if layer.type.startswith("Conv") and not layer.type.startswith("ConvTranspose"):
            return replace(layer, notes=(*layer.notes, "last layer, output quantized: no int8 convolution has a float output"))
    said = "last layer: float output" if draft.float_output is None else "high_precision_output: float output"
    targets = {name: target for name, target in layer.targets.items() if name != OUTPUT}
    return replace(layer, targets=targets, inner=None, notes=(*layer.notes, said))


def _is_last(layer: LayerPlan, layers: list[LayerPlan], graph: Graph) -> bool:
    ends = {call.index for call in graph.calls(layer.end)}
    after = ends.union(*(graph.downstream(index) for index in ends))
    for other in layers:
        calls = graph.boundaries.get(other.start, ())
        if other.name != layer.name and any(seen.source in after for call in calls for seen in call.inputs.values()):
            return False
    return True
