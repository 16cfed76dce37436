# SPDX-License-Identifier: Apache-2.0
"""Owns the accuracy of quantized nets: bits and methods on real data, beside naive rounding and torch.ao's eager QAT.

python benchmarks/accuracy.py

Trained float nets are quantized as a user would: a LightningModule and `Trainer(callbacks=[QuantFusionCallback(...)])`. Accuracy
is that of `callback.deployed_model` on the whole test set. A seed decides the order of the data, its augmentation, and which
batches calibrate. Every net has one recipe for all its bits, methods and seeds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accuracy_report import BASE, Cell, draw, table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with lightning

from lightning_quant import QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.calibrate import calibrate
from lightning_quant.equalize import equalize_model
from lightning_quant.rounding import learn_rounding

DATA = Path(__file__).parents[2] / "shared" / "data"
CALIBRATION, ITERATIONS = 8, 300  # batches of 64 for lanes without training, steps a layer where rounding is learned
Group = tuple[str, ...]


# -- nets and data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a net is fine-tuned: Adam from `rate` down to 0 (cosine), images moved by up to `shift` pixels."""

    epochs: int
    rate: float
    batch: int = 64
    shift: int = 2


@dataclass(frozen=True, kw_only=True)
class Net:
    """A float net of `../shared/data`: `weights`, of `nets.RECIPES`, trained on `data` normalized by `mean` and `std`.

    `spread`: channels made uneven by so much, the float function unchanged. `operators`: functions that are quantized as the
    layers are. `added`: how layers are called whose outputs are added. `groups`: what torch.ao fuses, and naive rounding folds.
    `limit`: of the training images.
    """

    weights: str
    data: str
    mean: float
    std: float
    recipe: Recipe
    groups: Callable[[nn.Module], list[Group]]
    operators: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    per_tensor: bool = False
    spread: float | None = None
    limit: int | None = None


def seed_groups(net: nn.Module) -> list[Group]:
    return [("conv1", "batchnorm1")]  # torch.ao has no fused ReLU6


def resnet_groups(net: nn.Module) -> list[Group]:
    groups: list[Group] = [("conv", "bn", "relu")]
    for name, block in net.named_modules():
        if hasattr(block, "conv2"):
            groups += [(f"{name}.conv1", f"{name}.bn1", f"{name}.relu"), (f"{name}.conv2", f"{name}.bn2")]
            groups += [(f"{name}.down.0", f"{name}.down.1")] if block.down is not None else []
    return groups


def depthwise_groups(net: nn.Module) -> list[Group]:
    features: Any = net.features
    relu = isinstance(features[2], nn.ReLU)
    return [tuple(f"features.{i + j}" for j in range(3 if relu else 2)) for i in range(0, len(features), 3)]


_depthwise = Net(
    weights="emoji_ds_relu", data="emoji32", mean=0.5, std=0.5, recipe=Recipe(epochs=6, rate=1e-3), groups=depthwise_groups,
    operators=("mean",),
)  # fmt: skip
_resnet = Net(
    weights="photos_resnet", data="photos32", mean=0.5, std=0.25, recipe=Recipe(epochs=3, rate=5e-4), groups=resnet_groups,
    operators=("add", "AdaptiveAvgPool2d"), added=("conv2", "down.0"),
)  # fmt: skip
_seed = Net(weights="animals_seed", data="animals28", mean=0.25, std=0.40, recipe=Recipe(epochs=3, rate=5e-4), groups=seed_groups)
NETS: dict[str, Net] = {
    "animals": _seed,
    "photos": _resnet,
    "uneven30": replace(_depthwise, spread=30.0, per_tensor=True),
    "uneven100": replace(_depthwise, spread=100.0),
    "depthwise": replace(_depthwise, weights="emoji_ds"),
    "depthwise-relu": _depthwise,
    "emoji": replace(_resnet, weights="emoji_resnet", data="emoji32", std=0.5, recipe=replace(_resnet.recipe, epochs=1)),
    "mnist": replace(
        _seed, weights="mnist_seed", data="mnist", mean=0.1307, std=0.3081, recipe=Recipe(epochs=1, rate=1e-4), limit=12000
    ),
}
TRAINED = ("qat", "lsq")
CALIBRATED = ("calibrated", "equalized", "equalized + biases", "equalized + rounding")
LEARNED = CALIBRATED[-1]
ENDS = "*"
NAIVE, TORCH_AO = "naive", "torch.ao"
LANES = (NAIVE, *CALIBRATED, *TRAINED, "qat, equalized", "lsq+", "dorefa", TORCH_AO)
UNTRAINED = (NAIVE, *CALIBRATED[:3])
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "animals": {
        "W8A8": (*UNTRAINED, "qat", TORCH_AO),
        "W4A8": (*UNTRAINED, "qat"),
        "W3A8": (*UNTRAINED, LEARNED, *TRAINED),
        "W2A8": (*UNTRAINED, LEARNED, *TRAINED, "dorefa"),
        "W4A4": (*UNTRAINED, *TRAINED),
    },
    "photos": {
        "W8A8": (*UNTRAINED, "qat", TORCH_AO),
        "W4A8": (*UNTRAINED, "qat"),
        "W3A8": (*UNTRAINED, *TRAINED),
        "W2A8": (*UNTRAINED, *TRAINED),
        "W4A4": (NAIVE, "calibrated", "lsq", "lsq+"),
        "W4A4*": (*UNTRAINED, *TRAINED),
    },
    "uneven30": {"W8A8": (*UNTRAINED, LEARNED, "qat", "qat, equalized", TORCH_AO)},
    "uneven100": {"W8A8": (*UNTRAINED, LEARNED, "qat", "qat, equalized", TORCH_AO)},
    "depthwise": {"W8A8": (*UNTRAINED, "qat", TORCH_AO)},
    "depthwise-relu": {
        "W8A8": (*UNTRAINED, "qat", TORCH_AO),
        "W4A8": (*UNTRAINED, LEARNED, *TRAINED),
        "W3A8": (*UNTRAINED, LEARNED, *TRAINED),
        "W2A8": (*UNTRAINED, LEARNED, *TRAINED),
    },
    "emoji": {"W8A8": (*UNTRAINED, "qat", TORCH_AO)},
    "mnist": {"W8A8": (*UNTRAINED, "qat", TORCH_AO)},
}


