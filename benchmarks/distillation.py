# SPDX-License-Identifier: Apache-2.0
"""Owns what a teacher costs and what it gives: a training step with one, and accuracy with and without, at few bits.

python benchmarks/distillation.py cost
python benchmarks/distillation.py accuracy --nets depthwise-relu --settings W8A8 W4A8 W3A8 --seeds 3

Cost: as in step_time.py, ratios to the float step of the same round, one thread, CPU time; the teacher is the float net itself,
so that a step has one more forward. Accuracy: as in accuracy.py, the trained float net teaches its quantized self. Pairs have
the seed in common (order of the data, augmentation), so their differences are what the teacher gives; the interval is Student's,
95 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import NETS, Net, accuracy, config_list, data_of, fit, float_net
from lanes import float_model, ours
from step_time import WARMUP, quartiles_of_ratio
from timed_nets import NETS as TIMED
from timed_nets import Net as TimedNet
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import QuantFusionCallback
from lightning_quant.distiller import Distiller

# Of Student's distribution: 97.5 % by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# -- cost -------------------------------------------------------------------------------------------------------------


class Trainee:
    """A model with its optimizer, perhaps a teacher, and the seconds of its steps."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], distiller: Distiller | None) -> None:
        self.model, self.loss, self.distiller = model, loss, distiller
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        if self.distiller is None:
            self.loss(self.model(x), y).backward()
        else:
            with self.distiller.batch():
                (self.loss(self.model(x), y) + self.distiller.loss()).backward()
        self.optimizer.step()

    def timed_step(self, x: Tensor, y: Tensor) -> None:
        start = time.process_time()
        self.step(x, y)
        self.seconds.append(time.process_time() - start)


def blocks_of(model: nn.Module) -> list[str]:
    """The names of a net's parts of one level: residual blocks, or whatever stands at the top and has children."""
    parts = [name for name, module in model.named_modules() if name.count(".") == 1 and next(module.children(), None) is not None]
    return parts or [name for name, module in model.named_children() if next(module.parameters(), None) is not None]


def trainees_of(net: TimedNet, x: Tensor) -> dict[str, Trainee]:
    """The float net, alone and taught by itself at its output or at its blocks, too; ours alone and taught."""

    def taught(model: nn.Module, entries: Sequence[Any]) -> Distiller:
        distiller = Distiller(list(entries), float_model(net))
        distiller.begin(model, example=x)
        return distiller

    plain = float_model(net)
    blocks = {"op_names": blocks_of(plain), "apply_method": "mse"}
    lanes: dict[str, tuple[nn.Module, Sequence[Any]]] = {
        "float": (plain, ()),
        "float, kl of the output": (float_model(net), ["kl"]),
        "float, and mse of its blocks": (float_model(net), ["kl", blocks]),
        "ours": (ours(net, x).model, ()),
        "ours, kl of the output": (ours(net, x).model, ["kl"]),
    }
    return {
        name: Trainee(model, net.loss, taught(model, entries) if entries else None) for name, (model, entries) in lanes.items()
    }


def print_costs(name: str, rounds: int) -> None:
    """One row per lane: milliseconds, and the quartiles of the ratio to float in the same round."""
    net = TIMED[name]
    torch.manual_seed(1)
    x, y = torch.randn(net.shape), torch.randint(10, net.shape[:1])
    trainees = trainees_of(net, x)
    for trainee in trainees.values():
        for _ in range(WARMUP):
            trainee.step(x, y)
    order = list(trainees.values())
    gc.collect()
    gc.disable()  # a collection would be charged to whichever lane it falls into
    try:
        for _ in tqdm(range(rounds), desc=name, unit="round", file=sys.stderr):
            for trainee in order:
                trainee.timed_step(x, y)
            order = [*order[1:], order[0]]
    finally:
        gc.enable()
    for lane, trainee in trainees.items():
        row = f"{name:14}{lane:32}{1000 * statistics.median(trainee.seconds):10.1f}"
        low, middle, high = quartiles_of_ratio(trainee.seconds, trainees["float"].seconds)
        print(row + (f"{middle:10.3f}{low:10.3f}{high:10.3f}" if lane != "float" else ""), flush=True)


