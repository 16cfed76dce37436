# SPDX-License-Identifier: Apache-2.0
"""Owns what NNI 3.0 promises and does, case by case: its numbers, its documentation's snippets, and where ours differ on purpose.

The numbers of the cases are those of the acceptance list in the project's notes on NNI; every expected value is written out.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ConfigError, QuantFusionCallback, Schedule, convert_model, make_plan, prepare_model
from lightning_quant.blocks import BlockQuantizer
from lightning_quant.export import load_deployed, onnxruntime_session
from lightning_quant.layers import Plan
from lightning_quant.matching import TargetPlan
from lightning_quant.prepare import apply_phase, prepared_groups, quantizer_state, restore_model
from lightning_quant.schedule import Phase
from lightning_quant.settings import PruningSetting, QuantizationSetting

TrainerMaker = Callable[..., Trainer]
Config = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("own_registries")

W = [[-1.0, 0.5], [2.0, 0.25]]
HOLD = Phase(observe=False)  # ranges stand still


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance, (found, expected)


def weight_layer() -> nn.Sequential:
    """The layer of the cases, under the name fc."""
    fc = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        fc.weight.copy_(torch.tensor(W))
    return nn.Sequential(OrderedDict(fc=fc))


def trained_once(dtype: str, scheme: str, granularity: Any) -> tuple[Tensor, nn.Module]:
    """(the weight as a forward in training sees it, the deployed layer) with nothing else quantized."""
    keys = {"quant_dtype": dtype, "quant_scheme": scheme, "granularity": granularity}
    entry = {"op_names": ["fc"], "target_names": ["weight"], **keys}
    net = weight_layer()
    prepare_model(net, make_plan(net, [entry], example_input=torch.eye(2))).train()
    rounded = net(torch.eye(2)).T
    return rounded, convert_model(net.eval()).get_submodule("fc")


def stored(layer: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scale, zero point) of a deployed layer's parameter, as float64."""
    stem = "" if name == "weight" and f"{name}_scale" not in dict(layer.named_buffers()) else f"{name}_"
    found = dict(layer.named_buffers())
    scale = found[f"{stem}scale"]
    zero = found.get(f"{stem}zero_point")
    return found[name].double(), scale.double(), torch.zeros_like(scale).double() if zero is None else zero.double()


# -- weights: scale, zero point and values -------------------------------------------------------------------------------------


def test_case_01_int8_symmetric() -> None:
    rounded, layer = trained_once("int8", "symmetric", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 2 / 127)
    close(scale, 0.0157480)
    close(zero, 0)
    close(rounded, [[-1.007874, 0.503937], [2.0, 0.251969]])


def test_case_02_int8_affine() -> None:
    rounded, layer = trained_once("int8", "affine", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 3 / 254)
    close(scale, 0.0118110)
    close(zero, -42)
    close(rounded, [[-1.003937, 0.496063], [1.996063, 0.248031]])


def test_case_03_int8_affine_out_channel() -> None:
    rounded, layer = trained_once("int8", "affine", "out_channel")
    _, scale, zero = stored(layer)
    close(scale, [1.5 / 254, 2 / 254])  # NNI keeps (2, 1): the same two numbers
    close(scale, [0.00590551, 0.00787402])
    close(zero, [42, -127])
    close(rounded, [[-169 * 1.5 / 254, 85 * 1.5 / 254], [2.0, 32 * 2 / 254]])


def test_case_04_int8_symmetric_in_channel() -> None:
    rounded, layer = trained_once("int8", "symmetric", "in_channel")
    _, scale, zero = stored(layer)
    close(scale, [[2 / 127, 0.5 / 127]])
    close(scale, [[0.0157480, 0.0039370]])
    close(zero, [[0, 0]])
    close(rounded, [[-64 * 2 / 127, 0.5], [2.0, 64 * 0.5 / 127]])


def test_case_05_uint8() -> None:
    rounded, layer = trained_once("uint8", "affine", "per_tensor")
    q, scale, zero = stored(layer)
    close(scale, 3 / 255)
    close(scale, 0.0117647)
    close(zero + 128, 85)  # stored signed, moved by 128, which is what runtimes take for weights
    assert q.min() >= -128
    # NNI adds the zero point before it rounds: 0.5 / s = 42.5 becomes 43, 0.505882. Ours rounds first, as ONNX defines it.
    close(rounded, [[-1.0, 0.494118], [2.0, 0.247059]])
    _, layer = trained_once("uint8", "symmetric", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 2 / 127.5)
    close(scale, 0.0156863)
    close(zero + 128, 128)


def test_case_06_four_bits() -> None:
    rounded, layer = trained_once("int4", "symmetric", "per_tensor")
    q, scale, _ = stored(layer)
    close(scale, 0.285714)
    close(rounded, [[-0.857143, 0.571429], [2.0, 0.285714]])
    close(q, [[-3, 2], [7, 1]])
    _, layer = trained_once("int4", "affine", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 0.214286)
    close(zero, -2)
    _, layer = trained_once("uint4", "affine", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 0.2)
    close(zero + 8, 5)
    _, layer = trained_once("uint4", "symmetric", "per_tensor")
    _, scale, zero = stored(layer)
    close(scale, 2 / 7.5)
    close(zero + 8, 8)


