# SPDX-License-Identifier: Apache-2.0
"""Owns what leaves the process: files that compute what was deployed, or no file at all."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import run_recorded
from lightning.pytorch import LightningModule, Trainer
from test_convert import CONFIGS, trained
from test_fusion import prepared
from test_mnist import optimized_ops, with_integer_outputs, without_repeats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import FUSED, Net

from lightning_quant import ConfigError, ParityError, QuantFusionCallback, convert_model, export_model, formats, load_deployed
from lightning_quant.convert import set_mode
from lightning_quant.export import check_parity, export_with_reports, onnxruntime_session
from lightning_quant.program import only_integers_meet_grids, program_of

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


WHOLLY_INTEGER = ["default", "found", "int8", "uint8", "affine", "symmetric", "int8 symmetric", "per_tensor", "per_tensor affine"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_exports_to_both_formats_and_agrees(name: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS[name]))
    for suffix in (".onnx", ".pt2"):
        export_model(deployed, tmp_path / f"model{suffix}", example_input=X)
    with torch.no_grad():
        expected = deployed(X[:7])
        assert torch.equal(load_deployed(tmp_path / "model.pt2")(X[:7]), expected)
    allowed = 1e-4 if name in WHOLLY_INTEGER else 5e-2
    assert (run_onnx(tmp_path / "model.onnx", X[:7]) - expected).abs().max() <= allowed * expected.abs().max().clamp(min=1)
    assert Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)["Relu"] <= 2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tolerance_is_tight_where_only_integers_meet_grids(name: str) -> None:
    program = program_of(convert_model(trained(CONFIGS[name])), X, True)
    exact = [*WHOLLY_INTEGER, "quantized logits", "weights only"]
    assert only_integers_meet_grids(program) == (name in exact)


@pytest.mark.parametrize("name", WHOLLY_INTEGER)
def test_onnxruntime_computes_the_same_integers(name: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(CONFIGS[name]))
    export_model(deployed, tmp_path / "model.onnx", example_input=X)
    names = with_integer_outputs(tmp_path / "model.onnx", tmp_path / "all.onnx")
    _, integers = run_recorded(deployed, X)
    session = onnxruntime_session(tmp_path / "all.onnx")
    found = session.run(names, {session.get_inputs()[0].name: X.numpy()})
    clipped = "Clip" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert clipped == ("symmetric" in name)  # an affine grid needs no clip: saturation is the clamp, and the ReLU
    for a, b in zip(found, without_repeats(integers), strict=True):
        assert np.array_equal(a, b.numpy())


@pytest.mark.parametrize("name", ["affine", "symmetric", "int8 symmetric", "quantized logits"])
def test_no_tensor_is_put_twice_on_one_grid(name: str, tmp_path: Path) -> None:
    path = export_model(convert_model(trained(CONFIGS[name])), tmp_path / "model.onnx", example_input=X)
    nodes = onnx.load(path).graph.node
    makers = {out: node for node in nodes for out in node.output}
    again = [node for node in nodes for one in node.input[:1] if one in makers and makers[one].op_type == TWIN.get(node.op_type)]
    assert not again
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in nodes}


TWIN = {"QuantizeLinear": "DequantizeLinear", "Clip": "Clip"}  # what would stand in front of it


@pytest.mark.parametrize("name", WHOLLY_INTEGER)
def test_no_float_convolution_is_left_in_onnxruntime(name: str, tmp_path: Path) -> None:
    export_model(convert_model(trained(CONFIGS[name])), tmp_path / "model.onnx", example_input=X)
    ops = optimized_ops(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    assert (ops["QLinearConv"], ops["QGemm"]) == (2, 1)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BatchNormalization"} & set(ops)


def test_linear_on_sequences_runs_in_integers(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4, 6)
    prepared(net, [{"op_types": ["Linear"], "fuse_names": [("0", "1")]}], x).train()(x)
    deployed = convert_model(net)
    export_model(deployed, tmp_path / "model.onnx", example_input=x)
    assert optimized_ops(tmp_path / "model.onnx", tmp_path / "optimized.onnx")["QGemm"] == 2
    with torch.no_grad():
        assert (run_onnx(tmp_path / "model.onnx", x[:3]) - deployed(x[:3])).abs().max() <= 1e-5


class Siamese(nn.Module):
    """One trunk, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(144, 3)

    def trunk(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.relu(self.bn(self.conv(x))).flatten(1))
        return out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.trunk(a) - self.trunk(b)


