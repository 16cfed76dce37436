# SPDX-License-Identifier: Apache-2.0
"""Owns what training keeps for backward (`memory`), and the bias grid in training (`simulate_bias`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, make_plan, prepare_model
from lightning_quant.fusion import FusedGroup
from lightning_quant.prepare import apply_phase, prepared_groups, quantizers_of, simulated
from lightning_quant.quantizers import Grid
from lightning_quant.schedule import Phase

LAYERS = [{"op_types": ["Conv2d", "Linear"]}]


def blocks(width: int = 8) -> nn.Sequential:
    """Images (N, 3, 12, 12) to logits (N, 5): a ReLU, a ReLU6, a curve, a layer without activation."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, groups=2), nn.ReLU6(), nn.Conv2d(width, width, 1), nn.SiLU()),
        *(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 36, 5)),
    )


def prepared(net: nn.Module, config: Any = LAYERS, **options: Any) -> nn.Module:
    twin = copy.deepcopy(net)
    return prepare_model(twin, make_plan(twin, config, example_input=torch.randn(2, 3, 12, 12)), **options).train()


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that one forward keeps for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    y.sum().backward()
    return sum(kept.values())


# -- lean ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"target_settings": {"weight": {"granularity": "per_tensor"}}},
        {"target_settings": {"weight": {"quant_scheme": "affine"}}},
        {"quant_dtype": "int3"},
        {"observer": "mse"},
        *({"method": method} for method in ("lsq", "lsq+", "pact", "dorefa", "bnn")),
    ],
    ids=["default", "per_tensor", "affine weights", "int3", "mse", "lsq", "lsq+", "pact", "dorefa", "bnn"],
)
def test_lean_gives_the_same_numbers(keys: dict[str, Any], dtype: torch.dtype) -> None:
    net = blocks().to(dtype)
    exact, lean = (prepared(net.float(), [{**LAYERS[0], **keys}], memory=memory).to(dtype) for memory in ("exact", "lean"))
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, dtype=dtype)
        one, other = exact(x), lean(x)
        assert torch.equal(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
        for (name, a), b in zip(exact.named_parameters(), lean.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad), name
    assert any(bool((p.grad != 0).any()) for p in lean.parameters() if p.grad is not None)


def test_lean_under_autocast() -> None:
    net = blocks()
    exact, lean = (prepared(net, memory=memory) for memory in ("exact", "lean"))
    x = torch.randn(4, 3, 12, 12)
    for model in (exact, lean):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
    for a, b in zip(exact.parameters(), lean.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_lean_keeps_less() -> None:
    net, x = blocks(32), torch.randn(8, 3, 12, 12)
    exact, lean, plain = saved_bytes(prepared(net), x), saved_bytes(prepared(net, memory="lean"), x), saved_bytes(net.train(), x)
    assert lean < 0.65 * exact
    assert lean < 1.25 * plain < exact


def test_lean_is_exact_on_the_ends_and_where_nothing_is_known() -> None:
    """Values on the ends of a ReLU, on the clip, next to both, infinite; the gradient of the two ways is one."""
    grads = []
    for memory in ("exact", "lean"):
        net = nn.Sequential(nn.Linear(1, 1), nn.ReLU6())
        prepare_model(
            net,
            make_plan(net, [{"op_types": ["Linear"], "high_precision_output": False}], example_input=torch.ones(2, 1)),
            memory=memory,
        )
        (quantizer,) = (one for name, one in quantizers_of(net).items() if name.endswith("_output_"))
        quantizer.load_state_dict({"low": 0.0, "high": 5.1})
        s = 5.1 / 255
        edges = [0.0, -0.0, 5.1 + s / 2, 6.0, 5.1]
        near = [float(torch.nextafter(torch.tensor(e), torch.tensor(to))) for e in edges for to in (-9.0, 9.0)]
        x = torch.tensor([*edges, *near, 1e-30, -1e-30, float("inf"), -float("inf")], requires_grad=True)
        quantizer(x).backward(torch.arange(1.0, x.numel() + 1))
        grads.append(x.grad)
    assert grads[0] is not None and grads[1] is not None
    assert torch.equal(grads[0], grads[1])
    assert grads[0][0] == 0 and grads[0][4] != 0


def test_lean_with_channels_last() -> None:
    net = blocks()
    exact, lean = (prepared(net, memory=memory) for memory in ("exact", "lean"))
    x = torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last)
    for model in (exact, lean):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model(x).square().sum().backward()
    for a, b in zip(exact.parameters(), lean.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_lean_inside_a_checkpoint_and_others_hooks() -> None:
    """Hooks do not nest in torch: lean hands on what is not its own to those around it."""
    net, x = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)]), torch.randn(4, 8, 12, 12, requires_grad=True)
    kept, grads = [], []
    for memory in ("exact", "lean"):
        model = copy.deepcopy(net)
        plan = make_plan(model, [{"op_types": ["Conv2d"]}], example_input=x.detach())
        prepare_model(model, plan, memory=memory).train()(x)
        seen: list[int] = []

        def pack(t: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = checkpoint(model, x, use_reentrant=False)
            kept.append(sum(seen))
            direct = model(x)
        assert sum(seen) > kept[-1] + 6 * x.numel(), "every layer's input went through the user's hook"
        (y.sum() + direct.sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] <= kept[0] < 3 * x.numel(), "a checkpoint keeps its input alone"
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("what", ["weight", "input"])
def test_what_lean_needs_again_must_not_change(what: str) -> None:
    net = prepared(blocks(), memory="lean")
    seen: list[Tensor] = []
    net.get_submodule("3").register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    y = net(torch.randn(4, 3, 12, 12))
    with torch.no_grad():
        (net.get_parameter("3.weight") if what == "weight" else seen[0]).add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        *(({"memory": value}, r"^memory: .* is not one of exact, lean\.$") for value in ("small", "", None, 1)),
        *(({"simulate_bias": value}, r"^simulate_bias: .* is not true or false\.$") for value in ("no", 1, None)),
    ],
    ids=str,
)
def test_an_option_that_is_none(option: dict[str, Any], problem: str) -> None:
    net = blocks()
    with pytest.raises(ConfigError, match=problem):
        prepared(net, **option)
    with pytest.raises(ConfigError, match=problem):
        QuantFusionCallback("int8", **option)


