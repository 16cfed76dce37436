# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that no net is silently wrong: random small graphs, fused, bypassed and quantized, against their plain twins.

A graph is Python source (`Graph.source`), so that operators stand at places of their own and a failure prints as a class.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quant import fuse_model
from lightning_quant.config import ConfigError
from lightning_quant.convert import convert_model
from lightning_quant.layers import Plan
from lightning_quant.plan import make_plan
from lightning_quant.prepare import prepare_model, restore_model, simulated
from lightning_quant.symbolic import trace

Shape = tuple[int, ...]  # without the batch
BATCH = 12
DIMS = {4: 3, 3: 2, 2: 1}
MODULES: tuple[str, ...] = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.ReLU6()",
    "nn.ReLU6(inplace=True)",
    "nn.Hardtanh(-0.8, 1.2)",
    "nn.SiLU()",
)
MODULES += ("nn.LeakyReLU(0.2)", "nn.LeakyReLU(0.2, inplace=True)", "nn.Sigmoid()", "nn.PReLU()", "nn.GELU()", "nn.Identity()")
MODULES += ("nn.Dropout(0.0)",)
FUNCTIONS: tuple[str, ...] = (
    "F.relu({0})",
    "torch.relu({0})",
    "{0}.relu()",
    "F.relu6({0})",
    "F.hardtanh({0}, -0.8, 1.2)",
    "F.silu({0})",
)
FUNCTIONS += ("F.leaky_relu({0}, 0.2)", "torch.sigmoid({0})", "{0}.tanh()", "F.dropout({0}, 0.0, self.training)", "{0}.relu_()")
FUNCTIONS += ("F.relu({0}, inplace=True)", "F.leaky_relu({0}, 0.2, True)", "{0}.clamp(-1, 1)", "{0} * 0.5", "1.0 - {0}")
FUNCTIONS += ("{0}.contiguous()", "{0} + 0.25")


@dataclass
class Part:
    """A module of a class that is being written: how it is made, and what it makes of a shape (None: it does not take it)."""

    name: str
    made: str
    takes: Callable[[Shape], Shape | None]


@dataclass
class Graph:
    """A random class and the classes it is made of."""

    name: str
    shape: Shape
    parts: list[Part] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)  # further lines of __init__
    lines: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    inner: list[Graph] = field(default_factory=list)
    result: str = "x"

    @property
    def source(self) -> str:
        """The classes, innermost first."""
        init = [f"self.{part.name} = {part.made}" for part in self.parts] + self.extra
        own = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        own += [f"        {line}" for line in init]
        own += ["", "    def forward(self, x):", *(f"        {line}" for line in self.lines), f"        return {self.result}", ""]
        return "\n".join([*(one.source for one in self.inner), *own])


