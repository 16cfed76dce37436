# SPDX-License-Identifier: Apache-2.0
"""Owns operators that a forward calls as functions: their names and places, what is rounded there, and what may go on around."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from toys import Calls, Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model, restore_model
from lightning_quant.layers import Plan
from lightning_quant.plan import UNCAUGHT
from lightning_quant.prepare import quantizer_state
from lightning_quant.record import record
from lightning_quant.sites import name_of, place
from lightning_quant.symbolic import trace

EVERYTHING = {"op_names_re": [".*"]}


def rounded(x: Tensor) -> Tensor:
    """x on the uint8 grid of its own range, which has a zero."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def planned(model: nn.Module, *args: Tensor, config: Any = None) -> Plan:
    """Everything planned, and attached to the model."""
    plan = make_plan(model, config or EVERYTHING, example_input=tuple(arg.clone() for arg in args))
    prepare_model(model, plan)
    return plan


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for the order of float operations."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- names and places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: 1 + x, "add"),
        (lambda x: x.add_(1), "add"),
        (lambda x: x.__iadd__(1), "add"),
        (lambda x: torch.add(x, 1), "add"),
        (lambda x: 1 - x, "sub"),
        (lambda x: torch.subtract(x, 1), "sub"),
        (lambda x: x * 2, "mul"),
        (lambda x: torch.multiply(x, 2), "mul"),
        (lambda x: x @ x, "matmul"),
        (lambda x: torch.concat([x, x]), "cat"),
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.T, "T"),
        (lambda x: x[0], "getitem"),
    ],
)
def test_one_name_for_one_operator_however_it_is_spelt(call: Callable[[Tensor], Tensor], name: str) -> None:
    graph = record(Calls(lambda m, x: call(x)), torch.ones(2, 2))
    assert list(graph.operators) == [name]


def test_names_count_within_the_owner_and_never_meet_a_module() -> None:
    inner = Calls(lambda m, x: x + 1 + 2)
    outer = Calls(lambda m, x: m.inner(x) + m.add(x) + 1, inner=inner, add=nn.Identity())
    assert list(record(outer, torch.ones(2)).operators) == ["inner.add", "inner.add_1", "add_1", "add_2"]


def test_a_division_has_one_name() -> None:
    assert {name_of(f) for f in (torch.div, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__itruediv__, Tensor.div_)} == {"div"}


def test_the_name_of_something_without_one_is_its_type() -> None:
    assert name_of(functools.partial(torch.add)) == "partial"


def test_outside_of_any_module_a_place_ends_with_the_code() -> None:
    assert place() is None


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) + x


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Decorated(nn.Module):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def helper(x: Tensor) -> Tensor:
    return x + x


def loops(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + 1
    return x


# (forward, how many operators): every one of them has a place and a range of its own
PLACES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "loop": (lambda: Calls(loops), 3),
    "helper twice": (lambda: Calls(lambda m, x: helper(helper(x))), 2),
    "lambda": (lambda: Calls(lambda m, x: max([x], key=lambda y: float((y + 1).sum())) + x), 2),
    "one line": (lambda: Calls(lambda m, x: (x + 1) * 2 + (x + 3)), 4),
    "comprehension": (lambda: Calls(lambda m, x: sum([x + i for i in range(3)], x)), 6),
    "generator": (lambda: Calls(lambda m, x: torch.cat([y * 2 for y in (x + i for i in range(2))])), 5),
    "super": (Derived, 3),
    "decorated": (Decorated, 1),
    "owner in owner": (lambda: Calls(lambda m, x: m.inner(x + 1) + x, inner=Calls(loops)), 5),
    "exception handled": (lambda: Calls(lambda m, x: _handled(x)), 2),
    "map": (lambda: Calls(lambda m, x: torch.stack(list(map(torch.relu, [x, -x])))), 3),
}


