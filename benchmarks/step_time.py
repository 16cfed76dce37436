# SPDX-License-Identifier: Apache-2.0
"""Owns the cost of training: the ratio of a quantized training step to the float step, beside torch.ao's eager QAT.

python benchmarks/step_time.py

A step is forward, loss, backward and SGD with momentum, in train mode. Every round runs one step of each lane, in an
order that rotates, and gives one ratio per lane to the float step of the same round; median and quartiles are printed.
The clock is `time.process_time`, CPU time of this process: other jobs on the machine disturb it less than wall time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timed_nets import NETS, Groups, Net, layers_of
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import make_plan, prepare_model
from lightning_quant.prepare import apply_phase
from lightning_quant.schedule import Phase

WARMUP = 3  # steps of each lane that are not counted: allocator, oneDNN primitives, first ranges
FLOAT, OURS, FROZEN, WHOLE, TORCH_AO = LANES = ("float", "ours", "ours, ranges frozen", "ours, preset int8", "torch.ao eager")


# -- the lanes --------------------------------------------------------------------------------------------------------


def ours(net: nn.Module, config_list: Any, x: Tensor) -> nn.Module:
    """The net quantized by lightning_quant, groups found by themselves."""
    return prepare_model(net, make_plan(net, config_list, example_input=x)).train()


def torch_ao(net: nn.Module, groups: Groups) -> nn.Module:
    """The whole net quantized by torch.ao's eager mode, as its documentation does it for x86."""
    quantization: Any = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so at every call
        fused = quantization.fuse_modules_qat(net.train(), [list(group) for group in groups]) if groups else net.train()
        wrapped = quantization.QuantWrapper(fused)
        wrapped.qconfig = quantization.get_default_qat_qconfig("x86")
        prepared: nn.Module = quantization.prepare_qat(wrapped.train())
    return prepared


class Lane:
    """A model with its optimizer and the CPU seconds of its steps."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.optimizer.step()

    def timed_step(self, x: Tensor, y: Tensor) -> None:
        start = time.process_time()
        self.step(x, y)
        self.seconds.append(time.process_time() - start)


def make_lanes(net: Net, x: Tensor, y: Tensor) -> dict[str, Lane]:
    """The lanes, warm, begun from equal weights; the ranges of the frozen one are those of the warm-up."""
    torch.manual_seed(0)
    model = net.make().train()
    rewritten = net.torch_ao()
    rewritten.load_state_dict(model.state_dict())
    models = {
        FLOAT: copy.deepcopy(model),
        OURS: ours(copy.deepcopy(model), layers_of(model), x),
        FROZEN: ours(copy.deepcopy(model), layers_of(model), x),
        WHOLE: ours(copy.deepcopy(model), "int8", x),  # with additions and pools, caught where they are called
        TORCH_AO: torch_ao(rewritten, net.torch_ao_groups(rewritten)),
    }
    lanes = {name: Lane(model, net.loss) for name, model in models.items()}
    for lane in lanes.values():
        for _ in range(WARMUP):
            lane.step(x, y)
    apply_phase(models[FROZEN], Phase(observe=False))
    return lanes


def measure(name: str, rounds: int) -> dict[str, Lane]:
    """Run all rounds of one net."""
    net = NETS[name]
    torch.manual_seed(1)
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    lanes = make_lanes(net, x, y)
    order = list(lanes.values())
    gc.collect()
    gc.disable()  # a collection would be charged to whichever lane it falls into
    for _ in tqdm(range(rounds), desc=name, unit="round", file=sys.stderr):
        for lane in order:
            lane.timed_step(x, y)
        order = [*order[1:], order[0]]
    gc.enable()
    return lanes


def print_rows(name: str, lanes: dict[str, Lane]) -> None:
    """One row per lane: milliseconds, and the quartiles of the ratio to float in the same round."""
    base = lanes[FLOAT].seconds
    for lane_name, lane in lanes.items():
        milliseconds = 1000 * statistics.median(lane.seconds)
        row = f"{name:17}{lane_name:22}{milliseconds:10.1f}"
        if lane_name != FLOAT:
            ratios = [seconds / reference for seconds, reference in zip(lane.seconds, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row += f"{middle:10.3f}{low:10.3f}{high:10.3f}"
        print(row)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each lane that count, 2 or more (default: 15)")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; CPU time adds them up (default: 1)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 or more")
    torch.set_num_threads(options.threads)

    results = {name: measure(name, options.rounds) for name in options.nets}
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds, CPU time of a training step\n")
    print(f"{'net':17}{'lane':22}{'ms':>10}{'ratio':>10}{'q1':>10}{'q3':>10}")
    for name, lanes in results.items():
        print_rows(name, lanes)


if __name__ == "__main__":
    main()
