# SPDX-License-Identifier: Apache-2.0
"""Owns where configs come from: every kind of source gives the same plain data, every broken one says what to do."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from jsonargparse.typing import Path_fr
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from toys import FUSED, Lit, loader

from lightning_quant import ConfigError, QuantFusionCallback, load_deployed
from lightning_quant.sources import ConfigFile, read_config

PRESETS = ("int8", "w4a8")
ENTRIES = [{"op_types": ["Conv2d", "Linear"], "fuse_names": [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]]}]
YAML = """
- op_types: [Conv2d, Linear]
  fuse_names:
    - [conv1, bn1, relu1]
    - [conv2, bn2, relu2]
"""


def read(source: Any, name: str = "config_list") -> Any:
    return read_config(source, presets=PRESETS if name == "config_list" else (), name=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(source: Any, *parts: str, name: str = "config_list") -> str:
    """The text of the one error that reading gives; it holds all `parts` and begins with the argument's name."""
    with pytest.raises(ConfigError, match=f"^{name}") as caught:
        read(source, name)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert "\n" not in text
    return text


# -- one config, many sources ----------------------------------------------------------------------------------------------


def test_every_container_becomes_lists_and_dicts() -> None:
    assert read(FUSED) == ENTRIES
    assert read(tuple(FUSED)) == ENTRIES
    assert read(collections.deque(FUSED)) == ENTRIES
    assert read([types.MappingProxyType(FUSED[0])]) == ENTRIES
    assert read(OmegaConf.create(ENTRIES)) == ENTRIES
    entry = read(OmegaConf.create(ENTRIES[0]))
    assert entry == ENTRIES[0]
    assert type(entry) is dict
    assert type(entry["fuse_names"][0]) is list


def test_scalars_and_entries_that_are_presets_stay() -> None:
    config = ["int8", {"op_names": ["a"], "quant_dtype": None, "x": 0.5, "y": True, "z": 3, "b": b"ab", 1: ()}]
    assert read(config) == ["int8", {"op_names": ["a"], "quant_dtype": None, "x": 0.5, "y": True, "z": 3, "b": b"ab", "1": []}]
    assert read(None) is None
    assert read(3) == 3


def test_the_result_is_a_copy() -> None:
    config = [{"op_types": ["Linear"]}]
    read(config)[0]["op_types"].append("Conv2d")
    assert config == [{"op_types": ["Linear"]}]


def test_a_preset_is_a_preset_even_where_a_file_has_its_name(folder: Path) -> None:
    (folder / "int8").write_text(YAML)
    assert read("int8") == read(Path("int8")) == read(Path_fr("int8")) == "int8"


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML", ".json"])
@pytest.mark.parametrize("kind", [str, Path, os.path.abspath, Path_fr, ConfigFile])
def test_files_of_both_formats(folder: Path, suffix: str, kind: Callable[[str], Any]) -> None:
    (folder / f"quant{suffix}").write_text(json.dumps(ENTRIES) if suffix == ".json" else YAML)
    assert read(kind(f"quant{suffix}")) == ENTRIES


def test_a_file_may_hold_one_entry_or_a_presets_name_and_a_byte_order_mark(folder: Path) -> None:
    (folder / "one.yaml").write_text("op_types: [Linear]")
    assert read("one.yaml") == {"op_types": ["Linear"]}
    (folder / "preset.yaml").write_text("\ufeffint8  # all of it\n", encoding="utf-8")
    assert read("preset.yaml") == "int8"
    (folder / "preset.json").write_text('["int8", {"op_types": ["Linear"]}]')
    assert read("preset.json") == ["int8", {"op_types": ["Linear"]}]


def test_a_path_may_begin_at_home_or_lie_deeper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / "quant.yaml").write_text(YAML)
    monkeypatch.setenv("HOME", str(folder))
    assert read("conf/quant.yaml") == read("~/conf/quant.yaml") == read(ConfigFile("~/conf/quant.yaml")) == ENTRIES


def test_anchors_and_merge_keys_serve(folder: Path) -> None:
    (folder / "quant.yaml").write_text(
        "- &base\n  op_types: [Linear]\n  quant_dtype: int8\n- <<: *base\n  op_types: [Conv2d]\n- &third\n  <<: *base\n  x: 1\n"
        "- <<: *third\n  x: 2\n"
    )
    linear = {"op_types": ["Linear"], "quant_dtype": "int8"}
    assert read("quant.yaml") == [linear, {**linear, "op_types": ["Conv2d"]}, {**linear, "x": 1}, {**linear, "x": 2}]


