# SPDX-License-Identifier: Apache-2.0
"""Owns training in several processes: two of them agree with each other, and with one that has the data of both."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from toys import FUSED, Lit, Net, loader

from lightning_quant import ConfigError, QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.delivery import Handover, fingerprint, hand_over
from lightning_quant.group import group_of
from lightning_quant.learned import First
from lightning_quant.prepare import load_quantizer_state, members_of, relink, restore_model
from lightning_quant.ranks import SHARDED, Ranks, check_strategy, folded, from_all, interleaved, room, together

TESTS = Path(__file__).parent
INF = math.inf


def started(folder: Path, last: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", **variables}
    command: list[str | Path] = [sys.executable, TESTS / "two_processes.py", folder, last]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> None:
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every scenario returned in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "two"}
    ranks = ("0", "1")
    ended([started(folder, rank, RANK=rank, LOCAL_RANK=rank, **environment) for rank in ranks])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in ranks]


def differences(a: Any, b: Any, path: str = "") -> dict[str, float]:
    """Where two nested results differ, and by how much; tensors and numbers relative to the greatest, or to 0.1."""
    if isinstance(a, dict):
        assert set(a) == set(b), path
        return {where: how for key in a for where, how in differences(a[key], b[key], f"{path}/{key}").items()}
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        parts = [differences(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return {where: how for part in parts for where, how in part.items()}
    if isinstance(a, Tensor | float):
        x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        assert x.shape == y.shape, path
        return {} if torch.equal(x, y) else {path: float((x - y).abs().max() / x.abs().max().clamp(min=0.1))}
    return {} if a == b else {path: INF}


# -- both processes ------------------------------------------------------------------------------------------------------

LOCAL = {"failures", "synced", "whole"}  # some of what these return is a process's own


@pytest.mark.parametrize("name", sorted(({*two_processes.SCENARIOS, *two_processes.ONLY_TWO}) - LOCAL))
def test_both_processes_hold_the_same_numbers(name: str, two: list[dict[str, Any]]) -> None:
    """Acceptance behaviour 12: ranges, scales and weights, bit for bit; they saw different data."""
    assert two[0][name]
    assert differences(two[0][name], two[1][name]) == {}


def test_the_shares_of_the_processes_differ(two: list[dict[str, Any]]) -> None:
    """So that what is equal was merged: a process alone has another range."""
    x = torch.cat([x[: two_processes.BATCH] for x, _ in two_processes.batches((6,), 1)])
    merged = two[0]["observed"]["quantizers"]["a._input_"]
    assert merged["low"] < 2 * float(x.min())


EXACT = [name for name in two_processes.SCENARIOS if name.startswith("meet")] + ["observed", "calibrated"]


@pytest.mark.parametrize("name", EXACT)
def test_ranges_are_those_of_one_process_that_has_all_data(name: str, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """Acceptance behaviour 12, the other half; calibrated: equalized, biases corrected, rounding learned, too."""
    one = two_processes.SCENARIOS[name](tmp_path)
    assert differences(one, two[0][name]) == {}
    if name.startswith("meet"):
        states = [str(state) for state in one["states"]]
        assert len(set(states)) >= 4, "the meetings move the range"
        assert states[-2] != states[-1]


@pytest.mark.parametrize("name", ["learned", "learned static", "learned accumulated", "manual"])
def test_learned_scales_are_trained_as_in_one_process(name: str, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """Acceptance behaviour 13: behind a float beginning, which the reducer would call unused parameters.

    Sums in another order make some parts in a million, more where gradients cancel (offsets).
    """
    one = two_processes.SCENARIOS[name](tmp_path)
    found = differences(one, two[0][name])
    assert len(one["scales"]) == 17
    assert max(found.values()) < 1e-4, found
    start = {name: scale for name, scale in one["scales"].items() if name.endswith("weight.scale")}
    assert start
    assert all(not torch.equal(scale, torch.ones_like(scale)) for scale in start.values())


def test_distillation_is_that_of_one_process(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """The added loss is part of what DistributedDataParallel looks through for parameters without gradient."""
    one = two_processes.SCENARIOS["distilled"](tmp_path)
    found = differences(one, two[0]["distilled"])
    assert set(one["scales"]) == {"aside._output_->b.weight", "aside._output_->b.bias"} and one["moved"]
    assert max(found.values(), default=0) < 1e-4, found


def test_masks_a_teacher_and_learned_scales_are_those_of_one_process(two: list[dict[str, Any]], tmp_path: Path) -> None:
    one = two_processes.SCENARIOS["compressed"](tmp_path)
    assert differences(one["masks"], two[0]["compressed"]["masks"]) == {}
    assert one["shapes"] == two[0]["compressed"]["shapes"]
    assert [one["shapes"][f"{name}.weight"] for name in "bcd"] == [[4, 8], [4, 4], [4, 4]]
    found = differences(one, two[0]["compressed"])
    assert max(found.values(), default=0) < 1e-4, found


@pytest.mark.parametrize("name", ["quantized", "learned at once"])
def test_rounded_from_the_first_batch_on_a_run_stays_near_that_of_one_process(
    name: str, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Only in the forward does each process round on its own range; so deeper layers meet slightly other values."""
    one = two_processes.SCENARIOS[name](tmp_path)
    found = differences(one["weights"], two[0][name]["weights"])
    assert 0 < max(found.values()) < 0.05, found
    if name == "quantized":
        own = one["quantizers"]["a._input_"], two[0][name]["quantizers"]["a._input_"]
        assert differences(*own) == {}, "the input of the net is rounded by nobody before"
        metrics = one["metrics"], two[0][name]["metrics"]
        assert metrics[0]["quant/clipped_mean"] == pytest.approx(metrics[1]["quant/clipped_mean"], abs=0.01)


