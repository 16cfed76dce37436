# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `graph.py`: what is recorded of a forward, and that the model is afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from toys import Calls

from lightning_quant.graph import OUTSIDE, Graph
from lightning_quant.record import moved, record, split_example
from lightning_quant.targets import tensors_in


def rows(graph: Graph) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, operator, reads) of every node, without the inputs."""
    return [(node.name, node.op, node.reads) for node in graph.nodes if node.kind != "input"]


def recorded(function: Callable[..., Any], *args: Any, **layers: nn.Module) -> Graph:
    return record(Calls(function, **layers), args)


X = torch.ones(2, 3)


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_modules_are_nodes_with_their_names_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    graph = record(model, X)
    assert rows(graph) == [("0", "Linear", (0,)), ("1.0", "ReLU", (1,)), ("1.1", "Linear", (2,))]
    assert [node.index for node in graph.nodes] == [0, 1, 2, 3]
    assert graph.outputs == (3,)


def test_inputs_come_first_and_are_counted() -> None:
    graph = recorded(lambda m, a, b, c: a + c["x"][0] + b, torch.ones(1), torch.ones(1), {"x": [torch.ones(1)]})
    kinds = [(node.kind, node.name, node.op) for node in graph.nodes[:3]]
    assert kinds == [("input", f"input_{index}", "input") for index in range(3)]
    assert rows(graph) == [("add", "add", (0, 2)), ("add_1", "add", (3, 1))]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def test_functions_are_named_after_the_module_whose_forward_calls_them() -> None:
    graph = record(nn.Sequential(Block(), Block()), torch.ones(1, 3, 4))
    assert rows(graph) == [
        ("0.conv", "Conv1d", (0,)),
        ("0.add", "add", (1, 0)),
        ("0.relu", "relu", (2,)),
        ("1.conv", "Conv1d", (3,)),
        ("1.add", "add", (4, 3)),
        ("1.relu", "relu", (5,)),
    ]


OPERATORS: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], Any]]] = {
    "a + b": ("add", lambda _, a, b: a + b),
    "a += b": ("add", lambda _, a, b: a.__iadd__(b)),
    "1 + a": ("add", lambda _, a, b: 1 + a),
    "torch.add": ("add", lambda _, a, b: torch.add(a, b)),
    "a.add": ("add", lambda _, a, b: a.add(b)),
    "a.add_": ("add", lambda _, a, b: a.add_(b)),
    "a - b": ("sub", lambda _, a, b: a - b),
    "1 - a": ("sub", lambda _, a, b: 1 - a),
    "a * b": ("mul", lambda _, a, b: a * b),
    "2 * a": ("mul", lambda _, a, b: 2 * a),
    "a / b": ("div", lambda _, a, b: a / b),
    "1 / a": ("div", lambda _, a, b: 1 / a),
    "a @ b.T": ("matmul", lambda _, a, b: a @ b),
    "torch.matmul": ("matmul", lambda _, a, b: torch.matmul(a, b)),
    "a ** 2": ("pow", lambda _, a, b: a**2),
    "F.relu": ("relu", lambda _, a, b: F.relu(a)),
    "F.relu inplace": ("relu", lambda _, a, b: F.relu(a, inplace=True)),
    "torch.relu_": ("relu", lambda _, a, b: torch.relu_(a)),
    "a.relu": ("relu", lambda _, a, b: a.relu()),
    "torch.cat": ("cat", lambda _, a, b: torch.cat([a, b])),
    "F.max_pool1d": ("max_pool1d", lambda _, a, b: F.max_pool1d(a, 2)),
    "a.mean": ("mean", lambda _, a, b: a.mean(0)),
    "a.T": ("T", lambda _, a, b: a.T),
    "a[0]": ("getitem", lambda _, a, b: a[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_one_name_for_one_operator(name: str) -> None:
    op, function = OPERATORS[name]
    (row,) = rows(recorded(function, torch.ones(2, 2), torch.ones(2, 2)))
    assert row[:2] == (op, op)


def test_every_use_of_an_operator_has_its_number() -> None:
    def forward(_: Any, a: Tensor, b: Tensor) -> Tensor:
        c = a + b
        c += b
        c = torch.add(c, 1)
        return c.add_(c)

    assert rows(recorded(forward, X.clone(), X)) == [
        ("add", "add", (0, 1)),
        ("add_1", "add", (2, 1)),
        ("add_2", "add", (3,)),
        ("add_3", "add", (4, 4)),
    ]


def test_what_makes_no_tensor_is_no_node() -> None:
    graph = recorded(lambda m, a: a.reshape(a.size(0), -1).relu() if a.dim() > 1 and a.shape[0] else a, X)
    assert rows(graph) == [("reshape", "reshape", (0,)), ("relu", "relu", (1,))]


def test_setting_an_item_makes_the_tensor_anew() -> None:
    def forward(m: Any, a: Tensor) -> Tensor:
        y = m.fc(a)
        y[0] = 0.0
        out: Tensor = m.head(y)
        return out

    graph = recorded(forward, X, fc=nn.Linear(3, 4), head=nn.Linear(4, 2))
    assert rows(graph) == [("fc", "Linear", (0,)), ("setitem", "setitem", (1,)), ("head", "Linear", (2,))]


def test_an_in_place_module_stands_between_maker_and_reader() -> None:
    def forward(m: Any, a: Tensor) -> Tensor:
        y = m.fc(a)
        m.relu(y)
        out: Tensor = m.head(y)
        return out

    graph = recorded(forward, X, fc=nn.Linear(3, 4), relu=nn.ReLU(inplace=True), head=nn.Linear(4, 2))
    assert rows(graph) == [("fc", "Linear", (0,)), ("relu", "ReLU", (1,)), ("head", "Linear", (2,))]


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda m, x: m.head(m.relu(m.fc(x))), set()),
        (lambda m, x: (m.relu(m.fc(x)), m.fc(x)), set()),
        (lambda m, x: over_the_old_name(m, x)[1], {"relu"}),
        (lambda m, x: over_the_old_name(m, x)[0], {"relu"}),
        (lambda m, x: (m.relu(x), x), {"relu"}),
        (lambda m, x: (m.identity(x), m.drop(x), x), set()),
    ],
    ids=["passed on", "two calls", "read again", "returned", "input returned", "nothing written"],
)
def test_calls_that_write_over_a_tensor_which_is_used_again(forward: Callable[..., Any], names: set[str]) -> None:
    linear = {"fc": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    others = {"relu": nn.ReLU(inplace=True), "identity": nn.Identity(), "drop": nn.Dropout(inplace=True)}
    graph = recorded(forward, X, **linear, **others)
    assert {graph.nodes[index].name for index in graph.side_effects} == names


def over_the_old_name(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    m.relu(y)
    return y, m.head(y)


def test_a_module_called_twice_is_two_nodes_of_one_name() -> None:
    graph = recorded(lambda m, a: m.fc(m.fc(a)), X, fc=nn.Linear(3, 3))
    assert rows(graph) == [("fc", "Linear", (0,)), ("fc", "Linear", (1,))]
    assert [node.index for node in graph.calls("fc")] == [1, 2]


def test_a_module_under_two_names_goes_by_its_first() -> None:
    fc = nn.Linear(3, 3)
    graph = recorded(lambda m, a: m.b(m.a(a)), X, a=fc, b=fc)
    assert rows(graph) == [("a", "Linear", (0,)), ("a", "Linear", (1,))]
    assert graph.calls("b") == []


def test_parameters_and_new_tensors_come_from_outside() -> None:
    graph = recorded(lambda m, a: a * m.fc.weight[0] + torch.zeros(3), X, fc=nn.Linear(3, 3))
    assert rows(graph) == [
        ("getitem", "getitem", (OUTSIDE,)),
        ("mul", "mul", (0, 1)),
        ("zeros", "zeros", ()),
        ("add", "add", (2, 3)),
    ]


def test_keyword_arguments_of_modules_and_functions_are_read() -> None:
    graph = recorded(lambda m, a: torch.add(input=m.fc(input=a), other=a), X, fc=nn.Linear(3, 3))
    assert rows(graph) == [("fc", "Linear", (0,)), ("add", "add", (1, 0))]


def test_the_model_may_be_called_with_keywords() -> None:
    model = Calls(lambda m, x, *, scale: m.fc(x) * scale, fc=nn.Linear(3, 3))
    for example in ({"x": X, "scale": torch.ones(1)}, ((X,), {"scale": torch.ones(1)})):
        assert rows(record(model, example)) == [("fc", "Linear", (0,)), ("mul", "mul", (2, 1))]


def test_dict_and_tuple_outputs_of_modules_and_of_the_model() -> None:
    class Twins(nn.Identity):
        def forward(self, x: Tensor) -> Any:
            return {"a": x + 1, "b": (x + 2, [x + 3])}

    def forward(m: Any, x: Tensor) -> Any:
        out = m.twins(x)
        return {"first": m.fc(out["b"][0]), "rest": (out["a"], [out["b"][1][0], x])}

    graph = recorded(forward, X, twins=Twins(), fc=nn.Linear(3, 3))
    assert rows(graph) == [("twins", "Twins", (0,)), ("fc", "Linear", (1,))]
    assert graph.outputs == (2, 1, 1, 0)


def test_an_output_that_no_call_made_is_from_outside() -> None:
    kept = torch.ones(1)
    assert recorded(lambda m, x: (x, kept), X).outputs == (0, OUTSIDE)


class Keeping(nn.Identity):
    """Makes tensors that no call returns."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept = [input * factor for factor in range(20)]
        return input + 1


