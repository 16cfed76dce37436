# SPDX-License-Identifier: Apache-2.0
"""Owns the three ways in which a deployed model computes: which are equal bit for bit, and how far the third may be off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import CONFIGS
from test_convert import trained as trained_net
from test_zoo import NAMES, assert_close, called, output_steps, trained
from torch import Tensor, nn
from toys import Net

from lightning_quant import ConfigError, convert_model, export_model, load_deployed, make_plan, onednn, prepare_model
from lightning_quant.convert import MODES, set_mode
from lightning_quant.integer import IntegerLayer
from lightning_quant.onednn import Kernel

WITH_KERNELS = pytest.mark.skipif(bool(onednn.missing()), reason=onednn.missing() or "-")
SEVEN = {"quant_dtype": "int7"}  # on a CPU without VNNI only weights of 7 bits run on the kernels


def deployed_after(net: nn.Module, weight: dict[str, Any], example: Tensor) -> nn.Module:
    """A deployed model with these settings of its weights, after two forwards in training."""
    types = {type(module).__name__ for module in net.modules() if isinstance(getattr(module, "weight", None), Tensor)}
    entry = {"op_types": sorted(types - {"BatchNorm2d"}), "target_settings": {"weight": weight}}
    prepare_model(net, make_plan(net, [entry], example_input=example))
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(example)
    return convert_model(net.eval())


def quietly(deployed: nn.Module, mode: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mode 'onednn'")
        return set_mode(copy.deepcopy(deployed), mode)


def packed(model: nn.Module) -> list[bool]:
    """For each integer layer that ran: whether it runs on a kernel."""
    layers = [layer for layer in model.modules() if isinstance(layer, IntegerLayer)]
    return [isinstance(direct.parts[0], Kernel) for layer in layers if (direct := layer._direct_now()) is not None]


# -- onednn -------------------------------------------------------------------------------------------------------------


def test_every_layer_that_does_not_run_on_the_kernels_is_named() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.ConvTranspose1d(3, 4, 2, stride=2), nn.Linear(18, 6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(self.up(x))
            out: Tensor = self.attention(y, y, y, need_weights=False)[0]
            return out

    x, net = torch.randn(5, 3, 9), Others()
    prepare_model(net, make_plan(net, "int8", example_input=x))
    net.train()(x)
    with pytest.warns(UserWarning, match="mode 'onednn'") as record:
        convert_model(net.eval(), mode="onednn")
    (text,) = (str(one.message) for one in record if "float arithmetic" in str(one.message))
    assert text == "mode 'onednn': up, attention run as in 'integer': float arithmetic on rounded tensors."


@WITH_KERNELS
@pytest.mark.parametrize("dims", [1, 2])
def test_onednn_takes_an_empty_batch(dims: int) -> None:
    x = torch.randn(6, 3, *[9] * dims)
    net = nn.Sequential((nn.Conv1d, nn.Conv2d)[dims - 1](3, 4, 3), nn.Flatten(), nn.Linear(4 * 7**dims, 2))
    deployed = deployed_after(net, SEVEN, x)
    fast = quietly(deployed, "onednn")
    with torch.no_grad():
        assert torch.equal(fast(x), deployed(x))
        assert fast(x[:0]).shape == (0, 2)
    assert any(packed(fast)), "kernels run"


@NAMES
def test_onednn_equals_integer_on_every_net(name: str) -> None:
    one = trained(name)
    fast = quietly(one.deployed, "onednn")
    with torch.no_grad():
        for example in (one.example, one.fresh):
            for a, b in zip(called(fast, example), called(one.deployed, example), strict=True):
                assert torch.equal(a, b)


class Wide(nn.Sequential):
    """Sums that pass 2^24, so that channels are split; groups; a stride; dilation."""

    def __init__(self) -> None:
        convs = [nn.Conv2d(8, 640, 1), nn.Conv2d(640, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 2, 2, groups=4)]
        super().__init__(*convs, nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(16 * 9, 10))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide": (Wide, (4, 8, 10, 10)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 5, groups=2)), (4, 4, 20)),
    "tokens": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (4, 7, 16)),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 4, 1)), (2, 3, 9, 9)),
    "net": (Net, (4, 3, 8, 8)),
}


@WITH_KERNELS
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_give_the_same_integers(name: str) -> None:
    torch.manual_seed(2)
    make, size = LAYERS[name]
    deployed = deployed_after(make(), SEVEN, torch.randn(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = set_mode(copy.deepcopy(deployed), "onednn")  # no layer is left out
    inputs = [torch.randn(*size) * 3, torch.full(size, 1e9), -torch.full(size, 1e9), torch.randn(1, *size[1:])]
    with torch.no_grad():
        for x in inputs:
            before = x.clone()
            found, wanted = fast(x), deployed(x)
            assert torch.equal(found, wanted) and found.stride() == wanted.stride()
            assert torch.equal(x, before)
            if x.dim() == 4:
                last = x.to(memory_format=torch.channels_last)
                assert torch.equal(fast(last), wanted)
    assert packed(fast) and all(packed(fast)) and not any(packed(deployed))
    if name == "wide":
        assert max(len(m._direct_now().parts) for m in fast.modules() if isinstance(m, IntegerLayer)) > 1  # type: ignore[union-attr]


@WITH_KERNELS
def test_an_image_without_a_batch() -> None:
    deployed = deployed_after(nn.Sequential(nn.Conv2d(3, 4, 3)), SEVEN, torch.randn(2, 3, 6, 6))
    fast, x = quietly(deployed, "onednn"), torch.randn(3, 6, 6)
    with torch.no_grad():
        assert torch.equal(fast(x), deployed(x))
    assert packed(fast) == [True]


@WITH_KERNELS
def test_a_cpu_that_saturates_is_found_out_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.full((1, 64), 255.0), torch.full((8, 64), 127, dtype=torch.int8)
    deployed = deployed_after(nn.Sequential(nn.Linear(64, 8)), {}, torch.randn(4, 64))
    layer = deployed.get_submodule("0")
    assert isinstance(layer, IntegerLayer)
    exact = torch.equal(
        Kernel(w, None, layer.x, layer.geometry)(x.clone() - layer.x.zero_point), (x - layer.x.zero_point) @ w.T.float()
    )
    assert onednn.saturates() == (not exact)
    monkeypatch.setattr(onednn, "saturates", lambda: True)
    with pytest.warns(UserWarning, match="mode 'onednn': 0 run as in 'integer': this CPU has no VNNI: 8-bit weights saturate"):
        slow = set_mode(copy.deepcopy(deployed), "onednn")
    assert packed(slow) == [False]
    monkeypatch.setattr(onednn, "saturates", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed(set_mode(copy.deepcopy(deployed), "onednn")) == [True]


@pytest.mark.parametrize(
    ("config", "make", "size", "message"),
    [
        ({"quant_scheme": "affine"}, lambda: nn.Linear(8, 8), (4, 8), "its weight has zero points"),
        ({}, lambda: nn.Conv3d(2, 2, 3), (2, 2, 5, 5, 5), "there is no kernel for conv layers of 3 dimensions"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(config: Any, make: Any, size: tuple[int, ...], message: str) -> None:
    torch.manual_seed(0)
    deployed = deployed_after(nn.Sequential(make()), config, torch.randn(*size))
    with pytest.warns(UserWarning, match=f"mode 'onednn': 0 run as in 'integer': {onednn.missing() or message}"):
        fast = set_mode(copy.deepcopy(deployed), "onednn")
    x = torch.randn(*size)
    with torch.no_grad():
        assert torch.equal(fast(x), deployed(x))


def test_where_there_are_no_kernels_all_layers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = convert_model(trained_net(CONFIGS["default"]))
    monkeypatch.setattr(onednn, "missing", lambda: "this CPU has no int8 kernels in oneDNN")
    with pytest.warns(
        UserWarning, match="'onednn': conv1, conv2, fc run as in 'integer': this CPU has no int8 kernels in oneDNN"
    ):
        fast = set_mode(deployed, "onednn")
    assert packed(fast) == [False] * 3


@WITH_KERNELS
def test_a_change_of_numbers_or_mode_is_followed() -> None:
    x = torch.randn(4, 16)
    deployed = deployed_after(nn.Sequential(nn.Linear(16, 8)), SEVEN, x)
    fast = quietly(deployed, "onednn")
    with torch.no_grad():
        assert torch.equal(fast(x), deployed(x))
        fast.get_buffer("0.bias").add_(1000)
        deployed.get_buffer("0.bias").add_(1000)
        assert torch.equal(fast(x), deployed(x))
        twin = copy.deepcopy(fast)  # packed weights are not copied
        assert "_direct" not in twin.get_submodule("0").__dict__ and torch.equal(twin(x), deployed(x))
        set_mode(fast, "integer")
        assert torch.equal(fast(x), deployed(x)) and packed(fast) == [False]


# -- reference ----------------------------------------------------------------------------------------------------------


@NAMES
def test_reference_is_within_a_step_of_integer(name: str) -> None:
    one = trained(name)
    plain = quietly(one.deployed, "reference")
    with torch.no_grad():
        assert_close(called(plain, one.fresh), called(one.deployed, one.fresh), output_steps(name, one), 0.99, 0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_of_the_reference_needs_torch_alone(name: str, tmp_path: Path) -> None:
    plain = quietly(convert_model(trained_net(CONFIGS[name])), "reference")
    x = torch.randn(8, 3, 8, 8)
    path = export_model(plain, tmp_path / "model.pt2", example_input=x)
    targets = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert not [target for target in targets if "lightning_quant" in target]
    with torch.no_grad():
        assert torch.allclose(load_deployed(path)(x), plain(x), rtol=1e-4, atol=1e-4)


def test_the_reference_under_autocast_is_float32() -> None:
    plain = quietly(convert_model(trained_net(CONFIGS["default"])), "reference")
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        wanted = plain(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plain(x), wanted)


def test_the_reference_compiles_into_one_graph() -> None:
    plain = quietly(convert_model(trained_net(CONFIGS["default"])), "reference")
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        wanted = plain(x)
        compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_reference_on_a_gpu() -> None:
    plain = quietly(convert_model(trained_net(CONFIGS["default"])), "reference")
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        wanted = plain(x)
        found = plain.cuda()(x.cuda()).cpu()
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


# -- all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_asked_for_at_conversion_and_stands_in_no_file(mode: str, tmp_path: Path) -> None:
    net = trained_net(CONFIGS["default"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mode 'onednn'")
        deployed = convert_model(net, mode=mode)
    assert {module.mode for module in deployed.modules() if isinstance(module, IntegerLayer)} == {mode}
    path = export_model(deployed, tmp_path / "weights.pt")
    back = load_deployed(path, model=Net())
    assert {module.mode for module in back.modules() if isinstance(module, IntegerLayer)} == {"integer"}
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(back(x), net(x))


def test_an_unknown_mode_and_a_float_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="mode: 'fast' is not one of integer, reference, onednn"):
        convert_model(trained_net(CONFIGS["default"]), mode="fast")
    with pytest.raises(ConfigError, match="Net has no deployed layer; give what convert_model returned"):
        set_mode(Net(), "reference")