def test_a_trunk_called_twice(tmp_path: Path) -> None:
    net, pair = Siamese(), (torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8))
    prepared(net, [{"op_types": ["Conv2d", "Linear"], "fuse_names": [("conv", "bn", "relu")]}], pair).train()(*pair)
    deployed = convert_model(net)
    export_model(deployed, tmp_path / "model.onnx", example_input=pair)
    found = onnxruntime_session(tmp_path / "model.onnx").run(None, {"a": pair[0].numpy(), "b": pair[1].numpy()})[0]
    with torch.no_grad():
        expected = deployed(*pair)
        assert torch.equal(expected, net.eval()(*pair))
    assert np.abs(found - expected.numpy()).max() <= 1e-5
    weights = [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len([name for name in weights if name.endswith("weight")]) == 2, "the file holds each weight once"


@pytest.mark.parametrize("name", ["equal grids", "unequal grids", "called twice"])
def test_neighbouring_grids_are_not_merged(name: str, tmp_path: Path) -> None:
    """onnxruntime replaces Q-DQ-Q-DQ by one pair and rescales; between equal grids that is exact, and free."""
    a, b, x = nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(64, 6)
    net = nn.Sequential(a, a, b) if name == "called twice" else nn.Sequential(a, b)
    config: list[dict[str, Any]] = [{"op_types": ["Linear"]}]
    if name == "unequal grids":
        config.append({"op_names": ["1"], "target_names": ["_input_"], "quant_scheme": "symmetric", "quant_dtype": "int8"})
    prepared(net, config, x).train()(x)
    deployed = convert_model(net)
    export_model(deployed, tmp_path / "model.onnx", example_input=x)
    barriers = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Max"]
    assert bool(barriers) == (name != "equal grids")
    with torch.no_grad():
        assert (run_onnx(tmp_path / "model.onnx", x) - deployed(x)).abs().max() <= 1e-5


class Sized(nn.Module):
    """A second input of two numbers, which is no batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        out: Tensor = self.fc(x) * size[0] + size[1]
        return out


def test_an_input_of_length_two_is_no_batch(tmp_path: Path) -> None:
    net, pair = Sized(), (torch.randn(8, 6), torch.tensor([2.0, 3.0]))
    prepared(net, [{"op_types": ["Linear"]}], pair).train()(*pair)
    deployed = convert_model(net)
    for suffix in (".onnx", ".pt2"):
        export_model(deployed, tmp_path / f"model{suffix}", example_input=pair)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(tmp_path / "model.onnx").graph.input}
    assert shapes == {"x": [0, 6], "size": [2]}
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "model.pt2")(*pair), deployed(*pair))


def test_small_outputs_are_compared_at_their_own_size(tmp_path: Path) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0 if torch.compiler.is_exporting() else x

    with pytest.raises(ParityError, match="differs"):
        export_model(Zero().eval(), tmp_path / "model.pt2", example_input=torch.full((4, 3), 1e-5))


def test_equal_infinities_agree(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, float("-inf"))

    export_model(Masked().eval(), tmp_path / "model.pt2", example_input=torch.randn(4, 3))


# -- forms of the example input -------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"y": y if scale is None else y * scale, "more": y + 1}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "pair", "batch of one"])
def test_forms_of_example_input(form: str, suffix: str, tmp_path: Path) -> None:
    x, scale = torch.randn(4, 6), torch.rand(4, 1)
    forms: dict[str, Any] = {
        "tensor": x,
        "tuple": (x,),
        "dict": {"x": x, "scale": scale},
        "pair": ((x,), {"scale": scale}),
        "batch of one": x[:1],
    }
    net = TwoInputs()
    prepared(net, [{"op_types": ["Linear"]}], forms[form]).train()(x)
    path = export_model(convert_model(net), tmp_path / f"model{suffix}", example_input=forms[form])
    if suffix == ".pt2":
        program = load_deployed(path)
        more = (torch.cat([x, x]),), ({"scale": torch.cat([scale, scale])} if form in ("dict", "pair") else {})
        with torch.no_grad():
            found = program(**{"x": more[0][0], **more[1]}) if form == "dict" else program(*more[0], **more[1])
            assert torch.equal(found["y"], convert_model(net)(*more[0], **more[1])["y"])


class Several(nn.Module):
    """What it returns is as `kind` says; one key is the name of a node of the graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(6, 5), kind

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"tensor": y, "tuple": (y, x + 1), "dict": {"logits": y, "linear": y + 1, "more": [x - 1]}, "one": {"y": y}}[
            self.kind
        ]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tensor", ["output"]),
        ("tuple", ["output_0", "output_1"]),
        ("dict", ["logits", "linear_output", "more_0"]),
        ("one", ["y"]),
    ],
)
def test_outputs_have_the_names_of_their_keys_and_the_batch_its_own(kind: str, names: list[str], tmp_path: Path) -> None:
    net, x = Several(kind), torch.randn(4, 6)
    prepared(net, [{"op_types": ["Linear"]}], x).train()(x)
    exported = export_with_reports(convert_model(net), tmp_path / "model.onnx", example_input=x)
    graph = onnx.load(exported.path).graph
    assert [value.name for value in graph.output] == names
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert exported.execution is not None
    assert exported.execution.products[0].multiply_adds == 30