def test_a_tensor_that_is_gone_does_not_lend_its_place_to_another() -> None:
    """Python gives the id of a freed object to a later one of its size."""

    def forward(m: Any, x: Tensor) -> Any:
        for _ in range(20):
            m.fc(x)  # freed at once
        m.keeping(x)
        return [m.head(kept) for kept in m.keeping.kept]

    layers = {"fc": nn.Linear(3, 3), "keeping": Keeping(), "head": nn.Linear(3, 3)}
    heads = recorded(forward, X, **layers).calls("head")
    assert [head.reads for head in heads] == [(OUTSIDE,)] * 20


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)], ids=str)
def test_dims_are_those_of_the_first_tensor(shape: tuple[int, ...]) -> None:
    graph = record(nn.Sequential(nn.Linear(3, 3)), torch.ones(shape))
    assert graph.nodes[1].dims == len(shape)


def test_names_are_those_of_the_model_also_where_a_submodule_is_entered() -> None:
    model = nn.Sequential(nn.Linear(9, 9), Block())
    entry = model[1]
    graph = record(model, torch.ones(1, 3, 4), entry=entry)
    assert rows(graph) == [("1.conv", "Conv1d", (0,)), ("1.add", "add", (1, 0)), ("1.relu", "relu", (2,))]


def test_modules_outside_the_model_are_no_nodes() -> None:
    stranger = nn.Linear(3, 3)
    graph = recorded(lambda m, x: m.fc(stranger(x)), X, fc=nn.Linear(3, 3))
    assert ("fc", "Linear") in [row[:2] for row in rows(graph)]
    assert "Linear" not in [row[1] for row in rows(graph) if row[0] != "fc"]