# -- accuracy ---------------------------------------------------------------------------------------------------------


LESSONS: dict[str, Any] = {
    "alone": None,
    "kl": ["kl"],
    "kl alone": {"config_list": ["kl"], "origin_loss_lambda": 0},
    "kl T=4": [{"apply_method": "kl", "temperature": 4.0}],
}


def run(net: Net, setting: str, lesson: str, seed: int) -> float:
    """Accuracy of the deployed model in percent."""
    teacher = None if LESSONS[lesson] is None else float_net(net)
    callback = QuantFusionCallback(
        config_list(net, setting, "qat"), root="net", distillation=LESSONS[lesson], teacher=teacher, verbose=0
    )
    fit(float_net(net), net, seed, callbacks=[callback])
    assert callback.deployed_model is not None
    return accuracy(callback.deployed_model, data_of(net).test)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of paired differences."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), STUDENT[len(differences) - 1] * spread


def print_accuracies(options: argparse.Namespace) -> None:
    """One row per net, setting and lesson: mean accuracy, and what the lesson adds to training alone."""
    results: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    known = {(one["net"], one["setting"], one["lesson"], one["seed"]): one["accuracy"] for one in results}
    chosen = [
        (name, setting, lesson, seed)
        for name in options.nets
        for setting in options.settings
        for seed in range(options.seeds)
        for lesson in dict.fromkeys(["alone", *options.lessons])
    ]
    for key in tqdm(chosen, unit="fit", file=sys.stderr):
        if key not in known:
            name, setting, lesson, seed = key
            known[key] = run(NETS[name], setting, lesson, seed)
            results.append({"net": name, "setting": setting, "lesson": lesson, "seed": seed, "accuracy": known[key]})
            tqdm.write(str(results[-1]), file=sys.stderr)
            if options.json:
                options.json.write_text(json.dumps(results, indent=0))
    print(f"{'net':18}{'setting':10}{'lesson':12}{'accuracy':>10}{'difference':>12}{'+-':>8}")
    for name in options.nets:
        print(f"{name:18}{'float':22}{accuracy(float_net(NETS[name]), data_of(NETS[name]).test):10.1f}")
        for setting in options.settings:
            alone = [known[name, setting, "alone", seed] for seed in range(options.seeds)]
            print(f"{name:18}{setting:10}{'alone':12}{statistics.fmean(alone):10.1f}")
            for lesson in options.lessons:
                taught = [known[name, setting, lesson, seed] for seed in range(options.seeds)]
                mean, half = interval([a - b for a, b in zip(taught, alone, strict=True)])
                print(f"{name:18}{setting:10}{lesson:12}{statistics.fmean(taught):10.1f}{mean:+12.2f}{half:8.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cost = commands.add_parser("cost", help="training steps")
    cost.add_argument("--rounds", type=int, default=15, help="steps of each lane that count, 2 or more (default: 15)")
    cost.add_argument("--nets", nargs="+", choices=TIMED, default=["resnet18", "mobilenetv2", "encoder", "mlp"])
    score = commands.add_parser("accuracy", help="deployed models")
    score.add_argument("--nets", nargs="+", choices=NETS, default=["depthwise-relu"])
    score.add_argument("--settings", nargs="+", default=["W8A8", "W4A8", "W3A8"])
    score.add_argument("--lessons", nargs="+", choices=[name for name in LESSONS if name != "alone"], default=["kl", "kl alone"])
    score.add_argument("--seeds", type=int, choices=range(2, 11), default=3, help="0, 1, ... (default: 3 of them)")
    score.add_argument("--json", type=Path, help="write results here; fits that it holds already are not run again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|smaller than the logging interval|LeafSpec|treespec).*"
    )
    if options.command == "accuracy":
        print_accuracies(options)
        return
    print(f"torch {torch.__version__}, 1 thread, {options.rounds} rounds, CPU time of a training step\n")
    print(f"{'net':14}{'lane':32}{'ms':>10}{'ratio':>10}{'q1':>10}{'q3':>10}")
    for name in options.nets:
        print_costs(name, options.rounds)


if __name__ == "__main__":
    main()
