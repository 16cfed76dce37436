# SPDX-License-Identifier: Apache-2.0
"""Owns the cost of training: the ratio of a quantized training step to the float step, beside the peers' steps.

python benchmarks/step_time.py
python benchmarks/step_time.py --nets resnet18 --lanes float ours --threads 1 2

A step is forward, loss, backward and SGD with momentum, in train mode (and with masks, where a lane has some). Every round
runs one step of each lane, in an order that rotates, and gives one ratio per lane to the float step of the same round; median
and quartiles are printed.
The clock at one thread is `time.process_time`, CPU time of this process: other jobs on the machine disturb it less than
wall time. With more threads it is wall time, as CPU time would count threads that wait.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from lanes import LANES, Model, present
from timed_nets import NETS
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

WARMUP = 3  # steps of each lane that are not counted: allocator, oneDNN primitives, first ranges
Clock = Callable[[], float]


class Trainee:
    """A model with its optimizer and the seconds of its steps."""

    def __init__(self, made: Model, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.quantizers, self.after_backward, self.after_step = made
        self.loss = loss
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.after_backward()
        self.optimizer.step()
        self.after_step()

    def timed_step(self, x: Tensor, y: Tensor, clock: Clock) -> None:
        start = clock()
        self.step(x, y)
        self.seconds.append(clock() - start)


def measure(name: str, lanes: Sequence[str], rounds: int, clock: Clock) -> dict[str, Trainee]:
    """Run all rounds of one net; the ranges of the frozen lane are those of the warm-up."""
    net = NETS[name]
    torch.manual_seed(1)
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    trainees = {lane: Trainee(LANES[lane].make(net, x), net.loss) for lane in lanes}
    for lane, trainee in trainees.items():
        for _ in range(WARMUP):
            trainee.step(x, y)
        LANES[lane].settle(trainee.model)
    order = list(trainees.values())
    gc.collect()
    gc.disable()  # a collection would be charged to whichever lane it falls into
    try:
        for _ in tqdm(range(rounds), desc=name, unit="round", file=sys.stderr):
            for trainee in order:
                trainee.timed_step(x, y, clock)
            order = [*order[1:], order[0]]
    finally:
        gc.enable()
    return trainees


def quartiles_of_ratio(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile of the ratios, round by round."""
    return statistics.quantiles([one / other for one, other in zip(seconds, reference, strict=True)], n=4, method="inclusive")


def print_rows(name: str, trainees: dict[str, Trainee]) -> None:
    """One row per lane: quantizers, milliseconds, and the quartiles of the ratio to float in the same round."""
    base = trainees["float"].seconds
    for lane, trainee in trainees.items():
        milliseconds = 1000 * statistics.median(trainee.seconds)
        row = f"{name:18}{LANES[lane].title:22}{trainee.quantizers:10}{milliseconds:10.1f}"
        if lane != "float":
            low, middle, high = quartiles_of_ratio(trainee.seconds, base)
            row += f"{middle:10.3f}{low:10.3f}{high:10.3f}"
        print(row, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each lane that count, 2 or more (default: 15)")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=list(LANES), help="default: all that are installed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch's threads, one table each (default: 1)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 or more")

    lanes = present(options.lanes)
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock, unit = (time.process_time, "CPU time") if threads == 1 else (time.perf_counter, "wall time")
        print(f"\ntorch {torch.__version__}, {threads} thread(s), {options.rounds} rounds, {unit} of a training step\n")
        print(f"{'net':18}{'lane':22}{'quantizers':>10}{'ms':>10}{'ratio':>10}{'q1':>10}{'q3':>10}")
        for name in options.nets:
            print_rows(name, measure(name, lanes, options.rounds, clock))


if __name__ == "__main__":
    main()