LEVELS = [
    *[("int2", -1, 1), ("int3", -3, 3), ("int4", -7, 7), ("int8", -127, 127), ("int16", -32767, 32767)],
    *[("uint2", 0, 3), ("uint4", 0, 15), ("uint8", 0, 255), ("uint16", 0, 65535)],
]


@pytest.mark.parametrize(("dtype", "low", "high"), LEVELS, ids=[row[0] for row in LEVELS])
def test_case_07_levels_of_a_weight(dtype: str, low: int, high: int) -> None:
    net = weight_layer()
    plan = make_plan(net, [{"op_names": ["fc"], "target_names": ["weight"], "quant_dtype": dtype, "quant_scheme": "affine"}])
    spec = plan.layers[0].targets["weight"].spec
    assert (spec.qmin, spec.qmax) == (low, high)
    offset = 2 ** (spec.bits - 1) if dtype.startswith("u") else 0
    _, layer = trained_once(dtype, "affine", "out_channel")
    q, _, zero = stored(layer)
    assert q.min() + offset == low, "the most negative weight of a row lies on the lowest level"
    assert q.max() + offset == high
    assert ((zero + offset >= low) & (zero + offset <= high)).all()


@pytest.mark.parametrize("dtype", ["int1", "uint1"])
def test_case_07_one_bit_is_refused(dtype: str) -> None:
    """NNI: int1 is 0..0, every weight becomes 0; uint1 is 0..1."""
    with pytest.raises(ConfigError, match=f"{dtype}'? has one bit"):
        make_plan(weight_layer(), [{"op_names": ["fc"], "quant_dtype": dtype}])


@pytest.mark.parametrize("dtype", ["float8", "int0", "int17", "int", "uint08", 8])
def test_case_07_other_types_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"config_list\[0\]\['quant_dtype'\].*int2 to int16 and uint2 to uint16"):
        make_plan(weight_layer(), [{"op_names": ["fc"], "quant_dtype": dtype}])


# -- activations ---------------------------------------------------------------------------------------------------------------


def rounding_layer(**keys: Any) -> nn.Module:
    """A prepared module that does nothing but round what it is given."""
    net = nn.Sequential(OrderedDict(act=nn.Identity()))
    entry = {"op_names": ["act"], "target_names": ["_input_"], **keys}
    return prepare_model(net, make_plan(net, [entry], example_input=torch.zeros(2))).train()


def test_case_08_moving_average_of_an_activation() -> None:
    """NNI: int8 activations live on -127..127, so its scales are range / 254 and its zero point is -127; ours have -128, too."""
    net = rounding_layer(quant_dtype="int8", quant_scheme="affine")
    (quantizer,) = prepared_groups(net)["act"][1].quantizers
    net(torch.tensor([0.5, 2.0]))
    assert quantizer_state(net)["act._input_"] == {"low": 0.5, "high": 2.0}
    grid: Any = quantizer.grid()
    close(grid.scale, 2 / 255)
    assert (grid.zero_point, grid.qmin, grid.qmax) == (-128, -128, 127)
    net(torch.tensor([-1.0, 4.0]))
    close(list(quantizer_state(net)["act._input_"].values()), [0.485, 2.02])
    grid = quantizer.grid()
    close(grid.scale, 2.02 / 255)
    before = quantizer_state(net)
    with torch.no_grad():
        net.eval()(torch.tensor([100.0, -100.0]))
        found = net(torch.tensor([10.0, -10.0]))
    close(found, [2.02, 0.0])
    assert quantizer_state(net) == before, "eval moves no range"


def test_case_09_straight_through_gradient() -> None:
    """NNI writes into the gradient that it is given: [1, 1] comes back as [1, 0]."""
    net = rounding_layer(quant_dtype="int8", quant_scheme="symmetric")
    net(torch.tensor([-1.0, 1.0]))
    apply_phase(net, HOLD)
    x, given = torch.tensor([0.3, 5.0], requires_grad=True), torch.ones(2)
    y = net(x)
    close(y, [38 / 127, 1.0])
    y.backward(given)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]
    assert given.tolist() == [1.0, 1.0]


class Steps(LightningModule):
    """One linear layer on ones, with a rate of 0; keeps what every training step gave."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor(W))
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        y: Tensor = self(batch[0])
        self.seen.append(y[0].tolist())
        return y.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("schedule", [Schedule(quantize_start=2), {"quantize_start": "step 2"}], ids=["object", "dict"])
def test_case_10_quantization_starts_at_a_step(schedule: Any, quiet_trainer: TrainerMaker) -> None:
    keys = {"quant_dtype": "int2", "quant_scheme": "symmetric", "granularity": "per_tensor"}
    entry = {"op_names": ["fc"], "target_names": ["weight"], **keys}
    model = Steps()
    quiet_trainer(max_steps=4, callbacks=[QuantFusionCallback([entry], schedule=schedule, verbose=0)]).fit(
        model, DataLoader(TensorDataset(torch.ones(4, 2)))
    )
    assert model.seen == [[-0.5, 2.25], [-0.5, 2.25], [0.0, 2.0], [0.0, 2.0]]


# -- what a config means -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """fc1, relu, fc2: (N, 4) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.relu(self.fc1(x)))
        return y