class Keyed(nn.Module):
    def forward(self, x: Tensor, *, more: dict[str, Tensor], scale: Tensor) -> Tensor:
        return x * scale + more["b"] - 2 * more["a"]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_keyword_arguments_may_come_in_another_order(suffix: str, tmp_path: Path) -> None:
    x, scale, a, b = (torch.randn(4, 6) for _ in range(4))
    net, more, turned = Keyed().eval(), {"a": a, "b": b}, {"b": b, "a": a}
    path = export_model(net, tmp_path / f"model{suffix}", example_input={"x": x, "more": more, "scale": scale})
    others: list[Any] = [((x,), {"scale": scale, "more": turned}), {"scale": scale, "more": turned, "x": x}]
    for batch in others[suffix == ".pt2" :]:  # a program has what was positional by position
        assert check_parity(net, path, [batch]).outputs[0].relative <= 1e-6


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_dynamic_size_without_a_size_is_refused(suffix: str, tmp_path: Path) -> None:
    net, x = nn.Linear(6, 5).eval(), torch.randn(4, 6)
    with pytest.raises(ConfigError, match=r"dynamic_size: it leaves dimensions 2 and up free .* has none: \(4, 6\)\."):
        export_model(net, tmp_path / f"model{suffix}", example_input=x, dynamic_size=True)


def test_a_loaded_program_takes_positional_arguments_by_name_too(tmp_path: Path) -> None:
    x, scale, a, b = (torch.randn(4, 6) for _ in range(4))
    net, more = Keyed().eval(), {"a": a, "b": b}
    path = export_model(net, tmp_path / "model.pt2", example_input=((x,), {"scale": scale, "more": more}))
    program, wanted = load_deployed(path), net(x, more=more, scale=scale)
    assert torch.equal(program(x, more=more, scale=scale), wanted)
    assert torch.equal(program(more=more, x=x, scale=scale), wanted)
    text = r"takes \(x, scale=, more=\), what its example input had, and got \(a value, a value, a value\)"
    for call in (lambda: program(x, scale, more), lambda: program(x, x, more=more, scale=scale), lambda: program(x, scale=scale)):
        with pytest.raises(ConfigError, match=r"the program takes \(x, scale=, more=\)"):
            call()
    with pytest.raises(ConfigError, match=text):
        program(x, scale, more)


def test_a_loaded_program_of_a_forward_with_any_arguments(tmp_path: Path) -> None:
    class Anything(nn.Module):
        def forward(self, *parts: Tensor, **more: Tensor) -> Tensor:
            return torch.cat([*parts, *more.values()], 1)

    x, y, z = (torch.randn(4, 6) for _ in range(3))
    path = export_model(Anything().eval(), tmp_path / "model.pt2", example_input=((x, y), {"z": z}), dynamic_batch=False)
    assert torch.equal(load_deployed(path)(x, y, z=z), torch.cat([x, y, z], 1))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.reshape(2, 6))
        return out


def test_a_fixed_batch_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    net, x = FixedBatch(), torch.randn(2, 6)
    prepared(net, [{"op_types": ["Linear"]}], x).train()(x)
    deployed = convert_model(net)
    with pytest.raises(ConfigError, match=r"(?s)FixedBatch cannot be exported with a free batch size.*dynamic_batch=False"):
        export_model(deployed, tmp_path / "model.pt2", example_input=x)
    export_model(deployed, tmp_path / "model.pt2", example_input=x, dynamic_batch=False)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "model.pt2")(x), deployed(x))


# -- failures leave the target as it was ----------------------------------------------------------------------------------


