# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that a masked model becomes smaller layers that compute the same, or says which channels stay and why.

The reference is always the masked model itself, in float64 and on inputs that shrinking has not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo_more  # noqa: F401  (registers its nets)
from test_zoo import called, in_double, made, train
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from zoo import ZOO

from lightning_quant import convert_model, export_model, make_plan, prepare_model
from lightning_quant.patterns import BatchNorm
from lightning_quant.prepare import drop_deployed_layers, quantizer_state
from lightning_quant.record import split_example
from lightning_quant.shrink import Shrunk, shrink_model
from lightning_quant.targets import on_tensors

MASKED = (_ConvNd, nn.Linear, BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
Masks = dict[str, Tensor]


# -- masks ----------------------------------------------------------------------------------------------------------------


def mask_rows(model: nn.Module, rows: Mapping[str, Sequence[int]], *, bias: bool = True) -> Masks:
    """Set output channels of the named layers to 0; what stays, by parameter. `bias`: of theirs, too."""
    masks: Masks = {}
    for name, index in rows.items():
        module = model.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            if key == "bias" and not bias:
                continue
            dim = 1 if isinstance(module, _ConvTransposeNd) and key == "weight" else 0
            masks[f"{name}.{key}"] = stays = torch.ones_like(parameter, dtype=torch.bool)
            stays.index_fill_(dim, torch.tensor(index, dtype=torch.long), False)
            parameter.data.mul_(stays)
    return masks


def every_fourth(model: nn.Module) -> Masks:
    """Channels 1, 5, 9 .. of every convolution, linear layer and norm are masked: those that residuals join agree."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MASKED)}
    rows = {
        name: range(1, channels_of(module), 4) for name, module in layers.items() if module._parameters.get("weight") is not None
    }
    return mask_rows(model, rows)


def channels_of(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[1] if isinstance(module, _ConvTransposeNd) else weight.shape[0]


def other_input(example: Any) -> Any:
    """Other numbers in the same shapes."""
    generator = torch.Generator().manual_seed(7)
    return on_tensors(
        lambda one: torch.randn(one.shape, generator=generator, dtype=one.dtype) if one.is_floating_point() else one.clone(),
        split_example(example),
    )


def assert_same(shrunk: Shrunk, masked: nn.Module, example: Any, tolerance: float = 1e-9) -> None:
    with torch.no_grad():
        for given in (example, other_input(example)):
            found, expected = called(shrunk.model, given), called(masked, given)
            assert len(found) == len(expected) > 0
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def double(model: nn.Module) -> nn.Module:
    """In float64 and eval mode; norms that have seen data, no parameter at its beginning."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0) if name.endswith("running_var") else tensor.normal_(0, 0.4)
    return model.double().eval()


def reasons(shrunk: Shrunk, name: str) -> str:
    return "; ".join(shrunk.kept.get(name, {}))


# -- the zoo --------------------------------------------------------------------------------------------------------------

# Nets of whose masked channels all stay, and one of the reasons.
NOTHING_GOES = {
    "GroupNormNet": "(4 of them go only together)",
    "FunctionalOnly": "",
    "TiedFunctional": "fc reads it, and it is not constant",
    "LSTMTagger": "_log_softmax in the forward goes over all channels",
    "TemporalConvNet": "weight is computed from others",
    "BranchOnData": "goes over all channels",
    "HighwayNet": "has it meet a tensor whose channels are not known",
}


@pytest.mark.parametrize("name", ZOO)
def test_every_net_of_the_zoo_shrinks_to_the_same_function_or_says_why_not(name: str) -> None:
    net, example = in_double(name)
    masks = every_fourth(net.eval())
    state = copy.deepcopy(net.state_dict())
    shrunk = shrink_model(net, masks, example)
    assert_same(shrunk, net, example)
    new = [key for key in shrunk.model.state_dict() if key not in state]
    assert [key for key in shrunk.model.state_dict() if key in state] == list(state)
    assert all(key.endswith(".bias") for key in new)  # for constants
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())  # the masked one is left alone
    smaller = [key for key, value in shrunk.model.state_dict().items() if key in state and value.shape != state[key].shape]
    if name in NOTHING_GOES:
        assert not smaller and shrunk.after == shrunk.before
        said = "; ".join(why for kept in shrunk.kept.values() for why in kept)
        assert any(part in said for part in NOTHING_GOES[name].split("|"))
        return
    assert smaller and shrunk.after.parameters < shrunk.before.parameters
    assert shrunk.after.parameters == sum(one.numel() for one in shrunk.model.parameters())
    assert shrunk.after.multiply_adds < shrunk.before.multiply_adds


