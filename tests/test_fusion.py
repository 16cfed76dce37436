# SPDX-License-Identifier: Apache-2.0
"""Owns the claims of fusion: the fused step is the unfused step, batch norm stays exact, and folding loses nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import FUSED, Net

from lightning_quant import ConfigError, convert_model, make_plan, prepare_model
from lightning_quant.config import TensorSpec
from lightning_quant.folding import Layer, fold, weight_of
from lightning_quant.fusion import FusedGroup
from lightning_quant.geometry import Geometry
from lightning_quant.patterns import pattern_problem
from lightning_quant.prepare import apply_phase, prepared_groups, simulated
from lightning_quant.schedule import Phase
from lightning_quant.weights import WeightQuantizer

BYPASS = Phase(observe=False, quantize=False)


def prepared(net: nn.Module, config: list[dict[str, Any]], x: Any, phase: Phase | None = None) -> nn.Module:
    prepare_model(net, make_plan(net, config, example_input=x))
    if phase is not None:
        apply_phase(net, phase)
    return net


def sgd_steps(net: nn.Module, count: int, shape: tuple[int, ...] = (16, 3, 8, 8), lr: float = 0.05) -> Tensor:
    """Train on a fixed stream of random batches; returns the last output."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    out = torch.empty(0)
    for _ in range(count):
        x, y = torch.randn(shape, generator=generator), torch.randint(0, 4, (shape[0],), generator=generator)
        optimizer.zero_grad()
        out = net(x)
        F.cross_entropy(out, y).backward()
        optimizer.step()
    return out.detach()


# -- quantization bypassed: nothing may change --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6], ids=lambda a: a.__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_bypassed_training_equals_the_float_twin(activation: type[nn.Module], bias: bool) -> None:
    twin = Net(activation, bias).train()
    fused = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8), BYPASS).train()
    expected, found = sgd_steps(twin, 20), sgd_steps(fused, 20)
    assert (found - expected).abs().max() <= 1e-5
    for (name, a), b in zip(fused.state_dict().items(), twin.state_dict().values(), strict=True):
        assert (a - b).abs().max() <= 1e-6, name
    assert fused.state_dict()["bn1.num_batches_tracked"] == 20


# -- quantization on: batch norm sees the right statistics -----------------------------------------------------------------


def gamma_net(gamma: float, pretrained: bool) -> Net:
    net = Net()
    if pretrained:
        sgd_steps(net.train(), 50)
    with torch.no_grad():
        net.bn1.weight.fill_(gamma)
        net.bn2.weight.fill_(gamma)
    return net.train()


@pytest.mark.parametrize("pretrained", [False, True], ids=["scratch", "pretrained"])
@pytest.mark.parametrize("gamma", [1.0, 1e-2, 1e-4, 1e-8, 0.0, -1.0])
def test_running_variance_follows_the_float_twin(gamma: float, pretrained: bool) -> None:
    """Every channel. The rate is small: at 0.05 the twins learn other weights from random labels, and statistics with them."""
    twin = gamma_net(gamma, pretrained)
    fused = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8))
    for net in (twin, fused):
        sgd_steps(net, 50, lr=1e-3)
    for name in ("bn1", "bn2"):
        a, b = (net.get_submodule(name).running_var for net in (fused, twin))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert float(((a - b).abs() / b).max()) <= 0.01
        assert torch.isfinite(a).all()


@pytest.mark.parametrize("granularity", ["out_channel", "per_tensor"])
def test_gamma_at_zero_trains(granularity: str) -> None:
    net = gamma_net(0.0, False)
    prepared(net, [{**FUSED[0], "granularity": granularity}], torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        net.bn1.weight.fill_(1.0)
        net.bn2.bias.fill_(1.0)  # else the ReLU behind a dead batch norm passes no gradient to anything
    out = net(torch.randn(16, 3, 8, 8))
    F.cross_entropy(out, torch.arange(16) % 4).backward()
    assert net.bn2.weight.grad is not None
    assert net.bn2.weight.grad.abs().max() > 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_beta_gets_the_float_gradient_without_a_conv_bias() -> None:
    """NNI cuts batch norm's bias out of the graph for every convolution without bias."""
    twin = Net().train()
    fused = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8), BYPASS)
    x = torch.randn(16, 3, 8, 8)
    for net in (twin, fused):
        net(x).square().sum().backward()
    assert torch.allclose(fused.bn1.bias.grad, twin.bn1.bias.grad, rtol=1e-5)  # type: ignore[union-attr,arg-type]


