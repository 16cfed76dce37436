# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `channels.py`: which output channels of which layers meet in a recorded forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo_more  # noqa: F401  (registers its nets)
from torch import Tensor, nn
from toys import Calls
from zoo import ZOO

from lightning_quant import ConfigError
from lightning_quant.channels import Channels, in_channels, is_depthwise, out_channels
from lightning_quant.masks import Masks, make_pruning
from lightning_quant.patterns import TRANSPOSED, is_head
from lightning_quant.record import record, split_example
from lightning_quant.schedule import Clock
from lightning_quant.symbolic import trace


def conv(i: int, o: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, groups=groups)


def channels_of(model: nn.Module, *shape: int) -> Channels:
    return Channels(record(model.eval(), torch.randn(*shape)), dict(model.named_modules()))


def partners(channels: Channels) -> list[set[str]]:
    """The sets of layers with common channels."""
    found: list[set[str]] = []
    for layer in channels.first:
        group = {layer, *channels.joined(layer)}
        if len(group) > 1 and group not in found:
            found.append(group)
    return found


FORWARDS: dict[str, tuple[Callable[..., Any], list[set[str]]]] = {
    "chain": (lambda m, x: m.b(F.relu(m.a(x))), []),
    "add": (lambda m, x: F.relu(m.a(x)) + m.norm(m.b(x)), [{"a", "b"}]),
    "in place": (lambda m, x: m.a(x).add_(m.b(x)), [{"a", "b"}]),
    "add of a branch": (lambda m, x: m.c(m.a(x) + m.b(m.a(x))), [{"a", "b"}]),
    "chain of adds": (lambda m, x: m.a(x) + m.b(x) + m.c(m.a(x)), [{"a", "b", "c"}]),
    "multiplication by a gate": (
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x).mean((2, 3), keepdim=True))),
        [{"a", "b"}],
    ),
    "add of a number": (lambda m, x: m.b(m.a(x) + 1), []),
    "add to the input": (lambda m, x: m.b(m.a(x) + x), []),
    "concatenation of channels": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), []),
    "concatenation of a batch": (lambda m, x: torch.cat([m.a(x), m.b(x)], 0), [{"a", "b"}]),
    "add to a concatenation": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + m.wide(x), [{"a", "b", "wide"}, {"a", "wide"}]),
    "sum over channels": (lambda m, x: m.a(x).sum(1) + m.b(x).sum(1), []),
    "pooled and flattened": (
        lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)) + m.fc2(F.max_pool2d(m.b(x), 4).reshape(2, -1)),
        [{"fc", "fc2"}],
    ),
    "flattened with its places": (lambda m, x: m.a(x).flatten(1) + m.b(x).view(2, -1), [{"a", "b"}]),
    "channels last": (lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1)) + m.b(x).transpose(1, 3), [{"fc", "b"}]),
    "mixed by a view": (lambda m, x: m.a(x).view(2, 2, 2, 4, 4).sum(2) + m.b(x).view(2, 2, 2, 4, 4).sum(2), []),
    "resized": (lambda m, x: F.interpolate(m.a(x)[:, :, ::1, ::1], 4) + F.interpolate(m.b(x), 4), []),
    "transposed": (lambda m, x: m.up(m.a(x)) + F.interpolate(m.b(x), size=(6, 6)), [{"up", "b"}]),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_where_channels_meet(case: str) -> None:
    forward, expected = FORWARDS[case]
    layers: dict[str, nn.Module] = {"a": conv(4, 4), "b": conv(4, 4), "c": conv(4, 4), "wide": conv(4, 8)}
    layers |= {"norm": nn.BatchNorm2d(4), "up": nn.ConvTranspose2d(4, 4, 3), "fc": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}
    found = partners(channels_of(Calls(forward, **layers), 2, 4, 4, 4))
    assert all(one in found for one in expected) and bool(found) == bool(expected)
    if len(expected) == 1:
        assert found == expected