class Liar(nn.Module):
    """Computes something else once it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_exporting() else x


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("old", [b"", b"the old file"], ids=["no file", "old file"])
def test_parity_failure_leaves_the_target_as_it_was(suffix: str, old: bytes, tmp_path: Path) -> None:
    target = tmp_path / f"model{suffix}"
    if old:
        target.write_bytes(old)
    with pytest.raises(
        ParityError, match=rf"model\{suffix}: output 0 differs from the deployed model's by .*nothing was written"
    ):
        export_model(Liar().eval(), target, example_input=torch.zeros(4, 3))
    assert [path.name for path in tmp_path.iterdir()] == ([target.name] if old else [])
    assert not old or target.read_bytes() == old


def test_atol_is_the_allowed_difference(tmp_path: Path) -> None:
    export_model(Liar().eval(), tmp_path / "model.pt2", example_input=torch.full((4, 3), 10.0), atol=0.11)
    with pytest.raises(ParityError, match=r"allowed 0\.09"):
        export_model(Liar().eval(), tmp_path / "model.pt2", example_input=torch.full((4, 3), 10.0), atol=0.09)


def test_nan_is_a_difference(tmp_path: Path) -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("nan") if torch.compiler.is_exporting() else x

    with pytest.raises(ParityError, match="differs"):
        export_model(Nan().eval(), tmp_path / "model.pt2", example_input=torch.ones(4, 3))


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(formats.FORMATS, ".pt2", (half, formats.run_program))
    with pytest.raises(OSError, match="disk full"):
        export_model(convert_model(trained(FUSED)), tmp_path / "model.pt2", example_input=X)
    assert not list(tmp_path.iterdir())


def test_unknown_suffix() -> None:
    with pytest.raises(ConfigError, match=r"path 'model\.tflite': unknown suffix '\.tflite'; known: \.onnx, \.pt2"):
        export_model(nn.Identity(), "model.tflite", example_input=X)


def test_no_tensor_in_the_example() -> None:
    with pytest.raises(ConfigError, match="example_input: no tensor in it"):
        export_model(nn.Identity().eval(), "model.pt2", example_input=())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt"])
def test_nan_in_the_example(suffix: str, tmp_path: Path) -> None:
    deployed, bad = convert_model(trained(FUSED)), X.clone()
    bad[3, 1, 2, 2] = float("nan")
    with pytest.raises(ConfigError, match=r"example_input: there is NaN in it, .*Give real data"):
        export_model(deployed, tmp_path / f"model{suffix}", example_input=bad)
    if suffix != ".pt":
        path = export_model(deployed, tmp_path / f"model{suffix}", example_input=X)
        with pytest.raises(ConfigError, match=r"batches\[1\]: there is NaN in it"):
            check_parity(deployed, path, [X, bad])


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt"])
def test_a_model_that_is_not_on_the_cpu(suffix: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED)).to("meta")
    with pytest.raises(ConfigError, match=r"Net is on meta; there are no numbers to write"):
        export_model(deployed, tmp_path / f"model{suffix}", example_input=X)


def test_what_onnx_cannot_say_is_named(tmp_path: Path) -> None:
    class Airy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.special.airy_ai(x)
            return out

    with pytest.raises(
        ConfigError, match=r"^torch\.onnx cannot translate the model: No ONNX function found for .*airy_ai"
    ) as error:
        export_model(Airy().eval(), tmp_path / "model.onnx", example_input=torch.randn(3, 4))
    assert "stack trace" not in str(error.value)


def test_a_model_in_train_mode(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Identity is in train mode; export what convert_model returned, or call eval\(\) first"
    ):
        export_model(nn.Identity().train(), tmp_path / "model.pt2", example_input=X)


def test_a_forward_that_torch_cannot_export(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ConfigError, match=r"torch\.export cannot export Branch|Branch cannot be exported"):
        export_model(Branch().eval(), tmp_path / "model.pt2", example_input=X)


def test_missing_packages_are_named_with_the_extra_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(ConfigError, match=r"export: ONNX export needs onnxscript, .*pip install 'lightning_quant\[onnx\]'"):
        QuantFusionCallback(FUSED, export=".onnx")
    with pytest.raises(ConfigError, match=r"path '.*model\.onnx': ONNX export needs onnxscript"):
        export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    assert not list(tmp_path.iterdir())


def test_onnxruntime_is_missing_when_a_session_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ConfigError, match=r"needs the package 'onnxruntime'.*pip install 'lightning_quant\[onnx\]'"):
        onnxruntime_session("model.onnx")


def test_a_file_that_onnxruntime_cannot_run_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def garbage(program: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"no protobuf")

    monkeypatch.setitem(formats.FORMATS, ".onnx", (garbage, formats.run_onnx))
    with pytest.raises(ParityError, match="onnxruntime cannot run the exported file, so it was not written"):
        export_model(convert_model(trained(FUSED)), tmp_path / "model.onnx", example_input=X)
    assert not list(tmp_path.iterdir())


def test_a_loaded_program_is_always_in_eval_mode(tmp_path: Path) -> None:
    program = load_deployed(export_model(convert_model(trained(FUSED)), tmp_path / "model.pt2", example_input=X))
    assert program.eval() is program
    assert not program.training
    with pytest.raises(ConfigError, match="a loaded program cannot be trained"):
        program.train()


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_tied_weights(tmp_path: Path) -> None:
    net, x = Tied(), torch.randn(8, 6)
    prepared(net, [{"op_types": ["Linear"]}], x).train()(x)
    deployed = convert_model(net)
    export_model(deployed, tmp_path / "model.onnx", example_input=x)
    with torch.no_grad():
        assert (run_onnx(tmp_path / "model.onnx", x) - deployed(x)).abs().max() <= 1e-5


class TiedToEmbedding(LightningModule):
    """A linear layer with the table of an embedding, of which some rows can be 0: its grid has other steps there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.fc(self.embed(ids))))
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