def targets(plan: Plan, name: str) -> dict[str, TargetPlan]:
    (layer,) = [layer for layer in plan.layers if layer.name == name]
    return dict(layer.targets)


def grids(plan: Plan, name: str) -> dict[str, str]:
    return {target: str(decided.spec) for target, decided in targets(plan, name).items()}


def chosen(config: Config, example: Any = None) -> list[str]:
    return [layer.name for layer in make_plan(Two(), config, example_input=example).layers]


def test_case_11_full_form_overrules_shorthand() -> None:
    entry = {
        "op_names": ["fc1"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "symmetric",
        "target_settings": {"_input_": {"quant_dtype": "uint8", "quant_scheme": "affine"}},
    }
    assert grids(make_plan(Two(), [entry]), "fc1") == {
        "_input_": "uint8 affine per_tensor",
        "weight": "int8 symmetric out_channel",
    }


def test_case_11_settings_without_a_quant_dtype() -> None:
    """NNI: "Missing key: 'quant_dtype'", at the top of every entry and inside every target's settings."""
    entry = {"op_names": ["fc1"], "target_names": ["weight"], "target_settings": {"weight": {"quant_scheme": "affine"}}}
    assert grids(make_plan(Two(), [entry]), "fc1") == {"weight": "int8 affine out_channel"}


@pytest.mark.parametrize("example", [None, torch.randn(2, 4)], ids=["unseen", "recorded"])
def test_case_12_the_later_entry_wins(example: Tensor | None) -> None:
    """NNI: the first one, with a warning; its quantization page promises the later one."""
    config: Config = [
        {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"},
        {"op_names": ["fc1"], "target_names": ["weight", "_output_"], "quant_dtype": "int4"},
    ]
    plan = make_plan(Two(), config, example_input=example)
    assert grids(plan, "fc1") == {"weight": "int4 symmetric out_channel", "_output_": "int4 affine per_tensor"}
    assert grids(plan, "fc2") == {"weight": "int8 symmetric out_channel"}
    decided = targets(plan, "fc1")["weight"]
    assert decided.decided_by == "config_list[1]"
    assert "overrules config_list[0]" in decided.notes
    assert "overrules config_list[0]" in str(plan)
    assert not targets(plan, "fc1")["_output_"].notes, "nothing was decided there before"


def test_case_13_selection() -> None:
    assert chosen([{"op_names": ["fc1", "relu"], "op_types": ["Linear"]}]) == ["fc1"]
    assert chosen([{"op_types": ["Linear"], "exclude_op_names": ["fc2"]}]) == ["fc1"]
    assert chosen([{"op_names_re": ["fc"]}]) == ["fc1", "fc2"]
    assert chosen([{"op_types": ["Linear", "ReLU"], "exclude_op_types": ["Linear"]}]) == ["relu"]
    assert chosen([{"op_types": ["Linear"], "exclude_op_names_re": [".*2"]}]) == ["fc1"]


def test_case_13_unknown_names() -> None:
    """NNI: a bare KeyError: 'fcX'; a type or a regular expression that matches nothing is silent."""
    with pytest.raises(ConfigError, match=r"config_list\[1\]: op_names 'fcX' matches no module. Close: 'fc2', 'fc1'"):
        chosen([{"op_types": ["Linear"]}, {"op_names": ["fcX"]}])
    with pytest.raises(ConfigError, match=r"config_list\[0\]: op_types 'Linaer' matches no module; .*Did you mean 'Linear'"):
        chosen([{"op_types": ["Linaer"]}])
    with pytest.raises(ConfigError, match=r"config_list\[0\]: op_names_re 'conv' matches no module"):
        chosen([{"op_names_re": ["conv"]}])


def test_case_14_registering_replaces_and_copies() -> None:
    setting: dict[str, dict[str, Any]] = {"weight": {"quant_dtype": "int4"}}
    QuantizationSetting.register("Linear", setting)
    expected = {"weight": "int4 symmetric out_channel"}
    assert grids(make_plan(Two(), [{"op_types": ["Linear"]}]), "fc1") == expected
    setting["weight"]["quant_dtype"] = "int2"
    setting["bias"] = {}
    assert grids(make_plan(Two(), [{"op_types": ["Linear"]}]), "fc1") == expected


def test_case_14_a_target_that_the_setting_lacks() -> None:
    """NNI: KeyError: '_input_'. Ours takes the defaults, since the name is plain."""
    QuantizationSetting.register("Linear", {"weight": {"quant_dtype": "int4"}})
    plan = make_plan(Two(), [{"op_names": ["fc1"], "target_names": ["_input_", "weight"]}])
    assert grids(plan, "fc1") == {"_input_": "uint8 affine per_tensor", "weight": "int4 symmetric out_channel"}


def test_unknown_targets_are_named() -> None:
    """NNI: a bare KeyError: 'wieght'."""
    with pytest.raises(ConfigError, match=r"'fc1' \(Linear\) has no target 'wieght'; it has .*Did you mean 'weight'"):
        make_plan(Two(), [{"op_names": ["fc1"], "target_names": ["wieght"]}])


# -- settings of modules of one's own: the page "compression setting" --------------------------------------------------------


class CustomizedModule(torch.nn.Module):
    """As in the documentation, with parameters that exist: torch.nn.Parameter(200, 100) is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.p1 = torch.nn.Parameter(torch.empty(200, 100))
        self.p2 = torch.nn.Parameter(torch.empty(200, 50))
        torch.nn.init.normal_(self.p1, std=0.1)
        torch.nn.init.normal_(self.p2, std=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(self.p1, x) + torch.matmul(self.p2, y)


class Custom(LightningModule):
    """The customized module, trained to make zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.custom = CustomizedModule()
        self.gradients: list[float] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.custom(x, y)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self(*batch)
        return out.square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients += [float(p.grad.abs().max()) for p in self.custom.parameters() if p.grad is not None]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def settings_page() -> dict[str, Any]:
    """The second code block of "Quantization Setting", as it stands there."""
    # fmt: off
    customized_setting: dict[str, Any] = {
        '_input_': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': [-1, 1],
            'apply_method': 'clamp_round',
        },
        'p1': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': [1, -1],
            'apply_method': 'clamp_round',
        },
        'p2': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': [1, -1],
            'apply_method': 'clamp_round',
        },
        '_output_': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': [-1, 1],
            'apply_method': 'clamp_round',
        }
    }
    # fmt: on
    return {**customized_setting}