@cache
def nets_module() -> ModuleType:
    """`nets.py` of the shared folder."""
    spec = importlib.util.spec_from_file_location("shared_nets", DATA / "float" / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def float_net(net: Net) -> nn.Module:
    """The trained float net, in eval mode."""
    module = nets_module()
    model: nn.Module = module.RECIPES[net.weights][1]()
    model.load_state_dict(torch.load(DATA / "float" / f"{net.weights}.pt", weights_only=True))
    return (model if net.spread is None else module.unequalize(model, net.spread)).eval()


def bits_of(setting: str) -> tuple[int, int]:
    """(weights, activations) of "W3A8"; a star behind it means that the first and the last layer have 8."""
    weights, activations = setting.removesuffix(ENDS).removeprefix("W").split("A")
    return int(weights), int(activations)


def ends_of(model: nn.Module) -> list[str]:
    """The names of the first and the last layer."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [names[0], names[-1]]


@dataclass(frozen=True)
class Images:
    """Normalized float32 images (N, C, H, W) and int64 labels (N,), of train and test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def images(name: str, mean: float, std: float, limit: int | None) -> Images:
    """A data set of the shared folder."""
    arrays = np.load(DATA / f"{name}.npz")

    def part(which: str, count: int | None) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(arrays[f"x_{which}"][:count]).float().div(255).sub(mean).div(std)
        x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x[:, None]
        return x, torch.from_numpy(arrays[f"y_{which}"][:count].astype("int64"))

    return Images(part("train", limit), part("test", None))


def data_of(net: Net) -> Images:
    return images(net.data, net.mean, net.std, net.limit)


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Percent of the test images."""
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(250), test[1].split(250), strict=True))
    return 100 * hits / len(test[1])


def shifted(x: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels, its border repeated."""
    n, channels, height, width = x.shape
    padded = F.pad(x, (most,) * 4, mode="replicate")
    rows = torch.randint(2 * most + 1, (n, 1, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.randint(2 * most + 1, (n, 1, 1, 1)) + torch.arange(width)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns]


# -- naive rounding: plain torch, nothing of this package ---------------------------------------------------------------


def folded(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """A copy with batch norms folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    for conv, norm, *_ in groups:
        layer, batch_norm = model.get_submodule(conv), model.get_submodule(norm)
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(batch_norm, nn.BatchNorm2d)
        model.set_submodule(conv, fuse_conv_bn_eval(layer, batch_norm))
        model.set_submodule(norm, nn.Identity())
    return model


@torch.no_grad()
def naive(net: Net, setting: str, x: Tensor) -> nn.Module:
    """Weights rounded to nearest by their absolute maximum, what layers and additions read by its range on `x`; no training."""
    model = float_net(net)
    ends = ends_of(model) if setting.endswith(ENDS) else []
    model = folded(model, net.groups(model))
    ranges: dict[str, tuple[float, float]] = {}
    nearest: dict[nn.Conv2d | nn.Linear, Tensor] = {}
    seeing = True

    def rounded(name: str, y: Tensor, bits: int) -> Tensor:
        if seeing:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(y.min())), max(high, float(y.max()))
            return y
        low, high = ranges[name]
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        q: Tensor = ((y / scale).round() + zero).clamp(0, 2**bits - 1)
        return q.sub(zero).mul(scale)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, read = (8, 8) if name in ends else bits_of(setting)
            w = layer.weight
            most = w.abs().amax() if net.per_tensor else w.abs().amax(tuple(range(1, w.dim())), keepdim=True)
            scale = most.clamp(min=1e-12) / (2 ** (weight - 1) - 1)
            layer.register_forward_pre_hook(lambda _, args, name=name, read=read: (rounded(name, args[0], read), *args[1:]))
            if net.added and name.endswith(net.added):
                layer.register_forward_hook(lambda _, args, y, name=name: rounded(f"{name} out", y, bits_of(setting)[1]))
            nearest[layer] = (w / scale).round() * scale
    for part in x.split(64):
        model(part)
    seeing = False
    for layer, w in nearest.items():
        layer.weight.copy_(w)
    return model


# -- ours -------------------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """A net with its recipe; logits or log-probabilities (N, 10), which cross-entropy takes alike."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.net, self.recipe = net, recipe

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(shifted(x, self.recipe.shift)), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.recipe.rate)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def config_list(net: Net, setting: str, method: str) -> list[dict[str, Any]]:
    """All layers and operators of a net."""
    weights, activations = bits_of(setting)
    common = {"quant_dtype": f"uint{activations}", "method": method}
    weight = {"quant_dtype": f"int{weights}", "granularity": "per_tensor" if net.per_tensor else "default"}
    if method == "dorefa":  # its activations are those in [0, 1] and its weights have one scale
        common["method"], weight = "qat", {"quant_dtype": f"int{weights}", "granularity": "per_tensor", "method": "dorefa"}
    entries: list[dict[str, Any]] = [{"op_types": list(net.operators), **common}] if net.operators else []
    entries.append({"op_types": ["Conv2d", "Linear"], **common, "target_settings": {"weight": weight}})
    if setting.endswith(ENDS):
        wide = {"weight": {**weight, "quant_dtype": "int8"}, "_input_": {"quant_dtype": "uint8"}}
        entries.append({"op_names": ends_of(float_net(net)), **common, "target_settings": wide})
        pools = list(net.operators[-1:])  # it makes what the last layer reads
        entries += [{"op_types": pools, **common, "target_settings": {"_output_": {"quant_dtype": "uint8"}}}] if pools else []
    return entries


def fit(model: nn.Module, net: Net, seed: int, **options: Any) -> LightningModule:
    """Train `model`, or what it is wrapped in, by the net's recipe."""
    seed_everything(seed, verbose=False)
    module = Classifier(model.train(), net.recipe)
    loader = DataLoader(TensorDataset(*data_of(net).train), batch_size=net.recipe.batch, shuffle=True, drop_last=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": net.recipe.epochs, **options},
    )  # fmt: skip
    trainer.fit(module, loader)
    return module


def fine_tuned(net: Net, setting: str, seed: int, method: str = "qat", *, equalize: bool = False) -> nn.Module:
    """The deployed model after training by the net's recipe."""
    callback = QuantFusionCallback(config_list(net, setting, method), calibration={"equalize": equalize}, root="net", verbose=0)
    fit(float_net(net), net, seed, callbacks=[callback])
    assert callback.deployed_model is not None
    return callback.deployed_model


def calibrated(net: Net, setting: str, seed: int, *, equalize: bool = False, biases: bool = False) -> nn.Module:
    """The deployed model of a run without training: ranges and, if asked for, equalized channels and corrected biases."""
    calibration = {"batches": CALIBRATION, "equalize": equalize, "correct_biases": biases}
    callback = QuantFusionCallback(config_list(net, setting, "qat"), calibration=calibration, root="net", verbose=0)
    fit(float_net(net), net, seed, callbacks=[callback], max_epochs=0)
    assert callback.deployed_model is not None
    return callback.deployed_model


def learned(net: Net, setting: str, seed: int) -> nn.Module:
    """Ranges, equalized channels and learned rounding, without a Trainer; `ITERATIONS` of them a layer."""
    generator = torch.Generator().manual_seed(seed)
    x = data_of(net).train[0]
    batches = list(x[torch.randperm(len(x), generator=generator)[: 64 * CALIBRATION]].split(64))
    model = float_net(net)
    equalize_model(model, example_input=batches[0])
    prepare_model(model, make_plan(model, config_list(net, setting, "qat"), example_input=batches[0]))
    calibrate(model, batches)
    learn_rounding(model, batches, iterations=ITERATIONS, seed=seed)
    return convert_model(model.eval())


# -- torch.ao, eager --------------------------------------------------------------------------------------------------


def torch_ao(net: Net, setting: str, seed: int) -> nn.Module:
    """torch.ao's eager QAT at 8 bits by the same recipe, in eval mode: its simulation, not its integer kernels."""
    quantization: Any = torch.ao.quantization
    model = float_net(net)
    for block in model.modules():
        if hasattr(block, "conv2") and hasattr(block, "down"):
            block.sum = torch.ao.nn.quantized.FloatFunctional()
            block.forward = _residual.__get__(block)
    weight = quantization.fake_quantize.fused_wt_fake_quant_range_neg_127_to_127
    if not net.per_tensor:
        weight = quantization.fake_quantize.fused_per_channel_wt_fake_quant_range_neg_127_to_127
    activation = quantization.FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=255)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so at every call
        fused = quantization.fuse_modules_qat(model.train(), [list(group) for group in net.groups(model)])
        wrapped = quantization.QuantWrapper(fused)
        wrapped.qconfig = quantization.QConfig(activation=activation, weight=weight)
        prepared: nn.Module = quantization.prepare_qat(wrapped.train())
        fit(prepared, net, seed)
    return prepared.apply(quantization.disable_observer).eval()


def _residual(block: Any, x: Tensor) -> Tensor:
    """`Basic.forward` of the shared nets with an addition that torch.ao can quantize."""
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.bn2(block.conv2(out))
    total: Tensor = block.sum.add_relu(out, x if block.down is None else block.down(x))
    return total


# -- cells ------------------------------------------------------------------------------------------------------------


def run_lane(net: Net, setting: str, lane: str, seed: int) -> nn.Module:
    """The model of one cell of the table."""
    if lane == BASE:
        return float_net(net)
    if lane == NAIVE:
        x = data_of(net).train[0]
        return naive(net, setting, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 64 * CALIBRATION]])
    if lane in CALIBRATED:
        steps = CALIBRATED.index(lane)
        if lane == LEARNED:
            return learned(net, setting, seed)
        return calibrated(net, setting, seed, equalize=steps >= 1, biases=steps >= 2)
    if lane == TORCH_AO:
        return torch_ao(net, setting, seed)
    method, _, equalized = lane.partition(", ")
    return fine_tuned(net, setting, seed, method, equalize=bool(equalized))