class Writer:
    """Writes a forward, statement by statement."""

    def __init__(self, pick: Callable[..., Any], graph: Graph, depth: int) -> None:
        self.pick, self.graph, self.depth = pick, graph, depth
        graph.shapes["x"] = graph.shape

    def chance(self, one_in: int) -> bool:
        """Whether something rare happens."""
        return bool(self.pick(range(one_in)) == one_in - 1)

    def step(self) -> None:
        """One more statement, on one of the last tensors."""
        names = list(self.graph.shapes)
        name = names[-1] if not self.chance(3) else self.pick(names)
        kinds = ["layer"] * 6 + ["norm"] * 4 + ["act"] * 6 + ["join"] * 4 + ["pool", "again", "again", "block", "odd", "odd"]
        getattr(self, "_" + self.pick(kinds))(name, self.graph.shapes[name])

    def _new(self, text: str, shape: Shape) -> str:
        name = f"t{len(self.graph.lines)}"
        self.graph.lines.append(f"{name} = {text}")
        self.graph.shapes[name] = shape
        return name

    def _part(self, made: str, takes: Callable[[Shape], Shape | None]) -> Part:
        part = Part(f"m{len(self.graph.parts)}", made, takes)
        self.graph.parts.append(part)
        return part

    def _call(self, part: Part, name: str, shape: Shape) -> None:
        made = part.takes(shape)
        if made is not None and all(0 < size <= 24 for size in made):
            self._new(f"self.{part.name}({name})", made)

    def _layer(self, name: str, shape: Shape) -> None:
        out = self.pick([4, 4, 6])
        bias = self.pick([True, False])
        if len(shape) == 1 or (len(shape) == 2 and self.chance(4)):
            size = shape[-1]
            part = self._part(
                f"nn.Linear({size}, {out}, bias={bias})", lambda s: (*s[:-1], out) if s[-1] == size and len(s) < 3 else None
            )
            return self._call(part, name, shape)
        dims, channels = len(shape) - 1, shape[0]
        groups = self.pick([1, 1, 1, 2]) if channels % 2 == 0 else 1
        if self.chance(5):
            made = f"nn.ConvTranspose{dims}d({channels}, {out}, 2, 2, groups={groups}, bias={bias})"
            part = self._part(
                made, lambda s: (out, *(2 * n for n in s[1:])) if s[0] == channels and len(s) == dims + 1 and s[1] < 7 else None
            )
            return self._call(part, name, shape)
        kernel, padding, stride = self.pick([1, 3, 3]), self.pick([0, 1]), self.pick([1, 1, 2])
        mode = self.pick(["zeros"] * 5 + ["circular"])
        made = (
            f"nn.Conv{dims}d({channels}, {out}, {kernel}, {stride}, {padding}, groups={groups}, bias={bias}, "
            f"padding_mode={mode!r})"
        )

        def takes(s: Shape) -> Shape | None:
            sizes = tuple((n + 2 * padding - kernel) // stride + 1 for n in s[1:])
            fits = s[0] == channels and len(s) == dims + 1 and min(sizes, default=0) > 0
            return (out, *sizes) if fits else None

        self._call(self._part(made, takes), name, shape)
        return None

    def _norm(self, name: str, shape: Shape) -> None:
        options = self.pick([""] * 8 + [", affine=False", ", track_running_stats=False", ", momentum=None"])
        channels, dims = shape[0], len(shape)
        part = self._part(
            f"nn.BatchNorm{2 if dims == 3 else 1}d({channels}{options})",
            lambda s: s if s[0] == channels and (len(s) == 3) == (dims == 3) else None,
        )
        self._call(part, name, shape)

    def _act(self, name: str, shape: Shape) -> None:
        if self.chance(2):
            part = self._part(self.pick(MODULES), lambda s: s)
            if self.chance(8):  # whatever it returns is dropped
                self.graph.lines.append(f"self.{part.name}({name})")
            else:
                self._call(part, name, shape)
        else:
            self._new(self.pick(FUNCTIONS).format(name), shape)

    def _join(self, name: str, shape: Shape) -> None:
        alike = [other for other, one in self.graph.shapes.items() if one == shape]
        other = self.pick(alike)
        how = self.pick(["{0} + {1}"] * 3 + ["torch.add({0}, {1})", "{0} * {1}", "{0} - {1}", "cat", "cat", "+="])
        if how == "+=":
            self.graph.lines.append(f"{name} += {other}")
        elif how == "cat":
            one = self._new(f"torch.cat([{name}, {other}], 1)", (2 * shape[0], *shape[1:]))
            if self.graph.shapes[one][0] > 24:
                self._new(f"{one}[:, :4]", (4, *shape[1:]))
        else:
            self._new(how.format(name, other), shape)

    def _pool(self, name: str, shape: Shape) -> None:
        d = len(shape) - 1
        if d == 0:
            return
        half = (shape[0], *(n // 2 for n in shape[1:]))
        ways = [(f"F.max_pool{d}d({name}, 2)", half), (f"F.avg_pool{d}d({name}, 2)", half)] if min(shape[1:]) > 1 else []
        ways += [(f"F.adaptive_avg_pool{d}d({name}, 1)", (shape[0], *[1] * d))]
        ways += [(f"{name}.mean({(2, 3)[:d]})", shape[:1]), (f"{name}.mean({(2, 3)[:d]})", shape[:1])]
        if shape[0] * shape[1] <= 24 and (d == 1 or shape[2] == 1):
            ways += [(f"{name}.flatten(1)", (shape[0] * shape[1],))] * 2
        self._new(*self.pick(ways))

    def _again(self, name: str, shape: Shape) -> None:
        fitting = [part for part in self.graph.parts if part.takes(shape) is not None]
        if fitting:
            self._call(self.pick(fitting), name, shape)

    def _block(self, name: str, shape: Shape) -> None:
        if self.depth == 0:
            return
        inner = written(self.pick, f"{self.graph.name}B{len(self.graph.inner)}", shape, self.depth - 1, self.pick(range(1, 5)))
        inner.result = list(inner.shapes)[-1]
        self.graph.inner.append(inner)
        made = inner.shapes[inner.result]
        part = self._part(f"{inner.name}()", lambda s: made if s == shape else None)
        self._call(part, name, shape)

    def _odd(self, name: str, shape: Shape) -> None:
        """What goes wrong elsewhere: training alone, weights read past their module, tied weights."""
        way = self.pick(["train", "weight", "tied", "sequential", "alias"])
        linear = [part for part in self.graph.parts if part.made.startswith(f"nn.Linear({shape[-1]},") and len(shape) < 3]
        plain = [part for part in self.graph.parts if part.made.startswith("nn.Conv") and "Transpose" not in part.made]
        if way == "train":
            self.graph.lines.append(f"{name} = {name} * 1.25 if self.training else {name}")
        elif way == "weight" and linear:
            part = self.pick(linear)
            made = part.takes(shape)
            assert made is not None
            self._new(f"F.linear({name}, self.{part.name}.weight)", made)
        elif way == "tied" and linear + plain:
            part = self.pick(linear + plain)
            twin = self._part(part.made, part.takes)
            self.graph.extra.append(f"self.{twin.name}.weight = self.{part.name}.weight")
            self._call(twin, name, shape)
        elif way == "sequential" and len(shape) == 3:
            relu = self.pick(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Hardtanh()"])
            made_of = f"nn.Sequential(nn.Conv2d({shape[0]}, 4, 3, padding=1), nn.BatchNorm2d(4), {relu})"
            c = shape[0]
            self._call(self._part(made_of, lambda s: (4, *s[1:]) if len(s) == 3 and s[0] == c else None), name, shape)
        elif way == "alias" and self.graph.parts:
            part = self.pick(self.graph.parts)
            alias = Part(f"a{len(self.graph.extra)}", "", part.takes)
            self.graph.extra.append(f"self.{alias.name} = self.{part.name}")
            self._call(alias, name, shape)


def written(pick: Callable[..., Any], name: str, shape: Shape, depth: int, steps: int) -> Graph:
    """A class of so many statements."""
    graph = Graph(name, shape)
    writer = Writer(pick, graph, depth)
    while depth and not graph.parts:
        writer._layer("x", shape)
    for _ in range(steps):
        writer.step()
    return graph


def a_graph(pick: Callable[..., Any]) -> Graph:
    """A net: it begins with a layer, and returns its last tensor and perhaps an inner one or two."""
    shape = pick([(4, 6, 6), (4, 6, 6), (4, 7), (4, 4), (6,)])
    graph = written(pick, "Net", shape, 1, pick(range(3, 10)))
    last = list(graph.shapes)[-1]
    graph.result = last if pick(range(3)) else f"({last}, {pick(list(graph.shapes))})"
    return graph


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, Shape]:
    """(source, shape of the input)."""
    graph = a_graph(lambda options: draw(st.sampled_from(list(options))))
    return graph.source, graph.shape


def built(source: str, dtype: torch.dtype) -> nn.Module:
    """The net of a source, with numbers that a trained one might have: statistics, and gammas that are negative or zero."""
    space: dict[str, Any] = {"__name__": "random_graph", "torch": torch, "nn": nn, "F": nn.functional}
    exec(compile(source, "random_graph", "exec"), space)
    torch.manual_seed(1)
    net: nn.Module = space["Net"]()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.4, 2.0)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5).mul_(torch.randn(module.num_features).sign())
                    module.weight[0] *= float(torch.rand(()) < 0.5)
                    module.bias.normal_(0, 0.3)
    return net.to(dtype)


def tensors(result: Any) -> list[Tensor]:
    """What a net returned."""
    return list(result) if isinstance(result, tuple) else [result]


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What a net makes of a copy of x, in inference."""
    with torch.no_grad():
        return [one.clone() for one in tensors(net(x.clone()))]


def train_step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What a net makes of a copy of x, after a step of SGD."""
    net.zero_grad()
    made = tensors(net(x.clone()))
    loss = sum((one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view_as(one) + 0.1 * one * one).mean() for one in made)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad.clamp(-1, 1))
    return [one.detach().clone() for one in made]