def test_batch_statistics_not_running_ones_normalise_in_training() -> None:
    """NNI normalises by running statistics: 0.65 instead of 1.00 at the first step."""
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    seen: list[Tensor] = []
    net.relu1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    net(torch.randn(64, 3, 8, 8) * 3 + 1)
    assert seen[0].std().item() == pytest.approx(1.0, abs=0.01)


# -- freezing batch norm ---------------------------------------------------------------------------------------------------


def test_frozen_statistics_stand_still_and_are_used_whatever_train_says() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 5)
    apply_phase(net, Phase(freeze_batch_norm=True))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    gamma = net.get_parameter("bn1.weight").detach().clone()
    net.train()
    sgd_steps(net, 5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert not torch.equal(net.get_parameter("bn1.weight"), gamma)


def test_frozen_batch_norm_equals_eval_batch_norm() -> None:
    twin = Net().train()
    sgd_steps(twin, 5)
    net = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8), Phase(quantize=False, freeze_batch_norm=True)).train()
    x = torch.randn(16, 3, 8, 8)
    assert torch.allclose(net(x), twin.eval()(x), atol=1e-6)


# -- folding -----------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (5, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), (5, 4, 9, 9)),
    "conv2d no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (5, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8, eps=1e-3), (5, 4, 9, 9)),
    "same, even kernel": (nn.Conv2d(4, 6, 4, padding="same"), nn.BatchNorm2d(6), (5, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (5, 4, 9, 9)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), nn.BatchNorm2d(6), (5, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4, affine=False), (3, 2, 5, 5, 5)),
    "linear": (nn.Linear(7, 5), nn.BatchNorm1d(5), (9, 7)),
}


def randomised(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3.0)
        if norm.affine:
            norm.weight.normal_()
            norm.weight[0] = 0.0
            norm.bias.normal_()
    return norm


EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's advice, about speed


