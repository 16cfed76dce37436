# SPDX-License-Identifier: Apache-2.0
"""Owns `python -m lightning_quant`: what its commands write and say, that a saved config gives the same run, the example."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback, formats, load_deployed, make_plan
from lightning_quant.__main__ import main
from lightning_quant.export import onnxruntime_session
from lightning_quant.onnx_graph import write_onnx

ROOT = Path(__file__).parents[1]
HERE = __name__
ENTRY: dict[str, Any] = {**FUSED[0], "fuse_names": [list(group) for group in FUSED[0]["fuse_names"]]}


class Toys(LightningDataModule):
    """64 random images, in an order that the seed decides."""

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(shuffle=True)

    def val_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(seed=1)

    def test_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(seed=2)

    def predict_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(seed=2)


class Untrained(Lit):
    """Must not be trained."""

    def on_train_start(self) -> None:
        raise AssertionError("a fit began")


class Alone(Lit):
    """Brings its data and its callback."""

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(shuffle=True)

    def val_dataloader(self) -> TRAIN_DATALOADERS:
        return loader(seed=1)

    def configure_callbacks(self) -> QuantFusionCallback:
        return QuantFusionCallback([ENTRY], verbose=0)


class NoTuning(BatchSizeFinder):
    """Must not run."""

    def on_fit_start(self, *_: Any) -> None:
        raise AssertionError("another callback's fit began")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6.6 uses names that jsonargparse 4.53 deprecates
    return tmp_path


def written(path: Path, callback: dict[str, Any] | None = None, *, model: str = "toys.Lit", **trainer: Any) -> str:
    """A config for the command line with our callback, its arguments being `callback`; returns its path."""
    keeper = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_loss", "filename": "best", "save_last": True}}
    ours = {"class_path": "lightning_quant.QuantFusionCallback", "init_args": callback or {"config_list": [ENTRY]}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {
        "trainer": {"max_epochs": 2, "callbacks": [keeper, ours], "default_root_dir": "out", **quiet, **trainer},
        "model": {"class_path": model},
        "data": {"class_path": f"{HERE}.Toys"},
    }
    path.write_text(yaml.safe_dump(config))
    return str(path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr."""
    return capsys.readouterr().err.splitlines()[-1]


def checkpoint(path: str | Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())


# -- fit and its config ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and `out`, which a fit wrote to."""
    made = tmp_path_factory.mktemp("made")
    with contextlib.chdir(made), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        config = written(made / "config.yaml", {"config_list": [ENTRY], "export": [".pt2"], "verbose": 0})
        assert main(["fit", "--config", config, "--seed_everything=7"]) == 0
    return made