def equal(ours: Iterable[Tensor], theirs: Iterable[Tensor], source: str, bound: float = 1e-5) -> None:
    """Assert that tensors differ by no more than `bound`, relative to the largest number."""
    for mine, other in zip(ours, theirs, strict=True):
        error, size = (mine.double() - other.double()).abs().max(), other.double().abs().max()
        assert error <= bound * size + 1e-9, f"{float(error)} of {float(size)}\n{source}"


def state(net: nn.Module) -> list[Tensor]:
    """Parameters, running statistics and counters."""
    return list(net.state_dict().values())


def works(source: str, x: Tensor) -> bool:
    """Whether the plain net itself trains and evaluates: in-place operators may forbid its own backward."""
    net = built(source, x.dtype)
    try:
        for _ in range(3):
            if not all(bool(one.isfinite().all()) and float(one.abs().max()) < 1e4 for one in train_step(net.train(), x)):
                return False
        return all(bool(one.isfinite().all()) for one in outputs(net.eval(), x))
    except (RuntimeError, ValueError):  # ValueError: batch statistics of one value
        return False


def inputs_of(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Three batches."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def notice(net: nn.Module) -> list[Any]:
    """Classes, attributes and names."""
    return [(name, type(m), list(m.__dict__), list(m._modules), list(m._parameters)) for name, m in net.named_modules()]


def quietly(check: Callable[[str, Shape], None]) -> Callable[[str, Shape], None]:
    """A check without the warning that an operator of a training-only branch stays float."""

    def checked(source: str, shape: Shape) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*where the recorded forward did not; there it stays float.*")
            check(source, shape)

    return checked


def check_fused(source: str, shape: Shape) -> None:
    """`fuse_model` in eval and in train mode equals the net, statistics and all, recorded and traced."""
    batches = inputs_of(shape, torch.float64)
    plain = built(source, torch.float64).eval()
    wanted = outputs(plain, batches[0])
    for example in (batches[0], None):
        if example is None and isinstance(trace(plain), str):
            continue
        fused = fuse_model(plain, example_input=example)
        equal(outputs(fused, batches[0]), wanted, source)
        equal(outputs(plain, batches[0]), wanted, source, bound=0)  # a copy was fused
        twin, training = copy.deepcopy(plain).train(), fuse_model(copy.deepcopy(plain).train(), example_input=example)
        for x in batches:
            equal(train_step(training, x), train_step(twin, x), source)
        equal(state(training), state(twin), source)
        assert list(training.state_dict()) == list(twin.state_dict())
        equal(outputs(training.eval(), batches[1]), outputs(twin.eval(), batches[1]), source)
        final = fuse_model(training, example_input=example)
        equal(outputs(final, batches[1]), outputs(twin, batches[1]), source)


REASONS: tuple[str, ...] = ("works in place and its input is used afterwards", "can be quantized", "left no target to quantize")
REASONS += (
    "which therefore cannot be quantized",
    "the model has no layer that this preset quantizes",
    "selects no module",
    "is called in the recorded forward",
)


def planned(net: nn.Module, config: Any, x: Tensor, source: str) -> Plan | None:
    """The plan, or None where it is refused for a reason that a random graph may give."""
    try:
        return make_plan(net, config, example_input=x)
    except ConfigError as error:
        lines = str(error).splitlines()
        strange = [line for line in lines if "problems:" not in line and not any(reason in line for reason in REASONS)]
    assert not strange, "\n".join([*strange, source])
    return None


@quietly
def check_bypassed(source: str, shape: Shape) -> None:
    """Everything selected, fused and caught, nothing rounded: equals the net in train and eval; `restore_model` undoes it."""
    batches = inputs_of(shape, torch.float64)
    plain = built(source, torch.float64)
    net = copy.deepcopy(plain)
    before = notice(net)
    entry = {"op_names_re": [".*"], "apply_method": "bypass", "high_precision_output": False}
    plan = planned(net, [entry], batches[0], source)
    if plan is None:
        return
    prepare_model(net, plan)
    for x in batches:
        equal(train_step(net.train(), x), train_step(plain.train(), x), source)
    equal(state(net), state(plain), source)
    equal(outputs(net.eval(), batches[0]), outputs(plain.eval(), batches[0]), source)
    equal(outputs(restore_model(net), batches[0]), outputs(plain, batches[0]), source, bound=1e-12)
    assert notice(net) == before, source


@quietly
def check_quantized(source: str, shape: Shape) -> None:
    """Quantized: trains, is near the float net, deploys bit for bit, and is restored."""
    batches = inputs_of(shape, torch.float32)
    plain = built(source, torch.float32)
    fine = {"op_names_re": [".*"], "quant_dtype": "int16", "observer": "minmax"}
    for config, bound in (("int8", 0.35), (fine, 0.15)):
        net, twin, hard = copy.deepcopy(plain).train(), copy.deepcopy(plain).train(), False
        before = notice(net)
        plan = planned(net, config, batches[0], source)
        if plan is None:
            return
        prepare_model(net, plan)
        with torch.no_grad():
            net(batches[0].clone())
            for mine, other in zip(tensors(net(batches[0].clone())), tensors(twin(batches[0].clone())), strict=True):
                error = float((mine - other).norm() / (other.norm() + 0.05 * mine.numel() ** 0.5))  # it may be zero
                # One moving average over unlike tensors; a batch norm, which scales up a small signal with its rounding errors.
                hard = config == "int8" and ("one range for all" in str(plan) or "BatchNorm" in source)
                assert error < bound or hard, f"{config}: {error}\n{plan}\n{source}"
        for x in batches[:2]:
            assert all(one.isfinite().all() for one in train_step(net, x)), source
        ours = outputs(net.eval(), batches[0])  # before conversion: a branch of training alone does not count then
        equal(outputs(convert_model(net), batches[0]), ours, source, bound=0)
        with simulated(net):
            equal(outputs(net, batches[0]), ours, source, bound=2.0 if hard else bound)
        twin.load_state_dict(net.state_dict())
        equal(outputs(restore_model(net), batches[0]), outputs(twin.eval(), batches[0]), source, bound=0)
        assert notice(net) == before, source


EXAMPLES = settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@EXAMPLES
@given(graph=graphs())
def test_random_graphs_fuse_right(graph: tuple[str, Shape]) -> None:
    assume(works(graph[0], inputs_of(graph[1], torch.float64)[0]))
    check_fused(*graph)


@EXAMPLES
@given(graph=graphs())
def test_random_graphs_bypassed_equal_themselves(graph: tuple[str, Shape]) -> None:
    assume(works(graph[0], inputs_of(graph[1], torch.float64)[0]))
    check_bypassed(*graph)


@pytest.mark.slow
@EXAMPLES
@given(graph=graphs())
def test_random_graphs_quantized_are_near_and_deploy_bit_for_bit(graph: tuple[str, Shape]) -> None:
    assume(works(graph[0], inputs_of(graph[1], torch.float64)[0]))
    check_quantized(*graph)


# -- what random graphs have found ----------------------------------------------------------------------------------------

HEAD = """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.idle, self.act = nn.Identity(), nn.SiLU()
        {init}
    def forward(self, x):
        return {result}
"""


@pytest.mark.parametrize(
    ("init", "result"),
    [
        ("self.b.weight = self.a.weight", "self.b(self.bn(self.a(x)))"),  # tied: folding one must not change the other
        ("self.a.bias = self.b.bias", "self.b(self.bn(self.a(x)))"),
        ("pass", "self.bn(self.a(x)) + F.conv2d(x, self.a.weight)"),  # read past its module
        ("pass", "self.bn(x)"),  # no layer is called
        ("pass", "self.act(self.idle(self.a(x)))"),  # an identity inside a group has no range of its own
        ("self.idle = nn.Dropout(0.0)", "self.bn(self.idle(self.a(x)))"),
        ("pass", "(h := self.a(x), h.add_(1.0).relu_(), self.b(h))[2]"),  # written over twice, read by its first name
        ("pass", "(h := x + x, F.relu_(h.add_(h)), self.b(h))[2]"),
        ("pass", "self.act(self.act(self.b(self.a(x))))"),  # a shared activation on its own result
    ],
)
@pytest.mark.parametrize("check", [check_fused, check_bypassed, check_quantized])
def test_found_by_random_graphs(check: Callable[[str, Shape], None], init: str, result: str) -> None:
    check(HEAD.format(init=init, result=result), (4, 5, 5))


def test_a_named_identity_inside_a_group_keeps_its_range_and_ends_the_group() -> None:
    net = built(HEAD.format(init="pass", result="self.act(self.idle(self.a(x)))"), torch.float32)
    plan = make_plan(net, {"op_names": ["a", "idle"]}, example_input=torch.randn(2, 4, 5, 5))
    assert [(layer.name, layer.fused_with) for layer in plan.layers] == [("a", ()), ("idle", ())]
    assert any("'idle' is quantized or fused elsewhere" in note for note in plan.layers[0].notes)
