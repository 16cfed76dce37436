# SPDX-License-Identifier: Apache-2.0
"""Owns what export_model can be asked for: wrong values are refused before training, and before anything is written."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_callback import TrainerMaker
from test_convert import trained
from torch import Tensor, nn
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, export_model, load_deployed
from lightning_quant.convert import set_mode
from lightning_quant.evaluation import LastBatch
from lightning_quant.execution import execution_report
from lightning_quant.export import check_parity, export_with_reports
from lightning_quant.options import OPTIONS, check_options
from lightning_quant.prepare import prepared_groups

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))

WRONG = [
    (".onnx", {"dynamic_batch": "no"}, "dynamic_batch: expected True or False, got 'no'"),
    (".pt2", {"dynamic_size": 1}, "dynamic_size: expected True or False, got 1"),
    (".onnx", {"signed": "yes"}, "signed: expected True or False, got 'yes'"),
    (".pt", {"reduce_range": None}, "reduce_range: expected True or False, got None"),
    (".pt2", {"atol": -1}, "atol: expected a number, 0 or more, got -1"),
    (".pt2", {"atol": "0.1"}, "atol: expected a number, 0 or more, got '0.1'"),
    (".pt2", {"atol": float("nan")}, "atol: expected a number, 0 or more, got nan"),
    (".onnx", {"min_equal": 2}, "min_equal: expected a number, from 0 to 1, got 2"),
    (".onnx", {"min_int8_share": 90}, "min_int8_share: expected a number, from 0 to 1, got 90"),
    (".onnx", {"min_int8_share": "0.9"}, "min_int8_share: expected a number, from 0 to 1, got '0.9'"),
    (".onnx", {"min_int8_share": True}, "min_int8_share: expected a number, from 0 to 1, got True"),
    (".onnx", {"profile": "tensort"}, "profile: expected one of .*'tensorrt', got 'tensort'. Did you mean 'tensorrt'"),
    (".onnx", {"profile": None}, "profile: expected one of .*, got None"),
    (".pt2", {"profile": "openvino"}, r"profile: for \.onnx files alone, not for \.pt2"),
    (".pt2", {"dialect": "nope"}, "dialect: expected one of 'lightning_quant', 'quantized_decomposed', got 'nope'"),
    (".onnx", {"metadata": "x"}, "metadata: expected a dict of texts, got 'x'"),
    (".onnx", {"metadata": {"a": 1}}, r"metadata: expected a dict of texts, got \{'a': 1\}"),
    (".onnx", {"metadata": {"profile": "mine", "inputs": "none"}}, "metadata: 'inputs', 'profile' would take the place of"),
    (".pt", {"min_int8_share": 0.5}, r"min_int8_share: for \.onnx files alone, not for \.pt\."),
    (".pt", {"atol": 0.1, "min_equal": 0.5}, r"atol, min_equal: for \.onnx and \.pt2 files alone, not for \.pt\."),
    (".pt", {"dynamic_size": True}, r"dynamic_size: for \.onnx and \.pt2 files alone, not for \.pt\."),
    (".onnx", {"atoll": 1}, "unknown option 'atoll'; allowed: example_input, .*dialect. Did you mean 'atol'"),
]


@pytest.mark.parametrize(("suffix", "options", "message"), WRONG, ids=str)
def test_a_wrong_option_is_refused_by_the_constructor_and_before_a_file(
    suffix: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"export\['\{suffix}'\]: {message}"):
        QuantFusionCallback("int8", export={suffix: options})
    with pytest.raises(ConfigError, match=f"^{message}"):
        export_with_reports(nn.Identity().eval(), tmp_path / f"model{suffix}", example_input=X, **options)
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*export\['\.onnx'\]: atol: .*export\['\.onnx'\]: signed: "):
        QuantFusionCallback("int8", export={".onnx": {"atol": -1, "signed": 3}})


def test_the_table_is_the_signature() -> None:
    """Each option has a row with the default of the function, and the default is right for every suffix."""
    parameters = dict(list(inspect.signature(export_model).parameters.items())[2:])
    assert list(parameters) == list(OPTIONS)
    for suffix in (".onnx", ".pt2", ".pt"):
        check_options(suffix, {name: one.default for name, one in parameters.items()})
    check_options(
        ".onnx", {"atol": np.float32(0.1), "min_equal": 1, "min_int8_share": 0, "signed": False, "metadata": {"a": "b"}}
    )


BAD_PATHS = [None, 5]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_what_is_no_path(path: Any) -> None:
    deployed = convert_model(trained(FUSED))
    for call in (
        lambda: export_model(deployed, path, example_input=X),
        lambda: check_parity(deployed, path, [X]),
        lambda: execution_report(path),
        lambda: load_deployed(path),
    ):
        with pytest.raises(ConfigError, match=rf"path: expected a str or a pathlib\.Path, got {path}"):
            call()


def test_what_is_no_model_to_export(tmp_path: Path) -> None:
    wrong: Any = "x"
    with pytest.raises(ConfigError, match="deployed: expected a module, got 'x'; give what convert_model returned"):
        export_model(wrong, tmp_path / "model.pt", example_input=X)
    with pytest.raises(ConfigError, match="deployed: expected a module, got 'x'; give what convert_model returned"):
        set_mode(wrong, "integer")
    deployed = convert_model(trained(FUSED))
    path = export_model(deployed, tmp_path / "model.pt2", example_input=X)
    for suffix in (".onnx", ".pt2", ".pt"):
        with pytest.raises(ConfigError, match=r"Net is on meta; there are no numbers to write"):
            export_model(convert_model(trained(FUSED)).to("meta"), tmp_path / f"other{suffix}", example_input=X)
    with pytest.raises(ConfigError, match="Linear is in train mode"):
        check_parity(nn.Linear(3, 3), path, [X])
    assert [one.name for one in tmp_path.iterdir()] == ["model.pt2"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "model.pt").symlink_to(tmp_path / "there" / "real.pt")
    export_model(convert_model(trained(FUSED)), tmp_path / "model.pt", example_input=X)
    assert (tmp_path / "model.pt").is_symlink()
    assert load_deployed(tmp_path / "there" / "real.pt", model=Net())(X).shape == (8, 4)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.pt", "there"]


# -- before training --------------------------------------------------------------------------------------------------------


def fails(make: TrainerMaker, message: str, config: Any = FUSED, **options: Any) -> None:
    """A fit ends with this message before its first step, and leaves the model as it was."""
    callback, model = QuantFusionCallback(config, verbose=0, **options), Lit()
    trainer = make(max_epochs=1, callbacks=[callback])
    with pytest.raises(ConfigError, match=message):
        trainer.fit(model, loader(), loader(seed=1))
    assert trainer.global_step == 0
    assert not prepared_groups(model)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(ConfigError, match=r"dirpath: expected None, a str or a pathlib\.Path, got 5"):
        QuantFusionCallback(FUSED, export=".pt", dirpath=wrong)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match=r"dirpath: '.*file' is a file; give a folder"):
        QuantFusionCallback(FUSED, export=".pt", dirpath=tmp_path / "file")
    below = tmp_path / "file" / "out"
    fails(quiet_trainer, "dirpath cannot be written: '.*out' is no folder that", export=".pt", dirpath=below)
    (tmp_path / "out" / "model.pt").mkdir(parents=True)
    fails(quiet_trainer, r"dirpath: '.*model\.pt' is a folder, and the name of a file", export=".pt", dirpath=tmp_path / "out")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["model.pt"]


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder that nobody can write to")
def test_a_folder_of_the_system_is_refused_before_training(quiet_trainer: TrainerMaker) -> None:
    fails(quiet_trainer, "dirpath cannot be written: '/sys/x' is no folder that can be written", export=".pt", dirpath="/sys/x")


def test_what_the_plan_rules_out_is_refused_before_training(quiet_trainer: TrainerMaker) -> None:
    message = r"profile='tensorrt': TensorRT knows signed .* of 'conv1\._input_', .* others\. Give .* 'symmetric'"
    fails(quiet_trainer, message, export={".onnx": {"profile": "tensorrt"}})
    export = {".onnx": {"profile": "tensorrt", "signed": False}}
    fails(quiet_trainer, "profile='tensorrt' needs signed activations; leave signed out", export=export)


def test_what_the_plan_allows_is_trained_and_written(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    config = [{**FUSED[0], "quant_dtype": "int8", "quant_scheme": "symmetric"}]
    callback = QuantFusionCallback(config, export={".onnx": {"profile": "tensorrt"}}, dirpath=tmp_path / "out", verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Lit(), loader(), loader(seed=1))
    assert [one.path.name for one in callback.exported] == ["model.onnx"]


def test_a_second_fit_without_validation_is_compared_on_its_own_data(
    quiet_trainer: TrainerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, model = QuantFusionCallback(FUSED, export=".pt", dirpath=tmp_path, verbose=0), Lit()
    like, own = LastBatch.like, []

    def watched(self: LastBatch, example: Any) -> Any:
        own.append(self._seen is not None)
        return like(self, example)

    monkeypatch.setattr(LastBatch, "like", watched)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader(seed=1))
    assert callback._last._seen is None, "no data of the user's is kept once files are written"
    callback._last._seen = ((X,), {})  # of a fit that was interrupted
    quiet_trainer(max_epochs=1, callbacks=[callback], limit_val_batches=0).fit(model, loader(), loader(seed=1))
    assert own == [True, False]


class WithArray(Lit):
    """A forward that is given a numpy array, too."""

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], batch[1].numpy()), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0], batch[1].numpy())


def test_an_array_among_the_arguments_is_no_failure_after_training(quiet_trainer: TrainerMaker, tmp_path: Path) -> None:
    callback = QuantFusionCallback(FUSED, export=".pt", dirpath=tmp_path, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(WithArray(), loader(), loader(seed=1))
    assert [one.path.name for one in callback.exported] == ["model.pt"]
