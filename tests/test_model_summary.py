# SPDX-License-Identifier: Apache-2.0
"""Owns what Lightning's model summaries show of a prepared model: the rows of the float one, types that say what is fused."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from toys import FUSED, Lit, loader

from lightning_quant import QuantFusionCallback

TYPES = {
    "conv1": "FusedConv2d",
    "bn1": "FusedBatchNorm2d",
    "relu1": "FusedReLU",
    "conv2": "FusedConv2d",
    "bn2": "FusedBatchNorm2d",
    "relu2": "FusedReLU",
    "pool": "MaxPool2d",
    "fc": "FusedLinear",
}


def lit(example: bool) -> Lit:
    model = Lit()
    if example:
        model.example_input_array = torch.randn(2, 3, 8, 8)
    return model


class Seen(ModelSummary):
    """Keeps what it would print."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, list[str]] = {}
        self.flops = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Lit) -> None:  # type: ignore[override]
        summary = self._summary(trainer, pl_module)
        self.table, self.flops = dict(summary._get_summary_data()), summary.total_flops


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_rows_are_those_of_the_float_model(example: bool, first: bool, quiet_trainer: Callable[..., Trainer]) -> None:
    before = summarize(lit(example))
    rows = dict(before._get_summary_data())
    seen, callback = Seen(), QuantFusionCallback(FUSED, verbose=0)
    order: list[Callback] = [callback, seen] if first else [seen, callback]
    model = lit(example)
    trainer = quiet_trainer(max_epochs=1, callbacks=order)
    trainer.fit(model, loader(), loader(seed=1))
    after = summarize(model)
    types = TYPES if first else {name: cls.removeprefix("Fused") for name, cls in TYPES.items()}
    expected = {key: list(types.values()) if key == "Type" else column for key, column in rows.items()}
    assert {key: list(column) for key, column in seen.table.items()} == {key: list(column) for key, column in expected.items()}
    assert seen.flops == before.total_flops
    assert list(after._get_summary_data()) and after.total_parameters == before.total_parameters
    assert after.total_flops == before.total_flops, "integer layers count as many operations"
    assert (after.total_flops > 0) == example


def test_a_rich_summary(quiet_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich.console")
    text = io.StringIO()
    monkeypatch.setattr("rich.get_console", lambda: rich.Console(file=text, width=120))
    callbacks = [QuantFusionCallback(FUSED, verbose=0), RichModelSummary()]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(lit(True), loader(), loader(seed=1))
    lines = text.getvalue().splitlines()
    for name, cls in TYPES.items():
        assert [line for line in lines if f" {name} " in line and f" {cls} " in line], name