def _handled(x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        x = x + torch.ones(17)
    return (x + 1) * 2


@pytest.mark.parametrize("name", list(PLACES))
def test_every_place_is_found_again(name: str) -> None:
    make, count = PLACES[name]
    model, x = make(), torch.randn(4, 3)
    expected = model(x)
    plan = planned(model, x)
    assert len(plan.layers) == count
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        near(model.train()(x), expected, 0.1)
        eval_output = model.eval()(x)
    assert [str(w.message) for w in said if name != "exception handled"] == []
    assert all(bounds["low"] is not None for bounds in quantizer_state(model).values())
    assert not torch.equal(eval_output, expected)
    assert torch.equal(convert_model(model)(x), eval_output)


def test_an_owner_called_twice_has_one_range_for_both_calls() -> None:
    model = Calls(lambda m, x: m.inner(x) + m.inner(x * 3), inner=Calls(lambda m, x: torch.relu(x)))
    x = torch.randn(50)
    plan = planned(model, x, config={"op_types": ["relu"], "observer": "minmax"})
    assert [layer.name for layer in plan.layers] == ["inner.relu"]
    assert any("called 2 times: one range for all" in note for note in plan.layers[0].notes)
    model.train()(x)
    assert quantizer_state(model)["inner.relu._output_"]["high"] == pytest.approx(3 * float(x.max()), rel=0.02)


def test_a_branch_that_only_training_takes_does_not_shift_the_rest() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if m.training:
            x = x + 100.0
            x = x - 100.0
        return torch.relu(x + 1)

    model, x = Calls(forward), torch.randn(64)
    planned(model, x, config={"op_types": ["add", "relu"]})
    with pytest.warns(
        UserWarning, match=r"^the forward of Calls calls 'add' where the recorded forward did not; there it stays float\.$"
    ) as told:
        model.train()(x)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # said once
    assert quantizer_state(model)["add._input_"]["high"] == pytest.approx(float(x.max()), rel=1e-3)


def test_a_longer_loop_than_the_recorded_one_stays_float_behind_it() -> None:
    def forward(m: nn.Module, x: Tensor, times: Tensor) -> Tensor:
        for _ in range(int(times)):
            x = x + 1
        return x

    model, x = Calls(forward), torch.randn(4)
    planned(model, x, torch.tensor(2))
    with pytest.warns(UserWarning, match="stays float"):
        model.train()(x, torch.tensor(4))
    assert set(quantizer_state(model)) == {"add._input_", "add._output_", "add_1._output_"}


# -- values -------------------------------------------------------------------------------------------------------------

R = rounded
# every operator -> (call, the same by hand, how many of the inputs it reads)
VALUES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (lambda x, y: F.relu(x), lambda x, y: R(F.relu(R(x)))),
    "relu_": (lambda x, y: (x * 1).relu_(), lambda x, y: R(F.relu(R(R(x) * 1)))),
    "relu6": (lambda x, y: F.relu6(4 * x), lambda x, y: R(F.relu6(R(4 * R(x))))),
    "hardtanh": (lambda x, y: F.hardtanh(x, -0.5, 0.7), lambda x, y: R(F.hardtanh(R(x), -0.5, 0.7))),
    "leaky_relu": (lambda x, y: F.leaky_relu(x, 0.2), lambda x, y: R(F.leaky_relu(R(x), 0.2))),
    "gelu": (lambda x, y: F.gelu(x), lambda x, y: R(F.gelu(R(x)))),
    "silu": (lambda x, y: F.silu(x), lambda x, y: R(F.silu(R(x)))),
    "hardswish": (lambda x, y: F.hardswish(x), lambda x, y: R(F.hardswish(R(x)))),
    "sigmoid": (lambda x, y: x.sigmoid(), lambda x, y: R(R(x).sigmoid())),
    "hardsigmoid": (lambda x, y: F.hardsigmoid(x), lambda x, y: R(F.hardsigmoid(R(x)))),
    "tanh": (lambda x, y: torch.tanh(x), lambda x, y: R(torch.tanh(R(x)))),
    "softmax": (lambda x, y: F.softmax(x, -1), lambda x, y: R(F.softmax(R(x), -1))),
    "add": (lambda x, y: x + y, lambda x, y: R(R(x) + R(y))),
    "add to itself": (lambda x, y: x + x, lambda x, y: R(R(x) + R(x))),
    "add method": (lambda x, y: x.add(y), lambda x, y: R(R(x) + R(y))),
    "add alpha": (lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: R(R(x) + 0.5 * R(y))),
    "add in place": (lambda x, y: (x * 1).add_(y), lambda x, y: R(R(R(x) * 1) + R(y))),
    "iadd": (lambda x, y: _iadd(x * 1, y), lambda x, y: R(R(R(x) * 1) + R(y))),
    "add constant": (lambda x, y: 1.5 + x, lambda x, y: R(1.5 + R(x))),
    "add broadcast": (lambda x, y: x + y[:1, :1], lambda x, y: R(R(x) + R(y[:1, :1]))),
    "sub": (lambda x, y: x - y, lambda x, y: R(R(x) - R(y))),
    "rsub": (lambda x, y: 1 - x, lambda x, y: R(1 - R(x))),
    "mul": (torch.mul, lambda x, y: R(R(x) * R(y))),
    "mul constant": (lambda x, y: x * 0.3, lambda x, y: R(R(x) * 0.3)),
    "mul keyword": (lambda x, y: torch.mul(input=x, other=y), lambda x, y: R(R(x) * R(y))),
    "matmul": (lambda x, y: x @ y.transpose(-1, -2), lambda x, y: R(R(x) @ R(y).transpose(-1, -2))),
    "bmm": (lambda x, y: torch.bmm(x[0], y[0]), lambda x, y: R(R(x[0]) @ R(y[0]))),
    "einsum": (lambda x, y: torch.einsum("bchw,bciw->bhi", x, y), lambda x, y: R(torch.einsum("bchw,bciw->bhi", R(x), R(y)))),
    "cat": (lambda x, y: torch.cat([x, y, x], 1), lambda x, y: R(torch.cat([R(x), R(y), R(x)], 1))),
    "cat keyword": (lambda x, y: torch.cat(tensors=(x, y), dim=1), lambda x, y: R(torch.cat([R(x), R(y)], 1))),
    "stack": (lambda x, y: torch.stack((x, y)), lambda x, y: R(torch.stack((R(x), R(y))))),
    "split": (lambda x, y: x.split(2, 1)[1] * 2, lambda x, y: R(R(x[:, 2:]) * 2)),
    "chunk": (lambda x, y: torch.chunk(x, 2, 1)[0] * 2, lambda x, y: R(R(x[:, :2]) * 2)),
    "mean": (lambda x, y: x.mean((2, 3)), lambda x, y: R(R(x).mean((2, 3)))),
    "avg_pool2d": (lambda x, y: F.avg_pool2d(x, 2), lambda x, y: R(F.avg_pool2d(R(x), 2))),
    "adaptive_avg_pool2d": (lambda x, y: F.adaptive_avg_pool2d(x, 1), lambda x, y: R(R(x).mean((2, 3), keepdim=True))),
    "max_pool2d": (lambda x, y: F.max_pool2d(x, 2), lambda x, y: F.max_pool2d(R(x), 2)),
    "interpolate": (
        lambda x, y: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x, y: R(F.interpolate(R(x), scale_factor=2.0, mode="bilinear")),
    ),
    "pad": (lambda x, y: F.pad(x, (1, 1)), lambda x, y: F.pad(R(x), (1, 1))),
    "pad value": (lambda x, y: F.pad(x, (1, 1), value=5.0), lambda x, y: R(F.pad(R(x), (1, 1), value=5.0))),
}


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