def test_channels_that_meet_a_concatenation_are_those_at_their_places() -> None:
    model = Calls(lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + m.wide(x), a=conv(4, 3), b=conv(4, 5), wide=conv(4, 8))
    segments = channels_of(model, 1, 4, 4, 4).segments(["a", "b", "wide"])
    members = [{name: at.tolist() for name, at in segment.members} for segment in segments]
    assert members == [{"a": [0, 1, 2], "wide": [0, 1, 2]}, {"b": [0, 1, 2, 3, 4], "wide": [3, 4, 5, 6, 7]}]


def test_a_layer_that_meets_itself_has_two_channels_in_a_class() -> None:
    model = Calls(lambda m, x: torch.cat([m.a(x), m.a(x)], 1) + m.wide(x), a=conv(4, 3), wide=conv(4, 6))
    (segment,) = channels_of(model, 1, 4, 4, 4).segments(["a", "wide"])
    assert [(name, at.tolist()) for name, at in segment.members] == [("a", [0, 1, 2]), ("wide", [0, 1, 2]), ("wide", [3, 4, 5])]


def test_only_the_layers_that_are_asked_for_make_segments() -> None:
    model = Calls(lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + m.wide(x), a=conv(4, 3), b=conv(4, 5), wide=conv(4, 8))
    (segment,) = channels_of(model, 1, 4, 4, 4).segments(["wide"])
    assert [(name, at.tolist()) for name, at in segment.members] == [("wide", list(range(8)))]


def test_a_depthwise_convolution_has_the_channels_it_reads() -> None:
    model = Calls(lambda m, x: m.c(m.dw(F.relu(m.a(x)))), a=conv(3, 4), dw=conv(4, 8, groups=4), c=conv(8, 2))
    channels = channels_of(model, 1, 3, 4, 4)
    (segment,) = channels.segments(["a", "dw"])
    assert [(n, at.tolist()) for n, at in segment.members] == [("a", [0, 1, 2, 3]), ("dw", [0, 2, 4, 6]), ("dw", [1, 3, 5, 7])]
    masks = channels.followed({"a": torch.tensor([True, False, True, False])}, ["dw"])
    assert masks["dw"].tolist() == [True, True, False, False, True, True, False, False]


def test_a_grouped_convolution_keeps_its_groups_apart() -> None:
    model = Calls(lambda m, x: m.c(m.g(m.a(x))), a=conv(3, 8), g=conv(8, 4, groups=2), c=conv(4, 2))
    segments = channels_of(model, 1, 3, 4, 4).segments(["a", "g"])
    members = [{name: at.tolist() for name, at in segment.members} for segment in segments]
    assert members == [{"a": [0, 1, 2, 3]}, {"a": [4, 5, 6, 7]}, {"g": [0, 1]}, {"g": [2, 3]}]


def test_a_batch_norm_follows_what_it_reads() -> None:
    layers: dict[str, nn.Module] = {"a": conv(4, 4), "b": conv(4, 4), "n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(8)}
    layers |= {"n3": nn.BatchNorm2d(4), "n4": nn.BatchNorm2d(4)}

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.n1(m.a(x))))
        return torch.cat([m.n3(y), m.n4(x + m.a(x)), m.n2(torch.cat([m.a(x), y], 1))], 1)

    channels = channels_of(Calls(forward, **layers), 1, 4, 4, 4)
    half, other = torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])
    found = channels.followed({"a": half, "b": other}, list(channels.follows))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "n1": half.tolist(),
        "n3": other.tolist(),
        "n4": [True] * 4,  # the model's input is in it
        "n2": [*half.tolist(), *other.tolist()],
    }
    assert channels.norm_behind == {}  # a and b have other readers, too


def test_the_batch_norm_that_alone_reads_a_layer() -> None:
    model = Calls(lambda m, x: m.n2(m.b(m.drop(m.n1(m.a(x))))), a=conv(3, 4), n1=nn.BatchNorm2d(4), b=conv(4, 2))
    model.n2, model.drop = nn.BatchNorm2d(2), nn.Dropout()
    assert channels_of(model, 1, 3, 4, 4).norm_behind == {"a": "n1", "b": "n2"}