def test_a_config_file_stays_where_it_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "quant.yaml").write_text(YAML)
    path = pickle.loads(pickle.dumps(ConfigFile("quant.yaml")))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert read(path) == ENTRIES
    assert (str(path), os.fspath(path), repr(path)) == (
        "quant.yaml",
        os.path.join(folder, "quant.yaml"),
        "ConfigFile('quant.yaml')",
    )


@pytest.mark.parametrize("text", ["int8", "", "a.txt", "a:\nb.yaml", 3, None])
def test_what_is_no_path_is_no_config_file(text: Any) -> None:
    with pytest.raises(ValueError, match=r"expected the path of a \.yaml, \.yml or \.json file, got"):
        ConfigFile(text)


# -- errors: paths ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_folder_and_the_nearest_name(folder: Path) -> None:
    (folder / "quant.yaml").write_text(YAML)
    (folder / "quant.txt").write_text(YAML)
    assert refused("quant.yml") == (
        f"config_list: 'quant.yml' is neither a preset (int8, w4a8) nor a file; looked in {folder}. Did you mean 'quant.yaml'?"
    )
    assert refused("int9") == (
        f"config_list: 'int9' is neither a preset (int8, w4a8) nor a file; looked in {folder}. Did you mean 'int8'?"
    )
    assert refused("zzz").endswith(f"looked in {folder}.")
    assert refused("").endswith(f"looked in {folder}.")
    assert refused("x" * 5000).endswith(f"looked in {folder}.")


def test_a_missing_file_in_a_folder(folder: Path) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / "quant.json").write_text(json.dumps(ENTRIES))
    refused("conf/quants.json", f"looked in {folder / 'conf'}. Did you mean 'conf/quant.json'?")
    refused(ConfigFile("conf/quants.json"), f"looked in {folder / 'conf'}. Did you mean 'conf/quant.json'?")
    refused("cnof/quant.json", f"looked in {folder / 'cnof'}, which does not exist.")


def test_settings_have_no_presets(folder: Path) -> None:
    (folder / "settings.yaml").write_text("Linear: {weight: {quant_dtype: int8}}")
    assert read("settings.yaml", "settings") == {"Linear": {"weight": {"quant_dtype": "int8"}}}
    assert refused("setings.yaml", name="settings") == (
        f"settings: 'setings.yaml' is not a file; looked in {folder}. Did you mean 'settings.yaml'?"
    )
    (folder / "settings.yaml").write_text("int8")
    assert refused("settings.yaml", name="settings") == (
        "settings: settings.yaml holds 'int8'; a config file holds a list or a dict."
    )


def test_a_folder_is_no_file(folder: Path) -> None:
    (folder / "conf").mkdir()
    refused("conf", f"'conf' is a folder ({folder / 'conf'}); give the path of a file", "it holds no .yaml, .yml or .json file.")
    (folder / "conf" / "quant.yml").write_text(YAML)
    refused("conf", "give the path of a file, such as 'quant.yml' in it.")


def test_an_unknown_suffix(folder: Path) -> None:
    (folder / "quant.toml").write_text(YAML)
    assert refused("quant.toml") == "config_list: 'quant.toml' ends in '.toml'; a config file ends in .yaml, .yml or .json."
    (folder / "quant").write_text(YAML)
    refused("quant", "ends in ''")


@pytest.mark.parametrize("text", ["[int8]", "- op_types: [Linear]", '{"op_types": ["Linear"]}', "  [int8]", YAML, "a: 1\nb: 2"])
def test_inline_text_is_not_a_source(text: str) -> None:
    refused(text, "got text that begins with", "give the list itself: in YAML without quotes")


