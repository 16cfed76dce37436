# SPDX-License-Identifier: Apache-2.0
"""What a fit found out about the files that it wrote: compared on data of the validation, with the prepared model beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback
from lightning_quant.prepare import restore_model, simulated

TrainerMaker = Callable[..., Trainer]
VALIDATION = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def validation(images: Tensor = VALIDATION, batch_size: int = 7) -> DataLoader[Any]:
    """A first batch of seven: the loader for training has none of that size."""
    return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size)


def fitted(make: TrainerMaker, model: Lit, **options: Any) -> QuantFusionCallback:
    callback = QuantFusionCallback(FUSED, export=".pt2", source="last", verbose=0)
    make(max_epochs=2, callbacks=[callback], **options).fit(model, loader(), validation())
    return callback


def test_files_are_compared_on_the_first_batch_of_the_validation(quiet_trainer: TrainerMaker) -> None:
    model = Lit()
    callback = fitted(quiet_trainer, model)
    (exported,) = callback.exported
    assert exported.path.name == "model.pt2" and exported.execution is None
    x = VALIDATION[:7]
    with torch.no_grad():
        evaluated = model.eval()(x)
        with simulated(model):
            faked = model(x)
        assert callback.deployed_model is not None
        shipped = callback.deployed_model(x)
    file, prepared, fake = exported.parity.outputs
    assert [one.pair for one in exported.parity.outputs] == [
        "file, deployed",
        "deployed, prepared in eval",
        "deployed, fake-quantized",
    ]
    assert [one.values for one in exported.parity.outputs] == [shipped.numel()] * 3 and len(shipped) == 7
    assert (file.most, prepared.most) == (0, float((shipped - evaluated).abs().max()))
    assert fake.relative == pytest.approx(float((shipped - faked).abs().max() / faked.abs().max()), rel=1e-6)
    assert fake.relative > 0, "else this says nothing of which is which"
    assert exported.parity.different == 0 < exported.parity.integers
    assert exported.summary().endswith(" integers equal; outputs equal")


def test_without_a_validation_they_are_compared_on_the_recorded_batch(quiet_trainer: TrainerMaker) -> None:
    (exported,) = fitted(quiet_trainer, Lit(), limit_val_batches=0).exported
    batch = len(next(iter(loader()))[0])
    assert {one.classes for one in exported.parity.outputs} == {batch}


class Halved(Lit):
    """Validates on images of another size than it trains on: a file with fixed sizes cannot take them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self(nn.functional.interpolate(batch[0], scale_factor=0.5).repeat(1, 1, 2, 2)[..., :7])


def test_a_validation_of_another_kind_is_not_used(quiet_trainer: TrainerMaker) -> None:
    class Pooled(Halved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.adaptive_avg_pool2d(x, 8))

    (exported,) = fitted(quiet_trainer, Pooled()).exported
    assert {one.classes for one in exported.parity.outputs} == {len(next(iter(loader()))[0])}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_module(quiet_trainer: TrainerMaker, fails: bool) -> None:
    class Fails(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert bool(self._forward_pre_hooks) == (batch_idx == 0), "the first batch is watched"
            if fails:
                raise RuntimeError("in the user's own code")
            super().validation_step(batch, batch_idx)

    model = Fails()
    if fails:
        with pytest.raises(RuntimeError, match="in the user's own code"):
            fitted(quiet_trainer, model)
    else:
        fitted(quiet_trainer, model)
    assert not model._forward_pre_hooks
    restore_model(model)


def test_without_files_nothing_is_watched(quiet_trainer: TrainerMaker) -> None:
    class Free(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self._forward_pre_hooks
            super().validation_step(batch, batch_idx)

    callback = QuantFusionCallback(FUSED, verbose=0)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Free(), loader(), validation())
    assert callback.exported == () and callback.deployed_model is not None
