# SPDX-License-Identifier: Apache-2.0
"""Owns what test_ranks.py runs in two processes at once, and the same in one process, for comparison.

python tests/two_processes.py FOLDER RANK writes FOLDER/RANK.pt: what each scenario returned, by name. Processes find each other
by a file in FOLDER, so no port has to be free. python tests/two_processes.py FOLDER ddp_spawn writes FOLDER/ddp_spawn.pt: what
is left in the process that called fit.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distils import Distils
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Lit

import lightning_quant.quantizers
from lightning_quant import ConfigError, QuantFusionCallback, load_deployed, make_plan, prepare_model
from lightning_quant.monitor import RoundingLoss
from lightning_quant.prepare import learned_parameters, quantizer_state, quantizers_of
from lightning_quant.ranks import Ranks

BATCH, BATCHES = 8, 4  # of a process


def several() -> bool:
    return dist.is_initialized()


# -- data: the share of a process is a half of what one process has, in other places ---------------------------------------


def batches(shape: tuple[int, ...], number: int = BATCHES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of (2 BATCH, ..) whose second half is three times as wide; in two processes each gets its half."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        x, y = torch.randn(2 * BATCH, *shape, generator=generator), torch.randint(0, 4, (2 * BATCH,), generator=generator)
        x[BATCH:] *= 3
        half = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH) if several() else slice(None)
        found.append((x[half], y[half]))
    return found


def loader(shape: tuple[int, ...] = (6,), number: int = BATCHES, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """The batches one after the other."""
    parts = batches(shape, number, seed)
    data = TensorDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    return DataLoader(data, batch_size=len(parts[0][0]))


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
        "max_epochs": 1,
        **({"devices": 2, "strategy": "ddp"} if several() else {}),
    }
    return Trainer(**{**defaults, **options})


class Chain(LightningModule):
    """Linear layers without batch norm, one of them called twice: (N, 6) to (N, 4)."""

    def __init__(self, lr: float = 0.0, momentum: float = 0.9) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        torch.manual_seed(0)
        self.a, self.twice, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), *(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = self.twice(self.twice(x))
        x = F.relu(self.d(F.relu(self.c(self.b(x)))))
        out: Tensor = self.head(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


OBSERVERS: list[dict[str, Any]] = [
    {"op_names": ["a"], "target_names": ["_input_", "weight", "_output_"]},
    {"op_names": ["twice"], "target_names": ["_input_", "weight", "_output_"], "observer": "minmax"},
    {"op_names": ["b"], "target_names": ["_output_"], "observer": "percentile:99"},
    {"op_names": ["c"], "target_names": ["_output_"], "observer": "entropy"},
    {"op_names": ["d"], "target_names": ["_output_"], "observer": "mse"},
    {"op_names": ["head"], "target_names": ["_output_"], "target_settings": {"_output_": {"granularity": "per_channel"}}},
]
LEARNED: list[dict[str, Any]] = [
    {"op_names": ["a", "b"], "method": "lsq"},
    {"op_names": ["twice", "c"], "method": "lsq+"},
    {"op_names": ["d"], "method": "pact"},
    {"op_names": ["head"], "target_names": ["_input_", "weight", "_output_"]},
]


def left(model: nn.Module, **more: Any) -> dict[str, Any]:
    """What a fit left: weights and what quantizers know."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "quantizers": quantizer_state(model), **more}


# -- quantizers by themselves -----------------------------------------------------------------------------------------------

# What a layer meets in a batch: a list of calls, for each of them the values of both processes, None where one does not call it.
NAN, INF = math.nan, math.inf
MEETINGS: list[list[tuple[list[float] | None, list[float] | None]]] = [
    [],
    [(None, [0.0, 0.0]), (None, [0.0, 0.0])],
    [([1.0, -2.0], [3.0, 0.5]), ([0.25, 4.0], None)],
    [([9.0, 1.0], [0.5, NAN])],
    [(None, None), ([0.5, -0.25], [-8.0, 1.0]), ([0.5, 20.0], [30.0, 1.0])],
    [([1.0, -INF], [2.0, 2.0])],
    [],
    [([1.5, -0.5], None)],
    [([1.0, 1.0], [2.0, 2.0]), ([3.0, -3.0], None), ([-40.0, 2.0], None)],
]