def test_a_step_that_a_grad_scaler_leaves_out_is_left_out_everywhere(two: list[dict[str, Any]]) -> None:
    """Infinity in the gradient of one process's scale; the scaler looks before `on_before_optimizer_step`."""
    assert [one["scaled"]["stood"] for one in two] == [[False, True, False]] * 2
    assert two[0]["scaled"]["factor"] == 128
    assert all(bool(torch.isfinite(scale).all()) for scale in two[0]["scaled"]["scales"].values())


def test_what_is_measured_is_of_all_values(two: list[dict[str, Any]]) -> None:
    for rank in two:
        (decibels, clipped), unseen = rank["measured"]
        assert clipped == (0.5 * 4 + 0.25 * 12) / 16
        assert decibels == pytest.approx(10 * math.log10(16 / (12 * 0.25)), rel=1e-12)
        assert unseen is None


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(two: list[dict[str, Any]]) -> None:
    for one in two:
        run = one["whole"]
        assert differences(run["straight"]["weights"], run["resumed"]["weights"]) == {}
        assert differences(run["straight"]["quantizers"], run["resumed"]["quantizers"]) == {}
        assert run["straight"]["test"] == run["resumed"]["test"]
        assert torch.equal(run["straight"]["out"], run["resumed"]["out"])
    for part in ("weights", "quantizers", "out"):
        statistics = {f"/bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")} if part == "weights" else set()
        found = differences(two[0]["whole"]["straight"][part], two[1]["whole"]["straight"][part])
        assert set(found) <= statistics, "only statistics of batch norm, which are DistributedDataParallel's affair"
    assert "model.pt2" in two[0]["whole"]["straight"]["files"]


def test_what_fails_in_one_process_fails_in_all(two: list[dict[str, Any]]) -> None:
    first, second = (one["failures"] for one in two)
    assert set(first) == set(second) == {"folder", "export", "example", "plan", "calibration"}
    assert first["folder"].startswith("ConfigError: dirpath cannot be written: ")
    assert second["folder"].startswith("ConfigError: process 0 failed: ConfigError: dirpath cannot be written: ")
    assert re.match(r"ConfigError: path '.*model\.pt2' is a folder", first["export"])
    assert re.match(r"ConfigError: process 0 failed: ConfigError: path '.*model\.pt2' is a folder", second["export"])
    assert first["example"].startswith("ConfigError: process 1 failed: ConfigError: example_input: the recorded forward")
    assert second["example"].startswith("ConfigError: example_input: the recorded forward")
    assert "process 1 has other quantizers than process 0" in first["plan"]
    assert "process 0 has other quantizers than process 1" in second["plan"]
    assert "no batch of the training data is to be had" in first["calibration"]
    assert first["calibration"] == second["calibration"]
    assert "too narrow" in first["calibration"]