SETTINGS_YAML = """
CustomizedModule:
  _input_:
    quant_dtype: null
    quant_scheme: null
    granularity: [-1, 1]
    apply_method: clamp_round
  p1: &parameter
    quant_dtype: null
    quant_scheme: null
    granularity: [1, -1]
    apply_method: clamp_round
  p2: *parameter
  _output_:
    quant_dtype: null
    quant_scheme: null
    granularity: [-1, 1]
    apply_method: clamp_round
"""
EVERY_TARGET = ["_input_", "_input_1", "p1", "p2", "_output_"]
CUSTOM: Config = [{"op_types": ["CustomizedModule"], "target_names": EVERY_TARGET}]
CUSTOM_GRIDS = {
    "_input_": "uint8 affine [-1, 1]",
    "_input_1": "uint8 affine [-1, 1]",
    "p1": "int8 symmetric out_channel",  # what [1, -1] is for two dimensions
    "p2": "int8 symmetric out_channel",
    "_output_": "uint8 affine [-1, 1]",
}
XY = tuple(torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)) for rows in (100, 50))


def test_case_15_a_customized_module() -> None:
    QuantizationSetting.register("CustomizedModule", settings_page())
    net = Custom()
    plan = make_plan(net, CUSTOM, example_input=XY)
    assert grids(plan, "custom") == CUSTOM_GRIDS
    assert {target.spec.apply_method for target in targets(plan, "custom").values()} == {"clamp_round"}
    prepare_model(net, plan).train()(*XY)
    deployed = convert_model(net.eval()).get_submodule("custom")
    assert {name: stored(deployed, name)[1].shape for name in ("p1", "p2")} == {"p1": (200,), "p2": (200,)}  # NNI: (200, 1)
    ranges = {name: side["low"].shape for name, side in quantizer_state(net).items()}
    assert ranges == {"custom._input_": (1, 16), "custom._input_1": (1, 16), "custom._output_": (1, 16)}


def test_case_15_without_target_names_the_second_input_stays_float() -> None:
    QuantizationSetting.register("CustomizedModule", settings_page())
    plan = make_plan(Custom(), [{"op_types": ["CustomizedModule"]}], example_input=XY)
    assert list(targets(plan, "custom")) == ["_input_", "p1", "p2", "_output_"]
    assert "_input_1 stays float (name it in target_names)" in plan.layers[0].notes