@EVEN
@pytest.mark.parametrize("granularity", ["out_channel", "per_tensor"])
@pytest.mark.parametrize(
    "kind", [("int8", "symmetric"), ("int8", "affine"), ("uint8", "affine"), ("uint8", "symmetric")], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_fold_equals_the_quantized_layer_then_batch_norm(name: str, kind: tuple[str, Any], granularity: Any) -> None:
    """Against torch's own kernels in float64: the layer on integers times scale, and batch norm after the rounded weight."""
    layer, norm, shape = copy.deepcopy(LAYERS[name])
    layer, norm = layer.double().eval(), randomised(norm).double().eval()
    spec = TensorSpec.make(*kind, granularity, weight=True)
    folded = fold(Layer(head=layer, norm=norm, weight=WeightQuantizer(spec, "w", weight_of(layer))))
    x = torch.randn(shape, dtype=torch.float64)
    column = [-1, *[1] * (folded.q.dim() - 1)]
    zero = 0 if folded.zero_point is None else folded.zero_point.double().view(column)
    weight = (folded.q.double() - zero) * (folded.scale.double().view(column) if folded.scale.dim() else folded.scale.double())
    dequantized = copy.deepcopy(layer)
    with torch.no_grad():
        dequantized.weight.copy_(weight)  # type: ignore[operator]
        dequantized.register_parameter("bias", nn.Parameter(folded.bias))
        found, expected = dequantized(x), norm(layer(x))
    step = folded.scale.double().abs().max()
    terms = weight[0].numel()
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= step * terms * x.abs().max()  # half a step a term would be the mean case
    assert (found - expected).std() <= 0.05 * expected.std()


@EVEN
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("name", LAYERS)
def test_per_channel_fold_is_lossless(name: str, scheme: Any) -> None:
    """fq(w k) = k fq(w): batch norm on the layer with the rounded weight is the folded integer layer (float64)."""
    layer, norm, shape = copy.deepcopy(LAYERS[name])
    layer, norm = layer.double().eval(), randomised(norm).double().eval()
    spec = TensorSpec.make("int8", scheme, "out_channel", weight=True)
    folded = fold(Layer(head=layer, norm=norm, weight=WeightQuantizer(spec, "w", weight_of(layer))))
    w = layer.get_parameter("weight").detach()
    flat = w.flatten(1)
    if scheme == "symmetric":  # written out again, from the equation
        s = flat.abs().amax(1, keepdim=True) / 127
        rounded = (torch.round(flat / s)) * s
    else:
        low, high = flat.amin(1, keepdim=True).clamp(max=0), flat.amax(1, keepdim=True).clamp(min=0)
        s = (high - low) / 254
        z = torch.clamp(-127 - torch.round(low / s), -127, 127)
        rounded = (torch.clamp(torch.round(flat / s) + z, -127, 127) - z) * s
    x = torch.randn(shape, dtype=torch.float64)
    zero = 0 if folded.zero_point is None else folded.zero_point.double().view(-1, 1)
    weight = (folded.q.double().flatten(1) - zero) * folded.scale.double().view(-1, 1)
    one, two = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        one.weight.copy_(rounded.view_as(w))  # type: ignore[operator]
        two.weight.copy_(weight.view_as(w))  # type: ignore[operator]
        two.register_parameter("bias", nn.Parameter(folded.bias))
        assert torch.allclose(two(x), norm(one(x)), rtol=1e-6, atol=1e-6)


def test_a_dead_channel_is_its_beta() -> None:
    layer, norm, _ = copy.deepcopy(LAYERS["conv2d"])
    randomised(norm)
    spec = TensorSpec.make("int8", "symmetric", "out_channel", weight=True)
    folded = fold(Layer(head=layer, norm=norm.eval(), weight=WeightQuantizer(spec, "w", weight_of(layer))))
    assert not folded.q[0].any()
    assert folded.bias[0].item() == pytest.approx(norm.bias[0].item())  # type: ignore[index]


@pytest.mark.parametrize("kind", [("int8", "symmetric"), ("int8", "affine"), ("uint8", "affine")], ids=str)
@pytest.mark.parametrize("why", ["gamma", "pruned"])
def test_a_deployed_dead_channel_is_its_bias_on_inputs_of_any_size(why: str, kind: tuple[str, Any]) -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.rand(16, 1, 8, 8) * 255
    with torch.no_grad():
        if why == "gamma":
            net.get_parameter("1.weight")[0] = 0.0
        else:
            net.get_parameter("0.weight")[0] = 0.0
            net.get_parameter("0.bias")[0] = 0.0
        net.get_parameter("1.bias")[0] = 0.4
    targets = {"weight": dict(zip(("quant_dtype", "quant_scheme"), kind, strict=True))}
    config = [{"op_names": ["0"], "fuse_names": [("0", "1")], "target_settings": targets}]
    prepared(net, config, x).train()(x)
    with torch.no_grad():
        channel = convert_model(net)(x)[:, 0]
    assert (channel - 0.4).abs().max() <= 0.02, "half a step of the output grid"


def test_batch_norm_in_training_keeps_its_statistics_moving_while_its_convolution_is_in_eval() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    net(torch.randn(16, 3, 8, 8))
    net.eval()
    net.get_submodule("bn1").train()
    before = net.get_buffer("bn1.running_mean").clone()
    with torch.no_grad():
        net(torch.randn(16, 3, 8, 8) + 1)
    assert not torch.equal(net.get_buffer("bn1.running_mean"), before)


def test_an_optimizer_step_in_eval_mode_is_seen() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    x = torch.randn(16, 3, 8, 8)
    net(x)
    net.eval()
    with torch.no_grad():
        net(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(net(x), convert_model(net)(x))


def test_a_reset_of_the_statistics_gets_through_a_freeze() -> None:
    """As Lightning's StochasticWeightAveraging does it: momentum None means a cumulative average."""
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8), Phase(freeze_batch_norm=True)).train()
    norm = net.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    norm.reset_running_stats()
    net(torch.randn(16, 3, 8, 8) + 1)
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() > 0


# -- hooks, modes, copies ---------------------------------------------------------------------------------------------------


