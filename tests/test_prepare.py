# SPDX-License-Identifier: Apache-2.0
"""Owns guarantee G1: preparing changes nothing a user can name, and restoring undoes all of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_fusion import prepared, sgd_steps
from torch import nn
from toys import FUSED, Net

from lightning_quant import ConfigError, make_plan, prepare_model, restore_model
from lightning_quant.prepare import load_quantizer_state, prepared_groups, quantizer_state


def traces(net: nn.Module) -> tuple[object, ...]:
    """Everything of a model that a user's code could hold on to."""
    return (
        list(net.state_dict()),
        [id(p) for p in net.parameters()],
        [name for name, _ in net.named_parameters()],
        [id(b) for b in net.buffers()],
        [name for name, _ in net.named_modules()],
        [id(m) for m in net.modules()],
        [list(m._forward_hooks.values()) + list(m._forward_pre_hooks.values()) for m in net.modules()],
        [m.training for m in net.modules()],
    )


def test_prepare_changes_no_name_no_parameter_no_hook() -> None:
    net = Net().train()
    net.bn1.eval()
    net.conv1.register_forward_hook(lambda m, i, o: None)
    before = traces(net)
    plan = make_plan(net, FUSED, example_input=torch.randn(2, 3, 8, 8))
    assert traces(net) == before
    prepare_model(net, plan)
    assert traces(net) == before
    sgd_steps(net, 2)
    assert traces(net) == before
    restore_model(net)
    assert traces(net) == before


def test_float_checkpoints_load_both_ways_strictly() -> None:
    net, other = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)), Net()
    net.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(net.state_dict(), strict=True)


def test_restore_gives_the_float_model_with_the_trained_weights() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 3)
    twin = Net()
    twin.load_state_dict(net.state_dict())
    restore_model(net)
    x = torch.randn(4, 3, 8, 8)
    assert {type(m) for m in net.modules()} == {type(m) for m in twin.modules()}
    assert not any("_lightning_quant" in key for m in net.modules() for key in m.__dict__)
    assert torch.equal(net.eval()(x), twin.eval()(x))
    assert torch.equal(restore_model(net)(x), twin(x)), "restoring twice does nothing"


def test_prepare_again_after_restore() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 1)
    prepared(restore_model(net), FUSED, torch.randn(2, 3, 8, 8))
    assert list(prepared_groups(net)) == ["conv1", "conv2", "fc"]


def test_preparing_twice_is_an_error_and_changes_nothing() -> None:
    net, x = Net(), torch.randn(2, 3, 8, 8)
    plan = make_plan(net, FUSED, example_input=x)
    prepare_model(net, plan)
    classes = [type(m) for m in net.modules()]
    with pytest.raises(ConfigError, match=r"Net is already prepared; call restore_model\(model\) first"):
        prepare_model(net, plan)
    with pytest.raises(ConfigError, match="already prepared"):
        make_plan(net, FUSED, example_input=x)
    assert [type(m) for m in net.modules()] == classes


def test_a_plan_of_another_model_is_an_error_and_changes_nothing() -> None:
    net = Net()
    plan = make_plan(net, FUSED, example_input=torch.randn(2, 3, 8, 8))
    strange = replace(plan, layers=(*plan.layers, replace(plan.layers[0], name="conv9", batch_norm=None, activation=None)))
    with pytest.raises(ConfigError, match="the plan names 'conv9', which Net lacks"):
        prepare_model(net, strange)
    assert not prepared_groups(net)


def test_quantizer_state_makes_a_twin() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 3)
    twin = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8))
    twin.load_state_dict(net.state_dict())
    load_quantizer_state(twin, quantizer_state(net))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), twin.eval()(x))


def test_foreign_quantizer_state_is_an_error_and_loads_nothing() -> None:
    net = prepared(Net(), FUSED, torch.randn(2, 3, 8, 8)).train()
    sgd_steps(net, 1)
    before = quantizer_state(net)
    with pytest.raises(ConfigError, match=r"another config_list: missing .*conv1\._input_.*unexpected \['conv9\._input_'\]"):
        load_quantizer_state(net, {"conv9._input_": {"low": 0.0, "high": 1.0}})
    assert quantizer_state(net) == before


def test_a_transformer_layer_keeps_calling_its_submodules() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(3, 5, 8)
    prepared(net, [{"op_names": ["0.linear1", "0.linear2"]}], x).train()(x)
    with torch.no_grad():
        quantized, plain = net.eval()(x), layer.eval()(x)
        assert not torch.equal(quantized, plain), "the fast path would skip our layers"
        assert (quantized - plain).abs().max() < 0.1
        restored = restore_model(net).eval()(x)
    assert torch.allclose(restored, plain, atol=1e-6)