def test_a_net_with_sync_batch_norm_is_fused_and_found_again(two: list[dict[str, Any]]) -> None:
    """Lightning exchanges the modules before a fit and after it; a norm that is left out or applied twice shows in the loss."""
    for one in two:
        found = one["synced"]
        assert found["kinds"] == ["FusedSyncBatchNorm", "Fused_BatchNormXd"] * 2 + ["Fused_BatchNormXd"] * 2
        for fit in ("first", "again", "without"):
            assert found[fit]["norms"] == ["bn1", "bn2", None]
            assert found[fit]["tested"] == found[fit]["deployed"]


# -- processes that are gone after the fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.slow), "ddp_notebook"])
def test_the_process_that_called_fit_has_the_deployed_model(strategy: str, tmp_path: Path) -> None:
    """Acceptance behaviour 14."""
    ended([started(tmp_path, strategy)])
    found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
    assert found["kind"] == "Lit"
    assert "conv1   bn1, relu1" in found["plan"]
    assert not found["handed"], "the file is read once"
    assert found["removed"]["conv1.weight"] == found["removed"]["conv2.weight"] == (4, 8)
    assert re.search("conv1 +weight +0.5", found["masked"])
    assert re.match("convert: there are no masks in this process, so nothing would be removed", found["by hand"])
    assert found["files"] == ["epoch=0-step=4.ckpt", "last.ckpt", "model.pt2"]
    assert found["kinds"] == [type(module).__name__ for module in Lit().children()], "the parent's module is float"
    saved = torch.load(tmp_path / strategy / "last.ckpt", weights_only=True)
    assert differences(dict(saved["state_dict"]), found["weights"]) == {}
    assert differences(found["before"], found["weights"])
    model, x = Lit(), torch.linspace(-3, 3, 384).reshape(2, 3, 8, 8)
    model.load_state_dict(saved["state_dict"])
    prepare_model(model, make_plan(model, "int8", example_input=x))
    load_quantizer_state(model, saved["callbacks"]["QuantFusionCallback"]["quantizers"])
    with torch.no_grad():
        assert torch.equal(found["out"], convert_model(model)(x))
        assert torch.equal(found["out"], found["filed"])
        float_out = restore_model(model).eval()(x)
    assert 0 < float((float_out - found["out"]).abs().max()) < 0.5
    assert found["test"] == found["deployed"] == found["alone"], "the parent's module is quantized when it is tested"
    assert found["best"] == found["deployed"]
    assert found["saved"] == saved["callbacks"]["QuantFusionCallback"]["decisions"]
    assert found["failed"] == "RuntimeError", found["failed"]
    assert found["stale"] is False, "what the fit before has left is not taken for the result of one that failed"


class Unpicklable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.note = lambda: None