# -- errors: content -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
@pytest.mark.parametrize("text", ["", " \n", "null"])
def test_an_empty_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert refused(name) == (
        f"config_list: {name} is empty; a config file holds a list or a dict, or a preset's name (int8, w4a8)."
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("int9", "holds 'int9'; a config file holds a list or a dict, or a preset's name (int8, w4a8). Did you mean 'int8'?"),
        ("other.yaml", "holds 'other.yaml'"),
        ("3", "holds 3;"),
        ("# nothing\n", "is empty"),
    ],
)
def test_a_file_that_holds_no_config(folder: Path, text: str, part: str) -> None:
    (folder / "a.yaml").write_text(text)
    refused("a.yaml", f"a.yaml {part}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "- op_types: [Linear\n- x\n",
            "a.yaml, line 3, column 1: while parsing a flow sequence, line 1, column 13: expected ',' or ']', but got",
        ),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("- a\n\t- b", "line 2, column 1: while scanning for the next token: found character '\\t' that cannot start any token"),
        ("- !!python/tuple [a, b]", "line 1, column 3: could not determine a constructor for the tag"),
        ("- *gone", "line 1, column 3: found undefined alias 'gone'"),
        ("[a]\n---\n[b]", "line 2, column 1: expected a single document in the stream, line 1, column 1: but found another"),
        ("- {[a]: b}", "line 1, column 4: while constructing a mapping, line 1, column 3: found unhashable key"),
        ("- a\x00", "a.yaml: unacceptable character #x0000: special characters are not allowed"),
        ("- 2026-13-01", "a.yaml: month must be in 1..12; correct the file."),
        ("- op: 1\n  x: 2\n  op: 3", "a.yaml, line 3, column 3: the key 'op' stands twice in one mapping, first in line 1;"),
        ("- a: {b: 1, c: {d: 2, d: 3}}", "line 1, column 23: the key 'd' stands twice"),
    ],
)
def test_yaml_that_cannot_be_read(folder: Path, text: str, part: str) -> None:
    (folder / "a.yaml").write_text(text)
    refused("a.yaml", part, "; correct the ")


def test_a_list_that_contains_itself(folder: Path) -> None:
    (folder / "a.yaml").write_text("- &a {op_types: [Linear], x: [*a]}\n- *a")
    assert refused("a.yaml") == "config_list[0]['x'][0]: this dict contains itself; write out what is meant."


def test_json_that_cannot_be_read(folder: Path) -> None:
    (folder / "a.json").write_text('[\n  {"op_types": ["Linear"]}')
    refused("a.json", "a.json, line 2, column 27: Expecting ',' delimiter; correct the JSON.")
    (folder / "a.json").write_text('[{"op_types": ["Linear"], "target_settings": {"weight": {"x": 1, "y": 2, "x": 3}}}]')
    assert refused("a.json") == (
        "config_list: a.json: the key 'x' stands twice in the object with the keys x, y; remove one of the two."
    )


def test_a_file_that_is_not_utf8(folder: Path) -> None:
    (folder / "a.yaml").write_bytes("- caf\u00e9".encode("latin-1"))
    refused("a.yaml", "a.yaml is not UTF-8:", "at byte 5; save it as UTF-8.")


def test_a_file_that_cannot_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (folder / "a.yaml").write_text(YAML)
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert refused("a.yaml") == "config_list: a.yaml cannot be read: Permission denied."


# -- errors: containers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ([{"op_types": "${nope}"}], "[0]['op_types']: cannot be read from its DictConfig: InterpolationKeyError: Inter"),
        ([{"op_types": ["a", "${nope}"]}], "[0]['op_types'][1]: cannot be read from its ListConfig"),
        ([{"op_types": "???"}], "[0]['op_types']: cannot be read from its DictConfig: MissingMandatoryValue"),
        (["${oc.env:NOT_SET_ANYWHERE}"], "[0]: cannot be read from its ListConfig: InterpolationResolutionError"),
        ({"op_types": "${oc.nope:1}"}, "['op_types']: cannot be read from its DictConfig: UnsupportedInterpolationType"),
    ],
)
def test_interpolations_that_lead_nowhere(config: Any, part: str) -> None:
    refused(
        OmegaConf.create({"list": config})["list"], f"config_list{part}", "give the value, or what the interpolation refers to."
    )