# A share of the masked channels that goes at least, in nets where nothing but the border of the model stands in the way.
@pytest.mark.parametrize("name", ["ResidualZeroGamma", "MobileNetV2", "Inception", "UNet", "RepVGG", "DeepLab", "VGGDropout"])
def test_all_masked_channels_of_plain_convolutional_nets_go(name: str) -> None:
    net, example = in_double(name)
    shrunk = shrink_model(net, every_fourth(net.eval()), example)
    assert {why for kept in shrunk.kept.values() for why in kept} <= {"the model returns it"}
    layers = {key: module for key, module in net.named_modules() if isinstance(module, _ConvNd)}
    last = {key.rpartition(".")[0] for key in shrunk.kept}
    for key, module in layers.items():
        if key not in last:
            now = shrunk.model.get_submodule(key)
            assert isinstance(now, _ConvNd)
            count = len(range(1, module.out_channels, 4))
            assert now.out_channels == module.out_channels - count == channels_of(now)


@pytest.mark.parametrize(
    "name",
    ["ResidualZeroGamma", "TorchvisionStyleResNet", "MobileNetV2", "UNet", "ConvNeXt", "VisionTransformer", "AudioDepthwise1d"],
)
def test_a_shrunk_prepared_net_is_deployed_bit_for_bit(name: str) -> None:
    net, example = made(ZOO[name])
    fresh = other_input(example)
    prepare_model(net, make_plan(net, ZOO[name].config, example_input=example))
    train(net, example)
    masks = every_fourth(net.eval())
    drop_deployed_layers(net)
    ranges = quantizer_state(net)
    shrunk = shrink_model(net, masks, example)
    assert shrunk.after.parameters < shrunk.before.parameters
    assert quantizer_state(shrunk.model) == ranges  # one for each tensor here: they go on as they are
    deployed, before = convert_model(shrunk.model), convert_model(net)
    with torch.no_grad():
        for found, expected in zip(called(deployed, fresh), called(shrunk.model, fresh), strict=True):
            assert torch.equal(found, expected)
    sizes = [sum(one.numel() * one.element_size() for one in model.state_dict().values()) for model in (deployed, before)]
    assert sizes[0] < sizes[1]


def test_with_columns_masked_too_integers_are_those_of_the_masked_net() -> None:
    """Columns of masked channels may hold a layer's largest weight: without them its grid is finer; masked, it is the same."""
    net, example = made(ZOO["ResidualZeroGamma"])
    prepare_model(net, make_plan(net, "int8", example_input=example))
    train(net, example)
    masks = every_fourth(net.eval())
    for name, module in net.named_modules():
        if (isinstance(module, nn.Conv2d) and module.in_channels > 3) or isinstance(module, nn.Linear):
            weight = module.weight
            stays = masks[f"{name}.weight"]
            stays[:, 1::4] = False
            weight.data.mul_(stays)
    drop_deployed_layers(net)
    shrunk = shrink_model(net, masks, example)
    fresh = other_input(example)
    with torch.no_grad():
        for found, expected in zip(called(shrunk.model, fresh), called(net, fresh), strict=True):
            assert torch.equal(found, expected)
    assert shrunk.after.parameters < 0.65 * shrunk.before.parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "UNet", "SuperResolution"])
def test_a_shrunk_net_is_exported_and_computes_the_same_there(name: str, tmp_path: Any) -> None:
    net, example = made(ZOO[name])
    prepare_model(net, make_plan(net, ZOO[name].config, example_input=example))
    train(net, example)
    masks = every_fourth(net.eval())
    deployed = convert_model(shrink_model(net, masks, example).model)
    # Raises ParityError where a file does not compute what the model does.
    export_model(deployed, tmp_path / "small.onnx", example_input=other_input(example))
    prepared = convert_model(net)
    export_model(prepared, tmp_path / "masked.onnx", example_input=other_input(example))
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "masked.onnx").stat().st_size


# -- random graphs --------------------------------------------------------------------------------------------------------


# fmt: off
KINDS = [
    "conv", "conv", "add", "cat", "depthwise", "grouped", "norm", "prelu", "groupnorm", "up", "pixel", "pool", "shuffle", "swap",
    "gate",
]
# fmt: on