@pytest.fixture
def fitted(made: Path, folder: Path) -> Path:
    """The folder that a fit wrote to, in the working directory."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder / "out"


def test_a_saved_config_gives_the_same_run(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["fit", "--config", str(fitted / "config.yaml"), "--trainer.default_root_dir=again"]
    assert main(again) == 0
    assert main([*again, "--seed_everything=0", "--trainer.default_root_dir=other"]) == 0
    first, second, other = (checkpoint(fitted.parent / name / "checkpoints" / "last.ckpt") for name in ("out", "again", "other"))
    assert first["callbacks"]["QuantFusionCallback"]["quantizers"] == second["callbacks"]["QuantFusionCallback"]["quantizers"]
    assert same_weights(first, second)
    assert not same_weights(first, other)
    images = loader(seed=3).dataset[:8][0]
    one, two = (load_deployed(fitted.parent / name / "model.pt2")(images) for name in ("out", "again"))
    assert torch.equal(one, two)
    capsys.readouterr()
    plans = []
    for config in (fitted.parent / "config.yaml", fitted / "config.yaml"):
        assert main(["plan", "--config", str(config)]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert "conv1   bn1, relu1" in plans[0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_the_config_stays_that_of_the_last_fit_that_began(fitted: Path) -> None:
    saved = (fitted / "config.yaml").read_text()
    config, best = str(fitted / "config.yaml"), str(fitted / "checkpoints" / "best.ckpt")
    for command in ("validate", "test", "predict"):
        assert main([command, "--config", config, "--ckpt_path", best, "--trainer.max_epochs=7"]) == 0
    assert main(["fit", "--config", config, "--trainer.callbacks.config_list=[{op_names: [conv9]}]"]) == 2
    assert (fitted / "config.yaml").read_text() == saved, "no fit began"
    assert main(["fit", "--config", config, "--trainer.max_epochs=3"]) == 0
    assert yaml.safe_load((fitted / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_fit_is_resumed(fitted: Path) -> None:
    """The checkpoint is named before the file, which says `ckpt_path: null`."""
    last_one = str(fitted / "checkpoints" / "last.ckpt")
    more = ["--trainer.max_epochs=3", "--trainer.default_root_dir=more"]
    more += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=end"]
    assert main(["fit", "--ckpt_path", last_one, "--config", str(fitted / "config.yaml"), *more]) == 0
    resumed = checkpoint("more/checkpoints/end.ckpt")
    assert (resumed["epoch"], resumed["global_step"]) == (2, 12)


# -- plan ------------------------------------------------------------------------------------------------------------------


def test_plan_shows_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"config_list": [ENTRY], "export": [".onnx"], "calibration": {"batches": 4, "equalize": True}, "root": None}
    config = written(folder / "config.yaml", callback, model=f"{HERE}.Untrained", logger={"class_path": "CSVLogger"})
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["logger"]["init_args"] = {"save_dir": "logs"}
    content["trainer"]["callbacks"].append({"class_path": f"{HERE}.NoTuning"})
    Path(config).write_text(yaml.safe_dump(content))
    before = files(folder)
    assert main(["plan", "--config", config]) == 0
    assert files(folder) == before
    expected = make_plan(Lit(), [ENTRY], example_input=next(iter(loader()))[0])
    assert capsys.readouterr().out == f"{expected}\n"


def test_plan_of_a_config_for_another_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine: dict[str, Any] = {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "ddp", "sync_batchnorm": True}
    config = written(folder / "config.yaml", **machine, profiler="simple", fast_dev_run=True)
    assert main(["plan", "--config", config]) == 0
    assert "conv1   bn1, relu1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config_list", "text"),
    [
        ([ENTRY, {"op_tipes": ["Linear"]}], r"config_list\[1\]: unknown key 'op_tipes'; .* Did you mean 'op_types'\?$"),
        ([{"op_types": ["Linear"]}, {"op_names": ["conv3"]}], r"config_list\[1\].*op_names.*'conv3'.*'conv1'"),
        (
            [{"op_types": ["Conv2d"], "fuse_names": [["conv1", "bn2"]]}],
            r"config_list\[0\]: fuse_names \('conv1', 'bn2'\): .*'bn1'",
        ),
    ],
    ids=["an unknown key", "an unknown module", "a pair that cannot fuse"],
)
@pytest.mark.parametrize("command", ["plan", "fit"])
@pytest.mark.parametrize("single", [False, True], ids=["a list of callbacks", "a single callback"])
def test_our_errors_are_one_last_line(
    folder: Path, capsys: pytest.CaptureFixture[str], config_list: Any, text: str, command: str, single: bool
) -> None:
    config = written(folder / "config.yaml", {"config_list": config_list})
    if single:
        content = yaml.safe_load(Path(config).read_text())
        content["trainer"]["callbacks"] = content["trainer"]["callbacks"][1]
        Path(config).write_text(yaml.safe_dump(content))
    assert main([command, "--config", config]) == 2
    said = last(capsys)
    assert re.match(rf"python -m lightning_quant: error: {text}", said), said
    assert not (folder / "out").exists()


def test_a_misspelt_argument_of_the_callback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder / "config.yaml", callbacks=None)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", config, "--trainer.callbacks+=QuantFusionCallback", "--trainer.callbacks.config_lst=int8"])
    assert ended.value.code == 2
    text = "Option 'config_lst' is not accepted. Did you mean 'config_list'?"
    assert last(capsys) == f"error: trainer.callbacks: QuantFusionCallback: {text}"


def test_a_callback_with_nothing_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder / "config.yaml", callbacks=None)
    assert main(["plan", "--config", config, "--trainer.callbacks+=QuantFusionCallback", "--trainer.callbacks.verbose=1"]) == 2
    assert "QuantFusionCallback: nothing to do; give config_list" in last(capsys)


def test_a_plan_of_all_three(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning, distillation = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], [{"op_names": ["relu1"]}]
    arguments = {"config_list": [ENTRY], "pruning": pruning, "distillation": distillation, "teacher": "self"}
    assert main(["plan", "--config", written(folder / "config.yaml", arguments)]) == 0
    quantized, masked, taught = capsys.readouterr().out.split("\n\n")
    assert "conv1" in quantized and "int8" in quantized
    assert re.search(r"conv1 +weight +0\.5 +l1", masked)
    assert re.search(r"relu1\._output_ +relu1 +mse +1 ", taught)


def test_a_misspelt_argument_in_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder / "config.yaml", {"config_list": "int8", "shedule": {"observe_stop": "80%"}})
    with pytest.raises(SystemExit):
        main(["fit", "--config", config])
    assert last(capsys).endswith("QuantFusionCallback: Option 'shedule.observe_stop' is not accepted. Did you mean 'schedule'?")


def test_a_config_without_the_callback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder / "config.yaml", callbacks=None)
    assert main(["plan", "--config", config]) == 2
    assert "trainer.callbacks: the config has no QuantFusionCallback" in last(capsys)


def test_errors_of_others_stay_as_they_are(folder: Path) -> None:
    config = written(folder / "config.yaml", model=f"{HERE}.Untrained")
    with pytest.raises(AssertionError, match="a fit began"):
        main(["fit", "--config", config])


def test_a_model_with_data_and_callback_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(written(folder / "config.yaml", model=f"{HERE}.Alone"))
    content = yaml.safe_load(config.read_text())
    del content["data"], content["trainer"]["callbacks"][1]
    config.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert main(["plan", "--config", str(config)]) == 0
    assert "conv1   bn1, relu1" in capsys.readouterr().out
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["export", "--config", str(config), "--ckpt=out/checkpoints/best.ckpt", "--format=pt2"]) == 0
    assert outputs(Path("out/checkpoints/best.pt2")).shape == (16, 4)


# -- export ----------------------------------------------------------------------------------------------------------------


def outputs(path: Path) -> torch.Tensor:
    images = next(iter(loader(seed=4)))[0]
    if path.suffix == ".pt2":
        found: torch.Tensor = load_deployed(path)(images)
        return found
    session = onnxruntime_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def test_export_writes_what_fit_wrote(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, best = str(fitted / "config.yaml"), str(fitted / "checkpoints" / "best.ckpt")
    capsys.readouterr()
    assert main(["export", "--ckpt", best, "--config", config, "--format", "pt2"]) == 0
    made = fitted / "checkpoints" / "best.pt2"
    wrote, summary = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {made}"
    assert " integers equal; outputs equal" in summary
    assert torch.equal(outputs(made), outputs(fitted / "model.pt2"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="onnxruntime's default")
        assert main(["export", "--config", config, f"--ckpt_path={best}", "--output", "deep/er/net.onnx"]) == 0
    assert torch.allclose(outputs(Path("deep/er/net.onnx")), outputs(made), atol=1e-4)
    said = {entry.key: entry.value for entry in onnx.load("deep/er/net.onnx").metadata_props}
    assert json.loads(said["lightning_quant.config_list"]) == [ENTRY]
    assert {path.name for path in (fitted / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "best.pt2"}


def test_export_takes_a_checkpoint_of_a_fit_in_python(folder: Path) -> None:
    """Its hyperparameters do not name the model's class, so the config's arguments count."""
    config = written(folder / "config.yaml", {"config_list": [ENTRY], "verbose": 0})
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback := QuantFusionCallback([ENTRY], verbose=0)],
    )
    trainer.fit(Lit(lr=0.03), loader(), loader())
    trainer.save_checkpoint("made.ckpt")
    assert callback.deployed_model is not None
    assert main(["export", "--config", config, "--ckpt", "made.ckpt", "--output", "made.pt2", "--dynamic_batch=false"]) == 0
    assert torch.equal(outputs(Path("made.pt2")), callback.deployed_model(next(iter(loader(seed=4)))[0]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "ckpt_path: no checkpoint is named; give --ckpt_path"),
        (["--ckpt=out/checkpoints/bst.ckpt"], r"there is no file .*looked in .*out/checkpoints\. Did you mean '.*best\.ckpt'"),
        (["--ckpt=nowhere/best.ckpt"], "looked in .*nowhere, which does not exist"),
        (["--ckpt=out/checkpoints/best.ckpt", "--format=pt2", "--output=a.onnx"], r"output: 'a\.onnx' does not end in \.pt2"),
        (["--ckpt=out/checkpoints/best.ckpt", "--atol=-1"], r"atol: expected a number, 0 or more, got -1\.0"),
        (["--ckpt=out/checkpoints/best.ckpt", "--min_equal=2"], r"min_equal: expected a number, from 0 to 1, got 2\.0"),
        (["--ckpt=out/checkpoints/best.ckpt", "--format=pt2", "--signed=true"], r"signed: for \.onnx files alone, not for \.pt2"),
        (
            ["--ckpt=out/checkpoints/best.ckpt", "--dialect=quantized_decomposed"],
            r"dialect: for \.pt2 files alone, not for \.onnx",
        ),
        (
            ["--ckpt=out/checkpoints/best.ckpt", "--output=a.bin"],
            r"output 'a\.bin': unknown suffix '\.bin'; known: \.onnx, \.pt2",
        ),
        (["--ckpt=float.ckpt"], "ckpt_path: 'float.ckpt' holds nothing of QuantFusionCallback"),
        (["--ckpt=early.ckpt"], "no quantized training step was run, so there is nothing to export"),
        (
            ["--ckpt=out/checkpoints/best.ckpt", "--trainer.callbacks.config_list=int8-weight-only"],
            "was saved under another config_list: .*'int8-weight-only' here",
        ),
    ],
)
def test_what_cannot_be_exported(fitted: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    saved = checkpoint(fitted / "checkpoints" / "best.ckpt")
    state = saved["callbacks"].pop("QuantFusionCallback")
    torch.save(saved, "float.ckpt")
    state["phase"]["quantize"], state["rounds_all"] = False, False
    torch.save({**saved, "callbacks": {"QuantFusionCallback": state}}, "early.ckpt")
    before = files(fitted.parent)
    assert main(["export", "--config", str(fitted / "config.yaml"), *arguments]) == 2
    said = last(capsys)
    assert re.search(f"^python -m lightning_quant: error: .*{text}", said), said
    assert files(fitted.parent) == before


def test_a_file_that_computes_something_else_is_not_written(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(program: Any, path: Path, **choices: Any) -> None:
        write_onnx(program, path, **choices)
        model = onnx.load(path)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims)
        tensor.raw_data = bytes(len(tensor.raw_data))
        onnx.save(model, path)

    monkeypatch.setitem(formats.FORMATS, ".onnx", (write, formats.run_onnx))
    options = ["--config", str(fitted / "config.yaml"), "--ckpt", str(fitted / "checkpoints" / "best.ckpt"), "--output=a.onnx"]
    assert main(["export", *options]) == 1
    assert "a.onnx: output 0 differs from the deployed model's by" in last(capsys)
    assert not Path("a.onnx").exists()


# -- report ----------------------------------------------------------------------------------------------------------------


def test_report_shows_the_checkpoints_layers(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--config", str(fitted / "config.yaml"), "--ckpt", str(fitted / "checkpoints" / "best.ckpt")]
    assert main(["report", *options, "--html=report.html"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("conv1", "conv2", "fc"))
    assert "conv1" in Path("report.html").read_text()
    assert main(["report", *options, "--html=new/folder/report.html"]) == 0
    assert Path("new/folder/report.html").read_text() == Path("report.html").read_text()


def test_report_shows_what_pruning_removes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    options = ["--config", written(folder / "fit.yaml", {"config_list": [ENTRY], "pruning": pruning, "verbose": 0})]
    assert main(["fit", *options]) == 0
    capsys.readouterr()
    (checkpoint,) = Path("out").rglob("last.ckpt")
    assert main(["report", *options, "--ckpt", str(checkpoint)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all(word in lines["layer"] for word in ("weight dB", "sparsity", "mult-adds", "stored"))
    assert "50.0 %" in lines["conv1"] and "232 -> 116" in lines["conv1"]
    assert "592 -> 152" in lines["conv2"] and "1,340 -> 528" in lines["total"]
    assert "as it came in float" in lines["5.5"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["report", "--html=report.html"], "html: 'report.html' cannot be written: .*; give another place"),
        (["report", "--html=config.yaml/report.html"], "html: 'config.yaml/report.html' cannot be written: "),
        (["export", "--output=config.yaml/a.pt2"], "output 'config.yaml/a.pt2' cannot be written: "),
    ],
)
def test_where_nothing_can_be_written(fitted: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    Path("report.html").mkdir()
    Path("config.yaml").write_text("a file, no folder")
    given = ["--config", str(fitted / "config.yaml"), "--ckpt", str(fitted / "checkpoints" / "best.ckpt")]
    command, *rest = arguments
    assert main([command, *given, *rest]) == 2
    said = last(capsys)
    assert re.search(f"^python -m lightning_quant: error: {text}", said), said


# -- the words -------------------------------------------------------------------------------------------------------------


def test_without_jsonargparse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["fit"]) == 2
    assert last(capsys) == "python -m lightning_quant needs jsonargparse: pip install 'lightning_quant[cli]'"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What --help or --print_config prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The same in one line."""
    return " ".join(printed(capsys, *arguments).split())