def meet(observer: str, granularity: str, *, host: bool = True) -> dict[str, Any]:
    """The state of a quantizer after each of MEETINGS; two calls a batch are told apart."""
    model = nn.Sequential(nn.Linear(2, 2))
    spec = {"observer": observer, "granularity": granularity}
    entry = {"op_names": ["0"], "target_names": ["_input_"], "target_settings": {"_input_": spec}}
    prepare_model(model, make_plan(model, [entry], example_input=torch.zeros(3, 2)))
    (quantizer,) = quantizers_of(model).values()
    ranks = Ranks(model, torch.device("cpu")) if several() else None
    if ranks is not None:
        ranks.host = host
    states = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if not host:
            patch.setattr(lightning_quant.quantizers, "on_host", lambda _: False)
        warnings.filterwarnings("ignore", ".*holds NaN or infinity")
        for calls in MEETINGS:
            if ranks is not None:
                for call in calls:
                    if (values := call[dist.get_rank()]) is not None:
                        quantizer.observe(torch.tensor(values).reshape(1, 2))
                ranks.end_batch()
            else:
                for whole in one_process_calls(calls, apart=99 if observer in ("percentile:75", "entropy", "mse") else 2):
                    quantizer.observe(torch.tensor(whole).reshape(-1, 2))
            states.append({key: value for key, value in quantizer.state_dict().items() if key not in ("lagging", "searched")})
    return {"states": states}


def one_process_calls(calls: list[tuple[list[float] | None, list[float] | None]], apart: int) -> list[list[float]]:
    """The values of each call of both processes; the i-th calls that a process makes belong together, whatever it skipped.

    `apart`: how many calls are told apart; the last of them holds the rest.
    """
    made = [[one for call in calls if (one := call[rank]) is not None] for rank in (0, 1)]
    whole = [[v for one in made if index < len(one) for v in one[index]] for index in range(max(map(len, made)))]
    return whole if len(whole) <= apart else [*whole[: apart - 1], [value for one in whole[apart - 1 :] for value in one]]


def measured() -> list[tuple[float, float] | None]:
    """(signal-to-noise ratio, clipped share) of two tensors; None for what is seen by nobody, the second."""
    metric = RoundingLoss(2)
    rows = [(torch.ones(12), torch.full((12,), 0.5), 0.25)] if dist.get_rank() else [(torch.ones(4), torch.ones(4), 0.5)]
    for x, rounded, share in rows:
        metric.update(0, x, rounded, share)
    return [None if math.isnan(loss.clipped) else (loss.signal_to_noise, loss.clipped) for loss in metric.losses()]


# -- fits -------------------------------------------------------------------------------------------------------------------


def observed(folder: Path) -> dict[str, Any]:
    """Every observer in float, weights standing still."""
    model = Chain()
    trainer_of(folder, QuantFusionCallback(OBSERVERS, schedule={"quantize_start": 3, "observe_stop": 3}, verbose=0)).fit(
        model, loader()
    )
    return left(model)


def quantized(folder: Path) -> dict[str, Any]:
    model, callback = Chain(lr=0.05), QuantFusionCallback(OBSERVERS, verbose=0, log_every_n_steps=1)
    trainer = trainer_of(folder, callback, max_epochs=2)
    trainer.fit(model, loader())
    assert callback.deployed_model is not None
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("quant/")}
    return left(model, metrics=metrics, out=callback.deployed_model(torch.linspace(-3, 3, 60).reshape(10, 6)), run=callback._run)


def learned(folder: Path, start: int = 2, **options: Any) -> dict[str, Any]:
    """Learned scales behind a float beginning, whose gradients the reducer does not know."""
    model, callback = Chain(lr=0.05), QuantFusionCallback(LEARNED, schedule={"quantize_start": start}, verbose=0)
    trainer = trainer_of(folder, callback, max_epochs=2, **options)
    trainer.fit(model, loader())
    scales = {name: one.detach().clone() for name, one in learned_parameters(model).items()}
    return left(model, scales=scales, steps=trainer.global_step)


