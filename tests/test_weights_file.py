# SPDX-License-Identifier: Apache-2.0
"""Owns the state dict with manifest: every deployed model comes back into the user's own net, bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import CONFIGS, trained
from test_zoo import NAMES, called
from test_zoo import trained as zoo_trained
from torch import Tensor, nn
from toys import FUSED, Net
from zoo import ZOO

from lightning_quant import (
    ConfigError,
    ParityError,
    convert_model,
    export_model,
    load_deployed,
    loading,
    make_plan,
    prepare_model,
)
from lightning_quant.export import export_with_reports
from lightning_quant.files import packed, read_weights, unpacked, write_weights
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer
from lightning_quant.intercept import RoundedOperator
from lightning_quant.wrapped import QuantizedModule

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
NOT_TRACED = {"DCGANDiscriminator", "TorchEncoder", "TiedDecoder", "BranchOnShape", "BranchOnData"}


def same(found: nn.Module, wanted: nn.Module, example: Any) -> bool:
    with torch.no_grad():
        ours, theirs = called(found, example), called(wanted, example)
    assert len(ours) == len(theirs) > 0
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def deployed_after(net: nn.Module, config: Any, example: Tensor) -> nn.Module:
    """A deployed model after two forwards in training, no optimizer."""
    prepare_model(net, make_plan(net, config, example_input=example))
    net.train()
    for _ in range(2):
        net(example)
    return convert_model(net.eval())


# -- all nets -----------------------------------------------------------------------------------------------------------


@NAMES
def test_every_net_of_the_zoo_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    one = zoo_trained(name)
    path = export_model(one.deployed, tmp_path / "weights.pt", example_input=one.example)
    torch.manual_seed(99)
    net = ZOO[name].make()
    before = [(key, id(value), value.clone()) for key, value in net.state_dict(keep_vars=True).items()]
    if name in NOT_TRACED:
        with pytest.raises(ConfigError, match=r"calls as functions, and no example_input was given.* by which they are found"):
            load_deployed(path, model=net)
    example = one.example if name in NOT_TRACED else None
    found = load_deployed(path, model=net, example_input=example)
    assert same(found, one.deployed, one.example) and same(found, one.deployed, one.fresh)
    assert repr(found) == repr(one.deployed)
    assert list(found.state_dict()) == list(one.deployed.state_dict())
    assert not any(module.training for module in found.modules())
    after = [(key, id(value), value) for key, value in net.state_dict(keep_vars=True).items()]
    assert [one[:2] for one in before] == [one[:2] for one in after]  # the user's own net is as it was
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


def test_the_zoo_has_every_kind_of_layer() -> None:
    found = {type(module) for name in ZOO for module in zoo_trained(name).deployed.modules()}
    assert {IntegerLayer, PartlyIntegerLayer, ActivatedLayer, QuantizedModule, RoundedOperator} <= found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS[name]))
    path = export_model(deployed, tmp_path / "weights.pt", example_input=X)
    assert same(load_deployed(path, model=Net()), deployed, X)


BLOCKS: list[dict[str, Any]] = [
    {
        "op_types": ["Linear"],
        "target_settings": {
            "weight": {"quant_dtype": "int4", "granularity": [1, 16]},
            "_input_": {"quant_dtype": "int8", "granularity": [-1, 16]},
        },
    }
]


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact", "dorefa", "bnn"])
def test_what_methods_learned_comes_back(method: str, tmp_path: Path) -> None:
    deployed = deployed_after(Net(), [{**FUSED[0], "method": method}], X)
    path = export_model(deployed, tmp_path / "weights.pt", example_input=X)
    assert same(load_deployed(path, model=Net()), deployed, X)


def test_scales_for_blocks_come_back_and_four_bits_are_packed(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    x = torch.randn(8, 64)
    deployed = deployed_after(make(), BLOCKS, x)
    path = export_model(deployed, tmp_path / "weights.pt", example_input=x)
    assert same(load_deployed(path, model=make()), deployed, x)
    content = read_weights(path)
    weights = {key: value for key, value in content["state"].items() if key.endswith("weight")}
    assert {key: value.numel() for key, value in weights.items()} == {"0.layer.weight": 64 * 128 // 2, "2.weight": 128 * 10 // 2}


@pytest.mark.parametrize(("bits", "low"), [(2, -2), (4, -8)])
@pytest.mark.parametrize("size", [(2,), (5, 3), (3, 3, 3), (128,)])
def test_packing_loses_nothing(bits: int, low: int, size: tuple[int, ...]) -> None:
    values = torch.randint(low, -low, size, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    values.view(-1)[0] = low
    state, small = packed({"w": values, "other": torch.full((4,), 100, dtype=torch.int8)})
    assert small == {"w": [bits, list(size)]}
    assert state["w"].numel() == -(-values.numel() * bits // 8)
    back = unpacked(state, small)
    assert back["w"].dtype == torch.int8 and torch.equal(back["w"], values)
    assert torch.equal(back["other"], torch.full((4,), 100, dtype=torch.int8))


def test_a_half_of_a_net_in_double_keeps_its_dtype(tmp_path: Path) -> None:
    def make(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype)

    x = torch.randn(4, 8, dtype=torch.float64)
    deployed = deployed_after(make(torch.float64), [{"op_types": ["Linear"]}], x)
    path = export_model(deployed, tmp_path / "weights.pt", example_input=x)
    assert same(load_deployed(path, model=make(torch.float32)), deployed, x)


def test_a_prepared_net_is_taken_for_its_float_one_and_stays_prepared(tmp_path: Path) -> None:
    net = trained(CONFIGS["default"])
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "weights.pt")
    kinds = [type(module) for module in net.modules()]
    assert same(load_deployed(path, model=net), deployed, X)
    assert [type(module) for module in net.modules()] == kinds


# -- another process, another source ----------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = F.relu(self.a(x) + x)
        z = self.b(y) + y
        return torch.cat([F.gelu(z), y + z], 1)
"""