def numpy_custom(deployed: nn.Module, x: Tensor, y: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(what the deployed integers stand for, the step of each output column), reckoned without torch."""
    buffers = {name: tensor.numpy() for name, tensor in deployed.named_buffers()}

    def rounded(values: npt.NDArray[Any], stem: str) -> npt.NDArray[np.float32]:
        scale, zero = buffers[f"{stem}.scale"], buffers[f"{stem}.zero_point"]
        grid: npt.NDArray[np.float32] = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
        return grid

    p1, p2 = (buffers[name].astype(np.float32) * buffers[f"{name}_scale"][:, None] for name in ("p1", "p2"))
    out = p1 @ rounded(x.numpy(), "rounds_in.0") + p2 @ rounded(y.numpy(), "rounds_in.1")
    return rounded(out, "rounds_out.0"), buffers["rounds_out.0.scale"]


@pytest.fixture
def pairs() -> DataLoader[Any]:
    return DataLoader([(torch.randn(100, 16), torch.randn(50, 16)) for _ in range(6)], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["registered", "callback's settings", "file", "temporary"])
def test_the_setting_page_in_a_trainer(way: str, quiet_trainer: TrainerMaker, pairs: DataLoader[Any], tmp_path: Path) -> None:
    """From the snippet to files: training, integers, both formats, and the arithmetic again by numpy."""
    config, settings = CUSTOM, None
    if way == "registered":
        QuantizationSetting.register("CustomizedModule", settings_page())
    elif way == "callback's settings":
        settings = yaml.safe_load(SETTINGS_YAML)
        assert settings == {"CustomizedModule": settings_page()}
    elif way == "file":
        (tmp_path / "settings.yaml").write_text(SETTINGS_YAML)
        (tmp_path / "config.json").write_text(json.dumps(CUSTOM))
        config, settings = str(tmp_path / "config.json"), str(tmp_path / "settings.yaml")  # type: ignore[assignment]
    else:  # "Temporarily Setting Update": a full setting in the config_list, nothing registered
        config = [{"op_names": ["custom"], "target_settings": {**settings_page(), "_input_1": settings_page()["_input_"]}}]
    export = {".onnx": {"dynamic_batch": False}, ".pt2": {"dynamic_batch": False}} if way in ("registered", "temporary") else None
    callback = QuantFusionCallback(config, settings=settings, export=export, dirpath=tmp_path, verbose=0)
    model = Custom()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, pairs)
    assert callback.plan is not None
    assert grids(callback.plan, "custom") == CUSTOM_GRIDS
    assert len(model.gradients) == 12
    assert min(model.gradients) > 0
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())

    assert callback.deployed_model is not None
    layer = callback.deployed_model.get_submodule("custom")
    buffers = dict(layer.named_buffers())
    assert not list(layer.parameters())
    assert {name: buffers[name].dtype for name in ("p1", "p2")} == {"p1": torch.int8, "p2": torch.int8}
    assert {name: tuple(tensor.shape) for name, tensor in buffers.items() if "scale" in name} == {
        **dict.fromkeys(("p1_scale", "p2_scale"), (200,)),
        **dict.fromkeys(("rounds_in.0.scale", "rounds_in.1.scale", "rounds_out.0.scale"), (1, 16)),
    }
    with torch.no_grad():
        found = callback.deployed_model(*XY)
        assert torch.equal(found, model.eval()(*XY))
    reference, step = numpy_custom(layer, *XY)
    difference = np.abs(found.numpy() - reference) / step
    assert difference.max() < 1.001, "the order of the sums may tip a level"
    assert (difference > 1e-3).mean() < 1e-3
    if export is not None:
        session = onnxruntime_session(tmp_path / "model.onnx")
        (again,) = session.run(None, {node.name: t.numpy() for node, t in zip(session.get_inputs(), XY, strict=True)})
        assert (np.abs(again - found.numpy()) / step > 1e-3).mean() < 1e-3
        with torch.no_grad():
            assert torch.equal(load_deployed(tmp_path / "model.pt2")(*XY), found)


def test_the_default_setting_of_the_page() -> None:
    # fmt: off
    default_setting = {
        '_input_': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': 'default',
            'apply_method': 'clamp_round',
        },
        'weight': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': 'default',
            'apply_method': 'clamp_round',
        },
        '_output_': {
            'quant_dtype': None,
            'quant_scheme': None,
            'granularity': 'default',
            'apply_method': 'clamp_round',
        }
    }
    # fmt: on
    QuantizationSetting.register("Linear", default_setting)
    plan = make_plan(Two(), [{"op_types": ["Linear"]}], example_input=torch.randn(2, 4))
    assert grids(plan, "fc1") == {
        "_input_": "uint8 affine per_tensor",
        "weight": "int8 symmetric out_channel",
        "_output_": "uint8 affine per_tensor",
    }
    assert {target.spec.apply_method for target in targets(plan, "fc1").values()} == {"clamp_round"}


def test_the_pruning_settings_of_the_page() -> None:
    # fmt: off
    default_setting: dict[str, Any] = {
        'weight': {
            'sparse_ratio': None,
            'max_sparse_ratio': None,
            'min_sparse_ratio': None,
            'sparse_threshold': None,
            'global_group_id': None,
            'dependency_group_id': None,
            'granularity': 'default',
            'internal_metric_block': None,
            'apply_method': 'mul',
        },
        'bias': {
            'align': {
                'module_name': None,
                'target_name': 'weight',
                'dims': [0],
            },
            'apply_method': 'mul',
        }
    }
    customized_setting: dict[str, Any] = {
        'p1': {
            'sparse_ratio': None,
            'max_sparse_ratio': None,
            'min_sparse_ratio': None,
            'sparse_threshold': None,
            'global_group_id': None,
            'dependency_group_id': None,
            'granularity': [1, -1],
            'internal_metric_block': None,
            'apply_method': 'mul',
        },
        'p2': {
            'sparse_ratio': None,
            'max_sparse_ratio': None,
            'min_sparse_ratio': None,
            'sparse_threshold': None,
            'global_group_id': None,
            'dependency_group_id': None,
            'granularity': [1, -1],
            'internal_metric_block': None,
            'apply_method': 'mul',
        },
        '_output_': {
            'align': {
                'module_name': None,
                'target_name': 'p1',
                'dims': [0],
            },
            'apply_method': 'mul',
            'granularity': [-1, 1]
        }
    }

    PruningSetting.register('CustomizedModule', customized_setting)
    # fmt: on
    assert PruningSetting.get("CustomizedModule") == customized_setting
    assert PruningSetting.get(CustomizedModule()) == customized_setting
    PruningSetting.register("Linear", default_setting)
    assert PruningSetting.get(nn.Linear) == default_setting


def test_a_pruning_entry_is_refused_with_the_key_named() -> None:
    """The page's last snippet, "Temporarily Setting Update", is for pruners: `align` is no word of quantization."""
    entry = {
        "op_names": ["fc1"],
        "target_settings": {"weight": {"align": {"module_name": "fc2", "target_name": "weight", "dims": [0]}}},
    }
    with pytest.raises(ConfigError, match=r"config_list\[0\]\['target_settings'\]\['weight'\]: 'align' is a key of pruning"):
        make_plan(Two(), [entry])


# -- granularity -------------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """One convolution: (N, 2, H, W) to (N, 4, H - 2, W - 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


GRANULARITIES: list[tuple[Any, str, tuple[int, ...], tuple[int, ...]]] = [
    ("default", "out_channel", (4,), (1, 2, 3)),  # NNI's quantizers: one scale; ours: what keeps batch norm exact
    ("per_tensor", "per_tensor", (), (0, 1, 2, 3)),
    ("out_channel", "out_channel", (4,), (1, 2, 3)),
    ("in_channel", "in_channel", (1, 2, 1, 1), (0, 2, 3)),
    ([1, -1, -1, -1], "out_channel", (4,), (1, 2, 3)),
    ((1, -1, -1, -1), "out_channel", (4,), (1, 2, 3)),  # NNI: tuples are refused
    ([[1], "back", -1], "out_channel", (4,), (1, 2, 3)),
    ([[-1, 1], "back", -1], "[[-1, 1], 'back', -1]", (1, 2, 1, 1), (0, 2, 3)),
    ([1, -1], "[1, -1]", (4, 2, 3, 1), (3,)),  # padded at the front with 1
    ([-1], "[-1]", (4, 2, 3, 1), (3,)),
    ([[-1], "front", -1], "per_tensor", (), (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("granularity", "named", "shape", "dims"), GRANULARITIES, ids=[str(row[0]) for row in GRANULARITIES])
def test_case_16_granularity_of_a_convolution(
    granularity: Any, named: str, shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    net, x = Conv(), torch.randn(2, 2, 5, 5)
    entry = {"op_names": ["conv"], "target_names": ["weight"], "granularity": granularity}
    plan = make_plan(net, [entry], example_input=x)
    assert str(targets(plan, "conv")["weight"].spec.granularity) == named
    prepare_model(net, plan).train()(x)
    q, scale, _ = stored(convert_model(net.eval()).get_submodule("conv"))
    assert scale.shape == shape
    weight = net.conv.weight.detach().numpy()
    expected = np.abs(weight).max(dims, keepdims=True) / 127
    close(scale.numpy().ravel(), expected.ravel(), 1e-8)
    close(q.numpy(), np.rint(weight / expected), 0)


def test_case_16_blocks_within_a_dimension() -> None:
    net, x = Conv(), torch.randn(2, 2, 5, 5)
    entry = {"op_names": ["conv"], "target_names": ["weight"], "granularity": [2, -1, -1, -1]}
    prepare_model(net, make_plan(net, [entry], example_input=x)).train()(x)
    _, scale, _ = stored(convert_model(net.eval()).get_submodule("conv"))
    assert scale.shape == (2, 1, 1, 1)
    close(scale.flatten(), np.abs(net.conv.weight.detach().numpy()).reshape(2, -1).max(1) / 127, 1e-8)
    with pytest.raises(ConfigError, match=r"\['weight'\]\['granularity'\]: the blocks \[3, -1, -1, -1\] do not divide the shape"):
        make_plan(Conv(), [{"op_names": ["conv"], "target_settings": {"weight": {"granularity": [3, -1, -1, -1]}}}])


def test_case_16_per_channel_input_is_stable_under_other_sizes() -> None:
    """NNI: `[-1, 1]` on a 4-D input has the shape (N, C, 1, W) and dies with the next batch of another size."""
    net = Conv()
    settings = {"_input_": {"granularity": "per_channel"}}
    entry = {"op_names": ["conv"], "target_names": ["_input_", "weight"], "target_settings": settings}
    prepare_model(net, make_plan(net, [entry], example_input=torch.randn(2, 2, 5, 5))).train()
    first, second = torch.randn(2, 2, 5, 5), torch.randn(7, 2, 9, 4)
    net(first)
    net(second)
    (quantizer,) = prepared_groups(net)["conv"][1].quantizers
    assert isinstance(quantizer, BlockQuantizer)
    low, high = quantizer.low, quantizer.high
    assert isinstance(low, Tensor)
    assert isinstance(high, Tensor)
    assert low.shape == high.shape == (1, 2, 1, 1)
    ends = [(x.numpy().min((0, 2, 3)), x.numpy().max((0, 2, 3))) for x in (first, second)]
    close(low.flatten(), ends[0][0] + 0.01 * (ends[1][0] - ends[0][0]))
    close(high.flatten(), ends[0][1] + 0.01 * (ends[1][1] - ends[0][1]))
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 2, 3, 11)).shape == (1, 4, 1, 9)


def test_case_16_out_channel_beside_an_input() -> None:
    """NNI: a bare assert with an empty message. Ours: one scale for the activations, and the plan says so."""
    plan = make_plan(Conv(), [{"op_names": ["conv"], "granularity": "out_channel"}], example_input=torch.randn(1, 2, 5, 5))
    assert {name: str(one.spec.granularity) for name, one in targets(plan, "conv").items()} == {
        "_input_": "per_tensor",
        "weight": "out_channel",
        "_output_": "per_tensor",
    }
    assert targets(plan, "conv")["_input_"].notes == ("out_channel is for weights",)
    with pytest.raises(ConfigError, match=r"\['_input_'\]\['granularity'\]: out_channel is for weights; activations take"):
        make_plan(Conv(), [{"op_names": ["conv"], "target_settings": {"_input_": {"granularity": "out_channel"}}}])


def test_case_16_a_scale_for_each_index_of_the_batch_is_refused() -> None:
    entry = {"op_names": ["conv"], "target_settings": {"_input_": {"granularity": [-1, 1]}}}
    with pytest.raises(ConfigError, match=r"divides dimension 0 of the activation of shape .*, the batch; .*write 'per_channel'"):
        make_plan(Conv(), [entry], example_input=torch.randn(2, 2, 5, 5))


# -- fusion: the page "module fusion" --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """conv, bn, an activation; the convolution's output may be used twice."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.twice = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), activation(), twice
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z: Tensor = self.pool(self.act(self.bn(y)))
        return z + y.mean() if self.twice else z


X4 = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(3))


def fused_plan(entry: dict[str, Any], net: nn.Module | None = None) -> Plan:
    return make_plan(net or Block(), [{"op_names": ["conv"], **entry}], example_input=X4)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("member configured", {"op_names": ["conv", "bn"], "fuse_names": [("conv", "bn")]}, "'bn' is also quantized by its name"),
    ("head not selected", {"op_names": ["pool"], "fuse_names": [("conv", "bn")]}, "but this entry does not select it"),
    (
        "unknown name",
        {"fuse_names": [("conv", "bnn")]},
        "'bnn' names nothing that can be fused. Close: 'bn'",
    ),
    ("unsupported types", {"fuse_names": [("conv", "pool")]}, r"\(Conv2d, MaxPool2d\) is no pattern that fuses"),
    ("wrong order", {"fuse_names": [("conv", "act", "bn")]}, r"\(Conv2d, ReLU, BatchNorm2d\) is no pattern that fuses"),
    ("not neighbours", {"fuse_names": [("conv", "act")]}, "'act' does not read the output of 'conv'"),
    ("one group bare", {"fuse_names": ("conv", "bn")}, "expected a list of groups, got one group"),
    ("four names", {"fuse_names": [("conv", "bn", "act", "pool")]}, r"BatchNorm2d, ReLU, MaxPool2d\) is no pattern that fuses"),
    ("six names", {"fuse_names": [("conv", "bn", "act", "pool", "one", "two")]}, "a group has 2 to 5 names, got 6"),
]


