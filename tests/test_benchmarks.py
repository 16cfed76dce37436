# SPDX-License-Identifier: Apache-2.0
"""Owns the tests of the benchmark scripts: the nets are those the tables name, and every script runs on a small one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accuracy
import compression
import distillation
import eval_time
import latency
import memory
import pytest
import ranks
import step_time
import torch
from lanes import LANES, present
from latency_lanes import FILES, RUNTIMES, accuracy_of, deployed, onnxruntime_run, write_files
from timed_nets import NETS, layers_of
from torch import nn

from lightning_quant import make_plan

# Counted by torchvision 0.28 for resnet18 and mobilenet_v2 (11 689 512 and 3 504 872 with 1000 classes), with ten classes;
# the encoders and the MLP by hand: per block 12 d^2 + 13 d, then embedding, positions, last norm and head.
PARAMETERS = {
    "mnist": 431_080 + 40,
    "resnet18": 11_689_512 - 990 * 513,
    "mobilenetv2": 3_504_872 - 990 * 1281,
    "encoder": 4 * (12 * 256**2 + 13 * 256) + 49 * 256 + 64 * 256 + 2 * 256 + 10 * 257,
    "tiny_transformer": 2 * (12 * 128**2 + 13 * 128) + 49 * 128 + 64 * 128 + 2 * 128 + 10 * 129,
    "mlp": 257 * 512 + 2 * 513 * 512 + 10 * 513,
}


@pytest.mark.parametrize("name", NETS)
def test_the_nets_are_those_of_the_tables(name: str) -> None:
    net = NETS[name]
    model, rewritten = net.make(), net.torch_ao()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    rewritten.load_state_dict(model.state_dict())
    model.eval()
    rewritten.eval()
    x = torch.randn(2, *net.shape[1:])
    with torch.no_grad():
        expected, found = model(x), rewritten(x)
    assert expected.shape == (2, 10)
    if name == "mobilenetv2":  # ReLU in place of ReLU6: the same only where no value reaches 6
        assert not any(isinstance(module, nn.ReLU6) for module in rewritten.modules())
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NETS)
def test_convolutions_and_linear_layers_are_fused_as_far_as_they_can_be(name: str) -> None:
    model = NETS[name].make()
    plan = make_plan(model, layers_of(model), example_input=torch.randn(2, *NETS[name].shape[1:]))
    weighted = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    norms = [n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert {layer.name for layer in plan.layers} == set(weighted)
    assert {name for layer in plan.layers for name in layer.fused_with} >= set(norms)


def test_step_time_prints_a_ratio_per_lane(capsys: pytest.CaptureFixture[str]) -> None:
    lanes = present(list(LANES))
    capsys.readouterr()
    step_time.main(["--nets", "mlp", "--rounds", "2", "--threads", "1", "1"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("mlp")]
    assert [row[18:40].strip() for row in rows] == 2 * [LANES[lane].title for lane in lanes]
    assert {"float", "ours", "frozen", "int8", "torch_ao"} <= set(lanes)
    counts = dict(zip(lanes, (int(row[40:50]) for row in rows), strict=False))
    assert counts["float"] == 0
    assert counts["ours"] == counts["frozen"] == 4 + 4  # weights; input and three activations
    assert counts["torch_ao"] == 4 + 5  # the last layer's output, too
    for left_out in set(LANES) - set(lanes):
        assert f"left out: {LANES[left_out].title} ({LANES[left_out].missing()})" in printed


def test_step_time_measures_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    step_time.main(["--nets", "mlp", "--rounds", "2", "--lanes", "ours"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert [row[18:40].strip() for row in rows] == ["float", "ours"]
    assert float(rows[1].split()[-3]) > 0


def test_quartiles_are_of_the_ratios_round_by_round() -> None:
    assert step_time.quartiles_of_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == [1.5, 2.0, 2.5]


def test_what_a_teacher_costs_and_the_interval_of_what_it_gives(capsys: pytest.CaptureFixture[str]) -> None:
    distillation.main(["cost", "--nets", "mlp", "--rounds", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    lanes = ["float", "float, kl of the output", "float, and mse of its blocks", "ours", "ours, kl of the output"]
    assert [row[14:46].strip() for row in rows] == lanes
    assert [len(row[46:].split()) for row in rows] == [1, 4, 4, 4, 4]
    assert list(distillation.interval([1.0, 2.0, 3.0])) == pytest.approx([2.0, 4.303 / 3**0.5])


@pytest.mark.slow
def test_two_processes_print_what_merging_costs(capsys: pytest.CaptureFixture[str]) -> None:
    ranks.main(["--nets", "mlp", "--rounds", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert [row[18:42].strip() for row in rows] == list(ranks.TITLES.values())
    numbers = [row[42:].split() for row in rows]
    assert [int(row[0]) for row in numbers] == [0, 8, 8]
    assert [float(row[3]) > 0 for row in numbers] == [False, False, True]
    assert [len(row) for row in numbers] == [4, 7, 10]


# -- memory -------------------------------------------------------------------------------------------------------------

MLP_HIDDEN, MLP_PARAMETERS = 3 * 128 * 512 * 4, 4 * PARAMETERS["mlp"]


def test_bytes_held_are_those_of_the_tensors_that_live() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        with torch.profiler.record_function(memory.STEP):
            b = a + a  # 8000 bytes live
        del b  # 4000
        with torch.profiler.record_function(memory.STEP):
            c = a.double()  # 12000
            del a  # 8000
            c.mul_(2)

    history = memory.held_bytes(run)
    marks = [held for mark, held in history if mark == memory.STEP]
    assert marks == [4000, 4000]
    peak, above = memory.peak_and_rise(history)
    assert 12000 <= peak < 12100  # the profiler's marks and the 2 hold a few bytes
    assert above == peak - 4000
    assert history[-1][1] == 0


def test_saved_bytes_are_each_storage_once() -> None:
    net = NETS["mlp"]
    x, y = memory.batch(net)
    trainee = step_time.Trainee(LANES["float"].make(net, x), net.loss)
    saved = memory.saved_bytes(net, trainee, x, y)
    logarithms = 128 * 10 * 4
    assert MLP_HIDDEN + logarithms <= saved <= MLP_HIDDEN + logarithms + 64
    assert all(parameter.grad is not None for parameter in trainee.model.parameters())


def test_memory_of_a_step_is_what_its_tensors_take(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--count", "allocator", "--nets", "mlp", "--lanes", "float"])
    found = json.loads(capsys.readouterr().out)
    # Highest when the first layer's gradient is made: all gradients, and that of the first hidden layer.
    assert found["above"] == pytest.approx(MLP_PARAMETERS + MLP_HIDDEN / 3, abs=64)
    assert found["peak"] - found["above"] == pytest.approx(2 * MLP_PARAMETERS, abs=64)  # with momentum
    assert found == memory.count_allocator("mlp", "float")
    assert memory.count_allocator("mlp", "ours")["peak"] > found["peak"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_the_process_can_be_begun_anew() -> None:
    large = torch.ones(32 * memory.MIB)  # over 32 MiB the C library asks the system, whatever it holds itself
    del large
    memory.reset_peak()
    start = memory.process_bytes("VmHWM")
    large = torch.ones(16 * memory.MIB)
    assert 60 * memory.MIB < memory.process_bytes("VmHWM") - start < 76 * memory.MIB
    assert len(large)


@pytest.mark.slow  # a process of its own for every number
def test_memory_prints_a_row_per_lane(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--nets", "mlp", "--lanes", "float", "ours", "--processes", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert [row[1] for row in rows] == ["float", "ours"]
    peak, growth = (float(rows[0][column]) for column in (2, 8))
    assert growth > peak * 0.8  # the system's count holds the allocator's
    assert rows[0][3::2] == ["1.00"] * 4


# -- eval ---------------------------------------------------------------------------------------------------------------


def test_eval_time_prints_a_ratio_per_lane_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    eval_time.main(["--nets", "mlp", "--rounds", "2", "--batches", "1", "8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert [row[18:47].split(maxsplit=1) for row in rows] == [
        [size, title.ljust(22)] for size in "18" for title in ("float", "ours, prepared", "ours, deployed")
    ]


def test_the_profile_of_eval_names_operators(capsys: pytest.CaptureFixture[str]) -> None:
    model = eval_time.eval_models("mlp", ["ours"])["ours"]
    eval_time.print_profile(model, torch.randn(2, 256), 0.001, forwards=2)
    rows = {line[:54].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert rows["aten::addmm"] == "4.0"  # calls in one forward
    assert rows["a forward without the profiler"] == "1.000"


def test_eval_models_compute_what_they_stand_for() -> None:
    models = eval_time.eval_models("mlp", list(eval_time.TITLES))
    x = torch.randn(4, 256)
    with torch.no_grad():
        outputs = {lane: model(x) for lane, model in models.items()}
    assert torch.equal(outputs["ours"], outputs["deployed"])
    assert 0 < (outputs["ours"] - outputs["float"]).abs().max() < 0.1


# -- latency ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runtimes", "layers"),
    [("mlp", ["onnxruntime"], 4), pytest.param("mnist", ["onnxruntime", "eager"], 4, marks=pytest.mark.slow)],
)
def test_latency_prints_files_and_lanes_beside_float(
    name: str, runtimes: list[str], layers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "DATA", Path("/nowhere"))
    latency.main(["--nets", name, "--rounds", "2", "--batches", "1", "--runtimes", *runtimes, "--profile"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
    titles = [title for key, title in FILES.items() if key != "openvino"]
    sizes = {row[13:35].strip(): row[35:].split() for row in rows[: len(titles)]}
    assert list(sizes) == titles
    assert [sizes[title][2:5] for title in titles] == [["0", "of", str(layers)], *3 * [[str(layers), "of", str(layers)]]]
    assert all(0.25 < float(sizes[title][1]) < 0.27 for title in titles[1:])
    assert [sizes[title][5:] for title in titles] == [[], ["100.0%"], ["100.0%"], []]
    lanes = [(row[19:32].strip(), row[32:66].strip(), row[66:].split()) for row in rows[len(titles) :]]
    expected = [("onnxruntime", title) for title in (*titles, *(f"{title}, exact sums" for title in titles[1:]))]
    if "eager" in runtimes:
        expected += [("eager torch", title) for title in ("float", "ours", "ours, 7-bit weights")]
    assert [(runtime, title) for runtime, title, _ in lanes] == expected
    assert [len(numbers) for _, _, numbers in lanes] == [1 if title == "float" else 4 for _, title in expected]
    assert all(float(number) > 0 for _, _, numbers in lanes for number in numbers)
    assert printed.count("QGemm ") == 2  # ours, quantize_static
    assert "absent: there is no /nowhere" in printed


def test_latency_says_what_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "openvino", RUNTIMES["openvino"]._replace(missing=lambda: "openvino is not installed"))
    latency.main(["--nets", "--runtimes", "openvino", "--no-accuracy"])
    assert "left out: OpenVINO (openvino is not installed)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_files_of_a_trained_net_keep_its_accuracy(tmp_path: Path) -> None:
    subject, test = latency.real_subject("photos")
    files = write_files(subject, tmp_path)
    found = {key: accuracy_of(onnxruntime_run(path, exact_sums=True), test) for key, path in files.items()}
    assert found["float"] == pytest.approx(accuracy.accuracy(subject.model, test))
    assert found["ours"] == found["openvino"] == accuracy.accuracy(deployed(subject), test)
    assert min(found.values()) > found["float"] - 1


# -- compression ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # four fits with their files, a minute
@pytest.mark.usefixtures("shared")
def test_compression_prints_accuracy_size_and_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--seeds", "1", "--epochs", "1", "--steps", "2", "--rounds", "2", "--batches", "1", "--folder", str(tmp_path)]
    compression.main(tiny)
    accuracies, shares, sizes, latencies = capsys.readouterr().out.split("\n\n")[1:]
    rows = {line[:24].strip(): line[24:].split() for line in accuracies.splitlines()[1:]}
    assert list(rows) == ["float", *compression.LANES]
    assert [row[0] for row in rows.values()] == [row[2] for row in rows.values()]  # what ships, its file with exact sums
    assert rows["float"][0] == "68.9"
    assert shares == "left after removal: 50.0% of channels, 25.2% of parameters, 25.3% of multiply-adds"
    files = {line[:24].strip(): [float(word) for word in line[24:].split()] for line in sizes.splitlines()[1:]}
    assert list(files) == list(compression.TIMED)
    assert files["float"][0] == pytest.approx((tmp_path / "float.onnx").stat().st_size / 1e3, abs=0.1)
    assert 0.25 < files["int8"][1] < 0.30
    assert 0.25 < files[compression.ALL][2] < 0.45  # a quarter of the weights, and as many nodes
    times = {line[5:43].strip(): line[43:].split() for line in latencies.splitlines()[1:]}
    assert list(times) == [*compression.TIMED, *(f"{lane}, exact sums" for lane in compression.TIMED[1:])]
    assert [len(numbers) for numbers in times.values()] == [1, 5, 5, 5, 5]
    fits = json.loads((tmp_path / "results.json").read_text())
    assert [one["lane"] for one in fits] == list(compression.LANES)
    compression.main(tiny)  # no fit is run again
    assert json.loads((tmp_path / "results.json").read_text()) == fits
    assert capsys.readouterr().out.split("\n\n")[1] == accuracies
