# SPDX-License-Identifier: Apache-2.0
"""Owns what compilers and accelerators need: no graph break, nothing compiled anew at every step, no value to wait for."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from lightning_quant import make_plan, prepare_model
from lightning_quant.prepare import apply_phase, learned_parameters, prepared_groups, quantizers_of
from lightning_quant.schedule import Phase

METHODS = ["qat", "lsq", "lsq+", "pact", "dorefa", "bnn"]


class Net(nn.Module):
    """Images (N, 3, 10, 10) to logits (N, 4): conv-bn-relu, a curve, a batch norm alone, attention, linear."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.silu = nn.Conv2d(8, 8, 3, groups=2), nn.SiLU()
        self.bn2, self.relu6 = nn.BatchNorm2d(8), nn.ReLU6()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if attends else None
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu6(self.bn2(self.silu(self.conv2(x)))).flatten(2).transpose(1, 2)
        x = x if self.attention is None else self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.fc(x.mean(1))
        return y


def prepared(method: str = "qat", types: tuple[str, ...] = ("Conv2d", "BatchNorm2d", "Linear"), **keys: Any) -> Net:
    x, net = torch.randn(4, 3, 10, 10), Net(attends="MultiheadAttention" in types)
    dtype = {"quant_dtype": "int1"} if method == "bnn" else {}
    entry = {"op_types": list(types), "method": method, **dtype, **keys}
    options = {key: entry.pop(key) for key in ("memory", "simulate_bias") if key in entry}
    prepare_model(net, make_plan(net, [entry], example_input=x), **options).train()
    return net


def step(net: nn.Module, run: Any, x: Tensor) -> Tensor:
    """A training step by plain SGD; the output before it."""
    y: Tensor = run(x)
    y.square().mean().backward()
    with torch.no_grad():
        for parameter in (*net.parameters(), *learned_parameters(net).values()):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None
    return y.detach()


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


ATTENDING = ("Conv2d", "Linear", "MultiheadAttention")