def test_hooks_see_in_training_what_they_saw_in_float() -> None:
    twin = Net().train()
    net = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8), BYPASS)
    seen: dict[str, list[Tensor]] = {"twin": [], "net": []}
    for key, model in (("twin", twin), ("net", net)):
        for name in ("conv1", "bn1", "relu1"):
            model.get_submodule(name).register_forward_hook(lambda m, i, o, key=key: seen[key].extend((i[0], o)))
    x = torch.randn(4, 3, 8, 8)
    twin(x), net(x)
    assert len(seen["net"]) == 6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen["twin"], seen["net"], strict=True))


def test_a_hook_between_members_makes_eval_simulate() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    x = torch.randn(16, 3, 8, 8)
    net(x)
    net.eval()
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = net.conv1.register_forward_hook(lambda m, i, o: seen.append(o))  # type: ignore[union-attr]
        watched = net(x)
        handle.remove()
        with simulated(net):
            group = prepared_groups(net)["conv1"][1]
            everything = net(x)
    assert seen[0].min() < 0, "the convolution's own output, not the end of the group"
    assert group.integer_pass is False
    assert torch.allclose(watched, everything, atol=0.05)


def test_eval_with_gradients_is_simulated_and_differentiable() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    net(torch.randn(16, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    net.eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    with torch.no_grad(), simulated(net):
        expected = net(x)
    assert torch.equal(net(x), expected)


def test_eval_before_training_is_float_bit_for_bit() -> None:
    twin = Net().eval()
    net = prepared(copy.deepcopy(twin), FUSED, torch.randn(2, 3, 8, 8)).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("how", ["step", "data", "load_state_dict"])
def test_eval_folds_the_weights_of_now(how: str) -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    x = torch.randn(16, 3, 8, 8)
    net(x)
    with torch.no_grad():
        before = net.eval()(x)
    if how == "step":
        sgd_steps(net.train(), 1)
    with torch.no_grad():
        if how == "data":  # moves no version counter
            net.fc.weight.data.copy_(-net.fc.weight)  # type: ignore[union-attr,operator]
        elif how == "load_state_dict":
            net.load_state_dict({key: value * 0.5 for key, value in net.state_dict().items()})
        if how != "load_state_dict":
            net.eval()
        after = net(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, convert_model(net)(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_equal(copier: Any) -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    x = torch.randn(16, 3, 8, 8)
    net(x)
    other = copier(net)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), net.eval()(x))
    group, twin = (prepared_groups(model)["conv1"][1] for model in (net, other))
    assert isinstance(group, FusedGroup) and group.output is not None
    assert isinstance(twin, FusedGroup)
    high = group.output.high
    other.train()(x * 100)
    assert group.output.high == high
    assert twin.norm is other.bn1


def test_autocast_keeps_ranges_and_grids_in_float32() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    x = torch.randn(16, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x).float().sum().backward()
    assert net.conv1.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    with torch.no_grad():
        expected = net.eval()(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(x), expected), "eval is the deployed arithmetic whatever the precision"


class SideEffect(nn.Module):
    """Uses its in-place ReLU for what it does to its input: fused, that would be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.relu(x)
        return x * 2


def test_an_in_place_activation_used_for_its_side_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="'relu' works in place and its input is used afterwards"):
        make_plan(SideEffect(), [{"op_names": ["conv"], "fuse_names": [("conv", "relu")]}], example_input=torch.randn(2, 3, 8, 8))


class Writes(nn.Module):
    """Something happens to the first layer's output between the layers, unseen by the names of tensors."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.one, self.relu, self.two = how, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.one(x))
        self.how(y)
        out: Tensor = self.two(y)
        return out


@pytest.mark.parametrize("how", [lambda y: y[:, :2].mul_(8), lambda y: y.view(-1).mul_(8), lambda y: y.flatten(1).add_(5)])
def test_a_tensor_that_was_written_through_a_view_shares_no_grid(how: Any) -> None:
    net, x = Writes(how), torch.randn(16, 3, 8, 8)
    plan = make_plan(net, [{"op_types": ["Conv2d"], "fuse_names": [("one", "relu")]}], example_input=x)
    assert [layer.targets["_input_"].source for layer in plan.layers] == [None, None]
    twin = copy.deepcopy(net)
    prepare_model(net, plan).train()(x)
    with torch.no_grad():
        found, expected = net.eval()(x), twin(x)
    assert (found - expected).std() <= 0.05 * expected.std()


def mean_of(x: Tensor) -> Tensor:
    return x.mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_scripted_reader_is_seen() -> None:
    """torch deprecates scripting, but nets that people have use it."""
    scripted_mean = torch.jit.script(mean_of)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.relu(y) + scripted_mean(y)
            return out

    with pytest.raises(ConfigError, match="the output of 'conv' is also read by"):
        make_plan(Reads(), [{"op_names": ["conv"], "fuse_names": [("conv", "relu")]}], example_input=torch.randn(2, 3, 8, 8))


def test_unbatched_sequences_do_not_fold() -> None:
    net = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6))
    with pytest.raises(ConfigError, match="normalises dimension 1 of an input without a batch dimension"):
        make_plan(net, [{"op_names": ["0"], "fuse_names": [("0", "1")]}], example_input=torch.randn(3, 6))