@pytest.mark.parametrize(("entry", "match"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_case_22_refusals(entry: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        fused_plan(entry)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6], ids=lambda a: a.__name__)
def test_case_22_three_members_as_tuple_or_list(kind: type, activation: type[nn.Module]) -> None:
    """NNI: ReLU6 fails in the first forward; a list is refused."""
    net = Block(activation)
    plan = fused_plan({"fuse_names": [kind(("conv", "bn", "act"))]}, net)
    (layer,) = plan.layers
    assert (layer.name, layer.members) == ("conv", ("bn", "act"))
    with torch.no_grad():
        net.bn.weight.fill_(9.0)
    prepare_model(net, plan).train()(X4)
    deployed = convert_model(net.eval())
    with torch.no_grad():
        top = deployed(X4).max()
    assert isinstance(deployed.get_submodule("bn"), nn.Identity)
    assert isinstance(deployed.get_submodule("act"), nn.Identity)
    assert top > 9 if activation is nn.ReLU else 5.9 < top <= 6.0


def test_case_22_an_output_used_twice_is_refused() -> None:
    """NNI trusts the names: the other reader silently gets the batch norm's output."""
    with pytest.raises(ConfigError, match=r"the output of 'conv' is also read by 'mean'; fused, it would not exist"):
        fused_plan({"fuse_names": [("conv", "bn")]}, Block(twice=True))


def test_case_22_a_relu_without_an_output_target() -> None:
    """NNI: an assertion. Ours: the output stays float, the ReLU is part of the layer."""
    net, x = Block(), torch.randn(8, 2, 12, 12)
    plan = fused_plan({"target_names": ["_input_", "weight"], "fuse_names": [("conv", "bn", "act")]}, net)
    assert list(targets(plan, "conv")) == ["_input_", "weight"]
    prepare_model(net, plan).train()(x)
    deployed = convert_model(net.eval())
    restore_model(net)
    with torch.no_grad():
        found, expected = deployed(x), net(x)
    assert isinstance(deployed.get_submodule("act"), nn.Identity)
    assert found.min() >= 0
    assert len(found.unique()) > 300, "on no grid of 256 levels"
    assert (found - expected).abs().max() < 0.05


def test_case_22_a_member_named_by_type_alone_is_fused() -> None:
    """NNI: op_types Conv2d and BatchNorm2d with fuse_names need excludes."""
    entry = {"op_types": ["Conv2d", "BatchNorm2d"], "fuse_names": [("conv", "bn")]}
    plan = make_plan(Block(), [entry], example_input=X4)
    assert [layer.name for layer in plan.layers] == ["conv"]


# fmt: off
class Mnist(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 20, 5, 1)
        self.conv2 = torch.nn.Conv2d(20, 50, 5, 1)
        self.fc1 = torch.nn.Linear(4 * 4 * 50, 500)
        self.fc2 = torch.nn.Linear(500, 10)
        self.relu1 = torch.nn.ReLU6()
        self.relu2 = torch.nn.ReLU6()
        self.relu3 = torch.nn.ReLU6()
        self.max_pool1 = torch.nn.MaxPool2d(2, 2)
        self.max_pool2 = torch.nn.MaxPool2d(2, 2)
        self.batchnorm1 = torch.nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.batchnorm1(self.conv1(x)))
        x = self.max_pool1(x)
        x = self.relu2(self.conv2(x))
        x = self.max_pool2(x)
        x = x.view(-1, 4 * 4 * 50)
        x = self.relu3(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


# define the config list
config_list = [
{
    'target_names':['_input_', 'weight', '_output_'],
    'op_names': ['conv1'],
    'quant_dtype': 'int8',
    'quant_scheme': 'affine',
    'granularity': 'default',
    'fuse_names': [("conv1", "batchnorm1")]
}]
# fmt: on
FUSION_YAML = """
- target_names: [_input_, weight, _output_]
  op_names: [conv1]
  quant_dtype: int8
  quant_scheme: affine
  granularity: default
  fuse_names:
  - [conv1, batchnorm1]
"""


class LitMnist(LightningModule):
    """The page's model in a LightningModule, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mnist()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class FusedMembers(Callback):
    """What batchnorm1 of a fused group does in training and in eval."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.means.append(float(pl_module.get_submodule("net.batchnorm1").running_mean.abs().max()))  # type: ignore[operator]


@pytest.mark.parametrize("form", ["python", "yaml", "yaml file", "json file"])
def test_the_fusion_page_in_a_trainer(form: str, quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    """Case 17, too. The config's names are those of `Mnist`, which is the module called net here: `root` says so."""
    config: Any = config_list
    if form != "python":
        config = yaml.safe_load(FUSION_YAML)
        assert config == json.loads(json.dumps(config_list)), "lists for tuples, nothing else"
    if form.endswith("file"):
        config = tmp_path / f"quant.{form.removesuffix(' file')}"
        config.write_text(FUSION_YAML if form == "yaml file" else json.dumps(config_list))
    model, watch = LitMnist(), FusedMembers()
    names = [name for name, _ in model.named_parameters()]
    images = torch.randn(24, 1, 28, 28)
    data = DataLoader(TensorDataset(images, torch.randint(0, 10, (24,))), batch_size=8)
    callback = QuantFusionCallback(config, root="net", verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback, watch]).fit(model, data)
    assert callback.plan is not None
    (layer,), (alone,) = callback.plan.layers, make_plan(Mnist(), config, example_input=images).layers
    assert (layer.name, layer.members) == ("net.conv1", ("net.batchnorm1",))
    assert (alone.name, alone.members) == ("conv1", ("batchnorm1",))
    assert grids(callback.plan, "net.conv1") == {
        "_input_": "int8 affine per_tensor",
        "weight": "int8 affine out_channel",
        "_output_": "int8 affine per_tensor",
    }
    assert min(watch.means) > 0, "the batch norm learned its statistics"
    deployed = callback.deployed_model
    assert deployed is not None
    conv1 = deployed.get_submodule("net.conv1")
    assert type(conv1).__name__ == "IntegerLayer"
    dtypes = {"weight": torch.int8, "scale": torch.float32, "zero_point": torch.int8, "bias": torch.int32}
    assert {name: tensor.dtype for name, tensor in conv1.named_buffers()} == dtypes
    assert isinstance(deployed.get_submodule("net.batchnorm1"), nn.Identity)
    assert "net.batchnorm1.running_mean" not in deployed.state_dict()
    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.equal(deployed(images), expected)
        batch = torch.randn(2, 20, 24, 24)
        assert torch.equal(deployed.get_submodule("net.batchnorm1")(batch), batch)
        restore_model(model)
        assert (model(images) - expected).abs().max() < 0.1, "case 18: within the error of int8"
    assert [name for name, _ in model.named_parameters()] == names
    assert len(names) == 10