@pytest.mark.parametrize("name", list(VALUES))
def test_an_operator_is_rounded_without_edits(name: str) -> None:
    call, by_hand = VALUES[name]
    model, x, y = Calls(lambda m, x, y: call(x, y)), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    plan = planned(model, x, y)
    expected = by_hand(x, y)
    assert not torch.allclose(expected, call(x.clone(), y), atol=1e-6)
    step = float(expected.max() - expected.min()) / 255
    for result in (model.train()(x, y), model.eval()(x, y), convert_model(model)(x, y)):
        wrong = (result - expected).abs()
        assert wrong.max() <= 1.01 * step, str(plan)  # a number between two levels may fall to either
        assert (wrong > 1e-5).double().mean() < 0.02, str(plan)
    torch.testing.assert_close(restore_model(model)(x.clone(), y), call(x.clone(), y), rtol=0, atol=0)


def test_every_operator_with_a_setting_is_tested_here() -> None:
    from lightning_quant.settings import OPERATORS

    variants = {"max_pool1d", "max_pool3d", "avg_pool1d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool3d"}
    assert set(OPERATORS) - variants <= set(VALUES)


PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, -1),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: torch.flatten(x, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2).contiguous(),
    "getitem": lambda x: x[:, 1:],
    "unsqueeze": lambda x: x[None].squeeze(0),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("name", list(PASSING))
