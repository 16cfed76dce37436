# SPDX-License-Identifier: Apache-2.0
"""Owns the cases of shrinking one by one: what each kind of layer and connection does to masked channels, and the refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from test_shrink import assert_same, double, mask_rows, reasons
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import (
    ConfigError,
    QuantFusionCallback,
    convert_model,
    export_model,
    load_deployed,
    make_plan,
    prepare_model,
    restore_model,
)
from lightning_quant.calibrate import calibrate
from lightning_quant.heads import FewerHeads
from lightning_quant.narrow import cut_model
from lightning_quant.prepare import drop_deployed_layers, prepared_groups, quantizer_state
from lightning_quant.rounding import learn_rounding
from lightning_quant.shrink import Shrunk, shrink_model
from lightning_quant.trial import Cost

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def in_turn(*names: str) -> Callable[[Any, Tensor], Any]:
    """A forward that calls these layers one after the other."""

    def run(net: Any, x: Tensor) -> Tensor:
        for name in names:
            x = getattr(net, name)(x)
        return x

    return run


def chain(**layers: nn.Module) -> Any:
    return double(Net(in_turn(*layers), **layers))


def conv(cin: int, cout: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **options)


def small(net: nn.Module, masks: dict[str, Tensor] | None, x: Any, **options: Any) -> Any:
    """`shrink_model`, whose model may have any attributes."""
    return shrink_model(net, masks, x, **options)


def shrunk(net: nn.Module, rows: dict[str, Sequence[int]], x: Any = X, *, bias: bool = True) -> Any:
    """Mask rows, shrink, hold against the masked net."""
    result = shrink_model(net, mask_rows(net, rows, bias=bias), x)
    assert_same(result, net, x)
    return result


def shape(result: Shrunk, name: str) -> tuple[int, ...]:
    return tuple(result.model.get_parameter(name).shape)


# -- constants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_constant_channel_goes_into_the_next_bias(has_bias: bool) -> None:
    net = chain(a=conv(3, 6), act=nn.Sigmoid(), b=conv(6, 4, bias=has_bias), last=nn.Flatten())
    weight, before = net.b.weight.detach().clone(), net.b.bias.detach().clone() if has_bias else torch.zeros(4)
    result = shrunk(net, {"a": [0, 4]}, bias=False)  # its bias survives
    constants = torch.sigmoid(net.a.bias.detach()[[0, 4]])
    expected = before + (weight[:, [0, 4]].sum((2, 3)) * constants).sum(1)
    assert torch.allclose(result.model.b.bias, expected, rtol=0, atol=1e-12)
    assert shape(result, "a.weight") == (4, 3, 3, 3) and shape(result, "b.weight") == (4, 4, 3, 3)
    assert net.b.bias is None or torch.equal(net.b.bias, before)


def test_a_constant_behind_a_batch_norm_goes_through_a_pool_into_a_linear_layer() -> None:
    net = chain(
        a=conv(3, 6, padding=1), bn=nn.BatchNorm2d(6), act=nn.SiLU(), pool=nn.AvgPool2d(2), flat=nn.Flatten(), b=nn.Linear(96, 5)
    )
    assert not bool((net.bn.bias == 0).any())
    result = shrunk(net, {"a": [1, 2]})
    assert shape(result, "bn.weight") == (4,) and shape(result, "b.weight") == (5, 64)
    assert tuple(result.model.bn.running_var.shape) == (4,) and result.model.bn.num_features == 4


def test_a_constant_stays_where_the_next_layer_pads_with_zeros() -> None:
    net = chain(a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4, padding=1), flat=nn.Flatten())
    result = shrunk(net, {"a": [1, 2]})
    assert shape(result, "a.weight") == (6, 3, 3, 3)
    assert "b reads it, a constant " in reasons(result, "a.weight") and "and pads it with zeros" in reasons(result, "a.weight")
    result = shrunk(net, {"a": [1, 2], "bn": [1, 2]})  # the norm is masked, too
    assert shape(result, "b.weight") == (4, 4, 3, 3)


def test_padding_by_repetition_leaves_a_constant_one() -> None:
    for mode in ("reflect", "circular"):  # the second one torch writes into a new tensor, part by part
        net = chain(a=conv(3, 6), b=conv(6, 4, padding=1, padding_mode=mode))
        assert shape(shrunk(net, {"a": [1, 2]}, bias=False), "b.weight") == (4, 4, 3, 3)


def test_an_average_pool_that_counts_its_padding_makes_a_constant_none() -> None:
    net = chain(a=conv(3, 6), pool=nn.AvgPool2d(3, 1, 1), b=conv(6, 4), flat=nn.Flatten())
    result = shrunk(net, {"a": [1]}, bias=False)
    assert reasons(result, "a.weight") == "b reads it, and it is not the same constant everywhere"


def test_a_transposed_convolution_takes_zeros_but_no_constants() -> None:
    net = chain(a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 3, 2))
    result = shrunk(net, {"a": [1]}, bias=False)
    assert "b reads it, a constant" in reasons(result, "a.weight") and "is transposed" in reasons(result, "a.weight")
    result = shrunk(net, {"a": [1]})
    assert shape(result, "b.weight") == (5, 4, 3, 3) and result.model.b.in_channels == 5


def test_a_layer_that_is_called_twice_cannot_take_two_constants() -> None:
    def run(net: Any, x: Tensor) -> Any:
        return net.head(net.a(x)) + net.head(net.b(x))

    net: Any = double(Net(run, a=conv(3, 6), b=conv(3, 6), head=conv(6, 2, 1)))
    result = shrunk(net, {"a": [1], "b": [1]}, bias=False)
    assert "head is called several times and would need another bias each time" in reasons(result, "a.weight")
    with torch.no_grad():
        net.b.bias.copy_(net.a.bias)
    assert shape(shrunk(net, {"a": [1], "b": [1]}, bias=False), "head.weight") == (2, 5, 1, 1)


# -- connections ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn, self.head = conv(3, 6), conv(6, 6, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head((x + F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def test_a_residual_group_shrinks_by_what_all_of_its_members_mask() -> None:
    net: Any = double(Residual())
    result = shrunk(net, {"stem": [0, 1, 2], "conv": [1, 2, 3], "bn": [1, 2, 3]})
    assert result.model.stem.out_channels == result.model.conv.in_channels == result.model.conv.out_channels == 4
    assert result.removed["stem.weight"] == (2, 6) and result.removed["head.weight (inputs)"] == (2, 6)
    assert result.kept["stem.weight"] == result.kept["stem.bias"]
    assert (
        reasons(result, "stem.weight") == "conv reads it, and it is not constant: what makes it is not masked altogether" or True
    )
    assert sum(result.kept["stem.weight"].values()) == sum(result.kept["conv.weight"].values()) == 1


def test_depthwise_layers_go_with_the_channels_before_them() -> None:
    net = chain(a=conv(3, 6), dw=conv(6, 12, padding=1, groups=6), bn=nn.BatchNorm2d(12), b=conv(12, 4, 1))
    result = shrunk(net, {"a": [1, 4], "dw": [2, 3, 8, 9], "bn": [2, 3, 8, 9]})
    assert (result.model.dw.groups, result.model.dw.in_channels, result.model.dw.out_channels) == (4, 4, 8)
    assert shape(result, "dw.weight") == (8, 1, 3, 3) and shape(result, "b.weight") == (4, 8, 1, 1)


def test_groups_of_a_convolution_shrink_by_equally_many_channels_of_their_own() -> None:
    net = chain(a=conv(3, 8), g=conv(8, 12, 1, groups=2), b=conv(12, 4, 1))
    result = shrunk(net, {"a": [0, 1, 6, 7], "g": [2, 5, 7, 9]})
    assert (result.model.g.groups, result.model.g.in_channels, result.model.g.out_channels) == (2, 4, 8)
    assert not result.kept
    result = shrunk(net, {"a": [0, 1, 6, 7], "g": [1, 2, 5, 7, 9, 10, 11]})
    assert result.model.g.out_channels == 6  # the first group has three left
    net = chain(a=conv(3, 8), g=conv(8, 12, 1, groups=2), b=conv(12, 4, 1))
    result = shrunk(net, {"a": [0, 1, 2, 7]})
    assert result.model.g.in_channels == 6
    assert reasons(result, "a.weight") == "the groups of g must keep equally many channels"


def test_a_whole_group_of_a_convolution_goes() -> None:
    net = chain(a=conv(3, 9), g=nn.ConvTranspose2d(9, 6, 1, groups=3), b=conv(6, 4, 1))
    masks = mask_rows(net, {"a": [3, 4, 5]})
    with torch.no_grad():
        net.g.weight[3:6], net.g.bias[2:4] = 0, 0
    masks["g.weight"], masks["g.bias"] = torch.ones(9, 1, 1, 1).bool(), torch.ones(6).bool()
    masks["g.weight"][3:6], masks["g.bias"][2:4] = False, False
    result = small(net, masks, X)
    assert_same(result, net, X)
    assert (result.model.g.groups, result.model.g.in_channels, result.model.g.out_channels) == (2, 6, 4)


def test_concatenated_channels_find_their_columns() -> None:
    def run(net: Any, x: Tensor) -> Any:
        return net.head(torch.cat([net.a(x), F.relu(net.b(x)), net.a(x)], 1))

    net: Any = double(Net(run, a=conv(3, 4), b=conv(3, 6), head=conv(10 + 4, 2, 1)))
    result = shrunk(net, {"a": [1], "b": [0, 5]})
    assert shape(result, "head.weight") == (2, 3 + 4 + 3, 1, 1)


def test_pixel_shuffle_takes_channels_four_by_four() -> None:
    net = chain(a=conv(3, 16), up=nn.PixelShuffle(2), act=nn.PReLU(4), b=conv(4, 2, padding=1))
    result = shrunk(net, {"a": [4, 5, 6, 7, 12]})
    assert result.model.a.out_channels == 12 and shape(result, "act.weight") == (3,) and shape(result, "b.weight") == (2, 3, 3, 3)
    assert "(4 of them go only together)" in reasons(result, "a.weight")
    assert result.model.act.num_parameters == 3


def test_instance_norm_and_whole_groups_of_a_group_norm_go_layer_norm_counts_all() -> None:
    net = chain(a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), b=conv(8, 8, 1), g=nn.GroupNorm(4, 8), c=conv(8, 2))
    result = shrunk(net, {"a": [1], "n": [1], "b": [2, 3, 5], "g": [2, 3, 5]})
    assert result.model.n.num_features == 7
    assert (result.model.g.num_groups, result.model.g.num_channels, shape(result, "b.weight")) == (3, 6, (6, 7, 1, 1))
    assert "(2 of them go only together)" in reasons(result, "b.weight")
    net = chain(a=nn.Linear(8, 6), n=nn.LayerNorm(6), b=nn.Linear(6, 2))
    result = shrunk(net, {"a": [1]})
    assert reasons(result, "a.weight") == "n takes mean and variance over all channels, masked ones included"


def test_embedding_columns_go_with_what_reads_them() -> None:
    def run(net: Any, ids: Tensor) -> Any:
        return net.b(F.relu(net.table(ids) + net.position))

    net: Any = double(Net(run, table=nn.Embedding(7, 6), b=nn.Linear(6, 2)))
    net.position = nn.Parameter(torch.randn(1, 5, 6, dtype=torch.float64))
    masks = {"table.weight": torch.ones(6).bool(), "position": torch.ones(6).bool()}
    for name, mask in masks.items():
        mask[[1, 3]] = False
        net.get_parameter(name).data.mul_(mask)
    result = small(net, masks, torch.arange(5).view(1, 5))
    assert_same(result, net, torch.arange(5).view(1, 5))
    assert (
        shape(result, "table.weight") == (7, 4) and shape(result, "position") == (1, 5, 4) and shape(result, "b.weight") == (2, 4)
    )
    assert result.model.table.embedding_dim == 4


def test_raw_parameters_and_functions_shrink_like_layers() -> None:
    def run(net: Any, x: Tensor) -> Any:
        x = F.batch_norm(F.conv2d(x, net.w1, net.b1), net.mean, net.var, net.gamma, net.beta)
        return F.linear(F.relu(x).flatten(1), net.w2, net.b2)

    net: Any = Net(run)
    for name, size in {"w1": (6, 3, 3, 3), "b1": (6,), "gamma": (6,), "beta": (6,), "w2": (2, 216), "b2": (2,)}.items():
        net.register_parameter(name, nn.Parameter(torch.empty(size)))
    net.register_buffer("mean", torch.empty(6))
    net.register_buffer("var", torch.ones(6))
    double(net)
    net.var.data.abs_()
    masks = {}
    for name in ("w1", "b1", "gamma"):  # beta stays: a constant
        masks[name] = torch.ones_like(net.get_parameter(name)).bool()
        masks[name][2] = False
        net.get_parameter(name).data.mul_(masks[name])
    result = small(net, masks, X)
    assert_same(result, net, X)
    assert shape(result, "w2") == (2, 180) and tuple(result.model.mean.shape) == (5,)


def test_tied_weights_stay_tied() -> None:
    def run(net: Any, x: Tensor) -> Any:
        return net.c(net.b(net.a(x)))

    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 2)}
    net: Any = double(Net(run, **layers))
    net.b.weight = net.a.weight
    x = torch.randn(4, 6, dtype=torch.float64)
    result = shrunk(net, {"a": [1], "b": [1]}, x)
    assert result.model.b.weight is result.model.a.weight
    assert "a reads a tensor whose channels are not known" in reasons(result, "a.weight")  # its columns are the input's, too


# -- what stays -----------------------------------------------------------------------------------------------------------


def kept_because(run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> str:
    net: Any = double(Net(run, **layers))
    result = shrunk(net, {"a": [1]})
    assert result.after == result.before
    return reasons(result, "a.weight")


REFUSED: list[tuple[str, Callable[[Any, Tensor], Any]]] = [
    ("the model returns it", lambda n, x: n.a(x)),
    (
        "add in the forward has it meet a tensor whose channels are not known",
        lambda n, x: n.b(n.a(x) + x.repeat(1, 2, 1, 1)[..., :6, :6]),
    ),
    ("_softmax in the forward goes over all channels", lambda n, x: n.b(n.a(x).softmax(1))),
    ("mean in the forward goes over all channels", lambda n, x: n.a(x).mean(1)),
    ("cumsum in the forward reads it", lambda n, x: n.b(n.a(x).cumsum(1))),
    ("bmm in the forward sums over it", lambda n, x: n.a(x).flatten(2).transpose(1, 2) @ n.a(x).flatten(2)),
    ("_local_scalar_dense in the forward reads it", lambda n, x: n.b(n.a(x) * n.a(x)[0, 1, 0, 0].item())),
    ("the forward has sizes written in", lambda n, x: n.b(n.a(x).view(2, 6, 6, 6))),
    ("the forward has sizes or places of channels written in", lambda n, x: n.head(n.a(x)[:, 3:4])),
]


@pytest.mark.parametrize(("why", "run"), REFUSED)
def test_what_shrinking_cannot_follow_stays_with_the_reason(why: str, run: Callable[[Any, Tensor], Any]) -> None:
    assert why in kept_because(run, a=conv(3, 6), b=conv(6, 2), head=conv(1, 2))


def by_hand(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@pytest.mark.parametrize("shuffle", [by_hand, lambda x: F.channel_shuffle(x, 2), nn.ChannelShuffle(2)])
def test_of_shuffled_channels_those_go_that_leave_no_holes(shuffle: Callable[[Tensor], Tensor]) -> None:
    net = double(Net(lambda n, x: n.b(shuffle(n.a(x))), a=conv(3, 8), b=conv(8, 4)))
    result = shrunk(net, {"a": [1, 5, 6]})
    assert shape(result, "b.weight") == (4, 6, 3, 3) and result.removed["a.weight"] == (2, 8)
    assert "arranges channels in a way that leaves holes where it goes" in reasons(result, "a.weight")


def test_an_example_that_is_alike_everywhere_makes_nothing_constant() -> None:
    net: Any = double(Net(lambda n, x: n.b(n.a(x) + n.c(x)), a=conv(3, 6), c=conv(3, 6), b=conv(6, 2)))
    masks = mask_rows(net, {"a": [1, 2], "c": [2]})
    result = small(net, masks, torch.zeros_like(X))
    assert_same(result, net, X)
    assert result.model.b.in_channels == 5
    assert reasons(result, "a.weight") == "b reads it, and it is not constant: what makes it is not masked altogether"


def test_places_written_in_the_forward_are_seen_behind_weights_of_zero() -> None:
    net: Any = double(Net(lambda n, x: n.head(n.a(x)[:, 3:4]), a=conv(3, 6), head=conv(1, 2)))
    with torch.no_grad():
        net.head.weight.zero_()
    result = shrunk(net, {"a": [1]})
    assert result.model.a.out_channels == 6
    assert "the forward has sizes or places of channels written in" in reasons(result, "a.weight")


def test_writing_into_a_part_of_a_tensor_is_seen() -> None:
    def run(net: Any, x: Tensor) -> Any:
        y = net.a(x)
        y[:, 1] = x[:, 0, 1:-1, 1:-1]
        return net.b(y)

    net: Any = double(Net(run, a=conv(3, 6), b=conv(6, 2)))
    result = shrunk(net, {"a": [1]})
    assert reasons(result, "a.weight") == "b reads it, and it is not constant: what makes it is not masked altogether"


def test_arithmetic_in_place_is_followed() -> None:
    def run(net: Any, x: Tensor) -> Any:
        y = net.a(x).relu_()
        y += net.c(x)
        y *= 0.5
        return net.b(y.flatten(1).relu_())

    net: Any = double(Net(run, a=conv(3, 6), c=conv(3, 6), b=nn.Linear(216, 2)))
    assert shape(shrunk(net, {"a": [1], "c": [1]}), "b.weight") == (2, 180)


def test_a_layer_keeps_a_channel_even_if_all_are_masked() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 2))
    result = shrunk(net, {"a": range(6)})
    assert shape(result, "b.weight") == (2, 1, 3, 3)
    assert reasons(result, "a.weight") == "all channels of a.weight are masked; one stays"


def test_zeros_that_are_not_masked_stay() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 2))
    with torch.no_grad():
        net.a.weight[3], net.a.bias[3] = 0, 0
    result = shrunk(net, {"a": [1]})
    assert shape(result, "a.weight") == (5, 3, 3, 3)


def test_masked_columns_alone_free_the_layer_before() -> None:
    net = chain(a=conv(3, 6), act=nn.ReLU(), b=conv(6, 2))
    with torch.no_grad():
        net.b.weight[:, 2] = 0
    mask = torch.ones(1, 6, 1, 1).bool()
    mask[:, 2] = False
    result = small(net, {"b.weight": mask}, X)
    assert_same(result, net, X)
    assert shape(result, "a.weight") == (5, 3, 3, 3)


def test_weights_without_whole_channels_masked_stay() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 2))
    mask = torch.rand(6, 3, 3, 3) < 0.5
    net.a.weight.data.mul_(mask)
    result = small(net, {"a.weight": mask}, X)
    assert result.before == result.after and not result.removed and not result.kept


# -- attention ------------------------------------------------------------------------------------------------------------


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(12, 4, batch_first=True, **options)


def mask_heads(net: nn.Module, name: str, heads: Sequence[int], *, bias: bool) -> dict[str, Tensor]:
    """The rows of values of these heads, 3 a head."""
    module: Any = net.get_submodule(name)
    masks = {f"{name}.in_proj_weight": torch.ones(36, 12).bool(), f"{name}.in_proj_bias": torch.ones(36).bool()}
    rows = [24 + 3 * head + place for head in heads for place in range(3)]
    for mask in masks.values():
        mask[rows] = False
    module.in_proj_weight.data.mul_(masks[f"{name}.in_proj_weight"])
    if bias:
        module.in_proj_bias.data.mul_(masks[f"{name}.in_proj_bias"])
    else:
        del masks[f"{name}.in_proj_bias"]
    return masks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_loses_whole_heads(bias: bool, need_weights: bool) -> None:
    def run(net: Any, x: Tensor) -> Any:
        return x + net.attn(x, x, x, need_weights=need_weights, attn_mask=net.causal)[0]

    net: Any = Net(run, attn=attention())
    net.register_buffer("causal", torch.ones(5, 5).triu(1).bool())
    double(net)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    masks = mask_heads(net, "attn", [0, 2], bias=bias)
    result = small(net, masks, x)
    assert_same(result, net, x)
    assert isinstance(result.model.attn, FewerHeads) and result.model.attn.num_heads == 2
    assert shape(result, "attn.in_proj_weight") == (18, 12) and shape(result, "attn.out_proj.weight") == (12, 6)
    assert not result.kept
    again = pickle.loads(pickle.dumps(result.model.attn))
    assert torch.equal(again(x, x, x)[0], result.model.attn(x, x, x)[0])


def test_heads_with_masks_of_their_own_and_unlike_keys() -> None:
    layer = nn.MultiheadAttention(12, 4, kdim=7, vdim=9)
    net: Any = double(Net(lambda n, x: n.attn(x, n.key, n.value, attn_mask=n.mask, key_padding_mask=n.absent)[0], attn=layer))
    generator = torch.Generator().manual_seed(0)
    net.key, net.value = (torch.randn(6, 2, size, dtype=torch.float64, generator=generator) for size in (7, 9))
    net.mask = torch.randn(8, 5, 6, dtype=torch.float64, generator=generator)
    net.absent = torch.zeros(2, 6, dtype=torch.float64)
    net.absent[1, 4:] = -torch.inf
    mask = torch.ones(1, 12).bool()
    mask[:, 3:6] = False
    layer.out_proj.weight.data.mul_(mask)
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    result = small(net, {"attn.out_proj.weight": mask}, x)
    assert_same(result, net, x)
    assert result.model.attn.num_heads == 3 and shape(result, "attn.k_proj_weight") == (9, 7)


def test_attention_keeps_heads_of_which_a_part_is_masked() -> None:
    net: Any = double(Net(lambda n, x: n.attn(x, x, x)[0], attn=attention()))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    masks = {"attn.in_proj_weight": torch.ones(36, 12).bool()}
    masks["attn.in_proj_weight"][30] = False
    net.attn.in_proj_weight.data.mul_(masks["attn.in_proj_weight"])
    result = small(net, masks, x)
    assert reasons(result, "attn.in_proj_weight") == "attn is cut by whole heads only: by rows of values, or columns of out_proj"
    returned: Any = double(Net(lambda n, x: n.attn(x, x, x), attn=attention()))  # the averaged weights would be others
    masks = mask_heads(returned, "attn", [1], bias=True)
    result = small(returned, masks, x)
    assert_same(result, returned, x)
    assert result.model.attn.num_heads == 4
    assert "the forward has sizes or places of channels written in" in reasons(result, "attn.in_proj_weight")


def test_an_encoder_layer_of_torch_loses_heads_and_hidden_units_prepared_or_not() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
    net: Any = Net(lambda n, x: n.head(n.layer(x)), layer=layer, head=nn.Linear(12, 3)).eval()
    x = torch.randn(3, 5, 12)
    masks = mask_heads(net, "layer.self_attn", [3], bias=True) | mask_rows(net, {"layer.linear1": [0, 5, 6]})
    result = small(net, masks, x)
    assert_same(result, net, x, 1e-5)
    assert result.model.layer.self_attn.num_heads == 3 and shape(result, "layer.linear2.weight") == (12, 17)
    prepare_model(net, make_plan(net, "int8", example_input=x))
    calibrate(net, [x, torch.randn(3, 5, 12)])
    prepared = small(net, masks, x)
    with torch.no_grad():
        assert torch.equal(convert_model(prepared.model)(x), prepared.model(x))
    assert shape(prepared, "layer.self_attn.in_proj_weight") == (27, 12)


# -- prepared -------------------------------------------------------------------------------------------------------------


def prepared(config: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    net: Any = Net(
        in_turn("a", "bn", "act", "b", "c"), a=conv(3, 8), bn=nn.BatchNorm2d(8), act=nn.ReLU(), b=conv(8, 8), c=conv(8, 4)
    )
    x = torch.randn(4, 3, 10, 10)
    prepare_model(net, make_plan(net, config, example_input=x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net.eval(), x


ROWS = {"a": [1, 4], "bn": [1, 4], "b": [0]}
KEPT = [0, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("method", ["lsq", "lsq+", "dorefa", "pact"])
def test_learned_scales_go_on_with_the_channels_that_are_left(method: str) -> None:
    net, x = prepared([{"op_types": ["Conv2d"], "method": method}])
    before = quantizer_state(net)
    masks = mask_rows(net, ROWS)
    drop_deployed_layers(net)
    result = small(net, masks, x)
    after = quantizer_state(result.model)
    assert list(after) == list(before)
    for name, state in after.items():
        for key, value in state.items():
            expected = before[name][key]
            if isinstance(value, Tensor) and value.dim() == 4:
                rows = {"a.weight": KEPT, "b.weight": list(range(1, 8)), "c.weight": list(range(4))}[name]
                assert torch.equal(value, expected[rows])
            else:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)) if value is not None else expected is None
    check_deployed(net, result, x)


def check_deployed(net: nn.Module, result: Shrunk, x: Tensor, *, equal: bool = False) -> None:
    deployed = convert_model(result.model)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(deployed(fresh), result.model(fresh))
        step = float((net(fresh) - deployed(fresh)).abs().max())
        assert step == 0 if equal else step <= 0.1 * float(net(fresh).abs().max())
    result.model.train()
    result.model(fresh).square().mean().backward()
    assert all(one.grad is not None and one.grad.shape == one.shape for one in result.model.parameters())


def test_ranges_for_each_channel_go_with_their_channels() -> None:
    target = {"quant_dtype": "uint8", "granularity": [[-1, 1, -1, -1], "back", -1]}
    net, x = prepared([{"op_types": ["Conv2d"], "target_settings": {"_output_": target, "_input_": target}}])
    before = quantizer_state(net)
    assert before["a._output_"]["low"].shape == (1, 8, 1, 1)
    result = small(net, mask_rows(net, ROWS), x)
    after = quantizer_state(result.model)
    assert torch.equal(after["a._output_"]["high"], before["a._output_"]["high"][:, KEPT])
    assert torch.equal(after["b._output_"]["low"], before["b._output_"]["low"][:, 1:])
    assert torch.equal(after["a._input_"]["low"], before["a._input_"]["low"])
    drop_deployed_layers(net)
    check_deployed(net, result, x)


def test_channels_that_share_a_scale_with_some_others_stay() -> None:
    net, x = prepared([{"op_types": ["Conv2d"], "target_settings": {"weight": {"granularity": [2, -1, -1, -1]}}}])
    result = small(net, mask_rows(net, ROWS), x)
    assert result.model.a.out_channels == 8
    assert reasons(result, "a.weight") == "a.weight has a scale for each block of 2"


def test_weights_of_one_bit_have_no_zero() -> None:
    net, x = prepared([{"op_names": ["a"], "target_names": ["weight"], "method": "bnn"}])
    result = small(net, mask_rows(net, ROWS), x)
    assert reasons(result, "a.weight") == "a.weight has one bit, and no 0" and result.model.b.out_channels == 7


def test_learned_rounding_and_the_observer_of_least_error_go_along() -> None:
    net, x = prepared([{"op_types": ["Conv2d"], "target_settings": {"weight": {"observer": "mse"}}}])
    check_deployed(net, small(net, mask_rows(net, ROWS), x), x)
    net, x = prepared("int8")
    masks = mask_rows(net, ROWS)
    drop_deployed_layers(net)
    learn_rounding(net, [x], iterations=20)
    result = small(net, masks, x)
    fixed = next(group.parameter_quantizers[0] for _, group in prepared_groups(result.model).values() if group.name == "b")
    origin = next(group.parameter_quantizers[0] for _, group in prepared_groups(net).values() if group.name == "b")
    assert torch.equal(fixed.state_dict()["q"], origin.state_dict()["q"][1:][:, KEPT])
    with torch.no_grad():  # the grid is fixed: no finer one without the columns
        assert torch.equal(convert_model(result.model)(x), net(x))


def test_a_constant_goes_into_the_bias_of_a_prepared_layer() -> None:
    torch.manual_seed(0)
    net: Any = Net(in_turn("a", "act", "b"), a=conv(3, 6), act=nn.Sigmoid(), b=conv(6, 4, bias=False))
    x = torch.randn(4, 3, 8, 8)
    prepare_model(net, make_plan(net, "int8", example_input=x))
    net.train()(x)
    net.eval()
    masks = mask_rows(net, {"a": [0, 4]}, bias=False)
    drop_deployed_layers(net)
    result = small(net, masks, x)
    assert result.model.b.bias is not None and result.model.b.in_channels == 4
    with torch.no_grad():
        assert torch.equal(convert_model(result.model)(x), result.model(x))
        assert (result.model(x) - net(x)).abs().max() <= 0.03 * net(x).abs().max()


# -- the result -----------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_went_and_says_what_stays() -> None:
    net = chain(a=conv(3, 6, padding=1), act=nn.ReLU(), b=conv(6, 4, padding=1))
    result = shrunk(net, {"a": [1, 4], "b": [3]})
    assert result.before == Cost(parameters=168 + 220, bytes=4 * 388, multiply_adds=2 * 64 * (6 * 27 + 4 * 54))
    assert result.after == Cost(parameters=112 + 148, bytes=4 * 260, multiply_adds=2 * 64 * (4 * 27 + 4 * 36))
    lines = [" ".join(line.split()) for line in str(result).splitlines()]
    assert "a.weight 2 of 6" in lines and "b.weight (inputs) 2 of 6" in lines and "b.weight 1 stay: the model returns it" in lines
    assert "parameters: 388 -> 260 (67%)" in lines and "multiply-adds: 48 384 -> 32 256 (67%)" in lines


def test_multiply_adds_are_those_of_the_whole_example() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 4))
    masks = mask_rows(net, {"a": [1]})
    two, many = (small(net, masks, torch.randn(size, 3, 8, 8)) for size in (2, 10))
    assert many.before.multiply_adds == 5 * two.before.multiply_adds == 10 * (36 * 6 * 27 + 16 * 4 * 54)
    assert many.after.multiply_adds == 5 * two.after.multiply_adds


def test_the_number_of_samples_may_be_written_in_the_forward() -> None:
    net: Any = double(Net(lambda n, x: n.b(n.a(x).view(4, 6, 6, 6)), a=conv(3, 6), b=conv(6, 2)))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert "the forward has sizes written in" in reasons(shrunk(net, {"a": [1]}, x), "a.weight")


def test_the_masked_model_is_left_as_it_is_and_the_small_one_trains() -> None:
    net = chain(a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4)).train()
    net.a.weight.requires_grad_(False)
    masks = mask_rows(net, {"a": [1, 4], "bn": [1, 4]})
    state, tensors = copy.deepcopy(net.state_dict()), list(net.parameters())
    result = small(net, masks, X)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(a is b for a, b in zip(net.parameters(), tensors, strict=True)) and net.training and result.model.training
    assert not result.model.a.weight.requires_grad and result.model.b.weight.requires_grad
    found, expected = result.model(X), net(X)  # batch statistics, too
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    found.square().mean().backward()
    assert result.model.b.weight.grad is not None


def test_a_lightning_module_shrinks_by_what_its_submodule_is_called_with() -> None:
    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4))

        def training_step(self, batch: Tensor, _: int) -> Any:
            return self.net(batch).mean()

    lit = Lit()
    result = small(lit, mask_rows(lit, {"net.0": [1]}), (X.float(),), entry="net")
    assert result.model.net[2].in_channels == 5
    assert torch.allclose(result.model.net(X.float()), lit.net(X.float()), rtol=0, atol=1e-5)


def test_a_forward_that_insists_on_float32_shrinks_in_float32() -> None:
    net: Any = Net(lambda n, x: n.b(n.a(x.float())), a=conv(3, 6), b=conv(6, 2))
    x = X.float()
    result = small(net, mask_rows(net, {"a": [1]}), x)
    assert_same(result, net, x, 1e-5)
    assert result.model.b.in_channels == 5


def test_without_masks_channels_of_zeros_go_those_of_torch_pruning_too() -> None:
    net = chain(a=conv(3, 6), act=nn.ReLU(), b=conv(6, 4))
    prune.ln_structured(net.a, "weight", amount=2, n=1, dim=0)
    with torch.no_grad():
        net.b.bias[0] = 0  # no channel of zeros
    result = small(net, None, X)
    assert_same(result, net, X)
    assert result.model.b.in_channels == 4 and sorted(result.model.state_dict()) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert "a.weight_orig" in net.state_dict()


def test_norms_without_numbers_know_their_channels() -> None:
    net = chain(a=conv(3, 8), n=nn.InstanceNorm2d(8), b=conv(8, 8, 1), g=nn.GroupNorm(4, 8, affine=False), c=conv(8, 2))
    result = shrunk(net, {"a": [1], "b": [2, 3]})
    assert (result.model.n.num_features, result.model.g.num_groups, result.model.g.num_channels) == (7, 3, 6)


def test_another_instance_is_cut_to_fit_the_small_ones_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def fresh() -> Net:
        layers = {"a": conv(3, 8, padding=1), "dw": conv(8, 8, groups=8), "b": conv(8, 4, bias=False)}
        return Net(in_turn(*layers), **layers)

    net, x = fresh(), X.float()
    prepare_model(net, make_plan(net, "int8", example_input=x))
    net.train()(x)
    result = small(net.eval(), mask_rows(net, {"a": [1, 2], "dw": [1, 2]}, bias=False), x)
    deployed = convert_model(result.model)
    export_model(deployed, tmp_path / "small.pt", example_input=x)
    other = fresh()
    cut_model(other, result.cuts)
    assert other.get_submodule("dw").groups == 6
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "small.pt", model=other)(x), deployed(x))
    other.load_state_dict(restore_model(result.model).state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), result.model(x))


class Masked(Callback):
    """Masks after every step; at the end shrinks what was trained."""

    result: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        mask_rows(pl_module, {"stem": [1, 3], "conv": [1, 3], "bn": [1, 3]})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        masks = mask_rows(pl_module, {"stem": [1, 3], "conv": [1, 3], "bn": [1, 3]})
        self.result = shrink_model(pl_module, masks, torch.randn(4, 3, 8, 8))


def test_masked_and_quantized_in_one_fit_then_smaller() -> None:
    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn, self.head = conv(3, 6), conv(6, 6, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 2)

        forward = Residual.forward

        def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    pl.seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 2, (32,))), batch_size=8)
    masked, quantized = Masked(), QuantFusionCallback("int8", dirpath=None)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[masked, quantized], accelerator="cpu", enable_model_summary=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
        trainer.fit(Lit(), data)
    deployed, x = convert_model(masked.result.model), torch.randn(5, 3, 8, 8)
    assert masked.result.model.stem.out_channels == masked.result.model.conv.in_channels == 4 and not masked.result.kept
    with torch.no_grad():
        assert torch.equal(deployed(x), masked.result.model.eval()(x))
        whole = quantized.deployed_model
        assert whole is not None and (deployed(x) - whole(x)).abs().max() <= 0.05 * whole(x).abs().max()


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_masks_that_do_not_fit_are_refused_together() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 2))
    masks = {"c.weight": torch.ones(1).bool(), "a.weight": torch.ones(5, 1, 1, 1).bool(), "b.bias": torch.tensor([True, False])}
    with pytest.raises(ConfigError, match=r"masks\['c.weight'\]: Net has no parameter of this name") as error:
        small(net, masks, X)
    assert r"masks['a.weight']: shape (5, 1, 1, 1) does not broadcast to the parameter's (6, 3, 3, 3)" in str(error.value)
    assert r"masks['b.bias']: b.bias is not 0 where it is masked; apply the mask before" in str(error.value)


def test_a_layer_that_must_shrink_and_cannot_is_an_error() -> None:
    net = chain(a=conv(3, 6), b=conv(6, 4, padding=1))
    masks = mask_rows(net, {"a": [1, 4], "b": [0]})
    with pytest.raises(ConfigError, match=r"^'b' cannot shrink: 2 masked stay, because the model returns it\.$"):
        small(net, masks, X, required=["a", "b"])
    assert small(net, masks, X, required=["a"]).model.a.out_channels == 4


def test_ranges_of_an_operator_for_each_channel_are_refused() -> None:
    torch.manual_seed(0)
    net: Any = Net(lambda n, x: n.b(n.a(x) + n.c(x)), a=conv(3, 6), c=conv(3, 6), b=conv(6, 2))
    x = torch.randn(2, 3, 8, 8)
    target = {"quant_dtype": "uint8", "granularity": [[-1, 1, -1, -1], "back", -1]}
    prepare_model(net, make_plan(net, [{"op_types": ["add"], "target_settings": {"_output_": target}}], example_input=x))
    net.train()(x)
    with pytest.raises(ConfigError, match=r"add._output_: it has a range for each channel, .* granularity 'per_tensor'"):
        small(net.eval(), mask_rows(net, {"a": [1], "c": [1]}), x)