def test_control_flow_takes_the_branch_of_the_example_in_eval_mode() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        if m.training:
            return m.a(x)
        return m.a(x) if x.sum() > 100 else m.b(x)

    model = Calls(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3)).train()
    assert [name for name, op, _ in rows(record(model, X)) if op == "Linear"] == ["b"]
    assert [name for name, op, _ in rows(record(model, X * 100)) if op == "Linear"] == ["a"]


def test_a_transformer_layer_shows_its_linear_layers() -> None:
    """Its fused eval kernel would run the whole layer without calling them."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    names = [node.name for node in record(model, torch.ones(1, 5, 8)).nodes]
    assert names.index("0.linear1") < names.index("0.linear2")
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failure_that_the_forward_handles_does_not_blind_the_rest() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        try:
            y = m.wide(x)
        except RuntimeError:
            y = m.fc(x)
        return y + 1

    graph = recorded(forward, X, wide=nn.Linear(7, 3), fc=nn.Linear(3, 3))
    assert [row[:2] for row in rows(graph)] == [("fc", "Linear"), ("add", "add")]


# -- questions to a graph ---------------------------------------------------------------------------------------------


def branches() -> Graph:
    """0 input, 1 a, 2 relu, 3 b, 4 c, 5 add, 6 unused."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.relu(m.a(x))
        out = m.b(y) + m.c(y)
        m.unused(x)
        return out

    layers = {name: nn.Linear(3, 3) for name in ("a", "b", "c", "unused")}
    return recorded(forward, X, relu=nn.ReLU(), **layers)