def compressed(folder: Path) -> dict[str, Any]:
    """Masks from gradients, from a random state that differs and from weights, a teacher, and learned scales, in one fit."""
    masked = zip(["b", "c", "d"], ["taylor", "random", "l2"], strict=True)
    entries = [{"op_names": [name], "sparse_ratio": 0.5, "metric": metric} for name, metric in masked]
    pruning = {"config_list": entries, "schedule": "agp", "start": 1, "stop": 5, "updates": 3}
    learning: dict[str, Any] = {"distillation": ["kl", {"op_names": ["b"], "link": "a"}], "teacher": "self"}
    options: dict[str, Any] = {"schedule": {"quantize_start": 2}, "verbose": 0, **learning}
    callback = QuantFusionCallback(LEARNED, pruning=pruning, **options)
    torch.manual_seed(dist.get_rank() if several() else 0)
    model = Chain(lr=0.05)
    torch.manual_seed(dist.get_rank() if several() else 0)
    trainer = trainer_of(folder, callback, max_epochs=2)
    trainer.fit(model, loader())
    assert callback.masks is not None and callback.shrunk is not None and callback.deployed_model is not None
    scales = {name: one.detach().clone() for name, one in learned_parameters(model).items()}
    masks = {name: mask.clone() for name, mask in callback.masks.by_target().items()}
    shapes = {name: list(one.shape) for name, one in callback.shrunk.model.named_parameters()}
    return left(model, scales=scales, masks=masks, shapes=shapes)


def static(folder: Path) -> dict[str, Any]:
    """What `learned` is where the reducer is told that the graph stays as it is."""
    options: dict[str, Any] = {"strategy": DDPStrategy(static_graph=True)} if several() else {}
    return learned(folder, **options)


class Breaks(Callback):
    """In the first process, the gradient of a learned scale overflows once."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if several() and dist.get_rank() == 0 and trainer.global_step == 2:
            (first, *_) = learned_parameters(pl_module).values()
            first.grad = torch.full_like(first, math.inf)


def scaled(folder: Path) -> dict[str, Any]:
    """A GradScaler, which leaves a step out where it finds infinity."""
    model, callback = Chain(lr=0.05, momentum=0.0), QuantFusionCallback(LEARNED, verbose=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            before.append(pl_module.get_parameter("a.weight").detach().clone())

    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer_of(folder, Breaks(), callback, Watch(), plugins=[plugin]).fit(model, loader())
    stood = [bool(torch.equal(a, b)) for a, b in itertools.pairwise(before)]
    scales = {name: one.detach().clone() for name, one in learned_parameters(model).items()}
    return left(model, scales=scales, stood=stood, factor=scaler.get_scale())


class Manual(Chain):
    """Two optimizers, and a batch that is skipped."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        if batch_idx == 3:
            return
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return torch.optim.SGD(parameters[:4], lr=self.lr), torch.optim.SGD(parameters[4:], lr=self.lr)


def manual(folder: Path) -> dict[str, Any]:
    model = Manual()
    trainer_of(folder, QuantFusionCallback(LEARNED, schedule={"quantize_start": 2}, verbose=0), max_epochs=2).fit(model, loader())
    return left(model, scales={name: one.detach().clone() for name, one in learned_parameters(model).items()})


class Skips(Chain):
    """A layer that the first process alone calls, in one batch."""

    short = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = self.twice(self.twice(x))
        x = x if self.short else self.b(x)
        out: Tensor = self.head(F.relu(self.d(F.relu(self.c(x)))))
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.short = several() and dist.get_rank() == 1 and batch_idx == 2
        return super().training_step(batch, batch_idx)


def skipped(folder: Path) -> dict[str, Any]:
    model = Skips(lr=0.05)
    options = {"strategy": "ddp_find_unused_parameters_true"} if several() else {}
    trainer_of(folder, QuantFusionCallback(OBSERVERS, verbose=0), **options, max_epochs=2).fit(model, loader())
    return left(model)