def test_layers_that_make_what_the_model_returns() -> None:
    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(m.b(F.relu(m.a(x))))
        return {"logits": F.log_softmax(m.fc(y.mean((2, 3))), 1), "map": torch.sigmoid(m.norm(m.c(y)))}

    layers: dict[str, nn.Module] = {"a": conv(3, 4), "b": conv(4, 4), "c": conv(4, 2), "norm": nn.BatchNorm2d(2)}
    assert channels_of(Calls(forward, **layers, fc=nn.Linear(4, 2)), 1, 3, 4, 4).ends == {"fc", "c", "norm"}


def test_an_embedding_that_is_looked_up_makes_unknown_channels() -> None:
    model = Calls(
        lambda m, x: m.fc(m.table(x)) + m.fc2(m.table(x)), table=nn.Embedding(9, 4), fc=nn.Linear(4, 4), fc2=nn.Linear(4, 4)
    )
    graph = record(model, torch.zeros(2, 3, dtype=torch.long))
    assert partners(Channels(graph, dict(model.named_modules()))) == [{"fc", "fc2"}]


def test_no_forward_or_one_without_shapes_knows_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    traced = trace(model)
    assert not isinstance(traced, str)
    for graph in (None, traced):
        channels = Channels(graph, dict(model.named_modules()))
        assert not channels.first and not channels.segments(["0"]) and not channels.ends


@pytest.mark.parametrize(
    ("layer", "outs", "ins", "depthwise"),
    [
        (nn.Linear(3, 5), 5, 3, False),
        (conv(4, 6, groups=2), 6, 4, False),
        (conv(4, 8, groups=4), 8, 4, True),
        (conv(1, 8), 8, 1, False),
        (nn.ConvTranspose2d(4, 6, 3), 6, 4, False),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 6, 4, False),
        (nn.ConvTranspose1d(4, 4, 3, groups=4), 4, 4, True),
    ],
    ids=str,
)
def test_how_many_channels_a_layer_has(layer: nn.Module, outs: int, ins: int, depthwise: bool) -> None:
    assert (out_channels(layer), in_channels(layer), is_depthwise(layer)) == (outs, ins, depthwise)


# -- nets of every usual shape ------------------------------------------------------------------------------------------

WEIGHT_NORMED = {"DCGANDiscriminator", "TemporalConvNet"}


@pytest.mark.parametrize("name", ZOO)
def test_half_of_every_net_is_masked_with_channels_that_meet_alike(name: str) -> None:
    model, example = ZOO[name].make().eval(), ZOO[name].example()
    types = sorted({type(module).__name__ for module in model.modules() if is_head(module)})
    if not types:
        assert name == "FunctionalOnly"
        return
    graph = record(model, example)
    pruning = {"config_list": [{"op_types": types, "sparse_ratio": 0.5}], "schedule": "one_shot"}
    if name in WEIGHT_NORMED:
        with pytest.raises(ConfigError, match=r"is no Parameter of its own \(parametrized or weight-normed\)"):
            make_pruning(model, pruning, graph)
        return
    masks = Masks(model, make_pruning(model, pruning, graph))
    masks.step(Clock(step=0, epoch=0, done=0, length=0))
    transposed = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, TRANSPOSED)}
    seen = {key: mask for key, mask in masks.by_target().items() if mask.dim() > 1}
    rows = {key: (mask.transpose(0, 1) if key in transposed else mask).flatten(1).any(1) for key, mask in seen.items()}
    for unit in masks.plan.units:
        first = None
        for target, at in unit.members:
            one = rows[target] if at is None else rows[target][at]
            assert first is None or torch.equal(one, first)
            first = one
        assert first is not None and int((~first).sum()) == len(first) // 2
    args, kwargs = split_example(example)
    model(*args, **kwargs)