class RandomNet(nn.Module):
    """Convolutions, norms, additions, concatenations, gates, shuffles and pools at random, then two linear layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        self.made = [(3, 8)]  # (channels, size) of each value
        last = 0
        for _ in range(3 + self.pick(5)):
            last = self.grow(last)
        channels, size = self.made[last]
        flat = bool(self.pick(2))
        features = channels * size * size if flat else channels
        last = self.push("flatten" if flat else "pool", (last,), features, 1)
        last = self.layer(nn.Linear(features, 6), last, 6, 1)
        last = self.push("relu", (last,), 6, 1)
        last = self.layer(nn.BatchNorm1d(6), last, 6, 1) if self.pick(2) else last
        self.layer(nn.Linear(6, 3), last, 3, 1)

    def pick(self, count: int) -> int:
        return int(torch.randint(0, count, (), generator=self.draw))

    def push(self, op: str, read: tuple[int, ...], channels: int, size: int) -> int:
        self.steps.append((op, read))
        self.made.append((channels, size))
        return len(self.made) - 1

    def layer(self, module: nn.Module, read: int, channels: int, size: int) -> int:
        self.layers.append(module)
        return self.push("layer", (len(self.layers) - 1, read), channels, size)

    def grow(self, x: int) -> int:
        c, s = self.made[x]
        kind = KINDS[self.pick(len(KINDS))]
        if kind == "conv":
            out, padding = 4 + 2 * self.pick(3), self.pick(2) if s > 3 else 1
            y = self.layer(nn.Conv2d(c, out, 3, padding=padding, bias=bool(self.pick(2))), x, out, s - 2 + 2 * padding)
            y = self.layer(nn.BatchNorm2d(out), y, out, self.made[y][1]) if self.pick(3) else y
            return self.push(["relu", "silu", "sigmoid", "hardswish"][self.pick(4)], (y,), out, self.made[y][1])
        if kind == "add":
            return self.push("add", (x, self.layer(nn.Conv2d(c, c, 3, padding=1), x, c, s)), c, s)
        if kind == "cat":
            return self.push("cat", (x, self.layer(nn.Conv2d(c, 4, 3, padding=1), x, 4, s)), c + 4, s)
        if kind == "gate":
            y = self.layer(nn.Conv2d(c, c, 1), self.push("mean", (x,), c, 1), c, 1)
            return self.push("mul", (x, self.push("sigmoid", (y,), c, 1)), c, s)
        layers: dict[str, tuple[bool, Callable[[], nn.Module], int, int]] = {
            "depthwise": (c > 1, lambda: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c), 2 * c, s),
            "grouped": (c % 2 == 0, lambda: nn.Conv2d(c, 8, 1, groups=2), 8, s),
            "norm": (True, lambda: nn.BatchNorm2d(c), c, s),
            "prelu": (True, lambda: nn.PReLU(c), c, s),
            "groupnorm": (c % 2 == 0, lambda: nn.GroupNorm(2, c), c, s),
            "up": (s < 12, lambda: nn.ConvTranspose2d(c, 4, 2, 2), 4, 2 * s),
            "pixel": (c % 4 == 0 and s < 12, lambda: nn.PixelShuffle(2), c // 4, 2 * s),
        }
        if kind in layers:
            fits, make, channels, size = layers[kind]
            return self.layer(make(), x, channels, size) if fits else x
        fits = {"pool": s >= 4, "shuffle": c % 2 == 0, "swap": c >= 4}[kind]
        return self.push({"pool": "max"}.get(kind, kind), (x,), c, s // 2 if kind == "pool" else s) if fits else x

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for op, read in self.steps:
            if op == "layer":
                values.append(self.layers[read[0]](values[read[1]]))
                continue
            a = values[read[0]]
            b = values[read[-1]]
            values.append(OPERATIONS[op](a, b))
        return values[-1]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, _: F.relu(a),
    "silu": lambda a, _: F.silu(a),
    "sigmoid": lambda a, _: torch.sigmoid(a),
    "hardswish": lambda a, _: F.hardswish(a),
    "max": lambda a, _: F.max_pool2d(a, 2),
    "mean": lambda a, _: a.mean((2, 3), keepdim=True),
    "pool": lambda a, _: a.mean((2, 3)),
    "flatten": lambda a, _: a.flatten(1),
    "add": torch.add,
    "mul": torch.mul,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "shuffle": lambda a, _: F.channel_shuffle(a, 2),
    "swap": lambda a, _: torch.cat(a.chunk(2, 1)[::-1], 1),
}


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_random_graphs_compute_the_same_without_what_is_masked(start: int) -> None:
    smaller = 0
    for seed in range(start, start + 20):
        net = double(RandomNet(seed))
        every, choose = 2 + seed % 3, torch.Generator().manual_seed(seed)
        rows: dict[bool, dict[str, Sequence[int]]] = {True: {}, False: {}}
        for name, module in net.named_modules():
            if isinstance(module, MASKED) and (seed % 2 or torch.rand((), generator=choose) < 0.7):
                with_bias = bool(seed % 2 or torch.rand((), generator=choose) < 0.5)
                rows[with_bias][name] = range(0, channels_of(module), every)
        masks = mask_rows(net, rows[True]) | mask_rows(net, rows[False], bias=False)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        shrunk = shrink_model(net, masks, x)
        assert_same(shrunk, net, x)
        with torch.no_grad():  # another batch size
            x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
            assert torch.allclose(shrunk.model(x), net(x), rtol=0, atol=1e-5)
        smaller += shrunk.after.parameters < shrunk.before.parameters
    assert smaller >= 16