class Aside(Chain):
    """A layer that nothing but a teacher has a word about."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.aside = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(self.a(x))
        return super().forward(x)


def distilled(folder: Path) -> dict[str, Any]:
    """A teacher with a projection between widths; DistributedDataParallel looks for parameters without gradient."""
    torch.manual_seed(5)
    teacher, model = Chain(), Aside()
    entries = ["kl", {"op_names": ["aside"], "link": "b"}, {"op_names": ["twice"], "apply_method": "cosine", "lambda": 0.5}]
    callback = Distils(entries, teacher, example=torch.zeros(2, 6))
    options = {"strategy": "ddp_find_unused_parameters_true"} if several() else {}
    trainer_of(folder, callback, max_epochs=2, **options).fit(model, loader())
    scales = {name: one.detach().clone() for name, one in callback.distiller.learned.items()}
    return left(model, scales=scales, moved=bool((model.aside.weight - Aside().aside.weight).abs().max() > 1e-3))


def calibrated(folder: Path) -> dict[str, Any]:
    """Without training. One process has the batches that the two have, one after the other."""
    calibration = {"batches": 6, "equalize": True, "correct_biases": True, "learn_rounding": True}
    torch.manual_seed(dist.get_rank() if several() else 0)  # the processes' random states differ; the first one's counts
    model, callback = Chain(), QuantFusionCallback("int8", calibration=calibration, verbose=0)
    torch.manual_seed(dist.get_rank() if several() else 0)
    x = torch.cat([x for x, _ in batches((6,))])
    trainer_of(folder, callback, max_epochs=0).fit(model, DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), BATCH))
    return left(model)


def whole(folder: Path) -> dict[str, Any]:
    """A convolutional net with batch norm: best checkpoint, files, a test, a resume."""
    found: dict[str, Any] = {}
    for name, parts in (("straight", (4,)), ("resumed", (2, 4))):
        path: Path | None = None
        for epochs in parts:
            torch.manual_seed(0)
            model, place = Lit(optimizer="adam", lr=0.01), folder / name
            keeper = ModelCheckpoint(dirpath=place, monitor="val_loss", save_last=True, filename=f"best{epochs}-{{epoch}}")
            options: dict[str, Any] = {"schedule": {"observe_stop": None}, "export": [".pt2"], "dirpath": place, "verbose": 0}
            callback = QuantFusionCallback("int8", **options)
            trainer = trainer_of(folder, callback, keeper, max_epochs=epochs)
            trainer.fit(model, loader((3, 8, 8)), loader((3, 8, 8), 2, seed=1), ckpt_path=path)
            path = place / "last.ckpt"
        assert callback.deployed_model is not None
        found[name] = left(model, out=callback.deployed_model(torch.linspace(-3, 3, 384).reshape(2, 3, 8, 8)))
        found[name]["files"] = sorted(one.name for one in place.iterdir())
        (tested,) = trainer.test(model, loader((3, 8, 8), 2, seed=1), ckpt_path="best", verbose=False)
        found[name]["test"] = tested["test_loss"]
    return found


def failures(folder: Path) -> dict[str, str]:
    """What each process says where only one of them fails."""
    found = {}

    def said(name: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001
            found[name] = f"{type(error).__name__}: {error}"

    (folder / "file").write_text("a file where a folder is wanted")
    callback = QuantFusionCallback(OBSERVERS, export=".pt2", dirpath=folder / "file" / "out", verbose=0)
    said("folder", lambda: trainer_of(folder, callback).fit(Chain(), loader()))
    callback = QuantFusionCallback(OBSERVERS, export=".pt2", dirpath=folder / "taken", verbose=0)
    said("export", lambda: trainer_of(folder, callback).fit(Takes(folder / "taken" / "model.pt2"), loader()))
    rank = dist.get_rank()
    example = torch.zeros(2, 6 + rank)
    said("example", lambda: trainer_of(folder, QuantFusionCallback("int8", example_input=example)).fit(Chain(), loader()))
    config: list[dict[str, Any]] = [{"op_names": ["a", "b"] if rank else ["a", "c"]}]
    said("plan", lambda: trainer_of(folder, QuantFusionCallback(config, verbose=0)).fit(Chain(), loader()))
    data = loader() if not rank else DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4)))
    options: dict[str, Any] = {"calibration": 2, "example_input": torch.zeros(2, 6), "verbose": 0}
    said("calibration", lambda: trainer_of(folder, QuantFusionCallback("int8", **options), max_epochs=0).fit(Narrow(), data))
    return found


class Takes(Chain):
    """Makes a folder where a file is to be written, once training has begun."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def on_train_start(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)


