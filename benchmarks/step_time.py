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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import make_plan, prepare_model
from lightning_quant.prepare import apply_phase
from lightning_quant.schedule import Phase

Groups = list[tuple[str, ...]]
LAYERS = [{"op_types": ["Conv2d", "Linear"]}]
WARMUP = 3  # steps of each lane that are not counted: allocator, oneDNN primitives, first ranges
FLOAT, OURS, FROZEN, WHOLE, TORCH_AO = "float", "ours", "ours, ranges frozen", "ours, preset int8", "torch.ao eager"


# -- the nets ---------------------------------------------------------------------------------------------------------


class Mnist(nn.Module):
    """The layers of examples/mnist.py: images (N, 1, 28, 28) to log-probabilities (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1, self.relu2, self.relu3 = nn.ReLU6(), nn.ReLU6(), nn.ReLU6()
        self.max_pool1, self.max_pool2 = nn.MaxPool2d(2, 2), nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool1(self.relu1(self.batchnorm1(self.conv1(x))))
        x = self.max_pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


class Block(nn.Module):
    """ResNet's basic block, one module per ReLU, so that the first can be fused."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.down: nn.Module | None = None
        if stride != 1 or channels != out:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.join(self.bn2(self.conv2(y)), shortcut)

    def join(self, y: Tensor, shortcut: Tensor) -> Tensor:
        joined: Tensor = self.relu2(y + shortcut)
        return joined


class TorchAoBlock(Block):
    """The block as torch.ao wants it written: add and ReLU in one module that can be observed."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__(channels, out, stride)
        self.add_relu = torch.ao.nn.quantized.FloatFunctional()

    def join(self, y: Tensor, shortcut: Tensor) -> Tensor:
        return self.add_relu.add_relu(y, shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with ten classes: images (N, 3, 64, 64) to logits (N, 10)."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        stages = [nn.Sequential(block(c, out, stride), block(out, out, 1)) for c, out, stride in widths]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet_groups(net: nn.Module) -> Groups:
    groups: Groups = [("conv1", "bn1", "relu")]
    for name, module in net.named_modules():
        if isinstance(module, Block):
            groups += [(f"{name}.conv1", f"{name}.bn1", f"{name}.relu1"), (f"{name}.conv2", f"{name}.bn2")]
            if module.down is not None:
                groups.append((f"{name}.down.0", f"{name}.down.1"))
    return groups


class Net(NamedTuple):
    """One net to time. `torch_ao`: the same net, with the same parameter names, as torch.ao wants it written."""

    make: Callable[[], nn.Module]
    torch_ao: Callable[[], nn.Module]
    torch_ao_groups: Callable[[nn.Module], Groups]
    loss: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]


NETS = {
    "mnist": Net(
        make=Mnist,
        torch_ao=Mnist,
        torch_ao_groups=lambda _: [("conv1", "batchnorm1")],  # torch.ao fuses no ReLU6
        loss=F.nll_loss,
        shape=(64, 1, 28, 28),
    ),
    "resnet18": Net(
        make=ResNet18,
        torch_ao=lambda: ResNet18(TorchAoBlock),
        torch_ao_groups=resnet_groups,
        loss=F.cross_entropy,
        shape=(32, 3, 64, 64),
    ),
}


# -- the lanes --------------------------------------------------------------------------------------------------------


def ours(net: nn.Module, config_list: Any, x: Tensor) -> nn.Module:
    """The net quantized by lightning_quant, groups found by themselves."""
    return prepare_model(net, make_plan(net, config_list, example_input=x)).train()


def torch_ao(net: nn.Module, groups: Groups) -> nn.Module:
    """The whole net quantized by torch.ao's eager mode, as its documentation does it for x86."""
    quantization: Any = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so at every call
        fused = quantization.fuse_modules_qat(net.train(), [list(group) for group in groups])
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
        OURS: ours(copy.deepcopy(model), LAYERS, x),
        FROZEN: ours(copy.deepcopy(model), LAYERS, x),
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
        row = f"{name:10}{lane_name:22}{milliseconds:10.1f}"
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
    torch.set_num_interop_threads(1)

    results = {name: measure(name, options.rounds) for name in options.nets}
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds, CPU time of a training step\n")
    print(f"{'net':10}{'lane':22}{'ms':>10}{'ratio':>10}{'q1':>10}{'q3':>10}")
    for name, lanes in results.items():
        print_rows(name, lanes)


if __name__ == "__main__":
    main()
