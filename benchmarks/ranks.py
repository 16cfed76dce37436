# SPDX-License-Identifier: Apache-2.0
"""Owns the cost of merging ranges: a training step of two processes with it and without, and the float step.

python benchmarks/ranks.py
python benchmarks/ranks.py --nets resnet18 --rounds 30

Two processes on this machine (gloo, one thread each) train copies of a net under DistributedDataParallel, each on a batch of its
own. Every round runs one step of each lane, in an order that rotates, all processes beginning together; a step is forward, loss,
backward, what is averaged, SGD, and what is merged. Printed are the first process's medians, in wall time, which waits for the
other process, and in CPU time, which other jobs disturb less; of CPU time also the ratios to the float step and to the step that
merges nothing, round by round, with quartiles. "merge" is the wall time of the merging alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from lanes import LANES
from step_time import WARMUP, Trainee, quartiles_of_ratio
from timed_nets import NETS
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_quant.ranks import Ranks

TITLES = {"float": "float", "alone": "ours, nothing merged", "merged": "ours, ranges merged"}


class Step:
    """A lane: a net under DistributedDataParallel, with ranges that are merged or not."""

    def __init__(self, lane: str, name: str, x: Tensor) -> None:
        net = NETS[name]
        torch.manual_seed(0)
        made = LANES["float" if lane == "float" else "ours"].make(net, x)
        self.ranks = Ranks(made.model, torch.device("cpu")) if lane == "merged" else None
        self.trainee = Trainee(made._replace(model=DistributedDataParallel(made.model)), net.loss)
        self.wall: list[float] = []
        self.merging: list[float] = []

    def run(self, x: Tensor, y: Tensor) -> None:
        trainee = self.trainee
        trainee.optimizer.zero_grad()
        trainee.loss(trainee.model(x), y).backward()
        if self.ranks is not None:
            self.ranks.average_gradients()
        trainee.optimizer.step()
        if self.ranks is not None:
            dist.barrier()  # else it would hold what the other process takes for its step
            start = time.perf_counter()
            self.ranks.end_batch()
            self.merging.append(time.perf_counter() - start)

    def timed(self, x: Tensor, y: Tensor) -> None:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(x, y)
        self.trainee.seconds.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)


def measure(name: str, rounds: int) -> dict[str, Step]:
    """All rounds of one net, in this process."""
    net = NETS[name]
    torch.manual_seed(1 + dist.get_rank())
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    steps = {lane: Step(lane, name, x) for lane in TITLES}
    for step in steps.values():
        for _ in range(WARMUP):
            step.run(x, y)
    order = list(steps.values())
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for step in order:
                step.timed(x, y)
            order = [*order[1:], order[0]]
    finally:
        gc.enable()
    return steps


def print_rows(name: str, steps: dict[str, Step]) -> None:
    """A row per lane: quantizers, milliseconds (wall, CPU, merging), ratios to float and to the lane that merges nothing."""
    for lane, step in steps.items():
        seconds = step.trainee.seconds
        times = [1000 * statistics.median(one) if one else 0.0 for one in (step.wall, seconds, step.merging)]
        row = f"{name:18}{TITLES[lane]:24}{step.trainee.quantizers:10}{times[0]:9.1f}{times[1]:9.1f}{times[2]:9.2f}"
        for base in ("float", "alone"):
            if list(TITLES).index(lane) > list(TITLES).index(base):
                low, middle, high = quartiles_of_ratio(seconds, steps[base].trainee.seconds)
                row += f"{middle:10.3f}{low:8.3f}{high:8.3f}"
        print(row, flush=True)


def worker(nets: Sequence[str], rounds: int, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in nets:
        steps = measure(name, rounds)
        if rank == 0:
            print_rows(name, steps)
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="steps of each lane that count, 2 or more (default: 31)")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet18", "mobilenetv2", "mlp"])
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "RANK"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        worker(given.nets, given.rounds, given.worker[0], int(given.worker[1]))
        return
    ratios = "".join(f"{base:>10}{'25 %':>8}{'75 %':>8}" for base in ("x float", "x alone"))
    print(f"{'net':18}{'lane':24}{'quantizers':>10}{'wall ms':>9}{'CPU ms':>9}{'merge':>9}{ratios}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, Path(__file__), "--rounds", str(given.rounds), "--nets", *given.nets, "--worker", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        second = subprocess.Popen([*command, "1"], env=environment, stdout=subprocess.DEVNULL)
        with subprocess.Popen([*command, "0"], env=environment, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            for line in first.stdout:
                print(line, end="", flush=True)
        if second.wait() or first.returncode:
            raise SystemExit("a process failed")


if __name__ == "__main__":
    main()