class Narrow(Chain):
    """A training step that takes batches of one width only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert batch[0].shape[1] == 6, "too narrow"
        return super().training_step(batch, batch_idx)


def synced(folder: Path) -> dict[str, Any]:
    """SyncBatchNorm, which needs an accelerator: here it computes as the batch norm of its process does, and may do so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward)
        patch.setattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)
        model, kinds = Lit(), []

        class Watch(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                kinds.append(type(pl_module.bn1).__name__)

        callback = QuantFusionCallback("int8", verbose=0)
        found: dict[str, Any] = {}
        for name in ("first", "again", "without"):
            trainer = trainer_of(folder, callback, Watch(), sync_batchnorm=name != "without")
            trainer.fit(model, loader((3, 8, 8)), loader((3, 8, 8), 2, seed=1))
            kinds.append(type(model.bn1).__name__)
            (tested,) = trainer.test(model, loader((3, 8, 8), 2, seed=1), verbose=False)
            copy = callback.deployed_model
            assert isinstance(copy, LightningModule)
            (deployed,) = trainer_of(folder).test(copy, loader((3, 8, 8), 2, seed=1), verbose=False)
            norms = [layer.batch_norm for layer in callback.plan.layers] if callback.plan else []
            found[name] = {"tested": tested, "deployed": deployed, "norms": norms}
    return {**found, "kinds": kinds}


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **{
        f"meet {observer} {shape}": lambda _, o=observer, s=shape: meet(o, s)  # type: ignore[misc]
        for observer in ("moving_average", "minmax")
        for shape in ("per_tensor", "per_channel")
    },
    **{f"meet {one} device": lambda _, o=one: meet(o, "per_tensor", host=False) for one in ("moving_average", "minmax")},  # type: ignore[misc]
    **{f"meet {one} per_tensor": lambda _, o=one: meet(o, "per_tensor") for one in ("percentile:75", "entropy", "mse")},  # type: ignore[misc]
    "observed": observed,
    "quantized": quantized,
    "learned": learned,
    "learned static": static,
    "learned accumulated": lambda folder: learned(folder, accumulate_grad_batches=2, gradient_clip_val=0.5),
    "learned at once": lambda folder: learned(folder, start=0),
    "manual": manual,
    "skipped": skipped,
    "calibrated": calibrated,
    "distilled": distilled,
    "compressed": compressed,
}
ONLY_TWO: dict[str, Callable[[Path], Any]] = {
    "scaled": scaled,
    "whole": whole,
    "synced": synced,
    "failures": failures,
    "measured": lambda _: measured(),
}


# -- fits in processes of their own -----------------------------------------------------------------------------------------


class Fails(Lit):
    def on_train_epoch_start(self) -> None:
        raise RuntimeError("fails on purpose")


def elsewhere(folder: Path, strategy: str) -> dict[str, Any]:
    """What the process that calls fit has when its children have trained."""
    torch.manual_seed(0)
    model, place = Lit(lr=0.01), folder / strategy
    pruning = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    callback = QuantFusionCallback("int8", pruning=pruning, export=".pt2", dirpath=place, verbose=0)
    keeper = ModelCheckpoint(dirpath=place, save_last=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(folder, callback, keeper, strategy=strategy, devices=2)
    trainer.fit(model, loader((3, 8, 8)), loader((3, 8, 8), 2, seed=1))
    x = torch.linspace(-3, 3, 384).reshape(2, 3, 8, 8)
    assert callback.deployed_model is not None
    with torch.no_grad():
        found = left(model, before=before, out=callback.deployed_model(x), filed=load_deployed(place / "model.pt2")(x))
    found.update(plan=str(callback.plan), kind=type(callback.deployed_model).__name__, handed=callback._handover.path.exists())
    found["files"] = sorted(one.name for one in place.iterdir())
    assert callback.shrunk is not None and callback.shrunk.model is callback.deployed_model
    found["removed"], found["masked"] = dict(callback.shrunk.removed), str(callback.pruning_plan)
    try:
        callback.convert(model)
    except ConfigError as error:
        found["by hand"] = str(error)
    found["kinds"] = [type(module).__name__ for module in model.children()]
    trainer.save_checkpoint(folder / "parent.ckpt")
    found["saved"] = torch.load(folder / "parent.ckpt", weights_only=True)["callbacks"]["QuantFusionCallback"]["decisions"]
    data, deployed = loader((3, 8, 8), 2, seed=1), callback.deployed_model
    assert isinstance(deployed, Lit)
    found["test"] = trainer.test(model, data, verbose=False)[0]["test_loss"]  # in processes of its own
    found["best"] = trainer.test(model, data, ckpt_path="best", verbose=False)[0]["test_loss"]
    found["deployed"] = trainer_of(folder).test(deployed, data, verbose=False)[0]["test_loss"]
    found["alone"] = trainer_of(folder, callback).test(model, data, verbose=False)[0]["test_loss"]
    try:
        trainer_of(folder, callback, strategy=strategy, devices=2).fit(Fails(), loader((3, 8, 8)))
    except Exception as error:  # noqa: BLE001  (a launcher's own)
        found["failed"] = "RuntimeError" if "fails on purpose" in str(error) else str(error)
    return {**found, "stale": callback.deployed_model is not None}


def main(folder: Path, rank: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, scenario in {**SCENARIOS, **ONLY_TWO}.items():
        place = folder / name.replace(":", "_")
        place.mkdir(exist_ok=True)
        results[name] = scenario(place)
        torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        main(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        warnings.filterwarnings("ignore")
        torch.save(elsewhere(Path(sys.argv[1]), sys.argv[2]), Path(sys.argv[1]) / f"{sys.argv[2]}.pt")
