# SPDX-License-Identifier: Apache-2.0
"""Owns the promise that any config whatever is a plan that can be carried out or a `ConfigError`, and never touches the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import fingerprint

from lightning_quant.config import PRESETS, ConfigError
from lightning_quant.keys import APPLY_METHODS, ENTRY, GRANULARITIES, METHODS, OBSERVERS, SCHEMES
from lightning_quant.layers import Plan
from lightning_quant.plan import make_plan
from lightning_quant.prepare import prepare_model, prepared_groups, restore_model


class Mix(nn.Module):
    """Two inputs, one of them with a default, and a matrix of its own; no setting is registered for it."""

    def __init__(self) -> None:
        super().__init__()
        self.p1 = nn.Parameter(torch.randn(4, 4))

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return a @ self.p1 + (a if b is None else b)


class Small(nn.Module):
    """A fusible group, a table, a recurrent layer, a module of the user's own, a container and an activation with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.embed = nn.Embedding(5, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.mix = Mix()
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.ReLU6())
        self.act = nn.Sigmoid()
        self.alias = self.act
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x))).mean((2, 3))
        states, _ = self.lstm(self.embed(tokens))
        x = self.act(self.mix(x, b=states[:, -1]))
        out: Tensor = self.fc(self.alias(self.seq(x) + x))
        return out


torch.manual_seed(0)
MODEL = Small()
EXAMPLE = (torch.randn(2, 3, 4, 4), torch.tensor([[0, 1, 2], [3, 4, 0]]))


# -- a grammar of configs: right, nearly right, and anything at all --------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("weight"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ACTIVATIONS = ["_input_", "_output_", "_input_0", "_output_0"]
TARGETS: dict[str, list[str]] = {
    "conv": [*ACTIVATIONS, "weight", "weight", "_input_input", "w*"],
    "bn": [*ACTIVATIONS, "weight", "bias", "*"],
    "relu": [*ACTIVATIONS, "_input_input"],
    "embed": ["weight", "weight", "_output_"],
    "lstm": ["weight_*", "*", "weight_ih_l0", "bias_hh_l0", "_input_", "_output_"],
    "mix": [*ACTIVATIONS, "p1", "p1", "_input_1", "_input_b", "_input_a", "p?"],
    "seq": [*ACTIVATIONS, "0.weight", "0.*"],
    "seq.0": [*ACTIVATIONS, "weight", "bias", "*"],
    "seq.1": [*ACTIVATIONS],
    "act": [*ACTIVATIONS],
    "alias": [*ACTIVATIONS],
    "fc": [*ACTIVATIONS, "weight", "bias"],
    "mean": [*ACTIVATIONS, "_input_1"],
    "add": [*ACTIVATIONS, "_input_1", "_input_2"],
    "mix.matmul": [*ACTIVATIONS, "_input_1"],
}
# Of types with a setting; the last three are operators.
BARE = ["conv", "bn", "relu", "embed", "lstm", "seq.0", "seq.1", "act", "alias", "fc", "mean", "add", "mix.matmul"]
KNOWN_TYPES = [
    "Conv2d",
    "Linear",
    "BatchNorm2d",
    "ReLU",
    "ReLU6",
    "Hardtanh",
    "Embedding",
    "LSTM",
    "Sigmoid",
    "torch.nn.Conv2d",
    "add",
]
KNOWN_TYPES += ["mean", "matmul"]
WRONG_TYPES = ["Conv3d", "conv2d", "Mix", "Sequential", "Module", "RNNBase", "Small", "cat", "torch.", ""]
PATTERNS = ["", ".*", "conv|fc", "seq.*", "a", ".*x$", "(?i)CONV", "[a-f]+$"]
WRONG_PATTERNS = ["zzz", "(", "*", r"\d", "(?a)(?u)c"]
WRONG_NAMES = ["", "conv9", "seq.", "fc.weight", "c.*", "ALIAS", "add_1", "getitem"]
WRONG_TARGETS = ["_output_1", "_output_x", "_input_2", "_input_x", "1", "wieght", "", "running_mean"]
GROUPS: dict[str, list[Any]] = {
    "conv": [("conv", "bn", "relu"), ["conv", "bn"], ("conv", "relu"), ("conv", "bn", "seq.1")],
    "seq.0": [("seq.0", "seq.1"), ["seq.0", "relu"], ("seq.0", "seq.1", "add", "relu"), ("seq.0", "add")],
    "fc": [("fc", "act")],
}
SIZES = st.lists(st.sampled_from([-1, -1, -1, 1, 1, 2, 4, 3]), min_size=1, max_size=4)
BLOCKS = st.one_of(
    SIZES,
    st.tuples(SIZES, st.sampled_from(["front", "back"])).map(list),
    st.tuples(SIZES, st.just("back"), st.just(-1)).map(list),
    st.lists(st.sampled_from([-2, 0, 1, True, 0.5, "back", [1], [[1]]]), max_size=4),
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "quant_dtype": st.sampled_from([f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 8, 8, 8, 16)] * 3 + ["int1"]),
    "quant_scheme": st.sampled_from(SCHEMES),
    "granularity": st.sampled_from(GRANULARITIES) | BLOCKS,
    "apply_method": st.sampled_from(APPLY_METHODS),
    "observer": st.sampled_from(OBSERVERS),
    "method": st.sampled_from(METHODS),
}


def rarely(strange: st.SearchStrategy[Any], usual: st.SearchStrategy[Any], one_in: int = 30) -> st.SearchStrategy[Any]:
    """`usual`, but once in a while something strange."""
    return st.integers(1, one_in).flatmap(lambda n: strange if n == one_in else usual)


