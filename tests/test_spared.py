# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of what pruning leaves alone: teachers, layers that no forward uses, grids without a 0, frozen layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from toys import Calls, Lit, Net, loader

from lightning_quant import QuantFusionCallback, make_plan
from lightning_quant.config import ConfigError
from lightning_quant.masks import PruningPlan, make_pruning
from lightning_quant.record import record
from lightning_quant.symbolic import trace

LINEAR = [{"op_types": ["Linear"], "metric": "level", "sparse_ratio": 0.5}]
CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def chosen(plan: PruningPlan) -> set[str]:
    return {target.module for target in plan.targets}


class Partly(nn.Module):
    """`a`, `b` and the last one, `e`, compute; nobody calls `c`; of `d` the forward reads the weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.e(F.linear(self.b(self.a(x)), self.d.weight))
        return out


@pytest.mark.parametrize("traced", [False, True])
def test_a_layer_that_the_forward_does_not_use_is_left_unless_it_is_named(traced: bool) -> None:
    model = Partly()
    graph = trace(model) if traced else record(model, X)
    assert not isinstance(graph, str)
    plan = make_pruning(model, LINEAR, graph)
    # Traced, without shapes, no layer is known to be the last one.
    assert chosen(plan) == {"a", "b", "d", *("e" if traced else "")}
    assert "pruning[0]: not called in the recorded forward, so left as they are: c; name them in op_names to mask" in str(plan)
    assert chosen(make_pruning(model, [{"op_names_re": ["[ac]"], **keys(LINEAR)}], graph)) == {"a"}
    named = make_pruning(model, [{"op_names": ["a", "c"], **keys(LINEAR)}], graph)
    assert chosen(named) == {"a", "c"} and "not called" not in str(named)
    assert chosen(make_pruning(model, LINEAR)) == set("abcde"), "without a forward nobody knows"


def keys(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in entries[0].items() if key != "op_types"}


def test_parts_of_attention_are_used_though_they_are_not_called() -> None:
    model = Calls(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(4, 2), other=nn.Linear(4, 4))
    plan = make_pruning(model, LINEAR, record(model, torch.randn(3, 2, 4)))
    assert chosen(plan) == {"attention.out_proj"}


def test_an_activation_that_several_layers_share_is_used() -> None:
    model = Calls(lambda m, x: m.act(m.b(m.act(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=nn.ReLU())
    follows = {"_output_": {"align": {"module_name": "a", "target_name": "weight", "dims": [0]}}}
    entries = [
        {"op_names": ["a"], "sparse_ratio": 0.5},
        {"op_types": ["ReLU"], "target_names": ["_output_"], "target_settings": follows},
    ]
    assert chosen(make_pruning(model, entries, record(model, X))) == {"a", "act"}


def test_where_nothing_is_left_the_plan_says_why() -> None:
    model = Calls(lambda m, x: x + 1, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    text = (
        r"pruning: nothing is left to mask: a \(not called in the recorded forward\), b \(the teacher's\); check example_input, "
        "root and teacher, or name layers in op_names"
    )
    with pytest.raises(ConfigError, match=text):
        make_pruning(model, LINEAR, record(model, X), teacher=model.get_submodule("b"))


# -- teachers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_graph", [False, True])
def test_what_is_the_teachers_is_never_masked(with_graph: bool) -> None:
    model = Calls(lambda m, x: m.teacher(m.b(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), teacher=Net())
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.teacher = teacher
    model.b.weight = teacher[1].weight  # type: ignore[union-attr]  # of one Parameter
    graph = record(model, X) if with_graph else None
    plan = make_pruning(model, LINEAR, graph, teacher=teacher)
    assert chosen(plan) == {"a"}
    assert "pruning[0]: the teacher's, so left as they are: b, teacher.0, teacher.1" in str(plan)
    with pytest.raises(ConfigError, match=r"pruning\[0\]: 'teacher.0' is the teacher's, which stays as it is; leave it out"):
        make_pruning(model, [{"op_names": ["a", "teacher.0"], "sparse_ratio": 0.5}], graph, teacher=teacher)


def test_a_norm_of_the_teachers_does_not_follow() -> None:
    model = Calls(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 4))
    entries, graph = [{"op_names": ["a"], "sparse_ratio": 0.5}], record(model, X)
    assert chosen(make_pruning(model, entries, graph)) == {"a", "norm"}
    assert chosen(make_pruning(model, entries, graph, teacher=model.get_submodule("norm"))) == {"a"}


class Beside(Lit):
    """A student with its teacher, and with a net that its loss looks through."""

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        self.teacher = Net().requires_grad_(False)
        self.looks = nn.Conv2d(3, 8, 3).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        seen: Tensor = self.looks(batch[0]).mean()
        return super().training_step(batch, batch_idx) + 0 * seen


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")
@pytest.mark.parametrize("config_list", [None, "int8"])
def test_nets_beside_the_student_stay_as_they_are_in_a_fit(config_list: Any, quiet_trainer: Callable[..., Trainer]) -> None:
    torch.manual_seed(0)
    model = Beside()
    before = copy.deepcopy([model.teacher.state_dict(), model.looks.state_dict()])
    callback = QuantFusionCallback(
        config_list,
        pruning={"config_list": CONV, "schedule": "one_shot"},
        distillation="kl",
        teacher=model.teacher,
        source="last",
        verbose=0,
    )
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(32), loader(16))
    after = [model.teacher.state_dict(), model.looks.state_dict()]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items() if not name.endswith("num_batches_tracked"))
    assert callback.masks is not None
    found = callback.masks.sparsity()
    assert {name: found[name] for name in ("conv1.weight", "bn2.weight")} == {
        "conv1.weight": 0.5,
        "bn2.weight": 0.5,
    }
    assert not any(name.startswith(("teacher", "looks")) for name in callback.masks.by_target())


def test_a_teachers_layer_that_is_named_is_refused_before_the_fit(quiet_trainer: Callable[..., Trainer]) -> None:
    model = Beside()
    pruning = [{"op_names": ["conv1", "teacher.conv1"], "sparse_ratio": 0.5}]
    callback = QuantFusionCallback(pruning=pruning, distillation="kl", teacher=model.teacher, verbose=0)
    with pytest.raises(ConfigError, match=r"'teacher.conv1' is the teacher's, which stays as it is"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(32), loader(16))


# -- grids without a 0 --------------------------------------------------------------------------------------------------

ONE_BIT = [{"op_names": ["conv2"], "target_names": ["weight"], "method": "bnn"}]


def test_one_bit_has_no_zero_for_what_is_masked(quiet_trainer: Callable[..., Trainer]) -> None:
    callback = QuantFusionCallback(ONE_BIT, pruning=CONV, verbose=0)
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    text = (
        r"pruning\[0\]: conv2.weight is masked, and config_list\[0\] quantizes it by method 'bnn', whose values are -1 and 1: .* "
        r"Leave the layer out of one of the two, or take another method \('qat' with int2\)"
    )
    with pytest.raises(ConfigError, match=text):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(32), loader(16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_bit_beside_what_is_masked_is_fine() -> None:
    model = Net()
    graph, quantized = record(model, torch.randn(2, 3, 8, 8)), make_plan(model, ONE_BIT, example_input=torch.randn(2, 3, 8, 8))
    conv1 = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
    assert chosen(make_pruning(model, conv1, graph, quantized=quantized)) == {"conv1", "bn1"}
    reads = [*conv1, {"op_names": ["conv2"], "target_names": ["_input_"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=r"pruning\[1\]: conv2._input_ is masked, and config_list\[0\] quantizes it by"):
        make_pruning(model, reads, graph, quantized=quantized)
    other = make_plan(model, [{"op_names": ["conv2"]}], example_input=torch.randn(2, 3, 8, 8))
    assert "conv2" in chosen(make_pruning(model, reads, graph, quantized=other))


# -- frozen layers ------------------------------------------------------------------------------------------------------


def test_the_plan_says_which_frozen_layers_have_no_scores() -> None:
    model = Net()
    model.conv2.requires_grad_(False)
    said = "frozen, and scored by gradients: conv2.weight; masked from the first update on that comes while they train"
    for metric, told in (("taylor", True), ("movement", True), ("l1", False)):
        plan = make_pruning(model, [{**CONV[0], "metric": metric}], record(model, torch.randn(2, 3, 8, 8)))
        assert (said in str(plan)) == told and {"conv1", "conv2"} <= chosen(plan)
