# SPDX-License-Identifier: Apache-2.0
"""Owns what all tests share: the folder of real data, quiet Trainers, the integers that a model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.settings import DistillationSetting, PruningSetting, QuantizationSetting

torch.set_num_threads(1)  # small nets: a second thread costs more than it gives, and far more on a busy machine
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets; absent outside the project's own machines, but CI must have it."""
    if not SHARED.is_dir() and not os.environ.get("CI"):
        pytest.skip("../shared is not here")
    assert SHARED.is_dir(), "CI runs with ../shared beside the checkout"
    return SHARED


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Trainers on the CPU without bars, loggers and summaries, in a folder of the test."""

    def make(**options: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **options})

    return make


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    tables: list[dict[Any, Any]] = [
        table for owner in (QuantizationSetting, PruningSetting, DistillationSetting) for table in (owner.registry, owner._types)
    ]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


class IntegerRecorder(TorchDispatchMode):
    """Collects every uint8 tensor that our operators make, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "lightning_quant" and result.dtype == torch.uint8:
            self.tensors.append(result)
        return result


def run_recorded(model: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(output, integer tensors) of one call without gradients."""
    with torch.no_grad(), IntegerRecorder() as recorder:
        output = model(x)
    return output, recorder.tensors
