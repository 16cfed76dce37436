# SPDX-License-Identifier: Apache-2.0
"""Owns the cost of validation: the ratio of a prepared net's forward in eval mode, and of the deployed one's, to float.

python benchmarks/eval_time.py
python benchmarks/eval_time.py --nets resnet18 --batches 1 --profile

A prepared net in eval mode runs the arithmetic that is deployed; its folded layers are built in the first forward, which is
not counted. Forwards are under `torch.no_grad()`. Every round times the lanes one after the other, in an order that rotates,
each for as many forwards as make up 32 images, and gives one ratio per lane to float; CPU time (`time.process_time`), one
thread. `--profile` shows where the time goes, operator by operator; what is in no operator is Python.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lanes import LANES
from step_time import WARMUP, Trainee, quartiles_of_ratio
from timed_nets import NETS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import convert_model

TITLES = {"float": "float", "ours": "ours, prepared", "int8": "ours, preset int8", "deployed": "ours, deployed"}
IMAGES = 32  # of each lane and round, in batches of the size that is timed


def eval_models(name: str, lanes: Sequence[str]) -> dict[str, nn.Module]:
    """The nets of the lanes in eval mode, after the same few steps of training: statistics and ranges are known."""
    net = NETS[name]
    torch.manual_seed(1)
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    models: dict[str, nn.Module] = {}
    for lane in lanes:
        trainee = Trainee(LANES["ours" if lane == "deployed" else lane].make(net, x), net.loss)
        for _ in range(WARMUP):
            trainee.step(x, y)
        trainee.optimizer.zero_grad()
        model = trainee.model.eval()
        models[lane] = convert_model(model) if lane == "deployed" else model
    return models


@torch.no_grad()
def measure(models: Mapping[str, Callable[[Tensor], Any]], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one forward of each lane, by round."""
    seconds: dict[str, list[float]] = {lane: [] for lane in models}
    forwards = max(1, IMAGES // len(x))
    order = list(models)
    for _ in range(WARMUP):
        for model in models.values():
            model(x)
    gc.collect()
    gc.disable()  # a collection would be charged to whichever lane it falls into
    try:
        for _ in tqdm(range(rounds), desc=f"batch {len(x)}", unit="round", file=sys.stderr):
            for lane in order:
                model = models[lane]
                start = time.process_time()
                for _ in range(forwards):
                    model(x)
                seconds[lane].append((time.process_time() - start) / forwards)
            order = [*order[1:], order[0]]
    finally:
        gc.enable()
    return seconds


@torch.no_grad()
def print_profile(model: nn.Module, x: Tensor, seconds: float, *, forwards: int, top: int = 14) -> None:
    """Milliseconds and calls of each operator in one forward, and what is left of `seconds`, which were timed without."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(forwards):
            model(x)
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    for row in rows[:top]:
        print(f"    {row.key[:48]:50}{row.self_cpu_time_total / forwards / 1000:9.3f}{row.count / forwards:9.1f}")
    inside = sum(row.self_cpu_time_total for row in rows) / forwards / 1000
    calls = sum(row.count for row in rows) / forwards
    print(f"    {'all operators':50}{inside:9.3f}{calls:9.1f}")
    print(f"    {'a forward without the profiler':50}{1000 * seconds:9.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="2 or more (default: 25)")
    nets = ["resnet18", "mobilenetv2", "encoder", "mnist"]
    parser.add_argument("--nets", nargs="+", choices=NETS, default=nets, help=f"default: {' '.join(nets)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes (default: 1 32)")
    parser.add_argument("--lanes", nargs="+", choices=TITLES, default=["float", "ours", "deployed"])
    parser.add_argument("--profile", action="store_true", help="operators of every lane, by their own time")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 or more")
    torch.set_num_threads(1)
    lanes = [lane for lane in TITLES if lane == "float" or lane in options.lanes]

    print(f"torch {torch.__version__}, 1 thread, {options.rounds} rounds, CPU time of a forward in eval mode\n")
    print(f"{'net':18}{'batch':>5}  {'lane':22}{'ms':>10}{'ratio':>10}{'q1':>10}{'q3':>10}")
    for name in options.nets:
        models = eval_models(name, lanes)
        for size in options.batches:
            torch.manual_seed(2)
            x = torch.randn(size, *NETS[name].shape[1:])
            seconds = measure(models, x, options.rounds)
            for lane in lanes:
                middle = statistics.median(seconds[lane])
                row = f"{name:18}{size:5}  {TITLES[lane]:22}{1000 * middle:10.3f}"
                if lane != "float":
                    low, ratio, high = quartiles_of_ratio(seconds[lane], seconds["float"])
                    row += f"{ratio:10.3f}{low:10.3f}{high:10.3f}"
                print(row, flush=True)
                if options.profile:
                    print_profile(models[lane], x, middle, forwards=max(2, IMAGES // size))


if __name__ == "__main__":
    main()