IDS = torch.arange(24).reshape(4, 6) % 12


def check_tied(path: Path, deployed: nn.Module) -> None:
    """The file runs as it is with exact sums, which onnxruntime refuses where two nodes dequantize one weight, one for nobody."""
    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert not [node.name for node in graph.node if not read & set(node.output)]
    assert ("Gather", "embed.weight") in {(node.op_type, node.input[0]) for node in graph.node}, "rows of integers are looked up"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    (found,) = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"ids": IDS.numpy()})
    with torch.no_grad():
        assert np.abs(found - deployed(IDS).numpy()).max() <= 1e-5


def test_a_tied_embedding_with_rows_of_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TiedToEmbedding()
    prepared(net, [{"op_types": ["Embedding", "Linear"]}], IDS).train()(IDS)
    with torch.no_grad():
        net.embed.weight[[1, 5]] = 0.0
    deployed = convert_model(net)
    assert not deployed.get_submodule("head").weight[[1, 5]].any(), "the test wants zeros"  # type: ignore[index]
    export_model(deployed, tmp_path / "model.onnx", example_input=IDS)
    check_tied(tmp_path / "model.onnx", deployed)


def test_a_tied_embedding_that_is_pruned(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruning = {
        "config_list": [{"op_names": ["embed"], "target_names": ["weight"], "granularity": "out_channel", "sparse_ratio": 0.25}],
        "stop": "step 1",
        "updates": 1,
    }
    options: dict[str, Any] = {"export": ".onnx", "dirpath": tmp_path, "verbose": 0, "source": "last"}
    callback = QuantFusionCallback("int8", pruning=pruning, **options)
    data = DataLoader(TensorDataset(IDS.repeat(4, 1)), batch_size=4)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(TiedToEmbedding(), data)
    deployed: Any = callback.deployed_model
    assert int((deployed.head.weight == 0).all(1).sum()) == 3, "the test wants rows of zeros"
    check_tied(tmp_path / "model.onnx", deployed)


# -- coming back ------------------------------------------------------------------------------------------------------------


def test_load_deployed_in_a_fresh_process(tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    export_model(deployed, tmp_path / "model.pt2", example_input=X)
    with torch.no_grad():
        torch.save((X, deployed(X)), tmp_path / "pair.pt")
    code = (
        "import sys, torch, lightning_quant; x, y = torch.load(sys.argv[2]);"
        "assert torch.equal(lightning_quant.load_deployed(sys.argv[1])(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt2", tmp_path / "pair.pt"], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", b"x", r"load_deployed reads \.pt2 and \.pt files; run \.onnx files in onnxruntime"),
        ("absent.pt2", None, "there is no such file"),
        ("model.pt2", b"not a zip", "is no file that export_model wrote, or is damaged"),
    ],
)
def test_load_deployed_refuses(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_deployed(tmp_path / name)


# -- models that are not as a file has them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_a_file_of_a_model_in_reference_mode_is_that_of_the_integers(suffix: str, tmp_path: Path) -> None:
    deployed = convert_model(trained(FUSED))
    reference = set_mode(copy.deepcopy(deployed), "reference")
    path = export_model(reference, tmp_path / f"model{suffix}", example_input=X)
    if suffix == ".onnx":
        assert optimized_ops(path, tmp_path / "optimized.onnx")["QLinearConv"] == 2
        assert check_parity(reference, path, [X]).different == 0
    else:
        with torch.no_grad():
            assert torch.equal(load_deployed(path, model=Net())(X), deployed(X))
    assert {getattr(module, "mode", "reference") for module in reference.modules()} == {"reference"}, "the model is left as it is"


def test_a_pt2_file_of_a_model_in_reference_mode_holds_torchs_operators(tmp_path: Path) -> None:
    reference = convert_model(trained(FUSED), mode="reference")
    path = export_model(reference, tmp_path / "model.pt2", example_input=X)
    with torch.no_grad():
        assert torch.equal(load_deployed(path)(X[:5]), reference(X[:5]))
    assert not any("lightning_quant" in str(node.target) for node in nodes_of(load_deployed(path)))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt"])
def test_a_prepared_model_is_to_be_converted_first(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Net is prepared, which is for training; export what convert_model\(model\) returns"):
        export_model(trained(FUSED).eval(), tmp_path / f"model{suffix}", example_input=X)
    path = export_model(convert_model(trained(FUSED)), tmp_path / "model.pt2", example_input=X)
    with pytest.raises(ConfigError, match=r"^Net is prepared"):
        check_parity(trained(FUSED).eval(), path, [X])


def test_a_config_error_of_the_forward_is_said_as_it_is(tmp_path: Path) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ConfigError("this forward refuses.")

    with pytest.raises(ConfigError, match=r"^this forward refuses\."):
        export_model(Refuses().eval(), tmp_path / "model.pt2", example_input=X)


class Partly(nn.Module):
    """A float layer between quantized ones, and a sum in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        out: Tensor = self.b((y.double() - y.double().mean()).to(y.dtype))
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_onnx_file_of_a_model_in_another_dtype_computes_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(2)
    net, x = Partly(), torch.randn(16, 6)
    prepared(net, [{"op_types": ["Linear"]}], x).train()(x)
    single = convert_model(net.to(dtype).float())
    deployed, example = copy.deepcopy(single).to(dtype), x.to(dtype)
    exported = export_with_reports(deployed, tmp_path / "model.onnx", example_input=example, prepared=net.to(dtype))
    assert [value.type.tensor_type.elem_type for value in onnx.load(exported.path).graph.input] == [onnx.TensorProto.FLOAT]
    with torch.no_grad():
        wanted = single(x)
    assert (run_onnx(exported.path, x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert check_parity(deployed, exported.path, [example]).outputs[0].relative <= 1e-5
    assert {p.dtype for p in deployed.parameters()} == {dtype}, "the model is left as it is"


def test_a_forward_that_goes_through_float64_exports(tmp_path: Path) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.double().cumsum(1).sub(0.1))
            return out.float()

    net, x = Doubles(), torch.randn(16, 6)
    with torch.no_grad():
        prepared(net.double(), [{"op_types": ["Linear"]}], x).train()(x)
    assert export_with_reports(convert_model(net), tmp_path / "model.onnx", example_input=x).parity.different == 0


class Placed(nn.Module):
    """Makes positions on the device of what it is given, and keeps a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(12, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        out: Tensor = self.fc(x + self.table(places)) * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)
        return out


def test_a_loaded_program_moves_and_keeps_its_dtypes(tmp_path: Path) -> None:
    net, x = Placed(), torch.randn(5, 12, 6)
    prepared(net, [{"op_types": ["Linear", "Embedding"]}], x).train()(x)
    deployed = convert_model(net)
    path = export_model(deployed, tmp_path / "model.pt2", example_input=x)
    program = load_deployed(path)
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        with pytest.raises(ConfigError, match=r"a loaded program keeps its dtypes: .*before it is exported"):
            convert(program)
    with torch.no_grad():
        assert torch.equal(program.float().to("cpu")(x), deployed(x))
    moved = load_deployed(path).to("meta")
    devices = {str(part) for node in nodes_of(moved) for part in (*node.args, *node.kwargs.values()) if is_device(part)}
    assert devices == {"meta"}
    assert moved(x.to("meta")).device.type == "meta"


def nodes_of(loaded: nn.Module) -> list[torch.fx.Node]:
    program = loaded.get_submodule("program")
    assert isinstance(program, torch.fx.GraphModule)
    return list(program.graph.nodes)


def is_device(value: Any) -> bool:
    return isinstance(value, torch.device)