def test_what_only_moves_values_shares_their_quantizer(name: str) -> None:
    model, x = Calls(lambda m, x: torch.sigmoid(PASSING[name](x * 2))), torch.randn(2, 4, 4, 4)
    plan = planned(model, x, config={"op_types": ["mul", "sigmoid"]})
    assert [layer.name for layer in plan.layers] == ["mul", "sigmoid"]
    assert plan.layers[1].targets["_input_"].source == "mul._output_"
    assert len(quantizer_state(model)) == 3
    near(model.train()(x), rounded(PASSING[name](rounded(rounded(x) * 2)).sigmoid()), 1e-2)


def test_integers_pass_unrounded() -> None:
    model, x = Calls(lambda m, x: (torch.relu(x), x.argmax(-1) + 1, x.topk(2).indices)), torch.randn(4, 5)
    plan = make_plan(model, EVERYTHING, example_input=x)
    assert [layer.name for layer in plan.layers if any(t.active for t in layer.targets.values())] == ["relu"]
    prepare_model(model, plan)
    for net in (model.train(), model.eval()):
        _, best, two = net(x)
        assert torch.equal(best, x.argmax(-1) + 1)
        assert torch.equal(two, x.topk(2).indices)


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("relu", lambda m, x: (h := m.fc(x), F.relu_(h))[1] + h),
        ("add", lambda m, x: (h := m.fc(x), h.add_(1))[1] * h),
        ("leaky_relu", lambda m, x: (h := m.fc(x), F.leaky_relu(h, 0.1, True))[1] * h),
    ],
)
def test_an_operator_in_place_whose_old_name_is_read_stays_float(name: str, forward: Any) -> None:
    model, x = Calls(forward, fc=nn.Linear(3, 3)), torch.randn(8, 3)
    expected = model(x).detach()
    with pytest.raises(ConfigError, match=f"'{name}' .* works in place and its input is used afterwards by its old name"):
        make_plan(model, {"op_names": [name]}, example_input=x)
    plan = planned(model, x)
    assert "is used afterwards by its old name" in plan.left[name]
    near(model.train()(x).detach(), expected, 0.1)
    near(model.eval()(x).detach(), expected, 0.1)