def test_a_fresh_process_finds_operators_in_code_that_moved(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "blocks_of_a_user.py").write_text(SOURCE)
    moved = tmp_path / "second"
    moved.mkdir()
    (moved / "blocks_of_a_user.py").write_text(
        "# a line more\n" + SOURCE.replace("        y = F", "        limit = 3\n        y = F")
    )
    sys.path.insert(0, str(tmp_path / "first"))
    try:
        from blocks_of_a_user import Block  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    deployed = deployed_after(Block(), "int8", X)
    assert sum(isinstance(module, RoundedOperator) for module in deployed.modules()) >= 3
    export_model(deployed, tmp_path / "weights.pt", example_input=X)
    torch.save(X, tmp_path / "x.pt")
    with torch.no_grad():
        torch.save(deployed(X), tmp_path / "y.pt")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from blocks_of_a_user import Block; import lightning_quant as lq\n"
        "x, y = torch.load(sys.argv[2] + '/x.pt'), torch.load(sys.argv[2] + '/y.pt')\n"
        "with torch.no_grad(): assert torch.equal(lq.load_deployed(sys.argv[2] + '/weights.pt', model=Block())(x), y)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(moved), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- nets that do not fit ---------------------------------------------------------------------------------------------


class Other(nn.Module):
    pass


class WithAddition(nn.Module):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.fc, self.twice = nn.Linear(4, 4), twice

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        y = y * 2 if self.twice else y
        return x + y


def wider() -> nn.Module:
    net = Net()
    net.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    return net


def strided() -> nn.Module:
    net = Net()
    net.conv1.stride = (2, 2)
    return net


def lacking() -> nn.Module:
    net = Net()
    del net.fc
    return net


def exchanged() -> nn.Module:
    net = Net()
    net.conv1 = nn.Identity()  # type: ignore[assignment]
    return net


def more() -> nn.Module:
    net = Net()
    net.extra = nn.Linear(2, 2)
    return net


def parameter() -> nn.Module:
    net = Net()
    net.extra = nn.Parameter(torch.ones(2))
    return net


def averaging() -> nn.Module:
    net = Net()
    net.pool = nn.AvgPool2d(2)  # type: ignore[assignment]
    return net


def pooled_wider() -> nn.Module:
    net = Net()
    net.pool = nn.MaxPool2d(2, padding=1)
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Other, "the file was written of a Net, and model is a Other"),
        (wider, r"'conv2.weight' has shape \(16, 8, 3, 3\) in this net and \(8, 8, 3, 3\) in the file"),
        (strided, r"'conv1' is Geometry.*stride=\(2, 2\).* in this net and was Geometry"),
        (lacking, "this net has no module 'fc', which the file has numbers for"),
        (exchanged, "'conv1' is a Identity in this net, where the file has a conv layer"),
        (more, r"'extra' is Linear\(in_features=2, .*\) in this net and was not there when the file was written"),
        (parameter, "this net does not take the numbers of the file.*extra"),
        (averaging, r"'pool' is AvgPool2d\(kernel_size=2, .*\) in this net and was MaxPool2d\(kernel_size=2, .*padding=0"),
        (pooled_wider, r"'pool' is MaxPool2d\(.*padding=1.*\) in this net and was MaxPool2d\(.*padding=0"),
    ],
)
def test_a_net_that_does_not_fit_is_refused_by_the_layer(net: Any, message: str, tmp_path: Path) -> None:
    path = export_model(convert_model(trained(CONFIGS["default"])), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=f"(?s)weights.pt': {message}"):
        load_deployed(path, model=net())


