# SPDX-License-Identifier: Apache-2.0
"""Owns the memory of training: how much more than the float net a quantized one needs, beside torch.ao.

python benchmarks/memory.py
python benchmarks/memory.py --nets resnet18 mobilenetv2 --lanes float ours torch_ao

Every lane runs three training steps (forward, loss, backward, SGD with momentum) in processes of its own:

- peak: the most bytes that torch's CPU allocator held at once, parameters, gradients and optimizer state included. The
  sum of all allocations and releases that torch.profiler records from before the net is made: the same at every run.
- above: how far the last step rises above what model and optimizer hold between steps; gradients, released before a step
  begins, are in it.
- saved: bytes kept for backward in one forward: distinct storages, parameters, buffers and the input left out.
- RSS growth: the most memory of the process during the steps less that before the net is made, as the system counts it:
  with what oneDNN and the C library keep, without the profiler. Median of several processes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lanes import LANES, present
from step_time import Trainee
from timed_nets import NETS, Net
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 3  # the first makes the optimizer's state; the last is the one that repeats
STEP = "step of memory.py"
MIB = 2**20
COLUMNS = ("peak", "above", "saved", "rss")


# -- bytes of torch's allocator -----------------------------------------------------------------------------------------


def held_bytes(run: Callable[[], None]) -> list[tuple[str, int]]:
    """(mark, bytes held by torch's CPU allocator) after each allocation, release and mark of `run`, in order.

    Counts from 0: what was held before is not in it. Marks are made by `record_function(STEP)`; an allocation's is "".
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, history = 0, []
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            history.append(("", held))
        elif event.name() == STEP:
            history.append((STEP, held))
    return history


def peak_and_rise(history: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """(most bytes held, how far the last marked step rose above its beginning)."""
    begin = max(index for index, (mark, _) in enumerate(history) if mark == STEP)
    return max(held for _, held in history), max(held for _, held in history[begin:]) - history[begin][1]


def saved_bytes(net: Net, trainee: Trainee, x: Tensor, y: Tensor) -> int:
    """Bytes that one forward and loss keep for backward: distinct storages but for parameters, buffers and the batch."""
    known = [*trainee.model.parameters(), *trainee.model.buffers(), x, y]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive by the graph, so no address comes twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net.loss(trainee.model(x), y)
    loss.backward()
    return sum(storages.values())


# -- bytes of the process -----------------------------------------------------------------------------------------------


def process_bytes(field: str) -> int:
    """A field of Linux' /proc/self/status: VmRSS now, VmHWM the most since the peak was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# -- one process --------------------------------------------------------------------------------------------------------


def steps(net: Net, lane: str, x: Tensor, y: Tensor) -> Trainee:
    """Make the lane's model and train it for some steps, each marked."""
    trainee = Trainee(LANES[lane].make(net, x), net.loss)
    for index in range(STEPS):
        if index == 1:  # the ranges of the frozen lane are those of the first step
            LANES[lane].settle(trainee.model)
        trainee.optimizer.zero_grad()  # before the mark: gradients belong to what the step needs
        with record_function(STEP):
            trainee.step(x, y)
    return trainee


def batch(net: Net) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(net.shape), torch.randint(10, net.shape[:1])


def count_process(name: str, lane: str) -> dict[str, int]:
    """RSS growth, without a profiler."""
    net = NETS[name]
    x, y = batch(net)
    reset_peak()
    before = process_bytes("VmRSS")
    steps(net, lane, x, y)
    peak = process_bytes("VmHWM")
    return {"rss": peak - before}


def count_allocator(name: str, lane: str) -> dict[str, int]:
    """Peak, rise and saved bytes."""
    net = NETS[name]
    x, y = batch(net)
    trainees: list[Trainee] = []
    peak, above = peak_and_rise(held_bytes(lambda: trainees.append(steps(net, lane, x, y))))
    return {"peak": peak, "above": above, "saved": saved_bytes(net, trainees[0], x, y)}


COUNTS = {"process": count_process, "allocator": count_allocator}


# -- all of them --------------------------------------------------------------------------------------------------------


def in_a_process(count: str, name: str, lane: str) -> dict[str, int]:
    """The result of one count in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--count", count, "--nets", name, "--lanes", lane]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, int] = json.loads(printed.splitlines()[-1])
    return result


def measure(name: str, lane: str, processes: int) -> dict[str, float]:
    """All columns of one row, in bytes."""
    growths = [in_a_process("process", name, lane)["rss"] for _ in range(processes)]
    return {**in_a_process("allocator", name, lane), "rss": statistics.median(growths)}


def print_row(name: str, lane: str, row: dict[str, float], base: dict[str, float]) -> None:
    cells = "".join(f"{row[column] / MIB:11.1f}{row[column] / base[column]:8.2f}" for column in COLUMNS)
    print(f"{name:18}{LANES[lane].title:22}{cells}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet18"], help="default: resnet18")
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=list(LANES), help="default: all that are installed")
    parser.add_argument("--processes", type=int, default=3, help="for the median of RSS growth (default: 3)")
    parser.add_argument("--count", choices=COUNTS, help=argparse.SUPPRESS)  # one count here, printed as JSON
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error("--processes: 1 or more")
    torch.set_num_threads(1)
    if options.count:
        print(json.dumps(COUNTS[options.count](options.nets[0], options.lanes[0])))
        return

    lanes = present(options.lanes)
    print(f"torch {torch.__version__}, 1 thread, MiB and ratio to float, {STEPS} training steps\n")
    heads = ("peak", "above", "saved", "RSS growth")
    print(f"{'net':18}{'lane':22}" + "".join(f"{head:>11}{'ratio':>8}" for head in heads))
    for name in options.nets:
        base: dict[str, float] | None = None
        for lane in lanes:
            row = measure(name, lane, options.processes)
            base = base or row
            print_row(name, lane, row, base)


if __name__ == "__main__":
    main()