def test_a_model_that_cannot_be_pickled_is_handed_over_by_its_file(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = Unpicklable()
    plan = make_plan(model, FUSED, example_input=x)
    prepare_model(model, plan)(x)
    deployed = convert_model(model)
    callback = QuantFusionCallback(FUSED)
    with pytest.warns(UserWarning, match=r"the deployed model cannot be pickled .*model\.pt2 holds"):
        hand_over(callback._handover, {"plan": plan}, deployed, "", tmp_path, x)
    found = callback.deployed_model
    assert found is not None
    with torch.no_grad():
        assert torch.equal(found(x), deployed(x))
    assert str(callback.plan) == str(plan)


def test_a_copy_of_a_callback_has_its_own_file_and_none_stays() -> None:
    given = Handover()
    given.give(plan="what")
    twin = copy.deepcopy(given)
    assert twin.path != given.path
    assert (twin.take(), given.take()) == ({"plan": "what"}, {"plan": "what"})
    given.give(plan="again")
    path = given.path
    del given
    gc.collect()
    assert not path.exists()


def test_a_trial_run_writes_no_file_for_a_model_that_cannot_be_pickled(tmp_path: Path) -> None:
    given = Handover()
    with pytest.warns(UserWarning, match="deployed_model is None after a fast_dev_run"):
        hand_over(given, {"plan": "what"}, Unpicklable(), "", None, torch.zeros(1, 3, 8, 8))
    assert given.take() == {"plan": "what", "deployed": None}


def test_what_is_handed_over_is_for_its_owner_only_and_read_once() -> None:
    given, other = Handover(), Handover()
    assert given.path != other.path
    assert given.take() == {}
    assert given.give(plan="what", deployed=nn.Linear(2, 2)) == {}
    assert given.path.stat().st_mode & 0o777 == 0o600
    assert other.take() == {}
    given.waiting = False  # in the process that has trained
    assert given.take() == {}
    given.waiting = True
    assert given.take()["plan"] == "what"
    assert given.take() == {}
    assert not given.path.exists()


def test_what_a_fit_elsewhere_left_is_for_its_weights_only(tmp_path: Path) -> None:
    """The state that came back belongs to the weights that came back."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    model, fitted = Lit(), QuantFusionCallback(FUSED, verbose=0)
    Trainer(max_epochs=1, callbacks=[fitted], default_root_dir=tmp_path, **options).fit(model, loader(), loader(seed=1))
    for same in (True, False):
        other, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
        other.load_state_dict(model.state_dict())
        callback._left = {"state": fitted.state_dict(), "module": fingerprint(other)}
        trainer = Trainer(callbacks=[callback], **options)
        if same:
            found = trainer.test(other, loader(seed=1), verbose=False)
            assert found == Trainer(**options).test(model, loader(seed=1), verbose=False)
            continue
        with torch.no_grad():
            other.get_parameter("fc.weight").mul_(2)
        with pytest.warns(
            UserWarning, match="not those with which the last fit ended in its own processes, so test shows the fl"
        ):
            trainer.test(other, loader(seed=1), verbose=False)
        assert group_of(other.get_submodule("conv1")) is None


def test_a_callback_can_be_pickled_whatever_it_was_given(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "settings": {"Linear": {"weight": {"quant_dtype": "int4"}}},
        "schedule": {"observe_stop": "80%", "freeze_batch_norm": "epoch 1"},
        "calibration": {"batches": 2, "equalize": True},
        "example_input": (torch.zeros(1, 3, 8, 8), {}),
        "export": {".onnx": {"atol": 1e-5}, ".pt2": None},
        "dirpath": tmp_path,
        "log_every_n_steps": 3,
    }
    callback = QuantFusionCallback(["int8", *FUSED], **options)
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.config_list == callback.config_list
    assert (twin.schedule, twin.calibration) == (callback.schedule, callback.calibration)
    assert twin._handover.path == callback._handover.path, "by which the processes find each other"


# -- strategies ------------------------------------------------------------------------------------------------------------


def named(name: str, *bases: type) -> object:
    """An object of a class of this name."""
    return type(name, bases or (object,), {})()


DDP = type("DDPStrategy", (), {})
REFUSED: dict[str, Callable[[], object]] = {
    "FSDPStrategy": FSDPStrategy,
    "ModelParallelStrategy": ModelParallelStrategy,
    "DeepSpeedStrategy": lambda: named("DeepSpeedStrategy", DDP),  # cannot be made where deepspeed is not installed
    "XLAStrategy": lambda: named("XLAStrategy", DDP),
    "Mine": lambda: named("Mine"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_strategies_that_shard_weights_are_refused_at_setup(name: str, stage: str) -> None:
    """Acceptance behaviour 15."""
    trainer: Any = type("StandIn", (), {"strategy": REFUSED[name](), "world_size": 2})()
    why = "only a part of each weight" if name in SHARDED else "merged over"
    with pytest.raises(ConfigError, match=rf'strategy={name}\) is not supported: .*{why}.*Use Trainer\(strategy="ddp"\)'):
        QuantFusionCallback("int8").setup(trainer, Lit(), stage)


def test_strategies_with_whole_weights_are_taken() -> None:
    for strategy in (DDPStrategy(), DDPStrategy(start_method="spawn"), named("Own", DDP), named("SingleDeviceStrategy")):
        check_strategy(strategy)


# -- pieces ----------------------------------------------------------------------------------------------------------------


def test_calls_beyond_the_slots_count_with_the_last() -> None:
    assert folded([], 2) == [(INF, -INF)] * 2
    assert folded([(1.0, 2.0)], 2) == [(1.0, 2.0), (INF, -INF)]
    assert folded([(1.0, 2.0), (0.0, 1.0), (-3.0, 0.5)], 2) == [(1.0, 2.0), (-3.0, 1.0)]
    assert folded([(0.0, 1.0), (math.nan, 2.0)], 1) == [(-INF, INF)]
    low, high = folded([(torch.tensor(0.0), torch.tensor(1.0)), (torch.tensor(-1.0), torch.tensor(0.5))], 1)[0]
    assert (low, high) == (-1, 1)


def test_processes_that_disagree_on_blocks_are_told() -> None:
    found: list[dict[str, Any]] = [{"a": (1, (1, 4)), "b": (2, None)}, {"a": (3, (1, 4))}]
    assert room(found) == ({"a": 3, "b": 2}, {"a": (1, 4)})
    with pytest.raises(ConfigError, match=r"a: its ranges have the shape \(1, 4\) in one process and \(1, 5\) in another"):
        room([*found, {"a": (1, (1, 5))}])


def test_batches_of_processes_are_taken_in_turns() -> None:
    assert interleaved([[1, 3, 5], [2, 4], [9]], 5) == [1, 2, 9, 3, 4]
    assert interleaved([[], []], 3) == []


def test_the_first_values_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(10)
    found, whole = First.of_all([First.of(x[:3]), First.of(x[3:])]), First.of(x)
    assert (found.count, found.least, found.greatest, found.furthest) == (10, whole.least, whole.greatest, float(x.abs().max()))
    assert found.size == pytest.approx(whole.size, rel=1e-6)


def test_alone_nothing_is_exchanged() -> None:
    assert from_all("mine") == ["mine"]
    assert together(lambda: 3) == 3
    with pytest.raises(ValueError, match="own"):
        together(lambda: int("own"))


def test_observers_note_nothing_before_and_after() -> None:
    model = Lit()
    prepare_model(model, make_plan(model, "int8", example_input=torch.zeros(1, 3, 8, 8)))
    ranks = Ranks(model, torch.device("cpu"))
    model(torch.randn(2, 3, 8, 8))
    noting = [one for one in ranks.ranged if one.noted]
    assert len(noting) == len(ranks.ranged) == 3
    assert not any(one.traces for one in noting), "a compiler cannot follow a list that grows"
    ranks.watch(observe=False)
    assert all(one.traces for one in ranks.ranged), "nothing is noted while ranges are frozen"
    ranks.watch(observe=True)
    assert not any(one.traces for one in ranks.ranged)
    ranks.leave()
    model(torch.randn(2, 3, 8, 8))
    assert all(one.noted is None and one.traces for one in ranks.ranged)


ROLES: dict[str, list[dict[str, Any]]] = {
    "member": FUSED,
    "head": [{"op_names": ["bn1"], "fuse_names": [("bn1", "relu1")]}, {"op_names": ["fc"]}],
    "alone": [{"op_names": ["bn1"], "fuse_names": []}, {"op_names": ["fc"]}],
}


@pytest.mark.parametrize("role", ROLES)
def test_a_norm_put_in_the_place_of_another_takes_over_its_role(role: str) -> None:
    """SyncBatchNorm in its place before a fit, another after it."""
    x = torch.randn(4, 3, 8, 8)
    model = Net()
    prepare_model(model, make_plan(model, ROLES[role], example_input=x))
    model(x)
    with torch.no_grad():
        expected = model.eval()(x)
    members = members_of(model)
    assert relink(model, members) == members
    for kind, exchange in {"SyncBatchNorm": TorchSyncBatchNorm().apply, "_BatchNormXd": TorchSyncBatchNorm().revert}.items():
        exchange(model)
        assert group_of(model.bn1) is None
        twin = copy.deepcopy(model)
        members = relink(model, members)
        assert members["bn1"] is model.bn1
        assert type(model.bn1).__name__.endswith(kind)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected)
            assert torch.equal(convert_model(model)(x), expected)
            assert not torch.equal(twin.eval()(x), expected), "left alone, the norm is applied twice or not rounded"
    restore_model(model)
    assert [type(module).__name__ for module in (model.bn1, model.bn2)] == ["_BatchNormXd"] * 2


def test_an_exchanged_norm_is_found_by_every_stage_after_a_fit_that_broke_off(tmp_path: Path) -> None:
    """No `on_fit_end` comes then; the next stage finds the norm."""
    model, callback = Lit(), QuantFusionCallback(FUSED, verbose=0)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options.update(enable_model_summary=False, default_root_dir=tmp_path)
    trainer = Trainer(**options, max_epochs=1, callbacks=[callback])
    trainer.fit(model, loader(), loader(seed=1))
    (expected,) = trainer.test(model, loader(seed=1), verbose=False)
    TorchSyncBatchNorm().revert(TorchSyncBatchNorm().apply(model))
    (found,) = trainer.test(model, loader(seed=1), verbose=False)
    assert type(model.bn1).__name__ == "Fused_BatchNormXd"
    assert found == expected
