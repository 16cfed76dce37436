# SPDX-License-Identifier: Apache-2.0
"""Owns LightningCLI: the callback configured from YAML and from the command line, and configs that are saved and fed back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from toys import Lit, loader

from lightning_quant import QuantFusionCallback
from lightning_quant.prepare import learned_parameters

HEAD = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""
OURS = "  callbacks:\n    - class_path: lightning_quant.QuantFusionCallback\n      init_args:\n"
ENTRY = {"op_types": ["Linear"], "fuse_names": [["fc1", "relu3"]]}
QUANT = "- op_types: [Linear]\n  fuse_names: [[fc1, relu3]]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `conf/quant.yaml` in it, and an empty command line."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "quant.yaml").write_text(QUANT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6.6 uses names that jsonargparse 4.53 deprecates
    return tmp_path


def write(path: Path, arguments: dict[str, Any]) -> str:
    """A config for LightningCLI in which our callback has these arguments; returns its path."""
    indented = "".join(f"        {line}\n" for line in yaml.safe_dump(arguments).splitlines())
    path.write_text(HEAD + OURS + indented)
    return str(path)


def cli(*arguments: str) -> LightningCLI:
    return LightningCLI(Lit, run=False, save_config_callback=None, seed_everything_default=0, args=list(arguments))


def callback_of(*arguments: str) -> QuantFusionCallback:
    (found,) = (c for c in cli(*arguments).trainer.callbacks if isinstance(c, QuantFusionCallback))  # type: ignore[attr-defined]
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What --print_config prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli(*arguments, "--print_config")
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def look(callback: QuantFusionCallback) -> dict[str, Any]:
    names = ["config_list", "settings", "schedule", "root", "example_input", "source", "export", "dirpath", "verbose"]
    return {name: getattr(callback, name) for name in (*names, "log_every_n_steps")}


# -- YAML ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [[ENTRY], ["int8", ENTRY], ["int8"], "int8", ENTRY],
    ids=["list", "list with a preset", "list of a preset", "preset", "dict"],
)
def test_inline(folder: Path, config: Any) -> None:
    assert callback_of("--config", write(folder / "conf" / "cli.yaml", {"config_list": config})).config_list == config


@pytest.mark.parametrize("where", ["quant.yaml", "../conf/quant.yaml", "{folder}/conf/quant.yaml"])
def test_a_path_is_relative_to_the_yaml_that_names_it(folder: Path, where: str) -> None:
    (folder / "quant.yaml").write_text("int8")  # the working directory's must not be taken
    config = write(folder / "conf" / "cli.yaml", {"config_list": where.format(folder=folder)})
    assert callback_of("--config", config).config_list == [ENTRY]


def test_settings_may_be_a_path_or_a_dict(folder: Path) -> None:
    settings = {"Linear": {"weight": {"quant_dtype": "int8"}}}
    (folder / "conf" / "settings.yaml").write_text(yaml.safe_dump(settings))
    for given in ("settings.yaml", settings):
        config = write(folder / "conf" / "cli.yaml", {"config_list": "quant.yaml", "settings": given})
        callback = callback_of("--config", config)
        assert callback.settings == settings
        assert callback.config_list == [ENTRY]


SCHEDULE = {
    "observe_start": 3,
    "observe_stop": "80%",
    "quantize_start": 0.5,
    "activations_start": "60%",
    "progressive": 0.75,
    "freeze_batch_norm": "epoch 2",
}


def test_every_argument_from_yaml(folder: Path) -> None:
    arguments = {"config_list": [ENTRY], "schedule": SCHEDULE, "root": "net", "source": "last", "dirpath": "out", "verbose": 0}
    arguments["log_every_n_steps"] = 20
    config = write(folder / "cli.yaml", {**arguments, "export": {".onnx": None, ".pt2": {"atol": 0.1}}})
    callback = callback_of("--config", config)
    assert vars(callback.schedule) == SCHEDULE
    assert [type(moment) for moment in vars(callback.schedule).values()] == [int, str, float, str, float, str]
    assert (callback.root, callback.source, callback.dirpath, callback.verbose) == ("net", "last", "out", 0)
    assert callback.log_every_n_steps == 20
    assert callback.export == {".onnx": {}, ".pt2": {"atol": 0.1}}


@pytest.mark.parametrize("given", [".onnx", [".onnx"], {".onnx": {}}])
def test_export_from_yaml(folder: Path, given: Any) -> None:
    config = write(folder / "cli.yaml", {"config_list": "int8", "export": given})
    assert callback_of("--config", config).export == {".onnx": {}}


# -- the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning_quant.QuantFusionCallback", "QuantFusionCallback"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("int8", "int8"),
        ("conf/quant.yaml", [ENTRY]),
        ('["int8", {"op_types": ["Linear"]}]', ["int8", {"op_types": ["Linear"]}]),
        ("{op_types: [Linear]}", {"op_types": ["Linear"]}),
    ],
)
def test_appended_on_the_command_line(folder: Path, name: str, value: str, expected: Any) -> None:
    (folder / "plain.yaml").write_text(HEAD)
    assert (
        callback_of(
            "--config",
            "plain.yaml",
            f"--trainer.callbacks+={name}",
            f"--trainer.callbacks.config_list={value}",
        ).config_list
        == expected
    )


def test_appended_after_another_and_changed(folder: Path) -> None:
    (folder / "plain.yaml").write_text(HEAD + "  callbacks:\n    - class_path: EarlyStopping\n      init_args: {monitor: a}\n")
    run = cli(
        *("--config", "plain.yaml"),
        "--trainer.callbacks+=QuantFusionCallback",
        "--trainer.callbacks.config_list=int8",
        "--trainer.callbacks.schedule.observe_stop=80%",
        "--trainer.callbacks.export=[.onnx]",
    )
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    assert [type(c) for c in callbacks[:2]] == [EarlyStopping, QuantFusionCallback]
    assert callbacks[1].schedule.observe_stop == "80%"
    assert callbacks[1].export == {".onnx": {}}


def test_an_argument_of_the_yaml_is_changed_on_the_command_line(folder: Path) -> None:
    config = write(folder / "conf" / "cli.yaml", {"config_list": "quant.yaml", "export": [".onnx"]})
    callback = callback_of("--config", config, "--trainer.callbacks.verbose=0")
    assert (callback.config_list, callback.verbose, callback.export) == ([ENTRY], 0, {".onnx": {}})
    (folder / "other.yaml").write_text("op_types: [Conv2d]")
    changed = callback_of("--config", config, "--trainer.callbacks.config_list=other.yaml")
    assert changed.config_list == {"op_types": ["Conv2d"]}  # of the working directory


def test_a_section_of_its_own(folder: Path) -> None:
    class Own(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(QuantFusionCallback, "quant")

    (folder / "conf" / "cli.yaml").write_text(HEAD + "quant:\n  config_list: quant.yaml\n")
    options = ["--config", "conf/cli.yaml", "--quant.verbose=0"]
    run = Own(Lit, run=False, save_config_callback=None, seed_everything_default=0, args=options)
    (callback,) = (c for c in run.trainer.callbacks if isinstance(c, QuantFusionCallback))  # type: ignore[attr-defined]
    assert (callback.config_list, callback.verbose) == ([ENTRY], 0)


def test_a_section_of_its_own_may_be_linked(folder: Path) -> None:
    class Own(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(QuantFusionCallback, "quant")
            parser.link_arguments("trainer.max_epochs", "quant.schedule", compute_fn=frozen_last)
            parser.link_arguments("trainer.default_root_dir", "quant.dirpath")

    (folder / "cli.yaml").write_text(HEAD + "quant:\n  config_list: int8\n  verbose: 0\n")
    options = ["--config", "cli.yaml", "--trainer.max_epochs=3", "--trainer.default_root_dir=out", "--quant.export=[.pt2]"]
    run = Own(Lit, run=False, save_config_callback=None, seed_everything_default=0, args=options)
    (callback,) = (c for c in run.trainer.callbacks if isinstance(c, QuantFusionCallback))  # type: ignore[attr-defined]
    assert callback.schedule.freeze_batch_norm == "epoch 2"
    run.trainer.fit(run.model, loader(), loader())
    assert callback.deployed_model is not None
    assert (folder / "out" / "model.pt2").is_file()


def frozen_last(epochs: int) -> dict[str, str]:
    """A schedule that freezes batch norm in the last of so many epochs."""
    return {"freeze_batch_norm": f"epoch {epochs - 1}"}


Options = dict[str, float]


@pytest.mark.filterwarnings("ignore:.*will be overridden by `LightningCLI.configure_optimizers`")
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(None, {}), ("StepLR", {"step_size": 1, "gamma": 0.5}), ("OneCycleLR", {"max_lr": 0.1, "total_steps": 2})],
)
def test_an_optimizer_of_the_command_line_learns_scales(folder: Path, scheduler: str | None, options: Options) -> None:
    """It is made while the command line is read, before there are scales; the twin makes its own when fit begins."""
    config = write(folder / "cli.yaml", {"config_list": [{"op_types": ["Conv2d", "Linear"], "method": "lsq"}], "verbose": 0})
    given = ["--config", config, "--trainer.max_epochs=2", "--trainer.enable_checkpointing=false"]
    words = [f"--lr_scheduler={scheduler}", *(f"--lr_scheduler.{key}={value}" for key, value in options.items())]
    run = cli(*given, "--optimizer=SGD", "--optimizer.lr=0.1", "--optimizer.momentum=0.9", *(words if scheduler else []))
    twin = cli(*given)

    def configure_optimizers() -> Any:
        optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1, momentum=0.9)
        return ([optimizer], [getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)]) if scheduler else optimizer

    twin.model.configure_optimizers = configure_optimizers
    found = []
    for one in (run, twin):
        one.trainer.fit(one.model, loader(), loader())
        learned = learned_parameters(one.model)
        (optimizer,) = one.trainer.optimizers
        assert {"conv1.weight.scale", "conv1._output_.scale", "fc.weight.scale"} <= set(learned)
        assert all(optimizer.state[parameter]["momentum_buffer"].any() for parameter in learned.values())
        found.append({**learned, **one.model.state_dict()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# -- configs that are fed back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"config_list": "quant.yaml"},
        {"config_list": "int8"},
        {"config_list": ENTRY},
        {"config_list": ["int8", ENTRY], "schedule": SCHEDULE, "export": [".onnx"]},
        {"config_list": "quant.yaml", "settings": "settings.yaml", "export": {".pt2": {"atol": 0.1}}, "dirpath": "out"},
    ],
)
def test_a_printed_config_is_the_same_config_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any]
) -> None:
    (folder / "conf" / "settings.yaml").write_text("Linear: {weight: {quant_dtype: int8}}")
    config = write(folder / "conf" / "cli.yaml", arguments)
    text, expected = printed(capsys, "--config", config), look(callback_of("--config", config))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    Path("printed.yaml").write_text(text)
    assert look(callback_of("--config", "printed.yaml")) == expected
    assert printed(capsys, "--config", "printed.yaml") == text


def test_printing_survives_a_broken_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf" / "quant.yaml").write_text("- op_types: [Linear")
    config = write(folder / "conf" / "cli.yaml", {"config_list": "quant.yaml"})
    (ours,) = yaml.safe_load(printed(capsys, "--config", config))["trainer"]["callbacks"]
    assert ours["init_args"]["config_list"] == str(folder / "conf" / "quant.yaml")


def test_a_saved_config_holds_what_the_file_held(folder: Path) -> None:
    config = write(folder / "conf" / "cli.yaml", {"config_list": "quant.yaml", "schedule": {"observe_stop": "80%"}})
    run = cli("--config", config)
    run.parser.save(run.config, "saved.yaml", multifile=False)
    (folder / "conf" / "quant.yaml").write_text("int8")
    (ours,) = yaml.safe_load(Path("saved.yaml").read_text())["trainer"]["callbacks"]
    assert ours["init_args"]["config_list"] == [ENTRY]
    again = callback_of("--config", "saved.yaml")
    assert again.config_list == [ENTRY]
    assert again.schedule.observe_stop == "80%"


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"config_list": "quant.yml"}, r"'quant.yml' is neither a preset \(int8, .*looked in {folder}/conf\. .*'quant.yaml'"),
        ({"config_list": "int9"}, "'int9' is neither a preset .*Did you mean 'int8'"),
        ({"config_list": [{"op_tipes": ["Linear"]}]}, r"config_list\[0\]: unknown key 'op_tipes'.*Did you mean 'op_types'"),
        ({"config_list": "int8", "settings": "none.yaml"}, "settings: 'none.yaml' is not a file; looked in {folder}/conf"),
        ({"config_list": "int8", "schedule": {"observe_stopp": 3}}, "schedule: unknown key 'observe_stopp'.*'observe_stop'"),
        ({"config_list": "int8", "schedule": {"observe_stop": "180%"}}, "schedule: observe_stop='180%' is no moment"),
        ({"config_list": "int8", "export": [".onx"]}, r"'\.onx'"),
    ],
)
def test_our_words_are_in_the_parsers_error(folder: Path, arguments: dict[str, Any], text: str) -> None:
    config = write(folder / "conf" / "cli.yaml", arguments)
    with pytest.raises(ValueError, match=text.replace("{folder}", str(folder))):
        cli("--config", config)