@pytest.mark.parametrize(
    ("method", "types"),
    [
        ("qat", ("Conv2d", "BatchNorm2d", "Linear")),
        ("lsq+", ("Conv2d", "Linear")),
        *(pytest.param(method, ATTENDING, marks=pytest.mark.slow) for method in METHODS),
    ],
)
def test_training_compiles_to_one_graph_and_trains_as_without(method: str, types: tuple[str, ...]) -> None:
    net = prepared(method, types)
    first = torch.randn(4, 3, 10, 10)
    if learned_parameters(net):
        step(net, net, first)  # learned scales begin from the first batch, which the host looks at
    twin = copy.deepcopy(net)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    frames = []
    for _ in range(5):
        x = torch.randn(4, 3, 10, 10)
        torch.testing.assert_close(step(net, compiled, x), step(twin, twin, x), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert breaks() == {}
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 4, "only the step after the first may be compiled anew: ranges are tensors from then on"
    assert frames[-1] <= 2
    for name, quantizer in quantizers_of(net).items():
        assert quantizer.state_dict() == pytest.approx(quantizers_of(twin)[name].state_dict(), rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_new_phase_compiles_once() -> None:
    net = prepared()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    x = torch.randn(4, 3, 10, 10)
    for _ in range(3):
        step(net, compiled, x)
    before, ranges = counter.frame_count, {name: one.state_dict() for name, one in quantizers_of(net).items()}
    apply_phase(net, Phase(observe=False, freeze_batch_norm=True))
    mean = net.bn.running_mean
    assert mean is not None
    held = mean.clone()
    for _ in range(3):
        step(net, compiled, x + 1)
    assert counter.frame_count == before + 1
    assert {name: one.state_dict() for name, one in quantizers_of(net).items()} == ranges
    assert torch.equal(mean, held)
    assert breaks() == {}


def test_eval_of_a_compiled_model_is_the_deployed_arithmetic() -> None:
    net = prepared()
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(3):
        step(net, compiled, torch.randn(4, 3, 10, 10))
    x = torch.randn(4, 3, 10, 10)
    net.eval()
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(compiled(x), expected)
    net.train()
    moved = step(net, compiled, x)
    net.eval()
    with torch.no_grad():
        assert not torch.equal(compiled(x), expected), "built anew after training"
    assert moved.isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_prepared_net_is_not_exported(training: bool, strict: bool) -> None:
    net = prepared("qat", ("Conv2d", "Linear"))
    step(net, net, torch.randn(4, 3, 10, 10))
    x = torch.randn(4, 3, 10, 10)
    net.eval()
    with torch.no_grad():
        expected = net(x)
        before = {name: one.state_dict() for name, one in quantizers_of(net).items()}
        with pytest.raises(Exception, match=r"is prepared for training.*Export the converted model"):
            torch.export.export(net.train(training), (x,), strict=strict)
        assert torch.equal(net.eval()(x), expected)
    assert {name: one.state_dict() for name, one in quantizers_of(net).items()} == before
    assert step(net.train(), net, x).isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at whatever it is given
@pytest.mark.parametrize(("keys", "why"), [({"observer": "percentile"}, "histograms"), ({"method": "lsq"}, "first batch")])
def test_what_needs_python_is_left_to_it(keys: dict[str, Any], why: str) -> None:
    torch.manual_seed(1)
    net = prepared(**{"types": ("Linear",), **keys})
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(4, 3, 10, 10)
    torch.testing.assert_close(step(net, compiled, x), step(twin, twin, x), rtol=1e-5, atol=1e-6)
    assert breaks(), why
    states = [[one.state_dict() for one in quantizers_of(model).values()] for model in (net, twin)]
    begun = [[state.get("low", state.get("scale")) for state in each] for each in states]
    assert begun[0] == begun[1]
    assert None not in begun[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_without() -> None:
    net = prepared()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net)
    for _ in range(3):
        x = torch.randn(4, 3, 10, 10)
        torch.testing.assert_close(step(net, compiled, x), step(twin, twin, x), rtol=1e-3, atol=1e-4)
    assert breaks() == {}


# -- no value is asked of an accelerator --------------------------------------------------------------------------------


def to_meta(net: nn.Module) -> None:
    """Move a prepared net; what is learned, too, which torch cannot move to this device in place."""
    net.to("meta")
    for _, group in prepared_groups(net).values():
        quantizers: list[Any] = [*group.quantizers, *group.parameter_quantizers]
        for quantizer in quantizers:
            for name, parameter in quantizer.learned.items():
                setattr(quantizer, name, nn.Parameter(parameter.detach().to("meta")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("phase", [Phase(), Phase(observe=False, freeze_batch_norm=True)], ids=["observing", "frozen"])
def test_no_step_waits_for_a_value(method: str, phase: Phase) -> None:
    """On the meta device tensors have no values: whoever asks for one gets an error."""
    net = prepared(method, ATTENDING)
    step(net, net, torch.randn(4, 3, 10, 10))  # learned scales begin from the first batch, which the host looks at
    to_meta(net)
    apply_phase(net, phase)
    x = torch.empty(4, 3, 10, 10, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    for _ in range(2):
        y = net(x)
        y.square().mean().backward()
    assert y.device.type == "meta"
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_blocks_and_affine_weights_do_not_wait_either(granularity: str) -> None:
    net = prepared(
        types=("Conv2d",),
        target_settings={"weight": {"quant_scheme": "affine"}, "_input_": {"granularity": granularity}},
    )
    net.to("meta")
    net(torch.empty(4, 3, 10, 10, device="meta")).sum().backward()
    assert net.conv.weight.grad is not None


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"simulate_bias": True}], ids=str)
def test_options_do_not_wait_either(options: dict[str, Any]) -> None:
    net = prepared(**options)
    net.to("meta")
    x = torch.empty(4, 3, 10, 10, device="meta")
    net(x).sum().backward()
    apply_phase(net, Phase(observe=False, freeze_batch_norm=True))
    net(x).sum().backward()
    assert net.conv.weight.grad is not None


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"simulate_bias": True}], ids=str)
def test_options_compile(options: dict[str, Any]) -> None:
    net = prepared(types=("Linear",), **options)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager")
    for phase in (Phase(), Phase(observe=False, freeze_batch_norm=True)):
        x = torch.randn(4, 3, 10, 10)
        for model in (net, twin):
            apply_phase(model, phase)
        torch.testing.assert_close(step(net, compiled, x), step(twin, twin, x), rtol=1e-4, atol=1e-5)
    assert breaks() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_never_waits(method: str) -> None:
    net = prepared(method).to("cuda")
    x = torch.randn(4, 3, 10, 10, device="cuda")
    step(net, net, x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            net(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