def test_a_forward_on_the_instance_is_refused() -> None:
    net = Net()
    net.relu1.forward = lambda x: x
    with pytest.raises(ConfigError, match="'relu1' has a forward of its own on the instance"):
        make_plan(net, FUSED, example_input=torch.randn(2, 3, 8, 8))
    net = Net()
    net.fc.__dict__["forward"] = lambda x: x
    with pytest.raises(ConfigError, match="'fc' has a forward of its own on the instance"):
        make_plan(net, FUSED, example_input=torch.randn(2, 3, 8, 8))


def test_a_subclass_keeps_its_class_in_the_family() -> None:
    class MyConv(nn.Conv2d):
        pass

    net = Net()
    net.conv1 = MyConv(3, 8, 3, padding=1)
    prepared(net, FUSED, torch.randn(2, 3, 8, 8))
    assert isinstance(net.conv1, MyConv)
    assert isinstance(net.bn1, nn.BatchNorm2d)
    assert isinstance(net.relu1, nn.ReLU)


# -- patterns ----------------------------------------------------------------------------------------------------------------

FITS: list[list[nn.Module]] = [
    [nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)],
    [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()],
    [nn.Conv2d(1, 2, 1), nn.SyncBatchNorm(2), nn.ReLU6()],
    [nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.ReLU6()],
    [nn.Conv2d(1, 2, 1), nn.ReLU6()],
    [nn.Linear(1, 2), nn.BatchNorm1d(2), nn.ReLU()],
    [nn.Linear(1, 2), nn.ReLU()],
    [nn.Conv2d(1, 2, 1), nn.GELU()],
    [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.PReLU()],
    [nn.BatchNorm2d(2), nn.ReLU()],
    [nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Hardtanh()],
    [nn.ConvTranspose2d(1, 2, 1), nn.BatchNorm2d(2)],
]
MISFITS: list[list[nn.Module]] = [
    [nn.Conv2d(1, 2, 1), nn.BatchNorm1d(2)],
    [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)],
    [nn.Conv2d(1, 2, 1), nn.Mish()],
    [nn.BatchNorm2d(2), nn.GELU()],
    [nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)],
    [nn.BatchNorm2d(2), nn.BatchNorm2d(2)],
    [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.ReLU()],
    [nn.ConvTranspose2d(1, 2, 1), nn.BatchNorm1d(2)],
    [nn.ReLU()],
]


def names(members: list[nn.Module]) -> str:
    return "-".join(type(m).__name__ for m in members)


@pytest.mark.parametrize("members", FITS, ids=names)
def test_patterns_that_fuse(members: list[nn.Module]) -> None:
    assert pattern_problem(members) is None


@pytest.mark.parametrize("members", MISFITS, ids=names)
def test_patterns_that_do_not(members: list[nn.Module]) -> None:
    assert "no pattern that fuses" in str(pattern_problem(members))


def test_geometry_reads_what_torch_computes() -> None:
    assert Geometry.of(nn.Conv2d(1, 1, 3, padding="same")).padding == (1, 1)
    assert Geometry.of(nn.Conv2d(1, 1, (3, 5), padding=(1, 2), stride=(2, 1))).padding == (1, 2)
    assert Geometry.of(nn.Conv2d(1, 1, 4, padding="same")).pad == (1, 2, 1, 2)