def test_help_explains_every_argument_of_the_callback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = helped(capsys, "fit", "--trainer.callbacks.help=QuantFusionCallback")
    documented = inspect.getdoc(QuantFusionCallback) or ""
    for name in list(inspect.signature(QuantFusionCallback).parameters):
        (text,) = re.findall(rf"^    {name}: (.*)$", documented, flags=re.MULTILINE)
        assert f"--trainer.callbacks.{name}" in said
        assert " ".join(text.split())[:60] in said, name


def test_help_explains_our_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = helped(capsys, "export", "--help")
    assert "--ckpt_path CKPT_PATH, --ckpt CKPT_PATH The checkpoint: one that was saved in a fit" in said
    assert "onnx, pt2 or pt (numbers and a manifest); left out, the output's suffix, else onnx" in said
    assert "--weights_only" not in said
    everything = helped(capsys, "--help")
    assert all(name in everything for name in ("fit", "validate", "test", "predict", "plan", "export", "report"))


def test_the_readmes_lines_are_commands(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split() for line in block.splitlines()]
    assert [line[:4] for line in lines] == [["$", ".venv/bin/python", "-m", "lightning_quant"]] * len(lines)
    assert {line[4] for line in lines} == {"plan", "fit", "test", "export", "report"}
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    saved = folder / "config.yaml"
    saved.write_text(printed(capsys, "fit", "--config", "examples/mnist.yaml", "--print_config"))
    for _, _, _, _, *arguments in lines:
        given = [str(saved) if word == "mnist_out/config.yaml" else word for word in arguments]
        assert yaml.safe_load(printed(capsys, *given, "--print_config"))["model"]["class_path"] == "examples.mnist.Mnist"


