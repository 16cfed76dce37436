# SPDX-License-Identifier: Apache-2.0
"""Owns what pruning, quantization and a teacher give together: accuracy, file size and latency of one fit that does all three.

python benchmarks/compression.py

The trained float ResNet-20 of emoji32 is fine-tuned by one recipe: in float; in int8; in int8 with half of the channels removed;
the same with its float self as teacher. Each of the last three is one `QuantFusionCallback` in one `Trainer.fit`, which writes
the .onnx file. Accuracy is that of what ships on the whole test set, and of the file in onnxruntime; a seed decides the order of
the data and its augmentation. Latency is that of the files of the first seed in onnxruntime, as in latency.py: one thread, CPU
time, lanes one after the other in every round, in an order that rotates. "exact sums" is a session option that CPUs without
VNNI need for right results.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from accuracy import FURTHER, NETS, Net, Recipe, accuracy, data_of, fit, float_net
from accuracy_report import BASE, said
from eval_time import measure
from latency_lanes import Run, accuracy_of, onnxruntime_run, write_float
from step_time import quartiles_of_ratio
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import QuantFusionCallback
from lightning_quant.shrink import Shrunk

EPOCHS, RATE = 8, 3e-3
HALF = {"pruning": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
ALL = "pruned, int8, teacher"
LANES: dict[str, dict[str, Any]] = {
    FURTHER: {},
    "int8": {},
    "pruned, int8": HALF,
    ALL: {**HALF, "distillation": "kl", "teacher": "self"},
}
TIMED = (BASE, "int8", ALL)
Cell = dict[str, Any]


def net_of(options: argparse.Namespace) -> Net:
    """ResNet-20 on emoji32 with the recipe of this benchmark."""
    return replace(NETS["emoji"], recipe=Recipe(epochs=options.epochs, rate=options.rate))


def left_of(shrunk: Shrunk, model: nn.Module) -> dict[str, float]:
    """What is left of the output channels of convolutions, of parameters and of multiply-adds, as shares of `model`'s."""
    convolutions = {f"net.{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    sizes = [shrunk.removed.get(name, (0, model.get_parameter(name.removeprefix("net.")).shape[0])) for name in convolutions]
    return {
        "channels": 1 - sum(gone for gone, _ in sizes) / sum(size for _, size in sizes),
        "parameters": shrunk.after.parameters / shrunk.before.parameters,
        "multiply-adds": shrunk.after.multiply_adds / shrunk.before.multiply_adds,
    }


def run(net: Net, lane: str, seed: int, path: Path, steps: int | None) -> Cell:
    """One fit, with so many steps an epoch, its file at `path`, and what it reached."""
    start = time.process_time()
    callback = QuantFusionCallback("int8", **LANES[lane], root="net", export=".onnx", dirpath=path.parent / path.stem, verbose=0)
    module = fit(float_net(net), net, seed, callbacks=[] if lane == FURTHER else [callback], limit_train_batches=steps)
    seconds = time.process_time() - start
    model = module.get_submodule("net").eval() if lane == FURTHER else callback.deployed_model
    assert isinstance(model, nn.Module)
    if lane == FURTHER:
        write_float(model, data_of(net).train[0][:2], path)
    else:
        (path.parent / path.stem / "model.onnx").replace(path)
    return {
        "lane": lane,
        "seed": seed,
        "accuracy": accuracy(model, data_of(net).test),
        "seconds": round(seconds, 1),
        "left": {} if callback.shrunk is None else left_of(callback.shrunk, float_net(net)),
    }


def fits(net: Net, folder: Path, seeds: int, steps: int | None) -> list[Cell]:
    """A cell for each seed and lane; those whose numbers lie in `folder`, by the same recipe, are not run again."""
    kept = folder / "results.json"
    recipe = {**vars(net.recipe), "steps": steps}
    before: list[Cell] = json.loads(kept.read_text()) if kept.exists() else []
    results = [one for one in before if one["recipe"] == recipe]
    known = {(one["lane"], one["seed"]) for one in results}
    for seed, lane in tqdm([(seed, lane) for seed in range(seeds) for lane in LANES], unit="fit", file=sys.stderr):
        if (lane, seed) not in known:
            results.append({**run(net, lane, seed, file_of(folder, lane, seed), steps), "recipe": recipe})
            tqdm.write(str(results[-1]), file=sys.stderr)
            kept.write_text(json.dumps(results, indent=0))
    return [one for one in results if one["seed"] < seeds]


def file_of(folder: Path, lane: str, seed: int = 0) -> Path:
    return folder / (f"{lane}.onnx" if lane == BASE else f"{lane.replace(', ', '-')}-{seed}.onnx")


# -- tables -----------------------------------------------------------------------------------------------------------


def print_accuracies(net: Net, folder: Path, results: Sequence[Cell]) -> None:
    """A row for each lane: what ships, how far from float, the files in onnxruntime, with exact sums and as it comes."""
    test = data_of(net).test
    whole = accuracy(float_net(net), test)
    print(f"{'lane':24}{'accuracy':>14}{'to float':>10}{'file, exact':>14}{'file':>14}{'CPU s':>8}  seeds")
    for lane in (BASE, *LANES):
        cells = [one for one in results if one["lane"] == lane]
        paths = [file_of(folder, lane, one["seed"]) for one in cells] or [file_of(folder, BASE)]
        exact, plain = ([accuracy_of(onnxruntime_run(path, exact_sums=mode), test) for path in paths] for mode in (True, False))
        found = [one["accuracy"] for one in cells] or [whole]
        row = f"{lane:24}{said(found):>14}{statistics.fmean(found) - whole:+10.2f}{said(exact):>14}{said(plain):>14}"
        if cells:
            row += f"{statistics.fmean(one['seconds'] for one in cells):8.0f}  " + " ".join(f"{one:.2f}" for one in found)
        print(row, flush=True)
    left = next(one["left"] for one in results if one["lane"] == ALL)
    print("\nleft after removal: " + ", ".join(f"{share:.1%} of {what}" for what, share in left.items()))


def print_files(folder: Path) -> None:
    sizes = {lane: file_of(folder, lane).stat().st_size for lane in TIMED}
    print(f"\n{'file':24}{'kB':>10}{'of float':>10}{'of int8':>10}")
    for lane, size in sizes.items():
        print(f"{lane:24}{size / 1e3:10.1f}{size / sizes[BASE]:10.3f}{size / sizes['int8']:10.3f}", flush=True)


def print_latencies(net: Net, folder: Path, batches: Sequence[int], rounds: int) -> None:
    """A row for each batch size and file: milliseconds, and how many times as fast as float, and as int8 in the same mode."""
    print(f"\n{'batch':>5}  {'file':36}{'ms':>10}{'faster':>9}{'q1':>9}{'q3':>9}{'than int8':>11}")
    for size in batches:
        runs: dict[str, Run] = {lane: onnxruntime_run(file_of(folder, lane)) for lane in TIMED}
        runs |= {f"{lane}, exact sums": onnxruntime_run(file_of(folder, lane), exact_sums=True) for lane in TIMED[1:]}
        seconds = measure(runs, data_of(net).test[0][:size], rounds)
        for title, times in seconds.items():
            row = f"{size:5}  {title:36}{1000 * statistics.median(times):10.3f}"
            if title != BASE:
                low, middle, high = quartiles_of_ratio(seconds[BASE], times)
                alone = seconds[title.replace(ALL, "int8")]
                row += f"{middle:9.3f}{low:9.3f}{high:9.3f}" + f"{quartiles_of_ratio(alone, times)[1]:11.3f}"
            print(row, flush=True)


# -- all of it --------------------------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3 of them)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument("--rate", type=float, default=RATE, help=f"of Adam, to begin with (default: {RATE})")
    parser.add_argument("--steps", type=int, help="of an epoch (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="of latency (default: 1 32)")
    parser.add_argument("--rounds", type=int, default=25, help="of latency, 2 or more (default: 25)")
    parser.add_argument("--folder", type=Path, help="keep files and results here; fits that it holds already are not run again")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    known = "does not have many workers|smaller than the logging interval|LeafSpec|treespec|default int8 kernels saturate"
    warnings.filterwarnings("ignore", message=f".*({known}).*")  # exact sums are a lane
    net = net_of(options)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, 1 thread")
    print(f"{options.epochs} epochs, Adam from {options.rate:g}, batch {net.recipe.batch}, {options.seeds} seeds\n")
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        write_float(float_net(net), data_of(net).train[0][:2], file_of(folder, BASE))
        results = fits(net, folder, options.seeds, options.steps)
        print_accuracies(net, folder, results)
        print_files(folder)
        print_latencies(net, folder, options.batches, options.rounds)


if __name__ == "__main__":
    main()
