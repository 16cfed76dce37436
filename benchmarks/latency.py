# SPDX-License-Identifier: Apache-2.0
"""Owns the speed of what ships: int8 against float of the same net in the same runtime, on one thread, and what it costs.

python benchmarks/latency.py
python benchmarks/latency.py --nets resnet18 --runtimes onnxruntime --batches 1 --profile

Every round times the lanes of a runtime one after the other, in an order that rotates, each for as many forwards as make up 32
samples; CPU time (`time.process_time`). "faster" is float by int8, the median of the rounds, with quartiles. The timed nets have
random weights, batch statistics and ranges of random batches: enough for their speed. Accuracy is that of trained nets on
real test sets, in `../shared/data`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import accuracy
import onnxruntime
import torch
from eval_time import measure
from latency_lanes import (
    FILES,
    RUNTIMES,
    Run,
    Subject,
    accuracy_of,
    int8_share,
    onnxruntime_run,
    openvino_run,
    products,
    write_files,
)
from step_time import quartiles_of_ratio
from timed_nets import NETS

from lightning_quant.runtime import EXACT_SUMS

TIMED = ("resnet18", "mobilenetv2", "encoder", "mnist")
REAL = ("mnist", "photos")  # of accuracy.py
CALIBRATION = 4  # batches


def timed_subject(name: str) -> Subject:
    """A net with random weights that has seen a few random batches."""
    net = NETS[name]
    torch.manual_seed(0)
    model = net.make().train()
    batches = [torch.randn(net.shape) for _ in range(CALIBRATION)]
    with torch.no_grad():
        for x in batches:
            model(x)
    return Subject(model.eval(), batches)


def real_subject(name: str) -> tuple[Subject, tuple[torch.Tensor, torch.Tensor]]:
    """A trained net of the shared folder, with batches to calibrate it, and its test set."""
    net = accuracy.NETS[name]
    data = accuracy.data_of(net)
    order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(0))
    images = data.train[0][order[: 64 * accuracy.CALIBRATION]]
    return Subject(accuracy.float_net(net), images.split(64)), data.test


# -- tables -------------------------------------------------------------------------------------------------------------


def print_latency(name: str, size: int, runtime: str, lanes: dict[str, Run], rounds: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(size, *NETS[name].shape[1:])
    seconds = measure(lanes, x, rounds)
    for title, times in seconds.items():
        row = f"{name:13}{size:4}  {runtime:13}{title:34}{1000 * statistics.median(times):10.3f}"
        if title != "float":
            low, middle, high = quartiles_of_ratio(seconds["float"], times)
            row += f"{middle:9.3f}{low:9.3f}{high:9.3f}"
        print(row, flush=True)


def print_files(name: str, files: dict[str, Path]) -> None:
    whole = files["float"].stat().st_size
    for key, path in files.items():
        size, share, (integer, number) = path.stat().st_size, int8_share(path), products(path)
        known = "" if share is None else f"{share:.1%}"
        print(
            f"{name:13}{FILES[key]:22}{size / 1e6:9.3f}{size / whole:9.3f}{f'{integer} of {number}':>12}{known:>10}", flush=True
        )


def print_profile(path: Path, x: torch.Tensor, runs: int) -> None:
    """Milliseconds of each kind of node in one run of onnxruntime, the medians of the runs added up."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"] / 1000)
    kinds: dict[str, list[float]] = {}
    for (kind, _), times in nodes.items():
        kinds.setdefault(kind, []).append(statistics.median(times))
    for kind, each in sorted(kinds.items(), key=lambda one: -sum(one[1])):
        print(f"    {kind:28}{len(each):4}{sum(each):10.3f}")
    print(f"    {'all nodes':28}{sum(map(len, kinds.values())):4}{sum(map(sum, kinds.values())):10.3f}", flush=True)


def print_accuracy(folder: Path, kinds: Sequence[str]) -> None:
    print(f"\naccuracy in percent, {' '.join(REAL)} of ../shared/data, calibrated on {64 * accuracy.CALIBRATION} training images")
    if not accuracy.DATA.is_dir():
        print(f"absent: there is no {accuracy.DATA}")
        return
    runs: dict[str, Callable[[Path], Run]] = {
        "onnxruntime": onnxruntime_run,
        "exact sums": partial(onnxruntime_run, exact_sums=True),
        **({"OpenVINO": openvino_run} if "openvino" in kinds else {}),
    }
    print(f"{'net':13}{'file':22}" + "".join(f"{title:>13}" for title in runs))
    for name in REAL:
        subject, test = real_subject(name)
        for key, path in write_files(subject, folder / f"real_{name}", kinds).items():
            found = [accuracy_of(make(path), test) for make in runs.values()]
            print(f"{name:13}{FILES[key]:22}" + "".join(f"{one:13.2f}" for one in found), flush=True)


# -- all of it ----------------------------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="2 or more (default: 15)")
    parser.add_argument(
        "--nets", nargs="*", choices=NETS, default=list(TIMED), help=f"default: {' '.join(TIMED)}; none: accuracy"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes (default: 1 32)")
    usual = [name for name in RUNTIMES if name != "inductor"]
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        default=usual,
        help=f"default: {' '.join(usual)}; inductor compiles for minutes",
    )
    parser.add_argument("--no-accuracy", action="store_true", help="leave the real test sets out")
    parser.add_argument("--profile", action="store_true", help="onnxruntime's time by kind of node, of each file")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    torch.set_num_threads(1)
    for runtime in (RUNTIMES[name] for name in options.runtimes):
        if reason := runtime.missing():
            print(f"left out: {runtime.title} ({reason})")
        if reason := runtime.lacks():
            print(f"left out: all but float in {runtime.title} ({reason})")
    runtimes = [name for name in RUNTIMES if name in options.runtimes and not RUNTIMES[name].missing()]
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, 1 thread, {options.rounds} rounds, CPU time\n")
    print(f"exact sums: session option {EXACT_SUMS!r}\n")
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = {name: timed_subject(name) for name in options.nets}
        kinds = [key for key in FILES if key != "openvino" or key in runtimes]
        files = {name: write_files(subject, folder / name, kinds) for name, subject in subjects.items()}
        print(f"{'net':13}{'file':22}{'MB':>9}{'of float':>9}{'in int8':>12}{'work':>10}")
        for name in options.nets:
            print_files(name, files[name])
        print(f"\n{'net':13}{'batch':>5} {'runtime':13}{'lane':34}{'ms':>10}{'faster':>9}{'q1':>9}{'q3':>9}")
        for name in options.nets:
            for one in runtimes:
                for size in options.batches:
                    x = torch.randn(size, *NETS[name].shape[1:])
                    lanes = RUNTIMES[one].lanes(subjects[name], files[name], x)
                    print_latency(name, size, RUNTIMES[one].title, lanes, options.rounds)
            for size in options.batches if options.profile else ():
                for key in ("float", "ours", "static"):
                    print(f"{name}, batch {size}, {FILES[key]}: ms by kind of node (with the profiler)")
                    print_profile(files[name][key], torch.randn(size, *NETS[name].shape[1:]), 20)
        if not options.no_accuracy:
            print_accuracy(folder, kinds)


if __name__ == "__main__":
    main()