def test_any_container_that_fails_says_where() -> None:
    class Broken(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise RuntimeError

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    refused([Broken()], "config_list[0]['a']: cannot be read from its Broken: RuntimeError: ;")


# -- the callback ----------------------------------------------------------------------------------------------------------


def test_the_callback_reads_both_arguments(folder: Path) -> None:
    (folder / "quant.yaml").write_text(YAML)
    (folder / "settings.json").write_text('{"Linear": {"weight": {"quant_dtype": "int8"}}}')
    callback = QuantFusionCallback("quant.yaml", settings="settings.json")
    assert callback.config_list == ENTRIES
    assert callback.settings == {"Linear": {"weight": {"quant_dtype": "int8"}}}
    assert QuantFusionCallback(FUSED).settings is None
    assert QuantFusionCallback("int8").config_list == "int8"
    assert QuantFusionCallback(["int8", *FUSED]).config_list == ["int8", *ENTRIES]
    assert QuantFusionCallback(FUSED[0]).config_list == ENTRIES[0]
    with pytest.raises(ConfigError, match=re.escape("settings: 'none.yaml' is not a file; looked in")):
        QuantFusionCallback(FUSED, settings="none.yaml")
    with pytest.raises(ConfigError, match=re.escape("settings['Linear']['weight']: unknown key 'quant_dtyp'")):
        QuantFusionCallback(FUSED, settings={"Linear": {"weight": {"quant_dtyp": "int8"}}})
    (folder / "quant.yaml").write_text("- op_tipes: [Linear]")
    with pytest.raises(ConfigError, match=re.escape("config_list[0]: unknown key 'op_tipes'")):
        QuantFusionCallback("quant.yaml")


def test_hydra_instantiates_the_callback(folder: Path) -> None:
    (folder / "settings.yaml").write_text("Linear: {weight: {quant_dtype: int8}}")
    config = OmegaConf.create(
        {
            "types": ["Conv2d", "Linear"],
            "callback": {
                "_target_": "lightning_quant.QuantFusionCallback",
                "config_list": [{**ENTRIES[0], "op_types": "${types}"}],
                "settings": "settings.yaml",
                "schedule": {"observe_stop": "80%", "freeze_batch_norm": "epoch 8"},
                "export": [".onnx"],
            },
        }
    )
    callback = instantiate(config.callback)
    assert isinstance(callback, QuantFusionCallback)
    assert callback.config_list == ENTRIES
    assert type(callback.config_list[0]["op_types"]) is list
    assert callback.settings == {"Linear": {"weight": {"quant_dtype": "int8"}}}
    assert (callback.schedule.observe_stop, callback.schedule.freeze_batch_norm) == ("80%", "epoch 8")
    assert callback.export == {".onnx": {}}


def test_hydra_instantiates_a_run_that_trains(folder: Path) -> None:
    """As lightning-hydra-template does it: callbacks one by one, then the trainer with all of them; nothing is converted."""
    config = OmegaConf.create(
        {
            "types": ["Conv2d", "Linear"],
            "epochs": 2,
            "model": {"_target_": "toys.Lit", "lr": 0.03},
            "callbacks": {
                "quant": {
                    "_target_": "lightning_quant.QuantFusionCallback",
                    "config_list": [{**ENTRIES[0], "op_types": "${types}"}],
                    "schedule": {"freeze_batch_norm": "epoch 1", "observe_stop": "80%"},
                    "settings": {"Linear": {"weight": {"granularity": "per_tensor"}}},
                    "calibration": {"batches": 2},
                    "export": {".pt2": {"atol": 0.1}},
                    "dirpath": "out",
                    "verbose": 0,
                },
                "none": None,
            },
            "trainer": {
                "_target_": "lightning.pytorch.Trainer",
                "max_epochs": "${epochs}",
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": "out",
            },
        }
    )
    callbacks = [instantiate(one) for one in config.callbacks.values() if one is not None]
    model, trainer = instantiate(config.model), instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, loader(), loader())
    plan, deployed = callbacks[0].plan, callbacks[0].deployed_model
    groups = [(layer.name, layer.fused_with) for layer in plan.layers]
    assert groups == [("conv1", ("bn1", "relu1")), ("conv2", ("bn2", "relu2")), ("fc", ())]
    assert plan.layers[2].targets["weight"].spec.granularity == "per_tensor"
    images = next(iter(loader(seed=1)))[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(images), deployed(images))
        assert torch.equal(load_deployed("out/model.pt2")(images), deployed(images))
    (path,) = Path("out/checkpoints").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["callbacks"]["QuantFusionCallback"]["config_list"] == ENTRIES


def test_settings_of_a_file_reach_the_plan(quiet_trainer: Callable[..., Trainer], folder: Path) -> None:
    (folder / "settings.yaml").write_text("Linear: {weight: {granularity: per_tensor}}")
    callback = QuantFusionCallback([{"op_types": ["Linear", "Conv2d"]}], settings="settings.yaml", verbose=0)
    quiet_trainer(max_steps=1, callbacks=[callback]).fit(Lit(), loader(), loader())
    assert callback.plan is not None
    weights = {layer.name: layer.targets["weight"].spec.granularity for layer in callback.plan.layers}
    assert weights == {"conv1": "out_channel", "conv2": "out_channel", "fc": "per_tensor"}


def test_a_checkpoint_with_hydras_config_loads_weights_only(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = quiet_trainer(max_steps=2, callbacks=[QuantFusionCallback(OmegaConf.create(ENTRIES), verbose=0)])
    trainer.fit(Lit(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["QuantFusionCallback"]
    assert state["config_list"] == ENTRIES
