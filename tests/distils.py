# SPDX-License-Identifier: Apache-2.0
"""Owns a callback with nothing but distillation, and the same loss written into a training step by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from toys import Lit, Net, loader

from lightning_quant import make_plan, prepare_model
from lightning_quant.checkpoints import with_learned, without_learned
from lightning_quant.distiller import Distiller
from lightning_quant.prepare import give_to_optimizers, learned_parameters

IMAGE = torch.zeros(2, 3, 8, 8)


class Distils(Callback):
    """What the package's callback does with a Distiller, and `config_list`, if there is one, around it."""

    def __init__(self, distillation: Any, teacher: Any, *, example: Any = IMAGE, config_list: Any = None) -> None:
        self.distiller = Distiller(distillation, teacher)
        self.example, self.config_list = example, config_list
        self.pending: Mapping[str, Any] | None = None
        self.losses: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.precision_plugin.forward_context():
            self.distiller.begin(pl_module, example=trainer.precision_plugin.convert_input(self.example))
        if self.config_list is not None:
            prepare_model(pl_module, make_plan(pl_module, self.config_list, example_input=self.example))
        if self.pending is not None:
            self.distiller.load_state_dict(self.pending)
        give_to_optimizers(pl_module, trainer.optimizers)

    def on_train_batch_start(self, *_: Any) -> None:
        self.distiller.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.distiller.stop()
        self.losses.append({name: float(value) for name, value in self.distiller.losses.items()})

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in learned_parameters(pl_module).values() if trainer.world_size > 1 else []:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= trainer.world_size

    def on_fit_end(self, *_: Any) -> None:
        self.distiller.end()

    def on_exception(self, *_: Any) -> None:
        self.distiller.end()

    def state_dict(self) -> dict[str, Any]:
        return self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pending = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        pairs = zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True)
        parted = [without_learned(saved, optimizer, pl_module) for saved, optimizer in pairs]
        checkpoint["optimizer_states"] = [saved for saved, _ in parted]
        checkpoint["removed"] = [removed for _, removed in parted]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = zip(checkpoint["optimizer_states"], checkpoint["removed"], strict=True)
        checkpoint["optimizer_states"] = [with_learned(saved, removed) for saved, removed in states]


ENTRIES: list[dict[str, Any]] = [
    {"apply_method": "kl", "temperature": 4.0},
    {"op_names": ["pool"], "lambda": 0.5},
]
LAYERS = ("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "pool", "flatten", "fc")


def by_layer(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each layer of a `Net` makes."""
    made: dict[str, Tensor] = {}
    for name in LAYERS:
        x = x.flatten(1) if name == "flatten" else getattr(net, name)(x)
        made[name] = x
    return made


def by_hand(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The loss of ENTRIES, from its formulas."""
    p, q = (made["fc"].float().div(4).log_softmax(1) for made in (teacher, student))
    kl = (p.exp() * (p - q)).sum(1).mean() * 16
    return kl + 0.5 * (student["pool"].float() - teacher["pool"].float()).square().mean()


class ByHand(Lit):
    """`Lit` whose own step has the loss of ENTRIES."""

    @classmethod
    def of(cls, teacher: nn.Module) -> Self:
        """One from seed 0, with a copy of the teacher."""
        torch.manual_seed(0)
        made = cls()
        made.__dict__["teacher"] = copy.deepcopy(teacher).eval()
        return made

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            teacher = by_layer(self.__dict__["teacher"], batch[0])
        student = by_layer(self, batch[0])
        return F.cross_entropy(student["fc"].float(), batch[1]) + by_hand(student, teacher)


# -- short ways ------------------------------------------------------------------------------------------------------------

Make = Callable[..., Trainer]


def teacher_net(seed: int = 7) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().double() for name, value in model.state_dict().items()}


def fit(make: Make, model: Any, *callbacks: Callback, **options: Any) -> Trainer:
    """Four batches an epoch, two epochs unless told else."""
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make(**{"callbacks": list(callbacks), "max_epochs": 2, "num_sanity_val_steps": 0, **options})
    trainer.fit(model, loader(), loader(16), ckpt_path=ckpt_path)
    return trainer


def assert_close(a: nn.Module, b: nn.Module, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for (name, one), other in zip(weights(a).items(), weights(b).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=f"{name} differs")


def begun(distillation: Any, student: nn.Module, teacher: Any, example: Any = IMAGE, **options: Any) -> Distiller:
    distiller = Distiller(distillation, teacher)
    distiller.begin(student, example=example, **options)
    return distiller


def added(distiller: Distiller, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What one training forward adds, by link."""
    with distiller.batch():
        model(*inputs)
        distiller.loss()
    return distiller.losses


def copied(model: nn.Module, into: Net) -> Net:
    into.load_state_dict(model.state_dict())
    return into