def key_of(cell: Cell) -> tuple[str, str, str, int]:
    return cell["net"], cell["setting"], cell["lane"], cell["seed"]


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is to be run; the float net once."""
    chosen = []
    for name in options.nets:
        chosen.append({"net": name, "setting": "float", "lane": BASE, "seed": 0})
        for setting, lanes in SETTINGS[name].items():
            if options.settings and setting not in options.settings:
                continue
            wanted = [lane for lane in lanes if not options.lanes or lane in options.lanes]
            chosen += [
                {"net": name, "setting": setting, "lane": lane, "seed": seed} for lane in wanted for seed in range(options.seeds)
            ]
    return chosen


def measure(cell: Cell) -> Cell:
    """The cell with its accuracy (percent) and the CPU seconds that it took."""
    net, start = NETS[cell["net"]], time.process_time()
    model = run_lane(net, cell["setting"], cell["lane"], cell["seed"])
    return {**cell, "accuracy": accuracy(model, data_of(net).test), "seconds": round(time.process_time() - start, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--settings", nargs="+", help="W8A8, W3A8, ... (default: all of a net)")
    parser.add_argument("--lanes", nargs="+", choices=LANES, help="default: all of a setting")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3 of them)")
    parser.add_argument("--json", type=Path, help="write results here; cells that it holds already are not run again")
    parser.add_argument("--picture", type=Path, help="draw accuracy by bits (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small nets: a second thread costs more than it gives
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|smaller than the logging interval|LeafSpec|treespec).*"
    )

    results: list[Cell] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    chosen, known = cells(options), {key_of(cell) for cell in results}
    for cell in tqdm(chosen, unit="cell", file=sys.stderr):
        if key_of(cell) not in known:
            results.append(measure(cell))
            tqdm.write(str(results[-1]), file=sys.stderr)
            if options.json:
                options.json.write_text(json.dumps(results, indent=0))
    wanted = {key_of(cell) for cell in chosen}
    results = [cell for cell in results if key_of(cell) in wanted]
    print(table(results, SETTINGS, LANES))
    if options.picture:
        draw(results, SETTINGS, LANES, options.picture)


if __name__ == "__main__":
    main()