def test_a_lean_fit_is_the_exact_one(quiet_trainer: Callable[..., Trainer]) -> None:
    found = []
    for memory in ("exact", "lean"):
        torch.manual_seed(3)
        module, callback = Lit(), QuantFusionCallback(LAYERS, memory=memory, verbose=0)
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader(), loader())
        groups = [group for _, group in prepared_groups(module).values()]
        assert groups and all(group.lean == (memory == "lean") for group in groups)
        found.append(module.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# -- the bias grid ------------------------------------------------------------------------------------------------------


def coarse() -> nn.Sequential:
    """Whose deployed bias lies on a coarse grid: 2 bits of weights, 3 of activations."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(600, 7))
    for _ in range(5):
        net.train()(torch.randn(16, 3, 12, 12) + 0.5)
    return net


FEW_BITS = [
    {
        "op_types": ["Conv2d", "Linear"],
        "high_precision_output": False,
        "target_settings": {
            "weight": {"quant_dtype": "int2"},
            "_input_": {"quant_dtype": "uint3"},
            "_output_": {"quant_dtype": "uint8"},
        },
    }
]


def training_against_deployed(simulate_bias: bool, config: Any, phase: Phase) -> tuple[float, int]:
    """(largest difference in output steps, how many values differ) of training and eval on frozen ranges."""
    net = prepared(coarse(), config, simulate_bias=simulate_bias)
    x = torch.randn(16, 3, 12, 12)
    for _ in range(3):
        net(x)
    apply_phase(net, phase)
    trained = net.train()(x).detach()
    with torch.no_grad():
        deployed = net.eval()(x)
        again = net(x)
    assert torch.equal(deployed, again)
    grid = quantizers_of(net)["4._output_"].grid()
    assert isinstance(grid, Grid)
    differences = ((trained - deployed) / grid.scale).abs()
    return float(differences.max()), int((differences > 0.5).sum())


def test_training_sees_the_bias_that_is_deployed() -> None:
    frozen = Phase(observe=False, freeze_batch_norm=True)
    most, differ = training_against_deployed(True, FEW_BITS, frozen)
    assert most == pytest.approx(0, abs=1e-3) and differ == 0
    most, differ = training_against_deployed(False, FEW_BITS, frozen)
    assert most >= 1 and differ > 10, "without, training does not know it"


def test_a_simulated_bias_keeps_its_gradient() -> None:
    nets = [prepared(coarse(), FEW_BITS, simulate_bias=on) for on in (False, True)]
    x = torch.randn(16, 3, 12, 12)
    for net in nets:
        net(x)
        apply_phase(net, Phase(observe=False, freeze_batch_norm=True))
        net.zero_grad()
        net(x).sum().backward()
    for name in ("1.bias", "4.bias"):
        a, b = (net.get_parameter(name).grad for net in nets)
        assert a is not None and b is not None
        assert bool((b != 0).any())
    group = prepared_groups(nets[1])["0"][1]
    assert isinstance(group, FusedGroup) and group.bias_error is not None
    assert group.bias_error.abs().max() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_shift_of_a_norm_before_a_layer_is_rounded_with_its_bias(bias: bool) -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 9, bias=bias)), torch.randn(64, 6) + 1
    for _ in range(20):
        net.train()(x)
    targets = {"weight": {"quant_dtype": "int2"}, "_input_": {"quant_dtype": "uint3"}}
    entry = {"op_types": ["Linear"], "fuse_names": [("0", "1")], "target_settings": targets}
    most = []
    for simulate_bias in (False, True):
        model = copy.deepcopy(net)
        prepare_model(model, make_plan(model, [entry], example_input=x), simulate_bias=simulate_bias).train()(x)
        apply_phase(model, Phase(observe=False, freeze_batch_norm=True))
        trained = model(x).detach()
        with torch.no_grad():
            most.append(float((trained - model.eval()(x)).abs().max()))
    assert most[1] < 1e-5
    assert most[0] > 1e-3


def test_a_bias_that_batch_norm_still_moves_is_not_simulated() -> None:
    net = prepared(coarse(), FEW_BITS, simulate_bias=True)
    net(torch.randn(16, 3, 12, 12))
    group = prepared_groups(net)["0"][1]
    assert isinstance(group, FusedGroup)
    assert group.bias_error is None
    apply_phase(net, Phase(freeze_batch_norm=True))
    net(torch.randn(16, 3, 12, 12))
    assert group.bias_error is not None


@pytest.mark.parametrize("bits", ["int8", "int2"])
def test_the_noted_error_is_that_of_the_deployed_layer(bits: str) -> None:
    """Against the bias of the deployed layer itself: int32 times s_x s_w."""
    config = [{**FEW_BITS[0], "target_settings": {**FEW_BITS[0]["target_settings"], "weight": {"quant_dtype": bits}}}]  # type: ignore[dict-item]
    net = prepared(coarse(), config, simulate_bias=True)
    x = torch.randn(16, 3, 12, 12)
    net(x)
    apply_phase(net, Phase(observe=False, freeze_batch_norm=True))
    net(x)
    for name in ("0", "4"):
        head, group = prepared_groups(net)[name]
        assert isinstance(group, FusedGroup) and group.bias_error is not None
        layer: Any = group.deploy(head)
        found = layer.bias.double() * layer.scale.double() * layer.x.scale
        norm = group.norm
        if norm is None:
            whole = head.get_parameter("bias").double()
        else:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
            k = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            whole = norm.bias.double() + (head.get_parameter("bias").double() - norm.running_mean.double()) * k
        torch.testing.assert_close(group.bias_error.double(), (found - whole).detach(), rtol=0, atol=1e-6)


def test_a_simulated_bias_from_the_callback(quiet_trainer: Callable[..., Trainer]) -> None:
    callback = QuantFusionCallback(LAYERS, simulate_bias=True, schedule={"freeze_batch_norm": 0}, verbose=0)
    module = Lit()
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader(), loader())
    groups = [group for _, group in prepared_groups(module).values() if isinstance(group, FusedGroup)]
    assert any(group.bias_error is not None for group in groups)
    with simulated(module), torch.no_grad():
        assert callback.deployed_model is not None