def some(*names: str) -> st.SearchStrategy[list[str]]:
    """One to three of these."""
    return st.lists(st.sampled_from(names), min_size=1, max_size=3)


MISSPELT = st.dictionaries(
    st.sampled_from(["op_name", "quant_dtyp", "fuse_name", "weight", "Granularity", ""]) | st.text(max_size=4), JUNK, max_size=1
)


@st.composite
def quantization(draw: st.DrawFn) -> dict[str, Any]:
    """Quantization keys of an entry or of a target."""
    chosen = draw(st.lists(st.sampled_from(list(VALUES)), unique=True, max_size=2))
    found = {key: draw(rarely(JUNK, VALUES[key])) for key in chosen}
    return {**found, **draw(rarely(MISSPELT, st.just({})))}


@st.composite
def sensible(draw: st.DrawFn) -> dict[str, Any]:
    """An entry for one module, with the targets that it has; or for several, with their own."""
    found: dict[str, Any] = draw(quantization())
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(TARGETS)))
        found["op_names"] = [name]
        if draw(st.integers(1, 3)) > 1:
            found["target_names"] = draw(some(*TARGETS[name]))
        if name not in BARE or draw(st.booleans()):
            found["target_settings"] = draw(
                st.dictionaries(st.sampled_from(TARGETS[name]), quantization(), min_size=1, max_size=2)
            )
        if name in GROUPS and draw(st.booleans()):
            found["fuse_names"] = [draw(st.sampled_from(GROUPS[name]))]
    else:
        kinds = {"op_names": some(*BARE), "op_types": some(*KNOWN_TYPES), "op_names_re": some(*PATTERNS)}
        key = draw(st.sampled_from(list(kinds)))
        found[key] = draw(kinds[key])
        if draw(st.booleans()):
            found["fuse_names"] = draw(st.sampled_from(["auto", "auto", [], [("conv", "bn", "relu")]]))
        if key != "op_names" and draw(st.booleans()):
            found["exclude_op_names"] = draw(some(*BARE))
    if draw(st.integers(1, 4)) == 4:
        found["high_precision_output"] = draw(st.sampled_from([True, False, None]))
    return found


@st.composite
def wild(draw: st.DrawFn) -> dict[str, Any]:
    """An entry of existing keys with values of the right kind, which seldom fit together."""
    strategies: dict[str, st.SearchStrategy[Any]] = {
        **{key: some(*BARE, *TARGETS, *WRONG_NAMES) for key in ("op_names", "exclude_op_names")},
        **{key: some(*PATTERNS, *PATTERNS, *WRONG_PATTERNS) for key in ("op_names_re", "exclude_op_names_re")},
        **{key: some(*KNOWN_TYPES, *WRONG_TYPES) for key in ("op_types", "exclude_op_types")},
        "target_names": some(*TARGETS["mix"], *TARGETS["lstm"], *WRONG_TARGETS),
        "target_settings": st.dictionaries(st.sampled_from(TARGETS["bn"] + WRONG_TARGETS), quantization(), max_size=3),
        "fuse_names": st.lists(
            st.sampled_from([group for groups in GROUPS.values() for group in groups]) | some(*BARE, *WRONG_NAMES), max_size=2
        ),
        "high_precision_output": st.sampled_from([True, False, None]),
    }
    assert {*strategies, *VALUES} == {*ENTRY}
    found = {key: draw(rarely(JUNK, strategies[key])) for key in draw(st.lists(st.sampled_from(list(strategies)), max_size=4))}
    return {**found, **draw(quantization())}


PRESET = st.sampled_from(list(PRESETS))
CONFIGS = st.one_of(
    *[st.lists(sensible(), min_size=1, max_size=3)] * 5,
    st.lists(sensible() | PRESET, min_size=1, max_size=3),
    st.lists(sensible() | wild(), min_size=1, max_size=2),
    st.lists(wild() | JUNK | PRESET, max_size=3),
    sensible() | PRESET | JUNK,
)


def planned(config: Any, example: Any) -> Plan | ConfigError:
    """What `make_plan` makes of a config; nothing else may come out of it."""
    try:
        return make_plan(MODEL, config, example_input=example)
    except ConfigError as error:
        return error


def carry_out(plan: Plan, seen: bool) -> None:
    """Attach the plan to a twin of the model, train a step, evaluate, take it off again."""
    twin = copy.deepcopy(MODEL)
    before = [(name, type(module), sorted(module.__dict__)) for name, module in twin.named_modules()]
    parameters = list(map(id, twin.parameters()))
    prepare_model(twin, plan)
    assert len(prepared_groups(twin)) == len(plan.layers)
    try:
        twin.train()(*EXAMPLE).sum().backward()
        with torch.no_grad():
            twin.eval()(*EXAMPLE)
    except ConfigError as error:  # the first batch shows what a recorded forward would have shown
        if seen or "granularity" not in str(error):
            raise
    restore_model(twin)
    assert [(name, type(module), sorted(module.__dict__)) for name, module in twin.named_modules()] == before
    assert list(map(id, twin.parameters())) == parameters
    assert all(map(torch.equal, twin.parameters(), MODEL.parameters()))


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=CONFIGS)
def test_any_config_is_a_plan_or_a_config_error(config: Any) -> None:
    before, written = fingerprint(MODEL), copy.deepcopy(config)
    for example in (None, EXAMPLE):
        found = planned(config, example)
        assert fingerprint(MODEL) == before
        assert config == written
        if isinstance(found, Plan):
            assert found.layers
            assert str(found).startswith("module")
            carry_out(found, example is not None)
            assert fingerprint(MODEL) == before