@pytest.mark.parametrize(
    ("index", "names"), [(0, ["a", "unused"]), (1, ["relu"]), (2, ["b", "c"]), (3, ["add"]), (5, []), (6, [])]
)
def test_readers(index: int, names: list[str]) -> None:
    assert [node.name for node in branches().readers(index)] == names


def test_a_reader_that_reads_twice_is_one_reader() -> None:
    graph = recorded(lambda m, x: m.fc(x) + 0, X, fc=nn.Linear(3, 3))
    assert len(graph.readers(1)) == 1
    assert len(recorded(lambda m, x: torch.add(x, x), X).readers(0)) == 1


@pytest.mark.parametrize(("index", "after"), [(0, {1, 2, 3, 4, 5, 6}), (1, {2, 3, 4, 5}), (3, {5}), (4, {5}), (5, set())])
def test_downstream(index: int, after: set[int]) -> None:
    assert branches().downstream(index) == after


PASSING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "max pool": lambda m, y: m.pool(y),
    "F.max_pool1d": lambda m, y: F.max_pool1d(y, 2),
    "dropout": lambda m, y: m.dropout(y),
    "F.dropout in eval": lambda m, y: F.dropout(y, 0.5, m.training),
    "identity": lambda m, y: m.identity(y),
    "flatten": lambda m, y: m.flatten(y),
    "a chain": lambda m, y: torch.flatten(m.dropout(m.pool(y)), 1).unsqueeze(0).transpose(0, 1),
    "permute": lambda m, y: y.permute(0, 2, 1).contiguous(),
    "view": lambda m, y: y.view(y.shape[0], -1).detach().clone(),
}
MAKING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda m, y: F.relu(y),
    "mean": lambda m, y: y.mean(-1),
    "average pool": lambda m, y: F.avg_pool1d(y, 2),
    "add": lambda m, y: y + 1,
    "F.dropout left on": lambda m, y: F.dropout(y, 0.5),
    "an identity that is none": lambda m, y: m.scaling(y),
    "a flatten that is none": lambda m, y: m.doubling(y),
}