# -- what may go on around ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose operators are all functions."""

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        self.fc = nn.Linear(features, features)

    def part(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.relu(self.fc(x)) + x) * x

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Stack(nn.Module):
    """Blocks and operators of its own; `how`: what runs a block."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.block, self.out, self.how = Block(), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        x = self.how(self.block, x)
        return F.leaky_relu(self.out(x), 0.1) + 0.5


CONFIG = ["int8", {"op_types": ["sigmoid", "add", "mul"]}]


def prepared(**options: Any) -> tuple[Stack, Tensor]:
    """A prepared Stack that has seen a batch, and that batch."""
    torch.manual_seed(3)
    model, x = Stack(**options), torch.randn(16, 6)
    planned(model, x, config=CONFIG)
    model.train()(x)
    return model, x


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    """What a training step computes: the output and all gradients."""
    model.zero_grad()
    y = model.train()(x.clone().requires_grad_())
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_trains_as_without(reentrant: bool) -> None:
    straight, x = prepared()
    saving, _ = prepared(how=lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert set(quantizer_state(saving)) >= {"block.sigmoid._output_", "block.add._output_", "mul._output_"}
    for _ in range(2):
        for mine, other in zip(gradients(saving, x), gradients(straight, x), strict=True):
            assert torch.equal(mine, other)
    assert quantizer_state(saving) == quantizer_state(straight)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
def test_operators_in_a_checkpointed_method_stay_float(reentrant: bool) -> None:
    """Their second run, in backward, is under no forward; half rounded, it would be another function."""

    class Saving(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.part, x, use_reentrant=reentrant)
            return y * 2

    torch.manual_seed(3)
    model, x = Stack(), torch.randn(16, 6)
    model.block = Saving()
    twin = copy.deepcopy(model)
    twin.block.__class__ = type("Plain", (Block,), {"forward": lambda self, x: self.part(x) * 2})
    plan = planned(model, x, config=["int8", {"op_types": ["add", "mul"]}])
    assert {"block.sigmoid", "block.add", "block.relu"} <= set(plan.left)
    assert [layer.name for layer in plan.layers] == ["block.fc", "block.mul_1", "out", "mul", "add"]
    config = [{"op_names": [layer.name for layer in plan.layers if not layer.operator], "fuse_names": []}]
    restore_model(model)
    planned(model, x, config=config)
    planned(twin, x, config=config)
    for mine, other in zip(gradients(model, x), gradients(twin, x), strict=True):
        assert torch.equal(mine, other)


def test_two_threads_run_two_models() -> None:
    nets = [prepared()[0].eval() for _ in range(2)]
    x = torch.randn(16, 6)
    with torch.no_grad():
        expected = nets[0](x)
    failures: list[Any] = []

    def work(net: nn.Module) -> None:
        with torch.no_grad():
            failures.extend(1 for _ in range(20) if not torch.equal(net(x), expected))

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_one_model_in_two_threads() -> None:
    net, x = prepared()
    with torch.no_grad():
        expected = net.eval()(x)
        failures: list[Any] = []
        ready = threading.Barrier(2)

        def work() -> None:
            ready.wait()
            with torch.no_grad():
                failures.extend(1 for _ in range(20) if not torch.equal(net(x), expected))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_an_exception_leaves_nothing_behind() -> None:
    def fail(block: nn.Module, x: Tensor) -> Tensor:
        block(x)
        raise ValueError("from the forward")

    model, x = prepared()
    expected = model.eval()(x)
    own, model.how = model.how, fail
    for _ in range(2):
        with pytest.raises(ValueError, match="from the forward"):
            model(x)
        assert _get_current_function_mode_stack() == []
    model.how = own
    assert torch.equal(model(x), expected)


def test_a_failing_operator_inside_a_block_leaves_the_outer_forward_at_work() -> None:
    def caught(block: nn.Module, x: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError):
            block(torch.ones(2, 17))
        y: Tensor = block(x)
        return y

    model, x = prepared()
    expected = model.eval()(x)
    model.how = caught
    assert torch.equal(model(x), expected)
    assert _get_current_function_mode_stack() == []


def test_the_model_looks_as_before() -> None:
    model, plain = prepared()[0], Stack()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    assert type(model).__name__ == "Stack"
    assert type(model).__qualname__ == Stack.__qualname__
    assert type(model).__module__ == Stack.__module__
    assert isinstance(model, Stack)
    assert str(model).replace("Fused", "") == str(plain)
    restore_model(model)
    assert type(model) is Stack
    assert set(model.__dict__) == set(plain.__dict__)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_compute_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(16, 6)
    planned(model, x, config=CONFIG)
    model.train()(x)
    clone = copied(model)
    assert torch.equal(clone.eval()(x), model.eval()(x))
    before = quantizer_state(model)
    clone.train()(x * 10)
    assert quantizer_state(model) == before
    assert quantizer_state(clone) != before
    assert torch.equal(copied(convert_model(model))(x), model.eval()(x))
    assert type(restore_model(clone)) is Block


def test_inference_mode_and_no_grad_are_one() -> None:
    model, x = prepared()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    near(model(x).detach(), expected, 0.05)


def test_autocast_trains_in_bfloat16_and_ships_float32() -> None:
    model, x = prepared()
    expected = model.eval()(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model.train()(x)
        made.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        near(made.detach().float(), expected, 0.1)
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near(model(x).float(), wanted, 0.05)
            assert torch.equal(model(x), convert_model(model)(x))


@pytest.mark.filterwarnings("ignore:Using `torch.compile.*global hooks")
def test_a_compiled_model_computes_the_same() -> None:
    model, x = prepared()
    with torch.no_grad():
        expected = model.eval()(x)
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(x), expected)
    twin, _ = prepared()
    fast = torch.compile(twin, backend="eager")
    for mine, other in zip(gradients(fast, x), gradients(model, x), strict=True):
        assert torch.equal(mine, other)
    assert quantizer_state(twin) == quantizer_state(model)


def test_a_deployed_model_exports_with_its_operators() -> None:
    model, x = prepared()
    deployed = convert_model(model)
    with torch.no_grad():
        expected = deployed(x)
        program = torch.export.export(deployed, (x,), strict=False)
        assert torch.equal(program.module()(x), expected)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # Rounded: in and out of the first mul, the add, the sigmoid and the second mul, and the last add.
    assert sum("lightning_quant.quantize" in name for name in called) >= 6


class OwnOperators(Lit):
    """A LightningModule whose own forward adds and pools."""

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        x = F.relu(m.bn1(m.conv1(x)))
        x = F.relu(m.bn2(m.conv2(x)) + x)
        out: Tensor = m.fc(F.max_pool2d(x, 2).flatten(1) * 0.5)
        return out


def test_a_lightning_module_that_adds_by_itself(quiet_trainer: Callable[..., Trainer]) -> None:
    module = OwnOperators()
    callback = QuantFusionCallback("int8", example_input=torch.randn(2, 3, 8, 8))
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, callbacks=[callback])
    trainer.fit(module, loader(), loader())
    assert isinstance(module, LightningModule)
    assert type(module).__name__ == "OwnOperators"
    assert {"add._output_", "mul._output_", "conv1._output_"} <= set(quantizer_state(module))
    x = next(iter(loader()))[0]
    with torch.no_grad():
        ours = module.eval()(x)
        deployed = convert_model(module)
        assert torch.equal(deployed(x), ours)
        plain = restore_model(copy.deepcopy(module))
        near(ours, plain(x), 0.3)
        assert not torch.equal(ours, plain(x))


# -- traced instead of recorded -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.drop = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        y = self.bn2(self.conv2(self.drop(y))) + x
        return F.relu(y) * scale


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), Residual()
        self.out = nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        parts = [torch.relu(part(x)) for part in (self.a, self.b)]
        y = torch.cat(parts, dim=1)
        if not self.training:
            y = y + 1
        out: Tensor = self.out(y.mean((2, 3)))
        return out


@pytest.mark.parametrize("make", [Residual, Branches, lambda: nn.Sequential(Residual(), nn.Conv2d(3, 3, 1), nn.Hardswish())])
def test_a_trace_sees_what_a_recorded_forward_sees(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 3, 4, 4)
    recorded, traced = record(model, x), trace(model)
    assert not isinstance(traced, str), traced
    assert {name: one.site for name, one in traced.operators.items()} == {n: one.site for n, one in recorded.operators.items()}
    plans = [make_plan(model, "int8", example_input=example) for example in (x, None)]
    groups = [[(layer.name, layer.fused_with, list(layer.targets)) for layer in plan.layers] for plan in plans]
    assert groups[0] == groups[1]
    sources = [{(layer.name, t): p.source for layer in plan.layers for t, p in layer.targets.items()} for plan in plans]
    assert sources[0] == sources[1]
    states = []
    for plan in plans:  # and the places are those of the forward that runs
        twin = copy.deepcopy(model)
        prepare_model(twin, plan)
        torch.manual_seed(1)  # of its dropout
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twin.train()(x)
        states.append(quantizer_state(twin))
    assert states[0] == states[1]


class Out(nn.Module):
    """An operator where no call of it can be caught."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(3, 3), how
        self.compiled = torch.compile(lambda x: F.silu(x) + 1, backend="eager")
        if how == "instance":
            self.forward = types.MethodType(type(self).forward, self)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z: Tensor = self.compiled(y) if self.how == "compiled" else F.silu(y) + 1
        return z