def test_a_forward_with_other_operators_is_refused(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    path = export_model(deployed_after(WithAddition(), "int8", x), tmp_path / "weights.pt", example_input=x)
    assert load_deployed(path, model=WithAddition()) is not None
    content = read_weights(path)
    (owner,) = content["manifest"]["owners"]
    elsewhere = (("forward", 1, 2),)  # as if the code had moved
    (act,) = owner["acts"]
    act["key"] = (act["key"][0], elsewhere, 0)
    owner["float"] = [(op, elsewhere, repeat) for op, _, repeat in owner["float"]]
    owner["names"] = [((op, elsewhere, repeat), name) for (op, _, repeat), name in owner["names"]]
    write_weights(content, path)
    assert load_deployed(path, model=WithAddition()) is not None
    with pytest.raises(ConfigError, match="the forward of 'the model' calls other operators than when the file was written: mul"):
        load_deployed(path, model=WithAddition(twice=True))


class Around(nn.Module):
    """A net inside another one, as where a fit wrote what training_step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


def test_a_model_that_is_not_the_files_is_told_from_what_to_give(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["default"]))
    path = export_model(deployed, tmp_path / "model.pt")
    wrong: list[tuple[Any, str]] = [
        (Net, "model: expected an instance of the class that was trained, got the class Net; give an instance of it"),
        ("net", "model: expected an instance of the class that was trained, got 'net'; give one"),
        (deployed, "model is deployed already \\('conv1'\\); give a new instance of the class that was trained"),
        (Around(), "the file was written of a Net, which is 'net' of this Around; give model\\.net"),
    ]
    for model, message in wrong:
        with pytest.raises(ConfigError, match=f"model.pt': {message}"):
            load_deployed(path, model=model)
    assert same(load_deployed(path, model=Around().net), deployed, X)


def test_messages_of_torch_come_without_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_model(convert_model(trained(CONFIGS["default"])), tmp_path / "model.pt")
    for error in (ConfigError, RuntimeError):

        def fails(*_: Any, error: type[Exception] = error, **__: Any) -> None:
            raise error("\x1b[31mred\x1b[0m text")

        monkeypatch.setattr("lightning_quant.loading.rebuilt", fails)
        with pytest.raises(ConfigError, match=r"red text$"):
            load_deployed(path, model=Net())


def test_the_line_of_a_file_says_what_was_compared(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["default"]))
    without = export_with_reports(deployed, tmp_path / "model.pt").summary()
    assert without == "every number comes back bit for bit"
    assert export_with_reports(deployed, tmp_path / "model.pt", example_input=X).summary() == (
        "every number and output comes back bit for bit"
    )


def test_a_pt_file_needs_a_model_and_a_pt2_file_takes_none(tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["default"]))
    for suffix in (".pt", ".pt2"):
        export_model(deployed, tmp_path / f"model{suffix}", example_input=X)
    with pytest.raises(ConfigError, match=r"a \.pt file needs model, an instance of the class that was trained"):
        load_deployed(tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"a \.pt2 file is a model by itself: leave out model"):
        load_deployed(tmp_path / "model.pt2", model=Net())
    for suffix in (".pt2", ".onnx"):
        with pytest.raises(ConfigError, match=rf"\{suffix} export needs example_input"):
            export_model(deployed, tmp_path / f"model{suffix}")


def test_what_is_no_deployed_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Net has no deployed layer; give what convert_model returned"):
        export_model(Net().eval(), tmp_path / "weights.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_that_would_come_back_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = convert_model(trained(CONFIGS["default"]))
    path = export_model(deployed, tmp_path / "weights.pt", example_input=X)
    before = path.read_bytes()

    def changed(path: Path) -> Any:
        content = copy.deepcopy(read_weights(path))
        content["state"]["conv1.bias"] += 1
        return content

    monkeypatch.setattr(loading, "read_weights", changed)
    with pytest.raises(ParityError, match=r"weights.pt: read back, 'conv1.bias' is not what it was"):
        export_model(deployed, path, example_input=X)
    assert [one.name for one in tmp_path.iterdir()] == ["weights.pt"] and path.read_bytes() == before