class Scaling(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input * 3


class Doubling(nn.Flatten):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def origin_after(function: Callable[[Any, Tensor], Tensor]) -> int:
    """The origin of what `function` makes from the output of a convolution, node 1."""
    layers = {
        "conv": nn.Conv1d(3, 4, 1),
        "pool": nn.MaxPool1d(2),
        "dropout": nn.Dropout(),
        "identity": nn.Identity(),
        "flatten": nn.Flatten(),
        "scaling": Scaling(),
        "doubling": Doubling(),
    }
    graph = recorded(lambda m, x: function(m, m.conv(x)), torch.ones(1, 3, 6), **layers)
    return graph.origin(graph.outputs[0])


@pytest.mark.parametrize("name", PASSING)
def test_the_origin_lies_before_what_only_moves_values(name: str) -> None:
    assert origin_after(PASSING[name]) == 1


@pytest.mark.parametrize("name", MAKING)
def test_what_makes_new_values_is_its_own_origin(name: str) -> None:
    assert origin_after(MAKING[name]) > 1


def test_the_origin_of_an_outside_tensor() -> None:
    graph = recorded(lambda m, x: torch.flatten(x), X)
    assert graph.nodes[-1].passing
    assert graph.origin(OUTSIDE) == OUTSIDE
    assert graph.origin(0) == 0


# -- the model is as it was -------------------------------------------------------------------------------------------


def fails(m: Any, x: Tensor) -> Tensor:
    m.bn(x)
    m.count.add_(1)
    raise RuntimeError("no further")


def counts(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    y = m.bn(x)
    return F.batch_norm(y, m.bn.running_mean, m.bn.running_var, training=True) + torch.rand_like(y)


def counting(function: Callable[..., Any]) -> Any:
    model: Any = Calls(function, bn=nn.BatchNorm1d(3), drop=nn.Dropout())
    model.register_buffer("count", torch.zeros((), dtype=torch.long))
    model.drop.eval()
    return model


def run(model: Any) -> None:
    """Record `model`, whose forward raises if it is `fails`."""
    raises = pytest.raises(RuntimeError, match="no further") if model.function is fails else contextlib.nullcontext()
    with raises:
        record(model, X)


BOTH = pytest.mark.parametrize("function", [counts, fails], ids=["finished", "raised"])


@BOTH
def test_training_flags_stay_mixed(function: Callable[..., Any]) -> None:
    model = counting(function).train()
    model.drop.eval()
    run(model)
    assert {name: module.training for name, module in model.named_modules()} == {"": True, "bn": True, "drop": False}


@BOTH
def test_buffers_stay(function: Callable[..., Any]) -> None:
    model = counting(function)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    run(model)
    after = dict(model.named_buffers())
    assert list(after) == list(before)
    for name, (buffer, value) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer, value)


def test_a_buffer_that_the_forward_replaces_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count = m.count + 1
        return x * 2

    model = counting(forward)
    count = model.count
    record(model, X)
    assert model.count is count
    assert int(model.count) == 0


@BOTH
def test_the_random_state_stays(function: Callable[..., Any]) -> None:
    before = torch.get_rng_state()
    run(counting(function))
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_user_hooks_do_not_fire_and_are_still_there(function: Callable[..., Any]) -> None:
    fired: list[str] = []
    model = counting(function)
    model.bn.register_forward_hook(lambda *_: fired.append("after"))
    model.bn.register_forward_pre_hook(lambda *_: fired.append("before"))
    model.register_forward_hook(lambda *_, **__: fired.append("kwargs"), with_kwargs=True, always_call=True)
    model.bn.register_full_backward_hook(lambda *_: fired.append("backward"))
    run(model)
    assert fired == []
    model.bn(X)
    assert fired == ["before", "after"]
    assert len(model._forward_hooks) == 1


@BOTH
def test_nothing_of_ours_watches_later_calls(function: Callable[..., Any]) -> None:
    run(counting(function))
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks_always_called
    assert _get_current_function_mode() is None
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_made_by_the_user_do_not_hide_calls() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain = record(model, X)
    model[0].register_full_backward_hook(lambda *_: None)
    model[0].register_full_backward_pre_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None)
    assert record(model, X) == plain


def test_the_example_is_not_written_to() -> None:
    example = -torch.ones(2, 3)
    graph = record(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), example)
    assert torch.equal(example, -torch.ones(2, 3))
    assert rows(graph) == [("0", "ReLU", (0,)), ("1", "Linear", (1,))]


def test_parameters_collect_no_gradient_and_eval_leaves_no_graph() -> None:
    made: list[Tensor] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        made.append(m.fc(x))
        return made[0]

    model = Calls(forward, fc=nn.Linear(3, 3))
    record(model, X)
    assert made[0].grad_fn is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -- nested values ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


def test_tensors_in_nested_values_in_order() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert list(tensors_in({"x": [a, 3], "y": (None, {"z": b}), "w": c})) == [a, b, c]
    assert list(tensors_in("text")) == []


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        (1, (1,), {}),
        ((1, 2), (1, 2), {}),
        ([1, 2], ([1, 2],), {}),
        ({"x": 1}, (), {"x": 1}),
        (((1, 2), {"x": 3}), (1, 2), {"x": 3}),
        (((), {"x": 3}), (), {"x": 3}),
        ((1, {"x": 3}), (1, {"x": 3}), {}),
    ],
    ids=str,
)
def test_split_example(example: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert split_example(example) == (args, kwargs)


def test_moved_keeps_the_structure() -> None:
    value: dict[str, Any] = {"a": [torch.ones(1), 3], "b": Pair(torch.ones(2), "text"), "c": (torch.ones(3),)}
    there = moved(value, "meta")
    assert [t.device.type for t in tensors_in(there)] == ["meta"] * 3
    assert isinstance(there["b"], Pair)
    assert (there["a"][1], there["b"].right) == (3, "text")
    assert isinstance(there["c"], tuple)
    assert value["a"][0].device.type == "cpu"