@pytest.mark.parametrize("how", ["compiled", "instance"])
def test_operators_that_nothing_can_catch_stay_float_and_the_plan_says_so(how: str) -> None:
    model, x = Out(how), torch.randn(4, 3)
    plan = make_plan(model, "int8", example_input=x)
    assert [(layer.name, layer.fused_with) for layer in plan.layers] == [("fc", ())]
    assert plan.left == {"silu": UNCAUGHT, "add": UNCAUGHT}
    with pytest.raises(ConfigError, match="'silu' matches no module"):
        make_plan(model, [{"op_types": ["silu"]}], example_input=x)
    prepare_model(model, plan)
    with torch.no_grad():
        model.train()(x)
        assert torch.equal(convert_model(model)(x), model.eval()(x))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.fc(x) if x.sum() > 0 else x, "symbolic tracing failed: .*control flow"),
        (lambda m, x: m.fc(x) * len(x), "symbolic tracing failed: .*len"),
        (lambda m, x: m.fc(torch.stack([row for row in x])), "symbolic tracing failed: .*iterated"),  # noqa: C416
        (lambda m, x: m.nothing(x), "symbolic tracing failed: .*has no attribute 'nothing'"),
    ],
)
def test_a_trace_that_fails_says_why(forward: Any, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = forward(self, x)
            return y

    model = Net()
    found = trace(model)
    assert isinstance(found, str)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)
    plan = make_plan(model, "int8")
    assert any(f"no recorded forward (no example_input was given, and {found})" in note for note in plan.notes)
    assert [layer.fused_with for layer in plan.layers] == [()]