# -- the example, as a user runs it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python -m lightning_quant fit --config examples/mnist.yaml` wrote to; half as long as it is."""
    out = tmp_path_factory.mktemp("out")
    options = [f"--trainer.default_root_dir={out}", "--trainer.max_epochs=3"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_quant", "fit", "--config", "examples/mnist.yaml", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conv1   batchnorm1, relu1" in done.stderr
    return out


def test_the_example_writes_a_model_a_checkpoint_and_its_config(example: Path) -> None:
    assert set(files(example)) == {"model.onnx", "config.yaml", "checkpoints/best.ckpt"}
    onnx.checker.check_model(example / "model.onnx")
    state = checkpoint(example / "checkpoints" / "best.ckpt")["callbacks"]["QuantFusionCallback"]
    assert state["config_list"] == yaml.safe_load((ROOT / "examples" / "quant.yaml").read_text())
    said = {entry.key: entry.value for entry in onnx.load(example / "model.onnx").metadata_props}
    assert json.loads(said["lightning_quant.config_list"]) == state["config_list"]


def test_the_examples_checkpoint_and_its_file_read_digits_alike(
    example: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    best = str(example / "checkpoints" / "best.ckpt")
    capsys.readouterr()
    assert main(["test", "--config", str(example / "config.yaml"), "--ckpt_path", best]) == 0
    (accuracy,) = (float(line.split("│")[2]) for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert not list(folder.iterdir()), "everything is written to default_root_dir"
    data = importlib.import_module("examples.mnist").MnistData()
    data.setup("test")
    session = onnxruntime_session(example / "model.onnx")
    (name,) = (value.name for value in session.get_inputs())
    right = [session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy() for x, y in data.test_dataloader()]
    assert accuracy == pytest.approx(np.concatenate(right).mean(), abs=1e-6)
    assert accuracy >= 0.95


def test_the_examples_config_names_every_argument_of_the_callback() -> None:
    text = (ROOT / "examples" / "mnist.yaml").read_text()
    for name in inspect.signature(QuantFusionCallback).parameters:
        assert re.search(rf"^        (# )?{name}:", text, flags=re.MULTILINE), name
